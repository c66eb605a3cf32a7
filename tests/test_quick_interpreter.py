"""The interpreter's shortcuts: what they skip is what has been done, and results stay as they are."""

import types
from collections.abc import Callable

import pytest
from interpreter_cases import needs_triton
from quick_interpreter import dtype_by_name, patch_once

pytestmark = needs_triton


def function_that_sees(**names: object) -> Callable[..., None]:
    return types.FunctionType((lambda: None).__code__, names)


@pytest.fixture
def patched():
    """A language that counts how often a function's view of it is patched and restored: (patch, counts)."""
    counts = {"patched": 0, "restored": 0}

    def patch(_: Callable[..., None]) -> types.SimpleNamespace:
        counts["patched"] += 1
        return types.SimpleNamespace(restore=lambda: counts.update(restored=counts["restored"] + 1))

    return patch_once(patch), counts


def test_a_launch_patches_once_whatever_it_calls(patched):
    import triton.language as tl

    patch, counts = patched
    kernel, helper = function_that_sees(tl=tl), function_that_sees(language=tl)
    scope = patch(kernel)
    for _ in range(3):
        patch(helper)
    assert counts == {"patched": 1, "restored": 0}
    scope.restore()
    patch(kernel).restore()
    assert counts == {"patched": 2, "restored": 2}


def test_what_a_launch_did_not_see_is_patched_at_the_call(patched):
    import triton.language as tl

    patch, counts = patched
    scope = patch(function_that_sees(tl=tl))
    patch(function_that_sees(core=tl.core))
    assert counts["patched"] == 2
    scope.restore()
    patch(function_that_sees(core=tl.core))
    assert counts["patched"] == 3


def test_a_function_that_sees_no_language_is_left_to_the_interpreter(patched):
    patch, counts = patched
    for _ in range(2):
        patch(function_that_sees())
    assert counts["patched"] == 2


def test_dtypes_are_those_of_the_interpreter():
    import triton.language as tl
    from triton.runtime.interpreter import _get_np_dtype

    scalars = [tl.int1, tl.int8, tl.uint8, tl.int32, tl.uint64, tl.float16, tl.bfloat16, tl.float32, tl.float8e4nv]
    pointers = [tl.pointer_type(dtype) for dtype in scalars]
    look_up = dtype_by_name(_get_np_dtype)
    for dtype in [*scalars, *pointers, *(tl.block_type(dtype, [4, 2]) for dtype in (*scalars, *pointers))] * 2:
        assert look_up(dtype) == _get_np_dtype(dtype)
