"""Flags of a command out of its settings: one for each field, with the field's own text as help."""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from qlora_pl.errors import ConfigurationError, did_you_mean


class Flags(argparse.ArgumentParser):
    """A parser whose errors are one sentence, and which takes no abbreviations.

    ``--max-new-tokens`` and ``--max_new_tokens`` are the same.
    """

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"qlora-pl {command}",
            description=description,
            allow_abbrev=False,
            formatter_class=_Help,
        )

    def add_settings(self, kind: type, title: str) -> None:
        """A flag for each field of a dataclass.

        Tuples of text may be given several times; what is true or false needs no value.
        """
        group = self.add_argument_group(title)
        hints, texts = get_type_hints(kind), _texts_of_fields(kind)
        for one in fields(kind):
            group.add_argument(
                f"--{one.name.replace('_', '-')}",
                dest=one.name,
                help=_help(texts.get(one.name, ""), one),
                **_taking(hints[one.name], one),
            )

    def settings(self, kind: type, options: argparse.Namespace) -> dict[str, Any]:
        """The fields of a dataclass that were given."""
        names = [one.name for one in fields(kind)]
        found = {name: getattr(options, name, None) for name in names}
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in found.items()
            if value is not None
        }

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """What the words mean.

        Raises:
            ConfigurationError: for a flag that is unknown or lacks its value.
        """
        options, unknown = self.parse_known_args([_plain(word) for word in words])
        if unknown:
            raise ConfigurationError(self._unknown(unknown[0]))
        return options

    def _unknown(self, word: str) -> str:
        flag = word.partition("=")[0]
        if flag in GONE:
            return f"{flag}: {GONE[flag]}"
        if not flag.startswith("-"):
            return f"{self.prog}: '{word}' belongs to no flag; see {self.prog} --help."
        known = [name for action in self._actions for name in action.option_strings]
        return f"{self.prog}: no flag is called {flag}{did_you_mean(flag, known)}"

    def error(self, message: str) -> NoReturn:
        """Say it in one sentence; the command line gives it exit code 2."""
        raise ConfigurationError(f"{self.prog}: {message.removeprefix('argument ')}.")


GONE = {
    "--num-beam-groups": "left transformers, which now asks for code of others; use --num-beams.",
    "--diversity-penalty": "left transformers, which now asks for code of others; use --do-sample.",
    "--penalty-alpha": "left transformers, which now asks for code of others; use --top-p or "
    "--repetition-penalty.",
}
"""Options of the original that no longer exist, and what comes nearest."""


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


def _plain(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, separator, value = word.partition("=")
    return f"--{flag[2:].replace('_', '-')}{separator}{value}"


def _texts_of_fields(kind: type) -> dict[str, str]:
    from docstring_parser import parse_from_object  # of jsonargparse's

    return {p.arg_name: p.description or "" for p in parse_from_object(kind).params}


def _help(text: str, one: Field[Any]) -> str:
    default = one.default
    shown = "" if default in (None, (), False, MISSING) else f" (default: {default})"
    return " ".join(text.split()).replace("%", "%%") + shown


def _taking(hint: Any, one: Field[Any]) -> dict[str, Any]:
    """How argparse takes a value of a type."""
    if get_origin(hint) in (Union, types.UnionType):
        choices = [part for part in get_args(hint) if part is not type(None)]
        if bool in choices:  # early_stopping
            return {"type": _yes_no_or_word, "metavar": "true|false|never"}
        hint = choices[0]
    if hint is bool:
        is_on = one.default is True
        return {
            "nargs": "?",
            "const": True,
            "type": _yes_no,
            "metavar": "true|false" if is_on else "true",
        }
    if get_origin(hint) is tuple:
        return {"action": "append", "metavar": "TEXT"}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    kinds: dict[Any, Callable[[str], Any]] = {int: int, float: float}
    return {"type": kinds.get(hint, str), "metavar": _METAVARS.get(hint, "TEXT")}


_METAVARS = {int: "N", float: "X"}


def _yes_no(word: str) -> bool:
    words = {"true": True, "yes": True, "false": False, "no": False}
    if word.lower() not in words:
        raise argparse.ArgumentTypeError(f"true or false, got '{word}'")
    return words[word.lower()]


def _yes_no_or_word(word: str) -> bool | str:
    return "never" if word == "never" else _yes_no(word)
