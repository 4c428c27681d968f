"""Writes what a run has made at each save, and proves that what was written is what was trained.

Every folder is read back and compared, tensor by tensor and byte by byte, with what was handed
over; at a run's first and last save the tensors read back also have to give the same logits. An
empty or half-gathered adapter is found at step 1, not after days.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from qlora_pl.errors import TrainingStoppedError
from qlora_pl.files import sha256_file
from qlora_pl.modeling.adapter_folder import (
    HELD_OUT_ROWS,
    AdapterManifest,
    read_adapter_folder,
    read_adapter_tensors,
    write_adapter_folder,
)
from qlora_pl.modeling.decoding import evaluation_mode
from qlora_pl.modeling.encoder_decoder import auto_class_name, whole_inputs
from qlora_pl.modeling.loading import bitsandbytes_config
from qlora_pl.modeling.model_folder import read_tensor_digests, write_model_folder
from qlora_pl.training.run_folder import digest_path

PROBE_TOKENS = 64
VERSIONED = ("qlora-pl", "torch", "lightning", "transformers", "peft", "bitsandbytes", "datasets")


class AdapterSaver:
    """Writes and verifies; the reading happens in a thread of its own.

    Args:
        save_held_out: Whether encoded validation rows go into the folder.
    """

    def __init__(self, save_held_out: bool) -> None:
        self.save_held_out = save_held_out
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="verify-save")
        self._checks: dict[Path, Future[None]] = {}
        self._newest: tuple[Path, dict[str, Any]] | None = None
        self._is_proven = False

    def __getstate__(self) -> dict[str, Any]:  # strategies copy callbacks; threads do not copy
        return {"save_held_out": self.save_held_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["save_held_out"])  # type: ignore[misc]

    def write(self, trainer: Trainer, module: LightningModule, folder: Path, step: int) -> None:
        """Write the adapter folder, or the model folder, of a step.

        Raises:
            TrainingStoppedError: if an adapter is dead, or the folder cannot be written.
        """
        model = module.model
        assert isinstance(model, nn.Module)
        data = getattr(trainer, "datamodule", None)
        contents = (
            data.tokenizer if data is not None else None,
            make_manifest(module, data, step),
            _run_yaml(folder.parents[1]),
            held_out_rows(data) if self.save_held_out and data is not None else None,
        )
        if module.product == "model":
            self._newest = (folder, dict(write_model_folder(folder, model, *contents)))
            return
        tensors = write_adapter_folder(folder, model, *contents)
        if not module.is_untouched:
            refuse_dead_adapters(tensors, step)
        self._newest = (folder, dict(tensors))

    def verify(self, module: LightningModule, checkpoint: Path) -> None:
        """Have what was written read back; at the first save wait for it, and compare logits.

        Raises:
            TrainingStoppedError: if the first save is not what was handed over.
        """
        assert self._newest is not None
        folder, handed_over = self._newest
        check: Any = verify_model_save if module.product == "model" else verify_save
        self._checks[folder] = self._thread.submit(check, folder, handed_over, checkpoint)
        if not self._is_proven:
            self._prove(module)
            self._is_proven = True

    def raise_if_failed(self) -> None:
        """Raise what a finished check found, without waiting for the others."""
        for folder in [folder for folder, check in self._checks.items() if check.done()]:
            self._checks.pop(folder).result()

    def settle(self, folder: Path) -> None:
        """Wait for the check of a folder that is about to be deleted."""
        if folder in self._checks:
            self._checks.pop(folder).result()

    def finish(self, module: LightningModule) -> None:
        """Wait for every check; the last save's tensors must give the trained model's logits."""
        if self._newest is not None:
            self._prove(module)

    def _prove(self, module: LightningModule) -> None:
        assert self._newest is not None
        for folder in list(self._checks):
            self.settle(folder)
        folder, _ = self._newest
        if module.product == "adapter":
            compare_logits(module, read_adapter_tensors(folder), folder)

    @staticmethod
    def publish(source: Path, destination: Path) -> None:
        """Give the finished adapter its name; its files are shared with the step's folder."""
        new = destination.with_name(f".incomplete-{os.getpid()}-{destination.name}")
        old = destination.with_name(f".incomplete-{os.getpid()}-old-{destination.name}")
        shutil.copytree(source, new, copy_function=_link)
        if destination.exists():
            destination.rename(old)
        new.rename(destination)
        shutil.rmtree(old, ignore_errors=True)


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:  # a file system without hard links
        shutil.copy2(source, destination)


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
    if sha256_file(checkpoint) != digest_path(checkpoint).read_text().split()[0]:
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
        TrainingStoppedError: if they do.
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
    if not torch.equal(before, after):
        raise TrainingStoppedError(
            f"The adapter in '{folder}' gives other logits than the model that was trained."
        )
