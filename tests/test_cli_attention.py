"""The command line with recipes that have an attention slot: what plan, compress and evaluate print."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_directory

from kompakt.cli.main import main

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ["--num-calibration-samples", "4", "--max-seq-length", "96", "--evaluation-windows", "2"]
SHORT += ["--evaluation-window", "96", "--device", "cpu"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("cli") / "base")


def words(capsys) -> str:
    """What was printed, on one line with single spaces."""
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("recipe", ["sage", "w4a8-sage"])
def test_plan(base, capsys, recipe):
    assert main(["plan", str(base), "-r", recipe, "--device", "cpu"]) == 0
    said = words(capsys)
    assert "covered 4 the first of int8_fp8, fp8_fp8 that calibration allows" in said
    assert "calls of fewer than 8,192 queries, and decoding, are dense" in said
    assert "prefill_attention (int8_fp8) reference used" in said
    assert ("bits per quantized weight" in said) == (recipe == "w4a8-sage")
    assert ("weights as they are" in said) == (recipe == "sage")
    assert "cache of 8,192 tokens" in said


@pytest.mark.parametrize("recipe", ["sage", "w4a8-sage"])
def test_compress_and_evaluate(base, tmp_path, capsys, recipe):
    output = str(tmp_path / "out")
    assert main(["compress", str(base), "-r", recipe, "-o", output, *SHORT, "--set", "attention.min_tokens=512"]) == 0
    said = words(capsys)
    assert f"recipe {recipe}: " in said
    assert "attention sage, mode auto, min cosine 0.998, min tokens 512" in said
    assert "attention runs in layers" in said
    assert "calls of 512 queries and more" in said
    ran = "Attention ran quantized in this evaluation (4 layers; calls: 8 × int8_fp8); in use, windows this short run"
    assert ran in said
    assert ("bits per quantized weight" in said) == (recipe == "w4a8-sage")
    evaluate = ["evaluate", output, "--against", str(base), "--window", "96", "--windows", "2", "--no-speed"]
    assert main(evaluate) == 0
    assert ran in words(capsys)
    assert main([*evaluate, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["attention"]["calls"] == {"int8_fp8": 8}


def test_list(capsys):
    assert main(["list"]) == 0
    said = words(capsys)
    assert "attention method" in said
    assert "[mode=auto, min_cosine=0.998, min_tokens=8192]" in said


def test_mistakes(base, capsys):
    assert main(["plan", str(base), "-r", "sage", "--set", "attention.mode=int9"]) == 2
    assert "mode = 'int9' is not valid" in " ".join(capsys.readouterr().err.split())
