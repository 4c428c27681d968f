"""A process that does some checks and says, line by line, how far it has come.

What it prints outlives it: if a library crashes or hangs, the reader knows in which check.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from qlora_pl.doctor.checks import BY_NAME
from qlora_pl.doctor.finding import Finding, could_not_look

MARK = "\x1eqlora-pl-doctor "
"""Begins a line that is ours; libraries print lines of their own."""
BEGIN = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "


def program(call: str, *words: str) -> list[str]:
    """The command line of a process that finds the same modules as this one.

    Args:
        call: Python statements.
        words: Become ``sys.argv[2:]`` there.
    """
    return [sys.executable, "-c", BEGIN + call, json.dumps(sys.path), *words]


def tell(event: str, **content: Any) -> None:
    """Print one event."""
    print(f"\n{MARK}{json.dumps({'event': event} | content)}", flush=True)


def work(names: Sequence[str]) -> None:
    """Do the checks of these names, then end without waiting for any library's own end.

    A check whose foundation could not be laid (its import raised, say) is passed over.
    """
    failed: set[str] = set()
    for name in names:
        check = BY_NAME[name]
        if failed & set(check.needs):
            failed.add(name)
            continue
        tell("begin", check=name)
        try:
            for found in check.load()():
                if isinstance(found, Finding):
                    tell("found", finding=found.to_plain())
                else:
                    tell("trying", what=found)
        except Exception as error:
            tell("found", finding=could_not_look(check.title, error, check.repair()).to_plain())
            failed.add(name)
        tell("end", check=name, failed=name in failed)
    sys.stdout.flush()
    os._exit(0)
