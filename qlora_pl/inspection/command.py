"""``qlora-pl inspect``: which subject is meant, and ``inspect data``'s own flags."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from qlora_pl.errors import ConfigurationError, did_you_mean
from qlora_pl.files import write_atomic
from qlora_pl.inspection.report_folder import signature

SUBJECTS = {
    "data": "the rows that a run would train on: one HTML page and a summary",
    "model": "what each way to quantise a base changes, by layer and kind of module",
    "adapter": "what an adapter changes, by layer and kind of module; or how two are alike",
}
DEFAULT_OUTPUT = "inspect-data.html"
OWN_FLAGS = ("row", "rows", "output", "json", "help")
OVERVIEW = "\n".join(
    [
        "usage: qlora-pl inspect SUBJECT [flags]",
        "",
        "subjects:",
        *(f"  {name:9}{text}" for name, text in SUBJECTS.items()),
        "",
        "qlora-pl inspect SUBJECT --help",
    ]
)
HELP = f"""usage: qlora-pl inspect data --config FILE [--KEY VALUE ...] [flags]

Reads what `qlora-pl fit` would read with the same words; no weights, no GPU. Writes one page that
opens in any browser, and a summary here. Exit code 2 where fit would not start on these rows.

flags:
  --output FILE     where the page goes; default: {DEFAULT_OUTPUT} in the working directory
  --row FILE:ROW    show this row token by token; may be given several times
  --rows N          show so many training rows, evenly spread
  --json            print every number as JSON instead of the summary

Without --row and --rows the page shows the first row, the longest, the one that loses most, and
some odd ones. Every key of `qlora-pl fit --help` may follow."""


def inspect(words: Sequence[str]) -> int:
    """Run the command with the words that follow ``inspect``.

    Returns:
        The exit code: 0, as a page that was written for a run that would not start is an error.

    Raises:
        ConfigurationError: for a mistake in words or files, and if ``fit`` would not start; the
            page is written then all the same, if the training rows could be read.
        DatasetFormatError: if they could not.
    """
    subject = words[0] if words else "--help"
    if subject in ("-h", "--help", "help"):
        print(OVERVIEW)
        return 0
    if subject not in SUBJECTS:
        end = did_you_mean(subject, SUBJECTS)
        raise ConfigurationError(
            f"inspect: nothing is called '{subject}' (there is {', '.join(SUBJECTS)}){end}"
        )
    # Imported here: the rows of a run are looked at without bitsandbytes and PEFT.
    if subject == "model":
        from qlora_pl.inspection.weights.command import inspect_model

        return inspect_model(words[1:])
    if subject == "adapter":
        from qlora_pl.inspection.adapters.command import inspect_adapter

        return inspect_adapter(words[1:])
    if words[1:2] in (["-h"], ["--help"]):
        print(HELP)
        return 0
    return inspect_data(*_parse(words[1:]))


def inspect_data(options: argparse.Namespace, run_words: list[str]) -> int:
    """Measure, write the page, and say what was found.

    Args:
        options: This command's own flags.
        run_words: Those of the run.
    """
    output = Path(options.output).expanduser()
    _refuse_output(output)
    wanted = [_parse_row(word) for word in options.row]

    # Imported here: a mistake in the flags above is told at once.
    from qlora_pl.inspection.data.numbers import measure
    from qlora_pl.inspection.data.outcomes import summary
    from qlora_pl.inspection.data.page import page
    from qlora_pl.inspection.data.run_data import read_run
    from qlora_pl.inspection.data.traced_rows import choose_rows, trace_rows

    # The summary says what reading would log; importing Lightning sets the others to INFO.
    for name in ("qlora_pl", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    run = read_run(run_words)
    numbers, documents = measure(run)
    cut_off = None if numbers.is_paired else numbers.limits.max_length
    choices = choose_rows(documents, cut_off, numbers.odd, wanted, options.rows)
    rows = trace_rows(documents, choices, run.data.encoder, run.data.limits)
    write_atomic(output, page(numbers, rows))
    print(json.dumps(numbers.to_plain(), indent=2) if options.json else summary(numbers))
    if run.problems:
        raise ConfigurationError([*run.problems, f"The page about these rows is '{output}'."])
    if not options.json:
        print(f"inspect: {output}")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"inspect: {message.removeprefix('argument ')}.")


def _parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's flags, and the words that are left for the parser of runs."""
    parser = _Parser(allow_abbrev=False, add_help=False)
    parser.add_argument("--output", default=DEFAULT_OUTPUT)
    parser.add_argument("--row", action="append", default=[])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(list(words))
    for word in rest:
        name = word.partition("=")[0].removeprefix("--")
        # 0.7 tells "ouput" from "output", and "run", a group of the run's, from "row"
        if word.startswith("--") and (near := difflib.get_close_matches(name, OWN_FLAGS, 1, 0.7)):
            raise ConfigurationError(
                f"inspect: no flag is called '--{name}'; did you mean '--{near[0]}'?"
            )
    if options.rows is not None and options.rows < 1:
        raise ConfigurationError(f"--rows: must be at least 1, got {options.rows}.")
    return options, rest


def _parse_row(word: str) -> tuple[str, int]:
    found = re.fullmatch(r"(?:(.*):)?(\d+)", word)
    if found is None or int(found[2]) < 1:
        raise ConfigurationError(f"--row: expected FILE:ROW, rows counted from 1, got '{word}'.")
    return found[1] or "", int(found[2])


def _refuse_output(output: Path) -> None:
    """A page of an earlier run is replaced; nothing else ever is."""
    if output.is_dir():
        raise ConfigurationError(f"--output: '{output}' is a folder; name a file in it.")
    if not output.parent.is_dir():
        raise ConfigurationError(f"--output: no folder '{output.parent}'; make it first.")
    if not output.exists():
        return
    with output.open("rb") as file:
        opening = file.read(1024)
    if SIGNATURE.encode() not in opening:
        raise ConfigurationError(
            f"--output: '{output}' exists and is no page of this command; name another file."
        )


SIGNATURE = signature("data")
"""By which a page of this command is told from any other file."""
