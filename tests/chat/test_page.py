"""The page as it is served, over HTTP: to whom, what it holds, and what leaves this machine."""

from __future__ import annotations

import gc
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trained import Type

from qlora_pl.chat.address import Login, PageOptions, free_port
from qlora_pl.inference.loading import Model
from qlora_pl.modeling.answers.decoding import DecodingConfig

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'qlora-pl[web]'")

import httpx

from qlora_pl.chat.website import Website, open_website

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # Gradio's own

LOGIN = Login("me", "correct horse battery")
API = "gradio_api"

calls: list[str] | None = None
"""Addresses that were looked up or connected to, while a test listens."""


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if calls is not None and event in ("socket.connect", "socket.getaddrinfo"):
        calls.append(str(arguments[1] if event == "socket.connect" else arguments[0]))


sys.addaudithook(_listen)  # which cannot be taken away again


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left_over() -> Iterator[None]:
    """Gradio leaves sockets and event loops to the collector, which complains in whatever test."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def website(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Iterator[Website]:
    """A page for this machine alone."""
    options = PageOptions(web=True, port=0)
    site = open_website(model, options, DecodingConfig(max_new_tokens=6), "Be brief.")
    yield site
    site.close()


@pytest.fixture(scope="module")
def guarded(model: Model) -> Iterator[Website]:
    """A page with a password."""
    site = open_website(model, PageOptions(web=True, port=0), login=LOGIN)
    yield site
    site.close()


def dependency(site: Website, name: str) -> int:
    """The number of a function behind the page."""
    found = [n for n, one in site._blocks.fns.items() if one.name == name]
    return found[0]


def use(client: httpx.Client, site: Website, name: str, data: list[Any], tab: str = "tab") -> str:
    """What the page would send when something on it is used; every event that comes back."""
    number = dependency(site, name)
    body = {"data": data, "fn_index": number, "session_hash": tab, "event_data": None}
    joined = client.post(f"{API}/queue/join", json=body)
    assert joined.status_code == 200, joined.text
    with client.stream(
        "GET", f"{API}/queue/data", params={"session_hash": tab}, timeout=60
    ) as lines:
        found = []
        for line in lines.iter_lines():
            found.append(line)
            if '"process_completed"' in line:
                break
    return "\n".join(found)


CONTROLS = ["on", "adapter", "base", "", False, 1, 1, 0, 1, 6]


def test_every_answer_tells_the_browser_to_fetch_nothing_from_elsewhere(website: Website) -> None:
    for path in ("", "config", f"{API}/startup-events", "no-such-page"):
        policy = httpx.get(website.address + path).headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert not re.search(r"https?:|\*", policy)


def test_the_page_asks_for_no_script_or_font_of_others(website: Website) -> None:
    page = httpx.get(website.address).text
    for tag in re.findall(r"<(?:script|link|img)[^>]*>", page):
        assert not re.search(r"(src|href)=.https?://(?!127\.0\.0\.1)", tag), tag
    config = httpx.get(website.address + "config").json()
    assert config["analytics_enabled"] is False
    assert not config.get("run_history", False)
    assert "fonts.googleapis" not in httpx.get(website.address + "theme.css").text


def test_the_model_and_its_settings_are_on_the_page(website: Website) -> None:
    parts = httpx.get(website.address + "config").json()["components"]
    by_label = {part["props"].get("label"): part["props"] for part in parts}
    assert by_label["System message"]["value"] == "Be brief."
    assert by_label["Answer length"]["value"] == 6
    assert by_label["Answer length"]["maximum"] == 256  # what the tiny model reads
    assert by_label["Temperature"]["interactive"] is False


def test_a_page_for_this_machine_answers_to_its_names_alone(website: Website) -> None:
    for host, code in (("evil.example", 403), ("localhost:1", 200), ("127.0.0.1", 200), ("", 403)):
        assert httpx.get(website.address, headers={"host": host}).status_code == code
    port = int(website.address.rstrip("/").rpartition(":")[2])
    with pytest.raises(ConnectionRefusedError):  # where 0.0.0.0 would answer too
        socket.create_connection(("127.0.0.2", port), timeout=5)


@pytest.mark.parametrize("path", ["file=README.md", "file=/etc/passwd", "file=../pyproject.toml"])
def test_no_file_of_this_machine_is_served(website: Website, path: str) -> None:
    assert httpx.get(f"{website.address}{API}/{path}").status_code in (403, 404)


def test_nothing_is_taken_in(website: Website) -> None:
    files = {"files": ("a.txt", b"text")}
    assert httpx.post(f"{website.address}{API}/upload", files=files).status_code == 403


def test_a_question_is_answered_and_what_cannot_be_is_told(
    website: Website, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with httpx.Client(base_url=website.address) as client:
        events = use(client, website, "ask", ["How many legs?", *CONTROLS])
        assert "6 tokens in" in events
        refused = use(client, website, "ask", ["And two?", *CONTROLS[:4], True, 0, *CONTROLS[6:]])
        assert "decoding.temperature: must be above 0, got 0." in refused
        lines = use(client, website, "lines_of", [])
        assert r"{\"messages\": [{\"role\": \"system\"" not in lines  # the visitor's, not --system
        assert r"{\"messages\": [{\"role\": \"user\", \"content\": \"How many legs?\"}" in lines
        assert "Nothing has been said yet." in use(client, website, "lines_of", [], tab="other")
        assert "Traceback" not in events + refused + lines


def test_nothing_leaves_this_machine(model: Model) -> None:
    """The interpreter tells every look-up and connection; Gradio's would come within a second."""
    global calls
    calls = []
    site = open_website(model, PageOptions(web=True, port=0), DecodingConfig(max_new_tokens=4))
    try:
        with httpx.Client(base_url=site.address) as client:
            use(client, site, "ask", ["How many legs?", *CONTROLS])
        time.sleep(1)
    finally:
        site.close()
        heard, calls = calls, None
    assert heard
    assert [one for one in heard if not re.search(r"127\.0\.0\.1|localhost|^/|::1", one)] == []


