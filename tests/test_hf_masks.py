"""Masks of transformers read as runs of keys, compared entry by entry with the masks that transformers builds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from kompakt.compress.hf_masks import Layout, MaskInfo, keep_arguments
from kompakt.kernels.segments import visible, whole

CPU = torch.device("cpu")
BATCH = 3
# How packed sequences number their tokens anew; 5.17 does not.
REMAP: Any = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
sliding = sliding_window_causal_mask_function
both_ways = sliding_window_bidirectional_mask_function


def padding(*runs: tuple[int, int], tokens: int) -> torch.Tensor:
    """(rows, tokens) bool, True between each row's edges."""
    positions = torch.arange(tokens)
    return torch.stack([(positions >= start) & (positions < stop) for start, stop in runs])


def packed(function, *lengths: int):
    """`function` over packed sequences, as this transformers writes it."""
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    if REMAP is not None:
        function = REMAP(function, positions.expand(BATCH, -1))
    return and_masks(function, packed_sequence_mask_function(documents.expand(BATCH, -1)))


def packed_plainly(function, *lengths: int):
    """`function` over packed sequences without numbering tokens anew, as transformers 5.17 writes it."""
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    return and_masks(function, packed_sequence_mask_function(documents.expand(BATCH, -1)))


LEFT, RIGHT = ((0, 9), (4, 9), (8, 9)), ((0, 9), (0, 5), (0, 1))
CASES = {
    "causal": (causal_mask_function, 9, 9, 0, 0, None),
    "one query more than nothing": (causal_mask_function, 2, 2, 0, 0, None),
    "chunk of a prefill": (causal_mask_function, 5, 12, 7, 0, None),
    "static cache, empty": (causal_mask_function, 7, 16, 0, 0, None),
    "static cache, filled": (causal_mask_function, 7, 16, torch.tensor(3), 0, None),
    "sliding": (sliding(4), 9, 9, 0, 0, None),
    "sliding, window of one": (sliding(1), 9, 9, 0, 0, None),
    "sliding, window of all": (sliding(9), 9, 9, 0, 0, None),
    "sliding cache": (sliding(4), 5, 8, 7, 4, None),
    "static sliding cache": (sliding(8), 5, 8, torch.tensor(0), 0, None),
    "bidirectional": (bidirectional_mask_function, 9, 9, 0, 0, None),
    "bidirectional, other keys": (bidirectional_mask_function, 9, 5, 0, 0, None),
    "bidirectional sliding": (both_ways(3), 9, 9, 0, 0, None),
    "left padding": (causal_mask_function, 9, 9, 0, 0, padding(*LEFT, tokens=9)),
    "right padding": (causal_mask_function, 9, 9, 0, 0, padding(*RIGHT, tokens=9)),
    "padding on both sides": (causal_mask_function, 9, 9, 0, 0, padding((2, 7), (0, 9), (3, 4), tokens=9)),
    "a row of padding": (causal_mask_function, 9, 9, 0, 0, padding((0, 0), (0, 9), (3, 9), tokens=9)),
    "no padding in the mask": (causal_mask_function, 9, 9, 0, 0, padding((0, 9), (0, 9), (0, 9), tokens=9)),
    "left padding in a chunk": (causal_mask_function, 4, 9, 5, 0, padding(*LEFT, tokens=9)),
    "left padding, sliding": (sliding(3), 9, 9, 0, 0, padding(*LEFT, tokens=9)),
    "left padding, sliding cache": (sliding(4), 5, 8, 7, 4, padding((0, 12), (6, 12), (9, 12), tokens=12)),
    "left padding, static cache": (causal_mask_function, 7, 16, torch.tensor(2), 0, padding(*LEFT, tokens=9)),
    "right padding, bidirectional": (bidirectional_mask_function, 9, 9, 0, 0, padding(*RIGHT, tokens=9)),
    "right padding, both ways": (both_ways(2), 9, 9, 0, 0, padding(*RIGHT, tokens=9)),
    "packed": (packed(causal_mask_function, 4, 1, 4), 9, 9, 0, 0, None),
    "packed, sliding": (packed(sliding(2), 5, 4), 9, 9, 0, 0, None),
    "packed plainly": (packed_plainly(causal_mask_function, 4, 1, 4), 9, 9, 0, 0, None),
    "packed plainly, sliding": (packed_plainly(sliding(2), 5, 4), 9, 9, 0, 0, None),
}


