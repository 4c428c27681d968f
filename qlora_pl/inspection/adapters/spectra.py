"""What B A is, told from its two thin factors: the product itself is never formed.

With B = Q R and A' = P S, the product's singular values are those of the small matrix R S', and the
inner product of two such products is the sum over (B1' B2) times (A1 A2').
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_pl.inspection.adapters.matrices import Pair

NEGLIGIBLE = 1e-3
"""Singular values below this share of the largest count for nothing."""


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Of scale x B A."""

    norm: float
    """Frobenius."""
    largest: float
    """Singular value."""
    effective_rank: float
    """exp of the entropy of the singular values, each as a share of their sum (Roy and Vetterli
    2007); 0 for a matrix of zeros."""
    stable_rank: float
    """Squared norm over the squared largest singular value."""
    used_rank: int
    """Singular values that are not negligible beside the largest."""


def singular_values(pair: Pair) -> Tensor:
    """``(r,)`` float64 of scale x B A, descending."""
    b, a = pair.b.double(), pair.a.double()
    core = _triangle(b) @ _triangle(a.t()).t()
    return abs(pair.scale) * torch.linalg.svdvals(core)


def _triangle(tall: Tensor) -> Tensor:
    """R of a QR decomposition; a matrix that is not tall is its own."""
    return torch.linalg.qr(tall, mode="r").R if tall.shape[0] > tall.shape[1] else tall


def spectrum(pair: Pair) -> Spectrum:
    """Norms and ranks of a pair whose values are all finite."""
    values = singular_values(pair)
    largest = float(values[0])
    if largest == 0:
        return Spectrum(norm=0.0, largest=0.0, effective_rank=0.0, stable_rank=0.0, used_rank=0)
    shares = values / values.sum()
    entropy = -float(torch.special.xlogy(shares, shares).sum())
    squared = float(values.square().sum())
    return Spectrum(
        norm=squared**0.5,
        largest=largest,
        effective_rank=math.exp(entropy),
        stable_rank=squared / largest**2,
        used_rank=int((values > NEGLIGIBLE * largest).sum()),
    )


def inner_product(one: Pair, other: Pair) -> float:
    """Of scale x B A of both, as if they were vectors; of the same shape, of any ranks."""
    across_outputs = one.b.double().t() @ other.b.double()
    across_inputs = one.a.double() @ other.a.double().t()
    return one.scale * other.scale * float((across_outputs * across_inputs).sum())
