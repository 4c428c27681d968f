"""``CheckpointWriter``: writes saves in the background, one after another.

Training goes on as soon as a save's content is copied to host memory. One save is under way at a
time: the next one waits for it before it copies, so that there is never a second copy in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from qlora_pl.errors import QLoRAError, TrainingStoppedError


class CheckpointWriter:
    """Runs jobs in a thread of its own, in the order in which they came; stops at the first error.

    ``error`` is what a job ended with, as a sentence for the user, or None.
    """

    def __init__(self) -> None:
        self.error: TrainingStoppedError | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: Future[None] | None = None

    def __getstate__(self) -> dict[str, Any]:  # strategies copy callbacks; threads do not copy
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def submit(self, job: Callable[[], None]) -> None:
        """Start a job; waits for the one before.

        Raises:
            TrainingStoppedError: what an earlier job ended with.
        """
        self.finish()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._under_way = self._thread.submit(self._run, job)

    def fail(self, error: Exception) -> None:
        """Note what went wrong in a save; the first error counts."""
        if self.error is not None:
            return
        if isinstance(error, TrainingStoppedError):
            self.error = error
            return
        is_sentence = isinstance(error, QLoRAError)
        what = str(error) if is_sentence else f"A save failed ({type(error).__name__}: {error})."
        self.error = TrainingStoppedError(what)
        self.error.__cause__ = error

    def wait(self) -> None:
        """Wait until nothing is under way; raises nothing."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def finish(self) -> None:
        """Wait until nothing is under way.

        Raises:
            TrainingStoppedError: what a job ended with.
        """
        self.wait()
        if self.error is not None:
            raise self.error

    def _run(self, job: Callable[[], None]) -> None:
        if self.error is not None:
            return
        try:
            job()
        except Exception as error:
            self.fail(error)


def on_host(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint whose tensors are copies in host memory; the optimizer's are already."""
    copied = "optimizer_states"  # by ``named_optimizer_state``
    return {key: held if key == copied else host_copy(held) for key, held in checkpoint.items()}


def host_copy(value: Any) -> Any:
    """A nested value with its tensors copied to host memory, so that training may go on."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: host_copy(held) for key, held in value.items()}
    if type(value) in (list, tuple):
        return type(value)(host_copy(held) for held in value)
    return value
