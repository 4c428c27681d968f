"""Every key of a run, read off its very parser -> docs/configuration.md, and `qlora-pl explain`.

    python -m qlora_pl.key_reference > docs/configuration.md

Types and defaults are the parser's and meanings the docstrings', so that the page and ``--help``
cannot differ. Only what Lightning words for its own purposes is said here in this project's words.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml

from qlora_pl.cli import (
    DEFAULT_ACCUMULATION,
    DEFAULT_EPOCHS,
    TRAINER_DEFAULTS,
    QLoRAParser,
    RunReader,
)
from qlora_pl.data.reading.sources import RowSources, SourceConfig

HEAD = """# Configuration: every key

Made by `make docs` out of the parser of a run and its docstrings; change those, not this page.

A run is built from the defaults and then from the words of the command line, from left to right.
What comes later wins, key by key:

| word | what it sets |
| --- | --- |
| `--config FILE` | the keys in a YAML file; may be given several times |
| `--GROUP FILE` | one group, from a part: `--trainer configs/trainer/gpu1.yaml` |
| `--KEY VALUE` | one key: `--model.lora.r 16` |

So a flag belongs behind the files that it changes. A part holds the keys of its group without the
group's name; in a file, too, a group may be the path of a part, seen from that file. A list or a
mapping replaces the one before it; `--model.lora.target_modules+ NAME` adds to a list, and
`--model.lora.rank_pattern.NAME 16` to a mapping. Environment variables set no key, and a key that
does not exist ends the command with exit code 2 and the nearest one that does.

    qlora-pl fit --print_config --config my.yaml

