"""One launch for every RMS norm and every rotary embedding of a model: `with fused(model): …`.

transformers runs an RMS norm as some seven launches and a rotary embedding as some ten, each of which a step of one
token waits for. Norms get a `forward` of their own, and the modules of modelling code another `apply_rotary_pos_emb`,
while the context lasts.

What a class computes is found by trying, not by its name: on random numbers, weights and dtypes it must give what the
reference of a kernel gives, bit for bit. What gives something else is left alone, as is any call whose arguments the
kernels do not take. Rotated queries and keys are then those of transformers bit for bit. Norms differ by the rounding
of one FP32 sum, since the kernel adds in another order, and what follows differs accordingly.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..kernels.activations import FLOAT_DTYPES, log_fallback, triton_refusal
from ..kernels.rms_norm import NORM_CAPABILITY, NORM_FORMS, NormForm, rms_norm, rms_norm_ref, rms_norm_refusal
from ..kernels.rotary import apply_rotary, apply_rotary_ref, rotary_refusal

ROTARY = "apply_rotary_pos_emb"
EPS = ("variance_epsilon", "eps")
OWN = "transformers' own launches"


@dataclass(frozen=True)
class Replacements:
    """What takes the place of what: forwards of norms, and functions in namespaces of modelling code."""

    forwards: list[tuple[nn.Module, Callable[..., Any]]] = field(default_factory=list)
    functions: list[tuple[dict[str, Any], Callable[..., Any]]] = field(default_factory=list)


FOUND: WeakKeyDictionary[nn.Module, Replacements] = WeakKeyDictionary()
"""By model, so that the steps of a model search once."""
LOCK = threading.RLock()
"""Models of a family share their modelling code: replacing and putting back must not interleave between threads."""


def fused_on(device: torch.device, model: nn.Module) -> AbstractContextManager[None]:
    """`fused` on a CUDA device that runs the kernels, else nothing; CUDA devices that do not are logged."""
    refusal = triton_refusal(device, NORM_CAPABILITY)
    if refusal is None:
        return fused(model)
    if device.type == "cuda":
        log_fallback("a norm or rotary embedding", refusal, OWN)
    return nullcontext()


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """While this lasts, norms and rotary embeddings of `model` are one launch each where no gradients are wanted.

    May be nested. Other threads that run a model of the same family meanwhile get the rotary kernel too.
    """
    with LOCK:
        found = FOUND.get(model)
        if found is None:
            found = FOUND[model] = search(model)
        modules = []
        functions = [(namespace, namespace[ROTARY]) for namespace, _ in found.functions]
        try:
            for module, forward in found.forwards:
                if "forward" in vars(module):
                    log_fallback(f"a {type(module).__name__}", "something else has replaced its forward", OWN)
                    continue
                modules.append(module)
                module.forward = forward
            for namespace, function in found.functions:
                namespace[ROTARY] = function
            yield
        finally:
            for module in modules:
                vars(module).pop("forward", None)
            for namespace, function in functions:
                namespace[ROTARY] = function


@torch.no_grad()
def search(model: nn.Module) -> Replacements:
    """What can be replaced in a model; what cannot is logged."""
    found, namespaces = Replacements(), {}
    for module in model.modules():
        code = sys.modules.get(type(module).__module__)
        if code is not None and callable(vars(code).get(ROTARY)):
            namespaces[code.__name__] = vars(code)
        eps = next((name for name in EPS if isinstance(vars(module).get(name), float)), None)
        weight = vars(module)["_parameters"].get("weight")
        if eps is None or weight is None or weight.ndim != 1 or len(list(module.parameters())) != 1:
            continue
        form, reason = norm_form(module, weight, vars(module)[eps])
        if form is None:
            log_fallback(f"a {type(module).__name__}", reason, OWN)
        else:
            found.forwards.append((module, norm_forward(module, eps, form)))
    for name, namespace in namespaces.items():
        reason = rotary_difference(namespace[ROTARY])
        if reason is None:
            found.functions.append((namespace, rotary_function(namespace[ROTARY])))
        else:
            log_fallback(f"{ROTARY} of {name}", reason, OWN)
    kind = type(model).__name__
    if not found.forwards:
        log_fallback(f"normalization in {kind}", "none of its modules is an RMS norm that a kernel computes", OWN)
    if not namespaces:
        log_fallback(f"rotary embedding in {kind}", f"its modelling code has no {ROTARY}", OWN)
    return found


def same(got: Any, expected: Tensor) -> bool:
    """One dtype, and every bit."""
    return isinstance(got, Tensor) and got.dtype == expected.dtype and torch.equal(got, expected)


def norm_form(module: nn.Module, weight: Tensor, eps: float) -> tuple[NormForm | None, str]:
    """Which form of `rms_norm` a module computes, or None and why. Its weights and hooks are not touched."""
    # Numbers of its own: torch's generators stay as they are for whoever samples.
    random = torch.Generator().manual_seed(0)
    # The second row is so small that eps decides, the third large.
    x = torch.randn(3, len(weight), generator=random) * torch.tensor([[1.0], [0.1 * eps**0.5], [300.0]])
    twin: Any = copy.copy(module)
    twin._parameters = {"weight": nn.Parameter(torch.randn(len(weight), generator=random).to(weight))}
    for form in NORM_FORMS:
        try:
            # Rounding tells the forms apart only where x has fewer bits than FP32.
            if all(
                same(type(module).forward(twin, row), rms_norm_ref(row, twin.weight, eps=eps, form=form))
                for row in (x.to(weight.device, dtype) for dtype in FLOAT_DTYPES)
            ):
                return form, ""
        except Exception as error:  # a forward that wants something else may raise anything
            return None, f"it does not run on a tensor alone ({type(error).__name__}: {error})"
    return None, f"it gives other numbers than each of {', '.join(NORM_FORMS)}"


def norm_forward(module: nn.Module, eps: str, form: NormForm) -> Callable[..., Any]:
    """What stands in for the forward of a norm."""

    def forward(*args: Any, **named: Any) -> Any:
        x = args[0] if args else None
        if len(args) != 1 or named or not isinstance(x, Tensor):
            reason = "it is not called with a tensor alone"
        elif torch.is_grad_enabled():
            reason = "gradients are wanted"
        else:
            reason = rms_norm_refusal(x, module.weight)  # pyright: ignore[reportArgumentType]
        if reason is None:
            return rms_norm(x, module.weight, eps=getattr(module, eps), form=form)  # pyright: ignore
        log_fallback(f"a {type(module).__name__}", reason, OWN)
        return type(module).forward(module, *args, **named)

    return forward


@torch.no_grad()
def rotary_difference(function: Callable[..., Any]) -> str | None:
    """How a function differs from `apply_rotary`; None if it does not."""
    random = torch.Generator().manual_seed(0)
    # Heads behind tokens in memory, as models have them.
    query, key = (torch.randn(2, 3, heads, 16, generator=random).transpose(1, 2) for heads in (4, 2))
    for batch in (2, 1):
        cos, sin = (torch.randn(batch, 3, 16, generator=random) for _ in range(2))
        for dtype in FLOAT_DTYPES:
            tensors = [tensor.to(dtype) for tensor in (query, key, cos, sin)]
            try:
                got = function(*tensors)
            except Exception as error:  # a function of other arguments may raise anything
                return f"it does not run on query, key, cos and sin ({type(error).__name__}: {error})"
            expected = apply_rotary_ref(*tensors)
            if not isinstance(got, tuple) or len(got) != 2 or not all(map(same, got, expected)):
                return "it gives other numbers than a rotation in halves"
    return None


def rotary_function(own: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in for `apply_rotary_pos_emb`."""

    def rotary(*args: Any, **named: Any) -> Any:
        if len(args) != 4 or named:
            reason = "it is not called with query, key, cos and sin alone"
        elif torch.is_grad_enabled():
            reason = "gradients are wanted"
        else:
            reason = rotary_refusal(*args)
        if reason is None:
            return apply_rotary(*args)
        log_fallback(ROTARY, reason, OWN)
        return own(*args, **named)

    return rotary
