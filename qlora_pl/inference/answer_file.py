"""A file of answers that a killed command leaves whole, and the same command goes on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_pl.errors import ConfigurationError
from qlora_pl.files import append_synced, sha256_bytes, write_atomic
from qlora_pl.inference.answering import Answer
from qlora_pl.inference.prompts import Prompt

SETTINGS = "settings"
"""The key under which a line says how it was made."""


class AnswerFile:
    """Lines of JSON, one an answer.

    Args:
        path: Where; may exist already, of the same command.
        settings: All that decides what an answer is.

    Raises:
        ConfigurationError: if the file holds something else.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._digest = digest_of(settings)
        self._done: dict[tuple[int, str], str] = {}
        if path.is_dir() or not path.parent.is_dir():
            raise ConfigurationError(
                f"--output: '{path}' is a folder, or lies in none; name a file."
            )
        if path.exists():
            self._read()

    def _read(self) -> None:
        lines = self.path.read_text(errors="replace").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        for number, line in enumerate(whole, start=1):
            try:
                row = json.loads(line)
                key, made, asked = (row["row"], row["adapter"]), row[SETTINGS], row["asked"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigurationError(
                    f"--output: '{self.path}', line {number}, holds no answer of this command; "
                    "choose another file, which is never overwritten."
                ) from error
            if made != self._digest:
                raise ConfigurationError(
                    f"--output: '{self.path}' holds answers that were made with other settings; "
                    "choose another file, or give the settings it was made with."
                )
            self._done[key] = asked
        if len(whole) < len(lines):  # a kill has cut the last one short
            write_atomic(self.path, "".join(whole))

    def has(self, prompt: Prompt, name: str) -> bool:
        """Whether a prompt was answered already.

        Raises:
            ConfigurationError: if another one was, in its place.
        """
        asked = self._done.get((prompt.row, name))
        if asked is not None and asked != _asked(prompt):
            raise ConfigurationError(
                f"--output: '{self.path}' answers another question than {prompt.where}; choose "
                "another file."
            )
        return asked is not None

    def add(self, prompt: Prompt, answer: Answer) -> None:
        """Write an answer, and the row that it answers, to the disk.

        Raises:
            TrainingStoppedError: if the disk is full.
        """
        line = line_of(prompt, answer) | {"asked": _asked(prompt), SETTINGS: self._digest}
        append_synced(self.path, json.dumps(line, ensure_ascii=False) + "\n")
        self._done[answer.row, answer.adapter] = _asked(prompt)


def line_of(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """An answer as a line: what was given with its question, and what came of it."""
    kept = {key: value for key, value in prompt.given.items() if key not in ("prompt",)}
    return {**kept, **answer.as_dict()}


def digest_of(settings: Mapping[str, Any]) -> str:
    """A short name for settings."""
    return sha256_bytes(json.dumps(settings, sort_keys=True, default=str).encode())[:16]


def _asked(prompt: Prompt) -> str:
    turns = [(m.role, m.content, m.context) for m in prompt.conversation.messages]
    return digest_of({"turns": turns})
