"""The kernels of sparse attention compile for the GPUs that they are meant for. Compile only, see
`compile_cases.py`.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from compile_cases import (
    GFX942,
    SM80,
    SM89,
    SM90,
    compile_launch,
    fits,
    machine_code,
    meta,
    serialized,
    short_id,
    stack_bytes,
)
from kernel_cases import BF16

from kompakt.kernels import line_scores_triton, sparse_attention_triton, sparse_index_triton
from kompakt.kernels.attention import Call
from kompakt.kernels.attention_quant import quantize_keys_ref, quantize_values_ref
from kompakt.kernels.sparse_attention import StaticPattern
from kompakt.kernels.sparse_index import Extent, Lines, SparseIndex

I32 = torch.int32


def compile_sparse(target, mode: str, head_dim: int, *, static: bool = False):
    """Causal, 32 heads over 8, 4,096 tokens, bf16."""
    query, key = meta(1, 32, 4096, head_dim, dtype=BF16), meta(1, 8, 4096, head_dim, dtype=BF16)
    rows = 32 * 64
    one = meta(rows, dtype=I32)
    index = SparseIndex(meta(rows + 1, dtype=I32), one, one, meta(rows + 1, dtype=I32), one, one, (1, 32, 64))
    pattern = StaticPattern(meta(32, 3, dtype=I32))

    def quantized(key, value, kind, fp8, bounds, **_):
        coded = quantize_keys_ref(key, kind, bounds) if kind else None
        return coded, quantize_values_ref(value, bounds) if fp8 else None

    call = Call(mode, True, None, head_dim**-0.5, None)
    with mock.patch.object(sparse_attention_triton, "quantize_keys_values", quantized):
        return compile_launch(
            sparse_attention_triton,
            "sparse_attention_kernel",
            lambda: sparse_attention_triton.sparse_attention_triton(
                query, key, key, pattern if static else index, call, None, None
            ),
            target,
        )


@pytest.mark.parametrize(
    ("target", "mode", "head_dim", "static"),
    [
        (SM90, "bf16", 128, False),
        (SM90, "fp8_fp8", 128, False),
        (SM90, "int4_fp8", 64, True),
        (SM89, "int8_fp8", 64, False),
        (SM80, "int8_fp16", 128, True),
        (GFX942, "bf16", 64, False),
    ],
    ids=short_id,
)
def test_sparse_attention(target, mode, head_dim, static):
    compiled = compile_sparse(target, mode, head_dim, static=static)
    assert fits(compiled, target)
    if target == SM90:
        ptx = compiled.asm["ptx"]
        assert "wgmma.mma_async" in ptx
        assert (".e4m3.e4m3" in ptx) == ("fp8" in mode) and (".s32.s8.s8" in ptx) == ("int" in mode)
        assert not serialized(compiled)
        # Codes are read 16 at a time.
        assert "LDG.E.U8" not in machine_code(compiled)
        assert stack_bytes(compiled) <= 16


def compile_rows(target, *, fill: bool, by_lines: bool):
    extent = Extent(meta(2, 5, dtype=I32), 4096, 4096)
    flags = meta(2, 8, 127 if by_lines else 64 * 64, dtype=torch.bool)
    chosen = Lines(flags, meta(2, 8, 1000, dtype=I32), meta(2, 8, dtype=I32)) if by_lines else None
    wanted = None if by_lines else flags.view(2, 8, 64, 64)
    return compile_launch(
        sparse_index_triton,
        "rows_kernel",
        lambda: sparse_index_triton.launch_rows(
            chosen, wanted, extent, meta(3, 2 * 8 * 64, dtype=I32), (meta(9, dtype=I32),) * 2 if fill else None,
            causal=True,
        ),
        target,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("target", "fill", "by_lines"), [(SM90, False, True), (SM90, True, False), (SM80, True, True), (GFX942, True, True)]
)
def test_sparse_index(target, fill, by_lines):
    compiled = compile_rows(target, fill=fill, by_lines=by_lines)
    assert fits(compiled, target)
    if target == SM90:
        assert stack_bytes(compiled) == 0


@pytest.mark.parametrize("kernel", ["sums_kernel", "scores_kernel"])
@pytest.mark.parametrize("target", [SM90, GFX942], ids=short_id)
def test_line_scores(target, kernel):
    compiled = compile_launch(
        line_scores_triton,
        kernel,
        lambda: line_scores_triton.LAUNCHES[kernel](
            meta(2, 32, 64, 128, dtype=BF16), meta(2, 8, 4096, 128, dtype=BF16), meta(2, 4, dtype=I32)
        ),
        target,
    )
    assert fits(compiled, target)
    if target == SM90:
        assert "wgmma.mma_async" in compiled.asm["ptx"] and stack_bytes(compiled) == 0
