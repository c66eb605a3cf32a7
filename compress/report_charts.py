"""Charts of a report as inline SVG: pure functions from numbers to text, no script, colours left to the page's style.

Every chart has axes with units, a title and a description for those who do not see it. Shapes differ where colours do.
Text from outside is escaped by `Markup.format`, so the result is safe to put into a page as it is.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 72, 14, 16, 46
NARROW = frozenset(set(string.ascii_lowercase + string.digits + "-_.,:/ ()") - {"m", "w"})
SHAPES = ("circle", "square", "diamond", "triangle")
LINE = 13
"""Height of a label."""
LETTER, WIDE = 6.6, 10.6
"""Widths of its characters, and of capitals, m, w and those of other scripts."""


@dataclass(frozen=True)
class Axis:
    """What an axis shows: its label, unit included, and the range of values; whole: of which it names whole ones."""

    label: str
    low: float
    high: float
    whole: bool = False


@dataclass(frozen=True)
class Point:
    """One mark: position, half length of its error bar (None: none is known), label, series (colour and shape)."""

    x: float
    y: float
    error: float | None = None
    label: str = ""
    series: int = 0


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that lie between `low` and `high`."""
    span = high - low
    if not span > 0:
        return [low]
    step = 10.0 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def axis_ticks(axis: Axis) -> list[float]:
    """The ticks of an axis."""
    found = ticks(axis.low, axis.high)
    return [value for value in found if value == round(value)] if axis.whole else found


def tick_label(value: float, all_ticks: Sequence[float]) -> str:
    """A tick with as many decimals as the step between ticks needs."""
    step = abs(all_ticks[1] - all_ticks[0]) if len(all_ticks) > 1 else abs(value) or 1
    if max(abs(tick) for tick in all_ticks) >= 1e6 or step < 1e-5:
        return f"{value:.2g}"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def padded(values: Sequence[float], *, share: float = 0.12, floor: float | None = None) -> tuple[float, float]:
    """A range around `values` with room at both ends; not below `floor`."""
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * share or 1.0
    return (low - room if floor is None else max(floor, low - room)), high + room


def points_chart(
    title: str,
    description: str,
    points: Sequence[Point],
    x: Axis,
    y: Axis,
    *,
    series: Sequence[str] = (),
    front: Sequence[tuple[float, float]] = (),
    line: tuple[float, str] | None = None,
) -> Markup:
    """Marks in two dimensions. series: names for a legend. front: corners of a dashed line. line: (y, label) of a
    horizontal one.
    """
    frame = _Frame(x, y)
    named = [point for point in points if point.label]
    labels = [_Label.beside(frame.x(point.x), point.label) for point in named]
    most = max((sum(label.meets(other) for other in labels) for label in labels), default=0)
    frame = _Frame(x, y, height=max(HEIGHT, TOP + BOTTOM + LINE * most))
    parts = [frame.axes()]
    if front:
        corners = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in front)
        parts.append(Markup('<polyline class="front" points="{}"/>').format(corners))
    if line is not None:
        height = frame.y(line[0])
        parts.append(
            Markup('<line class="front" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                LEFT, WIDTH - RIGHT, height, height
            )
        )
        parts.append(
            Markup('<text class="small" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
                WIDTH - RIGHT, height - 4, line[1]
            )
        )
    for point in points:
        across, up = frame.x(point.x), frame.y(point.y)
        if point.error is not None:
            ends = frame.y(point.y - point.error), frame.y(point.y + point.error)
            parts.append(_error_bar(across, *ends, point.series))
        parts.append(_mark(across, up, point))
    marks = [(frame.x(point.x), frame.y(point.y)) for point in named]
    every = [(frame.x(point.x), frame.y(point.y)) for point in points]
    heights = _heights(labels, marks, every, TOP, frame.height - BOTTOM)
    parts += [label.drawn(*mark, height) for label, mark, height in zip(labels, marks, heights, strict=True)]
    if len(series) > 1:
        parts.append(_legend(series))
    return _svg(title, description, parts, height=frame.height, legend=len(series) > 1)


def map_chart(
    title: str, description: str, cells: Sequence[Point], columns: int, rows: int, x: str, y: str, series: Sequence[str]
) -> Markup:
    """Marks in a grid of columns and rows that count from 0; a cell without one stays empty. x, y: what those are."""
    cell = min((WIDTH - LEFT - RIGHT) / columns, 14.0)
    height = round(TOP + BOTTOM + cell * max(rows, 4))
    axes = Axis(x, -0.5, columns - 0.5, whole=True), Axis(y, -0.5, rows - 0.5, whole=True)
    frame = _Frame(*axes, height=height, right=round(LEFT + cell * columns))
    marks = [_mark(frame.x(point.x), frame.y(point.y), point, 0.42 * cell) for point in cells]
    return _svg(title, description, [frame.axes(), *marks, _legend(series)], height=height, legend=True)


