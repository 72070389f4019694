#!/usr/bin/env python3
# queuectl 1.0.0 (https://github.com/OWNER/queuectl), MIT license
"""queuectl: a durable background job queue for shell commands, in one file.

    from queuectl import Queue, work

    queue = Queue("jobs.db")                    # makes the file if there is none
    job_id = queue.enqueue("make all", priority=5, delay="10m")
    work("jobs.db", count=4, drain=True)        # or in a shell: queuectl worker start
    print(queue.get(job_id).state, queue.output(job_id).decode())

See help(queuectl.Queue) for the methods, Queue.enqueue for the fields of a job, Job and Attempt for
the records that they return, work for running jobs, and QueueError for the errors. The command
`queuectl --help` lists the commands. The rest of this text explains how queuectl works.

The life of a job:

    pending -> processing -> completed          exit code 0
                          -> pending            failed: retried in backoff_base ** attempts seconds
                          -> dead               failed max_retries times: the dead letter queue
                          -> cancelled          by the operator, while waiting or running
    dead, cancelled -> pending                  `dlq retry`, with attempts reset to 0

A pool (`worker start`) has N worker processes; each of them runs one job at a time. The database
(SQLite, WAL mode) holds everything that must survive a crash. The directory beside it,
`queuectl.db.run`, shows by locked files which processes are alive. The kernel drops a lock when
its last holder dies, so liveness is a fact: there are no heartbeats, leases or clocks.

    pool-ID         locked by one pool. Beside it are pool-ID.fifo, to which every command that
                    adds work writes a byte, and pool-ID.stop or .now, which ask the pool to stop
    worker-ID       locked by one worker; unlocked means that the worker is gone. Beside it is
                    worker-ID.stdin while the worker starts a job that has one
    SEQ.RUN.out     the output of one attempt, locked by its worker and, through an inherited
                    descriptor, by every process of the job; unlocked means that all are gone
    SEQ.RUN.kept.X  the same, with a result X that the worker could not store

A launcher, such as ssh or srun, runs a job elsewhere, in a wrapper that reports its start and its
exit code. The job begins once its start has been recorded. The command that ends it there is
stored before the launch (`launch`), and runs before a job without an exit code is queued again.

A job in `processing` whose worker's lock is free has crashed, unless the worker kept its result.
The remaining processes of the attempt are found by its lock or, on Linux, by their environment.
They are ended first; then the job returns to the queue, and the attempt counts. A worker without
a pool finishes its job and exits. So a job runs at least once, and never twice at once.

A notification (`on_dead`, `on_end`) is a job, inserted in the transaction that ends the job that
it reports on, which it reads from stdin as JSON.

Exit codes: 0 done; 1 failed or not found (a job failed, no such job); 2 bad usage or input; 4 the
database or the machine is at fault; 124 timed out; 128+n ended by signal n.

The sections of this file, in order. Each one uses only the sections above it.

    vocabulary      states, exit codes, errors, the records Job, Attempt, Selection
    rules           pure functions: validation, times, cron, settings, backoff, the retry rule
                    (after_attempt), a job as JSON (job_facts), and the event line about an
                    attempt (describe_end)
    SQL             the schema and every statement
    system          POSIX and Windows: locks, signals, starting and killing processes
    run directory   locked files, notes, stop requests, notifying pools
    database        connections, transactions, errors, forks, creating the file
    trust           whether other users can put commands into the queue
    queue           reading jobs, changing their state, and the public Queue
    attempt         launching a job, watching it, ending its processes (TERM, then KILL after
                    kill_grace), keeping its output and its result; launchers
    worker          the process that runs one job at a time
    pool            the process that starts workers and recovers the jobs of dead ones
    words           jobs as text, workers and counts as text and as JSON; not the event lines
    report          jobs and attempts over time, as text, HTML, JUnit, Markdown, Prometheus, JSON
    web             the report as a live page: access, server, pages and actions
    doctor          trials of a machine and a directory
    command line    the commands, their arguments, and main

To add a setting: SETTINGS. A field of a job: Job, FIELDS, SCHEMA, INSERTED, the options of enqueue
in COMMANDS, job_facts. A column of `list`: job_row and show_jobs. A page of `web`: PAGES and MENU.

To follow a job: cmd_enqueue, Queue.enqueue_many, RunDirectory.notify, Pool.turn, Crew.dispatch,
Worker.main, Ledger.claim, Worker.run, Ledger.finish, after_attempt. To follow a killed worker:
Pool.reap, Pool.recover, Recovery.step, Termination. To follow a signal: Pool.on_signal,
Pool.obey_signals, Pool.stop, PoolLink.receive, Execution.watch.
"""

from __future__ import annotations

if _python_3_8 := True:  # Python 3.8 or later is needed: an older one cannot parse this line
    pass

import sys

if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]  # the directory of this file: a signal.py in it must not be imported

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports shows no traceback

import collections
import contextlib
import errno
import io
import json
import math
import os
import re
import shlex
import sqlite3
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from enum import IntEnum
from functools import lru_cache, partial
from itertools import accumulate, chain, groupby, islice, product, starmap
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, Protocol, Union

if TYPE_CHECKING:
    import argparse
    from array import array
    from multiprocessing.connection import Connection as Pipe

    Argument = tuple[tuple[str, ...], dict[str, Any]]
    Duration = Union[float, str, timedelta]  # seconds, or as on the command line
    Environ = Mapping[str, str]
    Stdin = Union[str, Sequence[int]]  # a path, or the descriptors of all three streams
    Words = Sequence[Any]  # str or bytes
    Facts = Mapping[str, Any]
    Link = Callable[[str], str]  # returns the HTML for a job's id
    Rows = Iterable[Sequence[object]]
    Path = Union[str, os.PathLike[str]]
    Sample = tuple[str, float, Mapping[str, str]]  # of a metric: its name, value and labels
    Settings = Mapping[str, Any]
    Survey = Callable[[], tuple[dict[str, int], float]]  # a tally; when the next job is due
    Validator = Callable[[Any], Any]  # returns the value as it is stored, or raises ValueError

__version__ = "1.0.0"
HOME_PAGE = "https://github.com/OWNER/queuectl"
__all__ = ["Attempt", "Job", "Queue", "work"]
__all__ += ["BadInput", "Damaged", "Fault", "Locked", "NotFound", "QueueError", "TimedOut"]

# --- vocabulary ----------------------------------------------------------------------------------

State = Literal["pending", "processing", "completed", "dead", "cancelled"]
STATES: tuple[State, ...] = ("pending", "processing", "completed", "dead", "cancelled")
PENDING, PROCESSING, COMPLETED, DEAD, CANCELLED = STATES
FINISHED: tuple[State, ...] = (COMPLETED, DEAD, CANCELLED)
STAGED = "staged"  # the state of jobs that nobody sees: their batch is not complete yet
PRUNED_BY_DEFAULT = (COMPLETED, CANCELLED)  # dead letters stay until they are purged

READY, SCHEDULED, BLOCKED = 1, 0, -1  # the readiness of a pending job; all others are READY
READINESS_WORDS = {READY: "ready", SCHEDULED: "scheduled", BLOCKED: "blocked"}
STATE_WORDS = (*STATES, *READINESS_WORDS.values())
STATE_SYNONYMS = {  # words of other tools, and the state that each means here
    **dict.fromkeys(("queued", "waiting"), "pending"),
    **dict.fromkeys(("running", "active", "started"), "processing"),
    **dict.fromkeys(("done", "finished", "success", "succeeded"), "completed"),
    **dict.fromkeys(("failed", "failure", "error"), "dead"),
    "delayed": "scheduled",
}

SUMMARY = "summary"  # the event of a notification about several jobs

End = Literal[
    "exited", "timed out", "crashed", "released", "cancelled", "unstarted", "not launched"
]
StopMode = Literal["", "stop", "now"]  # "stop": claim no more jobs; "now": also end running ones
WorkerState = Literal["idle", "notified", "busy", "left"]
TRY_LATER = 75  # a job's exit code (EX_TEMPFAIL): "not now"; it does not count as an attempt
NEVER = float("inf")


class Exit(IntEnum):
    """The exit codes of the program."""

    OK = 0
    NO = 1  # failed, or not found
    USAGE = 2
    FAULT = 4  # the database or the machine is at fault
    TIMED_OUT = 124
    SIGNALLED = 128  # plus the number of the signal


class QueueError(Exception):
    """An expected failure. Its text names the problem; `code` is the exit code of the program."""

    code: int = Exit.NO
    hint: Callable[[], str] | None = None  # ends the text; costly, so not within a transaction

    def __str__(self) -> str:
        return super().__str__() + (self.hint() if self.hint else "")


class BadInput(QueueError):
    """The input is not valid; nothing was changed."""

    code = Exit.USAGE
    index: int | None = None  # in a batch, the number of the job at fault, from 0


class NotFound(QueueError):
    """There is no such job, or no queue."""


class TimedOut(QueueError):
    """The caller's time limit has expired."""

    code = Exit.TIMED_OUT


class Fault(QueueError):
    """The database or the machine is at fault, not the caller."""

    code = Exit.FAULT


class Locked(Fault):
    """Another program held the write lock for longer than the caller was willing to wait."""


class Damaged(Fault):
    """The database is damaged or was replaced; waiting does not help."""


class Job(NamedTuple):
    """A job as it was when it was read. The fields are columns; times are Unix seconds.

    `seq` numbers the jobs in the order of their arrival. `id`, `queue`, `command`, `cwd` and
    `priority` are as in Queue.enqueue, at the time `created_at`. A job does not start before
    `run_after`. `locked_by` is the worker that runs it, since `locked_at`. `exit_code` and
    `last_error` tell how the last attempt ended; they are None if there was none, or no error.

    `attempts` counts the starts since the job was enqueued or retried from the dead letter queue;
    `snoozes` counts the exits with 75. `run` counts every start and identifies one attempt.
    `max_retries` (the number of starts allowed) and `timeout` (seconds, 0 for none) are None where
    the settings decide. `env` is a JSON object. `readiness` of a pending job is 1 (ready),
    0 (scheduled) or -1 (blocked). `cancel_requested` is 1 while a running job is being cancelled.
    `updated_at` is the time of the last change of state; for a ready job, the time when it became
    ready. `waited` is how many seconds the job was ready before its latest start. A job of a
    schedule has the `schedule_id`, the time that the schedule gave it in `scheduled_for`, and,
    until the next job of the schedule has been made, the `rule`. `retry_delays` are seconds,
    separated by commas; `on_dead` and `on_end` are None where the settings decide, and empty for
    no command. `stdin_size` is in bytes. A notification has the number of the job that it reports
    on in `notifies`, and in `event` the state in which that job ended, or "summary". While a
    launcher runs the job elsewhere, `launch` is a JSON object with the facts about that.
    """

    seq: int
    id: str
    queue: str
    command: str
    cwd: str
    env: str | None
    state: State
    priority: int
    attempts: int
    max_retries: int | None
    timeout: float | None
    created_at: float
    updated_at: float
    run_after: float
    waited: float
    locked_by: str | None
    locked_at: float | None
    exit_code: int | None
    last_error: str | None
    run: int
    cancel_requested: int
    readiness: int
    snoozes: int
    rule: str | None
    schedule_id: str | None
    scheduled_for: float | None
    retry_delays: str | None
    on_dead: str | None
    on_end: str | None
    notifies: int | None
    event: str | None
    launch: str | None
    stdin_size: int

    @property
    def launched(self) -> dict[str, Any]:
        """The facts about an attempt elsewhere: cancel, grace, host, trouble; empty if none."""
        return dict(json.loads(self.launch or "{}"))

    @property
    def host(self) -> str | None:
        """The host where a launcher runs the job; None if it runs here or does not run."""
        return self.launched.get("host", "waiting for a place") if self.launch else None

    @property
    def key(self) -> str:
        """The name of the current attempt: one run of the job by one worker."""
        return f"{self.seq}.{self.run}.{self.locked_by}"


class Attempt(NamedTuple):
    """How one attempt ended. Times are Unix seconds; `exit_code` below 0 is minus a signal.

    `run` is the number of the attempt, from 1, and `worker` ran it from `started` to `finished`.
    `outcome` is "completed", "failed", "timed out", "crashed", "released" (ended by the operator
    and returned to the queue) or "cancelled". `error` is None if it completed. `waited` is how
    many seconds the job was ready before this attempt. `bytes_dropped` is the length of the output
    that preceded the bytes in `output`.
    """

    run: int
    worker: str
    outcome: str
    waited: float
    started: float
    finished: float
    exit_code: int | None
    error: str | None
    bytes_dropped: int
    output: bytes


class Selection(NamedTuple):
    """The jobs that a command is about: the named ones, or all that match every filter given.

    `states` are words of STATE_WORDS. `match` is a part of the id or of the command, in upper or
    lower case. `older_than` is the time in seconds since the last change of state. Without
    `notifications`, those that have completed are left out.
    """

    ids: Sequence[str] = ()
    queues: Sequence[str] = ()
    states: Sequence[str] = ()
    match: str = ""
    older_than: float | None = None
    notifications: bool = True

    def takes_state(self, state: State, readiness: int) -> bool:
        words = (state, READINESS_WORDS[readiness]) if state == PENDING else (state,)
        return not self.states or any(word in self.states for word in words)

    def takes(self, job: Job, now: float) -> bool:
        """Tell whether a job matches the filters."""
        part = self.match.casefold()
        return (
            self.takes_state(job.state, job.readiness)
            and (not self.queues or job.queue in self.queues)
            and (part in job.command.casefold() or part in job.id.casefold())
            and (not self.older_than or job.updated_at <= now - self.older_than)
            and (self.notifications or not job.notifies or job.state != COMPLETED)
        )


# --- rules: pure functions -----------------------------------------------------------------------

WINDOWS = os.name == "nt"
DEFAULT_SHELL = ("cmd.exe", "/d", "/s", "/c") if WINDOWS else ("/bin/sh", "-c", "--")
COMMAND_LIMIT = 8191 if WINDOWS else 131071  # bytes; Linux: MAX_ARG_STRLEN
UNIT_SECONDS = {"w": 604800, "d": 86400, "h": 3600, "m": 60, "s": 1}
UNIT = "w(?:eeks?)?|d(?:ays?)?|h(?:(?:ou)?rs?)?|m(?:in(?:ute)?s?)?|s(?:ec(?:ond)?s?)?"
LATE = 0.1  # seconds; a start that is later than its token by more is not made up for
LONGEST = 10 * 365 * 86400.0  # no duration is longer, so that sums of times never overflow
LATEST_TIME = 253402214400  # the end of the year 9999 in every time zone
STDIN_LIMIT = 1 << 20  # bytes of a job's stdin
DELAYS_LIMIT = 1000  # of a job: more would make its row long
PARENTS_LIMIT = 30_000  # characters of QUEUECTL_PARENTS; Windows allows 32,767 in a variable
TOP_PRIORITY = 1_000_001  # of notifications: above the range of FIELDS
QUOTED_LIMIT = 100  # characters of user input that a message quotes


def require(condition: object, expectation: str) -> None:
    """Raise ValueError unless a condition holds; the text completes "the value must ..."."""
    if not condition:
        raise ValueError(f"must {expectation}")


def validate(name: str, validator: Validator, value: object) -> Any:
    """Return a validated value, or raise BadInput that names it."""
    try:
        return validator(value)
    except ValueError as error:
        raise BadInput(f"{name} {error}") from None


def printable(value: str) -> str:
    """Escape every character that could move the cursor, change colours or reorder text."""
    if value.isprintable():
        return value
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)


def quoted(value: str, limit: int = QUOTED_LIMIT) -> str:
    """Return user input for a message: escaped, and truncated if it is long."""
    return printable(value[:limit]) + "..." * (len(value) > limit)


def left_out(output: bytes, missing: int) -> bytes:
    """Return an output that has lost its beginning as whole lines, after one that says so."""
    if not missing:
        return output
    part, newline, rest = output.partition(b"\n")
    if rest:
        output = rest
        missing += len(part + newline)
    return b"[%d bytes of earlier output are left out]\n" % missing + output


def last_line(output: str) -> str:
    """Return the last line of an output, for a message."""
    return quoted(next(filter(str.strip, reversed(output.split("\n"))), "").strip())


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def nearest(word: str, known: Iterable[str]) -> str | None:
    import difflib
    from heapq import nlargest

    def upper_bound(other: str) -> float:
        return difflib.SequenceMatcher(None, other[:QUOTED_LIMIT], word).quick_ratio()

    word = word[:QUOTED_LIMIT]
    close = nlargest(20, known, upper_bound)  # an exact ratio of long words takes a long time
    return next(iter(difflib.get_close_matches(word, close, 1, 0.7)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    near = nearest(word, known)
    return f": did you mean {near}?" if near else ""


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return ": did you mean X?" for a mistyped word, or the list of known words."""
    choices = list(known)
    return did_you_mean(word, choices) or f"; choose from {', '.join(choices)}"


def id_hint(word: str) -> str:
    """Return a hint for a word that is not an id; an empty string if there is none."""
    if "," in word:
        return "; ids are separated by blanks"
    state = STATE_SYNONYMS.get(word, word)
    return f": did you mean --state {state}?" if state in STATE_WORDS else ""


def as_list(words: Iterable[str]) -> list[str]:
    """Return words as a list; a string is one word, not a sequence of letters."""
    return [words] if isinstance(words, str) else list(words)


# Validation. A value comes from Python, from JSON or, as a string, from the command line.


def in_range(low: float, value: Any, high: float, expectation: str) -> Any:
    """Return a number within a range; bool and NaN are refused."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(is_number and low <= value <= high, expectation)
    return value


def integer(low: int, high: int) -> Validator:
    def validator(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,18}\s*", value):
            value = int(value)
        expectation = f"be a whole number from {low} to {high}"
        require(isinstance(value, int), expectation)
        return int(in_range(low, value, high, expectation))

    return validator


def number(low: int, high: int) -> Validator:
    def validator(value: Any) -> float:
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)
        return float(in_range(low, value, high, f"be a number from {low} to {high}"))

    return validator


def parse_duration(value: Any) -> float:
    """Return seconds, given them, a timedelta or `90`, `90s`, `5m`, `1h30m`, `2 days`."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, str):
        text = value.strip().lower()
        require(text not in ("none", "never", "inf"), "be a number; 0 means no limit")
        require(not re.match(r"-\d", text), "not be negative")
        amount = r"(\d+(?:\.\d*)?|\.\d+)"
        if re.fullmatch(rf"{amount}|({amount}\s*({UNIT})\s*)+", text):
            parts = re.findall(rf"{amount}\s*([smhdw]?)", text)
            value = sum(float(count) * UNIT_SECONDS[unit or "s"] for count, unit in parts)
    expectation = "be a duration between 0 and 10 years, such as 90, 90s, 5m or 1h30m"
    return float(in_range(0, value, LONGEST, expectation))


def parse_size(value: Any) -> int:
    """Return a number of bytes, given one or `64K`, `1M`, `10MB`, `1.5 MiB`; K is 1024."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,12}(?:\.\d+)?)\s*([kmg]?)(?:i?b)?", value.strip().lower())
        value = match and int(float(match[1]) * 1024 ** " kmg".index(match[2] or " "))
    expectation = "be a size between 0 and 256M, such as 65536, 64K or 1M"
    return int(in_range(0, value, 1 << 28, expectation))


def valid_delays(value: Any) -> str:
    """Return durations, separated by commas or in a list, as seconds separated by commas."""
    items = value.split(",") if isinstance(value, str) else value
    if isinstance(items, (int, float, timedelta)):
        items = [items]
    with contextlib.suppress(ValueError):
        require(isinstance(items, (list, tuple)) and 0 < len(items) <= DELAYS_LIMIT, "be a list")
        return ",".join(f"{parse_duration(item):.15g}" for item in items)
    raise ValueError(f"must be 1 to {DELAYS_LIMIT} durations such as 10s,1m,10m")


def parse_time(value: Any) -> float:
    """Return Unix seconds, given them, a datetime or ISO 8601 (local time if without offset)."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d{9,11}(\.\d*)?\s*", value):
        value = float(value)
    with contextlib.suppress(ValueError, OverflowError, OSError):
        if isinstance(value, str):
            value = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", value.strip()))
        if isinstance(value, datetime):
            value = value.timestamp()
    expectation = "be a time between 1970 and 9999, such as 2030-01-31T08:00 or 2030-01-31T08:00Z"
    return float(in_range(0, value, LATEST_TIME, expectation))


def parse_age(value: Any) -> float:
    """Return the age of jobs to be deleted; a bare number, which may stand for days, is refused."""
    text = str(value).strip()
    is_bare = re.fullmatch(r"[\d.]*[1-9][\d.]*", text)
    hint = f"{quoted(text)} would be seconds; 7d for days, 7s for seconds"
    require(not is_bare, f"have a unit: {hint}")
    return parse_duration(value)


def valid_tries(value: Any) -> int:
    require(str(value).strip() != "0", "be at least 1, which means to try once")
    return int(integer(1, 1_000_000)(value))


def valid_text(value: Any) -> str:
    require(isinstance(value, str), "be a string")
    require(value == value.encode(errors="ignore").decode(), "be valid Unicode")
    require("\0" not in value, "not contain NUL")
    return str(value)


def valid_command(value: object) -> str:
    line = valid_text(value)
    require(line.strip(), "not be blank")
    fits = len(line.encode()) <= COMMAND_LIMIT
    require(fits, f"not be longer than {COMMAND_LIMIT} bytes; put it into a script")
    return line


def valid_hook(value: object) -> str:
    """Validate a command that may be empty, for none."""
    return valid_command(value) if value != "" else ""


def valid_stdin(value: Any) -> bytes:
    """Return a text as it is stored, in UTF-8."""
    require(isinstance(value, (str, bytes)), "be a string")
    try:
        data = value.encode() if isinstance(value, str) else value
        data.decode()
    except UnicodeError:
        raise ValueError("must be text in UTF-8") from None
    require(len(data) <= STDIN_LIMIT, f"not be longer than {STDIN_LIMIT} bytes")
    return bytes(data)


def valid_name(value: object) -> str:
    name = valid_text(value)
    fits = re.fullmatch(r"[^\s,-][^\s,]{0,199}", name) and name.isprintable()
    require(fits, "be 1 to 200 printable characters, without blanks, commas or a leading '-'")
    return name


def valid_names(value: Any) -> list[str]:
    """Validate a list of ids, or a string of ids separated by commas."""
    items = [value] if isinstance(value, str) else value
    strings = isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items)
    require(strings, "be a list of job ids (strings)")
    names = ",".join(items).split(",") if items else []
    require(all(names), "not contain an empty id")
    return [valid_name(name) for name in names]


def valid_states(value: Iterable[str]) -> list[str]:
    """Validate the names of states and of readiness: several, or a string with commas."""
    words = value.split(",") if isinstance(value, str) else list(value)
    for word in map(str, words):
        if word not in STATE_WORDS:
            meant = STATE_SYNONYMS.get(word.lower())
            hint = f": did you mean {meant}?" if meant else suggestion(word.lower(), STATE_WORDS)
            raise ValueError(f"must not be '{quoted(word)}'{hint}")
    return words


def valid_queue_path(value: Path) -> str:
    path = os.fsdecode(value)
    require(path, "not be empty")
    require("\0" not in path, "not contain NUL")
    is_file = path != ":memory:" and not re.match(r"(?i)file:|[a-z]\w+://", path)
    name = quoted(path)
    require(is_file, f"name a file, which workers can open, not {name} (or write ./{name})")
    return path


def valid_path(value: object) -> str:
    """Validate the path of a file or directory, which need not exist, and make it absolute."""
    path = valid_text(os.fspath(value) if isinstance(value, os.PathLike) else value)
    require(path, "not be empty")
    return os.path.abspath(path)


def valid_report(value: object) -> str:
    """Validate the path of a file that a report may replace: no database, nor its -wal."""
    path = valid_path(value)
    database = re.sub("-(wal|shm|journal)$", "", os.path.realpath(path))
    for name in filter(os.path.isfile, (path, database)):
        unreadable = contextlib.suppress(OSError)  # then it is replaced unread
        with unreadable, open(name, "rb") as file:
            require(file.read(16) != b"SQLite format 3\0", "not name a file of a database")
    return path


def valid_environment(value: Any) -> dict[str, str]:
    strings = isinstance(value, Mapping) and all(isinstance(v, str) for v in value.values())
    require(strings, 'be an object of strings such as {"NAME": "value"}')
    for key, item in value.items():
        require(valid_text(key) and "=" not in key, "have non-empty names without '='")
        valid_text(item)
    return dict(value)


def valid_interval(value: object) -> float:
    return float(in_range(1, parse_duration(value), LONGEST, "be at least 1 second"))


# Cron rules.

MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec"
WEEKDAYS = "sun mon tue wed thu fri sat"
# Of each field: its lowest value, its highest value, and the names of its values.
CRON_FIELDS = ((0, 59, ""), (0, 23, ""), (1, 31, ""), (1, 12, MONTHS), (0, 7, WEEKDAYS))
CRON_WORDS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}


def cron_field(field: str, low: int, high: int, names: str) -> set[int]:
    """Return the values of one field: `*`, `5`, `1-5`, `*/15`, `mon-fri`, or a list of those."""
    values: set[int] = set()
    numbers = field
    for value, name in enumerate(names.split(), low):
        numbers = re.sub(rf"(?<!/)\b{name}\b", str(value), numbers)
    for part in numbers.split(","):
        match = re.fullmatch(r"(?:\*|(\d{1,9})(?:-(\d{1,9}))?)(?:/([1-9]\d{0,8}))?", part)
        if not match:
            raise ValueError(f"has a field '{quoted(field)}'; use a number, a range, a list or *")
        first, last, step = match.groups()
        begin = int(first or low)
        end = int(last or (first if first and not step else high))
        if not low <= begin <= end <= high:
            order = ", the lower one first" if last else ""
            raise ValueError(f"has '{quoted(field)}' where {low} to {high} is allowed{order}")
        values.update(range(begin, end + 1, int(step or 1)))
    return values


@lru_cache(maxsize=64)
def cron_next(rule: str, after: float) -> float:
    """Return the first time later than `after` that matches a rule, in local time.

    As in cron, a day has to match either of day and weekday where both are restricted. A time that
    the clock skips in spring counts as an hour later; one that occurs twice in autumn counts once,
    unless the rule is for every hour.
    """
    fields = CRON_WORDS.get(rule.strip().lower(), rule).lower().split()
    expectation = "have five fields: minute hour day month weekday, or be one of "
    require(len(fields) == len(CRON_FIELDS), expectation + " ".join(CRON_WORDS))
    sets = (cron_field(field, *limits) for field, limits in zip(fields, CRON_FIELDS))
    minutes, hours, days, months, weekdays = sets
    matches = all if "*" in (fields[2][0], fields[4][0]) else any
    folds = (0, 1) if len(hours) == 24 else (0,)
    day = datetime.fromtimestamp(after, timezone.utc).astimezone()
    day = day.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
    for _ in range(8 * 366 + 2):  # the 29th of February is at most 8 years away
        match = (day.day in days, bool({day.isoweekday(), day.isoweekday() % 7} & weekdays))
        tomorrow = day + timedelta(days=1)
        if day.month in months and matches(match):
            begin = day.timestamp()
            times = (begin + 3600 * h + 60 * m for h, m in product(hours, minutes))
            if tomorrow.timestamp() - begin != 86400:  # the clock is changed
                clock = product(hours, minutes, folds)
                times = (day.replace(hour=h, minute=m, fold=f).timestamp() for h, m, f in clock)
            if later := [when for when in times if when > after]:
                return min(later)
        day = tomorrow
    raise ValueError("names a date that does not exist")


def valid_cron(value: object) -> str:
    rule = valid_text(value)
    cron_next(rule, time.time() // 60 * 60)
    return rule


def next_occurrence(rule: str, scheduled_for: float, now: float) -> float:
    """Return when a rule, "every SECONDS" or "cron FIELDS", is next due, skipping missed times."""
    kind, _, text = rule.partition(" ")
    if kind == "cron":
        return cron_next(text, max(scheduled_for, now))
    interval = float(text)
    return scheduled_for + interval * max(1, (now - scheduled_for) // interval + 1)


# The fields of a job, and the settings.

FIELDS: dict[str, Validator] = {
    "id": valid_name,
    "command": valid_command,
    "queue": valid_name,
    "priority": integer(-1_000_000, 1_000_000),
    "delay": parse_duration,
    "run_at": parse_time,
    "timeout": parse_duration,
    "max_retries": valid_tries,
    "retry_delays": valid_delays,
    "cwd": valid_path,
    "env": valid_environment,
    "stdin": valid_stdin,
    "after": valid_names,
    "after_end": valid_names,
    "every": valid_interval,
    "cron": valid_cron,
    "on_dead": valid_hook,
    "on_end": valid_hook,
}
CONFLICTS = (("delay", "run_at"), ("delay", "cron"), ("run_at", "cron"), ("every", "cron"))


def validate_each(fields: Mapping[str, object], known: Mapping[str, Validator]) -> dict[str, Any]:
    job = {}
    for key, value in fields.items():
        if key not in known:
            raise BadInput(f"unknown field {quoted(key)}{suggestion(key, known)}")
        job[key] = validate(key, known[key], value)
    for one, other in CONFLICTS:
        if one in job and other in job:
            raise BadInput(f"a job cannot have both {one} and {other}")
    return job


def validate_fields(fields: Mapping[str, object]) -> dict[str, Any]:
    """Return the validated fields of a job, or raise BadInput that names the first bad one."""
    job = validate_each(fields, FIELDS)
    if "command" not in job:
        raise BadInput("a job needs a command")
    return job


def join_words(words: Sequence[str]) -> str:
    """Quote words so that the shell passes them on unchanged."""
    if not WINDOWS:
        return shlex.join(words)
    import subprocess

    line = subprocess.list2cmdline(words)
    special = re.search("[&|<>^%!()]", line)  # cmd.exe interprets these within quotes
    return re.sub('([&|<>^%!()"])', r"^\1", line) if special else line


# The builtins and keywords of dash and bash; there may be programs of the same name. setsid is not
# one, but it would wait for its program only where a shell has started it.
SHELL_WORDS = frozenset(
    """! . : [ [[ ]] alias bg bind break builtin caller case cd chdir command compgen complete
    compopt continue coproc declare dirs disown do done echo elif else enable esac eval exec
    exit export false fc fg fi for function getopts hash help history if in jobs kill let local
    logout mapfile popd printf pushd pwd read readarray readonly return select set setsid shift
    shopt source suspend test then time times trap true type typeset ulimit umask unalias unset
    until wait while { }""".split()
)
# Variables that a shell obeys or sets, or that macOS hides from its own. Others that are not names
# are dropped by dash.
SHELL_VARIABLES = rb"(BASHOPTS|DYLD_\w*|IFS|LINENO|OPTIND|PPID|PS4|SHELLOPTS)\Z"
QUOTED_PART = r"""(?:'[^']*'|"[^"$`\\]*")"""
PLAIN_PART = r"[\w@%+=:,./ \t-]*"
PLAIN_COMMAND = f"{PLAIN_PART}(?:{QUOTED_PART}{PLAIN_PART})*"


def plain_words(command: str) -> list[str] | None:
    """Return the words of a command that means the same without a shell, None for any other."""
    if not re.fullmatch(PLAIN_COMMAND, command, re.ASCII):
        return None
    parts = re.findall(rf"(?:[^ \t'\"]|{QUOTED_PART})+", command)
    words = [re.sub(r"""'([^']*)'|"([^"]*)\"""", r"\1\2", part) for part in parts]
    first = words[0] if words else ""
    is_shells = not first or first in SHELL_WORDS or first.startswith("%") or "=" in first
    return None if is_shells else words


@lru_cache(maxsize=1000)
def is_plain_variable(name: bytes) -> bool:
    """Tell whether a shell passes a variable on as it is; PWD is another matter."""
    return bool(re.fullmatch(rb"(?!%s)[A-Za-z_]\w*" % SHELL_VARIABLES, name))


def valid_prefix(value: Any) -> tuple[str, ...]:
    line = valid_command(value)
    try:
        words = shlex.split(line, posix=not WINDOWS)  # there, a backslash is part of a path
    except ValueError as error:
        raise ValueError(f"must be a command prefix: {error}") from None
    words = [word.strip('"') if WINDOWS else word for word in words]
    require(words[0], "begin with a program")
    return tuple(words)


def valid_exit_codes(value: Any) -> tuple[int, ...]:
    codes = valid_text(value).split(",") if value.strip() else []
    try:
        return tuple(integer(1, 255)(code) for code in codes)
    except ValueError:
        raise ValueError("must be exit codes from 1 to 255, such as 2,126,127") from None


def valid_durability(value: object) -> str:
    require(value in ("normal", "full"), "be normal or full")
    return str(value)


def rate_gap(rate: str) -> float:
    """Return the seconds from one start to the next at a rate such as 10/1m or 10/m."""
    number, _, period = rate.partition("/")
    period = "1" + period if period in UNIT_SECONDS else period
    return valid_interval(period) / float(integer(1, 10**6)(number))


def valid_rate(value: object) -> str:
    """Validate a rate; empty or 0 means none."""
    rate = valid_text(value).strip()
    if rate in ("", "0"):
        return ""
    with contextlib.suppress(ValueError):
        rate_gap(rate)
        return rate
    raise ValueError("must be a number of starts per period of 1 s or more, such as 10/1m, or 0")


def valid_switch(value: object) -> str:
    require(value in ("no", "yes"), "be no or yes")
    return str(value)


def valid_launcher(value: Any) -> tuple[str, ...]:
    return valid_prefix(value) if valid_text(value).strip() else ()


def fill_in(words: Iterable[str], job: Job) -> list[str]:
    """Replace the placeholders of a launcher by names of letters, digits and dashes."""

    def value(match: re.Match[str]) -> str:
        text = str(getattr(job, match[1])).lower()
        return re.sub("[^a-z0-9]+", "-", text).strip("-")[:40].rstrip("-") or "x"

    return [re.sub(r"\{(seq|run|queue|id)\}", value, word) for word in words]


def require_program(name: str) -> None:
    """Raise ValueError where there is no program of that name, as a shell would look for it."""
    import shutil

    require(not WINDOWS, "not be set on Windows, which has no launchers")
    require(shutil.which(name), f"begin with a program; {quoted(name)} was not found")
    where = f"the directory of each job: use {quoted(os.path.abspath(name))}"
    require(os.path.isabs(name) or os.sep not in name, f"not be relative: it runs in {where}")


class Setting(NamedTuple):
    """A setting: its default, the validator that reads its text, and its meaning."""

    default: Any
    read: Validator
    meaning: str


SETTINGS = {
    "max_retries": Setting(3, FIELDS["max_retries"], "number of attempts, including the first"),
    "backoff_base": Setting(2.0, number(1, 1000), "a retry waits this value ** attempts seconds"),
    "backoff_max": Setting(86400.0, parse_duration, "the longest wait before a retry"),
    "jitter": Setting(
        0.0, number(0, 1), "shorten each wait for a retry at random, by up to this fraction"
    ),
    "timeout": Setting(300.0, parse_duration, "how long an attempt may take (0: no limit)"),
    "kill_grace": Setting(5.0, parse_duration, "time between TERM and KILL when a job is killed"),
    "output_limit": Setting(65536, parse_size, "how much output is kept, such as 64K or 1M"),
    "on_dead": Setting("", FIELDS["on_dead"], "command to run when a job is dead"),
    "on_end": Setting("", FIELDS["on_end"], "command to run when a job has ended in any way"),
    "max_notifications": Setting(
        100, integer(0, 10**6), "number that may wait; more are merged into a summary"
    ),
    "shell": Setting(DEFAULT_SHELL, valid_prefix, "the program and options that run a command"),
    "max_snoozes": Setting(20, integer(0, 10**6), "how many times a job may exit with 75"),
    "no_retry_exit_codes": Setting((), valid_exit_codes, "final exit codes, such as 2,126,127"),
    "limit": Setting(0, integer(0, 10**6), "number of jobs of a queue that run at once (0: any)"),
    "rate": Setting("", valid_rate, "number of jobs of a queue that start in a period: 10/1m"),
    "launcher": Setting((), valid_launcher, "the program and options that run a command elsewhere"),
    "launcher_cancel": Setting(
        (), valid_launcher, "the command that makes sure a job has ended elsewhere"
    ),
    "launch_timeout": Setting(1800.0, parse_duration, "the time to wait for a place (0: no limit)"),
    "launcher_quote": Setting("no", valid_switch, "yes: the launcher joins words, as ssh does"),
    "retention": Setting(0.0, parse_age, "prune completed and cancelled jobs this old (0: never)"),
    "synchronous": Setting("normal", valid_durability, "full: sync a result before the next claim"),
}
FOR_ALL_QUEUES = ("max_notifications", "retention", "synchronous")  # no queue has its own values
DEFAULTS = {key: setting.default for key, setting in SETTINGS.items()}


def valid_variables(value: Any) -> dict[str, str | None]:
    """Validate changes of an environment; None removes a variable."""
    require(isinstance(value, Mapping), 'be an object such as {"NAME": "value"}')
    valid_environment({key: "" if item is None else item for key, item in value.items()})
    return dict(value)


BY_SETTINGS = {*SETTINGS, "retry_delays"}  # fields of a job that are None where settings decide


def change_validator(key: str) -> Validator:
    """Return the validator of a field's new value, which may also reset the field."""
    check = FIELDS[key]
    if key in BY_SETTINGS:
        return lambda value: None if value in (None, "default") else check(value)
    if check is valid_names:
        return lambda value: check(value or [])
    return valid_variables if check is valid_environment else check


EDITABLE = {key: change_validator(key) for key in FIELDS if key != "id"}


def rule_of(fields: Mapping[str, Any]) -> str | None:
    """Return the rule that the fields of a schedule give it."""
    if "every" in fields:
        return f"every {fields['every']:.15g}"
    return f"cron {fields['cron']}" if "cron" in fields else None


def differing_fields(job: Job, fields: Mapping[str, Any]) -> list[str]:
    """Return the names of validated fields that a job has other values of."""
    stored = {**job._asdict(), "env": json.loads(job.env or "{}")}
    found = [key for key in fields if key in stored and key != "id" and stored[key] != fields[key]]
    return found + ["rule"] * (job.state not in FINISHED and job.rule != rule_of(fields))


def validate_changes(fields: Mapping[str, object]) -> dict[str, Any]:
    """Return the validated new fields of a waiting job, or raise BadInput."""
    if not fields:
        raise BadInput("there is nothing to change: give at least one new field")
    return validate_each(fields, EDITABLE)


def setting_input(value: Any) -> str:
    """Return a setting, which a program may give as a number or a timedelta, as text."""
    if isinstance(value, timedelta):
        value = f"{value.total_seconds():.15g}s"
    return valid_text(str(value) if isinstance(value, (int, float)) else value)


def validate_setting(key: str, value: str | None = None, queue: str = "") -> str:
    """Return the key as it is stored; raise BadInput for a bad one, or a value or queue."""
    key = key.replace("-", "_")
    if key not in SETTINGS:
        raise BadInput(f"unknown key {quoted(key)}{suggestion(key, SETTINGS)}")
    if queue and key in FOR_ALL_QUEUES:
        raise BadInput(f"{key} applies to all queues; use it without --queue")
    if value is not None:
        words = validate(key, SETTINGS[key].read, value)
        if words and SETTINGS[key].read is valid_launcher:
            validate(key, require_program, words[0])
    return key


# Text for people.


def signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def explain_exit(code: int) -> str | None:
    """Return why an exit code is a failure, or None for 0; minus n means ended by signal n."""
    if code == 0:
        return None
    if code < 0:
        return f"killed by {signal_name(-code)}"
    not_found = "command not found"
    meanings = {TRY_LATER: "try later", 126: "not executable", 127: not_found, 9009: not_found}
    meaning = f"128 + {signal_name(code - 128)}" if 128 < code <= 128 + 64 else meanings.get(code)
    return f"exit code {code} ({meaning})" if meaning else f"exit code {code}"


def shell_code(code: int) -> int:
    """Return an exit code, or minus the number of a signal, as a shell has it."""
    return Exit.SIGNALLED - code if code < 0 else int(code)


def format_time(when: float | None) -> str | None:
    """Return Unix seconds as ISO 8601 in local time with its offset."""
    if when is None:
        return None
    return datetime.fromtimestamp(when, timezone.utc).astimezone().isoformat("T", "milliseconds")


def in_units(seconds: float, units: str) -> list[str]:
    """Return a duration as parts such as 2h; it has to be a multiple of the last unit."""
    parts = []
    for unit in units:
        count, seconds = divmod(seconds, UNIT_SECONDS[unit])
        parts += [f"{count:.0f}{unit}"] * (count > 0)
    return parts


def format_duration(seconds: float) -> str:
    """Return a duration in at most two units: 0.004 s, 42 s, 3m20s, 2h, 5d."""
    if seconds < 59.5:
        digits = 3 if seconds < 0.1 else 2 if seconds < 10 else 0
        return f"{round(seconds, digits):g} s"
    return "".join(in_units(round(seconds), "wdhms")[:2])


def exact_duration(seconds: float) -> str:
    """Return a duration exactly, as it can be typed: 0, 0.5s, 5m, 1h30m, 30d."""
    rest = seconds % 60
    return "".join(in_units(seconds - rest, "dhm")) + f"{rest:.15g}s" * (rest > 0) or "0"


def exact_size(size: int) -> str:
    """Return a number of bytes exactly, as it can be typed: 0, 1000, 64K, 1M."""
    for unit, count in (("M", 1 << 20), ("K", 1 << 10)):
        if size and size % count == 0:
            return f"{size // count}{unit}"
    return str(size)


def format_distance(when: float, now: float) -> str:
    """Return a time relative to now: `3m ago`, `in 2h`."""
    if abs(when - now) < 1:
        return "now"
    text = format_duration(round(abs(when - now)))
    return f"in {text}" if when > now else f"{text} ago"


def describe_blockers(parents: Sequence[Job]) -> str:
    names = [f"{printable(job.id)} ({job.state})" for job in parents[:3]]
    more = f" and {len(parents) - 3} more" if len(parents) > 3 else ""
    return f"blocked by {', '.join(names)}{more}"


# Jobs as JSON.


def job_facts(job: Job, settings: Settings) -> dict[str, Any]:
    facts: dict[str, Any] = job._asdict()
    for key in ("created_at", "updated_at", "run_after", "locked_at", "scheduled_for"):
        facts[key] = format_time(facts[key])
    for key in ("max_retries", "timeout", "on_dead", "on_end"):
        facts[key] = settings[key] if facts[key] is None else facts[key]
    facts["env"] = json.loads(job.env or "{}")
    facts["cancel_requested"] = bool(job.cancel_requested)
    facts["waited"] = round(job.waited, 3)
    facts["blocked"] = facts.pop("readiness") == BLOCKED
    facts["host"] = facts.pop("launch") and job.host
    return facts


def attempt_facts(attempt: Attempt, limit: int = sys.maxsize) -> dict[str, Any]:
    """Return an attempt as JSON shows it, with the last bytes of its output as UTF-8."""
    output = attempt.output[-limit:]
    facts = attempt._asdict()
    facts.update(started=format_time(attempt.started), finished=format_time(attempt.finished))
    facts.update(waited=round(attempt.waited, 3), output=output.decode(errors="replace"))
    facts["bytes_dropped"] += len(attempt.output) - len(output)
    return facts


def json_line(facts: Facts) -> bytes:
    return json.dumps(facts).encode() + b"\n"


def summary_facts(earlier: bytes, job: Job) -> dict[str, Any]:
    """Return the facts of a summary, given as JSON, after one more job has ended."""
    counts: dict[str, int] = dict.fromkeys(FINISHED, 0)
    counts.update({"count": 1, job.state: 1})
    first = job.id
    with contextlib.suppress(ValueError, TypeError, KeyError):  # there is none yet
        known = json.loads(earlier)
        counts = {key: known[key] + number for key, number in counts.items()}
        first = known["first"]
    return {"event": SUMMARY, "queue": job.queue, **counts, "first": first, "last": job.id}


# The end of an attempt, and the state of its job after it.


class Outcome(NamedTuple):
    """How an attempt ended, as seen by the process that watched it.

    `end` is "unstarted" where this machine could not start it, and "not launched" where its engine
    could not; `error` is None if it completed.
    """

    end: End
    started: float
    finished: float
    exit_code: int | None
    error: str | None
    bytes_dropped: int = 0
    output: bytes = b""

    @property
    def word(self) -> str:
        """The outcome as it is stored with the attempt."""
        if self.error is None:
            return COMPLETED
        return "failed" if self.end == "exited" else self.end


def backoff(attempts: int, settings: Settings) -> float:
    """Return how many seconds to wait after that many failed attempts."""
    with contextlib.suppress(OverflowError):
        return float(min(settings["backoff_base"] ** attempts, settings["backoff_max"]))
    return float(settings["backoff_max"])


def retry_delay(job: Job, attempts: int, settings: Settings, chance: float) -> float:
    """Return how many seconds a job waits: by its own delays, the last one for all later attempts.

    `chance`, a random number from 0 to 1, shortens the time by up to `jitter` of it.
    """
    own = [float(delay) for delay in job.retry_delays.split(",")] if job.retry_delays else []
    delay = own[min(attempts, len(own)) - 1] if own else backoff(attempts, settings)
    return delay * float(1 - settings["jitter"] * chance)


def retry_time(job: Job, delay: float, now: float) -> float:
    """Return when a job is tried again: no later than the next occurrence of its schedule."""
    if delay and job.rule:
        return min(now + delay, next_occurrence(job.rule, job.scheduled_for or now, now))
    return now + delay


UNCOUNTED: Sequence[End] = ("released", "unstarted", "not launched")


def after_attempt(
    job: Job, outcome: Outcome, settings: Settings, now: float, chance: float = 0.0
) -> Job:
    """Return a job as it is after an attempt. This is the one rule of retries."""
    now = min(now, outcome.finished)  # never ahead, even if the clock was set back meanwhile
    facts: dict[str, Any] = {"exit_code": outcome.exit_code, "last_error": outcome.error}
    facts["updated_at"] = now
    if outcome.error is None:
        return job._replace(state=COMPLETED, **facts)
    after = job._replace(**facts)
    if outcome.end in UNCOUNTED and not job.cancel_requested:
        when = min(job.run_after, now)  # at once, even if the clock was set back meanwhile
        after = after._replace(exit_code=job.exit_code, run_after=when)
        return after._replace(state=PENDING, attempts=job.attempts - 1)
    if outcome.end == "cancelled" or job.cancel_requested:
        return after._replace(state=CANCELLED)
    code = shell_code(outcome.exit_code or 0) if outcome.end == "exited" else None
    final = code in settings["no_retry_exit_codes"]
    if code == TRY_LATER and not final and job.snoozes < settings["max_snoozes"]:
        after = after._replace(attempts=job.attempts - 1, snoozes=job.snoozes + 1)
        pause = retry_delay(job, after.snoozes, settings, chance)
        return after._replace(state=PENDING, run_after=retry_time(job, pause, now))
    if final or job.attempts >= (job.max_retries or settings["max_retries"]):
        return after._replace(state=DEAD)
    crashed = outcome.end == "crashed"
    pause = 0 if crashed else retry_delay(job, job.attempts, settings, chance)
    return after._replace(state=PENDING, run_after=retry_time(job, pause, now))


def describe_end(job: Job, after: Job | None, outcome: Outcome) -> str:
    """Return the event line about the end of an attempt; `after` is None if its claim was lost."""
    name = f"{'notification' if job.notifies else 'job'} {printable(job.id)}"
    reason = printable(outcome.error or "")
    if after is None:
        return f"{name} was claimed by another worker meanwhile; this result was dropped"
    wait = format_duration(max(0.0, after.run_after - after.updated_at))
    if after.state == COMPLETED:
        how = f"completed in {format_duration(outcome.finished - outcome.started)}"
    elif after.state != PENDING:
        how = f"is {after.state}: {reason} (try {job.attempts})"
    elif outcome.end == "crashed" or outcome.end in UNCOUNTED:
        how = f"is back in the queue: {reason}"
    elif after.snoozes > job.snoozes:
        how = f"is postponed: {reason}; next try in {wait}"
    else:
        how = f"failed: {reason}; try {job.attempts}, next in {wait}"
    return f"{name} {how}"


def notification_commands(job: Job, settings: Settings) -> dict[str, str]:
    """Return the commands that report the end of a job, by the name of the field or setting."""
    keys = ("on_dead", "on_end") if job.state == DEAD else ("on_end",)
    own = {key: getattr(job, key) for key in keys if not job.notifies}
    commands = {key: settings[key] if value is None else value for key, value in own.items()}
    return {key: command for key, command in commands.items() if command}


def state_to_report(after: Job | None) -> str:
    """Return the state of a job to which its pool reacts, "" for a notification that has ended."""
    return "" if after is None or (after.notifies and after.state in FINISHED) else after.state


# --- SQL -----------------------------------------------------------------------------------------

APPLICATION_ID = 0x51554354  # "QUCT"
SCHEMA_VERSION = 1
GUEST_KEY = "queuectl_schema"
GUEST_PREFIX = "queuectl_"  # of the tables in another program's database
REVISION_KEY = "revision"  # in the table of settings; has another value after each change of them

GET_APPLICATION_ID = "PRAGMA application_id"
SET_APPLICATION_ID = f"PRAGMA application_id = {APPLICATION_ID}"
GET_VERSION = "PRAGMA user_version"
SET_VERSION = f"PRAGMA user_version = {SCHEMA_VERSION}"
GET_GUEST_VERSION = f"SELECT value FROM settings WHERE queue = '' AND key = '{GUEST_KEY}'"
SET_WAL = "PRAGMA journal_mode = WAL"
SET_SYNCHRONOUS = {"full": "PRAGMA synchronous = full", "normal": "PRAGMA synchronous = normal"}
SET_WAIT = "PRAGMA busy_timeout = 200"  # milliseconds
SET_NO_WAIT = "PRAGMA busy_timeout = 0"
GET_DATA_VERSION = "PRAGMA data_version"  # changes when another connection has written
CONNECTION_PRAGMAS = (
    "PRAGMA fullfsync = 1",  # macOS: sync down to the medium
    "PRAGMA wal_autocheckpoint = 2000",  # pages: half of LARGEST_WAL
    "PRAGMA temp_store = memory",  # else a batch writes each row's statement journal to a file
)
TRUNCATE_WAL = "PRAGMA wal_checkpoint(TRUNCATE)"
BEGIN, COMMIT, ROLLBACK = WHOLE = ("BEGIN IMMEDIATE", "COMMIT", "ROLLBACK")
PART = ("SAVEPOINT part", "RELEASE part", "ROLLBACK TO part", "RELEASE part")

# A queue's row counts its jobs by these tests; in a trigger, JOB is `new` or `old`.
JOB_KINDS = {
    "ready": "JOB.state = 'pending' AND JOB.readiness = 1",
    "scheduled": "JOB.state = 'pending' AND JOB.readiness = 0",
    "blocked": "JOB.state = 'pending' AND JOB.readiness = -1",
    "processing": "JOB.state = 'processing'",
    "notifying": "JOB.state = 'processing' AND JOB.notifies IS NOT NULL",
    "completed": "JOB.state = 'completed'",
    "delivered": "JOB.state = 'completed' AND JOB.notifies IS NOT NULL",
    "dead": "JOB.state = 'dead'",
    "cancelled": "JOB.state = 'cancelled'",
}
OPEN = """next_seq IS NOT NULL AND paused = 0 AND (next_notifies OR (
  closed_at IS NULL AND (capacity = 0 OR processing - notifying < capacity)))"""
WAITING_KINDS, OTHER_KINDS = list(JOB_KINDS)[:3], list(JOB_KINDS)[3:]
NEW_QUEUE = """queues (queue) SELECT new.queue
    WHERE NOT EXISTS (SELECT 1 FROM queues WHERE queue = new.queue)"""
FIND_NEXT = """
    (next_priority, next_due, next_seq, next_notifies) = (
      SELECT priority, run_after, seq, notifies IS NOT NULL FROM jobs
      WHERE state = 'pending' AND readiness = 1 AND jobs.queue = queues.queue
      ORDER BY priority DESC, run_after, seq LIMIT 1)"""
CAPACITY = """coalesce(
  (SELECT CAST(value AS INTEGER) FROM settings WHERE queue = queues.queue AND key = 'limit'),
  (SELECT CAST(value AS INTEGER) FROM settings WHERE queue = '' AND key = 'limit'), 0)"""


def recount(change: str, kinds: Iterable[str] = JOB_KINDS) -> str:
    """Return the counts of a queue's row after a change such as "+ new - old"."""
    tests = {kind: JOB_KINDS[kind].replace("JOB", r"\1") for kind in kinds}
    counts = (f"{kind} = {kind} " + re.sub(r"(\w+)", rf"({tests[kind]})", change) for kind in tests)
    return ", ".join(counts)


SCHEMA = f"""
CREATE TABLE jobs (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  queue TEXT NOT NULL,
  command TEXT NOT NULL,
  cwd TEXT NOT NULL,
  env TEXT,                             -- a JSON object
  priority INTEGER NOT NULL,
  max_retries INTEGER,                  -- NULL here and below: the queue's setting decides
  timeout REAL,
  retry_delays TEXT,
  on_dead TEXT,
  on_end TEXT,
  notifies INTEGER,                     -- of a notification: the seq of the job it reports on
  event TEXT,                           -- and the state that job ended in
  rule TEXT,                            -- until the schedule's next job has been made
  schedule_id TEXT,
  scheduled_for REAL,
  state TEXT NOT NULL DEFAULT 'pending',
  readiness INTEGER NOT NULL,           -- pending: 1 ready, 0 scheduled, -1 blocked; others: 1
  created_at REAL NOT NULL,
  updated_at REAL NOT NULL,
  run_after REAL NOT NULL,
  run INTEGER NOT NULL DEFAULT 0,
  attempts INTEGER NOT NULL DEFAULT 0,
  snoozes INTEGER NOT NULL DEFAULT 0,
  waited REAL NOT NULL DEFAULT 0,
  cancel_requested INTEGER NOT NULL DEFAULT 0,
  locked_by TEXT,
  locked_at REAL,
  exit_code INTEGER,
  last_error TEXT,
  launch TEXT,                          -- while it runs elsewhere: a JSON object about that
  stdin BLOB                            -- last, so that reading other columns does not load it
);
CREATE INDEX jobs_ready ON jobs (queue, priority DESC, run_after, seq, notifies)
  WHERE state = 'pending' AND readiness = 1;
CREATE INDEX jobs_due ON jobs (run_after)
  WHERE state = 'pending' AND readiness = 0;
CREATE INDEX jobs_scheduled ON jobs (queue, run_after)
  WHERE state = 'pending' AND readiness = 0;
CREATE INDEX jobs_state ON jobs (state, readiness, updated_at, seq, queue);
CREATE INDEX jobs_schedule ON jobs (schedule_id, seq) WHERE schedule_id IS NOT NULL;
CREATE INDEX jobs_rule ON jobs (schedule_id) WHERE rule IS NOT NULL;
CREATE INDEX jobs_notifies ON jobs (state, event, queue, notifies)
  WHERE notifies IS NOT NULL;

CREATE TABLE attempts (                 -- the attempts that have ended
  job INTEGER NOT NULL,
  run INTEGER NOT NULL,
  worker TEXT NOT NULL,
  outcome TEXT NOT NULL,
  waited REAL NOT NULL,
  started REAL NOT NULL,
  finished REAL NOT NULL,
  exit_code INTEGER,
  error TEXT,
  bytes_dropped INTEGER NOT NULL,
  output BLOB NOT NULL,
  PRIMARY KEY (job, run)
) WITHOUT ROWID;

CREATE TABLE needs (                    -- a child is blocked until all of its needs are met
  parent INTEGER NOT NULL,
  child INTEGER NOT NULL,
  any_end INTEGER NOT NULL DEFAULT 0,   -- 1: met by any end of the parent, not only completion
  met INTEGER NOT NULL,
  PRIMARY KEY (parent, child, any_end)
) WITHOUT ROWID;
CREATE INDEX needs_child ON needs (child, met);

CREATE TABLE batches (                  -- the accepted ones among those with staged jobs
  name TEXT PRIMARY KEY                 -- of its lock; locked_by of its staged jobs
) WITHOUT ROWID;

CREATE TABLE settings (                 -- queue '': the default for all queues
  queue TEXT NOT NULL,
  key TEXT NOT NULL,
  value TEXT NOT NULL,
  PRIMARY KEY (queue, key)
) WITHOUT ROWID;

CREATE TABLE queues (                   -- kept by triggers; queue '': paused stands for all queues
  queue TEXT PRIMARY KEY,
  paused INTEGER NOT NULL DEFAULT 0,
  capacity INTEGER NOT NULL DEFAULT 0,  -- the setting `limit`
  ready INTEGER NOT NULL DEFAULT 0,     -- the number of jobs, here and below
  scheduled INTEGER NOT NULL DEFAULT 0,
  blocked INTEGER NOT NULL DEFAULT 0,
  processing INTEGER NOT NULL DEFAULT 0,
  notifying INTEGER NOT NULL DEFAULT 0, -- the notifications among those in processing
  completed INTEGER NOT NULL DEFAULT 0,
  delivered INTEGER NOT NULL DEFAULT 0, -- the notifications among those that have completed
  dead INTEGER NOT NULL DEFAULT 0,
  cancelled INTEGER NOT NULL DEFAULT 0,
  next_priority INTEGER,                -- of the ready job that is next, here and below
  next_due REAL,
  next_seq INTEGER,
  next_notifies INTEGER,
  launch_failures INTEGER NOT NULL DEFAULT 0,  -- in a row
  token_at REAL,                        -- when the rate, or a failure, allows the next start
  closed_at REAL                        -- when that closed the queue; NULL: it is not closed
) WITHOUT ROWID;
CREATE INDEX queues_open ON queues (next_priority DESC, next_due, next_seq) WHERE {OPEN};
CREATE INDEX queues_token ON queues (token_at) WHERE closed_at IS NOT NULL;
CREATE INDEX queues_closed ON queues (closed_at) WHERE closed_at IS NOT NULL;
CREATE TRIGGER queues_insert AFTER INSERT ON queues BEGIN
  UPDATE queues SET capacity = {CAPACITY} WHERE queue = new.queue;
END;
CREATE TRIGGER jobs_insert AFTER INSERT ON jobs WHEN new.state <> 'staged' BEGIN
  INSERT INTO {NEW_QUEUE};
  UPDATE queues SET {recount("+ new", WAITING_KINDS)} WHERE queue = new.queue;
  UPDATE queues SET {recount("+ new", OTHER_KINDS)}, {FIND_NEXT}
    WHERE queue = new.queue AND NOT (new.state = 'pending' AND (
      new.readiness <> 1 OR coalesce(next_priority > new.priority OR next_priority = new.priority
        AND (next_due, next_seq) < (new.run_after, new.seq), 0)));
END;
CREATE TRIGGER jobs_delete AFTER DELETE ON jobs BEGIN
  UPDATE queues SET {recount("- old")}, {FIND_NEXT} WHERE queue = old.queue;
END;
CREATE TRIGGER jobs_update AFTER UPDATE OF state, readiness, priority, run_after ON jobs
  WHEN old.queue = new.queue AND old.state <> 'staged' AND (
    old.state = 'pending' AND old.readiness = 1 OR new.state = 'pending' AND new.readiness = 1)
BEGIN
  UPDATE queues SET {recount("+ new - old")}, {FIND_NEXT} WHERE queue = new.queue;
END;
CREATE TRIGGER jobs_end AFTER UPDATE OF state, readiness ON jobs
  WHEN old.queue = new.queue AND old.state <> 'staged' AND NOT (
    old.state = 'pending' AND old.readiness = 1 OR new.state = 'pending' AND new.readiness = 1)
BEGIN
  UPDATE queues SET {recount("+ new - old")} WHERE queue = new.queue;
END;
CREATE TRIGGER jobs_move AFTER UPDATE OF queue ON jobs WHEN old.queue <> new.queue BEGIN
  INSERT INTO {NEW_QUEUE};
  UPDATE queues SET {recount("- old")}, {FIND_NEXT} WHERE queue = old.queue;
  UPDATE queues SET {recount("+ new")}, {FIND_NEXT} WHERE queue = new.queue;
END;

CREATE TABLE totals (                   -- of all attempts ever, kept by a trigger
  queue TEXT NOT NULL,
  outcome TEXT NOT NULL,
  number INTEGER NOT NULL,
  running REAL NOT NULL,                -- seconds
  waiting REAL NOT NULL,
  last REAL NOT NULL,                   -- when the last one ended
  PRIMARY KEY (queue, outcome)
) WITHOUT ROWID;
CREATE TRIGGER totals_insert AFTER INSERT ON attempts BEGIN
  INSERT INTO totals
    SELECT queue, new.outcome, 1, new.finished - new.started, new.waited, new.finished
    FROM jobs WHERE seq = new.job
    ON CONFLICT (queue, outcome) DO UPDATE SET number = number + 1,
      running = running + excluded.running, waiting = waiting + excluded.waiting,
      last = max(last, excluded.last);
END;
"""

# Reading jobs.

JOB_COLUMNS = ", ".join(Job._fields[:-1]) + ", coalesce(length(stdin), 0)"  # stdin_size
JOB = f"SELECT {JOB_COLUMNS} FROM jobs "
ATTEMPT = "SELECT " + ", ".join(Attempt._fields) + " FROM attempts "
IN_QUEUE = "(:queue IS NULL OR queue = :queue)"
ACTIVE_RULE = "rule IS NOT NULL AND state IN ('pending', 'processing')"
IS_VISIBLE = "(state <> 'staged' OR locked_by = :batch)"
BY_ID = JOB + f"WHERE id = :id AND {IS_VISIBLE}"
BY_SEQ = JOB + "WHERE seq = :seq"
ACTIVE_OF_SCHEDULE = JOB + "WHERE schedule_id = :id AND " + ACTIVE_RULE
NEWEST_OF_SCHEDULE = JOB + f"WHERE schedule_id = :id AND {IS_VISIBLE} ORDER BY seq DESC LIMIT 1"
LAST_JOB = JOB + "WHERE notifies IS NULL AND state <> 'staged' ORDER BY seq DESC LIMIT 1"
IS_TAKEN = """
SELECT 1 FROM jobs WHERE id = :id
UNION ALL SELECT 1 FROM jobs WHERE schedule_id = :id AND rule IS NOT NULL
  AND state IN ('pending', 'processing', 'staged')"""
LAST_RUN_OF_SCHEDULE = JOB + "WHERE schedule_id = :id AND run > 0 ORDER BY seq DESC LIMIT 1"
LAST_DEAD_OF_SCHEDULE = JOB + "WHERE schedule_id = :id AND state = 'dead' ORDER BY seq DESC LIMIT 1"
LAST_RESULT_OF_SCHEDULE = """
SELECT id, outcome, error, started, finished FROM jobs JOIN attempts ON job = seq
WHERE schedule_id = :id ORDER BY seq DESC, attempts.run DESC LIMIT 1"""
SCHEDULES = JOB + f"INDEXED BY jobs_rule WHERE {ACTIVE_RULE} ORDER BY schedule_id"
RECENT_IDS = """
SELECT id FROM (SELECT id, state FROM jobs ORDER BY seq DESC LIMIT 1000) WHERE state <> 'staged'"""
# For completion: of the jobs that changed last, and of those with such ids, only some are read.
LATEST_IDS = f"""
SELECT name FROM (
  SELECT CASE WHEN {ACTIVE_RULE} THEN schedule_id ELSE id END AS name, updated_at FROM jobs
  WHERE state = :state AND readiness = :readiness ORDER BY updated_at DESC LIMIT 500)
WHERE substr(name, 1, length(:prefix)) = :prefix ORDER BY updated_at DESC LIMIT :limit"""
IDS_FROM = """
SELECT id FROM (SELECT id, state, readiness FROM jobs WHERE id >= :prefix ORDER BY id LIMIT 500)
WHERE state = :state AND readiness = :readiness AND substr(id, 1, length(:prefix)) = :prefix
LIMIT :limit"""
LAST_SEQ = "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = :table"
IDS_BETWEEN = """
SELECT seq, coalesce(schedule_id, id) FROM jobs
WHERE seq BETWEEN :first AND :last ORDER BY seq LIMIT 1000"""
ALL_JOBS = JOB + "WHERE seq > :seq AND state <> 'staged' ORDER BY seq LIMIT 1000"
SLICE = 200  # jobs read by number, or deleted, at a time
BY_SEQS = f"{JOB}WHERE seq IN ({', '.join('?' * SLICE)}) ORDER BY seq"
# In two parts: SQLite does not search an index by rowid after a range of its last column.
SEQS_IN_STATE = f"""
SELECT * FROM (
  SELECT updated_at, seq FROM jobs WHERE state = :state AND readiness = :readiness
    AND updated_at = :updated_at AND seq > :seq AND {IN_QUEUE} ORDER BY seq LIMIT 5000)
UNION ALL SELECT * FROM (
  SELECT updated_at, seq FROM jobs WHERE state = :state AND readiness = :readiness
    AND updated_at > :updated_at AND {IN_QUEUE} ORDER BY updated_at, seq LIMIT 5000)
LIMIT 5000"""
IN_STATE = JOB + f"WHERE state = :state AND readiness = :readiness AND {IN_QUEUE} "
LATEST = f"""
{IN_STATE} AND (notifies IS NULL OR :notifications OR state <> 'completed')
ORDER BY updated_at DESC, seq DESC LIMIT :limit"""
OLDEST = IN_STATE + "ORDER BY updated_at LIMIT :limit"
CLAIMED = JOB + "WHERE state = 'processing'"
DEAD_JOBS = "SELECT id, seq, run, notifies FROM jobs WHERE state = 'dead' ORDER BY updated_at"
RECENT_LIMIT = 5000
RECENT_ENDS = f"""
SELECT count(*), min(updated_at) FROM (
  SELECT updated_at FROM jobs
  WHERE state = :state AND readiness = 1 AND updated_at > :since AND {IN_QUEUE}
  ORDER BY updated_at DESC LIMIT {RECENT_LIMIT})"""
COUNTS = """
SELECT queue, blocked, scheduled, ready, processing, completed, dead, cancelled FROM queues
WHERE :served ORDER BY queue"""
COUNTS_WITHOUT_DELIVERED = COUNTS.replace("completed,", "completed - delivered,")
USED_QUEUES = """
SELECT queue FROM queues
WHERE blocked + scheduled + ready + processing + completed + dead + cancelled > 0
UNION SELECT queue FROM totals ORDER BY queue"""
COUNTED: Sequence[tuple[State, int]] = (  # the columns of COUNTS
    *((PENDING, readiness) for readiness in (BLOCKED, SCHEDULED, READY)),
    *((state, READY) for state in STATES[1:]),
)
ATTEMPTS = ATTEMPT + "WHERE job = :seq AND run > :run ORDER BY run LIMIT 16"
SUMMARIES = ATTEMPTS.replace("output FROM", "x'' FROM").replace("LIMIT 16", "LIMIT 1000")
LAST_ATTEMPT = ATTEMPT + "WHERE job = :seq AND run <= :run ORDER BY run DESC LIMIT 1"
LAST_SUMMARY = LAST_ATTEMPT.replace("output FROM", "x'' FROM")
STDIN = "SELECT stdin FROM jobs WHERE seq = :seq"
PARENT_IDS = """
SELECT id FROM jobs
WHERE seq IN (SELECT parent FROM needs WHERE child = :seq AND met = 1) ORDER BY seq"""
COUNT_NOTIFICATIONS = f"""
SELECT count(*) FROM jobs INDEXED BY jobs_notifies
WHERE notifies IS NOT NULL AND state = :state AND {IN_QUEUE}"""
WAITING_SUMMARY = f"""
{JOB}INDEXED BY jobs_notifies WHERE notifies IS NOT NULL AND state = 'pending'
AND event = '{SUMMARY}' AND queue = :queue AND command = :command AND cwd = :cwd"""
OUTPUT_TAIL = """
SELECT coalesce(substr(output, -:limit), x''), bytes_dropped + max(0, length(output) - :limit)
FROM attempts WHERE job = :seq AND run = :run"""
TOTALS = "SELECT queue, outcome, number, running, waiting, last FROM totals"
READY_IN_QUEUE = "FROM jobs WHERE state = 'pending' AND readiness = 1 AND queue = :queue"
# By priority, of which there are few: the index has no order by time alone.
OLDEST_DUE = f"""
WITH RECURSIVE levels (level) AS (
  SELECT max(priority) {READY_IN_QUEUE}
  UNION ALL SELECT (SELECT max(priority) {READY_IN_QUEUE} AND priority < level) FROM levels
  WHERE level IS NOT NULL LIMIT 1000)
SELECT min((SELECT min(run_after) {READY_IN_QUEUE} AND priority = level)) FROM levels"""
LAST_RUNS = ATTEMPT.replace("output FROM", "x'' FROM")
LAST_RUNS += "WHERE job = :seq ORDER BY run DESC LIMIT :limit"
JOBS_BEFORE = f"""
{JOB}WHERE seq < :seq AND state <> 'staged' ORDER BY seq DESC LIMIT :limit"""
IN_STATE_BEFORE = f"""
SELECT * FROM (
  {JOB}WHERE state = :state AND readiness = :readiness
    AND updated_at = :updated_at AND seq < :seq ORDER BY seq DESC LIMIT :limit)
UNION ALL SELECT * FROM (
  {JOB}WHERE state = :state AND readiness = :readiness
    AND updated_at < :updated_at ORDER BY updated_at DESC, seq DESC LIMIT :limit)
LIMIT :limit"""
LAST_DEAD = """
SELECT id, seq, updated_at, coalesce(last_error, '') AS reason FROM jobs
WHERE state = 'dead' AND readiness = 1 ORDER BY updated_at DESC LIMIT :limit"""
DEAD_REASONS = f"""
SELECT reason, count(*), max(updated_at), max(seq) FROM ({LAST_DEAD})
GROUP BY reason ORDER BY count(*) DESC LIMIT 100"""
DEAD_LIKE = f"""
SELECT id FROM ({LAST_DEAD})
WHERE reason = (SELECT coalesce(last_error, '') FROM jobs WHERE id = :id) LIMIT 1000"""
POSITION = f"""
SELECT count(*) FROM (
  SELECT 1 {READY_IN_QUEUE} AND priority > :priority
  UNION ALL SELECT 1 {READY_IN_QUEUE} AND priority = :priority
    AND (run_after, seq) < (:run_after, :seq) LIMIT 100000)"""
PARENTS = f"""
{JOB}WHERE seq IN (SELECT parent FROM needs WHERE child = :seq AND met = 0)
ORDER BY seq LIMIT 100"""
ANCESTORS = """ancestors (seq) AS (
  SELECT :seq UNION SELECT parent FROM needs JOIN ancestors ON child = ancestors.seq WHERE met = 0)
"""
FAILED_ANCESTORS = f"""
WITH RECURSIVE {ANCESTORS}
{JOB}WHERE seq IN ancestors AND +state IN ('dead', 'cancelled') LIMIT 1"""  # +: not by an index
COUNT_CHILDREN = """
SELECT count(*) FROM needs JOIN jobs ON seq = child
WHERE parent = :seq AND met = 0 AND any_end = 0 AND state = 'pending'"""
BLOCKED_CHILDREN = f"""
{JOB}JOIN needs ON child = seq
WHERE parent = :seq AND met = 0 AND state IN ('pending', 'staged')"""
DESCENDANTS = f"""
WITH RECURSIVE descendants (child) AS (
  SELECT child FROM needs WHERE parent = :seq AND met = 0 AND any_end = 0
  UNION SELECT needs.child FROM needs JOIN descendants ON parent = descendants.child
    WHERE met = 0 AND any_end = 0)
{JOB}WHERE seq IN descendants AND state <> 'staged'"""

# Adding, claiming and finishing.

BATCH_SLICE = 5000  # jobs added in one transaction
INSERTED = """seq id queue command cwd env priority max_retries timeout created_at updated_at
run_after readiness rule schedule_id scheduled_for
retry_delays on_dead on_end notifies event stdin state locked_by""".split()


@lru_cache(maxsize=1000)
def insert_job(*columns: str) -> str:
    """Return the statement that inserts a job; a column left out costs less than a bound NULL."""
    values = ", ".join(":" + column for column in columns)
    return f"INSERT OR IGNORE INTO jobs ({', '.join(columns)}) VALUES ({values})"


ACCEPT_BATCH = "INSERT INTO batches VALUES (:batch)"
IS_ACCEPTED = "SELECT 1 FROM batches WHERE name = :batch"
FORGET_BATCH = "DELETE FROM batches WHERE name = :batch"
OPEN_BATCH = "SELECT locked_by FROM jobs WHERE state = 'staged' LIMIT 1"
STAGED_JOBS = f"""
SELECT seq FROM jobs WHERE state = 'staged' AND readiness = 1 AND locked_by = :batch
ORDER BY updated_at, seq LIMIT {BATCH_SLICE}"""  # all of a batch have one updated_at
IN_SLICE = "seq BETWEEN :first AND :last AND +state = 'staged' AND locked_by = :batch"
READINESS = """CASE
  WHEN EXISTS (SELECT 1 FROM needs WHERE child = seq AND met = 0) THEN -1
  ELSE run_after <= :now END"""
# Publishing counts a slice at once: a trigger for each job would double the cost.
PUBLISH = (
    f"""
INSERT INTO queues (queue, ready, scheduled, blocked)
  SELECT queue, sum(ready = 1), sum(ready = 0), sum(ready = -1)
  FROM (SELECT queue, {READINESS} AS ready FROM jobs WHERE {IN_SLICE}) WHERE true GROUP BY queue
  ON CONFLICT (queue) DO UPDATE SET ready = ready + excluded.ready,
    scheduled = scheduled + excluded.scheduled, blocked = blocked + excluded.blocked""",
    f"""
UPDATE jobs SET state = 'pending', locked_by = NULL, updated_at = :now, readiness = {READINESS}
WHERE {IN_SLICE}""",
    f"""
UPDATE queues SET {FIND_NEXT}
WHERE queue IN (SELECT DISTINCT queue FROM jobs WHERE seq BETWEEN :first AND :last)""",
)
ADD_NEED = "INSERT OR IGNORE INTO needs VALUES (:parent, :child, :any_end, :met)"
SET_STDIN = "UPDATE jobs SET stdin = :stdin WHERE seq = :seq AND state = 'pending'"
NEXT_SCHEDULED = """
SELECT min(run_after) FROM jobs INDEXED BY jobs_due WHERE state = 'pending' AND readiness = 0"""
# Statements with :served are about the queues that a pool serves; `for_queues` names them.
# The columns of Checks, for a claim or for the end of the job :seq.
CHECKS = f"""
SELECT ({NEXT_SCHEDULED}),
  (SELECT min(token_at) FROM queues WHERE closed_at IS NOT NULL),
  (SELECT coalesce(max(closed_at), 0) FROM queues WHERE closed_at IS NOT NULL),
  EXISTS (SELECT 1 FROM needs WHERE parent = :seq),
  (SELECT value FROM settings WHERE queue = '' AND key = '{REVISION_KEY}')"""
# In slices: if more than 500 jobs become ready at once, one of high priority may be delayed.
MAKE_READY = """
UPDATE jobs SET readiness = 1, updated_at = run_after WHERE seq IN (
  SELECT seq FROM jobs INDEXED BY jobs_due
  WHERE state = 'pending' AND readiness = 0 AND run_after <= :now
  ORDER BY run_after LIMIT 500)"""
REOPEN = """
UPDATE queues SET closed_at = NULL
WHERE closed_at IS NOT NULL AND (token_at <= :now OR closed_at > :now)"""
NEXT_READY = f"""
SELECT EXISTS (SELECT 1 FROM needs WHERE child = seq), {JOB_COLUMNS} FROM jobs WHERE seq = (
  SELECT next_seq FROM queues WHERE {OPEN} AND :served
    AND NOT EXISTS (SELECT 1 FROM queues WHERE queue = '' AND paused = 1)
  ORDER BY next_priority DESC, next_due, next_seq LIMIT 1)"""
# A start that was late moves the following ones only if it was later than :late seconds.
TAKE_TOKEN = """
UPDATE queues SET closed_at = :now,
  token_at = max(min(coalesce(token_at, 0), :now), :now - :late) + :gap
WHERE queue = :queue AND NOT EXISTS (SELECT 1 FROM jobs WHERE seq = :seq AND notifies > 0)"""
GOT_ROOM = f"""
SELECT 1 FROM queues
WHERE queue = :queue AND capacity > 0 AND processing - notifying = capacity - 1 AND {OPEN}"""
SCHEDULED_IN_QUEUE = """jobs INDEXED BY jobs_scheduled
    WHERE state = 'pending' AND readiness = 0 AND queue = queues.queue"""
NEXT_SCHEDULED_OF_QUEUES = f"""
SELECT min((SELECT min(run_after) FROM {SCHEDULED_IN_QUEUE})) FROM queues
WHERE scheduled > 0 AND :served"""
NEXT_TOKEN = """
SELECT min(token_at) FROM queues
WHERE closed_at IS NOT NULL AND ready > 0 AND paused = 0 AND :served"""
# A drain waits for the retry of a schedule's job, but not for the schedule's next job.
DRAINED = f"""
SELECT queue, paused, ready, processing, CASE WHEN scheduled > 0 THEN (
    SELECT min(run_after) FROM {SCHEDULED_IN_QUEUE} AND (rule IS NULL OR run > 0)) END
FROM queues WHERE ready + scheduled + processing > 0 AND :served"""
CLAIM = """
UPDATE jobs SET state = 'processing', attempts = :attempts, run = :run, waited = :waited,
  locked_by = :locked_by, locked_at = :locked_at, updated_at = :updated_at
WHERE seq = :seq AND state = 'pending'"""
FINISH = """
UPDATE jobs SET state = :state, attempts = :attempts, exit_code = :exit_code,
  last_error = :last_error, run_after = :run_after, readiness = :readiness,
  updated_at = :updated_at, snoozes = :snoozes, rule = :rule,
  locked_by = NULL, locked_at = NULL, cancel_requested = 0, launch = NULL
WHERE seq = :seq AND state = 'processing' AND locked_by = :locked_by AND run = :run"""
ADD_ATTEMPT = f"INSERT INTO attempts VALUES ({', '.join('?' * (len(Attempt._fields) + 1))})"
MARK_MET = "UPDATE needs SET met = 1 WHERE parent = :seq AND (any_end = 1 OR :completed)"
UNBLOCK = """
UPDATE jobs SET readiness = run_after <= :now, updated_at = :now
WHERE seq IN (SELECT child FROM needs WHERE parent = :seq)
  AND +state = 'pending' AND +readiness = -1  -- +: not by an index on all blocked jobs
  AND NOT EXISTS (SELECT 1 FROM needs WHERE child = jobs.seq AND met = 0)"""

# Operating.

RETRY = """
UPDATE jobs SET state = 'pending', attempts = 0, snoozes = 0, updated_at = :now,
  exit_code = NULL, last_error = NULL,
  run_after = CASE WHEN run = 0 THEN max(run_after, :now) ELSE :now END,  -- not before its time
  readiness = CASE
    WHEN EXISTS (SELECT 1 FROM needs WHERE child = seq AND met = 0) THEN -1
    ELSE run > 0 OR run_after <= :now END
WHERE seq = :seq AND state IN ('dead', 'cancelled')"""
DROP_NEEDS = "DELETE FROM needs WHERE child = :child AND any_end = :any_end"
COUNT_UNMET = "SELECT count(*) FROM needs WHERE child = :child AND met = 0"
WAITS_FOR = f"WITH RECURSIVE {ANCESTORS} SELECT count(*) FROM ancestors WHERE seq = :other"


@lru_cache(maxsize=None)
def edit_statement(*columns: str) -> str:
    """Return the statement that changes columns of a waiting job."""
    assignments = ", ".join(f"{column} = :{column}" for column in columns)
    return f"UPDATE jobs SET {assignments} WHERE seq = :seq AND state = 'pending'"


CANCEL_WAITING = """
UPDATE jobs SET state = 'cancelled', readiness = 1, updated_at = :now,
  last_error = 'cancelled by the operator'
WHERE seq = :seq AND state = 'pending'"""
CANCEL_RUNNING = "UPDATE jobs SET cancel_requested = 1 WHERE seq = :seq AND state = 'processing'"
SCHEDULED_AHEAD = f"""
{JOB}WHERE state = 'pending' AND readiness = 0 AND updated_at > :limit
  AND (run > 0 OR rule IS NOT NULL) LIMIT 500"""
RESCHEDULE = """
UPDATE jobs SET run_after = :when, scheduled_for = :scheduled_for, updated_at = :now
WHERE seq = :seq AND state = 'pending' AND readiness = 0 AND updated_at > :now"""
PRUNABLE = f"""
SELECT seq FROM jobs WHERE state = :state AND readiness = 1 AND updated_at <= :before
  AND NOT EXISTS (
    SELECT 1 FROM needs JOIN jobs AS children ON children.seq = child
    WHERE parent = jobs.seq AND met = 0 AND children.state IN ('pending', 'staged'))
ORDER BY updated_at LIMIT {SLICE}"""
DELETE_JOB = (
    "DELETE FROM attempts WHERE job = :seq",
    "DELETE FROM needs WHERE parent = :seq OR child = :seq",
    "DELETE FROM jobs WHERE seq = :seq",
)
PAUSED = "SELECT queue FROM queues WHERE paused = 1"
PAUSE = """
INSERT INTO queues (queue, paused) VALUES (:queue, 1)
ON CONFLICT (queue) DO UPDATE SET paused = 1"""
HELD = """
SELECT capacity, processing - notifying, launch_failures,
  CASE WHEN closed_at IS NOT NULL THEN token_at END
FROM queues WHERE queue = :queue"""
HELD_QUEUES = """
SELECT queue FROM queues
WHERE ready > 0 AND (closed_at IS NOT NULL OR capacity > 0 AND processing - notifying >= capacity)
ORDER BY queue"""
RESUME = """
UPDATE queues SET paused = 0, launch_failures = 0,
  closed_at = CASE WHEN launch_failures = 0 THEN closed_at END
WHERE :queue IN ('', queue)"""
HOLD_LAUNCHES = """
UPDATE queues SET launch_failures = launch_failures + 1, closed_at = :now,
  token_at = :now + CASE launch_failures WHEN 0 THEN 2 WHEN 1 THEN 4 ELSE 60 END
WHERE queue = :queue"""
END_LAUNCH_HOLD = """
UPDATE queues SET launch_failures = 0, closed_at = CASE WHEN :has_rate THEN closed_at END
WHERE queue = :queue AND launch_failures > 0"""
NOTE_LAUNCH = """
UPDATE jobs SET launch = :launch
WHERE seq = :seq AND state = 'processing' AND locked_by = :locked_by AND run = :run
  AND (launch IS NULL) = :is_first"""
FORGET_LAUNCH = "UPDATE jobs SET launch = NULL WHERE seq = :seq AND state = 'processing'"
STORED_SETTINGS = """
SELECT queue, key, value FROM settings WHERE queue IN ('', :queue) ORDER BY queue"""
SET = """
INSERT INTO settings VALUES (:queue, :key, :value)
ON CONFLICT (queue, key) DO UPDATE SET value = :value"""
UNSET = "DELETE FROM settings WHERE queue = :queue AND key = :key"
APPLY_LIMIT = f"UPDATE queues SET capacity = {CAPACITY} WHERE :queue IN ('', queue)"
# The time of the next start follows from that of the last one: closed_at.
APPLY_RATE = """
UPDATE queues SET token_at = closed_at + :gap, closed_at = CASE WHEN :gap > 0 THEN closed_at END
WHERE closed_at IS NOT NULL AND launch_failures = 0 AND (
  queue = :queue OR :queue = '' AND NOT EXISTS (
  SELECT 1 FROM settings WHERE settings.queue = queues.queue AND key = 'rate'))"""

TABLES = "jobs|attempts|needs|batches|settings|queues|totals"
REFERENCE = "FROM|JOIN|INTO|UPDATE|TABLE|INDEX|TRIGGER|ON|BY"  # precedes a table or an index
FEW_QUEUES = 32
GUEST_NAME = re.compile(rf"\b((?:{REFERENCE}) )?({TABLES})(?(1)(?=\b|_)|(?=\.))")


@lru_cache(maxsize=None)
def for_guest(sql: str) -> str:
    """Return a statement for the tables in another program's database, which have a prefix."""
    return GUEST_NAME.sub(rf"\1{GUEST_PREFIX}\2", sql)


@lru_cache(maxsize=None)
def for_queues(sql: str, number: int) -> str:
    """Return a statement for a number of queues, :q0, :q1 and so on; 0 stands for all.

    A few are looked up by their names. The row of each of many is compared with the names.
    """
    names = ", ".join(f":q{n}" for n in range(number))
    column = "queue" if number <= FEW_QUEUES else "+queue"
    return sql.replace(":served", f"{column} IN ({names})" if number else "1")


# --- system: the differences of POSIX and Windows; the only place with signals and kills ----------

STOP_SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")]
EXHAUSTED = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # a system limit was reached


def polling(limit: float = NEVER, first: float = 0.0005, longest: float = 0.05) -> Iterator[float]:
    """Yield the seconds waited so far: at once, then after growing pauses, until the limit.

    Use it for events without a notification, such as the release of a lock.
    """
    began = time.monotonic()
    pause = first
    while True:
        waited = time.monotonic() - began
        yield waited
        if waited >= limit:
            return
        chance = time.perf_counter_ns() % 1000 / 1000  # two processes must not retry in step
        time.sleep(min(pause * (0.5 + chance), limit - waited))
        pause = min(pause * 1.5, longest)


OWN = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))


def open_own(path: str, flags: int) -> int:
    """Open a file of a queue: never through a symbolic link, never blocking on a FIFO."""
    return os.open(path, flags | OWN, 0o600)


def sync_file(path: str) -> None:
    """Sync a file; on macOS, down to the medium."""
    with open(path, "r+b", buffering=0) as file:
        if sys.platform == "darwin":
            from fcntl import F_FULLFSYNC, fcntl

            fcntl(file, F_FULLFSYNC)
        else:
            getattr(os, "fdatasync", os.fsync)(file.fileno())


def user_id() -> int | None:
    """Return the user id of this process, None on Windows: ownership works differently there."""
    if sys.platform == "win32":
        return None
    return os.geteuid()


class Trace(NamedTuple):
    """How the processes of an attempt are recognized.

    They have `token` as QUEUECTL_RUN in their environment, and the lock of the file `lock_path`.
    Where a program hides both, it descends from the job's own process, `leader` (0 if unknown,
    else started at `launched`, in Unix seconds), or belongs to its session.
    """

    token: str
    lock_path: str
    leader: int
    launched: float


class Wakeup(NamedTuple):
    """Descriptors by which other processes and signals wake this one."""

    reader: int
    writer: int

    def fileno(self) -> int:
        return self.reader

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.reader, 65536)

    def close(self) -> None:
        for fd in {self.reader, self.writer}:
            os.close(fd)


# The program of workers and their server. It loads this file by its path, so that no file named
# like a standard module, in the current directory or beside this one, can be imported instead.
LOAD = """
import importlib, os, sys
from importlib import machinery, util
path = sys.argv[1]
if os.path.isfile(path):
    named = path.endswith((".py", ".pyc"))
    loader = None if named else machinery.SourceFileLoader("queuectl", path)
    spec = util.spec_from_file_location("queuectl", path, loader=loader)
    module = sys.modules["queuectl"] = util.module_from_spec(spec)
    spec.loader.exec_module(module)
else:  # in an archive
    sys.path.append(os.path.dirname(path))
    module = importlib.import_module(os.path.splitext(os.path.basename(path))[0])
module.SYSTEM.serve(module.begin_worker, *sys.argv[2:])
"""


def interpreter_flags() -> list[str]:
    import subprocess

    return list(subprocess._args_from_interpreter_flags())  # type: ignore[attr-defined]


def python_command(python: str, *args: str) -> list[str]:
    """Return the command that loads this file in isolation, with the flags of this interpreter."""
    utf8 = f"utf8={sys.flags.utf8_mode}"
    file = os.path.realpath(__file__)
    return [python, *interpreter_flags(), "-I", "-X", utf8, "-c", LOAD, file, *args]


if sys.platform == "win32":

    class Windows:
        """Windows. A job's processes are in a Job Object, which ends them when its worker dies.

        The lock of a file is on a byte far beyond its end. There are no FIFOs: pools poll.
        """

        POLL = 0.02
        PYTHON: str = getattr(sys, "_base_executable", sys.executable)  # not a venv's starter
        BACKGROUND: Mapping[str, Any] = {"creationflags": 0x8 | 0x200}  # detached, in a new group
        LOCKED_BYTE = 1 << 40

        def __init__(self) -> None:
            self.jobs: dict[int, int] = {}  # the handles of the Job Objects, by process

        def call(self, name: str, *args: Any, dll: str = "kernel32") -> int:
            """Call a function of the system; numbers are passed and returned as wide as handles."""
            import ctypes

            function = getattr(ctypes.WinDLL(dll), name)
            function.restype = ctypes.c_void_p
            wide = (ctypes.c_void_p(arg) if isinstance(arg, int) else arg for arg in args)
            return function(*wide) or 0

        def lock(self, fd: int, *, shared: bool = False) -> bool:  # noqa: ARG002
            import msvcrt

            os.lseek(fd, self.LOCKED_BYTE, os.SEEK_SET)
            try:
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            except OSError:
                return False
            finally:
                os.lseek(fd, 0, os.SEEK_SET)  # the job writes where this points
            return True

        def is_unlocked(self, path: str) -> bool:
            gone = contextlib.suppress(FileNotFoundError, PermissionError)  # or being removed
            with gone, open(path, "r+b", buffering=0, opener=open_own) as file:
                return self.lock(file.fileno())
            return True

        def remove_locked(self, fd: int, path: str) -> None:
            """Close and remove a file that is locked here; an open file cannot be removed."""
            os.close(fd)
            with contextlib.suppress(OSError):  # a background process of the job still writes to it
                os.unlink(path)

        def punch_hole(self, fd: int, length: int) -> bool:  # noqa: ARG002
            return False

        def make_wakeup(self, fifo: str = "") -> Wakeup | None:  # noqa: ARG002
            return None

        def wait(self, sources: Iterable[Any], child: Any, limit: float | None) -> list[Any]:
            from multiprocessing.connection import wait

            things = [thing for thing in (*sources, child and int(child._handle)) if thing]
            if not things:
                time.sleep(limit or 0)
            return wait(things, limit)

        def start_worker(self, pipe: Any) -> Any:
            import subprocess

            handle = pipe.fileno()
            os.set_handle_inheritable(handle, True)  # noqa: FBT003
            info = subprocess.STARTUPINFO(lpAttributeList={"handle_list": [handle]})
            return subprocess.Popen(python_command(self.PYTHON, str(handle)), startupinfo=info)

        def join(self, process: Any, limit: float) -> None:
            import subprocess

            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit)

        def resume(self, process: Any) -> None:
            pass

        def serve(self, begin: Callable[[Any], None], handle: str) -> None:
            from multiprocessing.connection import PipeConnection

            begin(PipeConnection(int(handle)))

        def launch(
            self, argv: Words, cwd: str, env: Environ, out: int, _home: str, stdin: Any
        ) -> Any:
            import subprocess

            *shell, command = argv
            line = subprocess.list2cmdline(argv)
            if re.fullmatch(r"(.*[\\/])?cmd(\.exe)?", shell[0], re.IGNORECASE):  # quotes otherwise
                line = subprocess.list2cmdline(shell) + f' "{command}"'
            flags = 0x200 | 0x4  # in a new group, suspended
            temporary = os.O_TEMPORARY if stdin != os.devnull else 0  # removed when closed by all
            with open(os.open(stdin, os.O_RDONLY | os.O_BINARY | temporary), "rb") as file:
                streams: Any = {"stdin": file, "stdout": out, "stderr": out}
                child: Any = subprocess.Popen(
                    line, cwd=cwd, env={**os.environ, **env}, creationflags=flags, **streams
                )
            process = int(child._handle)
            self.jobs[child.pid] = self.call("CreateJobObjectW", None, env["QUEUECTL_RUN"])
            self.set_limit(child, 0x2000)  # kill on close
            self.call("AssignProcessToJobObject", self.jobs[child.pid], process)
            self.call("NtResumeProcess", process, dll="ntdll")
            return child

        def set_limit(self, child: Any, flags: int) -> None:
            """Set the flags of a JOBOBJECT_EXTENDED_LIMIT_INFORMATION, after two times."""
            import ctypes

            limits = (ctypes.c_uint32 * (36 if ctypes.sizeof(ctypes.c_void_p) == 8 else 28))()
            limits[4] = flags
            size = ctypes.sizeof(limits)
            self.call("SetInformationJobObject", self.jobs[child.pid], 9, limits, size)

        def release(self, child: Any) -> None:
            self.set_limit(child, 0)
            self.call("CloseHandle", self.jobs.pop(child.pid))

        def snapshot(self) -> None:
            """Do nothing: a Job Object knows its processes."""

        def any_alive(self, pids: Iterable[int]) -> bool:  # noqa: ARG002
            """Return False: querying the Job Object is as cheap."""
            return False

        def processes(self, trace: Trace, snapshot: None = None) -> list[int]:  # noqa: ARG002
            """Return up to 1,000 processes: the end of a JOBOBJECT_BASIC_PROCESS_ID_LIST."""
            import ctypes

            found = (ctypes.c_size_t * 1001)()  # two 32-bit counts precede the processes
            query, counts_size = 4, 8
            handle = self.call("OpenJobObjectW", query, 0, trace.token)
            if handle:  # without a handle the query would be about our own job
                size = ctypes.sizeof(found)
                self.call("QueryInformationJobObject", handle, 3, found, size, None)
                self.call("CloseHandle", handle)
            return [pid for pid in found[counts_size // ctypes.sizeof(ctypes.c_void_p) :] if pid]

        def terminate(self, trace: Trace, pids: Iterable[int]) -> None:  # noqa: ARG002
            """Send Ctrl-Break to the process groups that this process has started."""
            for pid in self.jobs.keys() & set(pids):
                with contextlib.suppress(OSError):  # no console
                    os.kill(pid, signal.CTRL_BREAK_EVENT)

        def kill_group(self, trace: Trace) -> None:
            """Do nothing: a Job Object is killed as a whole."""

        def kill(self, trace: Trace, pids: Iterable[int]) -> None:  # noqa: ARG002
            handle = self.call("OpenJobObjectW", 8, 0, trace.token)  # 8: to terminate
            self.call("TerminateJobObject", handle, 1)
            self.call("CloseHandle", handle)

        def enable_escapes(self) -> None:
            """Let the console interpret escape sequences."""
            for output in (-11, -12):
                self.call("SetConsoleMode", self.call("GetStdHandle", output), 7)

    SYSTEM = Windows()

else:

    class Process(NamedTuple):
        """A living process. `session` is the process group where sessions are not shown."""

        parent: int
        session: int
        started: float  # Unix seconds

    def read_proc(path: str) -> bytes:
        """Return a file of /proc; empty where the process is gone or may not be examined."""
        with contextlib.suppress(OSError), open("/proc/" + path, "rb", buffering=0) as file:
            return file.read()
        return b""

    def has_proc() -> bool:
        """Tell whether the pids in /proc are those of this PID namespace."""
        with contextlib.suppress(OSError):
            return os.readlink("/proc/self") == str(os.getpid())
        return False

    def table_from_proc(pids: Iterable[int] = ()) -> dict[int, Process]:
        table = {}
        booted = time.time() - time.clock_gettime(7)  # CLOCK_BOOTTIME
        ticks = os.sysconf("SC_CLK_TCK")
        for pid in pids or map(int, filter(str.isdigit, os.listdir("/proc"))):
            state, *fields = read_proc(f"{pid}/stat").rpartition(b")")[2].split() or [b"Z"]
            if state not in (b"Z", b"X"):
                started = booted + int(fields[18]) / ticks
                table[pid] = Process(int(fields[0]), int(fields[2]), started)
        return table

    def table_from_ps() -> dict[int, Process]:
        import subprocess

        table = {}
        command = ["ps", "-axo", "pid=,ppid=,pgid=,stat=,etime="]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ps:
            lines = ps.communicate()[0].splitlines()
        for pid, parent, group, state, elapsed in map(str.split, lines):
            if "Z" not in state and int(pid) != ps.pid:
                days, _, clock = elapsed.rpartition("-")
                hours, minutes, seconds = map(int, ("0:" + clock).split(":")[-3:])
                age = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
                table[int(pid)] = Process(int(parent), int(group), time.time() - age)
        return table

    def process_table(pids: Iterable[int] = ()) -> dict[int, Process]:
        """Return the living processes by pid, at least those given; none if that is impossible."""
        if has_proc():
            return table_from_proc(pids)
        return table_from_ps() if sys.platform != "linux" else {}

    class Snapshot(NamedTuple):
        """The living processes at one moment."""

        table: Mapping[int, Process]
        tokens: Mapping[int, Sequence[bytes]]  # the values of QUEUECTL_RUN; needs /proc

    def is_alive(pid: int) -> bool:
        """Tell whether a process runs; a zombie counts only where /proc is missing."""
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            pass
        return not has_proc() or bool(table_from_proc([pid]))

    def descendants(table: Mapping[int, Process], roots: set[int], others: set[int]) -> set[int]:
        """Return processes and all that descend from them, except `others` and their own."""
        found = more = roots - others
        while more:
            more = {pid for pid, row in table.items() if row.parent in more} - found - others
            found = found | more
        return found

    def holds_lock(pid: int, path: str) -> bool:
        """Tell whether a process holds the lock of a file; having it open is not enough."""
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                locks = re.search(rb"FLOCK +ADVISORY +WRITE", read_proc(f"{pid}/fdinfo/{fd}"))
                with contextlib.suppress(OSError):
                    if locks and os.path.samefile(f"/proc/{pid}/fd/{fd}", path):
                        return True
        return False

    def open_pidfd(pid: int) -> int | None:
        """Return a descriptor for a process, None if it is gone or the system has none."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):
                return os.pidfd_open(pid)
        return None

    def find_program(name: bytes, environ: Mapping[bytes, bytes]) -> bytes | None:
        """Return the file that a shell would run; None where only the shell can tell."""
        if b"/" in name:
            return name
        for directory in environ.get(b"PATH", b"").split(b":"):
            if not directory.startswith(b"/") or b"%" in directory:  # relative, or special to dash
                return None
            path = directory + b"/" + name
            if os.access(path, os.X_OK):
                return path
        return None

    def working_directory(environ: Mapping[bytes, bytes]) -> bytes:
        """Return PWD as a shell sets it: as given if it names this directory."""
        given = environ.get(b"PWD", b"")
        with contextlib.suppress(OSError):
            if given.startswith(b"/") and os.path.samefile(given, b"."):
                return given
        return os.getcwdb()

    def standard_streams(out: int, stdin: Stdin) -> list[Any]:
        """Return the actions that give a job its streams; `Posix.launch` describes them."""
        if isinstance(stdin, str):
            given = (os.POSIX_SPAWN_OPEN, 0, stdin, os.O_RDONLY, 0)
            return [(os.POSIX_SPAWN_DUP2, out, 1), (os.POSIX_SPAWN_DUP2, out, 2), given]
        return [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(stdin)]

    def spawn_without_shell(
        argv: Sequence[str], environ: Mapping[bytes, bytes], **options: Any
    ) -> int | None:
        """Start the program of a plain command and return its pid; None if that needs a shell.

        Only the time that it takes may tell the difference, so where a program cannot be started,
        or is a script without `#!`, the shell reports that or runs it.
        """
        *shell, command = argv
        words = plain_words(command) if tuple(shell) == DEFAULT_SHELL else None
        if not words or not all(map(is_plain_variable, environ)):
            return None
        name, *args = (word.encode() for word in words)
        if program := find_program(name, environ):
            environ = {**environ, b"PWD": working_directory(environ)}
            with contextlib.suppress(OSError):
                return os.posix_spawn(program, [name, *args], environ, **options)
        return None

    def send_signals(pid: int, pidfd: int | None, numbers: Iterable[int]) -> None:
        """Send signals to a process, which may be gone or another user's."""
        for number in numbers:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if sys.platform == "linux" and pidfd is not None:
                    signal.pidfd_send_signal(pidfd, number)
                else:
                    os.kill(pid, number)

    def c_function(name: str, *args: int, wide: Iterable[int] = ()) -> bool:
        """Call a function of the C library with ints and 64-bit numbers; return its success."""
        with contextlib.suppress(ImportError, AttributeError, OSError):
            import ctypes

            function = getattr(ctypes.CDLL(None), name)
            return bool(function(*args, *map(ctypes.c_int64, wide)) == 0)
        return False

    class Child:
        """A job's own process, like a Popen; `elders` are still running from earlier jobs."""

        returncode: int | None = None  # None while it runs; minus n for signal n

        def __init__(self, pid: int, elders: set[int]) -> None:
            self.pid = pid
            self.elders = elders

        def poll(self) -> int | None:
            """Return the exit code, None while it runs; reap every child that has ended."""
            pid = 1
            with contextlib.suppress(ChildProcessError):
                while pid:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                    if pid == self.pid:
                        signalled = os.WIFSIGNALED(status)
                        code = -os.WTERMSIG(status) if signalled else os.WEXITSTATUS(status)
                        self.returncode = code
            return self.returncode

    class ForkServer:
        """A process that loads the program once and forks the workers of all pools.

        Workers forked from the pool itself would hold each other's pipes and locks open.
        """

        def __init__(self, python: str) -> None:
            from multiprocessing import Pipe

            self.owner = os.getpid()
            self.link, theirs = Pipe()
            command = python_command(python)
            with theirs:
                stdin = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), 0)]
                self.pid = os.posix_spawn(  # signals to stop wait until a worker handles them
                    python, command, os.environ, file_actions=stdin, setsigmask=STOP_SIGNALS
                )

        def fork(self, fd: int) -> int:
            """Start a worker that talks through a descriptor; return its pid, or minus an errno."""
            from multiprocessing.reduction import send_handle

            send_handle(self.link, fd, self.pid)
            if self.link.poll(10.0):  # includes the start of the server
                return int(self.link.recv())
            raise TimeoutError(errno.ETIMEDOUT, "its fork server does not respond")

        def close(self) -> None:
            """End the server; its workers keep running."""
            self.link.close()
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)

    class Posix:
        """Linux, macOS and similar systems."""

        POLL = 0.5  # seconds between polls for changes without a notification; a poll takes 0.3 ms
        PYTHON = sys.executable or os.path.realpath("/proc/self/exe")  # without PATH it is empty
        BACKGROUND: Mapping[str, Any] = {"start_new_session": True}  # outlives the terminal
        inherited: Mapping[bytes, bytes] = {}  # the environment, once it has been read
        server: ForkServer | None = None
        child: Child | None = None  # the latest job of this worker

        def lock(self, fd: int, *, shared: bool = False) -> bool:
            """Lock an open file without waiting; return False where another process has it."""
            import fcntl

            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                return True
            return False

        def is_unlocked(self, path: str) -> bool:
            """Tell whether nobody holds the lock of a file; one that does not exist is unlocked."""
            gone = contextlib.suppress(FileNotFoundError)
            with gone, open(path, "rb", buffering=0, opener=open_own) as file:
                return self.lock(file.fileno(), shared=True)
            return True

        def remove_locked(self, fd: int, path: str) -> None:
            """Remove and close a file that is locked here; the lock outlives the name."""
            with contextlib.suppress(OSError):
                os.unlink(path)
            os.close(fd)

        def punch_hole(self, fd: int, length: int) -> bool:
            """Free the disk space of the beginning of a file; return False if unsupported."""
            return c_function("fallocate64", fd, 1 | 2, wide=(0, length))  # keep size, punch hole

        def make_wakeup(self, fifo: str = "") -> Wakeup | None:
            """Return the means to wake this process: a FIFO of that name, or a pipe of its own."""
            if fifo:
                with contextlib.suppress(OSError):  # a file system without FIFOs: pools poll
                    os.mkfifo(fifo, 0o600)
                    fd = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
                    return Wakeup(fd, fd)
            reader, writer = os.pipe()
            os.set_blocking(reader, False)
            os.set_blocking(writer, False)
            return Wakeup(reader, writer)

        def wait(self, sources: Iterable[Any], child: Any, limit: float | None) -> list[Any]:  # noqa: ARG002
            """Wait up to `limit` seconds; return readable sources. A child's end is a signal."""
            import select

            poll = select.poll()
            found = {source.fileno(): source for source in sources if source is not None}
            for fd in found:
                poll.register(fd, select.POLLIN)
            ready = [found[fd] for fd, _ in poll.poll(limit and limit * 1000)]
            for source in ready:
                if isinstance(source, Wakeup):
                    source.clear()
            return ready

        def start_worker(self, pipe: Any) -> int:
            """Start a worker at the other end of a pipe; return its pid.

            Raises OSError at the machine's limit, EOFError where the server died: try again.
            """
            if not self.server or self.server.owner != os.getpid():
                self.server = ForkServer(self.PYTHON)
            try:
                pid = self.server.fork(pipe.fileno())
            except BaseException:
                self.server.close()
                self.server = None
                raise
            if pid < 0:
                raise OSError(-pid, os.strerror(-pid))
            return pid

        def join(self, process: int, limit: float) -> None:
            with contextlib.suppress(ProcessLookupError):
                for _ in polling(limit):
                    os.kill(process, 0)

        def resume(self, process: int) -> None:
            """Let a worker that SIGSTOP has stopped continue."""
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)

        def serve(self, begin: Callable[[Any], None]) -> None:
            """Run as the fork server, with requests on stdin, until that is closed."""
            from multiprocessing.connection import Connection
            from multiprocessing.reduction import recv_handle

            with contextlib.suppress(ImportError):  # else each worker loads it
                import ctypes  # noqa: F401
            os.chdir("/")  # no directory is kept busy
            while os.open(os.devnull, os.O_RDWR) < 3:  # the standard streams may be closed
                pass
            os.closerange(3, min(os.sysconf("SC_OPEN_MAX"), 65536))  # those of a host program
            link = Connection(os.dup(0))
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no worker becomes a zombie
            with contextlib.suppress(EOFError, OSError):
                while True:
                    try:
                        pid = self.fork(begin, recv_handle(link), link)
                    except OSError as error:
                        pid = -(error.errno or errno.EIO)
                    except RuntimeError:  # a descriptor was sent, but none can be opened
                        pid = -errno.EMFILE
                    link.send(pid)

        def fork(self, begin: Callable[[Any], None], fd: int, link: Any) -> int:
            """Fork a worker; return its pid, only in the parent."""
            import traceback
            from multiprocessing.connection import Connection

            os.set_inheritable(fd, False)  # noqa: FBT003
            with Connection(fd) as pipe:
                pid = os.fork()
                if pid:
                    return pid
                try:
                    link.close()
                    begin(pipe)
                except Exception:  # noqa: BLE001
                    traceback.print_exc()
                    sys.stderr.flush()
                finally:
                    os._exit(0)

        def launch(
            self, argv: Words, cwd: str, env: Environ, out: int, home: str, stdin: Stdin
        ) -> Child:
            """Start a job in a session of its own; raise OSError where it cannot be started.

            `env` is added to the environment of this process, as UTF-8 whatever the locale. `out`
            becomes stdout, stderr, and a descriptor that no redirection closes. `stdin` is the path
            of a file, or has the descriptors of all three streams. `home` is this process's
            directory afterwards: an idle worker must not keep the job's busy. Before Python 3.10,
            Popen copies the whole process, which doubles the cost of a job.
            """
            self.inherited = self.inherited or dict(os.environb)
            added = {k.encode(): v.encode(errors="surrogateescape") for k, v in env.items()}
            elders: set[int] = set()
            with contextlib.suppress(ChildProcessError):  # as a rule, no earlier job left any
                os.waitpid(-1, os.WNOHANG)
                elders = descendants(process_table(), {os.getpid()}, set())
            environ = {**self.inherited, **added}
            ignored = [signal.SIGPIPE, signal.SIGXFSZ]  # by Python
            os.set_inheritable(out, True)  # noqa: FBT003
            os.chdir(cwd)
            streams = standard_streams(out, stdin)
            options: Any = {"file_actions": streams, "setsid": True, "setsigdef": ignored}
            try:
                pid = spawn_without_shell(argv, environ, **options)
                if not pid:
                    command = argv[-1].encode() if isinstance(argv[-1], str) else argv[-1]
                    words = [*map(os.fsencode, argv[:-1]), command]
                    pid = os.posix_spawnp(argv[0], words, environ, **options)
            finally:
                with contextlib.suppress(OSError):
                    os.chdir(home)
            self.child = Child(pid, elders)
            return self.child

        def release(self, child: Child) -> None:
            """Let the background processes of a job that has ended keep running."""

        def snapshot(self, pids: Iterable[int] = ()) -> Snapshot:
            """Examine all processes, or only those given."""
            if self.child:
                self.child.poll()
            table = process_table(pids)
            table.pop(os.getpid(), None)
            shown = table if has_proc() else ()
            token = re.compile(rb"(?<![^\0])QUEUECTL_RUN=([^\0]*)")
            return Snapshot(table, {i: token.findall(read_proc(f"{i}/environ")) for i in shown})

        def processes(self, trace: Trace, snapshot: Snapshot | None = None) -> list[int]:
            """Return the processes of an attempt, parents first as a rule.

            Where there is no table of processes, -n is the process group of our child n.
            """
            table, tokens = snapshot or self.snapshot()
            token = trace.token.encode()
            own = {pid for pid, found in tokens.items() if token in found}
            others = {pid for pid, found in tokens.items() if found} - own
            found = own | self.family(trace, table, others)
            if not found and (not table or not self.is_unlocked(trace.lock_path)):
                found = {pid for pid in tokens if holds_lock(pid, trace.lock_path)}
            if not found and not table and self.child and self.child.pid == trace.leader:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(-trace.leader, 0)
                    found = {-trace.leader}
            return sorted(found)

        def any_alive(self, pids: Iterable[int]) -> bool:
            if self.child:
                self.child.poll()
            return any(map(is_alive, pids))

        def family(self, trace: Trace, table: Mapping[int, Process], others: set[int]) -> set[int]:
            """Return the descendants of an attempt's leader and the members of its session.

            A leader that started at another time is an unrelated process that got its pid later.
            `others` belong to other attempts.
            """
            leader = trace.leader
            found = set()
            if self.child and self.child.pid == leader:  # this worker adopts orphaned descendants
                children = {pid for pid, row in table.items() if row.parent == os.getpid()}
                found = children - self.child.elders
            if leader and (leader not in table or abs(table[leader].started - trace.launched) <= 2):
                session = {pid: row for pid, row in table.items() if row.session == leader}
                found |= {pid for pid in session if session[pid].started > trace.launched - 2}
            return descendants(table, found, others)

        def send(self, trace: Trace, pids: Sequence[int], *numbers: int) -> None:
            """Send signals to those of the given processes that still belong to an attempt.

            Pids are reused, so membership is checked while a pidfd pins each process.
            """
            if not pids:
                return
            with contextlib.ExitStack() as stack:
                fds = {pid: open_pidfd(pid) for pid in pids[:100]}  # descriptors are limited
                for fd in filter(None, fds.values()):
                    stack.callback(os.close, fd)
                found = self.processes(trace, self.snapshot(pids))
                for pid in filter(fds.__contains__, found):  # parents first
                    send_signals(pid, fds[pid], numbers)
            self.send(trace, pids[100:], *numbers)

        def terminate(self, trace: Trace, pids: Sequence[int]) -> None:
            """Ask processes to end; a stopped one is continued, to receive it."""
            self.send(trace, pids, signal.SIGTERM, signal.SIGCONT)

        def kill_group(self, trace: Trace) -> None:
            """Kill the process group of a job of this process, unless its own process has ended.

            Until that has been reaped here, no other process can have its pid.
            """
            if self.child and self.child.pid == trace.leader and self.child.poll() is None:
                with contextlib.suppress(PermissionError):  # all of it is another user's
                    os.killpg(trace.leader, signal.SIGKILL)

        def kill(self, trace: Trace, pids: Sequence[int]) -> None:
            self.send(trace, pids, signal.SIGKILL)

    SYSTEM = Posix()


def kill_session(process: Any) -> None:
    """Kill a Popen that began a session, with all that it started."""
    with contextlib.suppress(OSError):
        if sys.platform != "win32":
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@lru_cache(maxsize=None)
def pid_namespace() -> str:
    """Return the name of this process's PID namespace, empty if there is none."""
    with contextlib.suppress(OSError, AttributeError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def ignore_signal(_number: int, _frame: object) -> None:
    """Do nothing. Unlike SIG_IGN, a handler is not inherited by the jobs."""


def handle_signals(
    handler: Callable[[int, Any], None], wakeup: Wakeup | None, *, worker: bool = False
) -> contextlib.ExitStack:
    """Handle the signals that ask to stop; every signal also wakes this process.

    SIGHUP stays ignored under nohup. SIGUSR1 writes all stacks to stderr. A worker also wakes when
    a child ends, and adopts the descendants of its jobs. Closing the result restores everything.
    """
    import faulthandler

    undo = contextlib.ExitStack()
    for number in STOP_SIGNALS:
        if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
            undo.callback(signal.signal, number, signal.signal(number, handler))
    if wakeup:
        before = signal.set_wakeup_fd(wakeup.writer, warn_on_full_buffer=False)
        undo.callback(signal.set_wakeup_fd, before)
    if sys.platform != "win32":
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
        undo.callback(faulthandler.unregister, signal.SIGUSR1)
        if worker:
            signal.signal(signal.SIGQUIT, signal.SIG_DFL)
            signal.signal(signal.SIGCHLD, ignore_signal)
            c_function("prctl", 36, 1)  # PR_SET_CHILD_SUBREAPER, on Linux
        mask = signal.pthread_sigmask(signal.SIG_SETMASK, [])
        undo.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
    return undo


@contextlib.contextmanager
def interrupts_raised() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt within the block, and end the process outside it."""
    ends = signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # not under nohup, for instance
    if ends:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ends:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_by_signal(number: int) -> None:
    if sys.platform != "win32":
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def is_foreground(fd: int) -> bool:
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # not our terminal
            return os.tcgetpgrp(fd) == os.getpgrp()
    return True


# --- run directory: living processes, as locked files ---------------------------------------------

PATIENCE = 30.0  # seconds that a command waits for a lock of another program


class LockFile:
    """A file of the run directory that this process has made and locked."""

    FLAGS = os.O_RDWR | os.O_CREAT
    length = 0  # of the note

    def __init__(self, path: str) -> None:
        """Make and lock it, again if it was removed meanwhile; raise Locked after PATIENCE."""
        self.path = path
        for _ in polling(PATIENCE, longest=0.02):
            self.fd = open_own(path, self.FLAGS)
            if SYSTEM.lock(self.fd) and os.fstat(self.fd).st_nlink:
                return
            os.close(self.fd)
        raise Locked(f"{path} has been locked by another process for {format_duration(PATIENCE)}")

    def write_note(self, **facts: object) -> None:
        """Replace the text of the file, which tells others about its holder.

        Blanks cover the rest of a longer one: to truncate the file each time costs far more.
        """
        note = json.dumps(facts).ljust(self.length)
        self.length = len(note)
        os.lseek(self.fd, 0, os.SEEK_SET)
        with contextlib.suppress(OSError):  # a full disk: only the lock matters
            os.write(self.fd, note.encode())

    def close(self) -> None:
        SYSTEM.remove_locked(self.fd, self.path)


def new_pool_name() -> str:
    return "pool-" + os.urandom(4).hex()


def worker_name(pool: str, number: int) -> str:
    return f"worker-{pool.split('-')[1]}-{number}"


def pool_of(worker: str) -> str:
    return f"pool-{worker.split('-')[1]}"


def last_bytes(fd: int, limit: int) -> tuple[int, bytes]:
    """Return how many bytes of a file precede its last ones, and at most `limit` last bytes."""
    size = os.fstat(fd).st_size
    if not size:
        return 0, b""
    kept = min(limit, size)
    os.lseek(fd, size - kept, os.SEEK_SET)
    return size - kept, os.read(fd, kept)


class RunDirectory:
    """The directory beside the database: locks, output of attempts, FIFOs and stop requests."""

    def __init__(self, db: str) -> None:
        self.db = db
        self.path = db + ".run"
        self.inode = 0

    def make(self) -> None:
        """Make the directory for the owner alone, whatever the umask."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.path, 0o700)
            os.chmod(self.path, 0o700)

    def run_token(self, job: Job) -> str:
        """Return the value of QUEUECTL_RUN in every process of a job's current attempt.

        The inode tells the queue from its copies, and stays when it is moved.
        """
        self.inode = self.inode or os.stat(self.db).st_ino
        return f"{job.key}.{self.inode}"

    def trace(self, job: Job) -> Trace:
        note = self.read_note(job.locked_by)
        is_known = note.get("key") == job.key and note.get("namespace") == pid_namespace()
        leader, launched = (note["leader"], note["launched"]) if is_known else (0, 0.0)
        return Trace(self.run_token(job), self.output_file(job), leader, launched)

    def file(self, *parts: object) -> str:
        """Return the path of a file in the directory; dots join the parts of its name."""
        return os.path.join(self.path, ".".join(str(part) for part in parts))

    def output_file(self, job: Job) -> str:
        """Return the path of the output of a job's current attempt; a kept result renames it."""
        names = self.attempt_files(job)
        return self.file(names[0] if names else f"{job.seq}.{job.run}.out")

    def files(self, start: str = "", end: str = "") -> list[str]:
        """Return the sorted names with this start and end; none if there is no directory."""
        with contextlib.suppress(FileNotFoundError):
            found = os.listdir(self.path)
            return sorted(item for item in found if item.startswith(start) and item.endswith(end))
        return []

    def attempt_files(self, job: Job) -> list[str]:
        return self.files(f"{job.seq}.{job.run}.")

    def is_unlocked(self, *parts: object) -> bool:
        return SYSTEM.is_unlocked(self.file(*parts))

    def read_note(self, *parts: object) -> dict[str, Any]:
        """Return the facts that the holder of a file wrote; none where they cannot be read."""
        unreadable = contextlib.suppress(OSError, ValueError, TypeError)
        with unreadable, open(self.file(*parts), "rb", opener=open_own) as file:
            return dict(json.load(file))
        return {}

    def alive(self, kind: str) -> dict[str, dict[str, Any]]:
        """Return the living pools ("pool") or workers ("worker"): name and note of each."""
        locks = (item for item in self.files(kind + "-") if "." not in item)
        return {item: self.read_note(item) for item in locks if not self.is_unlocked(item)}

    def notify(self) -> None:
        """Wake every pool: there may be work. Never waits; it is fine if no pool listens."""
        with contextlib.suppress(OSError):  # the work is stored; a pool finds it at its next poll
            for fifo in self.files("pool-", ".fifo"):
                with contextlib.suppress(OSError):  # ENXIO: its pool is gone
                    fd = open_own(self.file(fifo), os.O_WRONLY)
                    with open(fd, "wb", buffering=0) as pipe:
                        pipe.write(b"!")

    def request_stop(self, pool: str, mode: StopMode) -> None:
        """Ask a pool to stop, by an empty file: it can be made on a full disk."""
        os.close(open_own(self.file(pool, mode), os.O_WRONLY | os.O_CREAT))

    def stop_requested(self, pool: str) -> StopMode:
        """Return how a pool was asked to stop, "" if it was not."""
        if os.path.exists(self.file(pool, "now")):
            return "now"
        return "stop" if os.path.exists(self.file(pool, "stop")) else ""

    def clean(self, claimed: Sequence[Job]) -> None:
        """Remove the files of dead processes, except those about jobs that are to be recovered."""
        keep = {job.locked_by for job in claimed} | {f"{job.seq}.{job.run}" for job in claimed}
        for item in self.files():
            owner = re.match(r"\d+\.\d+(?=\.)|(pool|worker)-[^.]+", item)
            if owner and owner[0] not in keep:
                lock = owner[0] if owner[1] else item  # an output file is its own lock
                with contextlib.suppress(OSError):
                    if self.is_unlocked(lock):
                        self.remove(item, is_lock=item == lock)

    def remove(self, item: str, *, is_lock: bool) -> None:
        """Remove a file; a lock only if nobody has taken it meanwhile."""
        if not is_lock:
            os.unlink(self.file(item))
        elif SYSTEM.lock(fd := open_own(self.file(item), os.O_RDWR)):
            SYSTEM.remove_locked(fd, self.file(item))
        else:
            os.close(fd)


# --- database: connections, transactions, errors, creating the file -------------------------------

LOCK = ((5, 6, 15), "locked|locking protocol")  # SQLITE_BUSY, SQLITE_LOCKED, SQLITE_PROTOCOL
NO_FILE = ((14,), "unable to open")  # SQLITE_CANTOPEN
DAMAGE = ((11, 26), "malformed|not a database|decode")  # SQLITE_CORRUPT, SQLITE_NOTADB; not UTF-8


def is_about(error: sqlite3.Error, codes: Sequence[int], text: str) -> bool:
    """Tell whether an error has one of these codes or, before Python 3.11, this text."""
    code = getattr(error, "sqlite_errorcode", None)
    return bool(re.search(text, str(error)) if code is None else code & 0xFF in codes)


def schema_version(db: sqlite3.Connection) -> tuple[int, bool]:
    """Return the version of the queue's tables, 0 for none, and whether the file is a host's."""
    if db.execute(GET_APPLICATION_ID).fetchone()[0] == APPLICATION_ID:
        return int(db.execute(GET_VERSION).fetchone()[0]), False
    row = None
    try:
        row = db.execute(for_guest(GET_GUEST_VERSION)).fetchone()
    except sqlite3.OperationalError as error:
        if "no such" not in str(error):  # table, or column of another program's table
            raise
    return int(row[0]) if row else 0, True


def create_tables(db: sqlite3.Connection, *, guest: bool) -> None:
    """Make the tables, and record the version of the schema in the same transaction.

    A guest keeps it among its settings: the numbers that SQLite keeps in a file are the host's.
    """
    if db.in_transaction:  # a reader refused the COMMIT of the last try
        db.execute(ROLLBACK)
    db.execute(BEGIN)
    if not schema_version(db)[0]:  # else another process was faster
        for statement in re.split("(?m)^(?=CREATE )", SCHEMA)[1:]:
            db.execute(for_guest(statement) if guest else statement)
        if guest:
            version = {"queue": "", "key": GUEST_KEY, "value": str(SCHEMA_VERSION)}
            db.execute(for_guest(SET), version)
        else:
            db.execute(SET_APPLICATION_ID)
            db.execute(SET_VERSION)
    db.execute(COMMIT)


IMMUTABLE = "ro&immutable=1"  # the mode that needs no -wal and ignores locks


class Connection(sqlite3.Connection):
    """A connection that knows its file, and whether it must not be used any more."""

    path = ""
    info: os.stat_result  # of the file when it was opened
    unusable = False  # closed, or inherited through a fork
    in_block = False  # of Database.transaction
    notify = False  # wake the pools when the transaction has been stored

    def close(self) -> None:
        """Close it; only its own thread may."""
        super().close()
        self.unusable = True


class ThreadEnd:
    """Closes the connection of a thread when the thread ends, which destroys its local values."""

    def __init__(self, db: Connection) -> None:
        self.db = db

    def __del__(self) -> None:
        with contextlib.suppress(sqlite3.ProgrammingError):  # it is of another thread
            if not self.db.unusable:
                self.db.close()


# Forks. SQLite remembers in memory which locks its process holds. A child of a fork inherits that
# memory but not the locks, so a connection must not be used on both sides. Idle connections of the
# forking thread are closed before the fork; parent and child each open new ones. A database that
# was in use, in a transaction or by another thread, is refused in the child, which should leave by
# os._exit, as multiprocessing's children do. A half-read cursor counts as idle: read it to its end.

CONNECTIONS: weakref.WeakValueDictionary[int, Connection] = weakref.WeakValueDictionary()
IN_USE: dict[int, list[Connection]] = {}  # during a fork, by thread: they must not be closed
INHERITED: list[Connection] = []  # in a child: those that were in use; closing one writes


def open_connections() -> list[Connection]:
    """Return the usable connections of this process; threads may open others meanwhile."""
    found = [reference() for reference in CONNECTIONS.valuerefs()]
    return [db for db in found if db and not db.unusable]


def before_fork() -> None:
    """Close this thread's connections that are in no transaction."""
    for db in open_connections():
        with contextlib.suppress(sqlite3.ProgrammingError):  # it belongs to another thread
            if not db.in_transaction:
                db.close()
    IN_USE[threading.get_ident()] = open_connections()


def after_fork_in_child() -> None:
    """Refuse the databases that were in use, and keep their connections from being closed."""
    for db in IN_USE.pop(threading.get_ident(), ()):
        INHERITED.append(db)
        db.unusable = True


@lru_cache(maxsize=None)
def prepare_for_forks() -> None:
    if register := getattr(os, "register_at_fork", None):
        register(
            before=before_fork,
            after_in_parent=lambda: IN_USE.pop(threading.get_ident(), None),
            after_in_child=after_fork_in_child,
        )


def system_fault(error: OSError, path: str) -> Fault:
    """Return our error for an OSError, about the given path if it names none."""
    return Fault(f"{quoted(str(error.filename or path), 4096)}: {error.strerror}")


def require_in_place(path: str, info: os.stat_result) -> None:
    """Raise Damaged where a file was moved away or replaced since it had this stat result."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.stat(path), info):
            return
    raise Damaged(f"{path} was moved away or replaced")


class Database:
    """The SQLite file: the only access to it, and the only place that interprets its errors.

    Each thread of each process has its own connection. `keep_waiting` is called with the seconds
    waited for a lock, and decides whether to wait longer.
    """

    def __init__(
        self, path: str, *, create: bool = False, readonly: bool = False, guest: bool = False
    ) -> None:
        """Check that the file is a queue, or create it; else raise Fault and change nothing.

        With `guest`, create its tables in another program's database.
        """
        self.path = os.path.realpath(path)  # one database has one run directory
        self.mode = "ro" if readonly else "rw"
        self.run_dir = RunDirectory(self.path)
        self.synchronous = "full"
        self.keep_waiting: Callable[[float], bool] = lambda waited: waited < PATIENCE
        self._thread = threading.local()  # has the connection
        self._in_host = False  # the tables have a prefix
        with self.translate_errors():
            if os.path.lexists(path) and not os.path.exists(path):
                raise Fault(f"{path} is a symbolic link to a file that does not exist")
            new = self.run_dir.file("new.db")
            if create and (not os.path.lexists(path) or os.path.lexists(new)):
                self._create(new, guest=guest)
            if not self._inspect(guest=guest and create):
                with contextlib.closing(self._open("rw")) as db:
                    self._retry(lambda: create_tables(db, guest=guest))
                    self._retry(lambda: db.execute(SET_WAL))  # last: a refused file is unchanged

    def _create(self, new: str, *, guest: bool) -> None:
        """Make the complete file under another name, so that no other process sees half of it."""
        where = os.path.dirname(self.path)
        if not os.path.isdir(where):
            raise Fault(f"there is no directory {where}; create it first")
        self.run_dir.make()
        with contextlib.closing(LockFile(self.run_dir.file("making"))):
            for leftover in self.run_dir.files("new.db"):
                os.unlink(self.run_dir.file(leftover))
            if os.path.lexists(self.path):
                return
            for suffix in ("-wal", "-journal"):  # SQLite would replay them into the new file
                if os.path.lexists(self.path + suffix):
                    raise Fault(f"{self.path} is gone, but its {suffix} file exists; move it away")
            os.close(open_own(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            os.chmod(new, 0o600)  # whatever the umask
            with contextlib.closing(sqlite3.connect(new, isolation_level=None)) as db:
                create_tables(db, guest=guest)
                db.execute(SET_WAL)  # last: with a -wal, a full disk would be noticed later
            self._publish(new)

    def _publish(self, new: str) -> None:
        """Give the complete file its name, unless another program made one meanwhile."""
        try:
            os.link(new, self.path)
        except OSError:  # there is one, or the file system has no links
            if not os.path.lexists(self.path):
                os.rename(new, self.path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        with contextlib.suppress(OSError):  # Windows does not open directories
            fd = os.open(os.path.dirname(self.path), os.O_RDONLY)
            os.fsync(fd)  # the new name
            os.close(fd)

    def _inspect(self, *, guest: bool) -> int:
        """Return the version of the schema, 0 for none, without writing a byte to the file."""
        try:
            info = os.stat(self.path)
        except FileNotFoundError:
            raise NotFound(
                f"there is no queue at {self.path}; to begin: queuectl enqueue 'make all'"
            ) from None
        except ValueError as error:  # too long for Windows
            raise Fault(f"{quoted(self.path)}: {error}") from None
        if not stat.S_ISREG(info.st_mode):
            raise Fault(f"{self.path} is not a regular file")
        if info.st_size == 0 and not guest:
            raise Fault(f"{self.path} is empty, not a queue; remove it to start a new one")
        version, self._in_host = self._read_version()
        if not version and not guest:
            raise Fault(
                f"{self.path} is another program's database, not a queue; Queue(path, guest=True) "
                "puts one into it"
            )
        if version and guest and not self._in_host:
            raise BadInput(f"{self.path} is a queue of its own; open it without guest")
        if version > SCHEMA_VERSION:
            newer = f"schema {version}, this one has {SCHEMA_VERSION}"
            raise Fault(f"{self.path} was made by a newer queuectl ({newer}); update queuectl")
        return version

    def _read_version(self) -> tuple[int, bool]:
        """Return the result of `schema_version`, without creating a -wal.

        Reads again if another process was opening or closing the file meanwhile.
        """
        for _ in polling(PATIENCE):
            before = self._snapshot()
            has_wal = before[0]
            try:
                with contextlib.closing(self._open("ro" if has_wal else IMMUTABLE)) as db:
                    found: tuple[int, bool] = self._retry(partial(schema_version, db))
                if has_wal or self._snapshot() == before:
                    return found
            except sqlite3.DatabaseError:
                if self._snapshot() == before:
                    raise
        raise Locked(f"{self.path} has been in use for {format_duration(PATIENCE)}")

    def _snapshot(self) -> tuple[Any, ...]:
        """Return facts that change when another process opens, writes or closes the file."""
        info = os.stat(self.path)
        return os.path.exists(self.path + "-wal"), info.st_ino, info.st_size, info.st_mtime_ns

    def _open(self, mode: str) -> Connection:
        path = re.sub("[%?#]", lambda m: f"%{ord(m[0]):02x}", self.path.replace(os.sep, "/"))
        uri = f"file:{path if path.startswith('/') else '/' + path}?mode={mode}"
        if self.path in (db.path for db in INHERITED):
            raise Fault(
                f"{self.path} was in use, in a transaction or by a thread, before the fork; "
                "use it only in the parent, or fork while it is idle"
            )
        prepare_for_forks()
        info = os.stat(self.path)
        db = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None, factory=Connection)
        db.path = self.path
        db.info = info
        CONNECTIONS[id(db)] = db
        return db

    def _is_on_read_only_medium(self) -> bool:
        """Tell whether neither a reader nor anybody else can make the -wal that it needs."""
        writable = os.access(os.path.dirname(self.path), os.W_OK)
        return not (writable or os.path.exists(self.path + "-wal"))

    @property
    def connection(self) -> Connection:
        db: Connection | None = getattr(self._thread, "connection", None)
        if db is None or db.unusable:
            with self.translate_errors():
                is_immutable = self.mode == "ro" and self._is_on_read_only_medium()
                db = self._open(IMMUTABLE if is_immutable else self.mode)
                self._thread.connection = db
                self._thread.end = ThreadEnd(db)
                try:
                    for pragma in (*CONNECTION_PRAGMAS, SET_SYNCHRONOUS[self.synchronous]):
                        self._retry(partial(db.execute, pragma))
                except BaseException:
                    db.close()
                    raise
        return db

    def fault(self, error: sqlite3.Error) -> Fault:
        if is_about(error, *DAMAGE):
            return Damaged(f"{self.path} is damaged, or not a queue: {error}")
        if is_about(error, *NO_FILE) and not os.access(os.path.dirname(self.path), os.W_OK):
            return Fault(f"{self.path}: its directory cannot be written to: {error}")
        return Fault(f"{self.path}: {error}")

    @contextlib.contextmanager
    def translate_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self.fault(error) from error
        except OSError as error:
            raise system_fault(error, self.path) from error

    def _retry(self, act: Callable[[], Any]) -> Any:
        """Repeat an action while another connection has the lock, as long as `keep_waiting` says.

        SQLite could wait by itself, but signal handlers would not run during its wait.
        """
        for waited in polling(longest=0.004):
            try:
                return act()
            except sqlite3.OperationalError as error:
                if not is_about(error, *LOCK):
                    raise
                if not self.keep_waiting(waited):
                    locked = f"has been locked by another program for {format_duration(waited)}"
                    raise Locked(f"{self.path} {locked}") from error
        raise AssertionError("polling without a limit does not end")

    def execute(self, sql: str, args: Any = (), *, many: bool = False) -> sqlite3.Cursor:
        """Execute one statement, for `many` arguments; within a transaction it never waits."""
        db = self.connection
        if self._in_host:
            sql = for_guest(sql)
        try:
            if db.in_transaction:
                return db.executemany(sql, args) if many else db.execute(sql, args)
            return self._retry(lambda: db.execute(sql, args))  # type: ignore[no-any-return]
        except sqlite3.Error as error:
            raise self.fault(error) from error
        except UnicodeEncodeError as error:  # an id or a directory that is not UTF-8
            raise BadInput(f"{error.object!a} is not valid Unicode") from None

    def table(self, name: str) -> str:
        return GUEST_PREFIX + name if self._in_host else name

    def rows(self, sql: str, args: Any = ()) -> list[Any]:
        """Return all rows of a query: reading them slowly would keep the -wal from being reset."""
        try:
            return self.execute(sql, args).fetchall()
        except sqlite3.Error as error:  # damage is noticed while reading
            raise self.fault(error) from error

    @contextlib.contextmanager
    def transaction(self, *, notify: bool = False) -> Iterator[sqlite3.Connection]:
        """Write everything within the block or, on any exception, nothing. Nothing else begins one.

        Within another one it is a part, which may fail alone. `notify` wakes the pools when all of
        it is stored.
        """
        db = self.connection
        is_part = db.in_block
        if is_part and not db.in_transaction:
            raise Fault(f"{self.path}: a statement ended the transaction; leave that to the block")
        begin, end, *undo = PART if is_part else WHOLE
        try:
            self.execute(begin)
            db.in_block = True
            db.notify = db.notify or notify
            yield db
            self.execute(end)
            notify = db.notify and not is_part
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # SQLite has undone it already
                for sql in undo if not db.unusable and db.in_transaction else ():
                    db.execute(sql)
            raise
        finally:
            if not is_part:
                db.in_block = False
                db.notify = False
        if notify:
            self.run_dir.notify()

    def wal_times(self) -> tuple[int, int] | None:
        """Return facts about the -wal that a write changes, cheaper than the data_version."""
        with contextlib.suppress(FileNotFoundError):
            info = os.stat(self.path + "-wal")
            return None if WINDOWS else (info.st_mtime_ns, info.st_size)
        return None

    def set_synchronous(self, synchronous: str) -> None:
        """Choose whether each commit is synced ("full"), or the caller syncs ("normal")."""
        if synchronous != self.synchronous:
            self.synchronous = synchronous
            self.execute(SET_SYNCHRONOUS[synchronous])

    @contextlib.contextmanager
    def synced_later(self) -> Iterator[None]:
        """Sync the writes of the block after it, when other programs can take the lock again.

        The connections of other threads are synced as before.
        """
        if self.synchronous == "normal" or self.connection.in_block:
            yield
            return
        self.execute(SET_SYNCHRONOUS["normal"])
        try:
            yield
        finally:
            self.execute(SET_SYNCHRONOUS["full"])
        no_wal = contextlib.suppress(FileNotFoundError)  # the host has left WAL mode
        with self.translate_errors(), no_wal:
            sync_file(self.path + "-wal")

    def truncate_wal(self) -> None:
        """Empty the -wal unless readers need it for more than 0.2 s; writers wait meanwhile."""
        self.execute(SET_WAIT)
        try:
            self.rows(TRUNCATE_WAL)
        finally:
            self.execute(SET_NO_WAIT)

    def close(self) -> None:
        db = getattr(self._thread, "connection", None)
        if db and not db.unusable:
            db.close()


# --- trust: whether other users can put commands into the queue -----------------------------------


def is_shared_group(gid: int) -> bool:
    """Tell whether a group is more than the private group of the user of this process."""
    if sys.platform == "win32":
        return False
    import grp
    import pwd

    with contextlib.suppress(KeyError):
        user = pwd.getpwuid(user_id() or 0).pw_name
        group = grp.getgrgid(gid)
        return {group.gr_name, *group.gr_mem} != {user}
    return True


def others_may_write(info: os.stat_result) -> bool:
    by_group = info.st_mode & stat.S_IWGRP and is_shared_group(info.st_gid)
    return bool(info.st_mode & stat.S_IWOTH or by_group)


def steps_to(path: str) -> Iterator[str]:
    """Yield every directory and link that decides where a path leads, and the path itself."""
    left = [path]
    while left:
        path = left.pop()
        yield path
        parent = os.path.dirname(path)  # of one that ends with a slash, itself without that
        if parent != path:
            left.append(parent)
        if os.path.islink(path):
            left.append(os.path.join(parent, os.readlink(path)))


def insecure_step(path: str, *, is_last: bool = False) -> str | None:
    """Return why others could redirect a directory or link that leads to a queue, or None.

    It may belong to root or, in a container, to the owner of /. It may be sticky, since others
    cannot rename its entries; the last one may not, since others could add files for SQLite.
    """
    try:
        info = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):  # reported when it is opened
        return None
    if info.st_uid not in (0, os.stat("/").st_uid, user_id()):
        return f"{path} belongs to another user ({info.st_uid})"
    is_fixed = stat.S_ISLNK(info.st_mode) or (info.st_mode & stat.S_ISVTX and not is_last)
    return None if is_fixed or not others_may_write(info) else f"other users may write to {path}"


def has_other_name(path: str, twin: str) -> bool:
    """Tell whether a file has a name other than these two."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.samefile(path, twin):
            return os.lstat(path).st_nlink > 2
    return os.lstat(path).st_nlink > 1  # the twin may have been removed meanwhile


KINDS = {"regular file": stat.S_ISREG, "FIFO": stat.S_ISFIFO, "directory": stat.S_ISDIR}


def insecure_file(path: str, kind: str = "regular file", twin: str = "") -> str | None:
    """Return why a file may be another user's work; None if it is ours or does not exist."""
    with contextlib.suppress(FileNotFoundError):
        info = os.lstat(path)
        if not KINDS[kind](info.st_mode):
            return f"{path} is not a {kind}"
        if info.st_uid != user_id():
            return f"{path} belongs to another user ({info.st_uid})"
        if others_may_write(info):
            return f"other users may write to {path}"
        if kind == "directory" and info.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            return f"other users may enter {path}"
        if kind != "directory" and info.st_nlink > 1 and has_other_name(path, twin):
            return f"{path} has another name (a hard link)"
    return None


def ownership_problems(path: str) -> Iterator[str | None]:
    """Yield reasons why other users could put commands into a queue; None is not a reason.

    Checked before SQLite opens anything, since it replays any journal beside a database. As in
    OpenSSH, only modes and owners count; access control lists are not read.
    """
    real = os.path.realpath(path)
    run_dir = RunDirectory(real)
    begin = "" if os.path.isabs(path) else os.getcwd()
    yield from map(insecure_step, steps_to(os.path.join(begin, path)))
    yield insecure_step(os.path.dirname(real), is_last=True)
    yield insecure_file(real, twin=run_dir.file("new.db"))
    for suffix in ("-journal", "-wal", "-shm"):
        yield insecure_file(real + suffix)
    yield insecure_file(run_dir.path, "directory")
    for item in run_dir.files():
        kind = "FIFO" if item.endswith(".fifo") else "regular file"
        yield insecure_file(run_dir.file(item), kind, twin=real)


def require_trust(path: str) -> None:
    """Raise Fault where other users could have put commands into a queue."""
    if user_id() is None:
        return
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)  # links that lead nowhere end here
        problem = next(filter(None, ownership_problems(path)), None)
    except OSError as error:
        raise system_fault(error, path) from error
    if problem:
        remedy = '(mkdir -m 700 q && cd q, or cd "$(mktemp -d)"), or --insecure if you trust them'
        own = "so others could run commands as you; use a directory of your own"
        raise Fault(f"{problem}, {own} {remedy}")


def network_file_system(path: str) -> str | None:
    """Return the type of the network file system that a path is on, where that can be found out."""
    best = ("", "")
    with contextlib.suppress(OSError), open("/proc/self/mounts", "rb") as mounts:
        for line in mounts:
            point, kind = os.fsdecode(line).split(" ")[1:3]
            mounted = os.path.join(point.replace("\\040", " "), "")
            if os.path.join(path, "").startswith(mounted):
                best = max((mounted, kind), best, key=lambda found: len(found[0]))  # the later one
    return best[1] if re.match("nfs|cifs|smb|afs|9p|fuse.sshfs", best[1]) else None


# --- queue: reading jobs, changing their state, and the public interface --------------------------


class Totals(NamedTuple):
    """The attempts of a queue with one outcome, ever: seconds, and when the last one ended."""

    queue: str
    outcome: str
    number: int
    running: float
    waiting: float
    last: float


KNOWN_SETTINGS = 1000  # of queues, that a process keeps in memory
SHARE = 4  # an index finds the jobs in some states if they are fewer than all jobs divided by this


class Reader:
    """The queries of workers, pools and reports about jobs. Nothing here writes."""

    def __init__(self, db: Database, clock: Callable[[], float]) -> None:
        self.db = db
        self.clock = clock
        self.known_settings: dict[tuple[str | None, str], Settings] = {}

    def select(self, sql: str, **args: object) -> list[Job]:
        return [Job(*row) for row in self.db.rows(sql, args)]

    def first(self, sql: str, **args: object) -> Job | None:
        return next(iter(self.select(sql, **args)), None)

    def column(self, sql: str, **args: object) -> list[Any]:
        return [row[0] for row in self.db.rows(sql, args)]

    def number(self, sql: str, **args: object) -> int:
        return int(self.column(sql, **args)[0])

    def get(self, job_id: str, batch: str | None = None) -> Job:
        """Return a job by its id, or the active or else newest job of a schedule; or NotFound.

        A `batch` also sees its own staged jobs.
        """
        for sql in (BY_ID, ACTIVE_OF_SCHEDULE, NEWEST_OF_SCHEDULE):
            if job := self.first(sql, id=job_id, batch=batch):
                return job
        hint = id_hint(job_id)
        error = NotFound(f"there is no job {quoted(job_id)} in {self.db.path}{hint}")
        error.hint = None if hint else partial(did_you_mean, job_id, self.column(RECENT_IDS))
        raise error

    def by_seq(self, seq: int) -> Job | None:
        return self.first(BY_SEQ, seq=seq)

    def named(self, ids: Iterable[str], batch: str | None = None) -> list[Job]:
        jobs = (self.get(job_id, batch) for job_id in as_list(ids))
        return list({job.seq: job for job in jobs}.values())

    def last_job(self) -> Job:
        """Return the job that was added last; notifications do not count."""
        if job := self.first(LAST_JOB):
            return job
        raise NotFound(f"there are no jobs in {self.db.path}")

    def ids_like(self, prefix: str, states: Sequence[str], limit: int) -> list[str]:
        """Return ids that begin with a prefix, of jobs in these states, the latest first."""
        asked = {"prefix": prefix, "limit": limit}
        kinds = [{"state": s, "readiness": r, **asked} for s, r in COUNTED if s in states]
        ids = (self.column(sql, **kind) for sql in (LATEST_IDS, IDS_FROM) for kind in kinds)
        return list(dict.fromkeys(chain.from_iterable(ids)))[:limit]

    def is_taken(self, job_id: str) -> bool:
        return bool(self.db.rows(IS_TAKEN, {"id": job_id}))

    def all(self) -> Iterator[Job]:
        """Yield every job by arrival, in slices: a slow reader must not hold up the -wal."""
        seq = 0
        while jobs := self.select(ALL_JOBS, seq=seq):
            yield from jobs
            seq = jobs[-1].seq

    def seqs_in_state(
        self, state: State, readiness: int, since: float = -NEVER, *, queue: str | None = None
    ) -> Iterator[int]:
        """Yield the numbers of jobs in the order of their last change, from a time on."""
        rows = [(since, 0)]
        while rows:
            updated_at, seq = rows[-1]
            asked = {"state": state, "readiness": readiness, "updated_at": updated_at, "seq": seq}
            rows = self.db.rows(SEQS_IN_STATE, {**asked, "queue": queue})
            yield from (seq for _, seq in rows)

    def by_seqs(self, seqs: Sequence[int]) -> Iterator[Job]:
        """Yield the jobs with these numbers by arrival, in slices."""
        for first in range(0, len(seqs), SLICE):
            numbers = seqs[first : first + SLICE]
            padded = [*numbers, *[0] * (SLICE - len(numbers))]
            yield from starmap(Job, self.db.rows(BY_SEQS, padded))

    def selected(self, chosen: Selection) -> Iterator[Job]:
        """Yield the jobs of a selection: the named ones in that order, or others by arrival.

        Jobs are read in slices. Where few jobs are in the states in question, an index finds them.
        """
        if chosen.ids:
            yield from self.named(chosen.ids)
            return
        now = self.clock()
        counts = self.counts_by_queue(delivered=True)
        kinds = set(self.kinds(chosen))
        only = chosen.queues[0] if len(chosen.queues) == 1 else None
        number = sum(row[3] for row in counts if row[1:3] in kinds and only in (None, row[0]))
        if number > sum(row[3] for row in counts) / SHARE:
            jobs = self.all()
        else:
            # In the order of a job's life: one that moves on is found twice rather than never.
            seqs = (self.seqs_in_state(*kind, queue=only) for kind in self.kinds(chosen))
            jobs = self.by_seqs(sorted(set(chain.from_iterable(seqs))))
        yield from (job for job in jobs if chosen.takes(job, now))

    def kinds(self, chosen: Selection) -> Iterator[tuple[State, int]]:
        """Yield the states, with readiness, that selected jobs may have when each is reached."""
        for kind in filter(lambda kind: chosen.takes_state(*kind), COUNTED):
            rows = self.counts_by_queue(chosen.queues, delivered=True)
            if any(row[1:3] == kind for row in rows):
                yield kind

    def latest_selected(self, chosen: Selection, limit: int) -> tuple[list[Job], int]:
        """Return the jobs of a selection that changed last, by arrival, and how many there are."""
        if chosen.ids or chosen.match or chosen.older_than:
            seqs = sorted((job.updated_at, job.seq) for job in self.selected(chosen))
            return list(self.by_seqs(sorted(seq for _, seq in seqs[-limit:]))), len(seqs)
        counts = self.counts_by_queue(chosen.queues, delivered=chosen.notifications)
        counts = [row for row in counts if chosen.takes_state(*row[1:3])]
        found: dict[int, Job] = {}  # by number: a job may change between two statements
        kinds = dict.fromkeys((row[0] if chosen.queues else None, *row[1:3]) for row in counts)
        total = sum(row[3] for row in counts)
        for queue, state, readiness in kinds:
            asked = {"state": state, "readiness": readiness, "queue": queue}
            jobs = self.select(LATEST, **asked, limit=limit, notifications=chosen.notifications)
            found.update((job.seq, job) for job in jobs)
        latest = sorted(found.values(), key=lambda job: job.updated_at)[-limit:]
        return sorted(latest), total

    def attempts(self, job: Job, sql: str = ATTEMPTS) -> Iterator[Attempt]:
        """Yield the attempts of a job that have ended, in slices; or SUMMARIES of them."""
        run = 0
        while rows := self.db.rows(sql, {"seq": job.seq, "run": run}):
            yield from starmap(Attempt, rows)
            run = rows[-1][0]

    def last_attempt(self, job: Job, run: int, sql: str = LAST_ATTEMPT) -> Attempt | None:
        """Return the attempt with this number or, without it, the one before it."""
        rows = self.db.rows(sql, {"seq": job.seq, "run": run})
        return next(starmap(Attempt, rows), None)

    def stdin(self, job: Job) -> bytes:
        return bytes(self.db.rows(STDIN, {"seq": job.seq})[0][0]) if job.stdin_size else b""

    def facts(self, job: Job) -> dict[str, Any]:
        """Return a job as `show --json` and notifications present it, without its attempts."""
        settings = self.settings(job.queue)
        facts = {**job_facts(job, settings), "settings": settings}
        facts["stdin"] = self.stdin(job).decode()
        facts["why"] = None
        facts["last_result"] = self.last_result(job)
        facts["after"] = [parent.id for parent in self.parents(job)]
        return facts

    def last_result(self, job: Job) -> dict[str, Any] | None:
        """Return how the last attempt of a job's schedule ended; None if none has."""
        rows = self.db.rows(LAST_RESULT_OF_SCHEDULE, {"id": job.schedule_id})
        for name, outcome, error, started, finished in rows:
            result = {"job": name, "outcome": outcome, "error": error}
            return {**result, "started": format_time(started), "finished": format_time(finished)}
        return None

    def output(self, job: Job, run: int, limit: int) -> bytes:
        """Return the end of the output of an attempt, which may still run."""
        path = self.db.run_dir.output_file(job._replace(run=run))
        with contextlib.suppress(FileNotFoundError), open(path, "rb", opener=open_own) as file:
            return last_bytes(file.fileno(), limit)[1]
        return b"".join(self.column(OUTPUT_TAIL, seq=job.seq, run=run, limit=limit))

    def output_tail(self, seq: int, run: int, limit: int) -> str:
        """Return the last lines of an attempt's output; bytes that are not UTF-8 are escaped.

        The first line tells how much is left out.
        """
        args = {"seq": seq, "run": run, "limit": limit}
        for output, missing in self.db.rows(OUTPUT_TAIL, args):
            return left_out(output, missing).decode(errors="backslashreplace")
        return ""

    def parents(self, job: Job) -> list[Job]:
        """Return the jobs, up to 100, that a blocked job waits for."""
        return self.select(PARENTS, seq=job.seq)

    def failed_ancestor(self, job: Job) -> Job | None:
        """Return a dead or cancelled job without which a blocked job cannot run."""
        return self.first(FAILED_ANCESTORS, seq=job.seq) if job.readiness == BLOCKED else None

    def dead(self) -> list[tuple[str, int, int, int | None]]:
        """Return id, number, run and `notifies` of the dead jobs, in the order of their deaths."""
        return self.db.rows(DEAD_JOBS)

    def claimed(self) -> list[Job]:
        return self.select(CLAIMED)

    def oldest(self, queue: str | None = None) -> Job | None:
        return self.first(OLDEST, state=PENDING, readiness=READY, queue=queue, limit=1)

    def blocked(self, queues: Sequence[str] = (), limit: int = 10) -> list[Job]:
        """Return the jobs that have been blocked longest, of each of these queues or of all."""
        asked = {"state": PENDING, "readiness": BLOCKED, "limit": limit}
        names = as_list(queues) or (None,)
        return [job for name in names for job in self.select(OLDEST, queue=name, **asked)]

    def rows_of(self, sql: str, queues: Sequence[str], **args: object) -> list[Any]:
        """Return the rows of a statement with :served, for these queues or for all."""
        names = as_list(queues)
        args.update((f"q{n}", name) for n, name in enumerate(names))
        return self.db.rows(for_queues(sql, len(names)), args)

    def counts_by_queue(
        self, queues: Sequence[str] = (), *, delivered: bool = False
    ) -> list[tuple[str, State, int, int]]:
        """Return the number of jobs by queue, state and readiness, in these queues or in all.

        Notifications that have completed are counted only if `delivered`.
        """
        rows = self.rows_of(COUNTS if delivered else COUNTS_WITHOUT_DELIVERED, queues)
        counted = ((row[0], *kind, n) for row in rows for kind, n in zip(COUNTED, row[1:]))
        return [count for count in counted if count[-1]]

    def counts(self, queues: Sequence[str] = ()) -> dict[str, int]:
        counts: dict[str, int] = dict.fromkeys(STATES, 0)
        for _, state, _, number in self.counts_by_queue(queues):
            counts[state] += number
        return counts

    def rate(self, queue: str | None = None, seconds: float = 60) -> float:
        """Return how many jobs ended per second recently, in one queue or in all."""
        now = self.clock()
        rate = 0.0
        for state in (COMPLETED, DEAD):
            asked = {"state": state, "since": now - seconds, "queue": queue}
            number, first = self.db.rows(RECENT_ENDS, asked)[0]
            rate += number / max(now - first, 0.001) if number >= RECENT_LIMIT else number / seconds
        return rate

    def settings(self, queue: str = "") -> dict[str, Any]:
        """Return the settings that apply to the jobs of a queue: its own, or the default's."""
        settings = DEFAULTS.copy()
        for _, key, value in self.db.rows(STORED_SETTINGS, {"queue": queue}):
            try:
                if key in SETTINGS:
                    settings[key] = SETTINGS[key].read(value)
            except ValueError as error:
                raise Damaged(f"{self.db.path}: the setting {key} {error}") from None
        return settings

    def settings_as_of(self, revision: str | None, queue: str) -> Settings:
        """Return the same as `settings`, which are read once in each revision of them."""
        key = (revision, queue)
        if key not in self.known_settings:
            if len(self.known_settings) > KNOWN_SETTINGS:
                self.known_settings.clear()
            self.known_settings[key] = self.settings(queue)
        return self.known_settings[key]

    def sources(self, queue: str = "") -> dict[str, str]:
        """Return the settings that are stored and apply to a queue: it, or "" for all queues."""
        rows = self.db.rows(STORED_SETTINGS, {"queue": queue})
        return {key: source for source, key, _ in rows if key in SETTINGS}

    def paused(self) -> list[str]:
        """Return the paused queues; "" stands for all queues."""
        return self.column(PAUSED)

    def hold(self, queue: str) -> str:
        """Return the reason that a queue starts no job now; empty if there is none."""
        now = self.clock()
        for capacity, running, failures, token_at in self.db.rows(HELD, {"queue": queue}):
            when = format_distance(token_at, now) if token_at and token_at > now else ""
            if when and failures:
                jobs = plural(failures, "job") + " in a row" * (failures > 1)
                reason = f"{jobs} could not be launched; next try {when}"
                return f"queue {queue} is on hold: {reason} (now: queuectl resume --queue {queue})"
            if 0 < capacity <= running:
                return f"queue {queue} is at its limit of {capacity}"
            if when:
                rate = self.settings(queue)["rate"]
                return f"queue {queue} is at its rate of {rate}; next {when}"
        return ""

    def next_due_time(self, queues: Sequence[str] = ()) -> float | None:
        """Return when the next scheduled job of these queues, or of all, is due."""
        sql = NEXT_SCHEDULED_OF_QUEUES if queues else NEXT_SCHEDULED
        return self.rows_of(sql, queues)[0][0]  # type: ignore[no-any-return]

    def next_ready_time(self, queues: Sequence[str] = ()) -> float | None:
        """Return when the next job is due, or when a queue's rate allows its next start."""
        times = (self.next_due_time(queues), self.rows_of(NEXT_TOKEN, queues)[0][0])
        return min((when for when in times if when is not None), default=None)

    def drain_blockers(
        self, queues: Sequence[str] = (), horizon: float = LONGEST
    ) -> dict[str, bool]:
        """Return the queues that a drain waits for, some seconds ahead; True where paused."""
        found: dict[str, bool] = {}
        all_paused = "" in self.paused()
        until = self.clock() + horizon
        for queue, paused, ready, processing, when in self.rows_of(DRAINED, queues):
            if ready or processing or (when is not None and when <= until):
                found[queue] = bool(paused or all_paused) and not processing
        return found

    def totals(self) -> list[Totals]:
        return [Totals(*row) for row in self.db.rows(TOTALS)]

    def oldest_due(self, queue: str) -> float | None:
        """Return when the ready job of a queue that has waited longest was due."""
        due: float | None = self.column(OLDEST_DUE, queue=queue)[0]
        return due

    def data_version(self) -> int:
        return self.number(GET_DATA_VERSION)

    def changes(self, timeout: float | None = None) -> Iterator[None]:
        """Yield at once, soon after each change, and twice a second, for `timeout` seconds.

        A change is noticed within 0.08 s or, if it follows a quiet time, within 8 % of that, up to
        0.4 s.
        """
        seen = -1
        wal: object = None
        is_new = True
        changed = time.monotonic()
        end = NEVER if timeout is None else changed + timeout
        rest = 1.0
        while rest:
            now = time.monotonic()
            rest = max(0.0, end - now)
            longest = min(max(0.05, (now - changed) / 20), 0.25)
            for waited in polling(min(rest, 0.5), 0.01 if is_new else longest, longest):
                if wal is None or wal != self.db.wal_times() or (is_new and waited < 0.02):
                    wal = self.db.wal_times()  # two writes at once may show as one
                    if self.data_version() != seen:
                        break
            require_in_place(self.db.path, self.db.connection.info)
            is_new = seen != (seen := self.data_version())
            changed = time.monotonic() if is_new else changed
            if is_new or rest > 0.5:
                yield


HOLD = 0.015  # seconds after which a change of many jobs ends a transaction and begins another
LET_IN = 0.006  # seconds between the two, in which others that wait can get the lock


class Claim(NamedTuple):
    """A job that a worker has claimed, with its settings and its input."""

    job: Job
    settings: Settings
    stdin: bytes = b""
    parents: str = ""  # ids, separated by blanks


class Checks(NamedTuple):
    """Facts that tell a claim, or the end of a job, which other statements it needs."""

    due: float | None  # when the first scheduled job is due
    token_at: float | None  # when the first queue that its rate has closed opens
    closed_at: float  # when the last one was closed
    has_children: bool
    revision: str | None  # of the settings


NOTIFICATION = {
    "priority": TOP_PRIORITY,
    "max_retries": 5,
    "timeout": 60.0,
    "readiness": READY,
    "on_dead": "",
    "on_end": "",
}
REPORTED_OUTPUT = 1 << 16  # bytes of a job's output in a notification about it


class Ledger:
    """Every change of a job's state. Each is guarded by its own WHERE and concerns one job."""

    # The caller of `add`, `retry`, `cancel` or `delete` begins the transaction.

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.db = reader.db
        self.clock = reader.clock

    def change(self, sql: str, **args: object) -> bool:
        """Execute a guarded statement; return whether it changed a row."""
        return self.db.execute(sql, args).rowcount > 0

    def prepare(self, row: dict[str, Any], now: float) -> None:
        """Complete the row of a validated job: INSERTED and its other fields."""
        when = row.get("run_at", now + row.get("delay", 0))
        row["rule"] = rule_of(row)
        if "cron" in row:
            when = cron_next(row["cron"], now)
        if row["rule"]:
            row["scheduled_for"] = when
            if (row["id"] or "").isdecimal():
                raise BadInput("a schedule's id must not be a number")
        row["env"] = json.dumps(row["env"]) if row["env"] else None
        row.update(run_after=when, readiness=when <= now or row["state"] == STAGED)

    def add_numbered(self, rows: Sequence[dict[str, Any]], now: float, seq: int) -> int:
        """Insert jobs that have no ids and need no others, from a number on; return the next."""
        for number, row in enumerate(rows, seq):
            self.prepare(row, now)
            row.update(seq=number, id=str(number))
        insert = insert_job(*(key for key in INSERTED if any(row[key] is not None for row in rows)))
        with contextlib.suppress(LookupError), self.db.transaction():
            if self.db.execute(insert, rows, many=True).rowcount == len(rows):
                return seq + len(rows)
            raise LookupError("a job has one of the numbers as its id")
        for row in rows:
            seq = self.insert({**row, "seq": seq, "id": None}) + 1
        return seq

    def add(self, row: dict[str, Any], now: float) -> int:
        """Insert a validated job; return its number."""
        self.prepare(row, now)
        needs = self.needs(row) if "after" in row or "after_end" in row else ()
        if row["state"] != STAGED and not all(need["met"] for need in needs):
            row["readiness"] = BLOCKED
        seq = self.insert(row)
        for need in needs:
            self.db.execute(ADD_NEED, {**need, "child": seq})
        return seq

    def needs(self, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return rows of `needs`, without the child, for the jobs in `after` and `after_end`."""
        needs = []
        for key, states in {"after": (COMPLETED,), "after_end": FINISHED}.items():
            try:
                parents = self.reader.named(fields.get(key, ()), fields.get("locked_by"))
            except NotFound as error:
                problem = BadInput(f"{key}: {error.args[0]}")
                problem.hint = error.hint
                raise problem from None
            for parent in parents:
                met = parent.state in states
                needs.append({"parent": parent.seq, "any_end": key == "after_end", "met": met})
        return needs

    def insert(self, row: dict[str, Any]) -> int:
        """Insert a job under its id or, without one, under the next free number; return its seq."""
        given = row["id"]
        while True:
            name = given or str(row["seq"])
            taken = row["rule"] and not given and self.reader.is_taken(name)
            row["id"] = name
            if row["rule"]:
                row["schedule_id"] = name
                row["id"] = self.next_id_of_schedule(name, row["locked_by"])
            columns = [key for key in INSERTED if row[key] is not None]
            if not taken and self.change(insert_job(*columns), **row):  # else the number is taken
                return int(row["seq"])
            row["seq"] += 1

    def next_id_of_schedule(self, schedule_id: str, batch: str | None) -> str:
        newest = self.reader.first(NEWEST_OF_SCHEDULE, id=schedule_id, batch=batch)
        number = int(newest.id.rpartition(".")[2]) + 1 if newest else 1
        while self.reader.is_taken(f"{schedule_id}.{number}"):
            number += 1
        return f"{schedule_id}.{number}"

    def last_seq(self) -> int:
        return self.reader.number(LAST_SEQ, table=self.db.table("jobs"))

    def claim(self, worker: str, queues: Sequence[str] = ()) -> Claim | None:
        with self.db.transaction():
            return self._claim(worker, queues, self.clock(), self.checks(None))

    def checks(self, seq: int | None) -> Checks:
        return Checks(*self.db.rows(CHECKS, {"seq": seq})[0])

    def _claim(
        self, worker: str, queues: Sequence[str], now: float, checks: Checks
    ) -> Claim | None:
        self.open_due(now, checks)
        for has_parents, *row in self.reader.rows_of(NEXT_READY, queues):
            job = Job(*row)
            settings = self.reader.settings_as_of(checks.revision, job.queue)
            begun: dict[str, Any] = {"waited": max(0.0, now - job.updated_at), "locked_by": worker}
            begun.update(attempts=job.attempts + 1, run=job.run + 1, locked_at=now, updated_at=now)
            self.change(CLAIM, seq=job.seq, **begun)
            if settings["rate"]:
                gap = rate_gap(settings["rate"])
                taken = {"queue": job.queue, "seq": job.seq, "gap": gap, "late": min(gap, LATE)}
                self.change(TAKE_TOKEN, **taken, now=now)
            job = job._replace(state=PROCESSING, **begun)
            parents = self.reader.column(PARENT_IDS, seq=job.seq) if has_parents else ()
            return Claim(job, settings, self.reader.stdin(job), " ".join(parents))
        return None

    def open_due(self, now: float, checks: Checks) -> None:
        """Make the jobs ready that are due, and open the queues whose rate allows a start."""
        if checks.due is not None and checks.due <= now:
            self.change(MAKE_READY, now=now)
        is_later = checks.token_at is None or checks.token_at > now
        if not is_later or checks.closed_at > now:  # or a clock set back
            self.change(REOPEN, now=now)

    def finish(
        self, job: Job, outcome: Outcome, next_from: Sequence[str] | None = None
    ) -> tuple[Job | None, Claim | None]:
        """Record how an attempt ended, and claim the next job from these queues (empty: all)."""
        with self.db.transaction():
            now = self.clock()
            checks = self.checks(job.seq)
            after = self._finish(job, outcome, now, checks)
            worker = job.locked_by or ""
            claim = None if next_from is None else self._claim(worker, next_from, now, checks)
            is_same = claim is not None and claim.job.queue == job.queue
            if not is_same and self.db.rows(GOT_ROOM, {"queue": job.queue}):
                self.db.connection.notify = True  # an idle worker may use it
            return after, claim

    def _finish(self, job: Job, outcome: Outcome, now: float, checks: Checks) -> Job | None:
        if outcome.error is not None or job.rule:  # a completed job completes, cancelled or not
            stored = self.reader.by_seq(job.seq) or job
            job = job._replace(cancel_requested=stored.cancel_requested)
        settings = self.reader.settings_as_of(checks.revision, job.queue)
        chance = int.from_bytes(os.urandom(4), "big") / (1 << 32) if settings["jitter"] else 0.0
        after = after_attempt(job, outcome, settings, now, chance)
        is_held = outcome.end == "not launched" and after.state == PENDING
        if is_held:
            after = after._replace(run_after=after.updated_at)  # another job is tried next
        is_over = after.state in (COMPLETED, DEAD)
        if job.rule and is_over:
            after = after._replace(rule=None)
        if after.state == PENDING and after.run_after > now:
            after = after._replace(readiness=SCHEDULED)
        if not self.change(FINISH, **after._asdict()):
            return None  # its claim was lost: nothing has changed
        if outcome.end not in ("unstarted", "not launched"):
            attempt = (job.seq, job.run, job.locked_by, outcome.word, job.waited, *outcome[1:])
            self.db.execute(ADD_ATTEMPT, attempt)
        if is_held:
            self.change(HOLD_LAUNCHES, queue=job.queue, now=now)
        if after.state in FINISHED:
            self.follow_end(after, settings, now, has_children=checks.has_children)
        if job.rule and is_over and not job.cancel_requested:  # cancelling ends the schedule
            self.add_next_of_schedule(job, now)
        return after

    def follow_end(
        self, job: Job, settings: Settings, now: float, *, has_children: bool = True
    ) -> None:
        """Unblock the jobs that waited for a job that has ended, and add notifications about it."""
        if has_children and self.change(MARK_MET, seq=job.seq, completed=job.state == COMPLETED):
            self.change(UNBLOCK, seq=job.seq, now=now)
            self.db.connection.notify = True
        for key, command in notification_commands(job, settings).items():
            where = job.cwd if getattr(job, key) else os.path.dirname(self.db.path)
            ended = job._replace(locked_by=None, locked_at=None, cancel_requested=0)
            self.report(ended, command, where, settings["max_notifications"])

    def report(self, job: Job, command: str, cwd: str, limit: int) -> None:
        """Add a notification about a job that has ended; beyond the limit, count it in a summary.

        Unless the command is the job's own, `cwd` is not the job's directory: that may be missing.
        """
        target = {"queue": job.queue, "command": command, "cwd": cwd}
        if self.reader.number(COUNT_NOTIFICATIONS, state=PENDING, queue=None) < limit:
            last = self.reader.last_attempt(job, job.run)
            runs = [attempt_facts(last, REPORTED_OUTPUT)] if last else []
            facts = {**self.reader.facts(job), "runs": runs}
            self.add_notification(job, job.state, target, facts)
        elif waiting := self.reader.first(WAITING_SUMMARY, **target):
            facts = summary_facts(self.reader.stdin(waiting), job)
            self.change(SET_STDIN, seq=waiting.seq, stdin=json_line(facts))
        else:
            self.add_notification(job, SUMMARY, target, summary_facts(b"", job))

    def add_notification(self, job: Job, event: str, target: Facts, facts: Facts) -> None:
        now = job.updated_at
        env = {"QUEUECTL_OF": "" if event == SUMMARY else job.id, "QUEUECTL_EVENT": event}
        row = {**dict.fromkeys(INSERTED), **NOTIFICATION, **target, "seq": self.last_seq() + 1}
        row.update(created_at=now, updated_at=now, run_after=now, env=json.dumps(env))
        row.update(stdin=json_line(facts), notifies=job.seq, event=event)
        self.insert(row)
        self.db.connection.notify = True

    def add_next_of_schedule(self, job: Job, now: float) -> None:
        when = next_occurrence(str(job.rule), job.scheduled_for or now, now)
        row = {**job._asdict(), "id": job.schedule_id, "created_at": now, "updated_at": now}
        row.update(run_after=when, scheduled_for=when, readiness=SCHEDULED)
        row.update(state=PENDING, locked_by=None, stdin=self.reader.stdin(job))
        self.insert({**row, "seq": self.last_seq() + 1})
        self.db.connection.notify = True

    def note_launch(self, job: Job, facts: Facts, *, is_first: bool = False) -> bool:
        """Record what is known about an attempt elsewhere; return whether the job is still ours."""
        row = {**job._asdict(), "launch": json.dumps(facts), "is_first": is_first}
        with self.db.transaction():
            if "host" in facts and "trouble" not in facts:  # the engine works
                has_rate = bool(self.reader.settings(job.queue)["rate"])
                self.change(END_LAUNCH_HOLD, queue=job.queue, has_rate=has_rate)
            return self.change(NOTE_LAUNCH, **row)

    def correct_times(self) -> bool:
        """Reschedule jobs with times from a clock that was a day ahead; tell if there were any."""
        now = self.clock()
        jobs = self.reader.select(SCHEDULED_AHEAD, limit=now + 86400)
        if not jobs:
            return False
        with self.db.transaction():
            for job in jobs:
                when = now + job.run_after - job.updated_at  # a retry waits as long as it was to
                if job.rule and not job.run:
                    when = next_occurrence(job.rule, now, now)
                planned = job.scheduled_for if job.run else when
                self.change(RESCHEDULE, seq=job.seq, when=when, scheduled_for=planned, now=now)
        return True

    def require_state(self, job: Job, states: Sequence[str]) -> None:
        if job.state not in states:
            raise NotFound(f"job {printable(job.id)} is {job.state}, not {' or '.join(states)}")

    def check_retry(self, job: Job) -> None:
        """Raise NotFound where a job cannot return to the queue."""
        try:
            self.require_state(job, (DEAD, CANCELLED))
        except NotFound as error:
            if dead := self.reader.first(LAST_DEAD_OF_SCHEDULE, id=job.schedule_id):
                raise NotFound(f"{error}; the last dead one is {printable(dead.id)}") from None
            raise
        if job.rule and self.reader.is_taken(str(job.schedule_id)):
            name = printable(str(job.schedule_id))
            raise NotFound(f"schedule {name} is active already, or its name is taken")

    def retry(self, job: Job) -> None:
        self.check_retry(job)
        self.change(RETRY, seq=job.seq, now=self.clock())

    def edit(self, job: Job, fields: Mapping[str, Any]) -> None:
        """Give a waiting job new fields, as `validate_changes` returns them."""
        now = self.clock()
        row = {key: fields[key] for key in INSERTED if key in fields}
        row.update(self.new_times(job, fields, now))
        if "env" in fields:
            env = {**json.loads(job.env or "{}"), **fields["env"]}
            kept = {key: value for key, value in env.items() if value is not None}
            row["env"] = json.dumps(kept) if kept else None
        if "after" in fields or "after_end" in fields:
            self.replace_needs(job, fields)
        when = row.setdefault("run_after", job.run_after)
        blocked = self.reader.number(COUNT_UNMET, child=job.seq)
        row["readiness"] = BLOCKED if blocked else int(when <= now)
        if (row["readiness"], when) != (job.readiness, job.run_after):
            row["updated_at"] = now
        self.change(edit_statement(*row), seq=job.seq, **row)

    def new_times(self, job: Job, fields: Mapping[str, Any], now: float) -> dict[str, Any]:
        """Return the columns that a new time or rule changes; a retry keeps its time."""
        rule = rule_of(fields)
        if rule and not job.rule:
            raise NotFound(f"job {printable(job.id)} is not the next occurrence of a schedule")
        row: dict[str, Any] = {"rule": rule} if rule else {}
        if "delay" in fields or "run_at" in fields:
            row["run_after"] = fields.get("run_at", now + fields.get("delay", 0))
        elif rule and not job.run:
            row["run_after"] = next_occurrence(rule, now, now)
        if "run_after" in row and job.rule and not job.run:
            row["scheduled_for"] = row["run_after"]
        return row

    def replace_needs(self, job: Job, fields: Mapping[str, Any]) -> None:
        """Let a job wait for other jobs than before; raise NotFound where they wait for it."""
        needs = self.needs(fields)
        for need in needs:
            if self.reader.number(WAITS_FOR, seq=need["parent"], other=job.seq):
                parent = self.reader.by_seq(need["parent"]) or job
                cycle = f"{printable(parent.id)}, which waits for it" if parent != job else "itself"
                raise NotFound(f"job {printable(job.id)} cannot wait for {cycle}")
        for key in fields.keys() & {"after", "after_end"}:
            self.db.execute(DROP_NEEDS, {"child": job.seq, "any_end": key == "after_end"})
        for need in needs:
            self.db.execute(ADD_NEED, {**need, "child": job.seq})

    def check_delete(self, job: Job, states: Sequence[str]) -> None:
        """Raise NotFound where a job is in none of these states, or another one waits for it."""
        self.require_state(job, states)
        if child := self.reader.first(BLOCKED_CHILDREN, seq=job.seq):
            name = printable(job.id)
            raise NotFound(f"job {printable(child.id)} waits for {name}; cancel that first")

    def cancel(self, seq: int) -> None:
        now = self.clock()
        if not self.change(CANCEL_WAITING, seq=seq, now=now):
            self.change(CANCEL_RUNNING, seq=seq)
        elif job := self.reader.by_seq(seq):
            self.follow_end(job, self.reader.settings(job.queue), now)

    def delete(self, *seqs: int) -> int:
        """Delete jobs; return how many."""
        for sql in DELETE_JOB:
            self.db.execute(sql, [{"seq": seq} for seq in seqs], many=True)
        return len(seqs)

    def delete_slice(self, state: str, before: float) -> int:
        """Delete some jobs that ended in a state before a time, unless needed; return how many."""
        with self.db.transaction():
            return self.delete(*self.reader.column(PRUNABLE, state=state, before=before))

    def in_slices(
        self, seqs: Iterable[int], check: Callable[[Job], None], act: Callable[[Job], object]
    ) -> Iterator[list[Job]]:
        """Change jobs in short transactions; yield the jobs, as they were before, of each.

        Jobs for which the check raises NotFound are left as they are. What was yielded is stored,
        whatever happens to the caller later.
        """
        left = collections.deque(seqs)
        while left:
            changed = []
            with self.db.synced_later(), self.db.transaction(notify=True):
                until = time.monotonic() + HOLD
                while left:
                    job = self.reader.by_seq(left.popleft())
                    with contextlib.suppress(NotFound):
                        if job:
                            check(job)
                            act(job)
                            changed.append(job)
                    if time.monotonic() > until:
                        break
            yield changed
            if left and not self.db.connection.in_block:
                time.sleep(LET_IN)

    def settle_slice(self, batch: str) -> bool:
        """Publish some staged jobs of an accepted batch, or delete some of another one.

        Return False if there were none left.
        """
        with self.db.transaction(notify=True):
            seqs = self.reader.column(STAGED_JOBS, batch=batch)
            if not seqs:
                self.change(FORGET_BATCH, batch=batch)
            elif self.db.rows(IS_ACCEPTED, {"batch": batch}):
                args = {"batch": batch, "now": self.clock(), "first": seqs[0], "last": seqs[-1]}
                for sql in PUBLISH:
                    self.db.execute(sql, args)
            else:
                self.delete(*seqs)
        return bool(seqs)

    def settle_dead_batches(self) -> bool:
        """Settle a slice of a batch whose process has died; return False if there was none."""
        run_dir = self.db.run_dir
        for name in (*run_dir.files("batch-"), *self.reader.column(OPEN_BATCH)):
            if run_dir.is_unlocked(name):
                if self.settle_slice(name):
                    return True
                with contextlib.suppress(FileNotFoundError):
                    run_dir.remove(name, is_lock=True)
        return False


class Batch:
    """Adds jobs, all or none: in one transaction or, if they are many, in several.

    Many jobs are first staged, in slices, so that other writers need not wait. One small write
    accepts the batch, and then its jobs are published, in slices. If the process dies, a pool or
    another batch publishes the rest of an accepted batch, and deletes one that was not accepted.
    """

    TEXT = 8 << 20  # characters of commands and of stdin in a slice

    def __init__(self, ledger: Ledger, *, if_absent: bool) -> None:
        self.ledger = ledger
        self.db = ledger.db
        self.if_absent = if_absent
        self.now = ledger.clock()
        self.is_large = False
        self.length = 0
        self.taken: list[dict[str, Any]] = []  # the fields given for ids that exist
        self.ranges: list[tuple[int, int]] = []  # the numbers of the jobs, first and last

    def slices(self, jobs: Iterable[Mapping[str, object]]) -> Iterator[list[dict[str, Any]]]:
        """Yield the validated rows of jobs, for one transaction each, in a list that is reused."""
        here = ""
        with contextlib.suppress(FileNotFoundError):  # then each job must have a cwd
            here = os.getcwd()
        blank: dict[str, Any] = dict.fromkeys(INSERTED)
        blank.update(queue="default", priority=0, cwd=here)
        blank.update(created_at=self.now, updated_at=self.now)
        rows = []
        size = 0
        for fields in jobs:
            given = validate_fields(fields)
            rows.append({**blank, **given})
            if self.if_absent:
                rows[-1]["given"] = given
            if not rows[-1]["cwd"]:
                raise BadInput("the current directory no longer exists; set cwd")
            size += len(rows[-1]["command"]) + len(rows[-1]["stdin"] or b"")
            if len(rows) >= BATCH_SLICE or size >= self.TEXT:
                self.is_large = True
                yield rows
                rows.clear()
                size = 0
        yield rows

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add a slice, within a transaction."""
        first = seq = self.ledger.last_seq() + 1
        for is_special, group in groupby(rows, self.is_special):
            if is_special:
                for row in group:
                    seq = self.add_special({**row, "seq": seq})
                    self.length += 1
            else:
                numbered = list(group)
                seq = self.ledger.add_numbered(numbered, self.now, seq)
                self.length += len(numbered)
        if seq > first:
            self.ranges.append((first, seq - 1))

    @staticmethod
    def is_special(row: Mapping[str, Any]) -> bool:
        return bool(row["id"] or row.keys() & {"after", "after_end", "every", "cron"})

    def add_special(self, row: dict[str, Any]) -> int:
        """Add a job that has an id, a rule or parents; return the next number."""
        seq = int(row["seq"])
        try:
            if not (row["id"] and self.ledger.reader.is_taken(row["id"])):
                return self.ledger.add(row, self.now) + 1
            if not self.if_absent:
                raise BadInput(f"job {row['id']} already exists; use another id")
        except BadInput as error:
            error.index = self.length
            raise
        self.taken.append(row["given"])
        return seq

    def ids(self) -> Iterator[str]:
        for first, last in self.ranges:
            args = {"first": first, "last": last}
            while rows := self.db.rows(IDS_BETWEEN, args):
                yield from (row[1] for row in rows)
                args["first"] = rows[-1][0] + 1

    def store(self, jobs: Iterable[Mapping[str, object]]) -> Iterator[str]:
        """Add jobs; return their ids and those that were taken."""
        slices = self.slices(jobs)
        slices = chain([next(slices)], slices)
        ids: Iterable[str] = self.ids()
        if self.is_large and not self.db.connection.in_block:
            self.stage(slices)
        else:
            with self.db.transaction(notify=True):
                for rows in slices:
                    self.add(rows)
                ids = list(ids)  # before they can be pruned
        return chain(ids, (given["id"] for given in self.taken))

    def stage(self, slices: Iterable[list[dict[str, Any]]]) -> None:
        """Add slices in transactions of their own."""
        while self.ledger.settle_dead_batches():
            time.sleep(LET_IN)
        self.db.run_dir.make()  # the database may have been copied here
        name = "batch-" + os.urandom(4).hex()
        with contextlib.closing(LockFile(self.db.run_dir.file(name))):
            try:
                for rows in slices:  # others get in while a slice is read
                    for row in rows:
                        row.update(state=STAGED, locked_by=name)
                    with self.db.transaction():
                        self.add(rows)
                self.ledger.change(ACCEPT_BATCH, batch=name)
            finally:
                while self.ledger.settle_slice(name):
                    time.sleep(LET_IN)


class JobWatch:
    """Jobs that a caller waits for, as they were last seen."""

    def __init__(self, reader: Reader, jobs: Iterable[Job]) -> None:
        self.reader = reader
        self.seen = {job.seq: job for job in jobs}
        self.unfinished = collections.OrderedDict.fromkeys(self.seen)  # the next to look at first
        self.version = -1  # the data_version when all of them were read
        self.refresh_at = 0.0  # on the monotonic clock

    def jobs(self) -> list[Job]:
        return list(self.seen.values())

    def is_over(self) -> bool:
        """Tell whether no job can end any more by itself: each has ended, or depends on a failure.

        As long as one job can end, only that one is read: changes may be frequent, and jobs many.
        """
        version = self.reader.data_version()
        if version != self.version and time.monotonic() >= self.refresh_at:
            self.refresh()
            self.version = version
        for _ in range(len(self.unfinished)):
            seq = next(iter(self.unfinished))
            self.update(seq, self.reader.by_seq(seq))
            if self.seen[seq].state not in FINISHED:
                if not self.reader.failed_ancestor(self.seen[seq]):
                    return False
                self.unfinished.move_to_end(seq)
        return True

    def update(self, seq: int, job: Job | None) -> None:
        """Note how a job is now; one that was deleted must have ended."""
        self.seen[seq] = job or self.seen[seq]._replace(state=COMPLETED, exit_code=0)
        if self.seen[seq].state in FINISHED:
            del self.unfinished[seq]

    def refresh(self) -> None:
        """Read all unfinished jobs."""
        began = time.monotonic()
        found = {job.seq: job for job in self.reader.by_seqs([*self.unfinished])}
        for seq in [*self.unfinished]:
            self.update(seq, found.get(seq))
        now = time.monotonic()
        self.refresh_at = now + 50 * (now - began)  # it takes up 2 % of the time


class Queue:
    """A durable queue of shell commands in one SQLite file. Safe to use from threads.

    Times are Unix seconds, a datetime (local time if it has no time zone) or ISO 8601. Durations
    are seconds, a timedelta, or as on the command line ("1h30m"). Paths are strings or PathLike.
    Where several ids, states or queues may be given, a string is one. All changes by a method are
    on disk when it returns. Raises QueueError: BadInput, NotFound, TimedOut, or Fault (the
    database or the machine).
    """

    def __init__(
        self,
        path: Path = "queuectl.db",
        *,
        create: bool = True,
        readonly: bool = False,
        guest: bool = False,
        insecure: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the queue; create it if there is none, unless told not to.

        With `guest`, the queue lives in another program's database, in tables whose names begin
        with `queuectl_`; that database is in WAL mode from then on. With `insecure`, or
        QUEUECTL_INSECURE=1 in the environment, a queue to which other users could add commands is
        not refused.
        """
        file = validate("path", valid_queue_path, path)
        if not insecure and os.environ.get("QUEUECTL_INSECURE") != "1":
            require_trust(file)
        self._db = Database(file, create=create and not readonly, readonly=readonly, guest=guest)
        self._reader = Reader(self._db, clock)
        self._ledger = Ledger(self._reader)

    def __enter__(self) -> Queue:
        """Return the queue; leaving the block closes it."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close this thread's connection."""
        self.close()

    def close(self) -> None:
        """Close this thread's connection; the next use opens another one."""
        self._db.close()

    @property
    def path(self) -> str:
        """The absolute path of the database."""
        return self._db.path

    def transaction(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        """Put the caller's own writes and its calls of this object into one transaction.

        Yields the connection. Everything is on disk when the block ends; nothing is if it raises.
        The caller must not begin or commit anything itself.
        """
        return self._db.transaction()

    def enqueue(self, command: str, *, if_absent: bool = False, **fields: object) -> str:
        """Add a job and return its id.

        Fields: id, queue, priority (higher first), delay or run_at, timeout (0: none),
        max_retries, retry_delays ("10s,1m" or a list), cwd (default: the current directory), env
        (a mapping), stdin (text), after (ids of jobs that must complete first), after_end (ids of
        jobs that must end first, in any way), every (a duration) or cron (five fields), on_dead and
        on_end (commands; empty: none). With `if_absent`, an id that is taken is not an error.
        """
        return next(self.enqueue_many([{"command": command, **fields}], if_absent=if_absent))

    def enqueue_many(
        self, jobs: Iterable[Mapping[str, object]], *, if_absent: bool = False
    ) -> Iterator[str]:
        """Add all jobs or, if one is bad, none; return their ids in order.

        With `if_absent`, a job whose id is taken is left as it is, and its id comes last.
        """
        return Batch(self._ledger, if_absent=if_absent).store(jobs)

    def get(self, job_id: str) -> Job:
        """Return one job. A schedule's name means its active job, or else its newest.

        Raises NotFound.
        """
        return self._reader.get(job_id)

    def jobs(
        self,
        states: Sequence[str] = (),
        limit: int | None = None,
        queue: str | None = None,
        *,
        notifications: bool = True,
    ) -> Iterator[Job]:
        """Yield jobs in order of arrival; with a limit, those that changed last.

        Without `notifications`, those that have completed are left out. `states` may also name the
        kinds of pending jobs: ready, scheduled, blocked.
        """
        queues = [queue] if queue else []
        wanted = validate("states", valid_states, states) or STATES
        chosen = Selection(queues=queues, states=wanted, notifications=notifications)
        if limit is not None:
            number = validate("limit", integer(0, 10**9), limit)
            return iter(self._reader.latest_selected(chosen, number)[0])
        return self._reader.selected(chosen)

    def attempts(self, job: Job | str) -> list[Attempt]:
        """Return the attempts of a job that have ended, oldest first."""
        return list(self._reader.attempts(job if isinstance(job, Job) else self.get(job)))

    def output(self, job: Job | str, run: int | None = None) -> bytes:
        """Return the output of an attempt, by default of the one that runs or ran last.

        It is all that was written to stdout and stderr so far, or the last `output_limit` bytes. It
        is empty before the first attempt. A schedule's name means its latest attempt. Raises
        NotFound.
        """
        found = job if isinstance(job, Job) else self.get(job)
        if not found.run and job == found.schedule_id:
            found = self._reader.first(LAST_RUN_OF_SCHEDULE, id=found.schedule_id) or found
        if run is not None and not 1 <= run <= found.run:
            raise NotFound(f"job {printable(found.id)} has no run {run}")
        limit = self._reader.settings(found.queue)["output_limit"]
        return self._reader.output(found, run or found.run, limit)

    def counts(self, queues: Sequence[str] = ()) -> dict[str, int]:
        """Return the number of jobs in each state, in these queues or in all.

        Notifications that have completed are not counted.
        """
        return self._reader.counts(queues)

    def wait(self, ids: Iterable[str], timeout: Duration | None = None) -> list[Job]:
        """Wait until jobs have ended; return them as they are then.

        Returns earlier when no remaining job can run by itself, because another job that it waits
        for is dead or cancelled. Raises TimedOut after `timeout`.
        """
        if self._db.connection.in_block:
            raise BadInput("wait cannot be used in a transaction: until its end, no job of it runs")
        limit = None if timeout is None else validate("timeout", parse_duration, timeout)
        watch = JobWatch(self._reader, self._reader.named(ids))
        for _ in self._reader.changes(limit):
            if watch.is_over():
                return watch.jobs()
        first = printable(watch.seen[next(iter(watch.unfinished))].id)
        more = f" and {len(watch.unfinished) - 1} more" if len(watch.unfinished) > 1 else ""
        raise TimedOut(f"job {first}{more} did not end within {format_duration(limit or 0)}")

    def cancel(self, ids: Iterable[str], *, cascade: bool = False, gone: bool = False) -> list[Job]:
        """Cancel jobs and, with `cascade`, those that wait for them; return them as they are now.

        A waiting job is cancelled at once. A running one has `cancel_requested` until its worker
        has ended it. A job that has ended is left as it is. A schedule ends with its active job.
        With `gone`, jobs that a launcher runs elsewhere are assumed to have ended there, even if
        `launcher_cancel` fails.
        """
        jobs = {job.seq: job for job in self._reader.named(ids)}
        named = list(jobs)
        for seq in named if cascade else []:
            jobs.update((job.seq, job) for job in self._reader.select(DESCENDANTS, seq=seq))

        def cancel(job: Job) -> None:
            if gone:
                self._ledger.change(FORGET_LAUNCH, seq=job.seq)
            self._ledger.cancel(job.seq)

        seqs = [*list(jobs)[len(named) :], *named]  # first those that wait: none of them may start
        for _ in self._ledger.in_slices(seqs, lambda _job: None, cancel):
            pass
        return [self.get(job.id) for job in jobs.values()]

    def edit(self, ids: Iterable[str], **fields: object) -> list[Job]:
        """Change the fields of waiting jobs; return those that were changed, as they are now.

        A job that runs or has ended is left as it is. If a value is bad, no job is changed. Takes
        the fields of `enqueue` but the id. `env` is added to the variables, and None removes one;
        `after` replaces the jobs to wait for, and an empty one removes them. "default" as
        max_retries, timeout, retry_delays, on_dead or on_end leaves it to the settings again. A
        schedule, by its name, is changed from its next job on; only a job that waits can be given
        another `every` or `cron`.
        """
        changes = validate_changes(fields)
        with self._db.transaction(notify=True):
            jobs = [job for job in self._reader.named(ids) if job.state == PENDING]
            for job in jobs:
                self._ledger.edit(job, changes)
            return list(self._reader.by_seqs([job.seq for job in jobs]))

    def retry(self, ids: Iterable[str] | None = None) -> list[str]:
        """Return dead or cancelled jobs to the queue, all or none; return their ids.

        Without ids, return all dead jobs, in short transactions.
        """
        if ids is None:
            seqs = [row[1] for row in self._reader.dead()]
            slices = self._ledger.in_slices(seqs, self._ledger.check_retry, self._ledger.retry)
            return [job.id for jobs in slices for job in jobs]
        with self._db.transaction(notify=True):
            jobs = self._reader.named(ids)
            for job in jobs:
                self._ledger.retry(job)
        return [job.id for job in jobs]

    def purge(self, ids: Iterable[str]) -> int:
        """Delete dead or cancelled jobs, all or none; return how many."""
        return len(self._delete(ids, (DEAD, CANCELLED)))

    def _delete(self, ids: Iterable[str], states: Sequence[str]) -> list[Job]:
        """Delete the named jobs, all or none; return them."""
        with self._db.transaction():
            jobs = self._reader.named(ids)
            for job in jobs:
                self._ledger.check_delete(job, states)
                self._ledger.delete(job.seq)
        return jobs

    def prune(self, older_than: Duration = 0, states: Sequence[str] = PRUNED_BY_DEFAULT) -> int:
        """Delete jobs that ended `older_than` or longer ago; return how many.

        A job that a blocked job waits for is kept. The work is done in short transactions.
        """
        wanted = validate("states", valid_states, states)
        if not set(wanted) <= set(FINISHED):
            raise BadInput(f"only jobs in the states {', '.join(FINISHED)} can be pruned")
        age = validate("older_than", parse_duration, older_than)
        chosen = Selection(states=wanted, older_than=age)
        seqs = [job.seq for job in self._reader.selected(chosen)]
        check = partial(self._ledger.check_delete, states=wanted)
        slices = self._ledger.in_slices(seqs, check, lambda job: self._ledger.delete(job.seq))
        return sum(map(len, slices))

    def pause(self, queue: str = "") -> None:
        """Start no more jobs of a queue, or of any; running jobs continue."""
        if queue:
            validate("queue", valid_name, queue)
        with self._db.transaction():
            self._db.execute(PAUSE, {"queue": queue})

    def resume(self, queue: str = "") -> None:
        """Undo `pause` for a queue, or for all."""
        with self._db.transaction(notify=True):
            self._db.execute(RESUME, {"queue": queue})

    def config(self, queue: str = "") -> dict[str, Any]:
        """Return the value of every setting, as it applies to the jobs of a queue."""
        return self._reader.settings(queue)

    def configure(self, key: str, value: Duration | None, queue: str = "") -> None:
        """Store a setting, a number or text as on the command line; None restores the default.

        It is the default of all queues or, given a queue, applies to that one only.
        """
        text = None if value is None else validate(key, setting_input, value)
        key = validate_setting(key, text, queue)
        if queue:
            validate("queue", valid_name, queue)
        with self._db.transaction(notify=True):
            sql = UNSET if value is None else SET
            self._db.execute(sql, {"queue": queue, "key": key, "value": text})
            revision = os.urandom(8).hex()  # a count would come to the same value after a rollback
            self._db.execute(SET, {"queue": "", "key": REVISION_KEY, "value": revision})
            if key == "limit":
                self._db.execute(APPLY_LIMIT, {"queue": queue})
            if key == "rate":
                rate = self._reader.settings(queue)["rate"]
                gap = rate_gap(rate) if rate else 0
                self._db.execute(APPLY_RATE, {"queue": queue, "gap": gap})


# --- attempt: launching a job, watching it, ending it, keeping its output and its result ----------


class Output(LockFile):
    """The output of one attempt: a file that the job writes and, while it lives, holds locked."""

    LARGEST = 16 << 20  # bytes; a longer file loses its beginning while the job runs
    FLAGS = LockFile.FLAGS | os.O_EXCL | os.O_APPEND
    bytes_dropped = 0  # no longer in the file or its size
    hole = 0  # bytes at the beginning of the file that take no space

    def __init__(self, path: str) -> None:
        try:
            super().__init__(path)
        except FileExistsError:  # left by an earlier queue of this name
            os.unlink(path)
            super().__init__(path)

    def reopen(self) -> None:
        """Give up our share of the lock, so that it is free when the job's processes are gone."""
        with contextlib.suppress(FileNotFoundError):  # the job has removed it
            fd = open_own(self.path, os.O_RDWR | os.O_APPEND)
            os.close(self.fd)
            self.fd = fd

    def trim(self, limit: int) -> bool:
        """Free the space of a very long output but its last bytes; return whether it was long."""
        size = os.fstat(self.fd).st_size
        if size - self.hole <= self.LARGEST + limit:
            return False
        if SYSTEM.punch_hole(self.fd, size - limit):
            self.hole = size - limit
        else:  # a file system without holes: drop the whole file
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, 0)
                self.bytes_dropped += size
        return True

    def tail(self, limit: int) -> tuple[int, bytes]:
        try:
            dropped, output = last_bytes(self.fd, limit)
        except OSError as error:
            return self.bytes_dropped, f"[the output cannot be read: {error.strerror}]\n".encode()
        return self.bytes_dropped + dropped, output


class Notices:
    """Report each problem once, and again if it lasts longer than `interval` seconds."""

    def __init__(self, say: Callable[[str], None], interval: float = 60.0) -> None:
        self.say = say
        self.interval = interval
        self.reported: dict[str, float] = {}

    def report(self, text: str, key: str = "") -> None:
        """Report a problem unless it was reported lately; texts with the same key are one."""
        now = time.monotonic()
        recent = {k: when for k, when in self.reported.items() if now - when < self.interval}
        if (key or text) not in recent:
            recent[key or text] = now
            self.say(text)
        self.reported = recent


class Termination:
    """The end of an attempt's processes: TERM, and KILL when the grace period is over.

    To find them, all processes are examined: at first, for KILL, when those that were found are
    gone, and a few times a second, because they may have started more.
    """

    INTERVAL = 0.25  # seconds

    def __init__(
        self, job: Job, run_dir: RunDirectory, grace: float, notices: Notices, output: Output | None
    ) -> None:
        self.job = job
        self.run_dir = run_dir
        self.notices = notices
        self.output = output  # whose lock this process shares
        self.deadline = time.monotonic() + grace
        self.pause = 0.005  # seconds before the next step
        self.asked: set[int] = set()
        self.found: list[int] = []
        self.snapshot_at = 0.0
        self.is_waiting = False  # for processes to end

    def step(self, snapshot: Callable[[], Any] = SYSTEM.snapshot) -> bool:
        """End the remaining processes; return whether none is left and the lock is free."""
        self.pause = min(self.pause * 1.5, 1.0 if self.is_overdue else 0.05)
        try:
            if time.monotonic() < self.snapshot_at and self.is_unchanged():
                return False
            remaining = self.signal_processes(snapshot)
            if not remaining:
                return True
            reason = f"cannot be ended ({', '.join(map(str, remaining))})"
        except OSError as error:
            reason = f"cannot be found: {error.strerror}"
        if self.is_overdue:
            name = printable(self.job.id)
            self.notices.report(f"remaining processes of job {name} {reason}", key=self.job.key)
        self.is_waiting = True
        return False

    def is_unchanged(self) -> bool:
        """Tell, cheaply, whether processes that were found are alive, or unknown ones may be."""
        if self.found:
            return SYSTEM.any_alive(self.found)
        return not SYSTEM.is_unlocked(self.run_dir.output_file(self.job))

    def signal_processes(self, snapshot: Callable[[], Any]) -> list[int | str]:
        """Signal the remaining processes and return their pids, "unknown" if not found."""
        if self.output:
            self.output.reopen()
            self.output = None
        trace = self.run_dir.trace(self.job)
        if time.monotonic() >= self.deadline:
            SYSTEM.kill_group(trace)  # at once, however long it takes to find the others
        self.found = SYSTEM.processes(trace, snapshot())
        now = time.monotonic()
        if now >= self.deadline:
            SYSTEM.kill(trace, self.found)
        else:
            SYSTEM.terminate(trace, [pid for pid in self.found if pid not in self.asked])
        self.asked.update(self.found)
        self.snapshot_at = now + self.INTERVAL
        if now < self.deadline:
            self.snapshot_at = min(self.snapshot_at, self.deadline)
        return [*self.found] if self.found or SYSTEM.is_unlocked(trace.lock_path) else ["unknown"]

    @property
    def is_overdue(self) -> bool:
        """Whether processes have outlived KILL by a second: they must delay no stop."""
        return time.monotonic() > self.deadline + 1


class Supervisor(Protocol):
    """The part of a worker's link to its pool that an attempt uses."""

    notices: Notices
    stopping: bool  # it is time to leave

    def wait(self, until: float, child: Any = None, streams: Iterable[Any] = ()) -> None: ...


class Execution:
    """One attempt of a job. `wanted_end` returns how the operator wants it to end, if at all."""

    MISSING: End = "exited"  # the end of an attempt whose program is not there
    outcome: Outcome  # once it has ended
    is_over = True  # False where the worker had to leave before all processes had ended

    def __init__(
        self,
        claim: Claim,
        ledger: Ledger,
        link: Supervisor,
        wanted_end: Callable[[Job], End | None],
    ) -> None:
        self.claim = claim
        self.job = claim.job
        self.settings = claim.settings
        self.run_dir = ledger.db.run_dir
        self.clock = ledger.clock
        self.link = link
        self.wanted_end = wanted_end
        self.output: Output | None = None
        self.started = self.clock()

    def launch(self, env: Mapping[str, str]) -> Any:
        """Start the job and return its process; None if that was impossible."""
        stdin = self.run_dir.file(self.job.locked_by, "stdin")
        try:
            if self.claim.stdin:  # a file, since a pipe has a writer who may have to wait
                with open(stdin, "wb", opener=open_own) as file:
                    file.write(self.claim.stdin)
            self.output = Output(self.run_dir.file(self.job.seq, self.job.run, "out"))
            return self.start(env, self.output, stdin if self.claim.stdin else os.devnull)
        except OSError as error:
            name = os.fsdecode(error.filename or "")
            reason = f"{error.strerror}: {name}" if name else error.strerror
            end = self.MISSING if error.errno in (errno.ENOENT, errno.EACCES) else "exited"
            if self.output is None or error.errno in EXHAUSTED:
                end = "unstarted"
        except Fault as error:
            reason = str(error)
            end = "unstarted"
        finally:
            if self.claim.stdin:
                with contextlib.suppress(OSError):  # Windows removes it when the job closes it
                    os.unlink(stdin)
        self.outcome = Outcome(end, self.started, self.clock(), None, f"cannot start: {reason}")
        return None

    def start(self, env: Environ, output: Output, stdin: str) -> Any:
        argv = (*self.settings["shell"], self.job.command)
        return SYSTEM.launch(argv, self.job.cwd, env, output.fd, self.run_dir.path, stdin)

    def finish(self, child: Any) -> None:
        end, error = self.watch(child)
        if error or child.returncode:  # another attempt may follow
            self.is_over = self.end_processes(child)
        if self.is_over:
            SYSTEM.release(child)
        code = child.returncode
        self.conclude(end, code, error or explain_exit(code))

    def conclude(self, end: End, code: int | None, error: str | None) -> None:
        finished = max(self.started, self.clock())
        tail = self.output.tail(self.settings["output_limit"]) if self.output else (0, b"")
        self.outcome = Outcome(end, self.started, finished, code, error, *tail)

    def limit_time(self) -> None:
        """Begin the time that the attempt may take."""
        timeout = self.settings["timeout"] if self.job.timeout is None else self.job.timeout
        self.deadline = time.monotonic() + timeout if timeout else NEVER
        self.late: tuple[End, str] = "timed out", f"timed out after {format_duration(timeout)}"

    def is_running(self, child: Any) -> bool:
        return child.poll() is None

    def wait(self, until: float, child: Any) -> None:
        self.link.wait(until, child)

    def watch(self, child: Any) -> tuple[End, str | None]:
        self.limit_time()
        pause = 0.01
        while self.is_running(child):
            now = time.monotonic()
            if end := self.wanted_end(self.job):
                return end, f"{'stopped' if end == 'released' else end} by the operator"
            if now >= self.deadline:
                return self.late
            self.wait(min(self.deadline, now + pause), child)
            if self.output and time.monotonic() > now + pause:
                trimmed = self.output.trim(self.settings["output_limit"])
                pause = 0.01 if trimmed else min(pause * 2, 0.1)
        return "exited", None

    def termination(self, _child: Any) -> Termination:
        grace = self.settings["kill_grace"]
        return Termination(self.job, self.run_dir, grace, self.link.notices, self.output)

    def end_processes(self, child: Any) -> bool:
        """End the remaining processes; return False where some remain and it is time to leave."""
        ending = self.termination(child)
        while not ending.step() or child.poll() is None:
            if ending.is_overdue and self.link.stopping:
                return False
            self.wait(time.monotonic() + ending.pause, child)
        return True


# Launchers. An engine such as Slurm or ssh runs the job in a wrapper, which needs only sh at the
# far end. The exit code of the engine's client proves nothing, so the wrapper reports on stderr,
# marked with a nonce, that it has started, and the exit code of the job. Its stdin is a lifeline.
# The size of the job's stdin, followed by the job's stdin, lets the job begin; TERM or the end of
# file ends the process group of the job. A wrapper that the engine ends reports no exit code.

WRAPPER = r"""
_nonce=$1 _grace=$2 _cwd=$3 _command=$4
shift 4
_tell() { printf '@%s %s\n' "$_nonce" "$*" >&2; }
_send() { kill "-$1" "-$_child" 2>/dev/null || kill "-$1" "$_child" 2>/dev/null; }
_nap() { sleep 0.1 2>/dev/null && _left=$((_left - 1)) || { sleep 1; _left=$((_left - 10)); }; }
_end() {
  trap '' TERM HUP INT USR1
  _left=${_grace}0
  _send TERM
  _send CONT
  while [ "$_left" -gt 0 ] && _send 0; do _nap; done
  _send KILL
}
_become() { # the last two words are the session's program, if any, and the command
  exec 3<&- 4<&-
  while [ $# -gt 2 ]; do
    case ${1%%=*} in
    '' | [0-9]* | *[!A-Za-z0-9_]*) ;; # no shell passes it on
    *) command export "$1" 2>/dev/null ;;
    esac
    shift
  done
  exec ${1:+"$1"} sh -c "$2"
}
_watch() {
  while IFS= read -r _line <&3 && [ "$_line" != TERM ]; do :; done
  _end
  exit 0
}
_main() {
  exec 4<&0
  (set -m) 2>/dev/null && set -m 2>/dev/null # each child in a process group of its own
  _session=
  case $- in *m*) ;; *) command -v setsid >/dev/null && _session=setsid ;; esac
  _lost=
  trap '_lost=1; _end &' TERM HUP INT
  (trap - TERM HUP INT; _become "$@" "$_session" "$_command") <&4 &
  _child=$!
  _watch </dev/null &
  _watcher=$!
  while wait "$_child"; _code=$?; kill -0 "$_child"; do _left=0; _nap; done 2>/dev/null
  [ "$_code" -lt 256 ] || _code=$((_code - 128)) # ksh
  kill -USR1 "$_watcher" 2>/dev/null # ignored while it ends the job
  wait "$_watcher" 2>/dev/null || [ "$_code" = 0 ] || _end
  [ -n "$_lost" ] || _tell exit "$_code"
  exit "$_code"
}
exec 3<&0
_tell start "$(uname -n 2>/dev/null || echo unknown)" $$
IFS= read -r _size && [ "$_size" != TERM ] || exit 1
cd -- "$_cwd" 2>/dev/null || { _tell exit nodir; exit 1; }
if [ "$_size" -gt 0 ]; then
  _input=$(dd ibs=1 count="$_size" 2>/dev/null; printf .)
  printf %s "${_input%.}" | _main "$@"
else
  _main "$@" </dev/null
fi
"""


def client_directory(job: Job) -> str:
    """Return the directory for a launcher's programs: the job's, if it exists here."""
    return job.cwd if os.path.isdir(job.cwd) else os.sep


class ReportStream:
    """An output stream of a client, without the reports of the wrapper in it."""

    def __init__(self, fd: int, nonce: str) -> None:
        os.set_blocking(fd, False)  # pyright: ignore[reportAttributeAccessIssue]
        self.file = open(fd, "rb", buffering=0)  # noqa: SIM115
        self.start = f"@{nonce} ".encode()
        forms = rb"(?:(start) ([^\s@]{1,255}) \d+|(exit) (\d{1,3}|nodir))\r?\n"
        self.report = re.compile(self.start + forms)
        self.part = b""  # the beginning of a report, unless more output disproves that

    def read(self) -> tuple[bytes, list[list[bytes]]] | None:
        """Return output and reports, None where nothing has arrived; close it at its end."""
        chunk = self.file.read(1 << 16)
        if chunk is None:
            return None
        if not chunk:
            self.file.close()
            return self.part, []
        data = self.part + chunk
        reports = [list(filter(None, found.groups())) for found in self.report.finditer(data)]
        data = self.report.sub(b"", data)  # a report has less than 400 bytes
        tail = data[data.rfind(b"@") :] if b"@" in data[-400:] else b""
        is_begun = tail.startswith(self.start) and b"\n" not in tail
        self.part = tail if is_begun or self.start.startswith(tail) else b""
        return data[: len(data) - len(self.part)], reports


# Runs a command and prints its exit code last, since that of a child may be lost: where SIGCHLD is
# ignored, the system forgets it.
PRINT_CODE = ("sh", "-c", '"$@"; printf "\\n%s" "$?"', "sh")


class FarEnd:
    """Runs launcher_cancel, to make sure that an attempt whose client is gone is over elsewhere.

    Without that command, the wrapper is trusted to end the job within the grace period.
    """

    LIMIT = 10.0  # seconds that the command may take

    def __init__(self, job: Job, ledger: Ledger, notices: Notices) -> None:
        self.job = job
        self.ledger = ledger
        self.notices = notices
        self.facts = job.launched
        self.process: Any = None
        self.due = 0.0  # when the job is over, the command must have ended, or it is tried again
        self.pause = 1.0  # seconds before the next try
        self.has_failed = False

    def step(self) -> bool:
        """Return whether the attempt is over for sure."""
        now = time.monotonic()
        if not self.facts.get("cancel"):
            self.due = self.due or now + self.facts["grace"] + 1
            return now >= self.due
        if self.has_failed and self.is_forgotten():
            if self.process:
                kill_session(self.process)
            return True
        if self.process:
            return self.check(now)
        if now >= self.due:
            self.start(now)
        return False

    def start(self, now: float) -> None:
        import subprocess
        import tempfile

        self.due = now + self.LIMIT
        argv = (*PRINT_CODE, *self.facts["cancel"])
        cwd = client_directory(self.job)
        try:
            self.said = tempfile.TemporaryFile()  # noqa: SIM115
            streams: Any = {"stdin": subprocess.DEVNULL, "stdout": self.said, "stderr": self.said}
            self.process = subprocess.Popen(argv, cwd=cwd, **streams, **SYSTEM.BACKGROUND)
        except OSError as error:
            self.fail(str(error))

    def check(self, now: float) -> bool:
        """Return whether the command has succeeded."""
        is_late = self.process.poll() is None
        if is_late and now < self.due:
            return False
        if is_late:
            kill_session(self.process)
        self.process = None
        with self.said:
            text = last_bytes(self.said.fileno(), 1 << 12)[1].decode(errors="replace")
        said, _, code = text.rpartition("\n")
        reason = explain_exit(int(code)) if code.isdecimal() else "it was killed"
        if is_late:
            reason = f"did not end within {format_duration(self.LIMIT)}"
        if reason:
            self.fail(": ".join(filter(None, (reason, last_line(said)))))
        return not reason

    def fail(self, reason: str) -> None:
        """Report a failure, record it for `status`, and try again after a growing pause."""
        command = quoted(join_words(self.facts["cancel"]))
        where = "on " + self.facts["host"] if "host" in self.facts else "elsewhere"
        trouble = f"may still run {where}: launcher_cancel ({command}) failed: {reason}"
        self.has_failed = True
        self.due = time.monotonic() + self.pause
        self.pause = min(self.pause * 2, 60.0)
        with contextlib.suppress(Fault):
            self.ledger.note_launch(self.job, {**self.facts, "trouble": trouble})
        text = f"job {printable(self.job.id)} {trouble}; trying again"
        self.notices.report(text, key=f"{self.job.key} launcher_cancel")

    def is_forgotten(self) -> bool:
        """Tell whether the operator (`cancel --gone`) or another pool has settled the attempt."""
        with contextlib.suppress(Fault):
            stored = self.ledger.reader.by_seq(self.job.seq)
            return stored is None or stored.key != self.job.key or not stored.launch
        return False


class RemoteTermination(Termination):
    """The end of an attempt's client here, and then of its job elsewhere."""

    def __init__(self, *args: Any, ledger: Ledger) -> None:
        super().__init__(*args)
        self.far_end = FarEnd(self.job, ledger, self.notices)
        self.is_client_gone = False

    def step(self, snapshot: Callable[[], Any] = SYSTEM.snapshot) -> bool:
        """End the client, and then the job; return whether both are gone."""
        self.is_client_gone = self.is_client_gone or super().step(snapshot)
        if not self.is_client_gone:
            return False
        self.pause = 1.0 if self.far_end.has_failed else 0.05
        return self.far_end.step()

    @property
    def is_overdue(self) -> bool:
        return self.far_end.has_failed or (not self.is_client_gone and super().is_overdue)


class RemoteExecution(Execution):
    """One attempt of a job that a launcher's client runs elsewhere."""

    MISSING: End = "not launched"

    def __init__(self, claim: Claim, ledger: Ledger, *args: Any) -> None:
        super().__init__(claim, ledger, *args)
        self.ledger = ledger
        self.nonce = os.urandom(16).hex()
        cancel = fill_in(self.settings["launcher_cancel"], self.job)
        self.grace = math.ceil(self.settings["kill_grace"])
        self.facts: dict[str, Any] = {"cancel": cancel, "grace": self.grace}
        self.has_begun = False  # the job, when the place of its start has been recorded
        self.may_begin = True
        self.to_send = b""
        self.lifeline: IO[bytes] | None = None
        self.streams: list[ReportStream] = []
        self.result = b""  # an exit code, or "nodir", as reported by the wrapper

    def words(self, env: Environ) -> list[bytes]:
        """Return the command line of the client, as UTF-8 whatever the locale here."""
        command = self.job.command
        if self.settings["shell"] != DEFAULT_SHELL:
            command = "exec " + shlex.join([*self.settings["shell"], command])
        words = ["sh", "-c", WRAPPER, "queuectl", self.nonce, str(self.grace), self.job.cwd]
        words.append(command)
        words += (f"{name}={value}" for name, value in env.items())
        if self.settings["launcher_quote"] == "yes":
            words = [shlex.join(words)]
        words = [*fill_in(self.settings["launcher"], self.job), *words]
        return [word.encode(errors="surrogateescape") for word in words]

    def start(self, env: Environ, output: Output, stdin: str) -> Any:  # noqa: ARG002
        self.ledger.db.set_synchronous("full")  # after a power cut here, it may still run there
        if not self.ledger.note_launch(self.job, self.facts, is_first=True):
            raise Fault("its claim was lost")
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            ours.callback(self.close)
            given, lifeline = os.pipe()
            theirs.callback(os.close, given)
            os.set_blocking(lifeline, False)  # pyright: ignore[reportAttributeAccessIssue]
            self.lifeline = open(lifeline, "wb", buffering=0)  # noqa: SIM115
            ends = [given]
            for _ in range(2):
                reader, writer = os.pipe()
                theirs.callback(os.close, writer)
                self.streams.append(ReportStream(reader, self.nonce))
                ends.append(writer)
            args = (client_directory(self.job), env, output.fd, self.run_dir.path, ends)
            child = SYSTEM.launch(self.words(env), *args)
            ours.pop_all()
            return child

    def close(self) -> None:
        for stream in self.streams:
            stream.file.close()
        if self.lifeline:
            self.lifeline.close()

    def limit_time(self) -> None:
        """Begin the time to wait for a place; the attempt's begins when the wrapper starts."""
        limit = self.settings["launch_timeout"]
        self.deadline = time.monotonic() + limit if limit else NEVER
        self.late = "not launched", f"not launched: no place within {format_duration(limit)}"

    def is_running(self, child: Any) -> bool:
        return child.poll() is None and not self.result

    def wait(self, until: float, child: Any) -> None:
        self.link.wait(until, child, [stream.file for stream in self.streams])
        self.pump()

    def wait_while(self, fact: Callable[[Any], bool], child: Any, limit: float) -> None:
        deadline = time.monotonic() + limit
        while fact(child) and time.monotonic() < deadline:
            self.wait(min(deadline, time.monotonic() + 0.1), child)

    def pump(self) -> None:
        """Pass on input and output, and note the reports in it."""
        for stream in list(self.streams):
            for _ in range(16):  # at most 1 MiB: nothing else must have to wait
                found = None if stream.file.closed else stream.read()
                if found is None:
                    break
                self.keep(found[0])
                for report in found[1]:
                    self.note(*report)
        self.streams = [stream for stream in self.streams if not stream.file.closed]
        if "host" in self.facts and self.may_begin:
            self.begin()
        if self.to_send and self.lifeline and not self.lifeline.closed:
            with contextlib.suppress(OSError):  # the client has ended
                self.to_send = self.to_send[self.lifeline.write(self.to_send) or 0 :]

    def begin(self) -> None:
        """Record where the job starts, and then let it: without a record, it has not run."""
        with contextlib.suppress(Fault):  # the next call tries again
            self.has_begun = self.ledger.note_launch(self.job, self.facts)
            self.may_begin = False
        if self.has_begun:
            self.to_send = b"%d\n%b" % (len(self.claim.stdin), self.claim.stdin)

    def keep(self, text: bytes) -> None:
        if not self.output:
            return
        with contextlib.suppress(OSError):  # a full disk
            while text:
                text = text[os.write(self.output.fd, text) :]
        self.output.bytes_dropped += len(text)
        self.output.trim(self.settings["output_limit"])

    def note(self, kind: bytes, value: bytes = b"") -> None:
        if kind == b"start" and "host" not in self.facts:
            self.facts["host"] = printable(value.decode(errors="replace"))
            self.started = self.clock()
            super().limit_time()
        elif kind == b"exit":
            self.result = self.result or value

    def finish(self, child: Any) -> None:
        end, error = self.watch(child)
        self.may_begin = False
        self.pump()
        if error and self.has_begun:
            self.to_send += b"TERM\n"
            self.wait_while(self.is_running, child, self.grace + 2)
        if self.result:
            self.wait_while(super().is_running, child, 1.0)  # then it is ended
        if self.lifeline:
            self.lifeline.close()
        if error or self.result != b"0" or child.poll() is None:
            self.is_over = self.end_processes(child)
        self.pump()
        self.close()
        code = int(self.result) if self.result.isdigit() else None
        self.conclude(*((end, code, error) if error else self.judge(code, child.poll())))

    def termination(self, child: Any) -> Termination:
        code = child.poll()
        has_exited = code is not None and code >= 0  # so it left nothing behind in its engine
        if self.result or (has_exited and not self.has_begun):
            return super().termination(child)
        job = self.job._replace(launch=json.dumps(self.facts))
        args = (job, self.run_dir, self.settings["kill_grace"], self.link.notices, self.output)
        return RemoteTermination(*args, ledger=self.ledger)

    def judge(self, code: int | None, client: int | None) -> tuple[End, int | None, str | None]:
        """Return how the attempt ended, from the reports; the client's exit code is a hint."""
        host = self.facts.get("host")
        if code is not None:
            return "exited", code, explain_exit(code)
        if self.result:
            return "exited", None, f"cannot start: no directory {quoted(self.job.cwd)} on {host}"
        how = explain_exit(client or 0) or "exit code 0"
        reason = f"{self.settings['launcher'][0]} ended ({how})"
        if self.has_begun:
            return "crashed", None, f"lost on {host}: {reason} without a result"
        output = self.output.tail(1 << 12)[1] if self.output else b""
        said = last_line(output.decode(errors="replace"))
        return "not launched", None, ": ".join(filter(None, ("not launched", reason, said)))


def keep_result(run_dir: RunDirectory, job: Job, outcome: Outcome, output: Output) -> None:
    """Keep a result that cannot be stored in the output's name: a full disk can rename files."""
    from base64 import urlsafe_b64encode

    error = outcome.error and ascii(outcome.error)[1:-1][:50]  # a name has at most 255 bytes
    facts = json.dumps([*outcome[:4], error, output.bytes_dropped])
    kept = urlsafe_b64encode(facts.encode()).decode()
    with contextlib.suppress(OSError):  # then the attempt counts as crashed
        os.close(output.fd)  # Windows does not rename open files
        os.rename(output.path, run_dir.file(job.seq, job.run, "kept", kept))


def kept_result(run_dir: RunDirectory, job: Job) -> Outcome | None:
    """Return the result that a dead worker kept, without the output; None if there is none."""
    from base64 import urlsafe_b64decode

    for name in run_dir.attempt_files(job):
        kept = name.partition(".kept.")[2]
        with contextlib.suppress(ValueError, TypeError):  # it is not one of ours
            end, started, finished, code, error, dropped = json.loads(urlsafe_b64decode(kept))
            return Outcome(end, float(started), float(finished), code, error, int(dropped))
    return None


# --- worker: the process that runs one job at a time ----------------------------------------------

BATCH = 0.04  # seconds for which news, syncs and polls are collected if they are not urgent
AGAIN = 0.25  # seconds before the second try of something that failed, doubled each time up to 4


class News(NamedTuple):
    """A message of a worker to its pool: its state, or an event. "damaged" ends the pool."""

    kind: Literal["idle", "busy", "left", "damaged", "event"]
    text: str = ""  # a line for people
    state: str = ""  # of the job that an event is about
    when: float = 0.0  # on the monotonic clock
    seq: int = 0  # of the job whose attempt has ended


class Channel:
    """One end of the pipe between a pool and a worker, which send each other JSON lists.

    The pool's end never blocks: its few requests fit into the buffer.
    """

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self.part = b""  # of a line whose rest has not arrived

    def write(self, *words: object) -> None:
        """Send a list, as a line; raise OSError if the other end is gone or does not read."""
        data = json.dumps(words).encode() + b"\n"
        if WINDOWS:
            self.pipe.send_bytes(data)
            return
        while data:
            data = data[os.write(self.pipe.fileno(), data) :]

    def read(self) -> list[Any]:
        """Return the complete lists that have arrived; raise EOFError or OSError at the end."""
        data = self.pipe.recv_bytes() if WINDOWS else os.read(self.pipe.fileno(), 65536)
        if not data:
            raise EOFError
        *lines, self.part = (self.part + data).split(b"\n")
        return [json.loads(line) for line in lines]


class PoolLink(Channel):
    """A worker's end of the pipe to its pool, and the one place where the worker waits."""

    def __init__(self, pipe: Pipe) -> None:
        super().__init__(pipe)
        self.wakeup = SYSTEM.make_wakeup()  # written to by signals, SIGCHLD among them
        self.notices = Notices(lambda text: self.send(News("event", text)))
        self.stopping = False  # claim no more jobs
        self.ending = False  # end the running job too
        self.orphaned = False  # the pool is gone: its end of the pipe is closed
        self.cancelled = ""  # the key of the attempt to cancel
        self.outbox: list[News] = []
        self.flush_at = NEVER

    def send(self, news: News, within: float = 0.0) -> None:
        """Send news to the pool, within a number of seconds."""
        self.outbox.append(news)
        self.flush_at = min(self.flush_at, time.monotonic() + within)
        self.flush()

    def flush(self) -> None:
        if time.monotonic() >= self.flush_at:
            self.flush_at = NEVER
            with contextlib.suppress(OSError):  # the pool is gone, which the next wait notices
                self.write(*self.outbox)
            self.outbox.clear()

    def receive(self) -> None:
        try:
            while not self.orphaned and self.pipe.poll():
                for request in self.read():
                    self.obey(*request)
        except (EOFError, OSError):  # the worker finishes its job and exits
            self.orphaned = True
            self.stopping = True

    def obey(self, request: Literal["go", "stop", "now", "cancel"], key: str = "") -> None:
        """Obey one request; "go" only wakes the worker."""
        self.stopping |= request in ("stop", "now")
        self.ending |= request == "now"
        if request == "cancel":
            self.cancelled = key

    def wait(self, until: float = NEVER, child: Any = None, streams: Iterable[Any] = ()) -> None:
        """Wait for a child's end, the pool, a stream, or a time on the monotonic clock."""
        self.flush()
        until = min(until, self.flush_at)
        limit = None if until == NEVER else max(0.0, until - time.monotonic())
        if self.orphaned and limit is None:
            return  # it is time to leave
        pipe = None if self.orphaned else self.pipe
        if self.pipe in SYSTEM.wait((self.wakeup, pipe, *streams), child, limit):
            self.receive()


class Worker:
    """A process that claims a job, runs it, records how it ended, and claims the next one."""

    def __init__(
        self, pipe: Pipe, path: str, name: str, slot: int, queues: Sequence[str], *, insecure: bool
    ) -> None:
        self.ledger = Queue(path, create=False, insecure=insecure)._ledger
        self.db = self.ledger.db
        self.run_dir = self.db.run_dir
        self.name = name
        self.slot = slot
        self.queues = queues
        self.link = PoolLink(pipe)
        self.pause = AGAIN
        self.lock_file = LockFile(self.run_dir.file(name))  # shows that this worker is alive
        self.lock_file.write_note(pid=os.getpid(), slot=slot)
        handle_signals(ignore_signal, self.link.wakeup, worker=True)
        self.db.set_synchronous(self.ledger.reader.settings()["synchronous"])
        self.db.keep_waiting = self.keep_waiting

    def keep_waiting(self, waited: float) -> bool:
        if waited > 0.3:  # before that, asking the pool costs more than another try
            self.link.receive()
        if waited > 5:
            text = f"{self.db.path} has been locked by another program for 5 s; waiting"
            self.link.notices.report(text)
        return waited <= 0.3 or not self.link.stopping

    def main(self) -> None:
        ended: Execution | None = None  # while its result cannot be recorded, nothing is claimed
        self.link.receive()  # it may be time to leave already
        while ended.is_over if ended else not self.link.stopping:
            try:
                claim = self.record(ended) if ended else self.claim()
            except Fault as error:
                if isinstance(error, Damaged):  # no retry cures it
                    self.link.send(News("damaged", str(error)))
                    self.link.stopping = True
                if self.link.stopping:
                    break
                task = f"record how job {ended.job.id} ended" if ended else "claim a job"
                self.link.notices.report(f"cannot {task}: {error}; trying again", key=task)
                self.back_off()
                continue
            unstarted = ended and ended.outcome.end == "unstarted"
            ended = self.run(claim) if claim else None
            if unstarted:
                self.back_off()
            elif not ended and not self.link.stopping:
                self.note_success()
                self.link.send(News("idle"))
                self.link.wait()
        if ended and ended.output:  # for the pool that recovers the job
            keep_result(self.run_dir, ended.job, ended.outcome, ended.output)
        self.link.send(News("left"))
        self.lock_file.close()

    def claim(self) -> Claim | None:
        if claim := self.ledger.claim(self.name, self.queues):
            self.link.send(News("busy"))
        return claim

    def back_off(self) -> None:
        until = time.monotonic() + self.pause
        self.pause = min(self.pause * 2, 4.0)
        while time.monotonic() < until and not self.link.stopping:
            self.link.wait(until)

    def note_success(self) -> None:
        self.link.notices.reported.clear()
        self.pause = AGAIN

    def run(self, claim: Claim) -> Execution:
        job = claim.job
        is_here = job.notifies or not claim.settings["launcher"]  # the engine may be down
        kind = Execution if is_here else RemoteExecution
        execution = kind(claim, self.ledger, self.link, self.wanted_end)
        if child := execution.launch(self.environment(claim)):
            self.note_success()
            note = {"key": job.key, "leader": child.pid, "namespace": pid_namespace()}
            note["launched"] = execution.started
            self.lock_file.write_note(pid=os.getpid(), slot=self.slot, **note)
            execution.finish(child)
        elif execution.outcome.end == "unstarted":
            text = f"job {printable(job.id)} {execution.outcome.error}; trying again"
            self.link.notices.report(text, key=f"{job.id} unstarted")
        return execution

    def environment(self, claim: Claim) -> dict[str, str]:
        job = claim.job
        return {
            **json.loads(job.env or "{}"),
            "QUEUECTL_JOB_ID": job.id,
            "QUEUECTL_ATTEMPT": str(job.attempts),
            "QUEUECTL_WORKER": str(self.slot),
            "QUEUECTL_DB": self.db.path,
            "QUEUECTL_PARENTS": claim.parents if len(claim.parents) <= PARENTS_LIMIT else "",
            "QUEUECTL_RUN": self.run_dir.run_token(job),
        }

    def wanted_end(self, job: Job) -> End | None:
        if self.link.orphaned:  # look for the requests that the pool would have passed on
            if self.run_dir.stop_requested(pool_of(self.name)) == "now":
                self.link.obey("now")
            with contextlib.suppress(QueueError):
                stored = self.ledger.reader.by_seq(job.seq)
                if stored and stored.cancel_requested:
                    self.link.obey("cancel", job.key)
        if self.link.ending:
            return "released"
        return "cancelled" if job.key == self.link.cancelled else None

    def record(self, ended: Execution) -> Claim | None:
        outcome = ended.outcome
        unstarted = outcome.end == "unstarted"
        self.db.set_synchronous("full" if self.link.orphaned else ended.settings["synchronous"])
        when = time.monotonic()  # before the jobs that wait for this one can start
        next_from = None if self.link.stopping or unstarted else self.queues
        after, claim = self.ledger.finish(ended.job, outcome, next_from)
        if ended.output:
            with contextlib.suppress(OSError):
                ended.output.close()
        state = state_to_report(after)
        if not (unstarted and state == PENDING):  # else it was reported when it happened
            text = describe_end(ended.job, after, outcome)
            if outcome.end == "not launched":
                with contextlib.suppress(Fault):  # else the claim would be forgotten
                    hold = self.ledger.reader.hold(ended.job.queue)
                    text += f"; {hold}" if hold else ""
            self.link.send(News("event", text, state, when, ended.job.seq), within=BATCH)
        return claim


def begin_worker(pipe: Pipe) -> None:
    """Run the worker that a pool asks for, in its environment: a worker process starts here."""
    try:
        environ, worker, insecure = pipe.recv()
    except EOFError:  # the pool is gone already
        return
    os.environ.clear()
    os.environ.update(environ)
    try:
        os.chdir(RunDirectory(worker[0]).path)
        Worker(pipe, *worker, insecure=insecure).main()
    except (QueueError, OSError) as error:
        kind: Literal["damaged", "event"] = "damaged" if isinstance(error, Damaged) else "event"
        with contextlib.suppress(OSError):
            Channel(pipe).write(News(kind, f"{worker[1]} cannot continue: {error}"))


# --- pool: the process that starts workers and recovers the jobs of dead ones ---------------------

LARGEST_WAL = 16 << 20  # bytes; SQLite lets the -wal grow as long as there is always a reader
MAX_DEATHS = 5  # of workers without a job, in a minute: then something is wrong with the machine
PROMPT = 0.25  # seconds in which an idle worker answers a request, unless it is stopped
STARTING = threading.Lock()  # all pools of a process share a fork server


def ignore(*_: object) -> None:
    """Ignore an event line, or a turn of the pool."""


class PoolOptions(NamedTuple):
    """The options of a pool; `work` documents them."""

    size: int = 1
    queues: Sequence[str] = ()
    drain: bool = False
    horizon: float = LONGEST
    insecure: bool = False
    signals: bool = False
    say: Callable[[str], None] = ignore
    tick: Callable[[], None] = ignore
    name: str = ""
    ended: Callable[[int, str], None] = ignore


class Agenda:
    """When each step of a pool is due, on the monotonic clock. The steps keep their order."""

    def __init__(self, *steps: Callable[[], None]) -> None:
        self.due = dict.fromkeys(steps, NEVER)

    def set(self, step: Callable[[], None], seconds: float) -> None:
        self.due[step] = time.monotonic() + seconds

    def within(self, step: Callable[[], None], seconds: float) -> None:
        """Make a step due in `seconds`, unless it is due earlier."""
        self.due[step] = min(self.due[step], time.monotonic() + seconds)

    def take(self) -> Iterator[Callable[[], None]]:
        for step in self.due:
            if self.due[step] <= time.monotonic():
                self.due[step] = NEVER
                yield step

    def pause(self) -> float:
        return max(0.0, min(self.due.values()) - time.monotonic())


class PoolFiles:
    """The files of a pool in the run directory, and those that must not be moved or replaced."""

    def __init__(self, db: Database, options: PoolOptions, clock: Callable[[], float]) -> None:
        self.run_dir = db.run_dir
        self.run_dir.make()  # the database may have been copied here
        self.name = options.name or new_pool_name()
        with contextlib.ExitStack() as stack:
            self.lock_file = LockFile(self.run_dir.file(self.name))  # shows that this pool is alive
            stack.callback(self.lock_file.close)
            stack.callback(self.remove_requests)
            facts = {"pid": os.getpid(), "started": clock(), "count": options.size}
            self.lock_file.write_note(**facts, queues=list(options.queues))
            lock = os.fstat(self.lock_file.fd)
            self.watched = {db.path: os.stat(db.path), self.lock_file.path: lock}
            self.wakeup = SYSTEM.make_wakeup(self.run_dir.file(self.name, "fifo"))
            if self.wakeup:
                stack.callback(self.wakeup.close)
            self.close = stack.pop_all().close

    def remove_requests(self) -> None:
        for item in self.run_dir.files(self.name + "."):
            with contextlib.suppress(OSError):
                os.unlink(self.run_dir.file(item))


def start_worker(*worker: Any, insecure: bool) -> tuple[Any, Any]:
    """Start the process of a worker; return it and our end of the pipe to it."""
    from multiprocessing import Pipe

    ours, theirs = Pipe()
    try:
        with theirs, STARTING:
            process = SYSTEM.start_worker(theirs)
        ours.send((dict(os.environ), worker, insecure))
    except BaseException:
        ours.close()
        raise
    return process, ours


class WorkerHandle(Channel):
    """A worker as its pool sees it. Nothing here waits for the worker, which may be stopped."""

    def __init__(self, name: str, slot: int, process: Any, pipe: Pipe) -> None:
        super().__init__(pipe)
        self.name = name
        self.slot = slot
        self.process = process
        self.state: WorkerState = "busy"  # a new worker looks for a job by itself
        self.answer_by = NEVER  # when an answer is overdue, on the monotonic clock
        self.cancelled = ""  # the key of the attempt that it was asked to cancel
        if sys.platform != "win32":
            os.set_blocking(pipe.fileno(), False)

    def send(self, *request: str) -> None:
        """Make a request, which a worker that is gone does not receive."""
        if self.state in ("idle", "notified"):
            self.answer_by = min(self.answer_by, time.monotonic() + PROMPT)
        with contextlib.suppress(OSError):
            self.write(*request)


class Crew:
    """The workers of a pool: start the missing ones, wake idle ones, remove dead ones."""

    def __init__(
        self, files: PoolFiles, options: PoolOptions, notices: Notices, fail: Callable[[Fault], Any]
    ) -> None:
        self.files = files
        self.options = options
        self.notices = notices
        self.fail = fail  # ends the pool where it makes no sense to start workers
        self.workers: list[WorkerHandle] = []
        self.started = 0
        self.start_at = 0.0  # when workers may be started again, on the monotonic clock
        self.thread = threading.Thread()  # starts workers, and notes its troubles
        self.troubles: collections.deque[str] = collections.deque()
        self.mode: StopMode = ""
        self.leave_by = NEVER  # do not wait longer for the thread; 0.0 once the pool has left
        self.deaths: list[float] = []  # of workers without a job
        self.maybe_work = True  # there may be ready jobs for which no worker was woken

    def states(self) -> list[WorkerState]:
        return [worker.state for worker in self.workers]

    def start_missing(self) -> None:
        """Start the missing workers in a thread, because the process that forks them may hang."""
        now = time.monotonic()
        if self.mode or self.thread.is_alive() or now < self.start_at:
            return
        slots = sorted({*range(1, self.options.size + 1)} - {it.slot for it in self.workers})
        if not slots:
            return
        if self.started:  # replacements singly
            self.start_at = now + 1
            slots = slots[:1]
        self.thread = threading.Thread(target=self.start_workers, args=(slots,), daemon=True)
        try:
            self.thread.start()
        except RuntimeError:  # no more threads
            self.note_trouble(os.strerror(errno.EAGAIN))

    def start_workers(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self.started += 1
            name = worker_name(self.files.name, self.started)
            worker = (self.files.run_dir.db, name, slot, self.options.queues)
            try:
                process, pipe = start_worker(*worker, insecure=self.options.insecure)
                self.add(WorkerHandle(name, slot, process, pipe))
            except EOFError:
                self.note_trouble("its fork server died")
            except (OSError, ImportError) as error:  # the machine is at its limit
                # Not the error: its traceback would keep descriptors open.
                self.note_trouble(getattr(error, "strerror", None) or str(error))
            self.files.run_dir.notify()
            if self.mode:
                break

    def note_trouble(self, reason: str) -> None:
        self.troubles.append(reason)
        self.start_at = time.monotonic() + 1

    def add(self, worker: WorkerHandle) -> None:
        """Add a worker, though the pool may be stopping or have left meanwhile."""
        self.workers.append(worker)
        if self.mode:
            worker.send(self.mode)
        if not self.leave_by:
            worker.pipe.close()

    def report_troubles(self) -> None:
        while self.troubles:
            trouble = f"a worker cannot be started: {self.troubles.popleft()}"
            self.notices.report(f"{trouble}; trying again")
            if not self.workers:  # without any worker, this cannot last
                self.count_death(trouble)

    def is_alive(self) -> bool:
        is_starting = self.thread.is_alive()  # first: it adds workers until it ends
        return bool(self.workers) or (is_starting and time.monotonic() < self.leave_by)

    def count_death(self, how: str) -> None:
        """Note that a worker died without a job, or could not be started; too many are a fault."""
        now = time.monotonic()
        self.deaths = [then for then in self.deaths if then > now - 60] + [now]
        if len(self.deaths) > MAX_DEATHS:
            self.fail(Fault(f"{how}, {len(self.deaths)} times in a minute"))

    def reap(self, worker: WorkerHandle) -> bool:
        """Remove a worker whose pipe has ended; return whether it died rather than exited."""
        self.workers.remove(worker)
        worker.pipe.close()
        SYSTEM.join(worker.process, 1.0)
        if worker.state == "left":
            return False
        self.maybe_work = True
        return True

    def dispatch(self) -> None:
        """Wake one idle worker if there may be work; once it has claimed some, wake the next."""
        states = self.states()
        if self.maybe_work and "idle" in states and "notified" not in states:
            worker = self.workers[states.index("idle")]
            worker.state = "notified"
            self.maybe_work = False
            worker.send("go")

    def check_answers(self) -> None:
        """Stop waiting for workers that do not answer; they may be stopped."""
        now = time.monotonic()
        for worker in self.workers:
            if worker.state == "notified" and now > worker.answer_by:
                worker.state = "busy"  # once continued, it looks for a job by itself
                self.maybe_work = True
            if now > worker.answer_by + 5:
                self.notices.report(f"{worker.name} does not respond; it may be suspended")

    def cancel(self, claimed: Iterable[Job]) -> None:
        keys = {job.locked_by: job.key for job in claimed if job.cancel_requested}
        for worker in self.workers:
            key = keys.get(worker.name, worker.cancelled)
            if key != worker.cancelled:
                worker.cancelled = key
                worker.send("cancel", key)

    def stop(self, mode: Literal["stop", "now"]) -> None:
        self.mode = mode
        self.leave_by = min(self.leave_by, time.monotonic() + 1)
        for worker in self.workers:
            worker.send(mode)
            SYSTEM.resume(worker.process)

    def close(self) -> None:
        """Close the pipes, which tells the workers that the pool is gone."""
        if self.thread.is_alive():  # else it would be ended in its last steps by the exit
            self.thread.join(min(1.0, max(0.0, self.leave_by - time.monotonic())))
        self.leave_by = 0.0
        for worker in self.workers:
            worker.pipe.close()


class Recovery:
    """Return the jobs of dead workers to the queue, once all their processes are gone."""

    def __init__(self, ledger: Ledger, notices: Notices, report: Callable[..., None]) -> None:
        self.ledger = ledger
        self.run_dir = ledger.db.run_dir
        self.notices = notices
        self.report = report  # is called with a job's state, an event line, and the job's number
        self.orphans: dict[str, tuple[Termination, Outcome | None]] = {}  # by key of the attempt
        self.has_strangers = False  # some jobs belong to workers that are not, or no longer, ours

    def steps(self, claimed: Sequence[Job], ours: set[str | None]) -> Iterator[Callable[[], None]]:
        """Yield the steps of one round, which may fail separately."""
        keys = {job.key for job in claimed}
        self.orphans = {key: orphan for key, orphan in self.orphans.items() if key in keys}
        strangers = [job for job in claimed if job.locked_by not in ours]
        self.has_strangers = bool(strangers)
        for job in strangers:
            yield partial(self.find_orphan, job)
        snapshot = lru_cache(maxsize=None)(SYSTEM.snapshot)  # one for all: their workers are dead
        for key in [*self.orphans]:
            yield partial(self.step, key, snapshot)

    def find_orphan(self, job: Job) -> None:
        """Note a job whose worker is dead, and how to end its remaining processes."""
        if job.key in self.orphans or not self.run_dir.is_unlocked(job.locked_by):
            return
        kept = kept_result(self.run_dir, job)
        if kept and not kept.error:  # it completed: its background processes keep running
            self.requeue(job, kept)
            return
        grace = self.ledger.reader.settings(job.queue)["kill_grace"]
        args = (job, self.run_dir, grace, self.notices, None)
        ending = Termination(*args)
        if job.launch and not (kept and kept.exit_code is not None):  # else it is known to be over
            ending = RemoteTermination(*args, ledger=self.ledger)
        self.orphans[job.key] = (ending, kept)

    def step(self, key: str, snapshot: Callable[[], Any]) -> None:
        """End the remaining processes of a dead worker's job, and then requeue it."""
        ending, kept = self.orphans[key]
        if ending.step(snapshot):
            del self.orphans[key]  # first: a lock of another program must delay no stop
            self.requeue(ending.job, kept)

    def requeue(self, job: Job, kept: Outcome | None) -> None:
        """Record how a dead worker's attempt ended, as kept or in a crash; remove its files."""
        limit = self.ledger.reader.settings(job.queue)["output_limit"]
        then = job.locked_at or 0.0
        now = max(then, self.ledger.clock())
        end: End = "crashed"
        error = "its worker died"
        if job.launch and "host" not in job.launched:
            end = "released"
            error += " before the job started"
        elif job.launch:
            error += f" (lost on {job.host})"
        outcome = kept or Outcome(end, then, now, None, error)
        path = self.run_dir.output_file(job)
        gone = contextlib.suppress(FileNotFoundError)  # another pool was faster
        with gone, open(path, "rb", opener=open_own) as file:
            dropped, output = last_bytes(file.fileno(), limit)
            dropped += outcome.bytes_dropped
            outcome = outcome._replace(bytes_dropped=dropped, output=output)
        after, _ = self.ledger.finish(job, outcome)
        with gone:
            os.unlink(path)
        if after:
            self.report(state_to_report(after), describe_end(job, after, outcome), job.seq)

    def is_ending(self) -> bool:
        return any(it.is_waiting and not it.is_overdue for it, _ in self.orphans.values())


class EventLog:
    """The event lines of a pool, in the order of the events, and the summary at its end."""

    def __init__(self, options: PoolOptions) -> None:
        self.options = options
        self.held: list[tuple[float, str, int, str]] = []  # back, since news may be late
        self.ended: collections.Counter[str] = collections.Counter()  # jobs by their final state

    def add(self, when: float, text: str, seq: int, state: str) -> None:
        self.held.append((when, text, seq, state))
        if state in FINISHED:
            self.ended[state] += 1

    def flush(self, before: float = NEVER) -> None:
        """Print the lines about events before a time."""
        self.held.sort()
        while self.held and self.held[0][0] < before:
            _, text, seq, state = self.held.pop(0)
            self.options.say(text)
            if state in FINISHED:
                self.options.ended(seq, state)

    def say(self, text: str) -> None:
        self.flush()
        self.options.say(text)

    def sum_up(self, seconds: float) -> None:
        words = (*FINISHED, "blocked")
        numbers = [f"{self.ended[word]} {word}" for word in words if self.ended[word]]
        self.say(f"{', '.join(numbers) or 'no jobs ended'} in {format_duration(seconds)}")


class Changes:
    """Whether the queue has changed since the last poll, and when a job becomes ready by itself."""

    def __init__(self, reader: Reader, queues: Sequence[str]) -> None:
        self.reader = reader
        self.queues = queues
        self.seen: object = None  # the data_version of the last poll, and its connection
        self.polled_at = 0.0  # on the clock of the jobs, as below
        self.ready_at = NEVER  # when a job is due or a rate allows it

    def forget(self) -> None:
        """Let the next poll find a change: those of our own do not show in the data_version."""
        self.seen = None

    def version(self) -> object:
        """Return a value that differs from `seen` after a change, or if the clock was set back."""
        now = self.reader.clock()
        if now < self.polled_at:
            self.forget()
        self.polled_at = now
        return self.reader.data_version(), self.reader.db.connection  # a new one counts anew

    def look_ahead(self) -> None:
        """Find out when the next job will be ready by itself."""
        when = self.reader.next_ready_time(self.queues)
        self.ready_at = NEVER if when is None else when

    def pause(self) -> float:
        return max(0.0, self.ready_at - self.reader.clock())


class Housekeeping:
    """A pool's upkeep of the queue as a whole."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.db = ledger.db
        self.is_settling = False  # batches of dead processes
        self.truncate_at = 0.0  # when the -wal may be emptied again, on the monotonic clock

    def sync(self) -> None:
        """Sync the results of the workers, which do not wait for the disk."""
        wal = self.db.path + "-wal"
        with contextlib.suppress(FileNotFoundError):
            sync_file(wal)  # safe: unlike the database, this file carries no locks of ours
            began = time.monotonic()
            if os.stat(wal).st_size > LARGEST_WAL and began >= self.truncate_at:
                with contextlib.suppress(Fault):
                    self.db.truncate_wal()
                now = time.monotonic()  # a reader that stays must not hold up the work
                self.truncate_at = now + 5 * (now - began)

    def prune(self) -> bool:
        """Settle batches of dead processes and prune; return whether there may be more to do."""
        self.is_settling = self.ledger.settle_dead_batches()
        deleted = []
        if retention := self.ledger.reader.settings()["retention"]:
            before = self.ledger.clock() - retention
            deleted = [self.ledger.delete_slice(state, before) for state in PRUNED_BY_DEFAULT]
        return self.is_settling or any(deleted)  # such as the jobs that the deleted ones waited for


class Pool:
    """The process of `worker start`. It runs no jobs: it starts, wakes and replaces workers."""

    def __init__(self, ledger: Ledger, files: PoolFiles, options: PoolOptions) -> None:
        self.ledger = ledger
        self.files = files
        self.options = options
        self.events = EventLog(options)
        self.notices = Notices(self.events.say)
        self.crew = Crew(files, options, self.notices, self.fail)
        self.recovery = Recovery(ledger, self.notices, self.report_recovered)
        self.changes = Changes(ledger.reader, options.queues)
        self.housekeeping = Housekeeping(ledger)
        steps = (self.poll, self.changes.look_ahead, self.prune, self.sync, self.print_events)
        self.agenda = Agenda(*steps)
        self.signals: list[tuple[float, int]] = []
        self.code: int = Exit.OK
        self.fault: Fault | None = None
        ledger.db.keep_waiting = lambda waited: waited < 0.3 and not self.signals

    def on_signal(self, number: int, _: object) -> None:
        """Note a signal; the loop, which the signal's byte in the FIFO wakes, reads it."""
        self.signals.append((time.monotonic(), number))

    def main(self) -> int:
        with contextlib.ExitStack() as stack:
            if self.options.signals:
                stack.enter_context(handle_signals(self.on_signal, self.files.wakeup))
            stack.callback(self.crew.close)
            began = time.monotonic()
            reader = self.ledger.reader
            empty = "" if any(reader.counts().values()) else ", which has no jobs yet"
            workers = plural(self.options.size, "worker")
            self.events.say(f"{workers} on {printable(self.ledger.db.path)}{empty}")
            self.attempt(self.files.run_dir.clean, reader.claimed())
            self.agenda.set(self.poll, 0.0)
            self.agenda.set(self.prune, 0.0)
            while not self.crew.mode or self.crew.is_alive() or self.recovery.is_ending():
                self.turn()
            with self.ledger.db.translate_errors():
                self.sync()
                self.check_drain()
            self.events.sum_up(time.monotonic() - began)
        if self.fault:
            raise self.fault
        return self.code

    def turn(self) -> None:
        self.options.tick()
        sources = [self.files.wakeup, *(worker.pipe for worker in self.crew.workers)]
        ready = SYSTEM.wait(sources, None, min(self.agenda.pause(), self.changes.pause()))
        if self.files.wakeup in ready:  # there is work, a stop request, a new worker or a signal
            self.crew.maybe_work = True
            self.agenda.set(self.poll, 0.0)
        self.crew.report_troubles()
        for worker in [worker for worker in self.crew.workers if worker.pipe in ready]:
            self.receive(worker)
        self.obey_signals()
        if not self.changes.pause():
            self.changes.ready_at = NEVER
            self.crew.maybe_work = True
            self.agenda.within(self.poll, BATCH)  # when is the next one due?
        for step in self.agenda.take():
            self.attempt(step)
        self.attempt(self.dispatch)

    def attempt(self, step: Callable[..., None], *args: Any) -> bool:
        """Take a step; report a fault that may pass. Return False if the database is locked."""
        try:
            with self.ledger.db.translate_errors():
                step(*args)
        except Locked:  # not everything can wait for it in turn
            return False
        except Damaged as error:
            self.fail(error)
        except Fault as error:  # a full disk, for instance; the next poll tries again
            self.notices.report(f"{error}; trying again")
        return True

    def receive(self, worker: WorkerHandle) -> None:
        try:
            lists = worker.read()
        except BlockingIOError:
            return
        except (EOFError, OSError):  # the end of its pipe
            self.reap(worker)
            return
        worker.answer_by = NEVER
        for news in starmap(News, chain.from_iterable(lists)):
            if news.kind == "damaged":
                self.fail(Fault(news.text))
            elif news.kind == "event" and not news.seq:  # other workers may have the same problem
                self.notices.report(news.text)
            elif news.kind == "event":
                self.report(news.state, news.text, news.seq, news.when)
            else:
                worker.state = news.kind
            if news.kind == "idle":  # when does the rate of a queue allow the next start?
                self.agenda.set(self.changes.look_ahead, 0.0)
            if news.kind == "busy":  # a claim must survive a power cut too; there may be more work
                self.crew.maybe_work = True
                self.agenda.within(self.sync, BATCH)

    def report(self, state: str, text: str, seq: int, when: float = 0.0) -> None:
        self.events.add(when or time.monotonic(), text, seq, state)
        self.agenda.within(self.print_events, 1.5 * BATCH)
        self.agenda.within(self.sync, BATCH)
        if state == DEAD and self.options.drain:
            self.code = Exit.NO
        if state == PENDING:
            self.agenda.within(self.poll, BATCH)  # when is it due?

    def report_recovered(self, state: str, text: str, seq: int) -> None:
        self.changes.forget()
        self.report(state, text, seq)
        if not self.crew.mode:  # there may be many to recover: the first must not wait for all
            self.crew.maybe_work = True
            self.crew.dispatch()

    def print_events(self) -> None:
        """Print the events that no late news can precede any more."""
        self.events.flush(time.monotonic() - BATCH)
        if self.events.held:
            self.agenda.within(self.print_events, BATCH)

    def reap(self, worker: WorkerHandle) -> None:
        if not self.crew.reap(worker):
            return
        self.events.say(f"{worker.name} died")
        self.changes.forget()
        self.agenda.set(self.poll, 0.0)
        with contextlib.suppress(Fault):
            if all(job.locked_by != worker.name for job in self.ledger.reader.claimed()):
                self.crew.count_death("a worker died without a job")

    def obey_signals(self) -> None:
        """Obey the signals so far: the first stops, one a second or more later ends the jobs."""
        for when, number in self.signals:
            if when < self.signals[0][0] + 1:
                self.stop("stop", signal_name(number), "; send it again after a second to end them")
            elif self.crew.mode != "now":
                self.code = Exit.SIGNALLED + number
                self.stop("now", signal_name(number))

    def stop(self, mode: Literal["stop", "now"], reason: str = "", hint: str = "") -> None:
        if self.crew.mode in (mode, "now"):
            return
        effect = "no new jobs; finishing the running ones"
        if mode == "now":
            effect = "ending the running jobs; they return to the queue"
        if reason:
            self.events.say(f"{reason}: {effect}{hint}")
        self.crew.stop(mode)

    def fail(self, fault: Fault) -> None:
        if not self.fault:
            self.fault = fault
            self.stop("stop", str(fault))

    def poll(self) -> None:
        """Look for changes that wake nobody: stop requests, workers, the files, other writers."""
        self.agenda.set(self.poll, SYSTEM.POLL)
        if requested := self.files.run_dir.stop_requested(self.files.name):
            self.stop(requested, "worker stop")
        self.crew.start_missing()
        self.crew.check_answers()
        for path, info in self.files.watched.items():
            require_in_place(path, info)
        version = self.changes.version()  # first: later changes are seen later
        if version != self.changes.seen or self.recovery.has_strangers:  # they die without a change
            self.recover()
        if version != self.changes.seen:
            self.crew.maybe_work = True
            self.changes.look_ahead()
            self.changes.seen = version

    def recover(self) -> None:
        claimed = self.ledger.reader.claimed()
        self.crew.cancel(claimed)
        for step in self.recovery.steps(claimed, {worker.name for worker in self.crew.workers}):
            if not self.attempt(step):  # each would wait for the same lock
                break
        if self.recovery.is_ending():
            self.agenda.within(self.poll, BATCH)

    def prune(self) -> None:
        self.agenda.set(self.prune, 60)
        if self.ledger.correct_times():
            self.changes.forget()  # something may be due earlier
        if self.housekeeping.prune():
            self.agenda.set(self.prune, BATCH)

    def sync(self) -> None:
        self.agenda.set(self.sync, AGAIN)  # if it fails
        self.housekeeping.sync()
        self.agenda.set(self.sync, NEVER)

    def dispatch(self) -> None:
        if self.crew.mode:
            return
        self.crew.dispatch()
        is_idle = set(self.crew.states()) == {"idle"} and not self.crew.maybe_work
        is_settled = not (self.recovery.orphans or self.housekeeping.is_settling)
        if self.options.drain and is_idle and is_settled:
            blockers = self.ledger.reader.drain_blockers(self.options.queues, self.options.horizon)
            if not blockers:
                self.end_drain()
            elif all(blockers.values()):
                names = ", ".join(map(printable, sorted(blockers)))
                self.notices.report(f"waiting for paused queues: {names} (queuectl resume)")

    def end_drain(self) -> None:
        reader = self.ledger.reader
        blocked = reader.blocked(self.options.queues)
        for job in blocked:
            self.code = Exit.NO
            self.events.say(f"job {printable(job.id)} is {describe_blockers(reader.parents(job))}")
        rows = reader.counts_by_queue(self.options.queues)
        number = sum(row[3] for row in rows if row[1:3] == (PENDING, BLOCKED))
        if number > len(blocked):
            self.events.say(f"and {number - len(blocked)} more are blocked")
        self.events.ended["blocked"] = number
        self.stop("stop")

    def check_drain(self) -> None:
        """Report a drain that was stopped while jobs were left to run."""
        options = self.options
        is_stopped = options.drain and not self.fault and "blocked" not in self.events.ended
        if is_stopped and self.ledger.reader.drain_blockers(options.queues, options.horizon):
            self.code = self.code or Exit.NO
            self.events.say("stopped before all jobs had run")


def valid_pool_name(name: str) -> None:
    require(re.fullmatch(r"(pool-\w+)?", name), 'be "pool-" followed by letters or digits')


def end_a_thread() -> None:
    """Let glibc load what it ends threads with: later no descriptor may be free, and it aborts."""
    thread = threading.Thread(target=ignore)
    with contextlib.suppress(RuntimeError):  # reported where a thread is needed
        thread.start()
        thread.join()


def work(  # noqa: PLR0913
    path: Path = "queuectl.db",
    count: int = 1,
    *,
    queues: Sequence[str] = (),
    drain: bool = False,
    horizon: Duration = LONGEST,
    insecure: bool = False,
    signals: bool = False,
    say: Callable[[str], None] = ignore,
    tick: Callable[[], None] = ignore,
    name: str = "",
    ended: Callable[[int, str], None] = ignore,
) -> int:
    """Run jobs with `count` workers until stopped or, with `drain`, until nothing is left to run.

    A drain does not wait for jobs that are due later than `horizon` from now. Returns the exit
    code: 0; 1 if, in a drain, a job died, is blocked or was not run; 128+n if signal n ended jobs.
    `signals` lets INT, TERM and HUP stop it, in a main thread; `queuectl worker stop` always can.
    `say` gets each event line, `ended` the `seq` and state of each ended job; `tick` is called
    every second. `insecure` is as in Queue. `name` (as pool-1) is its own in the run directory.
    """
    size = validate("count", integer(1, 1000), count)
    validate("name", valid_pool_name, name)
    limits = (drain, validate("horizon", parse_duration, horizon), insecure, signals)
    options = PoolOptions(size, as_list(queues), *limits, say, tick, name, ended)
    end_a_thread()
    with Queue(path, insecure=insecure) as queue:
        queue.config()  # with damaged settings no worker could begin
        if kind := network_file_system(queue.path):
            say(f"warning: {queue.path} is on {kind}; SQLite needs a local disk")
        with queue._db.translate_errors():
            files = PoolFiles(queue._db, options, queue._reader.clock)
        with contextlib.closing(files):
            return int(Pool(queue._ledger, files, options).main())


# --- words: jobs, workers and counts as text and as JSON ------------------------------------------

WORKER_HEADINGS = ("WORKER", "PID", "QUEUES", "STARTED", "JOB", "SINCE", "HOST", "COMMAND")


def display_width(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    import unicodedata

    wide = 0 if text.isascii() else sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide


def terminal_width(stream: Any) -> int:
    """Return the width of a stream's terminal; 0 without one, or if it is dumb."""
    if not stream or not stream.isatty() or os.environ.get("TERM") == "dumb":
        return 0
    return os.get_terminal_size(stream.fileno()).columns or 80


def shorten(text: str, width: int) -> str:
    """Cut a text to a number of columns, unless that is 0."""
    if not 0 < width < display_width(text):
        return text
    while display_width(text) >= width:
        text = text[: -max(1, (display_width(text) - width) // 2)]
    return text + "…"


def table(headings: Sequence[str], rows: Rows) -> Iterator[str]:
    """Yield aligned lines; a column that is empty in every row is left out.

    On a narrow terminal the widest columns are cut, but not the first one. Columns that still do
    not fit continue on the next line.
    """
    lines = [[printable(str(cell)) for cell in row] for row in rows]
    shown = [i for i in range(len(headings)) if not lines or any(line[i] for line in lines)]
    lines = [[line[i] for i in shown] for line in (headings, *lines)]
    widths = [max(map(display_width, column)) for column in zip(*lines)]
    screen = terminal_width(sys.stdout) or sum(widths) + 2 * len(widths)
    while sum(widths) + 2 * len(widths) - 2 > screen and max(widths[1:]) > 14:
        widths[widths.index(max(widths[1:]), 1)] -= 1
    for line in lines:
        parts = [""]
        for cell, width in zip(line, widths):
            if parts[-1] and display_width(parts[-1]) + width > screen:
                parts.append("  ")
            text = shorten(cell, width)
            parts[-1] += text + " " * (width - display_width(text) + 2)
        yield from (part.rstrip() for part in parts if part.strip())


def section(headings: Sequence[str], rows: Rows) -> Iterator[str]:
    """Yield a table below an empty line, or nothing if it has no rows."""
    lines = list(rows)
    return iter(["", *table(headings, lines)] if lines else ())


def unserved(run_dir: RunDirectory, queue: str) -> str:
    """Return the reason that no worker would claim a job of a queue; empty if one would."""
    pools = run_dir.alive("pool")
    claiming = [note for pool, note in pools.items() if not run_dir.stop_requested(pool)]
    if not claiming:
        return "all workers are stopping" if pools else "no worker is running"
    is_served = any(queue in (note.get("queues") or [queue]) for note in claiming)
    return "" if is_served else f"no worker serves queue {queue}"


def obstacle_of_running(run_dir: RunDirectory, job: Job) -> str:
    """Return the reason that a claimed job makes no progress, in one phrase; empty if it does."""
    if trouble := job.launched.get("trouble"):
        hint = f"if it has ended there: queuectl cancel --gone {printable(job.id)}"
        return f"it {trouble}; {hint}"
    if job.state == PROCESSING and run_dir.is_unlocked(job.locked_by):
        pools = run_dir.alive("pool")
        hint = "a pool is recovering it" if pools else "recover it with: queuectl worker start"
        return f"its worker died; {hint}"
    return ""


def obstacle(reader: Reader, job: Job) -> str:
    """Return the reason that a job cannot run now, in one phrase; empty if there is none."""
    run_dir = reader.db.run_dir
    if job.state != PENDING:
        return obstacle_of_running(run_dir, job)
    if job.readiness == BLOCKED:
        return describe_blockers(reader.parents(job))
    if job.run_after > reader.clock():
        return "due " + format_distance(job.run_after, reader.clock())
    paused = reader.paused()
    if "" in paused:
        return "all queues are paused (queuectl resume)"
    if job.queue in paused:
        return f"queue {job.queue} is paused (queuectl resume --queue {job.queue})"
    return unserved(run_dir, job.queue) or reader.hold(job.queue)


def reason_to_wait(reader: Reader, job: Job) -> str:
    """Return the reason that a job waits, in one phrase; empty if it runs or has ended."""
    if (reason := obstacle(reader, job)) or job.state != PENDING:
        return reason
    position = reader.number(POSITION, **job._asdict())  # counted up to 100,000
    return f"{plural(position, 'job')} before it" if position else "next to run"


def rule_text(job: Job) -> str:
    kind, _, rule = (job.rule or "").partition(" ")
    return f"every {format_duration(float(rule))}" if kind == "every" else rule


def setting_text(value: object) -> str:
    """Return the value of a setting as `config set` takes it."""
    if isinstance(value, tuple):
        numbers = all(isinstance(item, int) for item in value)
        return ",".join(map(str, value)) if numbers else join_words(value)
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def setting_words(key: str, value: object) -> str:
    """Return the value of a setting for people: a duration or a size with its unit."""
    if SETTINGS[key].read in (parse_duration, parse_age):
        return exact_duration(float(str(value)))
    if SETTINGS[key].read is parse_size:
        return exact_size(int(str(value)))
    return setting_text(value)


def stored_settings(reader: Reader, job: Job) -> Iterator[str]:
    """Yield each setting that applies to a job and is not built in, with its source."""
    settings = reader.settings(job.queue)
    for key, source in reader.sources(job.queue).items():
        where = f"queue {source}" if source else "all queues"
        own = job.retry_delays if key in ("backoff_base", "backoff_max") else None
        if getattr(job, key, own) is None:  # the job has no value of its own
            yield f"{key} {setting_words(key, settings[key])} ({where})"


def job_row(reader: Reader, job: Job, settings: Settings) -> tuple[object, ...]:
    queue = "" if job.queue == "default" else job.queue
    tries = f"{job.attempts}/{job.max_retries or settings['max_retries']}"
    when = job.run_after if job.state == PENDING else job.updated_at
    distance = format_distance(when, reader.clock())
    reason = job.last_error if job.state in (DEAD, PENDING, CANCELLED) else ""
    if job.readiness == BLOCKED:
        reason = describe_blockers(reader.parents(job))
    return job.id, job.state, queue, tries, distance, reason or "", job.command


def run_facts(reader: Reader, job: Job) -> dict[str, Any]:
    """Return when the last attempt started and ended, and how many seconds it took."""
    facts: dict[str, Any] = {"started": None, "finished": None, "seconds": None}
    if job.state == PROCESSING:
        facts["started"] = format_time(job.locked_at)
    elif job.run and (run := reader.last_attempt(job, job.run, LAST_SUMMARY)):
        facts.update(started=format_time(run.started), finished=format_time(run.finished))
        facts["seconds"] = round(run.finished - run.started, 3)
    return facts


def result_text(reader: Reader, job: Job) -> str:
    """Return the last result of a job's schedule, and when it was."""
    result = reader.last_result(job)
    if not result:
        return ""
    when = format_distance(parse_time(result["finished"]), reader.clock())
    return f"{result['error'] or COMPLETED} {when}"


def time_text(when: float, now: float) -> str:
    """Return a time for people: local, with its distance from now."""
    local = datetime.fromtimestamp(when, timezone.utc).astimezone()
    return f"{local:%Y-%m-%d %H:%M:%S} ({format_distance(when, now)})"


def job_details(reader: Reader, job: Job) -> Iterator[tuple[str, object]]:
    """Yield the facts about a job that people want to see, by name."""
    hidden = "seq run cancel_requested blocked rule scheduled_for snoozes waited".split()
    hidden += ["notifies", "event", "stdin_size"]
    facts = job_facts(job, reader.settings(job.queue))
    facts = {key: value for key, value in facts.items() if key not in hidden}
    facts.update(why=reason_to_wait(reader, job), schedule=rule_text(job), snoozes=job.snoozes)
    facts["env"] = shlex.join(f"{name}={value}" for name, value in facts["env"].items())
    facts["stdin"] = plural(job.stdin_size, "byte") if job.stdin_size else ""
    facts["settings"] = ", ".join(stored_settings(reader, job))
    facts["timeout"] = exact_duration(facts["timeout"]) + " (no limit)" * (not facts["timeout"])
    if job.retry_delays:
        delays = map(float, job.retry_delays.split(","))
        facts["retry_delays"] = ",".join(map(exact_duration, delays))
    for key in ("created_at", "updated_at", "run_after", "locked_at"):
        when = getattr(job, key)
        facts[key] = when and time_text(when, reader.clock())
    facts["last_result"] = result_text(reader, job)
    if job.cancel_requested:
        facts["state"] += " (being cancelled)"
    for key, value in facts.items():
        if value not in (None, {}, "", 0) or key in ("priority", "timeout"):
            yield key, value


def job_text(reader: Reader, job: Job) -> Iterator[str]:
    for key, value in job_details(reader, job):
        yield f"{key:<12} {value}"
    rows = []
    for run in reader.attempts(job, SUMMARIES):
        took = format_duration(run.finished - run.started)
        started = time_text(run.started, reader.clock())
        rows.append((run.run, started, took, run.error or COMPLETED, run.worker))
    yield from section(("RUN", "STARTED", "TOOK", "ENDED", "WORKER"), rows)


def worker_facts(reader: Reader, only: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the living workers, or those that serve one queue."""
    running = {job.locked_by: job for job in reader.claimed()}
    pools = reader.db.run_dir.alive("pool")
    for name, note in reader.db.run_dir.alive("worker").items():
        pool = pools.get(pool_of(name), {})
        queues = pool.get("queues", [])
        if only is None or not queues or only in queues:
            job = running.get(name)
            facts = {"worker": name, "pool": pool_of(name), "pid": note.get("pid")}
            facts.update(slot=note.get("slot"), queues=queues)
            facts["started"] = format_time(pool.get("started"))
            facts.update(job=job and job.id, since=job and format_time(job.locked_at))
            facts["host"] = job and job.host
            yield {**facts, "command": job and job.command}


def worker_rows(workers: Iterable[Facts], now: float) -> Iterator[tuple[object, ...]]:
    def ago(when: str | None) -> str:
        return format_distance(parse_time(when), now) if when else ""

    for worker in workers:
        queues = ",".join(worker["queues"])
        started, since = ago(worker["started"]), ago(worker["since"])
        about = (worker["job"] or "idle", since, worker["host"] or "", worker["command"] or "")
        yield (worker["worker"], worker["pid"] or "?", queues, started, *about)


def running_rows(jobs: Iterable[Job], now: float) -> Iterator[tuple[object, ...]]:
    """Yield the running jobs, each with its elapsed time, the longest first."""
    for job in sorted(jobs, key=lambda job: job.locked_at or now):
        elapsed = format_duration(round(max(0.0, now - (job.locked_at or now))))
        queue = "" if job.queue == "default" else job.queue
        yield job.id, elapsed, queue, job.attempts, job.locked_by, job.command


def tally(counts: Iterable[tuple[State, int, int]]) -> dict[str, int]:
    """Sum up numbers of jobs by state and, for pending ones, also by readiness."""
    found: dict[str, int] = dict.fromkeys(STATE_WORDS, 0)
    for state, readiness, number in counts:
        found[state] += number
        if state == PENDING:
            found[READINESS_WORDS[readiness]] += number
    return found


def status_facts(reader: Reader, only: str | None = None) -> dict[str, Any]:
    counts = [row for row in reader.counts_by_queue() if only in (None, row[0])]
    facts: dict[str, Any] = tally(row[1:] for row in counts)
    queues: dict[str, dict[str, int]] = {}
    for name, state, _, number in counts:
        queues.setdefault(name, dict.fromkeys(STATES, 0))[state] += number
    facts["queues"] = queues
    facts["paused"] = [name for name in reader.paused() if only in (None, name) or not name]
    held = {name: reader.hold(name) for name in reader.column(HELD_QUEUES) if only in (None, name)}
    facts["held"] = {name: reason for name, reason in held.items() if reason}
    notifications = partial(reader.number, COUNT_NOTIFICATIONS, queue=only)
    facts["notifications"] = {state: notifications(state=state) for state in (PENDING, DEAD)}
    now = reader.clock()
    pools = reader.db.run_dir.alive("pool").values()
    age = now - min((note.get("started", now) for note in pools), default=0)
    facts["rate"] = round(reader.rate(only, min(60.0, max(1.0, age))), 3)  # over a minute, or less
    oldest = reader.oldest(only)
    facts["oldest"] = oldest and job_facts(oldest, reader.settings(oldest.queue))
    facts["workers"] = list(worker_facts(reader, only))
    return facts


def status_counts(reader: Reader, facts: Facts, only: str | None, *, full: bool) -> Iterator[str]:
    kinds = ", ".join(f"{facts[kind]} {kind}" for kind in READINESS_WORDS.values())
    yield f"queue      {reader.db.path}"
    for state in STATES:
        note = f"  ({kinds})" if state == PENDING and facts["ready"] < facts[PENDING] else ""
        yield f"{state:<10} {facts[state]:>8}{note}"
    idle = sum(not worker["job"] for worker in facts["workers"])
    note = f"  ({idle} idle)" if full and idle else ""
    yield f"{'workers':<10} {len(facts['workers']):>8}{note}"
    if full:
        yield f"{'rate':<10} {facts['rate']:>8.1f}  jobs/s recently"
    if facts["scheduled"] and (when := reader.next_due_time([only] if only else ())):
        yield f"next       due {format_distance(when, reader.clock())}"
    if facts["paused"]:
        yield "paused     " + ", ".join(name or "all queues" for name in facts["paused"])
    waiting, dead = facts["notifications"].values()
    if waiting or dead:
        yield f"notifications {waiting} waiting" + (f", {dead} dead" if dead else "")
    for reason in islice(facts["held"].values(), 5):
        yield f"waiting    {reason}"
    if len(facts["held"]) > 5:
        yield f"waiting    {len(facts['held']) - 5} more queues are at their limit or rate"


def status_text(reader: Reader, only: str | None = None, *, full: bool = False) -> Iterator[str]:
    """Yield the state of everything, or of one queue; the full view is for --watch."""
    facts = status_facts(reader, only)
    now = reader.clock()
    yield from status_counts(reader, facts, only, full=full)
    if oldest := reader.oldest(only):
        since = format_distance(oldest.run_after, now)
        yield f"oldest     job {oldest.id}, due {since}; {reason_to_wait(reader, oldest)}"
    claimed = [job for job in reader.claimed() if only in (None, job.queue)]
    reasons = ((job, obstacle(reader, job)) for job in claimed)
    if lost := next((it for it in reasons if it[1]), None):
        yield f"lost       job {lost[0].id}: {lost[1]}"
    for job in reader.blocked([only] if only else (), limit=1):
        yield f"blocked    job {job.id} is {describe_blockers(reader.parents(job))}"
    if set(facts["queues"]) - {"default"}:
        rows = ((name, *states.values()) for name, states in facts["queues"].items())
        yield from section(("QUEUE", *map(str.upper, STATES)), rows)
    if full:
        headings = ("RUNNING", "FOR", "QUEUE", "TRY", "WORKER", "COMMAND")
        yield from section(headings, running_rows(claimed, now))
        chosen = Selection(queues=[only] if only else [], states=[DEAD])
        failed = reader.latest_selected(chosen, 5)[0]
        rows = ((job.id, format_distance(job.updated_at, now), job.last_error) for job in failed)
        yield from section(("LAST FAILED", "WHEN", "WHY"), rows)
    else:
        yield from section(WORKER_HEADINGS, worker_rows(facts["workers"], now))


def survey_queues(reader: Reader, queues: Sequence[str] = ()) -> tuple[dict[str, int], float]:
    """Return a tally of the jobs in these queues, or in all, and when the next one is due."""
    rows = reader.counts_by_queue()
    counts = tally(row[1:] for row in rows if not queues or row[0] in queues)
    return counts, (counts["scheduled"] and reader.next_due_time(queues)) or 0


def survey_jobs(watch: JobWatch) -> tuple[dict[str, int], float]:
    jobs = watch.jobs()
    times = [job.run_after for job in jobs if job.readiness == SCHEDULED]
    return tally((job.state, job.readiness, 1) for job in jobs), min(times, default=0)


class Progress:
    """The progress of jobs since this object was made, from surveys of them."""

    def __init__(self, survey: Survey, clock: Callable[[], float]) -> None:
        self.survey = survey
        self.clock = clock
        self.first = survey()[0]
        self.samples = collections.deque([(time.monotonic(), 0)], 50)

    def line(self) -> str:
        """Describe how many of the jobs that can run are done, and how many others wait."""
        now, next_time = self.survey()
        done = sum(max(0, now[state] - self.first[state]) for state in FINISHED)
        left = now["ready"] + now[PROCESSING]
        began, before = self.samples[0]
        self.samples.append((time.monotonic(), done))
        rate = (done - before) / max(time.monotonic() - began, 0.001)  # of the last samples
        failed = now[DEAD] - self.first[DEAD]
        due = format_distance(next_time, self.clock())
        parts = {
            f"{done}/{done + left} jobs": done or left,
            "no job can run yet": not done and not left,
            f"{rate:.1f}/s": left,
            f"{format_duration(round(left / (rate or 1)))} left": left and rate > 0,
            f"{failed} failed": failed > 0,
            f"{now['scheduled']} scheduled (next {due})": now["scheduled"],
            f"{now['blocked']} blocked": now["blocked"],
        }
        return ", ".join(part for part, is_shown in parts.items() if is_shown)


# --- report: jobs and attempts as text, HTML, JUnit, Markdown, Prometheus and JSON ----------------

TAIL = 4096  # bytes of an attempt's output that a report shows
SHORT_TAIL = 1500  # bytes of it for each reason for failures
LISTED = 10  # entries in each list, such as that of the slowest attempts
DEAD_LISTED = 1000  # entries in the list of dead jobs
GROUPS = 20  # reasons for failures
BARS = 8000  # of a Gantt chart
LANES = 64
BLAMELESS = (COMPLETED, "released", CANCELLED)  # outcomes of attempts that did not fail
SHORT_BUCKETS = (0.1, 0.5, 1, 5, 15, 30, 60, 300, 900, 1800)  # widths in seconds
BUCKETS = (*SHORT_BUCKETS, 3600, 10800, 21600, 43200, 86400, 604800, 2419200, 31536000)  # a year
REPORTED = Selection(notifications=False)


class History(NamedTuple):
    """A job and those of its attempts that have ended, oldest first, without their output.

    `failures` are the attempts that failed; an exit with 75 that postponed the job is none.
    """

    job: Job
    runs: list[Attempt]
    failures: list[Attempt]


def history(job: Job, runs: list[Attempt]) -> History:
    failures = [run for run in runs if run.outcome not in BLAMELESS and run.exit_code != TRY_LATER]
    if job.state == DEAD and runs and runs[-1] not in failures[-1:]:
        failures.append(runs[-1])
    return History(job, runs, failures)


def changed_jobs(reader: Reader, chosen: Selection, since: float) -> Iterator[Job]:
    """Yield the jobs of a selection that changed at a time or later; an index finds them.

    Those that have ended come first, so that a job that ends meanwhile is not read twice.
    """
    if chosen.ids or not since:
        yield from (job for job in reader.selected(chosen) if job.updated_at >= since)
        return
    now = reader.clock()
    for kind in reversed(COUNTED):
        seqs = reader.seqs_in_state(*kind, since)
        while numbers := list(islice(seqs, SLICE)):
            for job in reader.by_seqs(numbers):
                if kind == (job.state, job.readiness) and chosen.takes(job, now):
                    yield job


def histories(reader: Reader, jobs: Iterable[Job], since: float = 0) -> Iterator[History]:
    """Yield jobs with their attempts that ended at a time or later: the data of every report."""
    for job in jobs:
        runs = reader.attempts(job, SUMMARIES) if job.run else ()
        yield history(job, [run for run in runs if run.finished >= since])


def drain_histories(
    reader: Reader, queues: Sequence[str], pool: str, since: float
) -> Iterator[History]:
    """Yield the jobs that a pool ran since it began, and those that it left waiting."""
    changed = REPORTED._replace(queues=queues, states=(*FINISHED, PROCESSING, "scheduled"))
    for found in histories(reader, changed_jobs(reader, changed, since), since):
        if found.job.state == CANCELLED or any(pool_of(run.worker) == pool for run in found.runs):
            yield found
    waiting = changed._replace(states=("ready", "blocked"))
    yield from histories(reader, reader.selected(waiting), since)


def numbers_array() -> Any:
    """Return an array of floats: 8 bytes each, where a list of a million would take 32 MB."""
    from array import array

    return array("d")


def time_facts(name: str, seconds: Iterable[float]) -> dict[str, float]:
    values = sorted(seconds) or [0.0]
    found = {f"p{part}": values[math.ceil(len(values) * part / 100) - 1] for part in (50, 95)}
    found["max"] = values[-1]
    return {f"{name}_{key}": round(value, 3) for key, value in found.items()}


def histogram(seconds: Iterable[float]) -> list[tuple[float, float, int]]:
    """Return the lower and upper end of eighths of decades, and the number of durations in each."""
    bins = collections.Counter(math.floor(math.log10(max(s, 0.001)) * 8) for s in seconds)
    return [(10 ** (n / 8), 10 ** ((n + 1) / 8), number) for n, number in sorted(bins.items())]


class Counts:
    """How many jobs there are by queue and state, and how long their attempts took and waited."""

    def __init__(self) -> None:
        self.jobs: dict[str, Any] = collections.defaultdict(collections.Counter)
        self.seconds: dict[str, Any] = collections.defaultdict(numbers_array)
        self.waits: dict[str, Any] = collections.defaultdict(numbers_array)
        self.outcomes: collections.Counter[str] = collections.Counter()

    def add(self, history: History) -> None:
        job = history.job
        self.jobs[job.queue][job.state, job.readiness] += 1
        for run in history.runs:
            self.outcomes[run.outcome] += 1
            self.seconds[job.queue].append(max(0.0, run.finished - run.started))
            self.waits[job.queue].append(run.waited)

    def facts_of(self, queues: Iterable[str]) -> dict[str, Any]:
        kinds = chain.from_iterable(self.jobs[queue].items() for queue in queues)
        counts = tally((*kind, number) for kind, number in kinds)
        seconds = [second for queue in queues for second in self.seconds[queue]]
        waits = chain.from_iterable(self.waits[queue] for queue in queues)
        facts = {**counts, "attempts": len(seconds), **time_facts("took", seconds)}
        return {**facts, **time_facts("waited", waits), "histogram": histogram(seconds)}

    def facts(self) -> dict[str, Any]:
        queues = sorted(self.jobs)
        each = [{"queue": queue, **self.facts_of([queue])} for queue in queues]
        return {
            "jobs": sum(sum(kinds.values()) for kinds in self.jobs.values()),
            **self.facts_of(queues),
            "outcomes": dict(self.outcomes),
            "queues": sorted(each, key=lambda facts: -facts["attempts"]),
        }


class Timeline:
    """The times at which the numbers of several keys changed."""

    def __init__(self) -> None:
        self.times: dict[tuple[str, int], Any] = collections.defaultdict(numbers_array)

    def add(self, when: float, key: str, number: int = 1) -> None:
        self.times[key, number].append(when)

    def facts(self, keys: Sequence[str], limit: int) -> dict[str, Any]:
        """Return where the time begins, the width of its buckets, and of each key the sums."""
        ends = [end for times in self.times.values() for end in (min(times), max(times))]
        first, last = min(ends, default=0.0), max(ends, default=0.0)
        fitting = (width for width in BUCKETS if last // width - first // width < limit)
        width = next(fitting, BUCKETS[-1])
        start = int(first // width)
        size = int(last // width) - start + 1 if ends else 0
        sums = {key: [0] * size for key in keys}
        for (key, number), times in self.times.items():
            for when in times:
                sums[key][int(when // width) - start] += number
        return {"start": round(start * width, 1), "width": width, **sums}


class Course:
    """How many jobs were in each state over time, and how many finished in each bucket of it."""

    def __init__(self, since: float) -> None:
        self.since = since
        self.depth = Timeline()
        self.finished = Timeline()
        self.first = NEVER  # the first start and the last end of an attempt
        self.last = 0.0

    def add(self, history: History) -> None:
        job = history.job
        moves: list[tuple[float, str]] = [(job.created_at, PENDING)]
        for run in history.runs:
            moves += [(run.started, PROCESSING), (run.finished, PENDING)]
            self.first = min(self.first, run.started)
            self.last = max(self.last, run.finished)
        if job.state in (COMPLETED, DEAD) and history.runs:
            moves[-1] = (moves[-1][0], job.state)
        elif job.state != PENDING:  # it runs, or was cancelled
            moves.append((job.updated_at, job.state))
        for number, (when, state) in enumerate(moves):
            if number:
                self.depth.add(max(when, self.since), moves[number - 1][1], -1)
            self.depth.add(max(when, self.since), state)
        if job.state in FINISHED:
            self.finished.add(job.updated_at, job.state)

    def facts(self) -> dict[str, Any]:
        depth = self.depth.facts(STATES, 240)
        depth.update((state, list(accumulate(depth[state]))) for state in STATES)
        finished = self.finished.facts(FINISHED, 100)
        number = sum(finished[COMPLETED]) + sum(finished[DEAD])
        span = max(0.001, self.last - self.first)
        return {
            "first_start": format_time(self.first) if self.last else None,
            "last_end": format_time(self.last) if self.last else None,
            "rate": round(number / span, 3) if self.last else 0.0,
            "depth": depth,
            "finished": finished,
        }


class Bar(NamedTuple):
    """An attempt in a Gantt chart, or several that are too short to be told apart there."""

    worker: str
    started: float
    finished: float
    waited: float
    outcome: str
    id: str
    number: int = 1
    failures: int = 0
    reason: str = ""

    def merged(self, other: Bar) -> Bar:
        """Return a bar for both; it shows a failure if there is one."""
        shown = other if other.failures and not self.failures else self
        return shown._replace(
            started=min(self.started, other.started),
            finished=max(self.finished, other.finished),
            waited=max(self.waited, other.waited),
            number=self.number + other.number,
            failures=self.failures + other.failures,
        )


def merge_short(bars: Iterable[Bar], width: float) -> list[Bar]:
    """Merge the bars of a worker or lane that are shorter than a width and begin within it."""
    merged: dict[object, Bar] = {}
    for number, bar in enumerate(bars):
        is_short = bar.finished - bar.started < width
        key = int(bar.started / width) if is_short else (number,)
        merged[key] = merged[key].merged(bar) if key in merged else bar
    return list(merged.values())


class Gantt:
    """The attempts of each worker over time; where there are too many, short ones are merged."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.width = 0.001  # seconds; shorter attempts may have been merged
        self.number = 0  # of bars
        self.by_worker: dict[str, list[Bar]] = collections.defaultdict(list)

    def add(self, history: History) -> None:
        job = history.job
        failed = {run.run for run in history.failures}
        for run in history.runs:
            times = (run.started, run.finished, run.waited)
            end = (int(run.run in failed), quoted(run.error or ""))
            self.put(Bar(run.worker, *times, run.outcome, job.id, 1, *end))
        if job.state == PROCESSING:
            began = job.locked_at or self.now
            times = (began, max(began, self.now), job.waited)
            self.put(Bar(job.locked_by or "", *times, "running", job.id))

    def put(self, bar: Bar) -> None:
        self.by_worker[bar.worker].append(bar)
        self.number += 1
        while self.number > 2 * max(BARS, len(self.by_worker)):
            self.width *= 2
            for bars in self.by_worker.values():
                bars[:] = merge_short(bars, self.width)
            self.number = sum(map(len, self.by_worker.values()))

    def lanes(self) -> list[list[Bar]]:
        """Return the bars by lane: a worker takes the lane of one that had ended before it."""
        workers = [sorted(bars, key=lambda bar: bar.started) for bars in self.by_worker.values()]
        lanes: list[list[Bar]] = []
        for bars in sorted(workers, key=lambda bars: bars[0].started):
            free = (lane for lane in lanes if lane[-1].finished <= bars[0].started)
            lane = next(free, None)
            if lane is None:
                lanes.append(lane := [])
            lane += bars
        return lanes

    def facts(self) -> dict[str, Any]:
        lanes = self.lanes()
        start = min((lane[0].started for lane in lanes), default=self.now)
        end = max((bar.finished for lane in lanes for bar in lane), default=self.now)
        shown = lanes[:LANES]
        width = (end - start) / 2000
        number = NEVER
        while number > BARS and width < end - start:
            width *= 2  # at first, about a pixel
            shown = [merge_short(lane, width) for lane in shown]
            number = sum(map(len, shown))
        bars = [[bar._asdict() for bar in lane] for lane in shown]
        return {"start": start, "end": end, "lanes": bars, "hidden": len(lanes) - len(bars)}


class Failures:
    """The attempts that failed, by reason; the dead jobs, and those that cannot run."""

    def __init__(self) -> None:
        self.groups: dict[str, dict[str, Any]] = {}
        self.dead: list[dict[str, Any]] = []  # the first of the dead jobs
        self.blocked: list[Job] = []

    def add(self, history: History) -> None:
        job = history.job
        if job.readiness == BLOCKED and len(self.blocked) < LISTED:
            self.blocked.append(job)
        for run in history.failures:
            reason = quoted(run.error or run.outcome)
            new = {"reason": reason, "attempts": 0, "dead": 0, "when": 0.0, "jobs": []}
            group = self.groups.setdefault(reason, new)
            group["attempts"] += 1
            if job.state == DEAD and run is history.runs[-1]:
                group["dead"] += 1
                if len(self.dead) < DEAD_LISTED:
                    facts = {"id": job.id, "queue": job.queue, "run": run.run, "seq": job.seq}
                    self.dead.append({**facts, "reason": reason})
            if job.id not in group["jobs"]:
                group["jobs"] = [*group["jobs"], job.id][-LISTED:]
            if run.finished >= group["when"]:
                group.update(when=run.finished, seq=job.seq, id=job.id, run=run.run)

    def facts(self, reader: Reader) -> dict[str, Any]:
        """Return these jobs, and the most frequent reasons with the end of one output each."""
        groups = sorted(self.groups.values(), key=lambda g: (g["dead"], g["attempts"], g["when"]))
        shown = groups[: -GROUPS - 1 : -1]
        for group in shown:
            group["when"] = format_time(group["when"])
            group["output"] = reader.output_tail(group.pop("seq"), group["run"], SHORT_TAIL)
            group["last_line"] = last_line(group["output"])
        blocked = [
            {"id": job.id, "queue": job.queue, "reason": describe_blockers(reader.parents(job))}
            for job in self.blocked
        ]
        return {"failures": shown, "dead_jobs": self.dead, "blocked_jobs": blocked}


class Notable:
    """The slowest attempts, the jobs with the most attempts, and those that failed before."""

    def __init__(self) -> None:
        self.ranked: dict[str, list[Any]] = {"slowest": [], "retried": [], "flaky": []}
        self.flaky_number = 0

    def put(self, name: str, size: float, facts: Facts) -> None:
        """Put the facts about a job into a list of the largest."""
        ranked = self.ranked[name]
        ranked.append((size, facts))
        ranked.sort(key=lambda entry: -entry[0])
        del ranked[LISTED:]

    def add(self, history: History) -> None:
        job, runs, failures = history
        facts: dict[str, Any] = {"id": job.id, "queue": job.queue, "state": job.state}
        for run in runs:
            seconds = round(run.finished - run.started, 3)
            self.put("slowest", seconds, {**facts, "run": run.run, "took": seconds})
        facts["failures"] = len(failures)
        facts["reason"] = quoted(failures[-1].error or "") if failures else ""
        if len(runs) > 1:
            self.put("retried", len(runs), {**facts, "attempts": len(runs)})
        if failures and job.state == COMPLETED:
            self.flaky_number += 1
            self.put("flaky", job.updated_at, facts)

    def facts(self) -> dict[str, Any]:
        lists = {name: [facts for _, facts in ranked] for name, ranked in self.ranked.items()}
        return {**lists, "flaky_number": self.flaky_number}


def schedule_facts(reader: Reader, queues: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the active schedules: when each is next due, and how late its last job started."""
    for job in reader.select(SCHEDULES):
        if queues and job.queue not in queues:
            continue
        last = reader.first(LAST_RUN_OF_SCHEDULE, id=job.schedule_id)
        runs = list(reader.attempts(last, SUMMARIES)) if last else []
        started = runs[0].started if runs else last and last.locked_at
        late = started and last and max(0.0, started - (last.scheduled_for or started))
        yield {
            "schedule": job.schedule_id,
            "queue": job.queue,
            "rule": rule_text(job),
            "next": format_time(job.scheduled_for),
            "id": last and last.id,
            "state": last and last.state,
            "started": format_time(started),
            "started_late": None if late is None else round(late, 3),
        }


class Report(NamedTuple):
    """The subject of a report: each renderer takes one and yields text."""

    reader: Reader
    histories: Callable[[], Iterable[History]]  # is called once by a renderer that needs them
    queues: Sequence[str] = ()  # limit the schedules and the metrics; none: all
    since: float = 0.0

    def facts(self) -> dict[str, Any]:
        """Return all facts, as JSON has them; the histories are read once."""
        reader = self.reader
        now = reader.clock()
        counts, course, gantt = Counts(), Course(self.since), Gantt(now)
        failures, notable = Failures(), Notable()
        for history in self.histories():
            for part in (counts, course, gantt, failures, notable):
                part.add(history)
        return {
            "path": reader.db.path,
            "version": __version__,
            "time": format_time(now),
            "since": format_time(self.since) if self.since else None,
            **counts.facts(),
            **course.facts(),
            **notable.facts(),
            **failures.facts(reader),
            "gantt": gantt.facts(),
            "paused": reader.paused(),
            "workers": list(worker_facts(reader)),
            "schedules": list(islice(schedule_facts(reader, self.queues), 100)),
        }


# The tables that text, HTML and Markdown show: of each list of facts, the columns.
TIMES = tuple(f"{name}_{part}" for name in ("took", "waited") for part in ("p50", "p95", "max"))
COLUMNS = {
    "queues": ("queue", "attempts", *TIMES),
    "failures": ("reason", "attempts", "dead", "id", "last_line"),
    "blocked_jobs": ("id", "queue", "reason"),
    "slowest": ("id", "queue", "state", "run", "took"),
    "retried": ("id", "queue", "state", "attempts", "reason"),
    "flaky": ("id", "queue", "failures", "reason"),
    "schedules": ("schedule", "rule", "next", "id", "state", "started", "started_late"),
}
TITLES = {
    "blocked_jobs": "Blocked jobs",
    "flaky": "Completed after failures",
    "slowest": "Slowest attempts",
}
TITLES.update(retried="Most attempts", schedules="Schedules", queues="Queues")


def headings_of(name: str) -> list[str]:
    return ["job" if key == "id" else key.replace("_", " ") for key in COLUMNS[name]]


def cells_of(name: str, item: Facts) -> list[str]:
    """Return a row of one of COLUMNS for people: a float is a duration in seconds."""
    values = [item[key] for key in COLUMNS[name]]
    texts = (format_duration(v) if isinstance(v, float) else v for v in values)
    return ["" if text is None else str(text) for text in texts]


def headline(facts: Facts) -> str:
    counts = ", ".join(f"{facts[state]} {state}" for state in STATES)
    return f"{counts}; {facts['rate']:,.3g} jobs/s, {facts['attempts']} attempts\n"


# HTML. The page needs no script; everything that a job supplied goes through `safe`.

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f24; --dim: #59636e;
  --line: #d8dee4; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1216; --card: #181c22; --ink: #e3e7ec;
  --dim: #97a1ad; --line: #2c333c; } }
.completed { --hue: #2f9e60; } .dead, .failed { --hue: #e5484d; } .timed { --hue: #d9822b; }
.crashed { --hue: #c2489f; } .processing, .running { --hue: #3b82d6; }
.pending { --hue: #8593a3; } .cancelled, .released { --hue: #9376d3; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.2rem; margin: 0; overflow-wrap: anywhere; }
h2, h3 { font-size: 1rem; margin: .5rem 0; }
p, form { margin: .3rem 0; }
a { color: #3b82d6; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  margin: .8rem 0; padding: .4rem 1rem .8rem; }
.dim, figcaption, th { color: var(--dim); font-size: .85rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(6.5rem, 1fr)); gap: .6rem; }
.tile { border-left: 3px solid var(--hue, var(--line)); padding: 0 .6rem; }
.tile b { display: block; font-size: 1.35rem; white-space: nowrap; }
figure { margin: 0 0 .7rem; }
svg { display: block; }
rect, path { fill: var(--hue, var(--dim)); }
.grid, .mark, .wait { fill: none; stroke: var(--line); vector-effect: non-scaling-stroke; }
.mark { stroke: var(--ink); stroke-dasharray: 3 3; }
.wait { stroke: var(--dim); }
.lane { display: grid; grid-template-columns: 1.8rem 1fr; align-items: center; }
.axis { display: flex; justify-content: space-between; color: var(--dim); font-size: .75rem;
  border-top: 1px solid var(--line); }
.lane + .axis { margin-left: 1.8rem; }
@media (max-width: 30rem) { .axis span:nth-child(even) { display: none; } }
i { display: inline-block; width: .7rem; height: .7rem; margin: 0 .3rem 0 .9rem;
  background: var(--hue, var(--dim)); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; }
th, td { padding: .22rem .7rem .22rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; font-weight: 400; }
td span { color: var(--hue); }
td:last-child, td code { overflow-wrap: anywhere; min-width: 12rem; }
td.number, th.number { text-align: right; white-space: nowrap; min-width: 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { margin: .4rem 0; padding: .6rem; background: var(--page); font-size: .8rem;
  white-space: pre-wrap; overflow: auto; overflow-wrap: anywhere; }
.output { max-height: 60vh; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; align-items: baseline; }
nav h1 { flex: 1 1 18rem; }
[aria-current] { color: inherit; font-weight: 600; text-decoration: none; }
label { margin-right: .8rem; }
button, input { font: inherit; }
@media print { :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #000; --dim: #444;
  --line: #bbb; } figure, details, tr { break-inside: avoid; }
  rect, path, i { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
ESCAPED = {ord(c): f"&#{ord(c)};" for c in "&<>\"'`="}


def safe(text: object) -> str:
    """Return any text as HTML, for an element or a quoted attribute; it cannot reorder others."""
    return printable(str(text)).translate(ESCAPED)


def printable_lines(text: str) -> str:
    return "\n".join(map(printable, text.expandtabs().replace("\r\n", "\n").split("\n")))


def element(tag: str, content: str = "", /, **attributes: object) -> str:
    """Return an HTML element; its content is HTML, the values of its attributes are text."""
    words = (f' {key.strip("_").replace("_", "-")}="{safe(v)}"' for key, v in attributes.items())
    end = "" if tag == "input" else f"</{tag}>"
    return f"<{tag}{''.join(words)}>{content}{end}"


def preformatted(text: str, **attributes: object) -> str:
    return element("pre", printable_lines(text).translate(ESCAPED), **attributes)


def card(content: str, heading: str = "", **attributes: object) -> str:
    title = element("h2", heading) if heading else ""
    return element("section", title + content, **attributes) + "\n" if content else ""


def html_page(title: str, body: str, nonce: str = "") -> str:
    """Return a complete page; the nonce lets a Content-Security-Policy admit its style.

    The referrer policy lets a browser send the Origin with a POST; no other site is ever linked.
    """
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{safe(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="same-origin">
{element("style", STYLE, nonce=nonce)}</head>
<body>{body}</body></html>
"""


def html_grid(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of HTML cells; columns whose headings end with # are numbers."""
    classes = [' class="number"' if heading[-1:] == "#" else "" for heading in headings]
    lines = ["".join(f"<td{css}>{cell}</td>" for css, cell in zip(classes, row)) for row in rows]
    head = "".join(f"<th{css}>{safe(h.rstrip('#'))}</th>" for css, h in zip(classes, headings))
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>' if lines else ""


def html_table(name: str, facts: Facts, link: Link) -> str:
    """Return one of COLUMNS below its title; empty if it has no rows."""
    items = facts[name][:100]
    if not items:
        return ""
    keys = COLUMNS[name]
    numeric = (isinstance(items[0][key], (int, float)) for key in keys)
    headings = [text + "#" * is_number for text, is_number in zip(headings_of(name), numeric)]
    rows = []
    for item in items:
        cells = zip(keys, cells_of(name, item))
        rows.append([link(text) if key == "id" and text else safe(text) for key, text in cells])
    return element("h3", TITLES[name]) + html_grid(headings, rows)


def rect(css: str, x: float, y: float, width: float, height: float, title: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="{safe(css)}" {place}><title>{safe(title)}</title></rect>'


def svg(shapes: str, height: int, label: str, parts: int = 4) -> str:
    """Return a picture 1000 units wide that fills its column; lines divide it into parts."""
    grid = "".join(f"M{1000 * n / parts:.1f} 0v{height}" for n in range(1, parts))
    size = {"viewBox": f"0 0 1000 {height}", "width": "100%", "height": height}
    content = element("path", class_="grid", d=grid) + shapes
    about = {"role": "img", "aria_label": label}
    return element("svg", content, **size, **about, preserveAspectRatio="none")


def time_label(when: float, span: float) -> str:
    style = "%H:%M:%S" if span < 3600 else "%H:%M" if span < 86400 else "%d %b %H:%M"
    label = datetime.fromtimestamp(when, timezone.utc).astimezone().strftime(style)
    return f"{label}.{int(when * 10) % 10}" if span < 20 else label


def axis(labels: Iterable[str]) -> str:
    return element("div", "".join(element("span", safe(label)) for label in labels), class_="axis")


def time_axis(start: float, span: float) -> str:
    return axis(time_label(start + span * n / 4, span) for n in range(5))


def legend(outcomes: Iterable[str]) -> str:
    items = (element("i", class_=word) + safe(word) for word in outcomes)
    return element("p", "".join(items), class_="dim")


def figure(caption: str, content: str) -> str:
    return element("figure", element("figcaption", caption) + content)


def html_tiles(facts: Facts, _link: Link) -> str:
    busy = sum(worker["job"] is not None for worker in facts["workers"])
    tiles: dict[str, str] = {state: f"{facts[state]:,}" for state in STATES}
    tiles["jobs/s"] = f"{facts['rate']:,.3g}"
    tiles["workers busy"] = f"{busy}/{len(facts['workers'])}"
    tiles["p50 duration"] = format_duration(facts["took_p50"])
    tiles["p95 duration"] = format_duration(facts["took_p95"])
    tiles["longest"] = format_duration(facts["took_max"])
    boxes = ""
    for name, value in tiles.items():
        label = element("span", name, class_="dim")
        css = f"tile {name}" if name in STATES else "tile"
        boxes += element("div", element("b", value) + label, class_=css)
    paused = ", ".join(name or "all queues" for name in facts["paused"])
    note = element("p", f"paused: {safe(paused)}", class_="dim") if paused else ""
    return element("div", boxes, class_="tiles") + note


def describe_bar(bar: Facts, span: float) -> str:
    times = f"{time_label(bar['started'], span)} to {time_label(bar['finished'], span)}"
    took = format_duration(bar["finished"] - bar["started"])
    wait = f", after waiting {format_duration(bar['waited'])}" if bar["waited"] >= 0.001 else ""
    reason = f": {bar['reason']}" if bar["reason"] else ""
    about = f"job {bar['id']} {bar['outcome']}{reason}"
    if bar["number"] > 1:
        return f"{bar['number']} attempts, {bar['failures']} failed, {times}; {about}"
    return f"{about}; {times} ({took}){wait}"


def html_lane(lane: Sequence[Facts], start: float, span: float) -> str:
    """Return attempts as bars; of merged ones, the part that failed is in its colour."""
    waits = bars = ""
    for bar in lane:
        began = max(start, bar["started"] - bar["waited"])
        left = min((bar["started"] - start) / span * 1000, 999.2)
        width = max((bar["finished"] - bar["started"]) / span * 1000, 0.8)
        title = describe_bar(bar, span)
        height = 12.0
        if 0 < bar["failures"] < bar["number"]:
            bars += rect(COMPLETED, left, 2, width, height, title)
            height = max(2.0, height * bar["failures"] / bar["number"])
        bars += rect(bar["outcome"], left, 2, width, height, title)
        waits += f"M{(began - start) / span * 1000:.1f} 8H{left:.1f}"
    return element("path", class_="wait", d=waits) + bars


def html_gantt(facts: Facts, _link: Link) -> str:
    """Return a lane for each worker slot: its attempts, and their waits as a thin line."""
    gantt = facts["gantt"]
    start = gantt["start"]
    span = max(gantt["end"] - start, 0.001)
    rows = ""
    for number, lane in enumerate(gantt["lanes"], 1):
        picture = svg(html_lane(lane, start, span), 16, f"the attempts of worker slot {number}")
        rows += element("div", element("span", str(number), class_="dim") + picture, class_="lane")
    hidden = element("p", f"and {gantt['hidden']} more slots", class_="dim")
    outcomes = {bar["outcome"] for lane in gantt["lanes"] for bar in lane}
    below = hidden * (gantt["hidden"] > 0) + legend(sorted(outcomes))
    return rows and rows + time_axis(start, span) + below


def html_depth(facts: Facts, _link: Link) -> str:
    """Return how many jobs were in each state over time: an area for each state that occurred."""
    depth = facts["depth"]
    found = ""
    for state in STATES:
        values = depth[state]
        if most := max(values, default=0):
            step = 1000 / len(values)
            line = "".join(f"V{40 - 38 * v / most:.1f}h{step:.2f}" for v in values)
            area = element("path", class_=state, d=f"M0 40{line}V40z")
            caption = f"{state}: {values[-1]:,}, at most {most:,}"
            found += figure(caption, svg(area, 40, f"jobs {state}"))
    return found and found + time_axis(depth["start"], depth["width"] * len(depth[PENDING]))


def html_finished(facts: Facts, _link: Link) -> str:
    """Return bars of the jobs that finished in each bucket of time, those that died on top."""
    finished = facts["finished"]
    start, width = finished["start"], finished["width"]
    pairs = list(zip(finished[COMPLETED], finished[DEAD]))
    most = max(map(sum, pairs), default=0)
    if not most:
        return ""
    step = 1000 / len(pairs)
    span = width * len(pairs)
    shapes = ""
    for n, (completed, dead) in enumerate(pairs):
        title = f"{time_label(start + n * width, span)}: {completed} completed, {dead} dead"
        top = 80.0
        for css, number in ((COMPLETED, completed), (DEAD, dead)):
            height = 78 * number / most
            top -= height
            shapes += rect(css, n * step, top, step * 0.92, height, title) if number else ""
    caption = f"in {format_duration(width)} each, at most {most:,}"
    below = time_axis(start, span) + legend((COMPLETED, DEAD))
    return figure(caption, svg(shapes, 80, "jobs finished over time") + below)


def html_durations(facts: Facts, link: Link) -> str:
    """Return how long attempts took, on a logarithmic scale, and a table of the queues."""
    bins = facts["histogram"]
    if not bins:
        return ""
    low = math.floor(math.log10(bins[0][0] * 1.01))
    high = math.ceil(math.log10(bins[-1][1] * 0.99))
    most = max(number for *_, number in bins)

    def place(seconds: float) -> float:
        return (math.log10(max(seconds, 1e-3)) - low) / (high - low) * 1000

    shapes = ""
    for begin, end, number in bins:
        title = f"{format_duration(begin)} to {format_duration(end)}: {plural(number, 'attempt')}"
        height = 78 * number / most
        width = (place(end) - place(begin)) * 0.92
        shapes += rect("running", place(begin), 80 - height, width, height, title)
    for key in ("took_p50", "took_p95"):
        shapes += element("path", class_="mark", d=f"M{place(facts[key]):.1f} 0v80")
    half, most_of = (format_duration(facts[key]) for key in ("took_p50", "took_p95"))
    caption = f"p50 {half}, p95 {most_of} (dashed), at most {most:,} in a bar"
    labels = axis(format_duration(10.0**n) for n in range(low, high + 1))
    chart = figure(caption, svg(shapes, 80, "durations of attempts", high - low) + labels)
    return chart + html_table("queues", facts, link)


def html_failures(facts: Facts, link: Link) -> str:
    """Return the failed attempts by reason, with the end of one output each."""
    found = ""
    for place, group in enumerate(facts["failures"]):
        numbers = f"{plural(group['attempts'], 'attempt')}, {plural(group['dead'], 'dead job')}"
        title = f"{element('b', safe(group['reason']))} {element('span', numbers, class_='dim')}"
        last = f"last by job {link(group['id'])} in run {group['run']}, {safe(group['when'])}"
        note = f"{last}; jobs: {', '.join(map(link, group['jobs']))}"
        content = element("summary", title) + element("p", note, class_="dim")
        content += preformatted(group["output"]) if group["output"].strip() else ""
        found += element("details", content, **({"open": ""} if place < 3 else {}))
    return found


PARTS: dict[str, tuple[str, str, Callable[[Facts, Link], str]]] = {  # heading; text if empty
    "tiles": ("", "", html_tiles),
    "failures": ("Failures by reason", "Nothing has failed.", html_failures),
    "gantt": ("Attempts by worker slot, waits as a thin line", "No attempts yet.", html_gantt),
    "finished": ("Jobs finished", "No job has finished yet.", html_finished),
    "depth": ("Jobs by state", "No jobs yet.", html_depth),
    "durations": ("How long attempts took", "No attempt has ended yet.", html_durations),
    **{name: ("", "", partial(html_table, name)) for name in TITLES if name != "queues"},
}


def html_part(name: str, facts: Facts, link: Link = safe) -> str:
    """Return a part of the overview as a section whose id is the name; empty without content."""
    heading, empty, render = PARTS[name]
    return card(render(facts, link) or empty, heading, id=name)


def html_report(report: Report) -> Iterator[str]:
    facts = report.facts()
    about = f"{plural(facts['jobs'], 'job')}, {plural(facts['attempts'], 'attempt')}"
    since = f" since {facts['since']}" if facts["since"] else ""
    note = safe(f"{about}{since}; made at {facts['time']} by queuectl {__version__}")
    header = element("h1", safe(facts["path"])) + element("p", note, class_="dim")
    body = "".join(html_part(name, facts) for name in PARTS)
    yield html_page(f"queuectl: {facts['path']}", f"{header}\n{body}")


# Markdown and plain text.

MARKDOWN_LIMIT = 900_000  # bytes; GitHub refuses a summary of more than 1 MiB
INERT = {ord(c): f"&#{ord(c)};" for c in "&<>\"'`\\*_[]|~#@:"}


def markdown_table(facts: Facts, name: str) -> str:
    lines = [headings_of(name), ["---"] * len(COLUMNS[name])]
    for item in facts[name][:LISTED]:
        lines.append([printable(cell).translate(INERT) for cell in cells_of(name, item)])
    rows = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"\n#### {TITLES[name]}\n\n{rows}" if facts[name] else ""


def fenced(text: str) -> str:
    """Return text as a code block, whose fence is longer than any run of backticks in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{printable_lines(text)}\n{fence}\n"


def markdown_blocks(report: Report) -> Iterator[str]:
    facts = report.facts()
    yield f"### queuectl: {headline(facts)}"
    yield from (
        markdown_table(facts, name) for name in ("queues", "blocked_jobs", "flaky", "slowest")
    )
    for job in facts["dead_jobs"]:
        output = report.reader.output_tail(job["seq"], job["run"], TAIL).strip()
        name, reason = (printable(job[key]).translate(INERT) for key in ("id", "reason"))
        block = f"\n#### Job {name} is dead: {reason}\n"
        yield block + (f"\n{fenced(output)}" if output else "")
    if more := facts[DEAD] - len(facts["dead_jobs"]):
        yield f"\nand {plural(more, 'more dead job')}\n"


def markdown_report(report: Report) -> Iterator[str]:
    """Yield a summary for CI, within MARKDOWN_LIMIT."""
    size = left_out = 0
    for block in markdown_blocks(report):
        size += len(block.encode())
        if size > MARKDOWN_LIMIT:
            left_out += 1
        else:
            yield block
    if left_out:
        yield f"\n{plural(left_out, 'part')} left out: a summary may not be larger\n"


def text_report(report: Report) -> Iterator[str]:
    """Yield one screen: counts, times by queue, reasons of failures, and notable jobs."""
    facts = report.facts()
    yield headline(facts)
    limits = {"queues": 5, "failures": 5, "blocked_jobs": 3, "slowest": 3, "retried": 3, "flaky": 3}
    for name, limit in limits.items():
        headings = [name, *headings_of(name)[1:]]
        rows = [cells_of(name, item) for item in facts[name][:limit]]
        yield from (f"{line}\n" for line in section([h.upper() for h in headings], rows))


def json_report(report: Report) -> Iterator[str]:
    yield json.dumps(report.facts()) + "\n"


# JUnit. The elements are in the order of Maven Surefire's schema.

JUNIT_OUTPUT = 10_000_000  # characters of output in a report; GitLab refuses files above 30 MB
XML_REFUSED = "[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"


def xml_text(text: str) -> str:
    """Return any text for an element; a character that XML cannot hold is written as #x1B."""
    held = re.sub(XML_REFUSED, lambda found: f"#x{ord(found[0]):X}", text)
    return held.translate(ESCAPED).replace("\r", "&#13;")


def xml_tag(name: str, /, **attributes: str) -> str:
    texts = {key: xml_text(value) for key, value in attributes.items()}
    blanks = {ord(c): f"&#{ord(c)};" for c in "\t\n"}  # an attribute would lose them
    words = "".join(f' {key}="{text.translate(blanks)}"' for key, text in texts.items())
    return f"<{name}{words}>"


class JUnitCases:
    """The results of jobs as test cases, which show a limited amount of output together."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.room = JUNIT_OUTPUT

    def failure(self, job: Job, run: Attempt, name: str) -> str:
        reason = run.error or run.outcome
        text = xml_text(f"{reason}\n")
        if self.room > 0:
            text += xml_text(self.reader.output_tail(job.seq, run.run, TAIL))
            self.room -= len(text)
        else:
            text += "its output is left out: the report would be too large\n"
        if name in ("rerunFailure", "flakyFailure"):
            text = f"<stackTrace>{text}</stackTrace>"
        return f"{xml_tag(name, message=reason, type=run.outcome)}{text}</{name}>\n"

    def elements(self, history: History) -> tuple[str, list[str]]:
        """Return how a job counts in its suite, and the elements of its case."""
        job, _, failures = history
        if job.state == COMPLETED:
            return "", [self.failure(job, run, "flakyFailure") for run in failures]
        if job.state == DEAD and failures:
            *earlier, last = failures
            could_start = last.outcome != "failed" or last.exit_code is not None
            name = "failure" if could_start else "error"
            final = self.failure(job, last, name)
            reruns = [self.failure(job, run, "rerunFailure") for run in earlier]
            return f"{name}s", [final, *reruns] if could_start else [*reruns, final]
        reason = job.last_error or job.state
        if job.readiness == BLOCKED:
            reason = describe_blockers(self.reader.parents(job))
        return "skipped", [xml_tag("skipped", message=reason) + "</skipped>\n"]


def junit_report(report: Report) -> Iterator[str]:
    """Yield a suite for each queue, with a case for each job."""
    found = JUnitCases(report.reader)
    suites: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    cases: dict[str, list[str]] = collections.defaultdict(list)
    for history in report.histories():
        job = history.job
        seconds = sum(run.finished - run.started for run in history.runs[-1:])
        result, elements = found.elements(history)
        suites[job.queue].update({"tests": 1, result: 1, "ms": round(1000 * seconds)})
        case = xml_tag("testcase", name=job.id, classname=job.queue, time=f"{seconds:.3f}")
        cases[job.queue].append(f"{case}{''.join(elements)}</testcase>\n")
    yield '<?xml version="1.0" encoding="UTF-8"?>\n<testsuites>\n'
    for queue, suite in sorted(suites.items()):
        counts = {key: str(suite[key]) for key in ("tests", "errors", "skipped", "failures")}
        yield xml_tag("testsuite", name=queue, time=f"{suite['ms'] / 1000:.3f}", **counts)
        yield from cases[queue]
        yield "</testsuite>\n"
    yield "</testsuites>\n"


# Prometheus: the text format 0.0.4.

METRICS = {  # by name: the type and the meaning
    "jobs": ("gauge", "Jobs by queue and state."),
    "oldest_ready_seconds": ("gauge", "How long the oldest ready job has been due."),
    "paused": ("gauge", "1 if no jobs of the queue are started."),
    "limit": ("gauge", "How many jobs may run at once; 0 means any number."),
    "workers": ("gauge", "Living workers by state."),
    "attempts_total": ("counter", "Attempts that have ended."),
    "attempt_seconds": ("summary", "How long attempts took."),
    "wait_seconds": ("summary", "How long jobs were ready before their attempts."),
    "last_completed_timestamp_seconds": ("gauge", "When a job last completed."),
    "build_info": ("gauge", "The version of queuectl."),
}


def present_samples(reader: Reader, queues: Sequence[str]) -> Iterator[Sample]:
    counts = collections.Counter({(queue, state): 0 for queue in queues for state in STATES})
    for queue, state, _, number in reader.counts_by_queue(queues):
        counts[queue, state] += number
    for (queue, state), number in counts.items():
        yield "jobs", number, {"queue": queue, "state": state}
    now = reader.clock()
    paused = reader.paused()
    for queue in queues:
        labels = {"queue": queue}
        yield "paused", "" in paused or queue in paused, labels
        yield "limit", reader.settings(queue)["limit"], labels
        if (due := reader.oldest_due(queue)) is not None:
            yield "oldest_ready_seconds", max(0.0, now - due), labels
    workers = list(worker_facts(reader))
    busy = sum(worker["job"] is not None for worker in workers)
    yield "workers", len(workers) - busy, {"state": "idle"}
    yield "workers", busy, {"state": "busy"}
    yield "build_info", 1, {"version": __version__}


def total_samples(totals: Sequence[Totals]) -> Iterator[Sample]:
    """Yield the metrics of attempts, which count also the jobs that were deleted meanwhile."""
    sums: dict[tuple[str, str], float] = collections.defaultdict(float)
    for row in totals:
        yield "attempts_total", row.number, {"queue": row.queue, "outcome": row.outcome}
        if row.outcome == COMPLETED:
            yield "last_completed_timestamp_seconds", row.last, {"queue": row.queue}
        for name, seconds in (("attempt_seconds", row.running), ("wait_seconds", row.waiting)):
            sums[f"{name}_sum", row.queue] += seconds
            sums[f"{name}_count", row.queue] += row.number
    for (name, queue), total in sums.items():
        yield name, total, {"queue": queue}


def prometheus_report(report: Report) -> Iterator[str]:
    reader = report.reader
    totals = [row for row in reader.totals() if not report.queues or row.queue in report.queues]
    counted = {row[0] for row in reader.counts_by_queue(report.queues)}
    queues = sorted(counted.union(row.queue for row in totals))
    families: dict[str, str] = dict.fromkeys(METRICS, "")
    escapes = {ord("\\"): r"\\", ord('"'): r"\"", ord("\n"): r"\n"}
    for name, value, labels in chain(present_samples(reader, queues), total_samples(totals)):
        pairs = ",".join(f'{key}="{text.translate(escapes)}"' for key, text in labels.items())
        family = name if name in METRICS else name.rpartition("_")[0]  # of _sum and _count
        families[family] += f"queuectl_{name}{{{pairs}}} {value:.15g}\n"
    for name, (kind, meaning) in METRICS.items():
        yield f"# HELP queuectl_{name} {meaning}\n# TYPE queuectl_{name} {kind}\n{families[name]}"


# Files.

FORMATS: dict[str, Callable[[Report], Iterator[str]]] = {
    "text": text_report,
    "html": html_report,
    "junit": junit_report,
    "markdown": markdown_report,
    "prometheus": prometheus_report,
    "json": json_report,
}
ENDINGS = {".txt": "text", ".html": "html", ".xml": "junit", ".md": "markdown"}
ENDINGS.update({".prom": "prometheus", ".json": "json"})


def format_of(path: str) -> str:
    """Return the format that the ending of a file stands for, or raise BadInput."""
    ending = os.path.splitext(path)[1].lower()
    if ending not in ENDINGS:
        raise BadInput(f"{quoted(path)} must end in {', '.join(ENDINGS)}, or use --format")
    return ENDINGS[ending]


def replace_file(path: str, data: bytes, mode: int = 0o666) -> None:
    """Write a file aside and give it its name: whoever reads it sees the old one or the new one."""
    aside = f"{path}.{os.getpid()}"
    try:
        with open(aside, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):  # once it is renamed, there is none
            os.unlink(aside)


def foreign_link(path: str) -> str | None:
    """Return why a link on the way to a file may be a trap, which Linux too would not follow."""
    with contextlib.suppress(FileNotFoundError):
        os.stat(path)  # a loop of links ends here
    steps = steps_to(path if os.path.isabs(path) else os.path.join(os.getcwd(), path))
    links = filter(os.path.islink, steps)
    shared = (link for link in links if others_may_write(os.stat(os.path.dirname(link))))
    return next(filter(None, map(insecure_step, shared)), None)


def write_report(path: str, chunks: Iterable[str]) -> None:
    data = "".join(chunks).encode(errors="backslashreplace")
    try:
        if problem := foreign_link(path):
            raise Fault(f"{problem}; name the file that it leads to")
        if os.path.isfile(path) or not os.path.exists(path):
            replace_file(os.path.realpath(path), data)
        else:  # a device
            with open(path, "wb") as file:
                file.write(data)
    except OSError as error:
        raise Fault(f"{quoted(path)}: {error.strerror}") from None


# --- web: the report as a live page, for a browser on this machine --------------------------------

WEB_PORT = 8642
MAX_CONNECTIONS = 32  # each has a thread
CONNECTION_SECONDS = 10.0  # how long a connection may last
QUERY_SECONDS = 2.0  # how long the statements of one page may take
LARGEST_BODY = 1 << 18  # bytes of a POST
LARGEST_RAW = 16 << 20  # bytes of output that are sent as a file
SHOWN_OUTPUT = 1 << 16  # bytes of output on a page
PAGE_SIZE = 100  # jobs, attempts or schedules on a page
OVERVIEW_JOBS = 1000  # the latest jobs, about which the overview reports
EXAMINED = 10_000  # dead jobs that are grouped by reason
SEARCHED = 500  # jobs that a search reads at a time
SEARCH_SECONDS = 0.15
LAST = 10**17  # a number after that of every job
LOOPBACK_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)
HTTP_STATUS = {BadInput: 400, NotFound: 404, Fault: 503}


class Refused(Exception):
    """A request is refused; the arguments are an HTTP status and the reason."""


def address(path: str, /, **fields: Any) -> str:
    """Return the URL of a page, without the fields that are empty."""
    from urllib.parse import urlencode

    query = urlencode({key: value for key, value in fields.items() if value}, doseq=True)
    return f"{path}?{query}" if query else path


def parse_fields(text: str) -> dict[str, list[str]]:
    from urllib.parse import parse_qs

    try:
        return parse_qs(text, keep_blank_values=True, max_num_fields=5000)
    except ValueError:
        raise Refused(400, "too many fields") from None


class Request(NamedTuple):
    """A request; `fields` are those of the query or, for a POST, of the form."""

    method: str
    path: str
    fields: Mapping[str, list[str]]
    headers: Any

    def text(self, name: str) -> str:
        """Return the last value of a field, empty if there is none."""
        return self.fields.get(name, [""])[-1]

    def number(self, name: str) -> int:
        """Return the value of a field, 0 if it is empty."""
        return int(validate(name, integer(0, 1 << 53), self.text(name) or 0))

    def header(self, name: str) -> str:
        """Return the value of a header that may not be repeated, empty if there is none."""
        values = self.headers.get_all(name, [""])
        if len(values) > 1:
            raise Refused(400, f"more than one {name} header")
        return str(values[0]).strip()

    @property
    def url(self) -> str:
        return address(self.path, **self.fields)


class Response(NamedTuple):
    """A response: a page, unless it has another type."""

    status: int
    body: str | bytes = ""
    kind: str = "text/html"
    nonce: str = ""  # of the styles and scripts that the page may have
    headers: Mapping[str, str] = {}


class Page(NamedTuple):
    """A page: `parts` are kept up to date while it is open, `top` is not."""

    title: str
    parts: Mapping[str, str]
    top: str = ""


class Gate:
    """Admits requests only from the browser and the scripts of this user.

    A page of another site can make the browser send requests here, even under a name that resolves
    to this machine. So the Host must be a loopback name, the Origin ours, and the token correct.
    """

    def __init__(self, port: int) -> None:
        import secrets

        self.token = secrets.token_urlsafe(32)
        self.cookie = f"queuectl-{port}"  # the cookies of all ports are sent to each

    def is_token(self, word: str) -> bool:
        import hmac

        return hmac.compare_digest(word.encode(), self.token.encode())

    def admit(self, request: Request) -> Response | None:
        """Return None to admit a request, or the response to a login; else raise Refused."""
        self.check_host(request)
        is_login = request.method != "POST" and request.path == "/" and "token" in request.fields
        site = request.header("Sec-Fetch-Site") or "none"
        if is_login and self.is_token(request.text("token")):
            return self.log_in(is_direct=site == "none")
        if site not in ("same-origin", "none"):
            raise Refused(403, f"a request from another site ({quoted(site)})")
        if is_login or not (self.has_bearer(request) or self.has_cookie(request)):
            how = "open the address that `queuectl web` printed; each start has a new one"
            raise Refused(401, f"no valid token: {how}")
        return None

    def check_host(self, request: Request) -> None:
        hosts = request.headers.get_all("Host", [])
        if len(hosts) != 1 or not LOOPBACK_HOST.fullmatch(hosts[0].strip()):
            raise Refused(421, "the Host must be 127.0.0.1 or localhost")
        origin = request.header("Origin")
        if origin and origin.lower() != f"http://{hosts[0].strip().lower()}":
            raise Refused(403, f"a request from another origin ({quoted(origin)})")

    def has_bearer(self, request: Request) -> bool:
        kind, _, word = request.header("Authorization").partition(" ")
        return kind.lower() == "bearer" and self.is_token(word.strip())

    def has_cookie(self, request: Request) -> bool:
        """Tell whether the cookie is sent; a POST must have an Origin too, which browsers send."""
        pairs = (pair.strip().partition("=") for pair in request.header("Cookie").split(";"))
        sent = any(name == self.cookie and self.is_token(word) for name, _, word in pairs)
        if sent and request.method == "POST" and not request.header("Origin"):
            raise Refused(403, "a POST without an Origin")
        return sent

    def log_in(self, *, is_direct: bool) -> Response:
        """Exchange the token in the URL for a cookie, and redirect to the URL without it.

        After a redirect, the browser still attributes the request to the page with the link, and
        withholds the cookie if that is another site's, or a file.
        """
        cookie = f"{self.cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/"
        if is_direct:
            return Response(303, headers={"Set-Cookie": cookie, "Location": "/"})
        return Response(200, headers={"Set-Cookie": cookie, "Refresh": "0; url=/"})


POLICY = "default-src 'none'; style-src {0}; script-src {0}; connect-src 'self'; img-src 'self'"
POLICY += "; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Connection": "close",
}


def encode_response(response: Response, *, head_only: bool = False) -> bytes:
    from http import HTTPStatus

    body = response.body.encode() if isinstance(response.body, str) else response.body
    headers = {**SECURITY_HEADERS, **response.headers}
    own = f"'nonce-{response.nonce}'" if response.nonce else "'none'"
    headers["Content-Security-Policy"] = POLICY.format(own)
    headers["Content-Type"] = f"{response.kind}; charset=utf-8"
    headers["Content-Length"] = str(len(body))
    lines = [f"HTTP/1.0 {response.status} {HTTPStatus(response.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join(lines).encode("ascii") + b"\r\n\r\n"
    return head if head_only else head + body


def refusal(status: int, reason: str) -> Response:
    more = {401: {"WWW-Authenticate": "Bearer"}, 405: {"Allow": "GET, HEAD, POST"}}
    return Response(status, f"{reason}\n", "text/plain", headers=more.get(status, {}))


def read_form(headers: Any, file: Any) -> str:
    """Return the body of a POST, or refuse it."""
    lengths = headers.get_all("Content-Length", [])
    if len(lengths) != 1 or "Transfer-Encoding" in headers:
        raise Refused(411, "a POST needs one Content-Length")
    if not re.fullmatch("[0-9]{1,18}", lengths[0].strip()):
        raise Refused(400, "the Content-Length must be a number")
    length = int(lengths[0])
    if length > LARGEST_BODY:
        raise Refused(413, f"a POST must not have more than {LARGEST_BODY} bytes")
    body = file.read(length)
    if headers.get_content_type() != "application/x-www-form-urlencoded":
        raise Refused(415, "a POST must be a form")
    if len(body) < length:
        raise Refused(400, "the body is shorter than its Content-Length")
    return str(body, "ascii", "replace")


def handler_class(respond: Callable[[Request], Response]) -> Any:
    """Return the class whose objects handle one connection each: one request, by HTTP/1.0.

    With HTTP/1.1, the body of a refused POST could be taken for the next request.
    """
    from http.server import BaseHTTPRequestHandler

    class Handler(BaseHTTPRequestHandler):
        """Reads a request, and writes the response."""

        timeout = CONNECTION_SECONDS

        def do_GET(self) -> None:
            path, _, text = self.path.partition("?")
            try:
                if self.command == "POST":
                    text = read_form(self.headers, self.rfile)
                request = Request(self.command, path, parse_fields(text), self.headers)
                response = respond(request)
            except Refused as error:
                response = refusal(*error.args)
            self.wfile.write(encode_response(response, head_only=self.command == "HEAD"))

        do_HEAD = do_POST = do_GET  # noqa: N815

        def send_error(self, code: int, *_: Any, **_more: Any) -> None:
            response = refusal(405 if code == 501 else code, "this request is not understood")
            self.wfile.write(encode_response(response))

        def log_message(self, *_: Any, **_more: Any) -> None:
            """Log nothing: a request may contain the token."""

    return Handler


def end_old(opened: Mapping[Any, float]) -> None:
    """End the oldest connections, if there are too many, and those that last too long."""
    excess = len(opened) - MAX_CONNECTIONS
    for number, (connection, since) in enumerate(list(opened.items())):
        if number < excess or time.monotonic() > since + CONNECTION_SECONDS:
            with contextlib.suppress(OSError):  # its thread, which waits for it, ends
                connection.shutdown(2)  # SHUT_RDWR


def server_class() -> Any:
    from socketserver import ThreadingTCPServer

    opened: dict[Any, float] = {}  # the connections, oldest first, and when they were opened

    class Server(ThreadingTCPServer):
        """Limits the number of connections, and the time that each takes."""

        allow_reuse_address = not WINDOWS  # there, another program could take the same port
        daemon_threads = True
        request_queue_size = 1024

        def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002
            most = 2 * MAX_CONNECTIONS  # with threads that are about to end
            return any(len(opened) < most for _ in polling(1.0))

        def process_request(self, request: Any, client_address: Any) -> None:
            opened[request] = time.monotonic()
            super().process_request(request, client_address)

        def shutdown_request(self, request: Any) -> None:
            opened.pop(request, None)
            super().shutdown_request(request)

        def service_actions(self) -> None:
            end_old(opened)

        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exc_info()[1], OSError):  # else the other side is gone
                super().handle_error(request, client_address)

    return Server


def make_server(port: int, respond: Callable[[Request], Response]) -> Any:
    """Return a server on the loopback interface; port 0 is any free one."""
    try:
        return server_class()(("127.0.0.1", port), handler_class(respond))
    except OSError as error:
        hint = "choose another one with --port, or 0 for any that is free"
        raise Fault(f"port {port}: {error.strerror}; {hint}") from None


# The pages. Whatever a job supplied goes through `safe`, or through a function that calls it.

WEB_SCRIPT = """
"use strict";
const button = document.getElementById("pause");
const note = document.getElementById("live");
let paused = false;
function isRead() {
  const active = document.activeElement;
  return document.hidden || !getSelection().isCollapsed || (active && active.closest("[data-tag]"))
    || document.querySelector("[data-tag] input:checked");
}
function replace(part) {
  const old = document.getElementById(part.id);
  const both = (kind) => [...part.querySelectorAll(kind)]
    .map((after, i) => [old.querySelectorAll(kind)[i], after]).filter(([e]) => e);
  const outputs = both("pre").map(([e, after]) =>
    [after, e.scrollTop + e.clientHeight >= e.scrollHeight - 4 ? 1e9 : e.scrollTop]);
  for (const [e, after] of both("details")) after.open = e.open;
  old.replaceWith(part);
  for (const [e, place] of outputs) e.scrollTop = place;
}
async function update() {
  const tags = [...document.querySelectorAll("[data-tag]")].map((e) => e.dataset.tag);
  const answer = await fetch(location.href, {headers: {"X-Queuectl-Tags": tags.join(" ")}});
  const reasons = {401: "open the address that the server printed", 404: "it no longer exists"};
  if (!answer.ok) throw new Error(reasons[answer.status] || "no answer; trying again");
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  if (!isRead()) page.querySelectorAll("[data-tag]").forEach(replace);
}
async function turn() {
  const began = performance.now();
  note.textContent = paused ? "paused" : isRead() ? "paused while you select" : "live";
  if (note.textContent === "live") {
    try {
      await update();
    } catch (error) {
      note.textContent = error instanceof TypeError ? "the server is gone" : error.message;
    }
  }
  setTimeout(turn, Math.max(1000, 20 * (performance.now() - began)));
}
button.hidden = false;
button.onclick = () => {
  paused = !paused;
  button.textContent = paused ? "Resume updates" : "Pause updates";
};
document.querySelectorAll(".output").forEach((e) => { e.scrollTop = 1e9; });
setTimeout(turn, 1000);
"""
STATE_TABS: Mapping[str, tuple[State, int]] = {
    **{word: (PENDING, readiness) for readiness, word in READINESS_WORDS.items()},
    **{state: (state, READY) for state in (PROCESSING, *FINISHED)},
}


def link(text: object, path: str, **fields: object) -> str:
    return element("a", safe(text), href=address(path, **fields))


def job_link(job_id: str) -> str:
    return link(job_id, "/job", id=job_id)


def code(text: str) -> str:
    return element("code", safe(shorten(text, 160)))


def time_cell(when: float, now: float) -> str:
    return element("span", safe(format_distance(when, now)), title=format_time(when))


def action_form(
    content: str, actions: Iterable[str], back: str, fields: Iterable[tuple[str, str]] = ()
) -> str:
    """Return a form around some HTML, with a button for each action; `back` is its page."""
    for name, value in (*fields, ("back", back)):
        content += element("input", type="hidden", name=name, value=value)
    for action in actions:
        content += element("button", action.capitalize(), name="action", value=action) + " "
    return element("form", content, method="post", action="/act")


def menu_of(links: Iterable[tuple[str, str]], current: str) -> str:
    """Return links, given as URL and text; the one to the current page is marked."""
    marks: dict[str, Any] = {current: {"aria_current": "page"}}
    return " ".join(element("a", text, href=url, **marks.get(url, {})) for url, text in links)


def queues_html(reader: Reader, back: str) -> str:
    """Return a table of the queues, with buttons to pause and resume them."""
    counts: dict[str, Any] = collections.defaultdict(collections.Counter)
    for queue, state, _, number in reader.counts_by_queue():
        counts[queue][state] += number
    paused = reader.paused()

    def form(queue: str, text: str = "") -> str:
        action = "resume" if queue in paused else "pause"
        return action_form(text, (action,), back, [("queue", queue)])

    rows = []
    for queue in sorted({*counts, *paused} - {""})[:PAGE_SIZE]:
        numbers = [f"{counts[queue][state]:,}" for state in STATES]
        word = "paused" if {"", queue} & {*paused} else ""
        rows.append((link(queue, "/jobs", queue=queue), *numbers, word, form(queue)))
    headings = ("queue", *(f"{state}#" for state in STATES), "", "")
    return html_grid(headings, rows) + form("", "All queues: ")


def last_history(reader: Reader, job: Job) -> History:
    """Return a job with the last PAGE_SIZE of its attempts."""
    rows = reader.db.rows(LAST_RUNS, {"seq": job.seq, "limit": PAGE_SIZE})
    return history(job, [Attempt(*row) for row in reversed(rows)])


def overview_page(reader: Reader, request: Request) -> Page:
    """Show the report about the jobs that ran last, and the counts of all jobs."""
    asked = {"readiness": READY, "updated_at": NEVER, "seq": LAST, "limit": OVERVIEW_JOBS}
    found: list[Job] = []
    for state in (PROCESSING, *FINISHED):
        found += reader.select(IN_STATE_BEFORE, state=state, **asked)
    latest = sorted(found, key=lambda job: job.updated_at)[-OVERVIEW_JOBS:]
    report = Report(reader, lambda: (last_history(reader, job) for job in latest))
    facts = {**report.facts(), **reader.counts()}
    parts = {name: html_part(name, facts, job_link) for name in PARTS}
    note = f"Below: the {plural(len(latest), 'job')} that ran last."
    queues = card(queues_html(reader, request.url), "Queues") + note
    return Page("Overview", {"tiles": parts.pop("tiles"), "queues": queues, **parts})


class JobFilter(NamedTuple):
    """The filters of the page of jobs, as in its URL, and the job after which it begins.

    That job is given by its time of change and its number, since it may have changed or be gone.
    """

    state: str = ""
    queue: str = ""
    match: str = ""
    reason: str = ""
    at: str = ""
    after: str = ""

    def following(self, reader: Reader, at: float, seq: int) -> Iterator[Job]:
        """Yield the jobs that follow a place in the order of the page, matching or not."""
        state, readiness = STATE_TABS.get(self.state, (None, 0))
        sql = IN_STATE_BEFORE if state else JOBS_BEFORE
        kind: dict[str, Any] = {"state": state, "readiness": readiness, "limit": SEARCHED}
        while jobs := reader.select(sql, **kind, updated_at=at, seq=seq):
            yield from jobs
            at, seq = jobs[-1].updated_at, jobs[-1].seq


def find_jobs(reader: Reader, chosen: JobFilter) -> tuple[list[Job], JobFilter | None]:
    """Return a page of jobs that match, and the next page, None if there is none.

    The search takes a limited time, since of a million jobs few may match.
    """
    wanted = Selection(queues=[chosen.queue] if chosen.queue else [], match=chosen.match)
    found: list[Job] = []
    seq = validate("after", integer(0, LAST), chosen.after or LAST)
    at = validate("at", number(0, LAST), chosen.at or LAST)
    deadline = time.monotonic() + SEARCH_SECONDS
    for job in chosen.following(reader, at, seq):
        if wanted.takes(job, 0) and chosen.reason in ("", job.last_error):
            found.append(job)
        if len(found) == PAGE_SIZE or time.monotonic() > deadline:
            return found, chosen._replace(at=repr(job.updated_at), after=str(job.seq))
    return found, None


def jobs_html(reader: Reader, jobs: Iterable[Job]) -> str:
    settings = {queue: reader.settings(queue) for queue in {job.queue for job in jobs}}
    rows = []
    for job in jobs:
        _, state, _, tries, distance, reason, _ = job_row(reader, job, settings[job.queue])
        box = element("input", type="checkbox", name="id", value=job.id, aria_label=job.id)
        word = element("span", str(state), class_=state)
        about = (safe(job.queue), tries, distance, safe(shorten(str(reason), 160)))
        rows.append((box, job_link(job.id), word, *map(str, about), code(job.command)))
    return html_grid(("", "id", "state", "queue", "tries", "when", "why", "command"), rows)


def tabs_html(reader: Reader, chosen: JobFilter) -> str:
    queues = [chosen.queue] if chosen.queue else []
    counts = tally(row[1:] for row in reader.counts_by_queue(queues))
    counts[""] = sum(counts[state] for state in STATES)
    tabs = {
        tab: address("/jobs", state=tab, queue=chosen.queue, match=chosen.match)
        for tab in ("", *STATE_TABS)
    }
    links = [(url, f"{tab or 'all'} {counts[tab]:,}") for tab, url in tabs.items()]
    return element("nav", menu_of(links, tabs[chosen.state]))


def filter_form(chosen: JobFilter) -> str:
    inputs = element("input", type="hidden", name="state", value=chosen.state)
    for name in ("queue", "match", *["reason"] * bool(chosen.reason)):
        box = element("input", name=name, value=getattr(chosen, name), placeholder="any")
        inputs += element("label", f"{name} {box}")
    return card(element("form", inputs + element("button", "Filter"), action="/jobs"))


def jobs_page(reader: Reader, request: Request) -> Page:
    chosen = JobFilter(*map(request.text, JobFilter._fields))
    if chosen.state not in ("", *STATE_TABS):
        hint = suggestion(chosen.state, STATE_TABS)
        raise BadInput(f"unknown state {quoted(chosen.state)}{hint}")
    jobs, rest = find_jobs(reader, chosen)
    table = action_form(jobs_html(reader, jobs), ("retry", "cancel"), request.url) if jobs else ""
    end = element("p", "no more jobs" if jobs or chosen.after else "no jobs", class_="dim")
    if rest:
        end = link("older jobs" if jobs else "none so far; search on", "/jobs", **rest._asdict())
    parts = {"tabs": card(tabs_html(reader, chosen)), "jobs": card(table + end)}
    return Page("Jobs", parts, filter_form(chosen))


def runs_html(found: History, now: float) -> str:
    """Return a time line of the attempts of a job, and a table, newest first."""
    job = found.job
    rows = []
    for run in reversed(found.runs):
        seconds = (format_duration(run.finished - run.started), format_duration(run.waited))
        end = element("span", safe(run.error or COMPLETED), class_=run.outcome)
        number = link(run.run, "/job", id=job.id, run=run.run)
        rows.append((number, time_cell(run.started, now), *seconds, end, safe(run.worker)))
    gantt = Gantt(now)
    gantt.add(found)
    chart = html_gantt({"gantt": gantt.facts()}, job_link)
    return chart + html_grid(("run", "started", "took#", "waited#", "ended", "worker"), rows)


def output_html(reader: Reader, job: Job, run: int) -> str:
    output = reader.output(job, run, SHOWN_OUTPUT)
    note = f", its last {SHOWN_OUTPUT} bytes" if len(output) == SHOWN_OUTPUT else ""
    raw = link("as text", "/output", id=job.id, run=run)
    pre = preformatted(output.decode(errors="backslashreplace"), class_="output", tabindex=0)
    return card(pre, f"Output of run {run}{note} ({raw})")


def job_page(reader: Reader, request: Request) -> Page:
    job = reader.get(request.text("id"))
    run = request.number("run") or job.run
    facts = ((safe(key), safe(value)) for key, value in job_details(reader, job))
    action = {COMPLETED: "", DEAD: "retry", CANCELLED: "retry"}.get(job.state, "cancel")
    form = action_form("", (action,), request.url, [("id", job.id)]) if action else ""
    parts = {
        "facts": card(form + html_grid(("", ""), facts)),
        "runs": card(runs_html(last_history(reader, job), reader.clock())),
        "output": output_html(reader, job, run) if run else "",
    }
    return Page(f"Job {job.id}", parts)


def dead_page(reader: Reader, request: Request) -> Page:
    """Group the jobs that died last by the reason, each group with its newest job."""
    now = reader.clock()
    rows = []
    for reason, number, when, seq in reader.db.rows(DEAD_REASONS, {"limit": EXAMINED}):
        if job := reader.by_seq(seq):
            jobs = link(f"{number:,}", "/jobs", state=DEAD, reason=reason)
            output = code(last_line(reader.output_tail(seq, job.run, 2000)))
            retry = action_form("", ("retry",), request.url, [("like", job.id)])
            name = safe(shorten(reason, 160))
            rows.append((name, jobs, time_cell(when, now), job_link(job.id), output, retry))
    headings = ("reason", "jobs#", "last", "newest job", "end of its output", "")
    return Page("Dead letters", {"dead": card(html_grid(headings, rows) or "No job is dead.")})


def schedules_page(reader: Reader, request: Request) -> Page:
    now = reader.clock()
    rows = []
    for job in reader.select(SCHEDULES + " LIMIT :limit", limit=PAGE_SIZE):
        last = reader.first(LAST_RUN_OF_SCHEDULE, id=job.schedule_id)
        ran = f"{job_link(last.id)} {last.state}" if last else ""
        cancel = action_form("", ("cancel",), request.url, [("id", job.id)])
        due = time_cell(job.run_after, now)
        names = (safe(job.schedule_id), safe(rule_text(job)), due, job_link(job.id), ran)
        rows.append((*names, code(job.command), cancel))
    headings = ("schedule", "rule", "next", "job", "last", "command", "")
    table = html_grid(headings, rows) or "There are no schedules."
    return Page("Schedules", {"schedules": card(table)})


def workers_page(reader: Reader, _request: Request) -> Page:
    rows = []
    for *about, job, since, host, command in worker_rows(worker_facts(reader), reader.clock()):
        claimed = job_link(str(job)) if since else "idle"
        rows.append((*map(safe, about), claimed, safe(since), safe(host), code(str(command))))
    headings = [heading.lower() for heading in WORKER_HEADINGS]
    table = html_grid(headings, rows) or "No worker is running (queuectl worker start)."
    return Page("Workers", {"workers": card(table)})


PAGES: Mapping[str, Callable[[Reader, Request], Page]] = {
    "/": overview_page,
    "/jobs": jobs_page,
    "/dead": dead_page,
    "/schedules": schedules_page,
    "/workers": workers_page,
    "/job": job_page,
}
MENU = {"/": "Overview", "/jobs": "Jobs", "/dead": "Dead letters"}
MENU.update({"/schedules": "Schedules", "/workers": "Workers"})


# Actions. A POST shows what would be done; another one, from that page, does it.

ACTIONS: Mapping[str, tuple[str, Callable[[Queue, Any], object]]] = {  # each about jobs or queues
    "retry": ("id", Queue.retry),
    "cancel": ("id", Queue.cancel),
    "pause": ("queue", Queue.pause),
    "resume": ("queue", Queue.resume),
}


def subjects(reader: Reader, request: Request, key: str) -> list[str]:
    """Return the ids of the jobs or the names of the queues that an action is about."""
    names = list(request.fields.get(key, []))
    if key == "queue":
        return [name and validate("queue", valid_name, name) for name in names]
    if like := request.text("like"):
        return [row[0] for row in reader.db.rows(DEAD_LIKE, {"id": like, "limit": EXAMINED})]
    return names


def confirmation(action: str, key: str, names: Sequence[str], back: str) -> Page:
    noun = "queue" if key == "queue" else "job"
    which = f"{noun} {names[0]}" if len(names) == 1 else plural(len(names), noun)
    title = f"{action.capitalize()} {'all queues' if '' in names else which}?"
    items = "".join(element("li", safe(name)) for name in names[:PAGE_SIZE] if name)
    more = len(names) - PAGE_SIZE
    rest = element("p", f"and {more} more") if more > 0 else ""
    fields = [*((key, name) for name in names), ("confirmed", "yes")]
    form = action_form("", (action,), back, fields)
    leave = element("a", "Change nothing", href=back)
    return Page(title, {}, card(element("ul", items) + rest + form + leave, safe(title)))


def act(queue: Queue, request: Request) -> Page | str:
    """Return the page that asks for confirmation or, once an action is done, the URL to show."""
    action = request.text("action")
    if action not in ACTIONS:
        raise BadInput(f"unknown action {quoted(action)}{suggestion(action, ACTIONS)}")
    key, change = ACTIONS[action]
    names = subjects(queue._reader, request, key)
    if not names:
        raise BadInput(f"nothing is selected; select what to {action}")
    path, _, query = request.text("back").partition("?")
    back = address(path, **parse_fields(query)) if path in PAGES else "/"  # never another site
    if request.text("confirmed") != "yes":
        return confirmation(action, key, names, back)
    for subject in names if key == "queue" else [names]:
        change(queue, subject)
    return back


# The site.


def frame(page: Page, parts: str, path: str, db: str) -> Response:
    """Return a whole page. Its script and styles have a nonce; nothing else may run."""
    import secrets

    nonce = secrets.token_urlsafe(16)
    state = element("span", "", id="live", class_="dim", role="status")
    pause = element("button", "Pause updates", id="pause", type="button", hidden="")
    links = menu_of(MENU.items(), path)
    menu = element("nav", f"{element('h1', safe(db))} {links} {pause} {state}")
    script = element("script", WEB_SCRIPT, nonce=nonce) if page.parts else ""
    body = f"{menu}<main>{page.top}{parts}</main>{script}"
    return Response(200, html_page(f"{page.title} - queuectl", body, nonce), nonce=nonce)


class Site:
    """The pages and actions of a queue. Each request opens it anew, to read it or to act."""

    def __init__(self, path: str, port: int, *, insecure: bool) -> None:
        self.path = path
        self.insecure = insecure
        self.server = make_server(port, self.respond)
        self.port = int(self.server.server_address[1])
        self.gate = Gate(self.port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/?token={self.gate.token}"

    def respond(self, request: Request) -> Response:
        if login := self.gate.admit(request):
            return login
        if (request.method == "POST") != (request.path == "/act"):
            raise Refused(405, "an action is a POST to /act, a page a GET")
        is_final = request.method == "POST" and request.text("confirmed") == "yes"
        options: Any = {"readonly": not is_final, "create": False, "insecure": self.insecure}
        try:
            with Queue(self.path, **options) as queue, queue._db.translate_errors():
                deadline = time.monotonic() + QUERY_SECONDS  # even if the queue is large or locked
                queue._db.keep_waiting = lambda _: time.monotonic() < deadline
                connection = queue._db.connection
                connection.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)
                return self.answer(queue, request)
        except QueueError as error:
            status = next(n for kind, n in HTTP_STATUS.items() if isinstance(error, kind))
            page = Page("Not possible", {}, card(safe(error), "This is not possible"))
            return self.show(page, request)._replace(status=status)
        except Refused:
            raise
        except Exception as error:  # noqa: BLE001
            sys.excepthook(type(error), error, error.__traceback__)
            return refusal(500, "this page failed; `queuectl web` has printed the error")

    def answer(self, queue: Queue, request: Request) -> Response:
        reader = queue._reader
        if request.path == "/act":
            done = act(queue, request)
            if isinstance(done, str):
                return Response(303, headers={"Location": done})
            return self.show(done, request)
        if request.path == "/favicon.ico":
            return Response(204)  # there is none; a 404 would be an error in the console
        if request.path == "/metrics":
            metrics = "".join(prometheus_report(Report(reader, tuple)))
            return Response(200, metrics, "text/plain; version=0.0.4")
        if request.path == "/output":
            job = reader.get(request.text("id"))
            run = request.number("run") or job.run
            return Response(200, reader.output(job, run, LARGEST_RAW), "text/plain")
        if request.path not in PAGES:
            raise NotFound("there is no such page")
        return self.show(PAGES[request.path](reader, request), request)

    def show(self, page: Page, request: Request) -> Response:
        """Return a page or, to its script, which names the parts it has, those that changed."""
        import hashlib

        known = request.header("X-Queuectl-Tags").split()
        parts = ""
        for name, html in page.parts.items():
            tag = hashlib.sha256(f"{name} {html}".encode()).hexdigest()[:16]
            if tag not in known:
                parts += element("div", html, id=f"part-{name}", data_tag=tag)
        if "X-Queuectl-Tags" in request.headers:
            return Response(200, parts)
        return frame(page, parts, request.path, self.path)


def open_browser(url: str, file: str) -> None:
    """Open a URL in the browser by a file that redirects there: all users can read arguments."""
    import pathlib
    import webbrowser

    with open(open_own(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as page:
        page.write(f'<meta http-equiv="refresh" content="0;url={safe(url)}">')
    args = [pathlib.Path(file).as_uri()]
    threading.Thread(target=webbrowser.open, args=args, daemon=True).start()


# --- doctor: whether this machine and this directory can carry a queue ----------------------------

TRIAL_LIMIT = 8.0  # seconds that one trial may take
LEAST_FREE = 100 << 20  # bytes
QUERY = "import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute(sys.argv[2]).fetchone())"
KILL_WORKER_ONCE = """
import glob, json, os, time
if os.environ['QUEUECTL_ATTEMPT'] == '1':
    (path,) = glob.glob(glob.escape(os.environ['QUEUECTL_DB']) + '.run/worker-*')
    with open(path) as note:
        worker = json.load(note)['pid']
    print(time.time(), flush=True)
    os.kill(worker, 9)
    time.sleep(60)
"""
BEAT = "import time\nwhile True: open('beat', 'a').write('x'); time.sleep(0.02)"
TREE = f"import subprocess, sys; subprocess.call([sys.executable, '-c', {BEAT!r}])"


class Doctor:
    """Trials of a machine and a directory, in a temporary queue beside the real one.

    Each trial returns its finding; QueueError, OSError or sqlite3.Error means that it failed.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self.directory = os.path.dirname(self.path)
        self.trial = ""

    def examine(self) -> Iterator[tuple[str, bool, str]]:
        """Yield the name of each trial, whether it succeeded, and its finding or error."""
        import shutil

        trials = (self.versions, self.owner, self.file_system, self.space, self.queue)
        live = (self.locks, self.wal, self.sync, self.recovery, self.process_tree)
        try:
            for trial in (*trials, *live):
                if self.trial or trial not in live:
                    yield (trial.__name__.replace("_", " "), *self.attempt(trial))
        finally:
            if self.trial:
                shutil.rmtree(os.path.dirname(self.trial), ignore_errors=True)

    def attempt(self, trial: Callable[[], str]) -> tuple[bool, str]:
        try:
            return True, trial()
        except (QueueError, sqlite3.Error) as error:
            return False, str(error)
        except OSError as error:
            remedy = "use a directory that you can write to (--db PATH)"
            return False, f"{system_fault(error, self.directory)}; {remedy}"

    def versions(self) -> str:
        import platform

        if sqlite3.sqlite_version_info < (3, 31):
            raise Fault(f"SQLite {sqlite3.sqlite_version} is too old; 3.31 or later is needed")
        python = f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
        return f"queuectl {__version__}, {python}, {platform.platform()}"

    def owner(self) -> str:
        require_trust(self.path)
        return f"no other user can write to {self.directory}"

    def file_system(self) -> str:
        if kind := network_file_system(self.path):
            raise Fault(f"{self.directory} is on {kind}; SQLite needs a local disk")
        return f"{self.directory} is not on a known network file system"

    def space(self) -> str:
        import shutil

        free = shutil.disk_usage(self.directory).free
        if free < LEAST_FREE:
            remedy = "; delete files, or use another disk (--db PATH)"
            raise Fault(f"only {free >> 20} MiB are free on the disk of {self.directory}{remedy}")
        return f"{free >> 20} MiB are free"

    def queue(self) -> str:
        import tempfile

        name = os.path.basename(self.path) + ".doctor-"
        self.trial = os.path.join(tempfile.mkdtemp("", name, self.directory), "queuectl.db")
        with self.open() as queue:
            queue.configure("kill_grace", "1")
        return "a temporary queue was created beside this one"

    def open(self) -> Queue:
        return Queue(self.trial, insecure=True)  # the directory has been judged already

    def locks(self) -> str:
        import subprocess

        path = self.trial + ".lock"
        lock = LockFile(path)
        command = [SYSTEM.PYTHON, "-I", "-c", "input()"]
        inherited: Any = {} if WINDOWS else {"pass_fds": [lock.fd]}
        with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, **inherited) as heir:
            os.close(lock.fd)
            held = WINDOWS or not SYSTEM.is_unlocked(path)
            heir.communicate("\n")
        if not held or not SYSTEM.is_unlocked(path):
            raise Fault("a lock is not kept by a child that inherits it; queuectl needs flock()")
        return "a lock is held as long as a process that inherited it lives"

    def wal(self) -> str:
        import subprocess

        with self.open() as queue:
            job = queue.enqueue("true")
            command = [SYSTEM.PYTHON, "-I", "-c", QUERY, self.trial, USED_QUEUES]
            seen = subprocess.run(command, capture_output=True, check=False)
            queue.cancel([job])
        if seen.stdout.split() != [b"default"]:
            raise Fault(f"another process cannot read the queue: {seen.stderr.decode().strip()}")
        return "another process reads the changes of this one"

    def sync(self) -> str:
        times = []
        with open(os.path.join(os.path.dirname(self.trial), "sync"), "wb", buffering=0) as file:
            for _ in range(20):
                file.write(bytes(4096))
                began = time.perf_counter()
                os.fsync(file.fileno())
                times.append(time.perf_counter() - began)
        return f"the disk takes {sorted(times)[10] * 1000:.3g} ms to sync a page"

    def run_job(self, code: str, **fields: Any) -> list[Attempt]:
        """Run a Python program as a job; return its attempts."""
        command = join_words([SYSTEM.PYTHON, "-I", "-c", f"exec({code!r})"])  # of one line
        with self.open() as queue:
            job = queue.enqueue(command, cwd=os.path.dirname(self.trial), **fields)
            options = {"drain": True, "insecure": True}
            pool = threading.Thread(target=work, args=(self.trial,), kwargs=options, daemon=True)
            pool.start()
            try:
                queue.wait([job], TRIAL_LIMIT)
            finally:
                for name in queue._db.run_dir.alive("pool"):
                    queue._db.run_dir.request_stop(name, "now")
                queue._db.run_dir.notify()
                pool.join(TRIAL_LIMIT)
            return queue.attempts(job)

    def recovery(self) -> str:
        attempts = self.run_job(KILL_WORKER_ONCE)
        outcomes = [attempt.outcome for attempt in attempts]
        if outcomes != ["crashed", "completed"]:
            raise Fault(f"the job of a killed worker did not run again, but: {outcomes}")
        took = attempts[1].started - float(attempts[0].output.split()[-1])
        return f"the job of a killed worker ran again after {took:.2f} s"

    def process_tree(self) -> str:
        beat = os.path.join(os.path.dirname(self.trial), "beat")
        (attempt,) = self.run_job(TREE, timeout=1.0, max_retries=1)
        size = os.path.getsize(beat)
        time.sleep(0.2)
        if os.path.getsize(beat) > size:
            raise Fault("a process that a job started has outlived the job's timeout")
        took = format_duration(attempt.finished - attempt.started)
        return f"a job and its child process were ended in {took}, by a timeout of 1s"


# --- command line ---------------------------------------------------------------------------------


class Command(NamedTuple):
    """A subcommand: its function and the access it needs to the queue, its help and arguments.

    `access` is "read", "write", "create" (a queue if there is none), or "none" (it opens its own).
    """

    act: Callable[..., int | None]
    access: Literal["read", "write", "create", "none"]
    help: str
    example: str
    arguments: tuple[Argument, ...] = ()


def arg(
    name: str, metavar: str | None, meaning: str = "", check: Validator = str, **options: Any
) -> Argument:
    """Describe an argument of a command as argparse takes it, with a validator of its value."""
    names = tuple(name.split())
    options.update(type=partial(validate, names[-1], check), metavar=metavar, help=meaning)
    return names, options


def flag(names: str, meaning: str, **options: Any) -> Argument:
    return tuple(names.split()), {"action": "store_true", "help": meaning, **options}


def field(key: str, metavar: str, meaning: str, name: str = "", **options: Any) -> Argument:
    """Describe an option of `enqueue` that gives a field of a job."""
    options.setdefault("check", FIELDS[key])
    return arg(name or "--" + key.replace("_", "-"), metavar, meaning, dest=key, **options)


def group(title: str, *arguments: Argument) -> Iterator[Argument]:
    """Yield arguments that stand together in the help of a command, below a title."""
    return ((names, {**options, "group": title}) for names, options in arguments)


def parse_edit(check: Validator, text: str) -> Any:
    """Return a new value; the text itself where that is None, as for an option that is absent."""
    value = check(text)
    return text if value is None else value


def edit_option(names: tuple[str, ...], options: dict[str, Any]) -> Argument:
    """Return an option of `enqueue` as one of `edit`, which can also reset the field."""
    key = options["dest"]
    meaning = re.sub(r"; default: [^)]*| \(default: [^)]*\)", "", options["help"])
    if options["type"].args[1] is FIELDS[key]:
        check = partial(parse_edit, EDITABLE[key])
        options = {**options, "type": partial(validate, names[-1], check)}
    if key in BY_SETTINGS:
        meaning += "; 'default' restores the setting"
    if FIELDS[key] is valid_names:
        meaning += "; replaces the earlier ones ('': none)"
    return names, {**options, "help": meaning}


def parse_variable(text: str, *, removable: bool = False) -> Iterable[tuple[str, Any]]:
    name, equals, value = text.partition("=")
    require(equals or removable, "be NAME=VALUE")
    return valid_variables({name: value if equals else None}).items()


def read_input(path: str) -> bytes:
    """Return the text in a file or, for -, on stdin, which is closed then."""
    require(path != "-" or sys.stdin, "name a file: stdin is closed")
    try:
        with sys.stdin.buffer if path == "-" else open(path, "rb") as file:
            return valid_stdin(file.read(STDIN_LIMIT + 1))
    except OSError as error:
        raise ValueError(f"must name a file that can be read: {error.strerror}") from None


class Screen:
    """Lines for people on stderr and, on a terminal, a progress line below them."""

    def __init__(self) -> None:
        self.progress = ""
        self.draw_at = 0.0

    def write(self, text: str) -> None:
        """Write to stderr; errors are ignored, since no command depends on it."""
        if sys.stderr:
            with contextlib.suppress(OSError):
                print(text, end="", file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        start = "\r\x1b[K" if self.progress else ""
        self.write(start + printable(text) + "\n" + self.progress)

    def draw(self, line: Callable[[], str]) -> None:
        """Draw the progress line again, at most five times a second, in the foreground only."""
        width = terminal_width(sys.stderr)
        if width and not is_foreground(sys.stderr.fileno()):
            self.progress = ""  # a shell has its prompt there now
        elif width and time.monotonic() >= self.draw_at:
            self.draw_at = time.monotonic() + 0.2
            self.progress = shorten(line(), width - 1)
            self.write("\r\x1b[K" + self.progress)

    def clear(self) -> None:
        if self.progress:
            self.write("\r\x1b[K")
        self.progress = ""


SCREEN = Screen()


def say(text: str) -> None:
    SCREEN.line(f"queuectl: {text}")


def show(lines: Iterable[str], *, whole: bool = False) -> None:
    """Print lines; on a terminal with coloured states and, unless whole, cut to its width."""
    width = terminal_width(sys.stdout)
    colours: Mapping[str, int] = {DEAD: 31, COMPLETED: 32, PROCESSING: 36, CANCELLED: 33}
    pattern = rf"(?:(?<=  )|^)({'|'.join(colours)})(?=  |$)"
    for line in map(printable, lines):
        text = line if whole else shorten(line, width)
        if width and not line.endswith(" 0") and not os.environ.get("NO_COLOR"):
            text = re.sub(pattern, lambda m: f"\x1b[{colours[m[0]]}m{m[0]}\x1b[m", text, count=1)
        print(text)


def show_list(args: Any, facts: Iterable[Facts], headings: Sequence[str], rows: Rows) -> None:
    """Print facts for programs, one ASCII object a line, or rows for people."""
    if args.json:
        for item in facts:
            print(json.dumps(item))
    else:
        show(table(headings, rows))


def say_unused(reader: Reader, queues: Iterable[str], report: Callable[[str], None] = say) -> None:
    """Report the queues that never had a job, which may be mistyped."""
    known = reader.column(USED_QUEUES)
    for name in queues:
        if name not in known:
            close = nearest(name, known)
            hint = f": did you mean {close}?" if close else ""
            report(f"queue {name} never had a job{hint}")


JSON_START = r"""\s*((\[\s*)?\{('|\s*(["}]|\w+\s*:|$))|\[[\s\d]*[],])"""  # unlike a shell line
EXAMPLE = 'a job is a JSON object such as {"command": "echo hello"}'
LOST_QUOTES = (
    "lost its quotes, in bash or PowerShell? Try: enqueue COMMAND, or JSON on stdin: enqueue -"
)


class JsonJobs:
    """JSON objects in a file: alone, one after the other or in arrays, in any layout.

    Only a part of the file is in memory. `at` holds the number of the line that is read.
    """

    CHUNK = 1 << 16
    BLANKS = re.compile("[ \t\r\n\ufeff]*")  # PowerShell puts a byte order mark before a text

    def __init__(self, file: IO[bytes], at: array[int]) -> None:
        import codecs

        self.file = file
        self.lines = at
        self.decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self.parse = json.JSONDecoder().raw_decode
        self.text = ""
        self.at = 0  # the place in the text
        self.line = 1
        self.offset = 0  # of the text in that line

    def jobs(self) -> Iterator[dict[str, object]]:
        while first := self.next_character():
            if first == "[":
                yield from self.array()
            else:
                yield self.job()

    def array(self) -> Iterator[dict[str, object]]:
        last = ","
        while last != "]":
            self.move(self.at + 1)
            self.next_character()
            yield self.job()
            last = self.next_character()
            if last not in (",", "]"):
                raise self.error("expecting ',' or ']' after a job in an array")
        self.move(self.at + 1)

    def next_character(self) -> str:
        """Move to the next character that is not blank and return it; return "" at the end."""
        while True:
            self.move(self.BLANKS.match(self.text, self.at).end())  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.read():
                return ""

    def job(self) -> dict[str, object]:
        self.lines[0] = self.line
        while True:
            start = self.at
            try:
                value, end = self.parse(self.text, self.at)
                break
            except json.JSONDecodeError as error:
                if not self.read():  # there is no more of an object that may have been cut off
                    raise self.syntax_error(error.msg, error.pos + self.at - start) from None
            except (ValueError, RecursionError) as error:
                raise self.error(str(error)) from None
        if not isinstance(value, dict):
            raise self.error(EXAMPLE)
        self.move(end)
        return value

    def move(self, to: int) -> None:
        if count := self.text.count("\n", self.at, to):
            self.line += count
            self.offset = -1 - self.text.rindex("\n", self.at, to)
        self.at = to

    def read(self) -> bool:
        """Read a chunk, at least as long as the rest of the text; return whether there was one."""
        left = self.text[self.at :]
        chunk = self.file.read(max(self.CHUNK, len(left)))
        self.offset += self.at
        self.text = left + self.decode(chunk, not chunk)
        self.at = 0
        return bool(chunk)

    def error(self, reason: str) -> BadInput:
        self.lines[0] = self.line
        return BadInput(f"bad JSON in column {self.offset + self.at + 1}: {reason}")

    def syntax_error(self, reason: str, at: int) -> BadInput:
        start = self.text[self.at : self.at + 200]
        hint = EXAMPLE
        if re.match(r"\{\s*\w+\s*:", start):
            hint = LOST_QUOTES
        elif start[:1].isalpha():
            hint = f"{EXAMPLE}; for a command a line: enqueue --lines -"
        if self.text[at:].strip():
            self.move(at)
        else:
            reason = "the object that begins here does not end"
        return self.error(f"{reason[0].lower()}{reason[1:]}; {hint}")


def listed_job(job: dict[str, Any]) -> dict[str, Any]:
    """Return a job to enqueue, given one that `list --json` or `show --json` has printed."""
    fields = {key: value for key, value in job.items() if key in FIELDS and value is not None}
    for size, key in (("blocked", "after"), ("stdin_size", "stdin")):
        if job.get(size) and key not in job:
            raise BadInput(f"list --json does not show {key} of this job; use show --json")
    kind, _, rule = str(job.get("rule") or "").partition(" ")
    if kind:
        fields.update({kind: rule, "id": job.get("schedule_id")})
    if fields.get("id") == str(job["seq"]):
        del fields["id"]
    is_waiting = kind != "cron" and job.get("state") == PENDING
    if is_waiting and validate("run_after", parse_time, job.get("run_after")) > time.time():
        fields["run_at"] = job["run_after"]
    return fields


def json_jobs(args: argparse.Namespace, file: IO[bytes], at: array[int]) -> Iterator[Any]:
    """Yield the jobs in JSON; of those that `list --json` printed, no notifications."""
    for job in JsonJobs(file, at).jobs():
        if "seq" in job and job.get("notifies"):
            continue
        at.append(at[0])
        fields = listed_job(job) if "seq" in job else job
        if args.new_ids:
            fields.pop("id", None)
        yield fields


def shell_lines(file: IO[bytes], at: array[int]) -> Iterator[Any]:
    for at[0], line in enumerate(file, 1):
        if command := line.decode(errors="surrogateescape").strip("\ufeff\r\n\t "):
            at.append(at[0])
            yield {"command": command}


def one_each(words: Sequence[str], arguments: Sequence[str], *, exact: bool) -> Iterator[Any]:
    """Yield a job for each argument, which replaces {} in a shell line or words, or follows it."""
    if not arguments:
        raise BadInput("there are no arguments after :::")
    template = list(words)
    if not any("{}" in word for word in words):
        template[len(words) if exact else 0 :] = ["{}"] if exact else [words[0] + " {}"]
    quotations = re.findall(r"""\\.|'[^']*'|"(?:\\.|[^"\\])*\"""", template[0], re.DOTALL)
    if not exact and any("{}" in part for part in quotations):
        raise BadInput("{} is quoted automatically; write it outside of quotes")
    for argument in arguments:
        if exact:
            yield {"command": join_words([word.replace("{}", argument) for word in template])}
        else:
            yield {"command": template[0].replace("{}", join_words([argument]))}


def is_stdin(args: argparse.Namespace) -> bool:
    return args.words == ["-"] and "--" not in args.rest


def described_jobs(args: argparse.Namespace, stdin: IO[bytes], at: array[int]) -> Iterator[Any]:
    """Yield the jobs that JSON, lines, a shell line or words describe.

    `at` holds the number of the line that is read, and then the lines of all jobs so far.
    """
    del at[1:]
    words: list[str] = args.words
    exact = args.rest[-len(words) - 1 :] == ["--", *words]
    is_json = bool(re.match(JSON_START, words[0])) and not exact
    if args.each is not None and (is_json or is_stdin(args)):
        raise BadInput("::: must follow a command, not JSON or -")
    if "--" in args.rest and not exact:
        raise BadInput("all words of the command go after --, as in: enqueue -- git log -- README")
    if len(words) > 1 and all(word.partition(":")[0] in FIELDS and ":" in word for word in words):
        raise BadInput(f"this is not a command; JSON that {LOST_QUOTES}")
    if words[0] == "-" and not exact:
        if len(words) > 1:
            raise BadInput("- must be the only argument; the jobs are read from stdin")
        if not sys.stdin or sys.stdin.closed:
            raise BadInput("stdin is closed, or was read already: there are no lines to read")
        stdin.seek(0)
        yield from shell_lines(stdin, at) if args.lines else json_jobs(args, stdin, at)
    elif args.lines:
        raise BadInput("--lines reads commands from stdin: enqueue --lines -")
    elif args.each is not None:
        yield from one_each(words, args.each, exact=exact)
    elif is_json:
        source = " ".join(words)
        where = at if "\n" in source else at[:]
        yield from json_jobs(args, io.BytesIO(source.encode(errors="surrogateescape")), where)
    else:
        is_line = len(words) == 1 and not exact
        yield {"command": words[0] if is_line else join_words(words)}


def fill(value: Any, argument: str) -> Any:
    """Return a value in which {} is replaced by an argument."""
    if isinstance(value, str):
        return value.replace("{}", argument)
    if isinstance(value, list):
        return [fill(item, argument) for item in value]
    return {key: fill(item, argument) for key, item in value.items()}


def with_options(args: argparse.Namespace, jobs: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Yield jobs with the fields that the options of `enqueue` set."""
    given = {key: value for key, value in vars(args).items() if key in FIELDS and value is not None}
    added = dict(chain(*given.pop("env", ())))
    if not given and not added:
        yield from jobs
        return
    replaced = {key for pair in CONFLICTS if given.keys() & set(pair) for key in pair}
    each = iter(args.each or ())
    for job in jobs:
        fields = {key: value for key, value in job.items() if key not in replaced}
        env = fields.get("env", {})
        if added and isinstance(env, dict):  # a bad one is refused later
            fields["env"] = {**env, **added}
        fields.update(given)
        if args.each:
            argument = next(each)
            for key in fields.keys() & {"id", "after", "after_end", "env"}:
                fields[key] = fill(fields[key], argument)
        yield fields


def report_kept(queue: Queue, fields: Mapping[str, Any]) -> None:
    """Report how the job that already has an id differs from the one that was given."""
    job = queue.get(fields["id"])
    if differing := differing_fields(job, fields):
        hint = f"; queuectl edit {quoted(fields['id'])} changes it" if job.state == PENDING else ""
        say(f"job {job.id} exists with another {', '.join(differing)}, and stays as it is{hint}")


def copy_stdin(args: argparse.Namespace, copy: IO[bytes]) -> None:
    """Copy stdin, since a slow writer must not hold up workers."""
    if sys.stdin.isatty():
        kind = "commands, one a line" if args.lines else "jobs as JSON"
        say(f"reading {kind}; {'Ctrl-Z and Enter end' if WINDOWS else 'Ctrl-D ends'} them")
    while chunk := sys.stdin.buffer.read1(1 << 16):  # type: ignore[union-attr]
        copy.write(chunk)


# The first two lines of a starter depend on the system; the second one tells whose it is.
STARTER = """\
%s
# queuectl %s, a starter made by queuectl install
%s
import _signal, sys
if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # Ctrl-C shows no traceback
sys.path.append(%a)
import queuectl
queuectl.main_program()
"""


def starter_text(python: str, library: str) -> str:
    """Return a program for DIR/queuectl, or queuectl.cmd, that imports the one in `library`."""
    first = f"#!{python} -IS"
    third = ""
    if WINDOWS:  # Python skips the first line, cmd.exe reads no other
        first = '@"{}" -IS -x "%~f0" %* & goto :eof'.format(python.replace("%", "%%"))
    elif len(first) > 120 or re.search(r"\s", python):  # more than systems read: for sh, a command
        first = "#!/bin/sh"
        third = f"'''exec' {shlex.quote(python)} -IS \"$0\" \"$@\"\n' '''"
    return STARTER % (first, __version__, third, library)


def second_line(path: str) -> bytes:
    """Return the second line of a file, empty if it is not a readable regular file."""
    if os.path.isfile(path):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            return file.read(4096).partition(b"\n")[2].partition(b"\n")[0]
    return b""


def own_command() -> list[str]:
    """Return the command that starts this program anew: its starter, or Python with this file."""
    caller = os.path.abspath(sys.argv[0])
    if not WINDOWS and b"a starter made by queuectl install" in second_line(caller):
        return [caller]
    return [SYSTEM.PYTHON, *interpreter_flags(), os.path.abspath(__file__)]


def install_library(home: str) -> str:
    """Put the program and its compiled form into a directory named for its content; return that.

    So an update does not touch the version that a running pool uses; the three newest are kept.
    """
    import hashlib
    import py_compile
    import shutil

    source = __loader__.get_data(__file__)  # type: ignore[name-defined]  # also from an archive
    if b"\n# queuectl " not in source[:4096]:
        raise BadInput(f"{__file__} is a compiled file; install from queuectl.py")
    library = os.path.join(home, hashlib.sha256(source).hexdigest()[:16])
    os.makedirs(library, exist_ok=True)
    file = os.path.join(library, "queuectl.py")
    replace_file(file, source, 0o644)
    compiled = os.path.join(library, "__pycache__", f"queuectl.{sys.implementation.cache_tag}.pyc")
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH  # valid whatever copies the files
    py_compile.compile(file, compiled, optimize=0, invalidation_mode=mode, doraise=True)
    versions = [os.path.join(home, v) for v in os.listdir(home) if re.fullmatch("[0-9a-f]{16}", v)]
    for old in sorted(versions, key=os.path.getmtime)[:-3]:
        shutil.rmtree(old, ignore_errors=True)
    return library


def report_path(directory: str, starter: str) -> None:
    """Report whether a shell finds the starter, and how to change that."""
    import shutil

    found = shutil.which("queuectl")
    shell = os.path.basename(os.environ.get("SHELL", ""))
    if found and os.path.exists(found) and os.path.samefile(found, starter):
        say(f"{directory} is in your PATH: type queuectl")
    elif os.path.realpath(directory) in map(os.path.realpath, os.get_exec_path()):
        say(f"{directory} is in your PATH, but {found} precedes it")
    elif WINDOWS:
        say(f"{directory} is not in your Path; add it: rundll32 sysdm.cpl,EditEnvironmentVariables")
    elif shell == "fish":
        say(f"{directory} is not in your PATH; add it: fish_add_path {shlex.quote(directory)}")
    else:
        profile = {"bash": "~/.bashrc", "zsh": "~/.zshrc"}.get(shell, "~/.profile")
        line = f"export PATH={shlex.quote(directory)}:$PATH"
        say(f"{directory} is not in your PATH; add this line to {profile}: {line}")


def cmd_install(args: argparse.Namespace) -> None:
    default = os.path.expanduser(os.path.join("~", ".local", "bin"))
    directory = args.dir or default
    starter = os.path.join(directory, "queuectl.cmd" if WINDOWS else "queuectl")
    if os.path.lexists(starter) and not second_line(starter).startswith(b"# queuectl "):
        raise BadInput(f"{starter} is another program's; move it away, or name another directory")
    home = os.path.join(directory, ".queuectl")
    if directory == default:
        data = os.environ.get("XDG_DATA_HOME", "")
        share = data if os.path.isabs(data) else os.path.expanduser("~/.local/share")
        home = os.path.join(share, "queuectl")
    os.makedirs(directory, exist_ok=True)
    is_virtual = sys.prefix != sys.base_prefix  # it may be removed some day
    python = os.path.realpath(SYSTEM.PYTHON) if is_virtual else SYSTEM.PYTHON
    text = starter_text(python, install_library(home))
    content = text.encode("oem", "replace") if sys.platform == "win32" else os.fsencode(text)
    replace_file(starter, content, 0o755)
    print(starter)
    report_path(directory, starter)


def started_pool(run_dir: RunDirectory, pid: int, *, complete: bool) -> str | None:
    """Return the name of a process's pool once it is alive and, if asked, all of its workers."""
    for name, note in run_dir.alive("pool").items():
        if note.get("pid") == pid:
            workers = [worker for worker in run_dir.alive("worker") if pool_of(worker) == name]
            return name if len(workers) >= note["count"] or not complete else None
    return None


def detach(args: argparse.Namespace) -> int:
    """Start a pool in a session of its own; report its log or, if it ends at once, the reason."""
    import subprocess

    with Queue(args.db, insecure=args.insecure) as queue:
        run_dir = queue._db.run_dir
    run_dir.make()  # the database may have been copied here
    for name, note in run_dir.alive("pool").items():
        say(f"{name} runs here too, with {plural(note.get('count', 0), 'worker')}")
    insecure = ["--insecure"] * args.insecure
    options = [word for word in args.rest if word != "--detach"]
    command = [*own_command(), f"--db={args.db}", *insecure, "worker", "start", *options]
    log = run_dir.file("workers.log")
    with open(log, "a+", errors="replace", opener=open_own) as file:
        size = file.tell()
        streams: Any = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        pool = subprocess.Popen(command, **streams, **SYSTEM.BACKGROUND)
        for waited in polling(longest=0.02):
            if started := started_pool(run_dir, pool.pid, complete=waited < 10):
                say(f"{started} runs as process {pool.pid}; its log is {log}")
                pool.returncode = Exit.OK  # so that no destructor warns of a running process
                return Exit.OK
            if pool.poll() is not None:
                break
        file.seek(size)
        for line in file:
            SCREEN.line(line.rstrip("\n"))
    return shell_code(pool.returncode)


def say_event(text: str) -> None:
    """Print an event line: on a terminal with the time, in a log with the date (RFC 3339)."""
    now = datetime.now().astimezone()
    when = now.strftime("%H:%M:%S") if terminal_width(sys.stderr) else now.isoformat("T", "seconds")
    SCREEN.line(f"{when} {text}")


def cpu_count() -> int:
    """Return the number of CPUs that this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def check_reports(args: argparse.Namespace) -> None:
    """Raise BadInput where a report could not be written once the drain is over."""
    if args.reports and not args.drain:
        raise BadInput("--report requires --drain")
    for path in args.reports:
        format_of(path)
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise BadInput(f"{quoted(path)}: there is no such directory")


def write_output(chunks: Iterable[bytes]) -> None:
    """Write a job's output: as it is or, on a terminal, with control characters escaped."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    for chunk in chain(chunks, [b""]):  # the empty one, at the end, shows half a character
        if sys.stdout.isatty():
            text = decoder.decode(chunk, not chunk)
            print(re.sub(r"[^\n\t]+", lambda m: printable(m[0]), text), end="")
        else:
            sys.stdout.buffer.write(chunk)
        sys.stdout.flush()


def write_heading(job: Job, *, first: bool) -> None:
    """Write the line above a job's output, as tail does."""
    write_output([f"{'' if first else chr(10)}==> {job.id} <==\n".encode()])


def last_lines(output: bytes, number: int) -> bytes:
    lines = io.BytesIO(output).readlines()
    return b"".join(lines[max(0, len(lines) - number) :])


def stored_output(queue: Queue, job: Job, run: int | None) -> tuple[int, bytes]:
    """Return the number of dropped bytes and the output of one ended attempt, or of the last."""
    attempt = queue._reader.last_attempt(job, run or job.run)
    if run and (not attempt or attempt.run != run):
        last = queue._reader.last_attempt(job, job.run)
        has = f"1 to {last.run}" if last else "none yet"
        raise NotFound(f"job {job.id} has no run {run}; its runs: {has}")
    if not attempt:
        return 0, b""
    if attempt.error and not attempt.output and not attempt.bytes_dropped:
        say(f"job {job.id} wrote nothing: {attempt.error}")
    return attempt.bytes_dropped, attempt.output


def print_ended(args: argparse.Namespace, queue: Queue, seq: int, state: str) -> None:
    if args.output == "failed" and state == COMPLETED:
        return
    SCREEN.clear()
    try:
        if job := queue._reader.by_seq(seq):
            dropped, output = stored_output(queue, job, None)
            output = left_out(output, dropped)
            write_heading(job, first=True)
            write_output([output, b"" if output.endswith(b"\n") or not output else b"\n"])
    except (QueueError, OSError) as error:  # the jobs matter more
        say_event(f"cannot print the output of a job: {error}")


def write_drain_reports(args: argparse.Namespace, pool: str, began: float) -> None:
    with Queue(args.db, readonly=True, insecure=args.insecure) as queue:
        found = partial(drain_histories, queue._reader, args.queues, pool, began)
        report = Report(queue._reader, found, args.queues, began)
        with contextlib.ExitStack() as stack:  # if one cannot be written, the others are
            for path in args.reports:
                stack.callback(write_report, path, FORMATS[format_of(path)](report))


def cmd_worker_start(args: argparse.Namespace) -> int:
    if args.horizon < LONGEST and not args.drain:
        raise BadInput("--horizon requires --drain")
    check_reports(args)
    if args.queues:
        with Queue(args.db, insecure=args.insecure) as queue:
            say_unused(queue._reader, args.queues, say if args.detach else say_event)
    if args.detach:
        return detach(args)
    keys = ("drain", "horizon", "insecure", "queues")
    options: dict[str, Any] = {key: getattr(args, key) for key in keys}
    if not args.quiet:
        options["say"] = say_event
    with contextlib.ExitStack() as stack:
        if args.reports:
            options["name"] = new_pool_name()
            stack.callback(write_drain_reports, args, options["name"], time.time())
        has_progress = terminal_width(sys.stderr) and not args.quiet
        if args.output or has_progress:
            queue = stack.enter_context(Queue(args.db, insecure=args.insecure))
            reader = queue._reader
            progress = Progress(partial(survey_queues, reader, args.queues), reader.clock)
            if args.output:
                options["ended"] = partial(print_ended, args, queue)
            if has_progress:
                options["tick"] = lambda: SCREEN.draw(progress.line)
        code = work(args.db, args.count or cpu_count(), **options, signals=True)
    return Exit.SIGNALLED - code if code > Exit.SIGNALLED else code


def pools_to_stop(args: argparse.Namespace, run_dir: RunDirectory) -> set[str]:
    """Return the living pools; of the named ones alone, and those started for one of the queues."""
    notes = run_dir.alive("pool")
    every = {*notes, *map(pool_of, run_dir.alive("worker"))}  # a worker may have lost its pool
    for pool in args.pools:
        if pool not in every:
            raise NotFound(f"there is no pool {quoted(pool)} (queuectl worker list)")
    chosen = set(args.pools) or every
    if not args.queues:
        return chosen
    return {name for name in chosen & {*notes} if {*notes[name].get("queues", ())} & {*args.queues}}


def cmd_worker_stop(args: argparse.Namespace, queue: Queue) -> int:
    run_dir = queue._db.run_dir
    pools = pools_to_stop(args, run_dir)
    workers = [name for name in run_dir.alive("worker") if pool_of(name) in pools]
    for pool in pools:
        run_dir.request_stop(pool, "now" if args.now else "stop")
    run_dir.notify()
    if not pools:
        say("no workers are running" + " for this queue" * bool(args.queues))
    notices = Notices(say, NEVER)
    for waited in polling(NEVER if args.timeout is None else args.timeout, longest=0.02):
        if all(map(run_dir.is_unlocked, (*pools, *workers))):
            return Exit.OK
        if waited > 1:
            busy = [job.id for job in queue._reader.claimed() if job.locked_by in workers]
            notices.report(f"waiting for {', '.join(busy) or 'the workers to exit'}", key="waiting")
    say(f"workers are still running after {format_duration(args.timeout or 0)}")
    return Exit.TIMED_OUT


def cmd_worker_list(args: argparse.Namespace, queue: Queue) -> None:
    workers = list(worker_facts(queue._reader))
    show_list(args, workers, WORKER_HEADINGS, worker_rows(workers, queue._reader.clock()))


def draw_status(args: argparse.Namespace, queue: Queue) -> None:
    if args.json:
        print(json.dumps(status_facts(queue._reader, args.queue)))
    else:
        lines = list(status_text(queue._reader, args.queue, full=args.watch))
        if args.watch and terminal_width(sys.stdout):
            sys.stdout.write("\x1b[H\x1b[J")
            del lines[os.get_terminal_size(sys.stdout.fileno()).lines - 1 :]
        show(lines)
    sys.stdout.flush()


@contextlib.contextmanager
def alternate_screen(numbers: list[int]) -> Iterator[None]:
    """Show another screen of the terminal; a stop signal ends the block and is added to a list."""

    def stop(number: int, _frame: object) -> None:
        numbers.append(number)
        raise KeyboardInterrupt

    sys.stdout.write("\x1b[?1049h")
    try:
        with handle_signals(stop, None), contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        sys.stdout.write("\x1b[?1049l")
        sys.stdout.flush()


def cmd_status(args: argparse.Namespace, queue: Queue) -> int:
    say_unused(queue._reader, [args.queue] if args.queue else [])
    if not args.watch:
        draw_status(args, queue)
        return Exit.OK
    numbers: list[int] = []
    is_drawn = terminal_width(sys.stdout) and not args.json
    with alternate_screen(numbers) if is_drawn else contextlib.nullcontext():
        for _ in polling(first=1.0, longest=1.0):
            require_in_place(queue._db.path, queue._db.connection.info)
            draw_status(args, queue)
    return -numbers[0]


def selection(args: argparse.Namespace, states: Sequence[str] = ()) -> Selection:
    """Return the jobs that the arguments select, by default among those in some states."""
    filters = ("ids", "queues", "states", "match", "older_than")
    given = {key: getattr(args, key) for key in filters if getattr(args, key) not in (None, [])}
    if args.ids and len(given) > 1:
        raise BadInput("either name the jobs or select them by options, not both")
    return Selection(**{"states": states, **given})


def targets(
    args: argparse.Namespace,
    states: Sequence[str],
    usual: Sequence[str],
    *,
    everything: bool = False,
) -> Selection:
    """Return the jobs that a command is to change: those in some states, by default the usual ones.

    Unless `everything` or --all is meant, at least one id or option must be given.
    """
    all_given = vars(args).get("all", False)
    if args.ids and all_given:
        raise BadInput("either name the jobs or use --all")
    known = (*states, *READINESS_WORDS.values()) if PENDING in states else states
    for word in args.states:
        if word not in known:
            raise BadInput(f"--state must be one of {', '.join(known)}, not {word}")
    if selection(args) == Selection() and not (everything or all_given):
        raise BadInput("name the jobs, or select them by --queue, --state, --match, --older-than")
    return selection(args, usual)


def dry_run(jobs: Iterable[Job], check: Callable[[Job], None], *, named: bool) -> int:
    """Print the ids of the jobs that a command would change; report other jobs that are named."""
    code = Exit.OK
    for job in jobs:
        try:
            check(job)
            print(job.id)
        except NotFound as error:
            if named:
                say(str(error))
                code = Exit.NO
    return code


def show_ids(jobs: Iterable[Job]) -> None:
    show((job.id for job in jobs), whole=True)


def change_jobs(
    args: argparse.Namespace,
    queue: Queue,
    jobs: Iterable[Job],
    check: Callable[[Job], None],
    act: Callable[[Job], object],
    report: Callable[[list[Job]], None] = show_ids,
) -> int:
    """Change jobs in slices, and report each one; a signal ends it after a slice, or a wait.

    With --dry-run, print the ids of the jobs that pass the check.
    """
    if args.dry_run:
        return dry_run(jobs, check, named=bool(args.ids))
    numbers: list[int] = []
    changed = 0
    left = [job.seq for job in jobs]
    queue._db.keep_waiting = lambda waited: waited < PATIENCE and not numbers
    with handle_signals(lambda number, _frame: numbers.append(number), None):
        try:
            for done in queue._ledger.in_slices(left, check, act):
                report(done)
                changed += len(done)
                if numbers:
                    break
        except Locked:
            if not numbers:
                raise
    if numbers:
        say(f"interrupted; {plural(changed, 'job')} of {len(left)} changed")
        return -numbers[0]
    return Exit.OK


def show_jobs(args: argparse.Namespace, queue: Queue, states: Sequence[str] = ()) -> None:
    settings = lru_cache(maxsize=None)(queue.config)
    reader = queue._reader
    chosen = selection(args, states)
    say_unused(reader, chosen.queues)
    if not chosen.ids:
        chosen = chosen._replace(notifications=getattr(args, "notifications", True))
    is_program = args.json or args.ids_only or chosen.ids
    limit = args.limit if args.limit is not None or is_program else 100
    total = 0
    jobs: Iterable[Job] = reader.selected(chosen)
    if limit:
        jobs, total = reader.latest_selected(chosen, limit)
    if args.ids_only:
        show_ids(jobs)
        return
    facts = ({**job_facts(job, settings(job.queue)), **run_facts(reader, job)} for job in jobs)
    headings = ("ID", "STATE", "QUEUE", "TRIES", "WHEN", "WHY", "COMMAND")
    rows = (job_row(reader, job, settings(job.queue)) for job in jobs)
    show_list(args, facts, headings, rows)
    if limit and limit < total and not args.json:
        say(f"{limit} of {total} jobs shown; --limit 0 shows all")


def cmd_list(args: argparse.Namespace, queue: Queue) -> None:
    if not args.recurring:
        show_jobs(args, queue)
        return
    reader = queue._reader
    now = reader.clock()
    chosen = selection(args)
    say_unused(reader, chosen.queues)
    found = reader.named(chosen.ids) if chosen.ids else reader.select(SCHEDULES)
    jobs = [job for job in found if job.rule and chosen.takes(job, now)]
    if args.ids_only:
        show((str(job.schedule_id) for job in jobs), whole=True)
        return
    facts = (
        {**job_facts(job, queue.config(job.queue)), "last_result": reader.last_result(job)}
        for job in jobs
    )
    rows = []
    for job in jobs:
        due = format_distance(job.run_after, now)
        last = result_text(reader, job)
        rows.append((job.schedule_id, rule_text(job), due, last, job.id, job.command))
    show_list(args, facts, ("ID", "SCHEDULE", "NEXT", "LAST RESULT", "JOB", "COMMAND"), rows)


def cmd_web(args: argparse.Namespace, queue: Queue) -> None:
    site = Site(queue.path, args.port, insecure=args.insecure)
    print(site.url, flush=True)
    with contextlib.ExitStack() as stack:
        if args.open:
            queue._db.run_dir.make()  # the database may have been copied here
            file = queue._db.run_dir.file(f"web-{site.port}.html")
            stack.callback(os.unlink, file)
            open_browser(site.url, file)
        site.server.serve_forever()


def cmd_show(args: argparse.Namespace, queue: Queue) -> None:
    job = queue.get(args.id) if args.id else queue._reader.last_job()
    reader = queue._reader
    if not args.json:
        show(job_text(reader, job), whole=True)
        return
    facts = {**reader.facts(job), "why": reason_to_wait(reader, job) or None}
    print(json.dumps(facts)[:-1], end=', "runs": [')
    for number, attempt in enumerate(reader.attempts(job)):  # all outputs may not fit into memory
        print(", " if number else "", json.dumps(attempt_facts(attempt)), sep="", end="")
    print("]}")


def cmd_report(args: argparse.Namespace, queue: Queue) -> None:
    chosen = selection(args)._replace(notifications=False)
    reader = queue._reader
    style = args.format or (format_of(args.output) if args.output else "text")
    if style == "prometheus" and (chosen[2:] != REPORTED[2:] or chosen.ids or args.since):
        raise BadInput("metrics are about queues; the only selection they take is --queue")
    since = reader.clock() - args.since if args.since else 0.0
    say_unused(reader, chosen.queues)
    jobs = partial(changed_jobs, reader, chosen, since)
    report = Report(reader, lambda: histories(reader, jobs(), since), chosen.queues, since)
    if args.output:
        write_report(args.output, FORMATS[style](report))
    elif style == "text":
        show(line.rstrip("\n") for line in text_report(report))
    else:
        sys.stdout.writelines(FORMATS[style](report))


def last_id(queue: Queue) -> str:
    """Return the id of the job that was added last, and report which one it is."""
    job = queue._reader.last_job()
    say(f"job {job.id}: {quoted(job.command)}")
    return job.id


def wait_result(reader: Reader, jobs: Sequence[Job]) -> int:
    """Report which jobs cannot run; return the exit code of the first that failed."""
    for job in [job for job in jobs if job.state == PENDING]:
        cause = reader.failed_ancestor(job)
        reason = f"job {cause.id} is {cause.state}" if cause else obstacle(reader, job)
        say(f"job {job.id} cannot run: {reason}")
    failed = (job for job in jobs if job.state != COMPLETED)
    return next((shell_code(job.exit_code or Exit.NO) for job in failed), Exit.OK)


def cmd_wait(args: argparse.Namespace, queue: Queue) -> int:
    if args.ids and args.all:
        raise BadInput("either name the jobs or use --all")
    ids = args.ids or ([] if args.all else [last_id(queue)])
    reader = queue._reader
    watch = JobWatch(reader, reader.named(ids))
    old = () if ids else set(reader.dead())

    def result() -> list[Job] | None:
        """Return the jobs that decide the exit code, once the wait is over."""
        if ids:
            return watch.jobs() if watch.is_over() else None
        if reader.drain_blockers():
            return None
        died = (row[0] for row in reader.dead() if row not in old and not row[3])
        return [*map(reader.get, islice(died, 1)), *reader.blocked(limit=1)]

    notices = Notices(say, NEVER)
    for job in watch.jobs()[:100] or filter(None, [*reader.claimed(), reader.oldest()]):
        if reason := obstacle(reader, job):
            notices.report(f"job {job.id} is waiting: {reason}", key=reason)
    survey = partial(survey_jobs, watch) if ids else partial(survey_queues, reader)
    progress = Progress(survey, reader.clock)
    for _ in reader.changes(args.timeout):
        if (jobs := result()) is not None:
            return wait_result(reader, jobs)
        SCREEN.draw(progress.line)
    say(f"timed out after {format_duration(args.timeout)}: {progress.line()}")
    return Exit.TIMED_OUT


def read_from(fd: int, at: int) -> tuple[int, bytes]:
    """Return the next output of a file and its place; a part that was freed is skipped."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # the end of the file
            at = os.lseek(fd, at, os.SEEK_DATA)
    os.lseek(fd, at, os.SEEK_SET)
    return at, os.read(fd, 1 << 16)


def follow(queue: Queue, job: Job, fd: int, at: int, end: float = NEVER) -> Iterator[bytes]:
    """Yield the output of an attempt from an offset on, as it comes, until the attempt ends."""
    ended = False
    version = -1
    for _ in polling(end - time.monotonic(), first=0.03, longest=0.03):
        chunk = b"more"
        while chunk and time.monotonic() < end:
            at, chunk = read_from(fd, 0 if os.fstat(fd).st_size < at else at)  # 0: truncated
            yield chunk
            at += len(chunk)
        if ended:
            return
        require_in_place(queue._db.path, queue._db.connection.info)
        if version != (version := queue._reader.data_version()):
            now = queue._reader.by_seq(job.seq)
            ended = now is None or (now.state, now.run) != (PROCESSING, job.run)


def await_attempt(queue: Queue, job: Job) -> Job:
    """Wait until an attempt of a job has begun or the job has ended; return the job."""
    last = job.run if job.state == PENDING else job.run - 1  # the last attempt that has ended
    notices = Notices(say, NEVER)
    for _ in queue._reader.changes():
        job = queue.get(job.id)
        if job.state == PROCESSING and (reason := obstacle(queue._reader, job)):
            notices.report(f"job {job.id} is waiting: {reason}")
        begun = os.path.exists(queue._db.run_dir.output_file(job))  # a moment after the claim
        if job.state in FINISHED or (begun if job.state == PROCESSING else job.run > last):
            break
    return job


def report_dropped(number: int) -> None:
    if number:
        say(f"{number} bytes of earlier output were not kept")


def open_output(queue: Queue, job: Job) -> IO[bytes] | None:
    """Open the output of an attempt that runs; return None where there is no file."""
    with contextlib.suppress(FileNotFoundError):
        return open(open_own(queue._db.run_dir.output_file(job), os.O_RDONLY), "rb", 0)
    return None


def write_log(args: argparse.Namespace, queue: Queue, job: Job) -> None:
    """Write the output of one attempt: the one with --run, or the one that runs or ran last."""
    if job.state == PENDING and not args.run:
        say(f"job {job.id} is waiting: {reason_to_wait(queue._reader, job)}")
    if args.follow and not args.run:
        job = await_attempt(queue, job)
    limit = queue._reader.settings(job.queue)["output_limit"]
    file = open_output(queue, job._replace(run=args.run or job.run))
    with file or contextlib.nullcontext():
        if file:
            dropped, output = last_bytes(file.fileno(), limit)
        else:
            dropped, output = stored_output(queue, job, args.run)
        shown = output if args.tail is None else last_lines(output, args.tail)
        at = dropped + len(output) - len(shown)
        if dropped and shown is output:
            report_dropped(dropped)
        write_output(follow(queue, job, file.fileno(), at) if file and args.follow else [shown])


def named_attempt(args: argparse.Namespace, queue: Queue, name: str) -> Job:
    """Return a job by its id or, for the name of a schedule, the one that ran last."""
    job = queue.get(name)
    if not (args.follow or job.run or job.id == name):
        return queue._reader.first(LAST_RUN_OF_SCHEDULE, id=job.schedule_id) or job
    return job


def cmd_logs(args: argparse.Namespace, queue: Queue) -> None:
    """Write the output of the named jobs, of the last job or, with --failed, of all dead jobs."""
    if args.failed and (args.ids or args.run):
        raise BadInput("--failed is about the last attempts of all dead jobs; use it alone")
    ids = [name for text in args.ids for name in text.split() or [text]]  # "$QUEUECTL_PARENTS"
    if args.follow and (args.failed or len(ids) > 1):
        raise BadInput("-f follows one job")
    if args.failed:
        seqs = [row[1] for row in queue._reader.dead()]
        jobs: Iterable[Job] = (job for job in map(queue._reader.by_seq, seqs) if job)
        if not seqs:
            say("no job is dead")
    else:
        jobs = [named_attempt(args, queue, name) for name in ids or [last_id(queue)]]
    for number, job in enumerate(jobs):
        if args.failed or len(ids) > 1:
            write_heading(job, first=not number)
        write_log(args, queue, job)


def report_first_contact(queue: Queue, ids: Iterable[str], *, is_new: bool) -> None:
    """Tell a person that a queue was made, and how to start workers where none runs."""
    if not terminal_width(sys.stderr):
        return
    if is_new:
        say(f"made a new queue: {queue.path}")
    with contextlib.suppress(NotFound):  # it has run, and was pruned
        for job in map(queue.get, ids):
            if reason := unserved(queue._db.run_dir, job.queue):
                say(f"{reason}; start one: queuectl worker start")


def output_of_attempts(queue: Queue, job: Job, end: float) -> Iterator[bytes]:
    """Yield the output of a job's attempts, as it comes, until it can run no more or the end."""
    reader = queue._reader
    notices = Notices(say, NEVER)
    shown = max(0, job.run - 1)
    for _ in polling(end - time.monotonic(), first=0.002):
        require_in_place(queue._db.path, queue._db.connection.info)
        job = reader.by_seq(job.seq) or job._replace(state=COMPLETED)
        for run in range(shown + 1, job.run + 1):
            if file := open_output(queue, job._replace(run=run)):
                with file:
                    yield from follow(queue, job._replace(run=run), file.fileno(), 0, end)
            elif job.state == PROCESSING and run == job.run:
                break  # it is made a moment after the claim
            elif (attempt := reader.last_attempt(job, run)) and attempt.run == run:
                report_dropped(attempt.bytes_dropped)
                yield attempt.output
            shown = run
        if job.state in FINISHED or reader.failed_ancestor(job):
            return
        if reason := obstacle(reader, job):
            cause = f"; its last attempt: {job.last_error}" if job.last_error else ""
            key = f"{job.run} {reason.partition(' ')[0]}"
            notices.report(f"job {job.id} is waiting: {reason}{cause}", key=key)


def follow_jobs(args: argparse.Namespace, queue: Queue) -> int:
    """Show the output of jobs, one after the other, until they have ended; return as `wait`."""
    reader = queue._reader
    end = NEVER if args.timeout is None else time.monotonic() + args.timeout
    jobs = reader.named(args.ids)
    for number, job in enumerate(jobs):
        if len(jobs) > 1:
            write_heading(job, first=not number)
        write_output(output_of_attempts(queue, job, end))
    if time.monotonic() < end:
        return cmd_wait(args, queue)
    say(f"timed out after {format_duration(args.timeout or 0)}")
    return Exit.TIMED_OUT


def wait_for_end(args: argparse.Namespace, queue: Queue, ids: Sequence[str]) -> int:
    """Wait for jobs that were enqueued; return as `wait` does."""
    args.ids = [job.id for job in queue._reader.named(ids)]  # of a schedule, the first job
    args.all = False
    args.timeout = args.wait_timeout
    try:
        return follow_jobs(args, queue) if args.follow else cmd_wait(args, queue)
    except KeyboardInterrupt:
        SCREEN.clear()
        SCREEN.write("\n" if terminal_width(sys.stderr) else "")
        names = " ".join(ids[:3]) + " ..." * (len(ids) > 3)
        stay = "stays" if len(ids) == 1 else "stay"
        say(f"{plural(len(ids), 'job')} {stay} in the queue (queuectl cancel {names})")
        raise


def cmd_enqueue(args: argparse.Namespace) -> int:
    import tempfile
    from array import array

    at = array("L", [0])
    is_new = not os.path.lexists(args.db)
    is_waiting = args.wait or args.follow or args.wait_timeout is not None
    write = SCREEN.line if is_waiting else print
    with tempfile.SpooledTemporaryFile(1 << 20) as stdin:
        if is_stdin(args) and sys.stdin and not sys.stdin.closed:
            copy_stdin(args, stdin)
        try:
            for job in with_options(args, described_jobs(args, stdin, at)) if is_new else ():
                validate_fields(job)  # bad input must not create a queue
            jobs = with_options(args, described_jobs(args, stdin, at))
            with Queue(args.db, insecure=args.insecure) as queue:
                ids: list[str] = []
                batch = Batch(queue._ledger, if_absent=args.if_absent)
                for job_id in batch.store(jobs):
                    write(job_id)
                    if is_waiting or not ids:
                        ids.append(job_id)
                for fields in batch.taken:
                    report_kept(queue, fields)
                if is_waiting:
                    return wait_for_end(args, queue, ids)
                report_first_contact(queue, ids, is_new=is_new)
        except BadInput as error:
            line = at[0] if error.index is None else at[at[0] and error.index + 1]
            raise BadInput(f"line {line}: {error}" if line else str(error)) from None
    return Exit.OK


def report_cancelled(args: argparse.Namespace, queue: Queue, job: Job) -> int:
    """Print the id of a cancelled job, and report the consequences; return the exit code."""
    if job.state != CANCELLED and not job.cancel_requested:
        say(f"job {job.id} is {job.state}; it was not changed")
        return Exit.OK if args.cascade and job.state == DEAD else Exit.NO
    print(job.id)
    if job.cancel_requested:
        say(f"job {job.id} is being cancelled: {obstacle(queue._reader, job)}")
    if job.rule and queue.get(job.schedule_id or "").seq == job.seq:
        say(f"schedule {job.schedule_id} has ended with it; dlq retry {job.id} resumes it")
    if children := queue._reader.number(COUNT_CHILDREN, seq=job.seq):
        stay = "stays" if children == 1 else "stay"
        jobs = plural(children, "job")
        say(f"{jobs} waiting for {job.id} {stay} blocked; --cascade cancels these too")
    return Exit.OK


def to_cancel(args: argparse.Namespace, queue: Queue, chosen: Selection) -> Iterable[Job]:
    """Return the selected jobs and, with --cascade, those that wait for them."""
    jobs = {job.seq: job for job in queue._reader.selected(chosen)}
    for seq in list(jobs) if args.cascade else []:
        jobs.update((job.seq, job) for job in queue._reader.select(DESCENDANTS, seq=seq))
    return jobs.values()


def report_waiting(jobs: Iterable[Job]) -> None:
    """Print the ids of cancelled jobs that waited, and report the schedules that end with them."""
    show_ids(jobs)
    for job in jobs:
        if job.rule:
            say(f"schedule {job.schedule_id} has ended with {job.id}")


def cancel_named(args: argparse.Namespace, queue: Queue, ids: Sequence[str]) -> int:
    jobs = queue.cancel(ids, cascade=args.cascade, gone=args.gone)
    run_dir = queue._db.run_dir
    notices = Notices(say, NEVER)
    report_at = time.monotonic() + 1
    for _ in queue._reader.changes():
        jobs = [queue._reader.by_seq(job.seq) or job for job in jobs]
        ending = [job for job in jobs if job.cancel_requested]
        if ending and time.monotonic() > report_at:
            notices.report(f"waiting for {', '.join(job.id for job in ending)} to end")
        has_worker = not all(run_dir.is_unlocked(job.locked_by) for job in ending)
        if not has_worker and not (ending and run_dir.alive("pool")):
            break
    return max(report_cancelled(args, queue, job) for job in jobs)


def cmd_cancel(args: argparse.Namespace, queue: Queue) -> int:
    states = (PENDING, PROCESSING)
    chosen = targets(args, states, states)
    ids = chosen.ids
    if args.dry_run or not ids:
        ledger = queue._ledger
        check = partial(ledger.require_state, states=states if args.dry_run else (PENDING,))
        jobs = to_cancel(args, queue, chosen)
        code = change_jobs(
            args, queue, jobs, check, lambda job: ledger.cancel(job.seq), report_waiting
        )
        if code or args.dry_run:
            return code
        ids = [job.id for job in queue._reader.selected(chosen) if job.state == PROCESSING]
    return cancel_named(args, queue, ids) if ids else Exit.OK


def await_occurrence(queue: Queue, name: str) -> None:
    """Wait while the job of a schedule runs: it cannot be changed, and the next one is not made."""
    notices = Notices(say, NEVER)
    for _ in queue._reader.changes():
        job = queue.get(name)
        if job.id == name or job.state != PROCESSING:
            return
        notices.report(f"waiting for {job.id} to end, before the next job of {name} is changed")


def cmd_edit(args: argparse.Namespace, queue: Queue) -> int:
    given = vars(args)
    fields = {key: given[key] for key in EDITABLE if given[key] is not None}
    if "env" in fields:
        fields["env"] = dict(chain(*fields["env"]))
    if args.ids and args.queues:  # without ids, it selects
        if "queue" in fields:
            raise BadInput("name the new queue by --queue or --to-queue, not both")
        fields["queue"] = args.queues.pop()
    if not fields:
        raise BadInput("give a new field, such as --priority 5; --to-queue moves selected jobs")
    changes = validate_changes(fields)
    ledger = queue._ledger
    chosen = targets(args, (PENDING,), (PENDING,))
    jobs = queue._reader.selected(chosen)
    if args.dry_run or not chosen.ids:
        check = partial(ledger.require_state, states=(PENDING,))
        act = partial(ledger.edit, fields=changes)
        return change_jobs(args, queue, jobs, check, act)
    for name in chosen.ids:
        await_occurrence(queue, name)
    changed = queue.edit(chosen.ids, **fields)
    show_ids(changed)
    others = {job.seq: job for job in jobs if job.seq not in {other.seq for other in changed}}
    for job in others.values():
        again = f" (queuectl pause, dlq retry {job.id}, edit it, resume)"
        hint = again if job.state in (DEAD, CANCELLED) else ""
        say(f"job {job.id} is {job.state}; it was not changed{hint}")
    return Exit.NO if others else Exit.OK


def cmd_pause(args: argparse.Namespace, queue: Queue) -> None:
    say_unused(queue._reader, args.queues)
    for name in args.queues or [""]:
        queue.pause(name)
        say(f"{f'queue {name} is' if name else 'all queues are'} paused; running jobs continue")


def cmd_resume(args: argparse.Namespace, queue: Queue) -> None:
    for name in args.queues or [""]:
        queue.resume(name)
        say(f"{f'queue {name} is' if name else 'all queues are'} no longer paused")
    if "" in queue._reader.paused():
        say("all queues are still paused; resume without --queue resumes them")


def cmd_dlq_retry(args: argparse.Namespace, queue: Queue) -> int:
    ledger = queue._ledger
    chosen = targets(args, (DEAD, CANCELLED), (DEAD,))
    if chosen.ids and not args.dry_run:
        show(queue.retry(chosen.ids))
        return Exit.OK
    counts = queue.counts()
    if not chosen.ids and chosen.states == (DEAD,) and not counts[DEAD] and counts[CANCELLED]:
        cancelled = plural(counts[CANCELLED], "cancelled job")
        say(f"no job is dead; {cancelled} can be retried by id or with --state cancelled")
    jobs = queue._reader.selected(chosen)
    return change_jobs(args, queue, jobs, ledger.check_retry, ledger.retry)


def delete_jobs(
    args: argparse.Namespace, queue: Queue, chosen: Selection, states: Sequence[str], done: str
) -> int:
    """Delete jobs in some states, the named ones all or none; report how many."""
    ledger = queue._ledger
    deleted = 0

    def report(jobs: list[Job]) -> None:
        nonlocal deleted
        deleted += len(jobs)
        if args.ids_only:
            show_ids(jobs)

    code: int = Exit.OK
    if chosen.ids and not args.dry_run:
        report(queue._delete(chosen.ids, states))
    else:
        jobs = queue._reader.selected(chosen)
        check = partial(ledger.check_delete, states=states)
        code = change_jobs(args, queue, jobs, check, lambda job: ledger.delete(job.seq), report)
    if not args.dry_run:
        say(f"{plural(deleted, 'job')} {done}")
    return code


def cmd_dlq_purge(args: argparse.Namespace, queue: Queue) -> int:
    chosen = targets(args, (DEAD, CANCELLED), (DEAD,))
    return delete_jobs(args, queue, chosen, (DEAD, CANCELLED), "purged")


def cmd_prune(args: argparse.Namespace, queue: Queue) -> int:
    chosen = targets(args, FINISHED, PRUNED_BY_DEFAULT, everything=True)
    return delete_jobs(args, queue, chosen, FINISHED, "pruned")


def read_settings(args: argparse.Namespace) -> tuple[Settings, Mapping[str, str]]:
    """Return the settings and where they are stored; the defaults where there is no queue."""
    if not os.path.lexists(args.db):
        return DEFAULTS, {}
    with Queue(args.db, readonly=True, insecure=args.insecure) as queue:
        return queue.config(args.queue or ""), queue._reader.sources(args.queue or "")


def cmd_config_get(args: argparse.Namespace) -> None:
    key = validate_setting(args.key, queue=args.queue or "")
    show([setting_text(read_settings(args)[0][key])], whole=True)


def report_setting(args: argparse.Namespace, queue: Queue) -> None:
    import shutil

    key = validate_setting(args.key)
    value = queue.config(args.queue or "")[key]
    where = f"queue {args.queue}" if args.queue else "all queues"
    say(f"{key} is {setting_words(key, value) or 'empty'} for {where}")
    if key in ("shell", "launcher", "launcher_cancel") and value and not shutil.which(value[0]):
        say(f"warning: there is no program {quoted(value[0])} here; jobs need it")


def cmd_config_set(args: argparse.Namespace) -> None:
    validate_setting(args.key, args.value, args.queue or "")  # before a queue is created for it
    with Queue(args.db, insecure=args.insecure) as queue:
        queue.configure(args.key, args.value, args.queue or "")
        report_setting(args, queue)


def cmd_config_unset(args: argparse.Namespace, queue: Queue) -> None:
    queue.configure(args.key, None, args.queue or "")
    report_setting(args, queue)


def cmd_config_list(args: argparse.Namespace) -> None:
    settings, sources = read_settings(args)
    facts = []
    rows = []
    for key, value in settings.items():
        setting = SETTINGS[key]
        if not args.queue or key not in FOR_ALL_QUEUES:
            source = sources.get(key)
            facts.append({"key": key, "value": value, "default": setting.default, "queue": source})
            where = source or ("" if source is None else "(all)")
            rows.append((key, setting_words(key, value), where, setting.meaning))
    show_list(args, facts, ("KEY", "VALUE", "QUEUE", "MEANING"), rows)


def cmd_doctor(args: argparse.Namespace) -> int:
    healthy = True
    for check, ok, detail in Doctor(args.db).examine():
        healthy = healthy and ok
        if args.json:
            print(json.dumps({"check": check, "ok": ok, "detail": detail}), flush=True)
        else:
            show([f"{'ok' if ok else 'FAIL':<5} {check:<13} {detail}"], whole=True)
            sys.stdout.flush()
    return Exit.OK if healthy else Exit.NO


# fmt: off
JSON = flag("--json", "print JSON; the README documents the fields")
LIMIT = arg("-n --limit", "N", "the N that changed last (0: all; default: 100, or all with --json "
            "or --ids)", integer(0, 10**9))
TIMEOUT = arg("--timeout", "DURATION", "stop waiting after this time, and exit with 124",
              parse_duration)
QUEUE = arg("-q --queue", "QUEUE", "only this queue", valid_name)
QUEUES = arg("-q --queue", "QUEUE", "only this queue; repeatable", valid_name, dest="queues",
             action="append", default=[])
ID = arg("id", "ID", "default: the job that was added last", nargs="?")
IDS = arg("ids", "ID", nargs="*")
IDS_OR_LAST = arg("ids", "ID", "default: the job that was added last", nargs="*")
# A selection of jobs: named ones, or those that match all of these options.
STATE = arg("-s --state", "STATE,...", "only jobs in these states: " + ", ".join(STATE_WORDS),
            valid_states, dest="states", action="extend", default=[])
MATCH = arg("--match", "TEXT", "only jobs whose id or command contains this text; case is "
            "ignored", valid_command)
OLDER_THAN = arg("--older-than", "DURATION", "only jobs that have been in their state for at "
                 "least this long", parse_duration)
IDS_ONLY = flag("--ids", "print only the ids", dest="ids_only")
SELECT = (IDS, *group("which jobs", QUEUES, STATE, MATCH, OLDER_THAN), IDS_ONLY)
AGE = arg("--older-than", "DURATION", "only jobs that have been in their state for at least this "
          "time, with a unit: 7d", parse_age)
CHANGE = (*SELECT, flag("-n --dry-run", "print the ids, and change nothing"))
DELETE = (IDS, *group("which jobs", QUEUES, STATE, MATCH, AGE), *CHANGE[5:])
ALL_DEAD = flag("--all", "all dead jobs")
KEY = arg("key", "KEY", "one of: " + ", ".join(SETTINGS), validate_setting)
OF_QUEUE = arg("-q --queue", "QUEUE", "apply to this queue only (default: all queues without a "
               "value of their own)", valid_name)

COMMANDS = {
    "enqueue": Command(cmd_enqueue, "none", "add a job and print its id", "enqueue 'make all'", (
        arg("words", "JOB", "a quoted shell line; JSON (objects or arrays); - for JSON on stdin; "
            "or -- followed by the words of a command. After it, ::: ARG... adds one job for each "
            "ARG, which replaces {} in the command, --id, --after, --after-end and --env; it is "
            "appended to a command without {}", nargs="+"),
        flag("--lines", "with -: stdin has one command per line instead of JSON"),
        flag("--if-absent", "do nothing if a job with that id exists"),
        flag("--new-ids", "ignore the ids in JSON, such as those that list --json printed"),
        *group("the job",
            field("id", "ID", "the name of the job (default: a number)"),
            field("queue", "QUEUE", "the queue it waits in (default: default)", "-q --queue"),
            field("priority", "N", "higher numbers run first (default: 0)", "-p --priority")),
        *group("when it runs",
            field("delay", "DURATION", "start it after this time (default: at once)"),
            field("run_at", "TIME", "start it at this time: 2030-01-31T08:00", "--at"),
            field("after", "ID,...", "start it once these jobs have completed; repeatable",
                  action="extend"),
            field("after_end", "ID,...", "start it once these have ended in any way; repeatable",
                  action="extend"),
            field("every", "DURATION", "repeat it at this interval"),
            field("cron", "RULE", "repeat it by a rule: '0 3 * * mon-fri', @daily")),
        *group("where it runs",
            field("cwd", "DIR", "the directory it runs in (default: this one)"),
            field("env", "NAME=VALUE", "set a variable in its environment; repeatable",
                  action="append", check=parse_variable),
            field("stdin", "TEXT", "the text that it reads from stdin (default: none)"),
            field("stdin", "FILE", "the same, from a file (-: from stdin)", "--stdin-file",
                  check=read_input)),
        *group("timeout and retries",
            field("timeout", "DURATION",
                  "kill an attempt that takes longer (0: never; default: 300s)"),
            field("max_retries", "N",
                  "the number of attempts, including the first (default: 3)"),
            field("retry_delays", "DURATION,...",
                  "wait this long before each retry; the last repeats (default: 2s,4s,8s ...)")),
        *group("notifications (default: as the settings say)",
            field("on_dead", "COMMAND", "run this when it is dead ('': nothing)"),
            field("on_end", "COMMAND", "run this when it has ended in any way ('': nothing)")),
        *group("waiting",
            flag("--wait", "wait until the job has ended, and exit with its code; ids go to "
                "stderr"),
            flag("-f --follow", "the same, and print its output as it comes"),
            arg("--wait-timeout", "DURATION",
                "the same as --wait, but stop after this time, and exit with 124; the job stays",
                parse_duration)))),
    "worker start": Command(
        cmd_worker_start, "none", "run jobs until stopped", "worker start --count 4", (
            arg("-c --count", "N", "how many jobs to run at a time (default: 1; 0: one per CPU)",
                integer(0, 1000), default=1),
            QUEUES,
            flag("--drain", "exit when nothing is left to run; with 1 if a job died, is blocked "
            "or was not run because of a stop"),
            arg("--horizon", "DURATION", "with --drain: do not wait for jobs that are due later "
                "than this", parse_duration, default=LONGEST),
            arg("--report", "FILE", "with --drain: write a report at the end; its extension "
                "selects the format, as in: report -o FILE; repeatable", valid_report,
                dest="reports", action="append", default=[]),
            flag("--detach", "run in the background; the log is in the database's .run directory"),
            arg("--output", None, "print the output of each job that dies, or of each that ends",
                choices=("failed", "all")),
            flag("--quiet", "print no event lines"))),
    "worker stop": Command(
        cmd_worker_stop, "read", "let workers finish their jobs and exit", "worker stop --now",
        (arg("pools", "POOL", "only this pool (default: all)", nargs="*"),
            arg("-q --queue", "QUEUE", "only pools started for this queue; repeatable", valid_name,
                dest="queues", action="append", default=[]),
            flag("--now", "kill the running jobs and return them to their queues"), TIMEOUT)),
    "worker list": Command(cmd_worker_list, "read", "list running workers", "worker list", (JSON,)),
    "status": Command(cmd_status, "read", "show counts and workers", "status --watch", (
        QUEUE, flag("--watch", "refresh every second, with the rate and the last failures"), JSON)),
    "report": Command(cmd_report, "read", "report on jobs, for people, CI and Prometheus",
        "report -o report.html --since 1d", (
        arg("--format", None, "by default, the extension of FILE selects it, or else text",
            choices=tuple(FORMATS)),
        arg("-o", "FILE", "write to FILE, in one step, instead of stdout", valid_report,
            dest="output"),
        arg("--since", "DURATION", "only jobs that changed, and attempts that ended, in this time",
            parse_duration, default=0.0), *SELECT[:-1])),
    "list": Command(cmd_list, "read", "list jobs", "list --state dead --limit 20", (
        *SELECT, flag("--recurring", "list schedules and their next times"),
        flag("--notifications", "also show notifications that have completed"), LIMIT, JSON)),
    "show": Command(cmd_show, "read", "show everything about a job", "show 7", (ID, JSON)),
    "logs": Command(cmd_logs, "read", "print the output of a job", "logs 7 -f", (
        IDS_OR_LAST, flag("-f --follow", "continue until the attempt ends"),
        arg("-n --tail", "N", "only the last N lines", integer(0, 10**9)),
        flag("--failed", "print the output of all dead jobs"),
        arg("--run", "N", "print attempt N instead of the last", integer(1, 10**9)))),
    "web": Command(cmd_web, "read", "show the jobs in a browser on this machine", "web --open", (
        arg("--port", "N", f"the port (default: {WEB_PORT}; 0: any that is free)",
            integer(0, 65535), default=WEB_PORT),
        flag("--open", "open the page in the browser"))),
    "wait": Command(cmd_wait, "read", "wait for jobs; exit with the code of the first that failed",
        "wait 7 8", (IDS_OR_LAST, flag("--all", "wait until nothing is left to run"), TIMEOUT)),
    "cancel": Command(cmd_cancel, "write", "cancel waiting or running jobs", "cancel 7", (
        *CHANGE, flag("--cascade", "also cancel the jobs that depend on them"),
        flag("--gone", "declare that they have ended elsewhere, even if launcher_cancel fails"))),
    "edit": Command(cmd_edit, "write", "change jobs that wait", "edit 7 --priority 5"),
    "pause": Command(cmd_pause, "create", "start no new jobs until resume",
        "pause --queue gpu", (QUEUES,)),
    "resume": Command(cmd_resume, "write", "start jobs again after pause", "resume", (QUEUES,)),
    "dlq list": Command(lambda args, queue: show_jobs(args, queue, (DEAD,)), "read",
        "list the dead letter queue", "dlq list", (*SELECT, LIMIT, JSON)),
    "dlq retry": Command(cmd_dlq_retry, "write", "return dead or cancelled jobs to their queues",
        "dlq retry 7", (*CHANGE, ALL_DEAD)),
    "dlq purge": Command(cmd_dlq_purge, "write", "delete dead or cancelled jobs",
        "dlq purge --older-than 30d", (*DELETE, ALL_DEAD)),
    "prune": Command(cmd_prune, "write",
        "delete completed and cancelled jobs, or the selected ones", "prune --older-than 7d",
        DELETE),
    "doctor": Command(cmd_doctor, "none", "test this machine and this directory", "doctor",
        (JSON,)),
    "config get": Command(cmd_config_get, "none", "print a setting", "config get timeout",
        (KEY, OF_QUEUE)),
    "config set": Command(cmd_config_set, "none", "change a setting",
        "config set limit 1 --queue gpu", (KEY, arg("value", "VALUE"), OF_QUEUE)),
    "config unset": Command(cmd_config_unset,
        "write", "restore the default of a setting", "config unset timeout", (KEY, OF_QUEUE)),
    "config list": Command(cmd_config_list, "none", "list the settings", "config list",
        (OF_QUEUE, JSON)),
    "install": Command(cmd_install, "none", "install this program as the command queuectl",
        "install", (arg("dir", "DIR", "the directory for queuectl (default: ~/.local/bin)",
            valid_path, nargs="?"),)),
}
# The fields that can be changed are the options of `enqueue`, except where selections have others.
EDITS = (
    field("command", "COMMAND", "the shell line"),
    field("queue", "QUEUE", "move it to this queue; with ids, --queue does the same", "--to-queue"),
    field("env", "NAME[=VALUE]", "set a variable or, without =, remove it; repeatable",
          action="append", check=partial(parse_variable, removable=True)),
    *(option for option in COMMANDS["enqueue"].arguments
      if option[1].get("dest") in EDITABLE.keys() - {"queue", "env"}))
COMMANDS["edit"] = COMMANDS["edit"]._replace(arguments=(*CHANGE, *starmap(edit_option, EDITS)))
# fmt: on


SYNONYMS = {  # words of other tools, and the command to type here
    "enqueue": "add submit run push exec queue",
    "worker start": "start work workers",
    "worker stop": "stop shutdown",
    "list": "ls jobs ps",
    "logs": "log tail output cat",
    "cancel": "kill rm abort delete remove",
    "dlq retry": "retry restart requeue rerun",
    "show": "info inspect describe get",
    "status --watch": "top watch",
    "dlq list": "failed failures dead",
    "config list": "settings",
    "--version": "version",
}


def menu(family: str = "") -> dict[str, str]:
    """Return the commands, or those of a family, with the help of each."""
    found: dict[str, str] = {}
    for words, command in COMMANDS.items():
        first, _, verb = words.partition(" ")
        if first == family:
            found[verb] = command.help
        elif not family:
            found[first] = f"{found[first]}, {verb}" if first in found else verb or command.help
    return found


COMPLETIONS = {  # each makes its shell ask the program
    "bash": """_queuectl() {
  COMPREPLY=($(PROGRAM completion bash "${COMP_WORDS[@]:0:COMP_CWORD+1}" 2>/dev/null))
}
complete -o default -F _queuectl queuectl queuectl.py""",
    "zsh": """_queuectl() {
  compadd -- $(PROGRAM completion zsh "${(@)words[1,CURRENT]}" 2>/dev/null) || _files
}
compdef _queuectl queuectl queuectl.py""",
    "fish": """function __queuectl
  set -l found (PROGRAM completion fish (commandline -opc) (commandline -ct) 2>/dev/null)
  if set -q found[1]
    printf '%s\\n' $found
  else
    __fish_complete_path (commandline -ct)
  end
end
complete -c queuectl -c queuectl.py -f -a '(__queuectl)'""",
}


ID_STATES: Mapping[str, Sequence[str]] = {  # of the jobs whose ids complete a command; else all
    "dlq list": (DEAD,),
    "dlq retry": (DEAD,),
    "dlq purge": (DEAD,),
    "cancel": (PENDING, PROCESSING),
    "wait": (PENDING, PROCESSING),
    "edit": (PENDING,),
    "prune": FINISHED,
}


def values_of(args: argparse.Namespace, name: str, options: Any, start: str) -> Iterable[str]:
    """Return the known values of an argument of a command; an id that is to be new has none."""
    if "choices" in options:
        return options["choices"]  # type: ignore[no-any-return]
    kind = str(options["metavar"]).partition(",")[0]
    known = {"STATE": STATE_WORDS, "KEY": tuple(SETTINGS)}.get(kind, ())
    if kind not in ("QUEUE", "ID", "POOL") or options.get("dest") == "id":
        return known
    with Queue(args.db, readonly=True, insecure=args.insecure) as queue:
        if kind == "QUEUE":
            return queue._reader.column(USED_QUEUES)
        if kind == "POOL":
            return queue._db.run_dir.alive("pool")
        return queue._reader.ids_like(start, ID_STATES.get(name, STATES), limit=50)


def argument_at(command: Command, words: Sequence[str]) -> dict[str, Any]:
    """Return the options of the argument that comes after a command's words; empty if none does."""
    named = {name: more for names, more in command.arguments for name in names if name[0] == "-"}
    takes = [name for name, more in named.items() if more.get("action") != "store_true"]
    if words and words[-1] in takes:
        return named[words[-1]]
    pairs = zip(["", *words], words)
    given = [word for before, word in pairs if word[:1] != "-" and before not in takes]
    others = [more for names, more in command.arguments if names[0][0] != "-"]
    if others and others[-1].get("nargs") in ("*", "+"):
        return others[min(len(given), len(others) - 1)]
    return others[len(given)] if len(given) < len(others) else {}


def completions(args: argparse.Namespace, typed: Sequence[str], last: str) -> Iterable[str]:
    """Return the words that may come after those that were typed, and begin with the last one."""
    words = []
    for before, word in zip(["", *typed], typed):
        if before == "--db":
            args.db = os.path.expanduser(word)
        elif word not in ("--db", "--insecure"):
            words.append(word)
    if typed[-1:] == ["--db"]:
        return ()
    size = next((size for size in (2, 1) if " ".join(words[:size]) in COMMANDS), 0)
    if not size:
        return menu(" ".join(words))
    name, rest = " ".join(words[:size]), words[size:]
    if name == "help":
        return menu(" ".join(rest))
    command = COMMANDS[name]
    argument = argument_at(command, rest)
    if last[:1] == "-":
        return (option for names, _ in command.arguments for option in names if option[0] == "-")
    values = values_of(args, name, argument, last.rpartition(",")[2]) if argument else ()
    head = last[: last.rfind(",") + 1] if argument and ",..." in str(argument["metavar"]) else ""
    return (head + value for value in values)


def cmd_completion(args: argparse.Namespace) -> None:
    if not args.typed:
        program = " ".join(map(shlex.quote, own_command()))
        print(COMPLETIONS[args.shell].replace("PROGRAM", program))
        return
    words = [word for word in args.typed[1:] if word != "="] or [""]  # bash splits --state=dead
    if args.typed[-1] == "=":
        words.append("")
    name, equals, value = words[-1].partition("=") if words[-1][:2] == "--" else ("", "", "")
    if equals:
        words[-1:] = [name, value]
    *typed, last = words
    with contextlib.suppress(QueueError, OSError):  # a shell has no place for messages
        for word in completions(args, typed, last):
            if word.startswith(last):
                text = name + equals + word if equals else word
                print(shlex.quote(text) if args.shell == "bash" else text)


SHELL = arg("shell", "SHELL", "bash, zsh or fish", choices=tuple(COMPLETIONS))
TYPED = arg("typed", "...", "the words typed so far", nargs="...")
COMMANDS["completion"] = Command(
    cmd_completion, "none", "print a shell completion script", "completion bash", (SHELL, TYPED)
)

HELP = f"""\
PATH is the database; the default is $QUEUECTL_DB, or else ./queuectl.db.

to begin:
  queuectl enqueue 'make all'        add a job and print its id
  queuectl worker start --count 4    run jobs, four at a time
  queuectl status --watch            see what waits, runs and has failed
  queuectl logs 7                    print the output of a job
  queuectl dlq retry --all           retry the jobs that failed for good

commands:
  jobs      enqueue, list, show, logs, wait, cancel, edit
  workers   worker start, worker stop, worker list
  queue     status, report, web, pause, resume, prune
  failures  dlq list, dlq retry, dlq purge
  settings  config get, config set, config unset, config list
  machine   install, doctor, completion, help

queuectl help COMMAND describes a command; the README describes everything:
queuectl {__version__}, {HOME_PAGE}#readme
"""


def command_hint(name: str, word: str) -> str:
    """Return which command a wrong word may stand for; never one that deletes."""
    for command, words in SYNONYMS.items():
        if word in words.split() and command.startswith(name):
            return f"; type: queuectl {command}"
    verbs = menu(name)
    close = nearest(word, verbs)
    if close and close not in ("prune", "purge"):
        return f": did you mean {close}?"
    return f"; choose from {', '.join(verbs)}"


ALL_HINTS = {  # the options that replace --all
    "queuectl cancel": "--state pending,processing",
    "queuectl edit": "--state pending",
    "queuectl list": "--limit 0",
}
TAKE_NO_WORDS = ("queuectl worker start", "queuectl pause", "queuectl resume", "queuectl status")


def usage_hint(prog: str, message: str, options: Iterable[str]) -> str:
    wrong = re.match("unrecognized arguments: ([^ =]+)", message)
    if wrong and wrong[1] == "-" and prog == "queuectl enqueue":
        return "; - takes the place of a command, as in: enqueue --lines -"
    if wrong and wrong[1] == "--all" and prog in ALL_HINTS:
        return f": did you mean {ALL_HINTS[prog]}?"
    if wrong and wrong[1][0] == "-":
        return did_you_mean(wrong[1], options)
    if wrong and prog in TAKE_NO_WORDS:
        is_count = prog == "queuectl worker start" and wrong[1].isdigit()
        return f": did you mean {'--count' if is_count else '--queue'} {wrong[1]}?"
    if re.match("argument .*: expected one argument", message):
        return "; it must not begin with -"
    return ""


def new_parser(prog: str, **options: Any) -> argparse.ArgumentParser:
    """Return a parser that raises BadInput, with a hint."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            if message.endswith("required: COMMAND"):
                message = f"which command? {', '.join(menu(self.prog[9:]))}"
            hint = usage_hint(self.prog, message, self._option_string_actions)
            cut = quoted(message, 4 * QUOTED_LIMIT)  # it may repeat a long command line
            raise BadInput(f"{cut}{hint} (see {self.prog} --help)")

        def _print_message(self, message: str, file: Any = None) -> None:
            print(message, end="", file=file)  # argparse would ignore a full disk

    width = terminal_width(sys.stdout) or 80
    # With the width given, argparse does not import shutil, which takes 2 ms.
    style = partial(argparse.RawDescriptionHelpFormatter, width=max(width - 2, 20))
    return Parser(prog, formatter_class=style, allow_abbrev=False, **options)


def add_global_options(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the options that may stand before the command or after it."""
    import argparse

    hidden: Any = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument("--db", metavar="PATH", **hidden)
    parser.add_argument("--insecure", action="store_true", **hidden)


def menu_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command word that others follow: the program's, or a family's."""
    import argparse

    hidden = argparse.SUPPRESS
    prog = f"queuectl {name}".strip()
    lines = "".join(f"  {word:<11} {meaning}\n" for word, meaning in menu(name).items())
    about = lines if name else HELP
    globals_usage = "" if name else " [--db PATH] [--insecure] [--version]"
    usage = f"{prog}{globals_usage} COMMAND [--help] ..."
    parser = new_parser(prog, usage=usage, description=about, add_help=False)
    parser.add_argument("-h", "--help", action="help", help=hidden)
    if not name:
        db = os.environ.get("QUEUECTL_DB") or "queuectl.db"
        versions = f"Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}"
        version = f"queuectl {__version__} ({versions}, schema {SCHEMA_VERSION})"
        parser.add_argument("-V", "--version", action="version", version=version, help=hidden)
        add_global_options(parser)
        parser.set_defaults(db=db, insecure=False)
    parser.add_argument("rest", nargs=argparse.PARSER, metavar="COMMAND", help=hidden)
    return parser


METAVARS = {
    "DURATION": "seconds, or a number with a unit: 90, 90s, 5m, 1h30m, 2d, '2 days'",
    "TIME": "2030-01-31T08:00 (local time), 2030-01-31T08:00Z, or Unix seconds",
}


def command_parser(name: str, command: Command) -> argparse.ArgumentParser:
    about = command.help[0].upper() + command.help[1:] + "."
    used = {options.get("metavar") for _, options in command.arguments}
    notes = [f"{word}: {text}\n" for word, text in METAVARS.items() if word in used]
    example = f"example: queuectl {command.example}"
    epilog = "".join([*notes, example, f"\nqueuectl {__version__}, {HOME_PAGE}"])
    parser = new_parser(f"queuectl {name}", description=about, epilog=epilog)
    groups: dict[str, Any] = {"": parser}
    for names, options in command.arguments:
        title = options.get("group", "")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        plain = {key: value for key, value in options.items() if key != "group"}
        groups[title].add_argument(*names, **plain)
    add_global_options(parser)
    return parser


def count_options(words: Sequence[str], options: Mapping[str, argparse.Action]) -> int:
    """Return how many words at the beginning are options and their values."""
    count = 0
    while count < len(words) and re.match("-[^-]|--.", words[count]):
        name, value = re.fullmatch("(?s)(--[^=]*|-.)(.*)", words[count]).groups()  # type: ignore[union-attr]
        if name not in options:
            return count
        count += 1 if value or options[name].nargs == 0 else 2
    return count


def mark_command(words: list[str], options: Mapping[str, argparse.Action]) -> list[str]:
    """Put -- before a command of several words, so that none of them is taken for an option."""
    start = count_options(words, options)
    first, *rest = words[start:] or [""]
    if not rest or first[:1] == "-" or re.match(JSON_START, first):
        return words
    if count_options(rest, options) == len(rest) or (" " in first and rest[0][:1] == "-"):
        return words  # one word or a shell line, whose options may follow it
    return [*words[:start], "--", *words[start:]]


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of a command; only the parsers on the way to it are built."""
    import argparse

    args = argparse.Namespace(rest=words)
    name = ""
    while name not in COMMANDS:
        parser = menu_parser(name)
        word, *args.rest = parser.parse_args(args.rest, args).rest
        if word not in menu(name):
            parser.error(f"there is no command {quoted(word)}{command_hint(name, word)}")
        name = f"{name} {word}".strip()
    args.chosen = COMMANDS[name]
    parser = command_parser(name, args.chosen)
    if args.chosen.act is cmd_enqueue:
        args.each = None
        if ":::" in args.rest:
            at = args.rest.index(":::")
            args.rest, args.each = args.rest[:at], args.rest[at + 1 :]
        args.rest = mark_command(args.rest, parser._option_string_actions)
    is_list = any(options.get("nargs") == "*" for _, options in args.chosen.arguments)
    (parser.parse_intermixed_args if is_list else parser.parse_args)(args.rest, args)
    if not args.db:
        parser.error("--db must not be empty")
    return args


def cmd_help(args: argparse.Namespace) -> None:
    parse([*args.words, "--help"])


COMMANDS["help"] = Command(
    cmd_help, "none", "describe a command", "help enqueue", (arg("words", "COMMAND", nargs="*"),)
)


def execute(args: argparse.Namespace) -> int:
    act, access = args.chosen.act, args.chosen.access
    if access == "none":
        return act(args) or Exit.OK
    mode = {"readonly": access == "read", "create": access == "create"}
    with Queue(args.db, **mode, insecure=args.insecure) as queue:
        return act(args, queue) or Exit.OK


def discard_output() -> None:
    """Let the flush at exit succeed where stdout or stderr is closed or full."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, AttributeError, ValueError):
            with contextlib.suppress(OSError), open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), number)


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code, or -n where signal n ended it. All errors end here."""
    if not sys.stdout:  # it was closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # any name of a job can be printed
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if sys.platform == "win32":
            SYSTEM.enable_escapes()
        code: int = Exit.OK
        with contextlib.suppress(SystemExit):  # --help and --version
            code = execute(parse((sys.argv[1:] if argv is None else argv) or ["--help"]))
        sys.stdout.flush()
        return code
    except QueueError as error:
        say(str(error))
        return error.code
    except BrokenPipeError:
        discard_output()
        return -getattr(signal, "SIGPIPE", 13)
    except (OSError, sqlite3.Error, ImportError) as error:  # the machine is at fault
        discard_output()
        where = getattr(error, "filename", None)
        reason = getattr(error, "strerror", None) or error
        say(f"{where}: {reason}" if where else str(reason))
        return Exit.FAULT
    except KeyboardInterrupt:  # the shell begins a new line for its prompt
        return -signal.SIGINT
    finally:
        SCREEN.clear()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, 128+n where signal n ended it."""
    return shell_code(run(argv))


def main_program() -> NoReturn:
    """Run the command of this process; end by its signal, so that Ctrl-C stops a shell loop too."""
    try:
        with interrupts_raised():
            code = run()
    except KeyboardInterrupt:
        code = -signal.SIGINT
    discard_output()
    if code < 0:
        end_by_signal(-code)
    sys.exit(shell_code(code))


if __name__ == "__main__":
    main_program()
