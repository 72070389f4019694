"""Tests of queuectl: real processes, real signals, real databases.

python3 -m unittest                         everything in under a minute
QUEUECTL_SLOW=1 python3 -m unittest         and the sweeps, which take minutes
python3 test_queuectl.py bench [NAME...]    figures, with a baseline beside each
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import pty
import re
import select
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import termios
import threading
import time
import unittest
from functools import partial
from typing import Any, Callable
from unittest import mock

import queuectl
from queuectl import Ending, Queue

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "queuectl.py")
PYTHON = [sys.executable, *(["-O"] if sys.flags.optimize else [])]
SLOW = unittest.skipUnless(os.environ.get("QUEUECTL_SLOW"), "a sweep: QUEUECTL_SLOW=1 runs it")


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


def alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Case(unittest.TestCase):
    """A fresh directory for each test, and the program as a person calls it."""

    def setUp(self) -> None:
        self.dir = os.path.realpath(tempfile.mkdtemp(prefix="queuectl-test-"))
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        self.path = os.path.join(self.dir, "queuectl.db")
        self.pools: list[subprocess.Popen[str]] = []
        self.addCleanup(self.end_everything)

    def end_everything(self) -> None:
        """Leave no process behind, whatever the test did."""
        until(lambda: not self.kill_ours())
        for pool in self.pools:
            pool.communicate()

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

    def file(self, name: str) -> str:
        return os.path.join(self.dir, name)

    def read(self, name: str) -> str:
        """Return a file that a job wrote; empty where it has not."""
        try:
            with open(self.file(name)) as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def run_cli(self, *args: str, stdin: Any = "", code: int | None = 0, **more: Any) -> Any:
        """Run one command; return its result, with stdout and stderr as text."""
        result = subprocess.run(
            [*PYTHON, PROGRAM, *args],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=more.pop("cwd", self.dir),
            timeout=60,
            check=False,
            **more,
        )
        if code is not None:
            self.assertEqual(result.returncode, code, result.stderr)
        self.assertNotIn("Traceback", result.stderr)
        return result

    def out(self, *args: str, **more: Any) -> str:
        """Run one command; return what it printed."""
        return str(self.run_cli(*args, **more).stdout)

    def refused(self, *args: str, code: int = 2, **more: Any) -> str:
        """Run a command that must fail with one line; return the line."""
        result = self.run_cli(*args, code=code, **more)
        self.assertEqual(result.stdout, "")
        self.assertEqual(result.stderr.count("\n"), 1, result.stderr)
        return str(result.stderr)

    def enqueue(self, command: str, **fields: Any) -> str:
        """Add a job through the library."""
        with Queue(self.path) as queue:
            fields.setdefault("cwd", self.dir)
            return queue.enqueue(command, **fields)

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

    def becomes(self, job_id: str, state: str, limit: float = 10.0) -> Any:
        """Wait until a job is in a state; return it."""
        until(lambda: self.job(job_id).state == state, limit)
        return self.job(job_id)

    def pool(self, *args: str, **more: Any) -> subprocess.Popen[str]:
        """Start workers in the background."""
        pool = subprocess.Popen(
            [*PYTHON, PROGRAM, "worker", "start", *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            cwd=more.pop("cwd", self.dir),
            **more,
        )
        self.pools.append(pool)
        return pool

    def drain(self, *args: str, code: int = 0) -> str:
        """Run until nothing is left; return the event lines."""
        pool = self.pool("--drain", *args)
        output = pool.communicate(timeout=60)[0]
        self.assertEqual(pool.returncode, code, output)
        return output

    def workers(self) -> dict[str, dict[str, Any]]:
        """Return the living workers and what each says about itself."""
        return queuectl.RunDirectory(self.path).holders("worker")


# --- rules ----------------------------------------------------------------------------------------


class Rules(unittest.TestCase):
    """The pure functions, by tables of cases."""

    def test_durations_are_read(self) -> None:
        cases = {
            "90": 90,
            "90s": 90,
            "5m": 300,
            "1h30m": 5400,
            "2d": 172800,
            "1.5h": 5400,
            "0": 0,
            ".5": 0.5,
            "1W": 604800,
        }
        for written, meant in cases.items():
            with self.subTest(written):
                self.assertEqual(queuectl.seconds(written), meant)

    def test_what_is_no_duration_is_refused(self) -> None:
        for written in (
            "",
            "x",
            "5 m",
            "-1",
            "1h30",
            "1e3",
            "nan",
            "11000d",
            "m",
            None,
            True,
            [],
            -1,
        ):
            with self.subTest(written), self.assertRaises(ValueError):
                queuectl.seconds(written)

    def test_times_are_read(self) -> None:
        cases = {
            "1970-01-01T00:01:00Z": 60,
            "1970-01-01T01:00+01:00": 0,
            "2030-01-31 08:00:00+00:00": 1896076800,
            "1896076800": 1896076800,
        }
        for written, meant in cases.items():
            with self.subTest(written):
                self.assertEqual(queuectl.moment(written), meant)
        local = time.mktime((2030, 1, 31, 8, 0, 0, 0, 0, -1))
        self.assertEqual(queuectl.moment("2030-01-31T08:00"), local)

    def test_what_is_no_time_is_refused(self) -> None:
        for written in ("", "tomorrow", "2030-13-01", -1, 1e18, float("nan"), True, None, "9" * 30):
            with self.subTest(written), self.assertRaises(ValueError):
                queuectl.moment(written)

    def test_spans_are_short(self) -> None:
        cases = {0.123: "0.12 s", 1: "1 s", 42.4: "42 s", 200: "3m20s", 7200: "2h", 90061: "1d1h"}
        for duration, shown in cases.items():
            with self.subTest(shown):
                self.assertEqual(queuectl.span(duration), shown)

    def test_the_backoff_grows_and_is_capped(self) -> None:
        config = {"backoff_base": 2.0, "backoff_max": 60.0}
        waits = [queuectl.backoff(attempts, config) for attempts in (1, 2, 3, 10, 100_000)]
        self.assertEqual(waits, [2, 4, 8, 60, 60])

    def test_exit_codes_say_what_they_mean(self) -> None:
        cases = {
            0: None,
            3: "exit code 3",
            126: "exit code 126 (not executable)",
            127: "exit code 127 (command not found)",
            137: "exit code 137 (128 + SIGKILL)",
            -9: "killed by SIGKILL",
            -15: "killed by SIGTERM",
        }
        for code, meaning in cases.items():
            with self.subTest(code):
                self.assertEqual(queuectl.exit_meaning(code), meaning)

    def test_nothing_that_moves_a_cursor_is_printable(self) -> None:
        cases = {"\x1b[2J": "\\x1b[2J", "a\nb": "a\\nb", "\u202e": "\\u202e", "é€": "é€"}
        for raw, shown in cases.items():
            self.assertEqual(queuectl.printable(raw), shown)

    def test_an_attempt_moves_a_job_only_as_the_table_of_moves_allows(self) -> None:
        config = {key: setting.default for key, setting in queuectl.SETTINGS.items()}
        cases = [  # fate, error, attempts, cancelling -> state, attempts
            ("ran", None, 1, 0, "completed", 1),
            ("ran", "exit code 1", 1, 0, "pending", 1),
            ("ran", "exit code 1", 3, 0, "dead", 3),
            ("ran", "exit code 1", 1, 1, "cancelled", 1),
            ("ran", None, 1, 1, "completed", 1),
            ("crashed", "its worker died", 2, 0, "pending", 2),
            ("crashed", "its worker died", 3, 0, "dead", 3),
            ("returned", "stopped", 3, 0, "pending", 2),
            ("cancelled", "cancelled", 1, 0, "cancelled", 1),
        ]
        for fate, error, attempts, cancelling, state, left in cases:
            with self.subTest(fate=fate, error=error, attempts=attempts):
                job = a_job(attempts=attempts, cancelling=cancelling)
                ending = queuectl.Ending(fate, None, error, 100.0, 200.0)
                after = queuectl.sequel(job, ending, config)
                self.assertEqual((after.state, after.attempts), (state, left))
                self.assertIn(after.state, queuectl.MOVES["processing"])


def a_job(**fields: Any) -> queuectl.Job:
    """Return a job in processing, with some fields as given."""
    values = dict.fromkeys(queuectl.Job._fields)
    values.update({"state": "processing", "run": 1, "run_after": 0.0, **fields})
    return queuectl.Job(**values)  # type: ignore[arg-type]


# --- the library ----------------------------------------------------------------------------------


class Library(Case):
    """Queue, by itself."""

    def setUp(self) -> None:
        super().setUp()
        self.now = 1000.0
        self.queue = Queue(self.path, clock=lambda: self.now)
        self.addCleanup(self.queue.db.close)

    def end(self, job: queuectl.Job, error: str | None) -> queuectl.Job:
        ending = queuectl.Ending("ran", 0 if error is None else 1, error, self.now, self.now)
        after = self.queue.finish(job, ending)[0]
        assert after
        return after

    def claim(self) -> queuectl.Job:
        job = self.queue.claim("worker-a-1")
        assert job
        return job

    def test_a_failing_job_waits_2_then_4_seconds_and_is_dead_after_three(self) -> None:
        self.queue.enqueue("false", id="bad")
        for attempt, pause in ((1, 2.0), (2, 4.0)):
            after = self.end(self.claim(), "exit code 1")
            self.assertEqual((after.state, after.attempts), ("pending", attempt))
            self.now += pause - 0.01
            self.assertIsNone(self.queue.claim("worker-a-1"))
            self.now += 0.02
        self.assertEqual(self.end(self.claim(), "exit code 1").state, "dead")
        self.assertEqual(len(self.queue.attempts(self.queue.get("bad"))), 3)

    def test_a_retried_job_starts_again_with_no_attempts(self) -> None:
        self.queue.enqueue("false", id="bad", max_retries=1)
        self.end(self.claim(), "exit code 1")
        self.assertEqual(self.queue.retry(), ["bad"])
        job = self.queue.get("bad")
        self.assertEqual((job.state, job.attempts, job.run), ("pending", 0, 1))
        self.assertEqual(self.claim().run, 2)

    def test_a_retry_is_for_all_that_were_named_or_for_none(self) -> None:
        self.queue.enqueue("false", id="dead", max_retries=1)
        self.end(self.claim(), "exit code 1")
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
        order = [self.claim().id for _ in range(5)]
        self.assertEqual(order, ["high", "first", "second", "third", "low"])
        self.assertIsNone(self.queue.claim("worker-a-1"))
        self.now += 50
        self.assertEqual(self.claim().id, "later")

    def test_ids_are_the_given_ones_or_the_next_free_number(self) -> None:
        self.assertEqual(self.queue.enqueue("true"), "1")
        self.assertEqual(self.queue.enqueue("true", id="3"), "3")
        self.assertEqual(self.queue.enqueue("true"), "4")
        with self.assertRaisesRegex(queuectl.BadInput, "there is a job 3 already"):
            self.queue.enqueue("true", id="3")

    def test_the_counts_are_what_counting_would_give(self) -> None:
        for number in range(9):
            self.queue.enqueue("true", id=f"j{number}", max_retries=1)
        for error in (None, None, "exit code 1"):
            self.end(self.claim(), error)
        self.claim()
        counted = dict.fromkeys(queuectl.STATES, 0)
        for job in self.queue.jobs():
            counted[job.state] += 1
        self.assertEqual(self.queue.counts(), counted)
        self.assertEqual(list(counted.values()), [5, 1, 2, 1, 0])

    def test_each_query_of_the_hot_path_uses_an_index(self) -> None:
        hot = {
            "NEXT_DUE": "jobs_due",
            "MAKE_DUE": "jobs_later",
            "NEXT_LATER": "jobs_later",
            "CLAIMED": "jobs_state",
            "LATEST": "jobs_state",
            "ONE": "sqlite_autoindex_jobs_1",
        }
        for name, index in hot.items():
            args = {"queue": "q", "now": 1, "state": "dead", "limit": 5, "id": "1"}
            sql = "EXPLAIN QUERY PLAN " + getattr(queuectl, name)
            plan = " ".join(str(row[-1]) for row in self.queue.db.execute(sql, args))
            with self.subTest(name):
                self.assertIn(index, plan)
                self.assertNotIn("TEMP B-TREE", plan)

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

    def test_work_runs_jobs_from_a_program_without_a_main_guard(self) -> None:
        with open(self.file("app.py"), "w") as file:
            file.write(
                "from queuectl import Queue, work\n"
                "queue = Queue('jobs.db')\n"
                "job = queue.enqueue('echo from the library')\n"
                "code = work('jobs.db', count=2, drain=True)\n"
                "print(code, queue.get(job).state, queue.attempts(queue.get(job))[0].output)\n"
            )
        result = subprocess.run(
            [*PYTHON, "app.py"],
            cwd=self.dir,
            env={**os.environ, "PYTHONPATH": HERE},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=30,
            check=False,
        )
        self.assertEqual(result.stdout, "0 completed b'from the library\\n'\n")


# --- the command line -----------------------------------------------------------------------------


class CommandLine(Case):
    """Each command, as a person or a script calls it."""

    def test_enqueue_prints_the_id_alone(self) -> None:
        self.assertEqual(self.out("enqueue", '{"id":"job1","command":"echo hello"}'), "job1\n")
        self.assertEqual(self.out("enqueue", "echo | cat"), "2\n")
        self.assertEqual(self.out("enqueue", '[{"command":"a"},{"command":"b"}]'), "3\n4\n")

    def test_every_field_is_stored(self) -> None:
        fields = {
            "id": "x",
            "command": "true",
            "queue": "gpu",
            "priority": 7,
            "run_at": "2030-01-31T08:00:00+00:00",
            "timeout": "5m",
            "max_retries": 9,
            "cwd": "/",
            "env": {"A": "b"},
        }
        self.out("enqueue", json.dumps(fields))
        shown = json.loads(self.out("show", "x", "--json"))
        for key, value in fields.items():
            if key not in ("run_at", "timeout"):
                self.assertEqual(shown[key], value)
        self.assertEqual((shown["timeout"], self.job("x").run_after), (300, 1896076800))

    def test_a_shell_line_an_argv_and_lines_from_stdin(self) -> None:
        self.out("enqueue", "printf a | tr a b")
        self.out("enqueue", "--", "printf", "%s|", "two words", "it's", "$HOME", "*")
        lines = '{"command":"printf 3"}\n\n[{"command":"printf 4"}]\n'
        self.assertEqual(self.out("enqueue", "-", stdin=lines), "3\n4\n")
        self.drain()
        outputs = [self.out("logs", str(number)) for number in (1, 2, 3, 4)]
        self.assertEqual(outputs, ["b", "two words|it's|$HOME|*|", "3", "4"])

    def test_a_batch_is_stored_whole_or_not_at_all_and_an_error_names_its_line(self) -> None:
        self.out("enqueue", '{"id":"there","command":"true"}')
        for bad in ("{", '{"command":7}', '{"id":"there","command":"x"}', '{"command":"x"} x'):
            lines = f'{{"command":"true"}}\n\n{bad}\n'
            self.assertIn("queuectl: line 3: ", self.refused("enqueue", "-", stdin=lines))
        self.assertEqual(json.loads(self.out("status", "--json"))["pending"], 1)

    def test_a_job_runs_where_it_was_enqueued_with_what_it_was_given(self) -> None:
        os.mkdir(self.file("there"))
        command = "pwd; echo $A $QUEUECTL_JOB_ID $QUEUECTL_ATTEMPT"
        job = json.dumps({"command": command, "env": {"A": "b"}})
        self.out("--db", self.path, "enqueue", job, cwd=self.file("there"))
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
        self.configure(backoff_base="1")
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
        self.enqueue("true", id="gone", cwd="/nowhere/at/all", max_retries=1)
        self.configure(shell="/no/such/shell -c")
        self.enqueue("true", id="shell", max_retries=1)
        self.drain(code=1)
        reasons = [self.job(job_id).last_error for job_id in ("gone", "shell")]
        where = ["/nowhere/at/all", "/no/such/shell"]
        self.assertEqual(
            reasons, [f"cannot start: No such file or directory: {at}" for at in where]
        )

    def test_the_shell_is_a_setting(self) -> None:
        self.configure(shell=f"{sys.executable} -c")
        self.enqueue("print(6 * 7)")
        self.drain()
        self.assertEqual(self.out("logs", "1"), "42\n")

    def test_500_jobs_on_8_workers_run_once_each(self) -> None:
        lines = "".join(f'{{"command":"echo {n} >> lines"}}\n' for n in range(500))
        self.out("enqueue", "-", stdin=lines)
        self.drain("--count", "8")
        self.assertEqual(sorted(map(int, self.read("lines").split())), list(range(500)))

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
        self.configure(backoff_base="1")
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
        status = json.loads(self.out("status", "--json"))
        self.assertEqual(
            [status["pending"], status["processing"], len(status["workers"])], [1, 1, 2]
        )
        self.assertEqual({worker["job"] for worker in status["workers"]}, {"busy", None})
        self.assertRegex(self.out("status"), r"workers +2\n")
        with open(self.file("end"), "w"):
            self.out("worker", "stop")
        self.assertEqual((pool.wait(5), self.job("busy").state), (0, "completed"))
        self.assertIn("no workers are running", self.run_cli("worker", "stop").stderr)

    def test_list_is_aligned_and_limited_and_says_what_it_left_out(self) -> None:
        for number in range(5):
            self.enqueue(f"echo {number}", id="x" * (number + 1))
        lines = self.out("list").splitlines()
        column = lines[0].index("COMMAND")
        self.assertEqual([line.index("echo") for line in lines[1:]], [column] * 5)
        result = self.run_cli("list", "--limit", "2", "--state", "pending")
        self.assertEqual(len(result.stdout.splitlines()), 3)
        self.assertEqual(result.stderr, "queuectl: 2 of 5 jobs shown; --limit 0 shows all\n")
        self.assertEqual(len(self.out("list", "--json").splitlines()), 5)

    def test_the_dead_letter_queue_is_listed_and_retried(self) -> None:
        self.enqueue("test -e fixed", id="bad", max_retries=1)
        self.enqueue("false", id="other", max_retries=1)
        self.drain(code=1)
        dead = [json.loads(line) for line in self.out("dlq", "list", "--json").splitlines()]
        self.assertEqual([job["id"] for job in dead], ["bad", "other"])
        with open(self.file("fixed"), "w"):
            pass
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
        listed = [json.loads(line) for line in self.out("config", "list", "--json").splitlines()]
        self.assertEqual([setting["key"] for setting in listed], list(queuectl.SETTINGS))

    def test_bad_settings_are_refused_with_the_nearest_name_and_the_range(self) -> None:
        cases = {
            ("tiemout", "5"): "unknown key tiemout: did you mean timeout?",
            ("max_retries", "0"): "max_retries must be a whole number from 1 to 1000000",
            ("max_retries", "many"): "max_retries must be a whole number from 1 to 1000000",
            ("backoff_base", "0.5"): "backoff_base must be a number from 1 to 1000",
            ("timeout", "soon"): "timeout must be a duration",
            ("shell", ""): "shell must be a command prefix",
            ("synchronous", "off"): "synchronous must be normal or full",
        }
        for (key, value), message in cases.items():
            with self.subTest(key=key, value=value):
                self.assertIn(message, self.refused("config", "set", key, value))
        self.assertFalse(os.path.exists(self.path))

    def test_show_has_every_attempt(self) -> None:
        self.configure(backoff_base="1")
        self.enqueue("echo try $QUEUECTL_ATTEMPT; test $QUEUECTL_ATTEMPT = 2", id="x")
        self.drain()
        shown = json.loads(self.out("show", "x", "--json"))
        runs = [
            (run["run"], run["exit_code"], run["error"], run["output"]) for run in shown["runs"]
        ]
        self.assertEqual(runs, [(1, 1, "exit code 1", "try 1\n"), (2, 0, None, "try 2\n")])
        self.assertIn("exit code 1", self.out("show", "x"))
        self.refused("show", "y", code=1)

    def test_logs_of_a_running_job_show_what_there_is_so_far(self) -> None:
        self.enqueue("echo so far; touch said; sleep 60", id="x")
        self.pool()
        until(lambda: os.path.exists(self.file("said")))
        self.assertEqual(self.out("logs", "x"), "so far\n")

    def test_a_timeout_ends_the_whole_tree(self) -> None:
        self.enqueue("sleep 300 & echo $! > pid; sleep 300", timeout=1, max_retries=1, id="x")
        self.drain(code=1)
        self.assertEqual(self.job("x").last_error, "timed out after 1 s")
        self.assertFalse(alive(int(self.read("pid"))))

    def test_a_job_ends_with_its_own_process_whatever_it_left_behind(self) -> None:
        self.enqueue("echo x; sleep 30 & exit 0", id="x")
        began = time.monotonic()
        self.drain()
        self.assertLess(time.monotonic() - began, 5)
        self.assertEqual(self.out("logs", "x"), "x\n")

    def test_a_narrow_encoding_is_no_reason_to_fail(self) -> None:
        self.enqueue("echo \u20ac", id="euro")
        env = {**os.environ, "PYTHONIOENCODING": "ascii"}
        for words in ("list", "show euro", "status"):
            self.out(*words.split(), env=env)

    def test_bad_usage_gets_one_line(self) -> None:
        for words in (
            "",
            "enqeue x",
            "enqueue",
            "list --state lost",
            "worker start --count 0",
            "enqueue true --no-such",
            "dlq",
            "worker stop --timeout soon",
        ):
            with self.subTest(words):
                self.assertIn("queuectl: ", self.refused(*words.split()))
        self.assertEqual(os.listdir(self.dir), [])

    def test_reading_commands_never_create_a_database(self) -> None:
        for words in (
            "status",
            "list",
            "show 1",
            "logs 1",
            "dlq list",
            "dlq retry --all",
            "config get timeout",
            "config list",
            "config unset timeout",
            "worker stop",
        ):
            with self.subTest(words):
                self.assertIn("there is no queue", self.refused(*words.split(), code=1))
        self.assertEqual(os.listdir(self.dir), [])

    def test_the_database_can_be_named(self) -> None:
        self.out("--db", "other.db", "enqueue", "true")
        env = {**os.environ, "QUEUECTL_DB": "other.db"}
        self.assertEqual(json.loads(self.out("status", "--json", env=env))["pending"], 1)

    def test_events_go_nowhere_when_asked_to_be_quiet(self) -> None:
        self.enqueue("true")
        self.assertEqual(self.drain("--quiet"), "")


# --- helpers of the tests of processes ------------------------------------------------------------

WAIT = "until [ -e go ]; do sleep 0.02; done"  # a job that runs until the test says go
ALONE = "exec 9>>%s.lock; flock -n 9 || echo twice >> %s.log; echo $$ >> %s.log; "


class Live(Case):
    """Tests that look at living processes."""

    def lines(self, name: str) -> list[str]:
        return self.read(name).split("\n")[:-1]

    def touch(self, name: str) -> None:
        with open(self.file(name), "w"):
            pass

    def started(self, name: str) -> None:
        """Wait until a job has made a file."""
        until(lambda: os.path.exists(self.file(name)))

    def wrote(self, name: str) -> None:
        """Wait until a job has written a line."""
        until(lambda: self.lines(name))

    def at(self, name: str) -> dict[str, str]:
        """Use another queue; return the environment in which the program uses it too."""
        os.makedirs(self.file(name), exist_ok=True)
        self.path = os.path.join(self.dir, name, "queuectl.db")
        return {**os.environ, "QUEUECTL_DB": self.path}

    def says(self, pool: subprocess.Popen[str], text: str, limit: float = 10.0) -> None:
        """Wait until a pool has said something; reads what it said so far."""
        said, fd = "", pool.stdout.fileno()  # type: ignore[union-attr]
        while text not in said:
            self.assertTrue(select.select([fd], [], [], limit)[0], f"no {text!r} in {said!r}")
            more = os.read(fd, 65536).decode()
            self.assertTrue(more, f"no {text!r} in {said!r}")
            said += more

    def second(self) -> float:
        """Return 1.0: what a second of an idle machine is on this one, which may be busy."""
        began = time.monotonic()
        self.out("status")
        return max(1.0, 10 * (time.monotonic() - began))

    def claim(self, queue: Queue, worker: str) -> Any:
        return queue.claim(worker)

    def finish(self, queue: Queue, *args: Any) -> Any:
        return queue.finish(*args)

    def working(self, count: int) -> None:
        """Wait until so many workers live."""
        until(lambda: len(self.workers()) == count)

    def kill_workers(self, number: int = signal.SIGKILL) -> None:
        for facts in self.workers().values():
            os.kill(facts["pid"], number)

    def ends(self, pool: subprocess.Popen[str], code: int, limit: float = 10.0) -> float:
        """Wait for a pool's end; return how long it took."""
        began = time.monotonic()
        output = pool.communicate(timeout=limit)[0]
        self.assertEqual(pool.returncode, code, output)
        return time.monotonic() - began


