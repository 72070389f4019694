"""Tests of queuectl: real processes, real signals, real databases.

python3 -m unittest                         everything in under a minute
QUEUECTL_SLOW=1 python3 -m unittest         and the sweeps, which take minutes
python3 test_queuectl.py bench [NAME...]    figures, with a baseline beside each, in a minute
QUEUECTL_BENCH_FULL=1 python3 test_queuectl.py bench    with 3 M rows, in minutes

What queuectl promises; who tests one of them says so by its number, as in "Promise 3":

1. A job whose id was printed is kept, whatever is killed, and over a power cut.
2. It runs at least once, and never twice at once.
3. It never starts more than max_retries times, crashes included.
4. Nothing hangs: no timeout, no output, no lock.
5. Recovery is exact and prompt, and needs no lease and no clock.
6. Stopping is graceful, from wherever it is asked for.
7. Only the commands of the owner run.
8. The cost follows the work, not the history.
"""

from __future__ import annotations

import ast
import contextlib
import faulthandler
import functools
import hashlib
import io
import itertools
import json
import os
import re
import select
import shlex
import shutil
import signal
import sqlite3
import stat
import statistics
import struct
import subprocess
import symtable
import sys
import tempfile
import threading
import time
import unittest
from concurrent import futures
from functools import partial
from typing import Any, Callable, Iterator
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
PYTHON = [sys.executable, *(["-O"] if sys.flags.optimize else [])]
ROOT, NOBODY = queuectl.SYSTEM.user() == 0, 65534
NEEDS_SHELL = unittest.skipUnless(POSIX, "its jobs, or what it looks at, are a POSIX system's")
NEEDS_ROOT = unittest.skipUnless(ROOT, "only root can give files away")
ONE_LINE = r"\Aqueuectl: [^\n]+\n\Z"
SLOW = unittest.skipUnless(os.environ.get("QUEUECTL_SLOW"), "slow: QUEUECTL_SLOW=1 runs it")


def setUpModule() -> None:
    """Hear Ctrl-C even if whoever started the tests ignores it: what they start inherits that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("QUEUECTL_DB", None)
    with tempfile.TemporaryDirectory() as path:  # one fork server for all pools of this process
        Queue(os.path.join(path, "queuectl.db")).db.close()
        queuectl.work(os.path.join(path, "queuectl.db"), drain=True)


def until(fact: Callable[[], Any], limit: float = 10.0) -> Any:
    """Wait until something is true, and return it."""
    deadline = time.monotonic() + limit
    while True:
        value = fact()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit} s: {fact}")
        time.sleep(0.01)


def naps(pid: int) -> int:
    """Return how often a process has gone to sleep; without /proc, as often as a pool looks."""
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


def in_process(args: Any, stdin: str | bytes, cwd: str) -> Any:
    """Run the program in this process; the result is like that of subprocess.run."""
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
    except SystemExit as end:  # --help
        code = end.code
    finally:
        faulthandler.cancel_dump_traceback_later()
        os.chdir(before)
    out.seek(0)
    err.seek(0)
    return subprocess.CompletedProcess(args, code, out.read(), err.read())


@functools.lru_cache(maxsize=None)
def readme() -> str:
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        return file.read()


class Case(unittest.TestCase):
    """A fresh directory for each test, and the program as a person calls it."""

    PROGRAM = PROGRAM
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
            until(lambda: not self.kill_ours())
        elif os.path.exists(self.path):
            self.run_cli("worker", "stop", "--now", code=None)
        for process in self.processes:
            with process:
                process.kill()
        self.processes.clear()

    def left(self) -> list[int]:
        """Return the living processes that work in the directory of this test."""
        found = []
        for pid in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if pid.isdigit() and os.readlink(f"/proc/{pid}/cwd").startswith(self.dir):
                    found += [int(pid)] * alive(int(pid))
        return found

    def kill_ours(self) -> list[int]:
        """Kill every process that works in the directory of this test."""
        found = self.left()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return found

    def each(self, cases: dict[Any, Any], act: Callable[[Any], Any]) -> None:
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

    def process(self, *line: str, **more: Any) -> Any:
        """Run a program to its end; return its result, with stdout and stderr as text."""
        given = {"cwd": self.dir, "capture_output": True, "text": True, "timeout": 60, **more}
        return subprocess.run(line, check=False, **given)

    def script(self, code: str, *words: str, prefix: Any = (), **more: Any) -> Any:
        """Run a Python program that imports queuectl; return its result."""
        env = {**os.environ, "PYTHONPATH": HERE}
        return self.process(*prefix, *PYTHON, "-c", code, *words, env=env, **more)

    def run_cli(
        self, *args: str, code: Any = 0, stdin: Any = "", real: bool = False, **more: Any
    ) -> Any:
        """Run one command; return its result. `more` is for a process of its own."""
        cwd, prefix = more.pop("cwd", self.dir), more.pop("prefix", ())
        if real or self.REAL or prefix or more:
            line = [*prefix, *PYTHON, self.PROGRAM, *args]
            result = self.process(*line, input=stdin, cwd=cwd, **more)
        else:
            result = in_process(args, stdin, cwd)
        if code is not None:
            self.assertEqual(result.returncode, code, result.stderr)
        self.assertNotIn("Traceback", result.stderr)
        return result

    def out(self, *args: str, **more: Any) -> str:
        """Run one command; return what it printed."""
        return str(self.run_cli(*args, **more).stdout)

    def facts(self, *args: str, **more: Any) -> Any:
        """Run one command; return the object that it printed."""
        return json.loads(self.out(*args, "--json", **more))

    def rows(self, *args: str) -> list[Any]:
        """Run one command; return the objects that it printed, one a line."""
        return [json.loads(line) for line in self.out(*args, "--json").splitlines()]

    def told(self, *args: str, **more: Any) -> tuple[int, str, str]:
        """Run one command; return its exit code and what it wrote."""
        result = self.run_cli(*args, code=None, **more)
        return result.returncode, result.stdout, result.stderr

    def refused(self, *args: str, code: int = 2, **more: Any) -> str:
        """Run a command that must fail with one line; return the line."""
        found, out, err = self.told(*args, **more)
        self.assertEqual((found, out), (code, ""), err[:500])
        self.assertRegex(err, ONE_LINE)
        self.assertLess(len(err.encode()), 1000)
        return err

    def start(self, *args: str, prefix: Any = (), **more: Any) -> subprocess.Popen[str]:
        """Start a command in the background, with all that it says in its stdout."""
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

    def becomes(self, job_id: str, state: str, limit: float = 10.0) -> Any:
        """Wait until a job is in a state; return it."""
        until(lambda: self.job(job_id).state == state, limit)
        return self.job(job_id)

    def workers(self) -> dict[str, dict[str, Any]]:
        """Return the living workers and what each says about itself."""
        return queuectl.RunDirectory(self.path).living("worker")


# --- rules ----------------------------------------------------------------------------------------


class Rules(Case):
    """The pure functions, by tables of cases."""

    def refuses(self, rule: Callable[[Any], Any], *cases: Any) -> None:
        for given in cases:
            with self.subTest(given), self.assertRaises(ValueError):
                rule(given)

    def test_durations_are_read_and_what_is_none_is_refused(self) -> None:
        cases = {"90": 90, "90s": 90, "5m": 300, "1h30m": 5400, "2d": 172800, "1.5h": 5400, "0": 0}
        self.each({**cases, ".5": 0.5, "1W": 604800}, queuectl.seconds)
        self.refuses(queuectl.seconds, *"x|5 m|-1|1h30|1e3|nan|11000d|m|".split("|"))
        self.refuses(queuectl.seconds, None, True, [], -1)

    def test_times_are_read_and_what_is_none_is_refused(self) -> None:
        cases = {
            "1970-01-01T00:01:00Z": 60,
            "1970-01-01T01:00+01:00": 0,
            "2030-01-31 08:00:00+00:00": 1896076800,
            "1896076800": 1896076800,
            "2030-01-31T08:00": time.mktime((2030, 1, 31, 8, 0, 0, 0, 0, -1)),
        }
        self.each(cases, queuectl.moment)
        wrong = (
            "",
            "tomorrow",
            "2030-13-01",
            "12345678",
            "12",
            -1,
            1e18,
            float("nan"),
            True,
            None,
            "9" * 30,
        )
        self.refuses(queuectl.moment, *wrong)

    def test_spans_and_distances_are_short(self) -> None:
        spans = {
            0.0034: "0.003 s",
            0.123: "0.12 s",
            1: "1 s",
            42.4: "42 s",
            59.7: "1m",
            200: "3m20s",
            7200: "2h",
            90061: "1d1h",
        }
        self.each(spans, queuectl.span)
        ago = {0: "now", -200: "3m20s ago", 7200: "in 2h", -0.4: "now"}
        self.each(ago, lambda distance: queuectl.ago(1000.0 + distance, 1000.0))

    def test_the_backoff_grows_and_is_capped(self) -> None:
        config = {"backoff_base": 2.0, "backoff_max": 60.0}
        waits = {1: 2, 2: 4, 3: 8, 10: 60, 100_000: 60}
        self.each(waits, lambda attempts: queuectl.backoff(attempts, config))

    def test_a_setting_is_read_as_it_is_printed(self) -> None:
        values = {key: setting.default for key, setting in queuectl.SETTINGS.items()}
        for key, value in {**values, "synchronous": "full", "shell": ("a b", "-c")}.items():
            with self.subTest(key):
                read = queuectl.SETTINGS[key].read(queuectl.setting_text(value))
                self.assertEqual((type(read), read), (type(value), value))

    @NEEDS_SHELL
    def test_exit_codes_say_what_they_mean(self) -> None:
        cases = {
            0: None,
            3: "exit code 3",
            126: "exit code 126 (not executable)",
            127: "exit code 127 (command not found)",
            137: "exit code 137 (128 + SIGKILL)",
            -9: "killed by SIGKILL",
            -15: "killed by SIGTERM",
            -99: "killed by signal 99",
        }
        self.each(cases, queuectl.exit_meaning)

    def test_nothing_that_moves_a_cursor_is_printable(self) -> None:
        cases = {"\x1b[2J": "\\x1b[2J", "a\nb": "a\\nb", "\u202e": "\\u202e", "é€": "é€"}
        self.each(cases, queuectl.printable)

    def test_how_an_attempt_ended_decides_the_state_and_what_counts(self) -> None:
        config = {key: setting.default for key, setting in queuectl.SETTINGS.items()}
        cases = {  # fate, error, attempts, cancelling -> state, attempts
            ("ran", None, 1, 0): ("completed", 1),
            ("ran", "exit code 1", 1, 0): ("pending", 1),
            ("ran", "exit code 1", 3, 0): ("dead", 3),
            ("ran", "exit code 1", 1, 1): ("cancelled", 1),
            ("ran", None, 1, 1): ("completed", 1),
            ("crashed", "its worker died", 2, 0): ("pending", 2),
            ("crashed", "its worker died", 3, 0): ("dead", 3),
            ("returned", "stopped", 3, 0): ("pending", 2),
            ("cancelled", "cancelled", 1, 0): ("cancelled", 1),
        }

        def moved(case: tuple[str, str | None, int, int]) -> tuple[str, int]:
            fate, error, attempts, cancelling = case
            job = a_job(attempts=attempts, cancelling=cancelling)
            after = queuectl.after_attempt(
                job, Outcome(fate, 100.0, 200.0, None, error), config, 200.0
            )
            return after.state, after.attempts

        self.each(cases, moved)


def a_job(**fields: Any) -> queuectl.Job:
    """Return a job in processing, with some fields as given."""
    values = dict.fromkeys(queuectl.Job._fields)
    return queuectl.Job(**{**values, "state": "processing", "run": 1, "run_after": 0.0, **fields})


# --- the library ----------------------------------------------------------------------------------


class Clocked(Case):
    """A queue with a clock that the test moves."""

    def setUp(self) -> None:
        super().setUp()
        self.now = 1e6
        self.queue = Queue(self.path, clock=lambda: self.now)
        self.queue.db.set_synchronous("normal")
        self.addCleanup(self.queue.db.close)

    def next(self, *queues: str) -> Any:
        return self.queue.claim("worker-1", queues)

    def ends(self, code: int = 0, job: Any = None) -> Any:
        """Let a job, the next one, end with an exit code; return it as it is then."""
        outcome = Outcome("ran", self.now, self.now, code, queuectl.exit_meaning(code))
        return self.queue.finish(job or self.next(), outcome)[0]

    def runs(self) -> str:
        """Let all complete that is due; return their ids in order."""
        return " ".join(self.ends(0, job).id for job in iter(self.next, None))

    def ids(self) -> str:
        return " ".join(job.id for job in self.queue.jobs())

    def why(self, job_id: str) -> str:
        return queuectl.why(self.queue, self.queue.get(job_id))

    def steps(self, act: Callable[[], object]) -> int:
        """Return how many hundred steps of SQLite's machine something takes."""
        taken: list[int] = []
        self.queue.db.connection.set_progress_handler(lambda: taken.append(1), 100)
        act()
        self.queue.db.connection.set_progress_handler(None, 0)
        return len(taken)


class Library(Clocked):
    """Queue, by itself."""

    def ended_as(self, job_id: str, fate: str, code: int) -> None:
        """Let a job's attempt end, if it has one."""
        error = f"exit code {code}" if code else None
        self.queue.finish(self.queue.get(job_id), Outcome(fate, 1.0, self.now, code, error))

    def test_a_job_moves_in_every_way_of_the_table_of_moves_and_in_no_other(self) -> None:
        claim = lambda job: self.queue.claim("worker-1", [job])  # noqa: E731
        cancel = lambda job: self.queue.cancel([job])  # noqa: E731
        ends = {end: partial(self.ended_as, fate=end[0], code=end[1]) for end in self.ENDS}
        ways = {
            "pending": (),
            "processing": (claim,),
            "completed": (claim, ends["ran", 0]),
            "dead": (claim, ends["ran", 1]),
            "cancelled": (cancel,),
        }
        acts = (claim, cancel, *ends.values(), lambda job: self.queue.retry([job]))
        number = itertools.count()
        for state, way in ways.items():
            seen = set()
            for act in acts:
                job = f"job-{next(number)}"
                self.queue.enqueue("true", id=job, queue=job, max_retries=1)
                for step in (*way, act):
                    with contextlib.suppress(queuectl.NotFound):
                        step(job)
                seen.add(self.queue.get(job).state)
            self.assertEqual(seen - {state}, set(queuectl.MOVES[state]), state)

    ENDS = (("ran", 0), ("ran", 1), ("returned", 1), ("cancelled", 1))

    def test_a_string_is_one_id_or_state_and_not_its_letters(self) -> None:
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
        self.assertEqual(list(self.queue.awaited("gpu-2")), ["gpu-2"])
        self.assertEqual(self.queue.claim("worker-1", "gpu-2").queue, "gpu-2")

    @NEEDS_SHELL
    def test_signals_are_after_a_pool_what_they_were_before(self) -> None:
        numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        self.addCleanup(signal.pthread_sigmask, signal.SIG_SETMASK, before)
        handlers = [signal.getsignal(number) for number in numbers]
        queuectl.work(self.path, drain=True, signals=True)
        self.assertEqual(signal.pthread_sigmask(signal.SIG_BLOCK, []), {*before, signal.SIGUSR1})
        self.assertEqual([signal.getsignal(number) for number in numbers], handlers)

    def test_only_a_main_thread_may_handle_signals_and_no_pool_is_left_where_another_tries(
        self,
    ) -> None:
        with futures.ThreadPoolExecutor() as thread, self.assertRaises(ValueError):
            thread.submit(queuectl.work, self.path, signals=True).result()
        self.assertEqual(self.queue.db.run_dir.living("pool"), {})

    def test_a_pool_says_what_is_in_its_way_once_a_minute(self) -> None:
        said: list[str] = []
        pool = queuectl.Pool(self.queue, 1, (), said.append)
        for trouble in ("a", "b", "a", "b"):
            pool.complain(trouble)
        self.assertEqual(said, ["a", "b"])
        pool.said["a"] -= 61
        pool.complain("a")
        self.assertEqual(said, ["a", "b", "a"])

    def test_who_syncs_by_itself_does_not_pay_for_each_commit(self) -> None:
        for word, number in (("normal", 1), ("full", 2), ("full", 2), ("normal", 1)):
            self.queue.db.set_synchronous(word)
            self.assertEqual(self.queue.db.rows("PRAGMA synchronous")[0][0], number)

    def test_there_is_at_least_one_worker(self) -> None:
        with self.assertRaisesRegex(queuectl.BadInput, "count must be a whole number from 1"):
            queuectl.work(self.path, 0)

    def test_a_failing_job_waits_2_then_4_seconds_and_is_dead_after_three(self) -> None:
        self.queue.enqueue("false", id="bad")
        for attempt, pause in ((1, 2.0), (2, 4.0)):
            after = self.ends(1)
            self.assertEqual((after.state, after.attempts), ("pending", attempt))
            self.now += pause - 0.01
            self.assertIsNone(self.next())
            self.now += 0.02
        self.assertEqual(self.ends(1).state, "dead")
        self.assertEqual(len(self.queue.attempts(self.queue.get("bad"))), 3)

    def test_a_clock_that_was_set_back_holds_up_no_next_try(self) -> None:
        for fate, pause in (("ran", 2.0), ("crashed", 0.0), ("returned", 0.0)):
            with self.subTest(fate):
                self.now = 1000.0
                self.queue.enqueue("false")
                job, outcome = self.next(), Outcome(fate, self.now, self.now, 1, "exit code 1")
                self.now = 10.0
                self.assertEqual(self.queue.finish(job, outcome)[0].updated_at, 10.0)
                self.now += pause
                self.assertEqual(self.next().id, job.id)

    def test_a_retried_job_starts_again_with_no_attempts(self) -> None:
        self.queue.enqueue("false", id="bad", max_retries=1)
        self.ends(1)
        self.assertEqual(self.queue.retry(), ["bad"])
        job = self.queue.get("bad")
        self.assertEqual((job.state, job.attempts, job.run), ("pending", 0, 1))
        self.assertEqual(self.next().run, 2)

    def test_a_retry_is_for_all_that_were_named_or_for_none(self) -> None:
        self.queue.enqueue("false", id="dead", max_retries=1)
        self.ends(1)
        self.queue.enqueue("true", id="waiting")
        for other in ("waiting", "nobody"):
            with self.assertRaises(queuectl.NotFound):
                self.queue.retry(["dead", other])
        self.assertEqual(self.queue.get("dead").state, "dead")

    def test_the_order_is_priority_then_due_time_then_arrival(self) -> None:
        for job_id, fields in {
            "later": {"priority": 9, "delay": 50},
            "low": {"priority": -1},
            "second": {},
            "first": {"run_at": 900},
            "third": {},
            "high": {"priority": 5},
        }.items():
            self.queue.enqueue("true", id=job_id, **fields)
        self.assertEqual(self.runs(), "high first second third low")
        self.now += 50
        self.assertEqual(self.runs(), "later")

    def test_ids_are_the_given_ones_or_the_next_free_number(self) -> None:
        self.assertEqual(self.queue.enqueue("true"), "1")
        self.assertEqual(self.queue.enqueue("true", id="3"), "3")
        self.assertEqual(self.queue.enqueue("true"), "4")
        with self.assertRaisesRegex(queuectl.BadInput, "there is a job 3 already"):
            self.queue.enqueue("true", id="3")

    def test_the_counts_are_what_counting_would_give(self) -> None:
        for number in range(9):
            self.queue.enqueue("true", id=f"j{number}", max_retries=1)
        for code in (0, 0, 1):
            self.ends(code)
        self.next()
        counted = dict.fromkeys(queuectl.STATES, 0)
        for job in self.queue.jobs():
            counted[job.state] += 1
        self.assertEqual(self.queue.counts(), counted)
        self.assertEqual(list(counted.values()), [5, 1, 2, 1, 0])

    HOT = {  # statement and index
        "NEXT_DUE": "jobs_due",
        "MAKE_DUE": "jobs_later",
        "NEXT_LATER": "jobs_later",
        "CLAIMED": "jobs_state",
        "LATEST": "jobs_state",
        "OLDEST": "jobs_state",
        "RECENT": "jobs_state",
        "PRUNABLE": "jobs_state",
        "NEXT_AWAITED": "jobs_later",
        "BEFORE": "jobs_due",
        "NEWEST": "jobs_series",
        "SCHEDULE": "jobs_recurs",
        "RECURRING": "jobs_recurs",
        "UNBLOCK": "needs_child",
        "MEET": "PRIMARY KEY",
        "PARENTS": "needs_child",
        "BY_ID": "sqlite_autoindex_jobs_1",
    }

    def test_each_query_of_the_hot_path_uses_an_index(self) -> None:
        """Promise 8: what a statement reads does not grow with the history."""
        names = "queue now state limit id due seq since before priority run_after".split()
        for name, index in self.HOT.items():
            sql = "EXPLAIN QUERY PLAN " + getattr(queuectl, name)
            rows = self.queue.db.execute(sql, dict.fromkeys(names, 1))
            plan = " ".join(str(row[-1]) for row in rows)
            with self.subTest(name):
                self.assertIn(index, plan)
                self.assertNotIn("TEMP B-TREE", plan)

    def test_no_statement_walks_over_a_table(self) -> None:
        """Promise 8: nor does it look at every row, but for a list of everything."""
        walks, known = set(), r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)\b"
        for name, sql in vars(queuectl).items():
            if name.isupper() and isinstance(sql, str) and re.match(known, sql):
                args = [1] * sql.count("?") or dict.fromkeys(re.findall(r":(\w+)", sql), 1)
                for row in self.queue.db.execute("EXPLAIN QUERY PLAN " + sql, args):
                    if re.fullmatch(r"SCAN (TABLE )?(jobs|attempts|needs)", row[-1]):
                        walks.add(name)
        self.assertEqual(walks, {"JOB", "RECENT_IDS"})  # the latter has a limit

    def test_threads_may_share_a_queue(self) -> None:
        def add() -> None:
            for _ in range(20):
                self.queue.enqueue("true")
            self.queue.db.close()

        threads = [threading.Thread(target=add) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(self.queue.counts()["pending"], 80)

    APP = """
from queuectl import Queue, work
queue = Queue('jobs.db')
job = queue.enqueue('echo from the library')
code = work('jobs.db', count=2, drain=True)
print(code, queue.get(job).state, queue.attempts(queue.get(job))[0].output)
"""

    def test_work_runs_jobs_from_a_program_without_a_main_guard(self) -> None:
        self.write("app.py", self.APP)
        os.environ["PYTHONPATH"] = HERE
        result = self.process(*PYTHON, "app.py")
        self.assertIn("0 completed b'from the library", result.stdout, result.stderr)


# --- the command line -----------------------------------------------------------------------------


@NEEDS_SHELL
class CommandLine(Case):
    """Each command, as a person or a script calls it."""

    def test_enqueue_prints_the_id_alone(self) -> None:
        self.assertEqual(self.out("enqueue", '{"id":"job1","command":"echo hello"}'), "job1\n")
        self.assertEqual(self.out("enqueue", "echo | cat"), "2\n")
        self.assertEqual(self.out("enqueue", '[{"command":"a"},{"command":"b"}]'), "3\n4\n")

    def test_every_field_is_stored(self) -> None:
        fields = {"id": "x", "command": "true", "queue": "gpu", "priority": 7, "max_retries": 9}
        fields.update(cwd="/", env={"A": "b"})
        times = {"run_at": "2030-01-31T08:00:00+00:00", "timeout": "5m"}
        self.out("enqueue", json.dumps({**fields, **times}))
        shown = self.facts("show", "x")
        self.assertEqual({key: shown[key] for key in fields}, fields)
        self.assertEqual((shown["timeout"], self.job("x").run_after), (300, 1896076800))

    def test_a_shell_line_words_and_lines_from_stdin_become_jobs(self) -> None:
        self.out("enqueue", "printf a | tr a b")
        self.out("enqueue", "--", "printf", "%s|", "two words", "it's", "$HOME", "*")
        lines = '{"command":"printf 3"}\n\n[{"command":"printf 4"}]\n'
        self.assertEqual(self.out("enqueue", "-", stdin=lines), "3\n4\n")
        self.drain()
        outputs = [self.out("logs", str(number)) for number in (1, 2, 3, 4)]
        self.assertEqual(outputs, ["b", "two words|it's|$HOME|*|", "3", "4"])

    def test_what_stands_after_two_dashes_is_one_command(self) -> None:
        words = (["/a b/c"], ["-"], ['{"command": "x"}'], ["git", "log", "--", "f"], ["{", "a"])
        for argv in words:
            job = self.job(self.out("enqueue", "--priority", "1", "--", *argv).strip())
            self.assertEqual(shlex.split(job.command), argv)
        self.assertIn("all go after --", self.refused("enqueue", "git", "log", "--", "f"))

    def test_a_byte_order_mark_before_json_is_nothing(self) -> None:
        self.assertEqual(self.out("enqueue", "-", stdin='\ufeff{"id":"x","command":"x"}'), "x\n")

    def test_a_shell_line_may_begin_as_json_does(self) -> None:
        for line in ("[ -e x ] && echo", '[ "$A" = b ]', "[[ -e x ]]", "{ a; b; } | c"):
            self.assertEqual(self.job(self.out("enqueue", line).strip()).command, line)

    def test_a_batch_is_stored_whole_or_not_at_all_and_an_error_names_its_line(self) -> None:
        self.out("enqueue", '{"id":"there","command":"true"}')
        for bad in ("{", '{"command":7}', '{"id":"there","command":"x"}', '{"command":"x"} x'):
            lines = f'{{"command":"true"}}\n\n{bad}\n'
            self.assertIn("queuectl: line 3: ", self.refused("enqueue", "-", stdin=lines.encode()))
        self.assertEqual(self.facts("status")["pending"], 1)

    def test_a_job_runs_where_it_was_enqueued_with_what_it_was_given(self) -> None:
        os.mkdir(self.file("there"))
        command = "pwd; echo $A $QUEUECTL_JOB_ID $QUEUECTL_ATTEMPT"
        job = json.dumps({"command": command, "env": {"A": "b"}})
        self.out("--db", "../queuectl.db", "enqueue", job, cwd=self.file("there"))
        self.drain()
        self.assertEqual(self.out("logs", "1"), self.file("there") + "\nb 1 1\n")

    def test_stdout_and_stderr_are_kept_in_order_and_stdin_is_empty(self) -> None:
        self.enqueue("echo one; echo two >&2; cat; echo three")
        self.drain()
        self.assertEqual(self.out("logs", "1"), "one\ntwo\nthree\n")

    def test_only_the_last_bytes_of_a_long_output_are_kept_and_it_is_said(self) -> None:
        self.enqueue("seq 100000")
        self.drain()
        result = self.run_cli("logs", "1")
        everything = "".join(f"{number}\n" for number in range(1, 100001))
        self.assertEqual(result.stdout, everything[-65536:])
        self.assertIn(f"{len(everything) - 65536} bytes of output before this", result.stderr)

    def test_a_drain_waits_for_retries_and_says_whether_anything_died(self) -> None:
        self.configure(backoff_max="0.1")
        self.enqueue("test -e again || { touch again; exit 1; }", id="second-try")
        self.drain(code=0)
        self.assertEqual(self.job("second-try").attempts, 2)
        self.enqueue("exit 3", id="bad", max_retries=1)
        events = self.drain(code=1)
        self.assertIn("job bad is dead: exit code 3", events)
        self.assertEqual(self.job("bad").last_error, "exit code 3")

    def test_a_drain_with_a_horizon_does_not_wait_for_what_lies_beyond(self) -> None:
        self.enqueue("true", delay="1h")
        self.enqueue("true")
        self.drain("--horizon", "1m")
        self.assertEqual((self.job("1").state, self.job("2").state), ("pending", "completed"))

    def test_a_job_that_cannot_start_is_a_failed_attempt_with_a_plain_reason(self) -> None:
        self.configure(shell="/no/such/shell -c", max_retries="1")
        nowhere = {"gone": "/nowhere/at/all", "shell": "/no/such/shell"}
        for job_id in nowhere:
            self.enqueue("true", id=job_id, cwd=nowhere["gone"] if job_id == "gone" else self.dir)
        self.drain(code=1)
        reason = "cannot start: No such file or directory: "
        reasons = {job_id: reason + path for job_id, path in nowhere.items()}
        self.each(reasons, lambda job_id: self.job(job_id).last_error)

    def test_the_shell_is_a_setting(self) -> None:
        self.configure(shell=f"{sys.executable} -c")
        self.enqueue("print(6 * 7)")
        self.drain()
        self.assertEqual(self.out("logs", "1"), "42\n")

    @SLOW
    def test_500_jobs_on_8_workers_run_once_each(self) -> None:
        lines = "".join(f'{{"command":"echo {n} >> lines"}}\n' for n in range(500))
        self.out("enqueue", "-", stdin=lines)
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

    def test_a_waiting_pool_starts_new_jobs_scheduled_jobs_and_retries_promptly(self) -> None:
        self.configure(backoff_max="0.1")
        self.enqueue("true")
        self.pool("--count", "2")
        self.becomes("1", "completed")
        until(lambda: len(self.workers()) == 2)
        self.enqueue("true", id="new")
        self.enqueue("true", id="later", delay=0.3)
        self.enqueue("test $QUEUECTL_ATTEMPT = 2", id="retry")
        for job_id in ("new", "later", "retry"):
            job = self.becomes(job_id, "completed")
            started = self.attempts(job_id)[-1].started
            self.assertLess(started - job.run_after, 0.2, job_id)
            self.assertGreaterEqual(started, job.run_after)

    def test_status_shows_counts_and_workers(self) -> None:
        self.enqueue("touch started; while test ! -e end; do sleep 0.01; done", id="busy")
        self.enqueue("true", delay=3600)
        pool = self.pool("--count", "2")
        until(lambda: os.path.exists(self.file("started")) and len(self.workers()) == 2)
        status = self.facts("status")
        self.assertEqual((status["pending"], status["processing"]), (1, 1))
        self.assertEqual({worker["job"] for worker in status["workers"]}, {"busy", None})
        self.assertRegex(self.out("status"), r"workers +2\n")
        self.write("end")
        self.out("worker", "stop")
        self.assertEqual((pool.wait(5), self.job("busy").state), (0, "completed"))
        self.assertIn("no workers are running", self.run_cli("worker", "stop").stderr)

    def test_list_is_aligned_and_limited_and_says_what_it_left_out(self) -> None:
        for number in range(5):
            self.enqueue(f"echo {number}", id="x" * (number + 1))
        lines = self.out("list").splitlines()
        column = lines[0].index("COMMAND")
        self.assertEqual([line.index("echo") for line in lines[1:]], [column] * 5)
        code, out, said = self.told("list", "--limit", "2", "--state", "pending")
        self.assertEqual((code, out.count("\n")), (0, 3))
        self.assertEqual(said, "queuectl: 2 of 5 jobs shown; --limit 0 shows all\n")
        self.assertEqual(len(self.rows("list")), 5)

    def test_the_dead_letter_queue_is_listed_and_retried(self) -> None:
        for command, job_id in (("test -e fixed", "bad"), ("false", "other")):
            self.enqueue(command, id=job_id, max_retries=1)
        self.drain(code=1)
        self.assertEqual([job["id"] for job in self.rows("dlq", "list")], ["bad", "other"])
        self.write("fixed")
        self.assertEqual(self.out("dlq", "retry", "bad"), "bad\n")
        self.drain()
        self.assertEqual(self.job("bad").state, "completed")
        self.assertIn("is completed, not dead", self.refused("dlq", "retry", "bad", code=1))
        self.assertIn("no job nope", self.refused("dlq", "retry", "nope", code=1))
        self.refused("dlq", "retry")
        self.refused("dlq", "retry", "bad", "--all")
        self.assertEqual(self.out("dlq", "retry", "--all"), "other\n")

    def test_settings_are_read_changed_and_forgotten(self) -> None:
        self.out("config", "set", "backoff-base", "3")
        self.assertEqual(self.out("config", "get", "backoff_base"), "3\n")
        self.out("config", "unset", "backoff_base")
        self.assertEqual(self.out("config", "get", "backoff_base"), "2\n")
        self.out("config", "set", "shell", "bash -ec")
        self.assertEqual(self.out("config", "get", "shell"), "bash -ec\n")
        self.out("config", "set", "retention", "30d")
        self.assertEqual(self.out("config", "get", "retention"), "2592000\n")
        listed = [setting["key"] for setting in self.rows("config", "list")]
        self.assertEqual(listed, list(queuectl.SETTINGS))

    def test_bad_settings_are_refused_with_the_nearest_name_and_the_range(self) -> None:
        for setting, message in {
            "tiemout=5": "unknown key tiemout: did you mean timeout?",
            "max_retries=0": "max_retries must be a whole number from 1 to 1000000",
            "max_retries=many": "max_retries must be a whole number from 1 to 1000000",
            "backoff_base=0.5": "backoff_base must be a number from 1 to 1000",
            "timeout=soon": "timeout must be a duration",
            "shell=": "shell must be a command prefix",
            "shell='": "shell must be a command prefix: No closing quotation",
            "synchronous=off": "synchronous must be normal or full",
        }.items():
            with self.subTest(setting):
                self.assertIn(message, self.refused("config", "set", *setting.split("=")))
        self.assertFalse(os.path.exists(self.path))

    def test_show_has_every_attempt(self) -> None:
        self.configure(backoff_max="0.1")
        self.enqueue("echo try $QUEUECTL_ATTEMPT; test $QUEUECTL_ATTEMPT = 2", id="x")
        self.drain()
        keys = "run exit_code error output".split()
        runs = [[run[key] for key in keys] for run in self.facts("show", "x")["runs"]]
        self.assertEqual(runs, [[1, 1, "exit code 1", "try 1\n"], [2, 0, None, "try 2\n"]])
        self.assertIn("exit code 1", self.out("show", "x"))
        self.refused("show", "y", code=1)

    def test_a_narrow_encoding_is_no_reason_to_fail(self) -> None:
        self.enqueue("echo \u20ac", id="euro")
        os.environ["PYTHONIOENCODING"] = "ascii"
        for words in ("list", "show euro", "status"):
            self.out(*words.split(), real=True)

    def test_bad_usage_gets_one_line(self) -> None:
        usage = (
            "enqeue x|enqueue|list --state lost|worker start --count 0|enqueue true --no-such|dlq"
        )
        for words in (*usage.split("|"), "worker stop --timeout soon"):
            with self.subTest(words):
                self.refused(*words.split())
        self.assertEqual(os.listdir(self.dir), [])

    def test_reading_commands_never_create_a_database(self) -> None:
        queue = "status|list|show 1|logs 1|dlq list|dlq retry --all|worker stop"
        config = "config get timeout|config list|config unset timeout"
        for words in f"{queue}|{config}".split("|"):
            with self.subTest(words):
                self.assertIn("there is no queue", self.refused(*words.split(), code=1))
        self.assertEqual(os.listdir(self.dir), [])

    @NEEDS_SHELL
    @NEEDS_SHELL
    def test_nothing_is_said_on_a_closed_stdout(self) -> None:
        for words in ("status", "list", "logs 1", "show 1"):
            self.out("enqueue", "true")
            line = f"exec {shlex.join([*PYTHON, PROGRAM])} {words} >&-"
            done = self.process("sh", "-c", line)
            self.assertEqual((done.returncode, done.stderr.count("Traceback")), (0, 0), done.stderr)

    @NEEDS_SHELL
    def test_what_is_not_unicode_is_refused(self) -> None:
        self.out("enqueue", "true")
        for words in ("show \udcff", "cancel \udcff", "wait \udcff", "dlq retry \udcff"):
            self.assertIn("'\\udcff' is not valid Unicode", self.refused(*words.split()))
        there = os.fsencode(self.dir) + b"/\xff"
        os.mkdir(there)
        self.assertIn("is not valid Unicode", self.refused("enqueue", "true", real=True, cwd=there))
        self.assertEqual(self.out("enqueue", "--cwd", "/", "true", real=True, cwd=there), "1\n")

    @NEEDS_SHELL
    def test_where_the_current_directory_is_gone_a_job_has_to_name_one(self) -> None:
        prefix = ("sh", "-c", 'mkdir gone; cd gone; rmdir ../gone; exec "$@"', "sh")
        os.environ["QUEUECTL_DB"] = self.path
        self.enqueue("true")
        self.assertIn("directory is gone", self.refused("enqueue", "true", prefix=prefix))
        self.assertEqual(self.out("enqueue", "--cwd", "/", "true", prefix=prefix), "2\n")

    @NEEDS_SHELL
    def test_a_backslash_in_a_path_is_a_part_of_its_name(self) -> None:
        os.mkdir(self.file("a\\b"))
        self.out("--db", "a\\b/queuectl.db", "enqueue", "true")
        self.assertIn("queuectl.db", os.listdir(self.file("a\\b")))

    def test_a_job_that_removes_its_own_output_ends_like_any_other(self) -> None:
        job = self.enqueue("rm -f queuectl.db.run/*.out; exit 3", max_retries=1)
        self.drain(code=1)
        self.assertEqual(self.job(job).last_error, "exit code 3")

    @NEEDS_SHELL
    def test_a_queue_may_be_in_a_directory_whose_name_is_not_unicode(self) -> None:
        os.mkdir(os.fsencode(self.dir) + b"/\xff")
        self.path = os.environ["QUEUECTL_DB"] = os.fsdecode(os.fsencode(self.dir) + b"/\xff/q.db")
        job = self.enqueue('echo "$QUEUECTL_DB" > db')
        self.drain()
        self.assertEqual(self.job(job).state, "completed")
        with open(self.file("db"), "rb") as file:
            self.assertTrue(file.read().endswith(b"/\xff/q.db\n"))

    @NEEDS_SHELL
    def test_lines_cannot_come_from_a_closed_stdin(self) -> None:
        closed = ("sh", "-c", 'exec "$@" <&-', "sh")
        self.assertIn("stdin is closed", self.refused("enqueue", "-", prefix=closed))
        self.assertEqual(os.listdir(self.dir), [])

    def test_the_database_can_be_named(self) -> None:
        self.out("--db", "other.db", "enqueue", "true")
        os.environ["QUEUECTL_DB"] = "other.db"
        self.assertEqual(self.facts("status")["pending"], 1)

    def test_events_go_nowhere_when_asked_to_be_quiet(self) -> None:
        self.enqueue("true")
        self.assertEqual(self.drain("--quiet"), "")


# --- helpers of the tests of processes ------------------------------------------------------------

WAIT = "until [ -e go ]; do sleep 0.02; done"  # a job that runs until the test says go
ALONE = "exec 9>>%s.lock; flock -n 9 || echo twice >> %s.log; echo $$ >> %s.log; "


def limited(what: int, limit: int) -> Callable[[], None]:
    """Return what sets a limit to a process that is about to start."""
    return lambda: resource.setrlimit(what, (limit, limit))


@NEEDS_SHELL
class Live(Case):
    """Tests that look at living processes."""

    def needs(self, *argv: str) -> None:
        """Skip the test where a tool is missing or may not do this here."""
        try:
            done = self.process(*argv)
        except FileNotFoundError:
            raise unittest.SkipTest(f"there is no {argv[0]}") from None
        if done.returncode:
            raise unittest.SkipTest(f"{argv[0]} does not work here: {done.stderr.strip()}")

    def mounted(self, script: str) -> list[str]:
        """Mount something in a namespace of its own; return what runs a program there."""
        new = ["unshare", "-m"] if ROOT else ["unshare", "-rm"]
        self.needs("nsenter", "--version")
        self.needs(*new, "sh", "-c", script)
        pipe, line = subprocess.PIPE, [*new, "sh", "-c", f"{script} && echo ready && exec cat"]
        holder = subprocess.Popen(line, stdin=pipe, stdout=pipe, cwd=self.dir)
        self.addCleanup(holder.communicate)
        self.assertEqual(holder.stdout.readline(), b"ready\n")
        enter = ["nsenter", "-t", str(holder.pid), "-m"]
        enter += [] if ROOT else ["-U", "--preserve-credentials"]
        return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', self.dir]

    def raw(self, path: str = "") -> Any:
        """Open a database as another program does."""
        return contextlib.closing(sqlite3.connect(path or self.path, isolation_level=None))

    def is_sound(self, path: str = "") -> None:
        with self.raw(path) as db:
            self.assertEqual(db.execute("PRAGMA integrity_check").fetchall(), [("ok",)])

    def started(self, name: str) -> None:
        """Wait until a job has made a file."""
        until(lambda: os.path.exists(self.file(name)))

    def wrote(self, name: str) -> None:
        """Wait until a job has written a line."""
        until(lambda: self.lines(name))

    def at(self, name: str) -> None:
        """Use another queue, as does the program from now on."""
        os.makedirs(self.file(name), exist_ok=True)
        self.path = os.path.join(self.dir, name, "queuectl.db")
        os.environ["QUEUECTL_DB"] = self.path

    def says(self, process: subprocess.Popen[str], text: str, limit: float = 10.0) -> None:
        """Wait until a command has said something; reads what it said so far."""
        said, fd = "", process.stdout.fileno()
        while text not in said:
            self.assertTrue(select.select([fd], [], [], limit)[0], f"no {text!r} in {said!r}")
            more = os.read(fd, 65536).decode()
            self.assertTrue(more, f"no {text!r} in {said!r}")
            said += more

    def second(self) -> float:
        """Return 1.0: what a second of an idle machine is on this one, which may be busy."""
        began = time.monotonic()
        self.out("status", real=True)
        return max(1.0, 10 * (time.monotonic() - began))

    def working(self, count: int) -> None:
        """Wait until so many workers live."""
        until(lambda: len(self.workers()) == count)

    def looked(self, pool: subprocess.Popen[str]) -> None:
        """Wait until a pool that has nothing to do has looked again, and found nothing new."""
        before = naps(pool.pid)
        until(lambda: naps(pool.pid) > before)

    def kill_workers(self, number: int = 9) -> None:
        for facts in self.workers().values():
            os.kill(facts["pid"], number)

    def ends(self, pool: subprocess.Popen[str], code: int, limit: float = 10.0) -> float:
        """Wait for a pool's end; return how long it took."""
        began = time.monotonic()
        output = pool.communicate(timeout=limit)[0]
        self.assertEqual(pool.returncode, code, output)
        return time.monotonic() - began


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, case: Case, *args: str, columns: int = 80, **more: Any) -> None:
        self.fd, slave = pty.openpty()
        case.addCleanup(os.close, self.fd)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
        env.update({"TERM": "xterm", **more.pop("env", {})})
        line = [*PYTHON, PROGRAM, *args]
        where: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": slave, "stderr": slave}
        self.process = subprocess.Popen(line, cwd=case.dir, env=env, **{**where, **more})
        case.addCleanup(self.process.wait)
        case.addCleanup(self.process.kill)
        os.close(slave)
        self.shown = ""

    def sees(self, pattern: str, limit: float = 10.0) -> None:
        """Wait until something is shown, and forget what was shown so far."""
        deadline = time.monotonic() + limit
        while not re.search(pattern, self.shown):
            more = select.select([self.fd], [], [], limit)[0] and os.read(self.fd, 65536)
            if not more or time.monotonic() > deadline:
                raise AssertionError(f"no {pattern!r} in {self.shown!r}")
            self.shown += more.decode()
        self.shown = ""

    def end(self) -> str:
        """Return all that is shown until the command ends."""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while True:
                self.shown += os.read(self.fd, 65536).decode()
        self.process.wait(10)
        return self.shown.replace("\r\n", "\n")


