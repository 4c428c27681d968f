"""How a model's answers are drawn and where they end, as its folder says, for engines to be told.

Engines have defaults of their own (a temperature of 0.8, a penalty of 1.1), which would be used
without a word.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.tokenizer import load_model_config
from qlora_pl.errors import ConfigurationError
from qlora_pl.inference.source import ModelSource
from qlora_pl.modeling.answers.decoding import DecodingConfig

logger = logging.getLogger(__name__)

CONTEXT = 4096
"""Tokens that an engine is to hold, where training rows were shorter; memory grows with it."""


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """What an engine is told beside the template."""

    decoding: DecodingConfig
    """The run's ``model.decoding``, or what ``generate`` does without a word."""
    stop_ids: tuple[int, ...]
    """Tokens that end an answer."""
    stop_tokens: tuple[str, ...]
    """The same as text."""
    context: int
    """Tokens of prompt and answer: the training rows' limit or ``CONTEXT``, if the base has it."""

    @property
    def temperature(self) -> float:
        """0 where the likeliest token is taken each time."""
        return self.decoding.temperature if self.decoding.do_sample else 0.0

    def generation_config(self) -> dict[str, Any]:
        """``generation_config.json``, as transformers and vLLM read it."""
        chosen = self.decoding
        settings: dict[str, Any] = {
            "eos_token_id": list(self.stop_ids),
            "max_new_tokens": chosen.max_new_tokens,
            "temperature": self.temperature,
            "repetition_penalty": chosen.repetition_penalty,
        }
        if chosen.do_sample:
            settings |= {"do_sample": True, "top_p": chosen.top_p, "top_k": chosen.top_k}
        return settings

    def left_out(self, known: Sequence[str]) -> list[str]:
        """Settings of the run that an engine has no word for, by name.

        Args:
            known: Fields of ``DecodingConfig`` that it is told.
        """
        default = asdict(DecodingConfig())
        never = {"do_sample", "seed", "use_cache", *known}
        return [
            name
            for name, value in asdict(self.decoding).items()
            if value != default[name] and name not in never
        ]


def answer_settings(source: ModelSource, encoder: Encoder) -> AnswerSettings:
    """What the folder says.

    Raises:
        ConfigurationError: if its run.yaml cannot be read.
    """
    stop_ids = sorted(source.manifest.stop_token_ids if source.manifest else encoder.stop_ids)
    tokens = encoder.tokenizer.convert_ids_to_tokens(stop_ids)
    config = load_model_config(source.base, source.revision)
    limit = getattr(config and config.get_text_config(), "max_position_embeddings", None)
    wanted = max(CONTEXT, source.manifest.max_length if source.manifest else 0)
    return AnswerSettings(
        decoding=_decoding(source),
        stop_ids=tuple(stop_ids),
        stop_tokens=tuple(tokens),
        context=min(wanted, limit or wanted),
    )


def _decoding(source: ModelSource) -> DecodingConfig:
    import yaml  # slow to import

    folder = next(iter(source.adapters.values()), Path(source.base))
    path = folder / "run.yaml"
    if not path.is_file():
        return DecodingConfig()
    try:
        run = yaml.safe_load(path.read_text(encoding="utf-8"))
        said = ((run or {}).get("model") or {}).get("decoding") or {}
        known = {one.name for one in fields(DecodingConfig)}
        values = {name: value for name, value in said.items() if name in known}
        return DecodingConfig(**values | {"stop": tuple(values.get("stop") or ())})
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise ConfigurationError(
            f"'{path}' cannot be read ({' '.join(str(error).split())}); take it from a whole copy "
            "of the folder."
        ) from error
