"""Message trees of OpenAssistant -> conversations: one path down each tree, or all of them.

Read are both layouts that OASST is published in: the flat table (one row a message, ``message_id``
and ``parent_id``) and nested trees (one row a tree, ``prompt`` with ``replies``). What comes out
depends on the messages alone and not on their order in the file:

- a message that was deleted, rejected in review, never reviewed or written in another language is
  left out, with everything below it; so is a message whose parent is missing
- of several replies the one with the lowest ``rank`` is followed; one without a rank stands behind
  those with one, and ties go to the ``message_id`` that comes first
- a path that ends with a question is cut back to its last answer
- conversations come in the order of their prompts' ``message_id``
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from qlora_pl.data.reading.cells import RowError, quote, text_of
from qlora_pl.data.reading.places import BadRow, Place, PlacedRow, Row
from qlora_pl.errors import DatasetFormatError

ROLES = {"prompter": "user", "assistant": "assistant"}
FINISHED_TREE = "ready_for_export"
"""The ``tree_state`` of trees that went through all of OASST's steps; others are left out."""


@dataclass(frozen=True, kw_only=True)
class TreeRules:
    """Which conversations a tree gives."""

    languages: tuple[str, ...] = ()
    """Codes as in ``lang``, for example ``en``; (): every language."""
    replies: Literal["best", "all"] = "best"
    """``best``: one path a tree, as in the QLoRA paper; ``all``: one for each last answer."""


class _Node(NamedTuple):
    place: Place
    id: str
    parent: str | None
    role: str
    text: str
    rank: float
    why_left_out: str | None


def conversations_of_trees(
    rows: Iterable[PlacedRow], rules: TreeRules, left_out: Counter[str]
) -> Iterator[PlacedRow]:
    """Rows ``{"messages": [{"role", "content"}, ...]}``, each at the place of its prompt.

    Args:
        rows: Messages, trees or both. All are held in memory, since a reply may stand anywhere.
        rules: Which conversations a tree gives.
        left_out: Receives the number of messages left out for each reason.

    Raises:
        DatasetFormatError: if two messages have one id, or a message is its own ancestor.
    """
    nodes: dict[str, _Node] = {}
    for place, row in rows:
        if isinstance(row, BadRow):
            yield place, row
            continue
        try:
            found = list(_nodes_of_row(place, row, rules))
        except RowError as error:
            yield place, BadRow(f"{error}. {error.remedy}.")
            continue
        for node in found:
            if node.id in nodes:
                raise DatasetFormatError(
                    f"{place}: message {quote(node.id)} stands there for the second time (first in "
                    f"{nodes[node.id].place}); name each file once, and remove one of the two."
                )
            nodes[node.id] = node
    yield from _conversations(nodes, rules, left_out)


# -- from rows to messages -----------------------------------------------------------------------


def _nodes_of_row(place: Place, row: Row, rules: TreeRules) -> Iterator[_Node]:
    if not isinstance(row.get("prompt"), Mapping):
        yield _node(place, row, row.get("parent_id"), row, rules)
        return
    waiting: list[tuple[Any, str | None]] = [(row["prompt"], None)]
    while waiting:  # not by recursion: a tree may be deeper than Python's stack
        message, parent = waiting.pop()
        if not isinstance(message, Mapping):
            raise RowError(f"a message is {type(message).__name__}, expected a mapping")
        node = _node(place, message, parent, row, rules)
        yield node
        replies = message.get("replies") or []
        if not isinstance(replies, list | tuple):
            raise RowError(f"'replies' holds {type(replies).__name__}, expected a list")
        waiting += [(reply, node.id) for reply in replies]


def _node(place: Place, message: Row, parent: Any, tree: Row, rules: TreeRules) -> _Node:
    role = text_of(message, "role")
    if role not in ROLES:
        raise RowError(f"'role' is {quote(role)}; known: {', '.join(ROLES)}", "Remove the message")
    rank = message.get("rank")
    if rank is not None and not isinstance(rank, int | float):
        raise RowError(f"'rank' holds {quote(rank)}", "Write a number, or null")
    why_left_out = _why_left_out(message, tree, rules)
    return _Node(
        place,
        text_of(message, "message_id"),
        None if parent is None else str(parent),
        ROLES[role],
        text_of(message, "text", default="" if why_left_out else None),
        float("inf") if rank is None else float(rank),
        why_left_out,
    )


