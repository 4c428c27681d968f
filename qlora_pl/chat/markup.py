"""What somebody wrote -> Markdown that shows it, runs nothing and fetches nothing.

Gradio's own cleaning drops tags, so that a reader would not see what a model wrote, and keeps
images and drawings, whose addresses a browser fetches from wherever the model says.
"""

from __future__ import annotations

import html
import re

FENCE = re.compile(r"^ {0,3}(`{3,}(?![^\n]*`)|~{3,})", re.MULTILINE)
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
DRAWING = re.compile(r"([`~]{3,}[ \t]*)mermaid", re.IGNORECASE)
"""Gradio draws such blocks, and what a drawing names is fetched."""
MARKS = {"<": "&lt;", "![": "&#33;["}
"""What begins a tag or an image, as text."""


def as_markdown(text: str) -> str:
    """Markdown in which tags are text, images are links and code is code.

    Args:
        text: Of a model or a person; may end anywhere, as an answer does while it is written.
    """
    shown, rest = "", DRAWING.sub(r"\1text", text)
    while opened := FENCE.search(rest):
        shown += _outside_of_fences(rest[: opened.start()])
        end = _end_of_fence(rest, opened)
        shown += rest[opened.start() : end]
        rest = rest[end:]
    return shown + _outside_of_fences(rest)


def as_html(text: str) -> str:
    """Text as HTML, a line for a line."""
    return html.escape(text).replace("\n", "<br>")


def _end_of_fence(text: str, opened: re.Match[str]) -> int:
    closing = re.compile(rf"^ {{0,3}}{re.escape(opened[1])}[`~]*[ \t]*$", re.MULTILINE)
    closed = closing.search(text, opened.end())
    return closed.end() if closed else len(text)


def _outside_of_fences(text: str) -> str:
    shown, done = "", 0
    for span in CODE_SPAN.finditer(text):
        shown += _as_text(text[done : span.start()]) + span[0]
        done = span.end()
    return shown + _as_text(text[done:])


def _as_text(text: str) -> str:
    for mark, entity in MARKS.items():
        text = text.replace(mark, entity)
    return text
