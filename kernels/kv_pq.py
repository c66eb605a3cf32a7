"""Product quantization of a cache (MILLION, arXiv 2504.03661): a head's channels cut into sub-vectors, a byte for each.

::

    y = (x − m)·E        code_s = argmin_j |y_s − c_sj|²        x̂ = ŷ·Dᵀ + m,  ŷ_s = c_s,code_s

for each KV head with vectors m, maps E and D and centroids c of its own, found on calibration text (`quant/kv_pq.py`).
Sub-vector s holds `width` of the channels of y, 2 or 4, some of which may be zero in E and D. A head of d channels at
b bits takes d·b/8 bytes, no parameters beside them. None of it costs a reader anything per token: with queries mapped
once,

    q·k̂ = (q·D)·ŷ + q·m        Σ p·v̂ = (Σ p·ŷ)·Dᵀ + m·Σ p

A token that holds NaN or infinity has the code 255 in its first sub-vector, which no other token has, and comes back
as NaN. Departure from the paper: the maps, codebooks for every KV head instead of one for
a layer or a model, and the damaged token.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kv_codec import PAGE, Codec, Coded, Layout, Page, Part

if TYPE_CHECKING:
    from .decode_attention import CompressedKV, Reading
    from .kv_append import Appendable
    from .kv_pages import Pages

CENTROIDS = 256
DAMAGED = CENTROIDS - 1
"""Code of a damaged token's first sub-vector."""
MAX_MAP = 128
"""Channels of a head whose maps fit the shared memory of every card."""
SCORES = 2**22
"""Scores of centroids that exist at a time."""


def sub_vectors(bits: int, head_dim: int) -> int:
    """Of a head; each takes a byte. ValueError if they do not come out even."""
    if bits * head_dim % 8:
        raise ValueError(f"head_dim {head_dim} at {bits} bits is no whole number of bytes; use 4 bits or kv_fp8")
    return bits * head_dim // 8


@dataclass(frozen=True)
class PQLayout(Layout):
    """Codes lie sub-vector by sub-vector, a page of tokens each. bits: per channel."""

    bits: int

    @property
    def parts(self) -> tuple[Part, Part, Part, Part]:
        """See `Layout.parts`."""
        keys, values = (sub_vectors(self.bits, dim) for dim in (self.key_dim, self.value_dim))
        nothing = Part((PAGE, 0), torch.uint8)
        return Part((keys, PAGE), torch.uint8), nothing, Part((values, PAGE), torch.uint8), nothing

    @property
    def page_of(self) -> type[Page]:
        """See `Layout.page_of`."""
        return PQPage


@dataclass(frozen=True)
class PQPage(Page):
    """Codes of one sub-vector lie together: (..., sub_vectors, PAGE)."""

    def write(self, place: slice, keys: Coded, values: Coded) -> None:
        """See `Page.write`."""
        self.key_codes[..., place] = keys[0].mT
        self.value_codes[..., place] = values[0].mT

    def read(self) -> tuple[Coded, Coded]:
        """See `Page.read`."""
        return with_nothing(self.key_codes.mT), with_nothing(self.value_codes.mT)


