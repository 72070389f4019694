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
    SEQ.RUN.out     one attempt's output, locked by the worker and, through an inherited
                    descriptor, by every process of the job: free means that all of them are gone

A job in `processing` whose worker's lock is free has crashed. If its attempt's lock is still held,
its orphans are ended first; then it goes back to the queue, and the attempt counts. A worker
without its pool finishes its job and leaves. So a job runs at least once, and never twice at once.

Exit codes: 0 done; 1 the answer is no (a job failed, no such job); 2 bad usage or input; 4 the
database or the machine is at fault; 124 timed out; 128+n ended by signal n.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shlex
import signal
import sqlite3
import stat
import sys
import threading
import time
from datetime import datetime, timezone
from functools import partial
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    NoReturn,
    Sequence,
)

if TYPE_CHECKING:
    import argparse
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

__version__ = "1.0"
__all__ = ["Attempt", "Job", "Queue", "QueueError", "work"]

# --- vocabulary ----------------------------------------------------------------------------------

PENDING, PROCESSING, COMPLETED, DEAD, CANCELLED = STATES = (
    "pending",
    "processing",
    "completed",
    "dead",
    "cancelled",
)
MOVES = {  # every legal change of state; whatever is not here does not happen
    PENDING: (PROCESSING, CANCELLED),
    PROCESSING: (COMPLETED, PENDING, DEAD, CANCELLED),
    DEAD: (PENDING,),
    CANCELLED: (PENDING,),
    COMPLETED: (),
}

OK, NO, USAGE, FAULT, TIMED_OUT, SIGNALLED = 0, 1, 2, 4, 124, 128  # exit codes


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
    """The file is damaged: to wait does not help."""


class Job(NamedTuple):
    """One job, as it was read; the fields are the columns. Times are Unix seconds.

    `attempts` counts the starts since the job was enqueued or retried from the dead letter queue;
    `run` counts every start ever and names one attempt of the job. `max_retries` (how often it may
    start) and `timeout` (seconds, 0 is none) are None where the configuration decides.
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


# --- rules: pure functions -----------------------------------------------------------------------

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
FOREVER = 10 * 365 * 86400.0  # no duration is longer, so that no sum of times overflows
COMMAND_LIMIT = 8191 if os.name == "nt" else 131071  # cmd.exe's; Linux's MAX_ARG_STRLEN


def seconds(value: object) -> float:
    """Return a duration in seconds: a number, or `90`, `90s`, `5m`, `1h30m`, `2d`, `1.5h`."""
    if isinstance(value, str):
        parts = re.findall(r"(\d+(?:\.\d*)?|\.\d+)([smhdw]?)", value.strip().lower())
        if not parts or "".join(n + unit for n, unit in parts) != value.strip().lower():
            raise ValueError("must be a duration such as 90, 90s, 5m or 1h30m")
        if len(parts) > 1 and not all(unit for _, unit in parts):
            raise ValueError("must be a duration such as 90, 90s, 5m or 1h30m")
        value = sum(float(number) * SECONDS[unit or "s"] for number, unit in parts)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("must be a number of seconds, or a duration such as 5m or 1h30m")
    if not 0 <= value <= FOREVER:
        raise ValueError("must be between 0 and 10 years")
    return float(value)


def moment(value: object) -> float:
    """Return Unix seconds: a number of them, or ISO 8601, local time where it has no offset."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("must be a time: ISO 8601, or Unix seconds")
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d*)?\s*", value):
        value = float(value)
    if isinstance(value, str):
        text = re.sub(r"[zZ]$", "+00:00", value.strip())
        try:
            value = datetime.fromisoformat(text).timestamp()
        except (ValueError, OverflowError, OSError):
            raise ValueError(
                "must be a time such as 2030-01-31T08:00 or 2030-01-31T08:00Z"
            ) from None
    if not 0 <= value <= 253402300799:
        raise ValueError("must be a time between 1970 and 9999")
    return float(value)


def whole(low: int, high: int) -> Callable[[object], int]:
    """Return a check for a whole number in a range."""

    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return check


def text(value: object) -> str:
    """Check something that the operating system will be given: no NUL, nothing but Unicode."""
    if not isinstance(value, str):
        raise ValueError("must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode") from None
    if "\0" in value:
        raise ValueError("must not contain NUL")
    return value


def command_line(value: object) -> str:
    """Check a shell line: not blank, and not longer than the system can start."""
    if not text(value).strip():
        raise ValueError("must not be blank")
    if len(text(value).encode()) > COMMAND_LIMIT:
        raise ValueError(f"must not be longer than {COMMAND_LIMIT} bytes; put it into a script")
    return text(value)


def name(value: object) -> str:
    """Check the name of a job or a queue: something that can be typed, seen and told apart."""
    if not 0 < len(text(value)) <= 200 or not re.fullmatch(r"[^\s-]\S*", text(value)):
        raise ValueError("must be 1 to 200 characters, without white space or a leading '-'")
    if not text(value).isprintable():
        raise ValueError("must be printable")
    return text(value)


def names(value: object) -> list[str]:
    """Check a list of names; a string is one with commas."""
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, (list, tuple)):
        raise ValueError("must be a list of ids")
    return [name(item) for item in value]


def directory(value: object) -> str:
    """Check a directory, which need not exist yet, and make it absolute."""
    return os.path.abspath(text(value))


def environment(value: object) -> dict[str, str]:
    """Check a mapping of names of environment variables to their values."""
    if not isinstance(value, Mapping):
        raise ValueError('must be an object such as {"NAME": "value"}')
    for key, item in value.items():
        if not text(key) or "=" in key:
            raise ValueError("must have names without '='")
        text(item)
    return dict(value)


FIELDS: dict[str, Callable[[object], Any]] = {  # what a job may be given, each with its check
    "id": name,
    "command": command_line,
    "queue": name,
    "priority": whole(-1_000_000, 1_000_000),
    "delay": seconds,
    "run_at": moment,
    "timeout": seconds,
    "max_retries": whole(1, 1_000_000),
    "cwd": directory,
    "env": environment,
}


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ": did you mean X?" for a mistyped word, or the choices where none is near."""
    import difflib

    choices = list(known)
    close = difflib.get_close_matches(word, choices, 1, 0.5)
    return f": did you mean {close[0]}?" if close else f"; known are {', '.join(choices)}"


def check_fields(fields: Mapping[str, object]) -> dict[str, Any]:
    """Return the checked fields of a job, or raise BadInput that names the first bad one."""
    checked = {}
    for key, value in fields.items():
        check = FIELDS.get(key)
        if check is None:
            raise BadInput(f"unknown field {printable(key)}{nearest(key, FIELDS)}")
        try:
            checked[key] = check(value)
        except ValueError as error:
            raise BadInput(f"{key} {error}") from None
    if "command" not in checked:
        raise BadInput("a job needs a command")
    if "delay" in checked and "run_at" in checked:
        raise BadInput("a job has a delay or a run_at, not both")
    return checked


class Setting(NamedTuple):
    """One configuration key: what it is when unset, how a value is read, and what it means."""

    default: Any
    read: Callable[[str], Any]
    meaning: str


def number(low: int, high: int) -> Callable[[str], int]:
    """Return a reader for a whole number in a range."""
    check = whole(low, high)

    def read(value: str) -> int:
        return check(int(value) if re.fullmatch(r"[+-]?\d{1,18}", value.strip()) else None)

    return read


def base(value: str) -> float:
    """Read the base of the backoff."""
    try:
        result = float(value)
    except ValueError:
        result = 0.0
    if not 1 <= result <= 1000:
        raise ValueError("must be a number from 1 to 1000")
    return result


def prefix(value: str) -> tuple[str, ...]:
    """Read an argument vector, to which a job's command is added."""
    try:
        words = tuple(shlex.split(text(value), posix=os.name != "nt"))
    except ValueError as error:
        raise ValueError(f"must be a command prefix: {error}") from None
    if not words:
        raise ValueError("must be a command prefix such as 'bash -ec'")
    return words


def durability(value: str) -> str:
    """Read one of the two durabilities."""
    if value not in ("normal", "full"):
        raise ValueError("must be normal or full")
    return value


SHELL = ("cmd.exe", "/d", "/s", "/c") if os.name == "nt" else ("/bin/sh", "-c", "--")
SETTINGS = {
    "max_retries": Setting(3, number(1, 1_000_000), "how often a job is tried"),
    "backoff_base": Setting(2.0, base, "a retry waits this ** attempts seconds (1 to 1000)"),
    "backoff_max": Setting(86400.0, seconds, "and never longer than this"),
    "timeout": Setting(300.0, seconds, "how long an attempt may take (0: no limit)"),
    "kill_grace": Setting(5.0, seconds, "from TERM to KILL when a job is ended"),
    "output_limit": Setting(65536, number(0, 1 << 28), "how many bytes of output are kept"),
    "shell": Setting(SHELL, prefix, "what runs a command: the command is its last argument"),
    "synchronous": Setting("normal", durability, "full: each result synced before the next claim"),
}


def check_setting(key: str, value: str | None = None) -> str:
    """Return the key as it is stored, or raise BadInput for an unknown key or a bad value."""
    key = key.replace("-", "_")
    if key not in SETTINGS:
        raise BadInput(f"unknown key {printable(key)}{nearest(key, SETTINGS)}")
    try:
        if value is not None:
            SETTINGS[key].read(value)
    except ValueError as error:
        raise BadInput(f"{key} {error}") from None
    return key


def backoff(attempts: int, config: Mapping[str, Any]) -> float:
    """Return the seconds to wait after that many failed attempts."""
    try:
        return float(min(config["backoff_base"] ** attempts, config["backoff_max"]))
    except OverflowError:
        return float(config["backoff_max"])


