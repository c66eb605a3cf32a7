"""The kernels over product-quantized pages compile for the GPUs they are meant for. Compile only; see
`compile_cases.py`."""

import importlib
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from compile_cases import SHARED_MEMORY, SM89, SM90, Recorder, compile_launch, fits, meta, stack_bytes
from kernel_cases import BF16
from triton.backends.compiler import GPUTarget

from kompakt.compress.cache import TokenStore
from kompakt.kernels import decode_pq_triton, kv_pq_triton
from kompakt.kernels.decode_attention import Reading
from kompakt.kernels.kv_append import LENGTHS, Appendable
from kompakt.quant.kv_pq import KVPQ


def filled(bits: int, head_dim: int, window: int | None = None) -> TokenStore:
    """8 KV heads and 4,097 tokens, bf16."""
    method = KVPQ(bits=bits)  # pyright: ignore[reportArgumentType]
    store = TokenStore(method, statics=method.blank_statics(8, head_dim), window=window)
    x = meta(1, 8, 4096, head_dim, dtype=BF16)
    store.append(x, x)
    store.append(x[:, :, :1], x[:, :, :1])
    return store


def compile_pages(target: GPUTarget, kernel: str, bits: int, head_dim: int):
    store, x = filled(bits, head_dim), meta(1, 8, 512, head_dim, dtype=BF16)
    pages, codec = store.where(), store.codec
    to = Appendable(
        meta(LENGTHS, dtype=torch.int32), (x, x), (x, x), meta(1, dtype=torch.int64), pages, recent_tokens=128
    )
    module: Any = kv_pq_triton
    calls = {
        "write_pq_kernel": lambda: module.write_pq(x, x, (0, 512), pages, codec, ring=False),
        "read_pq_kernel": lambda: module.read_pq(x, x, (0, 512), pages, codec),
        "append_pq_kernel": lambda: module.append_pq(x[:, :, :1], x[:, :, :1], to, codec),
    }
    return compile_launch(kv_pq_triton, kernel, calls[kernel], target)


def compile_decode(target: GPUTarget, kernel: str, bits: int, head_dim: int, **changes: Any):
    """The newest queries, default one, of 32 heads."""
    store = filled(bits, head_dim, changes.get("window"))
    call = Reading(head_dim**-0.5, changes.get("window"), changes.get("softcap"))
    module: Any = decode_pq_triton
    others = {"prepare_pq_kernel", "decode_pq_kernel", "finish_pq_kernel", "merge_kernel"} - {kernel}
    query = meta(1, 32, changes.get("queries", 1), head_dim, dtype=BF16)
    with mock.patch.multiple(module, **{name: Recorder() for name in others}):
        return compile_launch(
            module, kernel, lambda: module.decode_pq(query, store.read(None, 1), call, None, None, store.codec), target
        )


@pytest.mark.parametrize("kernel", ["write_pq_kernel", "read_pq_kernel", "append_pq_kernel"])
def test_pages(kernel):
    compiled = compile_pages(SM90, kernel, 4, 128)
    assert fits(compiled, SM90) and stack_bytes(compiled) == 0


@pytest.mark.parametrize("bits", [4, 2])
def test_decode_attention(bits):
    compiled = compile_decode(SM90, "decode_pq_kernel", bits, 128)
    assert fits(compiled, SM90) and stack_bytes(compiled) == 0
    # Two programs on a multiprocessor, as `splits_of` counts on.
    assert 2 * (compiled.metadata.shared + 1024) <= SHARED_MEMORY[90]
    assert "bf16.bf16" in compiled.asm["ptx"]


def compile_hopper(name: str, bits: int, head_dim: int, heads: int, queries: int):
    """A kernel that `decode_pq_hopper.py` launches, of the module of that name."""
    gluon = pytest.importorskip(f"kompakt.kernels.{name}_triton", reason="this Triton has no Gluon")
    store, call = filled(bits, head_dim), Reading(head_dim**-0.5, None, None)
    module: Any = decode_pq_triton
    query = meta(1, heads, queries, head_dim, dtype=BF16)
    others = {"prepare_pq_kernel", "finish_pq_kernel", "merge_kernel"}
    with mock.patch.multiple(module, hopper_pq_refusal=lambda *_: None, **{name: Recorder() for name in others}):
        return compile_launch(
            *(gluon, f"{name}_kernel"),
            lambda: module.decode_pq(query, store.read(None, queries), call, None, None, store.codec),
            SM90,
        )


@pytest.mark.parametrize(("bits", "head_dim", "queries"), [(4, 128, 3), (2, 128, 3), (4, 64, 4), (4, 128, 16)])
def test_codebooks_in_shared_memory(bits, head_dim, queries):
    """Where lookups look for them: at its beginning."""
    compiled = compile_hopper("decode_pq_hopper", bits, head_dim, 32, queries)
    assert fits(compiled, SM90) and stack_bytes(compiled) <= (0 if queries < 16 else 256)
    assert compiled.asm["ptx"].count("wgmma.mma_async") >= 4
    # Nothing else comes to lie there, as it would if the compiler thought them dead.
    assert "global_smem]" not in compiled.asm["ptx"]


@pytest.mark.parametrize(("bits", "head_dim", "heads"), [(4, 128, 32), (2, 128, 32), (2, 64, 8), (4, 128, 56)])
def test_warps_that_do_not_wait(bits, head_dim, heads):
    compiled = compile_hopper("decode_pq_warps", bits, head_dim, heads, 1)
    assert fits(compiled, SM90) and stack_bytes(compiled) <= (0 if heads <= 32 else 400)
    # The buffer that lookups and stores of assembly are in is all there is, so that it begins where they begin.
    vectors, words = bits * head_dim // 8, head_dim // 2
    module = importlib.import_module("kompakt.kernels.decode_pq_warps_triton")
    assert compiled.metadata.shared == module.UNIT * module.units_of(vectors, words)
    # Of the whole program two before the loop and three behind it: no warp waits for others in there.
    assert compiled.asm["ptx"].count("bar.sync") == 5


def test_other_shapes_and_devices():
    assert fits(compile_pages(SM90, "write_pq_kernel", 3, 96), SM90)
    assert fits(compile_decode(SM90, "decode_pq_kernel", 3, 80, window=300, softcap=5.0, queries=16), SM90)
    assert fits(compile_decode(SM90, "prepare_pq_kernel", 4, 128), SM90)
    assert fits(compile_decode(SM90, "finish_pq_kernel", 4, 128), SM90)
    assert fits(compile_decode(SM89, "decode_pq_kernel", 4, 64), SM89)
