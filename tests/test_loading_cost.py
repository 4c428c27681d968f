"""What loading costs over a synthetic checkpoint, as benchmarks/loading.py measures it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "loading.py"
GB = 1e9


@pytest.fixture(scope="module")
def loading() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loading_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_weights", "margin"),
    [
        # what one process holds besides: an allocator's arenas and a few tensors being read
        pytest.param(1.0e9, 0.5 * GB, id="1B"),
        pytest.param(6.7e9, 1.5 * GB, id="7B"),
    ],
)
def test_quantising_on_load_never_holds_the_base_in_16_bits(
    loading: ModuleType, tmp_path: Path, num_weights: float, margin: float
) -> None:
    """Anonymous memory above the imports': the 4-bit size and a margin, far below 2 bytes each."""
    counted = loading.make_checkpoint(tmp_path / "model", num_weights)
    result = loading.measure(tmp_path / "model", "nf4", tmp_path / "cache")
    assert result["peak_bytes"] <= result["stored_bytes"] + margin
    assert result["peak_bytes"] < 2 * counted


@pytest.mark.slow
def test_the_packed_copy_loads_ten_times_faster_than_quantising(
    loading: ModuleType, tmp_path: Path
) -> None:
    """A ratio within one machine and one run, its verification included."""
    loading.make_checkpoint(tmp_path / "model", 1.0e9)
    made = loading.measure(tmp_path / "model", "cached", tmp_path / "cache")
    read = loading.measure(tmp_path / "model", "cached", tmp_path / "cache")
    assert (made["is_from_cache"], read["is_from_cache"]) == (False, True)
    assert read["seconds"] * 10 <= made["seconds"]
