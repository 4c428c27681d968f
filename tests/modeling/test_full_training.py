"""``lora.method: none``: the whole base is trained as plain torch would, and any program reads it.

References are plain transformers and torch on the same batch, in float32 and under torch's own
autocast, and byte equality of resumed runs.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import Killed, make_data
from bitsandbytes.nn import Linear4bit
from conftest import save_base
from families import BY_NAME
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from small_runs import fit, logits, make_row, make_trainer, one_thread  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_pl.errors import AdapterFolderError, ConfigurationError
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.answers.decoding import DecodingConfig
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization
from qlora_pl.modeling.folders import model_folder
from qlora_pl.modeling.folders.adapter_folder import read_adapter_folder
from qlora_pl.modeling.loading.base_loading import load_base
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.steps import micro_batches
from qlora_pl.training.run_folders.run_folder import newest_verified

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process

WHOLE: dict[str, Any] = {"quant_type": "none", "compute_dtype": "bfloat16"}
GENERATION = {"max_new_tokens": 7, "do_sample": True, "temperature": 0.6, "top_p": 0.9}


def train(folder: Path, base: Path, rows: Path, kill_at: int | None = None, **changes: Any) -> Any:
    lora = {"method": "none"} | changes.pop("lora", {})
    optimizer = {"lr": 1.0e-5, "name": "adamw_torch"} | changes.pop("optimizer", {})
    return fit(folder, base, rows, kill_at, lora=lora, optimizer=optimizer, **WHOLE | changes)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose head is its embedding, so that every row of it has a gradient."""
    folder = save_base(tmp_path_factory.mktemp("tied") / "base", tie_word_embeddings=True)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


class Recorder(Callback):
    """Batches, gradients and norms of each step, and the types of matrix products."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.steps: list[Any] = []

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)
        self.steps.append(module.last_step)
        self.gradients.append({n: p.grad.clone() for n, p in module.trained_tensors().items()})


class Products(TorchDispatchMode):
    """Counts matrix products by the types of their factors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.counts.update({args[-1].dtype: 1})
        return func(*args, **kwargs or {})


