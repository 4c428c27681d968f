"""``QLoRAModule``: a frozen 4-bit base with LoRA adapters, in Lightning's hooks.

``setup`` finds every mistake that the base's configuration can show; ``configure_model`` loads the
weights, on the device of its rank. Only trained tensors are the module's state, so a checkpoint
holds nothing of the base.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import SumMetric

from qlora_pl.batch import FILLER_ROW, Batch, PromptBatch
from qlora_pl.errors import CheckpointError, ConfigurationError, TrainingStoppedError
from qlora_pl.modeling.adapters import (
    LoRAConfig,
    attach_adapters,
    count_parameters,
    resolve_targets,
    trainable_tensors,
)
from qlora_pl.modeling.decoding import DecodingConfig, generate_answers
from qlora_pl.modeling.identity import BaseIdentity, identify_base
from qlora_pl.modeling.loading import (
    LoadedBase,
    build_skeleton,
    load_base,
    plan_quantization,
    prepare_for_training,
)
from qlora_pl.modeling.loss import LossSum, Normalization, causal_lm_loss
from qlora_pl.modeling.optimizer_state import (
    named_optimizer_state,
    optimizer_state_from_names,
)
from qlora_pl.modeling.optimizers import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    build_schedule,
)
from qlora_pl.modeling.quantization import QuantizationConfig

logger = logging.getLogger(__name__)

CHECKPOINT_KEY = "qlora_pl"
SHAPING_KEYS = ("r", "alpha", "bias", "target_modules")
"""What of an adapter's settings matters when it is only used."""
LARGE_BASE = 13.5e9  # weights; "13B" models have 13.0e9
LARGE_BASE_LR = 1.0e-4  # the paper's rate above 13B (table 9)


class MicroBatch(NamedTuple):
    """What is remembered of a micro-batch until its step ends."""

    loss: LossSum
    lengths: Tensor
    """``(B,)`` tokens of each row."""
    row_ids: Tensor
    num_padded_tokens: int

    @classmethod
    def of(cls, loss: LossSum, batch: Batch) -> MicroBatch:
        """Without the graph, and without what the batch holds besides."""
        lengths = batch["attention_mask"].sum(dim=1)
        lengths = lengths * (batch["row_ids"] != FILLER_ROW)
        detached = loss._replace(total=loss.total.detach())
        return cls(detached, lengths, batch["row_ids"], batch["attention_mask"].numel())

    def sums(self) -> Tensor:
        """``(7,)`` float64, on the device: no copy to the host until the step ends."""
        lengths = self.lengths.double()
        parts = (
            self.loss.weight,
            self.loss.token_sum,
            self.loss.num_tokens,
            lengths.sum(),
            lengths.new_tensor(self.num_padded_tokens),
            lengths.square().sum(),
            (self.row_ids != FILLER_ROW).sum(),
        )
        return torch.stack([part.double() for part in parts])


@dataclass(frozen=True)
class StepStatistics:
    """What one optimizer step was made of, over all micro-batches and devices."""

    loss: float
    """Nats per trained token."""
    grad_norm: float
    """Norm of all gradients, before clipping."""
    learning_rate: float
    """Of the first parameter group, in this step."""
    num_trained_tokens: int
    num_tokens: int
    """Tokens without padding."""
    num_padded_tokens: int
    """Tokens with padding: what the model computed."""
    num_token_pairs: int
    """Sum of the squared row lengths, for counting the operations of attention."""
    num_rows: int
    row_ids: tuple[int, ...]
    """This device's rows of the step."""


