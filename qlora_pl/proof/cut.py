"""A user's run cut to a few steps: which flags follow its own words, and where it may write.

Only what says how long, where and with how much company a run trains is replaced; what it trains,
on which rows and in which micro-batches, is the user's.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_pl.data.batches.global_batch import AUTO, SHARE
from qlora_pl.data.batches.largest_batch import first_size
from qlora_pl.errors import ConfigurationError
from qlora_pl.files import write_json
from qlora_pl.training.run_folders.run_folder import RunConfig

RECORD = "resume_proof.json"
VALIDATION_BATCHES = 2
"""Of the validation before, amid and after the steps; enough to have one that could disturb."""
MOST_KEPT = 4
"""Checkpoints that each run keeps, so that the first difference is seen near its cause."""


@dataclass(frozen=True, kw_only=True)
class CutRun:
    """A run of a few steps, which is started as often as needed under different roots."""

    words: tuple[str, ...]
    """What follows ``qlora-pl fit``, but for ``run.root``."""
    name: str
    """The experiment's."""
    steps: int
    """Optimizer steps."""
    learning_rate: float
    """The peak rate: the unit of differences between weights."""
    is_deterministic: bool
    """Whether ``trainer.deterministic`` is set."""

    def run_config(self, root: Path) -> RunConfig:
        """Where it writes under a root."""
        return RunConfig(name=self.name, root=str(root))

    def command_words(self, root: Path) -> list[str]:
        """What follows ``qlora-pl fit`` for a start under a root, the first or a later one."""
        return [*self.words, "--run.root", str(root)]


def cut(run: Any, words: list[str], steps: int) -> CutRun:
    """Cut a run to so many steps, with a save at each.

    Args:
        run: Its parsed configuration.
        words: As the user wrote it.
        steps: Optimizer steps, at least 2.
    """
    flags = {
        "trainer.max_steps": steps,
        "trainer.max_epochs": -1,
        "trainer.max_time": "null",
        "trainer.log_every_n_steps": 1,
        "trainer.logger": "true",  # TensorBoard into the run's own folder, nothing over a network
        "trainer.enable_progress_bar": "false",
        "checkpoint.every_n_steps": 1,
        "checkpoint.keep_last": min(max(steps - 1, 2), MOST_KEPT),
        "samples.prompts": "null",
        "samples.num_prompts": 0,
        "samples.every_n_steps": "null",
        "run.name": run.run.name,
        "ckpt_path": "auto",
    }
    is_open = run.data.batch_size == AUTO
    size = first_size(run.data.batch_size, run.data.global_batch_size)
    if is_open:  # every run of a proof has to have the same, and intervals count in it
        flags["data.batch_size"] = size
    if run.trainer.limit_val_batches != 0:
        # Where the global batch says it, devices are not known yet; on one device it is this.
        whole_batch = (run.data.global_batch_size or is_open * SHARE) // max(size, 1)
        accumulation = run.trainer.accumulate_grad_batches or max(whole_batch, 1)
        flags |= {
            "trainer.limit_val_batches": VALIDATION_BATCHES,
            # After the middle step, and counted across epochs: the user's interval would not come.
            "trainer.val_check_interval": accumulation * max(1, steps // 2),
            "trainer.check_val_every_n_epoch": "null",
        }
    added = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    return CutRun(
        words=(*words, *added),
        name=run.run.name,
        steps=steps,
        learning_rate=float(run.model.optimizer.lr),
        is_deterministic=bool(run.trainer.deterministic),
    )


def refuse_unprovable(run: Any) -> None:
    """Refuse what this command cannot start, or what could not be resumed in the first place.

    Raises:
        ConfigurationError: with every problem.
    """
    problems = []
    if run.trainer.fast_dev_run:
        problems.append(
            "trainer.fast_dev_run: a rehearsal saves nothing to resume from; leave it out."
        )
    if run.trainer.num_nodes != 1:
        problems.append(
            f"trainer.num_nodes: prove-resume starts its runs on this machine, got "
            f"{run.trainer.num_nodes}; add --trainer.num_nodes 1."
        )
    if run.ckpt_path not in (None, "auto"):
        problems.append(
            f"ckpt_path: prove-resume begins its runs anew, got '{run.ckpt_path}'; leave it out."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or "LOCAL_RANK" in os.environ:
        problems.append(
            "prove-resume starts the processes of its runs itself; call it once, without torchrun "
            "or srun."
        )
    if problems:
        raise ConfigurationError(problems)


def proof_folder(run: Any, chosen: str | None) -> Path:
    """Make the folder of a proof, empty but for what an earlier one left there.

    Args:
        run: The parsed configuration.
        chosen: The user's; None: ``prove-resume/NAME`` beside ``run.root``.

    Raises:
        ConfigurationError: if it holds anything else, or cannot be made.
    """
    root = Path(run.run.root).expanduser()
    folder = Path(chosen).expanduser() if chosen else root.parent / "prove-resume" / run.run.name
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_empty = not any(folder.iterdir())
    except OSError as error:
        raise ConfigurationError(
            f"--folder: '{folder}' cannot be made or read ({error.strerror}); name another."
        ) from error
    if not is_empty and not (folder / RECORD).is_file():
        raise ConfigurationError(
            f"--folder: '{folder}' holds something else than a proof; name a new folder."
        )
    return folder


def clear(folder: Path, names: tuple[str, ...]) -> None:
    """Remove an earlier proof's runs, and mark the folder as a proof's from now on."""
    write_json(folder / RECORD, {"verdict": "unfinished"})
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / f"{name}.log").unlink(missing_ok=True)
