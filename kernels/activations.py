"""Dynamic FP8 quantization of activations, one scale per token.

For every row x of K values::

    scale = max|x| / 448              448 is the largest e4m3fn value
    x8    = e4m3fn(x · (1 / scale))   to nearest, ties to even; 1 / scale is rounded to FP32 first

Departures from the formula, so that no row yields silent garbage: an all-zero row gets scale 1; a scale that would be
an FP32 subnormal is raised to the smallest normal 2⁻¹²⁶, whose reciprocal is finite and exact; a row that holds an
infinity or a NaN gets scale NaN and NaN codes, so that everything computed from it is NaN.

|x| · (1 / scale) exceeds 448 by less than four FP32 roundings, far from 464 where e4m3fn would overflow: the cast
saturates at ±448 without a clamp.
"""

import functools
import importlib.util
import logging
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

E4M3_MAX = 448.0
MIN_SCALE = 2.0**-126
MAX_KERNEL_ROW = 65536
FP8_CAPABILITY = (8, 9)
UNSEEN = "KOMPAKT_UNSEEN_KERNELS"
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def log_fallback(op: str, reason: str, way: str = "the torch reference") -> None:
    """Log once per process that ``op`` runs through a slower ``way``, and why."""
    logger.warning("%s runs through %s: %s", op, way, reason)


@functools.cache
def triton_refusal(device: torch.device | str, capability: tuple[int, int]) -> str | None:
    """Why a Triton kernel that needs ``capability`` cannot run on ``device``; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return cuda_refusal(device, capability)


def unseen_refusal(device: torch.device | str, capability: tuple[int, int]) -> str | None:
    """As `triton_refusal`, of kernels that have not run on a GPU yet: what a compiler makes of a kernel can be wrong
    though its source is right. `UNSEEN` in the environment runs them all the same.
    """
    refusal = triton_refusal(device, capability)
    if refusal is None and os.environ.get(UNSEEN) != "1":
        refusal = f"its kernels have not been run on a GPU yet; {UNSEEN}=1 runs them"
    return refusal


@functools.cache
def cuda_refusal(device: torch.device | str, capability: tuple[int, int]) -> str | None:
    """Why ``device`` is no NVIDIA GPU of at least compute ``capability``; None if it is one."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"device is {device.type}, the kernel needs cuda"
    if torch.version.hip is not None:
        return "the kernel has not been validated on ROCm"
    if not torch.cuda.is_available():
        return "CUDA is not available"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"there is no {device}, {torch.cuda.device_count()} CUDA devices are visible"
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        return f"compute capability is {found[0]}.{found[1]}, the kernel needs {capability[0]}.{capability[1]}"
    return None


def launching_on(x: Tensor) -> AbstractContextManager[None]:
    """Makes the device of ``x`` the current one: Triton launches there, wherever its arguments lie."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def quantize_fp8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row of the last dimension to FP8 with its own scale.

    Args:
        x: (..., K) bf16, fp16 or fp32, any strides, K ≥ 1, any number of rows from 0.

    Returns:
        x8: (..., K) float8_e4m3fn, contiguous.
        scale: (..., 1) fp32; ``x8.float() * scale`` approximates ``x``.

    Raises:
        ValueError: unsupported dtype or an empty last dimension.
    """
    check_activations(x)
    return quantize_fp8_op(x)


def check_activations(x: Tensor) -> None:
    """Raise ValueError unless ``x`` is (..., K ≥ 1) of a supported floating dtype."""
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"x has dtype {x.dtype}; activations are torch.bfloat16, torch.float16 or torch.float32")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (..., K) with K ≥ 1")


def quantize_fp8_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """Torch specification of :func:`quantize_fp8_per_token`, any device."""
    values = x.float()
    amax = values.abs().amax(dim=-1, keepdim=True)
    # On CUDA torch divides by a Python number through its reciprocal, which may be off by one rounding.
    scale = (amax / torch.full_like(amax, E4M3_MAX)).clamp_min(MIN_SCALE)
    scale = scale.masked_fill(amax == 0, 1.0).masked_fill(~amax.isfinite(), torch.nan)
    return (values * scale.reciprocal()).contiguous().to(torch.float8_e4m3fn), scale


def quantize_fp8(x: Tensor, *, interpret: bool = False) -> tuple[Tensor, Tensor]:
    """Dispatch without checks; ``interpret`` runs the kernel in Triton's interpreter, on CPU tensors."""
    in_features = x.shape[-1]
    refusal = None if interpret else triton_refusal(x.device, FP8_CAPABILITY)
    if refusal is None and in_features > MAX_KERNEL_ROW:
        refusal = f"rows of {in_features} values exceed the kernel's {MAX_KERNEL_ROW}"
    if refusal is None:
        from .activations_triton import quantize_rows

        x8, scale = quantize_rows(x.reshape(-1, in_features), interpret=interpret)
        return x8.view(x.shape), scale.view(*x.shape[:-1], 1)
    log_fallback("quantize_fp8_per_token", refusal)
    return quantize_fp8_ref(x)


@torch.library.custom_op("kompakt::quantize_fp8_per_token", mutates_args=())
def quantize_fp8_op(x: Tensor) -> tuple[Tensor, Tensor]:
    """Registered op behind :func:`quantize_fp8_per_token`; opaque to torch.compile."""
    with launching_on(x):
        return quantize_fp8(x)


@quantize_fp8_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    x8 = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return x8, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