def test_a_conversation_is_written_nowhere(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TMPDIR", "GRADIO_TEMP_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", None)
    site = open_website(model, PageOptions(web=True, port=0))
    with httpx.Client(base_url=site.address) as client:
        use(client, site, "ask", ["Xylophones have many legs?", *CONTROLS])
        assert "Xylophones" in use(client, site, "lines_of", [])
    site.close()
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in found if b"Xylophones" in path.read_bytes()] == []


# -- passwords -------------------------------------------------------------------------------------


def test_without_the_password_there_is_nothing_to_see(guarded: Website) -> None:
    with httpx.Client(base_url=guarded.address) as client:
        assert client.get("config").status_code == 401
        body = {"data": ["?", *CONTROLS], "fn_index": dependency(guarded, "ask")}
        for path in (f"{API}/queue/join", f"{API}/run/predict"):
            answer = client.post(path, json={**body, "session_hash": "tab"})
            assert answer.status_code == 401, path
        page = client.get("").text
        assert "Temperature" not in page
        assert LOGIN.password not in page
        wrong = client.post("login", data={"username": LOGIN.user, "password": "wrong"})
        assert wrong.status_code == 400
        assert client.get("config").status_code == 401


def test_with_the_password_the_page_answers(guarded: Website) -> None:
    with httpx.Client(base_url=guarded.address) as client:
        said = {"username": LOGIN.user, "password": LOGIN.password}
        assert client.post("login", data=said).status_code == 200
        config = client.get("config")
        assert config.status_code == 200
        assert LOGIN.password not in config.text
        assert "6 tokens in" in use(client, guarded, "ask", ["How many legs?", *CONTROLS])


def test_a_public_page_cannot_be_opened_without_a_password(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Python as from the command."""
    from qlora_pl.errors import ConfigurationError

    monkeypatch.delenv("QLORA_PL_WEB_PASSWORD", raising=False)
    with pytest.raises(ConfigurationError, match="needs a password"):
        open_website(model, PageOptions(web=True, port=0, share=True))


# -- the command -----------------------------------------------------------------------------------


def test_the_command_serves_until_ctrl_c(type_in: Type, adapter: Path) -> None:
    port = free_port(PageOptions(web=True, port=0))
    seen: list[int] = []

    def press() -> None:
        for _ in range(600):
            time.sleep(0.1)
            with open_port(port) as is_open:
                if is_open:
                    break
        time.sleep(1)
        seen.append(httpx.get(f"http://127.0.0.1:{port}/config").status_code)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    pressing = threading.Thread(target=press)
    pressing.start()
    try:
        code, out, said = type_in("chat", "--adapter", adapter, "--web", "--port", port)
    finally:
        pressing.join()
        signal.signal(signal.SIGINT, before)
    assert (code, out, seen) == (0, "", [200])
    assert f"The page is at http://127.0.0.1:{port}/" in said
    assert "Traceback" not in said
    with open_port(port) as is_open:
        assert not is_open


class open_port:
    """Whether something listens on a port."""

    def __init__(self, port: int) -> None:
        self._socket = socket.socket()
        self._is_open = self._socket.connect_ex(("127.0.0.1", port)) == 0

    def __enter__(self) -> bool:
        return self._is_open

    def __exit__(self, *_: object) -> None:
        self._socket.close()