# --- crashes --------------------------------------------------------------------------------------


class Crash(Live):
    def test_a_killed_workers_job_runs_again_within_a_second(self) -> None:
        """Promise 5: recovery is exact and prompt."""
        alone = ALONE % (("job",) * 3)
        more = "[ $QUEUECTL_ATTEMPT = 2 ] && exit; sleep 300 & echo $! > child; wait"
        job = self.enqueue(alone + more)
        pool = self.pool()
        self.wrote("child")
        old = [int(self.lines("job.log")[0]), int(self.read("child"))]
        self.assertEqual([alive(pid) for pid in old], [True, True])
        second = self.second()
        self.kill_workers()
        until(lambda: len(self.lines("job.log")) >= 2, second)
        self.assertEqual([alive(pid) for pid in old], [False, False])
        after = self.becomes(job, "completed")
        self.assertEqual((after.attempts, after.run, len(self.lines("job.log"))), (2, 2, 2))
        self.assertEqual([a.error for a in self.attempts(job)], ["its worker died", None])
        self.says(pool, "-1 died\n")

    def test_what_a_killed_pool_was_running_is_taken_over_by_another_within_a_second(self) -> None:
        job = self.enqueue("echo run >> log; [ $QUEUECTL_ATTEMPT = 2 ] || sleep 300")
        pool = self.pool()
        self.wrote("log")
        victims = [pool.pid, *(facts["pid"] for facts in self.workers().values())]
        other = self.pool()
        self.working(2)
        self.looked(other)
        second = self.second()
        for pid in victims:
            os.kill(pid, 9)
        until(lambda: len(self.lines("log")) == 2, second)
        self.assertEqual(self.becomes(job, "completed").attempts, 2)

    LATE = """if True:
        import multiprocessing, sys, queuectl
        ours, theirs = multiprocessing.Pipe()
        ours.close()
        queuectl.run_worker({}, sys.argv[1], "worker-a-1", 1, (), theirs)
    """

    def test_a_worker_whose_pool_died_before_it_began_leaves(self) -> None:
        Queue(self.path).db.close()
        self.assertEqual(self.script(self.LATE, self.path, timeout=5).returncode, 0)

    def test_a_worker_that_cannot_be_started_since_the_fork_server_died_is_tried_again(
        self,
    ) -> None:
        self.enqueue("true")
        starts = [EOFError("unexpected EOF"), mock.DEFAULT, mock.DEFAULT]
        with mock.patch.object(queuectl, "Member", wraps=queuectl.Member, side_effect=starts):
            self.assertEqual(queuectl.work(self.path, 2, drain=True), 0)
        dead = [ConnectionRefusedError()] * 9
        with mock.patch.object(queuectl, "Member", side_effect=dead), self.assertRaises(
            queuectl.Fault
        ):
            queuectl.work(self.path, 9, drain=True)

    def test_workers_without_their_pool_finish_and_leave(self) -> None:
        job = self.enqueue(f"touch started; {WAIT}; echo result")
        pool = self.pool("--count", "3")
        self.working(3)
        self.started("started")
        second = self.second()
        pool.kill()
        after = self.enqueue("true")  # nobody is to take it
        until(lambda: len(self.workers()) == 1, second)  # the idle ones, though one is busy
        self.write("go")
        self.assertEqual(self.becomes(job, "completed").attempts, 1)
        self.assertEqual(self.attempts(job)[0].output, b"result\n")
        until(lambda: not self.workers(), second)
        self.assertEqual(self.job(after).run, 0)

    JOBS = {
        "plain": "sleep 300",
        "quiet": "exec >/dev/null 2>&1; sleep 300",
        "detached": "setsid -f sleep 300; sleep 300",
        "parent": "sleep 300 & sleep 300 & sleep 300",
        "clean": "exec env -i sleep 300",
        "hidden": "exec env -i sleep 300 >/dev/null 2>&1",
        "elsewhere": f"exec env QUEUECTL_DB=/dev/null {shlex.join(PYTHON)} -c 'import os, time; "
        "os.closerange(1, 64); time.sleep(300)'",
    }

    def test_what_a_killed_machine_was_running_runs_again_but_never_twice_at_once(self) -> None:
        """Promise 2: a new attempt starts when every process of the old one is gone."""
        jobs = {name: self.enqueue(ALONE % ((name,) * 3) + job) for name, job in self.JOBS.items()}
        count = str(len(jobs))
        pool = self.pool("--count", count)
        until(lambda: all(self.lines(f"{name}.log") for name in jobs))
        pool.kill()
        self.kill_workers()
        until(lambda: not self.workers())
        self.assertGreaterEqual(len(self.left()), len(jobs))  # the orphans live on
        second = self.second()
        self.pool("--count", count)
        until(lambda: all(len(self.lines(f"{name}.log")) >= 2 for name in jobs), second)
        for name, job in jobs.items():
            with self.subTest(name):
                old, new = self.lines(f"{name}.log")
                self.assertTrue(old.isdigit() and new.isdigit(), "twice at once")
                self.assertEqual((alive(int(old)), alive(int(new))), (False, True))
                self.assertEqual((self.job(job).attempts, self.job(job).run), (2, 2))

    def test_a_job_that_kills_its_worker_starts_as_often_as_it_may(self) -> None:
        """Promise 3: an attempt counts when it is claimed, whatever becomes of its worker."""
        bad = self.enqueue("echo start >> log; kill -9 $PPID; sleep 300", max_retries=3)
        good = [self.enqueue("true") for _ in range(20)]
        self.pool("--count", "4")  # enough, though who died is replaced no sooner than in a second
        after = self.becomes(bad, "dead")
        self.assertEqual((after.attempts, self.read("log")), (3, "start\n" * 3))
        self.assertIn("worker died", after.last_error)
        until(lambda: [self.states()[job] for job in good] == ["completed"] * 20)
        self.assertEqual(self.read("log"), "start\n" * 3)

    @SLOW
    @unittest.skipUnless(ROOT, "only root has a capability to lose")
    def test_what_a_dead_worker_left_and_cannot_be_ended_is_said(self) -> None:
        other, weak = "setpriv --reuid 65534 --clear-groups", ["setpriv", "--bounding-set=-kill"]
        self.needs(*other.split(), *weak[:1], "--dump")
        self.configure(kill_grace="0")
        again = "[ $QUEUECTL_ATTEMPT = 2 ] && exit; "
        job = self.enqueue(again + f"echo $$ $PPID > pids; exec {other} sleep 300")
        pool = self.pool("--drain", prefix=weak)
        self.wrote("pids")
        left, worker = map(int, self.read("pids").split())
        until(lambda: b"sleep" in queuectl.read_proc(f"{left}/comm"))
        os.kill(worker, 9)
        self.says(pool, f"what job {job} left running does not end: process {left}\n")
        os.kill(left, 9)
        self.ends(pool, 0)
        self.assertEqual(self.job(job).attempts, 2)


class NoFalseAlarm(Live):
    """Promise 5: there is no lease, and nothing makes a living job look dead."""

    def test_a_lock_that_is_taken_while_the_dead_are_cleared_away_stays(self) -> None:
        with Queue(self.path) as queue:
            run_dir, names, taken = queue.db.run_dir, ["1.1.out", "worker-1-1"], []
            for name in names:
                self.write(run_dir.file(name))

            def free(name: str) -> bool:
                taken.append(queuectl.LockFile(run_dir.file(name)))  # a moment after it was free
                self.addCleanup(taken[-1].close)
                return True

            with mock.patch.object(run_dir, "free", free):
                run_dir.clean([])
            self.assertEqual([os.path.basename(lock.path) for lock in taken], names)
            self.assertEqual(run_dir.files(), names)

    def test_a_pool_on_a_copy_of_the_queue_leaves_the_jobs_of_the_original_alone(self) -> None:
        job = self.enqueue(f"echo $$ >> log; touch started; {WAIT}")
        self.pool()
        self.started("started")
        with Queue(self.path) as queue, contextlib.closing(sqlite3.connect(self.path)) as db:
            db.execute("VACUUM INTO ?", (self.file("copy.db"),))
            os.chmod(self.file("copy.db"), 0o600)
            pool = self.pool(env={**os.environ, "QUEUECTL_DB": self.file("copy.db")})
            self.says(pool, "its worker died")
            until(lambda: len(self.lines("log")) == 2)  # a copy is a queue of its own
            self.write("go")
            self.becomes(job, "completed")
            self.assertEqual([attempt.error for attempt in queue.attempts(queue.get(job))], [None])

    def suspend(self, duration: float) -> None:
        job = self.enqueue(f"echo run >> log; {WAIT}")
        pool = self.pool()
        self.wrote("log")
        everyone = [pool.pid, *(facts["pid"] for facts in self.workers().values())]
        for pid in everyone:
            os.kill(pid, signal.SIGSTOP)
        self.pool()  # it would take a job that looks dead
        self.working(2)
        time.sleep(duration)  # the fault itself
        for pid in everyone:
            os.kill(pid, signal.SIGCONT)
        self.write("go")
        self.assertEqual(self.becomes(job, "completed").attempts, 1)
        self.assertEqual((self.read("log"), len(self.attempts(job))), ("run\n", 1))

    def test_a_suspended_machine_does_not_look_dead(self) -> None:
        self.suspend(0.3)  # more than a look of the other pool

    @SLOW
    def test_a_machine_suspended_for_a_minute_does_not_look_dead(self) -> None:
        self.suspend(60.0)

    def stranger(self) -> subprocess.Popen[bytes]:
        stranger = subprocess.Popen(["sleep", "300"], start_new_session=True, cwd=self.dir)
        self.processes.append(stranger)
        return stranger

    def test_what_the_dead_left_in_the_run_directory_goes_with_the_next_start(self) -> None:
        self.enqueue("true", delay=3600)
        self.enqueue("true")
        with Queue(self.path) as queue:
            held = queuectl.LockFile(queue.db.run_dir.file("worker-1"))
            self.addCleanup(held.close)
            queue.claim("worker-1")
        kept = ["2.1.out", "workers.log"]
        for name in (*kept, "1.7.out", "1.7.kept.eA==", "worker-9", "pool-9.stop", "pool-9.bell"):
            self.write(os.path.join("queuectl.db.run", name))
        pool = self.pool()
        self.says(pool, " worker on ")
        until(lambda: len(self.workers()) == 2)
        names = os.listdir(self.file("queuectl.db.run"))
        ours = [name for name in names if not re.match("(pool|worker)-.*[0-9a-f]{8}", name)]
        self.assertEqual(sorted(ours), sorted([*kept, "worker-1"]))

    def test_a_stranger_with_a_recorded_pid_lives(self) -> None:
        stranger, job = self.stranger(), self.enqueue("echo again > log")
        with Queue(self.path) as queue:
            run = queue.claim("worker-dead").key
        facts = {"pid": stranger.pid, "key": run, "job_pid": stranger.pid, "launched": 1e9}
        self.write("queuectl.db.run/worker-dead", json.dumps(facts))
        self.drain()
        self.assertEqual((self.job(job).state, self.job(job).attempts), ("completed", 2))
        self.assertIsNone(stranger.poll())

    def test_without_proc_a_pid_counts_only_with_its_start_time(self) -> None:
        stranger = self.stranger()
        self.enqueue("true")
        with Queue(self.path) as queue:
            job = queue.claim("worker-dead")
        now, run = time.time(), job.key
        cases = {  # key, pid, launched
            (run, stranger.pid, now): [stranger.pid],
            (run, stranger.pid, now - 3600): [],  # the stranger started later
            ("1.7.worker-dead", stranger.pid, now): [],
            (run, -1, now): [],
            (): [],
        }
        names = ("key", "job_pid", "launched")
        self.each(cases, lambda facts: queuectl.process_group(dict(zip(names, facts)), job))

    def test_a_clock_that_jumps_changes_nobodys_life(self) -> None:
        for day in (86400.0, -86400.0):
            with self.subTest(day=day):
                self.at(str(day))
                clock = [1.7e9]
                with Queue(self.path, clock=lambda now=clock: now[0]) as queue:
                    queue.enqueue("true", id="job")
                    pool = queuectl.Pool(queue, 1, (), lambda _: None)
                    held = queuectl.LockFile(queue.db.run_dir.file("worker-1"))
                    self.assertEqual(queue.claim("worker-1").run, 1)
                    clock[0] += day
                    pool.recover()
                    self.assertEqual(queue.get("job").state, "processing")  # its worker lives
                    self.assertIsNone(queue.claim("worker-2"))
                    held.close()
                    pool.recover()
                    self.assertEqual(queue.get("job").state, "pending")  # now it does not
                    self.assertEqual(queue.claim("worker-2").attempts, 2)  # and at once
                    clock[0] -= 2 * day
                    outcome = Outcome("ran", clock[0], clock[0], 0, None)
                    after, _ = queue.finish(queue.get("job"), outcome)
                    self.assertEqual(after.state, "completed")

    CLOCK = """
import os, time
now = time.time
def shifted():
    try:
        with open(os.environ["SHIFT"]) as file:
            return now() + float(file.read())
    except FileNotFoundError:
        return now()
time.time = shifted
"""

    def test_a_clock_set_by_a_day_during_a_job_neither_repeats_it_nor_delays_its_retry(
        self,
    ) -> None:
        os.mkdir(self.file("clock"))
        self.write(
            "clock/sitecustomize.py", self.CLOCK
        )  # every interpreter of the pool imports it when it starts
        pools = []
        for day in (86400, -86400):
            self.at(str(day))
            os.environ.update(PYTHONPATH=self.file("clock"), SHIFT=self.file(f"shift{day}"))
            self.configure(backoff_max="0.1")
            self.enqueue(f"echo run >> log{day}; {WAIT}", id="long")
            self.enqueue(f"touch began{day}; {WAIT}; [ $QUEUECTL_ATTEMPT = 2 ]", id="failing")
            pools.append(self.pool("--count", "3"))
            self.wrote(f"log{day}")
            self.started(f"began{day}")
            self.write("new", str(day))
            os.rename(self.file("new"), os.environ["SHIFT"])
        for pool in pools:
            self.looked(pool)
        self.write("go")
        for day in (86400, -86400):
            with self.subTest(day=day):
                self.at(str(day))
                self.assertEqual(self.becomes("long", "completed").attempts, 1)
                self.assertEqual(self.becomes("failing", "completed").attempts, 2)
                self.assertEqual(self.read(f"log{day}"), "run\n")
                (run,) = self.attempts("long")
                lasted = run.finished - run.started
                self.assertTrue(86400 < lasted < 86460 if day > 0 else lasted == 0, lasted)


