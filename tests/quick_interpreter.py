"""Spares Triton's interpreter work that it repeats: half of its time, or more, where tiles are small.

- Every call of a function within a kernel replaces the language's functions by the interpreter's, which the launch
  around it has done. Here it is done once per launch.
- The NumPy dtype of every result comes from a dictionary built for that result. Here it is looked up by name.
- The shape of every type and result is unwrapped, checked and wrapped again, number by number. Here that is done once
  for a shape.
- Operands are cast to a type and broadcast to a shape that are worked out, also where both have them.
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
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    for name, quicker in (("_patch_lang", patch_once), ("_get_np_dtype", dtype_by_name)):
        if hasattr(interpreter, name):
            setattr(interpreter, name, quicker(getattr(interpreter, name)))
    for owner, name, quicker in (
        (core.block_type, "__init__", typed_once),
        (core.tensor, "__init__", shaped_once),
        (TritonSemantic, "binary_op_type_checking_impl", cast_where_types_differ),
        (TritonSemantic, "broadcast_impl_value", broadcast_where_shapes_differ),
        (core, "_unwrap_if_constexpr", unwrapped_first),
    ):
        if hasattr(owner, name):
            setattr(owner, name, quicker(getattr(owner, name)))
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


def typed_once(initialize: Callable[..., None]) -> Callable[..., None]:
    """`block_type.__init__`. A type holds its elements' type, and what comes of shape and elements' name."""
    from triton.language import core

    known: dict[tuple[str, tuple[Any, ...]], dict[str, Any]] = {}

    def set_up(self: Any, element_ty: Any, shape: Any) -> None:
        key = str(element_ty), tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
        if key not in known:
            initialize(self, element_ty, shape)
            known[key] = {name: value for name, value in vars(self).items() if name != "element_ty"}
        self.element_ty = element_ty
        vars(self).update(known[key])

    return set_up


def shaped_once(initialize: Callable[..., None]) -> Callable[..., None]:
    """`tensor.__init__`. Tensors of one shape share what is wrapped of it."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def set_up(self: Any, handle: Any, type: Any) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in known:
            initialize(self, handle, type)
            known[shape] = {name: getattr(self, name) for name in vars(self) if name not in ("handle", "type", "dtype")}
        self.handle, self.type, self.dtype = handle, type, type.scalar
        vars(self).update(known[shape])

    return set_up


def cast_where_types_differ(check: Callable[..., Any]) -> Callable[..., Any]:
    """Division makes floats of few bits wider, and pointers are checked."""
    from triton.language import core

    def match(self: Any, lhs: Any, rhs: Any, *options: Any, **named: Any) -> Any:
        alike = type(lhs) is type(rhs) is core.tensor and lhs.dtype == rhs.dtype and not lhs.dtype.is_ptr()
        divided = len(options) > 3 or named.get("div_or_mod", False)
        if alike and not divided:
            return self.broadcast_impl_value(lhs, rhs)
        return check(self, lhs, rhs, *options, **named)

    return match


def broadcast_where_shapes_differ(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    def match(self: Any, lhs: Any, rhs: Any) -> Any:
        # Those of one shape share what is wrapped of it.
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    return match


def unwrapped_first(unwrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Most that is asked for is one value."""
    from triton.language import core

    def value_of(item: Any) -> Any:
        kind = type(item)
        if kind is core.constexpr:
            return item.value
        return item if kind is int or kind is core.tensor or kind is core.dtype else unwrap(item)

    return value_of
