"""The chat template that gives other programs the very prompts of training, held against them.

transformers' ``apply_chat_template``, and engines that build on it, add no token of their own to
what a chat template writes; so the template must write the BOS token that training put there.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.templates.chat_template import ChatTemplate
from qlora_pl.data.templates.example_conversations import EXAMPLES
from qlora_pl.data.templates.joints import Joints, find_joints
from qlora_pl.errors import ConfigurationError

logger = logging.getLogger(__name__)

Ids = Callable[[Conversation], list[int]]
"""The ids of a prompt, by one of several ways."""


@dataclass(frozen=True)
class Difference:
    """A conversation whose prompt two ways make otherwise."""

    conversation: str
    """Its name."""
    trained: list[int]
    """Ids of training."""
    served: list[int]
    """Ids of the other way."""

    def text(self, tokenizer: Any, way: str) -> str:
        """Both around the first token that differs, a line each."""
        place = next(
            (n for n, (a, b) in enumerate(zip(self.trained, self.served, strict=False)) if a != b),
            min(len(self.trained), len(self.served)),
        )
        lines = [f"'{self.conversation}' differs from token {place + 1} on:"]
        for name, ids in (("training", self.trained), (way, self.served)):
            some = tokenizer.convert_ids_to_tokens(ids[max(place - 4, 0) : place + 6])
            shown = " ".join(json.dumps(str(token), ensure_ascii=False) for token in some)
            lines.append(f"  {name} ({len(ids)} tokens): ... {shown} ...")
        return "\n".join(lines)


def differences(
    encoder: Encoder, served: Ids, conversations: Mapping[str, Conversation]
) -> Iterator[Difference]:
    """What another way makes otherwise than training.

    Conversations that the template refuses, or that spell a control token, must be left out before.
    """
    for name, conversation in conversations.items():
        trained, theirs = encoder.encode_prompt(conversation)[1], served(conversation)
        if trained != theirs:
            yield Difference(name, trained, theirs)


def comparable(
    encoder: Encoder, conversations: Mapping[str, Conversation]
) -> tuple[dict[str, Conversation], list[str]]:
    """What can be compared; and the names of what spells a control token.

    Such text is text in training, and a control token to engines that tokenise a whole prompt. What
    the template refuses (a system message) is in neither.
    """
    kept: dict[str, Conversation] = {}
    spelling = []
    for name, conversation in conversations.items():
        if encoder.spells_control(conversation):
            spelling.append(name)
            continue
        try:
            encoder.encode_prompt(conversation)
        except ConfigurationError:
            continue
        kept[name] = conversation
    return kept, spelling


def as_dicts(conversation: Conversation) -> list[dict[str, str]]:
    """Messages as programs send them."""
    return [{"role": m.role, "content": m.content} for m in conversation.messages]


def chat_template_ids(tokenizer: Any, source: str | None = None) -> Ids:
    """Prompts by ``apply_chat_template``.

    Args:
        tokenizer: A transformers tokenizer.
        source: Jinja; None: the tokenizer's own.
    """

    def ids(conversation: Conversation) -> list[int]:
        found: list[int] = tokenizer.apply_chat_template(
            as_dicts(conversation),
            chat_template=source,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        return found

    return ids


def encoder_joints(encoder: Encoder) -> Joints:
    """The joints of an encoder's template; a BOS token is in them only if the template wrote it.

    Raises:
        ConfigurationError: one clause about why there are none.
    """

    def render(messages: Sequence[Message], asks: bool) -> str:
        conversation = Conversation(tuple(messages))
        if asks:
            return encoder.encode_prompt(conversation)[0]
        return encoder.template.render_rows([conversation])[0][-1].text

    return find_joints(render)


def served_chat_template(encoder: Encoder) -> str:
    """Jinja that gives the encoder's very ids for every example.

    Raises:
        ConfigurationError: if none was found, with what differs.
    """
    if encoder.is_paired:
        raise ConfigurationError("questions and answers are pairs, which no chat template renders")
    examples, _ = comparable(encoder, EXAMPLES)
    if not examples:
        raise ConfigurationError("the template refuses every example")
    found = None
    for source in _candidates(encoder, examples):
        served = chat_template_ids(encoder.tokenizer, source)
        different = next(differences(encoder, served, examples), None)
        if different is None:
            return source
        found = different
    assert found is not None
    raise ConfigurationError(
        f"no chat template gives the tokens of training: {found.text(encoder.tokenizer, 'served')}"
    )


def _candidates(encoder: Encoder, examples: Mapping[str, Conversation]) -> Iterator[str]:
    text, ids = encoder.encode_prompt(next(iter(examples.values())))
    bos = encoder.tokenizer.bos_token or ""
    adds = bool(bos) and ids[:1] == [encoder.tokenizer.bos_token_id] and not text.startswith(bos)
    # LLaMA's kind puts a space before a text's beginning, but not after a token that is written.
    beginnings = [(bos, False), (bos, True)] if adds else [("", False)]
    if isinstance(encoder.template, ChatTemplate):
        source = encoder.template.definition()["jinja"]
        for token, has_space in beginnings:
            written = f"{token} " if has_space else token
            literal = json.dumps(written, ensure_ascii=False)
            yield f"{{{{- {literal} -}}}}{source}" if written else source
        return
    joints = encoder_joints(encoder)
    for token, has_space in beginnings:
        yield joints.jinja(token, has_space)


def served_tokenizer(encoder: Encoder) -> Any:
    """A copy of the encoder's tokenizer whose chat template gives the prompts of training.

    Without a chat template, and with a warning, where none does: a template of another model would
    be used without a word.
    """
    tokenizer = copy.copy(encoder.tokenizer)
    if encoder.is_paired:
        return tokenizer
    try:
        source: str | None = served_chat_template(encoder)
    except Exception as error:  # a template's code may raise anything, and must not end a run
        logger.warning("The tokenizer is saved without a chat template: %s", error)
        source = None
    others = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else None
    if others is None or source is None:
        tokenizer.chat_template = source
    else:
        tokenizer.chat_template = others | {"default": source}
    return tokenizer
