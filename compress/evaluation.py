"""Measurements of a causal language model on text: perplexity, distance from a base model, generation speed.

With x the tokens and S the scored positions, the mean negative log-likelihood is NLL = -1/|S| Σ log p(x_t | x_<t within
its window), in nats, and perplexity = exp(NLL). Log-softmax is taken in float32, in chunks of tokens.

What is scored: a text is tokenized once and cut into windows, and the incomplete tail is dropped. With non-overlapping
windows (``stride == window``) each scores ``window - 1`` tokens: its first has no context. With ``stride < window`` the
first window scores ``window - 1`` tokens and every later one only its last ``stride`` tokens, which no earlier window
has scored. With ``prompt`` tokens that go in first (`cache_evaluation.py`), a window scores at most what was
predicted from behind them: its last ``window - prompt - 1`` tokens.

Standard errors: tokens of one window are correlated, so a window counts as one observation. For per-window sums s_w
over n_w tokens, the mean is m = Σ s_w / Σ n_w and its variance W/(W-1) Σ (s_w - m n_w)² / (Σ n_w)² (ratio estimator).
Quantities that are functions of a mean take the delta method. One window alone has no standard error: it is None.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from .cache_evaluation import cached_logits, input_device
from .calibration import builtin_text
from .hf_cache_hooks import cache_maker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]

# Elements of one float32 chunk of logits: 64 MiB, so that a 256k vocabulary goes 64 tokens at a time.
CHUNK_ELEMENTS = 2**24
MAX_WINDOWS_PER_PASS = 16
PASS_SHARE = 8
"""Logits of a pass take at most one part of so many of a device's memory."""
# exp() of a larger mean is not meaningful as a perplexity, and soon not representable.
MAX_NLL = 300.0


@dataclass(frozen=True)
class Result:
    """Base of all measurements."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; ValueError if a number is NaN or infinite."""
        return json.loads(json.dumps(asdict(self), allow_nan=False))


@dataclass(frozen=True)
class Perplexity(Result):
    """``nll`` is in nats per token, ``window``, ``stride`` and ``prompt_tokens`` in tokens; see the module docstring
    for what is scored and for the standard errors.

    ``perplexity`` is computed from at most MAX_NLL, so that a broken model still yields a number.
    """

    perplexity: float
    perplexity_stderr: float | None
    nll: float
    nll_stderr: float | None
    tokens_scored: int
    windows: int
    window: int
    stride: int
    prompt_tokens: int


@dataclass(frozen=True)
class Comparison(Result):
    """A model beside its base model, on the same tokens.

    ``kl`` is the mean over tokens of KL(base ‖ model) in nats. ``top1_agreement`` is the share of positions where both
    have the same most likely token. ``perplexity_increase`` is perplexity / base perplexity - 1, its standard error
    paired: from the differences of NLL window by window.
    """

    model: Perplexity
    base: Perplexity
    kl: float
    kl_stderr: float | None
    top1_agreement: float
    top1_agreement_stderr: float | None
    perplexity_increase: float
    perplexity_increase_stderr: float | None


@dataclass(frozen=True)
class GenerationSpeed(Result):
    """Medians over ``repeats`` runs of one sequence; ``decode_seconds`` spans ``new_tokens - 1`` decoding steps."""

    device: str
    prompt_tokens: int
    new_tokens: int
    repeats: int
    prefill_seconds: float
    decode_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@contextmanager
def scoring_mode(model: torch.nn.Module) -> Iterator[None]:
    """No gradients, every module in eval mode; modules that were training are set back.

    Not inference mode: its tensors do not count their changes, so that Linears could not share quantized inputs.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def windows_per_pass(device: torch.device, dtype: torch.dtype, window: int, vocabulary: int) -> int:
    """Windows whose logits, of two models, take at most 1 / `PASS_SHARE` of a device's memory; 1 on the CPU, where more
    at a time gain nothing, and for a device that is not here.

    It does not depend on what is free: a device may multiply many tokens in another way than few.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return 1
    room = torch.cuda.get_device_properties(device).total_memory // PASS_SHARE
    return max(1, min(MAX_WINDOWS_PER_PASS, room // (2 * dtype.itemsize * window * vocabulary)))


def text_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, *, window: int, stride: int | None = None, limit: int | None = None
) -> torch.Tensor:
    """Token windows of ``text``: (n, window), int64.

    The text is tokenized once, in one call, with the special tokens the tokenizer adds; windows start every ``stride``
    tokens (default: ``window``, no overlap), and only full ones are kept, at most ``limit``. Raises ValueError for a
    text that is shorter than one window.
    """
    stride = _checked_stride(window, stride)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for all windows")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < window:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {window}")
    return ids.unfold(0, window, stride)[:limit].contiguous()


