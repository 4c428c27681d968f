"""What llama.cpp itself makes of the exported files, beside transformers in float32.

Both read the same 16-bit weights, and a mean KL of 1e-3 nats is allowed: llama.cpp rounds the
inputs of its products to 16 bits, which costs 1e-4 to 3e-4. `make llama-cpp` installs what this
needs, which is built from source.
"""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from adapter_runs import fit
from data.real_tokenizers import located, real
from families import FAMILIES
from torch import Tensor

from exporting.test_plain_adapter import save_adapter
from qlora_pl.data.encoding.served_template import comparable
from qlora_pl.data.templates.example_conversations import EXAMPLES
from qlora_pl.exporting import llama_cpp
from qlora_pl.inference.loading import load_encoder
from qlora_pl.inference.source import ModelChoice, resolve_source
from qlora_pl.quickstart import prepare

pytestmark = [pytest.mark.filterwarnings("ignore:.*"), pytest.mark.slow]

Type = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]
MOST = 1e-3
"""Nats a token."""
SCALES: dict[str, Any] = {
    "use_rslora": True,
    "alpha": 8.0,
    "rank_pattern": {"q_proj": 16},
    "alpha_pattern": {"v_proj": 2, r"layers.1\d.mlp.\w+": 24},
}


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    """llama.cpp as a module, and its converters in the project's folder."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed; make llama-cpp builds it (some minutes)")
    patched = pytest.MonkeyPatch()
    if not (ROOT / llama_cpp.UNPACKED / llama_cpp.MODEL_CONVERTER).is_file():
        if llama_cpp.find_converter(llama_cpp.MODEL_CONVERTER) is None:
            pytest.skip("llama.cpp's converters are not here; make llama-cpp fetches them")
    else:
        patched.setenv(llama_cpp.VARIABLE, str(ROOT / llama_cpp.UNPACKED))
    yield
    patched.undo()


@pytest.fixture(scope="module")
def smollm2() -> Path:
    folder = ROOT / ".cache/quickstart/SmolLM2-135M-Instruct"
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def trained(smollm2: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with every kind of scale at once, trained for three steps over NF4."""
    folder = tmp_path_factory.mktemp("trained")
    fit(folder, smollm2, rows_file, compute="bfloat16", **SCALES)
    return folder / "adapter"


class Loaded:
    """A GGUF file in llama.cpp, closed at the end of its block."""

    def __init__(self, file: Path, adapter: Path | None = None, vocab_only: bool = False) -> None:
        from llama_cpp import Llama

        self.llama = Llama(
            str(file),
            n_ctx=512,
            n_threads=1,
            logits_all=True,
            verbose=False,
            vocab_only=vocab_only,
            lora_path=None if adapter is None else str(adapter),
        )

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, *_: object) -> None:
        self.llama.close()

    def ids(self, text: str) -> list[int]:
        """Of a whole prompt, control tokens among it, as llama.cpp's server reads it."""
        found: list[int] = self.llama.tokenize(text.encode(), add_bos=True, special=True)
        return found

    def log_probabilities(self, ids: list[int]) -> Tensor:
        self.llama.reset()
        self.llama.eval(ids)
        scores = torch.from_numpy(np.array(self.llama.scores[: len(ids)])).double()
        return scores.log_softmax(-1)


def plain(model: Any, ids: list[int]) -> Tensor:
    """What transformers says in float32."""
    with torch.no_grad():
        logits: Tensor = model.eval()(torch.tensor([ids]), use_cache=False).logits[0]
    return logits.double().log_softmax(-1)


