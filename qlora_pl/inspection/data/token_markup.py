"""Tokens of a row -> HTML whose text is, character by character, the text that was tokenised.

White space is made visible by the style alone, so that what is copied from the page is the text.
A control token that is not in the text shows its name, and a token that is a part of a character
begun before it shows a mark; neither is text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from qlora_pl.inspection.data.traced_rows import ShownRow, ShownToken

PART = '<u class="part"></u>'
"""Stands for a token that is a later part of the character before it."""
FIRST_SHOWN, LAST_SHOWN = 2000, 400
"""Tokens of a longer row that are shown; the page says how many are not."""
MARKED = re.compile("[ \\t\\n\\r\\0]")
MARKS = {
    "\r": '<u class="return"></u>&#13;',  # a bare one would be read as the end of a line
    "\0": '<u class="unseen" data-name="NUL"></u>',  # which HTML cannot hold
    " ": '<u class="space"> </u>',
    "\t": '<u class="tab">\t</u>',
    "\n": '<u class="line"></u>\n',
}


def tokens_markup(row: ShownRow) -> str:
    """All of a row's tokens, or the first and the last ones."""
    tokens = row.tokens
    num_hidden = len(tokens) - FIRST_SHOWN - LAST_SHOWN
    if num_hidden <= 0:
        return _spans(tokens, 0)
    last = len(tokens) - LAST_SHOWN
    return (
        _spans(tokens[:FIRST_SHOWN], 0)
        + f'<span class="left-out"> ... {num_hidden:,} tokens are not shown ... </span>'
        + _spans(tokens[last:], last)
    )


def _spans(tokens: Sequence[ShownToken], first: int) -> str:
    return "".join(_span(token, place) for place, token in enumerate(tokens, start=first))


def _span(token: ShownToken, place: int) -> str:
    if token.id is None:
        title = "characters that became no token"
        return f'<span class="token none" title="{title}">{_visible(token.text)}</span>'
    kinds = ["token"]
    kinds += ["trained"] if token.is_trained else []
    kinds += ["special"] if token.is_special else []
    kinds += ["lost"] if token.is_lost else []
    said = ["trained" if token.is_trained else "not trained"]
    said += ["special"] if token.is_special else []
    said += ["left out: the row is too long"] if token.is_lost else []
    said += [f"weight {token.weight:g}"] if token.is_trained and token.weight != 1 else []
    title = f"{place}: id {token.id}, {token.name}, {', '.join(said)}"
    name = escape(token.name, quote=True)
    unseen = f'<u class="unseen" data-name="{name}"></u>' if token.is_special else PART
    inner = _visible(token.text) if token.text else unseen
    return (
        f'<span class="{" ".join(kinds)}" data-id="{token.id}" '
        f'title="{escape(title, quote=True)}">{inner}</span>'
    )


def _visible(text: str) -> str:
    return MARKED.sub(lambda found: MARKS[found.group()], escape(text))
