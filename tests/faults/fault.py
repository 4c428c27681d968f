"""``Fault``: what breaks, and where; ``Injector``: makes it happen in the process that it is in."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

ERRORS = ("EIO", "ENOSPC", "EROFS", "EACCES")
SPACE = ("open", "write", "mkdir", "link", "copy")
"""What a full disk refuses; removing and renaming go on."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong."""

    action: str
    """``kill``, ``power`` (a kill that loses what was not synced), ``die`` (a kill of a process
    that the command has started), ``terminate`` (SIGTERM), ``stall`` (SIGSTOP), ``jump`` (of the
    clocks), ``memory`` (torch's out-of-memory error), or an error of an operation: one of
    ``ERRORS``."""
    operation: str | None = None
    """The operation's label (see ``operations``) at which it happens; or
    """
    moment: str | None = None
    """the place in training (see ``moments``); or
    """
    after_seconds: float | None = None
    """the time since the start; none of the three: at the start."""
    occurrence: int = 1
    """Which time that the process comes by there."""
    persists: bool = False
    """Whether later operations fail in the same way."""
    under: str = ""
    """Where they do: a path inside the workplace."""
    hours: float = 0.0
    """By which the clocks jump."""
    rank: int = 0
    """The process of a distributed run."""


class Injector:
    """Counts what a run comes by, notes it in a log that outlives the process, and breaks it.

    Args:
        workplace: The folder whose files are watched.
        log: A file outside of it.
        fault: What is to happen; None: nothing does, and the log says what could.
    """

    def __init__(self, workplace: Path, log: Path, fault: Fault | None) -> None:
        self.workplace = workplace
        self.fault = fault
        self.is_reached = False
        self._is_noted = False
        self.clock_offset = 0.0
        self.durable: dict[str, int] = {}
        """Files with bytes that a power cut would take, and how many it would leave."""
        self._counts: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._write, self._truncate = os.write, os.truncate  # before anything is wrapped
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if fault is not None and fault.after_seconds is not None:
            alarm = threading.Timer(fault.after_seconds, self.reach)
            alarm.daemon = True
            alarm.start()
        elif fault is not None and fault.operation is None and fault.moment is None:
            self.is_reached = self.fails_operations  # once one comes by, that is
            if not self.is_reached:
                self.reach()
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        """Another thread may have held it while a loader's process was forked."""
        self._lock = threading.RLock()

    def note(self, **event: Any) -> None:
        """Append a line to the log."""
        self._write(self._log, json.dumps(event).encode() + b"\n")

    def at_moment(self, name: str) -> None:
        """The run has come to a place in training."""
        with self._lock:
            self.note(moment=name)
            self._counts[name] += 1
            fault = self.fault
            if fault and fault.moment == name and fault.occurrence == self._counts[name]:
                self.reach()

    def strikes(self, kind: str, label: str) -> bool:
        """Whether this operation, which is about to happen, is the one that breaks."""
        with self._lock:
            self.note(operation=label)
            self._counts[label] += 1
            fault = self.fault
            if fault is None:
                return False
            if fault.operation == label and fault.occurrence == self._counts[label]:
                return True
            if not (self.is_reached and fault.persists and self.fails_operations):
                return False
            is_refused = fault.action != "ENOSPC" or kind in SPACE
            return is_refused and label.split(" ", 1)[1].startswith(fault.under)

    @property
    def fails_operations(self) -> bool:
        """Whether the fault is an operation's error."""
        return self.fault is not None and self.fault.action in ERRORS

    def reach(self) -> None:
        """The fault's place is reached: note it, and act unless an operation is to fail."""
        assert self.fault is not None
        if not self._is_noted:
            self.note(reached=asdict(self.fault))
        self.is_reached = self._is_noted = True
        if not self.fails_operations:
            self.act()

    def break_operation(self) -> None:
        """Break the operation at hand; returns if the action does not end the process."""
        if not self._is_noted:
            self.reach()
        if self.fault is not None and self.fails_operations:
            raise_error(self.fault.action)

    def act(self) -> None:
        """Do what the fault says, unless it is an operation's error."""
        assert self.fault is not None
        action = self.fault.action
        if action == "power":
            for path, size in list(self.durable.items()):  # other threads go on
                if os.path.isfile(path):
                    self._truncate(path, size)
        if action in ("kill", "power", "die"):
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # another thread may be the one that is told
        elif action == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        elif action == "stall":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif action == "jump":
            self.clock_offset = 3600 * self.fault.hours
        elif action == "memory":
            import torch

            raise torch.OutOfMemoryError("out of memory, injected")


def raise_error(name: str) -> NoReturn:
    """Raise the ``OSError`` that the kernel's error of this name becomes."""
    number = getattr(errno, name)
    raise OSError(number, os.strerror(number))


def read_log(log: Path) -> list[dict[str, Any]]:
    """What a run came by, in order; a kill may have cut the last line."""
    lines = log.read_text().splitlines() if log.exists() else []
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
