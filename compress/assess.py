"""`evaluate`: a directory measured on text, tasks, retrieval and generation, alone or against its base model, as one
JSON-able dict.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .artifact import SIDECAR, read_cache, read_policies, read_sidecar, sha256, weight_bytes
from .base_results import BaseResults, base_facts, results_folder
from .cache_evaluation import CHUNK, cache_in_use, check_fed, count_anew
from .calibration import builtin_text
from .cpu_arithmetic import float32_linears, multiplied_in_float32
from .evaluation import compare, generation_speed, input_device, perplexity, text_windows, windows_per_pass
from .evaluation_generation import (
    GenerationOptions,
    check_prompts,
    end_tokens,
    generation_agreement,
    generation_prompts,
)
from .evaluation_harness import Harness, HarnessOptions
from .evaluation_retrieval import check_lengths, describe_retrieval, in_use, measure_test
from .evaluation_tasks import LastWord, MultipleChoice, flips, last_word, multiple_choice
from .hf import load_base, load_tokenizer, load_written, resolve_model
from .hf_attention import at_least, attention_in_use
from .hf_cache_hooks import cache_maker, run_by
from .hf_stored import check_cache, check_statics
from .recipe import EvaluationOptions
from .retrieval_cases import Case, RetrievalOptions, retrieval_cases

Progress = Callable[[str, int, int, str], None]
Recall = Callable[[dict[str, Any], Callable[[], Any]], Any]
"""(question, how to find the base's answer) → the answer; see `BaseResults.recall`."""
TASKS = {"choices": (multiple_choice, MultipleChoice), "last_word": (last_word, LastWord)}


def open_model(path: Path, *, device_map: Any = None, verify: bool = True, trust_remote_code: bool = False) -> Any:
    """A model from a directory of either kind: one that kompakt wrote (checked first), its attention and cache as it
    says, or a float checkpoint.
    """
    if not (path / SIDECAR).is_file():
        return load_base(path, device_map=device_map, trust_remote_code=trust_remote_code)
    sidecar = read_sidecar(path, verify=verify)
    policies, cache = read_policies(sidecar), read_cache(sidecar, path)
    model = load_written(path, device_map=device_map, trust_remote_code=trust_remote_code)
    check_statics(model, {} if cache is None else cache.layers)
    run_by(model, policies, cache)
    check_cache(model)
    return model


def default_device_map() -> Any:
    """One CUDA device if there is one, the CPU otherwise."""
    return {"": 0} if torch.cuda.is_available() else None


def read_text(text: str) -> tuple[str, str]:
    """(text, description) of "builtin" or a .txt file. ValueError if it cannot be read."""
    if text == "builtin":
        return builtin_text("evaluation"), "builtin (held-out topics of the Python reference)"
    path = Path(text)
    try:
        return path.read_text("utf-8"), path.name
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"evaluation text {path} cannot be read: {error}") from error


