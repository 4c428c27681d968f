"""Drivers, devices and products: what is right here, and what a broken one is called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from broken_world import NVIDIA_SMI, look, look_at, plant_program

from qlora_pl.doctor.arithmetic import four_bits, gradients, openmp, products
from qlora_pl.doctor.arithmetic.products import BOUNDS, plain_product, tried
from qlora_pl.doctor.devices import driver, segments
from qlora_pl.doctor.devices import torch_devices as devices
from qlora_pl.doctor.finding import Finding, Status

CPU = torch.device("cpu")


def findings(trial: Any) -> list[Finding]:
    return [finding for finding in trial if isinstance(finding, Finding)]


def test_two_gpus_are_counted_by_their_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_program(tmp_path, monkeypatch, "nvidia-smi", NVIDIA_SMI.replace("DRIVER", "550.54.15"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    finding = look_at("driver")
    assert finding.status is Status.OK
    assert finding.found == (
        "550.54.15, runs CUDA up to 12.4; 2 x NVIDIA L4, 23034 MiB, capability 8.9"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert look("driver")["driver"][1].status is Status.WARNING


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (
            "echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'"
            "; exit 9",
            "could not communicate",
        ),
        ("sleep 60", "does not answer within 1 s"),
        ("echo 'No devices were found'", "No devices were found"),
        ("exit 0", "it names no GPU"),
    ],
    ids=["failing", "hanging", "none found", "silent"],
)
def test_a_driver_that_does_not_answer_is_broken(
    script: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_program(tmp_path, monkeypatch, "nvidia-smi", script)
    monkeypatch.setattr(driver, "SECONDS", 1)
    finding = look_at("driver")
    assert finding.status is Status.BROKEN
    assert says in finding.found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that torch can use")
def test_a_gpu_that_torch_cannot_use_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_program(tmp_path, monkeypatch, "nvidia-smi", NVIDIA_SMI.replace("DRIVER", "550.54.15"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    finding, others = findings(devices.devices())
    assert finding.status is Status.BROKEN
    assert others.title == "other devices"
    assert "NVIDIA L4" in finding.found or torch.version.cuda is not None


def test_a_driver_too_old_for_torchs_cuda_says_from_which_on() -> None:
    """Versions of NVIDIA's table of minor version compatibility."""
    assert "from 580 on" in devices.too_old("535.104.05", "13.0")
    assert "from 525 on" in devices.too_old("470.82.01", "12.8")
    assert devices.too_old("550.54.15", "12.8") == ""
    assert devices.too_old("550.54.15", "99.1") == ""  # of which nothing is known


@pytest.mark.parametrize(
    ("capability", "has", "lacks"),
    [
        ((9, 0), "bfloat16, int8 and 4 bits", "needs"),
        ((7, 5), "bfloat16 needs 8.0", "int8 7.5"),
        ((7, 0), "int8 7.5", "x"),
        ((5, 2), "nothing", "x"),
    ],
)
def test_a_generation_of_gpus_says_what_it_lacks(
    capability: tuple[int, int], has: str, lacks: str
) -> None:
    said = devices.generation(capability)
    assert has in said
    assert lacks not in said or lacks == "x"


def test_devices_that_no_test_has_seen_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins of torch's own questions, because none of these devices is here."""
    has, has_not = (
        SimpleNamespace(is_available=lambda: True),
        SimpleNamespace(is_available=lambda: False),
    )

    def library(hip: str | None = None, xpu: Any = has_not, mps: Any = has_not) -> Any:
        version = SimpleNamespace(hip=hip)
        return SimpleNamespace(version=version, xpu=xpu, backends=SimpleNamespace(mps=mps))

    def said(library: Any, system: str = "Linux") -> list[str]:
        found = list(devices.untested_devices(library, system))
        assert all("never tested here" in finding.meaning for finding in found)
        assert all(finding.status is Status.WARNING for finding in found)
        return [finding.title for finding in found]

    assert said(library()) == []
    assert said(torch) == []
    assert said(library(hip="6.4")) == ["ROCm"]
    assert said(library(xpu=has)) == ["XPU"]
    assert said(library(mps=has), "Darwin") == ["MPS"]
    (tmp_path / "torch_npu.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert said(library()) == ["NPU"]


def test_devices_that_were_never_tested_are_said_where_there_are_none_too() -> None:
    others = next(f for f in findings(devices.devices()) if f.title == "other devices")
    assert others.status is Status.NOTE
    assert all(kind in others.meaning for kind in ("ROCm", "XPU", "MPS", "never tested"))


GROWS, FIXED = "expandable_segments:True", "max_split_size_mb:128"


@pytest.mark.parametrize(
    ("grow", "variables", "status", "fix"),
    [
        (True, {"PYTORCH_ALLOC_CONF": GROWS}, Status.OK, ""),
        (None, {"PYTORCH_ALLOC_CONF": GROWS}, Status.OK, ""),  # a torch that does not say
        (False, {"PYTORCH_ALLOC_CONF": GROWS}, Status.WARNING, ""),  # the driver cannot
        (False, {"PYTORCH_CUDA_ALLOC_CONF": FIXED}, Status.NOTE, "unset PYTORCH_CUDA_ALLOC_CONF"),
        (False, {}, Status.NOTE, f"export PYTORCH_ALLOC_CONF={GROWS}"),
    ],
    ids=["grow", "unknown", "cannot", "set otherwise", "nothing set"],
)
def test_segments_that_do_not_grow_are_said_with_the_variable(
    grow: bool | None, variables: dict[str, str], status: Status, fix: str
) -> None:
    finding = segments.of_segments(grow, variables, "PYTORCH_ALLOC_CONF")
    assert (finding.status, finding.fix) == (status, fix)
    assert all(name in finding.found for name in variables)


def test_a_variable_that_this_torch_ignores_is_a_warning() -> None:
    """Torch 2.9 takes no notice of the newer name."""
    variables = {"PYTORCH_ALLOC_CONF": GROWS}
    finding = segments.of_segments(False, variables, "PYTORCH_CUDA_ALLOC_CONF")
    assert finding.status is Status.WARNING
    assert finding.fix == f"export PYTORCH_CUDA_ALLOC_CONF={GROWS}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that torch can use")
