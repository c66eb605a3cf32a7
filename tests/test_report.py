"""`report`: what is on the page and what is not, escaping, groups of like conditions, charts, and how it looks."""

from __future__ import annotations

import copy
import json
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from tiny import tiny_directory, write_text

from kompakt.cli.main import main
from kompakt.compress import compress, report
from kompakt.compress.report_charts import Axis, Point, bars_chart, pareto, points_chart, stack_chart, tick_label, ticks
from kompakt.compress.report_page import page, patterns_chart
from kompakt.compress.reporting import cache_bits, distinct_names, quality_groups

pytestmark = pytest.mark.usefixtures("one_thread")
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>&'
VOID = {"meta", "br", "img", "line", "link", "input", "hr"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Outline(HTMLParser):
    """Tags, headings and text of a page; asserts that what is opened is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data.strip())
        if not set(self.open) & {"style", "title", "desc"}:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two directories measured alike, and one measured on longer windows."""
    folder = tmp_path_factory.mktemp("made")
    base = tiny_directory(folder / "base", steps=30, num_hidden_layers=3)
    text = str(write_text(folder / "text.txt"))
    alike = {
        **{"calibration.source": text, "calibration.samples": 2, "calibration.length": 64, "evaluation.text": text},
        **{"evaluation.window": 32, "evaluation.windows": 4},
    }
    everything = {
        "weights": {"method": "gptq", "group_size": 32},
        "attention": {"method": "sage", "mode": "auto", "min_cosine": 0.99, "min_tokens": 64},
        "kv_cache": {"method": "kv_int4", "sink_tokens": 1, "recent_tokens": 0},
    }
    compress(base, everything, folder / "all", overrides=alike, command="kompakt compress base -o all")
    compress(base, "w4a16-rtn", folder / "rtn", overrides=alike)
    compress(base, "fp8", folder / "fp8", overrides={**alike, "evaluation.window": 64})
    return folder


@pytest.fixture(scope="module")
def found(made):
    return report([made / "all", made / "rtn", made / "fp8"])


def test_page_holds_what_is_known_with_its_conditions(found, made):
    outline = Outline(page(found))
    for expected in (
        "kompakt compress base -o all",
        "4 × 32 tokens of text.txt, stride 32",
        "4 × 64 tokens of text.txt, stride 64",
        "Calibrated on 2 × 64 tokens",
        "kept: embedding",
        "`kv_int4` in 3 layers",
        "Each layer was judged on",
        "INT4 weights rounded to nearest",
        "on the first batch of random tokens",
    ):
        assert expected in outline.text, expected
    comparison = json.loads((made / "rtn" / "evaluation.json").read_text("utf-8"))["comparison"]
    increase, error = comparison["perplexity_increase"], comparison["perplexity_increase_stderr"]
    assert f"{100 * increase:+.2f} ± {100 * error:.2f} %" in outline.text
    levels = [int(tag[1]) for tag, _ in outline.tags if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert [item for item in outline.headings if item in ("all", "rtn", "fp8")] == ["all", "rtn", "fp8"]


def test_page_is_self_contained_and_accessible(found):
    text = page(found)
    outline = Outline(text)
    assert not {tag for tag, _ in outline.tags} & {"script", "link", "iframe", "img", "object", "embed"}
    links = [value for _, attributes in outline.tags for key, value in attributes.items() if key in ("href", "src")]
    assert links and all(value.startswith("#d") for value in links)
    assert set(re.findall(r"https?://[^\"<\s]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    figures = [attributes for tag, attributes in outline.tags if tag == "svg"]
    assert len(figures) >= 6 and all(item["role"] == "img" and item["aria-label"] for item in figures)
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.S):
        root = ElementTree.fromstring(svg)
        names = [child.tag.rpartition("}")[2] for child in root]
        assert names[:2] == ["title", "desc"] and all(child.text for child in list(root)[:2])
        assert sum(child.text is not None for child in root.iter("{http://www.w3.org/2000/svg}text")) >= 4
    tables = text.count("<table")
    assert tables == text.count("<thead>") and text.count('scope="row"') > tables


def colours(text: str, start: int) -> dict[str, str]:
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6})", text[start : text.index("}", text.index("--s3", start))]))