def describe_text(options: EvaluationOptions, source: str, windows: torch.Tensor) -> dict[str, Any]:
    """What a perplexity was measured on, JSON-able. windows: (n, window)."""
    stride = options.stride or options.window
    prompt = {"prompt_tokens": options.prompt} if options.prompt else {}
    return {"source": source, "window": options.window, "stride": stride, "windows": len(windows), **prompt}


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    options: EvaluationOptions | None = None,
    choices: str | Path | None = None,
    last_word: str | Path | None = None,
    limit: int | None = None,
    harness: HarnessOptions | None = None,
    retrieval: RetrievalOptions | None = None,
    generation: GenerationOptions | None = None,
    speed: bool = True,
    kept_base: bool = True,
    device_map: Any = None,
    trust_remote_code: bool = False,
    progress: Progress = lambda stage, done, total, text: None,
) -> dict[str, Any]:
    """Perplexity with its standard error, size and tokens per second; KL, agreement and paired differences with a base.

    model, against: directories or hub ids, compressed or not. options: text, window, stride, number of windows
    (0 skips the text), and how a compressed cache is fed. choices, last_word: JSONL task files; limit: rows of each.
    harness: tasks that lm-eval runs. retrieval: what has to be found again in long contexts. generation: prompts that
    model and base continue; it needs `against`. kept_base: the base's answers to tasks and retrieval are kept, and read
    where nothing that they depend on has changed (`base_results.py`); what was read is said under "kept_base".
    Raises ValueError for bad input.
    """
    if generation is not None and against is None:
        raise ValueError("generation is compared with a base model's; name one as `against`")
    if limit is not None and all(tasks is None for tasks in (choices, last_word, harness)):
        raise ValueError(f"the limit of {limit} is on rows of tasks, and none is named (choices, last_word, tasks)")
    options = options or EvaluationOptions()
    path = resolve_model(model)
    base_path = None if against is None else resolve_model(against, what="base model")
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    device_map = default_device_map() if device_map is None else device_map
    windows = None
    result: dict[str, Any] = {"model": str(model), "against": None if against is None else str(against)}
    if options.windows:
        text, description = read_text(options.text)
        windows = text_windows(tokenizer, text, window=options.window, stride=options.stride, limit=options.windows)
        result["text"] = describe_text(options, description, windows)
    asked = Asked.read(tokenizer, retrieval, generation)
    tasks = None if harness is None else Harness(harness)
    subject = open_model(path, device_map=device_map, trust_remote_code=trust_remote_code)
    base = (
        None if base_path is None else open_model(base_path, device_map=device_map, trust_remote_code=trust_remote_code)
    )
    check_protocol(options, subject, base)
    if any((windows is not None, choices, last_word)):
        check_fed(subject, base, prompt=bool(options.prompt))
    if tasks is not None:
        check_fed(subject, base, prompt=False)
    asked.check(subject, base)
    result["bytes"] = {"model": weight_bytes(path), "base": None if base_path is None else weight_bytes(base_path)}
    if slow := multiplied_in_float32(subject, base):
        result["multiplied_in_float32"] = slow
    with float32_linears():
        if windows is not None:
            result |= measure_text(subject, base, windows, options, progress)
        kept = None
        if base_path is not None and kept_base and any((choices, last_word, tasks, retrieval)):
            kept = BaseResults(results_folder(), base_facts(base_path, base, path, tokenizer, device_map))
        recall = (lambda question, find: find()) if kept is None else kept.recall
        for name, file in (("choices", choices), ("last_word", last_word)):
            if file is not None:
                how = {"limit": limit, "dense_prompt": bool(options.prompt)}
                result[name] = _measure_task(name, Path(file), subject, base, tokenizer, how, recall, progress)
        if tasks is not None:
            result["harness"] = _measure_harness(tasks, subject, base, tokenizer, recall, progress)
        result |= asked.measure(subject, base, tokenizer, progress, recall)
        if kept is not None and kept.used:
            result["kept_base"] = {"results": len(kept.used), "oldest": min(kept.used)}
    if speed:
        result["speed"] = {"model": generation_speed(subject, tokenizer).as_dict()}
        if base is not None:
            result["speed"]["base"] = generation_speed(base, tokenizer).as_dict()
    return result


def check_protocol(options: EvaluationOptions, subject: Any, base: Any) -> None:
    """ValueError if `options` say how to feed a compressed cache and no model has one."""
    if options.prompt and all(model is None or cache_maker(model) is None for model in (subject, base)):
        raise ValueError(
            f"cache_protocol {options.cache_protocol} is a way to read a compressed cache, and no model here has one; "
            "leave it out"
        )


def measure_text(
    subject: Any, base: Any, windows: torch.Tensor, options: EvaluationOptions, progress: Progress
) -> dict[str, Any]:
    """``{"perplexity": …}`` of one model, ``{"comparison": …}`` when there is a base, ``{"attention": …}`` how the
    attention of a patched model ran: windows count as long enough, however short they are; and ``{"kv_cache": …}`` how
    its compressed cache was read (`cache_evaluation.py`). options: stride and cache_protocol count. ValueError if the
    latter cannot be followed.
    """
    check_protocol(options, subject, base)
    check_fed(subject, base, prompt=bool(options.prompt))

    def report(done: int, total: int) -> None:
        progress("evaluate", done, total, "windows")

    vocabulary = subject.config.get_text_config().vocab_size
    size = windows_per_pass(input_device(subject), subject.dtype, windows.shape[1], vocabulary)
    length = windows.shape[1]
    prefill = length if cache_maker(subject) is None else options.prompt or min(length, CHUNK)
    how = {"stride": options.stride, "prompt": options.prompt, "batch_size": size, "progress": report}
    count_anew(subject)
    with at_least(subject, prefill), nullcontext() if base is None else at_least(base, length):
        if base is None:
            found = perplexity(subject, windows, **how).as_dict()
            result: dict[str, Any] = {"perplexity": found}
        else:
            compared = compare(subject, base, windows, **how).as_dict()
            result = {"perplexity": compared["model"], "comparison": compared}
    if (used := attention_in_use(subject)) is not None:
        result["attention"] = {**used, "window": length}
    if (cache := cache_in_use(subject, prompt=options.prompt)) is not None:
        result["kv_cache"] = cache
    return result


