"""Conversations over which two ways to make prompts are compared: what users and programs send.

Each ends with a question. What is in them once went wrong somewhere: spaces at the ends of
messages, digits, newlines, markers of other templates, characters of several code points.
"""

from __future__ import annotations

from qlora_pl.data.conversation import Conversation, Message

CODE = "def add(a, b):\n    if a:\n\t\treturn a + b\n\n\nprint(add(1, 23))\n"
THOUGHT = "<think>\nTwo and two.\n</think>\n\nFour."


def _turns(*contents: str, system: str | None = None) -> Conversation:
    told = [] if system is None else [Message("system", system)]
    said = [Message("assistant" if n % 2 else "user", c) for n, c in enumerate(contents)]
    return Conversation((*told, *said))


EXAMPLES: dict[str, Conversation] = {
    "one question": _turns("What does NF4 stand for?"),
    "a system message": _turns("Hello", system="You are terse."),
    "two questions": _turns("Hello", "Good morning.", "And now?"),
    "two questions and a system message": _turns(
        "Hello", "Good morning.", "And now?", system="You are terse."
    ),
    "five questions": _turns(*(f"Turn {n}, please." for n in range(9))),
    "five questions and a system message": _turns(
        *(f"Turn {n}, please." for n in range(9)), system="Count.\nSlowly."
    ),
    "a question with spaces at its ends": _turns("  Why?  "),
    "a question with newlines at its ends": _turns("\n\nWhy?\n"),
    "an answer with spaces at its ends": _turns("Why?", " Because. \n", "I see."),
    "a system message with spaces at its ends": _turns("Why?", system=" Be brief. \n\n"),
    "a wide space and others": _turns(
        "\u3000wide\u00a0and\u2003others\u200b", "\u00a0yes\u2003", "so"
    ),
    "digits": _turns("0 12 345 6789 1,234,567.89 -1 1e-5 2024-01-31", "42", "007"),
    "only digits": _turns("1234567"),
    "newlines and tabs": _turns("a\n\nb\n\n\n\tc\r\nd", "e\n\n", "\tf"),
    "code": _turns(CODE, CODE, "Why?", system="You write Python."),
    "several spaces": _turns("two  three   four    five", "a  b", "c   d"),
    "unicode": _turns("日本語のテキスト、和中文。 مرحبا", "naïve café, e\u0301 and é", "ß ﬁ ½ №"),
    "emoji of several code points": _turns("👩‍👩‍👧‍👦 🙂 🏳️‍🌈", "🙂", "🇩🇪?"),
    "an empty question": _turns(""),
    "a question of one space": _turns(" "),
    "an answer of one letter": _turns("a", "b", "c"),
    "an answer of one newline": _turns("a", "\n", "c"),
    "an empty system message": _turns("Hello", system=""),
    "markers of templates": _turns(
        "### Human: who### Assistant: me\n### Response:", "USER: no ASSISTANT: yes", "### Input:\n"
    ),
    "braces and quotation marks": _turns(
        '{{ .Content }} {% if x %} {content} "quoted" \\n \\ \'', '"""', "{{- end -}}", system="{}"
    ),
    "thoughts": _turns("Two and two?", THOUGHT, "And two more?"),
    "punctuation at the ends": _turns("...", "!", "?!", system="."),
}
"""By what they are."""
