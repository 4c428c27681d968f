"""``qlora-pl merge``: the better of two policies, scored, whole or not at all."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from adapter_runs import fit
from cards import blocks
from conftest import save_base
from families import Saver
from huggingface_hub import ModelCard
from torch.nn import functional
from typed import type_words

from qlora_pl.__main__ import main
from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.encoding.lengths import Limits
from qlora_pl.inference.loading import load
from qlora_pl.inference.source import ModelChoice, resolve_source
from qlora_pl.merging.scored_rows import ScoredRow, held_out_rows, rows_of_file
from qlora_pl.merging.scoring import in_words, score, write_reference
from qlora_pl.modeling.base.quantization_plan import build_skeleton
from qlora_pl.modeling.loading.base_loading import keep_gradients_on_cpu

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


class Merged(NamedTuple):
    """A merged model."""

    folder: Path
    out: str
    """Standard output of the command."""
    log: str


@pytest.fixture(scope="module")
def merged(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    """Of the better policy, for all tests that only look at it."""
    folder, out, log = tmp_path_factory.mktemp("merging"), io.StringIO(), io.StringIO()
    words = ["merge", "--adapter", str(adapter), "--output", "merged", "--force"]
    logger, handler = logging.getLogger("qlora_pl"), logging.StreamHandler(log)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["qlora-pl", *words])
        patch.setattr(logger, "level", logging.INFO)
        logger.addHandler(handler)
        try:
            assert main() == 0
        finally:
            logger.removeHandler(handler)
    return Merged(folder / "merged", out.getvalue(), log.getvalue())


def test_the_better_policy_is_kept_and_loads_in_plain_transformers(
    type_in: Type, adapter: Path, merged: Merged
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = json.loads((merged.folder / "merge.json").read_text())
    scores = record["scores"]
    assert set(scores) == {"dequantized", "original"}
    better = min(scores, key=lambda name: scores[name]["kl_divergence"])
    assert record["policy"] == better == "dequantized"
    assert scores["dequantized"]["kl_divergence"] < 0.2 * scores["original"]["kl_divergence"]
    assert "| dequantized |" in merged.out
    assert merged.out.rstrip().endswith("merge: merged")
    model = AutoModelForCausalLM.from_pretrained(merged.folder)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [2]
    tokenizer = AutoTokenizer.from_pretrained(merged.folder)
    asked = [{"role": "user", "content": "How many legs?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == "<s>### Human: How many legs?### Assistant:"  # as trained
    left = sorted(path.name for path in merged.folder.iterdir())
    assert not [name for name in left if name.startswith(("reference", "original", "dequantized"))]
    assert [path.name for path in merged.folder.parent.iterdir()] == ["merged"]
    asking = ("--prompt", "How many legs?", "--max-new-tokens", "4")
    code, answer, _ = type_in("generate", "--model", merged.folder, *asking)
    assert code == 0
    _, trained, _ = type_in("generate", "--adapter", adapter, *asking)
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
    assert "no rows to score with (--data names some)" in caplog.text


def test_the_card_of_a_merged_model_tells_what_it_cost_and_its_lines_run(
    type_in: Type,
    adapter: Path,
    merged: Merged,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (merged.folder / "README.md").read_text()
    assert merged.out.split("\n\n")[0] in text  # the table of scores
    assert "`dequantized` is the one that was kept" in text
    assert ModelCard(text).data.to_dict()["tags"] == ["merged", "qlora", "qlora-pl"]
    assert str(adapter) not in text
    monkeypatch.chdir(merged.folder)
    loading, asking, own = blocks(Path(), "python")
    (command,) = blocks(Path(), "bash")
    capsys.readouterr()
    exec(f"{loading}\n{asking}", {})
    plain = capsys.readouterr().out.strip()
    exec(own, {})
    ours = capsys.readouterr().out.strip()
    code, typed, _ = type_in(*shlex.split(command)[1:])
    assert code == 0
    assert plain == ours == typed.strip()


@pytest.mark.parametrize("words", [(), ("--requantize", "nf4")])
@pytest.mark.slow
def test_the_lines_of_a_merged_model_run_in_a_fresh_process(
    type_in: Type, adapter: Path, words: tuple[str, ...]
) -> None:
    assert type_in("merge", "--adapter", adapter, "--output", "m", "--force", *words)[0] == 0
    loading, asking, own = blocks(Path("m"), "python")
    (command,) = blocks(Path("m"), "bash")
    typed = [sys.executable, "-m", "qlora_pl", *shlex.split(command)[1:]]
    said = []
    for call in (
        [sys.executable, "-c", f"{loading}\n{asking}"],
        [sys.executable, "-c", own],
        typed,
    ):
        root = str(Path(__file__).parents[2])
        done = subprocess.run(
            call,
            cwd="m",
            env=os.environ | {"PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.strip())
    assert said[0]
    assert said[1] == said[2]


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


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


QUESTIONS = [{"instruction": f"How many legs has animal {n}?", "output": "Four."} for n in range(6)]


def test_the_rows_of_a_file_are_scored_as_training_would_encode_them(
    type_in: Type, adapter: Path, tmp_path: Path
) -> None:
    """Source: the training encoder over the same conversations, in each layout."""
    as_messages = [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in QUESTIONS
    ]
    source = resolve_source(ModelChoice(adapter=(str(adapter),)))
    skeleton = build_skeleton(Path(source.base))
    encoder = load(source, torch.device("cpu")).encoder
    plain = [
        Conversation((Message("user", r["instruction"]), Message("assistant", r["output"])))
        for r in QUESTIONS
    ]
    expected = [example for rows in encoder.encode(plain) for example in rows]
    for kind in (QUESTIONS, as_messages):
        path = write_lines(tmp_path / "rows.jsonl", kind)
        rows = rows_of_file(source, skeleton, str(path))
        assert len(rows) == len(expected) == 6
        for row, example in zip(rows, expected, strict=True):
            assert row.input_ids.tolist() == example.input_ids.tolist()
            assert row.targets.tolist() == example.input_ids[example.is_trained].tolist()
    assert len(rows_of_file(source, skeleton, str(path), most=1)) == 1
    code, out, said = type_in(
        *("merge", "--adapter", adapter, "--output", "merged", "--data", path, "--force")
    )
    assert code == 0, said
    assert "| original |" in out
    record = json.loads(Path("merged/merge.json").read_text())
    assert record["scored_on"] == "rows.jsonl"
    assert record["scores"]["original"]["tokens"] == sum(e.num_trained for e in expected)


def test_a_time_is_foretold_and_not_among_the_answers(merged: Merged) -> None:
    assert re.search(r"Scoring: 3 models read [\d,]+ tokens each, about \d+ s", merged.log)
    assert "Scoring" not in merged.out


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (119, "119 s"), (150, "2 min"), (7300, "2 h")]
)
def test_a_time_is_said_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_model_that_is_packed_again_is_scored_as_it_will_be_loaded(
    type_in: Type, adapter: Path, quant_type: str
) -> None:
    from transformers import AutoModelForCausalLM

    words = ("merge", "--adapter", adapter, "--output", "merged", "--requantize", quant_type)
    code, _, said = type_in(*words, "--force")
    assert code == 0, said
    record = json.loads(Path("merged/merge.json").read_text())
    assert record["requantized"] == quant_type
    assert set(record["scores"]) == {"dequantized", "original"}
    model = AutoModelForCausalLM.from_pretrained("merged")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert (weight.dtype, weight.quant_state.quant_type) == (torch.uint8, quant_type)
    assert weight.quant_state.nested
    keep_gradients_on_cpu(model)
    rows = held_out_rows(adapter)
    source = resolve_source(ModelChoice(adapter=(str(adapter),)))
    trained = load(source, torch.device("cpu"), is_exact=True)
    write_reference(trained.model, rows, Path("reference.npy"))
    found = score(model.eval(), rows, Path("reference.npy"))
    kept = record["scores"][record["policy"]]
    assert found.kl_divergence == pytest.approx(kept["kl_divergence"], rel=1e-6)
    code, answer, said = type_in(
        *("generate", "--model", "merged", "--prompt", "How many legs?", "--max-new-tokens", "4")
    )
    assert code == 0, said
    assert answer.strip()


def test_pairs_of_a_file_are_scored(
    type_in: Type, saved: Saver, rows_file: Path, tmp_path: Path
) -> None:
    """In float32 the two models compute the same but for rounding: 1e-6 nats."""
    fit(tmp_path / "run", saved("T5"), rows_file, r=4)
    questions = write_lines(tmp_path / "rows.jsonl", QUESTIONS)
    words = ("merge", "--adapter", tmp_path / "run/adapter", "--output", "merged")
    code, _, said = type_in(*words, "--data", questions, "--dtype", "float32")
    assert code == 0, said
    record = json.loads(Path("merged/merge.json").read_text())
    assert record["scores"]["dequantized"]["kl_divergence"] < 1e-6
    assert record["scores"]["original"]["kl_divergence"] > 1e-4
    perplexity = record["scores"]["dequantized"]["trained_perplexity"]
    assert perplexity == pytest.approx(_t5_perplexity(tmp_path / "run/adapter"), rel=1e-3)


def _t5_perplexity(adapter: Path) -> float:
    """Source: the loss that transformers computes of labels by itself."""
    trained = load(resolve_source(ModelChoice(adapter=(str(adapter),))), torch.device("cpu"))
    total, number = 0.0, 0
    for row in QUESTIONS:
        conversation = Conversation(
            (Message("user", row["instruction"]), Message("assistant", row["output"]))
        )
        ((example,),) = trained.encoder.encode([conversation])
        (example,) = trained.encoder.fit(example, Limits(max_length=48))
        begin = int(example.is_answer.argmax())
        ids = torch.from_numpy(example.input_ids.astype("int64")).unsqueeze(0)
        with torch.no_grad():
            loss = trained.model(input_ids=ids[:, :begin], labels=ids[:, begin:]).loss
        total += float(loss) * (ids.shape[1] - begin)
        number += ids.shape[1] - begin
    return math.exp(total / number)


def test_another_base_is_refused_also_where_nothing_is_scored(
    type_in: Type, adapter: Path, tmp_path: Path
) -> None:
    other = save_base(tmp_path / "other", seed=1)
    code, _, said = type_in(
        *("merge", "--adapter", adapter, "--base", other, "--output", "x", "--score-tokens", "0")
    )
    assert code == 2
    assert "was trained over other weights" in said
    assert not list(Path().iterdir())


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
    "four bits": (
        ("--adapter", "ADAPTER", "--output", "x", "--requantize", "int4"),
        "invalid choice",
    ),
    "devices": (
        ("--adapter", "ADAPTER", "--output", "x", "--devices", "auto"),
        "--devices: auto is not for merging",
    ),
    "no file": (("--adapter", "ADAPTER", "--output", "x", "--data", "no.jsonl"), "--data: no file"),
    "not read": (
        ("--adapter", "ADAPTER", "--output", "x", "--data", "ROWS", "--score-tokens", "0"),
        "--data: is not read with --score-tokens 0",
    ),
    "bad row": (("--adapter", "ADAPTER", "--output", "x", "--data", "ROWS"), "rows.jsonl, row 3"),
    "no answers": (
        ("--adapter", "ADAPTER", "--output", "x", "--data", "EMPTY"),
        "has a token to score within 48 tokens",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    type_in: Type, adapter: Path, tiny_base: Path, tmp_path: Path, kind: str
) -> None:
    Path("taken").mkdir()
    rows = write_lines(tmp_path / "rows.jsonl", [*QUESTIONS[:2], {"instruction": "?"}])
    long = write_lines(tmp_path / "long.jsonl", [{"instruction": "why " * 99, "output": "So."}])
    places = {"ADAPTER": adapter, "BASE": tiny_base, "ROWS": rows, "EMPTY": long}
    words, sentence = MISTAKES[kind]
    for name, place in places.items():
        words = tuple(word.replace(name, str(place)) for word in words)
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
