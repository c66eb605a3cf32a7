"""`dense_linear`: in float32 inside, as near to the exact product as torch's own, and no copy of a whole weight."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import poisoned
from torch.nn import functional

from kompakt.kernels import dense_linear as module
from kompakt.kernels.dense_linear import MIN_ROWS, dense_linear, multiplies_slowly, through_float32

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without instructions for 16 bit, whatever this one is."""
    monkeypatch.setattr(module, "multiplies_slowly", lambda dtype: dtype in HALVES)


def operands(shape: tuple[int, ...], out: int, dtype: torch.dtype, *, bias: bool = True):
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(out, shape[-1]).to(dtype)
    x[..., 0] *= 30  # an outlier channel
    x.view(-1, shape[-1])[0] = 0
    return x, weight, torch.randn(out).to(dtype) if bias else None


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - exact).norm() / exact.norm())


def test_the_cpus_are_those_that_torch_itself_multiplies_slowly_on():
    assert multiplies_slowly(torch.bfloat16) is not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert multiplies_slowly(torch.float16) is not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    assert not any(map(multiplies_slowly, (torch.float32, torch.float64, torch.int8)))


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [2**22, 700])
@pytest.mark.parametrize(("shape", "out"), [((8, 1), 1), ((2, 9, 63), 101), ((37, 576), 192), ((1, 3, 5, 64), 65)])
def test_it_is_as_exact_as_torch(monkeypatch, dtype, bias, chunk, shape, out):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    x, weight, offset = operands(shape, out, dtype, bias=bias)
    exact = functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    with poisoned():
        found = dense_linear(x, weight, offset)
    assert found.dtype == dtype and found.shape == (*shape[:-1], out)
    own = error(functional.linear(x, weight, offset), exact)
    assert error(found, exact) <= 2 * own + 1e-7


@pytest.mark.usefixtures("slow")
def test_strides_do_not_matter():
    x, weight, bias = operands((64, 40), 33, torch.bfloat16)
    wide = torch.randn(33, 80).bfloat16()
    wide[:, ::2] = weight
    assert torch.equal(dense_linear(x.t().contiguous().t(), wide[:, ::2], bias), dense_linear(x, weight, bias))


@pytest.mark.usefixtures("slow")
def test_products_are_float32_a_few_rows_of_the_weight_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 64 * 10)
    seen = []

    def multiply(x, weight, bias=None):
        seen.append((x.dtype, weight.dtype, weight.shape))
        return torch.ops.aten.linear(x, weight, bias)

    monkeypatch.setattr(module.functional, "linear", multiply)
    dense_linear(*operands((MIN_ROWS, 64), 25, torch.bfloat16))
    assert seen == [(torch.float32, torch.float32, (rows, 64)) for rows in (10, 10, 5)]


@pytest.mark.usefixtures("slow")
def test_what_is_left_to_torch():
    x, weight, bias = operands((MIN_ROWS, 64), 32, torch.bfloat16)
    assert through_float32(x, weight, bias) and through_float32(x, weight)
    assert not through_float32(x[1:], weight, bias)
    assert not through_float32(x[:, :0], weight[:, :0])
    assert not through_float32(x.float(), weight.float())
    assert not through_float32(x, weight.float())
    assert not through_float32(x.to("meta"), weight.to("meta"))
    assert not through_float32(x, weight[0])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        dense_linear(x, weight[:, 1:])


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1, 2)])
def test_gradients_are_torchs(wanted):
    given = operands((3, 11, 40), 24, torch.bfloat16)
    for index in wanted:
        given[index].requires_grad_()
    chosen, exact = [given[index] for index in wanted], [operand.detach().double() for operand in given]
    for index in wanted:
        exact[index].requires_grad_()
    outer = torch.randn(3, 11, 24).bfloat16()
    found = torch.autograd.grad(dense_linear(*given), chosen, outer)
    own = torch.autograd.grad(functional.linear(*given), chosen, outer)
    true = torch.autograd.grad(functional.linear(*exact), [exact[index] for index in wanted], outer.double())
    for ours, theirs, right in zip(found, own, true, strict=True):
        assert ours.dtype == torch.bfloat16 and ours.shape == right.shape
        assert error(ours, right) <= 2 * error(theirs, right) + 1e-7
