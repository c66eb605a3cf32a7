"""Models whose prefill is sparse: against eager attention with the mask that the patterns mean, padded, in chunks, over
caches, and through recipes, directories and reports."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_models import tiny as tiny_model
from attention_models import ways
from tiny import tiny_directory, write_text
from torch import Tensor
from transformers import DynamicCache

from kompakt.compress import compress, load, patch
from kompakt.compress.artifact import read_policies, write_policies
from kompakt.compress.hf_attention import at_least, attached_layers, attention_in_use, attention_modules
from kompakt.compress.hf_cache import CACHE
from kompakt.compress.hf_cache_hooks import run_as_before, run_by, running
from kompakt.compress.layer_policies import combined
from kompakt.compress.planning import plan
from kompakt.compress.recipe import Limits
from kompakt.compress.reporting import describe
from kompakt.compress.restore import REASON, given_back, left_to_restore, worst_attention
from kompakt.compress.sparsity_calibration import choose_sparsity
from kompakt.compress.verification import verify
from kompakt.quant.kv_fp8 import KVFP8
from kompakt.quant.method import AttentionPolicy, CachePolicy
from kompakt.sparsify.method import SparsityPolicy
from kompakt.sparsify.minference import MInference
from kompakt.sparsify.patterns import AShape, Block, Dense, TriShape, VerticalSlash, exact_mask
from kompakt.sparsify.triangle import Triangle

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 200
TOKENS = torch.randint(3, 128, (2, LENGTH), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")


def llama(family: str = "llama", **settings: Any) -> Any:
    return tiny_model(family, max_position_embeddings=512, **settings)


def shapes(heads: int) -> tuple[Any, ...]:
    """Static patterns, different ones for every head."""
    every = (AShape(3, 40), TriShape(5, 20, 30), Dense(), AShape(0, 70))
    return tuple(every[head % len(every)] for head in range(heads))


def policies(model: Any, heads: tuple[Any, ...] | None = None, **options: Any) -> dict[str, AttentionPolicy]:
    count = model.config.num_attention_heads
    policy = SparsityPolicy(heads or shapes(count), **{"min_length": 100, **options})
    return combined({}, dict.fromkeys(attention_modules(model), policy))


def expected(model: Any, tokens: Tensor, start: int = 0) -> Tensor:
    """Logits with eager attention and one mask per head; `start`: queries from there on."""
    length = tokens.shape[1]
    masks = [exact_mask(shape, length, length, causal=True) for shape in shapes(model.config.num_attention_heads)]
    stacked = torch.stack(masks)[None, :, start:].expand(len(tokens), -1, -1, -1)
    lowest = torch.finfo(torch.float32).min
    return model(tokens, attention_mask=torch.where(stacked, 0.0, lowest), use_cache=False).logits


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 2e-4 * other.abs().max())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_prefill_is_that_of_the_masks(family):
    """9 heads over 3, and 14 over 2; short calls, decoding and everything after unpatching are as before."""
    model = llama(family)
    wanted, before = expected(model, TOKENS), model(TOKENS, use_cache=False).logits
    with running(model, policies(model)):
        assert close(model(TOKENS, use_cache=False).logits, wanted)
        assert not close(wanted, before)
        used = attention_in_use(model)
        assert used is not None and used["ran"] == "sparse" and 0.3 < used["sparsity"]["density"] < 1
        short = model(TOKENS[:, :99], use_cache=False).logits
        assert ways(model) == {"sparse": 2, "dense": 2}
    assert torch.equal(short, model(TOKENS[:, :99], use_cache=False).logits)
    assert torch.equal(before, model(TOKENS, use_cache=False).logits)


def test_padding():
    """A padded row gives what it gives alone."""
    model = llama()
    mask = torch.ones_like(TOKENS)
    mask[0, :70] = 0
    with running(model, policies(model)), at_least(model, 1):
        together = model(TOKENS, attention_mask=mask, use_cache=False).logits
        assert ways(model) == {"sparse": 2}
        assert close(together[1:], model(TOKENS[1:], use_cache=False).logits)
        assert close(together[:1, 70:], model(TOKENS[:1, 70:], use_cache=False).logits)


def test_chunked_prefill_and_second_turn():
    """Chunks with a past, and a second turn: queries at the end of all keys."""
    model = llama()
    heads = tuple((AShape(3, 40), AShape(0, 70), Dense())[head % 3] for head in range(9))
    masks = torch.stack([exact_mask(head, LENGTH, LENGTH, causal=True) for head in heads])
    lowest = torch.finfo(torch.float32).min
    wanted = model(TOKENS, attention_mask=torch.where(masks, 0.0, lowest)[None].expand(2, -1, -1, -1)).logits
    with running(model, policies(model, heads, min_length=1)):
        cache, parts = DynamicCache(config=model.config), []
        for start, stop in ((0, 66), (66, 130), (130, 200)):
            parts.append(model(TOKENS[:, start:stop], **{CACHE: cache}, use_cache=True).logits)
        assert close(torch.cat(parts, dim=1), wanted)
        assert ways(model) == {"sparse": 6}
        model(TOKENS[:, :20], **{CACHE: cache}, use_cache=True)
        assert ways(model) == {"sparse": 6, "dense": 2}


@pytest.mark.parametrize("heads", [VerticalSlash(200, 200), Block(4), Dense()], ids=str)
def test_budgets_for_everything_are_dense_attention(heads):
    """Picked from each input, in chunks with padding; all that there is comes to dense attention."""
    model = llama()
    mask = torch.ones_like(TOKENS)
    mask[0, :37] = 0
    before = model(TOKENS, attention_mask=mask, use_cache=False).logits
    every = (heads,) * 8 + (VerticalSlash(200, 200),)
    with running(model, policies(model, every, min_length=1)):
        cache = DynamicCache(config=model.config)
        parts = [
            model(TOKENS[:, start:stop], attention_mask=mask[:, :stop], **{CACHE: cache}, use_cache=True).logits
            for start, stop in ((0, 110), (110, 200))
        ]
        assert ways(model) == {"sparse": 4}
    assert close(torch.cat(parts, dim=1)[mask.bool()], before[mask.bool()])


def test_with_arithmetic_and_a_compressed_cache():
    """All slots at once: the prompt is sparse and quantized, what follows reads codes."""
    model = llama()
    both = combined(dict.fromkeys(attention_modules(model), AttentionPolicy("int8_fp16", 150)), {
        name: SparsityPolicy(shapes(9), 100) for name in attention_modules(model)
    })  # fmt: skip
    wanted = expected(model, TOKENS)
    cache = CachePolicy(KVFP8(), {name: {} for name in attention_modules(model)})
    with running(model, both, cache):
        out = model(TOKENS, use_cache=True)
        assert (out.logits - wanted).norm() < 0.1 * wanted.norm()
        assert ways(model) == {"sparse int8_fp16": 2}
        used = attention_in_use(model)
        assert used is not None and used["ran"] == "quantized and sparse"
        held = getattr(out, CACHE)
        model(TOKENS[:, :70], **{CACHE: held}, use_cache=True)
        assert ways(model) == {"sparse int8_fp16": 2, "kv_cache": 2}
        model(TOKENS[:, :120], use_cache=False)
        assert ways(model)["sparse"] == 2
        assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (2, LENGTH + 3)


def test_masks_that_no_index_fits(caplog):
    """Packed sequences and masks of the caller's own visit all keys, with one reason."""
    model = llama()
    positions = torch.cat((torch.arange(120), torch.arange(80)))[None]
    before = model(TOKENS[:1], position_ids=positions, use_cache=False).logits
    with running(model, policies(model)), caplog.at_level(logging.WARNING):
        assert torch.equal(before, model(TOKENS[:1], position_ids=positions, use_cache=False).logits)
        assert ways(model) == {"dense: sequences are packed": 2}
    assert "sequences are packed" in caplog.text