class Fencing(Live):
    """Promise 2: what comes from a lost claim changes nothing."""

    GOOD = Outcome("ran", 1.0, 2.0, 0, None, 0, b"late")
    BAD = Outcome("ran", 1.0, 2.0, 1, "exit code 1", 0, b"late")
    CASES = (  # successor, what comes from the first one
        ("worker-2", GOOD),
        ("worker-2", BAD),
        ("worker-1", GOOD),  # told apart by the run alone
        ("worker-2", BAD._replace(fate="returned")),
    )

    def lost(self, queue: Queue, successor: str) -> Any:
        """Return a claim that was lost to a successor."""
        queue.enqueue("true")
        lost = queue.claim("worker-1")
        queuectl.Pool(queue, 1, (), lambda _: None).recover()  # worker-1 has no lock
        queue.claim(successor)
        return lost

    def test_a_result_that_comes_after_its_claim_was_lost_changes_nothing(self) -> None:
        for number, (successor, outcome) in enumerate(self.CASES):
            with self.subTest(number), Queue(self.file(f"{number}.db")) as queue:
                lost = self.lost(queue, successor)
                before = queue.get(lost.id), queue.attempts(lost), queue.counts()
                self.assertEqual(queue.finish(lost, outcome), (None, None))
                self.assertEqual((queue.get(lost.id), queue.attempts(lost), queue.counts()), before)
                self.assertEqual((before[0].run, before[0].attempts), (2, 2))
                self.assertEqual(queue.finish(queue.get(lost.id), outcome)[0].id, lost.id)

    def test_a_kept_failure_is_retried_when_its_backoff_is_over(self) -> None:
        self.enqueue("false", id="job")
        with Queue(self.path) as queue:
            job, error = queue.claim("worker-1"), "cannot start: \u00e9" * 50
            out = queuectl.Output(queue.db.run_dir.file("1.1.out"))
            os.write(out.fd, b"why")
            queuectl.keep(
                queue.db.run_dir,
                job,
                self.BAD._replace(error=error, finished=queue.clock(), output=b""),
                out,
            )
            pool = queuectl.Pool(queue, 1, (), lambda _: None)
            held = queuectl.LockFile(queue.db.run_dir.file("worker-1"))
            pool.look()
            held.close()
            pool.look()
            after, (run,) = queue.get("job"), queue.attempts(job)
            self.assertEqual((after.state, run.exit_code, run.output), ("pending", 1, b"why"))
            self.assertEqual(run.error, ascii(error)[1:51])
            self.assertEqual(pool.next_time, after.run_after)  # though the change is its own
            self.assertEqual(queue.db.run_dir.files("1."), [])

    def test_a_late_result_does_not_keep_its_worker_from_the_next_job(self) -> None:
        with Queue(self.path) as queue:
            lost = self.lost(queue, "worker-2")
            job_id = queue.enqueue("true")
            after, following = queue.finish(lost, self.GOOD, ())
            self.assertIsNone(after)
            self.assertEqual((following.id, following.locked_by), (job_id, "worker-1"))


# --- stopping -------------------------------------------------------------------------------------

SIGNALS = queuectl.STOP_SIGNALS


class Stop(Live):
    """Promise 6: stopping is graceful, from wherever it is asked for."""

    def test_the_first_signal_lets_running_jobs_finish(self) -> None:
        pools = {}
        for number in SIGNALS:
            self.at(number.name)
            self.enqueue(f"touch {number.name}.started; {WAIT}; sleep 0.2; echo done", id="running")
            self.enqueue("true", id="waiting")
            pools[number] = self.pool()
        for number, pool in pools.items():
            self.started(f"{number.name}.started")
            pool.send_signal(number)
            self.says(pool, f"{number.name}: no new jobs")
        self.write("go")
        for number, pool in pools.items():
            with self.subTest(number.name):
                self.ends(pool, 0)
                self.at(number.name)
                self.assertEqual(self.job("running").state, "completed")
                self.assertEqual(self.attempts("running")[0].output, b"done\n")
                waiting = self.job("waiting")
                self.assertEqual((waiting.state, waiting.run), ("pending", 0))

    def test_the_second_signal_ends_the_jobs_and_gives_the_attempts_back(self) -> None:
        """Promise 3: an attempt that an operator ended does not count."""
        pools = {}
        for number in SIGNALS:
            self.at(number.name)
            self.enqueue(f"echo $$ > {number.name}.pid; sleep 300 & sleep 300", id="job")
            pools[number] = self.pool()
        for number, pool in pools.items():
            self.wrote(f"{number.name}.pid")
            pool.send_signal(number)
        for number, pool in pools.items():
            self.says(
                pool, "no new jobs; finishing the running ones; once more, a second later, ends"
            )
            pool.send_signal(number)  # the same press of a key, or a terminal that sends it twice
        time.sleep(1.05)  # what the promise is about
        for number, pool in pools.items():
            with self.subTest(number.name):
                self.assertIsNone(pool.poll())
                self.assertTrue(alive(int(self.read(f"{number.name}.pid"))))
            pool.send_signal(number)
        for number, pool in pools.items():
            with self.subTest(number.name):
                self.ends(pool, 128 + number)
                self.at(number.name)
                self.assertFalse(alive(int(self.read(f"{number.name}.pid"))))
                job = self.job("job")
                self.assertEqual((job.state, job.attempts, job.run), ("pending", 0, 1))
        until(lambda: not self.left())

    @unittest.skipUnless(os.path.exists("/proc/self"), "looks for the fork server in /proc")
    def test_ctrl_c_while_the_workers_are_being_started_is_heard_like_any_other(self) -> None:
        pool = self.pool(start_new_session=True)
        self.says(pool, " worker on ")
        children = f"/proc/{pool.pid}/task/{pool.pid}/children"
        until(lambda: len(self.read(children).split()) == 2)  # the fork server loads what it needs
        os.killpg(pool.pid, signal.SIGINT)
        self.says(pool, "SIGINT: no new jobs")
        self.ends(pool, 0)

    EARLY = """if True:
        import multiprocessing, os, sys, queuectl
        ours, theirs = multiprocessing.Pipe()
        ours.send("stop")
        queuectl.run_worker(dict(os.environ), sys.argv[1], "worker-a-1", 1, (), theirs)
    """

    def test_a_worker_that_is_told_to_stop_before_it_begins_claims_nothing(self) -> None:
        self.enqueue("true", id="x")
        self.assertEqual(self.script(self.EARLY, self.path).returncode, 0)
        self.assertEqual(self.job("x").state, "pending")

    def test_a_pool_that_stops_ends_what_its_dead_worker_left_first(self) -> None:
        self.configure(kill_grace="0.3")
        self.enqueue("trap '' TERM; echo $$ > pid; while :; do sleep 0.02; done", id="x")
        pool = self.pool()
        self.wrote("pid")
        pool.terminate()
        self.says(pool, "SIGTERM: no new jobs")
        self.kill_workers()
        self.ends(pool, 0)
        self.assertEqual((alive(int(self.read("pid"))), self.job("x").state), (False, "pending"))

    def orphaned(self) -> None:
        """Have a worker run a job, and kill its pool."""
        self.enqueue(f"touch started; {WAIT}", id="x")
        pool = self.pool()
        self.started("started")
        pool.kill()
        pool.wait()

    def test_a_worker_without_its_pool_is_waited_for(self) -> None:
        self.orphaned()
        self.assertEqual(self.told("worker", "stop", "--timeout", "0.1")[0], 124)
        self.write("go")
        self.assertEqual(self.told("worker", "stop")[:2], (0, ""))  # it may be gone already
        self.assertEqual(self.job("x").state, "completed")

    def test_a_worker_without_its_pool_can_be_told_to_cancel_or_to_end_its_job(self) -> None:
        for others in (0, 1):
            with self.subTest(others):
                self.orphaned()
                if others:
                    self.pool()
                    self.working(2)
                self.assertEqual(self.told("cancel", "x"), (0, "x\n", ""))
                self.assertEqual(self.job("x").state, "cancelled")
                self.told("worker", "stop")
                self.told("dlq", "purge", "x")
                os.unlink(self.file("started"))
        self.orphaned()
        self.assertEqual(self.told("worker", "stop", "--now"), (0, "", ""))
        self.assertEqual((self.job("x").state, self.job("x").attempts), ("pending", 0))

    def test_worker_stop_waits_until_the_workers_are_gone(self) -> None:
        job = self.enqueue(f"touch started; {WAIT}; sleep 0.3")
        later = self.enqueue("true")
        pool = self.pool()
        self.started("started")
        began = time.monotonic()
        self.assertIn("still running", self.refused("worker", "stop", "--timeout", "0.2", code=124))
        self.assertGreaterEqual(time.monotonic() - began, 0.2)
        self.says(pool, "worker stop: no new jobs")
        self.write("go")
        self.out("worker", "stop")
        self.assertEqual((self.workers(), self.job(job).state), ({}, "completed"))
        self.ends(pool, 0)
        self.assertEqual(self.job(later).run, 0)
        self.assertIn("no workers", self.run_cli("worker", "stop").stderr)

    def test_worker_stop_now_ends_the_jobs(self) -> None:
        job = self.enqueue("echo $$ > pid; sleep 300 & sleep 300")
        pools = [self.pool(), self.pool()]  # all of them
        self.wrote("pid")
        self.working(2)
        self.run_cli("worker", "stop", "--now")
        after = self.job(job)
        self.assertEqual((after.state, after.attempts, self.workers()), ("pending", 0, {}))
        for pool in pools:
            self.ends(pool, 0)
        until(lambda: not self.left(), 1.0)

    def locked(self) -> sqlite3.Connection:
        """Hold the write lock, as another program may."""
        db = sqlite3.connect(self.path, isolation_level=None)
        self.addCleanup(db.close)
        db.execute("BEGIN IMMEDIATE")
        return db

    def test_another_programs_lock_does_not_hold_up_the_stop_of_idle_workers(self) -> None:
        """Promise 4: no wait for a lock delays a stop by more than a second."""
        self.enqueue("echo > log")
        pool = self.pool("--count", "2")
        self.wrote("log")
        self.working(2)
        second = self.second()
        self.locked()
        pool.terminate()
        self.assertLess(self.ends(pool, 0), second)

    def test_another_programs_lock_does_not_hold_up_the_end_of_running_jobs(self) -> None:
        job = self.enqueue("echo run >> log; [ $(wc -l < log) = 2 ] || sleep 300")
        pool = self.pool()
        self.wrote("log")
        second, db, began = self.second(), self.locked(), time.monotonic()
        self.run_cli("worker", "stop", "--now")
        self.assertLess(time.monotonic() - began, second)
        self.ends(pool, 0)
        self.assertEqual(self.left(), [])
        db.execute("ROLLBACK")
        self.drain()
        self.assertEqual((self.job(job).attempts, self.job(job).run), (1, 2))  # one was given back

    @SLOW
    def test_another_programs_lock_does_not_hold_up_a_pool_that_has_a_job_to_recover(self) -> None:
        self.enqueue("echo $$ > pid; exec sleep 300")
        pool = self.pool()
        self.wrote("pid")
        second, _ = self.second(), self.locked()
        self.kill_workers()
        until(lambda: not alive(int(self.read("pid"))))  # now it may go back
        pool.terminate()
        self.assertLess(self.ends(pool, 0), second)

    def test_another_programs_lock_does_not_hold_up_a_pool_with_many_jobs_to_recover(self) -> None:
        with Queue(self.path) as queue:
            for number in range(16):
                queue.enqueue("true")
                queue.claim(f"worker-dead-{number}")
        second, _ = self.second(), self.locked()
        pool = self.pool()
        self.working(1)
        began = time.monotonic()
        self.out("worker", "stop")
        self.assertLess(time.monotonic() - began, second)
        self.ends(pool, 0)

    def test_a_result_that_cannot_be_stored_is_kept_over_a_stop(self) -> None:
        left = "sleep 300 & echo $! > left;"
        jobs = {
            self.enqueue(f"{left} echo good >> log; {WAIT}; echo a result; echo $$ >> ended"): (
                ("completed", 0, 1, None),
                [(2, b"result\n")],
            ),
            self.enqueue(f"echo bad >> log; {WAIT}; echo why; echo $$ >> ended; exit 3"): (
                ("dead", 3, 1, "exit code 3"),
                [(0, b"why\n")],
            ),
        }
        self.configure(max_retries="1", output_limit="7")
        pool = self.pool("--count", "2")
        until(lambda: len(self.lines("log")) == 2)
        second, db = self.second(), self.locked()
        self.write("go")
        until(lambda: len(self.lines("ended")) == 2)
        until(lambda: not any(map(alive, map(int, self.lines("ended")))))
        pool.terminate()
        self.assertLess(self.ends(pool, 0), second)
        self.assertEqual(self.workers(), {})
        db.execute("ROLLBACK")
        self.assertEqual(set(self.states().values()), {"processing"})
        self.drain(code=1)
        self.assertTrue(alive(int(self.read("left"))), "what a completed job left was ended")
        self.assertEqual(sorted(self.lines("log")), ["bad", "good"])  # neither ran again
        for job_id, (ended, outputs) in jobs.items():
            with self.subTest(ended):
                job, runs = self.job(job_id), self.attempts(job_id)
                found = (job.state, job.exit_code, job.attempts, job.last_error)
                self.assertEqual(found, ended)
                self.assertEqual([(run.cut, run.output) for run in runs], outputs)
        self.assertEqual(queuectl.RunDirectory(self.path).files(), [])

    def test_under_nohup_a_hang_up_changes_nothing(self) -> None:
        self.enqueue("echo > first")
        hup = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
        pool = self.pool(preexec_fn=hup, start_new_session=True)
        self.wrote("first")
        os.killpg(pool.pid, signal.SIGHUP)
        self.becomes(self.enqueue("true"), "completed")
        self.assertIsNone(pool.poll())
        self.assertEqual(len(self.workers()), 1)

    def test_a_terminal_stops_its_pool(self) -> None:
        control = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # noqa: E731
        press = lambda terminal: os.write(terminal, b"\x03")  # noqa: E731
        for name, act in (("Ctrl-C", press), ("hang-up", os.close)):
            with self.subTest(name):
                self.at(name)
                self.enqueue(f"touch {name}.started; until [ -e {name}.go ]; do sleep 0.02; done")
                terminal, slave = pty.openpty()
                own = {"stdin": slave, "start_new_session": True, "preexec_fn": control}
                pool = self.pool("--count", "2", **own)
                os.close(slave)
                self.started(f"{name}.started")
                self.working(2)
                act(terminal)
                self.says(pool, "no new jobs")
                self.working(1)  # the idle one left, the busy one not
                self.write(f"{name}.go")
                self.ends(pool, 0)
                self.assertEqual((self.job("1").state, self.job("1").attempts), ("completed", 1))
                if name == "Ctrl-C":
                    os.close(terminal)


# --- what a job is given --------------------------------------------------------------------------


class WhatAJobIsGiven(Live):
    STARTS = {
        "plain": (),
        "blocking": (),
        "background": ("sh", "-c", '"$@" & wait $!', "sh"),
        "nohup": ("nohup",),
        "closed": ("sh", "-c", '"$@" <&- >&- 2>&-', "sh"),
        "ignoring": ("sh", "-c", "trap '' INT TERM QUIT PIPE; \"$@\"", "sh"),
    }
    FDS = "readlink /proc/$$/fd/*; :"  # without the one that the glob itself needed

    def fds(self) -> str:
        """Return what the first job should print of its descriptors."""
        return "/dev/null\n" + f"{self.path}.run/1.1.out\n" * 3

    @unittest.skipUnless(queuectl.PROC, "there is no /proc")
    def test_no_file_of_the_queue_becomes_a_standard_stream_that_was_closed(self) -> None:
        self.pool(prefix=self.STARTS["closed"])
        self.working(1)
        (pool,) = queuectl.RunDirectory(self.path).living("pool").values()
        streams = [os.readlink(f"/proc/{pool['pid']}/fd/{fd}") for fd in range(3)]
        self.assertEqual(streams, ["/dev/null"] * 3)

    def test_a_job_has_its_signals_and_streams_however_the_pool_was_started(self) -> None:
        some = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
        block = lambda: signal.pthread_sigmask(signal.SIG_BLOCK, some)  # noqa: E731
        starts = {}
        for name, prefix in self.STARTS.items():
            self.at(name)
            self.enqueue(self.FDS)
            self.enqueue("exec grep -E '^Sig(Ign|Blk):' /proc/self/status")  # a fork unblocks
            more = {"stdout": subprocess.DEVNULL, "prefix": prefix}
            more["preexec_fn"] = block if name == "blocking" else None
            starts[name] = self.pool("--drain", **more)
        for name, start in starts.items():
            with self.subTest(name):
                self.assertEqual(start.wait(20), 0)
                self.at(name)
                self.assertEqual(self.attempts("1")[0].output.decode(), self.fds())
                signals = self.attempts("2")[0].output.decode().splitlines()
                found = dict(line.split(":\t") for line in signals)
                self.assertEqual(int(found["SigBlk"], 16), 0)
                ignored = int(found["SigIgn"], 16)
                for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE, signal.SIGTERM):
                    self.assertFalse(ignored >> (number - 1) & 1, number.name)

    def test_a_job_inherits_nothing_but_its_output(self) -> None:
        job = self.enqueue(self.FDS)
        ends = os.pipe()
        for end in ends:
            os.set_inheritable(end, True)
            self.addCleanup(os.close, end)
        self.drain("--count", "3", pass_fds=ends)
        self.assertEqual(self.attempts(job)[0].output.decode(), self.fds())


# --- the process tree -----------------------------------------------------------------------------


class ProcessTree(Live):
    """Promise 4: a timeout ends the whole tree, and what is left behind keeps nobody waiting."""

    def test_a_timeout_ends_every_process(self) -> None:
        self.configure(kill_grace="0.2", max_retries="1")
        jobs = {name: self.enqueue(job, timeout=0.4) for name, job in self.JOBS.items()}
        self.drain("--count", str(len(jobs)), code=1)
        for name, job in jobs.items():
            with self.subTest(name):
                after, (run,) = self.job(job), self.attempts(job)
                self.assertEqual((after.state, after.last_error), ("dead", "timed out after 0.4 s"))
                self.assertGreaterEqual(run.finished - run.started, 0.4)
                self.assertLess(run.finished - run.started, 2.4)
        until(lambda: not self.left(), 1.0)

    JOBS = {
        "children": "sleep 300 & sleep 300",
        "detached": "setsid -f sleep 300; sleep 300",
        "deaf": "trap '' TERM; while :; do sleep 0.05; done",
        "stopped": "kill -STOP $$; sleep 300",
        "clean": "env -i sleep 300 & exec env -i sleep 300",
        "closed": "exec 0<&- 1>&- 2>&-; sleep 300",
    }

    def test_term_comes_before_kill(self) -> None:
        self.configure(max_retries="1")
        trap = "trap 'echo polite; exit 0' TERM; "
        self.enqueue(trap + "sleep 300 & wait", timeout=0.5, id="running")
        self.enqueue(trap + "kill -STOP $$; sleep 300", timeout=0.5, id="stopped")
        self.drain("--count", "2", code=1)
        for job in ("running", "stopped"):
            with self.subTest(job):
                self.assertEqual(self.attempts(job)[0].output, b"polite\n")
                self.assertEqual(self.job(job).last_error, "timed out after 0.5 s")

    def test_each_way_to_fail_says_so(self) -> None:
        self.configure(max_retries="1")
        self.write("text")
        cases = {
            "exit 3": (3, "exit code 3"),
            "./text": (126, "exit code 126 (not executable)"),
            "./nowhere": (127, "exit code 127 (command not found)"),
            "exit 137": (137, "exit code 137 (128 + SIGKILL)"),
            "kill -9 $$": (-9, "killed by SIGKILL"),
            "kill $$": (-15, "killed by SIGTERM"),
            "kill -INT $$": (-2, "killed by SIGINT"),
        }
        for command in cases:
            self.enqueue(command)
        self.drain("--count", "2", code=1)
        with Queue(self.path) as queue:
            for job in queue.jobs():
                with self.subTest(job.command):
                    (run,) = queue.attempts(job)
                    self.assertEqual(
                        (job.state, run.exit_code, run.error), ("dead", *cases[job.command])
                    )
                    self.assertEqual((job.exit_code, job.last_error), cases[job.command])

    def test_a_background_child_does_not_hold_up_its_job(self) -> None:
        job = self.enqueue("echo x; sleep 30 & exit 0")
        self.drain()
        (run,) = self.attempts(job)
        self.assertEqual((self.job(job).state, run.output), ("completed", b"x\n"))
        self.assertLess(run.finished - run.started, 1.0)

    def test_what_a_failed_attempt_left_is_gone_before_the_next(self) -> None:
        """Promise 2: every process of the old attempt is gone."""
        self.configure(backoff_max="0")
        leave = "setsid -f sleep 300; sleep 300 & exit 1"
        job = self.enqueue(ALONE % (("job",) * 3) + leave, max_retries=3)
        self.drain("--count", "2", code=1)
        log = self.lines("job.log")
        self.assertEqual((len(log), "twice" in log, self.job(job).attempts), (3, False, 3))
        until(lambda: not self.left(), 1.0)


# --- output ---------------------------------------------------------------------------------------


class Output(Live):
    def peak(self, pid: int) -> int:
        """Return the most memory that a process has had, in bytes."""
        with open(f"/proc/{pid}/status") as file:
            return int(re.findall(r"VmHWM:\s+(\d+) kB", file.read())[0]) * 1024

    def test_a_large_output_costs_neither_memory_nor_disk(self) -> None:
        size = 300_000_000
        job = self.enqueue(f"{WAIT}; head -c {size} /dev/zero; echo end; touch written; sleep 0.3")
        self.pool()
        self.working(1)
        self.becomes(job, "processing")
        ((_, worker),) = self.workers().items()
        out, most, before = f"{self.path}.run/{job}.1.out", 0, self.peak(worker["pid"])
        self.write("go")

        def written() -> bool:
            nonlocal most
            with contextlib.suppress(FileNotFoundError):
                most = max(most, os.stat(out).st_blocks * 512)
            return os.path.exists(self.file("written"))

        until(written, 30)
        self.becomes(job, "completed")
        (run,) = self.attempts(job)
        self.assertEqual(run.output, b"\0" * (65536 - 4) + b"end\n")
        self.assertEqual(run.cut, size + 4 - 65536)
        self.assertLess(most, 200_000_000)
        self.assertLess(self.peak(worker["pid"]) - before, 10_000_000)
        self.assertIn(f"{run.cut} bytes", self.run_cli("logs", job).stderr)

    def test_output_is_looked_at_often_however_long_it_was_quiet(self) -> None:
        now, looks = [0.0], [0.0]
        worker = mock.Mock(heard=set())
        worker.queue.settings = {"timeout": 0, "output_limit": 0}
        worker.wait = lambda until: now.append(until + 0.001)
        out = mock.Mock(trim=lambda _: looks.append(now[-1]))
        child = mock.Mock(poll=lambda: 0 if now[-1] > 60 else None)
        with mock.patch("time.monotonic", lambda: now[-1]):
            queuectl.Worker.watch(worker, a_job(), child, out)
        self.assertLess(max(after - before for before, after in zip(looks, looks[1:])), 0.15)
        self.assertLess(len(looks), 700)  # and not all the time

    RAW = b"\xff\xfe\0\x1b[31mred\x1b[0m\r\n\xe2\x80\xae\x07\xc3\xa9\xe2\x82"

    def test_output_keeps_every_byte(self) -> None:
        text = "".join(f"\\{byte:03o}" for byte in self.RAW)
        job = self.enqueue(f"printf '{text}'")
        self.drain()
        self.assertEqual(self.start("logs", job, text=False).communicate()[0], self.RAW)
        self.assertEqual(self.attempts(job)[0].output, self.RAW)

    def test_nothing_that_a_job_supplied_reaches_a_terminal_raw(self) -> None:
        self.configure(max_retries="1")
        text = "".join(f"\\{byte:03o}" for byte in self.RAW)
        job = self.enqueue(f"printf '{text}'; : '\x1b]0;title\x07\u202e\u2028'; false")
        nowhere = self.enqueue("true", cwd=self.file("no\x1b[2Jwhere"))
        told = self.drain(code=1)
        self.assertEqual([c for c in told if not c.isprintable() and c != "\n"], [])
        for words in ("list", "dlq list", f"show {job}", f"show {nowhere}", f"logs {job}"):
            with self.subTest(words):
                shown = Terminal(self, *words.split(), env={"NO_COLOR": "1"}).end()
                self.assertTrue(shown)
                self.assertEqual([c for c in shown if not c.isprintable() and c not in "\n\t"], [])
        self.assertTrue("red" in shown and shown.endswith("\\xe2\\x82"), shown)  # half a character


# --- the machine at fault -------------------------------------------------------------------------


class FullDisk(Live):
    """Promise 1: without room nothing is told that was not stored, and what ran is known."""

    FILL = "cat /dev/zero >>disk/ballast 2>>/dev/null; true"
    AT_ANY_ROOM = """if True:
        import contextlib, io, json, os, queuectl

        def enqueue(db):
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = queuectl.main(["--db", "disk/" + db, "enqueue", "true"])
            return code, len(out.getvalue().split()), err.getvalue().count("\\n")

        enqueue("old")
        for room in range(0, 140000, 4096):
            free = os.statvfs("disk")
            with open("disk/ballast", "wb") as ballast:
                ballast.write(bytes(free.f_bavail * free.f_bsize - room))
            full = [enqueue(db) for db in ("old", "new")]
            os.unlink("disk/ballast")
            again = [enqueue(db) for db in ("old", "new")]
            stored = [queuectl.Queue("disk/" + db).counts()["pending"] for db in ("old", "new")]
            print(json.dumps([room, full, again, stored]))
            os.system("rm -r disk/new*")
    """

    def small_disk(self) -> list[str]:
        """Make a disk of a megabyte; return what runs a program that sees it."""
        os.mkdir(self.file("disk"))
        return self.mounted("mount -t tmpfs -o size=1m,mode=755 tmpfs disk")

    @SLOW
    def test_a_job_is_stored_and_told_or_neither_however_little_room_there_is(self) -> None:
        rows = self.script(self.AT_ANY_ROOM, prefix=self.small_disk()).stdout
        stored, codes = 1, set()
        for row in map(json.loads, rows.splitlines()):
            room, full, again, (old, new) = row
            with self.subTest(room=room):
                for code, ids, lines in full:
                    codes.add(code)
                    self.assertIn((code, ids, lines), ((0, 1, 0), (4, 0, 1)))
                self.assertEqual(again, [[0, 1, 0]] * 2)
                stored += full[0][1] + 1
                self.assertEqual((old, new), (stored, full[1][1] + 1))
        self.assertEqual(codes, {0, 4})

    def test_a_job_that_fills_the_disk_has_its_result_stored_later_and_runs_once(self) -> None:
        inside = {"prefix": self.small_disk()}
        os.environ["QUEUECTL_DB"] = "disk/q.db"
        lines = [{"command": f"echo x >> first; {self.FILL}"}, {"command": "echo x >> second"}]
        self.out("enqueue", json.dumps(lines), **inside)
        pool = self.pool("--drain", **inside)
        self.says(pool, "cannot record how job 1 ended")
        status = self.facts("status", **inside)
        self.assertEqual((status["processing"], status["pending"]), (1, 1))
        self.assertEqual((self.read("first"), self.read("second")), ("x\n", ""))
        self.process(*inside["prefix"], "rm", "disk/ballast")
        self.ends(pool, 0)
        self.assertEqual((self.read("first"), self.read("second")), ("x\n", "x\n"))
        for job in ("1", "2"):
            shown = self.facts("show", job, **inside)
            self.assertEqual((shown["state"], len(shown["runs"])), ("completed", 1))

    def test_workers_can_be_stopped_on_a_full_disk(self) -> None:
        inside = {"prefix": self.small_disk()}
        os.environ["QUEUECTL_DB"] = "disk/q.db"
        self.out("enqueue", self.FILL, **inside)
        pool = self.pool(**inside)
        self.says(pool, "cannot record how job 1 ended")
        late = self.pool(**inside)
        until(lambda: self.out("worker", "list", **inside).count("\nworker-") == 2)
        self.out("worker", "stop", **inside)
        self.ends(pool, 0)
        self.assertNotIn("died", late.communicate(timeout=10)[0])

    def test_jobs_can_be_ended_on_a_full_disk(self) -> None:
        inside = {"prefix": self.small_disk()}
        os.environ["QUEUECTL_DB"] = "disk/q.db"
        self.out("enqueue", f"{self.FILL}; touch full; exec sleep 300", **inside)
        pool = self.pool(**inside)
        self.started("full")
        self.out("worker", "stop", "--now", **inside)
        self.ends(pool, 0)

    def test_a_pool_whose_worker_dies_on_a_full_disk_goes_on_when_there_is_room(self) -> None:
        inside = {"prefix": self.small_disk()}
        os.environ["QUEUECTL_DB"] = "disk/q.db"
        job = (
            f"[ $QUEUECTL_ATTEMPT = 2 ] || {{ {self.FILL}; echo $PPID > worker; exec sleep 300; }}"
        )
        self.out("enqueue", job, **inside)
        pool = self.pool("--drain", **inside)
        self.wrote("worker")
        os.kill(int(self.read("worker")), 9)
        self.says(pool, "trying again")
        self.process(*inside["prefix"], "rm", "disk/ballast")
        self.ends(pool, 0)
        shown = self.facts("show", "1", **inside)
        self.assertEqual((shown["state"], shown["attempts"]), ("completed", 2))

    def test_a_limit_on_the_size_of_files_is_like_a_full_disk(self) -> None:
        small = limited(resource.RLIMIT_FSIZE, 20_000)
        for job in ("1", "2"):  # the queue itself cannot be made, then a job cannot be added
            self.refused("enqueue", "true", code=4, preexec_fn=small)
            self.assertEqual(self.out("enqueue", "true"), job + "\n")

    def test_an_output_that_cannot_be_written_is_said(self) -> None:
        for words, unbuffered in (("enqueue true", ""), ("list", ""), ("list", "1")):
            os.environ["PYTHONUNBUFFERED"] = unbuffered
            with self.subTest(words, unbuffered=unbuffered), open("/dev/full", "w") as full:
                done = self.start(*words.split(), stdout=full, stderr=subprocess.PIPE)
                said = done.communicate()[1]
                self.assertEqual(
                    (done.returncode, said), (4, "queuectl: No space left on device\n")
                )


