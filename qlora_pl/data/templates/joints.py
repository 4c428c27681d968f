"""A template as the texts that stand between the messages of a conversation, found by rendering.

Templates of other programs (a tokenizer's Jinja, Ollama's Go) are written from these texts. A
template that does more than put them between messages is refused, with what it does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qlora_pl.data.conversation import ROLES, Message, Role
from qlora_pl.errors import ConfigurationError

Messages = Sequence[Message]
Render = Callable[[Messages, bool], str]
"""The text of messages; true: it ends where the model is to answer."""
MARKS = tuple(f"zq{number}qz" for number in range(6))
"""Messages that no template's own text holds."""


@dataclass(frozen=True, kw_only=True)
class Joints:
    """What a template writes before, between and after messages.

    Attributes:
        opening: Before the first question, where there is no system message.
        system: Before a system message; None: the template refuses one.
        system_to_question: Between it and the first question.
        question_to_answer: Between a question and its answer.
        cue: After a question that the model is to answer.
        answer_to_question: Between an answer and the next question.
        ending: After the last answer, where no question follows.
        trimmed: Roles whose messages lose the spaces at both ends.
        shows_empty_system: Whether an empty system message is written like others; else it is none.
    """

    opening: str
    system: str | None
    system_to_question: str
    question_to_answer: str
    cue: str
    answer_to_question: str
    ending: str
    trimmed: frozenset[Role] = frozenset()
    shows_empty_system: bool = False

    def render(self, messages: Messages, asks: bool) -> str:
        """The text of messages of this order: system if any, then questions and answers by turns.

        Raises:
            ConfigurationError: for a system message that the template refuses.
        """
        text, last = "", None
        for message in messages:
            if message.role == "system":
                if not (message.content or self.shows_empty_system):
                    continue
                if self.system is None:
                    raise ConfigurationError("This template has no place for a system message.")
            text += self._before(message.role, last) + self._said(message)
            last = message.role
        if last == "assistant":
            return text + self.ending
        return text + (self.cue if asks else "")

    def _before(self, role: Role, last: Role | None) -> str:
        if role == "system":
            return self.system or ""
        if role == "assistant":
            return self.question_to_answer
        if last == "assistant":
            return self.answer_to_question
        return self.opening if last is None else self.system_to_question

    def _said(self, message: Message) -> str:
        return message.content.strip() if message.role in self.trimmed else message.content

    def read(self, text: str) -> list[Message] | None:
        """The messages of a text that this template wrote, its last answer included.

        None where the text is not of its shape. Messages that themselves spell a joint come out
        otherwise than they went in, so render what was read before relying on it.
        """
        messages: list[Message] = []
        rest = text
        if rest.startswith(self.opening):
            rest = rest[len(self.opening) :]
        elif self.system is not None and rest.startswith(self.system) and self.system_to_question:
            said, found, rest = rest[len(self.system) :].partition(self.system_to_question)
            if not found:
                return None
            messages.append(Message("system", said))
        else:
            return None
        while True:
            asked, found, rest = rest.partition(self.question_to_answer)
            if not found or not self.question_to_answer or not self.ending:
                return None
            answered, found, later = rest.partition(self.answer_to_question)
            messages.append(Message("user", asked))
            if not found:
                messages.append(Message("assistant", rest.removesuffix(self.ending)))
                return messages
            messages.append(Message("assistant", answered))
            rest = later

    # -- in Jinja ----------------------------------------------------------------------------------

    def jinja(self, bos: str = "", leads_with_space: bool = False) -> str:
        """The same as a chat template, which transformers and what builds on it render.

        Every text is a literal, so that no rule about the spaces around tags applies.

        Args:
            bos: Written before everything.
            leads_with_space: Whether a space follows it where the text does not begin with one.
        """
        system_in, user_in, answer_in = (self._jinja_said(role) for role in ROLES)

        def first(text: str) -> str:
            if text or not leads_with_space:
                space = " " if leads_with_space and not text.startswith(" ") else ""
                return _literal(f"{bos}{space}{text}")
            said = "message['content']"
            condition = f"{{%- if {said} and {said}[0] != ' ' -%}}"
            return f"{_literal(bos)}{condition}{_literal(' ')}{{%- endif -%}}"

        is_told = "true" if self.shows_empty_system else "message['content']"
        lines = [
            "{%- set turn = namespace(last='') -%}",
            "{%- for message in messages -%}",
            "{%- if message['role'] == 'system' and turn.last == '' -%}",
            f"{{%- if {is_told} -%}}",
            *(
                [_raise("this template has no place for a system message")]
                if self.system is None
                else [first(self.system), system_in, "{%- set turn.last = 'system' -%}"]
            ),
            "{%- endif -%}",
            "{%- elif message['role'] == 'user' and turn.last != 'user' -%}",
            "{%- if turn.last == '' -%}",
            first(self.opening),
            "{%- elif turn.last == 'system' -%}",
            _literal(self.system_to_question),
            "{%- else -%}",
            _literal(self.answer_to_question),
            "{%- endif -%}",
            user_in,
            "{%- set turn.last = 'user' -%}",
            "{%- elif message['role'] == 'assistant' and turn.last == 'user' -%}",
            _literal(self.question_to_answer),
            answer_in,
            "{%- set turn.last = 'assistant' -%}",
            "{%- else -%}",
            _raise("questions and answers take turns, after at most one system message"),
            "{%- endif -%}",
            "{%- endfor -%}",
            "{%- if turn.last == 'assistant' -%}",
            _literal(self.ending),
            "{%- elif add_generation_prompt -%}",
            _literal(self.cue),
            "{%- endif -%}",
        ]
        return "\n".join(line for line in lines if line)

    def _jinja_said(self, role: Role) -> str:
        trims = " | trim" if role in self.trimmed else ""
        return f"{{{{- message['content']{trims} -}}}}"


