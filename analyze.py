"""File a training run, compute what can be known about it, draw it, and keep the books of a night of experiments.

    uv run analyze.py [--wait]           after `uv run train.py > run.log 2>&1`, finished or crashed (or wait for that)
    uv run analyze.py keep [RUN]         the run of this folder (or RUN) is kept
    uv run analyze.py discard [RUN]      it is not; the best run's train.py is restored and committed
    uv run analyze.py status [--json]    where the search stands, on one page
    uv run analyze.py compare RUN RUN …  archived runs side by side
    uv run analyze.py check              before a run: is this train.py new, and would it run? Exit status 0 or 1
    uv run analyze.py start [TAG]        a branch for the night and the agent's two files, then what to do next
    uv run analyze.py rerun              the best run's train.py, and the command that trains it under another seed
    uv run analyze.py stop               end the run in progress here; it is filed as stopped, with its metrics
    uv run analyze.py new-archive        put the archive aside: for other data, another budget or another prepare.py

Reads, in the current folder: run_start.json, run.log, metrics.jsonl, eval_record.json, run_summary.json.
Writes the archive, .auto-log-research/ or $AUTO_LOG_RESEARCH_DIR (the demo's is demo/ in there): a folder for each run,
results.tsv, insights.md ("Current Best" only), archive.json (what the archive began with); for the morning report.md,
report.html (the same with its pictures), progress.png and best.patch (baseline to best).

The folders are the truth: a run is whatever has one. results.tsv gives each its status and description, and may be
edited; a row that is removed or damaged comes back (to leave a run out, write `discard` or `invalid` as its status).
Of the files in a run's folder, stats.json and the pages can be deleted: the next call makes them again. The agent's own
investigations start with

    from analyze import load_run, load_runs
    load_run("1a2b3c4").metrics          # a pandas DataFrame, one row a step
    load_runs()                          # one row a run; a crash has NaN for every number it does not have

This file is part of the measurement: an archive scores no runs once it, or what prepare.py measures, has changed.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import difflib
import fcntl
import hashlib
import html
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
from functools import cache, cached_property
from pathlib import Path
from statistics import NormalDist
from typing import IO, TYPE_CHECKING

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
BEST_HEADING = "## Current Best"
# The lines that render_current_best writes, whole: any other line in that section is the agent's, and stays.
BEST_LINES = re.compile(
    r"^(?:No run is kept yet\.|- \S+: val_bpb \d+\.\d{6}, (?:one run|mean of \d+ runs \([^)\n]*\))"
    r"|- its change: [^\n]*|- noise between (?:identical runs|seeds of one program): [^\n]*)\r?(?:\n|\Z)",
    re.M,
)
PAGE_LINES, PAGE_BYTES = 60, 5000

# Public logs of this experiment on H100 and H200 show 0.0005 to 0.0014 bpb between seeds in runs of five minutes. It
# counts as two degrees of freedom.
PRIOR_SIGMA = 0.001
PRIOR_WEIGHT = 2
# In standard errors of the difference to the best, as tests/bench_nights.py found them to gain most.
KEEP_ERRORS, KEEP_ERRORS_WITH_CODE, GAIN_ERRORS = 0.5, 1.0, 2.0
RERUN_EVERY = 15  # runs, after which the best is run again: the lowest of many noisy scores reads too low
DWARFING = 0.12  # of the budget: what pictures leave off the scale, because it would flatten the rest

LOG_BYTES = 2**20  # of a log that are read and archived; a real one has 50 KB
STATUS_LINES = 60
LOCK_PATIENCE_S = 5.0  # filing a run takes less than that

# What a summary holds besides the configuration: results, identity, and the machine.
RESULT_KEYS = {
    *("val_bpb", "training_seconds", "total_seconds", "startup_seconds", "eval_seconds", "stats_seconds", "num_steps"),
    *("peak_vram_mb", "mfu_percent", "total_tokens_M", "run_id", "git_commit", "git_dirty", "train_sha256"),
    *("prepare_sha256", "measurement_sha256", "data_fingerprint", "eval_tokens", "seed", "seed_offset", "profile"),
    *("other_gpu_mb", "pauses_over"),
}
KERNEL_KEYS = ("attention_backend", "kernels")
MACHINE_KEYS = ("gpu_name", "torch_version", *KERNEL_KEYS)
# What all runs of an archive share: how it is called, and how to get back to it.
COMPARABLE = {
    "measurement_sha256": ("what prepare.py measures", "undo the change of prepare.py (`git log -p prepare.py`)"),
    "analyze_program": ("analyze.py", "undo the change of analyze.py (`git log -p analyze.py`)"),
    "data_fingerprint": ("the data", "point AUTORESEARCH_CACHE at the data of before"),
    "time_budget": ("the time budget", "train for the budget of before"),
    "eval_tokens": ("the number of tokens scored", "call evaluate_bpb as before"),
    "demo": ("AUTORESEARCH_DEMO", "set it as before"),
}
# Fields used as they are. One of another type is damage: named, and taken for missing. Numbers go through number().
TEXTS = ("run_id", "git_commit", "train_py", "measurement_sha256", "analyze_program", "data_fingerprint", "ended")
FIELD_TYPES = dict.fromkeys((*TEXTS, "host", "finding", *MACHINE_KEYS), str) | {
    "modules": dict,
    "faults": list,
    "demo": bool,
    "git_dirty": bool,
    "causal": bool,
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
KILLED = "killed from outside, or out of time"
KILLED_HELP = "the idea was not tested: train the same commit again; see whether the machine's own memory ran out"
# What a terminal or a page must not receive: escape sequences, control characters, marks that reverse the text.
UNPRINTABLE = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b\[[0-?]*[ -/]*[@-~]?|\x1b.?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)
SWITCH = dict.fromkeys(("", "0", "false", "no", "off"), False) | dict.fromkeys(("1", "true", "yes", "on"), True)


class AnalyzeError(ValueError):
    """Something the caller can mend. The message names what, where, and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Small helpers
# ---------------------------------------------------------------------------------------------------------------------


def is_demo() -> bool:
    value = os.environ.get("AUTORESEARCH_DEMO", "")
    if value.lower() not in SWITCH:
        raise AnalyzeError(f"AUTORESEARCH_DEMO={value} is neither yes nor no: set it to 1, or unset it")
    return SWITCH[value.lower()]


def archive_dir(demo: bool | None = None) -> Path:
    """The archive, or the demo's own inside it (by default as AUTORESEARCH_DEMO says)."""
    archive = Path(os.environ.get("AUTO_LOG_RESEARCH_DIR") or ".auto-log-research").expanduser()
    return archive / "demo" if (is_demo() if demo is None else demo) else archive


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write the whole file or nothing: a reader never sees half of it."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with open(temporary, "wb") as f:
        f.write(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)
        if isinstance(data, str):  # the books must outlive a power cut; a picture can be drawn again
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


