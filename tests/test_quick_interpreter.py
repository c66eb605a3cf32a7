"""The interpreter's shortcuts: what they skip is what has been done, and results stay as they are."""

import types
from collections.abc import Callable

import pytest
from interpreter_cases import needs_triton
from quick_interpreter import (
    broadcast_where_shapes_differ,
    cast_where_types_differ,
    dtype_by_name,
    patch_once,
    shaped_once,
    typed_once,
    unwrapped_first,
)

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


def test_types_and_tensors_hold_what_they_would():
    from triton.language import core

    set_up_type, set_up_tensor = typed_once(core.block_type.__init__), shaped_once(core.tensor.__init__)
    elements = [core.float32, core.int8, core.pointer_type(core.float16)]
    for shape in [[4, 2], [8], core.tuple([core.constexpr(4), core.constexpr(2)])] * 2:
        for element in elements:
            expected, got = core.block_type(element, shape), core.block_type.__new__(core.block_type)
            set_up_type(got, element, shape)
            assert got == expected and vars(got).keys() == vars(expected).keys()
            assert (got.name, got.numel, list(got.shape)) == (expected.name, expected.numel, list(expected.shape))
            assert got.element_ty is element
    with pytest.raises(ValueError, match="power of 2"):
        set_up_type(core.block_type.__new__(core.block_type), core.int8, [3])
    for kind in [core.block_type(core.int8, [4, 2]), core.block_type(core.int32, [4, 2]), core.float32] * 2:
        expected, got = core.tensor("handle", kind), core.tensor.__new__(core.tensor)
        set_up_tensor(got, "handle", kind)
        assert vars(got).keys() == vars(expected).keys()
        for name in ("handle", "type", "dtype"):
            assert getattr(got, name) is getattr(expected, name)
        assert [size.value for size in got.shape] == [size.value for size in expected.shape]
        assert got.numel.value == expected.numel.value


def test_only_what_is_alike_is_left_alone():
    from triton.language import core

    asked = []

    class Semantic:
        broadcast_impl_value = broadcast_where_shapes_differ(lambda self, *pair: asked.append("broadcast") or pair)
        check = cast_where_types_differ(lambda self, *pair, **options: asked.append("cast") or pair[:2])

    def tensor(element, shape):
        made = core.tensor.__new__(core.tensor)
        made.type, made.dtype, made.shape = None, element, shape
        return made

    here, there = core.tuple([core.constexpr(4)]), core.tuple([core.constexpr(4)])
    one, two, other = tensor(core.float16, here), tensor(core.float16, here), tensor(core.float32, here)
    semantic = Semantic()
    assert semantic.check(one, two) == (one, two) and asked == []
    semantic.check(one, tensor(core.float16, there))
    assert asked == ["broadcast"]
    pointer = core.pointer_type(core.float16)
    for pair in ((one, other), (one, 2.0), (tensor(pointer, here), tensor(pointer, here))):
        semantic.check(*pair)
    semantic.check(one, two, False, False, True, True)
    semantic.check(one, two, div_or_mod=True)
    assert asked == ["broadcast", *["cast"] * 5]


def test_values_are_those_of_the_language():
    from triton.language import core

    unwrap = unwrapped_first(core._unwrap_if_constexpr)
    for item in (3, 2.5, None, "a", core.constexpr(7), core.float32, [core.constexpr(1), 2], (core.constexpr(1), 2)):
        assert unwrap(item) == core._unwrap_if_constexpr(item)
