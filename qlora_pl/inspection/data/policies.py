"""What each ``data.overlong`` would take away at a run's lengths, and which length would do.

Long rows are encoded once more and fitted by the encoder that fits them for training, so the losses
are exact; the length that keeps within the budget follows from where each trained token stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, get_args

import numpy as np
from tqdm import tqdm

from qlora_pl.data.encoding.encoder import TOKENIZER_CHUNK, Encoder
from qlora_pl.data.encoding.example import EncodedExample
from qlora_pl.data.encoding.lengths import Limits, Overlong
from qlora_pl.data.rows.audit import sufficient_length
from qlora_pl.data.rows.chunks import trained_rows
from qlora_pl.data.rows.encoded_rows import EncodedRows
from qlora_pl.data.rows.preparation import EncodedSplit

POLICIES: tuple[Overlong, ...] = tuple(p for p in get_args(Overlong) if p != "error")
OF_PAIRS: tuple[Overlong, ...] = ("cut", "drop")
"""Where question and answer have a limit each, there is no other way."""
ROWS_AT_A_TIME = 4096


class PolicyLosses(NamedTuple):
    """What one way with long rows would come to."""

    overlong: Overlong
    num_lost_tokens: int
    """Trained tokens."""
    lost_ratio: float
    """Of all trained tokens, those of short rows included."""
    num_left_out: int
    """Long rows of which nothing is left to train on."""
    num_endless: int
    """Rows that are left of the long ones, without a stop token at their end."""
    sufficient_length: int | None
    """The smallest ``Limits.answer_key`` within the budget; None: any would do."""
    is_chosen: bool


def policy_losses(whole: EncodedSplit, encoder: Encoder, limits: Limits) -> list[PolicyLosses]:
    """One line for each policy that leaves something out.

    Args:
        whole: Every row before it is cut.
        encoder: What made the rows.
        limits: Those of the run.
    """
    num_trained = int(whole.rows.num_trained.sum())
    long_examples = list(_long_examples(whole, encoder, limits))
    lines = []
    for policy in OF_PAIRS if has_two_limits(encoder, limits) else POLICIES:
        wanted = replace(limits, overlong=policy)
        lost = left_out = endless = 0
        for example in long_examples:
            rows = trained_rows(encoder.fit(example, wanted), policy)
            lost += example.num_trained - sum(row.num_trained for row in rows)
            left_out += not rows
            endless += sum(not _ends_in_stop(row, encoder) for row in rows)
        needed = _needed(whole, encoder, wanted)
        enough = None if needed is None else sufficient_length(needed, limits.max_lost_ratio)
        ratio = lost / num_trained if num_trained else 0.0
        is_chosen = policy == limits.overlong
        lines.append(PolicyLosses(policy, lost, ratio, left_out, endless, enough, is_chosen))
    return lines


def has_two_limits(encoder: Encoder, limits: Limits) -> bool:
    """Whether question and answer have a limit each."""
    return encoder.is_paired or limits.max_target_length is not None


def _long_examples(
    whole: EncodedSplit, encoder: Encoder, limits: Limits
) -> Iterator[EncodedExample]:
    dropping = replace(limits, overlong="drop")  # leaves nothing of what is too long
    surely_short = min(limits.max_length, limits.answer_limit)
    for example in _examples(whole, encoder, surely_short):
        if not encoder.fit(example, dropping):
            yield example


def _examples(whole: EncodedSplit, encoder: Encoder, longer_than: int) -> Iterator[EncodedExample]:
    chosen = np.flatnonzero(whole.rows.lengths > longer_than)
    some = whole.select(chosen).conversations.each()
    with tqdm(
        total=len(some), desc="fitting", unit=" rows", unit_scale=True, delay=1.0, leave=False
    ) as bar:
        for start in range(0, len(some), TOKENIZER_CHUNK):
            chunk = list(some[start : start + TOKENIZER_CHUNK])
            for examples in encoder.encode(chunk):
                yield from examples
            bar.update(len(chunk))


def _ends_in_stop(row: EncodedExample, encoder: Encoder) -> bool:
    trained = np.flatnonzero(row.is_trained)
    return int(row.input_ids[trained[-1]]) in encoder.stop_ids


# -- the length that would do ----------------------------------------------------------------------


def _needed(whole: EncodedSplit, encoder: Encoder, limits: Limits) -> np.ndarray | None:
    """How many trained tokens need each limit to be kept; None: no token needs any."""
    if limits.overlong == "split":
        return None
    only_answers = encoder.train_on in ("answers", "last_answer")
    if only_answers and not has_two_limits(encoder, limits):
        return needed_by_rows(whole.rows, limits.overlong, encoder.tokenizer.bos_token_id)
    needed = [
        encoder.needed(example, limits)
        for example in _examples(whole, encoder, 0)
        if example.is_worth_training
    ]
    return np.bincount(np.concatenate([np.zeros(0, np.int64), *needed]), minlength=1)


def needed_by_rows(rows: EncodedRows, policy: Overlong, bos_id: int | None) -> np.ndarray:
    """The histogram of ``lengths.needed_lengths`` over many rows at once, trained on answers alone.

    Args:
        rows: Before they are cut.
        policy: Any but ``split``, where no token needs a length.
        bos_id: The token with which a row may begin, and which is never cut.
    """
    needed = np.zeros(int(rows.lengths.max(initial=0)) + 1, np.int64)
    if policy in ("drop", "error"):
        np.add.at(needed, rows.lengths, rows.num_trained)
        return needed
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        some = rows.select(range(start, min(start + ROWS_AT_A_TIME, len(rows)))).compact()
        row_of = np.repeat(np.arange(len(some)), some.lengths)[some.is_trained]
        places = np.flatnonzero(some.is_trained) - some.starts[row_of]
        if policy == "cut_prompt":
            first = np.zeros(len(some), np.int64)
            first[row_of[::-1]] = places[::-1]  # the last one written is a row's first
            num_bos = some.input_ids[some.starts] == bos_id
            places = places - np.maximum(first - num_bos, 0)[row_of]
        needed += np.bincount(places + 1, minlength=len(needed))
    return needed
