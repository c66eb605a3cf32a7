"""The store of one layer: whatever is done to it, it holds what a plain list of the same tokens holds, coded alike."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import pytest
import torch
from decode_cases import statics_of
from pq_cases import pq_statics

from kompakt.compress import cache as cache_module
from kompakt.compress.cache import CODED_AT_ONCE, TokenStore, steady_runs
from kompakt.kernels.decode_attention import CompressedKV, dequantized
from kompakt.kernels.kv_codec import Codec
from kompakt.kernels.kv_pages import PAGE
from kompakt.quant.kv_fp8 import KVFP8
from kompakt.quant.kv_int4 import KVINT4
from kompakt.quant.kv_pq import KVPQ
from kompakt.quant.method import KVCacheMethod
from kompakt.sparsify.kv_prune import KVPrune

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, KEY_DIM, VALUE_DIM = 2, 6, 4


@dataclass
class Plain:
    """A cache as lists: every token's key and value as they came, how many are coded, and where rows start."""

    method: KVCacheMethod
    codec: Codec
    key: torch.Tensor
    value: torch.Tensor
    starts: list[int]
    coded: int = 0

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.key, self.value = torch.cat((self.key, key), 2), torch.cat((self.value, value), 2)
        while self.key.shape[2] - (self.coded // PAGE + 1) * PAGE >= self.method.recent_tokens:
            self.coded = (self.coded // PAGE + 1) * PAGE

    def crop(self, count: int) -> None:
        length = self.key.shape[2] - count
        self.key, self.value = self.key[:, :, :length], self.value[:, :, :length]
        self.coded = min(self.coded, length)

    def rows(self, chosen: list[int]) -> None:
        self.key, self.value = self.key[chosen], self.value[chosen]
        self.starts = [self.starts[row] for row in chosen]

    def content(self, coded: int) -> list[torch.Tensor]:
        found = []
        for dense, coded_ in zip((self.key, self.value), self.codec.rounded(self.key, self.value), strict=True):
            found.append(coded_.clone())
            found[-1][:, :, coded:] = dense[:, :, coded:]
            for row, start in enumerate(self.starts):
                place = slice(start, start + self.method.sink_tokens)
                found[-1][row, :, place] = dense[row, :, place]
        return found


def some(batch: int, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    key = torch.randn(batch, HEADS, count, KEY_DIM, generator=generator)
    return key, torch.randn(batch, HEADS, count, VALUE_DIM, generator=generator)


def ring_matches(seen: CompressedKV) -> bool:
    """Whether every dense column is in the ring at its place."""
    assert seen.ring is not None
    columns = torch.arange(max(seen.first, seen.coded), seen.tokens)
    dense = [torch.cat(parts, 2) for parts in zip(*seen.dense, strict=True)]
    return all(torch.equal(x[:, :, columns % x.shape[2]], wanted) for x, wanted in zip(seen.ring, dense, strict=True))


def append_and_compare(store: TokenStore, plain: Plain, count: int, generator: torch.Generator) -> None:
    """Appends to both; what the new tokens' queries see is equal: bit for bit, and where codes go through a matrix,
    whose sums depend on how many tokens go through at once, to the last bits."""
    key, value = some(plain.key.shape[0], count, generator)
    past, before = plain.key.shape[2], plain.coded
    seen = store.extend(key, value)
    plain.append(key, value)
    assert (store.tokens, store.coded) == (plain.key.shape[2], plain.coded)
    if past == 0:
        assert seen is None
        seen = store.read((key, value), count)
    assert seen is not None and store.looked_at == seen.coded
    assert count > 64 or ring_matches(seen)
    first = 0 if store.window is None else max(0, past - store.window + 1)
    assert (seen.first, seen.tokens) == (first, past + count)
    expected = plain.content(plain.coded if count == 1 else before)
    for got, wanted in zip(dequantized(seen, torch.float32), expected, strict=True):
        if isinstance(store.method, KVPQ):
            assert torch.allclose(got, wanted[:, :, first:], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(got, wanted[:, :, first:])


@pytest.mark.parametrize("window", [None, 3, 150, 400])
@pytest.mark.parametrize("method", [KVFP8, KVINT4, KVPQ, KVPrune])
def test_any_sequence_of_operations_gives_the_same_tokens(method, window):
    done = dict.fromkeys(("append", "crop", "rows", "repeat", "reset"), 0)
    for seed in range(16 if method is KVPQ else 100):
        choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        options = {"sink_tokens": choose.choice((0, 4, 9)), "recent_tokens": choose.choice((0, 1, 5, 128, 150))}
        if method is KVPrune:
            options |= {"values": choose.choice(("bf16", "fp8", "int4")), "key_sparsity": choose.choice((0.0, 0.5))}
        made = method(**options)
        statics = statics_of(HEADS, KEY_DIM) if method is KVINT4 and choose.random() < 0.7 else {}
        if method is KVPQ:
            statics = pq_statics(HEADS, KEY_DIM, VALUE_DIM)
        if method is KVPrune:
            statics = {"query_weight": torch.rand(HEADS, KEY_DIM, generator=generator)}
        starts = [choose.choice((0, 0, 3, 127, 140)) for _ in range(choose.randint(1, 3))]
        store = TokenStore(made, statics=statics, window=window, starts=starts)
        store.recording = recording = choose.random() < 0.5
        plain = Plain(made, made.codec(statics), *some(len(starts), 0, generator), starts=list(starts))
        for _ in range(9):
            operation = choose.choice(("append", "append", "append", "crop", "rows", "repeat", "reset"))
            length = plain.key.shape[2]
            if operation == "append":
                append_and_compare(store, plain, choose.choice((1, 1, 2, 60, 129, 300)), generator)
            elif operation == "crop":
                count = choose.choice((0, 1, 7, min(140, length)))
                possible = window is None or count == 0 or max(0, length - count - window + 1) >= store.kept_from
                if count <= length and possible:
                    store.crop(count)
                    plain.crop(count)
                elif recording and window is not None and count <= length:
                    assert length - count < store.kept_from + window - 1
            elif operation == "rows":
                rows = [choose.randrange(len(plain.starts)) for _ in range(choose.randint(1, 4))]
                store.map_rows(lambda tensor, rows=rows: tensor[torch.tensor(rows)], rows)
                plain.rows(rows)
            elif operation == "repeat" and len(plain.starts) < 4:
                rows = [row for row in range(len(plain.starts)) for _ in range(2)]
                store.map_rows(lambda tensor: tensor.repeat_interleave(2, 0), rows)
                plain.rows(rows)
            elif operation == "reset" and choose.random() < 0.3 and length:
                batch = len(plain.starts)
                store.forget()
                plain = Plain(made, made.codec(statics), *some(batch, 0, generator), starts=[0] * batch)
            else:
                continue
            done[operation] += 1
        other, same = copy.deepcopy(store), copy.deepcopy(plain)
        append_and_compare(other, same, 1, generator)
        if not recording and window is not None:
            assert len(store.pages) * PAGE <= window + 300 + 2 * PAGE
    assert min(done.values()) > (0 if method is KVPQ else 5), done


def test_long_prompt_and_single_tokens_code_the_same():
    generator = torch.Generator().manual_seed(0)
    key, value = some(2, 1000, generator)
    at_once, one_by_one = TokenStore(KVINT4()), TokenStore(KVINT4())
    at_once.append(key, value)
    for index in range(1000):
        one_by_one.append(key[:, :, index : index + 1], value[:, :, index : index + 1])
    assert at_once.coded == one_by_one.coded == 768
    for got, wanted in zip(
        dequantized(at_once.read(None, 1), torch.float32),
        dequantized(one_by_one.read(None, 1), torch.float32),
        strict=True,
    ):
        assert torch.equal(got, wanted)


def test_bytes_are_those_of_allocated_storage():
    store = TokenStore(KVINT4(sink_tokens=4, recent_tokens=128))
    assert store.nbytes().total == 0
    x = torch.randn(2, 3, 1000, 64, dtype=torch.bfloat16)
    store.append(x, x)
    sizes = store.nbytes()
    pages, vectors = 768 // PAGE, 2 * 2 * 3
    assert sizes.codes == pages * PAGE * vectors * 32
    assert sizes.scales == pages * PAGE * vectors * 4
    assert sizes.dense == (128 + PAGE + 4) * vectors * 64 * 2
    assert store.pool is not None
    tensors = [*store.pool.blocks, store.key, store.value, store.sink_key, store.sink_value]
    assert sizes.total == sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert 8 * (sizes.codes + sizes.scales) / store.page_elements == 4.5


def test_pages_are_found_by_their_addresses():
    store, x = TokenStore(KVINT4()), torch.randn(2, 3, 700, 8)
    store.append(x, x)
    before = store.table().tolist()
    copied = copy.deepcopy(store)
    copied.append(x[:, :, :300], x[:, :, :300])
    copied.map_rows(lambda tensor: tensor[[1, 0, 1]], [1, 0, 1])
    for one in (store, copied):
        assert one.table().tolist() == [one.pages[number].key_codes.data_ptr() for number in range(one.coded // PAGE)]
    assert store.table().tolist() == before
    assert not set(before) & set(copied.table().tolist())
    copied.crop(600)
    assert len(copied.table()) == -(-copied.coded // PAGE)


def test_no_token_is_moved_once_it_is_coded():
    store = TokenStore(KVFP8(recent_tokens=0))
    x = torch.randn(1, 1, 300, 8)
    store.append(x, x)
    places = {number: page.key_codes.data_ptr() for number, page in store.pages.items()}
    for _ in range(300):
        store.append(x[:, :, :1], x[:, :, :1])
    assert {number: store.pages[number].key_codes.data_ptr() for number in places} == places


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda store, x: store.append(x[:1], x[:1]), "made for a batch of 2, and 1 rows come"),
        (lambda store, x: store.append(x[:, :2], x[:, :2]), "holds 2 rows of 3 KV heads"),
        (lambda store, x: store.append(x[..., :4], x[..., :4]), "do not go with them"),
        (lambda store, x: store.append(x.half(), x.half()), "do not go with them"),
        (lambda store, x: store.append(x, x[:, :, :1]), "are not of the same tokens"),
        (lambda store, x: store.append(x.repeat(1, 1, 9, 1), x.repeat(1, 1, 9, 1)), "100 tokens exceed"),
        (lambda store, x: store.crop(11), "11 tokens cannot be taken from a cache of 10"),
        (lambda store, x: store.crop(-1), "-1 tokens cannot be taken"),
    ],
)
def test_mistakes_are_named_and_change_nothing(change, says):
    store, x = TokenStore(KVFP8(max_tokens=99)), torch.randn(2, 3, 10, 8)
    store.append(x, x)
    before = dequantized(store.read(None, 1), torch.float32)
    with pytest.raises(ValueError) as caught:
        change(store, x)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    after = dequantized(store.read(None, 1), torch.float32)
    assert store.tokens == 10
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_factors_of_another_model_and_a_batch_of_another_size_are_refused():
    x = torch.randn(2, 3, 10, 8)
    with pytest.raises(ValueError, match="calibrated for 3 KV heads of 6 channels, and 3 of 8 come"):
        TokenStore(KVINT4(), statics=statics_of(3, 6)).append(x, x)
    with pytest.raises(ValueError, match="made for a batch of 3, and 2 rows come"):
        TokenStore(KVFP8(), starts=[0, 1, 2]).append(x, x)
    with pytest.raises(ValueError, match="head_dim 7 is odd"):
        TokenStore(KVINT4()).append(x[..., :7], x[..., :7])


def test_a_window_that_was_left_cannot_be_cropped_into():
    store, x = TokenStore(KVFP8(recent_tokens=0), window=20), torch.randn(1, 1, 300, 8)
    store.append(x, x)
    with pytest.raises(ValueError, match="has dropped what it would see after 5 of its 300 tokens"):
        store.crop(5)
    store.recording = True
    store.append(x[:, :, :30], x[:, :, :30])
    store.crop(30)
    assert store.tokens == 300


def test_numbers_for_the_device_are_runs_of_equal_steps():
    assert steady_runs([]) == [] and steady_runs([7]) == [(7, 0, 1)]
    assert steady_runs([0, 0, 0, 100, 148, 196, 50]) == [(0, 0, 3), (100, 48, 3), (50, 0, 1)]
    for first, step, count in steady_runs([5, 3, 1, 1, 2]):
        assert count > 0 and isinstance(first + step, int)
    numbers = [5, 3, 1, 1, 2, 9, 2**60, 2**60 + 17408]
    assert [first + step * index for first, step, count in steady_runs(numbers) for index in range(count)] == numbers


def test_a_long_prompt_is_coded_in_whole_portions(monkeypatch):
    """As many calls as portions, not as pages."""
    calls = []
    monkeypatch.setattr(cache_module, "write_tokens", lambda key, value, columns, pages: calls.append(columns))
    store = TokenStore(KVFP8(recent_tokens=10))
    tokens = 2 * CODED_AT_ONCE * 128 + 128 * 3 + 50
    x = torch.zeros(1, 1, tokens, 16)
    store.append(x, x)
    portion = CODED_AT_ONCE * 128
    assert calls == [(0, portion), (portion, 2 * portion), (2 * portion, 2 * portion + 384)]
    assert (store.tokens, store.coded, len(store.pages)) == (tokens, 2 * portion + 384, 2 * CODED_AT_ONCE + 3)
    assert store.table().tolist() == [store.pool.address(store.slots[number]) for number in range(len(store.pages))]
