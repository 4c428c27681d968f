"""QLoRA in PyTorch Lightning: a 4-bit base, LoRA adapters, one YAML per experiment.

The public names are imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AdapterCheckpoint": "qlora_pl.training.checkpoints.checkpoint",
    "AutoBatch": "qlora_pl.training.memory.auto_batch",
    "DecodingConfig": "qlora_pl.modeling.answers.decoding",
    "InstructionDataModule": "qlora_pl.data.datamodule",
    "LoRAConfig": "qlora_pl.modeling.adapters.lora",
    "OptimizerConfig": "qlora_pl.modeling.optimization.optimizers",
    "QLoRAError": "qlora_pl.errors",
    "QLoRAModule": "qlora_pl.modeling.module",
    "QuantizationConfig": "qlora_pl.modeling.base.quantization",
    "RunMetrics": "qlora_pl.training.watching.monitoring",
    "SampleWriter": "qlora_pl.training.watching.samples",
    "ScheduleConfig": "qlora_pl.modeling.optimization.optimizers",
    "SourceConfig": "qlora_pl.data.reading.sources",
    "generate": "qlora_pl.inference.api",
    "load_adapter": "qlora_pl.inference.api",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'qlora_pl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
