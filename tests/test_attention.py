"""Prefill attention: the reference against SDPA in FP64, the Triton kernel against the reference, and dispatch.

The tolerance of kernels is that of `attention_cases.py`.
"""

import functools
import itertools
import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from attention_cases import AttentionCase, check_kernel
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import BF16, FP16, FP32, poisoned, skip_below
from torch import Tensor

from kompakt.kernels import attention
from kompakt.kernels.activations import log_fallback
from kompakt.kernels.attention import (
    MODES,
    Call,
    attention_backend,
    attention_ref,
    prefill_attention,
    run_attention,
)
from kompakt.kernels.int4_linear import hopper_refusal
from kompakt.kernels.segments import Segments, visible, whole

KERNEL = "kompakt.kernels.attention_triton"
CASES = {
    "causal": AttentionCase(),
    "one token": AttentionCase(lengths=(1, 1)),
    "one query": AttentionCase(lengths=(1, 133)),
    "grouped 9/3": AttentionCase(heads=(9, 3), lengths=(33, 130), batch=2),
    "grouped 14/2": AttentionCase(heads=(14, 2), lengths=(33, 66), dims=(32, 32)),
    "full": AttentionCase(lengths=(100, 140), causal=False),
    "more queries than keys": AttentionCase(lengths=(140, 30), causal=False),
    "queries before the keys": AttentionCase(lengths=(400, 30), causal=False, window=5),
    "window": AttentionCase(lengths=(150, 200), window=37, dims=(32, 32)),
    "window of one": AttentionCase(lengths=(70, 70), window=1, dims=(32, 32)),
    "full window": AttentionCase(lengths=(150, 150), window=20, causal=False, dims=(32, 32)),
    "softcap": AttentionCase(lengths=(90, 90), softcap=5.0),
    "sinks": AttentionCase(heads=(4, 2), lengths=(90, 90), sinks=True),
    "sinks, softcap, window": AttentionCase(lengths=(80, 130), sinks=True, softcap=3.0, window=50, dims=(32, 32)),
    "scaling": AttentionCase(lengths=(66, 66), scaling=0.31),
    "head_dim 80, 96": AttentionCase(lengths=(70, 70), dims=(80, 96)),
    "head_dim 192, 128": AttentionCase(lengths=(40, 70), dims=(192, 128)),
    "head_dim 256": AttentionCase(lengths=(40, 66), dims=(256, 256)),
    "padding": AttentionCase(batch=2, lengths=(80, 140), segments="padding", hard="poisoned padding"),
    "padding, sinks": AttentionCase(batch=2, lengths=(140, 140), segments="padding", sinks=True, causal=False),
    "packed": AttentionCase(lengths=(150, 150), segments="packed"),
    "packed, window": AttentionCase(lengths=(200, 200), segments="packed", window=30, dims=(32, 32)),
    "uneven": AttentionCase(lengths=(200, 160), segments="uneven"),
    "zeros": AttentionCase(lengths=(70, 130), hard="zeros"),
    "large": AttentionCase(lengths=(70, 130), hard="large", scaling=1e-3),
    "tiny": AttentionCase(lengths=(70, 130), hard="tiny"),
}
# Every mask in one mode, and every mode on the masks that meet its own code.
INTERPRETED = [(mode, name) for mode in ("int8_fp8",) for name in CASES] + [
    (mode, name)
    for mode in MODES
    if mode != "int8_fp8"
    for name in ("grouped 9/3", "sinks, softcap, window", "head_dim 80, 96", "padding", "packed", "zeros", "window")
]


def run_triton(query: Tensor, *arguments, interpret: bool = False) -> tuple[Tensor, Tensor]:
    from kompakt.kernels.attention_triton import attention_triton

    with poisoned():
        return attention_triton(query, *arguments, interpret=interpret)


def quantize(*arguments, interpret: bool = False):
    from kompakt.kernels.attention_quant_triton import quantize_keys_values

    return quantize_keys_values(*arguments, interpret=interpret)


