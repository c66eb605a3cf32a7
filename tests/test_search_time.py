"""`bench search-time` on a tiny model: what is timed, and what is refused."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
from tiny import tiny_directory
from transformers import LlamaConfig

from kompakt.cli.main import main
from kompakt.compress.hf_generation import ModelSource
from kompakt.compress.search_time import Clocked, search_time, search_time_table, searches
from kompakt.compress.sparsity_calibration import choose_sparsity
from kompakt.sparsify.triangle import Triangle

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def shape(folder) -> ModelSource:
    """Random weights, one layer."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    config.save_pretrained(folder / "shape")
    return ModelSource.of(None, str(folder / "shape"))


def test_command(tmp_path, capsys):
    base = tiny_directory(tmp_path / "base", max_position_embeddings=512, num_hidden_layers=2)
    output = tmp_path / "out.json"
    command = ["bench", "search-time", str(base), "--length", "200", "--samples", "2"]
    assert main([*command, "-o", str(output)]) == 0
    result = json.loads(output.read_text("utf-8"))
    assert [row["recipe"] for row in result["rows"]] == ["sparse-minference", "sparse-triangle"]
    assert not result["random_weights"] and (result["samples"], result["length"]) == (2, 200)
    for row in result["rows"]:
        assert row["layers"] == 2 and row["documents"] == 2 and 0 < row["method_seconds"] <= row["seconds"]
        assert row["cpu_seconds"] > 0 and row["peak_bytes"] is None
    capsys.readouterr()
    assert main(["bench", "table", str(output)]) == 0
    assert "| sparse-triangle | 2 | 2 × 200 |" in capsys.readouterr().out
    assert main([*command[:-4], "--length", "600"]) == 2
    assert "length 600 exceeds the 512 positions" in " ".join(capsys.readouterr().err.split())


def test_the_clock_changes_nothing(tmp_path):
    source = shape(tmp_path)
    model, tokens = source.open(CPU), torch.arange(400).view(2, 200) % 300
    for _, method in searches(["sparse-minference", "sparse-triangle"]):
        clocked = Clocked(inner=method, min_length=method.min_length)
        assert choose_sparsity(model, clocked, tokens, device=CPU) == choose_sparsity(model, method, tokens, device=CPU)
        assert len(clocked.spent) == 1


def test_a_search_that_fails_has_no_time(tmp_path):
    source, kept = shape(tmp_path), []
    with mock.patch.object(Triangle, "profile", side_effect=RuntimeError("out of memory")):
        result = search_time(source, CPU, searches(["sparse-triangle"]), samples=1, length=100, keep=kept.append)
    assert result["rows"][0]["absent"] and kept == [result] and result["random_weights"]
    assert "sparse-triangle has no time" in search_time_table(result)


@pytest.mark.parametrize("recipe", ["kv-int4", "w4a16-rtn"])
def test_refusals(recipe, capsys):
    assert main(["bench", "search-time", "--config", "llama-8b", "--recipes", recipe]) == 2
    assert f"recipe '{recipe}' searches no sparse patterns" in " ".join(capsys.readouterr().err.split())
