"""A micro-batch that does not fit into memory is repeated in pieces, with the same gradient.

The references are the run in which memory suffices, and the run in which the same pieces were
planned; the error is raised inside the model, in the middle of a forward or a backward pass.
"""

from __future__ import annotations

import logging
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_runs import KillAt, Killed, one_thread  # noqa: F401
from families import Saver
from lightning.pytorch import Callback, Trainer
from memory_runs import Plan, Shortage, Shortages, apart, find_layers, metrics, train, trained

from qlora_pl.batch import IGNORE_INDEX
from qlora_pl.data.rows.encoded_rows import EncodedRows
from qlora_pl.errors import TrainingStoppedError
from qlora_pl.modeling.answers.decoding import DecodingConfig
from qlora_pl.modeling.steps.loss import causal_lm_loss, trained_weight
from qlora_pl.modeling.steps.out_of_memory import is_out_of_memory
from qlora_pl.modeling.steps.splitting import split_batch
from qlora_pl.training.watching.samples import SampleWriter

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process

CLOSE = 1e-6
"""How far adapters of two float32 runs may be apart that add up in another order: SGD moves them by
the gradients themselves, clipped to a norm of 0.3 at a rate of 1. Measured: 3e-8."""


# --- cutting --------------------------------------------------------------------------------------


def make_packed(*lines: list[int], width: int = 12) -> dict[str, Any]:
    """Packed lines of rows of these lengths; each row's tokens but its first are trained."""
    shape = (len(lines), width)
    batch = {
        "input_ids": torch.arange(3, 3 + shape[0] * width).reshape(shape),
        "labels": torch.full(shape, IGNORE_INDEX),
        "position_ids": torch.zeros(shape, dtype=torch.int64),
    }
    for line, lengths in enumerate(lines):
        start = 0
        for length in lengths:
            span = slice(start, start + length)
            batch["position_ids"][line, span] = torch.arange(length)
            batch["labels"][line, start + 1 : start + length] = batch["input_ids"][
                line, start + 1 : start + length
            ]
            start += length
        batch["position_ids"][line, start:] = torch.arange(width - start)
    lengths_of_rows = [length for line in lines for length in line]
    batch["document_lengths"] = torch.tensor(lengths_of_rows)
    batch["row_ids"] = torch.arange(len(lengths_of_rows))
    return batch


@pytest.mark.parametrize("num_pieces", [1, 2, 4, 8])
def test_padded_pieces_are_the_lines_in_their_order(num_pieces: int) -> None:
    batch = {
        "input_ids": torch.arange(21).reshape(7, 3),
        "row_ids": torch.arange(7),
        "prompts": list("abcdefg"),
    }
    pieces = split_batch(batch, num_pieces)
    assert len(pieces) == min(num_pieces, 7)
    sizes = [len(piece["input_ids"]) for piece in pieces]
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(torch.cat([piece["input_ids"] for piece in pieces]), batch["input_ids"])
    assert "".join("".join(piece["prompts"]) for piece in pieces) == "abcdefg"


@pytest.mark.parametrize("num_pieces", [1, 2, 4, 8, 16])
def test_packed_lines_are_dealt_out_and_then_cut_between_rows(num_pieces: int) -> None:
    """Every trained token is in exactly one piece, and every row in one piece as a whole."""
    batch = make_packed([5, 4], [12], [3, 3, 3])
    pieces = split_batch(batch, num_pieces)
    assert len(pieces) == {1: 1, 2: 2, 4: 5, 8: 6, 16: 6}[num_pieces]
    labels = [piece["labels"][piece["labels"] != IGNORE_INDEX] for piece in pieces]
    assert torch.equal(torch.cat(labels), batch["labels"][batch["labels"] != IGNORE_INDEX])
    for piece in pieces:
        assert (piece["position_ids"][:, 0] == 0).all()
        assert piece["input_ids"].shape == piece["labels"].shape == piece["position_ids"].shape


