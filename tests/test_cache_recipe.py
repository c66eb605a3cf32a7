"""Recipes with a kv_cache slot: compress, load, patch, evaluate, limits, damaged files, the command line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from cache_models import is_compressed
from tiny import tiny_directory, write_text
from transformers import AutoModelForCausalLM, DynamicCache

from kompakt.cli.main import main
from kompakt.compress import CompressedCache, compress, evaluate, load, patch, plan
from kompakt.compress import cache_evaluation as reading
from kompakt.compress.artifact import SIDECAR, cache_tensors, read_cache, read_sidecar, write_cache, write_sidecar
from kompakt.compress.cache_calibration import choose_cache
from kompakt.compress.hf_cache import CACHE
from kompakt.compress.hf_cache_hooks import cache_maker, run_as_before, run_by
from kompakt.compress.recipe import EvaluationOptions, Recipe
from kompakt.compress.restore import LimitExceeded
from kompakt.quant.kv_fp8 import KVFP8
from kompakt.quant.kv_int4 import KVINT4
from kompakt.quant.kv_pq import KVPQ, PARTS

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.randint(3, 200, (2, 300), generator=torch.Generator().manual_seed(3))
FAST = {"calibration.samples": 4, "calibration.length": 64, "evaluation.window": 400, "evaluation.windows": 2}
RECIPES = ("kv-fp8", "kv-int4", "kv-pq2", "kv-prune70", "w4a8-kv4", "w4a8-pq4", "w4a8-sage-kv4")
METHOD = {"kv-fp8": "kv_fp8", "kv-pq2": "kv_pq", "kv-prune70": "kv_prune", "w4a8-pq4": "kv_pq"}

PQ_TENSORS = sorted(f"{part}_{name}" for part in ("key", "value") for name in PARTS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("base") / "tiny", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def overrides(text):
    return {**FAST, "calibration.source": str(text), "evaluation.text": str(text), "kv_cache.recent_tokens": 16}


@pytest.fixture(scope="module")
def made(base, overrides, tmp_path_factory):
    """Recipe → directory."""
    folder = tmp_path_factory.mktemp("made")
    return {name: compress(base, name, folder / name, overrides=overrides) for name in RECIPES}


def in_memory(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype="auto").requires_grad_(False)


@torch.no_grad()
def logits(model):
    """Of tokens most of which read codes; and the cache."""
    first = model(TOKENS)
    return model(TOKENS[:, :7], **{CACHE: first[CACHE]}).logits, first[CACHE]


@pytest.mark.parametrize("name", RECIPES)
def test_loaded_equals_patched(name, base, overrides, made):
    expected, cache = logits(load(made[name].output))
    assert is_compressed(cache) and cache.coded_tokens == 256
    assert cache.method == replace(Recipe.load(name).kv_cache, recent_tokens=16)
    model = in_memory(base)
    before, _ = logits(model)
    for source, more in ((name, {"overrides": overrides}), (made[name].output, {})):
        with patch(model, source, **more) as patched:
            got, cache = logits(patched)
            assert is_compressed(cache)
            assert torch.equal(got, expected)
        after, cache = logits(model)
        assert type(cache) is DynamicCache and torch.equal(after, before)
    assert not torch.equal(before, expected)


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_written(name, made, base):
    directory = made[name].output
    sidecar = read_sidecar(directory)
    policy = read_cache(sidecar, directory)
    assert policy is not None and list(policy.layers) == [f"model.layers.{index}.self_attn" for index in range(4)]
    own = {"kv_fp8": [], "kv_pq": PQ_TENSORS, "kv_prune": ["key_sparsity", "query_weight", "value_sparsity"]}
    keys = own.get(METHOD.get(name, ""), ["key_factors", "key_mean", "key_rotated"])
    # A layer may be best off with its keys as they are.
    assert all(sorted(tensors) in (keys, []) for tensors in policy.layers.values())
    assert any(sorted(tensors) == keys for tensors in policy.layers.values())
    shapes: dict[str, tuple[int, ...]] = {"key_factors": (2, 16), "key_mean": (2, 16), "key_rotated": (1,)}
    if METHOD.get(name) == "kv_pq":
        bits = 2 if name == "kv-pq2" else 4
        shapes = {key: tuple(tensor.shape) for key, tensor in KVPQ(bits=bits).blank_statics(2, 16).items()}
    if METHOD.get(name) == "kv_prune":
        shapes = {"key_sparsity": (1,), "query_weight": (2, 16), "value_sparsity": (1,)}
    assert all(t.shape == shapes[key] for tensors in policy.layers.values() for key, t in tensors.items())
    assert sidecar["kv_cache"]["method"] == METHOD.get(name, "kv_int4")
    stock = AutoModelForCausalLM.from_pretrained(directory)
    assert type(stock(TOKENS)[CACHE]) is DynamicCache
    found = made[name].evaluation["kv_cache"]
    # A bitmap of 4 bytes and 4 channels of bf16 for 16 channels, and 16 bytes for the keys and values of 128 tokens.
    bits = {"kv-fp8": 10.0, "kv-pq2": 2.0, "kv-prune70": round(6 + 16 * 8 / 4096, 4), "w4a8-pq4": 4.0}.get(name, 6.0)
    assert found == {
        "protocol": "chunks",
        "chunk": 128,
        "positions": 800,
        "reading_codes": 2 * 144,
        "bits_per_element": bits,
    }
    card = (directory / "README.md").read_text("utf-8")
    assert "`generate()` keeps past keys and values compressed" in card
    assert "the first 4 tokens and at least the last 16 stay dense" in card
    assert f"Coded tokens take {bits:.3f} bits per element" in card
    assert "288 of 800 positions had coded tokens to read" in card
    assert ("Keys lose a mean, are divided by factors and rotated" in card) == (name not in METHOD)
    assert ("Codes are numbers of centroids, 256 for each sub-vector" in card) == (METHOD.get(name) == "kv_pq")


def test_evaluation_reads_codes(made, base, text):
    options = EvaluationOptions(text=str(text), window=400, windows=2)
    found = evaluate(made["kv-int4"].output, against=base, options=options, speed=False)
    assert found["kv_cache"]["reading_codes"] == 288
    assert found["comparison"] == made["kv-int4"].evaluation["comparison"]
    assert found["comparison"]["kl"] > 0
    alone = evaluate(base, options=options, speed=False)
    assert "kv_cache" not in alone


@torch.no_grad()
def test_logits_through_the_cache_are_those_of_chunks(made, base):
    model = load(made["kv-int4"].output)
    maker = cache_maker(model)
    assert maker is not None
    mask = torch.ones_like(TOKENS)
    mask[1, 250:] = 0
    cache, parts = maker.make(), []
    for start in range(0, 300, 128):
        stop = min(300, start + 128)
        part = {"attention_mask": mask[:, :stop]}
        parts.append(model(TOKENS[:, start:stop], **{CACHE: cache}, **part).logits)
    expected = torch.cat(parts, dim=1)
    assert torch.equal(reading.cached_logits(model, TOKENS, mask=mask), expected)
    for keep in (1, 44, 45, 172, 300):
        assert torch.equal(reading.cached_logits(model, TOKENS, mask=mask, keep=keep), expected[:, -keep:])
    dense = model(TOKENS, attention_mask=mask, use_cache=False).logits
    assert torch.allclose(dense[:, :128], expected[:, :128], atol=0.1)
    assert not torch.allclose(dense[0, 200:], expected[0, 200:], atol=1e-3)


def test_tasks_go_through_the_cache(made, base, tmp_path):
    file = tmp_path / "words.jsonl"
    words = "the value of an expression is what a function returns to its caller and " * 30
    file.write_text(json.dumps({"context": words, "target": "then"}) + "\n", "utf-8")
    options = EvaluationOptions(windows=0)
    model = evaluate(made["kv-int4"].output, options=options, last_word=file, speed=False)
    dense = evaluate(base, options=options, last_word=file, speed=False)
    difference = abs(
        model["last_word"]["model"]["target_perplexity"] / dense["last_word"]["model"]["target_perplexity"] - 1
    )
    assert 0 < difference < 0.2


def test_windows_that_read_no_code_say_so(base, text, tmp_path):
    overrides = {"evaluation.text": str(text), "evaluation.window": 100, "evaluation.windows": 1}
    result = compress(base, "kv-fp8", tmp_path / "out", overrides=overrides)
    assert result.evaluation is not None
    assert result.evaluation["kv_cache"]["reading_codes"] == 0
    assert result.evaluation["kv_cache"]["bits_per_element"] is None
    assert "NO position had coded tokens to read" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_static_tensors_are_those_of_the_keys_that_are_cached(base, text):
    model = in_memory(base)
    policy = choose_cache(model, KVINT4(key_transform="scale"), TOKENS[:1], device=torch.device("cpu"))
    cache = DynamicCache(config=model.config)
    model(TOKENS[:1], **{CACHE: cache})
    for layer, tensors in zip(cache.layers, policy.layers.values(), strict=True):
        assert torch.allclose(tensors["key_mean"], layer.keys.float().mean(dim=(0, 2)), atol=1e-5)
        assert tensors["key_rotated"].tolist() == [0]
    assert type(model(TOKENS)[CACHE]) is DynamicCache


def test_reload_compares_what_reads_codes(base, overrides, tmp_path, monkeypatch):
    """A damaged factor on disk is found although a prefill would not read it."""
    import kompakt.compress.pipeline as pipeline

    def damaged(policy):
        tensors = cache_tensors(policy)
        name = next(name for name in sorted(tensors) if "mean" in name)
        return {**tensors, name: tensors[name].flip(-1)}

    monkeypatch.setattr(pipeline, "cache_tensors", damaged)
    with pytest.raises(RuntimeError, match="compressed cache: the reloaded model differs from the one in memory"):
        compress(base, "kv-int4", tmp_path / "out", overrides=overrides)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["kv-int4", "w4a8-kv4"])
def test_limit_that_a_cache_cannot_keep_fails(base, overrides, tmp_path, recipe, monkeypatch):
    """Whatever else can be given back has been by then. INT4 costs this model so little that it may as well gain."""
    monkeypatch.setattr("kompakt.compress.pipeline.exceeds", lambda *_: True)
    limits = {"limits.perplexity_increase": 1e-9, "limits.max_restored": 1.0, "evaluation.windows": 1}
    with pytest.raises(LimitExceeded, match=r"perplexity grew by .* a compressed cache is not given back"):
        compress(base, recipe, tmp_path / "out", overrides={**overrides, **limits})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "kv_int9"}, "kv_cache method 'kv_int9' is unknown to this kompakt; known: kv_fp8, kv_int4"),
        ({"layers": []}, "its kv_cache holds no layers"),
        ({"recent_tokens": -4}, "kv_cache recent_tokens:"),
        ({"residual": 4}, "kv_cache residual:"),
        ({"layers": {"model.layers.0.self_attn": ["key_zeros"]}}, "lacks model.layers.0.self_attn.key_zeros"),
        ({"layers": {"model.layers.9.self_attn": []}}, "no cache of a module model.layers.9.self_attn"),
    ],
    ids=str,
)
def test_damaged_policies_are_named(change, says, made, base, tmp_path):
    import shutil

    directory = tmp_path / "out"
    shutil.copytree(made["kv-int4"].output, directory)
    content = json.loads((directory / SIDECAR).read_text("utf-8"))
    content["kv_cache"] |= change
    write_sidecar(directory, content)
    model = in_memory(base)
    for use in (lambda: load(directory), lambda: patch(model, directory)):
        with pytest.raises(ValueError) as caught:
            use()
        assert says in str(caught.value) and "\n" not in str(caught.value)
    assert cache_maker(model) is None


def test_policies_survive_being_written(base):
    model = in_memory(base)
    policy = choose_cache(model, KVFP8(max_tokens=77), None, device=torch.device("cpu"))
    again = read_cache(json.loads(json.dumps({"kv_cache": write_cache(policy)})), base)
    assert again == policy


def test_generation_beyond_the_budget_fails_with_one_sentence(base):
    with patch(in_memory(base), {"kv_cache": {"method": "kv_fp8", "max_tokens": 310}}) as model:
        assert model.generate(TOKENS, max_new_tokens=11, do_sample=False).shape[1] == 311
        with pytest.raises(ValueError, match=r"311 tokens exceed the cache's max_tokens of 310"):
            model.generate(TOKENS, max_new_tokens=12, min_new_tokens=12, do_sample=False)


def test_plan_counts_what_is_allocated(base):
    found = plan(base, "kv-int4", contexts=(300, 1000))
    model = in_memory(base)
    policy = choose_cache(model, KVINT4(key_transform="none"), None, device=torch.device("cpu"))
    run_by(model, {}, policy)
    for tokens in (300, 1000):
        cache = model(torch.randint(3, 200, (1, tokens)))[CACHE]
        assert isinstance(cache, CompressedCache)
        assert found.compressed_cache.bytes[tokens] == cache.nbytes().total
    run_as_before(model)
    assert (found.compressed_cache.compressed_layers, found.compressed_cache.dense_layers) == (4, 0)
    assert "key-value cache" in [stage.name for stage in found.stages]
    assert found.compressed_cache.codebook_bytes == 0
    codes = plan(base, "kv-pq4", contexts=(1000,)).compressed_cache
    assert codes is not None
    # 768 tokens in pages, 2 × 16 channels, in two layers' heads; then 260 places that are dense.
    heads = 4 * 2 * 2
    assert codes.bytes[1000] == heads * 16 * (768 // 2 + (128 + 128 + 4) * model.dtype.itemsize)
    tensors = KVPQ().blank_statics(2, 16).values()
    assert codes.codebook_bytes == 4 * sum(tensor.nbytes for tensor in tensors)
    pruned = plan(base, "kv-prune50", contexts=(1000,)).compressed_cache
    assert pruned is not None
    # A bitmap of 4 bytes and 8 channels of bf16 for each key and value of a page, and 16 bytes behind them all.
    assert pruned.bytes[1000] == heads * (768 * 20 + 768 // 128 * 8 + 16 * (128 + 128 + 4) * model.dtype.itemsize)
    assert pruned.codebook_bytes == 4 * 2 * 16 * 4
    assert plan(base, "kv-fp8").as_dict()["kernels"]["decode_attention"]["used"]
    assert plan(base, "w4a16-rtn").compressed_cache is None


def test_command_line(base, text, tmp_path, capsys):
    def words() -> str:
        return " ".join(capsys.readouterr().out.split())

    assert main(["plan", str(base), "-r", "kv-int4", "--device", "cpu"]) == 0
    said = words()
    assert "the cache of 4 layers is compressed" in said and "× smaller" in said
    assert "decode_attention reference used" in said
    out = str(tmp_path / "out")
    options = ["--evaluation-window", "400", "--evaluation-windows", "1", "--device", "cpu"]
    options += ["--num-calibration-samples", "2", "--max-seq-length", "64"]
    assert main(["compress", str(base), "-r", "kv-int4", "-o", out, *options]) == 0
    said = words()
    assert "cache kv_int4, sink tokens 4, recent tokens 128, key transform auto" in said
    assert "kv_int4 in 4 layers; the first 4 tokens and at least the last 128 stay dense" in said
    assert "144 of 400 positions had coded tokens to read" in said
    assert main(["evaluate", out, "--window", "400", "--windows", "1", "--no-speed"]) == 0
    assert "Text went through the compressed cache 128 tokens at a time; 144 of 400 positions" in words()
    assert main(["list"]) == 0
    assert "kv_cache method" in words()
    assert main(["compress", str(base), "-r", "kv-fp8", "-o", out + "2", "--strict", "--device", "cpu"]) == 2
    assert "decode_attention has no kernel on this device" in " ".join(capsys.readouterr().err.split())