def contrast(one: str, other: str) -> float:
    """WCAG 2.2 contrast ratio."""

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_have_contrast_in_light_and_dark(found):
    text = page(found)
    light, dark = colours(text, text.index(":root")), colours(text, text.index("prefers-color-scheme"))
    assert light.keys() == dark.keys() and light["back"] != dark["back"]
    for palette in (light, dark):
        for name in ("text", "soft", "link", "warn"):
            assert contrast(palette[name], palette["back"]) >= 4.5, name
        for name in ("text", "warn"):
            assert contrast(palette[name], palette["panel"]) >= 4.5, name
        for name in ("s0", "s1", "s2", "s3"):
            assert contrast(palette[name], palette["back"]) >= 3, name


def test_only_like_conditions_are_drawn_together(found):
    groups = found["comparisons"]["quality"]
    assert [[member["name"] for member in group["members"]] for group in groups] == [["all", "rtn"], ["fp8"]]
    text = Outline(page(found)).text
    assert "those that differ are not drawn together" in text
    assert "The only directory measured so" in text
    title = re.findall(r"<svg[^>]*><title>Size and loss</title><desc>(.*?)</desc>", page(found))
    assert len(title) == 1 and "2 directories" in title[0] and "fp8" not in title[0]


def test_windows_of_another_length_are_another_condition(found):
    changed = copy.deepcopy(found["directories"])
    same = changed[0]["evaluations"][0]["comparison"]["base"]["perplexity"]
    changed[2]["evaluations"][0]["comparison"]["base"]["perplexity"] = same
    assert [len(group["members"]) for group in quality_groups(changed)] == [2, 1]


def test_one_text_name_for_two_texts_is_noticed(found):
    changed = copy.deepcopy(found)
    for item in changed["directories"]:
        for evaluation in item["evaluations"]:
            evaluation["text"]["window"] = evaluation["text"]["stride"] = 32
    changed["comparisons"]["quality"] = quality_groups(changed["directories"])
    bases = [group["base_perplexity"] for group in changed["comparisons"]["quality"]]
    assert len(bases) == 2 and abs(bases[0] / bases[1] - 1) > 0.005
    assert "not the same measurement" in Outline(page(changed)).text


def test_a_number_without_conditions_is_left_out(made, tmp_path):
    target = tmp_path / "rtn"
    shutil.copytree(made / "rtn", target)
    content = json.loads((target / "evaluation.json").read_text("utf-8"))
    perplexity = f"{content['comparison']['model']['perplexity']:.3f}"
    assert perplexity in page(report([target]))
    del content["text"]
    (target / "evaluation.json").write_text(json.dumps(content), "utf-8")
    found = report([target])
    assert found["comparisons"]["quality"] == [] and perplexity not in page(found)
    assert "does not say on what text it was measured" in Outline(page(found)).text
    (target / "evaluation.json").unlink()
    text = Outline(page(report([target]))).text
    assert "Not measured." in text and "Quality against the base model was not measured." in text


def test_what_is_not_recorded_is_left_out(made, tmp_path):
    shutil.copytree(made / "all", tmp_path / "all")
    content = json.loads((tmp_path / "all" / "kompakt.json").read_text("utf-8"))
    kept = {"version", "recipe", "checksums", "kv_cache"}
    (tmp_path / "all" / "kompakt.json").write_text(json.dumps({key: content[key] for key in kept}), "utf-8")
    (tmp_path / "all" / "evaluation.json").unlink()
    text = Outline(page(report([tmp_path / "all", made / "rtn"]))).text
    assert "no command was recorded" in text and "The calibration text was not recorded." in text


