"""What a kind of cache codes is: the bytes of a page, how tokens become them and come back, which kernels know them.

A kind is one file: a `Layout`, which says what parts a page of one row and KV head has, and a `Codec`, which holds the
static tensors of a layer and turns tokens into codes and parameters and back. Codes and parameters are tensors with the
tokens in their last dimension but one; what a page keeps them as is the business of its `Page`, by default as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .activations import FP8_CAPABILITY, triton_refusal

if TYPE_CHECKING:
    from .decode_attention import CompressedKV, Reading
    from .kv_append import Appendable
    from .kv_pages import Pages

PAGE = 128
ALIGNMENT = 16
Coded = tuple[Tensor, Tensor]
"""Codes and parameters, (..., tokens, n) each."""


@dataclass(frozen=True)
class Part:
    """One part of a page: its shape and dtype. No bytes where the shape holds a zero."""

    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of one row and KV head."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """How a page of one row and KV head lies in memory, one part behind another, padded to 16 bytes::

        key codes | key parameters | value codes | value parameters

    kind: of codes. key_dim, value_dim: channels of a head.
    """

    kind: str
    key_dim: int
    value_dim: int

    @property
    def parts(self) -> tuple[Part, Part, Part, Part]:
        """In the order in which they lie."""
        raise NotImplementedError

    @property
    def offsets(self) -> tuple[int, int, int, int]:
        """First byte of each part."""
        sizes = [part.nbytes for part in self.parts]
        return 0, sizes[0], sizes[0] + sizes[1], sizes[0] + sizes[1] + sizes[2]

    @property
    def parameter_bytes(self) -> int:
        """Of keys and values together."""
        return self.parts[1].nbytes + self.parts[3].nbytes

    @property
    def record_bytes(self) -> int:
        """Of one row and KV head."""
        used = self.offsets[3] + self.parts[3].nbytes
        return -(-used // ALIGNMENT) * ALIGNMENT

    def page(self, records: Tensor) -> Page:
        """Views. records: (..., record_bytes) uint8."""
        views = []
        for part, start in zip(self.parts, self.offsets, strict=True):
            if part.nbytes:
                views.append(records[..., start : start + part.nbytes].view(part.dtype).unflatten(-1, part.shape))
            else:
                views.append(records.new_empty((*records.shape[:-1], *part.shape), dtype=part.dtype))
        return self.page_of(self.kind, *views)

    @property
    def page_of(self) -> type[Page]:
        """What knows how codes lie in their parts."""
        return Page


@dataclass(frozen=True)
class Page:
    """Views of a page of many rows and heads, (..., rows, columns) as its layout says, written in place."""

    kind: str
    key_codes: Tensor
    key_parameters: Tensor
    value_codes: Tensor
    value_parameters: Tensor

    def write(self, place: slice, keys: Coded, values: Coded) -> None:
        """Puts tokens into a page, which keeps its others."""
        self.key_codes[..., place, :], self.key_parameters[..., place, :] = keys
        self.value_codes[..., place, :], self.value_parameters[..., place, :] = values

    def read(self) -> tuple[Coded, Coded]:
        """Codes and parameters of the keys, and of the values, as they were given to `write`."""
        return (self.key_codes, self.key_parameters), (self.value_codes, self.value_parameters)


class Codec:
    """How the tokens of one layer are coded."""

    def layout(self, key_dim: int, value_dim: int) -> Layout:
        """Of a page. ValueError for heads that cannot be stored."""
        raise NotImplementedError

    def check(self, heads: int, key_dim: int, value_dim: int) -> None:
        """ValueError unless tokens of so many KV heads and channels can be coded."""
        self.layout(key_dim, value_dim)

    def to(self, device: torch.device) -> Codec:
        """With its static tensors on another device."""
        raise NotImplementedError

    def encode_keys(self, key: Tensor) -> Coded:
        """key: (..., num_kv_heads, tokens, head_dim) floating, post-RoPE."""
        raise NotImplementedError

    def encode_values(self, value: Tensor) -> Coded:
        """value: (..., num_kv_heads, tokens, head_dim) floating."""
        raise NotImplementedError

    def decode_keys(self, keys: Coded) -> Tensor:
        """(..., num_kv_heads, tokens, head_dim) fp32."""
        raise NotImplementedError

    def decode_values(self, values: Coded) -> Tensor:
        """(..., num_kv_heads, tokens, head_dim) fp32."""
        raise NotImplementedError

    def rounded(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What comes back of keys and values that were coded, fp32."""
        return self.decode_keys(self.encode_keys(key)), self.decode_values(self.encode_values(value))

    def refusal(self, device: torch.device) -> str | None:
        """Why no kernel writes or reads such codes on a device; None if kernels do."""
        return triton_refusal(device, FP8_CAPABILITY)

    def decode_refusal(self, query: Tensor, kv: CompressedKV) -> str | None:
        """Why the kernel of `decode_attention` does not run a call on a device that has it; None if it does."""
        return None

    def write(self, key: Tensor, value: Tensor, columns: tuple[int, int], pages: Pages, **options: Any) -> None:
        """Launch of `kv_pages.write_tokens` without checks. options: ring and interpret."""
        raise NotImplementedError

    def read(self, key: Tensor, value: Tensor, columns: tuple[int, int], pages: Pages) -> None:
        """Launch of `kv_pages.read_tokens` without checks."""
        raise NotImplementedError

    def append(self, key: Tensor, value: Tensor, to: Appendable, *, interpret: bool) -> None:
        """Launch of `kv_append.append_token` without checks."""
        raise NotImplementedError

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
        """Launch of `decode_attention.decode_attention` without checks: out (batch, queries, heads, value_head_dim)."""
        raise NotImplementedError
