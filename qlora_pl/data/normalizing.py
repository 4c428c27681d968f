"""Raw rows -> conversations."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_pl.data.audit import DataReport
from qlora_pl.data.conversation import Conversation
from qlora_pl.data.formats import FORMATS, RowError, guess_format
from qlora_pl.data.readers import Place, read_rows
from qlora_pl.data.sources import RowSources, SourceConfig
from qlora_pl.errors import ConfigurationError, DatasetFormatError
from qlora_pl.files import sha256_file

logger = logging.getLogger(__name__)


def source_digest(source: SourceConfig) -> str:
    """SHA-256 of the bytes."""
    if not source.is_local:
        return secrets.token_hex(16)
    return sha256_file(Path(source.path))


def conversations(sources: RowSources, report: DataReport) -> Iterator[tuple[Place, Conversation]]:
    """Every row as a conversation with its place; notes the formats in the report."""
    formats: dict[int, str] = {}  # by source, not by file: two sources may read the same one
    for place, source, row in read_rows(sources):
        if id(source) not in formats:
            formats[id(source)] = _choose_format(place, source, row, report)
        name = formats[id(source)]
        try:
            conversation = FORMATS[name].convert(row)
        except RowError as error:
            raise DatasetFormatError(
                f"{place}: {error}. Set another format, or rename the columns "
                f"with columns: {{NEW: OLD}} (format '{name}')."
            ) from error
        if problem := conversation.problem():
            raise DatasetFormatError(f"{place}: {problem}. Mend or remove the row.")
        yield place, conversation


def _choose_format(
    place: Place, source: SourceConfig | None, row: Mapping[str, Any], report: DataReport
) -> str:
    if source is not None and source.format is not None:
        _note_format(place.source, source.format, report)
        return source.format
    try:
        name, runner_up = guess_format(list(row))
    except ConfigurationError as error:
        raise DatasetFormatError(f"{place}: {error}") from error
    said = f"{name} (guessed; {runner_up} would fit too)" if runner_up else f"{name} (guessed)"
    _note_format(place.source, said, report)
    logger.info("%s: format %s", place.source, said)
    return name


def _note_format(source: str, said: str, report: DataReport) -> None:
    known = report.formats.get(source)
    report.formats[source] = said if known in (None, said) else f"{known}; {said}"