def test_without_a_gpu_the_allocator_is_not_asked() -> None:
    [finding] = findings(segments.allocator())
    assert finding.status is Status.NOTE


def test_products_are_right_here_in_every_type() -> None:
    trials = (
        products.float32,
        products.bfloat16,
        products.float16,
        four_bits.nf4,
        four_bits.fp4,
        four_bits.int8,
    )
    for trial in trials:
        for finding in findings(trial()):
            assert finding.status is Status.OK, finding


def test_a_product_in_a_coarser_type_than_it_says_does_not_pass() -> None:
    """bfloat16 where float32 is asked for, which is what TF32 and its kin do in silence."""
    forward, backward = plain_product(torch.bfloat16)(CPU)
    assert min(forward, backward) > BOUNDS[torch.float32]
    assert min(forward, backward) > BOUNDS[torch.float16] / 2
    assert max(forward, backward) < BOUNDS[torch.bfloat16]
    forward, backward = plain_product(torch.float16)(CPU)
    assert min(forward, backward) > BOUNDS[torch.float32]


@pytest.mark.parametrize(
    ("errors", "says"),
    [((0.5, 0.0), "off by 0.5"), ((0.0, 0.5), "off by 0.5"), ((0.0, float("nan")), "off by")],
    ids=["output", "gradient", "not a number"],
)
def test_a_wrong_product_is_broken_where_runs_need_it(
    errors: tuple[float, float], says: str
) -> None:
    [_, vital] = tried("T", lambda _: errors, 0.1, True, "no run", "mend")
    [_, other] = tried("T", lambda _: errors, 0.1, False, "no run", "mend")
    assert isinstance(vital, Finding)
    assert isinstance(other, Finding)
    assert (vital.status, other.status) == (Status.BROKEN, Status.WARNING)
    assert says in vital.found
    assert vital.fix == "mend"


def test_a_product_that_raises_is_a_line() -> None:
    def product(_: torch.device) -> tuple[float, float]:
        raise RuntimeError("no kernel image is available\nfor execution")

    [_, finding] = tried("T", product, 0.1, True, "no run", "mend")
    assert isinstance(finding, Finding)
    assert finding.found == "cpu: RuntimeError: no kernel image is available"


def test_weights_of_another_code_do_not_pass_for_nf4(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that decodes by FP4's table where NF4's is meant."""
    layer = four_bits.four_bit_layer
    monkeypatch.setattr(four_bits, "four_bit_layer", lambda _, *rest: layer("fp4", *rest))
    [finding] = findings(four_bits.nf4())
    assert finding.status is Status.BROKEN
    assert "off by" in finding.found


repacks = pytest.mark.skipif(
    not gradients.has_avx512bf16(), reason="bitsandbytes repacks nothing on this processor"
)


def test_gradients_are_there_after_an_evaluation() -> None:
    for finding in findings(gradients.gradients_after_evaluation()):
        assert finding.status is Status.OK, finding


@repacks
def test_without_the_guard_gradients_are_gone_and_that_is_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradients, "keep_gradients_on_cpu", lambda _: None)
    [finding] = findings(gradients.gradients_after_evaluation())
    assert finding.status is Status.BROKEN
    assert "gone" in finding.found


@pytest.mark.slow
def test_two_openmp_runtimes_are_found_where_both_are_loaded() -> None:
    """Told by the linker's list of a fresh process that has used torch and bitsandbytes."""
    code = (
        "import json, torch, bitsandbytes, qlora_pl.doctor.arithmetic.openmp as m\n"
        "print(json.dumps([str(p) for p in m.runtimes()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "LD_DEBUG": "files"},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {
        Path(line.split("file=")[1].split(" ")[0]).name
        for line in done.stderr.splitlines()
        if "generating link map" in line and "omp" in line.split("file=")[1]
    }
    listed = {Path(path).name for path in json.loads(done.stdout.splitlines()[-1])}
    assert {name.split(".so")[0] for name in listed} == {name.split(".so")[0] for name in loaded}
    assert listed


def test_runtimes_that_spin_and_threads_without_cores_are_warnings() -> None:
    two = [Path("/a/libgomp.so.1"), Path("/b/libgomp.so.1")]
    assert openmp.of_runtimes(two, "passive").status is Status.OK
    assert openmp.of_runtimes(two, "active").status is Status.WARNING
    assert openmp.of_runtimes(two[:1], "active").status is Status.OK
    assert openmp.of_threads(2, 2.0).status is Status.OK
    slow = openmp.of_threads(64, 4.0)
    assert (slow.status, slow.fix) == (Status.WARNING, "export OMP_NUM_THREADS=4")
    idle = openmp.of_threads(1, 8.0)
    assert (idle.status, idle.fix) == (Status.NOTE, "unset OMP_NUM_THREADS")


@pytest.mark.slow
def test_variables_of_openmp_reach_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = look("torch", "devices", "bitsandbytes", "openmp")["openmp"]
    threads = next(finding for finding in found if finding.title == "threads")
    assert threads.found.startswith("1 for ")
    runtimes = next(finding for finding in found if finding.title == "OpenMP")
    assert runtimes.status is (Status.WARNING if "runtimes" in runtimes.found else Status.OK)
