"""A configuration, a flag or a template makes no object and runs no code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora_pl.errors import ConfigurationError
from security.attempts import Type, fit

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process


YAML = (
    "!!python/object/apply:os.makedirs ['TRAP']",
    "!!python/object/new:os.makedirs ['TRAP']",
    "{model: {model_name_or_path: !!python/object/apply:os.makedirs ['TRAP']}}",
    "{trainer: {callbacks: [!!python/object/apply:os.makedirs ['TRAP']]}}",
)


@pytest.mark.parametrize("text", YAML)
def test_a_configuration_makes_no_object_of_python_s(
    type_in: Type, tmp_path: Path, trap: Path, text: str
) -> None:
    path = tmp_path / "sent.yaml"
    path.write_text(text.replace("TRAP", str(trap)) + "\n")
    code, said = type_in("fit", "--config", path)
    assert code == 2, said
    assert "Traceback" not in said
    assert not trap.exists()


@pytest.mark.parametrize("flag", ["--data.sources", "--trainer.callbacks", "--model", "--run.name"])
def test_nor_does_a_flag(
    type_in: Type, tiny_base: Path, rows_file: Path, trap: Path, flag: str
) -> None:
    value = YAML[0].replace("TRAP", str(trap))
    value = f"{{x: {value}}}" if flag == "--model" else value
    code, said = type_in(*fit(tiny_base, rows_file, flag, value))
    assert code == 2, said
    assert "Traceback" not in said
    assert not trap.exists()


JINJA = (
    "{{ cycler.__init__.__globals__.os.makedirs('TRAP') }}",
    "{{ joiner.__init__.__globals__['os'].makedirs('TRAP') }}",
    "{{ lipsum.__globals__['os'].makedirs('TRAP') }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').makedirs('TRAP') }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__()[0].__init__.__globals__ }}",
    "{{ raise_exception.__globals__['__builtins__']['__import__']('os').makedirs('TRAP') }}",
    "{{ ('{0.__class__.__mro__}').format(messages) }}",
    "{{ messages.append(messages[0]) }}",
    "{% for _ in range(10 ** 9) %}x{% endfor %}",
)


LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def render(attempt: str, place: str, tiny_base: Path, folder: Path) -> str:
    """An answered question under a template that begins with this."""
    from qlora_pl.data.conversation import Conversation, Message
    from qlora_pl.data.encoding.tokenizer import load_tokenizer
    from qlora_pl.data.templates.loading import load_template

    source = f"{attempt}{LOOP}{ASKS}"
    base = folder / "base"
    shutil.copytree(tiny_base, base)
    if place == "tokenizer":
        (base / "chat_template.jinja").write_text(source)
    tokenizer = load_tokenizer(str(base))
    definition: Any = {"jinja": source} if place == "data.template" else "chat"
    conversation = Conversation((Message("user", "Hello?"), Message("assistant", "Yes.")))
    [[row]] = load_template(definition, tokenizer).render_rows([conversation])
    return "".join(segment.text for segment in row.segments)


@pytest.mark.parametrize("place", ["data.template", "tokenizer"])
def test_a_template_that_stays_in_its_sandbox_renders(
    tiny_base: Path, tmp_path: Path, place: str
) -> None:
    assert render("Hello! ", place, tiny_base, tmp_path).startswith("Hello! <|im_start|>user")


@pytest.mark.parametrize("attempt", JINJA)
@pytest.mark.parametrize("place", ["data.template", "tokenizer"])
def test_a_template_does_not_leave_its_sandbox(
    tiny_base: Path, tmp_path: Path, trap: Path, attempt: str, place: str
) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.template: "):
        render(attempt.replace("TRAP", str(trap)), place, tiny_base, tmp_path)
    assert not trap.exists()