def interpreted(mode: str, name: str) -> None:
    run, codes = (functools.partial(f, interpret=True) for f in (run_triton, quantize))
    check_kernel(run, codes, CASES[name], mode, device="cpu", fp8_sums=False)


def check_nan(mode: str, run) -> None:
    """A NaN in a query, a key or a value reaches what that token takes part in; through a mean it may reach
    more: of keys and values all, of INT4 queries their group."""
    for place in range(3):
        query, key, value, *_ = AttentionCase(lengths=(200, 200)).make()
        tensors = [query, key, value]
        tensors[place] = tensors[place].clone()
        tensors[place][0, 0, 170, 7] = torch.nan
        out, _ = run(*tensors, AttentionCase().call(mode), None, None)
        assert out[0, 170, 0].isnan().any()
        assert place > 0 or not out[0, :128].isnan().any()


INTERPRETER_CASES = {
    **{f"{mode}, {name}": functools.partial(interpreted, mode, name) for mode, name in INTERPRETED},
    **{
        f"{mode}, NaN": functools.partial(check_nan, mode, functools.partial(run_triton, interpret=True))
        for mode in MODES
    },
}
MUTATIONS = {
    "aligned to the start": ("position = i - q_stop + k_stop", "position = i", "int8_fp8, grouped 9/3"),
    "group ignored": ("kv_head = head // group", "kv_head = head * 0", "int8_fp8, grouped 9/3"),
    "first key of a segment": ("(token >= k_start)[None, :] &", "(token >= 0)[None, :] &", "int8_fp8, padding"),
    "window from the other side": (
        "token[None, :] < position[:, None] + window",
        "token[None, :] < keys",
        "int8_fp8, full window",
    ),
    "tail of the keys": ("(token < k_stop)[None, :]", "(token < rows)[None, :]", "int8_fp8, full"),
    "key scale": ("key_scale_base + start // SCALED", "key_scale_base", "int8_fp8, one query"),
    "value scale": ("alpha *= unit / next_unit", "alpha *= 1.0", "int8_fp8, one query"),
    "mean of the values": ("[None, :] * total[:, None]", "[None, :] * 0.0", "int8_fp8, causal"),
    "sink shifted": ("sink - true_m + bias", "sink - m + bias", "int8_fp8, sinks"),
    "sink in units of P": ("sink - true_m + bias", "sink - true_m", "int8_fp8, sinks"),
    "softcap without the mean": ("(s + shift[:, None]) / bound", "s / bound", "int8_fp8, softcap"),
    "lse without the mean": ("true_m = m + shift", "true_m = m", "int8_fp8, causal"),
    "token order": ("permute(0, 1, 3, 2, 4)", "permute(0, 1, 2, 3, 4)", "int8_fp8, causal"),
    "rescaling": ("acc = acc * alpha[:, None]", "acc = acc", "int8_fp8, one query"),
    "blind queries": (
        "blind[:, None], 0.0, result",
        "blind[:, None], 1.0, result",
        "int8_fp8, queries before the keys",
    ),
    "FP8 key scale": ("key_scale_base + start // SCALED", "key_scale_base", "fp8_fp8, window"),
    "FP8 window": ("token[None, :] > position[:, None] - window", "token[None, :] >= 0", "fp8_fp8, window"),
    "FP8 query scale": ("unit = q_scale * factor", "unit = 0 * q_scale + 0.01 * factor", "fp8_fp8, window"),
    "mean of INT4 queries": ("+ mean[None, :]) * k_scale", ") * k_scale", "int4_fp8, grouped 9/3"),
    "halves of INT4": ("high = (packed >> 4)", "high = (packed >> 3)", "int4_fp8, grouped 9/3"),
    "masked values": (
        "valid = (token >= k_start) & (token < k_stop)",
        "valid = (token >= 0) & (token < k_stop)",
        "bf16, padding",
    ),
    "address of a tile": ("int64) + start) * stride", "int64) + start * 0) * stride", "bf16, grouped 9/3"),
}


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel_in_interpreter(name):
    assert interpreter_results(__file__)[name] == ""


