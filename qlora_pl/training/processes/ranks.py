"""``Ranks``: the processes of a launch decide as one, before they are a process group.

Which folder a run writes to, which checkpoint it continues and whether its configuration is in
order must be the same for all, and known before a GPU is touched. So they talk through the small
key-value store that ``torch.distributed`` would meet at anyway. Rank 0 decides, looks whether the
others were given the same and see the same files, and tells them to begin or to leave.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from hashlib import sha256
from typing import Any
from uuid import uuid4

import torch
from torch.distributed import DistError, PrefixStore, Store, TCPStore

from qlora_pl.errors import ConfigurationError, HardwareError, QLoRAError, TrainingStoppedError
from qlora_pl.training.processes.launching import Launch, meeting_point

MEETING_SECONDS = 1800.0
"""How long the processes wait for each other at a start, unless the run says otherwise."""
LEAVING_SECONDS = 30.0
"""How long one that has failed waits for the others, to tell them."""
LATE_SECONDS = 5.0
"""How long a rank that fails later waits to hear whether rank 0 says the same."""


class Ranks:
    """What the processes of a launch agree on; a process that was started alone agrees at once.

    Args:
        launch: The place of this process.
    """

    def __init__(self, launch: Launch) -> None:
        self.patience_seconds = MEETING_SECONDS
        self._launch = launch
        self._is_alone = launch.launcher is None
        self._has_begun = False
        self._has_left = False
        self._num_heard = 0
        self._store: Store | None = None
        self._session: Store | None = None
        self._group_server: Store | None = None

    # -- a start ---------------------------------------------------------------------------------

    def agree(
        self,
        given: Mapping[str, str],
        decide: Callable[[], dict[str, Any]],
        look: Callable[[dict[str, Any]], str | None],
    ) -> dict[str, Any]:
        """What rank 0 decides, on every rank.

        Args:
            given: What each process was told, by name; must be the same for all.
            decide: Called on rank 0, when all are there; its value in plain types.
            look: Called on the others with that value: why it is of no use there, or None.

        Raises:
            QLoRAError: on rank 0, with every problem found.
            SystemExit: on the others, with rank 0's exit code.
        """
        if self._is_alone:
            return decide()
        given = digests({**given, "torch": torch.__version__})
        if self._launch.rank != 0:
            self._meet(self.patience_seconds)
            self._report("given", {"given": given})
            value = self._hear()
            self._report("look", {"problem": look(value)})
            self._hear()
        else:
            value = self._lead(given, decide)
        self._has_begun = True
        return value

    def _lead(self, given: Mapping[str, str], decide: Callable[[], Any]) -> dict[str, Any]:
        try:
            self._meet(self.patience_seconds)
            self._gather("given", given)
            value: dict[str, Any] = decide()
            self._tell({"value": value})
            self._gather("look", given)
            self._tell({"value": self._open_group()})
        except BaseException as error:
            self._dismiss(exit_code_of(error))
            raise
        return value

    def least(self, name: str, value: float) -> float:
        """The least of what all processes say under a name, once they have begun."""
        if self._is_alone:
            return value
        assert self._session is not None
        self._session.set(f"{name}/{self._launch.rank}", repr(value))
        said = []
        for rank in range(self._launch.num_processes):
            self._wait(f"{name}/{rank}", self.patience_seconds)
            said.append(float(self._session.get(f"{name}/{rank}")))
        return min(said)

    def leave(self, error: QLoRAError) -> QLoRAError | SystemExit:
        """Tell the others that this process has failed; what it should end with.

        Rank 0 ends with the error. The others end without a word if rank 0 says the same.
        """
        if self._is_alone or self._has_left:
            return error
        with suppress(DistError, HardwareError):
            if self._has_begun:
                return self._leave_late(error)
            self._meet(LEAVING_SECONDS)
            if self._launch.rank == 0:
                self._dismiss(error.exit_code)
                return error
            self._report("given", {"problem": str(error)})
            self._hear()
        return error if self._launch.rank == 0 else self._own(error)

    def _leave_late(self, error: QLoRAError) -> QLoRAError | SystemExit:
        """All have begun, so that the same mistake is found by each of them at about one time."""
        ignore_sigterm()
        session, rank = self._session, self._launch.rank
        assert session is not None
        session.set(f"failed/{rank}", str(error))
        if rank != 0:
            if not appear(session, ["failed/0"], LATE_SECONDS):
                return self._own(error)
            is_same = session.get("failed/0").decode() == str(error)
            session.set(f"heard/{rank}", "")
            return SystemExit(error.exit_code) if is_same else self._own(error)
        others = [f"heard/{other}" for other in range(1, self._launch.num_processes)]
        appear(session, others, LATE_SECONDS)  # they read from this process
        return error

    def _own(self, error: QLoRAError) -> QLoRAError:
        own = QLoRAError(f"Rank {self._launch.rank} on {socket.gethostname()}: {error}")
        own.exit_code = error.exit_code
        return own

    def before_any_leaves(self, act: Callable[[], Any]) -> None:
        """Have rank 0 do what ends the others, or what their end would keep it from doing."""
        if self._launch.is_child:
            return
        ignore_sigterm()
        if self._is_alone or self._session is None:
            act()
        elif self._launch.rank == 0:
            act()
            self._session.set("acted", "")
        else:
            with suppress(DistError):
                self._session.wait(["acted"], timedelta(seconds=LEAVING_SECONDS))

    # -- words -----------------------------------------------------------------------------------

    def _hear(self) -> Any:
        assert self._session is not None
        key = f"word/{self._num_heard}"
        self._wait(key, self.patience_seconds)
        word = json.loads(self._session.get(key))
        if "exit_code" in word:
            ignore_sigterm()
            self._session.set(f"dismissed/{self._launch.rank}", "")
            sys.exit(word["exit_code"])
        self._num_heard += 1
        if word["value"] and "group_port" in word["value"]:
            join_group_at(word["value"]["group_port"])
        return word["value"]

    def _tell(self, word: dict[str, Any]) -> None:
        assert self._session is not None
        self._session.set(f"word/{self._num_heard}", json.dumps(word))
        self._num_heard += 1

    def _dismiss(self, exit_code: int) -> None:
        """Tell the others to leave, and wait until they have heard it: they ask this process."""
        ignore_sigterm()
        self._has_left = True
        if self._session is None:
            return
        self._tell({"exit_code": exit_code})
        others = [f"dismissed/{rank}" for rank in range(1, self._launch.num_processes)]
        with suppress(DistError):
            appear(self._session, others, LEAVING_SECONDS)

    def _report(self, what: str, said: dict[str, Any]) -> None:
        assert self._session is not None
        said = said | {"host": socket.gethostname()}
        self._session.set(f"{what}/{self._launch.rank}", json.dumps(said))

    def _gather(self, what: str, given: Mapping[str, str]) -> None:
        """Read what every other rank reports, and refuse to start on any problem."""
        problems: list[str] = []
        for rank in range(1, self._launch.num_processes):
            self._wait(f"{what}/{rank}", self.patience_seconds)
            assert self._session is not None
            said = json.loads(self._session.get(f"{what}/{rank}"))
            who = f"Rank {rank} on {said['host']}"
            if said.get("problem"):
                problems.append(f"{who}: {said['problem']}")
            elif differs := differing(given, said.get("given", given)):
                problems.append(
                    f"{who} was given another run than rank 0, which differs in {differs}; give "
                    "all nodes the same files and flags."
                )
        if problems:
            raise ConfigurationError(problems)

    def _wait(self, key: str, seconds: float) -> None:
        assert self._session is not None
        try:
            self._session.wait([key], timedelta(seconds=seconds))
        except DistError as error:
            raise HardwareError(
                "Another process of this launch ended before the run began; its own message says "
                "why."
            ) from error

    # -- meeting ---------------------------------------------------------------------------------

    def _meet(self, seconds: float) -> None:
        """Find the others of this very start.

        The store may be that of ``torchrun``, where an earlier start has left its keys. So every
        process asks under a number of its own, and rank 0 answers with the name of the session.
        """
        if self._session is not None:
            return
        self._store = store = PrefixStore("qlora-pl", self._connect(seconds))
        if self._launch.rank != 0:
            number = uuid4().hex
            store.set(f"hello/{self._launch.rank}", number)
            try:
                store.wait([f"answer/{number}"], timedelta(seconds=seconds))
            except DistError as error:
                raise self._nobody("rank 0", seconds) from error
            self._session = PrefixStore(store.get(f"answer/{number}").decode(), store)
            self._session.set(f"met/{self._launch.rank}", "")
            return
        session = uuid4().hex
        self._await_others(store, session, time.monotonic() + seconds, seconds)
        self._session = PrefixStore(session, store)

    def _await_others(self, store: Store, session: str, deadline: float, seconds: float) -> None:
        missing, answered = set(range(1, self._launch.num_processes)), set()
        while missing:
            for rank in sorted(missing):
                if store.check([f"hello/{rank}"]):
                    number = store.get(f"hello/{rank}").decode()
                    if number not in answered:
                        store.set(f"answer/{number}", session)
                        answered.add(number)
                if store.check([f"{session}/met/{rank}"]):
                    missing.discard(rank)
            if missing and time.monotonic() > deadline:
                ranks = ", ".join(map(str, sorted(missing)[:8]))
                raise self._nobody(f"rank {ranks}", seconds)
            time.sleep(0.02)

    def _connect(self, seconds: float) -> Store:
        host, port = meeting_point()
        hosts_store = self._launch.rank == 0 and self._launch.launcher != "torchrun"
        try:
            return TCPStore(
                host,
                port,
                is_master=hosts_store,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
                multi_tenant=hosts_store,  # Lightning opens it again for the process group
            )
        except (DistError, RuntimeError) as error:
            if hosts_store:
                reason = str(error).splitlines()[0]
                raise HardwareError(
                    f"The processes cannot meet on '{host}', port {port} ({reason}); set "
                    "MASTER_PORT to a free one."
                ) from error
            raise self._nobody("rank 0", seconds) from error

    def _nobody(self, who: str, seconds: float) -> HardwareError:
        host, port = meeting_point()
        return HardwareError(
            f"{who[0].upper()}{who[1:]} of {self._launch.num_processes} did not come to '{host}', "
            f"port {port}, within {seconds:.0f} seconds; see whether it was started, and whether "
            "its node reaches that one."
        )

    def _open_group(self) -> dict[str, Any]:
        """A store of its own for the process group that Lightning makes later.

        torch 2.13 keeps ``torchrun``'s store over a restart and finds the addresses of dead
        processes there: ``init_process_group`` then waits for them until its time-out.
        """
        if self._launch.launcher != "torchrun":
            return {}
        host, _ = meeting_point()
        self._group_server = TCPStore(
            host, 0, is_master=True, wait_for_workers=False, multi_tenant=True
        )
        join_group_at(self._group_server.port)
        return {"group_port": self._group_server.port}

    # -- what a launch remembers -----------------------------------------------------------------

    def remember(self, key: str, value: str) -> None:
        """Keep a text for the processes that ``torchrun`` starts after these have failed."""
        if self._launch.launcher == "torchrun" and self._store is not None:
            self._store.set(f"memory/{key}", value)

    def remembered(self, key: str) -> str | None:
        """What an earlier start of the same launch kept."""
        if self._store is None or not self._store.check([f"memory/{key}"]):
            return None
        return str(self._store.get(f"memory/{key}").decode())


def appear(store: Store, keys: list[str], seconds: float) -> bool:
    """Whether all keys are there within some time; torch's own wait warns when they are not."""
    deadline = time.monotonic() + seconds
    while not store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def join_group_at(port: int) -> None:
    """Have ``init_process_group`` meet at a port of rank 0's, and not in torchrun's store."""
    os.environ["MASTER_PORT"] = str(port)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def digests(values: Mapping[str, Any]) -> dict[str, str]:
    """A number for each value in place of it: a token in the configuration goes nowhere."""
    return {key: sha256(str(value).encode()).hexdigest()[:16] for key, value in values.items()}


def differing(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """The first few keys with different values; empty if there are none."""
    keys = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    more = [f"and {len(keys) - 3} more"] if len(keys) > 3 else []
    return ", ".join([*keys[:3], *more])


def lost_connection(error: BaseException) -> TrainingStoppedError | None:
    """The error that says so where an exchange broke because another process is gone, else None.

    Gloo has no type of its own for it; the words are those of its sockets and of its time-out.
    """
    words = ("closed by peer", "reset by peer", "Timed out waiting", "Broken pipe")
    if isinstance(error, DistError) or any(word in str(error) for word in words):
        return TrainingStoppedError(
            "Another process of this run is gone, or did not answer within run.timeout_seconds; "
            "its own message says why. Continue with --ckpt_path last."
        )
    return None


def exit_code_of(error: BaseException) -> int:
    """What a process ends with that raises this."""
    if isinstance(error, QLoRAError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 1


def ignore_sigterm() -> None:
    """A launcher ends all processes when the first has left; this one is leaving by itself."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def hush(rank: int) -> None:
    """Let ranks above 0 say only what is wrong, and by name: rank 0 says the rest for all."""
    logging.getLogger("qlora_pl").setLevel(logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter(f"rank {rank}: %(message)s"))
