"""Caches with a `decode_budget`: whatever happens to them, every query sees what its head has kept, what is kept is the
best by the last queries, and storage stays within the budget.
"""

from __future__ import annotations

import copy
import logging
import random
from typing import Any

import pytest
import torch
from attention_models import tiny
from cache_models import patched
from decode_cases import statics_of
from evict_again_models import HEADS, KEY_DIM, SCALING, VALUE_DIM, Plain
from kernel_cases import skip_below

from kompakt.compress import CompressedCache, evicting_again, hf_attention
from kompakt.compress.evicting import EvictingStore
from kompakt.compress.hf_cache import CACHE
from kompakt.compress.hf_cache_hooks import run_as_before
from kompakt.compress.hf_capture import everywhere, steps_of
from kompakt.compress.kv_evict import KVEvict
from kompakt.kernels.activations import FP8_CAPABILITY, log_fallback
from kompakt.kernels.decode_attention import decode_attention
from kompakt.kernels.kv_codec import PAGE

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = torch.randint(3, 128, (3, 700), generator=torch.Generator().manual_seed(4))
MASK = (torch.arange(700) >= torch.tensor([0, 37, 300])[:, None]).long()
SMALL: dict[str, Any] = {"sink_tokens": 2, "recent_tokens": 8, "window": 16}
UNIFORM = KVEvict(**SMALL, ratio=2.0, budget="uniform", decode_budget=560)
METHODS = {
    "uniform": UNIFORM,
    "adakv": KVEvict(**SMALL, tokens=400, decode_budget=540, codes="int4"),
    "kvzip": KVEvict(**SMALL, ratio=2.0, scores="kvzip", decode_budget=550, codes="fp8"),
    "expected": KVEvict(**SMALL, ratio=2.0, scores="expected", decode_budget=550),
}
GREEDY = {"do_sample": False}


