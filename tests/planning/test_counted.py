"""What ``plan_memory`` predicts is what exists: bytes of real tiny models that take one step.

The counting is ``benchmarks/memory_plan.py``'s, which knows nothing of the formulas: it looks at
parameters, at optimizer state, and at every storage that an operation of torch makes.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
TOLERANCE = 0.05
"""Of what is kept. Every tensor of a layer has its term; what has none is one value a row here and
there (counts, weights of losses), and copies that a kernel makes for some layouts only."""
PEAK_TOLERANCE = 0.15
"""Of the most that exists at a time. The gradients that meet within a layer are taken at its widest
place, in which order they are freed is autograd's affair."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*"),  # models are loaded in this process
]


@pytest.fixture(scope="module")
def benchmark() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("memory_plan")


def _cases() -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return list(importlib.import_module("memory_plan").CASES)


@pytest.mark.parametrize("case", _cases(), ids=lambda case: case.name)
def test_predicted_bytes_are_those_that_are_counted(
    case: Any, benchmark: Any, tmp_path: Path
) -> None:
    found = benchmark.compare(case, tmp_path)
    wrong = {name: pair for name, pair in found.exact.items() if pair[0] != pair[1]}
    assert wrong == {}
    assert abs(found.error) <= TOLERANCE, found.kept
    assert abs(found.peak_error) <= PEAK_TOLERANCE, found.peak