def perplexity(
    model: Any,
    windows: torch.Tensor,
    *,
    stride: int | None = None,
    prompt: int = 0,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of ``model`` on ``windows``: (n, window), with the ``stride`` they were cut with.

    prompt: tokens of each that a compressed cache is given at once, and that nobody scores. Logits of ``batch_size``
    windows are held at a time. Raises ValueError if the loss of a window is not finite.
    """
    scored = _checked_windows(windows, stride, prompt, batch_size)
    sums: list[float] = []
    with scoring_mode(model):
        for start in range(0, len(windows), batch_size):
            ids = windows[start : start + batch_size]
            logits = _logits(model, ids, prompt)
            for row in range(len(ids)):
                first = scored.first(start + row)
                sums.append(token_nll(logits[row, first - 1 - prompt : -1], ids[row, first:]).double().sum().item())
                _check_finite(sums[-1], start + row, "model")
            del logits
            if progress:
                progress(start + len(ids), len(windows))
    return _perplexity(sums, scored)


def compare(
    model: Any,
    base: Any,
    windows: torch.Tensor,
    *,
    stride: int | None = None,
    prompt: int = 0,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Comparison:
    """``model`` against ``base`` in one pass over ``windows``: (n, window), on the tokens that `perplexity` scores.

    Logits of ``batch_size`` windows of both models are held at a time. Raises ValueError if a loss is not finite or the
    vocabularies differ in size.
    """
    scored = _checked_windows(windows, stride, prompt, batch_size)
    rows: list[_WindowSums] = []
    with scoring_mode(model), scoring_mode(base):
        for start in range(0, len(windows), batch_size):
            ids = windows[start : start + batch_size]
            logits, base_logits = _logits(model, ids, prompt), _logits(base, ids, prompt)
            if logits.shape[-1] != base_logits.shape[-1]:
                raise ValueError(
                    f"the model has {logits.shape[-1]} logits and its base {base_logits.shape[-1]}; "
                    "they can be compared only over the same vocabulary"
                )
            for row in range(len(ids)):
                first = scored.first(start + row)
                place = slice(first - 1 - prompt, -1)
                found = _window_sums(logits[row, place], base_logits[row, place], ids[row, first:])
                _check_finite(found.nll, start + row, "model")
                _check_finite(found.base_nll, start + row, "base model")
                rows.append(found)
            del logits, base_logits
            if progress:
                progress(start + len(ids), len(windows))
    counts = scored.counts()
    kl, kl_stderr = ratio_mean([row.kl for row in rows], counts)
    agreement, agreement_stderr = ratio_mean([row.agreement for row in rows], counts)
    difference, difference_stderr = ratio_mean([row.nll - row.base_nll for row in rows], counts)
    ratio = math.exp(min(difference, MAX_NLL))
    return Comparison(
        model=_perplexity([row.nll for row in rows], scored),
        base=_perplexity([row.base_nll for row in rows], scored),
        kl=kl,
        kl_stderr=kl_stderr,
        top1_agreement=agreement,
        top1_agreement_stderr=agreement_stderr,
        perplexity_increase=ratio - 1.0,
        perplexity_increase_stderr=_scaled(difference_stderr, ratio),
    )


def generation_speed(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 3,
    progress: Progress | None = None,
) -> GenerationSpeed:
    """Speed of greedy ``model.generate`` with one sequence, after one warm-up run of the same shape.

    The prompt is English prose. Prefill lasts until the first new token is on the host, decoding from there to the
    last; the end-of-text token is suppressed, so that every run has the same length.
    """
    if prompt_tokens < 1 or new_tokens < 2 or repeats < 1:
        raise ValueError(
            f"prompt_tokens is {prompt_tokens}, new_tokens {new_tokens}, repeats {repeats}; "
            "they must be at least 1, 2 and 1"
        )
    device = input_device(model)
    ids = tokenizer(builtin_text("evaluation"), verbose=False)["input_ids"]
    prompt = torch.tensor(ids).repeat(-(-prompt_tokens // len(ids)))[None, :prompt_tokens].to(device)
    prefill, decode = [], []
    with scoring_mode(model):
        for run in range(repeats + 1):
            clock = Clock(device)
            model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                streamer=clock,
            )
            if run > 0:
                prefill.append(clock.times[1] - clock.times[0])
                decode.append(clock.times[-1] - clock.times[1])
            if progress:
                progress(run + 1, repeats + 1)
    prefill_seconds, decode_seconds = statistics.median(prefill), statistics.median(decode)
    return GenerationSpeed(
        device=_device_name(device),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        prefill_tokens_per_second=prompt_tokens / prefill_seconds,
        decode_tokens_per_second=(new_tokens - 1) / decode_seconds,
    )


def token_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[label] per token, in nats: (tokens,), float32.

    logits: (tokens, vocab), any float dtype; labels: (tokens,). Works through CHUNK_ELEMENTS of float32 at a time.
    """
    labels = labels.to(logits.device)
    step = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    parts = zip(logits.split(step), labels.split(step), strict=True)
    return torch.cat([functional.cross_entropy(chunk.float(), target, reduction="none") for chunk, target in parts])


def ratio_mean(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float | None]:
    """Mean per count over clusters, and its standard error (None for one cluster); see the module docstring."""
    total, clusters = sum(counts), len(sums)
    mean = math.fsum(sums) / total
    if clusters < 2:
        return mean, None
    squares = math.fsum((value - mean * count) ** 2 for value, count in zip(sums, counts, strict=True))
    return mean, math.sqrt(squares * clusters / (clusters - 1)) / total


@dataclass(frozen=True)
class _Scored:
    """Which tokens of which window are scored."""

    windows: int
    window: int
    stride: int
    prompt: int

    def first(self, index: int) -> int:
        """Position of the first scored token of window number ``index``."""
        return max(self.prompt + 1, 1 if index == 0 else self.window - self.stride)

    def counts(self) -> list[int]:
        """Scored tokens of each window."""
        return [self.window - self.first(index) for index in range(self.windows)]


@dataclass(frozen=True)
class _WindowSums:
    nll: float
    base_nll: float
    kl: float
    agreement: float


class Clock:
    """A streamer for ``generate``: notes when the prompt went in and when each new token reached the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """New tokens, or first the prompt."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def _window_sums(logits: torch.Tensor, base_logits: torch.Tensor, labels: torch.Tensor) -> _WindowSums:
    """Sums over the tokens of one window. logits, base_logits: (tokens, vocab); labels: (tokens,)."""
    labels = labels.to(logits.device)
    step = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    sums = torch.zeros(4, dtype=torch.float64, device=logits.device)
    for chunk, base_chunk, target in zip(logits.split(step), base_logits.split(step), labels.split(step), strict=True):
        log_p = chunk.float().log_softmax(-1)
        base_log_p = base_chunk.to(log_p.device).float().log_softmax(-1)
        base_p = base_log_p.exp()
        # Where the base has no probability the term is 0, also if both logits are -inf.
        kl = torch.where(base_p > 0, base_p * (base_log_p - log_p), 0.0).sum(-1)
        nll = -log_p.gather(-1, target[:, None])
        base_nll = -base_log_p.gather(-1, target[:, None])
        agreement = log_p.argmax(-1) == base_log_p.argmax(-1)
        sums += torch.stack([value.double().sum() for value in (nll, base_nll, kl, agreement)])
    return _WindowSums(*sums.tolist())


def _logits(model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits behind the prompt for ids: (batch, window) → (batch, window - prompt, vocab), on the model's output
    device.
    """
    ids = ids.to(input_device(model))
    if cache_maker(model) is None:
        return model(input_ids=ids, use_cache=False).logits[:, prompt:]
    return cached_logits(model, ids, prompt=prompt, keep=ids.shape[1] - prompt)


def _perplexity(sums: Sequence[float], scored: _Scored) -> Perplexity:
    counts = scored.counts()
    mean, stderr = ratio_mean(sums, counts)
    value = math.exp(min(mean, MAX_NLL))
    return Perplexity(
        perplexity=value,
        perplexity_stderr=_scaled(stderr, value),
        nll=mean,
        nll_stderr=stderr,
        tokens_scored=sum(counts),
        windows=scored.windows,
        window=scored.window,
        stride=scored.stride,
        prompt_tokens=scored.prompt,
    )


def _scaled(stderr: float | None, factor: float) -> float | None:
    return None if stderr is None else stderr * factor


def _check_finite(value: float, index: int, which: str) -> None:
    if not math.isfinite(value):
        raise ValueError(f"the loss of the {which} is {value} in window {index}; its logits are not usable")


def _checked_stride(window: int, stride: int | None) -> int:
    stride = window if stride is None else stride
    if window < 2:
        raise ValueError(f"window is {window}; it must have at least 2 tokens")
    if not 1 <= stride <= window:
        raise ValueError(f"stride is {stride}; it must be between 1 and the window of {window} tokens")
    return stride


def _checked_windows(windows: torch.Tensor, stride: int | None, prompt: int, batch_size: int) -> _Scored:
    if windows.ndim != 2 or len(windows) == 0:
        raise ValueError(f"windows have the shape {tuple(windows.shape)}; expected (n, window) with n at least 1")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    count, window = windows.shape
    if not 0 <= prompt <= window - 2:
        raise ValueError(f"prompt is {prompt}; it must leave at least 2 of a window's {window} tokens, and may be 0")
    return _Scored(count, window, _checked_stride(window, stride), prompt)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()})"
