"""``qlora-pl plan``: what a run takes of a GPU, told without weights, network or GPU."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qlora_pl.errors import ConfigurationError
from qlora_pl.inference.flags import Flags
from qlora_pl.planning.reports.plain_values import plain_values
from qlora_pl.planning.reports.report import Report, make_report
from qlora_pl.planning.reports.text import GB, text_of, titled
from qlora_pl.planning.runs.assumed_run import AssumedRun
from qlora_pl.planning.runs.planned_run import PlannedRun, assumed, configured
from qlora_pl.planning.work.cards import CARDS, Card, card_named, with_price

DESCRIPTION = """Say what a run takes of a GPU's memory, how long it takes and what it costs, before
anything is downloaded: of a training file (--config FILE, and any key of `qlora-pl fit`), or of a
known model and a few flags (--shape NAME). Exit code 0 also where it does not fit."""
MOST_GPUS = 2**17
"""More than any machine has."""
OWN_FLAGS = (
    "--gpu",
    "--gpus",
    "--price-per-hour",
    "--mean-length",
    "--read-rows",
    "--json",
    "--plot",
    "--shape",
    "--config",
)


def plan_command(words: Sequence[str]) -> int:
    """Run the command with the words that follow ``plan``.

    Returns:
        The exit code: 0.

    Raises:
        ConfigurationError: for a mistake in words or files, and a model whose sizes are not known.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # read by the Hub's library when it is imported
    words = _joined(words)
    if any(word in ("-h", "--help") for word in words) or not words:
        all_flags().print_help()
        return 0
    if any(_is_flag(word, "--figure6") for word in words):
        return _figure6(words)
    is_shape = any(_is_flag(word, "--shape") for word in words)
    if is_shape and any(_is_flag(word, "--config") or word == "-c" for word in words):
        raise ConfigurationError("plan: --shape and --config are two ways to say it; give one.")
    if is_shape:
        flags = all_flags()
        options = flags.parse(words)
        settings = AssumedRun(**flags.settings(AssumedRun, options))
        _check(options)
        run = assumed(options.shape, settings, options.gpus or 1)
    else:
        options, rest = _own_flags().parse_known_args(list(words))
        _refuse_others(rest)
        _check(options)
        run = configured(rest, options.gpus, options.read_rows)
    if options.mean_length is not None:
        run = replace(run, mean_length=options.mean_length)
    report = _report(run, options)
    if options.plot is not None:
        _draw(report, Path(options.plot).expanduser())
    print(json.dumps(plain_values(report), indent=2) if options.json else text_of(report))
    return 0


def _refuse_others(words: Sequence[str]) -> None:
    """A word that was meant for this command and not for the run.

    Raises:
        ConfigurationError: naming what it may have been; and if no run is named at all.
    """
    if not words:
        raise ConfigurationError(
            "plan: name a training file with --config, or a known model with --shape."
        )
    for word in words:
        name = word.partition("=")[0]
        # 0.7 tells "gpsu" from "gpus", and "run", a group of the run's, from all of them
        near = difflib.get_close_matches(name, OWN_FLAGS, 1, 0.7)
        if word.startswith("--") and name != "--config" and near:
            raise ConfigurationError(f"plan: no flag is called '{name}'; did you mean '{near[0]}'?")


def _report(run: PlannedRun, options: argparse.Namespace) -> Report:
    card = None if options.gpu is None else _card(options)
    cards = (card,) if card is not None and card.is_named else CARDS
    return make_report(run, card, cards)


def _card(options: argparse.Namespace) -> Card:
    return with_price(card_named(options.gpu), options.price_per_hour)


