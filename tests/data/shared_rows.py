"""One of two processes that share rows: ``python shared_rows.py FOLDER BASE``.

Real gloo and a real data module; only Lightning's loops are left out. Writes ``rank-RANK.json``:
for each case how often this process encoded, what it has, and what it ended with.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from torch import distributed

from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.data.rows import preparation

RANK, FOLDER, BASE = int(os.environ["RANK"]), Path(sys.argv[1]), sys.argv[2]
CASES: dict[str, tuple[str, dict[str, Any], type]] = {
    "kept": ("good.jsonl", {}, LightningEnvironment),
    "kept before": ("good.jsonl", {}, LightningEnvironment),
    "not kept": ("good.jsonl", {"cache": False}, LightningEnvironment),
    "bad": ("bad.jsonl", {}, LightningEnvironment),
    "bad, not kept": ("bad.jsonl", {"cache": False}, LightningEnvironment),
    "bad under torchrun": ("bad.jsonl", {}, TorchElasticEnvironment),
    "bad on one": (f"own-{RANK}.jsonl", {}, LightningEnvironment),
    "bad on one under torchrun": (f"own-{RANK}.jsonl", {}, TorchElasticEnvironment),
    "bad window": ("bad.jsonl", {"window": 4}, LightningEnvironment),
}


def look_at(name: str) -> dict[str, Any]:
    file, settings, environment = CASES[name]
    calls, write = [0], preparation.write_rows

    def counted(*arguments: Any) -> None:
        calls[0] += 1
        write(*arguments)

    preparation.write_rows = counted
    ended: dict[str, Any] = {}
    try:
        data = InstructionDataModule(
            FOLDER / file, **{"tokenizer": BASE, "val_size": 2, "encoding_processes": 1} | settings
        )
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            world_size=2,
            global_rank=RANK,
            local_rank=RANK,
            node_rank=0,
            max_steps=3,
            max_epochs=None,
            accumulate_grad_batches=1,
            lightning_module=None,
            state=SimpleNamespace(fn="fit"),
            strategy=SimpleNamespace(cluster_environment=object.__new__(environment)),
        )
        if RANK == 0:
            data.prepare_data()
        distributed.barrier()
        data.setup("fit")
        ended = {"rows": data.splits["train"].rows.fingerprint()}
    except SystemExit as end:
        ended = {"exit": end.code}
    except Exception as error:
        ended = {"error": f"{type(error).__name__}: {error}"}
    finally:
        preparation.write_rows = write
    return ended | {"encoded": calls[0]}


if __name__ == "__main__":
    wait = timedelta(seconds=60)  # a process that waits for the other in vain ends the test
    distributed.init_process_group("gloo", rank=RANK, world_size=2, timeout=wait)
    found = {name: look_at(name) for name in CASES}
    (FOLDER / f"rank-{RANK}.json").write_text(json.dumps(found))
