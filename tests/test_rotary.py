"""Rotary embedding: the reference against transformers' own, the Triton kernel against both, bit for bit."""

import functools
import importlib.util
from unittest import mock

import pytest
import torch
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import BF16, DTYPES, FP16, FP32, fill_poison, same_bits, skip_below, with_gap
from torch import Tensor

from kompakt.kernels.rotary import ROTARY_CAPABILITY, apply_rotary, apply_rotary_ref

KERNEL = "kompakt.kernels.rotary_triton"
# batch, heads, KV heads, tokens, head_dim
SHAPES = [(1, 1, 1, 1, 2), (2, 5, 3, 7, 12), (1, 9, 2, 1, 80), (3, 4, 4, 2, 64), (2, 32, 8, 1, 128), (0, 4, 2, 3, 16)]
LAYOUTS = ("model", "contiguous", "sliced", "gap")


def eager(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """As transformers' Llama has it."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return apply_rotary_pos_emb(query, key, cos, sin)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str = "cpu") -> list[Tensor]:
    batch, heads, kv_heads, tokens, head_dim = shape
    random = torch.Generator().manual_seed(sum(shape))

    def make(*sizes: int) -> Tensor:
        x = torch.randn(sizes, generator=random)
        x.view(-1)[::11] *= 100.0
        x.view(-1)[5::13] = 0.0
        return x.to(device, dtype)

    if layout == "model":  # heads behind tokens in memory
        query, key = make(batch, tokens, heads, head_dim), make(batch, tokens, kv_heads, head_dim)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
    elif layout == "sliced":  # of one projection
        both = make(batch, tokens, heads + kv_heads, head_dim).transpose(1, 2)
        query, key = both[:, :heads], both[:, heads:]
    else:
        query, key = make(batch, heads, tokens, head_dim), make(batch, kv_heads, tokens, head_dim)
        if layout == "gap":
            query, key = with_gap(query), with_gap(key)
    # The halves differ, as those of no model do, so that each is seen to be read.
    cos, sin = make(batch if layout == "model" else 1, tokens, head_dim), make(1, tokens, head_dim)
    return [query, key, cos, with_gap(sin)]


def same_layout(got: Tensor, expected: Tensor) -> bool:
    """Strides, where there is more than one entry."""
    return all(
        size < 2 or one == other for size, one, other in zip(got.shape, got.stride(), expected.stride(), strict=True)
    )


def check(tensors: list[Tensor], *, interpret: bool) -> None:
    kept = [tensor.clone() for tensor in tensors]
    with mock.patch("torch.empty_like", lambda x: fill_poison(x, real_empty=EMPTY_LIKE)):
        got = apply_rotary(*tensors, interpret=interpret)
    expected = apply_rotary_ref(*tensors) if interpret else eager(*tensors)
    for name, one, other in zip(("query", "key"), got, expected, strict=True):
        assert same_bits(one, other), name
        assert one.numel() == 0 or same_layout(one, other), name
    assert all(map(torch.equal, tensors, kept))


EMPTY_LIKE = torch.empty_like
INTERPRETER_CASES = {
    f"{name}-{layout}-{'x'.join(map(str, shape))}": functools.partial(
        check, inputs(shape, DTYPES[name], layout), interpret=True
    )
    for shape in SHAPES
    for layout, names in (("model", DTYPES), ("contiguous", ["bf16"]), ("sliced", ["fp16"]), ("gap", ["fp32"]))
    for name in names
    if layout == "model" or shape[3] > 1
}
MUTATIONS = {
    # None of them writes where it must not.
    "last head left out": ("(head < heads)", "(head < heads - 1)", "bf16-contiguous-2x5x3x7x12"),
    "last column left out": ("column < HALF)", "column < HALF - 1)", "bf16-model-2x5x3x7x12"),
    "column behind the last of cos": ("HALF, mask=inside", "HALF + 1, mask=inside", "bf16-model-2x5x3x7x12"),
    "first head of keys": ("first - query_end, num_kv_heads", "first * 0, num_kv_heads", "fp32-model-2x32x8x1x128"),
    "token of queries": ("query_batch + token", "query_batch + 0 * token", "bf16-contiguous-3x4x4x2x64"),
    "token of cos": ("token * cos_token", "0 * cos_token", "bf16-model-3x4x4x2x64"),
    "batch of cos": ("batch * cos_batch", "0 * cos_batch", "bf16-model-3x4x4x2x64"),
    "stride of sin": ("token * sin_token", "token * cos_token", "bf16-contiguous-3x4x4x2x64"),
    "halves of cos": ("cos2 = tl.load(place + HALF", "cos2 = tl.load(place", "fp32-model-3x4x4x2x64"),
    "sign": ("- round_to(x2 * sin1", "+ round_to(x2 * sin1", "fp32-model-1x1x1x1x2"),
    "product that is not rounded": ("round_to(x1 * sin2, dtype, INTERPRET)", "(x1 * sin2)", "bf16-model-2x32x8x1x128"),
    "stride of the result": ("* out_stride_head", "* (out_stride_head - 1)", "fp32-gap-2x5x3x7x12"),
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel_in_interpreter(name):
    assert interpreter_results(__file__)[name] == ""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_reference(dtype, layout):
    for shape in SHAPES:
        check(inputs(shape, dtype, layout), interpret=False)


def changed(which: int, change) -> list[Tensor]:
    tensors = inputs((2, 4, 2, 3, 16), BF16, "model")
    tensors[which] = change(tensors[which])
    return tensors


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed(0, Tensor.float), "query torch.float32, key torch.bfloat16"),
        ([x.double() for x in changed(0, Tensor.clone)], "cos torch.float64"),
        (changed(2, Tensor.float), "cos torch.float32"),
        (changed(1, lambda x: x[:1]), r"key \(1, 2, 3, 16\)"),
        (changed(1, lambda x: x[..., :8]), r"key \(2, 2, 3, 8\)"),
        (changed(3, lambda x: x[..., :8]), r"sin \(1, 3, 8\)"),
        (changed(3, lambda x: x[:, :2]), r"sin \(1, 2, 16\)"),
        (changed(0, lambda x: x[0]), r"query \(4, 3, 16\)"),
        ([x[..., :15] for x in changed(0, Tensor.clone)], "head_dim even"),
        (changed(2, lambda x: x.to("meta")), "devices are cpu, cpu, meta, cpu"),
    ],
)
def test_wrong_arguments_are_refused(tensors, message):
    with pytest.raises(ValueError, match=message):
        apply_rotary(*tensors)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("dtype", "head_dim"), [(BF16, 64), (BF16, 128), (FP16, 256), (FP32, 128)], ids=str)
def test_kernel_compiles(dtype, head_dim):
    from compile_cases import SM80, SM90, compile_launch, fits, meta, stack_bytes

    from kompakt.kernels import rotary_triton

    def call() -> None:
        query, key = (meta(2, 1, heads, head_dim, dtype=dtype).transpose(1, 2) for heads in (32, 8))
        cos = meta(2, 1, head_dim, dtype=dtype)
        rotary_triton.rotate(query, key, cos, cos)

    for target in (SM90, SM80):
        compiled = compile_launch(rotary_triton, "rotary_kernel", call, target, constant_ones=True)
        assert fits(compiled, target)
        ptx = compiled.asm["ptx"]
        # A product of FP32 that is fused with the sum is not rounded.
        assert "fma.rn.f32" not in ptx
        width = min(4, rotary_triton.HEADS * head_dim // 2 * dtype.itemsize // 4 // 32)
        assert f"ld.global.v{width}.b32" in ptx and f"st.global.v{width}.b32" in ptx
        if target == SM90:
            assert stack_bytes(compiled) == 0


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (1, 9, 1, 3, 64)], ids=str)
def test_sizes_that_are_constants_compile(shape):
    """A launch makes constants of integers that are 1."""
    from compile_cases import SM90, compile_launch, fits

    from kompakt.kernels import rotary_triton

    tensors = [tensor.to("meta") for tensor in inputs(shape, BF16, "model")]

    def call() -> None:
        rotary_triton.rotate(*tensors)

    assert fits(compile_launch(rotary_triton, "rotary_kernel", call, SM90, constant_ones=True), SM90)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_kernel_on_gpu(dtype, layout):
    skip_below(ROTARY_CAPABILITY)
    for shape in (*SHAPES, (2, 32, 8, 333, 128), (1, 7, 1, 17, 256)):
        check(inputs(shape, dtype, layout, "cuda"), interpret=False)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_heads_that_are_not_adjacent_on_gpu():
    skip_below(ROTARY_CAPABILITY)
    tensors = inputs((2, 4, 2, 3, 16), BF16, "contiguous", "cuda")
    tensors[0] = tensors[0].transpose(2, 3).contiguous().transpose(2, 3)
    for one, other in zip(apply_rotary(*tensors), apply_rotary_ref(*tensors), strict=True):
        assert same_bits(one, other)
