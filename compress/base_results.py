"""What a base model answered in an earlier evaluation, kept for evaluations of other recipes of the same base.

One JSON file for each question, named by the SHA-256 of the question and of all that the answer depends on: content of
the model's files, kompakt's own sources, versions of the libraries that compute, device, threads and precision
settings. Both stand in the file again and are compared when it is read. Nothing expires; files may be deleted at any
time. The folder is `$KOMPAKT_CACHE`, else `kompakt` in `$XDG_CACHE_HOME` or `~/.cache`.

Answers are items of tasks and of retrieval. Perplexity is not kept: KL and agreement beside it need every logit of the
base.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .artifact import sha256
from .cpu_arithmetic import slow_dtypes
from .hf import COMPANIONS

log = logging.getLogger(__name__)
VERSION = 1
LIBRARIES = ("torch", "transformers", "tokenizers", "accelerate", "triton", "numpy", "lm-eval")
SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
UNREAD = ("evaluation*.json", "report*.json")
"""Files beside a model that say how it was measured, not what it is."""


class BaseResults:
    """Answers of one base model. used: when those were measured that came from the folder, a date each.

    facts: all that an answer depends on besides its question, JSON-able.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]):
        self.folder, self.facts = folder, dict(facts)
        self.used: list[str] = []

    def recall(self, question: Mapping[str, Any], find: Callable[[], Any]) -> Any:
        """The answer to a question: a kept one, or what `find` returns, which is kept. Both are JSON-able.

        A file that is damaged or cannot be written is reported once in the log; the answer is found anew.
        """
        about = {"version": VERSION, "facts": self.facts, "question": dict(question)}
        file = self.folder / f"{content_digest(about)}.json"
        if file.is_file():
            try:
                content = json.loads(file.read_text("utf-8"))
                if {key: content[key] for key in about} == about:
                    answer, date = content["answer"], str(content["date"])
                    self.used.append(date)
                    return answer
                raise ValueError("it holds the answer to another question")
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("a kept result of the base model, %s, is not used: %s", file, error)
        answer = json.loads(json.dumps(find(), allow_nan=False))
        self._keep(file, {**about, "date": datetime.now(UTC).strftime("%Y-%m-%d"), "answer": answer})
        return answer

    def _keep(self, file: Path, content: dict[str, Any]) -> None:
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(content, allow_nan=False), "utf-8")
            partial.replace(file)
        except OSError as error:
            log.warning("results of the base model cannot be kept in %s: %s", self.folder, error.strerror)


def content_digest(content: Any) -> str:
    """SHA-256 of something JSON-able."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def results_folder() -> Path:
    """Where results are kept."""
    if chosen := os.environ.get("KOMPAKT_CACHE"):
        return Path(chosen) / "base-results"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "kompakt" / "base-results"


def base_facts(path: Path, model: Any, tokenizer_path: Path, tokenizer: Any, placement: Any) -> dict[str, Any]:
    """What every answer of a model depends on. path: its directory. tokenizer_path: where the tokenizer that texts go
    through comes from, the other model's. placement: the `device_map` it was loaded with.
    """
    return {
        "files": model_digests(path),
        "tokenizer": [type(tokenizer).__name__, tokenizer_digests(tokenizer_path)],
        "kompakt": sources_digest(),
        "libraries": {name: installed(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "devices": sorted({device_facts(parameter.device) for parameter in model.parameters()}),
        "placement": repr(placement),
        "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "attention": repr(getattr(model.config, "_attn_implementation", None)),
        "multiplied_in_float32": slow_dtypes(),
        "threads": torch.get_num_threads(),
        "precision": [
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        ],
        "default_dtype": str(torch.get_default_dtype()),
    }


def model_digests(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a model that it is loaded or tokenized from."""
    files = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES and file.is_file()]
    return {file.name: sha256(file) for file in files if not any(file.match(pattern) for pattern in UNREAD)}


def tokenizer_digests(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a tokenizer."""
    files = {file for pattern in COMPANIONS for file in path.glob(pattern) if file.is_file()}
    return {file.name: sha256(file) for file in sorted(files)}


def sources_digest() -> str:
    """SHA-256 of kompakt's own Python files."""
    root, found = Path(__file__).resolve().parents[1], hashlib.sha256()
    for folder in ("compress", "kernels", "quant", "sparsify"):
        for file in sorted((root / folder).glob("*.py")):
            found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def installed(name: str) -> str:
    """Version of a package, or "none"."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def device_facts(device: torch.device) -> str:
    """What a device computes with."""
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"{torch.cuda.get_device_name(device)} {capability}"
    return f"{device.type} {processor()} {torch.backends.cpu.get_cpu_capability()}"


def processor() -> str:
    """Name of the CPU, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
