"""Optimizers against float64 and torch, schedules against transformers, state against its bytes."""

from __future__ import annotations

import io
import logging
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlora_pl.errors import CheckpointError, ConfigurationError
from qlora_pl.modeling.optimization.optimizer_state import (
    named_optimizer_state,
    optimizer_state_from_names,
)
from qlora_pl.modeling.optimization.optimizers import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    build_schedule,
    optimizer_state_bytes,
    parameter_groups,
)

# 16,384 elements and more: below 4,096 bitsandbytes keeps 8-bit state in float32;
# 639 * 32 is no multiple of its blocks of 256, though every cut into 2, 4 or 8 shards is
SHAPES = {
    "layer.lora_A.default.weight": (32, 512),
    "layer.lora_B.default.weight": (639, 32),
    "layer.norm.weight": (512,),
}
CONFIGS = [
    OptimizerConfig(name="paged_adamw_32bit", lr=1e-2, weight_decay=0.1),
    OptimizerConfig(name="paged_adamw_8bit", lr=1e-2, weight_decay=0.1, lora_plus_ratio=4),
    OptimizerConfig(name="paged_lion_32bit", lr=1e-3, weight_decay=0.1),
    OptimizerConfig(name="paged_lion_8bit", lr=1e-3, betas=(0.9, 0.99)),
    OptimizerConfig(name="adamw_32bit", lr=1e-2, lora_plus_ratio=4),
    OptimizerConfig(name="adamw_8bit", lr=1e-2),
    OptimizerConfig(name="lion", lr=1e-3),
    OptimizerConfig(name="sgd", lr=1e-2),
    OptimizerConfig(name="sgd", lr=1e-2, momentum=0.9, weight_decay=0.1),
    OptimizerConfig(name="adamw_torch", lr=1e-2, weight_decay=0.1),
]
every_optimizer = pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: config.name + ("_momentum" if config.momentum else "")
)


def make_parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    values = {name: torch.rand(shape, generator=draw) * 2 - 1 for name, shape in SHAPES.items()}
    return {name: nn.Parameter(value.to(dtype)) for name, value in values.items()}


def gradient(name: str, step: int) -> Tensor:
    draw = torch.Generator().manual_seed(1000 * step + len(name))
    return torch.randn(SHAPES[name], generator=draw)


def train(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps) -> None:
    for step in steps:
        for name, parameter in parameters.items():
            parameter.grad = gradient(name, step).to(parameter.dtype)
        optimizer.step()


def through_a_file(saved: dict) -> dict:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained_copy(parameters: dict[str, nn.Parameter], order: list[str]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(parameters[name].detach().clone()) for name in order}


