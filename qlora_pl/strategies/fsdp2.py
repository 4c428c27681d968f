"""``FSDP2Strategy``: the base and the adapters cut over all devices, through Lightning's hooks.

torch's ``fully_shard`` over packed 4-bit bytes, one decoder layer a unit. Checkpoints are this
project's own: whole tensors by name, so that a run goes on under any strategy.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch.optim import Optimizer


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism over every device of a run.

    Args:
        cpu_offload: Whether parts, gradients and optimizer state lie in host memory, from which a
            layer is fetched when it is computed with.
        process_group_backend: torch's name of what carries the traffic; None: nccl on GPUs, gloo
            on CPUs (and beside nccl with ``cpu_offload``, for sums over what lies in host memory).
        timeout: After which a process that waits for another gives up.
    """

    shards_parameters = True
    sums_gradients = True
    """Each unit's as its backward ends, by torch; see ``sharding.shard``."""

    def __init__(
        self,
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.cpu_offload = cpu_offload

    @property
    def mesh(self) -> Any:
        """All devices in one dimension."""
        return self.device_mesh["data_parallel"]

    def setup_environment(self) -> None:
        """Lightning's ``auto`` would shard over machines and train alike on the GPUs of each."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        is_mixed = self.cpu_offload and backend == "nccl"
        return "cpu:gloo,cuda:nccl" if is_mixed else backend

    def model_to_device(self) -> None:
        """Move what lies beside the model, which was loaded where it belongs."""
        module = self.lightning_module
        assert module is not None
        for name, child in module.named_children():
            if name != "model":
                child.to(self.root_device)
        _update_properties(module, device=self.root_device)

    # -- checkpoints: whole tensors by name, made and taken up by the module ----------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """The model is cut when it is loaded, so it takes up its state when others do."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands the optimizers' state over, as under any other strategy."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained tensors, whole."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process keeps its part of the trained tensors."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As it is; the module replaces it by the whole state by name."""
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """State goes where its parameter is, which with ``cpu_offload`` is not the device."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """One file, written by the first process."""
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The same file in every process."""
        torch.cuda.empty_cache()
        return self.checkpoint_io.load_checkpoint(checkpoint_path)
