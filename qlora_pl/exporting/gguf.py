"""GGUF files, which llama.cpp and Ollama read, through llama.cpp's own converters."""

from __future__ import annotations

from qlora_pl.errors import ConfigurationError
from qlora_pl.exporting.options import ExportOptions
from qlora_pl.inference.source import ModelChoice, ModelSource


def export_gguf(source: ModelSource, choice: ModelChoice, options: ExportOptions) -> str:
    """Write a GGUF file, or what the printed command makes one of; what came of it."""
    raise ConfigurationError("--to: gguf is not there yet.")
