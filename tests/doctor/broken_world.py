"""Makes a world in which something is broken: packages, programs and answers that fail for real."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qlora_pl.doctor.checks import BY_NAME
from qlora_pl.doctor.command import examine
from qlora_pl.doctor.finding import Finding


def look(*names: str, limit: float = 60.0) -> dict[str, list[Finding]]:
    """What these checks find, as ``qlora-pl doctor`` runs them."""
    checks = [BY_NAME[name] for name in names]
    return {check.name: findings for check, findings in examine(checks, limit)}


def look_at(name: str, limit: float = 60.0) -> Finding:
    """The one finding of a check."""
    [finding] = look(name, limit=limit)[name]
    return finding


def plant_package(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> None:
    """Put a package before the installed one of its name, for this process and its children."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(folder)


def plant_metadata(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, version: str, *lines: str
) -> None:
    """Put metadata before the installed one's, as ``importlib.metadata`` finds it."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    head = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*head, *lines]) + "\n")
    monkeypatch.syspath_prepend(folder)


def plant_program(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    """Put a shell script before the programs of PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


NVIDIA_SMI = """gpu='NVIDIA L4, DRIVER, 23034 MiB, 8.9'
case "$1" in
--query-gpu=*) echo "$gpu"; echo "$gpu" ;;
*) echo '| NVIDIA-SMI DRIVER    Driver Version: DRIVER    CUDA Version: 12.4 |' ;;
esac"""
"""What nvidia-smi prints on a machine with two L4, in the form of its manual."""


@contextmanager
def a_hub(
    models: object = ({"id": "a/b"},),
    whoami: int = 200,
    seconds: float = 0.0,
    date: str | None = None,
) -> Iterator[tuple[str, list[str]]]:
    """A server that answers as the Hub does; its address, and the tokens that it has been sent."""
    tokens: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(seconds)
            tokens.append(self.headers.get("authorization", ""))
            is_whoami = self.path.startswith("/api/whoami")
            body = b"<html>sign in</html>" if models is None else json.dumps(models).encode()
            self.send_response_only(whoami if is_whoami else 200)
            self.send_header("date", date or self.date_time_string())
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", tokens
    finally:
        server.shutdown()
        server.server_close()
