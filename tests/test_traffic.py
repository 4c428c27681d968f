"""What several processes send in a step is what the formulas of benchmarks/wire.py say."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).parent.parent
RESULTS = sorted((REPOSITORY / "benchmarks/results").glob("scale-*.json"))


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    """Imports a script of benchmarks/ by name; they import each other by theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        yield importlib.import_module


def test_shapes_have_the_published_numbers_of_weights(benchmark: Any) -> None:
    """Source: the sums of the checkpoints' tensors; LLaMA 7B and 33B, Llama 2 70B."""
    wire = benchmark("wire")
    counted = {
        shape.name: shape.num_quantized
        + shape.num_layers * 2 * shape.hidden
        + (2 * shape.vocabulary + 1) * shape.hidden
        for shape in (wire.LLAMA_7B, wire.LLAMA_33B, wire.LLAMA_70B)
    }
    assert counted == {"7B": 6_738_415_616, "33B": 32_528_943_616, "70B": 68_976_648_192}


def test_adapters_of_guanaco_7b_are_counted_as_the_original_script_prints_them(
    benchmark: Any,
) -> None:
    """Rank 64 on all linear layers; qlora.py prints 79953920.0, half of them for a 4-bit base."""
    assert benchmark("wire").LLAMA_7B.num_adapter_weights == 2 * 79_953_920


def test_buckets_are_those_of_the_strategy(benchmark: Any) -> None:
    """Source: the strategy's own division of tensors of the same shapes."""
    import torch

    from qlora_pl.strategies.ddp import _buckets

    wire = benchmark("wire")
    shape = replace(wire.LLAMA_7B, rank=8)
    sizes = [
        size
        for inputs, outputs in shape.matrices * shape.num_layers
        for size in (shape.rank * inputs, shape.rank * outputs)
    ]
    tensors = [torch.empty(size, device="meta") for size in sizes]
    for limit in (300_000, 1_000_000, 25_000_000):
        assert wire.num_buckets(shape, limit) == len(list(_buckets(tensors, limit)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "ddp", "accumulation": 2},
        {"strategy": "fsdp2", "accumulation": 2},
        # rows of A that two processes cannot share alike: the parts are padded
        {"strategy": "fsdp2", "checkpointing": False, "lora_rank": 3},
        {"strategy": "fsdp2_offload"},
    ],
    ids=str,
)
def test_two_processes_send_the_bytes_of_the_formula(
    benchmark: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Every byte and every exchange of a real step over gloo, as torch's dispatcher sees them."""
    traffic, synthetic = benchmark("traffic"), benchmark("synthetic")
    layout = traffic.Layout(processes=2, timed=1, **settings)
    counted = synthetic.save_base(tmp_path / "base", 7.5e6)
    rows = synthetic.write_rows(
        tmp_path / "rows.jsonl", traffic.GLOBAL_BATCH * layout.num_steps, traffic.NUM_TOKENS
    )
    shape = traffic.shape_of(counted, layout.lora_rank)
    assert shape.num_layers == 2
    summary = traffic.summarize(shape, layout, traffic.run(tmp_path / "base", rows, layout))
    assert summary["counted_bytes"] == summary["formula_bytes"]
    assert summary["counted_exchanges"] == summary["formula_exchanges"]
    assert summary["is_equal"]  # in the other process, too
    # beside the model a step sends sums of losses, a norm, agreement on signals
    assert summary["bookkeeping"]["bytes"] < 1000


def published_tables(scale: ModuleType) -> list[str]:
    """The tables that the committed results make."""
    parts = json.loads(RESULTS[-1].read_text())
    return scale.tables(parts).split("\n\n")


def test_published_tables_are_those_of_the_committed_results(benchmark: Any) -> None:
    """After ``benchmarks/scale.py --out FILE``, put in what ``--tables FILE`` prints."""
    pages = [REPOSITORY / "docs/distributed.md", REPOSITORY / "benchmarks/README.md"]
    published = "\n".join(page.read_text() for page in pages)
    for table in published_tables(benchmark("scale")):
        assert table in published, table


def test_no_process_counted_other_bytes_in_the_committed_results() -> None:
    """A result that contradicts the formulas would not be published beside them."""
    runs = json.loads(RESULTS[-1].read_text())["traffic"]["measured"]["runs"]
    assert {run["processes"] for run in runs} == {1, 2, 4}
    assert {run["strategy"] for run in runs} >= {"one", "ddp", "fsdp2"}
    assert all(run["is_equal"] for run in runs)
