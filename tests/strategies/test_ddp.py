"""Two processes over gloo: what they exchange, and that it gives the steps of one process.

All runs happen in one pair of processes (``rank_runs.py``); the exactness of gradients is in
tests/test_exact_gradients_in_runs.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import save_base
from gloo import run_processes
from memory_runs import apart, train, trained
from rank_runs import PLANS, SHORTAGES, TRAFFIC

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.steps.step import StepSums, refuse_other_sums
from qlora_pl.strategies.choice import refuse_other_strategies, strategy_named
from qlora_pl.strategies.ddp import AdapterDDP

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process

QUICK = [
    "different",
    "overflow",
    "undisturbed",
    "shortage: one after the other",
    "traffic: 4",
    "gradients",
]
SLOW = ["shortage: rank 1", "shortage: both", "traffic: 2", "traffic: larger", "wrapper", "predict"]
CLOSE = 1e-6
"""As in tests/modeling/test_out_of_memory.py; measured: 3e-8."""

Ranks = Callable[[str], list[dict[str, Any]]]


def runs(kind: str, *names: str) -> list[Any]:
    """Parameters, those of the longer start marked."""
    return [
        pytest.param(n, marks=[pytest.mark.slow] if f"{kind}: {n}" in SLOW else []) for n in names
    ]


@pytest.fixture(scope="module")
def ranks(tiny_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What both ranks noted of a run, by its name; starts the processes when first asked."""
    folder = tmp_path_factory.mktemp("ranks")
    larger = save_base(folder / "larger", vocab_size=2048)
    settings: dict[str, Any] = {"folder": str(folder), "base": str(tiny_base)}
    settings["larger"] = str(larger)
    settings["rows"] = str(rows_file)
    said: dict[str, str] = {}

    def get(run: str) -> list[dict[str, Any]]:
        group = QUICK if run in QUICK else SLOW
        if group[0] not in said:
            program = Path(__file__).parent / "rank_runs.py"
            said[group[0]] = "failed, see the first test"
            said[group[0]] = run_processes(program, 2, settings | {"runs": group})
        noted = [torch.load(folder / f"{run}-{rank}.pt") for rank in range(2)]
        return [note | {"said": said[group[0]]} for note in noted]

    return get


# --- what is exchanged ----------------------------------------------------------------------------


@pytest.mark.parametrize("run", runs("traffic", "2", "4", "larger"))
def test_a_step_exchanges_the_adapters_gradients_and_a_few_numbers(run: str, ranks: Ranks) -> None:
    """However many micro-batches it has, and whatever the base; checkpointing is on.

    A number for each tensor says whether it has a gradient. Single numbers, whether a signal came,
    go with micro-batches. Source: torch's profiler, which sees what C++ sends too.
    """
    for noted in ranks(f"traffic: {run}"):
        sizes = noted["sizes"]
        own = [("all_reduce", sum(sizes) + len(sizes)), ("all_reduce", len(StepSums._fields))]
        _, first, _, last = noted["parts"]  # the first step is saved when the second begins
        assert [sent for sent in first if sent[1] > 1] == own
        assert [sent for sent in last if sent[1] > 1] == own
        assert len(first) <= len(own) + 2 * TRAFFIC[run][0]
        assert noted["type"] == "QLoRAModule"


@pytest.mark.parametrize("run", runs("traffic", "4", "larger"))
def test_nothing_of_the_base_is_sent_before_training(run: str, ranks: Ranks) -> None:
    """Digests and other small objects are, as pickled bytes."""
    for noted in ranks(f"traffic: {run}"):
        before = [size for _, size in noted["parts"][0]]
        assert 0 < max(before) < 5000


@pytest.mark.slow
def test_torchs_own_wrapper_would_send_all_of_the_base(ranks: Ranks) -> None:
    for noted in ranks("wrapper"):
        sent = sum(size for name, size in noted["traffic"] if name == "broadcast")
        assert sent >= noted["elements"] > 100_000


@pytest.mark.slow
def test_validating_sends_nothing_of_the_base_either(ranks: Ranks) -> None:
    for noted in ranks("predict"):
        assert 0 < max(size for _, size in noted["traffic"]) < 5000


@pytest.mark.slow
def test_every_row_is_answered_and_all_ranks_have_one_score(ranks: Ranks) -> None:
    first, second = ranks("predict")
    assert sorted([*first["rows"], *second["rows"]]) == [0, 1]
    assert first["scores"] == second["scores"]


