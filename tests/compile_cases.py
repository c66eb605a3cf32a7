"""Compiling a kernel as a launcher launches it, for a GPU that is not there, and what is asked of the result.

A launcher is called on meta tensors with a recorder in the kernel's place, so that what is compiled has the types, the
constants and the options of a real launch.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile

E4M3 = torch.float8_e4m3fn
SM80, SM89, SM90 = (GPUTarget("cuda", capability, 32) for capability in (80, 89, 90))
GFX942 = GPUTarget("hip", "gfx942", 64)
# Shared memory that one program may use: sm_80 163 KB, sm_89 99 KB, sm_90 227 KB, gfx942 64 KB.
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, "gfx942": 64 << 10}
POINTERS = {
    E4M3: "fp8e4nv",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.uint8: "u8",
}


class Recorder:
    """Stands where a kernel stood; keeps the grid and the arguments of a launch."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*values: Any, **named: Any) -> None:
            self.grid, self.values, self.named = grid, values, named

        return launch


def signature_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{POINTERS[value.dtype]}"
    if isinstance(value, int):
        return "i32"
    if isinstance(value, float):
        return "fp32"
    return f"tensordesc<{POINTERS[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"


def compile_launch(
    module: ModuleType,
    kernel_name: str,
    call: Callable[[], Any],
    target: GPUTarget,
    *,
    constant_ones: bool = False,
    **change: Any,
):
    """Compile what `call` launches; `change` replaces constants and options. constant_ones: integers that are 1 become
    constants, as in a launch.
    """
    kernel, recorder = getattr(module, kernel_name), Recorder()
    properties = SimpleNamespace(
        multi_processor_count=132, major=int(target.arch) // 10 if target.backend == "cuda" else 0
    )
    with (
        mock.patch.object(module, kernel_name, recorder),
        mock.patch("torch.cuda.get_device_properties", return_value=properties),
    ):
        call()
    given = dict(zip(kernel.arg_names, recorder.values)) | recorder.named | change
    options = {name: given.pop(name) for name in set(given) - set(kernel.arg_names)}
    plain = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    ones = {name for name, value in given.items() if constant_ones and type(value) is int and value == 1} - plain
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr} | ones
    constants = {name: value for name, value in given.items() if name in constant or value is None}
    signature = {name: "constexpr" if name in constants else signature_of(given[name]) for name in kernel.arg_names}
    # What the launcher finds: torch aligns its tensors, and integers are looked at one by one where that is asked for.
    aligned = [
        name
        for name, value in given.items()
        if name not in constants.keys() | plain
        and (isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0))
    ]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = source_class(module)(kernel, signature, constants, attributes)
    return triton_compile(source, target=target, options=options)


def source_class(module: ModuleType) -> type:
    if not hasattr(module, "gluon"):
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def machine_code(compiled: Any) -> str:
    """SASS of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def stack_bytes(compiled: Any) -> int:
    """Bytes per thread in local memory: spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"STACK:(\d+)", usage)
    return int(found)


def serialized(compiled: Any) -> bool:
    """Whether Hopper waits for every matrix product before the next one, which the assembler does to a whole kernel
    where it cannot tell who else writes a sum.
    """
    code = machine_code(compiled)
    return code.count("WARPGROUP.DEPBAR") >= len(re.findall(r"\b[HQI]GMMA\.", code)) > 0


def undefined_operands(compiled: Any) -> list[str]:
    """Instructions of Hopper that read what no instruction wrote. The assembler of CUDA 12.8 makes two kinds: addresses
    of matrix operands in rows of 32 bytes from uniform registers, and e4m3 codes that are stored as well as read back
    from the stack pointer, R1.
    """
    written: set[int] = set()
    found = []
    for line in machine_code(compiled).splitlines():
        match = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s+(.*?)\s*;", line)
        if match is None:
            continue
        operation, operands = match[1], [part.strip() for part in match[2].split(",")]
        # Some name a predicate before their result.
        place = next((index for index, part in enumerate(operands[:2]) if re.fullmatch(r"UR\d+", part)), None)
        writes = place is not None and re.match(r"U(?!R\b)|R2UR|S2UR|CS2UR|VOTE|REDUX", operation) is not None
        reads = ", ".join(operands[place + 1 :] if writes and place is not None else operands)
        needed = set()
        for register in re.finditer(r"(gdesc\[)?UR(\d+)(\.64)?", reads):
            first, count = int(register[2]), 2 if register[3] or (".64" in operation and writes) else 1
            if register[1]:  # left operand below, right one above; a left one in registers has no address
                count = 2 if re.search(r"R\d+, R\d+(\.reuse)?, gdesc", reads) else 4
                first += 4 - count if count == 2 else 0
            needed |= set(range(first, first + count))
        strange = re.search(r"UNPACK|^HADD|^FADD|^FMUL", operation) and "R1" in re.split(r"[^R0-9]", reads)
        if needed - written or strange:
            found.append(line.strip())
        if writes and place is not None:
            first = int(operands[place][2:])
            size = 4 if ".128" in operation else 2 if re.search(r"\.(64|WIDE)", operation) else 1
            written |= set(range(first, first + size))
    return found


def short_id(value: object) -> str:
    return str(getattr(value, "arch", value)).removeprefix("torch.")


def fits(compiled: Any, target: GPUTarget) -> bool:
    """Room in shared memory, and sound addresses."""
    return compiled.metadata.shared <= SHARED_MEMORY[target.arch] and not (
        target == SM90 and undefined_operands(compiled)
    )