class Noted:
    """What stores chose, as places among the candidates, in turn: row → head → places."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.chosen: list[list[list[list[int]]]] = []
        original = evicting_again.kept_columns

        def kept_columns(*call: Any) -> Any:
            columns, counts = original(*call)
            pairs = [[(columns[r, h], n) for h, n in enumerate(row)] for r, row in enumerate(counts)]
            self.chosen.append([[place[:n].tolist() for place, n in row] for row in pairs])
            return columns, counts

        monkeypatch.setattr(evicting_again, "kept_columns", kept_columns)


def used_bytes(store: EvictingStore) -> int:
    """All storage of keys and values, tables of pages and remembered queries left out."""
    assert store.pool is not None
    dense = [store.key, store.value, store.sink_key, store.sink_value]
    kept = [] if store.kept is None else [store.kept.records]
    return sum(x.untyped_storage().nbytes() for x in (*store.pool.blocks, *dense, *kept) if x is not None)


def budget_bytes(store: EvictingStore, turn: int = 0) -> int:
    """What `decode_budget` tokens of every head take, dense or in pages; and pages of a turn of so many tokens."""
    assert store.key is not None and store.value is not None and store.pool is not None
    batch, heads, dense, _ = store.key.shape
    token = (store.key.shape[3] + store.value.shape[3]) * store.key.element_size()
    sinks, budget = store.method.sink_tokens, store.method.decode_budget
    assert budget is not None
    pages = (budget - dense - sinks) // PAGE + -(-turn // PAGE)
    return batch * heads * ((dense + sinks) * token + pages * store.pool.layout.record_bytes)


@pytest.mark.parametrize("codes", ["none", "fp8", "int4"])
def test_any_sequence_of_operations_stays_within_the_budget(codes, monkeypatch):
    names = ("prompt", "short", "token", "turn", "crop", "refused", "rows", "reset", "copy", "again", "in place")
    done = dict.fromkeys(names, 0)
    for seed in range(14):
        choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        options = {"sink_tokens": choose.choice((0, 3)), "recent_tokens": choose.choice((0, 5, 140))}
        options |= {"window": choose.choice((8, 200)), "kernel_size": choose.choice((1, 5))}
        options |= {"budget": choose.choice(("uniform", "adakv")), "decode_budget": choose.choice((560, 700))}
        method = KVEvict(**options, ratio=1.5, codes=codes)
        group = choose.choice((3, 7))
        statics = statics_of(HEADS, KEY_DIM) if codes == "int4" and choose.random() < 0.5 else {}
        starts = [choose.choice((0, 0, 3, 140)) for _ in range(choose.randint(1, 3))]
        store = EvictingStore(method, statics=statics, starts=starts)
        plain, noted = Plain(method, method.codec(statics), list(starts), group), Noted(monkeypatch)

        def some(count: int, batch: int, generator=generator, group=group) -> list[torch.Tensor]:
            shapes = ((HEADS, KEY_DIM), (HEADS, VALUE_DIM), (HEADS * group, KEY_DIM))
            return [torch.randn(batch, heads, count, dim, generator=generator) for heads, dim in shapes]

        def feed(
            one: EvictingStore, other: Plain, count: int, look=True, some=some, noted=noted, method=method
        ) -> None:
            key, value, query = some(count, len(other.starts))
            due = other.held_pages() > HEADS * method.decode_pages
            where = None if one.kept is None else one.kept.records.data_ptr()
            one.append(key, value)
            assert len(noted.chosen) == due
            if due:
                other.evict(noted.chosen.pop())
                done["again"] += 1
                done["in place"] += one.kept is not None and where == one.kept.records.data_ptr()
            past = other.tokens
            other.append(key, value, query)
            assert (one.tokens, one.coded, one.gone) == (other.tokens, other.coded, other.gone)
            assert used_bytes(one) <= budget_bytes(one, count if count > 1 else 0)
            one.observe(query, SCALING, None)
            if not look and not due:
                return
            out, _ = decode_attention(
                query,
                one.read(None if count == 1 else (key, value), count),
                scaling=SCALING,
                key_starts=torch.tensor(other.starts),
            )
            # Sums of FP32 over at most some thousand terms of order one.
            assert torch.allclose(out.double(), other.attend(query, other.tokens if count == 1 else past), 1e-4, 2e-5)

        for _ in range(9):
            operation = choose.choice(("token", "token", "turn", "crop", "rows", "reset", "copy"))
            if plain.tokens == 0:
                operation, count = choose.choice((("prompt", 900), ("short", 300)))
                key, value, query = some(count, len(starts))
                store.append(key, value)
                plain.append(key, value, query)
                if store.pending is not None:
                    with monkeypatch.context() as patched_one:
                        begin(store, plain, query, key, patched_one)
                else:
                    store.observe(query, SCALING, None)
            elif operation == "token":
                for left in reversed(range(choose.choice((1, 3, 140)))):
                    feed(store, plain, 1, left == 0)
            elif operation == "turn":
                feed(store, plain, choose.choice((2, 70, 300)))
            elif operation == "crop":
                count = choose.choice((1, 60, 400))
                if plain.tokens - count < plain.gone or count > plain.tokens:
                    with pytest.raises(ValueError, match="cannot be taken from a cache"):
                        store.crop(count)
                    operation = "refused"
                else:
                    store.crop(count)
                    plain.crop(count)
                    feed(store, plain, 20)
            elif operation == "rows":
                rows = [choose.randrange(len(plain.starts)) for _ in range(choose.randint(1, 3))]
                store.map_rows(lambda tensor, rows=rows: tensor[torch.tensor(rows)], rows)
                plain.rows(rows)
            elif operation == "reset":
                if choose.random() < 0.6:
                    continue
                store.forget()
                assert store.nbytes().total == 0
                starts = [0] * len(plain.starts)
                plain = Plain(method, method.codec(statics), list(starts), group)
            elif operation == "copy":
                feed(copy.deepcopy(store), copy.deepcopy(plain), 1)
            done[operation] += 1
    assert min(done.values()) >= 2, done


def begin(
    store: EvictingStore, plain: Plain, query: torch.Tensor, key: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt's own eviction, whose choice is the business of other tests."""
    from kompakt.compress import evicting

    original, found = evicting.kept_columns, []

    def kept_columns(*call: Any) -> Any:
        found.append(original(*call))
        return found[-1]

    monkeypatch.setattr(evicting, "kept_columns", kept_columns)
    store.look(query, key, scaling=SCALING, softcap=None, starts=list(plain.starts))
    ((columns, counts),) = found
    plain.kept = [[columns[r, h, :n].tolist() for h, n in enumerate(row)] for r, row in enumerate(counts)]
    plain.coded = plain.gone = store.gone
    most = HEADS * plain.method.decode_pages
    assert all(sum(-(-len(head) // PAGE) for head in row) <= most for row in plain.kept)


def model_of(family: str = "llama", **settings: Any) -> Any:
    return tiny(family, max_position_embeddings=2048, **settings)


def watch(model: Any, turn: int = 0) -> list[int]:
    """Checks after every pass with the cache that storage is within the budget; how many tokens there were each time.
    turn: the longest of several tokens.
    """
    seen: list[int] = []

    def check(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        for store in output[CACHE].evicting_layers:
            assert store.tokens < 600 or used_bytes(store) <= budget_bytes(store, turn)
        seen.append(output[CACHE].get_seq_length())

    model.register_forward_hook(check, with_kwargs=True)
    return seen


@pytest.mark.parametrize("name", METHODS)
def test_long_generations_stay_within_the_budget(name):
    """A left-padded batch, of which a row is short; what is reported is what is allocated."""
    method = METHODS[name]
    model = patched(model_of(), method)
    seen = watch(model)
    found = model.generate(
        LONG, attention_mask=MASK, return_dict_in_generate=True, max_new_tokens=340, min_new_tokens=340, **GREEDY
    )
    assert seen == list(range(700, 1040))
    for store in found[CACHE].evicting_layers:
        assert store.kept is not None and store.kept.row_pages == (3 * method.decode_pages,) * 3
        assert store.gone >= 896 and store.tokens == 1039
        tables = (
            [store.kept.table, store.kept.lengths]
            if store.queries is None
            else [store.kept.table, store.kept.lengths, store.queries.ring]
        )
        assert store.nbytes().total == used_bytes(store) + sum(x.nbytes for x in tables)
        lists = store.addresses
        assert lists is None or lists.numel() < 1000


def test_nothing_changes_before_there_is_too_much():
    model, tokens = model_of(), {"max_new_tokens": 60, "min_new_tokens": 60, **GREEDY}
    without = KVEvict(**SMALL, ratio=2.0, budget="uniform")
    wanted = patched(model, without).generate(LONG, attention_mask=MASK, **tokens)
    run_as_before(model)
    large = KVEvict(**SMALL, ratio=2.0, budget="uniform", decode_budget=2000)
    assert torch.equal(patched(model, large).generate(LONG, attention_mask=MASK, **tokens), wanted)


def test_a_short_prompt_is_evicted_from_when_it_has_grown():
    """Nothing of it is evicted in the end of its pass; its first tokens may go as any."""
    model = patched(model_of(), UNIFORM)
    seen = watch(model)
    found = model.generate(
        LONG[:2, :60], return_dict_in_generate=True, max_new_tokens=600, min_new_tokens=600, **GREEDY
    )
    assert seen[0] == 60 and seen[-1] == 659
    for store in found[CACHE].evicting_layers:
        assert store.kept is not None and store.gone == 640 and store.kept.counts == ((2 * PAGE,) * 3,) * 2


def test_scores_are_of_the_queries_that_the_model_made(monkeypatch):
    """Of a second turn and of single tokens after it, as they went into attention."""
    model, made, asked = patched(model_of(), UNIFORM), [], []
    run, score = hf_attention.run_cached, evicting_again.again_scores

    def run_cached(layer: Any, former: str, module: Any, call: Any, kwargs: Any) -> Any:
        made.append((module.layer_idx, call[0].clone()))
        return run(layer, former, module, call, kwargs)

    def again_scores(last: Any, *others: Any) -> Any:
        asked.append(last)
        return score(last, *others)

    monkeypatch.setattr(hf_attention, "run_cached", run_cached)
    monkeypatch.setattr(evicting_again, "again_scores", again_scores)
    cache = CompressedCache(model.config, UNIFORM)
    model(LONG, attention_mask=MASK, **{CACHE: cache})
    mask = MASK
    for count in (200, *[1] * 6):
        mask = torch.cat((mask, mask.new_ones(3, count)), dim=1)
        model(LONG[:, :count], attention_mask=mask, **{CACHE: cache})
    # The turn is more than there is room for, which the first token after it finds, and the fifth has coded a page.
    assert len(asked) == 4
    for index, last in enumerate(asked):
        queries = torch.cat([query for layer, query in made if layer == index % 2], dim=2)
        first = (884, 888)[index // 2]
        assert last.columns.tolist() == list(range(first, first + 16)) and last.scaling == 32**-0.5
        assert torch.equal(last.query, queries[:, :, first - 700 : first - 684])
        assert last.starts.tolist() == [0, 37, 300]


@pytest.mark.parametrize("name", ["uniform", "adakv"])
def test_recorded_steps_give_the_same_tokens(name, monkeypatch, caplog):
    """Across several evictions; once pages are as many as there is room for, what was recorded stays valid."""
    model, many = patched(model_of(), METHODS[name]), {**GREEDY, "max_new_tokens": 350, "min_new_tokens": 350}
    options = {"attention_mask": MASK, "return_dict_in_generate": True, **many}
    wanted = model.generate(LONG, disable_compile=True, **options)
    log_fallback.cache_clear()
    where, times = set(), []
    original = EvictingStore.replace_pages

    def replace_pages(store: EvictingStore, kept: Any) -> None:
        original(store, kept)
        times.append((store.tokens, store.following is not None))
        where.add(kept.records.data_ptr())

    monkeypatch.setattr(EvictingStore, "replace_pages", replace_pages)
    with everywhere(model), caplog.at_level(logging.WARNING):
        found = model.generate(LONG, **options)
        assert steps_of(model).plain == 349
    assert torch.equal(found.sequences, wanted.sequences)
    assert "single launches" not in caplog.text
    last = max(tokens for tokens, _ in times)
    assert last >= 1030 and all(stays for tokens, stays in times if tokens == last)
    for store in found[CACHE].evicting_layers:
        assert store.following is not None and store.following.tolist()[3] == store.gone


@pytest.mark.gpu
@pytest.mark.parametrize("codes", ["none", "int4", "fp8"])
@pytest.mark.parametrize("budget", ["uniform", "adakv"])
def test_graphs_give_the_same_tokens(budget, codes, monkeypatch):
    """Through the kernel, without the norms that are rounded in another order; recorded anew only while pages grow."""
    from contextlib import nullcontext

    from kompakt.compress import hf_capture

    skip_below(FP8_CAPABILITY)
    monkeypatch.setattr(hf_capture, "fused_on", lambda device, model: nullcontext())
    model = model_of().to("cuda", torch.bfloat16)
    patched(model, KVEvict(**SMALL, ratio=2.0, budget=budget, codes=codes, decode_budget=560))
    many: dict[str, Any] = {"max_new_tokens": 900, "min_new_tokens": 900, "do_sample": False}
    ids, mask = LONG[:2].cuda(), MASK[:2].cuda()
    wanted = model.generate(ids, attention_mask=mask, disable_compile=True, **many)
    assert torch.equal(model.generate(ids, attention_mask=mask, **many), wanted)
    steps = steps_of(model)
    assert steps.plain + steps.recorded + steps.replayed == 899 and steps.recorded <= 4


@pytest.mark.parametrize("family", ["qwen2", "gpt_oss"])
def test_other_families_generate_within_the_budget(family):
    settings = {"layer_types": ["full_attention"] * 2} if family == "gpt_oss" else {}
    model = patched(model_of(family, **settings), UNIFORM)
    assert len(watch(model)) == 0
    found = model.generate(LONG[:1], return_dict_in_generate=True, max_new_tokens=150, min_new_tokens=150, **GREEDY)
    assert all(store.gone > 700 for store in found[CACHE].evicting_layers)


def test_beams_and_further_turns_stay_within_the_budget():
    model = patched(model_of(), UNIFORM)
    seen = watch(model, turn=300)
    options: dict[str, Any] = {"max_new_tokens": 150, "min_new_tokens": 150, "return_dict_in_generate": True, **GREEDY}
    beams = model.generate(LONG[:1], num_beams=3, **options)
    assert all(store.gone > 700 for store in beams[CACHE].evicting_layers)
    first = model.generate(LONG[:1], **options)
    turn = torch.cat((first.sequences, LONG[1:2, :300]), dim=1)
    second = model.generate(turn, attention_mask=torch.ones_like(turn), **{**options, CACHE: first[CACHE]})
    assert second.sequences.shape[1] == 1300 and seen[-1] == 1299
    assert all(store.tokens - store.gone <= 8 + 2 * PAGE for store in second[CACHE].evicting_layers)


def test_what_cannot_be_kept_to_is_named():
    with pytest.raises(ValueError, match=r"decode_budget is 400; 260 tokens are dense .* give 516 or more"):
        KVEvict(ratio=2.0, decode_budget=400)
    for more in ({"ratio": 2.0, "budget": "global", "scores": "kvzip"}, {"budget": "threshold", "threshold": 0.1}):
        with pytest.raises(ValueError, match=f"budget {more['budget']} has none for a layer: take budget adakv"):
            KVEvict(decode_budget=4000, **more)
    with pytest.raises(ValueError, match="tokens is 900 and decode_budget 800; what a prompt keeps must not be more"):
        KVEvict(tokens=900, decode_budget=800)
    assert KVEvict(ratio=2.0, scores="kvzip", decode_budget=800, window=16, kernel_size=7).window == 16
    with pytest.raises(ValueError, match="window is for scores snapkv or expected; scores is kvzip"):
        KVEvict(ratio=2.0, scores="kvzip", window=16)
    store = EvictingStore(UNIFORM)
    store.append(torch.randn(1, 2, 300, 8), torch.randn(1, 2, 300, 8))
    store.append(torch.randn(1, 2, 300, 8), torch.randn(1, 2, 300, 8))
    with pytest.raises(ValueError, match="more than decode_budget's 560 tokens are held, and the last queries"):
        store.append(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
    assert store.tokens == 600 and store.kept is None


def test_queries_that_nobody_saw_are_named():
    """Masks of the caller's own go another way, which tells the cache nothing."""
    model = patched(model_of(), UNIFORM)
    cache = CompressedCache(model.config, UNIFORM)
    model(LONG[:1, :340], **{CACHE: cache})
    own = torch.zeros(1, 1, 330, 670)
    own.masked_fill_(torch.ones(330, 670).triu(341).bool(), torch.finfo(torch.float32).min)
    model(LONG[:1, :330], attention_mask=own, **{CACHE: cache})
    with pytest.raises(
        ValueError, match="are not known: the caller gives a mask of its own; a cache that evicts needs"
    ):
        model(LONG[:1, :1], **{CACHE: cache})


def test_unpatching_takes_every_hook_away():
    model = model_of()
    run_as_before(patched(model, UNIFORM))
    assert not model.model._forward_pre_hooks and not model.model._forward_pre_hooks_with_kwargs
    assert not model.model._forward_hooks


def test_queries_of_tokens_that_were_taken_back_are_not_asked(monkeypatch):
    """They have taken the places of earlier ones in the ring; those behind them are what they were."""
    method = KVEvict(sink_tokens=2, recent_tokens=0, window=100, ratio=2.0, decode_budget=560)
    store, asked = EvictingStore(method), []
    score = evicting_again.again_scores

    def again_scores(last: Any, *others: Any) -> Any:
        asked.append(last)
        return score(last, *others)

    monkeypatch.setattr(evicting_again, "again_scores", again_scores)
    query = torch.randn(1, 6, 390, 8)
    for start, stop in ((0, 300), (300, 383), (383, 390)):
        key = torch.randn(1, 2, stop - start, 8)
        store.append(key, key)
        store.observe(query[:, :, start:stop], SCALING, None)
    store.crop(3)
    store.append(key, key)
    (last,) = asked
    assert last.columns.tolist() == list(range(290, 387)) and torch.equal(last.query, query[:, :, 290:387])