def bars_chart(
    title: str, description: str, values: Sequence[float], marked: Sequence[bool], x: Axis, y: Axis
) -> Markup:
    """One bar for every value, at x = 0, 1, 2 …. marked: those to be drawn in the second colour."""
    frame = _Frame(x, y)
    width = max(1.5, 0.72 * (frame.x(1) - frame.x(0)))
    parts = [frame.axes()]
    for index, (value, second) in enumerate(zip(values, marked, strict=True)):
        top = frame.y(value)
        height = max(0.5, frame.y(y.low) - top)
        hint = f"{index}: {value:.3g}"
        parts.append(_box(f"s{int(second)}", frame.x(index) - width / 2, top, width, height, hint))
    return _svg(title, description, parts)


def stack_chart(
    title: str,
    description: str,
    rows: Sequence[tuple[str, Sequence[float]]],
    series: Sequence[str],
    colours: Sequence[str],
    unit: str,
) -> Markup:
    """Horizontal bars made of parts that add up. rows: (label, one value for each of `series`).
    colours: classes of the page's style, one for each of `series`."""
    longest = max(sum(values) for _, values in rows)
    x, band = Axis(unit, 0.0, longest * 1.04), 34
    frame = _Frame(x, Axis("", 0.0, 1.0), height=TOP + BOTTOM + band * len(rows), left=92)
    parts = [frame.axes(vertical=False)]
    for index, (label, values) in enumerate(rows):
        top, start = TOP + band * index + 5, 0.0
        parts.append(Markup('<text x="86" y="{}" text-anchor="end">{}</text>').format(top + 16, label))
        for name, colour, value in zip(series, colours, values):
            width = frame.x(start + value) - frame.x(start)
            hint = f"{name}: {value:,.4g} {unit}"
            parts.append(_box(colour, frame.x(start), top, width, 24, hint))
            start += value
    parts.append(_legend(series, colours))
    return _svg(title, description, parts, height=frame.height, legend=True)


class _Frame:
    """Axes of a chart: values to coordinates."""

    def __init__(self, x: Axis, y: Axis, height: int = HEIGHT, left: int = LEFT, right: int = WIDTH - RIGHT):
        self.axis_x, self.axis_y, self.height, self.left, self.right = x, y, height, left, right

    def x(self, value: float) -> float:
        share = (value - self.axis_x.low) / ((self.axis_x.high - self.axis_x.low) or 1.0)
        return self.left + share * (self.right - self.left)

    def y(self, value: float) -> float:
        share = (value - self.axis_y.low) / ((self.axis_y.high - self.axis_y.low) or 1.0)
        return self.height - BOTTOM - share * (self.height - BOTTOM - TOP)

    def axes(self, *, vertical: bool = True) -> Markup:
        """Lines, ticks and labels of both axes; or of the horizontal one alone."""
        bottom, right = self.height - BOTTOM, self.right
        parts = []
        if vertical:
            found = axis_ticks(self.axis_y)
            for value in found:
                parts.append(
                    Markup(
                        '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                        '<text x="{}" y="{:.1f}" text-anchor="end">{}</text>'
                    ).format(
                        self.left,
                        right,
                        self.y(value),
                        self.y(value),
                        self.left - 6,
                        self.y(value) + 4,
                        tick_label(value, found),
                    )
                )
            middle = (TOP + bottom) / 2
            parts.append(
                Markup('<text x="12" y="{0}" text-anchor="middle" transform="rotate(-90 12 {0})">{1}</text>').format(
                    middle, self.axis_y.label
                )
            )
        found = axis_ticks(self.axis_x)
        for value in found:
            parts.append(
                Markup(
                    '<line class="axis" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
                    '<text x="{0:.1f}" y="{3}" text-anchor="middle">{4}</text>'
                ).format(self.x(value), bottom, bottom + 4, bottom + 17, tick_label(value, found))
            )
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
                (self.left + right) / 2, bottom + 35, self.axis_x.label
            )
        )
        parts.append(Markup('<path class="axis" d="M{0} {1}V{2}H{3}"/>').format(self.left, TOP, bottom, right))
        return Markup("").join(parts)


def _mark(x: float, y: float, point: Point, radius: float = 4.5) -> Markup:
    kind, series = SHAPES[point.series % 4], point.series % 4
    hint = Markup("<title>{}</title>").format(point.label) if point.label else Markup("")
    if kind == "circle":
        return Markup('<circle class="fill s{}" cx="{:.1f}" cy="{:.1f}" r="{:.3g}">{}</circle>').format(
            series, x, y, radius, hint
        )
    corners = {
        "square": [(-4, -4), (4, -4), (4, 4), (-4, 4)],
        "diamond": [(0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)],
        "triangle": [(0, -5.5), (5, 4), (-5, 4)],
    }[kind]
    scale = radius / 4.5
    shape = " ".join(f"{x + scale * a:.1f},{y + scale * b:.1f}" for a, b in corners)
    return Markup('<polygon class="fill s{}" points="{}">{}</polygon>').format(series, shape, hint)