prints what comes out, as a file that runs; `--print_config=skip_default` leaves out what is at its
default. The complete configuration of a run lies in its folder as `run.yaml`
([runs.md](runs.md) shows the folder), with the values filled in that follow from others; it is
itself a file for `--config`. `validate`, `test` and `predict` take the same keys as `fit`.
"""
SOURCES = """`data.sources`, `data.val_sources` and `data.test_sources` take a file, a Hub name, a
mapping with these keys, or a list of these ([data.md](data.md) shows them).
"""
CHANGED = """Lightning's trainer has keys of its own, which `qlora-pl explain trainer` lists. These
have another default here:
"""
FILLED_IN = f"""`trainer.max_epochs` becomes {DEFAULT_EPOCHS} where neither it nor
`trainer.max_steps` nor `trainer.max_time` is set. `trainer.logger` is TensorBoard in `fit` and none
elsewhere. `trainer.default_root_dir` is refused; set `run.root`."""

OWN_WORDS = {
    "seed_everything": "Seed of A's start, of dropout and, unless `data.seed` is set, of the order "
    "of rows. `true`: 0, or what the environment's `PL_GLOBAL_SEED` says; `false`: no seed is set.",
    "ckpt_path": "The checkpoint to continue or to use: `last`, `auto`, `best` or a path "
    "([runs.md](runs.md) says what they mean); `null`: none.",
    "trainer.precision": "Types are set when the base is loaded and by nothing else; another value "
    "is refused. See `model.quantization.compute_dtype`.",
    "trainer.gradient_clip_val": "Largest norm of a step's gradients, over all trained weights "
    "together; 0.3 is the paper's (table 9).",
    "trainer.accumulate_grad_batches": "Micro-batches of a step on each device. `null`: what "
    "`data.global_batch_size` leaves, or what `data.batch_size: auto` comes to; without either "
    f"{DEFAULT_ACCUMULATION}, with which `data.batch_size` 4 makes the paper's 16 rows a step.",
    "trainer.num_sanity_val_steps": "Batches of a validation before training; -1: all, so that "
    "the loss before training is known.",
    "trainer.log_every_n_steps": "Optimizer steps between logged rows; 10 as in the original.",
    "trainer.enable_model_summary": "Whether Lightning prints its table, which counts packed "
    "bytes; the run prints its own, which counts weights.",
    "trainer.use_distributed_sampler": "Whether Lightning orders the rows anew: their order is a "
    "function of seed, epoch and step, on any number of devices.",
}
"""What Lightning words for its own purposes, and why ``TRAINER_DEFAULTS`` differ from its own."""
NAMES = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "`true`, `false`",
    Path: "path",
    type(None): "`null`",
    RowSources: "source, or list of sources",
}
IN_YAML = {"None": "null", "True": "true", "False": "false"}


class Key(NamedTuple):
    """One key, as a row of the page."""

    name: str
    kind: str
    default: str
    meaning: str


def run_parser() -> Any:
    """The parser that ``qlora-pl fit`` uses."""
    required = ["--model.model_name_or_path", "BASE", "--data.sources", "ROWS"]
    return RunReader(["fit", *required])._subcommand_parsers["fit"]


def read_keys(parser: Any, with_all_of_lightnings: bool = False) -> Iterator[Key]:
    """The keys of a parser, in its order.

    Args:
        parser: Of a run, or of one of its classes.
        with_all_of_lightnings: Whether those of Lightning's are among them of which this project
            changes nothing.
    """
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        group, _, leaf = action.dest.rpartition(".")
        is_lightnings = group.startswith("trainer") and leaf not in TRAINER_DEFAULTS
        if hint is None or leaf == "help" or (is_lightnings and not with_all_of_lightnings):
            continue
        is_required = action.default is None and type(None) not in get_args(hint)
        default = "must be set" if is_required else f"`{in_yaml(action.default)}`"
        own = OWN_WORDS.get(action.dest)
        yield Key(action.dest, in_words(hint), default, own or in_markdown(action.help))


def in_words(hint: Any) -> str:
    """A type as somebody would say it who writes YAML."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    inner = [in_words(item) for item in arguments if item is not ...]
    if origin in (Union, types.UnionType):
        *names, last = dict.fromkeys(", ".join(inner).replace(f", {NAMES[Path]}", "").split(", "))
        return f"{', '.join(names)} or {last}"
    if origin is dict:
        return f"mapping of {inner[0]} to {inner[1]}"
    if origin in (list, tuple):
        has_length = origin is tuple and ... not in arguments
        return f"{len(inner)} {inner[0]}s" if has_length else f"list of {inner[0]}"
    return NAMES.get(hint) or str(getattr(hint, "__name__", hint)).replace("typing.", "")


def in_yaml(value: Any) -> str:
    """A default as a file would say it."""
    if isinstance(value, RowSources):
        value = value.plain()
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).splitlines()[0]


def in_markdown(text: str) -> str:
    """A docstring as a cell of a table, in YAML's words."""
    text = " ".join(text.split()).replace("``", "`").replace("|", "\\|")
    return re.sub(r"\b(None|True|False)\b", lambda found: IN_YAML[found[1]], text)


def table(keys: list[Key]) -> str:
    """Keys as a Markdown table."""
    rows = [f"| `{k.name}` | {k.kind} | {k.default} | {k.meaning} |" for k in keys]
    return "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows])


def page() -> str:
    """The whole of docs/configuration.md."""
    parser = run_parser()
    sections: dict[str, list[Key]] = {}
    for key in read_keys(parser):
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    changed = sections.pop("trainer")
    parts = [HEAD, "## The run as a whole\n", table(sections.pop(""))]
    for group, keys in sections.items():
        title = in_markdown(parser.groups[group].title)
        parts += [f"\n## `{group}`\n", f"{title}.\n", table(keys)]
        if group == "data":
            sources = QLoRAParser()
            sources.add_class_arguments(SourceConfig)
            parts += ["\n### A source (`SourceConfig`)\n", SOURCES, table(list(read_keys(sources)))]
    return "\n".join([*parts, "\n## `trainer`\n", CHANGED, table(changed), "", FILLED_IN])


if __name__ == "__main__":
    print(page())
