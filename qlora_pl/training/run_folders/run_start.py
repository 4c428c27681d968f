"""``RunStart``: every process of a run begins with one folder, one checkpoint and one lock.

The first process chooses. Those that a launcher started beside it are told; those that Lightning
starts later read the folder from their environment.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_pl.errors import QLoRAError
from qlora_pl.training.processes.launching import Launch
from qlora_pl.training.processes.ranks import Ranks, hush
from qlora_pl.training.processes.slurm import begun_before, note_job
from qlora_pl.training.run_folders.run_folder import (
    FOLDER_VARIABLE,
    Resolved,
    RunConfig,
    completed_run,
    forget_if_nothing_happened,
    newest_verified,
    resolve_run,
    step_of,
)
from qlora_pl.training.run_folders.run_lock import RunLock
from qlora_pl.training.stopping import StoppedBySignal

logger = logging.getLogger(__name__)


class RunStart:
    """How this process was started, and what its run was given; made before Lightning's trainer."""

    def __init__(self) -> None:
        self.launch = Launch.detect()  # Lightning changes what this looks at
        self.ranks = Ranks(self.launch)
        self._lock: RunLock | None = None
        self._chosen: Resolved | None = None
        if not self.launch.is_first:
            hush(self.launch.rank)

    def choose(
        self,
        command: str,
        config: RunConfig,
        trainer: Any,
        ckpt_path: str | None,
        given: Mapping[str, str],
    ) -> Resolved:
        """The folder and the checkpoint of this run, the same on every process.

        Args:
            command: ``fit``, ``validate``, ``test`` or ``predict``.
            config: Name and root of the experiment.
            trainer: The parsed settings of the trainer.
            ckpt_path: As the user wrote it.
            given: Every value of the configuration, by name; must be the same for all.

        Raises:
            QLoRAError: on rank 0, if the run cannot start.
            SystemExit: on the other ranks then; on all, if there is nothing left to do.
        """
        self.ranks.patience_seconds = config.timeout_seconds
        decided = self.ranks.agree(
            given,
            lambda: self._resolve(command, config, trainer, ckpt_path).plain(),
            lambda plain: Resolved.from_plain(plain).out_of_sight(),
        )
        return self._chosen or Resolved.from_plain(decided)

    def _resolve(
        self, command: str, config: RunConfig, trainer: Any, ckpt_path: str | None
    ) -> Resolved:
        is_fit = command == "fit"
        ckpt_path = (self._begun_before(config) if is_fit else None) or ckpt_path
        if is_fit and (done := completed_run(config, ckpt_path, trainer)):
            print(f"The run in '{done}' is complete; nothing to resume.")
            sys.exit(0)
        if self.launch.launcher is not None:
            os.environ.pop(FOLDER_VARIABLE, None)  # of a run around this one
        resolved = resolve_run(config, "rehearsal" if trainer.fast_dev_run else command, ckpt_path)
        if self.launch.is_first:
            self._chosen = resolved  # if something fails from here on, its folder goes
            self._take(resolved, command, is_fit and not trainer.fast_dev_run)
        return resolved

    def _take(self, resolved: Resolved, command: str, is_run: bool) -> None:
        """Lock the folder, and say where the run begins."""
        if is_run:
            self._lock = RunLock(resolved.folder)
            note_job(resolved.folder)
            self.ranks.remember("folder", str(resolved.folder.resolve()))
        if self.launch.launcher is None:
            os.environ[FOLDER_VARIABLE] = str(resolved.folder)
        for damaged in resolved.passed_over:
            logger.warning("Passed over the checkpoint %s.", damaged)
        if resolved.checkpoint is not None:
            starts = "starting from" if command == "fit" else "using"
            does = "resuming" if resolved.is_resumed else starts
            step = step_of(resolved.checkpoint)
            logger.info("%s: %s %s at step %d", command, does, resolved.checkpoint, step)

    def _begun_before(self, config: RunConfig) -> str | None:
        """The checkpoint of the run that this launch began before it was started again."""
        remembered = self.ranks.remembered("folder")
        run = Path(remembered) if remembered else begun_before(config)
        newest = newest_verified(run) if run is not None else None
        return None if newest is None else str(newest)

    def give_up(self, error: BaseException) -> BaseException:
        """Tidy up after a start or a run that failed; what this process should end with."""
        if self._chosen is not None:
            forget_if_nothing_happened(self._chosen)
        # Ranks that a signal stops have agreed on it, and only the first says so.
        if isinstance(error, QLoRAError) and not isinstance(error, StoppedBySignal):
            return self.ranks.leave(error)
        return error

    def release(self) -> None:
        """Let other processes write into the folder."""
        if self._lock is not None:
            self._lock.release()
