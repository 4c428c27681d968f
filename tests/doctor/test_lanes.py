"""A check that crashes, hangs or raises is a line, and the checks behind it go on."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from broken_world import look, look_at, plant_package

from qlora_pl.doctor.checks import CHECKS, HERE, Check, order_of_work
from qlora_pl.doctor.finding import Status
from qlora_pl.doctor.running.lanes import run_here

LIBRARY = "huggingface_hub"
"""Broken here because a check needs it and nothing else that is slow to import."""


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "ended by SIGILL"),
        ("import ctypes; ctypes.string_at(0)", "ended by SIGSEGV"),
        ("import os; print('out of licences'); os._exit(3)", "exit code 3 (out of licences)"),
        (
            "raise OSError('libgone.so: no such file\\nand more')",
            "OSError: libgone.so: no such file",
        ),
        ("import sys; sys.exit('tired')", "the process ended with exit code 1 (tired)"),
    ],
    ids=["illegal instruction", "null pointer", "exit", "error", "SystemExit"],
)
def test_a_library_that_breaks_down_is_a_line(
    code: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_package(tmp_path, monkeypatch, LIBRARY, code)
    finding = look_at("hub")
    assert finding.status is Status.BROKEN
    assert found in finding.found
    assert "\n" not in finding.found
    assert finding.fix.endswith("pip install --constraint constraints.txt huggingface-hub")


def test_a_library_that_hangs_is_a_line_within_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    plant_package(tmp_path, monkeypatch, LIBRARY, code)
    finding = look_at("hub", limit=3.0)
    assert (finding.status, finding.found) == (Status.BROKEN, "no answer within 3 s")
    assert not Path(f"/proc/{pid.read_text()}").exists(), "the process that hangs is left behind"


def test_what_stands_upon_a_crash_is_not_tried_and_the_rest_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    plant_package(tmp_path, monkeypatch, "bitsandbytes", code)
    found = look("torch", "bitsandbytes", "devices", "float32", "nf4")
    assert "SIGSEGV" in found["bitsandbytes"][0].found
    assert [f.found for f in found["nf4"]] == ["not tried"]
    assert "(bitsandbytes)" in found["nf4"][0].meaning
    assert {f.status for f in found["float32"]} == {Status.OK}


def test_a_check_that_fails_itself_says_so_in_one_line() -> None:
    broken = _check("finding:Finding.from_plain")  # wants an argument, and is no check
    [finding] = run_here(broken, 5.0)
    assert finding.status is Status.BROKEN
    assert finding.found.startswith("AttributeError") or finding.found.startswith("TypeError")


def test_a_check_that_hangs_in_this_process_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe that nobody writes to: as a disk of a server that has gone."""
    import os

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr("qlora_pl.doctor.installation.packages.own", pipe.read_bytes)
    began = time.monotonic()
    [finding] = run_here(_check("installation.packages:python"), 0.5)
    assert finding.found == "no answer within 0.5 s"
    assert time.monotonic() - began < 30
    pipe.write_bytes(b"")  # lets the thread go


def test_where_no_process_can_be_started_every_check_still_has_its_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    for findings in look("torch", "devices", "gloo").values():
        assert [finding.status for finding in findings] == [Status.BROKEN]
        assert findings[0].found.startswith("FileNotFoundError")


def test_every_check_is_found_and_none_waits_for_one_that_comes_later() -> None:
    lanes = {check.lane for check in CHECKS} - {HERE}
    for lane in lanes:
        done: set[str] = set()
        for check in order_of_work(lane):
            assert set(check.needs) <= done
            done.add(check.name)
        assert done == {check.name for check in CHECKS if check.lane == lane}
    for check in CHECKS:
        assert callable(check.load())


def _check(trial: str) -> Check:
    return Check(name="planted", title="planted", group="", lane=HERE, trial=trial)
