"""Attention as a patched layer runs it: an arithmetic and a phase in, a kernel's result out.

Prefill has kernels of its own. Attention over a compressed cache reads its codes (`kernels/decode_attention.py`); over
a dense one, decoding stays with transformers' attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels.activations import triton_refusal
from ..kernels.attention import Call, Mode, attention_backend, prefill_attention
from ..kernels.decode_attention import CompressedKV, decode_attention
from ..kernels.sparse_attention import sparse_attention
from ..kernels.sparse_index import Extent
from ..quant.method import AttentionInputs, KVCacheMethod
from ..sparsify.method import SparsityPolicy
from ..sparsify.online import index_of, visited

Phase = Literal["prefill"]


@dataclass(frozen=True)
class AttentionBackend:
    """What attention runs on, and why; "dense" is the attention that the model had before."""

    name: Literal["gluon", "triton", "reference", "dense"]
    reason: str


def attend(mode: Mode, phase: Phase, inputs: AttentionInputs) -> Tensor:
    """Attention output, (batch, queries, num_heads, value_head_dim) contiguous, in the dtype of the query."""
    if phase != "prefill":
        raise ValueError(f"phase {phase!r} has no attention kernel; known: prefill")
    out, _ = prefill_attention(inputs.query, inputs.key, inputs.value, mode=mode, **inputs.options)
    return out.transpose(1, 2)


def attend_sparse(mode: Mode, policy: SparsityPolicy, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Attention output, as of `attend`, over the keys that a policy visits; and how many tiles those are, and would be
    without it.
    """
    query, key, options = inputs.query, inputs.key, inputs.options
    extent = Extent.of(query.shape[0], query.shape[2], key.shape[2], options["segments"], query.device)
    index = index_of(policy, query, key, extent, scaling=options["scaling"])
    others = {name: value for name, value in options.items() if name not in ("window", "causal")}
    out, _ = sparse_attention(query, key, inputs.value, index, mode=mode, **others)
    return out.transpose(1, 2), *visited(index, extent)


def sparse_refusal(inputs: AttentionInputs) -> str | None:
    """Why a call has to visit all keys; None if it need not."""
    options = inputs.options
    if not options["causal"]:
        return "the mask is not causal"
    if options["window"] is not None:
        return "the mask has a window"
    segments = options["segments"]
    return None if segments is None or len(segments.table) == inputs.query.shape[0] else "sequences are packed"


def attend_cached(query: Tensor, kv: CompressedKV, options: dict[str, Any], key_starts: Tensor | None) -> Tensor:
    """Attention output, as of `attend`, of the last tokens of a compressed cache. options: the other arguments of
    `kernels.decode_attention.decode_attention`.
    """
    out, _ = decode_attention(query, kv, key_starts=key_starts, **options)
    return out.transpose(1, 2)


def cache_backends(device: torch.device, method: KVCacheMethod) -> dict[str, AttentionBackend]:
    """What attention of few queries over a cache of `method` runs on, and why, on `device`, in 16 bit."""
    refusal = method.kernel_refusal(device)
    if refusal is not None:
        return {"decode_attention": AttentionBackend("reference", refusal)}
    return {"decode_attention": AttentionBackend("triton", "a CUDA device with Triton")}


def sparse_backends(device: torch.device) -> dict[str, AttentionBackend]:
    """What sparse prefill attention runs on, and why, on `device`, for bf16 and heads of 128 channels."""
    (found,) = attention_backends(["bf16"], device).values()
    return {"sparse_attention": found}


def refusal(mode: Mode, inputs: AttentionInputs) -> str | None:
    """Why no kernel would run this call on a device that has kernels; None if one would."""
    query, key, value = inputs.query, inputs.key, inputs.value
    if not query.dtype == key.dtype == value.dtype:
        return f"queries, keys and values are {query.dtype}, {key.dtype} and {value.dtype}"
    options = inputs.options
    call = Call(mode, options["causal"], options["window"], options["scaling"], options["softcap"])
    backend, reason = attention_backend(query, value, call)
    return reason if backend == "exact" else None


def attention_backends(modes: Iterable[Mode], device: torch.device) -> dict[str, AttentionBackend]:
    """``prefill_attention (mode)`` → what it runs on and why, on `device`, for bf16 and heads of 128 channels."""
    found = {}
    for mode in modes:
        if device.type == "cuda" and torch.cuda.is_available():
            probe = torch.empty((1, 1, 1, 128), dtype=torch.bfloat16, device=device)
            name, reason = attention_backend(probe, probe, Call(mode, True, None, 1.0, None))
        else:
            name, reason = "reference", triton_refusal(device, (8, 0)) or "device is unknown"
        found[f"prefill_attention ({mode})"] = AttentionBackend("dense" if name == "exact" else name, reason)
    return found


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd would follow a computation with these tensors, which the kernels cannot give it."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
