"""Keys and values as quantized prefill attention reads them: smoothed, scaled, and laid out for the matrix units.

*Keys.* A vector added to all keys of a head shifts every logit of a query alike, and softmax does not see it, so any
vector may be taken off: here the mean of at most `SAMPLED` evenly spaced tokens, which spares a second pass over the
keys. What depends on the true logits (log-sum-exp, softcap, sinks) adds q·k̄ again. Each tile of `TILE` tokens gets one
scale, which multiplies a whole block of logits at once; a scale per token would cost one more multiplication per logit.
INT4 has so few levels that it pays that price: one scale per token.

Before that keys and queries are rotated by one orthogonal matrix, which their product does not see: Hadamard's, in
blocks of `BLOCK` channels, spreads the few large channels that rotary embedding leaves over all of them. On the layers
of a 135M model it raises the worst cosine of attention with INT8 logits from 0.9992 to 0.9999, with INT4 ones from 0.87
to 0.96. Channels are padded with zeros to a power of two, the width.

    int8   k8 = round((k − k̄)·H / σ), σ = max|(k − k̄)·H| / 127      fp8: e4m3((k − k̄)·H / σ), σ = max / 448
    int4   the same with 7; rotated channels d and d + width/2 in one byte

*Values.* FP8, e4m3((v − v̄) / σ_v), with a mean per channel of the same sampled tokens, which the output adds again,
since probabilities sum to one, and one scale per tile: e4m3 is a floating-point format, so channels of different size
need no scale of their own, and a kernel that adds up tiles in FP32 takes a tile's scale along in the factor with which
it rescales its sum anyway. Values are then quantized in one pass. The FP8 matrix units want the tokens of a channel
side by side, so values are transposed, and in every 16 tokens their order is that in which a thread holds its logits
(`TOKEN_ORDER`): probabilities then go from one product into the next without leaving their registers.

Tokens outside `bounds` become zeros and count in no mean or scale, whatever they hold. Source: SageAttention (arXiv
2410.02367), SageAttention2 (2411.10958).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .activations import E4M3_MAX

TILE = 128
"""Keys with one scale, as in the authors' kernel for Hopper; storage is padded to whole tiles."""
BLOCK = 64
"""Channels that are rotated together, at most."""
SAMPLED = 512
"""The means of keys and values are those of at most so many tokens."""
MIN_SCALE = 2.0**-50
"""Of queries and keys: the product of two scales must not underflow, or a masked logit of −∞ would become NaN."""
MIN_VALUE_SCALE = 2.0**-60
"""Sums are kept in units of the last tile's scale, whose ratio to the one before must not overflow: it cannot for
values up to 10²²."""
LEVELS = {"int8": 127.0, "int4": 7.0, "fp8": E4M3_MAX}
TOKEN_ORDER = tuple(a * 8 + b * 2 + c for b in range(4) for a in range(2) for c in range(2))
"""Place in storage → token, in every 16 values."""


@dataclass(frozen=True)
class QuantizedKeys:
    """codes: (batch, num_kv_heads, padded tokens, width) int8, e4m3, or uint8 for two INT4 in a byte, of rotated keys;
    width is head_dim up to a power of two (half of it for INT4). scale: (batch, num_kv_heads, padded tokens / TILE)
    fp32, or one per token for INT4. mean: (batch, num_kv_heads, head_dim) fp32.
    """

    codes: Tensor
    scale: Tensor
    mean: Tensor


@dataclass(frozen=True)
class QuantizedValues:
    """codes: (batch, num_kv_heads, width, padded tokens) e4m3, tokens in `TOKEN_ORDER`. scale: (batch, num_kv_heads,
    padded tokens / TILE) fp32. mean: (batch, num_kv_heads, head_dim) fp32.
    """

    codes: Tensor
    scale: Tensor
    mean: Tensor


