"""The kernel over a compressed cache against its reference: every mask, every kind of codes; see `decode_cases.py`."""

import functools
import importlib
from dataclasses import replace
from unittest import mock

import pytest
import torch
from decode_cases import DecodeCase, check_decode, key_size, spread
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import BF16, FP16, poisoned, skip_below

from kompakt.kernels.activations import FP8_CAPABILITY
from kompakt.kernels.decode_attention import MAX_ROWS, decode_ref, decode_refusal, fits_one_launch, run_decode
from kompakt.kernels.decode_chunks import decode_chunks

KERNEL = "kompakt.kernels.decode_attention_triton"
PARTS = [f"kompakt.kernels.decode_{part}_triton" for part in ("tiles", "ends", "dense", "codes")]
CASES = {
    "plain": DecodeCase(),
    "grouped 9/3": DecodeCase(heads=(9, 3), starts=(0, 0)),
    "grouped 14/2": DecodeCase(heads=(14, 2), starts=(0, 0)),
    "one group each": DecodeCase(heads=(2, 2)),
    "nothing coded": DecodeCase(lengths=(30, 1)),
    "first token": DecodeCase(lengths=(1,)),
    "one coded token": DecodeCase(lengths=(128, 1), options={"recent_tokens": 0, "sink_tokens": 0}),
    "nothing dense but itself": DecodeCase(lengths=(256, 1), options={"recent_tokens": 0, "sink_tokens": 0}),
    "all coded": DecodeCase(lengths=(255, 1), options={"recent_tokens": 0, "sink_tokens": 0}),
    "several queries": DecodeCase(lengths=(300, 100, 5), heads=(9, 3), starts=(0, 0)),
    "16 queries": DecodeCase(lengths=(300, 16), heads=(8, 2)),
    "padding": DecodeCase(starts=(0, 3, 130, 300)),
    "padding into the queries": DecodeCase(lengths=(300, 6), starts=(0, 303)),
    "many sinks": DecodeCase(starts=(5, 100), options={"recent_tokens": 40, "sink_tokens": 70}),
    "sinks that are not coded yet": DecodeCase(starts=(0, 380), options={"recent_tokens": 40, "sink_tokens": 9}),
    "window": DecodeCase(window=200, starts=(0, 260)),
    "window that ends in codes": DecodeCase(window=250, lengths=(400, 16), heads=(8, 2)),
    "window of one": DecodeCase(window=1),
    "several in a window": DecodeCase(window=90, lengths=(300, 100, 4)),
    "softcap": DecodeCase(softcap=3.0),
    "sink logits": DecodeCase(sinks=True, starts=(0, 390)),
    "everything": DecodeCase(sinks=True, softcap=4.0, window=300, starts=(0, 150), lengths=(300, 150, 3)),
    "scaling": DecodeCase(scaling=0.6),
    "no map of keys": DecodeCase(mapped=False),
    "head_dim 96, 80": DecodeCase(dims=(96, 80)),
    "head_dim 192, 128": DecodeCase(dims=(192, 128)),
    "head_dim 256": DecodeCase(dims=(256, 256)),
    "head_dim 8": DecodeCase(dims=(8, 6)),
    "zeros": DecodeCase(hard="zeros"),
    "uneven values": DecodeCase(hard="uneven"),
    "cut": DecodeCase(
        mapped=False, lengths=(256, -57, 1), options={"recent_tokens": 0, "sink_tokens": 0}, starts=(0, 0)
    ),
    "ring that turned": DecodeCase(lengths=(300, *(37,) * 9, 1), options={"recent_tokens": 50}),
}
CASES |= {f"fp8, {name}": replace(CASES[name], kind="fp8") for name in (
    "plain", "grouped 14/2", "several queries", "padding", "window", "everything", "head_dim 96, 80", "zeros",
    "uneven values", "all coded",
)}  # fmt: skip
CASES |= {f"bf16 pages, {name}": replace(CASES[name], kind="bf16", dtype=BF16) for name in (
    "plain", "grouped 14/2", "several queries", "padding", "window", "everything", "head_dim 96, 80", "all coded",
)}  # fmt: skip
CASES |= {f"bf16, {name}": replace(CASES[name], dtype=BF16) for name in ("plain", "everything", "head_dim 96, 80")}


def check(case: DecodeCase, **where) -> None:
    with poisoned():
        check_decode(case, **where)


def check_splits(pages: int, multiprocessors: int) -> None:
    """As many programs as there would be on a card with so many multiprocessors."""
    kernel = importlib.import_module(KERNEL)
    case = DecodeCase(lengths=(128 * pages + 50, 1))
    config = functools.partial(kernel.launch_config, multiprocessors=multiprocessors)
    with mock.patch.object(kernel, "launch_config", lambda kind, planes, _, **kept: config(kind, planes, **kept)):
        check(case, interpret=True)


