"""What each of two ranks does for tests/strategies/test_ddp.py: many runs, one start of processes.

Its argument is its settings as JSON; what each run noted goes to ``NAME-RANK.pt`` in their folder.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from memory_runs import Plan, Shortage, Shortages, metrics, train, trained
from torch.profiler import ProfilerActivity, profile

from qlora_pl.errors import TrainingStoppedError
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.strategies.choice import strategy_named
from qlora_pl.strategies.ddp import sum_gradients

BATCHES: dict[str, Any] = {"data": {"batch_size": 4}, "trainer": {"devices": 2, "max_steps": 4}}
"""Half of one process's micro-batch on each rank, so that the steps are the same: micro-batches 0
and 1, 2 (of which rank 1 has no row), 3 and 4, 5."""
SHORTAGES: dict[str, list[Shortage]] = {
    "rank 1": [Shortage(3, "backward", rank=1)],
    "both": [Shortage(1, "forward", rank=0), Shortage(1, "backward", rank=1)],
    "one after the other": [Shortage(0, "backward", rank=0), Shortage(3, "forward", rank=1)],
}
PLANS: dict[str, dict[tuple[int, int], int]] = {
    "rank 1": {(1, 3): 2, (0, 5): 2},
    "both": {(0, 1): 2, (1, 1): 2},
    "one after the other": {(0, 0): 2, (1, 2): 2, (1, 3): 4, (0, 5): 4},
}
"""By rank and micro-batch; ranks agree at the end of a step."""
TRAFFIC = {"2": (2, "base"), "4": (4, "base"), "larger": (2, "larger")}
"""Micro-batches of a step, and the base."""


class Traffic(Callback):
    """What gloo was asked to do, up to the first step and in each step, C++'s calls included."""

    def __init__(self) -> None:
        self.parts: list[list[tuple[str, int]]] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self._begin()
        self._step = -1

    def _begin(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self._profile.__enter__()

    def _end(self) -> None:
        self._profile.__exit__(None, None, None)
        self.parts.append(collectives(self._profile))

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            if self._step:
                self._profile.__exit__(None, None, None)  # saves and validations
            else:
                self._end()
            self._begin()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step > self._step:
            self._end()
            self._begin()

    def on_train_end(self, *_: Any) -> None:
        self._profile.__exit__(None, None, None)


def collectives(seen: profile) -> list[tuple[str, int]]:
    """Name and elements of each collective, in their order.

    Out of what was recorded: torch's own list of events takes ten seconds for all others.
    """
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    recorded = seen.profiler.kineto_results.events()
    sent = [event for event in recorded if event.name().startswith("gloo:")]
    return [
        (event.name().removeprefix("gloo:"), sum(torch.Size(s).numel() for s in event.shapes()))
        for event in sorted(sent, key=lambda event: event.start_ns())
    ]


class Overflow(Callback):
    """Makes one gradient of one rank infinite, in the second step."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.steps: list[tuple[bool, float | None]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_after_backward(self, trainer: Trainer, module: Any) -> None:
        if trainer.global_step == 1 and trainer.global_rank == self.rank:
            next(iter(module.trained_tensors().values())).grad.view(-1)[0] = torch.inf

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append((module.last_step.is_skipped, module.last_step.loss_scale))
            self.weights.append(trained(module))


class Different(QLoRAModule):
    """One tensor of rank 1 begins elsewhere."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.global_rank == 1:
            parameter = list(self.trained_tensors().values())[5]
            with torch.no_grad():
                parameter.view(-1)[0] += 1e-6


class Ranks:
    """The runs, by name; each returns what its rank noted."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.folder = Path(settings["folder"])
        self.base, self.larger = Path(settings["base"]), Path(settings["larger"])
        self.rows = Path(settings["rows"])
        self.rank = int(os.environ["RANK"])

    def _train(self, name: str, *callbacks: Callback, **changes: Any) -> QLoRAModule:
        settings = {**BATCHES, **changes}
        return train(self.folder / name, self.base, self.rows, *callbacks, **settings)

    def undisturbed(self) -> dict[str, Any]:
        """Memory suffices."""
        return {"trained": trained(self._train("undisturbed"))}

    def shortage(self, name: str) -> dict[str, Any]:
        """A run with shortages, and the same with its pieces planned."""
        injector = Shortages(*SHORTAGES[name])
        module = self._train(f"short {name}", injector)
        noted = {
            "short": trained(module),
            "raised": injector.raised,
            "pieces": module.runner.num_pieces,
            "planned": trained(self._train(f"planned {name}", Plan(PLANS[name]))),
        }
        return noted | ({} if self.rank else {"metrics": metrics(self.folder / f"short {name}")})

    def traffic(self, name: str) -> dict[str, Any]:
        """Collectives of a run, with rows that are recomputed."""
        accumulation, base = TRAFFIC[name]
        traffic = Traffic()
        module = train(
            self.folder / f"traffic {name}",
            getattr(self, base),
            self.rows,
            traffic,
            data={"batch_size": 1},
            trainer={"devices": 2, "accumulate_grad_batches": accumulation},
            gradient_checkpointing=True,
        )
        return {
            "parts": traffic.parts,
            "type": type(module.trainer.strategy.model).__name__,
            "sizes": [p.numel() for p in module.trained_tensors().values()],
        }

    def wrapper(self) -> dict[str, Any]:
        """What torch's own sends when it is made."""
        model = self._train("wrapper", trainer={"devices": 2, "max_steps": 1}).model
        assert model is not None
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            torch.nn.parallel.DistributedDataParallel(model)
        elements = sum(p.numel() for p in model.parameters())
        return {"traffic": collectives(seen), "elements": elements}

    def overflow(self) -> dict[str, Any]:
        """In float16, on one rank alone."""
        callback = Overflow(1)
        self._train("overflow", callback, compute="float16")
        return {"steps": callback.steps, "weights": callback.weights}

    def different(self) -> dict[str, Any]:
        """Ranks that do not begin alike."""
        import memory_runs

        memory_runs.QLoRAModule = Different  # type: ignore[misc]
        try:
            self._train("different")
        except TrainingStoppedError as error:
            return {"message": str(error)}
        finally:
            memory_runs.QLoRAModule = QLoRAModule  # type: ignore[misc]
        return {}

    def gradients(self) -> dict[str, Any]:
        """Some that only one rank has, in several types and buckets."""
        draw = torch.Generator().manual_seed(self.rank)
        parameters = []
        for place, dtype in enumerate([torch.float32, torch.bfloat16, torch.float64] * 3):
            parameter = torch.nn.Parameter(torch.zeros(3, 5 + place, dtype=dtype))
            if place not in ([1, 8], [2, 8])[self.rank]:
                parameter.grad = torch.randn(parameter.shape, generator=draw).to(dtype)
            parameters.append(parameter)
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        sum_gradients(parameters, bucket_bytes=100)
        return {"before": before, "after": [p.grad for p in parameters]}

    def predict(self) -> dict[str, Any]:
        """Answers and scores on two ranks, after training."""
        module = self._train("predict")
        data = module.trainer.datamodule  # type: ignore[attr-defined]
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            trainer = Trainer(
                accelerator="cpu",
                devices=2,
                strategy=strategy_named("ddp"),
                use_distributed_sampler=False,
                **quiet,
            )
            scores = trainer.validate(module, data, verbose=False)
        answers = trainer.predict(module, data)
        assert answers is not None
        return {
            "traffic": collectives(seen),
            "scores": scores,
            "rows": [answer["row"] for batch in answers for answer in batch],
        }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    ranks = Ranks(given)
    for run in given["runs"]:
        name, *argument = run.split(": ")
        torch.save(getattr(ranks, name)(*argument), ranks.folder / f"{run}-{ranks.rank}.pt")
