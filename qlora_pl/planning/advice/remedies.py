"""What would make a run fit that does not: every remedy is tried through the plan itself.

A remedy is a change of keys of the training file. Each kind has steps from mild to strong; the
mildest that fits is offered. Where no single kind is enough, the cheapest combinations are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from qlora_pl.planning.advice.levels import Level, Lever
from qlora_pl.planning.advice.levers import levers_of
from qlora_pl.planning.advice.verdict import Verdict, judge
from qlora_pl.planning.memory.memory_plan import MemoryPlan, plan_memory
from qlora_pl.planning.memory.training_setting import TrainingSetting
from qlora_pl.planning.runs.run_keys import RunKeys
from qlora_pl.planning.shapes.model_shape import ModelShape
from qlora_pl.planning.work.cards import Card

MOST_TOGETHER = 5
"""Kinds of changes in one remedy."""
MOST_COMBINATIONS = 3

Slowdown = Callable[[TrainingSetting], float | None]


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """Changes of a training file with which it fits."""

    levels: tuple[Level, ...]
    """One of each kind of change."""
    setting: TrainingSetting
    plan: MemoryPlan
    verdict: Verdict
    slowdown: float | None
    """Time over that of the run as it is, for the same rows; None: not known."""
    is_enough: bool
    """Whether it fits; where the run itself fits with paging, whether it fits without."""

    @property
    def words(self) -> str:
        """What is changed."""
        return ", and ".join(level.words for level in self.levels)

    @property
    def cost(self) -> str:
        """What that costs."""
        costs = "; ".join(dict.fromkeys(level.cost for level in self.levels))
        if self.slowdown is None or abs(self.slowdown - 1) < 0.02:
            return costs
        longer = (
            f"{self.slowdown - 1:.0%} longer"
            if self.slowdown > 1
            else (f"{1 - self.slowdown:.0%} shorter")
        )
        return f"{costs}; about {longer}"

    @property
    def keys(self) -> dict[str, Any]:
        """Dotted keys of the training file and their new values."""
        return {key: value for level in self.levels for key, value in level.keys.items()}

    @property
    def yaml(self) -> str:
        """The lines to change."""
        return yaml_lines(self.keys)

    @property
    def order(self) -> tuple[Any, ...]:
        """By what it costs: the result and devices first, then time."""
        return (
            max(level.price for level in self.levels),
            sum(level.price for level in self.levels),
            self.setting.num_devices,
            len(self.levels),
            self.slowdown or 1.0,
        )


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What would make a run fit."""

    remedies: tuple[Remedy, ...]
    """From the cheapest to the dearest; empty: nothing that is known here."""
    least: Remedy | None = field(default=None)
    """All kinds of changes at their strongest, where not even that fits."""


def advise(
    shape: ModelShape,
    setting: TrainingSetting,
    card: Card,
    keys: RunKeys,
    slowdown: Slowdown = lambda _: None,
) -> Advice:
    """Try every kind of change alone, then several together if none is enough on as many devices.

    Args:
        shape: The model.
        setting: The run that does not fit, or only with paging.
        card: What it is to fit on.
        keys: What its training file says.
        slowdown: Time for the same rows of another setting, over that of the run as it is.
    """
    levers = levers_of(shape, setting, keys)
    pages_already = judge(plan_memory(shape, setting), card).fits

    def attempt(levels: Sequence[Level]) -> Remedy:
        changed = applied(setting, levels)
        plan = plan_memory(shape, changed)
        verdict = judge(plan, card)
        return Remedy(
            levels=tuple(levels),
            setting=changed,
            plan=plan,
            verdict=verdict,
            slowdown=slowdown(changed),
            is_enough=verdict.kind == "fits" if pages_already else verdict.fits,
        )

    found = [remedy for lever in levers if (remedy := _mildest(lever, attempt)) is not None]
    on_one = [lever for lever in levers if not lever.adds_devices]
    if all(remedy.setting.num_devices > setting.num_devices for remedy in found):
        together = sorted(_together(on_one, attempt), key=lambda remedy: remedy.order)
        found += together[:MOST_COMBINATIONS]
    if not found and on_one:
        return Advice(remedies=(), least=attempt([lever.levels[-1] for lever in on_one]))
    return Advice(remedies=tuple(sorted(found, key=lambda remedy: remedy.order)))


def applied(setting: TrainingSetting, levels: Iterable[Level]) -> TrainingSetting:
    """A setting with changes made one after another."""
    for level in levels:
        setting = replace(setting, **level.change(setting))
    return setting


def _mildest(lever: Lever, attempt: Callable[[Sequence[Level]], Remedy]) -> Remedy | None:
    """The first step of one kind that fits."""
    for level in lever.levels:
        if (remedy := attempt([level])).is_enough:
            return remedy
    return None


def _together(
    levers: Sequence[Lever], attempt: Callable[[Sequence[Level]], Remedy]
) -> Iterable[Remedy]:
    """Combinations of the fewest kinds that fit, each eased as far as it still does."""
    for number in range(2, min(MOST_TOGETHER, len(levers)) + 1):
        found = False
        for chosen in combinations(levers, number):
            strongest = [lever.levels[-1] for lever in chosen]
            if not attempt(strongest).is_enough:
                continue
            found = True
            yield attempt(_eased(chosen, strongest, attempt))
        if found:
            return


def _eased(
    levers: Sequence[Lever], levels: list[Level], attempt: Callable[[Sequence[Level]], Remedy]
) -> list[Level]:
    """Milder steps where milder ones do, the dearest kind first."""
    dearest = sorted(range(len(levers)), key=lambda place: -levels[place].price)
    for place in dearest:
        for level in levers[place].levels:
            milder = [*levels[:place], level, *levels[place + 1 :]]
            if attempt(milder).is_enough:
                levels = milder
                break
    return levels


def yaml_lines(keys: dict[str, Any]) -> str:
    """Dotted keys as the lines of a training file, groups nested.

    Args:
        keys: ``{"model.lora.r": 16}``.
    """
    tree: dict[str, Any] = {}
    for key, value in keys.items():
        *groups, last = key.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return "\n".join(_lines(tree, 0))


def _lines(tree: dict[str, Any], depth: int) -> Iterable[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield f"{'  ' * depth}{key}:"
            yield from _lines(value, depth + 1)
        else:
            yield f"{'  ' * depth}{key}: {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)
