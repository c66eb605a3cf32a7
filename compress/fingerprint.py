"""A few logits that a directory is known by: taken when it is written, compared when it is verified.

Kept are the log-probabilities of the `TOP` most likely tokens at `POSITIONS` places of `TOKENS` tokens, once of the
weights alone, with attention and cache as transformers has them, and once with the attention and cache that the recipe
chose, if it chose any. The distance of two runs is

    d = mean over places and tokens of |Δ log p|, in nats.

Bit for bit, logits agree only on one kind of device with one version of torch. Elsewhere every rounding falls
differently, and what that amounts to is measured, not assumed: the run is repeated with every embedding moved by one
unit in its last place, up or down in turn, after which all later roundings are other ones. The distance of these two
runs is the noise of the model's own arithmetic on this text. What is tolerated is

    weights:  max(2.5 · noise, ε · mean |log p|)            ε of the model's dtype
    slots:    the same, + the distance between the run of the weights alone and that of the slots when they were taken,

the factor because means over a few places vary; the last term because kernels for attention and cache may round more
than their references, which can amount to what the arithmetic itself changes. So this finds a wrong config, a wrong
tensor, a kernel that is wrong; a flipped bit is what checksums are for.

On SmolLM2-135M the noise is 0.09 nats with W4A16 and 0.18 with W4A8, where one step of bf16 flips FP8 codes. The same
weights run in float32, with eager attention, or with norms in float32 are 0.05 to 0.07 and 0.16 away on a CPU. A
rotary base ten times too small is 0.5 away, which is found, and 0.36, which is not: only the checksum of config.json
tells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..quant.method import AttentionPolicy, CachePolicy
from .cache_evaluation import PROBE_TOKENS, input_device, probe_logits
from .hf_attention import at_least
from .hf_cache_hooks import running
from .hf_decoder import decoder_layers, layerwise_logits

TOKENS, POSITIONS, TOP = 64, 16, 8
FACTOR = 2.5


def take_fingerprint(
    model: Any,
    tokens: Tensor,
    device: torch.device,
    policies: Mapping[str, AttentionPolicy],
    cache: CachePolicy | None,
) -> dict[str, Any]:
    """The fingerprint of a model as `kompakt.json` holds it. tokens: (1, n); the first `TOKENS` are used.

    device: where one decoder layer at a time is run.
    """
    tokens = tokens[:, :TOKENS].cpu()
    layers = decoder_layers(model)

    def weights() -> Tensor:
        return layerwise_logits(model, layers, tokens, device)

    def slots() -> Tensor:
        if cache is not None:
            return probe_logits(model, policies, cache, tokens).cpu()
        with running(model, policies), at_least(model, 1):
            return layerwise_logits(model, layers, tokens, device)

    content: dict[str, Any] = {"tokens": tokens[0].tolist(), "weights": _described(model, weights)}
    if policies or cache is not None:
        content["slots"] = _described(model, slots)
        if cache is not None:
            tokens = tokens.repeat(1, -(-PROBE_TOKENS // tokens.shape[1]))[:, :PROBE_TOKENS]
        content["moved"] = distance(content["slots"], log_probabilities(weights()))
    return content


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities, (tokens, vocabulary) float32, of logits, (1, tokens, vocabulary)."""
    return logits[0].float().log_softmax(-1)


def _described(model: Any, run: Callable[[], Tensor]) -> dict[str, Any]:
    logits = run()
    found = log_probabilities(logits)
    count = min(POSITIONS, len(found))
    positions = torch.linspace(0, len(found) - 1, count).round().long()
    top = found[positions].topk(min(TOP, found.shape[-1]), dim=-1)
    content = {
        "sha256": digest(logits, positions),
        "positions": positions.tolist(),
        "ids": top.indices.tolist(),
        "log_probabilities": [[round(value, 6) for value in row] for row in top.values.tolist()],
    }
    with nudged(model):
        again = log_probabilities(run())
    floor = torch.finfo(model.dtype).eps * float(top.values.abs().mean())
    return {**content, "noise": max(distance(content, again), floor / FACTOR)}


