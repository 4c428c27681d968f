"""``qlora-pl plan`` as it is typed: its table, verdicts, and one sentence for every mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typed import type_words

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
GB = 1e9

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process
Plan = Callable[..., dict[str, Any]]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """Types ``qlora-pl plan`` with words."""
    monkeypatch.chdir(ROOT)
    return lambda *words: type_words(monkeypatch, capsys, "plan", *words)


@pytest.fixture
def plan(say: Callable[..., tuple[int, str, str]]) -> Plan:
    """The numbers of a plan."""

    def numbers(*words: object) -> dict[str, Any]:
        code, out, err = say(*words, "--json")
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    return numbers


# -- what the paper's experiments come to ----------------------------------------------------------


def test_guanaco_65b_fits_into_48_gib(plan: Plan) -> None:
    """The paper trains it on one 48 GB GPU."""
    found = plan("--config", EXPERIMENTS / "guanaco65b.yaml", "--gpu", "48GiB")
    assert found["verdict"]["kind"] == "fits"
    assert found["num_trained"] == 799_539_200
    assert found["bits_per_weight"] == pytest.approx(4.127, abs=5e-4)
    assert found["paper"]["hours"] == 24


def test_guanaco_65b_does_not_fit_into_32_gib_and_what_would_help_is_told(
    say: Callable[..., tuple[int, str, str]], plan: Plan
) -> None:
    words = ("--config", EXPERIMENTS / "guanaco65b.yaml", "--gpu", "32GiB")
    _, out, _ = say(*words)
    assert "does not fit, not even with paging" in out
    found = plan(*words)
    assert found["verdict"]["missing_bytes"] > 0
    assert any("fsdp2" in remedy["yaml"] for remedy in found["remedies"])
    for remedy in found["remedies"]:
        assert remedy["yaml"].replace("\n", "\n       ") in out


def test_guanaco_33b_on_24_gib_shows_its_margin_and_the_papers_words(
    say: Callable[..., tuple[int, str, str]],
) -> None:
    """Whether it needs paging follows from the adapters' type, which is shown."""
    verdicts = {}
    for dtype in ("bfloat16", "float32"):
        _, out, _ = say(
            "--config",
            EXPERIMENTS / "guanaco33b.yaml",
            "--gpu",
            "24GiB",
            "--model.lora.dtype",
            dtype,
        )
        assert f"weights in {dtype})" in out
        assert "needs paging on 24 GB" in out
        verdicts[dtype] = re.search(r"^24GiB: (.*)$", out, re.MULTILINE)[1]  # type: ignore[index]
    assert all(re.search(r"\d\.\d GiB", verdict) for verdict in verdicts.values())
    assert verdicts["float32"].startswith("fits with paging")


def test_guanaco_7b_reads_6_3_gb_before_overhead(plan: Plan) -> None:
    """The sum of its parts; the paper's figure 6 draws 6.9 GB."""
    found = plan("--config", EXPERIMENTS / "guanaco7b.yaml")
    assert found["before_overhead"] / GB == pytest.approx(6.3, abs=0.2)


def test_bloom_fits_on_a_t4_in_four_bits_and_not_in_sixteen(plan: Plan) -> None:
    words = ("--config", EXPERIMENTS / "bloom7b1_prompts.yaml", "--gpu", "T4")
    found = plan(*words)
    assert found["verdict"]["kind"] == "fits"
    assert found["verdict"]["compute_dtype"] == "float16"  # a T4 has no bfloat16
    found = plan(*words, "--model.quantization.quant_type", "none")
    assert found["verdict"]["kind"] == "does not fit"
    assert found["remedies"][0]["keys"]["model.quantization.quant_type"] == "nf4"


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_has_a_plan(path: Path, plan: Plan, request: Any) -> None:
    words: tuple[object, ...] = ("--config", path)
    if path.stem == "quickstart":  # its base exists only after `make quickstart`
        words += ("--model.model_name_or_path", "HuggingFaceTB/SmolLM2-135M-Instruct")
    found = plan(*words)
    assert found["total"] == sum(found["components"].values())
    assert {card["card"]["name"] for card in found["cards"]} >= {"T4", "A6000", "H200"}


