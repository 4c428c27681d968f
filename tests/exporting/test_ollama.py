"""``qlora-pl export --to ollama``: what stands in a Modelfile, and what none can say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from data import real_tokenizers
from data.toy_tokenizers import build

from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.templates.loading import load_template
from qlora_pl.errors import ConfigurationError
from qlora_pl.exporting.answer_settings import AnswerSettings
from qlora_pl.exporting.go_template import go_template
from qlora_pl.exporting.ollama import modelfile, ollama_joints
from qlora_pl.exporting.parity import check_parity, text_ids
from qlora_pl.modeling.answers.decoding import DecodingConfig

Type = Callable[..., tuple[int, str, str]]

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process


def encoder_of(kind: str, template: str, chat: str = real_tokenizers.CHATML) -> Encoder:
    tokenizer = build(kind, chat)
    return Encoder(load_template(template, tokenizer), tokenizer)


def settings(**decoding: object) -> AnswerSettings:
    return AnswerSettings(
        decoding=DecodingConfig(**decoding),  # type: ignore[arg-type]
        stop_ids=(2, 4),
        stop_tokens=("</s>", "<|im_end|>"),
        context=4096,
    )


def read_modelfile(text: str) -> dict[str, list[str]]:
    """What Ollama's parser reads: a word, then a value up to the line's end or to its quotes' end.

    Source: the documentation of the Modelfile format.
    """
    pattern = r'^([A-Z]+) (?:([a-z_]+) )?("""(.*?)"""|"(.*?)"|([^\n]*))$'
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    found: dict[str, list[str]] = {}
    for line in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        command, name, whole, long, short, bare = line.groups()
        value = next(part for part in (long, short, bare, whole) if part is not None)
        found.setdefault(f"{command} {name}" if command == "PARAMETER" else command, []).append(
            value
        )
    return found


# -- the file --------------------------------------------------------------------------------------


def test_template_stop_tokens_and_decoding_are_those_of_training():
    joints = ollama_joints(encoder_of("bytes", "chatml"))
    found = read_modelfile(modelfile(joints, settings(max_new_tokens=99), model="./model.gguf"))
    assert found == {
        "FROM": ["./model.gguf"],
        "TEMPLATE": [go_template(joints)],
        "PARAMETER stop": ["</s>", "<|im_end|>"],
        "PARAMETER temperature": ["0"],  # the likeliest token each time
        "PARAMETER top_k": ["0"],
        "PARAMETER top_p": ["1"],
        "PARAMETER min_p": ["0"],
        "PARAMETER typical_p": ["1"],
        "PARAMETER repeat_penalty": ["1"],
        "PARAMETER repeat_last_n": ["-1"],
        "PARAMETER num_predict": ["99"],
        "PARAMETER num_ctx": ["4096"],
    }


def test_drawn_answers_keep_their_settings():
    chosen = settings(
        do_sample=True, temperature=0.7, top_p=0.9, top_k=40, repetition_penalty=1.2, stop=("###",)
    )
    text = modelfile(ollama_joints(encoder_of("bytes", "guanaco")), chosen, adapter="./a.gguf")
    found = read_modelfile(text)
    assert found["ADAPTER"] == ["./a.gguf"]
    assert found["PARAMETER stop"] == ["</s>", "<|im_end|>", "###"]
    assert found["PARAMETER temperature"] == ["0.7"]
    assert found["PARAMETER top_p"] == ["0.9"]
    assert found["PARAMETER top_k"] == ["40"]
    assert found["PARAMETER repeat_penalty"] == ["1.2"]


@pytest.mark.parametrize("stop", ['say "no"', "\u200b", "a\tb"])
def test_a_stop_text_that_a_modelfile_cannot_say_is_refused(stop: str):
    joints = ollama_joints(encoder_of("bytes", "guanaco"))
    with pytest.raises(ConfigurationError, match="cannot be written into a Modelfile"):
        modelfile(joints, settings(stop=(stop,)))


def test_what_ollama_has_no_parameter_for_is_named():
    chosen = settings(num_beams=4, no_repeat_ngram_size=3)
    assert chosen.left_out(("num_beams",)) == ["no_repeat_ngram_size"]


# -- BOS -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["llama2", "chat"])
def test_bos_is_left_to_ollama_where_the_tokenizer_puts_it_first(template: str):
    """llama.cpp adds it by the file's own flag, and warns of a prompt that begins with two."""
    joints = ollama_joints(encoder_of("bytes-bos", template, real_tokenizers.LLAMA3))
    assert not joints.opening.startswith("<s>")
    assert not (joints.system or "").startswith("<s>")


