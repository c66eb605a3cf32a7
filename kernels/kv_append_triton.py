"""Triton kernel of `kv_append.py`: one program per row and KV head; the last one to be done moves the lengths on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .kv_pages_triton import PAGE_, constants, write_keys, write_values

if TYPE_CHECKING:
    from .kv_append import Appendable


@triton.jit
def put(source, ring, sinks, slot, sink, is_sink, ring_stride, sink_stride, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """One token of one row and head into the ring and, if it is one, among the sinks."""
    channel = tl.arange(0, WIDTH)
    inside = channel < DIM
    x = tl.load(source + channel, mask=inside)
    tl.store(ring + slot * ring_stride + channel, x, mask=inside)
    if is_sink:
        tl.store(sinks + sink * sink_stride + channel, x, mask=inside)


@triton.jit(do_not_specialize=["heads", "ring_length", "sink_tokens", "recent_tokens"])
def append_kernel(
    key_ptr, value_ptr, ring_key, ring_value, sink_key, sink_value, sink_start_ptr, table_ptr, mean_ptr, factor_ptr,
    length_ptr, kb, kh, vb, vh, rkb, rkh, rkt, rvb, rvh, rvt, skb, skh, skt, svb, svh, svt,
    heads, ring_length, sink_tokens, recent_tokens,
    KIND: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_PARAMETERS: tl.constexpr,
    VALUES: tl.constexpr, VALUE_PARAMETERS: tl.constexpr, RECORD: tl.constexpr, MEAN: tl.constexpr,
    FACTORS: tl.constexpr, ROTATE: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (batch · KV heads,)."""
    plane = tl.program_id(0).to(tl.int64)
    batch, kv_head = plane // heads, plane % heads
    tokens, coded = tl.load(length_ptr), tl.load(length_ptr + 1)
    sink = tokens - tl.load(sink_start_ptr + batch).to(tl.int32)
    is_sink = (sink >= 0) & (sink < sink_tokens)
    slot = tokens % ring_length
    keys, values = ring_key + batch * rkb + kv_head * rkh, ring_value + batch * rvb + kv_head * rvh
    put(
        key_ptr + batch * kb + kv_head * kh, keys, sink_key + batch * skb + kv_head * skh, slot, sink, is_sink,
        rkt, skt, HEAD_DIM, WIDTH,
    )  # fmt: skip
    put(
        value_ptr + batch * vb + kv_head * vh, values, sink_value + batch * svb + kv_head * svh, slot, sink, is_sink,
        rvt, svt, VALUE_DIM, VALUE_WIDTH,
    )  # fmt: skip
    page = coded // PAGE_
    end = page * PAGE_ + PAGE_
    if tokens + 1 - end >= recent_tokens:
        # The token that was just put there may be among those that are coded.
        tl.debug_barrier()
        record = tl.multiple_of((tl.load(table_ptr + page) + plane * RECORD).to(tl.pointer_type(tl.uint8)), 16)
        token = tl.arange(0, PAGE_)
        column = page * PAGE_ + token
        write = column >= coded
        source = column % ring_length
        write_keys(
            keys, rkt, source, token, write, record, mean_ptr, factor_ptr, kv_head,
            KIND, HEAD_DIM, KEY_PARAMETERS, MEAN, FACTORS, ROTATE, WIDTH, INTERPRET,
        )  # fmt: skip
        write_values(
            values, rvt, source, token, write, page, coded, end, record,
            KIND, VALUE_DIM, VALUES, VALUE_PARAMETERS, VALUE_WIDTH, INTERPRET,
        )  # fmt: skip
        coded = end
    # All threads have read the lengths before this program counts as done.
    tl.debug_barrier()
    if tl.atomic_add(length_ptr + 2, 1) == tl.num_programs(0) - 1:
        tl.store(length_ptr, tokens + 1)
        tl.store(length_ptr + 1, coded)
        tl.store(length_ptr + 2, 0)


def append_triton(key: Tensor, value: Tensor, to: Appendable, *, interpret: bool = False) -> None:
    """Launch without checks of `kv_append.append_token`."""
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    batch, heads = key.shape[:2]
    pages = to.pages
    mean, factors = (None, None) if pages.key_map is None else (pages.key_map.mean, pages.key_map.factors)
    strides = [tensor.stride()[:3] for tensor in (*to.ring, *to.sinks)]
    append_kernel[(batch * heads,)](
        key, value, *to.ring, *to.sinks, to.sink_starts, pages.table(), mean, factors, to.lengths,
        *key.stride()[:2], *value.stride()[:2], *(stride for three in strides for stride in three),
        heads, to.ring[0].shape[2], to.sinks[0].shape[2], to.recent_tokens, INTERPRET=interpret,
        **constants(pages.layout, pages.key_map),
    )  # fmt: skip
