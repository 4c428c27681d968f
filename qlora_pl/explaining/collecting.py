"""The parsers and docstrings -> the catalogue: every key with its owner, unit and references."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lightning.pytorch import Trainer

from qlora_pl.cli import DEFAULT_EPOCHS, QLoRAParser
from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.data.reading.sources import SourceConfig
from qlora_pl.explaining.catalogue import PACKAGE, Catalogue, Entry
from qlora_pl.explaining.flags import all_flags
from qlora_pl.explaining.references import mentions, pages
from qlora_pl.explaining.units import unit_of
from qlora_pl.key_reference import in_markdown, read_keys, run_parser
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
            unit=unit_of(key.name, key.kind, key.meaning),
            owner=owner,
            place=file,
            pages=found_pages[key.name],
            mentions=mentions(key.name, key.meaning, names),
        )
    known = {name: GROUPS.get(name) or titles.get(name, "") for name in groups}
    return Catalogue(entries, known, all_flags(parser, docs))


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
        if line := _lines_of(place).get(leaf):
            return place.__name__, f"{_shown(Path(inspect.getfile(place)))}:{line}"
    return owner.__name__, _shown(Path(inspect.getfile(owner)))


def _shown(file: Path) -> str:
    """A file by its path in the checkout, or by its library's."""
    if file.is_relative_to(PACKAGE):
        return str(file.relative_to(PACKAGE.parent))
    parts = file.parts
    start = parts.index("site-packages") + 1 if "site-packages" in parts else -1
    return "/".join(parts[start:])


@cache  # finding a class in its file takes longer than all else
def _lines_of(owner: type) -> dict[str, int]:
    """The lines of a dataclass's fields, or of the arguments of a constructor."""
    try:
        lines, first = inspect.getsourcelines(owner)
    except (OSError, TypeError):
        return {}
    node = ast.parse(textwrap.dedent("".join(lines))).body[0]
    assert isinstance(node, ast.ClassDef)
    found = {}
    for item in node.body:
        if is_dataclass(owner) and isinstance(item, ast.AnnAssign):
            if isinstance(item.target, ast.Name):
                found[item.target.id] = first + item.lineno - 1
        elif isinstance(item, ast.FunctionDef) and item.name == "__init__":
            for argument in [*item.args.args, *item.args.kwonlyargs]:
                found[argument.arg] = first + argument.lineno - 1
    return found