def signal_name(number: int) -> str:
    """Return SIGKILL for 9, and the number itself where it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def exit_meaning(code: int) -> str | None:
    """Return why an exit code (negative: a signal, as in subprocess) is a failure, else None."""
    if code == 0:
        return None
    if code < 0:
        return f"killed by {signal_name(-code)}"
    known = {126: "not executable", 127: "command not found", 9009: "command not found"}
    if 128 < code <= 128 + 64 and code not in known:
        known[code] = f"128 + {signal_name(code - 128)}"
    return f"exit code {code} ({known[code]})" if code in known else f"exit code {code}"


def printable(value: str) -> str:
    """Escape whatever could move the cursor, change colours or reorder text on a terminal."""
    if value.isprintable():
        return value
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)


def iso(when: float | None) -> str | None:
    """Return Unix seconds as ISO 8601 in local time with its offset."""
    if when is None:
        return None
    return (
        datetime.fromtimestamp(when, timezone.utc).astimezone().isoformat(timespec="milliseconds")
    )


def span(duration: float) -> str:
    """Return a duration in at most two units: 0.12 s, 42 s, 3m20s, 2h, 5d."""
    if duration < 10:
        return f"{duration:.2f}".rstrip("0").rstrip(".") + " s"
    if duration < 60:
        return f"{duration:.0f} s"
    units = [("w", 604800), ("d", 86400), ("h", 3600), ("m", 60), ("s", 1)]
    rest = round(duration)
    parts: list[str] = []
    for unit, size in units:
        if rest >= size and len(parts) < 2:
            parts.append(f"{rest // size}{unit}")
            rest %= size
    return "".join(parts)


# --- SQL -----------------------------------------------------------------------------------------

APPLICATION_ID = 0x51554354  # "QUCT"
VERSION = "PRAGMA user_version"
DATA_VERSION = "PRAGMA data_version"  # changes when another connection has written
PRAGMAS = (  # of every connection
    "PRAGMA fullfsync = 1",
    "PRAGMA temp_store = memory",  # else a batch writes each row's rollback journal to a file
)
TRUNCATE_LOG = "PRAGMA wal_checkpoint(TRUNCATE)"
SCHEMA = (  # one script for each version, which ends by saying so
    f"PRAGMA application_id = {APPLICATION_ID};"
    """
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
  due INTEGER NOT NULL                  -- 0 while run_after is ahead: then no claim walks over it
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
""",
)

JOB = "SELECT " + ", ".join(Job._fields) + " FROM jobs "
LAST_SEQ = "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'jobs'"
INSERT = """
INSERT INTO jobs (seq, id, queue, command, cwd, env, state, priority, max_retries, timeout,
                  created_at, updated_at, run_after, due)
VALUES (?, ?, ?, ?, ?, ?, 'pending', ?, ?, ?, ?, ?, ?, ?)"""
IDS_BETWEEN = "SELECT id FROM jobs WHERE seq BETWEEN :first AND :last ORDER BY seq"
ONE = JOB + "WHERE id = :id"
ALL = JOB + "ORDER BY seq"
LATEST = JOB + "WHERE state = :state ORDER BY updated_at DESC, seq DESC LIMIT :limit"
COUNTS = "SELECT queue, state, jobs FROM counts WHERE jobs > 0"
ATTEMPTS = "SELECT " + ", ".join(Attempt._fields) + " FROM attempts WHERE job = :seq ORDER BY run"

WAITING_QUEUES = "SELECT queue FROM counts WHERE state = 'pending' AND jobs > 0"
NEXT_DUE = (
    JOB
    + """WHERE state = 'pending' AND due = 1 AND queue = :queue
ORDER BY priority DESC, run_after, seq LIMIT 1"""
)
MAKE_DUE = """
UPDATE jobs SET due = 1 WHERE seq IN (
  SELECT seq FROM jobs WHERE state = 'pending' AND due = 0 AND queue = :queue
    AND run_after <= :now ORDER BY run_after LIMIT 500)"""
NEXT_LATER = """
SELECT min(run_after) FROM jobs WHERE state = 'pending' AND due = 0 AND queue = :queue"""
CLAIM = """
UPDATE jobs SET state = 'processing', attempts = attempts + 1, run = run + 1,
  locked_by = :worker, locked_at = :now, updated_at = :now
WHERE seq = :seq AND state = 'pending'"""
END_CLAIM = """
UPDATE jobs SET state = :state, attempts = :attempts, exit_code = :exit_code, last_error = :error,
  run_after = :run_after, due = :due, updated_at = :now,
  locked_by = NULL, locked_at = NULL, cancelling = 0
WHERE seq = :seq AND state = 'processing' AND locked_by = :worker AND run = :run"""
ADD_ATTEMPT = "INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
CLAIMED = JOB + "WHERE state = 'processing'"
RETRY = """
UPDATE jobs SET state = 'pending', attempts = 0, run_after = :now, due = 1, updated_at = :now
WHERE id = :id AND state IN ('dead', 'cancelled')"""
DEAD_IDS = "SELECT id FROM jobs WHERE state = 'dead' ORDER BY updated_at"

SETTINGS_STORED = "SELECT key, value FROM config"
SET = "INSERT INTO config VALUES (:key, :value) ON CONFLICT (key) DO UPDATE SET value = :value"
UNSET = "DELETE FROM config WHERE key = :key"

# --- run directory: what is alive now, as locked files -------------------------------------------


def lock(fd: int, *, shared: bool = False) -> bool:
    """Lock an open file without waiting; False where somebody else has it."""
    import fcntl

    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Held:
    """A file of the run directory that this process made and has locked."""

    def __init__(self, path: str) -> None:
        """Make and lock the file; one that a cleaner removed meanwhile is made again."""
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        while True:
            self.fd = os.open(path, flags, 0o600)
            with contextlib.suppress(FileNotFoundError):
                if lock(self.fd) and os.path.samestat(os.fstat(self.fd), os.stat(path)):
                    return
            os.close(self.fd)
            time.sleep(0.001)  # somebody looks at it, or removes it

    def note(self, **facts: object) -> None:
        """Replace the text of the file, which tells others what its holder is doing."""
        import json

        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, json.dumps(facts).encode(), 0)

    def close(self) -> None:
        """Give up this process's hold on the lock; the file goes first."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        os.close(self.fd)


class RunDirectory:
    """The directory beside the database: locks, attempts' output, bells and stop requests."""

    def __init__(self, db: str) -> None:
        """Name the run directory of a database; `make` makes it."""
        self.path = db + ".run"

    def make(self) -> None:
        """Make the directory, for the owner alone whatever the umask."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.path, 0o700)
            os.chmod(self.path, 0o700)

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
            fd = os.open(self.file(*parts), os.O_RDWR)
        except FileNotFoundError:
            return True
        try:
            return lock(fd, shared=True)
        finally:
            os.close(fd)

    def facts(self, *parts: object) -> dict[str, Any]:
        """Return what the holder of a file says about itself, as far as it can be read."""
        import json

        try:
            with open(self.file(*parts), encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def holders(self, kind: str) -> dict[str, dict[str, Any]]:
        """Return the living pools or workers: each one's name and what it says about itself."""
        held = (item for item in self.files(kind + "-") if "." not in item)
        return {item: self.facts(item) for item in held if not self.free(item)}

    def ring(self) -> None:
        """Wake every pool: there may be work. Never waits, and nobody listening is fine."""
        with contextlib.suppress(OSError):  # the work is stored; a pool finds it within a TICK
            for bell in self.files("pool-", ".bell"):
                with contextlib.suppress(OSError):  # ENXIO: its pool is gone
                    fd = os.open(self.file(bell), os.O_WRONLY | os.O_NONBLOCK)
                    try:
                        os.write(fd, b"!")
                    finally:
                        os.close(fd)

    def clean(self) -> None:
        """Remove what the dead left behind; the files of attempts are the recovery's."""
        for item in self.files("pool-") + self.files("worker-"):
            if self.free(item.split(".")[0]):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.file(item))


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


def migrate(db: sqlite3.Connection) -> None:
    """Bring the schema up to date; the changes and their number commit together."""
    db.execute("BEGIN IMMEDIATE")
    for version in range(db.execute(VERSION).fetchone()[0], len(SCHEMA)):
        for statement in statements(SCHEMA[version]):
            db.execute(statement)
    db.execute("COMMIT")


def sync_directory(path: str) -> None:
    """Make a new name in a directory durable, where the system has a way to."""
    with contextlib.suppress(OSError):  # Windows opens no directories
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class Database:
    """The SQLite file: the one way to it, and the one place that decides what its errors mean.

    A connection belongs to one thread of one process, so that an object may be used from threads
    and after a fork. `patient` is asked with the seconds waited whether to wait on for a lock.
    """

    def __init__(self, path: str, *, create: bool = False, readonly: bool = False) -> None:
        """Check that the file is ours, or make it; raise Fault and change nothing if it is not."""
        self.path = os.path.realpath(path)  # one database has one run directory
        self.mode = "ro" if readonly else "rw"
        self.run = RunDirectory(self.path)
        self.synchronous = "full"
        self.patient: Callable[[float], bool] = lambda waited: waited < PATIENCE
        self._local = threading.local()
        with self.faults():
            if create and not os.path.lexists(path):
                self._create()
            if self._inspect() < len(SCHEMA) and not readonly:
                self._retry(lambda: migrate(self.connection))

    def _create(self) -> None:
        """Make the file whole under another name, so that nobody ever sees half of it."""
        self.run.make()
        making = Held(self.run.file("making"))
        try:
            if os.path.lexists(self.path):
                return
            if os.path.lexists(self.path + "-wal"):  # SQLite would replay it into a new file
                raise Fault(f"{self.path}-wal is there without {self.path}: move it away too")
            for left in self.run.files("new.db"):
                os.unlink(self.run.file(left))
            new = self.run.file("new.db")
            os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            os.chmod(new, 0o600)  # whatever the umask
            with contextlib.closing(sqlite3.connect(new, isolation_level=None)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                migrate(db)
            os.rename(new, self.path)
            sync_directory(os.path.dirname(self.path))
        finally:
            making.close()

    def _inspect(self) -> int:
        """Return the version of the schema, without writing a byte to the file."""
        try:
            info = os.stat(self.path)
        except FileNotFoundError:
            raise NotFound(f"there is no queue at {self.path}") from None
        if not stat.S_ISREG(info.st_mode):
            raise Fault(f"{self.path} is not a file")
        if info.st_size == 0:
            raise Fault(f"{self.path} is empty, not a queue; remove it to start a new one")
        self._refuse_planted(info.st_uid)
        with contextlib.closing(self._open("ro")) as db:
            ours = self._retry(lambda: db.execute("PRAGMA application_id").fetchone()[0])
            version = int(self._retry(lambda: db.execute(VERSION).fetchone()[0]))
        if ours != APPLICATION_ID:
            raise Fault(f"{self.path} is another program's database, not a queue")
        if version > len(SCHEMA):
            raise Fault(f"{self.path} was made by a newer queuectl (schema {version})")
        return version

    def _refuse_planted(self, owner: int) -> None:
        """Refuse a stranger's log. As root, SQLite would make it the owner's when it opens it."""
        if os.name == "nt" or os.geteuid() != 0:
            return
        for path in (self.path + "-wal", self.path + "-shm"):
            with contextlib.suppress(FileNotFoundError):
                uid = os.lstat(path).st_uid
                if uid != owner:
                    raise Fault(f"{path} belongs to another user ({uid})")

    def _open(self, mode: str) -> sqlite3.Connection:
        path = re.sub("[%?#]", lambda m: f"%{ord(m[0]):02x}", self.path.replace("\\", "/"))
        uri = f"file:{path if path.startswith('/') else '/' + path}?mode={mode}"
        return sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None)

    @property
    def connection(self) -> sqlite3.Connection:
        """The connection of this thread."""
        if getattr(self._local, "pid", None) != os.getpid():
            self._local.db = self._open(self.mode)
            self._local.pid = os.getpid()
            for pragma in (*PRAGMAS, f"PRAGMA synchronous = {self.synchronous}"):
                self._retry(partial(self._local.db.execute, pragma))
        return self._local.db  # type: ignore[no-any-return]

    def fault(self, error: sqlite3.Error) -> Fault:
        """Return our error for one of SQLite's; what is neither full nor locked is damaged."""
        damaged = type(error) is sqlite3.DatabaseError or "decode" in str(error)
        return (Broken if damaged else Fault)(f"{self.path}: {error}")

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
        began, pause = time.monotonic(), 0.0002
        while True:
            try:
                return act()
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                waited = time.monotonic() - began
                if not self.patient(waited):
                    raise Locked(f"{self.path} has been locked for {span(waited)}") from error
            time.sleep(pause * (0.5 + time.perf_counter_ns() % 1000 / 1000))
            pause = min(pause * 1.5, 0.02)

    def execute(self, sql: str, args: Any = ()) -> sqlite3.Cursor:
        """Execute one statement; within a transaction nothing has to be waited for."""
        db = self.connection
        try:
            if db.in_transaction:
                return db.execute(sql, args)
            return self._retry(lambda: db.execute(sql, args))  # type: ignore[no-any-return]
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise self.fault(error) from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Write: all of it or, on any exception, nothing. The only place that begins one."""
        self.execute("BEGIN IMMEDIATE")
        try:
            with self.faults():
                yield
            self.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise

    def durable(self, synchronous: str) -> None:
        """Choose whether each commit is synced (full), or the caller sees to it (normal)."""
        if synchronous != self.synchronous:
            self.synchronous = synchronous
            self.execute(f"PRAGMA synchronous = {synchronous}")

    def truncate_log(self) -> None:
        """Empty the -wal. Nobody writes meanwhile; gives up if readers do not end within 0.2 s."""
        self.execute("PRAGMA busy_timeout = 200")
        try:
            self.execute(TRUNCATE_LOG).fetchall()
        finally:
            self.execute("PRAGMA busy_timeout = 0")

    def identity(self) -> tuple[int, int] | None:
        """Return what tells this file from another at its path; None where there is none."""
        try:
            info = os.stat(self.path)
        except OSError:
            return None
        return info.st_dev, info.st_ino

    def close(self) -> None:
        """Close this thread's connection."""
        if getattr(self._local, "pid", None) == os.getpid():
            self._local.db.close()
            self._local.pid = None


