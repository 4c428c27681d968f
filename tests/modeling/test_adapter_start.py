"""Where training begins: EVA against an SVD of the inputs, adapters to go on from, checkpoints."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from adapter_runs import (
    PARTS,
    Killed,
    a_of,
    digest,
    fill,
    fit,
    load,
    logits_of,
    make_data,
    make_module,
    make_trainer,
    one_thread,  # noqa: F401 (a fixture of every test here)
    plain_peft,
)
from conftest import save_base
from lightning.pytorch import Callback, Trainer, seed_everything
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_pl.errors import CheckpointError, ConfigurationError
from qlora_pl.modeling.adapters.adapter_start import start_at_adapter
from qlora_pl.modeling.adapters.lora import LoRAConfig, attach_adapters
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.parameters import trainable_tensors
from qlora_pl.training.run_folders.run_folder import newest_verified

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("pissa", "leaves a changed base"),
        ("olora", "subtracts the adapter's start from the base"),
        ("corda", "leaves a changed base"),
        ("loftq", "another quantised base"),
    ],
)
def test_a_start_that_changes_the_base_is_refused_with_its_reason(init, reason):
    with pytest.raises(ConfigurationError, match=reason) as caught:
        LoRAConfig(init=init)
    (problem,) = caught.value.problems
    assert problem.startswith(f"model.lora.init: {init} ")
    assert problem.endswith("use kaiming, gaussian or eva.")


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_random_start_is_as_wide_as_pefts(tiny_base, init):
    """By hand: kaiming_uniform(a = sqrt 5) lies in 1 / sqrt(inputs); gaussian has deviation 1 / r.

    A deviation over 64 x 64 = 4,096 draws is off by 1.1 %; four of these are allowed.
    """
    model = attach_adapters(load(tiny_base).model, LoRAConfig(r=64, init=init), seed=0)
    a = a_of(model)["model.layers.0.self_attn.q_proj"]
    if init == "kaiming":
        assert 0.99 / 8 < a.abs().max() <= 1 / 8
        assert a.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
    else:
        assert a.std() == pytest.approx(1 / 64, rel=0.05)


# --- another adapter ------------------------------------------------------------------------------


class Look(Callback):
    """What a run has at its start."""

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.trained = {n: p.detach().clone() for n, p in module.trained_tensors().items()}
        self.logits = logits_of(module.model)
        module.model.train()
        self.num_states = len(trainer.optimizers[0].state)
        self.step = trainer.global_step


@pytest.fixture(scope="module")
def first_run(tiny_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run over the tiny base, r 4 and alpha 16."""
    folder = tmp_path_factory.mktemp("first") / "run"
    fit(folder, tiny_base, rows_file)
    return folder


@pytest.fixture
def adapter(first_run: Path, tmp_path: Path) -> Path:
    """A copy of the run's adapter folder, to be damaged."""
    return Path(shutil.copytree(first_run / "adapter", tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("lora", "compute"),
    [
        ({}, "float32"),
        ({"bias": "all", "use_rslora": True}, "float32"),
        ({"bias": "lora_only", "method": "dora"}, "bfloat16"),
    ],
    ids=str,
)
def test_a_run_goes_on_from_an_adapter_with_a_fresh_optimizer(tmp_path, rows_file, lora, compute):
    base = save_base(tmp_path / "base", attention_bias=True)
    first = fit(tmp_path / "first", base, rows_file, compute=compute, **lora)
    assert first.model is not None
    expected, trained = logits_of(first.model), first.trained_tensors()
    look = Look()
    adapter = str(tmp_path / "first" / "adapter")
    second = fit(
        tmp_path / "second", base, rows_file, look, compute=compute, init_from=adapter, **lora
    )
    assert look.trained.keys() == trained.keys()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in look.trained.items())
    assert torch.equal(look.logits, expected)
    assert (look.num_states, look.step) == (0, 0)
    moved = [n for n, p in second.trained_tensors().items() if not torch.equal(p, look.trained[n])]
    assert len(moved) == len(trained)


