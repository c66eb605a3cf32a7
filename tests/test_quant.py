"""The grid, the solver, the folding choice and FireQ's scales, against what they promise."""

from __future__ import annotations

import pytest
import torch

from kompakt.quant import solver
from kompakt.quant.fireq import e4m3_snap, tensor_exponent
from kompakt.quant.grid import (
    QMAX,
    QMIN,
    amax_scale,
    grouped,
    round_codes,
    rounded_scale,
    search_scale,
    signed_scale,
    sqnr_db,
    storage_snap,
)
from kompakt.quant.solver import column_order, solve

pytestmark = pytest.mark.usefixtures("one_thread")
ONE = torch.ones(())
BF16 = storage_snap(torch.bfloat16)


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Student-t weights, heavier-tailed than a Gaussian, with one outlier."""
    generator = torch.Generator().manual_seed(seed)
    chi = torch.randn(5, rows, columns, generator=generator).square().mean(0)
    weight = torch.randn(rows, columns, generator=generator) / chi.sqrt()
    weight[0, 0] = 40.0
    return weight


def second_moments(size: int, tokens: int = 600, seed: int = 1) -> torch.Tensor:
    """E[x xᵀ] of correlated inputs whose channels differ in size by 100."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) * 0.5 + torch.eye(size) * 2
    x = torch.randn(tokens, size, generator=generator) @ mixing * torch.logspace(-1, 1, size)
    return x.T @ x / tokens


