"""What is freed while a base is loaded goes back to the system, whatever the C library would keep.

Each measurement is a process of its own, whose heap nobody else has touched.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MIB = 2**20
PROGRAM = """
import contextlib, sys
from qlora_pl.modeling.loading.host_memory import large_blocks_apart

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

block = bytearray(24 * 2**20)  # freed, it makes glibc keep what is smaller
del block
before = anonymous()
apart = large_blocks_apart() if sys.argv[1] == "apart" else contextlib.nullcontext()
with apart:
    temporary, kept = [], []
    for _ in range(16):
        temporary.append(bytearray(4 * 2**20))
        kept.append(bytearray(1024))  # above it, so that the heap's end cannot sink
    while temporary:
        temporary.pop()
    print(anonymous() - before)
"""


def left_by(kind: str) -> int:
    """Bytes that a process still has of 64 MiB that it has freed."""
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(said.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_blocks_of_a_tensors_size_are_given_back_as_they_are_freed() -> None:
    assert left_by("apart") < 2 * MIB
    assert left_by("as always") > 32 * MIB  # or else there would be nothing to do
