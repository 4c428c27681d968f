"""``PlannedRun``: what is planned, whether it was named by a training file or by a few flags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_pl.data.batches.global_batch import accumulation_of
from qlora_pl.planning.advice.automatic import USABLE, Choice, strategy_for
from qlora_pl.planning.memory.memory_plan import MemoryPlan, plan_memory
from qlora_pl.planning.memory.training_setting import Strategy, TrainingSetting
from qlora_pl.planning.runs.assumed_run import AssumedRun
from qlora_pl.planning.runs.run_keys import RunKeys
from qlora_pl.planning.shapes.known_shapes import known_shape
from qlora_pl.planning.shapes.model_shape import ModelShape, shape_from_config
from qlora_pl.planning.work.cards import Card
from qlora_pl.planning.work.disk import DiskNeed, disk_need
from qlora_pl.planning.work.operations import Batch, RunTime, micro_batch_time, run_time
from qlora_pl.planning.work.step_work import average_batch, work_of

if TYPE_CHECKING:
    from qlora_pl.planning.runs.run_rows import RowFacts


@dataclass(frozen=True, kw_only=True)
class AutoCut:
    """What the micro-batches of a run may be where it chooses them itself."""

    choices: tuple[Choice, ...]
    """What is wanted most first."""
    rows_of_step: int | None
    """On each device; None: the size of a micro-batch is not chosen."""
    most_trained: Callable[[int], int] | None = None
    """Trained tokens of that many rows, at most; None: the rows were not read."""

    def applied(self, setting: TrainingSetting, choice: Choice) -> TrainingSetting:
        """A setting with one of the choices."""
        setting = replace(setting, gradient_checkpointing=choice.recomputes)
        if self.rows_of_step is None:
            return setting
        size = choice.batch_size
        return replace(
            setting,
            batch_size=size,
            num_micro_batches=self.rows_of_step // size,
            trained_tokens=None if self.most_trained is None else self.most_trained(size),
            has_mask=not setting.is_packed,
        )


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run, before it is held against any card."""

    name: str
    base: str
    """As the user named it."""
    shape: ModelShape
    setting: TrainingSetting
    keys: RunKeys
    chooses_dtype: bool
    """Whether the card decides between bfloat16 and float16."""
    chooses_strategy: bool
    """Whether the card's memory decides between ddp and fsdp2."""
    num_micro_batches: float | None
    """Of the whole run on each device; None: not known."""
    num_steps: int | None
    rows: RowFacts | None = None
    mean_length: float | None = None
    """Tokens of a row on average, where somebody said so and the rows were not read."""
    auto: AutoCut | None = None
    """Where ``data.batch_size`` or ``model.gradient_checkpointing`` is ``auto``; ``setting`` then
    has the least that they may come to."""
    notes: tuple[str, ...] = ()
    """What was assumed, a sentence each."""
    is_downloaded: bool = False
    keeps_packed_copy: bool = True
    num_checkpoints: int = 3

    def on(self, card: Card | None) -> TrainingSetting:
        """The setting as a card decides what the run leaves open.

        Args:
            card: None: one that multiplies bfloat16.
        """
        setting = self.setting
        if self.chooses_dtype:
            is_native = card is None or card.has_bfloat16
            setting = replace(setting, compute_dtype="bfloat16" if is_native else "float16")
        if setting.num_devices > 1 and self.chooses_strategy:
            setting = replace(setting, strategy=self._strategy(setting, card))
        return setting if self.auto is None or card is None else self._cut(setting, card)

    def _strategy(self, setting: TrainingSetting, card: Card | None) -> Strategy:
        if card is None:
            return "ddp"
        whole, shared = (
            plan_memory(self.shape, replace(setting, strategy=name)).total
            for name in ("ddp", "fsdp2")
        )
        return strategy_for(whole, shared, card.memory_bytes)

    def _cut(self, setting: TrainingSetting, card: Card) -> TrainingSetting:
        """The first choice of auto that fits, or the least."""
        assert self.auto is not None
        for choice in self.auto.choices:
            changed = self.auto.applied(setting, choice)
            if plan_memory(self.shape, changed).total <= USABLE * card.memory_bytes:
                return changed
        return setting

    def plan(self, card: Card | None) -> MemoryPlan:
        """Its bytes on each device."""
        return plan_memory(self.shape, self.on(card))

    def batch(self, setting: TrainingSetting) -> Batch:
        """An average micro-batch under a setting."""
        return average_batch(self.shape, setting, self.rows, self.mean_length)

    def time(self, card: Card) -> RunTime | None:
        """What it takes of a card; None: the card's speed is not known."""
        setting = self.on(card)
        batch, work = self.batch(setting), work_of(self.shape, setting)
        number = self.num_micro_batches
        if self.auto is not None and self.num_steps is not None:
            number = self.num_steps * setting.num_micro_batches
        return run_time(work, batch, card, setting.num_devices, number)

    def slowdown(self, setting: TrainingSetting, card: Card) -> float | None:
        """Time of the same rows under another setting, over that under the run's own."""
        if setting.is_shared:  # what the devices exchange is not estimated
            return None
        own = self.on(card)
        before, after = (
            micro_batch_time(work_of(self.shape, s), self.batch(s), card) for s in (own, setting)
        )
        if before is None or after is None:
            return None
        return (after.total / setting.batch_size) / (before.total / own.batch_size)

    def disk(self) -> DiskNeed:
        """What its files take."""
        return disk_need(
            self.shape,
            self.setting,
            is_downloaded=self.is_downloaded,
            keeps_packed_copy=self.keeps_packed_copy,
            num_checkpoints=self.num_checkpoints,
        )