def _check(options: argparse.Namespace) -> None:
    """Mistakes in this command's own flags, before anything slow is done.

    Raises:
        ConfigurationError: with all of them.
    """
    problems = []
    if options.gpus is not None and not 1 <= options.gpus <= MOST_GPUS:
        problems.append(f"--gpus: must lie in 1 to {MOST_GPUS:,}, got {options.gpus:,}.")
    if options.price_per_hour is not None and not (0 <= options.price_per_hour < math.inf):
        problems.append(f"--price-per-hour: must be 0 or more, got {options.price_per_hour}.")
    if options.mean_length is not None and not 1 <= options.mean_length < math.inf:
        problems.append(f"--mean-length: must be at least 1, got {options.mean_length}.")
    if options.price_per_hour is not None and options.gpu is None:
        problems.append("--price-per-hour: whose price is it? name the card with --gpu.")
    try:
        if options.gpu is not None:
            card_named(options.gpu)
    except ConfigurationError as error:
        problems += error.problems
    if problems:
        raise ConfigurationError(problems)
    if options.plot is not None:
        from qlora_pl.planning.reports.pictures import refuse_picture

        refuse_picture(Path(options.plot).expanduser(), "--plot")


def _draw(report: Report, file: Path) -> None:
    from qlora_pl.planning.reports.pictures import Bar, draw_plan

    bar = Bar(label=report.run.name, components=report.in_words())
    chosen = report.chosen
    lines = (
        {"24 GB": 24 * GB, "48 GB": 48 * GB}
        if chosen is None
        else {chosen.card.name: float(chosen.card.memory_bytes)}
    )
    draw_plan(file, titled(report.run, report.setting), bar, lines)
    print(f"plan: {file}", file=sys.stderr)


def _figure6(words: Sequence[str]) -> int:
    parser = _Own("plan", DESCRIPTION)
    parser.add_argument("--figure6")
    options = parser.parse(words)
    file = Path(options.figure6).expanduser()
    from qlora_pl.planning.reports.figures import draw_figure6
    from qlora_pl.planning.reports.pictures import refuse_picture

    refuse_picture(file, "--figure6")
    print(draw_figure6(file))
    print(f"plan: {file}", file=sys.stderr)
    return 0


class _Own(Flags):
    """This command's own flags."""


def _own_flags() -> Flags:
    flags = _Own("plan", DESCRIPTION)
    group = flags.add_argument_group("the plan")
    group.add_argument("--gpu", metavar="NAME|SIZE", help="a card, or a bare size such as 24GiB")
    group.add_argument("--gpus", type=int, metavar="N", help="devices, over all machines")
    group.add_argument(
        "--price-per-hour", type=float, metavar="X", help="US dollars of the card, for the price"
    )
    group.add_argument(
        "--mean-length",
        type=float,
        metavar="X",
        help="tokens of a row on average, for the time, where the rows are not read",
    )
    group.add_argument(
        "--read-rows", action="store_true", help="read the run's rows, however many there are"
    )
    group.add_argument("--json", action="store_true", help="every number as JSON")
    group.add_argument("--plot", metavar="FILE", help="draw the plan: .png, .svg or .pdf")
    return flags


def all_flags() -> Flags:
    """The command's flags."""
    flags = _own_flags()
    group = flags.add_argument_group("what is planned")
    group.add_argument(
        "--config", metavar="FILE", help="a training file; keys of `qlora-pl fit` may follow"
    )
    group.add_argument("--shape", metavar="NAME", help="a known model, such as llama2-7b")
    group.add_argument(
        "--figure6", metavar="FILE", help="draw the paper's figure 6 as this plan has it"
    )
    flags.add_settings(AssumedRun, "with --shape (a training file has keys for these)")
    return flags


def _is_flag(word: str, flag: str) -> bool:
    return word == flag or word.startswith(f"{flag}=")


def _joined(words: Sequence[str]) -> list[str]:
    """``--gpu -3GiB`` as ``--gpu=-3GiB``, which argparse would take for a flag."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in ("--gpu", "--gpus") and word[:1] == "-" and word[:2] != "--":
            joined[-1] = f"{joined[-1]}={word}"
        else:
            joined.append(word)
    return joined
