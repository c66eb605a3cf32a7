"""Compress a Hugging Face model, load it back, patch one in place, measure what it cost.

Names are loaded on first use, so that importing this package stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .assess import evaluate
    from .demo import build_demo_model
    from .evaluation_generation import GenerationOptions
    from .evaluation_harness import HarnessOptions
    from .hf_cache import CompressedCache
    from .patching import Patch, load, patch
    from .pipeline import CompressionResult, compress
    from .planning import Plan, plan
    from .recipe import Recipe
    from .reporting import report
    from .restore import LimitExceeded
    from .retrieval_cases import RetrievalOptions
    from .search_options import SearchOptions
    from .searching import search
    from .verification import Verification, verify

_HOMES = {
    "CompressedCache": "hf_cache",
    "CompressionResult": "pipeline",
    "GenerationOptions": "evaluation_generation",
    "HarnessOptions": "evaluation_harness",
    "LimitExceeded": "restore",
    "Patch": "patching",
    "Plan": "planning",
    "Recipe": "recipe",
    "RetrievalOptions": "retrieval_cases",
    "SearchOptions": "search_options",
    "Verification": "verification",
    "build_demo_model": "demo",
    "compress": "pipeline",
    "evaluate": "assess",
    "load": "patching",
    "patch": "patching",
    "plan": "planning",
    "report": "reporting",
    "search": "searching",
    "verify": "verification",
}
__all__ = [
    "CompressedCache",
    "CompressionResult",
    "GenerationOptions",
    "HarnessOptions",
    "LimitExceeded",
    "Patch",
    "Plan",
    "Recipe",
    "RetrievalOptions",
    "SearchOptions",
    "Verification",
    "build_demo_model",
    "compress",
    "evaluate",
    "load",
    "patch",
    "plan",
    "report",
    "search",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
