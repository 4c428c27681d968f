"""What is written is whole or absent, at whichever byte the disk gives out."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_pl.errors import TrainingStoppedError
from qlora_pl.files import (
    TEMPORARY_PREFIX,
    remove_leftovers,
    serialize,
    sha256_bytes,
    sha256_file,
    share_as_folder,
    write_atomic,
    write_folder_atomic,
    write_json,
)
from qlora_pl.merging.writing import write_shards

FILES = {"a.json": "{}", "b.bin": b"\x00\xff", "deeper/c.txt": "é"}
WRITTEN = {
    "adapter/a.json": b"{}",
    "adapter/b.bin": b"\x00\xff",
    "adapter/deeper/c.txt": "é".encode(),
}


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def fail_at_sync(monkeypatch: pytest.MonkeyPatch):
    """Makes the nth flush to disk from now on fail; counts them."""
    real = os.fsync

    def arrange(number: int, code: int = errno.ENOSPC) -> list[int]:
        calls = []

        def fsync(descriptor: int) -> None:
            calls.append(descriptor)
            if len(calls) == number:
                raise OSError(code, os.strerror(code))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        return calls

    return arrange


def test_sha256_equals_the_published_digest(tmp_path):
    """Source: FIPS 180-2, appendix B.1, the digest of 'abc'."""
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_bytes(b"abc") == sha256_file(tmp_path / "abc") == expected


def test_a_written_file_holds_its_content_and_leaves_nothing_beside_it(tmp_path):
    write_atomic(tmp_path / "new" / "x.txt", "é")
    write_atomic(tmp_path / "new" / "x.txt", b"\x00\x01")
    assert content(tmp_path) == {"new/x.txt": b"\x00\x01"}


def test_a_written_file_has_the_permissions_of_any_other(tmp_path):
    write_atomic(tmp_path / "ours", "")
    (tmp_path / "any").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_json_is_readable_again(tmp_path):
    write_json(tmp_path / "x.json", {"path": tmp_path, "number": 1.5})
    assert json.loads((tmp_path / "x.json").read_text()) == {"path": str(tmp_path), "number": 1.5}


def test_a_full_disk_leaves_the_file_that_was_there_and_is_named(tmp_path, fail_at_sync):
    write_atomic(tmp_path / "x", "old")
    fail_at_sync(1)
    with pytest.raises(TrainingStoppedError, match=r"disk is full: '.*/x' was not written"):
        write_atomic(tmp_path / "x", "new")
    assert content(tmp_path) == {"x": b"old"}


def test_a_limit_on_file_sizes_leaves_the_file_that_was_there(tmp_path):
    """Source: the kernel's own EFBIG (RLIMIT_FSIZE), in the middle of a write."""
    write_atomic(tmp_path / "x", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(TrainingStoppedError, match=r"'.*/x' could not be written \(File too"):
            write_atomic(tmp_path / "x", b"n" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert content(tmp_path) == {"x": b"old"}


def test_a_file_where_a_folder_should_be_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingStoppedError, match=r"'.*/file/x' could not be written"):
        write_atomic(tmp_path / "file" / "x", "new")
    with pytest.raises(TrainingStoppedError, match=r"'.*/file/x' could not be written"):
        write_folder_atomic(tmp_path / "file" / "x", FILES)
    assert content(tmp_path) == {"file": b""}


def test_a_folder_is_written_with_all_its_files(tmp_path):
    write_folder_atomic(tmp_path / "run" / "adapter", FILES)
    assert content(tmp_path / "run") == WRITTEN
    assert (tmp_path / "run" / "adapter").stat().st_mode & 0o777 == 0o755


def test_a_folder_is_never_overwritten(tmp_path):
    write_folder_atomic(tmp_path / "adapter", {"a": "old"})
    with pytest.raises(TrainingStoppedError, match="exists already and is never overwritten"):
        write_folder_atomic(tmp_path / "adapter", FILES)
    assert content(tmp_path) == {"adapter/a": b"old"}


def test_a_folder_is_whole_or_absent_at_whichever_flush_the_disk_fills_up(tmp_path, fail_at_sync):
    """The flushes of a write that succeeds are counted; then each of them fails in turn."""
    num_flushes = len(flushes(fail_at_sync, tmp_path / "0" / "adapter"))
    for number in range(1, num_flushes + 1):
        parent = tmp_path / str(number)
        fail_at_sync(number)
        with pytest.raises(TrainingStoppedError, match=rf"disk is full: '{parent}/adapter'"):
            write_folder_atomic(parent / "adapter", FILES)
        # The last flush only makes the finished folder's name durable.
        assert content(parent) == (WRITTEN if number == num_flushes else {})


def flushes(fail_at_sync, folder: Path) -> list[int]:
    calls = fail_at_sync(0)
    write_folder_atomic(folder, FILES)
    return calls


def test_a_write_that_is_killed_leaves_only_what_remove_leftovers_clears(tmp_path):
    """A process of its own is killed by the kernel inside the flush, between write and rename."""
    write_atomic(tmp_path / "x", "old")
    (tmp_path / f"{TEMPORARY_PREFIX}folder").mkdir()
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from qlora_pl.files import write_atomic\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomic(Path(sys.argv[1]), 'new')"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(content(tmp_path)) == 2
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert content(tmp_path) == {"x": b"old"}


def test_two_writers_of_one_file_leave_one_of_the_two_contents(tmp_path):
    texts = ["a" * 50_000, "b" * 50_000]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda n: write_atomic(tmp_path / "x", texts[n % 2]), range(100)))
    (written,) = content(tmp_path).values()
    assert written.decode() in texts


def test_serialized_tensors_load_with_weights_only(tmp_path):
    (tmp_path / "x.pt").write_bytes(serialize({"weight": torch.arange(3), "step": 1}))
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert loaded["weight"].tolist() == [0, 1, 2]
    assert loaded["step"] == 1


@pytest.mark.parametrize(("folder", "file"), [(0o755, 0o644), (0o770, 0o660), (0o700, 0o600)])
def test_a_file_is_read_by_those_who_may_read_its_folder(tmp_path, folder, file):
    """Safetensors makes its files for one user alone, and a lab shares merged models and caches."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(folder)
    save_file({"x": torch.zeros(1)}, tmp_path / "shared/x.safetensors")
    share_as_folder(tmp_path / "shared/x.safetensors")
    assert (tmp_path / "shared/x.safetensors").stat().st_mode & 0o777 == file


def test_merged_weights_are_read_by_those_who_may_read_their_folder(tmp_path):
    tmp_path.chmod(0o755)
    write_shards(tmp_path, [{"x": torch.zeros(4)}])
    [path] = tmp_path.glob("*.safetensors")
    assert path.stat().st_mode & 0o777 == 0o644