def factors(config: ScheduleConfig, num_training_steps: float, num_factors: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(config, optimizer, num_training_steps)
    found = []
    for _ in range(num_factors):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


BAD_OPTIMIZERS = [
    ({"name": "adam"}, "name: must be one of the names in --help, got adam."),
    ({"lr": -1.0}, "lr: must be above 0, got -1.0."),
    ({"lr": math.nan}, "lr: must be above 0, got nan."),
    ({"betas": (0.9, 1.0)}, "betas: must be two numbers from 0 to below 1, got (0.9, 1.0)."),
    ({"betas": (0.9,)}, "betas: must be two numbers from 0 to below 1, got (0.9,)."),
    ({"eps": -1e-8}, "eps: must be 0 or above, got -1e-08."),
    ({"name": "sgd", "momentum": 1.0}, "momentum: must be from 0 to below 1, got 1.0."),
    ({"weight_decay": -0.1}, "weight_decay: must be 0 or above, got -0.1."),
    ({"lora_plus_ratio": 0.0}, "lora_plus_ratio: must be above 0, got 0.0."),
    ({"momentum": 0.9}, "momentum: has no effect with paged_adamw_32bit, got 0.9; remove it."),
    ({"name": "lion", "eps": 1e-6}, "eps: has no effect with lion, got 1e-06; remove it."),
    ({"name": "sgd", "eps": 1e-6}, "eps: has no effect with sgd, got 1e-06; remove it."),
    (
        {"name": "sgd", "betas": (0.9, 0.95)},
        "betas: has no effect with sgd, got (0.9, 0.95); remove it.",
    ),
]
BAD_SCHEDULES = [
    ({"name": "step"}, "name: must be one of the names in --help, got step."),
    ({"name": "linear", "warmup_steps": -1}, "warmup_steps: must be 0 or above, got -1."),
    ({"name": "linear", "warmup_ratio": 1.0}, "warmup_ratio: must be from 0 to below 1, got 1.0."),
    (
        {"name": "cosine_with_floor", "min_lr_ratio": 1.5},
        "min_lr_ratio: must be from 0 to below 1, got 1.5.",
    ),
    (
        {"name": "linear", "warmup_steps": 10, "warmup_ratio": 0.03},
        "warmup_steps: 10 and warmup_ratio: 0.03 are two lengths of one warm-up; keep one of them.",
    ),
    (
        {"warmup_ratio": 0.03},
        "warmup_ratio: the schedule 'constant' has no warmup and would ignore 0.03; "
        "use constant_with_warmup or set it to 0.",
    ),
    (
        {"warmup_steps": 5},
        "warmup_steps: the schedule 'constant' has no warmup and would ignore 5; "
        "use constant_with_warmup or set it to 0.",
    ),
    (
        {"name": "cosine", "min_lr_ratio": 0.2},
        "min_lr_ratio: has no effect with cosine, got 0.2; remove it or use cosine_with_floor.",
    ),
]


@pytest.mark.parametrize(("settings", "sentence"), BAD_OPTIMIZERS)
def test_a_bad_optimizer_setting_is_named_with_its_value(settings, sentence):
    with pytest.raises(ConfigurationError) as caught:
        OptimizerConfig(**settings)
    assert caught.value.problems == [f"model.optimizer.{sentence}"]


@pytest.mark.parametrize(("settings", "sentence"), BAD_SCHEDULES)
def test_a_bad_schedule_setting_is_named_with_its_value(settings, sentence):
    with pytest.raises(ConfigurationError) as caught:
        ScheduleConfig(**settings)
    assert caught.value.problems == [f"model.schedule.{sentence}"]


def test_all_problems_of_a_config_are_reported_together():
    with pytest.raises(ConfigurationError) as caught:
        OptimizerConfig(name="lion", lr=0.0, eps=1e-6, momentum=0.9, weight_decay=-1.0)
    keys = [
        problem.split(":")[0].removeprefix("model.optimizer.") for problem in caught.value.problems
    ]
    assert keys == ["lr", "weight_decay", "eps", "momentum"]


def test_biases_and_norms_do_not_decay_and_frozen_parameters_are_left_out():
    named = {
        "q_proj.weight": nn.Parameter(torch.zeros(2, 2)),
        "q_proj.bias": nn.Parameter(torch.zeros(2)),
        "input_layernorm.weight": nn.Parameter(torch.zeros(2)),
        "relative_attention_bias.weight": nn.Parameter(torch.zeros(2, 2)),
        "lora_magnitude_vector.weight": nn.Parameter(torch.zeros(2)),
        "frozen.weight": nn.Parameter(torch.zeros(2, 2), requires_grad=False),
    }
    decay, no_decay = parameter_groups(named.items(), OptimizerConfig(weight_decay=0.1))
    assert (decay["name"], decay["weight_decay"]) == ("decay", 0.1)
    assert [id(p) for p in decay["params"]] == [id(named["q_proj.weight"])]
    assert (no_decay["name"], no_decay["weight_decay"]) == ("no_decay", 0.0)
    assert len(no_decay["params"]) == 4


def test_lora_plus_multiplies_the_learning_rate_of_b_matrices_alone():
    named = {
        "q.lora_A.default.weight": nn.Parameter(torch.zeros(2, 2)),
        "q.lora_B.default.weight": nn.Parameter(torch.zeros(2, 2)),
        "q.lora_B.default.bias": nn.Parameter(torch.zeros(2)),
        "embed.lora_embedding_B.default": nn.Parameter(torch.zeros(2, 2)),
        "not_lora_B_really.weight": nn.Parameter(torch.zeros(2, 2)),
    }
    config = OptimizerConfig(lr=1e-4, weight_decay=0.1, lora_plus_ratio=16)
    groups = parameter_groups(named.items(), config)
    assert [(g["name"], len(g["params"]), g["lr"], g["weight_decay"]) for g in groups] == [
        ("decay", 2, 1e-4, 0.1),
        ("lora_B_decay", 2, 16e-4, 0.1),
        ("lora_B_no_decay", 1, 16e-4, 0.0),
    ]


def test_a_schedule_keeps_the_lora_plus_ratio():
    config = OptimizerConfig(name="adamw_torch", lr=1e-4, lora_plus_ratio=16)
    parameters = make_parameters()
    optimizer = build_optimizer(config, parameters.items())
    schedule = build_schedule(ScheduleConfig(name="linear"), optimizer, 4)
    train(optimizer, parameters, [0])
    schedule.step()
    lr = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert lr["decay"] == pytest.approx(0.75e-4)
    assert lr["lora_B_decay"] == pytest.approx(12e-4)


def test_an_optimizer_over_nothing_is_refused():
    frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    with pytest.raises(ConfigurationError, match="no parameter is trained"):
        build_optimizer(OptimizerConfig(name="sgd"), [("weight", frozen)])


def test_a_lora_plus_ratio_without_b_matrices_is_refused():
    weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ConfigurationError, match="no trained parameter is a LoRA B matrix"):
        parameter_groups([("weight", weight)], OptimizerConfig(lora_plus_ratio=16))