def read_text(path: Path) -> str | None:
    """The file's exact text, None where there is no such file. Bytes that are no UTF-8 survive being written back."""
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_log(path: Path) -> str | None:
    """The log, of a very long one both ends. None where there is none."""
    if not path.exists():
        return None
    with open(path, "rb") as f:
        data = f.read(LOG_BYTES)
        if f.read(1):
            f.seek(-LOG_BYTES // 2, os.SEEK_END)
            data = data[: LOG_BYTES // 4] + b"\n[the middle is left out]\n" + f.read()
    return data.decode("utf-8", "surrogateescape")


def printable(text: str) -> str:
    """The text as a terminal or a page may have it: no escape sequences, a question mark for a byte that was no UTF-8,
    a line of its own for what was written over itself."""
    text = text.encode("utf-8", "replace").decode()
    return UNPRINTABLE.sub("", re.sub(r"\r\n?", "\n", text))


def one_line(text: str) -> str:
    return " ".join(printable(text).split())


def normal(text: str | None) -> str | None:
    """A program's text without what git may change when it checks it out: line ends, a byte order mark."""
    return None if text is None else text.removeprefix("\ufeff").replace("\r\n", "\n")


def read_json(path: Path) -> dict | None:
    """A JSON object. None where there is no such file; ValueError names a file that holds anything else."""
    text = read_text(path)
    try:
        value = None if text is None else json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not valid JSON ({clip(str(e), 100)})") from None
    if not isinstance(value, dict | None):
        raise ValueError(f"{path} holds no JSON object")
    return value


def read_fields(path: Path, damage: list[str]) -> dict:
    """A JSON object whose known fields have the right types, empty where there is none. What has not is added to
    `damage`."""
    try:
        value = read_json(path) or {}
    except ValueError as e:
        damage.append(str(e))
        return {}
    for key, kind in FIELD_TYPES.items():
        if not isinstance(value.get(key), kind | None):
            damage.append(f"{path.name}: {key} is {clip(repr(value.pop(key)), 40)}, taken for missing")
    return value


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


def clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def first_free(name: str, is_taken: Callable[[str], bool], mark: str = "-") -> str:
    """The name, or with the lowest number behind it that is not taken."""
    names = itertools.chain([name], (f"{name}{mark}{i}" for i in itertools.count(2)))
    return next(n for n in names if not is_taken(n))


def run_git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """git without hooks, prompts, colors and signatures, whatever its configuration says, and in English."""
    quiet = {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0", "GIT_EDITOR": "true", "LC_ALL": "C"}
    options = ["-c", "core.hooksPath=/dev/null", "-c", "log.showSignature=false", "-c", "color.ui=false"]
    command = ["git", "-C", str(folder), *options, *arguments]
    try:
        return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, env=os.environ | quiet)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, b"", b"not a git repository: git is not installed")


def git(folder: Path, *arguments: str) -> str | None:
    """What git printed, None where it failed: no git, no repository, no such commit."""
    done = run_git(folder, *arguments)
    return done.stdout.decode("utf-8", "surrogateescape") if done.returncode == 0 else None


def check_git(folder: Path) -> None:
    """AnalyzeError with git's own reason where there is a repository that git refuses to read."""
    done = run_git(folder, "rev-parse", "--git-dir")
    if done.returncode and b"not a git repository" not in done.stderr:
        raise AnalyzeError(f"git cannot read this repository: {one_line(done.stderr.decode(errors='replace'))}")


def git_commit(folder: Path, message: str, files: list[str]) -> None:
    """Commit these files and no others. Without hooks and signing: nobody is there to answer a prompt."""
    run_git(folder, "add", "--", *files)
    who = []
    if git(folder, "var", "GIT_COMMITTER_IDENT") is None:  # as in a container without a home
        who = ["-c", "user.name=auto-log-research", "-c", "user.email=auto-log-research@localhost"]
    done = run_git(folder, *who, "commit", "--quiet", "--no-verify", "--no-gpg-sign", "-m", message, "--", *files)
    if done.returncode:
        said = one_line((done.stderr + done.stdout).decode(errors="replace"))
        raise AnalyzeError(f"git would not commit it: {clip(said, 300)}")


def try_lock(file: IO, how: int) -> bool:
    """Lock an open file, unless another process has it. The kernel lets go when that one dies, however it dies."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_running(folder: Path) -> bool:
    """Whether a run is under way there: it holds a lock on its metrics for its whole life. Asking takes the lock for
    an instant."""
    try:
        with open(folder / METRICS, "rb") as f:
            return not try_lock(f, fcntl.LOCK_SH)
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextlib.contextmanager
def locked(archive: Path) -> Iterator[None]:
    """Hold the archive alone. Whoever holds it for long is named, and waited for."""
    archive.mkdir(parents=True, exist_ok=True)
    with open(archive / ".lock", "a+") as lock:
        told_at = time.monotonic() + LOCK_PATIENCE_S
        while not try_lock(lock, fcntl.LOCK_EX):
            if time.monotonic() > told_at:
                print(f"waiting for {archive}, held by {one_line(read_text(archive / '.lock'))}", file=sys.stderr)
                told_at = math.inf
            time.sleep(0.02)
        lock.truncate(0)
        print(f"process {os.getpid()} on {os.uname().nodename}: {' '.join(sys.argv)[:200]}", file=lock, flush=True)
        for path in [*archive.glob(".tmp-*"), *archive.glob("*/.tmp-*")]:  # of a process that was killed
            if path.parent.name not in ("unfiled", "demo"):  # where others write without this lock
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if not (archive / ".gitignore").exists():
            write_atomic(archive / ".gitignore", "*\n")
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Load: one run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one run left. A run that crashed has an empty summary and no evaluation; one that died before it could
    begin has no `start`. `damage` names what could not be read; `files` are those of its folder that are its own."""

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

    @cached_property
    def stats(self) -> dict:
        """What the analysis computed, empty before it ran."""
        return read_json(self.path / STATS) or {}

    @property
    def step_ms(self) -> float | None:
        """Median step time."""
        steps_ms = self.series("perf/step_time_ms")
        return float(np.nanmedian(steps_ms)) if np.isfinite(steps_ms).any() else None

    def records_with(self, key: str) -> list[dict]:
        """The records of the steps at which this list was logged, as layer statistics are."""
        return [r for r in self.records if isinstance(r.get(key), list)]

    @property
    def scalars(self) -> dict[str, list[list]]:
        """Name to lists of values, one of each step that logged it, of the residual scalars and the like, by name."""
        keys = sorted({k for r in self.records for k in r if k.startswith("scalars/")})
        return {k.removeprefix("scalars/"): [r[k] for r in some] for k in keys if (some := self.records_with(k))}

    def series(self, key: str) -> np.ndarray:
        """One metric over the steps, float, NaN where a step lacks it."""
        return numbers(r.get(key) for r in self.records)

    def first_of(self, key: str) -> object:
        """A field from the evaluation, the summary or the start, in that order; None where none has it."""
        found = (part.get(key) for part in (self.evaluation or {}, self.summary, self.start))
        return next((value for value in found if value is not None), None)

    @property
    def run_id(self) -> str | None:
        return self.start.get("run_id") or self.summary.get("run_id") or log_run_id(self.log)

    @cached_property
    def identity(self) -> str:
        """What makes this run this run: its id, or where it has none, the contents it left and when."""
        if self.run_id:
            return f"run:{self.run_id}"
        written_ns = [path.stat().st_mtime_ns for path in self.files if path.name == LOG]
        return "contents:" + sha256(json.dumps([self.summary, self.records[-1:], self.log, written_ns]))[:16]


def parse_metrics(text: str) -> tuple[list[dict], list[str]]:
    """The records of a metrics.jsonl and the damage, if any. A last line cut short, as a kill leaves it, is none."""
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
    if not bad:
        return records, []
    return records, [f"{METRICS}: {len(bad)} damaged line(s) left out (line {clip(', '.join(bad), 40)})"]


def parse_closing_block(log: str | None) -> dict:
    """The closing `key: value` block of a finished run, numbers where they are numbers; empty if there is none."""
    values: dict = {}
    for key, value in re.findall(r"^(\w+):\s+(\S+)\s*$", (log or "").rpartition("\n---\n")[2], re.M):
        is_number = re.fullmatch(r"-?\d{1,15}(\.\d+)?", value)
        values[key] = float(value) if is_number else value
    return values if number(values.get("val_bpb")) is not None else {}


def log_run_id(log: str | None) -> str | None:
    """The run a log says it is of: every program that loads the data prints `run <id>`."""
    found = re.search(r"^run (\S+)\s*$", log or "", re.M)
    return found[1] if found else None


def load_folder(folder: Path, name: str = "", files: Iterable[str] | None = None) -> Run:
    """The run whose files lie in `folder`; `files` limits it to those that are this run's."""
    damage: list[str] = []
    own = {file: folder / file for file in files or (*OUTPUTS, "train.py") if (folder / file).exists()}
    start, summary, evaluation = (read_fields(own[f], damage) if f in own else {} for f in (START, SUMMARY, EVAL))
    log = printable(read_log(own[LOG])) if LOG in own else None
    if not summary and (summary := parse_closing_block(log)):  # a program that writes none, or one that was lost
        damage.append(f"{SUMMARY} is missing: the closing block of {LOG} stands in")
    records, bad_lines = parse_metrics(read_text(own[METRICS])) if METRICS in own else ([], [])
    train_py = start.get("train_py") or (read_text(own["train.py"]) if "train.py" in own else None)
    remarks = (*damage, *bad_lines)
    return Run(name, folder, start, summary, evaluation or None, records, log, train_py, remarks, (*own.values(),))


def load_run(name: str, archive: Path | None = None) -> Run:
    """An archived run by its name in the first column of results.tsv; a prefix will do where it fits one run only."""
    archive = archive or archive_dir()
    name = resolve_name(name, [path.name for path in run_folders(archive)])
    return load_folder(archive / name, name)


def resolve_name(wanted: str, names: list[str]) -> str:
    if wanted in names:
        return wanted
    fits = [n for n in names if n.startswith(wanted) or (len(wanted) > 7 and n == wanted[:7])]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise AnalyzeError(f"{wanted!r} fits {len(fits)} runs: {', '.join(fits[:6])}: name one of them in full")
    raise AnalyzeError(f"no archived run is called {wanted!r}: `uv run analyze.py status` and {RESULTS} list them")


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
    """A run in the books: its row of results.tsv, whose status and description hold, so that they can be edited, and
    its record, whose score counts whatever the row says. `stats`: the rest of what its analysis computed."""

    name: str
    status: str
    description: str
    record: dict = field(repr=False)
    stats: dict = field(repr=False, default_factory=dict)
    row: str = ""

    @property
    def val_bpb(self) -> float | None:
        """The score; None for a crash, whatever its row says."""
        return None if self.status == "crash" else number(self.record.get("val_bpb"))

    @property
    def is_valid(self) -> bool:
        """Whether the score may be compared: finished, nothing wrong with it, and not called invalid by hand."""
        flaws = self.record.get("invalid") or self.record.get("hampered") or self.status in ("crash", "invalid")
        return self.val_bpb is not None and not flaws

    @cached_property
    def group(self) -> tuple:
        """Equal for replicates: the same program and resolved configuration but for the seed, on the same data and
        GPU. Comments and formatting do not count."""
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


def read_row(line: str, records: dict[str, dict], entries: dict[str, Entry]) -> Entry:
    """The entry that a line of results.tsv is about. ValueError says why it is about none, or about one of those that
    earlier lines gave."""
    cells = [cell.strip() for cell in line.split("\t", 4)]
    if len(cells) != 5:
        raise ValueError(f"{len(cells)} columns where five are due")
    name, _, _, status, description = cells
    if name not in records:
        raise ValueError(f"no files of a run {clip(name, 40)!r} in the archive")
    if name in entries:
        raise ValueError(f"a second row of {name}")
    if status not in STATUSES:
        raise ValueError(f"status {clip(status, 40)!r} is none of {', '.join(STATUSES)}")
    return Entry(name, status, one_line(description), records[name], row=line.rstrip("\n") + "\n")


def format_row(name: str, record: dict, status: str, description: str) -> str:
    """A line as upstream writes it: a crash has zeros. A number that is not known is `nan`."""
    val, memory = record.get("val_bpb"), record.get("memory_gb")
    val, memory = (math.nan if x is None else x for x in (val, memory))
    cells = ["0.000000", "0.0"] if status == "crash" else [f"{val:.6f}", f"{memory:.1f}"]
    return "\t".join([name, *cells, status, one_line(description)]) + "\n"


def read_stats(folder: Path) -> dict:
    """A run's stats.json, empty where it is missing or damaged."""
    try:
        return parse_stats(folder / STATS, (folder / STATS).stat().st_mtime_ns)
    except (ValueError, OSError):
        return {}


@cache
def parse_stats(path: Path, written_ns: int) -> dict:
    """Each version of a file is parsed once a call: the books are read several times while a run is filed."""
    stats = read_json(path) or {}
    record = stats.get("record")
    return stats if isinstance(record, dict) and isinstance(record.get("identity"), str) else {}


def load_records(archive: Path, facts: dict, problems: list[str]) -> dict[str, dict]:
    """Name to record of every run; worked out again where it is lost. A copy of a run's folder is no second run."""
    records = {}
    for folder in run_folders(archive):
        record = read_stats(folder).get("record")
        records[folder.name] = record or compute_record(load_folder(folder, folder.name), facts, Origin(folder.name))
    names: dict[str, str] = {}
    for name in sorted(records, key=lambda name: records[name].get("name", name) != name):
        first = names.setdefault(records[name]["identity"], name)
        if first != name:
            problems.append(f"{name} is a copy of {first}: left out")
            del records[name]
    return records


def load_book(archive: Path) -> Book:
    """Rows and records joined. A line that is no row of a run is named and left out; a run without a row has one made
    of its record, before those that started later."""
    problems: list[str] = []
    facts = read_fields(archive / FACTS, problems)
    records = load_records(archive, facts, problems)
    entries: dict[str, Entry] = {}
    for i, line in enumerate((read_text(archive / RESULTS) or "").splitlines(keepends=True), 1):
        if line.strip("\0 \r\n") and not line.startswith("commit\t"):
            try:
                this = read_row(line, records, entries)
            except ValueError as e:
                problems.append(f"{RESULTS} line {i}: {e}: not counted")
                continue
            entries[this.name] = this
            said = line.split("\t")[1].strip()
            if this.val_bpb is not None and said != f"{this.val_bpb:.6f}":
                problems.append(f"{RESULTS} line {i}: {said} is not what {this.name} scored: {this.val_bpb:.6f} counts")
    ordered = add_missing_rows([*entries.values()], records, problems)
    return Book([replace(e, stats=read_stats(archive / e.name)) for e in ordered], problems, facts)


def add_missing_rows(entries: list[Entry], records: dict[str, dict], problems: list[str]) -> list[Entry]:
    booked = {e.name for e in entries}
    for name in sorted(records.keys() - booked, key=lambda name: started_unix(records[name])):
        record = records[name]
        status, description = filing_status(record), record.get("description") or ""
        new = Entry(name, status, description, record, row=format_row(name, record, status, description))
        later = [i for i, e in enumerate(entries) if started_unix(e.record) > started_unix(record)]
        entries.insert(later[0] if later else len(entries), new)
        problems.append(f"{name} had no row in {RESULTS}: added, as {status}")
    return entries


def started_unix(record: dict) -> float:
    return number(record.get("started_unix")) or 0.0


def save_table(archive: Path, entries: list[Entry]) -> None:
    """results.tsv, rows that were not touched byte for byte as they were."""
    text = HEADER + "\n" + "".join(e.row for e in entries)
    if entries and text != read_text(archive / RESULTS):
        write_atomic(archive / RESULTS, text)


def load_runs(archive: Path | None = None) -> pd.DataFrame:
    """All runs in the order of results.tsv: the five columns, facts of the run, and its configuration under its own
    keys. Numbers a run does not have (the score of a crash, say) are NaN."""
    import pandas as pd

    rows = []
    for e in load_book(archive or archive_dir()).entries:
        first = [e.name, e.val_bpb, e.record.get("memory_gb"), e.status, e.description, e.is_valid]
        row = dict(zip([*HEADER.split("\t"), "is_valid"], first, strict=True))
        facts = {k: v for k, v in e.record.items() if not isinstance(v, dict | list)}
        rows.append(row | e.record.get("config", {}) | facts | row)
    frame = pd.DataFrame(rows, columns=None if rows else [*HEADER.split("\t"), "is_valid"])
    for column in frame.columns:
        if all(v is None or number(v) is not None for v in frame[column]):
            frame[column] = frame[column].astype(float)
    return frame


# ---------------------------------------------------------------------------------------------------------------------
# Compute: which program a run is
# ---------------------------------------------------------------------------------------------------------------------

SEEDING = ("manual_seed", "manual_seed_all", "seed", "seed_all", "default_rng", "RandomState", "set_seed", "PRNGKey")


class _Functional(ast.NodeTransformer):
    """Drops docstrings and, on request, the seed in whatever form it is given: what is assigned or passed to a name
    that is called seed, arguments of functions that take one, and what is added to one. `hide_config`: and the
    constants of the class Config and what is passed to it or replaced in it."""

    def __init__(self, hide_seed: bool, hide_config: bool):
        self.hide_seed, self.hide_config = hide_seed, hide_config

    def generic_visit(self, node: ast.AST) -> ast.AST | None:
        super().generic_visit(node)
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                node.body = node.body[1:] or [ast.Pass()]
        if self.hide_config and isinstance(node, ast.ClassDef) and node.name == "Config":
            node.body = [part for part in node.body if config_constant(part) is None] or [ast.Pass()]
        if self.hide_config and isinstance(node, ast.Call) and name_of(node.func) in ("Config", "replace"):
            node.keywords = [k for k in node.keywords if not is_literal(k.value)]
        return self.without_seed(node) if self.hide_seed else node

    def without_seed(self, node: ast.AST) -> ast.AST | None:
        if isinstance(node, ast.Call):
            node.keywords = [k for k in node.keywords if not is_seed(k.arg)]
            if name_of(node.func) in SEEDING:
                node.args = []
            if name_of(node.func) == "replace" and len(node.args) == 1 and not node.keywords:
                return node.args[0]
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(is_seed(name_of(target)) for target in targets):
                return ast.Assign(targets, ast.Constant(0), lineno=0)
            if ast.unparse(node.value) == ast.unparse(targets[0]):
                return None  # CONFIG = replace(CONFIG, seed=7) does nothing else
        elif isinstance(node, ast.AugAssign) and is_seed(name_of(node.target)):
            return None
        elif isinstance(node, ast.BinOp) and isinstance(node.right, ast.Constant) and is_seed(name_of(node.left)):
            return node.left
        return node


def name_of(node: ast.AST) -> str:
    """The last part of a name: `seed` of `seed`, `config.seed` and `config["seed"]`."""
    key = getattr(getattr(node, "slice", None), "value", None)
    return getattr(node, "id", getattr(node, "attr", key if isinstance(key, str) else ""))


def is_seed(name: str | None) -> bool:
    return name is not None and (name.lower() == "seed" or name.lower().endswith("_seed"))


def program_hash(
    text: str | None, hide_seed: bool = True, modules: dict | None = None, hide_config: bool = False
) -> str | None:
    """Equal for programs that do the same: comments, formatting, docstrings and (by default) the seed do not count.
    `modules` are the files beside the program that it imports, by name."""
    if text is None:
        return None
    hashes = []
    for name, source in [("", text), *sorted((modules or {}).items())]:
        source = normal(str(source))
        try:
            source = ast.unparse(_Functional(hide_seed, hide_config).visit(ast.parse(source)))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            source = "not a program\n" + source
        hashes.append(name + sha256(source))
    return sha256("\n".join(hashes))[:16]


def configuration(summary: dict) -> dict:
    """The resolved configuration in a summary: everything but results, which are known by name or by their unit."""
    others = RESULT_KEYS.union(MACHINE_KEYS)
    return {k: v for k, v in summary.items() if k not in others and not k.endswith(("_seconds", "_ms", "_mb"))}


@cache
def analyze_program() -> str:
    """Of this file; lines of comment do not count. To parse it for the same takes half a second."""
    return sha256(re.sub(r"^\s*(#.*)?\n", "", Path(__file__).read_text(encoding="utf-8"), flags=re.M))[:16]


def static_config(text: str) -> dict:
    """The configuration as it can be read without running the program: the constants of the class Config, and those
    that are passed to it."""
    found: dict[str, ast.expr] = {}
    for node in ast.walk(ast.parse(normal(text))):
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            found = {name: part.value for part in node.body if (name := config_constant(part))} | found
        elif isinstance(node, ast.Call) and name_of(node.func) in ("Config", "replace"):
            found |= {k.arg: k.value for k in node.keywords if k.arg and is_literal(k.value)}
    values = {name: eval(ast.unparse(value), {"__builtins__": {}}) for name, value in found.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def config_constant(node: ast.AST) -> str | None:
    """The name in a line such as `depth: int = 2**3`."""
    if isinstance(node, ast.AnnAssign) and node.value and is_literal(node.value):
        return name_of(node.target)
    return None


def is_literal(node: ast.AST) -> bool:
    """Whether an expression is made of numbers and texts alone, like 2**19."""
    operators = ast.BinOp | ast.UnaryOp | ast.operator | ast.unaryop
    allowed = ast.Constant | ast.Tuple | ast.List | ast.expr_context | operators
    return all(isinstance(part, allowed) for part in ast.walk(node))


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


def compute_comparable(run: Run) -> dict:
    """What must be the same in all runs of an archive, None where the run does not say."""
    values = {key: run.first_of(key) for key in COMPARABLE}
    values["time_budget"] = number(values["time_budget"])
    values["eval_tokens"] = number(values["eval_tokens"]) or number((run.evaluation or {}).get("tokens"))
    return values | {"analyze_program": analyze_program()}


def compute_invalid(run: Run, facts: dict) -> list[str]:
    """Why a finished run's score must not be compared, each reason with what can be done; empty for a valid run."""
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
                           "(`uv run analyze.py new-archive`)")
    return reasons + compute_clock_faults(run)


def compute_clock_faults(run: Run) -> list[str]:
    """The last step may run over the budget by its own length, which is a thousandth of it and on a slow CPU a
    twentieth; a step of more than a fifth of the budget trains longer than others may."""
    budget_s, clocked_s = number(run.summary.get("time_budget")), number(run.summary.get("training_seconds"))
    if not budget_s or clocked_s is None:
        return []
    steps_s = run.series("perf/step_time_ms")[-20:] / 1e3
    step_s = float(np.nanmax(steps_s)) if np.isfinite(steps_s).any() else 0.01 * budget_s
    over_s = clocked_s - budget_s
    if abs(over_s) > step_s + 0.1:  # summaries round to a tenth of a second
        return [f"trained {clocked_s:.1f} s on a budget of {budget_s:.1f} s, off by more than a step: end on the clock"]
    if over_s > 0.2 * budget_s:
        return [f"the last step ran {over_s:.1f} s past a budget of {budget_s:.1f} s: make steps shorter"]
    return []


def compute_evaluation_faults(record: dict, val_bpb: float | None) -> list[str]:
    """What evaluate_bpb found at fault, and what does not fit together."""
    faults = [one_line(str(fault)) for fault in record.get("faults") or []]
    scored, nats, num_bytes = (number(record.get(k)) for k in ("val_bpb", "nats", "bytes"))
    if scored is None or val_bpb is None or abs(scored - val_bpb) > 2e-6:  # both are rounded to six decimals
        faults.append(f"the summary says val_bpb {show(val_bpb)}, the evaluation record {show(scored)}: train it again")
    if scored is not None and nats and num_bytes and abs(nats / (math.log(2) * num_bytes) - scored) > 2e-6:
        given = nats / (math.log(2) * num_bytes)
        faults.append(f"the evaluation record's nats and bytes give {given:.6f}: leave {EVAL} to evaluate_bpb")
    finding = f" ({record['finding']})" if record.get("finding") else ""
    if record.get("causal") is False and not record.get("faults"):
        faults.append(f"the causality test failed: predictions depend on later tokens{finding}; look for what mixes "
                      "positions: attention without its mask, a shift, a norm over the sequence")
    elif record.get("causal") is None and not record.get("faults"):
        faults.append(f"whether the model looks ahead could not be tested{finding}: make it repeatable in evaluation")
    if (number(record.get("num_calls")) or 0) > 1:
        faults.append(f"evaluation was called {record['num_calls']} times: call it once, at the end")
    return faults


def compute_record(run: Run, facts: dict, origin: Origin) -> dict:
    """What the books keep of a run: identity, program, configuration and the few numbers that history needs."""
    s, config = run.summary, configuration(run.summary)
    ended = str(run.start.get("ended") or "")
    is_stopped = not s and ended.startswith("stopped")
    crash = None if s or is_stopped else compute_crash(run)
    modules = run.start.get("modules") or {}
    started, elapsed_s = run_start_unix(run), number(s.get("total_seconds")) or compute_elapsed(run)
    return {
        "identity": run.identity,
        "name": run.name,
        "folder": str(run.path),
        "description": origin.description,
        "git_commit": origin.commit or run.first_of("git_commit"),
        "started_unix": started,
        "ended_unix": started + elapsed_s if started and elapsed_s else None,
        "is_finished": bool(s),
        "invalid": compute_invalid(run, facts) if s else [],
        "crash": crash and crash["reason"],
        "was_killed": bool(crash) and crash["is_killed"],
        "stopped": ended if is_stopped else None,
        "val_bpb": number(s.get("val_bpb")),
        "memory_gb": None if (peak_mb := number(s.get("peak_vram_mb"))) is None else peak_mb / 1024,
        "train_sha256": sha256(normal(run.train_py)) if run.train_py else None,
        "modules": {name: sha256(normal(str(text))) for name, text in modules.items()},
        "program": program_hash(run.train_py, modules=modules),
        "program_and_seed": program_hash(run.train_py, hide_seed=False, modules=modules),
        "code": program_hash(run.train_py, modules=modules, hide_config=True),
        "seed": number(s.get("seed")),
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
    """Seconds for which nothing ran in a run's folder before it, by name; the first run of a night has none.

    Nights lie apart by two hours: no pause within a night is that long, and none between two is shorter."""
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
    busy_s = sum(e.record["ended_unix"] - e.record["started_unix"] for e in entries if e.record.get("ended_unix"))
    return busy_s / (busy_s + sum(idle.values())) if idle and busy_s > 0 else None


def log_lines(log: str | None) -> list[str]:
    """The last lines of a log that hold anything."""
    return [line.rstrip() for line in (log or "")[-100_000:].split("\n") if line.strip()]


def environment_failure(run: Run) -> str | None:
    """The line that shows that the machine or its set-up failed, None if the experiment itself ended."""
    ended, lines = str(run.start.get("ended") or ""), log_lines(run.log)
    if run.summary or ended.startswith("stopped"):
        return None
    for line in (ended, *lines[-3:]):
        if line.startswith("error:"):
            return line
    return next((line.strip() for line in [*lines[:-41:-1], ended] if ENVIRONMENT_SIGNS.search(line)), None)


def compute_crash(run: Run) -> dict:
    """Why a run without a summary ended: `reason`, the one line of the exception, the last frames in the program's own
    files, known `cause` and `help`, last step and loss."""
    lines, loss = log_lines(run.log), run.series("train/loss")
    end = "\n".join(lines[-60:])
    said = re.findall(r"^crash: *(.+)", f"{run.start.get('ended')}\n{end}", re.M)
    raised = re.findall(r"^[\w.]*(?:Error|Exception|Interrupt)\b.*", end, re.M)
    # torch.compile tells what really happened in the middle of an explanation.
    inner = re.findall(r"\bgot (\w*Error\(.*\))", end)
    reason = next((found[-1] for found in (inner, said, raised) if found), None)
    crash = {
        "reason": reason or ("the log just stops: killed" if lines else "no log was kept"),
        "exception": raised[-1] if raised and raised[-1] not in (reason or "") and not inner else None,
        "frames": find_frames(lines, run.start.get("modules") or {}),
        "cause": None,
        "help": None,
        "is_killed": reason is None,
        "last_step": number(run.records[-1].get("step")) if run.records else None,
        "last_loss": number(loss[-1]) if len(loss) else None,
        "elapsed_s": compute_elapsed(run),
    }
    if reason is None:
        return crash | {"cause": KILLED, "help": KILLED_HELP}
    for cause, signs, helps in CRASH_CAUSES:
        if re.search(signs, reason, re.I):
            return crash | {"cause": cause, "help": helps}
    return crash


def find_frames(lines: list[str], modules: dict) -> list[str]:
    """The last two frames of the last traceback that lie in the program's own files, each with its line of code."""
    own, frames = {"train.py", "<string>", *(Path(m).name for m in modules)}, []
    start = max((i for i, line in enumerate(lines) if line.startswith("Traceback")), default=0)
    for i, line in enumerate(lines[start:], start):
        found = re.match(r'\s*File "([^"]+)", line (\d+)(?:, in (\S+))?', line)
        if found and Path(found[1]).name in own:
            code = lines[i + 1].strip() if i + 1 < len(lines) else ""
            where = f" in {found[3]}" if found[3] else ""
            frames.append(f"{Path(found[1]).name} line {found[2]}{where}: `{code}`")
    return frames[-2:]


# ---------------------------------------------------------------------------------------------------------------------
# Compute: noise, best, verdict
#
# A score is its program's true value plus noise of standard deviation sigma: another seed, another order of floating
# point sums. What is decided: keep or not (KEEP_ERRORS), and what is claimed: a gain, or none yet (GAIN_ERRORS). The
# two are apart because their costs are: a false keep is nearly as good as what it replaces and is put right by the
# next, a false discard loses its gain for good. tests/bench_nights.py simulates nights with known truth through these
# functions and prints what each rule gains and how many of its keeps and claims are false.
# ---------------------------------------------------------------------------------------------------------------------

# Two runs can be compared where none of these is known to differ.
KIND_KEYS = ("time_budget", "data_fingerprint", "eval_tokens", "measurement_sha256", "demo", "gpu_name")
# Student's t, two-sided 95 %, by degrees of freedom: the bar where no prior supports a measured sigma.
STUDENT_T = {1: 12.7, 2: 4.3, 3: 3.2, 4: 2.8, 5: 2.6, 6: 2.4, 7: 2.4, 8: 2.3, 9: 2.3}


@dataclass(frozen=True)
class Noise:
    """Standard deviation of val_bpb between seeds of one program, in bpb; None where nothing tells it."""

    sigma: float | None
    freedom: int  # of the replicates: what was measured here
    measured: float | None
    has_prior: bool

    @property
    def source(self) -> str:
        if self.sigma is None:
            return "run the baseline again first"
        prior = f"prior of the five-minute run: {PRIOR_SIGMA:.6f}, counted as {PRIOR_WEIGHT}"
        if self.measured is None:
            return f"{prior}; no other seed was run yet"
        measured = f"measured {self.measured:.6f} with {self.freedom} degree(s) of freedom"
        return f"{measured}; {prior}" if self.has_prior else measured

    @property
    def claim_errors(self) -> float:
        """Standard errors from which on a difference is claimed: with few degrees of freedom and no prior, more."""
        if self.has_prior:
            return GAIN_ERRORS
        return STUDENT_T.get(self.freedom, 2.2)


def describe_noise(noise: Noise) -> str:
    if noise.sigma is None:
        return f"unknown: {noise.source}"
    return f"sigma {noise.sigma:.6f} bpb ({noise.source})"


@dataclass(frozen=True)
class Best:
    """The group of replicates with the lowest mean among those of which one is kept."""

    name: str  # the first one kept: its train.py is the one to go back to
    mean: float  # each seed counts once
    names: tuple[str, ...]
    group: tuple
    is_kept: bool  # False: nothing is kept yet and the first valid run stands in
    num_seeds: int = 1


def is_comparable(a: Entry, b: Entry) -> bool:
    pairs = [(a.record.get(key), b.record.get(key)) for key in KIND_KEYS]
    return all(x is None or y is None or x == y for x, y in pairs)


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
    """One score a seed, the mean of its runs: reruns of one seed agree to 0.0002 bpb where other seeds, and so other
    programs, are 0.0009 apart. Counted one by one they would make the noise look a quarter of what it is."""
    by_seed: dict[object, list[float]] = {}
    for e in entries:
        by_seed.setdefault(e.record.get("seed"), []).append(e.val_bpb)
    return [float(np.mean(scores)) for scores in by_seed.values()]


def mean_bpb(entries: list[Entry]) -> float:
    return float(np.mean(seed_scores(entries)))


def compute_noise(entries: list[Entry]) -> Noise:
    """Pooled over all groups of replicates: sum of squared deviations / degrees of freedom, to which n seeds of a
    program add n - 1. The prior belongs to the real run of five minutes and stands for two degrees more; without it
    one lucky pair would make everything a gain. Elsewhere (the demo, another budget) there is none."""
    squares, freedom = 0.0, 0
    for group in compute_groups(entries).values():
        scores = seed_scores(group) if len(group) > 1 else []
        if len(scores) > 1:
            freedom += len(scores) - 1
            squares += float(np.var(scores)) * len(scores)
    measured = math.sqrt(squares / freedom) if freedom else None
    if not any(is_five_minute_run(e.record) for e in entries):
        return Noise(measured, freedom, measured, False)
    variance = (PRIOR_WEIGHT * PRIOR_SIGMA**2 + squares) / (PRIOR_WEIGHT + freedom)
    return Noise(math.sqrt(variance), freedom, measured, True)


def is_five_minute_run(record: dict) -> bool:
    budget_s = number(record.get("time_budget")) or number(record.get("training_s"))
    return budget_s is not None and abs(budget_s - 300) < 3 and not record.get("demo")


def compute_best(entries: list[Entry], like: Entry | None = None) -> Best | None:
    """Lowest mean among the kept programs comparable with `like` (the newest score); while none is kept, the first
    valid run not discarded stands in."""
    valid = [e for e in comparable(entries, like) if e.is_valid]
    kept = [e for e in valid if e.status == "keep"]
    anchors = kept or [e for e in valid if e.status == "pending"][:1]
    groups = compute_groups(valid)
    candidates: dict[tuple, Best] = {}
    for e in anchors:
        if e.group not in candidates:
            group = groups[e.group]
            names = tuple(g.name for g in group)
            seeds = len(seed_scores(group))
            candidates[e.group] = Best(e.name, mean_bpb(group), names, e.group, bool(kept), seeds)
    return min(candidates.values(), key=lambda best: best.mean, default=None)


def compute_verdict(this: Entry, entries: list[Entry], facts: dict | None = None) -> dict:
    """This run against the best of all others that can be compared with it.

    `kind` is crash, stopped, invalid, hampered, baseline, unchanged, replicate, new best, unproven or not better;
    `advice` keep, discard, rerun or wait. `difference` is this program's mean minus the best's, in bpb, lower being
    better. `facts` holds what the scores alone do not tell: is_unchanged, adds_code, hampered (reasons)."""
    facts = facts or {}
    entries = comparable(entries, this)
    others = [e for e in entries if e.name != this.name]
    # Judged without itself: an outlier that is part of its own sigma cannot stand out from it.
    best, noise = compute_best(others, this), compute_noise(others or [this])
    same = [e for e in others if e.group == this.group and e.is_valid]
    verdict = {
        "val_bpb": this.val_bpb,
        "best": best.name if best else None,
        "best_mean": best.mean if best else None,
        "best_runs": len(best.names) if best else 0,
        "best_is_kept": bool(best and best.is_kept),
        "noise": {"sigma": noise.sigma, "text": describe_noise(noise), "degrees_of_freedom": noise.freedom},
        "replicates": [e.name for e in same],
        "same_as": describe_sameness(this, same[0]) if same else None,
        "reasons": [],
    }
    if flaw := compute_flaw(this, facts):
        return verdict | flaw
    verdict["mean"] = mean_bpb([this, *same])
    if best is None:
        return verdict | {"kind": "baseline", "advice": "keep"}
    if facts.get("is_unchanged") and best.group != this.group:
        return verdict | {"kind": "unchanged", "advice": "discard"} | compare_with(verdict["mean"], 1, best, noise)
    if best.group == this.group:
        after = compute_best(entries, this)
        is_over = after.group != best.group
        verdict["dethroned_by"] = [after.name, after.mean] if is_over else None
        verdict |= {"kind": "replicate", "advice": "discard" if is_over else "keep"}
        return verdict | compare_with(this.val_bpb, 1, best, noise)
    verdict |= compare_with(verdict["mean"], len(seed_scores([this, *same])), best, noise)
    return verdict | decide(verdict, noise, facts.get("adds_code", False))


def describe_sameness(this: Entry, twin: Entry) -> str:
    if this.record.get("train_sha256") == twin.record.get("train_sha256"):
        return f"The very train.py of {twin.name}."
    if this.record.get("program_and_seed") == twin.record.get("program_and_seed"):
        return f"The same as {twin.name} but for comments or formatting."
    return f"The same as {twin.name}: nothing but the seed differs."


def compute_flaw(this: Entry, facts: dict) -> dict | None:
    """Kind, advice and reasons of a run whose score says nothing about its program; None for a sound one."""
    record = this.record
    if record.get("stopped"):
        return {"kind": "stopped", "advice": "discard"}
    if this.status == "crash" or (this.val_bpb is None and not record.get("invalid")):
        return {"kind": "crash", "advice": "rerun" if facts.get("is_killed") else "discard"}
    if record.get("invalid") or this.status == "invalid":
        reasons = record.get("invalid") or ["called invalid by hand"]
        return {"kind": "invalid", "advice": "discard", "reasons": reasons}
    if reasons := facts.get("hampered") or record.get("hampered"):
        return {"kind": "hampered", "advice": "wait", "reasons": reasons}
    return None


def compare_with(mean: float, num_seeds: int, best: Best, noise: Noise) -> dict:
    difference = mean - best.mean
    if noise.sigma is None:
        return {"difference": difference, "standard_error": None, "standard_errors": None}
    error = noise.sigma * math.sqrt(1 / num_seeds + 1 / best.num_seeds)
    return {"difference": difference, "standard_error": error, "standard_errors": difference / error if error else None}


def decide(verdict: dict, noise: Noise, adds_code: bool) -> dict:
    """Keep from half a standard error on, from a whole one where the program grows; claim from two on."""
    errors = verdict["standard_errors"]
    if errors is None:  # noise unknown: nothing can be claimed
        is_better = verdict["difference"] < 0
        return {"kind": "unproven" if is_better else "not better", "advice": "keep" if is_better else "discard"}
    if errors <= -noise.claim_errors:
        return {"kind": "new best", "advice": "keep"}
    if errors <= -(KEEP_ERRORS_WITH_CODE if adds_code else KEEP_ERRORS):
        return {"kind": "unproven", "advice": "keep"}
    return {"kind": "not better", "advice": "discard"}


# ---------------------------------------------------------------------------------------------------------------------
# Compute: what changed
# ---------------------------------------------------------------------------------------------------------------------


def compute_changes(this: Entry, text: str | None, best: Entry | None, best_text: str | None,
                    entries: list[Entry]) -> dict:
    """Resolved configuration against the best's, size of the diff, and runs that tried the same before."""
    earlier = entries[: next(i for i, e in enumerate(entries) if e.name == this.name)]
    mine = this.record.get("config", {})
    theirs = best.record.get("config", {}) if best else {}
    diff = diff_lines(best_text, text, best.name if best else "")[2:]
    changes = {
        "against": best.name if best else None,
        "config": {},
        "is_config_known": bool(mine and theirs),
        "lines_added": sum(line.startswith("+") for line in diff),
        "lines_removed": sum(line.startswith("-") for line in diff),
        "is_diff_known": best_text is not None and text is not None,
        "same_program": [],
        "same_config": [],
        "machine": {},
    }
    if mine and theirs:
        changes["config"] = {k: [theirs.get(k), mine.get(k)] for k in theirs | mine if theirs.get(k) != mine.get(k)}
    for e in earlier:
        row = [e.name, e.status, e.val_bpb]
        if this.record.get("program") and e.record.get("program") == this.record["program"]:
            changes["same_program"].append(row)
        elif mine and e.record.get("config") == mine:
            changes["same_config"].append(row)
    for key in MACHINE_KEYS if best else ():
        before, after = best.record.get(key), this.record.get(key)
        if before is not None and after is not None and before != after:
            changes["machine"][key] = [before, after]
    return changes


def diff_lines(before: str | None, after: str | None, name: str) -> list[str]:
    if before is None or after is None:
        return []
    pair = before.splitlines(keepends=True), after.splitlines(keepends=True)
    return list(difflib.unified_diff(*pair, f"train.py of {name}", "train.py of this run", n=3))


# ---------------------------------------------------------------------------------------------------------------------
# Compute: the paired curve
#
# Every run sees the same rows in the same order, so two runs' losses can be compared on the same text: its difficulty,
# nine tenths of a loss curve's scatter, drops out of the difference. Windows are cut at token counts at which both
# runs have a boundary (a step's end, or a micro-batch's), so that both means are over exactly the same tokens.
#
# What is left scatters around a slow trend, and neighbouring steps' differences are alike, so the error of a window's
# mean is s / sqrt(n) times the root of an inflation by autocorrelation. That is estimated once for all windows, after
# taking a straight line out of each; one window alone is too short. The error is that of the text: how far the
# mean of these two trained models' difference could be off because the window is finite. That another seed would have
# trained other models is the noise of the verdict, and not in it. tests/bench_statistics.py checks the coverage.
#
# Late in a run the learning rate falls by the clock. Where one run is slower, equal tokens then mean unequal rates:
# the difference at equal progress is read too, by moving the best along its own slope to the progress at which this
# run saw the same text. It is what the score will say, speed included; the one at equal tokens is learning alone, but
# only while both have the same rates.
# ---------------------------------------------------------------------------------------------------------------------

NUM_WINDOWS = 10
MIN_BLOCKS = 40  # below four a window, no error can be estimated
SUMMARY_WINDOWS = 2
FARTHEST_SHIFT = 0.1  # of the tokens: beyond one window the best's curve is not straight enough to move along
SAME_TOKENS = 0.01  # two token counts within this are called equal: it is worth less than the noise
SCHEDULE_KEYS = ("train/lr_multiplier", "train/muon_momentum", "train/weight_decay")


@dataclass(frozen=True)
class Curve:
    """A run's loss, up to its first step whose loss is no number: arrays over the steps, at the end of each."""

    name: str
    tokens_m: np.ndarray
    share: np.ndarray  # of the budget
    loss: np.ndarray  # nats per token
    epoch: np.ndarray  # NaN where unknown
    data_sum: np.ndarray  # of all tokens so far, NaN where unknown
    bpb_per_nat: float | None
    bounds: np.ndarray  # token counts, from 0, at which the sum of the loss is known: ends of steps and micro-batches
    nats: np.ndarray  # that sum

    def sum_at(self, tokens: np.ndarray) -> np.ndarray:
        """Nats of all tokens up to these counts; inside a step, split evenly."""
        return np.interp(tokens, self.bounds, self.nats)

    def share_at(self, tokens: float) -> float:
        return float(np.interp(tokens, np.append(0.0, 1e6 * self.tokens_m), np.append(0.0, self.share)))

    def tokens_at(self, share: float) -> float:
        return float(np.interp(share, np.append(0.0, self.share), np.append(0.0, 1e6 * self.tokens_m)))

    def is_repeat_at(self, tokens: float) -> bool:
        return bool(np.interp(tokens, 1e6 * self.tokens_m, self.epoch) > 1)


def compute_curve(run: Run) -> Curve | None:
    """None where fewer than three steps have a loss. Tokens and clock are derived where they are not logged."""
    loss = run.series("train/loss")
    num_steps = len(loss) if np.isfinite(loss).all() else int(np.argmin(np.isfinite(loss)))
    if num_steps < 3:
        return None
    tokens = compute_tokens(run)[:num_steps]
    bounds, nats = compute_loss_sums(run.records[:num_steps], tokens)
    record = run.evaluation or {}
    num_tokens, num_bytes = number(record.get("tokens")), number(record.get("bytes"))
    return Curve(
        name=run.name,
        tokens_m=tokens / 1e6,
        share=np.maximum.accumulate(compute_clock(run)[:num_steps]),
        loss=loss[:num_steps],
        epoch=run.series("train/epoch")[:num_steps],
        data_sum=run.series("train/data_sum")[:num_steps],
        bpb_per_nat=num_tokens / (math.log(2) * num_bytes) if num_tokens and num_bytes else None,
        bounds=bounds,
        nats=nats,
    )


def compute_clock(run: Run) -> np.ndarray:
    """Share of the budget used up at the end of each step."""
    step_s = np.nan_to_num(run.series("perf/step_time_ms")) / 1e3
    progress, time_s = run.series("train/progress"), run.series("time/training_s")
    budget_s = number(run.summary.get("time_budget"))
    if not np.isfinite(time_s).all():  # a program that logs progress alone, as it is when a step begins
        if np.isfinite(progress).all():
            return np.append(progress[1:], 1.0)
        time_s = np.cumsum(step_s)
    if budget_s is None:  # a crash, or a run in progress, has no summary; its progress tells the budget
        known = np.flatnonzero(progress > 0.02)
        i = known[-1] if len(known) else -1
        budget_s = (time_s[i] - step_s[i]) / progress[i] if len(known) else time_s[-1]
    return time_s / budget_s


def compute_tokens(run: Run) -> np.ndarray:
    """Tokens trained on up to the end of each step."""
    tokens = run.series("train/tokens")
    if np.isfinite(tokens).all():
        return np.maximum.accumulate(tokens)
    batch = number(run.summary.get("total_batch_size"))
    if batch:
        return batch * np.arange(1.0, len(tokens) + 1)
    per_step = run.series("perf/tokens_per_sec") * run.series("perf/step_time_ms") / 1e3
    return np.cumsum(np.nan_to_num(per_step))


def compute_loss_sums(records: list[dict], tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token counts with the sum of the loss up to each, at the ends of the steps and of their micro-batches."""
    bounds, nats = [0.0], [0.0]
    for record, end in zip(records, tokens, strict=True):
        parts = numbers(record.get("train/micro_losses") or [])
        if not len(parts) or not np.isfinite(parts).all():
            parts = [record["train/loss"]]
        span = (end - bounds[-1]) / len(parts)
        for k, part in enumerate(parts, 1):
            bounds.append(end - (len(parts) - k) * span)
            nats.append(nats[-1] + float(part) * span)
    return np.array(bounds), np.array(nats)


def compute_data_agreement(this: Run, mine: Curve, other: Run, theirs: Curve) -> tuple[float, str | None]:
    """Up to which token count both saw the same rows, and why it is no further: None where that is everything.

    Sums of token ids that agree at a token count mean the same rows up to there. Where they are not logged, the same
    data and context length must do, and it is said that this is assumed."""
    end = 1e6 * min(mine.tokens_m[-1], theirs.tokens_m[-1])
    ours, others = (np.round(1e6 * c.tokens_m) for c in (mine, theirs))
    _, i, k = np.intersect1d(ours, others, return_indices=True)
    sums = mine.data_sum[i], theirs.data_sum[k]
    known = np.isfinite(sums[0]) & np.isfinite(sums[1])
    if known.any():
        equal = (sums[0] == sums[1])[known]
        if equal.all():
            return end, None
        num_equal = int(np.argmin(equal))
        last = ours[i][known][num_equal - 1] if num_equal else 0.0
        return last, f"the two runs saw other rows after {last / 1e6:.1f} M tokens"
    for key, values in {
        "data": (this.first_of("data_fingerprint"), other.first_of("data_fingerprint")),
        "context length": (this.summary.get("max_seq_len"), other.summary.get("max_seq_len")),
    }.items():
        if None not in values and values[0] != values[1]:
            return 0.0, f"another {key}: {values[1]} -> {values[0]}"
    return end, "assumed to be the same rows: the runs do not log train/data_sum"


def compute_paired(this: Run, others: list[Run]) -> dict | None:
    """The difference in training loss on the same text, this run minus the mean of `others` (the best and its
    replicates), in bpb, in NUM_WINDOWS windows and in one summary. None where there is no curve to compare.

    `note` says why there is no pairing, or how far it goes. A window holds its end in millions of tokens and in shares
    of both budgets, the `difference` at equal tokens and `at_progress` at equal progress, each with its standard
    error, and whether text `is_repeated` (a later epoch: then it is no loss on unseen text)."""
    mine = compute_curve(this)
    pairs = [(run, curve) for run in others if (curve := compute_curve(run))]
    if mine is None or not pairs:
        return None
    limits = [compute_data_agreement(this, mine, run, curve) for run, curve in pairs]
    end, note = min(limits, key=lambda limit: limit[0])
    theirs = [curve for _, curve in pairs]
    paired = {"against": [c.name for c in theirs], "note": note, "windows": [], "summary": None}
    kappa = next((c.bpb_per_nat for c in (*theirs, mine) if c.bpb_per_nat), None)
    blocks = common_blocks(mine, theirs, end)
    if kappa is None or blocks is None:
        return paired | {"note": note or "too few steps in common"}
    paired["rates"] = compute_rate_changes(this, pairs[0][0])
    *paired["windows"], last = compute_windows(mine, theirs, blocks, kappa)
    # The nearest the curve comes to the score, but on text seen before it measures memory.
    paired["summary"] = None if last["is_repeat"] or last["at_progress"] is None else last
    paired["total_tokens_m"] = [mine.tokens_m[-1], float(np.mean([c.tokens_m[-1] for c in theirs]))]
    return paired


def common_blocks(mine: Curve, theirs: list[Curve], end: float) -> np.ndarray | None:
    """Ascending token counts from 0 to `end` at which every curve has a boundary. Where batch sizes leave too few of
    those, evenly spaced counts: there a step is split evenly."""
    common = np.round(mine.bounds)
    for curve in theirs:
        common = np.intersect1d(common, np.round(curve.bounds))
    common = common[common <= end + 0.5]
    if len(common) > MIN_BLOCKS:
        return common
    num_steps = min(int(np.sum(c.bounds <= end)) for c in (mine, *theirs))
    return np.linspace(0, end, num_steps) if end > 0 and num_steps > MIN_BLOCKS else None


def compute_windows(mine: Curve, theirs: list[Curve], blocks: np.ndarray, kappa: float) -> list[dict]:
    """NUM_WINDOWS windows, and behind them the summary: the last SUMMARY_WINDOWS of them as one."""
    spans = np.diff(blocks)
    best = np.mean([np.diff(c.sum_at(blocks)) for c in theirs], axis=0) / spans
    differences = np.diff(mine.sum_at(blocks)) / spans - best
    middles = (blocks[1:] + blocks[:-1]) / 2
    wanted = np.linspace(0, blocks[-1], NUM_WINDOWS + 1)
    edges = [int(np.argmin(np.abs(blocks - at))) for at in wanted]
    pieces = [slice(a, b) for a, b in itertools.pairwise(edges)]
    inflation = inflation_of([detrended(middles[p], differences[p]) for p in pieces])
    windows = []
    for p in [*pieces, slice(edges[-1 - SUMMARY_WINDOWS], edges[-1])]:
        first, last = blocks[p.start], blocks[p.stop]
        difference = float(np.average(differences[p], weights=spans[p]))
        scatter = detrended(middles[p], differences[p])
        error = math.sqrt(inflation * float(scatter @ scatter)) / len(scatter)
        moved = move_to_progress(mine, theirs, first, last)
        windows.append({
            "from_m": first / 1e6,
            "to_m": last / 1e6,
            "progress": mine.share_at(last),
            "difference": kappa * difference,
            "error": kappa * error,
            "at_progress": None if moved is None else kappa * (difference - moved[0]),
            "at_progress_error": None if moved is None else kappa * math.hypot(error, moved[1]),
            "is_repeat": any(c.is_repeat_at(last) for c in (mine, *theirs)),
        })
    return windows


def detrended(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What a straight line leaves of y."""
    if len(x) < 3:
        return np.zeros(len(x))
    slope, level = np.polyfit(x - x.mean(), y, 1)
    return y - level - slope * (x - x.mean())


def inflation_of(pieces: list[np.ndarray]) -> float:
    """Variance of a piece's mean, times its length, over the mean square of what a straight line left of it: 1 + twice
    the sum of the autocorrelations, weighted as Newey and West do (1987), up to a quarter of a piece's length.

    The line has taken the slowest part of the scatter with it: level and slope, each of the variance of the mean. With
    V the answer and n the length, every autocovariance reads too low by 2 V / n, which is put back."""
    length = min((len(p) for p in pieces), default=0)
    pieces = [p / math.sqrt(p @ p / len(p)) for p in pieces if len(p) and p @ p > 0]
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
    """Change of the best's loss in nats, and its error, between this window's text and the tokens at which the best was
    as far in its budget as this run is here, along a straight line through the best's losses around there."""
    middle = (first + last) / 2
    progress = mine.share_at(middle)
    changes, variances = [], []
    for curve in theirs:
        shift = curve.tokens_at(progress) - middle
        if abs(shift) > FARTHEST_SHIFT * 1e6 * curve.tokens_m[-1]:
            return None
        around = curve.bounds[(curve.bounds >= first + min(shift, 0)) & (curve.bounds <= last + max(shift, 0))]
        if len(around) < 5:
            return None
        x, y = (around[1:] + around[:-1]) / 2, np.diff(curve.sum_at(around)) / np.diff(around)
        slope = float(np.polyfit(x - x.mean(), y, 1)[0])
        rest = detrended(x, y)
        variance = float(rest @ rest) / (len(x) - 2) / float(np.sum((x - x.mean()) ** 2))
        changes.append(slope * shift)
        variances.append(variance * shift**2)
    return float(np.mean(changes)), math.sqrt(sum(variances)) / len(variances)


def compute_rate_changes(this: Run, best: Run) -> list[str]:
    """Rates and schedules that differ by more than 1 % at a quarter, a half or nine tenths of the budget, and the
    batch: from the logs, so that no list of names is kept."""
    keys = sorted({k for r in this.records[:1] + best.records[:1] for k in r if k.startswith("lr/")})
    found = []
    for key in (*SCHEDULE_KEYS, *keys):
        for share in (0.25, 0.5, 0.9):
            a, b = value_at(best, key, share), value_at(this, key, share)
            if a is not None and b is not None and abs(b - a) > 0.01 * max(abs(a), abs(b)) + 1e-12:
                found.append(f"{key.removeprefix('train/')} {a:.3g} -> {b:.3g} at {share:.0%}")
                break
    batches = [float(np.median(np.diff(compute_tokens(r), prepend=0.0))) for r in (best, this)]
    if abs(batches[0] - batches[1]) > 0.5:
        found.insert(0, f"batch {batches[0]:.0f} -> {batches[1]:.0f} tokens")
    return found


def value_at(run: Run, key: str, share: float) -> float | None:
    """The metric at this share of the budget, between the steps around it; None where the run had ended."""
    return number(np.interp(share, run.series("train/progress"), run.series(key), right=math.nan).item())


# ---------------------------------------------------------------------------------------------------------------------
# Compute: training against validation, speed against learning
# ---------------------------------------------------------------------------------------------------------------------

GAP_SHARE = 0.05  # of the score: training text of the first epoch and validation text differ in difficulty by 1 to 2 %


def compute_gap(run: Run, others: list[Run]) -> dict | None:
    """Training loss over the last twentieth of the tokens and validation loss, both in bpb, and what lies between."""
    mine = training_and_gap(run)
    if mine is None:
        return None
    theirs = [pair for r in others if (pair := training_and_gap(r))]
    best = np.mean(theirs, axis=0).tolist() if theirs else None
    epochs = number(run.records[-1].get("train/epoch"))
    is_repeated = epochs is not None and epochs > 1
    is_wide = mine[1] > GAP_SHARE * (mine[0] + mine[1])
    return {"this": mine, "best": best, "epochs": epochs, "is_overfitting": is_repeated and is_wide,
            "is_wider": best is None or mine[1] > best[1]}


def training_and_gap(run: Run) -> tuple[float, float] | None:
    curve, val = compute_curve(run), number(run.summary.get("val_bpb"))
    if curve is None or val is None or curve.bpb_per_nat is None:
        return None
    end = curve.bounds[-1]
    nats, before = curve.sum_at(np.array([end, 0.95 * end]))
    training = float(curve.bpb_per_nat * (nats - before) / (0.05 * end))
    return training, val - training


def compute_attribution(
    this: Entry, entries: list[Entry], paired: dict | None, difference: float | None
) -> dict | None:
    """How much of the difference in score is speed (other tokens in the same time) and how much is the rest.

    Speed is priced by pairs alone: runs of one program that trained on other token counts, hampered ones too, tell
    what a doubling of the tokens is worth. Without such pairs nothing here separates the two, and it is said."""
    if paired is None or difference is None or "total_tokens_m" not in paired:
        return None
    mine, theirs = paired["total_tokens_m"]
    ratio = mine / theirs
    result = {"token_ratio": ratio, "speed_bpb": None}
    if abs(ratio - 1) < SAME_TOKENS:
        return result
    price = compute_token_price(comparable(entries, this))
    if price is None:
        return result
    value, error, num_pairs = price
    speed = value * math.log(ratio)
    speed_error = error * abs(math.log(ratio))
    return result | {"speed_bpb": speed, "speed_error": speed_error, "learning_bpb": difference - speed,
                     "num_pairs": num_pairs}


def compute_token_price(entries: list[Entry]) -> tuple[float, float, int] | None:
    """Change of val_bpb for e times the tokens, its standard error, and from how many runs beyond the first of their
    programs: regression within groups of the same program, hampered runs included (they are such pairs)."""
    sigma = compute_noise(entries).sigma
    groups: dict[tuple, list[tuple[float, float]]] = {}
    for e in entries:
        tokens_m = e.record.get("tokens_m")
        if e.val_bpb is not None and not e.record.get("invalid") and tokens_m and e.status != "invalid":
            groups.setdefault(e.group, []).append((math.log(tokens_m), e.val_bpb))
    spread, product, num_pairs = 0.0, 0.0, 0
    for points in groups.values():
        x, y = np.array(points).T
        spread += float(np.sum((x - x.mean()) ** 2))
        product += float(np.sum((x - x.mean()) * (y - y.mean())))
        num_pairs += len(points) - 1
    # Runs that differ by the clock's jitter alone price nothing: 3 % apart is the least that says more than noise.
    if not num_pairs or sigma is None or spread < 0.5 * 0.03**2:
        return None
    return product / spread, sigma / math.sqrt(spread), num_pairs


# ---------------------------------------------------------------------------------------------------------------------
# Compute: machine. Did it hold the run back?
# ---------------------------------------------------------------------------------------------------------------------

# Step times of one program on an idle GPU agree within 1 to 2 %: twice that is no accident.
SLOWER_SAME = 0.04
# Other programs with the same FLOPs, shapes and kernels differ by what their new code costs: within a tenth it may be
# the code, and beyond, a second witness must agree; at a half more, none is needed.
SLOWER_ALIKE, SLOWER_ALONE = 0.10, 0.50
STALLED_SHARE = 0.03  # of the budget, in steps that took twice the median: worth two sigma of the score
SLOW_START = 3.0  # times the usual: 36 s with an empty compiler's cache and 16 s with a full one are no witness
OTHER_GPU_MB, HIGH_LOAD = 1024.0, 0.5  # memory that another process needs to do any work; load above the usual, a core
WORK_KEYS = ("flops_per_token", "num_params_M", "total_batch_size", "device_batch_size", "width", "window_sizes")
NUM_PEERS = 15  # the newest: a machine's speed drifts


def compute_pace(run: Run) -> dict:
    """What the machine did to this run, for its record: compared with other runs' to tell whether it was held back."""
    steps_ms = run.series("perf/step_time_ms")
    steps_ms = steps_ms[np.isfinite(steps_ms)]
    settled = steps_ms[10:] if len(steps_ms) > 50 else steps_ms[1:]
    s, pace = run.summary, {}
    if len(settled) > 2:
        median = float(np.median(settled))
        stalls = settled[settled > 2 * median]
        pace = {"stalls": len(stalls), "stalled_s": float((stalls - median).sum() / 1e3),
                "p95_ms": float(np.percentile(settled, 95))}
    other_mb = [v for r in run.records if (v := number(r.get("gpu/other_mb"))) is not None]
    loads = [v for r in run.records if (v := number(r.get("machine/load"))) is not None]
    return pace | {
        "startup_s": number(s.get("startup_seconds")),
        "other_gpu_mb": max(other_mb, default=number(s.get("other_gpu_mb"))),
        "load": float(np.median(loads)) if loads else None,
        "unclocked_s": compute_unclocked_s(run),
    }


def compute_unclocked_s(run: Run) -> float | None:
    """Seconds between first and last step that neither the budget clock nor the looks at the layers account for."""
    wall, clock = run.series("time/unix_s"), run.series("time/training_s")
    if len(wall) < 3 or not np.isfinite([wall[0], wall[-1], clock[0], clock[-1]]).all():
        return None
    paused = number(run.summary.get("stats_seconds")) or 0.0
    return float(wall[-1] - wall[0]) - float(clock[-1] - clock[0]) - paused


def does_same_work(a: Entry, b: Entry) -> bool:
    """The same FLOPs a token, shapes, batch, kernels and GPU, as far as both say."""
    ours, theirs = a.record.get("config", {}), b.record.get("config", {})
    if ours.get("flops_per_token") is None or not is_comparable(a, b):
        return a.group == b.group
    is_same = all(ours.get(key) == theirs.get(key) for key in WORK_KEYS)
    return is_same and all(a.record.get(key) == b.record.get(key) for key in KERNEL_KEYS)


def compute_machine(this: Entry, earlier: list[Entry]) -> dict:
    """Step time against earlier runs that did the same work, and `hampered`: the reasons why the machine, not the
    program, held this run back. By one rule whatever the score. Only earlier runs are asked, so the answer stays.

    Where a second run of the very same program is as slow, with no witness against the machine, it is the program."""
    own, record = this.record.get("pace") or {}, this.record
    step_ms = record.get("step_ms")
    machine = own | {"step_ms": step_ms, "usual_ms": None, "hampered": []}
    if not is_timed(record) or not record.get("is_finished"):
        return machine
    if stalled := compute_stalls(own, record):
        machine["hampered"].append(stalled)
    timed = [e for e in earlier if is_timed(e.record) and does_same_work(this, e)]
    peers = [e for e in timed if e.is_valid][-NUM_PEERS:]
    if not peers:
        return machine
    same = [e for e in timed if e.group == this.group]
    known = [e for e in same if e.is_valid]
    machine["usual_ms"] = float(np.median([e.record["step_ms"] for e in known or peers]))
    slower, witnesses = step_ms / machine["usual_ms"] - 1, compute_witnesses(own, peers)
    if known:
        is_slow, what = slower > SLOWER_SAME, "this program"
    else:
        is_slow, what = slower > (SLOWER_ALIKE if witnesses else SLOWER_ALONE), "the same work"
    is_confirmed = any(abs(e.record["step_ms"] / step_ms - 1) < SLOWER_SAME for e in same)
    if is_slow and (witnesses or not is_confirmed):
        told = f"steps took {1 + slower:.2f} times what {what} took before ({step_ms:.1f} ms, usually " \
               f"{machine['usual_ms']:.1f})"
        machine["hampered"].append("; ".join([told, *witnesses]))
    return machine


def is_timed(record: dict) -> bool:
    """Whether the run has a step time to judge by: a median of few steps, the first among them, is none."""
    return bool(record.get("step_ms")) and (record.get("num_steps") or math.inf) >= 20


def compute_stalls(own: dict, record: dict) -> str | None:
    stalled_s, trained_s = own.get("stalled_s"), record.get("training_s")
    if not stalled_s or not trained_s or stalled_s < STALLED_SHARE * trained_s:
        return None
    return f"{own['stalls']} step(s) took more than twice the median: {stalled_s:.1f} of {trained_s:.0f} s lost"


def compute_witnesses(own: dict, peers: list[Entry]) -> list[str]:
    """What else than the step time speaks against the machine."""
    def usual(key: str) -> float | None:
        known = [v for e in peers if (v := (e.record.get("pace") or {}).get(key)) is not None]
        return float(np.median(known)) if known else None

    found = []
    if (own.get("other_gpu_mb") or 0.0) > OTHER_GPU_MB:
        found.append(f"another process held {own['other_gpu_mb']:.0f} MB of this GPU")
    before, now = usual("startup_s"), own.get("startup_s")
    if before and now and now > SLOW_START * before:
        found.append(f"start-up took {now:.0f} s, usually {before:.0f}")
    before, now = usual("load"), own.get("load")
    if before is not None and now is not None and now > before + HIGH_LOAD:
        found.append(f"load {now:.1f} a core, usually {before:.1f}")
    return found


def compute_best_pace(this: Entry, best: list[Entry]) -> float | None:
    """By how much this run's steps are faster than the best's although the work is the same: then it is the machine
    that has changed, and a gain is not the program's. None where they agree, or do other work."""
    alike = [e.record["step_ms"] for e in best if e.record.get("step_ms") and does_same_work(this, e)]
    ours = this.record.get("step_ms")
    if not alike or not ours or min(alike) / ours - 1 < SLOWER_ALIKE:
        return None
    return min(alike) / ours - 1


# ---------------------------------------------------------------------------------------------------------------------
# Compute: layers, history, all of it
# ---------------------------------------------------------------------------------------------------------------------


def compute_layers(run: Run, best: Run | None) -> list[str]:
    """Sentences on what stands out in the last layer statistics, most serious first, each with what the best shows
    under the same heading."""
    mine = find_layers(run)
    theirs = find_layers(best) if best else {}
    lines = []
    for what, text in mine.items():
        other = theirs.get(what)
        compared = ""
        if best:
            compared = f"; best: {other}" if other else "; unremarkable in the best"
        lines.append(f"{what}: {text}{compared}")
    lines += [f"{what}: in the best ({text}), not here" for what, text in theirs.items() if what not in mine]
    return lines


def find_layers(run: Run) -> dict[str, str]:
    with_layers, with_params = run.records_with("layers/names"), run.records_with("params/names")
    found: dict[str, str] = {}
    if with_layers:
        # From a quarter of the run on: output projections start at zero and grow a lot before as a matter of course.
        found |= find_activations(with_layers[len(with_layers) // 4], with_layers[-1])
    if with_params:
        found |= find_updates(with_params[len(with_params) // 2], with_params[-1], set(run.scalars))
    last = next((r for r in reversed(run.records) if number(r.get("logits/max_abs")) is not None), None)
    if last and (number(last.get("logits/max_prob")) or 0) > 0.9:
        found["logits saturate"] = f"largest {last['logits/max_abs']:.1f}, mean top probability " \
                                   f"{last['logits/max_prob']:.2f}"
    return found | find_scalars(run)


def named_values(record: dict, names: str, key: str) -> dict[str, float]:
    pairs = zip(record.get(names) or [], record.get(key) or [], strict=False)
    return {str(name): v for name, value in pairs if (v := number(value)) is not None}


def find_activations(first: dict, last: dict) -> dict[str, str]:
    found = {}
    for key, bar, what in (("layers/dead", 0.02, "dead input units"), ("layers/input_zeros", 0.99, "inputs at zero"),
                           ("layers/zeros", 0.5, "outputs at zero")):
        high = {n: v for n, v in named_values(last, "layers/names", key).items() if v > bar}
        if high:
            found[what] = list_worst(high, lambda v: f"{v:.0%}")
    before, after = (named_values(r, "layers/names", "layers/rms") for r in (first, last))
    growth = {n: after[n] / before[n] for n in after if before.get(n, 0) > 0}
    if high := {n: v for n, v in growth.items() if v > 10}:
        found["activations grew"] = list_worst(high, lambda v: f"x{v:.0f}")
    if low := {n: v for n, v in growth.items() if v < 0.1}:
        found["activations vanish"] = list_worst(low, lambda v: f"x{v:.2g}", highest=False)
    names = [str(n) for n in last["layers/names"]]
    if missing := [n for n in names if n not in after]:
        found["no finite activation statistics"] = ", ".join(missing[:4])
    return found


def update_ratios(record: dict) -> dict[str, float]:
    update, weight = (named_values(record, "params/names", f"params/{k}_rms") for k in ("update", "weight"))
    return {n: update[n] / weight[n] for n in update if weight.get(n, 0) > 0 and update[n] > 0}


def find_updates(middle: dict, last: dict, scalars: set[str]) -> dict[str, str]:
    """Update sizes out of line in the middle of the run, where the learning rate is high, and idle parameters at its
    end. The residual scalars are left out: they are large and move slowly by design."""
    found, ratios = {}, {n: v for n, v in update_ratios(middle).items() if n not in scalars}
    if len(ratios) >= 4:
        median = float(np.median(list(ratios.values())))
        # AdamW and Muon groups differ by a factor of ten as a matter of course.
        if high := {n: v / median for n, v in ratios.items() if v > 30 * median}:
            found["update/weight far above the median"] = list_worst(high, lambda v: f"x{v:.0f}")
        if low := {n: v / median for n, v in ratios.items() if v < median / 30}:
            found["update/weight far below the median"] = list_worst(low, lambda v: f"x{v:.1g}", highest=False)
    if idle := [n for n, v in named_values(last, "params/names", "params/grad_rms").items() if v == 0]:
        found["no gradient reaches"] = ", ".join(idle[:4]) + (f" and {len(idle) - 4} more" if len(idle) > 4 else "")
    return found


def find_scalars(run: Run) -> dict[str, str]:
    """Residual scalars: start, half-way and end by their median, and the range over the layers at the end. The start is
    the configuration's where it has it (x0_lambda_init for x0_lambdas): the first look is after the first step."""
    found = {}
    for name, logged in run.scalars.items():
        known = [numbers(values) for values in (logged[0], logged[len(logged) // 2], logged[-1])]
        if any(not np.isfinite(values).any() for values in known):
            continue
        start = number(run.summary.get(f"{name.removesuffix('s')}_init"))
        first, middle, last = (float(np.nanmedian(values)) for values in known)
        start = first if start is None else start
        low, high = float(np.nanmin(known[2])), float(np.nanmax(known[2]))
        is_moved = start == 0 or not 1 / 3 < last / start < 3
        if is_moved or high - low > 0.5 * max(abs(high), abs(low)):
            at = int(np.nanargmin(known[2])), int(np.nanargmax(known[2]))
            found[name] = (f"median {start:.3g} at the start, {middle:.3g} half-way, {last:.3g} at the end; "
                           f"{low:.3g} (layer {at[0]}) to {high:.3g} (layer {at[1]})")
    return found


def list_worst(values: dict[str, float], form: Callable[[float], str], highest: bool = True, limit: int = 3) -> str:
    worst = sorted(values.items(), key=lambda item: item[1], reverse=highest)
    more = f" and {len(worst) - limit} more" if len(worst) > limit else ""
    return ", ".join(f"{name} {form(v)}" for name, v in worst[:limit]) + more


def compute_history(entries: list[Entry]) -> dict:
    """Counts, lineage of kept programs (mean over replicates), gain, GPU share, and ideas since the best was found.

    An idea is a program with a score that counts, from its first run on: neither a replicate nor a crash nor a
    hampered run tells of another."""
    alike = comparable(entries)
    best, groups, lineage, seen = compute_best(alike), compute_groups(alike), [], set()
    for e in alike:
        if e.status == "keep" and e.is_valid and e.group not in seen:
            seen.add(e.group)
            lineage.append([e.name, mean_bpb(groups[e.group]), e.description])
    hours = sum(e.record.get("total_s") or e.record.get("training_s") or 0.0 for e in entries) / 3600
    gain = lineage[0][1] - best.mean if lineage and best else None
    optimism = compute_optimism(best, alike, compute_noise(alike)) if gain else 0.0
    since = len(groups) - 1 - list(groups).index(best.group) if best else None
    starts = [t for e in entries if (t := e.record.get("started_unix"))]
    return {
        "num_runs": len(entries),
        "counts": {status: sum(e.status == status for e in entries) for status in STATUSES},
        "lineage": lineage,
        "hours": hours,
        "first_start_unix": min(starts, default=None),
        "gain": None if gain is None else gain - optimism,
        "optimism": optimism,
        "ideas_since_best": since,
        "runs_since_best_was_run": runs_since(alike, best),
        "last": [[e.name, e.val_bpb, e.status, e.description] for e in entries[-5:]],
        "idle_s": compute_idle(entries).get(entries[-1].name) if entries else None,
        "gpu_share": compute_gpu_share(entries),
    }


def runs_since(entries: list[Entry], best: Best | None) -> int | None:
    if best is None:
        return None
    newest = max(i for i, e in enumerate(entries) if e.name in best.names)
    return len(entries) - 1 - newest


def compute_optimism(best: Best, entries: list[Entry], noise: Noise) -> float:
    """By how much the best's mean reads too low because it is the lowest of many noisy ones: sigma / sqrt(n) times the
    expected maximum of k standard normals, k being the programs within two errors of it, any of which could have been
    the one. Replicates of the best shrink it."""
    if noise.sigma is None:
        return 0.0
    error = noise.sigma / math.sqrt(best.num_seeds)
    means = [mean_bpb(group) for group in compute_groups(entries).values()]
    num_near = sum(mean < best.mean + 2 * error for mean in means)
    # Blom (1958): the expected maximum of k standard normals is near the quantile of (k - 0.375) / (k + 0.25).
    return error * NormalDist().inv_cdf((num_near - 0.375) / (num_near + 0.25)) if num_near > 1 else 0.0


def compute_stats(run: Run, this: Entry, entries: list[Entry], best_runs: list[Run]) -> dict:
    """Everything the analysis says about one run, as numbers. `entries` end with this one; `best_runs` are the best's
    replicates, the first its own. A part that fails says so and leaves the others alone: the program may have become
    anything, and the night must not end over a surprise in its metrics."""
    failed: dict[str, str] = {}

    def attempt(key: str, part: Callable[[], object]) -> object:
        try:
            return part()
        except Exception as e:  # see above
            failed[key] = f"{type(e).__name__}: {e}"
            return None

    earlier = [e for e in entries if e.name != this.name]
    best_run = best_runs[0] if best_runs else None
    best = next((e for e in earlier if best_run and e.name == best_run.name), None)
    machine = attempt("machine", lambda: compute_machine(this, earlier))
    this = replace(this, record=this.record | {"hampered": machine["hampered"] if machine else []})
    entries = [*earlier, this]
    best_text = best_run.train_py if best_run else None
    changes = attempt("changes", lambda: compute_changes(this, run.train_py, best, best_text, entries))
    paired = attempt("paired", lambda: compute_paired(run, best_runs))
    crash = compute_crash(run) if this.status == "crash" else None
    facts = {
        "adds_code": bool(changes and changes["lines_added"] > changes["lines_removed"] + FREE_LINES),
        "is_killed": bool(crash and crash["is_killed"]),
    }
    verdict = compute_verdict(this, entries, facts)
    if paired and paired["windows"] and changes and is_unchanged(run, best_run, paired, changes, verdict):
        verdict = compute_verdict(this, entries, facts | {"is_unchanged": True})
        if verdict["kind"] == "unchanged":  # from now on another run of that program
            this = replace(this, record=this.record | {"program": best.record.get("program")})
            entries = [*earlier, this]
    replicates = [e for e in earlier if e.name in {r.name for r in best_runs}]
    verdict["best_is_slower"] = compute_best_pace(this, replicates)
    own = None if this.val_bpb is None or verdict["best_mean"] is None else this.val_bpb - verdict["best_mean"]
    return plain({
        "record": this.record,
        "status": this.status,
        "description": this.description,
        "verdict": verdict,
        "crash": crash,
        "changes": changes,
        "paired": paired,
        "gap": attempt("gap", lambda: compute_gap(run, best_runs)),
        "why": attempt("why", lambda: compute_attribution(this, entries, paired, own)),
        "cost": {"this": compute_costs([run]), "best": compute_costs(best_runs)},
        "machine": machine,
        "layers": attempt("layers", lambda: compute_layers(run, best_run)),
        "prediction": attempt("prediction", lambda: render_prediction(this, own, verdict.get("standard_error"))),
        "history": attempt("history", lambda: compute_history(entries)),
        "calibration": attempt("calibration", lambda: render_calibration(entries)),
        "failed": failed,
    })


FREE_LINES = 3  # a program that is longer by no more than these has not become more complex
# One program and seed, run twice on an H100: the losses of the first ten steps agreed within 3e-4 of themselves; any
# other rate, start or seed made a tenth.
ROUNDING = 1e-3


def is_unchanged(run: Run, best: Run, paired: dict, changes: dict, verdict: dict) -> bool:
    """Whether the edit changed nothing that can be seen: the same resolved configuration, rates and first ten losses
    but for rounding, and no difference beyond the noise in any window nor in the score (averaged weights would show
    only there)."""
    ours, theirs = (r.series("train/loss")[:10] for r in (run, best))
    if changes["config"] or not changes["is_config_known"] or paired.get("rates") or len(ours) != len(theirs):
        return False
    error = verdict.get("standard_error") or 0.0
    is_same = bool(np.allclose(ours, theirs, rtol=ROUNDING, atol=0.0))
    differences = [w["difference"] for w in paired["windows"]] + [verdict.get("difference") or 0.0]
    return is_same and max(map(abs, differences)) < max(GAIN_ERRORS * error, ROUNDING)


# Label, key in the summary, format, unit: what a run costs, side by side with the best.
COSTS = (
    ("parameters", "num_params_M", ".1f", " M"),
    ("FLOPs a token", "flops_per_token", ".3g", ""),
    ("tokens", "total_tokens_M", ".4g", " M"),
    ("steps", "num_steps", ".0f", ""),
    ("memory", "peak_vram_mb", ".0f", " MB"),
    ("MFU", "mfu_percent", ".1f", " %"),
)


def compute_costs(runs: list[Run]) -> dict[str, str]:
    """Label to what these runs cost in the mean, and, where it was profiled, where a step's time goes."""
    rows = [(label, [number(run.summary.get(key)) for run in runs], form, unit) for label, key, form, unit in COSTS]
    rows.append(("step, median", [run.step_ms for run in runs], ".1f", " ms"))
    profiles = [run.summary.get("profile") or {} for run in runs]
    for kind in {kind: None for profile in profiles for kind in profile if kind != "step"}:
        label = "GPU idle" if kind == "idle" else f"{kind} kernels"
        rows.append((label, [number(profile.get(kind)) for profile in profiles], ".2f", " ms a step"))
    known = [(label, [v for v in values if v is not None], form, unit) for label, values, form, unit in rows]
    return {label: f"{np.mean(values):{form}}{unit}" for label, values, form, unit in known if values}


# ---------------------------------------------------------------------------------------------------------------------
# Render: analysis.md and compare
# ---------------------------------------------------------------------------------------------------------------------

ADVICE = {
    "keep": "Keep it: `uv run analyze.py keep`.",
    "discard": "Discard it: `uv run analyze.py discard`.",
    "rerun": "The idea was not tested: train the same commit once more.",
    "wait": "Wait until the machine is quiet, then train the same commit again.",
}


HEADINGS = {
    "crash": "**CRASHED**",
    "invalid": "**INVALID**, not a result",
    "hampered": "**HAMPERED** by the machine, no evidence",
    "replicate": "**REPLICATE** of the best, no new idea",
}


def render_verdict(stats: dict) -> list[str]:
    v = stats["verdict"]
    kind = v["kind"]
    lines = [f"{HEADINGS.get(kind, f'**{kind.upper()}**')}: {render_comparison(stats)}. {ADVICE[v['advice']]}"]
    lines += [f"- {clip(reason, 220)}" for reason in v["reasons"][:5]]
    lines += render_kind(v)
    lines += [stats["prediction"]] if stats["prediction"] else []
    if slower := v.get("best_is_slower"):
        lines.append(f"Mind: the machine is faster now: the same work took the best {slower:.0%} longer a step. Run "
                     "the best again (`uv run analyze.py rerun`) before you believe a gain.")
    if v["best"] and not v["best_is_kept"]:
        lines.append(f"Nothing is kept yet: {v['best']}, the first valid run, stands in as the best.")
    if kind not in ("crash", "stopped", "invalid"):
        lines.append(f"Noise between seeds of one program: {v['noise']['text']}.")
    remarks = [*stats["record"].get("notes", []), *stats["record"].get("damage", [])]
    unclocked_s = (stats.get("machine") or {}).get("unclocked_s")
    if unclocked_s and unclocked_s > 0.1 * (stats["record"].get("training_s") or 0.0) + 2:
        remarks.append(f"{unclocked_s:.0f} s passed between the first step and the last that the clock did not count")
    return lines + [f"Mind: {clip(remark, 220)}." for remark in remarks[:5]]


def render_comparison(stats: dict) -> str:
    v = stats["verdict"]
    if v["kind"] == "crash":
        return clip((stats["crash"] or {}).get("reason") or "by hand", 200) + f". Best so far: {render_best(v)}"
    if v["kind"] in ("stopped", "invalid", "hampered"):
        return f"val_bpb {show(v['val_bpb'])}. Best so far: {render_best(v)}"
    text = f"val_bpb {show(v['val_bpb'])}, best so far {render_best(v)}"
    if v.get("difference") is None:
        return text
    text += f", difference {v['difference']:+.6f}"
    if v["standard_error"]:
        text += f" ± {v['standard_error']:.6f} bpb = {v['standard_errors']:+.1f} standard errors"
    return text


def render_kind(v: dict) -> list[str]:
    """What the kind of the verdict means for the decision."""
    kind, lines = v["kind"], []
    if kind == "baseline":
        lines.append("Nothing to compare with yet. Run it once more (`uv run analyze.py rerun`) for the noise.")
    elif kind == "unproven":
        lines.append("Better by the rule for keeping, not by that for claiming: kept, it may be no gain.")
    elif kind == "unchanged":
        lines.append(f"The edit changed nothing: configuration and losses are those of {v['best']}. It counts as "
                     "another run of that program, not as an idea.")
    elif kind == "replicate":
        lines.append(v["same_as"])
        lines.append(f"Mean of the {1 + len(v['replicates'])} runs of this program: {v['mean']:.6f}.")
        if v["standard_errors"] is not None and abs(v["standard_errors"]) > 3:
            lines.append("It lies outside the noise of the others: look for a cause before you trust it.")
        if v["dethroned_by"]:
            lines.append("With this mean it is the best no more: that is {} at {:.6f}.".format(*v["dethroned_by"]))
    if v["replicates"] and kind in ("new best", "not better", "unproven"):
        lines.append(f"The difference is that of the mean of {1 + len(v['replicates'])} runs of this program, "
                     f"{v['mean']:.6f}. {v['same_as']}")
    return lines


def render_best(verdict: dict) -> str:
    if not verdict["best"]:
        return "none"
    count = verdict["best_runs"]
    return f"{verdict['best_mean']:.6f} ({verdict['best']}{f', mean of {count} runs' if count > 1 else ''})"


def render_crash(crash: dict) -> list[str]:
    at = f"step {crash['last_step']:.0f}" if crash["last_step"] is not None else "before the first step"
    lines = [f"Ended: {at}" + (f", last loss {crash['last_loss']:.4f}" if crash["last_loss"] is not None else "")
             + (f", {crash['elapsed_s']:.0f} s after the start" if crash["elapsed_s"] is not None else "") + "."]
    if crash["exception"]:
        lines.append(f"Exception: {clip(crash['exception'], 300)}")
    lines += [f"- {clip(frame, 200)}" for frame in crash["frames"]]
    if crash["cause"]:
        lines.append(f"Looks like: {crash['cause']}. What usually helps: {crash['help']}.")
    return lines


def render_paired(paired: dict) -> list[str]:
    """The table of windows, the summary, and what limits both."""
    if not paired["windows"]:
        return [f"No pairing with {paired['against'][0]}: {paired['note']}."]
    names = ", ".join(paired["against"][:3])
    lines = [f"This run minus {names}: training loss on the same text, bpb, ± one standard error of the text.",
             "| budget | M tokens | at equal tokens | at equal progress |", "|---|---|---|---|"]
    for w in paired["windows"]:
        mark = " *" if w["is_repeat"] else ""
        moved = "-" if w["at_progress"] is None else f"{w['at_progress']:+.5f} ± {w['at_progress_error']:.5f}"
        lines.append(f"| {w['progress']:.0%}{mark} | {w['to_m']:.4g} | {w['difference']:+.5f} ± {w['error']:.5f} "
                     f"| {moved} |")
    if summary := paired["summary"]:
        lines.append(f"From {summary['from_m']:.4g} M tokens on, at equal progress: **{summary['at_progress']:+.5f} ± "
                     f"{summary['at_progress_error']:.5f} bpb**; another seed moves this as it moves the score.")
    if any(w["is_repeat"] for w in paired["windows"]):
        lines.append("* a later epoch: text seen before, no measure of learning.")
    if paired["rates"]:
        lines.append(f"Rates differ ({clip('; '.join(paired['rates'][:4]), 200)}): before the warm-down the difference "
                     "misleads; believe the windows at equal progress within it.")
    if paired["note"]:
        lines.append(f"Mind: {paired['note']}.")
    return lines


def render_learning(stats: dict) -> list[str]:
    gap, why, lines = stats["gap"], stats["why"], []
    if gap:
        (training, opened), best = gap["this"], ""
        if gap["best"]:
            best = " (best {:.4f} and {:+.4f})".format(*gap["best"])
        lines.append(f"Training loss at the end {training:.4f} bpb, validation {opened:+.4f} to it{best}.")
        if gap["is_overfitting"]:
            lines.append(f"**Over-fitting**: epoch {gap['epochs']:.0f}, and validation is left behind"
                         f"{', more than by the best' if gap['is_wider'] else ''}: more steps need not help.")
        elif gap["epochs"] and gap["epochs"] > 1:
            lines.append(f"The data were repeated: epoch {gap['epochs']:.0f} at the end.")
    return [*lines, render_why(why)] if why else lines


def render_why(why: dict) -> str:
    ratio = f"{why['token_ratio'] - 1:+.1%} tokens"
    if abs(why["token_ratio"] - 1) < SAME_TOKENS:
        return f"Speed: {ratio}, the same; the difference is learning, or noise."
    if why["speed_bpb"] is None:
        return (f"Speed: {ratio}. No program was run at two token counts, so what tokens are worth is unknown: the "
                "score cannot tell speed from learning; the curve at equal tokens and equal rates is learning.")
    return (f"Speed: {ratio}, worth {why['speed_bpb']:+.5f} ± {why['speed_error']:.5f} bpb by {why['num_pairs']} "
            f"pair(s) of runs of one program; the rest, {why['learning_bpb']:+.5f}, is learning and noise.")


def render_changes(changes: dict) -> list[str]:
    if changes["against"] is None:
        return ["Nothing to compare with yet."]
    lines = []
    if changes["is_diff_known"]:
        lines.append(f"train.py: +{changes['lines_added']} -{changes['lines_removed']} lines (`train.diff`).")
    else:
        lines.append("train.py of one of the two is unknown.")
    config = changes["config"]
    if not changes["is_config_known"]:
        lines.append("Resolved configuration: unknown.")
    elif not config:
        lines.append("Resolved configuration: the same, every key.")
    for key, (before, after) in list(config.items())[:6]:
        lines.append(f"- `{key}`: {clip(json.dumps(before), 50)} -> {clip(json.dumps(after), 50)}")
    if len(config) > 6:
        lines.append(f"- and {len(config) - 6} more: {clip(', '.join(list(config)[6:]), 100)}")
    for key, (before, after) in changes["machine"].items():
        lines.append(f"- `{key}`: {clip(str(before), 60)} -> {clip(str(after), 60)}")
    for what, key in (("This very program", "same_program"), ("This configuration with other code", "same_config")):
        if changes[key]:
            tried = ", ".join(f"{n} ({show(v)}, {s})" for n, s, v in changes[key][-3:])
            lines.append(f"{what} was tried before: {tried}.")
    return lines


def render_cost(stats: dict) -> list[str]:
    mine, theirs = stats["cost"]["this"], stats["cost"]["best"]
    cells = []
    for label, value in mine.items():
        cells.append(f"{label} {value}" + (f" (best {theirs[label]})" if label in theirs else ""))
    lines = ["; ".join(cells[i : i + 4]) + "." for i in range(0, len(cells), 4)]
    m = stats["machine"] or {}
    if m.get("p95_ms"):
        usual = f", usually {m['usual_ms']:.1f}" if m["usual_ms"] else ""
        lines.append(f"Step {m['step_ms']:.1f} ms{usual}, 95th percentile {m['p95_ms']:.1f}; {m['stalls']} stall(s), "
                     f"{m['stalled_s']:.1f} s lost; start-up {show(m['startup_s'], '.0f', ' s')}.")
    if (m.get("other_gpu_mb") or 0.0) > OTHER_GPU_MB:
        lines.append(f"Another process held {m['other_gpu_mb']:.0f} MB of this GPU.")
    return lines


def render_counts(h: dict) -> str:
    counts = ", ".join(f"{n} {status}" for status, n in h["counts"].items() if n)
    return f"{h['num_runs']} run{'' if h['num_runs'] == 1 else 's'}" + (f" ({counts})" if counts else "")


def render_history(h: dict) -> list[str]:
    idle = "" if h["idle_s"] is None else f"; the GPU had nothing to do for {h['idle_s']:.0f} s before this run"
    share = "" if h["gpu_share"] is None else f", at work {h['gpu_share']:.0%} of the time so far"
    lines = [f"{render_counts(h)}{idle}{share}."]
    if h["gain"]:
        lines.append(f"Gain since the first kept run: {h['gain'] + h['optimism']:.6f} bpb as scored, {h['gain']:.6f} "
                     "after allowing for the lowest of many noisy scores reading too low.")
    if h["ideas_since_best"]:
        lines.append(f"{h['ideas_since_best']} idea(s) since the best was found.")
    if h["runs_since_best_was_run"] is not None and h["runs_since_best_was_run"] >= RERUN_EVERY:
        lines.append(f"The best was last run {h['runs_since_best_was_run']} runs ago: `uv run analyze.py rerun`.")
    return lines + [f"- {name} {show(val)} {status}: {clip(text, 60)}" for name, val, status, text in h["last"][-3:]]


def render_analysis(stats: dict, pictures: list[str]) -> str:
    """The page for the agent, without its notes: at most PAGE_LINES and PAGE_BYTES, ordered by what decides."""
    name = stats["record"]["name"]
    changes = stats["changes"]
    sections = [("Verdict", render_verdict(stats))]
    if stats["crash"]:
        sections.append(("Crash", render_crash(stats["crash"])))
    if stats["paired"]:
        sections.append(("Paired curve", render_paired(stats["paired"])))
    sections.append(("Learning and speed", render_learning(stats)))
    sections.append(("What changed", render_changes(changes) if changes else []))
    sections.append(("Layers", [f"- {clip(line, 200)}" for line in (stats["layers"] or [])[:6]]))
    sections.append(("Cost", render_cost(stats)))
    history = render_history(stats["history"]) if stats["history"] else []
    sections.append(("History", [*history, stats["calibration"]] if stats.get("calibration") else history))
    failed = [f"- not computed: {part}: {clip(why, 160)}" for part, why in stats["failed"].items()]
    sections.append(("Data", [
        f"Pictures: {', '.join(pictures) or 'none'}; across runs ../progress.png. Numbers: stats.json. "
        f'`from analyze import load_run; load_run("{name}").metrics` is a table, one row a step.',
        *failed]))
    title = f"# {name}: {clip(stats['description'], 100)}"
    return fit_page(title, [(heading, lines) for heading, lines in sections if lines])


def fit_page(title: str, sections: list[tuple[str, list[str]]]) -> str:
    """Title and sections as Markdown; what does not fit is cut from the end of the last section that can spare a line:
    the page is ordered by what decides."""
    sections = [(heading, [clip(printable(line), 400) for line in lines]) for heading, lines in sections]
    room = PAGE_BYTES - len(NOTES_HEADING) - 60
    while True:
        text = "\n\n".join([title, *("\n".join([f"## {heading}", *lines]) for heading, lines in sections)]) + "\n"
        if len(text.encode()) <= room and text.count("\n") <= PAGE_LINES - 2:
            return text
        spare = [lines for _, lines in sections[1:] if len(lines) > 3]
        (spare[-1] if spare else sections[-1][1] if sections[-1][1] else sections[0][1]).pop()


def write_analysis(folder: Path, text: str) -> None:
    """The page above the agent's notes, which stay as they are."""
    old = read_text(folder / ANALYSIS) or ""
    _, heading, notes = old.partition(NOTES_HEADING)
    write_atomic(folder / ANALYSIS, f"{text}\n{NOTES_HEADING}{notes if heading else chr(10)}")


def render_compare(runs: list[Run], entries: list[Entry]) -> str:
    """A Markdown table: scores and costs, configuration keys that differ, and the paired curve of each run against the
    first."""
    by_name = {e.name: e for e in entries}
    configs = [configuration(run.summary) for run in runs]
    own = [by_name.get(run.name) for run in runs]
    rows = [["status", *(e.status if e else "no row" for e in own)],
            ["val_bpb", *(show(e.val_bpb if e else None) for e in own)]]
    costs = [compute_costs([run]) for run in runs]
    for label in {label: None for cost in costs for label in cost}:
        rows.append([label, *(cost.get(label) or "unknown" for cost in costs)])
    for key in {k: None for config in configs for k in config}:
        values = [json.dumps(config.get(key)) if key in config else "-" for config in configs]
        if len(set(values)) > 1:
            rows.append([f"`{key}`", *(clip(v, 40) for v in values)])
    titles = ["", *(run.name for run in runs)]
    table = [titles, ["---"] * len(titles), *rows]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines += ["", *(f"{e.name}: {clip(e.description, 100)}" for e in own if e)]
    for run in runs[1:]:
        if paired := compute_paired(run, runs[:1]):
            lines += ["", f"## {run.name} against {runs[0].name}", *render_paired(paired)]
    return "\n".join(lines) + "\n"


def render_current_best(entries: list[Entry]) -> str:
    best, noise = compute_best(entries), compute_noise(entries)
    if best is None or not best.is_kept:
        return "No run is kept yet."
    e = next(e for e in entries if e.name == best.name)
    runs = f"mean of {len(best.names)} runs ({', '.join(best.names[:6])})" if len(best.names) > 1 else "one run"
    return (f"- {best.name}: val_bpb {best.mean:.6f}, {runs}\n- its change: {e.description}\n"
            f"- noise between seeds of one program: {describe_noise(noise)}")


def replace_best_section(text: str | None, content: str) -> str:
    """insights.md with this content on top of "Current Best", in place of what was written there before; every other
    byte stays, in that section too. Without such a section, one is put below the title."""
    section = f"{BEST_HEADING}\n{content}\n"
    if text is None:
        return f"# Insights\n\n{section}\n## Claims\n"
    newline = "\r\n" if "\r\n" in text else "\n"
    section = section.replace("\n", newline)
    found = re.search(r"^(#+) *Current Best[^\n]*\n?", text, re.M | re.I)
    if not found:
        title = re.match(r"# [^\n]*\n+", text)
        at = title.end() if title else 0
        return text[:at] + section + newline + text[at:]
    following = re.compile(rf"^#{{1,{len(found[1])}}} ", re.M).search(text, found.end())
    end = following.start() if following else len(text)
    heading = found[0] if found[0].endswith("\n") else found[0] + newline
    kept = BEST_LINES.sub("", text[found.end() : end])
    return text[: found.start()] + heading + section.split("\n", 1)[1] + kept + text[end:]


# ---------------------------------------------------------------------------------------------------------------------
# The morning: effects, predictions, claims, report.md, report.html, best.patch
# ---------------------------------------------------------------------------------------------------------------------

TRIED = ("new best", "unproven", "not better")  # verdicts on an idea; the others are on the run
# What follows from the knobs, or is not train.py's to set: no idea of its own.
DERIVED = re.compile(
    r"num_params\w*|flops_per_token|width|num_heads|window_sizes"
    r"|max_seq_len|time_budget|eval_tokens|demo|seed\w*"
)
# "expect -0.0006" in a commit's subject. A number without its sign, or of another unit, is none.
EXPECTED = re.compile(
    r",? *\b(?:expect|predict)\w*[^-+\d\u2212\u2013]{0,24}"
    r"([-+\u2212\u2013] ?\d*[.,]?\d+(?:e-?\d+)?)(?![\d.]| ?(?:%|ms|x|M))", re.I)
STYLE = """body {font: 15px/1.5 sans-serif; max-width: 75rem; margin: 2rem auto} img {width: 100%}
td {border-bottom: 1px solid #ddd; padding: .2rem .6rem} tr:first-child {font-weight: bold}"""
RUN_NAME = re.compile(r"\b(?:unknown-|nogit-)?[0-9a-f]{7}(?:-dirty)?(?:\.\d+)?\b")


@dataclass(frozen=True)
class Effect:
    """What one run changed against the best it was compared with, and what came of it, in bpb."""

    knob: str
    change: str
    entry: Entry
    difference: float
    error: float | None  # None where the noise is unknown
    kind: str

    @property
    def measured(self) -> str:
        return f"{self.difference:+.5f} ± {show(self.error, '.5f')}"

    @property
    def is_inside_noise(self) -> bool:
        if self.kind == "unproven" or not self.error:
            return True
        return abs(self.difference) < GAIN_ERRORS * self.error


def verdict_of(e: Entry) -> dict:
    """As it stands on the run's own page: whatever is said of a run elsewhere has the same bar."""
    return e.stats.get("verdict") or {}


def changed_knobs(e: Entry) -> dict[str, str]:
    """Knob to "before -> after". A run that changed none changed the code, and goes by its subject."""
    config = (e.stats.get("changes") or {}).get("config") or {}
    knobs = {k: pair for k, pair in config.items() if not DERIVED.fullmatch(k)}
    if knobs.get("num_kv_heads") == config.get("num_heads"):  # resolved: as many as there are heads
        knobs.pop("num_kv_heads", None)
    if not knobs:
        return {clip(read_subject(e)[0], 60): "code"}
    told = {k: f"{json.dumps(before)} -> {json.dumps(after)}" for k, (before, after) in knobs.items()}
    if len(told) == 1:
        return told
    return {k: f"{change}, one of {len(told)} changes" for k, change in told.items()}


def compute_effects(entries: list[Entry]) -> list[Effect]:
    """Everything tried: gains, then losses, then what the noise hides; the largest first. Of replicates
    the last one speaks, whose verdict is on the mean of all."""
    found: dict[tuple, Effect] = {}
    for e in entries:
        v = verdict_of(e)
        difference, error = number(v.get("difference")), number(v.get("standard_error"))
        if v.get("kind") in TRIED and difference is not None:
            for knob, change in changed_knobs(e).items():
                found[knob, e.group] = Effect(knob, change, e, difference, error, v["kind"])
    largest = sorted(found.values(), key=lambda x: -abs(x.difference))
    return sorted(largest, key=lambda x: (x.is_inside_noise, x.difference > 0))


def untouched_knobs(entries: list[Entry]) -> str:
    configs = [e.record["config"] for e in entries if e.record.get("config")]
    touched = {knob for e in entries for knob in changed_knobs(e)}
    knobs = [k for k in (configs or [{}])[-1] if k not in touched]
    return ", ".join(k for k in knobs if not DERIVED.fullmatch(k)) or "none"


def render_effects(entries: list[Entry], limit: int) -> list[str]:
    """A line for each of the `limit` knobs that matter most, then the knobs that nobody has touched."""
    by_knob: dict[str, list[str]] = {}
    for x in compute_effects(entries):
        told = f"{x.change} {x.measured} ({x.kind}, {x.entry.name})"
        by_knob.setdefault(x.knob, []).append(told)
    lines = [f"{knob}: {'; '.join(told[:3])}" for knob, told in by_knob.items()]
    return [*lines[:limit], f"never touched: {untouched_knobs(entries)}"]


def read_subject(e: Entry) -> tuple[str, float | None]:
    """The idea, and the difference that the subject expects of it, None where it expects none."""
    found = EXPECTED.search(e.description)
    if not found:
        return e.description, None
    expected = re.sub("[\u2212\u2013]", "-", found[1]).replace(" ", "").replace(",", ".")
    return e.description[: found.start()], float(expected)


def render_prediction(e: Entry, difference: float | None, error: float | None) -> str:
    """What the subject expected and what came, one line; empty without the one or the other."""
    _, expected = read_subject(e)
    if expected is None or difference is None or not error:
        return ""
    miss, told = difference - expected, "the error allows both"
    if abs(miss) > GAIN_ERRORS * error:
        told = f"{'worse' if miss > 0 else 'better'} than expected by {abs(miss):.4f}"
    return f"Expected {expected:+.4f}, came {difference:+.4f} ± {error:.4f}: {told}."


def render_calibration(entries: list[Entry]) -> str:
    """How well the author of the subjects predicts; empty before the first that was measured."""
    effects = {x.entry.name: x for x in compute_effects(entries) if x.error}
    pairs = [(read_subject(x.entry)[1], x.difference, x.error) for x in effects.values()]
    pairs = [pair for pair in pairs if pair[0] is not None]
    if not pairs:
        return ""
    expected, came, errors = np.array(pairs).T
    num_close = (abs(came - expected) <= GAIN_ERRORS * errors).sum()
    return (f"{len(pairs)} prediction(s): expected {expected.mean():+.4f} in the mean, came "
            f"{came.mean():+.4f}; the sign was right in {(expected * came > 0).sum()}, the size within "
            f"two standard errors in {num_close}.")


def check_insights(text: str | None, entries: list[Entry]) -> list[str]:
    """Claims of insights.md that cite runs which do not exist, or rest on runs inside the noise alone."""
    names, lines = {e.name for e in entries}, []
    is_inside = {x.entry.name: x.is_inside_noise for x in compute_effects(entries)}
    claims = (text or "").partition("## Claims")[2]
    for claim in re.findall(r"^[-*+] +(.+(?:\n[ \t]+\S.*)*)", claims, re.M):
        cited = [n for n in RUN_NAME.findall(claim) if n in names or not n.isdecimal()]
        if missing := [name for name in cited if name not in names]:
            lines.append(f"no run is called {', '.join(missing)}: {clip(one_line(claim), 80)}")
        elif cited and all(is_inside.get(name) for name in cited):
            lines.append(f"rests on runs inside the noise alone: {clip(one_line(claim), 80)}")
    return lines


def render_kept(entries: list[Entry], lineage: list[list]) -> list[list[str]]:
    """The kept chain: run, mean, effect as its verdict has it, whether that is outside the noise, idea."""
    by_name = {e.name: e for e in entries}
    effects, rows = {x.entry.group: x for x in compute_effects(entries)}, []
    for name, mean, _ in lineage:
        cells = ["", ""]
        if x := effects.get(by_name[name].group):
            cells = [x.measured, "no" if x.is_inside_noise else "yes"]
        rows.append([name, f"{mean:.6f}", *cells, read_subject(by_name[name])[0]])
    return rows


def compute_audit(archive: Path, names: Iterable[str]) -> float | None:
    """Mean score of these runs on validation text that no score used; None where there is none."""
    records = [read_json(archive / name / EVAL) or {} for name in names]
    scores = numbers(record.get("audit_bpb") for record in records)
    return float(np.nanmean(scores)) if np.isfinite(scores).any() else None


def render_gain(archive: Path, entries: list[Entry], h: dict, kept: list[list[str]]) -> str:
    """The paragraph a person can forward."""
    best = compute_best(entries)
    took = f"{h['hours']:.1f} h" if h["hours"] >= 1 else f"{60 * h['hours']:.1f} minutes"
    night = f"{render_counts(h)}, {took} of training"
    night += f", the GPU at work {h['gpu_share']:.0%} of the time" if h["gpu_share"] else ""
    if best is None or not h["lineage"] or h["lineage"][0][0] == best.name:
        return f"{night}. No gain over the first kept run."
    base, start, _ = h["lineage"][0]
    group = next(group for group in compute_groups(entries).values() if base in {e.name for e in group})
    won, lent, sigma = start - best.mean, h["optimism"], compute_noise(entries).sigma
    error = sigma and sigma * math.sqrt(1 / len(seed_scores(group)) + 1 / best.num_seeds)
    text = (f"val_bpb went from {start:.6f} to {best.mean:.6f} ({best.name}), a gain of {won:.6f} ± "
            f"{show(error)} (standard error) over the first kept run, {base}: {night}. ")
    if lent:
        text += f"Chosen among equals, the best reads about {lent:.6f} too low: {won - lent:.6f} remain. "
    audits = compute_audit(archive, (e.name for e in group)), compute_audit(archive, best.names)
    if None in audits:
        text += "It is not confirmed: no text but the score's own was scored. "
    else:
        text += (f"On validation text that no score used the gain is {audits[0] - audits[1]:.6f}: the search "
                 f"may have fitted {max(won - audits[0] + audits[1], 0):.6f} to the text of the score. ")
    proven = sorted((row for row in kept if row[3] == "yes"), key=lambda row: float(row[2].split()[0]))
    helped = "; ".join(f"{idea} ({measured})" for _, _, measured, _, idea in proven[:6])
    return f"{text}What helped: {helped or 'nothing that stands outside the noise'}."


def render_table(titles: str, rows: list[list[str]]) -> str:
    lines = [titles.split(", "), ["---"] * len(titles.split(", ")), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def reason_of(e: Entry) -> str:
    """Why a run has no score that counts; of one that has, the verdict."""
    v = verdict_of(e)
    told = e.record.get("crash") or e.record.get("invalid") or v.get("reasons") or v.get("kind") or ""
    return clip(told if isinstance(told, str) else "; ".join(told), 200)


def render_report(book: Book, h: dict, archive: Path, pictures: Iterable[str]) -> str:
    """The morning page for a person: what was gained, by what, and all that was tried. `h`: the history."""
    entries, title = book.entries, "# Report"
    kept = render_kept(entries, h["lineage"])
    if any(e.record.get("demo") for e in entries):
        title += " on the demo"
    effects = [[x.knob, x.change, x.measured, x.kind, x.entry.name] for x in compute_effects(entries)]
    tried = [[e.name, show(e.val_bpb), mark_of(e), reason_of(e), e.description] for e in entries]
    blocks = [
        title, render_gain(archive, entries, h, kept), "![](progress.png)",
        "## Kept, from the first to the best",
        render_table("run, val_bpb, effect, outside the noise, idea", kept),
        "## Effects", render_table("knob, change, effect, verdict, run", effects),
        f"Never touched: {untouched_knobs(entries)}. {render_calibration(entries)}",
        "## Everything tried",
        render_table("run, val_bpb, decision, verdict or reason, description", tried),
        *book.problems, "## Pictures of the best run", *(f"![]({name})" for name in pictures),
    ]
    return "\n\n".join(blocks) + "\n"


def render_html(report: str, pictures: dict[str, bytes]) -> str:
    """report.md as one page that needs no other file: the pictures lie in it."""
    text = re.sub(r"^\| ---.*\n", "", html.escape(report), flags=re.M)
    text = re.sub(r"^\|(.*) \|$", lambda row: "<tr>" + f" |{row[1]}".replace(" | ", "<td>"), text, flags=re.M)
    text = re.sub(r"((?:^<tr>.*\n)+)", r"<table>\n\1</table>\n", text, flags=re.M)
    text = re.sub(r"^## (.*)$", r"<h2>\1</h2>", text, flags=re.M)
    text = re.sub(r"^# (.*)$", r"<h1>\1</h1>", text, flags=re.M)
    text = re.sub(r"\n\n(?=[^<\n])", "\n\n<p>", text)
    for name, data in pictures.items():
        image = f"<img src='data:image/png;base64,{base64.b64encode(data).decode()}'>"
        text = text.replace(f"![]({name})", image)
    return f"<!doctype html>\n<meta charset=utf-8>\n<title>Report</title>\n<style>{STYLE}</style>\n{text}"


def diff_file(name: str, before: str | None, after: str) -> str:
    """What `git diff` would print; None: no such file yet. Only newlines end a line, as with git."""
    old, new = ([*io.StringIO(text, newline="\n")] for text in (before or "", after))
    source = "/dev/null" if before is None else f"a/{name}"
    lines = [*difflib.unified_diff(old, new, source, f"b/{name}")]
    for i, line in enumerate(lines):
        if not line.endswith("\n"):
            lines[i] = f"{line}\n\\ No newline at end of file\n"
    made = "new file mode 100644\n" if before is None else ""
    return f"diff --git a/{name} b/{name}\n{made}{''.join(lines)}" if lines else ""


def render_patch(kept: list[list[str]], base: Run, best: Run) -> str:
    """All that was kept as one diff that `git apply` takes, below what was kept and what each brought."""
    table = render_table("run, val_bpb, effect, outside the noise, idea", kept)
    told = [f"# {line}\n" for line in table.split("\n")]
    before, after = ({"train.py": r.train_py or ""} | (r.start.get("modules") or {}) for r in (base, best))
    diffs = [diff_file(name, before.get(name), text) for name, text in after.items()]
    return f"# From {base.name} to {best.name}: git apply best.patch\n{''.join([*told, *diffs])}"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

# Okabe and Ito: told apart by colour-blind eyes. This run and the best have the same colour everywhere.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999")
MARKS = {  # how progress.png shows a run: marker, colour, colour inside
    "kept": ("o", GREEN, GREEN),
    "kept, unproven": ("o", GREEN, "white"),
    "discarded": ("o", GREY, GREY),
    "pending": ("D", ORANGE, ORANGE),
    "hampered": ("s", PURPLE, "white"),
    "stopped": ("|", BLUE, BLUE),
    "crashed": ("x", VERMILION, VERMILION),
    "invalid": ("*", "black", "white"),
}
SCORED = [*MARKS][:4]  # the others have no score that counts
MOST_ROWS = 100  # of a heat map: the names of more can be read on no screen


def new_figure(title: str, *facts: dict, height: float = 7.5) -> Figure:
    """An empty figure, 1200 pixels wide. `facts`, of a run or of runs, tell whether they are the demo's."""
    from matplotlib.figure import Figure

    figure = Figure((12, height), dpi=100, layout="constrained")
    title = "demo: " * any(fact.get("demo") for fact in facts) + title
    figure.suptitle(title, x=0.01, ha="left", fontsize=13)
    return figure


def dress(axes: Axes, title: str, xlabel: str, yscale: str = "linear") -> None:
    """Titles, grid and legend of a panel whose curves are drawn."""
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.set_xlabel(xlabel, fontsize=9.5)
    axes.set_yscale(yscale)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8.5, frameon=False)


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # letters that the font lacks become boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 3})
    return buffer.getvalue()


def draw_noisy(axes: Axes, x: np.ndarray, y: np.ndarray, label: str, is_best: bool) -> None:
    """Every step as a thin line, the means over hundredths of x as a thick one; of the best these alone."""
    is_known = np.isfinite(x) & np.isfinite(y)
    x, y = x[is_known], y[is_known]
    if not is_best:
        axes.plot(x, y, color=SKY, lw=0.6, alpha=0.6, label="this, each step")
    if len(x) > 100:
        which = np.digitize(x, np.linspace(x[0], x[-1], 101)[1:-1])
        x, y = ([values[which == i].mean() for i in np.unique(which)] for values in (x, y))
    axes.plot(x, y, color=ORANGE if is_best else BLUE, lw=1.6, label=label)


def draw_loss(run: Run, best: Run | None, windows: list[dict]) -> Figure | None:
    """Training loss by tokens; below it the paired difference to the best, where there is one."""
    curves = [(r, curve) for r in (best, run) if r and (curve := compute_curve(r))]
    if not curves or curves[-1][0] is not run:
        return None
    figure = new_figure(f"{run.name}: training loss", run.start)
    grid = figure.add_gridspec(2, 1, height_ratios=(5, 3))
    axes = figure.add_subplot(grid[0] if windows else grid[:])
    for r, curve in curves:
        label = f"{'best' if r is best else 'this'}: {r.name}"
        draw_noisy(axes, curve.tokens_m, curve.loss, label, r is best)
    # The start would flatten the rest, and so would single spikes; what is low is never cut off.
    late = [c.loss[c.tokens_m > DWARFING * c.tokens_m[-1]] for _, c in curves]
    low, high = min(loss.min() for loss in late), max(np.percentile(loss, 99.5) for loss in late)
    axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3)
    dress(axes, "nats per token", "tokens, millions")
    if windows:
        draw_paired(figure.add_subplot(grid[1], sharex=axes), windows)
    return figure


def draw_paired(axes: Axes, windows: list[dict]) -> None:
    """Difference to the best by windows, with two standard errors; shaded where the text had been seen."""
    starts, ends = (numbers(w[key] for w in windows) for key in ("from_m", "to_m"))
    kinds = (("difference", "error", "tokens", BLUE),
             ("at_progress", "at_progress_error", "progress", VERMILION))
    for key, error, what, color in kinds:
        values, errors = (numbers(w.get(k) for w in windows) for k in (key, error))
        if np.isfinite(values).any():
            axes.errorbar((starts + ends) / 2, values, 2 * errors, fmt="o", color=color, label=f"at equal {what}")
    if repeats := [w["from_m"] for w in windows if w.get("is_repeat")]:
        axes.axvspan(repeats[0], ends[-1], color="0.93", label="text seen before: no measure of learning")
    axes.axhline(0, color="black", lw=0.8)
    dress(axes, "this minus best, bpb ± 2 standard errors; below zero is better", "tokens, millions")


def draw_schedule_and_machine(run: Run, best: Run | None) -> Figure | None:
    """Schedules, learning rates, gradient norm and step time. None for a run without steps to draw."""
    both = [r for r in (best, run) if r and r.step_ms is not None]
    if run not in both:
        return None
    figure = new_figure(f"{run.name}: schedules and machine", run.start)
    schedules, rates, gradient, steps = figure.subplots(2, 2).flat
    x = 100 * run.series("train/progress")
    for key in ("train/lr_multiplier", "train/muon_momentum", "train/weight_decay"):
        schedules.plot(x, run.series(key), label=key.removeprefix("train/"))
    groups: dict[bytes, list[str]] = {}  # several of the same rate are one line with all their names
    for key in sorted({k for r in run.records[:3] for k in r if k.startswith("lr/")}):
        groups.setdefault(run.series(key).tobytes(), []).append(key.removeprefix("lr/"))
    for names in groups.values():
        rates.plot(x, run.series(f"lr/{names[0]}"), label=clip(", ".join(names), 60))
    for r in both:
        x, steps_ms = 100 * r.series("train/progress"), r.series("perf/step_time_ms")
        draw_noisy(gradient, x, r.series("train/grad_norm"), r.name, r is best)
        label = f"{r.name}: median {r.step_ms:.1f}, slowest {np.nanmax(steps_ms):.0f}"
        draw_noisy(steps, x, steps_ms, label, r is best)
    xlabel, medians = "progress, % of the budget", [r.step_ms for r in both]
    steps.set_ylim(0.8 * min(medians), 1.4 * max(medians))  # a stall of ten seconds: see the legend
    dress(schedules, "schedules", xlabel)
    dress(rates, "resolved learning rates", xlabel, "log")
    dress(gradient, "gradient norm", xlabel, "log")
    dress(steps, "step time, ms", xlabel)
    return figure


def draw_layers(run: Run, best: Run | None) -> Figure | None:
    """Three heat maps, over the run and beside the best's end, and the scalars. None without layers."""
    kinds = (
        ("output RMS, log10", "layers/names", lambda r: named_values(r, "layers/names", "layers/rms")),
        ("update / weight, log10", "params/names", update_ratios),
        ("inputs near zero, share", "layers/names",
         lambda r: named_values(r, "layers/names", "layers/input_zeros")),
    )
    num_rows = max((len(r[key]) for _, key, _ in kinds for r in run.records_with(key)), default=0)
    if not num_rows:
        return None
    height = 4.5 + 0.125 * min(num_rows, MOST_ROWS)
    figure = new_figure(f"{run.name}: layers", run.start, height=height)
    grid = figure.add_gridspec(2, 3, height_ratios=(3, 1))
    for i, (title, key, look) in enumerate(kinds):
        columns, theirs = ([look(record) for record in r.records_with(key)] if r else [] for r in (run, best))
        draw_heat(figure.add_subplot(grid[0, i]), columns, theirs[-1:], len(run.records), title)
    axes = figure.add_subplot(grid[1, :])
    for r, style in ((run, "-"), (best, "--")):
        for i, (name, logged) in enumerate(r.scalars.items() if r else ()):
            axes.plot(numbers(logged[-1]), style, color=f"C{i}", label=name + " of the best" * (r is best))
    dress(axes, "scalars at the end", "layer")
    return figure


def draw_heat(axes: Axes, columns: list[dict], theirs: list[dict], num_steps: int, title: str) -> None:
    """Names down, time across, the value as colour; at the right the best's end in the same colours.
    `columns` holds the values by name at each moment."""
    names = list(dict.fromkeys(name for column in columns for name in column))
    if names:
        values = np.array([[c.get(name, math.nan) for c in (*columns, *theirs)] for name in names])
        if "log10" in title:
            values = np.log10(np.where(values > 0, values, math.nan))
        low, high = np.nanpercentile(values, [1, 99])
        look = {"aspect": "auto", "vmin": low, "vmax": max(high, low + 1e-3), "interpolation": "nearest"}
        rows, at = (len(names) - 0.5, -0.5), (1.04 * num_steps, 1.12 * num_steps)
        image = axes.imshow(values[:, : len(columns)], extent=(0, num_steps, *rows), **look)
        if theirs:
            axes.imshow(values[:, len(columns) :], extent=(*at, *rows), **look)
            axes.text(at[1], -0.8, "best", fontsize=8, ha="right")
        axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=50).ax.tick_params(labelsize=8)
    dress(axes, title, "step; grey: zero or not finite")
    axes.set_xlim(0, (1.12 if theirs else 1.0) * num_steps)
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
    if not e.is_valid:
        return "crashed" if e.status == "crash" else "invalid"
    if e.status == "keep":
        return "kept, unproven" if kind in ("unproven", "not better") else "kept"
    return "discarded" if e.status == "discard" else "pending"


def draw_progress(entries: list[Entry], lineage: list[list]) -> Figure:
    """Scores in the order of filing, what the best was at each time, and the steps that brought most."""
    figure = new_figure("val_bpb over experiments, lower is better", *(e.record for e in entries))
    axes, marks = figure.subplots(), [(i, e, mark_of(e)) for i, e in enumerate(entries, 1)]
    scores = [e.val_bpb for _, e, mark in marks if mark in SCORED] or [1.0]
    kept = [e.val_bpb for _, e, mark in marks if mark.startswith("kept")]
    low, high = min(scores), max([np.percentile(scores, 90), *kept])
    room = max(high - low, 0.004 * high)  # neither a bad run nor a single one sets the scale
    for label, (marker, color, inside) in MARKS.items():
        points = [(i, e.val_bpb) for i, e, mark in marks if mark == label]
        is_scored, size = label in SCORED, 8 if "kept" in label else 5
        points = [(i, y if is_scored and y <= high else high + 0.13 * room) for i, y in points]
        if points:
            axes.plot(*zip(*points, strict=True), marker, ms=size, color=color, mfc=inside, zorder=3,
                      label=f"{label} ({len(points)})")
    axes.axhline(high + 0.06 * room, color=GREY, lw=0.8, ls=":", label="above: off the scale, or no score")
    end = len(entries) + max(0.6, 0.02 * len(entries))
    if lineage:
        draw_lineage(axes, entries, lineage, end)
    dress(axes, "", "experiment")
    axes.set_xlim(len(entries) + 1 - end, end)
    axes.set_ylim(low - 0.1 * room, high + 0.2 * room)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_lineage(axes: Axes, entries: list[Entry], lineage: list[list], end: float) -> None:
    """The baseline and the best as lines; a number at each of the eight largest steps, and in the margin
    what they were, where no text is in another's way."""
    number_of = {e.name: i for i, e in enumerate(entries, 1)}
    x, means = [number_of[name] for name, _, _ in lineage], [mean for _, mean, _ in lineage]
    y, told = np.minimum.accumulate(means), []
    axes.axhline(y[0], color="black", lw=0.8, ls="--", label=f"baseline, {y[0]:.4f}")
    axes.step([*x, end], [*y, y[-1]], where="post", color=GREEN, lw=1.8, label=f"best, {y[-1]:.4f}")
    gains = np.diff(y, prepend=y[0])
    for k, i in enumerate(sorted(i for i in np.argsort(gains)[:8] if gains[i] < 0), 1):
        axes.annotate(str(k), (x[i], y[i]), (4, 5), textcoords="offset points", weight="bold")
        idea = clip(read_subject(entries[x[i] - 1])[0], 80)
        told.append(textwrap.fill(f"{k}  {gains[i]:+.4f}  {idea}", 40, subsequent_indent="    "))
    axes.text(1.02, 0.0, "\n".join(told), transform=axes.transAxes, fontsize=8.5, parse_math=False)


def write_pictures(run: Run, best: Run | None, paired: dict | None) -> tuple[list[str], dict[str, str]]:
    """Names of the pictures made, and why one was not: a surprise costs its picture, not the night."""
    makers = {
        "loss_curve.png": lambda: draw_loss(run, best, (paired or {}).get("windows") or []),
        "layers.png": lambda: draw_layers(run, best),
        "schedule_and_machine.png": lambda: draw_schedule_and_machine(run, best),
    }
    made, failed = [], {}
    for name, make in makers.items():
        try:
            if figure := make():
                write_atomic(run.path / name, png(figure))
                made.append(name)
        except Exception as e:  # see above
            failed[name] = f"{type(e).__name__}: {e}"
    return made, failed


# ---------------------------------------------------------------------------------------------------------------------
# File: from the working folder into the archive
# ---------------------------------------------------------------------------------------------------------------------

# What the log of a program shows that died before it could write its start file. Without one of these the log is of a
# program that has only just been started, or of something else.
ENDED = re.compile(
    r"crash:|Error\b|error:|Exception|Traceback|Interrupt|Killed|Terminated|not found|core dumped|No such file"
)
STARTING_S = 120.0  # importing torch from a cold disk takes a minute


def find_outputs(folder: Path) -> list[Run]:
    """The runs whose outputs lie in the folder, oldest first: none, one, or two. Two where the log is of a start that
    died before it could put the earlier run's files away (a syntax error)."""
    log = printable(read_log(folder / LOG) or "")
    start, summary = read_fields(folder / START, []), read_fields(folder / SUMMARY, [])
    if not start:
        return find_unmarked_outputs(folder, log, summary)
    run_id, owner = start.get("run_id"), summary.get("run_id")
    if owner in (None, run_id):
        files, remarks = [START, METRICS, EVAL, SUMMARY], ()
    else:
        files, remarks = [START, METRICS], (f"{SUMMARY} is of run {owner}, not of {run_id}: left out",)
    if not log.strip() or log_run_id(log) == run_id:
        return [with_remarks(load_folder(folder, files=[*files, LOG]), *remarks)]
    run = with_remarks(load_folder(folder, files=files), *remarks, f"{LOG} is of another run: left out")
    if log_run_id(log) or not ENDED.search(log):
        return [run]
    return sorted([run, load_folder(folder, files=[LOG])], key=lambda run: max(p.stat().st_mtime for p in run.files))


def find_unmarked_outputs(folder: Path, log: str, summary: dict) -> list[Run]:
    """Outputs without a start file, which every program leaves that loads the data: of one that died before that, or
    that was run with an earlier prepare.py. A summary that the log does not confirm is an older run's."""
    scored = number(parse_closing_block(log).get("val_bpb"))
    if summary and (not log.strip() or abs((scored or 0) - (number(summary.get("val_bpb")) or 0)) < 2e-6):
        return [load_folder(folder, files=[LOG, METRICS, EVAL, SUMMARY])]
    return [load_folder(folder, files=[LOG])] if scored is not None or ENDED.search(log) else []


def with_remarks(run: Run, *remarks: str) -> Run:
    return replace(run, damage=(*run.damage, *remarks))


def is_starting(folder: Path) -> bool:
    """Whether the log is that of a program which was started a moment ago and has not come to say what run it is."""
    log = read_log(folder / LOG)
    if log is None or log_run_id(log) or ENDED.search(log) or parse_closing_block(log):
        return False
    return abs(time.time() - (folder / LOG).stat().st_mtime) < STARTING_S


def find_origin(run: Run, folder: Path) -> Origin:
    """Never HEAD by default: a run says what it was trained from. One that cannot say is given to HEAD only where it
    is younger than HEAD's commit."""
    head = (git(folder, "rev-parse", "HEAD") or "").strip()
    commit = run.start.get("git_commit") or run.summary.get("git_commit") or ""
    if not commit and not run.start and head:
        began_unix = run_start_unix(run) - (number(run.summary.get("total_seconds")) or 0.0)
        commit = head if began_unix >= int(git(folder, "log", "-1", "--format=%ct")) else ""
    is_known = re.fullmatch(r"[0-9a-f]{7,40}", commit) is not None
    committed = git(folder, "show", f"{commit}:./train.py") if is_known else None
    text = run.start.get("train_py") or (committed if head else read_text(folder / "train.py"))
    if not is_known:
        return Origin(f"unknown-{sha256(normal(text) or run.identity)[:7]}", None, text, "(no commit)")
    subject = one_line(git(folder, "log", "-1", "--format=%s", commit) or "") or "(commit not in this repository)"
    if run.start.get("git_dirty") or (committed is not None and normal(text) != normal(committed)):
        return Origin(f"{commit[:7]}-dirty", commit, text, f"{subject} (with uncommitted changes)")
    return Origin(commit[:7], commit, text, subject)


def is_news(run: Run, filed: Entry | None) -> bool:
    """Whether a run is to be filed: not yet, or without the score that it has now."""
    return filed is None or bool(run.summary and not filed.record.get("is_finished"))


def file_run(run: Run, archive: Path, folder: Path, book: Book) -> str:
    """Put the run's files, record and row into the archive. Returns its name.

    The folder appears whole, under its final name, by one rename. A run that was filed before it had a score is filed
    again in its own folder, the record last. A kill in between is mended by the next call."""
    origin, old = find_origin(run, folder), book.find(run)
    taken = {path.name for path in archive.iterdir()}
    name = old.name if old else first_free(origin.name, taken.__contains__, ".")
    run = replace(run, name=name, train_py=origin.train_py)
    record = compute_record(run, book.facts, origin)
    if record["is_finished"] and not record["invalid"]:
        begun = {key: record[key] for key in COMPARABLE if book.facts.get(key) is None and record[key] is not None}
        if begun:
            write_json(archive / FACTS, {"created_unix": time.time()} | book.facts | begun)
    # Two levels down, where train.py does not take it for archived.
    target = archive / name if old else archive / f".tmp-{os.getpid()}" / name
    target.mkdir(parents=True, exist_ok=True)
    for path in run.files:
        copy_file(path, target / path.name)
    if run.train_py is not None:
        write_atomic(target / "train.py", run.train_py)
    if old:
        save_table(archive, [e for e in book.entries if e is not old])
    write_json(target / STATS, {"record": record})
    if not old:
        os.rename(target, archive / name)
        target.parent.rmdir()
    save_table(archive, load_book(archive).entries)
    return name


def copy_file(source: Path, target: Path) -> None:
    """Copy a run's file; of a very long log, its ends."""
    if source.name == LOG and source.stat().st_size > LOG_BYTES:
        return write_atomic(target, read_log(source) or "")
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.copy2(source, temporary)
    os.replace(temporary, target)


def file_unfiled(archive: Path, folder: Path) -> list[str]:
    """File the runs that a later start put away before they were analyzed, by time of start. Says what was done. One
    that is still on its way there has a hidden name."""
    told, found = [], []
    for path in (archive / "unfiled").glob("[!.]*"):
        run = load_folder(path)
        if path.is_symlink() or not run.start:
            told.append(f"unfiled/{path.name} is {'a link' if path.is_symlink() else 'no readable run'}: left there")
        elif not is_running(path):
            found.append(run)
    for run in sorted(found, key=lambda run: (run_start_unix(run), run.path.name)):
        told.append(f"unfiled run {run.path.name} {file_one_unfiled(run, archive, folder)}")
    return told


def file_one_unfiled(run: Run, archive: Path, folder: Path) -> str:
    book = load_book(archive)
    if LOG not in {path.name for path in run.files}:
        run = with_remarks(run, "the next run was started before this one was analyzed: its log is lost")
    filed = book.find(run)
    if not is_news(run, filed):
        said = f"was filed already as {filed.name}"
    elif environment_failure(run):
        (archive / "failed").mkdir(exist_ok=True)
        os.rename(run.path, archive / "failed" / first_free(run.path.name, lambda n: (archive / "failed" / n).exists()))
        return "failed over its environment: not an experiment, put into failed/"
    else:
        said = f"filed as {file_run(run, archive, folder, book)}"
    shutil.rmtree(run.path)
    return said


# ---------------------------------------------------------------------------------------------------------------------
# Write: the pages of a run and of the archive
# ---------------------------------------------------------------------------------------------------------------------


def write_pages(archive: Path) -> None:
    """Write what is missing: the pages of runs just filed or whose analysis was killed, then those of the archive."""
    book = load_book(archive)
    if not book.entries:
        return
    for name in [e.name for e in book.entries]:
        if "verdict" not in read_stats(archive / name) or not (archive / name / ANALYSIS).exists():
            write_run_pages(archive, book, book.entry(name))
            book = load_book(archive)
    table, report = archive / RESULTS, archive / "report.md"  # the report is written last
    update_insights(archive, render_current_best(book.entries))
    if not report.exists() or report.stat().st_mtime_ns < table.stat().st_mtime_ns:
        write_morning(archive, book)


def write_run_pages(archive: Path, book: Book, this: Entry) -> None:
    """Statistics, diff, pictures and analysis of one archived run."""
    before, folder = book.entries[: book.entries.index(this)], archive / this.name
    run = load_folder(folder, this.name)
    best_runs = [load_folder(archive / name, name) for name in best_names(compute_best(before, this))]
    best_run = best_runs[0] if best_runs else None
    stats = compute_stats(run, this, [*before, this], best_runs)
    diff = diff_lines(best_run.train_py, run.train_py, best_run.name) if best_run else []
    write_atomic(folder / "train.diff", "".join(line if line.endswith("\n") else line + "\n" for line in diff))
    pictures, failed = write_pictures(run, best_run, stats.get("paired"))
    stats["failed"] |= failed
    stats["record"]["name"] = this.name
    write_analysis(folder, render_analysis(stats, pictures))
    write_json(folder / STATS, stats)  # last: a run whose statistics stand has all its pages


def best_names(best: Best | None) -> list[str]:
    """The runs to compare with: the best's own and its newest replicates, five at most, which is enough for a mean."""
    if best is None:
        return []
    others = [n for n in best.names if n != best.name]
    return [best.name, *others[-4:]]


def update_insights(archive: Path, content: str) -> None:
    """Put what is known of the best on top of "Current Best". Agents write to this file meanwhile: it is replaced only
    where it is still what was read, and what somebody appends to the old file in between is appended to the new."""
    path = archive / INSIGHTS
    if not path.exists():
        write_atomic(path, replace_best_section(None, content))
    for _ in range(50):
        with open(path, "rb") as old:
            data = old.read()
            new = replace_best_section(data.decode("utf-8", "surrogateescape"), content)
            new = new.encode("utf-8", "surrogateescape")
            if new == data:
                return
            temporary = path.with_name(f".tmp-{os.getpid()}-{INSIGHTS}")
            temporary.write_bytes(new)
            if path.read_bytes() != data:
                continue
            os.replace(temporary, path)
            for pause_s in (0.0, 0.05, 0.2):  # an append that was under way lands in the old file
                time.sleep(pause_s)
                if late := old.read():
                    with open(path, "ab") as f:
                        f.write(late)
            return


def write_morning(archive: Path, book: Book) -> None:
    """progress.png, best.patch, report.html and, last, report.md: where it is new, all of them are."""
    entries, best, h = book.entries, compute_best(book.entries), compute_history(book.entries)
    pictures = {"progress.png": png(draw_progress(entries, h["lineage"]))}
    write_atomic(archive / "progress.png", pictures["progress.png"])
    for picture in ("loss_curve.png", "layers.png", "schedule_and_machine.png"):
        if best and (archive / best.name / picture).exists():
            pictures[f"{best.name}/{picture}"] = (archive / best.name / picture).read_bytes()
    (archive / "best.patch").unlink(missing_ok=True)
    if h["lineage"] and h["lineage"][0][0] != best.name:
        base, kept = (load_folder(archive / name, name) for name in (h["lineage"][0][0], best.name))
        write_atomic(archive / "best.patch", render_patch(render_kept(entries, h["lineage"]), base, kept))
    report = render_report(book, h, archive, [*pictures][1:])
    write_atomic(archive / "report.html", render_html(report, pictures))
    write_atomic(archive / "report.md", report)


# ---------------------------------------------------------------------------------------------------------------------
# Status
# ---------------------------------------------------------------------------------------------------------------------

FILE, WAIT = "uv run analyze.py", "uv run analyze.py --wait"
AGAIN = "train the same commit again"


def describe_here(archive: Path, folder: Path, book: Book) -> tuple[str, str | None]:
    """The newest run whose outputs lie in the folder, and what is to be done about it, None where that is nothing."""
    if is_running(folder):
        num_steps = len((read_text(folder / METRICS) or "").splitlines())
        return f"run {read_fields(folder / START, []).get('run_id')} is in progress, {num_steps} steps so far", WAIT
    if is_starting(folder):
        return f"a start that has written nothing to {LOG} yet", WAIT
    runs = find_outputs(folder)
    if not runs:
        return "no run's outputs", None
    run, filed = runs[-1], book.find(runs[-1])
    run_id = run.run_id or "without an id"
    if not is_news(run, filed):
        return describe_filed(filed, archive, folder, book)
    if failure := environment_failure(run):
        return f"run {run_id} failed over its environment: {clip(failure, 150)}", "mend that, then train again"
    return f"run {run_id} is not filed yet: `{FILE}`", FILE


def describe_filed(e: Entry, archive: Path, folder: Path, book: Book) -> tuple[str, str | None]:
    later, best = book.entries[book.entries.index(e) + 1 :], compute_best(book.entries)
    told = f"run {e.name}, filed, {e.status}: {clip(e.description, 80)}"
    if not any(other.group[0] == e.group[0] for other in later):  # not trained again since
        if e.record.get("was_killed"):
            return f"run {e.name}, filed, {KILLED}: the idea was not tested; {AGAIN}", AGAIN
        if e.record.get("hampered"):
            return f"run {e.name}, filed, {e.status} (hampered by the machine: {AGAIN})", AGAIN
    if e.status == "pending":
        return told, f"read {archive / e.name / ANALYSIS}, then keep or discard {e.name}"
    own = e.record.get("train_sha256")
    is_left = own == sha256(normal(read_text(folder / "train.py")) or "")
    if e.status != "keep" and is_left and best and best.is_kept and own != book.entry(best.name).record["train_sha256"]:
        return told, f"{FILE} discard"
    return told, None


def compute_next(archive: Path, folder: Path, book: Book) -> str:
    """What to do where no run's outputs ask for anything."""
    text, committed = (normal(x) for x in (read_text(folder / "train.py"), git(folder, "show", "HEAD:./train.py")))
    if not book.entries:
        branch = git(folder, "symbolic-ref", "--quiet", "--short", "HEAD") or ""
        if not branch.startswith("autoresearch/") or not (archive / INSIGHTS).exists():
            return f"{FILE} start"
        return "train the baseline (program.md, step 2)"
    if committed is not None and text != committed:
        return "finish that edit (git diff), then check, commit, train"
    if sha256(text or "") not in {e.record.get("train_sha256") for e in book.entries}:
        return "train (this commit has no run)"
    return "the next idea (program.md, step 8)"


def find_running(book: Book, folder: Path) -> list[Run]:
    """The runs under way in other folders: those that are known to this archive, and git's other worktrees."""
    folders = {e.record.get("folder") for e in book.entries}
    listed = git(folder, "worktree", "list", "--porcelain") or ""
    folders |= set(re.findall(r"^worktree (.+)$", listed, re.M))
    others = sorted(Path(name) for name in folders - {None, str(folder)})
    return [load_folder(path, files=[START]) for path in others if is_running(path)]


def describe_running(run: Run) -> str:
    commit = run.start.get("git_commit")
    subject = git(run.path, "log", "-1", "--format=%s", commit) if commit else None
    return f"{(commit or 'no commit')[:7]} in {run.path}: {clip(one_line(subject or 'unknown'), 70)}"


def list_items(text: str | None) -> list[str]:
    """List items that are not indented, as in the queue and the claims."""
    return [one_line(item) for item in re.findall(r"^(?:[-*+]|\d+[.)]) +(\S.*)", text or "", re.M)]


def compute_status(archive: Path, folder: Path) -> dict:
    book = load_book(archive)
    best, noise, history = compute_best(book.entries), compute_noise(book.entries), compute_history(book.entries)
    started, insights = history["first_start_unix"], read_text(archive / INSIGHTS)
    here, todo = describe_here(archive, folder, book)
    return {
        "demo": is_demo(),
        "best": {"name": best.name, "val_bpb": best.mean, "runs": list(best.names), "is_kept": best.is_kept}
        | {"description": book.entry(best.name).description} if best else None,
        "noise": {"sigma": noise.sigma, "source": noise.source},
        "here": here,
        "live": compute_live(archive, folder, book, best),
        "elsewhere": [describe_running(run) for run in find_running(book, folder)],
        "pending": [e.name for e in book.entries if e.status == "pending"],
        "unfiled": sorted(p.name for p in (archive / "unfiled").glob("[!.]*/")),
        **{key: history[key] for key in ("num_runs", "counts", "last", "ideas_since_best", "gain")},
        "queue": list_items(read_text(archive / QUEUE)),
        "claims": list_items((insights or "").partition("## Claims")[2]),
        "doubts": check_insights(insights, book.entries),
        "effects": render_effects(book.entries, 10),
        "hours_used": history["hours"],
        "hours_since_first_start": (time.time() - started) / 3600 if started else None,
        "gpu_share": compute_gpu_share(book.entries),
        "problems": book.problems,
        "next": todo or compute_next(archive, folder, book),
    }


def compute_live(archive: Path, folder: Path, book: Book, best: Best | None) -> list[str]:
    """How the run in progress here stands: share of the budget, and the difference from the best on the same text. It
    is hopeless where it is further behind than any run of this archive was, at that share, that came within the noise
    in the end; nothing is said in the first quarter, in which learning rates and batch sizes mislead."""
    if not is_running(folder):
        return []
    run = load_folder(folder, "this run", [START, METRICS])
    trained_s = number(run.records[-1].get("time/training_s")) if run.records else None
    budget_s = number(book.entry(best.name).record.get("time_budget")) if best else None
    if trained_s is None or not budget_s:
        return []
    share = trained_s / budget_s
    line = f"{share:.0%} of the budget, {max(budget_s - trained_s, 0):.0f} s left before the score"
    paired = compute_paired(run, [load_folder(archive / best.name, best.name)])
    if not paired or not paired["windows"]:
        return [line]
    last = paired["windows"][-1]
    line += f"; at equal tokens {last['difference']:+.4f} ± {last['error']:.4f} bpb against {best.name}"
    limit = farthest_behind(book.entries, share)
    if share < 0.25 or limit is None or last["difference"] - 2 * last["error"] <= limit:
        return [line]
    return [line, f"hopeless: no run that came within the noise was so far behind here ({limit:+.4f} at most): "
                  "`uv run analyze.py stop` ends it"]


def farthest_behind(entries: list[Entry], share: float) -> float | None:
    """The largest difference from the best, at this share of the budget, of the runs that came within two standard
    errors of it in the end. None with fewer than five such runs."""
    found = []
    for e in entries:
        verdict, paired = e.stats.get("verdict") or {}, e.stats.get("paired") or {}
        difference, error = (number(verdict.get(key)) for key in ("difference", "standard_error"))
        if not e.is_valid or None in (difference, error) or difference > 2 * error:
            continue
        windows = [w for w in paired.get("windows") or [] if (number(w.get("progress")) or 0) >= share]
        found += [number(w["difference"]) for w in windows[:1]]
    return max(found) if len(found) >= 5 else None


def render_status(s: dict) -> str:
    """At most STATUS_LINES lines, of which the last says what to do; where they do not suffice, claims are left out,
    and counted."""
    best, lines = s["best"], ["demo (AUTORESEARCH_DEMO): its archive is its own"] if s["demo"] else []
    if best:
        mean = f"mean of {len(best['runs'])} runs" if len(best["runs"]) > 1 else "one run"
        stands_in = "" if best["is_kept"] else " (nothing is kept yet: the first valid run stands in)"
        lines.append(f"best: {best['name']} val_bpb {best['val_bpb']:.6f}, {mean}{stands_in}: {best['description']}")
    else:
        lines.append("best: none yet")
    since = f", {s['hours_since_first_start']:.1f} h since the first" if s["hours_since_first_start"] else ""
    share = f"; a run was under way for {s['gpu_share']:.0%} of the time" if s["gpu_share"] else ""
    lines += [
        f"noise: sigma {show(s['noise']['sigma'])} bpb ({s['noise']['source']})",
        f"archive: {render_counts(s)}; {s['hours_used']:.2f} h in runs{since}{share}",
        f"this folder: {s['here']}",
        *(f"  {line}" for line in s["live"]),
        *(f"under way elsewhere: {line}" for line in s["elsewhere"][:6]),
        f"pending, decide keep or discard: {', '.join(s['pending'][-10:]) or 'none'}",
    ]
    if s["unfiled"]:
        lines.append(f"not filed yet, run `{FILE}`: {', '.join(s['unfiled'][:10])}")
    lines += [f"problem: {p}" for p in s["problems"][:5]]
    lines += ["last runs:"] + [f"  {n}  {show(v)}  {status:8} {d}" for n, v, status, d in s["last"]]
    lines += [f"queue: {len(s['queue'])} idea(s) in {QUEUE}", *(f"  {item}" for item in s["queue"][:3])]
    if s["effects"]:
        lines += ["effects on val_bpb:", *(f"  {line}" for line in s["effects"][:11])]
    lines += [f"doubtful: {line}" for line in s["doubts"][:5]]
    room = STATUS_LINES - len(lines) - 2
    lines.append(f"claims in {INSIGHTS}: {len(s['claims'])}")
    if len(s["claims"]) <= room:
        lines += [f"  {item}" for item in s["claims"]]
    else:
        lines += [f"  {item}" for item in s["claims"][: room - 1]] + [f"  and {len(s['claims']) - room + 1} more"]
    lines.append(f"next: {s['next']}")
    return "\n".join(clip(one_line(line) if line[0] != " " else "  " + one_line(line), 160) for line in lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Check: before a run
# ---------------------------------------------------------------------------------------------------------------------

DISK_GB = 2.0  # a checkpoint and what the compiler caches take less


def imported_modules(folder: Path, text: str) -> dict[str, str]:
    """The folder's own .py files that a program imports, and those that they import: name to text."""
    found: dict[str, str] = {}
    waiting = [text]
    while waiting:
        for name in re.findall(r"^\s*(?:from|import)\s+(\w+)", waiting.pop(), re.M):
            source = read_text(folder / f"{name}.py")
            if source is not None and f"{name}.py" not in found and name not in ("prepare", "analyze", "train"):
                found[f"{name}.py"] = source
                waiting.append(source)
    return found


def compute_check(archive: Path, folder: Path) -> tuple[list[str], list[str]]:
    """What speaks against training train.py as it lies here, and what else is worth knowing, a line each."""
    text = read_text(folder / "train.py") or ""
    try:
        values = static_config(text)
    except (SyntaxError, ValueError, RecursionError) as e:
        return [f"train.py does not parse: line {getattr(e, 'lineno', '?')}: {getattr(e, 'msg', e)}"], []
    book, modules = load_book(archive), imported_modules(folder, text)
    faults = find_repeats(book, folder, text, modules, values) + find_batch_fault(folder, values)
    changed = git(folder, "status", "--porcelain", "--", "prepare.py", "analyze.py", *modules) or ""
    if names := sorted(line[3:].strip() for line in changed.splitlines()):
        faults.append(f"changed besides train.py: {', '.join(names)}; commit what belongs to the idea, undo the rest")
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < DISK_GB:
        faults.append(f"the disk is nearly full: {free_gb:.1f} GB are free; a run needs {DISK_GB:.0f}")
    told = describe_change(archive, book, text, values)
    return faults, told[:1] if faults else told


def find_repeats(book: Book, folder: Path, text: str, modules: dict, values: dict) -> list[str]:
    """The newest run that this program would repeat, or that had its code and its configuration written in another
    way; and those under way elsewhere. A run that was hampered or killed, and a first failed launch, say nothing."""
    program, exact = program_hash(text, modules=modules), program_hash(text, hide_seed=False, modules=modules)
    code, faults, best = program_hash(text, modules=modules, hide_config=True), [], compute_best(book.entries)
    same = [e for e in book.entries if e.record.get("program") == program
            or (e.record.get("code") == code and values and has_configuration(e, values))]
    for e in [] if is_inconclusive(same) else same[-1:]:
        seed = "" if e.record.get("program_and_seed") == exact else " but for its seed"
        what = f"program{seed}" if e.record.get("program") == program else "configuration"
        again = "; `uv run analyze.py rerun` runs the best again" if best and e.group == best.group else ""
        result = f"{e.name} scored {show(e.val_bpb)}, {e.status}: {clip(e.description, 60)}{again}"
        faults.append(f"this {what} was trained before: {result}")
    for run in find_running(book, folder):
        if program_hash(run.start.get("train_py"), modules=run.start.get("modules")) == program:
            faults.append(f"this program is being trained now: {describe_running(run)}")
    return faults


def has_configuration(e: Entry, values: dict) -> bool:
    theirs = e.record.get("config") or {}
    return bool(theirs) and all(theirs.get(k) == v for k, v in values.items() if not is_seed(k))


def is_inconclusive(runs: list[Entry]) -> bool:
    """Whether the last of these runs of one program asks for another."""
    last = runs[-1].record if runs else {}
    is_launch = len(runs) == 1 and re.search(LAUNCH, last.get("crash") or "", re.I)
    return bool(last.get("was_killed") or last.get("hampered") or is_launch)


def find_batch_fault(folder: Path, values: dict) -> list[str]:
    """Whether total_batch_size is a multiple of what one pass takes, as far as both scripts say it in plain numbers."""
    found = re.search(r"^MAX_SEQ_LEN = (?:(\d+) if DEMO else )?(\d+)", read_text(folder / "prepare.py") or "", re.M)
    total, rows = (number(values.get(key)) for key in ("total_batch_size", "device_batch_size"))
    if not found or not total or not rows or is_demo():  # the demo has sizes of its own
        return []
    tokens = rows * int(found[2])
    if total % tokens == 0:
        return []
    return [f"total_batch_size {total:.0f} is no multiple of {tokens:.0f}, the tokens of one pass"]


def describe_change(archive: Path, book: Book, text: str, values: dict) -> list[str]:
    """What a program changes against the best, and which other run had its configuration."""
    best = compute_best(book.entries)
    if best is None:
        return ["nothing to compare with: this is the first program"]
    config = book.entry(best.name).record.get("config", {})
    knobs = [f"{k} {json.dumps(config[k])} -> {json.dumps(v)}" for k, v in values.items() if config.get(k, v) != v]
    diff = diff_lines(normal(read_text(archive / best.name / "train.py")), normal(text), best.name)
    added, removed = (sum(d.startswith(sign) and not d.startswith(sign * 3) for d in diff) for sign in "+-")
    told = [f"against {best.name}: {', '.join([*knobs, f'+{added} -{removed} lines of train.py'])}"]
    for e in [e for e in book.entries if knobs and has_configuration(e, values)][-1:]:
        result = f"{e.name} scored {show(e.val_bpb)}, {e.status}"
        told.append(f"this configuration, with other code, was trained before: {result}")
    return told


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------

# What `start` puts into the queue: from public logs of this experiment on another machine (H100, one run each; noise
# about 0.001), each change on top of earlier ones. Where to look first, not what is true here.
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
TRAIN = "uv run train.py > run.log 2>&1"


def wait_for_run(folder: Path) -> None:
    """Block until no run is in progress here. One that was started a moment ago has not said anything yet."""
    while is_running(folder) or is_starting(folder):
        time.sleep(0.2)


def mend_table(archive: Path) -> Book:
    """The books, and results.tsv as they have it: without lines that are no rows, with those that were lost."""
    book = load_book(archive)
    save_table(archive, book.entries)
    return book


def command_file(archive: Path, folder: Path) -> int:
    """File whatever is not filed yet and write the pages. Returns the exit status."""
    with locked(archive):
        told = mend_table(archive).problems + file_unfiled(archive, folder)
        print("".join(f"{line}\n" for line in told), end="")
        runs = [] if is_running(folder) else find_outputs(folder)
        failed, name, is_new = None, None, False
        for run in runs:
            book = load_book(archive)
            filed = book.find(run)
            is_new = is_news(run, filed)
            failed = environment_failure(run) if is_new else None
            name = filed.name if filed else None
            if is_new and not failed:
                name = file_run(run, archive, folder, book)
        write_pages(archive)
    if name:
        print_verdict(archive, name, is_new)
    elif failed:
        return report_environment(runs[-1], failed.removeprefix("error:").strip())
    elif is_running(folder):
        raise AnalyzeError(f"{describe_here(archive, folder, load_book(archive))[0]}: wait for its end (`{WAIT}`), "
                           "then call this again")
    elif not told:
        raise AnalyzeError(f"no run's outputs in {folder}: run `{TRAIN}` there first")
    return 0


def report_environment(run: Run, failure: str) -> int:
    """Say what is broken, and note it in the run's start file: its log will be gone once the next run has begun."""
    if run.start and not run.start.get("ended"):
        write_json(run.path / START, run.start | {"ended": f"error: {failure}"})
    print(f"error: the environment failed, not the experiment; nothing was filed. {failure}", file=sys.stderr)
    return 2


def print_verdict(archive: Path, name: str, is_new: bool) -> None:
    if not is_new:
        print(f"{name} is filed already: nothing changed")
    page = read_text(archive / name / ANALYSIS) or ""
    verdict = page.partition("## Verdict\n")[2].partition("\n\n")[0]
    print(printable(f"run {name}\n{verdict}\nanalysis: {archive / name / ANALYSIS}"))


def decided_run(name: str | None, folder: Path, book: Book) -> Entry:
    """The run a decision is about: the one named, else the newest whose outputs lie here, else the only one
    pending that was trained here. Never another folder's in a shared archive: its agent has yet to decide."""
    if name is not None:
        return book.entry(resolve_name(name, [e.name for e in book.entries]))
    if runs := find_outputs(folder):
        if filed := book.find(runs[-1]):
            return filed
        raise AnalyzeError(f"the run here is not filed yet: `{FILE}`; or name the run you mean")
    pending = [e for e in book.entries if e.status == "pending"]
    mine = [e for e in pending if e.record.get("folder") == str(folder)]
    if len(mine) == 1:
        return mine[0]
    listed = ", ".join(f"{e.name} (trained in {e.record.get('folder')})" for e in pending[-5:])
    raise AnalyzeError(f"no run's outputs in {folder}, and {len(mine)} pending runs were trained there; pending: "
                       f"{listed or 'none'}; name the run you mean: `{FILE} keep RUN` or `discard RUN`")


def set_status(archive: Path, book: Book, this: Entry, status: str) -> None:
    """In the run's row, and in its folder, from which a lost row is made again."""
    stats = read_stats(archive / this.name)
    if stats and stats["record"].get("status") != status:
        write_json(archive / this.name / STATS, stats | {"record": stats["record"] | {"status": status}})
    cells = this.row.split("\t", 4)
    new = replace(this, row="\t".join([*cells[:3], status, cells[4]]))
    save_table(archive, [new if e is this else e for e in book.entries])
    write_pages(archive)


def command_keep(name: str | None, archive: Path, folder: Path) -> None:
    with locked(archive):
        book = mend_table(archive)
        this = decided_run(name, folder, book)
        if not this.is_valid:
            reasons = this.record.get("invalid") or this.record.get("hampered") or ["it is invalid"]
            why = "it has no score" if this.val_bpb is None else "; ".join(reasons)
            raise AnalyzeError(f"{this.name} cannot be kept: {why}")
        verdict = compute_verdict(this, book.entries)
        set_status(archive, book, this, "keep")
        best = compute_best(load_book(archive).entries)
    print(f"{this.name} kept; the best is {best.name} at {best.mean:.6f} ({len(best.names)} run(s))")
    if verdict["kind"] == "unproven":
        print(f"mind: {verdict['difference']:+.6f} bpb is inside the noise: kept, and not claimed")
    elif verdict["kind"] == "not better":
        print(f"mind: it is worse than {verdict['best']} by {verdict['difference']:.6f} bpb")


def command_discard(name: str | None, archive: Path, folder: Path) -> None:
    """Set the status and go back to the best's program. Refuses, with nothing changed, if a text would be lost."""
    with locked(archive):
        book = mend_table(archive)
        this = decided_run(name, folder, book)
        best = compute_best([replace(e, status="discard") if e is this else e for e in book.entries])
        check_nothing_is_lost(archive, folder, book, [this.name, *([best.name] if best else [])])
        told = f"{this.name} stays {this.status}"
        if this.val_bpb is not None and this.status != "invalid":
            set_status(archive, book, this, "discard")
            told = f"{this.name} discarded"
        print(f"{told}; {restore_best(this, best, archive, folder)}")


def program_files(archive: Path, name: str) -> dict[str, str]:
    """The texts of an archived run's train.py and of the modules that it imported."""
    modules = read_fields(archive / name / START, []).get("modules") or {}
    files = {file: str(text) for file, text in modules.items() if ".." not in file and not file.startswith("/")}
    text = read_text(archive / name / "train.py")
    return files | ({} if text is None else {"train.py": text})


def check_nothing_is_lost(archive: Path, folder: Path, book: Book, names: list[str]) -> None:
    """AnalyzeError if a file of the program, here or in git's index, holds text that is nowhere else."""
    archived = {sha for e in book.entries for sha in (e.record.get("modules") or {}).values()}
    archived |= {e.record.get("train_sha256") for e in book.entries}
    for file in {"train.py"}.union(*(program_files(archive, name) for name in names)):
        texts = {normal(text) for text in (read_text(folder / file), git(folder, "show", f":./{file}"))}
        texts -= {None, normal(git(folder, "show", f"HEAD:./{file}"))}
        if {sha256(text) for text in texts} - archived:
            raise AnalyzeError(f"{file} has changes that are neither committed nor archived, and discarding would lose "
                               f"them: commit them (git commit {file}) or undo them (git checkout {file})")


def restore_best(this: Entry, best: Best | None, archive: Path, folder: Path) -> str:
    """Bring back and commit the best's program, and no other file. Says what was done; other changes stay."""
    if best is None or not best.is_kept:
        return "no run is kept yet, train.py is left as it is"
    here = normal(read_text(folder / "train.py"))
    if here not in [None, *(normal(read_text(archive / name / "train.py")) for name in (best.name, this.name))]:
        return "train.py has moved on since that run: left as it is"
    return bring_back(best.name, archive, folder, f"Back to the best, {best.name}, after {this.name}")


def bring_back(name: str, archive: Path, folder: Path, message: str) -> str:
    """Put an archived run's program into the folder and commit it. Says what was done."""
    files = program_files(archive, name)
    if "train.py" not in files:
        raise AnalyzeError(f"the archive has no train.py of {name}: restore it by hand")
    for leftover in folder.glob(".tmp-*.py"):  # of a call that was killed here
        leftover.unlink(missing_ok=True)
    has_git = git(folder, "rev-parse", "HEAD") is not None
    changed = [f for f in files if normal(read_text(folder / f)) != normal(files[f])]
    new = [f for f in files if has_git and normal(git(folder, "show", f"HEAD:./{f}")) != normal(files[f])]
    for file in changed:
        write_atomic(folder / file, files[file])
    if not changed and not new:
        return f"train.py is that of the best, {name}: nothing to commit"
    if new:
        try:
            git_commit(folder, message, new)
        except AnalyzeError as e:
            raise AnalyzeError(f"train.py is back to that of {name} but {e}") from None
    done = ", and committed" if new else ("" if has_git else " (no git: not committed)")
    return f"train.py is back to that of the best, {name}{done}"


def command_status(archive: Path, folder: Path, is_json: bool) -> None:
    status = compute_status(archive, folder)
    print(json.dumps(plain(status), indent=1) + "\n" if is_json else render_status(status), end="")


def command_compare(names: list[str], archive: Path) -> None:
    runs = [load_run(name, archive) for name in names]
    print(printable(render_compare(runs, load_book(archive).entries)), end="")


def command_check(archive: Path, folder: Path) -> int:
    faults, told = compute_check(archive, folder)
    for line in [*faults, *told]:
        print(clip(one_line(line), 300))
    return 1 if faults else 0


def command_start(tag: str | None, archive: Path, folder: Path) -> None:
    """A branch for the night, the agent's two files where they are missing, the data checked; then what to do next."""
    if git(folder, "rev-parse", "HEAD") is None:
        raise AnalyzeError(f"{folder} has no commit yet: `git init && git add . && git commit -m start`")
    branch = (git(folder, "symbolic-ref", "--quiet", "--short", "HEAD") or "").strip()
    if not branch.startswith("autoresearch/"):
        taken = (git(folder, "for-each-ref", "--format=%(refname:short)", "refs/heads") or "").split()
        branch = first_free(f"autoresearch/{tag or time.strftime('%Y-%m-%d')}", taken.__contains__)
        done = run_git(folder, "switch", "--create", branch)
        if done.returncode:
            raise AnalyzeError(f"git: {one_line(done.stderr.decode(errors='replace'))}")
    with locked(archive):
        update_insights(archive, render_current_best(load_book(archive).entries))
        if not (archive / QUEUE).exists():
            write_atomic(archive / QUEUE, f"# Ideas\n\n{PRIORS}")
    print(f"branch {branch}; {INSIGHTS} and {QUEUE} are in {archive}")
    code = "from prepare import load_manifest as m; print('data:', m()['source'], m()['fingerprint'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = one_line((done.stderr.strip().splitlines() or ["no reason given"])[-1])
        raise AnalyzeError(f"the data are not ready: {said}; run `uv run prepare.py`, then this again")
    print(f"{one_line(done.stdout)}\nnext, the baseline: timeout --kill-after=10 600 {TRAIN}")


def command_rerun(archive: Path, folder: Path) -> None:
    """The best's program in place and committed, and the command that trains it under a seed it has not had."""
    with locked(archive):
        book = load_book(archive)
        best = compute_best(book.entries)
        if best is None:
            raise AnalyzeError("there is no best to run again: train the baseline first")
        check_nothing_is_lost(archive, folder, book, [best.name])
        print(bring_back(best.name, archive, folder, f"Run the best, {best.name}, again"))
    offsets = [number(book.entry(name).record.get("seed_offset")) or 0 for name in best.names]
    offset = int(max(max(offsets) + 1, len(offsets)))
    print(f"next: AUTORESEARCH_SEED_OFFSET={offset} timeout --kill-after=10 600 {TRAIN}")


def command_stop(folder: Path) -> None:
    """End the run in progress here: ask, then insist. It is filed as stopped by the next `analyze.py`."""
    start = read_fields(folder / START, [])
    pid, host = number(start.get("pid")), start.get("host")
    if not is_running(folder):
        raise AnalyzeError(f"no run is in progress in {folder}")
    if pid is None or host not in (None, os.uname().nodename):
        raise AnalyzeError(f"the run in progress here is process {pid} on {host}: it can only be stopped there")
    for sign, patience_s in ((signal.SIGINT, 20), (signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), sign)
        deadline = time.monotonic() + patience_s
        while is_running(folder) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not is_running(folder):
            break
    now = read_fields(folder / START, [])
    if not (folder / SUMMARY).exists() and not str(now.get("ended") or "").startswith("stopped"):
        write_json(folder / START, now | {"ended": "stopped: by `analyze.py stop`"})
    print(f"run {start.get('run_id')} has ended: `{FILE}` files it, with its metrics")


def command_new_archive(archive: Path, folder: Path) -> None:
    """Put the archive aside, whole. Its runs are not compared with those to come."""
    if not archive.is_dir():
        raise AnalyzeError(f"there is no archive at {archive}: the first run begins one")
    with locked(archive):
        if is_running(folder):
            raise AnalyzeError("a run is in progress here: wait for its end, or stop it")
        aside = f"{archive.name}.{time.strftime('%Y-%m-%d')}"
        target = archive.with_name(first_free(aside, lambda name: archive.with_name(name).exists()))
        os.rename(archive, target)
    print(f"the archive so far is {target}, with its {INSIGHTS} and {QUEUE}; the next run begins a new one")


COMMANDS = {
    "keep": "keep a run",
    "discard": "discard a run and go back to the best train.py",
    "status": "where the search stands, and what to do next",
    "compare": "archived runs side by side",
    "check": "whether train.py as it is now is worth a run; exit status 0 or 1",
    "start": "begin a night",
    "rerun": "the best's train.py, and the command that trains it under another seed",
    "stop": "end the run in progress here",
    "new-archive": "put the archive aside and begin another",
}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="File and analyze the run of this folder, or one of the commands below."
    )
    parser.add_argument("--wait", action="store_true", help="first wait for the end of the run here")
    commands = parser.add_subparsers(dest="command")
    parsers = {name: commands.add_parser(name, help=text) for name, text in COMMANDS.items()}
    for name in ("keep", "discard"):
        parsers[name].add_argument("run", nargs="?", help="as in results.tsv; default: the run here")
    parsers["status"].add_argument("--json", action="store_true")
    parsers["compare"].add_argument("runs", nargs="+", metavar="run")
    parsers["start"].add_argument("tag", nargs="?", help="default: today's date")
    return parser.parse_args(arguments)


def run_command(given: argparse.Namespace, folder: Path) -> int | None:
    """The exit status, None for success."""
    check_git(folder)
    if given.wait:
        wait_for_run(folder)
    # What is about the run here follows that run; what is about the search follows the environment.
    here, archive = archive_dir(read_fields(folder / START, []).get("demo")), archive_dir()
    commands: dict[str | None, Callable[[], int | None]] = {
        None: lambda: command_file(here, folder),
        "keep": lambda: command_keep(given.run, here, folder),
        "discard": lambda: command_discard(given.run, here, folder),
        "status": lambda: command_status(archive, folder, given.json),
        "compare": lambda: command_compare(given.runs, archive),
        "check": lambda: command_check(archive, folder),
        "start": lambda: command_start(given.tag, archive, folder),
        "rerun": lambda: command_rerun(archive, folder),
        "stop": lambda: command_stop(folder),
        "new-archive": lambda: command_new_archive(archive, folder),
    }
    return commands[given.command]()


def main(arguments: list[str] | None = None) -> int:
    given = parse_arguments(arguments)
    try:
        return run_command(given, Path.cwd()) or 0
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `status | head` ends quietly, as any filter does
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a console that cannot show a subject shows what it can
    sys.exit(main())
