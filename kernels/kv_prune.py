"""Magnitude pruning of a cache (Mustafar, arXiv 2505.22913): of each token a constant number of the largest channels.

::

    kept    = 4·round((1 − sparsity)·head_dim / 4), of 4 … head_dim        the same for all tokens of a layer
    score_c = |x_c|,  of keys also |x_c| · E|q_c|                          in FP32
    token   = bitmap of the `kept` largest scores | their x in the order of channels | scale

for every token and KV head on its own. Of equal scores the lower channel is kept first; NaN and infinity count as
larger than any number, and as equal. A channel that was not kept comes back as 0. Since the number of kept channels is
constant, a token is found without offsets; its x_c is at place popcount(bitmap below c). Values are stored as

    bf16   x
    fp8    e4m3(x / σ),  σ = max|x| / 448                             σ in FP32
    int4   round(x / σ) in [−7, 7], stored plus 8,  σ = max|x| / 7    σ in bf16, rounded up

of the kept x of a token, two INT4 codes in a byte, the lower place in its low half. What is kept of a damaged token,
one with NaN or infinity, comes back as it was in bf16, and as NaN else.

A page holds, of keys and then of values, all bitmaps, in words of 32 channels, channel c in bit c mod 32 of its word,
and behind them all values. For head_dim 128 a token takes, for keys or values each, 16 bytes of bitmap and 2, 1 or ½
bytes for each kept channel, and a scale: at sparsity 0.5 and 0.7

| | bf16 | fp8 | int4 |
|---|---|---|---|
| 0.5 | 144 bytes, 56.3 % of bf16 | 84, 32.8 % | 50, 19.5 % |
| 0.7 | 96 bytes, 37.5 % | 60, 23.4 % | 38, 14.8 % |

and 16 bytes for each page of a KV head, room behind the last values, which a kernel reads in words.

Departures from the paper: the number kept is rounded to a multiple of 4, where theirs is ⌈(1 − s)·D⌉ and one more;
tokens are pruned one by one where theirs come in blocks of 256; no padding and no offsets; keys of a token in one row,
not a channel of 64 tokens. Its output-aware scores take the last 32 queries of a prompt, these E|q| of calibration.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .kv_codec import ALIGNMENT, PAGE, Codec, Coded, Layout, Page, Part
from .kv_codes import MIN_SCALE, outwards, quantize_tokens

if TYPE_CHECKING:
    from .decode_attention import CompressedKV, Reading
    from .kv_append import Appendable
    from .kv_pages import Pages

Values = Literal["bf16", "fp8", "int4"]
STEP = 4
"""Numbers of kept channels are its multiples, as far as a head has so many."""
WORD = 32
"""Channels of a word of a bitmap."""
LEVELS = 7
"""Largest code of INT4, and least but for its sign."""
PARAMETERS = {"fp8": (1, torch.float32), "int4": (1, torch.bfloat16), "bf16": (0, torch.float32)}
"""Numbers per token, and their dtype."""


def kept_channels(sparsity: float, head_dim: int) -> int:
    """Of a token's `head_dim` channels. ValueError for a sparsity outside [0, 1)."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} is no share of channels to leave out; it is at least 0 and below 1")
    return min(head_dim, max(STEP, STEP * round((1 - sparsity) * head_dim / STEP)))


def bitmap_bytes(head_dim: int) -> int:
    """Of a token."""
    return -(-head_dim // WORD) * (WORD // 8)


def kept_mask(x: Tensor, kept: int, weight: Tensor | None = None) -> Tensor:
    """(..., head_dim) bool, True for `kept` of them. weight: of scores, broadcastable to x."""
    scores = x.float().abs()
    if weight is not None:
        scores = scores * weight
    scores = torch.where(scores.isfinite() & x.isfinite(), scores, torch.inf)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :kept], True)


def prune_tokens(x: Tensor, kept: int, values: Values, weight: Tensor | None = None) -> Coded:
    """Torch specification, any device.

    Args:
        x: (..., tokens, head_dim) floating.
        kept: channels of each token.
        values: what they are stored as.
        weight: of scores, broadcastable to x.

    Returns:
        codes: (..., tokens, head_dim) int32, the bits that a channel is stored as, −1 where it is not kept.
        parameters: (..., tokens, n), σ as `PARAMETERS` says.
    """
    mask = kept_mask(x, kept, weight)
    largest = torch.where(mask, x.float(), 0.0)
    if values == "int4":
        bits, parameters = int4_tokens(largest)
    else:
        stored, parameters = quantize_tokens(largest, values)
        bits = stored.view(torch.int16 if values == "bf16" else torch.uint8).int() & 0xFFFF
    return torch.where(mask, bits, -1), parameters


