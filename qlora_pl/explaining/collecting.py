"""The parsers and docstrings -> the catalogue: every key with its owner, unit and references."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lightning.pytorch import Trainer

from qlora_pl.cli import DEFAULT_EPOCHS, QLoRAParser
from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.data.reading.sources import SourceConfig
from qlora_pl.explaining.catalogue import PACKAGE, Catalogue, Entry
from qlora_pl.explaining.references import mentions, pages
from qlora_pl.inference.flags import Flags
from qlora_pl.key_reference import Key, in_markdown, in_yaml, read_keys, run_parser
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.training.checkpoints.checkpoint import AdapterCheckpoint
from qlora_pl.training.run_folders.run_folder import RunConfig
from qlora_pl.training.watching.samples import SampleWriter

SOURCES = "data.sources"
"""Where keys of a source stand; ``data.val_sources`` and ``data.test_sources`` have them too."""
ROOTS: dict[str, type] = {
    "model": QLoRAModule,
    "data": InstructionDataModule,
    SOURCES: SourceConfig,
    "run": RunConfig,
    "checkpoint": AdapterCheckpoint,
    "samples": SampleWriter,
    "trainer": Trainer,
}
GROUPS = {
    "": "The run as a whole",
    "trainer": "Lightning's trainer: how long, on which devices, in which strategy",
    SOURCES: "One source of rows, where it is more than a path",
}
"""Titles that no docstring has."""
IN_THIS_PROJECT = {
    "trainer.strategy": "How several devices share a run: `ddp` (each holds the whole 4-bit "
    "base), `fsdp2` (they share one), `fsdp2_offload` (part of it in host memory), or `auto` (one "
    "process, or what fits the GPUs at hand). Others are refused.",
    "trainer.default_root_dir": "Refused: a run's folder is `run.root`, `run.name` and a number.",
    "trainer.max_epochs": "Epochs after which the run ends. `null`: "
    f"{DEFAULT_EPOCHS} where neither `trainer.max_steps` nor `trainer.max_time` is set.",
    "trainer.val_check_interval": "Micro-batches of one device between validations, not optimizer "
    "steps: those times `trainer.accumulate_grad_batches`. Below 1: a share of an epoch. It counts "
    "within an epoch, unless `trainer.check_val_every_n_epoch` is `null`.",
}
"""What Lightning's words leave out or get wrong for a run of this project."""
UNITS = (
    (r"^Tokens", "tokens"),
    (r"^(Rows|Validation rows|Read .*rows)|first so many rows|a number of rows", "rows"),
    (r"^Optimizer steps|every so many optimizer steps|^Steps", "optimizer steps"),
    (r"^Micro-batches", "micro-batches"),
    (r"^Batches", "batches"),
    (r"^Weights", "weights"),
    (r"^(Loader p|P)rocesses", "processes"),
    (r"^(Share|Sample from .* share)", "a share, from 0 to 1"),
    (r"checkpoints that are kept", "checkpoints"),
    (r"^Seed|^Of what is drawn at random", "a seed, any whole number from 0 on"),
)
"""What a number counts, by how its docstring begins."""


def collect(docs: Path | None) -> Catalogue:
    """Build every parser and read it.

    Args:
        docs: The folder of the documentation, if there is one.
    """
    parser = run_parser()
    keys = list(read_keys(parser, with_all_of_lightnings=True))
    sources = QLoRAParser()
    sources.add_class_arguments(SourceConfig)
    place = 1 + max(i for i, key in enumerate(keys) if key.name.startswith("data."))
    of_sources = [key._replace(name=f"{SOURCES}.{key.name}") for key in read_keys(sources)]
    keys[place:place] = of_sources
    names = [key.name for key in keys]
    titles = {name: in_markdown(group.title) for name, group in parser.groups.items()}
    groups = {name.rpartition(".")[0]: "" for name in names}
    found_pages = pages(docs, names)
    entries = {}
    for key in keys:
        key = key._replace(meaning=IN_THIS_PROJECT.get(key.name, key.meaning))
        owner, file = owner_of(key.name)
        entries[key.name] = Entry(
            name=key.name,
            kind=key.kind,
            default=key.default.strip("`"),
            meaning=key.meaning,
            unit=unit_of(key),
            owner=owner,
            place=file,
            pages=found_pages[key.name],
            mentions=mentions(key.name, key.meaning, names),
        )
    known = {name: GROUPS.get(name) or titles.get(name, "") for name in groups}
    return Catalogue(entries, known, list(_flags()))


