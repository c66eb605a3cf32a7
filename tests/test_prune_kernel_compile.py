"""The kernels over pruned pages compile for the GPUs they are meant for. Compile only; see `compile_cases.py`."""

from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from compile_cases import SHARED_MEMORY, SM89, SM90, Recorder, compile_launch, fits, meta, stack_bytes
from kernel_cases import BF16
from triton.backends.compiler import GPUTarget

from kompakt.compress.cache import TokenStore
from kompakt.kernels import decode_prune_triton, kv_prune_triton
from kompakt.kernels.decode_attention import Reading
from kompakt.kernels.kv_append import LENGTHS, Appendable
from kompakt.sparsify.kv_prune import KVPrune


def filled(values: str, head_dim: int, window: int | None = None, value_dim: int | None = None) -> TokenStore:
    """8 KV heads and 4,097 tokens, bf16. value_dim: default as keys."""
    method = KVPrune(values=values, key_sparsity=0.7, value_sparsity=0.7)  # pyright: ignore[reportArgumentType]
    store = TokenStore(method, statics=method.blank_statics(8, head_dim), window=window)
    x, y = meta(1, 8, 4096, head_dim, dtype=BF16), meta(1, 8, 4096, value_dim or head_dim, dtype=BF16)
    store.append(x, y)
    store.append(x[:, :, :1], y[:, :, :1])
    return store


def compile_pages(target: GPUTarget, kernel: str, values: str, head_dim: int, value_dim: int | None = None):
    store = filled(values, head_dim, value_dim=value_dim)
    x, y = meta(1, 8, 512, head_dim, dtype=BF16), meta(1, 8, 512, value_dim or head_dim, dtype=BF16)
    pages, codec = store.where(), store.codec
    to = Appendable(
        meta(LENGTHS, dtype=torch.int32), (x, y), (x, y), meta(1, dtype=torch.int64), pages, recent_tokens=128
    )
    module: Any = kv_prune_triton
    calls = {
        "write_prune_kernel": lambda: module.write_pruned(x, y, (0, 512), pages, codec, ring=False, interpret=False),
        "read_prune_kernel": lambda: module.read_pruned(x, y, (0, 512), pages),
        "append_prune_kernel": lambda: module.append_pruned(x[:, :, :1], y[:, :, :1], to, codec, interpret=False),
    }
    return compile_launch(kv_prune_triton, kernel, calls[kernel], target)


def compile_decode(target: GPUTarget, values: str, head_dim: int, **changes: Any):
    """The newest queries, default one, of 32 heads."""
    store = filled(values, head_dim, changes.get("window"))
    call = Reading(head_dim**-0.5, changes.get("window"), changes.get("softcap"))
    module: Any = decode_prune_triton
    query = meta(1, 32, changes.get("queries", 1), head_dim, dtype=BF16)
    with mock.patch.object(module, "merge_kernel", Recorder()):
        return compile_launch(
            module,
            "decode_prune_kernel",
            lambda: module.decode_pruned(query, store.read(None, 1), call, None, None),
            target,
        )


@pytest.mark.parametrize(
    ("kernel", "values"),
    [
        ("write_prune_kernel", "bf16"),
        ("write_prune_kernel", "int4"),
        ("read_prune_kernel", "fp8"),
        ("append_prune_kernel", "fp8"),
    ],
)
def test_pages(kernel, values):
    compiled = compile_pages(SM90, kernel, values, 128)
    assert fits(compiled, SM90) and stack_bytes(compiled) == 0


@pytest.mark.parametrize("values", ["bf16", "fp8", "int4"])
def test_decode_attention(values):
    compiled = compile_decode(SM90, values, 128)
    assert fits(compiled, SM90) and stack_bytes(compiled) == 0
    # Two programs on a multiprocessor, as `splits_of` counts on.
    assert 2 * (compiled.metadata.shared + 1024) <= SHARED_MEMORY[90]
    assert "bf16.bf16" in compiled.asm["ptx"]


@pytest.mark.parametrize("kernel", ["write_prune_kernel", "read_prune_kernel", "append_prune_kernel"])
def test_values_of_another_width_than_keys(kernel):
    assert fits(compile_pages(SM90, kernel, "int4", 64, 128), SM90)


def test_other_shapes_and_devices():
    assert fits(compile_pages(SM90, "write_prune_kernel", "fp8", 96), SM90)
    assert fits(compile_decode(SM90, "bf16", 80, window=300, softcap=5.0, queries=16), SM90)
    assert fits(compile_decode(SM89, "int4", 64), SM89)


@pytest.mark.parametrize(("head_dim", "queries"), [(128, 1), (64, 4)])
def test_warps_that_do_not_wait(head_dim, queries):
    warps = pytest.importorskip("kompakt.kernels.decode_prune_warps_triton", reason="this Triton has no Gluon")
    store, module = filled("bf16", head_dim), decode_prune_triton
    query, call = meta(1, 32, queries, head_dim, dtype=BF16), Reading(head_dim**-0.5, None, None)
    with mock.patch.multiple(
        module, hopper_prune_refusal=lambda *_: None, decode_prune_kernel=Recorder(), merge_kernel=Recorder()
    ):
        compiled = compile_launch(
            warps,
            "decode_prune_warps_kernel",
            lambda: module.decode_pruned(query, store.read(None, queries), call, None, None),
            SM90,
        )
    assert fits(compiled, SM90) and stack_bytes(compiled) == 0
    # The buffer that loads and stores of assembly are in is all there is, so that it begins where they begin.
    layout = module.layout_of(store.where())
    units = warps.units_of(layout.keys.kept, layout.values.kept, head_dim)
    assert compiled.metadata.shared == warps.UNIT * units
    # Of the whole program one before the loop and three behind it: no warp waits for others in there.
    assert compiled.asm["ptx"].count("bar.sync") == 4
