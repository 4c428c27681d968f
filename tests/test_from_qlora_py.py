"""docs/from-qlora-py.md has every flag of the original, and no key that does not exist here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_pl.cli import RunReader, read_runs
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.data.templates.loading import TEMPLATES
from qlora_pl.parsing import unknown_keys

PAGE = (Path(__file__).parent.parent / "docs/from-qlora-py.md").read_text()
ROW = re.compile(r"^\| `--(\w+)` \| (.+?) \|(.*)\|$", re.MULTILINE)

# artidoro/qlora 7f4e95a, qlora.py: the fields of its four classes of arguments, ...
MODEL = "model_name_or_path trust_remote_code use_auth_token"
DATA = """
    eval_dataset_size max_train_samples max_eval_samples source_max_len target_max_len dataset
    dataset_format
"""
TRAINING = """
    cache_dir train_on_source mmlu_split mmlu_dataset do_mmlu_eval max_mmlu_samples
    mmlu_source_max_len full_finetune adam8bit double_quant quant_type bits lora_r lora_alpha
    lora_dropout max_memory_MB report_to output_dir optim per_device_train_batch_size
    gradient_accumulation_steps max_steps weight_decay learning_rate remove_unused_columns
    max_grad_norm gradient_checkpointing do_train lr_scheduler_type warmup_ratio logging_steps
    group_by_length save_strategy save_steps save_total_limit
"""
GENERATION = """
    max_new_tokens min_new_tokens do_sample num_beams num_beam_groups penalty_alpha use_cache
    temperature top_k top_p typical_p diversity_penalty repetition_penalty length_penalty
    no_repeat_ngram_size
"""
# ... what transformers 4.31 adds that its scripts use or that matters to a run of it, ...
INHERITED = """
    do_eval do_predict predict_with_generate per_device_eval_batch_size evaluation_strategy
    eval_steps logging_strategy dataloader_num_workers data_seed seed bf16 adam_beta2 run_name
    fp16 adam_beta1 adam_epsilon num_train_epochs load_best_model_at_end resume_from_checkpoint
    ddp_find_unused_parameters length_column_name tf32
"""
# ... and what its scripts pass although there is no such argument.
SWALLOWED = "lora_modules"
FLAGS = " ".join([MODEL, DATA, TRAINING, GENERATION, INHERITED, SWALLOWED]).split()

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # building the parser imports everything


@pytest.fixture(scope="module")
def parser() -> Any:
    required = ["--model.model_name_or_path", "BASE", "--data.sources", "ROWS"]
    return RunReader(["fit", *required])._subcommand_parsers["fit"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def keys(text: str) -> list[str]:
    return re.findall(r"`([\w.]+)`", text)


def test_every_flag_of_the_original_is_there_once() -> None:
    assert sorted(flag for flag, _, _ in ROW.findall(PAGE)) == sorted(FLAGS)


@pytest.mark.parametrize(("flag", "here"), [(flag, here) for flag, here, _ in ROW.findall(PAGE)])
def test_a_flag_has_keys_that_exist_or_a_reason(parser: Any, flag: str, here: str) -> None:
    if re.match(r"(none|planned): \w", here):
        assert "`" not in here, f"--{flag}: a key, or a reason?"
    else:
        assert re.fullmatch(r"`[\w.]+`(, `[\w.]+`)*", here), f"--{flag}: {here}"
        assert unknown_keys(parser, [f"--{key}" for key in keys(here)]) == []
        options = {action.dest for action in parser._actions}
        assert set(keys(here)) <= options - set(parser.groups)


def test_every_key_that_the_page_names_exists(parser: Any) -> None:
    sections = "model|data|run|checkpoint|samples|trainer"
    named = set(re.findall(rf"`(?:--)?((?:{sections})\.\w[\w.]*)", PAGE))
    assert "model.revision" in named  # one of the third column's
    assert unknown_keys(parser, [f"--{key}" for key in sorted(named)]) == []


def same(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Flag, first key and value of the rows that say "Same: VALUE"."""
    return [
        (flag, keys(here)[0], found[1])
        for flag, here, difference in rows
        if (found := re.search(r"[Ss]ame(?: for predict)?: `?([\w.-]*\w)", difference))
    ]


