"""Writes what a run has made at each save, and proves that what was written is what was trained.

Every folder is read back and compared, tensor by tensor and byte by byte, with what was handed
over; at a run's first and last save the tensors read back also have to give the same logits. An
empty or half-gathered adapter is found at step 1, not after days.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from qlora_pl.data.encoding.served_template import served_tokenizer
from qlora_pl.errors import TrainingStoppedError
from qlora_pl.files import sha256_file
from qlora_pl.modeling.base.encoder_decoder import auto_class_name, whole_inputs
from qlora_pl.modeling.evaluation_mode import evaluation_mode
from qlora_pl.modeling.folders.adapter_folder import (
    HELD_OUT_ROWS,
    AdapterManifest,
    companion_files,
    read_adapter_folder,
    read_adapter_tensors,
    write_adapter_folder,
)
from qlora_pl.modeling.folders.model_folder import read_tensor_digests, write_model_folder
from qlora_pl.modeling.loading.base_loading import bitsandbytes_config
from qlora_pl.modeling.parameters import adapter_tensors
from qlora_pl.training.run_folders.card_facts import lasting_facts, losses_so_far
from qlora_pl.training.run_folders.run_folder import recorded_digest

PROBE_TOKENS = 64
VERSIONED = ("qlora-pl", "torch", "lightning", "transformers", "peft", "bitsandbytes", "datasets")


@dataclass(frozen=True)
class ProductSave:
    """A step's folder as two jobs for another thread; both raise ``QLoRAError``."""

    write: Callable[[], None]
    verify: Callable[[Path], None]
    """Reads it back, and the checkpoint at this path."""


class AdapterSaver:
    """Makes the save of a step's adapter folder, or model folder, ready to be written.

    Args:
        save_held_out: Whether encoded validation rows go into the folder.
    """

    def __init__(self, save_held_out: bool) -> None:
        self.save_held_out = save_held_out
        self._held_out: dict[str, np.ndarray] | None = None
        self._companions: dict[str, bytes] | None = None
        self._facts: dict[str, Any] | None = None
        self._tokenizer: Any = None

    def prepare(
        self,
        trainer: Trainer,
        module: LightningModule,
        trained: Mapping[str, Tensor],
        folder: Path,
        step: int,
    ) -> ProductSave:
        """Collect everything that the folder will hold.

        An adapter's save holds copies alone. A whole model's reads the live weights, of which a
        copy might not fit into the host's memory: it is written while training waits.

        Args:
            trainer: Of the run.
            module: What is trained.
            trained: Copies of its trained tensors by name; used for an adapter.
            folder: To be written.
            step: Optimizer steps done.

        Raises:
            TrainingStoppedError: if an adapter is dead, or a temporary folder cannot be written to.
        """
        model: Any = module.model
        data = getattr(trainer, "datamodule", None)
        run_yaml = _run_yaml(folder.parents[1])
        if self._facts is None:
            self._facts = lasting_facts(module, data, run_yaml)
        card = self._facts | {"history": losses_so_far(trainer, step)}
        manifest = replace(make_manifest(module, data, step), card=card)
        if self._held_out is None and self.save_held_out and data is not None:
            self._held_out = held_out_rows(data)
        if self._tokenizer is None and data is not None:
            self._tokenizer = served_tokenizer(data.encoder)
        tokenizer = self._tokenizer
        if module.product == "model":
            return _model_save(folder, model, tokenizer, manifest, run_yaml, self._held_out)
        tensors = adapter_tensors(
            model, {name.removeprefix("model."): tensor for name, tensor in trained.items()}
        )
        if not module.is_untouched:
            refuse_dead_adapters(tensors, step)
        # Once: it is the same at each save, and megabytes of a tokenizer take a while to write.
        companions = self._companions or companion_files(model, tokenizer, manifest)
        self._companions, held_out = companions, self._held_out
        return ProductSave(
            lambda: write_adapter_folder(folder, tensors, companions, manifest, run_yaml, held_out),
            lambda checkpoint: verify_save(folder, tensors, checkpoint),
        )

    @staticmethod
    def prove(trainer: Trainer, module: LightningModule, folder: Path) -> None:
        """The tensors in a folder must give the logits of the model that was trained.

        Where every rank holds a part of the model the forward would need all of them, and the other
        ranks are elsewhere; there the comparison of bytes in ``verify_save`` is the proof.

        Raises:
            TrainingStoppedError: if they do not.
        """
        shards = getattr(trainer.strategy, "shards_parameters", False)
        if module.product == "adapter" and not shards:
            compare_logits(module, read_adapter_tensors(folder), folder)


def _model_save(
    folder: Path,
    model: nn.Module,
    tokenizer: Any,
    manifest: AdapterManifest,
    run_yaml: str,
    held_out: Mapping[str, np.ndarray] | None,
) -> ProductSave:
    digests: dict[str, str] = {}

    def write() -> None:
        digests.update(write_model_folder(folder, model, tokenizer, manifest, run_yaml, held_out))

    return ProductSave(write, lambda checkpoint: verify_model_save(folder, digests, checkpoint))


def _run_yaml(run: Path) -> str:
    path = run / "run.yaml"
    return path.read_text() if path.is_file() else "# Not started from a configuration file.\n"


