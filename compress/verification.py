"""`verify`: whether a directory is what `compress` wrote, and whether what it holds can be right.

Nothing is trusted: headers, names and sizes are checked before anything is allocated (`untrusted.py`, `hf_stored.py`),
no code of the directory is run, and one tensor at a time is read. Checks that need an earlier one to have passed are
skipped, and said to be. A passed `checksums` says that files are as they were written, not that they came from whom
one thinks: checksums stand in the same directory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..quant.method import AttentionPolicy, CachePolicy
from .artifact import SIDECAR, SIDECAR_TENSORS, read_cache, read_policies, read_sidecar, sha256
from .assess import default_device_map
from .cpu_arithmetic import float32_linears
from .fingerprint import check_fingerprint, compare_fingerprint
from .hf import PICKLES, load_written, meta_model, read_written_config
from .hf_cache import layer_kinds
from .hf_cache_hooks import running
from .hf_quantizer import KompaktConfig
from .hf_stored import check_cache, check_statics, check_stored
from .layer_policies import arithmetic_of, sparsity_of
from .recipe import Recipe, read_yaml
from .untrusted import StoredTensor, file_inside, header, weight_files
from .verification_kernels import KernelCheck, kernel_checks, nothing_to_compare
from .verification_tensors import line_problems, tensor_problem, unknown_tensors

Progress = Callable[[str, int, int, str], None]
Status = Literal["passed", "failed", "skipped"]
CHECKS = {
    "sidecar": "kompakt.json: version, every field of the right kind",
    "files": "plain files inside the directory, no pickles, no code",
    "checksums": "SHA-256 of every file",
    "recipe": "recipe.yaml says what the sidecar says",
    "shapes": "tensors in the files have the shapes that config.json needs",
    "coverage": "every module of the coverage table is stored as it says",
    "numbers": "no NaN or infinite number, no zero scale, codes that are not all alike",
    "policies": "attention and cache policies, their modules and tensors",
    "logits": "the model is loaded, and its logits are those of the compression",
}
"""What is checked, in this order; and on request, last, `check_kernels`."""


@dataclass(frozen=True)
class Check:
    """One check. detail: what was found; problems: one sentence each if it failed."""

    name: str
    status: Status
    detail: str
    problems: tuple[str, ...] = ()


@dataclass
class Verification:
    """What `verify` found. `passed` if nothing failed. kernels: every comparison, where they were asked for."""

    directory: str
    checks: list[Check] = field(default_factory=list)
    kernels: list[KernelCheck] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.status != "failed" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        found = {"directory": self.directory, "passed": self.passed, "checks": [asdict(check) for check in self.checks]}
        return {**found, "kernels": [asdict(check) for check in self.kernels]} if self.kernels else found


class Problems(Exception):
    """What a check found wrong, one sentence each."""

    def __init__(self, problems: list[str]):
        super().__init__(problems[0])
        self.problems = problems


@dataclass
class Subject:
    """What earlier checks have read, for later ones."""

    path: Path
    trust_remote_code: bool
    device_map: Any
    progress: Progress
    sidecar: dict[str, Any] = field(default_factory=dict)
    recipe: Any = None
    config: Any = None
    packed: KompaktConfig | None = None
    stored: dict[str, StoredTensor] = field(default_factory=dict)
    policies: dict[str, AttentionPolicy] = field(default_factory=dict)
    cache: CachePolicy | None = None
    kernels: list[KernelCheck] = field(default_factory=list)


def verify(
    directory: str | Path,
    *,
    logits: bool = True,
    kernels: bool = False,
    device_map: Any = None,
    trust_remote_code: bool = False,
    progress: Progress = lambda stage, done, total, text: None,
) -> Verification:
    """Checks a directory that `compress` wrote, without trusting it; see `CHECKS`.

    logits: load the model and compare its logits with those recorded at compression. device_map: where, default one
    CUDA device if there is one. kernels: compare what its modules run on that device with the references, on random
    input (`verification_kernels.py`).
    trust_remote_code: let code in the directory be run, which is otherwise a failure. Raises ValueError only if there
    is no such directory or kompakt did not write it; whatever else is wrong is a failed check.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory")
    if not (path / SIDECAR).exists():
        raise ValueError(f"{path} holds no {SIDECAR}; it was not written by kompakt")
    subject, found = Subject(path, trust_remote_code, device_map, progress), Verification(str(directory))
    found.kernels = subject.kernels
    wanted = [*(name for name in CHECKS if logits or name != "logits"), *(["kernels"] if kernels else [])]
    for index, name in enumerate(wanted):
        progress("verify", index, len(wanted), name)
        status = {check.name: check.status for check in found.checks}
        missing = [need for need in NEEDS.get(name, ()) if status[need] == "failed" or status[need] == "skipped"]
        found.checks.append(
            Check(name, "skipped", f"needs {' and '.join(missing)}") if missing else _run(name, subject)
        )
    return found


