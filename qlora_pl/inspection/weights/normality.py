"""How normal the weights of a matrix are: Shapiro-Wilk for each neuron, kurtosis, outliers.

NF4's codes are quantiles of a normal distribution, so what is not normal is what they fit badly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_pl.modeling.base.quantization import BLOCK_SIZE

SIGNIFICANCE = 0.05
"""QLoRA (arXiv:2305.14314), appendix F: 7.5 % of LLaMA-7B's neurons fail, 5 % by chance."""
NEURONS = 1024
"""Of a matrix that are tested at most, evenly spread."""
MOST_WEIGHTS = 5000
"""Of a neuron that enter the test, evenly spread: what Royston's p-values were fitted up to."""
ROWS = 1024
"""That are standardised at a time."""
OUTLIER = 5.0
"""Standard deviations of its own row beyond which a weight is called one: 6 in 10 million normal
ones lie there."""


@dataclass(frozen=True, kw_only=True)
class Normality:
    """Of one matrix."""

    neurons: int
    """Rows that were tested."""
    non_normal: int
    """Of these, rejected at 5 %."""
    kurtosis: float
    """Mean over the rows, above a normal distribution's 3."""
    outliers: int
    """Weights beyond ``OUTLIER`` standard deviations of their row."""
    weights_beside_outliers: int
    """Weights in blocks of 64 that hold one, whose scale it sets."""


def normality(matrix: Tensor) -> Normality:
    """Test a matrix.

    Args:
        matrix: ``(out, in)`` float32; a row is what makes one output. Rows of equal weights, which
            have no distribution, are left out.
    """
    chosen = _spread(len(matrix), NEURONS, matrix.device)
    kurtosis = torch.zeros((), dtype=torch.float64, device=matrix.device)
    alive = outliers = beside = 0
    for rows in matrix.split(ROWS):
        scaled = _standardised(rows)
        is_outlier = scaled.abs() > OUTLIER
        blocks = [part.any(dim=1).sum() * part.shape[1] for part in is_outlier.split(BLOCK_SIZE, 1)]
        alive += len(scaled)
        kurtosis += scaled.pow(4).mean(dim=1).double().sum()
        outliers += int(is_outlier.sum())
        beside += int(torch.stack(blocks).sum())
    tested = _standardised(matrix[chosen])
    tested = tested[:, _spread(tested.shape[1], MOST_WEIGHTS, tested.device)]
    p_values = shapiro_wilk(tested)[1]
    return Normality(
        neurons=len(tested),
        non_normal=int((p_values < SIGNIFICANCE).sum()),
        kurtosis=float(kurtosis) / alive - 3 if alive else 0.0,
        outliers=outliers,
        weights_beside_outliers=beside,
    )


def _standardised(rows: Tensor) -> Tensor:
    """Rows of mean 0 and variance 1, without those that have no variance."""
    centred = rows - rows.mean(dim=1, keepdim=True)
    variance = centred.square().mean(dim=1, keepdim=True)
    alive = (variance > 0).flatten()
    return centred[alive] / variance[alive].sqrt()


def _spread(size: int, most: int, device: torch.device) -> Tensor:
    return torch.linspace(0, size - 1, min(size, most), device=device).round().long()


def shapiro_wilk(rows: Tensor) -> tuple[Tensor, Tensor]:
    """W and its p-value of each row.

    Royston 1995 (Applied Statistics 44, algorithm AS R94), which SciPy and R use, over all rows at
    once: those take a sample at a time, which for the neurons of a 7B is minutes.

    Args:
        rows: ``(k, n)``, n from 12 to 5,000; none constant.

    Returns:
        ``(k,)`` and ``(k,)``, float64.
    """
    n = rows.shape[1]
    assert n >= 12, "smaller samples have other polynomials"
    ordered = rows.sort(dim=1).values.double()
    weights = _order_weights(n).to(ordered.device)
    centred = ordered - ordered.mean(dim=1, keepdim=True)
    statistic = (centred @ weights).square() / centred.square().sum(dim=1)
    x = math.log(n)
    mean = _polynomial(x, -1.5861, -0.31082, -0.083751, 0.0038915)
    deviation = math.exp(_polynomial(x, -0.4803, -0.082676, 0.0030302))
    z = (torch.log1p(-statistic.clamp(max=1 - 1e-15)) - mean) / deviation
    return statistic, torch.special.ndtr(-z)


def _order_weights(n: int) -> Tensor:
    """``(n,)`` of W's numerator: normalised expected order statistics, the two outermost mended."""
    positions = (torch.arange(1, n + 1, dtype=torch.float64) - 0.375) / (n + 0.25)
    expected = torch.special.ndtri(positions)
    squares = float(expected.square().sum())
    u = 1 / math.sqrt(n)
    unit = expected / math.sqrt(squares)
    last = float(unit[-1]) + _polynomial(u, 0, 0.221157, -0.147981, -2.07119, 4.434685, -2.706056)
    before = float(unit[-2]) + _polynomial(
        u, 0, 0.042981, -0.293762, -1.752461, 5.682633, -3.582633
    )
    outer = float(expected[-1] ** 2 + expected[-2] ** 2)
    phi = (squares - 2 * outer) / (1 - 2 * last**2 - 2 * before**2)
    weights = expected / math.sqrt(phi)
    weights[[-1, -2]] = torch.tensor([last, before], dtype=torch.float64)
    weights[[0, 1]] = torch.tensor([-last, -before], dtype=torch.float64)
    return weights


def _polynomial(x: float, *coefficients: float) -> float:
    """Lowest power first."""
    return sum(factor * x**power for power, factor in enumerate(coefficients))
