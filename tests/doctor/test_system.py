"""Limits of the system: each can be too low, and then says what dies of it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from broken_world import look, look_at

from qlora_pl.doctor.finding import Status
from qlora_pl.doctor.surroundings import room, system


def test_too_few_open_files_are_a_warning() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        finding = look_at("open-files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert finding.status is Status.WARNING
    assert finding.found == "256 at a time"
    assert finding.fix.startswith("ulimit -n ")


def test_a_small_shared_memory_is_a_warning() -> None:
    """/proc is a file system without any room."""
    [finding] = system.shared_memory(Path("/proc"))
    assert finding.status is Status.WARNING
    assert "Bus error" in finding.meaning
    [finding] = system.shared_memory(Path("/no/such/place"))
    assert finding.status is Status.NOTE


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "broken"),
        ({"LC_ALL": "C", "PYTHONUTF8": "1"}, "ok"),
    ],
)
def test_a_locale_that_misreads_files_is_broken(settings: dict[str, str], status: str) -> None:
    """Python itself is started so, and reads a file with an umlaut."""
    code = (
        "import json, pathlib, sys\n"
        "from qlora_pl.doctor.surroundings.system import encoding\n"
        "[finding] = encoding()\n"
        "try: right = pathlib.Path(sys.argv[1]).read_text() == 'Stra\\u00dfe'\n"
        "except UnicodeDecodeError: right = False\n"
        "print(json.dumps([finding.to_plain()['status'], right]))"
    )
    file = Path(os.environ["QLORA_PL_CACHE"]) / "umlaut.txt"
    file.write_text("Straße", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        env=os.environ | settings | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [status, status == "ok"]


def test_a_clock_that_stands_before_the_installation_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert look_at("clock").status is Status.OK
    monkeypatch.setattr(system.time, "time", lambda: 0.0)
    finding = look_at("clock")
    assert finding.status is Status.WARNING
    assert finding.found == "1970-01-01 00:00 UTC"


def test_variables_that_slow_everything_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in system.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert look_at("settings").status is Status.OK
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    monkeypatch.setenv("MASTER_ADDR", "gpu-17.example.org")
    warning, note = look("settings")["settings"]
    assert (warning.status, warning.fix) == (Status.WARNING, "unset CUDA_LAUNCH_BLOCKING")
    assert "MASTER_ADDR is set" in note.found
    assert "gpu-17" not in note.found


@pytest.mark.parametrize("place", ["/proc/cache", "file/cache"])
def test_a_folder_that_cannot_be_written_to_is_broken(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even root can make a folder in /proc, or below a file."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_PL_CACHE", str(tmp_path / place))
    found = {finding.title: finding for finding in look("disk")["disk"]}
    assert found["packed weights"].status is Status.BROKEN
    assert "cannot be written to" in found["packed weights"].found
    assert found["packed weights"].fix.startswith("export QLORA_PL_CACHE=")


def test_looking_at_a_folder_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_PL_CACHE", str(tmp_path / "not" / "made"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    found = look("disk")["disk"]
    assert {finding.status for finding in found} <= {Status.OK, Status.WARNING}
    assert list(tmp_path.iterdir()) == []
    free = shutil.disk_usage(tmp_path).free / 10**9
    for finding in found:
        said = float(finding.found.split("writable, ")[1].split(" GB")[0].replace(",", ""))
        assert said == pytest.approx(free, abs=1.0)


def test_little_room_is_a_warning_and_none_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk stays as it is; a run's size, and what no run can do without, grow beyond it."""
    free = shutil.disk_usage(tmp_path).free
    monkeypatch.setattr(room, "RUN_BYTES", 2 * free)
    finding = room.look_at("runs", tmp_path, "--run.root", "run")
    assert finding.status is Status.WARNING
    assert "room for 0" in finding.meaning
    monkeypatch.setattr(room, "LEAST_BYTES", 2 * free)
    finding = room.look_at("runs", tmp_path, "--run.root", "run")
    assert finding.status is Status.BROKEN
    assert finding.fix.startswith("qlora-pl fit --run.root ")


FILLED = """
import sys
from pathlib import Path
from qlora_pl.doctor.surroundings.room import look_at
finding = look_at("runs", Path(sys.argv[1]) / "runs", "--run.root", "run")
print(finding.status, "|", finding.found)
"""


def test_a_disk_that_is_really_full_is_broken(tmp_path: Path) -> None:
    """A disk of 16 KiB in memory, mounted for one process alone and filled."""
    mounted = f"mount -t tmpfs -o size=16k none '{tmp_path}'"
    own = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*own, mounted], check=False).returncode:
        pytest.skip("this system lets nobody mount a disk of one's own")
    filled = f"{mounted} && ! head -c 64k /dev/zero > '{tmp_path}/fill' && exec \"$@\""
    done = subprocess.run(
        [*own, filled, "sh", sys.executable, "-c", FILLED, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("broken | ")
    assert "cannot be written to (No space left on device)" in done.stdout


def test_memory_is_what_psutil_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the container's limit is lower; others take and give memory meanwhile."""
    free, total, said_by = room.host_memory()
    if said_by == "the machine":
        assert total == psutil.virtual_memory().total
        assert free == pytest.approx(psutil.virtual_memory().available, rel=0.5)
    assert 0 < free <= total <= psutil.virtual_memory().total
    monkeypatch.setattr(room, "LITTLE_MEMORY", 2 * total)
    assert look_at("memory").status is Status.WARNING


def test_sizes_are_those_of_the_page_on_models() -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    for name, (weights, packed) in room.BASES.items():
        [row] = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
        assert f"| {weights:,} |" in row
        assert f"| {packed / room.GB:.2f} GB |" in row


@pytest.mark.parametrize(
    "settings",
    [{}, {"HF_HOME": "/somewhere"}, {"HF_HUB_CACHE": "/else"}, {"XDG_CACHE_HOME": "/xdg"}],
    ids=str,
)
def test_downloads_go_where_the_hubs_client_puts_them(settings: dict[str, str]) -> None:
    """Against huggingface_hub's own constant, read in a process with the same environment."""
    code = (
        "from huggingface_hub.constants import HF_HUB_CACHE\n"
        "from qlora_pl.doctor.surroundings.room import hub_cache\n"
        "print(HF_HUB_CACHE); print(hub_cache().expanduser())"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | settings | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    theirs, ours = done.stdout.splitlines()
    assert ours == theirs