def int4_tokens(x: Tensor) -> Coded:
    """Codes plus 8, int32, and σ. x: (..., tokens, head_dim) fp32."""
    most = x.abs().amax(dim=-1)
    # On CUDA torch divides by a Python number through its reciprocal, which may be off by one rounding.
    scale = outwards((most / torch.full_like(most, LEVELS)).clamp_min(MIN_SCALE), down=False)
    scale = torch.where(scale.isfinite(), scale, torch.nan)[..., None]
    codes = (x * scale.reciprocal()).round().clamp(-LEVELS, LEVELS)
    return torch.where(scale.isnan(), 0.0, codes).int() + 8, scale.to(torch.bfloat16)


def restore_tokens(codes: Tensor, parameters: Tensor, values: Values) -> Tensor:
    """(..., tokens, head_dim) fp32 of what `prune_tokens` returns."""
    if values == "int4":
        x = (codes - 8).float() * parameters.float()
    elif values == "fp8":
        x = codes.to(torch.uint8).view(torch.float8_e4m3fn).float() * parameters
    else:
        x = (codes << 16).view(torch.float32)
    return torch.where(codes < 0, 0.0, x)


def packed(codes: Tensor, kept: int, values: Values) -> tuple[Tensor, Tensor]:
    """Codes of `prune_tokens` → bitmaps (..., tokens, bytes) and values (..., tokens, bytes), uint8."""
    mask = codes >= 0
    missing = 8 * bitmap_bytes(codes.shape[-1]) - codes.shape[-1]
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, missing)).unflatten(-1, (-1, 8))
    bitmap = (bits << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(dim=-1, dtype=torch.uint8)
    # True sorts before False, and channels stay in order.
    place = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :kept]
    stored = codes.gather(-1, place)
    if values == "bf16":
        return bitmap, stored.to(torch.int16).view(torch.uint8)
    if values == "fp8":
        return bitmap, stored.to(torch.uint8)
    pairs = torch.nn.functional.pad(stored, (0, kept % 2)).unflatten(-1, (-1, 2))
    return bitmap, (pairs[..., 0] | (pairs[..., 1] << 4)).to(torch.uint8)


