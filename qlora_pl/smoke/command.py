"""``qlora-pl smoke``: its own few flags, and those of the run that it shrinks."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from qlora_pl.errors import ConfigurationError
from qlora_pl.smoke.surroundings import (
    hub_answers,
    own_environment,
    refuse_several,
    temporary_folder,
)

OWN_FLAGS = ("offline", "keep", "json", "help")
HELP = """usage: qlora-pl smoke --config FILE [--KEY VALUE ...] [flags]

Tries the run that `qlora-pl fit` would start with the same words, shrunken: the base's architecture
with two narrow layers and random weights, packed as the run asks, with its own tokenizer, template,
rows, optimizer and strategy, on the CPU. It is trained, saved, killed, resumed, validated, asked,
merged, and loaded by plain programs. No weights are fetched; a minute or two.

flags:
  --offline         ask the Hub for nothing; what is not on this machine is stood in for
  --keep            leave the temporary folder there, and say where it is
  --json            print everything as JSON instead of a list

Exit code 0: every step passed; 1: one failed; 2: fit would not even parse these words. Every key of
`qlora-pl fit --help` may follow; runs of yours are not touched."""


def smoke(words: Sequence[str]) -> int:
    """Run the command with the words that follow ``smoke``.

    Returns:
        The exit code.

    Raises:
        ConfigurationError: for a mistake in the words, with which nothing can be tried.
    """
    if any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0
    began = time.monotonic()
    options, run_words = _parse(words)
    refuse_several()
    is_online = not options.offline and hub_answers()
    with temporary_folder(options.keep) as folder, own_environment(folder, is_online):
        if options.keep:
            print(f"smoke: everything is kept in {folder}", file=sys.stderr)
        # Imported here, after the environment is set: libraries read it once.
        from qlora_pl.smoke.procedure import perform

        for name in ("qlora_pl", "lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        tell = _silent if options.json else _show
        record = perform(run_words, folder, is_online, tell, began)
    if options.json:
        print(json.dumps(record, indent=2, ensure_ascii=False))
    code: int = record["exit_code"]
    if code == 2:
        configuration = record["steps"][0]
        raise ConfigurationError([configuration["said"], *configuration["more"]])
    return code


def _show(line: str) -> None:
    print(line, flush=True)


def _silent(_: str) -> None:
    """The record says it all."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"smoke: {message.removeprefix('argument ')}.")


def _parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's flags, and the words that are left for the parser of runs."""
    parser = _Parser(allow_abbrev=False, add_help=False)
    for name in ("offline", "keep", "json"):
        parser.add_argument(f"--{name}", action="store_true")
    options, rest = parser.parse_known_args(list(words))
    if not rest:
        raise ConfigurationError("smoke: name a run, as for fit: qlora-pl smoke --config FILE.")
    if not rest[0].startswith("-"):
        raise ConfigurationError(
            f"smoke: '{rest[0]}' follows no flag; a run's file is named by --config {rest[0]}."
        )
    for word in rest:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and (near := difflib.get_close_matches(name, OWN_FLAGS, 1, 0.7)):
            raise ConfigurationError(
                f"smoke: no flag is called '--{name}'; did you mean '--{near[0]}'?"
            )
    return options, rest