# --- crashes --------------------------------------------------------------------------------------


class TestCrash(Live):
    def test_a_killed_workers_job_runs_again_within_a_second(self) -> None:
        job = self.enqueue(
            ALONE % (("job",) * 3) + "[ $QUEUECTL_ATTEMPT = 2 ] && exit;"
            "sleep 300 & echo $! > child; wait"
        )
        self.pool()
        until(lambda: self.lines("child"))
        old = [int(self.lines("job.log")[0]), int(self.read("child"))]
        self.assertEqual([alive(pid) for pid in old], [True, True])
        second = self.second()
        self.kill_workers()
        until(lambda: len(self.lines("job.log")) >= 2, second)
        self.assertEqual([alive(pid) for pid in old], [False, False])
        after = self.becomes(job, "completed")
        self.assertEqual((after.attempts, after.run, len(self.lines("job.log"))), (2, 2, 2))
        self.assertEqual([a.error for a in self.attempts(job)], ["its worker died", None])

    def test_a_worker_whose_pool_died_before_it_began_leaves(self) -> None:
        Queue(self.path).db.close()
        code = (
            "import multiprocessing, sys, queuectl\n"
            "ours, theirs = multiprocessing.Pipe()\n"
            "ours.close()\n"
            "queuectl.run_worker({}, sys.argv[1], 'worker-a-1', 1, (), theirs)\n"
        )
        worker = [*PYTHON, "-c", code, self.path]
        env = {**os.environ, "PYTHONPATH": HERE}
        self.assertEqual(subprocess.run(worker, env=env, timeout=5, check=False).returncode, 0)

    def test_workers_without_their_pool_finish_and_leave(self) -> None:
        job = self.enqueue(f"touch started; {WAIT}; echo result")
        pool = self.pool("--count", "3")
        self.working(3)
        self.started("started")
        second = self.second()
        pool.kill()
        after = self.enqueue("true")  # nobody is to take it
        until(lambda: len(self.workers()) == 1, second)  # the idle ones, though one is busy
        self.touch("go")
        self.assertEqual(self.becomes(job, "completed").attempts, 1)
        self.assertEqual(self.attempts(job)[0].output, b"result\n")
        until(lambda: not self.workers(), second)
        self.assertEqual(self.job(after).run, 0)

    JOBS = (
        ("plain", "sleep 300"),
        ("quiet", "exec >/dev/null 2>&1; sleep 300"),
        ("detached", "setsid -f sleep 300; sleep 300"),
        ("parent", "sleep 300 & sleep 300 & sleep 300"),
        ("clean", "exec env -i sleep 300"),
        ("hidden", "exec env -i sleep 300 >/dev/null 2>&1"),
    )

    def test_what_a_killed_machine_was_running_runs_again_but_never_twice_at_once(self) -> None:
        jobs = {name: self.enqueue(ALONE % ((name,) * 3) + command) for name, command in self.JOBS}
        count = str(len(jobs))
        pool = self.pool("--count", count)
        until(lambda: all(self.lines(f"{name}.log") for name in jobs))
        pool.kill()
        self.kill_workers()
        until(lambda: not self.workers())
        self.assertGreaterEqual(len(self.left()), len(jobs))  # the orphans live on
        second, began = self.second(), time.monotonic()
        self.pool("--count", count)
        until(lambda: all(len(self.lines(f"{name}.log")) >= 2 for name in jobs))
        self.assertLess(time.monotonic() - began, second)
        for name, job in jobs.items():
            with self.subTest(name):
                old, new = self.lines(f"{name}.log")
                self.assertTrue(old.isdigit() and new.isdigit(), "twice at once")
                self.assertFalse(alive(int(old)))
                self.assertTrue(alive(int(new)))
                self.assertEqual((self.job(job).attempts, self.job(job).run), (2, 2))

    def test_a_job_that_kills_its_worker_starts_as_often_as_it_may(self) -> None:
        bad = self.enqueue("echo start >> log; kill -9 $PPID; sleep 300", max_retries=3)
        good = [self.enqueue("true") for _ in range(20)]
        self.drain("--count", "2", code=1)
        after = self.job(bad)
        self.assertEqual((after.state, after.attempts), ("dead", 3))
        self.assertEqual(self.read("log"), "start\n" * 3)
        self.assertIn("worker died", after.last_error)
        self.assertEqual({self.job(job).state for job in good}, {"completed"})


