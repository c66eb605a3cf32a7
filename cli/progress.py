"""A progress bar on stderr: stage, layer, error, time left. Nothing where stderr is not a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

LABELS = {
    "layers": "quantizing layers",
    "evaluate": "evaluating",
    "search": "measuring recipes",
    "losses": "losses of layers",
    "choices": "multiple choice",
    "last_word": "last word",
    "harness": "lm-eval",
    "copy_text": "copying text",
    "copy_words": "copying words",
    "needle": "finding needles",
    "key_value": "looking up keys",
    "generation": "generating",
    "linear": "timing linear layers",
    "quantization": "timing quantization",
    "verify": "checking",
    "numbers": "checking numbers",
}
FOLLOWED_BY = {"layers": "writing and reading back"}
"""What happens after the last step of a stage, where that takes a while and reports nothing."""


class Steps(ProgressColumn):
    """``12/30  error 3.1e-03  0:01:10, 0:01:45 left``, as far as it is known."""

    def render(self, task: Task) -> Text:
        """See `ProgressColumn`."""
        parts = [] if task.total is None else [f"{task.completed:.0f}/{task.total:.0f}"]
        if task.fields["note"]:
            parts.append(task.fields["note"])
        left = "" if task.total is None or not task.time_remaining else f", {clock(task.time_remaining)} left"
        return Text("  ".join([*parts, f"{clock(task.elapsed or 0)}{left}"]))


def clock(seconds: float) -> str:
    """``h:mm:ss``."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class Bar:
    """The `progress` callback of the library, and a context manager around the work."""

    def __init__(self, console: Console, first: str, *, shown: bool = True):
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), Steps())
        self.progress = Progress(
            *columns, console=console, transient=True, refresh_per_second=4, disable=not (shown and console.is_terminal)
        )
        self.first, self.stage, self.task = first, "", None

    def __enter__(self) -> Bar:
        self.progress.start()
        self._begin(self.first, None)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.stop()

    def __call__(self, stage: str, done: int, total: int, text: str) -> None:
        if stage != self.stage:
            self.stage = stage
            self._begin(LABELS.get(stage, stage), total)
        assert self.task is not None
        self.progress.update(self.task, completed=done, total=total, note="" if text == "windows" else text)
        if done == total and stage in FOLLOWED_BY:
            self.stage = ""
            self._begin(FOLLOWED_BY[stage], None)

    def _begin(self, label: str, total: int | None) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(label, total=total, note="")
