"""Tokens without an embedding row: refused, or given rows that are trained, saved and reloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import make_data, make_trainer
from conftest import save_base
from lightning.pytorch import seed_everything
from plain_peft import reload_with_plain_peft
from safetensors.torch import load_file
from transformers import AutoTokenizer

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig

ROWS = 390  # embedding rows of the base; its tokenizer has 389 tokens
pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", vocab_size=ROWS, tie_word_embeddings=request.param)


@pytest.fixture
def tokenizer(base: Path, tmp_path: Path) -> Path:
    """The base's with three tokens more, of which one has a row already.

    Not special ones: those would be ordinary text where a row writes them.
    """
    more = AutoTokenizer.from_pretrained(base)
    more.add_tokens(["<|one|>", "<|two|>", "<|three|>"])
    assert len(more) == ROWS + 2
    more.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    asked = [{"prompt": f"<|two|> of {n}?", "response": f"{n} <|three|>"} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))
    return path


def fit(
    folder: Path,
    base: Path,
    tokenizer: Path,
    rows: Path,
    trains: tuple[str, ...] = (),
    template: Any = "auto",
    **settings: Any,
) -> QLoRAModule:
    seed_everything(0)
    module = QLoRAModule(
        str(base),
        lora=LoRAConfig(r=4, trainable_tokens=list(trains)),
        optimizer=OptimizerConfig(lr=1.0e-2),
        quantization=QuantizationConfig(compute_dtype="float32"),
        **settings,
    )
    data = make_data(rows, tokenizer=str(tokenizer), batch_size=4, template=template)
    make_trainer(folder).fit(module, data)
    return module


def test_a_vocabulary_never_grows_unasked(base, tokenizer, rows, tmp_path):
    with pytest.raises(ConfigurationError, match="has 392 tokens, the base has 390") as caught:
        fit(tmp_path / "run", base, tokenizer, rows)
    assert "model.grow_vocabulary" in str(caught.value)


def test_new_rows_are_trained_saved_alone_and_reloaded_by_plain_peft(
    base, tokenizer, rows, tmp_path
):
    """The logits of plain PEFT, by the adapter's own README: 1e-5, float32 in another order."""
    module = fit(tmp_path / "run", base, tokenizer, rows, grow_vocabulary=True)
    folder = tmp_path / "run" / "adapter"
    stored = load_file(folder / "adapter_model.safetensors")
    grown = {name: t for name, t in stored.items() if "lora_" not in name}
    is_tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    assert len(grown) == (1 if is_tied else 2)
    weights = load_file(base / "model.safetensors")
    start = weights["model.embed_tokens.weight"].float().mean(dim=0)
    for name, rows_of_it in grown.items():
        assert rows_of_it.shape == (2, 64)
        assert rows_of_it.dtype == torch.float32
        if "embed_tokens" in name:
            assert not torch.allclose(rows_of_it[1], start, atol=1e-2)  # <|three|> was trained
    assert "resize_token_embeddings(392)" in (folder / "README.md").read_text()
    ids = torch.tensor([[5, 390, 6, 391, 7, 389]])
    assert module.model is not None
    with torch.no_grad():
        expected = module.model.eval()(input_ids=ids, use_cache=False).logits
        reloaded = reload_with_plain_peft(folder).eval()(input_ids=ids).logits
    assert expected.shape[-1] == 392
    torch.testing.assert_close(reloaded, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


STOPS_ELSEWHERE = {"question": "{content}", "answer": " {content}", "stop": "<|im_start|>"}


def test_an_unknown_stop_token_is_refused_until_its_row_is_trained(base, rows, tmp_path):
    """The row moves, all others stay, and plain PEFT loads both. Logits: 1e-5, as above."""
    with pytest.raises(ConfigurationError, match=r"trainable_tokens \['<\|im_start\|>'\]"):
        fit(tmp_path / "run", base, base, rows, template=STOPS_ELSEWHERE)
    trains = ("<|im_start|>",)
    module = fit(tmp_path / "run", base, base, rows, trains, STOPS_ELSEWHERE)
    folder = tmp_path / "run" / "adapter"
    stored = load_file(folder / "adapter_model.safetensors")
    rows_of_token = {name: t for name, t in stored.items() if "lora_" not in name}
    is_tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    assert [t.shape for t in rows_of_token.values()] == [(1, 64)] * (1 if is_tied else 2)
    holder = "embed_tokens" if is_tied else "lm_head"  # nothing follows it, so that it is no input
    weights = load_file(base / "model.safetensors")
    start = next(t for name, t in weights.items() if holder in name)[3].float()
    (moved,) = [t for name, t in rows_of_token.items() if holder in name]
    assert not torch.allclose(moved[0], start, atol=1e-3)
    ids = torch.tensor([[5, 3, 6, 4, 7]])
    assert module.model is not None
    with torch.no_grad():
        expected = module.model.eval()(input_ids=ids, use_cache=False).logits
        reloaded = reload_with_plain_peft(folder).eval()(input_ids=ids).logits
    torch.testing.assert_close(reloaded, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_token_that_is_none_is_named_before_weights_are_loaded(base, rows, tmp_path):
    with pytest.raises(ConfigurationError, match=r"'<\|im_ends\|>' is no token .* did you mean"):
        fit(tmp_path / "run", base, base, rows, trains=("<|im_ends|>",))
