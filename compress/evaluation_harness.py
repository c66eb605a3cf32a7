"""Tasks of lm-evaluation-harness (package `lm-eval`, extra `eval`), run in process on a model and on its base.

The harness makes prompts, tokenizes, filters and judges; the models are ours. Log-probabilities are taken in float32,
where the harness by default takes them in the model's dtype, whose rounding makes near choices equal. A model with a
compressed cache scores continuations some tokens at a time (`cache_evaluation.py`): one pass over a whole text, the
harness's way, would not read a code. Text that a task generates runs as `generate()` does.

With y the base's items of a metric and x the model's, the difference is mean(x − y) and recovery Σx / Σy, both with the
standard error of the paired items. That is given for metrics that are the mean of their items, which is checked; of
others (f1, perplexity) both values stand alone.

Tasks: names of the harness's registry, whose data sets must be here or downloadable; a .yaml file of one task, which
may name Python code that is then run; or a .jsonl file with the rows of `evaluation_tasks.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base_results import content_digest
from .evaluation import input_device, ratio_mean, scoring_mode
from .evaluation_tasks import Continuation, choice_rows, last_word_rows, read_rows, score_continuations
from .hf_cache_hooks import cache_maker
from .recipe import nearest

Progress = Callable[[int, int], None]
Remember = Callable[[dict[str, Any], Callable[[], Any]], Any]
"""(what is asked, how to find out) → the answer, JSON-able, perhaps from an earlier time."""
BATCH_SIZE = 8
FEWSHOT_SEED = 1234
"""The harness's own default."""
RETURNED = ("results", "samples", "versions", "n-shot", "higher_is_better", "n-samples")
REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """tasks: names, .yaml files or .jsonl files. num_fewshot: examples in front of a question, None for what each task
    says. limit: first items of each task, None for all. Raises ValueError for what cannot be.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.tasks or not all(self.tasks):
            raise ValueError("tasks names no task; give names that lm-eval knows, .yaml files or .jsonl files")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks names one twice: {', '.join(self.tasks)}")
        for name, value, least in (("num_fewshot", self.num_fewshot, 0), ("limit", self.limit, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")


class Harness:
    """Tasks that are loaded, before any model is: what is misspelt or not here fails early."""

    def __init__(self, options: HarnessOptions):
        """ValueError if lm-eval is not installed, or a task cannot be loaded."""
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError("tasks are run by lm-eval, which is not installed: pip install 'kompakt[eval]'")
        self.options = options
        self.manager, self.tasks = load_tasks(options.tasks)

    def measure(
        self,
        subject: Any,
        base: Any,
        tokenizer: Any,
        *,
        remember: Remember = lambda what, find: find(),
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Every metric of every task, of a model and of its base where that is not None, JSON-able.

        remember: may know the base's answers to the requests of a task from an earlier evaluation.
        """
        found = {"model": self._run(subject, tokenizer, None)}
        if progress:
            progress(1, 1 if base is None else 2)
        if base is not None:
            found["base"] = self._run(base, tokenizer, remember)
            if progress:
                progress(2, 2)
        return {
            "harness": f"lm-eval {importlib.import_module('lm_eval').__version__}",
            "limit": self.options.limit,
            "results": compared_tasks(found["model"], found.get("base")),
        }

    def _run(self, model: Any, tokenizer: Any, remember: Remember | None) -> dict[str, Any]:
        evaluator = importlib.import_module("lm_eval.evaluator")
        for task in self.tasks:
            # A task that says 0 has no examples to show, and is not given any by the harness either.
            if task.get_config("num_fewshot") != 0 and self.options.num_fewshot is not None:
                task.set_config(key="num_fewshot", value=self.options.num_fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        found: dict[str, Any] = {key: {} for key in RETURNED}
        with scoring_mode(model):
            lm = language_model(model, tokenizer, remember)
            # One by one: what stands in a batch with an item, and what is remembered, is of one task.
            for task in self.tasks:
                result = evaluator.evaluate(
                    lm=lm,
                    task_dict=self.manager.load([task]),
                    limit=self.options.limit,
                    bootstrap_iters=0,
                    log_samples=True,
                )
                for key in RETURNED:
                    found[key] |= result[key]
        return found


def load_tasks(names: tuple[str, ...]) -> tuple[Any, list[Any]]:
    """The harness's task manager and its task objects; a group stands for its tasks. ValueError naming the one that
    fails.
    """
    manager = importlib.import_module("lm_eval.tasks").TaskManager(
        include_defaults=any(not _is_file(name) for name in names)
    )
    tasks: dict[str, Any] = {}
    for name in names:
        if not _is_file(name) and name not in manager.all_tasks:
            close = nearest(name, manager.all_tasks).partition(" (known:")[0]
            raise ValueError(f"lm-eval has no task {name!r}, nor is it a .yaml or .jsonl file{close}")
        if _is_file(name) and not Path(name).is_file():
            raise ValueError(f"{name!r} is not a file")
        try:
            loaded = manager.load([rows_task(Path(name)) if name.endswith(".jsonl") else name])
        except Exception as error:  # tasks are files of others, and data sets whatever a network makes of them
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"lm-eval cannot load the task {name!r}: {reason}") from error
        if twice := set(tasks) & set(loaded["tasks"]):
            raise ValueError(f"the task {min(twice)!r} is asked for twice, the second time by {name!r}")
        tasks |= loaded["tasks"]
    return manager, list(tasks.values())


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml", ".jsonl"))


