"""ablation/statistics: against scipy and statsmodels, by hand, and over grids of known truth."""

from __future__ import annotations

import gc
import math

import numpy as np
import pytest

pytest.importorskip("statsmodels")
from scipy import stats
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from qlora_pl.ablation.statistics.differences import compare
from qlora_pl.ablation.statistics.equivalence import equivalence, seeds_needed
from qlora_pl.ablation.statistics.examples import over_examples
from qlora_pl.ablation.statistics.trends import trend

Values = dict[str, dict[int, float]]


def grid_of(
    means: dict[str, float], num_seeds: int, generator: np.random.Generator, sd: float = 1.0
) -> Values:
    """A grid whose truth is known: what a seed does to all cells, and noise of each run's own."""
    shared = generator.normal(0, 3 * sd, num_seeds)
    return {
        cell: {
            seed: mean + shared[seed] + generator.normal(0, sd / math.sqrt(2))
            for seed in range(num_seeds)
        }
        for cell, mean in means.items()
    }


def test_one_difference_is_scipys_paired_t_test() -> None:
    values = grid_of({"a": 0.0, "b": 1.0}, 5, np.random.default_rng(1))
    [found] = compare(values, [("b", "a")])
    b, a = ([values[cell][seed] for seed in range(5)] for cell in "ba")
    expected = stats.ttest_rel(b, a)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-12)
    assert found.single == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert found.simultaneous == pytest.approx(found.single)  # of one comparison
    assert found.mean == pytest.approx(np.mean(b) - np.mean(a))


def test_pairing_takes_out_what_a_seed_does_to_both_cells() -> None:
    """Seeds move both cells by 100; unpaired, the difference of 1 would be lost."""
    values = {
        "a": {0: 0.0, 1: 100.0, 2: 200.0, 3: 300.0},
        "b": {0: 1.0, 1: 101.1, 2: 200.9, 3: 301.0},
    }
    [found] = compare(values, [("b", "a")])
    assert found.differs(0.95) is True
    unpaired = stats.ttest_ind(list(values["b"].values()), list(values["a"].values()))
    assert unpaired.pvalue > 0.9


def test_holm_and_bonferroni_by_hand() -> None:
    """Holm 1979: the smallest p times 3, the next times 2, the last once, never decreasing."""
    values = grid_of({"a": 0.0, "b": 1.5, "c": 0.9, "d": 0.1}, 6, np.random.default_rng(3))
    found = compare(values, [("b", "a"), ("c", "a"), ("d", "a")])
    ordered = sorted(found, key=lambda one: one.p or 0.0)
    expected = 0.0
    for rank, one in enumerate(ordered):
        assert one.p is not None
        expected = max(expected, min(1.0, (3 - rank) * one.p))
        assert one.p_holm == pytest.approx(expected)
    alone = compare(values, [("b", "a")], level=1 - 0.05 / 3)
    assert found[0].simultaneous == pytest.approx(alone[0].single)


def test_only_seeds_that_both_cells_finished_are_compared() -> None:
    values = {"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {1: 2.5, 2: 3.2, 3: 9.0, 0: math.nan}}
    [found] = compare(values, [("b", "a")])
    assert found.seeds == (1, 2)
    assert found.values == pytest.approx((0.5, 0.2))


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        ({0: 1.0}, {0: 2.0}, "one seed"),
        ({0: 1.0}, {1: 2.0}, "no seed"),
        ({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0}, "very same difference"),
    ],
)
def test_without_a_spread_there_is_no_interval_and_the_reason_is_given(
    a: dict[int, float], b: dict[int, float], why: str
) -> None:
    [found] = compare({"a": a, "b": b}, [("b", "a")])
    assert found.single is None
    assert found.differs(0.95) is None
    assert why in str(found.why_not)


def test_equivalence_is_statsmodels_two_one_sided_tests() -> None:
    values = grid_of({"a": 0.0, "b": 0.1}, 8, np.random.default_rng(5), sd=0.2)
    [difference] = compare(values, [("b", "a")])
    b, a = (np.array([values[cell][seed] for seed in range(8)]) for cell in "ba")
    found = equivalence(difference, 0.5)
    assert found.p == pytest.approx(ttost_paired(b, a, -0.5, 0.5)[0], rel=1e-9)
    assert equivalence(difference, 0.5, num_questions=4).p_corrected == pytest.approx(4 * found.p)


def test_few_seeds_do_not_show_that_cells_are_alike() -> None:
    """No difference is found, and none is excluded: two different sentences."""
    values = {"a": {0: 0.0, 1: 0.0, 2: 0.0}, "b": {0: 0.3, 1: -0.4, 2: 0.2}}
    [difference] = compare(values, [("b", "a")])
    assert difference.differs(0.95) is False
    assert equivalence(difference, 0.1).holds(0.95) is False


