"""A page: `PAGE` coded tokens of one row and KV head, one run of bytes that a kernel reads as it lies.

::

    key codes | key parameters | value codes | value parameters        padded to a multiple of 16 bytes

Keys lie token by token. Two INT4 codes share a byte half a head apart: channel c in the low half, c + head_dim/2 in the
high one, so that a tile of bytes is two tiles of codes without shuffling. Values of FP8 and INT4 lie channel by
channel, since FP8 matrix units want the tokens that are summed over side by side; tokens t and t + PAGE/2 share a byte.
bf16 values lie token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .activations import FP8_CAPABILITY, launching_on, log_fallback, triton_refusal
from .kv_codes import KeyMap, Kind, check_kind, dequantize_tokens, quantize_tokens

PAGE = 128
ALIGNMENT = 16
CODE_DTYPES = {"fp8": torch.float8_e4m3fn, "int4": torch.uint8, "bf16": torch.bfloat16}
PARAMETERS = {"fp8": (1, torch.float32), "int4": (2, torch.bfloat16), "bf16": (0, torch.float32)}
"""Numbers per token, and their dtype."""


@dataclass(frozen=True)
class PageLayout:
    """How a page of one row and KV head lies in memory. key_dim, value_dim: channels of a head."""

    kind: Kind
    key_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        """ValueError for a kind that is unknown or cannot store such heads."""
        check_kind(self.kind, self.key_dim)
        check_kind(self.kind, self.value_dim)

    def code_bytes(self, head_dim: int) -> int:
        """Of a page's keys or values."""
        return PAGE * head_dim * CODE_DTYPES[self.kind].itemsize // (2 if self.kind == "int4" else 1)

    @property
    def parameter_bytes(self) -> int:
        """Of a page's keys, and as many of its values."""
        count, dtype = PARAMETERS[self.kind]
        return PAGE * count * dtype.itemsize

    @property
    def offsets(self) -> tuple[int, int, int, int]:
        """First byte of each part: key codes, key parameters, value codes, value parameters."""
        keys = self.code_bytes(self.key_dim)
        values = keys + self.parameter_bytes
        return 0, keys, values, values + self.code_bytes(self.value_dim)

    @property
    def record_bytes(self) -> int:
        """Of one row and KV head."""
        used = self.offsets[3] + self.parameter_bytes
        return -(-used // ALIGNMENT) * ALIGNMENT

    def page(self, records: Tensor) -> Page:
        """Views. records: (..., record_bytes) uint8."""
        count, dtype = PARAMETERS[self.kind]
        codes = CODE_DTYPES[self.kind]

        def part(index: int, size: int, kind: torch.dtype, shape: tuple[int, int]) -> Tensor:
            start = self.offsets[index]
            return records[..., start : start + size].view(kind).unflatten(-1, shape)

        packed = 2 if self.kind == "int4" else 1
        value_shape = (PAGE, self.value_dim) if self.kind == "bf16" else (self.value_dim, PAGE // packed)
        if count == 0:
            empty = records.new_empty((*records.shape[:-1], PAGE, 0), dtype=dtype)
            parameters = (empty, empty)
        else:
            parameters = tuple(part(index, self.parameter_bytes, dtype, (PAGE, count)) for index in (1, 3))
        return Page(
            self.kind,
            part(0, self.code_bytes(self.key_dim), codes, (PAGE, self.key_dim // packed)),
            parameters[0],
            part(2, self.code_bytes(self.value_dim), codes, value_shape),
            parameters[1],
        )


@dataclass(frozen=True)
class Page:
    """Views of a page of many rows and heads, written in place.

    key_codes: (..., PAGE, key_dim), half as many bytes for INT4. value_codes: (..., value_dim, PAGE), half as many
    bytes for INT4; (..., PAGE, value_dim) for bf16. key_parameters, value_parameters: (..., PAGE, n).
    """

    kind: Kind
    key_codes: Tensor
    key_parameters: Tensor
    value_codes: Tensor
    value_parameters: Tensor

    def write(self, place: slice, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor]) -> None:
        """Puts tokens into a page, which keeps its others. keys, values: codes and parameters of `quantize_tokens`."""
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

    def read(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Codes and parameters of the keys, and of the values, as `quantize_tokens` gave them."""
        keys, values = self.key_codes, self.value_codes
        if self.kind == "int4":
            keys = torch.cat((keys & 15, keys >> 4), dim=-1)
            values = self.unpacked_values()
        if self.kind != "bf16":
            values = values.transpose(-1, -2)
        return (keys, self.key_parameters), (values, self.value_parameters)


@dataclass(frozen=True)
class Pages:
    """Where tokens are. pages: by number, (batch, num_kv_heads, …). table: gives their addresses by number,
    int64 on the device. key_map: what is done to keys before they are coded. found: ranges of pages known to be there.
    """

    layout: PageLayout
    pages: Mapping[int, Page]
    table: Callable[[], Tensor]
    key_map: KeyMap | None = None
    found: set[tuple[int, ...]] = field(default_factory=set, compare=False)

    def check(self, first: int, last: int, batch: int, heads: int) -> None:
        """ValueError unless pages [first, last) are there and hold such rows and heads; looked at once."""
        if (first, last, batch, heads) in self.found:
            return
        for number in range(first, last):
            page = self.pages.get(number)
            if page is None:
                raise ValueError(f"page {number} is absent, and its tokens are read")
            if page.kind != self.layout.kind or page.key_codes.shape[:2] != (batch, heads):
                raise ValueError(
                    f"page {number} has codes {tuple(page.key_codes.shape)} of {page.kind}, which do not fit"
                )
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
    if launched(key.device, "write_tokens", interpret=interpret):
        from .kv_pages_triton import write_triton

        with launching_on(key):
            write_triton(key, value, columns, pages, ring=ring, interpret=interpret)
        return
    write_ref(key, value, columns, pages, ring=ring)


def launched(device: torch.device, op: str, *, interpret: bool) -> bool:
    """Whether a kernel runs; if not, the reason is logged."""
    refusal = None if interpret else triton_refusal(device, FP8_CAPABILITY)
    if refusal is not None and device.type != "meta":
        log_fallback(op, refusal)
    return refusal is None


def write_ref(key: Tensor, value: Tensor, columns: tuple[int, int], pages: Pages, *, ring: bool = False) -> None:
    """Torch specification of `write_tokens`, any device."""
    start, stop = columns
    if ring:
        place = torch.arange(start, stop, device=key.device) % key.shape[2]
        key, value = key[:, :, place], value[:, :, place]
    kind = pages.layout.kind
    keys = quantize_tokens(key if pages.key_map is None else pages.key_map.encode(key), kind)
    values = quantize_tokens(value, kind)
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
    if launched(key.device, "read_tokens", interpret=interpret):
        from .kv_pages_triton import read_triton

        with launching_on(key):
            read_triton(key, value, columns, pages)
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
    key, value = (dequantize_tokens(*part, pages.layout.kind) for part in (keys, values))
    return key if pages.key_map is None else pages.key_map.decode(key), value