class ReadOnly(Live):
    """Where nothing may be written, that is said."""

    WRITES = ("enqueue true", "config set timeout 3", "worker start --quiet")

    def refuse(self, *commands: str, prefix: list[str]) -> None:
        for words in commands:
            with self.subTest(words):
                self.refused(*words.split(), code=4, prefix=prefix)

    def test_on_a_read_only_disk_a_queue_in_use_can_be_read_and_not_written(self) -> None:
        self.enqueue("true")
        inside = self.mounted("mount --bind . . && mount -o remount,ro,bind . .")
        with Queue(self.path) as writer:
            writer.counts()  # or there is no -shm, which SQLite needs and may not make
            self.refuse(*self.WRITES, prefix=inside)
            self.assertIn("pending           1", self.out("status", prefix=inside))
        self.refuse("status", prefix=inside)
        self.assertEqual(self.states(), {"1": "pending"})

    def test_what_may_not_be_written_is_refused_and_stays_as_it_is(self) -> None:
        user = self.obeying_modes()
        os.chmod(self.dir, 0o500)
        self.refuse(*self.WRITES, prefix=user)
        self.assertEqual(os.listdir(self.dir), [])
        os.chmod(self.dir, 0o700)
        self.enqueue("true")
        for target, mode in ((self.dir, 0o500), (self.path, 0o400)):
            os.chmod(target, mode)
            self.refuse(*self.WRITES[:2], prefix=user)
            os.chmod(target, 0o700)
        self.assertEqual(self.states(), {"1": "pending"})

    def obeying_modes(self) -> list[str]:
        """Return what runs a program to which the modes of files apply, also as root."""
        user = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"] if ROOT else []
        self.needs(*user, "true")
        self.addCleanup(os.chmod, self.dir, 0o700)
        return user

    def test_a_pool_that_may_not_look_for_a_while_says_so_and_goes_on(self) -> None:
        self.enqueue("true")
        pool = self.pool(prefix=self.obeying_modes())
        self.becomes("1", "completed")
        os.chmod(self.dir, 0)
        self.says(pool, "queuectl.db: Permission denied; trying again")
        os.chmod(self.dir, 0o700)
        self.becomes(self.enqueue("true"), "completed")

    def test_a_job_that_cannot_be_recovered_holds_up_no_other(self) -> None:
        for _ in range(2):
            self.enqueue("[ $QUEUECTL_ATTEMPT = 2 ] || { echo >> log; exec sleep 300; }")
        pool, user = self.pool("--count", "2"), self.obeying_modes()
        until(lambda: len(self.lines("log")) == 2)
        pool.kill()
        self.kill_workers()
        until(lambda: not self.workers())
        output = f"{self.path}.run/1.1.out"
        os.chmod(output, 0)
        pool = self.pool("--drain", prefix=user)
        self.becomes("2", "completed")
        os.chmod(output, 0o600)
        self.ends(pool, 0)
        self.assertEqual((self.job("1").state, self.job("1").attempts), ("completed", 2))


class Exhausted(Live):
    """Too few descriptors or processes: that is said, and nothing is lost."""

    def test_too_few_descriptors_are_a_fault(self) -> None:
        what, told, codes = resource.RLIMIT_NOFILE, [], set()
        before, taken = resource.getrlimit(what), [os.dup(2)]
        while taken[-1] < max(map(int, os.listdir("/proc/self/fd"))) - 1:  # no gaps
            taken.append(os.dup(2))
        for fd in taken:
            self.addCleanup(os.close, fd)
        for spare in range(2, 12):
            resource.setrlimit(what, (taken[-1] + spare, before[1]))
            try:
                code, out, said = self.told("enqueue", "true")
            finally:
                resource.setrlimit(what, before)
            with self.subTest(spare=spare):
                self.assertEqual((code, said.count("\n")), (0, 0) if out else (4, 1))
            told += out.split()
            codes.add(code)
        self.assertEqual((list(self.states()), codes), (told, {0, 4}))
        for count in (12, 14):  # Python itself needs up to 9
            with self.subTest(pool=count):
                few = limited(what, count)
                self.refused("worker", "start", "--count=6", "--quiet", code=4, preexec_fn=few)
        self.assertEqual({self.job(job).run for job in told}, {0})

    def test_a_module_that_cannot_be_loaded_is_a_fault(self) -> None:
        with mock.patch.dict(sys.modules, fcntl=None), mock.patch("queuectl.discard_output"):
            self.assertIn("fcntl", self.refused("enqueue", "true", code=4))

    FORKS = "?clone,?clone3,?fork,?vfork"
    NO_FORK = ("-e", f"trace={FORKS}", "-e", f"inject={FORKS}:error=EAGAIN")

    def traced(self, pid: int, *options: str) -> subprocess.Popen[str]:
        """Let calls of a process fail, until what is returned has ended."""
        self.needs("strace", "-o", "/dev/null", "true")
        strace = ["strace", "-o", "trace", "-p", str(pid), *options]
        tracer = subprocess.Popen(strace, stderr=subprocess.PIPE, text=True, cwd=self.dir)
        self.addCleanup(tracer.communicate)
        self.addCleanup(tracer.kill)
        line = tracer.stderr.readline()
        if "attached" not in line:
            raise unittest.SkipTest(f"strace may not attach here: {line.strip()}")
        return tracer

    def starve(self, pid: int) -> Callable[[], Any]:
        """Let a process open no more files; return what undoes it."""
        what, taken = resource.RLIMIT_NOFILE, map(int, os.listdir(f"/proc/{pid}/fd"))
        before = resource.prlimit(pid, what)
        resource.prlimit(pid, what, (min({*range(1000)}.difference(taken)), before[1]))
        return partial(resource.prlimit, pid, what, before)

    def cannot_start(self, reason: str, feed: Callable[[], Any]) -> str:
        """Let a job want to start before its worker is fed; return what should be said."""
        job = self.enqueue("echo $QUEUECTL_JOB_ID >> log")
        until(lambda: self.job(job).run > 2)
        self.assertNotIn(job, self.lines("log"))
        feed()
        self.assertEqual(self.becomes(job, "completed").attempts, 1)
        return f"job {job} cannot start: {reason}[^|]*; trying again[|]job {job} completed[|]"

    @SLOW
    def test_a_worker_that_cannot_start_jobs_gives_them_back_and_says_so_once(self) -> None:
        self.configure(max_retries="1")
        pool = self.pool()
        self.becomes(self.enqueue("true"), "completed")
        said = "job 1 completed[|]"
        (worker,) = (facts["pid"] for facts in self.workers().values())
        said += self.cannot_start("Too many open files", self.starve(worker))
        with self.subTest("no processes"):
            tracer = self.traced(worker, *self.NO_FORK)
            said += self.cannot_start("Resource temporarily unavailable", tracer.terminate)
        pool.terminate()
        output = pool.communicate(timeout=10)[0].replace("\n", "|")
        self.assertRegex(re.sub(r"\d\d:\d\d:\d\d | in [\d.]+ s", "", output), said)

    def test_a_job_whose_output_file_cannot_be_made_is_not_to_blame(self) -> None:
        pool = self.pool()
        self.working(1)
        for run in range(1, 100):
            os.mkdir(f"{self.path}.run/1.{run}.out")
        self.enqueue("true", max_retries=1)
        self.says(pool, "job 1 cannot start: ")
        until(lambda: self.job("1").run > 1)
        self.out("cancel", "1")
        self.says(pool, "job 1 is cancelled: ")
        self.assertEqual((self.job("1").state, self.job("1").attempts), ("cancelled", 1))

    @SLOW
    def test_a_disk_that_does_not_sync_is_said_and_tried_again(self) -> None:
        pool = self.pool()
        self.becomes(self.enqueue("true"), "completed")
        tracer = self.traced(pool.pid, "-e", "inject=fdatasync,fsync:error=EIO")
        self.becomes(self.enqueue("true"), "completed")
        self.says(pool, "Input/output error; trying again")
        until(lambda: self.read("trace").count("sync(") > 4)  # though nothing is new
        tracer.terminate()
        self.becomes(self.enqueue("true"), "completed")
        pool.terminate()
        self.ends(pool, 0)

    @SLOW
    def test_a_pool_that_cannot_start_workers_says_so_and_leaves(self) -> None:
        self.needs("strace", "-o", "/dev/null", "true")
        self.enqueue("true")
        strace = ["strace", "-f", "-o", "/dev/null", *self.NO_FORK]
        line = self.refused("worker", "start", "--quiet", "--count", "6", code=4, prefix=strace)
        self.assertIn("temporarily unavailable", line)
        self.assertEqual(self.job("1").attempts, 0)

    def test_a_drain_does_not_wait_for_a_worker_that_cannot_be_started(self) -> None:
        self.enqueue(f"echo $PPID > busy; {WAIT}")
        pool = self.pool("--count", "2", "--drain")
        self.working(2)
        self.wrote("busy")
        self.starve(pool.pid)
        pids = {facts["pid"] for facts in self.workers().values()}
        os.kill((pids - {int(self.read("busy"))}).pop(), 9)
        self.says(pool, "cannot be started")
        self.write("go")
        self.ends(pool, 0)

    @SLOW
    def test_a_pool_without_descriptors_says_so_and_goes_on_when_there_are_some(self) -> None:
        pool = self.pool("--count", "2")
        self.working(2)
        feed = self.starve(pool.pid)
        os.kill(next(iter(self.workers().values()))["pid"], 9)
        self.says(pool, "cannot be started: Too many open files; trying again")
        feed()
        self.working(2)
        self.becomes(self.enqueue("true"), "completed")

    def test_a_stored_job_is_acknowledged_even_if_no_pool_can_be_rung(self) -> None:
        self.enqueue("true")
        shutil.rmtree(self.path + ".run")
        self.write("queuectl.db.run")
        self.assertEqual(self.out("enqueue", "true"), "2\n")


# --- databases that are not as they should be -----------------------------------------------------


