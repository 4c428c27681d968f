"""``qlora-pl export``: an adapter, or a merged model, for an engine that serves it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora_pl.errors import ConfigurationError
from qlora_pl.exporting.options import ExportOptions
from qlora_pl.inference.flags import Flags
from qlora_pl.inference.source import ModelChoice, ModelSource, resolve_source

DESCRIPTION = """Write an adapter, or a model without one, as another engine reads it, and print the
command that serves it there."""

Exporter = Callable[[ModelSource, ModelChoice, ExportOptions], str]


def flags() -> Flags:
    """The command's flags."""
    parser = Flags("export", DESCRIPTION)
    parser.add_settings(ModelChoice, "what is exported")
    parser.add_settings(ExportOptions, "for whom, and where it goes")
    return parser


def export_command(words: Sequence[str]) -> int:
    """Run the command with the words that follow ``export``.

    Raises:
        QLoRAError: for a mistake in words or folders, before anything long is done.
    """
    parser = flags()
    given = parser.parse(words)
    options = ExportOptions(**parser.settings(ExportOptions, given))
    choice = ModelChoice(**parser.settings(ModelChoice, given))
    print(export(choice, options))
    return 0


def export(choice: ModelChoice, options: ExportOptions) -> str:
    """Write what was asked for; what there is to know of it, and to do with it, as Markdown.

    Raises:
        QLoRAError: see ``export_command``.
    """
    output = Path(str(options.output)).expanduser()
    if output.exists():
        raise ConfigurationError(f"--output: '{output}' exists already and is never overwritten.")
    if not output.absolute().parent.is_dir():
        raise ConfigurationError(f"--output: there is no folder '{output.parent}'.")
    if choice.precision != "trained":
        raise ConfigurationError("--precision: is for answers; leave it out.")
    source = resolve_source(choice)
    if len(source.adapters) > 1:
        raise ConfigurationError("--adapter: name one adapter folder, an export is of one.")
    if not source.adapters and options.form == "adapter":
        raise ConfigurationError("--form: adapter is for --adapter; --model has none.")
    for assumed in source.assumed:
        print(f"No file says it, so this is assumed: {assumed}.", file=sys.stderr)
    module = importlib.import_module(f"{__package__}.{options.to}")  # slow to import
    exporter: Exporter = getattr(module, f"export_{options.to}")
    return exporter(source, choice, options)
