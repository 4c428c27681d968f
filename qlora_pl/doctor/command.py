"""``qlora-pl doctor``: looks at this machine as a run would, and says what that means for it."""

from __future__ import annotations

import argparse
import json
import math
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

from qlora_pl.doctor.checks import CHECKS, Check
from qlora_pl.doctor.finding import Finding, could_not_look
from qlora_pl.doctor.report import Lines, is_broken, record, say
from qlora_pl.doctor.running.lanes import run_lane
from qlora_pl.errors import ConfigurationError, did_you_mean

DEFAULT_LIMIT = 20.0
FLAGS = ("--json", "--offline", "--time-limit", "--help")
HELP = """usage: qlora-pl doctor [--offline] [--json] [--time-limit SECONDS]

Looks at this machine as a run would: versions, devices, matrix products in each type, memory, disk,
limits, processes, the Hub. Whatever can crash or hang is tried in a process of its own. About 20 s.
Exit code 0: nothing is broken; 1: something is; 2: a mistake in the words above.

flags:
  --offline             ask nothing over the network
  --json                everything as JSON, for a bug report: without secrets, names of people or
                        hosts, and the path of your home
  --time-limit SECONDS  that one check may take, and imports three times as long; default: 20

Each line: a mark (ticked, worth knowing, a warning, broken), what was found, what it means for
training, and a command that mends it. docs/troubleshooting.md explains each."""


def doctor(words: Sequence[str]) -> int:
    """Run the command with the words that follow ``doctor``.

    Returns:
        The exit code: 0 if nothing is broken, else 1.

    Raises:
        ConfigurationError: for a mistake in the words.
    """
    if any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0
    options = _parse(words)
    began = time.monotonic()
    lines = Lines(sys.stdout)
    wanted = [check for check in CHECKS if not (options.offline and check.asks_network)]
    results: list[tuple[Check, Finding]] = []
    group = ""
    for check, findings in examine(wanted, options.time_limit):
        results += [(check, finding) for finding in findings]
        if options.json or not findings:
            continue
        heading = [lines.heading(check.group)] if check.group != group else []
        group = check.group
        say([*heading, *(lines.finding(check, finding) for finding in findings)])
    seconds = time.monotonic() - began
    say(
        [json.dumps(record(results, seconds), indent=2)]
        if options.json
        else [lines.verdict(results, seconds)]
    )
    return int(is_broken(results))


def examine(checks: Sequence[Check], limit: float) -> Iterator[tuple[Check, list[Finding]]]:
    """Do all checks, lanes side by side; findings in the order of the checks, as soon as known.

    Args:
        checks: In the order of the report.
        limit: Seconds that an ordinary check may take.
    """
    found: dict[str, list[Finding]] = {}
    news = threading.Condition()

    def report(check: Check, findings: list[Finding]) -> None:
        with news:
            found[check.name] = findings
            news.notify()

    def run(lane: str, own: list[Check]) -> None:
        try:
            run_lane(lane, own, limit, report)
        except Exception as error:  # no process can be started, say: every line must come
            for check in own:
                if check.name not in found:
                    report(check, [could_not_look(check.title, error)])

    for lane in dict.fromkeys(check.lane for check in checks):
        own = [check for check in checks if check.lane == lane]
        threading.Thread(target=run, args=(lane, own), daemon=True).start()
    for check in checks:
        with news:
            news.wait_for(lambda name=check.name: name in found)  # type: ignore[misc]
        yield check, found[check.name]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"doctor: {message.removeprefix('argument ')}.")


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(allow_abbrev=False, add_help=False)
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--time-limit", type=float, default=DEFAULT_LIMIT)
    options, unknown = parser.parse_known_args(list(words))
    if unknown:
        word = unknown[0].partition("=")[0]
        if not word.startswith("-"):
            raise ConfigurationError(f"doctor: '{word}' belongs to no flag; see doctor --help.")
        raise ConfigurationError(f"doctor: no flag is called {word}{did_you_mean(word, FLAGS)}")
    if not (options.time_limit > 0 and math.isfinite(options.time_limit)):
        raise ConfigurationError(
            f"--time-limit: must be above 0 seconds, got {options.time_limit:g}."
        )
    return options
