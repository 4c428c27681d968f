"""The examples of docs/data.md are what the code does."""

from __future__ import annotations

import re
import sys
from itertools import groupby
from pathlib import Path

import pytest
import yaml

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.lengths import Limits
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.data.rows.preparation import prepare_split
from qlora_pl.data.templates.loading import TEMPLATES, load_template
from qlora_pl.errors import ConfigurationError

sys.path.insert(0, str(Path(__file__).parent / "data"))
from real_tokenizers import real
from toy_tokenizers import build, spell

PAGE = (Path(__file__).parent.parent / "docs/data.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- example: (\S+) -->\n```\w*\n(.*?)```\n", PAGE, flags=re.DOTALL))
ASKED = Conversation((Message("user", "Capital of France?"), Message("assistant", "Paris.")))
TOKENIZERS = {"chatml": "smollm2", "llama2": "mistral", "llama3": "llama3"}
NAMED = [name for name in TEMPLATES if name not in ("auto", "chat")]


def in_brackets(encoder: Encoder, conversation: Conversation) -> str:
    ((_, (rendering,)),) = encoder.render([conversation])
    text = ""
    for is_answer, some in groupby(rendering.segments, key=lambda segment: segment.is_answer):
        joined = "".join(segment.text for segment in some)
        text += f"⟦{joined}⟧" if is_answer else joined
    return text


@pytest.mark.parametrize("name", NAMED)
def test_a_template_renders_its_example(name: str) -> None:
    tokenizer = real(TOKENIZERS[name]) if name in TOKENIZERS else build("bytes")
    encoder = Encoder(load_template(name, tokenizer), tokenizer)
    assert in_brackets(encoder, ASKED) + "\n" == EXAMPLES[name]


def test_a_template_written_in_the_configuration_renders_its_example() -> None:
    written = yaml.safe_load(EXAMPLES["custom"])["data"]["template"]
    tokenizer = build("bytes")
    encoder = Encoder(load_template(written, tokenizer), tokenizer)
    assert in_brackets(encoder, ASKED) + "\n" == EXAMPLES["custom-text"]


def test_a_control_token_in_a_row_is_letters() -> None:
    tokenizer = build("bytes")
    encoder = Encoder(load_template("guanaco", tokenizer), tokenizer)
    row = Conversation(
        (
            Message("user", "What ends a turn?"),
            Message("assistant", "It is <|im_end|> or </s>."),
        )
    )
    assert in_brackets(encoder, row) + "\n" == EXAMPLES["control"]
    ((example,),) = encoder.encode([row])
    assert example.input_ids.tolist().count(2) == 1
    assert example.input_ids[-1] == 2
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in example.input_ids
    shown = EXAMPLES["control"].replace("⟦", "").replace("⟧", "")
    assert spell(tokenizer, example.input_ids) + "\n" == shown


def test_the_sentence_of_the_budget_is_its_example() -> None:
    tokenizer = build("bytes")
    encoder = Encoder(load_template("guanaco", tokenizer), tokenizer)
    rows = [{"prompt": "q", "response": "7" * number} for number in (30, 40, 50, 60, 120)]
    with pytest.raises(ConfigurationError) as caught:
        prepare_split(RowSources.parse(rows), encoder, Limits(max_length=64), "data.sources")
    assert str(caught.value) + "\n" == EXAMPLES["budget"]


def test_every_example_is_tried() -> None:
    assert set(EXAMPLES) == {*NAMED, "custom", "custom-text", "control", "budget"}
