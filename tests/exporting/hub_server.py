"""A far side for the real client of the Hugging Face Hub: the addresses that a push asks for."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What the server was told.

    Attributes:
        address: Of the server.
        repos: Whether each is private, by name.
        files: Content of what was committed, by name.
        tokens: What requests were authorised with.
        refuses: Whether a commit is answered with an error.
    """

    def __init__(self) -> None:
        self.address = ""
        self.repos: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.refuses = False
        self._large: dict[str, bytes] = {}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of a request."""
        path = path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            name = name if "/" in name else f"me/{name}"
            if name in self.repos:
                return 409, {"error": "exists", "url": f"{self.address}/{name}"}
            self.repos[name] = asked.get("private") or asked.get("visibility") == "private"
            return 200, {"url": f"{self.address}/{name}", "name": name}
        if path == "/api/validate-yaml":  # of README.md
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            return 200, {"files": [self._mode(file) for file in json.loads(body)["files"]]}
        if path.endswith("/info/lfs/objects/batch"):
            places = [self._place(one) for one in json.loads(body)["objects"]]
            return 200, {"transfer": "basic", "objects": places}
        if path.startswith("/large/"):
            self._large[path.rpartition("/")[2]] = body
            return 200, {}
        if "/commit/" in path:
            return self._commit(path, body)
        if path.startswith("/api/models/") and method == "GET":
            name = "/".join(path.split("/")[3:5])
            found = {"id": name, "modelId": name, "private": self.repos[name], "siblings": []}
            return 200, found | {"tags": [], "sha": "0" * 40}
        return 404, {"error": f"{method} {path}"}

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _place(self, one: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.address}/large/{one['oid']}", "header": {}}
        return {"oid": one["oid"], "size": one["size"], "actions": {"upload": upload}}

    def _commit(self, path: str, body: bytes) -> tuple[int, Any]:
        if self.refuses:
            return 403, {"error": "You have no write access."}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.files[value["path"]] = self._large[value["oid"]]
        name = "/".join(path.split("/")[3:5])
        return 200, {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1"}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The server, on a free port of the loopback address, within the block."""

    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.tokens.add(self.headers.get("Authorization") or "")
            status, found = hub.answer(self.command, self.path, body)
            content = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
