"""What a user may type wrong, and what is printed then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.words import FIT
from qlora_pl.cli import first_sentence

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process


BAD_FLAGS: dict[str, tuple[tuple[str, ...], str]] = {
    "command": (("fti",), "no command is called 'fti'; did you mean 'fit'?"),
    "unknown command": (
        ("deploy",),
        "no command is called 'deploy' (there are fit, validate, test, predict, plan, smoke, "
        "ablate, inspect, generate, chat, serve, merge, export, bench, doctor, explain, "
        "prove-resume).",
    ),
    "key": (
        (*FIT, "--model.lora.rank", "4"),
        "'model.lora' has no key 'rank' (it has alpha, ",
    ),
    "misspelt key": (
        (*FIT, "--model.lora.dropuot", "0.1"),
        "'model.lora' has no key 'dropuot'; did you mean 'dropout'?",
    ),
    "abbreviated key": (
        (*FIT, "--model.quantization.double", "true"),
        "'model.quantization' has no key 'double'; did you mean 'double_quant'?",
    ),
    "misspelt group": (
        (*FIT, "--trainr.max_steps", "4"),
        "a run has no key 'trainr'; did you mean 'trainer'?",
    ),
    "key without its group": (
        (*FIT, "--lr", "1e-4"),
        "a run has no key 'lr'; did you mean 'model.optimizer.lr'?",
    ),
    "en dash instead of two hyphens": (
        (*FIT, "\u2013learning_rate", "1e-4"),
        "'\u2013learning_rate 1e-4' belongs to no flag; a value follows its --key.",
    ),
    "choice": (
        (*FIT, "--model.quantization.quant_type", "nf5"),
        "model.quantization.quant_type: expected one of nf4, fp4, int8, none, got 'nf5'; did you "
        "mean 'nf4'?",
    ),
    "number": (
        (*FIT, "--model.lora.r", "many"),
        "model.lora.r: expected a whole number, got 'many'.",
    ),
    "half a number": (
        (*FIT, "--trainer.max_steps", "2.5"),
        "trainer.max_steps: expected a whole number, got '2.5'.",
    ),
    "no value": ((*FIT, "--trainer.max_steps"), "--trainer.max_steps: expected a value after it."),
    "rank": ((*FIT, "--model.lora.r", "0"), "model.lora.r: must be at least 1, got 0."),
    "rate": (
        (*FIT, "--model.optimizer.lr", "-1"),
        "model.optimizer.lr: must be above 0, got -1.0.",
    ),
    "dropout": (
        (*FIT, "--model.lora.dropout", "1"),
        "model.lora.dropout: must lie in 0 to 1, without 1, got 1.0.",
    ),
    "ignored warm-up": (
        (*FIT, "--model.schedule.warmup_ratio", "0.03"),
        "model.schedule.warmup_ratio: the schedule 'constant' has no warmup and would ignore 0.03; "
        "use constant_with_warmup or set it to 0.",
    ),
    "precision": (
        (*FIT, "--trainer.precision", "bf16-true"),
        "trainer.precision: 'bf16-true' would change types after loading; leave it at 32-true and "
        "set model.quantization.compute_dtype.",
    ),
    "no base": (
        ("fit", "--data.sources", "ROWS"),
        "model.model_name_or_path: must be set; write --model.model_name_or_path VALUE, or the key "
        "in a file.",
    ),
    "no data": (
        ("fit", "--model.model_name_or_path", "BASE"),
        "data.sources: must be set; write --data.sources VALUE, or the key in a file.",
    ),
    "base folder": (
        ("fit", "--model.model_name_or_path", "./no/such/model", "--data.sources", "ROWS"),
        "model.model_name_or_path: no folder './no/such/model'.",
    ),
    "folder without a model": (
        ("fit", "--model.model_name_or_path", ".", "--data.sources", "ROWS"),
        "model.model_name_or_path: '.' is not a model folder; it has no config.json.",
    ),
    "template": (
        (*FIT, "--data.template", "gaunaco"),
        "data.template: no template is called 'gaunaco' (known: auto, chat, alpaca, ",
    ),
    "target module": (
        (*FIT, "--model.lora.target_modules", "q_prj"),
        "model.lora.target_modules: no linear module matches 'q_prj'; did you mean 'q_proj'? "
        "(there are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head).",
    ),
    "head as a target": (
        (*FIT, "--model.lora.target_modules", "[q_proj, lm_head]"),
        "model.lora.target_modules: 'lm_head' is the output head, which is not adapted (an adapter "
        "on it would also move a tied embedding); leave it out.",
    ),
    "skipped module": (
        (*FIT, "--model.quantization.skip_modules", "[q_prj]"),
        "model.quantization.skip_modules: no weight matrix belongs to q_prj; write a module's name "
        "or the last part of it.",
    ),
    "validation rows": (
        (*FIT, "--data.val_size", "22"),
        "data.val_size: 22 leaves none of the 22 rows to train on.",
    ),
    "length": (
        (*FIT, "--data.max_length", "4", "--data.overlong", "drop"),
        "data.sources: nothing to train on, no answer fits into data.max_length 4 (the longest row "
        "has ",
    ),
    "cut answers": (
        (*FIT, "--data.max_length", "30", "--data.template", "alpaca"),
        "data.sources: nothing to train on, no answer fits into data.max_length 30",
    ),
    "no checkpoint": (
        (*FIT, "--ckpt_path", "last"),
        "--ckpt_path last: no run in 'runs/tiny-llama' has a checkpoint that verifies; start "
        "without --ckpt_path.",
    ),
    "checkpoint file": (
        (*FIT, "--ckpt_path", "nothing.ckpt"),
        "--ckpt_path: no file 'nothing.ckpt' (or last, auto, best).",
    ),
    "run name": (
        (*FIT, "--run.name", "a/b"),
        "run.name: 'a/b' becomes a folder; use letters, digits, '.', '_' and '-'.",
    ),
    "run name that leads out of the root": (
        (*FIT, "--run.name", ".."),
        "run.name: '..' would lie outside run.root; name a folder in it.",
    ),
    "null for a folder": (
        (*FIT, "--run.root", "null"),
        "run.root: null is no value for it (its default is 'runs'); write one, or remove the key.",
    ),
    "seed": (
        (*FIT, "--seed_everything", "-5"),
        "seed_everything: must lie in 0 to 4294967295, got -5.",
    ),
    "seed that is too large": (
        (*FIT, "--seed_everything", str(10**30)),
        f"seed_everything: must lie in 0 to 4294967295, got {10**30}.",
    ),
    "validation at no batch": (
        (*FIT, "--trainer.val_check_interval", "0"),
        "trainer.val_check_interval: must be at least 1 micro-batch, got 0;",
    ),
    "validation after the epoch": (
        (*FIT, "--trainer.val_check_interval", "100"),
        "trainer.val_check_interval: 100 is more than the 6 micro-batches of an epoch; lower it, "
        "or set trainer.check_val_every_n_epoch: null",
    ),
    "nothing to train": (
        (*FIT, "--trainer.limit_train_batches", "0"),
        "trainer.limit_train_batches: 0 trains nothing; write 1 or more, or null.",
    ),
    "monitor": (
        (*FIT, "--checkpoint.monitor", "val/los", "--data.template", "guanaco"),
        "checkpoint.monitor: no metric is called 'val/los' (there are val/loss, val/perplexity); "
        "did you mean 'val/loss'?",
    ),
    "missing part": (
        (*FIT, "--trainer", "cpuu.yaml"),
        "--trainer: no file 'cpuu.yaml'.",
    ),
    "misspelt key of a part": (
        (*FIT, "--trainer", "{max_stepz: 4}"),
        "--trainer: 'trainer' has no key 'max_stepz'; did you mean 'max_steps'?",
    ),
    "folder for a file": ((*FIT, "--config", ".."), "--config: '..' is a folder; name a file in"),
    "no file": ((*FIT, "--config"), "--config: name a file after it."),
    "empty path": (
        (*FIT, "--data.val_sources", ""),
        "data.val_sources: the path is empty; name a file.",
    ),
    "accelerator": (
        (*FIT, "--trainer.accelerator", "cuda"),
        "trainer: ",
    ),
    "test rows": (
        ("test", *FIT[1:]),
        "data.test_sources: no test rows are named; set it to a file.",
    ),
}


@pytest.mark.parametrize("mistake", BAD_FLAGS)
def test_a_mistake_in_a_flag_is_one_sentence_and_exit_code_2(
    type_in: Callable[..., tuple[int, list[str]]], mistake: str, tmp_path: Path
) -> None:
    words, sentence = BAD_FLAGS[mistake]
    code, printed = type_in(*words)
    assert code == 2
    said = [line for line in printed if line.startswith("qlora-pl: ")]
    assert len(said) == 1, printed
    assert said[0].startswith(f"qlora-pl: {sentence}")
    assert not list(tmp_path.glob("runs/*/*")), "a run that never started left a folder"


BAD_FILES: dict[str, tuple[str, str]] = {
    "not YAML": ("model: {lora: [}", "run.yaml, line 1: not YAML"),
    "a list": ("- model\n", "run.yaml: expected keys and values, got list."),
    "value for a group": (
        "model: {lora: 5}",
        "run.yaml: 'model.lora' has keys of its own (alpha, ",
    ),
    "misspelt source setting": (
        "data: {sources: [{path: ROWS, fromat: alpaca}]}",
        "data.sources: a source has no setting 'fromat' (known: path, dataset, split, subset, "
        "revision, file, format, columns, limit, sample, sample_seed, weight, "
        "languages, streaming, replies, documents); did you mean 'format'?",
    ),
    "format": (
        "data: {sources: [{path: ROWS, format: alpacca}]}",
        "data.sources (ROWS): no format is called 'alpacca'; did you mean 'alpaca'?",
    ),
    "missing file": (
        "data: {sources: [rosw.jsonl]}",
        "data.sources: no file 'rosw.jsonl'",
    ),
    "empty file": ("", "run.yaml: it holds no keys; write some, or leave --config out."),
    "comment alone": ("# later\n", "run.yaml: it holds no keys;"),
    "key that stands twice": (
        "model:\n  lora:\n    r: 4\n    alpha: 8\n    r: 8\n",
        "run.yaml, line 5: the key 'r' stands here for the second time (first in line 3)",
    ),
    "group without keys": (
        "model:\n  lora:\n",
        "run.yaml: nothing stands under 'model.lora'; write one of its keys there, or remove it.",
    ),
    "null": (
        "model: {lora: {alpha: null}}",
        "run.yaml: model.lora.alpha: null is no value for it (its default is 16.0);",
    ),
    "no number": (
        "model: {lora: {alpha: .nan}}",
        "model.lora.alpha: must be a finite number, got nan.",
    ),
    "missing part": ("trainer: cpu.yaml", "run.yaml: trainer: no file 'cpu.yaml'"),
    "number for a format": (
        "data: {val_sources: [{path: ROWS, format: 3}]}",
        "data.val_sources (ROWS): format must be text, got 3.",
    ),
    "list for a format": (
        "data: {sources: [{path: ROWS, format: [alpaca]}]}",
        "data.sources (ROWS): format must be text, got ['alpaca'].",
    ),
    "truth for a limit": (
        "data: {sources: [{path: ROWS, limit: true}]}",
        "data.sources (ROWS): limit must be a whole number, got True.",
    ),
    "split of a file": (
        "data: {sources: [{path: ROWS, split: validation}]}",
        "data.sources: split 'validation' is for datasets of the Hub, 'ROWS' is a file and has",
    ),
}


@pytest.mark.parametrize("mistake", BAD_FILES)
def test_a_mistake_in_a_file_is_one_sentence_and_exit_code_2(
    type_in: Callable[..., tuple[int, list[str]]], mistake: str, rows_file: Path
) -> None:
    content, sentence = BAD_FILES[mistake]
    code, printed = type_in(*FIT, config=content)
    assert code == 2
    said = [line for line in printed if line.startswith("qlora-pl: ")]
    assert len(said) == 1, printed
    assert said[0].startswith(f"qlora-pl: {sentence.replace('ROWS', str(rows_file))}")


BAD_ROWS: dict[str, tuple[list[Any], str]] = {
    "no answer column": (
        [{"prompt": "a", "response": "b"}, {"prompt": "a", "answer": "b"}],
        "rows.jsonl, row 2: no 'response' field; found 'prompt', 'answer'.",
    ),
    "empty answer": (
        [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": " "}],
        "rows.jsonl, row 2: its answer (message 2) is empty.",
    ),
    "number for text": (
        [{"prompt": "a", "response": 5}],
        "rows.jsonl, row 1: 'response' holds int 5, expected text.",
    ),
    "no format fits": (
        [{"q": "a", "a": "b"}],
        "rows.jsonl, row 1: no format fits the columns 'q', 'a';",
    ),
    "no rows": ([], "rows.jsonl: it holds no rows; leave it out, or fill it."),
}


@pytest.mark.parametrize("mistake", BAD_ROWS)
def test_a_bad_row_is_named_before_weights_are_loaded(
    type_in: Callable[..., tuple[int, list[str]]],
    mistake: str,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, sentence = BAD_ROWS[mistake]
    write_rows(rows)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("qlora_pl.modeling.loading.assembly.load_base", never)
    code, printed = type_in(*FIT[:-1], "rows.jsonl")
    assert code == 2
    assert printed[-1].startswith(f"qlora-pl: {sentence}")


def test_all_unknown_keys_are_reported_together(
    type_in: Callable[..., tuple[int, list[str]]],
) -> None:
    config = {"model": {"lora": {"rr": 4}, "optimiser": {"lr": 1}}, "trainer": {"max_step": 3}}
    code, printed = type_in(*FIT, "--data.batchsize", "3", config=config)
    assert code == 2
    assert printed == [
        "qlora-pl: 'data' has no key 'batchsize'; did you mean 'batch_size'?",
        "qlora-pl: run.yaml: 'model.lora' has no key 'rr'; did you mean 'r'?",
        "qlora-pl: run.yaml: 'model' has no key 'optimiser'; did you mean 'optimizer'?",
        "qlora-pl: run.yaml: 'trainer' has no key 'max_step'; did you mean 'max_steps'?",
    ]


def test_all_impossible_values_are_reported_together(
    type_in: Callable[..., tuple[int, list[str]]],
) -> None:
    config = {
        "model": {"lora": {"r": 0, "dropout": 2.0}, "optimizer": {"lr": 0.0}},
        "data": {"batch_size": 0},
        "checkpoint": {"keep_last": 0},
        "trainer": {"accumulate_grad_batches": 0},
    }
    code, printed = type_in(*FIT, config=config)
    assert code == 2
    keys = [line.split(": ")[1] for line in printed]
    assert keys == [
        "model.lora.r",
        "model.lora.dropout",
        "model.optimizer.lr",
        "data.batch_size",
        "checkpoint.keep_last",
        "trainer.accumulate_grad_batches",
    ]


def test_a_start_that_fails_anyhow_leaves_no_folder(
    type_in: Callable[..., tuple[int, list[str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error that nobody foresaw keeps its traceback, and takes the empty folder with it."""

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("qlora_pl.modeling.loading.assembly.load_base", fail)
    with pytest.raises(ZeroDivisionError):
        type_in(*FIT, "--data.template", "guanaco")
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_sentence_of_a_library_ends_in_one_full_stop() -> None:
    assert first_sentence(RuntimeError("No backend found!\nMore.")) == "No backend found."
    assert first_sentence(RuntimeError("Wrong.")) == "Wrong."
    assert first_sentence(KeyError()) == "KeyError."
