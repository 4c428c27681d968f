"""What would make a run fit: tried through the plan, ranked by its cost, written as YAML."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qlora_pl.planning.advice.levers import DEVICES, LESS, NEARLY, SAME, RunKeys, levers_of
from qlora_pl.planning.advice.remedies import Remedy, advise, applied, yaml_lines
from qlora_pl.planning.advice.verdict import judge
from qlora_pl.planning.memory.memory_plan import plan_memory
from qlora_pl.planning.memory.training_setting import TrainingSetting
from qlora_pl.planning.shapes.known_shapes import known_shape
from qlora_pl.planning.shapes.model_shape import ModelShape, shape_from_config
from qlora_pl.planning.work.cards import Card, card_named

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def llama7b() -> ModelShape:
    return shape_from_config(known_shape("llama-7b"))


BIG = TrainingSetting(
    batch_size=16,
    tokens_per_row=2048,
    gradient_checkpointing=False,
    optimizer="adamw_32bit",
    num_micro_batches=2,
    double_quant=False,
)
"""Everything that can be made smaller is large."""
KEYS = RunKeys(max_length=2048, global_batch_size=32, accumulation=2)


def named(advised: tuple[Remedy, ...]) -> list[str]:
    return [",".join(remedy.keys) for remedy in advised]


def test_every_remedy_really_fits_by_the_plan_itself(llama7b: ModelShape) -> None:
    card = card_named("24GiB")
    advice = advise(llama7b, BIG, card, KEYS)
    assert not judge(plan_memory(llama7b, BIG), card).fits
    assert advice.remedies
    for remedy in advice.remedies:
        again = plan_memory(llama7b, applied(BIG, remedy.levels))
        assert again.total == remedy.plan.total
        assert judge(again, card).fits


def test_the_mildest_step_of_a_kind_that_fits_is_offered(llama7b: ModelShape) -> None:
    """The next larger micro-batch that divides the step does not fit."""
    card = card_named("24GiB")
    setting = replace(BIG, gradient_checkpointing=True, batch_size=64, num_micro_batches=1)
    keys = replace(KEYS, accumulation=1, global_batch_size=64)
    (lever,) = [its for its in levers_of(llama7b, setting, keys) if its.name == "micro-batch"]
    assert [level.keys["data.batch_size"] for level in lever.levels] == [32, 16, 8, 4, 2, 1]
    offered = next(
        r for r in advise(llama7b, setting, card, keys).remedies if "data.batch_size" in r.keys
    )
    place = [level.keys for level in lever.levels].index(offered.keys)
    assert place > 0
    milder = applied(setting, [lever.levels[place - 1]])
    assert not judge(plan_memory(llama7b, milder), card).fits


def test_what_leaves_the_result_alone_comes_first(llama7b: ModelShape) -> None:
    remedies = advise(llama7b, BIG, card_named("40GiB"), KEYS).remedies
    prices = [max(level.price for level in remedy.levels) for remedy in remedies]
    assert prices == sorted(prices)
    assert prices[0] == SAME
    assert SAME < NEARLY < DEVICES < LESS


def test_where_no_single_change_is_enough_the_fewest_together_are_offered(
    llama7b: ModelShape,
) -> None:
    card = card_named("8GiB")
    advice = advise(llama7b, BIG, card, KEYS)
    assert advice.remedies
    numbers = {len(remedy.levels) for remedy in advice.remedies}
    assert min(numbers) >= 2
    assert all(remedy.verdict.fits for remedy in advice.remedies)
    for remedy in advice.remedies:  # none of its parts can be left out
        for place in range(len(remedy.levels)):
            fewer = [*remedy.levels[:place], *remedy.levels[place + 1 :]]
            assert not judge(plan_memory(llama7b, applied(BIG, fewer)), card).fits


def test_where_nothing_helps_the_least_that_can_be_had_is_told(llama7b: ModelShape) -> None:
    card = Card(name="1GiB", memory_bytes=2**30)
    advice = advise(llama7b, BIG, card, KEYS)
    assert advice.remedies == ()
    assert advice.least is not None
    assert advice.least.plan.total > card.memory_bytes


@pytest.mark.parametrize("keys", [KEYS, replace(KEYS, global_batch_size=None)])
def test_smaller_micro_batches_keep_the_rows_of_a_step(llama7b: ModelShape, keys: RunKeys) -> None:
    for lever in levers_of(llama7b, BIG, keys):
        if lever.name not in ("micro-batch", "devices"):
            continue
        for level in lever.levels:
            changed = applied(BIG, [level])
            rows = changed.batch_size * changed.num_micro_batches * changed.num_devices
            assert rows == 32
            told = level.keys.get("trainer.accumulate_grad_batches")
            assert told == (None if keys.global_batch_size else changed.num_micro_batches)


def test_yaml_lines_are_the_keys_nested() -> None:
    keys = {
        "model.lora.r": 8,
        "model.lora.dtype": "bfloat16",
        "data.batch_size": 1,
        "model.gradient_checkpointing": True,
    }
    assert yaml.safe_load(yaml_lines(keys)) == {
        "model": {"lora": {"r": 8, "dtype": "bfloat16"}, "gradient_checkpointing": True},
        "data": {"batch_size": 1},
    }


@pytest.mark.filterwarnings("ignore:LightningCLI's args")
def test_every_remedy_of_every_kind_is_read_by_the_parser_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path
) -> None:
    """All levels of all kinds, each as a file after an experiment's own."""
    from qlora_pl.cli import read_runs

    monkeypatch.chdir(ROOT)
    shape = shape_from_config(known_shape("llama-7b"))
    settings = [
        BIG,
        replace(BIG, optimizer="adamw_torch", attention="eager", method="dora"),
        replace(BIG, quant_type="none", method="none"),
        replace(BIG, quant_type="int8", optimizer="lion"),
    ]
    tried = []
    words = []
    for setting in settings:
        for keys in (
            KEYS,
            replace(KEYS, global_batch_size=None),
            replace(KEYS, max_length=512, max_target_length=2048, has_two_limits=True),
            replace(KEYS, tokens_per_batch=16384),
        ):
            for lever in levers_of(shape, setting, keys):
                for level in lever.levels:
                    if level.keys not in tried:
                        tried.append(level.keys)
                        file = tmp_path / f"{len(tried)}.yaml"
                        file.write_text(yaml_lines(level.keys))
                        words.append(_words(level.keys, file))
    assert len(tried) > 25
    assert {key for keys in tried for key in keys} >= {
        "data.batch_size",
        "data.max_length",
        "data.max_target_length",
        "data.tokens_per_batch",
        "model.attn_implementation",
        "model.gradient_checkpointing",
        "model.lora.dtype",
        "model.lora.method",
        "model.lora.r",
        "model.optimizer.name",
        "model.quantization.double_quant",
        "model.quantization.quant_type",
        "trainer.accumulate_grad_batches",
        "trainer.devices",
        "trainer.strategy",
    }
    for run, changes in zip(read_runs(words), tried, strict=True):
        for key, value in changes.items():
            found = run
            for part in key.split("."):
                found = found[part]
            assert found == value, key


def _words(changes: dict, file: Path) -> list[str]:
    """An experiment whose own keys leave the changes their meaning."""
    base = ["--config", "experiments/llama2_7b_guanaco.yaml"]
    if "data.max_target_length" not in changes:
        base += ["--data.encoding", "spans", "--data.max_target_length", "null"]
    return [*base, "--config", str(file)]