def test_gradients_that_a_rank_has_none_of_count_as_zero(ranks: Ranks) -> None:
    """Source: sums of what both had; one that nobody has stays none, for the optimizer to skip."""
    first, second = ranks("gradients")
    for place, (a, b) in enumerate(zip(first["before"], second["before"], strict=True)):
        present = [gradient for gradient in (a, b) if gradient is not None]
        assert len(present) == (1 if place in (1, 2) else 0 if place == 8 else 2)
        for noted in (first, second):
            after = noted["after"][place]
            if not present:
                assert after is None
            else:
                assert torch.equal(after, sum(present[1:], start=present[0]))


# --- agreement ------------------------------------------------------------------------------------


def test_ranks_that_do_not_begin_alike_are_stopped_by_name(ranks: Ranks) -> None:
    messages = {noted["message"] for noted in ranks("different")}
    (message,) = messages
    assert "rank 1 starts from other values than rank 0 in 'model.base_model.model." in message
    assert "\n" not in message


def test_an_overflow_of_one_rank_leaves_the_step_out_on_both(ranks: Ranks) -> None:
    """Source: torch's rule for the scale, as in tests/modeling/test_mixed_precision.py."""
    first, second = ranks("overflow")
    expected = [(False, 16.0), (True, 16.0), (False, 8.0), (False, 8.0)]
    assert first["steps"] == second["steps"] == expected
    for ours, theirs in zip(first["weights"], second["weights"], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert all(tensor.isfinite().all() for tensor in ours.values())
    moved = apart(first["weights"][0], first["weights"][1]), apart(*first["weights"][1:3])
    assert moved[0] == 0 < moved[1]


# --- running out of memory ------------------------------------------------------------------------


def test_two_ranks_train_what_one_process_trains(
    ranks: Ranks, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"data": {"batch_size": 8}, "trainer": {"max_steps": 4}}
    one = trained(train(tmp_path, tiny_base, rows_file, **settings))
    for noted in ranks("undisturbed"):
        assert apart(noted["trained"], one) <= CLOSE


@pytest.mark.parametrize("name", runs("shortage", *SHORTAGES))
def test_ranks_agree_on_the_pieces_and_have_the_same_gradient(name: str, ranks: Ranks) -> None:
    """Near the run without shortages, and byte for byte the one that planned its pieces."""
    noted = ranks(f"shortage: {name}")
    for rank, own in enumerate(noted):
        short, planned = own["short"], own["planned"]
        here = [shortage for shortage in SHORTAGES[name] if shortage.rank == rank]
        assert own["raised"] == [(shortage.batch, shortage.phase) for shortage in here]
        assert apart(short, ranks("undisturbed")[rank]["trained"]) <= CLOSE
        assert all(torch.equal(short[key], planned[key]) for key in short)
        assert all(torch.equal(short[key], noted[0]["short"][key]) for key in short)
        assert own["pieces"] == max(PLANS[name].values())
    assert noted[0]["metrics"]["out_of_memory_splits"] == len(SHORTAGES[name])


def test_each_split_is_logged_once_and_names_its_rank(ranks: Ranks) -> None:
    said = ranks("shortage: one after the other")[0]["said"]
    assert said.count("Step 3, micro-batch 1 of rank 1 (4 rows, ") == 1
    assert said.count("ran out of memory in 2 pieces and was repeated in 4") == 1
    assert said.count("ran out of memory") == 2


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["ddp_find_unused_parameters_true", "ddp_spawn", "deepspeed", "dp", "ddpp"]
)
def test_other_strategies_are_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        refuse_other_strategies(SimpleNamespace(strategy=name, sync_batchnorm=False))
    (problem,) = caught.value.problems
    assert problem.startswith(f"trainer.strategy: '{name}' is not offered; take ddp, ")
    assert "fsdp2" in problem


def test_a_class_of_another_library_and_batch_normalisation_are_refused() -> None:
    other = SimpleNamespace(class_path="lightning.pytorch.strategies.DDPStrategy")
    with pytest.raises(ConfigurationError) as caught:
        refuse_other_strategies(SimpleNamespace(strategy=other, sync_batchnorm=True))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "trainer.strategy",
        "trainer.sync_batchnorm",
    ]
    ours = SimpleNamespace(class_path="qlora_pl.strategies.ddp.AdapterDDP")
    refuse_other_strategies(SimpleNamespace(strategy=ours, sync_batchnorm=False))


def test_lightnings_own_choice_for_several_devices_is_ours() -> None:
    from lightning.pytorch import Trainer

    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy_named("auto"), logger=False)
    assert type(trainer.strategy) is AdapterDDP
    refuse_other_sums(trainer)


def test_a_strategy_that_nobody_knows_is_refused_before_weights_are_loaded() -> None:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import DDPStrategy

    trainer = Trainer(accelerator="cpu", devices=2, strategy=DDPStrategy(), logger=False)
    with pytest.raises(ConfigurationError, match="use those of qlora_pl"):
        refuse_other_sums(trainer)
