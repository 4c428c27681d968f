"""A raw row -> a ``Conversation``: one function per family of columns.

The format is guessed from the column names when nobody names it, and the guess is reported with the
runner-up: a wrong guess is the kind of mistake that trains for hours without a word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.reading.cells import RowError, text_of
from qlora_pl.data.reading.oasst_trees import TreeRules, conversations_of_trees
from qlora_pl.data.reading.places import BadRow, PlacedRow, Row
from qlora_pl.data.reading.turns import MARKERS, chip2, guanaco, hh_rlhf, messages, sharegpt, vicuna
from qlora_pl.errors import ConfigurationError

Regroup = Callable[[Iterable[PlacedRow], TreeRules, "Counter[str]"], Iterator[PlacedRow]]


def alpaca(row: Row) -> Conversation:
    """``instruction``, ``output`` and an optional ``input``."""
    return _pair(row, "instruction", "output", context="input")


def dolly(row: Row) -> Conversation:
    """``instruction``, ``response`` and an optional ``context``."""
    return _pair(row, "instruction", "response", context="context")


def natural_instructions(row: Row) -> Conversation:
    """``definition`` of a task, ``inputs`` of one example and its ``targets``."""
    return _pair(row, "definition", "targets", context="inputs")


def prompt_response(row: Row) -> Conversation:
    """``prompt`` and ``response``."""
    return _pair(row, "prompt", "response")


def prompt_completion(row: Row) -> Conversation:
    """``prompt`` and ``completion``."""
    return _pair(row, "prompt", "completion")


def question_answer(row: Row) -> Conversation:
    """``question`` and ``answer``."""
    return _pair(row, "question", "answer")


def inputs_targets(row: Row) -> Conversation:
    """``inputs`` and ``targets``, as FLAN's rows."""
    return _pair(row, "inputs", "targets")


def source_target(row: Row) -> Conversation:
    """``source`` and ``target``, likewise."""
    return _pair(row, "source", "target")


def input_output(row: Row) -> Conversation:
    """``input`` and ``output``; an empty input leaves only text to learn, as in the original."""
    if not text_of(row, "input", default=""):
        return Conversation.from_text(text_of(row, "output"))
    return _pair(row, "input", "output")


def _pair(row: Row, asked: str, answered: str, context: str | None = None) -> Conversation:
    given = text_of(row, context, default="") if context else ""
    question = Message("user", text_of(row, asked), context=given)
    return Conversation((question, Message("assistant", text_of(row, answered))))


def text(row: Row) -> Conversation:
    """``text``: learnt as it stands, every token trained."""
    return Conversation.from_text(text_of(row, "text"))


def unnatural_instructions(row: Row) -> Conversation:
    """One of a row's instances, after ``expand_instances``."""
    return _pair(row, "instruction_with_input", "output")


def expand_instances(
    rows: Iterable[PlacedRow], _: TreeRules, __: Counter[str], also: tuple[str, ...] = ()
) -> Iterator[PlacedRow]:
    """Every item of ``instances``, and of the columns ``also``, as a row of its own."""
    for place, row in rows:
        if isinstance(row, BadRow):
            yield place, row
            continue
        for column in ("instances", *also):
            items = row.get(column)
            if column != "instances" and items is None:
                continue  # only some instructions were reworded
            if not isinstance(items, list | tuple):
                kind = "nothing" if items is None else type(items).__name__
                yield place, BadRow(f"'{column}' holds {kind}, expected a list; remove the row.")
                continue
            for item in items:
                is_row = isinstance(item, Mapping)
                yield place, item if is_row else BadRow(f"'{column}' holds no mapping; mend it.")


class Format(NamedTuple):
    """A family of rows: what turns one into a conversation, and the columns that give it away."""

    convert: Callable[[Row], Conversation]
    columns: frozenset[str]
    other_columns: frozenset[str] | None = None
    """A second layout of the same data."""
    regroup: Regroup | None = None
    """For data whose conversations are not one to a row: makes such rows of them."""

    def fits(self, columns: Collection[str]) -> bool:
        """Whether these columns give the format away."""
        found = set(columns)
        return self.columns <= found or (self.other_columns or {""}) <= found


FORMATS: dict[str, Format] = {
    "messages": Format(messages, frozenset({"messages"})),
    "sharegpt": Format(sharegpt, frozenset({"conversations"})),
    "oasst": Format(
        messages,
        frozenset({"message_id", "parent_id", "role", "text"}),
        frozenset({"message_tree_id", "prompt"}),
        conversations_of_trees,
    ),
    "unnatural-instructions": Format(
        unnatural_instructions, frozenset({"instruction", "instances"}), regroup=expand_instances
    ),
    "unnatural-instructions-full": Format(
        unnatural_instructions,
        frozenset({"instruction", "instances", "reformulations"}),
        regroup=partial(expand_instances, also=("reformulations",)),
    ),
    "alpaca": Format(alpaca, frozenset({"instruction", "output"})),
    "dolly": Format(dolly, frozenset({"instruction", "context", "response"})),
    "natural-instructions": Format(
        natural_instructions, frozenset({"definition", "inputs", "targets"})
    ),
    "prompt-response": Format(prompt_response, frozenset({"prompt", "response"})),
    "prompt-completion": Format(prompt_completion, frozenset({"prompt", "completion"})),
    "question-answer": Format(question_answer, frozenset({"question", "answer"})),
    "input-output": Format(input_output, frozenset({"input", "output"})),
    "inputs-targets": Format(inputs_targets, frozenset({"inputs", "targets"})),
    "source-target": Format(source_target, frozenset({"source", "target"})),
    "hh-rlhf": Format(hh_rlhf, frozenset({"chosen", "rejected"})),
    "text": Format(text, frozenset({"text"})),
    # Their columns are those of formats above, so that they are never guessed.
    "guanaco": Format(guanaco, frozenset({"text"})),
    "chip2": Format(chip2, frozenset({"text"})),
    "vicuna": Format(vicuna, frozenset({"conversations"})),
}
"""In order of preference: where several fit, the richer one wins."""


def guess_format(columns: Collection[str]) -> tuple[str, str | None]:
    """The format that these columns fit, and the runner-up if there is one.

    Raises:
        ConfigurationError: if no format fits.
    """
    fitting = [name for name, format in FORMATS.items() if format.fits(columns)]
    if not fitting:
        found = ", ".join(f"{column!r:.60}" for column in columns) or "(none)"
        near = [name for name, format in FORMATS.items() if format.columns & set(columns)]
        near = near or ["messages", "alpaca", "prompt-response", "text"]
        known = "; ".join(f"{name}: {' + '.join(sorted(FORMATS[name].columns))}" for name in near)
        raise ConfigurationError(
            f"no format fits the columns {found}; rename them with columns: {{NEW: OLD}} to those "
            f"of one, for example ({known})."
        )
    return fitting[0], fitting[1] if len(fitting) > 1 else None


def marked_format(text: str) -> str | None:
    """The format whose marker a text begins with: it can be cut into turns, and may be meant to."""
    for name, marker in MARKERS.items():
        if marker.match(text):
            return name
    return None


__all__ = ["FORMATS", "Format", "Row", "RowError", "guess_format", "marked_format"]
