"""How long attention takes by each choice for its slot: at least, by bytes and multiplications, or measured.

Measured times are those of `bench decode` and `bench attention`: one layer of the model's heads on random numbers, by
what transformers runs where the slot is empty, results checked first. They hold for models all of whose layers attend
to everything; others are reckoned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..kernels.attention import Mode
from .attention_cases import Case
from .attention_speed import attention_speed
from .ceilings import DeviceCeilings, Work, rate_of
from .decode_contenders import MIN_LENGTH, DecodeCase
from .decode_speed import decode_speed
from .device_speed import Machine
from .planning import kv_shape
from .recipe import Recipe
from .search_slots import ATTENTION, EMPTY, SlotSpace

KINDS = {"kv_fp8": "fp8", "kv_int4": "int4", "kv_pq 4 bits": "pq4"}
"""Caches as `bench decode` calls them."""
DENSE = "transformers"
"""The peer that an empty slot runs by."""


def cache_seconds(work: Work, device: DeviceCeilings, sequences: int, context: int) -> float:
    """Attention of a step: its caches are read, and multiplied with."""
    busy = sequences * work.decode_pairs(context) * work.attention_flops / device.bf16
    return max(sequences * work.cache[context] / device.bandwidth, busy)


def prefill_seconds(work: Work, device: DeviceCeilings, sequences: int, context: int) -> float:
    """Attention of prompts."""
    return sequences * work.prefill_pairs(context) * work.attention_flops / rate_of(device, work.attention_rate)


def unmeasured(work: Work, space: SlotSpace, context: int) -> str | None:
    """Why attention is not measured; None if it can be."""
    if space.choices[0].key != EMPTY:
        return f"the recipe fills {space.slot} itself"
    if space.slot == "attention" and work.sparse:
        return "the recipe's is sparse"
    if any(window is not None for window in work.windows):
        return "some layers have a window"
    if space.slot == "kv_cache" and context < MIN_LENGTH:
        return f"of caches below {MIN_LENGTH} tokens most is dense"
    return None


def measured_seconds(
    model: Any, space: SlotSpace, layers: int, sequences: int, context: int, machine: Machine
) -> dict[str, Any]:
    """key → seconds of all layers, or why there is no time."""
    config = model.config.get_text_config()
    kv_heads, head_dim = kv_shape(config)
    heads = config.num_attention_heads
    keys = [choice.key for choice in space.choices[1:]]
    if space.slot == "kv_cache":
        # The peer's time stands beside a kind's, so that one kind runs even where no choice is left.
        kinds = [KINDS[key] for key in keys] or ["bf16"]
        case = DecodeCase(sequences, context, heads, kv_heads, head_dim, 1)
        rows = decode_speed(machine, [case], kinds, [DENSE])["rows"]
    else:
        modes: list[Mode] = [ATTENTION[key]["mode"] for key in keys] or ["bf16"]
        case = Case("causal", context, head_dim, heads, kv_heads, sequences)
        rows = attention_speed(machine, [case], modes, [DENSE])["rows"]
    found = {EMPTY: _seconds(rows[0]["peers"][DENSE], layers)}
    for key, row in zip(keys, rows):
        found[key] = _seconds(row, layers)
    return found


def _seconds(row: dict[str, Any], layers: int) -> float | str:
    if "microseconds" in row:
        return layers * row["microseconds"] / 1e6
    return str(row.get("absent") or row.get("reason") or "its result is wrong on this device")


def slot_seconds(
    space: SlotSpace, reckon: Callable[[Recipe], float], measured: dict[str, Any] | None
) -> tuple[dict[str, float], str | None]:
    """key → seconds of every choice, and why they are reckoned although they were to be measured. Choices that have no
    time are left out of the space.
    """
    if measured is None or isinstance(measured[EMPTY], str):
        why = None if measured is None else f"{DENSE}' attention has no time here: {measured[EMPTY]}"
        return {choice.key: reckon(choice.recipe) for choice in space.choices}, why
    for key, found in measured.items():
        if isinstance(found, str):
            space.leave_out(key, found)
    return {choice.key: measured[choice.key] for choice in space.choices}, None
