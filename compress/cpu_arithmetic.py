"""Linears of 16-bit models in float32, while kompakt calibrates, compares and measures on a CPU that is slow without.

`kernels/dense_linear.py` has the arithmetic and decides which CPUs these are. Attention is multiplied in float32 where
it is differentiated; forward, torch's own loses nothing (512 tokens of SmolLM2-135M: 16 ms either way, with gradients
225 ms and 54 ms on one core). Models keep their dtype: what is stored,
cached, recorded and compared is what it would be, from sums in another order. Both sides of every comparison are run
like this. Speed is measured without it, since models that are merely loaded do not have it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..kernels.dense_linear import dense_linear, multiplies_slowly, through_float32

log = logging.getLogger(__name__)
HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class Float32Linears(TorchFunctionMode):
    """Runs `dense_linear` wherever `torch.nn.functional.linear` is called in this thread, and attention that is
    differentiated in float32.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        if func is functional.linear and not types:
            if through_float32(*args, **kwargs):
                say(args[0].dtype if args else kwargs["input"].dtype)
            return dense_linear(*args, **kwargs)
        if func is functional.scaled_dot_product_attention and not types:
            return attention(*args, **kwargs)
        return func(*args, **kwargs)


def attention(*args: Any, **kwargs: Any) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, in float32 inside if a slow CPU differentiates it."""

    def is_slow(value: Any) -> bool:
        return isinstance(value, Tensor) and value.device.type == "cpu" and multiplies_slowly(value.dtype)

    slow = [value for value in (*args, *kwargs.values()) if is_slow(value)]
    if not slow or not torch.is_grad_enabled() or not any(value.requires_grad for value in slow):
        return functional.scaled_dot_product_attention(*args, **kwargs)
    wide = [value.float() if is_slow(value) else value for value in args]
    named = {key: value.float() if is_slow(value) else value for key, value in kwargs.items()}
    return functional.scaled_dot_product_attention(*wide, **named).to(slow[0].dtype)


@functools.cache
def say(dtype: torch.dtype) -> None:
    """Logs once per process what happens to a dtype."""
    what = "this CPU has no instructions that multiply %s: Linears multiply in float32 and round their results to it"
    log.warning(what, HALVES[dtype])


def slow_dtypes() -> list[str]:
    """Dtypes that this CPU multiplies in float32."""
    return [name for dtype, name in HALVES.items() if multiplies_slowly(dtype)]


def multiplied_in_float32(*models: Any) -> str:
    """Dtypes of those models, on this CPU, whose Linears multiply in float32; empty if there are none."""
    here = {model.dtype for model in models if model is not None and model.device.type == "cpu"}
    return ", ".join(HALVES[dtype] for dtype in HALVES if dtype in here and multiplies_slowly(dtype))


@contextmanager
def float32_linears() -> Iterator[None]:
    """For a while, and as a decorator for a call, 16-bit Linears multiply in float32 where the CPU is slow without."""
    if not slow_dtypes():
        yield
        return
    with Float32Linears():
        yield
