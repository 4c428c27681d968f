"""What ``trainer.strategy`` may say, and which strategy that is."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.strategies.strategy import Strategy

from qlora_pl.errors import ConfigurationError, did_you_mean
from qlora_pl.planning.advice.automatic import strategy_for
from qlora_pl.strategies.ddp import AdapterDDP
from qlora_pl.strategies.fsdp2 import FSDP2Strategy

NAMES = ("auto", "ddp", "fsdp2", "fsdp2_offload")
"""Names that a run may give; auto is one process, or on several GPUs what fits them."""
FSDP1 = ("fsdp", "fsdp_cpu_offload", "fully_sharded")


def refuse_other_strategies(trainer: Any) -> None:
    """Only strategies that know about packed bases and sums of losses are offered.

    Args:
        trainer: The parsed settings of the trainer.

    Raises:
        ConfigurationError: naming the ones that are.
    """
    problems = []
    chosen = trainer.strategy
    if isinstance(chosen, str) and chosen in FSDP1:
        problems.append(
            f"trainer.strategy: '{chosen}' cannot flatten packed 4-bit bytes, nor clip by global "
            "norm; take fsdp2 (configs/trainer/fsdp2.yaml), which shards the same base."
        )
    elif isinstance(chosen, str) and chosen not in NAMES:
        problems.append(
            f"trainer.strategy: '{chosen}' is not offered; take ddp, where each device holds the "
            f"whole 4-bit base, or fsdp2, where they share it{did_you_mean(chosen, NAMES)}"
        )
    if not isinstance(chosen, str) and not _is_ours(getattr(chosen, "class_path", "")):
        problems.append(
            f"trainer.strategy: {getattr(chosen, 'class_path', type(chosen).__name__)} is not "
            "offered; write ddp or fsdp2, or name a class of qlora_pl.strategies."
        )
    if trainer.sync_batchnorm:
        problems.append(
            "trainer.sync_batchnorm: language models have no batch normalisation; leave it at "
            "false."
        )
    if problems:
        raise ConfigurationError(problems)


def _is_ours(class_path: str) -> bool:
    return class_path.startswith("qlora_pl.strategies.")


def strategy_named(name: str) -> Strategy | str:
    """The strategy that a name stands for; ``auto`` is left to Lightning, which then takes ours.

    Args:
        name: One of ``NAMES``.
    """
    # What Lightning takes for several devices where it is left to choose.
    StrategyRegistry.register("ddp", AdapterDDP, override=True)
    if name.startswith("fsdp2"):
        return FSDP2Strategy(cpu_offload=name == "fsdp2_offload")
    return AdapterDDP() if name == "ddp" else name


def choose_strategy(whole: float, shared: float, memory: float) -> tuple[str, str]:
    """The strategy for several devices where none was named, and why, in a sentence.

    Args:
        whole: Bytes that training takes of a device which holds the whole base.
        shared: The same where the devices share it.
        memory: Bytes of the smallest device.
    """
    name = strategy_for(whole, shared, memory)
    sizes = f"{whole / 2**30:.1f} GiB of {memory / 2**30:.1f}"
    if name == "ddp":
        return name, f"strategy: ddp, since the whole base trains in about {sizes} on each device."
    waits = "" if name == "fsdp2" else ", so that parts wait in host memory"
    return name, (
        f"strategy: {name}, since the whole base would take about {sizes}; shared it takes about "
        f"{shared / 2**30:.1f} on each device{waits}."
    )
