"""What would make a run fit: tried through the plan, ranked by its cost, written as YAML."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qlora_pl.planning.advice.levels import DEVICES, LESS, NEARLY, SAME
from qlora_pl.planning.advice.levers import levers_of
from qlora_pl.planning.advice.remedies import Remedy, advise, applied, yaml_lines
from qlora_pl.planning.advice.verdict import judge
from qlora_pl.planning.memory.memory_plan import plan_memory
from qlora_pl.planning.memory.training_setting import TrainingSetting
from qlora_pl.planning.runs.run_keys import RunKeys
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


def test_where_only_more_gpus_are_enough_alone_combinations_on_one_are_told_too(
    llama7b: ModelShape,
) -> None:
    setting = TrainingSetting(
        quant_type="none", double_quant=False, batch_size=2, tokens_per_row=2048, r=256
    )
    keys = replace(KEYS, accumulation=8, global_batch_size=16)
    plans = [
        plan_memory(llama7b, applied(setting, [level]))
        for lever in levers_of(llama7b, setting, keys)
        if not lever.adds_devices
        for level in lever.levels
    ]
    least = min(plan.total - plan.pageable for plan in plans)
    remedies = advise(llama7b, setting, Card(name="less", memory_bytes=least * 9 // 10), keys)
    numbers = {(len(r.levels) > 1, r.setting.num_devices > 1) for r in remedies.remedies}
    assert numbers == {(True, False), (False, True)}


def test_every_single_change_that_is_enough_is_listed_beside_the_cheapest(
    llama7b: ModelShape,
) -> None:
    """Smaller micro-batches alone would do; a user may rather cut rows, or add a GPU."""
    setting = replace(BIG, gradient_checkpointing=True, batch_size=64, num_micro_batches=1)
    keys = replace(KEYS, accumulation=1, global_batch_size=64)
    card = card_named("40GiB")
    names = named(advise(llama7b, setting, card, keys).remedies)
    alone = [
        lever.name
        for lever in levers_of(llama7b, setting, keys)
        if judge(plan_memory(llama7b, applied(setting, lever.levels[-1:])), card).fits
    ]
    assert len(names) == len(alone) >= 2
    assert names[0] == "data.batch_size"
    assert "data.max_length" in names


@pytest.mark.parametrize(
    ("overlong", "lost", "keys", "words"),
    [
        ("cut", 0.2, {"data.max_lost_ratio": 0.21}, "20.0% of the trained tokens are cut off"),
        ("cut", 0.001, {}, "0.1% of the trained tokens are cut off"),
        ("drop", 0.2, {"data.max_lost_ratio": 0.21}, "are in rows that are left out"),
        ("split", 0.0, {}, "0.0% of the trained tokens are lost, as longer rows are split"),
        ("error", 0.001, {"data.overlong": "cut"}, "cut off"),
        ("cut", None, {}, "data.max_lost_ratio allows 1.0%"),
    ],
)
def test_shorter_rows_come_with_the_keys_without_which_fit_would_refuse_them(
    overlong: str, lost: float | None, keys: dict, words: str, llama7b: ModelShape
) -> None:
    said = replace(
        KEYS, overlong=overlong, share_lost=None if lost is None else lambda length: lost
    )
    (lever,) = [its for its in levers_of(llama7b, BIG, said) if its.name == "length"]
    for level in lever.levels:
        assert level.keys == {"data.max_length": level.keys["data.max_length"], **keys}
        assert words in level.cost


def test_a_micro_batch_is_no_free_choice_where_each_weighs_the_same(llama7b: ModelShape) -> None:
    """``normalize_loss_by: micro_batches``, the original's mean of means."""
    keys = replace(KEYS, weighs_micro_batches=True)
    (lever,) = [its for its in levers_of(llama7b, BIG, keys) if its.name == "micro-batch"]
    assert {level.price for level in lever.levels} == {NEARLY}
    assert "rows weigh otherwise" in lever.levels[0].cost


def test_where_it_fits_with_paging_what_does_without_is_told(llama7b: ModelShape) -> None:
    setting = TrainingSetting(tokens_per_row=512)
    plan = plan_memory(llama7b, setting)
    card = Card(name="tight", memory_bytes=plan.total - plan.pageable // 2)
    assert judge(plan, card).kind == "fits with paging"
    remedies = advise(llama7b, setting, card, KEYS).remedies
    assert {remedy.verdict.kind for remedy in remedies} == {"fits"}
    assert "model.optimizer.name" in named(remedies)


def test_the_steps_of_a_limit_begin_at_the_longest_row(llama7b: ModelShape) -> None:
    """A limit that no row comes near is not lowered to another one of that kind."""
    setting = replace(BIG, tokens_per_row=800)
    (lever,) = [its for its in levers_of(llama7b, setting, KEYS) if its.name == "length"]
    assert [level.keys["data.max_length"] for level in lever.levels] == [576, 384, 192]


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
