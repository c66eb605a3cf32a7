"""Several processes that calibrate one model together, started by `torchrun` or `accelerate launch`.

Every process holds the model and runs its share of the calibration batches: process r of n takes batches r, r + n, ….
What a method reads of them are means over tokens, so that one sum over processes makes them those of all batches:
with t_r tokens of process r and its means m_r, m = Σ t_r m_r / Σ t_r. That, the tensors of a quantized layer (those of
the first process count, lest another device round another way) and an error that one process meets are all that is
sent. The first process alone writes files, reloads, measures and reports.

A process that fails tells the others at their next exchange: all end, and one of them has the sentence to say.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn

from ..quant.block import InputStatistics
from ..quant.method import WeightMethod

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(hours=24)
"""The others wait while the first process writes and measures."""
TOLD = "_told_to_processes"
"""Attribute of an error that the others know of."""


class PeerFailed(RuntimeError):
    """Another process of this run failed, and says why."""


class PeerGone(RuntimeError):
    """Another process of this run ended without a word."""


def launched() -> int:
    """How many processes a launcher has started together, this one among them."""
    if not all(os.environ.get(name) for name in LAUNCHED):
        return 1
    return max(1, int(os.environ["WORLD_SIZE"]))


def is_first() -> bool:
    """Whether this is the process that speaks for all."""
    return launched() == 1 or int(os.environ["RANK"]) == 0


def own_device(device: str | None) -> torch.device:
    """Where this process works: `device`, by default a CUDA device if there are any; with several processes one of its
    own, and ValueError if it has none.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if launched() == 1 or chosen.type != "cuda":
        return chosen
    local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if chosen.index is not None:
        raise ValueError(f"device {chosen} would be that of every process; use cuda, which gives each one of its own")
    if local >= there:
        raise ValueError(f"process {local} of this machine has no CUDA device of its own; start at most {there}")
    return torch.device("cuda", local)


@dataclass(frozen=True)
class Processes:
    """This process among `size`; alone, every method leaves its argument as it is."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def check(self, error: BaseException | None = None) -> None:
        """Meets the others; all of them must call it. error: why this process ends.

        Raises PeerFailed if a process failed, except in the first of those that did.
        """
        if self.size == 1:
            return
        lengths = torch.zeros(self.size, dtype=torch.int64)
        sentence = b"" if error is None else (str(error) or type(error).__name__).encode()
        lengths[self.rank] = 0 if error is None else max(1, len(sentence))
        self._send(lambda: distributed.all_reduce(lengths))
        if not bool(lengths.any()):
            return
        failed = int(lengths.nonzero()[0])
        text = torch.zeros(int(lengths[failed]), dtype=torch.uint8)
        if failed == self.rank:
            text = torch.frombuffer(bytearray(sentence.ljust(1)), dtype=torch.uint8)
        self._send(lambda: distributed.broadcast(text, failed))
        if failed != self.rank:
            raise PeerFailed(f"process {failed} of {self.size} failed: {bytes(text.tolist()).decode(errors='replace')}")

    def share(self, batches: list[torch.Tensor]) -> list[torch.Tensor]:
        """The batches of this process."""
        return batches[self.rank :: self.size]

    def order(self, shapes: list[torch.Size]) -> list[tuple[torch.Size, int | None]] | None:
        """For every batch its shape and its place among those of this process; None if it has all."""
        if self.size == 1:
            return None
        mine = range(self.rank, len(shapes), self.size)
        return [(shape, mine.index(number) if number in mine else None) for number, shape in enumerate(shapes)]

    def check_same(self, fact: bool, what: str) -> None:
        """ValueError if the processes do not all find the same. what: for the message."""
        if self.size > 1 and self.first_of(fact) != fact:
            raise ValueError(f"the processes do not agree on {what}; they must see the same files")

    def sum_statistics(self, found: dict[str, InputStatistics]) -> None:
        """Turns the moments of this process's tokens into those of all tokens. ValueError for a Linear without any."""
        if self.size == 1:
            return
        self.check()
        for statistics in found.values():
            tokens = torch.tensor(statistics.tokens, dtype=torch.int64)
            self._send(lambda tokens=tokens: distributed.all_reduce(tokens))
            total = int(tokens)
            for mean in (statistics.hessian, statistics.abs_mean, statistics.energy):
                mean.mul_(statistics.tokens / max(1, total))
                self._send(lambda mean=mean: distributed.all_reduce(mean))
            statistics.tokens = total

    def sum_counts(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum over all processes. counts: int64, on the CPU."""
        if self.size > 1:
            self.check()
            self._send(lambda: distributed.all_reduce(counts))
        return counts

    def agree(self, module: nn.Module) -> None:
        """Gives every process the first one's parameters of a quantized layer."""
        if self.size == 1:
            return
        self.check()
        for parameter in module.parameters():
            content = parameter.data.contiguous().reshape(-1).view(torch.uint8)
            self._send(lambda content=content: distributed.broadcast(content, 0))
            parameter.data = content.view(parameter.dtype).view(parameter.shape)

    def first_of(self, content: Any) -> Any:
        """What the first process has: something JSON-able, to all of them."""
        if self.size == 1:
            return content
        self.check()
        text = json.dumps(content).encode() if self.first else b""
        length = torch.tensor(len(text), dtype=torch.int64)
        self._send(lambda: distributed.broadcast(length, 0))
        data = torch.zeros(int(length), dtype=torch.uint8)
        if self.first:
            data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._send(lambda: distributed.broadcast(data, 0))
        return json.loads(bytes(data.tolist()))

    def _send(self, exchange: Any) -> None:
        try:
            exchange()
        except RuntimeError as error:
            cause = str(error).partition("\n")[0]
            raise PeerGone(
                f"another process of this run has ended, or does not answer, and this one cannot go on alone: {cause}"
            ) from error


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of this run. An error inside ends them all; see `Processes.check`. May be entered again inside."""
    size = launched()
    if size == 1 and not (distributed.is_available() and distributed.is_initialized()):
        yield ALONE
        return
    ours = not distributed.is_initialized()
    if ours:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=PATIENCE)
    found = Processes(distributed.get_rank(), distributed.get_world_size())
    try:
        yield found
        found.check()
    except (PeerFailed, PeerGone):
        raise
    except Exception as error:
        if not hasattr(error, TOLD):
            setattr(error, TOLD, True)
            with suppress(PeerGone):
                found.check(error)
        raise
    finally:
        if ours:
            distributed.destroy_process_group()


def check_shared(processes: Processes, batches: int, method: WeightMethod | None) -> None:
    """ValueError if the processes would have nothing to share. batches: of calibration text. method: of the weights."""
    if processes.size == 1:
        return
    if method is None or not method.needs_data:
        raise ValueError(
            f"{processes.size} processes share the calibration of weights, and this recipe has none; start one"
        )
    if method.needs_reference:
        raise ValueError(
            f"learned rounding looks at all calibration text in every step, which {processes.size} processes cannot "
            "share; start one, or choose gptq, awq or fireq with rounding gptq"
        )
    if batches < processes.size:
        raise ValueError(
            f"{batches} calibration batches cannot be shared by {processes.size} processes; give more samples or a "
            "smaller batch_size, or start fewer"
        )
