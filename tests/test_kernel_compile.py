"""Every Triton kernel compiles for the GPUs it is meant for. Compile only: nothing is run, no GPU is needed.

A launcher is called on meta tensors with a recorder in the kernel's place, so that what is compiled has the types, the
constants and the options of a real launch.
"""

import ast
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from decode_cases import METHODS, statics_of
from kernel_cases import BF16, FP16, FP32
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile

from kompakt.compress.cache import TokenStore
from kompakt.kernels import (
    activations_triton,
    attention_quant_triton,
    attention_triton,
    decode_attention_triton,
    int4_expand_triton,
    int4_linear_triton,
    kv_append_triton,
    kv_pages_triton,
    planes_triton,
)
from kompakt.kernels.attention import MODES, Call
from kompakt.kernels.attention_hopper import attention_hopper
from kompakt.kernels.attention_quant import quantize_keys_ref, quantize_values_ref
from kompakt.kernels.decode_attention import Reading
from kompakt.kernels.kv_append import LENGTHS, Appendable
from kompakt.kernels.kv_codes import KeyMap
from kompakt.kernels.kv_pages import PageLayout, Pages
from kompakt.kernels.planes import DIGIT_SUMS, empty_planes
from kompakt.kernels.w4a8_hopper import w4a8_hopper

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


def compile_launch(module: ModuleType, kernel_name: str, call: Callable[[], Any], target: GPUTarget, **change: Any):
    """Compile what `call` launches; `change` replaces constants and options."""
    kernel, recorder = getattr(module, kernel_name), Recorder()
    with (
        mock.patch.object(module, kernel_name, recorder),
        mock.patch("torch.cuda.get_device_properties", return_value=SimpleNamespace(multi_processor_count=132)),
    ):
        call()
    given = dict(zip(kernel.arg_names, recorder.values)) | recorder.named | change
    options = {name: given.pop(name) for name in set(given) - set(kernel.arg_names)}
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    constants = {name: value for name, value in given.items() if name in constant or value is None}
    signature = {name: "constexpr" if name in constants else signature_of(given[name]) for name in kernel.arg_names}
    # What the launcher finds: torch aligns its tensors, and integers are looked at one by one where that is asked for.
    plain = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
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


