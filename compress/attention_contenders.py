"""What `attention_speed` times: kompakt's modes, and peers of other kinds.

| peer | what runs |
|---|---|
| cudnn | ``scaled_dot_product_attention`` with cuDNN's kernel, bf16 |
| fa2 | the same with FlashAttention 2, bf16; it takes no masks but causal ones |
| transformers | transformers' ``sdpa_attention_forward``, bf16: whatever it and torch choose for these tensors |
| sageattention | the package's ``sageattn``, full, or causal with as many queries as keys; 1.0.6: INT8 keys |

Where a kernel takes no grouped KV heads they are repeated before the clock starts, which favours it; transformers
repeats them inside its time where it repeats them. Masks that are no argument of a kernel are dense: made before the
clock starts, for transformers as bool, for cuDNN added to the logits in bf16, which spares it the conversion.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..kernels.attention import Mode, prefill_attention
from .attention_cases import Case, Layout, draw
from .device_speed import Machine
from .linear_contenders import Absent

MASK_ELEMENTS = 2**31
"""Of a dense mask; as bf16 they are 4.3 GB."""


@dataclass(frozen=True)
class Problem:
    """Random data of one case. query: (batch, heads, queries, head_dim); key, value: (batch, KV heads, keys, head_dim);
    bf16.
    """

    case: Case
    layout: Layout
    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def draw(cls, case: Case, device: torch.device) -> Problem:
        """The same data every time."""
        layout = Layout.of(case, device)
        return cls(case, layout, *draw(case, layout, device))

    @property
    def groups(self) -> int:
        """Query heads to a KV head."""
        return self.case.heads // self.case.kv_heads

    @property
    def needs_mask(self) -> bool:
        """Whether the mask is neither none nor causal with as many queries as keys."""
        layout = self.layout
        return layout.segments is not None or layout.window is not None or layout.queries != layout.keys

    def repeated(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and keys and values once for each of their query heads."""
        key, value = (tensor.repeat_interleave(self.groups, dim=1) for tensor in (self.key, self.value))
        return self.query, key, value

    def dense_mask(self) -> Tensor:
        """(batch or 1, 1, queries, keys) bool. Raises Absent if it is too large."""
        layout = self.layout
        batch = 1 if layout.segments is None else layout.batch
        elements = batch * layout.queries * layout.keys
        if elements > MASK_ELEMENTS:
            raise Absent(f"its dense mask would have {elements:.1e} elements")
        return layout.visible(slice(0, layout.queries), self.query.device)[:batch, None]


@dataclass(frozen=True)
class Contender:
    """inputs: equal copies of what ``run(*inputs)`` reads. repeats: KV heads were repeated outside of the time."""

    inputs: Sequence[tuple[Tensor, ...]]
    run: Callable[..., Tensor]
    repeats: bool = False

    def calls(self) -> list[Callable[[], Tensor]]:
        """One call per copy; each returns (batch, heads, queries, head_dim)."""
        return [partial(self.run, *tensors) for tensors in self.inputs]


def kompakt_mode(mode: Mode, problem: Problem, machine: Machine) -> Contender:
    """`prefill_attention`: quantization is a part of it, segments are made before."""
    layout = problem.layout
    options: dict[str, Any] = {"causal": layout.causal, "window": layout.window, "segments": layout.segments}

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return prefill_attention(query, key, value, mode=mode, **options)[0]

    return Contender(machine.rotated((problem.query, problem.key, problem.value)), run)


def grouped_or_repeated(
    problem: Problem, machine: Machine, run: Callable[..., Tensor], grouped: Callable[..., Tensor] | None
) -> Contender:
    """A contender that runs `grouped` on KV heads as they are if that works, or else `run` on repeated ones."""
    plain = (problem.query, problem.key, problem.value)
    if problem.groups == 1:
        return Contender(machine.rotated(plain), run)
    if grouped is not None:
        try:
            grouped(*plain)
            return Contender(machine.rotated(plain), grouped)
        except RuntimeError:  # torch has no narrower way to say that a backend does not take the call
            pass
    return Contender(machine.rotated(problem.repeated()), run, repeats=True)


def sdpa(
    backend: SDPBackend, mask: Tensor | None, causal: bool, grouped: bool, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """torch's attention with one backend and no other."""
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=grouped
        )


def check_cuda(problem: Problem) -> None:
    """Raises Absent for tensors that are elsewhere."""
    if problem.query.device.type != "cuda":
        raise Absent("needs a CUDA device")


def cudnn_peer(problem: Problem, machine: Machine) -> Contender:
    """cuDNN through torch."""
    check_cuda(problem)
    bias = None
    if problem.needs_mask:
        mask = problem.dense_mask()
        bias = torch.zeros(mask.shape, dtype=problem.query.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    run = partial(sdpa, SDPBackend.CUDNN_ATTENTION, bias, problem.layout.causal)
    return grouped_or_repeated(problem, machine, partial(run, False), partial(run, True))


def fa2_peer(problem: Problem, machine: Machine) -> Contender:
    """FlashAttention 2 through torch."""
    check_cuda(problem)
    layout = problem.layout
    if layout.segments is not None or layout.window is not None:
        raise Absent(f"torch's FlashAttention takes no {problem.case.mask} mask")
    if layout.queries != layout.keys:
        return grouped_or_repeated(problem, machine, flash_from_the_end, None)
    run = partial(sdpa, SDPBackend.FLASH_ATTENTION, None, layout.causal)
    return grouped_or_repeated(problem, machine, partial(run, False), partial(run, True))


def flash_from_the_end(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlashAttention with the last query on the last key, which the op means by causal and the function above does not.

    ``torch.nn.attention.bias.causal_lower_right`` calls it too, unless it silently takes another kernel.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]


def transformers_peer(problem: Problem, machine: Machine) -> Contender:
    """What an unpatched model would run."""
    from .hf_peers import AttentionShape, sdpa_attention

    module = AttentionShape(problem.groups, is_causal=problem.layout.causal)
    mask = problem.dense_mask() if problem.needs_mask else None

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sdpa_attention(module, query, key, value, mask)

    return Contender(machine.rotated((problem.query, problem.key, problem.value)), run)


def sageattention_peer(problem: Problem, machine: Machine) -> Contender:
    """The package's own choice of kernel. It takes the mean off the keys in place, so the keys are its own."""
    if problem.needs_mask:
        raise Absent(f"it takes no {problem.case.mask} mask")
    if importlib.util.find_spec("sageattention") is None:
        raise Absent("not installed")
    from sageattention import sageattn  # pyright: ignore[reportMissingImports]

    run = partial(sageattn, tensor_layout="HND", is_causal=problem.layout.causal)
    own = tuple(tensor.clone() for tensor in (problem.query, problem.key, problem.value))
    return Contender(machine.rotated(own), run)


PEERS: dict[str, Callable[[Problem, Machine], Contender]] = {
    "cudnn": cudnn_peer,
    "fa2": fa2_peer,
    "transformers": transformers_peer,
    "sageattention": sageattention_peer,
}
