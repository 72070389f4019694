"""Tests of queuectl: real processes, real signals, real databases.

    python3 -m unittest                         everything in under a minute
    QUEUECTL_SLOW=1 python3 -m unittest         and the sweeps, which take minutes
    python3 test_queuectl.py bench [NAME...]    figures, with a baseline beside each
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import unittest
from typing import Any, Callable, Dict, List, Optional

import queuectl
from queuectl import Queue

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
        self.pools: List[subprocess.Popen[str]] = []
        self.addCleanup(self.end_everything)

    def end_everything(self) -> None:
        """Leave no process behind, whatever the test did."""
        for pool in self.pools:
            if pool.poll() is None:
                pool.kill()
            pool.communicate()
        until(lambda: not self.kill_ours())

    def kill_ours(self) -> List[int]:
        """Kill every process that works in the directory of this test."""
        found = []
        for pid in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if pid.isdigit() and os.readlink(f"/proc/{pid}/cwd").startswith(self.dir):
                    os.kill(int(pid), signal.SIGKILL)
                    found += [int(pid)] * alive(int(pid))
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

    def run_cli(self, *args: str, stdin: Any = "", code: Optional[int] = 0, **more: Any) -> Any:
        """Run one command; return its result, with stdout and stderr as text."""
        result = subprocess.run(
            [*PYTHON, PROGRAM, *args],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
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

    def workers(self) -> Dict[str, Dict[str, Any]]:
        """Return the living workers and what each says about itself."""
        return queuectl.RunDirectory(self.path).holders("worker")


if __name__ == "__main__":
    unittest.main()
