"""Launch of the INT4 × FP8 kernel for Hopper: how its tiles follow the shape, and what it is given.

The kernel and its mathematics stand in `w4a8_hopper_triton.py`, the specification in `w4a8_linear.py` (`w4a8_ref`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .planes import COUNTERS, DIGIT_SUMS, DIGITS, QuantizedInput

ROWS = 64
"""Outputs of a consumer warpgroup."""
TILE_BYTES = 128
"""Bytes of a packed weight row in a stage."""
LOADER_REGISTERS = 24
"""The fewest that a warp can have."""


@dataclass(frozen=True)
class LaunchConfig:
    """Tiles and launch options of one call; the kernel's docstring has their meaning.

    consumers: warpgroups of 64 outputs each. registers: per thread, on average over the program.
    """

    block_m: int
    consumers: int
    sums: int
    digits: bool
    stages: int
    split: int
    registers: int

    @property
    def consumer_registers(self) -> int:
        """What is left for a thread of a consumer when the loader's warpgroup keeps its minimum."""
        warps = 4 * self.consumers
        return min(240, (self.registers * (warps + 4) - 4 * LOADER_REGISTERS) // warps // 8 * 8)


def launch_config(tokens: int, out_features: int, row_bytes: int, sum_size: int, processors: int) -> LaunchConfig:
    """Tiles for (tokens, 2·row_bytes) × (out_features, 2·row_bytes); `processors`: multiprocessors of the device.

    Chosen on an H200 from 14336×4096, 4096×14336 and 28672×8192. µs for the first with one scale per row, without the
    quantization of the input, at 1 / 16 / 64 / 128 / 256 / 512 tokens: 10.2 / 9.9 / 11.8 / 16.2 / 31 / 61. Fewer than
    two warpgroups per program, or more than one program per tile, pay only where multiprocessors stay idle otherwise.
    From 128 tokens on decoding to q is as fast as digits and needs fewer registers; the two sums at a time that
    go with digits spill there.
    """
    block_m = 16 if tokens <= 16 else 64 if tokens <= 64 else 128
    columns = ceil_div(tokens, block_m)
    tiles = ceil_div(out_features, 2 * ROWS) * columns
    grouped = sum_size > 0
    small = tiles < processors // 2
    consumers = 1 if small or (grouped and 64 < tokens <= 256) else 2
    programs = ceil_div(out_features, consumers * ROWS) * columns
    blocks = ceil_div(row_bytes, TILE_BYTES)
    wanted = processors * (2 if block_m == 16 else 1)
    split = 1
    while small and 2 * split * programs <= wanted and blocks >= 8 * split and programs <= COUNTERS:
        split *= 2
    alone = programs * split <= processors
    registers, stages = {
        16: (64 if consumers == 1 else 80, 4),
        64: (128 if consumers == 1 else 168, 4),
        128: (168, 3) if consumers == 2 else (240, 4) if alone else (128, 2),
    }[block_m]
    digits = sum_size == DIGIT_SUMS and block_m < 128
    sums = 2 * TILE_BYTES // sum_size if grouped else 1
    return LaunchConfig(block_m, consumers, sums, digits, stages, split, registers)


def descriptor(tensor: Tensor, rows: int, width: int) -> Any:
    """TMA view of a (rows, bytes) tensor in boxes of `rows` × `width` bytes, swizzled over the whole width."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, [rows, width], gl.NVMMASharedLayout(width, 8, 2))


def w4a8_hopper(
    planes: QuantizedInput,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    sum_size: int,
    out_dtype: torch.dtype,
    *,
    weights_ready: bool = True,
) -> Tensor:
    """planes of (tokens, in_features) with their correction → (tokens, out_features).

    weight_packed: (out_features, words) int32, rows 16-byte aligned. weight_scale: (out_features, groups).
    weights_ready: no kernel just before wrote the weights, so that they may be loaded while it runs.
    """
    from .w4a8_hopper_triton import w4a8_hopper_kernel

    packed = weight_packed.view(torch.uint8)
    out_features, row_bytes = packed.shape
    tokens, groups = planes.scale.shape[0], weight_scale.shape[1]
    grouped = sum_size > 0
    y = torch.empty((tokens, out_features), dtype=out_dtype, device=packed.device)
    processors = torch.cuda.get_device_properties(packed.device).multi_processor_count
    c = launch_config(tokens, out_features, row_bytes, sum_size, processors)
    assert planes.correction.numel() or (grouped and not c.digits), "the input was quantized for another product"
    grid = (ceil_div(out_features, c.consumers * ROWS), ceil_div(tokens, c.block_m), c.split)
    partials = torch.empty(
        grid[0] * grid[1] * c.consumers * c.split * ROWS * c.block_m if c.split > 1 else 0,
        dtype=torch.float32,
        device=packed.device,
    )
    values = planes.values.view(tokens, 2 * row_bytes)
    launch: Any = w4a8_hopper_kernel[grid]
    launch(
        descriptor(values, c.block_m, TILE_BYTES),
        descriptor(packed, ROWS, TILE_BYTES),
        descriptor(planes.correction if c.digits else values, c.block_m, DIGITS),
        planes.scale,
        None if grouped else planes.correction,
        weight_scale,
        bias,
        y,
        partials,
        planes.counters,
        tokens,
        out_features,
        row_bytes,
        groups,
        2 * row_bytes // groups // sum_size if grouped else 1,
        BLOCK_M=c.block_m,
        CONSUMERS=c.consumers,
        SUMS=c.sums,
        STAGES=c.stages,
        SPLIT=c.split,
        DIGITS=c.digits,
        HAS_BIAS=bias is not None,
        CONSUMER_REGISTERS=c.consumer_registers,
        LOADER=LOADER_REGISTERS,
        # A multiply-add is one instruction; a later Triton leaves that to be asked for.
        enable_fp_fusion=True,
        num_warps=4,
        maxnreg=c.registers,
        launch_pdl=weights_ready,
    )
    return y


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)
