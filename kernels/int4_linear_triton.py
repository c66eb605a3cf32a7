"""Triton kernel for linear layers with INT4 weights, portable: FP8, 16 or 32 bit activations in their natural order.

A program computes the transposed tile Yᵀ = W·Xᵀ of BLOCK_N outputs × BLOCK_M tokens, with the unpacked weight as the
left operand, the one that WGMMA can read from registers. A byte of packed weights holds two neighbouring channels, so
activations are read as pairs: the low halves of a tile of pairs are its even channels, the high halves the odd ones,
and a K block is two products without interleaving anything. Codes q are exact in every operand type. FP8 activations
with groups of fewer than 64 are multiplied as bf16, also exactly: half of such a group is too short for an FP8 product.

A K block never crosses a group: it is multiplied into a fresh accumulator, which is then scaled and added in FP32. That
is also what bounds the error of Hopper's FP8 accumulator, which keeps about 14 bits: it never sums more than 128
products. With one scale per row, 16 and 32 bit products go straight into the accumulator and are scaled at the end.

Where there are fewer tiles than multiprocessors, K is split over programs; their FP32 results are added in order by
torch, so that they do not depend on timing.
"""

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

OPERANDS = {
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}
INTERPRETED = 16
"""Multiprocessors the interpreter is taken to have, so that small tests split K as well."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def round_to(values, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """FP32 → dtype to nearest even. The interpreter truncates to bf16, so there the bits are rounded beforehand."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        values = bits.to(tl.float32, bitcast=True)
    return values.to(dtype)


DECODE_PTX = tl.constexpr("""{ .reg .b32 s, m, v;
shr.u32 s, $2, 3; not.b32 s, s; and.b32 s, s, 0x01010101;
mul.lo.u32 m, s, 7; xor.b32 v, $2, m; and.b32 v, v, 0x07070707; mad.lo.u32 $0, s, 129, v;
shr.u32 s, $2, 7; not.b32 s, s; and.b32 s, s, 0x01010101;
mul.lo.u32 m, s, 7; shr.u32 v, $2, 4; xor.b32 v, v, m; and.b32 v, v, 0x07070707; mad.lo.u32 $1, s, 129, v;
}""")
"""Four bytes of two nibbles u → e4m3 codes of q = u − 8 in units of 2⁻⁹, low nibbles in $0 and high ones in $1. With
s = 1 for q < 0, |q| or its complement −q − 1 is (u ^ 7s) & 7, and adding 129·s sets the sign and makes −q of −q − 1."""


