"""A merged folder inside of an export: ``qlora-pl merge`` as the flags of ``export`` ask for it."""

from __future__ import annotations

from pathlib import Path

from qlora_pl.exporting.options import ExportOptions
from qlora_pl.inference.source import ModelChoice
from qlora_pl.merging.merge import MergeOptions, merge


def merge_into(folder: Path, choice: ModelChoice, options: ExportOptions) -> str:
    """Merge, score and write; the table of the scores, as Markdown.

    Raises:
        QLoRAError: as ``merge`` does; above the threshold unless forced, say.
    """
    merging = MergeOptions(
        output=str(folder),
        score_tokens=options.score_tokens,
        threshold=options.threshold,
        force=options.force,
    )
    return merge(choice, merging).rpartition("\n\nmerge:")[0]
