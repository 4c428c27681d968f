"""Processes that meet, and a Hub that answers, refuses, lies or is silent."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from broken_world import a_hub, look, look_at

from qlora_pl.doctor.finding import Finding, Status

TOKEN = "hf_" + "planted0" * 5


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who has never logged in."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)


def ask() -> dict[str, Finding]:
    return {finding.title: finding for finding in look("hub")["hub"]}


def test_two_processes_meet_here() -> None:
    assert look_at("gloo").status is Status.OK


@pytest.mark.slow
def test_processes_that_cannot_meet_are_a_warning_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    finding = look_at("gloo")
    assert finding.status is Status.WARNING
    assert "nosuch0" in finding.found


def test_a_hub_that_answers_and_knows_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with a_hub() as (address, tokens):
        monkeypatch.setenv("HF_ENDPOINT", address)
        found = ask()
    assert found["Hub"].status is Status.OK
    assert (found["token"].status, found["token"].found) == (
        Status.OK,
        "from HF_TOKEN; the Hub knows it",
    )
    assert tokens[-1] == f"Bearer {TOKEN}"
    assert TOKEN not in str(found)


def test_a_token_that_is_refused_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "token").write_text(TOKEN)
    with a_hub(whoami=401) as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        found = ask()
    assert found["token"].status is Status.WARNING
    assert "status 401" in found["token"].found
    assert found["token"].fix == "hf auth login"
    assert TOKEN not in str(found)


def test_no_token_is_worth_knowing(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_hub() as (address, tokens):
        monkeypatch.setenv("HF_ENDPOINT", address)
        found = ask()
    assert found["token"].status is Status.NOTE
    assert set(tokens) == {""}


def test_a_page_that_asks_to_sign_in_is_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_hub(models=None) as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        found = ask()
    assert found["Hub"].status is Status.WARNING


def test_a_clock_that_differs_from_the_hubs_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_hub(date="Mon, 03 Jan 2000 10:00:00 GMT") as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        found = ask()
    assert found["clock"].status is Status.WARNING
    assert "ahead of" in found["clock"].found


def test_a_hub_that_cannot_be_reached_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        found = ask()
    assert found["Hub"].status is Status.WARNING
    assert found["Hub"].found.startswith("HF_ENDPOINT cannot be reached")


def test_a_hub_that_is_silent_does_not_hold_doctor_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_hub(seconds=30) as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        found = ask()
    assert found["Hub"].status is Status.WARNING
    assert "imeout" in found["Hub"].found or "timed out" in found["Hub"].found


def test_offline_mode_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with a_hub() as (address, tokens):
        monkeypatch.setenv("HF_ENDPOINT", address)
        found = ask()
    assert found["Hub"].status is Status.NOTE
    assert tokens == []