def assumed(name: str, run: AssumedRun, num_devices: int) -> PlannedRun:
    """A run of a known model with a few flags.

    Args:
        name: Of the model.
        run: The flags.
        num_devices: That train side by side.

    Raises:
        ConfigurationError: for an unknown model, and a step that cannot be shared out.
    """
    shape = shape_from_config(known_shape(name))
    rows = run.rows_of_step(num_devices)
    accumulation = accumulation_of(rows, run.batch_size, num_devices)
    setting = run.setting(num_devices, accumulation)
    if num_devices > 1 and run.strategy != "auto":
        setting = replace(setting, strategy=run.strategy)
    micro_batches = None if run.rows is None else run.rows / (run.batch_size * num_devices)
    return PlannedRun(
        name=name,
        base=name,
        shape=shape,
        setting=setting,
        keys=run.keys(accumulation),
        chooses_dtype=False,
        chooses_strategy=run.strategy == "auto",
        num_micro_batches=micro_batches,
        num_steps=None if run.rows is None else -(-run.rows // rows),
        notes=(
            f"every row is taken to have {run.length:,} tokens (--length).",
            *beyond_positions(shape, run.length),
        ),
    )


def beyond_positions(shape: ModelShape, length: int) -> tuple[str, ...]:
    """A sentence where rows are longer than a model was made for; ``fit`` warns of them too."""
    if shape.max_positions is None or length <= shape.max_positions:
        return ()
    return (f"the model was made for rows of at most {shape.max_positions:,} tokens.",)


def configured(words: Sequence[str], num_devices: int | None, reads_all: bool) -> PlannedRun:
    """A run as ``fit`` would read it.

    Args:
        words: Of the run, as ``fit`` takes them.
        num_devices: In place of the file's; None: the file's, one where it says ``auto``.
        reads_all: See ``read_rows``.

    Raises:
        ConfigurationError: for every mistake in the file, and a base that is not known here.
    """
    from qlora_pl.planning.runs.run_file import planned_file  # slow to import: the parser of runs

    return planned_file(list(words), num_devices, reads_all)


def steps_of(run: Any, micro_batches_of_epoch: int | None, accumulation: int) -> int | None:
    """Optimizer steps of a parsed run; None: not known.

    Args:
        run: From ``read_runs``.
        micro_batches_of_epoch: On one device; None: the rows were not counted.
        accumulation: Micro-batches of a step on each device.
    """
    trainer = run.trainer
    limits = []
    if trainer.max_steps is not None and trainer.max_steps >= 0:
        limits.append(int(trainer.max_steps))
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and micro_batches_of_epoch:
        limits.append(int(trainer.max_epochs) * -(-micro_batches_of_epoch // accumulation))
    return min(limits) if limits else None
