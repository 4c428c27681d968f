"""The Hub: whether it answers, whether it knows the token, and what it takes the time to be."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import get_session

from qlora_pl.doctor.finding import Finding, Status, first_line

SECONDS = 5.0
"""For each of at most two questions."""
LARGEST_SKEW = 300
"""Seconds; certificates and signed addresses are refused somewhere beyond."""


def hub() -> Iterator[Finding | str]:
    """Ask the Hub for one name, and about the token if there is one; the token is never shown."""
    token, origin = find_token()
    if constants.HF_HUB_OFFLINE:
        yield Finding(
            title="Hub",
            status=Status.NOTE,
            found="HF_HUB_OFFLINE is set: not asked",
            meaning="bases, tokenizers and datasets come from folders and the cache alone",
            fix="unset HF_HUB_OFFLINE TRANSFORMERS_OFFLINE",
        )
        yield _of_token(origin, None)
        return
    where = "huggingface.co" if _is_the_hub() else "HF_ENDPOINT"
    yield where
    try:
        answer = _ask("/api/models?limit=1")
        names = answer.json() if answer.status_code == 200 else None
    except Exception as error:  # whatever the client raises means that it cannot be reached
        yield _unreachable(where, first_line(error))
        yield _of_token(origin, None)
        return
    if not isinstance(names, list):
        yield _unreachable(where, f"answers with status {answer.status_code} and no list of models")
    else:
        yield Finding(
            title="Hub",
            status=Status.OK,
            found=f"{where} answers",
            meaning="bases, tokenizers and datasets can be fetched by name",
        )
    yield from _skew(answer.headers.get("date", ""))
    yield "the token"
    status = _ask("/api/whoami-v2", token).status_code if token else None
    yield _of_token(origin, status)


def find_token() -> tuple[str, str]:
    """The token that the libraries will send, and where it comes from; empty if there is none."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name, "").strip():
            return token, name
    try:
        token = Path(constants.HF_TOKEN_PATH).read_text().strip()
    except OSError:
        return "", ""
    return token, "the token file of `hf auth login`" if token else ""


def _ask(path: str, token: str = "") -> Any:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return get_session().get(constants.ENDPOINT + path, headers=headers, timeout=SECONDS)


def _is_the_hub() -> bool:
    return constants.ENDPOINT == "https://huggingface.co"


def _unreachable(where: str, why: str) -> Finding:
    return Finding(
        title="Hub",
        status=Status.WARNING,
        found=f"{where} cannot be reached ({why})",
        meaning="only folders and what is cached can be used; names on the Hub fail at the start",
        fix="export HF_HUB_OFFLINE=1",
    )


def _of_token(origin: str, status: int | None) -> Finding:
    """What the Hub said of the token."""
    if not origin:
        return Finding(
            title="token",
            status=Status.NOTE,
            found="none",
            meaning="gated bases (Llama, Gemma) cannot be fetched; open ones can",
            fix="hf auth login",
        )
    if status is None or status == 200:
        known = "the Hub knows it" if status else "not asked about"
        return Finding(
            title="token",
            status=Status.OK,
            found=f"from {origin}; {known}",
            meaning="gated bases can be fetched once their licence is accepted on their page",
        )
    return Finding(
        title="token",
        status=Status.WARNING,
        found=f"from {origin}; the Hub refuses it (status {status})",
        meaning="every download fails, open bases too: the token is sent with each",
        fix="hf auth login" if origin.startswith("the") else f"unset {origin}",
    )


def _skew(date: str) -> Iterator[Finding]:
    """The clock here against the answer's."""
    try:
        there = parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return
    skew = time.time() - there
    if abs(skew) > LARGEST_SKEW:
        yield Finding(
            title="clock",
            status=Status.WARNING,
            found=f"{abs(skew):,.0f} s {'ahead of' if skew > 0 else 'behind'} the Hub's",
            meaning="downloads fail at certificates and signed addresses",
            fix="timedatectl set-ntp true",
        )
