"""The rooms of the house: who may import whom, what must not exist, and how long a file may be."""

from __future__ import annotations

import ast
import fnmatch
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 500
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "recipes": set(),
    "quant": {"kernels"},
    "sparsify": {"kernels"},
    "compress": {"quant", "sparsify", "kernels", "recipes"},
    "cli": {"compress", "kernels"},
}
KNOWS_TRANSFORMERS = "compress/hf*.py"


def repository_files() -> list[Path]:
    """Every Python file of the repository: the root's own, the rooms', the tests'."""
    folders = [ROOT / name for name in (*MAY_IMPORT, "tests")]
    return [*ROOT.glob("*.py"), *(file for folder in folders for file in sorted(folder.rglob("*.py")))]


def imported_names(tree: ast.AST) -> list[tuple[int, str]]:
    """(level, dotted name) of every import; `from a import b` counts as `a.b`, since b may be a module."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = [node.module] if node.module else []
            found += [(node.level, ".".join([*prefix, alias.name])) for alias in node.names]
    return found


def room_of(level: int, name: str) -> str | None:
    """The room an import made in a room's file reaches, None for anything else (same room, root, other packages)."""
    parts = name.split(".")
    if level == 2 and parts[0] in MAY_IMPORT:
        return parts[0]
    if level == 0 and parts[0] == "kompakt" and len(parts) > 1 and parts[1] in MAY_IMPORT:
        return parts[1]
    return None


def violations(path: str, source: str) -> list[str]:
    """What the file at `path` (POSIX, from the root), holding `source`, breaks; empty when in order."""
    broken = []
    parts = path.split("/")
    room = parts[0] if len(parts) > 1 else ""
    if path == "kernels/__init__.py":
        broken.append("kernels must have no __init__.py: a checkout in the working directory would shadow HF's kernels")
    if len(source.splitlines()) > MAX_LINES:
        broken.append(f"{len(source.splitlines())} lines, at most {MAX_LINES}")
    if len(parts) > 2:
        broken.append("packages are one level deep")
    if room == "tests":
        return broken
    imports = imported_names(ast.parse(source))
    if room not in MAY_IMPORT:
        return broken + [f"the root imports nothing, not {name}" for _, name in imports]
    for level, name in imports:
        top = name.split(".")[0]
        reached = room_of(level, name)
        if reached and reached != room and reached not in MAY_IMPORT[room]:
            broken.append(f"{room} must not import {reached} ({name})")
        if level > 2:
            broken.append(f"relative import leaves the package ({'.' * level}{name})")
        if level == 0 and top == "kompakt":
            broken.append(f"imports inside the package are relative ({name})")
        if level == 0 and top in MAY_IMPORT:
            broken.append(f"{top} is a room only as part of kompakt ({name})")
    submodules = transformers_submodules(source)
    if submodules and not fnmatch.fnmatch(path, KNOWS_TRANSFORMERS):
        broken.append(f"only {KNOWS_TRANSFORMERS} knows transformers' internals ({', '.join(submodules)})")
    return broken


def transformers_submodules(source: str) -> list[str]:
    """Modules below `transformers` that `source` imports; names from its top level do not count."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules = [node.module]
        found += [module for module in modules if module.startswith("transformers.")]
    return found


@pytest.mark.parametrize("file", repository_files(), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_file_keeps_the_rules(file: Path) -> None:
    assert violations(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) == []


def test_kernels_is_a_namespace_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_packages_are_the_rooms() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(packages) == {"kompakt"} | {f"kompakt.{room}" for room in MAY_IMPORT}


@pytest.mark.parametrize(
    ("path", "source", "says"),
    [
        ("quant/gptq.py", "from ..sparsify.patterns import Block", "quant must not import sparsify"),
        ("sparsify/kv_prune.py", "from .. import quant", "sparsify must not import quant"),
        ("kernels/w4a8.py", "from ..quant.grid import scales", "kernels must not import quant"),
        ("compress/pipeline.py", "def f():\n    from ..cli import main", "compress must not import cli"),
        ("cli/main.py", "from ..quant.gptq import GPTQ", "cli must not import quant"),
        ("quant/gptq.py", "import kompakt.compress.pipeline", "quant must not import compress"),
        ("quant/gptq.py", "from kompakt import sparsify", "quant must not import sparsify"),
        ("compress/plan.py", "from kompakt.quant import grid", "relative"),
        ("compress/plan.py", "from ...elsewhere import thing", "leaves the package"),
        ("compress/plan.py", "import kernels", "only as part of kompakt"),
        ("compress/cache.py", "from transformers.cache_utils import Cache", "internals (transformers.cache_utils)"),
        ("quant/awq.py", "import transformers.models.llama as llama", "internals"),
        ("quant/kv/int4.py", "", "one level deep"),
        ("kernels/__init__.py", "", "no __init__.py"),
        ("__init__.py", "from .compress import compress", "the root imports nothing"),
        ("tests/test_all.py", "\n" * (MAX_LINES + 1), "501 lines"),
    ],
)
def test_checker_bites(path: str, source: str, says: str) -> None:
    assert any(says in message for message in violations(path, source)), violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("quant/gptq.py", "import torch\nfrom ..kernels.w4a8 import w4a8_linear\nfrom .grid import scales"),
        ("compress/pipeline.py", "from ..quant import gptq\nfrom ..recipes import load\nfrom . import plan"),
        ("compress/hf_cache.py", "from transformers.cache_utils import Cache"),
        ("compress/demo.py", "from transformers import AutoModelForCausalLM"),
        ("cli/main.py", "from .. import __version__\nfrom ..compress import compress"),
        ("tests/test_all.py", "import kompakt.quant.gptq\nfrom transformers.cache_utils import Cache"),
        ("quant/grid.py", "\n" * MAX_LINES),
    ],
)
def test_checker_lets_good_sources_pass(path: str, source: str) -> None:
    assert violations(path, source) == []