def _why_left_out(message: Row, tree: Row, rules: TreeRules) -> str | None:
    state = tree.get("tree_state")
    if state is not None and state != FINISHED_TREE:
        return f"the tree is not {FINISHED_TREE}"
    if message.get("deleted"):
        return "deleted"
    review = message.get("review_result")
    if review is not None and not review:
        return "rejected in review"
    if review is None and message.get("review_count") == 0:
        return "not reviewed"
    if rules.languages and message.get("lang") not in rules.languages:
        return "another language"
    return None


# -- from messages to paths ----------------------------------------------------------------------


def _conversations(
    nodes: Mapping[str, _Node], rules: TreeRules, left_out: Counter[str]
) -> Iterator[PlacedRow]:
    replies: dict[str | None, list[_Node]] = defaultdict(list)
    for node in sorted(nodes.values(), key=lambda node: (node.rank, node.id)):
        replies[node.parent].append(node)
    roots = sorted(replies[None], key=lambda node: node.id)
    _leave_out(nodes, replies, left_out)
    for root in roots:
        if root.why_left_out is not None:
            continue
        if rules.replies == "all":
            yield from _rows(root, _paths(root, replies), left_out)
            continue
        best = _best_path(root, replies)
        if others := _count_kept(root, replies) - len(best):
            left_out["another reply was preferred"] += others
        yield from _rows(root, [best], left_out)


def _rows(root: _Node, paths: Iterable[list[_Node]], left_out: Counter[str]) -> Iterator[PlacedRow]:
    seen: set[str] = set()  # two paths that differ in their last question alone are one
    for path in paths:
        while path and path[-1].role == "user":
            path.pop()
            reason = "a question without an answer" if path else "a prompt without an answer"
            left_out[reason] += 1
        if path and path[-1].id not in seen:
            seen.add(path[-1].id)
            turns = [{"role": node.role, "content": node.text} for node in path]
            yield root.place, {"messages": turns}


def _leave_out(
    nodes: Mapping[str, _Node], replies: dict[str | None, list[_Node]], left_out: Counter[str]
) -> None:
    """Take out of ``replies`` what is left out, and count it; every message is seen once."""
    reached: set[str] = set()
    missing = {node.parent for node in nodes.values()} - nodes.keys() - {None}
    waiting: list[tuple[_Node, str | None]] = [(node, None) for node in replies[None]]
    waiting += [(node, "its parent is missing") for parent in missing for node in replies[parent]]
    while waiting:
        node, inherited = waiting.pop()
        reached.add(node.id)
        reason = node.why_left_out or inherited
        if reason is not None:
            left_out[reason] += 1
        below = None if reason is None else "below a message that is left out"
        waiting += [(reply, below) for reply in replies[node.id]]
        replies[node.id] = [reply for reply in replies[node.id] if reply.why_left_out is None]
    for node in nodes.values():
        if node.id not in reached:
            raise DatasetFormatError(
                f"{node.place}: message {quote(node.id)} is its own ancestor (or hangs below one "
                "that is); mend its parent_id."
            )


def _best_path(root: _Node, replies: Mapping[str | None, list[_Node]]) -> list[_Node]:
    path = [root]
    while following := replies[path[-1].id]:
        path.append(following[0])
    return path


def _paths(root: _Node, replies: Mapping[str | None, list[_Node]]) -> Iterator[list[_Node]]:
    """From the root to every leaf, the best first."""
    waiting = [[root]]
    while waiting:
        path = waiting.pop()
        following = replies[path[-1].id]
        if not following:
            yield path
        waiting += [[*path, reply] for reply in reversed(following)]


def _count_kept(root: _Node, replies: Mapping[str | None, list[_Node]]) -> int:
    count, waiting = 0, [root]
    while waiting:
        count += 1
        waiting += replies[waiting.pop().id]
    return count
