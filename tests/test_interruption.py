"""Runs that are killed, terminated or run out of disk: nothing that looks finished is left, and the next run succeeds.

The runs are forked, one after another, from a process that has imported everything and computed nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_directory, write_text

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

PARENT = """
import json, os, resource, signal, sys, time
from pathlib import Path
import torch
from kompakt.cli.main import main
from kompakt.compress import compress
import transformers.models.llama.modeling_llama

torch.set_num_threads(1)
arguments, output, tries = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])

def staging():
    return [path for path in output.parent.glob(".*") if path.is_dir()] if output.parent.is_dir() else []

def reached(mark, started):
    if isinstance(mark, float):
        return time.monotonic() - started > mark
    return any(mark == "" or (path / mark).exists() for path in staging())

for what in tries:
    child = os.fork()
    if child == 0:
        if what.get("limit"):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (what["limit"], what["limit"]))
        code = 99
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code
        finally:
            sys.stdout.flush()
            os._exit(code)
    started, done = time.monotonic(), 0
    while "signal" in what and not done and not reached(what["when"], started):
        time.sleep(0.002)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        if "signal" in what:
            os.kill(child, what["signal"])
        _, status = os.waitpid(child, 0)
    left = sorted(path.name for path in output.parent.iterdir()) if output.parent.is_dir() else None
    code = os.waitstatus_to_exitcode(status)
    print(json.dumps({"code": code, "left": left, "finished": (output / "kompakt.json").is_file()}), flush=True)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("base") / "tiny", steps=0)


@pytest.fixture
def attempt(base, tmp_path):
    """A function that forks one run per item, and returns what each left behind."""

    def run(*tries):
        (tmp_path / "root").mkdir()
        (tmp_path / "root" / "kompakt").symlink_to(ROOT)
        output = tmp_path / "parent" / "out[1]"  # brackets would be a pattern to glob
        text = write_text(tmp_path / "text.txt")
        arguments = ["compress", base, "--recipe", "w4a16-gptq", "-o", output, "--dataset", text, "--json"]
        arguments += ["--num-calibration-samples", 8, "--max-seq-length", 64, "--evaluation-windows", 2]
        arguments += ["--evaluation-window", 64]
        command = [
            sys.executable,
            "-c",
            PARENT,
            json.dumps([str(item) for item in arguments]),
            output,
            json.dumps(tries),
        ]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "root"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"code"')]
        assert len(found) == len(tries), done.stdout + done.stderr
        return found, done.stderr

    return run


def test_killed_runs_leave_nothing_that_looks_finished(attempt):
    marks = ["", 0.2, "model.safetensors", "recipe.yaml", "kompakt.safetensors"]
    found, _ = attempt(*({"signal": 9, "when": mark} for mark in marks), {})
    *killed, last = found
    assert [result["code"] for result in killed].count(-9) >= 3
    for result in killed:
        assert result["finished"] == (result["code"] == 0)
        names = result["left"] or []
        assert ("out[1]" in names) == result["finished"]
        assert all(name.startswith(".out[1].kompakt-") for name in names if name != "out[1]")
    assert any(result["left"] for result in killed), "no run was killed while it was writing"
    assert last == {"code": 0, "left": ["out[1]"], "finished": True}


def test_terminated_runs_leave_nothing(attempt):
    found, _ = attempt({"signal": 15, "when": "model.safetensors"}, {"signal": 2, "when": ""})
    assert found == [
        {"code": 143, "left": None, "finished": False},
        {"code": 130, "left": None, "finished": False},
    ]


def test_full_disk_is_said_in_one_sentence_and_leaves_nothing(attempt):
    found, err = attempt({"limit": 40_000}, {"limit": 3000})
    assert found == [{"code": 2, "left": None, "finished": False}] * 2
    errors = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 2
    assert all(line.startswith("error: writing ") and "nothing was left behind" in line for line in errors)
