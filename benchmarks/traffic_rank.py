"""One process of traffic.py: a short run that counts what it hands to torch's collectives.

Counted is one optimizer step, through a dispatch mode, which sees the exchanges that C++ starts
too; the steps before it are timed, and the loopback interface's counter is read around them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig
from qlora_pl.strategies.choice import strategy_named

KINDS = {
    "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "broadcast": "broadcast",
    "alltoall": "all_to_all",
}
"""How c10d's operations begin, and what they are called here."""


def loopback_bytes() -> int:
    """What this machine, or this network namespace, has received from itself."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    return 0


class Counting(TorchDispatchMode):
    """Notes each collective's kind and the bytes of its whole buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note an exchange, and carry out whatever it is."""
        namespace, _, name = func.name().partition("::")
        if namespace == "c10d":
            plain = name.lstrip("_")
            kind = next((KINDS[start] for start in KINDS if plain.startswith(start)), plain)
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            # of a gather and a scatter the larger of input and output is the whole
            size = max((t.numel() * t.element_size() for t in tensors), default=0)
            self.seen.append((kind, size))
        return func(*args, **(kwargs or {}))


class Watch(Callback):
    """Times some steps, reads the interface's counter around them, and counts the step after.

    Args:
        warm_up: Steps that nothing is measured of, at least one.
        timed: Steps that are timed.
    """

    def __init__(self, warm_up: int, timed: int) -> None:
        self.first, self.counted = warm_up, warm_up + timed
        self.counter = Counting()
        self.seconds: list[float] = []
        self.received = 0
        self._step = -1
        self._started = 0.0

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """A step begins with its first micro-batch."""
        if self._step == trainer.global_step:
            return
        self._step = trainer.global_step
        if self._step == self.first:
            self.received = -self._received(trainer)
        if self._step == self.counted:
            self.counter.__enter__()
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """A step ends with its last."""
        if trainer.global_step == self._step:
            return
        if self._step == self.counted:
            self.counter.__exit__(None, None, None)
        elif self._step >= self.first:
            self.seconds.append(time.perf_counter() - self._started)
        if self._step == self.counted - 1:
            self.received += self._received(trainer)

    @staticmethod
    def _received(trainer: Trainer) -> int:
        """The interface's counter when every process is here, and before any goes on."""
        if trainer.world_size > 1:
            dist.barrier()
        received = loopback_bytes()
        if trainer.world_size > 1:
            dist.barrier()
        return received


def fit(settings: dict[str, Any], watch: Watch) -> None:
    """Train for as many steps as ``watch`` looks at.

    Args:
        settings: base, rows, folder, strategy, lora_rank, accumulation, checkpointing (whether
            activations are computed again), and batch_size: rows of a micro-batch.
        watch: What is measured by.
    """
    module = QLoRAModule(
        settings["base"],
        quantization=QuantizationConfig(compute_dtype="bfloat16"),
        lora=LoRAConfig(r=settings["lora_rank"]),
        optimizer=OptimizerConfig(name="adamw_torch"),
        gradient_checkpointing=settings["checkpointing"],
    )
    data = InstructionDataModule(
        settings["rows"], template="guanaco", val_size=0, batch_size=settings["batch_size"]
    )
    strategy = "auto" if settings["strategy"] == "one" else settings["strategy"]
    Trainer(
        default_root_dir=settings["folder"],
        max_steps=watch.counted + 1,
        accumulate_grad_batches=settings["accumulation"],
        gradient_clip_val=0.3,
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=strategy_named(strategy),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[watch],
    ).fit(module, data)


def main() -> None:
    """Print what was measured, as JSON behind a word that nothing else says."""
    settings = json.loads(sys.argv[1])
    seed_everything(1)
    watch = Watch(settings["warm_up"], settings["timed"])
    fit(settings, watch)
    measured = {
        "seconds": watch.seconds,
        "loopback_bytes": watch.received / settings["timed"],
        "collectives": watch.counter.seen,
    }
    print("MEASURED" + json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