def check_damaged_token(kind: str) -> None:
    """NaN in a token that is seen is NaN in the output of its head; in one that is not, nothing."""
    query, kv, call, _, _ = replace(CASES["plain"], kind=kind).make()
    for parameters in (kv.pages.pages[1].key_parameters, kv.pages.pages[1].value_parameters):
        parameters[:, 0, 17] = torch.nan
    out, _ = run_decode(query, kv, call, None, None, interpret=True)
    assert out[:, :2].isnan().all() and not out[:, 2:].isnan().any()
    out, _ = run_decode(query, kv, call, None, torch.tensor([150]), interpret=True)
    assert not out.isnan().any()


def check_lengths(name: str, device: str = "cpu") -> None:
    """With the lengths on the device the launch is told none, and gives the same."""
    query, kv, call, sinks, starts = CASES[name].make(device)
    lengths = torch.tensor([kv.tokens, kv.coded, 0, 0], dtype=torch.int32, device=device)
    wanted = run_decode(query, kv, call, sinks, starts, interpret=device == "cpu")
    blind = replace(kv, tokens=query.shape[2], coded=0, first=0, lengths=lengths)
    with poisoned():
        found = run_decode(query, blind, call, sinks, starts, interpret=device == "cpu")
    for got, expected in zip(found, wanted, strict=True):
        # Pages are shared out in another way.
        assert torch.allclose(got.float(), expected.float(), rtol=2e-3, atol=1e-4)


INTERPRETER_CASES = {name: functools.partial(check, case, interpret=True) for name, case in CASES.items()}
INTERPRETER_CASES |= {
    "more programs than pages": functools.partial(check_splits, 2, 132),
    "uneven runs of pages": functools.partial(check_splits, 5, 2),
    "lengths on the device": functools.partial(check_lengths, "everything"),
    "lengths on the device, fp8": functools.partial(check_lengths, "fp8, padding"),
    "many parts": functools.partial(check_splits, 18, 132),
    "damaged token": functools.partial(check_damaged_token, "int4"),
    "damaged token, fp8": functools.partial(check_damaged_token, "fp8"),
}
MUTATIONS = {
    "last coded column": (
        "(column < coded) & (column >= lowest)\n    if",
        "(column <= coded) & (column >= lowest)\n    if",
        "cut",
    ),
    "halves of a byte": ("beside(low.to(", "beside(high.to(", "plain"),
    "least value of keys": ("s += least[:, None] * sums", "s += 0.0 * sums", "no map of keys"),
    "least value of values": ("w * least[:, None]", "w * over[:, None]", "plain"),
    "scale of values": ("s = s * weight[None, :] + bias[:, None]", "s = s * weight[None, :]", "uneven values"),
    "sum of weights": ("+ w * over[:, None]", "+ w", "uneven values"),
    "second term of queries": ("first + second * (1.0 / LOW)", "first", "fp8, plain"),
    "second term of probabilities": ("UNIT, UNIT / LOW)", "UNIT, 0.0)", "fp8, plain"),
    "mean of keys": ("tl.where(total == 0.0, m, m + shift)", "m", "plain"),
    "factors of keys": ("q *= tl.load(factor_ptr", "q += 0.0 * tl.load(factor_ptr", "plain"),
    "rotation": ("turned(q, ROWS, WIDTH, ROTATE)", "turned(q, ROWS, WIDTH, ROTATE // 2)", "plain"),
    "sinks read twice": ("(column >= sink_start + sink_tokens)", "(column >= sink_start)", "many sinks"),
    "sinks that are not coded": (
        "(place < sink_tokens) & (column < coded)",
        "(place < sink_tokens)",
        "sinks that are not coded yet",
    ),
    "ring": ("column % ring_length", "column % (ring_length - 1)", "ring that turned"),
    "start of a row": ("tl.maximum(lowest, tl.load(start", "tl.minimum(lowest, tl.load(start", "padding"),
    "position of a row": ("tokens - QUERIES + row // GROUP", "tokens - QUERIES + row % QUERIES", "several queries"),
    "causality": (
        "column[None, :] <= position[:, None])",
        "column[None, :] <= position[:, None] + 1)",
        "several queries",
    ),
    "edge of the window": ("position[:, None] - window)", "position[:, None] - window + 1)", "several in a window"),
    "soft cap": (
        "s = capped(s * weight[None, :] + shift[None, :], softcap)",
        "s = s * weight[None, :] + shift[None, :]",
        "softcap",
    ),
    "maximum of a run": ("acc = acc * doubled(alpha, ROWS)[None, :] + o\n", "acc = acc + o\n", "uneven values"),
    "runs of pages": ("run = tl.cdiv(pages + DENSE, splits)", "run = (pages + DENSE) // splits", "many parts"),
    "sink logit": ("denominator += tl.math.exp2", "denominator -= tl.math.exp2", "sink logits"),
    "weights of parts": ("acc * alpha[:, None] + values * weight", "acc * alpha[:, None] + 0.0 * weight", "many parts"),
    "earlier parts": ("acc * alpha[:, None] + values * weight", "acc + values * weight", "many parts"),
    "parts together": ("values = tl.sum(acc * weight[:, None], axis=0)", "values = tl.sum(acc, axis=0)", "plain"),
    "tokens on the device": (
        "tokens, coded = tl.load(length_ptr), tl.load(length_ptr + 1)",
        "coded = tl.load(length_ptr + 1)",
        "lengths on the device, fp8",
    ),
    "window on the device": (
        "first = tl.maximum(tokens - QUERIES - window + 1, 0)",
        "first = tl.maximum(tokens - 150, 0)",
        "lengths on the device",
    ),
    "lse": ("(top + tl.math.log2(", "(tl.math.log2(", "plain"),
    "masked parameters of INT4": ("tl.where(valid, word, 0x3F80)", "word", "damaged token"),
    "window of codes": ("> position[None, :] - window", ">= position[None, :] - window", "window that ends in codes"),
    "first whole page": ("tl.cdiv(unmasked, PAGE_)", "unmasked // PAGE_", "plain"),
    "last whole page": ("coded // PAGE_, whole", "tl.cdiv(coded, PAGE_), whole", "cut"),
    "pages left out": ("(index >= skipped, gap", "(index > skipped, gap", "cut"),
    "masked parameters": ("tl.where(valid, scale, 1.0)", "scale", "damaged token, fp8"),
}


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel_in_interpreter(name):
    assert interpreter_results(__file__)[name] == ""


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
    skip_below(FP8_CAPABILITY)
    case = DecodeCase(kind=kind, heads=(32, 8), dims=(128, 128), lengths=(9000, 1), starts=(0, 700, 5000), dtype=BF16)
    check(case, interpret=False, device="cuda")
    check(replace(case, lengths=(9000, 7), window=4000), interpret=False, device="cuda")


