"""Shapiro-Wilk beside SciPy's, kurtosis and outliers of matrices whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_pl.inspection.weights.normality import normality, shapiro_wilk


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(name: str, n: int) -> Tensor:
    """``(n,)`` by formula, so that no generator's version matters."""
    place = (torch.arange(n, dtype=torch.float64) * 7919 % n + 0.5) / n
    normal = torch.special.ndtri(place)
    return {
        "quantiles": normal,
        "skewed": normal + 0.1 * normal**2,
        "heavy": normal + 0.05 * normal**3,
        "even": place,
        "wavy": normal + 0.3 * torch.sin(5 * normal),
    }[name]


SCIPY: dict[tuple[str, int], tuple[float, float]] = {
    ("quantiles", 64): (0.9993530454386722, 1.0),
    ("quantiles", 4099): (0.9999866086219051, 1.0),
    ("skewed", 64): (0.9822904460549924, 0.4881187442650557),
    ("skewed", 576): (0.9807663851137084, 6.975530108533347e-07),
    ("skewed", 4099): (0.9804669866449697, 2.403856761031688e-23),
    ("heavy", 64): (0.9961333076420668, 0.999447685389958),
    ("heavy", 576): (0.9909731523693309, 0.001368662020495398),
    ("heavy", 4099): (0.989335132225471, 4.878511639132392e-17),
    ("even", 64): (0.9551290406738953, 0.020617182144278212),
    ("wavy", 64): (0.9664614952612803, 0.07906669500893669),
    ("wavy", 576): (0.9685414721348689, 8.944310313960157e-10),
}
"""``scipy.stats.shapiro`` of SciPy 1.17.1 on the samples above: W and p."""


@pytest.mark.parametrize(("name", "n"), SCIPY)
def test_shapiro_wilk_is_scipys(name: str, n: int) -> None:
    statistic, p_value = SCIPY[name, n]
    rows = torch.stack([sample(name, n), sample("quantiles", n)])
    found, p_values = shapiro_wilk(rows)
    # SciPy tabulates normal quantiles in another routine; both are good to more than six digits
    assert float(found[0]) == pytest.approx(statistic, rel=1e-7)
    assert float(p_values[0]) == pytest.approx(p_value, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("n", [64, 576, 4096])
def test_five_percent_of_normal_neurons_fail(n: int) -> None:
    """Of 2,000, a share between 3.5 and 6.5 %: three standard deviations of a binomial.

    That they are rounded to bfloat16, as weights are, makes no difference.
    """
    rows = torch.randn(2000, n, generator=draw(1))
    for kept in (rows, rows.bfloat16().float()):
        share = float((shapiro_wilk(kept)[1] < 0.05).double().mean())
        assert 0.035 < share < 0.065


def test_heavy_tails_are_found() -> None:
    """Student's t with 5 degrees of freedom over 576 weights."""
    chi = torch.stack([torch.randn(500, 576, generator=draw(i)) ** 2 for i in range(1, 6)]).sum(0)
    rows = torch.randn(500, 576, generator=draw()) / (chi / 5).sqrt()
    found = normality(rows)
    assert found.neurons == 500
    assert found.non_normal > 480
    assert found.kurtosis > 1


def test_kurtosis_is_above_that_of_a_normal_distribution() -> None:
    """0 for normal weights, -1.2 for even ones, 3 for Laplace's."""
    place = torch.rand(200, 4096, generator=draw())
    assert normality(torch.randn(200, 4096, generator=draw())).kurtosis == pytest.approx(
        0, abs=0.05
    )
    assert normality(place).kurtosis == pytest.approx(-1.2, abs=0.02)
    laplace = (place - 0.5).sign() * torch.log1p(-2 * (place - 0.5).abs())
    assert normality(laplace).kurtosis == pytest.approx(3, abs=0.3)


def test_an_outlier_is_counted_with_the_block_whose_scale_it_sets() -> None:
    rows = torch.rand(4, 256, generator=draw()) - 0.5  # nothing beyond 1.8 standard deviations
    assert normality(rows).outliers == 0
    rows[2, 70] = 30.0
    found = normality(rows)
    assert (found.outliers, found.weights_beside_outliers) == (1, 64)


def test_the_scale_of_a_row_is_no_outlier() -> None:
    rows = torch.randn(64, 256, generator=draw()).clamp(-3, 3)
    rows[5] *= 100
    assert normality(rows).outliers == 0


def test_rows_of_equal_weights_have_no_distribution() -> None:
    rows = torch.randn(8, 64, generator=draw())
    rows[:3] = 0.25
    assert normality(rows).neurons == 5
    assert normality(torch.zeros(8, 64)).neurons == 0