def divergence(expected: Tensor, found: Tensor) -> float:
    """Mean KL, nats a token."""
    found = found[:, : expected.shape[1]]
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def in_float32(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def prompts(**choice: Any) -> dict[str, tuple[str, list[int]]]:
    """Text and ids of training's own template, of every example that spells no control token."""
    encoder = load_encoder(resolve_source(ModelChoice(**choice)), None)
    kept, _ = comparable(encoder, EXAMPLES)
    assert len(kept) > 3
    return {name: encoder.encode_prompt(conversation) for name, conversation in kept.items()}


def compare(
    loaded: Loaded, model: Any, asked: dict[str, tuple[str, list[int]]]
) -> tuple[float, int]:
    """Ids must be equal; mean KL over all prompts, and how many tokens that is."""
    total, number = 0.0, 0
    for name, (text, ids) in asked.items():
        assert loaded.ids(text) == ids, name
        if len(ids) < 400:
            total += divergence(plain(model, ids), loaded.log_probabilities(ids)) * len(ids)
            number += len(ids)
    return total / number, number


def test_a_merged_model_is_the_same_in_llama_cpp(
    trained: Path, tmp_path: Path, type_in: Type
) -> None:
    words = ("--adapter", trained, "--score-tokens", "0", "--output")
    code, _, said = type_in("merge", *words, tmp_path / "merged")
    assert code == 0, said
    words = ("--model", tmp_path / "merged", "--to", "gguf", "--convert", "--output")
    code, out, said = type_in("export", *words, tmp_path / "gguf")
    assert code == 0, said
    assert "llama-server -m " in out
    with Loaded(tmp_path / "gguf/model.gguf") as loaded:
        found, number = compare(
            loaded, in_float32(tmp_path / "merged"), prompts(adapter=(str(trained),))
        )
    assert found < MOST
    assert number > 100


def test_an_adapter_alone_is_the_same_over_the_base_in_llama_cpp(
    trained: Path, smollm2: Path, tmp_path: Path, type_in: Type
) -> None:
    """With every kind of scale; and unfolded, as the converter takes it, it is another adapter."""
    to = ("--to", "gguf", "--convert", "--output")
    code, _, said = type_in("export", "--model", smollm2, *to, tmp_path / "base")
    assert code == 0, said
    form = ("--form", "adapter", "--score-tokens", "200")
    code, out, said = type_in("export", "--adapter", trained, *form, *to, tmp_path / "lora")
    assert code == 0, said
    assert "Scales of the adapter's modules went into its matrices" in out
    assert "Over the base in 16 bits the adapter lies" in out
    file = tmp_path / "base/model.gguf"
    asked = prompts(adapter=(str(trained),))
    base = in_float32(smollm2)
    with Loaded(file) as off:
        assert compare(off, base, asked)[0] < MOST
    _, ids = next(iter(asked.values()))
    without = plain(base, ids)
    over = peft.PeftModel.from_pretrained(base, trained)
    assert divergence(plain(over, ids), without) > 20 * MOST, "it changes too little to tell"
    with Loaded(file, tmp_path / "lora/adapter.gguf") as on:
        assert compare(on, over, asked)[0] < MOST
    converter = llama_cpp.need_converter(llama_cpp.ADAPTER_CONVERTER)
    unfolded = tmp_path / "unfolded.gguf"
    llama_cpp.convert(llama_cpp.adapter_words(converter, trained, smollm2, unfolded), unfolded)
    with Loaded(file, unfolded) as wrong:
        assert compare(wrong, over, asked)[0] > 10 * MOST


def test_chat_templates_and_guanaco_give_llama_cpp_the_ids_of_training(
    smollm2: Path, tmp_path: Path, type_in: Type
) -> None:
    to = ("--to", "gguf", "--convert", "--output", tmp_path / "base")
    code, _, said = type_in("export", "--model", smollm2, *to)
    assert code == 0, said
    with Loaded(tmp_path / "base/model.gguf", vocab_only=True) as loaded:
        for template in ("chat", "guanaco", "alpaca"):
            for name, (text, ids) in prompts(model=str(smollm2), template=template).items():
                assert loaded.ids(text) == ids, (template, name)


@pytest.mark.parametrize("name", ["mistral", "mistral3", "llama3", "qwen"])
def test_real_vocabularies_give_the_same_ids(name: str, tmp_path: Path, type_in: Type) -> None:
    """The two of SentencePiece's come without tokenizer.model, as transformers saves them."""
    base = with_tokenizer("Qwen2" if name == "qwen" else "LLaMA", name, tmp_path / "base")
    to = ("--to", "gguf", "--convert", "--output", tmp_path / "out")
    code, _, said = type_in("export", "--model", base, *to)
    assert code == 0, said
    with Loaded(tmp_path / "out/model.gguf", vocab_only=True) as loaded:
        for key, (text, ids) in prompts(model=str(base), template="chat").items():
            # Its template writes the BOS token, as the server knows.
            text = text.removeprefix(real(name).bos_token or "")
            assert loaded.ids(text) == ids, key


def test_without_its_scores_a_sentencepiece_vocabulary_gives_other_ids(tmp_path: Path) -> None:
    """What ``complete`` puts right, beside the vocabulary's own tokenizer.model as the source."""
    from qlora_pl.exporting.gguf_file import complete

    base = with_tokenizer("LLaMA", "mistral", tmp_path / "base")
    page = (ROOT / "docs/merging.md").read_text().replace("\n", " ")
    files = {name: tmp_path / f"{name}.gguf" for name in ("bare", "mended", "own")}
    converter = llama_cpp.need_converter(llama_cpp.MODEL_CONVERTER)
    for name, file in files.items():
        if name == "own":
            model = located("mistral-common", "tokenizer.model.v1").read_bytes()
            (base / "tokenizer.model").write_bytes(model)
        words = llama_cpp.model_words(converter, base, file)
        subprocess.run([*words, "--vocab-only"], check=True, capture_output=True)
    complete(files["mended"], base, [])
    found = {}
    for name, file in files.items():
        with Loaded(file, vocab_only=True) as loaded:
            found[name] = loaded.ids(page)
    assert found["mended"] == found["own"] == real("mistral")(page)["input_ids"]
    assert found["bare"] != found["own"]


def with_tokenizer(family: str, name: str, folder: Path) -> Path:
    """A tiny model of a family with a published vocabulary."""
    tokenizer = real(name)
    shape = next(one for one in FAMILIES if one.name == family)
    shape.save(folder, vocab_size=len(tokenizer))
    for old in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / old).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


