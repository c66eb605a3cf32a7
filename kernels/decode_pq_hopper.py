"""Launch of the kernel over product-quantized pages on Hopper, `decode_pq_hopper_triton.py`; which calls it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .int4_linear import hopper_refusal

if TYPE_CHECKING:
    from .decode_attention import Reading
    from .kv_pq import PQCodec

WORDS = (32, 64)
"""Words of two channels in a token that the kernel is laid out for."""


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
    from .decode_pq_hopper_triton import decode_pq_hopper_kernel

    vectors = codec.keys.centroids.shape[1]
    warps = 8 if vectors * options["SUB"] == 2 * WORDS[1] else 4
    launch: Any = decode_pq_hopper_kernel[grid]
    launch(
        *beginning, heads, sink_tokens, VECTORS=vectors, VALUES=codec.layout(*dims(codec)).offsets[2], WARPS=warps,
        num_warps=warps, **options,
    )  # fmt: skip


def dims(codec: PQCodec) -> tuple[int, int]:
    """Channels of keys and of values."""
    return codec.keys.mean.shape[1], codec.values.mean.shape[1]
