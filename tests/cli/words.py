"""The shortest words of a run, which ``type_in`` completes."""

from __future__ import annotations

FIT = (
    *("fit", "--model.lora.r", "4"),  # the tiny base's narrowest layer has 32 outputs
    *("--model.model_name_or_path", "BASE", "--data.sources", "ROWS"),
)
