"""The table of docs/reliability.md, out of outcomes."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from faults.proving import Outcome
from faults.runs import INTERVAL

BEGIN, END = "<!-- faults: begin (made by `make faults`) -->", "<!-- faults: end -->"
ENDINGS = ("went on", "said so and stopped", "died")


class Table:
    """Counts outcomes by kind."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Outcome]] = defaultdict(list)

    def add(self, kind: str, outcome: Outcome) -> None:
        """One more."""
        self.rows[kind].append(outcome)

    @property
    def num_injections(self) -> int:
        """Of all kinds."""
        return sum(len(outcomes) for outcomes in self.rows.values())

    @property
    def failures(self) -> list[Outcome]:
        """Those after which something was lost, or different."""
        return [o for outcomes in self.rows.values() for o in outcomes if o.problems]

    def text(self, seed: int) -> str:
        """As Markdown."""
        lines = [
            f"{self.num_injections} injections; seed {seed}; a save every {INTERVAL} steps.",
            "",
            "| fault | injections | went on | said so and stopped | died | steps again, at most "
            "| equal at the end |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for kind, outcomes in self.rows.items():
            counts = [sum(o.ending == ending for o in outcomes) for ending in ENDINGS]
            lost = max(outcome.lost_steps for outcome in outcomes)
            equal = sum(not outcome.problems for outcome in outcomes)
            cells = [kind, len(outcomes), *counts, lost, f"{equal} of {len(outcomes)}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        return "\n".join(lines)


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the page's two marks."""
    old = page.read_text()
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(old):
        raise ValueError(f"{page} lacks the marks '{BEGIN}' and '{END}'")
    page.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", old))