# -- what a plan is of -----------------------------------------------------------------------------


def test_a_local_base_is_planned_at_the_longest_batch_of_its_rows(
    plan: Plan, tiny_base: Path, write_rows: Callable[..., Path]
) -> None:
    """Twenty rows of which one is long: the plan is of that one, padded to its batch."""
    rows = [{"prompt": "How many?", "response": "Few."} for _ in range(20)]
    rows[7]["response"] = "many " * 60
    words = (
        "--model.model_name_or_path",
        tiny_base,
        "--data.sources",
        write_rows(rows),
        "--data.max_length",
        250,
        "--data.batch_size",
        2,
    )
    found = plan(*words)
    assert 60 < found["setting"]["tokens_per_row"] < 250
    assert found["setting"]["batch_size"] == 2
    assert "training rows were read" in found["notes"][0]
    assert found["num_steps"] is not None


def test_what_shorter_rows_would_lose_is_counted_where_the_rows_were_read(
    plan: Plan, tiny_base: Path, write_rows: Callable[..., Path]
) -> None:
    """Rows are all as long, so that a limit of three quarters loses about a quarter of them.

    A smaller micro-batch would do, and leaves the result alone: it comes first, and shorter rows
    are listed all the same.
    """
    rows = [{"prompt": "How many?", "response": "many " * 220} for _ in range(12)]
    base, sources = ("--model.model_name_or_path", tiny_base), ("--data.sources", write_rows(rows))
    words = (*base, *sources, "--data.max_length", 256, "--data.batch_size", 8)
    total = plan(*words)["total"]
    gpu = ("--gpu", f"{(total - 1000) / 1e6:.6f}MB")
    found = plan(*words, *gpu)
    assert found["verdict"]["kind"] == "does not fit"
    assert "data.batch_size" in found["remedies"][0]["keys"]
    (remedy,) = [r for r in found["remedies"] if "data.max_length" in r["keys"]]
    longest = found["setting"]["tokens_per_row"]
    share = float(re.match(r"([\d.]+)% of the trained tokens are cut", remedy["cost"])[1])  # type: ignore[index]
    lost = 1 - remedy["keys"]["data.max_length"] / longest
    assert share / 100 == pytest.approx(lost, abs=0.06)  # batches are padded to multiples of 8
    # fit would not lose so much unasked, so what allows it is among the lines
    assert remedy["keys"]["data.max_lost_ratio"] > share / 100
    flags = [part for key, value in remedy["keys"].items() for part in (f"--{key}", value)]
    changed = plan(*words, *flags, *gpu)
    assert "training rows were read" in changed["notes"][0]
    assert changed["verdict"]["kind"] == "fits"


def test_rows_that_cannot_be_read_are_taken_as_long_as_they_may_be(
    plan: Plan, tiny_base: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "How many?"\n')
    for sources, reason in (
        (broken, "broken.jsonl"),
        ("tatsu-lab/alpaca", "'tatsu-lab/alpaca' is not on this machine"),
    ):
        found = plan(
            "--model.model_name_or_path",
            tiny_base,
            "--data.sources",
            sources,
            "--data.max_length",
            248,
        )
        assert found["setting"]["tokens_per_row"] == 248
        assert reason in found["notes"][0]
        assert "data.max_length (248)" in found["notes"][0]


def test_a_family_that_is_not_known_by_its_fields_is_built_without_weights(
    plan: Plan, saved: Callable[[str], Path], rows_file: Path
) -> None:
    """StableLM is no family of this project's arithmetic; transformers knows it."""
    from transformers import StableLmConfig

    folder = saved("LLaMA").parent / "stablelm"
    StableLmConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
    ).save_pretrained(folder)
    found = plan("--model.model_name_or_path", folder, "--data.sources", rows_file)
    # embedding and head, 4 x 64 x 64 and 3 x 64 x 128 a layer, and norms with biases
    assert found["num_weights"] == 2 * 512 * 64 + 2 * (4 * 64**2 + 3 * 64 * 128) + 5 * 2 * 64