def exact(case: AttentionCase) -> tuple[Tensor, Tensor]:
    """FP64 attention over a dense mask, from the definitions: SDPA where it can, sinks and softcap by hand."""
    query, key, value, sinks, segments = case.make()
    batch, heads, queries, _ = query.shape
    call = case.call("bf16")
    places = segments or whole(batch, queries, key.shape[2], "cpu")
    mask = visible(places, batch, slice(0, queries), key.shape[2], causal=case.causal, window=case.window)[:, None]
    group = heads // key.shape[1]
    q = query.double()
    k, v = (t.double().nan_to_num(0.0).repeat_interleave(group, 1) for t in (key, value))
    logits = q @ k.mT * call.scaling
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(logits, -1)
    if sinks is None and call.softcap is None:
        result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scaling)
    else:
        extra = torch.zeros(0) if sinks is None else sinks
        column = (
            extra.double().view(1, -1, 1, 1).expand(batch, -1, queries, 1) if sinks is not None else logits[..., :0]
        )
        result = torch.softmax(torch.cat((logits, column), -1), -1)[..., : key.shape[2]] @ v
    return torch.where(mask.any(-1)[..., None], result, 0.0), lse


@pytest.mark.parametrize("name", CASES)
def test_reference_is_attention(name):
    """Mode bf16 quantizes nothing: what is left is FP32 rounding."""
    case = CASES[name]
    query, key, value, sinks, segments = case.make()
    result, lse = attention_ref(query.float(), key.float(), value.float(), case.call("bf16"), sinks, segments)
    expected, expected_lse = exact(case)
    scale = value.float().nan_to_num(0.0).abs().amax()
    torch.testing.assert_close(result.transpose(1, 2).double(), expected, rtol=1e-4, atol=2e-5 * scale.item())
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)


