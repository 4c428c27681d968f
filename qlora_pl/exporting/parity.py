"""Serving parity: whatever is exported must make the prompts of training, token for token.

"Good in the notebook, garbage elsewhere" is nearly always a prompt that another program makes
otherwise: a second BOS, a space, another template. So every export compares before it is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from qlora_pl.data.conversation import Conversation
from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.served_template import (
    Ids,
    chat_template_ids,
    comparable,
    differences,
    encoder_joints,
)
from qlora_pl.data.encoding.tokenizer import load_tokenizer
from qlora_pl.data.templates.example_conversations import EXAMPLES
from qlora_pl.data.templates.joints import Joints
from qlora_pl.errors import ConfigurationError
from qlora_pl.inference.source import ModelSource
from qlora_pl.modeling.adapter_folder import HELD_OUT

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


def refuse_pairs(source: ModelSource, encoder: Encoder) -> None:
    """Encoder-decoder models are served otherwise.

    Raises:
        ConfigurationError: for one.
    """
    if encoder.is_paired:
        raise ConfigurationError(
            f"--to: '{source.base}' is an encoder-decoder model, which chat servers do not serve; "
            "use it through qlora-pl generate, or merge it."
        )


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
