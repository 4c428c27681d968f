"""Serving parity: whatever is exported must make the prompts of training, token for token.

"Good in the notebook, garbage elsewhere" is nearly always a prompt that another program makes
otherwise: a second BOS, a space, another template. So every export compares before it is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from qlora_pl.data.conversation import Conversation
from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.served_template import (
    Ids,
    as_dicts,
    chat_template_ids,
    comparable,
    differences,
    encoder_joints,
)
from qlora_pl.data.encoding.tokenizer import load_tokenizer
from qlora_pl.data.templates.chat_template import ChatTemplate
from qlora_pl.data.templates.example_conversations import EXAMPLES
from qlora_pl.data.templates.joints import Joints
from qlora_pl.errors import ConfigurationError
from qlora_pl.inference.loading import load_encoder
from qlora_pl.inference.source import ModelChoice, ModelSource
from qlora_pl.modeling.base.identity import locate_base
from qlora_pl.modeling.folders.adapter_folder import HELD_OUT

SHOWN = 3
"""Differences that are shown, at most."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """What was compared, and came out alike."""

    ways: tuple[str, ...]
    """How prompts were made, besides training's own way."""
    num_examples: int
    num_rows: int
    """Held-out rows of the adapter folder, as far as they could be read back into messages."""
    num_unread_rows: int
    """Others: cut ones, say, or instructions with an input."""
    spelling: tuple[str, ...]
    """Conversations that spell a control token."""

    def in_words(self) -> str:
        """A paragraph."""
        text = (
            f"Prompts are those of training, token for token, by {_listed(self.ways)}: "
            f"{self.num_examples} conversations of all kinds"
        )
        if self.num_rows:
            text += f" and {self.num_rows} held-out rows"
        text += "."
        if self.num_unread_rows:
            text += (
                f" {self.num_unread_rows} held-out rows could not be read back into messages, and "
                "were left out."
            )
        if self.spelling:
            text += (
                f" {len(self.spelling)} conversations spell a control token and were left out: in "
                "training it was text, and engines that tokenise a whole prompt, as llama.cpp "
                "does, read it as the control token."
            )
        return text


def check_parity(encoder: Encoder, ways: Mapping[str, Ids], folder: Path | None = None) -> Parity:
    """Compare every way to make prompts with training's own.

    Args:
        encoder: Training's.
        ways: What an engine would be given, by its name in messages.
        folder: Of the adapter, whose held-out rows are compared as well.

    Raises:
        ConfigurationError: if a prompt differs, with the tokens around the place.
    """
    rows, num_unread = held_out_conversations(encoder, folder)
    examples, spelling = comparable(encoder, EXAMPLES)
    kept_rows, spelling_rows = comparable(encoder, rows)
    for way, ids in ways.items():
        found = list(differences(encoder, ids, examples | kept_rows))
        if found:
            shown = "\n".join(one.text(encoder.tokenizer, way) for one in found[:SHOWN])
            raise ConfigurationError(
                f"{way} makes other prompts than training did, {len(found)} of "
                f"{len(examples) + len(kept_rows)}, so nothing was written:\n{shown}"
            )
    return Parity(
        ways=tuple(ways),
        num_examples=len(examples),
        num_rows=len(kept_rows),
        num_unread_rows=num_unread,
        spelling=(*spelling, *spelling_rows),
    )


def tokenizer_folder_ids(folder: Path) -> Ids:
    """Prompts by ``apply_chat_template`` of a tokenizer as it lies in a folder.

    Raises:
        ConfigurationError: if it has no chat template.
    """
    tokenizer = load_tokenizer(str(folder))
    if not tokenizer.chat_template:
        raise ConfigurationError(
            "No chat template gives the prompts of training, so that no engine that renders one "
            "can serve this model; see the warning above."
        )
    return chat_template_ids(tokenizer)