def save_plain(
    base: Path, folder: Path, quant_type: str = "none", is_pickled: bool = False, **settings: Any
) -> nn.Module:
    """What a program with nothing but transformers and PEFT writes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = plain_peft(model, **{"targets": PARTS} | settings)
    fill(model)
    model.save_pretrained(folder)  # type: ignore[operator]
    if is_pickled:
        file = folder / "adapter_model.safetensors"
        torch.save(load_file(file), folder / "adapter_model.bin")
        file.unlink()
    return model


def go_on(base: Path, folder: Any, **settings: Any) -> QLoRAModule:
    """As far as a run gets before its first step, without rows."""
    seed_everything(1)
    lora = LoRAConfig(**{"r": 4, "init_from": str(folder)} | settings)
    module = make_module(base, quant_type="none")
    module.lora = lora
    module.trainer = make_trainer(Path("nowhere"))
    module.setup("fit")
    module.configure_model()
    module.on_fit_start()
    return module


@pytest.mark.parametrize(
    ("plain", "ours"),
    [
        ({}, {}),
        ({"is_pickled": True}, {}),
        ({"use_dora": True}, {"method": "dora"}),
        ({"bias": "all"}, {"bias": "all"}),
        ({"bias": "lora_only", "is_pickled": True}, {"bias": "lora_only"}),
        ({"use_rslora": True, "lora_alpha": 8}, {"use_rslora": True, "alpha": 8.0}),
        (
            {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 4}},
            {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 4.0}},
        ),
        # the same ranks in other words
        (
            {"rank_pattern": {"q_proj": 8}, "lora_dropout": 0.5},
            {"rank_pattern": {r".*\.q_proj": 8, "self_attn.q_proj": 2}},
        ),
        ({"targets": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj", "v_proj"]}),
        ({"init_lora_weights": "gaussian"}, {}),
    ],
    ids=str,
)
def test_a_plain_peft_folder_can_be_gone_on_from(tmp_path, plain, ours):
    """Source: the logits of the plain PEFT model that was saved; 1e-5 at logits of about 5."""
    base = save_base(tmp_path / "base", attention_bias=True)
    model = save_plain(base, tmp_path / "adapter", **plain)
    module = go_on(base, tmp_path / "adapter", **ours)
    assert module.model is not None
    expected = logits_of(model)
    atol = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(logits_of(module.model), expected, rtol=0, atol=atol)
    assert {p.dtype for p in module.trained_tensors().values()} == {torch.float32}


class Opens:
    """Unpickles by writing a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.path, "it ran"))


def test_a_pickle_that_would_run_something_is_refused_and_does_not_run(tmp_path, tiny_base):
    folder, proof = tmp_path / "adapter", tmp_path / "proof"
    save_plain(tiny_base, folder, is_pickled=True)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"x": Opens(proof)}))
    assert_refused(tiny_base, folder, r"'.*adapter_model\.bin' cannot be read \(")
    torch.save({"x": Opens(proof)}, folder / "adapter_model.bin")
    assert_refused(tiny_base, folder, r"'.*adapter_model\.bin' cannot be read \(")
    torch.save([1, 2], folder / "adapter_model.bin")
    assert_refused(tiny_base, folder, r"'.*adapter_model\.bin' holds no tensors by name")
    assert not proof.exists()


def assert_refused(base: Path, folder: Any, words: str, **settings: Any) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        go_on(base, folder, **settings)
    (problem,) = caught.value.problems
    assert problem.startswith("model.lora.init_from: ")
    assert problem.endswith(".")
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 8}, "has r 4, this run has 8; use the adapter's"),
        ({"alpha": 8.0}, r"has alpha 16(\.0)?, this run has 8\.0; use the adapter's"),
        ({"use_rslora": True}, "has use_rslora False, this run has True"),
        ({"method": "dora"}, "has method lora, this run has dora"),
        ({"bias": "all"}, "has bias none, this run has all"),
        ({"rank_pattern": {"q_proj": 8}}, r"has rank_pattern \{\}, this run has \{'q_proj': 8\}"),
        ({"alpha_pattern": {"q_proj": 8.0}}, r"alpha_pattern \{\}, this run has \{'q_proj': 8\.0"),
        ({"target_modules": ["q_proj"]}, r"it has '.*' besides \(26 such\)\); use its target mod"),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_plain", [False, True], ids=["ours", "plain"])
def test_an_adapter_of_other_settings_is_refused_by_name(
    tmp_path, tiny_base, first_run, settings, words, is_plain
):
    folder = tmp_path / "plain" if is_plain else first_run / "adapter"
    if is_plain:
        save_plain(tiny_base, folder)
    if "target_modules" in settings:
        words = r"adapts other modules than this run: it has '.*' besides \(24 such\); use its targ"
    assert_refused(tiny_base, folder, words, **settings)


def test_an_adapter_with_fewer_modules_is_refused_with_its_own(tmp_path, tiny_base):
    save_plain(tiny_base, tmp_path / "adapter", targets=["q_proj", "v_proj"])
    words = r"it lacks '.*' \(20 such\); use its target modules \(q_proj, v_proj\)"
    assert_refused(tiny_base, tmp_path / "adapter", words)


