"""A tokenizer in place of one that cannot be had: of its kind and size, with words of its own.

What depends on the real vocabulary (lengths, the joints of a template, a chat template) is not
tested with it, which the checklist says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Kind = Literal["bytes", "sentencepiece", "unigram"]
PAGE = (
    "A river begins where the rain decides. It asks no one for the way, and yet it finds the sea. "
    "Below is an instruction that describes a task. Write a response. ### Instruction: ### Input: "
    "### Response: ### Human: ### Assistant: USER: ASSISTANT: Definition: Output: Question: Answer:"
    " What does the mill do when there is no wind? It waits, as the miller does. 0123456789"
)
"""What the few tokens that are used are learnt from."""
NUM_LEARNT = 600
CONTROL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
"""What templates of chat models write."""
TURN_ENDS = ("<|im_end|>", "<|eot_id|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNIGRAM_FAMILIES = ("t5", "mt5", "umt5", "longt5")
SENTENCEPIECE_FAMILIES = ("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "phi3")
LARGEST_SENTENCEPIECE = 100_000
"""Llama 3 and later ones have more tokens, which are bytes; Gemma has more, which are not."""


def kind_of(config: Mapping[str, Any]) -> Kind:
    """The kind of a family's tokenizer."""
    family, size = str(config.get("model_type")), int(config.get("vocab_size") or 0)
    if family in UNIGRAM_FAMILIES:
        return "unigram"
    is_small = size <= LARGEST_SENTENCEPIECE or family.startswith("gemma")
    return "sentencepiece" if family in SENTENCEPIECE_FAMILIES and is_small else "bytes"


def save_stand_in(config: Mapping[str, Any], folder: Path, has_chat_template: bool) -> Kind:
    """Make a tokenizer for a model.

    Args:
        config: The model's settings: ``model_type``, ``vocab_size`` and the ids of special tokens.
        folder: Where it goes.
        has_chat_template: Whether it brings one.

    Returns:
        Its kind.
    """
    kind = kind_of(config)
    make = _unigram if kind == "unigram" else _bytes if kind == "bytes" else _sentencepiece
    tokenizer = make(config)
    if has_chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return kind


def special_tokens(config: Mapping[str, Any], names: tuple[str, str]) -> dict[str, int]:
    """Special tokens by name with the ids that the model's settings give them.

    Args:
        config: The model's.
        names: Of the beginning and the end of a text.
    """
    bos, eos = _id(config, "bos_token_id"), _id(config, "eos_token_id")
    found: dict[str, int] = {}
    if eos is not None:
        found[names[1]] = eos
    if bos is not None and bos != eos:
        found[names[0]] = bos
    pad = _id(config, "pad_token_id")
    if pad is not None and pad not in found.values():
        found["<pad>"] = pad
    return found


def _id(config: Mapping[str, Any], key: str) -> int | None:
    value: Any = config.get(key)
    value = value[0] if isinstance(value, list) and value else value
    if not isinstance(value, int) or not 0 <= value < int(config["vocab_size"]):
        return None
    return value


def placed(specials: Mapping[str, int], learnt: list[str], size: int) -> list[str]:
    """A vocabulary in the order of its ids: special tokens in their places, fillers at the end."""
    by_id = {number: name for name, number in specials.items()}
    rest = iter([*(name for name in learnt if name not in specials), *CONTROL])
    names = set(specials)
    vocabulary = []
    for number in range(size):
        name = by_id.get(number) or next(rest, f"<filler_{number}>")
        while name in names and number not in by_id:
            name = next(rest, f"<filler_{number}>")
        names.add(name)
        vocabulary.append(name)
    return vocabulary


def _bytes(config: Mapping[str, Any]) -> Any:
    """Byte-level BPE, as GPT-2's, Pythia's, BLOOM's, Falcon's and Llama 3's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_LEARNT,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([PAGE], trainer)
    specials = special_tokens(config, ("<s>", "<|endoftext|>"))
    tokenizer = Tokenizer(_with_all(trained, specials, config, fallback=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer, specials, ("<s>", "<|endoftext|>"))


def _sentencepiece(config: Mapping[str, Any]) -> Any:
    """LLaMA's kind: spaces as a letter of their own, unknown characters as bytes, BOS in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_LEARNT, special_tokens=["<unk>"], show_progress=False
    )
    trained.train_from_iterator([PAGE], trainer)
    specials = special_tokens(config, ("<s>", "</s>"))
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    model = _with_all(trained, specials, config, byte_tokens)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    if "<s>" in specials:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", specials["<s>"])]
        )
    return _wrapped(tokenizer, specials, ("<s>", "</s>"))


def _with_all(
    trained: Any, specials: Mapping[str, int], config: Mapping[str, Any], fallback: list[str]
) -> Any:
    """A BPE model with every id of the vocabulary taken."""
    from tokenizers import models

    learnt = json.loads(trained.to_str())["model"]
    names = sorted(learnt["vocab"], key=learnt["vocab"].get)
    vocabulary = placed(specials, [*fallback, *names], int(config["vocab_size"]))
    return models.BPE(
        vocab={name: number for number, name in enumerate(vocabulary)},
        merges=[tuple(pair) for pair in learnt["merges"]],
        unk_token="<unk>" if "<unk>" in learnt["vocab"] else None,
        byte_fallback=bool(fallback),
        fuse_unk=bool(fallback),
    )


def _unigram(config: Mapping[str, Any]) -> Any:
    """T5's kind, which ends every text with its end-of-text token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5TokenizerFast

    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    first = ["<pad>", "</s>", "<unk>"]  # T5's ids 0, 1 and 2
    trainer = trainers.UnigramTrainer(
        vocab_size=NUM_LEARNT, special_tokens=first, unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator([PAGE], trainer)
    pieces = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    lowest = min(score for _, score in pieces)
    extra = 100  # sentinels, which T5's pre-training needs, at the end
    size = int(config["vocab_size"]) - extra
    pieces += [(f"<filler_{number}>", lowest - 10) for number in range(len(pieces), size)]
    return T5TokenizerFast(vocab=pieces, extra_ids=extra)


def _wrapped(tokenizer: Any, specials: Mapping[str, int], names: tuple[str, str]) -> Any:
    from transformers import PreTrainedTokenizerFast

    bos, eos = names
    end = eos if eos in specials else None
    has_unknown = tokenizer.token_to_id("<unk>") is not None
    control = [token for token in CONTROL if tokenizer.token_to_id(token) is not None]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos if bos in specials else end,
        eos_token=end,
        unk_token="<unk>" if has_unknown else None,
        pad_token="<pad>" if "<pad>" in specials else None,
        additional_special_tokens=control,
    )
