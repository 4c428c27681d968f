"""``RunMetrics``: one row of numbers for each logged step, to every logger and to ``metrics.csv``.

A row is numbered by the optimizer steps done. It waits until the next step has ended, so that a
validation in between is part of it, and is part of every checkpoint while it waits. So a resumed
run drops the rows from its checkpoint's step on and writes them again: every step stands in the
history once. (Lightning's own counter lags behind here and there.) The last step is validated and
logged whatever the intervals say, so that what a run came to is what one step came to.
"""

from __future__ import annotations

import csv
import io
import json
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from qlora_pl.batch import FILLER_ROW
from qlora_pl.files import append_synced, write_atomic, write_json
from qlora_pl.modeling.compute import ComputeCost, compute_cost
from qlora_pl.modeling.module import StepStatistics
from qlora_pl.training.checkpoints.random_state import collect_random_states, restore_random_states
from qlora_pl.training.stopping import has_reached_its_end

COLUMNS = (
    "step",
    "epoch",
    "train/loss",
    "optim/lr",
    "optim/grad_norm",
    "throughput/tokens_per_second",
    "throughput/trained_tokens_per_second",
    "throughput/padding_ratio",
    "memory/peak_allocated_gib",
    "memory/reserved_over_allocated",
    "val/loss",
    "val/perplexity",
)
TOTALS = ("seconds", "rows", "tokens", "trained_tokens", "padded_tokens", "flops")


