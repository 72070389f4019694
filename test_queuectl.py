"""Tests of queuectl, with real processes, signals and databases.

python3 -m unittest                                all but the slow tests, in under a minute
python3 -m unittest test_queuectl.PoolStop         one class
python3 -m unittest -k priority                    the tests with a word in their names
QUEUECTL_SLOW=1 python3 -m unittest                the slow tests too, in a few minutes

The classes mirror the sections of queuectl.py, in the same order:

    rules            Rules RulesRetry RulesCron
    SQL              SqlPlans
    system           SystemProcesses
    run directory    RunDirectoryFiles
    database         DatabaseCreation DatabaseForeign DatabaseDamage DatabaseReadOnly
                     DatabaseFullDisk DatabaseDurability DatabaseDurabilityLive DatabaseGuest
                     DatabaseTransactions DatabaseForks
    trust            Trust TrustAttacks
    queue            QueueEnqueue QueueBatch QueueReading QueueSelection QueueEdit QueueEditLive
                     QueueOrder QueueDependencies QueueSchedules QueueRetries QueueNotifications
                     QueueNotificationsLive QueuePause QueuePauseLive QueueLimit QueueLimitLive
                     QueueTogetherLive QueueWait QueuePrune
    attempt          AttemptLaunch AttemptWithoutShell AttemptEnd AttemptOutput AttemptElsewhere
                     AttemptElsewhereClocked Engine AttemptOverSsh AttemptInSlurm
    worker           WorkerFencing WorkerTrouble
    pool             PoolRecovery PoolFalseAlarms PoolStop PoolDispatch PoolDispatchLive PoolFiles
                     PoolTrouble PoolTroubleLive
    words            WordsWhy WordsProgress
    report           ReportFacts ReportFormats ReportDrain
    web              Web WebGate WebServer WebCommand WebPages WebActions WebCost
                     WebHostile
    doctor           DoctorTrials
    command line     CliEnqueue CliEnqueueLive CliEnqueueWaitLive CliBadInput CliWorkers CliStatus
                     CliStatusLive
                     CliList CliListLive CliShow CliLogs CliLogsLive CliWait CliWaitLive CliCancel
                     CliCancelLive CliSelectionLive CliDlq CliConfig CliHelp CliCompletion
                     CliInstall CliSignals CliTerminal
    whole program    Library Vendored AnySystem AsOnMacOS Readme Layout Speed

A test marked @internal calls functions that are not public; it may change with them. The others
use the command line, or the public Queue.

The promises of queuectl. A test of one names it at the beginning of its docstring, as "Promise 3".

1. A job whose id was printed is kept, whatever is killed, and across a power cut.
2. A job runs at least once, and never twice at once.
3. A job never starts more than max_retries times, crashes included.
4. Nothing hangs: no timeout, no output, no lock.
5. Recovery is exact and prompt, and needs no lease and no clock.
6. Stopping is graceful, from wherever it is requested.
7. Only the owner's commands run.
8. The cost follows the work, not the history.
9. Notifications are not lost.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import datetime
import faulthandler
import functools
import gc
import glob
import hashlib
import html.parser
import io
import itertools
import json
import multiprocessing
import operator
import os
import pathlib
import py_compile
import pydoc
import re
import runpy
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import symtable
import sys
import tempfile
import threading
import time
import tracemalloc
import unittest
import urllib.parse
import urllib.request
import xml.etree.ElementTree
from array import array
from concurrent import futures
from functools import partial
from itertools import filterfalse, product
from types import SimpleNamespace
from typing import Any, Callable, Iterator, NamedTuple, Sequence
from unittest import mock

import queuectl
from queuectl import Outcome, Queue

try:
    import fcntl
    import pty
    import resource
    import termios
except ImportError:
    POSIX = False
else:
    POSIX = True

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "queuectl.py")
COMPILED = os.path.join(
    tempfile.mkdtemp(prefix="queuectl-compiled-"), "queuectl.pyc"
)  # starts faster
py_compile.compile(PROGRAM, COMPILED, doraise=True)
atexit.register(shutil.rmtree, os.path.dirname(COMPILED), ignore_errors=True)
PYTHON = [sys.executable, *(["-O"] if sys.flags.optimize else [])]
LINUX = sys.platform == "linux"
ROOT = POSIX and os.geteuid() == 0
NOBODY = 65534
STOP_SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")]
ONE_LINE = r"\Aqueuectl: [^\n]+\n\Z"
NEEDS_SHELL = unittest.skipUnless(POSIX, "needs a POSIX shell")
NEEDS_ROOT = unittest.skipUnless(ROOT, "only root can give files away")
SLOW = unittest.skipUnless(os.environ.get("QUEUECTL_SLOW"), "slow; QUEUECTL_SLOW=1 runs it")

# --- helpers --------------------------------------------------------------------------------------


def setUpModule() -> None:
    """Undo what the processes under test would inherit: signals that are ignored, variables."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if POSIX:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for name in ("QUEUECTL_DB", "QUEUECTL_INSECURE"):
        os.environ.pop(name, None)


def internal(test: Any) -> Any:
    """Mark a test that calls functions which are not public."""
    return test


def wait_until(fact: Callable[[], Any], limit: float = 10.0) -> Any:
    """Wait until something is true, and return it."""
    deadline = time.monotonic() + limit
    while True:
        value = fact()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit} s: {fact}")
        time.sleep(0.01)


def count_sleeps(pid: int) -> int:
    """Return how many times a process has slept; without /proc, assume one sleep per poll."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return int(re.findall(r"\bvoluntary_ctxt_switches:\s*(\d+)", file.read())[0])
    except FileNotFoundError:
        return int(2 * time.monotonic())


def alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Result(NamedTuple):
    """What a command returned and wrote."""

    returncode: Any
    stdout: str
    stderr: str


def in_process(args: Any, stdin: str | bytes, cwd: str) -> Result:
    """Run the program in this process."""
    given = io.BytesIO(stdin.encode() if isinstance(stdin, str) else stdin)
    ins, out, err = (
        io.TextIOWrapper(file, "utf-8") for file in (given, io.BytesIO(), io.BytesIO())
    )
    before = os.getcwd()
    os.chdir(cwd)
    faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)
    try:
        streams = mock.patch.multiple(sys, stdin=ins, stdout=out, stderr=err)
        with streams, mock.patch.object(queuectl, "discard_output"):  # for the end of a process
            code = queuectl.main(args)
    finally:
        faulthandler.cancel_dump_traceback_later()
        os.chdir(before)
    out.seek(0)
    err.seek(0)
    return Result(code, out.read(), err.read())


@functools.lru_cache(maxsize=None)
def readme() -> str:
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        return file.read()


class Case(unittest.TestCase):
    """A fresh directory for each test, and the program as a person calls it."""

    PROGRAM = COMPILED
    REAL = False  # commands run in this process unless a test asks for one of their own

    def setUp(self) -> None:
        self.dir = os.path.realpath(tempfile.mkdtemp(prefix="queuectl-test-"))
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        self.path = self.file("queuectl.db")
        environment = mock.patch.dict(os.environ)  # as it was, after the test
        environment.start()
        self.addCleanup(environment.stop)
        self.processes: list[subprocess.Popen[str]] = []
        self.addCleanup(self.end_everything)

    def end_everything(self) -> None:
        """Leave no process behind, whatever the test did."""
        if os.path.isdir("/proc"):
            wait_until(lambda: not self.kill_ours())
        elif os.path.exists(self.path):
            self.result("worker", "stop", "--now")
        for process in self.processes:
            with process:
                process.kill()
        self.processes.clear()

    def leftover_processes(self) -> list[int]:
        """Return the living processes that work in the directory of this test."""
        found = []
        for pid in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if pid.isdigit() and os.readlink(f"/proc/{pid}/cwd").startswith(self.dir):
                    found += [int(pid)] * alive(int(pid))
        return found

    def kill_ours(self) -> list[int]:
        """Kill every process that works in the directory of this test."""
        found = self.leftover_processes()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return found

    def assert_table(self, cases: dict[Any, Any], act: Callable[[Any], Any]) -> None:
        """Check what is returned for each case, given as its argument and the result."""
        for given, result in cases.items():
            with self.subTest(given):
                self.assertEqual(act(given), result)

    def file(self, name: str) -> str:
        return os.path.join(self.dir, name)

    def read(self, name: str) -> str:
        """Return a file that a job wrote; empty where it has not."""
        try:
            with open(self.file(name)) as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def lines(self, name: str) -> list[str]:
        return self.read(name).split("\n")[:-1]

    def write(self, name: str, text: str = "") -> None:
        with open(self.file(name), "w") as file:
            file.write(text)

    def process(self, *line: str, **more: Any) -> Result:
        """Run a program to its end."""
        given = {"cwd": self.dir, "capture_output": True, "text": True, "timeout": 60, **more}
        done = subprocess.run(line, check=False, **given)
        return Result(done.returncode, done.stdout, done.stderr)

    def script(self, code: str, *words: str, prefix: Any = (), **more: Any) -> Result:
        """Run a Python program that imports queuectl."""
        env = {**os.environ, "PYTHONPATH": HERE}
        return self.process(*prefix, *PYTHON, "-c", code, *words, env=env, **more)

    def result(self, *args: str, stdin: Any = "", real: bool = False, **more: Any) -> Result:
        """Run one command, whatever it returns; `more` is for a process of its own."""
        cwd, prefix = more.pop("cwd", self.dir), more.pop("prefix", ())
        if real or self.REAL or prefix or more:
            line = [*prefix, *PYTHON, self.PROGRAM, *args]
            result = self.process(*line, input=stdin, cwd=cwd, **more)
        else:
            result = in_process(args, stdin, cwd)
        self.assertNotIn("Traceback", result.stderr)
        return result

    def run_cli(self, *args: str, code: int = 0, **more: Any) -> Result:
        """Run one command that must return a code."""
        result = self.result(*args, **more)
        self.assertEqual(result.returncode, code, result.stderr)
        return result

    def stdout(self, *args: str, **more: Any) -> str:
        """Run one command that must succeed; return what it printed."""
        return self.run_cli(*args, **more).stdout

    def json_lines(self, *args: str, **more: Any) -> list[Any]:
        """Run one command with --json; return the objects that it printed, one a line."""
        return [json.loads(line) for line in self.stdout(*args, "--json", **more).splitlines()]

    def json_object(self, *args: str, **more: Any) -> Any:
        """Run one command with --json; return the one object that it printed."""
        (found,) = self.json_lines(*args, **more)
        return found

    def assert_refused(self, *args: str, code: int = 2, **more: Any) -> str:
        """Run a command that must fail with one line; return the line."""
        found, out, err = self.result(*args, **more)
        self.assertEqual((found, out), (code, ""), err[:500])
        self.assertRegex(err, ONE_LINE)
        self.assertLess(len(err.encode()), 1000)
        return err

    def start(self, *args: str, prefix: Any = (), **more: Any) -> subprocess.Popen[str]:
        """Start a command in the background; its stderr goes to its stdout."""
        line, given = [*prefix, *PYTHON, self.PROGRAM, *args], {"stdin": subprocess.DEVNULL}
        given.update(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.dir)
        self.processes.append(subprocess.Popen(line, **{**given, **more}))
        return self.processes[-1]

    def pool(self, *args: str, **more: Any) -> subprocess.Popen[str]:
        """Start workers in the background."""
        return self.start("worker", "start", *args, **more)

    def drain(self, *args: str, **more: Any) -> str:
        """Run until nothing is left; return the event lines."""
        result = self.run_cli("worker", "start", "--drain", *args, **more)
        return str(result.stdout + result.stderr)

    def enqueue(self, command: str, **fields: Any) -> str:
        """Add a job through the library."""
        with Queue(self.path) as queue:
            return queue.enqueue(command, **{"cwd": self.dir, **fields})

    def configure(self, **settings: str) -> None:
        with Queue(self.path) as queue:
            for key, value in settings.items():
                queue.configure(key, value)

    def job(self, job_id: str) -> Any:
        with Queue(self.path, readonly=True) as queue:
            return queue.get(job_id)

    def attempts(self, job_id: str) -> Any:
        with Queue(self.path, readonly=True) as queue:
            return queue.attempts(queue.get(job_id))

    def states(self) -> dict[str, str]:
        with Queue(self.path, readonly=True) as queue:
            return {job.id: job.state for job in queue.jobs()}

    def wait_for_state(self, job_id: str, state: str, limit: float = 10.0) -> Any:
        """Wait until a job is in a state; return it."""
        wait_until(lambda: self.job(job_id).state == state, limit)
        return self.job(job_id)

    def workers(self) -> dict[str, dict[str, Any]]:
        """Return the living workers, each with the note in its lock file."""
        return queuectl.RunDirectory(self.path).alive("worker")


def claim(queue: Queue, worker: str = "worker-1", queues: Any = ()) -> Any:
    """Claim the next job for a worker; return it."""
    found = queue._ledger.claim(worker, queues)
    return found and found.job


def make_pool(case: Case, queue: Queue, **options: Any) -> queuectl.Pool:
    """Return a pool that has not begun, with a lock of its own."""
    chosen = queuectl.PoolOptions(**options)
    files = queuectl.PoolFiles(queue._db, chosen, queue._reader.clock)
    case.addCleanup(files.close)
    return queuectl.Pool(queue._ledger, files, chosen)


class Clocked(Case):
    """A queue with a clock that the test moves."""

    def setUp(self) -> None:
        super().setUp()
        self.now = 1e6
        self.queue = Queue(self.path, clock=lambda: self.now)
        self.queue._db.set_synchronous("normal")
        self.addCleanup(self.queue._db.close)

    def claim(self, *queues: str) -> Any:
        return claim(self.queue, "worker-1", queues)

    def finish(self, code: int = 0, job: Any = None) -> Any:
        """End a job, by default the next one, with an exit code; return its new record."""
        outcome = Outcome("exited", self.now, self.now, code, queuectl.explain_exit(code))
        return self.queue._ledger.finish(job or self.claim(), outcome)[0]

    def run_all(self) -> str:
        """Complete all due jobs; return their ids in order."""
        return " ".join(self.finish(0, job).id for job in iter(self.claim, None))

    def ids(self) -> str:
        return " ".join(job.id for job in self.queue.jobs())

    def why(self, job_id: str) -> str:
        return queuectl.reason_to_wait(self.queue._reader, self.queue.get(job_id))

    def sqlite_steps(self, act: Callable[[], object]) -> int:
        """Return the cost of an action, in hundreds of SQLite virtual machine steps."""
        taken: list[int] = []
        self.queue._db.connection.set_progress_handler(lambda: taken.append(1), 100)
        act()
        self.queue._db.connection.set_progress_handler(None, 0)
        return len(taken)


class Tags(html.parser.HTMLParser):
    """The elements of an HTML page, with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] not in ("script", "style"):
            self.text += data


HOSTILE = "NUL\0 ]]> \x1b[31mred\x1b[m <script>alert(1)</script> \u202eevil\u2066 ``` x | y & \"'"
HOSTILE_ID = "<script>`|\"'*_[x](y)&amp;]]>"


class Reported(Clocked):
    """A queue whose attempts take as long, and end as, a test says."""

    def attempt(self, code: Any = 0, took: float = 1.0, **more: Any) -> Any:
        """Run the next job: None stands for one that could not start; return its new record."""
        job = claim(self.queue, more.pop("worker", "worker-aa-1"))
        started, self.now = self.now, self.now + took
        error = "cannot start: no" if code is None else queuectl.explain_exit(code)
        given = {"end": "exited", "exit_code": code, "error": error, **more}
        outcome = Outcome(started=started, finished=self.now, **given)
        return self.queue._ledger.finish(job, outcome)[0]

    def run_jobs(self) -> None:
        """Make one job of each kind."""
        configure = self.queue.configure
        configure("backoff_base", "1")
        self.queue.enqueue("true", id="good")
        self.attempt(took=4)
        self.queue.enqueue("true", id="flaky")
        self.attempt(1, output=b"first\n")
        self.now += 1
        self.attempt(75)
        self.now += 1
        self.attempt(took=3)
        self.queue.enqueue("true", id=HOSTILE_ID, queue=HOSTILE_ID, max_retries=2)
        self.attempt(3, output=HOSTILE.encode() + b"\xff\n")
        self.now += 1
        self.attempt(3, output=HOSTILE.encode() + b"\xff\n")
        self.queue.enqueue("true", id="nowhere", max_retries=1)
        self.attempt(None)
        self.queue.enqueue("true", id="blocked", after=["nowhere"])
        self.queue.enqueue("true", id="cancelled")
        self.queue.cancel(["cancelled"])
        self.queue.enqueue("true", id="nightly", every=3600, run_at=self.now + 100)

    def report(self, style: str, *args: str) -> str:
        """Return a report as the command prints it, by the clock of the test."""
        chosen = queuectl.parse(["report", "--format", style, *args])
        with contextlib.redirect_stdout(io.StringIO()) as out:
            queuectl.cmd_report(chosen, self.queue)
        return out.getvalue()

    def facts(self, *args: str) -> Any:
        return json.loads(self.report("json", *args))


NUMBERS = "n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :number)"
FAKE_JOBS = """
INSERT INTO jobs (id, queue, command, cwd, priority, state, readiness, created_at, updated_at,
  run_after, run, attempts)
SELECT i, 'q' || i % 5, 'true', '/', 0, CASE WHEN i % 9 THEN 'completed' ELSE 'dead' END, 1,
  1e6, 1e6 + i, 1e6, 2, 2 FROM n"""
FAKE_ATTEMPTS = """
INSERT INTO attempts SELECT (i + 1) / 2, 1 + i % 2, 'worker-aa-' || i % 8,
  CASE WHEN i % 2 AND i / 2 % 9 THEN 'completed' ELSE 'failed' END, i % 100, 1e6 + i,
  1e6 + i + i % 7, i % 2 = 0, 'exit code ' || i % 30, 0, CAST(hex(zeroblob(2500)) AS BLOB) FROM n"""


RUN_UNTIL_GO = "until [ -e go ]; do sleep 0.02; done"  # a job that runs until the test says go
RUN_ALONE = "exec 9>>%s.lock; flock -n 9 || echo twice >> %s.log; echo $$ >> %s.log; "


def resource_limit(resource_id: int, limit: int) -> Callable[[], None]:
    """Return a preexec_fn that limits a resource of a process."""
    return lambda: resource.setrlimit(resource_id, (limit, limit))


@NEEDS_SHELL
class Live(Case):
    """Tests that look at living processes."""

    def require_tool(self, *argv: str) -> None:
        """Skip the test if a tool is missing or lacks the permission to do this."""
        try:
            done = self.process(*argv)
        except FileNotFoundError:
            raise unittest.SkipTest(f"there is no {argv[0]}") from None
        if done.returncode:
            raise unittest.SkipTest(f"{argv[0]} does not work here: {done.stderr.strip()}")

    def in_mount_namespace(self, script: str) -> list[str]:
        """Mount something in a new namespace; return the prefix of a command that runs there."""
        new = ["unshare", "-m"] if ROOT else ["unshare", "-rm"]
        self.require_tool("nsenter", "--version")
        self.require_tool(*new, "sh", "-c", script)
        pipe, line = subprocess.PIPE, [*new, "sh", "-c", f"{script} && echo ready && exec cat"]
        holder = subprocess.Popen(line, stdin=pipe, stdout=pipe, cwd=self.dir)
        self.addCleanup(holder.communicate)
        self.assertEqual(holder.stdout.readline(), b"ready\n")
        enter = ["nsenter", "-t", str(holder.pid), "-m"]
        enter += [] if ROOT else ["-U", "--preserve-credentials"]
        return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', self.dir]

    def connect(self, path: str = "") -> Any:
        """Open a database as another program does."""
        return contextlib.closing(sqlite3.connect(path or self.path, isolation_level=None))

    def assert_sound(self, path: str = "") -> None:
        with self.connect(path) as db:
            self.assertEqual(db.execute("PRAGMA integrity_check").fetchall(), [("ok",)])

    def wait_for_file(self, name: str, text: str = "") -> None:
        """Wait until a job has made a file, and written a text to it."""
        wait_until(lambda: os.path.exists(self.file(name)) and text in self.read(name))

    def use_queue(self, name: str) -> None:
        """Use another queue from now on, in the program too."""
        os.makedirs(self.file(name), exist_ok=True)
        self.path = os.path.join(self.dir, name, "queuectl.db")
        os.environ["QUEUECTL_DB"] = self.path

    def wait_for_output(
        self, process: subprocess.Popen[str], text: str, limit: float = 10.0
    ) -> None:
        """Wait until a command has printed a text; consumes its output so far."""
        said, fd = "", process.stdout.fileno()
        while text not in said:
            self.assertTrue(select.select([fd], [], [], limit)[0], f"no {text!r} in {said!r}")
            more = os.read(fd, 65536).decode()
            self.assertTrue(more, f"no {text!r} in {said!r}")
            said += more

    def second_here(self) -> float:
        """Return how long a second of work takes on this machine, which may be busy."""
        began = time.monotonic()
        self.stdout("status", real=True)
        return max(1.0, 10 * (time.monotonic() - began))

    def wait_for_workers(self, count: int) -> None:
        """Wait until a number of workers are alive and have written their notes."""
        wait_until(lambda: [bool(note) for note in self.workers().values()] == [True] * count)

    def wait_for_poll(self, pool: subprocess.Popen[str]) -> None:
        """Wait until an idle pool has polled again."""
        before = count_sleeps(pool.pid)
        wait_until(lambda: count_sleeps(pool.pid) > before)

    def kill_workers(self, number: int = 9) -> None:
        for facts in self.workers().values():
            os.kill(facts["pid"], number)

    def assert_exits(self, pool: subprocess.Popen[str], code: int, limit: float = 10.0) -> float:
        """Wait for a pool's end; return how long it took."""
        began = time.monotonic()
        output = pool.communicate(timeout=limit)[0]
        self.assertEqual(pool.returncode, code, output)
        return time.monotonic() - began


class Terminal:
    """A command on a terminal of its own."""

    def __init__(
        self, case: Case, *args: str, columns: int = 80, program: Any = (), **more: Any
    ) -> None:
        self.fd, slave = pty.openpty()
        case.addCleanup(os.close, self.fd)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
        env.update({"TERM": "xterm", **more.pop("env", {})})
        line = [*(program or (*PYTHON, COMPILED)), *args]
        where: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": slave, "stderr": slave}
        self.process = subprocess.Popen(line, cwd=case.dir, env=env, **{**where, **more})
        case.addCleanup(self.process.wait)
        case.addCleanup(self.process.kill)
        os.close(slave)
        self.shown = ""

    @classmethod
    def shell(cls, case: Case) -> Terminal:
        """Start a shell that has jobs in the foreground and background; `q` is queuectl."""
        if not shutil.which("bash"):
            raise unittest.SkipTest("there is no bash")
        case.write("q", f'#!/bin/sh\nexec {shlex.join([*PYTHON, COMPILED])} "$@"\n')
        os.chmod(case.file("q"), 0o755)
        take = "import fcntl, os, sys, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0); os.dup2(1, 0)"
        run = f"{take}; os.execvp('bash', ['bash', '--norc', '--noprofile', '--noediting', '-i'])"
        program = (sys.executable, "-c", run)
        terminal = cls(case, program=program, env={"PS1": "> "}, start_new_session=True)
        terminal.type('PATH=.:$PATH; echo re""ady')
        terminal.wait_for("ready")
        return terminal

    def type(self, text: str) -> None:
        """Type a line, or a control character."""
        os.write(self.fd, (text if text < " " else text + "\n").encode())

    def wait_for(self, pattern: str, limit: float = 10.0) -> str:
        """Wait until something is shown; return, and forget, everything shown so far."""
        deadline = time.monotonic() + limit
        while not re.search(pattern, self.shown):
            more = select.select([self.fd], [], [], limit)[0] and os.read(self.fd, 65536)
            if not more or time.monotonic() > deadline:
                raise AssertionError(f"no {pattern!r} in {self.shown!r}")
            self.shown += more.decode()
        shown, self.shown = self.shown, ""
        return shown

    def end(self) -> str:
        """Return all that is shown until the command ends."""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while True:
                self.shown += os.read(self.fd, 65536).decode()
        self.process.wait(10)
        return self.shown.replace("\r\n", "\n")


def make_job(**fields: Any) -> queuectl.Job:
    """Return a job in processing, with the given fields."""
    defaults = dict.fromkeys(queuectl.Job._fields)
    defaults.update(state="processing", run=1, run_after=0.0)
    return queuectl.Job(**{**defaults, **fields})


CLOSED_STREAMS = ("sh", "-c", '"$@" <&- >&- 2>&-', "sh")  # a prefix of a command


RAW = b"\xff\xfe\0\x1b[31mred\x1b[0m\r\n\xe2\x80\xae\x07\xc3\xa9\xe2\x82"


PRINT_RAW = "printf '" + "".join(f"\\{byte:03o}" for byte in RAW) + "'"


def run_alone(name: str) -> str:
    """Return the start of a job that logs its pid, and "twice" if it already runs."""
    return RUN_ALONE % (name, name, name)


def unrelated_process(case: Case) -> subprocess.Popen[bytes]:
    """Start a process that no job started."""
    process = subprocess.Popen(["sleep", "300"], start_new_session=True, cwd=case.dir)
    case.processes.append(process)
    return process


def process_of(case: Case, queue: Queue, job: Any, command: str) -> subprocess.Popen[bytes]:
    """Start a process that belongs to the current attempt of a job."""
    env = {**os.environ, "QUEUECTL_RUN": queue._db.run_dir.run_token(job)}
    process = subprocess.Popen(["sh", "-c", command], env=env, cwd=case.dir)
    case.processes.append(process)
    return process


def full_scans() -> tuple[list[Any], Any]:
    """Return a list to which a patch, also returned, adds each look at all of /proc."""
    count: list[Any] = []
    scan = queuectl.table_from_proc
    patched = lambda pids=(): scan(pids or count.append(1) or ())  # noqa: E731
    return count, mock.patch.object(queuectl, "table_from_proc", patched)


def hold_write_lock(case: Case) -> sqlite3.Connection:
    """Hold the write lock of the database, as another program may."""
    db = sqlite3.connect(case.path, isolation_level=None)
    case.addCleanup(db.close)
    db.execute("BEGIN IMMEDIATE")
    return db


def digest(path: str) -> tuple[str, int]:
    """Return a value that changes when the file is written to."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest(), os.stat(path).st_mtime_ns


def obeying_modes(case: Live) -> list[str]:
    """Return the prefix of a command that file modes restrict, even for root."""
    prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"] if ROOT else []
    case.require_tool(*prefix, "true")
    case.addCleanup(os.chmod, case.dir, 0o700)
    return prefix


FORKS = "?clone,?clone3,?fork,?vfork"


FAIL_FORKS = ("-e", f"trace={FORKS}", "-e", f"inject={FORKS}:error=EAGAIN")


def inject(case: Live, pid: int, *options: str) -> subprocess.Popen[str]:
    """Make system calls of a process fail until the returned strace ends."""
    case.require_tool("strace", "-o", "/dev/null", "true")
    line = ["strace", "-o", "trace", "-p", str(pid), *options]
    strace = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, cwd=case.dir)
    case.addCleanup(strace.communicate)
    case.addCleanup(strace.kill)
    message = strace.stderr.readline()
    if "attached" not in message:
        raise unittest.SkipTest(f"strace may not attach here: {message.strip()}")
    return strace


def exhaust_descriptors(pid: int) -> Callable[[], Any]:
    """Prevent a process from opening more files; return a function that restores its limit."""
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    in_use = map(int, os.listdir(f"/proc/{pid}/fd"))
    lowest_free = min(set(range(1000)).difference(in_use))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    return partial(resource.prlimit, pid, resource.RLIMIT_NOFILE, limits)


INVALID_CRON_RULES = (
    *("", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *"),
    *("* * * * 8", "*/0 * * * *", "a * * * *", "-1 * * * *", "5-1 * * * *", "1,,2 * * * *"),
    *("* * * * mon-xyz", "0 0 31 2 *", "@reboot", "9" * 5000 + " * * * *"),
)


@contextlib.contextmanager
def time_zone(name: str) -> Iterator[None]:
    """Use another local time zone for a while."""
    try:
        with mock.patch.dict(os.environ, TZ=name):
            time.tzset()
            yield
    finally:
        time.tzset()


def enqueue_graph(queue: Queue, *jobs: str) -> None:
    """Add jobs, each written as its id followed by the ids of its parents."""
    for job_id, *parents in map(str.split, jobs):
        queue.enqueue("true", id=job_id, after=parents, max_retries=1)


def enqueue_pairs(queue: Queue) -> None:
    """Add two jobs to each of three queues, the queue of the highest priority last."""
    for name, priority in (("gpu", 0), ("cpu", 5), ("default", 9)):
        for number in "12":
            queue.enqueue("true", id=name + number, queue=name, priority=priority)


SHOP = """
import os, signal, sys
from queuectl import Queue
queue = Queue("shop.db", guest=True)
with queue.transaction() as db:
    db.execute("INSERT INTO orders VALUES (1, 'tea')")
    queue.enqueue("true", id="invoice-1")
with queue.transaction() as db:
    db.execute("INSERT INTO orders VALUES (2, 'cake')")
    queue.enqueue("true", id="invoice-2")
    if "killed" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
"""


FORK_AND_CLOSE = """if True:
    import glob, os, subprocess, sys, threading
    from queuectl import Queue, QueueError

    queue, other = Queue("queuectl.db"), Queue("queuectl.db")
    child_ready, parent_closed = os.pipe(), os.pipe()
    queue.enqueue("true", id="before")
    other.counts()
    if not os.fork():
        queue.enqueue("true", id="child")
        os.write(child_ready[1], b".")
        os.read(parent_closed[0], 1)
        other.enqueue("true", id="child-2")
        os._exit(0)
    os.read(child_ready[0], 1)
    queue._db.close()
    other._db.close()
    subprocess.run([sys.executable, sys.argv[1], "enqueue", "--id", "stranger", "true"])
    os.write(parent_closed[1], b".")
    os.wait()

    def refused():
        child = os.fork()
        if child:
            return os.WEXITSTATUS(os.waitpid(child, 0)[1])
        try:
            Queue("queuectl.db").enqueue("true", id="lost")
        except QueueError as error:
            os._exit(error.code if "before the fork" in str(error) else 9)
        os._exit(0)

    with queue.transaction():
        queue.enqueue("true", id="inside")
        print(refused())

    used, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (queue.counts(), used.set(), done.wait()))
    thread.start()
    used.wait()
    print(refused())
    done.set()
    thread.join()

    queue.counts()
    child = os.fork()
    if not child:
        files = map(os.path.realpath, glob.glob("/proc/self/fd/*"))
        print([file for file in files if "/queuectl.db" in file], flush=True)
        queue.enqueue("true", id="after")
        os._exit(0)
    os.waitpid(child, 0)

    def jobs():
        yield from ({"command": "true"} for _ in range(10_000))
        child = os.fork()
        if not child:
            os._exit(0)  # in the transaction of its parent
        os.waitpid(child, 0)

    list(queue.enqueue_many(jobs()))
"""


FORK_DURING_FORK = """if True:
    import os, threading
    from queuectl import Queue, QueueError

    def fork():
        child = os.fork()
        if child:
            return os.WEXITSTATUS(os.waitpid(child, 0)[1])
        try:
            Queue("queuectl.db").enqueue("true")
        except QueueError as error:
            os._exit(error.code if "before the fork" in str(error) else 9)
        os._exit(0)

    def fork_in_thread():  # registered before those of queuectl, so called after them
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=fork)
            thread.start()
            thread.join()

    os.register_at_fork(before=fork_in_thread)
    queue = Queue("queuectl.db")
    with queue.transaction():
        print(fork())
"""


FORK_BESIDE_THREADS = """if True:
    import os, threading, queuectl

    def use():
        with queue.transaction():
            begun.wait()
            done.wait()

    def hold():
        queue.counts()
        begun.wait()
        done.wait()

    queue = queuectl.Queue("queuectl.db")
    begun, done = threading.Barrier(4), threading.Event()
    for target in (use, hold, hold):
        threading.Thread(target=target).start()
    begun.wait()
    child = os.fork()
    if not child:
        os._exit(len(queuectl.CONNECTIONS))
    print(os.WEXITSTATUS(os.waitpid(child, 0)[1]))
    done.set()
"""


FORK_IN_TICK = """if True:
    import os, threading, time
    from queuectl import Queue, work

    def tick():
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)

    def cancel():
        with Queue("queuectl.db") as queue:
            while queue.get("x").state != "processing":
                time.sleep(0.01)
            queue.cancel("x")

    with Queue("queuectl.db") as queue:
        queue.enqueue("sleep 60", id="x")
    threading.Thread(target=cancel).start()
    work("queuectl.db", drain=True, tick=tick)
"""


# --- rules ----------------------------------------------------------------------------------------


class Rules(Case):
    """Pure functions, as tables of cases."""

    def rejects(self, rule: Callable[[Any], Any], *cases: Any) -> None:
        """Check that a rule raises ValueError for each case."""
        for given in cases:
            with self.subTest(given), self.assertRaises(ValueError):
                rule(given)

    @internal
    def test_durations_are_parsed_and_invalid_ones_rejected(self) -> None:
        valid = {
            "0": 0,
            ".5": 0.5,
            "90": 90,
            "90s": 90,
            "5m": 300,
            "1h30m": 5400,
            "1.5h": 5400,
            "2d": 172800,
            "1W": 604800,
            "5 m": 300,
            "10min": 600,
            "1hour": 3600,
            "2 days 3 hrs": 183600,
        }
        self.assert_table(valid, queuectl.parse_duration)
        texts = ("", "x", "5 x", "-1", "5 mo", "1h30", "1e3", "nan", "11000d", "m")
        self.rejects(queuectl.parse_duration, *texts)
        self.rejects(queuectl.parse_duration, None, True, [], -1)

    @internal
    def test_sizes_are_parsed_and_invalid_ones_rejected(self) -> None:
        valid = {"0": 0, "7": 7, "64K": 65536, "1M": 1 << 20, "1.5 MiB": 3 << 19, "2kb": 2048}
        self.assert_table({**valid, 9: 9}, queuectl.parse_size)
        self.rejects(queuectl.parse_size, "", "x", "1T", "257M", "-1", None, True, -1, 1 << 29)
        self.rejects(queuectl.parse_size, "9" * 400, "9" * 400 + "G")

    @internal
    def test_times_are_parsed_and_invalid_ones_rejected(self) -> None:
        valid = {
            "1970-01-01T00:01:00Z": 60,
            "1970-01-01T01:00+01:00": 0,
            "2030-01-31 08:00:00+00:00": 1896076800,
            "1896076800": 1896076800,
            "2030-01-31T08:00": time.mktime((2030, 1, 31, 8, 0, 0, 0, 0, -1)),  # local time
        }
        self.assert_table(valid, queuectl.parse_time)
        texts = ("", "tomorrow", "2030-13-01", "12345678", "12", "9" * 30)
        self.rejects(queuectl.parse_time, *texts)
        self.rejects(queuectl.parse_time, None, True, -1, 1e18, float("nan"))

    @internal
    def test_durations_and_relative_times_are_printed_briefly(self) -> None:
        durations = {
            0.0034: "0.003 s",
            0.123: "0.12 s",
            1: "1 s",
            42.4: "42 s",
            59.7: "1m",
            200: "3m20s",
            7200: "2h",
            90061: "1d1h",
        }
        self.assert_table(durations, queuectl.format_duration)
        offsets = {0: "now", -200: "3m20s ago", 7200: "in 2h", -0.4: "now"}
        self.assert_table(offsets, lambda offset: queuectl.format_distance(1000.0 + offset, 1000.0))

    @internal
    def test_settings_survive_being_printed_and_read_back(self) -> None:
        defaults = {key: setting.default for key, setting in queuectl.SETTINGS.items()}
        for key, value in {**defaults, "synchronous": "full", "shell": ("a b", "-c")}.items():
            with self.subTest(key):
                read = queuectl.SETTINGS[key].read(queuectl.setting_text(value))
                self.assertEqual((type(read), read), (type(value), value))

    @internal
    @NEEDS_SHELL
    def test_exit_codes_are_explained(self) -> None:
        meanings = {
            0: None,
            3: "exit code 3",
            126: "exit code 126 (not executable)",
            127: "exit code 127 (command not found)",
            137: "exit code 137 (128 + SIGKILL)",
            -9: "killed by SIGKILL",
            -15: "killed by SIGTERM",
            -99: "killed by signal 99",
        }
        self.assert_table(meanings, queuectl.explain_exit)

    @internal
    def test_control_characters_are_escaped(self) -> None:
        cases = {"\x1b[2J": "\\x1b[2J", "a\nb": "a\\nb", "\u202e": "\\u202e", "é€": "é€"}
        self.assert_table(cases, queuectl.printable)

    @internal
    @NEEDS_SHELL
    def test_local_time_follows_the_clock_changes_of_its_zone(self) -> None:
        cases = (  # in Berlin, where clocks change on 2026-03-29 and 2026-10-25
            ("2026-03-29T01:59", "2026-03-29T00:59Z"),
            ("2026-03-29T02:30", "2026-03-29T01:30Z"),  # skipped: an hour later
            ("2026-03-29T03:00", "2026-03-29T01:00Z"),
            ("2026-10-25T02:30", "2026-10-25T00:30Z"),  # ambiguous: the first of the two
            ("2026-10-25T02:30+01:00", "2026-10-25T01:30Z"),
            ("2026-10-25T03:00", "2026-10-25T02:00Z"),
        )
        for local, utc in cases:
            with time_zone("Europe/Berlin"), self.subTest(local):
                self.assertEqual(queuectl.parse_time(local), queuectl.parse_time(utc))

    def test_messages_repeat_only_the_beginning_of_a_long_word(self) -> None:
        self.enqueue("true")
        word = "\x1b" * 500_000 + "x" * 500_000
        for line in (
            "%s",
            "worker %s",
            "list --%s",
            "list --state %s",
            "show %s",
            "cancel %s",
            "logs 1 --run %s",
            "config get %s",
            "config set timeout %s",
            "config set shell '%s",
            "completion %s",
            "prune --state %s",
            "enqueue --id %s -- true",
            "enqueue --after %s -- true",
            "enqueue --priority %s -- true",
            "enqueue --cron %s -- true",
        ):
            for text in (word, word[::-1]):
                with self.subTest(line, text=text[0]):
                    args = [argument.replace("%s", text) for argument in line.split()]
                    self.assert_long_word_is_cut(*args)
        self.assert_long_word_is_cut("enqueue", "--cron", f"{word} * * * *", "true")
        for job in ({"command": "true", word: 1}, {"command": "true", "after": [word]}):
            self.assert_long_word_is_cut("enqueue", "-", stdin=json.dumps(job))
        self.assert_long_word_is_cut("--db", word, "list")

    def assert_long_word_is_cut(self, *args: str, stdin: str = "") -> None:
        code, out, err = self.result(*args, stdin=stdin)
        self.assertIn(code, (1, 2, 4))
        self.assertEqual((out, err.count("\n")), ("", 1))
        self.assertLess(len(err), 25_000 if "--db" in args else 2000)


class RulesRetry(Case):
    """The retry rule: the state and attempt count that follow from an attempt."""

    @internal
    def test_backoff_grows_up_to_its_maximum(self) -> None:
        config = {"backoff_base": 2.0, "backoff_max": 60.0}
        waits = {1: 2, 2: 4, 3: 8, 10: 60, 100_000: 60}
        self.assert_table(waits, lambda attempts: queuectl.backoff(attempts, config))

    @internal
    def test_attempt_outcome_decides_state_and_attempt_count(self) -> None:
        config = {key: setting.default for key, setting in queuectl.SETTINGS.items()}
        cases = {  # fate, error, attempts, cancelling -> state, attempts
            ("exited", None, 1, 0): ("completed", 1),
            ("exited", "exit code 1", 1, 0): ("pending", 1),
            ("exited", "exit code 1", 3, 0): ("dead", 3),
            ("exited", "exit code 1", 1, 1): ("cancelled", 1),
            ("exited", None, 1, 1): ("completed", 1),
            ("crashed", "its worker died", 2, 0): ("pending", 2),
            ("crashed", "its worker died", 3, 0): ("dead", 3),
            ("released", "stopped", 3, 0): ("pending", 2),
            ("cancelled", "cancelled", 1, 0): ("cancelled", 1),
        }

        def after(case: tuple[str, str | None, int, int]) -> tuple[str, int]:
            fate, error, attempts, cancelling = case
            job = make_job(attempts=attempts, cancel_requested=cancelling)
            outcome = Outcome(fate, 100.0, 200.0, None, error)
            job = queuectl.after_attempt(job, outcome, config, 200.0)
            return job.state, job.attempts

        self.assert_table(cases, after)

    @internal
    def test_retry_waits_as_its_job_or_the_settings_say_less_a_random_part(self) -> None:
        defaults = {key: setting.default for key, setting in queuectl.SETTINGS.items()}
        cases = {  # delays of the job, exit code, attempts, jitter, chance -> wait
            ("10s,1m,10m", 1, 1, 0, 0.5): 10,
            ("10s,1m,10m", 1, 2, 0, 0.5): 60,
            ("10s,1m,10m", 1, 3, 0, 0.5): 600,
            ("10s,1m,10m", 1, 50, 0, 0.5): 600,
            ("0", 1, 3, 0, 0.5): 0,
            ("7d", 1, 1, 0, 0.5): 604800,  # backoff_max is for those that have none of their own
            ("10s,1m,10m", 75, 2, 0, 0.5): 10,  # the first snooze
            ("", 1, 3, 0, 0.5): 8,
            ("", 1, 3, 0.25, 0.5): 7,
            ("", 1, 3, 1, 0.0): 8,
            ("", 1, 3, 1, 1.0): 0,
            ("10s,1m,10m", 1, 2, 0.5, 1.0): 30,
        }

        def wait(case: tuple[str, int, int, float, float]) -> float:
            delays, code, attempts, jitter, chance = case
            delays = queuectl.valid_delays(delays) if delays else None
            job = make_job(retry_delays=delays, attempts=attempts, max_retries=99, snoozes=0)
            outcome = Outcome("exited", 0.0, 100.0, code, "x")
            settings = {**defaults, "jitter": jitter}
            return queuectl.after_attempt(job, outcome, settings, 100.0, chance).run_after - 100

        self.assert_table(cases, wait)
        self.assertEqual(queuectl.valid_delays([1, "2m", 0.5]), "1,120,0.5")
        self.assertEqual(queuectl.valid_delays(1), "1")

    @internal
    def test_retry_of_a_schedule_waits_no_longer_than_until_its_next_occurrence(self) -> None:
        settings = {key: setting.default for key, setting in queuectl.SETTINGS.items()}
        cases = {  # rule, end, exit code, attempts, snoozes, delays -> wait; now is 10 minutes late
            ("every 3600", "exited", 75, 1, 0, None): 2,
            ("every 3600", "exited", 75, 1, 14, None): 3000,
            ("every 60", "exited", 75, 1, 14, None): 60,
            ("cron 0 * * * *", "exited", 75, 1, 14, None): 3000,
            ("every 3600", "exited", 1, 14, 0, None): 3000,
            ("every 3600", "exited", 1, 1, 0, "7200"): 3000,
            ("every 3600", "exited", 1, 1, 0, "0"): 0,
            ("every 3600", "timed out", None, 14, 0, None): 3000,
            ("every 3600", "crashed", None, 2, 0, None): 0,
            (None, "exited", 75, 1, 14, None): 2**15,
        }

        def wait(case: tuple[Any, ...]) -> float:
            rule, end, code, attempts, snoozes, delays = case
            job = make_job(rule=rule, attempts=attempts, snoozes=snoozes, retry_delays=delays)
            job = job._replace(scheduled_for=360_000.0, max_retries=99)
            outcome = Outcome(end, 360_000.0, 360_600.0, code, "x")
            return queuectl.after_attempt(job, outcome, settings, 360_600.0).run_after - 360_600

        self.assert_table(cases, wait)


class RulesCron(Case):
    """Cron rules, and the next time that one names."""

    TIMES = (  # rule, after, next
        ("*/5 * * * *", "2026-01-01 00:02", "2026-01-01 00:05"),
        ("*/5 * * * *", "2026-01-01 00:05", "2026-01-01 00:10"),
        ("59 23 31 12 *", "2026-12-31 23:59", "2027-12-31 23:59"),
        ("0 3 * * mon-fri", "2026-01-02 03:00", "2026-01-05 03:00"),
        ("0 12 * DEC Sun", "2026-01-01 00:00", "2026-12-06 12:00"),
        ("0 0 * * 0", "2026-01-01 00:00", "2026-01-04 00:00"),
        ("0 0 * * 7", "2026-01-01 00:00", "2026-01-04 00:00"),
        ("30 6 1,15 * *", "2026-01-02 00:00", "2026-01-15 06:30"),
        ("5-10/2 8 * jan *", "2026-01-01 08:05", "2026-01-01 08:07"),
        ("50/5 0 * * *", "2026-01-01 00:51", "2026-01-01 00:55"),
        ("1,2-4,*/30 0 * * *", "2026-01-01 00:04", "2026-01-01 00:30"),
        ("0 0 31 * *", "2026-01-31 00:00", "2026-03-31 00:00"),
        ("0 0 29 2 *", "2026-01-01 00:00", "2028-02-29 00:00"),
        ("0 0 29 2 *", "2096-03-01 00:00", "2104-02-29 00:00"),
        ("0 0 13 * fri", "2026-01-03 00:00", "2026-01-09 00:00"),  # either day matches
        ("0 0 13 * fri", "2026-01-09 00:00", "2026-01-13 00:00"),
        ("0 0 */13 * fri", "2026-01-03 00:00", "2026-02-27 00:00"),  # a star: both must match
        ("@hourly", "2026-01-01 00:30", "2026-01-01 01:00"),
        ("@daily", "2026-01-01 00:00", "2026-01-02 00:00"),
        ("@midnight", "2026-01-01 00:00", "2026-01-02 00:00"),
        ("@weekly", "2026-01-01 00:00", "2026-01-04 00:00"),
        ("@Monthly", "2026-01-01 00:00", "2026-02-01 00:00"),
        ("@yearly", "2026-01-01 00:00", "2027-01-01 00:00"),
        ("@annually", "2026-01-01 00:00", "2027-01-01 00:00"),
    )

    CLOCK_CHANGES = (  # in Berlin on 2026-03-29 at 2:00 and on 2026-10-25 at 3:00
        ("30 2 * * *", "2026-03-28T03:00+01:00", "2026-03-29T03:30+02:00"),  # skipped: later
        ("30 2 * * *", "2026-03-29T03:30+02:00", "2026-03-30T02:30+02:00"),
        ("*/30 * * * *", "2026-03-29T01:30+01:00", "2026-03-29T03:00+02:00"),
        ("30 2 * * *", "2026-10-24T03:00+02:00", "2026-10-25T02:30+02:00"),
        ("30 2 * * *", "2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00"),  # runs once
        ("30 * * * *", "2026-10-25T01:30+02:00", "2026-10-25T02:30+02:00"),  # runs each hour
        ("30 * * * *", "2026-10-25T02:30+02:00", "2026-10-25T02:30+01:00"),
        ("0 3 * * *", "2026-10-24T03:00+02:00", "2026-10-25T03:00+01:00"),
    )

    @internal
    @NEEDS_SHELL
    def test_cron_rules_match_the_times_that_cron_would(self) -> None:
        for place, cases in {"UTC": self.TIMES, "Europe/Berlin": self.CLOCK_CHANGES}.items():
            for rule, after, expected in cases:
                with time_zone(place), self.subTest(rule=rule, after=after):
                    found = queuectl.cron_next(rule, queuectl.parse_time(after))
                    self.assertEqual(
                        queuectl.format_time(found),
                        queuectl.format_time(queuectl.parse_time(expected)),
                    )

    @internal
    @NEEDS_SHELL
    def test_invalid_cron_rules_are_refused(self) -> None:
        for rule in (*INVALID_CRON_RULES, None, 5):
            with self.subTest(rule), self.assertRaisesRegex(ValueError, "^(must|has|names) "):
                queuectl.valid_cron(rule)


# --- SQL ------------------------------------------------------------------------------------------


class SqlPlans(Clocked):
    """The query plans of the program's statements."""

    HOT = {  # statement: index
        "NEXT_READY": "queues_open",
        "CHECKS": "jobs_due",
        "MAKE_READY": "jobs_due",
        "REOPEN": "queues_closed",
        "NEXT_SCHEDULED": "jobs_due",
        "NEXT_TOKEN": "queues_token",
        "CLAIMED": "jobs_state",
        "LATEST": "jobs_state",
        "OLDEST": "jobs_state",
        "RECENT_ENDS": "jobs_state",
        "SEQS_IN_STATE": "updated_at=? AND seq>?",
        "BY_SEQS": "INTEGER PRIMARY KEY (rowid=?)",
        "PRUNABLE": "jobs_state",
        "DRAINED": "jobs_scheduled",
        "POSITION": "jobs_ready",
        "NEWEST_OF_SCHEDULE": "jobs_schedule",
        "ACTIVE_OF_SCHEDULE": "jobs_rule",
        "SCHEDULES": "jobs_rule",
        "UNBLOCK": "needs_child",
        "MARK_MET": "PRIMARY KEY",
        "PARENTS": "needs_child",
        "PARENT_IDS": "needs_child",
        "COUNT_NOTIFICATIONS": "COVERING INDEX jobs_notifies",
        "WAITING_SUMMARY": "jobs_notifies",
        "COUNT_UNMET": "needs_child",
        "WAITS_FOR": "needs_child",
        "FAILED_ANCESTORS": "jobs USING INTEGER PRIMARY KEY (rowid=?)",
        "DROP_NEEDS": "needs_child",
        "BY_ID": "sqlite_autoindex_jobs_1",
        "SUMMARIES": "PRIMARY KEY",
        "OUTPUT_TAIL": "PRIMARY KEY",
        "OLDEST_DUE": "jobs_ready",
    }

    @internal
    def test_hot_statements_use_an_index_and_do_not_sort(self) -> None:
        """Promise 8: the cost of a hot statement does not grow with the history."""
        for name, index in self.HOT.items():
            sql = "EXPLAIN QUERY PLAN " + getattr(queuectl, name)
            args = [1] * sql.count("?") or dict.fromkeys(re.findall(r":(\w+)", sql), 1)
            rows = self.queue._db.execute(sql, args)
            plan = " ".join(str(row[-1]) for row in rows)
            with self.subTest(name):
                self.assertIn(index, plan)
                self.assertNotIn("TEMP B-TREE", plan)

    @internal
    def test_statements_scan_no_table_except_to_list_all_jobs(self) -> None:
        """Promise 8: no other statement reads every row of a table."""
        statement = r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)\b"
        scans = set()
        for name, sql in vars(queuectl).items():
            if name.isupper() and isinstance(sql, str) and re.match(statement, sql):
                args = [1] * sql.count("?") or dict.fromkeys(re.findall(r":(\w+)", sql), 1)
                for row in self.queue._db.execute("EXPLAIN QUERY PLAN " + sql, args):
                    if re.fullmatch(r"SCAN (TABLE )?(jobs|attempts|needs)", row[-1]):
                        scans.add(name)
        self.assertEqual(scans, {"JOB", "ATTEMPT", "RECENT_IDS", "LAST_JOB"})  # with limits

    @NEEDS_SHELL
    @internal
    def test_claim_cost_does_not_depend_on_blocked_or_scheduled_jobs(self) -> None:
        self.queue.enqueue("true", id="never", delay=5e6)
        for fields in ({"after": ["never"]}, {"delay": 1e6}):
            waiting = [{"command": "true", "priority": 9, **fields}] * 2000
            list(self.queue.enqueue_many([*waiting, {"command": "true"}]))
            self.assertLess(self.sqlite_steps(self.finish), 15)
        self.assertLess(self.sqlite_steps(lambda: queuectl.status_facts(self.queue._reader)), 15)

    @internal
    def test_end_of_a_plain_job_and_next_claim_execute_no_needless_statement(self) -> None:
        """Not those about parents, children and settings, if there are none or they are known."""
        self.queue.enqueue("true", id="parent")
        self.queue.enqueue("true", id="child", after="parent")
        plain = {"command": "true", "priority": 9}
        list(self.queue.enqueue_many([plain] * 3))
        ledger = self.queue._ledger
        done = Outcome("exited", self.now, self.now, 0, None)
        _, found = ledger.finish(self.claim(), done, ())
        database = self.queue._db
        with mock.patch.object(database, "execute", wraps=database.execute) as execute:
            ledger.finish(found.job, done, ())
        executed = [call[0][0].split()[0] for call in execute.call_args_list]
        self.assertEqual(executed, "BEGIN SELECT UPDATE INSERT SELECT UPDATE COMMIT".split())

    @internal
    def test_claim_cost_does_not_depend_on_the_number_of_queues(self) -> None:
        """Promise 8: a thousand queues, half of them paused, full or at their rate."""
        queue = self.queue
        queue.enqueue("true", queue="q0")
        alone = self.sqlite_steps(self.claim)
        names = [f"q{number}" for number in range(1000)]
        with queue.transaction():
            for number, name in enumerate(names):
                queue.enqueue("true", queue=name, priority=number % 7)
            for paused, full, slow in zip(*(names[first:900:6] for first in range(3))):
                queue.pause(paused)
                queue.configure("limit", "1", full)
                queue.configure("rate", "1/1h", slow)
                for name in (full, slow):
                    queue.enqueue("true", queue=name, priority=9)
        while self.claim().priority == 9:  # now these are full, or wait for a token
            pass
        for served in ((), ("q999",), names[:20], names[100:200]):
            with self.subTest(len(served)):
                cost = self.sqlite_steps(partial(self.claim, *served))
                self.assertLessEqual(cost, 2 * alone + 2 + len(served) // 5)
                next_time = partial(queue._reader.next_ready_time, served)
                self.assertLess(self.sqlite_steps(next_time), 60)
        facts = partial(queuectl.status_facts, queue._reader)
        self.assertLess(self.sqlite_steps(facts), 2500)
        self.assertLess(self.sqlite_steps(queue._reader.drain_blockers), 500)

    @internal
    def test_statements_for_some_queues_look_them_up_and_for_many_walk_the_index(self) -> None:
        for number, plan in {
            2: "SEARCH (TABLE )?queues USING PRIMARY KEY",
            40: "SCAN (TABLE )?queues USING INDEX queues_open",
        }.items():
            sql = queuectl.for_queues(queuectl.NEXT_READY, number)
            args = {f"q{n}": n for n in range(number)}
            rows = self.queue._db.execute("EXPLAIN QUERY PLAN " + sql, args)
            self.assertRegex(" ".join(row[-1] for row in rows), plan)

    def dependency_costs(self, size: int) -> dict[str, int]:
        """Return the costs of a parent with this many children and of a chain of this many jobs."""
        enqueue_graph(self.queue, "parent")
        children = [{"command": "true", "after": "parent"} for _ in range(size)]
        chain = [{"command": "true", "id": f"{size}-{n}", "queue": "chain"} for n in range(size)]
        for parent, child in zip(chain, chain[1:]):
            child["after"] = parent["id"]
        costs = {
            "children": self.sqlite_steps(lambda: list(self.queue.enqueue_many(children))),
            "chain": self.sqlite_steps(lambda: list(self.queue.enqueue_many(chain))),
            "parent": self.sqlite_steps(self.finish),
            "child": self.sqlite_steps(self.finish),
            "link": self.sqlite_steps(lambda: self.finish(0, self.claim("chain"))),
        }
        self.queue.cancel([f"{size}-1"], cascade=True)
        self.assertEqual(len(self.run_all().split()), size - 1)
        self.queue.prune()
        return costs

    @NEEDS_SHELL
    @internal
    def test_dependency_cost_is_linear_in_the_number_of_jobs(self) -> None:
        few = self.dependency_costs(30)
        many = self.dependency_costs(500)
        for operation, cost in few.items():
            with self.subTest(operation, few=cost, many=many[operation]):
                factor = 1 if operation in ("link", "child") else 24
                self.assertLess(many[operation], factor * cost + 9)
        enqueue_graph(self.queue, "top")
        chain = [{"command": "true", "id": f"x{n}", "after": f"x{n - 1}"} for n in range(1, 500)]
        list(self.queue.enqueue_many([{"command": "true", "id": "x0", "after": "top"}, *chain]))
        self.assertEqual(len(self.queue.cancel(["top"], cascade=True)), 501)


# --- system ---------------------------------------------------------------------------------------


class SystemProcesses(Live):
    """How the processes of an attempt are found and recognized."""

    @internal
    def test_pid_without_proc_counts_only_with_its_start_time(self) -> None:
        self.require_tool("ps", "-axo", "pid=,pgid=,stat=,lstart=")
        process = unrelated_process(self)
        self.enqueue("true")
        with Queue(self.path) as queue:
            job = claim(queue, "worker-dead")
        now = time.time()
        run = job.key
        namespace = queuectl.pid_namespace()
        cases = {  # key, leader, launched
            (run, process.pid, now): [process.pid],
            (run, process.pid, now - 3600): [],  # the process started later
            ("1.7.worker-dead", process.pid, now): [],
            (run, -1, now): [],
            (): [],
        }

        def processes(facts: Any) -> list[int]:
            note = dict(zip(("key", "leader", "launched"), facts), namespace=namespace)
            self.write("queuectl.db.run/worker-dead", json.dumps(note))
            return queuectl.SYSTEM.processes(queuectl.RunDirectory(self.path).trace(job))

        without_proc = mock.patch.object(queuectl, "has_proc", return_value=False)
        from_ps = lambda _: queuectl.table_from_ps()  # noqa: E731
        table = mock.patch.object(queuectl, "process_table", from_ps)
        with without_proc, table:
            self.assert_table(cases, processes)

    @internal
    @unittest.skipUnless(LINUX, "there is no /proc")
    def test_closed_standard_streams_are_not_reused_for_files_of_the_queue(self) -> None:
        self.pool(prefix=CLOSED_STREAMS)
        self.wait_for_workers(1)
        (pool,) = queuectl.RunDirectory(self.path).alive("pool").values()
        streams = [os.readlink(f"/proc/{pool['pid']}/fd/{fd}") for fd in range(3)]
        self.assertEqual(streams, ["/dev/null"] * 3)

    def as_ordinary_user(self) -> list[str]:
        """Return the prefix of a command that may examine no more than a user may."""
        prefix = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if ROOT else []
        self.require_tool(*prefix, "true")
        return prefix

    def make_unreadable_program(self) -> None:
        """Make ./secret, a shell whose processes may not be examined."""
        shutil.copy(os.path.realpath(shutil.which("sh") or ""), self.file("secret"))
        os.chmod(self.file("secret"), 0o111)

    UNREADABLE = {  # the exit of the last one lets its processes run on
        "foreground": "./secret -c 'while :; do sleep 0.1; done'; :",
        "alone": "exec ./secret -c 'while :; do sleep 0.1; done'",
        "background": "./secret -c 'while :; do sleep 0.1; done' & wait",
        "daemon": "setsid -f env -i ./secret -c 'while :; do sleep 0.1; done'"
        " 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&- >/dev/null 2>&1; sleep 300",
        "failed": "setsid -f ./secret -c 'while :; do sleep 0.1; done' >/dev/null 2>&1; exit 1",
    }

    @SLOW
    @unittest.skipUnless(LINUX, "programs can be examined")
    def test_processes_of_programs_that_may_not_be_examined_are_ended(self) -> None:
        """Promise 4: a timeout ends the whole process tree."""
        self.configure(kill_grace="0.2", max_retries="1")
        self.make_unreadable_program()
        prefix = self.as_ordinary_user()
        for tree in self.UNREADABLE.values():
            self.enqueue(tree, timeout=0.4)
        self.drain("--count", str(len(self.UNREADABLE)), code=1, prefix=prefix, timeout=8)
        wait_until(lambda: not self.leftover_processes(), 1.0)

    @unittest.skipUnless(LINUX, "programs can be examined")
    def test_unreadable_program_of_a_dead_worker_is_ended(self) -> None:
        self.configure(kill_grace="0.2")
        self.make_unreadable_program()
        self.enqueue("echo $PPID >> log; ./secret -c 'while :; do sleep 0.1; done'; :")
        self.pool(prefix=self.as_ordinary_user())
        self.wait_for_file("log", "\n")
        wait_until(lambda: len(self.leftover_processes()) >= 5)
        before = set(self.leftover_processes())
        worker = int(self.read("log"))
        os.kill(worker, 9)
        wait_until(lambda: len(self.lines("log")) == 2, 4.0)
        secrets = [
            pid for pid in before if alive(pid) and self.read(f"/proc/{pid}/comm") == "secret\n"
        ]
        self.assertEqual(secrets, [])

    @unittest.skipUnless(LINUX, "children are adopted on Linux")
    def test_background_process_of_a_completed_job_survives_the_next_ones_failure(self) -> None:
        self.configure(max_retries="1")
        self.enqueue("setsid -f env -i sleep 300 >/dev/null 2>&1; exit 0", id="first")
        self.enqueue("exit 1", id="second")
        self.pool()
        self.wait_for_state("second", "dead")
        names = [self.read(f"/proc/{pid}/comm") for pid in self.leftover_processes()]
        self.assertIn("sleep\n", names)

    @internal
    def test_signals_reach_only_processes_of_the_attempt(self) -> None:
        """A process may have ended, and its pid may have been reused, since it was found."""
        process = unrelated_process(self)
        trace = queuectl.Trace("1.1.worker", self.file("1.1.out"), 0, 0.0)
        queuectl.SYSTEM.terminate(trace, [process.pid])
        queuectl.SYSTEM.kill(trace, [process.pid])
        with self.assertRaises(subprocess.TimeoutExpired):
            process.wait(0.05)

    @NEEDS_SHELL
    @internal
    def test_process_group_of_another_user_hides_no_other_process(self) -> None:
        trace = queuectl.Trace("1.1.worker", self.file("1.1.out"), 7, 0.0)
        child = mock.Mock(pid=7, poll=lambda: None)
        refused = mock.patch("os.killpg", side_effect=PermissionError)
        with mock.patch.object(queuectl.SYSTEM, "child", child), refused as killpg:
            queuectl.SYSTEM.kill_group(trace)
        killpg.assert_called_once_with(7, signal.SIGKILL)

    @internal
    def test_age_of_a_process_is_read_in_any_language(self) -> None:
        self.write(
            "ps", "#!/bin/sh\necho 7 1 5 Ss 1-02:03:04; echo 8 7 5 S 03:04; echo 9 7 5 Z 1:0\n"
        )
        os.chmod(self.file("ps"), 0o700)
        os.environ["PATH"] = self.dir + ":" + os.environ["PATH"]
        now = time.time()
        table = queuectl.table_from_ps()
        found = {pid: (*row[:2], round(now - row.started)) for pid, row in table.items()}
        self.assertEqual(found, {7: (1, 5, 93784), 8: (7, 5, 184)})

    @SLOW
    @unittest.skipUnless(LINUX, "there is no /proc")
    def test_workers_run_and_end_jobs_where_proc_is_missing_or_of_another_namespace(self) -> None:
        own_namespace = ["unshare", "-pf"] if ROOT else ["unshare", "-rpf"]
        self.require_tool(*own_namespace, "true")
        prefixes = {
            "missing": self.in_mount_namespace("mount -t tmpfs none /proc"),
            "foreign": [*own_namespace, "--kill-child"],
        }
        for name, prefix in prefixes.items():
            with self.subTest(name):
                self.use_queue(name)
                self.configure(kill_grace="0.2", max_retries="1", output_limit="1000")
                self.enqueue("echo done", id="good")
                self.enqueue("trap '' TERM; sleep 300 & sleep 300; :", id="bad", timeout=0.3)
                self.drain("--count", "2", code=1, prefix=prefix, timeout=8)
                self.assertEqual(self.attempts("good")[0].output, b"done\n")
                self.assertEqual(self.job("bad").last_error, "timed out after 0.3 s")
        pids = self.leftover_processes()
        self.assertNotIn("sleep\n", [self.read(f"/proc/{pid}/comm") for pid in pids])

    def test_interpreter_that_does_not_know_its_path_starts_workers(self) -> None:
        python = shutil.which("python3", path=os.defpath)
        if not python:
            self.skipTest("there is no python3 in the default PATH")
        self.enqueue("true")
        start = f"python3 {shlex.quote(PROGRAM)} worker start --drain"
        result = self.process("env", "-i", "sh", "-c", start)
        self.assertEqual((result.returncode, self.job("1").state), (0, "completed"), result.stderr)

    def test_workers_start_in_a_directory_that_is_gone_or_inaccessible(self) -> None:
        prefix = obeying_modes(self)
        for name, remove in (("gone", "rmdir ../gone"), ("closed", "chmod 0 .")):
            with self.subTest(name):
                job = self.enqueue("pwd")
                script = f'mkdir {name}; cd {name}; {remove}; exec "$@"'
                options = ("--db", self.path, "worker", "start", "--drain")
                self.run_cli(*options, prefix=[*prefix, "sh", "-c", script, "sh"])
                self.assertEqual(self.job(job).state, "completed")

    @SLOW
    def test_pool_needs_no_temporary_directory(self) -> None:
        tmp = self.file("t" * 100)
        os.mkdir(tmp)
        pool = self.pool("--count", "2", env={**os.environ, "TMPDIR": tmp})
        self.wait_for_workers(2)
        self.assertEqual(os.listdir(tmp), [])
        before = self.workers().keys()
        os.rmdir(tmp)
        self.kill_workers()
        self.wait_for_output(pool, "died")
        wait_until(lambda: len(self.workers().keys() - before) == 2)

    def signal_fork_server(self, number: int) -> None:
        """Signal the fork server of the only worker, and check that a new worker is started."""
        pool = self.pool()
        self.wait_for_workers(1)
        ((name, worker),) = self.workers().items()
        status = self.read(f"/proc/{worker['pid']}/stat").rpartition(")")[2].split()
        os.kill(int(status[1]), number)
        os.kill(worker["pid"], signal.SIGKILL)
        wait_until(lambda: self.workers().keys() - {name}, 20)
        pool.terminate()
        self.assert_exits(pool, 0)

    @SLOW
    @unittest.skipUnless(LINUX, "looks for the fork server in /proc")
    def test_fork_server_that_died_is_replaced(self) -> None:
        self.signal_fork_server(signal.SIGKILL)

    @SLOW
    @unittest.skipUnless(LINUX, "looks for the fork server in /proc")
    def test_fork_server_that_does_not_answer_is_replaced(self) -> None:
        self.signal_fork_server(signal.SIGSTOP)

    @SLOW
    def test_pool_polls_where_the_file_system_has_no_fifos(self) -> None:
        strace = ("strace", "-f", "-o", "/dev/null", "-e", "trace=mknod,mknodat")
        strace += ("-e", "inject=mknod,mknodat:error=EPERM")
        self.require_tool(*strace, "true")
        pool = self.pool(prefix=strace)
        self.wait_for_workers(1)
        self.assertEqual(queuectl.RunDirectory(self.path).files("pool-", ".fifo"), [])
        self.wait_for_state(self.enqueue("true"), "completed")
        self.stdout("worker", "stop")
        self.assert_exits(pool, 0)

    @SLOW
    def test_worker_without_ctypes_survives_a_long_output(self) -> None:
        library = self.process(*PYTHON, "-c", "import _ctypes; print(_ctypes.__file__)").stdout
        if not library:
            self.skipTest("ctypes is built in")
        hide = f"mount --bind /dev/null {shlex.quote(library.strip())}"
        prefix = self.in_mount_namespace(hide)
        job = self.enqueue("head -c 20000000 /dev/zero; sleep 0.3; echo end")
        self.drain(prefix=prefix)
        (run,) = self.attempts(job)
        self.assertEqual(run.output[-4:], b"end\n")
        total = run.bytes_dropped + len(run.output)  # what came during a truncation is not counted
        self.assertTrue(16 << 20 < total <= 20000004, total)

    @unittest.skipUnless(hasattr(signal, "SIGUSR1"), "there is no SIGUSR1")
    def test_sigusr1_writes_the_stacks_of_pool_and_worker(self) -> None:
        job = self.enqueue(f"touch started; {RUN_UNTIL_GO}")
        pool = self.pool()
        self.wait_for_file("started")
        (worker,) = self.workers().values()
        before = count_sleeps(worker["pid"])
        wait_until(lambda: count_sleeps(worker["pid"]) > before)  # it watches its job
        for pid, function in ((pool.pid, "in turn"), (worker["pid"], "in watch")):
            os.kill(pid, signal.SIGUSR1)
            self.wait_for_output(pool, function)
        self.write("go")
        self.wait_for_state(job, "completed")


# --- run directory --------------------------------------------------------------------------------


class RunDirectoryFiles(Live):
    """Locks and other files beside the database."""

    @internal
    def test_lock_taken_during_cleanup_is_kept(self) -> None:
        with Queue(self.path) as queue:
            run_dir = queue._db.run_dir
            names = ["1.1.out", "worker-1-1"]
            taken: list[Any] = []
            for name in names:
                self.write(run_dir.file(name))

            def free(name: str) -> bool:
                """Report a lock as free, and take it right after."""
                taken.append(queuectl.LockFile(run_dir.file(name)))
                self.addCleanup(taken[-1].close)
                return True

            with mock.patch.object(run_dir, "is_unlocked", free):
                run_dir.clean([])
            self.assertEqual([os.path.basename(lock.path) for lock in taken], names)
            self.assertEqual(run_dir.files(), names)

    def test_pool_on_a_copied_database_leaves_jobs_of_the_original_alone(self) -> None:
        job = self.enqueue(f"echo $$ >> log; touch started; {RUN_UNTIL_GO}")
        self.pool()
        self.wait_for_file("started")
        copy = self.file("copy.db")
        with Queue(self.path) as queue, contextlib.closing(sqlite3.connect(self.path)) as db:
            db.execute("VACUUM INTO ?", (copy,))
            os.chmod(copy, 0o600)
            pool = self.pool(env={**os.environ, "QUEUECTL_DB": copy})
            self.wait_for_output(pool, "its worker died")
            wait_until(lambda: len(self.lines("log")) == 2)  # the copy is a queue of its own
            self.write("go")
            self.wait_for_state(job, "completed")
            self.assertEqual([attempt.error for attempt in queue.attempts(queue.get(job))], [None])

    @internal
    def test_leftovers_of_dead_workers_and_pools_are_removed_at_the_next_start(self) -> None:
        self.enqueue("true", delay=3600)
        self.enqueue("true")
        with Queue(self.path) as queue:
            held = queuectl.LockFile(queue._db.run_dir.file("worker-1"))
            self.addCleanup(held.close)
            claim(queue, "worker-1")
        kept = ["2.1.out", "workers.log"]
        leftovers = ["1.7.out", "1.7.kept.eA==", "worker-9", "pool-9.stop", "pool-9.fifo"]
        for name in kept + leftovers[:-1]:
            self.write(os.path.join("queuectl.db.run", name))
        os.mkfifo(f"{self.path}.run/pool-9.fifo")
        pool = self.pool()
        self.wait_for_output(pool, " worker on ")
        wait_until(lambda: any(re.match("worker-[0-9a-f]{8}", name) for name in self.workers()))
        names = os.listdir(self.file("queuectl.db.run"))
        found = [name for name in names if not re.match("(pool|worker)-.*[0-9a-f]{8}", name)]
        self.assertEqual(sorted(found), sorted([*kept, "worker-1"]))


# --- database -------------------------------------------------------------------------------------


class DatabaseCreation(Live):
    """Which database a command uses, and which commands create it."""

    def test_reading_commands_create_no_database(self) -> None:
        commands = (
            "status",
            "list",
            "show 1",
            "logs 1",
            "dlq list",
            "dlq retry --all",
            "worker stop",
            "config unset timeout",
        )
        for command in commands:
            with self.subTest(command):
                self.assertIn("there is no queue", self.assert_refused(*command.split(), code=1))
        self.assertEqual(os.listdir(self.dir), [])

    def test_database_is_named_by_option_or_environment(self) -> None:
        self.stdout("--db", "other.db", "enqueue", "true")
        os.environ["QUEUECTL_DB"] = "other.db"
        self.assertEqual(self.json_object("status")["pending"], 1)

    def test_backslash_in_a_database_path_is_part_of_the_name(self) -> None:
        os.mkdir(self.file("a\\b"))
        self.stdout("--db", "a\\b/queuectl.db", "enqueue", "true")
        self.assertIn("queuectl.db", os.listdir(self.file("a\\b")))

    @SLOW
    def test_twelve_simultaneous_first_users_create_one_queue_with_all_jobs(self) -> None:
        users = [self.start("enqueue", "true") for _ in range(12)]
        ids = [int(user.communicate(timeout=60)[0]) for user in users]
        self.assertEqual(sorted(ids), list(range(1, 13)))
        self.assertEqual(len(self.states()), 12)
        self.assert_sound()

    @NEEDS_SHELL
    def test_stopped_process_that_creates_the_queue_delays_others_only_for_a_while(self) -> None:
        """Promise 4: an enqueue waits while another creates the queue, and finally reports it."""
        run_dir = queuectl.RunDirectory(self.path)
        run_dir.make()
        hold = "import fcntl, os, sys; fcntl.flock(1, fcntl.LOCK_EX); os.kill(os.getpid(), 19)"
        with open(run_dir.file("making"), "w") as file:
            holder = subprocess.Popen([*PYTHON, "-c", hold], stdout=file, cwd=self.dir)
        self.processes.append(holder)
        wait_until(lambda: os.waitpid(holder.pid, os.WUNTRACED | os.WNOHANG)[0])
        with mock.patch.object(queuectl, "PATIENCE", 0.1):
            line = self.assert_refused("enqueue", "true", code=4)
        self.assertIn("making has been locked by another process for 0.1 s", line)
        holder.kill()
        self.assertEqual(self.stdout("enqueue", "true"), "1\n")

    @internal
    def test_process_killed_while_it_names_a_new_queue_leaves_a_queue_that_works(self) -> None:
        self.enqueue("true")
        other_name = queuectl.RunDirectory(self.path).file("new.db")
        os.link(self.path, other_name)  # it was killed between link and unlink
        self.assertIn("pending           1", self.stdout("status"))
        self.assertEqual(self.stdout("enqueue", "true"), "2\n")
        self.assertFalse(os.path.exists(other_name))

    @internal
    def test_file_that_changes_while_it_is_read_is_read_again_and_not_called_damaged(self) -> None:
        """The last process to close a queue copies the -wal into the file."""
        self.enqueue("true")
        read_version = queuectl.schema_version
        for error in (None, sqlite3.DatabaseError("database disk image is malformed")):
            results = [error or (0, True), None]

            def read(db: sqlite3.Connection, results: list[Any] = results) -> Any:
                result = results.pop(0)
                if result:  # not the last time
                    os.utime(self.path)
                if isinstance(result, Exception):
                    raise result
                return result or read_version(db)

            with mock.patch.object(queuectl, "schema_version", read), self.subTest(error):
                with Queue(self.path, create=False) as queue:
                    self.assertEqual(queue.counts()["pending"], 1)
                self.assertEqual(results, [])

    def test_invalid_batch_creates_no_queue(self) -> None:
        for batch in (b"{", b'{"command":"true"}\n{"command":7}\n', b"\xff"):
            self.assert_refused("enqueue", "-", stdin=batch)
        self.assertEqual(os.listdir(self.dir), [])


class DatabaseForeign(Live):
    """A file that is not a queue is refused by name and left unchanged."""

    COMMANDS = (
        "enqueue true",
        "status",
        "worker start --drain --quiet",
        "worker stop",
        "dlq retry --all",
        "config set timeout 3",
    )

    def assert_left_alone(self, reason: str) -> None:
        before = digest(self.path)
        for command in self.COMMANDS:
            with self.subTest(command):
                self.assertIn(reason, self.assert_refused(*command.split(), code=4))
        self.assertEqual(digest(self.path), before)

    def test_database_of_another_program_is_left_alone_without_files_beside_it(self) -> None:
        for mode in ("delete", "wal"):
            with self.connect() as db:
                db.execute(f"PRAGMA journal_mode = {mode}")
                db.execute("CREATE TABLE IF NOT EXISTS jobs (id)")
            self.assert_left_alone("another program's database")
            self.assertEqual(os.listdir(self.dir), ["queuectl.db"])
            with self.connect() as db:
                self.assertEqual(db.execute("PRAGMA journal_mode").fetchone(), (mode,))

    def test_dangling_link_is_left_alone(self) -> None:
        os.symlink("nothing.db", self.path)
        for command in ("enqueue true", "worker start"):
            self.assertIn(
                "is a symbolic link to a file that does not exist",
                self.assert_refused(*command.split(), code=4),
            )
        self.assertEqual(os.listdir(self.dir), ["queuectl.db"])

    def test_newer_schema_is_left_alone(self) -> None:
        self.enqueue("true")
        with self.connect() as db:
            db.execute("PRAGMA user_version = 99")
        self.assert_left_alone("newer queuectl (schema 99,")

    def test_file_that_is_not_a_database_is_left_alone(self) -> None:
        for content, reason in (
            (b"", "empty"),
            (b"notes\n", "not a database"),
            (b"notes\n" * 5000, "not a database"),
            (b"SQLite format 3\0" + b"\xff" * 4080, "not a database"),
        ):
            with self.subTest(content[:20]):
                with open(self.path, "wb") as file:
                    file.write(content)
                self.assert_left_alone(reason)
                self.assertEqual(os.listdir(self.dir), ["queuectl.db"])

    def test_path_that_is_not_a_regular_file_is_refused_at_once(self) -> None:
        for make in (os.mkdir, os.mkfifo):
            path = self.file(f"made by {make.__name__}")
            make(path)
            for command in ("enqueue true", "status", "worker start --quiet"):
                with self.subTest(path, command=command):
                    line = self.assert_refused("--db", path, *command.split(), code=4)
                    self.assertIn("is not a regular file", line)
        self.assertEqual(len(os.listdir(self.dir)), 2)


class DatabaseDamage(Live):
    """A damaged database is recovered or refused, never with a traceback."""

    PAGE = 4096

    ENQUEUE_AND_CRASH = """if True:
        import os, queuectl
        queue = queuectl.Queue("queuectl.db")
        for number in range(5):
            queue.enqueue("true")
        os.kill(os.getpid(), 9)
    """

    def corrupt_pages(self, *commands: str) -> Iterator[tuple[int, str]]:
        """Overwrite each page of a queue in turn; yield its number with each command."""
        with Queue(self.path) as queue:
            queue.enqueue_many({"command": f"true {'x' * 300}"} for _ in range(60))
            for number in range(20):
                job = claim(queue, "w")
                error = "exit code 1" if number % 2 else None
                queue._ledger.finish(job, Outcome("exited", 1.0, 2.0, 0, error, 0, b"o" * 300))
            queue.configure("timeout", "10")
        with open(self.path, "rb") as file:
            intact = file.read()
        pages = range(1, len(intact) // self.PAGE)
        for page, command in product(pages, commands):
            for suffix in ("-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path + suffix)
            noise = hashlib.sha512(str(page).encode()).digest() * (self.PAGE // 64)
            start, end = page * self.PAGE, (page + 1) * self.PAGE
            with open(self.path, "wb") as file:
                file.write(intact[:start] + noise + intact[end:])
            yield page, command

    def test_torn_log_loses_only_the_torn_transaction(self) -> None:
        os.mkdir(self.file("crashed"))
        self.script(self.ENQUEUE_AND_CRASH, cwd=self.file("crashed"))
        with open(self.file("crashed/queuectl.db-wal"), "rb") as file:
            log = file.read()
        for damage, torn, ids in (
            ("none", log, "12345"),
            ("one byte missing", log[:-1], "1234"),
            ("one page missing", log[:-4096], "1234"),
            ("one frame missing but for a byte", log[:-4119], "1234"),
            ("one bit flipped", log[:-100] + bytes([log[-100] ^ 1]) + log[-99:], "1234"),
        ):
            with self.subTest(damage):
                shutil.copytree(self.file("crashed"), self.file(damage))
                self.use_queue(damage)
                with open(self.path + "-wal", "wb") as file:
                    file.write(torn)
                self.assertEqual(list(self.states()), list(ids))
                self.assertEqual(self.enqueue("true"), str(len(ids) + 1))
                self.assert_sound()

    @SLOW
    @internal
    def test_corrupt_page_is_an_error_and_never_creates_a_new_queue(self) -> None:
        errors = 0
        commands = ("status", "list --json", "show 30", "enqueue true", "dlq retry --all")
        for page, command in self.corrupt_pages(*commands):
            with self.subTest(command, page=page):
                code, out, err = self.result(*command.split())
                self.assertIn(code, (0, 1, 4))
                self.assertEqual(err.count("\n"), 1 if code else 0)
                errors += code == 4
                if command == "enqueue true" and code == 0:
                    self.assertEqual(out, "61\n")
        self.assertGreater(errors, 20)

    def test_invalid_stored_setting_is_an_error(self) -> None:
        self.enqueue("true")
        with self.connect() as db:
            db.execute("INSERT INTO settings VALUES ('', 'timeout', 'abc')")
        for command in ("list", "worker start"):
            line = self.assert_refused(*command.split(), code=4)
            self.assertIn("setting timeout must be a dur", line)

    def test_workers_exit_when_the_database_is_damaged(self) -> None:
        self.enqueue("true", id="job1")
        with self.connect() as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            root_page = "SELECT rootpage FROM sqlite_master WHERE name = 'jobs'"
            (page,) = db.execute(root_page).fetchone()
        with open(self.path, "r+b") as file:
            file.seek((page - 1) * self.PAGE)
            file.write(b"\xa5" * self.PAGE)
        output = self.drain("--count", "2", code=4)
        self.assertIn("malformed", output)
        self.assertNotIn("Traceback", output)
        self.assertIn("malformed", self.assert_refused("show", "job1", code=4))

    @SLOW
    @internal
    def test_workers_exit_whichever_page_is_corrupt(self) -> None:
        for page, _ in self.corrupt_pages("worker start"):
            with self.subTest(page=page):
                pool = self.pool("--drain", "--quiet")
                output = pool.communicate(timeout=60)[0]
                self.assertIn(pool.returncode, (0, 1, 4), output)
                self.assertNotIn("Traceback", output)


class DatabaseReadOnly(Live):
    """A command that cannot write is refused and changes nothing."""

    WRITING_COMMANDS = ("enqueue true", "config set timeout 3", "worker start --quiet")

    def assert_all_refused(self, *commands: str, prefix: list[str], reason: str = "") -> None:
        for command in commands:
            with self.subTest(command):
                line = self.assert_refused(*command.split(), code=4, prefix=prefix)
                self.assertIn(reason, line)

    @SLOW
    def test_open_queue_on_a_read_only_disk_can_be_read_but_not_written(self) -> None:
        self.enqueue("true")
        self.write("queuectl.db.run/pool-1")  # its pool was killed
        read_only = self.in_mount_namespace("mount --bind . . && mount -o remount,ro,bind . .")
        with Queue(self.path) as writer:
            writer.counts()  # creates the -shm, which SQLite needs to read and cannot create there
            self.assert_all_refused(*self.WRITING_COMMANDS, prefix=read_only)
            self.assertIn("pending           1", self.stdout("status", prefix=read_only))
        reason = "its directory cannot be written to"
        self.assert_all_refused(*self.WRITING_COMMANDS, prefix=read_only, reason=reason)
        for command, said in {
            "status": "pending           1",
            "show 1": "no worker is running",
        }.items():
            self.assertIn(said, self.stdout(*command.split(), prefix=read_only))
        self.assertEqual(sorted(os.listdir(self.dir)), ["queuectl.db", "queuectl.db.run"])

    @SLOW
    def test_commands_without_write_permission_are_refused_and_change_nothing(self) -> None:
        user = obeying_modes(self)
        os.chmod(self.dir, 0o500)
        self.assert_all_refused(*self.WRITING_COMMANDS, prefix=user)
        self.assertEqual(os.listdir(self.dir), [])
        os.chmod(self.dir, 0o700)
        self.enqueue("true")
        for path, mode in ((self.dir, 0o500), (self.path, 0o400)):
            os.chmod(path, mode)
            self.assert_all_refused(*self.WRITING_COMMANDS[:2], prefix=user)
            os.chmod(path, 0o700)
        self.assertEqual(self.states(), {"1": "pending"})


class DatabaseFullDisk(Live):
    """Promise 1: on a full disk every acknowledged job is stored, and no result is lost."""

    FILL_DISK = "cat /dev/zero >>disk/ballast 2>>/dev/null; true"

    ENQUEUE_AT_EACH_SIZE = """if True:
        import contextlib, io, json, os, queuectl

        def enqueue(db):
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = queuectl.main(["--db", "disk/" + db, "enqueue", "true"])
            return code, len(out.getvalue().split()), err.getvalue().count("\\n")

        enqueue("old")
        for space in range(0, 140000, 4096):
            free = os.statvfs("disk")
            with open("disk/ballast", "wb") as ballast:
                ballast.write(bytes(free.f_bavail * free.f_bsize - space))
            full = [enqueue(db) for db in ("old", "new")]
            os.unlink("disk/ballast")
            again = [enqueue(db) for db in ("old", "new")]
            stored = [queuectl.Queue("disk/" + db).counts()["pending"] for db in ("old", "new")]
            print(json.dumps([space, full, again, stored]))
            os.system("rm -r disk/new*")
    """

    def mount_small_disk(self) -> list[str]:
        """Mount a disk of one megabyte; return the prefix of a command that sees it."""
        os.mkdir(self.file("disk"))
        return self.in_mount_namespace("mount -t tmpfs -o size=1m,mode=755 tmpfs disk")

    def use_small_disk(self) -> dict[str, Any]:
        """Put the queue on a small disk; return the arguments of a command that sees it."""
        prefix = self.mount_small_disk()
        os.environ["QUEUECTL_DB"] = "disk/q.db"
        return {"prefix": prefix}

    def free_disk(self, on_disk: dict[str, Any]) -> None:
        self.process(*on_disk["prefix"], "rm", "disk/ballast")

    @SLOW
    def test_enqueue_stores_and_prints_a_job_or_does_neither_on_a_full_disk(self) -> None:
        output = self.script(self.ENQUEUE_AT_EACH_SIZE, prefix=self.mount_small_disk()).stdout
        expected = 1
        codes = set()
        stored_and_printed, refused = (0, 1, 0), (4, 0, 1)
        for row in map(json.loads, output.splitlines()):
            space, full, again, (old, new) = row
            with self.subTest(space=space):
                for code, ids, errors in full:
                    codes.add(code)
                    self.assertIn((code, ids, errors), (stored_and_printed, refused))
                self.assertEqual(again, [[0, 1, 0]] * 2)
                expected += full[0][1] + 1
                self.assertEqual((old, new), (expected, full[1][1] + 1))
        self.assertEqual(codes, {0, 4})

    @SLOW
    def test_job_that_fills_the_disk_is_recorded_later_and_runs_once(self) -> None:
        on_disk = self.use_small_disk()
        jobs = [{"command": f"echo x >> first; {self.FILL_DISK}"}, {"command": "echo x >> second"}]
        self.stdout("enqueue", json.dumps(jobs), **on_disk)
        pool = self.pool("--drain", **on_disk)
        self.wait_for_output(pool, "cannot record how job 1 ended")
        status = self.json_object("status", **on_disk)
        self.assertEqual((status["processing"], status["pending"]), (1, 1))
        self.assertEqual((self.read("first"), self.read("second")), ("x\n", ""))
        self.free_disk(on_disk)
        self.assert_exits(pool, 0)
        self.assertEqual((self.read("first"), self.read("second")), ("x\n", "x\n"))
        for job in ("1", "2"):
            shown = self.json_object("show", job, **on_disk)
            self.assertEqual((shown["state"], len(shown["runs"])), ("completed", 1))

    @SLOW
    def test_workers_can_be_stopped_on_a_full_disk(self) -> None:
        on_disk = self.use_small_disk()
        self.stdout("enqueue", self.FILL_DISK, **on_disk)
        pool = self.pool(**on_disk)
        self.wait_for_output(pool, "cannot record how job 1 ended")
        late = self.pool(**on_disk)
        wait_until(lambda: self.stdout("worker", "list", **on_disk).count("\nworker-") == 2)
        self.stdout("worker", "stop", **on_disk)
        self.assert_exits(pool, 0)
        self.assertNotIn("died", late.communicate(timeout=10)[0])

    def test_running_jobs_can_be_killed_on_a_full_disk(self) -> None:
        on_disk = self.use_small_disk()
        self.stdout("enqueue", f"{self.FILL_DISK}; touch full; exec sleep 300", **on_disk)
        pool = self.pool(**on_disk)
        self.wait_for_file("full")
        self.stdout("worker", "stop", "--now", **on_disk)
        self.assert_exits(pool, 0)

    @SLOW
    def test_pool_whose_worker_dies_on_a_full_disk_continues_when_space_is_free(self) -> None:
        on_disk = self.use_small_disk()
        first_attempt = f"{self.FILL_DISK}; echo $PPID > worker; exec sleep 300"
        self.stdout("enqueue", f"[ $QUEUECTL_ATTEMPT = 2 ] || {{ {first_attempt}; }}", **on_disk)
        pool = self.pool("--drain", **on_disk)
        self.wait_for_file("worker", "\n")
        os.kill(int(self.read("worker")), 9)
        self.wait_for_output(pool, "trying again")
        self.free_disk(on_disk)
        self.assert_exits(pool, 0)
        shown = self.json_object("show", "1", **on_disk)
        self.assertEqual((shown["state"], shown["attempts"]), ("completed", 2))

    def test_file_size_limit_is_treated_like_a_full_disk(self) -> None:
        small = resource_limit(resource.RLIMIT_FSIZE, 20_000)
        for job in ("1", "2"):  # first the queue cannot be created, then the job cannot be added
            self.assert_refused("enqueue", "true", code=4, preexec_fn=small)
            self.assertEqual(self.stdout("enqueue", "true"), job + "\n")


class DatabaseDurability(Case):
    """Commits reach the disk."""

    @internal
    def test_synchronous_mode_can_be_changed_on_an_open_connection(self) -> None:
        """A worker that syncs in batches need not pay for a sync with each commit."""
        with Queue(self.path) as queue:
            for mode, level in (("normal", 1), ("full", 2), ("full", 2), ("normal", 1)):
                queue._db.set_synchronous(mode)
                self.assertEqual(queue._db.rows("PRAGMA synchronous")[0][0], level)

    @internal
    def test_thread_syncs_its_commits_while_another_one_defers_a_sync(self) -> None:
        def level() -> int:
            return int(queue._db.rows("PRAGMA synchronous")[0][0])

        with Queue(self.path) as queue, futures.ThreadPoolExecutor(1) as other:
            with queue._db.synced_later():
                self.assertEqual((level(), other.submit(level).result()), (1, 2))
            self.assertEqual((level(), other.submit(level).result()), (2, 2))
            other.submit(queue.close).result()


class DatabaseDurabilityLive(Live):
    """Promise 1: an acknowledged job is on disk, whichever process is killed, at any point."""

    SYNCS = "fsync,fdatasync"

    def system_calls(self, calls: str, *args: str, **more: Any) -> list[str]:
        """Run the program under strace; return its system calls, with file names."""
        self.require_tool("strace", "-o", "/dev/null", "true")
        log = self.file("strace.log")
        strace = ["strace", "-f", "-y", "-ttt", "-s", "60", "-o", log, "-e", f"trace={calls}"]
        self.stdout(*args, prefix=strace, **more)
        return self.lines("strace.log")

    def order_of_first_matches(self, calls: list[str], **patterns: str) -> list[str]:
        """Return the names of the patterns in the order of the first calls that match them."""
        found = [
            name for call in calls for name, pattern in patterns.items() if re.search(pattern, call)
        ]
        return list(dict.fromkeys(found))

    def kill_at_each_call(self) -> Iterator[tuple[str, list[str]]]:
        """Yield a log and a prefix that kills at the n-th file change, for each n and kind."""
        self.require_tool("strace", "-o", "/dev/null", "true")
        renames = "?rename,?renameat,?renameat2"
        unlinks = "?unlink,?unlinkat"
        for call in ("pwrite64", "write", "ftruncate", unlinks, renames, "fdatasync"):
            for number in range(1, 1000):
                log = self.file(f"{call}-{number}.log")
                self.use_queue(f"{call}-{number}")
                kill = f"inject={call}:signal=SIGKILL:when={number}"
                yield log, ["strace", "-f", "-o", log, "-e", f"trace={call}", "-e", kill]
                if not self.was_killed(log):
                    break

    def was_killed(self, log: str) -> bool:
        return "SIGKILL" in self.read(log)

    def test_job_is_synced_before_its_id_is_printed(self) -> None:
        with Queue(self.path) as holder:  # the last connection to close syncs in any case
            holder.enqueue("true")  # a new log is synced in any case
            calls = self.system_calls(self.SYNCS + ",write", "enqueue", "true")
        order = self.order_of_first_matches(
            calls, sync=r"sync\(\d+<.*db-wal>", id=r' write\(1<.*"2(\\n)?"'
        )
        self.assertEqual(order, ["sync", "id"], calls)

    def test_new_database_name_is_synced_before_the_first_id_is_printed(self) -> None:
        links = ",write,?link,?linkat"
        calls = self.system_calls(self.SYNCS + links, "enqueue", "true")
        order = self.order_of_first_matches(
            calls,
            content=r"sync\(\d+<.*new\.db>",
            name=r" link.*new\.db.*queuectl\.db",
            directory=rf"fsync\(\d+<{re.escape(self.dir)}>",
            id=r' write\(1<.*"1(\\n)?"',
        )
        self.assertEqual(order, ["content", "name", "directory", "id"], calls)

    @SLOW
    def test_batch_of_a_thousand_jobs_needs_few_syncs(self) -> None:
        batch = '{"command": "true"}\n' * 1000
        calls = self.system_calls(self.SYNCS, "enqueue", "-", stdin=batch)
        self.assertEqual(len(self.states()), 1000)
        self.assertLess(sum("sync(" in call for call in calls), 20)

    @SLOW
    def test_result_is_synced_before_the_next_claim_only_if_synchronous_is_full(self) -> None:
        for synchronous in ("normal", "full"):
            with self.subTest(synchronous):
                self.use_queue(synchronous)
                self.configure(synchronous=synchronous)
                for _ in range(6):
                    self.enqueue("true")
                words = ("worker", "start", "--drain", "--quiet")
                calls = self.system_calls(f"{self.SYNCS},execve", *words)
                # strace splits some calls in two: match only how they begin.
                step = r'execve\("/bin/sh"|sync\(\d+<.*db-wal>'
                starts = ["execve" in call for call in calls if re.search(step, call)]
                self.assertEqual(starts.count(True), 6)
                without_sync = sum(a and b for a, b in zip(starts, starts[1:]))
                check = self.assertEqual if synchronous == "full" else self.assertGreater
                check(without_sync, 0)

    def test_pool_syncs_a_claim_and_a_result_within_a_tenth_of_a_second(self) -> None:
        self.require_tool("strace", "-o", "/dev/null", "true")
        self.enqueue(f"touch began; {RUN_UNTIL_GO}")
        options = ["-e", "trace=pwrite64,write,fsync,fdatasync", "-o", self.file("strace.log")]
        self.pool(prefix=["strace", "-f", "-y", "-ttt", "-s", "0", *options])
        self.wait_for_file("began")
        skipped = 0

        def times(call: str) -> list[float]:
            pattern = rf"{call}\(\d+<.*db-wal>"
            lines = self.lines("strace.log")[skipped:]
            return [float(line.split()[1]) for line in lines if re.search(pattern, line)]

        wait_until(lambda: times("sync")[-1:] > times("write(64)?")[-1:], 3)  # the claim
        skipped = len(self.lines("strace.log"))
        self.write("go")
        self.wait_for_state("1", "completed")
        wait_until(lambda: times("sync"), 3)
        self.assertLess(times("sync")[0] - times("write(64)?")[-1], 0.2)  # strace adds delay

    @SLOW
    def test_enqueue_killed_at_any_system_call_keeps_each_job_it_printed(self) -> None:
        for queue_exists in (False, True):
            for log, killing in self.kill_at_each_call():
                with self.subTest(os.path.basename(log), queue_exists=queue_exists):
                    ids = [self.enqueue("true")] if queue_exists else []
                    result = self.result("enqueue", "true", prefix=killing)
                    ids += result.stdout.split()
                    ids.append(self.enqueue("true"))
                    self.assertLessEqual(set(ids), set(self.states()))
                    self.assert_sound()
                shutil.rmtree(os.path.dirname(self.path))

    @SLOW
    def test_workers_killed_at_any_system_call_count_each_run_of_a_job(self) -> None:
        for log, killing in self.kill_at_each_call():
            with self.subTest(os.path.basename(log)):
                effect = log + ".effect"
                self.enqueue(f"echo x >> {effect}", max_retries=5)
                pool = self.pool("--drain", "--quiet", prefix=killing)
                wait_until(lambda p=pool, log=log: p.poll() is not None or self.was_killed(log), 30)
                wait_until(lambda: not self.kill_ours())
                self.drain("--quiet")
                job = self.job("1")
                self.assertEqual(job.state, "completed")
                self.assertTrue(1 <= self.read(effect).count("x") <= job.attempts, job)
                self.assert_sound()

    @SLOW
    def test_each_dead_job_is_told_of_whatever_is_killed_at_any_system_call(self) -> None:
        """Promise 9: a notification is stored with the end that it reports."""
        for log, killing in self.kill_at_each_call():
            with self.subTest(os.path.basename(log)):
                self.configure(on_dead=f"echo $QUEUECTL_OF >> {log}.told", max_notifications="2")
                for _ in range(2):
                    self.enqueue("false", max_retries=1)
                pool = self.pool("--drain", "--quiet", prefix=killing)
                wait_until(lambda p=pool, log=log: p.poll() is not None or self.was_killed(log), 30)
                wait_until(lambda: not self.kill_ours())
                self.result("worker", "start", "--drain", "--quiet")
                states = self.states()
                self.assertEqual([states[name] for name in "12"], ["dead"] * 2)
                self.assertLessEqual({"1", "2"}, set(self.lines(log + ".told")))
                self.assertEqual(sum(state == "completed" for state in states.values()), 2)
                self.assert_sound()


@NEEDS_SHELL
class DatabaseGuest(Case):
    """A queue in another program's database: an order and its job are stored together."""

    def setUp(self) -> None:
        super().setUp()
        self.path = self.file("shop.db")
        os.environ["QUEUECTL_DB"] = self.path
        self.execute(
            "PRAGMA user_version = 7", "CREATE TABLE orders (id INTEGER PRIMARY KEY, item)"
        )

    def execute(self, *statements: str) -> list[Any]:
        """Run statements as the host program; return the first column of the last result."""
        with contextlib.closing(sqlite3.connect(self.path)) as db, db:
            results = [db.execute(sql).fetchall() for sql in statements]
        return [row[0] for row in results[-1]]

    def test_killed_transaction_stores_neither_order_nor_job(self) -> None:
        self.assertEqual(self.script(SHOP, "killed").returncode, -signal.SIGKILL)
        self.assertEqual(self.execute("SELECT id FROM orders"), [1])
        self.assertEqual(self.execute("SELECT id FROM queuectl_jobs"), ["invoice-1"])

    def test_queue_of_its_own_is_no_guest(self) -> None:
        with Queue(self.file("own.db")) as queue:
            queue.enqueue("true")
        with self.assertRaisesRegex(queuectl.BadInput, "is a queue of its own; open it without"):
            Queue(self.file("own.db"), guest=True)

    def test_wait_in_a_transaction_is_refused(self) -> None:
        with Queue(self.path, guest=True) as queue:
            with self.assertRaisesRegex(queuectl.BadInput, "transaction"), queue.transaction():
                queue.wait([queue.enqueue("true")])
            self.assertEqual(list(queue.jobs()), [])

    def test_guest_created_first_leaves_version_numbers_to_host_program(self) -> None:
        for name in ("new.db", "empty.db"):
            with self.subTest(name):
                self.path = self.file(name)
                if name == "empty.db":
                    self.write(name)
                with Queue(self.path, guest=True):
                    pass
                self.execute("PRAGMA user_version = 7", "CREATE TABLE orders (id)")
                self.assertEqual(self.execute("PRAGMA application_id"), [0])
                with Queue(self.path, guest=True) as queue, Queue(self.path) as same:
                    self.assertEqual(queue.enqueue("true"), same.get("1").id)

    @internal
    def test_database_that_the_host_creates_at_the_same_moment_is_kept(self) -> None:
        os.unlink(self.path)
        publish = queuectl.Database._publish

        def late(db: queuectl.Database, new: str) -> None:
            self.execute("CREATE TABLE orders (id)", "INSERT INTO orders VALUES (1)")
            publish(db, new)

        no_links = mock.patch("os.link", side_effect=OSError(95, "Operation not supported"))
        for links in (contextlib.nullcontext(), no_links):
            publishing = mock.patch.object(queuectl.Database, "_publish", late)
            with links, publishing, Queue(self.path, guest=True) as queue:
                self.assertEqual(queue.enqueue("true"), "1")
            self.assertEqual(self.execute("SELECT id FROM orders"), [1])
            self.assertEqual(queuectl.RunDirectory(self.path).files("new.db"), [])
            os.unlink(self.path)

    def test_reader_delays_creation_of_tables_but_does_not_prevent_it(self) -> None:
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM orders").fetchall()
            with futures.ThreadPoolExecutor() as executor:
                opening = executor.submit(Queue, self.path, guest=True)
                with self.assertRaises(futures.TimeoutError):
                    opening.result(0.3)
                reader.execute("COMMIT")
                with opening.result(10) as queue:
                    self.assertEqual(list(queue.jobs()), [])

    def test_error_rolls_back_transaction_but_refused_batch_only_itself(self) -> None:
        with Queue(self.path, guest=True) as queue:
            with self.assertRaises(ZeroDivisionError), queue.transaction() as db:
                db.execute("INSERT INTO orders VALUES (3, 'x')")
                queue.enqueue("true")
                raise ZeroDivisionError
            with self.assertRaises(sqlite3.IntegrityError), queue.transaction() as db:
                queue.enqueue("true")
                db.execute("INSERT INTO orders VALUES (1, 'x'), (1, 'y')")
            with self.assertRaises(sqlite3.OperationalError), queue.transaction() as db:
                db.execute("INSERT INTO nowhere VALUES (1)")
            with self.assertRaises(FileNotFoundError), queue.transaction():
                os.stat(self.file("nothing"))
            with self.assertRaisesRegex(queuectl.Fault, "ended"), queue.transaction() as db:
                db.execute("ROLLBACK")
                queue.enqueue("true")
            self.assertEqual(self.execute("SELECT id FROM orders"), [])
            self.assertEqual(list(queue.jobs()), [])

            with queue.transaction() as db:
                db.execute("INSERT INTO orders VALUES (4, 'x')")
                queue.enqueue("true", id="kept")
                with self.assertRaises(queuectl.BadInput):
                    queue.enqueue_many([{"command": "true"}, {"command": ""}])
            self.assertEqual(self.execute("SELECT id FROM orders"), [4])
            self.assertEqual([job.id for job in queue.jobs()], ["kept"])

    def test_host_program_keeps_version_numbers_and_workers_find_queue(self) -> None:
        self.assertIn("another program's", self.assert_refused("list", code=4))
        self.assertEqual(self.script(SHOP).returncode, 0)
        self.assertEqual(self.execute("PRAGMA user_version"), [7])
        self.assertEqual(self.execute("PRAGMA application_id"), [0])
        self.drain()
        self.assertEqual(self.execute("SELECT state FROM queuectl_jobs"), ["completed"] * 2)

    def test_table_name_conflict_is_refused_and_leaves_nothing_behind(self) -> None:
        self.execute("CREATE TABLE queuectl_needs (mine)")
        with self.assertRaisesRegex(queuectl.Fault, "queuectl_needs already exists"):
            Queue(self.path, guest=True)
        names = self.execute("SELECT name FROM sqlite_master ORDER BY name")
        self.assertEqual(names, ["orders", "queuectl_needs"])
        self.assertEqual(self.execute("PRAGMA journal_mode"), ["delete"])

    def test_tables_are_created_only_if_the_queue_may_be_created(self) -> None:
        for options in ({"create": False}, {"readonly": True}):
            with self.subTest(options), self.assertRaisesRegex(queuectl.Fault, "another program's"):
                Queue(self.path, guest=True, **options)
        self.assertEqual(self.execute("SELECT name FROM sqlite_master"), ["orders"])
        Queue(self.path, guest=True).close()
        Queue(self.path, guest=True, readonly=True).close()

    @internal
    def test_host_program_may_have_left_wal_mode(self) -> None:
        with Queue(self.path, guest=True) as queue:
            queue.enqueue("true", id="a")
            queue.cancel(["a"])
        self.assertEqual(self.execute("PRAGMA journal_mode = delete"), ["delete"])
        with Queue(self.path, guest=True) as queue:
            self.assertEqual(queue.prune(0), 1)

    def test_settings_table_of_host_program_is_not_taken_for_a_queue(self) -> None:
        for columns, values in (("key, value", "'schema', '1'"), ("name", "'queuectl_schema'")):
            with self.subTest(columns):
                self.execute(
                    "DROP TABLE IF EXISTS queuectl_settings",
                    f"CREATE TABLE queuectl_settings ({columns})",
                    f"INSERT INTO queuectl_settings VALUES ({values})",
                )
                self.assertIn("another program's", self.assert_refused("worker", "start", code=4))


class DatabaseTransactions(Case):
    """A transaction ends as it should, whatever happens in it; locks and damage are recognized."""

    @internal
    def test_interrupt_right_after_begin_leaves_no_transaction(self) -> None:
        with Queue(self.path) as queue:
            execute = queue._db.execute

            def interrupted(sql: str, args: Any = ()) -> Any:
                execute(sql, args)
                raise KeyboardInterrupt

            pressed = mock.patch.object(queue._db, "execute", interrupted)
            with pressed, self.assertRaises(KeyboardInterrupt):
                queue.enqueue("true")
            self.assertEqual(self.stdout("enqueue", "true"), "1\n")  # nobody has the lock
            self.assertEqual(queue.enqueue("true"), "2")

    @internal
    def test_errors_are_recognized_by_their_codes_or_else_by_their_texts(self) -> None:
        cases = (  # SQLite's code, its English text, is a lock, is damage
            (5, "database is locked", True, False),
            (261, "database is locked", True, False),  # SQLITE_BUSY_RECOVERY
            (6, "database table is locked", True, False),
            (15, "locking protocol", True, False),
            (14, "unable to open database file", False, False),
            (11, "database disk image is malformed", False, True),
            (26, "file is not a database", False, True),
        )
        for code, text, is_lock, is_damage in cases:
            kind = sqlite3.DatabaseError if is_damage else sqlite3.OperationalError
            coded = kind("another language")
            coded.sqlite_errorcode = code  # type: ignore[attr-defined]
            for error in (coded, kind(text)):
                with self.subTest(error, code=code):
                    found = tuple(
                        queuectl.is_about(error, *kind) for kind in (queuectl.LOCK, queuectl.DAMAGE)
                    )
                    self.assertEqual(found, (is_lock, is_damage))

    @internal
    def test_locking_protocol_error_is_tried_again(self) -> None:
        with Queue(self.path) as queue:
            errors = [sqlite3.OperationalError("locking protocol")]

            def act() -> str:
                if errors:
                    raise errors.pop()
                return "done"

            self.assertEqual(queue._db._retry(act), "done")


class DatabaseForks(Case):
    """One queue in several threads and processes."""

    @internal
    def test_threads_may_share_a_queue(self) -> None:
        queue = Queue(self.path)
        self.addCleanup(queue._db.close)

        def enqueue_20() -> None:
            for _ in range(20):
                queue.enqueue("true")
            queue._db.close()

        threads = [threading.Thread(target=enqueue_20) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(queue.counts()["pending"], 80)

    @NEEDS_SHELL
    @internal
    def test_fork_and_thread_have_connections_of_their_own(self) -> None:
        with Queue(self.path) as queue:
            queue.enqueue("true")
            ours = queue._db.connection
            child = os.fork()
            if not child:
                os._exit(queue.enqueue("true") != "2" or queue._db.connection is ours)
            self.assertEqual(os.waitpid(child, 0)[1], 0)
            self.assertEqual([queue.enqueue("true"), queue.counts()["pending"]], ["3", 3])
            theirs: list[sqlite3.Connection] = []

            def connect() -> None:
                theirs.append(queue._db.connection)
                queue.close()

            thread = threading.Thread(target=connect)
            thread.start()
            thread.join()
            self.assertIsNot(theirs[0], ours)

    @SLOW
    @NEEDS_SHELL
    @internal
    def test_jobs_of_forked_child_survive_closing_of_parent_connections(self) -> None:
        """Promise 1: a forked child does not inherit SQLite's record of its locks."""
        result = self.script(FORK_AND_CLOSE, PROGRAM)
        self.assertEqual(result.stdout, "stranger\n4\n4\n[]\n", result.stderr)
        ids = ["before", "child", "stranger", "child-2", "inside", "after"]
        with Queue(self.path) as queue:
            self.assertEqual([job.id for job in queue.jobs()][:6], ids)
            self.assertEqual(queue.counts()["pending"], 10_006)

    @NEEDS_SHELL
    def test_fork_in_transaction_is_refused_even_if_another_thread_forks_too(self) -> None:
        self.assertEqual(self.script(FORK_DURING_FORK).stdout, "4\n")

    @internal
    def test_thread_may_open_a_connection_while_another_one_forks(self) -> None:
        done = threading.Event()

        def keep_opening() -> None:
            while not done.is_set():
                with Queue(self.path) as queue:
                    queue.counts()

        queues = [Queue(self.path) for _ in range(100)]  # it takes time to look at all
        self.assertEqual({queue.counts()["pending"] for queue in queues}, {0})
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)
        with futures.ThreadPoolExecutor() as executor:
            opening = executor.submit(keep_opening)
            try:
                for _ in range(300):
                    queuectl.before_fork()
                    queuectl.IN_USE.clear()
            finally:
                done.set()
            opening.result()

    @NEEDS_SHELL
    @internal
    def test_no_connection_of_another_thread_is_closed_in_a_forked_child(self) -> None:
        """Closing one that has begun a transaction would write to memory shared with the parent."""
        self.assertEqual(self.script(FORK_BESIDE_THREADS).stdout, "3\n")

    @SLOW
    @NEEDS_SHELL
    def test_pool_that_forks_in_its_tick_still_sees_changes_by_others(self) -> None:
        self.script(FORK_IN_TICK, timeout=20)
        with Queue(self.path) as queue:
            self.assertEqual(queue.get("x").state, "cancelled")


# --- trust ----------------------------------------------------------------------------------------


class Trust(Live):
    """Promise 7: only commands of the owner of the files run."""

    START = ("worker", "start", "--drain", "--quiet")

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(os.umask, os.umask(0o022))
        self.enqueue("echo x >> log")

    def mode(self, path: str) -> int:
        return stat.S_IMODE(os.lstat(path).st_mode)

    def assert_distrusted(self, reason: str) -> None:
        """Check that workers refuse to run anything and suggest --insecure."""
        line = self.assert_refused(*self.START, code=4)
        self.assertIn(reason, line)
        self.assertIn("--insecure", line)
        self.assertEqual(self.read("log"), "")

    def assert_trusted(self, *options: str) -> None:
        self.run_cli(*options, *self.START)
        self.assertEqual(self.read("log"), "x\n")

    @internal
    def test_network_file_system_causes_a_warning(self) -> None:
        messages: list[str] = []
        mounts = (
            "/dev/sda / ext4 rw 0 0\nauto /t\\040p autofs rw 0 0\nhost:/x /t\\040p nfs4 rw 0 0\n"
        )
        for mount_point, kind in (("/t\\040p", "nfs4"), ("/nowhere", None)):
            text = b"x /caf\xe9 ext4 rw 0 0\n" + mounts.replace("/t\\040p", mount_point).encode()
            text = mock.mock_open(read_data=text)
            with mock.patch.object(queuectl, "open", text, create=True):
                self.assertEqual(queuectl.network_file_system("/t p/a/queuectl.db"), kind)
        with mock.patch.object(queuectl, "network_file_system", return_value="nfs4"):
            queuectl.work(self.path, drain=True, say=messages.append)
        self.assertIn(f"warning: {self.path} is on nfs4; SQLite needs a local disk", messages)

    @internal
    def test_files_are_private_to_their_owner_whatever_the_umask(self) -> None:
        for mask in (0o777, 0o000):
            self.use_queue(oct(mask))
            os.umask(mask)
            self.enqueue(f"touch began; {RUN_UNTIL_GO}")
            os.umask(0o022)
            self.assertEqual((self.mode(self.path), self.mode(self.path + ".run")), (0o600, 0o700))
        self.pool(preexec_fn=lambda: os.umask(0))
        self.wait_for_file("began")
        files = queuectl.RunDirectory(self.path).files()
        self.assertTrue(any(name.endswith(".out") for name in files))
        paths = [self.path + suffix for suffix in ("", "-wal", "-shm")]
        paths += [os.path.join(self.path + ".run", name) for name in files]
        self.assertEqual({self.mode(path) for path in paths}, {0o600})

    def test_world_writable_files_are_refused_without_insecure(self) -> None:
        for suffix, mode in (("", 0o606), ("", 0o602), (".run", 0o777)):
            with self.subTest(suffix=suffix, mode=oct(mode)):
                before = self.mode(self.path + suffix)
                os.chmod(self.path + suffix, mode)
                self.assert_distrusted("other users may")
                os.chmod(self.path + suffix, before)
        os.chmod(self.path, 0o666)
        self.assert_trusted("--insecure")

    def test_world_writable_directory_is_refused_even_if_sticky(self) -> None:
        for mode in (0o777, 0o1777):
            os.chmod(self.dir, mode)
            self.assert_distrusted("other users may write to")
        os.environ["QUEUECTL_INSECURE"] = "1"
        self.assert_trusted()

    def test_hard_links_and_symbolic_links_are_refused(self) -> None:
        os.link(self.path, self.file("other"))
        self.assert_distrusted("hard link")
        os.unlink(self.file("other"))
        self.configure(timeout="10")  # closing the database removes the -wal
        self.write("planted")
        os.symlink("planted", self.path + "-wal")
        self.assert_refused(*self.START, code=4)
        self.assertEqual(self.read("log"), "")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path + "-wal")
        os.rename(self.path + ".run", self.file("elsewhere"))
        os.symlink("elsewhere", self.path + ".run")
        self.assert_distrusted(".run is not a")
        self.assert_trusted("--insecure")

    @NEEDS_ROOT
    def test_files_of_another_user_are_refused(self) -> None:
        reason = f"belongs to another user ({NOBODY})"
        with Queue(self.path) as holder:
            holder.configure("timeout", "10")  # creates a log
            for suffix in ("", "-wal", "-shm", ".run"):
                with self.subTest(suffix):
                    suffixes = (suffix,) if suffix else ("", "-wal", "-shm")
                    paths = [self.path + each for each in suffixes]
                    for path in paths:
                        os.chown(path, NOBODY, -1)
                    self.assertIn(reason, self.assert_refused(*self.START, code=4))
                    if suffix in ("-wal", "-shm"):  # as root, SQLite would take ownership
                        self.assertIn(reason, self.assert_refused("enqueue", "true", code=4))
                    self.assertEqual({os.lstat(path).st_uid for path in paths}, {NOBODY})
                    for path in paths:
                        os.chown(path, 0, -1)
        for suffix in ("-wal", "-shm"):
            with self.subTest(f"planted where there is no {suffix}"):
                self.write("queuectl.db" + suffix)
                os.chown(self.path + suffix, NOBODY, -1)
                self.assertIn(reason, self.assert_refused(*self.START, code=4))
                os.unlink(self.path + suffix)
        self.assert_trusted()

    @NEEDS_ROOT
    def test_root_may_run_jobs_in_a_directory_of_another_user_if_insecure(self) -> None:
        os.chown(self.dir, NOBODY, NOBODY)
        self.assert_distrusted("belongs to another user")
        self.assert_trusted("--insecure")

    @NEEDS_ROOT
    @internal
    def test_group_writable_file_is_refused_unless_the_group_is_private(self) -> None:
        os.chmod(self.path, 0o660)
        os.chown(self.path, -1, NOBODY)
        self.assert_distrusted("other users may write to")
        os.chown(self.path, -1, 0)
        if queuectl.is_shared_group(0):
            raise unittest.SkipTest("the group of root has other members here")
        self.assert_trusted()

    @internal
    def test_group_is_private_if_named_like_its_user_with_no_other_member(self) -> None:
        def shared(group: str) -> bool:
            name, *members = group.split()
            user = mock.Mock(pw_name="ada")
            found = mock.Mock(gr_name=name, gr_mem=members)
            users = mock.patch("pwd.getpwuid", return_value=user)
            groups = mock.patch("grp.getgrgid", return_value=found)
            with users, groups:
                return queuectl.is_shared_group(1)

        cases = {"ada": False, "ada ada": False, "ada ada eve": True, "staff": True}
        self.assert_table(cases, shared)

    def test_environment_of_the_caller_is_not_stored(self) -> None:
        os.environ["SECRET_MARKER"] = "xyzzy-1234"
        self.stdout("enqueue", '{"command": "true", "env": {"SHOWN": "plugh"}}')
        stored = b""
        for directory, _, names in os.walk(self.dir):
            for name in names:
                with open(os.path.join(directory, name), "rb") as file:
                    stored += file.read()
        self.assertIn(b"plugh", stored)
        self.assertNotIn(b"xyzzy-1234", stored)
        self.assertNotIn(b"SECRET_MARKER", stored)


def forge_journal(database: bytes) -> bytes:
    """Return a rollback journal that SQLite replays to turn any database into the given one."""
    size = 4096
    pages = [database[start : start + size] for start in range(0, len(database), size)]
    numbers = (len(pages), 0, len(pages), 512, size)
    journal = bytes.fromhex("d9d505f920a163d7") + struct.pack(">5I", *numbers) + bytes(484)
    for number, page in enumerate(pages, 1):
        journal += (
            struct.pack(">I", number) + page + struct.pack(">I", sum(page[size - 200 : 0 : -200]))
        )
    return journal


@NEEDS_ROOT
class TrustAttacks(Live):
    """Promise 7, with two users: `nobody` plants files in a directory that root uses."""

    COMMANDS = (
        "enqueue true",
        "list",
        "show 1",
        "worker start --drain --quiet",
        "worker start --detach",
        "worker stop",
    )
    BESIDE_A_QUEUE = ("journal", "wal", "shm", "run directory", "run link")
    BEFORE_A_QUEUE = (*BESIDE_A_QUEUE, "database", "database link")
    RUN_FILES = {  # in the run directory: the name, and what is planted there
        "fifo link": "pool-1.fifo",
        "stop link": "pool-1.stop",
        "log link": "workers.log",
        "lock link": "making",
        "new file link": "new.db",
        "lock that is a FIFO": "pool-1",
        "new file of another user": "new.db",
        "output of another user": "1.1.out",
    }

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(os.umask, os.umask(0o022))
        os.chmod(self.dir, 0o755)
        self.write("precious", "x")
        os.mkdir(self.file("evil"))
        self.write("evil/new.db", "x")
        path = self.file("evil/queuectl.db")
        with Queue(path) as queue:
            queue.enqueue("echo x >> log", id="evil")
            with open(path + "-wal", "rb") as file:
                self.wal = file.read()
        with open(path, "rb") as file:
            self.database = file.read()

    def as_nobody(self, act: Callable[[], Any]) -> None:
        """Do something as another user."""
        child = os.fork()
        if not child:
            try:
                os.umask(0)
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                act()
                os._exit(0)
            finally:
                os._exit(1)
        self.assertEqual(os.waitpid(child, 0)[1], 0)

    def plant(self, what: str, path: str) -> None:
        """Put something beside the database at a path, or in its place."""
        contents = {
            "journal": ("-journal", forge_journal(self.database)),
            "wal": ("-wal", self.wal),
            "shm": ("-shm", b""),
            "database": ("", self.database),
        }
        if what in contents:
            suffix, content = contents[what]
            with open(path + suffix, "xb") as file:
                file.write(content)
        elif what == "run directory":
            os.mkdir(path + ".run", 0o777)
        elif what == "run link":
            os.symlink("evil", path + ".run")
        else:
            os.symlink("evil/queuectl.db", path)

    def plant_in_run_directory(self, what: str) -> None:
        """Put something into the run directory, as could be done before it was made private."""
        path = os.path.join(self.path + ".run", self.RUN_FILES[what])
        if what.endswith("link"):
            os.symlink("../precious", path)
        elif what.endswith("FIFO"):
            os.mkfifo(path, 0o600)
        else:
            with open(path, "x"):
                pass
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)

    def everything(self) -> dict[str, Any]:
        """Return what may not change: each file with its owner and mode, and each content."""
        found = {}
        for directory, _, names in os.walk(self.dir):
            for path in (directory, *(os.path.join(directory, name) for name in names)):
                info = os.lstat(path)
                content = digest(path) if stat.S_ISREG(info.st_mode) else info.st_mtime_ns
                found[path] = (info.st_mode, info.st_uid, info.st_nlink, content)
        return found

    def assert_nothing_is_touched(self, reason: str) -> None:
        """Check that each command refuses with one line, and changes nothing."""
        before = self.everything()
        for command in self.COMMANDS:
            line = self.assert_refused(*command.split(), code=4)
            self.assertRegex(line, reason)
            self.assertRegex(line, "mkdir -m 700 q.*mktemp -d.*--insecure")
        self.assertEqual(self.everything(), before)

    def test_planted_files_are_refused_before_anything_is_opened_or_written(self) -> None:
        cases = [(what, False) for what in self.BEFORE_A_QUEUE]
        cases += [(what, True) for what in self.BESIDE_A_QUEUE]
        for what, exists in cases:
            with self.subTest(what, exists=exists):
                self.use_queue(f"{what} {exists}")
                shutil.copytree(self.file("evil"), os.path.join(os.path.dirname(self.path), "evil"))
                if exists:
                    self.enqueue("true", id="ours")
                    shutil.rmtree(self.path + ".run")
                os.chmod(os.path.dirname(self.path), 0o1777)
                self.as_nobody(partial(self.plant, what, self.path))
                self.assert_nothing_is_touched("other users may write to|belongs to another user")
                os.chmod(os.path.dirname(self.path), 0o700)
                self.assert_nothing_is_touched(
                    rf"belongs to another user \({NOBODY}\)|is not a dir"
                )

    def test_files_of_others_in_the_run_directory_are_refused(self) -> None:
        for what in self.RUN_FILES:
            with self.subTest(what):
                self.use_queue(what)
                self.write(f"{what}/precious", "x")
                self.enqueue("true", id="ours")
                self.plant_in_run_directory(what)
                self.assert_nothing_is_touched(
                    "is not a (regular file|FIFO)|belongs to another user"
                )

    def test_planted_journal_and_log_would_otherwise_bring_in_a_job(self) -> None:
        """The attacks are real."""
        for what in ("journal", "wal"):
            self.use_queue(what)
            self.enqueue("true", id="ours")
            self.plant(what, self.path)
            self.stdout("--insecure", "enqueue", "true")
            self.assertIn("echo x >> log", self.stdout("--insecure", "list"))

    def test_every_directory_and_link_on_the_way_to_the_queue_must_be_safe(self) -> None:
        for mode, owner, reason in (
            (0o777, 0, "other users may write to"),
            (0o755, NOBODY, "belongs to another user"),
        ):
            self.use_queue(f"{reason}/private")
            self.enqueue("true")
            shared = os.path.dirname(os.path.dirname(self.path))
            os.chmod(shared, mode)
            os.chown(shared, owner, -1)
            os.symlink(self.path, self.file(f"link {owner}"))
            os.symlink(os.path.dirname(self.path) + "/", self.file(f"directory {owner}"))
            links = (f"link {owner}", f"directory {owner}/queuectl.db")
            for path in (self.path, *map(self.file, links)):
                line = self.assert_refused("--db", path, "list", code=4)
                self.assertIn(f"{reason} {shared}" if owner == 0 else f"{shared} {reason}", line)
        self.use_queue("sticky/private")
        self.enqueue("true")
        os.chmod(self.file("sticky"), 0o1777)
        self.stdout("list")  # others cannot rename the private directory
        self.as_nobody(lambda: os.symlink("private", self.file("sticky/theirs")))
        os.symlink("private", self.file("sticky/ours"))
        theirs, ours = (self.file(f"sticky/{name}/queuectl.db") for name in ("theirs", "ours"))
        self.stdout("--db", ours, "list")
        line = self.assert_refused("--db", theirs, "list", code=4)
        self.assertIn("sticky/theirs belongs to another user", line)

    def test_insecure_option_or_variable_overrides_for_one_command_or_for_all(self) -> None:
        os.chmod(self.dir, 0o1777)
        self.assert_refused("enqueue", "true", code=4)
        self.assertEqual(self.stdout("--insecure", "enqueue", "true"), "1\n")
        self.assertEqual(self.stdout("list", "--json", "--insecure").count("\n"), 1)
        self.stdout("--insecure", "worker", "start", "--drain")
        self.assertEqual(self.job_state_insecurely(), "completed")
        os.environ["QUEUECTL_INSECURE"] = "0"
        self.assert_refused("list", code=4)
        os.environ["QUEUECTL_INSECURE"] = "1"
        for command in self.COMMANDS[:2]:
            self.stdout(*command.split())

    def job_state_insecurely(self) -> str:
        with Queue(self.path, insecure=True) as queue:
            return queue.get("1").state

    def test_links_in_the_run_directory_are_not_followed_even_if_insecure(self) -> None:
        self.enqueue("true")
        for what in ("fifo link", "stop link", "log link", "lock link"):
            self.plant_in_run_directory(what)
        os.environ["QUEUECTL_INSECURE"] = "1"
        before = digest(self.file("precious"))
        for command in ("enqueue true", "worker stop", "worker start --detach", "list"):
            self.result(*command.split())
        self.assertEqual(digest(self.file("precious")), before)

    def test_report_is_not_written_through_a_link_of_another_user(self) -> None:
        self.enqueue("true")
        os.mkdir(self.file("shared"))
        os.chmod(self.file("shared"), 0o1777)
        self.as_nobody(lambda: os.symlink("../precious", self.file("shared/r.html")))
        os.symlink("../ours", self.file("shared/ours.html"))
        line = self.assert_refused("report", "-o", self.file("shared/r.html"), code=4)
        self.assertIn("shared/r.html belongs to another user", line)
        self.assertEqual(self.read("precious"), "x")
        self.stdout("report", "-o", self.file("shared/ours.html"))
        self.assertIn("<html", self.read("ours"))

    def test_loop_of_links_is_an_error(self) -> None:
        os.symlink("b", self.file("a"))
        os.symlink("a", self.file("b"))
        for path in ("a", "a/queuectl.db"):
            line = self.assert_refused("--db", path, "list", code=4)
            self.assertIn("Too many levels of symbolic links", line)

    def test_path_of_a_thousand_directories_is_examined(self) -> None:
        with self.assertRaisesRegex(queuectl.NotFound, "there is no queue at"):
            Queue("a/" * 1500 + "queuectl.db", create=False)


# --- queue ----------------------------------------------------------------------------------------


class QueueEnqueue(Clocked):
    """Adding jobs."""

    def test_job_id_is_the_given_one_or_the_next_free_number(self) -> None:
        self.assertEqual(self.queue.enqueue("true"), "1")
        self.assertEqual(self.queue.enqueue("true", id="3"), "3")
        self.assertEqual(self.queue.enqueue("true"), "4")
        with self.assertRaisesRegex(queuectl.BadInput, "job 3 already exists"):
            self.queue.enqueue("true", id="3")

    @internal
    def test_suggestion_is_sought_after_the_transaction_and_among_few_ids(self) -> None:
        letters = "abcdefghijklmnopqrstuvwxyz" * 7
        list(self.queue.enqueue_many({"command": "true", "id": f"{letters}{n}"} for n in range(99)))
        exact = mock.Mock(side_effect=lambda: self.queue._db.connection.in_transaction or 0.9)
        for act in (
            lambda: self.queue.enqueue("true", after=letters + "x"),
            lambda: self.queue.retry([letters + "x"]),
        ):
            exact.reset_mock()
            with mock.patch("difflib.SequenceMatcher.ratio", exact):
                with self.assertRaises(queuectl.QueueError) as caught:
                    act()
                exact.assert_not_called()
                self.assertIn("did you mean abc", str(caught.exception))
                self.assertLessEqual(exact.call_count, 40)

    @internal
    def test_times_of_a_cron_rule_are_computed_once_for_a_batch(self) -> None:
        queuectl.cron_next.cache_clear()
        job = {"command": "true", "cron": "* * * * *"}
        self.assertEqual(len(list(self.queue.enqueue_many([job] * 50))), 50)
        self.assertLessEqual(queuectl.cron_next.cache_info().misses, 3)


class QueueBatch(Clocked):
    """Many jobs are stored in several transactions, but appear all or none."""

    JOBS = (
        {"command": "true"},
        {"command": "true", "id": "a", "priority": 3},
        {"command": "true", "id": "5"},
        {"command": "true", "after": ["a", "5"]},
        {"command": "true", "delay": 60, "env": {"A": "b"}},
        {"command": "true"},
        {"command": "true", "id": "a"},
        {"command": "true", "id": "s", "every": 60},
        {"command": "true", "after": "s"},
        {"command": "true", "cron": "@daily"},
        {"command": "true", "after": "1"},
        {"command": "true", "queue": "other", "stdin": "text", "on_dead": "", "on_end": "true"},
        {"command": "true", "retry_delays": [1, 2], "after_end": ["a", "s"], "after": "6"},
    )

    def setUp(self) -> None:
        super().setUp()
        slices = mock.patch.object(queuectl, "BATCH_SLICE", 2)
        slices.start()
        self.addCleanup(slices.stop)

    def facts(self, queue: Queue) -> list[Any]:
        return [job._replace(created_at=0, updated_at=0, run_after=0) for job in queue.jobs()]

    @internal
    def test_large_batch_equals_a_small_one(self) -> None:
        ids = list(self.queue.enqueue_many(self.JOBS, if_absent=True))
        clock = self.queue._reader.clock
        with Queue(self.file("other.db"), clock=clock) as other, other.transaction():
            self.assertEqual(ids, list(other.enqueue_many(self.JOBS, if_absent=True)))
            self.assertEqual(self.facts(self.queue), self.facts(other))
            self.assertEqual(self.queue._reader.counts_by_queue(), other._reader.counts_by_queue())
            for sql in ("SELECT * FROM needs", "SELECT * FROM queues", "SELECT stdin FROM jobs"):
                self.assertEqual(*(q._db.rows(sql) for q in (self.queue, other)))
        self.assertEqual(self.queue._db.rows("SELECT count(*) FROM batches"), [(0,)])
        self.assertEqual(self.queue.enqueue("true"), "14")  # no job has number 5, as one has id 5

    def visible(self, queue: Queue) -> list[str]:
        """Return the ids of all jobs, by arrival, after testing that all queries agree on them."""
        reader = queue._reader
        ids = [job.id for job in reader.all()]
        found: list[list[Any]] = [
            [job.id for job in queue.jobs()],
            [job.id for job in queue.jobs(limit=99)],
            [job.id for job in reader.select(queuectl.JOBS_BEFORE, seq=1e9, limit=99)][::-1],
            [row[0] for row in reader.db.rows(queuectl.RECENT_IDS)][::-1],
        ]
        for other in found:
            self.assertEqual(other, ids)
        queues = {row[0] for row in reader.counts_by_queue()}
        self.assertEqual(queues, {"theirs"} if ids else set())
        self.assertEqual(queue._db.rows("SELECT queue FROM queues"), [(q,) for q in queues])
        return ids

    @internal
    def test_jobs_of_a_batch_are_hidden_while_it_is_read_and_others_can_write(self) -> None:
        with Queue(self.path) as other:
            other._db.keep_waiting = lambda _: False  # fails if the lock is held

            def jobs() -> Iterator[Any]:
                yield {"command": "true", "id": "first"}
                for number in range(9):
                    self.assertEqual(other.counts()["pending"], number)
                    self.assertEqual(self.visible(other), self.others)
                    with self.assertRaises(queuectl.NotFound):
                        other.get("first")
                    with self.assertRaisesRegex(queuectl.BadInput, "after: there is no job first"):
                        other.enqueue("true", after="first")
                    if number > 4:  # it has been staged
                        with self.assertRaisesRegex(queuectl.BadInput, "already exists"):
                            other.enqueue("true", id="first")
                    self.others.append(other.enqueue("true", queue="theirs"))
                    self.assertIsNone(self.claim("default"))
                    yield {"command": "true"}

            self.others: list[str] = []
            ids = list(self.queue.enqueue_many(jobs()))
            self.assertEqual((len(set(ids + self.others)), len(self.run_all().split())), (19, 19))

    @internal
    def test_job_that_a_hidden_job_waits_for_is_kept_and_can_be_cancelled(self) -> None:
        list(self.queue.enqueue_many({"command": "true", "id": name} for name in ("one", "two")))
        with Queue(self.path) as other:

            def jobs() -> Iterator[Any]:
                yield {"command": "true", "after": "one"}
                yield {"command": "true", "after_end": ["one", "two"]}
                yield {"command": "true", "after_end": "one"}
                yield {"command": "true", "id": "s", "every": 60}
                yield from [{"command": "true"}] * 3  # now the first ones are hidden
                cancelled = other.cancel(["one"], cascade=True)
                self.assertEqual([job.id for job in cancelled], ["one"])
                self.assertEqual(
                    (other.prune(), other._ledger.delete_slice("cancelled", 9e9)), (0, 0)
                )
                with self.assertRaises(queuectl.NotFound):
                    other.purge(["one"])
                with self.assertRaises(queuectl.NotFound):
                    other.get("s")
                with self.assertRaisesRegex(queuectl.BadInput, "job s already exists"):
                    other.enqueue("true", id="s")

            ids = list(self.queue.enqueue_many(jobs()))
        kinds = [self.queue.get(job_id).readiness for job_id in ids]
        self.assertEqual(kinds, [-1, -1, 1, 1, 1, 1, 1])

    @internal
    def test_refused_batch_leaves_nothing(self) -> None:
        self.queue.enqueue("true")
        bad = ({"command": ""}, {"command": "true", "after": "x"}, {"command": "true", "id": "a"})
        for job in bad:
            jobs = [*self.JOBS[:6], job, {"command": "true"}]
            with self.assertRaises(queuectl.BadInput) as caught:
                self.queue.enqueue_many(jobs)
            self.assertIn(caught.exception.index, (6, None))
            self.assertEqual(self.queue._db.rows("SELECT count(*) FROM jobs"), [(1,)])
            self.assertEqual(self.queue._db.rows("SELECT count(*) FROM needs"), [(0,)])
            self.assertEqual(
                self.queue._db.rows("SELECT queue, ready FROM queues"), [("default", 1)]
            )
        self.assertEqual(os.listdir(self.path + ".run"), [])

    def test_line_of_a_bad_job_is_named_whenever_it_is_noticed(self) -> None:
        good = '{"command": "true"}\n\n' * 4
        for bad, line in (
            ('{"id": "x", "command": "true"}\n[{"command": "t"}, {"id": "x", "command": "t"}]', 10),
            ('{"after": "nobody", "command": "true"}\n' + good, 9),
            ('{"command": 5}\n' + good, 9),
            ("{]\n" + good, 9),
        ):
            error = self.assert_refused("enqueue", "-", stdin=good + bad)
            self.assertIn(f"queuectl: line {line}: ", error)
        self.assertEqual(self.ids(), "")

    @NEEDS_SHELL
    def test_batch_whose_process_is_killed_is_completed_if_accepted_and_else_deleted(self) -> None:
        """Promise 1."""
        program = """if True:
            import os, queuectl, sys
            die = lambda *_: os.kill(os.getpid(), 9)
            queuectl.BATCH_SLICE = 2
            jobs = [{"command": "true", "id": f"{sys.argv[1]}-{n}"} for n in range(5)]
            if sys.argv[1] == "accepted":
                queuectl.Ledger.settle_slice = die
            else:
                jobs = (job if job["id"] != "read-4" else die() for job in jobs)
            queuectl.Queue("queuectl.db").enqueue_many(jobs)
        """
        for when, number in (("read", 0), ("accepted", 5)):
            self.assertEqual(self.script(program, when)[0], -signal.SIGKILL)
            staged = "SELECT count(*) FROM jobs WHERE state = 'staged'"
            self.assertEqual((self.ids(), self.queue._db.rows(staged)), ("", [(number or 4,)]))
            self.drain()
            self.assertEqual(self.queue.counts()["completed"], number)
            self.assertEqual(self.queue._db.rows(staged), [(0,)])
        self.assertEqual(glob.glob(self.path + ".run/batch-*"), [])


class QueueReading(Clocked):
    """Reading jobs and their counts."""

    @internal
    def test_counts_equal_the_number_of_jobs_in_each_state(self) -> None:
        for number in range(9):
            self.queue.enqueue("true", id=f"j{number}", max_retries=1)
        for code in (0, 0, 1):
            self.finish(code)
        self.claim()
        counted = dict.fromkeys(queuectl.STATES, 0)
        for job in self.queue.jobs():
            counted[job.state] += 1
        self.assertEqual(self.queue.counts(), counted)
        self.assertEqual(list(counted.values()), [5, 1, 2, 1, 0])

    def test_limited_list_holds_the_last_changed_jobs_in_any_state(self) -> None:
        list(self.queue.enqueue_many({"command": "true", "id": name} for name in "ab"))
        self.now += 1
        self.queue.cancel(["b"])
        self.now += 1
        self.queue.enqueue("true", id="c")
        self.assertEqual([job.id for job in self.queue.jobs(limit=2)], ["b", "c"])
        self.assertEqual([job.id for job in self.queue.jobs(limit=0)], [])
        for bad in (-1, "x", 1.5):
            with self.subTest(bad), self.assertRaisesRegex(queuectl.BadInput, "^limit must be"):
                self.queue.jobs(limit=bad)  # type: ignore[arg-type]


class QueueSelection(Clocked):
    """Which jobs a selection takes."""

    def setUp(self) -> None:
        super().setUp()
        enqueue_graph(self.queue, "ended", "failed", "ready")
        for code in (0, 1):
            self.finish(code)
        self.queue.enqueue("echo Grün", id="later", queue="gpu", delay=60)
        self.now += 10
        self.queue.enqueue("true", id="BLOCKED", queue="gpu", after="later")
        self.queue.enqueue("true", id="none", queue="cpu")
        self.queue.cancel("none")

    SELECTIONS = (  # the filters, and the ids in order
        ({}, "ended failed ready later BLOCKED none"),
        ({"states": ["pending"]}, "ready later BLOCKED"),
        ({"states": ["blocked", "dead"]}, "failed BLOCKED"),
        ({"states": ["scheduled"]}, "later"),
        ({"states": ["ready"]}, "ready"),
        ({"states": ["processing"]}, ""),
        ({"queues": ["gpu", "cpu"]}, "later BLOCKED none"),
        ({"queues": ["gpu"], "states": ["pending", "cancelled"]}, "later BLOCKED"),
        ({"queues": ["unused"]}, ""),
        ({"match": "GRÜN"}, "later"),
        ({"match": "blocked"}, "BLOCKED"),
        ({"match": "%"}, ""),
        ({"older_than": 10}, "ended failed ready later"),
        ({"older_than": 11}, ""),
        ({"ids": ["ready", "ended"]}, "ready ended"),
    )

    @internal
    def test_selection_takes_the_jobs_that_match_every_filter(self) -> None:
        for share in (4, 1, 1e9):  # by an index where few match, always, and never
            for fields, ids in self.SELECTIONS:
                with self.subTest(share, **fields), mock.patch.object(queuectl, "SHARE", share):
                    jobs = self.queue._reader.selected(queuectl.Selection(**fields))
                    self.assertEqual(" ".join(job.id for job in jobs), ids)

    @internal
    def test_selection_by_state_yields_every_job_of_a_large_batch_once(self) -> None:
        self.queue.enqueue_many({"command": "true"} for _ in range(5010))
        self.now += 1
        self.queue.enqueue_many({"command": "true"} for _ in range(5010))
        with mock.patch.object(queuectl, "SHARE", 1):
            jobs = self.queue._reader.selected(queuectl.Selection(states=["ready"]))
            self.assertEqual([job.seq for job in jobs], [3, *range(7, 10027)])
        dead = queuectl.Selection(states=["dead", "blocked"])
        self.assertLess(self.sqlite_steps(lambda: list(self.queue._reader.selected(dead))), 50)

    @internal
    def test_selection_finds_a_job_whose_state_changes_while_it_reads(self) -> None:
        reader = self.queue._reader
        self.queue.enqueue("true", id="first", priority=9)
        first = self.claim()
        moves = {"ready": self.claim, "processing": lambda: self.finish(0, first)}

        for (state, move), later in zip(moves.items(), ("processing", "completed")):

            def seqs(
                *kind: Any, queue: Any, read: Any = reader.seqs_in_state, move: Any = move
            ) -> Any:
                yield from read(*kind, queue=queue)
                move()

            chosen = queuectl.Selection(states=[state, later])
            expected = [job.id for job in reader.selected(chosen)]
            with mock.patch.object(queuectl, "SHARE", 1), mock.patch.object(
                reader, "seqs_in_state", seqs
            ):
                found = [job.id for job in reader.selected(chosen)]
            self.assertEqual(found, expected)

    @internal
    def test_selection_finds_the_first_job_that_starts_while_it_reads(self) -> None:
        reader = self.queue._reader
        for queue in ("default", "q"):
            self.queue.enqueue("true", id=f"in-{queue}", queue=queue)

        def seqs(*kind: Any, read: Any = reader.seqs_in_state, **more: Any) -> Any:
            if kind[0] == "pending":
                self.claim("q")  # until then, no job of this queue has run
            yield from read(*kind, **more)

        with mock.patch.object(queuectl, "SHARE", 1), mock.patch.object(
            reader, "seqs_in_state", seqs
        ):
            found = [job.id for job in reader.selected(queuectl.Selection(queues=["q"]))]
        self.assertEqual(found, ["in-q"])

    def test_list_shows_the_selected_jobs(self) -> None:
        cases = {
            "": "ended failed ready later BLOCKED none",
            "--state blocked,scheduled --state cancelled": "later BLOCKED none",
            "--queue gpu --queue cpu --limit 2": "BLOCKED none",
            "--match ed --limit 2": "failed BLOCKED",
            "none ended": "none ended",
            "none ended --limit 1": "none",
        }
        self.assert_table(
            cases, lambda words: " ".join(self.stdout("list", "--ids", *words.split()).split())
        )
        self.assertEqual(self.stdout("dlq", "list", "--ids"), "failed\n")
        for words in ("list ready --queue gpu", "list --state done", "list --match ed --queue="):
            self.assert_refused(*words.split())

    CHANGES = {  # the command, and the ids of the jobs that it changes
        "cancel --queue gpu": "later BLOCKED",
        "cancel --state ready,scheduled --older-than 1d": "ready later",
        "cancel --cascade --match later": "later BLOCKED",
        "dlq retry --all": "failed",
        "dlq retry --state dead,cancelled": "failed none",
        "dlq purge --match FAIL": "failed",
        "dlq purge --older-than 0 --queue gpu": "",
        "prune": "ended none",
        "prune --state dead --state completed": "ended failed",
        "prune none": "none",
    }

    def test_command_changes_the_selected_jobs_and_none_in_a_dry_run(self) -> None:
        before = self.ids(), self.queue.counts()
        for words, ids in self.CHANGES.items():
            with self.subTest(words):
                dry = self.stdout(*words.split(), "--dry-run")
                self.assertEqual((self.ids(), self.queue.counts()), before)
                copy = self.file(str(len(words)) + ".db")
                with contextlib.closing(sqlite3.connect(copy)) as db:
                    self.queue._db.connection.backup(db)
                os.chmod(copy, 0o600)
                found = self.stdout("--db", copy, *words.split(), "--ids")
                self.assertEqual([dry.split(), found.split()], [ids.split()] * 2)
                with Queue(copy) as queue:
                    changed = {job.id for job in self.queue.jobs()} - {
                        job.id for job in queue.jobs()
                    }
                    changed |= {job.id for job in queue.jobs() if job != self.queue.get(job.id)}
                self.assertEqual(changed, set(ids.split()))
        self.assertEqual(self.result("dlq", "retry", "none", "ended", "-n")[:2], (1, "none\n"))

    @internal
    def test_jobs_of_a_queue_are_found_without_reading_those_of_others(self) -> None:
        self.queue.enqueue_many({"command": "true", "queue": "many"} for _ in range(2000))
        self.queue._db.execute("UPDATE jobs SET state = 'completed' WHERE queue = 'many'")
        self.queue.cancel([self.queue.enqueue("true", id="x", queue="few")])
        self.queue._db.execute("UPDATE jobs SET state = 'completed' WHERE id = 'x'")
        found: list[str] = []
        chosen = queuectl.Selection(queues=["few"])
        for act in (
            lambda: found.extend(job.id for job in self.queue._reader.selected(chosen)),
            lambda: found.extend(job.id for job in self.queue.jobs(queue="few", limit=9)),
        ):
            self.assertLess(self.sqlite_steps(act), 400)  # to read them all: 900
        self.assertEqual(found, ["x", "x"])

    @internal
    def test_change_of_many_jobs_is_made_in_short_transactions(self) -> None:
        """Each is stored by itself, and jobs that another process changed meanwhile are left."""
        ledger = self.queue._ledger
        seqs = [job.seq for job in self.queue.jobs()]
        seen = []
        with mock.patch.multiple(queuectl, HOLD=-1, LET_IN=0):
            for jobs in ledger.in_slices(seqs, ledger.check_retry, ledger.retry):
                seen.append(" ".join(job.id for job in jobs))
                if len(seen) == 2:
                    self.queue.purge("none")
                with Queue(self.path) as other:
                    self.assertEqual(other.counts()["pending"], 3 + ("failed" in seen))
        self.assertEqual(seen, ["", "failed", "", "", "", ""])

    @internal
    def test_change_of_many_jobs_is_synced_when_others_can_have_the_lock_again(self) -> None:
        """A slow disk must not keep others waiting; the ids are printed after the sync."""
        self.queue._db.set_synchronous("full")
        events = []

        def sync(path: str) -> None:
            with contextlib.closing(sqlite3.connect(self.path, timeout=0)) as other:
                other.execute("BEGIN IMMEDIATE")
            events.append("sync" if path == self.path + "-wal" else path)

        def cancel(job: Any) -> None:
            self.queue._ledger.cancel(job.seq)
            events.append(self.queue._db.rows("PRAGMA synchronous")[0][0])  # 1: normal

        seqs = [self.queue.enqueue("true") and self.queue._ledger.last_seq()]
        with mock.patch.object(queuectl, "sync_file", sync):
            for jobs in self.queue._ledger.in_slices(seqs, lambda _job: None, cancel):
                events.append(len(jobs))
        self.assertEqual(events, [1, "sync", 1])
        self.assertEqual(self.queue._db.rows("PRAGMA synchronous")[0][0], 2)  # full, again


class QueueEdit(Clocked):
    """Changing jobs that wait."""

    EDITS = (  # the new fields, and the facts of the job that follow
        ({"command": "false", "cwd": "/tmp"}, {"command": "false", "cwd": os.path.abspath("/tmp")}),
        ({"priority": "7", "queue": "gpu"}, {"priority": 7, "queue": "gpu"}),
        ({"delay": "1h"}, {"run_after": 1e6 + 3610, "readiness": queuectl.SCHEDULED}),
        ({"run_at": 5}, {"run_after": 5, "readiness": queuectl.READY}),
        ({"timeout": "5m", "max_retries": 9}, {"timeout": 300, "max_retries": 9}),
        ({"timeout": "default", "max_retries": None}, {"timeout": None, "max_retries": None}),
        ({"env": {"B": None, "C": "3"}}, {"env": '{"A": "1", "C": "3"}'}),
        ({"env": {"A": None, "B": None}}, {"env": None}),
        ({"stdin": "text", "retry_delays": "1s,2m"}, {"stdin_size": 4, "retry_delays": "1,120"}),
        ({"on_dead": "D", "on_end": ""}, {"on_dead": "D", "on_end": ""}),
        ({"after_end": "parent"}, {"readiness": queuectl.BLOCKED}),
        ({"after": "parent"}, {"readiness": queuectl.BLOCKED}),
        ({"after": "parent", "delay": 9}, {"readiness": queuectl.BLOCKED, "run_after": 1e6 + 19}),
        ({"after": ["done"]}, {}),
    )

    @internal
    def test_edit_changes_the_given_fields_and_what_follows_from_them(self) -> None:
        enqueue_graph(self.queue, "done")
        self.finish()
        self.queue.enqueue("true", id="parent", delay=1e6)
        for number, (fields, facts) in enumerate(self.EDITS):
            job_id = f"j{number}"
            self.now = 1e6
            env = {"A": "1", "B": "2"}
            self.queue.enqueue("true", id=job_id, env=env, timeout=1, max_retries=1)
            before = self.queue.get(job_id)
            self.now += 10
            (job,) = self.queue.edit(job_id, **fields)
            with self.subTest(fields):
                if facts.keys() & {"readiness", "run_after"}:
                    before = before._replace(updated_at=self.now)
                self.assertEqual(job, before._replace(**facts))
                self.assertEqual(job, self.queue.get(job_id))
        self.check_counts()

    def check_counts(self) -> None:
        """Check that the number of jobs of each queue, state and readiness is right."""
        found: dict[Any, int] = {}
        for job in self.queue.jobs():
            kind = (job.queue, job.state, job.readiness)
            found[kind] = found.get(kind, 0) + 1
        counts = self.queue._reader.counts_by_queue()
        self.assertEqual(found, {tuple(row[:3]): row[3] for row in counts if row[3]})

    @internal
    def test_edit_moves_waiting_jobs_of_every_kind_to_another_queue(self) -> None:
        enqueue_graph(self.queue, "a", "b a")
        self.queue.enqueue("true", id="later", delay=5)
        self.queue.edit(["a", "b", "later"], queue="gpu")
        self.check_counts()
        self.assertIsNone(self.claim("default"))
        self.now += 5
        self.assertEqual(
            [self.finish(0, self.claim("gpu")).id for _ in range(3)], ["a", "b", "later"]
        )
        self.check_counts()

    def test_edit_replaces_dependencies_and_refuses_a_cycle(self) -> None:
        enqueue_graph(self.queue, "a", "b a", "c b", "d")
        for after in ("c", "a", ["d", "b"]):
            with self.subTest(after), self.assertRaises(queuectl.NotFound):
                self.queue.edit("a", after=after)
        with self.assertRaisesRegex(queuectl.BadInput, "after: there is no job nope"):
            self.queue.edit(["d", "c"], priority=1, after=["a", "nope"])
        self.assertEqual(self.queue.get("d").priority, 0)
        self.queue.edit("b", after="d")
        self.queue.edit("a", after="c")
        self.queue.edit("d", priority=9)
        self.assertEqual(self.run_all(), "d b c a")
        enqueue_graph(self.queue, "e", "f e")
        self.queue.edit("f", after="", priority=1)
        self.assertEqual(self.run_all(), "f e")

    def test_job_can_wait_for_completion_and_for_any_end_of_the_same_job(self) -> None:
        enqueue_graph(self.queue, "a", "b a")
        for fields, readiness in (
            ({"after_end": "a"}, queuectl.BLOCKED),
            ({"after": ""}, queuectl.BLOCKED),
            ({"after_end": ""}, queuectl.READY),
        ):
            self.queue.edit("b", **fields)
            self.assertEqual(self.queue.get("b").readiness, readiness, fields)
        self.queue.edit("b", after="a", after_end="a")
        self.assertEqual(self.json_object("show", "b")["after"], ["a"])
        self.finish()
        found = self.queue._ledger.claim("worker-1")
        self.assertEqual((found.job.id, found.parents), ("b", "a"))

    @internal
    def test_job_that_was_claimed_since_it_was_read_is_not_edited(self) -> None:
        self.queue.enqueue("true", id="x")
        before = self.queue.get("x")
        claimed = self.claim()
        self.queue._ledger.edit(before, {"command": "false", "queue": "gpu", "run_at": 9e6})
        self.assertEqual(self.queue.get("x"), claimed)
        self.assertEqual(self.finish(0, claimed).state, "completed")

    def test_edit_leaves_jobs_that_run_or_have_ended(self) -> None:
        enqueue_graph(self.queue, "ended", "runs", "waits")
        self.finish()
        self.claim()
        before = [self.queue.get(name) for name in ("ended", "runs")]
        code, out, err = self.result("edit", "ended", "runs", "waits", "--priority", "5")
        self.assertEqual((code, out), (1, "waits\n"))
        left = "queuectl: job {0.id} is {0.state}; it was not changed\n"
        self.assertEqual(err, "".join(left.format(job) for job in before))
        self.assertEqual([self.queue.get(name) for name in ("ended", "runs")], before)
        self.assertEqual(
            self.result("edit", "runs", "waits", "-n", "--priority=1")[:2], (1, "waits\n")
        )
        ledger = self.queue._ledger
        act = partial(ledger.edit, fields={"priority": 9})
        check = partial(ledger.require_state, states=("pending",))
        (slices,) = ledger.in_slices([job.seq for job in before], check, act)
        self.assertEqual(slices, [])

    @NEEDS_SHELL
    def test_edit_of_a_schedule_applies_to_its_next_jobs(self) -> None:
        self.queue.enqueue("true", id="x", every=3600, delay=3600)
        self.queue.edit("x", command="echo", priority=3, every=60)
        self.assertEqual((self.queue.get("x").run_after, self.queue.get("x").id), (1e6 + 60, "x.1"))
        self.queue.edit("x.1", delay=0)
        self.finish()
        job = self.queue.get("x")
        self.assertEqual((job.id, job.command, job.priority), ("x.2", "echo", 3))
        self.assertEqual((job.rule, job.run_after), ("every 60", 1e6 + 60))
        with time_zone("UTC"):
            (job,) = self.queue.edit("x", cron="@daily")
        self.assertEqual(
            (job.rule, job.run_after, job.scheduled_for), ("cron @daily", 1036800, 1036800)
        )
        self.queue.enqueue("true", id="plain")
        with self.assertRaisesRegex(queuectl.NotFound, "not the next occurrence of a schedule"):
            self.queue.edit("plain", every=60)

    @internal
    def test_edit_of_a_schedule_leaves_the_time_of_a_retry(self) -> None:
        self.queue.enqueue("true", id="x", every=3600)
        self.finish(1)
        retry_at = self.queue.get("x").run_after
        (job,) = self.queue.edit("x", every=60)
        self.assertEqual((job.rule, job.run_after, job.scheduled_for), ("every 60", retry_at, 1e6))
        self.now = retry_at
        self.finish()
        self.assertEqual(self.queue.get("x").run_after, 1e6 + 60)

    OPTIONS = {  # of `edit`, and the fields that it gives
        "--command false --timeout 7s": {"command": "false", "timeout": 7},
        "--queue gpu": {"queue": "gpu"},
        "--to-queue gpu --priority -3": {"queue": "gpu", "priority": -3},
        "--timeout default --max-retries 7": {"timeout": None, "max_retries": 7},
        "--env A=1 --env B=2 --env C": {"env": '{"A": "1", "B": "2"}'},
        "--at 1970-01-01T00:00:05Z --after=": {"run_after": 5.0},
    }

    def test_options_of_edit_are_those_of_enqueue(self) -> None:
        for options, facts in self.OPTIONS.items():
            with self.subTest(options):
                job_id = self.queue.enqueue("true", timeout=5, env={"C": "3"})
                self.assertEqual(self.stdout("edit", job_id, *options.split()), f"{job_id}\n")
                job = self.queue.get(job_id)._asdict()
                self.assertEqual({key: job[key] for key in facts}, facts)
        wrong = ("", "--id x", "--priority high", "--max-retries 0", "--env =x", "--cron 5")
        for options in (*wrong, "--queue a --to-queue b"):
            with self.subTest(options):
                self.assert_refused("edit", "1", *options.split())
        self.assert_refused("edit", "--queue", "gpu")
        self.assert_refused("edit", "--priority", "1")
        moved = self.stdout("edit", "--queue", "gpu", "--match", "TRUE", "--to-queue", "cpu")
        self.assertEqual(moved, "2\n3\n")
        self.assertEqual([job.id for job in self.queue.jobs(queue="cpu")], ["2", "3"])

    @internal
    def test_edit_wakes_the_pools(self) -> None:
        self.queue.enqueue("true", id="x", delay=3600)
        for words in (["x"], ["--state", "pending"]):
            with mock.patch.object(queuectl.RunDirectory, "notify") as notify:
                self.assertEqual(self.stdout("edit", *words, "--priority", "1"), "x\n")
            notify.assert_called_once_with()

    @internal
    def test_edit_cost_is_that_of_one_job(self) -> None:
        self.queue.enqueue("true", id="x")
        fields = {"priority": 5, "queue": "gpu", "delay": 60, "env": {"A": "1"}}
        few = self.sqlite_steps(lambda: self.queue.edit("x", **fields))
        self.queue.enqueue_many({"command": "true", "queue": "gpu"} for _ in range(2000))
        many = self.sqlite_steps(
            lambda: self.queue.edit("x", **{**fields, "priority": 6, "delay": 0})
        )
        self.assertLess(many, few + 3, few)


@NEEDS_SHELL
class QueueEditLive(Live):
    """Changing jobs while workers claim them."""

    def edit_while_workers_run(self, size: int, workers: int) -> None:
        """Check that each job runs once, as it was or as it is."""
        line = "echo {0} $KIND $QUEUECTL_JOB_ID >> log"
        with Queue(self.path) as queue:
            old = {"command": line.format("old"), "env": {"KIND": "old"}, "cwd": self.dir}
            ids = list(queue.enqueue_many(old for _ in range(size)))
            pool = self.pool("--count", str(workers), "--drain")
            wait_until(lambda: self.read("log"))
            new = {"command": line.format("new"), "env": {"KIND": "new"}, "queue": "other"}
            edited = [job.id for job_id in reversed(ids) for job in queue.edit(job_id, **new)]
            pool.wait(60)
            self.assertEqual(queue.counts()["completed"], size)
        expected = [f"{'new' if name in edited else 'old'} " * 2 + name for name in ids]
        self.assertEqual(sorted(self.lines("log")), sorted(expected))
        self.assertTrue(0 < len(edited) < size, len(edited))

    def test_edited_job_runs_once_as_it_was_or_as_it_is(self) -> None:
        self.edit_while_workers_run(150, 2)

    @SLOW
    def test_a_thousand_edits_against_four_workers(self) -> None:
        """Promise 2: each job runs once, as it was or as it is."""
        self.edit_while_workers_run(1000, 4)

    def test_edit_of_a_schedule_waits_while_its_job_runs(self) -> None:
        self.enqueue(RUN_UNTIL_GO, id="x", every=3600)
        self.pool()
        self.wait_for_state("x.1", "processing")
        error = "queuectl: job x.1 is processing; it was not changed\n"
        self.assertEqual(self.result("edit", "x.1", "--priority", "3"), (1, "", error))
        edit = self.start("edit", "x", "--priority", "3", bufsize=1)
        self.assertIn("waiting for x.1 to end", edit.stdout.readline())
        self.write("go")
        self.assertEqual(edit.communicate()[0], "x.2\n")
        self.assertEqual((self.job("x.1").priority, self.job("x.2").priority), (0, 3))


class QueueOrder(Clocked):
    """The order in which jobs are claimed."""

    def test_jobs_run_by_priority_then_due_time_then_arrival(self) -> None:
        jobs = {
            "later": {"priority": 9, "delay": 50},
            "low": {"priority": -1},
            "second": {},
            "first": {"run_at": 900},
            "third": {},
            "high": {"priority": 5},
        }
        for job_id, fields in jobs.items():
            self.queue.enqueue("true", id=job_id, **fields)
        self.assertEqual(self.run_all(), "high first second third low")
        self.now += 50
        self.assertEqual(self.run_all(), "later")

    @NEEDS_SHELL
    @internal
    def test_low_priority_job_waits_but_is_not_lost_and_status_shows_it(self) -> None:
        self.queue.enqueue("true", id="tomorrow", delay=86300)
        self.queue.enqueue("true", id="low", priority=-9, delay=100)
        self.now += 86400
        for number in range(5):
            self.queue.enqueue("true", id=f"high{number}", priority=9)
            self.assertEqual(self.finish().id, f"high{number}")
            oldest = next(
                line for line in queuectl.status_text(self.queue._reader) if "oldest" in line
            )
            self.assertIn("job low, due 23h58m ago; no worker is running", oldest)
        self.assertEqual(self.run_all(), "tomorrow low")

    @NEEDS_SHELL
    def test_job_runs_at_its_due_time_and_not_before(self) -> None:
        self.queue.enqueue("true", id="past", run_at="1970-01-02")
        self.queue.enqueue("true", id="then", run_at=self.now + 60)
        self.assertEqual(self.run_all(), "past")
        self.now += 59.9
        self.assertEqual(self.run_all(), "")
        self.now += 0.1
        self.assertEqual(self.run_all(), "then")

    @NEEDS_SHELL
    def test_jobs_run_at_their_due_times_after_the_clock_was_set_back(self) -> None:
        for job_id, delay in {"due": 0, "retry": 0, "later": 10}.items():
            self.queue.enqueue("true", id=job_id, delay=delay, priority=int(job_id == "retry"))
        self.assertEqual(self.finish(1).id, "retry")  # due again in 2 s
        self.now -= 3600
        self.assertEqual(self.run_all(), "due")
        self.now += 3602
        self.assertEqual(self.run_all(), "retry")
        self.now += 8
        self.assertEqual(self.run_all(), "later")

    @NEEDS_SHELL
    def test_worker_of_several_queues_claims_by_priority_across_them(self) -> None:
        enqueue_pairs(self.queue)
        jobs = [self.claim("gpu", "cpu") for _ in range(5)]
        self.assertEqual([job and job.id for job in jobs], ["cpu1", "cpu2", "gpu1", "gpu2", None])
        self.assertEqual(self.claim().id, "default1")


@NEEDS_SHELL
class QueueDependencies(Clocked):
    """Jobs that wait for other jobs."""

    def test_job_starts_once_all_of_its_parents_have_completed(self) -> None:
        enqueue_graph(self.queue, "a", "b", "c a b", "d c", "e a a")
        self.assertEqual(self.finish().id, "a")
        self.assertEqual(self.why("c"), "blocked by b (pending)")
        self.assertEqual(self.run_all(), "b c d e")
        enqueue_graph(self.queue, "f a")
        self.assertEqual(self.run_all(), "f")

    def test_blocked_job_with_a_due_time_waits_for_both(self) -> None:
        enqueue_graph(self.queue, "a")
        self.queue.enqueue("true", id="b", after=["a"], delay=60)
        self.assertEqual(self.run_all(), "a")
        self.assertEqual(self.why("b"), "due in 1m")
        self.now += 60
        self.assertEqual(self.run_all(), "b")

    def test_batch_line_may_depend_on_earlier_lines_only(self) -> None:
        lines = [
            {"id": "a", "command": "x", "after": []},
            {"id": "b", "command": "x", "after": ["a"]},
        ]
        self.assertEqual(list(self.queue.enqueue_many(lines)), ["a", "b"])
        for parent in ("d", "e"):
            lines = [{"id": "d", "command": "x", "after": parent}, {"id": "e", "command": "x"}]
            with self.assertRaisesRegex(queuectl.BadInput, f"after: there is no job {parent}"):
                self.queue.enqueue_many(lines)
        text = "\n".join(map(json.dumps, lines))
        self.assertIn(
            "line 1: after: there is no job e", self.assert_refused("enqueue", "-", stdin=text)
        )
        self.assertEqual(self.ids(), "a b")

    @internal
    def test_refused_batch_stores_neither_jobs_nor_dependencies(self) -> None:
        enqueue_graph(self.queue, "a")
        batch = [
            {"id": "b", "command": "x", "after": "a"},
            {"id": "c", "command": "x", "after": "?"},
        ]
        with self.assertRaises(queuectl.BadInput):
            self.queue.enqueue_many(batch)
        self.assertEqual(self.ids(), "a")
        count = self.queue._db.execute("SELECT count(*) FROM needs").fetchone()
        self.assertEqual(count, (0,))

    def test_dead_or_cancelled_parent_blocks_its_child_until_retried(self) -> None:
        enqueue_graph(self.queue, "a", "b", "c a b", "d c")
        self.finish(1)
        self.queue.cancel(["b"])
        self.assertEqual(self.run_all(), "")
        blocked = "blocked by a (dead), b (cancelled)"
        self.assert_table({"c": blocked, "d": "blocked by c (pending)"}, self.why)
        self.assertIn(f"blocked    job c is {blocked}\n", self.stdout("status"))
        self.assertRegex(self.stdout("list"), f"c +pending .*{re.escape(blocked)}")
        self.assertRegex(self.stdout("show", "c"), f"why +{re.escape(blocked)}")
        self.assertEqual(self.json_object("show", "c")["after"], ["a", "b"])
        self.queue.retry(["a", "b"])
        self.assertEqual(self.run_all(), "a b c d")

    def test_job_counts_as_waiting_only_since_it_was_unblocked(self) -> None:
        enqueue_graph(self.queue, "a", "b a")
        job = self.claim()
        self.now += 100
        enqueue_graph(self.queue, "c")
        self.now += 100
        self.finish(0, job)
        self.assertEqual(getattr(self.queue._reader.oldest(), "id", None), "c")

    def test_cancelled_child_can_be_retried_before_and_after_its_parent_runs(self) -> None:
        enqueue_graph(self.queue, "a", "b a", "c a")
        self.queue.cancel(["b", "c"])
        self.queue.retry(["b"])
        self.assertEqual(self.why("b"), "blocked by a (pending)")
        self.assertEqual(self.run_all(), "a b")
        self.queue.retry(["c"])
        self.assertEqual(self.run_all(), "c")

    def test_cleanup_step_runs_however_its_parents_ended(self) -> None:
        ends = {
            "completes": self.finish,
            "dies": lambda: self.finish(1),
            "is cancelled": lambda: self.queue.cancel([self.ids().split()[0]]),
            "is cancelled with cascade": lambda: self.queue.cancel(["p"], cascade=True),
            "is cancelled while it runs": self.cancel_running,
        }
        for end, act in ends.items():
            enqueue_graph(self.queue, "p")
            self.queue.enqueue("true", id="clean", after_end=["p"])
            enqueue_graph(self.queue, "then clean", "next p")
            self.assertEqual(self.why("clean"), "blocked by p (pending)", end)
            act()
            self.assertEqual(self.why("clean"), "no worker is running", end)
            self.queue.prune(0, ["completed", "cancelled"])
            runs = "next clean then" if end == "completes" else "clean then"
            self.assertEqual(set(self.run_all().split()), set(runs.split()), end)
            self.queue.cancel([job.id for job in self.queue.jobs("pending")])
            self.queue.prune(0, queuectl.FINISHED)
            self.assertEqual(self.ids(), "", end)

    def cancel_running(self) -> None:
        """Cancel the next job while it runs."""
        job = self.claim()
        self.queue.cancel([job.id])
        end = Outcome("cancelled", self.now, self.now, -15, "cancelled by the operator")
        self.queue._ledger.finish(job, end)

    def test_cleanup_step_runs_once_its_dead_parent_has_been_purged_or_retried(self) -> None:
        enqueue_graph(self.queue, "a", "b", "c")
        self.queue.enqueue("true", id="clean", after=["c"], after_end=["a", "b"])
        self.finish(1)
        self.finish(1)
        self.assertEqual(self.why("clean"), "blocked by c (pending)")
        self.queue.purge(["a"])
        self.queue.retry(["b"])
        self.queue.cancel(["b"])
        self.assertEqual(self.run_all(), "c clean")
        self.queue.enqueue("true", id="late", after_end=["b"])
        self.assertEqual(self.run_all(), "late")
        with self.assertRaisesRegex(queuectl.BadInput, "after_end: there is no job a"):
            self.queue.enqueue("true", after_end="a")

    def test_job_that_needs_both_the_end_and_the_completion_of_another_stays_blocked(self) -> None:
        enqueue_graph(self.queue, "p")
        self.queue.enqueue("true", id="c", after="p", after_end="p")
        self.queue.enqueue("true", id="d", after_end="c")
        self.finish(1)
        self.assertEqual(self.why("c"), "blocked by p (dead)")
        for name in "cd":
            self.assertIn("job p is dead", self.result("wait", name).stderr)
        self.assertEqual([job.id for job in self.queue.cancel(["p"], cascade=True)], ["p", "c"])
        self.assertEqual(self.run_all(), "d")

    def test_environment_names_the_parents_of_both_kinds(self) -> None:
        enqueue_graph(self.queue, "a", "b", "c")
        self.queue.enqueue("true", id="d", after=["b", "a"], after_end=["c"])
        for code in (0, 0, 1):
            self.finish(code)
        self.assertEqual(self.queue._ledger.claim("w").parents, "a b c")


@NEEDS_SHELL
class QueueSchedules(Clocked):
    """Jobs that recur, by an interval or a cron rule."""

    def seconds_to_next(self) -> float:
        """Return the number of seconds until the only schedule is due."""
        (job,) = self.queue._reader.select(queuectl.SCHEDULES)
        return job.run_after - self.now

    def test_next_occurrence_is_added_when_the_last_one_ends(self) -> None:
        self.assertEqual(self.queue.enqueue("true", id="x", every="15m"), "x")
        for number in (1, 2, 3):
            job = self.claim()
            self.assertEqual(job.id, f"x.{number}")
            self.assertIsNone(self.claim())  # one at a time
            self.now += 60  # the run time of the job
            self.finish(0, job)
            self.assertEqual(self.seconds_to_next(), 840)
            self.assertIsNone(self.claim())
            self.now += 840
        self.assertEqual(self.queue.get("x").id, "x.4")
        self.assertEqual(self.ids(), "x.1 x.2 x.3 x.4")

    def test_missed_occurrences_run_once(self) -> None:
        self.queue.enqueue("true", id="x", every=10)
        self.assertEqual(self.run_all(), "x.1")
        self.now += 1005
        self.assertEqual(self.run_all(), "x.2")
        self.assertEqual(self.seconds_to_next(), 5)
        with time_zone("UTC"):
            self.queue.cancel(["x"])
            self.now = 86400 * 100.0
            self.queue.enqueue("true", id="y", cron="@daily")
            self.assertEqual(self.seconds_to_next(), 86400)
            self.now += 86400 * 10.5
            self.assertEqual(self.run_all(), "y.1")
            self.assertEqual(self.seconds_to_next(), 43200)

    @internal
    def test_next_occurrence_is_added_in_the_transaction_that_ends_the_last(self) -> None:
        self.queue.enqueue("true", id="x", every=10)
        job = self.claim()
        outcome = Outcome("exited", self.now, self.now, 0, None)
        power_cut = mock.patch.object(
            self.queue._ledger, "_claim", side_effect=OSError("power cut")
        )
        with power_cut, self.assertRaises(OSError):
            self.queue._ledger.finish(job, outcome, ())
        self.assertEqual(self.queue.get("x.1").state, "processing")
        self.assertEqual(self.ids(), "x.1")
        self.queue._ledger.finish(job, outcome)
        self.assertIsNone(self.queue._ledger.finish(job, outcome)[0])
        self.assertEqual(self.ids(), "x.1 x.2")

    def test_occurrences_have_their_own_attempts_and_survive_a_dead_one(self) -> None:
        self.queue.enqueue("true", id="x", every=100, max_retries=2, env={"A": "b"}, priority=3)
        for _ in range(2):
            self.assertEqual(self.queue._reader.select(queuectl.SCHEDULES)[-1].attempts, 0)
            self.finish(1)
            self.now += 2
            self.assertEqual(self.finish(1).state, "dead")
            self.now += 98
        self.assertEqual(self.queue.counts()["dead"], 2)
        self.assertEqual(self.queue.retry(["x.1"]), ["x.1"])
        self.assertEqual(self.run_all(), "x.1 x.3")
        inherited = operator.attrgetter(
            "command", "env", "priority", "max_retries", "schedule_id", "queue", "cwd"
        )
        self.assertEqual(inherited(self.queue.get("x.1")), inherited(self.queue.get("x")))

    def test_cancel_ends_a_schedule_whether_its_job_is_pending_or_running(self) -> None:
        self.queue.enqueue("true", id="x", every=10)
        self.queue.cancel(["x"])
        self.queue.enqueue("true", id="x", every=20)
        job = self.claim()
        self.queue.cancel(["x"])
        self.assertEqual(self.finish(0, job).state, "completed")  # before the cancel reached it
        self.assertEqual(self.queue._reader.select(queuectl.SCHEDULES), [])
        self.assertEqual(self.ids(), "x.1 x.2")

    def test_schedule_id_is_unique_among_active_schedules_and_jobs(self) -> None:
        self.queue.enqueue("true", id="x", every=10)
        self.assertEqual(self.queue.enqueue("true", id="x", every=9, if_absent=True), "x")
        for fields in ({"every": 10}, {}):
            with self.assertRaisesRegex(queuectl.BadInput, "job x already exists"):
                self.queue.enqueue("true", id="x", **fields)
        self.queue.cancel(["x"])
        self.queue.enqueue("true", id="x", every=10)
        with self.assertRaisesRegex(queuectl.QueueError, "schedule x is active already"):
            self.queue.retry(["x.1"])
        self.queue.cancel(["x"])
        self.assertEqual(self.queue.retry(["x.1"]), ["x.1"])
        self.assertEqual(len(self.queue._reader.select(queuectl.SCHEDULES)), 1)
        self.queue.cancel(["x"])
        self.queue.enqueue("true", id="x")
        with self.assertRaisesRegex(queuectl.QueueError, "its name is taken"):
            self.queue.retry(["x.1"])

    def test_number_is_the_id_of_one_job_or_schedule_only(self) -> None:
        with self.assertRaisesRegex(queuectl.BadInput, "id must not be a number"):
            self.queue.enqueue("true", id="2", every=3600)
        self.assertEqual(self.queue.enqueue("true", id="2"), "2")
        self.assertEqual([self.queue.enqueue("true", every=60) for _ in range(2)], ["3", "4"])
        self.assertEqual([self.queue.enqueue("true") for _ in range(2)], ["5", "6"])
        self.assertEqual(self.queue.enqueue("true", id="8"), "8")
        self.assertEqual(self.queue.enqueue("true", every=60), "9")

    def test_occurrence_ids_skip_the_ids_of_other_schedules(self) -> None:
        self.queue.enqueue("true", id="x.1", every=3600)
        self.queue.enqueue("true", id="x.3", every=3600)
        self.assertEqual(self.queue.enqueue("true", id="x", every=60), "x")
        self.assertEqual(self.queue.get("x").id, "x.2")
        while self.queue.get("x").id == "x.2":
            self.finish(0)
        self.assertEqual(self.queue.get("x").id, "x.4")

    def test_drain_waits_for_the_retry_of_an_occurrence_but_not_for_the_next(self) -> None:
        self.queue.enqueue("true", id="x", every=1000, max_retries=2)
        self.assertTrue(self.queue._reader.drain_blockers())
        for code, retried in ((1, True), (0, False), (75, True), (0, False)):
            self.finish(code)
            self.assertEqual(bool(self.queue._reader.drain_blockers()), retried, code)
            self.now += 2 if retried else 1000

    @internal
    def test_clock_that_was_years_ahead_delays_no_schedule_and_no_retry(self) -> None:
        self.queue.enqueue("true", id="x", every=100)
        self.queue.enqueue("false", id="bad", max_retries=3)
        self.queue.enqueue("true", id="then", run_at=self.now + 2e9)
        pool = make_pool(self, self.queue)
        self.now += 1e9
        claimed = [self.claim(), self.claim()]
        for job in claimed:
            self.finish(int(job.id == "bad"), job)
        self.now -= 1e9
        pool.prune()
        due = {job.id: job.run_after - self.now for job in self.queue.jobs("pending")}
        self.assertEqual(due, {"bad": 2, "x.2": 100, "then": 2e9})
        self.now += 100
        self.assertEqual(self.run_all(), "bad x.2")
        self.now -= 3600  # less than a day: a schedule must not run twice at one time
        pool.prune()
        self.assertEqual(self.seconds_to_next(), 3700)


class QueueRetries(Clocked):
    """Failed attempts, dead jobs, and changes of state."""

    def end_attempt(self, job_id: str, *, end: Any, code: int) -> None:
        """End the attempt of a job, if it has one."""
        error = f"exit code {code}" if code else None
        outcome = Outcome(end, 1.0, self.now, code, error)
        self.queue._ledger.finish(self.queue.get(job_id), outcome)

    @internal
    def test_setting_changed_by_another_process_applies_to_next_claim_and_end(self) -> None:
        """The settings are kept in memory while they are unchanged."""
        list(self.queue.enqueue_many([{"command": "true", "queue": "q"}] * 6))
        ledger = self.queue._ledger
        running = self.claim()
        with Queue(self.path) as other:
            for value in ("7", "8", None):
                for queue in ("", "q"):
                    other.configure("max_retries", value, queue)
                self.assertEqual(ledger.claim("worker-1").settings["max_retries"], int(value or 3))
            other.configure("no_retry_exit_codes", "1")
            self.assertEqual(self.finish(1, running).state, "dead")
            with contextlib.suppress(ZeroDivisionError), self.queue.transaction():
                self.queue.configure("timeout", "5")
                self.assertEqual(ledger.claim("worker-1").settings["timeout"], 5)
                raise ZeroDivisionError  # undoes it
            self.assertEqual(ledger.claim("worker-1").settings["timeout"], 300)

    @internal
    def test_job_changes_state_only_as_the_table_of_moves_allows(self) -> None:
        def claim_job(job_id: str) -> None:
            claim(self.queue, "worker-1", [job_id])

        def cancel(job_id: str) -> None:
            self.queue.cancel([job_id])

        def retry(job_id: str) -> None:
            self.queue.retry([job_id])

        succeed = partial(self.end_attempt, end="exited", code=0)
        fail = partial(self.end_attempt, end="exited", code=1)
        release = partial(self.end_attempt, end="released", code=1)
        end_cancelled = partial(self.end_attempt, end="cancelled", code=1)
        actions = (claim_job, cancel, retry, succeed, fail, release, end_cancelled)
        steps_to = {
            "pending": (),
            "processing": (claim_job,),
            "completed": (claim_job, succeed),
            "dead": (claim_job, fail),
            "cancelled": (cancel,),
        }
        moves = {
            "pending": {"processing", "cancelled"},
            "processing": {"completed", "pending", "dead", "cancelled"},
            "completed": set(),
            "dead": {"pending"},
            "cancelled": {"pending"},
        }
        numbers = itertools.count()
        for state, steps in steps_to.items():
            reached = set()
            for action in actions:
                job_id = f"job-{next(numbers)}"
                self.queue.enqueue("true", id=job_id, queue=job_id, max_retries=1)
                for step in (*steps, action):
                    with contextlib.suppress(queuectl.NotFound):
                        step(job_id)
                reached.add(self.queue.get(job_id).state)
            self.assertEqual(reached - {state}, moves[state], state)

    def test_failing_job_waits_2_then_4_seconds_and_dies_at_the_third_attempt(self) -> None:
        self.queue.enqueue("false", id="bad")
        for attempt, backoff in ((1, 2.0), (2, 4.0)):
            job = self.finish(1)
            self.assertEqual((job.state, job.attempts), ("pending", attempt))
            self.now += backoff - 0.01
            self.assertIsNone(self.claim())
            self.now += 0.02
        self.assertEqual(self.finish(1).state, "dead")
        self.assertEqual(len(self.queue.attempts(self.queue.get("bad"))), 3)

    @internal
    def test_clock_set_back_does_not_delay_the_next_attempt(self) -> None:
        for fate, backoff in (("exited", 2.0), ("crashed", 0.0), ("released", 0.0)):
            with self.subTest(fate):
                self.now = 1000.0
                self.queue.enqueue("false")
                job = self.claim()
                outcome = Outcome(fate, self.now, self.now, 1, "exit code 1")
                self.now = 10.0
                self.assertEqual(self.queue._ledger.finish(job, outcome)[0].updated_at, 10.0)
                self.now += backoff
                self.assertEqual(self.claim().id, job.id)

    def test_retried_job_starts_over_with_no_attempts(self) -> None:
        self.queue.enqueue("false", id="bad", max_retries=1)
        self.finish(1)
        self.assertEqual(self.queue.retry(), ["bad"])
        job = self.queue.get("bad")
        self.assertEqual((job.state, job.attempts, job.run), ("pending", 0, 1))
        self.assertEqual(self.claim().run, 2)

    def test_jitter_spreads_the_retries_of_jobs_that_failed_together(self) -> None:
        self.configure(jitter="0.5")
        list(self.queue.enqueue_many({"command": "false"} for _ in range(9)))
        waits = {self.finish(1).run_after - self.now for _ in range(9)}
        self.assertGreater(len(waits), 5)
        self.assertTrue(1 <= min(waits) < max(waits) <= 2, waits)

    def test_retry_applies_to_all_named_jobs_or_to_none(self) -> None:
        self.queue.enqueue("false", id="dead", max_retries=1)
        self.finish(1)
        self.queue.enqueue("true", id="waiting")
        for other in ("waiting", "nobody"):
            with self.assertRaises(queuectl.NotFound):
                self.queue.retry(["dead", other])
        self.assertEqual(self.queue.get("dead").state, "dead")

    @NEEDS_SHELL
    def test_exit_code_75_retries_after_backoff_without_using_an_attempt(self) -> None:
        self.configure(max_snoozes="3")
        self.queue.enqueue("true", id="x", max_retries=2)
        for snoozes, delay in ((1, 2), (2, 4), (3, 8)):
            job = self.finish(75)
            self.assertEqual((job.state, job.attempts, job.snoozes), ("pending", 0, snoozes))
            self.now += delay - 0.1
            self.assertIsNone(self.claim())
            self.now += 0.1
        job = self.finish(75)
        self.assertEqual((job.state, job.attempts), ("pending", 1))  # above max_snoozes it counts
        self.now += 2
        job = self.finish(75)
        self.assertEqual((job.state, job.last_error), ("dead", "exit code 75 (try later)"))
        self.queue.retry(["x"])
        self.assertEqual(self.finish(75).snoozes, 1)

    @NEEDS_SHELL
    @internal
    def test_crash_after_a_snooze_uses_an_attempt(self) -> None:
        self.queue.enqueue("true", id="x", max_retries=1)
        self.finish(75)
        self.now += 2
        crash = Outcome("crashed", self.now, self.now, None, "its worker died")
        self.assertEqual(self.queue._ledger.finish(self.claim(), crash)[0].state, "dead")

    @NEEDS_SHELL
    @internal
    def test_timeout_uses_an_attempt_even_if_the_job_exits_with_75(self) -> None:
        self.queue.enqueue("true", id="x", max_retries=1)
        timeout = Outcome("timed out", self.now, self.now, 75, "timed out after 1 s")
        job = self.queue._ledger.finish(self.claim(), timeout)[0]
        self.assertEqual((job.state, job.attempts), ("dead", 1))

    @NEEDS_SHELL
    @internal
    def test_no_retry_exit_codes_make_a_job_dead_at_once(self) -> None:
        self.configure(no_retry_exit_codes="2, 126,127")
        for code, state in {2: "dead", 127: "dead", 1: "pending", -2: "pending"}.items():
            self.queue.enqueue("true")
            self.assertEqual(self.finish(code).state, state, code)
        self.queue.enqueue("true")
        timeout = Outcome("timed out", self.now, self.now, 2, "timed out after 1 s")
        self.assertEqual(self.queue._ledger.finish(self.claim(), timeout)[0].state, "pending")
        for value in ("0", "256", "x", "2;3", "-9"):
            self.assertEqual(self.result("config", "set", "no_retry_exit_codes", value)[0], 2)
        self.assertEqual(self.stdout("config", "get", "no_retry_exit_codes"), "2,126,127\n")


class QueueNotifications(Clocked):
    """Jobs that report the end of others: which are added, and what they are given."""

    def end_one(self, how: str, **fields: Any) -> str:
        """Add a job and end it in some way; return its id."""
        job_id = self.queue.enqueue("true", queue="q", max_retries=1, **fields)
        first = {"id": job_id, "priority": 10**7}  # before the notifications
        self.queue._db.execute("UPDATE jobs SET priority = :priority WHERE id = :id", first)
        if how == "cancelled":
            self.queue.cancel([job_id])
            return job_id
        job = self.claim("q")
        self.assertEqual(job.id, job_id)
        outcomes = {
            "completed": Outcome("exited", self.now, self.now, 0, None, 3, b"out"),
            "dead": Outcome("exited", self.now, self.now, 7, "exit code 7", 3, b"out$(x)\xff"),
            "crashed": Outcome("crashed", self.now, self.now, None, "its worker died"),
            "retried": Outcome("released", self.now, self.now, None, "stopped"),
            "cancelled running": Outcome("cancelled", self.now, self.now, -15, "cancelled"),
        }
        if how == "cancelled running":
            self.queue.cancel([job_id])
        self.queue._ledger.finish(job, outcomes[how])
        return job_id

    def notifications(self) -> list[Any]:
        return [job for job in self.queue.jobs("pending") if job.notifies]

    def test_notification_runs_before_every_other_job_of_its_queue(self) -> None:
        self.configure(on_dead="cat")
        self.queue.enqueue("true", queue="q", priority=10**6, run_at=self.now - 99)
        self.end_one("dead")
        self.assertEqual(self.claim("q").event, "dead")

    def given(self, job: Any) -> Any:
        """Return what a notification reads, as parsed JSON."""
        return json.loads(self.queue._reader.stdin(job))

    @internal
    def test_each_end_for_good_adds_the_notifications_that_are_asked_for(self) -> None:
        """Promise 9: a notification is stored with the end that it reports."""
        ends = {
            "dead": ("D", "E"),
            "crashed": ("D", "E"),
            "completed": ("E",),
            "cancelled": ("E",),
            "cancelled running": ("E",),
            "retried": (),
        }
        self.configure(on_end="E", on_dead="D")
        for how, commands in ends.items():
            job_id = self.end_one(how)
            found = self.notifications()
            with self.subTest(how):
                self.assertEqual([job.command for job in found], list(commands))
                event = self.queue.get(job_id).state
                env = {"QUEUECTL_OF": job_id, "QUEUECTL_EVENT": event}
                for job in found:
                    self.assertEqual((job.event, json.loads(job.env)), (event, env))
            self.assertEqual({(j.on_dead, j.on_end) for j in found} - {("", "")}, set())
            self.queue._db.execute("UPDATE jobs SET on_end = 'E' WHERE notifies IS NOT NULL")
            self.queue.cancel([job.id for job in found])
            self.assertEqual(self.notifications(), [])  # one never causes another

    def test_fields_of_a_job_precede_the_settings_and_empty_means_none(self) -> None:
        self.configure(on_dead="D")
        cases = {
            ("dead", "own", ""): ["own"],
            ("dead", "", "e"): ["e"],
            ("dead", None, None): ["D"],
        }
        cases[("completed", "own", None)] = []
        for (how, on_dead, on_end), commands in cases.items():
            fields = {"on_dead": on_dead, "on_end": on_end}
            self.end_one(how, **{k: v for k, v in fields.items() if v is not None})
            found = self.notifications()
            self.assertEqual([job.command for job in found], commands)
            self.queue.cancel([job.id for job in found])
        where = {job.command: job.cwd for job in self.queue.jobs() if job.notifies}
        here = os.getcwd()
        self.assertEqual(where, {"own": here, "e": here, "D": self.dir})

    @internal
    def test_notification_reads_the_job_as_show_prints_it_with_its_last_attempt(self) -> None:
        self.configure(on_dead="D")
        job_id = self.end_one("dead", id="a$(b)", stdin="$(c)", env={"A": "b"})
        (found,) = self.notifications()
        line = self.queue._reader.stdin(found)
        self.assertEqual((line.count(b"\n"), line[-1:]), (1, b"\n"))
        self.assertEqual(self.given(found), self.json_object("show", job_id))
        self.assertEqual(self.given(found)["runs"][-1]["output"], "out$(x)\ufffd")
        self.assertEqual((found.queue, found.max_retries, found.timeout), ("q", 5, 60))
        self.queue.enqueue("true", id="urgent", queue="q", priority=10**6)
        self.assertEqual(self.finish(0, self.claim("q")).id, found.id)
        self.queue.retry([job_id])
        self.queue.cancel(["urgent"])
        job = self.claim("q")
        with mock.patch.object(queuectl.RunDirectory, "notify") as notify:
            self.finish(1, job)
        notify.assert_called_once()  # a worker may be idle
        (again,) = self.notifications()
        self.assertEqual([run["run"] for run in self.given(again)["runs"]], [2])

    @internal
    def test_output_in_a_notification_is_cut_to_its_last_64_kib(self) -> None:
        self.configure(on_end="E", output_limit="1000000")
        self.queue.enqueue("true")
        outcome = Outcome("exited", self.now, self.now, 0, None, 5, b"x" * 70_000 + b"end")
        self.queue._ledger.finish(self.claim(), outcome)
        (run,) = self.given(self.notifications()[0])["runs"]
        self.assertEqual((len(run["output"]), run["output"][-4:]), (65536, "xend"))
        self.assertEqual(run["bytes_dropped"], 5 + 70_003 - 65536)

    @internal
    def test_notifications_beyond_the_limit_are_summed_up_in_one(self) -> None:
        self.configure(on_end="E", on_dead="D", max_notifications="3")
        for how in ("dead", "dead", "completed", "dead", "cancelled"):
            self.end_one(how, id=f"j{len(list(self.queue.jobs()))}")
        ends = [job for job in self.queue.jobs() if not job.notifies]
        found = self.notifications()
        self.assertEqual([j.event for j in found], ["dead"] * 3 + ["summary"] * 2)
        facts = {job.command: self.given(job) for job in found[3:]}
        counts = {"queue": "q", "event": "summary", "completed": 1, "dead": 2, "cancelled": 1}
        ids = {"first": ends[1].id, "last": ends[4].id}
        self.assertEqual(facts["E"], {**counts, "count": 4, **ids})
        self.assertEqual(facts["D"]["count"], 1)
        self.assertEqual(json.loads(found[3].env)["QUEUECTL_OF"], "")
        self.assertEqual(len(self.run_all().split()), 5)
        self.end_one("dead")
        self.assertEqual([job.event for job in self.notifications()], ["dead", "dead"])

    @internal
    def test_many_deaths_leave_a_hundred_notifications_and_one_summary(self) -> None:
        self.configure(on_dead="D", max_retries="1")
        list(self.queue.enqueue_many({"command": "false", "id": f"j{n}"} for n in range(130)))
        jobs = list(iter(self.claim, None))
        cost = self.sqlite_steps(lambda: self.finish(1, jobs[0]))
        for job in jobs[1:-1]:
            self.finish(1, job)
        last = self.sqlite_steps(lambda: self.finish(1, jobs[-1]))
        events = [job.event for job in self.notifications()]
        self.assertEqual((events.count("dead"), events.count("summary")), (100, 1))
        summary = self.given(self.notifications()[-1])
        self.assertEqual((summary["count"], summary["last"]), (30, "j129"))
        self.assertLess(last, cost + 20)

    @internal
    def test_wait_for_everything_ignores_the_death_of_a_notification(self) -> None:
        self.configure(on_end="E", no_retry_exit_codes="9")
        self.end_one("completed")

        def changes(_: object, _timeout: object) -> Iterator[None]:
            yield
            self.assertEqual(self.finish(9).state, "dead")
            yield

        with mock.patch.object(queuectl.Reader, "changes", changes):
            self.assertEqual(self.result("wait", "--all").returncode, 0)

    def test_guest_and_library_notify_in_the_host_s_own_transaction(self) -> None:
        with Queue(self.file("shop.db"), guest=True) as queue:
            for fails in (True, False):
                with contextlib.suppress(ZeroDivisionError), queue.transaction():
                    queue.enqueue("true", id="x", on_end="E")
                    queue.cancel(["x"])
                    1 // (not fails)
                commands = [] if fails else ["true", "E"]
                self.assertEqual([job.command for job in queue.jobs()], commands)

    def test_list_hides_notifications_that_have_completed(self) -> None:
        self.configure(on_end="E")
        self.end_one("completed", id="x")
        self.end_one("completed", id="x2")
        self.finish(0)
        self.now += 1
        self.end_one("completed", id="y", on_end="")
        self.finish(1)
        shown = {"": "x x2 y 4", "--notifications": "x x2 y 2 4", "--limit 0": "x x2 y 4"}
        for options, ids in {**shown, "--limit 2": "y 4", "--state completed": "x x2 y"}.items():
            found = self.run_cli("list", "--limit", "9", *options.split())
            lines = [line.split()[0] for line in found.stdout.splitlines()[1:]]
            self.assertEqual(sorted(lines), sorted(ids.split()), options)
            hint = "queuectl: 2 of 4 jobs shown; --limit 0 shows all\n"
            self.assertEqual(found.stderr, hint if options == "--limit 2" else "")
        self.assertEqual(len(list(self.queue.jobs())), 5)
        self.assertEqual(self.queue.prune(), 4)

    @internal
    def test_unreadable_summary_of_an_edited_row_starts_again(self) -> None:
        self.configure(on_end="E", max_notifications="0")
        self.end_one("completed")
        for text in ("", "\\", "1", "[]", "{}", '{"count": []}'):
            update = "UPDATE jobs SET stdin = ? WHERE notifies IS NOT NULL"
            self.queue._db.execute(update, (text.encode(),))
            self.end_one("completed")
            self.assertEqual(self.given(self.notifications()[0])["count"], 1, text)

    def test_occurrence_of_a_schedule_inherits_stdin_delays_and_hooks(self) -> None:
        fields = {"stdin": "text", "retry_delays": "1,2", "on_end": "E", "on_dead": ""}
        self.queue.enqueue("true", id="x", every=60, **fields)
        self.finish()
        facts = self.json_object("show", "x.2")
        self.assertEqual({key: facts[key] for key in fields}, fields)


@NEEDS_SHELL
class QueueNotificationsLive(Live):
    """Notifications that run."""

    def test_drain_waits_for_notifications_and_no_text_reaches_a_shell(self) -> None:
        self.configure(on_dead='echo "$QUEUECTL_OF $QUEUECTL_EVENT" >> told; cat >> told')
        evil = "a;$(touch${IFS}evil)`touch${IFS}evil`"
        self.enqueue("echo '$(touch evil)'; exit 3", id=evil, max_retries=1, stdin="$(touch evil)")
        output = self.drain(code=1)
        self.assertRegex(output, r"\w notification 2 completed in")
        self.assertRegex(output, r"\d 1 dead in [\d.]+ s\n\Z")
        self.assertEqual(self.json_object("status")["completed"], 0)
        first, line = self.lines("told")
        self.assertEqual(first, f"{evil} dead")
        self.assertEqual(json.loads(line)["runs"][0]["output"], "$(touch evil)\n")
        self.assertFalse(os.path.exists(self.file("evil")))

    def test_receiver_that_is_down_is_retried_and_then_in_the_dead_letter_queue(self) -> None:
        self.configure(
            on_end="echo try >> tries; [ -e go ] || exit 9", backoff_base="1", backoff_max="0"
        )
        self.enqueue("true")
        output = self.drain()  # exit code 0: the job itself completed
        self.assertIn("notification 2 is dead: exit code 9 (try 5)", output)
        self.assertEqual(self.lines("tries"), ["try"] * 5)
        self.assertRegex(self.stdout("dlq", "list"), r"\n2 +dead +5/5 .* exit code 9 .*echo try")
        self.stdout("dlq", "retry", "--all")
        self.configure(on_end="")
        self.write("go")
        self.drain()
        self.assertEqual(self.job("2").state, "completed")


class QueuePause(Clocked):
    """`pause` and `resume`, with a clock that the test moves."""

    def test_bad_name_is_refused_by_the_library(self) -> None:
        for name in ("a b", "x\n", "-q"):
            with self.subTest(name), self.assertRaisesRegex(queuectl.BadInput, "^queue must be"):
                self.queue.pause(name)
        self.assertEqual(self.queue._reader.paused(), [])

    def test_several_queues_can_be_paused_at_once(self) -> None:
        self.stdout("pause", "--queue", "a", "--queue", "b")
        self.assertEqual(self.json_object("status")["paused"], ["a", "b"])
        self.stdout("resume", "--queue", "b", "--queue", "a")
        self.assertEqual(self.json_object("status")["paused"], [])

    def test_one_queue_can_be_paused_while_others_run(self) -> None:
        queue = self.queue
        for name in ("gpu", "cpu"):
            queue.enqueue("true", queue=name, id=name)
        self.result("pause", "--queue", "gpu")
        self.assertIn("paused     gpu\n", self.stdout("status"))
        claimed = [claim(queue, "worker-1"), claim(queue, "worker-2")]
        self.assertEqual([job and job.id for job in claimed], ["cpu", None])
        self.assertEqual(queue._reader.drain_blockers(), {"cpu": False, "gpu": True})
        self.assertEqual(queue._reader.drain_blockers(["cpu"]), {"cpu": False})
        queue.enqueue("true", queue="night", cron="@daily")
        queue.enqueue("true", queue="later", delay=60)
        queue.pause()
        self.assertEqual(queue._reader.drain_blockers(), {"cpu": False, "gpu": True, "later": True})
        self.assertEqual(queue._reader.drain_blockers((), 9), {"cpu": False, "gpu": True})
        queue.resume()
        queue.pause("gpu")
        self.result("resume", "--queue", "gpu")
        self.assertEqual(claim(queue, "worker-2").id, "gpu")
        queue.pause()
        self.assertIn("all queues are still paused", self.result("resume", "--queue", "gpu")[2])


class QueuePauseLive(Live):
    """`pause` and `resume` while workers are running."""

    def test_paused_queue_finishes_running_jobs_and_starts_no_new_ones(self) -> None:
        self.enqueue(f"touch started; {RUN_UNTIL_GO}", id="running")
        self.enqueue("true", id="waiting")
        pool = self.pool("--drain")
        self.wait_for_file("started")
        self.result("pause")
        self.assertIn("paused     all queues\n", self.stdout("status"))
        self.assertEqual(self.json_object("status")["paused"], [""])
        self.write("go")
        self.wait_for_output(pool, "waiting for paused queues: default (queuectl resume)")
        self.assertEqual(self.states(), {"running": "completed", "waiting": "pending"})
        self.result("resume")
        self.assert_exits(pool, 0)
        self.assertEqual(self.job("waiting").state, "completed")


FACTS_OF_QUEUES = """
SELECT queue,
  sum(state = 'pending' AND readiness = 1), sum(state = 'pending' AND readiness = 0),
  sum(state = 'pending' AND readiness = -1), sum(state = 'processing'),
  sum(state = 'processing' AND notifies IS NOT NULL), sum(state = 'completed'),
  sum(state = 'completed' AND notifies IS NOT NULL), sum(state = 'dead'), sum(state = 'cancelled')
FROM jobs GROUP BY queue ORDER BY queue"""
KEPT_FACTS = """
SELECT queue, ready, scheduled, blocked, processing, notifying, completed, delivered, dead,
  cancelled
FROM queues WHERE ready + scheduled + blocked + processing + completed + dead + cancelled > 0
ORDER BY queue"""
NEXT_OF_QUEUES = """
SELECT queue, priority, run_after, seq, notifies IS NOT NULL FROM jobs AS one
WHERE state = 'pending' AND readiness = 1 AND seq = (
  SELECT seq FROM jobs WHERE state = 'pending' AND readiness = 1 AND queue = one.queue
  ORDER BY priority DESC, run_after, seq LIMIT 1) ORDER BY queue"""
KEPT_NEXT = """
SELECT queue, next_priority, next_due, next_seq, next_notifies FROM queues
WHERE next_seq IS NOT NULL ORDER BY queue"""


def assert_counts(case: Case, queue: Queue) -> None:
    """Check that the rows of queues, which triggers keep, agree with the jobs."""
    with queue.transaction():
        for kept, real in ((KEPT_FACTS, FACTS_OF_QUEUES), (KEPT_NEXT, NEXT_OF_QUEUES)):
            case.assertEqual(queue._db.rows(kept), queue._db.rows(real))


class QueueLimit(Clocked):
    """`limit` and `rate`, with a clock that the test moves."""

    def add_notification(self, queue: str) -> str:
        """Add a job as the program adds one that reports an end; return its id."""
        job_id = self.queue.enqueue("true", queue=queue)
        sql = "UPDATE jobs SET notifies = 1, priority = 1000001 WHERE id = ?"
        self.queue._db.execute(sql, (job_id,))
        return job_id

    def test_full_queue_starts_no_job_and_holds_up_no_other(self) -> None:
        self.stdout("config", "set", "limit", "2", "-q", "gpu")
        for number in range(3):
            self.queue.enqueue("true", id=f"gpu{number}", queue="gpu", priority=9)
        self.queue.enqueue("true", id="cpu", queue="cpu")
        jobs = [self.claim() for _ in range(4)]
        self.assertEqual([job and job.id for job in jobs], ["gpu0", "gpu1", "cpu", None])
        self.assertIsNone(self.claim("gpu"))
        self.assertEqual(self.queue._reader.drain_blockers(), {"gpu": False, "cpu": False})
        full = "queue gpu is at its limit of 2"
        with mock.patch.object(queuectl, "unserved", return_value=""):
            self.assertEqual(self.why("gpu2"), full)
        self.assertEqual(self.json_object("status")["held"], {"gpu": full})
        self.assertIn(f"waiting    {full}\n", self.stdout("status"))
        notification = self.add_notification("gpu")
        self.assertEqual(self.claim().id, notification)
        self.finish(1, jobs[1])  # its retry is due later
        self.assertEqual([job and job.id for job in (self.claim(), self.claim())], ["gpu2", None])
        self.now += 2
        self.assertIsNone(self.claim())
        with mock.patch.object(self.queue._db.run_dir, "notify") as notify:
            self.queue.configure("limit", "3", "gpu")
        notify.assert_called_once_with()
        self.assertEqual(self.claim().id, "gpu1")
        self.assertEqual(self.json_object("status")["held"], {})

    def test_limit_of_all_queues_is_that_of_a_queue_without_its_own(self) -> None:
        self.queue.enqueue("true", queue="old")
        self.queue.configure("limit", "1")
        self.queue.configure("limit", "0", "free")
        for name in ("old", "free", "free", "new", "new"):
            self.queue.enqueue("true", queue=name)
        started = [job.queue for job in iter(self.claim, None)]
        self.assertEqual(started, ["old", "free", "free", "new"])
        self.queue.configure("limit", None, "free")
        self.queue.configure("limit", "2")
        self.queue.enqueue("true", queue="free")
        self.assertEqual([job.queue for job in iter(self.claim, None)], ["old", "new"])

    def test_slot_that_its_worker_leaves_wakes_the_pools(self) -> None:
        self.queue.configure("limit", "1", "gpu")
        cases = {  # queues the worker claims from next: pools are woken
            None: True,  # it stops
            ("cpu",): True,
            ("gpu",): False,
        }
        for served, woken in cases.items():
            for name in ("gpu", "gpu", "cpu"):
                self.queue.enqueue("true", queue=name)
            job = self.claim("gpu")
            with mock.patch.object(self.queue._db.run_dir, "notify") as notify:
                outcome = Outcome("exited", self.now, self.now, 0, None)
                self.queue._ledger.finish(job, outcome, served)
            with self.subTest(served):
                self.assertEqual(notify.called, woken)
            for running in self.queue._reader.claimed():
                self.finish(0, running)
            self.run_all()

    @internal
    def test_rows_of_queues_agree_with_the_jobs_after_any_changes(self) -> None:
        random = __import__("random").Random(1)
        queue = self.queue
        changes: list[Callable[[Any], object]] = [
            lambda job: queue.cancel([job.id]),
            lambda job: queue.retry([job.id]),
            lambda job: queue.purge([job.id]),
            lambda job: self.add_notification(job.queue),
            lambda job: queue._db.execute("DELETE FROM jobs WHERE seq = ?", (job.seq,)),
            *(
                partial(lambda sql, job: queue._db.execute(sql, (job.seq,)), sql)
                for sql in (
                    "UPDATE jobs SET queue = 'q' || (seq % 5) WHERE seq = ?",
                    "UPDATE jobs SET priority = 3, run_after = 5 WHERE seq = ?",
                )
            ),
        ]
        for number in range(150):
            fields: dict[str, Any] = {"queue": f"q{number % 3}", "priority": random.randrange(3)}
            fields.update(random.choice([{}, {}, {"delay": 9}, {"after": ["1"] if number else []}]))
            queue.enqueue("true", **fields)
            if random.random() < 0.7 and (job := self.claim()):
                self.finish(random.choice([0, 0, 1, 75]), job)
            self.claim()
            with contextlib.suppress(queuectl.NotFound):
                random.choice(changes)(random.choice(list(queue.jobs())))
            self.now += 1
            assert_counts(self, queue)

    def starts(self, seconds: float, step: float) -> list[float]:
        """Claim whatever can be claimed, every step; return the times."""
        began = self.now
        found = []
        for number in range(round(seconds / step)):
            self.now = began + number * step
            found += [self.now for _ in iter(self.claim, None)]
        return found

    def test_rate_holds_within_one_in_every_window(self) -> None:
        list(self.queue.enqueue_many({"command": "true", "queue": "api"} for _ in range(900)))
        for rate, seconds, number, step in (
            ("10/1m", 60, 10, 0.07),
            ("3/m", 60, 3, 0.9),
            ("50/1s", 1, 50, 0.003),
            ("7/10", 10, 7, 0.031),
        ):
            self.queue.configure("rate", rate, "api")
            self.now += 1000
            self.assertLessEqual(len(self.starts(0.01, 0.003)), 2)  # no burst after a long time
            self.now += seconds / number
            times = self.starts(3.2 * seconds, step)
            for begin in times[: len(times) // 2]:
                in_window = [when for when in times if begin <= when < begin + seconds]
                with self.subTest(rate, begin=begin):
                    self.assertLessEqual(abs(len(in_window) - number), 1)

    def test_queue_at_its_rate_opens_by_itself(self) -> None:
        self.stdout("config", "set", "rate", "10/1m", "--queue", "api")
        for number in range(6):
            self.queue.enqueue("true", id=f"api{number}", queue="api", priority=9)
        self.queue.enqueue("true", id="cpu", queue="cpu")
        self.assertEqual([self.claim().id, self.claim().id, self.claim()], ["api0", "cpu", None])
        self.assertEqual(self.claim(), None)
        reason = "queue api is at its rate of 10/1m; next in 6 s"
        with mock.patch.object(queuectl, "unserved", return_value=""):
            self.assertEqual(self.why("api1"), reason)
        text = "\n".join(queuectl.status_text(self.queue._reader))
        self.assertIn(f"waiting    {reason}", text)
        self.assertEqual(self.queue._reader.drain_blockers()["api"], False)
        for served in ((), ("api",), ("api", "cpu")):
            next_time = self.queue._reader.next_ready_time(served)
            self.assertAlmostEqual(next_time - self.now, 5.9)
        self.assertIsNone(self.queue._reader.next_ready_time(("cpu",)))
        self.assertEqual(self.claim("api"), None)
        self.assertEqual(self.claim(self.add_notification("api") and "api").attempts, 1)
        self.assertEqual(self.claim("api"), None)  # a notification neither needs nor takes a token
        self.queue.close()
        self.now += 5.9
        self.assertEqual([self.claim().id, self.claim()], ["api1", None])
        self.now -= 3600  # the clock is set back: no longer than usual
        self.assertEqual([self.claim().id, self.claim()], ["api2", None])
        self.now += 6
        self.assertEqual(self.claim().id, "api3")
        self.queue.configure("rate", None, "api")
        self.assertEqual(self.run_all(), "api4 api5")

    def test_change_of_a_setting_lets_no_job_start_before_the_rate_allows_it(self) -> None:
        self.queue.configure("rate", "1/10s")
        for name in ("own", "all"):
            self.queue.configure("limit", "9", name)
            list(self.queue.enqueue_many([{"command": "true", "queue": name}] * 4))
        self.queue.configure("rate", "1/1m", "own")
        self.assertEqual([self.claim().queue, self.claim().queue], ["own", "all"])
        for key, value, queue, seconds, started in (
            ("limit", "8", "own", 1, None),
            ("rate", "1/1m", "own", 1, None),
            ("rate", "1/5s", "", 2, None),
            ("rate", "1/5s", "", 1, "all"),  # in all, 5 s
            ("limit", "7", "", 1, None),
            ("rate", None, "own", 0, "own"),
            ("rate", None, "", 0, "own"),
        ):
            self.queue.configure(key, value, queue)
            self.now += seconds
            job = self.claim()
            self.assertEqual(job and job.queue, started, (key, value, queue))
            self.assertEqual(self.claim() is None, value is not None or queue == "own")

    @internal
    def test_pool_looks_again_when_a_worker_is_idle_and_when_the_clock_is_set_back(self) -> None:
        pool = make_pool(self, self.queue)
        pool.poll()
        pool.crew.maybe_work = False
        pool.poll()
        self.assertFalse(pool.crew.maybe_work)
        self.now -= 3600
        pool.poll()
        self.assertTrue(pool.crew.maybe_work)
        ours, theirs = multiprocessing.Pipe()
        self.addCleanup(theirs.close)
        self.addCleanup(ours.close)
        queuectl.Channel(theirs).write(queuectl.News("idle"))
        pool.receive(queuectl.WorkerHandle("worker-1", 1, None, ours))
        self.assertEqual(pool.agenda.pause(), 0.0)


@NEEDS_SHELL
class QueueLimitLive(Live):
    """`limit` and `rate` while workers are running."""

    SLOT = "exec 9>>a; flock -n 9 || { exec 9>>b; flock -n 9 || echo three >> three; }; "

    def run_with_kills(self, number: int, pause: float, taking: float) -> None:
        """Run jobs of a queue of limit 2 by 8 workers of 2 pools; kill a busy one every pause."""
        self.configure(max_retries="1000", limit="2")
        command = f"{self.SLOT} sleep {taking}; echo $QUEUECTL_JOB_ID >> done"
        jobs = [{"command": command, "cwd": self.dir} for _ in range(number)]
        with Queue(self.path) as queue:
            ids = set(queue.enqueue_many(jobs))
            pools: list[Any] = []
            while queue.counts()["completed"] < number:
                pools = [pool for pool in pools if pool.poll() is None]  # one may see too many die
                pools += [self.pool("--count", "4", "--quiet") for _ in range(2 - len(pools))]
                time.sleep(pause)
                workers = self.workers()
                for job in queue._reader.claimed()[:1]:
                    with contextlib.suppress(ProcessLookupError, KeyError):
                        os.kill(workers[job.locked_by]["pid"], signal.SIGKILL)
            assert_counts(self, queue)
        self.assertEqual(self.read("three"), "")
        self.assertEqual(len(ids - set(self.lines("done"))), 0)

    def test_limit_is_never_exceeded_while_workers_are_killed(self) -> None:
        self.run_with_kills(8, 0.1, 0.04)

    @SLOW
    def test_limit_is_never_exceeded_in_a_long_run_while_workers_are_killed(self) -> None:
        self.run_with_kills(5000, 0.2, 0.003)

    @SLOW
    def test_free_slot_and_a_higher_limit_wake_an_idle_worker_of_another_pool(self) -> None:
        self.configure(limit="1")
        for number in range(3):
            self.enqueue(f"touch started{number}; until [ -e go{number} ]; do sleep 0.02; done")
        one = self.pool()
        self.wait_for_file("started0")
        two = self.pool("--count", "2")
        self.wait_for_workers(3)
        one.send_signal(signal.SIGTERM)  # its worker will claim no more
        acts = {
            "started1": partial(self.write, "go0"),
            "started2": partial(self.configure, limit="2"),
        }
        for started, act in acts.items():
            self.wait_for_poll(two)
            began = time.monotonic()
            act()
            self.wait_for_file(started)
            self.assertLess(time.monotonic() - began, 0.4)  # sooner than a poll
        for number in (1, 2):
            self.write(f"go{number}")

    def test_pool_sleeps_until_the_next_token_and_drains(self) -> None:
        self.configure(rate="10/1s")
        for _ in range(8):
            self.enqueue("true")
        self.drain("--count", "2")
        starts = sorted(self.attempts(str(number))[0].started for number in range(1, 9))
        gaps = [b - a for a, b in zip(starts, starts[1:])]
        self.assertGreater(starts[-1] - starts[0], 0.7 - 0.15)  # the first may start late
        self.assertLess(sorted(gaps)[len(gaps) // 2], 0.14)


@NEEDS_SHELL
class QueueTogetherLive(Live):
    """Limits, rates, edits, selections, dependencies and notifications at the same time."""

    COMMANDS = (  # each is killed at some moment, or not
        "edit --queue gpu --match true --to-queue api --priority {0}",
        "edit --queue api --match sleep --to-queue gpu",
        "edit --state scheduled --delay 0 --command true",
        "edit --state ready --match exit --after-end first --retry-delays 0,0.{0}",
        "cancel --match {0}7 --cascade",
        "cancel --state blocked --match {0}1",
        "dlq retry --all",
        "dlq retry --state cancelled --match {0}",
        "dlq purge --state cancelled --match {0}{0}",
        "prune --older-than 2s --match {0}3",
        "pause --queue gpu",
        "resume",
        "config set limit 1 --queue gpu",
        "config set limit 2 --queue gpu",
        "config set rate 4{0}/1s --queue api",
    )

    def add_jobs(self, queue: Queue, random: Any, number: int) -> list[str]:
        here = {"cwd": self.dir, "stdin": "text"}
        queue.enqueue("true", id="first", **here)
        lines = (f"{QueueLimitLive.SLOT} sleep 0.02", "exit 3", "true", "cat >> in")
        jobs: list[dict[str, Any]] = []
        for _ in range(number):
            name = random.choice(("gpu", "api", "other"))
            line = lines[0] if name == "gpu" else random.choice(lines[1:])
            jobs.append({"command": line, "queue": name, **here})
            jobs[-1].update(random.choice(({}, {"delay": 0.5}, {"after_end": "first"})))
        jobs += [{"command": "kill -9 $PPID", "cwd": self.dir, "priority": 5}] * 3
        return list(queue.enqueue_many(jobs))

    def told(self) -> set[Any]:
        """Return the jobs of which a notification told, each with the state it ended in."""
        return {(job["id"], job["state"]) for job in map(json.loads, self.lines("told"))}

    def run_all(self, seed: int, number: int, seconds: float) -> None:
        """Do everything at once and kill everything at some time; then see that all is right."""
        random = __import__("random").Random(seed)
        self.configure(
            on_end="cat >> told",
            limit="0",
            max_retries="3",
            jitter="0.5",
            backoff_base="1",
            backoff_max="0.05",
            max_notifications="100000",
        )
        with Queue(self.path) as queue:
            queue.configure("limit", "2", "gpu")
            queue.configure("rate", "40/1s", "api")
            self.add_jobs(queue, random, number)
            began = time.monotonic()
            while time.monotonic() < began + seconds:
                self.processes = [one for one in self.processes if one.poll() is None]
                pools = [one for one in self.processes if "start" in one.args]
                for _ in range(2 - len(pools)):
                    self.pool("--count", "3", "--quiet", stdout=subprocess.DEVNULL)
                words = random.choice(self.COMMANDS).format(random.randrange(10)).split()
                one = self.start(*words, stdout=subprocess.DEVNULL)
                time.sleep(random.uniform(0.0, 0.4))
                victims = [self.kill_workers, one.kill, pools[0].kill if pools else one.kill]
                random.choice((*victims, self.kill_ours))()
                assert_counts(self, queue)
            self.kill_ours()
            for words in (
                "resume",
                "config unset rate --queue api",
                "config set limit 2 --queue gpu",
            ):
                self.stdout(*words.split())
            self.result("worker", "start", "--drain", "--count", "4", real=True, timeout=60)
            assert_counts(self, queue)
            ended = {(job.id, job.state) for job in queue.jobs() if not job.notifies}
            self.assertEqual({state for _, state in ended} - set(queuectl.FINISHED), set())
            self.assertEqual(ended - self.told(), set())
        self.assertEqual(self.read("three"), "")
        self.assert_sound()

    @SLOW
    def test_nothing_is_lost_when_all_features_meet_and_everything_is_killed(self) -> None:
        """Promise 9: each end is reported at least once; limits hold, and counts are right."""
        seed = time.time_ns() % 1000
        with self.subTest(seed):
            self.run_all(seed, 300, 12)


class QueueWait(Live):
    """Waiting for jobs, through the command and the library."""

    def wait_while(
        self, ids: str, meanwhile: Callable[[Queue, Terminal], Any]
    ) -> tuple[int, list[str]]:
        """Do something during `wait`; return its exit code, and the states from Queue.wait."""
        self.unfinished: list[str] = []
        is_over = queuectl.JobWatch.is_over

        def look(watch: queuectl.JobWatch) -> Any:
            over = is_over(watch)
            self.unfinished = [watch.seen[seq].id for seq in watch.unfinished]
            return over

        def wait() -> list[str]:
            with queue:
                return [job.state for job in queue.wait(ids.split(), 10)]

        command = Terminal(self, "wait", *ids.split())
        command.wait_for("/|no job can run yet")
        looking = mock.patch.object(queuectl.JobWatch, "is_over", look)
        with looking, Queue(self.path) as queue, futures.ThreadPoolExecutor() as thread:
            waiting = thread.submit(wait)
            wait_until(lambda: self.unfinished)
            meanwhile(queue, command)
            command.end()
            return command.process.returncode, waiting.result(10)

    def finish(self, queue: Queue, job_id: str, code: int = 0) -> None:
        outcome = Outcome("exited", 1.0, 2.0, code, queuectl.explain_exit(code))
        job = claim(queue)
        self.assertEqual(job.id, job_id)
        queue._ledger.finish(job, outcome)

    @internal
    def test_job_that_is_pruned_meanwhile_has_completed(self) -> None:
        def complete(queue: Queue, _: Terminal) -> None:
            self.finish(queue, "a")
            queue.prune()
            self.finish(queue, "b")

        for name in "ab":
            self.enqueue("true", id=name)
        self.assertEqual(self.wait_while("a b", complete), (0, ["completed"] * 2))

    @SLOW
    @internal
    def test_job_that_was_seen_dead_stays_dead_when_it_is_purged(self) -> None:
        def die_and_purge(queue: Queue, command: Terminal) -> None:
            self.finish(queue, "a", 7)
            command.wait_for("1/2 jobs")
            wait_until(lambda: self.unfinished == ["b"])
            queue.purge(["a"])
            self.finish(queue, "b")

        for name in "ab":
            self.enqueue("true", id=name, max_retries=1)
        found = self.wait_while("a b", die_and_purge)
        self.assertEqual(found, (7, ["dead", "completed"]))

    @internal
    def test_job_that_can_no_longer_run_is_not_waited_for(self) -> None:
        for name, parent in zip("abc", ([], ["a"], ["b"])):
            self.enqueue("true", id=name, after=parent, max_retries=1)
        code, states = self.wait_while("c", lambda queue, _: self.finish(queue, "a", 1))
        self.assertEqual((code, states), (1, ["pending"]))

    def test_library_times_out(self) -> None:
        self.enqueue("true")
        error = "job 1 did not end within 0.1 s"
        with Queue(self.path) as queue, self.assertRaisesRegex(queuectl.TimedOut, error):
            queue.wait("1", 0.1)

    @internal
    def test_wait_for_many_jobs_reads_few_of_them_by_themselves(self) -> None:
        with Queue(self.path) as queue:
            ids = list(queue.enqueue_many({"command": "true"} for _ in range(300)))
            watch = queuectl.JobWatch(queue._reader, queue._reader.named(ids))
            by_seq = mock.Mock(side_effect=queue._reader.by_seq)
            with mock.patch.object(queue._reader, "by_seq", by_seq):
                self.assertFalse(watch.is_over())
                for again in (0.0, float("inf")):  # when all may be compared, and when not yet
                    by_seq.reset_mock()
                    with Queue(self.path) as worker:
                        for _ in range(100):
                            worker._ledger.finish(
                                claim(worker), Outcome("exited", 1.0, 2.0, 0, None)
                            )
                    watch.refresh_at = again
                    self.assertFalse(watch.is_over())
                    self.assertLessEqual(by_seq.call_count, 102)
                    watch.refresh_at = again
                    by_seq.reset_mock()
                    self.assertFalse(watch.is_over())
                    self.assertLessEqual(by_seq.call_count, 1)
            states = [job.state for job in watch.jobs()]
            self.assertEqual(states.count("completed"), 200)

    @internal
    def test_idle_wait_reads_little_and_a_change_is_noticed_at_once(self) -> None:
        """Promise 8."""
        with Queue(self.path) as queue, Queue(self.path, readonly=True) as other:
            reader = other._reader
            queue.enqueue("true")
            version = mock.Mock(side_effect=reader.data_version)
            look = mock.Mock(side_effect=other._db.wal_times)
            patched = mock.patch.object(reader, "data_version", version)
            with patched, mock.patch.object(other._db, "wal_times", look):
                self.assertLessEqual(len(list(reader.changes(0.7))), 3)
                self.assertLessEqual(version.call_count, 12)
                self.assertLessEqual(look.call_count, 40)
            changes = reader.changes(10)
            next(changes)
            for _ in range(3):  # writes within one tick of the clock of the file system
                version.reset_mock()
                queue.enqueue("true")
                began = time.monotonic()
                next(changes)
                self.assertLess(time.monotonic() - began, 0.3)

    @SLOW
    def test_queue_that_is_moved_or_removed_is_not_waited_for(self) -> None:
        """Promise 4."""
        for act in (shutil.rmtree, lambda path: os.rename(path, path + "-moved")):
            self.use_queue("place")
            self.enqueue("true")
            waits = [Terminal(self, "wait", words) for words in ("1", "--all")]
            for wait in waits:
                wait.wait_for("/1 jobs")
            act(self.file("place"))
            for wait in waits:
                self.assertIn("queuectl.db was moved away or replaced", wait.end())
                self.assertEqual(wait.process.returncode, 4)


class QueuePrune(Clocked):
    """Deleting jobs that have ended."""

    def add_finished(self, job_id: str, code: int = 0) -> None:
        """Add a job that finishes at once with an exit code."""
        self.queue.enqueue("true", id=job_id, max_retries=1)
        self.finish(code)

    @internal
    def test_finished_jobs_are_pruned_by_the_age_of_their_end(self) -> None:
        self.add_finished("old")
        self.add_finished("dead", 1)
        for job_id in ("cancelled", "slow", "waiting"):
            self.queue.enqueue("true", id=job_id)
        self.queue.cancel(["cancelled"])
        self.now += 86400
        job = claim(self.queue, "worker-1")
        self.queue._ledger.finish(job, Outcome("exited", 1e6, self.now, 0, None))
        self.assertEqual(job.id, "slow")
        self.assertEqual(self.queue.prune(86401), 0)
        self.assertEqual(self.queue.prune(86400), 2)
        self.assertEqual(self.ids(), "dead slow waiting")
        for states in (["pending"], ["processing", "dead"]):
            with self.subTest(states), self.assertRaises(queuectl.BadInput):
                self.queue.prune(0, states)
        self.assertEqual(self.queue.prune(0, ["dead"]), 1)
        self.assertEqual(self.queue.prune(), 1)
        self.assertEqual(self.ids(), "waiting")
        self.assertEqual(self.queue._db.execute("SELECT count(*) FROM attempts").fetchone(), (0,))
        self.assertEqual(sum(self.queue.counts().values()), 1)

    @internal
    def test_totals_of_all_attempts_survive_prune(self) -> None:
        for started, code in ((1e6 + 3, 0), (1e6 + 3, 0), (1e6 + 5, 1)):
            self.queue.enqueue("true", queue="gpu", max_retries=1)
            error = queuectl.explain_exit(code)
            job = claim(self.queue, "worker-1")._replace(waited=0.5)
            outcome = Outcome("exited", started, 1e6 + 10, code, error)
            self.queue._ledger.finish(job, outcome)
        totals = [
            ("gpu", "completed", 2, 14.0, 1.0, 1000010.0),
            ("gpu", "failed", 1, 5.0, 0.5, 1000010.0),
        ]
        self.assertEqual(self.queue._db.rows("SELECT * FROM totals"), totals)
        self.assertEqual(self.queue.prune(0, ["completed", "dead"]), 3)
        self.assertEqual(self.queue._db.rows("SELECT * FROM totals"), totals)

    def test_parents_of_blocked_jobs_are_neither_pruned_nor_purged(self) -> None:
        self.add_finished("dead", 1)
        self.queue.enqueue("true", id="cancelled")
        self.queue.cancel(["cancelled"])
        self.queue.enqueue("true", id="child", after=["dead", "cancelled"])
        self.assertEqual(self.queue.prune(), 0)
        self.assertEqual(self.queue.prune(0, ["dead"]), 0)
        self.assertEqual(self.result("dlq", "purge", "dead")[0], 1)
        self.queue.cancel(["child"])
        pruned = (0, "", "queuectl: 2 jobs pruned\n")
        self.assertEqual(self.result("prune", "--state", "cancelled"), pruned)
        self.assertEqual(self.result("dlq", "purge", "dead"), (0, "", "queuectl: 1 job purged\n"))

    @internal
    def test_cancelled_child_keeps_no_parent_from_being_pruned_or_purged(self) -> None:
        size = 2 * queuectl.SLICE
        enqueue_graph(self.queue, "x0", *(f"x{n} x{n - 1}" for n in range(1, size)))
        self.queue.cancel(["x0"], cascade=True)
        self.assertEqual(self.queue._ledger.delete_slice("cancelled", self.now), queuectl.SLICE)
        self.assertEqual(self.queue.prune(), size - queuectl.SLICE)
        self.add_finished("bad", 1)
        enqueue_graph(self.queue, "child bad")
        line = self.assert_refused("dlq", "purge", "bad", code=1)
        self.assertIn("job child waits for bad; cancel that first", line)
        self.queue.cancel(["child"])
        self.assertIn("1 job purged", self.run_cli("dlq", "purge", "bad").stderr)

    def test_dead_jobs_are_purged_by_id_or_by_age(self) -> None:
        for job_id in ("a", "b", "c"):
            self.add_finished(job_id, 1)
        self.add_finished("good")
        self.assert_refused("dlq", "purge")
        self.assert_refused("dlq", "purge", "a", "good", code=1)
        self.assertEqual(self.ids(), "a b c good")
        self.assertIn("1 job purged", self.run_cli("dlq", "purge", "a").stderr)
        self.assert_refused("dlq", "purge", "--older-than", "5000w")
        purged = (0, "", "queuectl: 2 jobs purged\n")
        self.assertEqual(self.result("dlq", "purge", "--older-than", "500w"), purged)
        self.assertEqual(self.ids(), "good")

    @NEEDS_SHELL
    def test_pool_prunes_jobs_older_than_the_retention(self) -> None:
        self.add_finished("old")
        self.add_finished("dead", 1)
        self.queue.enqueue("true", id="cancelled")
        self.queue.cancel(["cancelled"])
        self.now = time.time()
        self.add_finished("new")
        self.result("config", "set", "retention", "30d")
        self.pool()
        wait_until(lambda: self.ids() == "dead new")

    @NEEDS_SHELL
    def test_job_and_its_child_can_be_purged_in_either_order(self) -> None:
        for order in (["a", "b"], ["b", "a"]):
            self.queue.enqueue("true", id="a")
            self.queue.enqueue("true", id="b", after="a")
            self.queue.cancel(["a", "b"])
            self.assertEqual(self.queue.purge(order), 2)


# --- attempt --------------------------------------------------------------------------------------


class AttemptLaunch(Live):
    """What a job is given when it starts, and why it may not start."""

    def test_job_runs_in_its_directory_with_its_environment(self) -> None:
        os.mkdir(self.file("there"))
        command = "pwd; echo $A $QUEUECTL_JOB_ID $QUEUECTL_ATTEMPT"
        job = json.dumps({"command": command, "env": {"A": "b"}})
        self.stdout("--db", "../queuectl.db", "enqueue", job, cwd=self.file("there"))
        self.drain()
        self.assertEqual(self.stdout("logs", "1"), self.file("there") + "\nb 1 1\n")

    def test_job_is_given_a_database_path_that_is_not_unicode(self) -> None:
        os.mkdir(os.fsencode(self.dir) + b"/\xff")
        self.path = os.fsdecode(os.fsencode(self.dir) + b"/\xff/q.db")
        os.environ["QUEUECTL_DB"] = self.path
        job_id = self.enqueue('echo "$QUEUECTL_DB" > db')
        self.drain()
        self.assertEqual(self.job(job_id).state, "completed")
        with open(self.file("db"), "rb") as file:
            self.assertTrue(file.read().endswith(b"/\xff/q.db\n"))

    def test_job_that_cannot_start_fails_its_attempt_with_the_reason(self) -> None:
        self.configure(shell="/no/such/shell -c", max_retries="1")
        self.enqueue("true", id="cwd", cwd="/nowhere/at/all")
        self.enqueue("true", id="shell", cwd=self.dir)
        self.drain(code=1)
        reason = "cannot start: No such file or directory: "
        errors = {"cwd": reason + "/nowhere/at/all", "shell": reason + "/no/such/shell"}
        self.assert_table(errors, lambda job_id: self.job(job_id).last_error)

    def test_shell_is_a_setting(self) -> None:
        self.configure(shell=f"{sys.executable} -c")
        self.enqueue("print(6 * 7)")
        self.drain()
        self.assertEqual(self.stdout("logs", "1"), "42\n")

    def test_each_attempt_reads_the_whole_stdin_from_a_file_of_its_own(self) -> None:
        text = "é$(x)\0\n" * 100_000  # more than a pipe holds
        self.enqueue("head -c 9; cksum; exit 1", stdin=text, retry_delays="0", max_retries=2)
        self.enqueue("sleep 0; : | cat", stdin=text)  # never read
        self.enqueue("cksum", id="none")
        self.drain(code=1)
        data = text.encode()
        rest = self.process("cksum", input=data[9:], text=False).stdout
        outputs = [attempt.output for attempt in self.attempts("1")]
        self.assertEqual(outputs, [data[:9] + rest] * 2)
        self.assertEqual(self.job("2").state, "completed")
        self.assertEqual(self.attempts("none")[0].output[:13], b"4294967295 0\n")
        self.assertEqual(os.listdir(self.path + ".run"), [])

    def test_disk_too_full_for_stdin_costs_no_attempt(self) -> None:
        with Queue(self.path) as queue:
            queue.enqueue("cat", stdin="x")
            claim = queue._ledger.claim("worker-1-1")
            execution = queuectl.Execution(claim, queue._ledger, mock.Mock(), lambda _: None)
            full = mock.patch(
                "queuectl.open", side_effect=OSError(28, "No space left"), create=True
            )
            with full:
                self.assertIsNone(execution.launch({}))
            self.assertEqual(execution.outcome.end, "unstarted")

    def test_child_reads_the_result_of_its_parent(self) -> None:
        program = shlex.join([*PYTHON, self.PROGRAM])
        self.enqueue("echo result; exit 3", id="a", max_retries=1)
        self.enqueue(f'{program} logs "$QUEUECTL_PARENTS"', id="b", after_end="a")
        self.enqueue(f'{program} logs "$QUEUECTL_PARENTS"', id="two", after_end=["a", "b"])
        os.environ["QUEUECTL_PARENTS"] = "of an outer job"
        self.enqueue('echo "<$QUEUECTL_PARENTS>"', id="c")
        many = [f"{number:0200}" for number in range(200)]
        with Queue(self.path) as queue:
            list(queue.enqueue_many({"command": "true", "id": name} for name in many))
            queue.cancel(many)
        self.enqueue('echo "<$QUEUECTL_PARENTS>"', id="d", after_end=many)
        self.drain(code=1)
        self.assertEqual(self.stdout("logs", "d"), "<>\n")
        self.assertEqual(self.stdout("logs", "b"), "result\n")
        self.assertEqual(self.stdout("logs", "two").count("\nresult\n"), 2)
        self.assertEqual(self.stdout("logs", "c"), "<>\n")

    STARTS = {
        "plain": (),
        "blocking": (),
        "background": ("sh", "-c", '"$@" & wait $!', "sh"),
        "nohup": ("nohup",),
        "closed": CLOSED_STREAMS,
        "ignoring": ("sh", "-c", "trap '' INT TERM QUIT PIPE; \"$@\"", "sh"),
    }

    PRINT_FDS = "readlink /proc/$$/fd/*; :"  # except the one that the glob itself needed

    def expected_fds(self) -> str:
        """Return the expected output of PRINT_FDS in the first job."""
        return "/dev/null\n" + f"{self.path}.run/1.1.out\n" * 3

    @SLOW
    def test_signals_and_streams_of_a_job_do_not_depend_on_how_its_pool_started(self) -> None:
        blocked = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
        block = lambda: signal.pthread_sigmask(signal.SIG_BLOCK, blocked)  # noqa: E731
        pools = {}
        for name, prefix in self.STARTS.items():
            self.use_queue(name)
            self.enqueue(self.PRINT_FDS)
            # exec, because a shell that forks unblocks signals
            self.enqueue("exec grep -E '^Sig(Ign|Blk):' /proc/self/status")
            pools[name] = self.pool(
                "--drain",
                prefix=prefix,
                stdout=subprocess.DEVNULL,
                preexec_fn=block if name == "blocking" else None,
            )
        for name, pool in pools.items():
            with self.subTest(name):
                self.assertEqual(pool.wait(20), 0)
                self.use_queue(name)
                self.assertEqual(self.attempts("1")[0].output.decode(), self.expected_fds())
                lines = self.attempts("2")[0].output.decode().splitlines()
                masks = dict(line.split(":\t") for line in lines)
                self.assertEqual(int(masks["SigBlk"], 16), 0)
                ignored = int(masks["SigIgn"], 16)
                for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE, signal.SIGTERM):
                    self.assertFalse(ignored >> (number - 1) & 1, number.name)

    def test_job_inherits_no_descriptors_except_its_output(self) -> None:
        job = self.enqueue(self.PRINT_FDS)
        ends = os.pipe()
        for end in ends:
            os.set_inheritable(end, True)
            self.addCleanup(os.close, end)
        self.drain("--count", "3", pass_fds=ends)
        self.assertEqual(self.attempts(job)[0].output.decode(), self.expected_fds())


class AttemptWithoutShell(Live):
    """A plain command is started without a shell, and only the time that it takes shows it."""

    FILES = {  # mode and text; a mode of 0 makes a directory
        "run": (0o755, '#!/bin/sh\nprintf \'<%s>\' "$0" "$@"\n'),
        "bin/tool": (0o755, '#!/bin/sh\nprintf \'<%s>\' "$0" "$@"\n'),
        "tool": (0o755, "#!/bin/sh\necho here\n"),
        "odd%func/tool": (0o755, "#!/bin/sh\necho odd\n"),
        "bin/-tool": (0o755, '#!/bin/sh\nprintf \'<%s>\' "$0" "$@"\n'),
        "bin/bare": (0o755, "printf '<%s>' bare \"$@\"; exit 5\n"),  # without #!
        "text/tool": (0o644, "not a program\n"),
        "folder/tool": (0, ""),
        "lost": (0o755, "#!/no/such/interpreter\n"),
        "empty": (0o755, ""),
        "binary": (0o755, "\x7fELF\0\0\0"),
    }
    CHARACTERS = [c for c in map(chr, range(33, 128)) if not c.isalnum()]
    CHARACTERS += "\1\a\b\t\n\v\f\r\33 \x80\x81\x88\xa0\xff\u2003\u3000\ufeff\U0001f600"
    SHAPES = ("./run x{}y {}", "{}", "./run {}", "{} ./run")
    COMMANDS = (
        *("./run", " \t./run\ta  b ", "./run ''", "./run '' a\"\"b ''", "./run 'a b'\"c  d\"e"),
        *(
            "./run ~",
            "./run a=~",
            "./run *",
            "./run r?n",
            "./run [r]un",
            "./run {a,b}",
            "./run $HOME",
        ),
        *("./run a # b", "./run a#b", "./run a=b", "./run -- -x", "./run 'it'\"'\"'s'", "./run !"),
        *(
            "./run 'a\nb'",
            "./run 'a\\b'",
            '"./run" "a\\b"',
            "./run 2>&1",
            "./run >out",
            "''",
            "'' a",
        ),
        *(
            "A=b ./run",
            "a=b",
            "'A=b' ./run",
            "%1",
            "%tool",
            "-tool",
            "--",
            "./run;./run",
            "./run &",
        ),
        *("'./run' a", "bin/tool a", "../{}/bin/tool", "./lost", "./empty", "./binary", "./folder"),
        *(
            "./text/tool",
            "./bin/bare a 'b c'",
            "./nowhere",
            "nowhere",
            "tool/",
            "/",
            "'",
            '"',
            "\\",
        ),
        *("sh -c 'echo $0 $PWD; exit 3'", "env -u PWD", "/bin/cat", "ls -d ."),
    )
    PATHS = (  # in DIR stands for the directory of the job
        *("DIR/bin", "/nowhere:DIR/text:DIR/folder:DIR/bin", "bin", ":/bin", "/bin:", "", "."),
        *("DIR/text:/bin", "DIR/folder", "DIR/bin%func:/bin", "~/bin", "/bin::DIR/bin", ":DIR/bin"),
        *("DIR/odd%func:DIR/bin", "bin:DIR/bin"),
    )
    VARIABLES = (
        *({"PWD": "DIR/link"}, {"PWD": "/"}, {"PWD": "."}, {"PWD": ""}, {"OLDPWD": "/usr"}),
        *({"a-b": "1"}, {"1a": "1"}, {"\xe9": "1"}, {"IFS": "u"}, {"OPTIND": "9"}),
        *({"PS4": "x"}, {"LINENO": "7"}, {"_": "x"}, {"SHLVL": "x"}, {"ENV": "./run"}, {"A": "\n"}),
    )

    def setUp(self) -> None:
        super().setUp()
        for name, (mode, text) in self.FILES.items():
            os.makedirs(self.file(os.path.dirname(name) if mode else name), exist_ok=True)
            if mode:
                self.write(name, text)
                os.chmod(self.file(name), mode)
        os.symlink(self.dir, self.file("link"))
        is_bash = "bash" in self.process("/bin/sh", "--version").stdout
        self.own = re.compile(rb"(QUEUECTL_\w+|_|SHLVL)=" if is_bash else rb"QUEUECTL_\w+=")

    def cases(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield commands and their environments."""
        for command in self.COMMANDS:
            yield command.replace("{}", os.path.basename(self.dir)), {}
        for shape, character in product(self.SHAPES, self.CHARACTERS):
            yield shape.replace("{}", character), {}
        for quote, start in product("'\"", range(0, len(self.CHARACTERS), 8)):
            some = [c for c in self.CHARACTERS[start : start + 8] if c not in quote + '"$`\\']
            yield "./run " + " ".join(f"{quote}{c}{quote} {quote}a{c}b{quote}" for c in some), {}
        for path, command in product(self.PATHS, ("tool a", "bare a")):
            yield command, {"PATH": path.replace("DIR", self.dir)}
        for variables in self.VARIABLES:
            yield "/usr/bin/env", {k: v.replace("DIR", self.dir) for k, v in variables.items()}
        yield "/usr/bin/env", {}

    def start_all(self, shell: str, cases: Sequence[tuple[str, dict[str, str]]]) -> Any:
        """Run commands in a queue of their own, one in nine of them up to twice."""
        jobs = (
            {"command": command, "env": env, "cwd": self.dir, "max_retries": 1 + (n % 9 == 0)}
            for n, (command, env) in enumerate(cases)
        )
        with Queue(self.path) as queue:
            queue.configure("shell", shell)
            queue.configure("backoff_max", "0")
            queue.enqueue_many(jobs)
        return self.pool("--drain", prefix=("env", "PWD=/nowhere"), stdout=subprocess.DEVNULL)

    def ends(self, number: int) -> list[Any]:
        """Return how the attempts of a job ended, and the sorted lines of their output."""
        return [
            (
                *(attempt.outcome, attempt.exit_code, attempt.error),
                sorted(filterfalse(self.own.match, attempt.output.split(b"\n"))),
            )
            for attempt in self.attempts(str(number + 1))
        ]

    @SLOW
    @internal
    def test_only_the_time_tells_whether_a_command_was_started_by_a_shell(self) -> None:
        given = [case for case in self.cases() if case[0].strip()]
        self.assertGreater(len(given), 300)
        direct = [case for case in given if queuectl.plain_words(case[0])]
        self.assertGreater(len(direct), 100)
        pools = []
        for shell in ("/bin/sh -c --", "/bin//sh -c --"):  # the latter is not the default
            self.use_queue(shell.replace("/", "_"))
            pools.append(self.start_all(shell, direct))
        self.assertEqual([pool.wait(30) for pool in pools], [1, 1])
        by_shell = [self.ends(number) for number in range(len(direct))]
        self.use_queue("_bin_sh -c --")
        for number, case in enumerate(direct):
            with self.subTest(case):
                expected = repr(by_shell[number]).replace("//sh", "/sh")
                self.assertEqual(repr(self.ends(number)), expected)

    @internal
    def test_builtins_and_keywords_of_each_shell_need_it(self) -> None:
        words = set()
        for shell in filter(None, map(shutil.which, ("sh", "dash", "bash"))):
            with open(shell, "rb") as file:
                found = set(re.findall(rb"(?=([!-.:-~]{1,9})\0)", file.read()))
            tell = 'for word; do type "$word" && echo "is: $word"; done 2>/dev/null'
            given = [shell, "-c", tell, shell, *map(bytes.decode, found)]
            told = self.process(*given, env={"PATH": "/"}).stdout
            words |= set(re.findall("^is: ([^/-].*)", told, re.MULTILINE))
        self.assertLess({"test", "if", "[", "ulimit", "export", "alias", "exit", "in"}, words)
        self.assertEqual([word for word in words if queuectl.plain_words(f"{word} a")], [])

    @internal
    def test_plain_command_starts_no_shell(self) -> None:
        system = queuectl.SYSTEM
        for command, spawned in {"./run a": False, "./run a;": True, "./bin/bare": True}.items():
            with self.subTest(command), open(self.file("out"), "w") as out, mock.patch.object(
                os, "posix_spawnp", wraps=os.posix_spawnp
            ) as by_shell, mock.patch.object(system, "child", None):
                argv = (*queuectl.DEFAULT_SHELL, command)
                child = system.launch(argv, self.dir, {}, out.fileno(), HERE, os.devnull)
                os.waitpid(child.pid, 0)
                self.assertEqual(by_shell.called, spawned)

    @internal
    def test_variables_that_a_shell_passes_on_unchanged(self) -> None:
        names = {b"A": True, b"_b1": True, b"PPIDS": True, b"PWD": True, b"PATH": True}
        names.update(
            dict.fromkeys((b"PPID", b"IFS", b"DYLD_X", b"a-b", b"1a", b"\xc3\xa9", b""), False)
        )
        self.assert_table(names, queuectl.is_plain_variable)

    @internal
    def test_words_of_plain_commands(self) -> None:
        cases = {
            "a": ["a"],
            "  a\t 'b c'd \"e'f\" '' ": ["a", "b cd", "e'f", ""],
            "a b=c %d @+:,./-": ["a", "b=c", "%d", "@+:,./-"],
            "a 'b\nc$`\\*'": ["a", "b\nc$`\\*"],
        }
        self.assert_table(cases, queuectl.plain_words)
        others = ["", " ", "''", "'", "a '", "a=b", "A=b c", "'a=b'", "%a", "a\n", "a\nb", "\u00e9"]
        others += [f"a{c}" for c in "~#$&*()[]{}\\|;<>?!^`\v\f\r\x7f\xa0"]
        others += [f'a "{c}"' for c in "$`\\"] + ["a" * 100_000 + "!", "'a'" * 30_000 + "!"]
        for command in others:
            with self.subTest(command[:20]):
                self.assertIsNone(queuectl.plain_words(command))


class AttemptEnd(Live):
    """Promise 4: a timeout ends the whole process tree, and background children delay nothing."""

    TREES = {
        "children": "sleep 300 & sleep 300",
        "detached": "setsid -f sleep 300; sleep 300",
        "deaf": "trap '' TERM; while :; do sleep 0.05; done",
        "stopped": "kill -STOP $$; sleep 300",
        "clean": "env -i sleep 300 & exec env -i sleep 300",
        "closed": "exec 0<&- 1>&- 2>&-; sleep 300",
    }

    def test_timeout_ends_every_process_of_a_job(self) -> None:
        self.configure(kill_grace="0.2", max_retries="1")
        jobs = {name: self.enqueue(tree, timeout=0.4) for name, tree in self.TREES.items()}
        self.drain("--count", str(len(jobs)), code=1)
        for name, job_id in jobs.items():
            with self.subTest(name):
                job = self.job(job_id)
                (run,) = self.attempts(job_id)
                self.assertEqual((job.state, job.last_error), ("dead", "timed out after 0.4 s"))
                self.assertGreaterEqual(run.finished - run.started, 0.4)
                self.assertLess(run.finished - run.started, 2.4)
        wait_until(lambda: not self.leftover_processes(), 1.0)

    def test_sigterm_precedes_sigkill(self) -> None:
        self.configure(max_retries="1")
        trap = "trap 'echo polite; exit 0' TERM; "
        self.enqueue(trap + "sleep 300 & wait", timeout=0.5, id="running")
        self.enqueue(trap + "kill -STOP $$; sleep 300", timeout=0.5, id="stopped")
        self.drain("--count", "2", code=1)
        for job in ("running", "stopped"):
            with self.subTest(job):
                self.assertEqual(self.attempts(job)[0].output, b"polite\n")
                self.assertEqual(self.job(job).last_error, "timed out after 0.5 s")

    def test_each_kind_of_failure_has_its_own_error(self) -> None:
        self.configure(max_retries="1")
        self.write("text")
        cases = {
            "exit 3": (3, "exit code 3"),
            "./text": (126, "exit code 126 (not executable)"),
            "./nowhere": (127, "exit code 127 (command not found)"),
            "exit 137": (137, "exit code 137 (128 + SIGKILL)"),
            "kill -9 $$": (-9, "killed by SIGKILL"),
            "kill $$": (-15, "killed by SIGTERM"),
            "sh -c 'kill -9 $$'": (-9, "killed by SIGKILL"),  # needs no shell
            "kill -INT $$": (-2, "killed by SIGINT"),
        }
        jobs = {command: self.enqueue(command) for command in cases}
        self.drain("--count", "2", code=1)
        for command, expected in cases.items():
            with self.subTest(command):
                job = self.job(jobs[command])
                (run,) = self.attempts(job.id)
                self.assertEqual(job.state, "dead")
                self.assertEqual((run.exit_code, run.error), expected)
                self.assertEqual((job.exit_code, job.last_error), expected)

    def test_background_child_does_not_delay_the_end_of_its_job(self) -> None:
        job = self.enqueue("echo x; sleep 30 & exit 0")
        self.drain()
        (run,) = self.attempts(job)
        self.assertEqual((self.job(job).state, run.output), ("completed", b"x\n"))
        self.assertLess(run.finished - run.started, 1.0)

    def test_processes_of_a_failed_attempt_are_gone_before_the_next(self) -> None:
        """Promise 2: a new attempt starts when every process of the old one is gone."""
        self.configure(backoff_max="0")
        fail = "setsid -f sleep 300; sleep 300 & exit 1"
        job = self.enqueue(run_alone("job") + fail, max_retries=3)
        self.drain("--count", "2", code=1)
        log = self.lines("job.log")
        self.assertEqual(len(log), 3)
        self.assertNotIn("twice", log)
        self.assertEqual(self.job(job).attempts, 3)
        wait_until(lambda: not self.leftover_processes(), 1.0)

    @SLOW
    @unittest.skipUnless(ROOT, "only root has a capability to lose")
    def test_processes_that_cannot_be_ended_are_reported_and_delay_no_stop(self) -> None:
        """Promise 2: a job is not restarted while such processes remain."""
        as_nobody = "setpriv --reuid 65534 --clear-groups"
        without_kill = ["setpriv", "--bounding-set=-kill"]
        self.require_tool(*as_nobody.split(), *without_kill[:1], "--dump")
        self.configure(kill_grace="0", max_retries="1")
        orphan = f"{as_nobody} sleep 300 & until grep -q sleep /proc/$!/comm; do :; done; "
        job = self.enqueue(f"{orphan} echo $! > pid; exit 3")
        pool = self.pool(prefix=without_kill)
        self.wait_for_file("pid", "\n")
        pid = int(self.read("pid"))
        message = f"remaining processes of job {job} cannot be ended ({pid})\n"
        self.wait_for_output(pool, message)
        self.run_cli("worker", "stop", "--now", "--timeout", "5")
        self.assert_exits(pool, -signal.SIGTERM if pool.returncode else 0)
        self.assertEqual((self.job(job).state, alive(pid)), ("processing", True))
        other = self.pool("--drain", prefix=without_kill)
        self.wait_for_output(other, message)
        self.assertEqual(self.job(job).state, "processing")
        os.kill(pid, 9)
        self.assert_exits(other, 1)
        self.assertEqual((self.job(job).state, self.job(job).last_error), ("dead", "exit code 3"))

    @internal
    @unittest.skipUnless(LINUX, "there is no /proc")
    def test_all_processes_are_examined_only_where_that_can_tell_more(self) -> None:
        self.enqueue("true")
        count, full = full_scans()
        with Queue(self.path) as queue, full:
            job = claim(queue, "worker-dead")
            stubborn = process_of(self, queue, job, "trap '' TERM; exec sleep 300")
            wait_until(lambda: "sleep" in self.read(f"/proc/{stubborn.pid}/comm"))
            end = queuectl.Termination(
                job, queue._db.run_dir, 60, queuectl.Notices(queuectl.ignore), None
            )
            with mock.patch.object(end, "INTERVAL", 60):
                self.assertEqual([end.step() for _ in range(50)], [False] * 50)
                self.assertEqual(len(count), 1)
                end.deadline = end.snapshot_at = 0.0
                self.assertFalse(end.step())  # KILL
                stubborn.wait(10)
                self.assertTrue(end.step())
                self.assertEqual(len(count), 3)
            process_of(self, queue, job, "sleep 300")
            with mock.patch.object(end, "INTERVAL", 0):
                end.deadline = queuectl.NEVER
                end.step()
                end.step()
            self.assertEqual(len(count), 5)

    @internal
    @unittest.skipUnless(LINUX, "there is no /proc")
    def test_process_group_is_killed_before_the_other_processes_are_found(self) -> None:
        self.enqueue("true")
        process = unrelated_process(self)
        with Queue(self.path) as queue:
            job = claim(queue, "worker-1")
            note = queuectl.LockFile(queue._db.run_dir.file("worker-1"))
            facts = {"leader": process.pid, "namespace": queuectl.pid_namespace()}
            note.write_note(key=job.key, launched=time.time(), **facts)
            end = queuectl.Termination(
                job, queue._db.run_dir, 0, queuectl.Notices(queuectl.ignore), None
            )
            child = queuectl.Child(process.pid, set())
            gone = partial(wait_until, lambda: not alive(process.pid), 2.0)
            with mock.patch.object(queuectl.SYSTEM, "child", child):
                end.step(lambda: gone() and queuectl.Snapshot({}, {}))
                process.wait(10)
            note.close()

    @internal
    def test_system_error_while_processes_are_ended_is_retried(self) -> None:
        self.enqueue("true")
        with Queue(self.path) as queue:
            said: list[str] = []
            notices = queuectl.Notices(said.append)
            end = queuectl.Termination(claim(queue), queue._db.run_dir, 0, notices, None)
            self.assertTrue(end.step())
            fault = OSError(24, os.strerror(24))
            with mock.patch.object(queuectl.SYSTEM, "processes", side_effect=fault):
                self.assertFalse(end.step())
                end.deadline -= 2
                self.assertFalse(end.step() or end.step())
            self.assertEqual(len(said), 1)
            self.assertTrue(end.step())

    def test_exit_code_of_a_job_asks_for_a_snooze_or_no_retry(self) -> None:
        self.configure(no_retry_exit_codes="2,126,127,137", backoff_max="0")
        self.enqueue("test -e n || { touch n; exit 75; }", id="later", max_retries=1)
        self.enqueue("./not-there", id="final")
        self.enqueue("sh -c 'kill -9 $$'", id="killed")  # as a shell has it, this is 137
        self.enqueue("true", id="every", every="1h")  # the drain does not wait for this one
        self.drain(code=1)
        jobs = map(self.job, ("later", "final", "killed"))
        found = [(job.state, job.attempts, job.run) for job in jobs]
        self.assertEqual(found, [("completed", 1, 2), ("dead", 1, 1), ("dead", 1, 1)])


class AttemptOutput(Live):
    """The output of an attempt."""

    def test_stdout_and_stderr_are_kept_in_order_and_stdin_is_empty(self) -> None:
        self.enqueue("echo one; echo two >&2; cat; echo three")
        self.drain()
        self.assertEqual(self.stdout("logs", "1"), "one\ntwo\nthree\n")

    def test_long_output_is_cut_to_its_last_64_kib_and_the_cut_reported(self) -> None:
        self.enqueue("seq 100000")
        self.drain()
        result = self.run_cli("logs", "1")
        output = "".join(f"{number}\n" for number in range(1, 100001))
        self.assertEqual(result.stdout, output[-65536:])
        self.assertIn(f"{len(output) - 65536} bytes of earlier output", result.stderr)

    def test_job_that_removes_its_own_output_ends_normally(self) -> None:
        job_id = self.enqueue("rm -f queuectl.db.run/*.out; exit 3", max_retries=1)
        self.drain(code=1)
        self.assertEqual(self.job(job_id).last_error, "exit code 3")

    def peak_memory(self, pid: int) -> int:
        """Return the largest resident set that a process has had, in bytes."""
        with open(f"/proc/{pid}/status") as file:
            return int(re.findall(r"VmHWM:\s+(\d+) kB", file.read())[0]) * 1024

    @SLOW
    def test_large_output_costs_neither_memory_nor_disk(self) -> None:
        size = 300_000_000
        job = self.enqueue(
            f"{RUN_UNTIL_GO}; head -c {size} /dev/zero; echo end; touch written; sleep 0.3"
        )
        self.pool()
        self.wait_for_workers(1)
        self.wait_for_state(job, "processing")
        (worker,) = self.workers().values()
        out = f"{self.path}.run/{job}.1.out"
        disk = 0
        memory = self.peak_memory(worker["pid"])
        self.write("go")

        def written() -> bool:
            nonlocal disk
            with contextlib.suppress(FileNotFoundError):
                disk = max(disk, os.stat(out).st_blocks * 512)
            return os.path.exists(self.file("written"))

        wait_until(written, 30)
        self.wait_for_state(job, "completed")
        (run,) = self.attempts(job)
        self.assertEqual(run.output, b"\0" * (65536 - 4) + b"end\n")
        self.assertEqual(run.bytes_dropped, size + 4 - 65536)
        self.assertLess(disk, 200_000_000)
        self.assertLess(self.peak_memory(worker["pid"]) - memory, 10_000_000)
        self.assertIn(f"{run.bytes_dropped} bytes", self.run_cli("logs", job).stderr)

    @internal
    def test_output_is_polled_often_even_after_a_quiet_minute(self) -> None:
        now = [0.0]
        polls = [0.0]
        claimed = queuectl.Claim(make_job(), {"timeout": 0, "output_limit": 0})
        link = mock.Mock(wait=lambda until, _: now.append(until + 0.001))
        execution = queuectl.Execution(claimed, mock.Mock(), link, lambda _: None)
        execution.output = mock.Mock(trim=lambda _: polls.append(now[-1]))
        child = mock.Mock(poll=lambda: 0 if now[-1] > 60 else None)
        with mock.patch("time.monotonic", lambda: now[-1]):
            execution.watch(child)
        self.assertLess(max(after - before for before, after in zip(polls, polls[1:])), 0.15)
        self.assertLess(len(polls), 700)  # but not continuously

    START_WITH_FAULTS = """if True:
        import multiprocessing, os, sys, unittest.mock, queuectl
        ours, theirs = multiprocessing.Pipe()
        fault = OSError(5, "Input/output error")
        failing = {name: unittest.mock.Mock(side_effect=fault) for name in sys.argv[2:]}
        ours.send((dict(os.environ), (sys.argv[1], "worker-a-1", 1, ()), False))
        with unittest.mock.patch.multiple(queuectl, **failing):
            os.write(ours.fileno(), b'["go"]\\n')
            stop = lambda *_: os.write(ours.fileno(), b'["stop"]\\n')
            finish = queuectl.Execution.finish
            queuectl.Execution.finish = lambda *args: (finish(*args), stop())
            queuectl.begin_worker(theirs)
        print(os.read(ours.fileno(), 65536).decode())
    """

    @internal
    def test_disk_error_in_an_output_file_does_not_end_the_worker(self) -> None:
        self.enqueue("sleep 0.1; echo x; exit 3", max_retries=1)
        result = self.script(self.START_WITH_FAULTS, self.path, "last_bytes")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        expected = b"[the output cannot be read: Input/output error]\n"
        self.assertEqual(self.attempts("1")[0].output, expected)
        self.assertEqual((self.job("1").state, self.job("1").last_error), ("dead", "exit code 3"))

    def test_output_keeps_every_byte(self) -> None:
        job = self.enqueue(PRINT_RAW)
        self.drain()
        self.assertEqual(self.start("logs", job, text=False).communicate()[0], RAW)
        self.assertEqual(self.attempts(job)[0].output, RAW)

    @internal
    def test_output_reader_skips_the_hole_in_a_truncated_log(self) -> None:
        with open(self.file("out"), "w+b", buffering=0) as file:
            file.write(b"x" * 1_000_000)
            position, chunk = queuectl.read_from(file.fileno(), 5)
            self.assertEqual((position, chunk), (5, b"x" * 65536))
            if queuectl.SYSTEM.punch_hole(file.fileno(), 900_000):
                position, chunk = queuectl.read_from(file.fileno(), 5)
                self.assertGreater(position, 800_000)
                self.assertNotIn(b"\0", chunk[10_000:])
            self.assertEqual(queuectl.read_from(file.fileno(), 1_000_000), (1_000_000, b""))


CLIENT = r"""#!/bin/sh
# A client of an engine, honest or not; the first word says how, the others are what it is to run.
kind=$1; shift
echo "$kind $QUEUECTL_JOB_ID" >> launched
exec 3<&0
case $kind in
faithful) exec "$@" ;;
joins) exec sh -c "$*" ;;
late) sleep 0.6; exec "$@" ;;
nowhere) exec sleep 300 ;;
refused) echo "no such host" >&2; exit 255 ;;
zero) exit 0 ;;
middle) "$@" <&3 & until [ -e started ]; do sleep 0.02; done; exit 0 ;;
hangs) "$@"; exec sleep 300 ;;
mute) exec "$@" 2>/dev/null ;;
deaf) "$@" 2>/dev/null <&3 & sleep 0.5; exit 0 ;;
half) "$@" 2>&1 >/dev/null | head -c 30 >&2; exit 1 ;;
esac
"""


def cancel_in_slurm() -> str:
    """Return the launcher_cancel of the README."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        return re.search(r"'(sh -c \"scancel .*)'\n", file.read())[1]


class AttemptElsewhere(Live):
    """A launcher's client runs a job elsewhere; here, clients that are small scripts do."""

    # A queue is named like the kind of its client.
    FAIL_TO_READ_THE_HOLD = """if True:
        import multiprocessing, os, sys, queuectl
        ours, theirs = multiprocessing.Pipe()
        ours.send((dict(os.environ), (sys.argv[1], "worker-a-1", 1, ()), False))
        def fail(*_):
            raise queuectl.Fault("disk I/O error")
        queuectl.Reader.hold = fail
        finish = queuectl.Execution.finish
        stop = lambda: os.write(ours.fileno(), b'["stop"]\\n')
        queuectl.Execution.finish = lambda *args: (finish(*args), stop())
        queuectl.begin_worker(theirs)
    """

    @internal
    def test_job_claimed_after_a_failed_launch_runs_even_if_the_hold_cannot_be_read(self) -> None:
        self.enqueue_for("refused", id="a", priority=1)
        self.enqueue("true", id="b")
        with Queue(self.path) as queue:
            queue.configure("launcher", "", queue="default")
        self.script(self.FAIL_TO_READ_THE_HOLD, self.path, timeout=10)
        self.assertEqual(self.states(), {"a": "pending", "b": "completed"})

    QUOTED = "printf '%s' '" + 'a"b $HOME \\ é\n' * 600 + "' | cksum"

    def setUp(self) -> None:
        super().setUp()
        self.write("client", CLIENT)
        self.write(
            "cancel", 'echo "cancel $*" >> log\n[ ! -e stuck ] || { echo oh >&2; exit 3; }\n'
        )
        os.chmod(self.file("client"), 0o755)
        self.configure(launcher=self.file("client") + " {queue}", kill_grace="1", max_retries="1")

    def enqueue_for(self, kind: str, command: str = "true", **fields: Any) -> str:
        fields = {"id": f"{kind}{len(fields)}", "queue": kind, **fields}
        return self.enqueue(command, **fields)

    def test_exit_code_is_that_of_the_job(self) -> None:
        for code in (0, 7, 75, 137):
            self.enqueue_for("faithful", f"echo '@0 exit 3' >&2; exit {code}", id=str(code))
        self.enqueue_for("faithful", "kill -9 $$", id="killed")
        self.enqueue_for("faithful", cwd="/no/such", id="nodir")
        self.drain("--count", "3", "--horizon", "1", code=1)
        killed = (137, "exit code 137 (128 + SIGKILL)")
        ends = {"0": (0, None), "7": (7, "exit code 7"), "75": (75, "exit code 75 (try later)")}
        nowhere = f"cannot start: no directory /no/such on {os.uname().nodename}"
        ends.update({"137": killed, "killed": killed, "nodir": (None, nowhere)})
        job = lambda name: self.job(name)[17:19]  # noqa: E731
        self.assert_table(ends, job)
        self.assertEqual(self.job("75").attempts, 0)
        self.assertEqual(self.attempts("7")[0].output, b"@0 exit 3\n")

    def test_command_environment_and_input_arrive_unchanged(self) -> None:
        expected = self.process("sh", "-c", self.QUOTED).stdout
        env = {"A": "'\n$é", "a.b": "", "_command": "echo no", "_session": "no"}
        for kind, quote in (("faithful", "no"), ("joins", "yes")):
            with self.subTest(kind):
                self.configure(launcher_quote=quote, shell="sh -ec")
                text = "x\\ \n" * 25_000 + "é"
                command = f'{self.QUOTED}; printf %s "$A"; cksum; echo $_nonce; false; echo no'
                job = self.enqueue_for(kind, command, env=env, stdin=text)
                self.drain(code=1)
                given = self.process("cksum", input=text).stdout
                output = self.attempts(job)[0].output.decode()
                self.assertEqual(output, f"{expected}'\n$é{given}\n")

    def end_of(self, name: str) -> tuple[str, int, str]:
        job = self.job(name)
        return job.state, job.attempts, job.last_error

    @SLOW
    def test_clients_that_lie_are_not_believed(self) -> None:
        self.configure(launch_timeout="1.5", backoff_base="100")
        self.enqueue_for("late", timeout=0.5)
        self.enqueue_for("hangs", "echo done")
        self.enqueue_for("middle", "touch started; sleep 300")
        for kind in ("nowhere", "refused", "zero", "mute", "deaf", "half"):
            self.enqueue_for(kind, "echo $QUEUECTL_JOB_ID >> ran")
        pool = self.pool("--count", "9")
        client = f"{self.file('client')} ended (exit code"
        lost = f"lost on {os.uname().nodename}: {client} 0) without a result"
        ends = {
            "late1": ("completed", 1, None),
            "hangs0": ("completed", 1, None),
            "middle0": ("dead", 1, lost),
            "nowhere0": ("pending", 0, "not launched: no place within 1.5 s"),
            "refused0": ("pending", 0, f"not launched: {client} 255): no such host"),
            "zero0": ("pending", 0, f"not launched: {client} 0)"),
            "mute0": ("pending", 0, "not launched: no place within 1.5 s"),
            "deaf0": ("pending", 0, f"not launched: {client} 0)"),
            "half0": ("pending", 0, "not launched: no place within 1.5 s"),
        }
        for name, end in ends.items():
            with self.subTest(name):
                wait_until(lambda name=name, end=end: self.end_of(name) == end)
        self.assertFalse(os.path.exists(self.file("ran")))  # a start that was not seen is none
        self.wait_for_output(pool, "job zero0 is back in the queue: not launched")
        self.assertEqual(self.attempts("hangs0")[0].output, b"done\n")

    ENDS = ("sleep 300 & sleep 300", "trap '' TERM; sleep 300 & while :; do sleep 0.1; done")

    @SLOW
    def test_timeout_cancel_and_stop_end_the_job_elsewhere(self) -> None:
        for number, command in enumerate(self.ENDS):
            start = f"echo $$ > pid{number}; {command}"
            for how in ("timeout", "cancel", "stop"):
                with self.subTest(command, how=how):
                    self.write(f"pid{number}")
                    job = self.enqueue_for(
                        "faithful",
                        start,
                        id=f"{how}{number}",
                        timeout=0.5 if how == "timeout" else 0,
                    )
                    pool = self.pool()
                    self.wait_for_file(f"pid{number}", "\n")
                    if how == "cancel":
                        self.stdout("cancel", job)
                    if how == "timeout":
                        self.wait_for_state(job, "dead")
                    self.stdout("worker", "stop", "--now")
                    self.assert_exits(pool, 0)
                    states = {"timeout": "dead", "cancel": "cancelled", "stop": "pending"}
                    self.assertEqual(self.job(job).state, states[how])
                    self.assertEqual(self.leftover_processes(), [])
                    self.result("cancel", job)

    def wait_for_host(self, job: str) -> None:
        wait_until(lambda: self.job(job).host == os.uname().nodename)

    def kill(self, victim: str, pool: subprocess.Popen[str]) -> None:
        """Kill the busy worker, its client or, with the pool, both."""
        (worker,) = (note["pid"] for note in self.workers().values() if note.get("key"))
        client = int(self.process("pgrep", "-P", str(worker)).stdout)
        victims = {"worker": [worker], "client": [client], "everything": [pool.pid, worker, client]}
        for pid in victims[victim]:
            os.kill(pid, signal.SIGKILL)

    AGAIN = run_alone("run") + "echo start >> log; [ $QUEUECTL_ATTEMPT = 2 ] || sleep 300"

    def test_lost_job_is_ended_there_before_it_runs_again(self) -> None:
        """Promise 2, wherever the job runs."""
        self.check_lost_jobs("client")

    @SLOW
    def test_job_elsewhere_never_runs_twice_at_once_whatever_is_killed(self) -> None:
        """Promise 2, wherever the job runs."""
        self.check_lost_jobs("worker", "everything")

    def check_lost_jobs(self, *victims: str) -> None:
        for victim in victims:
            with self.subTest(victim):
                self.use_queue(victim + ".d")
                cancel = f"sh {self.file('cancel')} {{seq}}-{{run}} {{id}} {{queue}}"
                launcher = self.file("client") + " faithful"
                self.configure(launcher=launcher, launcher_cancel=cancel, kill_grace="1")
                self.write("log")
                self.write("run.log")
                self.enqueue(self.AGAIN, id="A_b")
                pool = self.pool("--drain")
                self.wait_for_host("A_b")
                self.wait_for_file("log", "start\n")
                self.configure(launcher_cancel="true")  # the recorded words count
                self.kill(victim, pool)
                if victim == "everything":
                    pool.wait()
                    pool = self.pool("--drain")
                self.assert_exits(pool, 0)
                expected = ["start", "cancel 1-1 a-b default", "start"]
                self.assertEqual(self.lines("log"), expected)
                self.assertNotIn("twice", self.read("run.log"))
                self.assertIn(f"lost on {os.uname().nodename}", self.attempts("A_b")[0].error)

    @SLOW
    def test_job_that_cannot_be_ended_there_stays_in_processing(self) -> None:
        self.configure(launcher_cancel=f"sh {self.file('cancel')}", max_retries="9")
        self.write("stuck")
        pool = self.pool(preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
        for victim in ("client", "worker"):
            with self.subTest(victim):
                self.write("log")
                self.enqueue_for("faithful", "echo start >> log; sleep 300", id=victim)
                self.wait_for_host(victim)
                self.kill(victim, pool)
                self.wait_for_output(pool, f"job {victim} may still run on")
                status = self.stdout("status")
                where = f"it may still run on {os.uname().nodename}: launcher_cancel (sh"
                self.assertIn(where, status)
                hint = f"if it has ended there: queuectl cancel --gone {victim}"
                self.assertIn(f"failed: exit code 3: oh; {hint}", status)
                wait_until(lambda: self.lines("log").count("cancel ") > 1)
                self.assertEqual(self.job(victim).state, "processing")
                self.assertEqual(self.lines("log").count("start"), 1)
                self.stdout("cancel", "--gone", victim)
                self.assertEqual(self.job(victim).state, "cancelled")

    @SLOW
    def test_job_that_cannot_be_ended_there_delays_no_stop_and_is_recovered_later(self) -> None:
        self.configure(launcher_cancel=f"sh {self.file('cancel')}", max_retries="9")
        self.write("stuck")
        self.enqueue_for("faithful", "echo start >> log; sleep 300", id="a")
        pool = self.pool()
        self.wait_for_host("a")
        self.kill("client", pool)
        self.wait_for_output(pool, "job a may still run on")
        self.stdout("worker", "stop", "--timeout", "5")
        self.assert_exits(pool, 0)
        self.assertEqual(self.job("a").state, "processing")
        os.unlink(self.file("stuck"))
        self.pool()
        wait_until(lambda: self.lines("log")[-2:] == ["cancel ", "start"])
        self.assertEqual(self.lines("log").count("start"), 2)

    def test_place_of_a_job_is_shown(self) -> None:
        self.configure(launcher="sh -c 'until [ -e go ]; do sleep 0.02; done; exec \"$@\"' client")
        job = self.enqueue("until [ -e end ]; do sleep 0.02; done")
        pool = self.pool("--drain")
        for host in ("waiting for a place", os.uname().nodename):
            wait_until(lambda host=host: self.job(job).host == host)
            self.assertEqual(self.json_object("show", job)["host"], host)
            self.assertEqual(self.json_object("worker", "list")["host"], host)
            self.assertIn(host, self.stdout("worker", "list"))
            self.write("go")
        self.write("end")
        self.assert_exits(pool, 0)
        self.assertIsNone(self.job(job).host)

    def test_job_whose_worker_dies_before_its_start_has_used_no_attempt(self) -> None:
        self.configure(launcher_cancel="true")
        job = self.enqueue_for("nowhere")
        pool = self.pool()
        wait_until(lambda: any(note.get("key") for note in self.workers().values()))
        self.kill("worker", pool)
        wait_until(lambda: self.job(job).run == 2)
        self.assertEqual(self.job(job).attempts, 1)
        self.assertEqual(self.attempts(job)[0].error, "its worker died before the job started")

    def test_cancel_of_the_readme_fails_where_slurm_does_not_answer(self) -> None:
        path = {**os.environ, "PATH": self.dir + ":" + os.environ["PATH"]}
        self.write("scancel", "#!/bin/sh\n")
        for code in (0, 1):
            self.write("squeue", f"#!/bin/sh\nexit {code}\n")
            for name in ("scancel", "squeue"):
                os.chmod(self.file(name), 0o755)
            done = self.process(*shlex.split(cancel_in_slurm()), env=path)
            self.assertEqual(done.returncode, code)

    def test_job_whose_launcher_is_gone_has_used_no_attempt(self) -> None:
        os.unlink(self.file("client"))
        job = self.enqueue("true")
        reason = f"cannot start: No such file or directory: {self.file('client')}; queue default is"
        self.wait_for_output(self.pool(), reason)
        self.assertEqual(self.end_of(job)[:2], ("pending", 0))

    @SLOW
    def test_background_process_does_not_hold_the_worker(self) -> None:
        self.enqueue_for("hangs", "sleep 300 & exit 0")
        began = time.monotonic()
        self.drain()
        self.assertLess(time.monotonic() - began, 3 * self.second_here())

    def test_notification_runs_here(self) -> None:
        self.configure(on_end="echo $QUEUECTL_EVENT > event")
        self.enqueue_for("faithful")
        self.drain()
        self.assertEqual(self.read("event"), "completed\n")
        self.assertEqual(self.lines("launched"), ["faithful faithful0"])

    def test_program_that_is_not_found_is_refused(self) -> None:
        for key in ("launcher", "launcher_cancel"):
            for value, reason in {
                "no-such-program -x": "'no-such-program'|no-such-program was not found",
                "sh '": "No closing quotation",
            }.items():
                self.assertRegex(self.assert_refused("config", "set", key, value), reason)
            line = self.assert_refused("config", "set", key, "./client -x")
            self.assertIn(f"directory of each job: use {self.file('client')}", line)
        self.run_cli("config", "set", "launcher", "sh '{seq} {run}' {queue} {id} {{.ID}} {print}")
        self.run_cli("config", "set", "launcher", "")
        self.assertEqual(self.stdout("config", "get", "launcher"), "\n")

    @internal
    def test_reports_are_found_in_whatever_pieces_they_arrive(self) -> None:
        text = b"a@b@7 start x\n@7 start n1 12\n\n@7 exit 1234\nb@7 exit 3\n@7 exit 0"
        text += b"@7 exit nodir\n@7 exit"
        kept = b"a@b@7 start x\n\n@7 exit 1234\nb@7 exit 0@7 exit"
        reports = [[b"start", b"n1"], [b"exit", b"3"], [b"exit", b"nodir"]]
        for cuts in itertools.combinations(range(len(text)), 2):
            reader, writer = os.pipe()
            stream = queuectl.ReportStream(reader, "7")
            out, found = b"", []
            for part in (text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]):
                os.write(writer, part)
                more = stream.read() or (b"", [])
                out, found = out + more[0], found + more[1]
            os.close(writer)
            out += stream.read()[0]
            self.assertEqual((out, found), (kept, reports), cuts)

    SHELLS = ("sh", "dash", "bash --posix", "busybox sh", "mksh", "ksh")

    @SLOW
    @internal
    def test_wrapper_works_in_every_shell(self) -> None:
        for shell in self.SHELLS:
            if not shutil.which(shell.split()[0]):
                continue
            for command, sent, code in (
                ("exit 7", b"", 7),
                ("kill -9 $$", b"", 137),
                ("read x; exit $x", b"", 5),
                ("sleep 300 & sleep 300", b"TERM\n", 143),
                ("trap '' TERM; sleep 300 & while :; do sleep 1; done", b"TERM\n", 137),
                ("kill -STOP $$", b"TERM\n", 143),
            ):
                with self.subTest(shell, command=command):
                    size = b"2\n5\n" if "read" in command else b"0\n"
                    words = [*shell.split(), "-c", queuectl.WRAPPER, "queuectl", "7", "1", self.dir]
                    pipe = subprocess.PIPE
                    with subprocess.Popen([*words, command], stdin=pipe, stderr=pipe) as client:
                        client.stdin.write(size)
                        client.stdin.flush()
                        started = client.stderr.readline()
                        if sent:
                            time.sleep(0.2)
                        client.stdin.write(sent)
                        client.stdin.flush()
                        said = client.stderr.read()
                    self.assertRegex(started, rb"\A@7 start \S+ \d+\n\Z")
                    self.assertEqual(said, b"@7 exit %d\n" % code)
                    self.assertEqual(self.leftover_processes(), [])


class AttemptElsewhereClocked(Clocked):
    """A queue whose jobs cannot be launched is put on hold."""

    def fail_to_launch(self) -> Any:
        outcome = Outcome("not launched", self.now, self.now, None, "not launched: ssh: refused")
        job = self.claim()
        return job and self.queue._ledger.finish(job, outcome)[0]

    def test_queue_is_on_hold_for_longer_after_each_failed_launch(self) -> None:
        for name in "abcd":
            self.queue.enqueue("true", id=name)
        for pause in (2, 4, 60, 60):
            job = self.fail_to_launch()
            self.assertEqual((job.state, job.attempts), ("pending", 0))
            self.assertIsNone(self.fail_to_launch())
            self.assertEqual(self.queue._reader.next_ready_time(), self.now + pause)
            self.now += pause
        self.assertEqual(self.attempts(job.id), [])

    def test_failed_launch_of_a_lost_claim_puts_nothing_on_hold(self) -> None:
        self.queue.enqueue("true")
        self.queue.enqueue("true")
        lost = self.claim()._replace(run=7)
        outcome = Outcome("not launched", self.now, self.now, None, "not launched: ssh: refused")
        self.assertEqual(self.queue._ledger.finish(lost, outcome), (None, None))
        self.assertIsNotNone(self.claim())

    def test_queue_on_hold_says_why(self) -> None:
        self.queue.enqueue("true", id="a")
        for _ in range(3):
            self.fail_to_launch()
            self.now += 60
        self.now -= 50
        text = "3 jobs in a row could not be launched; next try in 50 s"
        self.assertIn(text, self.queue._reader.hold("default"))
        status = "\n".join(queuectl.status_text(self.queue._reader))
        self.assertIn("queue default is on hold: " + text, status)
        self.assertIn("not launched: ssh: refused", self.stdout("show", "a"))
        self.queue.resume()
        self.assertIsNotNone(self.fail_to_launch())
        self.assertEqual(self.queue._reader.next_ready_time(), self.now + 2)

    def test_start_elsewhere_ends_the_count_of_failed_launches(self) -> None:
        for name in "ab":
            self.queue.enqueue("true", id=name)
        for pause in (2, 4):
            self.fail_to_launch()
            self.now += pause
        job = self.claim()
        self.queue._ledger.note_launch(job, {"cancel": []}, is_first=True)
        self.queue._ledger.note_launch(job, {"cancel": [], "host": "n1"})
        self.finish(0, job)
        self.assertIsNotNone(self.fail_to_launch())
        self.assertEqual(self.queue._reader.next_ready_time(), self.now + 2)

    def start_after_a_failure(self, **facts: str) -> None:
        for name in "abc":
            self.queue.enqueue("true", id=name)
        self.fail_to_launch()
        self.now += 2
        job = self.claim()
        self.queue._ledger.note_launch(job, {}, is_first=True)
        self.queue._ledger.note_launch(job, {"host": "n1", **facts})

    def test_start_elsewhere_does_not_exceed_the_rate(self) -> None:
        self.queue.configure("rate", "1/1h")
        self.start_after_a_failure()
        self.assertIsNone(self.claim())
        self.assertIn("at its rate of 1/1h", self.queue._reader.hold("default"))

    def test_failed_launcher_cancel_is_no_sign_of_a_working_engine(self) -> None:
        self.start_after_a_failure(trouble="launcher_cancel failed")
        self.fail_to_launch()
        self.assertEqual(self.queue._reader.next_ready_time(), self.now + 4)

    @SLOW
    @NEEDS_SHELL
    @internal
    def test_launcher_cancel_that_hangs_is_killed_and_has_failed(self) -> None:
        self.queue.enqueue("true", id="a")
        facts = {"cancel": ["sh", "-c", "sleep 300 & sleep 300"], "grace": 1, "host": "n1"}
        job = self.claim()
        self.queue._ledger.note_launch(job, facts, is_first=True)
        job = job._replace(launch=json.dumps(facts))
        far_end = queuectl.FarEnd(job, self.queue._ledger, queuectl.Notices([].append))
        far_end.LIMIT = 0.2
        far_end.step()
        session = far_end.process.pid
        wait_until(lambda: far_end.step() or far_end.has_failed)
        trouble = "failed: did not end within 0.2 s"
        self.assertRegex(self.queue.get("a").launched["trouble"], rf"on n1: .* {trouble}\Z")
        self.assertFalse(far_end.step())
        wait_until(lambda: not self.process("pgrep", "-s", str(session)).stdout)


class Engine(Live):
    """Jobs that an engine runs in processes which are not ours; they work in our directory."""

    ENDS_WITH_CLIENT = True
    EXITS = {"0": 0, "7": 7, "75": 75, "137": 137}
    AGAIN = AttemptElsewhere.AGAIN + "; :"

    def use_engine(self, **settings: str) -> None:
        self.configure(kill_grace="1", max_retries="2", backoff_base="1", **settings)

    def check_exit_codes(self) -> None:
        for name, code in self.EXITS.items():
            self.enqueue(f"echo {name}; exit {code}", id=name, max_retries=1)
        self.enqueue(AttemptElsewhere.QUOTED, id="quoted", max_retries=1)
        self.enqueue("head -c 10000000 /dev/zero; echo end", id="big")
        self.enqueue("cat", id="input", stdin="x\n" * 50_000)
        self.enqueue("true", id="nowhere", cwd="/no/such", max_retries=1)
        self.drain("--count", "4", "--horizon", "0", code=1)
        self.assert_table(self.EXITS, lambda name: self.job(name).exit_code)
        expected = self.process("sh", "-c", AttemptElsewhere.QUOTED).stdout.encode()
        self.assertEqual(self.attempts("quoted")[0].output, expected)
        self.assertEqual(self.attempts("big")[0].bytes_dropped, 10_000_004 - 65536)
        self.assertEqual(self.attempts("input")[0].output, b"x\n" * 32768)
        self.assertIn("no directory /no/such on", self.job("nowhere").last_error)

    def victims(self, worker: int, pool: int) -> dict[str, list[int]]:
        clients = [int(pid) for pid in self.process("pgrep", "-P", str(worker)).stdout.split()]
        return {"worker": [worker], "client": clients, "everything": [pool, worker, *clients]}

    def check_kills(self, *victims: str) -> None:
        """Kill everything that takes part, one after the other: the job runs again, but once."""
        for victim in victims:
            with self.subTest(victim):
                for name in ("log", "run.log"):
                    self.write(name)
                job = self.enqueue(self.AGAIN, id=victim)
                pool = self.pool("--drain")
                self.wait_for_file("log", "start\n")
                wait_until(lambda job=job: "host" in self.job(job).launched)
                (worker,) = (note["pid"] for note in self.workers().values() if note.get("key"))
                for pid in self.victims(worker, pool.pid)[victim]:
                    os.kill(pid, signal.SIGKILL)
                if victim == "everything":
                    if self.ENDS_WITH_CLIENT:
                        wait_until(lambda: self.leftover_processes() == [], 2 + self.second_here())
                    self.assert_exits(self.pool("--drain"), 0, 30)
                else:
                    self.assert_exits(pool, 0, 30)
                self.assertEqual(self.lines("log"), ["start", "start"])
                self.assertNotIn("twice", self.read("run.log"))

    def check_ends(self) -> None:
        """Cancel one job, let another time out: none of their processes remain."""
        self.enqueue("touch a; sleep 300 & sleep 300", id="a")
        self.enqueue("sleep 300 & sleep 300", id="b", timeout=1, max_retries=1)
        pool = self.pool("--drain", "--count", "2")
        self.wait_for_file("a")
        self.stdout("cancel", "a")
        self.assert_exits(pool, 1, 30)
        self.assertEqual(self.states(), {"a": "cancelled", "b": "dead"})
        wait_until(lambda: not self.leftover_processes())


@SLOW
class AttemptOverSsh(Engine):
    """Jobs that ssh runs on this machine."""

    def setUp(self) -> None:
        super().setUp()
        sshd = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin")
        if not sshd or not shutil.which("ssh"):
            raise unittest.SkipTest("there is no sshd or no ssh")
        with contextlib.suppress(OSError):  # where sshd changes the root of a part of itself
            os.makedirs("/run/sshd", exist_ok=True)
        for name in ("host", "id"):
            self.process("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.file(name))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        files = f"HostKey {self.file('host')}\nAuthorizedKeysFile {self.file('id.pub')}\n"
        more = f"ListenAddress 127.0.0.1:{port}\nStrictModes no\nPidFile none\n"
        self.write("sshd.conf", more + files)
        command = [sshd, "-D", "-f", self.file("sshd.conf"), "-E", self.file("sshd.log")]
        self.processes.append(subprocess.Popen(command))
        options = f"-F none -i {self.file('id')} -o StrictHostKeyChecking=no -o UserKnownHostsFile="
        options += f"{self.file('known')} -o BatchMode=yes -o LogLevel=ERROR -p {port}"
        self.ssh = f"ssh {options} 127.0.0.1"
        self.use_engine(launcher=self.ssh, launcher_quote="yes")
        try:
            wait_until(lambda: not self.process(*self.ssh.split(), "true").returncode)
        except AssertionError:
            self.skipTest(f"sshd does not work here: {self.read('sshd.log')}")

    def test_exit_codes_output_and_input(self) -> None:
        self.check_exit_codes()

    def test_job_never_runs_twice_at_once_whatever_is_killed(self) -> None:
        self.check_kills("worker", "client", "server", "everything")

    def victims(self, worker: int, pool: int) -> dict[str, list[int]]:
        """Return them with the process of sshd that serves the job."""
        wrapper = int(self.process("pgrep", "-n", "-f", "queuectl [0-9a-f]{32} 1 /").stdout)
        with open(f"/proc/{wrapper}/status") as file:
            server = int(re.findall(r"PPid:\t(\d+)", file.read())[0])
        return {**super().victims(worker, pool), "server": [server]}

    def test_job_that_is_ended_leaves_no_process(self) -> None:
        self.check_ends()

    def test_refused_connection_is_no_attempt(self) -> None:
        self.processes[0].kill()
        self.enqueue("true", id="a")
        pool = self.pool()
        self.wait_for_output(pool, "Connection refused; queue default is on hold: 1 job could")
        self.assertEqual((self.job("a").attempts, self.attempts("a")), (0, []))


@SLOW
@NEEDS_ROOT
class AttemptInSlurm(Engine):
    """Jobs that srun runs on three nodes with two slots each, all on this machine."""

    ENDS_WITH_CLIENT = False  # but by launcher_cancel

    CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/%n.log
ReturnToService=1
PartitionName=main Nodes=ALL Default=YES State=UP
"""
    NODES = ("n1", "n2", "n3")
    START = "hostname {0}; mount --bind {1}/hosts /etc/hosts; exec slurmd"

    @classmethod
    def setUpClass(cls) -> None:
        for tool in ("slurmctld", "slurmd", "srun", "munged", "unshare"):
            if not shutil.which(tool):
                raise unittest.SkipTest(f"there is no {tool}")
        cls.slurm = tempfile.mkdtemp(prefix="queuectl-slurm-")
        cls.addClassCleanup(cls.stop_slurm)
        try:
            cls.start_slurm()
        except (OSError, subprocess.SubprocessError, AssertionError) as error:
            raise unittest.SkipTest(f"Slurm does not start here: {error}") from None

    @classmethod
    def start_slurm(cls) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        conf = cls.CONF.format(host=os.uname().nodename, dir=cls.slurm, port=port)
        hosts = "127.0.0.1 localhost " + os.uname().nodename + "\n"
        os.mkdir(cls.slurm + "/state")
        for number, node in enumerate(cls.NODES, 1):
            os.mkdir(f"{cls.slurm}/{node}")
            place = f"NodeAddr=127.0.0.1{number} Port={port} CPUs=2 State=UNKNOWN"
            conf += f"NodeName={node} NodeHostname={node} {place}\n"
            hosts += f"127.0.0.1{number} {node}\n"
        for name, text in (("slurm.conf", conf), ("hosts", hosts)):
            with open(f"{cls.slurm}/{name}", "w") as file:
                file.write(text)
        os.environ["SLURM_CONF"] = cls.slurm + "/slurm.conf"
        subprocess.run(["install", "-d", "-o", "munge", "-m", "755", "/run/munge"], check=True)
        if subprocess.run(["munge", "-n"], check=False, capture_output=True).returncode:
            subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True)
            os.symlink("/run/munge/munged.pid", cls.slurm + "/munged.pid")
        subprocess.run(["slurmctld"], check=True)
        for node in cls.NODES:
            start = cls.START.format(node, cls.slurm)
            subprocess.run(["unshare", "--uts", "--mount", "sh", "-c", start], check=True)
        idle = ["sinfo", "-h", "-t", "idle", "-o", "%D"]
        wait_until(lambda: subprocess.check_output(idle) == b"3\n", 30)

    @classmethod
    def stop_slurm(cls) -> None:
        for path in glob.glob(cls.slurm + "/*.pid"):
            with open(path) as file, contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read()), signal.SIGKILL)
        os.environ.pop("SLURM_CONF", None)
        shutil.rmtree(cls.slurm, ignore_errors=True)

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(self.process, "scancel", "-p", "main", cwd="/")
        name = "q-{seq}-{run}"
        self.use_engine(launcher=f"srun -n1 -Q -J {name}", launcher_cancel=cancel_in_slurm())

    def test_exit_codes_output_and_input(self) -> None:
        self.check_exit_codes()

    def test_job_never_runs_twice_at_once_whatever_is_killed(self) -> None:
        self.check_kills("worker", "client", "everything")

    def test_job_outlives_the_second_process_of_its_client(self) -> None:
        self.enqueue("echo start >> log; until [ -e go ]; do sleep 0.1; done", id="a")
        pool = self.pool("--drain")
        self.wait_for_file("log", "start\n")
        (worker,) = (note["pid"] for note in self.workers().values() if note.get("key"))
        (client,) = self.victims(worker, pool.pid)["client"]
        os.kill(int(self.process("pgrep", "-P", str(client)).stdout), signal.SIGKILL)
        self.write("go")
        self.assert_exits(pool, 0, 30)
        self.assertEqual(self.lines("log"), ["start"])

    def test_job_that_is_ended_leaves_no_process(self) -> None:
        self.check_ends()
        wait_until(lambda: not self.process("squeue", "-h").stdout)

    def test_job_of_a_node_that_fails_runs_again_elsewhere(self) -> None:
        self.enqueue("uname -n >> log; [ $QUEUECTL_ATTEMPT = 2 ] || sleep 300", id="a")
        pool = self.pool("--drain")
        self.wait_for_file("log", "\n")
        wait_until(lambda: "host" in self.job("a").launched)
        (node,) = self.lines("log")
        change = ("scontrol", "update", f"NodeName={node}")
        self.process(*change, "State=DOWN", "Reason=test")
        self.assert_exits(pool, 0, 30)
        self.process(*change, "State=RESUME")
        self.assertEqual(len(self.lines("log")), 2)
        self.assertIn(f"lost on {node}: srun ended", self.attempts("a")[0].error)
        self.assertEqual(self.job("a").attempts, 2)

    def test_jobs_that_wait_for_a_place_do_not_time_out(self) -> None:
        self.configure(launcher="srun -n1 -Q -w n1", timeout="3")
        for _ in range(20):
            self.enqueue("sleep 0.5", max_retries=1)
        self.drain("--count", "20")
        self.assertEqual(set(self.states().values()), {"completed"})

    def test_engine_that_stops_for_a_time_loses_nothing(self) -> None:
        with open(self.slurm + "/slurmctld.pid") as file:
            pid = int(file.read())
        self.enqueue("touch begun; sleep 4; echo $QUEUECTL_ATTEMPT >> log", id="running")
        pool = self.pool("--drain", "--count", "2")
        self.wait_for_file("begun")
        os.kill(pid, signal.SIGSTOP)
        self.enqueue("echo new >> log", id="new")
        try:
            time.sleep(10)
        finally:
            os.kill(pid, signal.SIGCONT)
        self.assert_exits(pool, 0, 120)
        self.assertEqual(sorted(self.lines("log")), ["1", "new"])


# --- worker ---------------------------------------------------------------------------------------


class WorkerFencing(Live):
    """Promise 2: the result of a lost claim changes nothing."""

    SUCCESS = Outcome("exited", 1.0, 2.0, 0, None, 0, b"late")

    FAILURE = Outcome("exited", 1.0, 2.0, 1, "exit code 1", 0, b"late")

    LATE_RESULTS = (  # the worker that claimed the job since, the late result
        ("worker-2", SUCCESS),
        ("worker-2", FAILURE),
        ("worker-1", SUCCESS),  # differs in the number of the run alone
        ("worker-2", FAILURE._replace(end="released")),
    )

    def lose_claim(self, queue: Queue, successor: str) -> Any:
        """Return a claim of worker-1 that was lost to a successor."""
        queue.enqueue("true")
        lost = claim(queue, "worker-1")
        make_pool(self, queue).recover()  # worker-1 holds no lock
        claim(queue, successor)
        return lost

    @internal
    def test_result_of_a_lost_claim_changes_nothing(self) -> None:
        for number, (successor, outcome) in enumerate(self.LATE_RESULTS):
            with self.subTest(number), Queue(self.file(f"{number}.db")) as queue:
                lost = self.lose_claim(queue, successor)
                before = queue.get(lost.id), queue.attempts(lost), queue.counts()
                self.assertEqual(queue._ledger.finish(lost, outcome), (None, None))
                after = queue.get(lost.id), queue.attempts(lost), queue.counts()
                self.assertEqual(after, before)
                self.assertEqual((before[0].run, before[0].attempts), (2, 2))
                self.assertEqual(queue._ledger.finish(queue.get(lost.id), outcome)[0].id, lost.id)

    @internal
    def test_worker_gets_its_next_job_after_a_late_result(self) -> None:
        with Queue(self.path) as queue:
            lost = self.lose_claim(queue, "worker-2")
            job_id = queue.enqueue("true")
            after, following = queue._ledger.finish(lost, self.SUCCESS, ())
            self.assertIsNone(after)
            self.assertEqual((following.job.id, following.job.locked_by), (job_id, "worker-1"))

    @internal
    def test_kept_failure_is_retried_after_its_backoff(self) -> None:
        self.enqueue("false", id="job")
        with Queue(self.path) as queue:
            job = claim(queue, "worker-1")
            error = "cannot start: \u00e9" * 50
            out = queuectl.Output(queue._db.run_dir.file("1.1.out"))
            os.write(out.fd, b"why")
            outcome = self.FAILURE._replace(error=error, finished=queue._reader.clock(), output=b"")
            queuectl.keep_result(queue._db.run_dir, job, outcome, out)
            self.assertEqual(self.stdout("logs", "job"), "why")
            pool = make_pool(self, queue)
            held = queuectl.LockFile(queue._db.run_dir.file("worker-1"))
            pool.poll()
            held.close()
            pool.poll()
            after = queue.get("job")
            (run,) = queue.attempts(job)
            self.assertEqual((after.state, run.exit_code, run.output), ("pending", 1, b"why"))
            self.assertEqual(run.error, ascii(error)[1:51])
            self.assertEqual(
                pool.changes.ready_at, after.run_after
            )  # although the pool made the change
            self.assertEqual(queue._db.run_dir.files("1."), [])

    @internal
    def test_result_that_cannot_be_stored_is_kept_across_a_stop(self) -> None:
        orphan = "sleep 300 & echo $! > orphan;"
        end = "echo $$ >> ended"
        good = self.enqueue(f"{orphan} echo good >> log; {RUN_UNTIL_GO}; echo a result; {end}")
        bad = self.enqueue(f"echo bad >> log; {RUN_UNTIL_GO}; echo why; {end}; exit 3")
        expected = {  # the job, and the bytes dropped and kept of its output
            good: (("completed", 0, 1, None), [(2, b"result\n")]),
            bad: (("dead", 3, 1, "exit code 3"), [(0, b"why\n")]),
        }
        self.configure(max_retries="1", output_limit="7")
        pool = self.pool("--count", "2")
        wait_until(lambda: len(self.lines("log")) == 2)
        second = self.second_here()
        db = hold_write_lock(self)
        self.write("go")
        wait_until(lambda: len(self.lines("ended")) == 2)
        wait_until(lambda: not any(map(alive, map(int, self.lines("ended")))))
        pool.terminate()
        self.assertLess(self.assert_exits(pool, 0), second)
        self.assertEqual(self.workers(), {})
        db.execute("ROLLBACK")
        self.assertEqual(set(self.states().values()), {"processing"})
        self.drain(code=1)
        self.assertTrue(alive(int(self.read("orphan"))), "a child of a completed job was killed")
        self.assertEqual(sorted(self.lines("log")), ["bad", "good"])  # neither ran again
        for job_id, (fields, outputs) in expected.items():
            with self.subTest(fields):
                job = self.job(job_id)
                found = (job.state, job.exit_code, job.attempts, job.last_error)
                self.assertEqual(found, fields)
                runs = self.attempts(job_id)
                self.assertEqual([(run.bytes_dropped, run.output) for run in runs], outputs)
        self.assertEqual(queuectl.RunDirectory(self.path).files(), [])


class WorkerTrouble(Live):
    """A shortage of descriptors or processes is reported, and nothing is lost."""

    def enqueue_unstartable(self, reason: str, recover: Callable[[], Any]) -> str:
        """Run a job that cannot start until the machine recovers; return the expected output."""
        job = self.enqueue("echo $QUEUECTL_JOB_ID >> log")
        wait_until(lambda: self.job(job).run > 2)
        self.assertNotIn(job, self.lines("log"))
        recover()
        self.assertEqual(self.wait_for_state(job, "completed").attempts, 1)
        return f"job {job} cannot start: {reason}[^|]*; trying again[|]job {job} completed[|]"

    def test_commands_with_too_few_descriptors_fail_and_lose_no_job(self) -> None:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken = [os.dup(2)]
        while taken[-1] < max(map(int, os.listdir("/proc/self/fd"))) - 1:  # leave no gaps
            taken.append(os.dup(2))
        for fd in taken:
            self.addCleanup(os.close, fd)
        ids, codes = [], set()
        for spare in range(2, 12):
            resource.setrlimit(resource.RLIMIT_NOFILE, (taken[-1] + spare, before[1]))
            try:
                code, out, err = self.result("enqueue", "true")
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
            with self.subTest(spare=spare):
                self.assertEqual((code, err.count("\n")), (0, 0) if out else (4, 1))
            ids += out.split()
            codes.add(code)
        self.assertEqual((list(self.states()), codes), (ids, {0, 4}))
        for limit in (9, 11):  # Python itself needs up to 8
            with self.subTest(pool=limit):
                few = resource_limit(resource.RLIMIT_NOFILE, limit)
                self.assert_refused(
                    "worker", "start", "--count=6", "--quiet", code=4, preexec_fn=few
                )
        self.assertEqual({self.job(job).run for job in ids}, {0})

    @internal
    def test_worker_that_cannot_begin_says_so_in_one_line(self) -> None:
        Queue(self.path).close()
        os.mkdir(self.file("queuectl.db.run/worker-a-1"))
        os.environ["QUEUECTL_INSECURE"] = "1"
        result = self.script(AttemptOutput.START_WITH_FAULTS, self.path, "cron_next")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        (news,) = map(json.loads, result.stdout.split("\n")[:1])
        self.assertRegex(news[0][1], "^worker-a-1 cannot continue: .*Is a directory")

    @SLOW
    def test_workers_that_wait_long_for_a_foreign_lock_say_so_once(self) -> None:
        """Promise 4: nothing waits indefinitely without reporting why."""
        self.enqueue("true")
        db = hold_write_lock(self)
        pool = self.pool("--count", "2", "--drain")
        self.wait_for_workers(2)
        line = "queuectl.db has been locked by another program for 5 s; waiting"
        self.wait_for_output(pool, line)
        time.sleep(0.5)
        db.execute("ROLLBACK")
        output = pool.communicate(timeout=10)[0]
        self.assertNotIn(line, output)
        self.assertIn("job 1 completed", output)

    @SLOW
    def test_jobs_that_cannot_start_are_tried_again_less_and_less_often(self) -> None:
        os.environ["QUEUECTL_INSECURE"] = "1"  # else the directories are refused
        self.pool()
        self.wait_for_workers(1)
        for run in range(1, 100):
            os.mkdir(f"{self.path}.run/1.{run}.out")
        times = []
        job = self.enqueue("true", max_retries=1)
        for run in range(1, 5):
            wait_until(lambda run=run: self.job(job).run >= run)
            times.append(time.monotonic())
        pauses = [after - before for before, after in zip(times, times[1:])]
        self.assertGreater(pauses[2], 2 * pauses[0])
        self.assertEqual(self.attempts(job), [])
        for run in range(1, 100):
            os.rmdir(f"{self.path}.run/1.{run}.out")
        self.wait_for_state(job, "completed")
        self.assertEqual((self.job(job).attempts, len(self.attempts(job))), (1, 1))

    @SLOW
    def test_worker_unable_to_start_jobs_releases_them_and_reports_it_once(self) -> None:
        self.configure(max_retries="1")
        pool = self.pool()
        self.wait_for_state(self.enqueue("true"), "completed")
        expected = "job 1 completed[|]"
        (worker,) = (facts["pid"] for facts in self.workers().values())
        restore = exhaust_descriptors(worker)
        expected += self.enqueue_unstartable("Too many open files", restore)
        with self.subTest("no processes"):
            strace = inject(self, worker, *FAIL_FORKS)
            reason = "Resource temporarily unavailable"
            expected += self.enqueue_unstartable(reason, strace.terminate)
        pool.terminate()
        output = pool.communicate(timeout=10)[0].replace("\n", "|")
        self.assertRegex(re.sub(r"\d{4}-\d\d-\d\dT\S+ | in [\d.]+ s", "", output), expected)

    def test_job_is_not_blamed_if_its_output_file_cannot_be_created(self) -> None:
        os.environ["QUEUECTL_INSECURE"] = "1"  # else the directories are refused
        pool = self.pool()
        self.wait_for_workers(1)
        for run in range(1, 100):
            os.mkdir(f"{self.path}.run/1.{run}.out")
        self.enqueue("true", max_retries=1)
        self.wait_for_output(pool, "job 1 cannot start: ")
        wait_until(lambda: self.job("1").run > 1)
        self.stdout("cancel", "1")
        self.assertEqual((self.job("1").state, self.attempts("1")), ("cancelled", []))


# --- pool -----------------------------------------------------------------------------------------


class PoolRecovery(Live):
    """The jobs of workers that died return to the queue."""

    ORPHANS = {
        "plain": "sleep 300",
        "quiet": "exec >/dev/null 2>&1; sleep 300",
        "detached": "setsid -f sleep 300; sleep 300",
        "parent": "sleep 300 & sleep 300 & sleep 300",
        "clean": "exec env -i sleep 300",
        "hidden": "exec env -i sleep 300 >/dev/null 2>&1",
        "elsewhere": f"exec env QUEUECTL_DB=/dev/null {shlex.join(PYTHON)} -c 'import os, time; "
        "os.closerange(1, 64); time.sleep(300)'",
    }

    def test_job_of_a_killed_worker_restarts_within_one_second(self) -> None:
        """Promise 5: recovery is exact and prompt."""
        command = "[ $QUEUECTL_ATTEMPT = 2 ] && exit; sleep 300 & echo $! > child; wait"
        job = self.enqueue(run_alone("job") + command)
        pool = self.pool()
        self.wait_for_file("child", "\n")
        old = [int(self.lines("job.log")[0]), int(self.read("child"))]
        self.assertEqual([alive(pid) for pid in old], [True, True])
        second = self.second_here()
        self.kill_workers()
        wait_until(lambda: len(self.lines("job.log")) >= 2, second)
        self.assertEqual([alive(pid) for pid in old], [False, False])
        after = self.wait_for_state(job, "completed")
        self.assertEqual((after.attempts, after.run, len(self.lines("job.log"))), (2, 2, 2))
        self.assertEqual([a.error for a in self.attempts(job)], ["its worker died", None])
        self.wait_for_output(pool, "-1 died\n")

    def test_job_of_a_killed_pool_restarts_in_another_pool_within_one_second(self) -> None:
        job = self.enqueue("echo run >> log; [ $QUEUECTL_ATTEMPT = 2 ] || sleep 300")
        pool = self.pool()
        self.wait_for_file("log", "\n")
        victims = [pool.pid, *(facts["pid"] for facts in self.workers().values())]
        other = self.pool()
        self.wait_for_workers(2)
        self.wait_for_poll(other)
        second = self.second_here()
        for pid in victims:
            os.kill(pid, 9)
        wait_until(lambda: len(self.lines("log")) == 2, second)
        self.assertEqual(self.wait_for_state(job, "completed").attempts, 2)

    def test_jobs_restart_after_everything_is_killed_but_never_run_twice_at_once(self) -> None:
        """Promise 2: a new attempt starts when every process of the old one is gone."""
        jobs = {
            name: self.enqueue(run_alone(name) + command) for name, command in self.ORPHANS.items()
        }
        count = str(len(jobs))
        pool = self.pool("--count", count)
        wait_until(lambda: all(self.lines(f"{name}.log") for name in jobs))
        pool.kill()
        self.kill_workers()
        wait_until(lambda: not self.workers())
        self.assertGreaterEqual(len(self.leftover_processes()), len(jobs))  # the orphans are alive
        second = self.second_here()
        self.pool("--count", count)
        wait_until(lambda: all(len(self.lines(f"{name}.log")) >= 2 for name in jobs), second)
        for name, job in jobs.items():
            with self.subTest(name):
                old, new = self.lines(f"{name}.log")
                self.assertTrue(old.isdigit() and new.isdigit(), "twice at once")
                self.assertEqual((alive(int(old)), alive(int(new))), (False, True))
                self.assertEqual((self.job(job).attempts, self.job(job).run), (2, 2))

    def test_job_that_kills_its_worker_starts_no_more_than_max_retries_times(self) -> None:
        """Promise 3: an attempt counts from its claim, whatever happens to its worker."""
        bad = self.enqueue("echo start >> log; kill -9 $PPID; sleep 300", max_retries=3)
        good = [self.enqueue("true") for _ in range(20)]
        self.pool("--count", "4")  # spare workers: a dead one is replaced after a second
        after = self.wait_for_state(bad, "dead")
        self.assertEqual((after.attempts, self.read("log")), (3, "start\n" * 3))
        self.assertIn("worker died", after.last_error)
        wait_until(lambda: [self.states()[job] for job in good] == ["completed"] * 20)
        self.assertEqual(self.read("log"), "start\n" * 3)

    def test_workers_of_a_killed_pool_finish_their_jobs_and_exit(self) -> None:
        job = self.enqueue(f"touch started; {RUN_UNTIL_GO}; echo result")
        pool = self.pool("--count", "3")
        self.wait_for_workers(3)
        self.wait_for_file("started")
        second = self.second_here()
        pool.kill()
        unclaimed = self.enqueue("true")
        wait_until(lambda: len(self.workers()) == 1, second)  # the idle ones leave at once
        self.write("go")
        self.assertEqual(self.wait_for_state(job, "completed").attempts, 1)
        self.assertEqual(self.attempts(job)[0].output, b"result\n")
        wait_until(lambda: not self.workers(), second)
        self.assertEqual(self.job(unclaimed).run, 0)

    START_WITHOUT_POOL = """if True:
        import multiprocessing, sys, queuectl
        ours, theirs = multiprocessing.Pipe()
        ours.send(({}, (sys.argv[1], "worker-a-1", 1, ()), False))
        ours.close()
        queuectl.begin_worker(theirs)
    """

    @internal
    def test_worker_exits_if_its_pool_died_before_it_began(self) -> None:
        Queue(self.path).close()
        result = self.script(self.START_WITHOUT_POOL, self.path, timeout=5)
        self.assertEqual(result.returncode, 0)

    @SLOW
    @unittest.skipUnless(ROOT, "only root has a capability to lose")
    def test_orphan_that_cannot_be_killed_is_reported(self) -> None:
        as_nobody = "setpriv --reuid 65534 --clear-groups"
        without_kill = ["setpriv", "--bounding-set=-kill"]
        self.require_tool(*as_nobody.split(), *without_kill[:1], "--dump")
        self.configure(kill_grace="0")
        once = "[ $QUEUECTL_ATTEMPT = 2 ] && exit; "
        job = self.enqueue(once + f"echo $$ $PPID > pids; exec {as_nobody} sleep 300")
        pool = self.pool("--drain", prefix=without_kill)
        self.wait_for_file("pids", "\n")
        orphan, worker = map(int, self.read("pids").split())
        wait_until(lambda: "sleep" in self.read(f"/proc/{orphan}/comm"))
        os.kill(worker, 9)
        self.wait_for_output(pool, f"remaining processes of job {job} cannot be ended ({orphan})\n")
        os.kill(orphan, 9)
        self.assert_exits(pool, 0)
        self.assertEqual(self.job(job).attempts, 2)

    @SLOW
    def test_unrecoverable_job_does_not_delay_other_jobs(self) -> None:
        for _ in range(2):
            self.enqueue("[ $QUEUECTL_ATTEMPT = 2 ] || { echo >> log; exec sleep 300; }")
        pool = self.pool("--count", "2")
        user = obeying_modes(self)
        wait_until(lambda: len(self.lines("log")) == 2)
        pool.kill()
        self.kill_workers()
        wait_until(lambda: not self.workers())
        output = f"{self.path}.run/1.1.out"
        os.chmod(output, 0)
        pool = self.pool("--drain", prefix=user)
        self.wait_for_state("2", "completed")
        os.chmod(output, 0o600)
        self.assert_exits(pool, 0)
        self.assertEqual((self.job("1").state, self.job("1").attempts), ("completed", 2))

    @internal
    @unittest.skipUnless(LINUX, "there is no /proc")
    def test_processes_are_examined_once_for_all_jobs_of_dead_workers(self) -> None:
        count, full = full_scans()
        with Queue(self.path) as queue, full:
            queue._db.set_synchronous("normal")
            queue.enqueue_many({"command": "true"} for _ in range(20))
            for _ in range(20):
                process_of(self, queue, claim(queue, "worker-dead"), "exec sleep 300")
            pool = make_pool(self, queue)
            idle = mock.Mock(state="idle")
            idle.send.side_effect = lambda _: self.assertEqual(queue.counts()["pending"], 1)
            pool.crew.workers.append(idle)
            wait_until(lambda: pool.recover() or queue.counts()["pending"] == 20)
        self.assertLessEqual(len(count), 3)
        idle.send.assert_called_once_with("go")  # for the first, while others are recovered
        wait_until(lambda: not self.leftover_processes(), 1.0)

    @internal
    def test_kept_result_that_is_not_ours_counts_as_a_crash(self) -> None:
        for number, kept in enumerate(
            ("W10=", "WzFd", "bnVsbA==", "e30=", "", "x", "WzEsMiwzLDQsNSw2LDdd")
        ):
            with self.subTest(kept):
                job = self.enqueue("true")
                with Queue(self.path) as queue:
                    claim(queue, "worker-dead")
                    self.write(f"queuectl.db.run/{number + 1}.1.kept.{kept}")
                    make_pool(self, queue).recover()
                self.assertEqual(self.job(job).state, "pending")
                self.assertEqual(self.attempts(job)[0].error, "its worker died")
                self.drain()

    @internal
    def test_pool_forgets_orphans_that_another_pool_has_recovered(self) -> None:
        self.enqueue("true", id="x")
        with Queue(self.path) as queue:
            claim(queue, "worker-dead")
            orphan = queuectl.LockFile(queue._db.run_dir.file("1.1.out"))
            pools = [make_pool(self, queue) for _ in range(2)]
            for pool in pools:
                pool.recover()
            self.assertEqual([len(pool.recovery.orphans) for pool in pools], [1, 1])
            orphan.close()
            for pool in pools:
                pool.recover()
            self.assertEqual([len(pool.recovery.orphans) for pool in pools], [0, 0])
            self.assertEqual(queue.get("x").state, "pending")


class PoolFalseAlarms(Live):
    """Promise 5: there is no lease, and nothing makes a living job look dead."""

    def suspend(self, duration: float) -> None:
        """Suspend a pool with a running job for a time, while another pool watches."""
        job = self.enqueue(f"echo run >> log; {RUN_UNTIL_GO}")
        pool = self.pool()
        self.wait_for_file("log", "\n")
        suspended = [pool.pid, *(facts["pid"] for facts in self.workers().values())]
        for pid in suspended:
            os.kill(pid, signal.SIGSTOP)
        self.pool()  # takes over any job that looks dead
        self.wait_for_workers(2)
        time.sleep(duration)  # the fault itself
        for pid in suspended:
            os.kill(pid, signal.SIGCONT)
        self.write("go")
        self.assertEqual(self.wait_for_state(job, "completed").attempts, 1)
        self.assertEqual((self.read("log"), len(self.attempts(job))), ("run\n", 1))

    def test_suspended_machine_does_not_look_dead(self) -> None:
        self.suspend(0.3)  # longer than the other pool's polling interval

    @SLOW
    def test_machine_suspended_for_a_minute_does_not_look_dead(self) -> None:
        self.suspend(60.0)

    @internal
    def test_unrelated_process_with_a_recorded_pid_is_not_killed(self) -> None:
        process = unrelated_process(self)
        job = self.enqueue("echo again > log")
        with Queue(self.path) as queue:
            run = claim(queue, "worker-dead").key
        facts = {"pid": process.pid, "key": run, "leader": process.pid, "launched": 1e9}
        self.write("queuectl.db.run/worker-dead", json.dumps(facts))
        self.drain()
        self.assertEqual((self.job(job).state, self.job(job).attempts), ("completed", 2))
        self.assertIsNone(process.poll())

    @internal
    def test_clock_jump_makes_no_worker_look_dead_or_alive(self) -> None:
        for day in (86400.0, -86400.0):
            with self.subTest(day=day):
                self.use_queue(str(day))
                clock = [1.7e9]
                with Queue(self.path, clock=lambda now=clock: now[0]) as queue:
                    queue.enqueue("true", id="job")
                    pool = make_pool(self, queue)
                    held = queuectl.LockFile(queue._db.run_dir.file("worker-1"))
                    self.assertEqual(claim(queue, "worker-1").run, 1)
                    clock[0] += day
                    pool.recover()
                    self.assertEqual(queue.get("job").state, "processing")  # its worker is alive
                    self.assertIsNone(claim(queue, "worker-2"))
                    held.close()
                    pool.recover()
                    self.assertEqual(queue.get("job").state, "pending")  # now it is dead
                    self.assertEqual(claim(queue, "worker-2").attempts, 2)  # without a delay
                    clock[0] -= 2 * day
                    outcome = Outcome("exited", clock[0], clock[0], 0, None)
                    after, _ = queue._ledger.finish(queue.get("job"), outcome)
                    self.assertEqual(after.state, "completed")

    SHIFTED_CLOCK = """
import weakref
now = time.time
def shifted():
    try:
        with open(os.environ["SHIFT"]) as file:
            return now() + float(file.read())
    except FileNotFoundError:
        return now()
time.time = shifted
"""

    @SLOW
    def test_clock_change_during_a_job_neither_repeats_it_nor_delays_its_retry(self) -> None:
        with open(PROGRAM) as file:
            shifted = file.read().replace("\nimport weakref\n", self.SHIFTED_CLOCK, 1)
        self.PROGRAM = self.file("shifted.py")
        self.write("shifted.py", shifted)
        pools = []
        for day in (86400, -86400):
            self.use_queue(str(day))
            os.environ["SHIFT"] = self.file(f"shift{day}")
            self.configure(backoff_max="0.1")
            self.enqueue(f"echo run >> log{day}; {RUN_UNTIL_GO}", id="long")
            self.enqueue(
                f"touch began{day}; {RUN_UNTIL_GO}; [ $QUEUECTL_ATTEMPT = 2 ]", id="failing"
            )
            pools.append(self.pool("--count", "3"))
            self.wait_for_file(f"log{day}", "\n")
            self.wait_for_file(f"began{day}")
            self.write("new", str(day))
            os.rename(self.file("new"), os.environ["SHIFT"])
        for pool in pools:
            self.wait_for_poll(pool)
        self.write("go")
        for day in (86400, -86400):
            with self.subTest(day=day):
                self.use_queue(str(day))
                self.assertEqual(self.wait_for_state("long", "completed").attempts, 1)
                self.assertEqual(self.wait_for_state("failing", "completed").attempts, 2)
                self.assertEqual(self.read(f"log{day}"), "run\n")
                (run,) = self.attempts("long")
                lasted = run.finished - run.started
                self.assertTrue(86400 < lasted < 86460 if day > 0 else lasted == 0, lasted)


class PoolStop(Live):
    """Promise 6: stopping is graceful, wherever the request comes from."""

    def test_first_signal_lets_running_jobs_finish(self) -> None:
        pools = {}
        for number in STOP_SIGNALS:
            self.use_queue(number.name)
            self.enqueue(
                f"touch {number.name}.started; {RUN_UNTIL_GO}; sleep 0.2; echo done", id="running"
            )
            self.enqueue("true", id="waiting")
            pools[number] = self.pool()
        for number, pool in pools.items():
            self.wait_for_file(f"{number.name}.started")
            pool.send_signal(number)
            self.wait_for_output(pool, f"{number.name}: no new jobs")
        self.write("go")
        for number, pool in pools.items():
            with self.subTest(number.name):
                self.assert_exits(pool, 0)
                self.use_queue(number.name)
                self.assertEqual(self.job("running").state, "completed")
                self.assertEqual(self.attempts("running")[0].output, b"done\n")
                waiting = self.job("waiting")
                self.assertEqual((waiting.state, waiting.run), ("pending", 0))

    def test_drain_that_is_stopped_before_all_jobs_have_run_fails(self) -> None:
        for waiting, code in ((True, 1), (False, 0)):
            self.use_queue(f"drain{code}")
            self.enqueue(f"touch started{code}; {RUN_UNTIL_GO}", id="running")
            if waiting:
                self.enqueue("true", id="waiting", delay=3600)
            pool = self.pool("--drain")
            wait_until(lambda code=code: os.path.exists(self.file(f"started{code}")))
            pool.terminate()
            self.wait_for_output(pool, "SIGTERM")
            self.write("go")
            output = pool.communicate(timeout=10)[0]
            self.assertEqual(pool.returncode, code, output)
            self.assertEqual("stopped before all jobs had run" in output, waiting)
            os.remove(self.file("go"))

    def test_second_signal_kills_running_jobs_without_counting_the_attempts(self) -> None:
        """Promise 3: an attempt that the operator stopped does not count."""
        pools = {}
        for number in STOP_SIGNALS:
            self.use_queue(number.name)
            self.enqueue(f"echo $$ > {number.name}.pid; sleep 300 & sleep 300", id="job")
            pools[number] = self.pool()
        for number, pool in pools.items():
            self.wait_for_file(f"{number.name}.pid", "\n")
            pool.send_signal(number)
        message = "no new jobs; finishing the running ones; send it again after a second"
        for number, pool in pools.items():
            self.wait_for_output(pool, message)
            pool.send_signal(number)  # the same key press, or a terminal that sends it twice
        time.sleep(1.05)  # the time in which a repetition is ignored
        for number, pool in pools.items():
            with self.subTest(number.name):
                self.assertIsNone(pool.poll())
                self.assertTrue(alive(int(self.read(f"{number.name}.pid"))))
            pool.send_signal(number)
        for number, pool in pools.items():
            with self.subTest(number.name):
                self.assert_exits(pool, -number)
                self.use_queue(number.name)
                self.assertFalse(alive(int(self.read(f"{number.name}.pid"))))
                job = self.job("job")
                self.assertEqual((job.state, job.attempts, job.run), ("pending", 0, 1))
        wait_until(lambda: not self.leftover_processes())

    @unittest.skipUnless(os.path.exists("/proc/self"), "looks for the fork server in /proc")
    def test_ctrl_c_while_workers_are_starting_stops_the_pool(self) -> None:
        pool = self.pool(start_new_session=True)
        self.wait_for_output(pool, " worker on ")
        children = f"/proc/{pool.pid}/task/{pool.pid}/children"
        wait_until(lambda: self.read(children))  # the fork server is still loading
        os.killpg(pool.pid, signal.SIGINT)
        self.wait_for_output(pool, "SIGINT: no new jobs")
        self.assert_exits(pool, 0)

    START_STOPPED = """if True:
        import multiprocessing, os, sys, queuectl
        ours, theirs = multiprocessing.Pipe()
        ours.send((dict(os.environ), (sys.argv[1], "worker-a-1", 1, ()), False))
        os.write(ours.fileno(), b'["stop"]\\n')
        queuectl.begin_worker(theirs)
    """

    @internal
    def test_worker_stopped_before_it_began_claims_nothing(self) -> None:
        self.enqueue("true", id="x")
        self.assertEqual(self.script(self.START_STOPPED, self.path).returncode, 0)
        self.assertEqual(self.job("x").state, "pending")

    def test_stopping_pool_kills_the_orphans_of_a_dead_worker_before_it_exits(self) -> None:
        self.configure(kill_grace="0.3")
        self.enqueue("trap '' TERM; echo $$ > pid; while :; do sleep 0.02; done", id="x")
        pool = self.pool()
        self.wait_for_file("pid", "\n")
        pool.terminate()
        self.wait_for_output(pool, "SIGTERM: no new jobs")
        self.kill_workers()
        self.assert_exits(pool, 0)
        self.assertEqual((alive(int(self.read("pid"))), self.job("x").state), (False, "pending"))

    def leave_worker_without_pool(self) -> None:
        """Start a worker that runs job x, and kill its pool."""
        self.enqueue(f"touch started; {RUN_UNTIL_GO}", id="x")
        pool = self.pool()
        self.wait_for_file("started")
        pool.kill()
        pool.wait()

    def test_worker_stop_waits_for_a_worker_without_a_pool(self) -> None:
        self.leave_worker_without_pool()
        self.assertEqual(self.result("worker", "stop", "--timeout", "0.1")[0], 124)
        self.write("go")
        self.assertEqual(self.result("worker", "stop")[:2], (0, ""))  # it may be gone already
        self.assertEqual(self.job("x").state, "completed")

    @SLOW
    def test_worker_without_a_pool_obeys_cancel_and_stop_now(self) -> None:
        for other_pools in (0, 1):
            with self.subTest(other_pools=other_pools):
                self.leave_worker_without_pool()
                if other_pools:
                    self.pool()
                    self.wait_for_workers(2)
                self.assertEqual(self.result("cancel", "x"), (0, "x\n", ""))
                self.assertEqual(self.job("x").state, "cancelled")
                self.result("worker", "stop")
                self.result("dlq", "purge", "x")
                os.unlink(self.file("started"))
        self.leave_worker_without_pool()
        self.assertEqual(self.result("worker", "stop", "--now"), (0, "", ""))
        self.assertEqual((self.job("x").state, self.job("x").attempts), ("pending", 0))

    def test_foreign_lock_does_not_delay_the_stop_of_idle_workers(self) -> None:
        """Promise 4: no lock delays a stop by more than a second."""
        self.enqueue("echo > log")
        pool = self.pool("--count", "2")
        self.wait_for_file("log", "\n")
        self.wait_for_workers(2)
        second = self.second_here()
        hold_write_lock(self)
        pool.terminate()
        self.assertLess(self.assert_exits(pool, 0), second)

    @SLOW
    def test_foreign_lock_does_not_delay_the_killing_of_running_jobs(self) -> None:
        job = self.enqueue("echo run >> log; [ $(wc -l < log) = 2 ] || sleep 300")
        pool = self.pool()
        self.wait_for_file("log", "\n")
        second = self.second_here()
        db = hold_write_lock(self)
        began = time.monotonic()
        self.run_cli("worker", "stop", "--now")
        self.assertLess(time.monotonic() - began, second)
        self.assert_exits(pool, 0)
        self.assertEqual(self.leftover_processes(), [])
        db.execute("ROLLBACK")
        self.drain()
        self.assertEqual((self.job(job).attempts, self.job(job).run), (1, 2))  # one not counted

    @SLOW
    def test_foreign_lock_does_not_delay_the_stop_with_one_job_to_recover(self) -> None:
        self.enqueue("echo $$ > pid; exec sleep 300")
        pool = self.pool()
        self.wait_for_file("pid", "\n")
        second = self.second_here()
        hold_write_lock(self)
        self.kill_workers()
        wait_until(lambda: not alive(int(self.read("pid"))))  # the job can be recovered now
        pool.terminate()
        self.assertLess(self.assert_exits(pool, 0), second)

    @SLOW
    def test_foreign_lock_does_not_delay_the_stop_with_many_jobs_to_recover(self) -> None:
        with Queue(self.path) as queue:
            for number in range(16):
                queue.enqueue("true")
                claim(queue, f"worker-dead-{number}")
        second = self.second_here()
        hold_write_lock(self)
        pool = self.pool()
        self.wait_for_workers(1)
        began = time.monotonic()
        self.stdout("worker", "stop")
        self.assertLess(time.monotonic() - began, second)
        self.assert_exits(pool, 0)

    def test_nohup_pool_ignores_a_hang_up(self) -> None:
        self.enqueue("echo > first")
        ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
        pool = self.pool(preexec_fn=ignore, start_new_session=True)
        self.wait_for_file("first", "\n")
        os.killpg(pool.pid, signal.SIGHUP)
        self.wait_for_state(self.enqueue("true"), "completed")
        self.assertIsNone(pool.poll())
        self.assertEqual(len(self.workers()), 1)

    def test_terminal_stops_its_pool_on_ctrl_c_and_hang_up(self) -> None:
        control = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # noqa: E731
        press = lambda terminal: os.write(terminal, b"\x03")  # noqa: E731
        for name, act in (("Ctrl-C", press), ("hang-up", os.close)):
            with self.subTest(name):
                self.use_queue(name)
                self.enqueue(f"touch {name}.started; until [ -e {name}.go ]; do sleep 0.02; done")
                terminal, slave = pty.openpty()
                own = {"stdin": slave, "start_new_session": True, "preexec_fn": control}
                pool = self.pool("--count", "2", **own)
                os.close(slave)
                self.wait_for_file(f"{name}.started")
                self.wait_for_workers(2)
                act(terminal)
                self.wait_for_output(pool, "no new jobs")
                self.wait_for_workers(1)  # the idle worker left, the busy one stays
                self.write(f"{name}.go")
                self.assert_exits(pool, 0)
                self.assertEqual((self.job("1").state, self.job("1").attempts), ("completed", 1))
                if name == "Ctrl-C":
                    os.close(terminal)


@NEEDS_SHELL
class PoolDispatch(Clocked):
    """Which job runs next."""

    def test_order_holds_under_many_workers(self) -> None:
        for number in range(40):
            fields = {"priority": number % 4, "run_at": number % 3, "queue": f"q{number % 5}"}
            self.queue.enqueue("true", id=str(number), **fields)
        connections = [Queue(self.path, clock=lambda: self.now) for _ in range(4)]
        for queue in connections:
            self.addCleanup(queue._db.close)
        jobs = [claim(connections[n % 4], f"worker-{n}") for n in range(40)]
        keys = [(-job.priority, job.run_after, job.seq) for job in jobs]
        self.assertEqual(keys, sorted(keys))

    @internal
    def test_completed_parent_wakes_the_pools_for_its_child_at_once(self) -> None:
        enqueue_graph(self.queue, "a", "b a")
        wakeup = queuectl.SYSTEM.make_wakeup(self.queue._db.run_dir.file("pool-x", "fifo"))
        self.addCleanup(wakeup.close)
        self.finish()
        self.assertEqual(os.read(wakeup.fileno(), 9), b"!")

    def test_drain_ends_when_only_blocked_jobs_are_left_and_names_them(self) -> None:
        enqueue_graph(self.queue, "a", *(f"b{number} a" for number in range(10)))
        self.now += 1
        self.queue.enqueue("true", id="c", queue="q", after=["a"])
        self.queue.cancel(["a"])
        enqueue_graph(self.queue, "other")  # in a queue that is not served
        self.assertIn("job c is blocked by a (cancelled)\n", self.drain("--queue", "q", code=1))
        self.assertEqual(self.run_all(), "other")


class PoolDispatchLive(Live):
    """Which jobs a pool runs, and when."""

    def test_drain_waits_for_retries_and_exits_with_1_if_a_job_died(self) -> None:
        self.configure(backoff_max="0.1")
        self.enqueue("test -e again || { touch again; exit 1; }", id="second-try")
        self.drain(code=0)
        self.assertEqual(self.job("second-try").attempts, 2)
        self.enqueue("exit 3", id="bad", max_retries=1)
        events = self.drain(code=1)
        self.assertIn("job bad is dead: exit code 3", events)
        self.assertEqual(self.job("bad").last_error, "exit code 3")

    def test_drain_does_not_wait_for_jobs_beyond_its_horizon(self) -> None:
        self.enqueue("true", delay="1h")
        self.enqueue("true")
        self.drain("--horizon", "1m")
        self.assertEqual((self.job("1").state, self.job("2").state), ("pending", "completed"))

    def test_waiting_pool_starts_new_scheduled_and_retried_jobs_promptly(self) -> None:
        self.configure(backoff_max="0.1")
        self.enqueue("true")
        self.pool("--count", "2")
        self.wait_for_state("1", "completed")
        wait_until(lambda: len(self.workers()) == 2)
        self.enqueue("true", id="new")
        self.enqueue("true", id="later", delay=0.3)
        self.enqueue("test $QUEUECTL_ATTEMPT = 2", id="retry")
        for job_id in ("new", "later", "retry"):
            job = self.wait_for_state(job_id, "completed")
            started = self.attempts(job_id)[-1].started
            self.assertLess(started - job.run_after, 0.2, job_id)
            self.assertGreaterEqual(started, job.run_after)

    @SLOW
    def test_stopped_idle_worker_does_not_keep_the_others_idle(self) -> None:
        self.enqueue("true")
        pool = self.pool("--count", "3")
        self.wait_for_state("1", "completed")
        self.wait_for_workers(3)
        self.wait_for_poll(pool)
        first = min(self.workers().values(), key=operator.itemgetter("slot"))["pid"]
        os.kill(first, signal.SIGSTOP)
        for _ in range(3):
            self.wait_for_state(self.enqueue("true"), "completed", 2 * self.second_here())
        pool.terminate()  # continues the worker, which then exits
        self.assert_exits(pool, 0)

    @SLOW
    def test_pool_hears_signals_while_a_worker_with_a_cancelled_job_is_stopped(self) -> None:
        job = self.enqueue("touch began; sleep 300")
        pool = self.pool()
        self.wait_for_file("began")
        (worker,) = (facts["pid"] for facts in self.workers().values())
        os.kill(worker, signal.SIGSTOP)
        cancel = self.start("cancel", job)
        wait_until(lambda: self.job(job).cancel_requested)
        self.wait_for_poll(pool)
        pool.terminate()
        self.wait_for_output(pool, "SIGTERM: no new jobs", self.second_here())
        self.assert_exits(pool, 0)
        self.assertEqual((cancel.wait(10), self.job(job).state), (0, "cancelled"))

    @internal
    def test_pool_never_waits_for_the_pipe_of_a_worker(self) -> None:
        code = """if True:
            import multiprocessing, os, signal, queuectl
            ours, theirs = multiprocessing.Pipe()
            worker = queuectl.WorkerHandle("worker-a-1", 1, None, ours)
            signal.alarm(5)
            for number in range(100_000):
                worker.send("cancel", str(number))
            os.write(theirs.fileno(), b'[["event", "a"]]\\n[["ev')
            print(worker.read(), end="")
            os.write(theirs.fileno(), b'ent", "b"]]\\n')
            print(worker.read(), end="")
        """
        result = self.script(code)
        found = (result.returncode, result.stdout)
        self.assertEqual(found, (0, "[[['event', 'a']]][[['event', 'b']]]"), result.stderr)

    @SLOW
    @internal
    def test_pool_stops_even_if_the_start_of_a_worker_hangs(self) -> None:
        self.enqueue("true")
        hanging = threading.Event()
        self.addCleanup(hanging.set)
        start = queuectl.start_worker

        def hang(*worker: Any, **options: Any) -> Any:
            if worker[2] == 2:
                hanging.wait()
                raise EOFError
            return start(*worker, **options)

        with futures.ThreadPoolExecutor() as executor, mock.patch.object(
            queuectl, "start_worker", hang
        ):
            pool = executor.submit(queuectl.work, self.path, 2)
            self.wait_for_state("1", "completed")
            stopping = executor.submit(self.process, *PYTHON, PROGRAM, "worker", "stop")
            self.assertEqual(pool.result(5), 0)
            self.assertEqual(stopping.result(5).returncode, 0)

    def test_pool_hears_signals_while_its_fork_server_is_stopped(self) -> None:
        pool = self.pool()
        self.wait_for_workers(1)
        (worker,) = (facts["pid"] for facts in self.workers().values())
        with open(f"/proc/{worker}/stat") as file:
            server = int(file.read().rpartition(")")[2].split()[1])
        os.kill(server, signal.SIGSTOP)
        self.addCleanup(os.kill, server, 9)
        os.kill(worker, 9)
        self.wait_for_output(pool, " died\n")
        pool.terminate()
        self.wait_for_output(pool, "SIGTERM: no new jobs", 2 * self.second_here())

    def test_events_are_printed_in_the_order_in_which_they_happened(self) -> None:
        with Queue(self.path) as queue:
            for number in range(12):
                build = queue.enqueue("true", id=f"build{number}")
                for name in ("smoke", "lint"):
                    queue.enqueue("exit 1", id=f"{name}{number}", after=[build], max_retries=1)
        lines = self.drain("--count", "2", code=1).splitlines()
        order = [line.split(" job ")[1].split()[0] for line in lines if " job " in line]
        self.assertEqual(len(order), 36)
        for number in range(12):
            built = order.index(f"build{number}")
            for name in ("smoke", "lint"):
                self.assertLess(built, order.index(f"{name}{number}"), lines)

    def test_event_is_printed_promptly(self) -> None:
        pool = self.pool()
        self.wait_for_workers(1)
        self.wait_for_state(self.enqueue("true"), "completed")
        began = time.monotonic()
        self.wait_for_output(pool, "job 1 completed")
        self.assertLess(time.monotonic() - began, self.second_here() / 2)

    @SLOW
    def test_8_workers_run_each_of_500_jobs_once(self) -> None:
        jobs = "".join(f'{{"command":"echo {n} >> lines"}}\n' for n in range(500))
        self.stdout("enqueue", "-", stdin=jobs)
        self.drain("--count", "8")
        self.assertEqual(sorted(map(int, self.read("lines").split())), list(range(500)))

    @SLOW
    def test_two_pools_share_the_jobs(self) -> None:
        for number in range(60):
            self.enqueue(f"echo {number} >> lines; sleep 0.02")
        pools = [self.pool("--count", "2", "--drain") for _ in range(2)]
        for pool in pools:
            output = pool.communicate(timeout=30)[0]
            self.assertEqual(pool.returncode, 0, output)
            self.assertIn("completed", output)
        self.assertEqual(sorted(map(int, self.read("lines").split())), list(range(60)))

    def test_pools_of_two_queues_run_in_threads_of_one_process(self) -> None:
        main = sys.modules["__main__"]
        paths = [self.file("a.db"), self.file("b.db")]
        for path in paths:
            with Queue(path) as queue:
                queue.enqueue_many({"command": "true"} for _ in range(8))
        start = partial(queuectl.work, count=3, drain=True)
        threads = [threading.Thread(target=start, args=(path,)) for path in paths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        self.assertIs(sys.modules["__main__"], main)
        for path in paths:
            with Queue(path) as queue:
                self.assertEqual(queue.counts()["completed"], 8)


class PoolFiles(Live):
    """A pool whose files are gone lets its job finish, exits, and touches no other file."""

    def start_busy_pool(self) -> subprocess.Popen[str]:
        """Start a pool; return it when it runs a job, which ends when the test says go."""
        self.enqueue(f"touch began; {RUN_UNTIL_GO}")
        pool = self.pool("--quiet")
        self.wait_for_file("began")
        return pool

    def assert_exits(self, pool: subprocess.Popen[str]) -> None:
        """Check that the pool exits after its job because the database is gone."""
        self.write("go")
        output = pool.communicate(timeout=10)[0]
        message = f"queuectl: {self.path} was moved away or replaced\n"
        self.assertEqual((pool.returncode, output), (4, message))
        wait_until(lambda: not self.leftover_processes())

    @SLOW
    def test_pool_exits_if_the_database_is_moved(self) -> None:
        pool = self.start_busy_pool()
        os.rename(self.path, self.file("moved.db"))
        line = self.assert_refused("enqueue", "true", code=4)
        self.assertIn("-wal", line)  # a new database would replay the old log
        self.assert_exits(pool)
        self.assertFalse(os.path.exists(self.path))
        os.rename(self.file("moved.db"), self.path)
        self.drain()
        self.assertEqual((self.job("1").state, self.job("1").attempts), ("completed", 1))

    @SLOW
    def test_pool_exits_if_the_run_directory_is_removed(self) -> None:
        pool = self.start_busy_pool()
        shutil.rmtree(self.path + ".run")
        waiting = self.enqueue("true", max_retries=1)
        self.write("go")
        output = pool.communicate(timeout=10)[0]
        self.assertRegex(output, r"queuectl.db.run/pool-\w+ was moved away or replaced\n\Z")
        self.assertEqual(pool.returncode, 4)
        self.assertEqual((self.job("1").state, self.job("1").attempts), ("completed", 1))
        self.drain()
        self.assertEqual(self.job(waiting).state, "completed")

    @SLOW
    def test_pool_does_not_touch_a_database_of_another_program_in_its_place(self) -> None:
        pool = self.start_busy_pool()
        with self.connect(self.file("other.db")) as db:
            db.execute("CREATE TABLE t (x)")
        before = digest(self.file("other.db"))
        os.rename(self.file("other.db"), self.path)
        self.assert_exits(pool)
        self.assertEqual(digest(self.path), before)

    def test_pool_does_not_touch_a_new_queue_in_its_place(self) -> None:
        pool = self.start_busy_pool()
        for suffix in ("", "-wal", "-shm"):
            os.rename(self.path + suffix, self.file("moved.db" + suffix))
        with Queue(self.path) as queue:  # keeps jobs in its log while the old pool exits
            ids = [queue.enqueue("true") for _ in range(20)]
            before = digest(self.path + "-wal")
            self.assert_exits(pool)
            self.assertEqual(digest(self.path + "-wal"), before)
            self.assertEqual(len(self.stdout("list", "--json").splitlines()), len(ids))
        self.assertEqual(self.states(), dict.fromkeys(ids, "pending"))
        self.assert_sound(self.path)
        self.assert_sound(self.file("moved.db"))


class PoolTrouble(Clocked):
    """A pool that cannot do its work."""

    @internal
    def test_poll_that_fails_is_repeated_as_a_whole(self) -> None:
        pool = make_pool(self, self.queue)
        self.queue.enqueue("true", delay=60)
        fault = queuectl.Fault("disk I/O error")
        with mock.patch.object(pool.changes.reader, "next_ready_time", side_effect=fault):
            self.assertTrue(pool.attempt(pool.poll))
        pool.poll()
        self.assertEqual(pool.changes.ready_at, self.now + 60)

    @internal
    def test_worker_whose_start_fails_in_any_way_is_started_again_later(self) -> None:
        crew = make_pool(self, self.queue).crew
        full = "_multiprocessing.so: cannot open shared object file: Too many open files"
        failures = (OSError(24, "Too many open files"), EOFError(), ImportError(full))
        for error in failures:
            with mock.patch.object(queuectl, "start_worker", side_effect=error):
                crew.start_workers([1])
        reasons = ["Too many open files", "its fork server died", full]
        self.assertEqual(list(crew.troubles), reasons)
        self.assertGreater(crew.start_at, time.monotonic())

    def test_worker_added_as_the_thread_ends_is_seen(self) -> None:
        crew = make_pool(self, self.queue).crew
        ours, theirs = multiprocessing.Pipe()
        self.addCleanup(theirs.close)
        self.addCleanup(ours.close)

        def end_thread() -> bool:
            crew.add(queuectl.WorkerHandle("worker-x-1", 1, None, ours))
            return False

        crew.thread = mock.Mock()
        crew.thread.is_alive.side_effect = end_thread
        with mock.patch.object(threading.Thread, "start") as start:
            crew.start_missing()  # no second worker in its slot
        start.assert_not_called()
        crew.workers.clear()
        self.assertTrue(crew.is_alive())

    @internal
    def test_pool_reports_each_problem_once_a_minute(self) -> None:
        reports: list[str] = []
        pool = make_pool(self, self.queue, say=reports.append)
        for problem in ("a", "b", "a", "b"):
            pool.notices.report(problem)
        self.assertEqual(reports, ["a", "b"])
        pool.notices.reported["a"] -= 61
        pool.notices.report("a")
        self.assertEqual(reports, ["a", "b", "a"])
        for problem in pool.notices.reported:
            pool.notices.reported[problem] -= 61
        pool.notices.report("c")
        self.assertEqual(list(pool.notices.reported), ["c"])  # the others are forgotten


class PoolTroubleLive(Live):
    """A pool reports a failure of the machine, and continues or exits."""

    @internal
    def test_worker_start_is_tried_again_after_the_fork_server_died(self) -> None:
        self.enqueue("true")
        starts = [EOFError("unexpected EOF"), mock.DEFAULT, mock.DEFAULT]
        start = mock.patch.object(
            queuectl, "start_worker", wraps=queuectl.start_worker, side_effect=starts
        )
        with start:
            self.assertEqual(queuectl.work(self.path, 2, drain=True), 0)
        failures = [ConnectionRefusedError()] * 9
        failing = mock.patch.object(queuectl, "start_worker", side_effect=failures)
        with failing, self.assertRaises(queuectl.Fault):
            queuectl.work(self.path, 9, drain=True)

    @internal
    def test_pool_that_fails_leaves_no_handler_and_no_lock_behind(self) -> None:
        Queue(self.path).close()
        queuectl.work(self.path, drain=True)  # starts the fork server, which stays
        before = [signal.getsignal(number) for number in STOP_SIGNALS]
        descriptors = len(os.listdir("/dev/fd"))
        fault = OSError(5, os.strerror(5))
        for owner, name in ((queuectl, "sync_file"), (queuectl.SYSTEM, "make_wakeup")):
            failing = mock.patch.object(owner, name, side_effect=fault)
            with self.subTest(name), failing, self.assertRaisesRegex(queuectl.Fault, "Input/out"):
                queuectl.work(self.path, drain=True, signals=True)
            self.assertEqual([signal.getsignal(number) for number in STOP_SIGNALS], before)
            wait_until(lambda: not queuectl.RunDirectory(self.path).files())
        self.assertLessEqual(len(os.listdir("/dev/fd")), descriptors)

    def test_retention_prunes_a_cancelled_chain_promptly(self) -> None:
        with Queue(self.path) as queue:
            enqueue_graph(queue, "1", *(f"{number} {number - 1}" for number in range(2, 7)))
            queue.cancel(["1"], cascade=True)
            queue.configure("retention", "0.001s")
        self.pool()
        wait_until(lambda: not self.states(), 5)

    @SLOW
    def test_pool_denied_access_for_a_while_reports_it_and_continues(self) -> None:
        self.enqueue("true")
        pool = self.pool(prefix=obeying_modes(self))
        self.wait_for_state("1", "completed")
        os.chmod(self.dir, 0)
        self.wait_for_output(pool, "queuectl.db: Permission denied; trying again")
        os.chmod(self.dir, 0o700)
        self.wait_for_state(self.enqueue("true"), "completed")

    @SLOW
    def test_failed_sync_is_reported_and_retried(self) -> None:
        pool = self.pool()
        self.wait_for_state(self.enqueue("true"), "completed")
        strace = inject(self, pool.pid, "-e", "inject=fdatasync,fsync:error=EIO")
        self.wait_for_state(self.enqueue("true"), "completed")
        self.wait_for_output(pool, "Input/output error; trying again")
        wait_until(lambda: self.read("trace").count("sync(") > 4)  # even with nothing new to sync
        strace.terminate()
        self.wait_for_state(self.enqueue("true"), "completed")
        pool.terminate()
        self.assert_exits(pool, 0)

    @SLOW
    def test_pool_unable_to_start_workers_reports_it_and_exits(self) -> None:
        self.require_tool("strace", "-o", "/dev/null", "true")
        self.enqueue("true")
        strace = ["strace", "-f", "-o", "/dev/null", *FAIL_FORKS]
        line = self.assert_refused(
            "worker", "start", "--quiet", "--count", "6", code=4, prefix=strace
        )
        self.assertIn("temporarily unavailable", line)
        self.assertEqual(self.job("1").attempts, 0)

    def test_drain_does_not_wait_for_a_worker_that_cannot_be_started(self) -> None:
        self.enqueue(f"echo $PPID > busy; {RUN_UNTIL_GO}")
        pool = self.pool("--count", "2", "--drain")
        self.wait_for_workers(2)
        self.wait_for_file("busy", "\n")
        exhaust_descriptors(pool.pid)
        pids = {facts["pid"] for facts in self.workers().values()}
        (idle,) = pids - {int(self.read("busy"))}
        os.kill(idle, 9)
        self.wait_for_output(pool, "cannot be started")
        self.write("go")
        self.assert_exits(pool, 0)

    @SLOW
    def test_pool_without_descriptors_reports_it_and_continues_when_it_has_some(self) -> None:
        pool = self.pool("--count", "2")
        self.wait_for_workers(2)
        restore = exhaust_descriptors(pool.pid)
        os.kill(next(iter(self.workers().values()))["pid"], 9)
        self.wait_for_output(pool, "cannot be started: Too many open files; trying again")
        restore()
        self.wait_for_workers(2)
        self.wait_for_state(self.enqueue("true"), "completed")


# --- words ----------------------------------------------------------------------------------------


@NEEDS_SHELL
class WordsWhy(Clocked):
    """Why a job waits, in one phrase."""

    @internal
    def test_waiting_job_has_its_reason_in_one_line(self) -> None:
        for job_id, fields in {
            "first": {"run_at": 9e5},
            "x": {},
            "later": {"delay": 7200},
            "gpu": {"queue": "gpu"},
            "seven": {"queue": "cpu", "priority": 1, "max_retries": 1},
            "child": {"after": "seven"},
        }.items():
            self.queue.enqueue("true", id=job_id, **fields)
        self.assertEqual(self.claim("cpu").id, "seven")
        without_pool = {
            "x": "no worker is running",
            "child": "blocked by seven (processing)",
            "seven": "its worker died; recover it with: queuectl worker start",
        }
        self.assert_table(without_pool, self.why)
        self.finish(1, self.queue.get("seven"))
        pool_lock = queuectl.LockFile(self.queue._db.run_dir.file("pool-1"))
        pool_lock.write_note(queues=["default"])
        self.addCleanup(pool_lock.close)
        with_pool = {
            "first": "next to run",
            "x": "1 job before it",
            "later": "due in 2h",
            "gpu": "no worker serves queue gpu",
            "child": "blocked by seven (dead)",
            "seven": "",
        }
        self.assert_table(with_pool, self.why)
        self.assertRegex(self.stdout("show", "gpu"), r"\nwhy +no worker serves queue gpu\n")
        self.queue.pause("gpu")
        self.assert_table(
            {"gpu": "queue gpu is paused (queuectl resume --queue gpu)", "x": "1 job before it"},
            self.why,
        )
        self.queue.pause()
        self.assertEqual(self.why("x"), "all queues are paused (queuectl resume)")
        for _ in range(311):
            self.queue.enqueue("true", priority=1)
        self.queue.resume()
        self.assertEqual(self.why("x"), "312 jobs before it")
        self.queue.enqueue("true", id="last", after=["x", "later", "gpu", "first", "child"])
        self.assertRegex(
            self.why("last"), r"blocked by \w+ \(\w+\), \w+ \(\w+\), \w+ \(\w+\) and 2 more"
        )
        self.write(self.queue._db.run_dir.file("pool-1.stop"))
        self.assertEqual(self.why("x"), "all workers are stopping")


@NEEDS_SHELL
class WordsProgress(Clocked):
    """How far jobs have come, for a progress line or `status --watch`."""

    @internal
    def test_progress_counts_runnable_jobs_and_describes_waiting_ones(self) -> None:
        survey = partial(queuectl.survey_queues, self.queue._reader)
        progress = queuectl.Progress(survey, self.queue._reader.clock)
        self.assertEqual(progress.line(), "no job can run yet")
        enqueue_graph(self.queue, "a", "b", "c a", "d c")
        for delay in (9.5 * 3600, 20 * 3600):
            self.queue.enqueue("true", delay=delay)
        waiting = "2 scheduled (next in 9h30m)"
        self.assertEqual(progress.line(), f"0/2 jobs, 0.0/s, {waiting}, 2 blocked")
        self.finish()
        line = rf"1/3 jobs, \d+\.\d/s, \S+ s left, {re.escape(waiting)}, 1 blocked"
        self.assertRegex(progress.line(), line)
        self.finish(1)
        self.finish(1)
        self.assertEqual(progress.line(), f"3/3 jobs, 2 failed, {waiting}, 1 blocked")

    @internal
    def test_progress_of_named_jobs_tells_when_the_next_is_due(self) -> None:
        self.queue.enqueue("true", id="x", delay=7200)
        self.queue.enqueue("true", id="y", after="x")
        reader = self.queue._reader
        watch = queuectl.JobWatch(reader, reader.named(["x", "y"]))
        survey = partial(queuectl.survey_jobs, watch)
        line = queuectl.Progress(survey, reader.clock).line()
        self.assertEqual(line, "no job can run yet, 1 scheduled (next in 2h), 1 blocked")

    @internal
    def test_rate_is_over_the_last_minute_or_the_age_of_the_pools(self) -> None:
        for _ in range(6):
            self.queue.enqueue("true")
        self.run_all()
        self.assertEqual(queuectl.status_facts(self.queue._reader)["rate"], 0.1)
        for name, age, rate in (("pool-1", 3, 2.0), ("pool-2", 90, 0.1)):
            lock = queuectl.LockFile(self.queue._db.run_dir.file(name))
            self.addCleanup(lock.close)
            lock.write_note(started=self.now - age)
            self.assertEqual(queuectl.status_facts(self.queue._reader)["rate"], rate)

    def test_status_tells_when_the_next_scheduled_job_is_due(self) -> None:
        self.queue.enqueue("true")
        self.assertNotIn("next ", self.stdout("status"))
        self.queue.enqueue("true", run_at=time.time() + 9 * 3600 + 60)
        self.assertRegex(self.stdout("status"), r"\nnext +due in 9h")


# --- report ---------------------------------------------------------------------------------------


@NEEDS_SHELL
class ReportFacts(Reported):
    """The facts of a report, as its JSON has them."""

    def test_facts_of_jobs_attempts_failures_and_schedules(self) -> None:
        self.run_jobs()
        facts = self.facts()
        states = {state: facts[state] for state in queuectl.STATES}
        expected = {"pending": 2, "processing": 0, "completed": 2, "dead": 2, "cancelled": 1}
        self.assertEqual(states, expected)
        keys = ("jobs", "attempts", "took_p50", "took_p95", "took_max", "flaky_number")
        self.assertEqual([facts[key] for key in keys], [7, 7, 1.0, 4.0, 4.0, 1])
        self.assertEqual(facts["outcomes"], {"completed": 2, "failed": 5})
        groups = {group["reason"]: group for group in facts["failures"]}
        self.assertEqual(set(groups), {"exit code 3", "exit code 1", "cannot start: no"})
        group = groups["exit code 3"]
        self.assertEqual((group["attempts"], group["dead"], group["run"]), (2, 1, 2))
        self.assertEqual(group["last_line"], queuectl.printable(HOSTILE + "\\xff"))
        self.assertEqual([job["id"] for job in facts["dead_jobs"]], [HOSTILE_ID, "nowhere"])
        self.assertEqual([job["took"] for job in facts["slowest"][:3]], [4.0, 3.0, 1.0])
        self.assertEqual([job["attempts"] for job in facts["retried"]], [3, 2])
        self.assertEqual([(job["id"], job["failures"]) for job in facts["flaky"]], [("flaky", 1)])
        self.assertEqual(facts["schedules"][0]["rule"], "every 1h")
        self.now += 107
        self.attempt()
        self.assertEqual(self.facts("nightly.1")["schedules"][0]["started_late"], 7.0)

    def test_selection_and_since_limit_jobs_attempts_and_charts(self) -> None:
        self.run_jobs()
        cases = {
            ("good", "flaky"): (2, 4),
            ("--queue", HOSTILE_ID): (1, 2),
            ("--state", "dead"): (2, 3),
            ("--match", "NO"): (1, 1),
            ("--since", "1m"): (7, 7),
            ("--since", "2s"): (5, 2),  # of one job, only the second attempt
            ("--since", "0.5s", "--state", "dead"): (1, 1),
            ("--since", "5s", "good"): (0, 0),
        }
        for args, numbers in cases.items():
            with self.subTest(args):
                facts = self.facts(*args)
                self.assertEqual((facts["jobs"], facts["attempts"]), numbers)
                number = sum(b["number"] for lane in facts["gantt"]["lanes"] for b in lane)
                self.assertEqual(number, numbers[1])

    @internal
    def test_quantiles_and_histogram_of_durations(self) -> None:
        values = [n / 100 for n in range(1, 1001)]
        expected = {"x_p50": 5.0, "x_p95": 9.5, "x_max": 10.0}
        self.assertEqual(queuectl.time_facts("x", values[::-1]), expected)
        self.assertEqual(queuectl.time_facts("x", []), dict.fromkeys(expected, 0.0))
        bins = queuectl.histogram([*values, 0.0])
        self.assertEqual(sum(number for *_, number in bins), 1001)
        self.assertEqual(bins[0][2], 1)
        self.assertEqual(bins, sorted(bins))

    @internal
    def test_lists_hold_the_largest(self) -> None:
        found = queuectl.Notable()
        for n in reversed(range(50)):
            found.put("slowest", n * 7 % 50, {"n": n * 7 % 50})
        shown = [item["n"] for item in found.facts()["slowest"]]
        self.assertEqual(shown, list(range(49, 39, -1)))

    @internal
    def test_report_of_a_drain_leaves_out_what_other_pools_ran(self) -> None:
        for job_id, worker in (("before", "aa"), ("ours", "aa"), ("theirs", "bb")):
            self.queue.enqueue("true", id=job_id)
            self.now += 10
            self.attempt(worker=f"worker-{worker}-1")
        for job_id, more in (("left", {}), ("elsewhere", {"queue": "x"}), ("later", {"delay": 9})):
            self.queue.enqueue("true", id=job_id, **more)
        found = queuectl.drain_histories(self.queue._reader, ["default"], "pool-aa", self.now - 15)
        self.assertEqual([history.job.id for history in found], ["ours", "left"])

    def test_notifications_that_completed_are_left_out(self) -> None:
        self.queue.configure("max_retries", "1")
        for code in (0, 1):
            self.queue.enqueue("true", on_end="notify", max_retries=1)
            self.attempt()
            self.attempt(code)
            if code:
                for _ in range(4):
                    self.now += 1000
                    self.attempt(1)
        self.assertEqual((self.facts()["jobs"], self.facts("--since", "1d")["jobs"]), (3, 3))

    @internal
    def test_timeline_keeps_its_sums_in_few_buckets(self) -> None:
        found = queuectl.Timeline()
        for n in range(3000):
            found.add(1e9 + n * n, "x", 1 + n % 2)
        facts = found.facts(["x", "y"], 100)
        self.assertEqual(sum(facts["x"]), 4500)
        self.assertLessEqual(len(facts["x"]), 100)
        self.assertEqual(facts["width"], 604800)
        self.assertLessEqual(facts["start"], 1e9)
        self.assertGreater(facts["start"] + facts["width"] * len(facts["x"]), 1e9 + 2999**2)

    @internal
    def test_depth_over_time_ends_with_the_present_counts(self) -> None:
        self.run_jobs()
        self.queue.enqueue("true", id="now", priority=9)
        self.claim()
        facts = self.facts()
        for state in queuectl.STATES:
            with self.subTest(state):
                depth = facts["depth"][state]
                self.assertEqual((depth[-1], min(depth) >= 0), (facts[state], True))
        self.assertEqual(facts["gantt"]["lanes"][0][-1]["outcome"], "running")
        finished = facts["finished"]
        self.assertEqual((sum(finished["completed"]), sum(finished["dead"])), (2, 2))

    def test_depth_over_time_of_a_job_cancelled_after_an_attempt(self) -> None:
        self.queue.enqueue("true", id="x")
        self.attempt(1)
        self.now += 100
        self.queue.cancel("x")
        depth = self.facts()["depth"]
        self.assertEqual(sum(depth["cancelled"]), 1)
        self.assertGreater(sum(depth["pending"]), 90 / depth["width"])

    @internal
    def test_gantt_merges_short_attempts_and_keeps_failures_visible(self) -> None:
        job = make_job(id="x", state="completed")
        gantt = queuectl.Gantt(0.0)
        for n in range(40000):
            name = f"worker-aa-{n % 2 + 1 + 2 * (n > 20000)}"
            outcome = "failed" if n == 777 else "completed"
            took = 500.0 if n == 39000 else 0.01
            run = queuectl.Attempt(n, name, outcome, 0.0, n, n + took, 0, None, 0, b"")
            gantt.add(queuectl.history(job, [run]))
            self.assertLessEqual(sum(map(len, gantt.by_worker.values())), 2 * queuectl.BARS)
        facts = gantt.facts()
        self.assertEqual(len(facts["lanes"]), 2)  # workers 3 and 4 replaced 1 and 2
        bars = [bar for lane in facts["lanes"] for bar in lane]
        self.assertEqual(sum(bar["number"] for bar in bars), 40000)
        self.assertLess(len(bars), 2100)
        (failed,) = [bar for bar in bars if bar["failures"]]
        self.assertEqual((failed["outcome"], failed["failures"]), ("failed", 1))
        self.assertEqual([b["number"] for b in bars if b["finished"] - b["started"] == 500], [1])

    @internal
    def test_gantt_of_more_workers_than_bars_merges_those_in_a_lane(self) -> None:
        job = make_job(id="x", state="completed")
        gantt = queuectl.Gantt(0.0)
        with mock.patch.object(queuectl, "BARS", 200):
            for n in range(5000):
                name = f"worker-{n}-1"  # a drain of its own each minute
                runs = [
                    queuectl.Attempt(
                        i, name, "completed", 0.0, 60 * n + i, 60 * n + i, 0, None, 0, b""
                    )
                    for i in range(3)
                ]
                gantt.add(queuectl.history(job, runs))
            facts = gantt.facts()
        (lane,) = facts["lanes"]
        self.assertEqual(sum(bar["number"] for bar in lane), 15000)
        self.assertLessEqual(len(lane), 200)

    @SLOW
    @internal
    def test_50000_jobs_take_5_s_and_5_mb(self) -> None:
        with self.queue._db.transaction():
            self.queue._db.execute(f"WITH {NUMBERS} {FAKE_JOBS}", {"number": 50000})
            self.queue._db.execute(f"WITH {NUMBERS} {FAKE_ATTEMPTS}", {"number": 60000})
        for style in queuectl.FORMATS:
            began = time.process_time()
            text = self.report(style)
            with self.subTest(style):
                self.assertLess(time.process_time() - began, 5)
                self.assertLess(len(text), 40e6 if style == "junit" else 5e6)


@NEEDS_SHELL
class ReportFormats(Reported):
    """What each format holds; hostile jobs in all of them."""

    def test_html_has_every_part_and_nothing_that_runs_or_is_loaded(self) -> None:
        self.run_jobs()
        page = self.report("html")
        tags = Tags(page)
        ids = [attrs["id"] for tag, attrs in tags.found if tag == "section"]
        self.assertEqual(ids, list(queuectl.PARTS))
        names = {name for _, attrs in tags.found for name in attrs}
        self.assertEqual([n for n in names if n[:2] == "on" or n in ("style", "src", "href")], [])
        self.assertLessEqual(
            {"svg", "rect", "title", "details", "pre", "table"}, dict(tags.found).keys()
        )
        self.assertFalse({"script", "link", "img", "iframe", "a"} & dict(tags.found).keys())
        self.assertNotIn("url(", page)
        self.assertIn(HOSTILE_ID, tags.text)
        self.assertIn(queuectl.printable(HOSTILE) + "\\xff", tags.text)
        self.assertRegex(tags.text, r"job good completed; \S+ to \S+ \(4 s\)")
        self.assertEqual([c for c in page if not c.isprintable() and c != "\n"], [])

    @internal
    def test_html_of_an_empty_queue_and_with_a_nonce(self) -> None:
        self.assertIn("No attempts yet", self.report("html"))
        page = queuectl.html_page("<&\ud800", "<p>body</p>", nonce='n"')
        self.assertIn("<title>&#60;&#38;\\ud800</title>", page)
        self.assertEqual(dict(Tags(page).found)["style"], {"nonce": 'n"'})
        self.assertIn("</style></head>\n<body><p>body</p></body>", page)

    def test_junit_cases_by_outcome_in_the_order_of_the_schema(self) -> None:
        self.run_jobs()
        self.now += 200
        root = xml.etree.ElementTree.fromstring(self.report("junit"))
        suites = {suite.get("name"): suite for suite in root}
        self.assertEqual(set(suites), {"default", HOSTILE_ID})
        attributes = {"name": "default", "tests": "6", "errors": "1", "skipped": "3"}
        attributes.update(failures="0", time="8.000")
        self.assertEqual(suites["default"].attrib, attributes)
        cases = {case.get("name"): [item.tag for item in case] for case in root.iter("testcase")}
        expected = {"good": [], "flaky": ["flakyFailure"], "nowhere": ["error"]}
        expected.update({name: ["skipped"] for name in ("blocked", "cancelled", "nightly.1")})
        self.assertEqual(cases, {**expected, HOSTILE_ID: ["failure", "rerunFailure"]})
        (case,) = suites[HOSTILE_ID]
        named = {"name": HOSTILE_ID, "classname": HOSTILE_ID, "time": "1.000"}
        self.assertEqual(case.attrib, named)
        self.assertEqual(case[0].attrib, {"message": "exit code 3", "type": "failed"})
        text = HOSTILE.replace("\0", "#x0").replace("\x1b", "#x1B") + "\\xff\n"
        self.assertEqual(case[0].text, f"exit code 3\n{text}")
        self.assertEqual([item.tag for item in case[1]], ["stackTrace"])
        messages = {
            case.get("name"): case[0].get("message") for case in root.iterfind(".//skipped/..")
        }
        reasons = ("blocked by nowhere (dead)", "cancelled by the operator", "pending")
        self.assertEqual(messages, dict(zip(("blocked", "cancelled", "nightly.1"), reasons)))

    def test_junit_shows_a_limited_amount_of_output(self) -> None:
        self.run_jobs()
        with mock.patch.object(queuectl, "JUNIT_OUTPUT", 1):
            root = xml.etree.ElementTree.fromstring(self.report("junit"))
        texts = [
            item.findtext(".//stackTrace") or item.text for item in root.iterfind(".//*[@type]")
        ]
        self.assertEqual(sum("output is left out" in str(text) for text in texts), len(texts) - 1)

    def test_output_that_is_cut_begins_with_a_line_that_says_so(self) -> None:
        self.queue.enqueue("seq", id="long", max_retries=1)
        self.queue.enqueue("true", id="child", after="long")
        lines = "".join(f"line {number:4}\n" for number in range(1000))
        self.attempt(1, output=lines.encode())
        for style in ("junit", "markdown"):
            with self.subTest(style):
                text = self.report(style)
                note, first = re.findall(r"\[(\d+) bytes.*left out\]\nline +(\d+)\n", text)[0]
                self.assertEqual(int(note), int(first) * 10)
                self.assertIn("line  999", text)
        self.assertIn("#### Blocked jobs\n", self.report("markdown"))
        self.assertIn("| child | default | blocked by long (dead) |", self.report("markdown"))

    @internal
    def test_xml_holds_any_character(self) -> None:
        every = "".join(map(chr, (*range(0x300), 0xD800, 0xDFFF, 0xFFFE, 0x10FFFF)))
        tag = queuectl.xml_tag("a", b=every) + queuectl.xml_text(every) + "</a>"
        found = xml.etree.ElementTree.fromstring(tag)
        shown = re.sub(
            "[\0-\x08\x0b\x0c\x0e-\x1f\ud800\udfff\ufffe]", lambda m: f"#x{ord(m[0]):X}", every
        )
        self.assertEqual((found.text, found.get("b")), (shown, shown))

    def test_markdown_is_inert_and_within_the_limit_of_github(self) -> None:
        self.run_jobs()
        found = self.report("markdown")
        self.assertIn("\n````text\n" + queuectl.printable(HOSTILE) + "\\xff\n````\n", found)
        outside = re.sub(r"(?s)````text.*?````", "", found)
        self.assertNotIn("<script>", outside)
        rows = [line for line in outside.splitlines() if line.startswith("|")]
        self.assertLess(len(rows), 30)
        for row in rows:
            self.assertIn(row.count("|"), (4, 5, 6, 9))
        self.queue.configure("max_retries", "1")
        noise = bytes([240, 159, 152, 128]) * 1100  # four bytes each
        for _ in range(250):
            self.queue.enqueue("false")
            self.attempt(1, output=noise)
        found = self.report("markdown")
        self.assertLess(len(found.encode()), 900_000)
        self.assertGreater(len(found.encode()), 880_000)
        self.assertRegex(found, r"\n\d\d parts left out: a summary may not be larger\n\Z")

    def metrics(self, *args: str) -> dict[str, str]:
        """Return the metrics by name and labels, after checking the form of each line."""
        text = self.report("prometheus", *args)
        families = re.findall(r"(?m)^# TYPE (\w+) (?:gauge|counter|summary)$", text)
        self.assertEqual(re.findall(r"(?m)^# HELP (\w+) .", text), families)
        self.assertEqual(len(set(families)), len(families))
        samples = [line.rpartition(" ") for line in text.splitlines() if line[0] != "#"]
        for name, _, value in samples:
            self.assertRegex(name, r'\Aqueuectl_\w+\{\w+="([^\\"]|\\.)*"(,\w+="\w[\w ]*")*\}\Z')
            float(value)
        return {name: value for name, _, value in samples}

    def test_prometheus_metrics_and_counters_survive_a_prune(self) -> None:
        self.run_jobs()
        self.queue.pause("default")
        self.queue.configure("limit", "7", queue="default")
        self.queue.enqueue("true", id="ready")
        before = self.metrics()
        label = HOSTILE_ID.replace('"', r"\"")
        expected = {
            'jobs{queue="default",state="pending"}': "3",
            f'jobs{{queue="{label}",state="dead"}}': "1",
            'attempts_total{queue="default",outcome="failed"}': "3",
            'attempt_seconds_sum{queue="default"}': "10",
            'attempt_seconds_count{queue="default"}': "5",
            'wait_seconds_count{queue="default"}': "5",
            'paused{queue="default"}': "1",
            'limit{queue="default"}': "7",
            f'limit{{queue="{label}"}}': "0",
            f'paused{{queue="{label}"}}': "0",
            'workers{state="busy"}': "0",
            'last_completed_timestamp_seconds{queue="default"}': "1000011",
            f'build_info{{version="{queuectl.__version__}"}}': "1",
        }
        for name, value in expected.items():
            with self.subTest(name):
                self.assertEqual(before["queuectl_" + name], value)
        self.assertEqual([name for name in before if "flaky" in name or 'ready"' in name], [])
        self.queue.prune(states=queuectl.FINISHED)
        after = self.metrics()
        for name, value in before.items():
            if "_jobs{" not in name and "_ready_" not in name:
                self.assertEqual(after.get(name), value, name)
        self.assertLess(len(self.metrics("--queue", HOSTILE_ID)), 25)
        self.assert_refused("report", "--format", "prometheus", "--state", "dead")

    @internal
    def test_oldest_due_is_found_at_each_priority(self) -> None:
        for priority, age in ((0, 5), (9, 1), (-3, 7), (4, 2)):
            self.queue.enqueue("true", priority=priority, run_at=self.now - age)
        self.queue.enqueue("true", queue="other", run_at=self.now - 99)
        self.assertEqual(self.queue._reader.oldest_due("default"), self.now - 7)
        self.assertIsNone(self.queue._reader.oldest_due("none"))
        name = 'queuectl_oldest_ready_seconds{queue="default"}'
        self.assertEqual(self.metrics()[name], "7")

    def test_text_fits_on_a_screen_and_json_is_one_ascii_object(self) -> None:
        self.run_jobs()
        lines = self.stdout("report").splitlines()
        self.assertLess(len(lines), 30)
        self.assertTrue(all(line.isprintable() for line in lines))
        for word in ("2 completed, 2 dead", "QUEUES", "FAILURES", "SLOWEST", "RETRIED", "FLAKY"):
            self.assertIn(word, "\n".join(lines))
        text = self.report("json")
        self.assertTrue(text.isascii())
        self.assertEqual(text.count("\n"), 1)

    def test_format_follows_the_ending_and_files_are_replaced_whole(self) -> None:
        self.run_jobs()
        starts = {".html": "<!DOCTYPE", ".xml": "<?xml", ".md": "### ", ".prom": "# HELP"}
        for ending, start in {**starts, ".json": "{", ".txt": "2 pending"}.items():
            self.write(f"r{ending}", "old")
            self.stdout("report", "-o", f"r{ending}")
            self.assertEqual(self.read(f"r{ending}")[: len(start)], start)
        self.stdout("report", "-o", "summary", "--format", "markdown")
        self.assertIn("### ", self.read("summary"))
        self.write("r.xml", "old")
        with mock.patch.object(queuectl, "xml_tag", side_effect=OSError(28, "full")):
            self.assertEqual(self.result("report", "-o", "r.xml").returncode, 4)
        self.assertEqual(self.read("r.xml"), "old")
        self.assertEqual(glob.glob(self.file("r.*.*")), [])
        for args in (("-o", "r.pdf"), ("-o", ""), ("--format", "pdf"), ("--since", "x")):
            self.assert_refused("report", *args)
        for file in ("none/r.html", *["/dev/full"] * LINUX):
            line = self.assert_refused("report", "-o", file, "--format", "html", code=4)
            self.assertIn(f"{file}: ", line)
        self.assert_refused("report", "unknown", code=1)
        for ending in ("", "-wal", "-journal"):
            line = self.assert_refused("report", "-o", "queuectl.db" + ending, "--format", "json")
            self.assertIn("must not name a file of a database", line)
        unreadable = mock.patch.object(queuectl, "open", side_effect=PermissionError, create=True)
        with unreadable:
            self.assertEqual(queuectl.valid_report(self.file("r.xml")), self.file("r.xml"))

    def test_queue_that_never_had_a_job_is_reported(self) -> None:
        self.run_jobs()
        said = self.result("report", "--queue", "defalt").stderr
        self.assertEqual(said, "queuectl: queue defalt never had a job: did you mean default?\n")

    def test_metrics_pass_the_check_of_promtool(self) -> None:
        self.run_jobs()
        try:
            done = self.process("promtool", "check", "metrics", input=self.report("prometheus"))
        except FileNotFoundError:
            self.skipTest("promtool, of Prometheus, is not installed")
        self.assertEqual(done, Result(0, "", ""))

    def test_junit_is_understood_by_junitparser(self) -> None:
        try:
            import junitparser
        except ImportError:
            self.skipTest("junitparser is not installed")
        self.run_jobs()
        self.stdout("report", "-o", "r.xml")
        suites = {suite.name: suite for suite in junitparser.JUnitXml.fromfile(self.file("r.xml"))}
        self.assertEqual(suites["default"].errors, 1)
        results = [type(item).__name__ for case in suites[HOSTILE_ID] for item in case.result]
        self.assertEqual(results[0], "Failure")


class ReportDrain(Live):
    """Reports about a drain."""

    def cases(self, name: str = "r.xml") -> dict[str, list[str]]:
        root = xml.etree.ElementTree.parse(self.file(name)).getroot()
        return {str(case.get("name")): [e.tag for e in case] for case in root.iter("testcase")}

    def test_drain_writes_reports_about_what_it_ran_whatever_the_outcome(self) -> None:
        self.enqueue("true", id="earlier")
        self.enqueue("false", id="dead", max_retries=1, priority=-1)
        self.drain("--queue", "none", "--report", "none.json")
        self.assertEqual(json.loads(self.read("none.json"))["jobs"], 0)
        with Queue(self.path) as queue:
            queue._ledger.finish(claim(queue), Outcome("exited", time.time(), time.time(), 0, None))
        self.enqueue("true", id="blocked", after=["dead"])
        self.enqueue("true", id="later", delay=1000)
        reports = ("--report", "r.xml", "--report", "r.json")
        self.run_cli("worker", "start", "--drain", "--horizon", "0", *reports, code=1)
        self.assertEqual(self.cases(), {"dead": ["failure"], "blocked": ["skipped"]})
        self.assertEqual(json.loads(self.read("r.json"))["jobs"], 2)

    def stopped_drain(self, stop: Callable[[Any], Any]) -> Any:
        """Stop a drain while its second job runs; return its exit code."""
        self.enqueue("true", id="good", priority=1)
        self.enqueue("touch begun; sleep 100", id="long")
        pool = self.pool("--drain", "--report", "r.xml")
        wait_until(lambda: os.path.exists(self.file("begun")))
        stop(pool)
        pool.wait(10)
        self.assertEqual(self.cases(), {"good": [], "long": ["skipped"]})
        return pool.returncode

    def test_drain_that_is_stopped_writes_its_report(self) -> None:
        self.assertEqual(self.stopped_drain(lambda _: self.stdout("worker", "stop", "--now")), 1)

    @SLOW
    def test_drain_that_a_second_signal_ends_writes_its_report(self) -> None:
        def signal_twice(pool: Any) -> None:
            pool.send_signal(signal.SIGTERM)
            began = time.monotonic()
            wait_until(lambda: time.monotonic() > began + 1.1)
            pool.send_signal(signal.SIGTERM)

        self.assertEqual(self.stopped_drain(signal_twice), -signal.SIGTERM)

    def test_report_that_cannot_be_written_does_not_prevent_another_one(self) -> None:
        self.enqueue("true", id="good")
        os.mkdir(self.file("d.xml"))
        reports = ("--report", "r.xml", "--report", "d.xml", "--report", "r.json")
        done = self.run_cli("worker", "start", "--drain", *reports, code=4)
        self.assertIn("d.xml: Is a directory", done.stderr)
        self.assertEqual(self.cases(), {"good": []})
        self.assertEqual(json.loads(self.read("r.json"))["jobs"], 1)

    def test_report_that_could_not_be_written_is_refused_before_the_drain(self) -> None:
        start = ("worker", "start", "--report")
        for args in (
            (*start, "r.xml"),
            (*start, "r.pdf", "--drain"),
            (*start, "no/r.md", "--drain"),
        ):
            self.assert_refused(*args)
        self.assertEqual(os.listdir(self.dir), [])


# --- web ------------------------------------------------------------------------------------------


class Web(Case):
    """A queue and its server, in a thread, which the tests of a class share."""

    @classmethod
    def setUpClass(cls) -> None:
        home = os.path.realpath(tempfile.mkdtemp(prefix="queuectl-test-"))
        cls.addClassCleanup(shutil.rmtree, home)
        cls.db = os.path.join(home, "queuectl.db")
        with Queue(cls.db) as queue:
            cls.fill(queue)
        cls.site = queuectl.Site(cls.db, 0, insecure=False)
        cls.host = f"127.0.0.1:{cls.site.port}"
        cls.cookie = f"{cls.site.gate.cookie}={cls.site.gate.token}"
        server = cls.site.server
        cls.thread = threading.Thread(target=server.serve_forever, args=[0.02])
        cls.thread.start()
        for cleanup in (cls.thread.join, server.server_close, server.shutdown):
            cls.addClassCleanup(cleanup)

    @classmethod
    def fill(cls, queue: Queue) -> None:
        """Put jobs into the queue: one completed, two dead for one reason, and waiting ones."""
        queue.configure("max_retries", "1")
        for job_id, code, output in (
            ("done", 0, b"fine\n"),
            ("bad", 3, b"oh\n"),
            ("worse", 3, b""),
        ):
            queue.enqueue("true", id=job_id, queue="gpu")
            outcome = Outcome("exited", 1e9, 1e9 + 1, code, queuectl.explain_exit(code), 0, output)
            queue._ledger.finish(claim(queue, "worker-1", ["gpu"]), outcome)
        queue.enqueue("make all", id="next")
        queue.enqueue("true", id="blocked", after="next")
        queue.enqueue("true", id="nightly", cron="@daily")

    def setUp(self) -> None:
        super().setUp()
        self.path = self.db

    def raw(self, data: bytes) -> bytes:
        """Send bytes; return everything that is sent back until the connection is closed."""
        with socket.create_connection(("127.0.0.1", self.site.port), timeout=10) as connection:
            connection.sendall(data)
            return b"".join(iter(partial(connection.recv, 1 << 16), b""))

    def ask(self, target: str = "/jobs", method: str = "GET", body: str = "", **more: Any) -> Any:
        """Send a request with a good Host and cookie unless told otherwise; return the response."""
        headers = {"Host": self.host, "Cookie": self.cookie, **more}
        if method == "POST":
            headers = {"Origin": f"http://{self.host}", **headers}
            headers.setdefault("Content-Length", str(len(body)))
            headers.setdefault("Content-Type", "application/x-www-form-urlencoded")
        lines = [f"{method} {target} HTTP/1.0"]
        for name, value in headers.items():
            values = value if isinstance(value, list) else [value] * (value is not None)
            lines += [f"{name.replace('_', '-')}: {item}" for item in values]
        answer = self.raw("\r\n".join([*lines, "", body]).encode("utf-8", "surrogateescape"))
        head, _, page = answer.decode().partition("\r\n\r\n")
        first, *fields = head.split("\r\n")
        self.assertEqual(answer.count(b"HTTP/1.0 "), 1)
        return SimpleNamespace(
            status=int(first.split()[1]), headers=dict(f.split(": ", 1) for f in fields), page=page
        )

    def status(self, *args: Any, **more: Any) -> int:
        return int(self.ask(*args, **more).status)

    def act(self, confirmed: str = "yes", **fields: Any) -> Any:
        body = urllib.parse.urlencode({"confirmed": confirmed, **fields}, doseq=True)
        return self.ask("/act", "POST", body)

    def files(self) -> dict[str, Any]:
        """Return the digests of the database and its -wal."""
        return {path: digest(path) for path in (self.db, self.db + "-wal") if os.path.exists(path)}


@internal
class WebGate(Web):
    """Who may use the page."""

    def test_only_a_request_with_the_token_is_answered(self) -> None:
        token = self.site.gate.token
        cases: list[tuple[int, dict[str, Any]]] = [
            (200, {}),
            (200, {"Cookie": f"a=b; {self.cookie}; c"}),
            (200, {"Cookie": f"{self.site.gate.cookie}=old; {self.cookie}"}),
            (200, {"Cookie": None, "Authorization": f"Bearer {token}"}),
            (200, {"Cookie": None, "Authorization": f"bearer {token} "}),
            (401, {"Cookie": None}),
            (401, {"Cookie": ""}),
            (401, {"Cookie": self.cookie[:-1]}),
            (401, {"Cookie": self.cookie + "x"}),
            (401, {"Cookie": f"queuectl-1={token}"}),
            (401, {"Cookie": f"{self.site.gate.cookie}="}),
            (401, {"Cookie": None, "Authorization": "Bearer"}),
            (401, {"Cookie": None, "Authorization": "Bearer \u20ac"}),
            (401, {"Cookie": None, "Authorization": f"Basic {token}"}),
            (400, {"Authorization": [f"Bearer {token}"] * 2}),
        ]
        for status, headers in cases:
            with self.subTest(headers):
                self.assertEqual(self.status(**headers), status)
        self.assertEqual(self.status(f"/jobs?token={token}", Cookie=None), 401)
        self.assertEqual(self.status("/?token=", Cookie=None), 401)
        self.assertEqual(self.status("/?token=wrong"), 401)
        self.assertNotIn("done", self.ask(Cookie=None).page)

    def test_only_a_loopback_host_is_answered(self) -> None:
        """A name of an attacker may lead here: DNS rebinding."""
        port = self.site.port
        self.assertEqual(self.site.server.socket.getsockname(), ("127.0.0.1", port))
        for host in (self.host, f"localhost:{port}", "LOCALHOST", "[::1]:9000", "127.0.0.1:9000"):
            with self.subTest(host):
                self.assertEqual(self.status(Host=host), 200)
        bad = [
            "evil.example",
            f"127.0.0.1.evil.example:{port}",
            "localhost.evil.example",
            "0.0.0.0",
        ]
        bad += [
            f"a@{self.host}",
            f"{self.host}, evil.example",
            "127.0.0.1:",
            "127.0.0.1:1234567",
            "",
        ]
        for value in [*bad, None, [self.host, self.host], [self.host, "evil.example"]]:
            with self.subTest(value):
                self.assertEqual(self.status(Host=value), 421)
        self.assertEqual(self.status(f"/?token={self.site.gate.token}", Host="evil.example"), 421)

    def test_requests_from_other_sites_are_refused(self) -> None:
        own = f"http://{self.host}"
        port = self.site.port
        foreign = ["null", "http://evil.example", f"http://localhost:{port}", "http://127.0.0.1:1"]
        foreign += [own.replace("http", "https"), own + ".evil.example", own + "/", "x", [own, own]]
        body = "action=pause&queue="
        for method in ("GET", "HEAD", "POST"):
            target = "/act" if method == "POST" else "/jobs"
            for origin in foreign:
                with self.subTest(method, origin=origin):
                    status = self.status(target, method, body, Origin=origin)
                    self.assertIn(status, (400, 403))
            for site in ("cross-site", "same-site", "nonsense"):
                with self.subTest(method, site=site):
                    self.assertEqual(self.status(target, method, body, Sec_Fetch_Site=site), 403)
            for site in ("same-origin", "none"):
                status = self.status(target, method, body, Sec_Fetch_Site=site, Origin=own)
                self.assertEqual(status, 200)
        self.assertEqual(self.status("/act", "POST", body, Origin=None), 403)
        bearer = f"Bearer {self.site.gate.token}"  # a script, which sends none
        options = {"Origin": None, "Cookie": None, "Authorization": bearer}
        self.assertEqual(self.status("/act", "POST", body, **options), 200)

    def test_token_in_the_address_becomes_a_cookie(self) -> None:
        target = f"/?token={self.site.gate.token}"
        direct = self.ask(target, Cookie=None)
        self.assertEqual((direct.status, direct.headers["Location"]), (303, "/"))
        name_and_token = f"queuectl-{self.site.port}={self.site.gate.token}"
        cookie = name_and_token + "; HttpOnly; SameSite=Strict; Path=/"
        self.assertEqual(direct.headers["Set-Cookie"], cookie)
        linked = self.ask(target, Cookie=None, Sec_Fetch_Site="cross-site")
        self.assertEqual((linked.status, linked.headers["Refresh"]), (200, "0; url=/"))
        self.assertEqual(linked.headers["Set-Cookie"], cookie)
        self.assertNotIn("Set-Cookie", self.ask("/jobs").headers)
        self.assertNotIn(self.site.gate.token, self.ask("/").page)
        self.assertGreaterEqual(len(self.site.gate.token), 43)
        self.assertNotEqual(queuectl.Gate(1).token, queuectl.Gate(1).token)

    def test_only_get_head_and_post_exist_and_a_page_is_no_action(self) -> None:
        for method in "PUT DELETE OPTIONS TRACE CONNECT PATCH LINK get".split():
            with self.subTest(method):
                answer = self.ask(method=method)
                self.assertEqual((answer.status, answer.headers["Allow"]), (405, "GET, HEAD, POST"))
        self.assertEqual(self.status("/act?action=pause&queue=&confirmed=yes"), 405)
        self.assertEqual(self.status("/jobs", "POST"), 405)
        head, page = self.ask("/job?id=done", "HEAD"), self.ask("/job?id=done")
        self.assertEqual((head.status, head.page), (200, ""))
        self.assertEqual(head.headers["Content-Length"], str(len(page.page.encode())))

    def test_every_response_has_the_headers_that_restrict_a_browser(self) -> None:
        for target, status in (
            ("/", 200),
            ("/nothing", 404),
            ("/output?id=done", 200),
            ("/act", 405),
        ):
            answer = self.ask(target)
            self.assertEqual(answer.status, status)
            policy = answer.headers["Content-Security-Policy"]
            self.assertIn("default-src 'none'", policy)
            self.assertIn("frame-ancestors 'none'", policy)
            self.assertNotIn("unsafe", policy)
            self.assertEqual(answer.headers["X-Content-Type-Options"], "nosniff")
            self.assertEqual(answer.headers["Cache-Control"], "no-store")
            self.assertEqual(answer.headers["Referrer-Policy"], "no-referrer")
        policies = {self.ask("/").headers["Content-Security-Policy"] for _ in range(2)}
        self.assertEqual(len(policies), 2)  # a nonce is used once

    def test_body_of_a_refused_post_is_not_another_request(self) -> None:
        inner = f"GET /jobs HTTP/1.1\r\nHost: {self.host}\r\nCookie: {self.cookie}\r\n\r\n"
        for headers in (
            {"Cookie": None},
            {"Cookie": None, "Content-Length": "0"},
            {"Content-Length": "0", "Connection": "keep-alive"},
            {"Transfer-Encoding": "chunked"},
        ):
            with self.subTest(headers):
                answer = self.ask("/act", "POST", inner, **headers)  # checks that it is one
                self.assertGreaterEqual(answer.status, 400)
        pipelined = self.raw(inner.encode() * 2)
        self.assertEqual(pipelined.count(b"HTTP/1.0 200"), 1)

    def test_bad_posts_are_refused(self) -> None:
        cases = {
            411: [{"Content-Length": None}, {"Content-Length": ["3", "3"]}],
            400: [{"Content-Length": "-1"}, {"Content-Length": "+3"}, {"Content-Length": "x"}],
            413: [{"Content-Length": str(1 << 40)}, {"Content-Length": "9" * 18}],
            415: [{"Content-Type": "text/plain"}, {"Content-Type": None}],
        }
        for status, headers in ((s, h) for s, many in cases.items() for h in many):
            with self.subTest(headers):
                self.assertEqual(self.status("/act", "POST", "a=b", **headers), status)

    def test_get_never_writes(self) -> None:
        before = self.files()
        self.assertTrue(before)
        paths = ["/metrics", "/favicon.ico", "/output?id=bad", "/job?id=bad"]
        with mock.patch.object(queuectl, "Queue", side_effect=Queue) as opened:
            for path, method in itertools.product([*queuectl.PAGES, *paths], ("GET", "HEAD")):
                self.ask(path, method)
            self.act("", action="cancel", id="next")  # not confirmed
        self.assertTrue(all(call.kwargs["readonly"] for call in opened.mock_calls))
        body = "action=pause&queue=&confirmed=yes"
        self.assertEqual(self.status("/act", "POST", body, Cookie=None), 401)
        self.assertEqual(self.files(), before)

    def test_page_that_raises_is_an_error_with_a_traceback_on_stderr(self) -> None:
        broken = {**queuectl.PAGES, "/jobs": lambda *_: 1 // 0}
        stderr = io.StringIO()
        with mock.patch.object(queuectl, "PAGES", broken), mock.patch("sys.stderr", stderr):
            answer = self.ask("/jobs")
        self.assertEqual((answer.status, answer.page.count("\n")), (500, 1))
        self.assertIn("ZeroDivisionError", stderr.getvalue())

    def test_malformed_requests_get_an_error_and_no_traceback(self) -> None:
        targets = ["/job", "/job?id=", "/job?id=%00", "/job?id=%ff%fe", "/job?id=" + "9" * 5000]
        targets += ["/job?id=done&run=1e99", "/job?id=done&run=-1", "/job?id=done&run=" + "9" * 400]
        targets += ["/jobs?after=1e9", "/jobs?after=" + "9" * 30, "/jobs?at=nan", "/jobs?state=x"]
        targets += [
            "//evil.example/",
            "/../../etc/passwd",
            "/%2e%2e/",
            "/" + "a" * 60_000,
            "/jobs/",
        ]
        targets += ["http://evil.example/", "*", "/output?id=nobody", "/jobs?" + "a=&" * 6000, "/é"]
        stderr = io.StringIO()
        with mock.patch("sys.stderr", stderr):
            for target in targets:
                with self.subTest(target[:40]):
                    self.assertIn(self.status(target), (400, 404))
            for target in (
                "/jobs?path=x&self=y&=z",
                "/jobs?at=1e9&after=0",
                "/jobs?match=%00&queue=%F0",
            ):
                self.assertEqual(self.status(target), 200)
            for data in (
                b"\r\n\r\n",
                b"GET\r\n\r\n",
                b"\0\xff\x16\x03\r\n\r\n",
                b"GET / HTTP/9\r\n\r\n",
            ):
                self.assertRegex(self.raw(data), rb"\A(HTTP/1.0 (400|505) |\Z)")
            self.assertIn(b" 414 ", self.raw(b"GET /" + b"a" * 70_000)[:20])
            self.assertIn(b" 431 ", self.raw(b"GET / HTTP/1.0\r\n" + b"a: b\r\n" * 200)[:20])
            self.assertEqual(self.status(X=["y" * 60_000, "z"]), 200)
        self.assertEqual(stderr.getvalue(), "")


@internal
class WebServer(Web):
    """The server: its connections, threads and end."""

    def connect(self, number: int, data: bytes = b"") -> list[socket.socket]:
        found = []
        for _ in range(number):
            found.append(socket.create_connection(("127.0.0.1", self.site.port), timeout=10))
            self.addCleanup(found[-1].close)
            found[-1].sendall(data)
        return found

    def check_idle(self, number: int) -> None:
        """Check that idle connections hold up no other one, and that their threads end."""
        before = threading.active_count()
        idle = self.connect(number // 2)
        idle += self.connect(number // 2, b"GET / HTTP/1.0\r\nHost:")
        began = time.monotonic()
        self.assertEqual(self.status(), 200)
        self.assertLess(time.monotonic() - began, 5)
        most = 3 * queuectl.MAX_CONNECTIONS  # with those that are about to end
        self.assertLessEqual(threading.active_count(), before + most)
        for connection in idle:
            connection.close()
        wait_until(lambda: threading.active_count() <= before)

    @NEEDS_SHELL
    def test_idle_sockets_hang_nothing_and_leave_no_thread(self) -> None:
        self.check_idle(150)

    @SLOW
    @unittest.skipUnless(POSIX, "needs a limit of open files")
    def test_thousand_idle_sockets_hang_nothing_and_leave_no_thread(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
        self.check_idle(1000)

    def test_connection_that_lasts_too_long_is_ended(self) -> None:
        with mock.patch.object(queuectl, "CONNECTION_SECONDS", 0.1):
            for connection in self.connect(1) + self.connect(1, b"GET / HTT"):
                self.assertEqual(connection.recv(1), b"")

    def test_reader_that_takes_nothing_is_ended(self) -> None:
        request = (
            f"GET /output?id=large HTTP/1.0\r\nHost: {self.host}\r\nCookie: {self.cookie}\r\n\r\n"
        )
        with Queue(self.db) as queue:
            queue.configure("output_limit", str(1 << 27))
            queue.enqueue("true", id="large", priority=9)
            outcome = Outcome("exited", 1.0, 2.0, 0, None, 0, b"x" * 8_000_000)
            queue._ledger.finish(claim(queue), outcome)
        before = threading.active_count()
        with mock.patch.object(queuectl, "CONNECTION_SECONDS", 0.2):
            self.connect(1, request.encode())
            wait_until(lambda: threading.active_count() > before)
            wait_until(lambda: threading.active_count() == before)
        self.assertEqual(len(self.ask("/output?id=large").page), 8_000_000)


class WebCommand(Live):
    """`queuectl web` as a process."""

    def test_url_is_printed_once_and_ctrl_c_ends_it_at_once(self) -> None:
        self.enqueue("true", id="x")
        web = self.start("web", "--port", "0")
        url = web.stdout.readline()
        self.assertRegex(url, r"\Ahttp://127\.0\.0\.1:\d+/\?token=[\w-]{43}\n\Z")
        with urllib.request.urlopen(
            urllib.request.Request(
                url.partition("?")[0] + "job?id=x",
                headers={"Authorization": f"Bearer {url.strip().partition('=')[2]}"},
            )
        ) as page:
            self.assertIn("no worker is running", page.read().decode())
        port = re.findall(r":(\d+)/", url)[0]
        self.assertIn("--port", self.assert_refused("web", "--port", port, code=4, real=True))
        idle = socket.create_connection(("127.0.0.1", int(port)))
        began = time.monotonic()
        web.send_signal(signal.SIGINT)
        self.assertEqual(web.wait(10), -signal.SIGINT)
        self.assertLess(time.monotonic() - began, 1)
        idle.close()
        self.assertEqual(web.stdout.read(), "")

    def test_without_a_queue_it_reports_one_line(self) -> None:
        self.assertIn("there is no queue", self.assert_refused("web", code=1))
        self.assert_refused("web", "--host", "0.0.0.0")
        for port in ("-1", "65536", "x"):
            self.assert_refused("web", "--port", port)

    def test_browser_is_opened_without_the_token_in_any_argument(self) -> None:
        self.enqueue("true")
        script = (
            'printf \'%s\\n\' "$@" > args; ls -l "${1#file://}" > mode; cat "${1#file://}" > page'
        )
        self.write("browser", "#!/bin/sh\n" + script + "; echo > done")
        os.chmod(self.file("browser"), 0o700)
        env = {**os.environ, "BROWSER": self.file("browser") + " %s"}
        web = self.start("web", "--port", "0", "--open", env=env)
        token = web.stdout.readline().strip().partition("token=")[2]
        wait_until(lambda: self.read("done"))
        self.assertNotIn(token, self.read("args"))
        self.assertIn(token, self.read("page"))
        self.assertTrue(self.read("mode").startswith("-rw-------"))
        with open(f"/proc/{web.pid}/cmdline") if LINUX else io.StringIO() as file:
            self.assertNotIn(token, file.read())
        web.send_signal(signal.SIGINT)
        web.wait(10)
        self.assertEqual(glob.glob(self.file("queuectl.db.run/*.html")), [])


@internal
class WebPages(Web):
    """The pages, and what they show."""

    def test_pages_show_the_jobs(self) -> None:
        cases = {
            "/": ["gpu", "exit code 3", "Attempts by worker slot"],
            "/jobs": ["make all", "blocked by next", "all 46"],
            "/jobs?state=dead": ["bad", "worse", "exit code 3"],
            "/jobs?queue=gpu&match=DON": ["done"],
            "/job?id=done": ["completed", "fine", "worker-1"],
            "/job?id=next": ["no worker is running", "make all"],
            "/job?id=nightly": ["nightly.1", "due in"],
            "/dead": ["exit code 3", "worse"],
            "/schedules": ["nightly", "@daily"],
            "/workers": ["No worker is running"],
        }
        for target, words in cases.items():
            page = self.ask(target)
            text = Tags(page.page).text
            for word in words:
                with self.subTest(target, word=word):
                    self.assertIn(word, text)
        self.assertNotIn("done", Tags(self.ask("/jobs?state=dead").page).text)
        self.assertNotIn("bad", Tags(self.ask("/jobs?queue=gpu&match=DON").page).text)
        self.assertIn("did you mean worse", self.ask("/job?id=worsee").page)

    def test_workers_and_their_jobs_are_shown(self) -> None:
        about = {"pid": 77, "queues": ["gpu"], "started": queuectl.format_time(1e9)}
        idle = {**about, "worker": "worker-1", "job": None, "since": None}
        idle.update(host=None, command=None)
        busy = {**idle, "worker": "worker-2", "job": "next", "command": "make all"}
        busy.update(since=about["started"], host="node7")
        with mock.patch.object(queuectl, "worker_facts", return_value=[idle, busy]):
            text = Tags(self.ask("/workers").page).text
        for word in ("worker-1", "77", "gpu", "idle", "next", "node7", "make all"):
            self.assertIn(word, text)

    def test_script_is_sent_only_the_parts_that_changed(self) -> None:
        tags = re.findall(r'data-tag="(\w+)"', self.ask("/schedules").page)
        more = {"X-Queuectl-Tags": " ".join(tags)}
        self.assertEqual(self.ask("/schedules", **more).page, "")
        part = self.ask("/schedules", **{"X-Queuectl-Tags": "old"}).page
        self.assertRegex(part, r'\A<div id="part-schedules" data-tag="')
        self.assertNotIn("<script", part)

    def test_jobs_are_paged_by_key(self) -> None:
        for state in ("", "state=ready&", "state=completed&"):
            shown: list[str] = []
            target = f"/jobs?{state}queue=many"
            with mock.patch.object(queuectl, "PAGE_SIZE", 7):
                while target:
                    page = self.ask(target).page
                    shown += re.findall(r'name="id" value="(many\d+)"', page)
                    links = [e for tag, e in Tags(page).found if tag == "a"]
                    target = next((e["href"] for e in links if "after=" in str(e["href"])), "")
            with self.subTest(state):
                self.assertEqual(len(shown), len(set(shown)))
                self.assertEqual(len(shown), {"": 40, "state=ready&": 25}.get(state, 15))

    def test_search_takes_a_limited_time_and_can_be_continued(self) -> None:
        with mock.patch.multiple(queuectl, SEARCHED=5, SEARCH_SECONDS=-1):
            page = self.ask("/jobs?match=many0").page
        self.assertIn("none so far", page)

    def test_output_is_sent_as_it_is_only_as_text(self) -> None:
        answer = self.ask("/output?id=done")
        self.assertEqual(answer.headers["Content-Type"], "text/plain; charset=utf-8")
        self.assertEqual(answer.page, "fine\n")

    @classmethod
    def fill(cls, queue: Queue) -> None:
        many = [{"command": "true", "id": f"many{n}", "queue": "many"} for n in range(40)]
        list(queue.enqueue_many(many))
        for _ in range(15):
            outcome = Outcome("exited", 1.0, 2.0, 0, None)
            queue._ledger.finish(claim(queue, "worker-1", ["many"]), outcome)
        super().fill(queue)


@internal
class WebActions(Web):
    """Retry, cancel, pause and resume, after a confirmation."""

    def state(self, job_id: str) -> str:
        return str(self.job(job_id).state)

    def test_action_takes_place_only_after_its_confirmation(self) -> None:
        page = self.act("", action="retry", id=["bad", "worse"], back="/jobs?state=dead")
        self.assertIn("Retry 2 jobs?", page.page)
        self.assertEqual(self.state("bad"), "dead")
        fields = [
            (item["name"], item["value"])
            for tag, item in Tags(page.page).found
            if tag in ("input", "button") and "name" in item
        ]
        done = self.ask("/act", "POST", urllib.parse.urlencode(fields))
        self.assertEqual((done.status, done.headers["Location"]), (303, "/jobs?state=dead"))
        self.assertEqual([self.state("bad"), self.state("worse")], ["pending"] * 2)

    def test_all_dead_jobs_of_one_reason_are_retried(self) -> None:
        with Queue(self.db) as queue:
            for job_id, code in (("x1", 9), ("x2", 9), ("y1", 8)):
                queue.enqueue("true", id=job_id, queue="x")
                outcome = Outcome("exited", 1.0, 2.0, code, queuectl.explain_exit(code))
                queue._ledger.finish(claim(queue, "worker-1", ["x"]), outcome)
        page = self.act("", action="retry", like="x2").page
        self.assertIn("Retry 2 jobs?", page)
        self.assertNotIn(">y1<", page)

    def test_waiting_job_is_cancelled_and_a_queue_paused_and_resumed(self) -> None:
        self.assertEqual(self.act(action="cancel", id="next").status, 303)
        self.assertEqual(self.state("next"), "cancelled")
        for names, action, paused in (
            (["gpu", "cpu"], "pause", ["cpu", "gpu"]),
            (["cpu"], "resume", ["gpu"]),
            ([""], "pause", ["", "gpu"]),
            ([""], "resume", []),
        ):
            self.assertEqual(self.act(action=action, queue=names).status, 303)
            with Queue(self.db, readonly=True) as queue:
                self.assertEqual(sorted(queue._reader.paused()), paused)

    def test_impossible_actions_change_nothing_and_name_the_reason(self) -> None:
        before = self.states()
        cases = [
            (400, "nothing is selected", {"action": "retry"}),
            (400, "unknown action", {"action": "enqueue", "id": "x", "command": "id"}),
            (400, "unknown action", {"action": "edit", "id": "done"}),
            (400, "unknown action", {"action": "purge", "id": "done"}),
            (400, "queue must be", {"action": "pause", "queue": "a b"}),
            (404, "there is no job", {"action": "retry", "id": ["done", "nobody"]}),
            (404, "done is completed", {"action": "retry", "id": "done"}),
        ]
        for status, words, fields in cases:
            with self.subTest(fields):
                answer = self.act(**fields)
                self.assertEqual(answer.status, status)
                self.assertIn(words, Tags(answer.page).text)
        self.assertEqual(self.states(), before)

    def test_way_back_is_a_page_of_this_site(self) -> None:
        bad = [
            "//evil.example",
            "http://evil.example/",
            "/\\evil",
            "/jobs\r\nX: y",
            "javascript:1",
            "",
        ]
        for url in bad:
            with self.subTest(url):
                done = self.act(action="resume", queue="gpu", back=url)
                self.assertEqual(done.headers["Location"], "/")
        done = self.act(action="resume", queue="gpu", back="/jobs?match=%0d%0aX:y")
        self.assertEqual(done.headers["Location"], "/jobs?match=%0D%0AX%3Ay")

    def test_locked_queue_is_reported_after_a_limited_time(self) -> None:
        hold_write_lock(self)
        with mock.patch.object(queuectl, "QUERY_SECONDS", 0.1):
            answer = self.act(action="pause", queue="gpu")
        self.assertEqual(answer.status, 503)
        self.assertIn("locked by another program", answer.page)
        self.assertEqual(self.status(), 200)  # reading needs no lock


@internal
class WebCost(Clocked):
    """What the pages cost."""

    def costs(self, number: int) -> dict[str, int]:
        """Return the cost of each page once this many more jobs are in several states."""
        jobs = [{"command": "true", "queue": f"q{n % 3}"} for n in range(number)]
        list(self.queue.enqueue_many(jobs))
        for remainder, state in enumerate(("completed", "dead", "cancelled")):
            fields = {"state": state, "remainder": remainder, "now": self.now}
            self.queue._db.execute(
                "UPDATE jobs SET state = :state, run = 1, last_error = 'bad', updated_at = :now"
                " WHERE seq % 4 = :remainder",
                fields,
            )
        found = {}
        for target in (*queuectl.PAGES, "/jobs?state=dead", "/jobs?state=ready", "/job?id=1"):
            path, _, query = target.partition("?")
            request = queuectl.Request(
                "GET", path, {"id": ["1"], **urllib.parse.parse_qs(query)}, {}
            )
            page = partial(queuectl.PAGES[path], self.queue._reader, request)
            found[target] = self.sqlite_steps(page)
        return found

    def test_overview_costs_the_same_with_many_more_attempts(self) -> None:
        self.costs(4)
        request = queuectl.Request("GET", "/", {"id": ["1"]}, {})
        costs = []
        for number in (20, 2000):
            fields = {"number": number, "first": 1000 * number}
            self.queue._db.execute(
                f"WITH {NUMBERS} INSERT INTO attempts SELECT 1, i + :first, 'worker-aa-1',"
                " 'failed', 0, i, i + 1, 1, 'bad', 0, x'' FROM n",
                fields,
            )
            with mock.patch.object(queuectl, "PAGE_SIZE", 20):
                page = partial(queuectl.overview_page, self.queue._reader, request)
                costs.append(self.sqlite_steps(page))
        self.assertLess(costs[1], 1.5 * costs[0] + 10)

    def test_pages_cost_the_same_with_many_more_jobs(self) -> None:
        """Promise 8: looking at the queue costs the same, however long its history is."""
        limits = {"OVERVIEW_JOBS": 20, "EXAMINED": 50, "SEARCHED": 50, "PAGE_SIZE": 20}
        with mock.patch.multiple(queuectl, **limits):
            few, many = self.costs(400), self.costs(6000)
        for target, cost in few.items():
            with self.subTest(target, few=cost, many=many[target]):
                self.assertLess(many[target], 1.5 * cost + 10)


@internal
class WebHostile(Web):
    """Jobs whose names, commands and outputs are attacks on the page."""

    TAGS = set(
        "html head meta title link style body nav h1 h2 h3 a button span main div section table tr "
        "th td form input label p b i ul li pre code svg path rect title script details summary "
        "figure figcaption".split()
    )
    BAD = '<script>alert(1)</script><img/src=x/onerror=alert(1)>"onmouseover="alert(1)\'`&lt;'

    @classmethod
    def fill(cls, queue: Queue) -> None:
        queue.configure("max_retries", "1")
        ugly = cls.BAD + "]]>\x1b[31m\u202e\x07\x85\n\t"
        for number, reason in enumerate((None, ugly, "x" * 100_000)):
            queue.enqueue(ugly, id=f"{cls.BAD}{number}", queue=cls.BAD, cwd="/" + cls.BAD)
            code = 1 if reason else 0
            output = ugly.encode() * 20_000 + RAW + b"\0\xed\xa0\x80"
            outcome = Outcome("exited", 1e9, 1e9 + 1, code, reason, 0, output)
            queue._ledger.finish(claim(queue, cls.BAD), outcome)
        queue.enqueue(ugly, id=cls.BAD, queue=cls.BAD, cron="@daily")
        queue.enqueue(ugly, id="waits", queue=cls.BAD, after=f"{cls.BAD}1")
        queue.pause(cls.BAD)

    def pages(self) -> Iterator[tuple[str, str]]:
        query = urllib.parse.urlencode({"id": self.BAD + "1"})
        targets = [
            "/",
            "/jobs",
            "/dead",
            "/schedules",
            "/workers",
            f"/job?{query}",
            "/job?id=waits",
        ]
        bad = urllib.parse.quote(self.BAD)
        targets += [f"/jobs?{name}={bad}" for name in ("state", "queue", "match", "reason", "at")]
        targets += [
            f"/jobs?state=dead&reason={bad}",
            f"/{bad}",
            f"/job?id={bad}x",
            f"/job?run={bad}",
        ]
        for target in targets:
            yield target, self.ask(target).page
        yield "confirmation", self.act("", action="retry", id=self.BAD, back=self.BAD).page
        yield "error", self.act(action="retry", id=self.BAD + "0").page
        yield "unknown", self.act(action=self.BAD, queue=self.BAD).page

    def test_no_byte_of_a_job_is_markup(self) -> None:
        for target, page in self.pages():
            with self.subTest(target):
                parser = Tags(page)
                self.assertLessEqual({tag for tag, _ in parser.found}, self.TAGS)
                names = {name for _, attributes in parser.found for name in attributes}
                self.assertEqual([n for n in names if n.startswith("on") or n == "style"], [])
                scripts = [item for tag, item in parser.found if tag == "script"]
                self.assertTrue(all(item["nonce"] for item in scripts) and len(scripts) <= 1)
                links = [item.get("href", "/") for _, item in parser.found]
                self.assertEqual([url for url in links if not url or url[0] != "/"], [])
                self.assertTrue(page.replace("\n", "").isprintable())
                self.assertLess(len(page), 500_000)

    def test_hostile_output_is_shown_escaped(self) -> None:
        page = self.ask("/job?" + urllib.parse.urlencode({"id": self.BAD + "1"})).page
        text = Tags(page).text
        self.assertIn(self.BAD + "]]>\\x1b[31m\\u202e\\x07", text)
        self.assertIn("its last 65536 bytes", text)


# --- doctor ---------------------------------------------------------------------------------------


class DoctorTrials(Case):
    """What `doctor` finds out about a machine and a directory."""

    @SLOW
    def test_healthy_machine_passes_every_trial_and_nothing_is_left(self) -> None:
        before = os.listdir(self.dir)
        results = self.json_lines("doctor", real=True)
        self.assertEqual([item for item in results if not item["ok"]], [])
        names = [item["check"] for item in results]
        self.assertEqual(names[-4:], ["wal", "sync", "recovery", "process tree"])
        self.assertEqual(os.listdir(self.dir), before)

    @internal
    def test_program_in_an_archive_passes(self) -> None:
        doctor = queuectl.Doctor(self.path)
        with mock.patch.object(queuectl, "__file__", self.file("lib.zip/queuectl.py")):
            doctor.queue()
            self.assertEqual(doctor.wal(), "another process reads the changes of this one")

    @internal
    def test_modules_of_the_current_directory_are_not_imported(self) -> None:
        self.write("sqlite3.py", "open('loaded', 'w')")
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.dir)
        doctor = queuectl.Doctor(self.path)
        doctor.queue()
        doctor.wal()
        self.assertFalse(os.path.exists(self.file("loaded")))

    def test_what_python_itself_prints_does_not_spoil_a_trial(self) -> None:
        doctor = queuectl.Doctor(self.path)
        common = {"worker": "worker-a-1", "waited": 0.0, "finished": 9.0, "error": None}
        common.update(exit_code=None, bytes_dropped=0)
        output = b"Invalid -W option ignored: invalid action: 'x'\n5.0\n"
        first = queuectl.Attempt(run=1, outcome="crashed", started=4.0, output=output, **common)
        second = first._replace(run=2, outcome="completed", started=5.25)
        with mock.patch.object(doctor, "run_job", return_value=[first, second]):
            self.assertIn("ran again after 0.25 s", doctor.recovery())

    @SLOW
    @NEEDS_SHELL
    def test_directory_that_others_may_write_to_fails_one_trial(self) -> None:
        os.mkdir(self.file("shared"))
        os.chmod(self.file("shared"), 0o777)
        found = self.run_cli("--db", self.file("shared/q"), "doctor", real=True, code=1).stdout
        self.assertEqual(re.findall("(?m)^FAIL  (.*?)  ", found), ["owner"])
        self.assertIn("other users may write to", found)

    def test_missing_directory_ends_the_trials(self) -> None:
        found = self.run_cli("--db", self.file("nowhere/q"), "doctor", code=1).stdout
        self.assertRegex(found, r"(?m)^FAIL  queue  .*(No such file|not found)")
        self.assertEqual(found.count("; use a directory that you can write to (--db PATH)\n"), 2)
        self.assertNotIn("recovery", found)

    @internal
    def test_each_trial_fails_where_the_machine_does_not_keep_a_promise(self) -> None:
        doctor = queuectl.Doctor(self.path)
        doctor.queue()
        lost = [mock.Mock(outcome="crashed")]
        nothing = mock.Mock(stdout=b"", stderr=b"no WAL")
        network = mock.patch.object(queuectl, "network_file_system", return_value="nfs4")
        unlocked = mock.patch.object(queuectl.SYSTEM, "is_unlocked", return_value=True)
        unread = mock.patch("subprocess.run", return_value=nothing)
        one_attempt = mock.patch.object(doctor, "run_job", return_value=lost)
        with network:
            self.assert_fault(doctor.file_system, "is on nfs4; SQLite needs a local disk")
        if not queuectl.WINDOWS:
            with unlocked:
                self.assert_fault(doctor.locks, "a lock is not kept by a child that inherits it")
        with unread:
            self.assert_fault(doctor.wal, "another process cannot read the queue: no WAL")
        with one_attempt:
            self.assert_fault(doctor.recovery, "did not run again, but: ['crashed']")
            with mock.patch("os.path.getsize", side_effect=[1, 2]):  # it still writes
                self.assert_fault(doctor.process_tree, "has outlived the job's timeout")

    def assert_fault(self, trial: Callable[[], str], message: str) -> None:
        ok, found = queuectl.Doctor(self.path).attempt(trial)
        self.assertFalse(ok)
        self.assertIn(message, found)

    @internal
    def test_full_disk_is_reported_with_a_remedy(self) -> None:
        with mock.patch("shutil.disk_usage", return_value=mock.Mock(free=5 << 20)):
            found = queuectl.Doctor(self.path).attempt(queuectl.Doctor(self.path).space)
        remedy = "; delete files, or use another disk (--db PATH)"
        reason = f"only 5 MiB are free on the disk of {os.path.dirname(self.path)}"
        self.assertEqual(found, (False, reason + remedy))


# --- command line ---------------------------------------------------------------------------------


class CliEnqueue(Case):
    """`enqueue` of an id that is taken."""

    def test_duplicate_id_is_an_error_unless_if_absent_is_given(self) -> None:
        self.assertEqual(self.result("enqueue", "--id", "x", "a"), (0, "x\n", ""))
        error = "queuectl: job x already exists; use another id\n"
        self.assertEqual(self.result("enqueue", "--id", "x", "echo 2"), (2, "", error))
        self.assert_refused("enqueue", '[{"id":"y","command":"a"},{"id":"y","command":"b"}]')
        add = ("enqueue", "--if-absent")
        self.assertEqual(self.result(*add, "--id", "x", "a"), (0, "x\n", ""))
        self.stdout("enqueue", "--id", "night", "--cron", "@daily", "--timeout", "60", "a")
        kept = "and stays as it is"
        for line, said in {
            "--id x b": f"job x exists with another command, {kept}; queuectl edit x changes it\n",
            "--id x --every 60 -p 3 a": f"job x exists with another priority, rule, {kept}",
            "--id night --cron @daily a": "",
            "--id night --cron @daily --timeout 1m a": "",
            "--id night --cron @daily --env A=1 a": "another env,",
            "--id night --cron @hourly a": f"job night.1 exists with another rule, {kept}",
            "--id night a": "another rule",
        }.items():
            with self.subTest(line):
                code, out, err = self.result(*add, *line.split())
                self.assertEqual((code, out), (0, line.split()[1] + "\n"))
                self.assertRegex(err, ONE_LINE if said else "^$")
                self.assertIn(said, err)
        self.assertEqual([job["command"] for job in self.json_lines("list")], ["a", "a"])

    def test_stdin_is_given_as_text_or_as_a_file(self) -> None:
        with open(self.file("input"), "wb") as file:
            file.write("from é\n".encode())
        options = {"--stdin=é $x": "é $x", "--stdin-file=input": "from é\n", "--stdin=": ""}
        for option, text in {**options, "--stdin-file=-": "ours"}.items():
            job_id = self.stdout("enqueue", option, "cat", stdin="ours").strip()
            self.assertEqual(self.json_object("show", job_id)["stdin"], text)
        self.assertIn("stdin        4 bytes\n", self.stdout("show", job_id))
        with open(self.file("bad"), "wb") as file:
            file.write(b"\xff")
        self.write("long", "x" * ((1 << 20) + 1))
        refused = {
            "bad": "--stdin-file must be text in UTF-8",
            "long": "--stdin-file must not be longer than 1048576 bytes",
            "none": "must name a file that can be read: No such file or directory",
            self.dir: "must name a file that can be read: ",
        }
        for name, reason in refused.items():
            self.assertIn(reason, self.assert_refused("enqueue", "--stdin-file", name, "cat"))
        line = self.assert_refused("enqueue", "--stdin-file", "-", "-", stdin='{"command": "x"}')
        self.assertIn("stdin is closed, or was read already: there are no lines to read", line)


class CliEnqueueLive(Live):
    """`enqueue`: every way to describe a job."""

    def test_enqueue_prints_only_the_id(self) -> None:
        self.assertEqual(self.stdout("enqueue", '{"id":"job1","command":"echo hello"}'), "job1\n")
        self.assertEqual(self.stdout("enqueue", "echo | cat"), "2\n")
        self.assertEqual(self.stdout("enqueue", '[{"command":"a"},{"command":"b"}]'), "3\n4\n")

    def test_enqueue_stores_every_field(self) -> None:
        fields = {
            "id": "x",
            "command": "true",
            "queue": "gpu",
            "priority": 7,
            "max_retries": 9,
            "cwd": "/",
            "env": {"A": "b"},
        }
        times = {"run_at": "2030-01-31T08:00:00+00:00", "timeout": "5m"}
        self.stdout("enqueue", json.dumps({**fields, **times}))
        shown = self.json_object("show", "x")
        self.assertEqual({key: shown[key] for key in fields}, fields)
        self.assertEqual((shown["timeout"], self.job("x").run_after), (300, 1896076800))

    def test_enqueue_accepts_a_shell_line_words_or_json_lines(self) -> None:
        self.stdout("enqueue", "printf a | tr a b")
        self.stdout("enqueue", "--", "printf", "%s|", "two words", "it's", "$HOME", "*")
        lines = '{"command":"printf 3"}\n\n[{"command":"printf 4"}]\n'
        self.assertEqual(self.stdout("enqueue", "-", stdin=lines), "3\n4\n")
        self.drain()
        outputs = [self.stdout("logs", str(number)) for number in (1, 2, 3, 4)]
        self.assertEqual(outputs, ["b", "two words|it's|$HOME|*|", "3", "4"])

    def test_words_after_two_dashes_are_one_command(self) -> None:
        commands = (["/a b/c"], ["-"], ['{"command": "x"}'], ["git", "log", "--", "f"], ["{", "a"])
        for argv in commands:
            job_id = self.stdout("enqueue", "--priority", "1", "--", *argv).strip()
            self.assertEqual(shlex.split(self.job(job_id).command), argv)

    SEPARATED = {  # the words of a command line, and the command and the priority that they mean
        "-p 5 python train.py --timeout 5": ("python train.py --timeout 5", 5),
        "ls -l": ("ls -l", 0),
        "make --priority 5 --jobs 4": ("make --priority 5 --jobs 4", 0),
        "make --priority 5 --id x": ("make", 5),
        "--priority=5 git log -- f": ("git log -- f", 5),
        "-p5 -- make --priority 6": ("make --priority 6", 5),
    }

    def test_options_after_the_first_of_several_words_belong_to_the_command(self) -> None:
        for words, expected in self.SEPARATED.items():
            with self.subTest(words):
                job = self.job(self.stdout("enqueue", *words.split()).strip())
                self.assertEqual((job.command, job.priority), expected)
        job = self.job(self.stdout("enqueue", "make all", "-p", "5", "--db", self.path).strip())
        self.assertEqual((job.command, job.priority), ("make all", 5))
        self.assertIn(
            "did you mean --priority?", self.assert_refused("enqueue", "make all", "--prioity=5")
        )

    def test_byte_order_mark_before_json_is_ignored(self) -> None:
        self.assertEqual(self.stdout("enqueue", "-", stdin='\ufeff{"id":"x","command":"x"}'), "x\n")

    def test_shell_line_may_begin_with_a_bracket_or_brace(self) -> None:
        for line in ("[ -e x ] && echo", '[ "$A" = b ]', "[[ -e x ]]", "{ a; b; } | c"):
            job_id = self.stdout("enqueue", line).strip()
            self.assertEqual(self.job(job_id).command, line)

    def test_batch_is_stored_whole_or_not_at_all_and_its_bad_line_named(self) -> None:
        self.stdout("enqueue", '{"id":"there","command":"true"}')
        for bad in ("{", '{"command":7}', '{"id":"there","command":"x"}', '{"command":"x"} x'):
            lines = f'{{"command":"true"}}\n\n{bad}\n'
            self.assertIn(
                "queuectl: line 3: ", self.assert_refused("enqueue", "-", stdin=lines.encode())
            )
        self.assertEqual(self.json_object("status")["pending"], 1)

    def test_enqueue_needs_cwd_option_where_the_directory_is_gone(self) -> None:
        removed = ("sh", "-c", 'mkdir gone; cd gone; rmdir ../gone; exec "$@"', "sh")
        os.environ["QUEUECTL_DB"] = self.path
        self.enqueue("true")
        self.assertIn(
            "directory no longer exists", self.assert_refused("enqueue", "true", prefix=removed)
        )
        self.assertEqual(self.stdout("enqueue", "--cwd", "/", "true", prefix=removed), "2\n")

    @internal
    def test_module_that_cannot_be_imported_is_an_error(self) -> None:
        with mock.patch.dict(sys.modules, fcntl=None), mock.patch("queuectl.discard_output"):
            self.assertIn("fcntl", self.assert_refused("enqueue", "true", code=4))

    def test_stored_job_is_acknowledged_even_if_no_pool_can_be_notified(self) -> None:
        self.enqueue("true")
        shutil.rmtree(self.path + ".run")
        self.assertEqual(self.stdout("enqueue", "true"), "2\n")

    JSON_JOB = {
        "command": "true",
        "priority": 7,
        "run_at": "2030-01-31T08:00Z",
        "timeout": 9,
        "max_retries": 8,
        "queue": "gpu",
        "cwd": "/",
        "env": {"A": "a", "B": "b"},
    }

    OVERRIDES = {  # options: (field, its value)
        "--id x": ("id", "x"),
        "--priority -5": ("priority", -5),
        "--at 2031-01-31T08:00Z": ("run_after", 1927612800),
        "--delay 2m": ("run_after", None),
        "--timeout 0": ("timeout", 0),
        "--timeout 1m30s": ("timeout", 90),
        "--max-retries 1": ("max_retries", 1),
        "--queue cpu": ("queue", "cpu"),
        "--cwd /tmp": ("cwd", "/tmp"),
        "--env B=c --env D==": ("env", {"A": "a", "B": "c", "D": "="}),
    }

    def enqueued(self, *options: str) -> dict[str, Any]:
        """Enqueue JSON_JOB with these options; return the fields of the new job."""
        job_id = self.stdout("enqueue", *options, json.dumps(self.JSON_JOB)).strip()
        fields: dict[str, Any] = self.json_object("show", job_id)
        return fields

    @internal
    def test_option_overrides_its_json_field_and_no_other(self) -> None:
        for options, (name, value) in self.OVERRIDES.items():
            with self.subTest(options):
                plain = self.enqueued()
                overridden = self.enqueued(*options.split())
                ignored = ("id", "seq", "created_at", "updated_at", "why", name)
                self.assertEqual(
                    {k: v for k, v in plain.items() if k not in ignored},
                    {k: v for k, v in overridden.items() if k not in ignored},
                )
                if name == "run_after":
                    run_after = queuectl.parse_time(overridden[name])
                    self.assertAlmostEqual(run_after, value or time.time() + 120, delta=60)
                else:
                    self.assertEqual(overridden[name], value)
                    self.assertNotEqual(plain[name], value)

    def commands(self, *args: str, stdin: Any = "") -> list[str]:
        """Enqueue; return the commands of the new jobs, in order."""
        ids = self.stdout("enqueue", *args, stdin=stdin).split()
        return [self.job(job_id).command for job_id in ids]

    def test_json_on_stdin_may_have_any_layout(self) -> None:
        chunk = queuectl.JsonJobs.CHUNK
        jobs = [{"command": f"é{n}", "env": {"A": '\\"\u20ac\n'}} for n in range(3)]
        long = [{"command": "true", "stdin": "\\😀\n" * chunk}, *jobs]
        texts = {
            "lines": "\r\n\n".join(map(json.dumps, jobs)),
            "one array": json.dumps(jobs),
            "over lines": "\n".join(json.dumps(job, indent=1) for job in jobs),
            "no blanks": "".join(map(json.dumps, jobs)),
            "mixed": json.dumps(jobs[:1], indent=2) + json.dumps(jobs[1]) + json.dumps(jobs[2:]),
        }
        for name, text in texts.items():
            with self.subTest(name):
                self.assertEqual(self.commands("-", stdin=text), ["é0", "é1", "é2"])
        for size in range(1, 40):  # so that each kind of token is cut off at the end of a chunk
            with mock.patch("queuectl.JsonJobs.CHUNK", size), self.subTest(size):
                found = queuectl.JsonJobs(io.BytesIO(texts["mixed"].encode()), array("L", [0]))
                self.assertEqual(list(found.jobs()), jobs)
        found = queuectl.JsonJobs(io.BytesIO(json.dumps(long).encode()), array("L", [0]))
        self.assertEqual(list(found.jobs()), long)

    def test_bad_json_is_reported_with_line_and_column(self) -> None:
        good = '{"command":\n "a"}'
        cases = {
            good + "\n  echo hello": (3, "column 3: expecting value; .* enqueue --lines -"),
            f"[{good},\n{good},\n]": (5, 'column 1: expecting value; .*{"command": "echo hello"}'),
            f'{good} {{"command": "b" x}}': (2, "column 23: expecting ',' delimiter"),
            f'{good}\n{{"command":\n"x': (4, "column 1: unterminated string"),
            f"{good}\n {{": (3, "column 2: the object that begins here does not end"),
            f"{good}\n[{good}": (4, "column 6: expecting ',' or ']'"),
            f"{good}\n{{'command': 1}}": (3, "column 2: expecting property name"),
            f'{good}\n{{"command": "b",\n"delay": "x"}}': (3, "delay must be a duration"),
            good * 20_000 + "7": (20_001, "column 6: a job is a JSON object"),
        }
        for text, (line, reason) in cases.items():
            with self.subTest(text[-40:]):
                error = self.assert_refused("enqueue", "-", stdin=text)
                self.assertRegex(error, f"^queuectl: line {line}: (bad JSON in )?{reason}")
        self.assertFalse(os.path.exists(self.path))

    def test_memory_for_json_does_not_grow_with_it(self) -> None:
        code = """if True:
            import array, io, itertools, queuectl, tracemalloc
            class File:
                pieces = itertools.chain([b"["], itertools.repeat(b'{"command": "a"},' * 4000, 15))
                def read(self, size):
                    return next(self.pieces, b"")
            jobs = queuectl.JsonJobs(File(), array.array("L", [0])).jobs()
            tracemalloc.start()
            print(sum(1 for _ in itertools.islice(jobs, 59_999)))
            print(tracemalloc.get_traced_memory()[1] < 5e5)
            """
        self.assertEqual(self.script(code)[1:], ("59999\nTrue\n", ""))

    def test_lines_are_commands_and_options_apply_to_each(self) -> None:
        text = "\ufeffecho a\r\n\n  b | c \n[ -e x ]\n"
        ids = self.stdout("enqueue", "--lines", "-", "-p", "3", stdin=text).split()
        found = [(self.job(i).command, self.job(i).priority) for i in ids]
        self.assertEqual(found, [("echo a", 3), ("b | c", 3), ("[ -e x ]", 3)])
        self.assertIn("line 2: ", self.assert_refused("enqueue", "--lines", "-", stdin="a\nb\0"))
        self.assertIn("enqueue --lines -", self.assert_refused("enqueue", "--lines", "true"))

    EACH = {  # words, and the command for the argument "it's"
        "gzip -9 {}": """gzip -9 'it'"'"'s'""",
        "a {} > {}.gz": """a 'it'"'"'s' > 'it'"'"'s'.gz""",
        "gzip -9": """gzip -9 'it'"'"'s'""",
        "gzip": """gzip 'it'"'"'s'""",
    }

    @NEEDS_SHELL
    def test_each_argument_makes_a_job_and_is_quoted_exactly(self) -> None:
        for line, command in self.EACH.items():
            self.assertEqual(self.commands(line, ":::", "it's"), [command])
        words = ("-p", "5", "printf", "%s|", "a{}", "{}", ":::")
        self.assertEqual(
            shlex.split(self.commands(*words, "$x *")[0])[1:], ["%s|", "a$x *", "$x *"]
        )
        self.assertEqual(self.commands("--", "rm", ":::", "-f", "a b"), ["rm -f", "rm 'a b'"])
        options = ("--id", "b-{}", "--after", "a-{}", "--env", "X=<{}>")
        self.stdout("enqueue", "--id", "a-{}", "true", ":::", "1", "2")
        self.assertEqual(self.stdout("enqueue", *options, "x", ":::", "1", "2"), "b-1\nb-2\n")
        shown = self.json_object("show", "b-2")
        self.assertEqual((shown["after"], shown["env"]), (["a-2"], {"X": "<2>"}))
        refused = {
            "echo x :::": "no arguments after :::",
            "- ::: a": "must follow a command",
            '{"command":"a"} ::: a': "must follow a command",
        }
        for line, reason in refused.items():
            self.assertIn(reason, self.assert_refused("enqueue", *line.split(" ")))
        self.assertIn("outside of quotes", self.assert_refused("enqueue", "a '{}'", ":::", "b"))

    def test_jobs_that_list_prints_can_be_enqueued_again(self) -> None:
        self.enqueue("true", env={"A": "b"}, priority=3, timeout=7, retry_delays="5,6")
        self.enqueue("true", id="named", run_at="2030-01-31T08:00Z")
        self.enqueue("true", id="hourly", every=3600)
        self.enqueue("true", id="daily", cron="@daily")
        listed = self.stdout("list", "--json")
        copy = ("enqueue", "-", "--queue", "other")
        line = self.assert_refused(*copy, stdin=listed)
        self.assertIn("job named already exists", line)
        fresh = self.stdout(*copy, "--new-ids", stdin=listed).split()
        self.assertTrue(all(job_id.isdigit() for job_id in fresh), fresh)
        self.use_queue("elsewhere")
        self.stdout("pause")
        self.assertEqual(self.stdout(*copy, stdin=listed).split()[:2], ["1", "named"])
        ignored = {"seq", "id", "queue", "created_at", "updated_at", "scheduled_for", "run_after"}
        self.assertEqual(self.job("named").run_after, queuectl.parse_time("2030-01-31T08:00Z"))
        pairs = zip(map(json.loads, listed.splitlines()), self.json_lines("list"))
        for old, new in pairs:
            kept = {key: old[key] for key in old.keys() - ignored}
            self.assertEqual({key: new[key] for key in kept}, kept)

    def test_job_with_facts_that_list_does_not_print_is_copied_from_show(self) -> None:
        self.enqueue("true", id="first")
        self.enqueue("cat", id="second", stdin="text")
        self.enqueue("true", id="third", after=["first"])
        for job_id, key in (("second", "stdin"), ("third", "after")):
            line = self.stdout("list", "--json", job_id)
            error = self.assert_refused("enqueue", "-", stdin=line)
            self.assertIn(f"list --json does not show {key} of this job; use show --json", error)
            shown = self.stdout("show", "--json", job_id)
            new = self.stdout("enqueue", "-", "--new-ids", stdin=shown).strip()
            self.assertEqual(self.json_object("show", new)[key], json.loads(shown)[key])

    def test_object_that_lost_its_quotes_is_refused(self) -> None:
        cases = ("{id:x command:true}", "id:x command:true", "{id: x, command: true}", "{id:x}")
        for words in cases:
            with self.subTest(words):
                error = self.assert_refused("enqueue", *words.split())
                self.assertIn("lost its quotes, in bash or PowerShell?", error)
        self.assertEqual(self.commands("id:x"), ["id:x"])

    SHELL_SCRIPT = r"""
        set -eu
        q() { $QUEUECTL "$@"; }
        code() { code=0; "$@" || code=$?; echo $code; }
        build=$(q enqueue --priority 5 'echo built > artefact')
        ship=$(q enqueue --after "$build" 'cat artefact')
        bad=$(q enqueue --max-retries 1 'exit 7')
        never=$(q enqueue --after "$bad" true)
        test "$(q enqueue --id night --if-absent --delay 1h true)" = night
        q pause && q resume
        test "$(code q worker start --quiet --drain --horizon 1m)" = 1
        test "$(q logs "$ship")" = built
        q show "$ship" | grep -q '^state *completed'
        test "$(code q wait "$build" "$ship" "$bad")" = 7
        test "$(code q wait --timeout 0.1 night)" = 124
        test "$(q cancel --cascade night "$bad" | xargs)" = "night $never"
        q prune && q dlq purge "$bad" && test "$(q list --json)" = ''
        q config set timeout 5m && q config unset timeout && test "$(q config get timeout)" = 300
        q config list | grep -q '^timeout *5m'
        test "$(q worker list --json)" = '' && q worker stop
        q completion bash | bash -n
    """

    @SLOW
    def test_shell_script_can_rely_on_ids_and_exit_codes(self) -> None:
        os.environ["QUEUECTL"] = " ".join([*PYTHON, COMPILED])
        result = self.process("sh", "-c", self.SHELL_SCRIPT)
        self.assertEqual(result.returncode, 0, result.stderr)


class CliEnqueueWaitLive(Live):
    """`enqueue --wait` and `--follow`."""

    def test_wait_returns_the_code_of_the_first_job_that_failed(self) -> None:
        self.configure(backoff_base="1")
        self.pool()
        self.wait_for_workers(1)
        waiting = ("enqueue", "--wait")
        self.assertEqual(self.result(*waiting, "echo hi", real=True), (0, "", "1\n"))
        self.assertEqual(self.result(*waiting, "exit 7", "--max-retries", "1"), (7, "", "2\n"))
        once = ("--max-retries", "1")
        self.assertEqual(self.result(*waiting, *once, "exit", ":::", "0", "3", "5").returncode, 3)
        followed = self.result("enqueue", "-f", *once, "echo {}; exit {}", ":::", "0", "3", "5")
        shown = "==> 6 <==\n0\n\n==> 7 <==\n3\n\n==> 8 <==\n5\n"
        self.assertEqual(followed, (3, shown, "6\n7\n8\n"))

    def test_waiting_for_a_schedule_ends_with_its_first_job(self) -> None:
        self.pool()
        self.wait_for_workers(1)
        for option, shown in {"-f": "hi\n", "--wait": ""}.items():
            schedule = ("--id", f"x{option}", "--every", "1h", "--wait-timeout", "5")
            result = self.result("enqueue", option, *schedule, "echo hi", real=True)
            self.assertEqual(result, (0, shown, f"x{option}\n"))

    def test_followed_job_is_shown_as_it_comes_until_its_last_attempt(self) -> None:
        self.pool()
        self.wait_for_workers(1)
        line = "echo try $QUEUECTL_ATTEMPT; until test -e go; do sleep 0.01; done; rm go; exit 3"
        options = ("--max-retries", "2", "--retry-delays", "0.3")
        follower = self.start("enqueue", "-f", *options, line, stderr=subprocess.PIPE)
        for number in (1, 2):
            self.wait_for_output(follower, f"try {number}\n")
            self.write("go")
        self.assertEqual(follower.wait(10), 3)
        error = follower.stderr.read()
        said = r"^1\nqueuectl: job 1 is waiting: due .*; its last attempt: exit code 3\n$"
        self.assertRegex(error, said)

    @internal
    def test_output_of_an_attempt_that_was_too_short_to_follow_is_shown(self) -> None:
        self.configure(output_limit="10")
        self.enqueue("seq 1000", id="x", max_retries=1)
        self.drain()
        result = self.result("enqueue", "-f", "--id", "x", "--if-absent", "true")
        self.assertEqual(result[:2], (0, "\n999\n1000\n"))
        self.assertIn("bytes of earlier output were not kept", result.stderr)

    def test_wait_timeout_ends_the_waiting_and_not_the_job(self) -> None:
        for options in (("--wait",), ("-f",), ()):
            result = self.result("enqueue", *options, "--wait-timeout", "0.05", "true")
            self.assertEqual(result[:2], (124, ""))
            for part in ("is waiting: no worker is running", "timed out after 0.05 s"):
                self.assertEqual(result.stderr.count(part), 1, result.stderr)
        self.assertEqual(set(self.states().values()), {"pending"})
        self.stdout("pause")
        self.assertIn("queues are paused", self.result("enqueue", "--wait-timeout=0", "a").stderr)

    def test_job_that_depends_on_a_dead_one_ends_the_waiting(self) -> None:
        self.enqueue("false", id="bad", max_retries=1)
        self.drain(code=1)
        for option in ("--wait", "--follow"):
            result = self.result("enqueue", option, "--after", "bad", "true")
            self.assertEqual(result.returncode, 1)
            self.assertIn("cannot run: job bad is dead", result.stderr)

    def test_ctrl_c_leaves_the_job_in_the_queue_and_says_so(self) -> None:
        for number, option in enumerate(("--wait", "-f"), 1):
            waiting = self.start("enqueue", option, "true", stderr=subprocess.STDOUT)
            self.wait_for_output(waiting, "no worker is running")
            waiting.send_signal(signal.SIGINT)
            shown = waiting.communicate(timeout=10)[0]
            stays = f"queuectl: 1 job stays in the queue (queuectl cancel {number})\n"
            self.assertEqual((waiting.returncode, shown), (-signal.SIGINT, stays))
        self.assertEqual(set(self.states().values()), {"pending"})

    def test_person_at_a_terminal_is_told_of_the_new_queue_and_of_missing_workers(self) -> None:
        hint = "queuectl: no worker is running; start one: queuectl worker start\n"
        shown = Terminal(self, "enqueue", "true", columns=200).end()
        self.assertEqual(shown, f"1\nqueuectl: made a new queue: {self.path}\n{hint}")
        self.assertEqual(self.result("enqueue", "true"), (0, "2\n", ""))
        self.pool()
        self.wait_for_workers(1)
        self.assertEqual(Terminal(self, "enqueue", "true").end(), "3\n")

    def test_person_who_types_jobs_is_told_how_to_end_them(self) -> None:
        shell = Terminal.shell(self)
        for words, text in {"-": '{"command": "a"}', "--lines -": "b"}.items():
            shell.type(f"q enqueue {words}")
            shell.wait_for("Ctrl-D ends")
            shell.type(text)
            shell.type("\x04")
            shell.wait_for(r"\n\d\r\n")
        self.assertEqual([job["command"] for job in self.json_lines("list")], ["a", "b"])


class CliBadInput(Case):
    """Input that is refused."""

    INVALID_VALUES = {
        "id": (1, None, True, [], {}, "", "a b", "-a", "x" * 201, "a\nb", "a\0", "a\u202eb", "a,b"),
        "command": (1, None, False, [], {}, "", " \t\n", "a\0b", "a\ud800b"),
        "queue": (1, None, True, [], {}, "", "a b", "\udfff"),
        "priority": ("1.5", None, True, 1.5, [], {}, 10**7, -(10**7), 10**400),
        "delay": (None, True, [], {}, "soon", -1, "-1", 1e12, 10**400, "9" * 400, float("nan")),
        "run_at": (
            None,
            True,
            [],
            {},
            "soon",
            -1,
            "2030-13-01",
            "9999999-01-01",
            1e300,
            "9" * 5000,
        ),
        "timeout": (None, True, [], {}, "long", -1, float("inf"), float("nan")),
        "max_retries": ("x", None, True, 1.5, [], {}, 0, -1, 10**7),
        "cwd": (1, None, True, [], {}, "/\0", "/\ud800"),
        "env": (1, None, [], "A=1", {"A": 1}, {"": "x"}, {"A=B": "x"}, {"A": None}, {"A": "\0"}),
        "retry_delays": (None, True, "", "1,", "soon", "-1", [], [-1], ["x"], {"a": 1}, [1] * 1001),
        "stdin": (1, None, True, [], "\ud800", "x" * ((1 << 20) + 1)),
        "after": (1, None, "", [1], [""], ["a b"], {"a": 1}, "-x"),
        "after_end": (1, None, "", [1], [""], ["a b"], {"a": 1}, "-x"),
        "on_dead": (1, None, True, [], " ", "a\0b", "a\ud800b"),
        "on_end": (1, None, True, [], " ", "a\0b", "a\ud800b"),
        "every": (0, 0.5, -1, None, True, "", "often", [60]),
        "cron": (1, None, *INVALID_CRON_RULES),
    }

    INVALID_JSON = (  # the JSON, and a part of the error message
        ('{"command": "true", "comand": "x"}', "did you mean command?"),
        ('{"command": "true", "max-retries": 1}', "did you mean max_retries?"),
        ('{"command": "true", "\\ud800": 1}', "unknown field"),
        ('{"command": "true", "delay": 1, "run_at": 1}', "cannot have both"),
        ("{}", "needs a command"),
        ("[]", "a job is a JSON object"),
        ("[1]", "a job is a JSON object"),
        ('[{"command": "true"}, null]', "a job is a JSON object"),
        ("{", "bad JSON"),
        ('{"command": "true"} x', "bad JSON in column 21: expecting value"),
        ('[{"command": "true"} {"command": "true"}]', "expecting ',' or ']'"),
        ('{"command": "true",', "in column 1: the object that begins here does not end"),
        ("{command:true}", "lost its quotes"),
        ("{'command': 'true'}", "bad JSON"),
        ('[{"env": [' * 10_000, "bad JSON"),
        ('{"command": ' * 10_000, "bad JSON"),
    )

    @NEEDS_SHELL
    def test_bad_usage_is_reported_in_one_line(self) -> None:
        commands = (
            "enqeue x",
            "enqueue",
            "list --no-such",
            "list --state lost",
            "worker start --count -1",
            "worker stop --timeout soon",
            "dlq",
        )
        for command in commands:
            with self.subTest(command):
                self.assert_refused(*command.split())
        self.assertEqual(os.listdir(self.dir), [])

    @NEEDS_SHELL
    def test_argument_or_directory_that_is_not_unicode_is_refused(self) -> None:
        self.stdout("enqueue", "true")
        for command in ("show \udcff", "cancel \udcff", "wait \udcff", "dlq retry \udcff"):
            self.assertIn("'\\udcff' is not valid Unicode", self.assert_refused(*command.split()))
        cwd = os.fsencode(self.dir) + b"/\xff"
        os.mkdir(cwd)
        self.assertIn(
            "is not valid Unicode", self.assert_refused("enqueue", "true", real=True, cwd=cwd)
        )
        self.assertEqual(self.stdout("enqueue", "--cwd", "/", "true", real=True, cwd=cwd), "1\n")

    @NEEDS_SHELL
    def test_closed_stdin_is_refused(self) -> None:
        closed = ("sh", "-c", 'exec "$@" <&-', "sh")
        self.assertIn("stdin is closed", self.assert_refused("enqueue", "-", prefix=closed))
        self.assertEqual(os.listdir(self.dir), [])

    @SLOW
    @internal
    def test_invalid_value_is_rejected_with_the_name_of_its_field(self) -> None:
        self.assertEqual(set(self.INVALID_VALUES), set(queuectl.FIELDS))
        for field, values in self.INVALID_VALUES.items():
            for value in values:
                job = json.dumps({"command": "true", field: value})
                with self.subTest(job[:80]):
                    self.assertIn(field, self.assert_refused("enqueue", job))
                    lines = '{"command": "true"}\n' + job
                    self.assertIn(
                        f"line 2: {field}", self.assert_refused("enqueue", "-", stdin=lines)
                    )
        self.assertEqual(os.listdir(self.dir), [])

    def test_invalid_json_is_rejected_with_a_reason(self) -> None:
        for source, reason in self.INVALID_JSON:
            with self.subTest(source[:80]):
                self.assertIn(reason, self.assert_refused("enqueue", source))
                self.assertIn(
                    "line 1: ", self.assert_refused("enqueue", "-", stdin=source.encode())
                )
        for garbage in (b"\xff\xfe\n", b"\x00\x01\x02", b"\x80" * 100_000):
            with self.subTest(garbage[:10]):
                lines = b'{"command": "true"}\n\n' + garbage
                self.assertIn("line 3: ", self.assert_refused("enqueue", "-", stdin=lines))
        self.assertEqual(os.listdir(self.dir), [])

    @NEEDS_SHELL
    @internal
    def test_command_is_rejected_only_beyond_the_length_the_system_can_start(self) -> None:
        limit = queuectl.COMMAND_LIMIT
        for command in ("x" * (limit + 1), "é" * (limit // 2 + 1)):
            job = json.dumps({"command": command}).encode()
            error = self.assert_refused("enqueue", "-", stdin=job)
            self.assertIn(f"longer than {limit} bytes", error)
        self.assertEqual(os.listdir(self.dir), [])
        self.enqueue("true " + "x" * (limit - 5))
        self.drain()

    def test_duplicate_id_rejects_the_whole_batch_and_names_its_line(self) -> None:
        self.enqueue("true", id="taken")
        for ids, number in (("a taken b", 2), ("a b c b", 4)):
            with self.subTest(ids):
                jobs = [{"command": "true", "id": job_id} for job_id in ids.split()]
                lines = "\n".join(map(json.dumps, jobs)).encode()
                error = self.assert_refused("enqueue", "-", stdin=lines)
                duplicate = ids.split()[number - 1]
                self.assertIn(f"line {number}: job {duplicate} already exists", error)
        self.assertEqual(list(self.states()), ["taken"])

    def test_json_without_its_quotes_gets_a_powershell_hint(self) -> None:
        for words in (["{id:job1,command:echo hi}"], ["{id:job1,command:echo", "hi}"]):
            with self.subTest(words):
                error = self.assert_refused("enqueue", *words)
                for part in ("PowerShell", "enqueue COMMAND", "enqueue -"):
                    self.assertIn(part, error)
        self.assertFalse(os.path.exists(self.path))

    INVALID_OPTIONS = {
        "--priority 1e3": "--priority must be a whole number",
        "--delay ": "--delay must be a duration",
        "--at 31.1.2030": "--at must be a time",
        "--at 9999999999999": "--at must be a time between 1970 and 9999",
        "--after ": "--after must not contain an empty id",
        "--after 1,": "--after must not contain an empty id",
        "--after 1 --after 7": "after: there is no job 7",
        "--every 0": "--every must be at least 1 second",
        "--cron ": "--cron must have five fields",
        "--cron @daily --every 1d": "a job cannot have both every and cron",
        "--delay 1 --at 2030-01-01": "a job cannot have both delay and run_at",
        "--env =x": "--env must have non-empty names",
        "--env x": "--env must be NAME=VALUE",
        "--queue ": "--queue must be",
        "--id a\tb": "--id must be",
        "- ": "- must be the only argument",
        "{}": "a job needs a command",
    }

    def test_invalid_option_is_rejected_by_name(self) -> None:
        self.enqueue("true")
        for options, reason in self.INVALID_OPTIONS.items():
            with self.subTest(options):
                self.assertIn(reason, self.assert_refused("enqueue", *options.split(" "), "true"))
        for words in ("pause", "resume", "list", "worker start"):
            with self.subTest(words):
                self.assert_refused(*words.split(), "--queue=")
        self.assertEqual(list(self.states()), ["1"])

    USAGE_HINTS = {
        "frobnicate": "no command frobnicate; choose from enqueue, worker, status,",
        "add x": "; type: queuectl enqueue (",
        "ls": "; type: queuectl list (",
        "kill 1": "; type: queuectl cancel (",
        "retry": "; type: queuectl dlq retry (",
        "top": "; type: queuectl status --watch (",
        "prun": "no command prun; choose from enqueue,",  # it deletes
        "dlq purg": "no command purg; choose from list, retry, purge",
        "worker start 2": "did you mean --count 2?",
        "worker start gpu": "did you mean --queue gpu?",
        "cancel --all": "did you mean --state pending,processing?",
        "edit --all --priority 1": "did you mean --state pending?",
        "list --all": "did you mean --limit 0?",
        "pause default": "did you mean --queue default?",
        "enqueue x --max-retries 0": "must be at least 1, which means to try once",
        "enqueue x --timeout none": "0 means no limit",
        "enqueue x --delay=-5m": "must not be negative",
        "enqueue x --delay -5m": "must not be",  # negative, or begin with -
        "status --db=": "--db must not be empty",
        "list --state done": "--state must not be 'done': did you mean completed?",
        "list -s failed": "did you mean dead?",
        "list -s running": "did you mean processing?",
        "list -s queued": "did you mean pending?",
        "prune --older-than 7": "must have a unit: 7 would be seconds; 7d for days",
        "prune --older-than 7.5": "must have a unit: 7.5 would be seconds; 7d for days",
        "dlq purge --older-than 7": "must have a unit: 7 would be seconds; 7d for days",
        "config set retention 30": "retention must have a unit: 30 would be seconds; 7d for days",
        "logs --failed x": "use it alone",
        "logs -f x y": "-f follows one job",
        "prune --state pending": "must be one of completed, dead, cancelled, not pending",
        "cancel": "name the jobs, or select them by --queue,",
        "--db new.db worker start --horizon 5": "--horizon requires --drain",
        "wait --all 1": "either name the jobs or use --all",
    }

    def test_usage_error_says_how_to_correct_it(self) -> None:
        self.enqueue("true", id="1")
        for words, hint in self.USAGE_HINTS.items():
            with self.subTest(words):
                self.assertIn(hint, self.assert_refused(*words.split()))
        self.assertFalse(os.path.exists(self.file("new.db")))
        directory = self.file("none")
        error = self.assert_refused("--db", directory + "/x.db", "enqueue", "true", code=4)
        self.assertEqual(error, f"queuectl: there is no directory {directory}; create it first\n")

    NEAREST = {
        "enqeue true": "enqueue",
        "worker strat": "start",
        "worker start --cuont 2": "--count",
        "enqueue --prioritty 3 true": "--priority",
        "show nightly-bakcup": "nightly-backup",
        "cancel nihgtly-backup": "nightly-backup",
        "wait nightlybackup": "nightly-backup",
        "list dead": "--state dead",
        "config get tiemout": "timeout",
    }

    def test_misspelled_command_option_or_id_gets_the_nearest_suggested(self) -> None:
        self.enqueue("true", id="nightly-backup")
        for words, nearest in self.NEAREST.items():
            with self.subTest(words):
                code, out, err = self.result(*words.split())
                self.assertIn(f": did you mean {nearest}?", err)
                self.assertIn(code, (1, 2))
                self.assertEqual((out, err.count("\n")), ("", 1))
        self.assertIn("; ids are sep", self.assert_refused("cancel", "1,2", code=1))


class CliWorkers(Live):
    """`worker start`, `worker stop` and `worker list`."""

    def test_quiet_pool_prints_no_events(self) -> None:
        self.enqueue("true")
        self.assertEqual(self.drain("--quiet"), "")

    @internal
    def test_count_of_zero_means_a_worker_for_each_cpu(self) -> None:
        cpus = mock.patch.object(queuectl, "cpu_count", return_value=3)
        with cpus, mock.patch.object(queuectl, "work", return_value=0) as work:
            self.stdout("worker", "start", "--count", "0")
        self.assertEqual(work.call_args[0][1], 3)

    @SLOW
    def test_worker_stop_waits_until_all_workers_are_gone(self) -> None:
        """Promise 6: stopping is graceful, from another terminal too."""
        job = self.enqueue(f"touch started; {RUN_UNTIL_GO}; sleep 0.3")
        later = self.enqueue("true")
        pool = self.pool()
        self.wait_for_file("started")
        began = time.monotonic()
        self.assertIn(
            "still running", self.assert_refused("worker", "stop", "--timeout", "0.2", code=124)
        )
        self.assertGreaterEqual(time.monotonic() - began, 0.2)
        self.wait_for_output(pool, "worker stop: no new jobs")
        self.write("go")
        self.stdout("worker", "stop")
        self.assertEqual((self.workers(), self.job(job).state), ({}, "completed"))
        self.assert_exits(pool, 0)
        self.assertEqual(self.job(later).run, 0)
        self.assertIn("no workers", self.run_cli("worker", "stop").stderr)

    def test_worker_stop_now_kills_running_jobs_of_all_pools(self) -> None:
        job = self.enqueue("echo $$ > pid; sleep 300 & sleep 300")
        pools = [self.pool(), self.pool()]
        self.wait_for_file("pid", "\n")
        self.wait_for_workers(2)
        self.run_cli("worker", "stop", "--now")
        after = self.job(job)
        self.assertEqual((after.state, after.attempts, self.workers()), ("pending", 0, {}))
        for pool in pools:
            self.assert_exits(pool, 0)
        wait_until(lambda: not self.leftover_processes(), 1.0)

    @internal
    def test_pools_are_told_apart_by_their_queues(self) -> None:
        self.enqueue("true")
        for options in (("--queue", "gpu", "--count", "2"), ()):
            started = self.run_cli("worker", "start", "--detach", *options, real=True).stderr
        self.assertIn("runs here too, with 2 workers\n", started)
        workers = self.json_lines("worker", "list")  # all are there when --detach returns
        self.assertEqual(sorted(w["queues"] for w in workers), [[], ["gpu"], ["gpu"]])
        self.assertTrue(all(queuectl.parse_time(w["started"]) for w in workers))
        self.assertEqual(len(self.json_object("status", "--queue", "cpu")["workers"]), 1)
        self.assertEqual(len(self.json_object("status", "--queue", "gpu")["workers"]), 3)
        self.assert_refused("worker", "stop", "pool-0", code=1)
        other = next(w["pool"] for w in workers if not w["queues"])
        found = self.run_cli("worker", "stop", other, "--queue", "gpu").stderr
        self.assertIn("no workers are running for this queue", found)
        self.assertEqual(len(self.json_lines("worker", "list")), 3)
        self.stdout("worker", "stop", "--queue", "gpu")
        (left,) = self.json_lines("worker", "list")
        self.stdout("worker", "stop", left["pool"])
        self.assertEqual(self.json_lines("worker", "list"), [])

    def test_drain_sums_up_what_it_did(self) -> None:
        self.configure(max_retries="1")
        for command in ("true", "true", "false"):
            self.enqueue(command)
        self.enqueue("true", after=["3"])
        last = self.run_cli("worker", "start", "--drain", code=1).stderr.splitlines()[-1]
        self.assertRegex(last, r"^\S+ 2 completed, 1 dead, 1 blocked in [\d.]+ s$")

    @SLOW
    def test_detached_workers_are_listed_and_stopped(self) -> None:
        self.addCleanup(lambda: self.result("worker", "stop", "--now"))
        start = Terminal(self, "worker", "start", "--detach", "--count", "2")
        shown = start.end()  # closes the terminal
        pattern = r"(pool-\w+) runs as process (\d+); its log is (\S+)"
        pool, pid, log = re.findall(pattern, shown)[0]
        self.assertEqual(start.process.returncode, 0)
        self.assertEqual(os.getsid(int(pid)), int(pid))
        self.enqueue(f"touch started; {RUN_UNTIL_GO}", id="busy")
        self.wait_for_file("started")
        self.run_cli("worker", "start", "--detach", real=True)
        self.wait_for_workers(3)
        workers = self.json_lines("worker", "list")
        (busy,) = (worker for worker in workers if worker["job"])
        self.assertEqual((busy["pool"], busy["job"]), (pool, "busy"))
        self.assertEqual(len({worker["pool"] for worker in workers}), 2)
        self.assertLessEqual(queuectl.parse_time(busy["since"]), time.time())
        self.assertTrue(alive(busy["pid"]))
        ago = "(now|[0-9]+ s ago)"
        row = f"{busy['worker']} +{busy['pid']} +{ago} +busy +{ago} +touch started"
        self.assertRegex(self.stdout("worker", "list"), row)
        stop = self.start("worker", "stop")
        self.assertEqual(stop.stdout.readline(), "queuectl: waiting for busy\n")
        self.write("go")
        self.assertEqual(stop.communicate(timeout=10)[0], "")
        self.assertEqual(stop.returncode, 0)
        self.assertIn("job busy completed", self.read(log))

    @SLOW
    def test_program_that_calls_main_can_use_detach_and_completion(self) -> None:
        self.addCleanup(self.result, "worker", "stop", "--now")
        self.enqueue("true", id="x")
        os.environ["PYTHONPATH"] = HERE
        program = (*PYTHON, "-c", "import queuectl, sys; sys.exit(queuectl.main())")
        start = self.process(*program, "worker", "start", "--detach", "--quiet")
        self.assertRegex(start.stderr, "^queuectl: pool-.* runs as process")
        script = self.process(*program, "completion", "bash").stdout
        self.assertIn(f" {PROGRAM} completion bash", script)

    def test_detached_workers_that_cannot_start_report_the_reason(self) -> None:
        self.enqueue("true")
        shutil.rmtree(self.path + ".run")  # as beside a copy of the database
        os.chmod(self.path, 0o666)
        result = self.run_cli("worker", "start", "--detach", code=4, real=True)
        self.assertIn("other users may write to", result.stderr)


@NEEDS_SHELL
class CliStatus(Clocked):
    """`status` and `list` of one queue."""

    @internal
    def test_queue_that_never_had_a_job_is_reported_with_the_nearest_name(self) -> None:
        self.queue.enqueue("true", id="b", queue="old")
        self.finish(0)
        self.queue.prune()
        self.queue.enqueue("true", id="a", queue="render")
        hint = "queuectl: queue rendr never had a job: did you mean render?\n"
        for words in ("status", "list", "list --json", "pause", "resume", "dlq list"):
            with self.subTest(words):
                code, _, err = self.result(*words.split(), "--queue", "rendr")
                self.assertEqual((code, hint in err), (0, words != "resume"), err)
                for known in ("render", "old"):  # the jobs of one have been deleted
                    err = self.run_cli(*words.split(), "--queue", known).stderr
                    self.assertNotIn("never", err)
        found = self.run_cli("worker", "start", "--drain", "--queue", "rendr").stderr
        self.assertIn("queue rendr never had a job: did you mean render?\n", found)

    @internal
    def test_change_is_reported_on_stderr(self) -> None:
        messages = {
            "pause --queue gpu": "queue gpu is paused; running jobs continue",
            "pause": "all queues are paused; running jobs continue",
            "resume": "all queues are no longer paused",
            "config set timeout 5400": "timeout is 1h30m for all queues",
            "config set timeout 90 --queue gpu": "timeout is 1m30s for queue gpu",
            "config unset timeout --queue gpu": "timeout is 1h30m for queue gpu",
            "config set output_limit 1.5M": "output_limit is 1536K for all queues",
            "config set no_retry_exit_codes": "no_retry_exit_codes is empty for all queues",
            "config set shell nosuch": "warning: there is no program nosuch here",
            "prune": "1 job pruned",
        }
        self.queue.enqueue("true", id="a", queue="gpu")
        self.queue.cancel(["a"])
        for words, message in messages.items():
            with self.subTest(words):
                empty = [""] if words.endswith("codes") else []
                code, out, err = self.result(*words.split(), *empty)
                self.assertEqual((code, out), (0, ""))
                self.assertIn(f"queuectl: {message}", err)

    @internal
    def test_status_and_list_filter_by_queue(self) -> None:
        enqueue_pairs(self.queue)
        listed = self.json_lines("list", "--queue", "gpu")
        self.assertEqual([job["id"] for job in listed], ["gpu1", "gpu2"])
        self.assertRegex(self.stdout("list", "--queue", "gpu"), r"gpu1 +pending +gpu +0/3")
        self.assertRegex(self.stdout("status"), r"\nQUEUE +PENDING.*\n(.*\n)*gpu +2 +0 +0 +0 +0\n")
        queues = self.json_object("status")["queues"]
        pending = {name: queue["pending"] for name, queue in queues.items()}
        self.assertEqual(pending, {"cpu": 2, "default": 2, "gpu": 2})
        self.queue.configure("no_retry_exit_codes", "3")
        self.finish(3)
        self.queue.pause("cpu")
        self.assertEqual([self.queue._reader.rate(), self.queue._reader.rate("gpu")], [1 / 60, 0])
        whole = "\n".join(queuectl.status_text(self.queue._reader, None, full=True))
        gpu = "\n".join(queuectl.status_text(self.queue._reader, "gpu", full=True))
        self.assertRegex(whole, r"(?s)rate +0\.0 .*paused +cpu\n.*LAST FAILED.*\ndefault1 ")
        self.assertRegex(whole, r"\nrate +0\.0  jobs/s recently\n")
        self.assertNotRegex(gpu, "paused|FAILED|default")

    def test_status_counts_the_notifications_that_wait_or_are_dead(self) -> None:
        self.assertNotIn("notifications", self.stdout("status"))
        self.queue.configure("on_end", "cat", "gpu")
        self.queue.configure("no_retry_exit_codes", "3")
        for name in ("cpu", "gpu", "gpu", "gpu"):
            self.queue.enqueue("true", queue=name)
        self.queue.cancel(["1", "2", "3", "4"])
        self.assertIn("\nnotifications 3 waiting\n", self.stdout("status"))
        self.finish(3)
        self.finish(0)
        self.assertIn("\nnotifications 1 waiting, 1 dead\n", self.stdout("status"))
        for name, counts in {"gpu": (1, 1), "cpu": (0, 0)}.items():
            found = self.json_object("status", "--queue", name)["notifications"]
            self.assertEqual(found, dict(zip(("pending", "dead"), counts)))


class CliStatusLive(Live):
    """`status` while workers are running."""

    def test_status_shows_counts_and_workers(self) -> None:
        self.enqueue("touch started; while test ! -e end; do sleep 0.01; done", id="busy")
        self.enqueue("true", delay=3600)
        pool = self.pool("--count", "2")
        wait_until(lambda: os.path.exists(self.file("started")) and len(self.workers()) == 2)
        status = self.json_object("status")
        self.assertEqual((status["pending"], status["processing"]), (1, 1))
        self.assertEqual({worker["job"] for worker in status["workers"]}, {"busy", None})
        self.assertRegex(self.stdout("status"), r"workers +2\n")
        self.write("end")
        self.stdout("worker", "stop")
        self.assertEqual((pool.wait(5), self.job("busy").state), (0, "completed"))
        self.assertIn("no workers are running", self.run_cli("worker", "stop").stderr)

    @SLOW
    def test_status_watch_refreshes_until_interrupted(self) -> None:
        self.configure(max_retries="1")
        self.enqueue("exit 3", id="bad", priority=1)
        self.enqueue(f"touch started; {RUN_UNTIL_GO}", id="busy")
        for number in range(3):
            self.enqueue("true", id=f"later{number}")
        self.pool()
        self.wait_for_file("started")
        watch = Terminal(self, "status", "--watch", env={"NO_COLOR": "1"})
        rows = (
            r"^\x1b\[\?1049h\x1b\[H\x1b\[Jqueue      \S+/queuectl.db\r\n",
            r"pending +3\r\nprocessing +1\r\ncompleted +0\r\ndead +1\r\n",
            r"workers +1\r\nrate +\d\.\d  jobs/s recently\r\n",  # none is idle
            r"oldest +job later0, due \S+.*; next to run\r\n",
            r"RUNNING  FOR .*\r\nbusy     \d+ s +1 +worker-\S+ +touch started",
            r"bad +(now|\d+ s ago) +exit code 3\r\n",
        )
        watch.wait_for("(?s)" + ".*".join(rows))
        self.write("go")
        watch.wait_for(r"(?s)\x1b\[H\x1b\[J.*completed +4\r\n.*workers +1  \(1 idle\)\r\n")
        for number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(number):
                watch.process.send_signal(number)
                self.assertTrue(watch.end().endswith("\x1b[?1049l"))  # the screen before
                self.assertEqual(watch.process.returncode, -number)
                watch = Terminal(self, "status", "--watch")
                watch.wait_for("pending")


class CliList(Case):
    """The JSON of every command that lists something."""

    @internal
    def test_json_of_every_reading_command_has_only_documented_fields(self) -> None:
        self.configure(max_retries="1")
        self.enqueue("true", id="x")
        self.enqueue("true", every="1h", id="\u00e9")
        with Queue(self.path) as queue:
            lock = queuectl.LockFile(queue._db.run_dir.file("worker-1-1"))
            self.addCleanup(lock.close)
            claim(queue, "worker-1-1")
        documentation = readme()
        for words in ("status", "list", "list --recurring", "show x", "worker list"):
            with self.subTest(words):
                code, out, err = self.result(*words.split(), "--json")
                self.assertEqual((code, err, out.isascii()), (0, "", True))
                for key in json.loads(out.splitlines()[0]):
                    self.assertIn(f"`{key}`", documentation)
        for words in ("dlq list", "list --state dead"):
            with self.subTest(words):
                self.assertEqual(self.result(*words.split(), "--json"), (0, "", ""))


class CliListLive(Live):
    """`list`: columns, limits and schedules."""

    def test_list_aligns_columns_and_reports_jobs_beyond_its_limit(self) -> None:
        for number in range(5):
            self.enqueue(f"echo {number}", id="x" * (number + 1))
        header, *lines = self.stdout("list").splitlines()
        column = header.index("COMMAND")
        self.assertEqual([line.index("echo") for line in lines], [column] * 5)
        code, stdout, stderr = self.result("list", "--limit", "2", "--state", "pending")
        self.assertEqual((code, stdout.count("\n")), (0, 3))
        self.assertEqual(stderr, "queuectl: 2 of 5 jobs shown; --limit 0 shows all\n")
        self.assertEqual(len(self.json_lines("list")), 5)

    def test_list_shows_a_hundred_jobs_unless_told_otherwise(self) -> None:
        with Queue(self.path) as queue:
            list(queue.enqueue_many({"command": "true"} for _ in range(102)))
        code, out, err = self.result("list")
        self.assertEqual((code, out.count("\n")), (0, 101))
        self.assertEqual(err, "queuectl: 100 of 102 jobs shown; --limit 0 shows all\n")

    def test_list_recurring_shows_schedules_and_their_next_times(self) -> None:
        self.stdout("enqueue", "--id", "x", "--every", "15m", "--delay", "1h30s", "true")
        self.stdout("enqueue", "--id", "y", "--cron", "@hourly", "true")
        shown = r"x +every 15m +in 1h\d+s +x\.1 +true\ny +@hourly +(in .*|now) y\.1 +true\n"
        self.assertNotIn("RESULT", self.stdout("list", "--recurring"))
        self.assertRegex(self.stdout("list", "--recurring"), shown)
        self.assertEqual(
            [job["schedule_id"] for job in self.json_lines("list", "--recurring")], ["x", "y"]
        )
        self.assert_table(
            {
                "": "x\ny\n",
                "y": "y\n",
                "x.1 y": "x\ny\n",
                "--match y": "y\n",
                "--queue default": "x\ny\n",
            },
            lambda words: self.stdout("list", "--recurring", "--ids", *words.split()),
        )
        self.assertIn("never had a job", self.run_cli("list", "--recurring", "-q", "nosuch").stderr)
        self.assertIn("no job z", self.assert_refused("list", "--recurring", "z", code=1))


@NEEDS_SHELL
class CliShow(Clocked):
    """`show`, and `list` of jobs that have run."""

    @internal
    def test_schedule_shows_its_last_result_and_when_it_was(self) -> None:
        self.queue.enqueue("true", id="x", every=10)
        self.assertIsNone(self.json_object("show", "x")["last_result"])
        began = time.time() - 90
        job = self.claim()
        self.queue._ledger.finish(job, Outcome("exited", began - 2, began, 3, "exit code 3"))
        self.assertRegex(
            self.stdout("list", "--recurring"), r"LAST RESULT .*\n.* exit code 3 1m3\ds ago "
        )
        self.assertRegex(self.stdout("show", "x"), r"\nlast_result  exit code 3 1m3\ds ago\n")
        for words in (("list", "--recurring"), ("show", "x")):
            result = self.json_object(*words)["last_result"]
            self.assertEqual((result["job"], result["outcome"]), ("x.1", "failed"))
            self.assertEqual(result["finished"], queuectl.format_time(began))

    def test_refused_retry_of_a_schedule_names_its_last_dead_job(self) -> None:
        self.queue.enqueue("true", id="x", every=10, max_retries=1)
        refused = "job x.1 is pending, not dead or cancelled"
        self.assertIn(refused + "\n", self.assert_refused("dlq", "retry", "x", code=1))
        self.queue._ledger.finish(self.claim(), Outcome("exited", 1.0, 2.0, 3, "exit code 3"))
        refused = "job x.2 is pending, not dead or cancelled; the last dead one is x.1\n"
        self.assertIn(refused, self.assert_refused("dlq", "retry", "x", code=1))
        error = self.assert_refused("edit", "x.1", "--priority", "5", code=1)
        self.assertIn("x.1 is dead; it was not changed (queuectl pause, dlq retry x.1, ", error)

    @internal
    def test_list_has_times_of_the_last_attempt_as_json(self) -> None:
        keys = ("started", "finished", "seconds")
        for name in ("a", "b", "c"):
            self.queue.enqueue("true", id=name)
        done = self.claim()
        self.queue._ledger.finish(done, Outcome("exited", 1.0, 3.5, 0, None))
        running = self.claim()
        times = [queuectl.format_time(when) for when in (1.0, 3.5, running.locked_at)]
        rows = [[job[key] for key in keys] for job in self.json_lines("list")]
        self.assertEqual(rows, [[*times[:2], 2.5], [times[2], None, None], [None] * 3])

    def test_show_has_local_times_and_durations_that_can_be_typed(self) -> None:
        delays = {"retry_delays": [10, 60], "delay": "2h"}
        self.enqueue("true", id="x", timeout=5400, env={"A": "b c", "D": "e"}, **delays)
        with time_zone("XXX-3:30"):
            shown = self.stdout("show", "x")
            due = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.job("x").run_after))
        self.assertRegex(shown, rf"\nrun_after    {due}:\d\d \(in (2h|1h59m)")
        self.assertIn("\ntimeout      1h30m\n", shown)
        self.assertIn("\nretry_delays 10s,1m\n", shown)
        self.assertIn("\nenv          'A=b c' D=e\n", shown)
        exact = {0: "0", 0.5: "0.5s", 300: "5m", 86399.25: "23h59m59.25s", 2592000: "30d"}
        self.assert_table(exact, queuectl.exact_duration)
        for seconds, text in exact.items():
            self.assertEqual(queuectl.parse_duration(text), seconds)

    def test_command_without_an_id_is_about_the_job_that_was_added_last(self) -> None:
        self.assertIn("there are no jobs in /", self.assert_refused("show", code=1))
        for name in ("first", "last"):
            self.enqueue("echo it is $QUEUECTL_JOB_ID", id=name)
        self.enqueue("true", id="told", on_end="true", priority=-1)
        self.result("dlq", "purge", "told")
        self.stdout("cancel", "told")
        self.stdout("prune", "--state", "cancelled")
        self.drain()
        named = "queuectl: job last: echo it is $QUEUECTL_JOB_ID\n"
        self.assertEqual(self.result("logs"), (0, "it is last\n", named))
        self.assertEqual(self.result("wait"), (0, "", named))
        self.assertEqual(self.stdout("show"), self.stdout("show", "last"))

    def test_show_includes_every_attempt(self) -> None:
        self.configure(backoff_max="0.1")
        self.enqueue("echo try $QUEUECTL_ATTEMPT; test $QUEUECTL_ATTEMPT = 2", id="x")
        self.drain()
        keys = ("run", "exit_code", "error", "output")
        runs = [[run[key] for key in keys] for run in self.json_object("show", "x")["runs"]]
        self.assertEqual(runs, [[1, 1, "exit code 1", "try 1\n"], [2, 0, None, "try 2\n"]])
        self.assertIn("exit code 1", self.stdout("show", "x"))
        self.assert_refused("show", "y", code=1)

    @internal
    def test_history_is_read_in_slices_and_output_only_where_it_is_shown(self) -> None:
        """Promise 8."""
        self.enqueue("true", id="x")
        attempts = 80
        with Queue(self.path) as queue, queue.transaction() as db:
            for run in range(1, attempts + 1):
                row = (1, run, "w", "failed", 0, 1, 2, 1, "exit code 1", 0, b"x" * 65536)
                db.execute(queuectl.ADD_ATTEMPT, row)
            db.execute("UPDATE jobs SET run = ?", (attempts,))
        path = ("--db", self.path)
        for words in ("show x", "show x --json", "logs x", "logs x --run 3"):
            with self.subTest(words), open(os.devnull, "w") as null:
                with mock.patch.multiple(sys, stdout=null, stderr=null):
                    tracemalloc.start()
                    code = queuectl.main([*path, *words.split()])
                    peak = tracemalloc.get_traced_memory()[1]
                    tracemalloc.stop()
                self.assertEqual(code, 0)
                self.assertLess(peak, (3 << 20) if "--json" in words else (1 << 20))  # of 5 MiB
        self.assertEqual(len(json.loads(self.stdout("show", "x", "--json"))["runs"]), attempts)


@NEEDS_SHELL
class CliLogs(Clocked):
    """`logs` of attempts that have ended, and of jobs that wait."""

    @internal
    def test_logs_of_a_schedule_show_its_last_run(self) -> None:
        self.queue.enqueue("true", id="x.1")
        self.queue.enqueue("true", id="x", every=10)
        outcome = Outcome("exited", 1.0, self.now, 0, None, 0, b"output of x.2\n")
        self.queue._ledger.finish(self.claim(), outcome._replace(output=b"another job's\n"))
        self.queue._ledger.finish(self.claim(), outcome)
        self.assertEqual(self.result("logs", "x")[1], "output of x.2\n")

    @internal
    def test_logs_of_a_waiting_job_say_when_it_is_due(self) -> None:
        self.enqueue("true", id="x", run_at="9999-01-01")
        due = queuectl.format_distance(self.job("x").run_after, time.time())
        error = f"queuectl: job x is waiting: due {due}\n"
        self.assertEqual(self.result("logs", "x"), (0, "", error))

    @internal
    def test_logs_of_an_earlier_attempt_are_selected_by_run(self) -> None:
        self.configure(backoff_max="0")
        self.enqueue("false", id="x", max_retries=2)
        with Queue(self.path) as queue:
            for output in (b"try 1\n", b"try 2\n"):
                job = claim(queue, "worker-1")
                queue._ledger.finish(job, Outcome("exited", 1.0, 2.0, 1, "exit code 1", 0, output))
        self.assert_table(
            {
                "": (0, "try 2\n", ""),
                "--run 1": (0, "try 1\n", ""),
                "--run 2 -f": (0, "try 2\n", ""),
            },
            lambda options: self.result("logs", "x", *options.split()),
        )
        self.assertIn("no run 3; its runs: 1 to 2", self.result("logs", "x", "--run", "3")[2])

    @internal
    def test_logs_of_several_jobs_have_headings_and_may_be_cut_to_their_last_lines(self) -> None:
        self.assertIn("no job is dead", self.fail_jobs() or self.run_cli("logs", "--failed").stderr)
        self.queue.configure("max_retries", "1")
        self.fail_jobs(a=b"1\n2\n3\n", b=b"one\ntwo", c=b"")
        whole = "==> a <==\n1\n2\n3\n\n==> b <==\none\ntwo"
        self.assert_table(
            {
                "a b": whole,
                "--failed": whole + "\n==> c <==\n",
                "--failed --tail 1": "==> a <==\n3\n\n==> b <==\ntwo\n==> c <==\n",
                "a -n 2": "2\n3\n",
                "b -n 1": "two",
                "b -n 9": "one\ntwo",
                "a -n 0": "",
                "a -f -n 1": "3\n",
            },
            lambda words: self.stdout("logs", *words.split()),
        )

    def fail_jobs(self, **outputs: bytes) -> None:
        for name, output in outputs.items():
            self.queue.enqueue("true", id=name)
            outcome = Outcome("exited", 1.0, self.now, 1, "exit code 1", 0, output)
            self.queue._ledger.finish(self.claim(), outcome)


class CliLogsLive(Live):
    """`logs` of running jobs."""

    def test_workers_print_the_output_of_jobs_as_they_end(self) -> None:
        self.configure(max_retries="2", backoff_max="0")
        self.enqueue("echo try $QUEUECTL_ATTEMPT; exit 3", id="bad")
        self.enqueue("printf good", id="good")
        failed = self.run_cli("worker", "start", "--drain", "--output", "failed", code=1)
        self.assertEqual(failed.stdout, "==> bad <==\ntry 2\n")
        self.stdout("dlq", "retry", "bad")
        self.enqueue("printf better", id="better")
        everything = self.run_cli("worker", "start", "--drain", "--output", "all", code=1)
        self.assertIn("==> better <==\nbetter\n", everything.stdout)
        self.assertIn("==> bad <==\ntry 2\n", everything.stdout)
        self.assertEqual(everything.stdout.count("==>"), 2)
        self.configure(output_limit="14")
        self.enqueue("printf 'one\ntwo\nthree\nfour\n'", id="long")
        cut = self.run_cli("worker", "start", "--drain", "--output", "all").stdout
        note = "[8 bytes of earlier output are left out]\n"
        self.assertEqual(cut, f"==> long <==\n{note}three\nfour\n")

    def test_logs_follow_a_running_job_from_its_last_lines(self) -> None:
        self.enqueue(f"echo one; echo two; touch started; {RUN_UNTIL_GO}; echo three", id="x")
        self.pool("--drain")
        self.wait_for_file("started")
        logs = self.start("logs", "x", "-f", "--tail", "1")
        self.assertEqual(os.read(logs.stdout.fileno(), 99), b"two\n")
        self.write("go")
        self.assertEqual(logs.communicate(timeout=5)[0], "three\n")

    def test_logs_follow_a_running_job_until_it_ends(self) -> None:
        self.enqueue(f"echo one; {RUN_UNTIL_GO}; echo two", id="x")
        logs = self.start("logs", "x", "-f")
        self.wait_for_output(logs, "job x is waiting: no worker is running")
        self.pool("--drain")
        self.wait_for_output(logs, "one\n")
        self.assertIsNone(logs.poll())
        self.assertEqual(self.stdout("logs", "x"), "one\n")
        self.write("go")
        self.assertEqual(logs.communicate(timeout=5)[0], "two\n")
        self.assertEqual(logs.returncode, 0)

    @SLOW
    @internal
    def test_following_and_watching_end_when_the_queue_is_removed(self) -> None:
        with Queue(self.path) as queue:
            queue.enqueue("true", id="x")
            job: Any = claim(queue, "worker-1")
            out = queuectl.Output(queue._db.run_dir.file(job.seq, job.run, "out"))
            self.addCleanup(out.close)
            os.write(out.fd, b"one\n")
            queue.pause()
        running = self.start("logs", "x", "-f")
        waiting = self.start("enqueue", "-f", "true")
        watch = self.start("status", "--watch")
        self.wait_for_output(watch, "paused")
        self.wait_for_output(running, "one\n")
        self.wait_for_output(waiting, "all queues are paused")
        shutil.rmtree(self.path + ".run")
        for name in glob.glob(self.path + "*"):
            os.unlink(name)
        for process in (running, waiting, watch):
            self.assertIn("was moved away", process.communicate(timeout=5)[0])
            self.assertEqual(process.returncode, 4)

    @internal
    def test_endless_output_is_not_followed_beyond_the_time_to_wait(self) -> None:
        with Queue(self.path) as queue, mock.patch("queuectl.read_from", return_value=(0, b"y")):
            queue.enqueue("yes", id="x")
            job: Any = claim(queue, "worker-1")
            end = time.monotonic() + 0.05
            with open(os.devnull) as file:
                for _ in queuectl.follow(queue, job, file.fileno(), 0, end):
                    self.assertLess(time.monotonic(), end + 5)

    @SLOW
    @internal
    def test_logs_follow_a_job_that_is_claimed_but_not_yet_started(self) -> None:
        with Queue(self.path) as queue:
            queue.enqueue("true", id="x")
            job: Any = claim(queue, "worker-1")
            worker = queuectl.LockFile(queue._db.run_dir.file("worker-1"))
            self.addCleanup(worker.close)
            logs = self.start("logs", "x", "-f")
            wait_until(lambda: os.path.exists(self.path + "-shm"))
            readable = select.select([logs.stdout], [], [], 0.5)[0]
            self.assertFalse(readable)  # no output yet, nor its end
            out = queuectl.Output(queue._db.run_dir.file(job.seq, job.run, "out"))
            os.write(out.fd, b"one\n")
            self.wait_for_output(logs, "one\n")
            queue._ledger.finish(job, Outcome("exited", 1.0, 2.0, 0, None, 0, b"one\n"))
            out.close()
        self.assertEqual(logs.wait(5), 0)

    def test_logs_without_output_report_the_reason_of_the_failure(self) -> None:
        self.enqueue("true", id="x", cwd=self.file("nowhere"), max_retries=1)
        self.drain(code=1)
        error = self.result("logs", "x")[2]
        self.assertRegex(error, "^queuectl: job x wrote nothing: cannot start: N")


class CliWait(Case):
    """`wait`: its exit code, and the reasons that it reports."""

    WAIT_CODES = {
        "good": 0,
        "good seven killed": 7,
        "killed seven": 137,
        "unstarted": 1,
        "cancelled good": 1,
        "child --timeout 0": 1,  # it can never run
        "good --timeout 0": 0,
        "good child --timeout 0": 1,
        "--all": 1,  # the child can never run
        "unknown": 1,
        "": 1,  # the child, which was added last
        "--all good": 2,
    }

    @internal
    def test_wait_exits_with_the_code_of_the_first_failed_job(self) -> None:
        with Queue(self.path) as queue:
            for name, code in {"good": 0, "seven": 7, "killed": -9, "unstarted": None}.items():
                queue.enqueue("true", id=name, max_retries=1)
                error = None if code == 0 else "reason"
                outcome = Outcome("exited", 1.0, 2.0, code, error)
                queue._ledger.finish(claim(queue, "worker-1"), outcome)
            queue.enqueue("true", id="cancelled")
            queue.cancel(["cancelled"])
            queue.enqueue("true", id="child", after=["good", "seven"])
        self.assert_table(self.WAIT_CODES, lambda words: self.result("wait", *words.split())[0])

    def test_wait_for_a_job_that_a_dead_one_blocks_returns_at_once_with_the_reason(self) -> None:
        with Queue(self.path) as queue:
            enqueue_graph(queue, "a", "b a", "c b")
            queue._ledger.finish(claim(queue), Outcome("exited", 1.0, 2.0, 3, "exit code 3"))
        for job_id, blocker in (("b", "a (dead)"), ("c", "b (pending)")):
            waits = f"queuectl: job {job_id} is waiting: blocked by {blocker}\n"
            reason = f"queuectl: job {job_id} cannot run: job a is dead\n"
            self.assertEqual(self.result("wait", job_id), (1, "", waits + reason))

    def test_wait_reports_why_each_job_waits(self) -> None:
        self.enqueue("true", id="x")
        self.enqueue("true", id="child", after="x")
        for words, ids in {"x": "x", "child x": "child x", "--all": "x"}.items():
            with self.subTest(words):
                err = self.result("wait", "--timeout", "0", *words.split())[2]
                self.assertEqual(re.findall("job (\\w+) is waiting: ", err), ids.split())
        self.stdout("cancel", "x")
        error = "queuectl: job child cannot run: job x is cancelled\n"
        self.assertEqual(self.result("wait", "--all"), (1, "", error))


class CliWaitLive(Live):
    """`wait` while jobs are running."""

    @internal
    def test_wait_all_ignores_jobs_that_were_dead_before(self) -> None:
        with Queue(self.path) as queue:
            list(queue.enqueue_many({"command": "true"} for _ in range(1002)))
            queue._db.execute("UPDATE jobs SET state = 'dead', exit_code = 7 WHERE seq < 1002")
            wait = Terminal(self, "wait", "--all")
            wait.wait_for(r"0/1 jobs")
            queue.purge(["1001"])
            queue._ledger.finish(claim(queue, "worker-1"), Outcome("exited", 1.0, 2.0, 0, None))
            wait.end()
            self.assertEqual(wait.process.returncode, 0)

    def test_wait_all_includes_a_job_whose_result_is_stored_late(self) -> None:
        job = self.enqueue(f"touch started; {RUN_UNTIL_GO}; touch ended; exit 7", max_retries=1)
        self.pool()
        self.wait_for_file("started")
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            self.write("go")
            self.wait_for_file("ended")
            wait = Terminal(self, "wait", "--all")
            wait.wait_for(r"\d/1 jobs")
        self.assertEqual(self.wait_for_state(job, "dead").exit_code, 7)
        wait.end()
        self.assertEqual(wait.process.returncode, 7)

    def test_wait_all_includes_a_job_that_dies_while_others_are_purged(self) -> None:
        self.enqueue("false", id="before", max_retries=1)
        self.drain(code=1)
        self.enqueue(f"touch started; {RUN_UNTIL_GO}; exit 7", id="meanwhile", max_retries=1)
        self.pool()
        self.wait_for_file("started")
        wait = Terminal(self, "wait", "--all")
        wait.wait_for(r"\d/1 jobs")
        self.result("dlq", "purge", "before")
        self.write("go")
        wait.end()
        self.assertEqual(wait.process.returncode, 7)

    @SLOW
    @internal
    def test_wait_returns_promptly_for_jobs_in_any_state(self) -> None:
        self.enqueue(f"touch started; {RUN_UNTIL_GO}; exit 9", id="running", max_retries=1)
        self.enqueue("true", id="waiting")
        self.enqueue("true", id="scheduled", delay=0.1)
        self.enqueue("true", id="blocked", after="scheduled")
        self.pool()
        self.wait_for_file("started")
        wait_all = Terminal(self, "wait", "--all")
        wait_all.wait_for(r"\d/3 jobs.*1 blocked")  # it has its list of jobs
        wait_named = self.start("wait", "blocked", "scheduled", "waiting", "running")
        code, _, err = self.result("wait", "running", "--timeout", "0.2")
        self.assertEqual((code, err), (124, "queuectl: timed out after 0.2 s: 0/1 jobs, 0.0/s\n"))
        self.write("go")
        wait_all.end()
        self.assertEqual(wait_named.wait(5), 9)
        self.assertEqual(wait_all.process.returncode, 9)
        self.assertEqual(self.job("blocked").state, "completed")
        with Queue(self.path, readonly=True) as queue:
            changes = queue._reader.changes()
            next(changes)
            self.enqueue("true")
            began = time.monotonic()
            next(changes)
            self.assertLess(time.monotonic() - began, 0.3)


@NEEDS_SHELL
class CliCancel(Clocked):
    """`cancel` of waiting jobs."""

    def test_cascade_cancels_all_descendants_and_nothing_else(self) -> None:
        enqueue_graph(self.queue, "a", "b a", "c b", "d a c", "other")
        self.assertEqual(self.stdout("cancel", "--cascade", "b").split(), ["b", "c", "d"])
        self.assertEqual(self.run_all(), "a other")

    @internal
    def test_cascade_is_made_in_short_transactions_and_ends_with_the_parent(self) -> None:
        enqueue_graph(self.queue, "a", "b a", "c b")
        seen = []

        def sleep(_seconds: float) -> None:
            with Queue(self.path) as other:
                other.configure("timeout", "60")  # it can have the lock
                seen.append(" ".join(job.id for job in other.jobs("cancelled")))

        with mock.patch.object(queuectl, "HOLD", -1), mock.patch.object(time, "sleep", sleep):
            self.queue.cancel(["a"], cascade=True)
        self.assertEqual(seen, ["b", "b c"])
        self.assertEqual(self.queue.counts()["cancelled"], 3)

    def test_cascade_from_a_cancelled_job_cancels_its_blocked_children(self) -> None:
        enqueue_graph(self.queue, "a", "b a")
        self.queue.cancel(["a"])
        self.queue.enqueue("true", id="c", after=["a"])
        code, out, err = self.result("cancel", "--cascade", "a")
        self.assertEqual((code, out.split(), err), (0, ["a", "b", "c"], ""))
        self.queue.enqueue("true", id="ended")
        self.assertEqual(self.run_all(), "ended")
        self.queue.enqueue("true", id="d", after=["ended"])  # is not blocked
        code, out, err = self.result("cancel", "--cascade", "ended")
        self.assertEqual((code, out), (1, ""))
        self.assertIn("job ended is completed; it was not changed", err)

    def test_cancel_reports_only_the_children_that_stay_blocked(self) -> None:
        enqueue_graph(self.queue, "a", "b a")
        self.queue.enqueue("true", id="clean", after_end=["a"])
        self.claim()
        err = self.result("cancel", "a").stderr
        self.assertIn("job a is being cancelled: its worker died", err)
        self.assertIn("1 job waiting for a stays blocked; --cascade cancels these too", err)

    def test_cancel_of_one_occurrence_reports_that_its_schedule_ends(self) -> None:
        self.queue.enqueue("true", id="x", every=10)
        notice = "queuectl: schedule x has ended with it; dlq retry x.1 resumes it\n"
        self.assertEqual(self.result("cancel", "x.1"), (0, "x.1\n", notice))
        self.stdout("dlq", "retry", "x.1")
        self.assertEqual(len(self.queue._reader.select(queuectl.SCHEDULES)), 1)


class CliCancelLive(Live):
    """`cancel` of running jobs."""

    def test_cancel_ends_waiting_scheduled_and_running_jobs_for_good(self) -> None:
        self.configure(kill_grace="0.3")
        self.enqueue("true", id="done", priority=1)
        deaf = "trap '' TERM; (trap '' TERM; sleep 300) & echo $! > pid; touch started; sleep 300"
        self.enqueue(deaf, id="running")
        self.enqueue("true", id="waiting")
        self.enqueue("true", id="scheduled", delay="1h")
        self.enqueue("touch wrong", id="child", after="waiting")
        pool = self.pool()
        self.wait_for_file("started")
        began = time.monotonic()
        code, out, err = self.result("cancel", "running", "waiting", "scheduled", "done")
        self.assertLess(time.monotonic() - began, 0.3 + self.second_here())
        self.assertEqual((code, out), (1, "running\nwaiting\nscheduled\n"))
        hint = "queuectl: 1 job waiting for waiting stays blocked; --cascade cancels these too\n"
        self.assertEqual(err, hint + "queuectl: job done is completed; it was not changed\n")
        self.assertFalse(alive(int(self.read("pid"))))
        self.enqueue("true", id="next")
        self.wait_for_state("next", "completed")
        pool.terminate()
        self.assert_exits(pool, 0)
        for job_id in ("running", "waiting", "scheduled"):
            with self.subTest(job_id):
                self.assertEqual(self.job(job_id).state, "cancelled")
        self.assertEqual(self.job("child").state, "pending")
        self.assertEqual(self.job("running").attempts, 1)
        self.assertEqual(self.result("cancel", "running")[:2], (0, "running\n"))  # it already is

    def test_cancel_works_while_the_pool_stops_and_without_a_pool(self) -> None:
        self.enqueue("touch started; sleep 300", id="x")
        pool = self.pool()
        self.wait_for_file("started")
        pool.terminate()
        self.wait_for_output(pool, "no new jobs")
        self.assertEqual(self.result("cancel", "x"), (0, "x\n", ""))
        self.assert_exits(pool, 0)
        with Queue(self.path) as queue:
            queue.enqueue("true", id="orphan")
            claim(queue, "worker-dead")
            self.assertIn("\nlost       job orphan: its worker died; re", self.stdout("status"))
            reason = "its worker died; recover it with: queuectl worker start"
            warning = f"queuectl: job orphan is being cancelled: {reason}\n"
            self.assertEqual(self.result("cancel", "orphan"), (0, "orphan\n", warning))
            self.assertEqual(queue.get("orphan").cancel_requested, 1)
        self.drain()
        self.assertEqual(self.job("x").state, "cancelled")
        self.assertEqual(self.job("orphan").state, "cancelled")

    @SLOW
    @internal
    def test_cancel_does_not_wait_for_a_pool_that_dies_meanwhile(self) -> None:
        self.enqueue("true", id="x")
        with Queue(self.path) as queue:
            locks = [
                queuectl.LockFile(queue._db.run_dir.file(name)) for name in ("worker-1", "pool-1")
            ]
            claim(queue, "worker-1")
            cancel = self.start("cancel", "x")
            wait_until(lambda: queue.get("x").cancel_requested)
            for lock in locks:
                lock.close()
            self.assertEqual(cancel.wait(5), 0)


class CliSelectionLive(Live):
    """Changes of many jobs."""

    def test_change_that_waits_for_a_lock_is_interrupted_at_once(self) -> None:
        """Promise 4: no lock delays a stop."""
        self.enqueue("true", queue="q")
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            cancel = self.start("cancel", "--queue", "q")

            def has_handler() -> bool:
                with open(f"/proc/{cancel.pid}/status") as file:
                    caught = int(re.findall(r"SigCgt:\s*(\w+)", file.read())[0], 16)
                return bool(caught >> signal.SIGTERM - 1 & 1)

            if sys.platform == "linux":
                wait_until(has_handler)
            cancel.send_signal(signal.SIGINT)
            self.assertEqual(cancel.wait(5), -signal.SIGINT)

    def test_ids_may_stand_on_both_sides_of_options(self) -> None:
        self.stdout("enqueue", "true", ":::", "1", "2", "3")
        for words in ("list 1 --ids 2", "cancel -n 1 2", "edit 1 -n --priority 3 2"):
            self.assertEqual(self.stdout(*words.split()), "1\n2\n", words)
        self.assertIn("unrecognized", self.assert_refused("show", "1", "--json", "2"))

    @NEEDS_SHELL
    def test_interrupted_change_keeps_and_reports_what_is_done(self) -> None:
        with Queue(self.path) as queue:
            queue.enqueue_many({"command": "true", "queue": "q"} for _ in range(10_000))
            cancel = self.start("cancel", "--queue", "q", stderr=subprocess.PIPE)
            wait_until(lambda: queue.counts()["cancelled"])
            cancel.send_signal(signal.SIGINT)
            out, err = cancel.communicate()
            done = queue.counts()["cancelled"]
            self.assertEqual([job.id for job in queue.jobs("cancelled")], out.split())
        self.assertLess(done, 10_000)
        self.assertEqual(err, f"queuectl: interrupted; {done} jobs of 10000 changed\n")
        self.assertEqual(cancel.returncode, -signal.SIGINT)


class CliDlq(Case):
    """`dlq`."""

    @NEEDS_SHELL
    def test_dlq_lists_and_retries_dead_jobs(self) -> None:
        for command, job_id in (("test -e fixed", "bad"), ("false", "other")):
            self.enqueue(command, id=job_id, max_retries=1)
        self.drain(code=1)
        self.assertEqual([job["id"] for job in self.json_lines("dlq", "list")], ["bad", "other"])
        self.write("fixed")
        self.assertEqual(self.stdout("dlq", "retry", "bad"), "bad\n")
        self.drain()
        self.assertEqual(self.job("bad").state, "completed")
        self.assertIn("is completed, not dead", self.assert_refused("dlq", "retry", "bad", code=1))
        self.assertIn("no job nope", self.assert_refused("dlq", "retry", "nope", code=1))
        self.assert_refused("dlq", "retry")
        self.assert_refused("dlq", "retry", "bad", "--all")
        self.assertEqual(self.stdout("dlq", "retry", "--all"), "other\n")

    def test_cancelled_job_is_retried_like_a_dead_one(self) -> None:
        self.enqueue("true", id="x")
        self.result("cancel", "x")
        self.assertEqual(self.result("dlq", "retry", "x"), (0, "x\n", ""))
        job = self.job("x")
        self.assertEqual((job.state, job.attempts), ("pending", 0))

    def test_retry_of_all_names_the_cancelled_jobs_where_none_is_dead(self) -> None:
        self.enqueue("true", id="x")
        self.assertEqual(self.result("dlq", "retry", "--all"), (0, "", ""))
        self.result("cancel", "x")
        hint = "queuectl: no job is dead; 1 cancelled job can be retried by id or with "
        hint += "--state cancelled\n"
        self.assertEqual(self.result("dlq", "retry", "--all"), (0, "", hint))

    @internal
    def test_cancelled_job_that_never_ran_keeps_its_due_time_when_retried(self) -> None:
        self.enqueue("true", id="x", delay=3600)
        run_after = self.job("x").run_after
        self.result("cancel", "x")
        self.result("dlq", "retry", "x")
        job = self.job("x")
        self.assertEqual((job.run_after, job.readiness), (run_after, queuectl.SCHEDULED))


@NEEDS_SHELL
class CliConfig(Case):
    """`config`."""

    @internal
    def test_settings_can_be_read_set_and_unset(self) -> None:
        self.stdout("config", "set", "backoff-base", "3")
        self.assertEqual(self.stdout("config", "get", "backoff_base"), "3\n")
        self.stdout("config", "unset", "backoff_base")
        self.assertEqual(self.stdout("config", "get", "backoff_base"), "2\n")
        self.stdout("config", "set", "shell", "bash -ec")
        self.assertEqual(self.stdout("config", "get", "shell"), "bash -ec\n")
        self.stdout("config", "set", "retention", "30d")
        self.assertEqual(self.stdout("config", "get", "retention"), "2592000\n")
        listed = [setting["key"] for setting in self.json_lines("config", "list")]
        self.assertEqual(listed, list(queuectl.SETTINGS))

    def test_settings_without_a_queue_are_the_defaults(self) -> None:
        self.assertEqual(self.result("config", "get", "timeout"), (0, "300\n", ""))
        rows = self.json_lines("config", "list")
        self.assertEqual([row["key"] for row in rows], list(queuectl.SETTINGS))
        self.assertEqual(os.listdir(self.dir), [])
        for words in ("status", "list"):
            line = self.assert_refused(words, code=1)
            self.assertIn("; to begin: queuectl enqueue 'make all'\n", line)

    def test_queue_has_its_own_value_or_the_default(self) -> None:
        gpu = ("--queue", "gpu")
        self.stdout("config", "set", "timeout", "60")
        self.stdout("config", "set", "max-retries", "7", *gpu)
        values = {
            ("timeout", *gpu): "60\n",
            ("max_retries", *gpu): "7\n",
            ("max_retries", "--queue", "cpu"): "3\n",
            ("max_retries",): "3\n",
        }
        self.assert_table(values, lambda words: self.stdout("config", "get", *words))
        self.enqueue("true", id="a", queue="gpu")
        self.assertIn("0/7", self.stdout("list"))
        self.assertEqual(self.json_object("list")["max_retries"], 7)
        settings = "timeout 1m (all queues), max_retries 7 (queue gpu)"
        self.assertRegex(self.stdout("show", "a"), rf"\nsettings +{re.escape(settings)}\n")
        self.stdout("config", "set", "on_dead", "D")
        self.stdout("config", "set", "backoff_base", "3")
        own = {"timeout": 5, "on_dead": "", "retry_delays": "1s"}
        self.enqueue("true", id="own", queue="gpu", **own)
        self.assertRegex(self.stdout("show", "own"), r"\nsettings +max_retries 7 \(queue gpu\)\n")
        self.assertEqual(self.json_object("show", "a")["settings"]["max_retries"], 7)
        listed = {row["key"]: row for row in self.json_lines("config", "list", *gpu)}
        sources = [listed[key]["queue"] for key in ("max_retries", "timeout", "shell")]
        self.assertEqual(sources, ["gpu", "", None])
        self.assertNotIn("retention", listed)
        self.stdout("config", "unset", "max_retries", *gpu)
        self.assertEqual(self.stdout("config", "get", "max_retries", *gpu), "3\n")
        with Queue(self.path) as queue:
            queue.configure("timeout", "5", queue="gpu")
            self.assertEqual([queue.config(name)["timeout"] for name in ("gpu", "")], [5.0, 60.0])

    def test_setting_that_makes_no_sense_for_one_queue_is_refused(self) -> None:
        self.enqueue("true")
        for words in (("set", "retention", "1d"), ("get", "synchronous"), ("unset", "retention")):
            line = self.assert_refused("config", *words, "--queue", "gpu")
            self.assertIn("applies to all queues; use it without --queue", line)

    def test_escape_sequence_in_a_setting_is_shown_escaped(self) -> None:
        self.stdout("config", "set", "shell", "sh \x1b[2J -c")
        self.assertEqual(self.stdout("config", "get", "shell"), "sh '\\x1b[2J' -c\n")
        self.assertNotIn("\x1b", self.stdout("config", "list"))

    def test_bad_settings_are_refused_with_the_nearest_key_or_the_range(self) -> None:
        messages = {
            "tiemout=5": "unknown key tiemout: did you mean timeout?",
            "max_retries=0": "max_retries must be at least 1, which means to try once",
            "max_retries=many": "max_retries must be a whole number from 1 to 1000000",
            "backoff_base=0.5": "backoff_base must be a number from 1 to 1000",
            "timeout=soon": "timeout must be a duration",
            "shell=": "shell must not be blank",
            "shell='' -c": "shell must begin with a program",
            "shell='": "shell must be a command prefix: No closing quotation",
            "synchronous=off": "synchronous must be normal or full",
            "limit=-1": "limit must be a whole number from 0 to 1000000",
            "rate=10": "rate must be a number of starts per period of 1 s or more, such as 10/1m",
            "rate=0/1m": "rate must be a number of starts",
            "rate=5/0.5s": "rate must be a number of starts",
        }
        for setting, message in messages.items():
            with self.subTest(setting):
                self.assertIn(message, self.assert_refused("config", "set", *setting.split("=")))
        self.assertFalse(os.path.exists(self.path))


class CliHelp(Case):
    """`--help` and `--version`."""

    def test_version_names_everything_that_a_bug_report_needs(self) -> None:
        python = ".".join(map(str, sys.version_info[:3]))
        runs_on = f"Python {python}, SQLite {sqlite3.sqlite_version}, schema 1"
        shown = f"queuectl {queuectl.__version__} ({runs_on})\n"
        self.assertEqual(self.result("--version"), (0, shown, ""))
        self.assertEqual(self.result("-V"), (0, shown, ""))

    def test_older_python_shows_a_line_that_names_the_needed_version(self) -> None:
        pattern = os.path.expanduser("~/.pyenv/versions/3.[67].*/bin/python3")
        found = glob.glob(pattern)
        if not found:
            self.skipTest("neither Python 3.6 nor 3.7 is installed")
        for python in found:
            with self.subTest(python):
                result = self.process(python, PROGRAM, "status")
                self.assertEqual(result.returncode, 1)
                self.assertIn("# Python 3.8 or later is needed", result.stderr)

    @internal
    def test_help_fits_on_a_screen_and_names_every_command(self) -> None:
        shown = self.stdout()
        self.assertEqual(self.stdout("--help"), shown)
        lines = shown.rstrip().splitlines()
        self.assertLess(len(lines), 30)
        self.assertLessEqual(max(map(len, lines)), 80)
        self.assertEqual(shown.count("\n  queuectl "), 5)
        self.assertIn(f"\nqueuectl {queuectl.__version__}, {queuectl.HOME_PAGE}#readme\n", shown)
        named = re.findall(r"(?m)(?<=[ ,] )[a-z]+(?: [a-z]+)?(?=,|$)", shown.split("commands:")[1])
        self.assertEqual(sorted(named), sorted(queuectl.COMMANDS))

    def test_help_command_shows_the_help_of_a_command(self) -> None:
        self.assertEqual(self.stdout("help"), self.stdout("--help"))
        shown = self.stdout("help", "worker", "stop")
        self.assertEqual(shown, self.stdout("worker", "stop", "--help"))
        self.assertIn("\nDURATION: seconds, or a number with a unit", shown)
        self.assertIn(f"\nqueuectl {queuectl.__version__}, {queuectl.HOME_PAGE}", shown)

    GROUPS = {  # of the help of enqueue, and options in each
        "": "--lines --if-absent --new-ids",
        "the job": "--id --queue --priority",
        "when it runs": "--delay --at --after --after-end --every --cron",
        "where it runs": "--cwd --env --stdin --stdin-file",
        "timeout and retries": "--timeout --max-retries --retry-delays",
        "notifications (default: as the settings say)": "--on-dead --on-end",
        "waiting": "--wait --follow --wait-timeout",
    }

    def test_options_that_belong_together_stand_together_in_help(self) -> None:
        parts = re.split(r"(?m)^(\S.*):$", self.stdout("help", "enqueue").split("\nDURATION:")[0])
        found = dict(zip(parts[1::2], parts[2::2]))
        del found["positional arguments"]
        found[""] = found.pop("optional arguments", "") or found.pop("options")  # before 3.10
        options = re.compile(r"(?m)^  (?:-h.*|(?:-\w(?: \S+)?, )?(--[\w-]+))")
        named = {key: " ".join(filter(None, options.findall(text))) for key, text in found.items()}
        self.assertEqual(named, self.GROUPS)
        for default in ("300s", "3", "2s,4s,8s ...", "0", "a number", "at once", "this one"):
            self.assertIn(
                f"default: {default})", re.sub(r"\s+", " ", self.stdout("help", "enqueue"))
            )
        self.assertIn("\nwhich jobs:\n  -q", self.stdout("help", "list"))
        self.assertNotIn("(default: ", self.stdout("help", "edit").replace("(default: as", ""))

    @internal
    def test_help_of_every_subcommand_has_a_valid_example(self) -> None:
        for words in queuectl.COMMANDS:
            with self.subTest(words):
                code, out, _ = self.result(*words.split(), "--help")
                self.assertEqual(code, 0, out)
                example = out.partition("\nexample: queuectl ")[2].partition("\n")[0]
                self.assertTrue(example.startswith(words), out)
                queuectl.parse(shlex.split(example))


@NEEDS_SHELL
class CliCompletion(Case):
    """`completion` in real shells."""

    SHELLS = {  # scripts that define t, which completes the last of its arguments
        "bash": """source <("$@" completion bash)
            t() { COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); _queuectl; echo ${COMPREPLY[*]}; }""",
        "zsh": """compdef() { :; }
            compadd() { shift; for w; [[ $w == $last* ]] && print -n -- "$w "; echo; }
            source <("$@" completion zsh)
            t() { words=("$@"); CURRENT=$#; last=$words[-1]; _queuectl; }""",
        "fish": """$argv completion fish | source
            function t; complete -C "$argv" | string join ' '; end""",
    }

    COMPLETIONS = {
        "t queuectl wor": ["worker"],
        "t queuectl --db x worker st": ["start", "stop"],
        "t queuectl show 7 --": ["--json"],
        "t queuectl config list --j": ["--json"],
    }

    VALUES = {  # the words typed, of which the last is completed
        "list --state de": "dead",
        "list --state=pending,re": "--state=pending,ready",
        "list --state = sch": "scheduled",  # as bash splits it
        "config get time": "timeout",
        "config set timeout _": "",
        "list --queue _": "gpu",
        "enqueue -q g": "gpu",
        "report --format h": "html",
        "completion f": "fish",
        "help dlq pu": "purge",
        "dlq retry _": "dead1",
        "dlq retry dead1 _": "dead1",
        "wait pend1,_": "",
        "cancel _": "sched pend1",
        "wait _": "sched pend1",
        "edit _": "sched pend1",
        "prune _": "dead1 gone1",
        "worker stop p": "pool-ab",
        "enqueue x --after pend1,d": "pend1,dead1",
        "enqueue --id _": "",
        "show dead1 _": "",
        "--db other.db dlq retry _": "",
        "show --js": "--json",
    }

    def test_completion_without_a_word_to_complete_offers_the_commands(self) -> None:
        for words in ((), ("",)):
            shown = self.stdout("completion", "bash", "queuectl", *words).split()
            self.assertEqual((shown[0], shown[-1]), ("enqueue", "help"))

    @internal
    def test_completion_offers_the_values_that_fit(self) -> None:
        self.assertEqual(self.result("completion", "zsh", "q", "dlq", "retry", ""), (0, "", ""))
        with Queue(self.path) as queue:
            queue.enqueue("true", id="dead1", max_retries=1, queue="gpu")
            outcome = Outcome("exited", 1.0, 2.0, 1, "exit code 1")
            queue._ledger.finish(claim(queue), outcome)
            queue.enqueue("true", id="gone1", queue="gpu")
            queue.cancel(["gone1"])
            queue.enqueue("true", id="pend1", queue="gpu")
            queue.enqueue("true", id="sched", every="1h", queue="gpu")

        def complete(words: str) -> str:
            typed = ["" if word == "_" else word.rstrip("_") for word in words.split()]
            shown = self.stdout("completion", "zsh", "queuectl", *typed).split()
            return " ".join(word for word in shown if word != "sched.1")

        with mock.patch.object(queuectl.RunDirectory, "alive", return_value=["pool-ab"]):
            self.assert_table(self.VALUES, complete)
        self.enqueue("true", id="$(touch${IFS}x)")
        shown = self.stdout("completion", "bash", "queuectl", "cancel", "$")
        self.assertEqual(shown, "'$(touch${IFS}x)'\n")

    @internal
    def test_completion_reads_few_of_many_jobs_and_offers_fifty(self) -> None:
        steps = {}
        with Queue(self.path) as queue:
            for number in (1000, 5000):
                list(queue.enqueue_many({"command": "true"} for _ in range(number)))
                ticks: list[None] = []
                handler = partial(ticks.append, None)
                queue._db.connection.set_progress_handler(handler, 100)
                found = [
                    len(queue._reader.ids_like(prefix, [state], 50))
                    for prefix, state in (("1", "pending"), ("x", "pending"), ("1", "dead"))
                ]
                queue._db.connection.set_progress_handler(None, 100)
                self.assertEqual(found, [50, 0, 0])
                steps[number] = len(ticks)
        self.assertLess(steps[5000], 1.5 * steps[1000])

    INTERACTIVE = {  # how each shell starts without the user's files, and loads the completion
        "bash": ("--norc --noprofile -i", 'eval "$(queuectl completion bash)"'),
        "zsh": ("-f -i", 'autoload -U compinit; compinit -u; eval "$(queuectl completion zsh)"'),
        "fish": ("--no-config -i", "queuectl completion fish | source"),
    }

    @SLOW
    def test_completion_of_an_id_works_at_the_prompt_of_each_installed_shell(self) -> None:
        os.mkdir(self.file("bin"))
        self.write("bin/queuectl", f'#!/bin/sh\nexec {shlex.join([*PYTHON, COMPILED])} "$@"\n')
        os.chmod(self.file("bin/queuectl"), 0o755)
        self.enqueue("false", id="dead-one", max_retries=1)
        self.drain(code=1)
        self.enqueue("true", id="dead-not", delay="1h")
        env = {"PATH": f"{self.dir}/bin:{os.environ['PATH']}", "HOME": self.dir}
        for shell, (options, load) in self.INTERACTIVE.items():
            if shutil.which(shell):
                with self.subTest(shell):
                    code = "import fcntl, os, sys, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0)"
                    code += "; os.dup2(1, 0); os.execvp(sys.argv[1], sys.argv[1:])"
                    program = (sys.executable, "-c", code, shell, *options.split())
                    terminal = Terminal(self, program=program, env=env, start_new_session=True)
                    terminal.type(f"{load}; echo lo''aded")
                    terminal.wait_for("loaded")
                    os.write(terminal.fd, b"queuectl dlq retry de\t")
                    terminal.wait_for("(?s)dead-.*one")
                    os.write(terminal.fd, b"\r")
                    wait_until(lambda: self.job("dead-one").state == "pending")
                    self.drain("--horizon", "0", code=1)

    @SLOW
    def test_completion_works_in_each_installed_shell(self) -> None:
        for shell, script in self.SHELLS.items():
            if shutil.which(shell):
                with self.subTest(shell):
                    argv = [shell, "-c", "\n".join((script, *self.COMPLETIONS))]
                    argv += ["-"] * (shell != "fish")  # the others take an argument for $0
                    lines = self.process(*argv, *PYTHON, COMPILED).stdout.splitlines()
                    words = [line.split() for line in lines]
                    self.assertEqual(words, list(self.COMPLETIONS.values()))


class CliInstall(Live):
    """`install`, and the program as started by it."""

    def setUp(self) -> None:
        super().setUp()
        os.environ["HOME"] = self.file("home")
        os.environ.pop("XDG_DATA_HOME", None)
        self.bin = self.file("home/.local/bin")
        self.starter = os.path.join(self.bin, "queuectl")

    def installed(self, *args: str, **more: Any) -> Result:
        return self.process(self.starter, *args, **more)

    def versions(self, home: str = "home/.local/share/queuectl") -> list[str]:
        return sorted(os.listdir(self.file(home)))

    def changed_program(self, number: int) -> str:
        """Return a newer copy of the program, without the right to write to it."""
        name = self.file(f"new {number}.py")
        with open(PROGRAM) as source:
            self.write(name, f"{source.read()}\nbegin_worker = {number}  # of no use\n")
        os.chmod(name, 0o400)
        return name

    @SLOW
    def test_installed_program_does_everything_that_the_script_does(self) -> None:
        os.environ["PATH"] += os.pathsep + self.bin
        self.assertEqual(self.stdout("install"), self.starter + "\n")
        os.mkdir(self.file("PYTHON"))
        for name in ("sqlite3.py", "PYTHON/json.py"):  # isolated: nobody's modules are imported
            self.write(name, "raise SystemExit('imported')")
        os.environ["PYTHONPATH"] = self.file("PYTHON")
        self.assertEqual(self.installed("enqueue", "echo $((6 * 7))"), (0, "1\n", ""))
        self.assertEqual(self.installed("worker", "start", "--drain", "--quiet")[0], 0)
        self.assertEqual(self.installed("logs", "1")[1], "42\n")
        self.assertRegex(
            self.installed("worker", "start", "--detach")[2], "pool-.* runs as process"
        )
        self.installed("enqueue", "--id", "x", "touch done")
        self.wait_for_file("done")
        self.assertEqual(self.installed("worker", "stop")[0], 0)
        self.assertIn(f"$({self.starter} completion", self.installed("completion", "bash")[1])
        self.assertIn("is in your PATH: type queuectl", self.installed("install")[2])
        self.assertEqual(len(self.versions()), 1)

    @SLOW
    def test_compiled_form_is_loaded_and_replaced_when_python_changes(self) -> None:
        self.stdout("install")
        (library,) = glob.glob(self.file("home/.local/share/queuectl/*"))
        (compiled,) = glob.glob(library + "/__pycache__/*")
        os.utime(library + "/queuectl.py")  # copied without its times
        loads = self.process(sys.executable, "-ISv", self.starter, "--version")[2]
        self.assertIn(f"code object from '{compiled}'", loads)
        with open(compiled, "wb") as file:
            file.write(b"another Python's")
        self.assertEqual(self.installed("status")[2].count("no queue"), 1)
        self.write(compiled, "")
        self.assertRegex(self.installed("--version")[1], "^queuectl ")

    @SLOW
    def test_update_replaces_the_starter_and_keeps_the_version_of_a_running_pool(self) -> None:
        self.stdout("install")
        pool = subprocess.Popen([self.starter, "worker", "start", "--quiet"], cwd=self.dir)
        self.processes.append(pool)
        wait_until(self.workers)
        for number in range(4):
            self.process(sys.executable, self.changed_program(number), "install")
            if number == 0:  # the pool has to start its server and a worker anew
                server = "$(ps -o ppid= -p $PPID)"
                self.enqueue(f"test $QUEUECTL_ATTEMPT = 2 || kill -9 {server} $PPID")
                self.wait_for_state("1", "completed")
        self.assertEqual(len(self.versions()), 3)
        self.assertEqual(os.listdir(self.bin), ["queuectl"])
        self.assertRegex(self.installed("--version")[1], "^queuectl ")

    def test_nothing_of_another_program_is_overwritten(self) -> None:
        os.makedirs(self.bin)
        self.write(self.starter, "#!/bin/sh\necho mine\n")
        self.assertIn("is another program's", self.assert_refused("install"))
        self.assertEqual(self.read(self.starter), "#!/bin/sh\necho mine\n")
        self.assertEqual(os.listdir(self.file("home/.local")), ["bin"])
        shutil.copy(PROGRAM, self.starter)  # a copy of the program is replaced
        self.stdout("install")
        self.write("file")
        for place in ("file", "file/bin"):
            self.assertIn("file", self.assert_refused("install", place, code=4))

    @SLOW
    def test_install_reports_how_to_find_the_starter(self) -> None:
        shadow = self.file("first")
        os.mkdir(shadow)
        shutil.copy(PROGRAM, shadow + "/queuectl")
        os.chmod(shadow + "/queuectl", 0o755)
        here = self.file("it's here")
        paths = {
            "/bin/bash": f"add this line to ~/.bashrc: export PATH='{self.dir}/it'\"'\"'s here':",
            "/bin/fish": "fish_add_path ",
            "": f"but {shadow}/queuectl precedes it",
        }
        for shell, expected in paths.items():
            os.environ["SHELL"] = shell
            os.environ["PATH"] += "" if shell else os.pathsep + shadow + os.pathsep + here
            result = self.run_cli("install", here)
            self.assertIn(expected, result.stderr)
            self.assertEqual(result.stdout, f"{here}/queuectl\n")
        self.assertEqual(sorted(os.listdir(here)), [".queuectl", "queuectl"])
        self.assertEqual(self.process(here + "/queuectl", "enqueue", "true")[1], "1\n")

    @SLOW
    def test_python_with_blanks_and_quotes_in_its_path_is_started_by_the_shell(self) -> None:
        place = self.file('it\'s "the" $place')
        os.mkdir(place)
        os.symlink(sys.executable, place + "/python 3")
        self.process(place + "/python 3", PROGRAM, "install")
        self.assertTrue(self.read(self.starter).startswith("#!/bin/sh\n"))
        self.assertEqual(self.installed("enqueue", "--", "echo", "a b")[1], "1\n")
        self.assertIn("echo 'a b'", self.installed("show", "1")[1])

    def test_compiled_file_is_not_installed(self) -> None:
        compiled = py_compile.compile(PROGRAM, self.file("queuectl.pyc"))
        done = self.process(sys.executable, compiled, "install", self.file("here"))
        line = f"queuectl: {compiled} is a compiled file; install from queuectl.py\n"
        self.assertEqual(done, Result(2, "", line))

    @SLOW
    def test_virtual_environment_is_not_needed_later(self) -> None:
        self.process(sys.executable, "-m", "venv", "--without-pip", "venv")
        self.process(self.file("venv/bin/python"), PROGRAM, "install")
        shutil.rmtree(self.file("venv"))
        self.assertRegex(self.installed("--version")[1], "^queuectl ")

    def test_ctrl_c_during_the_imports_shows_no_traceback(self) -> None:
        self.stdout("install")
        (library,) = glob.glob(self.file("home/.local/share/queuectl/*"))
        shutil.rmtree(library + "/__pycache__")
        self.write(library + "/queuectl.py", "import os; os.kill(os.getpid(), 2)")
        self.assertEqual(self.installed(), (-signal.SIGINT, "", ""))


class CliSignals(Live):
    """A signal ends the program as it ends any other, so that scripts stop too."""

    def test_ctrl_c_ends_a_shell_loop(self) -> None:
        self.enqueue("true", id="x")
        shell = Terminal.shell(self)
        shell.type('for n in 1 2 3; do echo round""$n; q wait x; done')
        shell.wait_for("0/1 jobs")
        shell.type("\x03")
        shell.type('echo "[$?]"')
        shown = shell.wait_for(r"\[\d+\]")
        self.assertIn("\x1b[K\r\n> ", shown)  # the prompt has a line of its own
        self.assertIn("[130]", shown)
        self.assertNotRegex(shown, "round|Traceback")

    def test_ctrl_c_ends_a_script(self) -> None:
        self.enqueue("true", id="x")
        shell = Terminal.shell(self)
        shell.type("bash -c 'q wait x; echo PUB''LISHED'")
        shell.wait_for("0/1 jobs")
        shell.type("\x03")
        shell.type('echo "[$?]"')
        shown = shell.wait_for(r"\[\d+\]")
        self.assertIn("[130]", shown)
        self.assertNotIn("PUBLISHED", shown)

    def test_closed_pipe_ends_the_program_by_sigpipe(self) -> None:
        with Queue(self.path) as queue:
            list(queue.enqueue_many({"command": "x" * 100} for _ in range(2000)))
        process = self.start("list", "--limit", "0", stderr=subprocess.PIPE)
        self.assertEqual(process.stdout.read(2), "ID")
        process.stdout.close()
        self.assertEqual((process.stderr.read(), process.wait(10)), ("", -signal.SIGPIPE))

    def test_interrupt_during_the_imports_shows_no_traceback(self) -> None:
        self.write("sqlite3.py", "import os, signal; os.kill(os.getpid(), signal.SIGINT)")
        os.environ["PYTHONPATH"] = self.dir
        process = self.start("status")
        self.assertEqual((process.communicate()[0], process.returncode), ("", -signal.SIGINT))

    @internal
    def test_main_returns_the_signal_to_a_program_that_calls_it(self) -> None:
        self.enqueue("true")
        for error, code in (KeyboardInterrupt, 130), (BrokenPipeError, 141):
            with mock.patch.object(queuectl, "execute", side_effect=error):
                self.assertEqual(self.result("status"), (code, "", ""))

    @SLOW
    def test_background_pool_leaves_the_prompt_alone(self) -> None:
        self.enqueue(RUN_UNTIL_GO, id="x")
        self.enqueue(RUN_UNTIL_GO, id="y")
        shell = Terminal.shell(self)
        shell.type("q worker start &")
        self.wait_for_state("x", "processing")
        self.write("go")
        self.assertNotIn("\x1b[K", shell.wait_for("job y completed"))
        shell.type("fg")
        shell.wait_for(r"2/2 jobs")
        shell.type("\x1a")  # Ctrl-Z
        shell.wait_for("Stopped")
        shell.type("bg; q enqueue --id z true")
        shown = shell.wait_for("job z completed")
        self.assertNotIn("\x1b[K", shown)


class CliTerminal(Live):
    """Output to terminals and other streams."""

    def test_narrow_encoding_does_not_make_a_command_fail(self) -> None:
        self.enqueue("echo \u20ac", id="euro")
        os.environ["PYTHONIOENCODING"] = "ascii"
        for command in ("list", "show euro", "status"):
            self.stdout(*command.split(), real=True)

    def test_closed_stdout_does_not_make_a_command_fail(self) -> None:
        for command in ("status", "list", "logs 1", "show 1"):
            self.stdout("enqueue", "true")
            line = f"exec {shlex.join([*PYTHON, COMPILED])} {command} >&-"
            done = self.process("sh", "-c", line)
            self.assertEqual((done.returncode, done.stderr.count("Traceback")), (0, 0), done.stderr)

    def test_terminal_gets_no_control_characters_from_jobs(self) -> None:
        self.configure(max_retries="1")
        job = self.enqueue(f"{PRINT_RAW}; : '\x1b]0;title\x07\u202e\u2028'; false")
        nowhere = self.enqueue("true", cwd=self.file("no\x1b[2Jwhere"))
        events = self.drain(code=1)
        self.assertEqual([c for c in events if not c.isprintable() and c != "\n"], [])
        for words in ("list", "dlq list", f"show {job}", f"show {nowhere}", f"logs {job}"):
            with self.subTest(words):
                shown = Terminal(self, *words.split(), env={"NO_COLOR": "1"}).end()
                self.assertTrue(shown)
                self.assertEqual([c for c in shown if not c.isprintable() and c not in "\n\t"], [])
        # The output ends with half a character.
        self.assertTrue("red" in shown and shown.endswith("\\xe2\\x82"), shown)

    @SLOW
    def test_exit_code_is_right_where_neither_stream_can_be_written(self) -> None:
        self.enqueue("true")
        self.write("file")
        codes = {"status": 4, "--help": 4, "--version": 4, "show 9": 1}
        places = (("/dev/full", "w"), (self.file("file"), "r"))
        for (words, code), (path, mode), unbuffered in product(codes.items(), places, ("", "1")):
            os.environ["PYTHONUNBUFFERED"] = unbuffered
            with self.subTest(words, path=path, unbuffered=unbuffered), open(path, mode) as stream:
                process = self.start(*words.split(), stdout=stream, stderr=stream)
                self.assertEqual(process.wait(10), code)

    def test_paths_and_logs_are_shown_escaped(self) -> None:
        self.use_queue("\x1b[2J")
        self.addCleanup(self.result, "worker", "stop", "--now")
        started = self.run_cli("worker", "start", "--detach", real=True).stderr
        self.assertRegex(started, r"its log is /.*\\x1b\[2J/queuectl.db.run/workers.log\n")
        self.stdout("worker", "stop")
        with mock.patch.dict(os.environ, QUEUECTL_DB=self.path + ".run/workers.log"):
            shown = self.run_cli("worker", "start", "--detach", code=4, real=True).stderr
        self.assertRegex(shown, r"^queuectl: .*\\x1b\[2J/")
        os.chmod(self.path, 0o666)
        for stream in self.result("worker", "start", "--detach", real=True)[1:]:
            self.assertNotIn("\x1b", stream)

    def test_output_that_cannot_be_written_is_reported(self) -> None:
        for command, unbuffered in (("enqueue true", ""), ("list", ""), ("list", "1")):
            os.environ["PYTHONUNBUFFERED"] = unbuffered
            with self.subTest(command, unbuffered=unbuffered), open("/dev/full", "w") as full:
                process = self.start(*command.split(), stdout=full, stderr=subprocess.PIPE)
                err = process.communicate()[1]
                self.assertEqual(
                    (process.returncode, err), (4, "queuectl: No space left on device\n")
                )

    @SLOW
    def test_progress_is_shown_below_the_events(self) -> None:
        self.configure(max_retries="1")
        self.enqueue("exit 3", id="bad")
        self.enqueue(f"touch started; {RUN_UNTIL_GO}", id="busy")
        self.enqueue("true", id="more")
        pool = Terminal(self, "worker", "start", "--drain")
        wait_all = Terminal(self, "wait", "--all")
        wait_one = Terminal(self, "wait", "more")
        pool.wait_for(r"\r\x1b\[K\d\d:\d\d:\d\d job bad is dead: exit code 3 \(try 1\)\r\n")
        pool.wait_for(r"\r\x1b\[K1/3 jobs, \d+\.\d/s(, \d+ s left)?, 1 failed")
        wait_all.wait_for(r"\r\x1b\[K[01]/[23] jobs, \d+\.\d/s")
        wait_one.wait_for(r"\r\x1b\[K0/1 jobs, 0\.0/s")
        self.write("go")
        self.assertTrue(pool.end().endswith("\r\x1b[K"))  # the progress line is erased
        self.assertTrue(wait_all.end().endswith("\r\x1b[K"))

    def test_output_is_plain_lines_without_a_terminal(self) -> None:
        lines = "".join(f'{{"command":"{n}","queue":"q"}}\n' for n in range(1000))
        self.enqueue("true")
        self.assertEqual(self.run_cli("enqueue", "-", stdin=lines, real=True).stderr, "")
        events = self.drain("--queue", "default", real=True)
        self.assertRegex(events, r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 [ -~]+\n){3}$")
        watch = Terminal(self, "status", "--watch", env={"TERM": "dumb"})
        watch.wait_for(r"^queue +\S+\r\npending +1000\r\n")
        for words in ("status", "list", "show 1", "wait 1", "worker list", "list --json"):
            with self.subTest(words):
                code, out, err = self.result(*words.split())
                self.assertNotRegex(out + err, r"[\x1b\r]")
                self.assertEqual(code, 0)

    def test_table_is_cut_to_the_width_and_colored_only_on_a_terminal(self) -> None:
        self.enqueue("echo " + "long " * 20, id="one")
        self.enqueue("echo \u5b57" + "\u6f22" * 50, id="\u6f22" * 8, delay="1h30s")
        self.result("cancel", "one")
        for env, colored in ({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False):
            with self.subTest(env):
                shown = Terminal(self, "list", columns=40, env=env).end()
                self.assertEqual("\x1b[33mcancelled\x1b[m" in shown, colored)
                self.assertEqual("\x1b" in shown, colored)
                lines = re.sub(r"\x1b\[\d*m", "", shown).splitlines()
                widths = [len(line) + len(re.findall("[\u5b57\u6f22]", line)) for line in lines]
                self.assertEqual({width <= 40 for width in widths}, {"TERM" not in env})
                rows = " ".join(line for line in lines if "\u6f22" in line or "echo" in line)
                self.assertRegex(rows, "echo long.* \u6f22{8}  pending    0/3 .* echo \u5b57")
        narrow, wide = (line.partition("echo")[0] for line in self.stdout("list").splitlines()[1:])
        self.assertEqual(len(narrow), len(wide) + 8)  # aligned: each of 8 takes two columns
        self.enqueue("true", id="w" * 60)
        shown = Terminal(self, "list", columns=40, env={"NO_COLOR": "1"}).end()
        self.assertEqual(max(map(len, shown.splitlines())), 40)

    def test_show_prints_long_values_whole_on_a_narrow_terminal(self) -> None:
        self.enqueue("echo " + "long" * 20, id="x")
        shown = Terminal(self, "show", "x", columns=40).end()
        self.assertIn("echo " + "long" * 20, shown)

    @SLOW
    def test_commands_work_in_the_c_locale(self) -> None:
        os.environ["LC_ALL"] = "C"
        self.stdout("enqueue", "--id", "\u00e9\U0001f600", "printf '\u2603'", real=True)
        self.drain(real=True)
        self.assertIn("printf", self.stdout("list", real=True))
        self.assertEqual(self.stdout("logs", "\u00e9\U0001f600"), "\u2603")


# --- whole program --------------------------------------------------------------------------------


class Library(Clocked):
    """The public API, as a program uses it."""

    def test_string_argument_is_one_id_state_or_queue(self) -> None:
        """A string where several names may be given is one name, not its letters."""
        for job_id in ("1", "2", "12"):
            self.queue.enqueue("true", id=job_id)
        self.queue.cancel("12")
        for limit in (None, 9):
            self.assertEqual([job.id for job in self.queue.jobs("cancelled", limit)], ["12"])
        self.assertEqual((self.queue.retry("12"), self.queue.counts()["cancelled"]), (["12"], 0))

        self.queue.cancel(["1", "1"])
        self.assertEqual(self.queue.retry(["1", "1"]), ["1"])
        self.queue.cancel("1")
        self.assertEqual(self.queue.get("1").last_error, "cancelled by the operator")
        self.queue.retry("1")
        self.assertIsNone(self.queue.get("1").last_error)
        self.queue.cancel("1")
        self.assertEqual(self.queue.prune(states="cancelled"), 1)

        self.assertEqual(queuectl.work(self.path, queues="nothing", drain=True), 0)
        self.queue.enqueue("true", queue="gpu")
        self.queue.enqueue("true", queue="gpu-2")
        self.assertEqual(self.queue.counts("gpu-2")["pending"], 1)
        self.assertEqual(list(self.queue._reader.drain_blockers("gpu-2")), ["gpu-2"])
        self.assertEqual(claim(self.queue, "worker-1", "gpu-2").queue, "gpu-2")

    def test_paths_times_and_durations_are_taken_as_objects(self) -> None:
        """A datetime without a time zone is local time."""
        local = datetime.datetime(2030, 1, 31, 8, 0)  # noqa: DTZ001
        earliest = datetime.datetime.min  # noqa: DTZ901
        minute = datetime.timedelta(minutes=1)
        delays = [minute, "2m"]
        queue = Queue(pathlib.Path(self.path), clock=lambda: self.now)
        self.addCleanup(queue.close)
        fields: dict[str, Any] = {"cwd": pathlib.Path("/"), "timeout": minute}
        queue.enqueue("true", id="a", delay=minute, retry_delays=delays, every=minute, **fields)
        queue.enqueue("true", id="b", run_at=local)
        queue.edit("b", timeout=minute)
        queue.enqueue("true", id="c", run_at=local.astimezone(datetime.timezone.utc))
        a, b, c = map(queue.get, "abc")
        self.assertEqual((a.cwd, a.timeout, b.timeout), (os.path.abspath("/"), 60, 60))
        self.assertEqual((a.run_after, a.retry_delays, a.rule), (1e6 + 60, "60,120", "every 60"))
        self.assertEqual((b.run_after, c.run_after), (local.timestamp(),) * 2)
        queue.configure("kill_grace", minute)
        queue.configure("retention", 1.5 * minute)
        self.assertEqual((queue.config()["kill_grace"], queue.config()["retention"]), (60, 90))
        with self.assertRaisesRegex(queuectl.TimedOut, "within 0.01 s"):
            queue.wait(["a"], datetime.timedelta(seconds=0.01))
        queue.cancel("c")
        self.assertEqual((queue.prune(minute), queue.prune(0 * minute)), (0, 1))
        for bad in ({"delay": -minute}, {"run_at": earliest}, {"timeout": local}):
            with self.subTest(bad), self.assertRaises(queuectl.BadInput):
                queue.enqueue("true", **bad)

    def test_path_of_no_file_is_refused(self) -> None:
        for path in ("", "a\0b", ":memory:", "file:x?mode=memory", "FILE:/x", "sqlite:///x"):
            with self.subTest(path), self.assertRaisesRegex(
                queuectl.BadInput, "^path must [^\n]+$"
            ):
                Queue(path)
        self.assert_refused("--db", ":memory:", "enqueue", "true")
        self.assertEqual(glob.glob(self.file("[!q]*")), [])
        Queue(self.file(":memory:")).close()  # this is a file

    def test_unknown_state_is_refused_with_a_suggestion(self) -> None:
        for act in (self.queue.jobs, lambda states: self.queue.prune(states=states)):
            for states in (["PENDING"], "PENDING", ["dead", "pendin"]):
                expected = r"^states must not be .*: did you mean pending\?$"
                with self.subTest(states), self.assertRaisesRegex(queuectl.BadInput, expected):
                    act(states)
        self.queue.enqueue("true", id="x", delay=9)
        self.assertEqual([job.id for job in self.queue.jobs("dead,scheduled")], ["x"])

    @internal
    def test_output_is_that_of_the_attempt_that_runs_or_ran_last(self) -> None:
        queue = self.queue
        queue.enqueue("true", id="nightly", every=60)
        self.assertEqual((queue.output("nightly"), self.attempts("nightly")), (b"", []))
        queue._db.run_dir.make()
        for run, written in enumerate((b"one", b"\xfftwo"), 1):
            self.now += 60
            job = self.claim()
            self.write(os.path.basename(self.path) + f".run/{job.seq}.1.out", "begun")
            self.assertEqual((queue.output("nightly"), queue.output(job)), (b"begun",) * 2)
            os.unlink(queue._db.run_dir.output_file(job))
            done = Outcome("exited", self.now, self.now, 0, None, 0, written)
            queue._ledger.finish(job, done)
            found = [queue.output("nightly"), queue.output(f"nightly.{run}"), queue.output(job, 1)]
            self.assertEqual(found, [written] * 3)
            waiting = queue.get("nightly")  # its name means the job that ran; a record, itself
            self.assertEqual((queue.output(waiting), queue.output(waiting.id)), (b"", b""))
        for job_id, number in (("nosuch", None), ("nightly.1", 2), ("nightly.1", 0)):
            with self.subTest(number), self.assertRaises(queuectl.NotFound):
                queue.output(job_id, number)

    @unittest.skipUnless(LINUX, "counts the descriptors in /proc")
    def test_connections_of_ended_threads_are_closed(self) -> None:
        def descriptors() -> int:
            return len(os.listdir("/proc/self/fd"))

        def serve() -> None:
            self.queue.enqueue("true")
            self.queue.counts()

        before = descriptors()
        gc.disable()  # else it might find them
        self.addCleanup(gc.enable)
        for _ in range(20):
            thread = threading.Thread(target=serve)
            thread.start()
            thread.join()
        self.assertLessEqual(descriptors(), before + 2)

    def test_help_documents_all_public_names_and_only_them(self) -> None:
        text = pydoc.plain(pydoc.render_doc(queuectl))
        self.assertIn("queue.enqueue(", text[:500])
        for name in queuectl.__all__:
            public = getattr(queuectl, name)
            self.assertTrue(pydoc.getdoc(public), name)
            self.assertTrue(re.search(rf"(class {name}\b|\b{name}\()", text), name)
        for name, method in vars(Queue).items():
            if not name.startswith("_"):
                self.assertTrue(pydoc.getdoc(method), name)
        for record in (queuectl.Job, queuectl.Attempt, Queue.enqueue):
            words = set(re.findall(r"\w+", str(record.__doc__)))
            fields = getattr(record, "_fields", (*queuectl.FIELDS, "if_absent"))
            self.assertEqual(set(fields) - words - {"command"}, set())
        self.assertFalse("class Ledger" in text)

    @NEEDS_SHELL
    def test_work_restores_signal_handlers_and_mask(self) -> None:
        numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        self.addCleanup(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
        handlers = [signal.getsignal(number) for number in numbers]
        queuectl.work(self.path, drain=True, signals=True)
        self.assertEqual(signal.pthread_sigmask(signal.SIG_BLOCK, []), {*mask, signal.SIGUSR1})
        self.assertEqual([signal.getsignal(number) for number in numbers], handlers)

    @internal
    def test_work_handles_signals_only_in_the_main_thread(self) -> None:
        """Elsewhere it raises ValueError and leaves no pool behind."""
        with futures.ThreadPoolExecutor() as thread, self.assertRaises(ValueError):
            thread.submit(queuectl.work, self.path, signals=True).result()
        self.assertEqual(self.queue._db.run_dir.alive("pool"), {})

    def test_work_needs_at_least_one_worker(self) -> None:
        with self.assertRaisesRegex(queuectl.BadInput, "count must be a whole number from 1"):
            queuectl.work(self.path, 0)

    def test_work_takes_a_count_as_text(self) -> None:
        self.assertEqual(queuectl.work(self.path, "2", drain=True), 0)

    def test_work_refuses_a_name_that_its_workers_could_not_be_named_after(self) -> None:
        for name in ("jobs", "pool-", "pool-a-b", "pool-a.b", "pool-a/b"):
            with self.subTest(name), self.assertRaisesRegex(queuectl.BadInput, "name must be"):
                queuectl.work(self.path, drain=True, name=name)
        self.assertEqual(queuectl.work(self.path, drain=True, name="pool-a_1"), 0)

    APP = """
from queuectl import Queue, work
queue = Queue('jobs.db')
job = queue.enqueue('echo from the library')
code = work('jobs.db', count=2, drain=True)
print(code, queue.get(job).state, queue.attempts(queue.get(job))[0].output)
"""

    def test_work_runs_in_a_program_without_a_main_guard(self) -> None:
        self.write("app.py", self.APP)
        os.environ["PYTHONPATH"] = HERE
        result = self.process(*PYTHON, "app.py")
        self.assertIn("0 completed b'from the library", result.stdout, result.stderr)


@NEEDS_SHELL
class Vendored(Case):
    """The file works wherever it is copied, and under any name."""

    APP = """
from vendor.queuectl import Queue, work
with Queue("jobs.db") as queue:
    job = queue.enqueue("echo vendored")
    code = work("jobs.db", count=2, drain=True)
    done = queue.get(job)
    print(code, done.state, queue.attempts(done)[0].output)
"""

    def run_app(self, *args: str) -> str:
        """Run Python on a program that must succeed without warnings; return its output."""
        result = self.process(*PYTHON, *args)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        return str(result.stdout)

    @SLOW
    def test_copy_in_another_package_works_and_prints_nothing(self) -> None:
        os.mkdir(self.file("vendor"))
        shutil.copy(PROGRAM, self.file("vendor"))
        self.write("app.py", self.APP)
        for flags in ((), ("-W", "error", "-X", "dev")):
            with self.subTest(flags):
                self.assertEqual(self.run_app(*flags, "app.py"), "0 completed b'vendored\\n'\n")

    @SLOW
    def test_program_runs_from_read_only_directory_symlink_and_archive(self) -> None:
        os.mkdir(self.file("lib"))
        shutil.copy(PROGRAM, self.file("lib"))
        os.symlink("lib/queuectl.py", self.file("jobs"))
        archive = shutil.make_archive(self.file("lib"), "zip", self.file("lib"))
        os.chmod(self.file("lib"), 0o500)
        self.addCleanup(os.chmod, self.file("lib"), 0o700)
        os.environ["PYTHONPATH"] = archive
        main = "import queuectl, sys; sys.exit(queuectl.main())"
        for args in (("-I", "lib/queuectl.py"), ("jobs",), ("-m", "queuectl"), ("-c", main)):
            with self.subTest(args):
                job = self.run_app(*args, "enqueue", "echo $0").strip()
                self.run_app(*args, "worker", "start", "--drain", "--quiet")
                self.assertEqual(self.run_app(*args, "logs", job), "/bin/sh\n")

    TRAPS = "json select signal struct socket queue multiprocessing subprocess ctypes".split()

    def test_files_named_like_modules_are_not_imported(self) -> None:
        """Promise 7: neither those beside the program nor those in the current directory."""
        for directory in ("own", "here"):
            os.mkdir(self.file(directory))
            for name in (*self.TRAPS, "queuectl"):
                self.write(f"{directory}/{name}.py", "open('loaded', 'w'); raise SystemExit(9)\n")
        shutil.copy(PROGRAM, self.file("own/queuectl.py"))
        copy, here = self.file("own/queuectl.py"), self.file("here")
        self.enqueue("true", id="x")
        env = {**os.environ, "QUEUECTL_DB": self.path}
        line = (*PYTHON, copy, "worker", "start", "--drain", "--quiet")
        result = self.process(*line, cwd=here, env=env)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertEqual(self.job("x").state, "completed")
        self.assertFalse(os.path.exists(self.file("here/loaded")))

    def test_modules_of_a_host_are_not_imported_by_its_workers(self) -> None:
        os.mkdir(self.file("traps"))
        for name in (*self.TRAPS, "queuectl"):
            self.write(f"traps/{name}.py", "open('../loaded', 'w'); raise SystemExit(9)\n")
        self.write(
            "app.py",
            """if True:
            import json, multiprocessing.reduction, queue, select, socket, subprocess, sys, queuectl
            sys.path[:0] = ["", "traps"]
            sys.exit(queuectl.work(sys.argv[1], drain=True))""",
        )
        self.enqueue("true", id="x")
        env = {**os.environ, "PYTHONPATH": HERE}
        line = (*PYTHON, self.file("app.py"), self.path)
        result = self.process(*line, cwd=self.file("traps"), env=env)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertEqual(self.job("x").state, "completed")
        self.assertFalse(os.path.exists(self.file("loaded")))

    TYPED = (
        APP.replace("vendor.", "")
        + """
    from datetime import timedelta
    from pathlib import Path
    queue.enqueue("true", cwd=Path("x"), timeout=timedelta(hours=1), after=[job])
    queue.wait([job], timedelta(hours=1))
    print(queue.output(job).decode(), queue.edit([job], priority=1)[0].priority + 1)
"""
    )

    @SLOW
    def test_program_that_imports_it_passes_strict_type_checking(self) -> None:
        if not shutil.which("mypy"):
            self.skipTest("mypy is not installed")
        shutil.copy(PROGRAM, self.dir)
        self.write("app.py", self.TYPED + "reveal_type(done.exit_code)\n")
        for platform in ("linux", "darwin", "win32"):
            with self.subTest(platform):
                result = self.process("mypy", "--strict", "--platform", platform, "app.py")
                self.assertRegex(result.stdout, r"(int \| None|Union\[.*int.*None\])")
                self.assertEqual(result.returncode, 0, result.stdout)

    @SLOW
    def test_program_that_imports_it_passes_pyright(self) -> None:
        if not shutil.which("pyright"):
            self.skipTest("pyright is not installed")
        shutil.copy(PROGRAM, self.dir)
        self.write("app.py", self.TYPED)
        for platform in ("Linux", "Darwin", "Windows"):
            with self.subTest(platform):
                result = self.process("pyright", "--pythonplatform", platform, ".")
                self.assertEqual(result.returncode, 0, result.stdout)


@unittest.skipIf(
    sys.platform == "linux" and "QUEUECTL_SLOW" not in os.environ,
    "covered by other tests on Linux: QUEUECTL_SLOW=1 runs it here, too",
)
class AnySystem(Case):
    """The promises on any operating system: jobs and shells are Python programs."""

    PROGRAM = PROGRAM

    BEAT = """
import os, subprocess, sys, time
if sys.argv[2:]: subprocess.Popen([sys.executable, *sys.argv[:2]])
open(f'{sys.argv[1]}.{os.getpid()}.began', 'w').close()
while True:
    print('beat', flush=True)
    time.sleep(0.05)
    with open(sys.argv[1], 'a') as file: file.write('.')
"""

    REAL = True

    def setUp(self) -> None:
        super().setUp()
        self.dir = self.file("a b \u00e9")  # a path that must be quoted
        self.path = self.file("queuectl.db")
        os.mkdir(self.dir)
        self.write("beat.py", self.BEAT)

    def python(self, *args: str, **fields: Any) -> str:
        """Add a job that runs Python."""
        options = [word for key, value in fields.items() for word in (f"--{key}", str(value))]
        return self.stdout("enqueue", *options, "--", sys.executable, *args).strip()

    def pool(self, *args: str, **more: Any) -> Any:
        flags = 0x200 if os.name == "nt" else 0  # CREATE_NEW_PROCESS_GROUP: gets no Ctrl-C
        return super().pool(*args, creationflags=flags, **more)

    def wait_for_beats(self, name: str, processes: int = 2) -> None:
        """Wait until this many processes of a beat have started, over all attempts."""
        prefix = name + "."
        wait_until(lambda: sum(f.startswith(prefix) for f in os.listdir(self.dir)) >= processes)

    def test_installed_command_does_as_the_script_does(self) -> None:
        self.stdout("install", self.dir)
        starter = self.file("queuectl.cmd" if os.name == "nt" else "queuectl")
        added = self.process(starter, "enqueue", "--", sys.executable, "-c", "print(6 * 7)")
        self.assertEqual(added, (0, "1\n", ""))
        self.assertEqual(self.process(starter, "worker", "start", "--drain", "--quiet")[0], 0)
        self.assertEqual(self.process(starter, "logs", "1")[:2], (0, "42\n"))
        self.assertEqual(self.process(starter, "logs", "2")[0], 1)

    def is_silent(self, name: str) -> bool:
        """Tell whether every process of a beat has ended."""
        size = os.path.getsize(self.file(name))
        time.sleep(0.3)
        return os.path.getsize(self.file(name)) == size

    def show(self, job: str) -> Any:
        return self.json_object("show", job)

    def test_jobs_run_and_their_output_and_exit_codes_are_stored(self) -> None:
        good = self.python("-c", "import os; print('caf\u00e9', os.environ['QUEUECTL_JOB_ID'])")
        bad = self.python("-c", "raise SystemExit(3)", **{"max-retries": 2})
        self.stdout("config", "set", "backoff_base", "1")
        pool = self.pool("--count", "2", "--drain")
        self.assertIn("dead: exit code 3", pool.communicate(timeout=60)[0])
        self.assertEqual(pool.returncode, 1)
        self.assertIn(good, self.stdout("logs", good))
        self.assertEqual([run["exit_code"] for run in self.show(bad)["runs"]], [3, 3])
        self.assertEqual(self.show(good)["state"], "completed")

    def test_command_arguments_reach_the_job_unchanged(self) -> None:
        args = ["a b", "c&d", "50%", 'e"f&g"', "^h|i", "(j)>k", "l\\", "$m;'n'", "", "!o!"]
        self.write("args.py", "import json, sys; print(json.dumps(sys.argv[1:]))")
        job = self.python("args.py", *args)
        self.pool("--drain").communicate(timeout=60)
        self.assertEqual(json.loads(self.stdout("logs", job)), args)

    def test_timeout_and_cancel_end_the_whole_process_tree(self) -> None:
        self.stdout("config", "set", "kill_grace", "0.5")
        timed_out = self.python("beat.py", "timed", "tree", timeout=1.5, **{"max-retries": 1})
        cancelled = self.python("beat.py", "cancelled", "tree")
        self.pool("--count", "2")
        self.wait_for_beats("cancelled")
        self.assertEqual(self.stdout("cancel", cancelled).strip(), cancelled)
        self.assertTrue(self.is_silent("cancelled"))
        self.assertEqual(self.show(cancelled)["state"], "cancelled")
        wait_until(lambda: self.show(timed_out)["state"] == "dead", 20)
        self.assertIn("timed out", self.show(timed_out)["last_error"])
        self.assertTrue(self.is_silent("timed"))

    def test_killed_worker_job_restarts_after_its_process_tree_is_gone(self) -> None:
        job = self.python("beat.py", "beat", "tree", **{"max-retries": 2})
        self.pool()
        self.wait_for_beats("beat")
        os.kill(self.json_object("worker", "list")["pid"], 9)
        self.wait_for_beats("beat", 4)
        self.assertEqual([run["error"] for run in self.show(job)["runs"]], ["its worker died"])
        self.stdout("worker", "stop", "--now")
        self.assertTrue(self.is_silent("beat"))
        self.assertEqual((self.show(job)["state"], self.show(job)["attempts"]), ("pending", 1))

    def test_job_restarts_at_next_start_after_pool_and_worker_are_killed(self) -> None:
        job = self.python("beat.py", "beat", "tree")
        pool = self.pool()
        self.wait_for_beats("beat")
        worker = self.json_object("worker", "list")
        for pid in (pool.pid, worker["pid"]):
            os.kill(pid, 9)
        self.pool()
        self.wait_for_beats("beat", 4)
        self.stdout("worker", "stop", "--now")
        self.assertTrue(self.is_silent("beat"))
        self.assertEqual(len(self.show(job)["runs"]), 2)

    def test_running_job_can_be_followed_and_finishes_despite_stop(self) -> None:
        code = "import time; print('one', flush=True); time.sleep(1); print('two')"
        job = self.python("-c", code)
        pool = self.pool()
        wait_until(lambda: self.show(job)["state"] == "processing")
        follower = self.start("logs", "-f", job)
        self.stdout("worker", "stop")
        self.assertEqual(follower.communicate(timeout=20)[0].split(), ["one", "two"])
        self.assertEqual(self.show(job)["state"], "completed")
        self.assertEqual((pool.wait(10), self.stdout("worker", "list", "--json")), (0, ""))

    def test_shell_can_be_configured(self) -> None:
        python = f'"{sys.executable}"' if os.name == "nt" else shlex.quote(sys.executable)
        self.stdout("config", "set", "shell", python + " -c")
        job = self.stdout("enqueue", "print(6 * 7)").strip()
        self.assertEqual(self.pool("--drain").wait(30), 0)
        self.assertEqual(self.stdout("logs", job).split(), ["42"])

    def test_detached_pool_runs_jobs_and_can_be_stopped(self) -> None:
        job = self.stdout("enqueue", "exit 0").strip()
        self.assertIn("its log is", self.run_cli("worker", "start", "--detach").stderr)
        self.assertEqual(self.run_cli("wait", job, "--timeout", "20").returncode, 0)
        self.stdout("worker", "stop")
        self.assertEqual(self.stdout("worker", "list", "--json"), "")


@unittest.skipUnless(sys.platform == "linux", "removes features from Linux that macOS lacks")
class AsOnMacOS(AnySystem):
    """Without /proc, fallocate, or the adoption of orphans, as on macOS."""

    def setUp(self) -> None:
        super().setUp()
        with open(PROGRAM) as file:
            source = file.read()
        for present, absent in (
            ('os.readlink("/proc/self") == str(os.getpid())', "False"),
            ('sys.platform != "linux" else {}', "True else {}"),
            ('"fallocate64"', '"no_such_function"'),
            ('"prctl"', '"no_such_function"'),
        ):
            self.assertEqual(source.count(present), 1, present)
            source = source.replace(present, absent)
        self.PROGRAM = self.file("queuectl.py")
        with open(self.PROGRAM, "w") as file:
            file.write(source)


@NEEDS_SHELL
class Readme(Case):
    """The README agrees with the program."""

    @staticmethod
    def normalize(text: str) -> str:
        """Replace the parts that differ from run to run."""
        text = re.sub(r"(\d{4}-\d\d-\d\dT)?\d\d:\d\d:\d\d([+-]\d\d:\d\d)?", "TIME", text)
        text = re.sub(r"in [\d.]+ s\n", "in N s\n", text)
        text = re.sub(r"  (now|\d+ s ago) +", "  AGO  ", text)
        return re.sub(r"WHEN +", "WHEN  ", re.sub(r"/\S*/queuectl\.db", "/queuectl.db", text))

    def setUp(self) -> None:
        super().setUp()
        shutil.copy(PROGRAM, self.dir)
        os.mkdir(self.file("bin"))
        os.symlink(sys.executable, self.file("bin/python3"))
        self.stub("queuectl", f'exec python3 "{self.dir}/queuectl.py" "$@"\n')
        os.environ.update(PATH=f"{self.dir}/bin:{os.environ['PATH']}", LC_ALL="C")

    def stub(self, name: str, body: str) -> None:
        """Put a program into the PATH."""
        self.write(f"bin/{name}", "#!/bin/sh\n" + body)
        os.chmod(self.file(f"bin/{name}"), 0o755)

    @staticmethod
    def section(heading: str) -> str:
        """Return the text below a heading up to the next one."""
        return re.split(r"\n##+ ", readme().partition(f"# {heading}\n")[2])[0]

    def example(self, heading: str, number: int = 0) -> str:
        """Return a code block of a section."""
        return re.findall(r"(?s)```[a-z]+\n(.*?)```", self.section(heading))[number]

    def rows(self, heading: str) -> list[list[str]]:
        """Return the cells of the table of a section."""
        lines = re.findall(r"(?m)^\|(.*)\|$", self.section(heading))[2:]
        return [[cell.strip() for cell in line.split("|")] for line in lines]

    def test_ci_example_prints_output_of_failed_jobs_and_sets_exit_code(self) -> None:
        os.environ["TMPDIR"] = self.dir
        self.stub("make", 'echo "making $1"; test "$1" != "$BROKEN"\n')
        example = self.example("CI").replace('"max_retries": 2', '"max_retries": 1')
        for broken, code in (("nothing", 0), ("test", 1), ("e2e", 1)):
            with self.subTest(broken):
                env = {**os.environ, "BROKEN": broken}
                result = self.process("sh", "-c", example, env=env)
                self.assertEqual(result.returncode, code)
                self.assertEqual(f"making {broken}\n" in result.stdout, bool(code))
                self.assertIn("<testsuite", self.read("junit.xml"))

    JQ = 'import json, sys; print(json.dumps({"text": sys.stdin.read()}, separators=",:"))'

    def test_notification_examples_run_and_read_the_job(self) -> None:
        told = '{ echo "$0 $*"; case "$*" in *@-*|-s*|-t*) cat; esac; } >> told\n'
        for name in ("mail", "curl", "logger"):
            self.stub(name, told)
        if not shutil.which("jq"):
            self.stub("jq", f"exec {sys.executable} -c '{self.JQ}'\n")
        lines = self.example("Notifications").replace("\\\n", "").splitlines()
        self.assertEqual(len(lines), 5)
        for line in lines:
            command = shlex.split(line)[4]
            self.enqueue("exit 3", id=f"x{len(command)}", max_retries=1, on_dead=command)
        self.drain(code=1)
        told = self.read("told")
        self.assertEqual(told.count('"last_error"'), 3)
        for text in ("queuectl: dead x", "-d dead x", "user.err", "/hook", '{"text":"{'):
            self.assertIn(text, told)

    def test_library_examples_run(self) -> None:
        self.write("bin/send-invoice", "")
        first = self.example("From Python", 0)
        second = self.example("From Python", 1)
        first = first.replace("make all", "true")
        self.assertEqual(self.script(first).stdout, "completed\n")
        with contextlib.closing(sqlite3.connect(self.file("shop.db"))) as db:
            db.execute("CREATE TABLE orders (id INTEGER, what TEXT)")
            self.script("from queuectl import Queue\n" + second)
            self.assertEqual(db.execute("SELECT * FROM orders").fetchall(), [(42, "tea")])
            self.assertEqual(
                db.execute("SELECT id FROM queuectl_jobs").fetchall(), [("invoice-42",)]
            )

    def test_session_prints_the_documented_output(self) -> None:
        session = readme().partition("```console\n")[2].partition("```")[0]
        for step in session.split("$ ")[1:]:
            command, _, printed = step.partition("\n")
            result = self.process("sh", "-c", f"{{ {command}; }} 2>&1")
            with self.subTest(command):
                self.assertEqual(self.normalize(result.stdout), self.normalize(printed))

    @internal
    def test_commands_are_those_of_the_program(self) -> None:
        made = runpy.run_path(os.path.join(HERE, ".ci", "reference"))["reference"]()
        self.assertEqual(self.example("Commands"), made, "run .ci/reference --write")

    @internal
    def test_commands_in_examples_are_accepted(self) -> None:
        blocks = "\n".join(re.findall(r"(?s)```(?:sh|console)\n(.*?)```", readme()))
        found = 0
        for line in blocks.replace("\\\n", "").splitlines():
            lexer = shlex.shlex(line.replace("$?", ""), posix=True, punctuation_chars=";|&<>")
            lexer.wordchars += ":,"
            for part in re.split(r"\0[;|&<>]+\0", "\0" + "\0\0".join(lexer) + "\0"):
                words = [word for word in part.split("\0") if word]
                start = [i for i, word in enumerate(words) if word in ("queuectl", "queuectl.py")]
                if start:
                    with self.subTest(line):
                        queuectl.parse(words[start[0] + 1 :])
                    found += 1
        self.assertGreater(found, 40)

    @internal
    def test_fields_are_those_of_the_program(self) -> None:
        options: dict[str, list[str]] = {key: [] for key in queuectl.FIELDS}
        parser = queuectl.command_parser("enqueue", queuectl.COMMANDS["enqueue"])
        for action in parser._actions:
            if action.dest in options:
                options[action.dest].append(action.option_strings[-1])
        documented = {
            field.strip("`"): re.findall(r"--[a-z-]+", names)
            for field, names, _ in self.rows("Job fields")
        }
        self.assertEqual(documented, options)

    @internal
    def test_settings_are_those_of_the_program_with_their_defaults(self) -> None:
        defaults = {key: queuectl.setting_text(value) for key, value in queuectl.DEFAULTS.items()}
        documented = {key.strip("`"): value.strip("`") for key, value, _ in self.rows("Settings")}
        self.assertEqual(documented, defaults)
        last = [key.strip("`") for key, *_ in self.rows("Settings")][-3:]
        self.assertEqual(set(last), set(queuectl.FOR_ALL_QUEUES))

    @internal
    def test_exit_codes_are_those_of_the_program(self) -> None:
        documented = [code for code, _ in self.rows("Exit codes")]
        codes = [*map(int, queuectl.Exit)]
        self.assertEqual(documented, [str(code) if code != 128 else "128+n" for code in codes])

    @internal
    def test_environment_variables_are_those_of_the_program(self) -> None:
        with open(PROGRAM, encoding="utf-8") as file:
            used = set(re.findall(r"QUEUECTL_[A-Z_]*[A-Z]|NO_COLOR", file.read()))
        self.assertEqual({name.strip("`") for name, _ in self.rows("Environment")}, used)

    def json_fields(self) -> dict[str, set[str]]:
        """Return the documented JSON fields by the kind of object."""
        found = {}
        for item in re.split(r"(?m)^- \*\*", self.section("JSON fields"))[1:]:
            name, _, text = item.partition("**")
            found[name.strip(",:")] = set(re.findall(r"`(\w+)`", text))
        return found

    def test_json_fields_are_those_of_the_program(self) -> None:
        fields = self.json_fields()
        self.enqueue("true", id="a", every="1h")
        self.enqueue("true", id="b")
        self.enqueue("true", id="c", priority=9)
        self.drain()
        facts = {
            words: json.loads(self.run_cli(*words.split(), "--json").stdout.splitlines()[0])
            for words in ("show b", "list", "list --recurring", "status", "config list")
        }
        job = fields["job"]
        self.assertEqual({*facts["list"]}, job | fields["list"])
        schedule = facts["list --recurring"]
        last = schedule["last_result"]
        self.assertEqual({*schedule, *last}, job | fields["list --recurring"])
        self.assertEqual({*facts["show b"]}, job | fields["show"])
        self.assertEqual({*facts["show b"]["runs"][0]}, fields["run"] - {"runs"})
        self.assertEqual({*facts["status"]}, fields["status"])
        self.assertEqual({*facts["config list"]}, fields["config list"])

    def test_lines_are_narrow_and_the_door_is_short(self) -> None:
        lines = readme().splitlines()
        self.assertLessEqual(lines.index("## Concepts"), 80)
        code = False
        for line in lines:
            code ^= line.startswith("```")
            with self.subTest(line):
                width = 120 if code else 110 if line[:1] in ("|", "!") else 90
                self.assertLessEqual(len(line), width)

    def test_public_names_are_documented(self) -> None:
        for name in queuectl.__all__:
            self.assertRegex(readme(), rf"`(queuectl\.)?{name}`")

    def test_first_job_prints_its_output(self) -> None:
        self.assertEqual(self.process("sh", "-c", self.example("Install", 1)).stdout, "1\nhello\n")

    def test_install_makes_the_command(self) -> None:
        os.environ["HOME"] = self.dir
        self.stub("curl", 'test "$1" = -fLO')
        result = self.process("sh", "-ec", self.example("Install"))
        self.assertEqual(result.stdout, self.file(".local/bin/queuectl\n"), result.stderr)
        self.assertIn("usage: ", self.process(result.stdout.strip()).stdout)


def index_lines(doc: str | None, heading: str) -> list[str]:
    """Return the lines of the table below a heading, each with its continuations."""
    table = (doc or "").partition(heading + "\n\n")[2].partition("\n\n")[0]
    return re.sub(r"\n {20,}", " ", table).splitlines()


class Layout(unittest.TestCase):
    """queuectl.py reads from top to bottom, with each concern in its own section."""

    @classmethod
    def setUpClass(cls) -> None:
        with open(PROGRAM, encoding="utf-8") as file:
            cls.source = file.read()
        cls.tree = ast.parse(cls.source)

    def section(self, node: ast.AST) -> str:
        """Return the title of the section that contains a node."""
        lines = self.source.splitlines()[: node.lineno]
        titles = [line for line in lines if line.startswith("# --- ")]
        return titles[-1].strip("# -").partition(":")[0] if titles else ""

    def sections_with(self, matches: Callable[[ast.AST], Any]) -> set[str]:
        """Return the titles of the sections that contain a matching node."""
        return {self.section(node) for node in ast.walk(self.tree) if matches(node)}

    def definitions(self) -> dict[str, int]:
        """Return the names defined at the top level, each with the first line that does so."""
        lines: dict[str, int] = {}
        for node in self.tree.body:
            if hasattr(node, "name"):
                lines.setdefault(node.name, node.lineno)
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                for part in ast.walk(target) if target else ():
                    if isinstance(part, ast.Name):
                        lines.setdefault(part.id, node.lineno)
        return lines

    def test_each_promise_is_named_by_a_test(self) -> None:
        with open(__file__, encoding="utf-8") as file:
            tree = ast.parse(file.read())
        promised = re.findall(r"(?m)^(\d)\. ", ast.get_docstring(tree) or "")
        docs = [ast.get_docstring(n) or "" for n in ast.walk(tree) if hasattr(n, "decorator_list")]
        matches = [re.match(r"Promise (\d)", doc) for doc in docs]
        tested = sorted({match[1] for match in matches if match})
        self.assertEqual((promised, tested), (list("123456789"), list("123456789")))

    def test_index_of_the_tests_names_every_class_below_its_section(self) -> None:
        with open(__file__, encoding="utf-8") as file:
            source = file.read()
        listed = [
            (line[4:21].strip(), line[21:].split())
            for line in index_lines(__doc__, "in the same order:")
        ]
        found: list[tuple[str, list[str]]] = []
        for bar, name in re.findall(r"(?m)^# --- ([\w ]+?)(?:: .*)? -+$|^class (\w+)", source):
            if bar:
                found.append((bar, []))
            else:
                found[-1][1].append(name)
        helpers = ["Result", "Case", "Clocked", "Tags", "Reported", "Live", "Terminal"]
        self.assertEqual(found[0], ("helpers", helpers))
        self.assertEqual(listed, found[1:])

    def test_docstring_of_the_program_lists_its_sections_in_order(self) -> None:
        lines = index_lines(ast.get_docstring(self.tree), "only the sections above it.")
        listed = [line[:20].strip() for line in lines]
        bars = re.findall(r"(?m)^# --- ([\w ]+?)(?:: .*)? -+$", self.source)
        self.assertEqual(listed, bars)

    @internal
    def test_functions_named_in_the_docstring_of_the_program_exist(self) -> None:
        doc = ast.get_docstring(self.tree) or ""
        paths = doc[doc.index("To follow a job:") :]
        for name in re.findall(r"\b(?:[A-Z]\w+\.\w+|[A-Z][a-z]\w+(?=[,.])|[a-z]+_\w+)", paths):
            with self.subTest(name):
                operator.attrgetter(name)(queuectl)

    @internal
    def test_sql_is_only_in_the_sql_section(self) -> None:
        statement = r"\s*(SELECT|INSERT|UPDATE|DELETE|CREATE|PRAGMA|BEGIN|COMMIT) [^\n]"

        def is_sql(node: ast.AST) -> bool:
            return isinstance(node, ast.Constant) and bool(re.match(statement, str(node.value)))

        self.assertEqual(self.sections_with(is_sql), {"SQL"})

    @internal
    def test_print_is_only_in_the_command_line_section(self) -> None:
        def is_print(node: ast.AST) -> bool:
            return isinstance(node, ast.Name) and node.id == "print"

        self.assertEqual(self.sections_with(is_print), {"command line"})

    @internal
    @unittest.skipIf(sys.version_info < (3, 9), "ast.unparse came with Python 3.9")
    def test_signals_and_kills_are_only_in_the_system_section(self) -> None:
        calls = {"os.kill", "signal.signal", "signal.pthread_sigmask", "signal.set_wakeup_fd"}

        def is_signal_call(node: ast.AST) -> bool:
            return isinstance(node, ast.Attribute) and ast.unparse(node) in calls

        top = ""  # Ctrl-C during the imports
        self.assertEqual(self.sections_with(is_signal_call), {top, "system"})

    def test_imports_are_standard_library_only_and_slow_ones_are_lazy(self) -> None:
        names = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.partition(".")[0])
        if sys.version_info >= (3, 10):
            self.assertLessEqual(names, sys.stdlib_module_names)
        code = "import sys; before = set(sys.modules); import queuectl"
        code += "; print(*set(sys.modules) - before)"
        loaded = subprocess.check_output([*PYTHON, "-c", code], cwd=HERE, text=True).split()
        slow = {"argparse", "subprocess", "multiprocessing", "difflib", "socket", "ctypes"}
        self.assertEqual(slow & set(loaded), set())
        code = "import sys, queuectl; queuectl.main(['--db', 'nowhere', 'status'])"
        code += "; print(*sys.modules)"
        python = [*PYTHON, "-IS", "-c", f"import sys; sys.path.append({HERE!r}); {code}"]
        loaded = subprocess.check_output(python, stderr=subprocess.DEVNULL, text=True).split()
        slow = slow - {"argparse"} | {"tempfile"}
        slow -= set() if POSIX else {"ctypes"}  # it lets a Windows console interpret escapes
        if sys.version_info >= (3, 11):
            slow.add("shutil")
        self.assertEqual(slow & set(loaded), set())

    @internal
    def test_annotations_use_only_names_defined_above_them(self) -> None:
        defined_at = self.definitions()
        forward = set()
        for definition in self.tree.body:
            nodes = list(ast.walk(definition))
            notes = [getattr(n, "annotation", None) or getattr(n, "returns", None) for n in nodes]
            for note in filter(None, notes):
                for name in ast.walk(note):
                    if defined_at.get(getattr(name, "id", ""), 0) > definition.lineno:
                        forward.add((getattr(definition, "name", ""), name.id))
        self.assertEqual(forward, set())

    @internal
    @unittest.skipIf(sys.version_info < (3, 11), "symbol tables include names in annotations")
    def test_definitions_use_only_names_defined_above_them(self) -> None:
        defined_at = self.definitions()
        forward = set()

        def check(table: symtable.SymbolTable, line: int) -> None:
            for symbol in table.get_symbols():
                used = symbol.is_global() and symbol.is_referenced()
                if used and defined_at.get(symbol.get_name(), 0) > line:
                    forward.add((table.get_name(), symbol.get_name()))
            for child in table.get_children():
                check(child, line)

        for child in symtable.symtable(self.source, "queuectl.py", "exec").get_children():
            check(child, defined_at.get(child.get_name(), child.get_lineno()))
        self.assertEqual(forward, set())

    @internal
    def test_functions_are_short(self) -> None:
        sizes = [
            (node.end_lineno - node.lineno + 1, node.name)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.FunctionDef)
        ]
        self.assertLessEqual(max(sizes)[0], 35, max(sizes))
        short = sum(size <= 20 for size, _ in sizes)
        self.assertGreater(short / len(sizes), 0.9)


class Speed(Live):
    """The cheap path is taken, judged by facts that do not depend on the machine's load."""

    @internal
    def test_slow_reader_of_a_job_list_does_not_block_the_checkpoint(self) -> None:
        with Queue(self.path) as queue, Queue(self.path, readonly=True) as reader:
            queue.enqueue_many({"command": "true"} for _ in range(2500))
            jobs = reader.jobs()
            seen = [next(jobs).seq]
            queue.enqueue("true")
            self.assertEqual(queue._db.execute(queuectl.TRUNCATE_WAL).fetchone()[0], 0)
            seen += [job.seq for job in jobs]
            self.assertEqual(seen, list(range(1, 2502)))

    @internal
    def test_slow_reader_of_batch_ids_does_not_block_the_checkpoint(self) -> None:
        with Queue(self.path) as queue:
            jobs = [{"command": "true"} for _ in range(2500)]
            jobs[7]["id"] = jobs[2400]["id"] = "taken"
            ids = queue.enqueue_many(jobs, if_absent=True)
            seen = [next(ids)]
            self.assertEqual(queue._db.execute(queuectl.TRUNCATE_WAL).fetchone()[0], 0)
            seen += ids
        numbers = [str(n) for n in range(1, 2500) if n != 8]
        self.assertEqual(seen, [*numbers[:7], "taken", *numbers[7:], "taken"])

    def test_workers_are_forked_from_a_server_with_all_modules_loaded(self) -> None:
        self.enqueue("echo ${PYTHONPATH-unset} > env")
        pool = self.pool("--count", "2")
        self.wait_for_state("1", "completed")
        for facts in self.workers().values():
            with open(f"/proc/{facts['pid']}/stat") as file:
                parent = file.read().rpartition(")")[2].split()[1]
            with open(f"/proc/{parent}/maps") as file:
                self.assertIn("_sqlite3", file.read())
            self.assertNotEqual(int(parent), pool.pid)
        self.assertEqual(self.read("env").strip(), os.environ.get("PYTHONPATH", "unset"))

    @internal
    def test_wal_restarts_even_if_there_is_always_a_reader(self) -> None:
        done = threading.Event()

        def read_always() -> None:
            with Queue(self.path, readonly=True) as one, Queue(self.path, readonly=True) as two:
                for reader, other in itertools.cycle([(one, two), (two, one)]):
                    reader._db.execute("BEGIN")
                    reader.counts()
                    time.sleep(0.01)
                    if other._db.connection.in_transaction:
                        other._db.execute("COMMIT")  # each reader begins before the other ends
                    if done.is_set():
                        break

        with Queue(self.path) as queue, futures.ThreadPoolExecutor() as executor:
            queue._db.set_synchronous("normal")
            queue.enqueue_many({"command": "true"} for _ in range(500))
            pool = make_pool(self, queue, say=print)
            reading = executor.submit(read_always)
            try:
                outcome = Outcome("exited", 1.0, 2.0, 0, None)
                job = claim(queue, "w")
                while job:
                    following = queue._ledger.finish(job, outcome, ())[1]
                    job = following and following.job
                size = os.stat(self.path + "-wal").st_size
                with mock.patch.object(queuectl, "LARGEST_WAL", 1 << 20):
                    wait_until(lambda: pool.sync() or os.stat(self.path + "-wal").st_size < size)
            finally:
                done.set()
            reading.result()
