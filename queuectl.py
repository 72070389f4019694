#!/usr/bin/env python3
"""queuectl: a durable background job queue for shell commands, in one file.

    queuectl enqueue 'make all'          put a job into ./queuectl.db; prints its id
    queuectl worker start --count 4      run jobs until stopped

The life of a job:

    pending -> processing -> completed          exit code 0
                          -> pending            failed: again after backoff_base ** attempts seconds
                          -> dead               failed max_retries times: the dead letter queue
                          -> cancelled          by the operator, whether waiting or running
    dead, cancelled -> pending                  `dlq retry`, with its attempts back at 0

Who runs it: `worker start` is a pool with N worker processes; each worker runs one job at a time.

What survives a crash: the database (SQLite, WAL) holds everything that must. The directory beside
it, `queuectl.db.run`, holds what is alive, as locked files: the kernel drops a lock when its last
holder dies, so that nobody has to guess with heartbeats, leases or clocks.

    worker-ID       locked by one worker: free means that the worker is gone
    pool-ID         locked by one pool; beside it .bell, which is rung when there may be work, and
                    .stop or .now, which asks it to stop
    SEQ.RUN.out     one attempt's output, locked by the worker and, through an inherited
                    descriptor, by every process of the job: free means that all of them are gone
    SEQ.RUN.kept.X  the same with a result, X, that the full disk did not let its worker store

A job in `processing` whose worker's lock is free has crashed, unless that worker kept its result.
What is left of the attempt, by its lock or, on Linux, its environment, is ended first; then the job
goes back to the queue, and the attempt counts. A worker without its pool finishes its job and
leaves. So a job runs at least once, and never twice at once.

Exit codes: 0 done; 1 the answer is no (a job failed, no such job); 2 bad usage or input; 4 the
database or the machine is at fault; 124 timed out; 128+n ended by signal n.

To read on: each part uses what stands above it, so that `main` is at the end. A job's way is
cmd_enqueue, Queue.enqueue_many, RunDirectory.ring, Pool.wait, Pool.wake, Worker.main, Queue.claim,
Worker.perform, Queue.finish, after_attempt; a killed worker's is Pool.bury, Pool.recover,
Pool.end_rest, Kill, Pool.give_back; a signal's is Pool.on_signal, Pool.obey, Pool.stop,
Worker.hear, Worker.watch.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import io
import json
import os
import re
import shlex
import signal
import sqlite3
import stat
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from functools import lru_cache, partial
from itertools import chain, islice
from operator import itemgetter
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    import argparse
    from multiprocessing.connection import Connection

    Argument = tuple[tuple[str, ...], dict[str, Any]]
    Facts = Mapping[str, Any]
    Rows = Iterable[Sequence[object]]

__version__ = "1.0"
__all__ = ["Attempt", "Job", "Queue", "QueueError", "work"]

# --- vocabulary ----------------------------------------------------------------------------------

STATES = tuple("pending processing completed dead cancelled".split())
PENDING, PROCESSING, COMPLETED, DEAD, CANCELLED = STATES
MOVES = {  # every legal change of state; each statement's WHERE sees to it, the tests to them
    PENDING: (PROCESSING, CANCELLED),
    PROCESSING: (COMPLETED, PENDING, DEAD, CANCELLED),
    DEAD: (PENDING,),
    CANCELLED: (PENDING,),
    COMPLETED: (),
}
ENDED = (COMPLETED, DEAD, CANCELLED)
PRUNED = (COMPLETED, CANCELLED)  # unless told otherwise: dead letters stay until they are purged
DUE, LATER, BLOCKED = 1, 0, -1  # what a pending job is, in SQL too; all other jobs have DUE

OK, NO, USAGE, FAULT, TIMED_OUT, SIGNALLED = 0, 1, 2, 4, 124, 128  # exit codes
TRY_LATER = 75  # a job's exit code (EX_TEMPFAIL of sysexits.h): not now, and it is nobody's fault


class QueueError(Exception):
    """An expected failure; its text says what and where. `code` is the exit code it means."""

    code = NO


class BadInput(QueueError):
    """What was asked for makes no sense; nothing was changed."""

    code = USAGE


class NotFound(QueueError):
    """No job has that id, or there is no queue."""


class Fault(QueueError):
    """The database or the machine is at fault, not the caller."""

    code = FAULT


class Locked(Fault):
    """Another program held the write lock for longer than we were willing to wait."""


class Broken(Fault):
    """The file is damaged, or another one: to wait does not help."""


class Job(NamedTuple):
    """One job, as it was read; the fields are the columns. Times are Unix seconds.

    `attempts` counts the starts since the job was enqueued or retried from the dead letter queue,
    `snoozes` the exits with 75; `run` counts every start ever and names one attempt of the job.
    `max_retries` (how often it may start) and `timeout` (seconds, 0 is none) are None where the
    configuration decides. `due` is DUE, LATER or BLOCKED; `env` is JSON; `cancelling` is 1 while a
    running job is being called off. `updated_at` is when the state changed, of a due job when it
    became due. `recurs` is the schedule that goes on after this job, `series` its name, `planned`
    the time it gave the job.
    """

    seq: int
    id: str
    queue: str
    command: str
    cwd: str
    env: str | None
    state: str
    priority: int
    attempts: int
    max_retries: int | None
    timeout: float | None
    created_at: float
    updated_at: float
    run_after: float
    locked_by: str | None
    locked_at: float | None
    exit_code: int | None
    last_error: str | None
    run: int
    cancelling: int
    due: int
    snoozes: int
    recurs: str | None
    series: str | None
    planned: float | None

    @property
    def key(self) -> str:
        """What names the attempt of a claimed job: of one run by one worker."""
        return f"{self.seq}.{self.run}.{self.locked_by}"


class Attempt(NamedTuple):
    """How one run of a job ended. `cut` is how many bytes of output came before what was kept."""

    run: int
    worker: str
    started: float
    finished: float
    exit_code: int | None
    error: str | None
    cut: int
    output: bytes


# --- system: what differs between POSIX and Windows; the only place with signals and kills --------

BINARY = getattr(os, "O_BINARY", 0)  # else Windows translates line ends
PROC = sys.platform == "linux"  # processes can be looked into through /proc
STOP_SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")]
EXHAUSTED = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # the machine's fault


def read_proc(path: str) -> bytes:
    """Return a file of /proc; empty where the process is gone or not ours to look at."""
    with contextlib.suppress(OSError), open("/proc/" + path, "rb") as file:
        return file.read()
    return b""


def has_locked(pid: int, path: str) -> bool:
    """Tell whether a process holds the lock of a file (to have it open is not enough)."""
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.path.samefile(f"/proc/{pid}/fd/{fd}", path) and re.search(
                    rb"FLOCK +ADVISORY +WRITE", read_proc(f"{pid}/fdinfo/{fd}")
                ):
                    return True
    return False


def process_group(noted: Mapping[str, Any], job: Job) -> list[int]:
    """Return the process group of an attempt where there is no /proc: by pid and start time.

    A leader that did not start when the job was launched is a stranger who got the pid later.
    """
    import subprocess

    if noted.get("key") != job.key:
        return []
    ps, env = ["ps", "-axo", "pid=,pgid=,stat=,lstart="], {**os.environ, "LC_ALL": "C"}
    table = subprocess.run(ps, stdout=subprocess.PIPE, check=False, env=env).stdout
    found = []
    for line in table.decode(errors="replace").splitlines():
        pid, pgid, state, *started = line.split()
        if int(pgid) != noted["job_pid"] or len(started) != 5 or "Z" in state:  # a zombie is dead
            continue
        when = time.mktime(time.strptime(" ".join(started), "%a %b %d %H:%M:%S %Y"))
        if pid == pgid and abs(when - noted["launched"]) > 2:
            return []
        found.append(int(pid))
    return found


def ignore(_number: int, _frame: object) -> None:
    """Do nothing, but not as SIG_IGN: that would be inherited by the jobs."""


class Child:
    """A job's own process, with what `subprocess.Popen` tells about one."""

    returncode: int = 0  # once it has ended; a signal is negative
    running = True

    def __init__(self, pid: int) -> None:
        """Take over a process that has been started."""
        self.pid = pid

    def poll(self) -> int | None:
        """Return how it ended, or None while it runs."""
        if self.running:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if not pid:
                return None
            by_signal, self.running = os.WIFSIGNALED(status), False
            self.returncode = -os.WTERMSIG(status) if by_signal else os.WEXITSTATUS(status)
        return self.returncode


class System:
    """What Linux, macOS and their like do for us. Windows, below, does some of it in its way."""

    TICK = 0.5  # seconds between a pool's looks at what rings no bell; each takes about 0.3 ms
    GONE: tuple[type[OSError], ...] = (FileNotFoundError,)
    PYTHON = sys.executable
    SHELL: tuple[str, ...] = ("/bin/sh", "-c", "--")
    COMMAND_LIMIT = 131071  # Linux's MAX_ARG_STRLEN
    BACKGROUND: Mapping[str, Any] = {"start_new_session": True}  # to outlive the terminal
    inherited: Mapping[bytes, bytes] = {}  # the environment, once it has been read
    user = staticmethod(getattr(os, "geteuid", lambda: None))  # on Windows files have other rights

    def words(self, line: str) -> list[str]:
        """Split a command line."""
        return shlex.split(line)

    def line(self, words: Sequence[str]) -> str:
        """Quote words so that the shell takes them as they are."""
        return shlex.join(words)

    def lock(self, fd: int, *, shared: bool = False) -> bool:
        """Lock an open file without waiting; False where somebody else has it."""
        import fcntl

        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def drop(self, fd: int, path: str) -> None:
        """Remove a file that this process holds; the name goes while the lock still holds."""
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(fd)

    def punch(self, fd: int, length: int) -> bool:
        """Make the beginning of a file a hole; False where that cannot be done."""
        import ctypes

        keep_size, punch_hole, offsets = 1, 2, (ctypes.c_int64(0), ctypes.c_int64(length))
        with contextlib.suppress(AttributeError, OSError):  # only Linux has it
            fallocate = ctypes.CDLL(None).fallocate64
            return bool(fallocate(fd, keep_size | punch_hole, *offsets) == 0)
        return False

    def sync(self, path: str) -> None:
        """Sync a file, on macOS down to the medium."""
        with open(path, "r+b", buffering=0) as file:  # Windows syncs what may be written
            try:
                from fcntl import F_FULLFSYNC, fcntl  # type: ignore[attr-defined]
            except ImportError:
                getattr(os, "fdatasync", os.fsync)(file.fileno())
            else:
                fcntl(file, F_FULLFSYNC)

    def bell(self, path: str) -> int | None:
        """Make a bell, and return what is readable when it rings; None where there are none."""
        os.mkfifo(path, 0o600)
        return os.open(path, os.O_RDWR | os.O_NONBLOCK)

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Let no signal reach a process that is started now, until it calls `settle`."""
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()  # else the start runs it, which unblocks the signals
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def settle(self, *, worker: bool) -> Callable[[], object]:
        """Let a process and its jobs have the signals they expect; return what undoes it."""
        before = signal.pthread_sigmask(signal.SIG_SETMASK, [])
        if worker:
            signal.signal(signal.SIGQUIT, signal.SIG_DFL)
            signal.signal(signal.SIGCHLD, ignore)
            for fd in map(int, os.listdir("/dev/fd")):  # the fork server's are not for jobs
                with contextlib.suppress(OSError):
                    os.set_inheritable(fd, fd <= 2)
        return partial(signal.pthread_sigmask, signal.SIG_SETMASK, before)

    def wait(self, sources: Iterable[Any], child: Any, limit: float | None) -> list[Any]:  # noqa: ARG002
        """Wait for bells (a child's end rings its worker's) and connections; return what came.

        What is None is not there.
        """
        import select

        poll, found = select.poll(), {}
        for source in sources:
            if source is not None:
                fd = source if isinstance(source, int) else source.fileno()
                found[fd] = source
                poll.register(fd, select.POLLIN)
        ready = [found[fd] for fd, _ in poll.poll(limit and limit * 1000)]
        for bell in ready:
            if isinstance(bell, int):
                os.read(bell, 65536)
        return ready

    def launch(self, argv: Sequence[str], job: Job, env: dict[str, str], out: int) -> Child:
        """Start a job's command in a session of its own; OSError where it cannot be started.

        The output file is passed on a third time, as a descriptor that no redirection closes. What
        the job was given is UTF-8, whatever this process was told about its locale. Not by Popen,
        which before Python 3.10 copies the whole process: that doubles the cost of a job.
        """
        self.inherited = self.inherited or dict(os.environb)
        given = {k.encode(): v.encode(errors="surrogateescape") for k, v in env.items()}
        os.set_inheritable(out, True)  # noqa: FBT003
        os.chdir(job.cwd)
        try:
            pid = os.posix_spawnp(
                argv[0],
                [*map(os.fsencode, argv), job.command.encode()],
                {**self.inherited, **given},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, out, 1),
                    (os.POSIX_SPAWN_DUP2, out, 2),
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                ],
                setsid=True,
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # which Python ignores
            )
        finally:
            with contextlib.suppress(OSError):  # else an idle worker would keep that one busy
                os.chdir(os.path.dirname(env["QUEUECTL_DB"]))
        return Child(pid)

    def release(self, child: Child) -> None:
        """Let go of a job that has ended: what a completed one left behind goes on."""

    def processes(self, job: Job, run_dir: RunDirectory) -> list[int]:
        """Return an attempt's processes, as far as they can be told from strangers for certain."""
        if not PROC:
            return process_group(run_dir.noted(job.locked_by), job)
        others = set(map(int, filter(str.isdigit, os.listdir("/proc")))) - {os.getpid()}
        key = b"\0QUEUECTL_RUN=" + run_dir.mark(job).encode() + b"\0"
        found = [pid for pid in sorted(others) if key in b"\0" + read_proc(f"{pid}/environ")]
        if found or run_dir.free(job.seq, job.run, "out"):
            return found
        return [pid for pid in others if has_locked(pid, run_dir.file(job.seq, job.run, "out"))]

    def kill(self, mark: str, pids: Iterable[int], *, hard: bool) -> None:  # noqa: ARG002
        """Ask an attempt's processes to end (a stopped one must hear it, too); `hard`: end them."""
        for pid in pids:
            for number in (signal.SIGKILL,) if hard else (signal.SIGTERM, signal.SIGCONT):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)

    def escapes(self) -> None:
        """Have the terminal understand escape sequences."""


