"""Launch of the kernel over pruned pages on Hopper, `decode_prune_warps_triton.py`, and which calls it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .int4_linear import hopper_refusal

if TYPE_CHECKING:
    from .decode_attention import CompressedKV, Reading
    from .kv_prune import PruneLayout

DIMS = (64, 128)
"""Channels of a head that the kernel is laid out for."""
MAX_ROWS = 16
"""Queries of a KV head that a warp holds."""


def hopper_prune_refusal(query: Tensor, call: Reading, layout: PruneLayout, rows: int) -> str | None:
    """Why the plain kernel reads the pages of a call; None if this one does."""
    refusal = hopper_refusal(query.device)
    if refusal is not None:
        return refusal
    if layout.keys.values != "bf16":
        return f"values of {layout.keys.values} are left to the plain kernel"
    if layout.key_dim != layout.value_dim or layout.key_dim not in DIMS:
        return f"heads of {layout.key_dim} and {layout.value_dim} channels have no tile; it is made for {DIMS}"
    if call.window is not None or call.softcap is not None:
        return "windows and soft caps are left to the plain kernel"
    if rows > MAX_ROWS:
        return f"{rows} queries of a KV head are more than a warp's {MAX_ROWS}"
    return None


def decode_prune_hopper(
    grid: tuple[int, int],
    query: Tensor,
    kv: CompressedKV,
    call: Reading,
    key_starts: Tensor | None,
    results: tuple[Tensor, Tensor],
    layout: PruneLayout,
    **marks: Any,
) -> None:
    """Reads the pages. grid: (planes, splits). results: parts and state as of `decode_prune_triton.py`'s kernel."""
    from .decode_prune_warps_triton import WARPS, decode_prune_warps_kernel

    launch: Any = decode_prune_warps_kernel[grid]
    launch(
        query, kv.pages.table(), kv.lengths, kv.sink_starts, key_starts, *results, *query.stride()[:3], kv.coded,
        kv.first, grid[1], query.shape[1], kv.sink_key.shape[2], call.scaling, RECORD=layout.record_bytes,
        KEY_KEPT=layout.keys.kept, VALUE_KEPT=layout.values.kept, VALUES=layout.offsets[2], DIM=layout.key_dim,
        num_warps=WARPS, **marks,
    )  # fmt: skip