def test_more_gpus_share_a_step_and_where_it_does_not_fit_the_base(plan: Plan) -> None:
    """As ``strategy: auto`` chooses when training starts, which leaves 8 % of the memory free."""
    words = ("--config", EXPERIMENTS / "guanaco65b.yaml", "--gpus", 2, "--gpu")
    whole, shared, waiting = plan(*words, "80GiB"), plan(*words, "48GiB"), plan(*words, "24GiB")
    assert whole["setting"]["strategy"] == "ddp"
    assert shared["setting"]["strategy"] == "fsdp2"
    assert waiting["setting"]["strategy"] == "fsdp2_offload"
    assert shared["total"] < 0.65 * whole["total"]
    assert waiting["host"]["packed_weights"] == shared["components"]["packed_weights"]
    assert whole["setting"]["num_micro_batches"] == 8  # 16 rows on two devices


OF_7B = (
    *("--model.model_name_or_path", "huggyllama/llama-7b", "--data.sources", "tatsu-lab/alpaca"),
    *("--data.max_length", "528", "--data.global_batch_size", "16", "--model.lora.r", "64"),
)
AUTO = ("--data.batch_size", "auto", "--model.gradient_checkpointing", "auto")


def test_auto_comes_to_the_first_choice_that_leaves_a_card_its_eight_per_cent(plan: Plan) -> None:
    """A step has 16 rows: the divisors, without recomputing before with it."""
    words = (*OF_7B, "--gpu", "24GiB")
    chosen = plan(*words, *AUTO)
    size, recomputes = (chosen["setting"][k] for k in ("batch_size", "gradient_checkpointing"))
    assert chosen["setting"]["num_micro_batches"] * size == 16
    assert f"{size} rows without recomputing" in chosen["notes"][1]
    usable = 0.92 * 24 * 2**30
    assert chosen["total"] <= usable
    assert not recomputes
    flags = ("--model.gradient_checkpointing", "false", "--data.batch_size")
    assert plan(*words, *flags, size)["total"] == chosen["total"]
    assert plan(*words, *flags, 2 * size)["total"] > usable


def test_auto_without_a_card_is_planned_at_its_least(plan: Plan) -> None:
    found = plan(*OF_7B, *AUTO)
    setting = found["setting"]
    assert (setting["batch_size"], setting["num_micro_batches"]) == (1, 16)
    assert setting["gradient_checkpointing"]
    assert "auto is planned at its least, 1 row with recomputing" in found["notes"][1]


def test_auto_of_rows_that_were_read_takes_the_longest_of_them(
    plan: Plan, tiny_base: Path, rows_file: Path
) -> None:
    words = ("--model.model_name_or_path", tiny_base, "--data.sources", rows_file)
    found = plan(*words, "--data.batch_size", "auto", "--gpu", "24GiB")
    setting = found["setting"]
    assert setting["batch_size"] == 16  # all of a step, on so much memory
    assert 0 < setting["trained_tokens"] < 16 * setting["tokens_per_row"]
    assert found["cards"] == [] or found["num_steps"] is not None


def test_less_than_other_methods_is_said_with_the_papers_claim_beside_it(
    say: Callable[..., tuple[int, str, str]], plan: Plan
) -> None:
    """At least nine tenths of full fine-tuning, and of 16-bit LoRA what the formula gives."""
    for name, share in (("guanaco7b", 0.60), ("guanaco33b", 0.66), ("guanaco65b", 0.68)):
        words = ("--config", EXPERIMENTS / f"{name}.yaml", "--model.lora.dtype", "bfloat16")
        lora, full = plan(*words)["alternatives"]
        assert (lora["name"], full["name"]) == ("16-bit LoRA", "full fine-tuning")
        assert lora["reduction"] == pytest.approx(share, abs=0.02)
        assert full["reduction"] >= 0.9
    _, out, _ = say(*words)
    assert "more than 65 % less than 16-bit fine-tuning" in " ".join(out.split())


