"""Ollama's side of a prompt, rendered by Go's own text/template."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from data import real_tokenizers
from data.toy_tokenizers import TEXTS, asked, build

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.served_template import as_dicts, comparable, encoder_joints
from qlora_pl.data.templates.example_conversations import EXAMPLES
from qlora_pl.data.templates.joints import Joints
from qlora_pl.data.templates.loading import load_template
from qlora_pl.data.templates.wording import TEXT_TEMPLATES
from qlora_pl.exporting.go_template import SPACES, go_string, go_template

Turns = Sequence[dict[str, str]]
Render = Callable[[str, Sequence[Turns]], list[dict[str, str]]]
CHAT_TEMPLATES = {
    "default system": real_tokenizers.CHATML_WITH_DEFAULT,
    "trimmed": real_tokenizers.LLAMA3,
    "folded": real_tokenizers.INST,
    "no system": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
    + real_tokenizers.CHATML,
}


def encoder_of(template: str) -> Encoder:
    chat = CHAT_TEMPLATES.get(template, real_tokenizers.CHATML)
    tokenizer = build("bytes", chat)
    name = "chat" if template in CHAT_TEMPLATES else template
    return Encoder(load_template(name, tokenizer), tokenizer)


@pytest.fixture(scope="session")
def render(tmp_path_factory: pytest.TempPathFactory) -> Render:
    """A program of a page that gives Go's templates what Ollama gives them."""
    if shutil.which("go") is None:
        pytest.skip("Go is not installed (Debian's golang-go has it), so nothing renders this")
    program = tmp_path_factory.mktemp("go") / "render"
    source = Path(__file__).parent / "render_template.go"
    subprocess.run(["go", "build", "-o", program, source], check=True)

    def run(template: str, conversations: Sequence[Turns]) -> list[dict[str, str]]:
        given = json.dumps({"template": template, "conversations": list(conversations)})
        done = subprocess.run([program], input=given, text=True, capture_output=True, check=True)
        found: list[dict[str, str]] = json.loads(done.stdout)
        return found

    return run


def turns(*said: tuple[str, str]) -> Turns:
    return [{"role": role, "content": content} for role, content in said]


# -- with Go ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "template", [*sorted(set(TEXT_TEMPLATES) - {"llama3"}), "chat", *CHAT_TEMPLATES]
)
def test_go_renders_the_prompts_of_training(render: Render, template: str):
    encoder = encoder_of(template)
    conversations = EXAMPLES | {repr(text): asked(text, text, text) for text in TEXTS}
    kept, _ = comparable(encoder, conversations)
    assert len(kept) > 25
    found = render(go_template(encoder_joints(encoder)), [as_dicts(c) for c in kept.values()])
    for (name, conversation), outcome in zip(kept.items(), found, strict=True):
        assert outcome == {"text": encoder.encode_prompt(conversation)[0], "error": ""}, name


@pytest.mark.slow
def test_go_trims_what_python_trims(render: Render):
    """Every space of ``str.strip`` at both ends, alone, and beside characters of as many bytes."""
    joints = encoder_joints(encoder_of("trimmed"))
    spaces = [character for some in SPACES for character in some]
    assert spaces == [chr(n) for n in range(0x110000) if chr(n).isspace()]
    texts = [f"{s}x{s}y{s}" for s in spaces] + spaces + ["é\xa0", "\u3000日", "\u200bé\u200b", ""]
    conversations = [Conversation((Message("user", text),)) for text in texts]
    found = render(go_template(joints), [as_dicts(c) for c in conversations])
    assert [outcome["text"] for outcome in found] == [
        f"{joints.opening}{text.strip()}{joints.cue}" for text in texts
    ]


@pytest.mark.slow
def test_go_leaves_an_answer_at_the_end_open(render: Render):
    """So that the model goes on with it, as Ollama's clients expect."""
    joints = encoder_joints(encoder_of("chatml"))
    (found,) = render(go_template(joints), [turns(("user", "Why?"), ("assistant", "Because"))])
    assert found["text"] == ("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause")


@pytest.mark.slow
def test_an_answer_whose_question_ollama_dropped_is_left_out(render: Render):
    joints = encoder_joints(encoder_of("chatml"))
    said = turns(("system", "Be brief."), ("assistant", "Because."), ("user", "And now?"))
    (found,) = render(go_template(joints), [said])
    expected = asked("And now?", system="Be brief.").messages
    assert found["text"] == joints.render(expected, asks=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            (("user", "a"), ("system", "b"), ("user", "c")),
            "a system message comes first, or not at all",
        ),
        ((("user", "a"), ("tool", "b")), "knows the roles system, user and assistant"),
    ],
)
def test_what_training_never_had_is_an_error_in_words(
    render: Render, said: tuple[tuple[str, str], ...], sentence: str
):
    (found,) = render(go_template(encoder_joints(encoder_of("chatml"))), [turns(*said)])
    assert sentence in found["error"]


@pytest.mark.slow
def test_a_refused_system_message_is_an_error_in_words(render: Render):
    joints = encoder_joints(encoder_of("no system"))
    (found,) = render(go_template(joints), [turns(("system", "a"), ("user", "b"))])
    assert "this template has no place for a system message" in found["error"]


@pytest.mark.slow
def test_go_reads_every_character_of_a_literal(render: Render):
    text = "".join(chr(n) for n in [*range(1, 0x180), 0x2028, 0x3000, 0xFEFF, 0x1F642, 0x10FFFD])
    (found,) = render(f"{{{{ range .Messages }}}}{{{{ end }}}}{{{{ {go_string(text)} }}}}", [[]])
    assert found["text"] == text


# -- as text ---------------------------------------------------------------------------------------


def test_literals_are_printable_ascii_without_quotation_marks():
    assert go_string('a"b\\\n\t\r{{é🙂\x7f') == (
        '"a\\u0022b\\\\\\n\\t\\r{{\\u00e9\\U0001f642\\u007f"'
    )


def test_texts_of_the_joints_are_in_the_template_and_nothing_else_of_them_changes_it():
    joints: Any = encoder_joints(encoder_of("chatml"))
    text = go_template(joints)
    for joint in (joints.opening, joints.cue, joints.answer_to_question, joints.system_to_question):
        assert f"{{{{- {go_string(joint)} -}}}}" in text
    assert '"""' not in text, "which would end the template within a Modelfile"
    assert text.isascii()
    assert "define" not in text, "spaces are trimmed where training trimmed them alone"
    assert 'template "trimmed" .Content' in go_template(encoder_joints(encoder_of("trimmed")))


def test_an_empty_system_message_is_shown_where_training_showed_it():
    plain = Joints(
        opening="U",
        system="S",
        system_to_question="T",
        question_to_answer="A",
        cue="A",
        answer_to_question="Q",
        ending="E",
    )
    assert "{{- if .Content -}}" in go_template(plain)
    shown = Joints(**{**plain.__dict__, "shows_empty_system": True})
    assert "{{- if .Content -}}" not in go_template(shown)
