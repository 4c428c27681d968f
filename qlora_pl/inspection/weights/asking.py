"""What quantising a part of a base does to what it says: KL and perplexity beside the whole one.

Matrices of the loaded model are replaced by what they decode to, the held-out rows are read, and
the matrices are put back; so a group of them is quantised alone, or all but some.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qlora_pl.inspection.weights.formats import Format, decoded
from qlora_pl.inspection.weights.opening import OpenBase
from qlora_pl.merging.scored_rows import ScoredRow
from qlora_pl.merging.scoring import Score, score, write_reference
from qlora_pl.modeling.base.structure import is_conv1d


class Questioner:
    """Asks a base with some of its matrices quantised.

    Args:
        base: Loaded, and unquantised.
        rows: To ask.
        folder: Where the whole base's answers are kept meanwhile: 4 bytes for each entry of the
            vocabulary and scored token.
        bar: Told of tokens read.
    """

    def __init__(self, base: OpenBase, rows: Sequence[ScoredRow], folder: Path, bar: Any) -> None:
        self._base, self._rows, self._bar = base, rows, bar
        self._reference = folder / "reference.npy"
        write_reference(base.model, rows, self._reference, bar)

    def score(self, modules: Collection[str], format: Format) -> Score:
        """The base with these modules quantised, beside the whole one."""
        with _quantised(self._base, modules, format):
            return score(self._base.model, self._rows, self._reference, self._bar)


@contextmanager
def _quantised(base: OpenBase, modules: Collection[str], format: Format) -> Iterator[None]:
    """Within the block, these modules have the weights that their codes decode to."""
    kept = {}
    try:
        for module in modules:
            matrix = base.matrix(module)
            if format.block_size is not None and matrix.shape[1] % format.block_size:
                continue
            owner = base.model.get_submodule(module)
            ((_, values),) = decoded(matrix, [format])
            kept[module] = owner.weight.data
            values = values.t() if is_conv1d(owner) else values
            owner.weight.data = values.to(owner.weight.dtype).contiguous()
        yield
    finally:
        with torch.no_grad():
            for module, data in kept.items():
                base.model.get_submodule(module).weight.data = data
