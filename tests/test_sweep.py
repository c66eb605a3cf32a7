"""The sweep over weight recipes, and that the pages' table is the committed measurement."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny import tiny_directory, write_text
from transformers import AutoModelForCausalLM

from kompakt.compress import compress
from kompakt.compress.calibration import CalibrationOptions
from kompakt.compress.recipe import EvaluationOptions
from kompakt.compress.sweep import insert_table, markdown_table, merged, sweep

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    base, text = tiny_directory(folder / "base"), write_text(folder / "text.txt")
    result = sweep(
        base,
        methods=["rtn", {"method": "gptq", "dampening": 0.05, "label": "gptq 0.05"}],
        activations=["none"],
        group_sizes=[64, 32],
        calibration=CalibrationOptions(source=str(text), samples=4, length=32),
        evaluation=EvaluationOptions(text=str(text), window=32, windows=3),
    )
    return base, text, result


def test_rows_are_what_compress_gives(measured, tmp_path):
    base, text, result = measured
    assert [(row["label"], row["weights"]["group_size"]) for row in result["rows"]] == [
        ("rtn", 64),
        ("rtn", 32),
        ("gptq 0.05", 64),
        ("gptq 0.05", 32),
    ]
    overrides = {"weights.group_size": 32, "evaluation.text": str(text)}
    overrides |= {"evaluation.window": 32, "evaluation.windows": 3}
    alone = compress(base, "w4a16-rtn", tmp_path / "out", overrides=overrides)
    assert alone.evaluation is not None
    row = result["rows"][1]
    assert row["model"]["nll"] == pytest.approx(alone.evaluation["comparison"]["model"]["nll"], rel=1e-6)
    assert row["bits_per_weight"] == alone.report["sizes"]["bits_per_weight"]
    assert {row["base"]["nll"] for row in result["rows"]} == {row["base"]["nll"]}
    json.dumps(result, allow_nan=False)


def test_table_and_merge(measured, tmp_path):
    _, _, result = measured
    table = markdown_table(result)
    assert table.count("\n| ") == 2 and "W4A16 g32" in table and "gptq 0.05" in table
    file, document = tmp_path / "rows.json", tmp_path / "page.md"
    file.write_text(json.dumps({**result, "rows": result["rows"][:3]}))
    document.write_text("a\n<!-- rows.json -->\nold\n<!-- end -->\nb\n")
    again = merged(file, {**result, "rows": result["rows"][2:]})
    assert again["rows"] == result["rows"]
    insert_table(document, file)
    assert "old" not in document.read_text() and document.read_text().endswith("<!-- end -->\nb\n")
    with pytest.raises(ValueError, match="another model"):
        merged(file, {**result, "model": "other"})
    with pytest.raises(ValueError, match="holds no lines"):
        insert_table(document, tmp_path / "else.json")


def test_the_method_in_the_readme_works(tmp_path, monkeypatch):
    from kompakt.compress import walk
    from kompakt.compress.coverage import cover
    from kompakt.compress.hf_decoder import decoder_layers

    code = (
        (ROOT / "docs" / "adding-a-method.md").read_text("utf-8").partition("# quant/floor.py\n")[2].partition("```")[0]
    )
    module = types.ModuleType("kompakt.quant.floor")
    module.__package__ = "kompakt.quant"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, "floor.py", "exec"), vars(module))
    method = module.Floor(group_size=32)
    model = AutoModelForCausalLM.from_pretrained(tiny_directory(tmp_path / "base", steps=1), dtype="auto")
    coverage = cover(model, [name for name, _ in decoder_layers(model)], method)
    tokens = torch.randint(3, 200, (1, 16))
    result = walk.quantize_layers(model, method, [tokens], coverage, device=torch.device("cpu"))
    assert all(report.error > 0 for report in result.reports)