def digest(path: str) -> tuple[str, int]:
    """Return what tells whether a file was written to."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest(), os.stat(path).st_mtime_ns


class Foreign(Live):
    """What is not a queue is refused by name, and stays as it is."""

    COMMANDS = "enqueue true|status|worker start --drain --quiet|worker stop|dlq retry --all"

    def refuses(self, reason: str) -> None:
        before = digest(self.path)
        for words in (*self.COMMANDS.split("|"), "config set timeout 3"):
            with self.subTest(words):
                self.assertIn(reason, self.refused(*words.split(), code=4))
        self.assertEqual(digest(self.path), before)

    def test_another_programs_database_is_left_alone_and_nothing_is_put_beside_it(self) -> None:
        for mode in ("delete", "wal"):
            with self.raw() as db:
                db.execute(f"PRAGMA journal_mode = {mode}")
                db.execute("CREATE TABLE IF NOT EXISTS jobs (id)")
            self.refuses("another program's database")
            self.assertEqual(os.listdir(self.dir), ["queuectl.db"])
            with self.raw() as db:
                self.assertEqual(db.execute("PRAGMA journal_mode").fetchone(), (mode,))

    def test_a_link_to_nothing_is_left_alone(self) -> None:
        os.symlink("nothing.db", self.path)
        for words in ("enqueue true", "worker start"):
            self.assertIn("is a link to nothing", self.refused(*words.split(), code=4))
        self.assertEqual(os.listdir(self.dir), ["queuectl.db"])

    def test_a_newer_schema_is_left_alone(self) -> None:
        self.enqueue("true")
        with self.raw() as db:
            db.execute("PRAGMA user_version = 99")
        self.refuses("newer queuectl (schema 99)")

    def test_what_is_no_database_is_left_alone(self) -> None:
        for content, reason in (
            (b"", "empty"),
            (b"notes\n", "not a database"),
            (b"notes\n" * 5000, "not a database"),
            (b"SQLite format 3\0" + b"\xff" * 4080, "not a database"),
        ):
            with self.subTest(content[:20]):
                with open(self.path, "wb") as file:
                    file.write(content)
                self.refuses(reason)
                self.assertEqual(os.listdir(self.dir), ["queuectl.db"])

    def test_what_is_no_file_is_refused_at_once(self) -> None:
        for make in (os.mkdir, os.mkfifo):
            path = self.file(f"made by {make.__name__}")
            make(path)
            for words in ("enqueue true", "status", "worker start --quiet"):
                with self.subTest(path, words=words):
                    line = self.refused("--db", path, *words.split(), code=4)
                    self.assertIn("is not a file", line)
        self.assertEqual(len(os.listdir(self.dir)), 2)

    def test_a_batch_with_bad_input_makes_no_queue(self) -> None:
        for lines in (b"{", b'{"command":"true"}\n{"command":7}\n', b"\xff"):
            self.refused("enqueue", "-", stdin=lines)
        self.assertEqual(os.listdir(self.dir), [])


class Broken(Live):
    """What is damaged is recovered or refused, and is never the bug of a traceback."""

    CRASH = """if True:
        import os, queuectl
        queue = queuectl.Queue("queuectl.db")
        for number in range(5):
            queue.enqueue("true")
        os.kill(os.getpid(), 9)
    """

    def test_a_torn_log_loses_nothing_but_what_was_torn(self) -> None:
        os.mkdir(self.file("crashed"))
        self.script(self.CRASH, cwd=self.file("crashed"))
        with open(self.file("crashed/queuectl.db-wal"), "rb") as file:
            log = file.read()
        for name, torn, jobs in (
            ("whole", log, "12345"),
            ("one byte", log[:-1], "1234"),
            ("a page", log[:-4096], "1234"),
            ("a frame but for one byte", log[:-4119], "1234"),
            ("a flipped bit", log[:-100] + bytes([log[-100] ^ 1]) + log[-99:], "1234"),
        ):
            with self.subTest(name):
                shutil.copytree(self.file("crashed"), self.file(name))
                self.at(name)
                with open(self.path + "-wal", "wb") as file:
                    file.write(torn)
                self.assertEqual(list(self.states()), list(jobs))
                self.assertEqual(self.enqueue("true"), str(len(jobs) + 1))
                self.is_sound()

    def noisy(self, *commands: str) -> Iterator[tuple[int, str]]:
        """For each page of a queue, and each command, put noise in the place of that page."""
        with Queue(self.path) as queue:
            queue.enqueue_many({"command": f"true {'x' * 300}"} for _ in range(60))
            for number in range(20):
                job = queue.claim("w")
                error = "exit code 1" if number % 2 else None
                queue.finish(job, Outcome("ran", 1.0, 2.0, 0, error, 0, b"o" * 300))
            queue.configure("timeout", "10")
        with open(self.path, "rb") as file:
            whole = file.read()
        for page, words in itertools.product(range(1, len(whole) // 4096), commands):
            for name in ("-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path + name)
            noise = hashlib.sha512(str(page).encode()).digest() * 64
            with open(self.path, "wb") as file:
                file.write(whole[: page * 4096] + noise + whole[(page + 1) * 4096 :])
            with self.subTest(words, page=page):
                yield page, words

    def test_a_page_of_noise_is_a_fault_and_never_a_new_queue(self) -> None:
        faults = 0
        commands = ("status", "list --json", "show 30", "enqueue true", "dlq retry --all")
        for _, words in self.noisy(*commands):
            code, out, said = self.told(*words.split())
            self.assertIn(code, (0, 1, 4))
            self.assertEqual(said.count("\n"), 1 if code else 0)
            faults += code == 4
            if words == "enqueue true" and code == 0:
                self.assertEqual(out, "61\n")
        self.assertGreater(faults, 20)

    def test_a_setting_that_makes_no_sense_is_a_fault(self) -> None:
        self.enqueue("true")
        with self.raw() as db:
            db.execute("INSERT INTO config VALUES ('timeout', 'abc')")
        for words in ("list", "worker start"):
            self.assertIn("setting timeout must be a dur", self.refused(*words.split(), code=4))

    def test_workers_leave_a_damaged_database(self) -> None:
        self.enqueue("true", id="job1")
        with self.raw() as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            find = "SELECT rootpage FROM sqlite_master WHERE name = 'jobs'"
            (page,) = db.execute(find).fetchone()
        with open(self.path, "r+b") as file:
            file.seek((page - 1) * 4096)
            file.write(b"\xa5" * 4096)
        output = self.drain("--count", "2", code=4)
        self.assertIn("malformed", output)
        self.assertNotIn("Traceback", output)
        self.assertIn("malformed", self.refused("show", "job1", code=4))

    @SLOW
    def test_workers_on_any_page_of_noise_end_by_themselves(self) -> None:
        for _ in self.noisy("worker start"):
            pool = self.pool("--drain", "--quiet")
            output = pool.communicate(timeout=60)[0]
            self.assertIn(pool.returncode, (0, 1, 4), output)
            self.assertNotIn("Traceback", output)


class Moved(Live):
    """A pool whose database is gone lets its job finish, leaves, and touches nothing else."""

    def setUp(self) -> None:
        super().setUp()
        self.enqueue(f"touch began; {WAIT}")
        self.running = self.pool("--quiet")
        self.started("began")

    def leaves(self) -> None:
        self.write("go")
        output = self.running.communicate(timeout=10)[0]
        said = f"queuectl: {self.path} was moved away or replaced\n"
        self.assertEqual((self.running.returncode, output), (4, said))
        until(lambda: not self.left())

    def test_it_leaves_when_the_database_was_moved_away(self) -> None:
        os.rename(self.path, self.file("moved.db"))
        self.assertIn("-wal", self.refused("enqueue", "true", code=4))  # which would be replayed
        self.leaves()
        self.assertFalse(os.path.exists(self.path))
        os.rename(self.file("moved.db"), self.path)
        self.drain()
        self.assertEqual((self.job("1").state, self.job("1").attempts), ("completed", 1))

    def test_it_leaves_when_the_run_directory_was_removed(self) -> None:
        shutil.rmtree(self.path + ".run")
        waiting = self.enqueue("true", max_retries=1)
        self.write("go")
        output = self.running.communicate(timeout=10)[0]
        self.assertRegex(output, r"queuectl.db.run/pool-\w+ was moved away or replaced\n\Z")
        self.assertEqual(self.running.returncode, 4)
        self.assertEqual((self.job("1").state, self.job("1").attempts), ("completed", 1))
        self.drain()
        self.assertEqual(self.job(waiting).state, "completed")

    def test_it_leaves_another_programs_database_in_that_place_alone(self) -> None:
        with self.raw(self.file("other.db")) as db:
            db.execute("CREATE TABLE t (x)")
        before = digest(self.file("other.db"))
        os.rename(self.file("other.db"), self.path)
        self.leaves()
        self.assertEqual(digest(self.path), before)

    def test_it_leaves_a_new_queue_in_that_place_alone(self) -> None:
        for end in ("", "-wal", "-shm"):
            os.rename(self.path + end, self.file("moved.db" + end))
        with Queue(self.path) as queue:  # its log has jobs while the old pool leaves
            told = [queue.enqueue("true") for _ in range(20)]
            before = digest(self.path + "-wal")
            self.leaves()
            self.assertEqual(digest(self.path + "-wal"), before)
            self.assertEqual(len(self.out("list", "--json").splitlines()), len(told))
        self.assertEqual(self.states(), dict.fromkeys(told, "pending"))
        self.is_sound(self.path)
        self.is_sound(self.file("moved.db"))


# --- what was acknowledged is kept ----------------------------------------------------------------


class Durable(Live):
    """Promise 1: what was told is on the disk, whatever is killed, and when."""

    SYNCS = "fsync,fdatasync"

    def traced(self, calls: str, *args: str, **more: Any) -> list[str]:
        """Run the program under strace; return its system calls with the paths of their files."""
        self.needs("strace", "-o", "/dev/null", "true")
        log = self.file("strace.log")
        strace = ["strace", "-f", "-y", "-ttt", "-s", "60", "-o", log, "-e", f"trace={calls}"]
        self.out(*args, prefix=strace, **more)
        return self.lines("strace.log")

    def order(self, calls: list[str], **patterns: str) -> list[str]:
        """Return the names of the patterns in the order in which calls match them first."""
        found = [name for call in calls for name, p in patterns.items() if re.search(p, call)]
        return list(dict.fromkeys(found))

    @SLOW
    def test_twelve_first_users_at_once_make_one_queue_with_all_their_jobs(self) -> None:
        users = [self.start("enqueue", "true") for _ in range(12)]
        told = [int(user.communicate(timeout=60)[0]) for user in users]
        self.assertEqual(sorted(told), list(range(1, 13)))
        self.assertEqual(len(self.states()), 12)
        self.is_sound()

    def test_a_job_is_synced_before_its_id_is_printed(self) -> None:
        with Queue(self.path) as holder:  # or the close would sync, whatever the commit did
            holder.enqueue("true")  # and a new log is synced anyway
            calls = self.traced(self.SYNCS + ",write", "enqueue", "true")
        order = self.order(calls, sync=r"sync\(\d+<.*db-wal>", id=r' write\(1<.*"2(\\n)?"')
        self.assertEqual(order, ["sync", "id"], calls)

    def test_a_new_queues_name_is_synced_before_the_first_id_is_printed(self) -> None:
        renames = ",write,?rename,?renameat,?renameat2"
        calls = self.traced(self.SYNCS + renames, "enqueue", "true")
        order = self.order(
            calls,
            content=r"sync\(\d+<.*new\.db>",
            name=r" rename.*new\.db.*queuectl\.db",
            directory=rf"fsync\(\d+<{re.escape(self.dir)}>",
            id=r' write\(1<.*"1(\\n)?"',
        )
        self.assertEqual(order, ["content", "name", "directory", "id"], calls)

    def test_a_batch_of_a_thousand_costs_a_few_syncs(self) -> None:
        lines = '{"command": "true"}\n' * 1000
        calls = self.traced(self.SYNCS, "enqueue", "-", stdin=lines)
        self.assertEqual(len(self.states()), 1000)
        self.assertLess(sum("sync(" in call for call in calls), 20)

    @SLOW
    def test_each_result_is_synced_before_the_next_claim_where_that_was_asked_for(self) -> None:
        for durability in ("normal", "full"):
            with self.subTest(durability):
                self.at(durability)
                self.configure(synchronous=durability)
                for _ in range(6):
                    self.enqueue("true")
                words = ("worker", "start", "--drain", "--quiet")
                calls = self.traced(f"{self.SYNCS},execve", *words)
                known = r'execve\("/bin/sh"|sync\(\d+<.*db-wal>'  # as they begin: some are split
                steps = ["execve" in call for call in calls if re.search(known, call)]
                together = sum(a and b for a, b in zip(steps, steps[1:]))  # no sync between two
                self.assertEqual(steps.count(True), 6)
                (self.assertEqual if durability == "full" else self.assertGreater)(together, 0)

    def test_the_pool_syncs_a_claim_and_a_result_within_a_tenth_of_a_second(self) -> None:
        self.needs("strace", "-o", "/dev/null", "true")
        self.enqueue(f"touch began; {WAIT}")
        calls = ["-e", "trace=pwrite64,write,fsync,fdatasync", "-o", self.file("strace.log")]
        self.pool(prefix=["strace", "-f", "-y", "-ttt", "-s", "0", *calls])
        self.started("began")
        before = 0

        def last(what: str) -> list[float]:
            calls = self.lines("strace.log")[before:]
            return [float(c.split()[1]) for c in calls if re.search(rf"{what}\(\d+<.*db-wal>", c)]

        until(lambda: last("sync")[-1:] > last("write(64)?")[-1:], 3)  # the claim
        before = len(self.lines("strace.log"))
        self.write("go")
        self.becomes("1", "completed")
        until(lambda: last("sync"), 3)
        self.assertLess(last("sync")[0] - last("write(64)?")[-1], 0.2)  # strace takes its time

    def killings(self) -> Iterator[tuple[str, list[str]]]:
        """Yield what kills a program at its n-th call of each kind that changes a file."""
        self.needs("strace", "-o", "/dev/null", "true")
        renames, unlinks = "?rename,?renameat,?renameat2", "?unlink,?unlinkat"
        for call in ("pwrite64", "write", "ftruncate", unlinks, renames, "fdatasync"):
            for when in range(1, 1000):
                log = self.file(f"{call}-{when}.log")
                self.at(f"{call}-{when}")
                kill = ["-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={when}"]
                with self.subTest(call, when=when):
                    yield log, ["strace", "-f", "-o", log, *kill]
                if "SIGKILL" not in self.read(log):
                    break

    @SLOW
    def test_enqueue_killed_at_any_call_keeps_what_it_said(self) -> None:
        for there in (False, True):
            for _, killed in self.killings():
                told = [self.enqueue("true")] if there else []
                told += self.run_cli("enqueue", "true", code=None, prefix=killed).stdout.split()
                told.append(self.enqueue("true"))
                self.assertLessEqual(set(told), set(self.states()))
                self.is_sound()
                shutil.rmtree(os.path.dirname(self.path))

    @SLOW
    def test_workers_killed_at_any_call_run_a_job_as_often_as_they_count(self) -> None:
        for log, killed in self.killings():
            effect = log + ".effect"
            self.enqueue(f"echo x >> {effect}", max_retries=5)
            pool = self.pool("--drain", "--quiet", prefix=killed)
            until(lambda p=pool, log=log: p.poll() is not None or "SIGKILL" in self.read(log), 30)
            until(lambda: not self.kill_ours())
            self.drain("--quiet")
            job = self.job("1")
            self.assertEqual(job.state, "completed")
            self.assertTrue(1 <= self.read(effect).count("x") <= job.attempts, job)
            self.is_sound()


# --- who may put work here ------------------------------------------------------------------------


class Owner(Live):
    """Promise 7: only the commands of the owner of the files run."""

    START = ("worker", "start", "--drain", "--quiet")

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(os.umask, os.umask(0o022))
        self.enqueue("echo x >> log")

    def mode(self, path: str) -> int:
        return stat.S_IMODE(os.lstat(path).st_mode)

    def distrusted(self, reason: str) -> None:
        """Workers refuse and run nothing, but would with --insecure."""
        line = self.refused(*self.START, code=4)
        self.assertIn(reason, line)
        self.assertIn("--insecure", line)
        self.assertEqual(self.read("log"), "")

    def trusted(self, *args: str) -> None:
        self.drain(*args)
        self.assertEqual(self.read("log"), "x\n")

    def test_a_network_file_system_is_warned_about(self) -> None:
        told: list[str] = []
        mounts = (
            "/dev/sda / ext4 rw 0 0\nauto /t\\040p autofs rw 0 0\nhost:/x /t\\040p nfs4 rw 0 0\n"
        )
        for root, kind in (("/t\\040p", "nfs4"), ("/nowhere", None)):
            text = mock.mock_open(read_data=mounts.replace("/t\\040p", root))
            with mock.patch.object(queuectl, "open", text, create=True):
                self.assertEqual(queuectl.network("/t p/a/queue.db"), kind)
        with mock.patch.object(queuectl, "network", return_value="nfs4"):
            queuectl.work(self.path, drain=True, say=told.append)
        self.assertIn(f"warning: {self.path} is on nfs4; SQLite needs a local disk", told)

    def test_all_files_are_the_owners_alone_whatever_the_umask(self) -> None:
        for mask in (0o777, 0o000):
            self.at(oct(mask))
            os.umask(mask)
            self.enqueue(f"touch began; {WAIT}")
            os.umask(0o022)
            self.assertEqual((self.mode(self.path), self.mode(self.path + ".run")), (0o600, 0o700))
        self.pool(preexec_fn=lambda: os.umask(0))
        self.started("began")
        files = queuectl.RunDirectory(self.path).files()
        self.assertTrue(any(name.endswith(".out") for name in files))
        paths = [self.path + end for end in ("", "-wal", "-shm")]
        paths += [os.path.join(self.path + ".run", name) for name in files]
        self.assertEqual({self.mode(path) for path in paths}, {0o600})

    def test_what_anybody_may_write_is_refused_unless_insecure(self) -> None:
        for end, mode in (("", 0o606), ("", 0o602), (".run", 0o777)):
            with self.subTest(end=end, mode=oct(mode)):
                before = self.mode(self.path + end)
                os.chmod(self.path + end, mode)
                self.distrusted("may be written by others")
                os.chmod(self.path + end, before)
        os.chmod(self.path, 0o666)
        self.trusted("--insecure")

    def test_a_directory_where_anybody_may_replace_files_is_refused_but_not_a_sticky_one(
        self,
    ) -> None:
        os.chmod(self.dir, 0o777)
        self.distrusted("anybody may replace files")
        os.chmod(self.dir, 0o1777)
        self.trusted()

    def test_what_has_another_name_or_is_a_link_is_refused(self) -> None:
        os.link(self.path, self.file("other"))
        self.distrusted("hard link")
        os.unlink(self.file("other"))
        self.configure(timeout="10")  # whose end takes the -wal away
        self.write("planted")
        os.symlink("planted", self.path + "-wal")
        self.refused(*self.START, code=4)
        self.assertEqual(self.read("log"), "")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path + "-wal")
        os.rename(self.path + ".run", self.file("elsewhere"))
        os.symlink("elsewhere", self.path + ".run")
        self.distrusted(".run is not a")
        self.trusted("--insecure")

    @NEEDS_ROOT
    def test_what_belongs_to_another_user_is_refused(self) -> None:
        theirs = f"belongs to another user ({NOBODY})"
        with Queue(self.path) as holder:
            holder.configure("timeout", "10")  # so that there is a log
            for end in ("", "-wal", "-shm", ".run"):
                with self.subTest(end):
                    paths = [self.path + e for e in (("", "-wal", "-shm") if not end else (end,))]
                    for path in paths:
                        os.chown(path, NOBODY, -1)
                    self.assertIn(theirs, self.refused(*self.START, code=4))
                    if end in ("-wal", "-shm"):  # which SQLite would make root's own
                        self.assertIn(theirs, self.refused("enqueue", "true", code=4))
                    self.assertEqual({os.lstat(path).st_uid for path in paths}, {NOBODY})
                    for path in paths:
                        os.chown(path, 0, -1)
        for end in ("-wal", "-shm"):  # planted, where there is none
            with self.subTest("planted " + end):
                self.write("queuectl.db" + end)
                os.chown(self.path + end, NOBODY, -1)
                self.assertIn(theirs, self.refused(*self.START, code=4))
                os.unlink(self.path + end)
        self.trusted()

    @NEEDS_ROOT
    def test_root_may_work_in_a_directory_of_another_user(self) -> None:
        os.chown(self.dir, NOBODY, NOBODY)
        self.trusted()

    @NEEDS_ROOT
    def test_a_shared_group_may_not_write_but_the_users_private_one_may(self) -> None:
        os.chmod(self.path, 0o660)
        os.chown(self.path, -1, NOBODY)
        self.distrusted("may be written by others")
        os.chown(self.path, -1, 0)
        if queuectl.shared_group(0):
            raise unittest.SkipTest("the group of root has other members here")
        self.trusted()

    def test_a_group_is_private_with_its_users_name_and_no_other_member(self) -> None:
        def shared(group: str) -> bool:
            name, *members = group.split()
            user, found = mock.Mock(pw_name="ada"), mock.Mock(gr_name=name, gr_mem=members)
            users = mock.patch("pwd.getpwuid", return_value=user)
            with users, mock.patch("grp.getgrgid", return_value=found):
                return queuectl.shared_group(1)

        cases = {"ada": False, "ada ada": False, "ada ada eve": True, "staff": True}
        self.each(cases, shared)

    def test_nothing_of_the_environment_of_whoever_enqueues_is_stored(self) -> None:
        os.environ["SECRET_MARKER"] = "xyzzy-1234"
        self.out("enqueue", '{"command": "true", "env": {"SHOWN": "plugh"}}')
        found = b""
        for where, _, names in os.walk(self.dir):
            for name in names:
                with open(os.path.join(where, name), "rb") as file:
                    found += file.read()
        self.assertIn(b"plugh", found)
        self.assertNotIn(b"xyzzy-1234", found)
        self.assertNotIn(b"SECRET_MARKER", found)


# --- bad input ------------------------------------------------------------------------------------


NO_RULES = (
    *("", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *"),
    *("* * * * 8", "*/0 * * * *", "a * * * *", "-1 * * * *", "5-1 * * * *", "1,,2 * * * *"),
    *("* * * * mon-xyz", "0 0 31 2 *", "@reboot"),
)
WRONG = {
    "id": (1, None, True, [], {}, "", "a b", "-a", "x" * 201, "a\nb", "a\0", "a\u202eb", "a,b"),
    "command": (1, None, False, [], {}, "", " \t\n", "a\0b", "a\ud800b"),
    "queue": (1, None, True, [], {}, "", "a b", "\udfff"),
    "priority": ("1", None, True, 1.5, [], {}, 10**7, -(10**7), 10**400),
    "delay": (None, True, [], {}, "soon", -1, "-1", 1e12, 10**400, "9" * 400, float("nan")),
    "run_at": (None, True, [], {}, "soon", -1, "2030-13-01", "9999999-01-01", 1e300, "9" * 5000),
    "timeout": (None, True, [], {}, "long", -1, float("inf"), float("nan")),
    "max_retries": ("1", None, True, 1.5, [], {}, 0, -1, 10**7),
    "cwd": (1, None, True, [], {}, "/\0", "/\ud800"),
    "env": (1, None, [], "A=1", {"A": 1}, {"": "x"}, {"A=B": "x"}, {"A": None}, {"A": "\0"}),
    "after": (1, None, "", [1], [""], ["a b"], {"a": 1}, "-x"),
    "every": (0, 0.5, -1, None, True, "", "often", [60]),
    "cron": (1, None, *NO_RULES),
}
WRONG_JSON = (  # what is given, and a part of the answer
    ('{"command": "true", "comand": "x"}', "did you mean command?"),
    ('{"command": "true", "max-retries": 1}', "did you mean max_retries?"),
    ('{"command": "true", "\\ud800": 1}', "unknown field"),
    ('{"command": "true", "delay": 1, "run_at": 1}', "not both"),
    ("{}", "needs a command"),
    ("[]", "a job is a JSON object"),
    ("[1]", "a job is a JSON object"),
    ('[{"command": "true"}, null]', "a job is a JSON object"),
    ("{", "bad JSON"),
    ('{"command": "true"} {"command": "true"}', "bad JSON"),
    ("{command:true}", "lost its quotes"),
    ("{'command': 'true'}", "bad JSON"),
    ('[{"env": [' * 10_000, "bad JSON"),
    ('{"command": ' * 10_000, "bad JSON"),
)


class BadInput(Case):
    """Whatever is wrong with a job is said in one line, and nothing is stored."""

    def test_a_wrong_value_of_any_field_is_refused_by_the_fields_name(self) -> None:
        self.assertEqual(set(WRONG), set(queuectl.FIELDS))
        for field, values in WRONG.items():
            for value in values:
                job = json.dumps({"command": "true", field: value})
                with self.subTest(job[:80]):
                    self.assertIn(field, self.refused("enqueue", job))
                    two = '{"command": "true"}\n' + job
                    self.assertIn(f"line 2: {field}", self.refused("enqueue", "-", stdin=two))
        self.assertEqual(os.listdir(self.dir), [])

    def test_wrong_json_is_refused_with_a_reason(self) -> None:
        for source, reason in WRONG_JSON:
            with self.subTest(source[:80]):
                self.assertIn(reason, self.refused("enqueue", source))
                self.assertIn("line 1: ", self.refused("enqueue", "-", stdin=source.encode()))
        for junk in (b"\xff\xfe\n", b"\x00\x01\x02", b"\x80" * 100_000):
            with self.subTest(junk[:10]):
                lines = b'{"command": "true"}\n\n' + junk
                self.assertIn("line 3: ", self.refused("enqueue", "-", stdin=lines))
        self.assertEqual(os.listdir(self.dir), [])

    @NEEDS_SHELL
    def test_a_command_is_refused_only_where_the_system_could_not_start_it(self) -> None:
        longest = queuectl.SYSTEM.COMMAND_LIMIT
        for command in ("x" * (longest + 1), "é" * (longest // 2 + 1)):
            job = json.dumps({"command": command}).encode()
            line = self.refused("enqueue", "-", stdin=job)
            self.assertIn(f"longer than {longest} bytes", line)
        self.assertEqual(os.listdir(self.dir), [])
        self.enqueue("true " + "x" * (longest - 5))
        self.drain()

    def test_a_taken_id_refuses_the_whole_batch_and_names_its_line(self) -> None:
        self.enqueue("true", id="taken")
        for ids, at in (("a taken b", 2), ("a b c b", 4)):
            lines = [json.dumps({"command": "true", "id": name}) for name in ids.split()]
            line = self.refused("enqueue", "-", stdin="\n".join(lines).encode())
            self.assertIn(f"line {at}: there is a job {ids.split()[at - 1]} already", line)
        self.assertEqual(list(self.states()), ["taken"])


# --- at the prompt --------------------------------------------------------------------------------


class Submit(Live):
    FIELDS = {
        "command": "true",
        "priority": 7,
        "run_at": "2030-01-31T08:00Z",
        "timeout": 9,
        "max_retries": 8,
        "queue": "gpu",
        "cwd": "/",
        "env": {"A": "a", "B": "b"},
    }
    OPTIONS = {
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

    def test_an_option_overrides_its_field_and_leaves_the_others_as_they_are(self) -> None:
        for words, (name, value) in self.OPTIONS.items():
            with self.subTest(words):
                plain, given = (
                    self.facts("show", self.out("enqueue", *more, json.dumps(self.FIELDS)).strip())
                    for more in ((), words.split())
                )
                own = ("id", "seq", "created_at", "updated_at", "why", name)
                same = [{k: v for k, v in job.items() if k not in own} for job in (plain, given)]
                self.assertEqual(*same)
                if name == "run_after":
                    given[name] = queuectl.moment(given[name])
                    self.assertAlmostEqual(given[name], value or time.time() + 120, delta=60)
                else:
                    self.assertEqual(given[name], value)
                    self.assertNotEqual(plain[name], value)

    def test_a_taken_id_is_an_error_unless_it_may_be_there(self) -> None:
        self.assertEqual(self.told("enqueue", "--id", "x", "echo 1"), (0, "x\n", ""))
        taken = "queuectl: there is a job x already\n"
        self.assertEqual(self.told("enqueue", "--id", "x", "echo 2"), (2, "", taken))
        self.refused("enqueue", '[{"id":"y","command":"a"},{"id":"y","command":"b"}]')
        self.assertEqual(self.told("enqueue", "--id", "x", "--if-absent", "b"), (0, "x\n", ""))
        self.assertEqual([job["command"] for job in self.rows("list")], ["echo 1"])

    def test_what_powershell_left_of_json_gets_a_hint_and_is_no_job(self) -> None:
        for words in (["{id:job1,command:echo hi}"], ["{id:job1,command:echo", "hi}"]):
            line = self.refused("enqueue", *words)
            for part in ("PowerShell", "enqueue COMMAND", "enqueue -"):
                self.assertIn(part, line)
        self.assertFalse(os.path.exists(self.path))

    WRONG = {
        "--priority 1e3": "--priority must be a whole number",
        "--delay ": "--delay must be a duration",
        "--at 31.1.2030": "--at must be a time",
        "--at 9999999999999": "--at must be a time between 1970 and 9999",
        "--after ": "--after must have no empty id",
        "--after 1,": "--after must have no empty id",
        "--after 1 --after 7": "after: no job 7",
        "--every 0": "--every must be at least 1 second",
        "--cron ": "--cron must have five fields",
        "--cron @daily --every 1d": "a job has every or cron, not both",
        "--delay 1 --at 2030-01-01": "a job has delay or run_at, not both",
        "--env =x": "--env must have names",
        "--env x": "--env is NAME=VALUE",
        "--queue ": "--queue must be",
        "--id a\tb": "--id must be",
        "- ": "- stands alone",
        "{}": "bad JSON",
    }

    def test_what_makes_no_sense_is_refused_with_a_word_about_the_field(self) -> None:
        self.enqueue("true")
        for words, reason in self.WRONG.items():
            with self.subTest(words):
                self.assertIn(reason, self.refused("enqueue", *words.split(" "), "true"))
        for words in ("pause", "resume", "list", "worker start"):
            with self.subTest(words):
                self.refused(*words.split(), "--queue=")
        self.assertEqual(list(self.states()), ["1"])

    SCRIPT = r"""
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
        q config list | grep -q '^timeout *300'
        test "$(q worker list --json)" = '' && q worker stop
        q completion bash | bash -n
    """

    def test_a_script_can_rely_on_ids_and_exit_codes(self) -> None:
        os.environ["QUEUECTL"] = " ".join([*PYTHON, PROGRAM])
        result = self.process("sh", "-c", self.SCRIPT)
        self.assertEqual(result.returncode, 0, result.stderr)


class Watch(Live):
    def test_logs_follow_a_running_job_live_and_end_with_it(self) -> None:
        self.enqueue(f"echo one; {WAIT}; echo two", id="x")
        logs = self.start("logs", "x", "-f")
        self.says(logs, "job x waits: no worker is running")
        self.pool("--drain")
        self.says(logs, "one\n")
        self.assertEqual((logs.poll(), self.out("logs", "x")), (None, "one\n"))
        self.write("go")
        self.assertEqual((logs.communicate(timeout=5)[0], logs.returncode), ("two\n", 0))

    def test_a_job_that_is_claimed_but_not_yet_started_is_followed(self) -> None:
        with Queue(self.path) as queue:
            queue.enqueue("true", id="x")
            job: Any = queue.claim("worker-1")
            logs = self.start("logs", "x", "-f")
            until(lambda: os.path.exists(self.path + "-shm"))
            self.assertFalse(select.select([logs.stdout], [], [], 0.5)[0])  # nor has it ended
            out = queuectl.Output(queue.db.run_dir.file(job.seq, job.run, "out"))
            os.write(out.fd, b"one\n")
            self.says(logs, "one\n")
            queue.finish(job, Outcome("ran", 1.0, 2.0, 0, None, 0, b"one\n"))
            out.close()
        self.assertEqual(logs.wait(5), 0)

    def test_what_a_runaway_has_lost_is_not_followed(self) -> None:
        with open(self.file("out"), "w+b", buffering=0) as file:
            file.write(b"x" * 1_000_000)
            at, chunk = queuectl.read_on(file.fileno(), 5)
            self.assertEqual((at, chunk), (5, b"x" * 65536))
            if queuectl.SYSTEM.punch(file.fileno(), 900_000):
                at, chunk = queuectl.read_on(file.fileno(), 5)
                self.assertTrue(at > 800_000 and b"\0" not in chunk[10_000:])
            self.assertEqual(queuectl.read_on(file.fileno(), 1_000_000), (1_000_000, b""))

    def test_logs_of_a_waiting_job_say_when_it_will_run(self) -> None:
        self.enqueue("true", id="x", run_at="9999-01-01")
        words = queuectl.ago(self.job("x").run_after, time.time())
        self.assertEqual(self.told("logs", "x"), (0, "", f"queuectl: job x waits: due {words}\n"))

    def test_an_earlier_attempt_has_its_own_logs(self) -> None:
        self.configure(backoff_max="0")
        self.enqueue("false", id="x", max_retries=2)
        with Queue(self.path) as queue:
            for output in (b"try 1\n", b"try 2\n"):
                job = queue.claim("worker-1")
                queue.finish(job, Outcome("ran", 1.0, 2.0, 1, "exit code 1", 0, output))
        for words, output in (("", "try 2\n"), ("--run 1", "try 1\n"), ("--run 2 -f", "try 2\n")):
            self.assertEqual(self.told("logs", "x", *words.split()), (0, output, ""))
        self.assertIn("no run 3; it has 1 to 2", self.told("logs", "x", "--run", "3")[2])

    def test_logs_of_a_job_that_wrote_nothing_say_why_it_failed(self) -> None:
        self.enqueue("true", id="x", cwd=self.file("nowhere"), max_retries=1)
        self.drain(code=1)
        self.assertRegex(
            self.told("logs", "x")[2], "^queuectl: job x wrote nothing: cannot start: N"
        )

    def test_status_can_be_watched(self) -> None:
        self.configure(max_retries="1")
        self.enqueue("exit 3", id="bad", priority=1)
        self.enqueue(f"touch started; {WAIT}", id="busy")
        for number in range(3):
            self.enqueue("true", id=f"later{number}")
        self.pool()
        self.started("started")
        watch = Terminal(self, "status", "--watch", env={"NO_COLOR": "1"})
        rows = (
            r"^\x1b\[H\x1b\[J",
            r"pending +3\r\nprocessing +1\r\ncompleted +0\r\ndead +1\r\n",
            r"workers +1\r\nrate +0\.0  jobs/s over the last minute\r\n",
            r"oldest +job later0, due \S+.*; next to run\r\n",
            r"worker-\S+ +\d+ +busy +(now|\d+ s ago) +touch started",
            r"bad +(now|\d+ s ago) +exit code 3\r\n",
        )
        watch.sees("(?s)" + ".*".join(rows))
        self.write("go")
        watch.sees(r"(?s)\x1b\[H\x1b\[J.*completed +4\r\n.*rate +0\.1 .*idle")
        watch.process.send_signal(signal.SIGINT)
        self.assertNotIn("Traceback", watch.end())
        self.assertEqual(watch.process.returncode, 130)

    def test_a_terminal_shows_progress_below_the_events(self) -> None:
        self.configure(max_retries="1")
        self.enqueue("exit 3", id="bad")
        self.enqueue(f"touch started; {WAIT}", id="busy")
        self.enqueue("true", id="more")
        work = Terminal(self, "worker", "start", "--drain")
        wait = Terminal(self, "wait", "--all")
        one = Terminal(self, "wait", "more")
        work.sees(r"\r\x1b\[K\d\d:\d\d:\d\d job bad is dead: exit code 3 \(try 1\)\r\n")
        work.sees(r"\r\x1b\[K1/3 jobs, \d+\.\d/s(, \d+ s left)?, 1 failed")
        wait.sees(r"\r\x1b\[K[01]/[23] jobs, \d+\.\d/s")
        one.sees(r"\r\x1b\[K0/1 jobs, 0\.0/s")
        self.write("go")
        self.assertTrue(work.end().endswith("\r\x1b[K"))  # nothing is left of it
        self.assertTrue(wait.end().endswith("\r\x1b[K"))
        self.write("lines", "".join(f'{{"command":"{n}"}}\n' for n in range(1000)))
        with open(self.file("lines")) as file, open(os.devnull, "w") as nowhere:
            adding = Terminal(self, "enqueue", "-", columns=9, stdin=file, stdout=nowhere)
            self.assertEqual(adding.end(), "\r\x1b[K1000 li…\r\x1b[K")

    def test_what_is_no_terminal_gets_plain_lines(self) -> None:
        lines = "".join(f'{{"command":"{n}","queue":"q"}}\n' for n in range(1000))
        self.enqueue("true")
        self.assertEqual(self.run_cli("enqueue", "-", stdin=lines, real=True).stderr, "")
        lines = self.drain("--queue", "default", real=True)
        self.assertRegex(lines, r"^(\d\d:\d\d:\d\d [ -~]+\n){2}$")
        watch = Terminal(self, "status", "--watch", env={"TERM": "dumb"})
        watch.sees(r"^pending +1000\r\n")
        for words in ("status", "list", "show 1", "wait 1", "worker list", "list --json"):
            code, out, err = self.told(*words.split())
            self.assertNotRegex(out + err, r"[\x1b\r]")
            self.assertEqual(code, 0)


class Wait(Live):
    CODES = {
        "good": 0,
        "good seven killed": 7,
        "killed seven": 137,
        "unstarted": 1,
        "called-off good": 1,
        "child --timeout 0": 124,
        "good --timeout 0": 0,
        "good child --timeout 0": 124,
        "--all": 1,  # the child is blocked for good
        "nobody": 1,
        "": 2,
        "--all good": 2,
    }

    def test_the_exit_code_is_that_of_the_first_job_that_failed(self) -> None:
        with Queue(self.path) as queue:
            for name, code in {"good": 0, "seven": 7, "killed": -9, "unstarted": None}.items():
                queue.enqueue("true", id=name, max_retries=1)
                outcome = Outcome("ran", 1.0, 2.0, code, None if code == 0 else "why")
                queue.finish(queue.claim("worker-1"), outcome)
            queue.enqueue("true", id="called-off")
            queue.cancel(["called-off"])
            queue.enqueue("true", id="child", after=["good", "seven"])
        self.each(self.CODES, lambda ids: self.told("wait", *ids.split())[0])

    def test_who_waits_is_told_what_is_in_the_way(self) -> None:
        self.enqueue("true", id="x")
        self.enqueue("true", id="child", after="x")
        for ids, jobs in {"x": "x", "child x": "child x", "--all": "x"}.items():
            said = self.told("wait", "--timeout", "0", *ids.split())[2]
            self.assertEqual(re.findall("job (\\w+) waits: ", said), jobs.split())
        self.out("cancel", "x")
        said = "queuectl: job child waits: blocked by x (cancelled)\n"
        self.assertEqual(self.told("wait", "--all"), (1, "", said))

    def test_wait_all_takes_no_job_for_new_that_was_dead_before(self) -> None:
        with Queue(self.path) as queue:
            list(queue.enqueue_many({"command": "true"} for _ in range(1002)))
            queue.db.execute("UPDATE jobs SET state = 'dead', exit_code = 7 WHERE seq < 1002")
            waiting = Terminal(self, "wait", "--all")
            waiting.sees(r"0/1 jobs")
            queue.purge(["1001"])
            queue.finish(queue.claim("worker-1"), Outcome("ran", 1.0, 2.0, 0, None))
            waiting.end()
            self.assertEqual(waiting.process.returncode, 0)

    def test_wait_all_knows_a_job_whose_result_is_stored_late(self) -> None:
        job = self.enqueue(f"touch started; {WAIT}; touch ended; exit 7", max_retries=1)
        self.pool()
        self.started("started")
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            self.write("go")
            self.started("ended")
            waiting = Terminal(self, "wait", "--all")
            waiting.sees(r"\d/1 jobs")
        self.assertEqual(self.becomes(job, "dead").exit_code, 7)
        waiting.end()
        self.assertEqual(waiting.process.returncode, 7)

    def test_wait_all_knows_a_job_that_died_meanwhile_whatever_else_was_purged(self) -> None:
        self.enqueue("false", id="before", max_retries=1)
        self.drain(code=1)
        self.enqueue(f"touch started; {WAIT}; exit 7", id="meanwhile", max_retries=1)
        self.pool()
        self.started("started")
        waiting = Terminal(self, "wait", "--all")
        waiting.sees(r"\d/1 jobs")
        self.told("dlq", "purge", "before")
        self.write("go")
        waiting.end()
        self.assertEqual(waiting.process.returncode, 7)

    def test_it_returns_promptly_whatever_the_jobs_were_doing(self) -> None:
        self.enqueue(f"touch started; {WAIT}; exit 9", id="running", max_retries=1)
        self.enqueue("true", id="waiting")
        self.enqueue("true", id="scheduled", delay=0.1)
        self.enqueue("true", id="blocked", after="scheduled")
        self.pool()
        self.started("started")
        everything = Terminal(self, "wait", "--all")
        everything.sees(r"\d/4 jobs")  # it knows what to wait for
        named = self.start("wait", "blocked", "scheduled", "waiting", "running")
        code, _, said = self.told("wait", "running", "--timeout", "0.2")
        self.assertEqual((code, said), (124, "queuectl: timed out after 0.2 s: 0/1 jobs, 0.0/s\n"))
        self.write("go")
        everything.end()
        self.assertEqual((named.wait(5), everything.process.returncode), (9, 9))
        self.assertEqual(self.job("blocked").state, "completed")
        with Queue(self.path, readonly=True) as queue:
            looks = queuectl.changes(queue)
            next(looks)
            self.enqueue("true")
            began = time.monotonic()
            next(looks)
            self.assertLess(time.monotonic() - began, 0.3)


class Cancel(Live):
    def test_waiting_scheduled_and_running_jobs_are_called_off_and_stay_so(self) -> None:
        self.configure(kill_grace="0.3")
        self.enqueue("true", id="done", priority=1)
        deaf = "trap '' TERM; (trap '' TERM; sleep 300) & echo $! > pid; touch started; sleep 300"
        self.enqueue(deaf, id="running")
        self.enqueue("true", id="waiting")
        self.enqueue("true", id="scheduled", delay="1h")
        self.enqueue("touch wrong", id="child", after="waiting")
        pool = self.pool()
        self.started("started")
        began = time.monotonic()
        code, out, err = self.told("cancel", "running", "waiting", "scheduled", "done")
        self.assertLess(time.monotonic() - began, 0.3 + self.second())
        self.assertEqual((code, out), (1, "running\nwaiting\nscheduled\n"))
        waits = "queuectl: jobs that wait for waiting: 1; --cascade calls them off, too\n"
        self.assertEqual(err, waits + "queuectl: job done is completed; it stays so\n")
        self.assertFalse(alive(int(self.read("pid"))))
        self.enqueue("true", id="next")
        self.becomes("next", "completed")
        pool.terminate()
        self.ends(pool, 0)
        states = {job: self.job(job).state for job in ("running", "waiting", "scheduled", "child")}
        self.assertEqual(set(states.values()), {"cancelled", "pending"}, states)
        self.assertEqual((states["child"], self.job("running").attempts), ("pending", 1))
        self.assertEqual(self.told("cancel", "running")[:2], (0, "running\n"))  # that it is

    def test_a_job_may_be_called_off_while_its_pool_stops_or_where_there_is_none(self) -> None:
        self.enqueue("touch started; sleep 300", id="x")
        pool = self.pool()
        self.started("started")
        pool.terminate()
        self.says(pool, "no new jobs")
        self.assertEqual(self.told("cancel", "x"), (0, "x\n", ""))
        self.ends(pool, 0)
        with Queue(self.path) as queue:
            queue.enqueue("true", id="orphan")
            queue.claim("worker-dead")
            self.assertIn("\nlost       job orphan: its worker is gone; st", self.out("status"))
            said = "queuectl: job orphan: its worker is gone; start one\n"
            self.assertEqual(self.told("cancel", "orphan"), (0, "orphan\n", said))
            self.assertEqual(queue.get("orphan").cancelling, 1)
        self.drain()
        self.assertEqual((self.job("x").state, self.job("orphan").state), ("cancelled",) * 2)

    def test_a_pool_forgets_the_orphans_that_another_has_recovered(self) -> None:
        self.enqueue("true", id="x")
        with Queue(self.path) as queue:
            queue.claim("worker-dead")
            orphan = queuectl.LockFile(queue.db.run_dir.file("1.1.out"))
            pools = [queuectl.Pool(queue, 1, (), lambda _: None) for _ in "ab"]
            for pool in pools:
                pool.recover()
            self.assertEqual([len(pool.kills) for pool in pools], [1, 1])
            orphan.close()
            for pool in pools:
                pool.recover()
            self.assertEqual([len(pool.kills) for pool in pools], [0, 0])
            self.assertEqual(queue.get("x").state, "pending")

    def test_nobody_waits_for_a_pool_that_has_died_meanwhile(self) -> None:
        self.enqueue("true", id="x")
        with Queue(self.path) as queue:
            held = [
                queuectl.LockFile(queue.db.run_dir.file(name)) for name in ("worker-1", "pool-1")
            ]
            queue.claim("worker-1")
            cancel = self.start("cancel", "x")
            until(lambda: queue.get("x").cancelling)
            for file in held:
                file.close()
            self.assertEqual(cancel.wait(5), 0)

    def test_a_cancelled_job_is_retried_like_a_dead_one(self) -> None:
        self.enqueue("true", id="x")
        self.told("cancel", "x")
        self.assertEqual(self.told("dlq", "retry", "x"), (0, "x\n", ""))
        self.assertEqual((self.job("x").state, self.job("x").attempts), ("pending", 0))

    def test_a_cancelled_job_that_never_ran_is_retried_no_sooner_than_it_was_to_run(self) -> None:
        self.enqueue("true", id="x", delay=3600)
        due = self.job("x").run_after
        self.told("cancel", "x")
        self.told("dlq", "retry", "x")
        self.assertEqual((self.job("x").run_after, self.job("x").due), (due, queuectl.LATER))


class Hold(Live):
    def test_while_it_is_paused_running_jobs_go_on_and_nothing_new_starts(self) -> None:
        self.enqueue(f"touch started; {WAIT}", id="running")
        self.enqueue("true", id="waiting")
        pool = self.pool("--drain")
        self.started("started")
        self.told("pause")
        self.assertIn("paused     all queues\n", self.out("status"))
        self.assertEqual(self.facts("status")["paused"], [""])
        self.write("go")
        self.says(pool, "waiting for jobs of default: paused; resume goes on")
        self.assertEqual(self.states(), {"running": "completed", "waiting": "pending"})
        self.told("resume")
        self.ends(pool, 0)
        self.assertEqual(self.job("waiting").state, "completed")

    def test_several_queues_can_be_paused_at_once(self) -> None:
        self.out("pause", "--queue", "a", "--queue", "b")
        self.assertEqual(self.facts("status")["paused"], ["a", "b"])
        self.out("resume", "--queue", "b", "--queue", "a")
        self.assertEqual(self.facts("status")["paused"], [])

    def test_one_queue_can_be_paused(self) -> None:
        with Queue(self.path) as queue:
            for name in ("gpu", "cpu"):
                queue.enqueue("true", queue=name, id=name)
            self.told("pause", "--queue", "gpu")
            self.assertIn("paused     gpu\n", self.out("status"))
            claimed = [queue.claim("worker-1"), queue.claim("worker-2")]
            self.assertEqual([job and job.id for job in claimed], ["cpu", None])
            self.assertEqual(queue.awaited(), {"cpu": False, "gpu": True})
            self.assertEqual(queue.awaited(["cpu"]), {"cpu": False})
            queue.enqueue("true", queue="night", cron="@daily")
            queue.enqueue("true", queue="later", delay=60)
            queue.pause()
            self.assertEqual(queue.awaited(), {"cpu": False, "gpu": True, "later": True})
            self.assertEqual(queue.awaited((), 9), {"cpu": False, "gpu": True})
            queue.resume()
            queue.pause("gpu")
            self.told("resume", "--queue", "gpu")
            self.assertEqual(queue.claim("worker-2").id, "gpu")
            queue.pause()
            self.assertIn("all queues are paused still", self.told("resume", "--queue", "gpu")[2])


class Workers(Live):
    def test_workers_in_the_background_are_listed_and_stopped(self) -> None:
        self.addCleanup(lambda: self.told("worker", "stop", "--now"))
        start = Terminal(self, "worker", "start", "--detach", "--count", "2")
        said = start.end()  # and the terminal is gone
        pool, pid, log = re.findall(r"(pool-\w+) runs as process (\d+); its log is (\S+)", said)[0]
        self.assertEqual((start.process.returncode, os.getsid(int(pid))), (0, int(pid)))
        self.enqueue(f"touch started; {WAIT}", id="busy")
        self.started("started")
        self.run_cli("worker", "start", "--detach", real=True)
        self.working(3)
        listed = self.rows("worker", "list")
        (busy,) = (worker for worker in listed if worker["job"])
        self.assertEqual((busy["pool"], busy["job"]), (pool, "busy"))
        self.assertEqual(len({worker["pool"] for worker in listed}), 2)
        self.assertTrue(queuectl.moment(busy["since"]) <= time.time() and alive(busy["pid"]))
        row = f"{busy['worker']} +{busy['pid']} +busy +(now|[0-9]+ s ago) +touch started"
        self.assertRegex(self.out("worker", "list"), row)
        stop = self.start("worker", "stop")
        self.assertEqual(stop.stdout.readline(), "queuectl: waiting for busy\n")
        self.write("go")
        self.assertEqual((stop.communicate(timeout=10)[0], stop.returncode), ("", 0))
        self.assertIn("job busy completed", self.read(log))

    def test_workers_that_cannot_start_in_the_background_say_why(self) -> None:
        self.enqueue("true")
        shutil.rmtree(self.path + ".run")  # as beside a copy
        os.chmod(self.path, 0o666)
        line = self.run_cli("worker", "start", "--detach", code=4, real=True).stderr
        self.assertIn("may be written by others", line)


@NEEDS_SHELL
class CleanUp(Clocked):
    def ended(self, job_id: str, code: int = 0) -> None:
        """Add a job that ends now."""
        self.queue.enqueue("true", id=job_id, max_retries=1)
        self.ends(code)

    def test_what_ended_long_ago_is_pruned_and_its_age_counts_from_its_end(self) -> None:
        self.ended("old")
        self.ended("dead", 1)
        for job_id in ("off", "slow", "waits"):
            self.queue.enqueue("true", id=job_id)
        self.queue.cancel(["off"])
        self.now += 86400
        job = self.queue.claim("worker-1")
        self.queue.finish(job, Outcome("ran", 1e6, self.now, 0, None))
        self.assertEqual(job.id, "slow")
        self.assertEqual((self.queue.prune(86401), self.queue.prune(86400)), (0, 2))
        self.assertEqual(self.ids(), "dead slow waits")
        for states in (["pending"], ["processing", "dead"]):
            with self.assertRaises(queuectl.BadInput):
                self.queue.prune(0, states)
        self.assertEqual((self.queue.prune(0, ["dead"]), self.queue.prune()), (1, 1))
        self.assertEqual(self.ids(), "waits")
        self.assertEqual(self.queue.db.execute("SELECT count(*) FROM attempts").fetchone(), (0,))
        self.assertEqual(sum(self.queue.counts().values()), 1)

    def test_what_a_blocked_job_waits_for_stays(self) -> None:
        self.ended("dead", 1)
        self.queue.enqueue("true", id="off")
        self.queue.cancel(["off"])
        self.queue.enqueue("true", id="child", after=["dead", "off"])
        self.assertEqual((self.queue.prune(), self.queue.prune(0, ["dead"])), (0, 0))
        self.assertEqual(self.told("dlq", "purge", "dead")[0], 1)
        self.queue.cancel(["child"])
        self.assertEqual(self.told("prune", "--state", "cancelled")[:2], (0, "2 pruned\n"))
        self.assertEqual(self.told("dlq", "purge", "dead")[:2], (0, "1 purged\n"))

    def test_dead_jobs_are_purged_by_name_by_age_or_all(self) -> None:
        for job_id in ("a", "b", "c"):
            self.ended(job_id, 1)
        self.ended("good")
        self.refused("dlq", "purge")
        self.refused("dlq", "purge", "a", "good", code=1)
        self.assertEqual(self.ids(), "a b c good")
        self.assertEqual(self.out("dlq", "purge", "a"), "1 purged\n")
        self.refused("dlq", "purge", "--older-than", "5000w")
        self.assertEqual(self.out("dlq", "purge", "--older-than", "500w"), "2 purged\n")
        self.assertEqual(self.ids(), "good")

    def test_a_pool_prunes_what_is_older_than_the_retention(self) -> None:
        self.ended("old")
        self.ended("dead", 1)
        self.queue.enqueue("true", id="off")
        self.queue.cancel(["off"])
        self.now = time.time()
        self.ended("new")
        self.told("config", "set", "retention", "30d")
        self.pool()
        until(lambda: self.ids() == "dead new")


class Read(Live):
    def test_a_limited_list_has_what_changed_last_whatever_its_state(self) -> None:
        clock = itertools.count(1.0)
        with Queue(self.path, clock=lambda: next(clock)) as queue:
            queue.enqueue_many({"command": "true", "id": name} for name in "ab")
            queue.cancel(["b"])
            queue.enqueue("true", id="c")
            self.assertEqual([job.id for job in queue.jobs(limit=2)], ["b", "c"])

    def test_a_table_is_cut_to_the_terminal_and_coloured_only_there(self) -> None:
        self.enqueue("echo " + "long " * 20, id="one")
        self.enqueue("echo \u5b57" + "\u6f22" * 50, id="\u6f22" * 8, delay="1h30s")
        self.told("cancel", "one")
        for env, coloured in ({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False):
            with self.subTest(env):
                shown = Terminal(self, "list", columns=40, env=env).end()
                self.assertEqual("\x1b[33mcancelled\x1b[m" in shown, coloured)
                lines = re.sub(r"\x1b\[\d*m", "", shown).splitlines()
                rows = " ".join(line for line in lines if "\u6f22" in line or "echo" in line)
                self.assertEqual("\x1b" in shown, coloured)
                fits = {len(line) + len(re.findall("[\u5b57\u6f22]", line)) <= 40 for line in lines}
                self.assertEqual(fits, {"TERM" not in env})
                self.assertRegex(rows, "echo long.* \u6f22{8}  pending    0/3 .* echo \u5b57")
        rows = [line.partition("echo")[0] for line in self.told("list")[1].splitlines()[1:]]
        self.assertEqual(len(rows[0]), len(rows[1]) + 8)  # aligned
        self.enqueue("true", id="w" * 60)
        shown = Terminal(self, "list", columns=40, env={"NO_COLOR": "1"}).end()
        self.assertEqual(max(map(len, shown.splitlines())), 40)

    def test_everything_about_a_job_is_shown_whole_on_any_terminal(self) -> None:
        self.enqueue("echo " + "long" * 20, id="x")
        shown = Terminal(self, "show", "x", columns=40).end()
        self.assertIn("echo " + "long" * 20, shown)

    def test_a_reader_that_leaves_early_is_no_error(self) -> None:
        with Queue(self.path) as queue:
            list(queue.enqueue_many({"command": "x" * 100} for _ in range(2000)))
        line = f"{' '.join([*PYTHON, PROGRAM])} list --limit 0 | head -1"
        shown = subprocess.run(line, shell=True, cwd=self.dir, capture_output=True, check=False)
        self.assertEqual((shown.stdout[:4], shown.stderr), (b"ID  ", b""))
        self.assertEqual(
            self.told("list")[2], "queuectl: 100 of 2000 jobs shown; --limit 0 shows all\n"
        )

    @SLOW
    def test_any_locale_will_do_for_any_command(self) -> None:
        os.environ["LC_ALL"] = "C"
        self.out("enqueue", "--id", "\u00e9\U0001f600", "printf '\u2603'", real=True)
        self.drain(real=True)
        self.assertIn("printf", self.out("list", real=True))
        self.assertEqual(self.out("logs", "\u00e9\U0001f600"), "\u2603")

    def test_every_reading_command_has_json_with_documented_fields(self) -> None:
        self.configure(max_retries="1")
        self.enqueue("true", id="x")
        self.enqueue("true", every="1h", id="\u00e9")
        with Queue(self.path) as queue:
            held = queuectl.LockFile(queue.db.run_dir.file("worker-1-1"))
            self.addCleanup(held.close)
            queue.claim("worker-1-1")
        text = readme()
        for words in ("status", "list", "list --recurring", "show x", "worker list"):
            code, out, err = self.told(*words.split(), "--json")
            self.assertEqual((code, err, out.isascii()), (0, "", True), words)
            for key in json.loads(out.splitlines()[0]):
                self.assertIn(f"`{key}`", text, words)
        for words in ("dlq list", "list --state dead"):
            self.assertEqual(self.told(*words.split(), "--json"), (0, "", ""))


class Help(Live):
    def test_the_help_fits_on_a_screen_and_shows_four_examples(self) -> None:
        bare = self.out()
        self.assertEqual(self.out("--help"), bare)
        lines = bare.rstrip().splitlines()
        self.assertLess(len(lines), 24)  # the prompt comes below
        self.assertLessEqual(max(map(len, lines)), 80)
        self.assertEqual(bare.partition("examples:\n")[2].count("  queuectl "), 4)

    def test_every_subcommand_has_an_example_that_is_one(self) -> None:
        for words in queuectl.COMMANDS:
            with self.subTest(words):
                code, out, _ = self.told(*words.split(), "--help")
                example = out.partition("\nexample: queuectl ")[2].strip()
                self.assertEqual((code, example.startswith(words)), (0, True), out)
                queuectl.parse(shlex.split(example))

    def test_what_cannot_be_meant_gets_a_word_about_what_can(self) -> None:
        for words, hint in {
            "frobnicate": "no command frobnicate; known are enqueue, worker, status,",
            "enqueue ls -l": "several words goes after --, as in: enqueue -- ls -l",
            "status --db x.db": "--db goes before the command",
            "list --state done": "cancelled",
            "prune --state pending": "(queuectl prune --help says more)",
            "--db new.db worker start --horizon 5": "--horizon goes with --drain",
            "wait --all 1": "name the jobs or say --all, one of the two",
        }.items():
            with self.subTest(words):
                self.enqueue("true", id="1", if_absent=True)
                self.assertIn(hint, self.refused(*words.split()))
        self.assertFalse(os.path.exists(self.file("new.db")))
        where = self.file("none")
        err = self.refused("--db", where + "/x.db", "enqueue", "true", code=4)
        self.assertEqual(err, f"queuectl: there is no directory {where}\n")

    def test_the_nearest_command_option_or_id_is_suggested(self) -> None:
        self.enqueue("true", id="nightly-backup")
        for words, near in {
            "enqeue true": "enqueue",
            "worker strat": "start",
            "worker start --cuont 2": "--count",
            "enqueue --prioritty 3 true": "--priority",
            "show nightly-bakcup": "nightly-backup",
            "cancel nihgtly-backup": "nightly-backup",
            "wait nightlybackup": "nightly-backup",
            "config get tiemout": "timeout",
        }.items():
            with self.subTest(words):
                code, out, err = self.told(*words.split())
                self.assertIn(f": did you mean {near}?", err)
                self.assertEqual((code in (1, 2), out, err.count("\n")), (True, "", 1))


# --- what runs when -------------------------------------------------------------------------------


@contextlib.contextmanager
def zone(name: str) -> Iterator[None]:
    """Be somewhere else for a while."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = name
    time.tzset()
    try:
        yield
    finally:
        os.environ.pop("TZ") if before is None else os.environ.update(TZ=before)
        time.tzset()


