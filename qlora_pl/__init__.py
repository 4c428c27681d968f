"""QLoRA in PyTorch Lightning: a 4-bit base, LoRA adapters, one YAML per experiment."""

__version__ = "0.1.0"