@pytest.mark.parametrize("name", ["adamw_32bit", "adamw_torch"])
def test_adamw_follows_the_equations_in_float64(name):
    """Reference: Loshchilov and Hutter 2019 (arXiv:1711.05101), Algorithm 2, in float64 by hand."""
    config = OptimizerConfig(name=name, lr=1e-2, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
    parameters = make_parameters()
    weight = "layer.lora_A.default.weight"
    expected = parameters[weight].detach().double()
    mean, square = torch.zeros_like(expected), torch.zeros_like(expected)
    for step in range(1, 6):
        grad = gradient(weight, step).double()
        mean = 0.8 * mean + 0.2 * grad
        square = 0.95 * square + 0.05 * grad**2
        denominator = (square / (1 - 0.95**step)).sqrt() + 1e-3
        expected = expected - 1e-2 * 0.1 * expected - 1e-2 * mean / (1 - 0.8**step) / denominator
    train(build_optimizer(config, parameters.items()), parameters, range(1, 6))
    # decay and update round a weight below 2 twice in each of five steps: 10 * 2**-24
    torch.testing.assert_close(parameters[weight].double(), expected, rtol=0, atol=6e-7)


def test_eight_bit_adamw_stays_near_torchs_adamw():
    """Reference: torch's AdamW over the same six gradients."""
    eight_bit, exact, start = make_parameters(), make_parameters(), make_parameters()
    for name, parameters in (("adamw_8bit", eight_bit), ("adamw_torch", exact)):
        config = OptimizerConfig(name=name, lr=1e-2)
        train(build_optimizer(config, parameters.items()), parameters, range(6))
    for name in SHAPES:
        moved = (exact[name] - start[name]).norm()
        # codes are a few percent apart, and errors of single weights cancel: 1.04 % was measured
        assert (eight_bit[name] - exact[name]).norm() < 0.03 * moved


def test_lion_follows_the_equations_in_float64():
    """Reference: Chen et al. 2023 (arXiv:2302.06675), Algorithm 2, in float64 by hand."""
    config = OptimizerConfig(name="lion", lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    parameters = make_parameters()
    weight = "layer.lora_A.default.weight"
    expected, mean = parameters[weight].detach().double(), torch.zeros(SHAPES[weight]).double()
    for step in range(1, 6):
        grad = gradient(weight, step).double()
        expected = expected - 1e-3 * ((0.9 * mean + 0.1 * grad).sign() + 0.1 * expected)
        mean = 0.99 * mean + 0.01 * grad
    train(build_optimizer(config, parameters.items()), parameters, range(1, 6))
    # decay and update round a weight below 2 twice in each of five steps: 10 * 2**-24
    torch.testing.assert_close(parameters[weight].double(), expected, rtol=0, atol=6e-7)


@pytest.mark.parametrize("config", CONFIGS[:4], ids=lambda config: config.name)
def test_a_paged_optimizer_on_the_cpu_says_once_that_it_is_not_paged(config, caplog):
    parameters = make_parameters()
    with caplog.at_level(logging.WARNING, logger="qlora_pl"):
        optimizer = build_optimizer(config, parameters.items())
        train(optimizer, parameters, range(2))  # bitsandbytes' own warning would be an error here
    (record,) = [record for record in caplog.records if record.name.startswith("qlora_pl")]
    assert f"{config.name} pages its state" in record.getMessage()
    assert not optimizer.is_paged


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_resumed_optimizer_repeats_the_uninterrupted_steps_bit_for_bit(config, dtype):
    straight = make_parameters(dtype)
    train(build_optimizer(config, straight.items()), straight, range(6))

    first = make_parameters(dtype)
    optimizer = build_optimizer(config, first.items())
    train(optimizer, first, range(3))
    saved = through_a_file(named_optimizer_state(optimizer, first.items()))

    second = trained_copy(first, order=sorted(SHAPES, reverse=True))
    resumed = build_optimizer(config, second.items())
    resumed.load_state_dict(optimizer_state_from_names(saved, resumed, second.items()))
    train(resumed, second, range(3, 6))
    for name in SHAPES:
        assert torch.equal(second[name], straight[name]), name


@pytest.mark.parametrize("config", [c for c in CONFIGS if "8bit" in c.name], ids=lambda c: c.name)
def test_eight_bit_state_is_uint8_before_and_after_a_checkpoint(config):
    parameters = make_parameters()
    optimizer = build_optimizer(config, parameters.items())
    train(optimizer, parameters, [0])
    saved = through_a_file(named_optimizer_state(optimizer, parameters.items()))
    optimizer.load_state_dict(optimizer_state_from_names(saved, optimizer, parameters.items()))
    for name, is_large in zip(SHAPES, (True, True, False), strict=True):
        dtype = torch.uint8 if is_large else torch.float32
        assert saved["state"][name]["state1"].dtype == dtype
        assert optimizer.state[parameters[name]]["state1"].dtype == dtype


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2]], ids=lambda config: config.name)
def test_32_bit_state_of_bfloat16_parameters_stays_float32(config):
    parameters = make_parameters(torch.bfloat16)
    optimizer = build_optimizer(config, parameters.items())
    train(optimizer, parameters, [0])
    before = {name: optimizer.state[p]["state1"].clone() for name, p in parameters.items()}
    saved = through_a_file(named_optimizer_state(optimizer, parameters.items()))
    optimizer.load_state_dict(optimizer_state_from_names(saved, optimizer, parameters.items()))
    for name, parameter in parameters.items():
        assert optimizer.state[parameter]["state1"].dtype == torch.float32
        assert torch.equal(optimizer.state[parameter]["state1"], before[name])