def rows_task(file: Path) -> dict[str, Any]:
    """The harness's description of a task whose rows are those of `multiple_choice` or `last_word`. ValueError for rows
    that are neither.
    """
    rows = list(read_rows(file, None))
    if "choices" in rows[0][1]:
        found = [{"query": query, "choices": choices, "gold": gold} for query, choices, gold in choice_rows(rows)]
        kind = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
        metrics = (("acc", "mean"), ("acc_norm", "mean"))
    else:
        # Of this kind of task, the harness puts no space between context and target.
        found = [{"query": context, "word": f" {word}"} for context, word in last_word_rows(rows)]
        kind = {"output_type": "loglikelihood", "doc_to_target": "word"}
        metrics = (("acc", "mean"), ("perplexity", "perplexity"))

    def dataset(**_: Any) -> dict[str, Any]:
        rows = importlib.import_module("pyarrow").Table.from_pylist(found)
        # A mark of its own: the one that `datasets` would make pickles the table.
        return {"test": importlib.import_module("datasets").Dataset(rows, fingerprint=content_digest(found)[:16])}

    return {
        "task": file.stem,
        "custom_dataset": dataset,
        "test_split": "test",
        "doc_to_text": "query",
        **kind,
        "metric_list": [
            {"metric": name, "aggregation": how, "higher_is_better": name != "perplexity"} for name, how in metrics
        ],
        "metadata": {"version": 1.0},
    }


def language_model(model: Any, tokenizer: Any, remember: Remember | None = None) -> Any:
    """`model` as the harness calls it. remember: asked for the answers to each list of requests."""
    base: Any = importlib.import_module("lm_eval.models.huggingface").HFLM

    class Model(base):
        """`HFLM`, reading a compressed cache where there is one."""

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
            if cache_maker(model) is None:
                return super()._loglikelihood_tokens(requests, **options)
            pairs = [Continuation(context, target) for _, context, target in requests]
            scores = score_continuations(model, tokenizer, pairs, batch_size=BATCH_SIZE, max_length=self.max_length)
            return [(score.log_likelihood, score.greedy) for score in scores]

    def remembered(name: str) -> Callable:
        original = getattr(base, name)

        def answer(self: Any, requests: Any, disable_tqdm: bool = False) -> Any:
            def find() -> Any:
                return original(self, requests, disable_tqdm=True)

            asked = [list(request.args) for request in requests]
            options = [item for args in asked for item in args if isinstance(item, dict)]
            # A temperature alone samples too, where the model's own generation config says so.
            sampled = any(item.get("do_sample", bool(item.get("temperature"))) for item in options)
            if remember is None or sampled:
                return find()
            return remember({"lm-eval": name, "requests": content_digest(asked)}, find)

        return answer

    for name in REQUESTS:
        setattr(Model, name, remembered(name))
    return Model(
        pretrained=model,
        tokenizer=tokenizer,
        softmax_dtype="float32",
        batch_size=BATCH_SIZE,
        device=str(input_device(model)),
    )


def compared_tasks(model: dict[str, Any], base: dict[str, Any] | None) -> list[dict[str, Any]]:
    """One row per task and metric from what the harness returned: task, version, num_fewshot, metric, filter,
    higher_is_better, items; model and base as [value, standard error]; difference and recovery where items are paired.
    """
    rows = []
    for task, results in model["results"].items():
        for key, value in results.items():
            metric, comma, way = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            items = item_values(model, task, metric, way, value)
            row = {
                "task": task,
                "version": model["versions"].get(task),
                "num_fewshot": model["n-shot"].get(task),
                "metric": metric,
                "filter": way,
                "higher_is_better": model["higher_is_better"].get(task, {}).get(metric),
                "items": model["n-samples"][task]["effective"],
                "model": side(value, items),
            }
            if base is not None:
                other = base["results"][task][key]
                others = item_values(base, task, metric, way, other)
                row["base"] = side(other, others)
                row |= paired(items, others)
            _check_finite(row)
            rows.append(row)
    return rows


def item_values(result: dict[str, Any], task: str, metric: str, way: str, value: float) -> list[float] | None:
    """The metric of every item, in order, if its value is their mean; None if it is something else."""
    samples = [sample for sample in result["samples"][task] if sample.get("filter", way) == way]
    found = [sample.get(metric) for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    if not found or not all(isinstance(item, int | float) for item in found):
        return None
    items = [float(item) for item in found if item is not None]
    return items if math.isclose(math.fsum(items) / len(items), value, rel_tol=1e-9, abs_tol=1e-12) else None


def side(value: float, items: list[float] | None) -> list[float | None]:
    """[value, standard error]."""
    return [float(value), None if items is None else ratio_mean(items, [1] * len(items))[1]]


def paired(items: list[float] | None, base: list[float] | None) -> dict[str, Any]:
    """Difference and recovery of paired items, each [value, standard error]; nothing where they are not known."""
    if items is None or base is None or len(items) != len(base):
        return {}
    found: dict[str, Any] = {"difference": list(ratio_mean([x - y for x, y in zip(items, base)], [1] * len(items)))}
    if math.fsum(base) > 0 and min(base) >= 0:
        found["recovery"] = list(ratio_mean(items, base))
    return found


def _check_finite(row: dict[str, Any]) -> None:
    for name in ("model", "base"):
        if name in row and not math.isfinite(row[name][0]):
            raise ValueError(f"{row['metric']} of the task {row['task']} is {row[name][0]}; it cannot be reported")
