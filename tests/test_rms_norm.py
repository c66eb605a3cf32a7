"""RMS norm of rows: the reference against FP64, the Triton kernel against the reference."""

import functools
import importlib.util

import pytest
import torch
from interpreter_cases import interpreter_results, needs_triton
from kernel_cases import BF16, DTYPES, FP16, FP32, kernel_rows, make_rows, poisoned, same_bits, skip_below

from kompakt.kernels.rms_norm import MAX_NORM_ROW, NORM_CAPABILITY, NORM_FORMS, result_dtype, rms_norm, rms_norm_ref

KERNEL = "kompakt.kernels.rms_norm_triton"
SHAPES = [(1, 1), (5, 7), (3, 63), (0, 16), (2, 3, 100), (4, 128), (1, 1000)]
EPS = 1e-5
# Half the distance of subnormal numbers; the interpreter misreads those of bf16.
TINY = {BF16: 2.0**-126, FP16: 2.0**-25, FP32: 2.0**-150}
UNIT = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-24}


def weight_of(size: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size)).to(device, dtype)


def exact(x: torch.Tensor, weight: torch.Tensor, form: str) -> torch.Tensor:
    """In FP64."""
    values = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    return values * (weight.double() + (form == "plus_one"))


def check_rounding(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, form: str) -> None:
    """Within two roundings to 16 bits and those of FP32 before: a sum of K squares, in any order of which no path is
    longer than 32 + log₂ K, halved by the root, and eight operations more, the root itself being off by two units.
    """
    wanted = exact(x, weight, form)
    first = UNIT[x.dtype] if form == "rounded" else 0.0
    relative = first + UNIT[got.dtype] + (32 + 14 + 8) * UNIT[FP32]
    tiny = TINY[got.dtype] + (form == "rounded") * TINY[x.dtype] * weight.double().abs()
    error = (got.double() - wanted).abs()
    # Beyond the largest number both are infinite; rows with infinities and NaN are compared with the reference.
    fine = (wanted.abs() <= torch.finfo(got.dtype).max) & (x.double().square().sum(-1, keepdim=True) < 3e38)
    assert got.dtype == result_dtype(x, weight, form) and got.shape == x.shape  # pyright: ignore[reportArgumentType]
    assert torch.where(fine, error <= relative * (1 + 2**-8) * wanted.abs() + tiny, True).all()


def check(x: torch.Tensor, weight: torch.Tensor, form: str, *, interpret: bool) -> None:
    with poisoned():
        got = rms_norm(x, weight, eps=EPS, form=form, interpret=interpret)  # pyright: ignore[reportArgumentType]
    check_rounding(got, x, weight, form)


def check_bits(x: torch.Tensor, weight: torch.Tensor, form: str) -> None:
    """Whole numbers have exact squares and sums, so that nothing depends on an order."""
    x = x.float().nan_to_num(0).clamp(-40, 40).round().to(x.dtype)
    with poisoned():
        got = rms_norm(x, weight, eps=EPS, form=form, interpret=True)  # pyright: ignore[reportArgumentType]
    assert same_bits(got, rms_norm_ref(x, weight, eps=EPS, form=form))  # pyright: ignore[reportArgumentType]


INTERPRETER_CASES = {
    name: functools.partial(check, x, weight_of(x.shape[-1], x.dtype), "rounded", interpret=True)
    for name, x in kernel_rows(SHAPES).items()
}
for form in NORM_FORMS:
    for dtype in DTYPES:
        for weight_dtype in DTYPES:
            INTERPRETER_CASES[f"bits-{form}-{dtype}-{weight_dtype}"] = functools.partial(
                check_bits,
                kernel_rows([(5, 100)])[f"{dtype}-strided"],
                weight_of(100, DTYPES[weight_dtype]),
                form,
            )
MUTATIONS = {
    "mask of the row's tail": ("mask=inside, other=0.0", "mask=column < BLOCK", "bits-rounded-bf16-bf16"),
    "last value left out": ("column < in_features", "column < in_features - 1", "fp16-4x128"),
    "row stride": ("row * stride_row", "row * in_features", "fp32-strided"),
    "mean of the block": ("axis=0), count)", "axis=0), BLOCK * 1.0)", "fp32-5x7"),
    "no eps": ("mean + eps", "mean + 0.0", "fp32-5x7"),
    "first rounding left out": ('FORM == "rounded"', 'FORM == "no"', "bits-rounded-fp16-fp16"),
    "a rounding too many": ('if FORM == "rounded":', "if True:", "bits-unrounded-bf16-fp32"),
    "no one": ("1.0 + weight", "weight", "bits-plus_one-fp32-fp32"),
    "weight of the row": ("weight_ptr + column", "weight_ptr + 0 * column", "bf16-4x128"),
}


