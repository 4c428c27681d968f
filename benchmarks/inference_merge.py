"""What merging costs: seconds, and anonymous memory above what the imports hold, by size."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from processes import anonymous_bytes, environment

SAMPLE_SECONDS = 0.05
IMPORTS = (
    "import torch, transformers, peft, bitsandbytes, time; print('ready', flush=True); input()"
)


def imports_bytes() -> int:
    """Anonymous memory of a process that has imported what merging imports."""
    with subprocess.Popen(
        [sys.executable, "-c", IMPORTS],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        while "ready" not in (line := process.stdout.readline()):
            if not line:
                raise RuntimeError("the imports failed")
        held = anonymous_bytes(process.pid)
        process.communicate("\n")
    return held


def merge(adapter: Path, base: str, words: list[str], folder: Path) -> dict[str, Any]:
    """Run ``qlora-pl merge`` and watch it.

    Args:
        adapter: Its folder.
        base: Its base.
        words: Further flags.
        folder: Where the merged model goes, for as long as this takes.
    """
    held = imports_bytes()
    output = Path(tempfile.mkdtemp(dir=folder)) / "merged"
    command = ["merge", "--adapter", str(adapter), "--base", base, "--output", str(output), *words]
    began, peak, is_done = time.perf_counter(), 0, threading.Event()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "qlora_pl", *command],
            env=environment(),
            stdout=said,
            stderr=subprocess.STDOUT,
        )

        def watch() -> None:
            nonlocal peak
            while not is_done.wait(SAMPLE_SECONDS):
                try:
                    peak = max(peak, anonymous_bytes(process.pid))
                except (FileNotFoundError, ProcessLookupError, PermissionError):
                    return  # it has ended

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        seconds = time.perf_counter() - began
        is_done.set()
        watcher.join()
        said.seek(0)
        text = said.read()
    found: dict[str, Any] = {
        "seconds": seconds,
        "exit_code": code,
        "peak_anonymous_bytes": max(peak - held, 0),
        "imports_anonymous_bytes": held,
    }
    if code == 0:
        files = list(output.rglob("*.safetensors"))
        found["written_bytes"] = sum(file.stat().st_size for file in files)
    else:  # measured all the same: a threshold may refuse it, or memory may not suffice
        found["said"] = re.sub(r"/\S+", "PATH", text)[-500:]
    shutil.rmtree(output.parent, ignore_errors=True)
    return found


def sizes_of(base: Path) -> int:
    """Bytes of a base's weights on the disk."""
    index = base / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else None
    files = base.glob("*.safetensors") if names is None else (base / name for name in names)
    return sum(file.stat().st_size for file in files)
