"""Processes that torchrun, srun or Kubernetes started agree on a run, or all leave it at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launched import (
    TORCHRUN,
    adapter,
    adapter_bytes,
    fit,
    fit_module,
    free_port,
    largest_difference,
    largest_move,
    start,
    start_pods,
    wait_for,
    write_config,
)
from lightning.fabric.plugins.environments import (
    KubeflowEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from qlora_pl.errors import ConfigurationError, HardwareError, QLoRAError
from qlora_pl.training.processes import ranks as ranks_module
from qlora_pl.training.processes.launching import Launch, number_of_devices, tasks_per_node
from qlora_pl.training.processes.ranks import Ranks
from qlora_pl.training.watching.step_layout import layout_line

TORCHRUN_VARIABLES = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}
SRUN_VARIABLES = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "train",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
POD_VARIABLES = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


def trainer_settings(**changes: Any) -> Any:
    settings = {"devices": "auto", "num_nodes": 1, "accelerator": "cpu", "plugins": None}
    return SimpleNamespace(**settings | changes)


# -- who started this process ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "launcher", "rank", "processes", "local", "nodes", "environment"),
    [
        (TORCHRUN_VARIABLES, "torchrun", 3, 4, 2, 2, TorchElasticEnvironment),
        (TORCHRUN_VARIABLES | SRUN_VARIABLES, "torchrun", 3, 4, 2, 2, TorchElasticEnvironment),
        (SRUN_VARIABLES, "srun", 3, 4, 2, 2, SLURMEnvironment),
        (POD_VARIABLES, "RANK and WORLD_SIZE", 1, 2, 1, 2, KubeflowEnvironment),
        (
            POD_VARIABLES | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            "RANK and WORLD_SIZE",
            1,
            2,
            2,
            1,
            TorchElasticEnvironment,
        ),
        ({}, None, 0, 1, 1, 1, LightningEnvironment),
        # a PyTorchJob of one pod; a shell that srun --pty opened; a batch script of one task
        (POD_VARIABLES | {"WORLD_SIZE": "1", "RANK": "0"}, None, 0, 1, 1, 1, LightningEnvironment),
        (SRUN_VARIABLES | {"SLURM_JOB_NAME": "bash"}, None, 0, 1, 1, 1, LightningEnvironment),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, None, 0, 1, 1, 1, LightningEnvironment),
    ],
)
def test_the_place_of_a_process_is_read_from_what_its_launcher_sets(
    variables: dict[str, str],
    launcher: str | None,
    rank: int,
    processes: int,
    local: int,
    nodes: int,
    environment: type,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Variables as printed by torchrun 2.13, SLURM 22.05 and a PyTorchJob's pods."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "")  # put back afterwards
    launch = Launch.detect(variables)
    assert (launch.launcher, launch.rank, launch.num_processes) == (launcher, rank, processes)
    assert (launch.num_local, launch.num_nodes) == (local, nodes)
    assert launch.is_first == (rank == 0)
    found = launch.environment()
    assert type(found) is environment
    if launcher is not None:
        assert (found.global_rank(), found.world_size()) == (rank, processes)
        assert found.local_rank() == (0 if environment is KubeflowEnvironment else 1)


@pytest.mark.parametrize("around", [{}, {"RANK": "0"}, {"SLURM_STEP_ID": "0"}])
def test_a_process_that_lightning_started_is_nobodys_first(around: dict[str, str]) -> None:
    """Lightning hands on the environment, a pod's RANK and a step's number included."""
    child = {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0", "QLORA_PL_RUN_FOLDER": "a"}
    launch = Launch.detect(child | around)
    assert launch.is_child
    assert not launch.is_first
    assert launch.launcher is None


def test_requeueing_is_never_lightnings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN_VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "")
    environment = Launch.detect(SRUN_VARIABLES).environment()
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue


def test_slurms_counts_are_read_as_slurm_writes_them() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4]


def test_devices_are_counted_as_lightning_counts_them() -> None:
    meant = {"auto": None, -1: None, "-1": None, 2: 2, "2": 2, "0,3": 2, "1,": 1, (4, 5, 6): 3}
    assert {devices: number_of_devices(devices) for devices in meant} == meant


# -- numbers that contradict each other ------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "changes", "sentence"),
    [
        (
            TORCHRUN_VARIABLES,
            {"devices": 4},
            "trainer.devices: 4, but torchrun started 2 processes on this node; set it to auto, or "
            "start 4 there (--nproc-per-node).",
        ),
        (
            TORCHRUN_VARIABLES
            | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            | {"GROUP_WORLD_SIZE": "1"},
            {"devices": 2},
            "trainer.devices: 2, but torchrun started 1 process on this node; set it to auto, or "
            "start 2 there (--nproc-per-node).",
        ),
        (
            SRUN_VARIABLES,
            {"devices": 1},
            "trainer.devices: 1, but srun started 2 processes on this node; set it to auto, or "
            "start 1 there (--ntasks-per-node).",
        ),
        (
            SRUN_VARIABLES,
            {"num_nodes": 3},
            "trainer.num_nodes: 3, but srun started 4 processes on 2 nodes; leave it out, or start "
            "on as many (--nodes).",
        ),
        (
            SRUN_VARIABLES | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1"},
            {},
            "3 processes do not spread evenly over 2 nodes, one of which has 2; start as many on "
            "each (--ntasks-per-node).",
        ),
        (
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"},
            {},
            "The SLURM job has 2 tasks, but this command was started once; write srun in front of "
            "it.",
        ),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "a"},
            {},
            "WORLD_SIZE is 2, but RANK, MASTER_PORT are not set; start the processes with torchrun "
            "or srun, or unset WORLD_SIZE to start this one alone.",
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "2"},
            {},
            "OMPI_COMM_WORLD_SIZE says that mpirun started 2 processes, each of which would train "
            "alone; start them with torchrun or srun.",
        ),
        (
            {},
            {"num_nodes": 2},
            "trainer.num_nodes: 2, but this process was started alone; start one for every GPU of "
            "every node, with torchrun or srun.",
        ),
    ],
)
def test_a_wrong_number_is_one_sentence(
    variables: dict[str, str], changes: dict[str, Any], sentence: str
) -> None:
    assert list(Launch.detect(variables).problems(trainer_settings(**changes))) == [sentence]


@pytest.mark.parametrize("variables", [TORCHRUN_VARIABLES, SRUN_VARIABLES, POD_VARIABLES, {}])
def test_auto_is_what_was_started(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU Lightning's auto is one device, whatever torchrun started."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "")
    launch = Launch.detect(variables)
    assert list(launch.problems(trainer_settings())) == []
    chosen = launch.trainer_settings(trainer_settings())
    if variables:
        assert (chosen["devices"], chosen["num_nodes"]) == (launch.num_local, 2)
    else:
        assert chosen.keys() == {"plugins"}


def test_another_environment_among_the_plugins_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="KubeflowEnvironment is not needed"):
        Launch().trainer_settings(trainer_settings(plugins=[KubeflowEnvironment()]))


# -- agreement, over a real store ------------------------------------------------------------------


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Has ranks do something at the same time, in threads; returns what each came to."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "")  # put back afterwards
    monkeypatch.setattr(ranks_module, "LEAVING_SECONDS", 5.0)
    stores = []  # a server lives as long as its store

    def meet(*do: Callable[[Ranks], Any]) -> list[Any]:
        came_to: list[Any] = [None] * len(do)

        def act(rank: int) -> None:
            launch = Launch(launcher="RANK and WORLD_SIZE", rank=rank, num_processes=len(do))
            own = Ranks(launch)
            stores.append(own)
            try:
                came_to[rank] = do[rank](own)
            except BaseException as error:
                came_to[rank] = error

        threads = [threading.Thread(target=act, args=(rank,)) for rank in range(len(do))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        return came_to

    return meet


def agreeing(
    value: Any = None, given: dict[str, str] | None = None, look: str | None = None
) -> Callable[[Ranks], Any]:
    """Takes part with its own value, which counts on rank 0 only."""

    def decide() -> Any:
        if isinstance(value, BaseException):
            raise value
        return value

    return lambda ranks: ranks.agree(given or {}, decide, lambda _: look)


def leaving(error: QLoRAError) -> Callable[[Ranks], Any]:
    return lambda ranks: ranks.leave(error)


def test_every_rank_has_what_rank_0_decided(meeting: Callable[..., list[Any]]) -> None:
    assert meeting(agreeing({"a": 0}), agreeing({"a": 1}), agreeing({"a": 2})) == [{"a": 0}] * 3


def test_every_rank_has_the_least_of_what_all_say(meeting: Callable[..., list[Any]]) -> None:
    def saying(number: float) -> Callable[[Ranks], Any]:
        def act(ranks: Ranks) -> float:
            ranks.agree({}, dict, lambda _: None)
            return ranks.least("bytes", number)

        return act

    assert meeting(saying(85e9), saying(25.4e9), saying(51e9)) == [25.4e9] * 3
    assert Ranks(Launch()).least("bytes", 85e9) == 85e9


def test_an_error_of_rank_0_ends_the_others_without_a_word(
    meeting: Callable[..., list[Any]],
) -> None:
    error = ConfigurationError("no.")
    first, *others = meeting(agreeing(error), agreeing(), agreeing())
    assert first is error
    assert [type(other) for other in others] == [SystemExit] * 2
    assert [other.code for other in others] == [2, 2]


def test_a_run_that_is_complete_ends_all_with_0(meeting: Callable[..., list[Any]]) -> None:
    ends = meeting(agreeing(SystemExit(0)), agreeing())
    assert [end.code for end in ends] == [0, 0]


def test_an_error_before_anything_was_decided_is_said_by_rank_0_alone(
    meeting: Callable[..., list[Any]],
) -> None:
    error = ConfigurationError("no key 'rr'.")
    first, second = meeting(leaving(error), leaving(ConfigurationError("no key 'rr'.")))
    assert first is error
    assert isinstance(second, SystemExit)
    assert second.code == 2


def test_an_error_of_another_node_is_said_by_rank_0(meeting: Callable[..., list[Any]]) -> None:
    first, second = meeting(agreeing({}), leaving(ConfigurationError("rows.jsonl is missing.")))
    assert isinstance(first, ConfigurationError)
    assert str(first).startswith("Rank 1 on ")
    assert str(first).endswith("rows.jsonl is missing.")
    assert isinstance(second, SystemExit)
    assert second.code == 2


def test_ranks_that_were_given_different_runs_do_not_start(
    meeting: Callable[..., list[Any]],
) -> None:
    first, second = meeting(
        agreeing({}, {"model.lora.r": "8", "data.seed": "1"}),
        agreeing({}, {"model.lora.r": "4", "data.seed": "1"}),
    )
    assert "another run than rank 0, which differs in model.lora.r; give" in str(first)
    assert second.code == 2


def test_a_folder_that_a_node_does_not_see_is_refused(meeting: Callable[..., list[Any]]) -> None:
    first, second = meeting(agreeing({}), agreeing(look="'/runs/a' is not there."))
    assert isinstance(first, ConfigurationError)
    assert "'/runs/a' is not there." in str(first)
    assert second.code == 2


def test_values_of_the_configuration_do_not_travel() -> None:
    """A token in the configuration must not cross the network in the clear."""
    assert "hf_secret" not in str(ranks_module.digests({"token": "hf_secret"}))


def test_what_all_find_after_the_start_is_said_once(
    meeting: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_module, "LATE_SECONDS", 2.0)

    def late(error: QLoRAError) -> Callable[[Ranks], Any]:
        def act(ranks: Ranks) -> Any:
            ranks.agree({}, dict, lambda _: None)
            return ranks.leave(error)

        return act

    same = ConfigurationError("no rows.")
    first, second, third = meeting(
        late(same), late(ConfigurationError("no rows.")), late(ConfigurationError("no GPU."))
    )
    assert first is same
    assert isinstance(second, SystemExit)
    assert second.code == 2
    assert str(third).startswith("Rank 2 on ")
    assert str(third).endswith(": no GPU.")
    assert third.exit_code == 2


def test_a_rank_that_never_comes_is_named(
    meeting: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_module, "MEETING_SECONDS", 0.5)
    first, _, third = meeting(agreeing({}), lambda _: None, agreeing({}))
    assert isinstance(first, HardwareError)
    assert str(first).startswith("Rank 1 of 3 did not come")
    assert isinstance(third, BaseException)


def test_a_second_start_over_the_same_store_meets_its_own_processes(
    meeting: Callable[..., list[Any]],
) -> None:
    """Torchrun keeps its store over a restart, with every key of the processes that died."""
    assert meeting(agreeing({"a": 1}), agreeing())[1] == {"a": 1}
    assert meeting(agreeing({"a": 2}), agreeing())[1] == {"a": 2}
    assert meeting(agreeing(ConfigurationError("no.")), agreeing())[1].code == 2


# -- what a step is made of ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {},
            "2 processes on 1 node (ddp, cpu): an optimizer step is 24 rows = 4 rows x 3 "
            "micro-batches x 2 processes, about 240 tokens without padding",
        ),
        (
            {"is_packed": True, "batch_size": 1},
            "2 processes on 1 node (ddp, cpu): an optimizer step is 6 packs = 1 pack x 3 "
            "micro-batches x 2 processes, at most 384 tokens",
        ),
        (
            {"tokens_per_batch": 1000},
            "2 processes on 1 node (ddp, cpu): an optimizer step is 3 micro-batches x 2 processes, "
            "at most 6,000 tokens with padding",
        ),
    ],
)
def test_the_line_at_the_start_gives_the_step_as_a_product(
    changes: dict[str, Any], line: str
) -> None:
    """24 = 4 x 3 x 2, 10 tokens a row; by hand."""
    rows = SimpleNamespace(lengths=SimpleNamespace(mean=lambda: 10.0))
    data = {
        "batch_size": 4,
        "tokens_per_batch": None,
        "is_packed": False,
        "max_length": 64,
        "splits": {"train": SimpleNamespace(rows=rows)},
    }
    trainer = SimpleNamespace(
        world_size=2,
        num_nodes=1,
        accumulate_grad_batches=3,
        strategy=SimpleNamespace(root_device=SimpleNamespace(type="cpu")),
        datamodule=SimpleNamespace(**data | changes),
    )
    assert layout_line(trainer) == line


# -- whole runs ------------------------------------------------------------------------------------

KILL_ONCE = """
import os, signal, sys
from qlora_pl.__main__ import main
from qlora_pl.training.checkpoints.checkpoint import AdapterCheckpoint

