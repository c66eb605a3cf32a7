"""Runs the kernel cases of one test file under Triton's interpreter: ``python interpreter_cases.py test_x.py``.

TRITON_INTERPRET must be set before triton is imported, hence a process of its own; all cases of a file share it, so
that start-up is paid once. The test file declares

- ``KERNEL``: the module that holds the kernel; ``PARTS``, if there are any: modules that it is made of;
- ``INTERPRETER_CASES``: name → function that raises AssertionError when the kernel is wrong;
- ``MUTATIONS``: name → (text, replacement, case): the case is run on a copy of the kernel broken by that
  replacement, and must raise.

Prints one JSON object: name → "" for a pass, else what went wrong. The test file asks `interpreter_results` for it.
"""

import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
import types
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import pytest
from quick_interpreter import quicken_interpreter

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@functools.cache
def interpreter_results(test_file: str) -> dict[str, str]:
    """All cases and mutations of a test file, in one process: name → "" or what went wrong."""
    # One thread: the tiles are far too small to share out.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, test_file], env=environment, capture_output=True, text=True)
    # Kept as well, so that it is paid once: every test then fails with what the process said.
    # A process that reads where it must not ends without a word.
    said = done.stderr or f"the process ended with {done.returncode}"
    return json.loads(done.stdout) if done.returncode == 0 else defaultdict(lambda: said)


def alias_package() -> None:
    """Make ``kompakt`` importable from the checkout when it is not installed."""
    if importlib.util.find_spec("kompakt") is None:
        package = types.ModuleType("kompakt")
        package.__path__ = [str(Path(__file__).parents[1])]
        sys.modules["kompakt"] = package


def load_file(path: Path, name: str) -> types.ModuleType:
    """Import ``path`` as module ``name``."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run_case(case: Callable[[], None]) -> str:
    """Empty string for a pass, the traceback otherwise."""
    try:
        case()
    except Exception:
        return traceback.format_exc()
    return ""


def source_file(module: str) -> Path:
    found = importlib.import_module(module).__file__
    assert found is not None
    return Path(found)


def run_mutation(
    kernel: str, parts: Sequence[str], text: str, replacement: str, case: Callable[[], None], folder: Path
) -> str:
    """Empty string if ``case`` catches a broken copy of ``kernel``, or of the first of its ``parts`` with the text."""
    module = next((name for name in (kernel, *parts) if text in source_file(name).read_text()), None)
    if module is None:
        return f"{kernel} no longer contains {text!r}"
    number = len(list(folder.iterdir()))
    broken_file = folder / f"broken_{number}.py"
    broken_file.write_text(source_file(module).read_text().replace(text, replacement))
    with mock.patch.dict(sys.modules):
        broken = load_file(broken_file, f"kompakt.kernels.{broken_file.stem}")
        sys.modules[module] = broken
        # What imports the broken part is loaded anew; parts are named after those that they import.
        for name in (*parts, kernel) if module != kernel else ():
            if name != module:
                sys.modules[name] = load_file(source_file(name), f"kompakt.kernels.fresh_{number}_{name[16:]}")
        try:
            case()
        except AssertionError:
            return ""
        except Exception:
            return f"failed for another reason than its result:\n{traceback.format_exc()}"
    return "the broken kernel passed"


def main(test_file: str) -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    alias_package()
    quicken_interpreter()
    module = load_file(Path(test_file), "interpreted_test_file")
    results = {name: run_case(case) for name, case in module.INTERPRETER_CASES.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name, (text, replacement, case_name) in module.MUTATIONS.items():
            case = module.INTERPRETER_CASES[case_name]
            parts = getattr(module, "PARTS", ())
            results[name] = run_mutation(module.KERNEL, parts, text, replacement, case, Path(folder))
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