def plain(folder: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | settings)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compute", "optimizer"), [("bfloat16", "adamw_torch"), ("float32", "paged_adamw_32bit")]
)
def test_gradients_are_plain_torchs_on_the_same_batch(
    compute: str,
    optimizer: str,
    tiny_base: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Source: plain transformers in float32, under torch.autocast where products are in bfloat16.

    Of each tensor's largest, 1e-5: float32 sums in another order, since only trained positions
    pass the head here; 2e-2 in bfloat16, whose eps is 2**-7, where the head's products are cut
    otherwise. Clipping to 1e4 does nothing, but must not fail either.
    """
    products, forward = Products(), micro_batches.language_model_loss

    def counted(*arguments: Any) -> Any:
        with products:
            return forward(*arguments)

    monkeypatch.setattr(micro_batches, "language_model_loss", counted)
    recorder = Recorder()
    module = train(
        tmp_path,
        tiny_base,
        rows_file,
        callbacks=[recorder],
        compute_dtype=compute,
        optimizer={"name": optimizer},
        trainer={"gradient_clip_val": 1e4, "max_steps": 1},
    )
    assert {p.dtype for p in module.model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in module.model.parameters())
    assert products.counts == {getattr(torch, compute): 15}
    reference, (batch,) = plain(tiny_base).train(), recorder.batches
    with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bfloat16"):
        found = reference(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        targets = batch["labels"][:, 1:].flatten()
        predictions = found.logits[:, :-1].flatten(0, 1).float()
        loss = functional.cross_entropy(predictions, targets, ignore_index=-100)
    loss.backward()
    assert recorder.steps[0].loss == pytest.approx(
        float(loss), rel=1e-5 if compute == "float32" else 1e-2
    )
    tolerance = 1e-5 if compute == "float32" else 2e-2
    norms = []
    for name, parameter in reference.named_parameters():
        expected = parameter.grad
        error = (recorder.gradients[0][f"model.{name}"] - expected).abs().max()
        assert error <= tolerance * expected.abs().max(), name
        norms.append(expected.norm())
    assert recorder.steps[0].grad_norm == pytest.approx(
        float(torch.stack(norms).norm()), rel=tolerance
    )


def share_moved(module: Any, base: Path, folder: Path) -> float:
    before, after = plain(base).state_dict(), load_file(folder / "model" / "model.safetensors")
    moved = sum(int((after[name].float() != before[name]).sum()) for name in after)
    return moved / sum(tensor.numel() for tensor in after.values())


def test_nearly_every_weight_moves_at_a_usual_rate_and_few_would_in_bfloat16(
    tied: Path, rows_file: Path, tmp_path: Path, caplog: Any
) -> None:
    """Source: an update of 1e-5 lies below half an ulp of any bfloat16 weight above 0.003."""
    caplog.set_level(logging.WARNING, "qlora_pl")
    module = train(tmp_path / "float32", tied, rows_file)
    assert share_moved(module, tied, tmp_path / "float32") > 0.95
    assert "most updates are rounded away" not in caplog.text
    module = train(tmp_path / "bfloat16", tied, rows_file, lora={"dtype": "bfloat16"})
    assert share_moved(module, tied, tmp_path / "bfloat16") < 0.1
    assert "model.lora.dtype: bfloat16 keeps the trained weights themselves" in caplog.text


@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_weights_in_bfloat16_cannot_be_multiplied_in_another_type(
    compute: str, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        train(tmp_path, tiny_base, rows_file, lora={"dtype": "bfloat16"}, compute_dtype=compute)
    (sentence,) = caught.value.problems
    assert sentence.startswith("model.lora.dtype: bfloat16")
    assert compute in sentence


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
def test_a_quantised_base_is_refused(quant_type: Any, tiny_base: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"whose {quant_type} weights have no gradient"):
        QLoRAModule(
            str(tiny_base),
            lora=LoRAConfig(method="none"),
            quantization=QuantizationConfig(quant_type=quant_type),
        )


def test_float16_products_train_float32_weights(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """1e-2: see test_mixed_precision."""
    runs = {name: Recorder() for name in ("float16", "float32")}
    for compute, recorder in runs.items():
        train(
            tmp_path / compute,
            tiny_base,
            rows_file,
            callbacks=[recorder],
            compute_dtype=compute,
            trainer={"max_steps": 1, "gradient_clip_val": 1e4},
        )
    for name, expected in runs["float32"].gradients[0].items():
        error = (runs["float16"].gradients[0][name] - expected).abs().max()
        assert error <= 1e-2 * expected.abs().max(), name


# --- the folder -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(
    tied: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    """A finished run of three steps."""
    folder = tmp_path_factory.mktemp("trained")
    return train(folder, tied, rows_file, optimizer={"lr": 1e-3}), folder


def test_plain_transformers_reads_the_folder_to_the_trained_models_logits(
    trained: tuple[Any, Path], tied: Path
) -> None:
    from transformers import AutoTokenizer

    module, run = trained
    reloaded = plain(run / "model", dtype="auto")
    assert {p.dtype for p in reloaded.parameters()} == {torch.float32}
    assert torch.equal(logits(reloaded), logits(module.model))
    assert not torch.equal(logits(reloaded), logits(plain(tied)))
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert reloaded.config.use_cache is True
    assert module.model.config.use_cache is False
    kept = {key: getattr(reloaded.generation_config, key) for key in GENERATION}
    assert kept == GENERATION
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer("What is it?")["input_ids"]
    answer = reloaded.generate(input_ids=make_row(), pad_token_id=0)
    assert answer.shape[1] <= 16 + GENERATION["max_new_tokens"]


def test_the_manifest_verifies_and_a_flipped_byte_in_any_file_is_noticed(
    trained: tuple[Any, Path], tied: Path, tmp_path: Path
) -> None:
    _, run = trained
    manifest = read_adapter_folder(run / "model")
    assert manifest.base["weights"] == identify_base(str(tied), None, None).weights
    assert manifest.lora == {"method": "none", "dtype": "float32"}
    assert manifest.step == 3
    files = {path.name for path in (run / "model").iterdir()} - {"manifest.json"}
    assert set(manifest.files) == files
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= files
    for name in sorted(files):
        copy = Path(shutil.copytree(run / "model", tmp_path / name))
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(AdapterFolderError, match=f"{name}' was altered"):
            read_adapter_folder(copy)


def test_a_save_that_does_not_hold_what_was_trained_stops_the_run(
    tied: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is stood in for by a writer that changes one weight of the file."""
    from qlora_pl.errors import TrainingStoppedError

    save = plain(tied).__class__.save_pretrained

    def careless(model: Any, folder: Path, **settings: Any) -> None:
        model.model.norm.weight.data[3] += 1
        save(model, folder, **settings)
        model.model.norm.weight.data[3] -= 1

    monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", careless)
    with pytest.raises(TrainingStoppedError, match=r"does not hold what was trained: .*norm"):
        train(tmp_path, tied, rows_file, trainer={"max_steps": 1})


@pytest.mark.parametrize("family", ["tied LLaMA", "GPT-2", "in several files"])
def test_a_killed_run_ends_in_the_same_bytes(
    family: str,
    tied: Path,
    tiny_base: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tied if family == "tied LLaMA" else tiny_base
    if family == "GPT-2":
        base = BY_NAME["GPT-2"].save(tmp_path / "base")
    if family == "in several files":
        monkeypatch.setattr(model_folder, "MAX_SHARD_SIZE", "150KB")
    module = train(tmp_path / "whole", base, rows_file)
    with pytest.raises(Killed):
        train(tmp_path / "killed", base, rows_file, kill_at=2)
    train(tmp_path / "killed", base, rows_file)
    files = sorted((tmp_path / "whole" / "model").glob("*.safetensors"))
    assert ((tmp_path / "whole" / "model" / "model.safetensors.index.json").is_file()) is (
        family == "in several files"
    )
    for path in files:
        assert path.read_bytes() == (tmp_path / "killed" / "model" / path.name).read_bytes()
    read_adapter_folder(tmp_path / "killed" / "model")
    reloaded = plain(tmp_path / "killed" / "model")
    assert torch.equal(logits(reloaded), logits(module.model))


def packed_layers(model: nn.Module) -> int:
    return sum(isinstance(module, Linear4bit) for module in model.modules())


def test_the_folder_is_the_base_of_a_next_run(
    trained: tuple[Any, Path], rows_file: Path, tmp_path: Path
) -> None:
    """Trained on, or quantised under adapters; in several files as well."""
    _, run = trained
    again = train(tmp_path / "again", run / "model", rows_file)
    assert again.identity.folder == run / "model"
    adapters = fit(tmp_path / "adapters", run / "model", rows_file)
    assert packed_layers(adapters.base.model) == 14
    stored = load_file(run / "model" / "model.safetensors")
    assert torch.equal(adapters.base.model.model.norm.weight, stored["model.norm.weight"])
    assert (tmp_path / "adapters" / "adapter" / "manifest.json").is_file()
    manifest = json.loads((tmp_path / "adapters" / "adapter" / "manifest.json").read_text())
    assert manifest["base"]["name"] == str((run / "model").resolve())


def test_validation_and_answers_of_a_checkpoint(
    trained: tuple[Any, Path], tied: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Source: the module that was trained."""
    module, run = trained
    fresh = QLoRAModule(
        str(tied),
        lora=LoRAConfig(method="none"),
        quantization=QuantizationConfig(**WHOLE),
        decoding=DecodingConfig(max_new_tokens=3),
    )
    checkpoint = newest_verified(run)
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    trainer.validate(fresh, make_data(rows_file), ckpt_path=checkpoint, verbose=False)
    same = make_trainer(tmp_path, limit_val_batches=1.0)
    same.validate(module, make_data(rows_file), verbose=False)
    assert fresh.last_evaluation == module.last_evaluation
    with torch.no_grad():
        for (name, a), (_, b) in zip(
            fresh.model.named_parameters(), module.model.named_parameters(), strict=True
        ):
            assert torch.equal(a, b), name
    answers = trainer.predict(fresh, make_data(rows_file), ckpt_path=checkpoint)
    assert [set(row) for batch in answers for row in batch] == [
        {"row", "prompt", "answer", "reference"}
    ] * 2


def test_generation_settings_without_an_effect_are_kept_and_stop_nothing(
    tied: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many bases have a temperature without sampling, which transformers 4 refused to save."""
    settings = {"temperature": 0.9, "top_p": 0.6}
    monkeypatch.setenv("QLORA_PL_CACHE", str(tmp_path / "cache"))
    base = Path(shutil.copytree(tied, tmp_path / "base"))
    (base / "generation_config.json").write_text(json.dumps(settings))
    train(tmp_path / "run", base, rows_file, trainer={"max_steps": 1})
    kept = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert settings.items() <= kept.items()
    config = QuantizationConfig(compute_dtype="float32")
    plan = plan_quantization(build_skeleton(base), config)
    identity = identify_base(str(base), None, None)
    made, read = (load_base(identity, config, plan, device=torch.device("cpu")) for _ in range(2))
    assert (made.is_from_cache, read.is_from_cache) == (False, True)
    assert read.model.generation_config.temperature == 0.9  # type: ignore[union-attr]
