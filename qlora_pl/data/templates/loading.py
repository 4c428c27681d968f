"""What ``data.template`` says -> the template, bound to a tokenizer.

A name, a file of Jinja, or the template itself, written in the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_pl.data.templates.chat_template import ChatTemplate
from qlora_pl.data.templates.template import PromptTemplate, text_template
from qlora_pl.data.templates.wording import TEXT_TEMPLATES
from qlora_pl.errors import ConfigurationError, did_you_mean

TEMPLATES = ("auto", "chat", *TEXT_TEMPLATES)
JINJA_SUFFIXES = (".jinja", ".jinja2", ".j2")


def load_template(chosen: str | Mapping[str, Any], tokenizer: Any) -> PromptTemplate:
    """The chosen template, bound to the tokenizer that its stop token comes from.

    Args:
        chosen: One of ``TEMPLATES`` (``auto`` takes the tokenizer's chat template where it has one
            and ``instruction-response`` otherwise); a path to a Jinja file; or a mapping, either
            ``{jinja: TEXT}`` or fields of ``TextTemplate``.
        tokenizer: A transformers tokenizer.

    Raises:
        ConfigurationError: for an unknown name, a definition that cannot be, a tokenizer without a
            chat template, or one without an end-of-text token.
    """
    if tokenizer.eos_token is None:
        raise ConfigurationError(
            f"data.tokenizer: '{tokenizer.name_or_path}' has no end-of-text token, so a model "
            "could not learn to stop; set eos_token in its tokenizer_config.json."
        )
    if isinstance(chosen, Mapping):
        return _written(chosen, tokenizer)
    if Path(chosen).suffix in JINJA_SUFFIXES:
        return ChatTemplate(tokenizer, _read(Path(chosen)))
    if chosen not in TEMPLATES:
        raise ConfigurationError(
            f"data.template: no template is called '{chosen}' (known: {', '.join(TEMPLATES)})"
            f"{did_you_mean(chosen, TEMPLATES)}"
        )
    has_chat_template = bool(getattr(tokenizer, "chat_template", None))
    if chosen == "auto":
        chosen = "chat" if has_chat_template else "instruction-response"
    if chosen != "chat":
        return text_template(chosen, TEXT_TEMPLATES[chosen], tokenizer)
    if not has_chat_template:
        raise ConfigurationError(
            f"data.template: the tokenizer '{tokenizer.name_or_path}' has no chat template; choose "
            f"one of {', '.join(TEXT_TEMPLATES)}."
        )
    return ChatTemplate(tokenizer)


def _written(definition: Mapping[str, Any], tokenizer: Any) -> PromptTemplate:
    if "jinja" in definition:
        source = definition["jinja"]
        if not isinstance(source, str) or not source.strip():
            raise ConfigurationError(f"data.template: jinja must be text, got {source!r}.")
        if others := set(definition) - {"jinja", "name"}:
            raise ConfigurationError(
                f"data.template: jinja is the whole template; remove {sorted(others)[0]}."
            )
        return ChatTemplate(tokenizer, source)
    texts = {field: text for field, text in definition.items() if field != "name"}
    return text_template(str(definition.get("name", "custom")), texts, tokenizer)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"data.template: '{path}' cannot be read ({error}); name a file of Jinja."
        ) from error
