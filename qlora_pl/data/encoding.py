"""Segments -> token ids and labels, with a count of everything that was cut.

The rendered text is tokenised once, as a whole, and labels come from the characters that each
token covers: pieces tokenised apart would put SentencePiece's leading space into a row's middle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from qlora_pl.batch import IGNORE_INDEX
from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.special_tokens import repair_special_tokens
from qlora_pl.data.templates import PromptTemplate, Segment
from qlora_pl.errors import ConfigurationError

Overlong = Literal["cut", "drop", "error"]
TOKENIZER_CHUNK = 512
"""Rows handed to the tokenizer at a time; batched calls are about 1.5 times faster than single."""


class EncodedExample(NamedTuple):
    """One row, ready to be batched."""

    input_ids: np.ndarray
    """``(T,)`` int32."""
    is_trained: np.ndarray
    """``(T,)`` bool; True where the token is a label."""
    num_cut_tokens: int
    """Tokens that did not fit into ``max_length``."""
    num_lost_tokens: int
    """Those of them that would have been trained."""
    num_answer_tokens: int
    """Tokens of answers that are left; all that is trained, unless prompts are too."""
    ends_in_stop: bool
    """Whether the last of them is one that ends an answer."""
    num_straddling: int
    """Tokens that cover the end of a prompt and the start of its answer at once."""

    @property
    def labels(self) -> np.ndarray:
        """``(T,)`` int64, ``IGNORE_INDEX`` where nothing is trained."""
        return np.where(self.is_trained, self.input_ids, IGNORE_INDEX).astype(np.int64)


def load_tokenizer(name: str, revision: str | None = None, cache_dir: str | None = None) -> Any:
    """A fast tokenizer that has a padding token, without growing its vocabulary.

    Padding reuses a token that exists (attention masks come from lengths, so its id is never seen):
    a new one would need a new row in the embedding, which no adapter saves.

    Raises:
        ConfigurationError: if the folder or Hub name has no fast tokenizer.
    """
    from transformers import AutoTokenizer  # slow to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, cache_dir=cache_dir)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and others
        raise ConfigurationError(
            f"data.tokenizer: no tokenizer could be read from '{name}' "
            f"({(str(error).strip().splitlines() or [type(error).__name__])[0].rstrip('.')})."
        ) from error
    if not tokenizer.is_fast:
        raise ConfigurationError(
            f"data.tokenizer: '{name}' has no fast tokenizer, which labels need (character "
            "offsets); convert it once with transformers and save it."
        )
    repair_special_tokens(tokenizer, load_model_config(name, revision, cache_dir))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def load_model_config(name: str, revision: str | None, cache_dir: str | None) -> Any:
    """The configuration of the model beside a tokenizer; None if there is none."""
    from transformers import AutoConfig  # slow to import

    try:
        return AutoConfig.from_pretrained(name, revision=revision, cache_dir=cache_dir)
    except Exception:  # a tokenizer alone, or a model whose code is not run for this
        return None


class Encoder:
    """Turns rendered rows into ids and labels.

    Args:
        template: Renders the conversations.
        tokenizer: A fast transformers tokenizer.
        max_length: Tokens that a row may have.
        train_on_prompt: Whether prompts are trained too.
    """

    def __init__(
        self,
        template: PromptTemplate,
        tokenizer: Any,
        max_length: int,
        train_on_prompt: bool = False,
    ) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.train_on_prompt = train_on_prompt
        self.stop_ids = stop_token_ids(template, tokenizer)
        # Whether this tokenizer begins every text with its BOS token, as LLaMA's does.
        probe = tokenizer("a")["input_ids"]
        self._adds_bos = tokenizer.bos_token_id is not None and probe[0] == tokenizer.bos_token_id

    def encode(self, conversations: Sequence[Conversation]) -> list[EncodedExample]:
        """Render and encode; rows that are too long are cut on the right."""
        rows = [self.template.render(conversation) for conversation in conversations]
        texts = ["".join(segment.text for segment in row) for row in rows]
        tokens = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        return [
            self._label(row, text, ids, offsets)
            for row, text, ids, offsets in zip(
                rows, texts, tokens["input_ids"], tokens["offset_mapping"], strict=True
            )
        ]

    def encode_prompt(self, conversation: Conversation) -> tuple[str, list[int]]:
        """Text and ids of a prompt, the very ids with which a row of this prompt begins."""
        text = self.template.render_prompt(conversation)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return text, self._bos(text) + ids

    def _bos(self, text: str) -> list[int]:
        # A chat template may have written the token itself; twice would be a different prompt.
        needs_bos = self._adds_bos and not text.startswith(self.tokenizer.bos_token)
        return [self.tokenizer.bos_token_id] if needs_bos else []

    def _label(
        self, row: list[Segment], text: str, ids: list[int], offsets: list[tuple[int, int]]
    ) -> EncodedExample:
        # One flag per character; a token belongs to the segment that holds its last character.
        answer_characters = np.zeros(len(text) + 1, dtype=bool)
        start = 0
        for segment in row:
            end = start + len(segment.text)
            answer_characters[start + 1 : end + 1] = segment.is_trained
            start = end
        spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        is_answer = answer_characters[spans[:, 1]]
        # GPT-NeoX's and RoBERTa's tokenizers trim spaces off a span: a token of spaces has an empty
        # one, at its end, and is trained like any other.
        begins_outside = ~answer_characters[np.minimum(spans[:, 0] + 1, spans[:, 1])]
        bos = self._bos(text)
        input_ids = np.asarray([*bos, *ids], dtype=np.int32)
        is_trained = np.concatenate([np.zeros(len(bos), bool), is_answer | self.train_on_prompt])
        kept_answer = len(bos) + np.flatnonzero(is_answer)
        kept_answer = kept_answer[kept_answer < self.max_length]
        return EncodedExample(
            input_ids[: self.max_length],
            is_trained[: self.max_length],
            num_cut_tokens=max(0, len(input_ids) - self.max_length),
            num_lost_tokens=int(is_trained[self.max_length :].sum()),
            num_answer_tokens=len(kept_answer),
            ends_in_stop=len(kept_answer) > 0 and int(input_ids[kept_answer[-1]]) in self.stop_ids,
            num_straddling=int((is_answer & begins_outside).sum()),
        )


def stop_token_ids(template: PromptTemplate, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer: the end-of-text token, and what the template ends a turn with.

    The second is read off a rendered probe, so that generation stops at the very token that
    training taught (``<|im_end|>`` of a chat template whose end-of-text token is another).
    """
    probe = Conversation((Message("user", "a"), Message("assistant", "b")))
    trained = "".join(segment.text for segment in template.render(probe) if segment.is_trained)
    last = tokenizer(trained, add_special_tokens=False)["input_ids"][-1]
    is_special = last in tokenizer.all_special_ids or (
        last in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[last].special
    )
    return frozenset({tokenizer.eos_token_id, last} if is_special else {tokenizer.eos_token_id})


