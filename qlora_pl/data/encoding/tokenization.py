"""Text -> token ids that know their characters; a row's own text never makes a control token.

A row whose own text spells a control token ("</s>") is cut at the template's control tokens, and
what lies between them is tokenised as ordinary text; every other row goes through in one pass.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from qlora_pl.data.conversation import Conversation
from qlora_pl.data.templates.template import Rendering, Segment, control_pattern, control_tokens

NO_TEXT = "\U0010ffff"
"""A code point that no text holds."""


class Tokens(Protocol):
    """The tokens of a text."""

    @property
    def ids(self) -> Sequence[int]:
        """All of them."""

    def token_at(self, character: int) -> int:
        """The first token that reaches beyond the beginning of this character."""

    def begins_before(self, token: int, character: int) -> bool:
        """Whether a token covers characters before this one."""

    def spans(self) -> list[tuple[int, int]]:
        """First character and end of each token; tokens that share a character all cover it."""


class WholeText:
    """A text that was tokenised in one pass.

    Args:
        encoding: Of the tokenizers library.
        text: What was encoded.
        swallowing: Control tokens that cover the spaces after them too, by id.
    """

    def __init__(self, encoding: Any, text: str, swallowing: Mapping[int, str]) -> None:
        self._encoding = encoding
        self._text = text
        self._swallowing = swallowing
        self.ids: list[int] = encoding.ids

    def token_at(self, character: int) -> int:
        """See ``Tokens``; spaces that a control token swallows count to what follows it."""
        token: int | None = self._encoding.char_to_token(character)
        if token is not None:
            name = self._swallowing.get(self.ids[token])
            return token + (name is not None and character >= self._end_of(name, token))
        # A character that no token covers: some normalisers leave characters out.
        ends = (end for _, end in self._encoding.offsets)
        return next((place for place, end in enumerate(ends) if end > character), len(self.ids))

    def _end_of(self, name: str, token: int) -> int:
        start, end = self._encoding.token_to_chars(token)
        own = self._text.find(name, start, end)
        return int(end if own < 0 else own + len(name))  # not found where a normaliser changed it

    def begins_before(self, token: int, character: int) -> bool:
        """See ``Tokens``."""
        span = self._encoding.token_to_chars(token)
        return span is not None and span[0] < character

    def spans(self) -> list[tuple[int, int]]:
        """See ``Tokens``."""
        return list(self._encoding.offsets)


class PiecedText:
    """A text that was tokenised in pieces, one after another."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._starts: list[int] = []
        self._pieces: list[tuple[int, WholeText | int]] = []
        self._spans: list[tuple[int, int]] = []

    def append_text(self, start: int, text: WholeText) -> None:
        """Add ordinary text that begins at this character."""
        self._starts.append(start)
        self._pieces.append((len(self.ids), text))
        self._spans += [(start + a, start + b) for a, b in text.spans()]
        self.ids.extend(text.ids)

    def append_control(self, start: int, token: int, length: int) -> None:
        """Add a control token of so many characters."""
        self._starts.append(start)
        self._pieces.append((len(self.ids), length))
        self._spans.append((start, start + length))
        self.ids.append(token)

    def token_at(self, character: int) -> int:
        """See ``Tokens``."""
        place = bisect_right(self._starts, character) - 1
        if place < 0:
            return 0
        first, text = self._pieces[place]
        if isinstance(text, int):  # and spaces that it swallows count to what follows it
            return first + (character >= self._starts[place] + text)
        return first + text.token_at(character - self._starts[place])

    def begins_before(self, token: int, character: int) -> bool:
        """See ``Tokens``."""
        place = bisect_right(self._starts, character) - 1
        first, text = self._pieces[max(place, 0)]
        if isinstance(text, int):
            return token == first and character > self._starts[place]
        if token < first or token >= first + len(text.ids):
            return False
        return text.begins_before(token - first, character - self._starts[place])

    def spans(self) -> list[tuple[int, int]]:
        """See ``Tokens``."""
        return self._spans


