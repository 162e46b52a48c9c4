"""File a training run, compute what can be known about it, draw it, and keep the books of a night of experiments.

    uv run analyze.py [--wait]           after `uv run train.py > run.log 2>&1`, finished or crashed (or wait for that)
    uv run analyze.py keep [RUN]         the run of this folder (or RUN) is kept
    uv run analyze.py discard [RUN]      it is not; the best run's train.py is restored and committed
    uv run analyze.py status             where the search stands, and what to do next, on one page
    uv run analyze.py compare RUN RUN …  archived runs side by side
    uv run analyze.py check              before a run: is this train.py new, and in order? Exit status 0 or 1
    uv run analyze.py start [TAG]        a branch for the night and the agent's two files
    uv run analyze.py rerun              the best run's train.py, and the command that trains it under another seed
    uv run analyze.py stop               end the run in progress here; it is filed as stopped, with its metrics
    uv run analyze.py new-archive        put the archive aside: for other data, another budget or another prepare.py

Reads, in the current folder: run_start.json, run.log, metrics.jsonl, eval_record.json, run_summary.json.
Writes the archive, .auto-log-research/ or $AUTO_LOG_RESEARCH_DIR (the demo's is demo/ in there): a folder for each run,
results.tsv, archive.json (what the archive began with); for the morning report.md, progress.png and best.patch
(baseline to best).

The folders are the truth: a run is whatever has one. results.tsv gives each its status and description, and may be
edited; a row that is removed or damaged comes back (to leave a run out, write `invalid` as its status).
Of the files in a run's folder, stats.json and the pages can be deleted: the next call makes them again. The agent's own
investigations start with

    from analyze import load_run, load_runs
    load_run("1a2b3c4").metrics          # a pandas DataFrame, one row a step
    load_runs()                          # one row a run; a crash has NaN for every number it does not have

An archive scores no runs once what prepare.py measures has changed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, reduce
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # imported where they are used: pandas takes 0.4 s and matplotlib 0.7 s, which `status` needs not pay
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

START, LOG, METRICS = "run_start.json", "run.log", "metrics.jsonl"
EVAL, SUMMARY = "eval_record.json", "run_summary.json"
OUTPUTS = (START, LOG, METRICS, EVAL, SUMMARY)
RESULTS, FACTS = "results.tsv", "archive.json"
INSIGHTS, QUEUE = "insights.md", "ideas_queue.md"
STATS, ANALYSIS = "stats.json", "analysis.md"
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
STATUSES = ("pending", "keep", "discard", "crash", "invalid")
NOTES_HEADING = "## Agent Investigation Notes"
PAGE_LINES, PAGE_BYTES = 60, 5000
# Raise it where a record's keys or hashes come to mean something else: records of another format are made anew.
# Python 3.10 prints the programs that are hashed otherwise than its successors.
RECORD_FORMAT = "2" + " of Python 3.10" * (sys.version_info < (3, 11))

# Public logs of this experiment on H100 and H200 show 0.0005 to 0.0014 bpb between seeds in runs of
# five minutes. It counts as two degrees of freedom.
PRIOR_SIGMA = 0.001
PRIOR_WEIGHT = 2
# In standard errors of the difference to the best; tests/bench_nights.py found these to gain most.
KEEP_ERRORS, KEEP_ERRORS_WITH_CODE, GAIN_ERRORS = 0.5, 1.0, 2.0
RERUN_EVERY = 15  # runs, after which the best is run again: the lowest of many noisy scores reads too low
DWARFING = 0.12  # of the budget: what pictures leave off the scale, because it would flatten the rest

LOG_BYTES = 2**20  # of a log that are read and archived; a real one has 50 KB
STATUS_LINES = 60
DISK_GB = 2.0  # a checkpoint and what the compiler caches take less

# What a summary holds besides the configuration and what ends in a unit: results, and what the run is.
RESULT_KEYS = {
    *("val_bpb", "num_steps", "mfu_percent", "total_tokens_M", "run_id", "git_commit", "git_dirty", "train_sha256"),
    *("prepare_sha256", "measurement_sha256", "data_fingerprint", "eval_tokens", "seed", "seed_offset", "profile"),
    "pauses_over",
}
MACHINE_KEYS = ("gpu_name", "torch_version", *(KERNEL_KEYS := ("attention_backend", "kernels")))
# What all runs of an archive share: how it is called, and how to get back to it.
COMPARABLE = {
    "measurement_sha256": ("what prepare.py measures", "undo the change of prepare.py (`git log -p prepare.py`)"),
    "data_fingerprint": ("the data", "point AUTORESEARCH_CACHE at the data of before"),
    "time_budget": ("the time budget", "train for the budget of before"),
    "eval_tokens": ("the number of tokens scored", "call evaluate_bpb as before"),
    "demo": ("AUTORESEARCH_DEMO", "set it as before"),
}
# Fields used as they are. One of another type is damage: named, and taken for missing. Numbers go through number().
FIELD_TYPES = {
    **dict.fromkeys(("run_id", "git_commit", "train_py", "measurement_sha256", "data_fingerprint", "ended"), str),
    **dict.fromkeys(("host", "finding", "folder", "description", "crash", "stopped", *MACHINE_KEYS), str),
    **dict.fromkeys(("demo", "git_dirty", "causal"), bool),
    **dict.fromkeys(("started_unix", "ended_unix"), int | float),
    **dict.fromkeys(("modules", "config", "pace", "record", "verdict", "changes"), dict),
    **dict.fromkeys(("faults", "invalid", "hampered", "damage"), list),
}

# Failures of the machine or its set-up: reported, and not filed as an experiment.
ENVIRONMENT_SIGNS = re.compile(
    r"No space left on device|Disk quota exceeded|Read-only file system|unexpected pos \d+ vs \d+"
    r"|No CUDA GPUs are available|CUDA driver version is insufficient|NVIDIA driver on your system is too old"
    r"|Found no NVIDIA driver|Torch not compiled with CUDA|no CUDA-capable device|CUDA-capable device\(s\) is/are busy"
    r"|Driver/library version mismatch|uncorrectable ECC error|no kernel image is available"
    r"|Failed to find C compiler|Python\.h: No such file|Too many open files|Unable to load any of \{?libcudnn"
    r"|lib(?:cudnn|cublas|cudart|nvrtc|nccl)\S*: cannot open shared object"
    r"|Permission denied: '[^']*(?:torchinductor|triton|\.cache)|uv: (?:command )?not found"
    r"|No module named '(?:torch|numpy|pyarrow|tiktoken|rustbpe|requests|prepare)'"
)
LAUNCH = r"unspecified launch failure|illegal memory access|CUDA_ERROR_LAUNCH_FAILED|CUBLAS_STATUS_\w+"
# Known causes of a crash, as its reason shows them, with what usually helps.
CRASH_CAUSES = (
    ("out of memory", r"out of (?:GPU )?memory|OutOfMemoryError",
     "halve device_batch_size (gradient accumulation keeps the total batch), or shrink what grew"),
    ("not a number, or the loss exploded", r"\bnan\b|not finite|non-finite|loss above",
     "lower the learning rate that changed, or look for a division, log or square root near zero"),
    ("a failed launch on the GPU: the machine's fault or the program's", LAUNCH,
     "train the same commit once more; if it fails again it is the program's"),
)
YES = ("1", "true", "yes", "on")
# The commands that pages name.
DEMO_PREFIX = "AUTORESEARCH_DEMO=1 " * (os.environ.get("AUTORESEARCH_DEMO", "").lower() in YES)
FILE, TRAIN = f"{DEMO_PREFIX}uv run analyze.py", "uv run train.py > run.log 2>&1"
WAIT, RERUN = f"{FILE} --wait", f"{FILE} rerun"
TRAIN_BESIDE = f"{DEMO_PREFIX}setsid timeout --kill-after=10 600 {TRAIN} &"  # as step 2 of program.md has it
AGAIN = "train the same commit again"
KILLED = "killed from outside, or out of time"
KILLED_HELP = "the idea was not tested: train the same commit again; see whether the machine's own memory ran out"
# Escape sequences, control characters, marks that reverse the text.
UNPRINTABLE = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b\[[0-?]*[ -/]*[@-~]?|\x1b.?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)


# ---------------------------------------------------------------------------------------------------------------------
# Small helpers
# ---------------------------------------------------------------------------------------------------------------------


def is_demo() -> bool:
    return os.environ.get("AUTORESEARCH_DEMO", "").lower() in YES


def archive_dir(demo: bool | None = None) -> Path:
    """The archive, or the demo's own inside it (by default as AUTORESEARCH_DEMO says)."""
    archive = Path(os.environ.get("AUTO_LOG_RESEARCH_DIR") or ".auto-log-research").expanduser()
    return archive / "demo" if (is_demo() if demo is None else demo) else archive


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write the whole file or nothing: neither a reader nor a power cut sees half of it."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with open(temporary, "wb") as f:
        f.write(data if isinstance(data, bytes) else data.encode("utf-8", "surrogateescape"))
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: object) -> None:
    write_atomic(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def plain(value: object) -> object:
    """The value in types JSON has; NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_text(path: Path | None, most: int | None = None) -> str | None:
    """The file's text, of more than `most` bytes both ends, None where there is none. Bytes that
    are no UTF-8 survive being written back."""
    if path is None:
        return None
    try:
        with open(path, "rb") as f:
            data = f.read(most)
            if most and f.read(1):
                f.seek(-most // 2, os.SEEK_END)
                data = data[: most // 4] + b"\n[the middle is left out]\n" + f.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return data.decode("utf-8", "surrogateescape")


def read_log(path: Path | None) -> str | None:
    """A log as a page may show it; of one that is far longer than the usual 50 KB, the ends."""
    text = read_text(path, LOG_BYTES)
    return None if text is None else printable(text)


def read_json(path: Path | None, damage: list[str] | None = None) -> dict:
    """A JSON object, empty where there is none. What cannot be read, or is not of its FIELD_TYPES,
    is left out and added to `damage`."""
    damage, text = [] if damage is None else damage, read_text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        damage.append(f"{path} is no valid JSON object")
        return {}
    drop_misfits(value, path, damage)
    return value


def drop_misfits(value: dict, path: Path, damage: list[str]) -> None:
    """Take out fields that are not of their FIELD_TYPES; a record's own too."""
    for key in [key for key in value if key in FIELD_TYPES]:
        if value[key] is not None and not isinstance(value[key], FIELD_TYPES[key]):
            damage.append(f"{path.name}: {key} is {clip(repr(value.pop(key)), 40)}, taken for missing")
    if value.get("record"):
        drop_misfits(value["record"], path, damage)


def printable(text: str) -> str:
    """The text as a terminal or a page may have it; a `?` stands for a byte that was no UTF-8."""
    text = text.encode("utf-8", "replace").decode()
    return UNPRINTABLE.sub("", re.sub(r"\r\n?", "\n", text))


def one_line(text: str) -> str:
    return " ".join(printable(text).split())


def clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def normal(text: str | None) -> str | None:
    """A program's text without what git may change: line ends, a byte order mark."""
    return None if text is None else text.removeprefix("\ufeff").replace("\r\n", "\n")


def sha256(data: str) -> str:
    return hashlib.sha256(data.encode("utf-8", "surrogateescape")).hexdigest()


def number(value: object) -> float | None:
    """The value as a finite float, None for anything else (a bool is no number)."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of some hundred digits
        return None


def numbers(values: Iterable) -> np.ndarray:
    """The values as floats, NaN for anything else."""
    return np.array([math.nan if (v := number(value)) is None else v for value in values], dtype=float)


def show(value: float | None, form: str = ".6f", unit: str = "") -> str:
    return "unknown" if value is None or not math.isfinite(value) else f"{value:{form}}{unit}"


def first_free(name: str, is_taken: Callable[[str], bool], mark: str = "-") -> str:
    """The name, or with the lowest number behind it that is not taken."""
    names = itertools.chain([name], (f"{name}{mark}{i}" for i in itertools.count(2)))
    return next(n for n in names if not is_taken(n))


def git(folder: Path, *arguments: str, is_needed: bool = False) -> str | None:
    """What git printed, without hooks, prompts, colors and signatures, and in English. None where
    it failed; if `is_needed`, ValueError with its reason, but where there is no repository."""
    quiet = {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0", "GIT_EDITOR": "true", "LC_ALL": "C"}
    options = ["-c", "core.hooksPath=/dev/null", "-c", "log.showSignature=false", "-c", "color.ui=false"]
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(folder), *options, *arguments]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, env=os.environ | quiet)
    said = one_line((done.stderr + done.stdout).decode(errors="replace"))
    if done.returncode == 0:
        return done.stdout.decode("utf-8", "surrogateescape")
    if is_needed and "not a git repository" not in said:
        raise ValueError(f"git: {clip(said, 300)}")
    return None


def is_running(folder: Path) -> bool:
    """Whether a run is under way there: it holds a lock on its metrics for its whole life, and the
    kernel lets go however it dies. Asking takes the lock for an instant."""
    try:
        with open(folder / METRICS, "rb") as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (FileNotFoundError, NotADirectoryError):
        pass
    return False


@contextlib.contextmanager
def locked(archive: Path) -> Iterator[None]:
    """Hold the archive alone. Who holds it meanwhile is named, and waited for."""
    archive.mkdir(parents=True, exist_ok=True)
    with open(archive / ".lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for {archive}, held by {one_line(read_text(archive / '.lock'))}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        print(f"process {os.getpid()} on {os.uname().nodename}: {sys.argv[1:]}", file=lock, flush=True)
        # Of a process that was killed; only this lock's holder writes programs into the working folder.
        for path in [*archive.glob(".tmp-*"), *archive.glob("*/.tmp-*"), *Path().glob(".tmp-*.py")]:
            if path.parent.name not in ("unfiled", "demo"):  # where others write without this lock
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        if not (archive / ".gitignore").exists():
            write_atomic(archive / ".gitignore", "*\n")
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Load: one run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one run left. A run that crashed has an empty summary and no evaluation; one that died
    before it could begin has no `start`. `damage` names what could not be read; `files` are those
    of its folder that are its own."""

    name: str
    path: Path
    start: dict = field(repr=False)
    summary: dict = field(repr=False)
    evaluation: dict | None = field(repr=False)
    records: list[dict] = field(repr=False)
    log: str | None = field(repr=False)
    train_py: str | None = field(repr=False)
    damage: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row a step, columns as in metrics.jsonl (`train/loss`, `perf/step_time_ms`, …)."""
        import pandas as pd

        return pd.DataFrame.from_records(self.records)

    @property
    def step_ms(self) -> float | None:
        """Median step time."""
        steps_ms = self.series("perf/step_time_ms")
        return float(np.nanmedian(steps_ms)) if np.isfinite(steps_ms).any() else None

    @cached_property
    def curve(self) -> Curve | None:
        """Its loss by tokens, taken once for all that need it."""
        return compute_curve(self)

    @cached_property
    def looks(self) -> list[dict[tuple[str, str], float]]:
        """What was seen of its layers and parameters, one a step that looked, taken once as well."""
        return [look for record in self.records if (look := look_at(record))]

    def series(self, key: str) -> np.ndarray:
        """One metric over the steps, float, NaN where a step lacks it."""
        return numbers(r.get(key) for r in self.records)

    def first_of(self, key: str) -> object:
        """A field from the evaluation, the summary or the start, in that order, None in none."""
        found = (part.get(key) for part in (self.evaluation or {}, self.summary, self.start))
        return next((value for value in found if value is not None), None)

    @property
    def run_id(self) -> str | None:
        return self.start.get("run_id") or self.summary.get("run_id") or log_run_id(self.log)

    @cached_property
    def identity(self) -> str:
        """Its id, or where it has none, the contents that it left and when."""
        if self.run_id:
            return f"run:{self.run_id}"
        written_ns = [path.stat().st_mtime_ns for path in self.files if path.name == LOG]
        return "contents:" + sha256(json.dumps([self.summary, self.records[-1:], self.log, written_ns]))[:16]


def parse_metrics(text: str) -> tuple[list[dict], list[str]]:
    """The records of a metrics.jsonl, and the damage; a last line cut short by a kill is none."""
    records, bad = [], []
    lines = text.split("\n")
    for i, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif line.strip() and i < len(lines):
            bad.append(str(i))
    return records, [f"{METRICS}: {len(bad)} damaged line(s) left out (line {clip(', '.join(bad), 40)})"] * bool(bad)


def parse_closing_block(log: str | None) -> dict:
    """The closing `key: value` block of a finished run, empty if there is none."""
    values: dict = {}
    for key, value in re.findall(r"^(\w+):\s+(\S+)\s*$", (log or "").rpartition("\n---\n")[2], re.M):
        is_number = re.fullmatch(r"-?\d{1,15}(\.\d+)?", value)
        values[key] = float(value) if is_number else value
    return values if number(values.get("val_bpb")) is not None else {}


def log_run_id(log: str | None) -> str | None:
    """The run a log says it is of: every program that loads the data prints `run <id>`."""
    found = re.search(r"^run (\S+)\s*$", log or "", re.M)
    return found[1] if found else None


def load_folder(
    folder: Path, name: str = "", files: Iterable[str] = (*OUTPUTS, "train.py"), damage: Iterable[str] = ()
) -> Run:
    """The run whose files lie in `folder`, of which only `files` are its own."""
    damage = [*damage]
    own = {file: folder / file for file in files if (folder / file).exists()}
    start, summary, evaluation = (read_json(own.get(file), damage) for file in (START, SUMMARY, EVAL))
    run_id, scored_id = start.get("run_id"), evaluation.get("run_id")
    if run_id is not None and scored_id is not None and run_id != scored_id:
        damage.append(f"{EVAL} is of run {scored_id}, not of {run_id}: left out")
        evaluation = {}
        del own[EVAL]
    log = read_log(own.get(LOG))
    if not summary and (summary := parse_closing_block(log)):  # a program that writes none, or one that was lost
        damage.append(f"{SUMMARY} is missing: the closing block of {LOG} stands in")
    if not summary and log is None and number(evaluation.get("val_bpb")):
        summary = {"val_bpb": evaluation["val_bpb"]}  # the next start has taken the log, which had the rest
        damage.append(f"{SUMMARY} is missing: {EVAL} stands in")
    records, bad_lines = parse_metrics(read_text(own.get(METRICS)) or "")
    train_py = start.get("train_py") or read_text(own.get("train.py"))
    remarks = (*damage, *bad_lines)
    return Run(name, folder, start, summary, evaluation or None, records, log, train_py, remarks, (*own.values(),))


def load_run(name: str, archive: Path | None = None) -> Run:
    """An archived run by its name in results.tsv, or the beginning of it where one run has it."""
    archive = archive or archive_dir()
    name = resolve_name(name, [path.name for path in run_folders(archive)])
    return load_folder(archive / name, name)


def resolve_name(wanted: str, names: list[str]) -> str:
    if re.fullmatch("[0-9a-f]{8,40}", wanted):  # a whole commit
        wanted = wanted[:7]
    fits = [wanted] if wanted in names else [name for name in names if name.startswith(wanted)]
    if len(fits) != 1:
        listed = ", ".join(fits[:6]) or f"{RESULTS} lists all"
        raise ValueError(f"{wanted!r} is the name of {len(fits)} archived runs ({listed}): name one in full")
    return fits[0]


def run_folders(archive: Path) -> list[Path]:
    """The folders of filed runs, by name."""
    marks = (STATS, START, SUMMARY)
    folders = sorted(archive.glob("[!.]*/"))
    return [folder for folder in folders if any((folder / mark).exists() for mark in marks)]


# ---------------------------------------------------------------------------------------------------------------------
# Load: the books
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A run in the books: its row of results.tsv, whose status and description hold, so that they
    can be edited, and its record, whose score counts whatever the row says. `stats`: all that its
    analysis computed. `cell`: the description byte for byte as the row has it."""

    name: str
    status: str
    description: str
    record: dict = field(repr=False)
    stats: dict = field(repr=False, default_factory=dict)
    cell: str = ""

    @property
    def val_bpb(self) -> float | None:
        """The score; None for a crash, whatever its row says."""
        return None if self.status == "crash" else number(self.record.get("val_bpb"))

    @property
    def is_valid(self) -> bool:
        """Whether the score may be compared."""
        flaws = self.record.get("invalid") or self.record.get("hampered") or self.status in ("crash", "invalid")
        return self.val_bpb is not None and not flaws

    @property
    def is_untested(self) -> bool:
        """Whether the run says nothing about its program: killed, or hampered by the machine."""
        return bool(self.record.get("was_killed") or self.record.get("hampered"))

    @cached_property
    def group(self) -> tuple:
        """Equal for replicates: the same program and resolved configuration but for the seed, on
        the same data and GPU. Comments and formatting do not count."""
        r = self.record
        if r.get("program") is None:
            return (self.name,)
        same = ("program", "config_sha256", "data_fingerprint", "time_budget", "gpu_name", "eval_tokens")
        return tuple(r.get(key) for key in same)


@dataclass(frozen=True)
class Book:
    entries: list[Entry]  # in the order of their rows
    problems: list[str]
    facts: dict = field(default_factory=dict)  # what the archive began with: of its first valid run

    def entry(self, name: str) -> Entry:
        return next(e for e in self.entries if e.name == name)

    def find(self, run: Run) -> Entry | None:
        """The entry under which this run is filed."""
        return next((e for e in self.entries if e.record["identity"] == run.identity), None)


def started_unix(record: dict) -> float:
    return number(record.get("started_unix")) or 0.0


@cache
def read_stats(path: Path, written_ns: int) -> dict:
    """Each version of a file is parsed once a call, in which the books are read several times."""
    return read_json(path)


def load_entries(archive: Path, facts: dict) -> dict[str, Entry]:
    """Every run with a folder, by name, as it is without a row. A lost record is worked out again;
    in one of another format only the program is hashed anew."""
    found = {}
    for folder in run_folders(archive):
        path = folder / STATS
        stats = read_stats(path, path.stat().st_mtime_ns) if path.exists() else {}
        record = stats.get("record")
        if not isinstance(record, dict) or not isinstance(record.get("identity"), str):
            stats, run = {}, load_folder(folder, folder.name)
            record = compute_record(run, facts, Origin(folder.name))
        elif record.get("format") != RECORD_FORMAT:
            run = load_folder(folder, files=[START, "train.py"])
            program = program_hash(run.train_py, modules=run.start.get("modules")) or record.get("program")
            record = record | {"format": RECORD_FORMAT, "program": program}
        description = record.get("description") or ""
        found[folder.name] = Entry(folder.name, filing_status(record), description, record, stats)
    for e in list(found.values()):
        verdict = e.stats.get("verdict") or {}
        if verdict.get("kind") == "unchanged" and verdict.get("best") in found:
            program = found[verdict["best"]].record["program"]
            found[e.name] = replace(e, record=e.record | {"program": program})
    return found


def read_rows(archive: Path, runs: dict[str, Entry], problems: list[str]) -> dict[str, Entry]:
    """The runs that have a row of results.tsv, as it says. A line that is none is named."""
    found: dict[str, Entry] = {}
    for i, line in enumerate((read_text(archive / RESULTS) or "").splitlines(), 1):
        name, *cells = [cell.strip() for cell in line.split("\t", 4)]
        if name.strip("\0") in ("", "commit"):
            continue
        if fault := row_fault(name, cells, runs, found):
            problems.append(f"{RESULTS} line {i}: {clip(fault, 100)}: not counted")
            continue
        e = replace(runs[name], status=cells[2], description=one_line(cells[3]), cell=cells[3])
        if e.val_bpb is not None and cells[0] != f"{e.val_bpb:.6f}":
            problems.append(f"{RESULTS} line {i}: {cells[0]} is not what {name} scored: {e.val_bpb:.6f} counts")
        found[name] = e
    return found


def row_fault(name: str, cells: list[str], runs: dict[str, Entry], found: dict[str, Entry]) -> str | None:
    """Why a line is not the one row of an archived run."""
    if len(cells) < 4:
        return f"{1 + len(cells)} columns where five are due"
    if name not in runs:
        return f"no archived run {name}"
    if name in found:
        return f"a second row of {name}"
    return None if cells[2] in STATUSES else f"a status that is none of {', '.join(STATUSES)}"


def load_book(archive: Path) -> Book:
    """Folders and rows joined. Of copies of a folder one counts, one with a row first. A run
    without a row gets one, before those that started later."""
    problems: list[str] = []
    facts = read_json(archive / FACTS, problems)
    runs = load_entries(archive, facts)
    rows = read_rows(archive, runs, problems)
    names: dict[str, str] = {}
    for name in sorted(runs, key=lambda name: (name not in rows, runs[name].record.get("name", name) != name)):
        first = names.setdefault(runs[name].record["identity"], name)
        if first != name:
            problems.append(f"{name} is a copy of {first}: left out")
    counted = set(names.values())
    entries = [e for e in rows.values() if e.name in counted]
    missing = [runs[name] for name in counted - rows.keys()]
    for new in sorted(missing, key=lambda e: started_unix(e.record)):
        later = [i for i, e in enumerate(entries) if started_unix(e.record) > started_unix(new.record)]
        entries.insert(min(later, default=len(entries)), new)
        problems.append(f"{new.name} had no row in {RESULTS}: added, as {new.status}")
    return Book(entries, problems, facts)


def format_row(e: Entry) -> str:
    """A line as upstream writes it: a crash has zeros. A number that is not known is `nan`."""
    val, memory = numbers([e.record.get("val_bpb"), e.record.get("memory_gb")])
    if e.status == "crash":
        val = memory = 0.0
    return f"{e.name}\t{val:.6f}\t{memory:.1f}\t{e.status}\t{e.cell or e.description}\n"


def save_table(archive: Path, entries: list[Entry]) -> None:
    text = HEADER + "\n" + "".join(format_row(e) for e in entries)
    if entries and text != read_text(archive / RESULTS):
        write_atomic(archive / RESULTS, text)


def load_runs(archive: Path | None = None) -> pd.DataFrame:
    """All runs in the order of results.tsv: its five columns, facts of the run, its configuration.
    Numbers that a run does not have (the score of a crash, say) are NaN."""
    import pandas as pd

    columns, rows = [*HEADER.split("\t"), "is_valid"], []
    for e in load_book(archive or archive_dir()).entries:
        cells = [e.name, e.val_bpb, e.record.get("memory_gb"), e.status, e.description, e.is_valid]
        row = dict(zip(columns, cells, strict=True))
        facts = {k: v for k, v in e.record.items() if not isinstance(v, dict | list)}
        rows.append(row | e.record.get("config", {}) | facts | row)
    frame = pd.DataFrame(rows, columns=None if rows else columns)
    return frame.astype({column: float for column in frame if frame[column].isna().all()})


# ---------------------------------------------------------------------------------------------------------------------
# Compute: which program a run is
# ---------------------------------------------------------------------------------------------------------------------

SEEDING = ("manual_seed", "manual_seed_all", "seed", "seed_all", "default_rng", "RandomState", "set_seed", "PRNGKey")


class _WithoutSeed(ast.NodeTransformer):
    """Drops the seed in whatever form it is given: assigned or passed to a name that is called
    seed, an argument of a function that takes one, added to one."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        node.keywords = [k for k in node.keywords if not is_seed(k.arg)]
        if name_of(node.func) in SEEDING:
            node.args = []
        did_nothing_else = name_of(node.func) == "replace" and len(node.args) == 1 and not node.keywords
        return node.args[0] if did_nothing_else else node

    def visit_Assign(self, node: ast.Assign | ast.AnnAssign) -> ast.AST | None:
        self.generic_visit(node)
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if node.value and any(is_seed(name_of(target)) for target in targets):
            return ast.Assign(targets, ast.Constant(0), lineno=0)
        # CONFIG = replace(CONFIG, seed=7) does nothing else
        return None if node.value and ast.unparse(node.value) == ast.unparse(targets[0]) else node

    visit_AnnAssign = visit_Assign

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST | None:
        return None if is_seed(name_of(node.target)) else self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        return node.left if isinstance(node.right, ast.Constant) and is_seed(name_of(node.left)) else node


@cache
def functional(source: str) -> str:
    """The program's text without comments, formatting, docstrings and seed."""
    try:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                has_docstring = ast.get_docstring(node, clean=False) is not None
                node.body = node.body[has_docstring:] or [ast.Pass()]
        return ast.unparse(_WithoutSeed().visit(tree)).replace("'", '"')  # in f-strings, 3.12 has others than 3.11
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "not a program\n" + source


def name_of(node: ast.AST) -> str:
    """The last part of a name: `seed` of `seed`, `config.seed` and `config["seed"]`."""
    key = getattr(getattr(node, "slice", None), "value", None)
    return getattr(node, "id", getattr(node, "attr", key if isinstance(key, str) else ""))


def is_seed(name: str | None) -> bool:
    return name is not None and (name.lower() == "seed" or name.lower().endswith("_seed"))


def program_hash(text: str | None, modules: dict | None = None) -> str | None:
    """Equal for programs that do the same: comments, formatting, docstrings and the seed do not
    count. `modules` are the files beside the program that it imports, by name."""
    if text is None:
        return None
    files = [("", text), *sorted((modules or {}).items())]
    return sha256("\n".join(name + sha256(functional(normal(str(source)))) for name, source in files))[:16]


def configuration(summary: dict) -> dict:
    """The resolved configuration: all but results, which are known by name or by their unit."""
    others = RESULT_KEYS.union(MACHINE_KEYS)
    return {k: v for k, v in summary.items() if k not in others and not k.endswith(("_seconds", "_ms", "_mb"))}


def static_config(text: str) -> dict:
    """The configuration as it can be read without running the program: the constants of the class
    Config, and those that are passed to it."""
    defaults, passed = [], []
    for node in ast.walk(ast.parse(normal(text))):
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            parts = [part for part in node.body if isinstance(part, ast.AnnAssign) and part.value]
            defaults += [(name_of(part.target), part.value) for part in parts]
        elif isinstance(node, ast.Call) and name_of(node.func) in ("Config", "replace"):
            passed += [(k.arg, k.value) for k in node.keywords]
    known, values = {"__builtins__": {}, "DEMO": is_demo()}, {}
    for name, value in defaults + passed:
        if is_literal(value):
            values[name] = eval(ast.unparse(value), known)
    return json.loads(json.dumps(values))  # as a summary has them


def is_literal(node: ast.AST) -> bool:
    """Whether an expression is made of numbers and texts alone, like 2**19, or 4 if DEMO else 8."""
    operators = ast.BinOp | ast.UnaryOp | ast.operator | ast.unaryop | ast.IfExp
    allowed = ast.Constant | ast.Tuple | ast.List | ast.expr_context | operators
    return all(isinstance(part, allowed) or name_of(part) == "DEMO" for part in ast.walk(node))


# ---------------------------------------------------------------------------------------------------------------------
# Compute: a run's record, and whether its score counts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Which commit a run was trained from, as far as can be known."""

    name: str  # of its folder, without the number of a replicate
    commit: str | None = None
    train_py: str | None = None
    description: str = ""
    parent_py: str | None = None  # train.py of the commit before


def compute_comparable(run: Run) -> dict:
    """What must be the same in all runs of an archive, None where the run does not say."""
    values = {key: run.first_of(key) for key in COMPARABLE}
    values["time_budget"] = number(values["time_budget"])
    values["eval_tokens"] = number(values["eval_tokens"]) or number((run.evaluation or {}).get("tokens"))
    return values


def compute_invalid(run: Run, facts: dict) -> list[str]:
    """Why a finished run's score must not be compared, each reason with what can be done."""
    reasons = []
    val = number(run.summary.get("val_bpb"))
    if val is None or val <= 0:
        reasons.append(f"val_bpb is {val}: the loss of `reduction=\"none\"` is no cross-entropy")
    if run.evaluation is None:
        reasons.append(f"no readable {EVAL}: the score did not come from evaluate_bpb; call it, once, at the end")
    else:
        reasons += compute_evaluation_faults(run.evaluation, val)
    for key, mine in compute_comparable(run).items():
        began, (what, remedy) = facts.get(key), COMPARABLE[key]
        if None not in (mine, began) and mine != began:
            pair = ", was ".join(str(value)[:16] for value in (mine, began))
            reasons.append(f"{what} is not what this archive began with ({pair}): {remedy}, or begin a new archive "
                           f"(`{FILE} new-archive`)")
    return reasons + compute_clock_faults(run)


def compute_clock_faults(run: Run) -> list[str]:
    """The last step may run over the budget by its own length, which is a thousandth of it and on a
    slow CPU a twentieth; a step of more than a fifth of the budget trains longer than others
    may."""
    budget_s, clocked_s = number(run.summary.get("time_budget")), number(run.summary.get("training_seconds"))
    if not budget_s or clocked_s is None:
        return []
    steps_s = run.series("perf/step_time_ms")[-20:] / 1e3
    step_s = float(np.nanmax(steps_s)) if np.isfinite(steps_s).any() else 0.01 * budget_s
    over_s = clocked_s - budget_s
    if abs(over_s) > step_s + 0.1:  # summaries round to a tenth of a second
        return [f"trained {clocked_s:.1f} s on a budget of {budget_s:.1f} s, off by more than a step: end on the clock"]
    tokens, usual_s = np.diff(compute_tokens(run)), (run.step_ms or math.inf) / 1e3
    is_stall = len(tokens) > 1 and tokens[-1] == tokens[-2] and steps_s[-1] > 2 * usual_s
    if over_s > 0.2 * budget_s and not is_stall:  # a stall is the machine's doing
        return [f"the last step ran {over_s:.1f} s past a budget of {budget_s:.1f} s: make steps shorter"]
    return []


def compute_evaluation_faults(record: dict, val_bpb: float | None) -> list[str]:
    """What evaluate_bpb found at fault, and what does not fit together."""
    faults = [one_line(str(fault)) for fault in record.get("faults") or []]
    said, scored, nats, num_bytes = numbers([val_bpb, *(record.get(k) for k in ("val_bpb", "nats", "bytes"))])
    if not abs(said - scored) <= 2e-6:  # both are rounded to six decimals
        faults.append(f"the summary says val_bpb {show(said)}, the evaluation record {show(scored)}: train it again")
    given = nats / (math.log(2) * num_bytes)
    if abs(given - scored) > 2e-6:
        faults.append(f"the evaluation record's nats and bytes give {given:.6f}: leave {EVAL} to evaluate_bpb")
    finding = f" ({record['finding']})" if record.get("finding") else ""
    if not record.get("faults") and record.get("causal") is None:
        faults.append(f"whether the model looks ahead could not be tested{finding}: make it repeatable in evaluation")
    elif not record.get("faults") and not record["causal"]:
        faults.append(f"the causality test failed: predictions depend on later tokens{finding}; look for what mixes "
                      "positions: attention without its mask, a shift, a norm over the sequence")
    if (number(record.get("num_calls")) or 0) > 1:
        faults.append(f"evaluation was called {record['num_calls']} times: call it once, at the end")
    return faults


def compute_record(run: Run, facts: dict, origin: Origin) -> dict:
    """What the books keep of a run: identity, program, configuration and what history needs."""
    s, config = run.summary, configuration(run.summary)
    modules = run.start.get("modules") or {}
    started, elapsed_s = run_start_unix(run), number(s.get("total_seconds")) or compute_elapsed(run)
    return {
        "format": RECORD_FORMAT,
        "identity": run.identity,
        "name": run.name,
        "folder": str(run.path),
        "description": origin.description,
        "git_commit": origin.commit or run.first_of("git_commit"),
        "built_on": sha256(normal(origin.parent_py)) if origin.parent_py else None,
        "started_unix": started,
        "ended_unix": started + elapsed_s if started and elapsed_s else None,
        **compute_ending(run),
        "invalid": compute_invalid(run, facts) if s else [],
        "val_bpb": number(s.get("val_bpb")),
        "memory_gb": None if (peak_mb := number(s.get("peak_vram_mb"))) is None else peak_mb / 1024,
        "train_sha256": sha256(normal(run.train_py)) if run.train_py else None,
        "modules": {name: sha256(normal(str(text))) for name, text in modules.items()},
        "program": program_hash(run.train_py, modules),
        "seed": s.get("seed") if number(s.get("seed")) is not None else None,
        "seed_offset": number(run.first_of("seed_offset")),
        **compute_comparable(run),
        **{key: s.get(key) for key in MACHINE_KEYS},
        "num_steps": number(s.get("num_steps")) or (len(run.records) or None),
        "tokens_m": number(s.get("total_tokens_M")),
        "training_s": number(s.get("training_seconds")),
        "total_s": elapsed_s,
        "step_ms": run.step_ms,
        "mfu_percent": number(s.get("mfu_percent")),
        "pace": compute_pace(run),
        "config": config,
        "config_sha256": sha256(json.dumps(config, sort_keys=True))[:16],
        "damage": list(run.damage),
    }


def compute_ending(run: Run) -> dict:
    ended, is_finished = str(run.start.get("ended") or ""), bool(run.summary)
    is_stopped = not is_finished and ended.startswith("stopped")
    crash = {} if is_finished or is_stopped else compute_crash(run)
    return {
        "is_finished": is_finished,
        "stopped": ended if is_stopped else None,
        "crash": crash.get("reason"),
        "was_killed": crash.get("is_killed", False),
    }


def filing_status(record: dict) -> str:
    """The status a run is filed with; a decision that the folder remembers comes first."""
    if record.get("status"):
        return record["status"]
    if record.get("stopped"):
        return "discard"
    if not record.get("is_finished"):
        return "crash"
    return "invalid" if record.get("invalid") else "pending"


def run_start_unix(run: Run) -> float | None:
    """When it started; where it does not say, the age of its files tells."""
    written = [path.stat().st_mtime for path in run.files if path.exists()]
    return number(run.start.get("started_unix")) or min(written, default=None)


def compute_elapsed(run: Run) -> float | None:
    """Seconds of wall time a run without a summary took, as far as its metrics tell."""
    started, last = number(run.start.get("started_unix")), run.series("time/unix_s")[-1:]
    return float(last[0] - started) if started and len(last) and last[0] > started else None


def compute_idle(entries: list[Entry]) -> dict[str, float]:
    """Seconds for which nothing ran in a run's folder before it, by name; the first run of a night
    has none. Nights lie apart by two hours: a pause within one is shorter, and between two longer."""
    idle: dict[str, float] = {}
    last_end: dict[str, float] = {}
    for e in sorted(entries, key=lambda e: started_unix(e.record)):
        started, ended, where = e.record.get("started_unix"), e.record.get("ended_unix"), str(e.record.get("folder"))
        if started is None or ended is None:
            continue
        gap = max(started - last_end[where], 0.0) if where in last_end else math.inf
        if gap < 7200:
            idle[e.name] = gap
        last_end[where] = max(ended, last_end.get(where, ended))
    return idle


def compute_gpu_share(entries: list[Entry]) -> float | None:
    """Share of the nights in which runs were under way, None before there are two runs."""
    idle = compute_idle(entries)
    times = [[e.record.get(key) for key in ("started_unix", "ended_unix")] for e in entries]
    busy_s = sum(ended - started for started, ended in times if started is not None and ended is not None)
    return busy_s / (busy_s + sum(idle.values())) if idle and busy_s > 0 else None


def log_lines(log: str | None) -> list[str]:
    """The last lines of a log that hold anything."""
    return [line.rstrip() for line in (log or "")[-100_000:].split("\n") if line.strip()]


def environment_failure(run: Run) -> str | None:
    """The line that shows that the machine or its set-up failed, None if the experiment ended."""
    ended, lines = str(run.start.get("ended") or ""), log_lines(run.log)
    if run.summary or ended.startswith("stopped"):
        return None
    for line in (ended, *lines[-3:]):
        if line.startswith("error:"):
            return line
    return next((line.strip() for line in [*lines[:-41:-1], ended] if ENVIRONMENT_SIGNS.search(line)), None)


def compute_crash(run: Run) -> dict:
    """Why a run without a summary ended; `cause` and `help` where it is a known one."""
    lines, loss = log_lines(run.log), run.series("train/loss")
    end = "\n".join(lines[-60:])
    said = re.findall(r"^crash: *(.+)", f"{run.start.get('ended')}\n{end}", re.M)
    raised = re.findall(r"^[\w.]*(?:Error|Exception|Interrupt)\b.*", end, re.M)
    # torch.compile tells what really happened in the middle of an explanation.
    inner = re.findall(r"\bgot (\w*Error\(.*\))", end)
    reason = next((found[-1] for found in (inner, said, raised) if found), None)
    cause, helps = find_cause(reason)
    return {
        "reason": reason or ("the log just stops: killed" if lines else f"no {LOG}: started without `> {LOG} 2>&1`?"),
        "exception": raised[-1] if raised and raised[-1] not in (reason or "") and not inner else None,
        "frames": find_frames(lines, run.start.get("modules") or {}),
        "cause": cause,
        "help": helps,
        "is_killed": reason is None,
        "last_step": number(run.records[-1].get("step")) if run.records else None,
        "last_loss": number(loss[-1]) if len(loss) else None,
        "elapsed_s": compute_elapsed(run),
    }


def find_cause(reason: str | None) -> tuple[str | None, str | None]:
    if reason is None:
        return KILLED, KILLED_HELP
    found = ((cause, helps) for cause, signs, helps in CRASH_CAUSES if re.search(signs, reason, re.I))
    return next(found, (None, None))


def find_frames(lines: list[str], modules: dict) -> list[str]:
    """The last two frames of the last traceback in the program's own files, each with its code."""
    own, frames = {"train.py", "<string>", *(Path(m).name for m in modules)}, []
    start = max((i for i, line in enumerate(lines) if line.startswith("Traceback")), default=0)
    for i, line in enumerate(lines[start:], start):
        found = re.match(r'\s*File "([^"]+)", (line \d+)(?:,( in \S+))?', line)
        if found and Path(found[1]).name in own:
            code = "".join(lines[i + 1 : i + 2]).strip()
            frames.append(f"{Path(found[1]).name} {found[2]}{found[3] or ''}: `{code}`")
    return frames[-2:]


# ---------------------------------------------------------------------------------------------------------------------
# Compute: noise, best, verdict
#
# A score is its program's true value plus noise of standard deviation sigma: another seed, another
# order of floating point sums. What is decided: keep or not (KEEP_ERRORS), and what is claimed: a
# gain, or none yet (GAIN_ERRORS). The two are apart because their costs are: a false keep is nearly
# as good as what it replaces and is put right by the next, a false discard loses its gain for good.
# tests/bench_nights.py plays nights with known truth through these functions. At a sigma of 0.0005,
# 0.001 and 0.002 the rule gained what "lower than the best" does, within the simulation's error; of
# its keeps 6, 16 and 31 % were no gain (there 17, 24 and 35 %), of its claims 0, 3 and 12 %.
# ---------------------------------------------------------------------------------------------------------------------

# Two runs can be compared where none of these is known to differ.
KIND_KEYS = ("time_budget", "data_fingerprint", "eval_tokens", "measurement_sha256", "demo", "gpu_name")
# Student's t, two-sided 95 %, by degrees of freedom: the bar where sigma has no prior.
STUDENT_T = {1: 12.7, 2: 4.3, 3: 3.2, 4: 2.8, 5: 2.6, 6: 2.4, 7: 2.4, 8: 2.3, 9: 2.3}


@dataclass(frozen=True)
class Noise:
    """Standard deviation of val_bpb between seeds of one program; None where nothing tells it."""

    sigma: float | None
    freedom: int  # of the replicates: what was measured here
    has_prior: bool

    @property
    def source(self) -> str:
        if self.sigma is None:
            return f"run the baseline again with another seed (`{RERUN}`)"
        measured = f"{self.freedom} degree(s) of freedom measured"
        prior = f", and a prior of {PRIOR_SIGMA} for the five-minute run, counted as {PRIOR_WEIGHT}"
        return measured + prior * self.has_prior

    @property
    def claim_errors(self) -> float:
        """Standard errors from which on a difference is claimed: more where little was measured."""
        return GAIN_ERRORS if self.has_prior else STUDENT_T.get(self.freedom, 2.2)


def describe_noise(noise: Noise) -> str:
    known = "unknown:" if noise.sigma is None else f"sigma {noise.sigma:.6f} bpb,"
    return f"{known} {noise.source}"


@dataclass(frozen=True)
class Best:
    """The group of replicates with the lowest mean among those of which one is kept."""

    name: str  # the first one kept: its train.py is the one to go back to
    mean: float  # each seed counts once
    names: tuple[str, ...]
    group: tuple
    is_kept: bool  # False: nothing is kept yet and the first valid run stands in
    num_seeds: int


def is_comparable(a: Entry, b: Entry) -> bool:
    pairs = [(a.record.get(key), b.record.get(key)) for key in KIND_KEYS]
    return all(None in pair or pair[0] == pair[1] for pair in pairs)


def comparable(entries: list[Entry], like: Entry | None = None) -> list[Entry]:
    """The entries that can be compared with `like`, by default the newest one with a score."""
    like = like or next((e for e in reversed(entries) if e.is_valid), None)
    return [e for e in entries if is_comparable(e, like)] if like else entries


def compute_groups(entries: list[Entry]) -> dict[tuple, list[Entry]]:
    groups: dict[tuple, list[Entry]] = {}
    for e in entries:
        if e.is_valid:
            groups.setdefault(e.group, []).append(e)
    return groups


def seed_scores(entries: list[Entry]) -> list[float]:
    """One score a seed, the mean of its runs: reruns of one seed agree to 0.0002 bpb where other
    seeds, and so other programs, are 0.0009 apart."""
    by_seed: dict[object, list[float]] = {}
    for e in entries:
        by_seed.setdefault(e.record.get("seed"), []).append(e.val_bpb)
    return [sum(scores) / len(scores) for scores in by_seed.values()]


def mean_bpb(entries: list[Entry]) -> float:
    scores = seed_scores(entries)
    return sum(scores) / len(scores)


def compute_noise(entries: list[Entry]) -> Noise:
    """Pooled over all groups of replicates: sum of squared deviations / degrees of freedom, to
    which n seeds of a program add n - 1. The prior belongs to the real run of five minutes; without
    it one lucky pair would make everything a gain. Elsewhere (the demo, another budget) there is
    none."""
    squares, freedom = 0.0, 0
    for group in compute_groups(entries).values():
        scores = seed_scores(group)
        if len(scores) > 1:
            freedom += len(scores) - 1
            squares += float(np.var(scores)) * len(scores)
    has_prior = any(is_five_minute_run(e.record) for e in entries)
    weight = freedom + PRIOR_WEIGHT * has_prior
    squares += PRIOR_WEIGHT * PRIOR_SIGMA**2 * has_prior
    return Noise(math.sqrt(squares / weight) if weight else None, freedom, has_prior)


def is_five_minute_run(record: dict) -> bool:
    budget_s = number(record.get("time_budget")) or number(record.get("training_s"))
    return budget_s is not None and abs(budget_s - 300) < 3 and not record.get("demo")


def compute_best(entries: list[Entry], like: Entry | None = None) -> Best | None:
    """Lowest mean among the kept programs comparable with `like` (the newest score); while none is
    kept, the first valid run not discarded stands in."""
    valid = [e for e in comparable(entries, like) if e.is_valid]
    kept = [e for e in valid if e.status == "keep"]
    anchors: dict[tuple, Entry] = {}
    for e in kept or [e for e in valid if e.status == "pending"][:1]:
        anchors.setdefault(e.group, e)
    if not anchors:
        return None
    groups = compute_groups(valid)
    best = min((groups[group] for group in anchors), key=mean_bpb)
    names, group = tuple(e.name for e in best), best[0].group
    return Best(anchors[group].name, mean_bpb(best), names, group, bool(kept), len(seed_scores(best)))


def compute_verdict(this: Entry, entries: list[Entry], facts: dict | None = None) -> dict:
    """This run against the best of all others that can be compared with it.

    `kind`: crash, stopped, invalid, hampered, baseline, unchanged, replicate, new best, unproven or
    not better; `advice`: keep, discard, rerun or wait. `difference`: this program's mean minus the
    best's in bpb, lower is better; `standard_error`: of it, None where the noise is unknown.
    `facts` hold what the scores do not tell: is_unchanged, adds_code, is_killed."""
    entries, facts = comparable(entries, this), facts or {}
    others = [e for e in entries if e.name != this.name]
    # Judged without itself: an outlier that is part of its own sigma cannot stand out from it.
    best, noise = compute_best(others, this), compute_noise(others or [this])
    groups = compute_groups(others)
    same = groups.get(this.group, [])
    verdict = {
        "val_bpb": this.val_bpb,
        "best": best and best.name,
        "best_mean": best and best.mean,
        "best_runs": len(best.names) if best else 0,
        "best_is_kept": best is not None and best.is_kept,
        "noise": describe_noise(noise),
        "claim_errors": noise.claim_errors,
        "replicates": [e.name for e in same],
        "reasons": [],
        "undecided": [e.name for e in others if is_lower_and_undecided(e, this)],
    }
    if flaw := compute_flaw(this, facts):
        return verdict | flaw
    verdict["mean"] = mean_bpb([this, *same])
    if best is None:
        return verdict | {"kind": "baseline", "advice": "keep"}
    if best.group == this.group:
        return verdict | judge_replicate(this, entries) | compare_groups([this], same, noise)
    verdict |= compare_groups([this, *same], groups[best.group], noise)
    return verdict | decide(verdict["difference"], verdict["standard_errors"], noise, facts)


def is_lower_and_undecided(e: Entry, this: Entry) -> bool:
    if this.val_bpb is None or not e.is_valid or e.group == this.group:
        return False
    return e.status == "pending" and e.val_bpb < this.val_bpb


def judge_replicate(this: Entry, entries: list[Entry]) -> dict:
    """Another run of the best: it tells the noise, and may show that another program is better."""
    after = compute_best(entries, this)
    if after.group == this.group:
        return {"kind": "replicate", "advice": "keep", "dethroned_by": None}
    return {"kind": "replicate", "advice": "discard", "dethroned_by": [after.name, after.mean]}


def compute_flaw(this: Entry, facts: dict) -> dict | None:
    """Kind, advice and reasons of a run whose score says nothing about its program, else None."""
    record = this.record
    if record.get("stopped"):
        return {"kind": "stopped", "advice": "discard"}
    if this.status == "crash" or (this.val_bpb is None and not record.get("invalid")):
        return {"kind": "crash", "advice": "rerun" if facts.get("is_killed") else "discard"}
    if record.get("invalid") or this.status == "invalid":
        reasons = record.get("invalid") or ["called invalid by hand"]
        return {"kind": "invalid", "advice": "discard", "reasons": reasons}
    if record.get("hampered"):
        return {"kind": "hampered", "advice": "wait", "reasons": record["hampered"]}
    return None


def compare_groups(mine: list[Entry], theirs: list[Entry], noise: Noise) -> dict:
    """Runs of one program against those of another: the difference of their means, and its error."""
    difference, error, errors = mean_bpb(mine) - mean_bpb(theirs), None, None
    if noise.sigma:
        error = noise.sigma * math.sqrt(1 / len(seed_scores(mine)) + 1 / len(seed_scores(theirs)))
        errors = difference / error
    return {"difference": difference, "standard_error": error, "standard_errors": errors}


def decide(difference: float, errors: float | None, noise: Noise, facts: dict) -> dict:
    """Keep from half a standard error on, from a whole one where the program grows; claim from two
    on. Where the noise is unknown whatever is lower is kept, and nothing claimed."""
    if facts.get("is_unchanged"):
        return {"kind": "unchanged", "advice": "discard"}
    bar = KEEP_ERRORS_WITH_CODE if facts.get("adds_code") else KEEP_ERRORS
    is_better = difference < 0 if errors is None else errors <= -bar
    if not is_better:
        return {"kind": "not better", "advice": "discard"}
    is_claimed = errors is not None and errors <= -noise.claim_errors
    return {"kind": "new best" if is_claimed else "unproven", "advice": "keep"}


# ---------------------------------------------------------------------------------------------------------------------
# Compute: what changed
# ---------------------------------------------------------------------------------------------------------------------


def compute_changes(this: Entry, text: str | None, best: Entry | None, best_text: str | None) -> dict:
    """Configuration and kernels against the best's, key to [before, after]; size of the diff."""
    mine, theirs = (e.record.get("config") or {} if e else {} for e in (this, best))
    is_known = bool(mine and theirs)
    added, removed = diff_size(diff_lines(best_text, text, "best"))
    machine = pairs_apart(best.record, this.record, (*MACHINE_KEYS, "seed")) if best else {}
    return {
        "against": best and best.name,
        "config": pairs_apart(theirs, mine, theirs | mine) if is_known else {},
        "is_config_known": is_known,
        "lines_added": added,
        "lines_removed": removed,
        "machine": {k: pair for k, pair in machine.items() if None not in pair},
    }


def pairs_apart(before: dict, now: dict, keys: Iterable[str]) -> dict[str, list]:
    return {k: [before.get(k), now.get(k)] for k in keys if before.get(k) != now.get(k)}


def diff_lines(before: str | None, after: str | None, name: str) -> list[str]:
    if before is None or after is None:
        return []
    pair = before.splitlines(keepends=True), after.splitlines(keepends=True)
    return list(difflib.unified_diff(*pair, f"train.py of {name}", "train.py of this run", n=3))


def diff_size(diff: list[str]) -> tuple[int, int]:
    """Lines added and removed, below the two lines that name the files."""
    added, removed = (sum(line.startswith(sign) for line in diff[2:]) for sign in "+-")
    return added, removed


# ---------------------------------------------------------------------------------------------------------------------
# Compute: the paired curve
#
# Every run sees the same rows in the same order, so two runs' losses can be compared on the same
# text: its difficulty, nine tenths of a curve's scatter, drops out of the difference. Windows are
# cut at token counts at which all runs have a boundary (a step's end, or a micro-batch's).
#
# What is left scatters around a slow trend, and neighbouring steps' differences are alike, so the
# error of a window's mean is s / sqrt(n) times the root of an inflation by autocorrelation. That is
# estimated once for all windows, after taking a straight line out of each; one window alone is too
# short. The first is left out of that: a run's start is no scatter around a line, and made the
# errors of the others 1.7 times too large. Nor does it tell programs apart: seven pairs of seeds of
# five-minute runs differed there by 0.007 to 0.058 bpb, and from the third window on by 0.003 at most.
# The error is that of the text: how far the mean of these trained models' difference could be off
# because the window is finite. That another seed would have trained other models is the noise of
# the verdict, and not in it. By tests/bench_statistics.py 95 % intervals hold the truth in
# 90 to 96 % of runs, at autocorrelations from 0.7 to 0.
#
# Late in a run the learning rate falls by the clock. Where one run is slower, equal tokens then
# mean unequal rates: the difference at equal progress is read too, by moving the best along its own
# slope to the progress at which this run saw the same text. It is what the score will say, speed
# included; the one at equal tokens is learning alone, but only while both have the same rates.
# ---------------------------------------------------------------------------------------------------------------------

NUM_WINDOWS, SUMMARY_WINDOWS = 10, 2
MIN_BLOCKS = 40  # below four a window, no error can be estimated
MIN_SLOPE = 25  # steps: the slope through fewer of them moved a repeat of one program by 0.3 bpb
RATES_APART = 0.05  # of the peak: at the end of a warm-down of half the budget, runs that differ by 3 % in speed
FARTHEST_SHIFT = 0.1  # of the tokens: beyond one window the best's curve is not straight enough to move along
# Knobs that change how fast a run learns at a given moment, and so what equal tokens mean.
RATE_KEYS = re.compile(r"lr|warm|(?<!device_)batch|decay|momentum|schedule")


@dataclass(frozen=True)
class Curve:
    """A run's loss up to its first step whose loss is no number: four arrays over the steps, and
    three over the token counts, from 0, at which the sum of the loss is known: ends of steps and
    micro-batches."""

    tokens_m: np.ndarray
    loss: np.ndarray  # nats per token
    epoch: np.ndarray  # NaN where unknown
    data_sum: np.ndarray  # of all tokens so far, NaN where unknown
    bounds: np.ndarray  # those token counts
    nats: np.ndarray  # sum of the loss up to there
    share: np.ndarray  # of the budget used up there
    rate: np.ndarray  # the learning rate's multiplier over the steps, NaN where unknown
    bpb_per_nat: float | None


def compute_curve(run: Run) -> Curve | None:
    """None where fewer than three steps have a loss."""
    loss = run.series("train/loss")
    num_steps = len(loss) if np.isfinite(loss).all() else int(np.argmin(np.isfinite(loss)))
    if num_steps < 3:
        return None
    tokens, share = compute_tokens(run)[:num_steps], compute_progress(run)[:num_steps]
    bounds, nats = compute_loss_sums(run.records[:num_steps], tokens)
    record = run.evaluation or {}
    num_tokens, num_bytes = number(record.get("tokens")), number(record.get("bytes"))
    return Curve(
        tokens_m=tokens / 1e6,
        loss=loss[:num_steps],
        epoch=run.series("train/epoch")[:num_steps],
        data_sum=run.series("train/data_sum")[:num_steps],
        bounds=bounds,
        nats=nats,
        share=np.interp(bounds, np.append(0.0, tokens), np.append(0.0, share)),
        rate=run.series("train/lr_multiplier")[:num_steps],
        bpb_per_nat=num_tokens / (math.log(2) * num_bytes) if num_tokens and num_bytes else None,
    )


def compute_progress(run: Run) -> np.ndarray:
    """Share of the budget used up at the end of each step; without a clock, steps count as equally long."""
    clock_s, budget_s = run.series("time/training_s"), number(run.first_of("time_budget"))
    if budget_s and np.isfinite(clock_s).all():
        return np.maximum.accumulate(clock_s / budget_s)
    return np.linspace(0, 1, len(clock_s) + 1)[1:]


def compute_tokens(run: Run) -> np.ndarray:
    """Tokens trained on up to the end of each step."""
    tokens = run.series("train/tokens")
    if np.isfinite(tokens).all():
        return np.maximum.accumulate(tokens)
    if batch := number(run.summary.get("total_batch_size")):
        return batch * np.arange(1.0, len(tokens) + 1)
    return np.cumsum(np.nan_to_num(run.series("perf/tokens_per_sec") * run.series("perf/step_time_ms") / 1e3))


def compute_loss_sums(records: list[dict], tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token counts with the sum of the loss up to each, at the ends of steps and micro-batches."""
    bounds, nats = [0.0], [0.0]
    for record, end in zip(records, tokens, strict=True):
        parts = record.get("train/micro_losses")
        parts = numbers(parts if isinstance(parts, list) else [])
        if not len(parts) or not np.isfinite(parts).all():
            parts = numbers([record["train/loss"]])
        ends = np.linspace(bounds[-1], end, len(parts) + 1)
        nats += (nats[-1] + np.cumsum(parts * np.diff(ends))).tolist()
        bounds += ends[1:].tolist()
    return np.array(bounds), np.array(nats)


def compute_data_agreement(this: Run, other: Run) -> tuple[float, str | None]:
    """Up to which token count both saw the same rows, and why no further: None where that is all.

    Sums of token ids that agree at a token count mean the same rows up to there. Where they are not
    logged, the same data and context length must do, and it is said that this is assumed."""
    mine, theirs = this.curve, other.curve
    counts = [np.round(1e6 * curve.tokens_m) for curve in (mine, theirs)]
    end = 1e6 * min(mine.tokens_m[-1], theirs.tokens_m[-1])
    tokens, i, k = np.intersect1d(*counts, return_indices=True)
    apart = mine.data_sum[i] - theirs.data_sum[k]
    tokens, apart = tokens[np.isfinite(apart)], apart[np.isfinite(apart)]
    if apart.any():
        last = float(np.append(0.0, tokens)[np.argmax(apart != 0)])
        return last, f"the two runs saw other rows after {last / 1e6:.1f} M tokens"
    if len(apart):
        return end, None
    for what, key in (("data", "data_fingerprint"), ("context length", "max_seq_len")):
        before, now = other.first_of(key), this.first_of(key)
        if None not in (before, now) and before != now:
            return 0.0, f"another {what}: {before} -> {now}"
    return end, "assumed to be the same rows: the runs do not log train/data_sum"


def compute_paired(this: Run, others: list[Run]) -> dict | None:
    """The difference in training loss on the same text, this run minus the mean of `others` (the
    best and its replicates), in bpb: windows, and a summary of the last SUMMARY_WINDOWS. None
    without others. `note` says why there is no pairing, or how far it goes."""
    if not others:
        return None
    paired = {"against": [run.name for run in others], "windows": [], "summary": None, "rates": []}
    curves = [run.curve for run in (this, *others)]
    if None in curves:
        return paired | {"note": "one of the runs has no losses"}
    limits = [compute_data_agreement(this, other) for other in others]
    end, note = min(limits, key=lambda limit: limit[0])
    blocks = common_blocks(curves, end)
    kappa = next((c.bpb_per_nat for c in (*curves[1:], curves[0]) if c.bpb_per_nat), None)
    if kappa is None or len(blocks) <= MIN_BLOCKS:
        few = f"{max(len(blocks) - 1, 0)} steps in common, and {MIN_BLOCKS} are needed"
        return paired | {"note": few if end else note}
    windows = compute_windows(curves[0], curves[1:], blocks, kappa)
    is_whole = end >= 0.95e6 * min(c.tokens_m[-1] for c in curves)
    summary = compute_summary(windows[-SUMMARY_WINDOWS:]) if is_whole else None
    rates = compute_rate_changes(this, others[0])
    return paired | {"note": note, "windows": windows, "summary": summary, "rates": rates}


def compute_rate_changes(this: Run, best: Run) -> list[str]:
    """Knobs of rates, schedules and batch that differ between the two."""
    mine, theirs = configuration(this.summary), configuration(best.summary)
    keys = [key for key in mine if RATE_KEYS.search(key) and key in theirs and mine[key] != theirs[key]]
    return [f"{key} {theirs[key]} -> {mine[key]}" for key in keys]


def common_blocks(curves: list[Curve], end: float) -> np.ndarray:
    """Ascending token counts from 0 to `end` at which every curve has a boundary. Where batch sizes
    leave too few of those, evenly spaced counts: there a step is split evenly."""
    common = reduce(np.intersect1d, (np.round(c.bounds) for c in curves))
    common = common[common <= end + 0.5]
    num_steps = min(int(np.sum(c.bounds <= end)) for c in curves)
    return common if len(common) > MIN_BLOCKS else np.linspace(0, end, num_steps)


def compute_windows(mine: Curve, theirs: list[Curve], blocks: np.ndarray, kappa: float) -> list[dict]:
    """NUM_WINDOWS windows of equally many tokens, each with its end in tokens and in shares of the
    budget, and the difference at equal tokens and at equal progress, with their standard errors."""
    spans, middles = np.diff(blocks), (blocks[1:] + blocks[:-1]) / 2
    losses = [np.diff(np.interp(blocks, c.bounds, c.nats)) / spans for c in (mine, *theirs)]
    differences = losses[0] - np.mean(losses[1:], axis=0)
    edges = [int(np.argmin(np.abs(blocks - at))) for at in np.linspace(0, blocks[-1], NUM_WINDOWS + 1)]
    pieces = [slice(a, b) for a, b in itertools.pairwise(edges)]
    inflation = inflation_of([detrended(middles[p], differences[p]) for p in pieces[1:]])
    windows = []
    for p in pieces:
        first, last = float(blocks[p.start]), float(blocks[p.stop])
        scatter = detrended(middles[p], differences[p])
        difference = float(np.average(differences[p], weights=spans[p]))
        error = math.sqrt(inflation * float(scatter @ scatter)) / len(scatter)
        moved = move_to_progress(mine, theirs, first, last)
        rate, *rates = (float(np.interp((first + last) / 2, 1e6 * c.tokens_m, c.rate)) for c in (mine, *theirs))
        windows.append({
            "from_m": first / 1e6,
            "to_m": last / 1e6,
            "progress": float(np.interp(last, mine.bounds, mine.share)),
            "difference": kappa * difference,
            "error": kappa * error,
            "at_progress": moved and kappa * (difference - moved[0]),
            "at_progress_error": moved and kappa * math.hypot(error, moved[1]),
            "are_rates_apart": bool(abs(rate - np.mean(rates)) > RATES_APART),
            "is_repeat": any(np.interp(last, 1e6 * c.tokens_m, c.epoch) > 1 for c in (mine, *theirs)),
        })
    return windows


def compute_summary(windows: list[dict]) -> dict | None:
    """The mean of these windows, the nearest the curve comes to the score; their errors are taken for independent.
    None where a text was seen before, on which it measures memory."""
    if any(w["is_repeat"] or w["at_progress"] is None for w in windows):
        return None
    return {
        "from_m": windows[0]["from_m"],
        "at_progress": float(np.mean([w["at_progress"] for w in windows])),
        "at_progress_error": math.sqrt(sum(w["at_progress_error"] ** 2 for w in windows)) / len(windows),
    }


def detrended(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What a straight line leaves of y."""
    if len(x) < 3:
        return np.zeros(len(x))
    slope, level = np.polyfit(x - x.mean(), y, 1)
    return y - level - slope * (x - x.mean())


def inflation_of(pieces: list[np.ndarray]) -> float:
    """Variance of a piece's mean, times its length, over the mean square of what a straight line
    left of it: 1 + twice the sum of the autocorrelations, weighted as Newey and West do (1987), up
    to a quarter of a piece's length.

    The line has taken the slowest part of the scatter with it: level and slope, each of the
    variance of the mean. With V the answer and n the length, every autocovariance reads too low by
    2 V / n, which is put back."""
    length = min(len(p) for p in pieces)
    pieces = [p / math.sqrt(p @ p / len(p)) for p in pieces if p @ p > 0]
    if not pieces:
        return 1.0
    num_lags = length // 4
    total, weights = 1.0, 1.0
    for lag in range(1, num_lags + 1):
        weight = 1 - lag / (num_lags + 1)
        total += 2 * weight * float(np.mean([p[lag:] @ p[:-lag] / (len(p) - lag) for p in pieces]))
        weights += 2 * weight
    return max(total / (1 - 2 * weights / max(length, 10)), 1.0)


def move_to_progress(mine: Curve, theirs: list[Curve], first: float, last: float) -> tuple[float, float] | None:
    """Change of the best's loss in nats, and its error, between this window's text and the tokens
    at which the best was as far in its budget as this run is here, along a straight line through
    the best's losses around there. None in the first window, where the curve is not straight, and
    where those tokens are too far away."""
    middle = (first + last) / 2
    progress = np.interp(middle, mine.bounds, mine.share)
    changes, variances = [], []
    for curve in theirs:
        shift = float(np.interp(progress, curve.share, curve.bounds)) - middle
        around = curve.bounds[(curve.bounds >= first + min(shift, 0)) & (curve.bounds <= last + max(shift, 0))]
        if not first or abs(shift) > FARTHEST_SHIFT * 1e6 * curve.tokens_m[-1] or len(around) <= MIN_SLOPE:
            return None
        x = (around[1:] + around[:-1]) / 2
        y = np.diff(np.interp(around, curve.bounds, curve.nats)) / np.diff(around)
        (slope, _), covariance = np.polyfit(x - x.mean(), y, 1, cov=True)
        changes.append(slope * shift)
        variances.append(covariance[0, 0] * shift**2)
    return float(np.mean(changes)), math.sqrt(sum(variances)) / len(variances)


# ---------------------------------------------------------------------------------------------------------------------
# Compute: training against validation
# ---------------------------------------------------------------------------------------------------------------------

GAP_SHARE = 0.05  # of the score: training text of the first epoch and validation text differ in difficulty by 1 to 2 %


def compute_gap(run: Run, others: list[Run]) -> dict | None:
    """What validation loss is above training loss at the end, both in bpb; the best's beside it."""
    mine = training_and_gap(run)
    if mine is None:
        return None
    theirs = [found for r in others if (found := training_and_gap(r))]
    best = np.mean(theirs, axis=0).tolist() if theirs else None
    passed = np.floor(run.curve.epoch - run.curve.epoch[0])  # some count from 0, some in parts
    epochs = 1.0 + (passed[-1] if np.isfinite(passed).all() else 0.0)
    training, gap, error = mine
    is_wide = gap > GAP_SHARE * (training + gap) + 2 * error
    first = run.curve.tokens_m[passed == 0]  # packing leaves out what overhangs a row: less than there is
    epoch_m = float(first[-1]) if epochs > 1 and len(first) else None
    return {"this": mine, "best": best, "epochs": epochs, "epoch_m": epoch_m, "is_overfitting": epochs > 1 and is_wide}


def training_and_gap(run: Run) -> tuple[float, float, float] | None:
    """Training loss, what validation loss has more, and the standard error that the scatter of the steps (or their
    micro-batches) gives the first. None below ten of them: their mean says nothing."""
    curve, val = run.curve, number(run.summary.get("val_bpb"))
    if curve is None or val is None or curve.bpb_per_nat is None:
        return None
    tail = curve.bounds >= 0.95 * curve.bounds[-1]
    spans = np.diff(curve.bounds[tail])
    if len(spans) < 10:
        return None
    losses = curve.bpb_per_nat * np.diff(curve.nats[tail]) / spans
    training, error = float(np.average(losses, weights=spans)), float(losses.std(ddof=1)) / math.sqrt(len(losses))
    return training, val - training, error


# ---------------------------------------------------------------------------------------------------------------------
# Compute: machine. Did it hold the run back?
#
# One rule for good scores and bad. Of 400 simulated runs on an idle GPU it called none hampered,
# neither of the same program nor of one whose code costs up to 20 %; of those 10 % slower it found
# 98 % (tests/bench_statistics.py).
# ---------------------------------------------------------------------------------------------------------------------

# Step times of one program on an idle GPU agree within 1 to 2 %: twice that is no accident.
SLOWER_SAME = 0.04
# Other programs with the same FLOPs, shapes and kernels differ by what their new code costs: within
# a tenth it may be the code, and beyond, a second witness must agree; at a half more, none is
# needed.
SLOWER_ALIKE, SLOWER_ALONE = 0.10, 0.50
# Of the budget, in steps that took twice the median: worth two sigma of the score. On a processor, where other work
# gets in between, a third of the noise.
STALLED_SHARE, STALLED_SHARE_CPU = 0.03, 0.10
SLOW_START = 3.0  # times the usual: 36 s with an empty compiler's cache and 16 s with a full one are no witness
OTHER_GPU_MB, HIGH_LOAD = 1024.0, 0.5  # memory that another process needs to do any work; load above the usual, a core
WORK_KEYS = ("flops_per_token", "num_params_M", "total_batch_size", "device_batch_size", "width", "window_sizes")
NUM_PEERS = 15  # the newest: a machine's speed drifts


def compute_pace(run: Run) -> dict:
    """What the machine did to this run, for its record."""
    steps_ms = run.series("perf/step_time_ms")
    steps_ms = steps_ms[np.isfinite(steps_ms)]
    settled = steps_ms[10:] if len(steps_ms) > 50 else steps_ms[1:]
    median = float(np.median(settled)) if len(settled) else 0.0
    stalls = settled[settled > 2 * median]
    other_mb, loads = (run.series(key) for key in ("gpu/other_mb", "machine/load"))
    return {
        "stalls": len(stalls),
        "stalled_s": float((stalls - median).sum() / 1e3),
        "startup_s": number(run.summary.get("startup_seconds")),
        "other_gpu_mb": float(np.nanmax(other_mb)) if np.isfinite(other_mb).any() else None,
        "load": float(np.nanmedian(loads)) if np.isfinite(loads).any() else None,
        "pauses_over_s": number(run.summary.get("pauses_over")),
    }


def does_same_work(a: Entry, b: Entry) -> bool:
    """The same FLOPs a token, shapes, batch, kernels and GPU, as far as both say."""
    ours, theirs = a.record.get("config", {}), b.record.get("config", {})
    if ours.get("flops_per_token") is None or not is_comparable(a, b):
        return a.group == b.group
    apart = pairs_apart(ours, theirs, WORK_KEYS) | pairs_apart(a.record, b.record, KERNEL_KEYS)
    return not apart


def compute_machine(this: Entry, earlier: list[Entry]) -> list[str]:
    """Why the machine, not the program, held this run back; empty where it did not. Only earlier
    runs that did the same work are asked, so the answer stays.

    Where a second run of the very same program is as slow, with no witness against the machine, it
    is the program."""
    record = this.record
    if not is_timed(record) or not record.get("is_finished"):
        return []
    timed = [e for e in earlier if is_timed(e.record) and does_same_work(this, e)]
    return find_stalls(record) + find_slowness(this, timed)


def find_stalls(record: dict) -> list[str]:
    pace, trained_s = record.get("pace") or {}, record.get("training_s") or 0.0
    share = STALLED_SHARE if record.get("gpu_name") else STALLED_SHARE_CPU
    if pace.get("stalled_s", 0.0) <= share * trained_s:
        return []
    lost = f"{pace['stalled_s']:.1f} of {trained_s:.0f} s lost"
    return [f"{pace['stalls']} step(s) took more than twice the median: {lost}"]


def find_slowness(this: Entry, timed: list[Entry]) -> list[str]:
    """Against earlier runs that did the same work, of the very same program if there are any."""
    peers, step_ms = [e for e in timed if e.is_valid][-NUM_PEERS:], this.record["step_ms"]
    if not peers:
        return []
    same = [e for e in timed if e.group == this.group]
    known = [e for e in same if e.is_valid]
    slower = step_ms / float(np.median([e.record["step_ms"] for e in known or peers]))
    witnesses = find_witnesses(this.record.get("pace") or {}, peers)
    bar = SLOWER_ALIKE if witnesses else SLOWER_ALONE
    if known and this.record.get("gpu_name"):  # a processor is never as steady
        bar = SLOWER_SAME
    is_confirmed = any(abs(e.record["step_ms"] / step_ms - 1) < SLOWER_SAME for e in same)
    if slower - 1 <= bar or (is_confirmed and not witnesses):
        return []
    return ["; ".join([f"steps of {step_ms:.1f} ms, {slower:.2f} times what the same work took before", *witnesses])]


def is_timed(record: dict) -> bool:
    """Whether there is a step time to judge by: a median of few steps, with the first, is none."""
    return bool(record.get("step_ms")) and (record.get("num_steps") or math.inf) >= 20


def find_witnesses(own: dict, peers: list[Entry]) -> list[str]:
    """What else than the step time speaks against the machine."""
    usual = {}
    for key in ("startup_s", "load"):
        known = numbers((e.record.get("pace") or {}).get(key) for e in peers)
        usual[key] = float(np.nanmedian(known)) if np.isfinite(known).any() else math.inf
    other_mb, startup_s, load = (own.get(key) or 0.0 for key in ("other_gpu_mb", "startup_s", "load"))
    found = []
    if other_mb > OTHER_GPU_MB:
        found.append(f"another process held {other_mb:.0f} MB of this GPU")
    if startup_s > SLOW_START * usual["startup_s"]:
        found.append(f"start-up took {startup_s:.0f} s, usually {usual['startup_s']:.0f}")
    if load > HIGH_LOAD + usual["load"]:
        found.append(f"load {load:.1f} a core, usually {usual['load']:.1f}")
    return found


def compute_best_pace(this: Entry, best: Entry) -> float | None:
    """How many times as long the best's steps took for the same work: then it is the machine that has
    changed, and a gain is not the program's. None where they agree, or do other work."""
    ours, theirs = this.record.get("step_ms"), best.record.get("step_ms")
    if not ours or not theirs or not does_same_work(this, best):
        return None
    return theirs / ours if theirs / ours - 1 > SLOWER_ALIKE else None


# ---------------------------------------------------------------------------------------------------------------------
# Compute: layers, history, all of it
# ---------------------------------------------------------------------------------------------------------------------

# Of the looks: before, output projections grow from zero; after, updates vanish with the rates.
EARLY, LATE = 0.25, 0.9
APART = 3.0  # between three seeds of one program 2 of 867 values lay further apart than this factor
GROWN, DEAD = 10.0, 0.02  # of an output's RMS between the two looks; share of a layer's units
TRIFLE = 0.05  # of units or inputs: a share below it counts as none when two are compared


LOOKS = {  # what a look at a run's layers and parameters finds: names, and their values
    "dead units": ("layers/names", "layers/dead"),
    "inputs near zero": ("layers/names", "layers/input_zeros"),
    "output RMS": ("layers/names", "layers/rms"),
    "gradient RMS": ("params/names", "params/grad_rms"),
    "update RMS": ("params/names", "params/update_rms"),
    "weight RMS": ("params/names", "params/weight_rms"),
}


def look_at(record: dict) -> dict[tuple[str, str], float]:
    """(Kind, name) to what a step logged of layers, parameters and scalars; empty where it did not."""
    found = {}
    for kind, (names, key) in LOOKS.items():
        if isinstance(record.get(names), list):
            pairs = zip(record[names], record.get(key) or [], strict=False)
            found |= {(kind, str(name)): v for name, value in pairs if (v := number(value)) is not None}
    for name in [name for kind, name in found if kind == "update RMS"]:
        update, weight = found.pop(("update RMS", name)), found.pop(("weight RMS", name), 0.0)
        if update > 0 and weight > 0:
            found["update/weight", name] = update / weight
    for key in record:
        if key.startswith("scalars/") and isinstance(record[key], list):
            found["scalar RMS", key.removeprefix("scalars/")] = float(np.sqrt(np.mean(numbers(record[key]) ** 2)))
    return found


def layer_table(run: Run, share: float) -> dict[tuple[str, str], float]:
    """(Kind, name) to what was seen at this share of the looks: the median over a tenth of them
    around it, as one look is at one batch."""
    middle, half = int(share * (len(run.looks) - 1)), len(run.looks) // 20
    found: dict[tuple[str, str], list[float]] = {}
    for look in run.looks[max(middle - half, 0) : middle + half + 1]:
        for key, value in look.items():
            found.setdefault(key, []).append(value)
    table = {key: float(np.median(values)) for key, values in found.items()}
    return {key: value for key, value in table.items() if math.isfinite(value)}


def num_blocks(table: dict[tuple[str, str], float]) -> int:
    return len({name.split(".")[1] for _, name in table if name.startswith("blocks.")})


def compute_layers(run: Run, best: Run | None) -> list[str]:
    """The at most eight largest departures, two of a kind, most serious first: what is dead,
    without gradient, vanishing or exploding; then what is unlike the best; scalars also where they
    have moved."""
    early, late = layer_table(run, EARLY), layer_table(run, LATE)
    theirs = layer_table(best, LATE) if best else {}
    if num_blocks(theirs) != num_blocks(late):  # block 2 of three is not block 2 of four
        theirs = {key: value for key, value in theirs.items() if not key[1].startswith("blocks.")}
    for kind, name in late:
        start = configured_start(run, name)
        if kind == "scalar RMS" and start is not None:
            early[kind, name] = start
    found, lines = [], []
    for (kind, name), value in late.items():
        before, best_value = early.get((kind, name)), theirs.get((kind, name))
        grown, apart = ratio_of(kind, value, before), ratio_of(kind, value, best_value)
        alarm = name_alarm(kind, value, grown)
        departure = max(apart, 1 / apart)
        if kind == "scalar RMS" or alarm:
            departure = max(departure, grown, 1 / grown)
        if alarm or departure > APART:
            others = f"early {show(before, '.3g')}, best {show(best_value, '.3g')}"
            found.append((bool(alarm), departure, kind, f"{kind} of {name}: {value:.3g}{alarm} ({others})"))
    for _, _, kind, text in sorted(found, reverse=True):
        if sum(line.startswith(kind) for line in lines) < 2:
            lines.append(text)
    return lines[:8]


def configured_start(run: Run, name: str) -> float | None:
    """Where the configuration says that scalars of this name begin."""
    return number(run.summary.get(f"{name.removesuffix('s')}_init"))


def find_toss(run: Run, best: Run | None) -> str | None:
    """Residual scalars that the first step moved as far as the best's, but the other way. While blocks pass their
    input on and the last norm takes out its scale, their gradient is rounding; Adam makes a whole step of it."""
    if not best or not run.records or not best.records:
        return None
    for key in run.records[0]:
        name = key.removeprefix("scalars/")
        starts = [configured_start(r, name) for r in (run, best)]
        if name == key or None in starts:
            continue
        mine, theirs = (numbers(r.records[0].get(key) or []) for r in (run, best))
        moved, moved_theirs = mine - starts[0], theirs - starts[1]
        is_mirrored = mine.shape == theirs.shape and np.allclose(moved, -moved_theirs, rtol=0.1, atol=0.0)
        if is_mirrored and len(mine) > 1 and ((moved > 0).all() or (moved < 0).all()):
            return f"{name} to {mine.mean():.2g}, the best's to {theirs.mean():.2g}"
    return None


def ratio_of(kind: str, value: float, other: float | None) -> float:
    least = TRIFLE if kind in ("dead units", "inputs near zero") else 1e-12
    is_unknown = other is None or (other == 0 and least < TRIFLE)  # what began at zero has grown, and no more is known
    return 1.0 if is_unknown else (abs(value) + least) / (abs(other) + least)


def name_alarm(kind: str, value: float, grown: float) -> str:
    if kind == "dead units" and value > DEAD:
        return ", dead"
    if kind == "gradient RMS" and value == 0:
        return ", no gradient"
    if kind == "output RMS" and grown > GROWN:
        return ", exploding"
    return ", vanishing" if kind == "output RMS" and grown < 1 / GROWN else ""


def compute_history(entries: list[Entry]) -> dict:
    """Counts, lineage of kept programs, gain, and ideas since the best was found. An idea is a
    program with a score that counts, from its first run on."""
    alike = comparable(entries)
    best, groups = compute_best(alike), compute_groups(alike)
    lineage = compute_lineage(alike, groups)
    gain = lineage[0][1] - best.mean if lineage else None
    optimism = compute_optimism(best, alike, compute_noise(alike)) if gain else 0.0
    hours = sum(e.record.get("total_s") or e.record.get("training_s") or 0.0 for e in entries) / 3600
    return {
        "num_runs": len(entries),
        "counts": {status: sum(status_shown(e) == status for e in entries) for status in (*STATUSES, "hampered")},
        "lineage": lineage,
        "hours": hours,
        "gain": None if gain is None else gain - optimism,
        "optimism": optimism,
        "ideas_since_best": len(groups) - 1 - list(groups).index(best.group) if best else None,
        "runs_since_best_was_run": runs_since(alike, best),
        "last": [[e.name, e.val_bpb, status_shown(e), e.description] for e in entries[-5:]],
        "gpu_share": compute_gpu_share(entries),
    }


def status_shown(e: Entry) -> str:
    """Of a hampered run nothing is to be decided."""
    return "hampered" if e.status == "pending" and e.record.get("hampered") else e.status


def compute_lineage(entries: list[Entry], groups: dict[tuple, list[Entry]]) -> list[list]:
    """Name, mean and description of each program that was kept, in order."""
    lineage: dict[tuple, list] = {}
    for e in entries:
        if e.status == "keep" and e.is_valid:
            lineage.setdefault(e.group, [e.name, mean_bpb(groups[e.group]), e.description])
    return list(lineage.values())


def runs_since(entries: list[Entry], best: Best | None) -> int | None:
    ages = (age for age, e in enumerate(reversed(entries)) if best and e.name in best.names)
    return next(ages, None)


def compute_optimism(best: Best, entries: list[Entry], noise: Noise) -> float:
    """By how much the best's mean reads too low because it is the lowest of many noisy ones: sigma
    / sqrt(n) times the expected maximum of k standard normals, k being the programs within two
    errors of it, any of which could have been the one. Replicates of the best shrink it."""
    error = (noise.sigma or 0.0) / math.sqrt(best.num_seeds)
    means = [mean_bpb(group) for group in compute_groups(entries).values()]
    num_near = max(sum(mean < best.mean + 2 * error for mean in means), 1)
    # Blom (1958): the expected maximum of k normals is near the quantile (k - 0.375) / (k + 0.25).
    return error * NormalDist().inv_cdf((num_near - 0.375) / (num_near + 0.25))


def attempt(failed: dict[str, str], what: str, part: Callable, *given: object) -> object:
    """The program may have become anything: a surprise in its metrics costs one part of the page,
    which says so, and not the night."""
    try:
        return part(*given)
    except Exception as e:  # see above
        failed[what] = f"{type(e).__name__}: {e}"
        return None


def compute_stats(run: Run, this: Entry, entries: list[Entry], best_runs: list[Run]) -> dict:
    """Everything the analysis says about one run, as numbers. `entries` end with this one;
    `best_runs` are the best's replicates, the first its own."""
    failed: dict[str, str] = {}
    earlier = [e for e in entries if e.name != this.name]
    best_run = best_runs[0] if best_runs else None
    best = next((e for e in earlier if best_run and e.name == best_run.name), None)
    hampered = attempt(failed, "machine", compute_machine, this, earlier) or []
    this = replace(this, record=this.record | {"hampered": hampered})
    crash = compute_crash(run) if this.status == "crash" else None
    changes = compute_changes(this, run.train_py, best, best_run and best_run.train_py)
    paired = attempt(failed, "paired", compute_paired, run, best_runs)
    facts = {
        "is_killed": bool(crash and crash["is_killed"]),
        "adds_code": changes["lines_added"] > changes["lines_removed"] + FREE_LINES,
    }
    verdict = compute_verdict(this, [*earlier, this], facts)
    twin = next((r for r in best_runs if r.summary.get("seed") == run.summary.get("seed")), None)
    if twin and attempt(failed, "unchanged", is_unchanged, run, twin, changes, verdict):
        verdict = compute_verdict(this, [*earlier, this], facts | {"is_unchanged": True})
        # From now on another run of that program.
        this = replace(this, record=this.record | {"program": best.record.get("program")})
    this = replace(this, stats={"verdict": verdict})
    entries = [*earlier, this]
    return plain({
        "record": this.record,
        "description": this.description,
        "verdict": verdict | {"best_is_slower": best and compute_best_pace(this, best)},
        "crash": crash,
        "changes": changes,
        "effect": compute_effects(entries).get(this.name),
        "expected": read_subject(this)[1],
        "paired": paired,
        "gap": attempt(failed, "gap", compute_gap, run, best_runs),
        "cost": {"this": compute_costs([run]), "best": compute_costs(best_runs)},
        "layers": attempt(failed, "layers", compute_layers, run, best_run),
        "toss": attempt(failed, "toss", find_toss, run, best_run),
        "history": attempt(failed, "history", compute_history, entries),
        "calibration": render_calibration(entries),
        "failed": failed,
    })


FREE_LINES = 3  # a program that is longer by no more than these has not become more complex
# One program and seed, run twice on an H100: the losses of the first ten steps agreed within 3e-4
# of themselves; any other rate, start or seed made a tenth.
ROUNDING = 1e-3


def is_unchanged(run: Run, best: Run, changes: dict, verdict: dict) -> bool:
    """Whether the edit changed nothing that can be seen, beside the best's run of the same seed: the
    same configuration, rates and first ten losses but for rounding, and no difference beyond the
    noise in any window nor in the score (averaged weights would show only there)."""
    is_same = changes["is_config_known"] and not changes["config"]
    if not is_same or verdict.get("difference") is None or verdict["kind"] == "replicate":
        return False
    losses = [r.series("train/loss")[:10] for r in (run, best)]
    rates = [r.series("train/lr_multiplier").mean() for r in (run, best)]  # a schedule changed in the code
    if not np.allclose(*losses, rtol=ROUNDING, atol=0.0) or not np.allclose(*rates, rtol=0.005, atol=0.0):
        return False
    windows = compute_paired(run, [best])["windows"]
    differences = [abs(w["difference"]) for w in windows] + [abs(verdict["difference"])]
    return bool(windows) and max(differences) < max(GAIN_ERRORS * (verdict["standard_error"] or 0.0), ROUNDING)


COSTS = {"M tokens": "total_tokens_M", "steps": "num_steps", "ms a step (median)": "step_ms", "MB": "peak_vram_mb",
         "% MFU": "mfu_percent"}


def compute_costs(runs: list[Run]) -> dict[str, float]:
    """Unit to what these runs took in the mean, of what all of them say; a profiled step by kind of kernel."""
    found = []
    for run in runs:
        s = run.summary | {"step_ms": run.step_ms}
        profile = {f"ms {kind}": ms for kind, ms in (s.get("profile") or {}).items() if kind != "step"}
        found.append({unit: s.get(key) for unit, key in COSTS.items()} | profile)
    means = {unit: numbers(costs.get(unit) for costs in found).mean() for costs in found[:1] for unit in costs}
    return {unit: float(mean) for unit, mean in means.items() if math.isfinite(mean)}


# ---------------------------------------------------------------------------------------------------------------------
# Render: analysis.md and compare
# ---------------------------------------------------------------------------------------------------------------------

DECISIONS = {
    "keep": f"keep (`{FILE} keep`)",
    "discard": f"discard (`{FILE} discard`)",
    "rerun": f"{AGAIN}: the idea was not tested",
    "wait": f"{AGAIN}, once the machine is quiet",
}
KINDS = {
    "baseline": f"Nothing to compare with yet. Run it once more (`{RERUN}`) for the noise.",
    "unproven": "Better by the rule for keeping, but it may be no gain: as far as the noise is known here, a claim "
                "takes {claim_errors} standard errors.",
    "unchanged": "The edit changed nothing: configuration and losses are the best's. It counts as another "
                 "run of that program, not as an idea.",
}


def render_table(rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table whose first row is the heading."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]


def render_verdict(stats: dict) -> list[str]:
    """What it is, why, and in the last line what to do."""
    v = stats["verdict"]
    what = " of the best, no new idea" if v["kind"] == "replicate" else ""
    lines = [f"**{v['kind'].upper()}**{what}: {render_comparison(stats)}."]
    lines += [f"- {clip(reason, 220)}" for reason in v["reasons"][:5]]
    lines += render_replicates(v)
    if v["kind"] in KINDS:
        lines.append(KINDS[v["kind"]].format(**v))
    if stats.get("effect"):
        lines += render_idea(stats["effect"], stats["expected"])
    lines += [f"Mind: {clip(remark, 220)}." for remark in find_remarks(stats)[:6]]
    is_known = v["kind"] not in ("baseline", "replicate") or not v["noise"].startswith("unknown")
    if v["kind"] not in ("crash", "stopped", "invalid", "hampered") and is_known:
        without = ", without this run" * (v["kind"] == "replicate")
        lines.append(f"Noise between seeds of one program{without}: {v['noise']}.")
    is_mendable = v["kind"] == "crash" and v["advice"] == "discard"
    mend = "mend a slip and train again, three attempts at most; else " * is_mendable
    decision = f"Decision: {mend}{DECISIONS[v['advice']]}"
    if v["advice"] in ("rerun", "wait"):
        decision += ", after a commit of this train.py" * ("-dirty" in stats["record"].get("name", ""))
        decision += f" (`{train_again(stats['record'])}`); after three such runs, discard"
    return [*lines, decision]


def render_idea(effect: dict, expected: float | None) -> list[str]:
    """What an idea brought against another program than the best, and what its subject expected."""
    lines, measured = [], (effect["difference"], effect["standard_error"])
    if effect["against"]:
        lines.append(f"Built on {effect['against']}: {render_difference(*measured)} bpb against that one.")
    if expected is not None and effect["standard_error"]:
        lines.append(f"Expected {expected:+.4f}, came {render_difference(*measured, '.4f')}.")
    return lines


def train_again(record: dict) -> str:
    """The command that trains this run's program once more, with its seed."""
    offset = record.get("seed_offset")
    return f"AUTORESEARCH_SEED_OFFSET={offset:.0f} {TRAIN_BESIDE}" if offset else TRAIN_BESIDE


def find_remarks(stats: dict) -> list[str]:
    v, record = stats["verdict"], stats["record"]
    remarks = [*record.get("damage", [])]
    times = f"{v.get('best_is_slower') or 1.0:.2g} times as long"
    if v.get("best_is_slower") and v["kind"] == "replicate":
        remarks.append(f"this program took {times} a step before: if that run was held up, write `invalid` as the "
                       f"status of {v['best']} in {RESULTS}")
    elif v.get("best_is_slower"):
        remarks.append(f"the best's steps, of the same sizes, took {times}: unless this code is why, the machine is "
                       f"faster now; then `{RERUN}` before you believe a gain")
    if stats.get("toss"):
        remarks.append(f"the first step took {stats['toss']}: while blocks pass their input on, rounding decides that, "
                       "and a hundred losses follow it; another seed before you believe a difference")
    if v["undecided"]:
        remarks.append(f"lower, and not decided yet: {', '.join(v['undecided'][:3])}")
    if v["best"] and not v["best_is_kept"]:
        remarks.append(f"nothing is kept yet: {v['best']}, the first valid run, stands in as the best")
    over_s = (record.get("pace") or {}).get("pauses_over_s") or 0.0
    if over_s >= 0.5:
        remarks.append(f"pauses of the clock took {over_s:.0f} s more than is allowed: these counted as training")
    return remarks


def render_comparison(stats: dict) -> str:
    v, best = stats["verdict"], "none"
    if v["best"]:
        mean = f", mean of {v['best_runs']} runs" if v["best_runs"] > 1 else ""
        best = f"{v['best_mean']:.6f} ({v['best']}{mean})"
    if v["kind"] == "crash":
        return f"{clip((stats['crash'] or {}).get('reason') or 'by hand', 200)}. Best so far: {best}"
    text = f"val_bpb {show(v['val_bpb'])}, best so far {best}"
    if v["replicates"] and v["kind"] != "replicate" and "mean" in v:
        text = f"val_bpb {show(v['mean'])} (mean of {1 + len(v['replicates'])} runs), best so far {best}"
    if v.get("difference") is not None:
        text += f", difference {v['difference']:+.6f}"
    if v.get("standard_error"):
        text += f" ± {v['standard_error']:.6f} bpb = {v['standard_errors']:+.1f} standard errors"
    return text


def render_replicates(v: dict) -> list[str]:
    """On a program that was run before: what the mean is, and whether this run fits the others."""
    if not v["replicates"] or "mean" not in v:
        return []
    count, names = 1 + len(v["replicates"]), ", ".join(v["replicates"][:4])
    lines = [f"The same program as {names}. Mean of the {count} runs of this program: {v['mean']:.6f}."]
    if v["kind"] == "replicate" and abs(v["standard_errors"] or 0.0) > 3:
        lines.append("It lies outside the noise of the others: look for a cause before you trust it.")
    if v.get("dethroned_by"):
        now = "{} at {:.6f}".format(*v["dethroned_by"])
        lines.append(f"With this mean it is the best no more: that is {now}.")
    return lines


def render_crash(crash: dict | None) -> list[str]:
    if crash is None:
        return []
    ended = "before the first step" if crash["last_step"] is None else f"step {crash['last_step']:.0f}"
    if crash["last_loss"] is not None:
        ended += f", last loss {crash['last_loss']:.4f}"
    lines = [f"Ended: {ended}."]
    if crash["exception"]:
        lines.append(f"Exception: {clip(crash['exception'], 300)}")
    lines += [f"- {clip(frame, 200)}" for frame in crash["frames"]]
    if crash["cause"]:
        lines.append(f"Looks like: {crash['cause']}. What usually helps: {crash['help']}.")
    return lines


def render_paired(paired: dict) -> list[str]:
    """The table of windows, the summary, and what limits both."""
    names = ", ".join(paired["against"][:3])
    if not paired["windows"]:
        return [f"No pairing with {names}: {paired['note']}."]
    rows = [["budget", "M tokens", "at equal tokens", "at equal progress"]]
    for w in paired["windows"]:
        mark = " ‡" * (not w["from_m"]) + " *" * w["is_repeat"] + " †" * w["are_rates_apart"]
        equal, moved = f"{w['difference']:+.5f}", "-"  # of the start no error is known
        if w["from_m"]:
            equal = render_difference(w["difference"], w["error"])
        if w["at_progress"] is not None:
            moved = render_difference(w["at_progress"], w["at_progress_error"])
        rows.append([f"{w['progress']:.0%}{mark}", f"{w['to_m']:.4g}", equal, moved])
    lines = [f"This run minus {names}: training loss on the same text, bpb, ± one standard error of the text."]
    lines += render_table(rows)
    if s := paired["summary"]:
        told = render_difference(s["at_progress"], s["at_progress_error"])
        lines.append(f"From {s['from_m']:.4g} M tokens on, at equal progress: **{told} bpb**; "
                     "the ± leaves out what another seed would change.")
    return lines + explain_marks(paired)


def explain_marks(paired: dict) -> list[str]:
    """What the marks in the table mean, and what its numbers cannot tell."""
    lines = ["‡ the start: seeds of one program are as far apart there as programs."]
    if any(w["at_progress"] is None for w in paired["windows"][1:]):
        lines.append("-: the other curve is too steep there, or too far away, to tell.")
    if any(w["is_repeat"] for w in paired["windows"]):
        lines.append("* a later epoch: text seen before, no measure of learning.")
    if any(w["are_rates_apart"] for w in paired["windows"]):
        lines.append("† other learning rates on the same text: equal tokens do not tell who learned better.")
    if paired["rates"]:
        told, last = clip("; ".join(paired["rates"][:4]), 180), paired["windows"][-1]
        is_told = last["at_progress"] is not None and not last["is_repeat"]
        believe = "believe equal progress, in the warm-down" if is_told else "for this run only the score can tell"
        lines.append(f"Rates, schedule or batch differ ({told}): equal tokens do not tell who learned better; "
                     f"{believe}.")
    if paired["note"]:
        lines.append(f"Mind: {paired['note']}.")
    return lines


def render_gap(gap: dict) -> list[str]:
    best = " (best {:.4f} and {:+.4f})".format(*gap["best"]) if gap["best"] else ""
    training, behind, error = gap["this"]
    lines = [f"Training loss at the end {training:.4f} bpb, validation {behind:+.4f} ± {error:.4f} to it{best}."]
    epoch = f"epoch {gap['epochs']:.0f}, of about {show(gap['epoch_m'], '.3g')} M packed tokens each"
    if gap["is_overfitting"]:
        lines.append(f"**Over-fitting**: {epoch}, and validation is left behind: more passes need not help.")
    elif gap["epochs"] > 1:
        lines.append(f"The data were repeated: the end was in {epoch}.")
    return lines


def render_changes(changes: dict) -> list[str]:
    if changes["against"] is None:
        return ["Nothing to compare with yet."]
    config = changes["config"]
    lines = [f"train.py: +{changes['lines_added']} -{changes['lines_removed']} lines (`train.diff`)."]
    if not config:
        known = "the same" + ", but for the seed" * ("seed" in changes["machine"])
        known = known if changes["is_config_known"] else "unknown"
        lines.append(f"Resolved configuration: {known}.")
    for key, pair in [*itertools.islice(config.items(), 6), *changes["machine"].items()]:
        before, after = (clip(json.dumps(value).strip('"'), 50) for value in pair)
        lines.append(f"- `{key}`: {before} -> {after}")
    if len(config) > 6:
        lines.append(f"- and {len(config) - 6} more: {clip(', '.join(list(config)[6:]), 100)}")
    return lines


def render_cost(stats: dict) -> list[str]:
    """What the run took, beside the best; what stalls took."""
    theirs, cells = stats["cost"]["best"], []
    for unit, value in stats["cost"]["this"].items():
        best = f" (best {theirs[unit]:.5g})" if unit in theirs else ""
        cells.append(f"{value:.5g}{best} {unit}")
    lines = ["; ".join(cells[i : i + 5]) + "." for i in range(0, len(cells), 5)]
    pace = stats["record"].get("pace") or {}
    if pace.get("stalls"):
        lines.append(f"{pace['stalls']} step(s) took over twice the median: {pace['stalled_s']:.1f} s lost.")
    return lines


def render_counts(h: dict) -> str:
    counts = ", ".join(f"{n} {status}" for status, n in h["counts"].items() if n)
    return f"{h['num_runs']} run{'' if h['num_runs'] == 1 else 's'}" + (f" ({counts})" if counts else "")


def render_history(h: dict) -> list[str]:
    lines = [f"{render_counts(h)}, {h['ideas_since_best'] or 0} idea(s) since the best was found."]
    if h["gain"]:
        line = f"Gain since the first kept run: {h['gain'] + h['optimism']:.6f} bpb"
        if h["optimism"]:
            line += f" as scored, {h['gain']:.6f} after allowing for the lowest of many noisy scores reading too low"
        lines.append(f"{line}.")
    if (h["runs_since_best_was_run"] or 0) >= RERUN_EVERY:
        lines.append(f"The best was last run {h['runs_since_best_was_run']} runs ago: `{RERUN}`.")
    return lines


def render_analysis(stats: dict, pictures: list[str]) -> str:
    """The page for the agent, without its notes: at most PAGE_LINES and PAGE_BYTES, ordered by what
    decides; what does not fit is cut from the end."""
    failed = [f"- not computed: {part}: {clip(why, 160)}" for part, why in stats["failed"].items()]
    sections = (
        ("Verdict", render_verdict(stats)),
        ("Crash", render_crash(stats["crash"])),
        ("Paired curve", stats["paired"] and not stats["crash"] and render_paired(stats["paired"])),
        ("Training and validation", stats["gap"] and render_gap(stats["gap"])),
        ("What changed", render_changes(stats["changes"])),
        ("Layers", [f"- {line}" for line in stats["layers"] or []]),
        ("Cost", render_cost(stats)),
        ("History", stats["history"] and [*render_history(stats["history"]), stats["calibration"]]),
        ("Data", [f"Pictures: {', '.join(pictures) or 'none'}; numbers: stats.json and load_run().", *failed]),
    )
    demo = "demo run " * bool(stats["record"].get("demo"))
    lines = [f"# {demo}{stats['record']['name']}: {clip(stats['description'], 100)}"]
    for heading, told in sections:
        if told:
            lines += ["", f"## {heading}", *(clip(one_line(line), 400) for line in told if line)]
    return fit_page(lines)


def fit_page(lines: list[str]) -> str:
    shown = lines[: PAGE_LINES - 5]
    while len("\n".join(shown).encode()) > PAGE_BYTES - len(NOTES_HEADING) - 120:
        shown.pop()
    return "\n".join(shown if len(shown) == len(lines) else [*shown, f"Cut here; {STATS} has the rest."]) + "\n"


def write_analysis(folder: Path, text: str) -> None:
    """The page above the agent's notes, which stay as they are."""
    old = read_text(folder / ANALYSIS) or ""
    _, heading, notes = old.partition(NOTES_HEADING)
    write_atomic(folder / ANALYSIS, f"{text}\n{NOTES_HEADING}{notes if heading else chr(10)}")


def render_compare(runs: list[Run], entries: list[Entry]) -> str:
    """Scores and the settings that differ, and the paired curve of each run against the first."""
    scores = {e.name: show(e.val_bpb) for e in entries}
    configs = [configuration(run.summary) for run in runs]
    table = [["", *(run.name for run in runs)], ["val_bpb", *(scores.get(run.name, "no row") for run in runs)]]
    for key in {key: None for config in configs for key in config}:
        values = [clip(json.dumps(config.get(key)), 40) for config in configs]
        if len(set(values)) > 1:
            table.append([f"`{key}`", *values])
    lines = render_table(table)
    for run in runs[1:]:
        paired = render_paired(compute_paired(run, runs[:1]))
        lines += ["", f"## {run.name} against {runs[0].name}", *paired]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The morning: effects, predictions, claims, report.md, best.patch
# ---------------------------------------------------------------------------------------------------------------------

TRIED = ("new best", "unproven", "not better")  # verdicts on an idea; the others are on the run
# What follows from the knobs, or is not train.py's to set.
DERIVED = re.compile(
    r"num_params\w*|flops_per_token|width|num_heads|window_sizes"
    r"|max_seq_len|time_budget|eval_tokens|demo|seed\w*"
)
# "expect -0.0006" in a commit's subject. A number without its sign, or of another unit, is none.
EXPECTED = re.compile(
    r",? *\b(?:expect|predict)\w*[^-+\d\u2212]{0,24}([-+\u2212]\d*\.\d+)(?!\d| ?(?:%|ms))", re.I
)
RUN_NAME = re.compile(r"\b(?:unknown-|nogit-)?[0-9a-f]{7}(?:-dirty)?(?:\.\d+)?\b")


def verdict_of(e: Entry) -> dict:
    """As it stands on the run's own page: whatever is said of a run elsewhere has the same bar."""
    return e.stats.get("verdict") or {}


def compute_effects(entries: list[Entry]) -> dict[str, dict]:
    """Name to what its idea brought, one run a program: gains first, then losses, then what the noise hides.

    Measured by all runs there are by now, of its program and of the one it was built on. Mostly that was the best;
    where agents share an archive, another may have found a better one meanwhile, and it is named in `against`."""
    groups, noise, effects = compute_groups(entries), compute_noise(entries), {}
    valid = {e.name: e for e in entries if e.is_valid}
    by_program: dict[str | None, list[Entry]] = {}
    for e in valid.values():
        by_program.setdefault(e.record.get("train_sha256"), []).append(e)
    for e in [group[0] for group in groups.values()]:
        best = valid.get(verdict_of(e).get("best"))
        base = find_parent(e, by_program) or best
        if verdict_of(e).get("kind") not in TRIED or base is None:
            continue
        effect = compare_groups(groups[e.group], groups[base.group], noise)
        effect["is_outside"] = abs(effect["standard_errors"] or 0.0) >= noise.claim_errors
        effect["against"] = None if best and base.group == best.group else base.name
        effect["config"] = compute_changes(e, None, base, None)["config"]
        effects[e.name] = effect
    return dict(sorted(effects.items(), key=lambda item: (not item[1]["is_outside"], item[1]["difference"])))


def find_parent(e: Entry, by_program: dict[str | None, list[Entry]]) -> Entry | None:
    """The first run of the program in the commit before. With modules train.py alone does not tell."""
    built_on = None if e.record.get("modules") else e.record.get("built_on")
    runs = by_program.get(built_on, []) if built_on else []
    return next((x for x in comparable(runs, e) if x.group != e.group), None)


def render_difference(difference: float, error: float | None, form: str = ".5f") -> str:
    return f"{difference:+{form}} ± {show(error, form)}"


def render_effect(effect: dict) -> str:
    told = "inside the noise"
    if effect["is_outside"]:
        told = "a gain" if effect["difference"] < 0 else "a loss"
    if effect["against"]:
        told += f", against {effect['against']}"
    return f"{render_difference(effect['difference'], effect['standard_error'])} ({told})"


def render_outcome(e: Entry, effects: dict[str, dict]) -> str:
    """The measured effect of an idea; of any other run what became of it."""
    v = verdict_of(e)
    if e.name in effects:
        return render_effect(effects[e.name])
    if v.get("kind") in TRIED and v.get("replicates"):  # of another program than the best
        return f"replicate of {v['replicates'][0]}"
    return e.record.get("crash") or v.get("kind") or ""


def read_subject(e: Entry) -> tuple[str, float | None]:
    """The idea, and the difference that the subject expects of it, None where it expects none."""
    found = EXPECTED.search(e.description)
    if not found:
        return e.description, None
    return e.description[: found.start()].rstrip(" :;,"), float(found[1].replace("\u2212", "-"))


def own_knobs(config: dict[str, list]) -> dict[str, list]:
    """Of what changed in a configuration, what somebody set."""
    knobs = {k: pair for k, pair in config.items() if not DERIVED.fullmatch(k)}
    if knobs.get("num_kv_heads") == config.get("num_heads"):  # resolved: as many as there are heads
        knobs.pop("num_kv_heads", None)
    return knobs


def changed_knobs(e: Entry, config: dict[str, list]) -> dict[str, str]:
    """Knob to "before -> after". A run that changed none goes by its subject."""
    knobs = own_knobs(config)
    if not knobs:
        return {clip(read_subject(e)[0], 60): "code"}
    rest = f", one of {len(knobs)} changes" * (len(knobs) > 1)
    return {k: f"{json.dumps(old)} -> {json.dumps(new)}{rest}" for k, (old, new) in knobs.items()}


def render_effects(entries: list[Entry], limit: int | None = None) -> list[str]:
    """A line a knob, at most `limit`, those that matter most first; then the knobs untouched."""
    by_name, by_knob = {e.name: e for e in entries}, {}
    for name, effect in compute_effects(entries).items():
        for knob, change in changed_knobs(by_name[name], effect["config"]).items():
            by_knob.setdefault(knob, []).append(f"{change} {render_effect(effect)} in {name}")
    lines = [f"{knob}: {'; '.join(told)}" for knob, told in by_knob.items()]
    touched = {knob for e in entries for knob in own_knobs((e.stats.get("changes") or {}).get("config") or {})}
    config = next((e.record["config"] for e in reversed(entries) if e.record.get("config")), {})
    untouched = [k for k in config if k not in touched and k not in by_knob and not DERIVED.fullmatch(k)]
    return [*lines[:limit], f"never touched: {', '.join(untouched) or 'none'}"]


def render_calibration(entries: list[Entry]) -> str:
    """How well the subjects predict; empty before the first prediction that was measured."""
    effects = compute_effects(entries)
    pairs = [(read_subject(e)[1], effects[e.name]["difference"]) for e in entries if e.name in effects]
    are_right = [expected * came > 0 for expected, came in pairs if expected is not None]
    return f"Predictions with the right sign: {sum(are_right)} of {len(are_right)}." if are_right else ""


def check_insights(text: str | None, entries: list[Entry]) -> list[str]:
    """Claims that cite runs which do not exist, or claim an effect on runs inside the noise alone."""
    effects = compute_effects(entries)
    programs = {e.group for e in entries if e.name in effects and not effects[e.name]["is_outside"]}
    names, hidden = {e.name for e in entries}, {e.name for e in entries if e.group in programs}
    claims = re.findall(r"^[-*+] +(.+(?:\n[ \t]+\S.*)*)", (text or "").partition("## Claims")[2], re.M)
    doubts = ((find_doubt(claim, names, hidden), claim) for claim in claims)
    return [f"{doubt}: {clip(one_line(claim), 80)}" for doubt, claim in doubts if doubt]


def find_doubt(claim: str, names: set[str], hidden: set[str]) -> str:
    cited = {n for n in RUN_NAME.findall(claim) if n in names or not n.isdecimal()}
    if missing := sorted(cited - names):
        return f"no run is called {', '.join(missing)}"
    is_effect = re.search(r"[-+\u2212]\d*\.\d", claim)
    return "rests on runs inside the noise alone" if cited and cited <= hidden and is_effect else ""


def render_audit(archive: Path, base: Iterable[str], best: Iterable[str], won: float) -> str:
    """Whether validation text that no score used confirms the gain."""
    means = []
    for names in (base, best):
        records = [read_json(archive / name / EVAL) or {} for name in names]
        means.append(numbers(record.get("audit_bpb") for record in records).mean())
    gain = means[0] - means[1]
    if not math.isfinite(gain):
        return ("It is not confirmed: no text but the score's own was scored, for want of validation text (twice "
                "what a score takes is needed).")
    return (f"On validation text that no score used the gain is {gain:.6f}: the search may have fitted "
            f"{max(won - gain, 0):.6f} to the text of the score.")


def render_gain(archive: Path, entries: list[Entry], h: dict) -> str:
    """The paragraph a person can forward. `h`: the history."""
    night = f"{render_counts(h)}, {h['hours']:.2f} h of training"
    if h["gpu_share"]:
        night += f", the GPU at work {h['gpu_share']:.0%} of the time"
    best, lineage = compute_best(entries), h["lineage"]
    if best is None or not lineage:
        return f"{night}. No run is kept yet."
    if lineage[0][0] == best.name:
        return f"{night}. No gain over the first kept run."
    groups, first = compute_groups(entries), next(e for e in entries if e.name == lineage[0][0])
    base = groups[first.group]
    gain = compare_groups(base, groups[best.group], compute_noise(entries))
    won = gain["difference"]
    told = [f"val_bpb went from {mean_bpb(base):.6f} to {best.mean:.6f} ({best.name}), a gain of {won:.6f} "
            f"± {show(gain['standard_error'])} (standard error) over the first kept run, {first.name}: {night}."]
    if h["optimism"]:
        told.append(f"Chosen among equals, the best reads about {h['optimism']:.6f} too low: {h['gain']:.6f} remain.")
    told.append(render_audit(archive, [e.name for e in base], best.names, won))
    return " ".join([*told, *render_kept(entries)])


def render_kept(entries: list[Entry]) -> Iterator[str]:
    effects, subjects = compute_effects(entries), {e.name: read_subject(e)[0] for e in entries if e.status == "keep"}
    for what, is_gain in (("What helped", True), ("Kept besides, and unproven one by one", False)):
        told = []
        for name, effect in effects.items():
            if name in subjects and is_gain == (effect["is_outside"] and effect["difference"] < 0):
                told.append(f"{subjects[name]}: {render_effect(effect)}")
        if told:
            yield f"{what}: {'; '.join(told[:6])}."


def render_tried(entries: list[Entry], effects: dict[str, dict]) -> str:
    """A table of these runs: what was decided, and what came of each."""
    rows = [["run", "val_bpb", "decision", "outcome", "description"]]
    for e in entries:
        rows.append([e.name, show(e.val_bpb), mark_of(e), render_outcome(e, effects), e.description])
    return "\n".join(render_table(rows))


def render_report(book: Book, h: dict, archive: Path, pictures: Iterable[str]) -> str:
    """The morning page for a person: what was gained, by what, and all that was tried."""
    entries = book.entries
    blocks = [
        "# Report" + " on the demo" * any(e.record.get("demo") for e in entries),
        render_gain(archive, entries, h),
        "![](progress.png)",
        "## Effects",
        "\n".join(f"- {line}" for line in render_effects(entries)),
        render_calibration(entries),
        "## Everything tried",
        render_tried(entries, compute_effects(entries)),
        *book.problems,
        "## Pictures of the best run" if pictures else "",
        *(f"![]({name})" for name in pictures),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def render_patch(kept: list[Entry], effects: dict[str, dict], base: Run, best: Run) -> str:
    """Baseline to best as one diff that `git apply` takes, below what was kept."""
    table = render_tried(kept, effects).replace("\n", "\n# ")
    lines = [f"# From {base.name} to {best.name}: git apply best.patch\n# {table}\n"]
    before, after = ({"train.py": r.train_py or ""} | (r.start.get("modules") or {}) for r in (base, best))
    for name, text in after.items():
        lines += diff_file(name, before.get(name), text)
    return "".join(lines)


def diff_file(name: str, before: str | None, after: str) -> list[str]:
    """What `git diff` would print; None: no such file yet. Only newlines end a line, as in git."""
    old, new = ([*io.StringIO(text, newline="\n")] for text in (before or "", after))
    source = "/dev/null" if before is None else f"a/{name}"
    lines = [*difflib.unified_diff(old, new, source, f"b/{name}")]
    if not lines:
        return []
    lines = [line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines]
    return [f"diff --git a/{name} b/{name}\n", "new file mode 100644\n" * (before is None), *lines]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

LOOK = {"font.size": 9, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.alpha": 0.25, "axes.xmargin": 0.01, "legend.frameon": False}
# Okabe and Ito: told apart by colour-blind eyes. This run and the best have the same colour
# everywhere.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999")
MARKS = {  # how progress.png shows a run: marker, colour, colour inside
    "keep": ("o", GREEN, GREEN),
    "keep, unproven": ("o", GREEN, "white"),
    "discard": ("o", GREY, GREY),
    "pending": ("D", ORANGE, ORANGE),
    "hampered": ("s", PURPLE, "white"),
    "stopped": ("|", BLUE, BLUE),
    "crash": ("x", VERMILION, VERMILION),
    "invalid": ("*", "black", "white"),
}
SERIES = {  # of schedule_and_machine.png, and the titles of its panels
    "train/lr_multiplier": "learning rate, share of its peak",
    "train/weight_decay": "weight decay",
    "train/grad_norm": "gradient norm",
    "perf/step_time_ms": "step time, ms",
}
MOST_ROWS = 100  # of a heat map: the names of more can be read on no screen


def new_figure(title: str, *facts: dict, height: float = 7.5, **margins: float) -> Figure:
    """An empty figure, 1200 pixels wide. `facts`, of a run or of runs, tell whether they are the
    demo's. Margins are given, as shares of it: to have them found takes as long as all the
    drawing."""
    import matplotlib.figure

    matplotlib.rcParams.update(LOOK)
    figure = matplotlib.figure.Figure((12, height), dpi=100)
    figure.subplots_adjust(**{"left": 0.06, "right": 0.98, "bottom": 0.08, "top": 0.9, "hspace": 0.2} | margins)
    demo = "demo: " * any(fact.get("demo") for fact in facts)
    figure.suptitle(demo + title, x=0.01, ha="left", fontsize=13)
    return figure


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # letters that the font lacks become boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def draw_runs(axes: Axes, title: str, this: str, curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """x and y by run: every step of this run as a thin line, and means over hundredths of the steps."""
    late: list[float] = []
    for name, (x, y) in curves.items():
        is_known = np.isfinite(x + y)
        x, y = x[is_known], y[is_known]
        label, color = f"best: {name}", ORANGE
        if name == this:
            label, color = f"this: {name}", BLUE
            axes.plot(x, y, color=SKY, lw=0.6, alpha=0.6, zorder=1, label="this, each step")
        size = max(len(x) // 100, 1)
        means = [values[len(x) % size :].reshape(-1, size).mean(axis=1) for values in (x, y)]
        axes.plot(*means, color=color, lw=1.6, label=label)
        late += y[x >= DWARFING * x.max(initial=0.0)].tolist()
    if late:  # the start would flatten the rest, and so would single spikes; what is low is never cut off
        low, high = min(late), np.percentile(late, 99.5)
        room = 0.1 * (high - low) + 1e-3
        axes.set_ylim(low - room, high + 2 * room)
    axes.set_title(title)
    axes.legend()


def draw_loss(run: Run, best: Run | None, windows: list[dict]) -> Figure | None:
    """Training loss by tokens; below it the paired difference to the best, where there is one."""
    curves = {r.name: (r.curve.tokens_m, r.curve.loss) for r in (best, run) if r and r.curve}
    if run.name not in curves:
        return None
    figure = new_figure(f"{run.name}: training loss", run.start)
    heights = [5, 3] if windows else [1]
    panels = figure.subplots(len(heights), squeeze=False, sharex=True, height_ratios=heights).flat
    draw_runs(panels[0], "nats per token", run.name, curves)
    if windows:
        draw_paired(panels[1], windows)
    figure.supxlabel("tokens, millions")
    return figure


def draw_paired(axes: Axes, windows: list[dict]) -> None:
    """Difference to the best by windows; shaded where the text had been seen."""
    table = {key: numbers(w.get(key) for w in windows) for key in windows[0]}
    middles = (table["from_m"] + table["to_m"]) / 2
    pairs = (("tokens", "difference", "error", BLUE), ("progress", "at_progress", "at_progress_error", VERMILION))
    for what, key, error, color in pairs:
        axes.errorbar(middles, table[key], 2 * table[error], fmt="o", color=color, label=f"at equal {what}")
    if repeats := [w["from_m"] for w in windows if w["is_repeat"]]:
        axes.axvspan(repeats[0], windows[-1]["to_m"], color="0.93", label="text seen before: no measure of learning")
    axes.axhline(0, color="black", lw=0.8)
    axes.set_title("this minus best, bpb ± 2 standard errors; below zero is better")
    axes.legend(loc="best", frameon=True)


def draw_schedule_and_machine(run: Run, best: Run | None) -> Figure | None:
    """What is scheduled, what the gradient does and how fast it goes."""
    if run.step_ms is None:
        return None
    figure = new_figure(f"{run.name}: schedules and machine", run.start)
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, SERIES.items(), strict=True):
        curves = {r.name: (100 * r.series("train/progress"), r.series(key)) for r in (best, run) if r}
        draw_runs(axes, title, run.name, curves)
    figure.supxlabel("progress, % of the budget")
    return figure


def draw_layers(run: Run, best: Run | None) -> Figure | None:
    """Two heat maps, over the run and beside the best's late state. None without layers."""
    if not run.looks:
        return None
    mine, theirs = run.looks, best.looks if best else []
    figure = new_figure(f"{run.name}: layers", run.start, height=10, left=0.14, wspace=0.45)
    for axes, kind in zip(figure.subplots(1, 2), ("output RMS", "update/weight"), strict=True):
        axes.set_title(f"{kind}, log10" + f"; right of the gap, the best at {LATE:.0%}" * bool(theirs))
        late = int(LATE * (len(theirs) - 1))  # at the end no weight moves
        draw_heat(axes, kind, mine, theirs[late : late + 1], len(run.records))
    figure.supxlabel("step; grey: zero or not finite")
    return figure


def draw_heat(axes: Axes, kind: str, mine: list[dict], theirs: list[dict], num_steps: int) -> None:
    """Names down, time across, values as colours; then a gap and the best's late state."""
    names = list(dict.fromkeys(name for look in mine for k, name in look if k == kind))
    if not names:
        return
    width = 1 + len(mine) // 25
    columns = [*mine, *[{}] * width, *theirs * width] if theirs else mine
    values = np.array([[look.get((kind, name), math.nan) for look in columns] for name in names])
    values = np.log10(np.where(values > 0, values, math.nan))
    low, high = np.nanpercentile(values, [1, 99])
    extent = (0, num_steps * len(columns) / len(mine), len(names) - 0.5, -0.5)
    image = axes.imshow(values, extent=extent, aspect="auto", interpolation="nearest", vmin=low, vmax=high)
    axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=50)
    axes.set_facecolor("0.85")
    axes.grid(visible=False)
    shown = names if len(names) <= MOST_ROWS else []
    labels = [clip(name.removesuffix(".weight"), 28) for name in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=6.5)


def mark_of(e: Entry) -> str:
    """Which of MARKS a run is shown as: what its verdict calls it, then what was decided."""
    kind = verdict_of(e).get("kind")
    if kind in ("hampered", "stopped"):
        return kind
    if e.status == "keep" and kind in ("unproven", "not better"):
        return "keep, unproven"
    return e.status


def draw_progress(entries: list[Entry], lineage: list[list]) -> Figure:
    """Scores in the order of filing, what the best was at each time, and the largest steps."""
    figure = new_figure("val_bpb over experiments, lower is better", *(e.record for e in entries), right=0.74)
    axes, scores = figure.subplots(), {e.name: e.val_bpb for e in entries if e.is_valid}
    kept = [scores[e.name] for e in entries if e.status == "keep" and e.name in scores]
    low = min(scores.values(), default=1.0)
    high = max([np.percentile([low, *scores.values()], 90), *kept])
    top = high + max(0.1 * (high - low), 0.001 * low)  # neither a bad run nor a single one sets the scale
    axes.axhline(top, color=GREY, ls=":", label="on it: off the scale, or no score")
    for label, (marker, color, inside) in MARKS.items():
        at = [i for i, e in enumerate(entries) if mark_of(e) == label]
        if at:
            heights = [min(scores.get(entries[i].name, top), top) for i in at]
            label = f"{label} ({len(at)})"
            axes.plot(np.add(at, 1), heights, marker, color=color, mfc=inside, zorder=3, label=label)
    if lineage:
        draw_lineage(axes, entries, lineage)
    axes.set_xlabel("experiment")
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_lineage(axes: Axes, entries: list[Entry], lineage: list[list]) -> None:
    """Lines for the baseline and the best; the eight largest steps are told in the margin."""
    number_of = {e.name: i for i, e in enumerate(entries, 1)}
    x, y = [number_of[name] for name, _, _ in lineage], np.minimum.accumulate([mean for _, mean, _ in lineage])
    axes.axhline(y[0], color="black", lw=0.8, ls="--", label=f"baseline, {y[0]:.4f}")
    axes.step([*x, len(entries)], [*y, y[-1]], where="post", color=GREEN, lw=1.8, label=f"best, {y[-1]:.4f}")
    gains, told = np.diff(y, prepend=y[0]), []
    for k, i in enumerate(sorted(i for i in np.argsort(gains)[:8] if gains[i] < 0), 1):
        axes.annotate(str(k), (x[i], y[i]), (4, 5), textcoords="offset points", weight="bold")
        idea = clip(read_subject(entries[x[i] - 1])[0], 80)
        told.append(textwrap.fill(f"{k}  {gains[i]:+.4f}  {idea}", 40, subsequent_indent="    "))
    axes.text(1.02, 0.0, "\n".join(told), transform=axes.transAxes, parse_math=False)


def write_pictures(run: Run, best: Run | None, paired: dict | None) -> tuple[list[str], dict[str, str]]:
    """Names of the pictures made, and why one was not."""
    makers = {
        "loss_curve.png": lambda: draw_loss(run, best, (paired or {}).get("windows") or []),
        "layers.png": lambda: draw_layers(run, best),
        "schedule_and_machine.png": lambda: draw_schedule_and_machine(run, best),
    }
    made, failed = [], {}
    for name, draw in makers.items():
        figure = attempt(failed, name, draw)
        picture = figure and attempt(failed, name, png, figure)
        if picture:
            write_atomic(run.path / name, picture)
            made.append(name)
    return made, failed


# ---------------------------------------------------------------------------------------------------------------------
# File and write: from the working folder into the archive, and the pages there
# ---------------------------------------------------------------------------------------------------------------------

# What the log of a program shows that died before it could write its start file. Without one of
# these the log is of a program that has only just been started, or of something else.
ENDED = re.compile(
    r"crash:|Error:|error:|Exception|Traceback|Interrupt|Killed|Terminated|not found|core dumped|No such file"
)
STARTING_S = 120.0  # importing torch from a cold disk takes a minute


def find_outputs(folder: Path) -> list[Run]:
    """The runs whose outputs lie in the folder, oldest first: none, one, or two.

    Two where the log is of a start that died before it could put the earlier run's files away (a
    syntax error). Outputs without a start file are of a program that died so early, or of one with
    an earlier prepare.py: a summary that the log does not confirm is an older run's."""
    log, start = read_log(folder / LOG) or "", read_json(folder / START)
    summary = read_json(folder / SUMMARY)
    scored = number(parse_closing_block(log).get("val_bpb"))
    runs = []
    if start:
        files, strangers, run_id = [START, METRICS], [], start.get("run_id")
        if summary.get("run_id") in (None, run_id):
            files += [EVAL, SUMMARY]
        else:
            strangers.append(f"{SUMMARY} is of run {summary['run_id']}, not of {run_id}: left out")
        if is_own := not log.strip() or log_run_id(log) == run_id:
            files.append(LOG)
        else:
            strangers.append(f"{LOG} is of another run: left out")
        runs.append(load_folder(folder, files=files, damage=strangers))
        if is_own or log_run_id(log):
            return runs
    elif summary and (not log.strip() or abs((scored or 0) - (number(summary.get("val_bpb")) or 0)) < 2e-6):
        return [load_folder(folder, files=OUTPUTS)]
    if scored is not None or ENDED.search(log):
        runs.append(load_folder(folder, files=[LOG]))
    return sorted(runs, key=lambda run: max(path.stat().st_mtime for path in run.files))


def is_starting(folder: Path) -> bool:
    """Whether the log is of a program started a moment ago that has not yet said what run it is."""
    log = read_log(folder / LOG)
    if log is None or log_run_id(log) or ENDED.search(log) or parse_closing_block(log):
        return False
    return abs(time.time() - (folder / LOG).stat().st_mtime) < STARTING_S


def find_commit(run: Run, folder: Path) -> str | None:
    """The commit a run was trained from; HEAD only for one that cannot say, and is younger."""
    commit = run.start.get("git_commit") or run.summary.get("git_commit")
    if not commit and not run.start and (head := git(folder, "log", "-1", "--format=%H %ct")):
        commit, committed_unix = head.split()
        began_unix = run_start_unix(run) - (number(run.summary.get("total_seconds")) or 0.0)
        if began_unix < int(committed_unix):
            return None
    return commit if re.fullmatch(r"[0-9a-f]{7,40}", commit or "") else None


UNCHANGED = "train.py as it was"  # the description of a run whose commit did not touch its program


def find_origin(run: Run, folder: Path) -> Origin:
    """What a run says it was trained from."""
    commit = find_commit(run, folder)
    if commit is None:
        has_git = git(folder, "rev-parse", "HEAD") is not None
        text = run.start.get("train_py") or (None if has_git else read_text(folder / "train.py"))
        return Origin(f"unknown-{sha256(normal(text) or run.identity)[:7]}", None, text, "(no commit)")
    committed, parent = (git(folder, "show", f"{name}:./train.py") for name in (commit, f"{commit}^"))
    text = run.start.get("train_py") or committed
    subject = one_line(git(folder, "log", "-1", "--format=%s", commit) or "(commit not in this repository)")
    files = ["train.py", *(run.start.get("modules") or {})]
    if git(folder, "show", "-m", "--first-parent", "--format=", "--name-only", commit, "--", *files) == "":
        subject = UNCHANGED  # its own subject is about something else
    if run.start.get("git_dirty") or (committed is not None and normal(text) != normal(committed)):
        return Origin(f"{commit[:7]}-dirty", commit, text, f"{subject} (with uncommitted changes)", committed)
    return Origin(commit[:7], commit, text, subject, parent)


def is_news(run: Run, filed: Entry | None) -> bool:
    """Whether a run is to be filed: not yet, or without the score that it has now."""
    return filed is None or bool(run.summary and not filed.record.get("is_finished"))


def file_run(run: Run, archive: Path, folder: Path, book: Book) -> str:
    """Put the run's files, record and row into the archive. Returns its name.

    The folder appears whole, under its final name, by one rename. A run that was filed before it
    had a score is filed again in its own folder, the record last. A kill in between is mended by
    the next call."""
    origin, old = find_origin(run, folder), book.find(run)
    if origin.description == UNCHANGED and not any(e.is_valid for e in book.entries):
        origin = replace(origin, description="baseline")
    name = old.name if old else first_free(origin.name, lambda name: (archive / name).exists(), ".")
    run = replace(run, name=name, train_py=origin.train_py)
    record = compute_record(run, book.facts, origin)
    note_facts(archive, book, record)
    # Two levels down, where train.py does not take it for archived.
    target = archive / name if old else archive / f".tmp-{os.getpid()}" / name
    target.mkdir(parents=True, exist_ok=True)
    for path in run.files:
        write_atomic(target / path.name, read_text(path, LOG_BYTES if path.name == LOG else None))
        shutil.copystat(path, target / path.name)  # without a start file, its age tells when it was
    if run.train_py is not None:
        write_atomic(target / "train.py", run.train_py)
    if old:
        save_table(archive, [e for e in book.entries if e is not old])
    write_json(target / STATS, {"record": record})
    if not old:
        os.rename(target, archive / name)
        target.parent.rmdir()
    mend_table(archive)
    return name


def note_facts(archive: Path, book: Book, record: dict) -> None:
    """What the archive is of, as its first valid runs say it."""
    if not record["is_finished"] or record["invalid"]:
        return
    begun = {key: record[key] for key in COMPARABLE if record[key] is not None}
    known = {key: value for key, value in book.facts.items() if value is not None}
    if begun.keys() - known.keys():
        write_json(archive / FACTS, {"created_unix": time.time()} | begun | known)


def mend_table(archive: Path) -> Book:
    """The books, and results.tsv as they have it."""
    book = load_book(archive)
    for e in book.entries:
        if e.status != filing_status(e.record):  # edited by hand
            remember_status(archive, e, e.status)
    save_table(archive, book.entries)
    return book


def remember_status(archive: Path, e: Entry, status: str) -> None:
    """In the run's folder, from which a lost row is made again."""
    if e.stats:
        write_json(archive / e.name / STATS, e.stats | {"record": e.stats["record"] | {"status": status}})


def find_unfiled(archive: Path, told: list[str]) -> list[Run]:
    """The runs that a later start put away unanalyzed; one on its way there has a hidden name."""
    found = []
    for path in (archive / "unfiled").glob("[!.]*"):
        lost = ["the next run was started before this one was analyzed: its log is lost"]
        run = load_folder(path, damage=lost * (not (path / LOG).exists()))
        if (run.start or run.summary) and not path.is_symlink():
            found.append(run)
        else:
            told.append(f"unfiled/{path.name} is no readable run: left there")
    return sorted(found, key=lambda run: (run_start_unix(run), run.path.name))


def write_pages(archive: Path) -> None:
    """Write the pages that are missing, as of runs just filed or whose analysis was killed."""
    book, is_new = load_book(archive), False
    if not book.entries:
        return
    for name in [e.name for e in book.entries]:
        this = book.entry(name)
        if "verdict" not in this.stats or not (archive / name / ANALYSIS).exists():
            write_run_pages(archive, book, this)
            book, is_new = load_book(archive), True
        elif this.stats["record"].get("format") != RECORD_FORMAT:  # its page stays: it tells what was decided on
            write_json(archive / name / STATS, this.stats | {"record": this.record})
            is_new = True
    report = archive / "report.md"  # is written last
    is_old = not report.exists() or report.stat().st_mtime_ns < (archive / RESULTS).stat().st_mtime_ns
    if is_new or is_old:
        write_morning(archive, book)


def write_run_pages(archive: Path, book: Book, this: Entry) -> None:
    """Statistics, diff, pictures and analysis of one archived run."""
    before, folder = book.entries[: book.entries.index(this)], archive / this.name
    run, best, best_runs = load_folder(folder, this.name), compute_best(before, this), []
    if best:  # its own run and the newest replicates: five are enough for a mean
        names = [best.name, *[name for name in best.names if name != best.name][-4:]]
        best_runs = [load_folder(archive / name, name) for name in names]
    best_run = best_runs[0] if best_runs else None
    stats = compute_stats(run, this, [*before, this], best_runs)
    diff = diff_lines(best_run.train_py, run.train_py, best_run.name) if best_run else []
    write_atomic(folder / "train.diff", "".join(line if line.endswith("\n") else line + "\n" for line in diff))
    pictures, failed = write_pictures(run, best_run, stats.get("paired"))
    stats["failed"] |= failed
    stats["record"]["name"] = this.name
    write_analysis(folder, render_analysis(stats, pictures))
    write_json(folder / STATS, stats)  # last: a run whose statistics stand has all its pages


def write_morning(archive: Path, book: Book) -> None:
    """progress.png, best.patch and, last, report.md: where it is new, all of them are."""
    best, h = compute_best(book.entries), compute_history(book.entries)
    write_atomic(archive / "progress.png", png(draw_progress(book.entries, h["lineage"])))
    pictures = []
    for picture in ("loss_curve.png", "layers.png", "schedule_and_machine.png"):
        if best and (archive / best.name / picture).exists():
            pictures.append(f"{best.name}/{picture}")
    (archive / "best.patch").unlink(missing_ok=True)
    if h["lineage"] and h["lineage"][0][0] != best.name:
        base, kept = (load_folder(archive / name, name) for name in (h["lineage"][0][0], best.name))
        chain = [book.entry(name) for name, _, _ in h["lineage"]]
        write_atomic(archive / "best.patch", render_patch(chain, compute_effects(book.entries), base, kept))
    write_atomic(archive / "report.md", render_report(book, h, archive, pictures))


# ---------------------------------------------------------------------------------------------------------------------
# Status, and check before a run
# ---------------------------------------------------------------------------------------------------------------------

BASELINE, IDEA = "train the baseline (program.md, step 2)", "the next idea (program.md, step 8)"


def describe_here(archive: Path, folder: Path, book: Book) -> tuple[str, str]:
    """What the outputs in the folder are of, and what is to be done next."""
    if is_running(folder):
        num_steps = len((read_text(folder / METRICS) or "").splitlines())
        return f"run {read_json(folder / START).get('run_id')} is in progress, {num_steps} steps so far", WAIT
    if is_starting(folder):
        return f"a start that has written nothing to {LOG} yet", WAIT
    told, filed = "no run's outputs", None
    for run in find_outputs(folder)[-1:]:
        told = f"run {run.run_id or 'without an id'}"
        if run.start.get("demo", is_demo()) != is_demo():
            told += f" is of {'a real archive' if is_demo() else 'the demo'}, and no part of this one"
        elif not is_news(run, book.find(run)):
            filed = book.find(run)
            told = f"run {filed.name}, filed, {status_shown(filed)}: {clip(filed.description, 80)}"
        elif failure := environment_failure(run):
            told += f" failed over its environment: {clip(failure, 150)}"
            return told, "mend that, then train again"
        else:
            return f"{told} is not filed yet: `{FILE}`", FILE
    return told, compute_next(archive, folder, book, filed)


def compute_next(archive: Path, folder: Path, book: Book, filed: Entry | None) -> str:
    """What to do where every run is filed. `filed`: the one whose outputs lie here."""
    text, committed = read_text(folder / "train.py") or "", git(folder, "show", "HEAD:./train.py")
    best, sha = compute_best(book.entries), sha256(normal(text))
    same = [e for e in book.entries if e.record.get("train_sha256") == sha]
    is_best_elsewhere = best is not None and best.is_kept and book.entry(best.name) not in same
    if not book.entries:
        return BASELINE if (archive / INSIGHTS).exists() else f"{FILE} start"
    if filed in same[-1:] and filed.is_untested and filed.status != "discard":
        return f"{AGAIN}, the idea was not tested: `{train_again(filed.record)}`"
    if filed and filed.status == "pending":
        return f"read {archive / filed.name / ANALYSIS}, then keep or discard {filed.name}"
    if filed in same and filed.status != "keep" and is_best_elsewhere:
        return f"{FILE} discard"
    if committed is not None and normal(text) != normal(committed):
        return "finish that edit (git diff), then check, commit, train"
    if not same:
        return "train (this commit has no run)"
    return BASELINE if best is None else next_idea(book, best, is_best_elsewhere)


def next_idea(book: Book, best: Best, is_best_elsewhere: bool) -> str:
    if len([e for e in book.entries if e.is_valid]) == 1:
        return f"`{RERUN}`: the baseline once more, which measures the noise"
    return f"`{RERUN}` puts the best, {best.name}, here; then {IDEA}" if is_best_elsewhere else IDEA


def compute_live(archive: Path, folder: Path, book: Book, best: Best | None) -> list[str]:
    """How the run in progress here stands: share of the budget, and the difference from the best on
    the same text. It is hopeless where it is further behind than any run of this archive was, at
    that share, that came within the noise in the end; nothing is said in the first quarter, in
    which learning rates and batch sizes mislead."""
    run = load_folder(folder, "this run", [START, METRICS])
    trained_s = number(run.records[-1].get("time/training_s")) if run.records else None
    budget_s = number(run.first_of("time_budget"))
    if not is_running(folder) or best is None or trained_s is None or not budget_s:
        return []
    share = trained_s / budget_s
    line = f"  {share:.0%} of the budget, {max(budget_s - trained_s, 0):.0f} s left before the score"
    best_run = load_folder(archive / best.name, best.name)
    windows = (compute_paired(run, [best_run]) or {}).get("windows")
    if not windows:
        return [line]
    last, theirs = windows[-1], best_run.curve
    line += f"; at equal tokens {last['difference']:+.4f} ± {last['error']:.4f} bpb against {best.name}"
    line += " (other learning rates there)" * last["are_rates_apart"]
    line += f", {compute_tokens(run)[-1] / np.interp(share, theirs.share, theirs.bounds) - 1:+.0%} tokens"
    limit = farthest_behind(book.entries, share)
    if share < 0.25 or limit is None or last["difference"] - 2 * last["error"] <= limit:
        return [line]
    return [line, f"  hopeless: no run that came within the noise was so far behind here ({limit:+.4f} at most): "
                  f"`{FILE} stop` ends it"]


def farthest_behind(entries: list[Entry], share: float) -> float | None:
    """The largest difference from the best, at this share of the budget, of the runs that came
    within two standard errors of it in the end. None with fewer than five such runs."""
    found = []
    for e in entries:
        verdict, paired = verdict_of(e), e.stats.get("paired") or {}
        difference, error = (number(verdict.get(key)) for key in ("difference", "standard_error"))
        if e.is_valid and None not in (difference, error) and difference <= 2 * error:
            windows = [w for w in paired.get("windows") or [] if (number(w.get("progress")) or 0) >= share]
            found += [number(w["difference"]) for w in windows[:1]]
    return max(found) if len(found) >= 5 else None


def find_running(book: Book, folder: Path) -> list[Run]:
    """The runs under way in other folders: those known to this archive, and git's other worktrees."""
    listed = git(folder, "worktree", "list", "--porcelain") or ""
    folders = {e.record.get("folder") for e in book.entries} | set(re.findall(r"^worktree (.+)$", listed, re.M))
    others = sorted(Path(name) for name in folders - {None, str(folder)})
    return [load_folder(path, files=[START]) for path in others if is_running(path)]


def describe_running(run: Run) -> str:
    commit = run.start.get("git_commit") or "unknown"
    subject = git(run.path, "log", "-1", "--format=%s", commit)
    return f"{commit[:7]} in {run.path}: {clip(one_line(subject or 'unknown'), 70)}"


def list_items(text: str) -> list[str]:
    """List items that are not indented, as in the queue and the claims."""
    return ["  " + one_line(item) for item in re.findall(r"^(?:[-*+]|\d+[.)]) +(\S.*)", text, re.M)]


def render_status(names: list[str], archive: Path, folder: Path) -> str:
    """At most STATUS_LINES lines, at the cost of claims; the last says what to do."""
    book = load_book(archive)
    entries, best, history = book.entries, compute_best(book.entries), compute_history(book.entries)
    here, todo = describe_here(archive, folder, book)
    insights, queue = read_text(archive / INSIGHTS) or "", list_items(read_text(archive / QUEUE) or "")
    claims = list_items(insights.partition("## Claims")[2])
    pending, noise = [e.name for e in entries if status_shown(e) == "pending"], compute_noise(entries)
    told = "none yet"
    if best:
        stands_in = " (nothing is kept yet: the first valid run stands in)" * (not best.is_kept)
        told = f"{best.name} val_bpb {best.mean:.6f}, {len(best.names)} run(s){stands_in}: "
        told += book.entry(best.name).description
    lines = ["demo (AUTORESEARCH_DEMO): its archive is its own"] * is_demo()
    lines += [
        f"best: {told}",
        f"noise: sigma {show(noise.sigma)} bpb ({noise.source})",
        f"archive: {render_counts(history)}",
        f"this folder: {here}",
        *compute_live(archive, folder, book, best),
        *(f"under way elsewhere: {describe_running(run)}" for run in find_running(book, folder)),
        f"pending, decide keep or discard: {', '.join(pending[-10:]) or 'none'}",
        *(f"problem: {problem}" for problem in book.problems[:5]),
        "last runs:",
        *(f"  {name}  {show(val)}  {status:8} {idea}" for name, val, status, idea in history["last"]),
        f"queue: {len(queue)} idea(s) in {QUEUE}",
        *queue[:3],
        "effects on val_bpb:",
        *(f"  {line}" for line in render_effects(entries, 10)[:11]),
        *(f"doubtful: {line}" for line in check_insights(insights, entries)[:5]),
        f"claims in {INSIGHTS}: {len(claims)}",
    ]
    room = STATUS_LINES - len(lines) - 1
    if len(claims) > room:
        claims[room - 1 :] = [f"  and {len(claims) - room + 1} more"]
    lines += [*claims, f"next: {todo}"]
    return "".join(clip(printable(line).replace("\n", " "), 160) + "\n" for line in lines)


def command_check(names: list[str], archive: Path, folder: Path) -> str | None:
    """What train.py changes as it lies here; None, and printed, what speaks against training it."""
    text = read_text(folder / "train.py") or ""
    try:
        values = static_config(text)
    except Exception as e:  # whatever an expression in Config raises, and a SyntaxError
        return print(f"train.py does not parse, or a constant of its Config fails: {e!r}")
    book, modules = load_book(archive), imported_modules(folder, text)
    best, faults = compute_best(book.entries), find_repeats(folder, book, program_hash(text, modules=modules))
    faults += find_misfits(folder, book, values)
    changed = git(folder, "status", "--porcelain", "--", "prepare.py", "analyze.py", *modules) or ""
    if changed := ", ".join(sorted(line[3:].strip() for line in changed.splitlines())):
        faults.append(f"changed besides train.py: {changed}; commit what belongs to the idea, undo the rest")
    if faults:
        return print(printable("\n".join(faults)))
    return describe_change(archive, book, best, text, values)


def describe_change(archive: Path, book: Book, best: Best | None, text: str, values: dict) -> str:
    """What a program changes against the best, and which run had its configuration."""
    if best is None:
        return "nothing to compare with: this is the first program"
    config, told = book.entry(best.name).record.get("config", {}), []
    for key, value in values.items():
        if config and not is_seed(key) and value not in (None, config.get(key)):  # None: the program resolves it
            told.append(f"{key} {json.dumps(config.get(key))} -> {json.dumps(value)}")
    added, removed = diff_size(diff_lines(normal(read_text(archive / best.name / "train.py")), normal(text), ""))
    alike = [e for e in book.entries if told and has_configuration(e, values)]
    told = [f"against {best.name}: {', '.join([*told, f'+{added} -{removed} lines of train.py'])}"]
    for e in alike[-1:]:
        result = f"{e.name} scored {show(e.val_bpb)}, {e.status}"
        told.append(f"this configuration, with other code, was trained before: {result}")
    return "\n".join(told)


def has_configuration(e: Entry, values: dict) -> bool:
    """Whether the run's resolved configuration is what these constants say; None is resolved by the program."""
    theirs = e.record.get("config") or {}
    return bool(theirs) and all(v in (None, theirs.get(k)) for k, v in values.items() if not is_seed(k))


def find_misfits(folder: Path, book: Book, values: dict) -> list[str]:
    """What would end the run at its start, or close the archive to it: batch, disk, budget."""
    found = []
    context = re.search(r"^MAX_SEQ_LEN = (?:(\d+) if DEMO else )?(\d+)", read_text(folder / "prepare.py") or "", re.M)
    total, rows = (number(values.get(key)) for key in ("total_batch_size", "device_batch_size"))
    if context and total and rows:
        tokens = rows * int(context[1] if context[1] and is_demo() else context[2])
        if total % tokens:
            found.append(f"total_batch_size {total:.0f} is no multiple of {tokens:.0f}, the tokens of one pass")
    began_s, given_s = number(book.facts.get("time_budget")), os.environ.get("AUTORESEARCH_TIME_BUDGET")
    if began_s and given_s and given_s != f"{began_s:g}":
        found.append(f"AUTORESEARCH_TIME_BUDGET is {given_s}, and this archive's runs trained for {began_s:g} s: "
                     f"unset it, or `{FILE} new-archive`")
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < DISK_GB:
        found.append(f"the disk is nearly full: {free_gb:.1f} GB are free; a run needs {DISK_GB:.0f}")
    return found


def imported_modules(folder: Path, text: str) -> dict[str, str]:
    """The folder's own .py files that a program imports: name to text."""
    names = {f"{name}.py" for name in re.findall(r"^\s*(?:from|import)\s+(\w+)", text, re.M)}
    found = {name: read_text(folder / name) for name in names - {"prepare.py", "analyze.py", "train.py"}}
    return {name: module for name, module in found.items() if module is not None}


def find_repeats(folder: Path, book: Book, program: str) -> list[str]:
    """The newest run of this program, and those under way elsewhere."""
    found, best = [], compute_best(book.entries)
    same = [e for e in book.entries if e.record.get("program") == program]
    for e in same[-1:]:
        is_launch = len(same) == 1 and re.search(LAUNCH, e.record.get("crash") or "", re.I)
        if best and not e.is_untested and not is_launch:  # one failed launch may be the machine's fault
            again = f"; `{RERUN}` runs the best again" * (e.group == best.group)
            result = f"{e.name} scored {show(e.val_bpb)}, {e.status}: {clip(e.description, 60)}"
            found.append(f"this program was trained before: {result}{again}")
    for run in find_running(book, folder):
        if program_hash(run.start.get("train_py"), modules=run.start.get("modules")) == program:
            found.append(f"this program is being trained now: {describe_running(run)}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Commands: each takes the names given with it, the archive and the folder, and returns what is to be printed
# ---------------------------------------------------------------------------------------------------------------------

# From public logs of this experiment on another machine (H100, one run each; noise about 0.001),
# each change on top of earlier ones. Where to look first, not what is true here.
PRIORS = """\
- half the batch (2^18 tokens a step) | more steps pay | -0.012 elsewhere | not better
- depth 9, aspect ratio 57 (width rounds up to 640) | a larger model at the same time | -0.0043 elsewhere | not better
- embedding learning rate 0.6 -> 0.8 | embeddings learn too slowly | -0.0033 elsewhere | not better
- small weight decay on embeddings (0.001), on value embeddings (0.001 to 0.003) | they grow | -0.0017 elsewhere | same
- rotary base 200 000 | positions resolve better | -0.0012 elsewhere | not better
- unembedding learning rate 0.004 -> 0.005 or 0.006 | the head lags | -0.0010 elsewhere | not better
- short window 1/8 of the context instead of 1/2 | faster steps | -0.0009 elsewhere | tokens +, loss worse
- x0_lambda start 0.05 | less of the embedding in every layer | -0.0008 elsewhere | not better
- final_lr_frac 0.05 | learn until the end | -0.0006 elsewhere | not better
- warmdown 0.5 -> 0.7 | longer decay | -0.0006 elsewhere | not better
- initial block weights x 0.7 to 0.8 | calmer start | -0.0006 elsewhere | not better
- said to help elsewhere | depth 12 with batch 2^17, MLP ratio 6, half as many KV heads, Muon beta2 0.99, peak Muon \
momentum 0.90 to 0.93, q-k scale 1.1 to 1.2, hashed bigram value embeddings | ? | not better
- said to hurt elsewhere | tied embeddings, attention and MLP in parallel (+0.012), one KV head (+0.008), value \
embeddings in the last layers only (+0.007), no mask on the cautious decay (+0.005), depth 11 at width 640 (+0.007), \
any warm-up | | better
"""


def command_file(names: list[str], archive: Path, folder: Path) -> str:
    """File whatever is not filed yet and write the pages."""
    with locked(archive):
        told = mend_table(archive).problems
        here = [] if is_running(folder) else find_outputs(folder)
        for run in [*find_unfiled(archive, told), *here]:
            name, said = file_if_new(run, archive, folder)
            if run.path != folder:
                told.append(f"unfiled run {run.path.name} {said}")
                put_away(run.path, archive, is_filed=name is not None)
        write_pages(archive)
    if here and name:
        page = archive / name / ANALYSIS
        verdict = (read_text(page) or "").partition("## Verdict\n")[2].partition("\n\n")[0]
        return "\n".join([*told, said, verdict, f"analysis: {page}"])
    print("".join(f"{line}\n" for line in told), end="")
    if here:
        raise ValueError(said)
    if is_running(folder):
        raise ValueError(f"a run is in progress in {folder}: wait for its end (`{WAIT}`)")
    if not told:
        raise ValueError(f"no run's outputs in {folder}: run `{TRAIN}` there first")
    return ""


def put_away(path: Path, archive: Path, is_filed: bool) -> None:
    """Take a run's folder out of unfiled/ at once: what is filed goes, the rest is kept in failed/."""
    target = archive / f".tmp-{os.getpid()}-{path.name}"
    if not is_filed:
        failed = archive / "failed"
        failed.mkdir(exist_ok=True)
        target = failed / first_free(path.name, lambda name: (failed / name).exists())
    os.rename(path, target)
    if is_filed:
        shutil.rmtree(target)


def file_if_new(run: Run, archive: Path, folder: Path) -> tuple[str | None, str]:
    """A run's name in the archive, None where its environment failed, and what was done."""
    book = load_book(archive)
    filed, failure = book.find(run), environment_failure(run)
    if not is_news(run, filed):
        return filed.name, f"{filed.name} is filed already: nothing changed"
    if failure is None:
        name = file_run(run, archive, folder, book)
        return name, f"filed as {name}"
    failure = failure.removeprefix("error:").strip()
    if run.start and not run.start.get("ended"):  # its log will be gone once the next run has begun
        write_json(run.path / START, run.start | {"ended": f"error: {failure}"})
    return None, f"the environment failed, not the experiment; nothing was filed. {failure}"


def decided_run(names: list[str], folder: Path, book: Book) -> Entry:
    """The run a decision is about: the one named, else the newest whose outputs lie here, else the
    only one pending that was trained here. Never another folder's in a shared archive: its agent
    has yet to decide."""
    if names:
        return book.entry(resolve_name(names[0], [e.name for e in book.entries]))
    if runs := find_outputs(folder):
        if filed := book.find(runs[-1]):
            return filed
        raise ValueError(f"the run in {folder} is not filed yet: `{FILE}`")
    pending = [e for e in book.entries if e.status == "pending"]
    found = [e for e in pending if e.record.get("folder") == str(folder)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{e.name} (trained in {e.record.get('folder')})" for e in pending[-5:])
    raise ValueError(
        f"which run? There is none in {folder} to decide on; pending: {listed or 'none'}; "
        f"name the run you mean: `{FILE} keep RUN` or `discard RUN`"
    )


def set_status(archive: Path, book: Book, this: Entry, status: str) -> None:
    """In the run's folder, from which a lost row is made again, and in its row."""
    remember_status(archive, this, status)
    save_table(archive, [replace(e, status=status) if e is this else e for e in book.entries])
    write_pages(archive)


def command_keep(names: list[str], archive: Path, folder: Path) -> str:
    with locked(archive):
        book = mend_table(archive)
        this = decided_run(names, folder, book)
        if not this.is_valid:
            reasons = this.record.get("invalid") or this.record.get("hampered") or ["it has no score that counts"]
            raise ValueError(f"{this.name} cannot be kept: {'; '.join(reasons)}")
        set_status(archive, book, this, "keep")
        best = compute_best(load_book(archive).entries, this)
    return f"{this.name} kept; the best is {best.name} at {best.mean:.6f} ({len(best.names)} run(s))"


def command_discard(names: list[str], archive: Path, folder: Path) -> str:
    """Refuses, with nothing changed, if a text would be lost."""
    with locked(archive):
        book = mend_table(archive)
        this = decided_run(names, folder, book)
        best = compute_best([replace(e, status="discard") if e is this else e for e in book.entries])
        files = program_files(archive, best.name) if best and best.is_kept else {}
        check_nothing_is_lost(folder, book, files)
        told = f"{this.name} stays {this.status}"
        if this.val_bpb is not None and this.status != "invalid":
            set_status(archive, book, this, "discard")
            told = f"{this.name} discarded"
        known = (None, files.get("train.py"), read_text(archive / this.name / "train.py"))
        if not files:
            done = "no run is kept yet, train.py is left as it is"
        elif normal(read_text(folder / "train.py")) in map(normal, known):
            done = bring_back(files, folder, f"Back to the best, {best.name}, after {this.name}", best.name)
        else:
            done = "train.py has moved on since that run: left as it is"
    return f"{told}; {done}"


def program_files(archive: Path, name: str) -> dict[str, str]:
    """The texts of an archived run's train.py and of the modules that it imported."""
    run = load_folder(archive / name, files=[START, "train.py"])
    if run.train_py is None:
        raise ValueError(f"the archive has no train.py of {name}: restore it by hand")
    modules = run.start.get("modules") or {}
    inside = {file: str(text) for file, text in modules.items() if (Path("/f") / file).resolve().is_relative_to("/f")}
    return {"train.py": run.train_py} | inside


def check_nothing_is_lost(folder: Path, book: Book, files: Iterable[str]) -> None:
    """ValueError if one of these files, here or in git's index, has text that is nowhere else."""
    archived = {sha for e in book.entries for sha in (e.record.get("modules") or {}).values()}
    archived |= {e.record.get("train_sha256") for e in book.entries}
    for file in files:
        texts = {normal(text) for text in (read_text(folder / file), git(folder, "show", f":./{file}"))}
        texts -= {None, normal(git(folder, "show", f"HEAD:./{file}"))}
        if {sha256(text) for text in texts} - archived:
            raise ValueError(
                f"{file} has changes that are neither committed nor archived, and this would lose them: "
                f"put them aside (git stash, then git stash pop) or commit them (git commit {file})"
            )


def bring_back(files: dict[str, str], folder: Path, message: str, name: str) -> str:
    """Put the best's program into the folder and commit it alone. Says what was done."""
    has_git = git(folder, "rev-parse", "HEAD") is not None
    new = [f for f in files if has_git and normal(git(folder, "show", f"HEAD:./{f}")) != normal(files[f])]
    for file, text in files.items():
        if normal(read_text(folder / file)) != normal(text):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / file, text)
    if new:
        who = []
        if git(folder, "var", "GIT_COMMITTER_IDENT") is None:  # as in a container without a home
            who = ["-c", "user.name=auto-log-research", "-c", "user.email=auto-log-research@localhost"]
        options = ["--quiet", "--no-verify", "--no-gpg-sign"]  # nobody is there to answer a prompt
        try:
            git(folder, "add", "--", *new, is_needed=True)
            git(folder, *who, "commit", *options, "-m", message, "--", *new, is_needed=True)
        except ValueError as e:
            raise ValueError(f"train.py is back to that of {name}, but not committed: commit it yourself. {e}") from e
    committed = ", and committed" if new else ", not committed (no git here)" * (not has_git)
    return f"train.py is back to that of the best, {name}{committed}"


def command_compare(names: list[str], archive: Path, folder: Path) -> str:
    return render_compare([load_run(name, archive) for name in names], load_book(archive).entries).rstrip()


def command_start(names: list[str], archive: Path, folder: Path) -> str:
    """A branch for the night, and the agent's two files where they are missing."""
    if git(folder, "rev-parse", "HEAD") is None:
        raise ValueError(f"{folder} has no commit yet: `git init && git add . && git commit -m start`")
    branch = (git(folder, "symbolic-ref", "--quiet", "--short", "HEAD") or "").strip()
    if not branch.startswith("autoresearch/"):
        taken = (git(folder, "for-each-ref", "--format=%(refname:short)", "refs/heads") or "").split()
        tag = names[0] if names else time.strftime("%Y-%m-%d")
        branch = first_free(f"autoresearch/{tag}", taken.__contains__)
        git(folder, "switch", "--create", branch, is_needed=True)
    with locked(archive):
        whence = "From the real run's logs; the demo's sizes are others.\n\n" * is_demo()
        for file, text in ((INSIGHTS, "# Insights\n\n## Claims\n"), (QUEUE, f"# Ideas\n\n{whence}{PRIORS}")):
            if not (archive / file).exists():
                write_atomic(archive / file, text)
    return f"branch {branch}; {INSIGHTS} and {QUEUE} are in {archive}\nnext, the baseline: {TRAIN_BESIDE}"


def command_rerun(names: list[str], archive: Path, folder: Path) -> str:
    """The best's program in place and committed, and the command for a seed it has not had."""
    with locked(archive):
        book = load_book(archive)
        best = compute_best(book.entries)
        if best is None:
            raise ValueError("there is no best to run again: train the baseline first")
        files = program_files(archive, best.name)
        check_nothing_is_lost(folder, book, files)
        done = bring_back(files, folder, f"Run the best, {best.name}, again", best.name)
    offsets = [number(book.entry(name).record.get("seed_offset")) or 0 for name in best.names]
    offset = max(max(offsets) + 1, len(offsets))
    return f"{done}\nnext: AUTORESEARCH_SEED_OFFSET={offset:.0f} {TRAIN_BESIDE}"


def command_stop(names: list[str], archive: Path, folder: Path) -> str:
    """End the run in progress here: ask, then insist. It is filed as stopped, by the next call."""
    start, here = read_json(folder / START), os.uname().nodename
    pid = number(start.get("pid"))
    if not is_running(folder) or pid is None or start.get("host", here) != here:
        raise ValueError(f"no run is in progress in {folder}, on this machine")
    write_json(folder / START, start | {"ended": "stopped: by `analyze.py stop`"})  # mostly, it says itself where
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 15
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), sign)
        while is_running(folder) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not is_running(folder):
            break
    return f"run {start.get('run_id')} has ended: `{FILE}` files it, with its metrics"


def command_new_archive(names: list[str], archive: Path, folder: Path) -> str:
    """Put the archive aside, whole. Its runs are not compared with those to come."""
    if is_running(folder):
        raise ValueError(f"a run is in progress in {folder}: wait for its end (`{WAIT}`), or `{FILE} stop`")
    if not archive.is_dir():
        raise ValueError(f"there is no archive at {archive}: the first run begins one")
    with locked(archive):
        book = load_book(archive)
        for run in find_outputs(folder):
            if (filed := book.find(run)) and filed.is_valid:  # left here, it would be the next one's baseline
                for path in (*run.files, folder / "checkpoint.pt"):
                    path.unlink(missing_ok=True)
        aside = f"{archive.name}.{time.strftime('%Y-%m-%d')}"
        target = archive.with_name(first_free(aside, lambda name: archive.with_name(name).exists()))
        os.rename(archive, target)
        if (target / "night.sh").exists():  # the README's script is no part of a search
            archive.mkdir()
            shutil.copy(target / "night.sh", archive)
    return f"the archive so far is {target}, with its {INSIGHTS} and {QUEUE}; the next run begins a new one"


COMMANDS = {  # with how many names each takes
    None: (command_file, range(1)),
    "keep": (command_keep, range(2)),
    "discard": (command_discard, range(2)),
    "status": (render_status, range(1)),
    "compare": (command_compare, range(1, 100)),
    "check": (command_check, range(1)),
    "start": (command_start, range(2)),
    "rerun": (command_rerun, range(1)),
    "stop": (command_stop, range(1)),
    "new-archive": (command_new_archive, range(1)),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wait", action="store_true", help="first wait for the end of the run here")
    parser.add_argument("command", nargs="?", choices=list(COMMANDS)[1:], help="default: file the run of this folder")
    parser.add_argument("names", nargs="*", help="runs as in results.tsv, or the night's tag")
    given = parser.parse_args(arguments)
    command, num_names = COMMANDS[given.command]
    if len(given.names) not in num_names:
        parser.error(f"{len(given.names)} names are not what {given.command} takes")
    folder = Path.cwd()
    try:
        git(folder, "rev-parse", "--git-dir", is_needed=True)  # a repository that git refuses to read
        while given.wait and (is_running(folder) or is_starting(folder)):
            time.sleep(0.2)
        # What is about the run here follows that run; what is about the search follows the environment.
        is_about_run = given.command in (None, "keep", "discard")
        demo = read_json(folder / START).get("demo") if is_about_run else None
        said = command(given.names, archive_dir(demo), folder)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    if said:
        print(printable(said).rstrip("\n"))
    return 1 if said is None else 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `status | head` ends quietly, as any filter does
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a console that cannot show a subject shows what it can
    sys.exit(main())
