"""``SampleWriter``: the same prompts answered before and after training, as text to read.

Numbers say that a model changed; only an answer says into what.
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from qlora_pl.data.batches.collation import collate_prompts
from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.errors import ConfigurationError
from qlora_pl.files import append_synced, write_atomic
from qlora_pl.modeling.answers.decoding import DecodingConfig
from qlora_pl.modeling.answers.generation import generate_answers
from qlora_pl.modeling.sharding import is_shared
from qlora_pl.modeling.steps.micro_batches import MicroBatchRunner
from qlora_pl.training.run_folders.run_logger import RunLogger
from qlora_pl.training.stopping import is_told_to_stop


class SampleWriter(Callback):
    """Answers a few prompts at the start and the end of a run, to TensorBoard and samples.jsonl.

    Args:
        prompts: Questions to ask; None: the first ``num_prompts`` of the validation rows.
        num_prompts: Validation rows to ask where ``prompts`` is None; 0: no samples.
        every_n_steps: Also ask every so many optimizer steps; None: only before and after.
        decoding: How to draw.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        num_prompts: int = 3,
        every_n_steps: int | None = None,
        decoding: DecodingConfig = DecodingConfig(max_new_tokens=64),  # noqa: B008 (frozen)
    ) -> None:
        if num_prompts < 0:
            raise ConfigurationError(f"samples.num_prompts: must be 0 or more, got {num_prompts}.")
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigurationError(
                f"samples.every_n_steps: must be at least 1, got {every_n_steps}."
            )
        self.prompts = prompts
        self.num_prompts = num_prompts
        self.every_n_steps = every_n_steps
        self.decoding = decoding
        self._last_step = 0
        self._asked_at: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the model that training starts from; a resumed run has asked already."""
        self._last_step = trainer.global_step
        if trainer.ckpt_path is None:
            self._ask(trainer, pl_module)
        elif trainer.is_global_zero:
            self._take_up(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask in between, if that was wished for."""
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            self._ask(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the trained model."""
        if self._asked_at != trainer.global_step:
            self._ask(trainer, pl_module)

    def _ask(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        model = cast(nn.Module, pl_module.model)
        if data is None or not (trainer.is_global_zero or is_shared(model)):
            return
        conversations = self._conversations(data)
        if not conversations:
            return
        prompts = [data.encoder.encode_prompt(conversation) for conversation in conversations]
        batch = collate_prompts(
            prompts, [""] * len(prompts), np.arange(len(prompts)), data.tokenizer.pad_token_id
        )

        def answer(piece: Any) -> list[str]:
            return generate_answers(
                model,
                data.tokenizer,
                piece["input_ids"].to(pl_module.device),
                piece["attention_mask"].to(pl_module.device),
                data.encoder.stop_ids,
                self.decoding,
                should_stop=lambda: is_told_to_stop(trainer, together=is_shared(model)),
            )

        runner = cast(MicroBatchRunner, pl_module.runner)  # asks in pieces where memory asks for it
        answers = list(chain.from_iterable(runner.evaluate(pl_module, batch, answer)))
        if is_told_to_stop(trainer, together=is_shared(model)):  # a resumed run asks again
            return
        self._asked_at = trainer.global_step
        if trainer.is_global_zero:
            self._write(trainer, [c.messages[-1].content for c in conversations], answers)

    def _conversations(self, data: Any) -> list[Conversation]:
        if self.prompts is not None:
            return [Conversation((Message("user", prompt),)) for prompt in self.prompts]
        rows = [c for c in data.splits["val"].conversations.each() if not c.is_plain_text]
        return [conversation.prompt for conversation in rows[: self.num_prompts]]

    def _write(self, trainer: Trainer, questions: list[str], answers: list[str]) -> None:
        step = trainer.global_step
        pairs = list(zip(questions, answers, strict=True))
        lines = [json.dumps({"step": step, "prompt": p, "answer": answer}) for p, answer in pairs]
        append_synced(self._path(trainer), "\n".join(lines) + "\n")
        self._show(trainer, pairs)

    def _show(self, trainer: Trainer, pairs: list[tuple[str, str]]) -> None:
        for log in trainer.loggers:
            if isinstance(log, TensorBoardLogger):
                write = log.log_text if isinstance(log, RunLogger) else log.experiment.add_text
                for place, (question, answer) in enumerate(pairs, start=1):
                    text = f"**{question}**\n\n{answer}"
                    write(f"samples/{place}", text, trainer.global_step)

    @staticmethod
    def _path(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "samples.jsonl"

    def _take_up(self, trainer: Trainer) -> None:
        """Drop answers that a resumed run gives again; show again those of its own step."""
        path, step = self._path(trainer), trainer.global_step
        if not path.exists():
            return
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_atomic(path, "".join(kept))
        answers = [answer for line in kept if (answer := json.loads(line))["step"] == step]
        self._show(trainer, [(answer["prompt"], answer["answer"]) for answer in answers])
        self._asked_at = step if answers else None
