"""Attention over a compressed cache equals attention over its dequantized tokens, in float64, for every mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from decode_cases import filled

from kompakt.compress.cache import TokenStore
from kompakt.kernels.decode_attention import CompressedKV, Reading, decode_attention, decode_ref, dequantized
from kompakt.kernels.kv_codes import KeyMap
from kompakt.kernels.kv_pages import PAGE, PageLayout, TokenCodec
from kompakt.quant.kv_fp8 import KVFP8
from kompakt.quant.kv_int4 import KVINT4

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = torch.finfo(torch.float32).eps


def exact(
    query: torch.Tensor,
    kv: CompressedKV,
    *,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    key_starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the dequantized tokens in float64, with a mask that is written out."""
    key, value = (part.double() for part in dequantized(kv, torch.float64))
    batch, heads, queries, head_dim = query.shape
    group = heads // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query.double() @ key.nan_to_num().mT * (head_dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    for row in range(batch):
        for index in range(queries):
            position = kv.tokens - queries + index
            for place in range(key.shape[2]):
                column = kv.first + place
                seen = (0 if key_starts is None else int(key_starts[row])) <= column <= position
                if not seen or (window is not None and column <= position - window):
                    logits[row, :, index, place] = -torch.inf
    lse = logits.logsumexp(-1)
    if sinks is not None:
        logits = torch.cat((logits, sinks.double().view(1, heads, 1, 1).expand(batch, heads, queries, 1)), -1)
    weights = logits.softmax(-1).nan_to_num()[..., : key.shape[2]]
    weights[lse.isneginf()] = 0
    return weights @ value.nan_to_num(), lse


CALLS = [
    {},
    {"window": 30},
    {"window": 1},
    {"softcap": 2.0, "scaling": 0.7},
    {"sinks": "random"},
    {"key_starts": (3, 140)},
    {"key_starts": (0, 200), "window": 50, "softcap": 4.0, "sinks": "random"},
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: "-".join(call) or "plain")
@pytest.mark.parametrize("lengths", [(1,), (7, 1), (260, 1), (260, 5), (130, 140), (3, 300), (150, 128, 1, 1)], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (9, 3), (14, 2)], ids=str)
def test_equals_attention_over_dequantized_tokens(heads, lengths, call):
    num_heads, kv_heads = heads
    options = dict(call)
    starts = tuple(options.get("key_starts", (0, 0)))
    if options.get("sinks") is not None:
        options["sinks"] = torch.randn(num_heads, generator=torch.Generator().manual_seed(3))
    if "key_starts" in options:
        options["key_starts"] = torch.tensor(starts)
    kv, queries = filled(lengths, heads=kv_heads, key_dim=14, value_dim=10, starts=starts)
    query = torch.randn(2, num_heads, queries, 14, generator=torch.Generator().manual_seed(4))
    out, lse = decode_attention(query, kv, **options)
    wanted, wanted_lse = exact(query, kv, **options)
    assert out.shape == (2, num_heads, queries, 10) and out.transpose(1, 2).is_contiguous()
    seen = ~wanted_lse.isneginf()
    assert torch.equal(~lse.isneginf(), seen)
    # A sum of as many products as a token has channels, in every logit, and of as many weights as there are tokens.
    logit = 16 * EPS * (1 + wanted_lse[seen].abs().max()) if seen.any() else 0
    bound = (4 * kv.tokens * EPS + logit) * 6
    assert (lse[seen] - wanted_lse[seen]).abs().max() <= bound if seen.any() else True
    assert (out - wanted).abs().max() <= bound * max(1.0, float(wanted.abs().max()))
    assert (out[~seen] == 0).all()


@pytest.mark.parametrize(
    "method", [KVFP8(recent_tokens=0), KVFP8(sink_tokens=0), KVINT4(recent_tokens=1, sink_tokens=9)]
)
@pytest.mark.parametrize("lengths", [(128, 1), (129, 127), (400, 1), (400, 30)], ids=str)
def test_any_split_into_sinks_codes_and_recent_tokens(lengths, method):
    kv, queries = filled(lengths, method=method, starts=(0, 5))
    query = torch.randn(2, 4, queries, 16, generator=torch.Generator().manual_seed(4))
    starts = torch.tensor([0, 5])
    out, _ = decode_attention(query, kv, key_starts=starts)
    wanted, _ = exact(query, kv, key_starts=starts)
    assert (out - wanted).abs().max() <= 4 * kv.tokens * EPS * 6


@pytest.mark.parametrize("window", [5, 150])
def test_a_layer_that_dropped_pages_looks_at_what_it_kept(window):
    for lengths in ((400, 1), (400, 30), (30, 400, 1, 40)):
        kv, queries = filled(lengths, window=window, method=KVFP8(recent_tokens=0))
        assert kv.first > 0
        query = torch.randn(2, 4, queries, 16, generator=torch.Generator().manual_seed(4))
        out, _ = decode_attention(query, kv, window=window)
        wanted, _ = exact(query, kv, window=window)
        assert (out - wanted).abs().max() <= 4 * kv.tokens * EPS * 6


