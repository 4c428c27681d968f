"""Three rows of each format, in place of a dataset that cannot be had.

They are in the schema of their format and in this project's own words; what only the real rows can
show (their lengths, their mistakes) is not tested with them, which the checklist says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_pl.data.reading.named_datasets import DATASETS
from qlora_pl.data.reading.source_config import SourceConfig
from qlora_pl.errors import ConfigurationError

COPIES = 12
"""Of the three rows, so that there are enough for a few steps and a validation."""
PAIRS = (
    ("What does a lock on a canal do?", "It lifts a boat, or lets it down."),
    ("Name a bird that sings at night.", "The nightingale."),
    ("Put it into the plural: one goose.", "Two geese."),
)
CONTEXTS = ("", "", "one goose")


def _pairs(asked: str, answered: str, context: str | None = None) -> list[dict[str, Any]]:
    return [
        {asked: question, answered: answer} | ({context: given} if context else {})
        for (question, answer), given in zip(PAIRS, CONTEXTS, strict=True)
    ]


def _texts(before: str, between: str) -> list[str]:
    return [f"{before}{question}{between}{answer}" for question, answer in PAIRS]


def _messages(role: str, content: str, names: tuple[str, str]) -> list[list[dict[str, str]]]:
    return [
        [{role: names[0], content: question}, {role: names[1], content: answer}]
        for question, answer in PAIRS
    ]


def _trees() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(PAIRS):
        shared: dict[str, Any] = {
            "message_tree_id": f"t{number}",
            "tree_state": "ready_for_export",
            "lang": "en",
        }
        shared |= {"deleted": False, "review_result": True}
        asked = {"message_id": f"t{number}", "parent_id": None, "role": "prompter", "rank": None}
        answered = {"message_id": f"a{number}", "parent_id": f"t{number}", "role": "assistant"}
        rows += [
            asked | {"text": question} | shared,
            answered | {"text": answer, "rank": 0} | shared,
        ]
    return rows


def _instances(reworded: bool) -> list[dict[str, Any]]:
    rows = []
    for (question, answer), given in zip(PAIRS, CONTEXTS, strict=True):
        instance = {"instruction_with_input": question, "input": given, "constraints": "None."}
        row: dict[str, Any] = {
            "instruction": question,
            "instances": [instance | {"output": answer}],
        }
        rows.append(row | ({"reformulations": []} if reworded else {}))
    return rows


ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": row} for row in _messages("role", "content", ("user", "assistant"))],
    "sharegpt": [{"conversations": row} for row in _messages("from", "value", ("human", "gpt"))],
    "vicuna": [
        {"id": f"v{number}", "conversations": row}
        for number, row in enumerate(_messages("from", "value", ("human", "gpt")))
    ],
    "oasst": _trees(),
    "unnatural-instructions": _instances(reworded=False),
    "unnatural-instructions-full": _instances(reworded=True),
    "alpaca": _pairs("instruction", "output", "input"),
    "dolly": _pairs("instruction", "response", "context"),
    "natural-instructions": _pairs("definition", "targets", "inputs"),
    "prompt-response": _pairs("prompt", "response"),
    "prompt-completion": _pairs("prompt", "completion"),
    "question-answer": _pairs("question", "answer"),
    "input-output": _pairs("input", "output"),
    "inputs-targets": _pairs("inputs", "targets"),
    "source-target": _pairs("source", "target"),
    "hh-rlhf": [
        {"chosen": text, "rejected": f"{text} And more."}
        for text in _texts("\n\nHuman: ", "\n\nAssistant: ")
    ],
    "text": [{"text": f"{question} {answer}"} for question, answer in PAIRS],
    "guanaco": [{"text": text} for text in _texts("### Human: ", "### Assistant: ")],
    "chip2": [{"text": text} for text in _texts("<human>: ", "\n<bot>: ")],
}
"""By the name of their format."""


def schema_of(source: SourceConfig) -> tuple[str, dict[str, str]] | None:
    """How the rows of a source are stored, as a format and renames; None: nothing says it.

    A dataset that is known here is stored as it is published, whatever a run reads it as.
    """
    for known in DATASETS.values():
        if known.path is not None and known.path == source.resolved().path:
            return known.format, known.columns
    format = source.resolved().format
    return None if format is None else (format, source.resolved().columns)


def save_stand_in(source: SourceConfig, key: str, path: Path) -> dict[str, Any]:
    """Write rows in the schema of a source.

    Args:
        source: Which cannot be had.
        key: The configuration key that names it.
        path: The file to make.

    Returns:
        What the run's data is to read instead, as a source in plain types.

    Raises:
        ConfigurationError: if nothing says what the source's columns mean.
    """
    schema = schema_of(source)
    if schema is None:
        raise ConfigurationError(
            f"{key}: '{source.name}' is not on this machine, the Hub cannot be reached, and "
            "nothing says what its columns mean, so that no rows can stand in for it; set its "
            "format, or go online."
        )
    name, stored = schema
    rows = [_renamed(row, stored) for row in ROWS[name]]
    lines = [json.dumps(_numbered(row, copy)) for copy in range(COPIES) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    source = source.resolved()
    columns = source.columns if source.format else stored
    return {"path": str(path), "format": source.format or name} | (
        {"columns": columns} if columns else {}
    )


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """As it would be stored before ``columns`` renames it."""
    return {columns.get(name, name): value for name, value in row.items()}


def _numbered(row: Mapping[str, Any], copy: int) -> dict[str, Any]:
    """Messages of trees are known by numbers, which must differ."""
    names = ("message_id", "parent_id", "message_tree_id")
    return {
        name: f"{value}-{copy}" if name in names and value is not None else value
        for name, value in row.items()
    }
