"""Runs Gluon kernels whose tensors have one element for each thread on the CPU, as the program is written.

The module's source is executed with `Language` in the place of Gluon's language, and with torch in the place of its
assembly functions, which a kernel's `lanes` maps by name. One program runs at a time, all of its lanes at once: what
threads write is there at once, so a barrier that is missing goes unseen.
"""

from __future__ import annotations

import ctypes
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from interpreter_cases import source_file
from torch import Tensor

from kompakt.kernels.kv_pages import PAGE
from kompakt.kernels.kv_pq import CENTROIDS


class Lanes:
    """A tensor with the operators and conversions of a Gluon tensor; of a scalar, it is a number as well."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, dtype: torch.dtype, *, bitcast: bool = False) -> Lanes:
        return Lanes(self.x.view(dtype) if bitcast else self.x.to(dtype))

    def __index__(self) -> int:
        return int(self.x)

    def __bool__(self) -> bool:
        return bool(self.x)

    def __invert__(self) -> Lanes:
        return Lanes(~self.x)


def bare(value: Any) -> Any:
    return value.x if isinstance(value, Lanes) else value


def operator(name: str, reverse: bool) -> Callable[[Any, Any], Any]:
    def apply(left: Any, right: Any) -> Any:
        if isinstance(right, Pointer):
            return NotImplemented
        a, b = bare(left), bare(right)
        if reverse:
            # Torch has no reversed bit operations and no reversed remainder.
            a, b = torch.as_tensor(b, dtype=a.dtype if isinstance(b, int) else None), a
        return Lanes(getattr(a, f"__{name}__")(b))

    return apply


for _name in ("add", "sub", "mul", "and", "or", "xor", "lshift", "rshift", "floordiv", "mod"):
    setattr(Lanes, f"__{_name}__", operator(_name, reverse=False))
    setattr(Lanes, f"__r{_name}__", operator(_name, reverse=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Lanes, f"__{_name}__", operator(_name, reverse=False))
Lanes.__hash__ = None  # pyright: ignore


class Pointer:
    """Into a flat tensor."""

    def __init__(self, tensor: Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset

    def __add__(self, step: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + bare(step))


class Language:
    """What kernels take from `triton.experimental.gluon.language`."""

    constexpr = types.SimpleNamespace
    static_range = range
    int16, int32, int64 = torch.int16, torch.int32, torch.int64
    float32, bfloat16, uint8 = torch.float32, torch.bfloat16, torch.uint8

    def __init__(self, program: tuple[int, ...]) -> None:
        self.program = program

    def program_id(self, axis: int) -> Lanes:
        return Lanes(torch.tensor(self.program[axis], dtype=torch.int32))

    def arange(self, start: int, stop: int, layout: Any = None) -> Lanes:
        return Lanes(torch.arange(start, stop, dtype=torch.int32))

    def zeros(self, shape: list[int], dtype: torch.dtype, layout: Any = None) -> Lanes:
        return Lanes(torch.zeros(shape, dtype=dtype))

    def zeros_like(self, x: Lanes) -> Lanes:
        return Lanes(torch.zeros_like(x.x))

    def where(self, condition: Lanes, x: Any, y: Any) -> Lanes:
        return Lanes(torch.where(condition.x, bare(x), bare(y)))

    def maximum(self, x: Any, y: Any) -> Lanes:
        # As the hardware: the number, if one is none.
        return Lanes(torch.fmax(*(torch.as_tensor(bare(part)) for part in (x, y))))

    def minimum(self, x: Any, y: Any) -> Lanes:
        return Lanes(torch.fmin(*(torch.as_tensor(bare(part)) for part in (x, y))))

    def load(self, pointer: Pointer, *, volatile: bool = False) -> Lanes:
        place = torch.as_tensor(pointer.offset).long()
        assert (place >= 0).all() and (place < pointer.tensor.numel()).all()
        return Lanes(pointer.tensor[place])

    def store(self, pointer: Pointer, value: Lanes, mask: Lanes | None = None) -> None:
        place = torch.as_tensor(pointer.offset).long()
        keep = torch.ones_like(place, dtype=torch.bool) if mask is None else mask.x
        assert (place[keep] >= 0).all() and (place[keep] < pointer.tensor.numel()).all()
        pointer.tensor[place[keep]] = value.x[keep]

    def BlockedLayout(self, *_: Any) -> None:
        return None

    def SwizzledSharedLayout(self, *_: Any, **__: Any) -> None:
        return None

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
        nothing = types.SimpleNamespace(store=lambda _: None)
        return types.SimpleNamespace(index=lambda _: nothing, _keep_alive=lambda: None)


def as_argument(value: Any) -> Any:
    return Pointer(value.view(-1)) if isinstance(value, Tensor) else value


def kernel_of(paths: list[Path], name: str, given: dict[str, Any]) -> Callable[..., None]:
    """The function `name` of some modules' sources; names of `given` stand for what these import or define."""
    text = "\n".join(path.read_text() for path in paths)
    source = re.sub(r"^from [^(\n]*(\([^)]*\))?$", "", text, flags=re.MULTILINE).replace("gl.constexpr(", "(")
    namespace: dict[str, Any] = {
        "constexpr_function": lambda function: function,
        "gluon": types.SimpleNamespace(jit=lambda f=None, **_: f if f is not None else (lambda function: function)),
        **given,
    }
    exec(compile(source, name, "exec"), namespace)
    namespace.update(given)
    return namespace[name]


