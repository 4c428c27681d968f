"""The first rows of each of a run's sources, without fetching a dataset whole.

Files are read where they lie. Of a dataset on the Hub the first rows are streamed into a file; if
the Hub cannot be reached and the dataset is not in the cache, rows in its schema stand in.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from qlora_pl.data.reading.readers import load_hub_dataset
from qlora_pl.data.reading.source_config import SourceConfig
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.data.splits import hub_split
from qlora_pl.errors import DatasetFormatError
from qlora_pl.smoke.stand_in_rows import save_stand_in

MOST_ROWS = 256
"""Of each source."""
KEYS = ("sources", "val_sources", "test_sources")
VALIDATION_SPLITS = ("validation", "eval", "dev")


@dataclass(kw_only=True)
class FirstRows:
    """What the data of a smoke test reads."""

    sources: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By key of ``data``, in plain types."""
    stand_ins: list[str] = field(default_factory=list)
    """Sources whose rows are not theirs."""
    streamed: list[str] = field(default_factory=list)
    """Datasets of which only the first rows were fetched."""
    sampled: list[str] = field(default_factory=list)
    """Sources of which the run draws rows at random, and the test takes the first."""


def find_first_rows(data: Any, place: Path, is_online: bool) -> FirstRows:
    """Name, and if need be make, the rows that a smoke test reads.

    Args:
        data: The parsed ``data`` group of the run.
        place: A folder for what is made.
        is_online: Whether the Hub may be asked.

    Raises:
        ConfigurationError: if nothing can stand in for a dataset.
        DatasetFormatError: if the Hub says that there is no such dataset.
    """
    found = FirstRows()
    for key in KEYS:
        sources: RowSources = getattr(data, key)
        if key == "val_sources" and not sources and is_online:
            sources = hub_split(data.sources, VALIDATION_SPLITS)
        for number, source in enumerate(sources.sources):
            path = place / f"{key}-{number}.jsonl"
            named = f"data.{key}"
            plain = _first_rows(source.resolved(), named, path, is_online, found)
            found.sources.setdefault(key, []).append(plain)
    return found


def _first_rows(
    source: SourceConfig, key: str, path: Path, is_online: bool, found: FirstRows
) -> dict[str, Any]:
    limit = min(source.limit or source.sample or MOST_ROWS, MOST_ROWS)
    if source.sample is not None:
        found.sampled.append(source.name)
    if source.is_local or source.is_saved:
        return _plain(replace(source, limit=limit, sample=None))
    if not _write_hub_rows(source, limit, path, is_online):
        found.stand_ins.append(source.name)
        return save_stand_in(source, key, path)
    found.streamed.append(source.name)
    local = replace(source, split="train", subset=None, revision=None, file=None, streaming=False)
    return _plain(replace(local, path=str(path), limit=limit, sample=None))


def _plain(source: SourceConfig) -> dict[str, Any]:
    """What differs from the defaults."""
    defaults = SourceConfig()
    return {
        f.name: list(value) if isinstance(value, tuple) else value
        for f in fields(source)
        if (value := getattr(source, f.name)) != getattr(defaults, f.name)
    }


def _write_hub_rows(source: SourceConfig, limit: int, path: Path, is_online: bool) -> bool:
    """Write the first rows of a dataset as they are stored; False: they cannot be had here."""
    name = re.match(r"\w+", source.split)  # of "train[:500]" and "train+test", which are no streams
    split = name[0] if name and is_online else source.split
    try:
        # What is in the cache is whole, and streaming would ask the Hub for it.
        rows = load_hub_dataset(replace(source, streaming=is_online, split=split))
        first = list(itertools.islice(rows, limit))
    except DatasetFormatError:
        if is_online:
            raise
        return False
    lines = [json.dumps(dict(row), ensure_ascii=False, default=str) for row in first]
    path.write_text("".join(f"{line}\n" for line in lines))
    return bool(lines)
