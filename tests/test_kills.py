"""Runs with --resume that are killed at random times: the same command ends with the tensors of an undisturbed run.

$KOMPAKT_KILLS says how many; a few by default. Every second killed run is killed once more when it has been resumed.
Processes are forked from one that has imported everything and computed nothing.
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
KILLS = int(os.environ.get("KOMPAKT_KILLS", "2"))
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

PARENT = """
import hashlib, json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from kompakt.cli.main import main
from kompakt.compress import compress
import transformers.models.llama.modeling_llama

torch.set_num_threads(1)
arguments, folder, kills = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
draw = random.Random()

def run(after=None):
    '''Exit code of one run; -9 if it was killed `after` seconds from its start.'''
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = main([*arguments, "-o", str(folder / "out")])
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def tensors():
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (folder / "out").glob("*.safetensors")}

started = time.monotonic()
assert run() == 0
whole, duration = tensors(), time.monotonic() - started
shutil.rmtree(folder / "out")
done = 0
while done < kills:
    found = {"at": [], "codes": [], "kept": []}
    for again in range(1 + done % 2):
        found["at"].append(round(draw.uniform(0, duration), 3))
        found["codes"].append(run(found["at"][-1]))
        found["kept"].append(len(list(folder.glob(".out.kompakt-layers/*.safetensors"))))
        if (folder / "out").exists():
            break
        done += 1
    if not (folder / "out").exists():
        found["last"] = run()
        found["left"] = sorted(path.name for path in folder.iterdir())
    found["equal"] = tensors() == whole
    print(json.dumps(found), flush=True)
    shutil.rmtree(folder / "out")
    shutil.rmtree(folder / ".out.kompakt-layers", ignore_errors=True)
"""


@pytest.mark.parametrize("recipe", ["w4a8-fireq"])
def test_runs_killed_at_random_times_end_with_the_same_tensors(recipe, tmp_path):
    base, text = tiny_directory(tmp_path / "base", steps=0), write_text(tmp_path / "text.txt")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "kompakt").symlink_to(ROOT)
    arguments = ["compress", base, "--recipe", recipe, "--resume", "--dataset", text, "--num-calibration-samples", 4]
    arguments += ["--max-seq-length", 64, "--evaluation-windows", 2, "--evaluation-window", 64, "--json"]
    folder = tmp_path / "parent"
    folder.mkdir()
    command = [sys.executable, "-c", PARENT, json.dumps([str(word) for word in arguments]), str(folder), str(KILLS)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "root"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60 + 20 * KILLS)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"at"')]
    for result in found:
        assert result["equal"], result
        # A run that was killed after its output had got its name has nothing to resume.
        assert result.get("last", 0) == 0 and result.get("left", ["out"]) == ["out"], result
    killed = sum(result["codes"].count(-9) for result in found)
    assert killed >= KILLS, found
    print(f"{killed} kills; layers kept: {[result['kept'] for result in found]}")