def distrust(db: Database) -> str | None:
    """Return why somebody else could have put jobs into this queue, or None.

    Looked at after the open, since SQLite replays whatever -wal it finds beside a database.
    """
    if os.name == "nt":
        return None  # the access control lists of the user's own directories keep others out
    where = os.path.dirname(db.path)
    if os.stat(where).st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
        return f"anybody may replace files in {where}"
    for path in (db.path, db.path + "-wal", db.path + "-shm", db.run.path):
        with contextlib.suppress(FileNotFoundError):
            reason = suspicious(os.lstat(path), directory=path == db.run.path)
            if reason:
                return f"{path} {reason}"
    return None


def suspicious(info: os.stat_result, *, directory: bool) -> str | None:
    """Return what makes a file one that others may have written."""
    if not (stat.S_ISDIR if directory else stat.S_ISREG)(info.st_mode):
        return "is not a regular file"
    if info.st_nlink > 1 and not directory:
        return "has another name (a hard link)"
    if info.st_uid != os.geteuid():
        return f"belongs to another user ({info.st_uid})"
    if info.st_mode & stat.S_IWOTH or (info.st_mode & stat.S_IWGRP and shared(info.st_gid)):
        return "may be written by others"
    return None


def shared(gid: int) -> bool:
    """Tell whether a group is more than the private group of the user who runs us."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return True
    return group.gr_name != user.pw_name or any(member != user.pw_name for member in group.gr_mem)


def network(path: str) -> str | None:
    """Return the type of the network file system that a path is on, where that can be told."""
    best = ("", "")
    with contextlib.suppress(OSError), open("/proc/self/mounts", encoding="utf-8") as mounts:
        for line in mounts:
            point, kind = line.split(" ")[1:3]
            if os.path.join(path, "").startswith(os.path.join(point, "")):
                best = max(best, (point, kind), key=lambda found: len(found[0]))
    return best[1] if re.match("nfs|cifs|smb|afs|9p|fuse.sshfs", best[1]) else None


# --- queue: the public interface, and the one place where a state changes -------------------------


class Ending(NamedTuple):
    """How an attempt ended, as whoever watched it saw it; `error` is None if it completed.

    `fate` says who ended it: it "ran" to its end or its timeout, its worker "crashed", or the
    operator had it "returned" to the queue (the attempt does not count) or "cancelled".
    """

    fate: str
    exit_code: int | None
    error: str | None
    started: float
    finished: float
    cut: int = 0
    output: bytes = b""


def sequel(job: Job, ending: Ending, config: Mapping[str, Any]) -> Job:
    """Return the job as it goes on after an attempt: the one rule of retries."""
    now = ending.finished
    after = job._replace(exit_code=ending.exit_code, last_error=ending.error, updated_at=now)
    if ending.fate == "returned" and not job.cancelling:
        return after._replace(state=PENDING, attempts=job.attempts - 1, exit_code=job.exit_code)
    if ending.error is None:
        return after._replace(state=COMPLETED)
    if ending.fate == "cancelled" or job.cancelling:
        return after._replace(state=CANCELLED)
    if job.attempts >= (job.max_retries or config["max_retries"]):
        return after._replace(state=DEAD)
    pause = backoff(job.attempts, config) if ending.fate == "ran" else 0
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
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the queue, and make it where there is none (unless told not to)."""
        self.db = Database(path, create=create and not readonly, readonly=readonly)
        self.clock = clock
        self.settings = {key: setting.default for key, setting in SETTINGS.items()}

    def __enter__(self) -> Queue:
        """Return the queue; leaving the block closes it."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close this thread's connection."""
        self.db.close()

    # adding

    def enqueue(self, command: str, **fields: object) -> str:
        """Add a job and return its id.

        Fields: id, queue, priority (higher first), delay or run_at, timeout (0: none),
        max_retries, cwd (default: here), env (a mapping).
        """
        return next(self.enqueue_many([{"command": command, **fields}]))

    def enqueue_many(self, jobs: Iterable[Mapping[str, object]]) -> Iterator[str]:
        """Add all the jobs or, where one is bad, none; return their ids in order."""
        here, now = os.getcwd(), self.clock()
        with self.db.transaction():
            first = seq = self.db.execute(LAST_SEQ).fetchone()[0] + 1
            for fields in jobs:
                seq = self._insert(seq, check_fields(fields), here, now) + 1
        self.db.run.ring()
        rows = self.db.execute(IDS_BETWEEN, {"first": first, "last": seq - 1})
        return (row[0] for row in rows)

    def _insert(self, seq: int, job: dict[str, Any], here: str, now: float) -> int:
        """Insert a checked job; its id is its number, where it has none, or the next free one."""
        get = job.get
        run_after = get("run_at", now) + get("delay", 0)
        env = None
        if "env" in job:
            import json

            env = json.dumps(job["env"])
        while True:
            try:
                self.db.execute(
                    INSERT,
                    (
                        seq,
                        get("id") or str(seq),
                        get("queue", "default"),
                        job["command"],
                        get("cwd", here),
                        env,
                        get("priority", 0),
                        get("max_retries"),
                        get("timeout"),
                        now,
                        now,
                        run_after,
                        run_after <= now,
                    ),
                )
            except sqlite3.IntegrityError:
                if "id" in job:
                    raise BadInput(f"there is a job {job['id']} already") from None
                seq += 1
            else:
                return seq

    # reading

    def get(self, job_id: str) -> Job:
        """Return one job, or raise NotFound."""
        row = self.db.execute(ONE, {"id": job_id}).fetchone()
        if row is None:
            raise NotFound(f"no job {printable(job_id)} in {self.db.path}")
        return Job(*row)

    def jobs(self, states: Sequence[str] = (), limit: int | None = None) -> Iterator[Job]:
        """Yield jobs in order of arrival; with a limit, the ones that changed last."""
        if limit is None:
            found = (Job(*row) for row in self.db.execute(ALL))
            return (job for job in found if not states or job.state in states)
        latest: list[Job] = []
        for state in states or STATES:
            rows = self.db.execute(LATEST, {"state": state, "limit": limit})
            latest.extend(Job(*row) for row in rows)
        latest.sort(key=lambda job: job.updated_at)
        return iter(sorted(latest[-limit:]))

    def attempts(self, job: Job) -> list[Attempt]:
        """Return the attempts of a job that have ended, the first one first."""
        return [Attempt(*row) for row in self.db.execute(ATTEMPTS, {"seq": job.seq})]

    def counts(self, queues: Sequence[str] = ()) -> dict[str, int]:
        """Return the number of jobs in each state, in these queues or in all."""
        counts = dict.fromkeys(STATES, 0)
        for queue, state, jobs in self.db.execute(COUNTS):
            if not queues or queue in queues:
                counts[state] += jobs
        return counts

    def config(self) -> dict[str, Any]:
        """Return the value of every setting."""
        config = {key: setting.default for key, setting in SETTINGS.items()}
        for key, value in self.db.execute(SETTINGS_STORED):
            if key in SETTINGS:
                config[key] = SETTINGS[key].read(value)
        self.settings = config  # for workers, which have just read it in a transaction
        return config

    # operating

    def configure(self, key: str, value: str | None) -> None:
        """Store a setting, written as on the command line; None goes back to the default."""
        key = check_setting(key, value)
        with self.db.transaction():
            self.db.execute(UNSET if value is None else SET, {"key": key, "value": value})
        self.db.run.ring()

    def retry(self, ids: Iterable[str] | None = None) -> list[str]:
        """Put dead or cancelled jobs (all dead ones, where none is named) back, all or none."""
        with self.db.transaction():
            if ids is None:
                ids = [row[0] for row in self.db.execute(DEAD_IDS)]
            done = list(ids)
            for job_id in done:
                asked = {"id": job_id, "now": self.clock()}
                if not self.db.execute(RETRY, asked).rowcount:
                    raise NotFound(
                        f"job {self.get(job_id).id} is {self.get(job_id).state}, not dead"
                    )
        self.db.run.ring()
        return done

    # working

    def claim(self, worker: str, queues: Sequence[str] = ()) -> Job | None:
        """Give the next due job to a worker, which has its lock; None where nothing is due."""
        with self.db.transaction():
            self.config()
            return self._claim(worker, queues)

    def _claim(self, worker: str, queues: Sequence[str]) -> Job | None:
        now, found = self.clock(), []
        for queue in queues or [row[0] for row in self.db.execute(WAITING_QUEUES)]:
            self.db.execute(MAKE_DUE, {"queue": queue, "now": now})
            found.extend(self.db.execute(NEXT_DUE, {"queue": queue}).fetchall())
        if not found:
            return None
        job = min((Job(*row) for row in found), key=lambda j: (-j.priority, j.run_after, j.seq))
        self.db.execute(CLAIM, {"seq": job.seq, "worker": worker, "now": now})
        return job._replace(
            state=PROCESSING,
            attempts=job.attempts + 1,
            run=job.run + 1,
            locked_by=worker,
            locked_at=now,
            updated_at=now,
        )

    def finish(
        self, job: Job, ending: Ending, claim: Callable[[], Sequence[str]] | None = None
    ) -> tuple[Job | None, Job | None]:
        """Record how a claimed job's attempt ended and, for `claim`'s queues, claim the next.

        Returns the job as it is now, and the next one. None for the first: the claim was lost
        meanwhile, so the result changes nothing.
        """
        with self.db.transaction():
            after = self._end(job, ending)
            return after, self._claim(job.locked_by or "", claim()) if claim else None

    def _end(self, job: Job, ending: Ending) -> Job | None:
        row = ending.error is not None and self.db.execute(ONE, {"id": job.id}).fetchone()
        if row:  # is it being cancelled meanwhile?
            job = job._replace(cancelling=Job(*row).cancelling)
        after = sequel(job, ending, self.config())
        changed = self.db.execute(
            END_CLAIM,
            {
                "state": after.state,
                "attempts": after.attempts,
                "exit_code": after.exit_code,
                "error": after.last_error,
                "run_after": after.run_after,
                "due": after.run_after <= ending.finished,
                "now": ending.finished,
                "seq": job.seq,
                "worker": job.locked_by,
                "run": job.run,
            },
        ).rowcount
        if changed != 1:
            return None
        self.db.execute(
            ADD_ATTEMPT, (job.seq, job.run, job.locked_by, *ending[3:5], *ending[1:3], *ending[5:])
        )
        return after

    def claimed(self) -> list[Job]:
        """Return the jobs that are claimed by a worker, living or dead."""
        return [Job(*row) for row in self.db.execute(CLAIMED)]

    def next_time(self, queues: Sequence[str] = ()) -> float | None:
        """Return when the next job becomes due by itself."""
        waiting = queues or [row[0] for row in self.db.execute(WAITING_QUEUES)]
        times = [self.db.execute(NEXT_LATER, {"queue": queue}).fetchone()[0] for queue in waiting]
        return min((when for when in times if when is not None), default=None)

    def unfinished(self, queues: Sequence[str], horizon: float) -> bool:
        """Tell whether anything is running, due, or becomes due within so many seconds."""
        counts = self.counts(queues)
        if counts[PROCESSING] or not counts[PENDING]:
            return bool(counts[PROCESSING])
        waiting = queues or [row[0] for row in self.db.execute(WAITING_QUEUES)]
        if any(self.db.execute(NEXT_DUE, {"queue": queue}).fetchone() for queue in waiting):
            return True
        return (self.next_time(queues) or 0) <= self.clock() + horizon