def test_a_known_model_is_planned_from_flags_alone(plan: Plan) -> None:
    words = ("--shape", "llama-65b", "--adapter-dtype", "bfloat16", "--length", 528)
    by_flags = plan(*words, "--dropout", 0.05, "--global-batch-size", 16, "--gpu", "48GiB")
    by_file = plan("--config", EXPERIMENTS / "guanaco65b.yaml", "--gpu", "48GiB")
    assert by_flags["components"] == by_file["components"]


def test_shape_imports_neither_torch_nor_the_parser_of_runs() -> None:
    code = (
        "import sys; from qlora_pl.__main__ import main; "
        "sys.argv = ['qlora-pl', 'plan', '--shape', 'llama2-70b', '--gpu', 'a100']; "
        "assert main() == 0; "
        "slow = {'torch', 'numpy', 'transformers', 'lightning', 'jsonargparse', 'matplotlib', "
        "'huggingface_hub'}; print(sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_card_at_another_price_costs_so_much(plan: Plan) -> None:
    words = ("--config", EXPERIMENTS / "guanaco65b.yaml", "--gpu", "a6000")
    usual, other = plan(*words), plan(*words, "--price-per-hour", 2.0)
    hours = other["cards"][0]["time"]["hours"]
    assert other["cards"][0]["time"]["price"] == pytest.approx(2 * hours)
    assert usual["cards"][0]["time"]["hours"] == hours


# -- pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_plan_is_drawn(
    say: Callable[..., tuple[int, str, str]], tmp_path: Path, ending: str
) -> None:
    file = tmp_path / f"plan.{ending}"
    code, _, err = say("--shape", "llama2-7b", "--gpu", "rtx3090", "--plot", file)
    assert code == 0, err
    assert file.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    if ending == "svg":
        assert "activations" in file.read_text()


