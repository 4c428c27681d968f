"""Where the page listens and who may open it: settled before a folder is looked at."""

from __future__ import annotations

import socket
import sys
from typing import Any

import pytest
from trained import Type

from qlora_pl.chat.address import (
    PASSWORD_VARIABLE,
    Login,
    PageOptions,
    free_port,
    is_loopback,
    login_for,
)
from qlora_pl.errors import ConfigurationError

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # Gradio's own, where it is installed

SECRET = "correct horse battery"


@pytest.fixture(autouse=True)
def no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have set one."""
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--host", "0.0.0.0"], "--host: other machines can reach 0.0.0.0, so it needs a password"),
        (["--host", "::"], "--host: other machines can reach ::, so it needs a password"),
        (["--host", "192.168.1.5"], "other machines can reach 192.168.1.5"),
        (["--share"], "--share: everybody on the internet could use the page, so it needs a"),
        (["--share", "--host", "127.0.0.1"], "so it needs a password; set QLORA_PL_WEB_PASSWORD"),
        (["--user", "me"], "--user: there is no terminal to ask for a password; set QLORA_PL_WEB_"),
        (["--user", " "], "--user: is empty"),
        (["--port", "70000"], "--port: must lie between 0 and 65535, got 70000"),
        (["--host", ""], "--host: is empty"),
        (["--host", "no.such.host.invalid", "--share"], "so it needs a password"),
    ],
)
def test_what_cannot_be_is_told_before_the_folder_is_looked_at(
    type_in: Type, words: list[str], sentence: str, with_gradio: None
) -> None:
    code, out, said = type_in("chat", "--adapter", "nowhere", "--web", *words)
    assert (code, out) == (2, "")
    assert sentence in said
    assert len(said.strip().splitlines()) == 1
    assert "nowhere" not in said


@pytest.fixture
def with_gradio() -> None:
    """The command asks for it first."""
    pytest.importorskip("gradio")


def test_a_password_that_is_too_short_is_refused_and_not_printed(
    type_in: Type, monkeypatch: pytest.MonkeyPatch, with_gradio: None
) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, "pa55w")
    code, _, said = type_in("chat", "--adapter", "nowhere", "--web", "--host", "0.0.0.0")
    assert code == 2
    assert "The password has 5 characters; take at least 8." in said
    assert "pa55w" not in said


def test_a_port_that_is_taken_is_one_sentence(type_in: Type, with_gradio: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, said = type_in("chat", "--adapter", "nowhere", "--web", "--port", port)
    assert code == 2
    assert f"--port: the page cannot listen on port {port} of 127.0.0.1 (address already" in said
    assert len(said.strip().splitlines()) == 1


def test_without_gradio_the_page_names_the_command_that_installs_it(
    type_in: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, said = type_in("chat", "--adapter", "nowhere", "--web")
    assert code == 2
    assert said == (
        "qlora-pl: --web: the page needs Gradio, which is not installed; run: "
        'pip install "qlora-pl[web]"\n'
    )


def test_a_flag_of_the_page_without_the_page_is_refused(type_in: Type) -> None:
    code, _, said = type_in("chat", "--adapter", "nowhere", "--port", "7000")
    assert code == 2
    assert "--port: is for the page; add --web." in said


def test_who_may_open_the_page() -> None:
    asked: list[str] = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        return SECRET

    def login(environment: dict[str, str] | None = None, **options: Any) -> Login | None:
        return login_for(PageOptions(web=True, **options), environment or {}, ask)

    assert login() is None
    assert asked == []
    assert login(user="me") == Login("me", SECRET)
    assert asked == ["Password for me: "]
    assert login({PASSWORD_VARIABLE: SECRET}) == Login("qlora", SECRET)
    assert login({PASSWORD_VARIABLE: SECRET}, user="me", share=True) == Login("me", SECRET)
    assert len(asked) == 1
    assert SECRET not in repr(login(user="me"))


def test_a_password_that_was_not_typed_is_no_password() -> None:
    with pytest.raises(ConfigurationError, match="has 0 characters"):
        login_for(PageOptions(web=True, user="me"), {}, lambda _: "")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"])
def test_these_addresses_are_this_machines_own(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "10.0.0.1", "localhost.example.com", "127.0.0.1.example.com"]
)
def test_these_are_not(host: str) -> None:
    assert not is_loopback(host)


def test_port_0_is_one_that_is_free() -> None:
    port = free_port(PageOptions(web=True, port=0))
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_an_address_that_nobody_knows_is_told() -> None:
    with pytest.raises(ConfigurationError, match=r"--host: 'no\.such' is no address"):
        free_port(PageOptions(web=True, host="no.such"))