class RunMetrics(Callback):
    """Measures a run; writes ``metrics.csv`` while it goes on and ``metrics.json`` when it ends."""

    def __init__(self) -> None:
        self.totals = dict.fromkeys(TOTALS, 0.0)
        self.first: dict[str, float] = {}
        """Validation before training."""
        self.last: dict[str, float] = {}
        """Newest value of each metric."""
        self._row: dict[str, float] = {}
        self._written: dict[str, float] = {}
        """The last step's row, which a run that trains on writes again."""
        self._epochs = 0.0
        """Epochs done, in fractions."""
        self._earlier_seconds = 0.0
        """Runtime up to the checkpoint that this start resumed."""
        self._window = dict.fromkeys(TOTALS, 0.0)
        self._cost: ComputeCost | None = None
        self._last_statistics: dict[str, Any] | None = None
        """Of the last step, which a run that was stopped in its last validation logs later."""
        self._resumed_at: int | None = None
        self._peak_bytes = 0
        """Of memory before training, since counting may begin anew there."""
        self._began = self._started = time.perf_counter()

    # -- life of a run ---------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock."""
        self.folder = Path(trainer.default_root_dir)
        self._began = time.perf_counter()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Know the cost of a token."""
        self._cost = compute_cost(cast(nn.Module, pl_module.model))

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A sanity check over the whole split is the validation before training."""
        is_whole = trainer.num_sanity_val_steps == float("inf")
        if is_whole and (evaluation := getattr(pl_module, "last_evaluation", None)):
            self.first = dict(evaluation)
            self._row |= {"step": 0, "epoch": 0, **evaluation}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut the history back to the checkpoint; what the run came to before no longer holds."""
        self._written = {}
        self._peak_bytes = peak_memory_bytes()
        if self._resumed_at is not None and self._last_statistics is not None:
            cast(Any, pl_module).last_step = StepStatistics(**self._last_statistics)
        if self._resumed_at is not None and trainer.is_global_zero:
            self._truncate_table(self._resumed_at)
            self._reopen()
        self._last_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock of a micro-batch."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch's time; when an optimizer step has ended, add what it was made of."""
        self._window["seconds"] += time.perf_counter() - self._started
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self._flush(trainer)  # the row of the step before
        share = (batch_idx + 1) / trainer.num_training_batches
        self._epochs = round(trainer.current_epoch + share, 6)
        step = cast(StepStatistics, pl_module.last_step)
        self._last_statistics = asdict(step)
        self._add(step)
        pl_module.log("train/loss", step.loss, prog_bar=True, logger=False)
        self.last["train/loss"] = step.loss
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step == 1 or trainer.global_step % every == 0:
            self._row |= self._training_row(trainer, step)

    def _add(self, step: StepStatistics) -> None:
        assert self._cost is not None
        counts = (step.num_tokens, step.num_trained_tokens, step.num_token_pairs)
        self._window["rows"] += step.num_rows
        self._window["tokens"] += step.num_tokens
        self._window["trained_tokens"] += step.num_trained_tokens
        self._window["padded_tokens"] += step.num_padded_tokens
        self._window["flops"] += self._cost.of_step(*counts)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the validation to the step's row."""
        if trainer.state.fn != "fit":
            self._sum_rows(trainer)
            return
        if not trainer.sanity_checking:
            evaluation = cast(dict[str, float], pl_module.last_evaluation)
            self.last |= {**evaluation, "val/step": trainer.global_step}
            self._row |= {"step": trainer.global_step, "epoch": self._epochs, **evaluation}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate and log the last step, if that was not due anyway."""
        if pl_module.last_step is None:  # nothing was trained
            return
        if self.last.get("val/step") != trainer.global_step:
            validate_now(trainer)
        if "train/loss" not in self._row:
            self._row |= self._training_row(trainer, cast(StepStatistics, pl_module.last_step))
        self._written = dict(self._row)
        self._flush(trainer)

    # -- evaluation ------------------------------------------------------------------------------

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the rows that ``validate`` and ``test`` scored."""
        if trainer.state.fn != "fit":
            self.totals["rows"] += int((batch["row_ids"] != FILLER_ROW).sum())

    on_test_batch_end = on_validation_batch_end

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the prompts answered."""
        self.totals["rows"] += len(outputs)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up the rows of all devices."""
        self._sum_rows(trainer)

    on_predict_end = on_test_end

    def _sum_rows(self, trainer: Trainer) -> None:
        own = torch.tensor(int(self.totals["rows"]), device=trainer.strategy.root_device)
        self.totals["rows"] = float(trainer.strategy.reduce(own, reduce_op="sum"))

    # -- the end ---------------------------------------------------------------------------------

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``metrics.json``; Lightning comes here only when the command went well."""
        self._close_window()
        if trainer.is_global_zero:
            write_json(self.folder / "metrics.json", self._summary(trainer, pl_module, stage))

    def _summary(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, Any]:
        if stage != "fit":
            evaluation = cast(dict[str, float], pl_module.last_evaluation)
            return {
                "command": stage,
                "checkpoint": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
                "runtime_seconds": self._runtime_seconds(),
                "rows": int(self.totals["rows"]),
                **evaluation,
            }
        seconds = max(self.totals["seconds"], 1e-9)
        return {
            "command": "fit",
            "is_complete": has_reached_its_end(trainer),
            "step": trainer.global_step,
            "epoch": self._epochs,
            "max_steps": trainer.max_steps,
            "max_epochs": trainer.max_epochs,
            **self.last,
            "before": self.first,
            "runtime_seconds": self._runtime_seconds(),
            "training_seconds": seconds,
            "samples_per_second": self.totals["rows"] / seconds,
            "tokens_per_second": self.totals["tokens"] / seconds,
            "trained_tokens_per_second": self.totals["trained_tokens"] / seconds,
            **{name: int(self.totals[name]) for name in TOTALS if name != "seconds"},
            "out_of_memory_splits": cast(int, pl_module.runner.num_splits),  # type: ignore[union-attr]
            "micro_batch_pieces": cast(int, pl_module.runner.num_pieces),  # type: ignore[union-attr]
            "flops_per_second": self.totals["flops"] / seconds,
        }

    def _runtime_seconds(self) -> float:
        return self._earlier_seconds + time.perf_counter() - self._began

    def _reopen(self) -> None:
        """A finished run that trains on is unfinished until it ends again, however it ends."""
        path = self.folder / "metrics.json"
        if path.exists():
            write_json(path, {**json.loads(path.read_text()), "is_complete": False})

    # -- rows ------------------------------------------------------------------------------------

    def _training_row(self, trainer: Trainer, step: StepStatistics) -> dict[str, float]:
        window = self._window
        seconds = max(window["seconds"], 1e-9)
        row = {
            "step": trainer.global_step,
            "epoch": self._epochs,
            "train/loss": step.loss,
            "optim/lr": step.learning_rate,
            "optim/grad_norm": step.grad_norm,
            "throughput/tokens_per_second": window["tokens"] / seconds,
            "throughput/trained_tokens_per_second": window["trained_tokens"] / seconds,
            "throughput/padding_ratio": 1 - window["tokens"] / max(window["padded_tokens"], 1),
            "memory/peak_allocated_gib": max(self._peak_bytes, peak_memory_bytes()) / 2**30,
        }
        if torch.cuda.is_available() and (allocated := torch.cuda.max_memory_allocated()):
            row["memory/reserved_over_allocated"] = torch.cuda.max_memory_reserved() / allocated
        self._close_window()
        return row

    def _close_window(self) -> None:
        for name in TOTALS:
            self.totals[name] += self._window[name]
            self._window[name] = 0.0

    def _flush(self, trainer: Trainer) -> None:
        """Hand the step's row to the loggers and the table."""
        row, self._row = self._row, {}
        if not row:
            return
        step = int(row["step"])
        values = {name: value for name, value in row.items() if name not in ("step", "epoch")}
        self.last |= values
        for log in trainer.loggers:
            log.log_metrics(values, step=step)
        if trainer.is_global_zero:
            self._append_to_table(row)

    # -- metrics.csv -----------------------------------------------------------------------------

    @property
    def _table(self) -> Path:
        return self.folder / "metrics.csv"

    def _append_to_table(self, row: dict[str, float]) -> None:
        lines = io.StringIO(newline="")
        writer = csv.DictWriter(lines, self._columns(), extrasaction="ignore")
        if not self._table.exists():
            writer.writeheader()
        writer.writerow(row)
        append_synced(self._table, lines.getvalue())

    def _columns(self) -> Sequence[str]:
        """Of the table; one that an earlier version began keeps those it has."""
        if not self._table.exists():
            return COLUMNS
        with self._table.open(newline="") as file:
            return next(csv.reader(file), None) or COLUMNS

    def history(self) -> list[dict[str, float]]:
        """Every logged row so far, the one that waits included, without what measures time."""
        rows: dict[int, dict[str, float]] = {}
        if self._table.exists():
            with self._table.open(newline="") as file:
                for line in csv.DictReader(file):
                    row = {name: float(value) for name, value in line.items() if value}
                    rows[int(row["step"])] = row
        if waiting := self._row or self._written:
            rows[int(waiting["step"])] = dict(waiting)
        measured = ("throughput/", "memory/")
        return [
            {name: value for name, value in rows[step].items() if not name.startswith(measured)}
            for step in sorted(rows)
        ]

    def _truncate_table(self, step: int) -> None:
        """Drop the rows from a step on, and a row that a kill cut short."""
        if not self._table.exists():
            return
        kept, columns = io.StringIO(newline=""), self._columns()
        writer = csv.DictWriter(kept, columns)
        writer.writeheader()
        with self._table.open(newline="") as file:
            for row in csv.DictReader(file):
                is_whole = all(row.get(name) is not None for name in columns)
                if is_whole and int(row["step"]) < step:
                    writer.writerow(row)
        write_atomic(self._table, kept.getvalue())

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Totals up to the save and the row that waits, in a checkpoint."""
        return {
            "row": dict(self._row or self._written),
            "epochs": self._epochs,
            "runtime_seconds": self._runtime_seconds(),
            "totals": {name: self.totals[name] + self._window[name] for name in TOTALS},
            "first": dict(self.first),
            "last": dict(self.last),
            "last_step": self._last_statistics,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting; a command that does not train counts its own."""
        if self._resumed_at is None:
            return
        self._epochs = state_dict["epochs"]
        self._earlier_seconds = state_dict["runtime_seconds"]
        self._row = dict(state_dict["row"])
        self.totals = dict(state_dict["totals"])
        self.first, self.last = dict(state_dict["first"]), dict(state_dict["last"])
        self._last_statistics = state_dict.get("last_step")

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember where the history is taken up; Lightning restores the counts after this."""
        if trainer.state.fn == "fit":
            self._resumed_at = int(checkpoint["global_step"])


def validate_now(trainer: Trainer) -> None:
    """Run the validation loop where training stands, as Lightning does between two steps.

    Draws no random number, changes no weight, and does nothing where there are no rows.
    """
    if not trainer.enable_validation:
        return
    states = collect_random_states()
    trainer.lightning_module.on_validation_model_zero_grad()  # room for the activations
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    restore_random_states(states)


def peak_memory_bytes() -> int:
    """The device's peak of allocated memory; on a CPU, the process's peak resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # in KiB on Linux