@NEEDS_SHELL
class Order(Clocked):
    def test_the_order_holds_under_many_workers(self) -> None:
        for number in range(40):
            fields = {"priority": number % 4, "run_at": number % 3, "queue": f"q{number % 5}"}
            self.queue.enqueue("true", id=str(number), **fields)
        others = [Queue(self.path, clock=lambda: self.now) for _ in range(4)]
        for queue in others:
            self.addCleanup(queue.db.close)
        jobs = [others[n % 4].claim(f"worker-{n}") for n in range(40)]
        key = [(-job.priority, job.run_after, job.seq) for job in jobs]
        self.assertEqual(key, sorted(key))

    def test_a_low_priority_waits_but_is_not_lost_and_status_shows_it(self) -> None:
        self.queue.enqueue("true", id="tomorrow", delay=86300)
        self.queue.enqueue("true", id="low", priority=-9, delay=100)
        self.now += 86400
        for number in range(5):
            self.queue.enqueue("true", id=f"high{number}", priority=9)
            self.assertEqual(self.ends().id, f"high{number}")
            oldest = next(line for line in queuectl.status_text(self.queue) if "oldest" in line)
            self.assertIn("job low, due 23h58m ago; no worker is running", oldest)
        self.assertEqual(self.runs(), "tomorrow low")

    def test_a_job_due_in_the_past_is_due_and_a_later_one_is_not_until_then(self) -> None:
        self.queue.enqueue("true", id="past", run_at="1970-01-02")
        self.queue.enqueue("true", id="then", run_at=self.now + 60)
        self.assertEqual(self.runs(), "past")
        self.now += 59.9
        self.assertEqual(self.runs(), "")
        self.now += 0.1
        self.assertEqual(self.runs(), "then")

    def test_a_local_time_is_meant_as_the_clock_on_the_wall_shows_it(self) -> None:
        with zone("Europe/Berlin"):
            for written, meant in {
                "2026-03-29T01:59": "2026-03-29T00:59Z",
                "2026-03-29T02:30": "2026-03-29T01:30Z",  # there is no such time: an hour later
                "2026-03-29T03:00": "2026-03-29T01:00Z",
                "2026-10-25T02:30": "2026-10-25T00:30Z",  # the first of two
                "2026-10-25T02:30+01:00": "2026-10-25T01:30Z",
                "2026-10-25T03:00": "2026-10-25T02:00Z",
            }.items():
                self.assertEqual(queuectl.moment(written), queuectl.moment(meant), written)

    def test_a_clock_that_is_set_back_delays_a_job_by_no_more_and_loses_none(self) -> None:
        for job_id, delay in {"due": 0, "retry": 0, "later": 10}.items():
            self.queue.enqueue("true", id=job_id, delay=delay, priority=int(job_id == "retry"))
        self.assertEqual(self.ends(1).id, "retry")  # again in 2 s
        self.now -= 3600
        self.assertEqual(self.runs(), "due")
        self.now += 3602
        self.assertEqual(self.runs(), "retry")
        self.now += 8
        self.assertEqual(self.runs(), "later")

    def test_claims_cost_the_same_whatever_waits_for_later(self) -> None:
        self.queue.enqueue("true", id="never", delay=5e6)
        for fields in ({"after": ["never"]}, {"delay": 1e6}):
            jobs = [{"command": "true", "priority": 9, **fields}] * 2000
            list(self.queue.enqueue_many([*jobs, {"command": "true"}]))
            self.assertLess(self.steps(self.ends), 15)
        self.assertLess(self.steps(lambda: queuectl.status_facts(self.queue)), 15)


@NEEDS_SHELL
class Queues(Clocked):
    def setUp(self) -> None:
        super().setUp()
        for name, priority in (("gpu", 0), ("cpu", 5), ("default", 9)):
            for number in "12":
                self.queue.enqueue("true", id=name + number, queue=name, priority=priority)

    def test_a_worker_serves_its_queues_by_priority_across_them(self) -> None:
        jobs = [self.next("gpu", "cpu") for _ in range(5)]
        self.assertEqual([job and job.id for job in jobs], ["cpu1", "cpu2", "gpu1", "gpu2", None])
        self.assertEqual(self.next().id, "default1")

    def test_status_and_list_show_and_filter_by_queue(self) -> None:
        listed = self.rows("list", "--queue", "gpu")
        self.assertEqual([job["id"] for job in listed], ["gpu1", "gpu2"])
        self.assertRegex(self.out("list", "--queue", "gpu"), r"gpu1 +pending +gpu +0/3")
        self.assertRegex(self.out("status"), r"\nQUEUE +PENDING.*\n(.*\n)*gpu +2 +0 +0 +0 +0\n")
        queues = self.facts("status")["queues"]
        pending = {name: queue["pending"] for name, queue in queues.items()}
        self.assertEqual(pending, {"cpu": 2, "default": 2, "gpu": 2})
        self.queue.configure("no_retry_exit_codes", "3")
        self.ends(3)
        self.queue.pause("cpu")
        self.assertEqual([self.queue.rate(), self.queue.rate("gpu")], [1 / 60, 0])
        whole, gpu = (
            "\n".join(queuectl.status_text(self.queue, q, full=True)) for q in (None, "gpu")
        )
        self.assertRegex(whole, r"(?s)rate +0\.0 .*paused +cpu\n.*LAST FAILED.*\ndefault1 ")
        self.assertNotRegex(gpu, "paused|FAILED|default")


@NEEDS_SHELL
class Dependencies(Clocked):
    def add(self, *edges: str) -> None:
        """Add jobs, each written as its id and those of its parents."""
        for job_id, *after in map(str.split, edges):
            self.queue.enqueue("true", id=job_id, after=after, max_retries=1)

    def test_a_job_starts_once_all_of_its_parents_have_completed(self) -> None:
        self.add("a", "b", "c a b", "d c", "e a a")
        self.assertEqual((self.ends().id, self.why("c")), ("a", "blocked by b (pending)"))
        self.assertEqual(self.runs(), "b c d e")
        self.add("f a")
        self.assertEqual(self.runs(), "f")

    def test_what_a_completed_parent_frees_wakes_the_pools_at_once(self) -> None:
        self.add("a", "b a")
        bell = queuectl.SYSTEM.bell(self.queue.db.run_dir.file("pool-x", "bell"))
        self.addCleanup(os.close, bell)
        self.ends()
        self.assertEqual(os.read(bell, 9), b"!")

    def test_a_blocked_job_that_is_scheduled_waits_for_both(self) -> None:
        self.add("a")
        self.queue.enqueue("true", id="b", after=["a"], delay=60)
        self.assertEqual((self.runs(), self.why("b")), ("a", "due in 1m"))
        self.now += 60
        self.assertEqual(self.runs(), "b")

    def test_a_line_of_a_batch_may_name_an_id_of_an_earlier_line_only(self) -> None:
        lines = [{"id": job_id, "command": "x", "after": after} for job_id, *after in ("a", "ba")]
        self.assertEqual(list(self.queue.enqueue_many(lines)), ["a", "b"])
        for after in ("d", "e"):
            lines = [{"id": "d", "command": "x", "after": after}, {"id": "e", "command": "x"}]
            with self.assertRaisesRegex(queuectl.BadInput, f"after: no job {after}"):
                self.queue.enqueue_many(lines)
        text = "\n".join(map(json.dumps, lines))
        self.assertIn("line 1: after: no job e", self.refused("enqueue", "-", stdin=text))
        self.assertEqual(self.ids(), "a b")

    def test_a_job_and_what_it_waits_for_are_stored_together(self) -> None:
        self.add("a")
        batch = [{"id": job_id, "command": "x", "after": after} for job_id, after in ("ba", "c?")]
        with self.assertRaises(queuectl.BadInput):
            self.queue.enqueue_many(batch)
        self.assertEqual(self.ids(), "a")
        count = self.queue.db.execute("SELECT count(*) FROM needs").fetchone()
        self.assertEqual(count, (0,))

    def test_a_dead_or_cancelled_parent_keeps_its_child_blocked_until_it_is_retried(self) -> None:
        self.add("a", "b", "c a b", "d c")
        self.ends(1)
        self.queue.cancel(["b"])
        self.assertEqual(self.runs(), "")
        blocked = "blocked by a (dead), b (cancelled)"
        self.each({"c": blocked, "d": "blocked by c (pending)"}, self.why)
        self.assertIn(f"blocked    job c is {blocked}\n", self.out("status"))
        self.assertRegex(self.out("list"), f"c +pending .*{re.escape(blocked)}")
        self.assertRegex(self.out("show", "c"), f"why +{re.escape(blocked)}")
        self.assertEqual(self.facts("show", "c")["after"], ["a", "b"])
        self.queue.retry(["a", "b"])
        self.assertEqual(self.runs(), "a b c d")

    def test_a_job_has_waited_since_nothing_blocks_it_any_more(self) -> None:
        self.add("a", "b a")
        job = self.next()
        self.now += 100
        self.add("c")
        self.now += 100
        self.ends(0, job)
        self.assertEqual(getattr(self.queue.oldest(), "id", None), "c")

    def test_a_cancelled_child_can_be_retried_before_and_after_its_parent(self) -> None:
        self.add("a", "b a", "c a")
        self.queue.cancel(["b", "c"])
        self.queue.retry(["b"])
        self.assertEqual((self.why("b"), self.runs()), ("blocked by a (pending)", "a b"))
        self.queue.retry(["c"])
        self.assertEqual(self.runs(), "c")

    def test_a_job_is_purged_with_what_waits_for_it_in_any_order(self) -> None:
        for order in ("ab", "ba"):
            self.queue.enqueue("true", id="a")
            self.queue.enqueue("true", id="b", after="a")
            self.queue.cancel(["a", "b"])
            self.assertEqual(self.queue.purge(list(order)), 2)

    def test_a_cascade_takes_all_below_along_and_nothing_else(self) -> None:
        self.add("a", "b a", "c b", "d a c", "other")
        self.assertEqual(self.out("cancel", "--cascade", "b").split(), ["b", "c", "d"])
        self.assertEqual(self.runs(), "a other")

    def test_a_cascade_from_a_job_that_has_ended_takes_what_waits_for_it(self) -> None:
        self.add("a", "b a")
        self.queue.cancel(["a"])
        self.queue.enqueue("true", id="c", after=["a"])
        code, out, err = self.told("cancel", "--cascade", "a")
        self.assertEqual((code, out.split(), err), (0, ["a", "b", "c"], ""))
        self.queue.enqueue("true", id="ended")
        self.assertEqual(self.runs(), "ended")
        self.queue.enqueue("true", id="d", after=["ended"])
        code, out, err = self.told("cancel", "--cascade", "ended")
        self.assertEqual((code, out), (1, ""))
        self.assertIn("job ended is completed; it stays so", err)

    def test_a_drain_ends_when_only_blocked_jobs_are_left_and_names_them(self) -> None:
        self.add("a", *(f"b{number} a" for number in range(10)))
        self.now += 1
        self.queue.enqueue("true", id="c", queue="q", after=["a"])
        self.queue.cancel(["a"])
        self.add("other")  # in a queue that is not served
        self.assertIn("job c is blocked by a (cancelled)\n", self.drain("--queue", "q", code=1))
        self.assertEqual(self.runs(), "other")

    def costs(self, size: int) -> dict[str, int]:
        """Return what a parent with so many children, and a chain of so many jobs, costs."""
        self.add("parent")
        jobs = [{"command": "true", "after": "parent"} for _ in range(size)]
        chain = [{"command": "true", "id": f"{size}-{n}", "queue": "chain"} for n in range(size)]
        for before, job in zip(chain, chain[1:]):
            job["after"] = before["id"]
        costs = {
            "children": self.steps(lambda: list(self.queue.enqueue_many(jobs))),
            "chain": self.steps(lambda: list(self.queue.enqueue_many(chain))),
            "parent": self.steps(self.ends),
            "child": self.steps(self.ends),
            "link": self.steps(lambda: self.ends(0, self.next("chain"))),
        }
        self.queue.cancel([f"{size}-1"], cascade=True)
        self.assertEqual(len(self.runs().split()), size - 1)
        self.queue.prune()
        return costs

    def test_children_and_chains_cost_what_their_number_costs_and_no_more(self) -> None:
        few, many = self.costs(30), self.costs(500)
        for what, cost in few.items():
            with self.subTest(what, few=cost, many=many[what]):
                times = 1 if what in ("link", "child") else 24
                self.assertLess(many[what], times * cost + 5)
        self.add("top")
        jobs = [{"command": "true", "id": f"x{n}", "after": f"x{n - 1}"} for n in range(1, 500)]
        list(self.queue.enqueue_many([{"command": "true", "id": "x0", "after": "top"}, *jobs]))
        self.assertEqual(len(self.queue.cancel(["top"], cascade=True)), 501)


@NEEDS_SHELL
class Recurring(Clocked):
    CRON = (  # rule, after, next
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
        ("0 0 13 * fri", "2026-01-03 00:00", "2026-01-09 00:00"),  # either
        ("0 0 13 * fri", "2026-01-09 00:00", "2026-01-13 00:00"),
        ("0 0 */13 * fri", "2026-01-03 00:00", "2026-02-27 00:00"),  # both: the day has a star
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
        ("30 2 * * *", "2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00"),  # once
        ("30 * * * *", "2026-10-25T01:30+02:00", "2026-10-25T02:30+02:00"),  # each hour
        ("30 * * * *", "2026-10-25T02:30+02:00", "2026-10-25T02:30+01:00"),
        ("0 3 * * *", "2026-10-24T03:00+02:00", "2026-10-25T03:00+01:00"),
    )

    def test_rules_name_the_times_that_cron_would(self) -> None:
        for place, cases in {"UTC": self.CRON, "Europe/Berlin": self.CLOCK_CHANGES}.items():
            for rule, after, then in cases:
                with zone(place), self.subTest(rule=rule, after=after):
                    found = queuectl.cron_next(rule, queuectl.moment(after))
                    self.assertEqual(queuectl.iso(found), queuectl.iso(queuectl.moment(then)))

    def test_what_is_no_rule_is_refused(self) -> None:
        for rule in (*NO_RULES, None, 5):
            with self.subTest(rule), self.assertRaisesRegex(ValueError, "^(must|has|names) "):
                queuectl.valid_cron(rule)

    def due(self) -> float:
        """Return in how many seconds the schedule is next due."""
        (job,) = self.queue.recurring()
        return job.run_after - self.now

    def test_the_next_one_is_made_when_the_last_has_ended_by_the_schedule(self) -> None:
        self.assertEqual(self.queue.enqueue("true", id="x", every="15m"), "x")
        for number in (1, 2, 3):
            job = self.next()
            self.assertEqual((job.id, self.next()), (f"x.{number}", None))  # one at a time
            self.now += 60  # that it takes
            self.ends(0, job)
            self.assertEqual((self.due(), self.next()), (840, None))
            self.now += 840
        self.assertEqual((self.queue.get("x").id, self.ids()), ("x.4", "x.1 x.2 x.3 x.4"))

    def test_logs_of_a_schedule_are_those_of_its_last_run(self) -> None:
        self.queue.enqueue("true", id="x.1")
        self.queue.enqueue("true", id="x", every=10)
        ran = Outcome("ran", 1.0, self.now, 0, None, 0, b"output of x.2\n")
        self.queue.finish(self.next(), ran._replace(output=b"another job's\n"))
        self.queue.finish(self.next(), ran)
        self.assertEqual(self.told("logs", "x")[1], "output of x.2\n")

    def test_missed_ones_run_once(self) -> None:
        self.queue.enqueue("true", id="x", every=10)
        self.assertEqual(self.runs(), "x.1")
        self.now += 1005
        self.assertEqual((self.runs(), self.due()), ("x.2", 5))
        with zone("UTC"):
            self.queue.cancel(["x"])
            self.now = 86400 * 100.0
            self.queue.enqueue("true", id="y", cron="@daily")
            self.assertEqual(self.due(), 86400)
            self.now += 86400 * 10.5
            self.assertEqual((self.runs(), self.due()), ("y.1", 43200))

    def test_the_next_one_is_made_in_the_transaction_that_ends_the_last(self) -> None:
        self.queue.enqueue("true", id="x", every=10)
        job, outcome = self.next(), Outcome("ran", self.now, self.now, 0, None)
        cut = mock.patch.object(self.queue, "_claim", side_effect=OSError("the power is cut"))
        with cut, self.assertRaises(OSError):
            self.queue.finish(job, outcome, ())
        self.assertEqual((self.queue.get("x.1").state, self.ids()), ("processing", "x.1"))
        self.queue.finish(job, outcome)
        self.assertEqual((self.queue.finish(job, outcome)[0], self.ids()), (None, "x.1 x.2"))

    def test_each_occurrence_has_its_own_attempts_and_a_dead_one_does_not_end_the_schedule(
        self,
    ) -> None:
        self.queue.enqueue("true", id="x", every=100, max_retries=2, env={"A": "b"}, priority=3)
        for _ in range(2):
            self.assertEqual([(job.id, job.attempts) for job in self.queue.recurring()][-1][1], 0)
            self.ends(1)
            self.now += 2
            self.assertEqual(self.ends(1).state, "dead")
            self.now += 98
        self.assertEqual(self.queue.counts()["dead"], 2)
        self.assertEqual((self.queue.retry(["x.1"]), self.runs()), (["x.1"], "x.1 x.3"))
        first, last = self.queue.get("x.1"), self.queue.get("x")
        same = ("command", "env", "priority", "max_retries", "series", "queue", "cwd")
        self.assertEqual(*([getattr(job, name) for name in same] for job in (first, last)))

    def test_list_shows_the_schedules_and_their_next_times(self) -> None:
        self.out("enqueue", "--id", "x", "--every", "15m", "--delay", "1h30s", "true")
        self.out("enqueue", "--id", "y", "--cron", "@hourly", "true")
        shown = r"x +every 15m +in 1h\d+s +x\.1 +true\ny +@hourly +(in .*|now) y\.1 +true\n"
        self.assertRegex(self.out("list", "--recurring"), shown)
        self.assertEqual([job["series"] for job in self.rows("list", "--recurring")], ["x", "y"])

    def test_who_cancels_one_job_of_a_schedule_is_told_that_all_of_it_ends(self) -> None:
        self.queue.enqueue("true", id="x", every=10)
        said = "queuectl: with it ends schedule x; dlq retry x.1 resumes it\n"
        self.assertEqual(self.told("cancel", "x.1"), (0, "x.1\n", said))
        self.out("dlq", "retry", "x.1")
        self.assertEqual(len(self.queue.recurring()), 1)

    def test_cancel_ends_a_schedule_whether_it_waits_or_runs(self) -> None:
        for every in (10, 20):
            self.queue.enqueue("true", id="x", every=every)
            if every == 20:
                job = self.next()
            self.queue.cancel(["x"])
        self.assertEqual(self.ends(0, job).state, "completed")  # it was faster
        self.assertEqual((self.queue.recurring(), self.ids()), ([], "x.1 x.2"))

    def test_two_schedules_never_go_by_one_name(self) -> None:
        self.queue.enqueue("true", id="x", every=10)
        self.assertEqual(self.queue.enqueue("true", id="x", every=9, if_absent=True), "x")
        for fields in ({"every": 10}, {}):
            with self.assertRaisesRegex(queuectl.BadInput, "there is a job x already"):
                self.queue.enqueue("true", id="x", **fields)
        self.queue.cancel(["x"])
        self.queue.enqueue("true", id="x", every=10)
        with self.assertRaisesRegex(queuectl.QueueError, "schedule x goes on already"):
            self.queue.retry(["x.1"])
        self.queue.cancel(["x"])
        self.assertEqual((self.queue.retry(["x.1"]), len(self.queue.recurring())), (["x.1"], 1))
        self.queue.cancel(["x"])
        self.queue.enqueue("true", id="x")
        with self.assertRaisesRegex(queuectl.QueueError, "its name is taken"):
            self.queue.retry(["x.1"])

    def test_a_number_names_one_job_or_schedule(self) -> None:
        with self.assertRaisesRegex(queuectl.BadInput, "id must not be a number"):
            self.queue.enqueue("true", id="2", every=3600)
        self.assertEqual(self.queue.enqueue("true", id="2"), "2")
        self.assertEqual([self.queue.enqueue("true", every=60) for _ in range(2)], ["3", "4"])
        self.assertEqual([self.queue.enqueue("true") for _ in range(2)], ["5", "6"])
        self.assertEqual(self.queue.enqueue("true", id="8"), "8")
        self.assertEqual(self.queue.enqueue("true", every=60), "9")

    def test_the_name_of_a_schedule_is_no_job_of_another(self) -> None:
        self.queue.enqueue("true", id="x.1", every=3600)
        self.queue.enqueue("true", id="x.3", every=3600)
        self.assertEqual(self.queue.enqueue("true", id="x", every=60), "x")
        self.assertEqual(self.queue.get("x").id, "x.2")
        while self.queue.get("x").id == "x.2":
            self.ends(0)
        self.assertEqual(self.queue.get("x").id, "x.4")

    def test_a_drain_does_not_wait_for_a_future_occurrence_but_for_its_retry(self) -> None:
        self.queue.enqueue("true", id="x", every=1000, max_retries=2)
        self.assertTrue(self.queue.awaited())
        for code, waits in ((1, True), (0, False), (75, True), (0, False)):
            self.ends(code)
            self.assertEqual(bool(self.queue.awaited()), waits, code)
            self.now += 2 if waits else 1000


