"""``qlora-pl prove-resume``: a user's own run, killed and resumed, against itself uninterrupted.

Its own few flags, and those of the run that it cuts to a few steps.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from qlora_pl.errors import ConfigurationError

DEFAULT_STEPS = 4
OWN_FLAGS = ("steps", "folder", "json", "help")
HELP = f"""usage: qlora-pl prove-resume --config FILE [--KEY VALUE ...] [flags]

Starts the run that `qlora-pl fit` would start with the same words, cut to a few steps, four times:
twice uninterrupted, once killed by SIGKILL after a save in the middle, once resumed from there.
Then compares, byte by byte, the final adapter, the checkpoints with everything in them, and
metrics.csv. Exit code 0: the resumed run is the uninterrupted one; 1: it is not; 2: a mistake.

flags:
  --steps N         optimizer steps of each run, at least 2; default: {DEFAULT_STEPS}
  --folder DIR      where the runs and the record go; default: prove-resume/NAME beside run.root
  --json            print the record, resume_proof.json, instead of the verdict

Validation is cut to two batches, sampled answers and the run's loggers are left out; runs of yours
are not touched. Every key of `qlora-pl fit --help` may follow."""


def prove_resume(words: Sequence[str]) -> int:
    """Run the command with the words that follow ``prove-resume``.

    Returns:
        The exit code: 0 if the resumed run is the uninterrupted one (or as near to it as a second
        uninterrupted one, where two of them differ), else 1.

    Raises:
        ConfigurationError: for a mistake in words or files, and what ``fit`` says of one.
        TrainingStoppedError: if the run fails by itself.
    """
    if any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0
    options, run_words = _parse(words)

    # Imported here: a mistake in the flags above is told at once.
    from qlora_pl.cli import read_runs
    from qlora_pl.proof.cut import cut, proof_folder, refuse_unprovable
    from qlora_pl.proof.experiment import perform
    from qlora_pl.training.run_folders.run_lock import RunLock

    # The runs say what they do in their logs; importing Lightning sets its own to INFO.
    for name in ("qlora_pl", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    [run] = read_runs([run_words])
    refuse_unprovable(run)
    folder = proof_folder(run, options.folder)
    lock = RunLock(folder)
    try:
        with _ending_on_sigterm():
            record = perform(cut(run, run_words, options.steps), folder)
    finally:
        lock.release()
    _report(record, folder, options.json)
    return 0 if record["verdict"] in ("proven", "within noise") else 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"prove-resume: {message.removeprefix('argument ')}.")


def _parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's flags, and the words that are left for the parser of runs."""
    parser = _Parser(allow_abbrev=False, add_help=False)
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--folder")
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(list(words))
    for word in rest:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and (near := difflib.get_close_matches(name, OWN_FLAGS, 1, 0.7)):
            raise ConfigurationError(
                f"prove-resume: no flag is called '--{name}'; did you mean '--{near[0]}'?"
            )
    if options.steps < 2:
        raise ConfigurationError(
            f"--steps: must be at least 2, one before the kill and one after, got {options.steps}."
        )
    return options, rest


def _report(record: dict[str, Any], folder: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(record, indent=2))
        return
    for sentence in record["details"]:
        print(f"  {sentence}")
    print(f"prove-resume: {record['sentence']}")
    print(f"prove-resume: {folder / 'resume_proof.json'}", file=sys.stderr)


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
