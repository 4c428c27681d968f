"""``DecodingConfig``: how answers are drawn; the original's options, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from qlora_pl.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How answers are drawn."""

    max_new_tokens: int = 256
    """Tokens of an answer at most; the original's default is 256."""
    min_new_tokens: int = 0
    """Tokens before which an answer does not end; 0: it may be empty."""
    max_length: int | None = None
    """Tokens of a prompt and its answer together, at most; None: what the model can read."""
    do_sample: bool = False
    """Whether answers are drawn at random. False: the likeliest token each time; ``temperature``,
    ``top_p``, ``top_k`` and ``typical_p`` then have no effect."""
    seed: int = 0
    """Of what is drawn at random. Every prompt has a generator of its own, of this seed and its
    row's number, so that an answer does not depend on the batch it is in."""
    temperature: float = 1.0
    """Divides the logits before sampling; the paper's evaluations used 0.7."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this share; the paper's evaluations used 0.9."""
    top_k: int = 0
    """Sample from so many likeliest tokens; 0: from all."""
    typical_p: float = 1.0
    """Sample from the tokens whose surprise is nearest to the expected one and that hold this share
    (Meister et al. 2022, arXiv:2202.00666); 1.0: from all."""
    num_beams: int = 1
    """Beginnings of an answer that are followed at a time; 1: no beam search."""
    early_stopping: bool | Literal["never"] = False
    """When a beam search ends: true, at ``num_beams`` finished answers; false, when better ones
    are unlikely; never, when there can be no better one."""
    length_penalty: float = 1.0
    """Power of an answer's length by which its score is divided in a beam search; above 0 favours
    longer ones."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that were there already, prompt included (Keskar et al. 2019,
    arXiv:1909.05858); 1.0: none."""
    no_repeat_ngram_size: int = 0
    """Runs of so many tokens occur once, prompt included; 0: as often as they like."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, and are no part of it."""
    use_cache: bool = True
    """Whether keys and values of earlier tokens are kept; without them each token costs a forward
    over the whole text."""

    def __post_init__(self) -> None:
        if problems := [f"decoding.{sentence}." for holds, sentence in self._checks() if not holds]:
            raise ConfigurationError(problems)
        for name in ("temperature", "top_p", "typical_p", "length_penalty", "repetition_penalty"):
            object.__setattr__(self, name, float(getattr(self, name)))  # transformers refuses 2

    def _checks(self) -> list[tuple[bool, str]]:
        """Whether each rule holds, and what to say if not."""
        bounds: list[tuple[str, bool, str]] = [
            ("max_new_tokens", self.max_new_tokens >= 1, "be at least 1"),
            ("min_new_tokens", self.min_new_tokens >= 0, "be 0 or more"),
            ("max_length", self.max_length is None or self.max_length >= 1, "be at least 1"),
            ("temperature", self.temperature > 0, "be above 0"),
            ("top_p", 0 < self.top_p <= 1, "lie above 0, up to 1"),
            ("typical_p", 0 < self.typical_p <= 1, "lie above 0, up to 1"),
            ("top_k", self.top_k >= 0, "be 0 or more"),
            ("num_beams", self.num_beams >= 1, "be at least 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "be above 0"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "be 0 or more"),
            ("seed", self.seed >= 0, "be 0 or more"),
        ]
        checks = [
            (holds, f"{name}: must {rule}, got {getattr(self, name)}")
            for name, holds, rule in bounds
        ]
        drawn = (self.temperature, self.top_p, self.top_k, self.typical_p)
        beams = (self.early_stopping, self.length_penalty)
        return [
            *checks,
            (
                self.min_new_tokens <= self.max_new_tokens,
                f"min_new_tokens: {self.min_new_tokens} is above max_new_tokens "
                f"({self.max_new_tokens}); lower it",
            ),
            (
                self.do_sample or drawn == (1.0, 1.0, 0, 1.0),
                "temperature, top_p, top_k and typical_p have no effect with do_sample: false; "
                "set it to true",
            ),
            (
                self.num_beams > 1 or beams == (False, 1.0),
                "early_stopping and length_penalty have no effect without num_beams above 1; set "
                "it, or leave them out",
            ),
            (all(self.stop), "stop: an empty text would end every answer; leave it out"),
        ]

    @property
    def draws_rows_apart(self) -> bool:
        """Whether each row's tokens are drawn by a generator of its own."""
        return self.do_sample and self.num_beams == 1

    def for_transformers(self) -> dict[str, Any]:
        """What transformers does of it, as keyword arguments of ``generate``.

        The rest is done by ``RowLogits`` and ``RowLimits``, which know a row's padding and seed.
        """
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens or None,
            "do_sample": self.do_sample and not self.draws_rows_apart,
            "use_cache": self.use_cache,
        }
        if self.num_beams > 1:
            arguments |= {
                "num_beams": self.num_beams,
                "early_stopping": self.early_stopping,
                "length_penalty": self.length_penalty,
            }
        if arguments["do_sample"]:
            arguments |= {
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,  # 0, not None, which transformers would read as its 50
                "typical_p": self.typical_p,
            }
        return arguments
