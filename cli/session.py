"""What surrounds every command: warnings and errors as one line each on stderr, exit codes, signals, a clean stdout.

0 done    1 the reloaded model differs, a check of `verify` failed, or the machine did (out of memory)
2 bad input or usage    3 a limit of the recipe is exceeded    130 interrupted    143 terminated
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import typer
from rich.console import Console

# Every usage error derives from it; typer exports only its descendants.
UsageError = typer.BadParameter.__bases__[0]
PIPED_WIDTH = 140
"""Columns of a table that does not go to a terminal."""


class Session:
    """One run of the command line. command: how it was called. debug: tracebacks and libraries' own chatter."""

    def __init__(self, command: str):
        self.command, self.debug = command, False
        self.stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

    @property
    def size(self) -> int:
        """How many processes `torchrun` or `accelerate launch` started together, this one among them."""
        together = all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        return int(os.environ["WORLD_SIZE"]) if together else 1

    @property
    def speaks(self) -> bool:
        """Whether this is the one process, or the first of several, that reports results and warnings."""
        return self.size == 1 or os.environ["RANK"] == "0"

    def line(self, kind: str, text: str) -> None:
        """One line on stderr, beside a progress bar if there is one."""
        self.stderr.print(f"{kind}: {' '.join(text.split())}")

    def print(self, *items: Any) -> None:
        """Text or tables on stdout."""
        console = Console(highlight=False, markup=False, emoji=False)
        if not console.is_terminal:
            console.width = PIPED_WIDTH
        for item in items:
            console.print(item, soft_wrap=isinstance(item, str))

    def show(self, content: dict[str, Any], render: Callable[[dict[str, Any]], list[Any]], as_json: bool) -> None:
        """A result on stdout: as one JSON document, or as `render` draws it."""
        if not self.speaks:
            return
        if as_json:
            print(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))
        else:
            self.print(*render(content))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Installs warnings and signals for the time of a command."""
        handler, root = Lines(self), logging.getLogger("kompakt")
        quiet = logging.NullHandler()
        originals = {
            number: _unwind_on(number) for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
        }
        root.addHandler(handler)
        logging.getLogger().addHandler(quiet)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            root.removeHandler(handler)
            logging.getLogger().removeHandler(quiet)
            for number, original in originals.items():
                signal.signal(number, original)

    def start(self, debug: bool) -> None:
        """Called when the options before the command are known."""
        self.debug = debug
        if debug:
            warnings.simplefilter("default")
            logging.basicConfig(level=logging.INFO)
        else:
            os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; some bars obey nothing else

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Keeps libraries quiet, and whatever they print away from stdout."""
        from ..compress.hf import quiet_transformers

        if not self.debug:
            quiet_transformers()
        with contextlib.redirect_stdout(sys.stderr):
            yield

    def failed(self, error: Exception) -> int:
        """Reports an error and returns the exit code; raises what is not the user's to mend."""
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing is flushed into it at exit
            return 1
        code, text = explain(error)
        if code is None:
            raise error
        if self.debug:
            traceback.print_exception(error)
        if text:
            self.line("error", text)
        return code


def explain(error: Exception) -> tuple[int | None, str]:
    """(exit code, sentence) of an error; None for one that would be a defect of ours."""
    if isinstance(error, UsageError):
        return 2, error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
    from ..compress.processes import PeerFailed
    from ..compress.restore import LimitExceeded

    if isinstance(error, PeerFailed):
        return 1, ""  # the process that failed says why

    if isinstance(error, LimitExceeded):
        return 3, str(error)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return 2, f"{place}{error.strerror or error}"
    if isinstance(error, ValueError):
        return 2, str(error)
    if isinstance(error, (RuntimeError, MemoryError)):
        return 1, str(error).split("\n")[0] or "not enough memory"
    return None, ""


class Lines(logging.Handler):
    """Warnings as one line each, and each only once."""

    def __init__(self, session: Session):
        super().__init__(logging.WARNING)
        self.session, self.seen = session, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        text = record.getMessage()
        if text not in self.seen and self.session.speaks:
            self.seen.add(text)
            self.session.line(record.levelname.lower(), text)


def _unwind_on(number: int) -> Any:
    """Makes a signal raise SystemExit, unless it is ignored, so that cleaning up happens; returns the old handler."""

    def unwind(received: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + received)

    before = signal.getsignal(number)
    if before is not signal.SIG_IGN:
        signal.signal(number, unwind)
    return before


def peak_host_bytes() -> int | None:
    """Largest resident memory of this process so far; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
