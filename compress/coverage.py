"""What a recipe does to every module that holds weights: quantized, or kept and why. Nothing is left out without a
line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from torch import nn

from ..quant.method import WeightMethod, matches

AUTO_SIZES = (128, 64, 32)
ROUTERS = ("gate", "router", "shared_expert_gate")
"""Names of modules that route tokens to the experts beside them."""


@dataclass(frozen=True)
class Coverage:
    """One module with weights of its own. status: "quantized" or "kept"; reason says why it was kept, or under which
    scheme.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    status: str
    reason: str

    def as_dict(self) -> dict:
        """JSON-able."""
        return {**asdict(self), "shape": list(self.shape)}


def check_patterns(patterns: Iterable[str], names: Iterable[str], key: str = "ignore") -> None:
    """ValueError for a pattern that is not a regular expression or that no name matches ("lm_head" may be absent from
    what is ignored).

    names: Linears, then mixtures of experts. key: what the recipe calls the patterns.
    """
    names = list(names)
    whose = "of the model" if key == "ignore" else "that is quantized"
    for pattern in patterns:
        try:
            found = any(matches(name, (pattern,)) for name in names)
        except re.error as error:
            raise ValueError(f"{key} pattern {pattern!r} is not a regular expression: {error}") from error
        if not found and (key, pattern) != ("ignore", "lm_head"):
            raise ValueError(
                f"{key} pattern {pattern!r} matches no Linear {whose}; there are, e.g., {', '.join(names[:4])}"
            )


def cover(model: nn.Module, layer_names: list[str], method: WeightMethod | None) -> list[Coverage]:
    """One line for every module that directly holds parameters. layer_names: the decoder layers (`hf_decoder`).

    method: None keeps all of them.
    """
    prefixes = tuple(f"{name}." for name in layer_names)
    owners: dict[int, str] = {}
    lines = []
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    experts = experts_of(model)
    if method is not None:
        check_patterns(method.ignore, [*linears, *experts])
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if not own:
            continue
        tied = owners.get(id(own[0]))
        for parameter in own:
            owners.setdefault(id(parameter), name)
        status, reason = "kept", ""
        mixture = next((outer for outer in experts if f"{name}.".startswith(f"{outer}.")), None)
        if method is not None and mixture is not None and matches(mixture, method.ignore):
            reason = "ignored by the recipe"
        elif is_router(name, experts):
            reason = "router of a mixture of experts"
        elif isinstance(module, nn.Linear):
            if method is None:
                reason = "the recipe leaves weights as they are"
            elif tied:
                reason = f"shares its weight with {tied}"
            elif matches(name, method.ignore):
                reason = "ignored by the recipe"
            elif not name.startswith(prefixes):
                reason = "outside the decoder layers"
            else:
                status = "quantized"
        elif isinstance(module, nn.Embedding):
            reason = "embedding"
        elif all(parameter.ndim == 1 for parameter in own):
            reason = "norm or bias"
        else:
            reason = f"{type(module).__name__} is not a Linear"
        weight = getattr(module, "weight", own[0])
        count = 0 if tied else sum(parameter.numel() for parameter in own)
        lines.append(Coverage(name, type(module).__name__, tuple(weight.shape), count, status, reason))
    if method is not None and not any(line.status == "quantized" for line in lines):
        raise ValueError(
            "no Linear of the model would be quantized; the decoder layers hold none, or `ignore` covers them all"
        )
    return lines


def experts_of(model: nn.Module) -> list[str]:
    """Names of the modules that hold a mixture of experts: tensors of three dimensions, or modules named so."""
    found: list[str] = []
    for name, module in model.named_modules():
        fused = any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if (fused or name.rpartition(".")[2] == "experts") and not inside:
            found.append(name)
    return found


def is_router(name: str, experts: Iterable[str]) -> bool:
    """Whether a module is what sends tokens to the experts beside it, or a part of that. experts: names of mixtures."""
    beside = (name.removeprefix(f"{outer.rpartition('.')[0]}.") for outer in experts)
    return any(inner != name and inner.partition(".")[0] in ROUTERS for inner in beside)


def resolve_group_size(method: WeightMethod, lines: list[Coverage]) -> WeightMethod:
    """The method with `group_size` "auto" replaced by what it comes to. ValueError if the size does not divide a
    Linear.
    """
    quantized = [line for line in lines if line.status == "quantized"]
    check_overrides(method, quantized)
    if method.storage != "int4" or method.group_size == "channel":
        return method
    plain = [line for line in quantized if method.override(line.name) is None]
    widths = {line.shape[1]: line.name for line in reversed(plain)}
    fitting = [size for size in AUTO_SIZES if all(width % size == 0 for width in widths)]
    if method.group_size == "auto":
        return replace(method, group_size=fitting[0] if fitting else "channel")
    for width, name in widths.items():
        if width % method.group_size:
            dividing = [str(size) for size in (256, *AUTO_SIZES, 16) if all(width % size == 0 for width in widths)]
            raise ValueError(
                f"group_size {method.group_size} does not divide the {width} inputs of {name}; "
                f"these divide every Linear: {', '.join([*dividing, 'channel'])} (or auto)"
            )
    return method


def check_overrides(method: WeightMethod, quantized: list[Coverage]) -> None:
    """ValueError for an override that changes nothing, or whose groups do not divide a Linear."""
    names = [line.name for line in quantized]
    for override in method.overrides:
        check_patterns(override.modules, names, "overrides")
        mine = [line for line in quantized if method.override(line.name) is override]
        if not mine:
            raise ValueError(
                f"the override of {', '.join(override.modules)[:200]} changes nothing: earlier ones match all of its "
                "Linears"
            )
        size = override.scheme(method.activations).group_size
        for line in mine:
            if size is not None and line.shape[1] % size:
                raise ValueError(
                    f"an override has group_size {size}, which does not divide the {line.shape[1]} inputs of "
                    f"{line.name}; use a divisor of that, or channel"
                )
