"""``qlora-pl inspect model``: what quantising a base costs, before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_pl.errors import ConfigurationError
from qlora_pl.inference.flags import Flags
from qlora_pl.inspection.report_folder import as_json, refuse_other_contents, write_report
from qlora_pl.inspection.weights.formats import BLOCK_SIZES, KINDS, Format, formats_of

logger = logging.getLogger(__name__)

DESCRIPTION = """Measure what each way to quantise a base changes: weights, matrix by matrix,
without loading it; and with rows, the outputs of its modules and what it says. Writes report.html,
report.md and report.json into a folder, and prints the summary."""
SUBJECT = "model"
TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which base, and what is asked of it."""

    model: str | None = None
    """A folder, or a name on the Hub, in 16 or 32 bits."""
    adapter: str | None = None
    """In its place, an adapter folder: its base is asked its held-out rows, and its quantisation is
    the first of those compared."""
    base: str | None = None
    """Where the adapter's base lies now, if not where it lay in training."""
    revision: str | None = None
    """The commit, branch or tag of a base on the Hub."""
    data: str | None = None
    """Rows to ask, in any layout that training reads; the model is loaded for it."""
    template: str | None = None
    """Turns questions into prompts, where no adapter folder says it: a name or a file of Jinja."""
    tokens: int = TOKENS
    """Trained tokens that are scored, at most."""
    logits: Literal["parts", "formats", "none"] = "parts"
    """parts: KL of every format, every layer, every kind of module and of the suggestion; formats:
    of every format alone; none: errors of weights and outputs alone."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the loaded model computes in. auto: float32 on a CPU, bfloat16 on a GPU."""
    keep: int = 8
    """Modules to suggest for 16 bits."""
    skip_modules: tuple[str, ...] = ()
    """Modules that are not to be quantised in any case, as in model.quantization.skip_modules."""
    output: str = "inspect-model"
    """The folder of the report."""
    json: bool = False
    """Print every number as JSON in place of the summary."""
    trust_remote_code: bool = False
    """Whether Python code that lies beside a model may run."""
    cache_dir: str | None = None
    """Where downloads are kept."""

    def __post_init__(self) -> None:
        problems = []
        if (self.model is None) == (self.adapter is None):
            both = "" if self.model is None else ", not both"
            problems.append(f"--model: name a model, or an adapter with --adapter{both}.")
        if self.base is not None and self.adapter is None:
            problems.append("--base: is for an adapter; a model is named by --model.")
        if self.tokens < 1:
            problems.append(f"--tokens: must be at least 1, got {self.tokens}.")
        if self.keep < 0:
            problems.append(f"--keep: must be 0 or more, got {self.keep}.")
        if self.template is not None and self.data is None:
            problems.append("--template: is for --data; without rows nothing is rendered.")
        if problems:
            raise ConfigurationError(problems)

    @property
    def is_asked(self) -> bool:
        """Whether there are rows, for which the model is loaded."""
        return self.data is not None or self.adapter is not None


def inspect_model(words: Sequence[str]) -> int:
    """Run the command with the words that follow ``inspect model``.

    Raises:
        QLoRAError: for a mistake in words, files or folders; a base that is damaged or quantised
            already.
    """
    options, formats = parse(words)
    output = Path(options.output).expanduser()
    refuse_other_contents(output, SUBJECT)

    # Imported here: a mistake in the flags is told at once.
    from qlora_pl.inspection.flag_words import in_words_of_flags
    from qlora_pl.inspection.weights.page import page
    from qlora_pl.inspection.weights.reporting import report
    from qlora_pl.inspection.weights.tables import summary

    with in_words_of_flags("--model" if options.adapter is None else "--base"):
        numbers = report(options, formats)
    text, plain = summary(numbers), numbers.to_plain()
    write_report(output, page(numbers), text, plain)
    print(as_json(plain) if options.json else text)
    logger.info("inspect: %s", output / "report.html")
    return 0


def model_flags() -> Flags:
    """The command's flags."""
    parser = Flags("inspect model", DESCRIPTION)
    parser.add_settings(ModelOptions, "which base, and what is asked of it")
    compared = parser.add_argument_group("which ways are compared; the first is shown by layer")
    compared.add_argument(
        "--kinds", nargs="+", choices=KINDS, help=f"codes (default: {' '.join(KINDS)})"
    )
    compared.add_argument(
        "--block-sizes",
        nargs="+",
        type=int,
        choices=BLOCK_SIZES,
        metavar="N",
        help="weights that share one scale: 64 to 4096, by powers of two (default: 64)",
    )
    compared.add_argument(
        "--double-quant",
        choices=("true", "false", "both"),
        help="whether scales are quantised, too (default: both)",
    )
    return parser


def parse(words: Sequence[str]) -> tuple[ModelOptions, list[Format]]:
    """What the words mean.

    Raises:
        ConfigurationError: for a mistake in them.
    """
    parser = model_flags()
    given = parser.parse(words)
    options = ModelOptions(**parser.settings(ModelOptions, given))
    double = {"true": [True], "false": [False], "both": [True, False]}[given.double_quant or "both"]
    return options, formats_of(given.kinds or KINDS, given.block_sizes or [64], double)


def as_first(formats: Sequence[Format], settings: dict[str, Any]) -> list[Format]:
    """The same with an adapter's own quantisation before all others.

    Args:
        formats: That are compared.
        settings: ``quant_type``, ``double_quant`` and ``block_size`` of a manifest.
    """
    kind = settings["quant_type"]
    if kind == "none":
        return list(formats)
    own = (
        Format(kind="int8", block_size=None)
        if kind == "int8"
        else Format(
            kind=kind,
            block_size=settings["block_size"],
            double_quant=bool(settings["double_quant"]),
        )
    )
    # Those of the same code next, so that one quantisation serves them.
    rest = sorted((f for f in formats if f != own), key=lambda f: f.kind != own.kind)
    return [own, *rest]
