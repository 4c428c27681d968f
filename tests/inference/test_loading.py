"""What answers is what was trained: every tensor in its place, over its own base."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import IDS, fit
from conftest import save_base
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_pl.errors import AdapterFolderError, QLoRAError
from qlora_pl.inference.loading import Model, load
from qlora_pl.inference.source import BASE, ModelChoice, resolve_source
from qlora_pl.modeling.adapters.settled import SettlingLinear
from qlora_pl.modeling.parameters import trainable_tensors

CPU = torch.device("cpu")

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def loaded(adapter: Path | str, **choice: Any) -> Model:
    return load(resolve_source(ModelChoice(adapter=(str(adapter),), **choice)), CPU)


def without_manifest(adapter: Path, folder: Path) -> Path:
    """The same as any PEFT program writes it."""
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, folder)
    return folder


@pytest.mark.parametrize("changes", [{}, {"bias": "all"}, {"method": "dora"}, {"use_rslora": True}])
def test_logits_are_those_of_the_trained_model(
    changes: dict[str, Any], tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """In equal bytes: the same packed weights, the same products."""
    base = tiny_base
    if "bias" in changes:
        base = save_base(tmp_path / "biased", attention_bias=True, mlp_bias=True)
    module = fit(tmp_path / "run", base, rows_file, **changes)
    trained = module.model
    assert trained is not None
    with torch.no_grad():
        expected = trained.eval()(input_ids=IDS, use_cache=False).logits
    answering = loaded(tmp_path / "run/adapter")
    with answering.answering_as("adapter") as model:
        assert torch.equal(logits(model), expected)
    with answering.answering_as(None) as model:
        assert not torch.equal(logits(model), expected)
    with answering.answering_as("adapter") as model:
        assert torch.equal(logits(model), expected)


def test_the_base_answers_as_if_biases_had_never_been_trained(
    rows_file: Path, tmp_path: Path
) -> None:
    """Source: the base alone, packed alike and multiplied in float32, in equal bytes."""
    base = save_base(tmp_path / "biased", attention_bias=True)
    module = fit(tmp_path / "run", base, rows_file, bias="lora_only", lr=0.1)
    moved = [n for n, p in trainable_tensors(module.model).items() if n.endswith(".bias")]
    assert moved
    fit(tmp_path / "plain", base, rows_file)  # whose biases are the base's own
    with loaded(tmp_path / "run/adapter").answering_as(None) as model:
        found = logits(model)
    with loaded(tmp_path / "plain/adapter").answering_as(None) as model:
        assert torch.equal(found, logits(model))


def test_a_plain_peft_folder_answers_alike(adapter: Path, model: Model, tmp_path: Path) -> None:
    """Its defaults are nf4 and double quantisation; products may be in bfloat16 here."""
    plain = without_manifest(adapter, tmp_path / "plain")
    other = loaded(plain, template="guanaco")
    assert other.source.assumed == ("its base in nf4 with double quantisation (--quantization)",)
    with model.answering_as("adapter") as ours, other.answering_as("adapter") as theirs:
        difference = (logits(ours) - logits(theirs).float()).abs().max()
    assert difference < 0.15
    text = model.encoder.template.definition()
    assert other.encoder.template.definition() == text


def test_pickled_tensors_are_read_without_running_code(adapter: Path, tmp_path: Path) -> None:
    plain = without_manifest(adapter, tmp_path / "plain")
    tensors = load_file(plain / "adapter_model.safetensors")
    torch.save(tensors, plain / "adapter_model.bin")
    safe = logits(loaded(plain, template="guanaco").model)
    (plain / "adapter_model.safetensors").unlink()
    assert torch.equal(logits(loaded(plain, template="guanaco").model), safe)


def test_products_in_bfloat16_may_use_the_kernel_for_inference_but_for_dora(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """0.1 of logits of about 1: scales in bfloat16. DoRA over repacked weights would be 1 off."""
    for method in ("lora", "dora"):
        module = fit(tmp_path / method, tiny_base, rows_file, compute="bfloat16", method=method)
        trained = module.model
        assert trained is not None
        trained.eval()
        expected = logits(trained).float()
        model = loaded(tmp_path / method / "adapter").model
        difference = (logits(model).float() - expected).abs().max()
        assert difference == 0 if method == "dora" else difference < 0.1


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_adapters_that_are_cast_once_give_the_bytes_of_those_cast_for_every_token(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, compute: str
) -> None:
    monkeypatch.setattr("qlora_pl.inference.loading.allow_inference_kernel", lambda _: None)
    source = resolve_source(ModelChoice(adapter=(str(adapter),)))
    source = replace(source, quantization=replace(source.quantization, compute_dtype=compute))
    answering, exact = load(source, CPU), load(source, CPU, is_exact=True)
    for name in ("adapter", None, "adapter"):
        with answering.answering_as(name) as model, exact.answering_as(name) as other:
            assert torch.equal(logits(model), logits(other))
    for loaded, kept in ((answering, getattr(torch, compute)), (exact, torch.float32)):
        tensors = [t for n, t in loaded.model.named_parameters() if "lora_" in n]
        assert {tensor.dtype for tensor in tensors} == {kept}


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_settled_adapters_take_fewer_operations_and_leave_other_ways_to_peft(adapter: Path) -> None:
    source = resolve_source(ModelChoice(adapter=(str(adapter),)))
    counts, num_layers = [], 0
    for is_exact in (False, True):
        loaded = load(source, CPU, is_exact=is_exact)
        kinds = {type(module).__name__ for module in loaded.model.modules()}
        assert ("SettledLinear4bit" in kinds) != is_exact
        logits(loaded.model)  # casts once
        with Operations() as operations:
            logits(loaded.model)
        counts.append(operations.count)
        if is_exact:
            continue
        layers = [m for m in loaded.model.modules() if type(m).__name__ == "SettledLinear4bit"]
        layer, num_layers = layers[0], len(layers)
        given = torch.randn(2, 3, layer.in_features).bfloat16()
        with torch.no_grad():
            own = layer(given)
            assert torch.equal(layer(given, adapter_names=["adapter", "adapter"]), own)
            assert not torch.equal(layer(given, adapter_names=["__base__", "adapter"]), own)
    assert counts[1] - counts[0] == num_layers  # PEFT copies each base layer's output


def test_the_product_of_a_single_token_is_the_exact_one_rounded_once() -> None:
    """Against float64: within half a unit of bfloat16's last place, and a hair for the sums."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(576, 16, bias=False)
    layer.__class__ = SettlingLinear
    given = torch.randn(1, 1, 576).bfloat16()
    with torch.no_grad():
        found = layer(given)
        expected = given.double() @ layer.weight.double().T
    assert found.dtype == layer.weight.dtype == torch.bfloat16
    assert ((found - expected).abs() <= 2**-8 * expected.abs() + 1e-6).all()