@NEEDS_SHELL
class ExitCodes(Clocked):
    def test_75_tries_later_after_the_usual_backoff_without_using_an_attempt(self) -> None:
        self.configure(max_snoozes="3")
        self.queue.enqueue("true", id="x", max_retries=2)
        for snoozes, pause in ((1, 2), (2, 4), (3, 8)):
            after = self.ends(75)
            self.assertEqual((after.state, after.attempts, after.snoozes), ("pending", 0, snoozes))
            self.now += pause - 0.1
            self.assertIsNone(self.next())
            self.now += 0.1
        after = self.ends(75)
        self.assertEqual((after.state, after.attempts), ("pending", 1))  # now it counts
        self.now += 2
        after = self.ends(75)
        self.assertEqual((after.state, after.last_error), ("dead", "exit code 75 (try later)"))
        self.queue.retry(["x"])
        self.assertEqual(self.ends(75).snoozes, 1)

    def test_a_crash_after_a_snooze_counts_as_any_other(self) -> None:
        self.queue.enqueue("true", id="x", max_retries=1)
        self.ends(75)
        self.now += 2
        outcome = Outcome("crashed", self.now, self.now, None, "its worker died")
        self.assertEqual(self.queue.finish(self.next(), outcome)[0].state, "dead")

    def test_a_timeout_is_no_snooze_whatever_the_job_says_as_it_is_ended(self) -> None:
        self.queue.enqueue("true", id="x", max_retries=1)
        outcome = Outcome("timed out", self.now, self.now, 75, "timed out after 1 s")
        after = self.queue.finish(self.next(), outcome)[0]
        self.assertEqual((after.state, after.attempts), ("dead", 1))

    def test_the_codes_that_are_final_make_a_job_dead_at_once(self) -> None:
        self.configure(no_retry_exit_codes="2, 126,127")
        for code, state in {2: "dead", 127: "dead", 1: "pending", -2: "pending"}.items():
            self.queue.enqueue("true")
            self.assertEqual(self.ends(code).state, state, code)
        self.queue.enqueue("true")
        timed_out = Outcome("timed out", self.now, self.now, 2, "timed out after 1 s")
        self.assertEqual(self.queue.finish(self.next(), timed_out)[0].state, "pending")
        for bad in ("0", "256", "x", "2;3", "-9"):
            self.assertEqual(self.told("config", "set", "no_retry_exit_codes", bad)[0], 2)
        self.assertEqual(self.out("config", "get", "no_retry_exit_codes"), "2,126,127\n")

    def test_a_job_says_so_by_its_exit_code(self) -> None:
        self.configure(no_retry_exit_codes="2,126,127", backoff_max="0")
        self.enqueue("test -e n || { touch n; exit 75; }", id="later", max_retries=1)
        self.enqueue("./not-there", id="final")
        self.enqueue("true", id="every", every="1h")  # is not waited for
        self.drain(code=1)
        found = [(job.state, job.attempts, job.run) for job in map(self.job, ("later", "final"))]
        self.assertEqual(found, [("completed", 1, 2), ("dead", 1, 1)])


@NEEDS_SHELL
class Why(Clocked):
    def test_a_job_that_does_not_run_says_why_in_one_line(self) -> None:
        for job_id, fields in {
            "first": {"run_at": 9e5},
            "x": {},
            "later": {"delay": 7200},
            "gpu": {"queue": "gpu"},
            "seven": {"queue": "cpu", "priority": 1, "max_retries": 1},
            "child": {"after": "seven"},
        }.items():
            self.queue.enqueue("true", id=job_id, **fields)
        self.assertEqual(self.next("cpu").id, "seven")
        alone = {
            "x": "no worker is running",
            "child": "blocked by seven (processing)",
            "seven": "its worker is gone; start one",
        }
        self.each(alone, self.why)
        self.ends(1, self.queue.get("seven"))
        held = queuectl.LockFile(self.queue.db.run_dir.file("pool-1"))
        held.note(queues=["default"])
        self.addCleanup(held.close)
        served = {"first": "next to run", "x": "1 job before it", "later": "due in 2h"}
        others = {"gpu": "no worker serves queue gpu", "child": "blocked by seven (dead)"}
        self.each({**served, **others, "seven": ""}, self.why)
        self.assertRegex(self.out("show", "gpu"), r"\nwhy +no worker serves queue gpu\n")
        self.queue.pause("gpu")
        self.each({"gpu": "queue gpu is paused", "x": "1 job before it"}, self.why)
        self.queue.pause()
        self.assertEqual(self.why("x"), "all queues are paused")
        for _ in range(311):
            self.queue.enqueue("true", priority=1)
        self.queue.resume()
        self.assertEqual(self.why("x"), "312 jobs before it")
        self.queue.enqueue("true", id="last", after=["x", "later", "gpu", "first", "child"])
        self.assertRegex(
            self.why("last"), r"blocked by \w+ \(\w+\), \w+ \(\w+\), \w+ \(\w+\) and 2 more"
        )
        self.write(self.queue.db.run_dir.file("pool-1.stop"))
        self.assertEqual(self.why("x"), "all workers are leaving")


class Migration(Case):
    """A database of the first schema, as that version left it."""

    DUMP = """
PRAGMA application_id = 0x51554354;
CREATE TABLE jobs (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  queue TEXT NOT NULL,
  command TEXT NOT NULL,
  cwd TEXT NOT NULL,
  env TEXT,
  state TEXT NOT NULL,
  priority INTEGER NOT NULL,
  attempts INTEGER NOT NULL DEFAULT 0,
  max_retries INTEGER,
  timeout REAL,
  created_at REAL NOT NULL,
  updated_at REAL NOT NULL,
  run_after REAL NOT NULL,
  locked_by TEXT,
  locked_at REAL,
  exit_code INTEGER,
  last_error TEXT,
  run INTEGER NOT NULL DEFAULT 0,
  cancelling INTEGER NOT NULL DEFAULT 0,
  due INTEGER NOT NULL
);
CREATE INDEX jobs_due ON jobs (queue, priority DESC, run_after, seq)
  WHERE state = 'pending' AND due = 1;
CREATE INDEX jobs_later ON jobs (queue, run_after) WHERE state = 'pending' AND due = 0;
CREATE INDEX jobs_state ON jobs (state, updated_at);
CREATE TABLE attempts (
  job INTEGER NOT NULL,
  run INTEGER NOT NULL,
  worker TEXT NOT NULL,
  started REAL NOT NULL,
  finished REAL NOT NULL,
  exit_code INTEGER,
  error TEXT,
  cut INTEGER NOT NULL,
  output BLOB NOT NULL,
  PRIMARY KEY (job, run)
) WITHOUT ROWID;
CREATE TABLE config (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE counts (
  queue TEXT NOT NULL, state TEXT NOT NULL, jobs INTEGER NOT NULL, PRIMARY KEY (queue, state)
) WITHOUT ROWID;
CREATE TRIGGER count_added AFTER INSERT ON jobs BEGIN
  INSERT INTO counts VALUES (new.queue, new.state, 1)
    ON CONFLICT (queue, state) DO UPDATE SET jobs = jobs + 1;
END;
CREATE TRIGGER count_moved AFTER UPDATE OF state ON jobs WHEN old.state <> new.state BEGIN
  UPDATE counts SET jobs = jobs - 1 WHERE queue = old.queue AND state = old.state;
  INSERT INTO counts VALUES (new.queue, new.state, 1)
    ON CONFLICT (queue, state) DO UPDATE SET jobs = jobs + 1;
END;
CREATE TRIGGER count_gone AFTER DELETE ON jobs BEGIN
  UPDATE counts SET jobs = jobs - 1 WHERE queue = old.queue AND state = old.state;
END;
PRAGMA user_version = 1;
INSERT INTO jobs VALUES(1,'done','default','true','/',NULL,'completed',0,1,NULL,NULL,100.0,130.0,
  100.0,NULL,NULL,0,NULL,1,0,1);
INSERT INTO jobs VALUES(2,'bad','default','exit 1','/','{"A": "b"}','dead',5,1,1,60.0,130.0,140.0,
  130.0,NULL,NULL,1,'exit code 1',1,0,1);
INSERT INTO jobs VALUES(3,'off','gpu','true','/',NULL,'cancelled',0,0,NULL,NULL,130.0,130.0,
  630.0,NULL,NULL,NULL,NULL,0,0,0);
INSERT INTO jobs VALUES(4,'busy','default','true','/',NULL,'processing',1,1,NULL,NULL,130.0,130.0,
  130.0,'worker-gone-1',130.0,NULL,NULL,1,0,1);
INSERT INTO jobs VALUES(5,'5','default','echo now','/',NULL,'pending',0,0,NULL,NULL,130.0,130.0,
  130.0,NULL,NULL,NULL,NULL,0,0,1);
INSERT INTO jobs VALUES(6,'then','gpu','true','/',NULL,'pending',9,0,NULL,NULL,130.0,130.0,
  9000000000.0,NULL,NULL,NULL,NULL,0,0,0);
INSERT INTO attempts VALUES(1,1,'worker-a-1',100.0,130.0,0,NULL,0,X'6F75740A');
INSERT INTO attempts VALUES(2,1,'worker-a-1',130.0,140.0,1,'exit code 1',0,X'');
INSERT INTO config VALUES('max_retries','4');
"""

    def setUp(self) -> None:
        super().setUp()
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            db.executescript("PRAGMA journal_mode = WAL;" + self.DUMP)
        os.chmod(self.path, 0o600)

    def test_whoever_opens_it_first_finds_everything_as_it_was(self) -> None:
        for readonly in (True, False):
            with self.subTest(readonly=readonly), Queue(self.path, readonly=readonly) as queue:
                jobs = [(job.id, job.state, job.due) for job in queue.jobs()]
                states = "completed dead cancelled processing pending pending".split()
                ids = "done bad off busy 5 then".split()
                self.assertEqual(jobs, list(zip(ids, states, (1, 1, 1, 1, 1, 0))))
                self.assertEqual(list(queue.counts().values()), [2, 1, 1, 1, 1])
                bad = queue.get("bad")
                self.assertEqual((bad.env, bad.last_error), ('{"A": "b"}', "exit code 1"))
                self.assertEqual(queue.attempts(queue.get("done"))[0].output, b"out\n")
                self.assertEqual(queue.config()["max_retries"], 4)

    @NEEDS_SHELL
    def test_its_jobs_run_and_what_came_later_works(self) -> None:
        self.assertRegex(self.out("status"), r"pending +2  \(1 due, 1 scheduled, 0 blocked\)\n")
        self.enqueue("echo child", after=["5", "busy"], id="child")
        self.drain("--horizon", "1m", "--count", "2")
        with Queue(self.path) as queue:
            self.assertEqual(list(queue.counts().values()), [1, 0, 4, 1, 1])
            self.assertEqual((queue.get("busy").run, queue.get("child").state), (2, "completed"))
            self.assertEqual((queue.retry(["bad", "off"]), queue.prune()), (["bad", "off"], 4))
            tally = sorted(tuple(row) for row in queue.tally())
            left = [
                ("default", "pending", 1, 1),
                ("gpu", "pending", 0, 1),
                ("gpu", "pending", 1, 1),
            ]
            self.assertEqual(tally, left)


# --- the README -----------------------------------------------------------------------------------


# --- the file itself ------------------------------------------------------------------------------