def make_manifest(module: Any, data: Any, step: int) -> AdapterManifest:
    """What the adapter of this run belongs to."""
    described = module.describe()
    if Path(described["base"]["name"]).is_dir():  # must lead to the base from any directory
        described["base"]["name"] = str(module.identity.folder.resolve())
    quantization_config = None
    if module.quantization.is_quantized:
        plain = bitsandbytes_config(
            module.quantization, module.base.compute_dtype, module.plan
        ).to_dict()
        quantization_config = {
            key: value
            for key, value in plain.items()
            if key.startswith("bnb_4bit" if module.quantization.is_four_bits else "llm_int8")
            or key in ("load_in_4bit", "load_in_8bit", "llm_int8_skip_modules")
        }
    return AdapterManifest(
        base=described["base"] | {"revision": module.revision},
        quantization=described["quantization"],
        quantization_config=quantization_config,
        lora=described["lora"],
        template=data.template.name if data is not None else "",
        stop_token_ids=sorted(data.encoder.stop_ids) if data is not None else [],
        max_length=data.max_length if data is not None else 0,
        step=step,
        data=data.describe() if data is not None else {},
        versions={name: version(name) for name in VERSIONED},
        vocabulary_size=module.vocabulary_size,
        encoding=data.encoder.definition() if data is not None else {},
        auto_class=auto_class_name(module.base.model),
    )


def held_out_rows(data: Any) -> dict[str, np.ndarray] | None:
    """Up to 64 encoded validation rows as flat arrays; None when there are none."""
    rows = data.splits["val"].rows
    if not len(rows):
        return None
    some = rows.select(range(min(HELD_OUT_ROWS, len(rows)))).compact()
    return {
        "input_ids": some.input_ids,
        "is_trained": some.is_trained.astype(np.uint8),
        "starts": np.append(some.starts, len(some.input_ids)),
    }


# -- checks ----------------------------------------------------------------------------------------


def refuse_dead_adapters(tensors: Mapping[str, Tensor], step: int) -> None:
    """After a step every B has moved away from zero, or it is not being trained.

    Raises:
        TrainingStoppedError: naming the first dead one.
    """
    dead = [name for name, t in tensors.items() if "lora_B" in name and not t.any()]
    if dead and step > 0:
        raise TrainingStoppedError(
            f"After step {step} the adapter '{dead[0]}' is still zero ({len(dead)} such): it gets "
            "no gradient, so training it would change nothing."
        )


def verify_save(folder: Path, tensors: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Read a save back and compare it with what was handed over.

    Raises:
        TrainingStoppedError: naming the first difference.
    """
    read_adapter_folder(folder)  # every file against its SHA-256
    read = read_adapter_tensors(folder)
    different = [
        name for name in tensors if name not in read or not _same_bytes(tensors[name], read[name])
    ]
    if different or read.keys() != tensors.keys():
        raise TrainingStoppedError(
            f"'{folder}' does not hold what was trained: {(different or ['extra tensors'])[0]} "
            "differs after reading it back; check the disk."
        )
    refuse_altered_checkpoint(checkpoint)


def verify_model_save(folder: Path, digests: Mapping[str, str], checkpoint: Path) -> None:
    """Read a whole model back and compare its tensors' digests with what was handed over.

    Raises:
        TrainingStoppedError: naming the first difference.
    """
    read_adapter_folder(folder)
    read = read_tensor_digests(folder)
    # Families whose files name or cut tensors differently from the model are held by file alone.
    different = [name for name in digests if name in read and read[name] != digests[name]]
    if different or not read:
        raise TrainingStoppedError(
            f"'{folder}' does not hold what was trained: {(different or ['every tensor'])[0]} "
            "differs after reading it back; check the disk."
        )
    refuse_altered_checkpoint(checkpoint)


def refuse_altered_checkpoint(checkpoint: Path) -> None:
    """A checkpoint must still be what its digest says.

    Raises:
        TrainingStoppedError: if it is not.
    """
    if sha256_file(checkpoint) != recorded_digest(checkpoint):
        raise TrainingStoppedError(f"'{checkpoint}' differs from what was written; check the disk.")


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def compare_logits(module: LightningModule, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Swap the tensors that were read back into the live model; its logits must not change a bit.

    Raises:
        TrainingStoppedError: if they do, or are not finite before.
    """
    import peft  # slow to import

    model: Any = module.model
    vocabulary = model.get_input_embeddings().weight.shape[0]
    probe = torch.arange(PROBE_TOKENS, device=module.device).remainder(vocabulary).unsqueeze(0)
    inputs = whole_inputs(model, probe)
    live = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    kept = {name: tensor.clone() for name, tensor in live.items()}
    with evaluation_mode(model), torch.no_grad():
        before = model(**inputs, use_cache=False).logits
        peft.set_peft_model_state_dict(model, dict(tensors))
        after = model(**inputs, use_cache=False).logits
        peft.set_peft_model_state_dict(model, kept)
    if not before.isfinite().all():
        raise TrainingStoppedError(
            f"The model that '{folder}' was saved of gives logits that are not finite: its weights "
            "have grown too large; lower model.optimizer.lr."
        )
    if not torch.equal(before, after):
        raise TrainingStoppedError(
            f"The adapter in '{folder}' gives other logits than the model that was trained."
        )