class _Windows(System):
    """A job's processes are in a Job Object, which ends them when its last handle is closed.

    That is when their worker dies. The lock of a file is on a byte far behind its end.
    """

    TICK = 0.02  # there are no bells
    GONE = (FileNotFoundError, PermissionError)  # what is being removed cannot be opened
    PYTHON = getattr(sys, "_base_executable", sys.executable)  # not a virtual environment's starter
    SHELL = ("cmd.exe", "/d", "/s", "/c")
    COMMAND_LIMIT = 8191
    BACKGROUND: Mapping[str, Any] = {"creationflags": 0x8 | 0x200}  # detached, in a new group
    FAR = 1 << 40

    def __init__(self) -> None:
        self.jobs: dict[int, int] = {}  # the handles of the Job Objects, by process

    def call(self, name: str, *args: Any, dll: str = "kernel32") -> int:
        """Call a function of the system; numbers are passed, and come back, as wide as handles."""
        import ctypes

        function = getattr(ctypes.WinDLL(dll), name)  # type: ignore[attr-defined]
        function.restype = ctypes.c_void_p
        wide = (ctypes.c_void_p(arg) if isinstance(arg, int) else arg for arg in args)
        return function(*wide) or 0

    def words(self, line: str) -> list[str]:  # a backslash is a part of a path
        return [word.strip('"') for word in shlex.split(line, posix=False)]

    def line(self, words: Sequence[str]) -> str:
        import subprocess

        line = subprocess.list2cmdline(words)
        special = re.search("[&|<>^%!()]", line)  # cmd.exe heeds these within quotes
        return re.sub('([&|<>^%!()"])', r"^\1", line) if special else line

    def lock(self, fd: int, *, shared: bool = False) -> bool:  # noqa: ARG002
        import msvcrt

        os.lseek(fd, self.FAR, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        finally:
            os.lseek(fd, 0, os.SEEK_SET)  # the job writes where this points
        return True

    def drop(self, fd: int, path: str) -> None:
        os.close(fd)  # what is open cannot be removed
        with contextlib.suppress(OSError):  # what a completed job left behind still writes to it
            os.unlink(path)

    def punch(self, fd: int, length: int) -> bool:
        import ctypes
        import msvcrt

        set_sparse, set_zero_data = 0x900C4, 0x980C8
        handle = msvcrt.get_osfhandle(fd)  # type: ignore[attr-defined]
        hole, unused = (ctypes.c_int64 * 2)(0, length), ctypes.byref(ctypes.c_uint32())
        self.call("DeviceIoControl", handle, set_sparse, None, 0, None, 0, unused, None)
        self.call("DeviceIoControl", handle, set_zero_data, hole, 16, None, 0, unused, None)
        return True

    def bell(self, path: str) -> int | None:  # noqa: ARG002
        return None

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        yield

    def settle(self, *, worker: bool) -> Callable[[], object]:  # noqa: ARG002
        return int  # there is no mask to set again, and this does nothing

    def wait(self, sources: Iterable[Any], child: Any, limit: float | None) -> list[Any]:
        from multiprocessing.connection import wait

        things = [thing for thing in (*sources, child and int(child._handle)) if thing]
        if not things:
            time.sleep(limit or 0)
        return wait(things, limit)

    def launch(self, argv: Sequence[str], job: Job, env: dict[str, str], out: int) -> Any:
        import subprocess

        line = subprocess.list2cmdline([*argv, job.command])
        if re.fullmatch(r"(.*[\\/])?cmd(\.exe)?", argv[0], re.IGNORECASE):  # has rules of its own
            line = subprocess.list2cmdline(argv) + f' "{job.command}"'
        new_group, suspended = 0x200, 0x4
        child = subprocess.Popen(
            line,
            cwd=job.cwd,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            creationflags=new_group | suspended,
        )
        process = int(child._handle)  # type: ignore[attr-defined]
        self.jobs[child.pid] = self.call("CreateJobObjectW", None, env["QUEUECTL_RUN"])
        self.limit(child, 0x2000)  # kill on close
        self.call("AssignProcessToJobObject", self.jobs[child.pid], process)
        self.call("NtResumeProcess", process, dll="ntdll")
        return child

    def limit(self, child: Any, flags: int) -> None:
        """Set the flags of a JOBOBJECT_EXTENDED_LIMIT_INFORMATION, which begins with two times."""
        import ctypes

        limits = (ctypes.c_uint32 * (36 if ctypes.sizeof(ctypes.c_void_p) == 8 else 28))()
        limits[4] = flags
        size = ctypes.sizeof(limits)
        self.call("SetInformationJobObject", self.jobs[child.pid], 9, limits, size)

    def release(self, child: Child) -> None:
        self.limit(child, 0)
        self.call("CloseHandle", self.jobs.pop(child.pid))

    def processes(self, job: Job, run_dir: RunDirectory) -> list[int]:
        """Return up to 1,000 processes: the end of a JOBOBJECT_BASIC_PROCESS_ID_LIST."""
        import ctypes

        found = (ctypes.c_size_t * 1001)()  # before the processes there are two 32-bit counts
        handle = self.call("OpenJobObjectW", 4, 0, run_dir.mark(job))
        if handle:  # without one it would be our own job's
            self.call("QueryInformationJobObject", handle, 3, found, ctypes.sizeof(found), None)
            self.call("CloseHandle", handle)
        return [pid for pid in found[8 // ctypes.sizeof(ctypes.c_void_p) :] if pid]

    def kill(self, mark: str, pids: Iterable[int], *, hard: bool) -> None:
        if hard:
            handle = self.call("OpenJobObjectW", 8, 0, mark)
            self.call("TerminateJobObject", handle, 1)
            self.call("CloseHandle", handle)
            return
        for pid in self.jobs.keys() & set(pids):  # who leads a group that this process has started
            with contextlib.suppress(OSError):  # no console
                os.kill(pid, getattr(signal, "CTRL_BREAK_EVENT", 1))

    def escapes(self) -> None:
        for output in (-11, -12):
            self.call("SetConsoleMode", self.call("GetStdHandle", output), 7)


SYSTEM = _Windows() if os.name == "nt" else System()


def handle_signals(
    handler: Callable[[int, Any], None], bell: int | None, *, worker: bool = False
) -> contextlib.ExitStack:
    """Handle what asks to stop, but leave a hang-up ignored under nohup; all signals ring the bell.

    To close what is returned puts everything back as it was.
    """
    before = contextlib.ExitStack()
    for number in STOP_SIGNALS:
        if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
            before.callback(signal.signal, number, signal.signal(number, handler))
    if bell is not None:
        before.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(bell, warn_on_full_buffer=False))
    before.callback(SYSTEM.settle(worker=worker))
    return before


# --- rules: pure functions -----------------------------------------------------------------------

SECONDS = {"w": 604800, "d": 86400, "h": 3600, "m": 60, "s": 1}
FOREVER = 10 * 365 * 86400.0  # no duration is longer, so that no sum of times overflows


def must(condition: object, be: str) -> None:
    """Refuse a value that does not meet a condition: the usual way of a check to say no."""
    if not condition:
        raise ValueError(f"must {be}")


def checked(name: str, check: Callable[[Any], Any], value: object) -> Any:
    """Return a value as its check reads it, or raise BadInput that names it."""
    try:
        return check(value)
    except ValueError as error:
        raise BadInput(f"{name} {error}") from None


def within(low: float, value: Any, high: float, be: str, kind: Any = (int, float)) -> Any:
    """Return a number in a range, which a bool never is, nor is NaN."""
    must(isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high, be)
    return value


def whole(low: int, high: int) -> Callable[[object], int]:
    """Return a check for a whole number in a range."""
    be = f"be a whole number from {low} to {high}"
    return lambda value: int(within(low, value, high, be, int))


def seconds(value: Any) -> float:
    """Return a duration in seconds: a number, or `90`, `90s`, `5m`, `1h30m`, `2d`, `1.5h`."""
    if isinstance(value, str):
        word, number = value.strip().lower(), r"(\d+(?:\.\d*)?|\.\d+)"
        if re.fullmatch(f"{number}|({number}[smhdw])+", word):
            parts = re.findall(f"{number}([smhdw]?)", word)
            value = sum(float(count) * SECONDS[unit or "s"] for count, unit in parts)
    be = "be a duration between 0 and 10 years, such as 90, 90s, 5m or 1h30m"
    return float(within(0, value, FOREVER, be))


def moment(value: Any) -> float:
    """Return Unix seconds: a number of them, or ISO 8601, local time where it has no offset."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d{9,11}(\.\d*)?\s*", value):
        value = float(value)
    elif isinstance(value, str):
        with contextlib.suppress(ValueError, OverflowError, OSError):
            value = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", value.strip())).timestamp()
    be = "be a time between 1970 and 9999, such as 2030-01-31T08:00 or 2030-01-31T08:00Z"
    return float(within(0, value, 253402214400, be))  # wherever that is


def valid_text(value: Any) -> str:
    """Check something that the operating system will be given: no NUL, nothing but Unicode."""
    must(isinstance(value, str), "be a string")
    must(value == value.encode(errors="ignore").decode(), "be valid Unicode")
    must("\0" not in value, "not contain NUL")
    return str(value)


def valid_command(value: object) -> str:
    """Check a shell line: not blank, and not longer than the system can start."""
    line, limit = valid_text(value), SYSTEM.COMMAND_LIMIT
    must(line.strip(), "not be blank")
    must(len(line.encode()) <= limit, f"not be longer than {limit} bytes; put it into a script")
    return line


def valid_name(value: object) -> str:
    """Check the name of a job or a queue: something that can be typed, seen and told apart."""
    word = valid_text(value)
    fits = re.fullmatch(r"[^\s,-][^\s,]{0,199}", word) and word.isprintable()
    must(fits, "be 1 to 200 printable characters, without blanks, commas or a leading '-'")
    return word


def valid_names(value: Any) -> list[str]:
    """Check a list of names; a string has commas between them."""
    items = [value] if isinstance(value, str) else value
    strings = isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items)
    must(strings, "be a list of ids, which are strings")
    names = ",".join(items).split(",") if items else []
    must(all(names), "have no empty id")
    return [valid_name(name) for name in names]


MONTHS, DAYS = "jan feb mar apr may jun jul aug sep oct nov dec", "sun mon tue wed thu fri sat"
CRON = ((0, 59, ""), (0, 23, ""), (1, 31, ""), (1, 12, MONTHS), (0, 7, DAYS))  # low, high, names
CRON_WORDS = {
    "@hourly": "0 * * * *",
    **dict.fromkeys(("@daily", "@midnight"), "0 0 * * *"),
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    **dict.fromkeys(("@yearly", "@annually"), "0 0 1 1 *"),
}


def cron_field(field: str, low: int, high: int, words: str) -> set[int]:
    """Return the values of one field: `*`, `5`, `1-5`, `*/15`, `mon-fri`, or a list of those."""
    values: set[int] = set()
    numbers = field
    for number, word in enumerate(words.split(), low):
        numbers = re.sub(rf"(?<!/)\b{word}\b", str(number), numbers)
    for part in numbers.split(","):
        match = re.fullmatch(r"(?:\*|(\d+)(?:-(\d+))?)(?:/([1-9]\d*))?", part)
        if not match:
            raise ValueError(f"has a field {field!r} that is no number, range, list or *")
        first, last, step = match.groups()
        begin, end = int(first or low), int(last or (first if first and not step else high))
        if not low <= begin <= end <= high:
            order = ", the lower one first" if last else ""
            raise ValueError(f"has {field!r} where {low} to {high} is meant{order}")
        values.update(range(begin, end + 1, int(step or 1)))
    return values


def cron_next(rule: str, after: float) -> float:
    """Return the first time after a time that a rule of five fields names, in local time.

    As in cron, a day has to match either of day and weekday where both are restricted. A time that
    the clock skips in spring counts an hour later; one that comes twice in autumn counts once,
    unless the rule is for every hour.
    """
    fields = CRON_WORDS.get(rule.strip().lower(), rule).lower().split()
    be = f"have five fields: minute hour day month weekday, or be one of {' '.join(CRON_WORDS)}"
    must(len(fields) == 5, be)
    minutes, hours, days, months, weekdays = (cron_field(f, *of) for f, of in zip(fields, CRON))
    enough = all if "*" in (fields[2][0], fields[4][0]) else any
    folds = (0, 1) if len(hours) == 24 else (0,)
    clocks = [(h, m, fold) for h in hours for m in minutes for fold in folds]
    day = datetime.fromtimestamp(after, timezone.utc).astimezone()
    day = day.replace(second=0, microsecond=0, tzinfo=None)
    for _ in range(8 * 366 + 2):  # the 29th of February is at most 8 years away
        match = day.day in days, bool({day.isoweekday(), day.isoweekday() % 7} & weekdays)
        if day.month in months and enough(match):
            times = [day.replace(hour=h, minute=m, fold=f).timestamp() for h, m, f in clocks]
            if max(times) > after:
                return min(when for when in times if when > after)
        day += timedelta(days=1)
    raise ValueError("names a day that never comes")


def valid_cron(value: object) -> str:
    """Check a rule of five fields."""
    rule = valid_text(value)
    cron_next(rule, time.time())
    return rule


def recurrence(recurs: str, planned: float, now: float) -> float:
    """Return when a schedule's next job is due: by the schedule, and none of what was missed."""
    kind, _, rule = recurs.partition(" ")
    if kind == "cron":
        return cron_next(rule, max(planned, now))
    return planned + float(rule) * max(1, (now - planned) // float(rule) + 1)


def valid_directory(value: object) -> str:
    """Check a directory, which need not exist yet, and make it absolute."""
    path = valid_text(value)
    must(path, "not be empty")
    return os.path.abspath(path)


def valid_environment(value: Any) -> dict[str, str]:
    """Check a mapping of names of environment variables to their values."""
    be = 'be an object of strings such as {"NAME": "value"}'
    must(isinstance(value, Mapping) and all(isinstance(v, str) for v in value.values()), be)
    for key, item in value.items():
        must(valid_text(key) and "=" not in key, "have names that are not empty and without '='")
        valid_text(item)
    return dict(value)


FIELDS: dict[str, Callable[[object], Any]] = {  # what a job may be given, each with its check
    "id": valid_name,
    "command": valid_command,
    "queue": valid_name,
    "priority": whole(-1_000_000, 1_000_000),
    "delay": seconds,
    "run_at": moment,
    "timeout": seconds,
    "max_retries": whole(1, 1_000_000),
    "cwd": valid_directory,
    "env": valid_environment,
    "after": valid_names,
    "every": lambda value: within(1, seconds(value), FOREVER, "be at least 1 second"),
    "cron": valid_cron,
}


def printable(value: str) -> str:
    """Escape whatever could move the cursor, change colours or reorder text on a terminal."""
    if value.isprintable():
        return value
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ": did you mean X?" for a mistyped word, or the choices where none is near."""
    import difflib

    choices = list(known)
    close = difflib.get_close_matches(word, choices, 1, 0.7)
    return f": did you mean {close[0]}?" if close else f"; known are {', '.join(choices)}"


CONFLICTS = (("delay", "run_at"), ("delay", "cron"), ("run_at", "cron"), ("every", "cron"))


def check_fields(fields: Mapping[str, object]) -> dict[str, Any]:
    """Return the checked fields of a job, or raise BadInput that names the first bad one."""
    job = {}
    for key, value in fields.items():
        if key not in FIELDS:
            raise BadInput(f"unknown field {printable(key)}{nearest(key, FIELDS)}")
        job[key] = checked(key, FIELDS[key], value)
    if "command" not in job:
        raise BadInput("a job needs a command")
    for one, other in CONFLICTS:
        if one in job and other in job:
            raise BadInput(f"a job has {one} or {other}, not both")
    return job


class Setting(NamedTuple):
    """One configuration key: what it is when unset, how a value is read, and what it means."""

    default: Any
    read: Callable[[str], Any]
    meaning: str


def literal(value: str) -> int | str:
    """Return the whole number that a word is, else the word."""
    return int(value) if re.fullmatch(r"[+-]?\d{1,18}", value.strip()) else value


def number_in(low: int, high: int) -> Callable[[str], int]:
    """Return a reader for a whole number in a range."""
    return lambda value: whole(low, high)(literal(value))


def base(value: str) -> float:
    """Read the base of the backoff."""
    be, number = "be a number from 1 to 1000", None
    with contextlib.suppress(ValueError):
        number = float(value)
    return float(within(1, number, 1000, be))


def prefix(value: str) -> tuple[str, ...]:
    """Read an argument vector, to which a job's command is added."""
    must(value.strip(), "be a command prefix such as 'bash -ec'")
    try:
        return tuple(SYSTEM.words(valid_text(value)))
    except ValueError as error:
        raise ValueError(f"must be a command prefix: {error}") from None


def exit_codes(value: str) -> tuple[int, ...]:
    """Read a list of exit codes; it may be empty."""
    codes, be = value.split(",") if value.strip() else [], "be like 2,126,127, each from 1 to 255"
    return tuple(within(1, literal(code), 255, be, int) for code in codes)


def durability(value: str) -> str:
    """Read one of the two durabilities."""
    must(value in ("normal", "full"), "be normal or full")
    return value


SETTINGS = {
    "max_retries": Setting(3, number_in(1, 10**6), "how often a job is tried, the first included"),
    "backoff_base": Setting(2.0, base, "a retry waits this ** attempts seconds (1 to 1000)"),
    "backoff_max": Setting(86400.0, seconds, "but never longer than this many seconds"),
    "timeout": Setting(300.0, seconds, "how long an attempt may take (0: no limit)"),
    "kill_grace": Setting(5.0, seconds, "from TERM to KILL when a job is ended"),
    "output_limit": Setting(65536, number_in(0, 1 << 28), "how many bytes of output are kept"),
    "shell": Setting(SYSTEM.SHELL, prefix, "what runs a command: the command is its last argument"),
    "max_snoozes": Setting(20, number_in(0, 10**6), "how often a job may exit 75: try me later"),
    "no_retry_exit_codes": Setting((), exit_codes, "exit codes that are final, such as 2,126,127"),
    "retention": Setting(0.0, seconds, "when what completed or was cancelled is pruned (0: never)"),
    "synchronous": Setting("normal", durability, "full: each result synced before the next claim"),
}


def check_setting(key: str, value: str | None = None) -> str:
    """Return the key as it is stored, or raise BadInput for an unknown key or a bad value."""
    key = key.replace("-", "_")
    if key not in SETTINGS:
        raise BadInput(f"unknown key {printable(key)}{nearest(key, SETTINGS)}")
    if value is not None:
        checked(key, SETTINGS[key].read, value)
    return key


def backoff(attempts: int, config: Mapping[str, Any]) -> float:
    """Return the seconds to wait after that many failed attempts."""
    with contextlib.suppress(OverflowError):
        return float(min(config["backoff_base"] ** attempts, config["backoff_max"]))
    return float(config["backoff_max"])


def signal_name(number: int) -> str:
    """Return SIGKILL for 9, and the number itself where it has no name."""
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def exit_meaning(code: int) -> str | None:
    """Return why an exit code (negative: a signal, as in subprocess) is a failure, else None."""
    if code <= 0:
        return f"killed by {signal_name(-code)}" if code else None
    gone = "command not found"
    meaning = {TRY_LATER: "try later", 126: "not executable", 127: gone, 9009: gone}.get(code)
    if 128 < code <= 128 + 64:
        meaning = f"128 + {signal_name(code - 128)}"
    return f"exit code {code} ({meaning})" if meaning else f"exit code {code}"


def iso(when: float | None) -> str | None:
    """Return Unix seconds as ISO 8601 in local time with its offset."""
    if when is None:
        return None
    return datetime.fromtimestamp(when, timezone.utc).astimezone().isoformat("T", "milliseconds")


def span(duration: float) -> str:
    """Return a duration in at most two units: 0.004 s, 42 s, 3m20s, 2h, 5d."""
    if duration < 59.5:
        digits = 3 if duration < 0.1 else 2 if duration < 10 else 0
        return f"{round(duration, digits):g} s"
    parts, rest = [], round(duration)
    for unit, size in SECONDS.items():
        if rest >= size:
            parts.append(f"{rest // size}{unit}")
            rest %= size
    return "".join(parts[:2])


def several(words: Iterable[str]) -> list[str]:
    """Return words as a list; a string is one word, and not its letters."""
    return [words] if isinstance(words, str) else list(words)


# --- SQL -----------------------------------------------------------------------------------------

APPLICATION_ID = 0x51554354  # "QUCT"
GET_APPLICATION_ID = "PRAGMA application_id"
GET_VERSION = "PRAGMA user_version"
GUEST_KEY = "queuectl_schema"
GET_GUEST_VERSION = f"SELECT value FROM config WHERE key = '{GUEST_KEY}'"
SET_WAL = "PRAGMA journal_mode = WAL"
SET_SYNCHRONOUS = {"full": "PRAGMA synchronous = full", "normal": "PRAGMA synchronous = normal"}
SET_WAIT, SET_NO_WAIT = "PRAGMA busy_timeout = 200", "PRAGMA busy_timeout = 0"
OUTER = ("BEGIN IMMEDIATE", "COMMIT", "ROLLBACK")
# A part that failed is undone, but stays open until it is released.
INNER = ("SAVEPOINT part", "RELEASE part", "ROLLBACK TO part", "RELEASE part")
GET_DATA_VERSION = "PRAGMA data_version"  # changes when another connection has written
PRAGMAS = (  # of every connection
    "PRAGMA fullfsync = 1",  # on macOS, down to the medium
    "PRAGMA temp_store = memory",  # else a batch writes each row's rollback journal to a file
)
TRUNCATE_WAL = "PRAGMA wal_checkpoint(TRUNCATE)"
SINCE_2 = """  -- what version 2 brought
CREATE INDEX jobs_state ON jobs (state, due, updated_at);
CREATE INDEX jobs_series ON jobs (series, seq) WHERE series IS NOT NULL;
CREATE INDEX jobs_recurs ON jobs (series) WHERE recurs IS NOT NULL;
CREATE TABLE needs (                    -- a child is blocked until the parent has completed: met
  parent INTEGER NOT NULL, child INTEGER NOT NULL, met INTEGER NOT NULL,
  PRIMARY KEY (parent, child)
) WITHOUT ROWID;
CREATE INDEX needs_child ON needs (child, met);
CREATE TABLE paused (queue TEXT PRIMARY KEY) WITHOUT ROWID;  -- '': all of them
CREATE TABLE counts (
  queue TEXT NOT NULL, state TEXT NOT NULL, due INTEGER NOT NULL, jobs INTEGER NOT NULL,
  PRIMARY KEY (queue, state, due)
) WITHOUT ROWID;
INSERT INTO counts SELECT queue, state, due, count(*) FROM jobs GROUP BY queue, state, due;
CREATE TRIGGER count_added AFTER INSERT ON jobs BEGIN
  INSERT INTO counts VALUES (new.queue, new.state, new.due, 1)
    ON CONFLICT (queue, state, due) DO UPDATE SET jobs = jobs + 1;
END;
CREATE TRIGGER count_moved AFTER UPDATE OF state, due ON jobs
  WHEN old.state <> new.state OR old.due <> new.due BEGIN
  UPDATE counts SET jobs = jobs - 1 WHERE queue = old.queue AND state = old.state AND due = old.due;
  INSERT INTO counts VALUES (new.queue, new.state, new.due, 1)
    ON CONFLICT (queue, state, due) DO UPDATE SET jobs = jobs + 1;
END;
CREATE TRIGGER count_gone AFTER DELETE ON jobs BEGIN
  UPDATE counts SET jobs = jobs - 1 WHERE queue = old.queue AND state = old.state AND due = old.due;
END;
PRAGMA user_version = 2;
"""
SCHEMA = (  # what brings each version up to date: a new file, and one of version 1
    f"PRAGMA application_id = {APPLICATION_ID};"
    """
CREATE TABLE jobs (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
  queue TEXT NOT NULL, command TEXT NOT NULL, cwd TEXT NOT NULL, env TEXT,
  state TEXT NOT NULL, priority INTEGER NOT NULL,
  attempts INTEGER NOT NULL DEFAULT 0, max_retries INTEGER, timeout REAL,
  created_at REAL NOT NULL, updated_at REAL NOT NULL, run_after REAL NOT NULL,
  locked_by TEXT, locked_at REAL, exit_code INTEGER, last_error TEXT,
  run INTEGER NOT NULL DEFAULT 0, cancelling INTEGER NOT NULL DEFAULT 0,
  due INTEGER NOT NULL,                 -- 0 while run_after is ahead: then no claim walks over it
  snoozes INTEGER NOT NULL DEFAULT 0, recurs TEXT, series TEXT, planned REAL
);
CREATE INDEX jobs_due ON jobs (queue, priority DESC, run_after, seq)
  WHERE state = 'pending' AND due = 1;
CREATE INDEX jobs_later ON jobs (queue, run_after) WHERE state = 'pending' AND due = 0;
CREATE TABLE attempts (
  job INTEGER NOT NULL, run INTEGER NOT NULL, worker TEXT NOT NULL,
  started REAL NOT NULL, finished REAL NOT NULL, exit_code INTEGER, error TEXT,
  cut INTEGER NOT NULL, output BLOB NOT NULL, PRIMARY KEY (job, run)
) WITHOUT ROWID;
CREATE TABLE config (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
""" + SINCE_2,
    """
ALTER TABLE jobs ADD COLUMN snoozes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN recurs TEXT;
ALTER TABLE jobs ADD COLUMN series TEXT;
ALTER TABLE jobs ADD COLUMN planned REAL;
DROP INDEX jobs_state;
DROP TRIGGER count_added;
DROP TRIGGER count_moved;
DROP TRIGGER count_gone;
DROP TABLE counts;
UPDATE jobs SET due = 1 WHERE state <> 'pending' AND due <> 1;
"""
    + SINCE_2,
)

JOB = "SELECT " + ", ".join(Job._fields) + " FROM jobs "
LAST_SEQ = "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'jobs'"
NEW = """seq id queue command cwd env priority max_retries timeout created_at updated_at run_after
due recurs series planned""".split()
VALUES = ", ".join(":" + column for column in NEW)
INSERT = f"INSERT OR IGNORE INTO jobs (state, {', '.join(NEW)}) VALUES ('pending', {VALUES})"
IDS_BETWEEN = """
SELECT seq, coalesce(series, id) FROM jobs
WHERE seq BETWEEN :first AND :last ORDER BY seq LIMIT 1000"""
BY_ID = JOB + "WHERE id = :id"
LAST_RUN = JOB + "WHERE series = :id AND run > 0 ORDER BY seq DESC LIMIT 1"
NEWEST = JOB + "WHERE series = :id ORDER BY seq DESC LIMIT 1"
RECENT_IDS = "SELECT id FROM jobs ORDER BY seq DESC LIMIT 1000"
IN_QUEUE = "(:queue IS NULL OR queue = :queue)"
ALL = JOB + f"WHERE seq > :seq AND {IN_QUEUE} ORDER BY seq LIMIT 1000"
IN_STATE = JOB + f"WHERE state = :state AND due = :due AND {IN_QUEUE} "
LATEST = IN_STATE + "ORDER BY updated_at DESC, seq DESC LIMIT :limit"
OLDEST = IN_STATE + "ORDER BY updated_at LIMIT :limit"  # of a due job: when it became due
GOES_ON = "recurs IS NOT NULL AND state IN ('pending', 'processing')"
SCHEDULE = JOB + "WHERE series = :id AND " + GOES_ON
RECURRING = JOB + f"INDEXED BY jobs_recurs WHERE {GOES_ON} ORDER BY series"
RECENT_LIMIT = 5000
RECENT = f"""
SELECT count(*), min(updated_at) FROM (
  SELECT updated_at FROM jobs WHERE state = :state AND due = 1 AND updated_at > :since
    AND {IN_QUEUE}
  ORDER BY updated_at DESC LIMIT {RECENT_LIMIT})"""
TALLY = "SELECT queue, state, due, jobs FROM counts WHERE jobs > 0"
ATTEMPTS = "SELECT " + ", ".join(Attempt._fields) + " FROM attempts WHERE job = :seq ORDER BY run"

WAITING_QUEUES = """
SELECT queue, min(due) FROM counts WHERE state = 'pending' AND due >= 0 AND jobs > 0
  AND queue NOT IN paused AND '' NOT IN paused GROUP BY queue"""
NEXT_DUE = f"""
{JOB}WHERE state = 'pending' AND due = 1 AND queue = :queue
ORDER BY priority DESC, run_after, seq LIMIT 1"""
BEFORE = """
SELECT count(*) FROM (
  SELECT 1 FROM jobs WHERE state = 'pending' AND due = 1 AND queue = :queue
    AND priority > :priority
  UNION ALL SELECT 1 FROM jobs WHERE state = 'pending' AND due = 1 AND queue = :queue
    AND priority = :priority AND (run_after, seq) < (:run_after, :seq) LIMIT 100000)"""
# In slices: among more than 500 that become due at once, a high priority may come late.
MAKE_DUE = """
UPDATE jobs SET due = 1, updated_at = run_after WHERE seq IN (  -- OLDEST goes by when it became due
  SELECT seq FROM jobs WHERE state = 'pending' AND due = 0 AND queue = :queue
    AND run_after <= :now ORDER BY run_after LIMIT 500)"""
NEXT_LATER = """
SELECT min(run_after) FROM jobs WHERE state = 'pending' AND due = 0 AND queue = :queue"""
# A drain waits for the retry of a schedule's job, not for its next one.
NEXT_AWAITED = NEXT_LATER + " AND (recurs IS NULL OR run > 0)"
CLAIM = """
UPDATE jobs SET state = 'processing', attempts = attempts + 1, run = run + 1,
  locked_by = :worker, locked_at = :now, updated_at = :now
WHERE seq = :seq AND state = 'pending'"""
FINISH = """
UPDATE jobs SET state = :state, attempts = :attempts, exit_code = :exit_code,
  last_error = :last_error, run_after = :run_after, due = :due, updated_at = :updated_at,
  snoozes = :snoozes, recurs = :recurs, locked_by = NULL, locked_at = NULL, cancelling = 0
WHERE seq = :seq AND state = 'processing' AND locked_by = :worker AND run = :run"""
ADD_ATTEMPT = "INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
CLAIMED = JOB + "WHERE state = 'processing'"
RETRY = """
UPDATE jobs SET state = 'pending', attempts = 0, snoozes = 0, updated_at = :now,
  exit_code = NULL, last_error = NULL,
  run_after = CASE WHEN run = 0 THEN max(run_after, :now) ELSE :now END,  -- not before its time
  due = CASE WHEN EXISTS (SELECT 1 FROM needs WHERE child = seq AND met = 0) THEN -1
    ELSE run > 0 OR run_after <= :now END
WHERE seq = :seq AND state IN ('dead', 'cancelled')"""
ALL_DEAD = "SELECT id, seq, run FROM jobs WHERE state = 'dead' ORDER BY updated_at"
CANCEL_WAITING = """
UPDATE jobs SET state = 'cancelled', due = 1, updated_at = :now,
  last_error = 'cancelled by the operator'
WHERE seq = :seq AND state = 'pending'"""
CANCEL_RUNNING = "UPDATE jobs SET cancelling = 1 WHERE seq = :seq AND state = 'processing'"

NEED = "INSERT OR IGNORE INTO needs VALUES (:parent, :child, :met)"
MEET = "UPDATE needs SET met = 1 WHERE parent = :seq"
UNBLOCK = """
UPDATE jobs SET due = run_after <= :now, updated_at = :now
WHERE seq IN (SELECT child FROM needs WHERE parent = :seq)
  AND +state = 'pending' AND +due = -1  -- +: no index, which would lead to all that are blocked
  AND NOT EXISTS (SELECT 1 FROM needs WHERE child = jobs.seq AND met = 0)"""
PARENTS = f"""
{JOB}JOIN needs ON parent = seq WHERE child = :seq AND met = 0 ORDER BY parent LIMIT 100"""
COUNT_CHILDREN = """
SELECT count(*) FROM needs JOIN jobs ON seq = child
WHERE parent = :seq AND met = 0 AND state = 'pending'"""
CHILDREN = JOB + "JOIN needs ON child = seq WHERE parent = :seq AND met = 0"
BELOW = f"""
WITH RECURSIVE below (child) AS (
  SELECT child FROM needs WHERE parent = :seq AND met = 0
  UNION SELECT needs.child FROM needs JOIN below ON parent = below.child WHERE met = 0)
{JOB}WHERE seq IN below"""

SLICE = 200  # jobs in a transaction of `prune`
PRUNABLE = f"""
SELECT seq FROM jobs WHERE state = :state AND due = 1 AND updated_at <= :before
  AND NOT EXISTS (SELECT 1 FROM needs WHERE parent = jobs.seq AND met = 0)
ORDER BY updated_at LIMIT {SLICE}"""
FORGET = (
    "DELETE FROM attempts WHERE job = :seq",
    "DELETE FROM needs WHERE parent = :seq",
    "DELETE FROM needs WHERE child = :seq",
    "DELETE FROM jobs WHERE seq = :seq",
)
PAUSED = "SELECT queue FROM paused"
PAUSE = "INSERT OR IGNORE INTO paused VALUES (:queue)"
RESUME = "DELETE FROM paused WHERE :queue IN ('', queue)"

SETTINGS_STORED = "SELECT key, value FROM config"
SET = "INSERT INTO config VALUES (:key, :value) ON CONFLICT (key) DO UPDATE SET value = :value"
UNSET = "DELETE FROM config WHERE key = :key"

# --- run directory: what is alive now, as locked files -------------------------------------------


class LockFile:
    """A file of the run directory that this process made and has locked."""

    def __init__(self, path: str) -> None:
        """Make and lock the file; one that a cleaner removed meanwhile is made again."""
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | BINARY | getattr(os, "O_NOFOLLOW", 0)
        while True:
            self.fd = os.open(path, flags, 0o600)
            with contextlib.suppress(FileNotFoundError):
                if SYSTEM.lock(self.fd) and os.path.samestat(os.fstat(self.fd), os.stat(path)):
                    return
            os.close(self.fd)
            time.sleep(0.001)  # somebody looks at it, or removes it

    def note(self, **facts: object) -> None:
        """Replace the text of the file, which tells others what its holder is doing."""
        os.ftruncate(self.fd, 0)
        with contextlib.suppress(OSError):  # a full disk: what matters is the lock
            os.write(self.fd, json.dumps(facts).encode())

    def close(self) -> None:
        """Give up this process's hold on the lock, and remove the file."""
        SYSTEM.drop(self.fd, self.path)


def pool_of(worker: str) -> str:
    """Return the name of a worker's pool: a worker's name is worker-POOL-NUMBER."""
    return "pool-" + worker.split("-")[1]


class RunDirectory:
    """The directory beside the database: locks, attempts' output, bells and stop requests."""

    def __init__(self, db: str) -> None:
        """Name the run directory of a database; `make` makes it."""
        self.db, self.path, self.inode = db, db + ".run", 0

    def make(self) -> None:
        """Make the directory, for the owner alone whatever the umask."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.path, 0o700)
            os.chmod(self.path, 0o700)

    def mark(self, job: Job) -> str:
        """Return what every process of an attempt has in its environment, as QUEUECTL_RUN.

        The inode tells them from those of a copy of the queue; it stays when the queue is moved.
        """
        self.inode = self.inode or os.stat(self.db).st_ino
        return f"{job.key}.{self.inode}"

    def file(self, *parts: object) -> str:
        """Return the path of a file in the directory."""
        return os.path.join(self.path, ".".join(str(part) for part in parts))

    def files(self, start: str = "", end: str = "") -> list[str]:
        """Return the names that start and end so; none where there is no directory."""
        try:
            found = os.listdir(self.path)
        except FileNotFoundError:
            return []
        return sorted(item for item in found if item.startswith(start) and item.endswith(end))

    def free(self, *parts: object) -> bool:
        """Tell whether nobody holds the lock of a file; one that does not exist is free."""
        try:
            with open(self.file(*parts), "r+b", buffering=0) as file:
                return SYSTEM.lock(file.fileno(), shared=True)
        except SYSTEM.GONE:
            return True

    def noted(self, *parts: object) -> dict[str, Any]:
        """Return what the holder of a file says about itself, as far as it can be read."""
        garbled = contextlib.suppress(OSError, ValueError, TypeError)
        with garbled, open(self.file(*parts), "rb") as file:
            return dict(json.load(file))
        return {}

    def living(self, kind: str) -> dict[str, dict[str, Any]]:
        """Return the living pools or workers: each one's name and what it says about itself."""
        held = (item for item in self.files(kind + "-") if "." not in item)
        return {item: self.noted(item) for item in held if not self.free(item)}

    def ring(self) -> None:
        """Wake every pool: there may be work. Never waits, and nobody listening is fine."""
        with contextlib.suppress(OSError):  # the work is stored; a pool finds it within a TICK
            for bell in self.files("pool-", ".bell"):
                with contextlib.suppress(OSError):  # ENXIO: its pool is gone
                    fd = os.open(self.file(bell), os.O_WRONLY | os.O_NONBLOCK)
                    with open(fd, "wb", buffering=0) as pipe:
                        pipe.write(b"!")

    def stop_asked(self, pool: str) -> str:
        """Return how a pool was asked to stop: "stop", "now", or "" if it was not."""
        return next((w for w in ("now", "stop") if os.path.exists(self.file(pool, w))), "")

    def clean(self, claimed: Sequence[Job]) -> None:
        """Remove what the dead left behind, but not what tells about jobs to be recovered."""
        keep = {job.locked_by for job in claimed} | {f"{job.seq}.{job.run}" for job in claimed}
        for item in self.files():
            attempt = re.match(r"\d+\.\d+(?=\.)", item)
            owner = attempt or re.match("(pool|worker)-[^.]+", item)
            if owner and owner[0] not in keep and self.free(item if attempt else owner[0]):
                with contextlib.suppress(OSError):
                    self.remove(item, lock=bool(attempt) or item == owner[0])

    def remove(self, item: str, *, lock: bool) -> None:
        """Remove a file; one that is a lock only if nobody has taken it meanwhile."""
        if not lock:
            os.unlink(self.file(item))
        elif SYSTEM.lock(fd := os.open(self.file(item), os.O_RDWR | BINARY)):
            SYSTEM.drop(fd, self.file(item))
        else:
            os.close(fd)


# --- database: open, migrate, transactions, errors -----------------------------------------------

PATIENCE = 30.0  # seconds that a command waits for another program's write lock


def statements(script: str) -> Iterator[str]:
    """Split a script into its statements."""
    pending = ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            yield pending
            pending = ""


def schema_version(db: sqlite3.Connection) -> int:
    """Return the version of the queue's tables, 0 where there are none."""
    if db.execute(GET_APPLICATION_ID).fetchone()[0] == APPLICATION_ID:
        return int(db.execute(GET_VERSION).fetchone()[0])
    try:
        row = db.execute(GET_GUEST_VERSION).fetchone()
    except sqlite3.OperationalError as error:
        if "no such" not in str(error):  # table, or column of another program's table
            raise
        row = None
    return int(row[0]) if row else 0


def migrate(db: sqlite3.Connection, *, guest: bool) -> None:
    """Bring the schema up to date; the changes and their number commit together.

    The numbers that SQLite keeps in a file are its owner's. As a guest in another program's
    database, the queue keeps its version among its settings.
    """
    if db.in_transaction:  # a reader refused the last try's COMMIT
        db.execute(OUTER[2])
    db.execute(OUTER[0])
    version = schema_version(db)
    ours = db.execute(GET_APPLICATION_ID).fetchone()[0] == APPLICATION_ID
    guest = not ours and (guest or version > 0)
    script = SCHEMA[version] if version < len(SCHEMA) else ""  # another process was faster
    for statement in statements(script):
        if not (guest and statement.startswith("PRAGMA")):
            db.execute(statement)
    if guest:
        db.execute(SET, {"key": GUEST_KEY, "value": str(len(SCHEMA))})
    db.execute(OUTER[1])


class Opened(sqlite3.Connection):
    """A connection that knows its file, and whether it is closed or was inherited by a fork."""

    path, unusable = "", False

    def close(self) -> None:
        """Close it; only its own thread may."""
        super().close()
        self.unusable = True


OPEN: list[weakref.ref[Opened]] = []  # the connections of this process
IN_USE: dict[int, list[Opened]] = {}  # by thread: what its fork must not lose, lest it be closed
INHERITED: dict[str, Opened] = {}  # in a child, by path: what was in use, and is not to be touched


def before_fork() -> None:
    """Close what is idle in this thread, so that a child opens its own.

    SQLite remembers in memory which locks its process holds. A child would inherit that memory but
    not the locks: what it writes would be lost, or destroy the file.
    """
    import gc

    if OPEN:
        gc.collect()  # those of threads that have ended
    found = [db for db in [ref() for ref in list(OPEN)] if db and not db.unusable]
    for db in found:
        with contextlib.suppress(sqlite3.ProgrammingError):  # another thread's
            if not db.in_transaction:
                for cursor in gc.get_referrers(db):  # one that is half read would keep it open
                    if isinstance(cursor, sqlite3.Cursor):
                        cursor.close()
                db.close()
    IN_USE[threading.get_ident()] = [db for db in found if not db.unusable]


def after_fork() -> None:
    """Keep, in the child, away from files that were in use, even when it ends."""
    import ctypes

    for db in IN_USE.pop(threading.get_ident(), ()):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(db))
        INHERITED[db.path], db.unusable = db, True


@lru_cache(maxsize=None)
def prepare_forks() -> None:
    """Have forks looked after from now on."""
    if hasattr(os, "register_at_fork"):
        done = lambda: IN_USE.pop(threading.get_ident(), None)  # noqa: E731
        os.register_at_fork(before=before_fork, after_in_parent=done, after_in_child=after_fork)


class Database:
    """The SQLite file: the one way to it, and the one place that decides what its errors mean.

    A connection belongs to one thread of one process, so that an object may be used from threads
    and after a fork. `patient` says, given the seconds waited for a lock, whether to wait on.
    """

    def __init__(
        self, path: str, *, create: bool = False, readonly: bool = False, guest: bool = False
    ) -> None:
        """Check that the file is ours, or make it; raise Fault and change nothing if it is not.

        As a guest, the queue puts its tables into another program's database.
        """
        self.path = os.path.realpath(path)  # one database has one run directory
        self.mode = "ro" if readonly else "rw"
        self.run_dir = RunDirectory(self.path)
        self.synchronous = "full"
        self.patient: Callable[[float], bool] = lambda waited: waited < PATIENCE
        self._local = threading.local()
        with self.faults():
            if create and not os.path.lexists(path):
                self._create(guest=guest)
            elif os.path.lexists(path) and not os.path.exists(path):
                raise Fault(f"{path} is a link to nothing")
            if self._inspect(guest=guest) < len(SCHEMA):
                with contextlib.closing(self._open("rw")) as db:
                    self._retry(lambda: migrate(db, guest=guest))
                    self._retry(lambda: db.execute(SET_WAL))  # last: what is refused is not changed

    def _create(self, *, guest: bool) -> None:
        """Make the file whole under another name, so that nobody ever sees half of it."""
        where = os.path.dirname(self.path)
        if not os.path.isdir(where):
            raise Fault(f"there is no directory {where}")
        self.run_dir.make()
        with contextlib.closing(LockFile(self.run_dir.file("making"))):
            if os.path.lexists(self.path):
                return
            if os.path.lexists(self.path + "-wal"):  # SQLite would replay it into a new file
                raise Fault(f"{self.path}-wal is there without {self.path}: move it away too")
            for left in self.run_dir.files("new.db"):
                os.unlink(self.run_dir.file(left))
            new = self.run_dir.file("new.db")
            os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            os.chmod(new, 0o600)  # whatever the umask
            with contextlib.closing(sqlite3.connect(new, isolation_level=None)) as db:
                migrate(db, guest=guest)
                db.execute(SET_WAL)  # last: with a -wal, a full disk would show only later
            os.rename(new, self.path)
            with contextlib.suppress(OSError):  # Windows opens no directories
                fd = os.open(where, os.O_RDONLY)
                os.fsync(fd)  # the new name
                os.close(fd)

    def _inspect(self, *, guest: bool) -> int:
        """Return the version of the schema, without writing a byte to the file."""
        try:
            info = os.stat(self.path)
        except FileNotFoundError:
            raise NotFound(f"there is no queue at {self.path}; enqueue makes one") from None
        if not stat.S_ISREG(info.st_mode):
            raise Fault(f"{self.path} is not a file")
        if info.st_size == 0 and not guest:
            raise Fault(f"{self.path} is empty, not a queue; remove it to start a new one")
        self._refuse_planted(info.st_uid)
        immutable = "" if os.path.exists(self.path + "-wal") else "&immutable=1"  # no -wal is made
        with contextlib.closing(self._open("ro" + immutable)) as db:
            version = int(self._retry(lambda: schema_version(db)))
        if not version and not guest:
            raise Fault(f"{self.path} is another program's database, not a queue")
        if version > len(SCHEMA):
            raise Fault(f"{self.path} was made by a newer queuectl (schema {version})")
        return version

    def _refuse_planted(self, owner: int) -> None:
        """Refuse a stranger's -wal. As root, SQLite would make it the owner's when it opens it."""
        if SYSTEM.user() != 0:
            return
        for path in (self.path + "-wal", self.path + "-shm"):
            with contextlib.suppress(FileNotFoundError):
                uid = os.lstat(path).st_uid
                if uid != owner:
                    raise Fault(f"{path} belongs to another user ({uid})")

    def _open(self, mode: str) -> Opened:
        path = re.sub("[%?#]", lambda m: f"%{ord(m[0]):02x}", self.path.replace(os.sep, "/"))
        uri = f"file:{path if path.startswith('/') else '/' + path}?mode={mode}"
        if self.path in INHERITED:
            raise Fault(f"{self.path} was in use, in a transaction or a thread, before the fork")
        prepare_forks()
        db = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None, factory=Opened)
        db.path = self.path
        OPEN.append(weakref.ref(db, OPEN.remove))
        return db

    @property
    def connection(self) -> Opened:
        """The connection of this thread."""
        db: Opened | None = getattr(self._local, "db", None)
        if db is None or db.unusable:
            with self.faults():
                db = self._open(self.mode)
                for pragma in (*PRAGMAS, SET_SYNCHRONOUS[self.synchronous]):
                    self._retry(partial(db.execute, pragma))
            self._local.db, self._local.begun, self._local.ring = db, False, False
        return db

    def fault(self, error: sqlite3.Error) -> Fault:
        """Return our error for one of SQLite's; DatabaseError itself, no subclass, is damage."""
        if type(error) is sqlite3.DatabaseError or "decode" in str(error):  # text is not UTF-8
            return Broken(f"{self.path} is damaged, or not a queue: {error}")
        return Fault(f"{self.path}: {error}")

    @contextlib.contextmanager
    def faults(self) -> Iterator[None]:
        """Turn what SQLite and the file system raise into our errors."""
        try:
            yield
        except sqlite3.Error as error:
            raise self.fault(error) from error
        except OSError as error:
            raise Fault(f"{error.filename or self.path}: {error.strerror}") from error

    def _retry(self, act: Callable[[], Any]) -> Any:
        """Do it again while another connection has the lock, for as long as we are patient.

        SQLite would wait by itself, but no signal handler runs during its wait.
        """
        began, pause = time.monotonic(), 0.0005
        while True:
            try:
                return act()
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                waited = time.monotonic() - began
                if not self.patient(waited):
                    raise Locked(f"{self.path} has been locked for {span(waited)}") from error
            chance = time.perf_counter_ns() % 1000 / 1000  # that two do not try in step
            time.sleep(pause * (0.5 + chance))
            pause = min(pause * 1.5, 0.004)

    def execute(self, sql: str, args: Any = ()) -> sqlite3.Cursor:
        """Execute one statement; within a transaction nothing has to be waited for."""
        db = self.connection
        try:
            if db.in_transaction:
                return db.execute(sql, args)
            return self._retry(lambda: db.execute(sql, args))  # type: ignore[no-any-return]
        except sqlite3.Error as error:
            raise self.fault(error) from error
        except UnicodeEncodeError as error:  # an id or a directory that is not UTF-8
            raise BadInput(f"{error.object!a} is not valid Unicode") from None

    def rows(self, sql: str, args: Any = ()) -> list[Any]:
        """Return all the rows of a query: one that is read slowly would hold up the -wal."""
        try:
            return self.execute(sql, args).fetchall()
        except sqlite3.Error as error:  # damage shows where it is read
            raise self.fault(error) from error

    @contextlib.contextmanager
    def transaction(self, *, ring: bool = False) -> Iterator[sqlite3.Connection]:
        """Write: all of it or, on any exception, nothing. The only place that begins one.

        Within another one it is a part, which may fail alone. `ring` wakes the pools when all of it
        is stored.
        """
        db, local = self.connection, self._local
        inner = local.begun
        if inner and not db.in_transaction:
            raise Fault(f"{self.path}: a statement has ended the transaction")
        begin, end, *back = INNER if inner else OUTER
        self.execute(begin)
        local.begun, local.ring = True, ring or local.ring
        try:
            yield db
            self.execute(end)
        except BaseException:
            for sql in back if not db.unusable and db.in_transaction else ():
                db.execute(sql)
            raise
        finally:
            if not inner:
                local.begun, local.ring, ring = False, False, local.ring
        if ring and not inner:
            self.run_dir.ring()

    def ring_when_stored(self) -> None:
        """Wake the pools as soon as the transaction that is open is stored."""
        self._local.ring = True

    def set_synchronous(self, synchronous: str) -> None:
        """Choose whether each commit is synced (full), or the caller sees to it (normal)."""
        if synchronous != self.synchronous:
            self.synchronous = synchronous
            self.execute(SET_SYNCHRONOUS[synchronous])

    def truncate_wal(self) -> None:
        """Empty the -wal. Nobody writes meanwhile; gives up if readers do not end within 0.2 s."""
        self.execute(SET_WAIT)
        try:
            self.rows(TRUNCATE_WAL)
        finally:
            self.execute(SET_NO_WAIT)

    def close(self) -> None:
        """Close this thread's connection."""
        db: Opened | None = getattr(self._local, "db", None)
        if db and not db.unusable:
            db.close()


def shared_group(gid: int) -> bool:
    """Tell whether a group is more than the private group of the user who runs us."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(SYSTEM.user() or 0), grp.getgrgid(gid)
    except KeyError:
        return True
    return group.gr_name != user.pw_name or any(member != user.pw_name for member in group.gr_mem)


def suspicious(info: os.stat_result, *, directory: bool) -> str | None:
    """Return what makes a file one that others may have written."""
    if not (stat.S_ISDIR if directory else stat.S_ISREG)(info.st_mode):
        return f"is not a {'directory' if directory else 'regular file'}"
    if info.st_nlink > 1 and not directory:
        return "has another name (a hard link)"
    if info.st_uid != SYSTEM.user():
        return f"belongs to another user ({info.st_uid})"
    if info.st_mode & stat.S_IWOTH or (info.st_mode & stat.S_IWGRP and shared_group(info.st_gid)):
        return "may be written by others"
    return None


def distrust(db: Database) -> str | None:
    """Return why somebody else could have put jobs into this queue, or None.

    Looked at after the open, since SQLite replays whatever -wal it finds beside a database.
    """
    if SYSTEM.user() is None:
        return None
    where = os.path.dirname(db.path)
    if os.stat(where).st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
        return f"anybody may replace files in {where}"
    for path in (db.path, db.path + "-wal", db.path + "-shm", db.run_dir.path):
        with contextlib.suppress(FileNotFoundError):
            reason = suspicious(os.lstat(path), directory=path == db.run_dir.path)
            if reason:
                return f"{path} {reason}"
    return None


def network(path: str) -> str | None:
    """Return the type of the network file system that a path is on, where that can be told."""
    best = ("", "")
    with contextlib.suppress(OSError), open("/proc/self/mounts", encoding="utf-8") as mounts:
        for line in mounts:
            point, kind = line.split(" ")[1:3]
            mounted = os.path.join(point.replace("\\040", " "), "")
            if os.path.join(path, "").startswith(mounted):
                best = max((mounted, kind), best, key=lambda found: len(found[0]))  # the later one
    return best[1] if re.match("nfs|cifs|smb|afs|9p|fuse.sshfs", best[1]) else None


# --- queue: the public interface, and the one place where a state changes -------------------------


class Outcome(NamedTuple):
    """How an attempt ended, as whoever watched it saw it; `error` is None if it completed.

    From `started` on, the fields are those of Attempt, in the same order.

    `fate` says who ended it: it "ran" to its end, "timed out", its worker "crashed", or the
    operator had it "returned" to the queue (the attempt does not count) or "cancelled".
    """

    fate: str
    started: float
    finished: float
    exit_code: int | None
    error: str | None
    cut: int = 0
    output: bytes = b""


def after_attempt(job: Job, outcome: Outcome, config: Mapping[str, Any], now: float) -> Job:
    """Return the job as it goes on after an attempt: the one rule of retries."""
    now = min(now, outcome.finished)  # never ahead, also where the clock was set back meanwhile
    after = job._replace(exit_code=outcome.exit_code, last_error=outcome.error, updated_at=now)
    if outcome.fate == "returned" and not job.cancelling:
        when = min(job.run_after, now)  # at once, also where the clock was set back
        after = after._replace(exit_code=job.exit_code, run_after=when)
        return after._replace(state=PENDING, attempts=job.attempts - 1)
    if outcome.error is None:
        return after._replace(state=COMPLETED)
    if outcome.fate == "cancelled" or job.cancelling:
        return after._replace(state=CANCELLED)
    code = outcome.exit_code if outcome.fate == "ran" else None
    final = code in config["no_retry_exit_codes"]
    if code == TRY_LATER and not final and job.snoozes < config["max_snoozes"]:
        after = after._replace(attempts=job.attempts - 1, snoozes=job.snoozes + 1)
        return after._replace(state=PENDING, run_after=now + backoff(after.snoozes, config))
    if final or job.attempts >= (job.max_retries or config["max_retries"]):
        return after._replace(state=DEAD)
    pause = 0 if outcome.fate == "crashed" else backoff(job.attempts, config)
    return after._replace(state=PENDING, run_after=now + pause)


class Queue:
    """A durable queue of shell commands in one SQLite file. Safe to use from threads.

    Times are Unix seconds, durations seconds. Whatever a method was asked for is on disk when it
    returns. Raises QueueError: BadInput, NotFound, or Fault (the database or the machine).
    """

    def __init__(
        self,
        path: str = "queuectl.db",
        *,
        create: bool = True,
        readonly: bool = False,
        guest: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the queue, and make it where there is none (unless told not to).

        With `guest`, a database that belongs to another program gets the tables of a queue beside
        its own (jobs, attempts, config, counts, needs, paused), and is in WAL mode from then on.
        """
        create = create and not readonly
        self.db = Database(path, create=create, readonly=readonly, guest=guest)
        self.clock = clock
        self.settings: dict[str, Any] = {}  # of the last claim or result, for the one who works

    def __enter__(self) -> Queue:
        """Return the queue; leaving the block closes it."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close this thread's connection."""
        self.db.close()

    def transaction(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        """Put what the caller writes to its own tables and what it enqueues into one transaction.

        Yields the connection; all of it is on disk when the block ends, or nothing of it if it
        raises. The caller begins and commits nothing itself.
        """
        return self.db.transaction()

    def _jobs(self, sql: str, **args: object) -> Iterator[Job]:
        return (Job(*row) for row in self.db.rows(sql, args))

    # adding

    def enqueue(self, command: str, *, if_absent: bool = False, **fields: object) -> str:
        """Add a job and return its id.

        Fields: id, queue, priority (higher first), delay or run_at, timeout (0: none),
        max_retries, cwd (default: here), env (a mapping), after (ids of jobs that have to complete
        first), every (seconds) or cron (five fields). With `if_absent` a taken id is no error.
        """
        return next(self.enqueue_many([{"command": command, **fields}], if_absent=if_absent))

    def enqueue_many(
        self, jobs: Iterable[Mapping[str, object]], *, if_absent: bool = False
    ) -> Iterator[str]:
        """Add all the jobs or, where one is bad, none; return their ids in order.

        With `if_absent` a job whose id is taken is left as it is, and its id comes last.
        """
        now, taken, here = self.clock(), [], ""
        with contextlib.suppress(FileNotFoundError):  # it is gone: then each job has to name one
            here = os.getcwd()
        blank = dict.fromkeys(NEW, None)
        blank.update(queue="default", priority=0, cwd=here, created_at=now, updated_at=now)
        with self.db.transaction(ring=True):
            first = seq = self.db.rows(LAST_SEQ)[0][0] + 1
            for fields in jobs:
                job = check_fields(fields)
                if "id" in job and self._taken(job["id"]):
                    if not if_absent:
                        raise BadInput(f"there is a job {job['id']} already")
                    taken.append(job["id"])
                else:
                    seq = self._add({**blank, **job, "seq": seq}, now) + 1
            ids = self._ids(first, seq - 1)
            head = list(islice(ids, 1000))  # now, before they can be pruned; a million: in slices
        return chain(head, ids, taken)

    def _ids(self, first: int, last: int) -> Iterator[str]:
        """Yield the ids of what was added, in slices: see `_all`."""
        while rows := self.db.rows(IDS_BETWEEN, {"first": first, "last": last}):
            yield from (row[1] for row in rows)
            first = rows[-1][0] + 1

    def _taken(self, job_id: str) -> bool:
        """Tell whether a job or a schedule that goes on has that id."""
        return any(self.db.rows(sql, {"id": job_id}) for sql in (BY_ID, SCHEDULE))

    def _add(self, row: dict[str, Any], now: float) -> int:
        """Insert a checked job, and what it waits for; return its number."""
        when = row.get("run_at", now + row.get("delay", 0))
        if "every" in row:
            row.update(recurs=f"every {row['every']:.15g}", planned=when)
        if "cron" in row:
            when = cron_next(row["cron"], now)
            row.update(recurs=f"cron {row['cron']}", planned=when)
        if row["recurs"] and (row["id"] or "").isdecimal():
            raise BadInput("id must not be a number for a schedule: jobs have those")
        if not row["cwd"]:
            raise BadInput("the current directory is gone; cwd names another")
        row["env"] = json.dumps(row["env"]) if row["env"] else None
        try:
            parents = [self.get(parent) for parent in row.get("after", ())]
        except NotFound as error:
            raise BadInput(f"after: {error}") from None
        blocked = any(parent.state != COMPLETED for parent in parents)
        row.update(run_after=when, due=BLOCKED if blocked else when <= now)
        seq = self._insert(row)
        for parent in parents:
            met = parent.state == COMPLETED
            self.db.execute(NEED, {"parent": parent.seq, "child": seq, "met": met})
        return seq

    def _insert(self, row: dict[str, Any]) -> int:
        """Insert a job under its id, which is free, or else its number: the next that is free."""
        given = row["id"]
        while True:
            name = row["id"] = given or str(row["seq"])
            taken = row["recurs"] and not given and self._taken(name)
            if row["recurs"]:
                row.update(series=name, id=self._occurrence(name))
            if not taken and self.db.execute(INSERT, row).rowcount:  # 0: its number is taken
                return int(row["seq"])
            row["seq"] += 1

    def _occurrence(self, series: str) -> str:
        """Return the id of the next job of a schedule: its name and a number."""
        newest = next(self._jobs(NEWEST, id=series), None)
        number = int(newest.id.rpartition(".")[2]) + 1 if newest else 1
        while self._taken(f"{series}.{number}"):
            number += 1
        return f"{series}.{number}"

    # reading

    def get(self, job_id: str) -> Job:
        """Return one job, for a schedule's name the one that goes on or the newest; or NotFound."""
        for sql in (BY_ID, SCHEDULE, NEWEST):
            for job in self._jobs(sql, id=job_id):
                return job
        near = nearest(job_id, (row[0] for row in self.db.rows(RECENT_IDS)))
        near = near if near.startswith(":") else ""
        raise NotFound(f"no job {printable(job_id)} in {self.db.path}{near}")

    def _named(self, ids: Iterable[str]) -> list[Job]:
        """Return the jobs with these ids."""
        return list({job.seq: job for job in map(self.get, several(ids))}.values())

    def jobs(
        self, states: Sequence[str] = (), limit: int | None = None, queue: str | None = None
    ) -> Iterator[Job]:
        """Yield jobs in order of arrival; with a limit, the ones that changed last."""
        states = several(states) or STATES
        if limit is None:
            return (job for job in self._all(queue) if job.state in states)
        latest: list[Job] = []
        for state in states:
            for due in (DUE, LATER, BLOCKED) if state == PENDING else (DUE,):
                latest.extend(self._jobs(LATEST, state=state, due=due, queue=queue, limit=limit))
        latest.sort(key=lambda job: job.updated_at)
        return iter(sorted(latest[-limit:]))

    def _all(self, queue: str | None) -> Iterator[Job]:
        """Yield every job, in slices: who is slow to take them must not hold up the -wal."""
        seq = 0
        while jobs := list(self._jobs(ALL, queue=queue, seq=seq)):
            yield from jobs
            seq = jobs[-1].seq

    def recurring(self) -> list[Job]:
        """Return the waiting or running job of each schedule."""
        return list(self._jobs(RECURRING))

    def last_run(self, job: Job) -> Job:
        """Return the job of the same schedule that ran last, or this one if none has."""
        return next(self._jobs(LAST_RUN, id=job.series), job)

    def parents(self, job: Job) -> list[Job]:
        """Return the jobs, up to 100, that a blocked job waits for."""
        return list(self._jobs(PARENTS, seq=job.seq))

    def count_children(self, job: Job) -> int:
        """Return how many jobs wait for a job."""
        return int(self.db.rows(COUNT_CHILDREN, {"seq": job.seq})[0][0])

    def dead(self) -> list[tuple[str, int, int]]:
        """Return id, number and run of each dead job, in the order in which they died."""
        return self.db.rows(ALL_DEAD)

    def oldest(self, queue: str | None = None) -> Job | None:
        """Return the due job, of one queue or of any, that has waited longest."""
        return next(self._jobs(OLDEST, state=PENDING, due=DUE, queue=queue, limit=1), None)

    def before(self, job: Job) -> int:
        """Return how many due jobs of its queue come before a due job, counted up to 100,000."""
        return int(self.db.rows(BEFORE, job._asdict())[0][0])

    def attempts(self, job: Job) -> list[Attempt]:
        """Return the attempts of a job that have ended, the first one first."""
        return [Attempt(*row) for row in self.db.rows(ATTEMPTS, {"seq": job.seq})]

    def tally(self) -> list[tuple[str, str, int, int]]:
        """Return the number of jobs by queue, state and whether they are due, later or blocked."""
        return self.db.rows(TALLY)

    def counts(self, queues: Sequence[str] = ()) -> dict[str, int]:
        """Return the number of jobs in each state, in these queues or in all."""
        counts, queues = dict.fromkeys(STATES, 0), several(queues)
        for queue, state, _, jobs in self.tally():
            if not queues or queue in queues:
                counts[state] += jobs
        return counts

    def rate(self, queue: str | None = None) -> float:
        """Return how many jobs, of one queue or of any, ended in a second, over the last minute."""
        asked, ended = {"since": self.clock() - 60, "queue": queue}, 0.0
        for state in (COMPLETED, DEAD):
            jobs, first = self.db.rows(RECENT, {"state": state, **asked})[0]
            ended += jobs / max(self.clock() - first, 0.001) if jobs >= RECENT_LIMIT else jobs / 60
        return ended

    def data_version(self) -> int:
        """Return a number that changes when another connection has changed anything."""
        return int(self.db.rows(GET_DATA_VERSION)[0][0])

    def config(self) -> dict[str, Any]:
        """Return the value of every setting."""
        config = {key: setting.default for key, setting in SETTINGS.items()}
        for key, value in self.db.rows(SETTINGS_STORED):
            try:
                if key in SETTINGS:
                    config[key] = SETTINGS[key].read(value)
            except ValueError as error:
                raise Broken(f"{self.db.path}: the setting {key} {error}") from None
        return config

    # operating

    def configure(self, key: str, value: str | None) -> None:
        """Store a setting, written as on the command line; None goes back to the default."""
        key = check_setting(key, value)
        with self.db.transaction(ring=True):
            self.db.execute(UNSET if value is None else SET, {"key": key, "value": value})

    def retry(self, ids: Iterable[str] | None = None) -> list[str]:
        """Put dead or cancelled jobs (all dead ones, where none is named) back, all or none."""
        with self.db.transaction(ring=True):
            if ids is None:
                ids = [row[0] for row in self.dead()]
            jobs = self._named(ids)
            for job in jobs:
                if not self.db.execute(RETRY, {"seq": job.seq, "now": self.clock()}).rowcount:
                    raise NotFound(f"job {job.id} is {job.state}, not dead or cancelled")
                name = {"id": job.series}
                taken = job.recurs and self.db.rows(BY_ID, name)
                if taken or len(self.db.rows(SCHEDULE, name)) > 1:
                    raise BadInput(f"schedule {job.series} goes on already, or its name is taken")
        return [job.id for job in jobs]

    def cancel(self, ids: Iterable[str], *, cascade: bool = False) -> list[Job]:
        """Call off jobs, with `cascade` also those that wait for them; return them as they are now.

        A waiting job is cancelled at once; a running one is `cancelling` until its worker has ended
        it. One that has ended stays as it is. A schedule ends with its waiting or running job.
        """
        with self.db.transaction(ring=True):
            jobs = {job.seq: job for job in self._named(ids)}
            for seq in list(jobs) if cascade else []:
                jobs.update((job.seq, job) for job in self._jobs(BELOW, seq=seq))
            for seq in jobs:
                self.db.execute(CANCEL_WAITING, {"seq": seq, "now": self.clock()})
                self.db.execute(CANCEL_RUNNING, {"seq": seq})
        return [self.get(job.id) for job in jobs.values()]

    def pause(self, queue: str = "") -> None:
        """Start no more jobs of a queue, or of any; running ones go on."""
        with self.db.transaction():
            self.db.execute(PAUSE, {"queue": queue})

    def resume(self, queue: str = "") -> None:
        """Undo `pause` for a queue, or for all of them."""
        with self.db.transaction(ring=True):
            self.db.execute(RESUME, {"queue": queue})

    def paused(self) -> list[str]:
        """Return the paused queues; "" stands for all."""
        return [row[0] for row in self.db.rows(PAUSED)]

    def prune(self, older_than: float = 0, states: Sequence[str] = PRUNED) -> int:
        """Delete jobs that ended so many seconds ago; return how many there were.

        One that a blocked job waits for stays. The work is done in slices, so that nobody else
        waits for long.
        """
        before, total, states = self.clock() - older_than, 0, several(states)
        if not set(states) <= set(ENDED):
            raise BadInput(f"only what is {', '.join(ENDED)} can be pruned")
        for state in states:
            began = time.monotonic()
            while pruned := self.prune_slice(before, state):
                total += pruned
                time.sleep(min(time.monotonic() - began, 0.05))
                began = time.monotonic()
        return total

    def purge(self, ids: Iterable[str]) -> int:
        """Delete dead or cancelled jobs; return how many."""
        with self.db.transaction():
            jobs = self._named(ids)
            for job in jobs:
                if job.state not in (DEAD, CANCELLED):
                    raise NotFound(f"job {job.id} is {job.state}, not dead or cancelled")
                for child in self._jobs(CHILDREN, seq=job.seq):
                    if child not in jobs:
                        raise NotFound(
                            f"job {child.id} waits for {job.id}; cancel and prune it first"
                        )
                self._forget(job.seq)
        return len(jobs)

    def _forget(self, seq: int) -> None:
        for sql in FORGET:
            self.db.execute(sql, {"seq": seq})

    def prune_slice(self, before: float, state: str) -> int:
        """Delete the first few jobs that ended before a time; return how many."""
        with self.db.transaction():
            rows = self.db.rows(PRUNABLE, {"state": state, "before": before})
            for row in rows:
                self._forget(row[0])
        return len(rows)

    # working

    def claim(self, worker: str, queues: Sequence[str] = ()) -> Job | None:
        """Give the next due job to a worker, which has its lock; None where nothing is due."""
        with self.db.transaction():
            self.settings = self.config()
            return self._claim(worker, queues)

    def _waiting(self, queues: Sequence[str]) -> dict[str, int]:
        """Return the queues, all or of these, in which jobs wait that are not held up.

        The value is LATER where some of them are not due yet.
        """
        waiting, queues = self.db.rows(WAITING_QUEUES), several(queues)
        return {queue: due for queue, due in waiting if not queues or queue in queues}

    def _claim(self, worker: str, queues: Sequence[str]) -> Job | None:
        now = self.clock()
        found: list[Job] = []
        for queue, due in self._waiting(queues).items():
            if due == LATER:
                self.db.execute(MAKE_DUE, {"queue": queue, "now": now})
            found.extend(self._jobs(NEXT_DUE, queue=queue))
        if not found:
            return None
        job = min(found, key=lambda j: (-j.priority, j.run_after, j.seq))
        self.db.execute(CLAIM, {"seq": job.seq, "worker": worker, "now": now})
        job = job._replace(state=PROCESSING, attempts=job.attempts + 1, run=job.run + 1)
        return job._replace(locked_by=worker, locked_at=now, updated_at=now)

    def finish(
        self, job: Job, outcome: Outcome, next_from: Sequence[str] | None = None
    ) -> tuple[Job | None, Job | None]:
        """Record how a claimed job's attempt ended, and claim the next one in the same transaction.

        `next_from` names the queues to claim from (empty: all of them); None claims nothing.
        Returns the job as it is now, and the next one. None for the first: the claim was lost
        meanwhile, so the result changes nothing.
        """
        with self.db.transaction():
            after = self._finish(job, outcome)
            return after, None if next_from is None else self._claim(job.locked_by or "", next_from)

    def _finish(self, job: Job, outcome: Outcome) -> Job | None:
        if outcome.error is not None or job.recurs:  # else it completed, cancelled meanwhile or not
            asked = next(self._jobs(BY_ID, id=job.id), job)
            job = job._replace(cancelling=asked.cancelling)
        now = self.clock()
        self.settings = self.config()
        after = after_attempt(job, outcome, self.settings, now)
        ended = after.state in (COMPLETED, DEAD)
        recurs = job.recurs and ended and not job.cancelling  # to cancel it ends the schedule
        row = after._replace(
            due=after.state != PENDING or after.run_after <= now,
            recurs=None if ended else job.recurs,
        )._asdict()
        if self.db.execute(FINISH, {**row, "worker": job.locked_by}).rowcount != 1:
            return None
        self.db.execute(ADD_ATTEMPT, (job.seq, job.run, job.locked_by, *outcome[1:]))
        if after.state == COMPLETED and self.db.execute(MEET, {"seq": job.seq}).rowcount:
            self.db.execute(UNBLOCK, {"seq": job.seq, "now": now})
            self.db.ring_when_stored()
        if recurs:
            self._recur(job, now)
        return after

    def _recur(self, job: Job, now: float) -> None:
        """Add the next job of a schedule, as its last one ends."""
        when = recurrence(str(job.recurs), job.planned or now, now)
        row = {**job._asdict(), "id": job.series, "created_at": now, "updated_at": now}
        row.update(run_after=when, planned=when, due=LATER)
        self._insert({**row, "seq": self.db.rows(LAST_SEQ)[0][0] + 1})
        self.db.ring_when_stored()

    def claimed(self) -> list[Job]:
        """Return the jobs that are claimed by a worker, living or dead."""
        return list(self._jobs(CLAIMED))

    def next_time(self, queues: Sequence[str] = ()) -> float | None:
        """Return when the next job becomes due by itself."""
        waiting = self._waiting(queues)
        times = [self.db.rows(NEXT_LATER, {"queue": queue})[0][0] for queue in waiting]
        return min((when for when in times if when is not None), default=None)

    def awaited(self, queues: Sequence[str] = (), horizon: float = FOREVER) -> dict[str, bool]:
        """Return the queues, all or of these, that a drain waits for; True where only for a resume.

        Something runs there, is due, or becomes due within so many seconds. What is blocked does
        not count, nor does the next job of a schedule.
        """
        found: dict[str, bool] = {}
        paused, soon, queues = self.paused(), self.clock() + horizon, several(queues)
        for queue, state, due, _ in self.tally():
            asked = state in (PENDING, PROCESSING) and (not queues or queue in queues)
            if asked and due == LATER:
                when = self.db.rows(NEXT_AWAITED, {"queue": queue})[0][0]
                asked = when is not None and when <= soon
            if asked and due != BLOCKED:
                held = state == PENDING and ("" in paused or queue in paused)
                found[queue] = held and found.get(queue, True)
        return found

    def blocked(self, queues: Sequence[str] = (), limit: int = 10) -> list[Job]:
        """Return the jobs that have been blocked longest, of each of these queues or of all."""
        asked = {"state": PENDING, "due": BLOCKED, "limit": limit}
        names = several(queues) or (None,)
        return [job for name in names for job in self._jobs(OLDEST, queue=name, **asked)]


# --- processes: an attempt's output, and its end --------------------------------------------------


def last_bytes(fd: int, limit: int) -> tuple[int, bytes]:
    """Return how many bytes of a file come before its last ones, and the last ones."""
    size = os.fstat(fd).st_size
    kept = min(limit, size)
    os.lseek(fd, size - kept, os.SEEK_SET)
    return size - kept, os.read(fd, kept)


class Output(LockFile):
    """One attempt's output: a file that the job itself writes and, while it lives, holds locked."""

    BOUND = 16 << 20  # a longer file loses its beginning while the job runs

    def __init__(self, path: str) -> None:
        """Make the file; one of that name is left over from another queue."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        super().__init__(path)
        self.cut = 0  # bytes that are gone from the file, and from its size
        self.hole = 0  # bytes of the file that take no room

    def reopen(self) -> None:
        """Give up our share of the lock, so that it is free when the job's processes are gone."""
        with contextlib.suppress(FileNotFoundError):  # the job has removed it
            fd = os.open(self.path, os.O_RDWR | os.O_APPEND | BINARY)
            os.close(self.fd)
            self.fd = fd

    def trim(self, limit: int) -> bool:
        """Give back the disk space of a runaway's output, all but what will be kept."""
        size = os.fstat(self.fd).st_size
        if size - self.hole <= self.BOUND + limit:
            return False
        if SYSTEM.punch(self.fd, size - limit):
            self.hole = size - limit
        else:  # a file system without holes: all of it goes
            os.ftruncate(self.fd, 0)
            self.cut += size
        return True

    def tail(self, limit: int) -> tuple[int, bytes]:
        """Return how much output there was before the last bytes, and the last bytes."""
        cut, output = last_bytes(self.fd, limit)
        return self.cut + cut, output


class Kill:
    """The end of an attempt's processes: TERM, and KILL for those that outlast the grace period."""

    def __init__(self, job: Job, run_dir: RunDirectory, grace: float) -> None:
        """Begin with the grace period."""
        self.job, self.run_dir = job, run_dir
        self.deadline = time.monotonic() + grace
        self.asked: set[int] = set()
        self.left: list[int] = []

    def step(self) -> bool:
        """Ask who was not asked yet, or end all; tell whether none is left and the lock is free."""
        found, late = SYSTEM.processes(self.job, self.run_dir), time.monotonic() >= self.deadline
        news = [pid for pid in found if pid not in self.asked]  # parents first, as a rule
        SYSTEM.kill(self.run_dir.mark(self.job), found if late else news, hard=late)
        self.asked.update(found)
        self.left = found
        return not found and self.run_dir.free(self.job.seq, self.job.run, "out")


# --- worker: one job at a time --------------------------------------------------------------------

NEVER = float("inf")
BATCH = 0.04  # seconds that news, syncs and looks which nobody waits for are put together
AGAIN = 0.25  # seconds before the next try of what the machine did not let us do


def blocked_by(parents: Sequence[Job]) -> str:
    """Return what a job waits for, in words."""
    words = [f"{printable(job.id)} ({job.state})" for job in parents[:3]]
    more = f" and {len(parents) - 3} more" if len(parents) > 3 else ""
    return f"blocked by {', '.join(words)}{more}"


def news_of(job: Job, after: Job | None, outcome: Outcome) -> tuple[str, str]:
    """Return the news of an attempt's end: the job's state now, and a line for people."""
    name, reason = printable(job.id), printable(outcome.error or "")
    if after is None:
        return "", f"job {name} is no longer ours: its result was dropped"
    if after.state == COMPLETED:
        how = f"completed in {span(outcome.finished - outcome.started)}"
    elif after.state != PENDING:
        how = f"is {after.state}: {reason} (try {job.attempts})"
    elif outcome.fate in ("crashed", "returned"):
        how = f"is back in the queue: {reason}"
    elif after.snoozes > job.snoozes:
        how = f"is put off: {reason}; next in {span(after.run_after - after.updated_at)}"
    else:
        again = span(after.run_after - after.updated_at)
        how = f"failed: {reason}; try {job.attempts}, next in {again}"
    return after.state, f"job {name} {how}"


def keep(run_dir: RunDirectory, job: Job, outcome: Outcome, out: Output | None) -> None:
    """Keep a result that cannot be stored, as the output file's name: a full disk takes that."""
    from base64 import urlsafe_b64encode

    if out:
        error = outcome.error and ascii(outcome.error)[1:-1][:50]  # a name has at most 255 bytes
        facts = json.dumps([*outcome[:4], error, out.cut])
        os.close(out.fd)  # Windows renames nothing that is open
        kept = urlsafe_b64encode(facts.encode()).decode()
        os.rename(out.path, run_dir.file(job.seq, job.run, "kept", kept))


def outcome_of(run_dir: RunDirectory, job: Job, now: float, limit: int) -> Outcome:
    """Return how a dead worker's attempt ended: in a crash, unless the worker kept a result."""
    from base64 import urlsafe_b64decode

    then = job.locked_at or 0.0
    outcome = Outcome("crashed", then, max(then, now), None, "its worker died")
    with contextlib.suppress(FileNotFoundError, ValueError):  # another is faster; garbled
        for name in run_dir.files(f"{job.seq}.{job.run}."):
            _, _, kind, *kept = name.split(".")
            if kind == "kept":
                outcome = Outcome(*json.loads(urlsafe_b64decode(kept[0])))
            with open(run_dir.file(name), "rb") as file:
                cut, output = last_bytes(file.fileno(), limit)
            outcome = outcome._replace(cut=outcome.cut + cut, output=output)
    return outcome


class Worker:
    """A process that claims a job, runs it, records how it ended, and claims the next.

    It waits in one place: for its job's end, its pool's word, and the next deadline. The pool says
    "go" (there may be work), "stop" (claim no more), "now" (and end the job), or the key of a run
    to cancel; the end of the pipe means that it is gone: finish, and leave. The pool is told pairs:
    "idle", "busy" or "left"; "broken" and why; or a job's state, if any, and a line for people.
    """

    def __init__(
        self, path: str, name: str, slot: int, queues: Sequence[str], pool: Connection
    ) -> None:
        """Take the lock that says: this worker is alive."""
        self.queue = Queue(path, create=False)
        self.db, self.run_dir = self.queue.db, self.queue.db.run_dir
        self.name, self.slot, self.queues, self.pool = name, slot, queues, pool
        self.lock_file = LockFile(self.run_dir.file(name))
        self.lock_file.note(pid=os.getpid(), slot=slot)
        self.bell = SYSTEM.bell(self.run_dir.file(name, "bell"))  # signals ring it, SIGCHLD too
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.run_dir.file(name, "bell"))  # and nobody else
        handle_signals(ignore, self.bell, worker=True)
        self.child: Child | None = None
        self.db.set_synchronous(self.queue.config()["synchronous"])
        self.db.patient = self.patient
        self.heard: set[str] = set()  # the pool's words so far
        self.stopping = False  # no more is claimed
        self.alone = False  # the pool is gone: nobody else syncs what is recorded now
        self.trouble = ""  # what keeps us from working: that is said once
        self.news: list[tuple[str, str]] = []  # what the pool is to be told, at flush_at
        self.flush_at = NEVER

    def patient(self, waited: float) -> bool:
        """Wait for a lock, but not when it is time to leave."""
        if waited > 0.3:  # before that, to ask the pool costs more than to try again
            self.hear()
        return waited <= 0.3 or not self.stopping

    def main(self) -> None:
        """Claim a job, run it, record how it ended and claim the next one, until told to stop.

        While a result cannot be recorded, nothing is claimed; when it is time to leave, it stays
        in the run directory for whoever recovers the job.
        """
        ran: tuple[Job, Outcome, Output | None] | None = None
        self.hear()  # it may be time to leave already
        while ran or not self.stopping:
            try:
                job = self.finish(*ran) if ran else self.queue.claim(self.name, self.queues)
            except Fault as error:
                if isinstance(error, Broken):
                    self.tell("broken", str(error))
                    self.stopping = True
                if self.stopping:
                    break
                what = f"record how job {ran[0].id} ended" if ran else "claim a job"
                self.complain(f"cannot {what}", error)
                continue
            if job and not ran:
                self.tell("busy")
            ran = (job, *self.perform(job)) if job else None
            if not ran and not self.stopping:
                self.trouble = ""
                self.tell("idle")
                self.wait()
        if ran:
            keep(self.run_dir, *ran)
        self.tell("left")
        self.lock_file.close()

    def tell(self, what: str, text: str = "", within: float = 0.0) -> None:
        """Tell the pool something, within so many seconds."""
        self.news.append((what, text))
        self.flush_at = min(self.flush_at, time.monotonic() + within)
        self.flush()

    def flush(self) -> None:
        """Send the news if it is time; without a pool there is nobody to tell."""
        if time.monotonic() < self.flush_at:
            return
        news, self.news, self.flush_at = self.news, [], NEVER
        try:
            self.pool.send(news)
        except OSError:
            self.alone = self.stopping = True

    def hear(self) -> None:
        """Take in what the pool says."""
        try:
            while not self.alone and self.pool.poll():
                word = self.pool.recv()
                self.heard.add(word)
                self.stopping |= word in ("stop", "now")
        except (EOFError, OSError):
            self.alone = self.stopping = True

    def overhear(self, job: Job) -> None:
        """Look, without a pool, for what it would have said: `worker stop --now`, `cancel`."""
        self.heard.add(self.run_dir.stop_asked(pool_of(self.name)))
        with contextlib.suppress(QueueError):
            if self.queue.get(job.id).cancelling:
                self.heard.add(job.key)

    def wait(self, until: float = NEVER) -> None:
        """Wait for a child's end, the pool, or a time on the monotonic clock."""
        self.flush()
        until = min(until, self.flush_at)
        limit = None if until == NEVER else max(0.0, until - time.monotonic())
        if self.alone and limit is None:
            return  # nobody is left to wait for
        sources = (self.bell, None if self.alone else self.pool)
        if self.pool in SYSTEM.wait(sources, self.child, limit):
            self.hear()

    def complain(self, what: str, reason: object) -> None:
        """Say once what is wrong, and wait before the next try."""
        if what != self.trouble:
            self.tell("", f"{what}: {reason}; trying again")
        self.trouble = what
        self.wait(time.monotonic() + AGAIN)

    def perform(self, job: Job) -> tuple[Outcome, Output | None]:
        """Run one attempt of a job to its end."""
        started, out = self.queue.clock(), None
        try:
            out = Output(self.run_dir.file(job.seq, job.run, "out"))
            child = SYSTEM.launch(self.queue.settings["shell"], job, self.environment(job), out.fd)
        except OSError as failure:
            return self.unstartable(job, failure, started, output=out is not None), out
        self.child, self.trouble = child, ""
        if not PROC:
            facts = {"key": job.key, "job_pid": child.pid, "launched": started}
            self.lock_file.note(pid=os.getpid(), slot=self.slot, **facts)
        fate, error = self.watch(job, child, out)
        if error or child.returncode:  # another attempt may follow: nothing of this one stays
            self.kill(job, child, out)
        SYSTEM.release(child)
        self.child = None
        error, finished = error or exit_meaning(child.returncode), self.queue.clock()
        tail = out.tail(self.queue.settings["output_limit"])
        return Outcome(fate, started, max(started, finished), child.returncode, error, *tail), out

    def environment(self, job: Job) -> dict[str, str]:
        """Return what a job's environment has beside the worker's: its own, then ours."""
        return {
            **json.loads(job.env or "{}"),
            "QUEUECTL_JOB_ID": job.id,
            "QUEUECTL_ATTEMPT": str(job.attempts),
            "QUEUECTL_WORKER": str(self.slot),
            "QUEUECTL_DB": self.db.path,
            "QUEUECTL_RUN": self.run_dir.mark(job),
        }

    def unstartable(self, job: Job, error: OSError, started: float, *, output: bool) -> Outcome:
        """Decide whether a job that did not start is to blame: without an output file it is not."""
        reason = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        fate = "ran"
        if not output or error.errno in EXHAUSTED:
            fate = "returned"
            self.complain(f"job {job.id} cannot start", reason)
        return Outcome(fate, started, self.queue.clock(), None, f"cannot start: {reason}")

    def watch(self, job: Job, child: Child, out: Output) -> tuple[str, str | None]:
        """Wait for the end of a job, or for a reason to end it; return its fate and the reason."""
        timeout = self.queue.settings["timeout"] if job.timeout is None else job.timeout
        deadline = time.monotonic() + timeout if timeout else NEVER
        key, pause = job.key, 0.01
        while child.poll() is None:
            now = time.monotonic()
            if "now" in self.heard:  # "stop" only keeps from claiming the next one
                return "returned", "stopped by the operator"
            if key in self.heard:
                return "cancelled", "cancelled by the operator"
            if now >= deadline:
                return "timed out", f"timed out after {span(timeout)}"
            self.wait(min(deadline, now + pause))
            if self.alone:
                self.overhear(job)
            if time.monotonic() > now + pause:
                full = out.trim(self.queue.settings["output_limit"])
                pause = 0.01 if full else min(pause * 2, 0.1)
        return "ran", None

    def kill(self, job: Job, child: Child, out: Output) -> None:
        """End what is left of an attempt; return when every process of it is gone."""
        out.reopen()
        kill, pause = Kill(job, self.run_dir, self.queue.settings["kill_grace"]), 0.005
        while not kill.step() or child.poll() is None:
            self.wait(time.monotonic() + pause)
            pause = min(pause * 1.5, 0.05)

    def finish(self, job: Job, outcome: Outcome, out: Output | None) -> Job | None:
        """Record how an attempt ended and claim the next job, in one transaction."""
        self.db.set_synchronous("full" if self.alone else self.queue.settings["synchronous"])
        next_from = None if self.stopping else self.queues
        after, following = self.queue.finish(job, outcome, next_from)
        if out:
            out.close()
        unstarted = outcome.fate == "returned" and outcome.exit_code is None  # that has been said
        if not (unstarted and after and after.state == PENDING):
            self.tell(*news_of(job, after, outcome), within=BATCH)
        return following


def run_worker(environ: dict[str, str], *worker: Any) -> None:
    """Be a worker, in the environment of its pool: where a worker process starts."""
    os.environ.clear()
    os.environ.update(environ)
    Worker(*worker).main()


# --- pool: starts the workers, wakes them, recovers what the dead left ----------------------------

WAL_BOUND = 16 << 20  # bytes of -wal; SQLite lets it grow as long as there is always a reader
STOPPING = {
    "stop": "no new jobs; finishing the running ones",
    "now": "ending the running jobs; they go back to the queue",
}
MAX_DEATHS = 5  # of workers without a job, in a minute: then something is wrong with the machine
HIRING = threading.Lock()  # hiring changes os.environ, sys.modules and the signals for a moment


def make_importable() -> str:
    """Make this module known to workers, and return the name by which they find it.

    A worker gets `run_worker` by the name of its module. Where the module was run as a program, it
    is made known by the name under which it can be imported; if it has none (a program without
    `.py`), `__main__` stays, which workers then load once more.
    """
    from importlib.util import find_spec

    here = os.path.realpath(__file__)
    name = __spec__.name if __spec__ else os.path.splitext(os.path.basename(here))[0]
    if __name__ == "__main__" and name not in sys.modules:
        if os.path.dirname(here) not in sys.path:
            sys.path.append(os.path.dirname(here))
        with contextlib.suppress(ImportError):
            found = find_spec(name)
            if found and os.path.realpath(str(found.origin)) == here:
                sys.modules[name] = sys.modules["__main__"]
                run_worker.__module__ = name
    return run_worker.__module__


class Member:
    """A worker as its pool sees it. It is "idle", "woken", "busy", or has "left"."""

    def __init__(self, path: str, name: str, slot: int, queues: Sequence[str]) -> None:
        """Start its process.

        From a fork server, which has loaded everything once; never by a plain fork: siblings would
        hold each other's pipes and locks open. The main program is hidden, so that workers neither
        load nor run it. Before Python 3.13 the server does not look along sys.path for our module.
        """
        import multiprocessing
        import types

        self.name, self.slot = name, slot
        self.doing = "busy"  # a new worker looks for a job by itself
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        self.conn, theirs = context.Pipe()
        with HIRING:
            module, main, environ = make_importable(), sys.modules["__main__"], dict(os.environ)
            what = (environ, path, name, slot, queues, theirs)
            self.process = context.Process(target=run_worker, args=what, daemon=False)
            if forks:
                context.set_forkserver_preload([module, "json", "select", "subprocess"])
            if module != "__main__":
                sys.modules["__main__"] = types.ModuleType("__main__")
            found = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}  # no other
            os.environ.update(found)
            try:
                with SYSTEM.starting():
                    self.process.start()
            finally:
                sys.modules["__main__"] = main
                for key in found:
                    del os.environ[key]
                os.environ.update({key: environ[key] for key in found if key in environ})
        theirs.close()

    def send(self, word: str) -> None:
        """Say a word; a worker that is gone does not hear it."""
        with contextlib.suppress(OSError):
            self.conn.send(word)