class TestNoFalseAlarm(Live):
    def suspend(self, duration: float) -> None:
        job = self.enqueue(f"echo run >> log; {WAIT}")
        pool = self.pool()
        until(lambda: self.lines("log"))
        everyone = [pool.pid, *(facts["pid"] for facts in self.workers().values())]
        self.pool()  # it would take a job that looks dead
        self.working(2)
        for pid in everyone:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(duration)  # the fault itself
        for pid in everyone:
            os.kill(pid, signal.SIGCONT)
        self.touch("go")
        self.assertEqual(self.becomes(job, "completed").attempts, 1)
        self.assertEqual((self.read("log"), len(self.attempts(job))), ("run\n", 1))

    def test_a_suspended_machine_does_not_look_dead(self) -> None:
        self.suspend(1.0)

    @SLOW
    def test_a_machine_suspended_for_a_minute_does_not_look_dead(self) -> None:
        self.suspend(60.0)

    def stranger(self) -> subprocess.Popen[bytes]:
        stranger = subprocess.Popen(["sleep", "300"], start_new_session=True, cwd=self.dir)
        self.addCleanup(stranger.wait)
        self.addCleanup(stranger.kill)
        return stranger

    def test_a_stranger_with_a_recorded_pid_lives(self) -> None:
        stranger = self.stranger()
        job = self.enqueue("echo again > log")
        with Queue(self.path) as queue:
            claimed: Any = queue.claim("worker-dead")
        facts = {"run": queuectl.run_key(claimed), "job_pid": stranger.pid, "launched": 1e9}
        with open(queue.db.run.file("worker-dead"), "w") as file:
            json.dump({"pid": stranger.pid, **facts}, file)
        self.drain()
        self.assertEqual((self.job(job).state, self.job(job).attempts), ("completed", 2))
        self.assertIsNone(stranger.poll())

    def test_without_proc_a_pid_counts_only_with_its_start_time(self) -> None:
        stranger = self.stranger()
        self.enqueue("true")
        with Queue(self.path) as queue:
            job: Any = queue.claim("worker-dead")
        facts = {"run": queuectl.run_key(job), "job_pid": stranger.pid, "launched": time.time()}
        for name, change, found in (
            ("ours", {}, [stranger.pid]),
            ("started later", {"launched": time.time() - 3600}, []),
            ("another run", {"run": "1.7.worker-dead"}, []),
            ("no pid", {"run": queuectl.run_key(job), "job_pid": -1}, []),
        ):
            with self.subTest(name):
                self.assertEqual(queuectl.group({**facts, **change}, job), found)
        self.assertEqual(queuectl.group({}, job), [])

    def test_a_clock_that_jumps_changes_nobodys_life(self) -> None:
        for day in (86400.0, -86400.0):
            with self.subTest(day=day):
                self.at(str(day))
                clock = [1.7e9]
                with Queue(self.path, clock=lambda now=clock: now[0]) as queue:
                    queue.enqueue("true", id="job")
                    pool = queuectl.Pool(queue, 1, (), lambda _: None)
                    held = queuectl.Held(queue.db.run.file("worker-1"))
                    self.assertEqual(self.claim(queue, "worker-1").run, 1)
                    clock[0] += day
                    pool.recover()
                    self.assertEqual(queue.get("job").state, "processing")  # its worker lives
                    self.assertIsNone(queue.claim("worker-2"))
                    held.close()
                    pool.recover()
                    self.assertEqual(queue.get("job").state, "pending")  # now it does not
                    self.assertEqual(self.claim(queue, "worker-2").attempts, 2)  # and at once
                    clock[0] -= 2 * day
                    ending = Ending("ran", 0, None, clock[0], clock[0])
                    after, _ = self.finish(queue, queue.get("job"), ending)
                    self.assertEqual(after.state, "completed")


