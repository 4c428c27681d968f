"""Which folder a run writes to, which checkpoint it continues, and who else may write there."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_pl.errors import ConfigurationError
from qlora_pl.training.run_folders.run_folder import (
    Resolved,
    RunConfig,
    checkpoint_path,
    find_checkpoint,
    forget_if_nothing_happened,
    resolve_run,
)
from qlora_pl.training.run_folders.run_lock import RunLock


def save(run: Path, step: int, text: str = "content", digest: str | None = None) -> Path:
    """A checkpoint of a run, with a digest that fits unless another is given."""
    path = checkpoint_path(run, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest() if digest is None else digest
    path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n")
    return path


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(name="a", root=str(tmp_path))


def complete(run: Path) -> None:
    (run / "metrics.json").write_text('{"is_complete": true}')


# -- which checkpoint ------------------------------------------------------------------------------


def test_a_start_that_died_before_its_first_checkpoint_hides_no_unfinished_run(
    config: RunConfig,
) -> None:
    unfinished = save(config.experiment / "version_0", 4)
    (config.experiment / "version_1").mkdir()
    assert find_checkpoint(config, "auto") == unfinished
    assert find_checkpoint(config, "last") == unfinished
    assert resolve_run(config, "fit", "auto") == Resolved(
        config.experiment / "version_0", unfinished, is_resumed=True
    )


def test_auto_starts_anew_after_a_complete_run_though_an_older_one_is_unfinished(
    config: RunConfig,
) -> None:
    save(config.experiment / "version_0", 4)
    save(config.experiment / "version_1", 9)
    complete(config.experiment / "version_1")
    assert find_checkpoint(config, "auto") is None


def test_a_damaged_checkpoint_is_passed_over_by_name_and_reason(config: RunConfig) -> None:
    run = config.experiment / "version_0"
    good = save(run, 4)
    altered = save(run, 6, digest="0" * 64)
    bare = save(run, 8)
    bare.with_name(bare.name + ".sha256").unlink()
    resolved = resolve_run(config, "fit", "last")
    assert resolved.checkpoint == good
    assert resolved.is_resumed
    assert resolved.passed_over == (
        f"'{bare}' ({bare.name}.sha256 is missing)",
        f"'{altered}' (its SHA-256 is not what {altered.name}.sha256 says)",
    )


@pytest.mark.parametrize("name", [".", "..", "..."])
def test_a_run_does_not_leave_its_root(name: str) -> None:
    with pytest.raises(ConfigurationError, match="would lie outside"):
        RunConfig(name=name)


def test_only_a_folder_without_results_is_forgotten(tmp_path: Path) -> None:
    for name in ("metrics.csv", "metrics.json", "predictions.jsonl", "checkpoints", "run.yaml"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).touch()
        forget_if_nothing_happened(Resolved(folder, None, is_resumed=True))
        assert folder.exists()
        forget_if_nothing_happened(Resolved(folder, None, is_resumed=False))
        assert folder.exists() == (name != "run.yaml")


# -- who writes ------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    with pytest.raises(ConfigurationError) as refused:
        RunLock(tmp_path)
    assert f"'{tmp_path}' is being written by process {os.getpid()} on " in str(refused.value)
    assert "--ckpt_path" in str(refused.value)
    lock.release()
    lock.release()
    RunLock(tmp_path).release()


HOLDER = """
import os, sys, time
from pathlib import Path
from qlora_pl.training.run_folders.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
if not os.fork():
    print(os.getpid(), flush=True)  # by now the child has let go of what it inherited
time.sleep(60)
"""


def test_a_killed_writer_holds_nothing_though_a_process_that_it_started_lives(
    tmp_path: Path,
) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(ConfigurationError, match=f"process {holder.pid} on"):
            RunLock(tmp_path)
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # still there
        RunLock(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        holder.kill()
        holder.stdout.close()


def test_a_file_system_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    RunLock(tmp_path).release()
    assert "without locks" in caplog.text
