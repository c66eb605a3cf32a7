"""Triton kernel of `rotary.py`: one program per token and a few heads, first those of queries, then those of keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .int4_linear_triton import round_to

HEADS = 4
"""Heads per program: with a head_dim of 128 every thread of one warp has one 16-byte load for each half."""


@triton.jit
def rotate_heads(
    x_ptr, out_ptr, stride_head, out_stride_head, first, heads, cos1, sin1, cos2, sin2,
    HALF: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Heads from `first` on of one token; cos and sin: (1, WIDTH) FP32."""
    column = tl.arange(0, WIDTH)[None, :]
    head = first + tl.arange(0, HEADS)[:, None]
    inside = (head < heads) & (column < HALF)
    place = x_ptr + head.to(tl.int64) * stride_head + column
    x1, x2 = tl.load(place, mask=inside, other=0.0), tl.load(place + HALF, mask=inside, other=0.0)
    dtype: tl.constexpr = x1.dtype
    x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
    # Every product is rounded as torch rounds it; the launch forbids to fuse those of FP32 with the sum.
    y1 = round_to(x1 * cos1, dtype, INTERPRET).to(tl.float32) - round_to(x2 * sin1, dtype, INTERPRET).to(tl.float32)
    y2 = round_to(x2 * cos2, dtype, INTERPRET).to(tl.float32) + round_to(x1 * sin2, dtype, INTERPRET).to(tl.float32)
    place = out_ptr + head.to(tl.int64) * out_stride_head + column
    tl.store(place, round_to(y1, dtype, INTERPRET), mask=inside)
    tl.store(place + HALF, round_to(y2, dtype, INTERPRET), mask=inside)


@triton.jit
def rotary_kernel(
    query_ptr, key_ptr, query_out_ptr, key_out_ptr, cos_ptr, sin_ptr, tokens, num_heads, num_kv_heads,
    query_batch, query_head, query_token, key_batch, key_head, key_token,
    query_out_batch, query_out_head, query_out_token, key_out_batch, key_out_head, key_out_token,
    cos_batch, cos_token, sin_batch, sin_token,
    HALF: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Strides are named after tensor and dimension."""
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    inside = column < HALF
    place = cos_ptr + batch * cos_batch + token * cos_token + column
    cos1 = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    cos2 = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    place = sin_ptr + batch * sin_batch + token * sin_token + column
    sin1 = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    sin2 = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)

    first = tl.program_id(1) * HEADS
    query_end = tl.cdiv(num_heads, HEADS) * HEADS
    if first < query_end:
        rotate_heads(
            query_ptr + batch * query_batch + token * query_token,
            query_out_ptr + batch * query_out_batch + token * query_out_token,
            query_head, query_out_head, first, num_heads, cos1, sin1, cos2, sin2,
            HALF, WIDTH, HEADS, INTERPRET,
        )  # fmt: skip
    else:
        rotate_heads(
            key_ptr + batch * key_batch + token * key_token,
            key_out_ptr + batch * key_out_batch + token * key_out_token,
            key_head, key_out_head, first - query_end, num_kv_heads, cos1, sin1, cos2, sin2,
            HALF, WIDTH, HEADS, INTERPRET,
        )  # fmt: skip


def strides(x: Tensor) -> list[int]:
    """Of all dimensions but the last; 0 where there is one entry: what torch says there may hide an alignment."""
    return [stride if size > 1 else 0 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interpret: bool = False) -> tuple[Tensor, Tensor]:
    """As `rotary.apply_rotary`; the values of a head are adjacent."""
    batch, num_heads, tokens, head_dim = query.shape
    outputs = torch.empty_like(query), torch.empty_like(key)
    blocks = triton.cdiv(num_heads, HEADS) + triton.cdiv(key.shape[1], HEADS)
    if batch * tokens * blocks:
        tensors = (query, key, *outputs, cos, sin)
        places = [stride for tensor in tensors for stride in strides(tensor)]
        width = triton.next_power_of_2(head_dim // 2)
        rotary_kernel[(batch * tokens, blocks)](
            *tensors, tokens, num_heads, key.shape[1], *places,
            HALF=head_dim // 2, WIDTH=width, HEADS=HEADS, INTERPRET=interpret, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return outputs
