"""The table of docs/reliability.md, out of outcomes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from faults.proving import Outcome
from faults.runs import INTERVAL

BEGIN, END = "<!-- faults: begin (made by `make faults`) -->", "<!-- faults: end -->"
ENDINGS = ("went on", "said so and stopped", "died")


@dataclass
class Row:
    """What came of the injections of one kind."""

    kind: str
    injections: int = 0
    endings: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ENDINGS, 0))
    lost_steps: int = 0
    """At most."""
    equal: int = 0
    """Runs that ended as the uninterrupted one."""

    def add(self, outcome: Outcome) -> None:
        """One more."""
        self.injections += 1
        if outcome.ending in self.endings:
            self.endings[outcome.ending] += 1
        self.lost_steps = max(self.lost_steps, outcome.lost_steps)
        self.equal += not outcome.problems


class Records:
    """Rows of the parts that were run to their end, of one state of the code.

    Args:
        folder: Where they are kept.
        code: Names the state of the code.
    """

    def __init__(self, folder: Path, code: str) -> None:
        self.folder = folder
        self.code = code

    def keep(self, word: str, rows: list[Row]) -> None:
        """Remember what came of a part."""
        self.folder.mkdir(parents=True, exist_ok=True)
        held = {"code": self.code, "rows": [asdict(row) for row in rows]}
        (self.folder / f"{word}.json").write_text(json.dumps(held, indent=2))

    def rows(self, words: Iterable[str]) -> list[Row] | None:
        """The rows of all these parts; None if one was not run with this code."""
        found: list[Row] = []
        for word in words:
            path = self.folder / f"{word}.json"
            held = json.loads(path.read_text()) if path.exists() else {}
            if held.get("code") != self.code:
                return None
            found += [Row(**row) for row in held["rows"]]
        return found


def code_digest(root: Path) -> str:
    """A name for the package as it is now."""
    files = sorted((root / "qlora_pl").rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def table(rows: list[Row], seed: int) -> str:
    """As Markdown."""
    total = sum(row.injections for row in rows)
    lines = [
        f"{total} injections; seed {seed}; a save every {INTERVAL} steps.",
        "",
        "| fault | injections | went on | said so and stopped | died | steps again, at most "
        "| equal at the end |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        equal = f"{row.equal} of {row.injections}"
        cells = [row.kind, row.injections, *row.endings.values(), row.lost_steps, equal]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the page's two marks."""
    old = page.read_text()
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(old):
        raise ValueError(f"{page} lacks the marks '{BEGIN}' and '{END}'")
    page.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", old))