class Pool:
    """The process that `worker start` is. It runs no job: it watches, and wakes who is needed."""

    def __init__(
        self, queue: Queue, count: int, queues: Sequence[str], say: Callable[[str], None]
    ) -> None:
        """Prepare a pool of so many workers; `say` gets a line for each event."""
        self.queue, self.db, self.run_dir = queue, queue.db, queue.db.run_dir
        self.count, self.queues, self.say = count, queues, say
        self.tick: Callable[[], None] = lambda: None  # is called at every turn
        self.drain, self.horizon, self.code = False, FOREVER, OK
        self.name = "pool-" + os.urandom(4).hex()
        self.files = {self.db.path: os.stat(self.db.path)}  # what has to stay where it is
        self.handling = False  # signals
        self.signals: list[tuple[float, int]] = []
        self.db.patient = lambda waited: waited < 0.3 and not self.signals
        self.fault: Fault | None = None
        self.said: dict[str, float] = {}  # what was in our way, and when that was said
        self.stopping = ""  # or how: a key of STOPPING
        self.said_paused = False
        self.members: list[Member] = []
        self.missing = list(range(1, count + 1))  # the slots of workers that are to be started
        self.hired, self.hire_at = 0, 0.0
        self.deaths: list[float] = []  # of workers that had no job
        self.kills: dict[str, Kill] = {}  # for what a dead worker's job left running
        self.strangers: set[str | None] = set()  # who has jobs and is not, or no longer, ours
        self.maybe_work = True  # some may be due, and nobody was woken for it
        self.seen: object = None  # the data_version of the last look, and its connection
        self.next_time = NEVER  # when a job becomes due; the other times are of the monotonic clock
        self.look_at, self.prune_at, self.sync_at, self.truncate_at = 0.0, 0.0, NEVER, 0.0

    def on_signal(self, number: int, _: object) -> None:
        """Note a signal; the loop, which the bell of the signal wakes, reads it."""
        self.signals.append((time.monotonic(), number))

    def main(self) -> int:
        """Run until stopped or drained; return the exit code."""
        import socket

        with self.db.faults():
            self.run_dir.make()
            held = LockFile(self.run_dir.file(self.name))
            facts = {"host": socket.gethostname(), "queues": list(self.queues)}
            held.note(pid=os.getpid(), started=self.queue.clock(), count=self.count, **facts)
            self.files[held.path] = os.fstat(held.fd)
            self.bell = SYSTEM.bell(self.run_dir.file(self.name, "bell"))
        before = contextlib.ExitStack()
        try:
            if self.handling:
                before = handle_signals(self.on_signal, self.bell)
            empty = "" if any(self.queue.counts().values()) else ", where there are no jobs yet"
            path = printable(self.db.path)
            self.say(f"{self.count} worker{'s' * (self.count > 1)} on {path}{empty}")
            self.run_dir.clean(self.queue.claimed())
            while self.members or not self.stopping or self.killing():
                self.turn()
            with self.db.faults():
                self.sync()
        finally:
            for member in self.members:
                member.conn.close()  # that tells them
            for item in self.run_dir.files(self.name + "."):
                os.unlink(self.run_dir.file(item))
            held.close()
            before.close()
            if self.bell is not None:
                os.close(self.bell)
        if self.fault:
            raise self.fault
        return self.code

    def turn(self) -> None:
        """Wait for something to happen, take it in, act on it."""
        self.tick()
        ready = self.wait()
        for member in [member for member in self.members if member.conn in ready]:
            self.hear(member)
        self.obey()
        if time.monotonic() >= self.look_at:
            self.attempt(self.look)
        self.attempt(self.staff)
        self.attempt(self.wake)
        if time.monotonic() >= self.sync_at:
            self.attempt(self.sync)

    def attempt(self, step: Callable[..., None], *args: Any) -> bool:
        """Do something; a fault that may pass is said, and keeps nothing else from being done.

        False: another program has the lock, for which not everything can wait one after the other.
        """
        try:
            with self.db.faults():
                step(*args)
        except Locked:
            return False
        except Broken as error:
            self.fail(error)
        except Fault as error:  # a full disk, say: at the next look
            self.complain(f"{error}; trying again")
        return True

    def complain(self, trouble: str) -> None:
        """Say what is in our way, once a minute."""
        now = time.monotonic()
        if now - self.said.get(trouble, -NEVER) >= 60:
            self.said[trouble] = now
            self.say(trouble)

    def wait(self) -> list[Any]:
        """Sleep until the bell, a worker, a signal, or the next time to act; return who spoke."""
        until = time.monotonic() + self.next_time - self.queue.clock()
        pause = min(self.look_at, self.sync_at, until) - time.monotonic()
        sources = [self.bell, *(member.conn for member in self.members)]
        ready = SYSTEM.wait(sources, None, max(0.0, pause))
        if self.bell in ready:  # rung for work, for a stop, or by a signal
            self.maybe_work, self.look_at = True, 0.0
        if self.queue.clock() >= self.next_time:
            self.maybe_work, self.next_time = True, NEVER
            self.look_soon()  # when is the next one due?
        return ready

    def look_soon(self) -> None:
        """Look again within the time of a BATCH."""
        self.look_at = min(self.look_at, time.monotonic() + BATCH)

    def hear(self, member: Member) -> None:
        """Take in a worker's news."""
        try:
            news = member.conn.recv()
        except (EOFError, OSError):  # the end of its pipe
            self.bury(member)
            return
        for what, text in news:
            if what == "broken":
                self.fail(Fault(text))
            elif what in ("idle", "busy", "left"):
                member.doing = what
                if what == "busy":  # a claim counts after a power cut too; and there may be more
                    self.maybe_work = True
                    self.sync_at = min(self.sync_at, time.monotonic() + BATCH)
            else:
                self.report(what, text)

    def report(self, state: str, text: str) -> None:
        """Say what happened to a job, and see to what follows from it."""
        self.say(text)
        self.sync_at = min(self.sync_at, time.monotonic() + BATCH)
        if state == DEAD and self.drain:
            self.code = NO
        if state == PENDING:
            self.look_soon()  # when is it due?

    def bury(self, member: Member) -> None:
        """Let a worker go that is gone; one that left without a word is replaced."""
        self.members.remove(member)
        member.conn.close()
        member.process.join(1)
        if member.doing == "left":
            return
        self.say(f"{member.name} died")
        self.look_at, self.seen, self.maybe_work = 0.0, None, True  # `look`, next, recovers its job
        with contextlib.suppress(Fault):
            if not any(job.locked_by == member.name for job in self.queue.claimed()):
                self.count_death("a worker died without a job")
        if not self.stopping:
            self.missing.append(member.slot)

    def count_death(self, how: str) -> None:
        """Note that a worker died without a job, or could not be started; too many are a fault."""
        now = time.monotonic()
        self.deaths = [then for then in self.deaths if then > now - 60] + [now]
        if len(self.deaths) > MAX_DEATHS:
            self.fail(Fault(f"{how}, {len(self.deaths)} times in a minute"))

    def obey(self) -> None:
        """Act on all signals so far: the first stops, one over a second later ends the jobs."""
        for when, number in self.signals:
            if when < self.signals[0][0] + 1:
                self.stop("stop", signal_name(number), "; once more, a second later, ends them")
            elif self.stopping != "now":
                self.code = SIGNALLED + number
                self.stop("now", signal_name(number))

    def stop(self, word: str, reason: str = "", more: str = "") -> None:
        """Stop, if that is news: claim no more or, for "now", end the running jobs too."""
        if self.stopping in (word, "now"):
            return
        if reason:
            self.say(f"{reason}: {STOPPING[word]}{more}")
        self.stopping, self.missing = word, []
        for member in self.members:
            member.send(word)

    def fail(self, fault: Fault) -> None:
        """Stop because of something that no worker can work with."""
        if not self.fault:
            self.fault = fault
            self.stop("stop", str(fault))

    def look(self) -> None:
        """Look at what rings no bell: stop requests, the file itself, other writers, the dead."""
        self.look_at = time.monotonic() + SYSTEM.TICK
        asked = self.run_dir.stop_asked(self.name)
        if asked:
            self.stop(asked, "worker stop")
        for path, file in self.files.items():
            moved = True
            with contextlib.suppress(FileNotFoundError):
                moved = not os.path.samestat(os.stat(path), file)
            if moved:
                raise Broken(f"{path} was moved away or replaced")
        # Asked first: what changes from now on is seen later. A new connection has a new count.
        version = self.queue.data_version(), self.db.connection
        if version != self.seen or self.strangers:  # who may die without a change of the database
            self.recover()
        if version != self.seen:
            self.seen, self.maybe_work = version, True
            self.next_time = self.queue.next_time(self.queues) or NEVER
        if time.monotonic() >= self.prune_at:
            self.prune()

    def prune(self) -> None:
        """Delete a slice of what is older than the retention; again in a minute, or soon."""
        self.prune_at, retention = time.monotonic() + 60, self.queue.config()["retention"]
        before, states = self.queue.clock() - retention, PRUNED if retention else ()
        if sum(self.queue.prune_slice(before, state) for state in states) >= SLICE:
            self.prune_at = 0.0
            self.look_soon()

    def recover(self) -> None:
        """Put jobs whose worker is gone back into the queue, once all their processes are gone."""
        ours = {member.name: member for member in self.members}
        claimed = {job.key: job for job in self.queue.claimed()}
        self.strangers = {job.locked_by for job in claimed.values()} - set(ours)
        for key in set(self.kills) - set(claimed):  # another pool was faster
            del self.kills[key]
        for key, job in claimed.items():
            if job.locked_by in ours and job.cancelling:
                ours[job.locked_by].send(key)
        for job in claimed.values():
            if job.locked_by not in ours and not self.attempt(self.end_rest, job):
                break
        if self.kills:
            self.look_soon()

    def end_rest(self, job: Job) -> None:
        """End what a worker left, if it is dead, and then give its job back."""
        if not self.run_dir.free(job.locked_by):
            return
        kept = outcome_of(self.run_dir, job, self.queue.clock(), 0)
        if kept.error is not None:  # what a completed job leaves behind stays
            if job.key not in self.kills:
                grace = self.queue.config()["kill_grace"]
                self.kills[job.key] = Kill(job, self.run_dir, grace)
            kill = self.kills[job.key]
            if not kill.step():
                if time.monotonic() > kill.deadline + 1:
                    left = ", ".join(map(str, kill.left)) or "unknown"
                    name = printable(job.id)
                    self.complain(f"what job {name} left running does not end: process {left}")
                return
        self.kills.pop(job.key, None)  # first: a lock of another program delays no stop
        self.give_back(job)

    def killing(self) -> bool:
        """Tell whether what the dead left is being ended; a second after its KILL nobody waits."""
        now = time.monotonic()
        return any(now < kill.deadline + 1 for kill in self.kills.values())

    def give_back(self, job: Job) -> None:
        """Record how a dead worker's attempt ended, and remove its files."""
        limit = self.queue.config()["output_limit"]
        outcome = outcome_of(self.run_dir, job, self.queue.clock(), limit)
        after = self.queue.finish(job, outcome)[0]
        for name in self.run_dir.files(f"{job.seq}.{job.run}."):
            with contextlib.suppress(FileNotFoundError):  # another is faster
                os.unlink(self.run_dir.file(name))
        self.seen = None  # what this process changes, it does not see there
        if after:
            self.report(*news_of(job, after, outcome))

    def staff(self) -> None:
        """Start the workers that are missing: at once at first, then at most one a second."""
        while self.missing and time.monotonic() >= self.hire_at:
            self.hired += 1
            self.hire_at = time.monotonic() + 1 if self.hired > self.count else 0.0
            name = f"worker-{self.name[5:]}-{self.hired}"
            try:
                self.members.append(Member(self.db.path, name, self.missing[0], self.queues))
                del self.missing[0]
            except (EOFError, OSError) as error:  # the fork server died, or there is no room
                reason = getattr(error, "strerror", None) or "its fork server died"
                how = f"a worker cannot be started: {reason}"
                self.complain(f"{how}; trying again")
                if not self.members:
                    self.count_death(how)

    def wake(self) -> None:
        """Wake one idle worker if there may be work; when it took some, the next one."""
        doing = [member.doing for member in self.members]
        if self.stopping or "woken" in doing or "idle" not in doing:
            return
        if self.maybe_work:
            member = self.members[doing.index("idle")]
            member.doing, self.maybe_work = "woken", False
            member.send("go")
        elif self.drain and set(doing) == {"idle"} and not self.kills:
            awaited = self.queue.awaited(self.queues, self.horizon)
            if all(awaited.values()):
                self.nothing_to_run(sorted(awaited))

    def nothing_to_run(self, paused: Sequence[str]) -> None:
        """Leave, or say which paused queues are waited for, since they may be resumed."""
        if not paused:
            blocked = self.queue.blocked(self.queues)
            for job in blocked:
                self.code = NO
                self.say(f"job {printable(job.id)} is {blocked_by(self.queue.parents(job))}")
            more = self.queue.counts(self.queues)[PENDING] - len(blocked)
            if blocked and more > 0:
                self.say(f"and {more} more are pending")
            self.stop("stop")
        elif not self.said_paused:
            self.said_paused = True
            names = ", ".join(map(printable, paused))
            self.say(f"waiting for jobs of {names}: paused; resume goes on")

    def sync(self) -> None:
        """Make what the workers recorded durable: they do not wait for the disk themselves.

        A descriptor of our own on the -wal is safe: unlike the database, it carries no locks.
        """
        self.sync_at = time.monotonic() + AGAIN  # where it fails
        with contextlib.suppress(FileNotFoundError):
            SYSTEM.sync(self.db.path + "-wal")
            began, size = time.monotonic(), os.stat(self.db.path + "-wal").st_size
            if size > WAL_BOUND and began >= self.truncate_at:
                with contextlib.suppress(Fault):
                    self.db.truncate_wal()
                now = time.monotonic()  # a reader that stays must not hold up the work
                self.truncate_at = now + 5 * (now - began)
        self.sync_at = NEVER


