"""Spares Triton's interpreter work that it repeats: half of its time, or more, where tiles are small.

- Every call of a function within a kernel replaces the language's functions by the interpreter's, which the launch
  around it has done. Here it is done once per launch.
- The NumPy dtype of every result comes from a dictionary built for that result. Here it is looked up by name.
- Sums and products of integers are checked for overflow, by arithmetic whose verdict is read only when debugging.

What kernels compute stays as it is. A version of Triton without these functions is left alone.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any


def quicken_interpreter() -> None:
    """Call it once in a process, after TRITON_INTERPRET is set."""
    from triton.runtime import interpreter

    for name, quicker in (("_patch_lang", patch_once), ("_get_np_dtype", dtype_by_name)):
        if hasattr(interpreter, name):
            setattr(interpreter, name, quicker(getattr(interpreter, name)))
    options = getattr(interpreter.interpreter_builder, "options", None)
    if options is not None and not options.debug:
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)


def patch_once(patch: Callable[..., Any]) -> Callable[..., Any]:
    """`patch` where the launch in progress has not patched what the function sees of the language."""
    import triton.language as tl

    patched: set[types.ModuleType] = set()
    nothing = types.SimpleNamespace(restore=lambda: None)

    @functools.cache
    def seen_by(function: Callable[..., Any]) -> set[types.ModuleType]:
        return {module for module in (tl, tl.core) if any(value is module for value in function.__globals__.values())}

    def patch_new(function: Callable[..., Any]) -> Any:
        seen = seen_by(function)
        if seen and seen <= patched:
            return nothing
        scope = patch(function)
        patched.update(seen)
        restore = scope.restore

        def restore_and_forget() -> None:
            restore()
            patched.clear()

        scope.restore = restore_and_forget
        return scope

    return patch_new


def dtype_by_name(dtype_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    found: dict[str, Any] = {}

    def look_up(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in found:
            found[name] = dtype_of(dtype)
        return found[name]

    return look_up