def test_speed_and_tasks_of_an_evaluation_beside(made, tmp_path):
    speed = {"device": "cpu (test)", "prompt_tokens": 128, "new_tokens": 32, "repeats": 3}
    speed |= {"prefill_seconds": 1.0, "decode_seconds": 1.0, "prefill_tokens_per_second": 128.0}
    for index, name in enumerate(("all", "rtn")):
        shutil.copytree(made / name, tmp_path / name)
        content = json.loads((made / name / "evaluation.json").read_text("utf-8"))
        content["against"] = "base"
        content["speed"] = {"model": {**speed, "decode_tokens_per_second": 31.0 + index}}
        flips = {"accuracy_difference": -0.1, "accuracy_difference_stderr": 0.05}
        model = {"items": 40, "accuracy_norm": 0.5, "accuracy_norm_stderr": 0.08}
        content["choices"] = {"file": "arc.jsonl", "model": model, "base": model, "flips": flips}
        (tmp_path / name / "evaluation-more.json").write_text(json.dumps(content), "utf-8")
    found = report([tmp_path / "all", tmp_path / "rtn"])
    text = Outline(page(found)).text
    assert "cpu (test), 128 tokens in, 32 out" in text and "31.0" in text and "32.0" in text
    assert "-10.00 ± 5.00 %" in text and "arc.jsonl, multiple choice, by length" in text
    assert "<title>Speed and loss</title>" in page(found)
    other = json.loads((tmp_path / "rtn" / "evaluation-more.json").read_text("utf-8"))
    other["text"]["windows"] = 3
    (tmp_path / "rtn" / "evaluation-more.json").write_text(json.dumps(other), "utf-8")
    text = page(report([tmp_path / "all", tmp_path / "rtn"]))
    assert "<title>Speed and loss</title>" not in text and "speed and loss are not drawn together" in text


def test_everything_from_outside_is_escaped(made, tmp_path):
    target = tmp_path / "rtn"
    shutil.copytree(made / "all", target)
    content = json.loads((target / "kompakt.json").read_text("utf-8"))
    for key in ("base_model", "command", "kompakt"):
        content[key] = EVIL
    content["environment"]["device"] = content["calibration"]["source"] = EVIL
    content["recipe"]["name"] = content["recipe"]["description"] = EVIL
    for line in content["coverage"]:
        line["reason"] = EVIL
    for layer in content["layers"]:
        layer["name"] = EVIL
    for policy in content["attention"]["layers"].values():
        policy["reason"] = EVIL
    (target / "kompakt.json").write_text(json.dumps(content), "utf-8")
    evaluation = json.loads((target / "evaluation.json").read_text("utf-8"))
    evaluation["text"]["source"] = EVIL
    (target / "evaluation.json").write_text(json.dumps(evaluation), "utf-8")
    shutil.copytree(target, tmp_path / "other <b>")
    text = page(report([target, tmp_path / "other <b>"]))
    assert not {tag for tag, _ in Outline(text).tags} & {"script", "img", "b"}
    assert text.count("&lt;script&gt;") > 10


