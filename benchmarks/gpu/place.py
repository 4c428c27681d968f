"""What a check is given: where it works, on what size of model, and what takes its findings."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthetic import save_base

NEEDS_CUDA = "needs CUDA"
SMALL = {"num_weights": 5.4e7, "width": 1024, "inner": 2816}
"""Large enough that a rank-128 adapter has paged state: tensors of 1e5 elements."""
LARGE = {"num_weights": 1.3e9, "width": 2048, "inner": 5504}
REHEARSED = {"num_weights": 5.0e5, "width": 128, "inner": 256}
"""For both; a rank-128 adapter still has tensors of 16,384 elements, whose state is in 8 bits."""


@dataclass(frozen=True)
class Check:
    """One of the checks that the command knows."""

    name: str
    place: str
    """Module of this package and function in it, which takes a ``Place`` and ``Findings``."""
    lane: str
    """Checks of one lane go one after the other."""
    seconds: float
    """Its limit on a GPU."""
    title: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a check works."""

    folder: Path
    """Shared by all checks, so that one may compare with a run of another."""
    is_rehearsal: bool
    """Whether it is tried at tiny size on a CPU, for the sake of the script alone."""
    limit_seconds: float
    """After which the check is ended from outside."""

    @property
    def accelerator(self) -> str:
        """Lightning's word."""
        return "cpu" if self.is_rehearsal else "gpu"

    @property
    def device(self) -> str:
        """Torch's word."""
        return "cpu" if self.is_rehearsal else "cuda"

    @property
    def num_at_a_time(self) -> int:
        """Runs that may go on beside each other; a small one takes under 2 GB of a GPU."""
        return 1 if self.is_rehearsal else 4

    def base(self, kind: str = "small") -> Path:
        """The folder of a synthetic base, made when it is first asked for.

        Args:
            kind: ``small`` (50M weights) or ``large`` (1.3e9).
        """
        kind = "small" if self.is_rehearsal else kind
        folder = self.folder / f"base-{kind}"
        sizes = REHEARSED if self.is_rehearsal else {"small": SMALL, "large": LARGE}[kind]
        with self._once(folder.name) as is_first:
            if is_first:
                save_base(folder, sizes["num_weights"], int(sizes["width"]), int(sizes["inner"]))
        return folder

    def rows(self) -> Path:
        """Rows of five lengths."""
        path = self.folder / "rows.jsonl"
        lines = [
            {
                "instruction": f"How many legs has animal {number:03d}?",
                "output": "It has " + "eight legs " * (1 + number % 5) + "in all.",
            }
            for number in range(64)
        ]
        with self._once(path.name) as is_first:
            if is_first:
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    @contextmanager
    def _once(self, name: str) -> Iterator[bool]:
        """Whether what is shared is still to be made; other checks wait meanwhile."""
        done = self.folder / f"{name}.done"
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield not done.is_file()
            done.touch()


class Findings:
    """What a check has found so far; on disk after every word, since it may be killed.

    Args:
        path: Of a JSON file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.claims: list[dict[str, Any]] = []
        self.numbers: dict[str, Any] = {}
        self._save()

    def claim(self, text: str, holds: bool, **numbers: Any) -> None:
        """Something that must hold, and the numbers that say whether it does."""
        self.claims.append({"claim": text, "passed": bool(holds), **numbers})
        self._save()

    def needs_cuda(self, text: str) -> None:
        """A claim that a rehearsal cannot look at."""
        self.claims.append({"claim": text, "passed": None, "why": NEEDS_CUDA})
        self._save()

    def note(self, **numbers: Any) -> None:
        """Measured, and not judged."""
        self.numbers |= numbers
        self._save()

    def _save(self) -> None:
        from qlora_pl.files import write_json

        write_json(self.path, {"claims": self.claims, "numbers": self.numbers})
