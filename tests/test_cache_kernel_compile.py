"""The kernels of a compressed cache compile for the GPUs they are meant for. Compile only; see `compile_cases.py`."""

import re
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from compile_cases import (
    GFX942,
    SHARED_MEMORY,
    SM80,
    SM89,
    SM90,
    Recorder,
    compile_launch,
    fits,
    meta,
    short_id,
    stack_bytes,
)
from decode_cases import METHODS, statics_of
from kernel_cases import BF16, FP32
from triton.backends.compiler import GPUTarget

from kompakt.compress.cache import TokenStore
from kompakt.compress.evicting import EvictingStore
from kompakt.compress.kv_evict import KVEvict
from kompakt.kernels import decode_attention_triton, decode_ends_triton, kv_append_triton, kv_pages_triton
from kompakt.kernels.decode_attention import Reading
from kompakt.kernels.kv_append import LENGTHS, Appendable
from kompakt.kernels.kv_codes import KeyMap
from kompakt.kernels.kv_pages import PageLayout, Pages, TokenCodec


def compile_decode(target: GPUTarget, kernel: str, kind: str, head_dim: int, *, portable: bool = False, **changes: Any):
    """The newest queries, default one, of 32 heads over 8 and 4,097 tokens, bf16. evicted: half of them are gone."""
    statics = statics_of(8, head_dim) if kind == "int4" else {}
    if changes.get("evicted"):
        codes = "none" if kind == "bf16" else kind
        store = EvictingStore(KVEvict(ratio=2.0, codes=codes), statics=statics)
    else:
        store = TokenStore(METHODS[kind](), statics=statics, window=changes.get("window"))
    x = meta(1, 8, 4096, head_dim, dtype=BF16)
    store.append(x, x)
    store.append(x[:, :, :1], x[:, :, :1])
    call = Reading(head_dim**-0.5, changes.get("window"), changes.get("softcap"))
    places = {"prepare_kernel": decode_ends_triton, "decode_kernel": decode_attention_triton}
    places["merge_kernel"] = decode_ends_triton
    module = places.pop(kernel)
    with ExitStack() as stack:
        for name, place in places.items():
            stack.enter_context(mock.patch.object(place, name, Recorder()))
        query = meta(1, 32, changes.get("queries", 1), head_dim, dtype=BF16)
        return compile_launch(
            *(module, kernel),
            lambda: decode_attention_triton.decode_triton(query, store.read(None, 1), call, None, None),
            target,
            **({"INTERPRET": True} if portable else {}),
        )


def compile_pages(target: GPUTarget, kernel: str, kind: str, head_dim: int):
    """Tokens of 8 heads, bf16; keys of INT4 mapped."""
    x, layout = meta(1, 8, 512, head_dim, dtype=BF16), PageLayout(kind, head_dim, head_dim)  # pyright: ignore
    channels = meta(8, head_dim, dtype=FP32)
    key_map = KeyMap(channels, channels, rotated=True) if kind == "int4" else None
    pages = Pages(layout, {}, lambda: meta(4, dtype=torch.int64), TokenCodec(kind, key_map))  # pyright: ignore
    starts, lengths = meta(1, dtype=torch.int64), meta(LENGTHS, dtype=torch.int32)
    calls = {
        "write_kernel": lambda: kv_pages_triton.write_triton(x, x, (0, 512), pages, ring=False),
        "read_kernel": lambda: kv_pages_triton.read_triton(x, x, (0, 512), pages),
        "append_kernel": lambda: kv_append_triton.append_triton(
            x[:, :, :1], x[:, :, :1], Appendable(lengths, (x, x), (x, x), starts, pages, 128)
        ),
    }
    return compile_launch(
        kv_append_triton if kernel == "append_kernel" else kv_pages_triton, kernel, calls[kernel], target
    )


@pytest.mark.parametrize(("kind", "head_dim"), [("int4", 128), ("int4", 96), ("fp8", 64), ("bf16", 256)])
@pytest.mark.parametrize("kernel", ["write_kernel", "read_kernel", "append_kernel"])
def test_pages(kernel, kind, head_dim):
    assert fits(compile_pages(SM90, kernel, kind, head_dim), SM90)
    if head_dim == 128:
        assert fits(compile_pages(SM89, kernel, kind, head_dim), SM89)
        assert compile_pages(GFX942, kernel, kind, head_dim).asm


