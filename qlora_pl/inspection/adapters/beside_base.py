"""What share of each weight an adapter changes: its pairs beside the base's matrices.

A matrix at a time is read through the pages of the base's files. With DoRA the change is not B A
alone, and is taken from the matrix that was trained over, which is the quantised one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_pl.errors import AdapterFolderError
from qlora_pl.inspection.adapters.matrices import Adapter, Pair
from qlora_pl.merging.weights import round_trip
from qlora_pl.modeling.base.identity import identify_base, stored_dtype
from qlora_pl.modeling.base.prequantized import is_prequantized
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization
from qlora_pl.modeling.base.structure import is_conv1d
from qlora_pl.modeling.loading.base_loading import from_pretrained

ROWS = 1024
"""Of a DoRA's change that are formed at a time."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What one module's matrix becomes."""

    weight_norm: float
    """Of the base's matrix."""
    norm: float
    """Of the whole change: of B A, or with DoRA of what it makes of the matrix, less the matrix."""

    @property
    def share(self) -> float:
        """Of the weight that is changed; infinite where the weight is zero."""
        if self.weight_norm:
            return self.norm / self.weight_norm
        return float("inf") if self.norm else 0.0


class BaseBeside:
    """A base whose matrices lie beside an adapter's.

    Args:
        adapter: Whose.
        folder: Of its base, in 16 or 32 bits.
        cache_dir: Where fingerprints are kept.
        trust_remote_code: Whether code beside the base may run.

    Raises:
        ConfigurationError: if the base cannot be opened.
        AdapterFolderError: if it is another than the one that was trained over, or does not have
            the adapter's modules.
    """

    def __init__(
        self,
        adapter: Adapter,
        folder: Path,
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._adapter = adapter
        trained = adapter.weights
        if trained is not None and identify_base(str(folder), None, cache_dir).weights != trained:
            raise AdapterFolderError(
                f"--base: '{adapter.folder}' was trained over other weights than those in "
                f"'{folder}'; name its own base."
            )
        self._quantization = _quantization(adapter)
        self._packed: set[str] = set()
        if adapter.config.get("use_dora") and self._quantization.is_quantized:
            skeleton = build_skeleton(folder, "auto", trust_remote_code)
            self._packed = set(plan_quantization(skeleton, self._quantization).quantized)
        self._model: Any = from_pretrained(
            folder,
            {
                "device_map": {"": "cpu"},
                "dtype": stored_dtype(folder),
                "attn_implementation": "eager",
                "trust_remote_code": trust_remote_code,
            },
        )

    def change(self, pair: Pair, norm: float) -> Change:
        """What a pair does to its matrix.

        Args:
            pair: Of the adapter; its values are finite.
            norm: Of its scale x B A.
        """
        owner = self._owner(pair.module)
        weight: Tensor = owner.weight.detach()
        is_transposed = is_conv1d(owner)
        matrix = weight.t() if is_transposed or pair.is_embedding else weight.flatten(1)
        if tuple(matrix.shape) != pair.shape:
            raise AdapterFolderError(
                f"--base: '{pair.module}' is {tuple(matrix.shape)} there, and the adapter's change "
                f"is {pair.shape}; name the adapter's own base."
            )
        if pair.magnitude is None or pair.is_embedding:
            return Change(weight_norm=_norm(matrix), norm=norm)
        if f"{pair.module}.weight" in self._packed:
            kept = round_trip(weight.float(), self._quantization, is_transposed)
            matrix = kept.t() if is_transposed else kept
        squares = sum(float(piece.square().sum()) for piece in _dora_changes(matrix, pair))
        return Change(weight_norm=_norm(matrix), norm=squares**0.5)

    def bias_change(self, name: str, trained: Tensor) -> float:
        """How far a trained bias is from the base's own."""
        own = self._owner(name.rpartition(".")[0]).bias
        start = torch.zeros_like(trained) if own is None else own.detach()
        return float((trained.double() - start.double()).norm())

    def _owner(self, module: str) -> Any:
        try:
            return self._model.get_submodule(module)
        except AttributeError as error:
            raise AdapterFolderError(
                f"--base: there is no '{module}' in it, which the adapter changes; name the "
                "adapter's own base."
            ) from error


def _dora_changes(matrix: Tensor, pair: Pair) -> Iterator[Tensor]:
    """Rows of ``magnitude x direction - matrix``, a few at a time, in float64."""
    assert pair.magnitude is not None
    a = pair.a.double()
    for first in range(0, matrix.shape[0], ROWS):
        some = slice(first, first + ROWS)
        rows = matrix[some].double()
        moved = rows + pair.scale * (pair.b[some].double() @ a)
        lengths = moved.norm(dim=1, keepdim=True)
        yield pair.magnitude[some].double()[:, None] / lengths * moved - rows


def _norm(matrix: Tensor) -> float:
    return sum(float(piece.double().square().sum()) for piece in matrix.split(ROWS)) ** 0.5


def _quantization(adapter: Adapter) -> QuantizationConfig:
    """What the base was in training; without a manifest nobody says."""
    if adapter.manifest is None:
        return QuantizationConfig(quant_type="none")
    trained = adapter.manifest.quantization
    return QuantizationConfig(
        quant_type=trained["quant_type"],
        double_quant=trained["double_quant"] or None,
        block_size=trained["block_size"],
        skip_modules=tuple(trained["skip_modules"]),
    )


def base_at_hand(adapter: Adapter, named: str | None) -> tuple[Path | None, str]:
    """The folder of an adapter's base, and why there is none.

    Args:
        adapter: Whose.
        named: By the user; None: what the adapter says, if that is a folder here.

    Returns:
        The folder or None, and a sentence for the second.
    """
    from qlora_pl.modeling.base.identity import locate_base

    if named is not None:
        folder = locate_base(named, None, None)
    elif adapter.base is not None and (Path(adapter.base) / "config.json").is_file():
        folder = Path(adapter.base)
    else:
        return None, (
            f"What share of each weight it changes is not told: its base "
            f"({adapter.base or 'which no file names'}) is no folder here; name one with --base."
        )
    if is_prequantized(folder):
        return None, (
            f"What share of each weight it changes is not told: '{folder}' is stored in 4 or 8 "
            "bits; name the base in 16 bits with --base."
        )
    return folder, ""