def compile_int4(target: GPUTarget, dtype: torch.dtype, tokens: int, group: int, *, bias: bool = True):
    """4096×4096 on `tokens` rows of `dtype`, FP8 included."""
    fp8 = dtype == E4M3
    result = BF16 if fp8 else dtype

    def call() -> None:
        int4_linear_triton.int4_matmul(
            meta(tokens, 4096, dtype=dtype),
            meta(4096, 512, dtype=torch.int32),
            meta(4096, 4096 // group, dtype=BF16),
            meta(4096, dtype=result) if bias else None,
            x_scale=meta(tokens, 1, dtype=FP32) if fp8 else None,
            out_dtype=result,
        )

    return compile_launch(int4_linear_triton, "int4_matmul_kernel", call, target)


def compile_quantize(target: GPUTarget, dtype: torch.dtype):
    x = meta(4, 4096, dtype=dtype)
    return compile_launch(
        activations_triton, "quantize_rows_kernel", lambda: activations_triton.quantize_rows(x), target
    )


def compile_planes(target: GPUTarget, dtype: torch.dtype, tokens: int, in_features: int, sum_size: int | None):
    x = meta(tokens, in_features, dtype=dtype)
    # Programmatic dependent launch begins with sm_90.
    change = {} if target == SM90 else {"PDL": False}
    return compile_launch(
        planes_triton,
        "quantize_planes_kernel",
        lambda: planes_triton.quantize_planes_triton(x, in_features // 2, sum_size),
        target,
        **change,
    )


def compile_expand(target: GPUTarget, dtype: torch.dtype, groups: int):
    """4096×4096 to `dtype`, FP8 included."""
    packed, scale = meta(4096, 512, dtype=torch.int32), meta(4096, groups, dtype=BF16)

    def call() -> None:
        if dtype == E4M3:
            int4_expand_triton.expand_fp8_triton(packed, scale, 4096)
        else:
            int4_expand_triton.expand_16bit_triton(packed, scale, 4096, dtype)

    return compile_launch(int4_expand_triton, "expand_kernel", call, target)


def compile_hopper(tokens: int, out_features: int, sum_size: int):
    """`out_features`×4096 for sm_90; groups of `sum_size`, 0 for one scale per row."""
    kernel = pytest.importorskip("kompakt.kernels.w4a8_hopper_triton", reason="this Triton has no Gluon")
    planes = empty_planes(meta(tokens, 4096, dtype=BF16), 2048, sum_size if sum_size in (0, DIGIT_SUMS) else None)
    packed = meta(out_features, 512, dtype=torch.int32)
    scale = meta(out_features, 4096 // sum_size if sum_size else 1, dtype=BF16)
    return compile_launch(
        kernel,
        "w4a8_hopper_kernel",
        lambda: w4a8_hopper(planes, packed, scale, None, sum_size, BF16),
        SM90,
    )


def compile_codes(target: GPUTarget, kernel: str, kind: str):
    """8,192 keys and values of 8 heads."""
    x = meta(1, 8, 8192, 128, dtype=BF16)
    other = {"means_kernel": "codes_kernel", "codes_kernel": "means_kernel"}[kernel]
    with mock.patch.object(attention_quant_triton, other, Recorder()):
        return compile_launch(
            attention_quant_triton,
            kernel,
            lambda: attention_quant_triton.quantize_keys_values(x, x, kind, True, None),
            target,
        )


def compile_attention(
    target: GPUTarget, mode: str, head_dim: int, *, window: int | None = None, softcap: float | None = None
):
    """Causal, 32 heads over 8, 4,096 tokens, bf16; on "gluon" by `attention_hopper`."""
    query, key = meta(1, 32, 4096, head_dim, dtype=BF16), meta(1, 8, 4096, head_dim, dtype=BF16)
    call = Call(mode, True, window, head_dim**-0.5, softcap)

    def quantized(key: Tensor, value: Tensor, kind: str | None, fp8: bool, bounds: None, **_: bool) -> tuple:
        return quantize_keys_ref(key, kind, bounds) if kind else None, quantize_values_ref(
            value, bounds
        ) if fp8 else None

    module, name, run = attention_triton, "attention_kernel", attention_triton.attention_triton
    if target == "gluon":
        module = pytest.importorskip("kompakt.kernels.attention_hopper_triton", reason="this Triton has no Gluon")
        name, run, target = "attention_hopper_kernel", attention_hopper, SM90
    with (
        mock.patch.object(attention_quant_triton, "quantize_keys_values", quantized),
        mock.patch.object(attention_triton, "quantize_keys_values", quantized),
    ):
        return compile_launch(module, name, lambda: run(query, key, key, call, None, None), target)


def compile_decode(target: GPUTarget, kernel: str, kind: str, head_dim: int, **changes: Any):
    """One query of 32 heads over 8 and 4,097 tokens, bf16."""
    statics = statics_of(8, head_dim) if kind == "int4" else {}
    store = TokenStore(METHODS[kind](), statics=statics, window=changes.get("window"))
    x = meta(1, 8, 4096, head_dim, dtype=BF16)
    store.append(x, x)
    store.append(x[:, :, :1], x[:, :, :1])
    call = Reading(head_dim**-0.5, changes.get("window"), changes.get("softcap"))
    module = decode_attention_triton
    others = {"prepare_kernel", "decode_kernel", "merge_kernel"} - {kernel}
    with mock.patch.multiple(module, **{name: Recorder() for name in others}):
        query = meta(1, 32, 1, head_dim, dtype=BF16)
        return compile_launch(
            module, kernel, lambda: module.decode_triton(query, store.read(None, 1), call, None, None), target
        )


def compile_pages(target: GPUTarget, kernel: str, kind: str, head_dim: int):
    """Tokens of 8 heads, bf16; keys of INT4 mapped."""
    x, layout = meta(1, 8, 512, head_dim, dtype=BF16), PageLayout(kind, head_dim, head_dim)  # pyright: ignore
    channels = meta(8, head_dim, dtype=FP32)
    key_map = KeyMap(channels, channels, rotated=True) if kind == "int4" else None
    pages = Pages(layout, {}, lambda: meta(4, dtype=torch.int64), key_map)
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


def short_id(value: object) -> str:
    return str(getattr(value, "arch", value)).removeprefix("torch.")


def fits(compiled: Any, target: GPUTarget) -> bool:
    return compiled.metadata.shared <= SHARED_MEMORY[target.arch]


@pytest.mark.parametrize(
    ("target", "tokens", "group"),
    [(SM90, 1, 128), (SM90, 16, 32), (SM90, 4096, 128), (SM89, 1, 64), (SM89, 4096, 128), (GFX942, 16, 32)],
    ids=short_id,
)
def test_w4a8(target, tokens, group):
    compiled = compile_int4(target, E4M3, tokens, group)
    assert fits(compiled, target)
    if target == SM90:
        assert "wgmma.mma_async.sync.aligned" in compiled.asm["ptx"]
        # Half of a group of 32 is too short for an FP8 product.
        assert (".e4m3.e4m3" if group > 32 else ".bf16.bf16") in compiled.asm["ptx"]


@pytest.mark.parametrize(
    ("target", "dtype", "tokens"),
    [(SM90, BF16, 4096), (SM90, FP16, 1), (SM80, BF16, 4096), (SM80, FP32, 64), (GFX942, BF16, 16)],
    ids=short_id,
)
def test_w4a16(target, dtype, tokens):
    compiled = compile_int4(target, dtype, tokens, 64, bias=tokens > 1)
    assert fits(compiled, target)
    if target == SM90 and dtype != FP32:
        assert "wgmma.mma_async.sync.aligned" in compiled.asm["ptx"]


@pytest.mark.parametrize(("target", "dtype"), [(SM90, BF16), (SM89, FP32), (GFX942, FP16)], ids=short_id)
def test_quantize_fp8(target, dtype):
    compiled = compile_quantize(target, dtype)
    if target == SM90:
        assert "cvt.rn.satfinite.e4m3x2.f32" in compiled.asm["ptx"] and "div.rn.f32" in compiled.asm["ptx"]


@pytest.mark.parametrize(
    ("target", "dtype", "tokens", "in_features", "sum_size"),
    [
        (SM90, BF16, 1, 4096, 128),
        (SM90, FP32, 600, 14336, 0),
        (SM90, BF16, 600, 14336, None),
        (SM90, FP16, 17, 576, 64),
        (SM89, BF16, 17, 576, 32),
        (GFX942, BF16, 17, 4096, 128),
    ],
    ids=short_id,
)
def test_quantize_planes(target, dtype, tokens, in_features, sum_size):
    compiled = compile_planes(target, dtype, tokens, in_features, sum_size)
    assert fits(compiled, target)
    if target == SM90:
        ptx = compiled.asm["ptx"]
        assert "cvt.rn.satfinite.e4m3x2.f32" in ptx and "div.rn.f32" in ptx
        assert "griddepcontrol.launch_dependents" in ptx


@pytest.mark.parametrize("groups", [1, 32])
@pytest.mark.parametrize(
    ("target", "dtype"),
    [(SM90, E4M3), (SM89, E4M3), (GFX942, E4M3), (SM90, BF16), (SM80, BF16), (SM80, FP16)],
    ids=short_id,
)
def test_expand(target, dtype, groups):
    assert fits(compile_expand(target, dtype, groups), target)


@pytest.mark.parametrize("sum_size", [0, 32, 64, 128])
@pytest.mark.parametrize(
    ("tokens", "out_features"), [(1, 4096), (16, 28672), (64, 4096), (64, 14336), (256, 4096), (600, 14336)]
)
def test_w4a8_hopper(tokens, out_features, sum_size):
    compiled = compile_hopper(tokens, out_features, sum_size)
    assert fits(compiled, SM90)
    ptx = compiled.asm["ptx"]
    assert re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3", ptx)
    assert "griddepcontrol.wait" in ptx and "setmaxnreg" in ptx
    # Short groups spill a little: with Triton 3.9 152 bytes at most for groups of 32 from 64 tokens on, 48 for 64.
    assert stack_bytes(compiled) <= {0: 0, 128: 0, 64: 48, 32: 152}[sum_size]


@pytest.mark.parametrize("kernel", ["means_kernel", "codes_kernel"])
@pytest.mark.parametrize(
    ("target", "kind"), [(SM90, "fp8"), (SM90, "int4"), (SM89, "int8"), (GFX942, "int8")], ids=short_id
)
def test_attention_codes(target, kernel, kind):
    assert fits(compile_codes(target, kernel, kind), target)


@pytest.mark.parametrize(
    ("target", "mode", "head_dim"),
    [
        *((SM90, mode, head_dim) for mode in MODES for head_dim in (64, 128)),
        (SM90, "int8_fp8", 256),
        (SM89, "int8_fp8", 128),
        (SM80, "int8_fp16", 128),
        (SM80, "bf16", 80),
        (GFX942, "int8_fp16", 64),
    ],
    ids=short_id,
)
def test_attention(target, mode, head_dim):
    compiled = compile_attention(target, mode, head_dim, window=512 if head_dim == 64 else None)
    assert fits(compiled, target)
    if target == SM90:
        ptx = compiled.asm["ptx"]
        assert "wgmma.mma_async" in ptx
        assert (".e4m3.e4m3" in ptx) == ("fp8" in mode) and (".s32.s8.s8" in ptx) == ("int" in mode)


@pytest.mark.parametrize("window", [None, 512])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mode", ["fp8_fp8", "int8_fp8"])
def test_attention_hopper(mode, head_dim, window):
    compiled = compile_attention("gluon", mode, head_dim, window=window)  # pyright: ignore
    assert fits(compiled, SM90)
    ptx = compiled.asm["ptx"]
    assert "setmaxnreg" in ptx and (".s32.s8.s8" in ptx) == (mode == "int8_fp8")
    assert f"m64n{head_dim}k32.f32.e4m3.e4m3" in ptx
    # Where the assembler makes products wait for each other, each has a wait of its own; here a chain has one.
    code = machine_code(compiled)
    assert 0 < 3 * code.count("WARPGROUP.DEPBAR") <= code.count("GMMA.64x")
    # Around the products nothing is spilled; before the first and after the last some registers are.
    assert stack_bytes(compiled) <= (0 if head_dim == 64 else 400)


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
    # Room for as many programs as `launch_config` counts on.
    programs = {64: 3, 128: 3 if kind == "int4" else 2, 256: 1}[head_dim]
    assert programs * (compiled.metadata.shared + 1024) <= SHARED_MEMORY[90]
    ptx = compiled.asm["ptx"]
    assert ".e4m3.e4m3" in ptx or kind == "bf16"
    # Codes come 16 bytes at a time, and those of INT4 as the left operand, in registers.
    assert "cp.async.cg.shared.global" in ptx
    assert (re.search(r"m64n16k32\.f32\.e4m3\.e4m3 \{[^}]*\}, \{", ptx) is not None) == (kind == "int4")
    assert stack_bytes(compiled) <= (0 if head_dim < 256 else 200)


@pytest.mark.parametrize("target", [SM89, GFX942], ids=short_id)
def test_decode_attention_elsewhere(target):
    """GFX942 only without Hopper's assembly for INT4."""
    kind = "int4" if target == SM89 else "fp8"
    assert compile_decode(target, "decode_kernel", kind, 64, window=300, softcap=5.0).asm


@pytest.mark.parametrize(
    "build",
    [
        lambda: compile_int4(SM80, E4M3, 16, 128),
        lambda: compile_quantize(SM80, BF16),
        lambda: compile_planes(SM80, BF16, 16, 4096, 0),
        lambda: compile_expand(SM80, E4M3, 1),
        lambda: compile_attention(SM80, "int8_fp8", 64),
        lambda: compile_decode(SM80, "decode_kernel", "fp8", 64),
    ],
    ids=["w4a8", "quantize", "planes", "expand", "attention", "decode"],
)
def test_sm80_has_no_e4m3(build: Callable[[], Any]):
    """Why dispatch asks for compute capability 8.9: were this to pass, the demand could be lowered."""
    with pytest.raises(Exception) as raised:
        build()
    error: BaseException | None = raised.value
    messages = []
    while error is not None:
        messages.append(str(error))
        error = error.__cause__
    assert "fp8e4nv not supported" in "".join(messages)


@pytest.mark.parametrize(
    "name",
    [
        "packing",
        "activations",
        "planes",
        "int4_expand",
        "int4_linear",
        "w4a8_linear",
        "fp8_linear",
        "attention",
        "attention_quant",
        "attention_hopper",
        "segments",
        "decode_attention",
        "kv_pages",
        "kv_append",
        "decode_chunks",
    ],
)
def test_ops_import_triton_only_where_they_launch(name):
    source = (Path(__file__).parents[1] / "kernels" / f"{name}.py").read_text()
    imports = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert "triton" not in " ".join(ast.unparse(node) for node in imports).replace("triton_refusal", "")


def test_launch_config_never_crosses_a_group():
    for group in (32, 64, 96, 128, 160, 256, 384):
        for element_size in (1, 2, 4):
            for tokens in (1, 17, 64, 65, 4096):
                config = int4_linear_triton.launch_config(tokens, 4096, group * 5, 5, element_size, 132)
                assert group % (2 * config.block_pairs) == 0 and config.block_pairs >= 16
