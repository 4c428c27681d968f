"""``qlora-pl bench``: how fast training is, and where its time and memory go."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from qlora_pl.benching.settings import Timing, Workload
from qlora_pl.benching.shapes import shape_named
from qlora_pl.errors import ConfigurationError
from qlora_pl.files import write_atomic
from qlora_pl.inference.flags import Flags

DESCRIPTION = """Trains a few steps and measures: tokens/s, MFU and HFU, peak memory, time by part,
with a sentence of advice. Either a run of your own (--config FILE, with any key of `qlora-pl fit`),
or a known shape with random weights and rows (--shape NAME), which needs no download."""
PROGRAMS = {"hf": "transformers", "trl": "trl"}
"""Whom a shape can be measured against, and the package that it is."""
MODES = ("shape", "config", "protocol")
WORKER = "--worker"
"""How a comparison starts its processes; for nobody else."""


def bench_command(words: Sequence[str]) -> int:
    """Run the command with the words that follow ``bench``.

    Returns:
        The exit code: 1 where the first loss shows that what was timed does not work, or a check
        of the protocol failed.

    Raises:
        ConfigurationError: for a mistake in the words.
        HardwareError: if this machine cannot do it.
    """
    if words[:1] == [WORKER]:
        from qlora_pl.benching.worker import work  # slow to import

        return work(words[1], Path(words[2]))
    given = [name for name in MODES if _is_given(words, name)]
    flags = all_flags()
    if not words or _is_given(words, "help") or "-h" in words:
        print(flags.format_help())
        return 0
    if "shape" in given and "config" in given:
        raise ConfigurationError("bench: --shape and --config are two things to measure; name one.")
    if not given:
        raise ConfigurationError("bench: say what to measure: --shape NAME, or --config FILE.")
    logging.getLogger("qlora_pl").setLevel(logging.WARNING)  # the report says what was measured
    if "protocol" in given:
        return _protocol(flags.parse(words))
    if "config" in given:
        return _config_run(words)
    return _shape_run(flags, flags.parse(words))


def _shape_run(flags: Flags, options: argparse.Namespace) -> int:
    workload = Workload(**flags.settings(Workload, options))
    timing = Timing(**flags.settings(Timing, options))
    shape_named(workload.shape)  # a misspelt one is told before torch is imported
    out = _refuse_output(options.out)
    if options.against is None:
        if options.against_accumulation is not None:
            raise ConfigurationError(
                "--against-accumulation: says how another program cuts a step; add --against."
            )
        from qlora_pl.benching.measuring import measure_shape  # slow to import

        return _tell(measure_shape(workload, timing), out, options.json)
    refuse_missing(options.against)
    from qlora_pl.benching.against import compare, comparison_report

    record = compare(workload, timing, options.against, options.against_accumulation)
    return _tell(record, out, options.json, comparison_report)


def _config_run(words: Sequence[str]) -> int:
    """A user's run: this command's flags apart, the rest for the parser of runs."""
    own = Flags("bench", DESCRIPTION)
    _add_common(own)
    options, rest = own.parse_known_args(list(words))
    of_shape = {f"--{field.name.replace('_', '-')}" for field in fields(Workload)}
    known = [flag for action in own._actions for flag in action.option_strings]
    for word in rest:
        name = word.partition("=")[0]
        if name in of_shape or name.startswith("--against"):
            raise ConfigurationError(
                f"{name}: belongs to --shape; with --config the run's own keys say it "
                "(--model.lora.r 16, say)."
            )
        if name.startswith("--") and (near := difflib.get_close_matches(name, known, 1, 0.7)):
            raise ConfigurationError(
                f"bench: no flag is called '{name}'; did you mean '{near[0]}'?"
            )
    timing = Timing(**own.settings(Timing, options))
    out = _refuse_output(options.out)
    from qlora_pl.benching.config_run import measure_config  # slow to import

    record = measure_config(rest, timing)
    return 0 if record is None else _tell(record, out, options.json)


def _protocol(options: argparse.Namespace) -> int:
    if options.out is None:
        raise ConfigurationError("--protocol: name a folder for its records with --out.")
    from qlora_pl.benching.protocol import run_protocol

    return run_protocol(options.protocol, Path(options.out), options.only, options.rehearse)


def refuse_missing(program: str) -> None:
    """The program to measure against must be installed.

    Raises:
        ConfigurationError: with the command that installs it.
    """
    package = PROGRAMS[program]
    if importlib.util.find_spec(package) is None:
        raise ConfigurationError(
            f"--against {program}: {package} is not installed; run: pip install 'qlora-pl[bench]'"
        )


def _tell(record: dict[str, Any], out: Path | None, as_json: bool, report: Any = None) -> int:
    from qlora_pl.benching.report import report as report_of_one

    if out is not None:
        write_atomic(out, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2) if as_json else (report or report_of_one)(record))
    if out is not None and not as_json:
        print(f"bench: {out}")
    return 1 if record.get("loss", {}).get("problem") else 0


def _is_given(words: Sequence[str], name: str) -> bool:
    return any(word.partition("=")[0] == f"--{name}" for word in words)


def all_flags() -> Flags:
    """The command's flags."""
    flags = Flags("bench", DESCRIPTION)
    flags.add_settings(Workload, "a known shape, with random weights and rows")
    _add_common(flags)
    group = flags.add_argument_group("a run of your own")
    group.add_argument("--config", metavar="FILE", help="and any key of qlora-pl fit")
    group = flags.add_argument_group("another program over the same weights and rows")
    group.add_argument(
        "--against",
        choices=tuple(PROGRAMS),
        help="measure in turn against transformers' Trainer with PEFT (hf), or TRL's SFTTrainer",
    )
    group.add_argument(
        "--against-accumulation",
        type=int,
        metavar="N",
        help="cut each of its steps into so many micro-batches (default: as many as here)",
    )
    group = flags.add_argument_group("everything at once")
    group.add_argument(
        "--protocol", choices=("gpu",), help="all measurements of one GPU, into the folder --out"
    )
    group.add_argument("--only", action="append", metavar="NAME", help="these of them alone")
    group.add_argument("--rehearse", action="store_true", help="tiny, on whatever device there is")
    return flags


def _add_common(flags: Flags) -> None:
    flags.add_settings(Timing, "how long")
    group = flags.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print the whole record as JSON")
    group.add_argument("--out", metavar="FILE", help="write the record here as well")


def _refuse_output(name: str | None) -> Path | None:
    """A record of an earlier measurement is replaced; nothing else ever is."""
    if name is None:
        return None
    out = Path(name).expanduser()
    if out.is_dir():
        raise ConfigurationError(f"--out: '{out}' is a folder; name a file in it.")
    if not out.parent.is_dir():
        raise ConfigurationError(f"--out: no folder '{out.parent}'; make it first.")
    if out.exists():
        try:
            is_own = json.loads(out.read_text()).get("record", "").startswith("qlora-pl bench")
        except (ValueError, AttributeError, OSError):
            is_own = False
        if not is_own:
            raise ConfigurationError(
                f"--out: '{out}' exists and is no record of this command; name another file."
            )
    return out
