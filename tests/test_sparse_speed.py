"""`bench attention --pattern` and `bench sparsity` away from a GPU: a timer that counts, rows that are wrong, tables,
and what is refused. A tiny model takes the place of a real one.
"""

from __future__ import annotations

import json
from dataclasses import replace
from unittest import mock

import pytest
import torch
from tiny import tiny_directory, write_text

from kompakt.cli.main import main
from kompakt.compress import sparse_speed
from kompakt.compress.attention_cases import Case
from kompakt.compress.attention_contenders import Problem
from kompakt.compress.device_speed import Ceilings, Machine
from kompakt.compress.sparse_speed import PATTERNS, RUN, Budgets, checked, makers
from kompakt.compress.sparse_speed import sparse_speed as measure
from kompakt.compress.sparse_speed_table import check_sparse_speeds, sparse_table
from kompakt.kernels.sparse_index import TILE, Extent, SparseIndex
from kompakt.sparsify.online import visited

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
CASE = Case("causal", 2048, 16, 4, 2, 1)
MACHINE = Machine(CPU, lambda calls: float(len(calls)) and 1e-3, 1, Ceilings(1.0, 1.0, 1.0, 1.0))


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_have_their_density(pattern, density):
    problem = Problem.draw(CASE, CPU)
    index = makers(problem, pattern, density)[0]()
    tiles, dense = visited(index, Extent.of(1, 2048, 2048, None, CPU))
    # A window is whole tiles; the last tile of columns of each of 32 rows is partly filled; a map is random.
    assert abs(float(tiles / dense) - density) < 0.07
    assert checked(Problem.draw(replace(CASE, length=300), CPU), "bf16", pattern, density)["correct"]


def test_budgets_open_the_tiles_of_their_lines():
    """By hand: a distance touches two diagonals of tiles, the nearest ones ⌈(near + 63) / 64⌉ together, a run of 64
    that is not aligned three; keys are no tiles.
    """
    problem, budgets = Problem.draw(CASE, CPU), Budgets.parse("20x400+1x1")
    slashes = [pattern.as_dict()["slash"] for pattern in budgets.of_heads(3, 1.0)]
    assert budgets.name == "20x400+1x1" and slashes == [400, 1, 400]
    index = makers(problem, "vertical_slash", budgets)[0]()
    assert isinstance(index, SparseIndex)
    last = index.tile_ptr.diff().view(4, 32)[:, -1].tolist()
    near, runs = -(-(200 + 63) // TILE), -(-200 // RUN)
    # Runs may touch.
    assert near + runs <= last[0] <= near + 3 * runs and last[1] <= 2
    assert checked(Problem.draw(replace(CASE, length=300), CPU), "bf16", "vertical_slash", budgets, 300 / 2048)[
        "correct"
    ]
    with mock.patch.object(sparse_speed, "eager_seconds", lambda make: make() and 5e-4):
        result = measure(MACHINE, [CASE], ["bf16"], ["vertical_slash"], [0.5, budgets], [])
    table = sparse_table(json.loads(json.dumps(result)))
    assert "| vertical_slash 50% |" in table and "| vertical_slash 20x400+1x1 |" in table and "runs of 64" in table
    assert result["rows"][1]["executed_density"] < 1 and "density" not in result["rows"][1]


def test_rows_and_their_table():
    with mock.patch.object(sparse_speed, "eager_seconds", lambda make: make() and 5e-4):
        kept = []
        result = measure(MACHINE, [CASE], ["bf16"], ["block"], [0.25], [], note="Made up.", keep=kept.append)
    (row,) = result["rows"]
    assert row["correct"] and row["microseconds"] == 1000 and row["total_microseconds"] == 1500
    assert row["share"] == pytest.approx(row["executed_density"], abs=1e-3) and kept == [result]
    table = sparse_table(json.loads(json.dumps(result)))
    assert "| 2,048 | 4/2 × 16 | bf16 | block 25% |" in table and "Made up." in table
    check_sparse_speeds(result)
    with mock.patch.dict(sparse_speed.LIMITS, bf16=-1.0):
        wrong = measure(MACHINE, [CASE], ["bf16"], ["block"], [0.25], [])
    assert "microseconds" not in wrong["rows"][0] and "wrong" in sparse_table(wrong)
    with pytest.raises(RuntimeError, match="1 of 1 results are wrong and have no time; the first is block at 25%"):
        check_sparse_speeds(wrong)
    with pytest.raises(ValueError, match="mask full with --pattern"):
        measure(MACHINE, [replace(CASE, mask="full")], ["bf16"], ["block"], [0.25], [])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["attention", "--pattern", "block"], "--pattern and --density (or --budgets) belong together"),
        (["attention", "--budgets", "1x1"], "--pattern and --density (or --budgets) belong together"),
        (["attention", "--pattern", "block", "--budgets", "1x1"], "--budgets are of --pattern vertical_slash alone"),
        (["attention", "--pattern", "vertical_slash", "--budgets", "0x1"], "budgets '0x1' are no keys x distances"),
        (["attention", "--pattern", "star", "--density", "0.5"], "unknown pattern 'star'"),
        (["attention", "--pattern", "block", "--density", "2"], "--density 2 is not a list of shares"),
        (["sparsity", "./x", "--levels", "0.25"], "x does not exist"),
        (["sparsity", "x", "--levels", "all"], "--levels all is not a list of shares"),
    ],
)
def test_refusals(arguments, says, capsys):
    assert main(["bench", *arguments]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_needs_a_cuda_device(capsys):
    assert main(["bench", "attention", "--pattern", "block", "--density", "0.5"]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err


def test_sweep(tmp_path, capsys):
    """Searched patterns beside uniform ones of the same number of tiles."""
    base = tiny_directory(tmp_path / "base", max_position_embeddings=1024, num_hidden_layers=2)
    text, output = str(write_text(tmp_path / "text.txt")), tmp_path / "out.json"
    sizes = ["--window", "768", "--windows", "2", "--num-calibration-samples", "2", "--max-seq-length", "768"]
    asked = [
        "--retrieval",
        text,
        "--retrieval-length",
        "300",
        "--retrieval-samples",
        "1",
        "--retrieval-tests",
        "needle",
    ]
    command = ["bench", "sparsity", str(base), "--text", text, "--dataset", text, "--levels", "0.5", *sizes, *asked]
    assert main([*command, "-o", str(output)]) == 0
    result = json.loads(output.read_text("utf-8"))
    rows = {row["label"]: row for row in result["rows"]}
    assert list(rows) == ["searched 0.5", "uniform 0.5", "a_shape 0.5", "triangle"]
    assert rows["searched 0.5"]["density"] <= rows["uniform 0.5"]["density"] + 0.05
    assert len(rows["triangle"]["quarters"]) == 4 and rows["a_shape 0.5"]["patterns"] == {"a_shape": 8}
    assert rows["uniform 0.5"]["retrieval"]["needle"][0]["length"] == 300
    capsys.readouterr()
    assert main(["bench", "table", str(output)]) == 0
    assert "| searched 0.5 |" in capsys.readouterr().out
    assert main([*command[:-8], "--levels", "0.3"]) == 2
    assert "level 0.3 is unknown" in capsys.readouterr().err
