"""The kernels that write, append to and read pruned pages against their references, bit for bit."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import BF16, FP16, FP32, same_bits, skip_below
from prune_cases import hard_pair
from torch import Tensor

from kompakt.compress.cache import TokenStore
from kompakt.kernels.activations import FP8_CAPABILITY
from kompakt.kernels.kv_append import LENGTHS, append_token
from kompakt.kernels.kv_pages import PAGE, Pages, read_ref, read_tokens, write_ref, write_tokens
from kompakt.kernels.kv_prune import PruneCodec, Values
from kompakt.sparsify.kv_prune import KVPrune

KERNEL = "kompakt.kernels.kv_prune_triton"


@dataclass(frozen=True)
class WriteCase:
    """columns: to be written. ring: tokens of a ring of so many, 0 for tokens in order."""

    values: Values = "bf16"
    dims: tuple[int, int] = (24, 40)
    columns: tuple[int, int] = (0, 128)
    ring: int = 0
    dtype: torch.dtype = BF16
    batch: int = 1
    weights: bool = True
    sparsity: float = 0.5

    def make(self, device: str) -> tuple[Tensor, Tensor, Pages, Tensor]:
        """key, value, pages full of noise, and the records they are views of."""
        start, stop = self.columns
        weight = torch.rand(2, self.dims[0], generator=torch.Generator().manual_seed(5)) if self.weights else None
        codec = PruneCodec(self.sparsity, 0.7, self.values, weight).to(torch.device(device))
        layout = codec.layout(*self.dims)
        key, value = hard_pair((self.batch, 2, self.ring or stop - start), self.dims)
        generator = torch.Generator().manual_seed(4)
        shape = (-(-stop // PAGE), self.batch, 2, layout.record_bytes)
        records = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
        pages, table = pages_of(records, codec, self.dims)
        return (
            key.to(device, self.dtype),
            value.to(device, self.dtype),
            Pages(layout, pages, lambda: table, codec),
            records,
        )


def pages_of(records: Tensor, codec: PruneCodec, dims: tuple[int, int]):
    layout = codec.layout(*dims)
    pages = {number: layout.page(record) for number, record in enumerate(records)}
    return pages, torch.tensor([record.data_ptr() for record in records], device=records.device)


CASES = {
    "plain": WriteCase(),
    "fp8": WriteCase(values="fp8"),
    "int4": WriteCase(values="int4"),
    "without weights": WriteCase(weights=False, dims=(64, 33), sparsity=0.7),
    "one token": WriteCase(values="fp8", columns=(130, 131), dims=(4, 4)),
    "over pages": WriteCase(columns=(40, 160), dims=(4, 8), batch=2),
    "int4 over pages": WriteCase(values="int4", columns=(40, 160), dims=(6, 70)),
    "ring": WriteCase(columns=(190, 256), ring=129, dtype=FP16, dims=(8, 8)),
    "fp32": WriteCase(dims=(20, 18), columns=(10, 128), dtype=FP32, sparsity=0.0),
    "everything kept": WriteCase(values="int4", dims=(6, 10), columns=(1, 128), sparsity=0.0),
}


def check_write(case: WriteCase, *, interpret: bool, device: str = "cpu") -> None:
    key, value, pages, records = case.make(device)
    wanted = records.clone()
    assert isinstance(pages.codec, PruneCodec)
    other, table = pages_of(wanted, pages.codec, case.dims)
    write_ref(key, value, case.columns, Pages(pages.layout, other, lambda: table, pages.codec), ring=case.ring > 0)
    write_tokens(key, value, case.columns, pages, ring=case.ring > 0, interpret=interpret)
    for number, page in other.items():
        mine = pages.pages[number]
        for decode, got, expected in zip(
            (pages.codec.decode_keys, pages.codec.decode_values), mine.read(), page.read(), strict=True
        ):
            # Which of NaN's bits are stored is up to a device.
            assert torch.equal(got[0] >= 0, expected[0] >= 0) and same_bits(decode(got), decode(expected))
        assert same_bits(mine.key_parameters, page.key_parameters)
        assert same_bits(mine.value_parameters, page.value_parameters)


def check_read(case: WriteCase, *, interpret: bool, device: str = "cpu") -> None:
    key, value, pages, _ = case.make(device)
    write_ref(key, value, case.columns, pages, ring=case.ring > 0)
    shape = (case.batch, 2, case.columns[1] - case.columns[0] + 5)
    found, wanted = ([torch.full((*shape, dim), 7.0, device=device) for dim in case.dims] for _ in "ab")
    read_tokens(*found, case.columns, pages, interpret=interpret)
    read_ref(*wanted, case.columns, pages)
    assert all(same_bits(got, expected) for got, expected in zip(found, wanted, strict=True))
    assert wanted[0].isnan().any() == (shape[2] > 20)


READ = ("plain", "fp8", "int4", "over pages", "int4 over pages", "everything kept")


def check_append(values: Values, recent: int, crop: int, *, interpret: bool, device: str = "cpu") -> None:
    """Some tokens behind 300, less `crop`, with the lengths on the device."""
    method = KVPrune(values=values, recent_tokens=recent)
    statics = {"query_weight": torch.rand(2, 16, generator=torch.Generator().manual_seed(1))}
    store = TokenStore(method, statics=statics, starts=[0, 3])
    key, value = (x.to(device, FP16) for x in hard_pair((2, 2, 400), (16, 8)))
    store.append(key[:, :, :300], value[:, :, :300])
    if crop:
        store.crop(crop)
    start = store.tokens
    wanted = copy.deepcopy(store)
    lengths = torch.zeros(LENGTHS, dtype=torch.int32, device=device)
    store.follow(lengths)
    for index in range(300, 300 + 10):
        new = key[:, :, index : index + 1], value[:, :, index : index + 1]
        wanted.append(*new)
        store.make_room()
        append_token(*new, store.appendable(), interpret=interpret)
        store.advance()
        assert lengths.tolist() == [wanted.tokens, wanted.coded, 0, 0] and store.coded == wanted.coded
    assert start // PAGE < store.coded // PAGE
    for number, page in wanted.pages.items():
        for mine, theirs in zip(store.pages[number].read(), page.read(), strict=True):
            count = min(PAGE, store.coded - number * PAGE)
            assert torch.equal(mine[0][:, :, :count] >= 0, theirs[0][:, :, :count] >= 0)
            a, b = (store.codec.decode_values((codes, parameters)) for codes, parameters in (mine, theirs))
            assert same_bits(a[:, :, :count], b[:, :, :count])
    mine, theirs = ([*one.ring(one.coded, one.tokens), (one.sink_key, one.sink_value)] for one in (store, wanted))
    assert len(mine) == len(theirs)
    for pair in zip(mine, theirs, strict=True):
        assert all(same_bits(got, expected) for got, expected in zip(*pair, strict=True))


INTERPRETER_CASES = {
    f"write, {name}": functools.partial(check_write, case, interpret=True) for name, case in CASES.items()
}
INTERPRETER_CASES |= {f"read, {name}": functools.partial(check_read, CASES[name], interpret=True) for name in READ}
INTERPRETER_CASES |= {
    "append": functools.partial(check_append, "bf16", 5, 45, interpret=True),
    "append, nothing stays dense": functools.partial(check_append, "int4", 0, 50, interpret=True),
    "append, cut into a page": functools.partial(check_append, "fp8", 0, 48, interpret=True),
}
MUTATIONS = {
    "weights": ("score = size * tl.load", "score = size + 0 * tl.load", "write, plain"),
    "weights of a head": ("weight_ptr + head * DIM", "weight_ptr + 0 * head", "write, plain"),
    "damaged channels": ("bitcast=True), INFINITE_BITS)", "bitcast=True), 0)", "write, without weights"),
    "number kept": ("room = KEPT - tl.sum", "room = KEPT + 1 - tl.sum", "write, plain"),
    "first of equal ones": ("number <= room", "number < room", "write, plain"),
    "all bits": ("for step in tl.range(31)", "for step in tl.range(14)", "write, plain"),
    "bits of a word": ("1 << (channel % 32)", "1 << (channel % 31)", "write, without weights"),
    "rows of values": ("tl.int16)) + token[:, None] * KEPT", "tl.int16)) + token[:, None] * (KEPT - 4)",
                       "write, plain"),
    "rounding": ("bits + 0x7FFF", "bits + 0x6FFF", "write, fp32"),
    "scale of fp8": ("codes_of(x, keep", "codes_of(2.0 * x, keep", "write, fp8"),
    "levels": ("-LEVELS_), LEVELS_)", "-LEVELS_ - 1), LEVELS_ - 1)", "write, int4"),
    "second of a byte": ("codes << (place & 1) * 4", "codes << (place & 1) * 3", "write, int4"),
    "damaged int4": ("tl.where(damaged, float(\"nan\"), scale)", "scale", "write, int4"),
    "tokens that stay": ("write = (column >= start) & (column < stop)", "write = column < stop", "write, one token"),
    "ring": ("source = column % length", "source = column - start", "write, ring"),
    "parts of a page": ("tl.program_id(2) % PARTS_ * TOKENS", "tl.program_id(2) % 1 * TOKENS", "write, plain"),
    "place read": ("tl.cumsum(bit, axis=1) - 1", "tl.cumsum(bit, axis=1)", "read, plain"),
    "scale read": ("x = code.to(tl.float32) * scale[:, None]", "x = code.to(tl.float32)", "read, int4"),
    "fp8 read": ("other=0.0).to(tl.float32) * scale", "other=0.0).to(tl.float32) * 2 * scale", "read, fp8"),
    "newest token": ("tl.where((column == tokens)[:, None], token", "tl.where((column < 0)[:, None], token",
                     "append, nothing stays dense"),
    "when a page is due": (">= recent_tokens:", "> recent_tokens:", "append"),
    "what was coded stays": ("write = column >= coded", "write = column >= 0", "append, cut into a page"),
    "last program": ("tl.num_programs(0) * tl.num_programs(1) - 1", "tl.num_programs(0) - 1", "append"),
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel_in_interpreter(name):
    assert interpreter_results(__file__)[name] == ""


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kernel_on_gpu(name):
    skip_below(FP8_CAPABILITY)
    check_write(CASES[name], interpret=False, device="cuda")
    if name in READ:
        check_read(CASES[name], interpret=False, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("values", "recent", "crop"), [("bf16", 5, 45), ("int4", 0, 50), ("fp8", 0, 48)])
def test_append_on_gpu(values, recent, crop):
    skip_below(FP8_CAPABILITY)
    check_append(values, recent, crop, interpret=False, device="cuda")