@dataclass(frozen=True)
class ProductQuantizer:
    """Of the keys or the values of a layer.

    mean: (num_kv_heads, head_dim) fp32. encode, decode: (num_kv_heads, head_dim, sub_vectors · width) fp32, E and D.
    centroids: (num_kv_heads, sub_vectors, 256, width) bf16; in the first sub-vector the last one is not used.
    """

    mean: Tensor
    encode: Tensor
    decode: Tensor
    centroids: Tensor

    def __post_init__(self) -> None:
        """ValueError for tensors that do not belong together."""
        heads, head_dim = self.mean.shape
        *_, vectors, count, width = self.centroids.shape
        maps = (heads, head_dim, vectors * width)
        shapes = [tuple(tensor.shape) for tensor in (self.encode, self.decode, self.centroids)]
        if shapes != [maps, maps, (heads, vectors, count, width)] or count != CENTROIDS:
            raise ValueError(
                f"maps {shapes[0]}, {shapes[1]} and centroids {shapes[2]} do not go with a mean of {heads} KV heads of "
                f"{head_dim} channels"
            )

    def tensors(self) -> list[Tensor]:
        """All of them, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    def mapped(self, x: Tensor) -> Tensor:
        """(..., num_kv_heads, tokens, head_dim) floating → y fp32, (..., num_kv_heads, tokens, sub_vectors · width)."""
        return (x.float() - self.mean[:, None]) @ self.encode

    def codes(self, x: Tensor) -> Tensor:
        """(..., num_kv_heads, tokens, head_dim) floating → (..., num_kv_heads, tokens, sub_vectors) uint8."""
        heads, vectors, _, width = self.centroids.shape
        *lead, tokens, _ = x.shape
        y = self.mapped(x).reshape(-1, heads, tokens, vectors, width)
        y = y.permute(1, 3, 0, 2, 4).reshape(heads, vectors, -1, width)
        centroids = self.centroids.float()
        half = centroids.square().sum(dim=-1)[:, :, None] / 2
        half[:, 0, :, DAMAGED] = torch.inf
        codes = torch.empty(y.shape[:3], dtype=torch.uint8, device=y.device)
        step = max(1, SCORES // (heads * vectors * CENTROIDS))
        for start in range(0, y.shape[2], step):
            part = slice(start, start + step)
            codes[:, :, part] = (half - y[:, :, part] @ centroids.mT).argmin(dim=-1)
        codes = codes.view(heads, vectors, -1, tokens).permute(2, 0, 3, 1).reshape(*lead, tokens, vectors)
        damaged = ~x.float().isfinite().all(dim=-1)
        codes[..., 0].masked_fill_(damaged, DAMAGED)
        return codes

    def numbers(self, codes: Tensor) -> Tensor:
        """(..., num_kv_heads, tokens, sub_vectors) uint8 → (..., num_kv_heads, tokens, head_dim) fp32."""
        heads, vectors, _, width = self.centroids.shape
        rows = CENTROIDS * torch.arange(heads * vectors, device=codes.device).view(heads, 1, vectors)
        y = self.centroids.float().view(-1, width)[codes.long() + rows].flatten(-2)
        damaged = codes[..., 0] == DAMAGED
        return torch.where(damaged[..., None], torch.nan, y @ self.decode.mT + self.mean[:, None])

    def to(self, device: torch.device) -> ProductQuantizer:
        """On another device."""
        return ProductQuantizer(*(tensor.to(device) for tensor in self.tensors()))


@dataclass(frozen=True)
class PQCodec(Codec):
    """bits: per channel, of both quantizers."""

    bits: int
    keys: ProductQuantizer
    values: ProductQuantizer

    def __post_init__(self) -> None:
        """ValueError for quantizers of other bits."""
        for quantizer in (self.keys, self.values):
            head_dim, vectors = quantizer.mean.shape[1], quantizer.centroids.shape[1]
            if vectors != sub_vectors(self.bits, head_dim):
                raise ValueError(f"{vectors} sub-vectors of {head_dim} channels are no codes of {self.bits} bits each")

    def layout(self, key_dim: int, value_dim: int) -> PQLayout:
        """See `Codec.layout`."""
        return PQLayout(f"pq{self.bits}", key_dim, value_dim, self.bits)

    def check(self, heads: int, key_dim: int, value_dim: int) -> None:
        """See `Codec.check`."""
        for part, quantizer, dim in (("keys", self.keys, key_dim), ("values", self.values, value_dim)):
            if tuple(quantizer.mean.shape) != (heads, dim):
                raise ValueError(
                    f"the cache was calibrated for {part} of {quantizer.mean.shape[0]} KV heads of "
                    f"{quantizer.mean.shape[1]} channels, and {heads} of {dim} come; it belongs to another model"
                )

    def decode_refusal(self, query: Tensor, kv: CompressedKV) -> str | None:
        """See `Codec.decode_refusal`."""
        widest = max(quantizer.mean.shape[1] for quantizer in (self.keys, self.values))
        if widest > MAX_MAP and torch.cuda.get_device_capability(query.device)[0] != 9:
            return f"its maps of {widest} channels do not fit the device's shared memory"
        return None

    def to(self, device: torch.device) -> PQCodec:
        """See `Codec.to`."""
        return PQCodec(self.bits, self.keys.to(device), self.values.to(device))

    def encode_keys(self, key: Tensor) -> Coded:
        """See `Codec.encode_keys`."""
        return with_nothing(self.keys.codes(key))

    def encode_values(self, value: Tensor) -> Coded:
        """See `Codec.encode_values`."""
        return with_nothing(self.values.codes(value))

    def decode_keys(self, keys: Coded) -> Tensor:
        """See `Codec.decode_keys`."""
        return self.keys.numbers(keys[0])

    def decode_values(self, values: Coded) -> Tensor:
        """See `Codec.decode_values`."""
        return self.values.numbers(values[0])

    def write(self, key: Tensor, value: Tensor, columns: tuple[int, int], pages: Pages, **options: Any) -> None:
        """See `Codec.write`."""
        from .kv_pq_triton import write_pq

        write_pq(key, value, columns, pages, self, ring=options["ring"])

    def read(self, key: Tensor, value: Tensor, columns: tuple[int, int], pages: Pages) -> None:
        """See `Codec.read`."""
        from .kv_pq_triton import read_pq

        read_pq(key, value, columns, pages, self)

    def append(self, key: Tensor, value: Tensor, to: Appendable, *, interpret: bool) -> None:
        """See `Codec.append`."""
        from .kv_pq_triton import append_pq

        append_pq(key, value, to, self)

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
        from .decode_pq_triton import decode_pq

        return decode_pq(query, kv, call, sinks, key_starts, self, interpret=interpret)


def with_nothing(codes: Tensor) -> Coded:
    """Codes that need no parameters."""
    return codes, codes.new_empty((*codes.shape[:-1], 0))