def puts_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer begins every text with BOS, and so llama.cpp, which is told by its file.

    Of two, one written and one put there, llama.cpp warns at most.
    """
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def less_bos(joints: Joints, tokenizer: Any) -> Joints:
    """What is left to write for an engine that puts BOS first where the tokenizer does."""
    if not puts_bos(tokenizer):
        return joints
    bos = tokenizer.bos_token
    system = None if joints.system is None else joints.system.removeprefix(bos)
    return replace(joints, opening=joints.opening.removeprefix(bos), system=system)


def llama_cpp_template(encoder: Encoder) -> str:
    """Jinja for llama.cpp, which puts BOS first itself and removes one that a template wrote.

    Raises:
        ConfigurationError: if the template is no text between messages.
    """
    if isinstance(encoder.template, ChatTemplate):
        return encoder.template.definition()["jinja"]
    try:
        return less_bos(encoder_joints(encoder), encoder.tokenizer).jinja()
    except ConfigurationError as error:
        raise ConfigurationError(
            f"data.template: '{encoder.template.name}' cannot be written in Jinja: it {error}."
        ) from error


def llama_cpp_ids(tokenizer: Any, source: str) -> Ids:
    """Prompts as llama.cpp's server makes them of Jinja, with the tokenizer in its place."""
    beginning = tokenizer.bos_token if puts_bos(tokenizer) else ""

    def ids(conversation: Conversation) -> list[int]:
        text: str = tokenizer.apply_chat_template(
            as_dicts(conversation),
            chat_template=source,
            add_generation_prompt=True,
            tokenize=False,
        )
        found: list[int] = tokenizer(text.removeprefix(beginning))["input_ids"]
        return found

    return ids


def text_ids(tokenizer: Any, joints: Joints) -> Ids:
    """Prompts of an engine that renders text and has it tokenised whole, BOS included.

    Args:
        tokenizer: Puts a BOS token first where the engine's would.
        joints: Of the engine's template.
    """

    def ids(conversation: Conversation) -> list[int]:
        found: list[int] = tokenizer(joints.render(conversation.messages, asks=True))["input_ids"]
        return found

    return ids


def served_encoder(source: ModelSource, choice: ModelChoice) -> Encoder:
    """What makes prompts as in training, of a model that chat servers can serve.

    Raises:
        ConfigurationError: if the base is not there, or is an encoder-decoder model.
    """
    locate_base(source.base, source.revision, choice.cache_dir)
    encoder = load_encoder(source, choice.cache_dir)
    if encoder.is_paired:
        raise ConfigurationError(
            f"--to: '{source.base}' is an encoder-decoder model, which chat servers do not serve; "
            "use it through qlora-pl generate, or merge it."
        )
    return encoder


def held_out_conversations(
    encoder: Encoder, folder: Path | None
) -> tuple[dict[str, Conversation], int]:
    """The held-out rows of an adapter folder as conversations; and how many are none.

    They lie there as tokens. A row counts if the prompt of what is read from it has its very ids.
    """
    from safetensors.numpy import load_file

    if folder is None or not (folder / HELD_OUT).is_file():
        return {}, 0
    arrays = load_file(folder / HELD_OUT)
    rows = [arrays["input_ids"][a:b].tolist() for a, b in pairwise(arrays["starts"])]
    try:
        joints = encoder_joints(encoder)
    except ConfigurationError:
        return {}, len(rows)
    found = {}
    for number, ids in enumerate(rows, start=1):
        conversation = _read(encoder, joints, ids)
        if conversation is not None:
            found[f"held-out row {number}"] = conversation
    return found, len(rows) - len(found)


def _read(encoder: Encoder, joints: Joints, ids: list[int]) -> Conversation | None:
    text = encoder.tokenizer.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    without_bos = text.removeprefix(encoder.tokenizer.bos_token or "")
    for candidate in (text, without_bos, without_bos.removeprefix(" ")):
        messages = joints.read(candidate)
        if messages is None:
            continue
        conversation = Conversation(tuple(messages)).prompt
        prompt = encoder.encode_prompt(conversation)[1]
        if prompt == ids[: len(prompt)]:
            return conversation
    return None


def _listed(names: tuple[str, ...]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
