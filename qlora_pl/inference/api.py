"""``load_adapter`` and ``generate``: the commands' own engine, for Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_pl.errors import DatasetFormatError
from qlora_pl.inference.answering import Answer, Answerer, TooLong
from qlora_pl.inference.loading import Model, load
from qlora_pl.inference.machine import place_of
from qlora_pl.inference.prompts import Prompt, conversation_of
from qlora_pl.inference.source import BASE, ModelChoice, resolve_source
from qlora_pl.modeling.answers.decoding import DecodingConfig


def load_adapter(
    adapter: str | Path | Mapping[str, str | Path] | None = None, **choice: Any
) -> Model:
    """Load what answers.

    Args:
        adapter: An adapter folder, or a name on the Hub; several by name.
        choice: Fields of ``ModelChoice``: ``model`` for a model without an adapter, ``precision``,
            ``template`` and so on.

    Raises:
        ConfigurationError: if nothing of that name is there, or settings contradict each other.
        AdapterFolderError: if a folder is damaged, or its adapter does not fit the base.
    """
    if isinstance(adapter, Mapping):
        words = tuple(f"{name}={folder}" for name, folder in adapter.items())
    else:
        words = () if adapter is None else (str(adapter),)
    chosen = ModelChoice(adapter=words, **choice)
    source = resolve_source(chosen)
    return load(source, place_of(chosen), chosen.cache_dir, chosen.trust_remote_code)


def generate(
    model: Model,
    prompts: str | Sequence[str | Mapping[str, Any]],
    *,
    adapter: str | None = None,
    batch_size: int = 8,
    raw: bool = False,
    system: str | None = None,
    **decoding: Any,
) -> list[Answer]:
    """Answer prompts, in their order.

    Args:
        model: From ``load_adapter``.
        prompts: Questions, or mappings such as the rows of a file of prompts.
        adapter: Which answers; None: the first, or the base where there is none; ``base``.
        batch_size: Prompts at a time.
        raw: Whether prompts are read as they are, without the template.
        system: A system message for those that have none.
        decoding: Fields of ``DecodingConfig``.

    Raises:
        ConfigurationError: for a setting that cannot be.
        DatasetFormatError: for a prompt that cannot be read, or leaves no room for an answer.
    """
    config = DecodingConfig(**decoding)
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    asked = [_prompt(number, one, system) for number, one in enumerate(given)]
    name = adapter or next(iter(model.adapters), BASE)
    answers: list[Answer] = []
    for answer in Answerer(model, config, batch_size, raw).answers(asked, [name]):
        if isinstance(answer, TooLong):
            raise DatasetFormatError(answer.sentence)
        answers.append(answer)
    return answers


def _prompt(number: int, given: str | Mapping[str, Any], system: str | None) -> Prompt:
    where = f"prompt {number}"
    problem, conversation = conversation_of(given, system)
    if conversation is None:
        raise DatasetFormatError(f"{where}: {problem}.")
    return Prompt(number, conversation, given if isinstance(given, Mapping) else {}, where)
