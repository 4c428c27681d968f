"""What stands in for a tokenizer or a dataset that cannot be had is of the same kind."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from qlora_pl.data.encoding.tokenizer import load_tokenizer
from qlora_pl.data.reading.formats import FORMATS
from qlora_pl.data.reading.named_datasets import DATASETS
from qlora_pl.data.reading.normalizing import read_conversations
from qlora_pl.data.reading.source_config import SourceConfig
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.errors import ConfigurationError
from qlora_pl.planning.shapes.known_shapes import known_shape
from qlora_pl.smoke.stand_in_rows import COPIES, PAIRS, ROWS, save_stand_in
from qlora_pl.smoke.stand_in_tokenizer import save_stand_in as save_tokenizer

TEXT = "  What does the mill do?\nIt waits, 7 times - né \U0001f642"


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_rows_of_every_format_are_read_as_that_format(name: str, tmp_path: Path) -> None:
    source = SourceConfig(path="owner/data", format=name)
    plain = save_stand_in(source, "data.sources", tmp_path / "rows.jsonl")
    read = [row for _, row in read_conversations(RowSources.parse(plain))]
    assert len(read) == len(PAIRS) * COPIES
    said = Counter(row.messages[-1].content for row in read if not row.is_plain_text)
    if name != "text":
        assert said == {answer: COPIES for _, answer in PAIRS}
    assert len(ROWS[name]) in (3, 6)  # of trees, which are question and answer


@pytest.mark.parametrize("name", [n for n, known in DATASETS.items() if known.path])
def test_a_dataset_that_is_known_is_known_by_its_place_too(name: str, tmp_path: Path) -> None:
    source = SourceConfig(path=str(DATASETS[name].path))
    plain = save_stand_in(source, "data.sources", tmp_path / "rows.jsonl")
    assert len(list(read_conversations(RowSources.parse(plain)))) == len(PAIRS) * COPIES


def test_rows_have_the_columns_that_the_run_renames(tmp_path: Path) -> None:
    source = SourceConfig(path="a/b", format="text", columns={"text": "prompt"})
    plain = save_stand_in(source, "data.sources", tmp_path / "rows.jsonl")
    assert set(json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])) == {"prompt"}
    assert plain["columns"] == {"text": "prompt"}
    assert len(list(read_conversations(RowSources.parse(plain)))) == len(PAIRS) * COPIES


def test_a_dataset_of_which_nothing_is_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="set its format, or go online"):
        save_stand_in(SourceConfig(path="a/b"), "data.sources", tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "kind", "adds_bos"),
    [
        ("llama-7b", "sentencepiece", True),
        ("mistral-7b", "sentencepiece", True),
        ("llama3-8b", "bytes", False),
        ("pythia-12b", "bytes", False),
        ("falcon-rw-1b", "bytes", False),
        ("t5-v1_1-xl", "unigram", False),
        ("gpt2", "bytes", False),
    ],
)
def test_a_tokenizer_is_of_the_familys_kind_and_size(
    name: str, kind: str, adds_bos: bool, tmp_path: Path
) -> None:
    config: dict[str, Any] = AutoConfig.for_model(**known_shape(name)).to_dict()
    assert save_tokenizer(config, tmp_path, has_chat_template=False) == kind
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    ids = tokenizer(TEXT)["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id) == adds_bos
    assert (ids[-1] == tokenizer.eos_token_id) == (kind == "unigram")
    if kind != "unigram":  # which has no bytes for what it does not know
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == TEXT.strip()
    assert len(set(tokenizer.get_vocab().values())) == config["vocab_size"]


def test_a_chat_models_tokenizer_brings_a_template_whose_end_is_a_control_token(
    tmp_path: Path,
) -> None:
    config = AutoConfig.for_model(**known_shape("llama3-8b")).to_dict()
    save_tokenizer(config, tmp_path, has_chat_template=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ids