def padded_tokens(tokens: int) -> int:
    """Tokens of storage for so many keys."""
    return -(-tokens // TILE) * TILE


def padded_width(head_dim: int) -> int:
    """Channels of storage: a power of two, at least 64: a product takes 32 bytes, and INT4 codes share one."""
    return max(64, 1 << (head_dim - 1).bit_length())


def sampling_step(tokens: int) -> int:
    """Tokens whose index is a multiple of this enter the means."""
    return -(-tokens // SAMPLED)


def scale_of(amax: Tensor, levels: float, least: float = MIN_SCALE) -> Tensor:
    """amax / levels, at least `least`; 1 for an all-zero group, NaN where amax is not finite."""
    scale = (amax / torch.full_like(amax, levels)).clamp_min(least)
    return scale.masked_fill(amax == 0, 1.0).masked_fill(~amax.isfinite(), torch.nan)


def round_codes(values: Tensor, scale: Tensor, kind: str) -> Tensor:
    """values · (1 / scale) to the nearest code; int8 for the integer kinds, from the exact product, as a fused
    multiply-add rounds it.
    """
    inverse = scale.reciprocal()
    if kind == "fp8":
        return (values * inverse).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (values.double() * inverse.double()).round().clamp(-LEVELS[kind], LEVELS[kind]).to(torch.int8)


def inside(bounds: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor:
    """(batch, 1, tokens, 1) bool."""
    positions = torch.arange(tokens, device=device)
    if bounds is None:
        return torch.ones((batch, 1, tokens, 1), dtype=torch.bool, device=device)
    return ((positions >= bounds[:, :1]) & (positions < bounds[:, 1:]))[:, None, :, None]


def hadamard(size: int, device: torch.device | str = "cpu") -> Tensor:
    """(size, size) fp32: Sylvester's matrix, −1 where row and column have an odd number of common one bits."""
    matrix = torch.ones((1, 1), device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def rotate(x: Tensor) -> Tensor:
    """(…, head_dim) floating → (…, padded width) fp32: x·H / √block, block by block."""
    width = padded_width(x.shape[-1])
    block = min(width, BLOCK)
    blocks = torch.nn.functional.pad(x.float(), (0, width - x.shape[-1])).unflatten(-1, (-1, block))
    return (blocks @ hadamard(block, x.device) * block**-0.5).flatten(-2)


def smooth(x: Tensor, bounds: Tensor | None) -> tuple[Tensor, Tensor]:
    """(batch, heads, padded tokens, width) fp32 without its mean, zeros where there is no token, and the mean."""
    batch, heads, tokens, head_dim = x.shape
    valid = inside(bounds, batch, tokens, x.device)
    values = torch.where(valid, x.float(), 0.0)
    sampled = valid & (torch.arange(tokens, device=x.device) % sampling_step(tokens) == 0)[None, None, :, None]
    mean = torch.where(sampled, values, 0.0).sum(dim=2) / sampled.sum(dim=2).clamp_min(1)
    storage = torch.zeros((batch, heads, padded_tokens(tokens), padded_width(head_dim)), device=x.device)
    storage[:, :, :tokens, :head_dim] = torch.where(valid, values - mean[:, :, None], 0.0)
    return storage, mean


def quantize_keys_ref(key: Tensor, kind: str, bounds: Tensor | None) -> QuantizedKeys:
    """Torch specification, any device.

    Args:
        key: (batch, num_kv_heads, tokens, head_dim) floating, any strides.
        kind: "int8", "int4" or "fp8".
        bounds: (batch, 2) int32, first and last + 1 key that is looked at; None for all.
    """
    storage, mean = smooth(key, bounds)
    storage = rotate(storage)
    if kind == "int4":
        scale = scale_of(storage.abs().amax(dim=3), LEVELS[kind])
        codes = round_codes(storage, scale[..., None], kind) + 8
        low, high = codes.to(torch.uint8).chunk(2, dim=3)
        return QuantizedKeys(low | (high << 4), scale, mean)
    tiles = storage.unflatten(2, (-1, TILE))
    scale = scale_of(tiles.abs().amax(dim=(3, 4)), LEVELS[kind])
    return QuantizedKeys(round_codes(tiles, scale[..., None, None], kind).view(storage.shape), scale, mean)


def quantize_values_ref(value: Tensor, bounds: Tensor | None) -> QuantizedValues:
    """Torch specification, any device. value: (batch, num_kv_heads, tokens, head_dim) floating, any strides."""
    storage, mean = smooth(value, bounds)
    tiles = storage.unflatten(2, (-1, TILE))
    scale = scale_of(tiles.abs().amax(dim=(3, 4)), LEVELS["fp8"], MIN_VALUE_SCALE)
    codes = round_codes(tiles, scale[..., None, None], "fp8").view(storage.shape).transpose(2, 3)
    order = torch.tensor(TOKEN_ORDER, device=value.device)
    ordered = codes.unflatten(3, (-1, 16)).view(torch.uint8)[..., order].flatten(3)
    return QuantizedValues(ordered.contiguous().view(torch.float8_e4m3fn), scale, mean)


def dequantize_keys(keys: QuantizedKeys, tokens: int, kind: str) -> Tensor:
    """(batch, num_kv_heads, tokens, padded width) fp32, rotated, the mean taken off."""
    if kind == "int4":
        codes = torch.cat((keys.codes & 15, keys.codes >> 4), dim=3).float() - 8
        values = codes * keys.scale[..., None]
    else:
        values = keys.codes.float() * keys.scale.repeat_interleave(TILE, dim=2)[..., None]
    return values[:, :, :tokens]


def dequantize_values(values: QuantizedValues, tokens: int, head_dim: int) -> Tensor:
    """(batch, num_kv_heads, tokens, head_dim) fp32, the mean taken off."""
    codes = values.codes.float()
    order = torch.tensor(TOKEN_ORDER, device=codes.device).argsort()
    plain = codes.unflatten(3, (-1, 16))[..., order].flatten(3).transpose(2, 3)
    return (plain * values.scale.repeat_interleave(TILE, dim=2)[..., None])[:, :, :tokens, :head_dim]
