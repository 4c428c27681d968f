"""``Record``: the results file, which is whole after every check, and what is printed of it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu.machine import describe_machine, versions
from gpu.place import Check

WIDTH = 12


class Record:
    """What has come of every check; lanes add to it side by side.

    Args:
        out: Folder of results.
        chosen: The checks, in their order.
        is_rehearsal: A rehearsal's file has another name, and says so.
    """

    def __init__(self, out: Path, chosen: Sequence[Check], is_rehearsal: bool) -> None:
        now = datetime.now(UTC)
        kind = "gpu-rehearsal" if is_rehearsal else "gpu"
        self.path = out / f"{kind}-{now:%Y-%m-%d}.json"
        self.is_rehearsal = is_rehearsal
        self.lock = threading.Lock()
        self.values: dict[str, Any] = {
            "date": f"{now:%Y-%m-%d %H:%M} UTC",
            "is_rehearsal": is_rehearsal,
            "passed": False,
            **describe_machine(is_rehearsal),
            "versions": versions(),
            "checks": {c.name: {"title": c.title, "outcome": "not run"} for c in chosen},
        }
        out.mkdir(parents=True, exist_ok=True)
        self._save()

    @property
    def passed(self) -> bool:
        """Whether every check that was asked for has."""
        return bool(self.values["passed"])

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Write down and print what came of a check."""
        with self.lock:
            self.values["checks"][name] |= result
            outcomes = {check["outcome"] for check in self.values["checks"].values()}
            self.values["passed"] = outcomes == {"passed"}
            self._save()
            print_check(name, self.values["checks"][name])

    def close(self, seconds: float) -> None:
        """Write down how long all took, and print the table."""
        with self.lock:
            self.values["seconds"] = round(seconds, 1)
            self._save()
        print("\n| check | outcome | seconds |\n| --- | --- | --- |")
        for name, check in self.values["checks"].items():
            print(f"| {name}: {check['title']} | {check['outcome']} | {check.get('seconds', '')} |")
        print(f"\n{self.values['seconds']} s in all; {self.path}")

    def _save(self) -> None:
        temporary = self.path.with_suffix(".partial")
        with temporary.open("w") as file:
            file.write(json.dumps(self.values, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def print_check(name: str, result: dict[str, Any]) -> None:
    """What was measured, each claim that does not hold or was not looked at, and errors."""
    claims = result["claims"]
    held = sum(claim["passed"] is True for claim in claims)
    outcome, seconds = result["outcome"], result["seconds"]
    lines = [f"{outcome:{WIDTH}}{name}: {held} of {len(claims)} claims hold, {seconds:.0f} s"]
    for claim in claims:
        if claim["passed"] is not True:
            numbers = {key: v for key, v in claim.items() if key not in ("claim", "passed")}
            word = "FAILED" if claim["passed"] is False else "unseen"
            lines.append(f"{'':{WIDTH}}  {word}: {claim['claim']} {numbers}")
    for key, value in result["numbers"].items():
        if not isinstance(value, dict):
            lines.append(f"{'':{WIDTH}}  {key}: {value}")
    if outcome != "passed":
        lines += [f"{'':{WIDTH}}  | {line}" for line in result["said"].splitlines()[-15:]]
    print("\n".join(lines), flush=True)