def test_bos_is_written_where_only_the_template_put_it():
    assert ollama_joints(encoder_of("bytes", "llama2")).opening == "<s>[INST] "


def test_a_bos_that_the_tokenizer_joins_otherwise_is_found():
    """SentencePiece with a space before the beginning alone: after a written <s> there was none."""
    encoder = encoder_of("sentencepiece", "llama2")
    served = text_ids(encoder.tokenizer, ollama_joints(encoder))
    with pytest.raises(ConfigurationError, match=r"the Modelfile's template makes other prompts"):
        check_parity(encoder, {"the Modelfile's template": served})


# -- outside the subset ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chat", "what"),
    [
        ("{{ strftime_now('%d %b %Y') }}" + real_tokenizers.CHATML, "asks for today's date"),
        (
            real_tokenizers.CHATML.replace(
                "m['content']", "m['content'].split('</think>')[-1] if not loop.last else m.content"
            ),
            "writes 'thoughts' otherwise",
        ),
        (real_tokenizers.INST_LAST, "writes 'two questions and a system message' otherwise"),
        (
            "{% for m in messages %}<{{ loop.index }}>{{ m['content'] }}{% endfor %}",
            "writes other text around later turns",
        ),
        (real_tokenizers.CHATML + "{{ messages[0]['content'] }}", "drops, repeats or moves"),
        ("{{ messages[-1]['content'] | upper }}", "drops, repeats or moves"),
    ],
)
def test_a_template_outside_the_subset_is_refused_with_what_it_does(chat: str, what: str):
    with pytest.raises(ConfigurationError) as raised:
        ollama_joints(encoder_of("bytes", "chat", chat))
    (sentence,) = str(raised.value).splitlines()
    assert f"cannot be written as a Modelfile's: it {what}" in sentence
    assert sentence.endswith("vllm and gguf take it as it is.")


# -- the command -----------------------------------------------------------------------------------


def test_an_export_holds_the_modelfile_and_says_what_to_type(type_in: Type, adapter: Path):
    code, out, said = type_in(
        *("export", "--adapter", adapter, "--to", "ollama", "--output", "served"),
        *("--score-tokens", "0"),
    )
    assert code == 0, said
    found = read_modelfile(Path("served/Modelfile").read_text())
    assert found["FROM"] == ["./model.gguf"]
    assert '"### Human: "' in found["TEMPLATE"][0]
    assert found["PARAMETER stop"] == ["</s>"]
    assert found["PARAMETER num_ctx"] == ["256"], "what the base can read"
    assert "ollama create my-model -f served/Modelfile" in out
    assert "Prompts are those of training, token for token, by the Modelfile's template" in out
    assert "convert_hf_to_gguf.py" in out, "the file is not there yet"
    assert "held-out rows" in Path("served/README.md").read_text()


def test_a_refused_template_leaves_nothing(type_in: Type, tiny_base: Path, tmp_path: Path):
    dated = tmp_path / "dated.jinja"
    dated.write_text("{{ strftime_now('%Y') }}" + real_tokenizers.CHATML)
    code, out, said = type_in(
        *("export", "--model", tiny_base, "--template", dated, "--to", "ollama", "--output", "o")
    )
    assert (code, out) == (2, "")
    assert "asks for today's date" in said
    assert "Traceback" not in said
    assert not list(Path().iterdir())
