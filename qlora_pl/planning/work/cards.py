"""Graphics cards: what their memory really holds, how fast they are, and what an hour costs.

In: a name (``a6000``) or a bare size (``24GiB``). Out: a ``Card``.

Peak arithmetic is the dense 16-bit tensor rate with float32 sums, bandwidth and power are the
board's, all as NVIDIA states them: datasheets of T4, V100 (SXM2), RTX A6000, L40S, A100 (SXM), H100
(SXM) and H200 (SXM); the GA102 and Ada architecture whitepapers for the RTX 3060, 3090 and 4090,
whose tensor cores add in float32 at half the rate that is advertised. Memory is what PyTorch
reports as a card's total capacity, the least value found in public error messages: up to 8 per cent
less than the name says, since error correction and the driver take their part. Prices are examples
from rental offers of 2026, in US dollars; offers for one card differ by a factor of two to four.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from qlora_pl.errors import ConfigurationError, did_you_mean

GIB = 2**30
MOST = 1024 * GIB
"""No card comes near it; a size beyond is a slip of the unit."""
UNITS = {
    "tib": 2**40,
    "gib": GIB,
    "mib": 2**20,
    "tb": 10**12,
    "gb": 10**9,
    "mb": 10**6,
}
SIZE = re.compile(r"(-?\d+(?:\.\d*)?|-?\.\d+)\s*([a-z]*)")


@dataclass(frozen=True, kw_only=True)
class Card:
    """One card; a bare size knows nothing but its memory."""

    name: str
    memory_bytes: int
    """What a process can use of it at most, its CUDA context included."""
    flops: float | None = None
    """Floating-point operations a second in 16-bit matrix products, at their peak."""
    bandwidth: float | None = None
    """Bytes a second between its memory and its cores, at their peak."""
    watts: float | None = None
    """Power of the board under load."""
    price_per_hour: float | None = None
    """An example, in US dollars."""
    has_bfloat16: bool = True
    """Whether it multiplies bfloat16 natively; others take float16, with a loss scaler."""

    @property
    def is_named(self) -> bool:
        """Whether more than its memory is known."""
        return self.flops is not None


def _card(
    name: str,
    gib: float,
    tflops: float,
    gb_per_second: float,
    watts: float,
    price: float,
    has_bfloat16: bool = True,
) -> Card:
    return Card(
        name=name,
        memory_bytes=int(gib * GIB),
        flops=tflops * 1e12,
        bandwidth=gb_per_second * 1e9,
        watts=watts,
        price_per_hour=price,
        has_bfloat16=has_bfloat16,
    )


CARDS = (
    _card("T4", 14.56, 65, 320, 70, 0.35, has_bfloat16=False),
    _card("V100-16GB", 15.77, 125, 900, 300, 0.50, has_bfloat16=False),
    _card("V100-32GB", 31.73, 125, 900, 300, 0.80, has_bfloat16=False),
    _card("RTX3060", 11.62, 25.5, 360, 170, 0.08),
    _card("RTX3090", 23.56, 71, 936, 350, 0.25),
    _card("RTX4090", 23.52, 165.2, 1008, 450, 0.40),
    _card("A6000", 47.40, 154.8, 768, 300, 0.50),
    _card("L40S", 44.39, 362, 864, 350, 0.90),
    _card("A100-40GB", 39.38, 312, 1555, 400, 1.10),
    _card("A100-80GB", 79.15, 312, 2039, 400, 1.40),
    _card("H100", 79.10, 989, 3350, 700, 2.95),
    _card("H200", 139.72, 989, 4800, 700, 3.80),
)
"""From the least memory of a generation to the most."""


def card_named(word: str) -> Card:
    """The card that a user means by ``--gpu``.

    Of a card with two sizes (``a100``, ``v100``) the smaller one, since what fits there fits on
    the other.

    Args:
        word: A name in any spelling (``rtx 3090``, ``RTX_3090``, ``3090``), or a size with its
            unit.

    Raises:
        ConfigurationError: for an unknown name, with the nearest ones, or a size that is none.
    """
    text = word.strip()
    found = SIZE.fullmatch(text.lower())
    if found and (found[2] or _plain(text) not in _by_plain_name()):
        return _bare_size(text, float(found[1]), found[2])
    known = _by_plain_name()
    if (card := known.get(_plain(text))) is not None:
        return card
    names = ", ".join(card.name for card in CARDS)
    near = did_you_mean(_plain(text), known)
    raise ConfigurationError(
        f"--gpu: no card is called '{word}' (there are {names}, or a size such as 24GiB)"
        f"{_in_full(near, known)}"
    )


def _bare_size(text: str, number: float, unit: str) -> Card:
    if unit not in UNITS and not (number == 0 and not unit):
        raise ConfigurationError(
            f"--gpu: '{text}' is a size without a unit that is known; write {abs(number):g}GiB, or "
            "the name of a card."
        )
    size = number * UNITS.get(unit, 1)
    if not math.isfinite(size) or size < 1:
        raise ConfigurationError(
            f"--gpu: '{text}' is no memory; write a size above 0, such as 24GiB."
        )
    if size > MOST:
        raise ConfigurationError(
            f"--gpu: '{text}' is more than a card can have ({MOST // GIB:,} GiB at most here); "
            "write the memory of one card."
        )
    return Card(name=text, memory_bytes=int(size))


def _plain(name: str) -> str:
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"^(nvidia)?(geforce|tesla|quadro)?(rtx|gtx)?", "", letters)


def _by_plain_name() -> dict[str, Card]:
    """Cards by every spelling that is taken, all in ``_plain`` letters."""
    known = {_plain(card.name): card for card in CARDS}
    for card in reversed(CARDS):  # so that the smaller of two sizes comes last, and stays
        known[_plain(card.name.partition("-")[0])] = card
    return known | {"h100sxm": known["h100"], "h200sxm": known["h200"]}


def _in_full(end: str, known: dict[str, Card]) -> str:
    """The end of a sentence about the nearest name, with the card's own spelling."""
    found = re.search(r"'(.*)'", end)
    return end.replace(found[1], known[found[1]].name) if found else end


def with_price(card: Card, price_per_hour: float | None) -> Card:
    """The same card at another price; None: at its own."""
    return card if price_per_hour is None else replace(card, price_per_hour=price_per_hour)
