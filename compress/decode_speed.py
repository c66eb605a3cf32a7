"""Attention over a compressed cache against named peers on one CUDA device: right first, then time.

Every row is one shape of cache and one kind of codes; all kinds and peers have the same keys and values. Before
anything is timed,

- on `check_length` tokens the pages must hold what `kv_pages.write_ref` writes, bit for bit (of numbers of centroids
  a thousandth may differ, where two are about as near; pages of kept tokens are written by torch alone), and the result
  must be that of `decode_ref` in float64 over the same codes;
- at the length itself, queries that each look for another token must find it as `decode_ref` in FP32 does.

Where one of these fails the row is wrong and has no time.

    error           ‖difference‖ / ‖reference‖ of the worst query, on check_length tokens    ≤ LIMITS
    length_error    the same at the length                                                   ≤ LIMITS

Bytes are those that a call has to move: whole pages with their parameters, dense tokens, queries and outputs, not the
parts that are merged, which stay in the L2 cache. The floor is the time that they take at the bandwidth measured in the
same process, the larger of reading and copying; the share of the bandwidth is floor / time. Coding is timed apart: a
page takes it once in `PAGE` generated tokens, in every layer. Caches that evict keep what is generated in pages that
are coded as those of the kind without eviction.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.decode_attention import Reading, decode_ref
from ..kernels.kv_pages import PAGE, Pages, write_ref, write_tokens
from ..kernels.kv_pq import PQCodec
from .attention_cases import attend_rows, worst_error
from .attention_contenders import Problem
from .attention_speed import finite, run_once
from .cache import TokenStore
from .decode_contenders import (
    PEERS,
    DecodeCase,
    decode_calls,
    fill,
    method_of,
    needles,
    read_bytes,
    rotated_stores,
    shortest_length,
    statics_of,
    storage,
    visible,
)
from .device_speed import Ceilings, Machine
from .evicting import EvictingStore
from .kv_evict import KVEvict
from .linear_contenders import Absent
from .linear_speed import heading as linear_heading
from .linear_speed import installed, reason
from .pipeline import Progress, quiet
from .runtime import cache_backends

VERSION = 1
CHECK_LENGTH = 777
"""Tokens on which everything is compared: some pages, and dense tokens. One page less moves an output by 40 %."""
LIMITS = {
    **{"int4": 2.0**-4, "fp8": 2.0**-4, "bf16": 2.0**-7, "pq4": 2.0**-5, "pq2": 2.0**-5, "evict4x": 2.0**-7},
    **{"prune50": 2.0**-7, "prune70": 2.0**-7, "prune70-int4": 2.0**-7, "evict2x-int4": 2.0**-4},
}
"""Queries and probabilities in two e4m3 terms are off by 2⁻⁸ of each; so are 16-bit probabilities and outputs. FP8 sums
are off by at most 2⁻¹⁰ of Σ|q·k|, on these inputs a logit of 30 to 36, so that probabilities are off by 2⁻⁵, and by
2⁻¹⁰ of Σ|p·v| in a page, which is 9 times the page's share of an output. Queries of product-quantized pages are bf16:
2⁻⁹ of each product of a logit, here of 30 to 36, so that a probability is off by 2⁻⁶ if a few products decide. Pruned
pages are multiplied in 16 bit, as those of bf16."""
NEAR = 1e-3
"""Share of the codes that may be another centroid's, as near but for the order of a sum."""
PEER_ERROR_LIMIT = 0.25
"""Against exact attention."""
CODED_PAGES = 64
"""Pages that coding is timed on, one after another."""


def check_kernel(device: torch.device, kinds: Sequence[str]) -> None:
    """Raises ValueError if the device has no kernel for one of the kinds."""
    for kind in kinds:
        backend = cache_backends(device, method_of(kind))["decode_attention"]
        if backend.name == "reference":
            raise ValueError(
                f"attention over a compressed cache of kind {kind} has no kernel on this device: {backend.reason}"
            )


