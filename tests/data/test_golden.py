"""Rows of real languages through real tokenizers, frozen as text that a person has read.

Ends of tokens are shown as "|", what is trained stands in ⟦brackets⟧ (a weight other than 1 before
the closing one), control tokens in «guillemets». After a change that is meant to move them:

    python tests/data/test_golden.py

writes them anew, and the difference is to be read before it is committed. More rows: a name and its
conversations in ``ROWS``, and the tokenizers and templates to show them with in ``SHOWN``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as pytest finds them
    sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import pytest
from generated_rows import encoder, has_tokens_of
from toy_tokenizers import asked, spell

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.encoding.encoder import EncodedExample
from qlora_pl.data.reading.named_datasets import DATASETS
from qlora_pl.data.reading.normalizing import read_conversations
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.data.templates.wording import TEXT_TEMPLATES

# ruff: noqa: RUF001  (punctuation of the languages shown)
FOLDER = Path(__file__).parent / "golden"


def fixture(name: str) -> str:
    """Three rows of a named dataset, in its schema."""
    return str(FOLDER.parent / "fixtures" / (f"{name}.txt" if name == "text" else f"{name}.jsonl"))


ROWS: dict[str, list[Conversation]] = {
    "Japanese": [
        asked("日本の首都はどこですか。", "日本の首都は東京です。"),
        asked(
            "「量子化」を一文で説明してください。",
            "重みを少ないビットで表すことです。",
            "例は？",
            "NF4です。",
        ),
    ],
    "Chinese": [
        asked("法国的首都是哪里？", "法国的首都是巴黎。", system="请用简体中文回答。"),
        asked("用一句话解释“微调”。", "在已有模型上继续训练，使其适应新任务。"),
    ],
    "Arabic": [
        asked("ما هي عاصمة مصر؟", "عاصمة مصر هي القاهرة."),
        asked("اكتب الأرقام ١٢٣ بالكلمات.", "مئة وثلاثة وعشرون."),
    ],
    "German": [
        asked("Wie heißt die Hauptstadt von Österreich?", "Sie heißt Wien."),
        asked('Übersetze: "keep it"', "„Behalte es“, sagt man.", "Kürzer?", "„Behalt's.“"),
    ],
    "code, emoji and spaces": [
        asked("Double x in Python.", "def f(x):\n    return 2 * x  # 2x\n"),
        asked("  A rocket? ", " 🚀👩🏽‍🚀 \n"),
    ],
    "control tokens in the text": [
        asked("What does </s> mean?", "</s> ends a text; <|im_end|> and <|eot_id|> end a turn."),
        asked("[INST] is what?", "<s>[INST] opens a question [/INST]", system="<|im_start|>system"),
    ],
    "weights": [
        Conversation(
            (
                Message("user", "1 + 1?"),
                Message("assistant", "3", weight=0.0),
                Message("user", "Really?"),
                Message("assistant", "No, 2.", weight=0.5),
                Message("user", "Sure?"),
                Message("assistant", "Yes."),
            )
        )
    ],
    "every shape": [
        asked("Why?", "Because."),
        Conversation(
            (Message("user", "Sum up.", context="A long text."), Message("assistant", "Short."))
        ),
        asked("One?", "1.", "Two?", "2.", system="Be brief."),
        Conversation.from_text("Plain text, learnt as it stands."),
    ],
}
LANGUAGES = [name for name in ROWS if name != "every shape"]
DIALOGUES = ("guanaco", "oasst1", "hh-rlhf", "chip2", "vicuna")
"""Datasets that are shown under guanaco's template; the others under alpaca's."""


def rows_of_dataset(name: str) -> list[Conversation]:
    """The rows of a dataset's fixture, as a run reads them."""
    source = {"dataset": name, "path": fixture(name), "limit": 3}
    return [c for _, c in read_conversations(RowSources.parse(source))]


ROWS |= {f"dataset {name}": rows_of_dataset(name) for name in DATASETS}
SHOWN: list[tuple[str, str, list[str]]] = [
    *((kind, "chat", LANGUAGES) for kind in ("smollm2", "mistral", "mistral3", "qwen", "llama3")),
    *(
        ("smollm2" if has_tokens_of("smollm2", name) else "mistral3", name, ["every shape"])
        for name in TEXT_TEMPLATES
        if name != "llama3"
    ),
    ("llama3", "llama3", ["every shape"]),
    ("mistral", "guanaco", [f"dataset {name}" for name in DIALOGUES]),
    ("mistral", "alpaca", [f"dataset {name}" for name in DATASETS if name not in DIALOGUES]),
]
"""Tokenizer, template and names of rows: a file each."""


def path_of(kind: str, template: str) -> Path:
    return FOLDER / f"{kind}-{template}.txt"


def page(kind: str, template: str, names: list[str]) -> str:
    """Every row of these names, as its file shows it."""
    with_it = encoder(kind, template)
    lines = [f"{kind}, template {template}"]
    for name in names:
        for number, conversation in enumerate(ROWS[name], start=1):
            (examples,) = with_it.encode([conversation])
            for part, example in enumerate(examples, start=1):
                where = f"{name} {number}" + (f", row {part}" if len(examples) > 1 else "")
                counts = f"{len(example.input_ids)} tokens, {example.num_trained} trained"
                lines += ["", f"--- {where}: {counts}", marked(with_it.tokenizer, example)]
    return "\n".join(lines) + "\n"


def marked(tokenizer: Any, example: EncodedExample) -> str:
    control = set(tokenizer.all_special_ids)
    control |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    text = ""
    for start, end in stretches(example):
        texts = list(characters(tokenizer, example.input_ids[start:end].tolist(), control))
        joined = "|".join(texts)
        weight = 1.0 if example.weights is None else float(example.weights[start])
        counted = "" if weight == 1 else f" weight {weight:g}"
        text += f"⟦{joined}{counted}⟧" if example.is_trained[start] else joined
        text += "|" if end < len(example.input_ids) and not text.endswith("⟧") else ""
    return text


def stretches(example: EncodedExample) -> Iterator[tuple[int, int]]:
    """Where tokens that are trained alike begin and end."""
    weights = example.is_trained * (1.0 if example.weights is None else example.weights)
    start = 0
    for place in range(1, len(weights) + 1):
        if place == len(weights) or weights[place] != weights[start]:
            yield start, place
            start = place


def characters(tokenizer: Any, ids: list[int], control: set[int]) -> Iterator[str]:
    """Tokens as text; those that hold parts of a character stay together."""
    waiting: list[int] = []
    for token in ids:
        if token in control:
            yield f"«{spell(tokenizer, [token])}»"
            continue
        waiting.append(token)
        try:
            text = spell(tokenizer, waiting)
        except UnicodeDecodeError:
            continue
        yield text
        waiting = []
    assert not waiting


@pytest.mark.parametrize(("kind", "template", "names"), SHOWN, ids=lambda value: str(value)[:20])
def test_rows_are_encoded_as_they_were_when_somebody_read_them(
    kind: str, template: str, names: list[str]
):
    """A difference that is meant: ``python tests/data/test_golden.py``, and read what it writes."""
    assert page(kind, template, names) == path_of(kind, template).read_text(encoding="utf-8")


def test_every_file_is_one_that_is_tested():
    expected = {path_of(kind, template).name for kind, template, _ in SHOWN}
    assert {path.name for path in FOLDER.iterdir()} == expected


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for kind, template, names in SHOWN:
        path_of(kind, template).write_text(page(kind, template, names), encoding="utf-8")
        print(path_of(kind, template).name)