def test_figure_6_is_drawn_and_its_numbers_are_told(
    say: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, err = say("--figure6", tmp_path / "figure6.png")
    assert code == 0, err
    assert (tmp_path / "figure6.png").stat().st_size > 10_000
    assert [line.split()[1] for line in out.splitlines()[1:5]] == ["7B", "13B", "33B", "65B"]
    assert "more than 65 %" in out


# -- mistakes --------------------------------------------------------------------------------------

PAPER = ("--config", "experiments/guanaco65b.yaml")
SHAPE = ("--shape", "llama2-7b")
MISTAKES = [
    ((*SHAPE, "--gpu", "a6001"), "did you mean 'A6000'?"),
    ((*SHAPE, "--gpu", "0"), "'0' is no memory"),
    ((*SHAPE, "--gpu", "-3GiB"), "'-3GiB' is no memory"),
    ((*SHAPE, "--gpu", "abc"), "no card is called 'abc'"),
    ((*SHAPE, "--gpus", "0"), "--gpus: must lie in 1 to 131,072, got 0."),
    ((*SHAPE, "--gpus", "-2"), "--gpus: must lie in 1 to 131,072, got -2."),
    ((*SHAPE, "--gpu", "5000GiB"), "more than a card can have"),
    ((*SHAPE, "--gpu", "24"), "write 24GiB"),
    ((*SHAPE, "--gpus", "two"), "--gpus: invalid int value: 'two'."),
    ((*SHAPE, "--gpus", "3", "--global-batch-size", "16"), "cannot be shared out evenly on 3"),
    ((*SHAPE, "--length", "0"), "--length: must lie in 1 to 16,777,216, got 0."),
    ((*SHAPE, "--r", "-8"), "--r: must lie in 1 to 65,536, got -8."),
    ((*SHAPE, "--batch-size", "1000000000"), "--batch-size: must lie in 1 to 1,048,576"),
    ((*SHAPE, "--gpus", "1000000"), "must lie in 1 to 131,072, got 1,000,000."),
    ((*SHAPE, "--dropout", "1"), "--dropout: must lie in 0 to 1"),
    ((*SHAPE, "--quant-type", "nf5"), "invalid choice: 'nf5'"),
    ((*SHAPE, "--method", "none"), "add --quant-type none"),
    ((*SHAPE, "--target-modules", "q_prok"), "did you mean 'q_proj'?"),
    ((*SHAPE, "--lenght", "5"), "did you mean '--length'?"),
    ((*SHAPE, "--price-per-hour", "2"), "name the card with --gpu"),
    ((*SHAPE, "--plot", "plan.txt"), "must end in one of .png"),
    ((*SHAPE, "--plot", "nowhere/plan.png"), "no folder 'nowhere'"),
    ((*SHAPE, *PAPER), "--shape and --config are two ways"),
    (("--shape", "llama2-8b"), "nearest are"),
    (("--shape", "zzz"), "there are llama-7b"),
    ((*PAPER, "--gpu", "RTX 3080"), "did you mean 'RTX3090'?"),
    ((*PAPER, "--data.batch_size", "0"), "batch_size"),
    ((*PAPER, "--model.lora.rank", "8"), "model.lora"),
    (("--shape",), "expected one argument"),
    (("--gpu", "24GiB"), "name a training file with --config"),
    ((*PAPER, "--gpus", "3"), "cannot be shared out evenly on 3"),
    ((*PAPER, "--gpsu", "3"), "did you mean '--gpu'?"),
    ((*PAPER, "--data.max_lenght", "3"), "did you mean 'max_length'?"),
    (("--config", "experiments/guanaco66b.yaml"), "no file 'experiments/guanaco66b.yaml'"),
    ((*PAPER, "--model.model_name_or_path", "someone/unheard-of"), "is neither a folder here"),
]


@pytest.mark.parametrize(
    ("words", "part"),
    MISTAKES,
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    words: tuple[str, ...], part: str, say: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = say(*words)
    assert (code, out) == (2, "")
    assert part in err
    assert len(err.strip().splitlines()) == 1


LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({}, "has no 'model_type'"),
        ({"model_type": "llama"}, "has no 'hidden_size'"),
        ({"model_type": "llama", "hidden_size": 64}, "has no 'num_hidden_layers'"),
        ("[1, 2]", "holds list"),
        ("{", "cannot be read as JSON"),
        ({"model_type": "nonesuch"}, "nonesuch"),
        (LLAMA | {"hidden_size": 0}, "'hidden_size' must be a whole number above 0, got 0"),
        (LLAMA | {"num_hidden_layers": -2}, "must be a whole number above 0, got -2"),
        (LLAMA | {"vocab_size": "512"}, "must be a whole number above 0, got '512'"),
        (LLAMA | {"hidden_size": 64.5}, "must be a whole number above 0, got 64.5"),
        (LLAMA | {"num_key_value_heads": 3}, "4 attention heads cannot share 3 key and value"),
        (LLAMA | {"num_attention_heads": 3}, "'hidden_size' 64 cannot be cut into 3 heads"),
    ],
)
def test_a_config_without_its_fields_is_refused(
    fields: object,
    part: str,
    say: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    rows_file: Path,
) -> None:
    text = fields if isinstance(fields, str) else json.dumps(fields)
    (tmp_path / "config.json").write_text(text)
    code, out, err = say("--model.model_name_or_path", tmp_path, "--data.sources", rows_file)
    assert (code, out) == (2, "")
    assert part in err
    assert len(err.strip().splitlines()) == 1


def test_without_matplotlib_the_picture_is_refused_with_the_command_that_helps(
    say: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as Python has it where it is missing
    code, out, err = say(*SHAPE, "--plot", tmp_path / "plan.png")
    assert (code, out) == (2, "")
    assert 'pip install --constraint constraints.txt --editable ".[plot]"' in err