@torch.no_grad()
def decode_speed(
    machine: Machine,
    found: Sequence[DecodeCase],
    kinds: Sequence[str],
    peers: Sequence[str],
    *,
    note: str = "",
    progress: Progress = quiet,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Rows of every case × kind, each beside every peer; JSON-able.

    note: kept and shown in the table. keep: given the result after every case, so that little is lost where a run ends
    early.
    """
    rows: list[dict[str, Any]] = []
    checks: dict[tuple[DecodeCase, str], dict[str, Any]] = {}
    result: dict[str, Any] = {}
    steps = len(peers) + len(kinds)
    for index, case in enumerate(found):
        problem = case.draw(machine.device)
        exact = attend_rows(*tensors(problem), problem.layout, slice(0, case.queries))
        beside = {}
        for step, peer in enumerate(peers):
            progress("timing decoding", index * steps + step, len(found) * steps, f"{case.name} {peer}")
            beside[peer] = time_peer(peer, problem, exact, machine)
        for step, kind in enumerate(kinds, len(peers)):
            progress("timing decoding", index * steps + step, len(found) * steps, f"{case.name} {kind}")
            small = replace(case, length=check_length(kind)), kind
            if small not in checks:
                checks[small] = checked(*small, machine)
            rows.append({**asdict(case), "kind": kind, **time_kind(kind, problem, checks[small], beside, machine)})
        del problem, exact
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()
        result = with_shares({**heading(machine, peers, note), "rows": list(rows)})
        keep(result)
    progress("timing decoding", len(found) * steps, len(found) * steps, "done")
    return result


def check_length(kind: str) -> int:
    """`CHECK_LENGTH`; of kinds that evict, as many tokens more than the least that anything is evicted from."""
    return CHECK_LENGTH + (shortest_length(kind) if isinstance(method_of(kind), KVEvict) else 0)


def tensors(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    return problem.query, problem.key, problem.value


def time_peer(name: str, problem: Problem, exact: Tensor, machine: Machine) -> dict[str, Any]:
    """`microseconds`, `error` against exact attention, (batch, heads, queries, head_dim), and whether KV heads were
    repeated for it outside of the time, or `absent` with the reason.
    """
    try:
        contender = PEERS[name](problem, machine)
        error = worst_error(run_once(contender, problem), exact)
        if not error <= PEER_ERROR_LIMIT:
            raise Absent(f"its result is wrong: error {error:.2g}")
        seconds = machine.timer(contender.calls())
    except Exception as error:  # whatever another library raises, it is absent and the row says why
        return {"absent": reason(error)}
    return {"microseconds": round(1e6 * seconds, 3), "error": round(error, 6), "repeated_kv": contender.repeats}


def reading(problem: Problem) -> Reading:
    """Plain causal attention."""
    return Reading(problem.case.head_dim**-0.5, None, None)


def run_kind(query: Tensor, store: TokenStore, problem: Problem) -> Tensor:
    """What our op gives for queries, (batch, heads, queries, head_dim)."""
    # The allocator mostly hands this memory out again: what a kernel leaves unwritten is then NaN.
    torch.full_like(query, math.nan)
    return decode_calls(query, [store], problem)[0]()


def checked(case: DecodeCase, kind: str, machine: Machine) -> dict[str, Any]:
    """A kind on a few tokens; see the module. `reason` where there is no result."""
    try:
        problem = case.draw(machine.device)
        store = fill(kind, problem)
        differing = coding_difference(store, problem)
        out = run_kind(problem.query, store, problem)
        kv = visible(store, problem)
        reference, _ = decode_ref(problem.query.double(), kv, reading(problem), dtype=torch.float64)
        error = worst_error(out, reference)
    except Exception as error:  # one failing kernel must not cost the other rows; the command fails in the end
        return {"correct": False, "reason": reason(error)}
    found = {"correct": error <= LIMITS[kind] and not differing, "error": finite(error), "checked_tokens": case.length}
    return {**found, "reason": f"coding: {differing} of its pages differ from the reference's"} if differing else found


def coding_difference(store: TokenStore, problem: Problem) -> int:
    """Pages of a store that are not what the reference writes."""
    if isinstance(store, EvictingStore):
        return 0
    other = copy.deepcopy(store)
    for page in other.pages.values():
        # What the reference leaves out shows.
        for part in (page.key_codes, page.key_parameters, page.value_codes, page.value_parameters):
            part.fill_(1)
    write_ref(problem.key[:, :, : store.coded], problem.value[:, :, : store.coded], (0, store.coded), other.where())

    def parts(page: Any) -> list[Tensor]:
        named = (page.key_codes, page.key_parameters, page.value_codes, page.value_parameters)
        return [part.contiguous().flatten().view(torch.uint8) for part in named]

    def differ(one: Tensor, another: Tensor) -> bool:
        wrong = (one != another).float().mean() if one.numel() else 0.0
        return bool(wrong > (NEAR if isinstance(store.codec, PQCodec) else 0.0))

    pairs = [(parts(page), parts(other.pages[number])) for number, page in store.pages.items()]
    return sum(any(differ(*pair) for pair in zip(*page)) for page in pairs)


def time_kind(
    kind: str, problem: Problem, check: dict[str, Any], beside: dict[str, dict[str, Any]], machine: Machine
) -> dict[str, Any]:
    """What a row says beyond its case and kind. check: of `checked`. beside: what `time_peer` found, by peer."""
    row = {**check, "backend": cache_backends(machine.device, method_of(kind))["decode_attention"].name}
    if not row["correct"]:
        return {**row, "peers": beside}
    try:
        stores = rotated_stores(kind, problem, machine)
        first = stores[0]
        row |= {"bytes": read_bytes(first, problem), **storage(first, problem), "coded_tokens": first.coded}
        query = needles(problem)
        out = run_kind(query, first, problem)
        reference, _ = decode_ref(query.float(), visible(first, problem), reading(problem))
        error = worst_error(out, reference)
        row["length_error"] = finite(error)
        if not error <= LIMITS[kind]:
            return {**row, "correct": False, "peers": beside}
        seconds = machine.timer(decode_calls(problem.query, stores, problem))
        row["coding"] = time_coding(coded_stores(kind, stores, problem), problem, machine)
    except Exception as error:  # as above
        return {**row, "correct": False, "reason": reason(error), "peers": beside}
    return {**row, **speeds(row, seconds, beside)}


def coded_stores(kind: str, stores: Sequence[TokenStore], problem: Problem) -> Sequence[TokenStore]:
    """Caches whose pages are coded as those that a kind's generated tokens go into."""
    method = method_of(kind)
    if not isinstance(method, KVEvict):
        return stores
    store = TokenStore(method.coded or method_of("bf16"), statics=statics_of(kind, problem))
    store.append(problem.key, problem.value)
    return [store]


def time_coding(stores: Sequence[TokenStore], problem: Problem, machine: Machine) -> dict[str, float]:
    """Microseconds that one layer codes a page of every sequence and KV head, and that over the page's tokens.

    Pages are written as they are already.
    """
    calls = []
    for index in range(min(CODED_PAGES, stores[0].coded // PAGE)):
        columns = index * PAGE, (index + 1) * PAGE
        pages = stores[index % len(stores)].where()
        key, value = (tensor[:, :, slice(*columns)] for tensor in (problem.key, problem.value))
        calls.append(partial(code_page, key, value, columns, pages))
    microseconds = 1e6 * machine.timer(calls)
    return {
        "microseconds_per_page": round(microseconds, 3),
        "microseconds_per_token": round(microseconds / PAGE, 4),
    }


def code_page(key: Tensor, value: Tensor, columns: tuple[int, int], pages: Pages) -> Tensor:
    """Codes one page; gives the keys back, as a call that is timed gives something."""
    write_tokens(key, value, columns, pages)
    return key


def speeds(row: dict[str, Any], seconds: float, beside: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What follows from a time: the rate, and how many times faster than each peer."""
    return {
        "microseconds": round(1e6 * seconds, 3),
        "gb_per_second": round(row["bytes"] / seconds / 1e9, 1),
        "peers": {
            name: peer if "absent" in peer else {**peer, "ratio": round(peer["microseconds"] / (1e6 * seconds), 4)}
            for name, peer in beside.items()
        },
    }


def with_shares(result: dict[str, Any]) -> dict[str, Any]:
    """`result` with the floor and the share of the bandwidth in every row that has a time."""
    bandwidth = Ceilings(**result["ceilings"]).bytes_per_second

    def share(row: dict[str, Any]) -> dict[str, Any]:
        if not row["correct"]:
            return row
        floor = 1e6 * row["bytes"] / bandwidth
        return {**row, "floor_microseconds": round(floor, 3), "share": round(floor / row["microseconds"], 4)}

    return {**result, "rows": [share(row) for row in result["rows"]]}


def heading(machine: Machine, peers: Sequence[str], note: str) -> dict[str, Any]:
    """Versions, date, device and its ceilings, JSON-able."""
    versions = {"cudnn": str(torch.backends.cudnn.version()), "transformers": installed("transformers")}
    return {
        **linear_heading(machine, (), note),
        "bench": "decode",
        "version": VERSION,
        "against": {peer: versions.get(peer, torch.__version__) for peer in peers},
    }
