"""Caches that evict: every later query sees exactly what its head has kept, memory falls, and what cannot be is refused
by name.
"""

from __future__ import annotations

import copy
import logging
import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from attention_models import tiny
from cache_models import in_steps, patched
from decode_cases import statics_of
from evict_models import recording, reference_logits
from kernel_cases import skip_below
from transformers import AttentionInterface, DynamicCache

from kompakt.compress import CompressedCache, hf_attention, hf_capture, hf_eviction, patch
from kompakt.compress.evicting import EvictingStore, evict_together
from kompakt.compress.hf_attention import run_second_reading
from kompakt.compress.hf_cache import CACHE
from kompakt.compress.hf_cache_hooks import run_as_before
from kompakt.compress.hf_capture import Steps, everywhere, steps_of
from kompakt.compress.kv_evict import KVEvict
from kompakt.kernels.activations import FP8_CAPABILITY, log_fallback
from kompakt.kernels.decode_attention import decode_attention, dequantized
from kompakt.kernels.kv_codec import PAGE
from kompakt.sparsify.kv_evict import OVERLAP, Seen, reread

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = torch.randint(3, 128, (3, 700), generator=torch.Generator().manual_seed(4))
STARTS = [0, 37, 300]
"""The last row is too short to be evicted from by these methods, whatever stands beside it."""
MASK = (torch.arange(700) >= torch.tensor(STARTS)[:, None]).long()
SMALL: dict[str, Any] = {"sink_tokens": 2, "recent_tokens": 8}
METHODS = {
    "snapkv": KVEvict(**SMALL, ratio=2.0, window=16),
    "uniform": KVEvict(**SMALL, tokens=300, budget="uniform"),
    "expected": KVEvict(**SMALL, ratio=2.0, scores="expected", codes="fp8"),
    "threshold": KVEvict(**SMALL, budget="threshold", threshold=2e-3, window=16, codes="int4"),
    "kvzip": KVEvict(**SMALL, ratio=2.0, scores="kvzip", budget="global", chunk=250),
}
FULL = {"layer_types": ["full_attention"] * 2}
FAMILIES = {"llama": {}, "qwen2": {}, "qwen3": {}, "gemma2": FULL, "gpt_oss": FULL}
GREEDY = {"max_new_tokens": 10, "do_sample": False}


def model_of(family: str) -> Any:
    return tiny(family, max_position_embeddings=2048, **FAMILIES[family])


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", name) for name in METHODS] + [(name, "kvzip") for name in FAMILIES] + [("gemma2", "snapkv")],
)
def test_later_queries_see_what_their_head_has_kept(family, method, monkeypatch):
    """A left-padded batch: prompt, a second turn, single tokens, against dense attention with the others hidden."""
    model, chosen = model_of(family), METHODS[method]
    dense = in_steps(model, DynamicCache(config=model.config), LONG, (650, 50), MASK)
    patched(model, chosen)
    with recording(chosen, 650, STARTS, monkeypatch) as expected:
        cache = CompressedCache(model.config, chosen)
        got = in_steps(model, cache, LONG, (650, 30, 1, 1, 18), MASK)
    run_as_before(model)
    assert len(expected.kept) == 2 and not bool(expected.kept[0][0].all())
    wanted = reference_logits(model, expected, LONG, MASK)[:, 650:]
    # The prompt itself is attended to as without a cache.
    assert torch.equal(got[:, :650], dense[:, :650])
    cost = (wanted - dense[:, 650:]).square().mean()
    # FP32 sums in another order; a token may move over the edge between two codes, which is less than codes cost.
    share = 1e-6 if chosen.codes == "none" else 1e-3
    assert cost > 0 and (got[:, 650:] - wanted).square().mean() <= share * cost


