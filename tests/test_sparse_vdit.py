"""Sparse-vDiT on synthetic queries and keys of videos: heads that look along time, space, or at anchors get those
patterns, and what runs afterwards is attention over the masks of the patterns.
"""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kompakt.kernels.sparse_index import TILE, Extent, SparseIndex, listed_keys
from kompakt.sparsify.patterns import (
    Dense,
    Diagonal,
    MultiDiagonal,
    Pattern,
    Skip,
    VerticalSlash,
    VerticalStripe,
    exact_mask,
)
from kompakt.sparsify.sparse_vdit import LayerChoice, PatchedAttention, build, candidates, search

pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES, FRAME = 4, 300
TOKENS = FRAMES * FRAME
PATTERNS: list[Pattern] = [
    Skip(), Diagonal(64), Diagonal(128), MultiDiagonal(FRAME, 15), VerticalStripe(FRAME, 4), Dense()
]  # fmt: skip


def circle(position: Tensor, size: float, sharpness: float) -> Tensor:
    angle = position[:, None] * 2 * torch.pi / size
    return torch.cat((angle.cos(), angle.sin()), dim=1) * sharpness


def video(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Five heads, frame-major tokens of 4 frames: near in the sequence, the same place of every frame, the first tokens
    of every frame, everywhere, and one whose values are nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(TOKENS, dtype=torch.float32)
    near = circle(place, 4 * TOKENS, 120)
    same = circle(place % FRAME, FRAME, 80)
    anchor = torch.where(place % FRAME < 4, 40.0, 0.0)[:, None].expand(-1, 2)
    query = torch.stack((near, same, torch.ones(TOKENS, 2), torch.zeros(TOKENS, 2), torch.zeros(TOKENS, 2)))
    key = torch.stack((near, same, anchor, anchor, anchor))
    value = torch.randn((5, TOKENS, 16), generator=generator) + 1
    value[3] -= 1
    value[4] = 0.0
    return tuple(item[None] for item in (query, key, value))  # pyright: ignore


def test_heads_get_their_patterns():
    choice = search([video(0), video(1)], PATTERNS, scaling=1.0)
    kinds = [head.pattern.key for head in choice.heads]
    assert kinds == ["diagonal", "multi_diagonal", "vertical_stripe", "dense", "skip"]
    assert [head.error < 0.1 for head in choice.heads] == [True] * 5
    assert choice.heads[3].cost == 1 and choice.heads[4].cost == 0 and choice.density < 0.6
    assert LayerChoice.from_dict(json.loads(json.dumps(choice.as_dict()))) == choice
    # Were cost nothing, every head would take the pattern with the least error.
    assert all(head.error == 0 for head in search([video(0)], PATTERNS, scaling=1.0, weight=0.0).heads)
    measured = search([video(0)], PATTERNS, scaling=1.0, costs=[0, 2, 2, 2, 3, 1])
    assert [head.pattern.key for head in measured.heads][2] == "dense"


def test_patched_attention_is_that_of_the_masks():
    """All patterns in one launch; masks, other lengths and heads go to what was there before."""
    query, key, value = video(3)
    choice = search([video(0)], PATTERNS, scaling=1.0)

    def former(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=1.0)

    attention = PatchedAttention(choice, former, 1.0)
    found = attention(query, key, value, attn_mask=None)
    extent = Extent.of(1, TOKENS, TOKENS, None, query.device)
    index, share = build([head.pattern for head in choice.heads], 1, TOKENS, TOKENS, query.device)
    assert isinstance(index, SparseIndex) and share == pytest.approx(choice.density)
    masks = listed_keys(index, extent)[0].repeat_interleave(TILE, dim=1)[:, :TOKENS]
    for mask, head in zip(masks, choice.heads, strict=True):
        assert (mask | ~exact_mask(head.pattern, TOKENS, TOKENS, causal=False)).all()
    expected = torch.nan_to_num(former(query, key, value, attn_mask=masks[None]))
    # Logits are as large as 14,400, where FP32 rounds by 2⁻¹¹.
    assert torch.allclose(found, expected, atol=1e-2)
    dense = former(query, key, value)
    assert (found - dense).norm() < 0.2 * dense.norm() and not torch.equal(found, dense)
    assert torch.equal(attention(query, key, value), found) and len(attention.kept) == 1
    mask = torch.ones((TOKENS, TOKENS), dtype=torch.bool)
    assert torch.equal(attention(query, key, value, attn_mask=mask), former(query, key, value, mask))
    assert attention(query[:, :, :99], key[:, :, :99], value[:, :, :99]).shape[2] == 99
    assert attention.ran == {"sparse": 2, "dense": 2}


@pytest.mark.parametrize(("tokens", "frame"), [(32760, 1560), (118800, 3600)], ids=["Wan", "HunyuanVideo"])
def test_indices_of_real_sizes(tokens, frame):
    """Tiles of 480p Wan 2.1 (21 frames of 30×52) and 720p HunyuanVideo (33 of 45×80): near what a mask has of keys."""
    for pattern in (Diagonal(frame // 2), VerticalStripe(frame, frame // 16), MultiDiagonal(frame, frame // 16)):
        _, share = build([pattern], 1, 4096, tokens, torch.device("cpu"))
        keys = {"diagonal": frame, "vertical_stripe": tokens / 16, "multi_diagonal": tokens / 8}[pattern.key]
        # A band is widened by up to two tiles at each end; near an end of the keys it is cut.
        bands = 1 if pattern.key == "diagonal" else tokens / frame + 1
        assert 0.4 * keys <= share * tokens <= keys + (128 * bands if pattern.key != "vertical_stripe" else 64)
    assert len(candidates(tokens, frame)) == 11 and len(candidates(tokens)) == 5


def test_refusals():
    with pytest.raises(ValueError, match="lack dense"):
        search([video(0)], [Skip()])
    with pytest.raises(ValueError, match="picked for every input"):
        search([video(0)], [VerticalSlash(3, 3), Dense()])
    with pytest.raises(ValueError, match="no inputs"):
        search([], PATTERNS)
    with pytest.raises(ValueError, match="1200 and 400 tokens"):
        search([video(0), tuple(item[:, :, :400] for item in video(1))], PATTERNS)  # pyright: ignore
    with pytest.raises(ValueError, match="a frame has 801 tokens"):
        candidates(800, 801)
    with pytest.raises(ValueError, match="version 2"):
        LayerChoice.from_dict({"version": 2})
    with pytest.raises(ValueError, match="damaged"):
        LayerChoice.from_dict({"version": 1, "heads": [{"pattern": "skip"}]})
