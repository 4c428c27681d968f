"""``qlora-pl merge``: the better of two policies, scored, whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import fit
from families import Saver
from torch.nn import functional
from typed import type_words

from qlora_pl.merging.scoring import ScoredRow, held_out_rows, score, write_reference

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process

Type = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    fit(folder, tiny_base, rows_file, r=8, compute="bfloat16")
    return folder / "adapter"


@pytest.fixture
def type_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Type:
    """Types a command in an empty folder: exit code, standard output, standard error."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*words: object) -> tuple[int, str, str]:
        return type_words(monkeypatch, capsys, *words)

    return run


def test_the_better_policy_is_kept_and_loads_in_plain_transformers(
    type_in: Type, adapter: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, out, said = type_in("merge", "--adapter", adapter, "--output", "merged", "--force")
    assert code == 0, said
    record = json.loads(Path("merged/merge.json").read_text())
    scores = record["scores"]
    assert set(scores) == {"dequantized", "original"}
    better = min(scores, key=lambda name: scores[name]["kl_divergence"])
    assert record["policy"] == better == "dequantized"
    assert scores["dequantized"]["kl_divergence"] < 0.2 * scores["original"]["kl_divergence"]
    assert "| dequantized |" in out
    assert out.rstrip().endswith("merge: merged")
    model = AutoModelForCausalLM.from_pretrained("merged")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [2]
    tokenizer = AutoTokenizer.from_pretrained("merged")
    asked = [{"role": "user", "content": "How many legs?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == "<s>### Human: How many legs?### Assistant:"  # as trained
    left = sorted(path.name for path in Path("merged").iterdir())
    assert not [name for name in left if name.startswith(("reference", "original", "dequantized"))]
    assert [path.name for path in Path().iterdir()] == ["merged"]
    code, answer, _ = type_in(
        *("generate", "--model", "merged", "--prompt", "How many legs?", "--max-new-tokens", "4"),
    )
    assert code == 0
    _, trained, _ = type_in(
        *("generate", "--adapter", adapter, "--prompt", "How many legs?", "--max-new-tokens", "4")
    )
    assert answer == trained


def test_scores_are_those_of_the_definitions(tmp_path: Path) -> None:
    """Source: sums over float64 softmaxes."""

    class Fixed(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self, logits: torch.Tensor) -> None:
            super().__init__()
            self.logits = logits

        def forward(self, **_: Any) -> Any:
            return self

    draw = torch.Generator().manual_seed(0)
    trained, merged = (torch.randn(1, 6, 11, generator=draw) for _ in range(2))
    ids = torch.randint(0, 11, (6,), generator=draw)
    places = torch.tensor([1, 2, 4])
    row = ScoredRow(ids, places)
    path = tmp_path / "reference.npy"
    write_reference(Fixed(trained), [row], path)
    found = score(Fixed(merged), [row], path)
    p, q = (x[0, places].double().softmax(-1) for x in (trained, merged))
    assert found.kl_divergence == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert found.top1_agreement == pytest.approx(
        float((p.argmax(-1) == q.argmax(-1)).double().mean())
    )
    loss = functional.nll_loss(q.log(), ids[places + 1])
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.tokens == 3


def test_held_out_rows_are_the_trained_tokens_of_the_validation_rows(adapter: Path) -> None:
    rows = held_out_rows(adapter)
    assert len(rows) == 2
    for row in rows:
        assert len(row.places)
        assert int(row.places.max()) + 1 < len(row.input_ids)
    assert len(held_out_rows(adapter, most=1)) == 1


def test_a_model_that_is_another_one_is_not_written(type_in: Type, adapter: Path) -> None:
    words = ("merge", "--adapter", adapter, "--output", "merged", "--policy", "original")
    code, _, said = type_in(*words, "--threshold", "1e-9")
    assert code == 2
    assert "The merged model is another than the trained one: KL " in said
    assert "nothing was written (--force writes it all the same)" in said
    assert not list(Path().iterdir())
    assert type_in(*words, "--threshold", "1e-9", "--force")[0] == 0


def test_without_rows_the_trained_base_is_merged_onto_and_that_is_said(
    type_in: Type, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code, out, _ = type_in(
        "merge", "--adapter", adapter, "--output", "merged", "--score-tokens", "0"
    )
    assert code == 0
    assert "Merged onto the dequantized base; nothing was scored." in out
    assert "no held-out rows to score with" in caplog.text


def test_pairs_are_merged_and_not_scored(
    type_in: Type, saved: Saver, rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Their source and target lie in one array, of which nothing says where the target begins."""
    fit(tmp_path / "run", saved("T5"), rows_file, r=4)
    code, out, _ = type_in("merge", "--adapter", tmp_path / "run/adapter", "--output", "merged")
    assert code == 0
    assert "nothing was scored" in out
    assert "so nothing is scored" in caplog.text
    assert json.loads(Path("merged/merge.json").read_text())["scores"] == {}


MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "no output": (("--adapter", "ADAPTER"), "--output: name the folder of the merged model."),
    "taken": (("--adapter", "ADAPTER", "--output", "taken"), "'taken' exists already"),
    "nowhere": (("--adapter", "ADAPTER", "--output", "no/where"), "there is no folder 'no'"),
    "no adapter": (("--model", "BASE", "--output", "x"), "name one adapter folder"),
    "two adapters": (
        ("--adapter", "a=ADAPTER", "--adapter", "b=ADAPTER", "--output", "x"),
        "name one adapter folder",
    ),
    "precision": (
        ("--adapter", "ADAPTER", "--precision", "float32", "--output", "x"),
        "without --precision",
    ),
    "policy": (("--adapter", "ADAPTER", "--output", "x", "--policy", "both"), "invalid choice"),
    "tokens": (("--adapter", "ADAPTER", "--output", "x", "--score-tokens", "-1"), "0 or more"),
    "threshold": (("--adapter", "ADAPTER", "--output", "x", "--threshold", "0"), "above 0"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    type_in: Type, adapter: Path, tiny_base: Path, kind: str
) -> None:
    Path("taken").mkdir()
    words, sentence = MISTAKES[kind]
    words = tuple(w.replace("ADAPTER", str(adapter)).replace("BASE", str(tiny_base)) for w in words)
    code, out, said = type_in("merge", *words)
    assert code == 2, said
    assert out == ""
    assert sentence in said
    assert "Traceback" not in said
    assert [path.name for path in Path().iterdir()] == ["taken"]


def test_no_room_is_told_before_anything_is_written(
    type_in: Type, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    code, _, said = type_in("merge", "--adapter", adapter, "--output", "merged")
    assert code == 2
    assert "has 0.0 GiB free, and 2 merged models take" in said
    assert not list(Path().iterdir())