def info_of(function, queries, keys, q_offset, kv_offset, mask) -> MaskInfo:
    found = keep_arguments(
        "sdpa",
        batch_size=BATCH,
        q_length=queries,
        kv_length=keys,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=function,
        attention_mask=mask,
        device=CPU,
    )
    assert isinstance(found, MaskInfo)
    return found


def ours(layout: Layout, queries: int, keys: int) -> torch.Tensor:
    """(batch, queries, keys) bool, False for the keys that were cut off."""
    segments = layout.segments or whole(BATCH, queries, layout.keys, CPU)
    mask = visible(segments, BATCH, slice(0, queries), layout.keys, causal=layout.causal, window=layout.window)
    return torch.nn.functional.pad(mask, (0, keys - layout.keys))


@pytest.mark.parametrize("case", CASES)
def test_layout_is_the_mask_that_transformers_builds(case):
    _, queries, keys, q_offset, _, mask = CASES[case]
    info = info_of(*CASES[case])
    layout = info.layout(BATCH, queries, keys, CPU)
    assert isinstance(layout, Layout), layout
    expected = sdpa_mask(**{**info.arguments, "allow_is_causal_skip": False})
    assert expected is not None
    expected = expected.expand(BATCH, 1, queries, keys)[:, 0]
    real = torch.ones(BATCH, queries, dtype=torch.bool)
    if mask is not None:
        # What a padding token sees is nobody's business.
        real = mask[:, int(q_offset) : int(q_offset) + queries]
        assert not ours(layout, queries, keys)[~real].any()
    assert torch.equal(ours(layout, queries, keys)[real], expected[real])
    assert (layout.segments is None) == (mask is None or bool(mask.all())) or "packed" in case
    assert info.layout(BATCH, queries, keys, CPU) is layout


def test_window_that_sees_every_key_is_none():
    layout = info_of(sliding(9), 9, 9, 0, 0, None).layout(BATCH, 9, 9, CPU)
    assert isinstance(layout, Layout)
    assert layout.window is None


