"""Launch of the prefill attention kernel for Hopper: which calls it takes, and what it is given.

The kernel stands in `attention_hopper_triton.py`, the specification in `attention.py` (`attention_ref`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attention_quant import LEVELS, MIN_SCALE, TILE, padded_tokens
from .segments import Segments
from .w4a8_hopper import LOADER_REGISTERS, descriptor

if TYPE_CHECKING:
    from .attention import Call

BLOCK_M = 128
"""Queries of a program, 64 for each of its two warpgroups."""
HEAD_DIMS = (64, 128)
REGISTERS = 168
"""Per thread, on average over the program: the most that leave room for three warpgroups."""
CONSUMER_REGISTERS = 240
STAGES = 4
"""Tiles of keys and of values in flight; with three or five a call takes as long."""


def attention_hopper(
    query: Tensor, key: Tensor, value: Tensor, call: Call, sinks: Tensor | None, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """Launch without checks, for modes with FP8 values and equal head dimensions of `HEAD_DIMS`.

    Returns out (batch, queries, heads, head_dim), and lse.
    """
    from .attention import KEY_KINDS
    from .attention_hopper_triton import attention_hopper_kernel
    from .attention_quant_triton import quantize_keys_values
    from .attention_triton import outputs

    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    kind = KEY_KINDS[call.mode]
    bounds = None if segments is None else segments.key_bounds(batch)
    coded, coded_values = quantize_keys_values(key, value, kind, True, bounds)
    assert coded is not None and coded_values is not None and kind in ("int8", "fp8")
    # Where there are more queries than keys, some may see none of them.
    out, lse = outputs(query, head_dim, filled=segments is not None or queries > keys)
    count = batch if segments is None else len(segments.table)
    tiles = -(-(queries if segments is None else segments.max_queries) // BLOCK_M)
    items = tiles * heads * count
    if items == 0:
        return out, lse
    programs = min(items, torch.cuda.get_device_properties(query.device).multi_processor_count)
    launch: Any = attention_hopper_kernel[(programs,)]
    launch(
        descriptor(coded.codes.view(-1, head_dim), TILE, head_dim),
        descriptor(coded_values.codes.view(batch * kv_heads * head_dim, -1), head_dim, TILE),
        query,
        coded.scale,
        coded.mean,
        coded_values.scale,
        coded_values.mean,
        sinks,
        None if segments is None else segments.table,
        out,
        lse,
        *query.stride()[:3],
        queries,
        keys,
        padded_tokens(keys),
        tiles,
        heads,
        heads // kv_heads,
        count,
        items,
        call.window or 0,
        call.scaling,
        INT8=kind == "int8",
        CAUSAL=call.causal,
        WINDOW=call.window is not None,
        SINKS=sinks is not None,
        SEGMENTS=segments is not None,
        HEAD_DIM=head_dim,
        LEVELS=LEVELS[kind],
        MIN=MIN_SCALE,
        STAGES=STAGES,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        LOADER=LOADER_REGISTERS,
        # A multiply-add is one instruction; a later Triton leaves that to be asked for.
        enable_fp_fusion=True,
        num_warps=4,
        maxnreg=REGISTERS,
    )
    return out, lse