@pytest.mark.parametrize("effect", [0.5, 1.0, 3.0])
def test_seeds_needed_have_the_power_and_one_fewer_has_not(effect: float) -> None:
    number = seeds_needed(1.0, effect)
    assert number is not None
    test = TTestPower()
    assert test.power(effect, number, 0.05) >= 0.8
    assert number == 2 or test.power(effect, number - 1, 0.05) < 0.8


def test_a_difference_that_no_number_of_seeds_would_show_is_told_so() -> None:
    assert seeds_needed(1.0, 1e-9) is None


def test_a_trend_over_two_ranks_and_three_seeds_is_never_below_a_quarter() -> None:
    values = {"r8": {0: 1.0, 1: 2.0, 2: 3.0}, "r64": {0: 0.0, 1: 1.0, 2: 2.0}}
    found = trend("rank", ["r8", "r64"], values)
    assert found is not None
    assert (found.p, found.least_p, found.is_exact) == (0.25, 0.25, True)
    assert found.slope == pytest.approx(-1.0)


def test_a_clear_trend_has_the_least_p_there_is() -> None:
    values = {f"r{level}": {seed: level + seed for seed in range(3)} for level in range(3)}
    found = trend("rank", ["r0", "r1", "r2"], values)
    assert found is not None
    assert found.p == found.least_p == pytest.approx(2 / 6**3)


def test_more_orders_than_can_be_counted_are_drawn_alike_each_time() -> None:
    values = grid_of({f"r{level}": 0.0 for level in range(5)}, 4, np.random.default_rng(7))
    one, two = (trend("rank", list(values), values, seed=3) for _ in range(2))
    assert one == two
    assert one is not None
    assert not one.is_exact


def test_over_examples_covers_the_mean_of_differences_and_is_the_same_each_time() -> None:
    generator = np.random.default_rng(11)
    a = generator.normal(size=200)
    b = a + generator.normal(0.3, 0.2, size=200)
    found = over_examples(b, a)
    assert found == over_examples(b, a)
    assert found.interval is not None
    normal = stats.norm.interval(0.95, np.mean(b - a), stats.sem(b - a))
    assert found.interval == pytest.approx(normal, abs=0.005)  # of a mean over 200: nearly normal
    assert over_examples(b[:5], a[:5]).interval is None


def rates(num_grids: int, num_seeds: int) -> dict[str, float]:
    """Shares over grids of a reference and five cells, of which none, then two, differ."""
    generator = np.random.default_rng(num_seeds)
    count = dict.fromkeys(("covered", "all_covered", "false_holm", "false_single", "found"), 0)
    names = ["b", "c", "d", "e", "f"]
    gc.freeze()  # Holm's correction in statsmodels collects garbage each time
    for _ in range(num_grids):
        values = grid_of(dict.fromkeys(["a", *names], 0.0), num_seeds, generator)
        none = compare(values, [(name, "a") for name in names])
        inside = [one.single[0] <= 0 <= one.single[1] for one in none if one.single]
        whole = [
            one.simultaneous[0] <= 0 <= one.simultaneous[1] for one in none if one.simultaneous
        ]
        count["covered"] += sum(inside) / len(inside)
        count["false_single"] += not all(inside)
        count["all_covered"] += all(whole)
        count["false_holm"] += any(one.differs(0.95) for one in none)
        strong = {seed: value + 20.0 for seed, value in values["b"].items()}
        [large, *_] = compare({**values, "b": strong}, [(name, "a") for name in names])
        count["found"] += bool(large.differs(0.95))
    gc.unfreeze()
    return {name: number / num_grids for name, number in count.items()}


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_over_a_thousand_grids_of_known_truth_errors_are_as_rare_as_stated(num_seeds: int) -> None:
    """At 1,000 grids three standard errors are 2.1 points.

    Coverage has room for the dependence of five differences from one reference.
    """
    found = rates(1000, num_seeds)
    assert 0.92 <= found["covered"] <= 0.98
    assert found["all_covered"] >= 0.95 - 0.021
    assert found["false_holm"] <= 0.05 + 0.021
    assert found["false_single"] >= 0.10  # why single intervals do not decide
    assert found["found"] >= 0.8


def test_over_sixty_grids_of_known_truth_errors_are_not_common() -> None:
    """The same, short: only a bug has a coverage below 0.85 or above 0.99 in 60 grids."""
    found = rates(60, 5)
    assert 0.85 <= found["covered"] <= 0.99
    assert found["false_holm"] <= 0.15
    assert found["found"] >= 0.9


@pytest.mark.slow
def test_a_trend_that_is_not_there_is_found_as_rarely_as_stated() -> None:
    generator = np.random.default_rng(2)
    found = 0
    for _ in range(300):
        values = grid_of(dict.fromkeys(("r0", "r1", "r2"), 0.0), 3, generator)
        one = trend("rank", ["r0", "r1", "r2"], values)
        assert one is not None
        found += one.p <= 0.05
    assert found / 300 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