def test_command_writes_a_page_and_json(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directories = [str(made / "all"), str(made / "rtn")]
    assert main(["report", *directories]) == 0
    out, _ = capsys.readouterr()
    assert "written to report.html" in out and "evaluated on 4 × 32 tokens" in out
    assert (tmp_path / "report.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    assert main(["report", *directories, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["directories"][0]["name"] == "all"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    (tmp_path / "mine.html").write_text("mine")
    assert main(["report", directories[0], "-o", "mine.html"]) == 2
    assert "is not overwritten" in capsys.readouterr().err and (tmp_path / "mine.html").read_text() == "mine"
    assert main(["report", directories[0], "-o", "report.html"]) == 0
    assert main(["report", str(tmp_path)]) == 2
    assert "was not written by kompakt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 9, [0, 2, 4, 6, 8]), (-3, 12, [0, 5, 10]), (5, 5, [5])],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_tick_labels_tell_ticks_apart():
    for low, high in ((0, 1), (0.9981, 0.9999), (0, 270), (0, 2e7), (0, 3e-6)):
        found = ticks(low, high)
        assert len({tick_label(value, found) for value in found}) == len(found) >= 3


def test_front_is_what_no_other_beats():
    points = [(1.0, 5.0), (2.0, 5.0), (2.0, 3.0), (3.0, 4.0), (4.0, 1.0)]
    assert pareto(points) == [0, 2, 4]
    assert pareto(points, larger_x=True) == [4]
    assert pareto([(1.0, 1.0), (2.0, 2.0)], larger_x=True) == [0, 1]
    assert pareto([(1.0, 1.0), (2.0, 1.0), (3.0, 1.0)]) == [0]


def test_charts_place_values_on_their_axes():
    x, y = Axis("size, MB", 0, 100), Axis("loss, %", 0, 10)
    chart = points_chart("T", "D", [Point(0, 0, None, "low"), Point(100, 10, 1.0, "<b>")], x, y)
    circles = re.findall(r'<circle class="fill s0" cx="([\d.]+)" cy="([\d.]+)"', chart)
    assert [tuple(map(float, circle)) for circle in circles] == [(72.0, 224.0), (406.0, 16.0)]
    assert "size, MB" in chart and "loss, %" in chart and "&lt;b&gt;" in chart and "<b>" not in chart
    bars = bars_chart("T", "D", [1.0, 10.0], [False, True], Axis("layer", -0.6, 1.4), y)
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"><title>', bars)]
    assert heights[1] == pytest.approx(10 * heights[0], rel=0.01) and "fill s1" in bars
    stack = stack_chart("T", "D", [("a", [10.0, 30.0])], ["q", "k"], ["s0", "s1"], "MB")
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height="24', stack)]
    assert widths[1] == pytest.approx(3 * widths[0], rel=0.01)


@pytest.mark.parametrize("count", [1, 2, 8, 21, 40])
def test_labels_lie_inside_the_chart_and_not_upon_one_another(count):
    """However many marks stand close together, as directories of one size and loss do."""
    points = [Point((113.0, 269.1, 281.0)[i % 3], 0.1 * (i % 5), 0.2, f"recipe-number-{i}") for i in range(count)]
    chart = points_chart("T", "D", points, Axis("MB", 0, 310), Axis("%", -1, 33))
    (bottom,) = map(float, re.findall(r'<path class="axis" d="M72 16V([\d.]+)H', chart))
    assert f'viewBox="0 0 420 {bottom + 46:.0f}"' in chart
    pattern = r'<text class="small" x="([\d.]+)" y="([\d.]+)" text-anchor="(start|end)">(recipe[^<]*)</text>'
    boxes = {}
    for x, y, anchor, text in re.findall(pattern, chart):
        left = float(x) - (6.6 * len(text) if anchor == "end" else 0)
        boxes[text] = (left, left + 6.6 * len(text), float(y) - 11, float(y) + 2)
    leaders = re.findall(r'class="leader" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', chart)
    assert len(boxes) == count == len(leaders)
    marks = [tuple(map(float, mark)) for mark in re.findall(r'<circle [^>]*cx="([\d.]+)" cy="([\d.]+)"', chart)]
    for (x, y), (start_x, start_y, end_x, end_y), box in zip(marks, leaders, boxes.values(), strict=True):
        assert abs(float(start_x) - x) == pytest.approx(6, abs=0.11) and float(start_y) == y
        assert min(abs(float(end_x) - edge) for edge in box[:2]) < 2.2 and box[2] < float(end_y) < box[3]
        assert count > 1 or abs(float(end_y) - y) <= 6.6  # nothing is in the way
    for text, (left, right, top, low) in boxes.items():
        assert left >= 0 and right <= 420 and top >= 15 and low <= bottom + 1, text
        for other, box in boxes.items():
            apart = box[1] <= left or right <= box[0] or box[3] <= top + 0.2 or low <= box[2] + 0.2
            assert other == text or apart, (text, other)


def test_labels_rather_stand_a_few_lines_away_than_upon_a_mark():
    chart = points_chart("T", "D", [Point(50, 5, None, "one"), Point(60, 5)], Axis("", 0, 100), Axis("", 0, 10))
    (height,) = map(float, re.findall(r'class="leader" d="M[\d.]+ [\d.]+L[\d.]+ ([\d.]+)"', chart))
    (mark, _) = map(float, re.findall(r'cy="([\d.]+)"', chart))
    assert 13 <= abs(height - mark) <= 26


def test_wide_letters_keep_a_label_inside_the_chart():
    (left, right) = (
        points_chart("T", "D", [Point(44, 5, None, text)], Axis("", 0, 100), Axis("", 0, 10))
        for text in ("W4A16-GPTQ-ACTORDER-GROUP128", "i" * 28)
    )
    assert 'text-anchor="end">W4A16' in left and 'text-anchor="start">iii' in right


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_a_map_names_heads_and_layers_that_there_are(count):
    chart = patterns_chart(sparse_layers(*["v" * count] * count))
    named = {
        text for text in re.findall(r'text-anchor="(?:middle|end)">([^<]*)<', str(chart)) if text[:1] in "-0123456789"
    }
    assert named <= set(map(str, range(count))) and "0" in named


def test_bits_of_a_cache_are_those_that_were_measured(found):
    assert [item["cache_bits"] for item in found["directories"]] == [""] * 3  # these texts are too short to be coded
    coded = {**found["directories"][0], "cache_bits": "4.500"}
    assert "bits in the cache" not in page(found)
    text = Outline(page({**found, "directories": [coded, *found["directories"][1:]]})).text
    assert "bits in the cache" in text and "and of coded keys and values" in text and " 4.500 " in text
    short, long = {"bits_per_element": None}, {"bits_per_element": 4.5, "eviction": {"kept": 0.254}}
    assert cache_bits([short, long]) == "4.500, 25% of tokens" and cache_bits([short]) == cache_bits([]) == ""
    assert cache_bits([{"bits_per_element": 8.5, "eviction": None}]) == "8.500"


def sparse_layers(*layers: str) -> dict:
    """What a report knows of layers whose heads have patterns by these initials."""
    names = {"d": "dense", "v": "vertical_slash", "a": "a_shape", "t": "tri_shape", "b": "block", "s": "skip"}
    rows = [[{"pattern": names[key], "sink": 64} for key in layer] for layer in layers]
    return {"sparse_layers": [{"name": f"layers.{place}", "heads": row} for place, row in enumerate(rows)]}


def test_a_map_has_a_mark_for_every_head_that_is_not_dense():
    chart = patterns_chart(sparse_layers("vvda", "dddd", "adva"))
    assert chart is not None and "3 vertical_slash, 3 a_shape; the others are dense" in chart
    marks = re.findall(r'<circle class="fill s0" cx="([\d.]+)" cy="([\d.]+)" r="5.88"><title>([^<]+)<', chart)
    assert [mark[2] for mark in marks] == [
        *(f"layers.0, head {head}: vertical_slash (sink 64)" for head in (0, 1)),
        "layers.2, head 2: vertical_slash (sink 64)",
    ]
    (one, *_), (two, *_), (three, *_) = ((float(x), float(y)) for x, y, _ in marks)
    assert one < two < three and float(marks[0][1]) == float(marks[1][1]) > float(marks[2][1])
    # Three of the other kind, and one in the legend.
    assert chart.count('<polygon class="fill s1"') == 4 and "s2" not in chart
    assert patterns_chart(sparse_layers("dd")) is None and patterns_chart(sparse_layers()) is None
    many = patterns_chart(sparse_layers("vvvvaaattbs"))
    assert many is not None and ">others<" in many and ">block<" not in many and many.count('class="fill s3"') == 3
    wide = patterns_chart(sparse_layers(*["v" * 64] * 80))
    assert wide is not None
    across = sorted({float(x) for x in re.findall(r'cx="([\d.]+)" cy="[\d.]+" r="2.19"', wide)})
    assert len(across) == 64 and min(b - a for a, b in pairwise(across)) > 2 * 2.19


@pytest.mark.slow
def test_page_in_a_browser(found, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    (tmp_path / "page.html").write_text(page(found), "utf-8")
    frame = '<body style="margin:0"><iframe id="f" src="page.html" width="375" height="900" style="border:0"></iframe>'
    frame += "<script>f.onload=()=>{let d=f.contentDocument.documentElement;document.title=d.scrollWidth}</script>"
    (tmp_path / "frame.html").write_text(frame, "utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    address = (tmp_path / "frame.html").as_uri()
    done = subprocess.run([browser, *options, "--dump-dom", address], capture_output=True, text=True, timeout=90)
    assert "<title>375</title>" in done.stdout, "the page is wider than a phone"
    shots = {}
    for scheme in ("0", "1"):
        file = tmp_path / f"shot{scheme}.png"
        more = [f"--blink-settings=preferredColorScheme={scheme}", "--window-size=900,900", f"--screenshot={file}"]
        subprocess.run([browser, *options, *more, (tmp_path / "page.html").as_uri()], capture_output=True, timeout=90)
        data = file.read_bytes()
        assert struct.unpack(">II", data[16:24]) == (900, 900)
        shots[scheme] = data
    assert shots["0"] != shots["1"], "dark and light look the same"


def test_names_are_as_long_as_it_takes_to_tell_them_apart(tmp_path):
    assert distinct_names([tmp_path / "a" / "x", tmp_path / "b" / "y"]) == ["x", "y"]
    assert distinct_names([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]
    assert distinct_names([tmp_path / "x", tmp_path / "x"]) == ["x (1)", "x (2)"]
