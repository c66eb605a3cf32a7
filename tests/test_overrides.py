"""Recipes whose Linears are not all stored alike: what is allowed, what is written, and that it loads everywhere."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_directory, write_text
from transformers import AutoModelForCausalLM

from kompakt.compress import compress, load, patch, plan, verify
from kompakt.compress.hf_quantizer import KompaktConfig
from kompakt.compress.linear import CompressedLinear
from kompakt.compress.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.arange(4, 68).unsqueeze(0)
OVERRIDES = [
    {"modules": ["re:.*layers\\.0\\.", "model.layers.2.mlp.down_proj"], "weights": "fp8"},
    {"modules": ["down_proj"], "group_size": "channel"},
    {"modules": ["re:.*layers\\.[13]\\.self_attn"], "group_size": 16},
]
EXPECTED = {
    "model.layers.0.self_attn.q_proj": "W8A16 per channel",
    "model.layers.0.mlp.down_proj": "W8A16 per channel",
    "model.layers.1.self_attn.v_proj": "W4A16 g16",
    "model.layers.1.mlp.down_proj": "W4A16 per channel",
    "model.layers.2.self_attn.v_proj": "W4A16 g32",
    "model.layers.2.mlp.down_proj": "W8A16 per channel",
    "model.layers.3.mlp.up_proj": "W4A16 g32",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("base") / "tiny", steps=10)


def mixed(text, method: str = "gptq", **options) -> Recipe:
    weights = {"method": method, "group_size": 32, "activations": "none", "overrides": OVERRIDES, **options}
    calibration = {"source": str(text), "samples": 4, "length": 32, "batch_size": 2}
    return Recipe.load({"weights": weights, "calibration": calibration, "evaluation": {"windows": 0}})


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def stored(model) -> dict[str, str]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
    return {name: module.scheme.describe() for name, module in found.items()}


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "fireq", "signround"])
def test_every_linear_is_stored_as_its_override_says(method, base, tmp_path):
    text = write_text(tmp_path / "text.txt")
    recipe = mixed(text, method, **({"steps": 2} if method == "signround" else {}))
    result = compress(base, recipe, tmp_path / "out")
    model = load(tmp_path / "out")
    found = stored(model)
    assert len(found) == 28 and {name: found[name] for name in EXPECTED} == EXPECTED
    again = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    expected = logits(again)
    with patch(again, recipe):
        assert torch.equal(logits(again), logits(model)) and stored(again) == found
    with patch(again, tmp_path / "out"):
        assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(again), expected)
    assert verify(tmp_path / "out").passed
    planned = plan(base, recipe)
    assert planned.quantized_bytes == result.report["sizes"]["quantized_bytes"]
    card = (tmp_path / "out/README.md").read_text("utf-8")
    assert "W4A16 g32 + W8A16 per channel + W4A16 per channel + W4A16 g16" in card


def test_fp8_linears_do_not_depend_on_the_method(base, tmp_path):
    text = write_text(tmp_path / "text.txt")
    compress(base, mixed(text), tmp_path / "mixed")
    compress(base, "fp8", tmp_path / "fp8", overrides={"weights.activations": "none", "evaluation.windows": 0})
    ours, all_fp8 = load(tmp_path / "mixed"), load(tmp_path / "fp8")
    for name, module in ours.named_modules():
        if isinstance(module, CompressedLinear) and module.scheme.weights == "fp8":
            other = all_fp8.get_submodule(name)
            assert torch.equal(module.weight.view(torch.uint8), other.weight.view(torch.uint8))
            assert torch.equal(module.weight_scale, other.weight_scale)


def test_stock_transformers_loads_a_mixed_directory(base, tmp_path):
    pytest.importorskip("compressed_tensors")
    text = write_text(tmp_path / "text.txt")
    compress(base, mixed(text), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 4
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not any(isinstance(module, CompressedLinear) for module in stock.modules())
    assert torch.equal(logits(stock), logits(load(tmp_path / "out")))


def test_a_limit_gives_back_layers_of_a_mixed_recipe(base, tmp_path):
    text = write_text(tmp_path / "text.txt")
    recipe = mixed(text, "rtn").model_dump(mode="json", exclude_none=True)
    recipe["evaluation"] = {"text": str(text), "window": 32, "windows": 4}
    free = compress(base, recipe, tmp_path / "free").evaluation
    assert free is not None
    increase = free["comparison"]["perplexity_increase"]
    recipe["limits"] = {"perplexity_increase": max(increase * 0.7, 1e-4), "max_restored": 1.0}
    result = compress(base, recipe, tmp_path / "limited")
    assert result.evaluation is not None
    assert result.evaluation["comparison"]["perplexity_increase"] <= recipe["limits"]["perplexity_increase"]
    assert verify(tmp_path / "limited").passed


def test_overrides_are_written_and_read_again(tmp_path):
    recipe = mixed("builtin")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    "weights, says",
    [
        ({"overrides": [{"modules": ["down_proj"]}]}, "needs a group_size"),
        ({"overrides": [{"modules": ["down_proj"], "weights": "fp8", "group_size": 32}]}, "one of fp8 has none"),
        ({"overrides": [{"modules": [], "group_size": 32}]}, "at least 1 item"),
        (
            {"overrides": [{"modules": ["down_proj"], "size": 4}]},
            "unknown key 'overrides.0.size'; did you mean 'group_size'",
        ),
        (
            {"method": "fp8", "group_size": "channel", "overrides": [{"modules": ["down_proj"], "group_size": 32}]},
            "fp8",
        ),
    ],
)
def test_wrong_overrides_are_refused_by_the_recipe(weights, says):
    with pytest.raises(ValueError, match=says):
        Recipe.load({"weights": {"method": "rtn", **weights}})


@pytest.mark.parametrize(
    "overrides, says",
    [
        ([{"modules": ["nowhere"], "group_size": 32}], "overrides pattern 'nowhere' matches no Linear"),
        ([{"modules": ["down_proj", "lm_head"], "group_size": 32}], "'lm_head' matches no Linear that is quantized"),
        ([{"modules": ["re:("], "group_size": 32}], "not a regular expression"),
        ([{"modules": ["down_proj"], "group_size": 24}], "group_size 24, which does not divide the 128 inputs"),
        ([{"modules": ["re:.*"], "weights": "fp8"}, {"modules": ["q_proj"], "group_size": 16}], "changes nothing"),
    ],
)
def test_overrides_that_do_not_fit_the_model_are_refused(overrides, says, base):
    with pytest.raises(ValueError, match=says):
        plan(base, {"weights": {"method": "rtn", "group_size": 32, "overrides": overrides}})


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda groups: groups["group_1"].update(targets=["Linear"]), "does not name its Linears"),
        (lambda groups: groups["group_1"].update(targets=["re:.*"]), "does not name its Linears"),
        (lambda groups: groups["group_1"].pop("weights"), "does not describe weights"),
        (lambda groups: groups["group_1"]["weights"].update(num_bits=3), "does not run"),
    ],
)
def test_groups_that_kompakt_did_not_write_are_refused(change, says, base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    with patch(model, mixed("builtin", "rtn")):
        config = model.config.quantization_config.to_dict()
    assert [group.targets for group in KompaktConfig.from_compressed_tensors(config).groups]
    change(config["config_groups"])
    with pytest.raises(ValueError, match=says):
        KompaktConfig.from_compressed_tensors(config)