@pytest.mark.parametrize("kernel", ["prepare_kernel", "merge_kernel"])
@pytest.mark.parametrize("target", [SM90, SM89, GFX942], ids=short_id)
def test_ends_of_decode_attention(target, kernel):
    assert fits(compile_decode(target, kernel, "int4", 128), target)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kind", list(METHODS))
def test_decode_attention(kind, head_dim):
    compiled = compile_decode(SM90, "decode_kernel", kind, head_dim)
    assert fits(compiled, SM90)
    # Room for as many programs as `launch_config` counts on.
    programs = {64: 3, 128: 3 if kind == "int4" else 2, 256: 1}[head_dim]
    assert programs * (compiled.metadata.shared + 1024) <= SHARED_MEMORY[90]
    ptx = compiled.asm["ptx"]
    assert ".e4m3.e4m3" in ptx or kind == "bf16"
    # Codes come 16 bytes at a time, and those of INT4 as the left operand, in registers.
    assert "cp.async.cg.shared.global" in ptx
    assert (re.search(r"m64n16k32\.f32\.e4m3\.e4m3 \{[^}]*\}, \{", ptx) is not None) == (kind == "int4")
    assert stack_bytes(compiled) <= (16 if head_dim < 256 else 200)


@pytest.mark.parametrize(
    ("kind", "head_dim", "queries"),
    [("int4", 128, 1), ("fp8", 128, 1), ("bf16", 128, 1), ("int4", 256, 1), ("fp8", 64, 16), ("bf16", 96, 4)],
)
def test_heads_that_have_kept_their_own_tokens(kind, head_dim, queries):
    """Two ways to find pages cost neither wide loads nor room for programs."""
    compiled = compile_decode(SM90, "decode_kernel", kind, head_dim, queries=queries, evicted=True)
    assert fits(compiled, SM90) and "cp.async.cg.shared.global" in compiled.asm["ptx"]
    plain = compile_decode(SM90, "decode_kernel", kind, head_dim, queries=queries)
    assert compiled.metadata.shared == plain.metadata.shared
    assert stack_bytes(compiled) <= stack_bytes(plain) + 16
    assert fits(compile_decode(SM89, "decode_kernel", kind, head_dim, queries=queries, evicted=True), SM89)
    assert fits(compile_decode(SM90, "merge_kernel", kind, head_dim, queries=queries, evicted=True), SM90)


@pytest.mark.parametrize(
    ("kind", "head_dim", "queries"),
    [
        *[("int4", 8, 1), ("int4", 32, 3), ("int4", 96, 1), ("int4", 128, 16), ("int4", 192, 4), ("fp8", 8, 1)],
        *[("fp8", 16, 4), ("fp8", 80, 16), ("fp8", 128, 4), ("bf16", 16, 1), ("bf16", 64, 16), ("bf16", 128, 8)],
    ],
)
def test_other_shapes(kind, head_dim, queries):
    assert fits(compile_decode(SM90, "decode_kernel", kind, head_dim, queries=queries, window=300), SM90)


@pytest.mark.parametrize("target", [SM89, GFX942], ids=short_id)
def test_decode_attention_elsewhere(target):
    """GFX942 without the assembly of NVIDIA's."""
    portable = target == GFX942
    assert compile_decode(target, "decode_kernel", "int4", 64, portable=portable, window=300, softcap=5.0).asm
    assert compile_decode(target, "decode_kernel", "int4", 64, portable=portable, evicted=True, softcap=5.0).asm


def test_sm80_has_no_e4m3():
    """Why dispatch asks for compute capability 8.9."""
    with pytest.raises(Exception, match="at") as raised:
        compile_decode(SM80, "decode_kernel", "fp8", 64)
    error: BaseException | None = raised.value
    messages = []
    while error is not None:
        messages.append(str(error))
        error = error.__cause__
    assert "fp8e4nv not supported" in "".join(messages)