def _run(name: str, subject: Subject) -> Check:
    try:
        if name == "kernels" and (why := nothing_to_compare(kernel_device(subject.device_map))) is not None:
            return Check(name, "skipped", why)
        return Check(name, "passed", FUNCTIONS[name](subject))
    except Problems as error:
        more = f", and {len(error.problems) - 1} more" if len(error.problems) > 1 else ""
        return Check(name, "failed", f"{error.problems[0]}{more}", tuple(error.problems))
    except (ValueError, OSError) as error:
        sentence = " ".join(str(error).split())
        return Check(name, "failed", sentence, (sentence,))


def _refuse(problems: list[str]) -> None:
    if problems:
        raise Problems(problems)


def check_sidecar_file(subject: Subject) -> str:
    """Reads the sidecar, its checksums left for later."""
    subject.sidecar = read_sidecar(subject.path, verify=False)
    written = subject.sidecar.get("kompakt") or "unknown"
    return f"version {subject.sidecar['version']}, written by kompakt {written}"


def check_files(subject: Subject) -> str:
    """Weight files as transformers finds them, and nothing that is or contains code."""
    problems = []
    files = {file.name for file in weight_files(subject.path)} | {SIDECAR_TENSORS}
    for item in sorted(subject.path.iterdir()):
        if any(item.match(pattern) for pattern in PICKLES):
            problems.append(f"{item.name} is a pickle, which can run code")
        elif item.suffix == ".py" and not subject.trust_remote_code:
            problems.append(f"{item.name} is code, and --trust-remote-code was not given")
        elif item.name == "adapter_config.json":
            problems.append(f"{item.name} would have the weights of another model loaded")
        elif item.suffix == ".safetensors" and item.name not in files:
            problems.append(f"{item.name} belongs to no part of the checkpoint")
    _refuse(problems)
    size = sum((subject.path / name).stat().st_size for name in files)
    return f"{len(files)} safetensors files, {size:,} bytes"


def check_checksums(subject: Subject) -> str:
    """All that were recorded. Files beside the weights have some in directories written by newer versions only."""
    problems, companions = [], subject.sidecar.get("companions", {})
    for name, expected in {**subject.sidecar["checksums"], **companions}.items():
        if sha256(file_inside(subject.path, name, where=SIDECAR)) != expected:
            problems.append(f"{name} was changed after it was written")
    _refuse(problems)
    beside = f"{len(companions)} beside them" if companions else "none was recorded of the files beside them"
    return f"{len(subject.sidecar['checksums'])} files of tensors, {beside}"


def check_recipe(subject: Subject) -> str:
    """The recipe in the sidecar, and the one in `recipe.yaml`, which must be equal."""
    subject.recipe = Recipe.load(subject.sidecar["recipe"])
    file = file_inside(subject.path, "recipe.yaml", where="the directory")
    if Recipe.load(read_yaml(file)) != subject.recipe:
        raise ValueError(f"recipe.yaml is not the recipe in {SIDECAR}")
    return f"{subject.recipe.name}"


def check_shapes(subject: Subject) -> str:
    """Headers against config.json, and config.json against the recipe."""
    subject.config = read_written_config(subject.path, trust_remote_code=subject.trust_remote_code)
    subject.stored = check_stored(
        subject.path, subject.config, lambda config: meta_model(config, trust_remote_code=subject.trust_remote_code)
    )
    stored = getattr(subject.config, "quantization_config", None)
    subject.packed = None if stored is None else KompaktConfig.from_compressed_tensors(stored)
    weights = subject.recipe.weights
    if weights is None or subject.packed is None:
        have, want = ("floats" if item is None else "packed" for item in (subject.packed, weights))
        if have != want:
            raise ValueError(f"config.json stores weights as {have}, the recipe as {want}")
        return f"{len(subject.stored)} tensors"
    for name in dict.fromkeys(item.rpartition(".")[0] for item in subject.stored if item.endswith(".weight_scale")):
        have, want = subject.packed.scheme_of(name), weights.scheme_of(name)
        if have != want:
            raise ValueError(f"config.json stores {name} as {have.describe()}, the recipe as {want.describe()}")
    return f"{len(subject.stored)} tensors"


def check_coverage(subject: Subject) -> str:
    """Every line of the coverage table against the headers."""
    lines = subject.sidecar.get("coverage", [])
    if not lines:
        raise ValueError(f"{SIDECAR} has no coverage table")
    problems = [problem for line in lines for problem in line_problems(line, subject.stored, subject.packed)]
    unknown, renamed = unknown_tensors(lines, subject.stored)
    problems += [f"{name[:120]} is stored and belongs to no module of the coverage table" for name in unknown]
    _refuse(problems)
    quantized = sum(line["status"] == "quantized" for line in lines)
    under = f", {renamed} of them stored under another name" if renamed else ""
    return f"{quantized} modules quantized, {len(lines) - quantized} kept{under}"