def test_state_moves_between_a_paged_optimizer_and_its_ordinary_sibling():
    parameters = make_parameters()
    paged = build_optimizer(OptimizerConfig(name="paged_adamw_32bit"), parameters.items())
    ordinary = build_optimizer(OptimizerConfig(name="adamw_32bit"), parameters.items())
    train(paged, parameters, [0])
    saved = named_optimizer_state(paged, parameters.items())
    ordinary.load_state_dict(optimizer_state_from_names(saved, ordinary, parameters.items()))
    for parameter in parameters.values():
        assert paged.state[parameter]["state1"].any()
        for key in ("state1", "state2"):
            moved = ordinary.state[parameter][key]
            assert torch.equal(moved, paged.state[parameter][key])


def test_numpy_numbers_in_a_group_are_kept_as_python_numbers():
    parameters = make_parameters()
    optimizer = build_optimizer(OptimizerConfig(name="sgd"), parameters.items())
    optimizer.param_groups[0]["lr"] = np.float64(0.5)
    saved = through_a_file(named_optimizer_state(optimizer, parameters.items()))
    assert type(saved["param_groups"][0]["lr"]) is float


def test_a_parameter_without_a_gradient_has_no_state_and_still_resumes():
    parameters = make_parameters()
    optimizer = build_optimizer(OptimizerConfig(name="adamw_torch"), parameters.items())
    parameters["layer.norm.weight"].grad = gradient("layer.norm.weight", 0)
    optimizer.step()
    saved = through_a_file(named_optimizer_state(optimizer, parameters.items()))
    assert list(saved["state"]) == ["layer.norm.weight"]
    optimizer.load_state_dict(optimizer_state_from_names(saved, optimizer, parameters.items()))


