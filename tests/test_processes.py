"""Calibration shared by two processes: the result of one to rounding, files from the first alone, errors that end both.

Processes are forked from one that has imported everything and computed nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_directory, write_text

from kompakt.cli.main import main
from kompakt.compress.processes import ALONE, Processes, launched

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

PARENT = """
import json, os, signal, socket, sys, tempfile
from pathlib import Path
import torch
from kompakt.cli.main import main
from kompakt.compress import compress
from kompakt.quant.block import Block
from kompakt.quant.gptq import GPTQ
import transformers.models.llama.modeling_llama

torch.set_num_threads(1)

def sabotaged(how):
    '''how: (layer, what happens before it is quantized).'''
    original = GPTQ.quantize
    def quantize(self, block):
        if block.name.endswith(f".{how[0]}"):
            if how[1] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("the sabotaged layer")
        return original(self, block)
    GPTQ.quantize = quantize

def noted(file):
    '''Keeps the moments of the first layer.'''
    original = Block._collect
    def collect(self):
        from safetensors.torch import save_file
        found = original(self)
        if self.name.endswith(".0"):
            save_file({f"{name}.{key}": getattr(statistics, key).clone() for name, statistics in found.items()
                       for key in ("hessian", "abs_mean", "energy")}, file)
        return found
    Block._collect = collect

def child(rank, size, port, run):
    if size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{run['log']}.{rank}.{stream}", os.O_CREAT | os.O_WRONLY), number)
    if run.get("sabotage", {}).get(str(rank)):
        sabotaged(run["sabotage"][str(rank)])
    if run.get("moments"):
        noted(f"{run['moments']}.{rank}")
    code = 99
    try:
        code = main(run["arguments"])
    except SystemExit as error:
        code = error.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

for run in json.loads(sys.argv[1]):
    size = run.get("size", 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        children.append(os.fork())
        if children[-1] == 0:
            child(rank, size, port, run)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in children]
    print(json.dumps(codes), flush=True)