HOLES = padding((0, 9), (0, 9), (0, 9), tokens=9).clone()
HOLES[1, 4] = False
REFUSED = {
    "chunked": (chunked_causal_mask_function(4, torch.zeros(BATCH, dtype=torch.long)), 9, 9, 0, 0, None),
    "union": (or_masks(causal_mask_function, bidirectional_mask_function), 9, 9, 0, 0, None),
    "union inside": (and_masks(causal_mask_function, or_masks(causal_mask_function)), 9, 9, 0, 0, None),
    "own": (lambda b, h, q, k: k <= q, 9, 9, 0, 0, None),
    "own inside": (and_masks(causal_mask_function, lambda b, h, q, k: k >= q - 2), 9, 9, 0, 0, None),
    "no function": (torch.nn.Identity(), 9, 9, 0, 0, None),
    "looks back only": (sliding_window_overlay(3), 9, 9, 0, 0, None),
    "holes": (causal_mask_function, 9, 9, 0, 0, HOLES),
    "queries before the keys": (causal_mask_function, 9, 9, 4, 0, None),
    "queries without keys": (causal_mask_function, 9, 4, 0, 0, None),
    "both ways beside a cache": (both_ways(3), 4, 9, 0, 0, None),
    "padded keys of another text": (bidirectional_mask_function, 4, 9, 0, 0, padding(*RIGHT, tokens=9)),
    "packed and padded": (packed(causal_mask_function, 5, 4), 9, 9, 0, 0, padding(*LEFT, tokens=9)),
    "packed beside a cache": (packed_plainly(causal_mask_function, 5, 4), 4, 9, 5, 0, None),
    "packed in pieces": (
        and_masks(causal_mask_function, packed_sequence_mask_function(torch.tensor([[0, 0, 1, 0, 1, 1, 2, 2, 2]]))),
        *(9, 9, 0, 0, None),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_run_of_keys_has_a_reason(case):
    _, queries, keys, *_ = REFUSED[case]
    reason = info_of(*REFUSED[case]).layout(BATCH, queries, keys, CPU)
    assert isinstance(reason, str)
    assert reason


@pytest.mark.skipif(REMAP is None, reason="5.17 numbers no tokens")
@pytest.mark.parametrize("positions", [[0, 1, 2, 0, 2], [0, 1, 3, 0, 1], [4, 3, 2, 1, 0]])
def test_positions_that_do_not_count_up_are_refused(positions):
    documents = torch.tensor([[0, 0, 0, 1, 1]])
    function = and_masks(
        REMAP(causal_mask_function, torch.tensor([positions])), packed_sequence_mask_function(documents)
    )
    assert "count up" in str(info_of(function, 5, 5, 0, 0, None).layout(BATCH, 5, 5, CPU))


@pytest.mark.skipif(REMAP is None, reason="5.17 numbers no tokens")
def test_positions_without_packing_are_refused():
    info = info_of(REMAP(causal_mask_function, torch.arange(5)[None]), 5, 5, 0, 0, None)
    assert "anew" in str(info.layout(BATCH, 5, 5, CPU))


def test_mask_of_another_size_is_refused():
    info = info_of(causal_mask_function, 9, 9, 0, 0, None)
    assert "another number" in str(info.layout(BATCH, 9, 10, CPU))
    assert "another number" in str(info.layout(BATCH + 1, 9, 9, CPU))


def test_offset_is_that_of_the_moment():
    """A static cache counts on in place before the first layer asks."""
    offset = torch.tensor(3)
    info = info_of(causal_mask_function, 7, 16, offset, 0, None)
    offset.add_(7)
    layout = info.layout(BATCH, 7, 16, CPU)
    assert isinstance(layout, Layout)
    assert layout.keys == 10


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_built_mask_is_the_implementations_own(implementation):
    arguments = {"batch_size": BATCH, "q_length": 9, "kv_length": 9, "attention_mask": padding(*LEFT, tokens=9)}
    info = keep_arguments(implementation, **arguments, device=CPU)
    expected = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[implementation](**arguments)
    assert torch.equal(info.build(implementation, CPU), expected)
    assert info.build(implementation, CPU) is info.build(implementation, CPU)
    single = keep_arguments(implementation, **{**arguments, "q_length": 1, "q_offset": 8})
    assert not isinstance(single, MaskInfo)
    assert keep_arguments(implementation, **{**arguments, "attention_mask": info}) is info


@pytest.mark.parametrize("case", ["causal", "chunk of a prefill", "sliding cache", "static cache, filled"])
@pytest.mark.parametrize("left", [0, 3, 99])
def test_last_queries_of_a_mask(case, left):
    """Models whose last layers share keys run them for the last queries only."""
    _, queries, keys, *_ = CASES[case]
    info = info_of(*CASES[case])
    some = info[:, :, slice(-left, None), :]
    count = min(left, queries) or queries
    layout = some.layout(BATCH, count, keys, CPU)
    assert isinstance(layout, Layout)
    whole_mask = sdpa_mask(**{**info.arguments, "allow_is_causal_skip": False})
    assert whole_mask is not None
    expected = whole_mask.expand(BATCH, 1, queries, keys)[:, 0, -count:]
    assert torch.equal(ours(layout, count, keys), expected)


def test_last_query_of_a_mask_is_a_mask():
    last = info_of(causal_mask_function, 5, 9, 2, 0, padding(*LEFT, tokens=9))[:, :, slice(-1, None), :]
    expected = sdpa_mask(BATCH, 1, 9, q_offset=6, attention_mask=padding(*LEFT, tokens=9))
    assert torch.equal(last, expected)


def test_a_model_that_reads_its_mask_is_told():
    info = info_of(causal_mask_function, 9, 9, 0, 0, None)
    for index in ((slice(None), 0), 0, (slice(None), slice(None), slice(None, 3), slice(None))):
        with pytest.raises(ValueError, match="reads its attention mask itself"):
            info[index]
    with pytest.raises(AttributeError, match=r"reads its attention mask itself.*dtype"):
        info.dtype  # noqa: B018
    assert not hasattr(info, "to")