def work(  # noqa: PLR0913
    path: str = "queuectl.db",
    count: int = 1,
    *,
    queues: Sequence[str] = (),
    drain: bool = False,
    horizon: float = FOREVER,
    insecure: bool = False,
    signals: bool = False,
    say: Callable[[str], None] = lambda _: None,
    tick: Callable[[], None] = lambda: None,
) -> int:
    """Run jobs with `count` workers until stopped or, with `drain`, until nothing is left to run.

    Jobs that are due more than `horizon` seconds from now are not waited for. Returns the exit
    code: 0, 1 if a job died during a drain or is left blocked, 128+n if signal n ended the jobs.
    `signals` lets INT, TERM and HUP stop it, which only a main thread may ask for; `queuectl worker
    stop` always can. `say` gets a line for each event, `tick` is called at least once a second.
    """
    checked("count", whole(1, 1000), count)
    with Queue(path) as queue:
        queue.db.run_dir.make()  # the database may have been copied here
        reason, kind = distrust(queue.db), network(queue.db.path)
        if reason and not insecure:
            raise Fault(f"{reason}: whoever writes there runs commands as you; see --insecure")
        queue.config()  # where that is damaged, no worker could begin
        if kind:
            say(f"warning: {queue.db.path} is on {kind}; SQLite needs a local disk")
        pool = Pool(queue, count, several(queues), say)
        pool.drain, pool.horizon, pool.tick, pool.handling = drain, horizon, tick, signals
        return pool.main()