def test_an_adapter_with_dora_or_biases_is_refused_where_the_run_has_none(tmp_path, tiny_base):
    save_plain(tiny_base, tmp_path / "dora", use_dora=True)
    assert_refused(tiny_base, tmp_path / "dora", "has method dora, this run has lora")
    save_plain(tiny_base, tmp_path / "bias", bias="all")
    assert_refused(tiny_base, tmp_path / "bias", "has bias all, this run has none")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_lora_weights": "pissa"}, "has init_lora_weights pissa, which changes the base"),
        ({"init_lora_weights": "olora"}, "has init_lora_weights olora, which changes the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights pissa_niter_4, which"),
        ({"peft_type": "IA3"}, "is an adapter of the kind IA3, and not LORA"),
        ({"alora_invocation_tokens": [1, 2]}, "has alora_invocation_tokens, which this project"),
    ],
    ids=str,
)
def test_an_adapter_that_means_something_else_is_refused(tmp_path, tiny_base, changes, words):
    """PEFT itself would compute such a start again, and the tensors alone do not show it."""
    save_plain(tiny_base, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert_refused(tiny_base, tmp_path / "adapter", words)


def test_an_adapter_of_another_base_is_refused_by_content_or_by_name(
    tmp_path, tiny_base, first_run
):
    other = save_base(tmp_path / tiny_base.name, seed=1)
    words = r"trained on other weights than '.*' \(fingerprints [0-9a-f]{12} and [0-9a-f]{12}\)"
    assert_refused(other, first_run / "adapter", words)
    save_plain(tiny_base, tmp_path / "plain")
    renamed = Path(shutil.copytree(tiny_base, tmp_path / "renamed"))
    words = r"says that its base is '.*tiny-llama', and this run's is '.*renamed'"
    assert_refused(renamed, tmp_path / "plain", words)


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), "lacks adapter_model.safetensors"),
    (lambda f: (f / "manifest.json").write_text("{"), "manifest.json' cannot be read"),
    (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json' cannot be read"),
    (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json' cannot be read"),
    (lambda f: edit(f / "manifest.json", base={}), "manifest.json' cannot be read"),
    (lambda f: edit(f / "manifest.json", base=7), "manifest.json' cannot be read"),
    (lambda f: edit(f / "manifest.json", format=99), "has format 99"),
    (lambda f: edit(f / "adapter_config.json", r=5), "adapter_config.json' was altered"),
    (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json' was altered"),
    (lambda f: flip(f / "adapter_model.safetensors"), "adapter_model.safetensors' was altered"),
]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[words for _, words in DAMAGES])
def test_a_damaged_folder_of_this_project_is_one_sentence(tiny_base, adapter, damage, words):
    damage(adapter)
    assert_refused(tiny_base, adapter, words)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def narrow(path: Path) -> None:
    tensors = load_file(path)
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first][:, :10].contiguous()}, path)


PLAIN_DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter"),
    (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json' cannot be read"),
    (lambda f: (f / "adapter_config.json").write_text("[]"), "adapter_config.json' cannot be read"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    (lambda f: cut(f / "adapter_model.safetensors"), "adapter_model.safetensors' cannot be read"),
    (lambda f: narrow(f / "adapter_model.safetensors"), r"of shape \(\d+, 10\), this run needs \("),
]


@pytest.mark.parametrize(
    ("damage", "words"), PLAIN_DAMAGES, ids=[words for _, words in PLAIN_DAMAGES]
)
def test_a_damaged_plain_folder_is_one_sentence(tmp_path, tiny_base, damage, words):
    save_plain(tiny_base, tmp_path / "adapter")
    damage(tmp_path / "adapter")
    assert_refused(tiny_base, tmp_path / "adapter", words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody-anywhere/no-such-adapter-q7x", "neither a folder here nor an adapter that could"),
        ("nobody--anywhere/..", "neither a folder here nor an adapter that could"),
        ("./missing", r"no folder '\./missing'"),
        ("~/missing/deep", "no folder '~/missing/deep'"),
        ("just-a-word", "no folder 'just-a-word'"),
    ],
)
def test_an_adapter_that_is_nowhere_is_one_sentence(tiny_base, monkeypatch, name, words):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as the variable does
    assert_refused(tiny_base, name, words)


def test_a_refused_adapter_changes_nothing_of_the_model(tmp_path, tiny_base):
    save_plain(tiny_base, tmp_path / "adapter")
    narrow(tmp_path / "adapter" / "adapter_model.safetensors")
    model = attach_adapters(load(tiny_base, quant_type="none").model, LoRAConfig(r=4), seed=0)
    before = {name: p.detach().clone() for name, p in trainable_tensors(model).items()}
    with pytest.raises(ConfigurationError):
        start_at_adapter(model, tmp_path / "adapter")
    assert all(torch.equal(p, before[name]) for name, p in trainable_tensors(model).items())


