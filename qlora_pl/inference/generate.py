"""``qlora-pl generate``: answers to prompts, to standard output or into a file.

Nothing but answers goes to standard output, so that another program can read them.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_pl.errors import ConfigurationError, DatasetFormatError
from qlora_pl.inference.flags import Flags
from qlora_pl.inference.source import BASE, DEFAULT_NAME, ModelChoice, ModelSource, resolve_source
from qlora_pl.modeling.answers.decoding import DecodingConfig

logger = logging.getLogger(__name__)

DESCRIPTION = """Answer prompts with an adapter (or a model alone), through the template that it was
trained with. Answers go to standard output, everything else to standard error."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """What is asked, and where answers go."""

    prompt: tuple[str, ...] = ()
    """A question; may be given several times."""
    prompts: str | None = None
    """A file of questions: .jsonl or .csv (prompt, instruction and input, or messages), .txt (one
    a line), or - for standard input, which is also read where nothing else is asked."""
    system: str | None = None
    """A system message for questions that have none."""
    output: str | None = None
    """A file for the answers, as JSON lines; the same command goes on with it after a kill."""
    format: Literal["text", "jsonl"] = "text"
    """What goes to standard output: answers with a blank line between them, or JSON lines."""
    with_prompt: bool = False
    """Print the prompt as the model read it before each answer."""
    raw: bool = False
    """Read questions as they are, without the template."""
    no_adapter: bool = False
    """Have the base answer, without its adapter."""
    compare: bool = False
    """Have the base answer, too."""
    batch_size: int = 8
    """Prompts at a time."""
    on_error: Literal["stop", "skip"] = "stop"
    """What happens at a line that cannot be read, or a prompt that is too long."""

    def __post_init__(self) -> None:
        problems = []
        if self.batch_size < 1:
            problems.append(f"--batch-size: must be at least 1, got {self.batch_size}.")
        if self.no_adapter and self.compare:
            problems.append("--compare: shows both; leave --no-adapter out.")
        if problems:
            raise ConfigurationError(problems)


def flags() -> Flags:
    """The command's flags."""
    parser = Flags("generate", DESCRIPTION)
    parser.add_settings(ModelChoice, "which model answers")
    parser.add_settings(GenerateOptions, "what is asked, and where answers go")
    parser.add_settings(DecodingConfig, "how answers are drawn")
    return parser


def generate_command(words: Sequence[str]) -> int:
    """Run the command with the words that follow ``generate``.

    Raises:
        QLoRAError: for a mistake in words, files or folders, before weights are loaded.
    """
    parser = flags()
    given = parser.parse(words)
    options = GenerateOptions(**parser.settings(GenerateOptions, given))
    choice = ModelChoice(**parser.settings(ModelChoice, given))
    decoding = DecodingConfig(**parser.settings(DecodingConfig, given))
    if not options.prompt and options.prompts is None:
        options = GenerateOptions(**{**asdict(options), "prompts": "-"})
    try:
        return run(choice, options, decoding)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(choice: ModelChoice, options: GenerateOptions, decoding: DecodingConfig) -> int:
    """Load what answers, ask it, and write what it says."""
    # Imported here: a mistake in the flags is told at once.
    from qlora_pl.inference.answer_file import AnswerFile, line_of
    from qlora_pl.inference.answering import Answerer, TooLong
    from qlora_pl.inference.loading import load
    from qlora_pl.inference.machine import place_of
    from qlora_pl.inference.prompts import read_prompts

    source = resolve_source(choice)
    names = names_of(source, options)
    prompts, skipped = read_prompts(
        options.prompt, options.prompts, options.system, options.on_error == "skip", sys.stdin
    )
    for sentence in skipped:
        logger.warning("%s", sentence)
    file = None
    if options.output is not None:
        file = AnswerFile(Path(options.output).expanduser(), made_by(source, options, decoding))
        asked = len(prompts)
        prompts = [p for p in prompts if not all(file.has(p, name) for name in names)]
        if asked != len(prompts):
            logger.warning("%d of %d are answered already.", asked - len(prompts), asked)
    if not prompts:
        return 0
    for assumed in source.assumed:
        logger.warning("No file says it, so this is assumed: %s.", assumed)
    model = load(source, place_of(choice), choice.cache_dir, choice.trust_remote_code)
    answerer = Answerer(model, decoding, options.batch_size, options.raw)
    by_row = {prompt.row: prompt for prompt in prompts}
    bar = progress(len(prompts) * len(names))
    is_first = True
    with bar:
        for answer in answerer.answers(prompts, names):
            if isinstance(answer, TooLong):
                if options.on_error == "stop":
                    raise DatasetFormatError(answer.sentence)
                logger.warning("%s", answer.sentence)
                continue
            bar.update()
            prompt = by_row[answer.row]
            if file is not None:
                if not file.has(prompt, answer.adapter):
                    file.add(prompt, answer)
                continue
            if options.format == "jsonl":
                text = json.dumps(line_of(prompt, answer), ensure_ascii=False)
            else:
                text = as_text(answer, options, len(names) > 1, is_first)
            print(text, flush=True)
            is_first = False
    return 0


def names_of(source: ModelSource, options: GenerateOptions) -> list[str]:
    """Who answers each prompt.

    Raises:
        ConfigurationError: if there is no adapter to leave out.
    """
    if not source.adapters:
        if options.no_adapter or options.compare:
            flag = "--no-adapter" if options.no_adapter else "--compare"
            raise ConfigurationError(f"{flag}: there is no adapter; name one with --adapter.")
        return [BASE]
    if options.no_adapter:
        return [BASE]
    return [*source.adapters, *([BASE] if options.compare else [])]


def made_by(
    source: ModelSource, options: GenerateOptions, decoding: DecodingConfig
) -> dict[str, Any]:
    """All that decides what an answer is, in plain types."""
    from qlora_pl.files import sha256_file

    weights = {
        name: {path.name: sha256_file(path) for path in sorted(folder.glob("adapter_*"))}
        for name, folder in source.adapters.items()
    }
    return {
        "base": source.weights or [source.base, source.revision],
        "adapters": weights,
        "quantization": asdict(source.quantization),
        "template": source.template,
        "decoding": asdict(decoding),
        "raw": options.raw,
        "system": options.system,
    }


def as_text(answer: Any, options: GenerateOptions, has_names: bool, is_first: bool) -> str:
    """An answer for people, after a blank line if it is not the first."""
    lines = [] if is_first else [""]
    if has_names:
        shown = {DEFAULT_NAME: "with the adapter", BASE: "the base alone"}
        lines.append(f"[{shown.get(answer.adapter, answer.adapter)}]")
    if options.with_prompt:
        lines.append(answer.prompt)
    return "\n".join([*lines, answer.answer])


def progress(total: int) -> Any:
    """A bar on standard error, if somebody looks at it."""
    from tqdm import tqdm

    return tqdm(total=total, unit=" answers", delay=1.0, leave=False, disable=None)