def offset_tensors(tokens: int = 600) -> list[Tensor]:
    """Channel offsets ten times the spread in keys, outlier channels in queries, as in language models."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn((1, heads, tokens, 64), generator=generator) for heads in (4, 2, 2))
    q[..., 5] *= 6
    return [q, k + 10 * torch.randn((1, 2, 1, 64), generator=generator), v]


def relative_error(mode: str, tensors: list[Tensor]) -> tuple[float, float]:
    """‖o − exact‖ / ‖exact‖, and cosine."""
    q, k, v = tensors
    expected, _ = attention_ref(q, k, v, Call("bf16", True, None, 0.125, None))
    result, _ = attention_ref(q, k, v, Call(mode, True, None, 0.125, None))
    cosine = F.cosine_similarity(result.flatten(), expected.flatten(), dim=0).item()
    return ((result - expected).norm() / expected.norm()).item(), cosine


def per_tensor_fp8(tensors: list[Tensor]) -> float:
    """Error of queries, keys and values with one FP8 scale each, nothing smoothed."""

    def cast(x: Tensor) -> Tensor:
        scale = x.abs().amax() / 448
        return (x / scale).to(torch.float8_e4m3fn).float() * scale

    expected, _ = attention_ref(*tensors, Call("bf16", True, None, 0.125, None))
    result, _ = attention_ref(*(cast(t) for t in tensors), Call("bf16", True, None, 0.125, None))
    return ((result - expected).norm() / expected.norm()).item()


def test_accuracy_of_modes():
    tensors = offset_tensors()
    errors = {mode: relative_error(mode, tensors) for mode in MODES}
    assert errors["bf16"][0] < 1e-6
    assert errors["int8_fp16"][1] > 0.9995 and errors["int8_fp8"][1] > 0.998 and errors["fp8_fp8"][1] > 0.998
    assert all(5 * errors[mode][0] < per_tensor_fp8(tensors) for mode in ("int8_fp16", "int8_fp8"))
    # Quantization is there at all, in the order of its coarseness.
    assert 1e-5 < errors["int8_fp16"][0] < errors["int8_fp8"][0] < errors["int4_fp8"][0] < 0.3


@pytest.mark.parametrize("mode", MODES)
def test_offsets_do_not_matter(mode):
    """A vector added to all keys changes nothing but lse, a vector added to all values is added to the output."""
    q, k, v = offset_tensors(200)
    call = Call(mode, True, None, 0.125, None)
    shift, move = torch.randn(1, 2, 1, 64) * 8, torch.randn(1, 2, 1, 64) * 8
    base, base_lse = attention_ref(q, k, v, call)
    moved, lse = attention_ref(q, k + shift, v + move, call)
    expected = base + move.repeat_interleave(2, 1).transpose(1, 2)
    tolerance = 1e-4 if mode == "bf16" else 0.05
    assert (moved - expected).norm() <= tolerance * base.norm()
    added = (q.view(1, 2, 2, 200, 64) * shift[:, :, None]).sum(-1).view(1, 4, 200) * 0.125
    torch.testing.assert_close(lse, base_lse + added, rtol=1e-3, atol=0.3 if mode == "int4_fp8" else 0.05)


def test_segments_of_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    segments = Segments.from_padding(mask, 3)
    assert segments is not None
    assert segments.table.tolist() == [[0, 0, 3, 2, 5], [1, 0, 1, 0, 3], [2, 0, 0, 0, 0], [3, 0, 3, 0, 5]]
    seen = visible(segments, 4, slice(0, 3), 5, causal=True, window=None)
    causal = torch.ones(3, 5, dtype=torch.bool).tril(2)
    expected = causal & mask[:, None]
    # A query that is padding sees nothing.
    expected &= mask[:, 2:][:, :, None]
    assert torch.equal(seen, expected)
    assert Segments.from_padding(torch.tensor([[True, False, True]]), 3) is None


def test_segments_of_documents():
    documents = torch.tensor([[4, 4, 0, 0, 0, 7], [1, 1, 1, 1, 1, 1]])
    segments = Segments.from_documents(documents)
    assert segments is not None and segments.max_queries == 6
    seen = visible(segments, 2, slice(0, 6), 6, causal=True, window=None)
    expected = (documents[:, :, None] == documents[:, None, :]) & torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal(seen, expected)
    assert Segments.from_documents(torch.tensor([[1, 2, 1]])) is None
    ends = torch.tensor([0, 2, 5, 6], dtype=torch.int32)
    assert Segments.from_cu_seqlens(ends).table.tolist() == segments.table[:3].tolist()


@pytest.mark.parametrize(
    ("ends", "message"),
    [([0, 3, 2], "never fall"), ([1, 3], "begin with 0"), ([0], r"sequences \+ 1")],
)
def test_wrong_cu_seqlens(ends, message):
    with pytest.raises(ValueError, match=message):
        Segments.from_cu_seqlens(torch.tensor(ends))


GOOD = {
    "query": torch.zeros(1, 4, 5, 16),
    "key": torch.zeros(1, 2, 7, 16),
    "value": torch.zeros(1, 2, 7, 8),
    "mode": "int8_fp8",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "int8"}, "known: bf16, int8_fp16"),
        ({"query": torch.zeros(4, 5, 16)}, "expected .batch, heads"),
        ({"key": torch.zeros(1, 3, 7, 16), "value": torch.zeros(1, 3, 7, 8)}, "3 KV heads do not divide 4"),
        ({"value": torch.zeros(1, 2, 6, 8)}, "do not fit"),
        ({"key": torch.zeros(1, 2, 7, 8)}, "do not fit"),
        ({"key": torch.zeros(1, 2, 7, 16, dtype=FP16)}, "one floating"),
        ({"query": torch.zeros(1, 4, 9, 16)}, "9 queries for 7 keys"),
        ({"window": 0}, "window is 0"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"scaling": float("nan")}, "scaling is nan"),
        ({"scaling": 0.0}, "above 0"),
        ({"segments": Segments.from_cu_seqlens(torch.tensor([0, 100]))}, r"\(1, 100, 100\)"),
        ({"segments": Segments(torch.zeros(2, 4, dtype=torch.int32), 1, (1, 5, 7))}, r"\(2, 4\)"),
        ({"sinks": torch.zeros(3)}, r"sinks have shape \(3,\)"),
        ({"sinks": torch.zeros(4, device="meta")}, "sinks is on meta"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        prefill_attention(**{**GOOD, **change})


def test_what_a_kernel_would_read_wrongly():
    """Sinks that lie apart, and a window that hides nothing."""
    query, key, value, sinks, _ = CASES["sinks"].make()
    options = {"mode": "int8_fp8", "causal": False}
    expected, _ = prefill_attention(query, key, value, sinks=sinks, **options)
    apart = torch.stack((sinks, sinks + 5), dim=1)[:, 0]  # pyright: ignore
    for change in ({"sinks": apart}, {"sinks": sinks, "window": 2**31 - 1}):
        assert torch.equal(prefill_attention(query, key, value, **options, **change)[0], expected)


def test_nothing_to_attend_to():
    empty, lse = prefill_attention(torch.zeros(2, 4, 0, 16), *[torch.zeros(2, 2, 7, 16)] * 2, mode="int8_fp8")
    assert empty.shape == (2, 4, 0, 16) and lse.shape == (2, 4, 0)
    blind, lse = prefill_attention(
        torch.ones(1, 4, 3, 16), *[torch.zeros(1, 2, 0, 16)] * 2, mode="int8_fp8", causal=False
    )
    assert not blind.any() and lse.isneginf().all()


def test_backends_on_cpu(caplog):
    log_fallback.cache_clear()
    query = torch.zeros(1, 2, 3, 64, dtype=BF16)
    assert attention_backend(query, query, AttentionCase().call("bf16"))[0] == "reference"
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            prefill_attention(query, query, query, mode="fp8_fp8")
    assert [record.message for record in caplog.records] == [
        "prefill_attention (fp8_fp8) runs through the torch reference: device is cpu, the kernel needs cuda"
    ]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_op_for_compilers(dtype):
    """The fake implementation agrees with the real one on shapes, strides and dtypes."""
    query, key, value, sinks, segments = AttentionCase(batch=2, lengths=(9, 30), segments="padding", sinks=True).make()
    arguments = (query.to(dtype), key.to(dtype), value.to(dtype), sinks, segments.table, segments.max_queries)  # pyright: ignore
    options = ("int8_fp8", True, 5, 0.1, None)
    torch.library.opcheck(attention.attention_op, (*arguments, *options), test_utils=("test_schema", "test_faketensor"))


def test_nan_reaches_the_output():
    """Neither rounding to integers nor a maximum swallows what is no number."""
    for mode, place in itertools.product(MODES, range(3)):
        tensors = [t.clone() for t in offset_tensors(70)]
        tensors[place][0, 0, 30, 7] = torch.nan
        out, _ = attention_ref(*tensors, Call(mode, True, None, 0.125, None))
        assert out[0, 30, 0].isnan().any()


# ---- On a GPU


GPU_CASES = {
    **CASES,
    "long": AttentionCase(heads=(4, 2), lengths=(1030, 2100), dims=(128, 128)),
    "long, window": AttentionCase(heads=(2, 2), lengths=(1500, 1500), dims=(128, 128), window=300),
    "long, padding": AttentionCase(heads=(2, 1), lengths=(700, 1300), dims=(128, 128), batch=2, segments="padding"),
    # Several items for every multiprocessor.
    "many": AttentionCase(heads=(32, 8), lengths=(700, 700), dims=(128, 128), batch=2),
    "long, packed": AttentionCase(heads=(2, 1), lengths=(900, 900), dims=(128, 128), segments="packed", sinks=True),
}


LONG = [name for name in GPU_CASES if name not in CASES]
HOPPER_CASES = [
    *(
        "one token",
        "grouped 9/3",
        "grouped 14/2",
        "more queries than keys",
        "window",
        "full window",
        "sinks",
        "scaling",
    ),
    *("padding", "padding, sinks", "packed, window", "zeros", "large", "tiny"),
    *LONG,
]


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "name"), [*INTERPRETED, *((mode, name) for mode in MODES for name in LONG)])
def test_triton_on_gpu(mode, name):
    """The portable kernel, whatever the card has besides."""
    skip_below((8, 9))
    check_kernel(run_triton, quantize, replace(GPU_CASES[name], dtype=BF16), mode, device="cuda", fp8_sums=True)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_triton_on_gpu_in_fp16(mode):
    skip_below((8, 9))
    for name in ("grouped 9/3", "padding"):
        check_kernel(run_triton, quantize, GPU_CASES[name], mode, device="cuda", fp8_sums=True)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["fp8_fp8", "int8_fp8"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", HOPPER_CASES)
def test_hopper_on_gpu(mode, head_dim, name):
    case = replace(GPU_CASES[name], dims=(head_dim, head_dim), dtype=BF16 if head_dim == 128 else FP16)
    query, _, value, _, _ = case.make("cuda")
    refusal = hopper_refusal(query.device)
    if refusal is not None:
        pytest.skip(refusal)
    assert attention_backend(query, value, case.call(mode))[0] == "gluon"
    with poisoned():
        check_kernel(run_attention, quantize, case, mode, device="cuda", fp8_sums=True)


@pytest.mark.gpu
def test_fallback_on_gpu(caplog):
    """FP32 and head dimensions that no kernel takes: exact attention, and one line that says so."""
    log_fallback.cache_clear()
    query = torch.randn(1, 2, 20, 64, device="cuda")
    wide = torch.randn(1, 2, 20, 300, device="cuda", dtype=BF16)
    with caplog.at_level(logging.WARNING):
        for tensor in (query, wide):
            out, _ = prefill_attention(tensor, tensor, tensor, mode="int8_fp8")
            expected = F.scaled_dot_product_attention(*[tensor.float()] * 3, is_causal=True)
            torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)
    assert len(caplog.records) == 2 and all("exact attention" in record.message for record in caplog.records)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["int8_fp8", "int8_fp16"])
def test_compiled_and_captured(mode):
    skip_below((8, 9))
    query, key, value, sinks, segments = AttentionCase(
        heads=(4, 2), batch=2, lengths=(200, 300), dims=(128, 128), segments="padding", sinks=True, dtype=BF16
    ).make("cuda")

    def call() -> Tensor:
        return prefill_attention(query, key, value, mode=mode, sinks=sinks, segments=segments)[0]

    expected = call()
    assert torch.equal(torch.compile(call, fullgraph=True)(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    result.fill_(torch.nan)
    graph.replay()
    assert torch.equal(result, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(10))
def test_random_problems_have_no_nan(seed):
    """1,000 problems of random lengths, heads, masks and scales for each seed; the output is bounded by the values."""
    skip_below((8, 9))
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    mode, head_dim = MODES[seed % len(MODES)], (64, 128)[seed // len(MODES)]
    for _ in range(1000):
        kv_heads, group, batch = pick(1, 2, 3), pick(1, 3, 7), pick(1, 2)
        keys = pick(1, 17, 64, 128, 129, 300, 700)
        queries = max(1, int(torch.randint(1, keys + 1, (), generator=generator)))
        segments = None
        if pick(True, False):
            mask = torch.ones(batch, keys, dtype=torch.bool)
            mask[0, : int(torch.randint(keys + 1, (), generator=generator))] = False
            segments = Segments.from_padding(mask.cuda(), queries)
        query, key, value = (
            torch.randn(batch, heads, tokens, head_dim, device="cuda", dtype=BF16) * 10.0 ** pick(-12, -3, 0, 0, 1, 3)
            for heads, tokens in ((kv_heads * group, queries), (kv_heads, keys), (kv_heads, keys))
        )
        key += torch.randn(1, kv_heads, 1, head_dim, device="cuda", dtype=BF16) * pick(0.0, 1.0, 100.0)
        value[:, :, : keys // 2] *= pick(1.0, 1e-4, 1e4)
        out, lse = prefill_attention(
            query, key, value, mode=mode, window=pick(None, 1, 100), segments=segments,
            sinks=pick(None, torch.randn(kv_heads * group, device="cuda") * 10),
        )  # fmt: skip
        bound = 1.3 * value.abs().amax()
        assert out.isfinite().all() and (out.abs() <= bound).all() and not lse.isnan().any()