def saved_state(config: OptimizerConfig) -> dict:
    parameters = make_parameters()
    optimizer = build_optimizer(config, parameters.items())
    train(optimizer, parameters, [0])
    return named_optimizer_state(optimizer, parameters.items())


def test_missing_and_unexpected_parameters_are_named_together():
    saved = saved_state(OptimizerConfig(name="lion"))
    parameters = make_parameters()
    parameters["layer.new.weight"] = parameters.pop("layer.norm.weight")
    optimizer = build_optimizer(OptimizerConfig(name="lion"), parameters.items())
    with pytest.raises(CheckpointError) as caught:
        optimizer_state_from_names(saved, optimizer, parameters.items())
    missing, unexpected = caught.value.problems
    assert missing.startswith("Checkpoint has no optimizer state for layer.new.weight.")
    assert unexpected.startswith("Checkpoint has unused optimizer state for layer.norm.weight.")


@pytest.mark.parametrize(
    ("now", "sentence"),
    [
        (OptimizerConfig(name="adamw_8bit"), "group of kind AdamW32bit, this run of AdamW8bit"),
        (OptimizerConfig(name="lion"), "group of kind AdamW32bit, this run of Lion32bit"),
        (OptimizerConfig(name="adamw_torch"), "group of kind AdamW32bit, this run of adamw_torch"),
        (OptimizerConfig(lora_plus_ratio=4), "group of name decay, this run of lora_B_decay"),
    ],
)
def test_state_of_another_kind_of_optimizer_is_refused(now, sentence):
    saved = saved_state(OptimizerConfig(name="adamw_32bit"))
    parameters = make_parameters()
    optimizer = build_optimizer(now, parameters.items())
    with pytest.raises(CheckpointError, match=sentence):
        optimizer_state_from_names(saved, optimizer, parameters.items())


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_torch"])
def test_state_of_another_rank_is_refused(name):
    saved = saved_state(OptimizerConfig(name=name))
    parameters = make_parameters()
    parameters["layer.lora_A.default.weight"] = nn.Parameter(torch.zeros(16, 512))
    optimizer = build_optimizer(OptimizerConfig(name=name), parameters.items())
    with pytest.raises(CheckpointError, match=r"lora_A.* shape \(32, 512\), the parameter \(16,"):
        optimizer_state_from_names(saved, optimizer, parameters.items())


def test_8_bit_state_of_a_tensor_that_is_kept_in_float32_is_refused():
    """As bitsandbytes alone would have made it: 601 * 32 elements, whose halves end in a block."""
    from bitsandbytes.optim import AdamW8bit

    named = {"weight": nn.Parameter(torch.ones(601, 32))}
    config = OptimizerConfig(name="adamw_8bit")
    theirs = AdamW8bit(parameter_groups(named.items(), config))
    named["weight"].grad = torch.ones(601, 32)
    theirs.step()
    saved = named_optimizer_state(theirs, named.items())
    ours = build_optimizer(config, named.items())
    with pytest.raises(CheckpointError, match="for weight has 8 bits, where 32 are kept"):
        optimizer_state_from_names(saved, ours, named.items())


