"""Which parts of a quantized model carry the loss."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_directory, write_text
from transformers import AutoModelForCausalLM

from kompakt.cli.main import main
from kompakt.compress import patch
from kompakt.compress.calibration import CalibrationOptions
from kompakt.compress.linear import CompressedLinear
from kompakt.compress.recipe import EvaluationOptions
from kompakt.compress.sensitivity import part_table, sensitivity

pytestmark = pytest.mark.usefixtures("one_thread")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sensitivity")
    return tiny_directory(folder / "base"), write_text(folder / "text.txt")


def measure(base, weights, **options):
    directory, text = base
    return sensitivity(
        directory,
        weights,
        calibration=CalibrationOptions(source=str(text), samples=4, length=32),
        evaluation=EvaluationOptions(text=str(text), window=32, windows=8),
        **options,
    )


def test_parts_cover_the_model_and_recover_the_loss(base):
    result = measure(base, {"method": "rtn", "group_size": "channel", "activations": "none"}, ranges=3)
    rows = {row["part"]: row for row in result["rows"]}
    assert list(rows) == ["nothing", *PROJECTIONS, "layer 0", "layer 1", "layers 2–3"]
    for kind in ("projection", "layers"):
        assert sum(row["modules"] for row in rows.values() if row["kind"] == kind) == 28
        assert sum(row["weights_share"] for row in rows.values() if row["kind"] == kind) == pytest.approx(1, abs=1e-3)
    assert rows["q_proj"]["modules"] == 4 and rows["layers 2–3"]["modules"] == 14
    assert rows["nothing"]["recovered"] == 0 and rows["nothing"]["perplexity_increase"] > 0
    assert len({row["model"]["nll"] for row in rows.values()}) == len(rows)
    assert result["calibration"] is None
    table = part_table(json.loads(json.dumps(result, allow_nan=False)))
    assert table.count("\n| ") == len(rows) and "calibrated" not in table


@pytest.mark.parametrize("weights", [{"method": "rtn"}, {"method": "fireq", "activations": "none"}])
def test_everything_given_back_is_the_base_exactly(weights, base):
    rows = measure(base, {**weights, "group_size": 32}, ranges=1)["rows"]
    assert rows[-1]["part"] == "layers 0–3" and rows[-1]["weights_share"] == 1
    assert rows[-1]["model"] == rows[-1]["base"] and rows[-1]["kl"] == 0
    # Rounding may leave so small a model no worse, with nothing to recover.
    assert rows[-1]["recovered"] == (1 if rows[0]["perplexity_increase"] > 0 else None)
    if weights["method"] == "fireq":
        assert [row["kind"] for row in rows] == ["nothing", "layers"]


def test_what_was_given_back_is_quantized_again(base):
    directory, text = base
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    original = model(torch.arange(3, 20)[None]).logits
    overrides = {"calibration.source": str(text), "calibration.samples": 2, "calibration.length": 32}
    with patch(model, "w4a8-fireq", overrides=overrides) as patched:
        quantized = patched(torch.arange(3, 20)[None]).logits
    patched = patch(model, "w4a8-fireq", overrides=overrides)
    with pytest.raises(RuntimeError, match="stop"), patched.undo.given_back(lambda layer, name: True):
        assert not any(isinstance(module, CompressedLinear) for module in model.modules())
        assert torch.equal(model(torch.arange(3, 20)[None]).logits, original)
        raise RuntimeError("stop")
    assert torch.equal(model(torch.arange(3, 20)[None]).logits, quantized)


def test_command_writes_the_table_it_prints(base, tmp_path, capsys):
    directory, text = base
    file, page = tmp_path / "new" / "parts.json", tmp_path / "page.md"
    options = ["--method", "rtn", "--group-size", "32", "--ranges", "2", "--window", "32", "--windows", "2"]
    assert main(["bench", "sensitivity", str(directory), *options, "--text", str(text), "-o", str(file)]) == 0
    printed = capsys.readouterr().out
    assert json.loads(file.read_text())["weights"]["group_size"] == 32
    assert main(["bench", "table", str(file)]) == 0
    assert capsys.readouterr().out == printed and "| layers 2–3 |" in printed
    page.write_text("<!-- new/parts.json -->\n<!-- end -->\n")
    assert main(["bench", "table", str(file), "--into", str(page)]) == 0
    assert printed.strip() in page.read_text()


def test_bad_number_of_ranges_is_refused(base):
    with pytest.raises(ValueError, match="ranges is 0"):
        measure(base, {"method": "rtn"}, ranges=0)