def test_only_errors_that_mean_too_little_memory_are_taken_for_it() -> None:
    """The CPU's message is the one that torch gives for an allocation of 2 ** 60 bytes."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))


# --- runs -----------------------------------------------------------------------------------------


def compare(
    folder: Path, base: Path, rows: Path, *shortages: Shortage, pieces: int = 2, **settings: Any
) -> tuple[Any, Shortages]:
    """A run with shortages: near the run without any, and equal to one that planned its pieces."""
    undisturbed = trained(train(folder / "undisturbed", base, rows, **settings))
    injector = Shortages(*shortages)
    module = train(folder / "short", base, rows, injector, **settings)
    first = min(shortage.batch for shortage in shortages)
    plan = Plan({(0, first): pieces})
    planned = trained(train(folder / "planned", base, rows, plan, **settings))
    ours = trained(module)
    assert len(injector.raised) == sum(shortage.times for shortage in shortages)
    assert apart(ours, undisturbed) <= CLOSE
    assert all(torch.equal(ours[name], planned[name]) for name in planned)
    assert module.runner.num_pieces == pieces
    return module, injector


@pytest.mark.parametrize(
    ("batch", "phase"),
    [
        (0, "forward"),
        (3, "backward"),
        pytest.param(0, "backward", marks=pytest.mark.slow),
        pytest.param(3, "forward", marks=pytest.mark.slow),
    ],
)
def test_a_micro_batch_that_does_not_fit_is_repeated_in_halves(
    phase: str, batch: int, tiny_base: Path, rows_file: Path, tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level(logging.WARNING, "qlora_pl")
    _, injector = compare(tmp_path, tiny_base, rows_file, Shortage(batch, phase))
    if phase == "backward":
        assert (
            injector.partial_gradients[0] >= 14
        )  # of the last layer, or of the micro-batch before
    (said,) = [r.getMessage() for r in caplog.records if "ran out of memory" in r.getMessage()]
    assert "\n" not in said
    assert f"Step {batch // 2 + 1}, micro-batch {batch % 2 + 1} of rank 0 (4 rows, " in said
    assert "in 1 piece and was repeated in 2, with the same gradient." in said
    assert "dropout" not in said
    assert metrics(tmp_path / "short")["out_of_memory_splits"] == 1
    assert metrics(tmp_path / "short")["micro_batch_pieces"] == 2
    assert metrics(tmp_path / "undisturbed")["out_of_memory_splits"] == 0


def test_a_half_that_does_not_fit_either_is_halved(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    shortage = Shortage(2, "backward", times=2)
    compare(tmp_path, tiny_base, rows_file, shortage, pieces=4, gradient_checkpointing=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_shortages_at_random_places_change_nothing_but_the_rounding(
    seed: int, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    times = draw.choice([1, 2])
    place = Shortage(draw.randrange(5), draw.choice(["forward", "backward"]), times)
    compare(tmp_path, tiny_base, rows_file, place, pieces=2**times)


def test_later_shortages_make_smaller_pieces(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    injector = Shortages(Shortage(1, "forward"), Shortage(4, "backward"))
    ours = trained(train(tmp_path / "short", tiny_base, rows_file, injector))
    plan = Plan({(0, 1): 2, (0, 4): 4})
    planned = trained(train(tmp_path / "planned", tiny_base, rows_file, plan))
    assert all(torch.equal(ours[name], planned[name]) for name in planned)
    assert metrics(tmp_path / "short")["out_of_memory_splits"] == 2


SHAPES: dict[str, dict[str, Any]] = {
    "packed": {"batch_size": 2, "packing": True},
    "one pack": {"batch_size": 1, "packing": True, "max_length": 96},
    "token budget": {"tokens_per_batch": 192},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_packs_and_token_budgets_are_split_too(
    shape: str, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    compare(tmp_path, tiny_base, rows_file, Shortage(1, "backward"), data=SHAPES[shape])


@pytest.mark.parametrize("by", ["rows", "micro_batches"])
def test_the_mean_is_that_of_the_whole_micro_batch(
    by: str, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    compare(tmp_path, tiny_base, rows_file, Shortage(1), normalize_loss_by=by)


@pytest.mark.parametrize("by", ["tokens", "micro_batches"])
def test_losses_keep_their_weights(
    by: str, tiny_base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(rows: EncodedRows, row: int) -> np.ndarray:
        return np.linspace(0, 1 + row % 3, rows.lengths[row], dtype=np.float32)

    monkeypatch.setattr(EncodedRows, "weights", weights, raising=False)
    compare(tmp_path, tiny_base, rows_file, Shortage(2, "backward"), normalize_loss_by=by)


def test_pairs_of_source_and_target_are_split_too(
    saved: Saver, rows_file: Path, tmp_path: Path
) -> None:
    compare(tmp_path, saved("T5"), rows_file, Shortage(2, "backward"))


def test_products_in_float16_keep_their_scale(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    ours = Shortages(Shortage(1, "backward"))
    short = train(tmp_path / "short", tiny_base, rows_file, ours, compute="float16")
    plan = Plan({(0, 1): 2})
    planned = train(tmp_path / "planned", tiny_base, rows_file, plan, compute="float16")
    assert short.last_step is not None
    assert short.last_step.loss_scale == 16.0
    assert not short.last_step.is_skipped
    assert all(torch.equal(t, trained(planned)[name]) for name, t in trained(short).items())


def test_masks_depend_on_the_pieces_alone_and_the_log_says_that_they_are_new(
    tiny_base: Path, rows_file: Path, tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level(logging.WARNING, "qlora_pl")
    ours = train(tmp_path / "a", tiny_base, rows_file, Shortages(Shortage(1)), dropout=0.1)
    planned = train(tmp_path / "b", tiny_base, rows_file, Plan({(0, 1): 2}), dropout=0.1)
    assert all(torch.equal(t, trained(planned)[name]) for name, t in trained(ours).items())
    assert "the dropout masks of this micro-batch were redrawn" in caplog.text


def test_a_resumed_run_goes_on_with_the_pieces_that_were_agreed_on(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    whole = train(tmp_path / "whole", tiny_base, rows_file, Shortages(Shortage(1)))
    with pytest.raises(Killed):
        train(tmp_path / "killed", tiny_base, rows_file, Shortages(Shortage(1)), KillAt(2))
    resumed = train(tmp_path / "killed", tiny_base, rows_file)
    assert resumed.runner.num_pieces == 2
    assert all(torch.equal(t, trained(whole)[name]) for name, t in trained(resumed).items())
    assert metrics(tmp_path / "killed")["out_of_memory_splits"] == 1


def test_a_single_row_that_does_not_fit_stops_the_run_by_its_name(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingStoppedError) as caught:
        train(tmp_path, tiny_base, rows_file, Shortages(Shortage(2, times=9)))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("Step 2: out of memory with a single row, which cannot be split (")
    assert "rows.jsonl" in message
    assert " tokens); lower data.max_length, turn model.gradient_checkpointing on" in message
    assert caught.value.exit_code == 1


class SharedFrom(Callback):
    """From a micro-batch on the strategy says that ranks share the model."""

    def on_train_batch_start(
        self, trainer: Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 3:
            trainer.strategy.shards_parameters = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_shared", [False, True])
def test_where_nothing_may_be_repeated_the_run_names_what_to_set(
    is_shared: bool, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    on_oom, more = ("split", [SharedFrom()]) if is_shared else ("stop", [])
    with pytest.raises(TrainingStoppedError) as caught:
        train(tmp_path, tiny_base, rows_file, Shortages(Shortage(3)), *more, on_oom=on_oom)
    message = str(caught.value)
    assert message.startswith("Step 2: out of memory with a batch of 4 lines and ")
    assert "set data.batch_size: 2, and continue with --ckpt_path last." in message
    assert ("ranks that share a model" in message) is is_shared


class EvaluationShortage(Callback):
    """Memory for two lines, where nothing is trained."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.sizes: list[int] = []

    def on_sanity_check_start(self, trainer: Trainer, module: Any) -> None:
        layer, *_ = find_layers(module)
        layer.register_forward_pre_hook(self._look)

    on_predict_start = on_sanity_check_start

    def _look(self, layer: Any, inputs: Any) -> None:
        if not torch.is_grad_enabled():
            self.sizes.append(len(inputs[0]))
            if len(inputs[0]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")


def test_validation_batches_are_split_and_score_the_same(
    tiny_base: Path, rows_file: Path, tmp_path: Path, caplog: Any
) -> None:
    """1e-6: float32 sums in another order."""
    settings: dict[str, Any] = {
        "data": {"val_size": 7, "eval_batch_size": 7},
        "trainer": {"max_steps": 1, "limit_val_batches": 1.0},
    }
    whole = train(tmp_path / "whole", tiny_base, rows_file, **settings)
    shortage = EvaluationShortage()
    split = train(tmp_path / "split", tiny_base, rows_file, shortage, **settings)
    assert shortage.sizes[:2] == [7, 3]  # and then 1, 2, 2, 2
    assert max(shortage.sizes[2:]) == 2
    assert split.last_evaluation["val/loss"] == pytest.approx(
        whole.last_evaluation["val/loss"], rel=1e-6
    )
    assert split.runner.num_evaluation_pieces == 4
    assert "go through the model in 4 pieces instead of 2" in caplog.text


def test_samples_are_asked_in_pieces_too_or_the_run_says_why_it_stops(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "data": {"val_size": 4, "eval_batch_size": 2},  # which fit
        "trainer": {"max_steps": 1},
    }
    samples = partial(SampleWriter, num_prompts=4, decoding=DecodingConfig(max_new_tokens=4))
    train(tmp_path / "whole", tiny_base, rows_file, samples(), **settings)
    shortage = EvaluationShortage()
    train(tmp_path / "split", tiny_base, rows_file, shortage, samples(), **settings)
    whole, split = ((tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "split"))
    assert split == whole
    assert max(shortage.sizes) > 2
    more = (EvaluationShortage(), samples())
    with pytest.raises(TrainingStoppedError, match="out of memory"):
        train(tmp_path / "stop", tiny_base, rows_file, *more, on_oom="stop", **settings)


def test_the_weight_of_a_micro_batch_is_what_its_loss_is_divided_by(tiny_base: Path) -> None:
    """Source: the loss itself, asked for a sum."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    batch = make_packed([5, 4], [3, 3, 3])
    weighted = batch | {"loss_weights": torch.rand(batch["labels"].shape)}
    for some in (batch, weighted):
        assert trained_weight(some) == pytest.approx(float(causal_lm_loss(model, some).weight))