class TestFencing(Live):
    GOOD = Ending("ran", 0, None, 1.0, 2.0, 0, b"late")
    BAD = Ending("ran", 1, "exit code 1", 1.0, 2.0, 0, b"late")

    def test_a_result_that_comes_after_its_claim_was_lost_changes_nothing(self) -> None:
        for name, successor, ending in (
            ("good", "worker-2", self.GOOD),
            ("bad", "worker-2", self.BAD),
            ("same worker", "worker-1", self.GOOD),  # told apart by the run alone
            ("returned", "worker-2", self.BAD._replace(fate="returned")),
        ):
            with self.subTest(name), Queue(os.path.join(self.dir, name + ".db")) as queue:
                job_id = queue.enqueue("true")
                lost: Any = queue.claim("worker-1")
                queuectl.Pool(queue, 1, (), lambda _: None).recover()  # worker-1 has no lock
                queue.claim(successor)
                before = queue.get(job_id), queue.attempts(lost), queue.counts()
                self.assertEqual(queue.finish(lost, ending), (None, None))
                self.assertEqual((queue.get(job_id), queue.attempts(lost), queue.counts()), before)
                self.assertEqual((before[0].run, before[0].attempts), (2, 2))
                self.assertEqual(self.finish(queue, queue.get(job_id), ending)[0].id, job_id)

    def test_a_late_result_does_not_keep_its_worker_from_the_next_job(self) -> None:
        with Queue(self.path) as queue:
            queue.enqueue("true")
            lost: Any = queue.claim("worker-1")
            queuectl.Pool(queue, 1, (), lambda _: None).recover()
            queue.claim("worker-2")
            job_id = queue.enqueue("true")
            after, following = self.finish(queue, lost, self.GOOD, lambda: ())
            self.assertIsNone(after)
            self.assertEqual((following.id, following.locked_by), (job_id, "worker-1"))


