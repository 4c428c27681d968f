"""What merging changed: how far a merged model lies from the one that was trained.

Log-probabilities of the trained model lie in a file while a merged one is asked, so that both are
never in memory together; of either, a few positions are looked at at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qlora_pl.merging.scored_rows import ScoredRow

POSITIONS = 64
"""Looked at at a time: 64 x 128,256 log-probabilities are 33 MB, and a comparison takes a few."""
PROBES = (8, 64)
"""Tokens of the two forwards that a time is estimated from."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A merged model beside the trained one, over the same tokens."""

    kl_divergence: float
    """Mean of KL(trained || merged), nats a token."""
    top1_agreement: float
    """Share of tokens of which both find the same likeliest."""
    perplexity: float
    """The merged model's, of the rows' own tokens."""
    trained_perplexity: float
    """The trained model's."""
    tokens: int


class NoBar:
    """Stands for a bar of progress where nobody looks."""

    def update(self, number: int) -> None:
        """Nothing."""


def write_reference(model: Any, rows: Sequence[ScoredRow], path: Path, bar: Any = None) -> None:
    """Keep what the trained model says of every token, in float32.

    Args:
        model: The trained one.
        rows: To ask it.
        path: Of the file.
        bar: Told of every token that was read; None: nobody is.
    """
    number = sum(len(row.places) for row in rows)
    kept: Any = None
    done = 0
    for _, found in log_probabilities(model, rows, bar or NoBar()):
        if kept is None:
            kept = np.lib.format.open_memmap(
                path, mode="w+", dtype=np.float32, shape=(number, found.shape[1])
            )
        kept[done : done + len(found)] = found.cpu().numpy()
        done += len(found)
    kept.flush()


def log_probabilities(
    model: Any, rows: Sequence[ScoredRow], bar: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """``(k,)`` trained tokens and ``(k, V)`` float32 of them, row after row, a few at a time."""
    with torch.no_grad():
        for row in rows:
            logits = logits_of(model, row)
            for tokens, some in zip(
                row.targets.split(POSITIONS), logits.split(POSITIONS), strict=True
            ):
                yield tokens.to(some.device), functional.log_softmax(some.float(), dim=-1)
            bar.update(row.num_tokens)


def logits_of(model: Any, row: ScoredRow) -> Tensor:
    """``(n, V)`` at the row's places, in the model's type."""
    device = model.device
    ids = row.input_ids.unsqueeze(0).to(device)
    inputs = {"input_ids": ids}
    if row.source_ids is not None:
        inputs = {
            "input_ids": row.source_ids.unsqueeze(0).to(device),
            "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=ids),
        }
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits[0, row.places.to(device)]


def score(model: Any, rows: Sequence[ScoredRow], reference: Path, bar: Any = None) -> Score:
    """Ask a merged model what the trained one was asked.

    Args:
        model: That is scored.
        rows: The same.
        reference: From ``write_reference``.
        bar: See there.
    """
    kept = np.lib.format.open_memmap(reference, mode="r")
    sums = torch.zeros(4, dtype=torch.float64)
    done = 0
    for tokens, own in log_probabilities(model, rows, bar or NoBar()):
        theirs = torch.from_numpy(np.array(kept[done : done + len(own)])).to(own.device)
        done += len(own)
        width = min(own.shape[1], theirs.shape[1])  # rows that pad a vocabulary
        own, theirs = own[:, :width], theirs[:, :width]
        targets = tokens.unsqueeze(1)
        divergence = functional.kl_div(own, theirs, log_target=True, reduction="sum")
        agreement = (own.argmax(1) == theirs.argmax(1)).sum()
        losses = (-own.gather(1, targets).sum(), -theirs.gather(1, targets).sum())
        sums += torch.stack([divergence, agreement, *losses]).double().cpu()
    mean = (sums / max(done, 1)).tolist()
    return Score(
        kl_divergence=mean[0],
        top1_agreement=mean[1],
        perplexity=float(np.exp(mean[2])),
        trained_perplexity=float(np.exp(mean[3])),
        tokens=done,
    )


def estimate_seconds(model: Any, rows: Sequence[ScoredRow]) -> float:
    """About how long one model takes to read the rows: a time a row and a time a token.

    Both come from two short forwards, after one that brings the weights into memory.
    """
    longest = max(rows, key=lambda row: row.num_tokens)
    short, long = (longest.beginning(most) for most in PROBES)
    seconds = []
    with torch.no_grad():
        for row in (short, short, long):
            started = time.perf_counter()
            logits_of(model, row).sum().item()  # a GPU is waited for
            seconds.append(time.perf_counter() - started)
    _, first, second = seconds
    more = max(long.num_tokens - short.num_tokens, 1)
    a_token = max(second - first, 0.0) / more
    a_row = max(first - a_token * short.num_tokens, 0.0)
    return sum(a_row + a_token * row.num_tokens for row in rows)


def in_words(seconds: float) -> str:
    """A time that is about right: seconds below two minutes, then minutes, then hours."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"


def table(scores: dict[str, Score]) -> str:
    """The scores as Markdown, a row a policy."""
    lines = [
        "| merged onto | KL to the trained model, nats a token | same likeliest token "
        "| perplexity | of the trained model |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, found in scores.items():
        lines.append(
            f"| {name} | {found.kl_divergence:.2e} | {found.top1_agreement:.2%} "
            f"| {found.perplexity:.4f} | {found.trained_perplexity:.4f} |"
        )
    return "\n".join(lines)
