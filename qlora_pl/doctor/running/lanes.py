"""Checks in lanes that run side by side, each check within its own time limit.

What a check does in a process of its own can crash or hang without taking doctor with it: the
process is ended, the check gets its line, and a fresh process goes on behind it.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from qlora_pl.allocator import prefer_expandable_segments
from qlora_pl.doctor.checks import HERE, Check, order_of_work
from qlora_pl.doctor.finding import Finding, Status, could_not_look
from qlora_pl.doctor.running.worker import MARK, program

Report = Callable[[Check, list[Finding]], None]
"""Takes what a check found, from any thread, once for each check."""

NOISE = ("warn", "deprecat")
"""Lines of a crashed process that hold one of these are not quoted as its last word."""


def run_lane(lane: str, checks: Sequence[Check], limit: float, report: Report) -> None:
    """Do the checks of one lane.

    Args:
        lane: Its name.
        checks: Those of it that are wanted.
        limit: Seconds that an ordinary check may take.
        report: Is told of every check.
    """
    if lane == HERE:
        for check in checks:
            report(check, run_here(check, limit * check.patience))
        return
    wanted = {check.name for check in checks}
    waiting = [check for check in order_of_work(lane) if check.name in wanted]
    failed: set[str] = set()
    while waiting:
        waiting = _run_process(waiting, limit, report, failed)
        for check in list(waiting):
            if failed & set(check.needs):
                waiting.remove(check)
                report(check, [_not_tried(check, failed)])
                failed.add(check.name)


def run_here(check: Check, limit: float) -> list[Finding]:
    """Do a check in a thread, which is left behind if it hangs (on a dead network disk, say)."""
    found: list[Finding] = []
    trying = [""]
    errors: list[BaseException] = []

    def look() -> None:
        try:
            for finding in check.load()():
                if isinstance(finding, Finding):
                    found.append(finding)
                else:
                    trying[0] = finding
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        return [*found, _hangs(check, trying[0], limit)]
    return [*found, *(could_not_look(check.title, error) for error in errors)]


def _run_process(
    waiting: list[Check], limit: float, report: Report, failed: set[str]
) -> list[Check]:
    """Do checks in a process until it ends.

    Args:
        waiting: The checks, each behind what it needs.
        limit: Seconds that an ordinary check may take.
        report: Is told of every check that was begun.
        failed: Takes the names of those upon which nothing else can stand.

    Returns:
        Those that it did not come to, fewer than were waiting.
    """
    by_name = {check.name: check for check in waiting}
    defaults = {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    environment = defaults | dict(os.environ)  # as a run sets them
    prefer_expandable_segments(environment)
    process = subprocess.Popen(
        program("from qlora_pl.doctor.running.worker import work; work(sys.argv[2:])", *by_name),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    current = waiting[0]
    is_begun, trying, findings = False, "", list[Finding]()
    left, said, patience = dict(by_name), list[str](), [current.patience]
    try:
        for event in _events(process, lambda: limit * patience[0], said):
            if event["event"] == "begin":
                current, is_begun, trying, findings = by_name[event["check"]], True, "", []
                patience[0] = current.patience
            elif event["event"] == "trying":
                trying = event["what"]
            elif event["event"] == "found":
                findings.append(Finding.from_plain(event["finding"]))
            else:
                report(left.pop(current.name), findings)
                failed |= {current.name} if event["failed"] else set()
                is_begun = False
                if not left:
                    return []
        if not is_begun and len(left) < len(waiting) and process.returncode == 0:
            return list(left.values())  # what they need has failed
        if not is_begun:
            current = next(iter(left.values()))
        end = _crashed(current, trying if is_begun else "", process.returncode, said)
    except TimeoutError:
        current = current if is_begun else next(iter(left.values()))
        end = _hangs(current, trying if is_begun else "", limit * current.patience)
    finally:
        _end(process)
    report(left.pop(current.name), [*(findings if is_begun else []), end])
    failed.add(current.name)
    return list(left.values())


def _events(
    process: subprocess.Popen[str], limit: Callable[[], float], said: list[str]
) -> Iterator[dict[str, Any]]:
    """What a process says, as it says it.

    Raises:
        TimeoutError: if it is silent for longer than the limit.
    """
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        with suppress(ValueError, OSError), process.stdout as stream:
            for line in stream:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    deadline = time.monotonic() + limit()
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=limit())
            return
        if line.startswith(MARK):
            event = json.loads(line.removeprefix(MARK))
            yield event
            if event["event"] != "found":
                deadline = time.monotonic() + limit()
        elif line.strip():
            said.append(line.strip())
            del said[:-20]


def _end(process: subprocess.Popen[str]) -> None:
    """End a process with all that it has started; one that no signal reaches is left behind."""
    with suppress(ProcessLookupError, PermissionError, AttributeError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)


def _hangs(check: Check, trying: str, limit: float) -> Finding:
    at = f" at {trying}" if trying else ""
    return Finding(
        title=check.title,
        status=Status.BROKEN,
        found=f"no answer within {limit:g} s{at}",
        meaning="a run that comes to the same point would hang there",
        fix="qlora-pl doctor --time-limit 120",
    )


def _crashed(check: Check, trying: str, code: int | None, said: list[str]) -> Finding:
    at = f" at {trying}" if trying else ""
    if code is not None and code < 0:
        end = f"ended by {_signal_name(-code)}{at}"
    else:
        end = f"the process ended with exit code {code}{at}"
    words = [line for line in said if not any(word in line.lower() for word in NOISE)]
    last = f" ({words[-1][:160]})" if words else ""
    return Finding(
        title=check.title,
        status=Status.BROKEN,
        found=f"{end}{last}",
        meaning=_CRASHES.get(-(code or 0), "a run that comes to the same point would end there"),
        fix=_LOOKING.get(-(code or 0)) or check.repair(),
    )


_CRASHES = {
    4: "a library uses instructions that this processor lacks; a run would end so, without a word",
    7: "memory that was promised is not there (a full /dev/shm does it); a run would end so",
    9: "something ended it, mostly the system for want of memory; a run would end so",
    11: "a library broke down; a run would end so, without a word",
}


_LOOKING = {7: "df -h /dev/shm", 9: "free -h"}
"""Where it is no library's fault, the command that shows what is short."""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _not_tried(check: Check, failed: set[str]) -> Finding:
    because = ", ".join(name for name in check.needs if name in failed)
    return Finding(
        title=check.title,
        status=Status.NOTE,
        found="not tried",
        meaning=f"it stands upon what failed above ({because})",
    )
