"""``QLoRAModule``: a frozen 4-bit base with LoRA adapters, in Lightning's hooks.

Its baselines, an unquantised base under adapters or trained whole, go the same way.

``setup`` finds every mistake that the base's configuration can show; ``configure_model`` loads the
weights, on the device of its rank. Only trained tensors are the module's state, so a checkpoint
holds nothing of the base.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from qlora_pl.batch import Batch, PromptBatch
from qlora_pl.modeling.adapters.adapter_start import Start, find_start, start_adapters
from qlora_pl.modeling.adapters.lora import LoRAConfig, refuse_unfit_ranks, resolve_targets
from qlora_pl.modeling.answers.decoding import DecodingConfig
from qlora_pl.modeling.answers.generation import answer_rows
from qlora_pl.modeling.base.base_checksum import BaseWatch
from qlora_pl.modeling.base.encoder_decoder import language_model_loss, refuse_other_rows
from qlora_pl.modeling.base.identity import BaseIdentity, identify_base, refuse_unpinned_code
from qlora_pl.modeling.base.prequantized import make_plan
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import AttentionKernel, build_skeleton
from qlora_pl.modeling.base.vocabulary import check_vocabulary, rows_of
from qlora_pl.modeling.compatibility import describe_run, refuse_other_tensors
from qlora_pl.modeling.full_training import refuse_packed_weights
from qlora_pl.modeling.loading.assembly import load_adapted, shards_parameters
from qlora_pl.modeling.loading.base_loading import LoadedBase, prepare_for_training
from qlora_pl.modeling.loading.sharded_loading import refuse_unshardable
from qlora_pl.modeling.module_checkpoint import (
    PIECES,
    add_to_checkpoint,
    key_by_index,
    refuse_other_run,
)
from qlora_pl.modeling.optimization.gradients import scale_gradients
from qlora_pl.modeling.optimization.mixed_precision import SkippedSteps, choose_precision
from qlora_pl.modeling.optimization.optimizers import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    build_schedule,
    warn_of_high_rate,
)
from qlora_pl.modeling.optimization.state_precision import refuse_shard_count
from qlora_pl.modeling.parameters import trainable_tensors
from qlora_pl.modeling.sharding import copy_into, is_sharded, unit_names, whole
from qlora_pl.modeling.steps.loss import Normalization
from qlora_pl.modeling.steps.micro_batches import MicroBatchRunner, OnOutOfMemory
from qlora_pl.modeling.steps.packing_certificate import settle_packing
from qlora_pl.modeling.steps.split_loss import SplitLoss
from qlora_pl.modeling.steps.step import (
    MicroBatch,
    StepStatistics,
    refuse_other_sums,
    refuse_silent_adapters,
    refuse_unsettled,
    stop_if_diverged,
    sum_over_step,
)
from qlora_pl.modeling.summary import summarize

logger = logging.getLogger(__name__)


class QLoRAModule(LightningModule):
    """A language model in 4 bits, causal or encoder-decoder, with LoRA adapters to train.

    Args:
        model_name_or_path: The base: a folder, or a name on the Hub.
        revision: Commit or tag of a Hub model; None: the newest.
        cache_dir: Where downloads and packed 4-bit weights are kept; None: the Hub's default for
            the first, ``QLORA_PL_CACHE`` or ``~/.cache/qlora_pl`` for the second.
        quantization: How the frozen base is stored and multiplied.
        lora: What is trained.
        optimizer: What steps it.
        schedule: How the learning rate changes.
        decoding: How ``predict`` answers.
        normalize_loss_by: ``tokens``: every trained token of a step weighs the same. ``rows``:
            every row does. ``micro_batches``: the original's mean of means.
        on_oom: What a batch comes to that does not fit into memory. ``split``: it is repeated in
            halves with the same gradient, and all that follow are halved too. ``stop``: the run
            ends.
        gradient_checkpointing: Recompute activations in the backward pass: a third more
            arithmetic, and memory for one layer instead of all. ``auto``: only where they do not
            fit otherwise.
        attn_implementation: transformers' attention kernel; auto: sdpa, or eager for families
            that have no other (BLOOM, Gemma 2).
        trust_remote_code: Whether Python code of the model may run; a Hub model needs a revision.
        grow_vocabulary: Whether tokens without an embedding row get one, trained and saved.
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
        on_oom: OnOutOfMemory = "split",
        gradient_checkpointing: bool | Literal["auto"] = True,
        attn_implementation: AttentionKernel = "auto",
        trust_remote_code: bool = False,
        grow_vocabulary: bool = False,
    ) -> None:
        super().__init__()
        refuse_packed_weights(quantization, lora)
        refuse_unpinned_code(model_name_or_path, revision, trust_remote_code)
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
        self.after_loading: Callable[[], None] | None = None
        """Called once the model is there, before there are loaders and an optimizer."""
        self.attn_implementation = attn_implementation
        self.trust_remote_code = trust_remote_code
        self.grow_vocabulary = grow_vocabulary
        self.model: nn.Module | None = None
        self.base: LoadedBase | None = None
        self.identity: BaseIdentity | None = None
        self.last_step: StepStatistics | None = None
        self.last_evaluation: dict[str, float] = {}
        self.on_oom = on_oom
        self.runner = MicroBatchRunner(on_oom)
        self._micro_batches: list[MicroBatch] = []
        self._skipped = SkippedSteps()
        self.base_watch = BaseWatch()
        self._resumed: dict[str, Any] | None = None
        self.start: Start = None
        self.split_loss = SplitLoss()
        self.strict_loading = True

    @property
    def product(self) -> str:
        """What a run makes: an ``adapter``, or a whole ``model``."""
        return "adapter" if self.lora.has_adapters else "model"

    @property
    def is_untouched(self) -> bool:
        """Whether the loss scaler has left out the last step, and so maybe all."""
        return self.last_step is not None and self.last_step.is_skipped

    # -- loading ---------------------------------------------------------------------------------

    def identify(self) -> BaseIdentity:
        """Find and fingerprint the base."""
        return identify_base(self.model_name_or_path, self.revision, self.cache_dir)

    def prepare_data(self) -> None:
        """Fetch and fingerprint the base, once a machine."""
        self.identify()

    def setup(self, stage: str) -> None:
        """Check everything that the base's configuration can show, before weights are loaded."""
        refuse_other_sums(self.trainer)
        refuse_unsettled(self)
        if self.model is not None:
            return
        self.identity = self.identify()
        skeleton = build_skeleton(
            self.identity.folder, self.attn_implementation, self.trust_remote_code
        )
        refuse_other_rows(skeleton, getattr(self.trainer, "datamodule", None))
        self.plan = make_plan(self.identity.folder, skeleton, self.quantization)
        if self.lora.has_adapters:
            targets = resolve_targets(skeleton, self.lora)
            refuse_unfit_ranks(skeleton, self.lora, targets)
            self.start = find_start(self.lora, self.identity, targets)
        if self.tokenizer is not None:
            check_vocabulary(self.tokenizer, skeleton, self.grow_vocabulary)
            rows_of(skeleton, self.tokenizer, self.lora.trainable_tokens)
        if shards_parameters(self.trainer):
            refuse_unshardable(self.quantization, self.lora, self.grow_vocabulary)
            refuse_shard_count(self.optimizer_config.name, self.trainer.world_size)
            unit_names(skeleton)
        warn_of_high_rate(self.optimizer_config.lr, skeleton)

    @property
    def tokenizer(self) -> Any:
        """The data module's, if there is one."""
        return getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)

    def configure_model(self) -> None:
        """Load the base on this rank's device and attach adapters; a second call returns."""
        if self.model is not None:
            self._prepare_for(self.trainer)  # which may be another
            return
        self.base, self.model, self.vocabulary_size = load_adapted(self)
        prepare_for_training(self.model, self.gradient_checkpointing is True)
        self._prepare_for(self.trainer)
        if self.after_loading is not None:
            self.after_loading()
        if self.trainer.is_global_zero:
            name = self.model_name_or_path
            logger.info("%s", summarize(name, self.model, self.base, self.quantization))

    def _prepare_for(self, trainer: Any) -> None:
        assert self.base is not None
        choose_precision(trainer.strategy, self.base.compute_dtype, self._adapted)
        settle_packing(self, trainer)

    def on_fit_start(self) -> None:
        """Begin where ``model.lora`` says; earlier hooks cannot tell whether a run is resumed."""
        start_adapters(self)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def on_train_start(self) -> None:
        """Begin dropout where the seed says, whatever happened while loading and sampling."""
        if self.trainer.ckpt_path is None and "PL_GLOBAL_SEED" in os.environ:
            torch.manual_seed(int(os.environ["PL_GLOBAL_SEED"]))
        self._check_base("before training")

    def on_train_batch_end(self, *_: Any) -> None:
        """A strategy or a kernel that changes the base does so in the first step."""
        if self.trainer.global_step == 1 and not self._micro_batches:
            self._check_base("in step 1")

    def _check_base(self, when: str) -> None:
        self.base_watch.check(self._adapted, self.device, when)

    # -- steps -----------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Make the batch's gradients; ``on_before_optimizer_step`` divides by the step's weight.

        Returns the sum of its losses; Lightning divides by the accumulation, hence the factor.
        """
        loss = self.runner.add_gradients(self, batch, len(self._micro_batches) + 1)
        self._micro_batches.append(MicroBatch.of(loss, batch))
        return loss.total * self.trainer.accumulate_grad_batches

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``training_step`` has done it, since a piece comes after another's backward."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Nothing: a step's first micro-batch drops the gradients of the step before."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn gradients of sums into gradients of the step's mean; runs before clipping."""
        trainer, new_splits = self.trainer, self.runner.num_new_splits
        sums = sum_over_step(self._micro_batches, trainer.world_size, self.device, new_splits)
        trained = self.trained_tensors()
        gradients = [p.grad for p in trained.values() if p.grad is not None]
        scale_gradients(gradients, 1 / (sums.weight or 1.0))
        self.last_step = StepStatistics.of(
            sums, self._micro_batches, gradients, optimizer, trainer.precision_plugin
        )
        stop_if_diverged(self.last_step, self._micro_batches, trainer)
        self._skipped.count(self.last_step.is_skipped, trainer.global_step + 1)
        if trainer.global_step == 0 and not self.last_step.is_skipped:
            refuse_silent_adapters(trained)
        self.runner.agree(sums.new_splits, self)
        self._micro_batches.clear()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch's token losses to the split's sum."""
        run = partial(language_model_loss, self._adapted)
        for loss in self.runner.evaluate(self, batch, run):
            self.split_loss.update(loss)

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
        values = self.split_loss.finish(split)
        self.runner.agree_on_evaluation(self.trainer)
        self.last_evaluation = {name: float(value) for name, value in values.items()}
        # Loggers get them from RunMetrics, by optimizer steps done; Lightning's step lags behind.
        self.log_dict(values, prog_bar=True, logger=False)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Answers, one mapping a row: row, prompt, answer, reference."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        stop_ids = data.encoder.stop_ids

        def answer(piece: Any) -> list[dict[str, Any]]:
            return answer_rows(self._adapted, data.tokenizer, piece, stop_ids, self.decoding)

        return list(chain.from_iterable(self.runner.evaluate(self, batch, answer)))

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
            key_by_index(self, self._resumed, optimizer)
            self._resumed = None
        schedule = build_schedule(self.schedule_config, optimizer, self._num_training_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

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
        """The trained tensors alone: the base is never saved, it is found by its fingerprint.

        Sharded ones are made whole, for which every process has to ask.
        """
        prefix = kwargs.get("prefix", "")
        return {
            f"{prefix}{name}": whole(p.detach()).cpu() if is_sharded(p) else p.detach()
            for name, p in self.trained_tensors().items()
        }

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> None:
        """Copy trained tensors in; their names and shapes must be exactly this module's.

        Raises:
            CheckpointError: naming what differs.
        """
        own = self.trained_tensors()
        refuse_other_tensors(own, state_dict)
        for name, parameter in own.items():
            copy_into(parameter, state_dict[name])

    def describe(self) -> dict[str, Any]:
        """What a checkpoint of this module can be continued by, in plain types."""
        return describe_run(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what this run is, and key the optimizer's state by parameter name.

        Raises:
            TrainingStoppedError: if the frozen base has changed since it was loaded.
        """
        self._check_base(f"before step {self.trainer.global_step} was saved")
        add_to_checkpoint(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what another base, adapter or optimizer wrote.

        Raises:
            CheckpointError: naming each difference with both values.
        """
        refuse_other_run(self, checkpoint)
        self.runner.load_state_dict(checkpoint.get(PIECES, {}))
        if not self.trainer.optimizers:  # Lightning restores the model before it builds these
            self._resumed = checkpoint
        else:
            key_by_index(self, checkpoint, self.trainer.optimizers[0])