# --- stopping -------------------------------------------------------------------------------------

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class TestStop(Live):
    def test_the_first_signal_lets_running_jobs_finish(self) -> None:
        pools = {}
        for number in SIGNALS:
            env = self.at(number.name)
            self.enqueue(f"touch {number.name}.started; {WAIT}; sleep 0.2; echo done", id="running")
            self.enqueue("true", id="waiting")
            pools[number] = self.pool(env=env)
        for number, pool in pools.items():
            self.started(f"{number.name}.started")
            pool.send_signal(number)
            self.says(pool, f"{number.name}: no new jobs")
        self.touch("go")
        for number, pool in pools.items():
            with self.subTest(number.name):
                self.ends(pool, 0)
                self.at(number.name)
                self.assertEqual(self.job("running").state, "completed")
                self.assertEqual(self.attempts("running")[0].output, b"done\n")
                self.assertEqual(
                    (self.job("waiting").state, self.job("waiting").run), ("pending", 0)
                )

    def test_the_second_signal_ends_the_jobs_and_gives_the_attempts_back(self) -> None:
        pools = {}
        for number in SIGNALS:
            env = self.at(number.name)
            self.enqueue(f"echo $$ > {number.name}.pid; sleep 300 & sleep 300", id="job")
            pools[number] = self.pool(env=env)
        for number, pool in pools.items():
            self.wrote(f"{number.name}.pid")
            pool.send_signal(number)
        for number, pool in pools.items():
            self.says(pool, "no new jobs")
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

    def test_worker_stop_waits_until_the_workers_are_gone(self) -> None:
        job = self.enqueue(f"touch started; {WAIT}; sleep 0.2")
        later = self.enqueue("true")
        pool = self.pool()
        self.started("started")
        began = time.monotonic()
        self.assertIn("still running", self.refused("worker", "stop", "--timeout", "0.2", code=124))
        self.assertGreaterEqual(time.monotonic() - began, 0.2)
        self.says(pool, "asked to stop")
        stop = subprocess.Popen([*PYTHON, PROGRAM, "worker", "stop"], cwd=self.dir)
        self.addCleanup(stop.wait)
        time.sleep(0.3)  # long enough for one that does not wait
        self.assertIsNone(stop.poll())
        self.touch("go")
        self.assertEqual(stop.wait(10), 0)
        self.assertEqual((self.workers(), self.job(job).state), ({}, "completed"))
        self.ends(pool, 0)
        self.assertEqual(self.job(later).run, 0)
        self.assertIn("no workers", self.run_cli("worker", "stop").stderr)

    def test_worker_stop_now_ends_the_jobs(self) -> None:
        job = self.enqueue("echo $$ > pid; sleep 300 & sleep 300")
        pools = [self.pool(), self.pool()]  # all of them
        until(lambda: self.lines("pid"))
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
        self.enqueue("echo > log")
        pool = self.pool("--count", "2")
        until(lambda: self.lines("log"))
        self.working(2)
        second = self.second()
        self.locked()
        pool.terminate()
        self.assertLess(self.ends(pool, 0), second)

    def test_a_result_that_cannot_be_stored_is_kept_over_a_stop(self) -> None:
        jobs = {
            "good": self.enqueue(f"echo good >> log; {WAIT}; echo result; echo >> ended"),
            "bad": self.enqueue(f"echo bad >> log; {WAIT}; echo why; echo >> ended; exit 3"),
        }
        self.configure(max_retries="1")
        pool = self.pool("--count", "2")
        until(lambda: len(self.lines("log")) == 2)
        second, db = self.second(), self.locked()
        self.touch("go")
        until(lambda: len(self.lines("ended")) == 2)
        time.sleep(0.1)  # the jobs' own ends
        pool.terminate()
        self.assertLess(self.ends(pool, 0), second)
        self.assertEqual(self.workers(), {})
        db.execute("ROLLBACK")
        self.assertEqual({self.job(job).state for job in jobs.values()}, {"processing"})
        self.drain(code=1)
        self.assertEqual(sorted(self.lines("log")), ["bad", "good"])  # neither ran again
        for name, state, code, output in (
            ("good", "completed", 0, b"result\n"),
            ("bad", "dead", 3, b"why\n"),
        ):
            with self.subTest(name):
                job, runs = self.job(jobs[name]), self.attempts(jobs[name])
                self.assertEqual((job.state, job.exit_code, job.attempts), (state, code, 1))
                self.assertEqual([run.output for run in runs], [output])
        self.assertEqual(queuectl.RunDirectory(self.path).files(), [])

    def test_under_nohup_a_hang_up_changes_nothing(self) -> None:
        self.enqueue("echo > first")
        hup = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
        pool = self.pool(preexec_fn=hup, start_new_session=True)
        until(lambda: self.lines("first"))
        os.killpg(pool.pid, signal.SIGHUP)
        self.becomes(self.enqueue("true"), "completed")
        self.assertIsNone(pool.poll())
        self.assertEqual(len(self.workers()), 1)

    def test_a_terminal_stops_its_pool(self) -> None:
        for name, act in (
            ("Ctrl-C", lambda terminal: os.write(terminal, b"\x03")),
            ("hang-up", os.close),
        ):
            with self.subTest(name):
                env = self.at(name)
                self.enqueue(
                    f"touch '{name}.started'; until [ -e '{name}.go' ]; do sleep 0.02; done"
                )
                terminal, slave = pty.openpty()
                pool = subprocess.Popen(
                    [*PYTHON, PROGRAM, "worker", "start", "--count", "2"],
                    stdin=slave,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    universal_newlines=True,
                    cwd=self.dir,
                    env=env,
                    start_new_session=True,
                    preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
                )
                self.pools.append(pool)
                os.close(slave)
                self.started(f"{name}.started")
                self.working(2)
                act(terminal)
                self.says(pool, "no new jobs")
                until(lambda: len(self.workers()) == 1)  # the idle one left, the busy one not
                self.touch(f"{name}.go")
                self.ends(pool, 0)
                self.assertEqual((self.job("1").state, self.job("1").attempts), ("completed", 1))
                if name == "Ctrl-C":
                    os.close(terminal)


