"""Everything that `explain` knows, collected once from the parsers and kept until they change.

Building the parser of a run takes seconds, and its answers depend on nothing but the code: so they
are kept in the cache under a digest of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qlora_pl.commands import COMMANDS
from qlora_pl.errors import ConfigurationError, QLoRAError
from qlora_pl.files import cache_root, write_atomic

PACKAGE = Path(__file__).parent.parent
DOCS = PACKAGE.parent / "docs"
"""There in a checkout; an installed package has none."""
LIBRARIES = ("lightning", "jsonargparse")
"""Whose versions the parser's answers depend on, besides this package's files."""
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One key of a run, or one flag of a command.

    Attributes:
        name: ``model.lora.r``, or ``--threshold``.
        kind: Its type, in words.
        default: As YAML, or "must be set".
        meaning: The docstring's text, in Markdown: that of docs/configuration.md.
        unit: What a number counts; "" where it is none, or another library's.
        owner: The class that takes a key.
        place: That class's file and the key's line, or the module of a library; of a flag, the
            files of its commands.
        pages: Where documentation speaks of it.
        mentions: Keys that its meaning names.
        commands: The commands that have this flag; none for a key.
    """

    name: str
    kind: str
    default: str
    meaning: str
    unit: str = ""
    owner: str = ""
    place: str = ""
    pages: list[str] = field(default_factory=list)
    mentions: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Catalogue:
    """Every key and flag there is.

    Attributes:
        keys: By name, in the parser's order.
        groups: What each group of keys is, by its name; "" for keys without one.
        flags: One entry for each flag of each meaning.
    """

    keys: dict[str, Entry]
    groups: dict[str, str]
    flags: list[Entry]

    def goes_with(self, name: str) -> list[str]:
        """The keys that a key's text names, and those whose text names it, in that order."""
        naming = [other.name for other in self.keys.values() if name in other.mentions]
        return list(dict.fromkeys([*self.keys[name].mentions, *naming]))

    def commands(self) -> list[str]:
        """The commands that have flags, in the order of ``qlora-pl --help``."""
        names = dict.fromkeys(command for flag in self.flags for command in flag.commands)
        order = list(COMMANDS)
        return sorted(names, key=lambda name: order.index(name.split()[0]))

    def group(self, prefix: str) -> list[Entry]:
        """The keys of a group and of the groups in it."""
        return [entry for entry in self.keys.values() if entry.name.startswith(f"{prefix}.")]


def load() -> Catalogue:
    """The catalogue of this code, from the cache or, in some seconds, from the parsers.

    Raises:
        ConfigurationError: if it is not in the cache, and a library of a run cannot be imported.
    """
    file = cache_root(None) / "keys" / f"{digest()}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        return _from_plain(json.loads(file.read_text(encoding="utf-8")))
    if sys.stderr.isatty():
        print("Reading every key, which takes some seconds the first time.", file=sys.stderr)
    try:
        from qlora_pl.explaining.collecting import collect  # slow: builds the parser of a run
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        raise ConfigurationError(
            "explain: the keys are read off the parser of a run, which cannot be imported here "
            f"({(str(error).splitlines() or [''])[0]}); qlora-pl doctor says what mends it."
        ) from error

    for name in ("lightning.pytorch", "lightning.fabric"):  # importing it sets these to INFO
        logging.getLogger(name).setLevel(logging.WARNING)
    catalogue = collect(DOCS if DOCS.is_dir() else None)
    with suppress(OSError, QLoRAError):  # a cache that cannot be written to costs seconds alone
        file.parent.mkdir(parents=True, exist_ok=True)
        for old in file.parent.glob("*.json"):
            old.unlink(missing_ok=True)
        write_atomic(file, json.dumps(_to_plain(catalogue)))
    return catalogue


def digest() -> str:
    """Of everything that the catalogue depends on: the code, its documentation, two libraries."""
    content = hashlib.sha256(f"{FORMAT} {sys.version_info[:2]}".encode())
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            content.update(f"{name} {version(name)}".encode())
    for file in [*sorted(PACKAGE.rglob("*.py")), *sorted(DOCS.glob("*.md"))]:
        content.update(str(file.relative_to(PACKAGE.parent)).encode())
        content.update(file.read_bytes())
    return content.hexdigest()[:20]


def _to_plain(catalogue: Catalogue) -> dict[str, Any]:
    return {
        "keys": [asdict(entry) for entry in catalogue.keys.values()],
        "groups": catalogue.groups,
        "flags": [asdict(entry) for entry in catalogue.flags],
    }


def _from_plain(plain: dict[str, Any]) -> Catalogue:
    entries = [Entry(**entry) for entry in plain["keys"]]
    return Catalogue(
        {entry.name: entry for entry in entries},
        dict(plain["groups"]),
        [Entry(**entry) for entry in plain["flags"]],
    )
