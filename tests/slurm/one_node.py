"""A SLURM of one node on this machine, with a key, ports and state of its own, for real jobs."""

from __future__ import annotations

import getpass
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from launched import environment, free_port

NUM_TASKS = 2
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
KillWait=30
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES State=UP OverSubscribe=FORCE:2
"""


@contextmanager
def one_node_slurm(folder: Path) -> Iterator[Cluster]:
    """A running cluster; its daemons, which this process starts, end with the block."""
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "munge" / "key").write_bytes(os.urandom(1024))
    (folder / "munge" / "key").chmod(0o400)
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            folder=folder,
            host=socket.gethostname().split(".")[0],
            user=getpass.getuser(),
            cpus=max(os.cpu_count() or 1, 1),
            control_port=free_port(),
            node_port=free_port(),
        )
    )
    cluster = Cluster(folder)
    munge = [f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "log", "seed")]
    with ExitStack() as daemons:
        started = cluster.daemon(
            "munged", "--foreground", "--force", f"--socket={folder}/munge/socket", *munge
        )
        daemons.callback(end, started)
        cluster.wait_until((folder / "munge" / "socket").exists, 30, "munged")
        for name in ("slurmctld", "slurmd"):
            daemons.callback(end, cluster.daemon(name, "-D", "-f", str(configuration)))
        cluster.wait_until(lambda: cluster.ask("sinfo", "-h", "-o", "%T") == "idle", 60, "a node")
        daemons.callback(cluster.cancel_all)
        yield cluster


class Cluster:
    """Takes jobs, and answers about them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def daemon(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{command[0]}.out").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=self.environment())

    def environment(self) -> dict[str, str]:
        return environment() | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def ask(self, *command: str) -> str:
        """What a command of SLURM's prints; empty while nobody answers."""
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.environment(), timeout=60
        )
        return done.stdout.strip()

    def submit(self, *words: str, **variables: str) -> str:
        """The id of a new job."""
        done = subprocess.run(
            ["sbatch", "--parsable", *words],
            capture_output=True,
            text=True,
            env=self.environment() | variables,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().split(";")[0]

    def signal(self, job: str, number: signal.Signals) -> None:
        """Send a signal to the processes that srun started, as ``sbatch --signal`` does."""
        self.ask("scancel", f"--signal={number.name.removeprefix('SIG')}", job)

    def state(self, job: str) -> str:
        """``PENDING``, ``RUNNING``, ``COMPLETED`` ..."""
        lines = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return next((word[9:] for word in lines if word.startswith("JobState=")), "UNKNOWN")

    def wait_for_end(self, job: str, seconds: float) -> str:
        """Its last state."""
        under_way = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "UNKNOWN")
        self.wait_until(lambda: self.state(job) not in under_way, seconds, f"job {job}")
        return self.state(job)

    def cancel_all(self) -> None:
        self.ask("scancel", f"--user={getpass.getuser()}")
        self.wait_until(lambda: not self.ask("squeue", "-h"), 60, "the end of all jobs")

    def wait_until(self, is_so: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > deadline:
                logs = [path.read_text()[-3000:] for path in sorted(self.folder.glob("*.log"))]
                raise TimeoutError("\n".join([f"waited for {what}", *logs]))
            time.sleep(0.2)


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
