"""What `qlora-pl plan` says of every experiment, and the pictures of docs/memory.md.

    python benchmarks/plans.py docs     the pictures go there, the tables to standard output

Needs neither weights nor a GPU; docs/memory.md holds the output, and a test compares both.
"""

from __future__ import annotations

import sys
from pathlib import Path

from qlora_pl.planning.reports.figures import draw_figure6, draw_growth
from qlora_pl.planning.reports.report import CardResult, result_on
from qlora_pl.planning.runs.planned_run import PlannedRun
from qlora_pl.planning.runs.run_file import planned_file
from qlora_pl.planning.work.cards import CARDS

ROOT = Path(__file__).parents[1]
QUICKSTART_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # a folder only after `make quickstart`
HEAD = (
    "| experiment | adapters | GB before overhead | GiB in all | least card: fits | hours there, "
    "at most |\n| --- | --- | --- | --- | --- | --- |"
)


def planned(file: Path) -> PlannedRun:
    """The plan of an experiment, without its rows, so that it is the same on every machine."""
    words = ["--config", str(file), "--data.tokenizer", "no-one/nothing"]
    if file.stem == "quickstart":
        words += ["--model.model_name_or_path", QUICKSTART_BASE]
    return planned_file(words, 1, reads_all=False)


def least_card(run: PlannedRun) -> CardResult:
    """The card with the least memory on which a run fits without paging."""
    results = [result_on(run, card) for card in CARDS]
    fitting = [result for result in results if result.verdict.kind == "fits"]
    return min(fitting, key=lambda result: result.card.memory_bytes)


def row(run: PlannedRun) -> str:
    """An experiment's line of the table."""
    plan, least, setting = run.plan(None), least_card(run), run.on(None)
    hours = None if least.time is None else least.time.hours
    return (
        f"| `{run.name}` | r {setting.r}, {setting.adapter_dtype} | "
        f"{plan.before_overhead / 1e9:.1f} | {plan.total / 2**30:.1f} | {least.card.name} | "
        f"{'-' if hours is None else f'{hours:.1f}'} |"
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    del sys.argv[1:]  # the parser of runs would wonder whose they are
    print(draw_figure6(folder / "memory-figure6.png"))
    draw_growth(folder / "memory-growth.png")
    print(HEAD)
    for file in sorted((ROOT / "experiments").glob("*.yaml")):
        print(row(planned(file)))
