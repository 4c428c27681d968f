"""Every family, really quantised, trained, saved, resumed, reloaded and asked; docs/models.md.

The second opinion is a float32 model of plain transformers and PEFT whose linears hold the
dequantised weights, with the same adapters.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_runs import Killed, digest, fit, load, twin_of
from bitsandbytes.nn import Linear4bit
from families import FAMILIES, Family, Saver
from plain_peft import reload_with_plain_peft
from torch import Tensor, nn

from qlora_pl.modeling.adapters.lora import LoRAConfig, attach_adapters
from qlora_pl.modeling.base.encoder_decoder import language_model_loss, whole_inputs
from qlora_pl.modeling.loading.base_loading import prepare_for_training
from qlora_pl.modeling.parameters import trainable_tensors
from qlora_pl.training.watching.monitoring import RunMetrics

CPU = torch.device("cpu")
DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
LORA = LoRAConfig(r=4, dropout=0.0)

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def make_batch(family: Family, device: torch.device = CPU) -> dict[str, Tensor]:
    ids = torch.arange(5, 37, device=device).reshape(2, 16)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if family.is_encoder_decoder:  # another width than the source's
        batch["labels"] = ids.flip(1)[:, :8]
        batch["decoder_attention_mask"] = torch.ones_like(batch["labels"])
    return batch


def give_random_b(model: nn.Module) -> None:
    """B starts at zero, at which A has no gradient."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainable_tensors(model).items():
        if "lora_B" in name:
            values = torch.empty(parameter.shape).normal_(std=0.1, generator=generator)
            parameter.data.copy_(values)


def loss_and_gradients(model: nn.Module, family: Family) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    device = next(model.parameters()).device
    loss = language_model_loss(model, make_batch(family, device)).total
    loss.backward()
    return loss.detach(), {
        name: p.grad.clone() for name, p in trainable_tensors(model).items() if p.grad is not None
    }


@every_family
def test_every_linear_is_packed_and_nothing_else(family: Family, saved: Saver) -> None:
    loaded = load(saved(family.name))
    packed = [n for n, module in loaded.model.named_modules() if isinstance(module, Linear4bit)]
    assert len(packed) == family.num_linears == len(loaded.plan.quantized)
    assert {name.rpartition(".")[2] for name in packed} == set(family.linears)
    kept = [name for name, role in loaded.plan.kept.items() if role not in ("embedding", "head")]
    assert sorted(kept) == sorted(loaded.plan.fragile)
    assert len(kept) == family.num_kept_linears
    assert {name.split(".")[-2] for name in kept} == set(family.kept_linears)


@every_family
def test_loss_and_gradients_are_the_float32_twins(family: Family, saved: Saver) -> None:
    """1e-4 of the largest gradient: float32 sums of up to 512 products in another order.

    Measured: 3e-7 to 2e-5. A lost bias, a transposed matrix or another block's scale is 1e-2.
    """
    folder = saved(family.name)
    loaded = load(folder)
    model = attach_adapters(loaded.model, LORA, seed=0)
    prepare_for_training(model, gradient_checkpointing=True)
    give_random_b(model)
    twin = attach_adapters(twin_of(loaded, folder), LORA, seed=0)
    twin.load_state_dict({n: p.data for n, p in trainable_tensors(model).items()}, strict=False)
    expected, reference = loss_and_gradients(twin, family)
    with torch.no_grad():  # a validation pass, after which bitsandbytes alone loses gradients
        validated = language_model_loss(model.eval(), make_batch(family)).total
    for number in ("first", "second"):
        loss, gradients = loss_and_gradients(model.train(), family)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0, msg=number)
        assert gradients.keys() == reference.keys() == trainable_tensors(model).keys()
        for name, gradient in gradients.items():
            largest = reference[name].abs().max()
            assert (gradient - reference[name]).abs().max() <= 1e-4 * largest, (number, name)
            assert largest > 0, name
    torch.testing.assert_close(validated, expected, rtol=1e-5, atol=0)


@every_family
def test_a_killed_run_ends_in_the_same_bytes_and_plain_peft_reads_them(
    family: Family, saved: Saver, tmp_path: Path, rows_file: Path
) -> None:
    """2e-5: float32 logits of about 1, packed again by plain transformers from the same file."""
    base = saved(family.name)
    module = fit(tmp_path / "whole", base, rows_file, RunMetrics())
    with pytest.raises(Killed):
        fit(tmp_path / "killed", base, rows_file, RunMetrics(), kill_at=2)
    fit(tmp_path / "killed", base, rows_file, RunMetrics())
    assert digest(tmp_path / "whole") == digest(tmp_path / "killed")
    row = torch.arange(5, 21).unsqueeze(0)
    assert module.model is not None
    with torch.no_grad():
        expected = module.model.eval()(**whole_inputs(module.model, row)).logits
        reloaded = reload_with_plain_peft(tmp_path / "whole" / "adapter")
        answer = reloaded.eval()(**whole_inputs(module.model, row)).logits
    torch.testing.assert_close(answer, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    generated = reloaded.generate(input_ids=row, max_new_tokens=4, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    num_given = 1 if family.is_encoder_decoder else row.shape[1]  # a decoder's start token
    assert num_given < generated.shape[1] <= num_given + 4


# --- the table ------------------------------------------------------------------------------------


def table() -> str:
    """What the tests above hold of every family, as docs/models.md prints it."""
    lines = [
        "| family | quantised and adapted in each layer | linears in 4 bits, of two layers | loss "
        "and gradients | resume | plain PEFT | generate | remarks |",
        "| --- " * 8 + "|",
    ]
    for family in FAMILIES:
        names = ", ".join(f"`{name}`" for name in family.linears)
        count = f"{family.num_linears} of {family.num_linears + family.num_kept_linears}"
        lines.append(
            f"| {family.name} | {names} | {count} | equal | byte for byte | equal | yes | "
            f"{family.note} |"
        )
    return "\n".join(lines)


def test_the_table_is_in_the_documentation() -> None:
    assert table() in DOCUMENT.read_text()
