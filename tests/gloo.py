"""Runs a test program as several processes that talk through gloo."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import warm


def run_processes(program: Path, number: int, settings: dict[str, Any]) -> str:
    """Start ``program`` with ``settings`` as JSON and torchrun's variables; what all have said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    places = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    ended = warm.run(program, json.dumps(settings), environments=places)
    said = "\n".join(process.stdout + process.stderr for process in ended)
    assert all(process.returncode == 0 for process in ended), said
    return said
