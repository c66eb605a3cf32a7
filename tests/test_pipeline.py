"""A whole compress on a tiny model: what is written, what comes back, who else can read it, and what is undone."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_directory, write_text
from transformers import AutoModelForCausalLM

from kompakt.compress import Recipe, compress, load, patch, verify
from kompakt.compress.artifact import read_sidecar
from kompakt.compress.assess import evaluate
from kompakt.compress.cpu_arithmetic import float32_linears
from kompakt.compress.hf_decoder import decoder_layers
from kompakt.compress.linear import CompressedLinear
from kompakt.compress.recipe import EvaluationOptions
from kompakt.compress.restore import REASON, LimitExceeded

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(3))
FAST = {
    "calibration.samples": 4,
    "calibration.length": 32,
    "evaluation.window": 32,
    "evaluation.windows": 4,
}
RECIPES = {
    "w4a16-rtn": {},
    "w4a16-gptq": {},
    "w4a8-gptq": {},
    "w4a8-fireq": {},
    "fp8": {},
    "per-channel": {"weights": {"method": "rtn", "group_size": "channel", "activations": "none"}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("name", RECIPES)
def test_reloaded_equals_patched_and_stock_reads_it(name, base, text, tmp_path):
    recipe = RECIPES[name] or name
    overrides = {**FAST, "calibration.source": str(text), "evaluation.text": str(text)}
    result = compress(base, recipe, tmp_path / "out", overrides=overrides)
    reloaded = load(tmp_path / "out")
    in_memory = AutoModelForCausalLM.from_pretrained(base, dtype="auto").requires_grad_(False)
    before = {key: value.clone() for key, value in in_memory.state_dict().items()}
    expected = logits(in_memory)
    with patch(in_memory, recipe, overrides=overrides):
        assert torch.equal(logits(in_memory), logits(reloaded))
    with patch(in_memory, tmp_path / "out") as patched:
        assert torch.equal(logits(patched), logits(reloaded))
    assert torch.equal(logits(in_memory), expected)
    after = in_memory.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert not hasattr(in_memory.config, "quantization_config")
    assert result.report["sizes"]["compressed_bytes"] == sum(
        f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["w4a16-gptq", "w4a8-fireq", "fp8"])
def test_stock_transformers_holds_the_same_weights(name, base, text, tmp_path):
    pytest.importorskip("compressed_tensors")
    overrides = {**FAST, "calibration.source": str(text), "evaluation.windows": 0}
    compress(base, name, tmp_path / "out", overrides=overrides)
    ours = load(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = logits(stock)
    assert not any(isinstance(module, CompressedLinear) for module in stock.modules())
    difference = (theirs.float() - logits(ours).float()).norm() / theirs.float().norm()
    if name == "w4a16-gptq":
        assert difference == 0
        return
    # compressed-tensors keeps token scales in bf16, ours are float32: an FP8 step (2^-4) flips for a few inputs.
    assert difference < 0.05
    for module in stock.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.quantization_scheme.input_activations = None
    import dataclasses

    for module in ours.modules():
        if isinstance(module, CompressedLinear):
            module.scheme = dataclasses.replace(module.scheme, activations="none")
    with float32_linears():  # as our reference multiplies on a CPU without instructions for bf16
        assert torch.equal(logits(stock), logits(ours))


def test_artifact_is_complete(base, text, tmp_path):
    overrides = {**FAST, "calibration.source": str(text), "evaluation.text": str(text)}
    compress(
        base, "w4a8-gptq", tmp_path / "out", overrides=overrides, max_shard_size="60KB", command="kompakt compress …"
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "model.safetensors.index.json",
        "kompakt.json",
        "kompakt.safetensors",
        "recipe.yaml",
    } <= names
    assert {
        "README.md",
        "evaluation.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "report.html",
    } <= names
    page = (tmp_path / "out/report.html").read_text("utf-8")
    assert "kompakt compress …" in page and "Compression report: out<" in page and ".kompakt-" not in page
    (tmp_path / "out/report.html").write_text("made again")
    assert verify(tmp_path / "out", logits=False).passed
    config = json.loads((tmp_path / "out/config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert group["format"] == "pack-quantized" and group["input_activations"]["type"] == "float"
    sidecar = read_sidecar(tmp_path / "out")
    assert len(sidecar["checksums"]) >= 3
    assert Recipe.load(tmp_path / "out/recipe.yaml") == Recipe.load(sidecar["recipe"])
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model_relation: quantized" in card and "perplexity" in card
    covered = {line["name"]: line for line in sidecar["coverage"]}
    model = AutoModelForCausalLM.from_pretrained(base)
    assert {name for name, m in model.named_modules() if list(m.parameters(recurse=False))} == set(covered)
    assert all(line["reason"] for line in covered.values() if line["status"] == "kept")
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(tmp_path / "out", device_map="cpu")))


def test_resaved_model_is_still_a_correct_checkpoint(base, text, tmp_path):
    compress(base, "w4a16-rtn", tmp_path / "out", overrides={"evaluation.windows": 0})
    model = load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    pytest.importorskip("compressed_tensors")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_disk_placement_gives_the_same_artifact(base, text, tmp_path):
    overrides = {**FAST, "calibration.source": str(text), "evaluation.windows": 0}
    compress(base, "w4a8-fireq", tmp_path / "memory", overrides=overrides)
    compress(base, "w4a8-fireq", tmp_path / "disk", overrides=overrides, device_map="disk")
    assert read_sidecar(tmp_path / "memory")["checksums"] == read_sidecar(tmp_path / "disk")["checksums"]


def test_limit_restores_layers_or_fails_with_numbers(base, text, tmp_path):
    overrides = {**FAST, "calibration.source": str(text), "evaluation.text": str(text), "weights.activations": "none"}
    free = compress(base, "w4a16-rtn", tmp_path / "free", overrides=overrides)
    assert free.evaluation is not None
    increase = free.evaluation["comparison"]["perplexity_increase"]
    assert increase > 0
    layers = len(decoder_layers(load(tmp_path / "free")))
    limited = {**overrides, "limits.perplexity_increase": increase * 0.7, "limits.max_restored": 1.0}
    result = compress(base, "w4a16-rtn", tmp_path / "limited", overrides=limited)
    assert result.evaluation is not None
    assert result.evaluation["comparison"]["perplexity_increase"] <= increase * 0.7
    restored = {line.name.split(".")[2] for line in result.coverage if line.reason == REASON}
    assert 0 < len(restored) <= layers
    model = load(tmp_path / "limited")
    assert {
        n.split(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n
    } == restored
    with pytest.raises(LimitExceeded, match="perplexity grew by"):
        compress(base, "w4a16-rtn", tmp_path / "no", overrides={**limited, "limits.max_restored": 0.0})
    assert not (tmp_path / "no").exists()


def test_patch_refuses_a_second_time_and_another_model(base, text, tmp_path):
    overrides = {**FAST, "calibration.source": str(text), "evaluation.windows": 0}
    compress(base, "w4a16-rtn", tmp_path / "out", overrides=overrides)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    with patch(model, tmp_path / "out"), pytest.raises(ValueError, match="compressed already"):
        patch(model, tmp_path / "out")
    other = AutoModelForCausalLM.from_pretrained(tiny_directory(tmp_path / "other", hidden_size=96), dtype="auto")
    expected = logits(other)
    with pytest.raises(ValueError, match="shape"):
        patch(other, tmp_path / "out")
    assert torch.equal(logits(other), expected)


def test_evaluate_reports_against_the_base(base, text, tmp_path):
    overrides = {**FAST, "calibration.source": str(text), "evaluation.windows": 0}
    compress(base, "w4a16-rtn", tmp_path / "out", overrides=overrides)
    options = EvaluationOptions(text=str(text), window=32, windows=4)
    result = evaluate(tmp_path / "out", against=base, options=options, speed=False)
    assert result["comparison"]["kl"] > 0
    same = evaluate(base, against=base, options=options, speed=False)
    assert same["comparison"]["kl"] == 0 and same["comparison"]["perplexity_increase"] == 0
    json.dumps(result, allow_nan=False)


def test_reload_mismatch_is_an_error_and_leaves_nothing(base, text, tmp_path, monkeypatch):
    from kompakt.compress import pipeline

    honest = pipeline.save_weights

    def damaging(model, *args, **kwargs):
        linear = next(module for module in model.modules() if isinstance(module, CompressedLinear))
        kept = linear.weight_scale.data.clone()
        linear.weight_scale.data[0] *= 2
        honest(model, *args, **kwargs)
        linear.weight_scale.data = kept

    monkeypatch.setattr(pipeline, "save_weights", damaging)
    with pytest.raises(RuntimeError, match="reloaded model differs"):
        compress(base, "w4a16-rtn", tmp_path / "out", overrides={"evaluation.windows": 0})
    assert list(tmp_path.iterdir()) == []