"""


RESUMED = {"to": "resumed", "more": ["--resume"]}
RUNS = {
    "one": {"size": 1, "moments": "whole"},
    "two": {"moments": "shared"},
    "first fails": {"sabotage": {"0": [1, "raise"]}},
    "second fails": {"sabotage": {"1": [1, "raise"]}},
    "second killed": {"sabotage": {"1": [1, "kill"]}},
    "both fail": {"more": ["--set", "weights.no_such_option=1"]},
    "interrupted": {**RESUMED, "sabotage": {"1": [2, "raise"]}},
    "resumed": RESUMED,
    "no data": {"more": ["--recipe", "w4a16-rtn"]},
    "learned": {"more": ["--recipe", "w4a8-fireq", "--set", "weights.rounding=learned"]},
    "few": {"more": ["--num-calibration-samples", "1"]},
    "evaluate": {"arguments": ["evaluate", "DIR"]},
}
"""size: processes. sabotage: of a process, the layer and what happens there. more: arguments. to: the output's name."""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Name → (exit codes, what each process wrote on stdout, on stderr, output), and the folder of all of it."""
    folder = tmp_path_factory.mktemp("processes")
    base, text = tiny_directory(folder / "base", steps=20, dtype=torch.float32), write_text(folder / "text.txt")
    (folder / "root").mkdir()
    (folder / "root" / "kompakt").symlink_to(ROOT)
    described = []
    for name, run in RUNS.items():
        arguments = ["compress", base, "--recipe", "w4a16-gptq", "-o", folder / "out" / run.get("to", name)]
        arguments += ["--dataset", text, "--num-calibration-samples", 5, "--max-seq-length", 48]
        arguments += ["--evaluation-windows", 2, "--evaluation-window", 64, "--json", *run.get("more", [])]
        arguments = run.get("arguments", arguments)
        paths = {key: str(folder / run[key]) for key in ("moments",) if key in run}
        described.append({**run, **paths, "arguments": [str(word) for word in arguments], "log": str(folder / name)})
    environment = {**os.environ, "PYTHONPATH": str(folder / "root"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PARENT, json.dumps(described)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    found: dict = {"folder": folder}
    for name, line in zip(RUNS, ended.stdout.splitlines(), strict=True):
        size, output = RUNS[name].get("size", 2), folder / "out" / RUNS[name].get("to", name)
        streams = [
            [Path(f"{folder / name}.{rank}.{stream}").read_text() for rank in range(size)] for stream in ("out", "err")
        ]
        found[name] = (json.loads(line), *streams, output)
    return found


def errors(streams):
    """Lines of all processes that report an error."""
    return [line for text in streams for line in text.splitlines() if line.startswith("error: ")]


def test_two_processes_give_what_one_gives(done):
    one, two = done["one"], done["two"]
    assert one[0] == [0] and two[0] == [0, 0], two
    assert two[1][1] == ""
    assert two[2] == [
        "warning: w4a16_linear runs through the torch reference: device is cpu, the kernel needs cuda\n",
        "",
    ]
    whole = load_file(done["folder"] / "whole.0")
    for rank in range(2):
        shared = load_file(done["folder"] / f"shared.{rank}")
        for name, moment in whole.items():
            # Sums of 5 batches in another order, each mean of some hundred float32 products.
            torch.testing.assert_close(shared[name], moment, rtol=1e-5, atol=1e-6 * float(moment.abs().max()))
    first, second = (json.loads(run[1][0]) for run in (one, two))
    assert second["calibration"] == first["calibration"]
    expected, got = (load_file(run[3] / "model.safetensors") for run in (one, two))
    for name in expected:
        if ".layers.0." in name:  # later ones see what rounding did to the first
            same = torch.isclose(got[name].float(), expected[name].float(), rtol=1e-4).float().mean()
            assert same > 0.99, name
    increase = [run["evaluation"]["comparison"]["perplexity_increase"] for run in (first, second)]
    assert increase[0] == pytest.approx(increase[1], abs=1e-3)
    layers = [[layer["error"] for layer in run["layers"]] for run in (first, second)]
    assert layers[1] == pytest.approx(layers[0], rel=0.05)


@pytest.mark.parametrize(("name", "codes"), [("first fails", [2, 1]), ("second fails", [1, 2])])
def test_an_error_in_one_process_ends_both_with_one_sentence(name, codes, done):
    found, out, err, output = done[name]
    assert found == codes
    assert errors(err) == ["error: the sabotaged layer"] and out == ["", ""]
    assert not output.exists()


def test_an_error_in_both_is_said_once(done):
    codes, _, err, output = done["both fail"]
    assert codes == [2, 1]
    assert len(errors(err)) == 1 and "no_such_option" in errors(err)[0]
    assert not output.exists()


def test_a_killed_process_ends_the_other_with_one_sentence(done):
    codes, _, err, output = done["second killed"]
    assert codes == [1, -9]
    (sentence,) = errors(err)
    assert sentence.startswith(
        "error: another process of this run has ended, or does not answer, and this one cannot go"
    )
    assert not output.exists()


def test_two_processes_resume(done):
    assert done["interrupted"][0] == [1, 2]
    codes, _, err, output = done["resumed"]
    assert codes == [0, 0] and "resuming: 2 layers are kept" in err[0]
    got, expected = (load_file(folder / "model.safetensors") for folder in (output, done["two"][3]))
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_nothing_else_is_left(done):
    assert sorted(path.name for path in (done["folder"] / "out").iterdir()) == ["one", "resumed", "two"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no data", "2 processes share the calibration of weights, and this recipe has none"),
        ("learned", "learned rounding looks at all calibration text in every step"),
        ("few", "1 calibration batches cannot be shared by 2 processes"),
        ("evaluate", "evaluate runs in one process; only compress shares its work among several"),
    ],
)
def test_what_cannot_be_shared_is_refused(name, sentence, done):
    codes, _, err, output = done[name]
    assert set(codes) <= {1, 2} and 2 in codes
    assert errors(err) and all(sentence in line for line in errors(err))
    assert not output.exists()


def test_batches_are_dealt_out_in_turn():
    batches = [torch.full((1, 2), number) for number in range(5)]
    shapes = [batch.shape for batch in batches]
    assert [int(batch[0, 0]) for batch in Processes(1, 2).share(batches)] == [1, 3]
    assert [place for _, place in Processes(1, 2).order(shapes) or []] == [None, 0, None, 1, None]
    assert ALONE.order(shapes) is None and ALONE.share(batches) is not None


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR"])
def test_half_an_environment_starts_nothing(missing, monkeypatch, capsys):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    assert launched() == 1
    assert main(["list"]) == 0 and capsys.readouterr().out