class Layout(unittest.TestCase):
    """How queuectl.py reads: from top to bottom, and everything in its place."""

    def test_each_promise_has_tests_that_name_it(self) -> None:
        with open(__file__, encoding="utf-8") as file:
            tree = ast.parse(file.read())
        told = re.findall(r"(?m)^(\d)\. ", ast.get_docstring(tree) or "")
        docs = [ast.get_docstring(n) or "" for n in ast.walk(tree) if hasattr(n, "decorator_list")]
        named = {found[1] for found in (re.match(r"Promise (\d)", doc) for doc in docs) if found}
        self.assertEqual((told, sorted(named)), (list("12345678"), list("12345678")))

    @classmethod
    def setUpClass(cls) -> None:
        with open(PROGRAM, encoding="utf-8") as file:
            cls.source = file.read()
        cls.tree = ast.parse(cls.source)

    def section(self, node: ast.AST) -> str:
        """Return the title of the section that a node is in."""
        lines = self.source.splitlines()[: node.lineno]
        titles = [line for line in lines if line.startswith("# --- ")]
        return titles[-1].strip("# -").partition(":")[0] if titles else ""

    def found(self, wanted: Callable[[ast.AST], Any]) -> set[str]:
        """Return the sections in which there is a node like that."""
        return {self.section(node) for node in ast.walk(self.tree) if wanted(node)}

    def test_sql_stands_in_its_section(self) -> None:
        verb = r"\s*(SELECT|INSERT|UPDATE|DELETE|CREATE|PRAGMA|BEGIN|COMMIT) [^\n]"
        is_sql = lambda n: isinstance(n, ast.Constant) and re.match(verb, str(n.value))  # noqa: E731
        self.assertEqual(self.found(is_sql), {"SQL"})

    def test_only_the_command_line_prints(self) -> None:
        prints = lambda n: isinstance(n, ast.Name) and n.id == "print"  # noqa: E731
        self.assertEqual(self.found(prints), {"command line"})

    def test_only_the_system_kills_and_handles_signals(self) -> None:
        calls = {"os.kill", "signal.signal", "signal.pthread_sigmask", "signal.set_wakeup_fd"}
        named = lambda n: isinstance(n, ast.Attribute) and ast.unparse(n) in calls  # noqa: E731
        if sys.version_info >= (3, 9):
            self.assertEqual(self.found(named), {"system"})

    def test_nothing_but_the_standard_library_is_imported_and_little_at_once(self) -> None:
        imports = [n for n in ast.walk(self.tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
        names = {
            name.partition(".")[0]
            for node in imports
            for name in (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
        }
        if sys.version_info >= (3, 10):
            self.assertLessEqual(names, sys.stdlib_module_names)
        code = "import sys; before = set(sys.modules); import queuectl"
        code += "; print(*set(sys.modules) - before)"
        loaded = subprocess.check_output([*PYTHON, "-c", code], cwd=HERE, text=True).split()
        slow = {"argparse", "subprocess", "multiprocessing", "difflib", "socket", "ctypes"}
        self.assertEqual(slow & set(loaded), set())

    @unittest.skipIf(sys.version_info < (3, 11), "its symbols include those of annotations")
    def test_each_definition_uses_only_what_stands_above_it(self) -> None:
        places: dict[str, int] = {}
        for node in self.tree.body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            for name in [getattr(node, "name", None)] + [getattr(t, "id", None) for t in targets]:
                places.setdefault(str(name), node.lineno)
        later = set()

        def look(table: symtable.SymbolTable, at: int) -> None:
            for symbol in table.get_symbols():
                used = symbol.is_global() and symbol.is_referenced()
                if used and places.get(symbol.get_name(), 0) > at:
                    later.add((table.get_name(), symbol.get_name()))
            for child in table.get_children():
                look(child, at)

        for child in symtable.symtable(self.source, "queuectl.py", "exec").get_children():
            look(child, places.get(child.get_name(), child.get_lineno()))
        self.assertEqual(later, set())

    def test_no_function_is_longer_than_forty_lines(self) -> None:
        sizes = [
            (node.end_lineno - node.lineno + 1, node.name)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.FunctionDef)
        ]
        self.assertLessEqual(max(sizes)[0], 40, max(sizes))
        short = sum(size <= 20 for size, _ in sizes)
        self.assertGreater(short / len(sizes), 0.9)


# --- inside of other programs ---------------------------------------------------------------------


SHOP = """
import os, signal, sqlite3, sys
from queuectl import Queue
queue = Queue("shop.db", guest=True)
with queue.transaction() as db:
    db.execute("INSERT INTO orders VALUES (1, 'tea')")
    queue.enqueue("true", id="invoice-1")
with queue.transaction() as db:
    db.execute("INSERT INTO orders VALUES (2, 'cake')")
    queue.enqueue("true", id="invoice-2")
    print("told", flush=True)
    os.kill(os.getpid(), signal.SIGKILL if sys.argv[1:] else 0)
"""
APP = """
from vendor.queuectl import Queue, work
with Queue("jobs.db") as queue:
    job = queue.enqueue("echo vendored")
    code, done = work("jobs.db", count=2, drain=True), queue.get(job)
    print(code, done.state, queue.attempts(done)[0].output)
"""


@NEEDS_SHELL
class Guest(Case):
    """The order and its job, or neither: in a database that belongs to another program."""

    def setUp(self) -> None:
        super().setUp()
        self.path = os.environ["QUEUECTL_DB"] = self.file("shop.db")
        self.execute(
            "PRAGMA user_version = 7", "CREATE TABLE orders (id INTEGER PRIMARY KEY, what)"
        )

    def execute(self, *statements: str) -> list[Any]:
        """Do something with the database as its program does; return a column of what it found."""
        with contextlib.closing(sqlite3.connect(self.path)) as db, db:
            found = [db.execute(sql).fetchall() for sql in statements]
        return [row[0] for row in found[-1]]

    def test_both_are_stored_or_neither_if_the_program_is_killed_between(self) -> None:
        self.script(SHOP, "killed")
        self.assertEqual(self.execute("SELECT id FROM orders"), [1])
        self.assertEqual(self.execute("SELECT id FROM jobs"), ["invoice-1"])

    def test_a_guest_that_comes_first_leaves_the_numbers_of_the_file_to_its_program(self) -> None:
        for name in ("new.db", "empty.db"):
            self.path = self.file(name)
            if name == "empty.db":
                self.write(name)
            Queue(self.path, guest=True).db.close()
            self.execute("PRAGMA user_version = 7", "CREATE TABLE orders (id)")
            self.assertEqual(self.execute("PRAGMA application_id"), [0])
            with Queue(self.path, guest=True) as queue, Queue(self.path) as same:
                self.assertEqual(queue.enqueue("true"), same.get("1").id)

    def test_a_reader_does_not_keep_the_tables_from_being_made_for_good(self) -> None:
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM orders").fetchall()
            with futures.ThreadPoolExecutor() as thread:
                opened = thread.submit(Queue, self.path, guest=True)
                with self.assertRaises(futures.TimeoutError):
                    opened.result(0.3)
                reader.execute("COMMIT")
                self.assertEqual(list(opened.result(10).jobs()), [])

    def test_an_error_undoes_both_and_a_refused_batch_undoes_only_itself(self) -> None:
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

    def test_the_program_keeps_its_numbers_and_workers_find_the_queue(self) -> None:
        self.assertIn("another program's", self.refused("list", code=4))
        self.assertEqual(self.script(SHOP).returncode, 0)
        self.assertEqual(self.execute("PRAGMA user_version"), [7])
        self.assertEqual(self.execute("PRAGMA application_id"), [0])
        self.drain()
        self.assertEqual(self.execute("SELECT state FROM jobs"), ["completed"] * 2)

    def test_a_table_of_the_same_name_is_refused_and_nothing_is_left(self) -> None:
        self.execute("CREATE TABLE needs (mine)")
        with self.assertRaisesRegex(queuectl.Fault, "needs already exists"):
            Queue(self.path, guest=True)
        names = self.execute("SELECT name FROM sqlite_master ORDER BY name")
        self.assertEqual(names, ["needs", "orders"])
        self.assertEqual(self.execute("PRAGMA journal_mode"), ["delete"])

    def test_another_programs_own_settings_make_it_no_queue(self) -> None:
        for columns, values in (("key, value", "'schema', '1'"), ("name", "'queuectl_schema'")):
            table, row = f"CREATE TABLE config ({columns})", f"INSERT INTO config VALUES ({values})"
            with self.subTest(columns):
                self.execute("DROP TABLE IF EXISTS config", table, row)
                self.assertIn("another program's", self.refused("worker", "start", code=4))


@NEEDS_SHELL
class Vendored(Case):
    """One file, however it got here, and under whatever name."""

    def run_app(self, *words: str) -> str:
        done = self.process(*PYTHON, *words)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        return str(done.stdout)

    def test_it_works_under_another_name_and_prints_nothing(self) -> None:
        os.mkdir(self.file("vendor"))
        shutil.copy(PROGRAM, self.file("vendor"))
        self.write("app.py", APP)
        for flags in ((), ("-W", "error", "-X", "dev")):
            self.assertEqual(self.run_app(*flags, "app.py"), "0 completed b'vendored\\n'\n")

    @SLOW
    def test_it_runs_from_wherever_it_lies(self) -> None:
        os.mkdir(self.file("lib"))
        shutil.copy(PROGRAM, self.file("lib"))
        os.symlink("lib/queuectl.py", self.file("jobs"))
        archive = shutil.make_archive(self.file("lib"), "zip", self.file("lib"))
        os.chmod(self.file("lib"), 0o500)
        self.addCleanup(os.chmod, self.file("lib"), 0o700)
        os.environ["PYTHONPATH"] = archive
        main = "import queuectl, sys; sys.exit(queuectl.main())"
        for words in (("-I", "lib/queuectl.py"), ("jobs",), ("-m", "queuectl"), ("-c", main)):
            with self.subTest(words):
                job = self.run_app(*words, "enqueue", "echo $0").strip()
                self.run_app(*words, "worker", "start", "--drain", "--quiet")
                self.assertEqual(self.run_app(*words, "logs", job), "/bin/sh\n")

    @unittest.skipIf(sys.version_info < (3, 11), "PYTHONSAFEPATH came with Python 3.11")
    def test_what_lies_in_the_current_directory_is_not_taken_for_it(self) -> None:
        self.write("queuectl.py", "open('loaded', 'w')\n")
        self.run_app(PROGRAM, "enqueue", "true")
        self.run_app(PROGRAM, "worker", "start", "--drain", "--quiet")
        self.assertFalse(os.path.exists(self.file("loaded")))

    def test_a_program_that_uses_it_is_checked_by_its_types(self) -> None:
        if not shutil.which("mypy"):
            self.skipTest("there is no mypy")
        shutil.copy(PROGRAM, self.dir)
        self.write("app.py", APP.replace("vendor.", "") + "reveal_type(done.exit_code)\n")
        done = self.process("mypy", "--strict", "app.py")
        self.assertRegex(done.stdout, r"(int \| None|Union\[.*int.*None\])")
        self.assertEqual(done.returncode, 0, done.stdout)

    def test_a_fork_and_a_thread_have_connections_of_their_own(self) -> None:
        with Queue(self.path) as queue:
            queue.enqueue("true")
            ours, child = queue.db.connection, os.fork()
            if not child:
                os._exit(queue.enqueue("true") != "2" or queue.db.connection is ours)
            self.assertEqual(os.waitpid(child, 0)[1], 0)
            self.assertEqual([queue.enqueue("true"), queue.counts()["pending"]], ["3", 3])
            theirs: list[sqlite3.Connection] = []
            thread = threading.Thread(target=lambda: theirs.append(queue.db.connection))
            thread.start()
            thread.join()
            self.assertIsNot(theirs[0], ours)

    FORKED = """if True:
        import glob, os, subprocess, sys, threading
        from queuectl import Queue, QueueError
        queue, other = Queue("queuectl.db"), Queue("queuectl.db")
        told, heard = os.pipe(), os.pipe()
        queue.enqueue("true", id="before"), other.counts()
        if not os.fork():
            queue.enqueue("true", id="child")
            os.write(told[1], b".")
            os.read(heard[0], 1)
            other.enqueue("true", id="child-2")
            os._exit(0)
        os.read(told[0], 1)
        queue.db.close(), other.db.close()
        subprocess.run([sys.executable, sys.argv[1], "enqueue", "--id", "stranger", "true"])
        os.write(heard[1], b".")
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
        over, begun = threading.Event(), threading.Event()
        thread = threading.Thread(target=lambda: (queue.counts(), begun.set(), over.wait()))
        thread.start()
        begun.wait()
        print(refused())
        over.set()
        thread.join()
        cursor = queue.db.connection.execute("SELECT * FROM jobs")
        cursor.fetchone()  # and no more
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
                sys.exit()  # in the transaction of its parent
            os.waitpid(child, 0)
        list(queue.enqueue_many(jobs()))
        """

    @unittest.skipUnless(hasattr(os, "fork"), "there are no forks here")
    def test_what_a_child_of_a_fork_enqueues_outlives_its_parents_connections(self) -> None:
        """Promise 1: SQLite's own idea of its locks is not inherited."""
        told = self.script(self.FORKED, PROGRAM)
        self.assertEqual(told.stdout, "stranger\n4\n4\n[]\n", told.stderr)
        ids = ["before", "child", "stranger", "child-2", "inside", "after"]
        with Queue(self.path) as queue:
            self.assertEqual([job.id for job in queue.jobs()][:6], ids)
            self.assertEqual(queue.counts()["pending"], 10_006)

    FORKED_TWICE = """if True:
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
        def another():  # the last that is called before a fork, since it was registered first
            if threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=fork)
                thread.start()
                thread.join()
        os.register_at_fork(before=another)
        queue = Queue("queuectl.db")
        with queue.transaction():
            print(fork())
        """

    @unittest.skipUnless(hasattr(os, "fork"), "there are no forks here")
    def test_a_fork_of_another_thread_at_the_same_moment_changes_nothing(self) -> None:
        self.assertEqual(self.script(self.FORKED_TWICE).stdout, "4\n")

    FORKING = """if True:
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

    @NEEDS_SHELL
    def test_a_pool_whose_thread_forks_sees_what_others_change(self) -> None:
        self.script(self.FORKING, timeout=20)
        with Queue(self.path) as queue:
            self.assertEqual(queue.get("x").state, "cancelled")

    def test_pools_of_two_queues_run_in_the_threads_of_one_process(self) -> None:
        paths, main = [self.file("a.db"), self.file("b.db")], sys.modules["__main__"]
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

    COMPLETION = {  # t completes the last of its words
        "bash": """source <("$@" completion bash)
            t() { COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); _queuectl; echo ${COMPREPLY[*]}; }""",
        "zsh": """compdef() { :; }
            compadd() { shift; for w; [[ $w == $last* ]] && print -n -- "$w "; echo; }
            source <("$@" completion zsh)
            t() { words=("$@"); CURRENT=$#; last=$words[-1]; _queuectl; }""",
        "fish": """$argv completion fish | source
            function t; complete -C "$argv" | string join ' '; end""",
    }

    def test_words_are_completed_in_each_shell(self) -> None:
        lines = (
            "t queuectl wor",
            "t queuectl --db x worker st",
            "t queuectl show 7 --",
            "t queuectl config list --j",
        )
        for shell, script in self.COMPLETION.items():
            if shutil.which(shell):
                with self.subTest(shell):
                    argv = [shell, "-c", "\n".join((script, *lines)), *["-"] * (shell != "fish")]
                    told = self.process(*argv, *PYTHON, PROGRAM).stdout.splitlines()
                    words = [["worker"], ["start", "stop"], ["--json"], ["--json"]]
                    self.assertEqual([line.split() for line in told], words)


@unittest.skipIf(
    sys.platform == "linux" and "QUEUECTL_SLOW" not in os.environ,
    "other tests say the same of Linux: QUEUECTL_SLOW=1 runs it here, too",
)
class AnySystem(Case):
    """The promises on whatever system this is: the jobs are Python programs, as are the shells."""

    REAL = True
    BEAT = """
import os, subprocess, sys, time
if sys.argv[2:]: subprocess.Popen([sys.executable, *sys.argv[:2]])
open(f'{sys.argv[1]}.{os.getpid()}.began', 'w').close()
while True:
    print('beat', flush=True)
    time.sleep(0.05)
    with open(sys.argv[1], 'a') as file: file.write('.')
"""

    def setUp(self) -> None:
        super().setUp()
        self.dir = self.file("a b \u00e9")  # a path that needs quotes
        self.path = self.file("queuectl.db")
        os.mkdir(self.dir)
        self.write("beat.py", self.BEAT)

    def python(self, *words: str, **fields: Any) -> str:
        """Add a job that runs Python."""
        options = [word for key, value in fields.items() for word in (f"--{key}", str(value))]
        return self.out("enqueue", *options, "--", sys.executable, *words).strip()

    def pool(self, *args: str, **more: Any) -> Any:
        flags = 0x200 if os.name == "nt" else 0  # a process group of its own: it gets no Ctrl-C
        return super().pool(*args, creationflags=flags, **more)

    def began(self, name: str, processes: int = 2) -> None:
        began = lambda: [f for f in os.listdir(self.dir) if f.startswith(name + ".")]  # noqa: E731
        until(lambda: len(began()) >= processes)

    def silent(self, name: str) -> bool:
        """Tell whether a beat has ended: every process of its job is gone."""
        size = os.path.getsize(self.file(name))
        time.sleep(0.3)
        return os.path.getsize(self.file(name)) == size

    def shown(self, job: str) -> Any:
        return self.facts("show", job)

    def test_jobs_run_and_their_output_and_exit_codes_are_kept(self) -> None:
        good = self.python("-c", "import os; print('caf\u00e9', os.environ['QUEUECTL_JOB_ID'])")
        bad = self.python("-c", "raise SystemExit(3)", **{"max-retries": 2})
        self.out("config", "set", "backoff_base", "1")
        pool = self.pool("--count", "2", "--drain")
        self.assertIn("dead: exit code 3", pool.communicate(timeout=60)[0])
        self.assertEqual(pool.returncode, 1)
        self.assertIn(f"{good}", self.out("logs", good))
        self.assertEqual([run["exit_code"] for run in self.shown(bad)["runs"]], [3, 3])
        self.assertEqual(self.shown(good)["state"], "completed")

    def test_the_words_of_a_command_reach_it_exactly(self) -> None:
        words = ["a b", "c&d", "50%", 'e"f&g"', "^h|i", "(j)>k", "l\\", "$m;'n'", "", "!o!"]
        self.write("words.py", "import json, sys; print(json.dumps(sys.argv[1:]))")
        job = self.python("words.py", *words)
        self.pool("--drain").communicate(timeout=60)
        self.assertEqual(json.loads(self.out("logs", job)), words)

    def test_a_timeout_and_a_cancel_end_the_whole_tree(self) -> None:
        self.out("config", "set", "kill_grace", "0.5")
        timed = self.python("beat.py", "timed", "tree", timeout=1.5, **{"max-retries": 1})
        called = self.python("beat.py", "called", "tree")
        self.pool("--count", "2")
        self.began("called")
        self.assertEqual(self.out("cancel", called).strip(), called)
        self.assertTrue(self.silent("called"))
        self.assertEqual(self.shown(called)["state"], "cancelled")
        until(lambda: self.shown(timed)["state"] == "dead", 20)
        self.assertIn("timed out", self.shown(timed)["last_error"])
        self.assertTrue(self.silent("timed"))

    def test_a_killed_workers_job_runs_again_when_its_tree_is_gone(self) -> None:
        job = self.python("beat.py", "beat", "tree", **{"max-retries": 2})
        self.pool()
        self.began("beat")
        os.kill(self.facts("worker", "list")["pid"], 9)
        self.began("beat", 4)
        self.assertEqual([run["error"] for run in self.shown(job)["runs"]], ["its worker died"])
        self.out("worker", "stop", "--now")
        self.assertTrue(self.silent("beat"))
        self.assertEqual((self.shown(job)["state"], self.shown(job)["attempts"]), ("pending", 1))

    def test_everything_killed_runs_again_at_the_next_start(self) -> None:
        job = self.python("beat.py", "beat", "tree")
        pool = self.pool()
        self.began("beat")
        worker = self.facts("worker", "list")
        for pid in (pool.pid, worker["pid"]):
            os.kill(pid, 9)
        self.pool()
        self.began("beat", 4)
        self.out("worker", "stop", "--now")
        self.assertTrue(self.silent("beat"))
        self.assertEqual(len(self.shown(job)["runs"]), 2)

    def test_a_running_job_is_followed_and_a_stop_lets_it_finish(self) -> None:
        code = "import time; print('one', flush=True); time.sleep(1); print('two')"
        job = self.python("-c", code)
        pool = self.pool()
        until(lambda: self.shown(job)["state"] == "processing")
        followed = self.start("logs", "-f", job)
        self.out("worker", "stop")
        self.assertEqual(followed.communicate(timeout=20)[0].split(), ["one", "two"])
        self.assertEqual(self.shown(job)["state"], "completed")
        self.assertEqual((pool.wait(10), self.out("worker", "list", "--json")), (0, ""))

    def test_the_shell_is_a_setting_here_too(self) -> None:
        python = f'"{sys.executable}"' if os.name == "nt" else shlex.quote(sys.executable)
        self.out("config", "set", "shell", python + " -c")
        job = self.out("enqueue", "print(6 * 7)").strip()
        self.assertEqual(self.pool("--drain").wait(30), 0)
        self.assertEqual(self.out("logs", job).split(), ["42"])

    def test_a_pool_in_the_background_is_found_and_stopped(self) -> None:
        job = self.out("enqueue", "exit 0").strip()
        self.assertIn("its log is", self.run_cli("worker", "start", "--detach").stderr)
        self.assertEqual(self.run_cli("wait", job, "--timeout", "20").returncode, 0)
        self.out("worker", "stop")
        self.assertEqual(self.out("worker", "list", "--json"), "")


@unittest.skipUnless(sys.platform == "linux", "what other systems lack is taken away from Linux")
class AsOnMacOS(AnySystem):
    """No /proc to look into and no fork server, as on macOS."""

    def setUp(self) -> None:
        super().setUp()
        with open(PROGRAM) as file:
            source = file.read()
        for has, lacks in (
            ('PROC = sys.platform == "linux"', "PROC = False"),
            ('forks = "forkserver" in', 'forks = "no such method" in'),
            ("ctypes.CDLL(None).fallocate64", "ctypes.CDLL(None).no_such_function"),
        ):
            self.assertEqual(source.count(has), 1, has)
            source = source.replace(has, lacks)
        self.PROGRAM = self.file("queuectl.py")
        with open(self.PROGRAM, "w") as file:
            file.write(source)


@NEEDS_SHELL
class Readme(Case):
    """What the README says is what the program does."""

    @staticmethod
    def normal(text: str) -> str:
        """Take out what differs from one run to the next."""
        text = re.sub(r"\d\d:\d\d:\d\d", "TIME", text)
        text = re.sub(r"in [\d.]+ s\n", "in N s\n", text)
        text = re.sub(r"  (now|\d+ s ago) +", "  AGO  ", text)
        return re.sub(r"WHEN +", "WHEN  ", re.sub(r"/\S*/queuectl\.db", "/queuectl.db", text))

    def setUp(self) -> None:
        super().setUp()
        shutil.copy(PROGRAM, self.dir)
        os.mkdir(self.file("bin"))
        os.symlink(sys.executable, self.file("bin/python3"))
        os.environ.update(PATH=f"{self.dir}/bin:{os.environ['PATH']}", LC_ALL="C")

    def example(self, section: str, number: int = 0) -> str:
        """Return an example of a section."""
        text = readme().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
        return re.findall(r"(?s)```[a-z]+\n(.*?)```", text)[number]

    def test_its_example_for_ci_has_the_tails_of_what_failed_and_an_exit_code(self) -> None:
        os.environ["TMPDIR"] = self.dir
        self.write("bin/make", '#!/bin/sh\necho "making $1"; test "$1" != "$BROKEN"\n')
        os.chmod(self.file("bin/make"), 0o755)
        example = self.example("In CI").replace('"max_retries": 2', '"max_retries": 1')
        for broken, job, code in (("nothing", "", 0), ("test", "unit", 1), ("e2e", "e2e", 1)):
            with self.subTest(broken):
                done = self.process("sh", "-c", example, env={**os.environ, "BROKEN": broken})
                told = f"--- {job} failed:\nmaking {broken}\n" * code
                self.assertEqual((done.returncode, done.stdout), (code, "unit\ne2e\n" + told))

    def test_its_examples_of_the_library_run(self) -> None:
        self.write("bin/send-invoice", "")
        first, second = (self.example("As a library", number) for number in (0, 1))
        first = first.replace("make all", "true").replace("delay=10", "delay=0.1")
        self.assertEqual(self.script(first).stdout, "completed\n")
        with contextlib.closing(sqlite3.connect(self.file("shop.db"))) as db:
            db.execute("CREATE TABLE orders (id INTEGER, what TEXT)")
            self.script("from queuectl import Queue\n" + second)
            self.assertEqual(db.execute("SELECT * FROM orders").fetchall(), [(42, "tea")])
            self.assertEqual(db.execute("SELECT id FROM jobs").fetchall(), [("invoice-42",)])

    def test_its_session_runs_as_it_is_printed(self) -> None:
        session = readme().partition("```console\n")[2].partition("```")[0]
        for part in session.split("$ ")[1:]:
            command, _, printed = part.partition("\n")
            done = self.process("sh", "-c", f"{{ {command}; }} 2>&1")
            with self.subTest(command):
                self.assertEqual(self.normal(done.stdout), self.normal(printed))

    def test_every_command_is_documented_and_every_documented_one_exists(self) -> None:
        documented = re.findall(r"^\| `queuectl ((?:[a-z]+ ?)+)", readme(), re.MULTILINE)
        self.assertEqual({words.strip() for words in documented}, set(queuectl.COMMANDS))

    def test_every_setting_and_field_and_option_is_documented(self) -> None:
        for name in (*queuectl.SETTINGS, *queuectl.FIELDS, *queuectl.STATES):
            self.assertTrue(f"`{name}`" in readme(), name)
        for command in queuectl.COMMANDS.values():
            for names, _ in command.arguments:
                if names[0].startswith("--"):
                    self.assertIn(names[0], readme())


# --- speed: what the figures rest on --------------------------------------------------------------


class Speed(Live):
    """That the cheap way is taken, by facts that a busy machine does not change."""

    def test_who_is_slow_to_take_a_list_does_not_hold_up_the_log(self) -> None:
        with Queue(self.path) as queue, Queue(self.path, readonly=True) as reader:
            queue.enqueue_many({"command": "true"} for _ in range(2500))
            jobs = reader.jobs()
            seen = [next(jobs).seq]
            queue.enqueue("true")
            self.assertEqual(queue.db.execute(queuectl.TRUNCATE_WAL).fetchone()[0], 0)
            seen += [job.seq for job in jobs]
            self.assertEqual(seen, list(range(1, 2502)))

    def test_so_does_who_is_slow_to_take_the_ids_of_a_batch(self) -> None:
        with Queue(self.path) as queue:
            jobs = [{"command": "true"} for _ in range(2500)]
            jobs[7]["id"] = jobs[2400]["id"] = "taken"
            ids = queue.enqueue_many(jobs, if_absent=True)
            taken = [next(ids)]
            self.assertEqual(queue.db.execute(queuectl.TRUNCATE_WAL).fetchone()[0], 0)
            taken += ids
        numbers = [str(n) for n in range(1, 2500) if n != 8]
        self.assertEqual(taken, [*numbers[:7], "taken", *numbers[7:], "taken"])

    def test_workers_come_from_a_server_that_has_loaded_everything(self) -> None:
        self.enqueue("echo ${PYTHONPATH-unset} > env")
        pool = self.pool("--count", "2")
        self.becomes("1", "completed")
        for facts in self.workers().values():
            with open(f"/proc/{facts['pid']}/stat") as file:
                parent = file.read().rpartition(")")[2].split()[1]
            with open(f"/proc/{parent}/maps") as file:
                self.assertIn("_sqlite3", file.read())
            self.assertNotEqual(int(parent), pool.pid)
        self.assertEqual(self.read("env").strip(), os.environ.get("PYTHONPATH", "unset"))

    def test_the_log_is_begun_anew_though_there_is_always_a_reader(self) -> None:
        with Queue(self.path) as queue:
            queue.db.set_synchronous("normal")
            queue.enqueue_many({"command": "true"} for _ in range(500))
            pool = queuectl.Pool(queue, 1, (), print)
            readers = [Queue(self.path, readonly=True) for _ in range(2)]
            over = threading.Event()

            def look() -> None:
                for reader in itertools.cycle(readers):  # each begins before the other one ends
                    reader.db.execute("BEGIN")
                    reader.counts()
                    time.sleep(0.01)
                    other = readers[reader is readers[0]]
                    if other.db.connection.in_transaction:
                        other.db.execute("COMMIT")
                    if over.is_set():
                        break
                for reader in readers:
                    reader.db.close()

            thread = threading.Thread(target=look)
            thread.start()
            outcome, job = Outcome("ran", 1.0, 2.0, 0, None), queue.claim("w")
            while job:
                job = queue.finish(job, outcome, ())[1]
            size = os.stat(self.path + "-wal").st_size
            with mock.patch.object(queuectl, "WAL_BOUND", 1 << 20):
                until(lambda: pool.sync() or os.stat(self.path + "-wal").st_size < size)
            over.set()
            thread.join()


# --- figures: python3 test_queuectl.py bench [NAME...] --------------------------------------------

FULL = bool(os.environ.get("QUEUECTL_BENCH_FULL"))  # the sizes of the promises: takes minutes
ROWS, LINES, JOBS = (1_000_000, 1_000_000, 100_000) if FULL else (100_000, 200_000, 4_000)
BUILD = """
INSERT INTO jobs (id, queue, command, cwd, state, priority, created_at, updated_at, run_after, due)
WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :rows)
SELECT :state || i, 'default', 'true', '/', :state, :priority, 1, 1, :run_after, :due FROM n"""
FINISHED = """
INSERT INTO attempts SELECT seq, 1, 'worker-x-1', 1, 1, 0, NULL, 0, x'' FROM jobs
WHERE state = 'completed'"""


@NEEDS_SHELL
class Figures(Case):
    """Each `bench_` method prints lines: our figure, the baseline's, their ratio, and the goal."""

    def show(self, what: str, goal: str, ours: float, other: float = 0, ratio: float = 0) -> None:
        """Print a figure; the goal, such as `>= 1.0`, is for the ratio or, if none, for ours."""
        value = ratio or ours
        sign, bound = goal.split()[:2]
        met = value >= float(bound) if sign == ">=" else value <= float(bound)
        cells = [f"{n:,.0f}" if n >= 100 else f"{n:.3g}" if n else "" for n in (ours, other, ratio)]
        print(f"{what:<62} {cells[0]:>8} {cells[1]:>8} {cells[2]:>7}  {goal:<8}", end=" ")
        print("met" if met else "MISSED", flush=True)

    def compare(self, what: str, goal: str, count: int, *sides: Callable[[], float]) -> None:
        """Alternate rounds of ours and the baseline; print the medians and the median ratio."""
        rounds = [[side() for side in sides] for _ in range(count)]
        ratio = statistics.median(ours / other for ours, other in rounds)
        self.show(what, goal, *map(statistics.median, zip(*rounds)), ratio)

    def fresh(self, jobs: int = 0, path: str = "queuectl.db", **settings: str) -> str:
        """Make an empty queue with so many jobs that do nothing."""
        self.path = self.file(path)
        for end in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path + end)
        self.configure(backoff_base="1", **settings)
        with Queue(self.path) as queue:
            queue.enqueue_many({"command": "true"} for _ in range(jobs))
        return self.path

    def grown(self, rows: int) -> str:
        """Make a queue with so many completed, due, and, of a higher priority, scheduled jobs."""
        path = self.fresh(path=f"{rows}.db")
        with contextlib.closing(sqlite3.connect(path)) as db:
            later = time.time() + 86400
            for case in (("completed", 0, 1, 1), ("pending", 0, 1, 1), ("pending", 9, later, 0)):
                names = ("state", "priority", "run_after", "due")
                args = dict(zip(names, case), rows=rows)
                db.execute(BUILD.replace(":state || i", ":state || i || '.' || :due"), args)
            db.execute(FINISHED)
            db.commit()
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return path

    def rate(self, count: int, jobs: int, path: str = "") -> float:
        """Run so many jobs; return jobs/s from the first one's start to the last one's end."""
        self.path, began = path or self.path, time.time()
        with Queue(self.path, readonly=True) as queue:
            before = queue.counts()["completed"]
            args = ("--db", self.path, "worker", "start", "--quiet", "--count", str(count))
            with subprocess.Popen([*PYTHON, PROGRAM, *args]) as pool:
                until(lambda: queue.counts()["completed"] - before >= jobs, 300)
                pool.terminate()
            sql = "SELECT count(*), min(started), max(finished) FROM attempts WHERE started > ?"
            done, first, last = queue.db.execute(sql, (began,)).fetchone()
        return float(done / (last - first))

    def seconds(self, *command: str, shell: str = "") -> float:
        """Return how long a command takes."""
        began = time.perf_counter()
        subprocess.run(shell or command, shell=bool(shell), check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began

    def xargs(self, count: int, jobs: int) -> float:
        if not shutil.which("xargs"):
            raise FileNotFoundError("no xargs")
        shell = f"seq {jobs} | xargs -P{count} -I{{}} sh -c true"
        return jobs / self.seconds(shell=shell)

    def ours(self, count: int, jobs: int, **settings: str) -> float:
        self.fresh(jobs, **settings)
        return self.rate(count, jobs)

    def bench_throughput(self) -> None:
        synced = {"synchronous": "full"}
        for count, rounds, settings, goal in (
            (2, 3, {}, ">= 1.0"),
            (2, 3, synced, ">= 0.6"),
            (1, 1, {}, ">= 1.0"),
            (4, 1, {}, ">= 1.0"),
        ):
            what = f"2,000 jobs, {count} workers{', synced' * bool(settings)}: jobs/s; xargs"
            ours = partial(self.ours, count, 2000, **settings)
            self.compare(what, goal, rounds, ours, partial(self.xargs, count, 2000))
        many, few = partial(self.ours, 16, 2000), partial(self.ours, 4, 2000)
        self.compare("2,000 jobs, 16 workers: jobs/s; 4 workers", ">= 1.0", 2, many, few)

    def bench_flat(self) -> None:
        grown, few, rows = self.grown(ROWS), self.grown(500), f"with {3 * ROWS:,} rows"
        for what, act in (
            ("enqueue", lambda queue: queue.enqueue("true")),
            ("claim and finish", self.work_one),
            ("counts", lambda queue: (queue.counts(), queue.claimed())),
        ):
            with Queue(grown) as big, Queue(few) as small:
                sides = partial(self.each, act, big), partial(self.each, act, small)
                self.compare(f"{what} {rows}: ms; with 1,500", "<= 1.1", 5, *sides)
        status = [[*PYTHON, PROGRAM, "--db", path, "status"] for path in (grown, few)]
        sides = partial(self.seconds, *status[0]), partial(self.seconds, *status[1])
        self.compare(f"status {rows}: s; with 1,500", "<= 1.3", 7, *sides)
        what, other = f"1,000 jobs, 2 workers, {rows}: jobs/s; empty", partial(self.ours, 2, 1000)
        self.compare(what, ">= 0.9", 3, partial(self.rate, 2, 1000, grown), other)

    @staticmethod
    def each(act: Callable[[Queue], object], queue: Queue) -> float:
        """Return the median of the milliseconds that an act takes."""
        took = []
        for _ in range(200):
            began = time.perf_counter()
            act(queue)
            took.append((time.perf_counter() - began) * 1000)
        return statistics.median(took)

    @staticmethod
    def work_one(queue: Queue) -> bool:
        """Claim and finish a job; tell whether there was one."""
        job = queue.claim("worker-x-1")
        if job:
            queue.finish(job, Outcome("ran", 1.0, time.time(), 0, None))
        return bool(job)

    def idle_pool(self, count: int) -> None:
        """Start workers, and wait until they have nothing to do."""
        self.path = self.fresh()
        self.pool("--count", str(count), "--quiet")
        until(lambda: len(self.workers()) == count)
        time.sleep(0.5)

    def stop_pool(self) -> None:
        for pool in self.processes:
            pool.terminate()
            pool.communicate()
        self.processes.clear()

    def told(self) -> float:
        """Return when the next job's first instruction ran: it writes to our FIFO."""
        os.read(self.fifo, 1)
        return time.time()

    def bench_prompt(self) -> None:
        os.mkfifo(self.file("fifo"))
        self.fifo = os.open(self.file("fifo"), os.O_RDWR)
        self.addCleanup(os.close, self.fifo)
        command = f"printf . > {self.file('fifo')}"
        self.idle_pool(2)
        queue, ours, other, late = Queue(self.path), [], [], []
        for _ in range(200):
            queue.enqueue(command)
            began = time.time()
            ours.append((self.told() - began) * 1000)
            began = time.time()
            with subprocess.Popen(["/bin/sh", "-c", command]):
                other.append((self.told() - began) * 1000)
            time.sleep(0.01)
        for what, at, goal in (("median", 100, "<= 3"), ("99 %", 197, "<= 15")):
            a, b = sorted(ours)[at], sorted(other)[at]
            self.show(f"enqueue to first instruction, {what}: ms; from Popen", goal, a, b)
        for job, delay in ((command, 0.2), (f"[ $QUEUECTL_ATTEMPT = 2 ] && {command}", 0)) * 4:
            job_id = queue.enqueue(job, delay=delay)
            late.append((self.told() - queue.get(job_id).run_after) * 1000)
        self.show("a retry or a scheduled job after its time, the latest: ms", "<= 50", max(late))
        self.kills(queue, command)
        queue.db.close()

    def kills(self, queue: Queue, command: str) -> None:
        queue.enqueue(f"{command}; exec sleep 60", max_retries=9)
        self.told()
        time.sleep(0.2)
        workers, began = self.workers(), time.time()
        os.kill(workers[queue.claimed()[0].locked_by or ""]["pid"], signal.SIGKILL)
        self.show("runs again after kill -9 of its worker: s", "<= 1", self.told() - began)
        self.end_everything()
        began = time.time()
        self.pool("--quiet")
        self.show("runs again after kill -9 of everything: s", "<= 1", self.told() - began)

    def bench_light(self) -> None:
        status = partial(self.seconds, *PYTHON, PROGRAM, "--db", self.fresh(1), "status")
        module = partial(self.seconds, *PYTHON, "-m", "queuectl", "--db", self.path, "status")
        bare = partial(self.seconds, *PYTHON, "-c", "import argparse, json, sqlite3")
        self.compare("status as a process: s; python3, its imports", "<= 1.35", 15, status, bare)
        with mock.patch.dict(os.environ, PYTHONPATH=HERE, PYTHONPYCACHEPREFIX=self.dir):
            os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
            module()
            self.compare("status by python3 -m, compiled before: s", "<= 1.35", 15, module, bare)
        began = time.time()
        self.pool("--count", "32", "--quiet")
        until(lambda: len(self.workers()) == 32)
        self.show("32 workers are up: s", "<= 2", time.time() - began)
        self.stop_pool()
        self.idle_pool(16)
        pids = self.left()
        began, used = time.monotonic(), sum(map(cpu, pids))
        time.sleep(4)
        share = (sum(map(cpu, pids)) - used) / (time.monotonic() - began) * 100
        self.show("16 idle workers and their pool: % of a core", "<= 0.1", share)
        ours = statistics.median(
            memory(facts["pid"], "smaps_rollup", "Pss") for facts in self.workers().values()
        )
        self.stop_pool()
        command = [*PYTHON, "-c", "import sqlite3; input()"]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            time.sleep(0.3)
            other = memory(process.pid, "smaps_rollup", "Pss")
            process.communicate(b"\n")
        what = "memory of an idle worker, of 16: MiB; python3 with sqlite3"
        self.show(what, "<= 0.6", ours, other, ours / other)

    def bench_lines(self) -> None:
        lines, peaks = self.file("lines"), []
        with open(lines, "w") as file:
            file.writelines(f'{{"command": "echo {n}"}}\n' for n in range(LINES))

        def enqueue() -> float:
            command = [*PYTHON, PROGRAM, "--db", self.fresh(), "enqueue", "-"]
            began = time.perf_counter()
            with open(lines) as file:
                process = subprocess.Popen(command, stdin=file, stdout=subprocess.DEVNULL)
            while process.poll() is None:
                with contextlib.suppress(IndexError):  # it is ending
                    peaks.append(memory(process.pid, "status", "VmHWM"))
                time.sleep(0.01)
            return time.perf_counter() - began

        loads = f'{" ".join(PYTHON)} -c "import json, sys; [*map(json.loads, sys.stdin)]" <{lines}'
        what = f"enqueue - of {LINES:,} lines: "
        other = partial(self.seconds, shell=loads)
        self.compare(what + "s; json.loads of them", "<= 4", 1 if FULL else 2, enqueue, other)
        self.show(what + "MiB at the peak", "<= 64", max(peaks))

    def bench_bounded(self) -> None:
        reading = f"""if True:
            queue = __import__("queuectl").Queue({self.fresh(JOBS)!r}, readonly=True)
            while True:
                for job in queue.jobs(): pass"""
        reader = subprocess.Popen([*PYTHON, "-c", reading], cwd=HERE)
        self.addCleanup(reader.wait)
        self.addCleanup(reader.kill)
        pool, size = self.pool("--drain", "--count", "2", "--quiet"), 0.0
        while pool.poll() is None:
            time.sleep(0.005)
            with contextlib.suppress(FileNotFoundError):
                size = max(size, os.path.getsize(self.path + "-wal") / 2**20)
        self.show(f"the log through {JOBS:,} jobs, a reader at it: MiB", "<= 64", size)

    def bench_pruned(self) -> None:
        with Queue(self.grown(ROWS)) as queue:
            pruning, waits = threading.Thread(target=queue.prune), []
            pruning.start()
            while pruning.is_alive():
                began = time.perf_counter()
                queue.resume()
                waits.append((time.perf_counter() - began) * 1000)
            self.show(f"a writer, while {ROWS:,} jobs are pruned, at most: ms", "<= 50", max(waits))
        sizes = []
        with Queue(self.fresh()) as queue:
            for _ in range(6):
                queue.enqueue_many({"command": "true"} for _ in range(JOBS // 4))
                while self.work_one(queue):
                    pass
                queue.prune()
                queue.db.truncate_wal()
                sizes.append(os.path.getsize(self.path) / 2**20)
        what = f"the file after six times {JOBS // 4:,} jobs, each pruned: MiB; after two"
        self.show(what, "<= 1.05", sizes[5], sizes[1], sizes[5] / sizes[1])


def cpu(pid: int) -> float:
    """Return the seconds of processor time that a process has used."""
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0]) / 1e9


def memory(pid: int, file: str, what: str) -> float:
    """Return the MiB that a file of /proc says of a process."""
    with open(f"/proc/{pid}/{file}") as lines:
        return int(re.findall(rf"^{what}:\s+(\d+)", lines.read(), re.MULTILINE)[0]) / 1024


def bench(names: list[str]) -> None:
    """Print figures, all or those named; one that cannot be taken here is skipped."""
    os.environ.pop("PYTHONUNBUFFERED", None)  # as most have it: unset
    print(f"{'what: unit; baseline':<62} {'ours':>8} {'baseline':>8} {'ratio':>7}  goal")
    for name in names or [name[6:] for name in vars(Figures) if name.startswith("bench_")]:
        case = Figures(f"bench_{name}")
        case.setUp()
        try:
            getattr(case, f"bench_{name}")()
        except FileNotFoundError as error:
            print(f"{name} skipped: {error}")
        finally:
            case.doCleanups()


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench"]:
        bench(sys.argv[2:])
    else:
        unittest.main()
