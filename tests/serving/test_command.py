"""``qlora-pl serve`` as users type it: mistakes before weights are loaded, and a clean end."""

from __future__ import annotations

import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import warm
from trained import Type

from qlora_pl.serving import command
from qlora_pl.serving.app import is_own_name

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # a run happens in this process


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("qlora_pl.inference.loading.load", load)
    monkeypatch.delenv(command.KEY_VARIABLE, raising=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_are_let_in_with_a_key_only(type_in: Type, adapter: Path, host: str) -> None:
    code, out, said = type_in("serve", "--adapter", adapter, f"--host={host}", "--port", "0")
    assert (code, out) == (2, "")
    assert len(said.splitlines()) == 1
    assert "QLORA_PL_API_KEY" in said


@pytest.mark.parametrize("key", ["", "two words", "caf\xe9", "line\nbreak"])
def test_a_key_that_no_client_can_send_is_refused(
    type_in: Type, adapter: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv(command.KEY_VARIABLE, key)
    code, _, said = type_in("serve", "--adapter", adapter, "--port", "0")
    assert code == 2
    assert "QLORA_PL_API_KEY: is empty, or has characters" in said
    assert not key or key not in said


def test_a_port_that_is_taken_is_told(type_in: Type, adapter: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, said = type_in("serve", "--adapter", adapter, "--port", port)
    assert code == 2
    assert f"--port: 127.0.0.1:{port} cannot be listened at (Address already in use)" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--port", "70000"), "--port: must lie between 0 and 65535"),
        (("--port", "http"), "--port: invalid int value"),
        (("--batch-size", "0"), "--batch-size: must be at least 1"),
        (("--num-beams", "2"), "--num-beams: a beam search knows its answer only at the end"),
        (("--host", "no.such.host.invalid"), "is no address of this machine"),
        (("--host=",), "--host: '' is no address of this machine"),
        (("--host", "192.0.2.1"), "can be reached from other machines"),
        (("--temperature", "0.5"), "have no effect with do_sample: false"),
        (("--adapter", "/nowhere"), "--adapter"),
    ],
)
def test_mistakes_are_one_sentence(
    type_in: Type, adapter: Path, words: tuple[str, ...], sentence: str
) -> None:
    code, out, said = type_in("serve", "--adapter", adapter, *words)
    assert (code, out) == (2, "")
    assert sentence in said


def test_what_is_not_installed_is_told_with_its_command(
    type_in: Type, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "LIBRARIES", ("starlette", "no_such_server"))
    code, _, said = type_in("serve", "--adapter", adapter, "--port", "0")
    assert code == 2
    assert "serve needs no_such_server, which is not installed" in said
    assert "pip install 'qlora-pl[serve]'" in said


def test_only_this_machine_has_its_own_names() -> None:
    for name in ("localhost", "a.localhost", "127.0.0.1", "127.8.9.1", "::1", "[::1]"):
        assert is_own_name(name)
    for name in ("", "localhost.example", "127.0.0.1.example", "10.0.0.1", "0.0.0.0", "8.8.8.8"):
        assert not is_own_name(name)


# -- a process -------------------------------------------------------------------------------------


Running = tuple[warm.Started, str, list[str]]


@pytest.fixture
def started(adapter: Path) -> Iterator[Running]:
    """The command in a process of its own: it, its address, and what it says."""
    words = ["serve", "--adapter", str(adapter), "--port", "0", "--max-new-tokens", "200"]
    key = {command.KEY_VARIABLE: "a-key-of-this-test"}
    with warm.Started("qlora_pl", *words, environment=key) as process:
        said: list[str] = []
        address = ""
        for line in process.stderr:
            said.append(line)
            if found := re.match(r"Listening at (\S+) for adapter, base\.", line):
                address = found[1]
                break
        assert address, said
        stderr = process.stderr
        reader = threading.Thread(target=lambda: said.extend(stderr))
        reader.start()
        yield process, address, said
        process.kill()
        reader.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_ends_it_cleanly_in_mid_stream(started: Running, number: int) -> None:
    process, address, said = started
    secret = "what nobody may read"
    with openai.OpenAI(base_url=address, api_key="a-key-of-this-test", max_retries=0) as client:
        words = {"model": "adapter", "messages": [{"role": "user", "content": secret}]}
        assert client.chat.completions.create(**words, max_tokens=4).choices  # type: ignore
        stream = client.chat.completions.create(stream=True, **words)  # type: ignore
        next(iter(stream))
        process.send_signal(number)
        with pytest.raises(openai.APIError):
            list(stream)
    assert process.wait(timeout=30) == 0
    assert process.stdout.read() == ""
    text = "".join(said)
    assert "Traceback" not in text
    assert secret not in text
    assert "a-key-of-this-test" not in text
    assert re.search(r"adapter: 1 of 1 answered, \d+ \+ 4 tokens, \d+\.\d s", text)
