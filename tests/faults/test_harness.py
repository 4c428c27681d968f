"""The harness itself: it counts what strace counts, and notices a save broken on purpose."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from faults.fault import Fault
from faults.kinds import READ, numbered
from faults.operations import label
from faults.proving import prove
from faults.runs import Runs

CHECKPOINTS = "runs/tiny/version_0/checkpoints"
SABOTAGES = {
    "writes_in_place": Fault(action="kill", operation=f"write {CHECKPOINTS}/step-00000004.ckpt"),
    "writes_adapter_last": Fault(
        action="kill", operation="rename runs/tiny/version_0/adapters/step-00000004"
    ),
    "never_syncs": Fault(
        action="power", operation=f"write {CHECKPOINTS}/.incomplete-kept.json", occurrence=3
    ),
    "forgets_random_states": Fault(action="kill", moment="backward", occurrence=20),
}
CALLS = {
    "openat": "open",
    "write": "write",
    "pwrite64": "write",
    "writev": "write",
    "fsync": "fsync",
    "fdatasync": "fsync",
    "rename": "rename",
    "renameat": "rename",
    "renameat2": "rename",
    "link": "link",
    "linkat": "link",
    "symlink": "link",
    "symlinkat": "link",
    "unlink": "unlink",
    "unlinkat": "unlink",
    "rmdir": "rmdir",
    "mkdir": "mkdir",
    "mkdirat": "mkdir",
    "chmod": "chmod",
    "fchmod": "chmod",
    "fchmodat": "chmod",
    "truncate": "truncate",
    "ftruncate": "truncate",
    "utimensat": "utime",
    "sendfile": "copy",
    "copy_file_range": "copy",
}
NATIVE = ("tmp/", "cache/packed/.incomplete/")
"""Where the tokenizers and safetensors libraries write by themselves: into folders without a name
of their own, from which the bytes are read back, or whose every file is held to a digest at each
start."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SABOTAGES)
def test_a_save_that_is_broken_on_purpose_is_noticed(runs: Runs, name: str) -> None:
    outcome = prove(runs, SABOTAGES[name], sabotage=name)
    assert outcome.problems
    assert not [problem for problem in outcome.problems if problem.startswith("harness")]
    assert not prove(runs, SABOTAGES[name]).problems or name == "writes_in_place"


@pytest.mark.slow
def test_a_fault_that_is_not_reached_is_the_harness_s_own_problem(runs: Runs) -> None:
    outcome = prove(runs, Fault(action="kill", operation="write nowhere"))
    assert "harness: the fault was not reached" in outcome.problems


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_every_operation_that_strace_sees_is_one_that_can_be_made_to_fail(tmp_path: Path) -> None:
    """Of a whole run that starts with empty caches, call by call and file by file."""
    if subprocess.run(["strace", "-qq", "true"], capture_output=True).returncode:
        pytest.skip("strace may not trace here")
    trace = tmp_path / "trace"
    words = ("strace", "-f", "-qq", "-y", "-s", "0", "-e", f"trace={','.join(CALLS)}")
    traced = Runs(tmp_path / "runs", (*words, "-o", str(trace)))
    traced.close()
    counted = Counter(name for name, _ in numbered(traced.cold_run.events))
    ours = Counter({name: n for name, n in counted.items() if not name.startswith(READ)})
    seen = strace_counts(trace.read_text(), traced.cold)
    for name in [*ours, *seen]:
        if name.split(" ", 1)[1].startswith(NATIVE):
            ours.pop(name, None)
            seen.pop(name, None)
    assert sum(seen.values()) > 500
    different = {n: (seen[n], ours[n]) for n in seen | ours if seen[n] != ours[n]}
    assert not different, "seen by strace, counted by the harness"


def strace_counts(trace: str, workplace: Path) -> Counter[str]:
    """Operations by label, out of strace's lines."""
    seen: Counter[str] = Counter()
    for line in joined(trace.splitlines()):
        if (call := re.match(r"\d+ +(\w+)\((.*)$", line)) is None or call[1] not in CALLS:
            continue
        operation, arguments = CALLS[call[1]], call[2]
        if operation == "open" and not re.search(r"O_(WRONLY|RDWR|CREAT|TRUNC|APPEND)", arguments):
            continue
        if operation == "unlink" and "AT_REMOVEDIR" in arguments:
            operation = "rmdir"
        path = last_path(arguments, workplace)
        if path is not None and (name := label(operation, path, str(workplace))) is not None:
            seen[name] += 1
    return seen


def joined(lines: list[str]) -> list[str]:
    """Calls during which another thread's were printed, put together again."""
    begun: dict[str, str] = {}
    whole = []
    for line in lines:
        process = line.split()[0]
        if line.endswith("<unfinished ...>"):
            begun[process] = line.removesuffix("<unfinished ...>")
        elif "resumed>" in line:
            whole.append(begun.pop(process, process + " ") + line.split("resumed>", 1)[1])
        else:
            whole.append(line)
    return whole


def last_path(arguments: str, workplace: Path) -> str | None:
    """The file that a call changes: of two, the one that it makes."""
    descriptor = r"(?:(?:\d+|AT_FDCWD)<([^>]*)>(?:\(deleted\))?, )?"
    names = re.findall(descriptor + r'"([^"]+)"', arguments)
    if names:
        folder, name = names[-1]
        return str(Path(folder or workplace, name))
    held = re.match(r"\d+<([^>]*)>", arguments)
    return held[1] if held else None