@pytest.mark.parametrize(("flag", "key", "value"), same(ROW.findall(PAGE)))
def test_a_default_that_is_called_the_same_is_ours(
    parser: Any, flag: str, key: str, value: str
) -> None:
    """The values are those of the original's dataclasses, and of transformers 4.31."""
    default = parser.get_default(key)
    defaults = default if isinstance(default, tuple) else (default,)
    try:
        assert float(value) in defaults
    except ValueError:
        assert yaml.safe_load(value) in defaults


def test_enough_defaults_are_compared() -> None:
    assert len(same(ROW.findall(PAGE))) >= 18


def test_a_dataset_of_the_original_is_a_source_here() -> None:
    found = re.findall(r"^\| ([\w -]+) \| `(\{path: .+\})` \| (.+) \|$", PAGE, re.MULTILINE)
    names = ["alpaca", "alpaca-clean", "oasst1", "hh-rlhf", "longform", "self-instruct"]
    assert sorted(name for name, *_ in found) == sorted([*names, "a local file"])
    for name, source, note in found:
        (config,) = RowSources.parse(source).sources
        assert config.format is not None, name
        template = note.split("`")[1] if note.startswith("`") else "auto"
        assert template in TEMPLATES, name


def test_the_script_shown_passes_only_flags_that_are_in_the_table() -> None:
    (script,) = (block for block in blocks("bash") if "qlora.py" in block)
    passed = re.findall(r"--(\w+)", script)
    assert len(passed) == len(set(passed)) == 42
    assert set(passed) <= set(FLAGS)


# The script's numbers, flag by flag, as they are named here.
TRANSLATED: dict[str, Any] = {
    "model.model_name_or_path": "huggyllama/llama-7b",
    "run.root": "output",
    "run.name": "guanaco-7b",
    "trainer.log_every_n_steps": 10,
    "checkpoint.every_n_steps": 500,
    "checkpoint.keep_last": 40,
    "trainer.val_check_interval": 187 * 16,
    "trainer.check_val_every_n_epoch": None,
    "data.val_size": 1024,
    "data.max_val_samples": 1000,
    "data.eval_batch_size": 1,
    "model.decoding.max_new_tokens": 32,
    "data.num_workers": 3,
    "data.group_by_length": True,
    "model.lora.r": 64,
    "model.lora.alpha": 16,
    "model.lora.dropout": 0.1,
    "model.lora.target_modules": "all-linear",
    "model.lora.dtype": "bfloat16",
    "model.quantization.double_quant": True,
    "model.quantization.quant_type": "nf4",
    "model.quantization.compute_dtype": "bfloat16",
    "model.schedule.name": "constant",
    "model.optimizer.name": "paged_adamw_32bit",
    "model.optimizer.lr": 0.0002,
    "model.optimizer.betas": (0.9, 0.999),
    "model.optimizer.weight_decay": 0.0,
    "trainer.gradient_clip_val": 0.3,
    "model.gradient_checkpointing": True,
    "data.max_length": 16,
    "data.max_target_length": 512,
    "data.encoding": "original",
    "data.batch_size": 1,
    "data.global_batch_size": 16,
    "trainer.max_steps": 1875,
    "seed_everything": 0,
    "data.seed": 42,
}


def test_the_translated_script_is_a_run_with_the_scripts_numbers(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    (tmp_path / "my.yaml").write_text(text)
    (run,) = read_runs([["--config", str(tmp_path / "my.yaml")]])
    assert {key: run[key] for key in TRANSLATED} == TRANSLATED
    assert run.data.sources.plain() == [
        {"path": "timdettmers/openassistant-guanaco", "format": "text"}
    ]
