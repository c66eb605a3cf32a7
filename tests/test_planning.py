"""The plan against what really happens: bytes on disk, key-value cache, tensors held while layers are quantized."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from live_bytes import LiveBytes
from safetensors import safe_open
from tiny import tiny_directory, write_text
from transformers import AutoModelForCausalLM, Llama4TextConfig, LlamaConfig, MistralConfig, T5Config

from kompakt.compress import compress, plan
from kompakt.compress.artifact import SIDECAR_TENSORS
from kompakt.compress.coverage import cover
from kompakt.compress.cpu_arithmetic import float32_linears
from kompakt.compress.hf_cache import CACHE
from kompakt.compress.hf_decoder import decoder_layers
from kompakt.compress.planning import kv_cache_bytes
from kompakt.compress.walk import quantize_layers

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"calibration.samples": 2, "calibration.length": 32, "evaluation.windows": 0}
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("base") / "tiny", steps=0)


def write_config(config, directory):
    config.save_pretrained(directory)
    return directory


def tensor_bytes(directory):
    """Bytes of the model's tensors in a directory, headers left out."""
    total = 0
    for file in directory.glob("*.safetensors"):
        if file.name != SIDECAR_TENSORS:
            with safe_open(file, framework="pt") as handle:
                total += sum(handle.get_tensor(name).nbytes for name in handle.keys())  # noqa: SIM118
    return total


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("w4a16-rtn", {}),
        ("w4a8-fireq", {"weights.group_size": 32}),
        ("w4a16-rtn", {"weights.group_size": "channel"}),
        ("w4a16-rtn", {"weights.ignore": ["re:.*down_proj", "model.layers.1.self_attn.q_proj"]}),
        ("fp8", {}),
    ],
)
def test_bytes_are_those_of_the_directory_that_compress_writes(recipe, overrides, base, tmp_path):
    overrides = {**FAST, **overrides, "calibration.source": str(write_text(tmp_path / "text.txt"))}
    found = plan(base, recipe, overrides=overrides)
    result = compress(base, recipe, tmp_path / "out", overrides=overrides)
    assert found.base_bytes == tensor_bytes(base)
    assert found.compressed_bytes == tensor_bytes(tmp_path / "out")
    sizes = result.report["sizes"]
    assert found.quantized_bytes == sizes["quantized_bytes"]
    assert found.bits_per_weight == pytest.approx(sizes["bits_per_weight"], abs=1e-4)
    assert [line.as_dict() for line in found.coverage] == result.report["coverage"]
    assert found.recipe.weights == result.recipe.weights
    assert sizes["compressed_bytes"] == pytest.approx(found.compressed_bytes, rel=0.01, abs=20_000)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [True, False])
