"""What the controls of the page say -> who answers, and how answers are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qlora_pl.errors import ConfigurationError
from qlora_pl.inference.source import BASE
from qlora_pl.modeling.answers.decoding import DecodingConfig

Who = Literal["on", "off", "side by side"]
WHO: tuple[Who, ...] = ("on", "off", "side by side")
"""What can be done with an adapter."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Where the controls of decoding stand."""

    do_sample: bool
    temperature: float
    top_p: float
    top_k: float
    repetition_penalty: float
    max_new_tokens: float

    def config(self, given: DecodingConfig) -> DecodingConfig:
        """What they say together with what was given in the command.

        Greedy answers have no temperature, so that what is set for others does not matter.

        Raises:
            ConfigurationError: naming a control that says what cannot be.
        """
        if empty := [name for name, value in vars(self).items() if value is None]:
            raise ConfigurationError(f"decoding.{empty[0]}: is empty; give a number.")
        drawn = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "typical_p": 1.0}
        if self.do_sample:
            drawn = {
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": int(self.top_k),
                "typical_p": given.typical_p,
            }
        max_new_tokens = int(self.max_new_tokens)
        return replace(
            given,
            do_sample=self.do_sample,
            repetition_penalty=self.repetition_penalty,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min(given.min_new_tokens, max_new_tokens),
            **drawn,  # type: ignore[arg-type]
        )


def names_of(adapters: Sequence[str], who: Who, adapter: str | None, beside: str) -> list[str]:
    """Who answers.

    Args:
        adapters: Names of all.
        who: What is done with one.
        adapter: Which; None: the first.
        beside: Who answers beside it.
    """
    if not adapters or who == "off":
        return [BASE]
    first = adapter or adapters[0]
    return [first] if who == "on" or beside == first else [first, beside]