class Warps:
    """Shared memory of a program, and the assembly functions of `lanes_triton.py` and its users on it."""

    def __init__(self, size: int, warps: int) -> None:
        self.warps = warps
        self.memory = torch.full((size,), 0xA5, dtype=torch.uint8)

    def _read(self, address: Tensor) -> Tensor:
        place = address.long()[:, None] + torch.arange(4)
        assert (place >= 0).all() and (place < self.memory.numel()).all() and (address % 4 == 0).all()
        return self.memory[place].view(torch.int32)[:, 0]

    def base_of(self, like: Lanes) -> Lanes:
        return Lanes(torch.zeros_like(like.x))

    def words_at(self, offset: Lanes, base: Lanes) -> Lanes:
        return Lanes(self._read(offset.x))

    def pairs_at(self, offset: Lanes, base: Lanes) -> tuple[Lanes, Lanes]:
        assert (offset.x % 8 == 0).all()
        return Lanes(self._read(offset.x)), Lanes(self._read(offset.x + 4))

    def store_words(self, value: Lanes, offset: Lanes, base: Lanes) -> None:
        place = offset.x.long()[:, None] + torch.arange(4)
        assert (place >= 0).all() and (place < self.memory.numel()).all()
        self.memory[place] = value.x.contiguous().view(-1, 1).view(torch.uint8)

    def four_words(self, source: Pointer) -> tuple[Lanes, ...]:
        assert (source.offset % 4 == 0).all()
        return tuple(Lanes(source.tensor[source.offset.long() + word]) for word in range(4))

    def copy_codes(self, source: Lanes, offset: Lanes, base: Lanes, count: int) -> None:
        for address, place in zip(source.x.tolist(), offset.x.tolist(), strict=True):
            for row in range(count):
                chunk = bytearray(ctypes.string_at(address + 1024 * row, 16))
                self.memory[place + 256 * row : place + 256 * row + 16] = torch.frombuffer(chunk, dtype=torch.uint8)

    def copy_rows(self, source: Lanes, offset: Lanes, lane: Lanes, base: Lanes, chunks: int, last: bool) -> None:
        for address, place, number in zip(source.x.tolist(), offset.x.tolist(), lane.x.tolist(), strict=True):
            if number == 0:
                chunk = bytearray(ctypes.string_at(address, 16 * chunks))
                self.memory[place : place + 16 * chunks] = torch.frombuffer(chunk, dtype=torch.uint8)

    def count(self, x: Lanes) -> Lanes:
        return Lanes(sum((x.x >> bit) & 1 for bit in range(32)))

    def spread(self, word: Lanes, number: Lanes, w0: Lanes, w1: Lanes, w2: Lanes, shift: Lanes) -> tuple[Lanes, Lanes]:
        """Kept values from the half word number % 2 on, at the channels whose bit is set."""
        halves = torch.stack((w0.x, w1.x, w2.x), dim=1).contiguous().view(torch.int16).int() & 0xFFFF
        place, found = number.x % 2, []
        for channel in range(4):
            bit = (word.x >> (shift.x + channel)) & 1
            found.append(torch.where(bit == 1, halves.gather(1, place.long()[:, None])[:, 0], 0))
            place = place + bit
        return Lanes(found[0] | found[1] << 16), Lanes(found[2] | found[3] << 16)

    def wait_copies(self, like: Lanes, groups: int) -> None:
        return None

    def thread_barrier(self) -> None:
        return None

    def looked_up(self, codes: Lanes, places: Lanes, base: Lanes, first: int, constant: int, offset: int, per: int):
        place = (places.x >> 8 * constant) & 255
        assert (place < 128).all()
        found = []
        for index in (first, first + 1):
            address = ((codes.x >> 8 * index) & 255) * 256 + place + offset
            # A load of two words takes two turns of half a warp each.
            banks = (address // 4 % 32).view(self.warps, per, -1)
            assert (banks.sort(dim=-1).values.diff(dim=-1) > 0).all(), "bank conflict"
            found.append(tuple(Lanes(self._read(address + 4 * word)) for word in range(per)))
        return tuple(found)

    def product(self, d: Any, a: Any, b: Any) -> tuple[Lanes, ...]:
        lane = torch.arange(32)
        g, t = lane // 4, lane % 4
        left, right, out = (torch.zeros(self.warps, 16, columns) for columns in (16, 8, 8))
        for index in range(4):
            pair = a[index].x.contiguous().view(torch.bfloat16).view(self.warps, 32, 2).float()
            for part in range(2):
                left[:, g + 8 * (index % 2), 2 * t + part + 8 * (index // 2)] = pair[..., part]
        for index in range(2):
            pair = b[index].x.contiguous().view(torch.bfloat16).view(self.warps, 32, 2).float()
            for part in range(2):
                right[:, 2 * t + part + 8 * index, g] = pair[..., part]
        for index in range(4):
            out[:, g + 8 * (index // 2), 2 * t + index % 2] = d[index].x.view(self.warps, 32)
        out += left @ right
        return tuple(Lanes(out[:, g + 8 * (index // 2), 2 * t + index % 2].reshape(-1)) for index in range(4))

    def permuted(self, a: Lanes, b: Lanes, selector: Any) -> Lanes:
        both = torch.stack((a.x, b.x), dim=1).contiguous().view(torch.uint8).to(torch.int64)
        selector = torch.as_tensor(bare(selector)).expand(both.shape[0]).to(torch.int64)
        result = torch.zeros(both.shape[0], dtype=torch.int64)
        for index in range(4):
            nibble = selector >> 4 * index & 15
            byte = both.gather(1, (nibble & 7)[:, None])[:, 0]
            byte = torch.where(nibble >= 8, (byte >> 7) * 255, byte)
            result |= byte << 8 * index
        return Lanes(result.to(torch.int32))

    def both(self, a: Lanes, b: Lanes, selector: int) -> Lanes:
        return self.permuted(a, b, selector)

    def rounded(self, low: Lanes, high: Lanes) -> Lanes:
        return Lanes(torch.stack((low.x, high.x), dim=1).bfloat16().view(torch.int32)[:, 0])

    def across(self, x: Lanes, mask: int) -> Lanes:
        return Lanes(x.x[torch.arange(x.x.numel()) ^ mask])

    def exp2(self, x: Lanes) -> Lanes:
        return Lanes(torch.exp2(x.x))

    def functions(self) -> dict[str, Any]:
        """By the names that the kernel calls them by."""
        return {
            name: getattr(self, name)
            for name in dir(self)
            if not name.startswith("_") and name not in {"memory", "warps"}
        }


class Launched:
    """Stands where a kernel stood; runs the programs of a launch one after another. parts: modules that it imports
    from; size: constants of a launch → bytes of shared memory.
    """

    def __init__(self, module: str, parts: tuple[str, ...], name: str, size: Callable[[dict[str, Any]], int]) -> None:
        self.paths, self.name, self.size, self.runs = [*map(source_file, (*parts, module))], name, size, 0

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        def launch(*arguments: Any, num_warps: int, **constants: Any) -> None:
            for program in ((plane, split) for plane in range(grid[0]) for split in range(grid[1])):
                memory = Warps(self.size(constants), num_warps)
                given = {
                    "gl": Language(program), "PAGE_": PAGE, "CENTROIDS_": CENTROIDS, "LOWEST": -1e38,
                    **memory.functions(),
                }  # fmt: skip
                kernel_of(self.paths, self.name, given)(*map(as_argument, arguments), **constants)
            self.runs += 1

        return launch
