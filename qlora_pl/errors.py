"""What can go wrong through a user's hand: one sentence each, which the command line prints.

    QLoRAError                  everything that a user can mend
    ├── ConfigurationError      a key, a value, or two values that contradict each other
    │   └── CheckpointError     a checkpoint that is missing, damaged, or of another run
    ├── DatasetFormatError      a file or a row that is not what its format says
    ├── AdapterFolderError      an adapter folder that is incomplete, altered, or for another base
    ├── HardwareError           this machine cannot do what was asked
    ├── AblationError           a grid of runs cannot go on, or a result of it cannot be read
    └── TrainingStoppedError    the run stopped itself to save what it had (exit code 1)

A sentence says what is wrong, where, and what to do; the value is quoted as the user wrote it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the nearest known one, or a full stop."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else "."


class QLoRAError(Exception):
    """Everything that a user can mend; ``str(error)`` is one sentence for them."""

    exit_code = 2


class ConfigurationError(QLoRAError):
    """A key or value of the configuration is wrong; holds one sentence for each problem found."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class CheckpointError(ConfigurationError):
    """A checkpoint is missing, damaged, or was written by a run that this one cannot continue."""


class DatasetFormatError(QLoRAError):
    """A data file or row is not what its format says."""


class AdapterFolderError(QLoRAError):
    """An adapter folder is incomplete, altered since it was written, or made for another base."""


class HardwareError(QLoRAError):
    """This machine cannot do what was asked."""


class AblationError(QLoRAError):
    """A grid of runs cannot go on, or a result of it cannot be read."""


class TrainingStoppedError(QLoRAError):
    """The run stopped itself, keeping what it had: a loss that is not finite, a full disk."""

    exit_code = 1
