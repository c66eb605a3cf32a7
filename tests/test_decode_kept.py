"""The kernel over what heads have kept of evicted tokens against its reference; see `decode_cases.py`."""

import functools
import importlib
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
from decode_cases import DecodeCase, check_decode, statics_of
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import BF16, FP16, fill_poison, poisoned, skip_below

from kompakt.compress.evicting import EvictingStore
from kompakt.compress.kv_evict import KVEvict
from kompakt.kernels.activations import FP8_CAPABILITY
from kompakt.kernels.decode_attention import (
    MAX_ROWS,
    Reading,
    decode_attention,
    decode_ref,
    decode_refusal,
    run_decode,
)
from kompakt.kernels.kv_codec import PAGE
from kompakt.kernels.kv_kept import Runs

KERNEL = "kompakt.kernels.decode_attention_triton"
PARTS = [f"kompakt.kernels.decode_{part}_triton" for part in ("ends", "dense", "codes")]


@dataclass(frozen=True)
class KeptCase(DecodeCase):
    """lengths: of the prompt that is evicted from, of what comes then, and of the queries. pages: of every KV head of
    every row in turn, as often as needed. rows: which rows are left in the end.
    """

    lengths: tuple[int, ...] = (700, 1)
    pages: tuple[int, ...] = (3, 1, 0, 4)
    rows: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=lambda: {"recent_tokens": 40, "sink_tokens": 4})

    def store(self, device: str) -> EvictingStore:
        """An evicting cache with all but the queries."""
        codes = "none" if self.kind == "bf16" else self.kind
        kv_heads, batch = self.heads[1], len(self.starts)
        statics = statics_of(kv_heads, self.dims[0]) if self.kind == "int4" and self.mapped else None
        store = EvictingStore(
            KVEvict(tokens=300, codes=codes, **self.options), statics=statics, starts=list(self.starts)
        )
        store.append(*self.tokens(self.lengths[0], 0, device))
        assert store.pending is not None
        generator = torch.Generator().manual_seed(3)
        store.scores = torch.rand(batch, kv_heads, self.lengths[0], generator=generator).to(device)
        turn = iter(self.pages * (batch * kv_heads))
        store.evict([[next(turn) for _ in range(kv_heads)] for _ in range(batch)])
        for index, count in enumerate(self.lengths[1:-1], 1):
            store.append(*self.tokens(count, index, device))
        if self.rows:
            store.map_rows(lambda tensor: tensor[torch.tensor(self.rows, device=tensor.device)], list(self.rows))
        return store

    def tokens(self, count: int, seed: int, device: str, batch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values; those of padding NaN."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch or len(self.starts), self.heads[1], count)
        key, value = (torch.randn(*shape, dim, generator=generator) for dim in self.dims)
        if self.hard == "uneven":
            value *= torch.logspace(-6, 4, count)[torch.randperm(count, generator=generator)][:, None]
        for row, start in enumerate(self.starts if seed == 0 else ()):
            key[row, :, :start] = value[row, :, :start] = torch.nan
        return key.to(device, self.dtype), value.to(device, self.dtype)

    def make(self, device: str = "cpu"):
        """See `DecodeCase.make`."""
        torch.manual_seed(1)
        with mock.patch("torch.empty", bad_bytes):
            store = self.store(device)
            queries, batch = self.lengths[-1], len(self.rows or self.starts)
            new = self.tokens(queries, 99, device, batch)
            store.append(*new)
        kv = store.read(new if queries > 1 else None, queries)
        query = torch.randn(batch, self.heads[0], queries, self.dims[0]).to(device, self.dtype)
        sinks = torch.randn(self.heads[0]).to(device) if self.sinks else None
        begin = torch.tensor(store.starts, device=device)
        call = Reading(self.scaling or self.dims[0] ** -0.5, None, self.softcap)
        return query, kv, call, sinks, begin if begin.any() else None


def bad_bytes(*args: Any, **kwargs: Any) -> torch.Tensor:
    """As `fill_poison`, and NaN in bytes that are FP8."""
    found = fill_poison(*args, **kwargs)
    return found.fill_(255) if found.dtype == torch.uint8 else found


CASES = {
    "plain": KeptCase(),
    "grouped 9/3": KeptCase(heads=(9, 3), starts=(0, 37)),
    "grouped 14/2": KeptCase(heads=(14, 2), starts=(0, 0)),
    "grouped 32/8": KeptCase(heads=(32, 8)),
    "several queries": KeptCase(heads=(9, 3), starts=(0, 130), lengths=(700, 30, 5)),
    "16 queries": KeptCase(heads=(8, 2), lengths=(700, 16)),
    "padding": KeptCase(starts=(0, 3, 130, 400)),
    "nothing kept": KeptCase(pages=(0,)),
    "all kept": KeptCase(pages=(9,)),
    "coded tokens behind": KeptCase(lengths=(650, 300, 200, 1), starts=(0, 37)),
    "coded tokens behind at once": KeptCase(lengths=(650, 400, 3), options={"recent_tokens": 0, "sink_tokens": 4}),
    "no sinks": KeptCase(options={"recent_tokens": 20, "sink_tokens": 0}),
    "many sinks": KeptCase(starts=(0, 50), options={"recent_tokens": 20, "sink_tokens": 70}),
    "softcap": KeptCase(softcap=3.0),
    "sink logits": KeptCase(sinks=True, starts=(0, 390)),
    "everything": KeptCase(sinks=True, softcap=4.0, heads=(9, 3), starts=(0, 150), lengths=(700, 300, 3)),
    "no map of keys": KeptCase(mapped=False),
    "head_dim 96, 80": KeptCase(dims=(96, 80)),
    "head_dim 256": KeptCase(dims=(256, 256)),
    "uneven values": KeptCase(hard="uneven"),
    "rows that share pages": KeptCase(starts=(0, 20, 0), pages=(1, 2, 3), rows=(2, 0, 2)),
}
CASES |= {f"fp8, {name}": replace(CASES[name], kind="fp8") for name in (
    "plain", "grouped 14/2", "several queries", "padding", "everything", "uneven values", "rows that share pages",
    "coded tokens behind", "head_dim 96, 80",
)}  # fmt: skip
CASES |= {f"bf16 pages, {name}": replace(CASES[name], kind="bf16", dtype=BF16) for name in (
    "plain", "grouped 14/2", "several queries", "padding", "everything", "rows that share pages", "all kept",
    "coded tokens behind", "head_dim 256",
)}  # fmt: skip


def check(case: KeptCase, **where: Any) -> None:
    with poisoned():
        check_decode(case, **where)


def check_wave(name: str, programs: int) -> None:
    """As many programs as there would be in a larger wave."""
    kernel = importlib.import_module(KERNEL)
    found = kernel.launch_config

    def launch_config(kind: str, planes: int, multiprocessors: int, *, kept: bool = False) -> Any:
        return replace(found(kind, planes, programs, kept=kept), kept=programs)

    with mock.patch.object(kernel, "launch_config", launch_config):
        check(CASES[name], interpret=True)


def check_lengths(name: str, device: str = "cpu") -> None:
    """With the lengths on the device the launch is told none, and gives the same."""
    query, kv, call, sinks, starts = CASES[name].make(device)
    lengths = torch.tensor([kv.tokens, kv.coded, 0, kv.first], dtype=torch.int32, device=device)
    wanted = run_decode(query, kv, call, sinks, starts, interpret=device == "cpu")
    blind = replace(kv, tokens=query.shape[2], coded=0, first=0, lengths=lengths)
    with poisoned():
        found = run_decode(query, blind, call, sinks, starts, interpret=device == "cpu")
    for got, expected in zip(found, wanted, strict=True):
        assert torch.equal(got, expected)


INTERPRETER_CASES = {name: functools.partial(check, case, interpret=True) for name, case in CASES.items()}
INTERPRETER_CASES |= {
    "a page for every program": functools.partial(check_wave, "grouped 9/3", 132),
    "some pages for each": functools.partial(check_wave, "rows that share pages", 7),
    "a page for every program, bf16": functools.partial(check_wave, "bf16 pages, padding", 40),
    "lengths on the device": functools.partial(check_lengths, "coded tokens behind"),
    "lengths on the device, fp8": functools.partial(check_lengths, "fp8, everything"),
}
MUTATIONS = {
    "pages of another head": ("kept_table_ptr + plane * kept_pages", "kept_table_ptr", "plain"),
    "tokens of a head": ("tl.where(is_kept, count, coded)", "tl.where(is_kept, count // 2, coded)", "all kept"),
    "causality of kept tokens": ("count + QUERIES, tokens)", "count, tokens)", "bf16 pages, several queries"),
    "starts of kept tokens": ("tl.where(is_kept, 0, lowest)", "lowest", "padding"),
    "sinks of kept tokens": ("tl.where(is_kept, -sink_tokens, sink_start)", "sink_start", "plain"),
    "sinks among evicted tokens": ("| (column < evicted)", "| (column < 0)", "plain"),
    "where records are": (
        "kept_ptr.to(tl.int64), offset)", "kept_ptr.to(tl.int64) + plane * RECORD, offset)", "plain"
    ),
    "end of a run": ("tl.load(run + 2, mask", "tl.load(run + 1, mask", "plain"),
    "row and head of a run": (
        "plane = tl.where(is_kept, kept_plane, plane)", "plane = plane + 0", "a page for every program"
    ),
    "runs beyond the first": ("- splits) * tl.num_programs(0)", "- splits) * 0", "a page for every program"),
    "parts of runs": ("planes * parts + begin + part - parts", "planes * parts + part - parts", "plain"),
    "how many parts": ("count += tl.load(ends_ptr + plane + 1) - begin", "count += 0 * begin", "plain"),
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel_in_interpreter(name):
    assert interpreter_results(__file__)[name] == ""


@pytest.mark.parametrize("programs", [1, 2, 7, 40, 1000])
@pytest.mark.parametrize("pages", [(3, 0, 9, 1), (0, 0), (1,), (40, 1, 1, 1, 1), tuple(range(30))])
def test_runs_take_every_page_once(pages, programs):
    runs = Runs.of(pages, programs, torch.device("cpu"))
    entries, ends = runs.entries.tolist(), runs.ends.tolist()
    assert ends[0] == 0 and ends[-1] == len(entries) <= max(programs, len(pages))
    for head, count in enumerate(pages):
        own = entries[ends[head] : ends[head + 1]]
        assert [page for place, begin, end in own for page in range(begin, end) if place == head] == list(range(count))
    sizes = [end - begin for _, begin, end in entries]
    # One page more in the longest run and none fewer would do.
    shorter = max(sizes, default=1) - 1
    assert shorter == 0 or sum(-(-count // shorter) for count in pages) > programs or sum(pages) > programs * shorter


def test_lists_are_made_once_and_counted():
    kv = CASES["plain"].make()[1]
    before = sum(kv.kept.nbytes())
    runs = kv.kept.runs(4)
    assert kv.kept.runs(4) is runs and kv.kept.runs(5) is not runs
    lists = [part for made in kv.kept.shared.values() for part in (made.entries, made.ends)]
    assert sum(kv.kept.nbytes()) == before + sum(part.nbytes for part in lists)


def test_what_nobody_writes_into_a_page_is_zero():
    """A kernel multiplies it by zero; the interpreter reads the NaN of FP8 as a number."""
    case = CASES["fp8, coded tokens behind"]
    with mock.patch("torch.empty", bad_bytes):
        store = case.store("cpu")
    number, inside = divmod(store.gone, PAGE)
    page = store.pages[number]
    assert inside and not page.key_codes[..., :inside, :].float().any()
    assert not page.value_codes[..., :inside].float().any() and page.key_codes[..., inside:, :].float().any()


def test_what_runs_on_cpu():
    query, kv, *_ = CASES["plain"].make()
    assert decode_refusal(query, kv) == "device is cpu, the kernel needs cuda"


def refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch, query: torch.Tensor, kv: Any, window: int | None = None) -> Any:
    monkeypatch.setattr("kompakt.kernels.decode_attention.triton_refusal", lambda *_: None)
    return decode_refusal(query, kv, window)


def test_refusals(monkeypatch):
    query, kv, *_ = CASES["plain"].make()
    assert refused_on_a_gpu(monkeypatch, query, kv) is None
    assert "has no columns" in refused_on_a_gpu(monkeypatch, query, kv, 100)
    many = torch.zeros(1, 4, MAX_ROWS, 64, dtype=FP16)
    assert "at most 64 queries of a KV head" in refused_on_a_gpu(monkeypatch, many, kv)
    assert "at most 64 queries" in refused_on_a_gpu(monkeypatch, query, replace(kv, ring=None))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kernel_on_gpu(name):
    skip_below(FP8_CAPABILITY)
    check(CASES[name], interpret=False, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_lengths_on_the_device(name):
    skip_below(FP8_CAPABILITY)
    check_lengths(name, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["int4", "fp8", "bf16"])
def test_long_caches_on_gpu(kind):
    """Heads of very different lengths, with and without tokens behind them."""
    skip_below(FP8_CAPABILITY)
    case = KeptCase(kind=kind, heads=(32, 8), dims=(128, 128), starts=(0, 700, 5000), dtype=BF16, pages=(60, 0, 7, 25))
    for lengths in ((9000, 1), (9000, 3000, 7)):
        check(replace(case, lengths=lengths), interpret=False, device="cuda")


@pytest.mark.gpu
def test_launch_is_captured():
    """A CUDA graph of the call gives what the call gives, for the tokens that are there when it is replayed."""
    skip_below(FP8_CAPABILITY)
    query, kv, call, sinks, starts = CASES["everything"].make("cuda")
    assert decode_refusal(query, kv) is None
    lengths = torch.tensor([kv.tokens, kv.coded, 0, kv.first], dtype=torch.int32, device="cuda")
    blind = replace(kv, lengths=lengths)
    expected = run_decode(query, blind, call, sinks, starts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run_decode(query, blind, call, sinks, starts)
    graph.replay()
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, MAX_ROWS])
def test_public_call_on_gpu(queries):
    """Few queries go to the kernel, many to the reference; both are right."""
    skip_below(FP8_CAPABILITY)
    query, kv, call, sinks, starts = replace(CASES["everything"], lengths=(700, 300, queries)).make("cuda")
    out, _ = decode_attention(
        query, kv, scaling=call.scaling, softcap=call.softcap, sinks=sinks, key_starts=starts
    )  # fmt: skip
    exact, _ = decode_ref(query.double(), kv, call, sinks, starts, dtype=torch.float64)
    assert (out.double() - exact).norm() <= 0.02 * exact.norm() and kv.first >= PAGE