def test_an_optimizer_over_parameters_without_a_name_is_refused():
    optimizer = build_optimizer(OptimizerConfig(name="sgd"), make_parameters().items())
    with pytest.raises(CheckpointError, match="steps 3 parameters that the model does not name"):
        named_optimizer_state(optimizer, make_parameters().items())


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_state_bytes_are_those_of_the_real_state(config, dtype):
    """Reference: the storages that the optimizer holds after a step, each counted once."""
    parameters = make_parameters(dtype)
    optimizer = build_optimizer(config, parameters.items())
    train(optimizer, parameters, [0])
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for held in optimizer.state.values()
        for value in held.values()
        if isinstance(value, Tensor)
    }
    assert optimizer_state_bytes(config, SHAPES.values(), dtype) == sum(storages.values())


@pytest.mark.parametrize(
    "name", ["constant_with_warmup", "linear", "cosine", "cosine_with_floor", "inverse_sqrt"]
)
@pytest.mark.parametrize("warmup_steps", [4, 1])
def test_schedules_are_transformers_own_with_the_warm_up_one_step_earlier(name, warmup_steps):
    """Reference: ``transformers.get_scheduler`` over the same 20 steps."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(
        name.replace("with_floor", "with_min_lr"),
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=20,
        scheduler_specific_kwargs={"min_lr_rate": 0.1} if name == "cosine_with_floor" else None,
    ).lr_lambdas[0]
    ours = factors(ScheduleConfig(name=name, warmup_steps=warmup_steps), 20, 20)
    expected = [theirs(step + 1 if step < warmup_steps else step) for step in range(20)]
    assert ours == pytest.approx(expected, abs=1e-12)


def test_the_first_step_trains_and_the_last_warm_up_step_is_at_the_peak():
    found = factors(ScheduleConfig(name="constant_with_warmup", warmup_steps=4), 10, 6)
    assert found == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("ratio", "steps", "warmup"), [(0.03, 100, 3), (0.03, 101, 4), (0.07, 100, 7), (0.5, 1, 1)]
)
def test_a_warm_up_ratio_is_rounded_up_to_whole_steps(ratio, steps, warmup):
    found = factors(ScheduleConfig(name="constant_with_warmup", warmup_ratio=ratio), steps, 10)
    assert found.index(1.0) + 1 == warmup


@pytest.mark.parametrize(
    ("name", "last"), [("linear", 0.1), ("cosine", 0.0245), ("cosine_with_floor", 0.122)]
)
def test_the_last_step_of_a_run_still_trains_and_a_longer_run_does_not_rise_again(name, last):
    """Reference, by hand: 1 - 9/10; (1 + cos(0.9 pi)) / 2; 0.1 + 0.9 of that."""
    found = factors(ScheduleConfig(name=name), 10, 13)
    assert found[9] == pytest.approx(last, rel=1e-2)  # last is written to three digits
    assert found[10:] == pytest.approx([0.1 if name == "cosine_with_floor" else 0.0] * 3)


def test_inverse_sqrt_without_a_warm_up_counts_from_step_one():
    found = factors(ScheduleConfig(name="inverse_sqrt"), math.inf, 5)
    assert found == pytest.approx([1, 1, 2**-0.5, 3**-0.5, 0.5])


@pytest.mark.parametrize("steps", [-1, 0, math.inf])
@pytest.mark.parametrize(
    "config",
    [ScheduleConfig(name="cosine"), ScheduleConfig(name="inverse_sqrt", warmup_ratio=0.1)],
    ids=lambda config: config.name,
)
def test_a_schedule_over_a_run_without_a_length_is_refused(config, steps):
    with pytest.raises(ConfigurationError, match=r"set trainer\.max_steps"):
        factors(config, steps, 1)


def test_a_warm_up_that_fills_the_run_is_warned_about(caplog):
    assert factors(ScheduleConfig(name="linear", warmup_steps=100), 2, 2) == [0.01, 0.02]
    assert "100 steps of warm-up fill this run of 2" in caplog.text


def test_a_schedule_resumes_from_a_weights_only_file():
    config = ScheduleConfig(name="cosine", warmup_ratio=0.2)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(config, optimizer, 10)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    state = through_a_file(schedule.state_dict())
    resumed = build_schedule(config, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 10)
    resumed.load_state_dict(state)
    resumed.optimizer.step()
    resumed.step()
    assert resumed.get_last_lr()[0] == factors(config, 10, 7)[6]
