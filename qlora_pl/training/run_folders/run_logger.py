"""``RunLogger``: TensorBoard in the run's own folder; a disk's error there does not end the run.

Curves are a picture of what ``metrics.csv`` holds, so a run goes on without them.
"""

from __future__ import annotations

import logging
import threading
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from qlora_pl.training.run_folders.run_folder import Resolved, step_of

logger = logging.getLogger(__name__)


class RunLogger(TensorBoardLogger):
    """TensorBoard without ``hparams.yaml``, which would be empty: ``run.yaml`` holds it all."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_broken = False
        _silence_writers()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """A step's values."""
        self._try(lambda: TensorBoardLogger.log_metrics(self, metrics, step))

    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace,
        metrics: dict[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        """Settings, and what they led to."""
        self._try(lambda: TensorBoardLogger.log_hyperparams(self, params, metrics, step))

    def log_text(self, tag: str, text: str, step: int) -> None:
        """Markdown to read."""
        self._try(lambda: self.experiment.add_text(tag, text, step))

    def save(self) -> None:
        """Write out the events."""
        self._try(lambda: self.experiment.flush())

    def finalize(self, status: str) -> None:
        """Write out and close."""
        self._try(lambda: TensorBoardLogger.finalize(self, status))

    def _try(self, write: Callable[[], object]) -> None:
        if self._is_broken:
            return
        try:
            write()
        except (OSError, ValueError) as error:
            # Lightning makes a ValueError about types of whatever goes wrong.
            failed = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(failed, OSError):
                raise
            self._is_broken = True
            logger.warning(
                "TensorBoard's file in '%s' could not be written (%s); the run goes on without "
                "curves, and metrics.csv has every value.",
                self.log_dir,
                failed.strerror or failed,
            )


def _silence_writers() -> None:
    """TensorBoard raises an error of its writing thread at the next call; once is enough."""
    if getattr(threading.excepthook, "is_quiet", False):
        return
    shown = threading.excepthook

    def hook(raised: Any) -> None:
        is_writer = type(raised.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(raised.exc_value, OSError)):
            shown(raised)

    hook.is_quiet = True  # type: ignore[attr-defined]
    threading.excepthook = hook


def run_logger(resolved: Resolved) -> RunLogger:
    """The logger of a fit, which writes into the very folder of the run."""
    resumed = resolved.checkpoint if resolved.is_resumed else None
    return RunLogger(
        resolved.folder,
        name="",
        version="",
        default_hp_metric=False,
        # What an interrupted run logged from its checkpoint on is logged again.
        purge_step=None if resumed is None else step_of(resumed),
    )
