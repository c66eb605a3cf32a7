"""Ceilings of speed in a plan: counted by hand, for named devices and measured ones, and the engines beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig, MistralConfig, MixtralConfig, Qwen2Config

from kompakt.cli.main import main
from kompakt.compress import Recipe, plan
from kompakt.compress.ceilings import DEVICES, Work, device_ceilings, engines

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dtype": "bfloat16",
}
LINEAR_WEIGHTS = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
HEAD = 128 * 64
NORMS = 2 * (5 * 64)
"""Bytes of five norms of 64 channels."""
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path):
    LlamaConfig(**SHAPE, tie_word_embeddings=request.param).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def ceiling(model, recipe, device="h200", batch=1, context=1024):
    found = plan(model, recipe, contexts=(context,), batches=(batch,), runs_on=device)
    assert found.ceilings is not None
    (row,) = found.ceilings["rows"]
    return found, row


@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_reads_weights_once_and_every_cache(model, batch):
    found, row = ceiling(model, "w4a16-rtn", batch=batch)
    cache = 2 * 2 * 2 * 16 * 1024 * 2  # layers × (K and V) × KV heads × head_dim × tokens × bytes
    base = 2 * (LINEAR_WEIGHTS + HEAD) + NORMS + batch * cache
    assert row["base_decode_ms"] == pytest.approx(1e3 * base / 4.8e12)
    packed = 2 * HEAD + NORMS + found.quantized_bytes + batch * cache
    assert row["compressed_decode_ms"] == pytest.approx(1e3 * packed / 4.8e12)


def test_a_compressed_cache_is_read_as_it_is_kept(model):
    found, row = ceiling(model, "kv-fp8", context=8192)
    saved = found.kv_cache[8192] - found.compressed_cache.bytes[8192]
    assert saved > 0
    assert row["base_decode_ms"] - row["compressed_decode_ms"] == pytest.approx(1e3 * saved / 4.8e12)


@pytest.mark.parametrize(("recipe", "rate"), [("w4a16-rtn", 989e12), ("w4a8-fireq", 1979e12)])
def test_long_prompts_multiply_at_the_rate_of_their_inputs(recipe, rate, model):
    tokens = 8192
    _, row = ceiling(model, recipe, context=tokens)
    pairs = tokens * (tokens + 1) // 2
    attention = 2 * 4 * 16 * 2 * 2 * pairs / 989e12  # layers × heads × head_dim × (QK and PV) × 2 per pair
    linears = 2 * tokens * LINEAR_WEIGHTS
    assert row["base_prefill_ms"] == pytest.approx(1e3 * ((linears + 2 * HEAD) / 989e12 + attention))
    assert row["compressed_prefill_ms"] == pytest.approx(1e3 * (linears / rate + 2 * HEAD / 989e12 + attention))


def test_experts_that_a_token_does_not_go_to_are_not_read(tmp_path):
    shape = {**SHAPE, "num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": True}
    MixtralConfig(**shape, sliding_window=None).save_pretrained(tmp_path)
    context = 8192
    _, row = ceiling(tmp_path, "kv-fp8", context=context)
    cache = 2 * 2 * 2 * 16 * context * 2
    attention = 2 * (64 * 64 * 2 + 64 * 32 * 2)
    active, router = attention + 2 * (2 * 3 * 64 * 96), 2 * 8 * 64  # two of eight experts of each layer
    read = 2 * (active + router + HEAD) + NORMS + cache
    assert row["base_decode_ms"] == pytest.approx(1e3 * read / 4.8e12)
    # A router is no Linear, and its few products are not counted.
    products = 2 * context * active + 2 * HEAD + 2 * 4 * 16 * 2 * 2 * (context * (context + 1) // 2)
    assert row["base_prefill_ms"] == pytest.approx(1e3 * products / 989e12)
    _, packed = ceiling(tmp_path, "w4a8-gptq", context=context)
    assert packed["base_decode_ms"] == pytest.approx(row["base_decode_ms"])
    assert packed["base_prefill_ms"] == pytest.approx(row["base_prefill_ms"])
    # Groups of 32 take 4.5 bits a weight; of 20 Linears that a token needs there are shapes as well.
    read = active * 4.5 / 8 + 20 * 16 + 2 * (router + HEAD) + NORMS + cache
    assert packed["compressed_decode_ms"] == pytest.approx(1e3 * read / 4.8e12)
    products = 2 * context * active / 1979e12 + (products - 2 * context * active) / 989e12
    assert packed["compressed_prefill_ms"] == pytest.approx(1e3 * products)


@pytest.mark.parametrize("listed", [True, False])
def test_windows_end_attention(listed, tmp_path):
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if listed else {}
    kind = Qwen2Config if listed else MistralConfig
    kind(**SHAPE, **kinds, use_sliding_window=True, sliding_window=100).save_pretrained(tmp_path)
    context = 8192
    found, row = ceiling(tmp_path, "kv-fp8", context=context)
    assert found.kv_cache[context] == 2 * 2 * 16 * 2 * (100 + (context if listed else 100))
    windowed, full = sum(min(place, 100) for place in range(1, context + 1)), context * (context + 1) // 2
    pairs = windowed + (full if listed else windowed)
    products = 2 * context * LINEAR_WEIGHTS + 2 * HEAD + 4 * 16 * 2 * 2 * pairs
    assert row["base_prefill_ms"] == pytest.approx(1e3 * products / 989e12)


def test_what_sparse_prefill_and_eviction_leave_out_is_not_counted(model):
    found, row = ceiling(model, "kv-evict4x", context=32768, batch=1)
    work = {"windows": (None,), "attention_flops": 10**9, "attention_rate": "bf16", "cache": {64: 0}}
    plain = Work(weight_bytes=1, flops={}, head_flops=0, **work)
    h200 = DEVICES["h200"]
    assert replace(plain, evicts=True).decode_seconds(h200, 1, 64) < plain.decode_seconds(h200, 1, 64)
    assert replace(plain, sparse=True).prefill_seconds(h200, 1, 64) < plain.prefill_seconds(h200, 1, 64)
    assert row["compressed_decode_ms"] < row["base_decode_ms"]
    assert found.compressed_cache.bytes[32768] < found.kv_cache[32768] / 3


def test_devices_without_fp8_multiply_in_bf16(model):
    _, fp8 = ceiling(model, "w4a8-fireq", "a100", context=8192)
    assert fp8["compressed_prefill_ms"] == pytest.approx(fp8["base_prefill_ms"])
    _, row = ceiling(model, "w4a8-fireq", "l40s", context=8192)
    assert row["compressed_prefill_ms"] < row["base_prefill_ms"]


def test_many_sequences_are_bound_by_multiplications(model):
    """Of a hundred thousand sequences of one token, reading caches takes a third of the time of the products."""
    _, row = ceiling(model, "w4a16-rtn", batch=100_000, context=1)
    busy = 100_000 * (2 * (LINEAR_WEIGHTS + HEAD) + 2 * 4 * 16 * 4) / 989e12
    assert row["compressed_decode_ms"] == pytest.approx(1e3 * busy)


def test_measured_ceilings_are_read_and_named():
    found = device_ceilings(str(ROOT / "benchmarks/linear.json"))
    assert found.name == "NVIDIA H200" and found.source == "measured, linear.json"
    assert 0.8 * DEVICES["h200"].bandwidth < found.bandwidth < DEVICES["h200"].bandwidth
    assert found.bf16 < DEVICES["h200"].bf16 and (found.fp8 or 0) < 1979e12


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--runs-on", "h20"], "unknown device 'h20'; did you mean 'h200'?"),
        (["--runs-on", "nowhere.json"], "nowhere.json is not what a bench command wrote"),
        (["--runs-on", str(ROOT / "benchmarks/weights.json")], "holds no ceilings"),
        (["--batch", "1"], "needs --runs-on"),
        (["--runs-on", "h200", "--batch", "0"], "batches are [0]"),
        (["--contexts", "0"], "contexts are [0]"),
        (["--contexts", "many"], "--contexts many is not a list of numbers"),
    ],
)
def test_mistakes_are_one_sentence(arguments, says, model, capsys):
    assert main(["plan", str(model), "--recipe", "w4a16-rtn", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and says in err


def test_the_table_says_what_it_is(model, capsys):
    more = ["--runs-on", "h100", "--contexts", "512,2048", "--batch", "1,8"]
    assert main(["plan", str(model), "--recipe", "w4a16-rtn", *more]) == 0
    out, _ = capsys.readouterr()
    for expected in ("ceilings, not forecasts: h100, 3.35 TB/s", "8 × 2,048", "vLLM, by its sources, not tried"):
        assert expected in out
    assert main(["plan", str(model), "--recipe", "w4a16-rtn", "--json", *more]) == 0
    assert len(json.loads(capsys.readouterr().out)["ceilings"]["rows"]) == 4
    assert main(["plan", str(model), "--recipe", "w4a16-rtn", "--json"]) == 0
    assert "ceilings" not in json.loads(capsys.readouterr().out)


def test_engines_are_said_to_run_what_they_run():
    def vllm(weights, **slots):
        return engines(Recipe.load({"weights": {"method": "rtn", **weights}, **slots}))[-1]["runs"]

    assert vllm({"group_size": 64, "activations": "none"}) == "weights"
    assert vllm({"group_size": 16, "activations": "none"}).startswith("not: its kernels for INT4 weights take")
    assert vllm({"group_size": 64}).startswith("not: its kernel for INT4 weights and FP8 activations")
    assert vllm({"group_size": 128}, kv_cache="kv_fp8") == "weights; kv_cache as in the base model"
    mixed = [{"modules": ["down_proj"], "group_size": 16}]
    assert vllm({"group_size": 64, "activations": "none", "overrides": mixed}).startswith("not")
    assert engines(Recipe.load("kv-fp8"))[-1]["runs"] == "the base model; kv_cache as in the base model"
