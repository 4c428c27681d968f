"""``qlora-pl smoke``: its own few flags, and those of the run that it shrinks."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from qlora_pl.errors import ConfigurationError

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
HUB_SECONDS = 3.0
"""For the Hub to answer."""


def smoke(words: Sequence[str]) -> int:
    """Run the command with the words that follow ``smoke``.

    Returns:
        The exit code.

    Raises:
        ConfigurationError: for a mistake in this command's own flags.
    """
    if any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0
    options, run_words = _parse(words)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or "LOCAL_RANK" in os.environ:
        raise ConfigurationError(
            "smoke starts the processes of its run itself; call it once, without torchrun or srun."
        )
    is_online = not options.offline and hub_answers()
    folder = Path(tempfile.mkdtemp(prefix="qlora-pl-smoke-"))
    try:
        with _environment(folder, is_online), _ending_on_sigterm():
            # Imported here, after the environment is set: libraries read it once.
            from qlora_pl.smoke.procedure import perform

            for name in ("qlora_pl", "lightning.pytorch", "lightning.fabric"):
                logging.getLogger(name).setLevel(logging.ERROR)
            record = perform(run_words, folder, is_online, _silent if options.json else _show)
    finally:
        if options.keep:
            print(f"smoke: everything lies in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        print(json.dumps(record, indent=2, ensure_ascii=False))
    code: int = record["exit_code"]
    return code


def hub_answers() -> bool:
    """Whether the Hub can be asked: libraries would try for a minute before they gave up."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urlopen(Request(address, method="HEAD"), timeout=HUB_SECONDS).close()
    except HTTPError:
        return True  # it answers
    except (OSError, ValueError):
        return False
    return True


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
    for word in rest:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and (near := difflib.get_close_matches(name, OWN_FLAGS, 1, 0.7)):
            raise ConfigurationError(
                f"smoke: no flag is called '--{name}'; did you mean '--{near[0]}'?"
            )
    return options, rest


@contextmanager
def _environment(folder: Path, is_online: bool) -> Iterator[None]:
    """Caches of the run go into the temporary folder, and GPUs are left to others."""
    own = {
        "QLORA_PL_CACHE": str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
    }
    own |= {} if is_online else {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    before: dict[str, Any] = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack: the runs are groups of their own, which must not outlive us."""

    def stop(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