# --- processes: launch, find, end; the only place with signals and kills --------------------------

PROC = sys.platform == "linux"  # processes can be looked into through /proc
EXHAUSTED = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # the machine's fault


class Output(Held):
    """One attempt's output: a file that the job itself writes and, while it lives, holds locked."""

    BOUND = 16 << 20  # a longer file loses its beginning while the job runs

    def __init__(self, path: str) -> None:
        """Make the file; one of that name is left over from another queue."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND
        self.path = path
        try:
            self.fd = os.open(path, flags, 0o600)
        except FileExistsError:
            os.unlink(path)
            self.fd = os.open(path, flags, 0o600)
        lock(self.fd)
        self.cut = 0  # bytes that are gone from the file, and from its size

    def reopen(self) -> None:
        """Let go of the descriptor that the job shares, so that the lock is the job's alone."""
        os.close(self.fd)
        self.fd = os.open(self.path, os.O_RDWR | os.O_APPEND)

    def trim(self, limit: int) -> bool:
        """Give back the disk space of a runaway's output, all but what will be kept."""
        info = os.fstat(self.fd)
        if info.st_blocks * 512 <= self.BOUND + limit:
            return False
        if not punch(self.fd, info.st_size - limit):
            os.ftruncate(self.fd, 0)  # a file system without holes: all of it goes
            self.cut += info.st_size
        return True

    def tail(self, limit: int) -> tuple[int, bytes]:
        """Return how much output there was before the last bytes, and the last bytes."""
        cut, output = tail(self.fd, limit)
        return self.cut + cut, output


def tail(fd: int, limit: int) -> tuple[int, bytes]:
    """Return how many bytes of a file come before its last ones, and the last ones."""
    size = os.fstat(fd).st_size
    kept = min(limit, size)
    return size - kept, os.pread(fd, kept, size - kept)


def punch(fd: int, length: int) -> bool:
    """Make the beginning of a file a hole (Linux); False where that cannot be done."""
    import ctypes

    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
    except (AttributeError, OSError, TypeError):
        return False
    keep_size, punch_hole = 1, 2
    offsets = ctypes.c_int64(0), ctypes.c_int64(length)
    return bool(fallocate(fd, keep_size | punch_hole, *offsets) == 0)


class Child:
    """A job's own process; as in subprocess, a negative return code is a signal."""

    def __init__(self, pid: int) -> None:
        """Begin with a process that was just started."""
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return how the process ended, if it did; never wait for it."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                signalled = os.WIFSIGNALED(status)
                self.returncode = -os.WTERMSIG(status) if signalled else os.WEXITSTATUS(status)
        return self.returncode


def launch(job: Job, shell: Sequence[str], env: Mapping[bytes, bytes], out: Output) -> Child:
    """Start a job's command in a session of its own; OSError where it cannot be started.

    The output file is passed on a third time, as a descriptor that no redirection closes. Nothing
    else is: see `keep_descriptors`.
    """
    os.set_inheritable(out.fd, True)  # noqa: FBT003
    os.chdir(job.cwd)
    try:
        return spawn([*shell, job.command], env, out.fd)
    finally:
        with contextlib.suppress(OSError):
            os.chdir(os.path.dirname(out.path))  # keep no directory of a job's busy


def keep_descriptors() -> None:
    """Let no descriptor but the standard ones outlive an exec: multiprocessing made others."""
    for fd in map(int, os.listdir("/dev/fd")):
        if fd > 2:
            with contextlib.suppress(OSError):  # the one of the listing
                os.set_inheritable(fd, False)  # noqa: FBT003


def spawn(argv: list[str], env: Mapping[bytes, bytes], out: int) -> Child:
    """Start a program; subprocess takes twice as long and, before Python 3.10, four times."""
    actions = (
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, out, 1),
        (os.POSIX_SPAWN_DUP2, out, 2),
    )
    unignored = (signal.SIGPIPE, signal.SIGXFSZ)  # as Python has them; what it handles is reset
    try:
        pid = os.posix_spawnp(
            argv[0], argv, env, file_actions=actions, setsid=True, setsigdef=unignored
        )
    except NotImplementedError:  # setsid, in a Python that was built for an old C library
        import subprocess

        return subprocess.Popen(  # type: ignore[return-value]  # it has what a Child has
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            close_fds=False,
            start_new_session=True,
        )
    return Child(pid)


def run_key(job: Job) -> str:
    """Return what every process of one attempt has in its environment, as QUEUECTL_RUN."""
    return f"{job.seq}.{job.run}.{job.locked_by}"


def members(job: Job, run: RunDirectory) -> list[int]:
    """Return the processes of an attempt, as far as they can be told from strangers for certain."""
    if PROC:
        key = b"\0QUEUECTL_RUN=" + run_key(job).encode() + b"\0"
        found = [pid for pid in others() if key in b"\0" + read_proc(pid, "environ")]
        if found or run.free(job.seq, job.run, "out"):
            return found
        return [pid for pid in others() if holds(pid, run.file(job.seq, job.run, "out"))]
    return group(run.facts(job.locked_by), job)


def others() -> list[int]:
    """Return the processes of the machine without this one."""
    return [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and int(pid) != os.getpid()]


def read_proc(pid: int, *parts: str) -> bytes:
    """Return a file of /proc; empty where the process is gone or not ours to look at."""
    try:
        with open(os.path.join("/proc", str(pid), *parts), "rb") as file:
            return file.read()
    except OSError:
        return b""


def holds(pid: int, path: str) -> bool:
    """Tell whether a process holds the lock of a file (to have it open is not enough)."""
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), os.stat(path)):
                    info = read_proc(pid, "fdinfo", fd)
                    if re.search(rb"FLOCK +ADVISORY +WRITE", info):
                        return True
    return False


def group(facts: Mapping[str, Any], job: Job) -> list[int]:
    """Return the process group of an attempt where there is no /proc: by pid and start time.

    A leader that did not start when the job was launched is a stranger who got the pid later.
    """
    import subprocess

    if facts.get("run") != run_key(job) or "job_pid" not in facts:
        return []
    env = {**os.environ, "LC_ALL": "C"}
    table = subprocess.run(
        ["ps", "-axo", "pid=,pgid=,lstart="], stdout=subprocess.PIPE, check=False, env=env
    ).stdout.decode(errors="replace")
    found = []
    for line in table.splitlines():
        pid, pgid, *started = line.split()
        if int(pgid) != facts["job_pid"] or len(started) != 5:
            continue
        when = time.mktime(time.strptime(" ".join(started), "%a %b %d %H:%M:%S %Y"))
        if pid == pgid and abs(when - facts["launched"]) > 2:
            return []
        found.append(int(pid))
    return found


def send_signal(pids: Iterable[int], *signals: int) -> None:
    """Signal processes, each by its own pid; one that is gone meanwhile is fine."""
    for pid in pids:
        for number in signals:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)


class Ender:
    """Ends all processes of an attempt: TERM (and CONT: a stopped one must hear it), then KILL."""

    def __init__(self, job: Job, run: RunDirectory, grace: float) -> None:
        """Begin with the grace period."""
        self.job, self.run = job, run
        self.deadline = time.monotonic() + grace
        self.asked: set[int] = set()

    def gone(self) -> bool:
        """Go on with the ending, and tell whether it is done: no process, and the lock free."""
        found = members(self.job, self.run)
        if time.monotonic() >= self.deadline:
            send_signal(found, signal.SIGKILL)
        else:
            send_signal(set(found) - self.asked, signal.SIGTERM, signal.SIGCONT)
            self.asked.update(found)
        return not found and self.run.free(self.job.seq, self.job.run, "out")