class QLoRAModule(LightningModule):
    """A causal language model in 4 bits, with LoRA adapters to train.

    Args:
        model_name_or_path: The base: a folder, or a name on the Hub.
        revision: Commit or tag of a Hub model; None: the newest.
        cache_dir: Where downloads and packed 4-bit weights are kept; None: the Hub's default for
            the first, ``~/.cache/qlora_pl`` for the second.
        quantization: How the frozen base is stored and multiplied.
        lora: What is trained.
        optimizer: What steps it.
        schedule: How the learning rate changes.
        decoding: How ``predict`` answers.
        normalize_loss_by: ``tokens``: every trained token of a step weighs the same. ``rows``:
            every row does, as in the original's runs with one row a micro-batch.
        gradient_checkpointing: Recompute activations in the backward pass: a third more
            arithmetic, and memory for one layer instead of all.
        attn_implementation: transformers' attention kernel.
        trust_remote_code: Whether Python code in the model's folder may run.
    """

    def __init__(
        self,
        model_name_or_path: str,
        revision: str | None = None,
        cache_dir: str | None = None,
        quantization: QuantizationConfig = QuantizationConfig(),  # noqa: B008 (frozen)
        lora: LoRAConfig = LoRAConfig(),  # noqa: B008
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
        schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008
        decoding: DecodingConfig = DecodingConfig(),  # noqa: B008
        normalize_loss_by: Normalization = "tokens",
        gradient_checkpointing: bool = True,
        attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.model_name_or_path = model_name_or_path
        self.revision = revision
        self.cache_dir = cache_dir
        self.quantization = quantization
        self.lora = lora
        self.optimizer_config = optimizer
        self.schedule_config = schedule
        self.decoding = decoding
        self.normalize_loss_by = normalize_loss_by
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.trust_remote_code = trust_remote_code
        self.model: nn.Module | None = None
        self.base: LoadedBase | None = None
        self.identity: BaseIdentity | None = None
        self.last_step: StepStatistics | None = None
        self.last_evaluation: dict[str, float] = {}
        self._micro_batches: list[MicroBatch] = []
        self._resumed: dict[str, Any] | None = None
        self._val_nats, self._val_tokens = SumMetric(), SumMetric()
        for metric in (self._val_nats, self._val_tokens):
            metric.set_dtype(torch.float64)  # a float32 sum of many nats loses the small ones
        self.strict_loading = True

    # -- loading ---------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Fetch and fingerprint the base, once a machine."""
        identify_base(self.model_name_or_path, self.revision, self.cache_dir)

    def setup(self, stage: str) -> None:
        """Check everything that the base's configuration can show, before weights are loaded."""
        if self.model is not None:
            return
        self.identity = identify_base(self.model_name_or_path, self.revision, self.cache_dir)
        skeleton = build_skeleton(
            self.identity.folder, self.attn_implementation, self.trust_remote_code
        )
        self.plan = plan_quantization(skeleton, self.quantization)
        resolve_targets(skeleton, self.lora)
        self._check_vocabulary(skeleton)
        num_weights = sum(parameter.numel() for parameter in skeleton.parameters())
        if num_weights > LARGE_BASE and self.optimizer_config.lr > LARGE_BASE_LR:
            logger.warning(
                "model.optimizer.lr: %s is high for a base of %.0fB weights; the paper used %s "
                "above 13B.",
                self.optimizer_config.lr,
                num_weights / 1e9,
                LARGE_BASE_LR,
            )

    def _check_vocabulary(self, skeleton: nn.Module) -> None:
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        rows = skeleton.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        if tokenizer is not None and len(tokenizer) > rows:
            raise ConfigurationError(
                f"data.tokenizer: '{tokenizer.name_or_path}' has {len(tokenizer)} tokens, the base "
                f"has {rows} embedding rows; use the base's own tokenizer."
            )

    def configure_model(self) -> None:
        """Load the base on this rank's device and attach adapters; a second call returns."""
        if self.model is not None:
            return
        assert self.identity is not None
        self.base = load_base(
            self.identity,
            self.quantization,
            self.plan,
            device=self.trainer.strategy.root_device,
            cache_dir=self.cache_dir,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self.model = attach_adapters(self.base.model, self.lora, seed)
        prepare_for_training(self.model, self.gradient_checkpointing)
        if self.trainer.is_global_zero:
            logger.info("%s", self.summary())

    def summary(self) -> str:
        """What was loaded and what trains, in a few lines."""
        assert self.model is not None
        assert self.base is not None
        counts = count_parameters(self.model)
        kinds = ", ".join(f"{number:,} in {dtype}" for dtype, number in counts.by_dtype.items())
        lines = [
            f"{self.model_name_or_path}: {counts.total:,} weights ({kinds}), "
            f"{counts.stored_bytes / 2**30:.2f} GiB",
            f"trainable: {counts.trainable:,} ({counts.trainable / counts.total:.3%}), "
            f"multiplied in {str(self.base.compute_dtype).split('.')[-1]}",
        ]
        if self.quantization.is_quantized:
            source = "read from the cache" if self.base.is_from_cache else "quantised now"
            lines.append(f"{len(self.plan.quantized)} matrices in 4 bits, {source}")
            kept = self.plan.kept.items()
            if skipped := [name for name, role in kept if role in ("linear", "other")]:
                lines.append(f"not in 4 bits, as asked: {', '.join(skipped)}")
        return "\n".join(lines)

    def on_train_start(self) -> None:
        """Begin dropout where the seed says, whatever happened while loading and sampling."""
        if self.trainer.ckpt_path is None and "PL_GLOBAL_SEED" in os.environ:
            torch.manual_seed(int(os.environ["PL_GLOBAL_SEED"]))

    # -- steps -----------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of the batch's losses; ``on_before_optimizer_step`` divides by the step's weight.

        Lightning divides by the accumulation in any case, hence the factor.
        """
        loss = causal_lm_loss(self._adapted, batch, self.normalize_loss_by)
        self._micro_batches.append(MicroBatch.of(loss, batch))
        return loss.total * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn gradients of sums into gradients of the step's mean; runs before clipping."""
        sums = self._sum_over_step()
        # Strategies average gradients over devices; the sum is the average times their number.
        factor = self.trainer.world_size / max(sums["weight"], 1.0)
        trained = self.trained_tensors()
        gradients = [p.grad for p in trained.values() if p.grad is not None]
        torch._foreach_mul_(gradients, factor)
        self.last_step = StepStatistics(
            loss=sums["nats"] / max(sums["trained_tokens"], 1.0),
            grad_norm=float(torch.nn.utils.get_total_norm(gradients)),
            learning_rate=optimizer.param_groups[0]["lr"],
            num_trained_tokens=int(sums["trained_tokens"]),
            num_tokens=int(sums["tokens"]),
            num_padded_tokens=int(sums["padded_tokens"]),
            num_token_pairs=int(sums["token_pairs"]),
            num_rows=int(sums["rows"]),
            row_ids=tuple(i for batch in self._micro_batches for i in batch.row_ids.tolist()),
        )
        self._stop_if_diverged(self.last_step)
        if self.trainer.global_step == 0:
            self._check_every_adapter_learns(trained)
        self._micro_batches.clear()

    def _sum_over_step(self) -> dict[str, float]:
        """Sums over this step's micro-batches and all devices, in one exchange."""
        names = (
            "weight",
            "nats",
            "trained_tokens",
            "tokens",
            "padded_tokens",
            "token_pairs",
            "rows",
        )
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        for micro_batch in self._micro_batches:
            sums += micro_batch.sums()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        return dict(zip(names, sums.tolist(), strict=True))

    def _check_every_adapter_learns(self, trained: Mapping[str, nn.Parameter]) -> None:
        silent = [
            name
            for name, parameter in trained.items()
            if "lora_B" in name and (parameter.grad is None or not parameter.grad.any())
        ]
        if silent:
            raise TrainingStoppedError(
                f"Step 1: {len(silent)} adapters received no gradient ('{silent[0]}' is one), so "
                "they would never learn; leave them out of model.lora.target_modules."
            )

    def _stop_if_diverged(self, step: StepStatistics) -> None:
        if step.num_trained_tokens and step.loss == 0.0:
            problem = "the loss is exactly 0"
        elif not math.isfinite(step.loss):
            problem = f"the loss is {step.loss}"
        elif not math.isfinite(step.grad_norm):
            problem = f"the gradient's norm is {step.grad_norm}"
        else:
            return
        bad = [m for m in self._micro_batches if not m.loss.token_sum.isfinite()]
        row_ids = [row for m in bad or self._micro_batches for row in m.row_ids.tolist()]
        data = getattr(self.trainer, "datamodule", None)
        rows = (
            data.name_rows(row_ids[:8]) if data is not None else [f"row {i}" for i in row_ids[:8]]
        )
        more = f" and {len(row_ids) - 8} more" if len(row_ids) > 8 else ""
        saved = getattr(self.trainer.checkpoint_callback, "last_checkpoint", None)
        raise TrainingStoppedError(
            f"Step {self.trainer.global_step + 1}: {problem}, with {', '.join(rows)}{more}; "
            f"nothing was updated, and the last good checkpoint is {saved or 'none yet'}. Lower "
            "model.optimizer.lr, or look at these rows."
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch's token losses to the split's sum."""
        loss = causal_lm_loss(self._adapted, batch)
        self._val_nats.update(loss.token_sum)
        self._val_tokens.update(loss.num_tokens)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss`` (nats per trained token of the whole split) and ``val/perplexity``."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/loss`` and ``test/perplexity``."""
        self._log_evaluation("test")

    def _log_evaluation(self, split: str) -> None:
        num_tokens = self._val_tokens.compute()
        loss = self._val_nats.compute() / num_tokens.clamp(min=1)
        values = {f"{split}/loss": loss.float(), f"{split}/perplexity": loss.exp().float()}
        self.last_evaluation = {name: float(value) for name, value in values.items()}
        # Loggers get them from RunMetrics, by optimizer steps done; Lightning's step lags behind.
        self.log_dict(values, prog_bar=True, logger=False)
        self._val_nats.reset()
        self._val_tokens.reset()

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Answers, one mapping a row: row, prompt, answer, reference."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        answers = generate_answers(
            self._adapted,
            data.tokenizer,
            batch["input_ids"],
            batch["attention_mask"],
            data.encoder.stop_ids,
            self.decoding,
        )
        columns = (batch["row_ids"].tolist(), batch["prompts"], answers, batch["references"])
        return [
            {"row": row, "prompt": prompt, "answer": answer, "reference": reference}
            for row, prompt, answer, reference in zip(*columns, strict=True)
        ]

    @property
    def _adapted(self) -> nn.Module:
        assert self.model is not None, "configure_model has not run"
        return self.model

    # -- optimizer -------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The configured optimizer over the trained tensors, and its schedule."""
        trained = self.trained_tensors()
        optimizer = build_optimizer(self.optimizer_config, list(trained.items()))
        if self._resumed is not None:
            self._name_to_index(self._resumed, optimizer)
        schedule = build_schedule(self.schedule_config, optimizer, self._num_training_steps())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _num_training_steps(self) -> float:
        trainer = self.trainer
        if trainer.max_steps != -1 and trainer.max_epochs in (None, -1):
            return trainer.max_steps
        return trainer.estimated_stepping_batches

    # -- state -----------------------------------------------------------------------------------

    def trained_tensors(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return trainable_tensors(self)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained tensors alone: the base is never saved, it is found by its fingerprint."""
        prefix = kwargs.get("prefix", "")
        return {f"{prefix}{name}": p.detach() for name, p in self.trained_tensors().items()}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> None:
        """Copy trained tensors in; their names and shapes must be exactly this module's.

        Raises:
            CheckpointError: naming what differs.
        """
        own = self.trained_tensors()
        problems = [f"lacks '{name}'" for name in own if name not in state_dict]
        problems += [f"has an unknown '{name}'" for name in state_dict if name not in own]
        problems += [
            f"has '{name}' of shape {tuple(state_dict[name].shape)}, not {tuple(p.shape)}"
            for name, p in own.items()
            if name in state_dict and state_dict[name].shape != p.shape
        ]
        if problems:
            raise CheckpointError(
                f"The checkpoint {problems[0]}"
                + (f" (and {len(problems) - 1} more)." if len(problems) > 1 else ".")
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state_dict[name])

    def describe(self) -> dict[str, Any]:
        """What a checkpoint of this module can be continued by, in plain types."""
        assert self.identity is not None
        assert self.base is not None
        return {
            "base": {
                "name": self.identity.name,
                "weights": self.identity.weights,
                "config": self.identity.config,
            },
            "quantization": {
                "quant_type": self.quantization.quant_type,
                "double_quant": self.quantization.double_quant,
                "skip_modules": list(self.quantization.skip_modules),
                "compute_dtype": str(self.base.compute_dtype).split(".")[-1],
            },
            "lora": asdict(self.lora),
            "optimizer": asdict(self.optimizer_config),
            "schedule": asdict(self.schedule_config),
            "loss": {"normalize_loss_by": self.normalize_loss_by},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what this run is, and key the optimizer's state by parameter name."""
        checkpoint[CHECKPOINT_KEY] = self.describe()
        if "optimizer_states" in checkpoint:
            named = list(self.trained_tensors().items())
            checkpoint["optimizer_states"] = [
                named_optimizer_state(_unwrap(optimizer), named)
                for optimizer in self.trainer.optimizers
            ]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what another base, adapter or optimizer wrote.

        Raises:
            CheckpointError: naming each difference with both values.
        """
        if CHECKPOINT_KEY not in checkpoint:
            raise CheckpointError("The checkpoint was not written by qlora_pl; it holds no record.")
        is_training = self.trainer.state.fn == TrainerFn.FITTING
        saved = checkpoint[CHECKPOINT_KEY]
        if problems := list(_differences(saved, self.describe(), is_training)):
            raise CheckpointError(problems)
        if not self.trainer.optimizers:  # Lightning restores the model before it builds these
            self._resumed = checkpoint
        else:
            self._name_to_index(checkpoint, _unwrap(self.trainer.optimizers[0]))

    def _name_to_index(self, checkpoint: dict[str, Any], optimizer: Optimizer) -> None:
        named = list(self.trained_tensors().items())
        checkpoint["optimizer_states"] = [
            optimizer_state_from_names(state, optimizer, named)
            for state in checkpoint["optimizer_states"]
        ]
        self._resumed = None


def _unwrap(optimizer: Any) -> Optimizer:
    inner: Optimizer = getattr(optimizer, "_optimizer", optimizer)
    return inner


def _differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], is_training: bool
) -> Iterator[str]:
    """One sentence for each value that a checkpoint and this run do not share."""
    if saved["base"]["weights"] != now["base"]["weights"]:
        yield (
            f"The checkpoint's base '{saved['base']['name']}' has other weights than "
            f"'{now['base']['name']}' (fingerprints {saved['base']['weights'][:12]} and "
            f"{now['base']['weights'][:12]}). Name the base it was trained on."
        )
    elif saved["base"]["config"] != now["base"]["config"]:
        yield (
            f"The base '{now['base']['name']}' has the checkpoint's weights, but its config.json "
            "says another computation. Use the configuration it was trained with."
        )
    for group, values in now.items():
        for key, value in values.items() if group != "base" else ():
            matters = is_training or group == "quantization" or key in SHAPING_KEYS
            if matters and saved[group].get(key) != value:
                name = key if group == "loss" else f"{group}.{key}"
                yield (
                    f"The checkpoint was trained with model.{name}={saved[group].get(key)}, this "
                    f"run has {value}. Use the checkpoint's value, or start without --ckpt_path."
                )