@dataclass(frozen=True)
class EncodedRows:
    """Many rows in three flat arrays, a few bytes a token, cheap to share with loader workers."""

    input_ids: np.ndarray
    """``(num_tokens,)`` int32, row after row."""
    is_trained: np.ndarray
    """``(num_tokens,)`` bool."""
    starts: np.ndarray
    """``(num_rows + 1,)`` int64; row i is ``[starts[i], starts[i + 1])``."""

    @classmethod
    def from_examples(cls, examples: Iterable[EncodedExample]) -> EncodedRows:
        """Concatenate examples, in order."""
        rows = list(examples)
        lengths = [len(row.input_ids) for row in rows]
        if not rows:
            return cls(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(1, np.int64))
        return cls(
            np.concatenate([row.input_ids for row in rows]),
            np.concatenate([row.is_trained for row in rows]),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """``(input_ids, labels)`` of a row, int64 each."""
        span = slice(self.starts[row], self.starts[row + 1])
        ids = self.input_ids[span].astype(np.int64)
        return ids, np.where(self.is_trained[span], ids, IGNORE_INDEX)

    @property
    def lengths(self) -> np.ndarray:
        """``(num_rows,)`` tokens of each row."""
        return np.diff(self.starts)

    @property
    def num_trained(self) -> np.ndarray:
        """``(num_rows,)`` trained tokens of each row."""
        counts = np.concatenate([[0], np.cumsum(self.is_trained, dtype=np.int64)])
        return np.diff(counts[self.starts])

    def select(self, rows: Sequence[int] | np.ndarray) -> EncodedRows:
        """These rows, in this order."""
        spans = [slice(self.starts[row], self.starts[row + 1]) for row in rows]
        if not spans:
            return EncodedRows.from_examples([])
        starts = np.concatenate([[0], np.cumsum(self.lengths[np.asarray(rows)])]).astype(np.int64)
        return EncodedRows(
            np.concatenate([self.input_ids[span] for span in spans]),
            np.concatenate([self.is_trained[span] for span in spans]),
            starts,
        )

    def fingerprint(self) -> str:
        """SHA-256 of ids, labels and boundaries: what a run trained on, whatever its file name."""
        return self._digest

    @cached_property
    def _digest(self) -> str:  # every save asks for it
        digest = hashlib.sha256()
        for array in (self.input_ids, self.is_trained, self.starts):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()
