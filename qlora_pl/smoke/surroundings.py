"""Where a smoke test takes place: a temporary folder, and an environment that belongs to no job.

Nothing of either is left once the test is over, whatever ends it, so that tests can run beside each
other and in the middle of a job script.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_pl.errors import ConfigurationError
from qlora_pl.smoke import reaper

HUB_SECONDS = 3.0
"""For the Hub to answer."""
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
"""With which a user tells the libraries to ask the Hub for nothing."""
LAUNCHERS = re.compile(
    r"SLURM_|TORCHELASTIC_|OMPI_|PMI_|PMIX_|JSM_|MASTER_|QLORA_PL_RUN_FOLDER$|"
    r"(LOCAL_|GROUP_|ROLE_|NODE_)?(RANK|WORLD_SIZE)$"
)
"""Variables by which a run would take itself for a part of the job around it."""
COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""How many processes each launcher has started."""


def refuse_several() -> None:
    """One process is enough.

    Raises:
        ConfigurationError: if a launcher has started several.
    """
    is_several = any(_number(os.environ.get(name)) > 1 for name in COUNTS)
    if not is_several and "LOCAL_RANK" not in os.environ:
        return
    raise ConfigurationError(
        "smoke starts the processes of its run itself; call it once, without torchrun, srun or "
        "mpirun."
    )


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 1


@contextmanager
def temporary_folder(is_kept: bool) -> Iterator[Path]:
    """A folder that is gone after the block, and after this process, whatever ends either.

    Args:
        is_kept: Whether it stays.

    Raises:
        ConfigurationError: if none can be made.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="qlora-pl-smoke-"))
    except OSError as error:
        raise ConfigurationError(
            f"smoke can make no temporary folder ({error.strerror or error}); name a folder on a "
            "disk with some GB free in TMPDIR."
        ) from error
    words = [reaper.__file__, str(folder), "keep" if is_kept else "remove"]
    cleaner = subprocess.Popen(
        [sys.executable, "-I", "-S", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the test
    )
    try:
        with _unwinding_on_signals():
            yield folder
    finally:
        assert cleaner.stdin is not None
        cleaner.stdin.close()
        cleaner.wait()


@contextmanager
def _unwinding_on_signals() -> Iterator[None]:
    """Let signals unwind the stack, so that all is cleared up before this process is gone."""

    def stop(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def own_environment(folder: Path, is_online: bool) -> Iterator[None]:
    """Caches of the run go into the folder, GPUs are left to others, and no launcher is seen."""
    before = dict(os.environ)
    for name in [name for name in os.environ if LAUNCHERS.match(name)]:
        del os.environ[name]
    os.environ |= {
        reaper.MARK: str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
    }
    if not is_online:
        os.environ |= dict.fromkeys(OFFLINE, "1")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def refuse_full_disk(place: Path, num_bytes: float) -> None:
    """Look for room before anything is written.

    Args:
        place: The temporary folder.
        num_bytes: That a test will write there, at most.

    Raises:
        ConfigurationError: if there are fewer.
    """
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise ConfigurationError(
            f"smoke writes up to {num_bytes / 1e9:.1f} GB of temporary files, and '{place.parent}' "
            f"has {free / 1e9:.1f} GB free; name a folder on another disk in TMPDIR."
        )


def hub_answers() -> bool:
    """Whether the Hub can be asked: libraries would try for a minute before they gave up."""
    if any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in OFFLINE):
        return False
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urlopen(Request(address, method="HEAD"), timeout=HUB_SECONDS).close()
    except HTTPError:
        return True  # it answers
    except (OSError, ValueError):
        return False
    return True
