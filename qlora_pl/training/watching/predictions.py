"""``PredictionWriter``: what ``predict`` answered, a JSON line a row, in the order of the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from qlora_pl.files import write_atomic


class PredictionWriter(Callback):
    """Collects the answers of all devices and writes ``predictions.jsonl`` at the end."""

    def __init__(self) -> None:
        self._answers: list[dict[str, Any]] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch's answers."""
        self._answers += outputs

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write every row once: prompt, answer, reference."""
        answers = self._answers
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, answers)
            answers = [answer for part in gathered for answer in part]
        if trainer.is_global_zero:
            answers = sorted(answers, key=lambda answer: answer["row"])
            lines = [
                json.dumps({k: v for k, v in answer.items() if k != "row"}, ensure_ascii=False)
                for answer in answers
            ]
            write_atomic(
                Path(trainer.default_root_dir) / "predictions.jsonl", "\n".join(lines) + "\n"
            )