# --- what a job is given --------------------------------------------------------------------------


class TestWhatAJobIsGiven(Live):
    STARTS = (
        ("plain", ()),
        ("blocking", ()),
        ("background", ("sh", "-c", '"$@" & wait $!', "sh")),
        ("nohup", ("nohup",)),
        ("closed", ("sh", "-c", '"$@" <&- >&- 2>&-', "sh")),
        ("ignoring", ("sh", "-c", "trap '' INT TERM QUIT PIPE; \"$@\"", "sh")),
    )

    FDS = "readlink /proc/$$/fd/*; :"  # without the one that the glob itself needed

    def fds(self) -> str:
        """Return what the first job should print of its descriptors."""
        return "/dev/null\n" + f"{self.path}.run/1.1.out\n" * 3

    def test_a_job_has_its_signals_and_streams_however_the_pool_was_started(self) -> None:
        block = lambda: signal.pthread_sigmask(  # noqa: E731
            signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
        )
        starts = []
        for name, line in self.STARTS:
            env = self.at(name)
            self.enqueue(self.FDS)
            self.enqueue(
                "exec grep -E '^Sig(Ign|Blk):' /proc/self/status"
            )  # sh unblocks if it forks
            starts.append(
                subprocess.Popen(
                    [*line, *PYTHON, PROGRAM, "worker", "start", "--drain"],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd=self.dir,
                    env=env,
                    preexec_fn=block if name == "blocking" else None,
                )
            )
        for (name, _), start in zip(self.STARTS, starts):
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
        pool = self.pool("--drain", "--count", "3", pass_fds=ends)
        self.ends(pool, 0)
        self.assertEqual(self.attempts(job)[0].output.decode(), self.fds())


# --- the process tree -----------------------------------------------------------------------------


class TestProcessTree(Live):
    def test_a_timeout_ends_every_process(self) -> None:
        self.configure(kill_grace="0.3", max_retries="1")
        commands = (
            ("children", "sleep 300 & sleep 300"),
            ("detached", "setsid -f sleep 300; sleep 300"),
            ("deaf", "trap '' TERM; while :; do sleep 0.05; done"),
            ("stopped", "kill -STOP $$; sleep 300"),
            ("clean", "env -i sleep 300 & exec env -i sleep 300"),
            ("closed", "exec 0<&- 1>&- 2>&-; sleep 300"),
        )
        jobs = {name: self.enqueue(command, timeout=1) for name, command in commands}
        self.drain("--count", str(len(jobs)), code=1)
        for name, job in jobs.items():
            with self.subTest(name):
                after, (run,) = self.job(job), self.attempts(job)
                self.assertEqual((after.state, after.last_error), ("dead", "timed out after 1 s"))
                self.assertGreaterEqual(run.finished - run.started, 1.0)
                self.assertLess(run.finished - run.started, 3.0)
        until(lambda: not self.left(), 1.0)

    def test_term_comes_before_kill(self) -> None:
        self.configure(max_retries="1")
        trap = "trap 'echo polite; exit 0' TERM; "
        self.enqueue(trap + "sleep 300 & wait", timeout=0.8, id="running")
        self.enqueue(trap + "kill -STOP $$; sleep 300", timeout=0.8, id="stopped")
        self.drain("--count", "2", code=1)
        for job in ("running", "stopped"):
            with self.subTest(job):
                self.assertEqual(self.attempts(job)[0].output, b"polite\n")
                self.assertEqual(self.job(job).last_error, "timed out after 0.8 s")

    def test_each_way_to_fail_says_so(self) -> None:
        self.configure(max_retries="1")
        self.touch("text")
        cases = (
            ("exit 3", 3, "exit code 3"),
            ("./text", 126, "exit code 126 (not executable)"),
            ("./nowhere", 127, "exit code 127 (command not found)"),
            ("exit 137", 137, "exit code 137 (128 + SIGKILL)"),
            ("kill -9 $$", -9, "killed by SIGKILL"),
            ("kill $$", -15, "killed by SIGTERM"),
            ("kill -INT $$", -2, "killed by SIGINT"),
        )
        jobs = [self.enqueue(command) for command, _, _ in cases]
        self.drain("--count", "2", code=1)
        for job, (command, code, error) in zip(jobs, cases):
            with self.subTest(command):
                after, (run,) = self.job(job), self.attempts(job)
                self.assertEqual(
                    (after.state, after.exit_code, after.last_error), ("dead", code, error)
                )
                self.assertEqual((run.exit_code, run.error), (code, error))

    def test_a_background_child_does_not_hold_up_its_job(self) -> None:
        job = self.enqueue("echo x; sleep 30 & exit 0")
        self.drain()
        (run,) = self.attempts(job)
        self.assertEqual((self.job(job).state, run.output), ("completed", b"x\n"))
        self.assertLess(run.finished - run.started, 1.0)

    def test_what_a_failed_attempt_left_is_gone_before_the_next(self) -> None:
        self.configure(backoff_max="0")
        job = self.enqueue(
            ALONE % (("job",) * 3) + "setsid -f sleep 300; sleep 300 & exit 1", max_retries=3
        )
        self.drain("--count", "2", code=1)
        log = self.lines("job.log")
        self.assertEqual((len(log), "twice" in log), (3, False))
        self.assertEqual(self.job(job).attempts, 3)
        until(lambda: not self.left(), 1.0)


# --- output ---------------------------------------------------------------------------------------