class TextTokenizer:
    """Tokenises renderings.

    Args:
        tokenizer: A fast transformers tokenizer; a copy of its backend is used.
        stop: The template's stop token.
    """

    def __init__(self, tokenizer: Any, stop: str) -> None:
        self._control = control_tokens(tokenizer, stop)
        names = list(self._control)
        self.control_pattern = control_pattern(names)
        self._firsts = {name[0] for name in names}
        self._ids = {name: tokenizer.convert_tokens_to_ids(name) for name in names}
        self._swallowing = {self._ids[n]: n for n in names if self._control[n].rstrip}
        self._source = tokenizer.backend_tokenizer.to_str()

    @cached_property
    def _backend(self) -> Any:
        from tokenizers import Tokenizer  # slow to import

        backend = Tokenizer.from_str(self._source)
        # It would trim spaces off the characters that a token covers, as GPT-NeoX's does.
        backend.post_processor = None
        backend.no_padding()
        backend.no_truncation()
        return backend

    @cached_property
    def _plain_backend(self) -> Any:
        """For the beginning of a text: control tokens are ordinary text."""
        return self._without_control(json.loads(self._source))

    @cached_property
    def _later_backend(self) -> Any:
        """The same for what follows a control token."""
        source = json.loads(self._source)
        for part in _pre_tokenizers(source.get("pre_tokenizer")):
            if part.get("prepend_scheme") == "first":
                part["prepend_scheme"] = "never"
        return self._without_control(source)

    def _without_control(self, source: dict[str, Any]) -> Any:
        from tokenizers import Tokenizer  # slow to import

        for token in source.get("added_tokens", []):
            token["special"] = token["special"] or token["content"] in self._control
        if source["model"].get("type") == "Unigram":  # T5's: its control tokens are pieces of it
            for place, piece in enumerate(source["model"]["vocab"]):
                if piece[0] in self._control:
                    piece[0] = f"{NO_TEXT}{place}"
        backend = Tokenizer.from_str(json.dumps(source))
        backend.post_processor = None
        backend.encode_special_tokens = True
        return backend

    def spells_control(self, conversation: Conversation) -> bool:
        """Whether a message's own text spells a control token."""
        return any(
            self._spells(message.content) or self._spells(message.context)
            for message in conversation.messages
        )

    def _spells(self, text: str) -> bool:
        if self.control_pattern is None or not any(first in text for first in self._firsts):
            return False
        return self.control_pattern.search(text) is not None

    def encode(self, renderings: Sequence[Rendering], spells: Sequence[bool]) -> list[Tokens]:
        """Tokenise rows, those that spell a control token in pieces.

        Args:
            renderings: Rows; those that spell one must mark their content.
            spells: For each, whether it does.
        """
        texts = [r.text for r, apart in zip(renderings, spells, strict=True) if not apart]
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        whole = iter(zip(encodings, texts, strict=True))
        tokens: list[Tokens] = [
            self._in_pieces(rendering.segments)
            if apart
            else WholeText(*next(whole), self._swallowing)
            for rendering, apart in zip(renderings, spells, strict=True)
        ]
        return tokens

    def _in_pieces(self, segments: Sequence[Segment]) -> PiecedText:
        tokens = PiecedText()
        start = 0  # of the stretch of ordinary text that is being collected
        stretch = ""
        swallows = False  # whether the control token before it takes the spaces after it
        for text, is_control in [*self._stretches(segments), ("", True)]:
            if not is_control:
                stretch += text
                continue
            entry = self._control.get(text)
            shown = stretch.rstrip() if entry is not None and entry.lstrip else stretch
            num_swallowed = len(shown) - len(shown.lstrip()) if swallows else 0
            self._append_text(tokens, start + num_swallowed, shown[num_swallowed:])
            start += len(stretch)
            if entry is not None:
                tokens.append_control(start, self._ids[text], len(text))
                swallows = entry.rstrip
            start += len(text)
            stretch = ""
        return tokens

    def _append_text(self, tokens: PiecedText, start: int, text: str) -> None:
        if not text:
            return
        backend = self._later_backend if tokens.ids else self._plain_backend
        tokens.append_text(
            start, WholeText(backend.encode(text, add_special_tokens=False), text, {})
        )

    def _stretches(self, segments: Sequence[Segment]) -> Iterator[tuple[str, bool]]:
        """Ordinary text and the template's control tokens, in order."""
        assert self.control_pattern is not None
        for segment in segments:
            if segment.is_content:
                yield segment.text, False
                continue
            start = 0
            for found in self.control_pattern.finditer(segment.text):
                yield segment.text[start : found.start()], False
                yield found.group(), True
                start = found.end()
            yield segment.text[start:], False


def _pre_tokenizers(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        yield part
        for inner in part.get("pretokenizers", []):
            yield from _pre_tokenizers(inner)
