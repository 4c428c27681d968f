"""Findings as lines for a terminal, or as JSON for a bug report."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from shutil import get_terminal_size
from typing import Any, TextIO

from qlora_pl import __version__
from qlora_pl.doctor.checks import Check
from qlora_pl.doctor.finding import Finding, Status
from qlora_pl.redaction import anonymous, redact

FORMAT = 1
"""Of the JSON; raised when a name in it changes its meaning or goes."""
PAGE = "docs/troubleshooting.md"
WIDEST = 110
INDENT = 20
"""Columns of a mark and a title."""
MARKS = {Status.OK: "✓", Status.NOTE: "·", Status.WARNING: "!", Status.BROKEN: "✗"}
PLAIN_MARKS = {Status.OK: "+", Status.NOTE: ".", Status.WARNING: "!", Status.BROKEN: "x"}
"""For terminals that have no ticks."""
COLOURS = {
    Status.OK: "\x1b[32m",
    Status.NOTE: "\x1b[2m",
    Status.WARNING: "\x1b[33m",
    Status.BROKEN: "\x1b[31m",
}
BOLD, DIM, RESET = "\x1b[1m", "\x1b[2m", "\x1b[0m"

Results = Sequence[tuple[Check, Finding]]


class Lines:
    """Findings as lines that fit a terminal, with colour where it shows any.

    Args:
        stream: Where the lines will go.
    """

    def __init__(self, stream: TextIO) -> None:
        self.has_colour = (
            stream.isatty()
            and not os.environ.get("NO_COLOR")  # no-color.org
            and os.environ.get("TERM") != "dumb"
        )
        try:
            "".join([*MARKS.values(), "→"]).encode(stream.encoding or "ascii")
        except UnicodeEncodeError:
            self.marks, self.arrow = PLAIN_MARKS, "->"
        else:
            self.marks, self.arrow = MARKS, "→"
        self.width = min(get_terminal_size((WIDEST, 24)).columns, WIDEST)

    def heading(self, group: str) -> str:
        """The heading of a group, with a blank line before it."""
        return "\n" + self._in(BOLD, group)

    def finding(self, check: Check, finding: Finding) -> str:
        """One finding: its mark, what was found and what that means, and the fix below."""
        mark = self._in(COLOURS[finding.status], self.marks[finding.status])
        title = redact(finding.title)
        text = redact(f"{finding.found} - {finding.meaning}.")
        lead = " " * INDENT
        if len(title) > INDENT - 5:  # on a line of its own
            first, start = f"  {mark} {title}\n", lead
        else:
            first, start = "", f"  {mark} {title.ljust(INDENT - 4)}"
        body = textwrap.wrap(
            text,
            max(40, self.width - INDENT),
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines = [start + body[0], *(lead + line for line in body[1:])]
        if finding.fix:
            lines.append(lead + self._in(BOLD, f"{self.arrow} {redact(finding.fix)}"))
        if finding.status in (Status.WARNING, Status.BROKEN):
            lines.append(lead + self._in(DIM, f"{PAGE}#{check.name}"))
        return first + "\n".join(lines)

    def verdict(self, results: Results, seconds: float) -> str:
        """The last line: what is broken, and how many warnings there are."""
        return f"\n{self._in(BOLD, verdict(results))} ({seconds:.0f} s)"

    def _in(self, colour: str, text: str) -> str:
        return f"{colour}{text}{RESET}" if self.has_colour else text


def verdict(results: Results) -> str:
    """One sentence on all findings."""
    broken = list(dict.fromkeys(f.title for _, f in results if f.status is Status.BROKEN))
    warnings = sum(f.status is Status.WARNING for _, f in results)
    end = "" if not warnings else f"; {warnings} warning{'s' if warnings > 1 else ''}"
    if not broken:
        return f"Nothing is broken{end}."
    return f"Broken: {', '.join(broken)}{end}."


def is_broken(results: Results) -> bool:
    """Whether anything is."""
    return any(finding.status is Status.BROKEN for _, finding in results)


def record(results: Results, seconds: float) -> dict[str, Any]:
    """Everything that was found, in plain types and without secrets, names of people or hosts."""
    return {
        "format": FORMAT,
        "qlora_pl": __version__,
        "verdict": "broken" if is_broken(results) else "ok",
        "counts": {str(s): sum(f.status is s for _, f in results) for s in Status},
        "seconds": round(seconds, 1),
        "findings": [
            {
                "check": check.name,
                "group": check.group,
                **{key: anonymous(value) for key, value in finding.to_plain().items()},
                "about": f"{PAGE}#{check.name}",
            }
            for check, finding in results
        ],
    }


def say(lines: Iterable[str]) -> None:
    """Print lines at once, so that a reader sees them as they are found."""
    print("\n".join(lines), file=sys.stdout, flush=True)
