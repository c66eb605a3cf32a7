"""`verify --kernels`: what the modules of a directory run on this device, against the references, on random input.

Each op is run once for every shape and set of options that the directory has, and compared with its reference in FP32
or FP64:

    Linears      each size and way to store them, for `TOKENS` tokens, which take different kernels
    attention    each arithmetic, causal and, where a layer has a window, in a window
    sparsity     each arithmetic, over the keys that a policy of the directory visits
    kv_cache     a cache of its method: codes as the reference writes them, and attention over them and over what is
                 left of a prompt that was evicted from

Errors are those of `bench linear`, `bench attention` and `bench decode`, ‖difference‖ / ‖reference‖, of attention by
the worst query, and so are the tolerances. Where an op runs through its reference there is nothing to compare, and the
line says why it does. What several Linears multiply at once is the product of one of them, with more outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention import Call, Mode
from ..kernels.decode_attention import decode_ref
from ..kernels.fp8_linear import fp8_ref
from ..kernels.int4_linear import linear_backend
from ..kernels.kv_prune import PruneCodec
from ..kernels.sparse_attention import sparse_attention, sparse_attention_ref
from ..kernels.sparse_index import Extent
from ..quant.kv_int4 import KVINT4
from ..quant.method import AttentionInputs, AttentionPolicy, CachePolicy, KVCacheMethod, WeightScheme
from ..sparsify.kv_prune import KVPrune
from ..sparsify.method import SparsityPolicy
from ..sparsify.online import index_of
from .attention_cases import Case, worst_error
from .attention_contenders import Problem
from .attention_speed import LIMITS as ATTENTION_LIMITS
from .attention_speed import checked
from .cache import TokenStore
from .decode_contenders import DecodeCase, attend, evicted, visible
from .decode_speed import CHECK_LENGTH, coding_difference, reading
from .decode_speed import LIMITS as CACHE_LIMITS
from .device_speed import Ceilings, Machine
from .kv_evict import KVEvict
from .layer_policies import arithmetic_of, sparsity_of
from .linear_contenders import Variant, relative_error
from .linear_speed import ERROR_LIMIT, Shape
from .linear_speed import Problem as LinearProblem
from .planning import kv_shape
from .recipe import method_key
from .runtime import attention_backends, sparse_backends, sparse_refusal
from .search_costs import linear_of
from .search_space import Choice

TOKENS = (1, 48, 2048)
"""A step of one sequence, of several, and a prompt."""
CHECKED_TOKENS = 333
"""Tokens of attention that is compared: some tiles and a part."""
BATCH = 2


@dataclass(frozen=True)
class KernelCheck:
    """One op of one shape. status: "equal", "differs" or "reference". error: None where nothing was compared. reason:
    why that is.
    """

    op: str
    case: str
    status: str
    error: float | None = None
    tolerance: float | None = None
    reason: str = ""

    @classmethod
    def of(cls, op: str, case: str, tolerance: float, find: Callable[[], float]) -> KernelCheck:
        """Runs one comparison; an op that fails differs."""
        try:
            error = find()
        except Exception as error:  # whatever a kernel raises, the other ones are still to be checked
            words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            return cls(op, case, "differs", None, tolerance, words)
        finite = error if error == error and error != float("inf") else None
        # NaN is not within a tolerance.
        return cls(op, case, "equal" if error <= tolerance else "differs", finite, tolerance)

    @property
    def problem(self) -> str:
        """One sentence, of one that differs."""
        found = self.reason or f"its error is {'not finite' if self.error is None else f'{self.error:.2g}'}"
        return f"{self.op}, {self.case}: {found}, the tolerance {self.tolerance:.2g}"


def nothing_to_compare(device: torch.device) -> str | None:
    """Why no kernel runs on a device; None if some may."""
    return None if device.type == "cuda" else f"the device is {device.type}: references run, and there is nothing else"


@torch.no_grad()
def kernel_checks(
    config: Any,
    schemes: Mapping[tuple[WeightScheme, tuple[int, int]], str],
    policies: Mapping[str, AttentionPolicy],
    cache: CachePolicy | None,
    windows: bool,
    device: torch.device,
) -> Iterator[KernelCheck]:
    """Every comparison, one after the other. schemes: (how Linears are stored, (out, in)) → one that is. windows:
    whether some layer attends in a window.
    """
    text = config.get_text_config()
    dtype = text.dtype or torch.bfloat16
    for (scheme, shape), name in schemes.items():
        yield from linear_checks(scheme, shape, name, dtype, device)
    kv_heads, head_dim = kv_shape(text)
    heads = text.num_attention_heads, kv_heads, head_dim
    chosen: list[Mode] = [policy.mode for policy in arithmetic_of(policies).values() if policy.mode != "bf16"]
    for mode in dict.fromkeys(chosen):
        (backend,) = attention_backends([mode], device).values()
        for mask in ("causal", "window") if windows else ("causal",):
            yield attention_check(mode, mask, heads, backend, device)
    sparse = {policies[name].mode: policy for name, policy in sparsity_of(policies).items() if policy.sparse}
    for mode, policy in sorted(sparse.items()):
        yield sparse_check(mode, policy, heads, device)
    if cache is not None:
        yield from cache_checks(cache, heads, device)


def linear_checks(
    scheme: WeightScheme, shape: tuple[int, int], name: str, dtype: torch.dtype, device: torch.device
) -> Iterator[KernelCheck]:
    """One size of Linear. name: of one of that size."""
    op = {"int4": {"fp8": "w4a8_linear", "none": "w4a16_linear"}, "fp8": {"fp8": "fp8_linear"}}[scheme.weights]
    op = op.get(scheme.activations, "fp8_w8a16_linear")
    label = f"{shape[0]}×{shape[1]}, {scheme.describe()}"
    refusal = "it is plain torch on every device"
    if op != "fp8_w8a16_linear":
        backend = linear_backend(op, device)
        refusal = backend.reason if backend.name == "reference" else None
    if refusal is not None and nothing_to_compare(device) is None:
        yield KernelCheck(op, label, "reference", reason=refusal)
        return
    problem = LinearProblem.draw(Shape("verify", name, *shape), [max(TOKENS)], plain_machine(device))
    size = "channel" if scheme.group_size is None else scheme.group_size
    linear = linear_of(problem.weight.to(dtype), Choice(scheme.weights, size), scheme.activations)
    for tokens in TOKENS:
        x = problem.x[:tokens].to(dtype)

        def find(x: Tensor = x) -> float:
            return relative_error(linear(x), expected_product(linear, scheme, x))

        yield KernelCheck.of(op, f"{label}, {tokens} token{'s' * (tokens > 1)}", ERROR_LIMIT, find)


def expected_product(linear: Any, scheme: WeightScheme, x: Tensor) -> Tensor:
    """The reference of a compressed Linear without bias, FP32. x: (tokens, in)."""
    if scheme.weights == "fp8" and scheme.activations == "fp8":
        return fp8_ref(x.float(), linear.weight, linear.weight_scale)
    if scheme.weights == "fp8":
        return x.float() @ (linear.weight.float() * linear.weight_scale.float()).to(x.dtype).float().t()
    size = "channel" if scheme.group_size is None else scheme.group_size
    variant = Variant("w4a8" if scheme.activations == "fp8" else "w4a16", size)
    packed, scale = linear.weight_packed, linear.weight_scale
    return variant.expected(x, packed, scale, folded=variant.folds(x, packed, scale))[0]


def attention_check(
    mode: Any, mask: str, heads: tuple[int, int, int], backend: Any, device: torch.device
) -> KernelCheck:
    """One arithmetic of prefill. heads: (query heads, KV heads, channels)."""
    op, label = f"prefill_attention ({mode})", f"{mask}, {heads_of(heads)}, {CHECKED_TOKENS} tokens"
    if backend.name in ("dense", "reference") and nothing_to_compare(device) is None:
        return KernelCheck(op, label, "reference", reason=backend.reason)
    case = Case(mask, CHECKED_TOKENS, heads[2], heads[0], heads[1], BATCH)

    def find() -> float:
        found = checked(case, mode, plain_machine(device))
        if found.get("error") is None:
            raise RuntimeError(str(found.get("reason", "its result is not finite")))
        return found["error"]

    return KernelCheck.of(op, label, ATTENTION_LIMITS[mode], find)


def sparse_check(mode: Any, policy: SparsityPolicy, heads: tuple[int, int, int], device: torch.device) -> KernelCheck:
    """Attention over the keys that a policy visits."""
    op, label = f"sparse_attention ({mode})", f"{heads_of(heads)}, {CHECKED_TOKENS} tokens"
    problem = Problem.draw(Case("causal", CHECKED_TOKENS, heads[2], heads[0], heads[1], 1), device)
    query, key, value, scaling = problem.query, problem.key, problem.value, heads[2] ** -0.5
    (backend,) = sparse_backends(device).values()
    refusal = sparse_refusal(AttentionInputs(query, key, value, plain_options(problem)))
    if refusal is None and backend.name in ("dense", "reference"):
        refusal = backend.reason
    if refusal is not None and nothing_to_compare(device) is None:
        return KernelCheck(op, label, "reference", reason=refusal)

    def find() -> float:
        extent = Extent.of(1, CHECKED_TOKENS, CHECKED_TOKENS, None, device)
        index = index_of(policy, query, key, extent, scaling=scaling)
        out, _ = sparse_attention(query, key, value, index, mode=mode, scaling=scaling)
        call = Call(mode, True, None, scaling, None)
        q, k, v = (tensor.float() for tensor in (query, key, value))
        expected, _ = sparse_attention_ref(q, k, v, index, call, dtype=torch.float64)
        return worst_error(out.float(), expected.transpose(1, 2))

    return KernelCheck.of(op, label, ATTENTION_LIMITS[mode], find)


def cache_checks(cache: CachePolicy, heads: tuple[int, int, int], device: torch.device) -> Iterator[KernelCheck]:
    """A cache of one layer: what is written, and attention of one token over it."""
    for method in settled_methods(cache):
        name = f"{method_key(method)}, {heads_of(heads)}"
        name += f", keys {method.key_transform}" if isinstance(method, KVINT4) else ""
        length = CHECK_LENGTH + method.sink_tokens + method.recent_tokens
        label = f"{name}, {length} tokens"
        refusal = method.kernel_refusal(device)
        if refusal is not None and nothing_to_compare(device) is None:
            yield KernelCheck("decode_attention", label, "reference", reason=refusal)
            continue
        method = replace(method, max_tokens=None)
        problem = DecodeCase(BATCH, length, *heads, 1).draw(device)
        statics = cache_statics(method, problem)
        store = TokenStore(method, statics=statics)

        def written(store: TokenStore = store, problem: Problem = problem) -> float:
            store.append(problem.key, problem.value)
            return pages_that_differ(store, problem)

        yield KernelCheck.of("write_tokens", label, 0.0, written)
        if not store.pages:
            continue
        yield KernelCheck.of("decode_attention", label, cache_limit(store), partial(decode_error, store, problem))
        if isinstance(method, KVEvict):
            length = CHECK_LENGTH + method.shortest_prompt
            long = DecodeCase(BATCH, length, *heads, 1).draw(device)
            find = partial(evicted_error, method, long, statics)
            yield KernelCheck.of("decode_attention", f"{name}, {length} tokens evicted from", cache_limit(store), find)


def settled_methods(cache: CachePolicy) -> list[KVCacheMethod]:
    """The method as its layers have it: one for every transform of keys that calibration chose, and of a search the
    sparsities that it shared out.
    """
    if isinstance(cache.method, KVPrune):
        return [replace(cache.method, search="off")]
    if not isinstance(cache.method, KVINT4):
        return [cache.method]
    names = {
        ("scale_rotate" if layer["key_rotated"] else "scale") if layer else "none" for layer in cache.layers.values()
    }
    return [replace(cache.method, key_transform=name) for name in sorted(names)]


def pages_that_differ(store: TokenStore, problem: Problem) -> float:
    """Share of the pages that are not what the reference writes; without pages there is nothing to compare."""
    if not store.pages:
        raise RuntimeError("nothing was coded")
    return coding_difference(store, problem) / len(store.pages)


def decode_error(store: TokenStore, problem: Problem) -> float:
    """Of attention of the newest token of every sequence."""
    kv = visible(store, problem)
    expected, _ = decode_ref(problem.query.double(), kv, reading(problem), dtype=torch.float64)
    return worst_error(attend(problem.query, kv), expected)


def evicted_error(method: KVEvict, problem: Problem, statics: Mapping[str, Tensor]) -> float:
    """The same over a prompt that was evicted from."""
    return decode_error(evicted(method, problem, statics), problem)


def cache_statics(method: KVCacheMethod, problem: Problem) -> dict[str, Tensor]:
    """What a method finds out about these keys and values, on their device."""
    if not method.needs_data:
        return {}
    inputs = AttentionInputs(problem.query[:1], problem.key[:1], problem.value[:1], plain_options(problem))
    return {name: tensor.to(problem.key.device) for name, tensor in method.statics(inputs).items()}


def plain_options(problem: Problem) -> dict[str, Any]:
    """Causal attention without anything else."""
    scaling = problem.case.head_dim**-0.5
    return {"causal": True, "window": None, "segments": None, "scaling": scaling, "softcap": None}


def cache_limit(store: TokenStore) -> float:
    """The tolerance of attention over its codes."""
    kind = getattr(store.codec, "kind", None)
    if isinstance(store.codec, PruneCodec):
        kind = store.codec.values
    return CACHE_LIMITS[kind if kind in CACHE_LIMITS else "pq4"]


def heads_of(heads: tuple[int, int, int]) -> str:
    """``32/8 heads of 128``."""
    return f"{heads[0]}/{heads[1]} heads of {heads[2]}"


def plain_machine(device: torch.device) -> Machine:
    """Where ops are run and not timed."""

    def timer(calls: Any) -> float:
        raise AssertionError("nothing is timed")

    return Machine(device, timer, cache_bytes=1, ceilings=Ceilings(1.0, 1.0, 1.0, 1.0))