def test_empty_columns_of_a_page_are_not_looked_at():
    kv, queries = filled((300, 1), method=KVFP8(recent_tokens=0))
    query = torch.randn(2, 4, queries, 16)
    expected = decode_attention(query, kv)[0]
    store = TokenStore(KVFP8(recent_tokens=0))
    x = torch.randn(2, 2, 256, 16)
    store.append(x, x)
    store.crop(56)
    cut = store.read(None, 1)
    clean = decode_attention(query, cut)[0]
    last = store.pages[1]
    last.key_codes[:, :, 200 - PAGE :] = torch.nan
    last.value_codes[..., 200 - PAGE :] = torch.nan
    for parameters in (last.key_parameters, last.value_parameters):
        parameters[:, :, 200 - PAGE :] = torch.nan
    assert torch.equal(decode_attention(query, cut)[0], clean)
    assert torch.isfinite(expected).all()


def test_queries_in_16_bit_lose_no_more_than_their_rounding():
    kv, queries = filled((300, 2), dtype=torch.bfloat16)
    query = torch.randn(2, 4, queries, 16).bfloat16()
    out, _ = decode_attention(query, kv)
    wanted, _ = decode_ref(query.double(), kv, Reading(16**-0.5, None, None), dtype=torch.float64)
    assert out.dtype == torch.bfloat16
    assert (out.double() - wanted).abs().max() <= 2.0**-8 * wanted.abs().max()


OTHER_MODEL = TokenCodec("int4", KeyMap(torch.ones(2, 8)))


def mistake(**changes: Any) -> Any:
    """A call with some arguments replaced."""

    def run() -> None:
        kv, _ = filled((300, 2))
        arguments = {"query": torch.randn(2, 4, 2, 16), "kv": kv, **changes}
        if callable(arguments["kv"]):
            arguments["kv"] = arguments["kv"](kv)
        decode_attention(arguments.pop("query"), arguments.pop("kv"), **arguments)

    return run


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (mistake(query=torch.randn(2, 4, 16)), "expected (batch, heads, queries, head_dim) floating"),
        (
            mistake(query=torch.ones(2, 4, 2, 16, dtype=torch.long)),
            "expected (batch, heads, queries, head_dim) floating",
        ),
        (mistake(query=torch.randn(1, 4, 2, 16)), "does not fit a cache of 2 rows and head_dim 16"),
        (mistake(query=torch.randn(2, 4, 2, 8)), "does not fit a cache of 2 rows and head_dim 16"),
        (mistake(query=torch.randn(2, 3, 2, 16)), "2 KV heads do not divide 3 heads"),
        (mistake(query=torch.randn(2, 4, 303, 16)), "303 queries for 302 tokens"),
        (mistake(window=0), "window is 0; it counts tokens, from 1"),
        (mistake(softcap=0.0), "softcap is 0.0; it bounds the logits, above 0"),
        (mistake(scaling=float("inf")), "scaling is inf; it must be finite"),
        (mistake(sinks=torch.ones(3)), "sinks have shape (3,)"),
        (mistake(key_starts=torch.ones(2)), "key_starts have shape (2,) and dtype torch.float32"),
        (mistake(key_starts=torch.ones(3, dtype=torch.long)), "key_starts have shape (3,)"),
        (mistake(kv=lambda kv: replace(kv, tokens=400)), "these do not add up"),
        (
            mistake(kv=lambda kv: replace(kv, pages=replace(kv.pages, found=set(), pages={}))),
            "page 0 is absent, and its tokens are read",
        ),
        (
            mistake(kv=lambda kv: replace(kv, pages=replace(kv.pages, found=set(), layout=PageLayout("fp8", 16, 16)))),
            "which do not fit",
        ),
        (
            mistake(kv=lambda kv: replace(kv, pages=replace(kv.pages, found=set(), layout=PageLayout("int4", 16, 8)))),
            "heads of 16 and 8 channels, not 16",
        ),
        (
            mistake(kv=lambda kv: replace(kv, pages=replace(kv.pages, found=set(), codec=OTHER_MODEL))),
            "calibrated for 2 KV heads of 8",
        ),
        (mistake(kv=lambda kv: replace(kv, sink_starts=torch.zeros(1))), "do not belong together"),
    ],
)
def test_mistakes_are_named_in_one_sentence(run, says):
    with pytest.raises(ValueError) as caught:
        run()
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_what_takes_lengths_from_the_host_is_not_recorded(monkeypatch):
    """A graph would replay it for the tokens that there were."""
    kv, _ = filled((300, 1))
    query, lengths = torch.randn(2, 4, 1, 16), torch.tensor([301, 256, 0, 0], dtype=torch.int32)
    wanted, _ = decode_attention(query, kv)
    assert torch.equal(decode_attention(query, replace(kv, lengths=lengths))[0], wanted)
    monkeypatch.setattr("kompakt.kernels.decode_attention.is_recorded", lambda x: True)
    assert torch.equal(decode_attention(query, kv)[0], wanted)
    with pytest.raises(RuntimeError, match=r"does not take its lengths from the device \(device is cpu"):
        decode_attention(query, replace(kv, lengths=lengths))