go_on = AdapterCheckpoint.on_train_batch_start

def die(self, trainer, *rest):
    go_on(self, trainer, *rest)
    is_first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if is_first_start and trainer.global_rank == 1 and trainer.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

AdapterCheckpoint.on_train_batch_start = die
sys.exit(main())
"""


@pytest.mark.slow
def test_two_torchrun_agents_train_like_one_process(
    tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    """The same global batch; two agents on this machine stand for two nodes.

    1e-6 of what the adapters moved by, in float32: sums in another order. Lightning's own two
    processes add the same two numbers, and end in the same bytes.
    """
    config = write_config(tmp_path, tiny_base, rows_file)
    name = ["--run.name"]
    alone = ["--trainer.accumulate_grad_batches", "4"]
    (one,) = wait_for(start(fit(config, *name, "one", *alone)))
    assert one.code == 0, one.err
    (own,) = wait_for(start(fit(config, *name, "own", "--trainer.devices", "2")))
    assert own.code == 0, own.err
    assert own.out.count("fit: ") == 1
    rendezvous = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    rendezvous += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "two"]
    command = [*TORCHRUN, *rendezvous, "--node-rank"]
    words = fit_module(config, *name, "agents")
    agents = wait_for(*[start([*command, str(rank), *words]) for rank in range(2)])
    assert [agent.code for agent in agents] == [0, 0], agents
    said = "".join(agent.err for agent in agents)
    line = "2 processes on 2 nodes (ddp, cpu): an optimizer step is 8 rows = 2 rows x 2 micro-"
    assert said.count(line) == 1
    assert "".join(agent.out for agent in agents).count("fit: ") == 1
    (folder,) = (tmp_path / "runs" / "agents").iterdir()
    reference = adapter(tmp_path / "runs" / "one" / "version_0")
    moved = largest_move(reference)
    assert moved > 1e-3
    assert largest_difference(adapter(folder), reference) <= 1e-6 * max(moved, 1.0)
    assert adapter_bytes(folder) == adapter_bytes(tmp_path / "runs" / "own" / "version_0")


@pytest.mark.slow
def test_pods_with_kubernetes_variables_train_and_fail_as_one(
    tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    """A mistake that rank 0 alone can find ends every process with 2, and is printed once."""
    config = write_config(tmp_path, tiny_base, rows_file)
    ended = wait_for(*start_pods(fit(config), 2))
    assert [end.code for end in ended] == [0, 0], ended
    assert [end.out.count("fit: ") for end in ended] == [1, 0]
    (folder,) = (tmp_path / "runs" / "launched").iterdir()
    assert adapter_bytes(folder)

    ended = wait_for(*start_pods(fit(config, "--ckpt_path", "best"), 2), seconds=120)
    assert [end.code for end in ended] == [0, 0], ended  # the best is the newest: it is complete
    ended = wait_for(*start_pods(fit(config, "--ckpt_path", "nowhere.ckpt"), 2), seconds=120)
    assert [end.code for end in ended] == [2, 2]
    assert ended[0].sentences == ["--ckpt_path: no file 'nowhere.ckpt' (or last, auto, best)."]
    assert ended[1].sentences == []
    ended = wait_for(*start_pods(fit(config, "--model.lora.rr", "4"), 2), seconds=120)
    assert [end.code for end in ended] == [2, 2]
    assert [len(end.sentences) for end in ended] == [1, 0]


@pytest.mark.slow
def test_torchrun_says_an_error_of_the_first_process_once(
    tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    """Torchrun's own exit code is 1; its report gives those of its processes."""
    config = write_config(tmp_path, tiny_base, rows_file)
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
    words = fit_module(config, "--run.root", "/proc/nowhere")
    (end,) = wait_for(start([*command, *words]), seconds=180)
    assert end.sentences == [
        "run.root: no folder could be made in '/proc/nowhere' (No such file or directory)."
    ]
    assert end.err.count("exitcode  : 2") == 2


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--ckpt_path", "auto"]])
def test_workers_that_torchrun_starts_again_continue_their_run(
    words: list[str], tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    """Byte for byte the run that nobody killed: two numbers add up to the same in any order."""
    config = write_config(tmp_path, tiny_base, rows_file)
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    (whole,) = wait_for(start([*command, *fit_module(config, "--run.name", "whole")]))
    assert whole.code == 0, whole.err
    script = tmp_path / "kill_once.py"
    script.write_text(KILL_ONCE)
    killed = ["fit", "--config", str(config), "--run.name", "killed", *words]
    (end,) = wait_for(start([*command, str(script), *killed]))
    assert end.code == 0, end.err
    assert "fit: resuming" in end.err
    (folder,) = (tmp_path / "runs" / "killed").iterdir()
    assert adapter_bytes(folder) == adapter_bytes(tmp_path / "runs" / "whole" / "version_0")
    assert not os.path.exists(folder / "checkpoints" / "hpc_ckpt_1.ckpt")