def check_numbers(subject: Subject) -> str:
    """Every tensor, one at a time."""
    extra = header(file_inside(subject.path, SIDECAR_TENSORS, where="the directory"))
    tensors = [*subject.stored.items(), *extra.items()]
    shapes = {line["name"]: line["shape"] for line in subject.sidecar["coverage"] if line["status"] == "quantized"}
    problems = []
    for index, (name, tensor) in enumerate(tensors):
        subject.progress("numbers", index, len(tensors), tensor.name)
        module, _, key = name.rpartition(".")
        found = tensor_problem(tensor.read(), key, shapes.get(module))
        if found:
            problems.append(f"{tensor.name} {found}")
    _refuse(problems)
    return f"{len(tensors)} tensors"


def check_policies(subject: Subject) -> str:
    """What attention and cache run by."""
    subject.policies = read_policies(subject.sidecar)
    subject.cache = read_cache(subject.sidecar, subject.path)
    arithmetic, sparsity = arithmetic_of(subject.policies), sparsity_of(subject.policies)
    for slot, found in (("attention", arithmetic), ("sparsity", sparsity), ("kv_cache", subject.cache)):
        if (getattr(subject.recipe, slot) is not None) != (found is not None and found != {}):
            raise ValueError(f"the recipe and {SIDECAR} disagree about whether {slot} is compressed")
    parts = [f"{len(arithmetic)} attention layers"] if arithmetic else []
    if sparsity:
        sparse = sum(policy.sparse for policy in sparsity.values())
        parts.append(f"{sparse} of {len(sparsity)} layers with sparse prefill")
    if subject.cache is not None:
        parts.append(f"{len(subject.cache.layers)} layers of the cache")
    return ", ".join(parts) or "none"


@float32_linears()
def check_logits(subject: Subject) -> str:
    """Loads the model and runs it."""
    recorded = subject.sidecar.get("fingerprint")
    place = default_device_map() if subject.device_map is None else subject.device_map
    model: Any = load_written(subject.path, device_map=place, trust_remote_code=subject.trust_remote_code)
    if subject.cache is not None:
        check_statics(model, subject.cache.layers)
    with running(model, subject.policies, subject.cache):  # refuses modules that the model does not have
        check_cache(model)
    if recorded is None:
        return "loaded; none were recorded at compression, so none were compared"
    check_fingerprint(recorded, model.config.get_text_config().vocab_size)
    results = compare_fingerprint(model, recorded, subject.policies, subject.cache)
    written = subject.sidecar.get("environment") or {}
    where = f"taken on {written.get('device', 'an unknown device')} with torch {written.get('torch', 'unknown')}"
    _refuse([f"{what}: {words}; {where}" for what, agrees, words in results if not agrees])
    return f"{'; '.join(f'{what}: {words}' for what, _, words in results)}; {where}"


def kernel_device(device_map: Any) -> torch.device:
    """Where kernels would run: the device that is named, or a CUDA device if there is one."""
    if isinstance(device_map, str) and device_map.partition(":")[0] in ("cpu", "cuda"):
        return torch.device(device_map)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_kernels(subject: Subject) -> str:
    """Every op, shape and option of the directory's modules once."""
    schemes: dict[Any, str] = {}
    for line in subject.sidecar["coverage"]:
        if line["status"] == "quantized" and subject.packed is not None:
            schemes.setdefault((subject.packed.scheme_of(line["name"]), tuple(line["shape"])), line["name"])
    windows = any(kind == "sliding_attention" for kind in layer_kinds(subject.config.get_text_config()))
    device = kernel_device(subject.device_map)
    for check in kernel_checks(subject.config, schemes, subject.policies, subject.cache, windows, device):
        subject.kernels.append(check)
        subject.progress("kernels", len(subject.kernels), 0, f"{check.op}, {check.case}")
    _refuse([check.problem for check in subject.kernels if check.status == "differs"])
    counts = Counter(check.status for check in subject.kernels)
    alone = f", {counts['reference']} run through their references" if counts["reference"] else ""
    return f"{counts['equal']} results are those of the references{alone}"


FUNCTIONS: dict[str, Callable[[Subject], str]] = {
    "sidecar": check_sidecar_file,
    "files": check_files,
    "checksums": check_checksums,
    "recipe": check_recipe,
    "shapes": check_shapes,
    "coverage": check_coverage,
    "numbers": check_numbers,
    "policies": check_policies,
    "logits": check_logits,
    "kernels": check_kernels,
}
NEEDS = {
    "checksums": ("sidecar",),
    "recipe": ("sidecar",),
    "shapes": ("recipe",),
    "coverage": ("shapes",),
    "numbers": ("shapes",),
    "policies": ("recipe",),
    "logits": ("files", "shapes", "policies"),
    "kernels": ("shapes", "coverage", "policies"),
}
"""Checks that must have passed before another can be made."""