@needs_triton
@pytest.mark.parametrize("name", [*INTERPRETER_CASES, *MUTATIONS])
def test_kernel_in_interpreter(name):
    assert interpreter_results(__file__)[name] == ""


@pytest.mark.parametrize("form", NORM_FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(dtype, form):
    for name, x in kernel_rows(SHAPES).items():
        if name.startswith(dtype):
            for weight_dtype in DTYPES.values():
                check(x, weight_of(x.shape[-1], weight_dtype), form, interpret=False)


def test_zeros_stay_zeros_and_broken_rows_are_nan():
    x = torch.zeros(3, 8)
    x[1, 2], x[2, 3] = torch.nan, torch.inf
    got = rms_norm(x, torch.ones(8), eps=EPS)
    assert (got[0] == 0).all() and got[1].isnan().all() and got[2, 3].isnan()


@pytest.mark.parametrize(
    ("x", "weight", "form", "message"),
    [
        (torch.zeros(2, 8).double(), torch.ones(8), "rounded", "x has dtype torch.float64"),
        (torch.zeros(2, 8), torch.ones(8).int(), "rounded", "weight has dtype torch.int32"),
        (torch.zeros(2, 0), torch.ones(0), "rounded", "K ≥ 1"),
        (torch.tensor(1.0), torch.ones(1), "rounded", "K ≥ 1"),
        (torch.zeros(2, 8), torch.ones(7), "rounded", r"\(7,\)"),
        (torch.zeros(2, 8), torch.ones(8, device="meta"), "rounded", "weight on meta"),
        (torch.zeros(2, 8), torch.ones(8), "gemma", "form is 'gemma'; forms are rounded, unrounded, plus_one"),
    ],
)
def test_wrong_arguments_are_refused(x, weight, form, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, eps=EPS, form=form)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("size", "form"),
    [(1, "rounded"), (128, "rounded"), (4096, "rounded"), (4096, "plus_one"), (MAX_NORM_ROW, "unrounded")],
)
def test_kernel_compiles(size, form):
    from compile_cases import SM80, SM90, compile_launch, fits, meta, stack_bytes

    from kompakt.kernels import rms_norm_triton

    for target, dtype in ((SM90, BF16), (SM80, FP32)):

        def call(dtype: torch.dtype = dtype) -> None:
            rms_norm_triton.norm_rows(meta(3, size, dtype=dtype), meta(size, dtype=dtype), dtype, EPS, form)

        compiled = compile_launch(rms_norm_triton, "norm_rows_kernel", call, target, constant_ones=True)
        assert fits(compiled, target)
        if size == 1:  # a constant of the launch
            continue
        # Every load and store is of 16 bytes, or of what a thread of one warp has.
        width = min(4, size * dtype.itemsize // 4 // 32)
        assert f"ld.global.v{width}.b32" in compiled.asm["ptx"] and f"st.global.v{width}.b32" in compiled.asm["ptx"]
        if target == SM90:
            assert stack_bytes(compiled) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("form", NORM_FORMS)
def test_kernel_on_gpu(form):
    skip_below(NORM_CAPABILITY)
    for x in kernel_rows(SHAPES, "cuda").values():
        check(x, weight_of(x.shape[-1], x.dtype, "cuda"), form, interpret=False)
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", [2048, 4096, 5120, MAX_NORM_ROW, MAX_NORM_ROW + 1])
def test_long_rows_on_gpu(size, dtype):
    skip_below(NORM_CAPABILITY)
    x, weight = make_rows((9, size), dtype, "cuda"), weight_of(size, dtype, "cuda")
    check(x, weight, "rounded", interpret=False)
    # A sum in another order moves the root by fewer than 54 FP32 units, which changes the first rounding of that many
    # in 2¹³ fp16 values and in 2¹⁶ bf16 values, and the second likewise; twice that for chance, and eight.
    different = (rms_norm(x, weight, eps=EPS) != rms_norm_ref(x, weight, eps=EPS)).sum().item()
    assert dtype == FP32 or different <= 8 + 4 * x.numel() * 54 * UNIT[FP32] / UNIT[dtype]