def digest(logits: Tensor, positions: Tensor) -> str:
    """SHA-256 of the logits, (1, tokens, vocabulary), at `positions`, as float32."""
    return hashlib.sha256(logits[0, positions].float().contiguous().numpy().tobytes()).hexdigest()


def distance(recorded: dict[str, Any], got: Tensor) -> float:
    """d of the module. got: (tokens, vocabulary) log-probabilities."""
    positions, ids = torch.tensor(recorded["positions"]), torch.tensor(recorded["ids"])
    expected = torch.tensor(recorded["log_probabilities"])
    return float((got[positions].gather(-1, ids) - expected).abs().mean())


@contextmanager
def nudged(model: Any) -> Iterator[None]:
    """For a while, every embedding is moved by one unit in the last place, up and down in turn."""

    def nudge(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        signs = torch.ones(output.shape[-1], dtype=output.dtype, device=output.device)
        signs[1::2] = -1
        return output * (1 + torch.finfo(output.dtype).eps * signs)

    handle = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def compare_fingerprint(
    model: Any, recorded: dict[str, Any], policies: Mapping[str, AttentionPolicy], cache: CachePolicy | None
) -> list[tuple[str, bool, str]]:
    """(what was run, whether it agrees, in words) for each part of a fingerprint. model: without attention and cache.

    ValueError if the fingerprint does not fit the model.
    """
    tokens = torch.tensor([recorded["tokens"]])
    results = [_compared("weights alone", recorded["weights"], _plain(model, tokens), 0.0)]
    if recorded.get("slots") is not None:
        if cache is not None:
            logits = probe_logits(model, policies, cache, tokens).cpu()
        else:
            with running(model, policies), at_least(model, 1):
                logits = _plain(model, tokens)
        results.append(_compared("attention and cache as chosen", recorded["slots"], logits, recorded["moved"] or 0.0))
    return results


def _plain(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens.to(input_device(model)), use_cache=False).logits.cpu()


def _compared(what: str, recorded: dict[str, Any], logits: Tensor, more: float) -> tuple[str, bool, str]:
    if not bool(logits.isfinite().all()):
        return what, False, "logits are NaN or infinite"
    if digest(logits, torch.tensor(recorded["positions"])) == recorded["sha256"]:
        return what, True, "logits equal those at compression bit for bit"
    found, allowed = distance(recorded, log_probabilities(logits)), FACTOR * recorded["noise"] + more
    count = len(recorded["positions"]) * len(recorded["ids"][0])
    words = f"mean |Δ log p| {found:.2g} nats over {count} log-probabilities, at most {allowed:.2g} tolerated"
    return what, found <= allowed, words


def check_fingerprint(recorded: dict[str, Any], vocabulary: int) -> None:
    """ValueError unless the fingerprint could be one of a model with so many tokens."""
    if max(recorded["tokens"]) >= vocabulary:
        raise ValueError(f"the fingerprint holds the token {max(recorded['tokens'])}; the model has {vocabulary}")
    for part in (recorded["weights"], recorded.get("slots")):
        if part is None:
            continue
        length = len(recorded["tokens"]) if part is recorded["weights"] else max(len(recorded["tokens"]), PROBE_TOKENS)
        rows = (part["positions"], part["ids"], part["log_probabilities"])
        widths = {len(row) for table in rows[1:] for row in table}
        shaped = len({len(table) for table in rows} | {max(1, len(rows[0]))}) == 1 and len(widths) == 1
        shaped = shaped and 0 not in widths
        if not shaped or max(part["positions"]) >= length or max(map(max, part["ids"])) >= vocabulary:
            raise ValueError("the fingerprint holds places or tokens that its own text or the model does not have")