def test_sliding_windows_are_left_alone(caplog):
    method = MInference(recall=0.5)
    model = llama("gemma2", num_hidden_layers=4)
    with caplog.at_level(logging.WARNING):
        found = choose_sparsity(model, method, TOKENS, device=CPU)
    assert "sparse prefill applies to 2 of 4 layers and gains little on such a model" in caplog.text
    assert [policy.reason.startswith("it has sliding") for policy in found.values()] == [True, False, True, False]
    assert not found["model.layers.0.self_attn"].sparse
    with pytest.raises(ValueError, match="no attention layer of MistralForCausalLM can be sparse: it has"):
        choose_sparsity(llama("mistral"), method, TOKENS, device=CPU)
    with pytest.raises(ValueError, match="no attention layer of BertModel can be sparse: its mask is not causal"):
        choose_sparsity(llama("bert"), method, TOKENS, device=CPU)


def test_published_patterns(tmp_path):
    file = tmp_path / "patterns.json"
    layer = {"0": ["vertical_and_slash", 40, 120, 1.0], "8": ["stream_llm", 4, 64, 1.0]}
    file.write_text(json.dumps([layer, {}]), "utf-8")
    model = llama()
    with patch(model, {"sparsity": {"method": "minference", "file": str(file), "min_length": 100}}):
        model(TOKENS, use_cache=False)
        assert ways(model) == {"sparse": 1, "dense": 1}
        (first, _) = attached_layers(model).values()
        assert first.sparsity is not None and first.sparsity.heads[8] == AShape(4, 64)
    for content, message in (
        ([layer], "has patterns for 1 layers, the model has 2"),
        ([{"9": layer["0"]}, {}], "head 9"),
    ):
        file.write_text(json.dumps(content), "utf-8")
        with pytest.raises(ValueError, match=message):
            patch(model, {"sparsity": {"method": "minference", "file": str(file)}})
    assert not attached_layers(model)


