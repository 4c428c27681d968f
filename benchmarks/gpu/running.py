"""Checks as processes of their own, with limits: what one does or leaves undone harms no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from processes import environment

from gpu.place import Check
from gpu.record import Record

LEAST_SECONDS = 10.0
"""A check is not begun with less."""
GRACE_SECONDS = 10.0
"""Between SIGTERM, which lets a check end the runs that it has started, and SIGKILL."""
REHEARSAL_FACTOR = 6.0
"""CPUs have no hurry."""


def findings_path(folder: Path, name: str) -> Path:
    """Where a check writes what it finds."""
    return folder / f"findings-{name}.json"


class Runner:
    """Starts checks and waits for them.

    Args:
        record: Takes what comes of them.
        folder: Shared by all.
        program: Whose ``--check NAME`` does one.
        seconds: For all together, from now on.
    """

    def __init__(self, record: Record, folder: Path, program: Path, seconds: float) -> None:
        self.record, self.folder, self.program = record, folder, program
        self.started = time.perf_counter()
        self.seconds = seconds
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen[bytes]] = []
        self._is_interrupted = False

    def side_by_side(self, lanes: Iterable[Sequence[Check]]) -> None:
        """Do the checks of a lane one after the other, beside those of the other lanes.

        A signal ends all of them before it goes on its way.
        """
        threads = [threading.Thread(target=self._lane, args=(lane,)) for lane in lanes]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            with self._lock:
                self._is_interrupted = True
                running = list(self._running)
            for process in running:
                end_group(process)
            for thread in threads:
                thread.join()
            raise

    def _lane(self, checks: Sequence[Check]) -> None:
        for check in checks:
            left = self.seconds - (time.perf_counter() - self.started)
            if left < LEAST_SECONDS:
                print(f"not run     {check.name}: the time is up", flush=True)
                continue
            factor = REHEARSAL_FACTOR if self.record.is_rehearsal else 1.0
            self._one(check, round(min(left, factor * check.seconds), 1))

    def _one(self, check: Check, limit: float) -> None:
        command = [sys.executable, str(self.program), "--check", check.name]
        command += ["--keep", str(self.folder), "--limit", str(limit)]
        command += ["--rehearse"] * self.record.is_rehearsal
        findings_path(self.folder, check.name).unlink(missing_ok=True)  # of an earlier command
        log, started = self.folder / f"check-{check.name}.txt", time.perf_counter()
        with log.open("wb") as file, self._lock:
            if self._is_interrupted:
                return
            process = subprocess.Popen(
                command,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._running.append(process)
        is_late = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            is_late = True
        end_group(process)
        with self._lock:
            self._running.remove(process)
        found = read_findings(self.folder, check.name)
        outcome = judge(process.returncode, found["claims"])
        outcome = "timed out" if is_late else outcome
        outcome = "interrupted" if self._is_interrupted else outcome
        times = {"seconds": round(time.perf_counter() - started, 1), "limit_seconds": limit}
        said = log.read_text(errors="replace").strip()[-8000:]
        self.record.add(check.name, {"outcome": outcome, **times, **found, "said": said})


def judge(exit_code: int, claims: Sequence[dict[str, Any]]) -> str:
    """What a check came to that has ended by itself; without a claim it has shown nothing."""
    results = [claim["passed"] for claim in claims]
    if exit_code != 0 or False in results or not results:
        return "failed"
    return "passed" if True in results else "needs CUDA"


def read_findings(folder: Path, name: str) -> dict[str, Any]:
    """What a check has written, however it ended."""
    path = findings_path(folder, name)
    if not path.is_file():
        return {"claims": [], "numbers": {}}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a check and the runs that it has started, which share its group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # nobody is left
            break
        until = time.perf_counter() + GRACE_SECONDS
        while time.perf_counter() < until and _is_alive(process):
            time.sleep(0.1)
    process.wait()


def _is_alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether anybody of its group is."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
