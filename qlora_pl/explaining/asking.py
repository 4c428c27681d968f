"""What is asked about: a key by its name or its end, a group, a command, a flag; or nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches

from qlora_pl.commands import TRAINER_COMMANDS
from qlora_pl.errors import ConfigurationError, did_you_mean
from qlora_pl.explaining.catalogue import Catalogue
from qlora_pl.explaining.wording import (
    Said,
    of_commands,
    of_flags,
    of_group,
    of_groups,
    of_key,
)

OF_A_SOURCE = re.compile(r"^data\.(?:val_|test_)?sources(?:\[\d+\]|\.\d+)?\.(?=\w)")
"""How a source's keys may begin, of whatever split; they are told under the first."""


def answer(asked: Sequence[str], catalogue: Catalogue) -> Said:
    """What there is to say.

    Args:
        asked: Nothing, a key, a group, a flag, a command, or a command and its flag or key.
        catalogue: What is known.

    Raises:
        ConfigurationError: if it is about nothing that there is, or about several things.
    """
    commands, rest = _of_command(asked, catalogue)
    if len(rest) > 1:
        raise ConfigurationError(_several(rest, catalogue))
    is_run = bool(commands) and commands[0] in TRAINER_COMMANDS
    if not rest:
        return of_commands(commands, catalogue) if commands and not is_run else of_groups(catalogue)
    word = rest[0]
    flags = {flag.name for flag in catalogue.flags if set(commands) & set(flag.commands)}
    if commands and (not is_run or flags & set(_spellings(word))):
        return _flag(word, commands, catalogue)
    return _key_or_group(word, catalogue)


def _of_command(asked: Sequence[str], catalogue: Catalogue) -> tuple[list[str], list[str]]:
    """The commands that the first words name (``inspect`` is several), and the words after them."""
    for length in (2, 1):
        words = " ".join(asked[:length])
        found = [
            command for command in catalogue.commands() if f"{command} ".startswith(f"{words} ")
        ]
        if words and len(asked) >= length and found:
            return found, list(asked[length:])
    return [], list(asked)


def _several(words: Sequence[str], catalogue: Catalogue) -> str:
    """A sentence for more words than one, of which the first may be a misspelt command."""
    end = did_you_mean(words[0], catalogue.commands())
    if words[1].startswith("-") and end != "." and not _names_a_key(words[0], catalogue):
        return f"explain: no command is called '{words[0]}'{end}"
    return f"explain: one key at a time, got {' '.join(words)}."


def _plain(word: str) -> str:
    """A key as a user may write it, by its name: ``--model.lora.r=16``, ``data.*``, ``names+``."""
    name = re.sub(r"\.?\*$|\.$|\+$", "", word.partition("=")[0].rstrip(":").lstrip("-"))
    return OF_A_SOURCE.sub("data.sources.", name)


def _names_a_key(word: str, catalogue: Catalogue) -> bool:
    name = _plain(word)
    known = [*catalogue.keys, *filter(None, catalogue.groups)]
    return any(key == name or key.endswith(f".{name}") for key in known)


def _key_or_group(word: str, catalogue: Catalogue) -> Said:
    name = _plain(word)
    if name in catalogue.keys and not word.endswith("*"):
        return of_key(name, catalogue)
    if name in catalogue.groups and name:
        return of_group(name, catalogue)
    is_flag = word.startswith("--") and "." not in word
    if is_flag and any(flag.name in _spellings(word) for flag in catalogue.flags):
        return _flag(word, [], catalogue)
    keys = [key for key in catalogue.keys if key.endswith(f".{name}")]
    groups = [group for group in catalogue.groups if group.endswith(f".{name}")]
    if len(keys) == 1:
        return of_key(keys[0], catalogue)
    if not keys and len(groups) == 1:
        return of_group(groups[0], catalogue)
    if keys or groups:
        names = [*keys, *groups]
        raise ConfigurationError(
            f"explain: '{name}' is the end of {len(names)} names ({', '.join(names)}); name one "
            "of them."
        )
    raise ConfigurationError(_unknown(name, catalogue))


def _unknown(name: str, catalogue: Catalogue) -> str:
    """A sentence with the nearest keys, by whole names and ends of as many parts; or flags."""
    parts = name.count(".") + 1
    ends: dict[str, list[str]] = {}
    for known in [*catalogue.keys, *filter(None, catalogue.groups)]:
        for end in {known, ".".join(known.split(".")[-parts:])}:
            ends.setdefault(end, []).append(known)
    near = _nearest(name, ends)
    names = dict.fromkeys(full for end in near for full in ends[end])
    if not names:
        flags = {flag.name[2:]: flag for flag in catalogue.flags}
        near = _nearest(name.replace("_", "-"), flags)
        names = dict.fromkeys(f"{flags[end].commands[0]} {flags[end].name}" for end in near)
    if not names:
        return f"explain: no key is called '{name}'; qlora-pl explain lists the groups of keys."
    return f"explain: no key is called '{name}'; did you mean {' or '.join(list(names)[:4])}?"


def _nearest(word: str, known: Iterable[str]) -> list[str]:
    """The nearest words, without those that a long beginning in common alone makes alike."""
    near = get_close_matches(word, set(known), n=3, cutoff=0.6)
    ratios = [SequenceMatcher(None, other, word).ratio() for other in near]
    return [other for other, ratio in zip(near, ratios, strict=True) if ratio > ratios[0] - 0.1]


def _flag(word: str, commands: Sequence[str], catalogue: Catalogue) -> Said:
    """A flag of some commands; of none named: of all that have it."""
    known = [f for f in catalogue.flags if not commands or set(commands) & set(f.commands)]
    entries = [flag for flag in known if flag.name in _spellings(word)]
    if entries:
        return of_flags(entries)
    spelt = _spellings(word)[-1]
    near = _nearest(spelt, (flag.name for flag in known))
    end = f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else "."
    whose = "no command" if not commands else commands[0].split()[0]
    has = "has" if not commands else "has no flag"
    raise ConfigurationError(f"explain: {whose} {has} {spelt}{end}")


def _spellings(word: str) -> tuple[str, str]:
    """A flag with underscores, as runs write it, and with hyphens, as other commands do."""
    name = word.partition("=")[0].lstrip("-")
    return f"--{name.replace('-', '_')}", f"--{name.replace('_', '-')}"
