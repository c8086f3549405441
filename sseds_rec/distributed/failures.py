"""A rank that fails ends the job on all ranks, with one reason; so does one that is lost.

An exception on one rank leaves the others in a collective that it will never join. So the job's store serves as a notice
board: the rank writes its reason there, and a thread of every process, which looks at it once a second, says it and ends
its process, whatever the main thread waits for.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch.distributed as dist

from sseds_rec.distributed.rendezvous import meet
from sseds_rec.errors import Lost, UserError, user_message
from sseds_rec.output import print_error

LOOK_SECONDS = 1.0
#: Looks in which another rank, or the store, has given no sign of life, after which it counts as lost.
SILENT_LOOKS = 60
#: How long a process stays to hear that all have said the reason: its end has torchrun stop the others.
_SAY_SECONDS = 10.0
#: How long a process that fails before it has joined the job waits for the others to come and hear of it.
_JOIN_SECONDS = 25.0
_LEFT = "left"


@dataclass(frozen=True)
class Failure:
    """Why a job ends.

    Attributes:
        message: one line.
        code: exit code of all its processes.
        is_final: whether the same job, started again, can only fail again.
        lost: processes known to be lost, which will not hear of it.
    """

    message: str
    code: int
    is_final: bool
    lost: int = 0

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Failure:
        """What an exception on a rank means for all."""
        if (message := user_message(error)) is not None:
            return cls(message, 2, isinstance(error, UserError))
        if _is_loss(error):
            reason = str(error) if isinstance(error, Lost) else f"rank {rank} lost another one ({_gloo_reason(error)})"
            return cls(f"{reason}; started again, all go on from the last checkpoint", 1, False, lost=1)
        where = f"rank {rank} failed on {socket.gethostname()}"
        return cls(
            f"{where}: {type(error).__name__}: {_first_line(error)}; its traceback is in the log there", 1, False
        )


def _is_loss(error: BaseException) -> bool:
    """Whether this is how a rank hears that another one ended: gloo has no type of its own for it."""
    return isinstance(error, Lost | dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _gloo_reason(error: BaseException) -> str:
    """What gloo says, without the line of its source and its good wishes."""
    return re.sub(r"^\[\S+\] ", "", _first_line(error)).partition(". This is typically")[0]


class Watch:
    """This process's eye on the notice board; `end` writes there.

    Args:
        store: of this start of the job.
        rank: of this process.
        world_size: processes in the job.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._original = store  # on rank 0 the server may be in it, and ends with it
        self._store: dist.Store = cast("Any", store).clone()  # a connection of its own: others wait in theirs
        self._rank, self._world_size = rank, world_size
        self._node = os.environ.get("GROUP_RANK", socket.gethostname())
        self._ending, self._left = threading.Lock(), threading.Event()
        self._looks = 0
        looks = (self._look, self._look_at_store)
        self._threads = [threading.Thread(target=look, name="watch", daemon=True) for look in looks]
        self._store.set(f"alive/{rank}", "0")

    def start(self) -> None:
        """Begins to look.

        Raises:
            UserError: processes that torchrun started before these ended for a reason that has not gone away.
        """
        for thread in self._threads:
            thread.start()
        if (reason := _recorded()) is not None:
            raise UserError(reason)

    def leave(self) -> None:
        """Ends looking: this rank has done its part."""
        self._left.set()
        for thread in self._threads:
            thread.join(LOOK_SECONDS)
        with suppress(dist.DistError):  # rank 0 may have left with the store
            self._store.set(f"alive/{self._rank}", _LEFT)

    def end(self, error: BaseException) -> NoReturn:
        """Ends the job, on all ranks, for an exception on this one."""
        failure = Failure.of(error, self._rank)
        self._end(failure, _trace(error, failure))

    def _look(self) -> None:
        """Gives a sign of life, reads the board, and looks after the next rank."""
        following, before, silent = (self._rank + 1) % self._world_size, b"", 0
        while not self._left.wait(LOOK_SECONDS):
            try:
                self._store.set(f"alive/{self._rank}", str(self._looks))
                if self._store.check(["reason"]):
                    self._end(Failure(**json.loads(self._store.get("reason"))))
                known = self._store.check([f"alive/{following}"])
                sign = self._store.get(f"alive/{following}") if known else b""
            except dist.DistError:  # it ended with its process: as a rule the collectives tell, else the other thread
                return
            silent = silent + 1 if sign == before != _LEFT.encode() else 0
            before = sign
            if silent >= SILENT_LOOKS:
                said = f"rank {following} of {self._world_size} has given no sign of life for {self._silence} s"
                self._end(Failure.of(Lost(said), self._rank))
            self._looks += 1

    def _look_at_store(self) -> None:
        """Sees whether the other thread still gets answers: for those of a machine that is gone it waits for ever."""
        before, silent = -1, 0
        while not self._left.wait(LOOK_SECONDS):
            silent = silent + 1 if self._looks == before else 0
            before = self._looks
            if silent >= SILENT_LOOKS:
                print_error(f"rank {self._rank}: the machine of rank 0 has given no sign of life for {self._silence} s")
                _exit(1)

    @property
    def _silence(self) -> str:
        return f"{SILENT_LOOKS * LOOK_SECONDS:.0f}"

    def _end(self, failure: Failure, trace: str = "") -> NoReturn:
        with self._ending:  # until the process ends
            try:
                failure = self._post(failure, trace)
            except dist.DistError:  # the store has ended before all could read there
                _say(failure, trace)
            finally:
                _exit(failure.code)

    def _post(self, failure: Failure, trace: str) -> Failure:
        """Writes a reason on the board, unless there is one; says what is there, once a node, and waits for the others to."""
        own = json.dumps(asdict(failure))
        reason = self._store.compare_set("reason", "", own).decode()
        if reason != own:
            failure, trace = Failure(**json.loads(reason)), ""
        is_first = self._store.add(f"said/{self._node}", 1) == 1
        if is_first or trace:
            _say(failure, trace)
        _record(failure)
        with suppress(dist.DistError):  # it ends with the first of those who have heard
            self._store.add("heard", 1)
            deadline, listeners = time.monotonic() + _SAY_SECONDS, self._world_size - failure.lost
            while self._store.add("heard", 0) < listeners and time.monotonic() < deadline:
                time.sleep(0.05)
        return failure


