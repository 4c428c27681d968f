"""A Modelfile for Ollama: template, stop tokens and decoding of training, beside a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.served_template import comparable, encoder_joints
from qlora_pl.data.templates.chat_template import CLOCK, ChatTemplate
from qlora_pl.data.templates.example_conversations import EXAMPLES
from qlora_pl.data.templates.joints import Joints
from qlora_pl.errors import ConfigurationError
from qlora_pl.exporting.answer_settings import AnswerSettings, answer_settings
from qlora_pl.exporting.gguf import ADAPTER_FILE, MODEL_FILE, GGUFExport, write_gguf
from qlora_pl.exporting.go_template import go_template
from qlora_pl.exporting.options import ExportOptions
from qlora_pl.exporting.parity import check_parity, less_bos, served_encoder, text_ids
from qlora_pl.files import atomic_folder, write_atomic, write_json
from qlora_pl.inference.source import ModelChoice, ModelSource

MODELFILE = "Modelfile"
WAY = "the Modelfile's template"
TOLD = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "typical_p",
    "repetition_penalty",
    "stop",
)
"""Fields of ``DecodingConfig`` that Ollama has a parameter for."""
BASE_FILE = "base.gguf"
"""Where a Modelfile of an adapter alone looks for the base's own file."""


def export_ollama(source: ModelSource, choice: ModelChoice, options: ExportOptions) -> str:
    """Write a Modelfile beside a GGUF file, or beside what its command makes one of.

    Raises:
        QLoRAError: if the template is outside the subset, prompts differ, or the GGUF export fails;
            nothing is left then.
    """
    encoder = served_encoder(source, choice)
    joints = ollama_joints(encoder)
    folder = next(iter(source.adapters.values()), None)
    parity = check_parity(encoder, {WAY: text_ids(encoder.tokenizer, joints)}, folder)
    settings = answer_settings(source, encoder)
    output = Path(str(options.output)).expanduser()
    with atomic_folder(output) as place:
        done = write_gguf(source, choice, options, place, output)
        is_adapter = done.file == ADAPTER_FILE
        text = modelfile(
            joints,
            settings,
            model=f"./{BASE_FILE if is_adapter else done.file}",
            adapter=f"./{done.file}" if is_adapter else None,
        )
        write_atomic(place / MODELFILE, text)
        texts = [*done.texts, parity.in_words(), *_left_out(settings)]
        card = "\n\n".join([*texts, _how_to_run(done, source, output)])
        record = {"to": "ollama", "base": source.base, **done.record}
        write_json(place / "export.json", record)
        write_atomic(place / "README.md", f"# {source.base} for Ollama\n\n{card}\n")
    return f"{card}\n\nexport: {output}"


def ollama_joints(encoder: Encoder) -> Joints:
    """The joints of what Ollama renders: those of training, less the BOS that Ollama puts first.

    Raises:
        ConfigurationError: if the template is outside the subset, with what it does.
    """
    what = None
    if isinstance(encoder.template, ChatTemplate):
        source = encoder.template.definition()["jinja"]
        what = "asks for today's date" if CLOCK in source else None
    if what is None:
        try:
            joints = encoder_joints(encoder)
            what = _rewrites(encoder, joints)
        except ConfigurationError as error:
            what = str(error).rstrip(".")
    if what is not None:
        raise ConfigurationError(
            f"--to: the template '{encoder.template.name}' cannot be written as a Modelfile's: it "
            f"{what}; vllm and gguf take it as it is."
        )
    return less_bos(joints, encoder.tokenizer)


def _rewrites(encoder: Encoder, joints: Joints) -> str | None:
    """What a template does to some example that joints do not."""
    kept, _ = comparable(encoder, EXAMPLES)
    for name, conversation in kept.items():
        if joints.render(conversation.messages, True) != encoder.encode_prompt(conversation)[0]:
            return f"writes '{name}' otherwise than as its messages with fixed texts between them"
    return None


def modelfile(
    joints: Joints,
    settings: AnswerSettings,
    model: str = f"./{MODEL_FILE}",
    adapter: str | None = None,
) -> str:
    """The whole file.

    Args:
        joints: From ``ollama_joints``.
        settings: What else Ollama is told.
        model: The GGUF file, from where the Modelfile lies.
        adapter: An adapter's, which goes over it.
    """
    decoding = settings.decoding
    parameters: list[tuple[str, object]] = [
        ("temperature", f"{settings.temperature:g}"),
        ("top_k", decoding.top_k),
        ("top_p", f"{decoding.top_p:g}"),
        ("min_p", 0),
        ("typical_p", f"{decoding.typical_p:g}"),
        ("repeat_penalty", f"{decoding.repetition_penalty:g}"),
        ("repeat_last_n", -1),  # the penalty counts everything, as in transformers
        ("num_predict", decoding.max_new_tokens),
        ("num_ctx", settings.context),
    ]
    stops = dict.fromkeys([*settings.stop_tokens, *decoding.stop])
    lines = [
        f"FROM {model}",
        *([f"ADAPTER {adapter}"] if adapter else []),
        "",
        "# The prompts of training: written from its template, and compared with it.",
        f'TEMPLATE """{go_template(joints)}"""',
        "",
        "# Where an answer ends, and how it is drawn, in place of Ollama's own defaults.",
        *(f"PARAMETER stop {_quoted(stop)}" for stop in stops),
        *(f"PARAMETER {name} {value}" for name, value in parameters),
    ]
    return "\n".join(lines) + "\n"


def _quoted(stop: str) -> str:
    """A value of a Modelfile, which knows no escapes and loses what Go calls unprintable.

    Raises:
        ConfigurationError: for a text that cannot be written there.
    """
    if '"' in stop or any(not one.isprintable() and one != "\n" for one in stop):
        raise ConfigurationError(
            f"decoding.stop: {stop!r} cannot be written into a Modelfile, which has no escapes; "
            "leave it out."
        )
    return f'"{stop}"'


def _left_out(settings: AnswerSettings) -> list[str]:
    names: Sequence[str] = settings.left_out(TOLD)
    if not names:
        return []
    return [f"Ollama has no parameter for {', '.join(names)}, which the run sets."]


def _how_to_run(done: GGUFExport, source: ModelSource, output: Path) -> str:
    lines = []
    if not done.is_converted:
        lines += ["Make the GGUF file with llama.cpp's converter:", "", f"    {done.command}", ""]
    if done.file == ADAPTER_FILE:
        lines += [
            "Make the base's own file, over which the adapter goes:",
            "",
            f"    qlora-pl export --to gguf --model {source.base} --output base --convert",
            f"    mv base/{MODEL_FILE} {output / BASE_FILE}",
            "",
        ]
    lines += [
        "Give it to Ollama under a name, and ask:",
        "",
        f"    ollama create my-model -f {output / MODELFILE}",
        '    ollama run my-model "Hello"',
    ]
    return "\n".join(lines)