class TestOutput(Live):
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
        self.touch("go")

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

    RAW = b"\xff\xfe\0\x1b[31mred\x1b[0m\r\n\xe2\x80\xae\x07\xc3\xa9"

    def test_output_keeps_every_byte(self) -> None:
        text = "".join(f"\\{byte:03o}" for byte in self.RAW)
        job = self.enqueue(f"printf '{text}'")
        self.drain()
        logs = subprocess.run(
            [*PYTHON, PROGRAM, "logs", job], stdout=subprocess.PIPE, cwd=self.dir, check=True
        )
        self.assertEqual(logs.stdout, self.RAW)
        self.assertEqual(self.attempts(job)[0].output, self.RAW)

    def on_terminal(self, *args: str) -> bytes:
        """Return what a command sends to a terminal."""
        terminal, slave = pty.openpty()
        process = subprocess.Popen(
            [*PYTHON, PROGRAM, *args], stdout=slave, stderr=slave, cwd=self.dir
        )
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while True:
                shown += os.read(terminal, 65536)
        os.close(terminal)
        self.assertEqual(process.wait(10), 0, shown)
        return shown

    def test_nothing_that_a_job_supplied_reaches_a_terminal_raw(self) -> None:
        self.configure(max_retries="1")
        text = "".join(f"\\{byte:03o}" for byte in self.RAW)
        job = self.enqueue(f"printf '{text}'; : '\x1b]0;title\x07\u202e\u2028'; false")
        nowhere = self.enqueue("true", cwd=self.file("no\x1b[2Jwhere"))
        self.drain(code=1)
        for args in (("list",), ("dlq", "list"), ("show", job), ("show", nowhere), ("logs", job)):
            with self.subTest(args):
                shown = self.on_terminal(*args)
                self.assertTrue(shown)
                text = shown.decode().replace("\r\n", "\n")
                bad = [c for c in text if not c.isprintable() and c not in "\n\t"]
                self.assertEqual(bad, [])
        self.assertIn("red", self.on_terminal("logs", job).decode())


# --- the machine and the database at fault --------------------------------------------------------


class AtFault(Case):
    """What is not the caller's fault gets one line and exit code 4, and loses nothing."""

    def test_a_batch_with_bad_input_makes_no_queue(self) -> None:
        for lines in ("{", '{"command":"true"}\n{"command":7}\n', b"\xff".decode("latin-1")):
            self.refused("enqueue", "-", stdin=lines)
        self.assertEqual(os.listdir(self.dir), [])

    def test_an_output_that_cannot_be_written_is_said(self) -> None:
        self.enqueue("true")
        with open("/dev/full", "w") as full:
            result = subprocess.run(
                [*PYTHON, PROGRAM, "list"],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                cwd=self.dir,
                check=False,
            )
        self.assertEqual(result.returncode, 4)
        self.assertEqual(result.stderr, "queuectl: No space left on device\n")

    def test_a_stored_job_is_acknowledged_even_if_no_pool_can_be_rung(self) -> None:
        self.enqueue("true")
        shutil.rmtree(self.path + ".run")
        with open(self.path + ".run", "w"):
            self.assertEqual(self.out("enqueue", "true"), "2\n")

    def test_workers_leave_a_damaged_database(self) -> None:
        for number in range(50):
            self.enqueue("true", id=f"job{number}")
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            page = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'jobs'").fetchone()[
                0
            ]
            size = db.execute("PRAGMA page_size").fetchone()[0]
        with open(self.path, "r+b") as file:
            file.seek((page - 1) * size)
            file.write(b"\xa5" * size)
        output = self.drain("--count", "2", code=4)
        self.assertIn("malformed", output)
        self.assertNotIn("Traceback", output)
        self.assertIn("malformed", self.refused("show", "job1", code=4))

    def test_the_files_are_the_owners_alone_whatever_the_umask(self) -> None:
        for mask in (0o000, 0o777):
            with self.subTest(oct(mask)):
                path = self.file(f"{mask}.db")
                before = os.umask(mask)
                self.addCleanup(os.umask, before)
                with Queue(path) as queue:
                    queue.enqueue("true")
                    for name in ("", "-wal", "-shm"):
                        self.assertEqual(os.stat(path + name).st_mode & 0o777, 0o600)
                os.umask(before)
                self.assertEqual(os.stat(path + ".run").st_mode & 0o777, 0o700)

    @unittest.skipIf(os.geteuid(), "only root can give a file to another user")
    def test_what_another_user_planted_beside_the_database_is_refused(self) -> None:
        for name in ("-wal", "-shm"):
            with self.subTest(name):
                self.enqueue("true")
                with open(self.path + name, "wb"):
                    os.chown(self.path + name, 12345, 12345)
                for words in ("enqueue true", "worker start --drain"):
                    line = self.run_cli(*words.split(), code=4).stderr
                    self.assertIn(f"{self.path}{name} belongs to another user (12345)", line)
                self.assertEqual(os.stat(self.path + name).st_uid, 12345)
                os.unlink(self.path + name)


# --- the README -----------------------------------------------------------------------------------


class Readme(Case):
    """What the README says is what the program does."""

    def setUp(self) -> None:
        super().setUp()
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            self.text = file.read()

    @staticmethod
    def normal(text: str) -> str:
        """Take out what differs from one run to the next."""
        text = re.sub(r"\d\d:\d\d:\d\d", "TIME", text)
        text = re.sub(r"in [\d.]+ s\n", "in N s\n", text)
        text = re.sub(r"  (now|\d+ s ago) +", "  AGO  ", text)
        return re.sub(r"WHEN +", "WHEN  ", re.sub(r"/\S*/queuectl\.db", "/queuectl.db", text))

    def test_its_session_runs_as_it_is_printed(self) -> None:
        shutil.copy(PROGRAM, self.dir)
        os.mkdir(self.file("bin"))
        os.symlink(sys.executable, self.file("bin/python3"))
        env = {**os.environ, "PATH": f"{self.dir}/bin:{os.environ['PATH']}", "LC_ALL": "C"}
        session = self.text.partition("```console\n")[2].partition("```")[0]
        for part in session.split("$ ")[1:]:
            command, _, printed = part.partition("\n")
            result = subprocess.run(
                command,
                shell=True,
                cwd=self.dir,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=30,
                check=False,
            )
            with self.subTest(command):
                self.assertEqual(self.normal(result.stdout), self.normal(printed))

    def test_every_command_is_documented_and_every_documented_one_exists(self) -> None:
        documented = re.findall(r"^\| `queuectl ((?:[a-z]+ ?)+)", self.text, re.MULTILINE)
        self.assertEqual({words.strip() for words in documented}, set(queuectl.COMMANDS))

    def test_every_setting_and_field_and_option_is_documented(self) -> None:
        for name in (*queuectl.SETTINGS, *queuectl.FIELDS, *queuectl.STATES):
            self.assertIn(f"`{name}`", self.text)
        for command in queuectl.COMMANDS.values():
            for names, _ in command.arguments:
                if names[0].startswith("--"):
                    self.assertIn(names[0], self.text)


# --- speed: what the figures rest on --------------------------------------------------------------


