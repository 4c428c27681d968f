"""What merging changed: how far a merged model lies from the one that was trained.

Log-probabilities of the trained model lie in a file while a merged one is asked, so that both are
never in memory together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qlora_pl.modeling.adapter_folder import HELD_OUT

SCORE_TOKENS = 4096
"""Trained tokens that are scored, at most."""


@dataclass(frozen=True)
class ScoredRow:
    """A row to ask both models."""

    input_ids: Tensor
    """``(T,)``"""
    places: Tensor
    """``(n,)`` positions whose next token is a trained one."""


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


def held_out_rows(folder: Path, most: int = SCORE_TOKENS) -> list[ScoredRow]:
    """The validation rows that lie in an adapter folder, up to so many trained tokens.

    Args:
        folder: Of an adapter.
        most: Trained tokens; the first row is taken whole.
    """
    from safetensors.numpy import load_file

    path = folder / HELD_OUT
    if not path.is_file():
        return []
    arrays = load_file(path)
    starts = arrays["starts"]
    rows: list[ScoredRow] = []
    number = 0
    for begin, end in pairwise(starts):
        ids = torch.from_numpy(arrays["input_ids"][begin:end].astype(np.int64))
        places = torch.from_numpy(np.flatnonzero(arrays["is_trained"][begin:end][1:]))
        if not len(places) or (rows and number + len(places) > most):
            continue
        rows.append(ScoredRow(ids, places))
        number += len(places)
    return rows


def write_reference(model: Any, rows: list[ScoredRow], path: Path) -> None:
    """Keep what the trained model says of every token, in float32."""
    number = sum(len(row.places) for row in rows)
    kept: Any = None
    done = 0
    for found in log_probabilities(model, rows):
        if kept is None:
            kept = np.lib.format.open_memmap(
                path, mode="w+", dtype=np.float32, shape=(number, found.shape[1])
            )
        kept[done : done + len(found)] = found.cpu().numpy()
        done += len(found)
    kept.flush()


def log_probabilities(model: Any, rows: list[ScoredRow]) -> Iterator[Tensor]:
    """``(n, V)`` float32 of each row, one after the other."""
    with torch.no_grad():
        for row in rows:
            ids = row.input_ids.unsqueeze(0).to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, row.places.to(model.device)]
            yield functional.log_softmax(logits.float(), dim=-1)


def score(model: Any, rows: list[ScoredRow], reference: Path) -> Score:
    """Ask a merged model what the trained one was asked.

    Args:
        model: That is scored.
        rows: See ``held_out_rows``.
        reference: From ``write_reference``.
    """
    kept = np.lib.format.open_memmap(reference, mode="r")
    sums = torch.zeros(4, dtype=torch.float64)
    done = 0
    for row, own in zip(rows, log_probabilities(model, rows), strict=True):
        theirs = torch.from_numpy(np.array(kept[done : done + len(own)])).to(own.device)
        done += len(own)
        width = min(own.shape[1], theirs.shape[1])  # rows that pad a vocabulary
        own, theirs = own[:, :width], theirs[:, :width]
        targets = row.input_ids[row.places + 1].to(own.device).unsqueeze(1)
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
