"""Several processes of a run read its rows once a machine, and end together where rows are bad.

The first process of each machine reads and encodes; the others map what it wrote. A mistake that
any of them finds ends all of them, with one sentence of the first, and nobody waits for the dead.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import LightningEnvironment
from torch import distributed

from qlora_pl.data.rows.preparation import is_writable
from qlora_pl.errors import QLoRAError


def is_shared(trainer: Any) -> bool:
    """Whether this process is one of several that can talk to each other."""
    return trainer is not None and trainer.world_size > 1 and distributed.is_initialized()


class SharedReading:
    """How the rows of a data module come to all processes of a machine."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        """Where encoded rows are kept while they are read; None: nowhere."""
        self._is_temporary = False
        self._failure: Exception | None = None

    def by_the_first(self, trainer: Any, cache: Path | None, read: Callable[[], None]) -> None:
        """On one process of a machine: write what the others will map.

        Args:
            trainer: Of this run.
            cache: The folder of encoded rows; None, or one that cannot be written to: a temporary
                one takes its place, where there are others.
            read: Reads and encodes into ``folder``.
        """
        if not is_shared(trainer):
            return
        self.folder = cache
        if cache is None or not is_writable(cache / "data"):
            self.folder, self._is_temporary = Path(tempfile.mkdtemp(prefix="qlora_pl-")), True
        try:
            read()
        except Exception as error:  # the others wait in ``by_all`` to hear of it
            self._failure = error

    def by_all(self, trainer: Any, cache: Path | None, read: Callable[[], None]) -> None:
        """On every process, after that: read, mostly what is written already.

        Raises:
            QLoRAError: see ``failing_together``.
        """
        failure, self._failure = self._failure, None
        written = self.folder
        try:
            with failing_together(trainer):
                if failure is not None:
                    raise failure
            if is_shared(trainer):
                opened = gather((trainer.node_rank, trainer.local_rank, self.folder))
                of_machine = {node: path for node, rank, path in opened if rank == 0}
                cache = of_machine[trainer.node_rank] or cache
            self.folder = cache
            with failing_together(trainer):
                read()
        finally:
            if self._is_temporary and written is not None:  # what is mapped outlives its name
                shutil.rmtree(written, ignore_errors=True)
            self.folder, self._is_temporary = None, False


@contextmanager
def failing_together(trainer: Any) -> Iterator[None]:
    """What fails on one process fails on all of them; every process must come here.

    Raises:
        QLoRAError: on the first process, what it or another met.
        SystemExit: on a process that Lightning started, which leaves the word to the first.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if not is_shared(trainer):
        if error is not None:
            raise error
        return
    failures = gather(None if error is None else _in_words(error))
    failed = [rank for rank, failure in enumerate(failures) if failure is not None]
    if not failed:
        return
    is_known = error is None or isinstance(error, QLoRAError)
    environment = trainer.strategy.cluster_environment
    if is_known and trainer.global_rank > 0 and isinstance(environment, LightningEnvironment):
        raise SystemExit(0)  # another code would have Lightning kill the first in mid-sentence
    if error is not None:
        raise error
    sentence, exit_code = failures[failed[0]]
    theirs = QLoRAError(f"Rank {failed[0]}: {sentence}")
    theirs.exit_code = exit_code
    raise theirs


def gather(value: Any) -> list[Any]:
    """The value of each process, by rank."""
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def _in_words(error: Exception) -> tuple[str, int]:
    if isinstance(error, QLoRAError):
        return str(error), error.exit_code
    return f"{type(error).__name__}: {error}", 1