SUPPORTED = ["LLaMA", "Mistral", "Qwen2", "Qwen3", "GPT-NeoX, Pythia", "BLOOM", "Falcon (rotary)"]


@pytest.mark.parametrize("family", SUPPORTED)
def test_other_families_are_the_same_in_llama_cpp(
    family: str, tmp_path: Path, type_in: Type
) -> None:
    base = with_tokenizer(family, "smollm2", tmp_path / "base")
    layers = next(one for one in FAMILIES if one.name == family).linears
    settings = {"target_modules": list(layers), "use_rslora": True}
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    to = ("--to", "gguf", "--convert", "--output")
    code, _, said = type_in("export", "--model", base, *to, tmp_path / "a")
    assert code == 0, said
    words = ("--adapter", adapter, "--base", base, "--form", "adapter")
    code, out, said = type_in("export", *words, *to, tmp_path / "b")
    assert code == 0, said
    assert "was not measured" in out
    ids = real("smollm2")("The quick brown fox jumps over the lazy dog, twice.")["input_ids"]
    model = in_float32(base)
    without = plain(model, ids)
    over = plain(peft.PeftModel.from_pretrained(model, adapter), ids)
    with Loaded(tmp_path / "a/model.gguf") as off:
        assert divergence(without, off.log_probabilities(ids)) < MOST
    with Loaded(tmp_path / "a/model.gguf", tmp_path / "b/adapter.gguf") as on:
        assert divergence(over, on.log_probabilities(ids)) < MOST
    assert divergence(over, without) > 20 * MOST