def unpacked(bitmap: Tensor, stored: Tensor, head_dim: int, kept: int, values: Values) -> Tensor:
    """Codes, as `packed` was given them."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    mask = ((bitmap[..., None] >> shifts) & 1).flatten(-2)[..., :head_dim].bool()
    if values == "bf16":
        bits = stored.contiguous().view(torch.int16).int() & 0xFFFF
    elif values == "fp8":
        bits = stored.int()
    else:
        bits = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(-2).int()
    # Tokens of a page that were never written have any bits.
    place = (mask.cumsum(dim=-1) - 1).clamp(0, kept - 1)
    return torch.where(mask, bits.gather(-1, place), -1)


@dataclass(frozen=True)
class Stored:
    """Of keys or of values: channels of a head, those kept of a token, and what these are stored as."""

    head_dim: int
    kept: int
    values: Values

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Of a token's bitmap and of its values."""
        size = {"bf16": 2 * self.kept, "fp8": self.kept, "int4": -(-self.kept // 2)}[self.values]
        return bitmap_bytes(self.head_dim), size

    def regions(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Views of a page's (..., PAGE, bytes): bitmaps of all tokens, and values of all tokens behind them."""
        bitmaps, values = codes.flatten(-2).split([PAGE * size for size in self.row_bytes], dim=-1)
        return bitmaps.unflatten(-1, (PAGE, -1)), values.unflatten(-1, (PAGE, -1))

    def write(self, codes: Tensor, place: slice, tokens: Tensor) -> None:
        """Puts codes of `prune_tokens` into a page."""
        for region, new in zip(self.regions(codes), packed(tokens, self.kept, self.values), strict=True):
            region[..., place, :] = new

    def read(self, codes: Tensor) -> Tensor:
        """(..., PAGE, head_dim), as they were written."""
        return unpacked(*self.regions(codes), self.head_dim, self.kept, self.values)


@dataclass(frozen=True)
class PruneLayout(Layout):
    """keys, values: what is stored of them."""

    keys: Stored
    values: Stored

    @property
    def parts(self) -> tuple[Part, Part, Part, Part]:
        """See `Layout.parts`; codes are bitmaps of all tokens and then values of all tokens."""
        count, dtype = PARAMETERS[self.keys.values]
        parameters = Part((PAGE, count), dtype)
        keys, values = (Part((PAGE, sum(part.row_bytes)), torch.uint8) for part in (self.keys, self.values))
        return keys, parameters, values, parameters

    @property
    def record_bytes(self) -> int:
        """See `Layout.record_bytes`; a kernel reads values in words, up to 12 bytes behind the last one."""
        return super().record_bytes + ALIGNMENT

    def page(self, records: Tensor) -> PrunePage:
        """See `Layout.page`."""
        page = super().page(records)
        return PrunePage(
            self.kind,
            page.key_codes,
            page.key_parameters,
            page.value_codes,
            page.value_parameters,
            self.keys,
            self.values,
        )


@dataclass(frozen=True)
class PrunePage(Page):
    """key_codes, value_codes: (..., PAGE, bytes) uint8, all bitmaps before all values."""

    keys: Stored
    values: Stored

    def write(self, place: slice, keys: Coded, values: Coded) -> None:
        """See `Page.write`."""
        self.key_parameters[..., place, :], self.value_parameters[..., place, :] = keys[1], values[1]
        self.keys.write(self.key_codes, place, keys[0])
        self.values.write(self.value_codes, place, values[0])

    def read(self) -> tuple[Coded, Coded]:
        """See `Page.read`."""
        keys, values = self.keys.read(self.key_codes), self.values.read(self.value_codes)
        return (keys, self.key_parameters), (values, self.value_parameters)


@dataclass(frozen=True)
class PruneCodec(Codec):
    """key_sparsity, value_sparsity: shares of a head's channels that are left out. values: what the others are stored
    as. query_weight: (num_kv_heads, head_dim) fp32, E|q|, for the scores of keys; None for ones.
    """

    key_sparsity: float
    value_sparsity: float
    values: Values
    query_weight: Tensor | None = None

    def layout(self, key_dim: int, value_dim: int) -> PruneLayout:
        """See `Codec.layout`."""
        keys = Stored(key_dim, kept_channels(self.key_sparsity, key_dim), self.values)
        values = Stored(value_dim, kept_channels(self.value_sparsity, value_dim), self.values)
        return PruneLayout(f"prune_{self.values}", key_dim, value_dim, keys, values)

    def check(self, heads: int, key_dim: int, value_dim: int) -> None:
        """See `Codec.check`."""
        weight = self.query_weight
        if weight is not None and tuple(weight.shape) != (heads, key_dim):
            raise ValueError(
                f"the cache was calibrated for {' KV heads of '.join(map(str, weight.shape))} channels, and {heads} of "
                f"{key_dim} come; it belongs to another model"
            )
        self.layout(key_dim, value_dim)

    def decode_refusal(self, query: Tensor, kv: CompressedKV) -> str | None:
        """See `Codec.decode_refusal`."""
        return self.refusal(query.device)

    def to(self, device: torch.device) -> PruneCodec:
        """See `Codec.to`."""
        return replace(self, query_weight=None if self.query_weight is None else self.query_weight.to(device))

    def encode_keys(self, key: Tensor) -> Coded:
        """See `Codec.encode_keys`."""
        weight = None if self.query_weight is None else self.query_weight[:, None]
        return prune_tokens(key, kept_channels(self.key_sparsity, key.shape[-1]), self.values, weight)

    def encode_values(self, value: Tensor) -> Coded:
        """See `Codec.encode_values`."""
        return prune_tokens(value, kept_channels(self.value_sparsity, value.shape[-1]), self.values)

    def decode_keys(self, keys: Coded) -> Tensor:
        """See `Codec.decode_keys`."""
        return restore_tokens(*keys, self.values)

    def decode_values(self, values: Coded) -> Tensor:
        """See `Codec.decode_values`."""
        return restore_tokens(*values, self.values)

    def write(self, key: Tensor, value: Tensor, columns: tuple[int, int], pages: Pages, **options: Any) -> None:
        """See `Codec.write`."""
        from .kv_prune_triton import write_pruned

        write_pruned(key, value, columns, pages, self, **options)

    def read(self, key: Tensor, value: Tensor, columns: tuple[int, int], pages: Pages) -> None:
        """See `Codec.read`."""
        from .kv_prune_triton import read_pruned

        read_pruned(key, value, columns, pages)

    def append(self, key: Tensor, value: Tensor, to: Appendable, *, interpret: bool) -> None:
        """See `Codec.append`."""
        from .kv_prune_triton import append_pruned

        append_pruned(key, value, to, self, interpret=interpret)

    def attend(
        self,
        query: Tensor,
        kv: CompressedKV,
        call: Reading,
        sinks: Tensor | None,
        key_starts: Tensor | None,
        *,
        interpret: bool,
    ) -> tuple[Tensor, Tensor]:
        """See `Codec.attend`."""
        from .decode_prune_triton import decode_pruned

        return decode_pruned(query, kv, call, sinks, key_starts, interpret=interpret)