class Waker:
    """Makes signals readable: a pipe that can be waited for along with everything else."""

    def __init__(self, handlers: Mapping[int, Callable[[int, Any], None]]) -> None:
        """Install handlers, but leave a hang-up ignored under nohup."""
        self.fd, self.end = os.pipe()
        for fd in (self.fd, self.end):
            os.set_blocking(fd, False)
        self.before = {}
        for number, handler in handlers.items():
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self.before[number] = signal.signal(number, handler)
        self.before_fd = signal.set_wakeup_fd(self.end, warn_on_full_buffer=False)

    def clear(self) -> None:
        """Forget the signals so far."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 4096)

    def close(self) -> None:
        """Put everything back as it was."""
        signal.set_wakeup_fd(self.before_fd)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        os.close(self.fd)
        os.close(self.end)


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))


def ignore(_number: int, _frame: object) -> None:
    """Do nothing, but not as SIG_IGN: that would be inherited by the jobs."""


def sane_signals() -> Waker:
    """Give a worker's jobs the signals they expect, whoever started the pool, and return its waker.

    The worker itself hears nothing but its jobs' ends: when to stop, it is told by its pool.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    return Waker(dict.fromkeys((*STOP_SIGNALS, signal.SIGCHLD), ignore))


# --- worker: one job at a time --------------------------------------------------------------------

BATCH = 0.04  # seconds that news for the pool may wait for company


