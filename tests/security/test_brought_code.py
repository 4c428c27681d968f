"""Python files that a model or an adapter brings along are not run unless its key says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_base

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.base.identity import refuse_code_from_elsewhere
from security.attempts import Makes, Type, fit

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process


CODE = """import os
os.makedirs({trap!r}, exist_ok=True)
from transformers import LlamaConfig as SentConfig, LlamaForCausalLM as SentModel
from transformers import PreTrainedTokenizerFast as SentTokenizer
"""


@pytest.fixture
def sent_base(tmp_path: Path, trap: Path) -> Path:
    """A base whose model and tokenizer are made by a file in its folder."""
    base = save_base(tmp_path / "sent")
    (base / "sent.py").write_text(CODE.format(trap=str(trap)))
    for name, classes in (
        (
            "config.json",
            {"AutoConfig": "sent.SentConfig", "AutoModelForCausalLM": "sent.SentModel"},
        ),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "sent.SentTokenizer"]}),
    ):
        content = json.loads((base / name).read_text())
        content |= {"auto_map": classes}
        if name == "config.json":
            content |= {"model_type": "sent", "architectures": ["SentModel"]}
        else:
            content |= {"tokenizer_class": "SentTokenizer"}
        (base / name).write_text(json.dumps(content))
    return base


def test_a_base_s_code_is_not_run_whatever_is_answered(
    type_in: Type, sent_base: Path, rows_file: Path, trap: Path
) -> None:
    code, said = type_in(*fit(sent_base, rows_file))
    assert code == 2, said
    assert not trap.exists()


def test_a_tokenizer_s_code_is_not_run_whatever_is_answered(
    type_in: Type, sent_base: Path, tiny_base: Path, rows_file: Path, trap: Path
) -> None:
    code, said = type_in(*fit(tiny_base, rows_file, "--data.tokenizer", sent_base))
    assert code in (0, 2), said
    assert not trap.exists()


@pytest.mark.parametrize("key", ["model.trust_remote_code"])
def test_code_of_a_hub_model_needs_a_revision(
    type_in: Type, rows_file: Path, tiny_base: Path, key: str
) -> None:
    code, said = type_in(
        *fit(Path("owner/model"), rows_file, f"--{key}", "true", "--data.tokenizer", tiny_base)
    )
    assert code == 2
    assert "model.revision: 'owner/model' may run code of its own" in said


@pytest.mark.parametrize("place", ["other/repo--sent.SentModel", [None, "other/repo--sent.X"]])
def test_code_is_not_taken_from_a_repository_that_was_not_named(tmp_path: Path, place: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": place}}))
    with pytest.raises(ConfigurationError, match="takes its code from another repository"):
        refuse_code_from_elsewhere(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "sent.X"}}))
    refuse_code_from_elsewhere(tmp_path)


def test_an_adapter_s_own_classes_are_not_imported(
    type_in: Type, tiny_base: Path, rows_file: Path, tmp_path: Path, trap: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """PEFT's ``auto_mapping`` names a library that AutoPeftModel would import."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (tmp_path / "sentlibrary.py").write_text(CODE.format(trap=str(trap)))
    monkeypatch.syspath_prepend(str(tmp_path))
    mapping = {"base_model_class": "SentModel", "parent_library": "sentlibrary"}
    config = {"peft_type": "LORA", "auto_mapping": mapping, "r": 4, "lora_alpha": 16}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"x": Makes(trap)}, adapter / "adapter_model.bin")
    code, said = type_in(*fit(tiny_base, rows_file, "--model.lora.init_from", adapter))
    assert code == 2, said
    assert not trap.exists()