def _error_bar(x: float, low: float, high: float, series: int) -> Markup:
    return Markup('<path class="error s{}" d="M{:.1f} {:.1f}V{:.1f}M{:.1f} {:.1f}h8M{:.1f} {:.1f}h8"/>').format(
        series % 4, x, low, high, x - 4, low, x - 4, high
    )


@dataclass(frozen=True)
class _Label:
    """Text beside a mark, from `left` to `right`; before: it ends there, rather than begins."""

    text: str
    left: float
    right: float
    before: bool

    @classmethod
    def beside(cls, x: float, text: str) -> _Label:
        """To the right of a mark at x; to its left where the right has no room."""
        shown = text if len(text) <= 28 else f"{text[:27]}…"
        width = sum(LETTER if letter in NARROW else WIDE for letter in shown)
        before = x + 14 + width > WIDTH - 2
        return cls(shown, x - 14 - width if before else x + 14, x - 14 if before else x + 14 + width, before)

    def meets(self, other: _Label) -> bool:
        """Whether the two cannot stand in one line."""
        return self.left < other.right + LETTER and other.left < self.right + LETTER

    def covers(self, x: float, y: float, height: float) -> bool:
        """Whether it lies upon a mark."""
        return self.left - 6 < x < self.right + 6 and abs(y - height) < LINE

    def drawn(self, x: float, y: float, height: float) -> Markup:
        """At `height`, with a line to its mark at (x, y)."""
        end, sign, anchor = (self.right, -1, "end") if self.before else (self.left, 1, "start")
        return Markup(
            '<path class="leader" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>'
            '<text class="small" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>'
        ).format(x + 6 * sign, y, end - 2 * sign, height, end, height + 4, anchor, self.text)


def _heights(
    labels: Sequence[_Label],
    marks: Sequence[tuple[float, float]],
    every: Sequence[tuple[float, float]],
    low: float,
    high: float,
) -> list[float]:
    """Of every label, the nearest to its mark of the lines between `low` and `high` in which it meets no other; better
    a few lines away than upon any of `every` mark. There have to be as many lines as labels that meet one.
    """
    lines = [low + LINE * (number + 0.5) for number in range(int((high - low) // LINE))]
    held: list[list[_Label]] = [[] for _ in lines]
    found = [0.0] * len(labels)

    def distance(place: int, line: int) -> float:
        covered = any(labels[place].covers(*mark, lines[line]) for mark in every)
        return abs(lines[line] - marks[place][1]) + 4 * LINE * covered

    for place in sorted(range(len(labels)), key=lambda place: -marks[place][1]):
        free = [line for line, others in enumerate(held) if not any(labels[place].meets(other) for other in others)]
        line = min(free, key=partial(distance, place))
        held[line].append(labels[place])
        found[place] = lines[line]
    return found


def _box(colour: str, x: float, y: float, width: float, height: float, hint: str) -> Markup:
    return Markup(
        '<rect class="fill {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
    ).format(colour, x, y, width, height, hint)


def _legend(series: Sequence[str], colours: Sequence[str] | None = None) -> Markup:
    """Names above a chart, in as many lines as they need. colours: classes of boxes; without them, marks of points."""
    parts, left, line = [], 4.0, 0
    for index, name in enumerate(series):
        width = 32 + 7.2 * len(name)
        if left > 4 and left + width > WIDTH:
            left, line = 4.0, line + 1
        height = -11 - 17 * line
        mark = _mark(left + 5, height, Point(0, 0, series=index))
        if colours is not None:
            mark = _box(colours[index], left, height - 5, 11, 11, name)
        parts.append(mark + Markup('<text x="{:.1f}" y="{}">{}</text>').format(left + 16, height + 4, name))
        left += width
    return Markup("<g>") + Markup("").join(parts) + Markup("</g>")


def _svg(
    title: str, description: str, parts: Sequence[Markup], *, height: int = HEIGHT, legend: bool = False
) -> Markup:
    above = 0 if not legend else 41
    return Markup(
        '<svg class="chart" role="img" aria-label="{}" viewBox="0 {} {} {}" xmlns="http://www.w3.org/2000/svg">'
        "<title>{}</title><desc>{}</desc>{}</svg>"
    ).format(title, -above, WIDTH, height + above, title, description, Markup("").join(parts))


def pareto(points: Sequence[tuple[float, float]], *, larger_x: bool = False) -> list[int]:
    """Indices of the points that no other beats: less y, and less x (more, with `larger_x`); in order of x."""
    sign = -1 if larger_x else 1
    order = sorted(range(len(points)), key=lambda index: (sign * points[index][0], points[index][1]))
    best, found = math.inf, []
    for index in order:
        if points[index][1] < best:
            best = points[index][1]
            found.append(index)
    return sorted(found, key=lambda index: points[index][0])