def unit_of(key: Key) -> str:
    """What a number counts, as its name or its meaning says; "" for other types."""
    if "number" not in key.kind:
        return ""
    if key.name.endswith("_seconds"):
        return "seconds"
    return next((unit for start, unit in UNITS if re.search(start, key.meaning)), "")


def owner_of(name: str) -> tuple[str, str]:
    """The class that takes a key, and the file and line where it is declared."""
    group, _, leaf = name.rpartition(".")
    if not group:
        return "QLoRACLI", "qlora_pl/cli.py"
    root = max((r for r in ROOTS if f"{group}.".startswith(f"{r}.")), key=len)
    owner: Any = ROOTS[root]
    for part in group.removeprefix(root).strip(".").split("."):
        if part:
            hint = get_type_hints(owner.__init__)[part]
            owner = next(kind for kind in (hint, *get_args(hint)) if is_dataclass(kind))
    for place in [owner, *owner.__mro__]:
        if line := _line_of(place, leaf):
            return place.__name__, f"{_shown(Path(inspect.getfile(place)))}:{line}"
    return owner.__name__, _shown(Path(inspect.getfile(owner)))


def _shown(file: Path) -> str:
    """A file by its path in the checkout, or by its library's."""
    if file.is_relative_to(PACKAGE):
        return str(file.relative_to(PACKAGE.parent))
    parts = file.parts
    start = parts.index("site-packages") + 1 if "site-packages" in parts else -1
    return "/".join(parts[start:])


def _line_of(owner: type, leaf: str) -> int:
    """The line of a field, or of an argument of the constructor; 0 if it has none of that name."""
    try:
        lines, first = inspect.getsourcelines(owner)
    except (OSError, TypeError):
        return 0
    node = ast.parse(textwrap.dedent("".join(lines))).body[0]
    assert isinstance(node, ast.ClassDef)
    for item in node.body:
        if is_dataclass(owner) and isinstance(item, ast.AnnAssign):
            if isinstance(item.target, ast.Name) and item.target.id == leaf:
                return first + item.lineno - 1
        elif isinstance(item, ast.FunctionDef) and item.name == "__init__":
            for argument in [*item.args.args, *item.args.kwonlyargs]:
                if argument.arg == leaf:
                    return first + argument.lineno - 1
    return 0


def _flags() -> Iterator[Entry]:
    """The flags of the other commands, those of one name and meaning together."""
    found: dict[tuple[str, str, str], list[str]] = {}
    kinds: dict[tuple[str, str, str], tuple[str, str]] = {}
    for command, parser in _parsers().items():
        for group in parser._action_groups:
            for action in group._group_actions:
                if not action.option_strings or action.dest == "help":
                    continue
                text = str(action.help or "").replace("%%", "%")
                meaning, _, default = text.partition(" (default: ")
                key = (action.option_strings[-1], in_markdown(meaning), default.rstrip(")"))
                found.setdefault(key, []).append(command)
                kinds[key] = _kind(action), str(group.title)
    for (flag, meaning, default), commands in found.items():
        kind, _ = kinds[flag, meaning, default]
        yield Entry(
            name=flag,
            kind=kind,
            default=in_yaml(default) if default else "none",
            meaning=meaning,
            commands=commands,
        )


def _parsers() -> dict[str, Flags]:
    """The parsers of the commands that need no configuration of a run."""
    from qlora_pl.chat.command import flags as of_chat
    from qlora_pl.exporting.command import flags as of_export
    from qlora_pl.inference.generate import flags as of_generate
    from qlora_pl.merging.merge import flags as of_merge
    from qlora_pl.serving.command import flags as of_serve

    made = {
        "generate": of_generate,
        "chat": of_chat,
        "serve": of_serve,
        "merge": of_merge,
        "export": of_export,
    }
    return {command: flags() for command, flags in made.items()}


def _kind(action: argparse.Action) -> str:
    if action.choices:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    words = {"N": "whole number", "X": "number", "TEXT": "text"}
    shown = str(action.metavar or "")
    if shown in words:
        several = isinstance(action, argparse._AppendAction)
        return f"{words[shown]}, may be given several times" if several else words[shown]
    return ", ".join(f"`{word}`" for word in shown.split("|")) or "needs no value"
