"""One experiment under every strategy: the same losses, the same adapter, the base untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import WEIGHTS
from plain_peft import reload_with_plain_peft
from safetensors.torch import load_file
from strategy_runs import run_on

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
STRATEGIES = ["ddp", "fsdp2", "fsdp2_offload"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {"instruction": f"Question {i} about legs", "output": f"It has {'eight legs ' * (i % 5)}."}
        for i in range(44)
    ]
    path.write_text(
        "\n".join(json.dumps(line | {"output": line["output"] + "."}) for line in lines)
    )
    return path


def settings_of(base: Path, rows: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Four packs a step: one process in four micro-batches, two in two each."""
    return {
        "base": str(base),
        "rows": str(rows),
        "folder": str(folder),
        "batch_size": 1,
        "accumulation": 4,
        "devices": 1,
        "strategy": "one",
    } | changes


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """On one process, and what it noted."""
    return run_on(1, settings)[0]


def on_two(settings: dict[str, Any], strategy: str, folder: Path) -> list[dict[str, Any]]:
    changed = settings | {"strategy": strategy, "accumulation": 2, "folder": str(folder)}
    return run_on(2, changed)


@pytest.mark.slow
def test_every_strategy_trains_the_same_adapter_and_leaves_the_base_alone(
    tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    """Packs, accumulation, clipping, paged_adamw_32bit, two steps an epoch's end apart.

    Float32 sums are taken in other groups, which moves gradients by some 1e-7 of their size; where
    a gradient is next to nothing, AdamW's first steps make a difference of its sign, which is up to
    lr, of any rounding: 1e-4 of the 1e-2 here allows for one such in a hundred.
    """
    settings = settings_of(tiny_base, rows, tmp_path / "one")
    one = run(settings)
    adapter = load_file(tmp_path / "one" / WEIGHTS)
    assert len(one["steps"]) == 6
    for strategy in STRATEGIES:
        noted = on_two(settings, strategy, tmp_path / strategy)
        for step, *parts in zip(one["steps"], *(rank["steps"] for rank in noted), strict=True):
            rows_of_all = [row for part in parts for row in part["rows"] if row >= 0]
            assert sorted(rows_of_all) == sorted(step["rows"])
            for part in parts:
                assert part["loss"] == pytest.approx(step["loss"], rel=1e-5)
                assert part["norm"] == pytest.approx(step["norm"], rel=1e-5)
        assert noted[0]["validations"] == pytest.approx(one["validations"], rel=1e-5)
        assert {rank["base"] for rank in noted} == {one["base"]}
        trained = load_file(tmp_path / strategy / WEIGHTS)
        assert trained.keys() == adapter.keys()
        for name, tensor in trained.items():
            assert (tensor - adapter[name]).abs().max() <= 1e-4, (strategy, name)


def test_a_base_cut_over_two_processes_trains_what_one_process_does_and_plain_peft_reads_it(
    tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    """A shorter one of the above, and the tolerance of its logits from the adapters' 1e-4."""
    settings = settings_of(tiny_base, rows, tmp_path / "one", max_steps=2)
    one = run(settings)
    noted = on_two(settings, "fsdp2", tmp_path / "two")
    assert [step["loss"] for step in noted[0]["steps"]] == pytest.approx(
        [step["loss"] for step in one["steps"]], rel=1e-5
    )
    assert {rank["base"] for rank in noted} == {one["base"]}
    ids = torch.arange(5, 21).unsqueeze(0)
    with torch.no_grad():
        models = [reload_with_plain_peft(tmp_path / name / "adapter") for name in ("one", "two")]
        logits = [model(input_ids=ids).logits for model in models]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-3)
    adapters = [load_file(tmp_path / name / WEIGHTS) for name in ("one", "two")]
    for name, tensor in adapters[0].items():
        assert (tensor - adapters[1][name]).abs().max() <= 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("begins_on_two", [True, False])
def test_a_run_goes_on_under_another_strategy(
    strategy: str, begins_on_two: bool, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    """Four steps under one, two more under the other; tolerances as above."""
    whole = settings_of(tiny_base, rows, tmp_path / "whole")
    steps = run(whole)["steps"]
    settings = settings_of(tiny_base, rows, tmp_path / "moved", max_steps=4)
    further = settings | {"max_steps": 6, "resumes": True}
    folder = tmp_path / "moved"
    if begins_on_two:
        on_two(settings, strategy, folder)
        later = run(further)["steps"]
    else:
        run(settings)
        later = on_two(further, strategy, folder)[0]["steps"]
    assert [step["step"] for step in later] == [5, 6]
    assert [step["loss"] for step in later] == pytest.approx(
        [step["loss"] for step in steps[4:]], rel=1e-5
    )
    ours, expected = load_file(folder / WEIGHTS), load_file(tmp_path / "whole" / WEIGHTS)
    for name, tensor in ours.items():
        assert (tensor - expected[name]).abs().max() <= 1e-4, name


@pytest.mark.slow
def test_a_copy_that_is_not_to_be_kept_is_gone_after_loading(
    tiny_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_PL_CACHE", str(tmp_path / "cache"))
    settings = settings_of(tiny_base, rows, tmp_path / "one", max_steps=1)
    settings["quantization"] = {"cache": False}
    noted = on_two(settings, "fsdp2", tmp_path / "two")
    assert len(noted[0]["steps"]) == 1
    assert list((tmp_path / "cache" / "packed").iterdir()) == []