class Worker:
    """A process that claims a job, runs it, records how it ended, and claims the next.

    It waits in one place: for its job's end, its pool's word, and the next deadline. Messages from
    the pool: "go" (there may be work), "stop" (claim no more), "now" (and end the job), or the key
    of a run to cancel. The end of the pipe means that the pool is gone: finish, and leave.
    """

    def __init__(
        self, path: str, name: str, slot: int, queues: Sequence[str], pool: Connection
    ) -> None:
        """Take the lock that says: this worker is alive."""
        self.queue = Queue(path, create=False)
        self.db, self.run_dir = self.queue.db, self.queue.db.run
        self.name, self.slot, self.queues, self.pool = name, slot, queues, pool
        self.held = Held(self.run_dir.file(name))
        self.facts = {"pid": os.getpid(), "slot": slot}
        self.held.note(**self.facts)
        self.inherited = dict(os.environb)
        keep_descriptors()
        self.waker = sane_signals()
        self.config = self.queue.config()
        self.db.durable(self.config["synchronous"])
        self.db.patient = self.patient
        self.stopping = self.now = self.alone = False
        self.cancelled: str | None = None
        self.news: list[tuple[str, ...]] = []
        self.flush_at = float("inf")

    def patient(self, waited: float) -> bool:
        """Wait for a lock, but not when it is time to leave."""
        self.hear()
        return not (self.stopping and waited > 0.3)

    def main(self) -> None:
        """Work until told to stop."""
        job = self.claim()
        while True:
            while job is None and not self.stopping:
                self.tell("idle")
                self.flush()
                self.wait(None)
                job = self.claim()
                if job:
                    self.tell("took")
                    self.flush()
            if job is None:
                break
            job = self.finish(job, *self.perform(job))
        self.tell("bye")
        self.flush()
        self.held.close()

    def tell(self, *news: str) -> None:
        """Collect news for the pool; it gets them within BATCH, or at the next flush."""
        self.news.append(news)
        self.flush_at = min(self.flush_at, time.monotonic() + BATCH)

    def flush(self) -> None:
        """Tell the pool; without one there is nobody to tell."""
        news, self.news, self.flush_at = self.news, [], float("inf")
        try:
            self.pool.send(news)
        except OSError:
            self.left_alone()

    def left_alone(self) -> None:
        """Go on without a pool: nobody else syncs what is recorded now."""
        self.alone = self.stopping = True

    def hear(self) -> None:
        """Take in what the pool says."""
        try:
            while not self.alone and self.pool.poll():
                word = self.pool.recv()
                self.stopping |= word in ("stop", "now")
                self.now |= word == "now"
                if word not in ("go", "stop", "now"):
                    self.cancelled = word
        except (EOFError, OSError):
            self.left_alone()

    def wait(self, until: float | None) -> None:
        """Wait for a child's end, the pool, or a time on the monotonic clock."""
        import select

        now = time.monotonic()
        if now >= self.flush_at:
            self.flush()
        until = min(self.flush_at, float("inf") if until is None else until)
        pool = [] if self.alone else [self.pool.fileno()]
        limit = None if until == float("inf") else max(0.0, until - now)
        if self.alone and limit is None:
            return  # nobody is left who could say anything
        ready = select.select([self.waker.fd, *pool], [], [], limit)[0]
        if self.waker.fd in ready:
            self.waker.clear()
        if ready != [self.waker.fd]:
            self.hear()

    def claim(self) -> Job | None:
        """Claim a job; a fault of the database or the disk is waited out."""
        warned = False
        while not self.stopping:
            try:
                return self.queue.claim(self.name, self.queues)
            except Broken as error:
                self.give_up(error)
            except Fault as error:
                warned = self.complain(f"cannot claim a job: {error}; trying again", warned=warned)
        return None

    def give_up(self, error: Broken) -> None:
        """Leave a damaged database, and have the pool leave it."""
        self.tell("broken", str(error))
        self.stopping = True

    def complain(self, text: str, *, warned: bool = False) -> bool:
        """Say once what is wrong, and wait before the next try."""
        if not warned:
            self.tell("note", "", text)
        self.flush()
        self.wait(time.monotonic() + 0.25)
        return True

    def perform(self, job: Job) -> tuple[Ending, Output | None]:
        """Run one attempt of a job to its end."""
        self.config = self.queue.settings
        started, out = self.queue.clock(), None
        try:
            out = Output(self.run_dir.file(job.seq, job.run, "out"))
            child = launch(job, self.config["shell"], self.environment(job), out)
        except OSError as failure:
            return self.unstartable(job, failure, started), out
        if not PROC:
            self.held.note(**self.facts, run=run_key(job), job_pid=child.pid, launched=started)
        fate, error = self.watch(job, child, out)
        if error or child.returncode:
            self.end(job, child, out)
        error = error or exit_meaning(child.returncode or 0)
        finished = max(self.queue.clock(), started)
        tail = out.tail(self.config["output_limit"])
        return Ending(fate, child.returncode, error, started, finished, *tail), out

    def environment(self, job: Job) -> dict[bytes, bytes]:
        """Return a job's environment: the worker's, then the job's own, then ours."""
        env = {
            "QUEUECTL_JOB_ID": job.id,
            "QUEUECTL_ATTEMPT": str(job.attempts),
            "QUEUECTL_WORKER": str(self.slot),
            "QUEUECTL_DB": self.db.path,
            "QUEUECTL_RUN": run_key(job),
        }
        if job.env:
            import json

            env = {**json.loads(job.env), **env}
        return {**self.inherited, **{os.fsencode(k): os.fsencode(v) for k, v in env.items()}}

    def unstartable(self, job: Job, error: OSError, started: float) -> Ending:
        """Decide whose fault it is that a job did not start: its own, or the machine's."""
        reason = f"cannot start: {error.strerror}"
        if error.filename:
            reason += f": {error.filename}"
        if error.errno not in (*EXHAUSTED, errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return Ending("ran", None, reason, started, self.queue.clock())
        self.complain(f"job {job.id} {reason}; trying again")
        return Ending("returned", None, reason, started, self.queue.clock())

    def watch(self, job: Job, child: Child, out: Output) -> tuple[str, str | None]:
        """Wait for the end of a job, or for a reason to end it."""
        timeout = self.config["timeout"] if job.timeout is None else job.timeout
        deadline = time.monotonic() + timeout if timeout else float("inf")
        pause = 0.01
        while child.poll() is None:
            if self.now:
                return "returned", "stopped by the operator"
            if self.cancelled == run_key(job):
                return "cancelled", "cancelled by the operator"
            if time.monotonic() >= deadline:
                return "ran", f"timed out after {span(timeout)}"
            now = time.monotonic()
            self.wait(min(deadline, now + pause))
            if time.monotonic() > now + pause:
                full = out.trim(self.config["output_limit"])
                pause = 0.01 if full else min(pause * 2, 0.64)
        return "ran", None

    def end(self, job: Job, child: Child, out: Output) -> None:
        """End what is left of an attempt; return when every process of it is gone."""
        out.reopen()
        ender, pause = Ender(job, self.run_dir, self.config["kill_grace"]), 0.005
        while not (ender.gone() and child.poll() is not None):
            self.wait(time.monotonic() + pause)
            pause = min(pause * 1.5, 0.05)

    def finish(self, job: Job, ending: Ending, out: Output | None) -> Job | None:
        """Record how an attempt ended and claim the next job, in one transaction.

        A result that cannot be stored is kept and tried again, and nothing is claimed meanwhile;
        when it is time to leave, it stays in the run directory for whoever recovers the job.
        """
        warned = False
        while True:
            try:
                self.db.durable("full" if self.alone else self.config["synchronous"])
                claim = None if self.stopping else lambda: self.queues
                after, following = self.queue.finish(job, ending, claim)
            except Fault as error:
                if isinstance(error, Broken):
                    self.give_up(error)
                if self.stopping:
                    keep(self.run_dir, job, ending, out)
                    return None
                text = f"cannot record how job {job.id} ended: {error}; trying again"
                warned = self.complain(text, warned=warned)
            else:
                if out:
                    out.close()
                self.tell(*event(job, after, ending))
                return following


def event(job: Job, after: Job | None, ending: Ending) -> tuple[str, str, str]:
    """Return the news of an attempt's end: ("ended", the state now, a line for people)."""
    name, took = printable(job.id), span(ending.finished - ending.started)
    reason = printable(ending.error or "")
    if after is None:
        return "ended", "", f"job {name} is no longer ours: its result was dropped"
    if after.state == COMPLETED:
        return "ended", COMPLETED, f"job {name} completed in {took}"
    if after.state == PENDING and ending.fate == "ran":
        again = span(after.run_after - ending.finished)
        return (
            "ended",
            PENDING,
            f"job {name} failed: {reason}; try {job.attempts}, next in {again}",
        )
    if after.state == PENDING:
        return "ended", PENDING, f"job {name} is back in the queue: {reason}"
    return "ended", after.state, f"job {name} is {after.state}: {reason} (attempt {job.attempts})"


def keep(run: RunDirectory, job: Job, ending: Ending, out: Output | None) -> None:
    """Keep a result that cannot be stored, as a file's name: that needs no space on a full disk."""
    import json
    from urllib.parse import quote

    cut = ending.cut if out and out.cut else 0  # what the file itself does not tell
    facts = json.dumps([*ending[:2], (ending.error or "")[:60] or None, *ending[3:5], cut])
    if out:
        os.rename(out.path, run.file(job.seq, job.run, "end" + quote(facts, safe="")))


def kept(run: RunDirectory, job: Job) -> tuple[str | None, Ending | None]:
    """Return the output file of a dead worker's job and, if it was kept, how its attempt ended."""
    import json
    from urllib.parse import unquote

    start = f"{job.seq}.{job.run}."
    for item in run.files(start):
        if item.startswith(start + "end"):
            ending = Ending(*json.loads(unquote(item[len(start) + 3 :])))
            return run.file(item), ending
    return (run.file(start + "out"), None) if run.files(start + "out") else (None, None)


def run_worker(environ: dict[bytes, bytes], *worker: Any) -> None:
    """Be a worker, in the environment of its pool: where a worker process starts."""
    os.environb.clear()
    os.environb.update(environ)
    Worker(*worker).main()
    os._exit(0)  # without closing the database: SQLite would remove a -wal of that name


# --- pool: starts the workers, wakes them, recovers what the dead left ----------------------------

TICK = 0.25  # seconds between looks at what rings no bell
LOG_BOUND = 16 << 20  # bytes of -wal; SQLite lets it grow as long as there is always a reader
BROKEN = 5  # workers that die without a job in a minute: then something is wrong with the machine


class Member:
    """A worker as its pool sees it."""

    def __init__(self, name: str, slot: int, process: BaseProcess, conn: Connection) -> None:
        """Begin as busy: a new worker looks for a job by itself."""
        self.name, self.slot, self.process, self.conn = name, slot, process, conn
        self.idle = self.leaving = False

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
        self.queue, self.db, self.run_dir = queue, queue.db, queue.db.run
        self.count, self.queues, self.say = count, queues, say
        self.name = "pool-" + os.urandom(4).hex()
        self.drain, self.horizon, self.code = False, FOREVER, OK
        self.fault: Fault | None = None
        self.waker: Waker | None = None
        self.signals: list[tuple[float, int]] = []
        self.stopping = self.now = False
        self.members: list[Member] = []
        self.missing = [(0.0, slot) for slot in range(1, count + 1)]  # who is to be started, when
        self.serial, self.replace_at = 0, 0.0
        self.deaths: list[float] = []  # of workers that had no job
        self.enders: dict[str, Ender] = {}
        self.news, self.served = 1, 1  # occasions to look for work, and the last one looked after
        self.woken: Member | None = None
        self.look_at, self.sync_at, self.truncate_at = 0.0, float("inf"), 0.0
        self.version, self.next_time, self.wal = -1, float("inf"), -1
        self.db.patient = lambda waited: waited < 0.3

    def on_signal(self, number: int, _: object) -> None:
        """Note a signal; the loop reads it."""
        self.signals.append((time.monotonic(), number))

    def main(self) -> int:
        """Run until stopped or drained; return the exit code."""
        with self.db.faults():
            held = Held(self.run_dir.file(self.name))
            facts = {"host": os.uname().nodename, "queues": list(self.queues), "count": self.count}
            held.note(pid=os.getpid(), started=self.queue.clock(), **facts)
            os.mkfifo(self.run_dir.file(self.name, "bell"), 0o600)
            self.bell = os.open(self.run_dir.file(self.name, "bell"), os.O_RDWR | os.O_NONBLOCK)
        self.identity = self.db.identity()
        self.run_dir.clean()
        try:
            while self.members or not self.stopping:
                self.turn()
        finally:
            for member in self.members:
                member.conn.close()  # that tells them
            for item in self.run_dir.files(self.name + "."):
                os.unlink(self.run_dir.file(item))
            held.close()
            os.close(self.bell)
        self.sync()
        if self.fault:
            raise self.fault
        return self.code

    def turn(self) -> None:
        """Wait for something to happen, take it in, act on it."""
        ready = self.wait()
        for member in [member for member in self.members if member.conn in ready]:
            try:  # the end of its pipe is an EOFError
                for kind, *text in member.conn.recv():
                    self.take(member, kind, text)
            except (EOFError, OSError):
                self.bury(member)
        self.obey()
        now = time.monotonic()
        if now >= self.look_at:
            try:
                self.look()
            except Locked:
                pass  # somebody writes for a long time: at the next look
            except Fault as error:
                self.fail(error)
            self.look_at = now + (0.03 if self.enders else TICK)
        self.staff(now)
        self.wake()
        if now >= self.sync_at:
            self.sync()

    def wait(self) -> list[Any]:
        """Sleep until the bell, a worker, a signal, or the next time to look; return who spoke."""
        from multiprocessing.connection import wait

        due = time.monotonic() + max(0.0, self.next_time - self.queue.clock())
        until = min(self.look_at, self.sync_at, due, *(when for when, _ in self.missing))
        sources: list[Any] = [self.bell, *(member.conn for member in self.members)]
        if self.waker:
            sources.append(self.waker.fd)
        ready = wait(sources, max(0.0, until - time.monotonic()))
        if self.waker and self.waker.fd in ready:
            self.waker.clear()
        if self.bell in ready:
            os.read(self.bell, 65536)
            self.news += 1
            self.look_at = 0.0
        if self.queue.clock() >= self.next_time:
            self.news += 1
            self.next_time = float("inf")
            self.look_at = min(self.look_at, time.monotonic() + BATCH)
        return ready

    def take(self, member: Member, kind: str, text: list[str]) -> None:
        """Take in one piece of a worker's news."""
        if kind == "broken":
            self.fail(Fault(text[0]))
        elif kind in ("idle", "took", "bye"):
            member.idle = kind == "idle"
            member.leaving = kind == "bye"
            if member is self.woken:
                self.woken = None
                if member.idle:
                    self.served = self.serving
        else:
            self.report(*text)

    def report(self, state: str, text: str) -> None:
        """Say what happened to a job, and see to what follows from it."""
        self.say(text)
        soon = time.monotonic() + BATCH
        self.sync_at = min(self.sync_at, soon)
        if state == DEAD and self.drain:
            self.code = NO
        if state == PENDING:
            self.look_at = min(self.look_at, soon)  # when is it due?

    def bury(self, member: Member) -> None:
        """Let a worker go that is gone; one that left without a word is replaced."""
        self.members.remove(member)
        member.conn.close()
        member.process.join(1)
        if member is self.woken:
            self.woken = None
        if member.leaving:
            return
        self.say(f"{member.name} died")
        self.look_at, now = 0.0, time.monotonic()
        with contextlib.suppress(Locked):
            if not any(job.locked_by == member.name for job in self.queue.claimed()):
                self.deaths = [then for then in self.deaths if then > now - 60] + [now]
        if len(self.deaths) > BROKEN:
            self.fail(Fault(f"{len(self.deaths)} workers died in a minute without a job"))
        if not self.stopping:
            self.replace_at = max(now, self.replace_at + 1)
            self.missing.append((self.replace_at, member.slot))

    def obey(self) -> None:
        """Act on signals: the first one stops, another at least a second later ends the jobs."""
        for when, number in self.signals:
            if not self.stopping:
                self.stop(f"{signal_name(number)}: no new jobs; finishing the running ones")
            elif when - self.signals[0][0] >= 1 and not self.now:
                self.code = SIGNALLED + number
                self.stop("ending the running jobs; they go back to the queue", "now")

    def stop(self, why: str, word: str = "stop") -> None:
        """Stop: claim no more or, for "now", end the running jobs too."""
        if why:
            self.say(why)
        self.stopping, self.now, self.missing = True, word == "now", []
        for member in self.members:
            member.send(word)

    def fail(self, fault: Fault) -> None:
        """Stop because of something that no worker can work with."""
        if not self.fault:
            self.fault = fault
            self.stop("stopping: " + str(fault))

    def look(self) -> None:
        """Look at what rings no bell: stop requests, the file itself, other writers, the dead."""
        if self.db.identity() != self.identity:
            LEAKED.append(self.db.connection)
            self.fail(Fault(f"{self.db.path} was moved away or replaced"))
            return
        with contextlib.suppress(OSError), open(self.run_dir.file(self.name, "stop")) as file:
            word = file.read()
            if word and not (self.now or (self.stopping and word == "stop")):
                self.stop("asked to stop", word)
        self.recover()
        version = self.db.execute(DATA_VERSION).fetchone()[0]
        if version != self.version:
            self.version = version
            self.news += 1
            self.next_time = self.queue.next_time(self.queues) or float("inf")

    def recover(self) -> None:
        """Put jobs whose worker is gone back into the queue, once all their processes are gone."""
        living = {member.name for member in self.members}
        for job in self.queue.claimed():
            if job.locked_by in living or not self.run_dir.free(job.locked_by):
                continue
            key = run_key(job)
            if key not in self.enders:
                grace = self.queue.config()["kill_grace"]
                self.enders[key] = Ender(job, self.run_dir, grace)
            if not self.enders[key].gone():
                continue
            del self.enders[key]
            path, ending = kept(self.run_dir, job)
            then, now = job.locked_at or 0.0, self.queue.clock()
            ending = ending or Ending("crashed", None, "its worker died", then, max(then, now))
            if path:
                fd = os.open(path, os.O_RDONLY)
                cut, output = tail(fd, self.queue.config()["output_limit"])
                os.close(fd)
                ending = ending._replace(cut=ending.cut + cut, output=output)
            after = self.queue.finish(job, ending)[0]
            if path:
                os.unlink(path)
            self.news += 1
            if after:
                self.report(*event(job, after, ending)[1:])

    def staff(self, now: float) -> None:
        """Start the workers that are missing and due."""
        for when, slot in [] if self.stopping else list(self.missing):
            if when <= now:
                self.missing.remove((when, slot))
                self.serial += 1
                name = f"worker-{self.name[5:]}-{self.serial}"
                self.members.append(hire(self.db.path, name, slot, self.queues))

    def wake(self) -> None:
        """Wake one idle worker if there may be work; when it took some, the next one."""
        idle = [member for member in self.members if member.idle]
        if self.stopping or self.woken:
            return
        if self.news != self.served and idle:
            self.woken, self.serving = idle[0], self.news
            idle[0].send("go")
        elif self.drain and len(idle) == self.count and not self.enders:
            with contextlib.suppress(Locked):
                if not self.queue.unfinished(self.queues, self.horizon):
                    self.stop("")

    def sync(self) -> None:
        """Make what the workers recorded durable: they do not wait for the disk themselves.

        A descriptor of our own on the -wal is safe: unlike the database, it carries no locks.
        """
        self.sync_at = float("inf")
        with contextlib.suppress(FileNotFoundError):
            if self.wal < 0:
                self.wal = os.open(self.db.path + "-wal", os.O_RDONLY)
            sync_file(self.wal)
            began = time.monotonic()
            if os.fstat(self.wal).st_size > LOG_BOUND and began >= self.truncate_at:
                with contextlib.suppress(Fault):
                    self.db.truncate_log()
                now = time.monotonic()  # a reader that stays must not hold up the work
                self.truncate_at = now + 20 * (now - began)


LEAKED: list[sqlite3.Connection] = []  # not closed: SQLite would remove the -wal of another file


def sync_file(fd: int) -> None:
    """Sync a file, on macOS down to the medium."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # type: ignore[attr-defined,unused-ignore]
        return
    getattr(os, "fdatasync", os.fsync)(fd)


def importable() -> Any:
    """Return this module, under a name by which a worker process can import it if there is one."""
    import importlib

    here = os.path.realpath(__file__)
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if __name__ != "__main__":
        return sys.modules[__name__]
    if os.path.dirname(here) not in sys.path:
        sys.path.append(os.path.dirname(here))
    with contextlib.suppress(ImportError):
        module = importlib.import_module(
            spec.name if spec else os.path.splitext(os.path.basename(here))[0]
        )
        if os.path.realpath(str(module.__file__)) == here:
            return module
    return sys.modules["__main__"]


def start_fork_server() -> None:
    """Start it where it finds our module: before Python 3.13 it does not look along sys.path."""
    from multiprocessing import forkserver

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def hire(path: str, name: str, slot: int, queues: Sequence[str]) -> Member:
    """Start a worker process.

    From a fork server, which has loaded everything once; never by a plain fork: siblings would
    hold each other's pipes and locks open. The main program is hidden, so that workers neither
    load nor run it.
    """
    import multiprocessing
    import types

    module = importable()
    if "forkserver" in multiprocessing.get_all_start_methods():
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([module.__name__, "json", "select"])
        start_fork_server()
    else:
        context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    what = (dict(os.environb), path, name, slot, queues, theirs)
    process = context.Process(target=module.run_worker, args=what, daemon=False)
    main = sys.modules["__main__"]
    if module is not main:
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        process.start()
    finally:
        sys.modules["__main__"] = main
    theirs.close()
    return Member(name, slot, process, ours)


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
) -> int:
    """Run jobs with `count` workers until stopped or, with `drain`, until nothing is left to run.

    Jobs that are due more than `horizon` seconds from now are not waited for. Returns the exit
    code: 0, 1 if a drain left a dead job, 128+n if signal n ended the jobs. `signals` lets INT,
    TERM and HUP stop it, which only a main thread may ask for; `queuectl worker stop` always can.
    """
    queue = Queue(path)
    reason = distrust(queue.db)
    if reason and not insecure:
        raise Fault(f"{reason}: whoever writes there runs commands as you; see --insecure")
    queue.config()  # where that is damaged, no worker could begin
    kind = network(queue.db.path)
    if kind:
        say(f"warning: {queue.db.path} is on {kind}; SQLite needs a local disk")
    pool = Pool(queue, count, queues, say)
    pool.drain, pool.horizon = drain, horizon
    if signals:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])  # else the fork server misses its SIGCHLD
        pool.waker = Waker(dict.fromkeys(STOP_SIGNALS, pool.on_signal))
    try:
        return pool.main()
    finally:
        if pool.waker:
            pool.waker.close()


# --- reports: jobs as text ------------------------------------------------------------------------


def table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], width: int = 0
) -> Iterator[str]:
    """Yield aligned lines; with a width, the last column is cut to fit."""
    lines = [[printable(str(cell)) for cell in row] for row in (headings, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    for line in lines:
        text = "  ".join(cell.ljust(size) for cell, size in zip(line, widths)).rstrip()
        yield text[: width - 1] + "…" if 0 < width < len(text) else text


def ago(when: float, now: float) -> str:
    """Return a time in words: `3m ago`, `in 2h`."""
    distance = abs(when - now)
    words = span(round(distance)) if distance >= 1 else "now"
    return words if words == "now" else f"in {words}" if when > now else f"{words} ago"


def job_facts(job: Job, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job as JSON shows it: the fields of the table, times in ISO 8601."""
    import json

    facts: dict[str, Any] = job._asdict()
    for key in ("created_at", "updated_at", "run_after", "locked_at"):
        facts[key] = iso(facts[key])
    for key in ("max_retries", "timeout"):
        facts[key] = config[key] if facts[key] is None else facts[key]
    facts["env"] = json.loads(job.env) if job.env else {}
    return facts


def attempt_facts(attempt: Attempt) -> dict[str, Any]:
    """Return an attempt as JSON shows it; output that is not UTF-8 has replacement characters."""
    facts: dict[str, Any] = attempt._asdict()
    facts.update(started=iso(attempt.started), finished=iso(attempt.finished))
    facts["output"] = attempt.output.decode(errors="replace")
    return facts


def job_row(job: Job, config: Mapping[str, Any], now: float) -> tuple[object, ...]:
    """Return a job as a row of a list."""
    when = job.run_after if job.state == PENDING else job.updated_at
    tries = f"{job.attempts}/{job.max_retries or config['max_retries']}"
    reason = job.last_error or "" if job.state in (DEAD, PENDING, CANCELLED) else ""
    return job.id, job.state, tries, ago(when, now), reason, job.command


JOB_HEADINGS = ("ID", "STATE", "TRIES", "WHEN", "WHY", "COMMAND")


def job_text(job: Job, attempts: Sequence[Attempt], config: Mapping[str, Any]) -> Iterator[str]:
    """Yield everything about a job for people."""
    for key, value in job_facts(job, config).items():
        if value not in (None, {}) and key not in ("seq", "run", "cancelling"):
            yield f"{key:<12} {printable(str(value))}"
    if attempts:
        yield ""
        rows = (
            (a.run, iso(a.started), span(a.finished - a.started), a.error or "completed", a.worker)
            for a in attempts
        )
        yield from table(("RUN", "STARTED", "TOOK", "ENDED", "WORKER"), rows)


# --- command line ---------------------------------------------------------------------------------


class Command(NamedTuple):
    """A subcommand: what runs it, what it is for, an example, and its arguments."""

    run: Callable[[argparse.Namespace], int]
    help: str
    example: str
    arguments: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = ()


def arg(*names: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Describe one argument of a command, as argparse takes it."""
    return names, options


def say(text: str) -> None:
    """Tell a person something: on stderr, where it is open."""
    if sys.stderr:
        print(f"queuectl: {text}", file=sys.stderr, flush=True)


def show_json(facts: Mapping[str, Any]) -> None:
    """Print one object on one line, in ASCII."""
    import json

    print(json.dumps(facts))


def opened(args: argparse.Namespace, *, readonly: bool = True, create: bool = False) -> Queue:
    """Open the queue that the command line names."""
    return Queue(args.db, readonly=readonly, create=create)


def from_json(source: str) -> list[Mapping[str, object]]:
    """Return the jobs that a JSON object, or an array of them, describes."""
    import json

    try:
        value = json.loads(source)
    except (ValueError, RecursionError) as error:
        hint = "; were its quotes lost? Try: enqueue COMMAND, or: enqueue - with JSON on stdin"
        lost = hint if re.match(r"\s*\{\s*\w+\s*:", source) else ""
        raise BadInput(f"bad JSON: {error}{lost}") from None
    jobs = value if isinstance(value, list) else [value]
    if not jobs or not all(isinstance(job, dict) for job in jobs):
        raise BadInput('a job is a JSON object such as {"command": "echo hello"}')
    return jobs


def from_lines(lines: Iterable[bytes], at: list[int]) -> Iterator[Mapping[str, object]]:
    """Yield the jobs of JSON lines; `at` has the line's number, for error messages."""
    for at[0], line in enumerate(lines, 1):
        if line.strip():
            try:
                yield from from_json(line.decode())
            except UnicodeDecodeError as error:
                raise BadInput(f"not UTF-8: {error.reason}") from None


def enqueue_lines(args: argparse.Namespace) -> Iterator[str]:
    """Enqueue stdin, read to its end first: a slow writer must not hold up the workers."""
    import shutil
    import tempfile

    at = [0]
    with tempfile.SpooledTemporaryFile(1 << 20) as spool:
        shutil.copyfileobj(sys.stdin.buffer, spool)
        spool.seek(0)
        try:
            if not os.path.lexists(args.db):  # no queue is made for bad input
                for job in from_lines(spool, at):
                    check_fields(job)
                spool.seek(0)
            with opened(args, readonly=False, create=True) as queue:
                yield from queue.enqueue_many(from_lines(spool, at))
        except BadInput as error:
            raise BadInput(f"line {at[0]}: {error}") from None


def cmd_enqueue(args: argparse.Namespace) -> int:
    """Add jobs; print their ids."""
    words: list[str] = args.command
    first = words[0].lstrip()
    if words == ["-"]:
        for job_id in enqueue_lines(args):
            print(job_id)
        return OK
    jobs: list[Mapping[str, object]]
    if len(words) > 1:
        jobs = [{"command": " ".join(shlex.quote(word) for word in words)}]
    else:
        jobs = from_json(words[0]) if first[:1] in ("{", "[") else [{"command": words[0]}]
    for job in jobs:
        check_fields(job)  # before a queue is made for it
    with opened(args, readonly=False, create=True) as queue:
        for job_id in queue.enqueue_many(jobs):
            print(job_id)
    return OK


def cmd_worker_start(args: argparse.Namespace) -> int:
    """Run a pool in the foreground."""

    def event_line(text: str) -> None:
        if not args.quiet and sys.stderr:
            with contextlib.suppress(OSError):  # nobody reads it any more: the work goes on
                print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)

    event_line(f"{args.count} worker{'s' * (args.count > 1)} on {os.path.realpath(args.db)}")
    return work(
        args.db,
        args.count,
        queues=args.queue or (),
        drain=args.drain,
        horizon=args.horizon,
        insecure=args.insecure,
        signals=True,
        say=event_line,
    )


def cmd_worker_stop(args: argparse.Namespace) -> int:
    """Ask every pool to stop, and wait until they are gone."""
    with opened(args) as queue:
        run = queue.db.run
        pools = run.holders("pool")
        if not pools:
            say("no workers are running")
            return OK
        for pool in pools:
            fd = os.open(run.file(pool, "stop"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.write(fd, b"now" if args.now else b"stop")
            os.close(fd)
        run.ring()
        began, told = time.monotonic(), False
        while not all(run.free(pool) for pool in pools):
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


def cmd_status(args: argparse.Namespace) -> int:
    """Show the counts and the living workers."""
    with opened(args) as queue:
        counts, now = queue.counts(), time.time()
        running = {job.locked_by: job for job in queue.claimed()}
        workers = queue.db.run.holders("worker")
    if args.json:
        facts = [
            {
                "worker": worker,
                "pid": at.get("pid"),
                "job": running[worker].id if worker in running else None,
            }
            for worker, at in workers.items()
        ]
        show_json({**counts, "workers": facts})
        return OK
    for state in STATES:
        print(f"{state:<10} {counts[state]:>8}")
    print(f"{'workers':<10} {len(workers):>8}")
    for worker, at in workers.items():
        job = running.get(worker)
        doing = f"{printable(job.id)}, since {ago(job.locked_at or now, now)}" if job else "idle"
        print(f"  {worker}  pid {at.get('pid', '?')}  {doing}")
    return OK


def print_jobs(args: argparse.Namespace, states: Sequence[str]) -> int:
    """Print jobs, and say so where not all of them were."""
    with opened(args) as queue:
        config, now, counts = queue.config(), time.time(), queue.counts()
        limit = args.limit if args.limit is not None or args.json else 100
        jobs = queue.jobs(states, limit or None)
        if args.json:
            for job in jobs:
                show_json(job_facts(job, config))
            return OK
        rows = [job_row(job, config, now) for job in jobs]
        width = os.get_terminal_size().columns if sys.stdout.isatty() else 0
        for line in table(JOB_HEADINGS, rows, width):
            print(line)
    there = sum(counts[state] for state in states or STATES)
    if len(rows) < there:
        say(f"{len(rows)} of {there} jobs shown; --limit 0 shows all")
    return OK


def cmd_list(args: argparse.Namespace) -> int:
    """List jobs."""
    return print_jobs(args, args.state or ())


def cmd_dlq_list(args: argparse.Namespace) -> int:
    """List dead jobs."""
    return print_jobs(args, (DEAD,))


def cmd_dlq_retry(args: argparse.Namespace) -> int:
    """Put dead jobs back."""
    if bool(args.ids) == args.all:
        raise BadInput("name the jobs to retry, or say --all")
    with opened(args, readonly=False) as queue:
        for job_id in queue.retry(args.ids or None):
            print(job_id)
    return OK


def cmd_show(args: argparse.Namespace) -> int:
    """Show everything about one job."""
    with opened(args) as queue:
        job, config = queue.get(args.id), queue.config()
        attempts = queue.attempts(job)
    if args.json:
        runs = [attempt_facts(attempt) for attempt in attempts]
        show_json({**job_facts(job, config), "runs": runs})
        return OK
    for line in job_text(job, attempts, config):
        print(line)
    return OK


def cmd_logs(args: argparse.Namespace) -> int:
    """Write the output of a job's last attempt, or of the one that is running."""
    with opened(args) as queue:
        job, attempts = queue.get(args.id), queue.attempts(queue.get(args.id))
        cut, output = (attempts[-1].cut, attempts[-1].output) if attempts else (0, b"")
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(queue.db.run.file(job.seq, job.run, "out"), os.O_RDONLY)
            cut, output = tail(fd, queue.config()["output_limit"])
            os.close(fd)
    if cut:
        say(f"{cut} bytes of output before this were not kept")
    if not attempts and job.state == PENDING:
        say(f"job {job.id} has not run yet; it is due {ago(job.run_after, time.time())}")
    if sys.stdout.isatty():
        lines = output.decode(errors="backslashreplace").split("\n")
        print("\n".join("\t".join(map(printable, line.split("\t"))) for line in lines), end="")
    else:
        sys.stdout.buffer.write(output)
    return OK


def cmd_config_get(args: argparse.Namespace) -> int:
    """Print one value."""
    key = check_setting(args.key)
    with opened(args) as queue:
        print(setting_text(queue.config()[key]))
    return OK


def cmd_config_set(args: argparse.Namespace) -> int:
    """Store one value."""
    check_setting(args.key, args.value)
    with opened(args, readonly=False, create=True) as queue:
        queue.configure(args.key, args.value)
    return OK


def cmd_config_unset(args: argparse.Namespace) -> int:
    """Go back to a default."""
    check_setting(args.key)
    with opened(args, readonly=False) as queue:
        queue.configure(args.key, None)
    return OK


def cmd_config_list(args: argparse.Namespace) -> int:
    """List every setting."""
    with opened(args) as queue:
        config = queue.config()
    if args.json:
        for key, value in config.items():
            show_json({"key": key, "value": value, "default": SETTINGS[key].default})
        return OK
    rows = [(key, setting_text(value), SETTINGS[key].meaning) for key, value in config.items()]
    for line in table(("KEY", "VALUE", "MEANING"), rows):
        print(line)
    return OK


def setting_text(value: object) -> str:
    """Return a value as `config set` takes it."""
    if isinstance(value, tuple):
        return " ".join(shlex.quote(word) for word in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def typed(read: Callable[[Any], Any]) -> Callable[[str], Any]:
    """Make a check into an argparse type, which keeps the check's own words."""

    def convert(value: str) -> Any:
        import argparse

        try:
            return read(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{printable(value)!r} {error}") from None

    return convert


JSON = arg("--json", action="store_true", help="for programs: see the README for the fields")
LIMIT = arg(
    "--limit", type=typed(number(0, 10**9)), metavar="N", help="the N that changed last; 0: all"
)
JOB_ID = arg("id", metavar="ID")
KEY = arg("key", metavar="KEY", help="one of: " + ", ".join(SETTINGS))

COMMANDS = {
    "enqueue": Command(
        cmd_enqueue,
        "add a job; prints its id",
        "enqueue 'make all'",
        (
            arg(
                "command",
                nargs="+",
                metavar="JSON | - | COMMAND | -- ARG...",
                help="a JSON object or array, JSON lines on stdin, a shell line, or words",
            ),
        ),
    ),
    "worker start": Command(
        cmd_worker_start,
        "run jobs, until stopped",
        "worker start --count 4",
        (
            arg(
                "--count", type=typed(number(1, 1000)), default=1, metavar="N", help="at a time (1)"
            ),
            arg("--queue", action="append", metavar="QUEUE", help="serve only these queues"),
            arg(
                "--drain",
                action="store_true",
                help="leave when nothing is left to run; 1: some died",
            ),
            arg(
                "--horizon",
                type=typed(seconds),
                default=FOREVER,
                metavar="DURATION",
                help="with --drain: do not wait for what is due later than this",
            ),
            arg("--quiet", action="store_true", help="no line for each event"),
            arg("--insecure", action="store_true", help="even if others may write to the queue"),
        ),
    ),
    "worker stop": Command(
        cmd_worker_stop,
        "let workers finish their jobs and leave",
        "worker stop --timeout 1m",
        (
            arg(
                "--now", action="store_true", help="end the running jobs; they go back to the queue"
            ),
            arg(
                "--timeout",
                type=typed(seconds),
                metavar="DURATION",
                help="wait no longer; exit 124",
            ),
        ),
    ),
    "status": Command(cmd_status, "show counts and workers", "status --json", (JSON,)),
    "list": Command(
        cmd_list,
        "list jobs",
        "list --state dead --limit 20",
        (
            arg("--state", action="append", choices=STATES, help="may be given several times"),
            LIMIT,
            JSON,
        ),
    ),
    "show": Command(cmd_show, "show everything about a job", "show 7", (JOB_ID, JSON)),
    "logs": Command(cmd_logs, "write the output of a job", "logs 7", (JOB_ID,)),
    "dlq list": Command(cmd_dlq_list, "list the dead letter queue", "dlq list", (LIMIT, JSON)),
    "dlq retry": Command(
        cmd_dlq_retry,
        "put dead or cancelled jobs back, with no attempts used",
        "dlq retry 7",
        (
            arg("ids", nargs="*", metavar="ID"),
            arg("--all", action="store_true", help="every dead job"),
        ),
    ),
    "config get": Command(cmd_config_get, "print a setting", "config get timeout", (KEY,)),
    "config set": Command(
        cmd_config_set,
        "change a setting",
        "config set backoff_base 3",
        (KEY, arg("value", metavar="VALUE")),
    ),
    "config unset": Command(
        cmd_config_unset, "go back to the default", "config unset timeout", (KEY,)
    ),
    "config list": Command(cmd_config_list, "list the settings", "config list", (JSON,)),
}

EXAMPLES = """
examples:
  queuectl enqueue 'make all'                  add a job
  queuectl worker start --count 4              run jobs, four at a time
  queuectl status                              what is going on
  queuectl dlq retry --all                     try the failed ones again
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser from the table of commands."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise BadInput(f"{message} ({self.prog} --help says more)")

    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="queuectl",
        description="A durable job queue for shell commands.",
        epilog=EXAMPLES,
        formatter_class=raw,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"queuectl {__version__}")
    where = os.environ.get("QUEUECTL_DB") or "queuectl.db"
    parser.add_argument("--db", default=where, metavar="PATH", help="the queue ($QUEUECTL_DB)")
    groups = {"": parser.add_subparsers(metavar="COMMAND", required=True)}
    for words, command in COMMANDS.items():
        family, _, verb = words.rpartition(" ")
        if family not in groups:
            verbs = ", ".join(w.split()[1] for w in COMMANDS if w.startswith(family + " "))
            sub = groups[""].add_parser(family, help=verbs, allow_abbrev=False)
            groups[family] = sub.add_subparsers(metavar="COMMAND", required=True)
        leaf = groups[family].add_parser(
            verb,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            epilog=f"example: queuectl {command.example}",
            formatter_class=raw,
            allow_abbrev=False,
        )
        for names, options in command.arguments:
            leaf.add_argument(*names, **options)
        leaf.set_defaults(run=command.run)
    return parser


def fill_standard_streams() -> None:
    """Open descriptors 0 to 2 where they are closed, before a database takes their place."""
    fd = os.open(os.devnull, os.O_RDWR)
    while fd <= 2:
        fd = os.dup(fd)
    os.close(fd)


def discard_output() -> None:
    """Let the flush at exit succeed, where stdout is closed or full."""
    with contextlib.suppress(OSError):
        fd = os.open(os.devnull, os.O_WRONLY)
        os.dup2(fd, 1)
        os.close(fd)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; the one place that says what went wrong."""
    fill_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # whatever a job is called can be printed
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = build_parser().parse_args(argv)
        code: int = args.run(args)
        if sys.stdout:
            sys.stdout.flush()
        return code
    except QueueError as error:
        say(printable(str(error)))
        if LEAKED:
            os._exit(error.code)
        return error.code
    except BrokenPipeError:
        discard_output()
        return SIGNALLED + 13
    except (OSError, sqlite3.Error) as error:  # the machine's fault wherever it shows
        discard_output()
        where, why = getattr(error, "filename", None), getattr(error, "strerror", None) or error
        say(printable(f"{where}: {why}" if where else str(why)))
        return FAULT
    except KeyboardInterrupt:
        return SIGNALLED + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