@pytest.mark.gpu
def test_what_runs_on_gpu():
    skip_below(FP8_CAPABILITY)
    query, kv, *_ = CASES["plain"].make("cuda")
    assert decode_refusal(query, kv) is None
    assert "takes bf16 and fp16" in str(decode_refusal(query.float(), kv))
    assert fits_one_launch(query, kv) and not fits_one_launch(query, replace(kv, ring=None))
    assert not fits_one_launch(torch.zeros(1, 4, MAX_ROWS, 64, device="cuda", dtype=FP16), kv)


CHUNKS = {
    "plain": DecodeCase(lengths=(600, 90)),
    "more than stays dense": DecodeCase(lengths=(600, 300), starts=(0, 130, 640)),
    "grouped 9/3": DecodeCase(heads=(9, 3), lengths=(600, 90), starts=(0, 605)),
    "window": DecodeCase(window=70, lengths=(300, 200), starts=(0, 450)),
    "everything": DecodeCase(sinks=True, softcap=4.0, window=300, starts=(0, 150), lengths=(300, 150, 99)),
    "sink logits": DecodeCase(sinks=True, lengths=(600, 33), starts=(0, 620), kind="fp8"),
    "many sinks": DecodeCase(lengths=(400, 60), starts=(5, 100), options={"recent_tokens": 0, "sink_tokens": 150}),
    "nothing coded": DecodeCase(lengths=(20, 60)),
    "head_dim 96, 80": DecodeCase(lengths=(300, 60), dims=(96, 80)),
}


def check_chunks(case: DecodeCase, columns: int, device: str = "cpu") -> None:
    """Parts of so many columns, merged, against the reference; FP32 on a CPU, where nothing is rounded."""
    query, kv, call, sinks, starts = case.make(device)
    out, lse = decode_chunks(query, kv, call, sinks, starts, columns=columns)
    exact, exact_lse = decode_ref(query.double(), kv, call, sinks, starts, dtype=torch.float64)
    blind = exact_lse.isneginf()
    assert torch.equal(lse.isneginf(), blind) and (out[blind] == 0).all()
    assert out.shape == exact.shape and out.transpose(1, 2).is_contiguous()
    eps = torch.finfo(case.dtype).eps
    # Keys and values rounded to the dtype of the query move a logit by eps of each channel, and a value by eps.
    size = spread(query, kv, call, sinks, starts)
    delta = eps * key_size(query, kv, call.scaling)
    error = (out.double() - exact).norm(dim=(-2, -1)).float()
    assert (error <= 2 * (delta + eps) * size + (eps + 1e-5) * exact.float().norm(dim=(-2, -1))).all()
    assert ((lse - exact_lse)[~blind].abs() <= 8 * delta + 1e-5).all()


@pytest.mark.parametrize("columns", [64, 200, 4096])
@pytest.mark.parametrize("name", CHUNKS)
def test_chunks(name, columns):
    check_chunks(replace(CHUNKS[name], dtype=torch.float32), columns)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_on_gpu(name):
    skip_below(FP8_CAPABILITY)
    check_chunks(replace(CHUNKS[name], dtype=BF16), 256, "cuda")


def test_what_runs_on_cpu():
    query, kv, *_ = CASES["plain"].make()
    assert decode_refusal(query, kv) == "device is cpu, the kernel needs cuda"
