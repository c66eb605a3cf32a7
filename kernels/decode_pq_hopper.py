"""Launch of the kernels over product-quantized pages on Hopper, and which calls they take.

Few queries of a KV head are read by `decode_pq_warps_triton.py`, more of them by `decode_pq_hopper_triton.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .int4_linear import hopper_refusal

if TYPE_CHECKING:
    from .decode_attention import Reading
    from .kv_pq import PQCodec

WORDS = (32, 64)
"""Words of two channels in a token that the kernels are laid out for."""
WARP_ROWS = 8
"""Queries of a KV head that warps hold each for themselves."""


def hopper_pq_refusal(query: Tensor, call: Reading, codec: PQCodec) -> str | None:
    """Why the plain kernel reads the pages of a call; None if this one does."""
    refusal = hopper_refusal(query.device)
    if refusal is not None:
        return refusal
    words = {part.centroids.shape[1] * part.centroids.shape[3] // 2 for part in (codec.keys, codec.values)}
    if len(words) > 1 or not words <= set(WORDS):
        return f"tokens of {sorted(words)} words have no tile; it is made for {WORDS}"
    if codec.keys.centroids.shape[1] * codec.keys.centroids.shape[3] != codec.keys.mean.shape[1]:
        return "sub-vectors differ in their channels"
    if call.window is not None or call.softcap is not None:
        return "windows and soft caps are left to the plain kernel"
    return None


def decode_pq_hopper(
    grid: tuple[int, int], beginning: tuple[Any, ...], heads: int, sink_tokens: int, codec: PQCodec, **options: Any
) -> None:
    """beginning: what `decode_pq_triton.decode_pq_kernel` is given first, up to the number of splits."""
    vectors = codec.keys.centroids.shape[1]
    options |= {"VECTORS": vectors, "VALUES": codec.layout(*dims(codec)).offsets[2]}
    few = options["QUERIES"] * options["GROUP"] <= WARP_ROWS
    (launch_warps if few else launch_blocks)(grid, (*beginning, heads, sink_tokens), options)


def launch_blocks(grid: tuple[int, int], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Any number of queries."""
    from .decode_pq_hopper_triton import decode_pq_hopper_kernel

    warps = 8 if options["VECTORS"] * options["SUB"] == 2 * WORDS[1] else 4
    launch: Any = decode_pq_hopper_kernel[grid]
    launch(*arguments, WARPS=warps, num_warps=warps, **options)


def launch_warps(grid: tuple[int, int], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Few queries."""
    from .decode_pq_warps_triton import WARPS, decode_pq_warps_kernel

    launch: Any = decode_pq_warps_kernel[grid]
    launch(*arguments, num_warps=WARPS, **options)


def dims(codec: PQCodec) -> tuple[int, int]:
    """Channels of keys and of values."""
    return codec.keys.mean.shape[1], codec.values.mean.shape[1]
