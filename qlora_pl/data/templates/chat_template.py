"""The template that a tokenizer brings along, in Jinja; spans are told by rendering.

Each answer's span comes from rendering the conversation up to it, with and without it. Where later
turns change how earlier ones look (templates of reasoning models do), every answer becomes a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.templates.template import (
    PromptTemplate,
    Rendering,
    Segment,
    control_pattern,
    control_tokens,
)
from qlora_pl.errors import ConfigurationError

Messages = Sequence[Message]
CLOCK = "strftime_now"
"""What a template calls to write today's date into every prompt."""


class ChatTemplate(PromptTemplate):
    """Renders with ``apply_chat_template``.

    Args:
        tokenizer: A transformers tokenizer.
        source: Jinja text; None: the tokenizer's own template.
    """

    name = "chat"

    def __init__(self, tokenizer: Any, source: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._source = source or tokenizer.get_chat_template()
        self._compiled = _compile(self._source)
        self._tokens = dict(tokenizer.special_tokens_map)
        self.stop = self._stop()
        self._control = control_pattern(control_tokens(tokenizer, self.stop))

    def definition(self) -> dict[str, str]:
        """See ``PromptTemplate``."""
        return {"name": self.name, "jinja": self._source}

    def _stop(self) -> str:
        """What the template ends an answer with: the last special token it writes after one."""
        probe = (Message("user", "a"), Message("assistant", "b"))
        asked, answered = self._texts([probe[:1]], True)[0], self._texts([probe], False)[0]
        written = answered[len(asked) :] if answered.startswith(asked) else answered
        token = self._tokenizer.tokenize(written.rstrip())[-1:]
        return token[0] if token and token[0] in self._tokenizer.get_added_vocab() else ""

    # -- rendering -------------------------------------------------------------------------------

    def render_rows(
        self,
        conversations: Sequence[Conversation],
        only_last: bool = False,
        marks_content: bool = False,
    ) -> list[list[Rendering]]:
        """See ``PromptTemplate``.

        Raises:
            ConfigurationError: if the template refuses a conversation, drops or rewrites a message,
                or renders an answer differently from its prompt.
        """
        prefixes = [_answers(c.messages, only_last) for c in conversations]
        flat = [
            c.messages[:place]
            for c, places in zip(conversations, prefixes, strict=True)
            for place in places
        ]
        whole = [
            c.messages[: place + 1]
            for c, places in zip(conversations, prefixes, strict=True)
            for place in places
        ]
        pairs = zip(self._texts(flat, True), self._texts(whole, False), strict=True)
        rows = []
        for conversation, places in zip(conversations, prefixes, strict=True):
            turns = [_Turn(place, *next(pairs)) for place in places]
            rows.append(self._rows(conversation.messages, turns, marks_content))
        return rows

    def _rows(
        self, messages: Messages, turns: Sequence[_Turn], marks_content: bool
    ) -> list[Rendering]:
        for turn in turns:
            if not turn.answered.startswith(turn.asked):
                raise ConfigurationError(
                    "data.template: the tokenizer's chat template renders an answer differently "
                    f"from its prompt (message {turn.place + 1}), so its trained tokens cannot be "
                    "told; choose another template."
                )
        is_one_row = all(
            later.asked.startswith(earlier.answered) for earlier, later in pairwise(turns)
        )
        groups = [turns] if is_one_row else [[turn] for turn in turns]
        return [self._row(messages, group, marks_content) for group in groups]

    def _row(self, messages: Messages, turns: Sequence[_Turn], marks_content: bool) -> Rendering:
        last = turns[-1]
        seen = messages[: last.place + 1]
        num_trimmed = _check_contents(last.answered, seen, may_shorten_answers=len(turns) == 1)
        segments: list[Segment] = []
        done = 0
        for turn in turns:
            end = len(turn.answered)
            answer = turn.answered[len(turn.asked) : end].rstrip()
            segments.append(Segment(turn.asked[done:]))
            segments.append(Segment(answer, True, turn.place))
            # What follows the stop token is never generated.
            segments.append(Segment(turn.answered[len(turn.asked) + len(answer) :]))
            done = end
        if marks_content:
            segments = self._mark_content(segments, last.answered, seen, asks=False)
        return Rendering([segment for segment in segments if segment.text], num_trimmed)

    def render_prompt(self, conversation: Conversation, marks_content: bool = False) -> Rendering:
        """See ``PromptTemplate``."""
        text = self._texts([conversation.messages], True)[0]
        segments = [Segment(text)]
        if marks_content:
            segments = self._mark_content(segments, text, conversation.messages, asks=True)
        return Rendering(segments)

    def _texts(self, conversations: Sequence[Messages], asks: bool) -> list[str]:
        turns = [[{"role": m.role, "content": _said(m)} for m in c] for c in conversations]
        if not turns:
            return []
        try:
            if self._compiled is None:
                texts: list[str] = self._tokenizer.apply_chat_template(
                    turns, chat_template=self._source, tokenize=False, add_generation_prompt=asks
                )
                return texts
            given = {"tools": None, "documents": None, "add_generation_prompt": asks}
            given |= self._tokens
            return [self._compiled.render({"messages": some, **given}) for some in turns]
        except Exception as error:  # whatever the template raises: a role that it does not know
            raise ConfigurationError(
                "data.template: the tokenizer's chat template refuses this conversation "
                f"({error}); choose another template."
            ) from error

    # -- the row's text and the template's ---------------------------------------------------------

    def _mark_content(
        self, segments: list[Segment], text: str, messages: Messages, asks: bool
    ) -> list[Segment]:
        """Cut segments where a system message or a control token of the row begins and ends.

        The messages are rendered once more with characters around these that occur nowhere else;
        without them the text must be the same as before. They lie close around what they mark,
        since templates trim messages and cut thoughts off.
        """
        unused = [chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text]
        pairs = list(zip(unused[::2], unused[1::2], strict=False))[: len(messages)]
        edges = None
        if len(pairs) == len(messages):
            marked = [self._marked(m, *pair) for m, pair in zip(messages, pairs, strict=True)]
            edges, without = _edges(self._texts([marked], asks)[0], pairs)
        if edges is None or without != text:
            raise ConfigurationError(
                "data.template: the tokenizer's chat template rewrites its messages, so that "
                "control tokens written inside one cannot be told from its own; remove them from "
                "the row."
            )
        return _cut(segments, edges)

    def _marked(self, message: Message, first: str, last: str) -> Message:
        said = _said(message)
        if message.role == "system":
            bare = said.strip()  # an empty one stays empty: templates ask whether there is one
            said = said.replace(bare, f"{first}{bare}{last}", 1) if bare else said
        elif self._control is not None:
            said = self._control.sub(lambda found: f"{first}{found.group()}{last}", said)
        return Message(message.role, said)


def _compile(source: str) -> Any:
    """What ``apply_chat_template`` renders with; None: it cannot be had without it.

    Half of its time goes into looking at each message for pictures and tools.
    """
    from transformers.utils import chat_template_utils  # slow to import

    compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
    try:
        return None if compile_template is None else compile_template(source)
    except Exception:  # Jinja's own errors, which rendering will raise again and name
        return None


class _Turn:
    """An answer's place, and the texts before and after it."""

    __slots__ = ("answered", "asked", "place")

    def __init__(self, place: int, asked: str, answered: str) -> None:
        self.place, self.asked, self.answered = place, asked, answered


def _answers(messages: Messages, only_last: bool) -> list[int]:
    places = [place for place, message in enumerate(messages) if message.role == "assistant"]
    return places[-1:] if only_last else places


def _said(message: Message) -> str:
    return f"{message.content}\n\n{message.context}" if message.context else message.content


def _check_contents(text: str, messages: Messages, may_shorten_answers: bool) -> int:
    """Every message must be in the text; counts those that lost spaces at an end.

    Earlier answers may be shortened where the row's last answer alone is trained: in use the
    template drops their thoughts too.

    Raises:
        ConfigurationError: naming a message that is not there.
    """
    num_trimmed = 0
    start = 0
    for place, message in enumerate(messages):
        content = _said(message)
        bare = content.strip()
        found = text.find(bare, start)
        if found < 0:  # some templates put the system message into the last question
            found = text.find(bare)
        if found < 0:
            if may_shorten_answers and message.role == "assistant" and place < len(messages) - 1:
                continue
            raise ConfigurationError(
                "data.template: the tokenizer's chat template drops or rewrites message "
                f"{place + 1} ({message.role}: '{bare[:40]}'); choose another template."
            )
        is_whole = len(bare) == len(content) or content in text
        num_trimmed += not is_whole
        start = max(start, found + len(bare))
    return num_trimmed


def _edges(
    marked: str, pairs: Sequence[tuple[str, str]]
) -> tuple[list[tuple[int, int | None]] | None, str]:
    """Where whose text begins (its message's place) or ends (None); and the text without marks.

    No edges (None) if a mark has lost its other half.
    """
    opens = {first: place for place, (first, _) in enumerate(pairs)}
    closes = {last: place for place, (_, last) in enumerate(pairs)}
    edges: list[tuple[int, int | None]] = []
    plain: list[str] = []
    whose: int | None = None
    for character in marked:
        if character in opens and whose is None:
            whose = opens[character]
        elif character in closes and whose == closes[character]:
            whose = None
        elif character in opens or character in closes:
            return None, ""
        else:
            plain.append(character)
            continue
        edges.append((len(plain), whose))
    return (edges if whose is None else None), "".join(plain)


def _cut(segments: Sequence[Segment], edges: Sequence[tuple[int, int | None]]) -> list[Segment]:
    cut: list[Segment] = []
    waiting = list(edges)
    start, whose = 0, None
    for segment in segments:
        end = start + len(segment.text)
        at = start
        while waiting and waiting[0][0] <= end:
            edge, next_whose = waiting.pop(0)
            cut.append(_piece(segment, start, at, edge, whose))
            at, whose = edge, next_whose
        cut.append(_piece(segment, start, at, end, whose))
        start = end
    return [segment for segment in cut if segment.text]


def _piece(segment: Segment, start: int, a: int, b: int, whose: int | None) -> Segment:
    text = segment.text[a - start : b - start]
    return Segment(
        text, segment.is_answer, segment.message if whose is None else whose, whose is not None
    )
