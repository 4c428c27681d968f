"""A random two-layer LLaMA, a tokenizer trained on a page of text, and a dozen rows.

Real bitsandbytes NF4 runs over them on any CPU, so nothing in the tests stands in for it.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from docstring_parser.attrdoc import AttributeDocstrings
from slow_cases import comes_first, is_slow_case

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAGE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request. ### Instruction: ### Response: ### Human: ### Assistant: What is the capital of "
    "France? The capital of France is Paris. How many legs has a spider? It has eight legs. "
)


_read_docstrings = AttributeDocstrings.get_attr_docs


@functools.cache
def _docstrings_read_once(component: Any) -> Any:
    return _read_docstrings(AttributeDocstrings(), component)


# Reading the same files is half of building a parser of a run, of which the tests build hundreds.
AttributeDocstrings.get_attr_docs = lambda _, component: _docstrings_read_once(component)  # type: ignore[method-assign]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what stands for itself in a longer run only; long files come first."""
    for item in items:
        if is_slow_case(item.nodeid):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not comes_first(item.nodeid))


LOGGERS = ("qlora_pl", "lightning.pytorch", "lightning.fabric")


@pytest.fixture(scope="module", autouse=True)
def nothing_old_is_looked_through() -> None:
    """A ``gc.collect()`` of the project takes half a second over all that the libraries define."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def what_a_command_says_aloud_is_its_own_affair() -> Iterator[None]:
    """Commands that run in this process set how much loggers tell; the next test hears all."""
    before = {name: logging.getLogger(name).level for name in LOGGERS}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Packed weights and fingerprints of the tests go to a folder of their own."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("QLORA_PL_CACHE")
    os.environ["QLORA_PL_CACHE"] = str(folder)
    yield folder
    os.environ.pop("QLORA_PL_CACHE")
    if before is not None:
        os.environ["QLORA_PL_CACHE"] = before


def save_tokenizer(folder: Path, adds_bos: bool = False, chat_template: str | None = None) -> None:
    """Train a byte-level BPE on a page and save it as a transformers tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PAGE], trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


def save_t5_tokenizer(folder: Path) -> None:
    """Train a unigram vocabulary on a page and save it as transformers' own T5 tokenizer.

    Special tokens have T5's ids: padding 0, ``</s>`` 1, which it puts at the end of a text.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5TokenizerFast

    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    unigram.train_from_iterator([PAGE, "0123456789"], trainer)
    pieces = json.loads(unigram.to_str())["model"]["vocab"]
    vocabulary = [(piece, score) for piece, score in pieces]
    T5TokenizerFast(vocab=vocabulary, extra_ids=4).save_pretrained(folder)


def save_base(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a random tiny LLaMA with its tokenizer; every width is a multiple of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.1,  # at 0.02 two layers hardly react to their input
        }
        | changes
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder, adds_bos=True, chat_template=CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny base."""
    return save_base(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="session")
def tokenizer(tiny_base: Path) -> Any:
    """The tiny base's tokenizer."""
    from qlora_pl.data.encoding.tokenizer import load_tokenizer

    return load_tokenizer(str(tiny_base))


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny model, by its name, made when it is first asked for."""
    from families import BY_NAME

    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("family") / re.sub(r"\W+", "-", name)
            made[name] = BY_NAME[name].save(folder)
        return made[name]

    return get


ROWS = [
    {
        "prompt": f"How many legs has animal {n}?",
        "response": "It has " + "many " * (n % 5) + f"{n}.",
    }
    for n in range(22)
]


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON lines and returns the file."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-two short questions and answers."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path
