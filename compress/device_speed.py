"""How fast one CUDA device is, and how long calls take on it.

A call is timed by replaying a CUDA graph of many calls, so that launching costs nothing, over copies of its weights
that together exceed the L2 cache several times, so that every call reads them from memory. Calls that take so long that
launching them is nothing beside it are timed as they are.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..kernels.activations import FP8_CAPABILITY, cuda_refusal, quantize_fp8_per_token
from ..kernels.fp8_linear import scaled_matmul
from ..kernels.int4_linear import linear_backend

Timer = Callable[[Sequence[Callable[[], Any]]], float]
"""Calls that do the same with different copies → seconds of one call."""

CACHE_MULTIPLE = 4
MAX_COPIES = 256
MAX_COPY_BYTES = 2 * 10**9
MIN_CALLS = 4
GRAPH_MILLISECONDS = 1.0
LONG_MILLISECONDS = 20.0
"""A call that takes this long is not captured in a graph."""
SEQUENCE_MILLISECONDS = 30.0
SEQUENCES = 5
MATMUL_SIZE = 8192
STREAM_BYTES = 2**31


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in this process. fp8_tflops: None where it has no FP8 product."""

    read_gb_per_second: float
    copy_gb_per_second: float
    bf16_tflops: float
    fp8_tflops: float | None

    @property
    def bytes_per_second(self) -> float:
        """The larger of both bandwidths."""
        return 1e9 * max(self.read_gb_per_second, self.copy_gb_per_second)

    def peak(self, method: str) -> float:
        """FLOP/s of the products that a method (``w4a8``, ``w4a16``) is made of."""
        tflops = self.fp8_tflops if method == "w4a8" else self.bf16_tflops
        assert tflops is not None
        return 1e12 * tflops


@dataclass(frozen=True)
class Machine:
    """Where things are timed, and with what. cache_bytes: size of the L2 cache."""

    device: torch.device
    timer: Timer
    cache_bytes: int
    ceilings: Ceilings

    @classmethod
    def cuda(cls, ops: Sequence[str]) -> Machine:
        """The current CUDA device, its ceilings measured. ops: names of `int4_linear.linear_backend`.

        Raises ValueError without a CUDA device, or where one of the ops has no kernel on it.
        """
        if not torch.cuda.is_available():
            raise ValueError("there is no CUDA device; speed is measured on one, and the CPU only runs references")
        device = torch.device("cuda", torch.cuda.current_device())
        for op in ops:
            backend = linear_backend(op, device)
            if backend.name == "reference":
                raise ValueError(f"{op} has no kernel on this device: {backend.reason}")
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        return cls(device, graph_time, cache, measure_ceilings(graph_time, device))

    def rotated(self, weights: Any) -> list[Any]:
        """`weights`, a tuple of tensors or modules, and as many copies as it takes to exceed the cache."""
        return [weights, *(copy.deepcopy(weights) for _ in range(copies(byte_count(weights), self.cache_bytes) - 1))]


def copies(size: int, cache_bytes: int) -> int:
    """How many objects of `size` bytes exceed the cache `CACHE_MULTIPLE` times, within `MAX_COPY_BYTES`; at least 1."""
    wanted = max(2, math.ceil(CACHE_MULTIPLE * cache_bytes / size))
    return max(1, min(wanted, MAX_COPIES, MAX_COPY_BYTES // size))


def byte_count(item: Any) -> int:
    """Bytes of tensors, modules and tuples of them."""
    if isinstance(item, torch.Tensor):
        return item.nbytes
    if isinstance(item, torch.nn.Module):
        return sum(tensor.nbytes for tensor in (*item.parameters(), *item.buffers()))
    return sum(byte_count(part) for part in item)


def graph_time(calls: Sequence[Callable[[], Any]]) -> float:
    """Seconds of one call on the current CUDA device: median of several sequences of graph replays."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def milliseconds(work: Callable[[], Any], times: int) -> float:
        start.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / times

    def once() -> None:
        for call in calls:
            call()

    once()  # compiles kernels and creates handles, neither of which can be captured
    eager = milliseconds(once, 1) / len(calls)
    if eager >= LONG_MILLISECONDS:
        return statistics.median(milliseconds(once, 1) for _ in range(SEQUENCES)) / len(calls) / 1e3
    rounds = math.ceil(max(MIN_CALLS, GRAPH_MILLISECONDS / eager) / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            once()
    graph.replay()
    replays = math.ceil(SEQUENCE_MILLISECONDS / milliseconds(graph.replay, 1))
    found = [milliseconds(graph.replay, replays) for _ in range(SEQUENCES)]
    return statistics.median(found) / (rounds * len(calls)) / 1e3


def measure_bandwidth(timer: Timer, device: torch.device) -> tuple[float, float]:
    """GB/s of reading, and of copying, where bytes read and bytes written both count."""
    size = min(STREAM_BYTES, torch.cuda.mem_get_info(device)[0] // 8) // 4
    source = torch.randint(2**31 - 1, (size,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    read = source.nbytes / timer([source.max]) / 1e9
    # A kernel, not copy_: inside a CUDA graph that becomes a memory copy of 2.8 TB/s where kernels move 4.2.
    copied = 2 * source.nbytes / timer([partial(torch.add, source, 1, out=target)]) / 1e9
    return read, copied


def measure_ceilings(timer: Timer, device: torch.device) -> Ceilings:
    """Bandwidth, and large matrix products."""
    read, copied = measure_bandwidth(timer, device)
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device).bfloat16() for _ in range(2))
    flops = 2 * MATMUL_SIZE**3
    bf16 = flops / timer([partial(torch.mm, a, b.t())]) / 1e12
    fp8 = None
    if cuda_refusal(device, FP8_CAPABILITY) is None:
        (a8, a_scale), (b8, b_scale) = quantize_fp8_per_token(a), quantize_fp8_per_token(b)
        product = partial(scaled_matmul, a8, a_scale, b8, b_scale, None, torch.bfloat16)
        fp8 = flops / timer([product]) / 1e12
    return Ceilings(read, copied, bf16, fp8)