def dequantized(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return round_codes(groups, scale) * scale.unsqueeze(-1)


@pytest.mark.parametrize("group_size", [32, 64, 128, None])
def test_signed_beats_amax_and_search_beats_signed(group_size):
    groups = grouped(weights(64, 256), group_size)
    quality = [sqnr_db(groups, dequantized(groups, BF16(scale(groups)))) for scale in (amax_scale, signed_scale)]
    quality.append(sqnr_db(groups, dequantized(groups, search_scale(groups, ONE, BF16))))
    assert quality[0] + 0.4 < quality[1] < quality[2], quality


def test_extreme_lands_on_minus_eight_whatever_its_sign():
    groups = torch.tensor([[1.0, -3.0, 2.0, 0.5], [1.0, -2.0, 3.0, 0.5]])
    codes = round_codes(groups, signed_scale(groups))
    assert codes[0, 1] == QMIN and codes[1, 2] == QMIN
    assert codes.min() >= QMIN and codes.max() <= QMAX


def test_zero_and_tiny_groups_give_zero_codes_and_a_usable_scale():
    groups = torch.stack([torch.zeros(32), torch.full((32,), 1e-44)])
    for scale in (rounded_scale(signed_scale(groups), BF16), search_scale(groups, ONE, BF16)):
        assert (scale != 0).all() and scale.isfinite().all()
        assert (round_codes(groups, scale) * scale.unsqueeze(-1)).abs().max() < 1e-40


def test_search_follows_importance():
    groups = grouped(weights(32, 128), 64)
    importance = torch.ones(64)
    importance[:4] = 1000.0
    plain = dequantized(groups, search_scale(groups, ONE, BF16)) - groups
    weighted = dequantized(groups, search_scale(groups, importance, BF16)) - groups
    assert (weighted.square() * importance).sum() < 0.95 * (plain.square() * importance).sum()


def output_error(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((difference @ hessian) * difference).sum())


@pytest.mark.parametrize(("columns", "group_size"), [(128, 32), (192, 64), (256, 128), (100, None), (200, None)])
@pytest.mark.parametrize("activation_order", [True, False])
def test_error_feedback_beats_rounding(columns, group_size, activation_order):
    weight, hessian = weights(48, columns), second_moments(columns)
    found = solve(weight.clone(), hessian.clone(), group_size, BF16, activation_order=activation_order)
    codes, scale = found.codes, found.scale
    solved = (grouped(codes.float(), group_size) * scale.unsqueeze(-1)).view_as(weight)
    groups = grouped(weight, group_size)
    importance = grouped(hessian.diagonal().unsqueeze(0), group_size)
    nearest = dequantized(groups, search_scale(groups, importance, BF16)).view_as(weight)
    share = 0.6 if activation_order else 1.0
    assert output_error(solved - weight, hessian) < share * output_error(nearest - weight, hessian)
    assert codes.min() >= QMIN and codes.max() <= QMAX
    assert torch.equal(BF16(scale), scale)


def test_solver_with_uncorrelated_inputs_is_rounding_to_nearest():
    weight = weights(16, 64)
    found = solve(weight.clone(), torch.eye(64), 32, BF16, search=False)
    codes, scale = found.codes, found.scale
    expected = BF16(signed_scale(grouped(weight, 32)))
    assert torch.equal(scale, expected)
    assert torch.equal(codes.float().view(16, 2, 32), round_codes(grouped(weight, 32), expected))


def test_order_keeps_groups_together():
    diagonal = torch.rand(96, generator=torch.Generator().manual_seed(0))
    order = column_order(diagonal, 32)
    assert sorted(order.tolist()) == list(range(96))
    assert all(len({int(i) // 32 for i in part}) == 1 for part in order.split(32))
    means = [float(diagonal[part].mean()) for part in order.split(32)]
    assert means == sorted(means, reverse=True)


def test_dead_columns_become_zero_and_singular_moments_are_dampened(caplog):
    weight, hessian = weights(8, 64), second_moments(64, tokens=4)
    hessian[5], hessian[:, 5] = 0, 0
    codes = solve(weight.clone(), hessian.clone(), 32, BF16, dampening=1e-9).codes
    assert (codes[:, 5] == 0).all()
    assert "dampening raised" in caplog.text


def test_infinite_moments_are_refused():
    hessian = second_moments(64)
    hessian[3, 3] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        solve(weights(8, 64), hessian, 32, BF16)


def test_fireq_scales_are_e4m3_times_a_power_of_two_and_exact_in_bf16():
    weight = weights(32, 128) * 0.02
    exponent = tensor_exponent([weight], 64)
    scale = search_scale(grouped(weight, 64), ONE, e4m3_snap(exponent))
    scaled = scale * 2.0**exponent
    assert torch.equal(scaled.to(torch.float8_e4m3fn).float(), scaled)
    assert torch.equal(scale.to(torch.bfloat16).float(), scale)
    assert (scale != 0).all()
    searched = dequantized(grouped(weight, 64), search_scale(grouped(weight, 64), ONE, BF16))
    lost = sqnr_db(grouped(weight, 64), searched) - sqnr_db(
        grouped(weight, 64), dequantized(grouped(weight, 64), scale)
    )
    assert lost < 0.3


@pytest.mark.parametrize(("size", "block"), [(192, 1024), (192, 64), (200, 64), (65, 64), (1, 64)])
def test_inverse_factor_in_place_equals_the_factor_of_the_inverse(size, block, monkeypatch):
    monkeypatch.setattr(solver, "FACTOR_BLOCK", block)
    monkeypatch.setattr(solver, "COPIED_ELEMENTS", 3 * size)
    hessian = second_moments(size)
    order = column_order(hessian.diagonal(), 1)
    exact = hessian[order][:, order].double()
    exact.diagonal().add_(0.01 * hessian.diagonal().mean().double())
    expected = torch.linalg.cholesky(torch.linalg.inv(exact), upper=True)
    upper = solver.inverse_factor_(hessian.clone(), order, 0.01)
    assert (upper.double() - expected).norm() < 1e-4 * expected.norm()
    cost = solver.column_cost(hessian, 1)[order].double()
    torch.testing.assert_close(cost, expected.diagonal().square().reciprocal(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("block", [1024, 64])
def test_moments_are_put_back_after_every_attempt(block, monkeypatch, caplog):
    monkeypatch.setattr(solver, "FACTOR_BLOCK", block)
    hessian = second_moments(200, tokens=4)
    hessian[7], hessian[:, 7] = 0, 0
    hessian = hessian.tril() + hessian.tril(-1).T
    kept = hessian.clone()
    cost = solver.column_cost(hessian, 1, dampening=1e-9)
    assert "dampening raised" in caplog.text and torch.equal(hessian, kept)
    assert cost[7] == 0 and cost.isfinite().all()
    share = float(caplog.text.rpartition(" ")[2])
    torch.testing.assert_close(solver.column_cost(kept.clone(), 1, dampening=share), cost, rtol=1e-6, atol=0)