def end_job(error: Exception) -> NoReturn:
    """Ends the job, on all ranks, for an exception on this one, which has not joined it yet."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ["WORLD_SIZE"])
    with suppress(Lost):
        if not isinstance(error, Lost):
            Watch(meet(rank, world_size, _JOIN_SECONDS), rank, world_size).end(error)
    failure = Failure.of(error, rank)
    _say(failure, _trace(error, failure))
    _exit(failure.code)


def _trace(error: BaseException, failure: Failure) -> str:
    """The traceback of a fault of the code."""
    return "".join(traceback.format_exception(error)) if failure.code == 1 and not failure.lost else ""


def _say(failure: Failure, trace: str) -> None:
    print(trace, end="", file=sys.stderr)
    print_error(failure.message)


def _exit(code: int) -> NoReturn:
    """Ends this process, though threads of it wait in collectives for ever."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def _record(failure: Failure) -> None:
    """Leaves the reason where torchrun reads it for its summary, and processes that it starts again find it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"timestamp": str(int(time.time())), "is_final": failure.is_final}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": failure.message, "extraInfo": extra}}))


def _recorded() -> str | None:
    """The reason for which processes before this one, under the same torchrun on this machine, ended for good."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")  # .../attempt_<restarts>/<local rank>/error.json
    for record in Path(path).parent.parent.parent.glob("attempt_*/*/error.json") if path else []:
        with suppress(OSError, ValueError, LookupError, TypeError):
            message = json.loads(record.read_text())["message"]
            if message["extraInfo"]["is_final"]:
                return str(message["message"])
    return None