def _measure_task(
    name: str,
    file: Path,
    subject: Any,
    base: Any,
    tokenizer: Any,
    how: dict[str, Any],
    recall: Recall,
    progress: Progress,
) -> dict[str, Any]:
    measure, kind = TASKS[name]

    def report(done: int, total: int) -> None:
        progress(name, done, total, file.name)

    count_anew(subject)
    result = measure(subject, tokenizer, file, **how, progress=report)
    content: dict[str, Any] = {"file": file.name, "model": result.as_dict()}
    content |= _task_use(subject, None if how["dense_prompt"] else 0)
    if base is not None:
        question = {"task": name, "rows": sha256(file), **how}
        found = recall(question, lambda: measure(base, tokenizer, file, **how, progress=report).as_dict())
        content["base"] = found
        other = kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in found.items()})
        key = "correct_norm" if name == "choices" else "correct"
        content["flips"] = flips(getattr(other, key), getattr(result, key)).as_dict()
    return content


def _task_use(subject: Any, prompt: int | None) -> dict[str, Any]:
    """How attention and cache of a model ran in a task. Prompts are no longer than they are in use."""
    used: dict[str, Any] = {}
    if (attention := attention_in_use(subject)) is not None:
        used["attention"] = {**attention, "window": attention["min_tokens"]}
    if (cache := cache_in_use(subject, prompt=prompt)) is not None:
        used["kv_cache"] = cache
    return used


def _measure_harness(
    tasks: Harness, subject: Any, base: Any, tokenizer: Any, recall: Recall, progress: Progress
) -> dict[str, Any]:
    def report(done: int, total: int) -> None:
        progress("harness", done, total, "")

    count_anew(subject)
    found = tasks.measure(subject, base, tokenizer, remember=recall, progress=report)
    return {**found, **_task_use(subject, 0)}


@dataclass(frozen=True)
class Asked:
    """Retrieval and generation of one evaluation, made from texts before models are loaded, so that a bad text fails
    early.
    """

    retrieval: RetrievalOptions | None
    cases: dict[str, list[Case]]
    generation: GenerationOptions | None
    prompts: torch.Tensor | None
    sources: dict[str, str]

    @classmethod
    def read(cls, tokenizer: Any, retrieval: RetrievalOptions | None, generation: GenerationOptions | None) -> Asked:
        """Cases and prompts. ValueError for a text that cannot be read or is too short."""
        cases, prompts, sources = {}, None, {}
        if retrieval is not None:
            text, sources["retrieval"] = read_text(retrieval.text)
            cases = retrieval_cases(tokenizer, text, retrieval)
        if generation is not None:
            text, sources["generation"] = read_text(generation.text)
            prompts = generation_prompts(tokenizer, text, generation)
        return cls(retrieval, cases, generation, prompts, sources)

    def check(self, *models: Any) -> None:
        """ValueError if something does not fit into the positions of a model."""
        for model in models:
            if model is not None and self.cases:
                check_lengths(model, [case for cases in self.cases.values() for case in cases])
            if model is not None and self.generation is not None and self.prompts is not None:
                check_prompts(model, self.prompts, self.generation.new_tokens)

    def measure(
        self,
        subject: Any,
        base: Any,
        tokenizer: Any,
        progress: Progress,
        recall: Recall = lambda question, find: find(),
    ) -> dict[str, Any]:
        """``{"retrieval": …, "generation": …}``, as far as they are asked for."""
        result: dict[str, Any] = {}
        if self.retrieval is not None:
            sides = {"model": subject, "base": base}
            result["retrieval"] = described = describe_retrieval(self.retrieval, self.sources["retrieval"], sides)
            described["results"] = {
                test: measure_test(
                    subject,
                    base,
                    cases,
                    query_aware=self.retrieval.query_aware,
                    recall=recall,
                    progress=lambda done, total, test=test: progress(test, done, total, ""),
                )
                for test, cases in self.cases.items()
            }
        if self.generation is not None and self.prompts is not None:
            found = generation_agreement(
                subject,
                base,
                self.prompts,
                new_tokens=self.generation.new_tokens,
                end=end_tokens(base, tokenizer),
                progress=lambda done, total: progress("generation", done, total, ""),
            )
            used = in_use(subject, self.prompts.shape[1])
            result["generation"] = {"source": self.sources["generation"], **found.as_dict(), **used}
        return result


def save_json(content: dict[str, Any], file: Path) -> None:
    """Writes a result; numbers must be finite."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