class Speed(Live):
    """That the cheap way is taken, by facts that a busy machine does not change."""

    def test_workers_come_from_a_server_that_has_loaded_everything(self) -> None:
        self.enqueue("env > env")
        pool = self.pool("--count", "2")
        self.becomes("1", "completed")
        for facts in self.workers().values():
            with open(f"/proc/{facts['pid']}/stat") as file:
                parent = file.read().rpartition(")")[2].split()[1]
            with open(f"/proc/{parent}/maps") as file:
                self.assertIn("_sqlite3", file.read())
            self.assertNotEqual(int(parent), pool.pid)
        self.assertNotIn("PYTHONPATH", self.read("env"))

    def test_the_log_is_begun_anew_though_there_is_always_a_reader(self) -> None:
        with Queue(self.path) as queue:
            queue.db.durable("normal")
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

            thread = threading.Thread(target=look)
            thread.start()
            ending, job, sizes = Ending("ran", 0, None, 1.0, 2.0), queue.claim("w"), []
            with mock.patch.object(queuectl, "LOG_BOUND", 1 << 20):
                while job:
                    job = queue.finish(job, ending, lambda: ())[1]
                    if job and job.seq % 10 == 0:
                        pool.sync()
                    sizes.append(os.stat(self.path + "-wal").st_size)
            over.set()
            thread.join()
            self.assertTrue(any(later < size for size, later in zip(sizes, sizes[1:])), sizes[-1])

    def test_a_job_is_launched_alike_where_posix_spawn_knows_no_sessions(self) -> None:
        self.addCleanup(os.chdir, os.getcwd())
        queuectl.keep_descriptors()
        command = "ps -o sid= $$ | grep -wq $$ && readlink /proc/$$/fd/*; pwd; kill -9 $$"
        said = set()
        for name in ("now", "old"):
            out = queuectl.Output(self.file("out"))
            job = a_job(command=command, cwd="/usr")
            with contextlib.ExitStack() as stack:
                if name == "old":
                    old = mock.patch.object(os, "posix_spawnp", side_effect=NotImplementedError)
                    stack.enter_context(old)
                child = queuectl.launch(job, queuectl.SHELL, os.environb, out)
            until(lambda child=child: child.poll() is not None)  # type: ignore[misc]
            self.assertEqual(child.returncode, -9)
            said.add(out.tail(9999)[1].decode())
            out.close()
        self.assertEqual(said, {"/dev/null\n" + f"{self.dir}/out\n" * 3 + "/usr\n"})


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

    def compare(
        self,
        what: str,
        goal: str,
        count: int,
        ours: Callable[[], float],
        other: Callable[[], float],
    ) -> None:
        """Alternate rounds of the two, and print the medians and the median ratio."""
        pairs = [(ours(), other()) for _ in range(count)]
        ratio = statistics.median(a / b for a, b in pairs)
        a, b = (statistics.median(side) for side in zip(*pairs))
        self.show(what, goal, a, b, ratio)

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

    def grown(self) -> str:
        """Make a queue of three times ROWS: completed, due, and scheduled at a higher priority."""
        path = self.fresh(path="grown.db")
        with contextlib.closing(sqlite3.connect(path)) as db:
            later = time.time() + 86400
            for case in (("completed", 0, 1, 1), ("pending", 0, 1, 1), ("pending", 9, later, 0)):
                names = ("state", "priority", "run_after", "due")
                args = dict(zip(names, case), rows=ROWS)
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
        for count, settings, goal in (
            (2, {}, ">= 1.0"),
            (2, {"synchronous": "full"}, ">= 0.6"),
            (1, {}, ">= 1.0"),
            (4, {}, ">= 1.0"),
        ):
            what = f"2,000 jobs, {count} workers{', synced' * bool(settings)}: jobs/s; xargs"
            ours = partial(self.ours, count, 2000, **settings)
            self.compare(what, goal, 3 + 2 * (count == 2), ours, partial(self.xargs, count, 2000))
        what = "2,000 jobs, 16 workers: jobs/s; 4 workers"
        self.compare(what, ">= 1.0", 3, lambda: self.ours(16, 2000), lambda: self.ours(4, 2000))

    def bench_flat(self) -> None:
        grown, rows = self.grown(), f"{3 * ROWS:,} rows"
        empty = self.fresh(path="empty.db")
        with Queue(grown) as big, Queue(empty) as small:
            for what, act in (
                ("enqueue", lambda queue: queue.enqueue("true")),
                ("claim and finish", self.work_one),
                ("counts", lambda queue: (queue.counts(), queue.claimed())),
            ):
                ours, other = partial(self.each, act, big), partial(self.each, act, small)
                self.compare(f"{what} with {rows}: ms; empty", "<= 1.1", 5, ours, other)
        status = [*PYTHON, PROGRAM, "--db"]
        ours = partial(self.seconds, *status, grown, "status")
        other = partial(self.seconds, *status, empty, "status")
        self.compare(f"status with {rows}: s; empty", "<= 1.3", 9, ours, other)
        what = f"1,000 jobs, 2 workers, with {rows}: jobs/s; empty"
        self.compare(
            what, ">= 0.9", 3, lambda: self.rate(2, 1000, grown), lambda: self.ours(2, 1000)
        )

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
    def work_one(queue: Queue) -> None:
        job = queue.claim("worker-x-1")
        assert job
        queue.finish(job, Ending("ran", 0, None, 1.0, time.time()))

    def idle_pool(self, count: int) -> None:
        """Start workers, and wait until they have nothing to do."""
        self.path = self.fresh()
        self.pool("--count", str(count), "--quiet")
        until(lambda: len(self.workers()) == count)
        time.sleep(0.5)

    def stop_pool(self) -> None:
        for pool in self.pools:
            pool.terminate()
            pool.communicate()
        self.pools.clear()

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
        bare = partial(self.seconds, *PYTHON, "-c", "import argparse, json, sqlite3")
        self.compare(
            "status as a process: s; python3 with its imports", "<= 1.35", 25, status, bare
        )
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
        ours = statistics.median(pss(facts["pid"]) for facts in self.workers().values())
        self.stop_pool()
        command = [*PYTHON, "-c", "import sqlite3; input()"]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            time.sleep(0.3)
            other = pss(process.pid)
            process.communicate(b"\n")
        what = "memory of an idle worker, of 16: MiB; python3 with sqlite3"
        self.show(what, "<= 0.6", ours, other, ours / other)

    def bench_lines(self) -> None:
        lines, python, what = (
            self.file("lines"),
            " ".join(PYTHON),
            f"enqueue - of {LINES:,} lines: ",
        )
        with open(lines, "w") as file:
            file.writelines(f'{{"command": "echo {n}"}}\n' for n in range(LINES))
        enqueue = f"{python} {PROGRAM} --db {self.fresh()} enqueue - <{lines}"
        loads = f'{python} -c "import json, sys; [*map(json.loads, sys.stdin)]" <{lines}'

        def ours() -> float:
            self.fresh()
            return self.seconds(shell=enqueue)

        other = partial(self.seconds, shell=loads)
        self.compare(what + "s; json.loads of them", "<= 4", 1 if FULL else 3, ours, other)
        self.fresh()
        with subprocess.Popen(f"exec {enqueue}", shell=True, stdout=subprocess.DEVNULL) as process:
            peak = os.wait4(process.pid, 0)[2].ru_maxrss / 1024
            process.returncode = 0
        self.show(what + "MiB at the peak", "<= 64", peak)

    def bench_bounded(self) -> None:
        self.fresh(JOBS)
        reading = f"""if True:
            queue = __import__("queuectl").Queue({self.path!r}, readonly=True)
            while True:
                for job in queue.jobs(): pass"""
        with subprocess.Popen([*PYTHON, "-c", reading], cwd=HERE) as reader:
            pool, size = self.pool("--drain", "--count", "2", "--quiet"), 0.0
            while pool.poll() is None:
                time.sleep(0.005)
                with contextlib.suppress(FileNotFoundError):
                    size = max(size, os.stat(self.path + "-wal").st_size / 2**20)
            reader.kill()
        self.show(f"the log through {JOBS:,} jobs, a reader at it: MiB", "<= 64", size)


def cpu(pid: int) -> float:
    """Return the seconds of processor time that a process has used."""
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0]) / 1e9


def pss(pid: int) -> float:
    """Return the MiB of memory that a process uses, its share of what is shared."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return int(re.findall(r"^Pss: +(\d+)", file.read(), re.MULTILINE)[0]) / 1024


def bench(names: list[str]) -> None:
    """Print figures, all or those named; one that cannot be taken here is skipped."""
    os.environ.pop("PYTHONUNBUFFERED", None)
    known = [name[6:] for name in vars(Figures) if name.startswith("bench_")]
    print(f"{'what: unit; baseline':<62} {'ours':>8} {'baseline':>8} {'ratio':>7}  goal")
    for name in names or known:
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