def _literal(text: str) -> str:
    # Characters stay as they are: Jinja would read a surrogate pair of escapes as two characters.
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} -}}}}" if text else ""


def _raise(sentence: str) -> str:
    return f"{{{{- raise_exception({json.dumps(sentence)}) -}}}}"


# -- found by rendering ----------------------------------------------------------------------------


def find_joints(render: Render) -> Joints:
    """The joints of whatever renders conversations.

    Args:
        render: May raise a ``ConfigurationError`` for a system message alone.

    Raises:
        ConfigurationError: if what it renders is not messages with the same texts between them;
            one clause about what it does, without a full stop.
    """
    user, answer = [Message("user", mark) for mark in MARKS], Message("assistant", MARKS[3])
    opening, cue = _around(render([user[0]], True), MARKS[:1])
    answers = [Message("assistant", MARKS[1]), Message("assistant", MARKS[3])]
    turns = [user[0], answers[0], user[2], answers[1], user[4]]
    texts = _around(render(turns, True), MARKS[:5])
    if texts != [opening, *texts[1:3], *texts[1:3], cue]:
        raise ConfigurationError("writes other text around later turns than around the first")
    _, _, ending = _around(render([user[0], answer], False), (MARKS[0], MARKS[3]))
    system, system_to_question = _around_system(render, user[0], cue)
    plain = Joints(
        opening=opening,
        system=system,
        system_to_question=system_to_question,
        question_to_answer=texts[1],
        cue=cue,
        answer_to_question=texts[2],
        ending=ending,
    )
    return _with_habits(plain, render)


def _around(text: str, marks: Sequence[str]) -> list[str]:
    """The texts before, between and after marks that must occur once each, in this order."""
    texts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise ConfigurationError("drops, repeats or moves a message")
        texts.append(before)
    return [*texts, text]


def _around_system(render: Render, question: Message, cue: str) -> tuple[str | None, str]:
    told = [Message("system", MARKS[5]), question]
    try:
        text = render(told, True)
    except ConfigurationError:
        return None, ""
    before, between, after = _around(text, (MARKS[5], MARKS[0]))
    if after != cue:
        raise ConfigurationError("writes other text after a question where there is a system one")
    return before, between


def _with_habits(joints: Joints, render: Render) -> Joints:
    """The same, with what becomes of spaces at a message's ends, and of an empty system message."""
    question = Message("user", MARKS[0])
    around: dict[Role, Callable[[Message], list[Message]]] = {
        "user": lambda message: [message],
        "assistant": lambda message: [question, message, question],
    }
    shows_empty = False
    if joints.system is not None:
        around["system"] = lambda message: [message, question]
        empty, without = render([Message("system", ""), question], True), render([question], True)
        shows_empty = empty != without
    trimmed: set[Role] = set()
    for role, conversation in around.items():
        spaced = conversation(Message(role, f" \n {MARKS[1]}\n  "))
        text = render(spaced, True)
        if text != joints.render(spaced, True):
            trimmed.add(role)
    return replace(joints, trimmed=frozenset(trimmed), shows_empty_system=shows_empty)