def test_base_bytes_count_tied_weights_once_and_follow_the_dtype(dtype, tied, tmp_path):
    config = LlamaConfig(**SMALL, tie_word_embeddings=tied, dtype=dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    assert plan(tmp_path, "fp8").base_bytes == tensor_bytes(tmp_path)


def test_needs_nothing_but_the_config(base, tmp_path):
    shutil.copyfile(base / "config.json", tmp_path / "config.json")
    alone, beside_weights = plan(tmp_path, "w4a8-fireq").as_dict(), plan(base, "w4a8-fireq").as_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert alone.pop("model") != beside_weights.pop("model")
    assert alone == beside_weights


def test_as_dict_is_json_with_every_part(base):
    content = json.loads(json.dumps(plan(base, "w4a8-fireq", contexts=(100,)).as_dict(), allow_nan=False))
    assert [stage["name"] for stage in content["stages"]] == ["loading", "calibration", "reading back", "evaluation"]
    assert content["peak_host_bytes"] == max(stage["host_bytes"] for stage in content["stages"])
    assert list(content["kv_cache_bytes"]) == ["100"]
    assert (
        content["kernels"]["w4a8_linear"]
        == {
            "backend": "reference",
            "reason": "device is cpu, the kernel needs cuda",
            "used": True,
        }
        or torch.cuda.is_available()
    )
    kept = {line["name"]: line["reason"] for line in content["coverage"] if line["status"] == "kept"}
    assert kept["lm_head"] == "shares its weight with model.embed_tokens"
    assert kept["model.embed_tokens"] == "embedding"


@pytest.mark.parametrize("tokens", [1, 37])
def test_cache_bytes_are_those_of_transformers(tokens):
    config = LlamaConfig(**SMALL, head_dim=24)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        cache = model(torch.ones(1, tokens, dtype=torch.long), use_cache=True)[CACHE]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_bytes(config, tokens, 2) == held


def test_cache_is_bounded_by_a_sliding_window():
    config = MistralConfig(**SMALL, sliding_window=50)
    full = MistralConfig(**SMALL, sliding_window=None)
    assert kv_cache_bytes(config, 1000, 2) in (kv_cache_bytes(full, 50, 2), kv_cache_bytes(full, 1000, 2))
    config.layer_types = ["sliding_attention", "full_attention"]
    assert kv_cache_bytes(config, 1000, 2) * 2000 == kv_cache_bytes(full, 1000, 2) * 1050


@pytest.mark.parametrize(
    ("recipe", "length", "hidden", "most"),
    [
        ("w4a16-rtn", 64, 128, 1.7),
        ("w4a16-gptq", 64, 128, 1.6),
        ("w4a16-gptq", 64, 512, 1.3),
        ("w4a8-fireq", 512, 128, 1.7),
        ("w4a8-fireq", 64, 512, 1.3),
        ({"weights": {"method": "signround", "steps": 2}}, 512, 128, 1.7),
    ],
    ids=["rtn", "gptq", "gptq-wide", "fireq", "fireq-wide", "signround"],
)
def test_memory_of_calibration_is_near_what_is_held(recipe, length, hidden, most, tmp_path):
    """What a search of scales tries at once weighs most at width 128, second moments do at 512."""
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": 1 if hidden > 128 else 2}
    config = LlamaConfig(**{**SMALL, **sizes}, dtype="bfloat16")
    samples = 4
    overrides = {"calibration.samples": samples, "calibration.length": length}
    found = plan(write_config(config, tmp_path), recipe, overrides=overrides, device="cpu")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    method = found.recipe.weights
    assert method is not None
    coverage = cover(model, [name for name, _ in decoder_layers(model)], method)
    tokens = torch.randint(0, 128, (samples, length) if method.needs_data else (1, 256))
    with LiveBytes() as held, float32_linears():
        for parameter in model.parameters():
            held._note(parameter.untyped_storage())
        quantize_layers(model, method, list(tokens.split(1)), coverage, device=torch.device("cpu"))
    estimate = next(stage for stage in found.stages if stage.name == "calibration").host
    assert 0.9 < sum(estimate.values()) / held.peak < most


def test_memory_grows_with_what_it_should(base):
    def stage(name, recipe="w4a8-gptq", **overrides):
        found = plan(base, recipe, overrides={key.replace("__", "."): value for key, value in overrides.items()})
        return next((stage for stage in found.stages if stage.name == name), None)

    few, many = (stage("calibration", calibration__samples=count).host for count in (8, 16))
    assert many["hidden states"] / few["hidden states"] == (16 + 2) / (8 + 2)  # one batch is kept, with its output
    assert many["second moments"] == few["second moments"] > 0
    assert stage("calibration", "w4a16-rtn").host["second moments"] == 0
    assert stage("evaluation", evaluation__windows=0) is None
    limited = stage("reading back", limits__perplexity_increase="1%").host
    assert sum(limited.values()) > sum(stage("reading back").host.values())


@pytest.mark.parametrize(
    ("config", "overrides", "says"),
    [
        (T5Config(), {}, "T5Config"),
        (Llama4TextConfig(**SMALL, num_local_experts=2, head_dim=16), {}, "mixture-of-experts"),
        (LlamaConfig(**{**SMALL, "num_hidden_layers": 0}), {}, "no decoder layers"),
        (LlamaConfig(**SMALL), {"weights.group_size": 48}, "group_size 48 does not divide the 64 inputs"),
        (LlamaConfig(**SMALL), {"weights.ignore": ["re:.*"]}, "no Linear of the model would be quantized"),
        (LlamaConfig(**SMALL), {"weights.ignore": ["q_prj"]}, "'q_prj' matches no Linear"),
        (LlamaConfig(**SMALL, quantization_config={"quant_method": "gptq"}), {}, "already quantized"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, LlamaConfig) else None,
)
def test_refuses_what_compress_would_refuse(config, overrides, says, tmp_path):
    with pytest.raises(ValueError, match=says) as caught:
        plan(write_config(config, tmp_path), "w4a16-rtn", overrides=overrides)
    assert "\n" not in str(caught.value)


def test_refuses_a_directory_without_config(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        plan(tmp_path)
