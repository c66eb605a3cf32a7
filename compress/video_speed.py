"""Sparse-vDiT on made-up queries, keys and values of videos: what the search takes, and what its patterns gain.

Tokens are frame-major. Each head has a kind, in turns of `KINDS`; a token's features are random Fourier features of its
place, so that the logit of two tokens is

    near          PEAK · exp(−Δ² / 2w²)      Δ their distance in the sequence, w a hundredth of it
    same          the same on the circle of a frame: the same place in every frame
    anchors       PEAK for the first tokens of every frame, 0 for others
    everywhere    0: all tokens alike, which no pattern but dense serves

and all have noise. So many heads look everywhere that FLOPs fall about as far as published for HunyuanVideo (÷ 2.38).
Values are random. The search is the real one, over `candidates`, and what is timed is what it chose.

    share         time of our dense bf16 kernel · tiles visited / tiles of dense attention / time
    error         ‖sparse − dense‖ / ‖dense‖ on inputs that the search did not see

Nothing is said about videos. Source: Sparse-vDiT (arXiv 2506.03065).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention import Call, prefill_attention
from ..kernels.sparse_attention import sparse_attention, sparse_attention_ref
from ..sparsify.sparse_vdit import LayerChoice, build, candidates, search
from .attention_cases import Case, Layout, worst_error
from .attention_contenders import PEERS, Contender, Problem, kompakt_mode
from .attention_speed import LIMITS, finite, heading
from .device_speed import Machine
from .linear_speed import parse_pair, reason
from .pipeline import Progress, quiet
from .sparse_speed import timed

KINDS = ("near", "same", "anchors", "everywhere", "near", "same", "everywhere", "near", "same", "anchors")
KINDS += ("everywhere", "everywhere")
PEAK = 20.0
NOISE = 0.2
WIDTH = 1 / 100
ANCHORS = 1 / 64
SMALL = 4, 300
"""Frames and tokens of a frame on which the kernel is compared with its reference."""


@dataclass(frozen=True)
class Video:
    """What one layer of a video model attends to. frame: tokens of a frame."""

    frames: int
    frame: int
    heads: int
    head_dim: int

    @property
    def tokens(self) -> int:
        """Of the whole video."""
        return self.frames * self.frame

    @classmethod
    def all(cls, text: str, heads: int, head_dim: int) -> list[Video]:
        """``33x3600,21x1560``: frames x tokens of a frame, each once. ValueError for others, and an odd head_dim."""
        if head_dim % 2 or head_dim < 2:
            raise ValueError(f"head_dim is {head_dim}; features of a place come in pairs, so that it must be even")
        found = []
        for item in text.split(","):
            pair = parse_pair(item)
            if pair is None:
                raise ValueError(f"video {item!r} is no frames x tokens of a frame; use e.g. 33x3600,21x1560")
            found.append(cls(*pair, heads, head_dim))
        return list(dict.fromkeys(found))

    def draw(self, seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """query, key, value (1, heads, tokens, head_dim) bf16, see the module."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (1, self.heads, self.tokens, self.head_dim)
        query, key, value = (torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in range(3))
        for head in range(self.heads):
            features = self.features(KINDS[head % len(KINDS)], head, device)
            for target, part in zip((query, key), features, strict=True):
                noise = torch.randn(shape[2:], generator=generator, device=device)
                target[0, head] = (part + NOISE * noise).bfloat16()
            value[0, head] = torch.randn(shape[2:], generator=generator, device=device).bfloat16()
        return query, key, value

    def features(self, kind: str, head: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of queries and keys, (tokens, head_dim) fp32, the same for every input: a model's heads keep their kind."""
        pairs = self.head_dim // 2
        # cos and sin of `pairs` frequencies, or as many ones, have this length² between them.
        size = math.sqrt(PEAK * math.sqrt(self.head_dim) / pairs)
        place = torch.arange(self.tokens, device=device)
        if kind == "anchors":
            anchor = place % self.frame < max(round(ANCHORS * self.frame), 1)
            ones = torch.full((self.tokens, self.head_dim), size / math.sqrt(2), device=device)
            return ones, ones * anchor[:, None]
        if kind == "everywhere":
            nothing = torch.zeros((self.tokens, self.head_dim), device=device)
            return nothing, nothing
        draws = torch.randn(pairs, generator=torch.Generator(device).manual_seed(1000 + head), device=device)
        if kind == "near":
            angle = place[:, None] * (draws / (WIDTH * self.tokens))
        else:
            # Whole turns a frame.
            turns = (draws / (2 * math.pi * WIDTH)).round()
            angle = (place % self.frame)[:, None] * (2 * math.pi * turns / self.frame)
        found = torch.cat((angle.cos(), angle.sin()), dim=1) * size
        return found, found


def video_speed(
    machine: Machine,
    videos: Sequence[Video],
    peers: Sequence[str],
    *,
    note: str = "",
    progress: Progress = quiet,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """A row per video; JSON-able. keep: given the result after every row."""
    result = {**heading(machine, peers, note), "bench": "video", "kinds": dict(Counter(KINDS)), "rows": []}
    for place, video in enumerate(videos):
        progress("timing patterns of videos", place, len(videos), f"{video.tokens} tokens")
        row = {**asdict(video), "tokens": video.tokens, **checked(video, machine.device)}
        if row["correct"]:
            row |= time_row(video, peers, machine)
        result = {**result, "rows": [*result["rows"], row]}
        keep(result)
    return result


def searched(video: Video, device: torch.device) -> LayerChoice:
    """The patterns of the heads, on one input."""
    return search([video.draw(0, device)], candidates(video.tokens, video.frame))


def checked(video: Video, device: torch.device) -> dict[str, Any]:
    """The kernel against its reference over what a search chose for a short video, everywhere."""
    small = replace(video, frames=SMALL[0], frame=SMALL[1])
    try:
        heads = [head.pattern for head in searched(small, device).heads]
        index, _ = build(heads, 1, small.tokens, small.tokens, device)
        query, key, value = small.draw(1, device)
        out, _ = sparse_attention(query, key, value, index, causal=False, check=True)
        call = Call("bf16", False, None, small.head_dim**-0.5, None)
        expected, _ = sparse_attention_ref(query.float(), key.float(), value.float(), index, call, dtype=torch.float64)
        error = worst_error(out.double(), expected.transpose(1, 2).double())
    except Exception as error:  # the command fails in the end, with the other rows kept
        return {"correct": False, "reason": reason(error)}
    return {"correct": error <= LIMITS["bf16"], "check_error": finite(error)}


def time_row(video: Video, peers: Sequence[str], machine: Machine) -> dict[str, Any]:
    """Times in microseconds or seconds, and what was chosen."""
    device = machine.device
    try:
        begin = clock(device)
        choice = searched(video, device)
        search_seconds = clock(device) - begin
        begin = clock(device)
        index, density = build([head.pattern for head in choice.heads], 1, video.tokens, video.tokens, device)
        index_seconds = clock(device) - begin
        query, key, value = video.draw(1, device)

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return sparse_attention(query, key, value, index, causal=False)[0]

        exact = prefill_attention(query, key, value, mode="bf16", causal=False)[0].float()
        error = float((run(query, key, value).float() - exact).norm() / exact.norm())
        del exact
        seconds = machine.timer(Contender(machine.rotated((query, key, value)), run).calls())
    except Exception as error:  # as above
        return {"correct": False, "reason": reason(error)}
    case = Case("full", video.tokens, video.head_dim, video.heads, video.heads, 1)
    problem = Problem(case, Layout.of(case, device), query, key, value)
    dense = timed(lambda problem, machine: kompakt_mode("bf16", problem, machine), problem, machine)
    found = {
        "patterns": dict(Counter(head.pattern.key for head in choice.heads)),
        "candidates": len(candidates(video.tokens, video.frame)),
        "search_seconds": round(search_seconds, 3),
        "index_seconds": round(index_seconds, 4),
        "density": round(density, 5),
        "error": finite(error),
        "microseconds": round(1e6 * seconds, 3),
        "dense": dense,
        "peers": {peer: timed(PEERS[peer], problem, machine) for peer in peers},
    }
    if "microseconds" in dense:
        found["share"] = round(dense["microseconds"] * density / found["microseconds"], 4)
    return found


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
