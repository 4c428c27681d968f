"""``qlora-pl inspect adapter``: what an adapter changes, told from its files and its base's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_pl.errors import ConfigurationError
from qlora_pl.inference.flags import Flags
from qlora_pl.inspection.report_folder import as_json, refuse_other_contents, write_report

logger = logging.getLogger(__name__)

DESCRIPTION = """Measure what an adapter changes: norms and effective rank of each B A, dead and
exploding ones, the share of each weight where its base is at hand, and how alike two adapters are.
Writes report.html, report.md and report.json into a folder, and prints the summary."""
SUBJECT = "adapter"


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Which adapter, and what it is held against."""

    adapter: str | None = None
    """A folder of this project or of any PEFT program, or a name on the Hub."""
    against: str | None = None
    """Another one, to be compared with."""
    base: str | None = None
    """Where its base lies, in 16 or 32 bits, if not where it lay in training."""
    output: str = "inspect-adapter"
    """The folder of the report."""
    json: bool = False
    """Print every number as JSON in place of the summary."""
    trust_remote_code: bool = False
    """Whether Python code that lies beside the base may run."""
    cache_dir: str | None = None
    """Where fingerprints of bases are kept."""

    def __post_init__(self) -> None:
        if self.adapter is None:
            raise ConfigurationError("--adapter: name an adapter folder.")


def adapter_flags() -> Flags:
    """The command's flags."""
    parser = Flags("inspect adapter", DESCRIPTION)
    parser.add_settings(AdapterOptions, "which adapter, and what it is held against")
    return parser


def inspect_adapter(words: Sequence[str]) -> int:
    """Run the command with the words that follow ``inspect adapter``.

    Raises:
        QLoRAError: for a mistake in words or folders; if the adapter holds values that are no
            numbers, after the report was written.
    """
    parser = adapter_flags()
    options = AdapterOptions(**parser.settings(AdapterOptions, parser.parse(words)))
    output = Path(options.output).expanduser()
    refuse_other_contents(output, SUBJECT)

    # Imported here: a mistake in the flags is told at once.
    from qlora_pl.inspection.adapters.page import page
    from qlora_pl.inspection.adapters.reporting import report
    from qlora_pl.inspection.adapters.tables import summary
    from qlora_pl.inspection.flag_words import in_words_of_flags

    with in_words_of_flags("--base"):
        numbers = report(options)
    text, plain = summary(numbers), numbers.to_plain()
    write_report(output, page(numbers), text, plain)
    print(as_json(plain) if options.json else text)
    if numbers.damage:
        raise ConfigurationError(
            [f"--adapter: {problem}" for problem in numbers.damage]
            + [f"The report about the rest is '{output / 'report.html'}'."]
        )
    logger.info("inspect: %s", output / "report.html")
    return 0