def test_policies_are_stored_and_damage_is_named():
    model = llama()
    given = policies(model)
    stored = json.loads(json.dumps(write_policies(given)))
    assert set(stored) == {"sparsity"} and read_policies(stored) == given
    broken = json.loads(json.dumps(stored))
    broken["sparsity"]["layers"]["model.layers.1.self_attn"]["heads"][0]["window"] = "wide"
    with pytest.raises(ValueError, match=r"sparsity of model.layers.1.self_attn: window of a_shape is 'wide'"):
        read_policies(broken)
    wrong = policies(model, shapes(8))
    with pytest.raises(ValueError, match=r"has 8 heads, and model.layers.0.self_attn has 9"):
        run_by(model, wrong)
    run_as_before(model)
    assert not attached_layers(model)


def test_layers_are_given_back():
    """The sparsest layer first; one that was given back is dense in every slot."""
    model = llama()
    given = policies(model)
    name = next(iter(given))
    assert left_to_restore([], given)
    worst = worst_attention(given, {"comparison": {"perplexity_increase": 0.5}}, Limits(perplexity_increase=0.1))
    assert len(worst) == 1
    back = given_back(given[name])
    assert read_policies(json.loads(json.dumps(write_policies({name: back})))) == {name: back}
    assert not left_to_restore([], {name: back}) and REASON in str(back)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    write_text(folder / "text.txt")
    return tiny_directory(folder / "base", max_position_embeddings=512, num_hidden_layers=2)


@pytest.mark.parametrize("recipe", ["sparse-minference", "sparse-triangle", "sage-minference"])
def test_recipes(base, tmp_path, recipe):
    """compress, verify, report, load: the same patterns everywhere."""
    text = str(base.parent / "text.txt")
    small = {"calibration.source": text, "calibration.length": 384, "evaluation.text": text, "evaluation.window": 384}
    small |= {"evaluation.windows": 1, "sparsity.min_length": 256}
    small |= {"sparsity.max_error": 5} if recipe == "sparse-triangle" else {"sparsity.recall": 0.5}
    if recipe == "sparse-triangle":
        small |= {"sparsity.window": 64, "sparsity.tail": 10}
    done = compress(base, recipe, tmp_path / "out", overrides=small, device="cpu")
    assert done.evaluation is not None
    assert done.evaluation["attention"]["sparsity"]["density"] < 1
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "## Sparse prefill" in card and "calls over 256 keys and more" in card
    assert ("## Attention" in card) == (recipe == "sage-minference")
    assert verify(tmp_path / "out").passed
    found = describe(tmp_path / "out")
    assert len(found["sparse_layers"]) == 2 and found["sparsity"] and len(found["recipe"]["slots"]) == 4
    model = load(tmp_path / "out")
    model(torch.randint(3, 300, (1, 300)))
    assert sum(count for way, count in ways(model).items() if way.startswith("sparse")) > 0
    planned = plan(base, recipe, device="cpu").as_dict()
    assert [line["status"] for line in planned["sparsity"]] == ["covered", "covered"]
    assert planned["kernels"]["sparse_attention"]["backend"] == "reference"


def test_triangle_without_data(base):
    """A named first layer needs no text."""
    model = llama()
    found = choose_sparsity(model, Triangle(first_layer=1, min_length=1), None, device=CPU)
    assert [policy.sparse for policy in found.values()] == [False, True]
    assert replace(found["model.layers.1.self_attn"], reason="").heads == (TriShape(8, 512, 128),) * 9
