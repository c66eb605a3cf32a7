"""Pages: `PAGE` coded tokens of one row and KV head each, one run of bytes that a kernel reads as it lies.

What is in them is up to a `kv_codec.Codec`. Here are the codecs that code every token on its own (`TokenCodec`)::

    key codes | key parameters | value codes | value parameters        padded to a multiple of 16 bytes

Keys lie token by token. Two INT4 codes share a byte half a head apart: channel c in the low half, c + head_dim/2 in the
high one, so that a tile of bytes is two tiles of codes without shuffling. Values of FP8 and INT4 lie channel by
channel, since FP8 matrix units want the tokens that are summed over side by side; tokens t and t + PAGE/2 share a byte.
bf16 values lie token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .activations import launching_on, log_fallback
from .kv_codec import PAGE, Codec, Coded, Layout, Page, Part
from .kv_codes import KeyMap, Kind, check_kind, dequantize_tokens, quantize_tokens

CODE_DTYPES = {"fp8": torch.float8_e4m3fn, "int4": torch.uint8, "bf16": torch.bfloat16}
PARAMETERS = {"fp8": (1, torch.float32), "int4": (2, torch.bfloat16), "bf16": (0, torch.float32)}
"""Numbers per token, and their dtype."""


@dataclass(frozen=True)
class PageLayout(Layout):
    """Of tokens that are coded each on its own."""

    def __post_init__(self) -> None:
        """ValueError for a kind that is unknown or cannot store such heads."""
        check_kind(self.kind, self.key_dim)
        check_kind(self.kind, self.value_dim)

    @property
    def parts(self) -> tuple[Part, Part, Part, Part]:
        """See `Layout.parts`."""
        packed, dtype = 2 if self.kind == "int4" else 1, CODE_DTYPES[self.kind]
        values = (PAGE, self.value_dim) if self.kind == "bf16" else (self.value_dim, PAGE // packed)
        count, parameter = PARAMETERS[self.kind]
        parameters = Part((PAGE, count), parameter)
        return Part((PAGE, self.key_dim // packed), dtype), parameters, Part(values, dtype), parameters

    @property
    def page_of(self) -> type[Page]:
        """See `Layout.page_of`."""
        return TokenPage


@dataclass(frozen=True)
class TokenPage(Page):
    """key_codes: (..., PAGE, key_dim), half as many bytes for INT4. value_codes: (..., value_dim, PAGE), half as many
    bytes for INT4; (..., PAGE, value_dim) for bf16. key_parameters, value_parameters: (..., PAGE, n).
    """

    def write(self, place: slice, keys: Coded, values: Coded) -> None:
        """See `Page.write`; codes and parameters are those of `quantize_tokens`."""
        codes = keys[0]
        if self.kind == "int4":
            low, high = codes.chunk(2, dim=-1)
            codes = low | (high << 4)
        self.key_codes[..., place, :] = codes
        self.key_parameters[..., place, :] = keys[1]
        self.value_parameters[..., place, :] = values[1]
        if self.kind == "bf16":
            self.value_codes[..., place, :] = values[0]
        elif self.kind == "fp8":
            self.value_codes[..., place] = values[0].transpose(-1, -2)
        else:
            whole = self.unpacked_values()
            whole[..., place] = values[0].transpose(-1, -2)
            low, high = whole.chunk(2, dim=-1)
            self.value_codes.copy_(low | (high << 4))

    def unpacked_values(self) -> Tensor:
        """INT4 codes of values, (..., value_dim, PAGE) uint8, one in each byte."""
        return torch.cat((self.value_codes & 15, self.value_codes >> 4), dim=-1)

    def read(self) -> tuple[Coded, Coded]:
        """See `Page.read`."""
        keys, values = self.key_codes, self.value_codes
        if self.kind == "int4":
            keys = torch.cat((keys & 15, keys >> 4), dim=-1)
            values = self.unpacked_values()
        if self.kind != "bf16":
            values = values.transpose(-1, -2)
        return (keys, self.key_parameters), (values, self.value_parameters)


@dataclass(frozen=True)
class TokenCodec(Codec):
    """Codes of `kv_codes.py`, each token on its own. key_map: what is done to keys before they are coded."""

    kind: Kind
    key_map: KeyMap | None = None

    def layout(self, key_dim: int, value_dim: int) -> PageLayout:
        """See `Codec.layout`."""
        return PageLayout(self.kind, key_dim, value_dim)

    def check(self, heads: int, key_dim: int, value_dim: int) -> None:
        """See `Codec.check`."""
        if self.key_map is not None:
            self.key_map.check(heads, key_dim)
        self.layout(key_dim, value_dim)

    def to(self, device: torch.device) -> TokenCodec:
        """See `Codec.to`."""
        return TokenCodec(self.kind, None if self.key_map is None else self.key_map.to(device))

    def encode_keys(self, key: Tensor) -> Coded:
        """See `Codec.encode_keys`."""
        return quantize_tokens(key if self.key_map is None else self.key_map.encode(key), self.kind)

    def encode_values(self, value: Tensor) -> Coded:
        """See `Codec.encode_values`."""
        return quantize_tokens(value, self.kind)

    def decode_keys(self, keys: Coded) -> Tensor:
        """See `Codec.decode_keys`."""
        key = dequantize_tokens(*keys, self.kind)
        return key if self.key_map is None else self.key_map.decode(key)

    def decode_values(self, values: Coded) -> Tensor:
        """See `Codec.decode_values`."""
        return dequantize_tokens(*values, self.kind)

    def write(self, key: Tensor, value: Tensor, columns: tuple[int, int], pages: Pages, **options: Any) -> None:
        """See `Codec.write`."""
        from .kv_pages_triton import write_triton

        write_triton(key, value, columns, pages, **options)

    def read(self, key: Tensor, value: Tensor, columns: tuple[int, int], pages: Pages) -> None:
        """See `Codec.read`."""
        from .kv_pages_triton import read_triton

        read_triton(key, value, columns, pages)

    def append(self, key: Tensor, value: Tensor, to: Any, *, interpret: bool) -> None:
        """See `Codec.append`."""
        from .kv_append_triton import append_triton

        append_triton(key, value, to, interpret=interpret)

    def attend(self, *call: Any, interpret: bool) -> tuple[Tensor, Tensor]:
        """See `Codec.attend`."""
        from .decode_attention_triton import decode_triton

        return decode_triton(*call, interpret=interpret)


@dataclass(frozen=True)
class Pages:
    """Where tokens are. pages: by number, (batch, num_kv_heads, …). table: gives their addresses by number,
    int64 on the device. codec: what wrote them. found: ranges of pages known to be there.
    """

    layout: Layout
    pages: Mapping[int, Page]
    table: Callable[[], Tensor]
    codec: Codec
    found: set[tuple[int, ...]] = field(default_factory=set, compare=False)

    @property
    def key_map(self) -> KeyMap | None:
        """Of a `TokenCodec`."""
        assert isinstance(self.codec, TokenCodec)
        return self.codec.key_map

    def check(self, first: int, last: int, batch: int, heads: int) -> None:
        """ValueError unless pages [first, last) are there and hold such rows and heads; looked at once."""
        if (first, last, batch, heads) in self.found:
            return
        absent = next((number for number in range(first, last) if number not in self.pages), None)
        if absent is not None:
            raise ValueError(f"page {absent} is absent, and its tokens are read")
        # Pages of one layout are alike, and looking at one makes views of it.
        page = self.pages[first] if first < last else None
        if page is not None and (page.kind != self.layout.kind or page.key_codes.shape[:2] != (batch, heads)):
            raise ValueError(f"page {first} has codes {tuple(page.key_codes.shape)} of {page.kind}, which do not fit")
        self.found.add((first, last, batch, heads))


def write_tokens(
    key: Tensor, value: Tensor, columns: tuple[int, int], pages: Pages, *, ring: bool = False, interpret: bool = False
) -> None:
    """Codes tokens and writes them into pages, which keep their other tokens.

    Args:
        key: (batch, num_kv_heads, tokens, head_dim) floating, post-RoPE, any strides.
        value: (batch, num_kv_heads, tokens, value_head_dim).
        columns: first and last + 1; their pages are there.
        ring: a column's token lies at its number modulo `tokens`; else tokens are those of the columns in order.
    """
    if launched(pages.codec, key.device, "write_tokens", interpret=interpret):
        with launching_on(key):
            pages.codec.write(key, value, columns, pages, ring=ring, interpret=interpret)
        return
    write_ref(key, value, columns, pages, ring=ring)


def launched(codec: Codec, device: torch.device, op: str, *, interpret: bool) -> bool:
    """Whether a kernel runs; if not, the reason is logged."""
    refusal = None if interpret else codec.refusal(device)
    if refusal is not None and device.type != "meta":
        log_fallback(op, refusal)
    return refusal is None


def write_ref(key: Tensor, value: Tensor, columns: tuple[int, int], pages: Pages, *, ring: bool = False) -> None:
    """Torch specification of `write_tokens`, any device."""
    start, stop = columns
    if ring:
        place = torch.arange(start, stop, device=key.device) % key.shape[2]
        key, value = key[:, :, place], value[:, :, place]
    keys, values = pages.codec.encode_keys(key), pages.codec.encode_values(value)
    for number in range(start // PAGE, -(-stop // PAGE)):
        low, high = max(start, number * PAGE), min(stop, (number + 1) * PAGE)
        source = slice(low - start, high - start)
        pages.pages[number].write(
            slice(low - number * PAGE, high - number * PAGE),
            (keys[0][:, :, source], keys[1][:, :, source]),
            (values[0][:, :, source], values[1][:, :, source]),
        )


def read_tokens(key: Tensor, value: Tensor, columns: tuple[int, int], pages: Pages, *, interpret: bool = False) -> None:
    """Fills the first tokens of dense keys and values with what pages hold.

    Args:
        key: (batch, num_kv_heads, at least stop − start, head_dim) floating, contiguous.
        value: (batch, num_kv_heads, stop − start, value_head_dim), likewise.
        columns: start and stop; their pages are there.
    """
    if columns[0] >= columns[1]:
        return
    if launched(pages.codec, key.device, "read_tokens", interpret=interpret):
        with launching_on(key):
            pages.codec.read(key, value, columns, pages)
        return
    read_ref(key, value, columns, pages)


def read_ref(key: Tensor, value: Tensor, columns: tuple[int, int], pages: Pages) -> None:
    """Torch specification of `read_tokens`, any device."""
    start, stop = columns
    for number in range(start // PAGE, -(-stop // PAGE)):
        low, high = max(start, number * PAGE), min(stop, (number + 1) * PAGE)
        keys, values = read_page(pages, number)
        source, place = slice(low - number * PAGE, high - number * PAGE), slice(low - start, high - start)
        key[:, :, place] = keys[:, :, source].to(key.dtype)
        value[:, :, place] = values[:, :, source].to(value.dtype)


def read_page(pages: Pages, number: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a page, (batch, num_kv_heads, PAGE, head_dim) fp32."""
    keys, values = pages.pages[number].read()
    return pages.codec.decode_keys(keys), pages.codec.decode_values(values)
