"""Everything that is told of a run: its plan, the verdict, what would help, each card's time.

Numbers only; ``text`` puts them into words, and ``plain_values`` into JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_pl.planning.advice.automatic import USABLE, Choice, in_words
from qlora_pl.planning.advice.remedies import Advice, advise
from qlora_pl.planning.advice.verdict import Verdict, judge
from qlora_pl.planning.memory.memory_plan import COMPONENTS, MemoryPlan
from qlora_pl.planning.memory.training_setting import TrainingSetting
from qlora_pl.planning.reports.alternatives import Alternative, alternatives
from qlora_pl.planning.runs.planned_run import PlannedRun
from qlora_pl.planning.work.cards import Card, card_named
from qlora_pl.planning.work.operations import RunTime


@dataclass(frozen=True, kw_only=True)
class CardResult:
    """What one card makes of a run."""

    card: Card
    setting: TrainingSetting
    plan: MemoryPlan
    verdict: Verdict
    time: RunTime | None


def result_on(run: PlannedRun, card: Card) -> CardResult:
    """Plan a run for a card, and judge the plan."""
    plan = run.plan(card)
    return CardResult(
        card=card, setting=run.on(card), plan=plan, verdict=judge(plan, card), time=run.time(card)
    )


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that is told of a run."""

    run: PlannedRun
    setting: TrainingSetting
    """As it is on the card that was named, or on one that leaves nothing open."""
    plan: MemoryPlan
    chosen: CardResult | None
    """Of the card that was named."""
    cards: tuple[CardResult, ...]
    """Of the cards to be listed."""
    advice: Advice | None
    """Where the run does not fit on the card that was named, or only with paging."""
    alternatives: tuple[Alternative, ...]
    """What the same run would take without QLoRA."""

    @property
    def is_longest(self) -> bool:
        """Whether time is estimated of rows that are all as long as they may be."""
        return self.run.rows is None and self.run.mean_length is None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed, and what ``auto`` comes to, a sentence each."""
        if self.run.auto is None:
            return self.run.notes
        setting = self.setting
        words = in_words(Choice(setting.batch_size, setting.gradient_checkpointing))
        if self.chosen is None:
            auto = f"auto is planned at its least, {words}; --gpu says what a card makes of it."
        else:
            auto = (
                f"auto comes to {words} by this plan, which then fills {USABLE:.0%} of the memory "
                "at most; a real pass has the last word when training starts."
            )
        return (*self.run.notes, auto)

    def in_words(self) -> dict[str, int]:
        """The components by their names in words, for a picture."""
        return {COMPONENTS[name]: size for name, size in self.plan.components.items()}


def make_report(run: PlannedRun, card: Card | None, cards: Sequence[Card]) -> Report:
    """Plan, judge, advise.

    Args:
        run: What is planned.
        card: The one that the user named; None: none.
        cards: To be listed with time and price.
    """
    chosen = None if card is None else result_on(run, card)
    advice = None
    if chosen is not None and chosen.verdict.kind != "fits":
        assert card is not None
        clock = card if card.is_named else card_named("a6000")  # for ratios, any card will do
        advice = advise(run.shape, chosen.setting, card, run.keys, lambda s: run.slowdown(s, clock))
    setting = run.on(card)
    return Report(
        run=run,
        setting=setting,
        plan=run.plan(card),
        chosen=chosen,
        cards=tuple(result_on(run, each) for each in cards),
        advice=advice,
        alternatives=alternatives(run.shape, setting),
    )
