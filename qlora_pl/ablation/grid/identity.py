"""What a run really is, as one number: equal runs are trained once, in whichever grid they stand.

The resolved configuration decides, not how it was written; of it only what can change the trained
numbers. Where a run writes, how often it saves and what it prints do not, nor do the devices as
long as a step's rows stay the same: ``data.global_batch_size`` is what the numbers follow. The
bytes of the data files are part of it. The code that trains is told apart (``code_version``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from qlora_pl.data.reading.source_config import SourceConfig
from qlora_pl.data.reading.source_digest import source_digest
from qlora_pl.data.reading.sources import RowSources

MACHINE = (
    "config",
    "ckpt_path",
    "run.",
    "samples.",
    "checkpoint.",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.logger",
    "trainer.callbacks",
    "trainer.enable_",
    "trainer.default_root_dir",
    "trainer.log_every_n_steps",
    "trainer.profiler",
    "trainer.max_time",
    "model.cache_dir",
    "model.quantization.cache",
    "data.num_workers",
    "data.cache_dir",
)
"""Beginnings of keys that say where and how a run goes on, not what it trains."""
TRAINS = ("data", "modeling", "strategies", "training", "batch.py", "cli.py")
"""Folders and files of this package that a trained number can depend on."""


def identity_of(config: Mapping[str, Any], data: str) -> str:
    """SHA-256, as 16 hexadecimal digits, of a run.

    Args:
        config: The resolved configuration, with dotted keys.
        data: See ``data_digest``.
    """
    own = {key: value for key, value in config.items() if not key.startswith(MACHINE)}
    text = json.dumps([own, data], sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()[:16]


def data_digest(data: Any) -> str:
    """SHA-256 over the bytes of all sources of a run that lie here.

    Args:
        data: The parsed section ``data``.

    Raises:
        QLoRAError: if a source cannot be read.
    """
    digest = sha256()
    for key in ("sources", "val_sources", "test_sources"):
        for source in RowSources.parse(getattr(data, key), f"data.{key}").sources:
            digest.update(f"{key} {_digest_of(source)}".encode())
    return digest.hexdigest()


def _digest_of(source: SourceConfig) -> str:
    if not source.is_saved and not source.resolved().is_local:
        return ""  # of the Hub: its name and revision are among the settings
    return source_digest(source)


@cache
def code_version() -> str:
    """SHA-256, as 12 hexadecimal digits, over the files that a trained number can depend on."""
    package = Path(__file__).parents[2]
    digest = sha256()
    for name in TRAINS:
        path = package / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(str(file.relative_to(package)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
