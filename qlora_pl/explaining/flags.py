"""The flags of every command, read off its parser, or off its ``--help`` where that is written."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from qlora_pl.commands import OTHER_COMMANDS, TRAINER_COMMANDS
from qlora_pl.explaining.catalogue import PACKAGE, Entry
from qlora_pl.explaining.references import sections
from qlora_pl.explaining.units import unit_of
from qlora_pl.inference.flags import Flags
from qlora_pl.key_reference import in_markdown

PARSERS = {
    "plan": "planning.command:all_flags",
    "bench": "benching.command:all_flags",
    "inspect model": "inspection.weights.command:model_flags",
    "inspect adapter": "inspection.adapters.command:adapter_flags",
    "ablate": "ablation.command:flags",
    "generate": "inference.generate:flags",
    "chat": "chat.command:flags",
    "serve": "serving.command:flags",
    "merge": "merging.merge:flags",
    "export": "exporting.command:flags",
}
"""Where the parser of a command is made."""
TEXTS = {
    "smoke": "smoke.command:HELP",
    "inspect data": "inspection.command:HELP",
    "doctor": "doctor.command:HELP",
    "explain": "explaining.command:HELP",
    "prove-resume": "proof.command:HELP",
}
"""Where the help of a command is written that takes few flags of its own, or hands others on."""
OF_RUNS = ("config", "print_config")
"""What the commands of a run take besides keys."""
KINDS = {
    "N": "whole number",
    "X": "number",
    "SECONDS": "number",
    "TEXT": "text",
    "NAME": "a name",
    "FILE": "a file",
    "DIR": "a folder",
}
"""What the word stands for that a help shows in place of a value."""
FLAG = re.compile(r"^  (?:-\w, )?(--[\w-]+)(?: ([\w:|]+))? {2,}(\S.*)$")


def all_flags(run: Any, docs: Path | None) -> list[Entry]:
    """One entry for each flag, those of one name and meaning together.

    Args:
        run: The parser of a run.
        docs: The folder of the documentation, if there is one.
    """
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for command, flags in _by_command(run).items():
        for flag in flags:
            found.setdefault(flag, []).append(command)
    entries, on_pages = [], _flags_on_pages(docs)
    for (name, kind, default, meaning), commands in found.items():
        entries.append(
            Entry(
                name=name,
                kind=kind,
                default=default,
                meaning=meaning,
                unit=unit_of(name, kind, meaning),
                place=", ".join(dict.fromkeys(_place(command) for command in commands)),
                pages=list(_pages(name, commands, on_pages)),
                commands=commands,
            )
        )
    return entries


def _by_command(run: Any) -> dict[str, list[tuple[str, str, str, str]]]:
    """Name, type, default and meaning of each flag of each command."""
    of_runs = [_of_action(a) for a in run._actions if a.dest in OF_RUNS]
    found = dict.fromkeys(TRAINER_COMMANDS, of_runs)
    for command, where in PARSERS.items():
        make: Callable[[], Flags] = _load(where)
        found[command] = [_of_action(a) for a in make()._actions if a.dest != "help"]
    for command, where in TEXTS.items():
        found[command] = list(of_help(_load(where)))
    return found


def _of_action(action: argparse.Action) -> tuple[str, str, str, str]:
    meaning, _, default = str(action.help or "").replace("%%", "%").partition(" (default: ")
    shown = in_markdown(default.removesuffix(")")) or "none"
    return action.option_strings[-1], _kind(action), shown, in_markdown(meaning)


def _kind(action: argparse.Action) -> str:
    if action.choices:
        kind = ", ".join(f"`{choice}`" for choice in action.choices)
    elif action.nargs == 0:
        kind = "needs no value"
    else:
        shown = str(action.metavar or action.dest.upper())
        kind = KINDS.get(shown) or ", ".join(f"`{word}`" for word in shown.split("|"))
    if isinstance(action, argparse._AppendAction):
        return f"{kind}, may be given several times"
    return f"{kind}, or several of them" if action.nargs == "+" else kind


def of_help(text: str) -> Iterator[tuple[str, str, str, str]]:
    """The flags that a written help lists under ``flags:``.

    Args:
        text: A line a flag: its name, what its value is called, two spaces or more, its meaning,
            perhaps "; default: " and that; lines that are indented further go on with the text.
    """
    listed = text.partition("\nflags:\n")[2].partition("\n\n")[0]
    lines: list[str] = []
    for line in listed.splitlines():
        if FLAG.match(line):
            lines.append(line)
        else:
            lines[-1] += f" {line.strip()}"
    for line in lines:
        found = FLAG.match(line)
        assert found is not None
        meaning, _, default = found[3].partition("; default: ")
        kind = KINDS.get(found[2], f"`{found[2]}`") if found[2] else "needs no value"
        several = "; may be given several times"
        if meaning.endswith(several):
            meaning, kind = meaning.removesuffix(several), kind + several.replace(";", ",")
        yield found[1], kind, default or "none", in_markdown(meaning)


def _load(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(import_module(f"qlora_pl.{module}"), name)


def _place(command: str) -> str:
    """The file of a command, by its path in the checkout."""
    if command in TRAINER_COMMANDS:
        module = "cli"
    elif command in PARSERS | TEXTS:
        module = (PARSERS | TEXTS)[command].partition(":")[0]
    else:
        module = OTHER_COMMANDS[command].where.partition(":")[0]
    return f"{PACKAGE.name}/{module.replace('.', '/')}.py"


def _flags_on_pages(docs: Path | None) -> list[tuple[str, str, list[tuple[str, set[str]]]]]:
    """Each page of the documentation: its name, its text, and the flags under each heading."""
    found = []
    for page in sorted(docs.glob("*.md")) if docs else []:
        text = page.read_text(encoding="utf-8")
        named = [(h, set(re.findall(r"(?<![\w-])--[\w-]+", part))) for h, part in sections(text)]
        found.append((page.name, text, named))
    return found


def _pages(flag: str, commands: list[str], pages: Any) -> Iterator[str]:
    """Where the documentation speaks of a flag: on pages that name one of its commands."""
    words = re.compile("|".join(rf"qlora-pl {command}\b" for command in commands))
    for name, text, headings in pages:
        under = [heading for heading, flags in headings if flag in flags]
        if under and words.search(text):
            for heading in under:
                yield f"docs/{name}" + (f', "{heading}"' if heading else "")