def test_several_adapters_answer_by_name(
    adapter: Path, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    fit(tmp_path / "run", tiny_base, rows_file, r=4, lr=5e-2)
    words = (f"one={adapter}", f"two={tmp_path / 'run/adapter'}")
    both = load(resolve_source(ModelChoice(adapter=words)), CPU)
    assert both.adapters == ["one", "two"]
    for name, folder in (("one", adapter), ("two", tmp_path / "run/adapter")):
        with both.answering_as(name) as model, loaded(folder).answering_as("adapter") as alone:
            assert torch.equal(logits(model), logits(alone))


def test_other_precision_takes_the_base_unquantised(adapter: Path, tiny_base: Path) -> None:
    model = loaded(adapter, precision="float32")
    names = {type(module).__name__ for module in model.model.modules()}
    assert "Linear4bit" not in names
    assert next(model.model.parameters()).dtype == torch.float32


# -- folders that are not what they seem -----------------------------------------------------------


def change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def drop(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(sorted(tensors)[0])


def rename(tensors: dict[str, torch.Tensor]) -> None:
    """As folders do whose base was wrapped once more: PEFT loads them and changes nothing."""
    for name in list(tensors):
        tensors[name.replace("base_model.model.", "base_model.model.model.")] = tensors.pop(name)


def shrink(tensors: dict[str, torch.Tensor]) -> None:
    name = sorted(tensors)[0]
    tensors[name] = tensors[name][:, :-1].contiguous()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (drop, "is no adapter of this base: it lacks 'base_model.model"),
        (rename, "is no adapter of this base: it lacks 'base_model.model"),
        (shrink, "has the shape (8, 127), and the base asks for (8, 128)"),
    ],
)
def test_tensors_that_fit_nowhere_are_refused(
    adapter: Path, tmp_path: Path, change: Any, sentence: str
) -> None:
    plain = without_manifest(adapter, tmp_path / "plain")
    change_tensors(plain, change)
    with pytest.raises(AdapterFolderError) as caught:
        loaded(plain, template="guanaco")
    assert sentence in str(caught.value)


def test_another_base_of_the_same_shape_is_refused(adapter: Path, other_base: Path) -> None:
    with pytest.raises(AdapterFolderError, match="was trained over other weights than those of"):
        loaded(adapter, base=str(other_base))


def test_a_base_that_has_moved_is_named(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny_base, moved)
    assert torch.equal(
        logits(loaded(adapter, base=str(moved)).model), logits(loaded(adapter).model)
    )


def test_an_altered_folder_is_refused(adapter: Path, tmp_path: Path) -> None:
    copy = tmp_path / "adapter"
    shutil.copytree(adapter, copy)
    change_tensors(copy, lambda tensors: tensors[sorted(tensors)[0]].mul_(2))
    with pytest.raises(AdapterFolderError, match="was altered since it was written"):
        loaded(copy)


def test_a_torn_file_is_refused(adapter: Path, tmp_path: Path) -> None:
    plain = without_manifest(adapter, tmp_path / "plain")
    path = plain / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(QLoRAError, match="cannot be read"):
        loaded(plain, template="guanaco")


def test_the_template_s_text_travels_with_the_adapter(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """A file of Jinja may be gone when somebody asks; its text is in the manifest."""
    manifest = json.loads(
        (fit_with_jinja(tmp_path, tiny_base, rows_file) / "manifest.json").read_text()
    )
    assert manifest["encoding"]["template"]["jinja"].startswith("{% for m in messages %}")
    model = loaded(tmp_path / "run/adapter")
    from qlora_pl.data.conversation import Conversation, Message

    text, _ = model.encoder.encode_prompt(Conversation((Message("user", "Why?"),)))
    assert text == "Q: Why?\nA:"


def fit_with_jinja(folder: Path, base: Path, rows: Path) -> Path:
    import adapter_runs

    source = folder / "qa.jinja"
    source.write_text(
        "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A:' }}"
        "{{ m.content }}{{ '\n' if m.role == 'user' else eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    module = adapter_runs.make_module(base)
    trainer = adapter_runs.make_trainer(folder / "run")
    trainer.fit(module, adapter_runs.make_data(rows, template=str(source)))
    source.unlink()
    return folder / "run/adapter"


def test_the_base_alone_is_called_base(model: Model) -> None:
    assert BASE not in model.adapters