# --- reports: jobs as text ------------------------------------------------------------------------

WORKER_HEADINGS = ("WORKER", "PID", "JOB", "SINCE", "COMMAND")
KINDS = {DUE: "due", LATER: "scheduled", BLOCKED: "blocked"}  # of pending jobs


def breadth(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    import unicodedata

    wide = 0 if text.isascii() else sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide


def terminal(stream: Any) -> int:
    """Return the width of the terminal that a stream is; 0 where it is none, or a dumb one."""
    if not stream or not stream.isatty() or os.environ.get("TERM") == "dumb":
        return 0
    return os.get_terminal_size(stream.fileno()).columns or 80


def fit(text: str, width: int) -> str:
    """Cut a text to the width of a terminal, where there is one (not 0)."""
    if not 0 < width < breadth(text):
        return text
    while breadth(text) >= width:
        text = text[: -max(1, (breadth(text) - width) // 2)]
    return text + "…"


def table(headings: Sequence[str], rows: Rows) -> Iterator[str]:
    """Yield aligned lines; a column that is empty in every row is left out.

    On a narrow terminal the widest columns are cut, but not ids or states; what is still too much
    goes on the next line.
    """
    lines = [[printable(str(cell)) for cell in row] for row in rows]
    shown = [i for i in range(len(headings)) if not lines or any(line[i] for line in lines)]
    lines = [[line[i] for i in shown] for line in (headings, *lines)]
    widths = [max(map(breadth, column)) for column in zip(*lines)]
    screen = terminal(sys.stdout) or sum(widths) + 2 * len(widths)
    while sum(widths) + 2 * len(widths) - 2 > screen and max(widths[1:]) > 14:
        widths[widths.index(max(widths[1:]), 1)] -= 1
    gaps, at = [""], widths[0]
    for width in widths[1:]:
        gaps.append("  " if at + 2 + width <= screen else "\n  ")
        at = at + 2 + width if gaps[-1] == "  " else 2 + width
    widths[-1] += max(0, screen - at)
    for line in lines:
        cells = [fit(cell, width) for cell, width in zip(line, widths)]
        pads = [" " * (width - breadth(cell)) for cell, width in zip(cells, widths)]
        text = "".join(map("".join, zip(gaps, cells, pads)))
        yield from (part.rstrip() for part in text.split("\n") if part.strip())


def section(headings: Sequence[str], rows: Rows) -> Iterator[str]:
    """Yield a table below an empty line, or nothing where it has no rows."""
    lines = list(rows)
    if lines:
        yield from ("", *table(headings, lines))


def ago(when: float, now: float) -> str:
    """Return a time in words: `3m ago`, `in 2h`."""
    distance = abs(when - now)
    if distance < 1:
        return "now"
    return f"in {span(round(distance))}" if when > now else f"{span(round(distance))} ago"


def job_facts(job: Job, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job as JSON shows it: the fields of the table, times in ISO 8601."""
    facts: dict[str, Any] = job._asdict()
    for key in ("created_at", "updated_at", "run_after", "locked_at", "planned"):
        facts[key] = iso(facts[key])
    for key in ("max_retries", "timeout"):
        facts[key] = config[key] if facts[key] is None else facts[key]
    facts.update(env=json.loads(job.env or "{}"), cancelling=bool(job.cancelling))
    facts["blocked"] = facts.pop("due") == BLOCKED
    return facts


def obstacle(queue: Queue, job: Job) -> str:
    """Return what keeps a job from running, in one line; empty where nothing does."""
    run_dir, name = queue.db.run_dir, f"queue {printable(job.queue)}"
    if job.state == PROCESSING and run_dir.free(job.locked_by):
        pools = run_dir.living("pool")
        return f"its worker is gone; {'a pool ends what is left' if pools else 'start one'}"
    if job.state != PENDING:
        return ""
    if job.due == BLOCKED:
        return blocked_by(queue.parents(job))
    if job.run_after > queue.clock():
        return "due " + ago(job.run_after, queue.clock())
    paused, pools = queue.paused(), run_dir.living("pool")
    if "" in paused or job.queue in paused:
        return "all queues are paused" if "" in paused else f"{name} is paused"
    served = [at.get("queues") for pool, at in pools.items() if not run_dir.stop_asked(pool)]
    if not served:
        return "all workers are leaving" if pools else "no worker is running"
    serves = any(not queues or job.queue in queues for queues in served)
    return "" if serves else f"no worker serves {name}"


def why(queue: Queue, job: Job) -> str:
    """Return why a job does not run, in one line; empty where it runs or has ended."""
    reason = obstacle(queue, job)
    if reason or job.state != PENDING:
        return reason
    before = queue.before(job)
    return f"{before} job{'s' * (before != 1)} before it" if before else "next to run"


def schedule(job: Job) -> str:
    """Return a schedule as a person writes it."""
    kind, _, rule = (job.recurs or "").partition(" ")
    return f"every {span(float(rule))}" if kind == "every" else rule


def job_row(queue: Queue, job: Job, config: Mapping[str, Any]) -> tuple[object, ...]:
    """Return a job as a row of a list."""
    when = job.run_after if job.state == PENDING else job.updated_at
    tries = f"{job.attempts}/{job.max_retries or config['max_retries']}"
    reason = job.last_error if job.state in (DEAD, PENDING, CANCELLED) else ""
    if job.due == BLOCKED:
        reason = blocked_by(queue.parents(job))
    place = "" if job.queue == "default" else job.queue
    return job.id, job.state, place, tries, ago(when, queue.clock()), reason or "", job.command


def job_text(queue: Queue, job: Job) -> Iterator[str]:
    """Yield everything about a job for people."""
    hidden = ("seq", "run", "cancelling", "blocked", "recurs", "planned", "snoozes")
    facts = {k: v for k, v in job_facts(job, queue.config()).items() if k not in hidden}
    facts.update(why=why(queue, job), schedule=schedule(job), snoozes=job.snoozes)
    facts["state"] += " (being cancelled)" if job.cancelling else ""
    for key, value in facts.items():
        if value not in (None, {}, "", 0) or key in ("priority", "timeout"):
            yield f"{key:<12} {printable(str(value))}"
    rows = (
        (a.run, iso(a.started), span(a.finished - a.started), a.error or "completed", a.worker)
        for a in queue.attempts(job)
    )
    yield from section(("RUN", "STARTED", "TOOK", "ENDED", "WORKER"), rows)


def worker_facts(queue: Queue) -> Iterator[dict[str, Any]]:
    """Yield each living worker as JSON shows it."""
    running = {job.locked_by: job for job in queue.claimed()}
    for name, at in queue.db.run_dir.living("worker").items():
        job = running.get(name)
        who = {"worker": name, "pool": pool_of(name), "pid": at.get("pid"), "slot": at.get("slot")}
        doing = {"job": job and job.id, "since": job and iso(job.locked_at)}
        yield {**who, **doing, "command": job and job.command}


def worker_rows(workers: Iterable[Facts], now: float) -> Iterator[tuple[object, ...]]:
    """Yield workers as rows of a list."""
    for at in workers:
        since = at["since"] and ago(moment(at["since"]), now)
        yield at["worker"], at["pid"] or "?", at["job"] or "idle", since or "", at["command"] or ""


def status_facts(queue: Queue, only: str | None = None) -> dict[str, Any]:
    """Return the state of everything, or of one queue, as JSON shows it."""
    facts: dict[str, Any] = dict.fromkeys((*STATES, *KINDS.values()), 0)
    queues: dict[str, dict[str, int]] = {}
    for name, state, due, jobs in queue.tally():
        if only in (None, name):
            facts[state] += jobs
            facts[KINDS[due]] += jobs if state == PENDING else 0
            queues.setdefault(name, dict.fromkeys(STATES, 0))[state] += jobs
    paused = [name for name in queue.paused() if only in (None, name) or not name]
    facts.update(queues=queues, paused=paused, rate=round(queue.rate(only), 3))
    oldest = queue.oldest(only)
    facts["oldest"] = oldest and job_facts(oldest, queue.config())
    return {**facts, "workers": list(worker_facts(queue))}


def status_text(queue: Queue, only: str | None = None, *, full: bool = False) -> Iterator[str]:
    """Yield the state of everything, or of one queue; the full view is the one to watch."""
    facts, oldest, now = status_facts(queue, only), queue.oldest(only), queue.clock()
    kinds = ", ".join(f"{facts[kind]} {kind}" for kind in KINDS.values())
    for state in STATES:
        note = f"  ({kinds})" if state == PENDING and facts["due"] < facts[PENDING] else ""
        yield f"{state:<10} {facts[state]:>8}{note}"
    yield f"{'workers':<10} {len(facts['workers']):>8}"
    if full:
        yield f"{'rate':<10} {facts['rate']:>8.1f}  jobs/s over the last minute"
    if facts["paused"]:
        yield "paused     " + ", ".join(printable(name) or "all queues" for name in facts["paused"])
    if oldest:
        since = ago(oldest.run_after, now)
        yield f"oldest     job {printable(oldest.id)}, due {since}; {why(queue, oldest)}"
    claimed = ((job, obstacle(queue, job)) for job in queue.claimed() if only in (None, job.queue))
    for job, reason in islice(filter(itemgetter(1), claimed), 1):
        yield f"lost       job {printable(job.id)}: {reason}"
    for job in queue.blocked([only] if only else (), limit=1):
        yield f"blocked    job {printable(job.id)} is {blocked_by(queue.parents(job))}"
    if set(facts["queues"]) - {"default"}:
        rows = ((name, *states.values()) for name, states in facts["queues"].items())
        yield from section(("QUEUE", *map(str.upper, STATES)), rows)
    yield from section(WORKER_HEADINGS, worker_rows(facts["workers"], now))
    failed = queue.jobs((DEAD,), 5, only) if full else ()
    reasons = ((job.id, ago(job.updated_at, now), job.last_error) for job in failed)
    yield from section(("LAST FAILED", "WHEN", "WHY"), reasons)


def progress(counts: Callable[[], Mapping[str, int]]) -> Callable[[], str]:
    """Return what says how far jobs have come from now on, by how many are in each state."""
    first, samples = counts(), collections.deque([(time.monotonic(), 0)], 50)

    def line() -> str:
        """Return what is done of what there was, how fast lately, the time left, what failed."""
        now, clock = counts(), time.monotonic()
        done = sum(max(0, now[state] - first[state]) for state in ENDED)
        left, failed = now[PENDING] + now[PROCESSING], now[DEAD] - first[DEAD]
        began, before = samples[0]
        rate = (done - before) / max(clock - began, 0.001)
        samples.append((clock, done))
        eta = f", {span(round(left / rate))} left" if rate and left else ""
        failures = f", {failed} failed" if failed > 0 else ""
        counted = f"{done}/{done + left} jobs, {rate:.1f}/s{eta}{failures}"
        return counted if done + left else "no jobs yet"

    return line


# --- command line ---------------------------------------------------------------------------------


class Command(NamedTuple):
    """A subcommand: what runs it and on which queue, what it is for, and its arguments.

    `access` is "read", "write", "make" (a queue where there is none), or "" (it opens its own).
    """

    act: Callable[..., int | None]
    access: str
    help: str
    example: str
    arguments: tuple[Argument, ...] = ()


def arg(*names: str, check: Callable[[Any], Any] = str, **options: Any) -> Argument:
    """Describe an argument of a command as argparse takes it, with a rule that checks its value."""
    return names, {"type": partial(checked, names[-1], check), **options}


def flag(names: str, meaning: str) -> Argument:
    """Describe an option without a value."""
    return tuple(names.split()), {"action": "store_true", "help": meaning}


class Lines:
    """Lines for a person on stderr and, on a terminal, one that changes below them."""

    below, due = "", 0.0

    def write(self, text: str) -> None:
        """Write to stderr; that nobody reads it any more is no reason to stop."""
        if sys.stderr:
            with contextlib.suppress(OSError):
                print(text, end="", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a line, above the one that changes."""
        self.write(("\r\x1b[K" if self.below else "") + text + "\n" + self.below)

    def show(self, line: Callable[[], str]) -> None:
        """Draw the line that changes anew, at most five times a second."""
        width = terminal(sys.stderr)
        if width and time.monotonic() >= self.due:
            self.due = time.monotonic() + 0.2
            self.below = fit(line(), width - 1)
            self.write("\r\x1b[K" + self.below)

    def clear(self) -> None:
        """Remove the line that changes."""
        if self.below:
            self.write("\r\x1b[K")
        self.below = ""


LINES = Lines()


def say(text: str) -> None:
    """Tell a person something: on stderr, where it is open."""
    LINES.say(f"queuectl: {text}")


def show(lines: Iterable[str], *, whole: bool = False) -> None:
    """Print lines on stdout; on a terminal states in colour and, unless whole, cut to its width."""
    width = terminal(sys.stdout)
    colours = {DEAD: 31, COMPLETED: 32, PROCESSING: 36, CANCELLED: 33}
    for line in lines:
        text = line if whole else fit(line, width)
        if width and not line.endswith(" 0") and not os.environ.get("NO_COLOR"):
            pattern = rf"(?:(?<=  )|^)({'|'.join(colours)})(?=  |$)"
            text = re.sub(pattern, lambda m: f"\x1b[{colours[m[0]]}m{m[0]}\x1b[m", text, count=1)
        print(text)


def show_list(args: Any, facts: Iterable[Facts], headings: Sequence[str], rows: Rows) -> None:
    """Print facts for programs, one object on each line, or rows for people."""
    if args.json:
        for item in facts:
            print(json.dumps(item))  # in ASCII
    else:
        show(table(headings, rows))


def changes(queue: Queue, timeout: float | None = None) -> Iterator[None]:
    """Yield at once, at every change, and twice a second; end after so many seconds."""
    end = NEVER if timeout is None else time.monotonic() + timeout
    seen, look_at = -1, 0.0
    while True:
        version, now = queue.data_version(), time.monotonic()
        if version != seen or now >= look_at:
            seen, look_at = version, now + 0.5
            yield
        if time.monotonic() >= end:
            return
        time.sleep(0.01)


JSON_BEGINS = r"""\s*((\[\s*)?\{('|\s*(["}]|\w+\s*:|$))|\[[\s\d]*[],])"""  # as no shell line does


def from_json(source: str) -> list[dict[str, object]]:
    """Return the jobs that a JSON object, or an array of them, describes."""
    try:
        value = json.loads(source.lstrip("\ufeff"))  # which PowerShell puts before a file's text
    except (ValueError, RecursionError) as error:
        hint = "; lost its quotes, in PowerShell? Try: enqueue COMMAND, or JSON on stdin: enqueue -"
        lost = re.match(r"\s*\{\s*\w+\s*:", source)
        raise BadInput(f"bad JSON: {error}{hint if lost else ''}") from None
    jobs = value if isinstance(value, list) else [value]
    if not jobs or not all(isinstance(job, dict) for job in jobs):
        raise BadInput('a job is a JSON object such as {"command": "echo hello"}')
    return jobs


def described(args: argparse.Namespace, stdin: IO[bytes], at: list[int]) -> Iterator[Any]:
    """Yield the jobs of JSON lines, JSON, a shell line or words; `at` holds the line's number."""
    words: list[str] = args.words
    exact = args.rest[-len(words) - 1 :] == ["--", *words]
    if "--" in args.rest and not exact:
        raise BadInput("a command's own words all go after --, as in: enqueue -- git log -- README")
    if words[0] == "-" and not exact:
        if len(words) > 1:
            raise BadInput("- stands alone: the jobs are on stdin")
        stdin.seek(0)
        for at[0], line in enumerate(stdin, 1):
            if at[0] % 1000 == 0:
                LINES.show(lambda: f"{at[0]} lines")
            if line.strip():
                yield from from_json(line.decode(errors="surrogateescape"))  # FIELDS refuse those
    elif exact or (len(words) > 1 and not re.match(JSON_BEGINS, words[0])):
        yield {"command": SYSTEM.line(words)}
    elif re.match(JSON_BEGINS, words[0]):
        yield from from_json(" ".join(words))
    else:
        yield {"command": words[0]}


def with_options(args: argparse.Namespace, jobs: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Yield jobs with what the options of `enqueue` say about them."""
    given = {key: said for key, said in vars(args).items() if key in FIELDS and said is not None}
    for key in [key for key in given if key != "env"]:  # which is a mapping only below
        option = "--at" if key == "run_at" else "--" + key.replace("_", "-")
        given[key] = checked(option, FIELDS[key], given[key])
    replaced = {key for pair in CONFLICTS if given.keys() & set(pair) for key in pair}
    pairs = [pair.partition("=") for pair in given.get("env", ())]
    if not all(equals for _, equals, _ in pairs):
        raise BadInput("--env is NAME=VALUE")
    env = {name: value for name, _, value in pairs}
    checked("--env", FIELDS["env"], env)
    for job in jobs:
        if env:
            had = job.get("env", {})
            given["env"] = {**had, **env} if isinstance(had, dict) else had
        kept = {key: value for key, value in job.items() if key not in replaced}
        yield {**kept, **given}


def read_stdin() -> IO[bytes]:
    """Return stdin, read to its end first: a slow writer must not hold up the workers."""
    import shutil
    import tempfile

    if not sys.stdin:
        raise BadInput("stdin is closed: there are no lines to read")
    spool: IO[bytes] = tempfile.SpooledTemporaryFile(1 << 20)  # noqa: SIM115
    shutil.copyfileobj(sys.stdin.buffer, spool)
    return spool


def cmd_enqueue(args: argparse.Namespace) -> None:
    """Add jobs; print their ids."""
    at = [0]
    with read_stdin() if args.words == ["-"] and "--" not in args.rest else io.BytesIO() as stdin:
        try:
            if not os.path.lexists(args.db):  # no queue is made for bad input
                for job in with_options(args, described(args, stdin, at)):
                    check_fields(job)
            jobs = with_options(args, described(args, stdin, at))
            with Queue(args.db) as queue:
                for job_id in queue.enqueue_many(jobs, if_absent=args.if_absent):
                    print(job_id)
        except BadInput as error:
            raise BadInput(f"line {at[0]}: {error}" if at[0] else str(error)) from None


PRIVATE: Any = partial(os.open, mode=0o600)  # an opener of files that are the owner's alone


def detach(args: argparse.Namespace) -> int:
    """Start a pool in a session of its own, and say where it writes."""
    import subprocess

    with Queue(args.db) as queue:
        run_dir, log = queue.db.run_dir, queue.db.run_dir.file("workers.log")
    run_dir.make()  # the database may have been copied here
    options = [word for word in args.rest if word != "--detach"]
    argv = [SYSTEM.PYTHON, sys.argv[0], f"--db={args.db}", "worker", "start", *options]
    with open(log, "a+", errors="replace", opener=PRIVATE) as file:
        size, how = file.tell(), SYSTEM.BACKGROUND
        pool = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file, **how)
        while pool.poll() is None:
            for name, facts in run_dir.living("pool").items():
                if facts.get("pid") == pool.pid:
                    say(f"{name} runs as process {pool.pid}; its log is {log}")
                    pool.returncode = OK  # it is not waited for
                    return OK
            time.sleep(0.01)
        file.seek(size)
        LINES.write(file.read())
    return pool.returncode


def cmd_worker_start(args: argparse.Namespace) -> int:
    """Run a pool, here or in the background."""
    if args.horizon < FOREVER and not args.drain:
        raise BadInput("--horizon goes with --drain")
    if args.detach:
        return detach(args)
    keys = ("drain", "horizon", "insecure", "queues")
    options: dict[str, Any] = {key: getattr(args, key) for key in keys}
    if not args.quiet:
        options["say"] = lambda text: LINES.say(time.strftime("%H:%M:%S ") + text)
    with contextlib.ExitStack() as stack:
        if terminal(sys.stderr) and not args.quiet:
            line = progress(partial(stack.enter_context(Queue(args.db)).counts, args.queues))
            options["tick"] = lambda: LINES.show(line)
        return work(args.db, args.count, **options, signals=True)


def cmd_worker_stop(args: argparse.Namespace, queue: Queue) -> int:
    """Ask every pool to stop, and wait until they are gone."""
    run_dir = queue.db.run_dir
    living = [*run_dir.living("pool"), *run_dir.living("worker")]  # which may be without a pool
    for pool in set(map(pool_of, living)):
        with open(run_dir.file(pool, "now" if args.now else "stop"), "w", opener=PRIVATE):
            pass  # an empty file: a full disk takes it
    run_dir.ring()
    if not living:
        say("no workers are running")
    began, told = time.monotonic(), False
    while not all(map(run_dir.free, living)):
        waited = time.monotonic() - began
        if args.timeout is not None and waited > args.timeout:
            say(f"still running after {span(args.timeout)}")
            return TIMED_OUT
        if waited > 1 and not told:
            told = True
            busy = ", ".join(printable(job.id) for job in queue.claimed())
            say(f"waiting for {busy or 'the workers to leave'}")
        time.sleep(0.02)
    return OK


def cmd_worker_list(args: argparse.Namespace, queue: Queue) -> None:
    """List the living workers."""
    workers = worker_facts(queue)
    show_list(args, workers, WORKER_HEADINGS, worker_rows(workers, queue.clock()))


def cmd_status(args: argparse.Namespace, queue: Queue) -> None:
    """Show the counts and the living workers, once or again and again."""
    while True:
        if args.json:
            print(json.dumps(status_facts(queue, args.queue)))
        else:
            lines = list(status_text(queue, args.queue, full=args.watch))
            if args.watch and terminal(sys.stdout):
                sys.stdout.write("\x1b[H\x1b[J")
                del lines[os.get_terminal_size(sys.stdout.fileno()).lines - 1 :]
            show(lines)
        sys.stdout.flush()
        if not args.watch:
            return
        time.sleep(1)


def show_jobs(args: argparse.Namespace, queue: Queue, states: Sequence[str]) -> None:
    """Print jobs, and say so where not all of them were."""
    config, name = queue.config(), getattr(args, "queue", None)
    limit = args.limit if args.limit is not None or args.json else 100
    jobs = queue.jobs(states, limit or None, name)
    facts = (job_facts(job, config) for job in jobs)
    headings = ("ID", "STATE", "QUEUE", "TRIES", "WHEN", "WHY", "COMMAND")
    show_list(args, facts, headings, (job_row(queue, job, config) for job in jobs))
    counts = queue.counts([name] if name else ())
    there = sum(counts[state] for state in states or STATES)
    if limit and limit < there and not args.json:
        say(f"{limit} of {there} jobs shown; --limit 0 shows all")


def cmd_list(args: argparse.Namespace, queue: Queue) -> None:
    """List jobs, or schedules."""
    if not args.recurring:
        show_jobs(args, queue, args.state or ())
        return
    now, states = queue.clock(), args.state or STATES
    jobs = [j for j in queue.recurring() if args.queue in (None, j.queue) and j.state in states]
    facts = (job_facts(job, queue.config()) for job in jobs)
    rows = ((j.series, schedule(j), ago(j.run_after, now), j.id, j.command) for j in jobs)
    show_list(args, facts, ("ID", "SCHEDULE", "NEXT", "JOB", "COMMAND"), rows)


def cmd_show(args: argparse.Namespace, queue: Queue) -> None:
    """Show everything about one job; output that is not UTF-8 has replacement characters."""
    job = queue.get(args.id)
    if not args.json:
        show(job_text(queue, job), whole=True)
        return
    facts, runs = job_facts(job, queue.config()), []
    for attempt in queue.attempts(job):
        output = attempt.output.decode(errors="replace")
        times = {"started": iso(attempt.started), "finished": iso(attempt.finished)}
        runs.append({**attempt._asdict(), **times, "output": output})
    after = [parent.id for parent in queue.parents(job)]
    print(json.dumps({**facts, "why": why(queue, job) or None, "after": after, "runs": runs}))


def exit_of(job: Job) -> int:
    """Return a job's exit code as a shell has it; one without an exit code failed all the same."""
    code = OK if job.state == COMPLETED else job.exit_code or NO
    return SIGNALLED - code if code < 0 else code


def named(args: argparse.Namespace, *, some: bool = False) -> list[str]:
    """Return the ids that a command names, none for all or some: one of the two must be said."""
    if bool(args.ids) == (args.all or some):
        raise BadInput("name the jobs or say --all, one of the two")
    return list(args.ids)


def cmd_wait(args: argparse.Namespace, queue: Queue) -> int:
    """Wait until jobs have ended; return what the first failed one returned."""
    jobs = [queue.get(job_id) for job_id in named(args)]
    ids, old = [job.id for job in jobs], set(() if args.ids else queue.dead())
    obstacles: dict[str, Job] = {}
    for job in jobs or chain(queue.claimed(), filter(None, [queue.oldest()])):
        obstacles.setdefault(obstacle(queue, job), job)
    for reason in filter(None, obstacles):
        say(f"job {printable(obstacles[reason].id)} waits: {reason}")

    def counts() -> Mapping[str, int]:
        return collections.Counter(queue.get(job_id).state for job_id in ids)

    line = progress(counts if ids else queue.counts)
    for _ in changes(queue, args.timeout):
        jobs = [queue.get(job_id) for job_id in ids]
        running = any(job.state not in ENDED for job in jobs)
        if not (running if ids else queue.awaited()):
            break
        LINES.show(line)
    else:
        say(f"timed out after {span(args.timeout)}: {line()}")
        return TIMED_OUT
    if not ids:
        died = (row[0] for row in queue.dead() if row not in old)
        blocked = queue.blocked(limit=1)
        for job in blocked:
            say(f"job {printable(job.id)} waits: {obstacle(queue, job)}")
        jobs = [*map(queue.get, islice(died, 1)), *blocked]
    return next(filter(None, map(exit_of, jobs)), OK)


def write_output(chunks: Iterable[bytes]) -> None:
    """Write a job's output: as it is, or on a terminal with control characters escaped."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    for chunk in chain(chunks, [b""]):  # that, the end, shows what is half a character
        if sys.stdout.isatty():
            text = decoder.decode(chunk, not chunk)
            print(re.sub(r"[^\n\t]+", lambda m: printable(m[0]), text), end="")
        else:
            sys.stdout.buffer.write(chunk)
        sys.stdout.flush()


def read_on(fd: int, at: int) -> tuple[int, bytes]:
    """Return where the output goes on, and what is there; what was cut meanwhile is a hole."""
    with contextlib.suppress(OSError, AttributeError):  # the end of the file; no such call
        at = os.lseek(fd, at, os.SEEK_DATA)
    os.lseek(fd, at, os.SEEK_SET)
    return at, os.read(fd, 1 << 16)


def follow(queue: Queue, job: Job, fd: int, at: int) -> Iterator[bytes]:
    """Yield the output of an attempt, from a place on, as it comes, until the attempt has ended."""
    over = False
    while True:
        at, chunk = read_on(fd, 0 if os.fstat(fd).st_size < at else at)  # a runaway's was cut
        if chunk:
            yield chunk
            at += len(chunk)
        elif over:
            return
        else:
            time.sleep(0.03)
            now = queue.get(job.id)
            over = (now.state, now.run) != (PROCESSING, job.run)


def cmd_logs(args: argparse.Namespace, queue: Queue) -> None:
    """Write the output of one attempt: of the one that is named, or runs, or ran last."""
    job = queue.get(args.id)
    if not (args.follow or job.run or job.id == args.id):
        job = queue.last_run(job)  # of a schedule
    if job.state == PENDING and not args.run:
        say(f"job {printable(job.id)} waits: {why(queue, job)}")
    ended = job.run if job.state == PENDING else job.run - 1
    for _ in changes(queue) if args.follow and not args.run else ():
        job = queue.get(job.id)
        out = queue.db.run_dir.file(job.seq, job.run, "out")
        begun = os.path.exists(out)  # a moment after a claim
        if job.state in ENDED or (begun if job.state == PROCESSING else job.run > ended):
            break
    run = args.run or job.run
    try:
        fd = os.open(queue.db.run_dir.file(job.seq, run, "out"), os.O_RDONLY | BINARY)
        cut, output = last_bytes(fd, queue.config()["output_limit"])
        chunks = follow(queue, job, fd, cut) if args.follow else [output]
    except FileNotFoundError:
        attempts = queue.attempts(job)
        found = [attempt for attempt in attempts if attempt.run == run]
        if args.run and not found:
            has = f"1 to {attempts[-1].run}" if attempts else "not run yet"
            raise NotFound(f"job {job.id} has no run {run}; it has {has}") from None
        found = found or attempts[-1:]
        cut, chunks = (found[0].cut, [found[0].output]) if found else (0, [])
        if found and found[0].error and not found[0].output and not cut:
            say(f"job {printable(job.id)} wrote nothing: {printable(found[0].error)}")
    if cut:
        say(f"{cut} bytes of output before this were not kept")
    write_output(chunks)


def cmd_cancel(args: argparse.Namespace, queue: Queue) -> int:
    """Cancel jobs; return once the running ones have been ended."""
    jobs, code, run_dir = queue.cancel(args.ids, cascade=args.cascade), OK, queue.db.run_dir
    for _ in changes(queue):
        jobs = [queue.get(job.id) for job in jobs]
        running = [job for job in jobs if job.cancelling and not run_dir.free(job.locked_by)]
        if not running and not (any(job.cancelling for job in jobs) and run_dir.living("pool")):
            break
    for job in jobs:
        name = printable(job.id)
        if job.state != CANCELLED and not job.cancelling:
            say(f"job {name} is {job.state}; it stays so")
            if not (args.cascade and job.state == DEAD):
                code = NO
            continue
        print(job.id)
        if job.cancelling:
            say(f"job {name}: {obstacle(queue, job)}")
        if job.recurs and queue.get(job.series or "").seq == job.seq:
            say(f"with it ends schedule {printable(job.series or '')}; dlq retry {name} resumes it")
        waiting = queue.count_children(job)
        if waiting:
            say(f"jobs that wait for {name}: {waiting}; --cascade calls them off, too")
    return code


def cmd_pause(args: argparse.Namespace, queue: Queue) -> None:
    """Pause some queues, or all of them."""
    for name in args.queues or [""]:
        queue.pause(name)


def cmd_resume(args: argparse.Namespace, queue: Queue) -> None:
    """Resume some queues, or all of them."""
    for name in args.queues or [""]:
        queue.resume(name)
    if "" in queue.paused():
        say("all queues are paused still: resume without --queue goes on")


def cmd_dlq_purge(args: argparse.Namespace, queue: Queue) -> None:
    """Delete dead or cancelled jobs."""
    ids = named(args, some=args.older_than is not None)
    print(queue.purge(ids) if ids else queue.prune(args.older_than or 0, (DEAD,)), "purged")


def cmd_config_set(args: argparse.Namespace) -> None:
    """Store one value."""
    check_setting(args.key, args.value)  # before a queue is made for it
    with Queue(args.db) as queue:
        queue.configure(args.key, args.value)


def setting_text(value: object) -> str:
    """Return a value as `config set` takes it."""
    if isinstance(value, tuple):
        numbers = all(isinstance(item, int) for item in value)
        return ",".join(map(str, value)) if numbers else SYSTEM.line(value)
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def cmd_config_list(args: argparse.Namespace, queue: Queue) -> None:
    """List every setting."""
    config = queue.config().items()
    facts = ({"key": k, "value": value, "default": SETTINGS[k].default} for k, value in config)
    rows = ((key, setting_text(value), SETTINGS[key].meaning) for key, value in config)
    show_list(args, facts, ("KEY", "VALUE", "MEANING"), rows)


# fmt: off
DURATION: Any = {"check": seconds, "metavar": "DURATION"}
COUNT = {"metavar": "N"}
JSON = flag("--json", "for programs; the README has the fields")
LIMIT = arg("--limit", check=number_in(0, 10**9), help="the N that changed last; 0: all", **COUNT)
STATE = arg("--state", action="append", choices=STATES, help="only this state; repeatable")
TIMEOUT = arg("--timeout", help="wait no longer than this; exit with 124", **DURATION)
QUEUE = arg("--queue", check=valid_name, metavar="QUEUE", help="only this queue")
QUEUES = arg("--queue", dest="queues", action="append", check=valid_name, metavar="QUEUE",
             default=[], help="only this queue; repeatable")
ID, IDS = arg("id", metavar="ID"), arg("ids", nargs="*", metavar="ID")
EVERY_DEAD = flag("--all", "all dead jobs")
KEY = arg("key", metavar="KEY", check=check_setting, help="one of: " + ", ".join(SETTINGS))

COMMANDS = {
    "enqueue": Command(cmd_enqueue, "", "add a job and print its id", "enqueue 'make all'", (
        arg("words", nargs="+", metavar="JOB",
            help="a shell line in quotes; JSON (an object or an array); - for JSON lines "
            "on stdin; or -- and then a command's own words"),
        arg("--id", help="its name (else a number)"),
        arg("--priority", check=literal, help="the highest is first (0)", **COUNT),
        arg("--delay", metavar="DURATION", help="start it after this long"),
        arg("--at", dest="run_at", metavar="TIME", help="start it then: 2030-01-31T08:00"),
        arg("--timeout", metavar="DURATION", help="end an attempt that takes longer (0: never)"),
        arg("--max-retries", check=literal, help="how many tries, the first included", **COUNT),
        arg("--queue", metavar="QUEUE", help="the queue it waits in (default)"),
        arg("--after", action="append", metavar="ID,...",
            help="start it once these have completed; repeatable"),
        arg("--every", metavar="DURATION", help="repeat it at this interval"),
        arg("--cron", metavar="RULE", help="repeat it by a rule: '0 3 * * mon-fri', @daily"),
        arg("--cwd", metavar="DIR", help="where it runs (here)"),
        arg("--env", action="append", metavar="NAME=VALUE", help="a variable for it; repeatable"),
        flag("--if-absent", "do nothing if there is a job of that id"))),
    "worker start": Command(
        cmd_worker_start, "", "run jobs, until stopped", "worker start --count 4", (
            arg("--count", check=number_in(1, 1000), default=1, help="jobs at a time (1)", **COUNT),
            QUEUES,
            flag("--drain", "leave when nothing is left to run; exit 1: a job died or is blocked"),
            arg("--horizon", default=FOREVER, **DURATION,
                help="with --drain: leave when all that is left is due after so long"),
            flag("--detach", "run in the background; the log is in the queue's .run directory"),
            flag("--quiet", "print no event lines"),
            flag("--insecure", "run even if others could have put jobs into the queue"))),
    "worker stop": Command(
        cmd_worker_stop, "read", "let workers finish their jobs and leave", "worker stop --now",
        (flag("--now", "end the running jobs; they go back to the queue"), TIMEOUT)),
    "worker list": Command(cmd_worker_list, "read", "list living workers", "worker list", (JSON,)),
    "status": Command(cmd_status, "read", "show counts and workers", "status --watch", (
        QUEUE, flag("--watch", "again every second, with the rate and the last failures"), JSON)),
    "list": Command(cmd_list, "read", "list jobs", "list --state dead --limit 20", (
        STATE, QUEUE, flag("--recurring", "the schedules, and when each is next"), LIMIT, JSON)),
    "show": Command(cmd_show, "read", "show everything about a job", "show 7", (ID, JSON)),
    "logs": Command(cmd_logs, "read", "write the output of a job", "logs 7 -f", (
        ID, flag("-f --follow", "go on until the attempt ends"),
        arg("--run", check=number_in(1, 10**9), help="show attempt N, not the last", **COUNT))),
    "wait": Command(
        cmd_wait, "read", "wait for jobs; exit with the code of the first that failed", "wait 7 8",
        (IDS, flag("--all", "wait until nothing is left to run"), TIMEOUT)),
    "cancel": Command(cmd_cancel, "write", "call jobs off, waiting or running", "cancel 7", (
        arg("ids", nargs="+", metavar="ID"), flag("--cascade", "and the jobs that wait for them"))),
    "pause": Command(
        cmd_pause, "make", "start no new jobs until resume", "pause --queue gpu", (QUEUES,)),
    "resume": Command(cmd_resume, "write", "start jobs again after pause", "resume", (QUEUES,)),
    "dlq list": Command(
        lambda args, queue: show_jobs(args, queue, (DEAD,)),
        "read", "list the dead letter queue", "dlq list", (LIMIT, JSON)),
    "dlq retry": Command(
        lambda args, queue: show(queue.retry(named(args) or None)),
        "write", "put dead or cancelled jobs back, with no attempts used", "dlq retry 7",
        (IDS, EVERY_DEAD)),
    "dlq purge": Command(
        cmd_dlq_purge, "write", "delete dead or cancelled jobs", "dlq purge --older-than 30d",
        (IDS, EVERY_DEAD, arg("--older-than", help="only what died so long ago", **DURATION))),
    "prune": Command(
        lambda args, queue: print(queue.prune(args.older_than, args.state or PRUNED), "pruned"),
        "write", "delete what has completed or was cancelled", "prune --older-than 7d", (
            arg("--older-than", default=0.0, help="only what ended so long ago", **DURATION),
            arg("--state", action="append", choices=ENDED,
                help="only this state, else completed and cancelled; repeatable"))),
    "config get": Command(
        lambda args, queue: print(setting_text(queue.config()[args.key])),
        "read", "print a setting", "config get timeout", (KEY,)),
    "config set": Command(
        cmd_config_set, "", "change a setting", "config set backoff_base 3",
        (KEY, arg("value", metavar="VALUE"))),
    "config unset": Command(
        lambda args, queue: queue.configure(args.key, None),
        "write", "go back to the default", "config unset timeout", (KEY,)),
    "config list": Command(cmd_config_list, "read", "list the settings", "config list", (JSON,)),
}
# fmt: on


def menu(family: str = "") -> dict[str, str]:
    """Return the commands, or those of a family, each with what it is for."""
    found: dict[str, str] = {}
    for words, command in COMMANDS.items():
        first, _, verb = words.partition(" ")
        if first == family:
            found[verb] = command.help
        elif not family:
            found[first] = f"{found[first]}, {verb}" if first in found else verb or command.help
    return found


COMPLETIONS = {  # what has a shell ask the program itself
    "bash": """_queuectl() {
  COMPREPLY=($(PROGRAM completion bash "${COMP_WORDS[@]:0:COMP_CWORD+1}" 2>/dev/null))
}
complete -o default -F _queuectl queuectl queuectl.py""",
    "zsh": """_queuectl() {
  compadd -- $(PROGRAM completion zsh "${(@)words[1,CURRENT]}" 2>/dev/null) || _files
}
compdef _queuectl queuectl queuectl.py""",
    "fish": """function __queuectl
  PROGRAM completion fish (commandline -opc) (commandline -ct) 2>/dev/null
end
complete -c queuectl -c queuectl.py -a '(__queuectl)'""",
}


def cmd_completion(args: argparse.Namespace) -> None:
    """Print a shell's script or, when that asks, what the last word typed may become."""
    if not args.typed:
        program = " ".join(map(shlex.quote, (sys.executable, os.path.abspath(sys.argv[0]))))
        print(COMPLETIONS[args.shell].replace("PROGRAM", program))
        return
    *typed, last = args.typed
    pairs = zip(typed, typed[1:])  # the first word is the program
    given = [word for before, word in pairs if before != "--db" and not word.startswith("-")]
    command = COMMANDS.get(" ".join(given[:2])) or COMMANDS.get(" ".join(given[:1]))
    options = [option for names, _ in command.arguments for option in names] if command else []
    for word in [o for o in options if o[0] == "-"] if command else menu(" ".join(given)):
        if word.startswith(last):
            print(word)


SHELL = arg("shell", choices=tuple(COMPLETIONS), metavar="SHELL", help="bash, zsh or fish")
TYPED = arg("typed", nargs="...", metavar="...", help="what was typed: its last word is completed")
MEANING = "print what makes your shell complete words"
COMMANDS["completion"] = Command(cmd_completion, "", MEANING, "completion bash", (SHELL, TYPED))

HELP = """\
PATH is the queue; if it is not given, $QUEUECTL_DB or ./queuectl.db.
COMMANDS
examples:
  queuectl enqueue 'make all'                  add a job
  queuectl worker start --count 4              run jobs, four at a time
  queuectl status --watch                      see what is going on
  queuectl dlq retry --all                     try the failed ones again
"""


def new_parser(prog: str, **options: Any) -> argparse.ArgumentParser:
    """Return a parser that raises BadInput, with the nearest option to a wrong one."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            wrong = re.match("unrecognized arguments: (-[^ =]+)", message)
            hint = nearest(wrong[1], self._option_string_actions) if wrong else ""
            if message.endswith("required: COMMAND"):
                message = f"which one? {', '.join(menu(self.prog[9:]))}"
            if wrong and wrong[1] == "--db":
                hint = ": --db goes before the command"
            if wrong and self.prog == "queuectl enqueue" and wrong[1][1] != "-":
                hint = ": a command of several words goes after --, as in: enqueue -- ls -l"
            raise BadInput(f"{message}{hint} ({self.prog} --help says more)")

    style = argparse.RawDescriptionHelpFormatter
    return Parser(prog, formatter_class=style, allow_abbrev=False, **options)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of the command that is meant; no other command's parser is built."""
    import argparse

    args, name, hidden = argparse.Namespace(rest=words), "", argparse.SUPPRESS
    while name not in COMMANDS:
        prog, known = f"queuectl {name}".strip(), menu(name)
        lines = "".join(f"  {word:<11} {meaning}\n" for word, meaning in known.items())
        about = lines if name else HELP.replace("COMMANDS\n", lines + "\n")
        usage = prog + " [--db PATH]" * (not name) + " COMMAND [--help] ..."
        parser = new_parser(prog, usage=usage, description=about, add_help=False)
        parser.add_argument("-h", "--help", action="help", help=hidden)
        if not name:
            version, db = f"queuectl {__version__}", os.environ.get("QUEUECTL_DB") or "queuectl.db"
            parser.add_argument("--version", action="version", version=version, help=hidden)
            parser.add_argument("--db", default=db, metavar="PATH", help=hidden)
        parser.add_argument("rest", nargs=argparse.PARSER, metavar="COMMAND", help=hidden)
        word, *args.rest = parser.parse_args(args.rest, args).rest
        if not args.db:
            parser.error("--db must not be empty")
        if word not in known:
            parser.error(f"no command {word}{nearest(word, known)}")
        name = f"{name} {word}".strip()
    args.chosen = COMMANDS[name]
    about, example = args.chosen.help.capitalize() + ".", f"example: queuectl {args.chosen.example}"
    parser = new_parser(f"queuectl {name}", description=about, epilog=example)
    for names, options in args.chosen.arguments:
        parser.add_argument(*names, **options)
    return parser.parse_args(args.rest, args)


def discard_output() -> None:
    """Let the flush at exit succeed, where stdout is closed or full."""
    with contextlib.suppress(OSError):
        fd = os.open(os.devnull, os.O_WRONLY)
        os.dup2(fd, 1)
        os.close(fd)


def execute(args: argparse.Namespace) -> int:
    """Run a command on the queue that it needs."""
    act, access = args.chosen.act, args.chosen.access
    if not access:
        return act(args) or OK
    with Queue(args.db, readonly=access == "read", create=access == "make") as queue:
        return act(args, queue) or OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; the one place that says what went wrong."""
    if not sys.stdout:  # it was closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # whatever a job is called can be printed
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        SYSTEM.escapes()
        code = execute(parse((sys.argv[1:] if argv is None else argv) or ["--help"]))
        sys.stdout.flush()
        return code
    except QueueError as error:
        say(printable(str(error)))
        return error.code
    except BrokenPipeError:
        discard_output()
        return SIGNALLED + 13
    except (OSError, sqlite3.Error, ImportError) as error:  # the machine's fault, all over
        discard_output()
        where, reason = getattr(error, "filename", None), getattr(error, "strerror", None) or error
        say(printable(f"{where}: {reason}" if where else str(reason)))
        return FAULT
    except KeyboardInterrupt:
        return SIGNALLED + signal.SIGINT
    finally:
        LINES.clear()


if __name__ == "__main__":
    sys.exit(main())
