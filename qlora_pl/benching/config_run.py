"""A user's own run, timed: the same words, weights and rows as ``qlora-pl fit``, for a few steps.

The run's own parser and trainer do the work; only what does not train is left out (saves, samples,
validation), and how long it goes on.
"""

from __future__ import annotations

import io
import math
import statistics
import tempfile
from contextlib import redirect_stdout
from typing import Any

from qlora_pl.benching.prediction import plan_of_run
from qlora_pl.benching.record import record_of
from qlora_pl.benching.settings import Timing
from qlora_pl.benching.timer import StepTimer
from qlora_pl.benching.training import hush_lightning
from qlora_pl.cli import QLoRACLI
from qlora_pl.errors import TrainingStoppedError
from qlora_pl.modeling.base.quantization_plan import build_skeleton
from qlora_pl.training.checkpoints.checkpoint import AdapterCheckpoint
from qlora_pl.training.run_folders.run_record import RunRecord
from qlora_pl.training.watching.samples import SampleWriter

NOT_TRAINING = (AdapterCheckpoint, SampleWriter, RunRecord)


class TimedRun(QLoRACLI):
    """``fit`` with a clock, and without what it writes.

    Args:
        words: Of the run, and of its cut.
        timer: The clock.
    """

    def __init__(self, words: list[str], timer: StepTimer) -> None:
        self.timer = timer
        hush_lightning()
        super().__init__(["fit", *words])

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Any:
        config["enable_checkpointing"] = False
        kept = [callback for callback in callbacks if not isinstance(callback, NOT_TRAINING)]
        return super()._instantiate_trainer(config, [*kept, self.timer])


def measure_config(words: list[str], timing: Timing) -> dict[str, Any] | None:
    """Train a user's run for a few steps, and return the record; None on further processes.

    Args:
        words: What would follow ``qlora-pl fit``.
        timing: Which steps are timed.

    Raises:
        ConfigurationError: for what ``fit`` would refuse.
    """
    timer = StepTimer(timing)
    with tempfile.TemporaryDirectory(prefix="qlora-pl-bench-") as root:
        with redirect_stdout(io.StringIO()):  # where fit says where it has written
            run = TimedRun([*words, *_cut(timing, root)], timer)
        trainer: Any = run.trainer
        module: Any = run.model
        if not trainer.is_global_zero:
            return None
        if not timer.clock or not timer.clock.is_done:
            raise TrainingStoppedError(
                f"bench: the run ended at step {trainer.global_step}, before the "
                f"{timing.warmup + timing.num_timed} steps that are timed; lower --steps or "
                "--warmup."
            )
        micro_batches = trainer.accumulate_grad_batches * trainer.world_size
        padded = statistics.median(step.num_padded_tokens for step in timer.timed)
        what = {
            "config": [str(path) for path in run.config["fit"].config or []],
            "words": words,
            "processes": trainer.world_size,
            "strategy": type(trainer.strategy).__name__,
            "optimizer": module.optimizer_config.name,
        }
        tokens = max(1, int(padded / micro_batches))
        skeleton = build_skeleton(module.identity.folder, module.attn_implementation)
        widest = max(step.num_padded_tokens for step in timer.timed) / micro_batches
        plan = plan_of_run(
            run.config["fit"],
            skeleton,
            trainer.world_size,
            math.ceil(widest / max(1, trainer.datamodule.batch_size)),
            module.device,
        )
        return record_of(timer, module, what, tokens, plan)


def _cut(timing: Timing, root: str) -> list[str]:
    flags = {
        "trainer.max_steps": timing.num_steps,
        "trainer.max_epochs": -1,
        "trainer.max_time": "null",
        "trainer.limit_val_batches": 0,
        "trainer.num_sanity_val_steps": 0,
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        "samples.prompts": "null",
        "samples.num_prompts": 0,
        "samples.every_n_steps": "null",
        "run.root": root,
        "ckpt_path": "null",
    }
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))]