@pytest.mark.parametrize("codes", ["none", "int4"])
@pytest.mark.parametrize("scores", ["snapkv", "expected", "kvzip"])
def test_row_of_a_padded_batch_generates_what_it_generates_alone(scores, codes):
    options = {"budget": "global", "chunk": 130} if scores == "kvzip" else {"window": 16}
    model = patched(model_of("llama"), KVEvict(**SMALL, ratio=2.0, scores=scores, codes=codes, **options))
    starts = [0, 37, 129]
    mask = (torch.arange(700) >= torch.tensor(starts)[:, None]).long()
    found = model.generate(LONG, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    assert all(store.kept is not None for store in found[CACHE].compressed_layers)
    for row, start in enumerate(starts):
        alone = model.generate(LONG[row : row + 1, start:], **GREEDY)[0, 700 - start :]
        assert torch.equal(alone, found.sequences[row, 700:])


def test_short_rows_keep_everything_beside_long_ones():
    model = patched(model_of("llama"), METHODS["snapkv"])
    cache = in_cache(model, METHODS["snapkv"], LONG, MASK)
    shortest = METHODS["snapkv"].shortest_prompt
    assert 400 < shortest <= 663
    for store in cache.evicting_layers:
        assert store.kept is not None and store.kept.counts[2] == (700 - 8 - 300 - 2,) * 3
        assert max(store.kept.counts[0]) <= 5 * PAGE and sum(store.kept.counts[0]) == PAGE * int(
            3 * (350 - 138) // PAGE
        )
    short = in_cache(model, METHODS["snapkv"], LONG[:, : shortest - 1], None)
    assert all(store.kept is None and store.tokens == shortest - 1 for store in short.evicting_layers)
    assert short.evicting_layers[0].coded == 512


def in_cache(model: Any, method: KVEvict, tokens: torch.Tensor, mask: Any) -> CompressedCache:
    cache = CompressedCache(model.config, method)
    model(tokens, attention_mask=mask, **{CACHE: cache})
    return cache


def tensors_of(store: EvictingStore) -> list[torch.Tensor]:
    assert store.pool is not None and store.kept is not None
    dense = [store.key, store.value, store.sink_key, store.sink_value]
    kept = [store.kept.records, store.kept.table, store.kept.lengths]
    return [tensor for tensor in (*store.pool.blocks, *dense, *kept) if tensor is not None]


@pytest.mark.parametrize("ratio", [2.0, 4.0])
def test_allocated_bytes_fall_by_the_ratio(ratio):
    """All that is allocated, against keys and values of a dense cache, but for tables of pages; no more is held."""
    model = tiny("llama", eager=False, dtype=torch.bfloat16, max_position_embeddings=4096)
    method = KVEvict(ratio=ratio, recent_tokens=32, window=16)
    patched(model, method)
    tokens = torch.randint(3, 128, (2, 3000))
    cache = in_cache(model, method, tokens, None)
    dense = DynamicCache(config=model.config)
    run_as_before(model)
    model(tokens, **{CACHE: dense})
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers)
    found = sum(tensor.untyped_storage().nbytes() for store in cache.evicting_layers for tensor in tensors_of(store))
    tables = sum(store.kept.table.nbytes + store.kept.lengths.nbytes for store in cache.evicting_layers)
    assert cache.nbytes().total == found
    assert held / ratio * 0.95 - 2 * 2 * 3 * PAGE * 64 * 2 <= found - tables <= held / ratio
    assert all(store.pending is None and store.scores is None for store in cache.evicting_layers)
    assert [store.dense_bytes for store in cache.evicting_layers] == [held // 2] * 2


class Plain:
    """An evicting cache as lists: all tokens, and which of the prompt's each head has kept."""

    def __init__(self, method: KVEvict, codec: Any, starts: list[int]):
        self.method, self.codec, self.starts = method, codec, starts
        self.key, self.value = torch.empty(len(starts), 2, 0, 8), torch.empty(len(starts), 2, 0, 6)
        self.kept: torch.Tensor | None = None
        self.coded = 0

    @property
    def tokens(self) -> int:
        return self.key.shape[2]

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.key, self.value = torch.cat((self.key, key), 2), torch.cat((self.value, value), 2)
        while self.tokens - (self.coded // PAGE + 1) * PAGE >= self.method.recent_tokens:
            self.coded = (self.coded // PAGE + 1) * PAGE

    def rows(self, chosen: list[int]) -> None:
        self.key, self.value = self.key[chosen], self.value[chosen]
        self.starts = [self.starts[row] for row in chosen]
        self.kept = None if self.kept is None else self.kept[chosen]

    def attend(self, query: torch.Tensor, past: int) -> torch.Tensor:
        """Of queries of the last columns; those from `past` on are read as they came."""
        place = torch.arange(self.tokens)
        seen = torch.ones(len(self.starts), 2, self.tokens, dtype=torch.bool)
        boundary = 0 if self.kept is None else self.kept.shape[2]
        if self.kept is not None:
            seen[..., :boundary] = self.kept
        coded = (place < min(self.coded, past))[None, None].expand(seen.shape).clone()
        for row, start in enumerate(self.starts):
            sinks = slice(start, start + self.method.sink_tokens)
            seen[row, :, sinks] = True
            coded[row, :, sinks] = False
            seen[row, :, :start] = False
        key, value = (
            torch.where(coded[..., None], rounded, x)
            for rounded, x in zip(self.codec.rounded(self.key, self.value), (self.key, self.value), strict=True)
        )
        count = query.shape[2]
        causal = place <= torch.arange(self.tokens - count, self.tokens)[:, None]
        logits = query.unflatten(1, (2, -1)) @ key[:, :, None].mT * 0.5
        hidden = ~(causal & seen[:, :, None])[:, :, None]
        weights = logits.double().masked_fill(hidden, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
        return (weights @ value[:, :, None].double()).flatten(1, 2)


@pytest.mark.parametrize("codes", ["none", "fp8", "int4"])
def test_any_sequence_of_operations_reads_what_is_kept(codes, monkeypatch):
    done = dict.fromkeys(("prompt", "append", "crop", "refused", "rows", "reset", "copy"), 0)
    for seed in range(15):
        choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        options = {"sink_tokens": choose.choice((0, 3)), "recent_tokens": choose.choice((0, 5, 140))}
        method = KVEvict(**options, tokens=choose.choice((300, 420)), codes=codes, window=8)
        statics = statics_of(2, 8) if codes == "int4" and choose.random() < 0.5 else {}
        starts = [choose.choice((0, 0, 3, 140)) for _ in range(choose.randint(1, 3))]
        store = EvictingStore(method, statics=statics, starts=starts)
        plain = Plain(method, method.codec(statics), list(starts))

        def some(count: int, batch: int, generator=generator) -> list[torch.Tensor]:
            shapes = ((2, 8), (2, 6), (6, 8))
            return [torch.randn(batch, heads, count, dim, generator=generator) for heads, dim in shapes]

        def compare(one: EvictingStore, other: Plain, count: int) -> None:
            key, value, query = some(count, len(other.starts))
            past = other.tokens
            one.append(key, value)
            other.append(key, value)
            assert (one.tokens, one.coded) == (other.tokens, other.coded)
            read = one.read(None if count == 1 else (key, value), count)
            key_starts = torch.tensor(other.starts)
            out, _ = decode_attention(query, read, scaling=0.5, key_starts=key_starts)
            wanted = other.attend(query, other.tokens if count == 1 else past)
            # Sums of FP32 over at most some thousand terms of order one.
            assert torch.allclose(out.double(), wanted, rtol=1e-4, atol=2e-5)

        for _ in range(8):
            if plain.tokens == 0:
                count = choose.choice((620, 700, 900))
                key, value, query = some(count, len(starts))
                with recording(method, count, starts, monkeypatch) as expected:
                    store.append(key, value)
                    assert store.pending is not None
                    store.look(query, key, scaling=0.5, softcap=None, starts=list(starts))
                plain.append(key, value)
                (plain.kept,) = expected.kept
                plain.coded = plain.kept.shape[2]
                done["prompt"] += 1
            operation = choose.choice(("append", "append", "crop", "rows", "reset", "copy"))
            if operation == "append":
                compare(store, plain, choose.choice((1, 2, 70, 300)))
            elif operation == "crop":
                count = choose.choice((0, 1, 60, 400))
                assert plain.kept is not None
                if plain.tokens - count < plain.kept.shape[2]:
                    with pytest.raises(
                        ValueError, match="cannot be taken from a cache that has evicted from its first"
                    ):
                        store.crop(count)
                    operation = "refused"
                else:
                    store.crop(count)
                    plain.key, plain.value = (x[:, :, : plain.tokens - count] for x in (plain.key, plain.value))
                    plain.coded = min(plain.coded, plain.tokens)
            elif operation == "rows":
                rows = [choose.randrange(len(plain.starts)) for _ in range(choose.randint(1, 4))]
                store.map_rows(lambda tensor, rows=rows: tensor[torch.tensor(rows)], rows)
                plain.rows(rows)
            elif operation == "reset" and choose.random() < 0.4:
                store.forget()
                assert store.nbytes().total == 0
                starts = [0] * len(plain.starts)
                plain = Plain(method, method.codec(statics), list(starts))
                continue
            elif operation == "copy":
                compare(copy.deepcopy(store), copy.deepcopy(plain), 1)
            done[operation] += 1
            compare(copy.deepcopy(store), copy.deepcopy(plain), 1)
    assert min(done.values()) >= 3, done


def test_rows_that_are_gone_give_their_pages_back():
    store = EvictingStore(KVEvict(tokens=500, window=8, codes="int4"), starts=[0, 0, 0])
    key = torch.randn(3, 2, 1200, 16)
    store.append(key, key)
    store.look(key, key, scaling=0.3, softcap=None, starts=[0, 0, 0])
    assert store.kept is not None
    before = len(store.kept.records)
    store.map_rows(lambda tensor: tensor[[1, 1, 0, 2]], [1, 1, 0, 2])
    assert len(store.kept.records) == before
    store.map_rows(lambda tensor: tensor[[1, 1]], [1, 1])
    assert len(store.kept.records) == before // 3


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams_and_samples_run(more):
    """A beam of one hypothesis is greedy; beams reorder rows whose pages they share."""
    model = patched(model_of("llama"), METHODS["snapkv"])
    found = model.generate(LONG[:1], return_dict_in_generate=True, output_scores=True, **GREEDY, **more)
    tokens, cache = found.sequences[0], in_cache(model, METHODS["snapkv"], LONG[:1], None)
    logits = [model(tokens[None, 699 + step : 700 + step], **{CACHE: cache}).logits[0, -1] for step in range(1, 10)]
    first = in_cache_logits(model, LONG[:1])
    total = sum(
        float(row.log_softmax(-1)[token]) for row, token in zip([first, *logits], tokens[700:].tolist(), strict=True)
    )
    assert abs(total / 10 - float(found.sequences_scores[0])) <= 1e-3


def in_cache_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, **{CACHE: CompressedCache(model.config, METHODS["snapkv"])}).logits[0, -1]


@pytest.mark.parametrize("method", ["snapkv", "expected", "kvzip"])
def test_recorded_steps_give_the_same_tokens(method, caplog):
    """As far as whole pages behind what was evicted from; which pages a head has does not change from step to step."""
    model, many = patched(model_of("llama"), METHODS[method]), {**GREEDY, "max_new_tokens": 80, "min_new_tokens": 80}
    options = {"attention_mask": MASK, "return_dict_in_generate": True, "output_logits": True, **many}
    wanted = model.generate(LONG, disable_compile=True, **options)
    log_fallback.cache_clear()
    with everywhere(model), caplog.at_level(logging.WARNING):
        found = model.generate(LONG, **options)
        steps = steps_of(model)
    assert torch.equal(found.sequences, wanted.sequences) and steps.plain == 79
    for one, other in zip(found.logits, wanted.logits, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    for store in found[CACHE].evicting_layers:
        assert store.following is not None and store.gone < store.coded == 768
    assert "single launches" not in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("codes", ["none", "int4", "fp8"])
@pytest.mark.parametrize("scores", ["snapkv", "kvzip"])
def test_graphs_give_the_same_tokens(scores, codes, monkeypatch):
    """Through the kernel, without the norms that are rounded in another order."""
    skip_below(FP8_CAPABILITY)
    monkeypatch.setattr(hf_capture, "fused_on", lambda device, model: nullcontext())
    options = {"budget": "global", "chunk": 250} if scores == "kvzip" else {"window": 16}
    model = model_of("llama").to("cuda", torch.bfloat16)
    patched(model, KVEvict(**SMALL, ratio=2.0, scores=scores, codes=codes, **options))
    many: dict[str, Any] = {"max_new_tokens": 150, "min_new_tokens": 150, "do_sample": False}
    ids, mask = LONG.cuda(), MASK.cuda()
    wanted = model.generate(ids, attention_mask=mask, disable_compile=True, **many)
    assert torch.equal(model.generate(ids, attention_mask=mask, **many), wanted)
    assert (steps_of(model).plain, steps_of(model).recorded, steps_of(model).replayed) == (1, 1, 147)


@pytest.mark.gpu
def test_steps_through_the_reference_are_not_recorded(monkeypatch, caplog):
    """FP32, which no kernel reads: the same tokens, launch by launch."""
    skip_below(FP8_CAPABILITY)
    monkeypatch.setattr(hf_capture, "fused_on", lambda device, model: nullcontext())
    model, ids = patched(model_of("llama").cuda(), METHODS["snapkv"]), LONG[:, :650].cuda()
    wanted = model.generate(ids, disable_compile=True, **GREEDY)
    log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(model.generate(ids, **GREEDY), wanted)
    assert steps_of(model).recorded == 0 and "does not take its lengths from the device" in caplog.text


def test_steps_under_another_mask_are_not_recorded():
    model, method = model_of("llama"), METHODS["snapkv"]
    cache = in_cache(patched(model, method), method, LONG, MASK)
    steps, token = Steps(model), LONG[:, :1]
    mask = torch.cat((MASK, MASK.new_ones(3, 1)), dim=1)
    assert steps.refusal({"input_ids": token, "attention_mask": mask, CACHE: cache}) is None
    for other in (None, torch.ones_like(mask)):
        reason = steps.refusal({"input_ids": token, "attention_mask": other, CACHE: cache})
        assert reason == "the mask is not the padding that the cache was made with"
    whole = in_cache(model, method, LONG, None)
    assert steps.refusal({"input_ids": token, CACHE: whole}) is None


def test_what_cannot_be_evicted_from_is_named():
    with pytest.raises(ValueError, match=r"layer 0 of Gemma2Config has a sliding window of 7 tokens"):
        patch(tiny("gemma2"), {"kv_cache": {"method": "kv_evict", "ratio": 2}})
    model, method = model_of("llama"), METHODS["snapkv"]
    cache = CompressedCache(model.config, method)
    model(LONG, **{CACHE: cache})
    with pytest.raises(ValueError, match="a cache that evicts needs a model that was patched with its recipe"):
        model(LONG[:, :1], **{CACHE: cache})
    with pytest.raises(ValueError, match="one mask serves all layers; evict in all"):
        CompressedCache(model.config, method, statics={0: {}})
    patched(model, method)
    right = torch.ones_like(MASK)
    right[1, 600:] = 0
    holes = torch.ones_like(MASK)
    holes[1, 5] = 0
    for mask, says in ((right, "rows are packed, or end in padding"), (holes, "the padding mask has holes")):
        with pytest.raises(ValueError, match=f"the prompt cannot be scored for eviction: {says}"):
            model(LONG, attention_mask=mask)
    with pytest.raises(
        ValueError, match="prefill_chunk_size is 256, and a cache that evicts scores a prompt as a whole"
    ):
        model.generate(LONG, prefill_chunk_size=256, **GREEDY)
    for more in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model_of("llama")}):
        with pytest.raises(ValueError, match="assisted decoding puts candidates behind the prompt"):
            model.generate(LONG[:1], **GREEDY, **more)
    with pytest.raises(ValueError, match=r"the mask's rows begin at \[0, 37, 300\]"):
        model(LONG, attention_mask=MASK, **{CACHE: CompressedCache(model.config, method, starts=[0, 0, 0])})
    cache = in_cache(model, method, LONG, MASK)
    with pytest.raises(ValueError, match="the mask is not the one that tokens were evicted under"):
        model(LONG[:, :1], attention_mask=torch.ones(3, 701, dtype=torch.long), **{CACHE: cache})
    cache = in_cache(model, method, LONG, MASK)
    with pytest.raises(ValueError, match="the mask is not the one that tokens were evicted under"):
        model(LONG[:, :1], **{CACHE: cache})
    cache = in_cache(model, method, LONG, MASK)
    key, _ = cache.update(*torch.zeros(2, 3, 3, 1, 32), 0)
    with pytest.raises(ValueError, match="heads have kept different tokens"):
        _ = key + 0
    with pytest.raises(ValueError, match="heads have kept different tokens"):
        dequantized(cache.evicting_layers[0].read(None, 1), torch.float32)


def test_mistakes_of_a_second_reading_are_named():
    method = METHODS["kvzip"]
    model = patched(tiny("llama", max_position_embeddings=900), method)
    with pytest.raises(
        ValueError, match=r"a prompt of 700 tokens again behind itself, up to position 958, and LlamaModel"
    ):
        model(LONG)
    model = patched(model_of("llama"), method)
    with pytest.raises(ValueError, match="scores kvzip reads token ids again, and the model was given embeddings"):
        model(inputs_embeds=model.get_input_embeddings()(LONG))


def test_unpatching_leaves_nothing_behind():
    model = model_of("llama")
    wanted = model.generate(LONG, **GREEDY)
    with patch(model, {"kv_cache": {"method": "kv_evict", "ratio": 2, "recent_tokens": 8}}):
        assert model.model._forward_hooks
        other = model.generate(LONG, **GREEDY)
    assert not torch.equal(other, wanted)
    assert not model.model._forward_hooks and not model.model._forward_hooks_with_kwargs
    assert not model.model._forward_pre_hooks and torch.equal(model.generate(LONG, **GREEDY), wanted)


def test_second_reading_through_our_attention(monkeypatch):
    """Scores and what follows are those that the model's own attention gives, in a padded batch, whose rows end in
    padding of their last parts."""
    method, found, ran = METHODS["kvzip"], [], []

    def keep(stores: Any) -> None:
        found.append(torch.cat([store.scores[..., :700] for store in stores], dim=1))
        evict_together(stores)

    def counted(*call: Any) -> Any:
        ran.append(run_second_reading(*call))
        return ran[-1]

    model = patched(model_of("llama"), method)
    monkeypatch.setattr(hf_eviction, "evict_together", keep)
    monkeypatch.setattr(hf_attention, "run_second_reading", counted)
    for ours in (False, True):
        monkeypatch.setattr(hf_attention, "on_cuda", lambda x, ours=ours: ours)
        model(LONG, attention_mask=MASK)
    # Two layers, three parts.
    assert [out is not None for out in ran] == [False] * 6 + [True] * 6
    assert torch.allclose(*found, rtol=1e-4, atol=1e-6)


def test_second_reading_is_that_of_the_prompt_followed_by_its_parts(monkeypatch):
    """Scores of every layer, from whole passes over prompt and part in one, whose queries and keys are looked at."""
    method, tokens, found = METHODS["kvzip"], LONG[:1, :600], []

    def keep(stores: Any) -> None:
        found.extend(store.scores.clone() for store in stores)
        evict_together(stores)

    model = patched(model_of("llama"), method)
    monkeypatch.setattr(hf_eviction, "evict_together", keep)
    model(tokens)
    run_as_before(model)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def looked_at(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float = 1.0, **kwargs: Any) -> Any:
        seen.append((query, key))
        logits = query @ key.repeat_interleave(3, 1).mT * scaling
        weights = logits.masked_fill(torch.ones(logits.shape[2:]).triu(1).bool(), -torch.inf).softmax(-1)
        return (weights @ value.repeat_interleave(3, 1)).transpose(1, 2), None

    AttentionInterface.register("looked_at", looked_at)
    model.set_attn_implementation("looked_at")
    for start in range(0, 600, method.chunk):
        stop = min(start + method.chunk, 600)
        again = tokens[:, max(0, start - OVERLAP) : stop]
        seen.clear()
        model(torch.cat((tokens, again), dim=1), use_cache=False)
        for scores, (query, key) in zip(found, seen, strict=True):
            one = Seen(query[:, :, 600:], key[:, :, :600], key[:, :, :600], [0], 32**-0.5)
            wanted = reread(one, key[:, :, 600:], (start, stop), again.shape[1])
            assert torch.allclose(scores[0, :, start:stop], wanted, rtol=1e-3, atol=1e-5)