def test_a_run_that_went_on_from_an_adapter_resumes_when_that_is_gone(
    tmp_path, tiny_base, rows_file, adapter
):
    settings = {"init_from": str(adapter)}
    fit(tmp_path / "whole", tiny_base, rows_file, **settings)
    with pytest.raises(Killed):
        fit(tmp_path / "killed", tiny_base, rows_file, kill_at=2, **settings)
    shutil.rmtree(adapter)
    with pytest.raises(ConfigurationError, match="no folder"):
        fit(tmp_path / "fresh", tiny_base, rows_file, **settings)
    fit(tmp_path / "killed", tiny_base, rows_file, **settings)
    assert digest(tmp_path / "whole") == digest(tmp_path / "killed")


# --- checkpoints ----------------------------------------------------------------------------------

CHANGED: dict[str, Any] = {
    "method": "dora",
    "r": 8,
    "alpha": 8.0,
    "use_rslora": True,
    "dropout": 0.0,
    "bias": "all",
    "target_modules": ["q_proj"],
    "rank_pattern": {"q_proj": 8},
    "alpha_pattern": {"q_proj": 8.0},
    "init": "gaussian",
    "dtype": "bfloat16",
}
USED = {"method", "r", "alpha", "use_rslora", "bias", "target_modules"} | {
    "rank_pattern",
    "alpha_pattern",
}
"""What matters when an adapter is only used."""


def test_every_key_of_an_adapter_is_tried_here():
    assert CHANGED.keys() == {field.name for field in fields(LoRAConfig)} - {
        "init_from",
        "trainable_tokens",  # in test_vocabulary.py
    }


@pytest.mark.parametrize("key", CHANGED)
def test_a_checkpoint_is_not_continued_with_another_value(
    tmp_path, tiny_base, rows_file, first_run, key
):
    shutil.copytree(first_run, tmp_path / "run")
    with pytest.raises(CheckpointError) as caught:
        fit(tmp_path / "run", tiny_base, rows_file, **{key: CHANGED[key]})
    (problem,) = caught.value.problems
    assert f"model.lora.{key}=" in problem
    assert f"this run has {CHANGED[key]}." in problem


@pytest.mark.parametrize("key", CHANGED)
def test_a_checkpoint_is_validated_unless_the_value_shapes_the_adapter(
    tmp_path, tiny_base, rows_file, first_run, key
):
    module = make_module(tiny_base, **{key: CHANGED[key]})
    trainer = make_trainer(tmp_path)
    arguments = {"ckpt_path": newest_verified(first_run), "verbose": False}
    if key in USED:
        with pytest.raises(CheckpointError, match=f"model.lora.{key}="):
            trainer.validate(module, make_data(rows_file), **arguments)
        return
    trainer.validate(module, make_data(rows_file), **arguments)
    same = make_module(tiny_base)
    make_trainer(tmp_path).validate(same, make_data(rows_file), **arguments)
    expected = same.last_evaluation["val/loss"]
    # bfloat16 keeps the adapters' numbers to 2**-8
    tolerance = 1e-2 if key == "dtype" else 0
    assert module.last_evaluation["val/loss"] == pytest.approx(expected, rel=tolerance)


def test_the_order_of_patterns_counts_as_they_are_taken_in_order(tmp_path, tiny_base, rows_file):
    patterns = {r".*\.mlp\..*": 8.0, "up_proj": 2.0}
    with pytest.raises(Killed):
        fit(tmp_path, tiny_base, rows_file, kill_at=2, alpha_pattern=patterns)
    turned = dict(reversed(patterns.items()))
    with pytest.raises(CheckpointError, match=r"model\.lora\.alpha_pattern="):
        fit(tmp_path, tiny_base, rows_file, alpha_pattern=turned)
    fit(tmp_path, tiny_base, rows_file, alpha_pattern=patterns)


def test_a_checkpoint_or_an_adapter_is_validated_whatever_its_run_began_with(
    tmp_path, tiny_base, rows_file, first_run
):
    module = make_module(tiny_base, init_from=str(tmp_path / "gone"))
    checkpoint = newest_verified(first_run)
    data = make_data(rows_file)
    make_trainer(tmp_path).validate(module, data, ckpt_path=checkpoint, verbose=False)
    expected = load_file(first_run / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj.lora_B"
    tensor = module.get_parameter(f"model.base_model.model.{name}.default.weight")
    assert torch.equal(tensor, expected[f"base_model.model.{name}.weight"])
    named = make_module(tiny_base, init_from=str(first_run / "adapter"))
    make_trainer(tmp_path).validate(named, make_data(rows_file), verbose=False)
    assert named.last_evaluation == module.last_evaluation