@triton.jit
def codes_as(nibbles, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """Stored nibbles u = q + 8, uint8 → q in the operand's type; for FP8 in units of 2⁻⁹, see `DECODE_PTX`.

    16 bit: u in the last bits of 128 (bf16) or 1024 (fp16) is 128 + u or 1024 + u; the subtraction is exact.
    """
    if dtype == tl.float8e4nv:
        negative = (nibbles >> 3) ^ 1
        code = ((nibbles ^ (negative * 7)) & 7) + negative * 129
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    elif INTERPRET or dtype == tl.float32:
        return nibbles.to(tl.float32) - 8.0
    elif dtype == tl.bfloat16:
        return (nibbles.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    else:
        return (nibbles.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1032.0


@triton.jit
def decode(packed, dtype: tl.constexpr, PTX: tl.constexpr, INTERPRET: tl.constexpr):
    """Bytes of two nibbles → codes of the low and of the high ones in the operand's type."""
    if PTX and dtype == tl.float8e4nv:
        low, high = tl.inline_asm_elementwise(
            DECODE_PTX, "=r,=r,r", [packed], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4
        )
        return low.to(dtype, bitcast=True), high.to(dtype, bitcast=True)
    else:
        return codes_as(packed & 0xF, dtype, INTERPRET), codes_as(packed >> 4, dtype, INTERPRET)


@triton.jit
def half_of(pairs, SHIFT: tl.constexpr, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """The even (SHIFT 0) or odd channels of pairs, as the operand's type; FP32 in the interpreter for 16 bit."""
    if dtype == tl.float8e4nv:
        values = (pairs >> SHIFT).to(tl.uint8).to(dtype, bitcast=True)
    elif dtype == tl.float32:
        values = (pairs >> SHIFT).to(tl.int32).to(dtype, bitcast=True)
    else:
        values = (pairs >> SHIFT).to(tl.int16).to(dtype, bitcast=True)
        if INTERPRET:
            # bf16 products are garbage in the interpreter; in FP32 the same products are exact.
            values = values.to(tl.float32)
    return values


@triton.jit
def int4_matmul_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    bias_ptr,
    y_ptr,
    tokens,
    out_features,
    in_pairs,
    blocks_per_group,
    stride_x,
    stride_weight,
    stride_scale,
    OPERAND: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUPED: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PTX: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """x_ptr: pairs of channels as integers. in_pairs: ⌈in_features / 2⌉. stride_x in pairs, stride_weight in bytes.
    SPLIT > 1: y_ptr is (SPLIT, tokens, out_features) fp32. SCALED: x has a scale per token.
    """
    FP8: tl.constexpr = BITS == 8
    output = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_n = output < out_features
    inside_m = token < tokens
    weight_rows = weight_ptr + output[:, None] * stride_weight
    x_columns = x_ptr + token[None, :] * stride_x
    scale_rows = weight_scale_ptr + output * stride_scale
    offset = tl.arange(0, BLOCK_PAIRS)

    accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    blocks = tl.cdiv(in_pairs, BLOCK_PAIRS)
    share = tl.cdiv(blocks, SPLIT)
    first = tl.program_id(2) * share
    for block in range(first, tl.minimum(first + share, blocks)):
        pair = block * BLOCK_PAIRS + offset
        inside_k = pair < in_pairs
        packed = tl.load(weight_rows + pair[None, :], mask=inside_n[:, None] & inside_k[None, :], other=0)
        # Masked activations are zero, so whatever code stands in a masked weight adds nothing.
        pairs = tl.load(x_columns + pair[:, None], mask=inside_k[:, None] & inside_m[None, :], other=0)
        even = half_of(pairs, 0, OPERAND, INTERPRET)
        odd = half_of(pairs, BITS, OPERAND, INTERPRET)
        low, high = decode(packed, OPERAND, PTX, INTERPRET)
        if GROUPED:
            product = tl.dot(low, even, input_precision="ieee", out_dtype=tl.float32)
            product = tl.dot(high, odd, product, input_precision="ieee", out_dtype=tl.float32)
            scale = tl.load(scale_rows + block // blocks_per_group, mask=inside_n, other=0.0).to(tl.float32)
            accumulator += product * scale[:, None]
        elif FP8:
            product = tl.dot(low, even, input_precision="ieee", out_dtype=tl.float32)
            accumulator += tl.dot(high, odd, product, input_precision="ieee", out_dtype=tl.float32)
        else:
            accumulator = tl.dot(low, even, accumulator, input_precision="ieee", out_dtype=tl.float32)
            accumulator = tl.dot(high, odd, accumulator, input_precision="ieee", out_dtype=tl.float32)

    if not GROUPED:
        scale = tl.load(scale_rows, mask=inside_n, other=0.0).to(tl.float32)
        accumulator *= scale[:, None]
    if FP8:
        accumulator *= 512.0
    if SCALED:
        x_scale = tl.load(x_scale_ptr + token, mask=inside_m, other=0.0)
        accumulator *= x_scale[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + output, mask=inside_n, other=0.0).to(tl.float32)
        accumulator += bias[:, None]
    part = tl.program_id(2).to(tl.int64) * tokens + token
    y_ptrs = y_ptr + part[None, :] * out_features + output[:, None]
    y = round_to(accumulator, y_ptr.dtype.element_ty, INTERPRET)
    tl.store(y_ptrs, y, mask=inside_n[:, None] & inside_m[None, :])


@dataclass(frozen=True)
class LaunchConfig:
    """Tiles and launch options of one call. block_pairs: channels of a K block, halved. split: programs per tile."""

    block_m: int
    block_n: int
    block_pairs: int
    split: int
    num_warps: int
    num_stages: int


def launch_config(
    tokens: int, out_features: int, in_features: int, groups: int, element_size: int, processors: int
) -> LaunchConfig:
    """Tiles for a (tokens, in_features) × (out_features, in_features) call; `processors`: multiprocessors.

    µs on an H200 with bf16 and one scale per row, 14336×4096, at 1 / 16 / 64 / 128 tokens: 21 / 21 / 34 / 58, with
    groups of 128 28 / 28 / 48 / 64; cuBLAS bf16 takes 31 / 31 / 34 / 34.
    """
    block_m = min(128, max(16, triton.next_power_of_2(tokens)))
    block_pairs = 64 if groups == 1 else gcd(in_features // groups, 128) // 2
    block_n, num_warps, num_stages = 64, 4, 3
    if element_size == 4:
        block_m, block_pairs = min(64, block_m), min(block_pairs, 32)
    elif element_size == 2 and block_m == 16:
        block_n, block_pairs, num_stages = (64, 128, 3) if groups == 1 else (128, block_pairs, 4)
    elif element_size == 2:
        wide = groups == 1 or block_m == 128
        block_n, num_warps = (128, 8) if wide else (64, 4)
        block_pairs = min(block_pairs, 32) if block_m == 128 else block_pairs
    programs = triton.cdiv(out_features, block_n) * triton.cdiv(tokens, block_m)
    blocks = triton.cdiv(in_features, 2 * block_pairs)
    split = 1
    while 2 * split * programs <= 2 * processors and blocks >= 4 * split and split < 8:
        split *= 2
    return LaunchConfig(block_m, block_n, block_pairs, split, num_warps, num_stages)


def int4_matmul(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    x_scale: Tensor | None,
    out_dtype: torch.dtype,
    interpret: bool = False,
) -> Tensor:
    """x: (tokens, in) float8_e4m3fn with x_scale: (tokens, 1) fp32, or bf16, fp16, fp32 without; y: (tokens, out)."""
    tokens, in_features = x.shape
    out_features, groups = weight_scale.shape
    if tokens * out_features == 0:
        return torch.empty((tokens, out_features), dtype=out_dtype, device=x.device)
    if x.element_size() == 1 and groups > 1 and in_features // groups % 64:
        x = x.to(torch.bfloat16)
    pairs = as_pairs(x)
    weight_packed = weight_packed if weight_packed.stride(1) == 1 else weight_packed.contiguous()
    weight_scale = weight_scale if weight_scale.stride(1) == 1 else weight_scale.contiguous()
    processors = INTERPRETED if interpret else torch.cuda.get_device_properties(x.device).multi_processor_count
    config = launch_config(tokens, out_features, in_features, groups, x.element_size(), processors)
    split = config.split
    shape, dtype = ((tokens, out_features), out_dtype) if split == 1 else ((split, tokens, out_features), torch.float32)
    y = torch.empty(shape, dtype=dtype, device=x.device)
    grid = (triton.cdiv(out_features, config.block_n), triton.cdiv(tokens, config.block_m), split)
    int4_matmul_kernel[grid](
        pairs,
        x_scale,
        weight_packed.view(torch.uint8),
        weight_scale,
        None if bias is None or split > 1 else bias.contiguous(),
        y,
        tokens,
        out_features,
        pairs.shape[1],
        triton.cdiv(in_features // groups, 2 * config.block_pairs),
        pairs.stride(0),
        4 * weight_packed.stride(0),
        weight_scale.stride(0),
        OPERAND=OPERANDS[x.dtype],
        BITS=8 * x.element_size(),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_PAIRS=config.block_pairs,
        SPLIT=split,
        GROUPED=groups > 1,
        SCALED=x_scale is not None,
        HAS_BIAS=bias is not None and split == 1,
        PTX=not interpret and torch.version.hip is None,
        INTERPRET=interpret,
        # A multiply-add is one instruction; a later Triton leaves that to be asked for.
        enable_fp_fusion=True,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if split == 1:
        return y
    total = y.sum(0)
    return (total if bias is None else total + bias.float()).to(out_dtype)


def as_pairs(x: Tensor) -> Tensor:
    """(tokens, in_features) → (tokens, ⌈in_features / 2⌉) integers of two channels each, the even one in the low half.

    A view wherever rows are contiguous and start at a whole pair.
    """
    if x.shape[1] % 2:
        x = torch.nn.functional.pad(x.contiguous().view(INTEGERS[x.element_size()]), (0, 1))
    elif x.stride(1) != 1 or x.stride(0) % 2 or x.storage_offset() % 2:
        # A single row counts as contiguous wherever it starts.
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(INTEGERS[2 * x.element_size()])
