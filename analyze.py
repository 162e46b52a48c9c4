"""File a training run, compute what can be known about it, draw it, and keep the books of a night of experiments.

    uv run analyze.py                    after `uv run train.py > run.log 2>&1`, finished or crashed
    uv run analyze.py keep [RUN]         the run of this folder (or RUN) is kept
    uv run analyze.py discard [RUN]      it is not; the best run's train.py is restored and committed
    uv run analyze.py status [--json]    where the search stands, on one page
    uv run analyze.py compare RUN RUN …  archived runs side by side

Reads, in the current folder: run_start.json, run.log, metrics.jsonl, eval_record.json, run_summary.json.
Writes the archive, .auto-log-research/ or $AUTO_LOG_RESEARCH_DIR: results.tsv, insights.md ("Current Best" only),
progress.png, report.md, archive.json (what the archive began with), and a folder for each run. A run's stats.json can
be deleted: the next call makes it and the run's pages again. The agent's own investigations start with

    from analyze import load_run, load_runs
    load_run("1a2b3c4").metrics          # a pandas DataFrame, one row a step
    load_runs()                          # one row a run; a crash has NaN for every number it does not have

This file is part of the measurement: an archive refuses to score runs once it, or prepare.py, has changed.
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
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # imported where they are used: pandas takes 0.4 s and matplotlib 0.7 s, which `status` needs not pay
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

START, LOG, METRICS, EVAL, SUMMARY = (
    "run_start.json",
    "run.log",
    "metrics.jsonl",
    "eval_record.json",
    "run_summary.json",
)
RESULTS, INSIGHTS, QUEUE, FACTS = "results.tsv", "insights.md", "ideas_queue.md", "archive.json"
STATS, ANALYSIS = "stats.json", "analysis.md"
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
STATUSES = ("pending", "keep", "discard", "crash", "invalid")
NOTES_HEADING = "## Agent Investigation Notes"
BEST_HEADING = "## Current Best"
# The lines that render_current_best writes, whole: any other line in that section is the agent's, and stays.
BEST_LINES = re.compile(
    r"^(?:No run is kept yet\.|- \S+: val_bpb \d+\.\d{6}, (?:one run|mean of \d+ runs \([^)\n]*\))"
    r"|- its change: [^\n]*|- noise between identical runs: sigma \d+\.\d{6} bpb \([^\n]*\))\r?(?:\n|\Z)",
    re.M,
)
PAGE_LINES, PAGE_BYTES = 120, 8000

# Public logs of this experiment on H100 and H200 show 0.0005 to 0.0014 bpb between identical runs of five minutes.
# The prior counts for a few degrees of freedom for good: replicates of one seed on one machine agreed within 0.0002
# where other seeds were 0.0009 apart, and a changed program is as far from the old one as another seed is.
PRIOR_SIGMA = 0.001
PRIOR_WEIGHT = 2
GAIN_ERRORS = 2.0  # standard errors from which on a difference is called one
PLATEAU_IDEAS = 5
SMOOTHING = 0.9
TRAJECTORY = (0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 1.00)
DWARFING = 0.12  # of the budget: what pictures leave off the scale, because it would flatten the rest
STEP_TIME_TOLERANCE = 0.05  # of the median: identical programs on an idle GPU agree within 1 to 2 %

# What a summary holds besides the configuration: results, identity, and the machine.
RESULT_KEYS = {"val_bpb", "training_seconds", "total_seconds", "startup_seconds", "eval_seconds", "stats_seconds"} | {
    "peak_vram_mb", "mfu_percent", "total_tokens_M", "num_steps", "run_id", "git_commit", "git_dirty", "train_sha256",
    "prepare_sha256", "data_fingerprint"}
KERNEL_KEYS = ("attention_backend", "kernels")
MACHINE_KEYS = ("gpu_name", "torch_version", *KERNEL_KEYS)

# Failures of the machine or its set-up: reported, and not filed as an experiment.
ENVIRONMENT_SIGNS = re.compile(
    r"No space left on device|Disk quota exceeded|Read-only file system|No CUDA GPUs are available"
    r"|CUDA driver version is insufficient|Found no NVIDIA driver|Torch not compiled with CUDA|no CUDA-capable device"
    r"|CUDA-capable device\(s\) is/are busy|Driver/library version mismatch|uncorrectable ECC error"
    r"|No module named '(?:torch|numpy|pyarrow|tiktoken|rustbpe|requests|prepare)'"
)
# Known causes of a crash, the first that matches the end of the log, with what usually helps.
CRASH_CAUSES = (
    ("out of memory", r"out of memory|OutOfMemoryError|out of GPU memory",
     "halve device_batch_size (gradient accumulation keeps the total batch), or shrink what grew; look for another job "
     "on the GPU if the program is small"),
    ("not a number, or the loss exploded", r"\bnan\b|not finite|non-finite|\binf\b|explod|loss above",
     "lower the learning rate that changed, add warm-up, or look for a division, log or square root near zero"),
    ("shapes do not fit", r"shapes? .*cannot be multiplied|size mismatch|must match the size|invalid for input of size"
     r"|not divisible|shape mismatch|Expected size|same number of dimensions|not compatible with"
     r"|reduction dim|broadcast",
     "print the shapes at the line named; width is depth x aspect_ratio rounded up to a multiple of head_dim"),
    ("compile failure", r"torch\._dynamo|torch\._inductor|InductorError|BackendCompilerFailed|\btriton\b",
     "compile the smallest function that fails; data-dependent shapes and Python side effects are the usual reason"),
    ("the program does not parse or a name is wrong",
     r"SyntaxError|IndentationError|NameError|ImportError|ModuleNotFound|AttributeError|TypeError",
     "a slip in the edit: fix it and run again"),
    ("an assertion of the program failed", r"AssertionError", "the change broke what the assertion guards"),
)


class AnalyzeError(ValueError):
    """Something the caller can mend. The message names what, where, and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Small helpers
# ---------------------------------------------------------------------------------------------------------------------


def archive_dir() -> Path:
    return Path(os.environ.get("AUTO_LOG_RESEARCH_DIR") or ".auto-log-research").expanduser()


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


def printable(text: str) -> str:
    """The text with a question mark for every byte that was no UTF-8: such text cannot be printed."""
    return text.encode("utf-8", "replace").decode()


def read_json(path: Path) -> dict | None:
    """A JSON object. None where there is no such file; ValueError names a file that holds anything else."""
    text = read_text(path)
    try:
        value = None if text is None else json.loads(text)
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON ({e})") from None
    if not isinstance(value, dict | None):
        raise ValueError(f"{path} holds no JSON object")
    return value


def sha256(data: str | bytes) -> str:
    return hashlib.sha256(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data).hexdigest()


def number(value: object) -> float | None:
    """The value as a finite float, None for anything else (a bool is no number)."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def numbers(values: Iterable) -> np.ndarray:
    """The values as floats, NaN for anything else."""
    return np.array([math.nan if (v := number(value)) is None else v for value in values], dtype=float)


def show(value: float | None, form: str = ".6f", unit: str = "") -> str:
    return "unknown" if value is None or not math.isfinite(value) else f"{value:{form}}{unit}"


def clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def run_git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0", "GIT_EDITOR": "true"}
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, stdin=subprocess.DEVNULL, env=environment
    )


def git(folder: Path, *arguments: str) -> str | None:
    """What git printed, None where it failed: no git, no repository, no such commit."""
    try:
        done = run_git(folder, *arguments)
    except FileNotFoundError:
        return None
    return done.stdout.decode("utf-8", "surrogateescape") if done.returncode == 0 else None


@contextlib.contextmanager
def locked(archive: Path) -> Iterator[None]:
    """Hold the archive alone. The kernel lets go of the lock when the holder dies, however it dies."""
    archive.mkdir(parents=True, exist_ok=True)
    with open(archive / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # What a killed process left half written: nobody else writes under the lock.
        for leftover in [*archive.glob(".tmp-*"), *archive.glob("*/.tmp-*")]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        if not (archive / ".gitignore").exists():
            write_atomic(archive / ".gitignore", "*\n")
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Load: one run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one run left. A run that crashed has an empty summary and no evaluation; one of another program may have
    no `start`. `damage` names what could not be read."""

    name: str
    path: Path
    start: dict = field(repr=False)
    summary: dict = field(repr=False)
    evaluation: dict | None = field(repr=False)
    records: list[dict] = field(repr=False)
    log: str | None = field(repr=False)
    train_py: str | None = field(repr=False)
    damage: tuple[str, ...] = ()

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


def parse_metrics(text: str) -> tuple[list[dict], list[str]]:
    """The records of a metrics.jsonl and the damage, if any. A last line cut short, as a kill leaves it, is none."""
    records, bad = [], []
    lines = text.split("\n")
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif i < len(lines):
            bad.append(i)
    if not bad:
        return records, []
    named = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
    return records, [f"{METRICS}: {len(bad)} damaged line(s) left out (line {named})"]


def parse_closing_block(log: str | None) -> dict:
    """The closing `key: value` block of a finished run, numbers where they are numbers; empty if there is none."""
    block = (log or "").replace("\r", "\n").rpartition("\n---\n")[2]
    pairs = re.findall(r"^(\w+):\s+(\S+)\s*$", block, re.M)
    values = {key: json.loads(v) if re.fullmatch(r"-?\d+(\.\d+)?", v) else v for key, v in pairs}
    return values if number(values.get("val_bpb")) is not None else {}


def log_run_id(log: str | None) -> str | None:
    """The run a log says it is of: train.py prints `run <id>` first."""
    found = re.search(r"^run (\S+)\s*$", (log or "")[:65536], re.M)
    return found[1] if found else None


def load_folder(folder: Path, name: str = "", files: set[str] | None = None) -> Run:
    """The run whose files lie in `folder`; `files` limits it to those that are this run's."""

    damage: list[str] = []

    def own(file: str) -> Path:
        return folder / file if files is None or file in files else Path(os.devnull) / file

    def tolerant(file: str) -> dict | None:
        try:
            return read_json(own(file))
        except ValueError as e:
            damage.append(str(e))
            return None

    log, start, summary, evaluation = read_text(own(LOG)), tolerant(START) or {}, tolerant(SUMMARY), tolerant(EVAL)
    log = None if log is None else printable(log)
    if summary is None and (block := parse_closing_block(log)):
        summary = block  # a program that writes no summary, or a summary that was lost
        damage.append(f"{SUMMARY} is missing: the closing block of {LOG} stands in")
    records, bad_lines = parse_metrics(read_text(own(METRICS)) or "")
    train_py = start.get("train_py") or read_text(own("train.py"))
    return Run(name, folder, start, summary or {}, evaluation, records, log, train_py, (*damage, *bad_lines))


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
    """The folders of filed runs, oldest filing first where their records cannot say more."""
    if not archive.is_dir():
        return []
    folders = [p for p in archive.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name != "unfiled"]
    return sorted(p for p in folders if (p / STATS).exists() or (p / START).exists() or (p / SUMMARY).exists())


# ---------------------------------------------------------------------------------------------------------------------
# Load: the books
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of results.tsv. `problem` says why a line cannot be read; it is kept as it is and not counted."""

    line: str
    name: str = ""
    val_bpb: float | None = None
    status: str = ""
    description: str = ""
    problem: str | None = None


@dataclass(frozen=True)
class Entry:
    """A run in the books: its row (status and description are the row's, so that hand edits hold) and its record, whose
    score counts whatever the row says."""

    name: str
    status: str
    description: str
    record: dict = field(repr=False)
    stats: dict = field(default_factory=dict, repr=False)

    @property
    def val_bpb(self) -> float | None:
        """The score; None for a crash, whatever its row says."""
        return None if self.status == "crash" else number(self.record.get("val_bpb"))

    @property
    def is_valid(self) -> bool:
        """Whether the score may be compared: finished, nothing wrong with it, and not called invalid by hand."""
        return self.val_bpb is not None and not self.record.get("invalid") and self.status not in ("crash", "invalid")

    @property
    def group(self) -> tuple:
        """Equal for replicates: the same program but for comments, formatting and seed, on the same data and GPU."""
        r = self.record
        if r.get("program") is None:
            return (self.name,)
        return r["program"], r.get("data_fingerprint"), r.get("time_budget"), r.get("gpu_name")


@dataclass(frozen=True)
class Book:
    entries: list[Entry]
    rows: list[Row]
    unbooked: list[str]  # filed, but killed before the row was written
    facts: dict
    problems: list[str]

    def entry(self, name: str) -> Entry:
        return next(e for e in self.entries if e.name == name)

    def named(self, identity: str) -> str | None:
        """The name under which the run with this identity is filed. A removed row does not unfile a run."""
        return self.facts["identities"].get(identity)


def parse_row(line: str) -> Row:
    cells = line.rstrip("\r\n").split("\t", 4)
    if len(cells) != 5:
        return Row(line, problem=f"{len(cells)} columns where five are due")
    name, val, memory, status, description = (cell.strip() for cell in cells)
    try:
        val_bpb, _ = float(val), float(memory)
    except ValueError:
        return Row(line, problem=f"val_bpb {val!r} or memory_gb {memory!r} is not a number")
    if status not in STATUSES:
        return Row(line, problem=f"status {status!r} is none of {', '.join(STATUSES)}")
    is_score = status != "crash" and math.isfinite(val_bpb)
    return Row(line, name, val_bpb if is_score else None, status, printable(description))


def format_row(name: str, record: dict, status: str, description: str) -> str:
    """A line as upstream writes it: a crash has zeros. A number that is not known is `nan`."""
    val, memory = record.get("val_bpb"), record.get("memory_gb")
    val, memory = (math.nan if x is None else x for x in (val, memory))
    cells = ["0.000000", "0.0"] if status == "crash" else [f"{val:.6f}", f"{memory:.1f}"]
    return "\t".join([name, *cells, status, " ".join(description.split())]) + "\n"


def load_rows(archive: Path) -> list[Row]:
    lines = (read_text(archive / RESULTS) or "").splitlines(keepends=True)
    return [parse_row(line) for line in lines if line.strip() and not line.startswith("commit\t")]


def load_record(folder: Path) -> dict:
    """What the books need of a run, from its stats.json; worked out again where that is lost or damaged."""
    record, _ = read_stats(folder)
    return record or compute_record(load_folder(folder, folder.name), load_facts(folder.parent))


def read_stats(folder: Path) -> tuple[dict | None, bool]:
    """A run's record and whether its pages were all written: the statistics are written last."""
    try:
        return parse_stats(folder / STATS, (folder / STATS).stat().st_mtime_ns)
    except (ValueError, FileNotFoundError):
        return None, False


@cache
def parse_stats(path: Path, written_ns: int) -> tuple[dict | None, bool]:
    """Each version of a file is parsed once a call: the books are read several times while a run is filed."""
    stats = read_json(path) or {}
    record = stats.get("record")
    return (record, "verdict" in stats) if isinstance(record, dict) and "identity" in record else (None, False)


def read_old_stats(archive: Path, name: str) -> dict:
    """What stood on the run's page, empty before there is one."""
    try:
        return read_json(archive / name / STATS) or {}
    except ValueError:
        return {}


def is_run_complete(folder: Path) -> bool:
    return read_stats(folder)[1] and (folder / ANALYSIS).exists()


def load_facts(archive: Path) -> dict:
    """What the archive began with. `booked` lists the runs that were given a row, so that one removed stays removed."""
    empty = {"created_unix": None, "prepare_sha256": None, "analyze_sha256": None, "data_fingerprint": None}
    return empty | {"booked": [], "not_experiments": []} | (read_json(archive / FACTS) or {})


def load_book(archive: Path) -> Book:
    """Rows and records joined, in the order of the rows. Damaged rows and rows without a run are named, not counted."""
    rows, facts = load_rows(archive), load_facts(archive)
    records = {folder.name: load_record(folder) for folder in run_folders(archive)}
    facts["identities"] = {record["identity"]: name for name, record in records.items()}
    entries, problems, seen = [], [], set()
    for i, row in enumerate(rows, 2):
        problem = row.problem
        if problem is None and row.name in seen:
            problem = f"a second row of {row.name}"
        elif problem is None and row.name not in records:
            problem = f"no files of a run {row.name!r} in the archive"
        if problem:
            problems.append(f"{RESULTS} line {i}: {problem}; kept, not counted")
            continue
        seen.add(row.name)
        stats = read_old_stats(archive, row.name)
        entries.append(Entry(row.name, row.status, row.description, records[row.name], stats))
        scored = entries[-1].val_bpb
        if row.val_bpb is not None and scored is not None and abs(row.val_bpb - scored) > 1e-6:
            problems.append(f"{RESULTS} line {i}: {row.val_bpb:.6f} is not what {row.name} scored: {scored:.6f} counts")
    is_lost = not (archive / RESULTS).exists()
    unbooked = [name for name in records if name not in seen and (is_lost or name not in facts["booked"])]
    unbooked.sort(key=lambda name: records[name].get("started_unix") or math.inf)
    return Book(entries, rows, unbooked, facts, problems)


def save_rows(archive: Path, rows: list[Row]) -> None:
    """All rows, those that were not touched byte for byte as they were."""
    lines = [row.line if row.line.endswith("\n") else row.line + "\n" for row in rows]
    write_atomic(archive / RESULTS, HEADER + "\n" + "".join(lines))


def load_runs(archive: Path | None = None) -> pd.DataFrame:
    """All runs in the order of results.tsv: the five columns, facts of the run, and its configuration under its own
    keys. Numbers a run does not have (the score of a crash, say) are NaN."""
    import pandas as pd

    rows = []
    for e in load_book(archive or archive_dir()).entries:
        facts = {k: v for k, v in e.record.items() if not isinstance(v, dict | list)}
        own = {"commit": e.name, "val_bpb": e.val_bpb, "memory_gb": e.record.get("memory_gb"), "status": e.status}
        rows.append(own | {"description": e.description, "is_valid": e.is_valid} | {
            k: v for k, v in (facts | e.record.get("config", {})).items() if k not in own})
    if not rows:
        return pd.DataFrame(columns=[*HEADER.split("\t"), "is_valid"])
    frame = pd.DataFrame(rows)
    for column in [c for c in frame.columns if frame[c].map(lambda v: v is None or number(v) is not None).all()]:
        frame[column] = frame[column].astype(float)
    return frame


# ---------------------------------------------------------------------------------------------------------------------
# Compute: which program a run is
# ---------------------------------------------------------------------------------------------------------------------


class _Functional(ast.NodeTransformer):
    """Drops docstrings and, on request, the constants given to anything called a seed."""

    def __init__(self, hide_seed: bool):
        self.hide_seed = hide_seed

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                node.body = node.body[1:] or [ast.Pass()]
        elif self.hide_seed and isinstance(node, ast.Call):
            node.keywords = [k for k in node.keywords if not (is_seed(k.arg) and isinstance(k.value, ast.Constant))]
            if name_of(node.func) in ("manual_seed", "manual_seed_all", "seed", "default_rng"):
                node.args = [a for a in node.args if not isinstance(a, ast.Constant)]
        elif self.hide_seed and isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(is_seed(name_of(target)) for target in targets):
                node.value = ast.Constant(0)
        return node


def name_of(node: ast.AST) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def is_seed(name: str | None) -> bool:
    return name is not None and (name.lower() == "seed" or name.lower().endswith("_seed"))


def program_hash(text: str | None, hide_seed: bool = True) -> str | None:
    """Equal for programs that do the same: comments, formatting, docstrings and (by default) the seed do not count."""
    if text is None:
        return None
    try:
        tree = _Functional(hide_seed).visit(ast.parse(text))
        return sha256(ast.unparse(tree))[:16]
    except (SyntaxError, ValueError, RecursionError):
        return sha256("not a program\n" + text)[:16]


def configuration(summary: dict) -> dict:
    return {k: v for k, v in summary.items() if k not in RESULT_KEYS.union(MACHINE_KEYS)}


# ---------------------------------------------------------------------------------------------------------------------
# Compute: a run's record, and whether its score counts
# ---------------------------------------------------------------------------------------------------------------------


def identity_of(run: Run) -> str:
    """What makes this run this run: its id, or for a program that writes none, the contents it left."""
    run_id = run.start.get("run_id") or run.summary.get("run_id") or log_run_id(run.log)
    if run_id:
        return f"run:{run_id}"
    if run.summary or run.records:
        return "contents:" + sha256(json.dumps([run.summary, run.records[-1:]], sort_keys=True) + (run.log or ""))[:16]
    path = run.path / LOG
    written_ns = path.stat().st_mtime_ns if path.exists() else 0
    return f"log:{sha256(run.log or '')[:16]}:{written_ns}"


def compute_invalid(run: Run, facts: dict, prepare_sha: str | None, analyze_sha: str | None) -> list[str]:
    """The reasons why a finished run's score must not be compared, empty for a valid run."""
    summary, record, reasons = run.summary, run.evaluation, []
    val = number(summary.get("val_bpb"))
    if val is None or val <= 0:
        reasons.append(f"val_bpb is {summary.get('val_bpb')!r}")
    if record is None:
        reasons.append(f"no readable {EVAL}: the score did not come from evaluate_bpb")
    else:
        reasons += compute_evaluation_faults(record, val)
    for script, sha in (("prepare.py", prepare_sha), ("analyze.py", analyze_sha)):
        began = facts.get(f"{script[:-3]}_sha256")
        if sha and began and sha != began:
            reasons.append(f"{script} is not the one this archive began with ({sha[:8]}, was {began[:8]})")
    fingerprint, began = data_fingerprint(run), facts.get("data_fingerprint")
    if fingerprint and began and fingerprint != began:
        reasons.append(f"the data differ from the archive's (fingerprint {fingerprint}, was {began})")
    budget_s, clocked_s = number(summary.get("time_budget")), number(summary.get("training_seconds"))
    if budget_s and clocked_s is not None:
        steps_s = run.series("perf/step_time_ms")[-20:] / 1e3
        step_s = float(np.nanmax(steps_s)) if np.isfinite(steps_s).any() else 0.01 * budget_s
        if abs(clocked_s - budget_s) > step_s + 0.1:  # summaries round to a tenth of a second
            reasons.append(f"trained {clocked_s:.1f} s on a budget of {budget_s:.1f} s, off by more than a step")
    return reasons


def compute_evaluation_faults(record: dict, val_bpb: float | None) -> list[str]:
    faults = []
    scored, nats, num_bytes = (number(record.get(k)) for k in ("val_bpb", "nats", "bytes"))
    if scored is None or val_bpb is None or abs(scored - val_bpb) > 2e-6:  # both are rounded to six decimals
        faults.append(f"the summary says val_bpb {show(val_bpb)}, the evaluation record {show(scored)}")
    if scored is not None and nats and num_bytes and abs(nats / (math.log(2) * num_bytes) - scored) > 2e-6:
        faults.append(f"the evaluation record's nats and bytes give {nats / (math.log(2) * num_bytes):.6f}")
    if record.get("causal") is False:
        faults.append("the causality test failed: predictions depend on later tokens")
    calls = number(record.get("num_calls"))
    if calls is not None and calls > 1:
        faults.append(f"evaluation was called {calls:.0f} times")
    return faults


def data_fingerprint(run: Run) -> str | None:
    sources = ((run.evaluation or {}), run.summary, run.start)
    return next((s["data_fingerprint"] for s in sources if s.get("data_fingerprint")), None)


def compute_record(run: Run, context: dict) -> dict:
    """What the books keep of a run: identity, program, configuration and the few numbers that history needs.
    `context` holds the archive's facts, the scripts' sha256 and what git knows of the commit."""
    s, loss = run.summary, run.series("train/loss")
    peak_mb, tokens_m = number(s.get("peak_vram_mb")), number(s.get("total_tokens_M"))
    prepare_sha = run.start.get("prepare_sha256") or s.get("prepare_sha256") or context.get("prepare_now")
    return {
        "identity": identity_of(run),
        "run_id": run.start.get("run_id") or s.get("run_id"),
        "git_commit": context.get("commit") or run.start.get("git_commit") or s.get("git_commit"),
        "is_dirty": context.get("is_dirty"),
        "started_unix": number(run.start.get("started_unix")) or context.get("started_unix"),
        "is_finished": bool(s),
        "invalid": compute_invalid(run, context, prepare_sha, context.get("analyze_now")) if s else [],
        "crash": None if s else compute_crash(run)["reason"],
        "val_bpb": number(s.get("val_bpb")),
        "memory_gb": peak_mb / 1024 if peak_mb is not None else None,
        "train_sha256": sha256(run.train_py) if run.train_py else None,
        "program": program_hash(run.train_py),
        "program_and_seed": program_hash(run.train_py, hide_seed=False),
        "seed": s.get("seed"),
        "data_fingerprint": data_fingerprint(run),
        **{key: s.get(key) for key in MACHINE_KEYS},
        "time_budget": number(s.get("time_budget")),
        "num_steps": number(s.get("num_steps")) or (len(run.records) or None),
        "tokens_m": tokens_m,
        "training_s": number(s.get("training_seconds")),
        "total_s": number(s.get("total_seconds")) or compute_elapsed(run),
        "step_ms": run.step_ms,
        "mfu_percent": number(s.get("mfu_percent")),
        "num_params_m": number(s.get("num_params_M")),
        "first_loss": number(loss[0]) if len(loss) else None,
        "last_loss": number(loss[-1]) if len(loss) else None,
        "config": configuration(s),
        "damage": list(run.damage),
        "notes": context.get("notes", []),
    }


def compute_elapsed(run: Run) -> float | None:
    """Seconds of wall time a run without a summary took, as far as its metrics tell."""
    started, last = number(run.start.get("started_unix")), run.series("time/unix_s")[-1:]
    return float(last[0] - started) if started and len(last) and last[0] > started else None


def log_lines(log: str | None) -> list[str]:
    """The last lines of a log that hold anything; progress written over itself counts as lines."""
    return [line.rstrip() for line in (log or "")[-100_000:].replace("\r", "\n").split("\n") if line.strip()]


def environment_failure(run: Run) -> str | None:
    """The line that shows that the machine or its set-up failed, None if the experiment itself ended."""
    ended, lines = str(run.start.get("ended") or ""), log_lines(run.log)
    if run.summary:
        return None
    if ended.startswith("error:"):
        return ended
    for line in lines[-3:]:
        if line.startswith("error:"):
            return line
    return next((line.strip() for line in reversed(lines[-40:]) if ENVIRONMENT_SIGNS.search(line)), None)


def compute_crash(run: Run) -> dict:
    """Why a run without a summary ended: `reason`, known `cause` and `help`, last step and loss, end of the log."""
    lines = log_lines(run.log)
    said = next((line for line in reversed(lines[-3:]) if line.startswith("crash:")), None)
    said = said or (str(run.start["ended"]) if str(run.start.get("ended", "")).startswith("crash:") else None)
    raised = next((x for x in reversed(lines[-60:]) if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", x)), None)
    end = "\n".join(lines[-60:])
    # torch.compile tells what really happened in the middle of an explanation.
    inner = re.findall(r"\bgot (\w*Error\(.*\))", end)
    raised = inner[-1] if inner else raised
    loss, reason = run.series("train/loss"), inner[-1] if inner else said or raised
    cause = next(((name, help_) for text in (reason, end) if reason
                  for name, signs, help_ in CRASH_CAUSES if re.search(signs, text, re.I)), None)
    if reason is None:
        reason = "the log just stops: killed" if lines else "no log was kept"
        cause = ("killed from outside, or out of time",
                 "see whether steps became slow or the machine's own memory ran out, and run it again")
    return {
        "reason": reason.removeprefix("crash:").strip(),
        "exception": raised,
        "cause": cause[0] if cause else None,
        "help": cause[1] if cause else None,
        "last_step": number(run.records[-1].get("step")) if run.records else None,
        "last_loss": number(loss[-1]) if len(loss) else None,
        "elapsed_s": compute_elapsed(run),
        "log_end": [clip(line, 160) for line in lines[-10:]],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Compute: noise, best, verdict
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """Standard deviation of val_bpb between replicates, in bpb, and where the figure comes from."""

    sigma: float
    freedom: int
    measured: float | None

    @property
    def source(self) -> str:
        if self.measured is None:
            return "prior from public runs, no replicate yet"
        return (f"replicates: {self.measured:.6f} with {self.freedom} degree(s) of freedom; "
                f"prior: {PRIOR_SIGMA:.6f} with {PRIOR_WEIGHT}")


@dataclass(frozen=True)
class Best:
    """The group of replicates with the lowest mean among those of which one is kept."""

    name: str  # the first one kept: its train.py is the one to go back to
    mean: float
    names: tuple[str, ...]
    group: tuple
    is_kept: bool  # False: nothing is kept yet and the first valid run stands in


def compute_groups(entries: list[Entry]) -> dict[tuple, list[Entry]]:
    groups: dict[tuple, list[Entry]] = {}
    for e in entries:
        if e.is_valid:
            groups.setdefault(e.group, []).append(e)
    return groups


def mean_bpb(entries: list[Entry]) -> float:
    return float(np.mean([e.val_bpb for e in entries]))


def compute_noise(entries: list[Entry]) -> Noise:
    """Pooled over all groups of replicates and the prior: variance = sum of squared deviations / degrees of freedom, to
    which a group of n adds n - 1. Without the prior one lucky pair would make everything a gain."""
    groups = [[e.val_bpb for e in group] for group in compute_groups(entries).values() if len(group) > 1]
    freedom = sum(len(values) - 1 for values in groups)
    squares = sum(float(np.var(values)) * len(values) for values in groups)
    pooled = math.sqrt((PRIOR_WEIGHT * PRIOR_SIGMA**2 + squares) / (PRIOR_WEIGHT + freedom))
    return Noise(pooled, freedom, math.sqrt(squares / freedom) if freedom else None)


def compute_best(entries: list[Entry]) -> Best | None:
    """Lowest mean over replicates among the kept programs; while none is kept, the first valid run not discarded."""
    valid = [e for e in entries if e.is_valid]
    kept = [e for e in valid if e.status == "keep"]
    anchors = kept or [e for e in valid if e.status == "pending"][:1]
    groups = compute_groups(valid)
    candidates: dict[tuple, Best] = {}
    for e in anchors:
        group = groups[e.group]
        best = Best(e.name, mean_bpb(group), tuple(g.name for g in group), e.group, bool(kept))
        candidates.setdefault(e.group, best)
    return min(candidates.values(), key=lambda best: best.mean, default=None)


def compute_verdict(this: Entry, entries: list[Entry]) -> dict:
    """This run against the best of all others. `kind` is crash, invalid, baseline, replicate, new best, within noise or
    not better; `difference` is this program's mean minus the best's, in bpb, lower being better."""
    others = [e for e in entries if e.name != this.name]
    best, noise = compute_best(others), compute_noise(entries)
    same = [e for e in others if e.group == this.group and e.is_valid] if this.is_valid else []
    twin = next((e for e in others if this.record.get("program") and e.group == this.group), None)
    verdict = {
        "val_bpb": this.val_bpb,
        "invalid": this.record.get("invalid") or ["called invalid by hand"] if this.status == "invalid" else [],
        "best": best.name if best else None,
        "best_mean": best.mean if best else None,
        "best_runs": len(best.names) if best else 0,
        "best_is_kept": bool(best and best.is_kept),
        "noise": {"sigma": noise.sigma, "source": noise.source, "degrees_of_freedom": noise.freedom},
        "replicates": [e.name for e in same],
        "same_as": describe_sameness(this, twin) if twin else None,
        "mean": mean_bpb([this, *same]) if this.is_valid else None,
    }
    if this.status == "crash":
        return verdict | {"kind": "crash"}
    if not this.is_valid:
        return verdict | {"kind": "invalid"}
    if best is None:
        return verdict | {"kind": "baseline"}
    if best.group == this.group:
        group = [this, *same]
        deviation = float(np.std([e.val_bpb for e in group], ddof=1))
        single = this.val_bpb - best.mean
        error, after = noise.sigma * math.sqrt(1 + 1 / len(best.names)), compute_best(entries)
        dethroned_by = [after.name, after.mean] if after.group != best.group else None
        return verdict | {"kind": "replicate", "difference": single, "standard_errors": single / error,
                          "spread": deviation, "dethroned_by": dethroned_by}
    difference = verdict["mean"] - best.mean
    error = noise.sigma * math.sqrt(1 / (1 + len(same)) + 1 / len(best.names))
    errors = difference / error
    kind = "within noise" if abs(errors) < GAIN_ERRORS else "new best" if errors < 0 else "not better"
    runs_to_tell = math.ceil(2 * (GAIN_ERRORS * noise.sigma / difference) ** 2) if difference else None
    return verdict | {"kind": kind, "difference": difference, "standard_error": error, "standard_errors": errors,
                      "runs_to_tell": runs_to_tell}


def describe_sameness(this: Entry, twin: Entry) -> str:
    if this.record.get("train_sha256") == twin.record.get("train_sha256"):
        return f"the very train.py of {twin.name}"
    if this.record.get("program_and_seed") == twin.record.get("program_and_seed"):
        return f"no functional change against {twin.name} (comments or formatting only)"
    return f"nothing but the seed differs from {twin.name}"


# ---------------------------------------------------------------------------------------------------------------------
# Compute: what changed
# ---------------------------------------------------------------------------------------------------------------------


def compute_changes(this: Entry, text: str | None, best: Entry | None, best_text: str | None,
                    entries: list[Entry]) -> dict:
    """Resolved configuration against the best's, size of the diff, and runs that tried the same before."""
    earlier = entries[: next(i for i, e in enumerate(entries) if e.name == this.name)]
    mine = this.record.get("config", {})
    theirs = best.record.get("config", {}) if best else {}
    diff = diff_lines(best_text, text, best.name if best else "")
    config = {k: v for k, v in mine.items() if k != "seed"}
    comparable = [e for e in earlier if config and e.record.get("program") != this.record.get("program")]
    return {
        "against": best.name if best else None,
        "config": {k: [theirs.get(k), mine.get(k)] for k in {**theirs, **mine} if theirs.get(k) != mine.get(k)}
        if best and mine and theirs else {},
        "is_config_known": bool(mine and theirs),
        "lines_added": sum(line.startswith("+") and not line.startswith("+++") for line in diff),
        "lines_removed": sum(line.startswith("-") and not line.startswith("---") for line in diff),
        "is_diff_known": best_text is not None and text is not None,
        "same_program": [[e.name, e.status, e.val_bpb] for e in earlier
                         if this.record.get("program") and e.record.get("program") == this.record.get("program")],
        "same_config": [[e.name, e.status, e.val_bpb] for e in comparable
                        if {k: v for k, v in e.record.get("config", {}).items() if k != "seed"} == config],
        "machine": {k: pair for k in MACHINE_KEYS if best and None not in
                    (pair := [best.record.get(k), this.record.get(k)]) and pair[0] != pair[1]},
    }


def diff_lines(before: str | None, after: str | None, name: str) -> list[str]:
    if before is None or after is None:
        return []
    pair = before.splitlines(keepends=True), after.splitlines(keepends=True)
    return list(difflib.unified_diff(*pair, f"train.py of {name}", "train.py of this run", n=3))


# ---------------------------------------------------------------------------------------------------------------------
# Compute: curves, speed and learning, trajectory, convergence
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A run's loss against budget clock and tokens at the end of each step, without steps whose loss is no number."""

    name: str
    step: np.ndarray
    time_s: np.ndarray
    tokens_m: np.ndarray
    loss: np.ndarray  # nats per token
    smooth: np.ndarray
    lr: np.ndarray  # multiplier, NaN where unknown
    budget_s: float
    bpb_per_nat: float | None

    def at_time(self, fraction: float) -> float:
        """Smoothed loss at a fraction of the budget, NaN where the run had ended. The last step stands in for 100 %."""
        time_s = fraction * self.budget_s
        if fraction == 1.0 and self.time_s[-1] > 0.97 * self.budget_s:
            return float(self.smooth[-1])
        return float(np.interp(time_s, self.time_s, self.smooth, right=math.nan))

    def at_tokens(self, tokens_m: float) -> float:
        return float(np.interp(tokens_m, self.tokens_m, self.smooth, right=math.nan))


def smoothed(loss: np.ndarray, step: float = 1.0) -> np.ndarray:
    """Exponential average, debiased, as train.py logs it; `step` below 1 makes a step count for less."""
    keep, average, values = SMOOTHING**step, 0.0, np.empty_like(loss)
    for i, x in enumerate(loss):
        average = keep * average + (1 - keep) * x
        values[i] = average / (1 - keep ** (i + 1))
    return values


def compute_curve(run: Run) -> Curve | None:
    """None where fewer than three steps have a loss. Tokens and clock are derived where they are not logged."""
    loss, step_s = run.series("train/loss"), np.nan_to_num(run.series("perf/step_time_ms")) / 1e3
    if np.isfinite(loss).sum() < 3:
        return None
    config, progress = run.summary, run.series("train/progress")
    time_s = run.series("time/training_s")
    budget_s = number(config.get("time_budget"))
    if not np.isfinite(time_s).all():  # the original logs progress at the start of a step instead
        is_usable = budget_s is not None and np.isfinite(progress).all()
        time_s = np.append(progress[1:], progress[-1]) * budget_s if is_usable else np.cumsum(step_s)
        if is_usable:
            time_s[-1] += step_s[-1]
    if budget_s is None:  # a crash leaves no summary; progress tells the budget
        with_progress = np.flatnonzero(progress > 0.02)
        i = with_progress[-1] if len(with_progress) else None
        budget_s = float((time_s[i] - step_s[i]) / progress[i]) if i is not None else float(time_s[-1])
    tokens_m = run.series("train/tokens") / 1e6
    if not np.isfinite(tokens_m).all():
        batch = number(config.get("total_batch_size"))
        per_step = np.full(len(loss), batch) if batch else run.series("perf/tokens_per_sec") * step_s
        tokens_m = np.cumsum(np.nan_to_num(per_step)) / 1e6
    smooth = run.series("train/loss_smooth")
    ok = np.isfinite(loss)
    smooth = smooth[ok] if np.isfinite(smooth[ok]).all() else smoothed(loss[ok])
    step = run.series("step")
    step = step if np.isfinite(step).all() else np.arange(len(loss), dtype=float)
    lr = run.series("train/lr_multiplier")
    return Curve(run.name, step[ok], np.maximum.accumulate(time_s[ok]), np.maximum.accumulate(tokens_m[ok]), loss[ok],
                 smooth, lr[ok], budget_s, compute_bpb_per_nat(run, smooth[-1]))


def compute_curves(run: Run, best: Run | None, previous: Run | None) -> dict[str, Curve | None]:
    """The curves of this run, the best and the previous one, all smoothed over the same stretch of time: ten steps of a
    small batch trail behind the loss less than ten of a large one, which early on would look like a lower loss."""
    curves = {k: compute_curve(r) if r else None for k, r in (("this", run), ("best", best), ("previous", previous))}
    step_s = {k: c.time_s[-1] / len(c.loss) for k, c in curves.items() if c}
    slowest_s = max(step_s.values(), default=0.0)
    return {k: replace(c, smooth=smoothed(c.loss, step_s[k] / slowest_s)) if c and step_s[k] < slowest_s else c
            for k, c in curves.items()}


def compute_bpb_per_nat(run: Run, last_loss: float) -> float | None:
    """What one nat per token is in bits per byte: by the evaluation's own counts, else by the final training loss."""
    record, val = run.evaluation or {}, number(run.summary.get("val_bpb"))
    tokens, num_bytes = number(record.get("tokens")), number(record.get("bytes"))
    if tokens and num_bytes:
        return tokens / (math.log(2) * num_bytes)
    return val / float(last_loss) if val and last_loss > 0 else None


def stable_phase(curve: Curve) -> np.ndarray:
    """Mask of the steps at full learning rate, the first fifth of them left out: there the loss is no power law yet."""
    lr = curve.lr if np.isfinite(curve.lr).all() else np.ones_like(curve.loss)
    full = np.flatnonzero(lr >= 0.99 * lr.max())
    end = curve.tokens_m[full[-1]]
    return (lr >= 0.99 * lr.max()) & (curve.tokens_m >= 0.2 * end)


@dataclass(frozen=True)
class PowerFit:
    """loss = a + b * tokens^-c with every exponent that fits about as well as the best one, for its uncertainty."""

    c: np.ndarray  # acceptable exponents, best first
    a: np.ndarray
    b: np.ndarray
    b_error: np.ndarray
    num_steps: int

    def gain(self, from_m: float, to_m: float) -> tuple[float, float, float]:
        """Change of the loss from one token count (millions) to another: estimate, low, high (two standard errors)."""
        factor = to_m**-self.c - from_m**-self.c
        change, error = self.b * factor, 2 * self.b_error * np.abs(factor)
        return float(change[0]), float((change - error).min()), float((change + error).max())

    def at(self, tokens_m: float) -> float:
        return float(self.a[0] + self.b[0] * tokens_m ** -self.c[0])


def fit_power(tokens_m: np.ndarray, loss: np.ndarray) -> PowerFit | None:
    """Least squares over a grid of exponents. None where the data cannot carry it: under 30 steps or less than a
    doubling of the tokens."""
    if len(loss) < 30 or tokens_m[0] <= 0 or tokens_m[-1] < 2 * tokens_m[0]:
        return None
    fits: list[tuple[float, ...]] = []
    for width, count in ((6.0, 40), (1.1, 41)):  # the exponent within 0.05 to 2, then closely around the best
        centre = min(fits)[1] if fits else 0.32
        for c in np.geomspace(centre / width, centre * width, count):
            x = tokens_m**-c
            dx = x - x.mean()
            b = float(dx @ loss / (dx @ dx))
            a = float(loss.mean() - b * x.mean())
            squares = float(np.sum((loss - a - b * x) ** 2))
            fits.append((squares, float(c), a, b, math.sqrt(squares / (len(loss) - 3) / float(dx @ dx))))
    fits.sort()
    near = [f for f in fits if f[0] <= fits[0][0] * (1 + 4 / (len(loss) - 3))]
    _, c, a, b, error = (np.array(column) for column in zip(*near, strict=True))
    return PowerFit(c, a, b, error, len(loss))


def mean_near(curve: Curve, tokens_m: float, share: float = 0.1) -> float:
    """Mean loss over the last `share` of the tokens before `tokens_m`."""
    window = (curve.tokens_m > (1 - share) * tokens_m) & (curve.tokens_m <= tokens_m)
    return float(curve.loss[window].mean()) if window.any() else math.nan


def compute_attribution(this: Curve, best: Curve, difference_bpb: float) -> dict:
    """How much of the difference comes from more or fewer tokens (speed) and how much from the rest (learning).

    Training losses at equal tokens would mislead: with a schedule by time, a faster run has a higher learning rate at
    the same token count. Speed is therefore priced on the best's own curve: its power law at full learning rate says
    what the other token count would have brought."""
    kappa, mask = best.bpb_per_nat, stable_phase(best)
    fit = fit_power(best.tokens_m[mask], best.loss[mask])
    mine, theirs = float(this.tokens_m[-1]), float(best.tokens_m[-1])
    end = 0.99 * min(c.tokens_m[stable_phase(c)][-1] if stable_phase(c).any() else math.nan for c in (this, best))
    equal = mean_near(this, end) - mean_near(best, end)
    result = {"tokens_m": [mine, theirs], "token_ratio": mine / theirs if theirs else None, "equal_tokens_m": end,
              "equal_tokens_difference_nats": equal, "speed_bpb": None, "learning_bpb": None}
    if fit is None or kappa is None or mine <= 0 or theirs <= 0:
        return result | {"basis": "no estimate: the best's curve at full learning rate is too short for a fit"}
    speed, low, high = (kappa * g for g in fit.gain(theirs, mine))
    return result | {
        "speed_bpb": speed, "speed_range": sorted([low, high]), "learning_bpb": difference_bpb - speed,
        "basis": f"fit a + b*tokens^-{fit.c[0]:.2f} to {fit.num_steps} steps of the best at full learning rate, "
                 f"{kappa:.4f} bpb per nat",
    }


def compute_trajectory(this: Curve, best: Curve | None, previous: Curve | None) -> dict:
    """Smoothed losses at fixed fractions of the budget, and of the tokens this run and the best have in common."""
    common_m = min(this.tokens_m[-1], best.tokens_m[-1]) if best else float(this.tokens_m[-1])
    rows = []
    for f in TRAJECTORY:
        row = {"budget": f, "this": this.at_time(f), "best": best.at_time(f) if best else None}
        row["previous"] = previous.at_time(f) if previous else None
        row |= {"tokens_m": f * common_m, "this_by_tokens": this.at_tokens(f * common_m)}
        row["best_by_tokens"] = best.at_tokens(f * common_m) if best else None
        rows.append(row)
    return {"best": best.name if best else None, "previous": previous.name if previous else None, "rows": rows,
            "part": compute_parting(this, best) if best else None}


def compute_parting(this: Curve, best: Curve, num_bins: int = 40) -> dict | None:
    """Where the curves part for good: the fraction of the budget from which the difference of the mean losses keeps its
    sign, and is more in the mean than its own noise (from its second differences) explains. None if they never do."""
    edges = np.linspace(0.02, min(1.0, this.time_s[-1] / this.budget_s, best.time_s[-1] / best.budget_s), num_bins + 1)

    def binned(curve: Curve) -> np.ndarray:
        which = np.digitize(curve.time_s / curve.budget_s, edges) - 1
        return np.array([curve.loss[which == i].mean() if (which == i).any() else math.nan for i in range(num_bins)])

    difference = binned(this) - binned(best)
    known = np.isfinite(difference)
    if known.sum() < 10:
        return None
    edges, difference = edges[:-1][known], difference[known]
    wobble = 1.4826 * float(np.median(np.abs(np.diff(difference, 2)))) / math.sqrt(6)
    sign = float(np.sign(difference[-4:].mean()))
    trend = np.convolve(np.pad(difference, 1, mode="edge"), np.ones(3) / 3, mode="valid")
    touching = np.flatnonzero(sign * trend <= 0)
    start = int(touching[-1]) + 1 if len(touching) else 0
    while start < len(difference) and sign * difference[start] <= 2 * wobble:
        start += 1
    apart = difference[start:]
    if len(apart) < 2 or abs(apart.mean()) < max(3 * wobble / math.sqrt(len(apart)), 1e-9):
        return None
    return {"budget": float(edges[start]) if start else 0.0, "sign": sign}


def compute_convergence(run: Run, curve: Curve) -> dict:
    """Slope at the end, share of the warm-down, a continuation if a fit deserves it, spikes, gradient norm."""
    fraction = curve.time_s / curve.budget_s
    tail = fraction > fraction[-1] - 0.1
    slope, error = fit_slope(100 * fraction[tail], curve.loss[tail])
    trend = "unknown"
    if slope is not None:
        trend = (
            "flat within its uncertainty" if abs(slope) <= 3 * error else "still improving" if slope < 0 else "rising"
        )
    mask = stable_phase(curve)
    fit, end_m = fit_power(curve.tokens_m[mask], curve.loss[mask]), float(curve.tokens_m[-1])
    has_warmdown = np.isfinite(curve.lr).all() and curve.lr[-1] < 0.5 * curve.lr.max()
    warmdown = float(curve.smooth[-1]) - fit.at(end_m) if fit and has_warmdown else None
    continuation = None
    if fit and curve.bpb_per_nat:
        gain, low, high = (curve.bpb_per_nat * g for g in fit.gain(end_m, 1.1 * end_m))
        # An interval wider than this says nothing: half the gain itself, or half the noise between runs.
        if (high - low) / 2 <= max(0.5 * abs(gain), 0.5 * PRIOR_SIGMA):
            continuation = [gain, low, high]
    return {"slope_per_percent": slope, "slope_error": error, "trend": trend, "warmdown_nats": warmdown,
            "ten_percent_more_bpb": continuation, "spikes": find_spikes(curve.step, curve.loss),
            "grad_norm": compute_gradient_trend(run)}


def fit_slope(x: np.ndarray, y: np.ndarray) -> tuple[float | None, float | None]:
    """Least-squares slope and its standard error; None under eight points."""
    if len(x) < 8 or np.ptp(x) == 0:
        return None, None
    dx = x - x.mean()
    slope = float(dx @ y / (dx @ dx))
    rest = y - y.mean() - slope * dx
    return slope, math.sqrt(float(rest @ rest) / (len(x) - 2) / float(dx @ dx))


def rolling_median(values: np.ndarray, width: int) -> np.ndarray:
    """Centred; the ends are mirrored."""
    half = width // 2
    padded = np.pad(values, half, mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=-1)


def find_spikes(step: np.ndarray, loss: np.ndarray) -> list[dict]:
    """Losses far above the median around them, after the first 5 % of the steps; neighbours are one spike. The bar is
    six robust standard deviations and at least 3 % of the loss, so that a quiet curve has none."""
    if len(loss) < 60:
        return []
    median = rolling_median(loss, 41)
    rest, skip = loss - median, max(10, len(loss) // 20)
    scale = 1.4826 * float(np.median(np.abs(rest[skip:])))
    high = [i for i in np.flatnonzero(rest > np.maximum(6 * scale, 0.03 * np.abs(median))) if i >= skip]
    spikes: list[dict] = []
    for i in high:
        if spikes and step[i] - spikes[-1]["until"] <= 5:
            spikes[-1]["until"] = float(step[i])
            spikes[-1]["height"] = max(spikes[-1]["height"], float(rest[i]))
        else:
            spikes.append({"step": float(step[i]), "until": float(step[i]), "height": float(rest[i])})
    return spikes


def compute_gradient_trend(run: Run) -> dict | None:
    norm = run.series("train/grad_norm")
    if np.isfinite(norm).sum() < 20:
        return None
    norm = norm[np.isfinite(norm)]
    early, late = (float(np.median(norm[int(a * len(norm)) : int(b * len(norm))])) for a, b in ((0.1, 0.3), (0.8, 1.0)))
    return {"early": early, "late": late, "max": float(norm[len(norm) // 20 :].max())}


# ---------------------------------------------------------------------------------------------------------------------
# Compute: machine, layers, history
# ---------------------------------------------------------------------------------------------------------------------


def compute_machine(run: Run, this: Entry, entries: list[Entry]) -> dict:
    """Step times and what stands out in them, against the same program's earlier runs where there are any."""
    steps_ms = run.series("perf/step_time_ms")
    steps_ms = steps_ms[np.isfinite(steps_ms)]
    settled = steps_ms[10:] if len(steps_ms) > 50 else steps_ms[1:] if len(steps_ms) > 2 else steps_ms
    s, warnings, machine = run.summary, [], {}
    if len(settled):
        median = float(np.median(settled))
        stalls = settled[settled > 2 * median]
        machine = {
            "median_ms": median,
            "p95_ms": float(np.percentile(settled, 95)),
            "stalls": len(stalls),
            "stalled_s": float((stalls - median).sum() / 1e3),
        }
    if len(settled) >= 30:
        machine["drift"], slow = compute_drift(settled)
        if slow:
            warnings.append(slow)
    same = [e.record["step_ms"] for e in entries
            if e.name != this.name and e.is_valid and e.group == this.group and e.record.get("step_ms")]
    if same and len(settled):
        machine["usual_ms"] = float(np.median(same))
        ratio = machine["median_ms"] / machine["usual_ms"] - 1
        if abs(ratio) > STEP_TIME_TOLERANCE:
            why = "a second job on the GPU, throttling, or a slow loader" if ratio > 0 else "those were hampered"
            warnings.append(f"steps took {1 + ratio:.2f} times what they took in earlier runs of this program: {why}; "
                            f"write invalid in the row of a score that suffered ({RESULTS}), or it widens the noise")
    total, trained = number(s.get("total_seconds")), number(s.get("training_seconds"))
    machine |= {
        "mfu_percent": number(s.get("mfu_percent")),
        "outside_training": 1 - trained / total if total and trained is not None else None,
        "startup_s": number(s.get("startup_seconds")),
        "eval_s": number(s.get("eval_seconds")),
        "stats_s": number(s.get("stats_seconds")),
        "first_loss": this.record.get("first_loss"),
        "first_loss_twins": [[e.name, e.record["first_loss"]] for e in entries if e.name != this.name
                             and e.record.get("first_loss") is not None and this.record.get("program_and_seed")
                             and e.record.get("program_and_seed") == this.record.get("program_and_seed")][-3:],
        "epochs": number(run.records[-1].get("train/epoch")) if run.records else None,
    }
    if unclocked := compute_unclocked(run):
        warnings.append(unclocked)
    return machine | {"warnings": warnings}


def compute_drift(steps_ms: np.ndarray) -> tuple[float, str | None]:
    """Step time of the last fifth against the first fifth, and a sentence if some stretch was slow for long."""
    fifth = max(3, len(steps_ms) // 5)
    drift = float(np.median(steps_ms[-fifth:]) / np.median(steps_ms[:fifth]) - 1)
    local = rolling_median(steps_ms, max(5, len(steps_ms) // 20) | 1)
    usual = float(np.percentile(local, 10))
    slow = local > (1 + 2 * STEP_TIME_TOLERANCE) * usual
    if slow.mean() < 0.03:
        return drift, None
    extra = float(np.median(local[slow]) / usual - 1)
    return drift, f"{slow.mean():.0%} of the steps were {extra:.0%} slower than the rest: throttling or a second job"


def compute_unclocked(run: Run) -> str | None:
    """A sentence if far more wall time passed between first and last step than the budget clock counted."""
    wall, clock = run.series("time/unix_s"), run.series("time/training_s")
    if len(wall) < 3 or not np.isfinite([wall[0], wall[-1], clock[0], clock[-1]]).all():
        return None
    passed, counted = float(wall[-1] - wall[0]), float(clock[-1] - clock[0])
    paused = number(run.summary.get("stats_seconds")) or 0.0
    if not run.summary or passed - paused <= 1.1 * counted + 2:
        return None
    return f"{passed:.0f} s passed between first and last step, the clock counted {counted:.0f} s"


def compute_layers(run: Run) -> list[str]:
    """Sentences on what stands out in the last layer statistics, most serious first; empty if nothing does."""
    with_layers, with_params = run.records_with("layers/names"), run.records_with("params/names")
    found: list[str] = []
    if with_layers:
        # From a quarter of the run on: output projections start at zero and grow a lot before as a matter of course.
        found += compute_activations(with_layers[len(with_layers) // 4], with_layers[-1])
    if with_params:
        found += compute_updates(with_params[len(with_params) // 2], with_params[-1], set(run.scalars))
    last = next((r for r in reversed(run.records) if number(r.get("logits/max_abs")) is not None), None)
    if last and (number(last.get("logits/max_prob")) or 0) > 0.9:
        found.append(f"logits saturate: largest {last['logits/max_abs']:.1f}, mean top probability "
                     f"{last['logits/max_prob']:.2f}")
    return found + compute_scalars(run)


def named_values(record: dict, names: str, key: str) -> dict[str, float]:
    pairs = zip(record.get(names) or [], record.get(key) or [], strict=False)
    return {str(name): v for name, value in pairs if (v := number(value)) is not None}


def compute_activations(first: dict, last: dict) -> list[str]:
    found = []
    for key, bar, what in (("layers/dead", 0.02, "dead input units"), ("layers/input_zeros", 0.99, "inputs at zero"),
                           ("layers/zeros", 0.5, "outputs at zero")):
        high = {n: v for n, v in named_values(last, "layers/names", key).items() if v > bar}
        if high:
            found.append(f"{what}: " + list_worst(high, lambda v: f"{v:.0%}"))
    before, after = (named_values(r, "layers/names", "layers/rms") for r in (first, last))
    growth = {n: after[n] / before[n] for n in after if before.get(n, 0) > 0}
    if high := {n: v for n, v in growth.items() if v > 10}:
        found.append("activations grew: " + list_worst(high, lambda v: f"x{v:.0f}"))
    if low := {n: v for n, v in growth.items() if v < 0.1}:
        found.append("activations vanish: " + list_worst(low, lambda v: f"x{v:.2g}", highest=False))
    names = [str(n) for n in last["layers/names"]]
    if missing := [n for n in names if n not in after]:
        found.append(f"no finite activation statistics: {', '.join(missing[:4])}")
    return found


def update_ratios(record: dict) -> dict[str, float]:
    update, weight = (named_values(record, "params/names", f"params/{k}_rms") for k in ("update", "weight"))
    return {n: update[n] / weight[n] for n in update if weight.get(n, 0) > 0 and update[n] > 0}


def compute_updates(middle: dict, last: dict, scalars: set[str]) -> list[str]:
    """Update sizes out of line in the middle of the run, where the learning rate is high, and idle parameters at its
    end. The residual scalars are left out: they are large and move slowly by design."""
    found, ratios = [], {n: v for n, v in update_ratios(middle).items() if n not in scalars}
    if len(ratios) >= 4:
        median = float(np.median(list(ratios.values())))
        # AdamW and Muon groups differ by a factor of ten as a matter of course.
        if high := {n: v / median for n, v in ratios.items() if v > 30 * median}:
            found.append(f"update/weight far above the median {median:.1e}: " + list_worst(high, lambda v: f"x{v:.0f}"))
        if low := {n: v / median for n, v in ratios.items() if v < median / 30}:
            found.append(f"update/weight far below the median {median:.1e}: "
                         + list_worst(low, lambda v: f"x{v:.1g}", highest=False))
    if idle := [n for n, v in named_values(last, "params/names", "params/grad_rms").items() if v == 0]:
        found.append(f"no gradient reaches {len(idle)} parameter(s): {', '.join(idle[:4])}")
    return found


def compute_scalars(run: Run) -> list[str]:
    found = []
    for name, logged in run.scalars.items():
        values = [number(v) for v in logged[-1]]
        known = [v for v in values if v is not None]
        low, high = min(known, default=0.0), max(known, default=0.0)
        early = [v for x in logged[0] if (v := number(x)) is not None]
        before, after = (float(np.median(v)) if v else 0.0 for v in (early, known))
        if before and not 1 / 3 < after / before < 3:
            found.append(f"{name} moved: median {before:.3g} at first, {after:.3g} at the end")
        if high - low > 0.5 * max(abs(high), abs(low)):
            found.append(f"{name}: {low:.3g} (layer {values.index(low)}) to {high:.3g} "
                         f"(layer {values.index(high)})" + (", of both signs" if low < 0 < high else ""))
    return found


def list_worst(values: dict[str, float], form: Callable[[float], str], highest: bool = True, limit: int = 3) -> str:
    worst = sorted(values.items(), key=lambda item: item[1], reverse=highest)
    more = f" and {len(worst) - limit} more" if len(worst) > limit else ""
    return ", ".join(f"{name} {form(v)}" for name, v in worst[:limit]) + more


def compute_history(entries: list[Entry]) -> dict:
    """Counts, lineage of kept programs (mean over replicates), gain per hour, and ideas since the best was found.

    An idea is a program with a valid score, from its first run on: neither a replicate nor a crash tells of another."""
    best, groups, lineage, seen = compute_best(entries), compute_groups(entries), [], set()
    for e in entries:
        if e.status == "keep" and e.is_valid and e.group not in seen:
            seen.add(e.group)
            lineage.append([e.name, mean_bpb(groups[e.group]), e.description])
    hours = sum(e.record.get("total_s") or e.record.get("training_s") or 0.0 for e in entries) / 3600
    counts = {status: sum(e.status == status for e in entries) for status in STATUSES}
    gain = lineage[0][1] - best.mean if lineage and best else None
    since = len(groups) - 1 - list(groups).index(best.group) if best else None
    starts = [t for e in entries if (t := e.record.get("started_unix"))]
    return {
        "num_runs": len(entries),
        "counts": counts,
        "lineage": lineage,
        "hit_rate": (len(lineage) - 1) / (len(groups) - 1) if len(groups) > 1 and lineage else None,
        "hours": hours,
        "first_start_unix": min(starts, default=None),
        "gain": gain,
        "gain_per_hour": gain / hours if gain is not None and hours > 0 else None,
        "ideas_since_best": since,
        "is_plateau": best is not None and since >= PLATEAU_IDEAS,
        "last": [[e.name, e.val_bpb, e.status, e.description] for e in entries[-5:]],
    }


def compute_near_misses(entries: list[Entry], limit: int = 5) -> list[Entry]:
    """Discarded or pending programs run once whose score is within the noise of the best: they deserve a rerun."""
    best, noise, groups = compute_best(entries), compute_noise(entries), compute_groups(entries)
    if best is None:
        return []
    bar = best.mean + GAIN_ERRORS * noise.sigma * math.sqrt(1 + 1 / len(best.names))
    near = [e for e in entries if e.is_valid and e.status in ("discard", "pending") and e.group != best.group
            and len(groups[e.group]) == 1 and e.val_bpb <= bar]
    return sorted(near, key=lambda e: e.val_bpb)[:limit]


def compute_stats(run: Run, this: Entry, entries: list[Entry], best_run: Run | None,
                  curves: dict[str, Curve | None]) -> dict:
    """Everything the analysis says about one run, as numbers. A part that fails says so and leaves the others alone:
    the program may have become anything, and the night must not end over a surprise in its metrics."""
    by_name = {e.name: e for e in entries}
    stats: dict = {"record": this.record, "status": this.status, "description": this.description,
                   "verdict": compute_verdict(this, entries)}
    if this.status == "crash":
        stats["crash"] = compute_crash(run)
    this_curve, best_curve = curves["this"], curves["best"]
    best_entry = by_name.get(best_run.name) if best_run else None
    difference = stats["verdict"].get("difference")
    parts: dict[str, Callable[[], object]] = {
        "changes": lambda: compute_changes(this, run.train_py, best_entry, best_run and best_run.train_py, entries),
        "why": lambda: compute_attribution(this_curve, best_curve, difference)
        if this_curve and best_curve and difference is not None else None,
        "cost": lambda: compute_cost(run, best_run),
        "trajectory": lambda: compute_trajectory(this_curve, best_curve, curves["previous"]) if this_curve else None,
        "convergence": lambda: compute_convergence(run, this_curve) if this_curve else None,
        "machine": lambda: compute_machine(run, this, entries),
        "layers": lambda: compute_layers(run),
        "history": lambda: compute_history(entries)
        | ({"is_plateau": False} if stats["verdict"]["kind"] == "new best" else {}),
    }
    failed = {}
    for key, part in parts.items():
        try:
            stats[key] = part()
        except Exception as e:  # see above
            stats[key], failed[key] = None, f"{type(e).__name__}: {e}"
    return plain(stats | {"failed": failed})


# Label, key in the summary, format: what a run costs, side by side with the best.
COSTS = (
    ("parameters", "num_params_M", ".1f", " M"),
    ("FLOPs per token", "flops_per_token", ".3g", ""),
    ("tokens", "total_tokens_M", ".1f", " M"),
    ("steps", "num_steps", ".0f", ""),
    ("memory", "peak_vram_mb", ".0f", " MB"),
    ("MFU", "mfu_percent", ".1f", " %"),
)


def cost_cells(run: Run) -> list[tuple[str, str | None]]:
    """Label and value of everything a run costs, None where it is not known."""
    known = [(label, number(run.summary.get(key)), form, unit) for label, key, form, unit in COSTS]
    known.append(("step, median", run.step_ms, ".1f", " ms"))
    return [(label, None if value is None else show(value, form, unit)) for label, value, form, unit in known]


def compute_cost(run: Run, best_run: Run | None) -> list[list]:
    """Rows of label, this run's value, the best's, as far as known."""
    theirs = dict(cost_cells(best_run)) if best_run else {}
    return [[label, mine, theirs.get(label)] for label, mine in cost_cells(run) if mine is not None]


# ---------------------------------------------------------------------------------------------------------------------
# Render: analysis.md, status, compare, report.md
# ---------------------------------------------------------------------------------------------------------------------


def render_verdict(stats: dict) -> list[str]:
    v = stats["verdict"]
    kind, noise, best = v["kind"], v["noise"], render_best(v)
    score, lines = show(v["val_bpb"]), []
    versus = f"val_bpb {score}, best so far {best}" if v["best"] else f"val_bpb {score}"
    if v.get("difference") is not None:
        versus += f", difference {v['difference']:+.6f} bpb = {v['standard_errors']:+.1f} standard errors"
    if kind == "crash":
        lines.append(f"**CRASHED**: {clip(stats['crash']['reason'], 200)}. Best so far: {best}.")
    elif kind == "invalid":
        lines.append(f"**INVALID**, not a result: val_bpb {score} does not count. Best so far: {best}.")
        lines += [f"- {clip(reason, 200)}" for reason in v["invalid"][:5]]
    elif kind == "baseline":
        lines.append(
            f"**BASELINE**: {versus}. There is nothing to compare with yet. Keep it; run it once more for the noise."
        )
    elif kind == "replicate":
        lines.append(f"**REPLICATE** of the best, no new idea: {versus}.")
        lines.append(f"{1 + len(v['replicates'])} runs of this program: mean {v['mean']:.6f}, "
                     f"standard deviation {v['spread']:.6f}.")
        if v["dethroned_by"]:
            lines.append("With this mean it is the best no more: that is {} at {:.6f}.".format(*v["dethroned_by"]))
    elif kind == "new best":
        lines.append(f"**NEW BEST**: {versus}.")
    elif kind == "not better":
        lines.append(f"**NOT BETTER**: {versus}.")
    else:
        advice = ("A gain inside the noise: run it again before building on it." if v["difference"] < 0
                  else "No measurable difference: prefer the simpler program.")
        runs = f"about {v['runs_to_tell']}" if v["runs_to_tell"] and v["runs_to_tell"] <= 20 else "more than 20"
        advice += f" So small a difference takes {runs} runs of each to tell."
        lines.append(f"**WITHIN NOISE**: {versus}. {advice}")
    if v["replicates"] and kind in ("new best", "not better", "within noise"):
        lines.append(f"The difference is that of the mean of {1 + len(v['replicates'])} runs of this program, "
                     f"{v['mean']:.6f} (also {', '.join(v['replicates'][:4])}).")
    if v["same_as"]:
        lines.append(f"Counted as a replicate: {v['same_as']}.")
    if v["best"] and not v["best_is_kept"]:
        lines.append(f"Nothing is kept yet: {v['best']}, the first valid run, stands in as the best.")
    bar = f"; a difference counts from {GAIN_ERRORS:.0f} standard errors"
    bar += f", here {GAIN_ERRORS * v['standard_error']:.6f} bpb" if v.get("standard_error") else ""
    lines.append(f"Noise between identical runs: sigma {noise['sigma']:.6f} bpb ({noise['source']}){bar}.")
    remarks = [*stats["record"].get("notes", []), *stats["record"].get("damage", [])]
    remarks += (stats.get("machine") or {}).get("warnings", [])
    return lines + [f"Mind: {clip(remark, 220)}." for remark in remarks[:5]]


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
    if crash["cause"]:
        lines.append(f"Looks like: {crash['cause']}. What usually helps: {crash['help']}.")
    return [*lines, "```", *crash["log_end"], "```"] if crash["log_end"] else lines


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
    for key, (before, after) in list(config.items())[:7]:
        lines.append(f"- `{key}`: {clip(json.dumps(before), 60)} -> {clip(json.dumps(after), 60)}")
    if len(config) > 7:
        lines.append(f"- and {len(config) - 7} more: {clip(', '.join(list(config)[7:]), 120)}")
    told = {key: f"`{key}` {clip(str(a), 70)} -> {clip(str(b), 70)}" for key, (a, b) in changes["machine"].items()}
    for is_kernel, what in enumerate(("another machine, scores may not compare", "other kernels, so another speed")):
        if which := "; ".join(text for key, text in told.items() if (key in KERNEL_KEYS) == is_kernel):
            lines.append(f"- {what}: {which}")
    for what, key in (
        ("This very program was", "same_program"),
        ("This configuration, with other code, was", "same_config"),
    ):
        if changes[key]:
            tried = ", ".join(f"{n} ({show(v)}, {s})" for n, s, v in changes[key][-3:])
            lines.append(f"{what} tried before: {tried}.")
    return lines


def render_why(why: dict | None, cost: list[list] | None, difference: float | None) -> list[str]:
    lines = []
    if why and why["speed_bpb"] is not None:
        low, high = why["speed_range"]
        speed = f"{why['speed_bpb']:+.5f} ({low:+.5f} to {high:+.5f})" if why["speed_bpb"] else "0 (equal tokens)"
        lines.append(f"Of {difference:+.5f} bpb, an estimate: speed {speed}, "
                     f"learning and noise {why['learning_bpb']:+.5f}.")
    if why:
        ratio = f"{why['token_ratio'] - 1:+.1%} tokens" if why["token_ratio"] else "tokens unknown"
        lines.append(f"Basis: {ratio}; {why['basis']}.")
        if why["equal_tokens_difference_nats"] is not None:
            lines.append(f"Training loss at equal tokens ({why['equal_tokens_m']:.1f} M, before either warm-down): "
                         f"{why['equal_tokens_difference_nats']:+.4f} nats.")
    cells = [f"{label} {mine}" + (f" (best {theirs})" if theirs else "") for label, mine, theirs in cost or []]
    return lines + ["; ".join(cells[i : i + 3]) + "." for i in range(0, len(cells), 3)]


def render_trajectory(trajectory: dict) -> list[str]:
    def cell(value: float | None, form: str = ".4f") -> str:
        return "-" if value is None else f"{value:{form}}"

    def difference(a: float | None, b: float | None) -> str:
        return "-" if a is None or b is None else f"{a - b:+.4f}"

    best, previous = trajectory["best"], trajectory["previous"]
    lines = [f"Smoothed loss by time, then by tokens. best {best or '-'}, previous {previous or '-'}",
             "| budget | this | best | diff | previous | diff | M tokens | this | diff to best |",
             "|---|---|---|---|---|---|---|---|---|"]
    for r in trajectory["rows"]:
        by_time = [cell(r["this"]), cell(r["best"]), difference(r["this"], r["best"]), cell(r["previous"])]
        by_time.append(difference(r["this"], r["previous"]))
        by_tokens = [cell(r["tokens_m"], ".2f"), cell(r["this_by_tokens"])]
        by_tokens.append(difference(r["this_by_tokens"], r["best_by_tokens"]))
        lines.append(f"| {r['budget']:.0%} | " + " | ".join(by_time + by_tokens) + " |")
    if best:
        part = trajectory["part"]
        lines.append(f"By time, they part for good at {part['budget']:.0%} of the budget: from there this run is "
                     f"{'above (worse)' if part['sign'] > 0 else 'below (better)'}." if part
                     else "By time, they do not part for good: the difference keeps inside its own wobble.")
    return lines


def render_convergence(c: dict) -> list[str]:
    lines = []
    if c["slope_per_percent"] is not None:
        lines.append(f"Slope over the last 10 %: {c['slope_per_percent']:+.5f} +/- {c['slope_error']:.5f} nats per 1 % "
                     f"of the budget: {c['trend']}.")
    else:
        lines.append("Slope at the end: unknown, too few steps.")
    if c["warmdown_nats"] is not None:
        lines.append(
            f"The warm-down brought {c['warmdown_nats']:+.4f} nats beyond the continuation of full learning rate."
        )
    if c["ten_percent_more_bpb"]:
        gain, low, high = c["ten_percent_more_bpb"]
        lines.append(f"10 % more tokens would bring about {gain:+.5f} bpb ({low:+.5f} to {high:+.5f}).")
    else:
        lines.append("No continuation: no fit at full learning rate deserves one.")
    spikes = c["spikes"]
    if spikes:
        worst = max(spikes, key=lambda s: s["height"])
        where = ", ".join(f"{s['step']:.0f}" for s in spikes[:6])
        lines.append(
            f"{len(spikes)} spike(s) at step {where}; the highest +{worst['height']:.2f} at {worst['step']:.0f}."
        )
    if g := c["grad_norm"]:
        lines.append(f"Gradient norm {g['early']:.3g} early, {g['late']:.3g} late ({g['late'] / g['early'] - 1:+.0%}), "
                     f"largest {g['max']:.3g}." if g["early"] else f"Gradient norm late {g['late']:.3g}.")
    return lines


def render_machine(m: dict) -> list[str]:
    lines = []
    if "median_ms" in m:
        usual = f", usual for this program {m['usual_ms']:.1f}" if "usual_ms" in m else ""
        drift = f", drift {m['drift']:+.1%}" if m.get("drift") is not None else ""
        lines.append(f"Step {m['median_ms']:.1f} ms median{usual}, {m['p95_ms']:.1f} ms 95th percentile{drift}; "
                     f"{m['stalls']} stall(s), {m['stalled_s']:.1f} s lost; MFU {show(m['mfu_percent'], '.1f', ' %')}.")
    if m["outside_training"] is not None:
        spans = (("start-up", "startup_s"), ("evaluation", "eval_s"), ("statistics", "stats_s"))
        told = ", ".join(f"{what} {show(m[key], '.0f', ' s')}" for what, key in spans)
        lines.append(f"Outside training: {m['outside_training']:.0%} of the wall time ({told}).")
    if m["first_loss"] is not None:
        twins = [
            f"{'same' if loss == m['first_loss'] else f'{loss:.6f}'} in {name}" for name, loss in m["first_loss_twins"]
        ]
        lines.append(f"Step-0 loss {m['first_loss']:.6f}, a fingerprint of the compiled kernels"
                     + (f": {', '.join(twins)}." if twins else "."))
    if m["epochs"] and m["epochs"] > 1:
        lines.append(f"The data were repeated: epoch {m['epochs']:.0f} at the end.")
    return [*lines, *(f"- {w}." for w in m["warnings"])] or ["Unknown: no step times."]


def render_counts(h: dict) -> str:
    counts = ", ".join(f"{n} {status}" for status, n in h["counts"].items() if n)
    return f"{h['num_runs']} run{'' if h['num_runs'] == 1 else 's'}" + (f" ({counts})" if counts else "")


def render_history(h: dict) -> list[str]:
    lines = [f"{render_counts(h)}, {h['hours']:.1f} h; hit rate {show(h['hit_rate'], '.0%')}, "
             f"gain per hour {show(h['gain_per_hour'], '.5f')} bpb."]
    if h["is_plateau"]:
        lines.append(f"Plateau: {h['ideas_since_best']} ideas since the best was found. Change direction.")
    lines += [f"- {name} {show(val)} {status}: {clip(text, 60)}" for name, val, status, text in h["last"]]
    chain = [f"{name} {val:.6f}" for name, val, _ in h["lineage"]]
    if chain:
        shown = chain if len(chain) <= 6 else [chain[0], f"({len(chain) - 6} more)", *chain[-5:]]
        lines.append("Kept: " + " -> ".join(shown))
    return lines


def render_analysis(stats: dict, pictures: list[str]) -> str:
    """The page for the agent, without its notes: at most PAGE_LINES and PAGE_BYTES."""
    name = stats["record"]["name"]
    difference = stats["verdict"].get("difference")
    sections: list[tuple[str, Callable[[], list[str]]]] = [("Verdict", lambda: render_verdict(stats))]
    if stats.get("crash"):
        sections.append(("Crash", lambda: render_crash(stats["crash"])))
    if stats["changes"]:
        sections.append(("What changed", lambda: render_changes(stats["changes"])))
    if stats["why"] or stats["cost"]:
        sections.append(("Why", lambda: render_why(stats["why"], stats["cost"], difference)))
    for key, title, render in (("trajectory", "Trajectory", render_trajectory),
                               ("convergence", "Convergence", render_convergence),
                               ("machine", "Machine", render_machine)):
        if stats[key]:
            sections.append((title, lambda key=key, render=render: render(stats[key])))
    if stats["layers"]:
        sections.append(("Layers", lambda: [f"- {clip(line, 180)}" for line in stats["layers"][:8]]))
    if stats["history"]:
        sections.append(("History", lambda: render_history(stats["history"])))
    failed = [f"- not computed: {part}: {clip(why, 160)}" for part, why in stats["failed"].items()]
    data = [f"Pictures: {', '.join(pictures) or 'none'}; across runs ../progress.png. Numbers: stats.json.",
            f'Data: `from analyze import load_run, load_runs; run = load_run("{name}"); run.metrics["train/loss"]`.',
            *failed]
    pages = [(title, render()) for title, render in sections] + [("Data", data)]
    return fit_page(f"# {name}: {clip(stats['description'], 100)}", pages)


def fit_page(title: str, sections: list[tuple[str, list[str]]]) -> str:
    """Title and sections as Markdown; what does not fit is cut from the end of the longest section but the verdict."""
    sections = [(heading, [clip(printable(line), 400) for line in lines]) for heading, lines in sections]
    while True:
        text = "\n\n".join([title, *("\n".join([f"## {heading}", *lines]) for heading, lines in sections)]) + "\n"
        if len(text.encode()) <= PAGE_BYTES - 100 and text.count("\n") <= PAGE_LINES - 2:
            return text
        longest = max(sections[1:], key=lambda section: len("\n".join(section[1])))[1]
        del longest[-2 if longest[-1] == "```" else -1]


def write_analysis(folder: Path, text: str) -> None:
    """The page above the agent's notes, which stay as they are."""
    old = read_text(folder / ANALYSIS) or ""
    _, heading, notes = old.partition(NOTES_HEADING)
    write_atomic(folder / ANALYSIS, f"{text}\n{NOTES_HEADING}{notes if heading else chr(10)}")


def render_current_best(entries: list[Entry]) -> str:
    best, noise = compute_best(entries), compute_noise(entries)
    if best is None or not best.is_kept:
        return "No run is kept yet."
    e = next(e for e in entries if e.name == best.name)
    runs = f"mean of {len(best.names)} runs ({', '.join(best.names[:6])})" if len(best.names) > 1 else "one run"
    return (f"- {best.name}: val_bpb {best.mean:.6f}, {runs}\n- its change: {e.description}\n"
            f"- noise between identical runs: sigma {noise.sigma:.6f} bpb ({noise.source})")


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


def count_ideas(text: str | None) -> int:
    """Ideas in ideas_queue.md: list items that are not indented; if there are none, headings below the title."""
    items = re.findall(r"^(?:[-*+]|\d+[.)]) +\S", text or "", re.M)
    return len(items) or len(re.findall(r"^##+ +\S", text or "", re.M))


def compute_status(archive: Path, folder: Path) -> dict:
    book = load_book(archive)
    best, noise, history = compute_best(book.entries), compute_noise(book.entries), compute_history(book.entries)
    unfiled = sorted(p.name for p in (archive / "unfiled").glob("*") if p.is_dir())
    started = history["first_start_unix"]
    return {
        "best": {"name": best.name, "val_bpb": best.mean, "runs": list(best.names), "is_kept": best.is_kept}
        if best else None,
        "noise": {"sigma": noise.sigma, "source": noise.source},
        "here": describe_outputs(folder, book),
        "pending": [e.name for e in book.entries if e.status == "pending"],
        "unfiled": unfiled + book.unbooked,
        **{key: history[key] for key in ("num_runs", "counts", "last", "ideas_since_best", "is_plateau", "gain")},
        "queue_length": count_ideas(read_text(archive / QUEUE)),
        "hours_used": history["hours"],
        "hours_since_first_start": (time.time() - started) / 3600 if started else None,
        "rerun": [e.name for e in compute_near_misses(book.entries)],
        "problems": book.problems,
    }


def render_status(s: dict) -> str:
    best = s["best"]
    lines = [f"best: {best['name']} val_bpb {best['val_bpb']:.6f}" if best else "best: none yet"]
    if best:
        lines[0] += f", mean of {len(best['runs'])} runs" if len(best["runs"]) > 1 else ", one run"
        lines[0] += "" if best["is_kept"] else " (nothing is kept yet: the first valid run stands in)"
    lines += [
        f"noise: sigma {s['noise']['sigma']:.6f} bpb ({s['noise']['source']})",
        f"archive: {render_counts(s)}",
        f"this folder: {s['here']}",
        f"pending, decide keep or discard: {', '.join(s['pending'][-10:]) or 'none'}",
        f"queue: {s['queue_length']} idea(s) in {QUEUE}",
        f"budget used: {s['hours_used']:.2f} h in runs"
        + (f", {s['hours_since_first_start']:.1f} h since the first" if s["hours_since_first_start"] else ""),
    ]
    if s["unfiled"]:
        lines.append(f"not filed yet, run `uv run analyze.py`: {', '.join(s['unfiled'][:10])}")
    if s["is_plateau"]:
        lines.append(f"plateau: {s['ideas_since_best']} ideas since the best was found; change direction")
    if s["rerun"]:
        lines.append(f"within noise of the best, run once: {', '.join(s['rerun'])}")
    lines += [f"problem: {p}" for p in s["problems"][:10]]
    lines += ["last runs:"] + [f"  {n}  {show(v)}  {status:8} {clip(d, 70)}" for n, v, status, d in s["last"]]
    return "\n".join(lines) + "\n"


def render_compare(runs: list[Run], entries: list[Entry]) -> str:
    """A Markdown table: scores and costs, configuration keys that differ, smoothed loss by share of the budget."""
    by_name = {e.name: e for e in entries}
    curves = [compute_curve(run) for run in runs]
    configs = [configuration(run.summary) for run in runs]
    own = [by_name.get(run.name) for run in runs]
    rows = [["status", *(e.status if e else "no row" for e in own)],
            ["val_bpb", *(show(e.val_bpb if e else None) for e in own)]]
    for cells in zip(*(cost_cells(run) for run in runs), strict=True):
        rows.append([cells[0][0], *(value or "unknown" for _, value in cells)])
    for key in {k: None for config in configs for k in config}:
        values = [json.dumps(config.get(key)) if key in config else "-" for config in configs]
        if len(set(values)) > 1:
            rows.append([f"`{key}`", *(clip(v, 40) for v in values)])
    for f in TRAJECTORY:
        rows.append(
            [f"loss at {f:.0%} of the budget", *(show(c.at_time(f), ".4f") if c else "unknown" for c in curves)]
        )
    titles = ["", *(run.name for run in runs)]
    table = [titles, ["---"] * len(titles), *rows]
    told = [f"{e.name}: {clip(e.description, 100)}" for e in own if e]
    return "\n".join(["| " + " | ".join(row) + " |" for row in table] + ["", *told]) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The morning: effects, predictions, claims, report.md, report.html, best.patch
# ---------------------------------------------------------------------------------------------------------------------

TRIED = ("new best", "unproven", "not better")  # verdicts on an idea; the others are on the run
# What follows from the knobs, or is not train.py's to set: no idea of its own.
DERIVED = re.compile(
    r"num_params\w*|flops_per_token|width|num_heads|window_sizes|max_seq_len|time_budget|eval_tokens|demo|seed\w*"
)
# "expect -0.0006" in a commit's subject. A number without its sign, or of another unit, is no prediction of val_bpb.
EXPECTED = re.compile(
    r",? *\b(?:expect|predict)\w*[^-+\d\u2212\u2013]{0,24}([-+\u2212\u2013] ?\d*[.,]?\d+(?:e-?\d+)?)"
    r"(?![\d.]| ?(?:%|ms|x|M))", re.I)
RUN_NAME = re.compile(r"\b(?:unknown-|nogit-)?[0-9a-f]{7}(?:-dirty)?(?:\.\d+)?\b")
HTML_STYLE = """body {font: 15px/1.5 sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem}
img {width: 100%} table {border-collapse: collapse} tr:first-child {font-weight: bold}
td {border-bottom: 1px solid #ddd; padding: .2rem .6rem; vertical-align: top}"""


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
        return self.kind == "unproven" or not self.error or abs(self.difference) < GAIN_ERRORS * self.error


def verdict_of(e: Entry) -> dict:
    """As it stands on the run's own page: whatever is said of a run elsewhere has the same bar."""
    return e.stats.get("verdict") or {}


def changed_knobs(e: Entry) -> dict[str, str]:
    """Knob to "before -> after"; a run that changed none changed the code, and goes by its subject."""
    config = (e.stats.get("changes") or {}).get("config") or {}
    knobs = {k: pair for k, pair in config.items() if not DERIVED.fullmatch(k)}
    if knobs.get("num_kv_heads") == config.get("num_heads"):  # as many as heads, whatever their number
        knobs.pop("num_kv_heads", None)
    if not knobs:
        return {clip(idea_of(e.description), 60): "code"}
    told = {}
    for knob, (before, after) in knobs.items():
        others = [other for other in knobs if other != knob]
        told[knob] = f"{json.dumps(before)} -> {json.dumps(after)}" + (f" with {', '.join(others)}" if others else "")
    return told


def compute_effects(entries: list[Entry]) -> list[Effect]:
    """Everything tried: gains, then losses, then what the noise hides; the largest first. Of replicates the last one
    speaks, whose verdict is on the mean of all."""
    found: dict[tuple, Effect] = {}
    for e in entries:
        v = verdict_of(e)
        if v.get("kind") in TRIED and (difference := number(v.get("difference"))) is not None:
            for knob, change in changed_knobs(e).items():
                error = number(v.get("standard_error"))
                found[knob, e.group] = Effect(knob, change, e, difference, error, v["kind"])
    return sorted(found.values(), key=lambda x: (x.is_inside_noise, x.difference > 0, -abs(x.difference)))


def untouched_knobs(entries: list[Entry]) -> str:
    configs = [e.record["config"] for e in entries if e.record.get("config")]
    touched = {knob for e in entries for knob in changed_knobs(e)}
    return ", ".join(k for k in (configs or [{}])[-1] if k not in touched and not DERIVED.fullmatch(k)) or "none"


def render_effects(entries: list[Entry], limit: int) -> list[str]:
    """A line for each of the `limit` knobs that matter most, then the knobs that nobody has touched."""
    by_knob: dict[str, list[str]] = {}
    for x in compute_effects(entries):
        by_knob.setdefault(x.knob, []).append(f"{x.change} {x.measured} ({x.kind}, {x.entry.name})")
    lines = [f"{knob}: {'; '.join(told[:3])}" for knob, told in by_knob.items()][:limit]
    if len(by_knob) > limit:
        lines.append(f"and {len(by_knob) - limit} more in report.md")
    return [*lines, f"never touched: {untouched_knobs(entries)}"]


def idea_of(description: str) -> str:
    """A subject without its prediction."""
    return EXPECTED.split(description)[0]


def expected_difference(description: str) -> float | None:
    found = EXPECTED.search(description)
    return float(re.sub("[\u2212\u2013]", "-", found[1]).replace(" ", "").replace(",", ".")) if found else None


def render_prediction(entry: Entry, difference: float | None, error: float | None) -> str:
    """What the subject expected and what came, one line; empty where it expected nothing or nothing was measured."""
    expected = expected_difference(entry.description)
    if expected is None or difference is None or not error:
        return ""
    miss, told = difference - expected, "the error allows both"
    if abs(miss) > GAIN_ERRORS * error:
        told = f"{'worse' if miss > 0 else 'better'} than expected by {abs(miss):.4f}"
    return f"Expected {expected:+.4f}, came {difference:+.4f} ± {error:.4f}: {told}."


def render_calibration(entries: list[Entry]) -> str:
    """How well the author of the subjects predicts; empty before the first prediction that was measured."""
    effects = {x.entry.name: x for x in compute_effects(entries) if x.error}
    pairs = [(expected_difference(x.entry.description), x.difference, x.error) for x in effects.values()]
    pairs = [pair for pair in pairs if pair[0] is not None]
    if not pairs:
        return ""
    expected, came, errors = np.array(pairs).T
    return (f"{len(pairs)} prediction(s): expected {expected.mean():+.4f} in the mean, came {came.mean():+.4f}; "
            f"the sign was right in {(expected * came > 0).sum()}, "
            f"the size within two standard errors in {(abs(came - expected) <= GAIN_ERRORS * errors).sum()}.")


def check_insights(text: str | None, entries: list[Entry]) -> list[str]:
    """Claims of insights.md that cite runs which do not exist, or rest on runs inside the noise alone."""
    names, lines = {e.name for e in entries}, []
    is_inside = {x.entry.name: x.is_inside_noise for x in compute_effects(entries)}
    for claim in re.findall(r"^[-*+] +(.+(?:\n[ \t]+\S.*)*)", (text or "").partition("## Claims")[2], re.M):
        cited = [name for name in RUN_NAME.findall(claim) if name in names or not name.isdecimal()]
        if missing := [name for name in cited if name not in names]:
            lines.append(f"no run is called {', '.join(missing)}: {clip(claim, 80)}")
        elif cited and all(is_inside.get(name) for name in cited):
            lines.append(f"rests on runs inside the noise alone: {clip(claim, 80)}")
    return lines


def compute_audit(archive: Path, names: Iterable[str]) -> float | None:
    """Mean score of these runs on validation text that no score used; None where it was not scored."""
    scores = numbers((read_json(archive / name / EVAL) or {}).get("audit_bpb") for name in names)
    return float(np.nanmean(scores)) if np.isfinite(scores).any() else None


def render_gain(archive: Path, entries: list[Entry]) -> str:
    """The paragraph a person can forward."""
    h, best, noise = compute_history(entries), compute_best(entries), compute_noise(entries)
    took = f"{h['hours']:.1f} h" if h["hours"] >= 1 else f"{60 * h['hours']:.1f} minutes"
    night = f"{render_counts(h)}, {took} of training"
    if h.get("gpu_share"):
        night += f", the GPU at work {h['gpu_share']:.0%} of the time"
    if best is None or not h["lineage"] or h["lineage"][0][0] == best.name:
        return f"{night}. No gain over the first kept run."
    base, start, _ = h["lineage"][0]
    base_names = [e.name for e in compute_groups(entries)[next(e.group for e in entries if e.name == base)]]
    won, lent = start - best.mean, h.get("optimism") or 0.0
    error = noise.sigma and noise.sigma * math.sqrt(1 / len(base_names) + 1 / len(best.names))
    text = (f"val_bpb went from {start:.6f} to {best.mean:.6f} ({best.name}), a gain of {won:.6f} ± {show(error)} "
            f"(standard error) over the first kept run, {base}: {night}. ")
    if lent:
        text += f"About {lent:.6f} of it is luck, since the best was chosen among equals: {won - lent:.6f} remain. "
    audits = [compute_audit(archive, names) for names in (base_names, best.names)]
    if None in audits:
        text += "It is not confirmed: no text but the score's own was scored. "
    else:
        on_audit = audits[0] - audits[1]
        text += (f"On validation text that no score used the gain is {on_audit:.6f}: "
                 f"{max(won - on_audit, 0):.6f} of it may be the search fitted to the text of the score. ")
    helped = [f"{idea} ({measured})" for *_, measured, outside, idea in render_kept(entries) if outside == "yes"]
    return text + f"What helped: {'; '.join(helped[-6:]) or 'nothing that stands outside the noise'}."


def render_kept(entries: list[Entry]) -> list[list[str]]:
    """The kept chain: run, mean, effect as its verdict measured it, whether that is outside the noise, idea."""
    effects, groups, rows = {x.entry.group: x for x in compute_effects(entries)}, {e.name: e.group for e in entries}, []
    for name, mean, description in compute_history(entries)["lineage"]:
        cells = ["", ""]
        if x := effects.get(groups[name]):
            cells = [x.measured, "no" if x.is_inside_noise else "yes"]
        rows.append([name, f"{mean:.6f}", *cells, idea_of(description)])
    return rows


def render_table(titles: list[str], rows: list[list[str]]) -> list[str]:
    lines = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines] + [""]


def render_report(book: Book, archive: Path, pictures: Iterable[str]) -> str:
    """The morning page for a person: what was gained, by what, and all that was tried."""
    entries = book.entries
    effects = [[x.knob, x.change, x.measured, x.kind, x.entry.name] for x in compute_effects(entries)]
    tried = [[e.name, show(e.val_bpb), mark_of(e), reason_of(e), e.description] for e in entries]
    lines = [f"# Report{' on the demo' * any(e.record.get('demo') for e in entries)}", ""]
    lines += [render_gain(archive, entries), "", "![](progress.png)", "", "## Kept, from the first to the best", ""]
    lines += render_table(["run", "val_bpb", "effect", "outside the noise", "idea"], render_kept(entries))
    lines += ["## Effects", "", *render_table(["knob", "change", "effect", "verdict", "run"], effects)]
    lines += [f"Never touched: {untouched_knobs(entries)}. {render_calibration(entries)}", ""]
    lines += ["## Everything tried", ""]
    lines += render_table(["run", "val_bpb", "decision", "verdict, or why it has none", "description"], tried)
    lines += [f"- {problem}\n" for problem in book.problems]
    lines += ["## Pictures of the best run", "", *(f"![]({name})\n" for name in pictures)] if pictures else []
    return "\n".join(lines).rstrip() + "\n"


def reason_of(e: Entry) -> str:
    """Why a run has no score that counts; of one that has, the verdict."""
    told = e.record.get("crash") or e.record.get("invalid") or verdict_of(e).get("reasons")
    return clip(told if isinstance(told, str) else "; ".join(told or [verdict_of(e).get("kind") or ""]), 200)


def render_html(report: str, pictures: dict[str, bytes]) -> str:
    """report.md as one page that needs no other file: the pictures lie in it."""
    text = re.sub(r"^\| ---.*\n", "", html.escape(report), flags=re.M)
    text = re.sub(r"^\| (.*) \|$", lambda row: "<tr><td>" + row[1].replace(" | ", "<td>"), text, flags=re.M)
    text = re.sub(r"((?:^<tr>.*\n)+)", r"<table>\n\1</table>\n", text, flags=re.M)
    text = re.sub(r"^(#+) (.*)$", lambda found: f"<h{len(found[1])}>{found[2]}</h{len(found[1])}>", text, flags=re.M)
    text = re.sub(r"\n\n(?=[^<\n])", "\n\n<p>", text)
    for name, data in pictures.items():
        text = text.replace(f"![]({name})", f"<img src='data:image/png;base64,{base64.b64encode(data).decode()}'>")
    return f"<!doctype html>\n<meta charset=utf-8>\n<title>Report</title>\n<style>{HTML_STYLE}</style>\n{text}"


def diff_file(name: str, before: str | None, after: str) -> str:
    """What `git diff` would print; None stands for no such file. Lines end at newlines alone, as git's do."""
    old, new = ([*io.StringIO(text, newline="\n")] for text in (before or "", after))
    lines = difflib.unified_diff(old, new, "/dev/null" if before is None else f"a/{name}", f"b/{name}")
    told = "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)
    made = "new file mode 100644\n" if before is None else ""
    return told and f"diff --git a/{name} b/{name}\n{made}{told}"


def render_patch(entries: list[Entry], base: Run, best: Run) -> str:
    """All that was kept as one diff that `git apply` takes, below the list of the changes and what each brought."""
    titles = ["run", "val_bpb", "effect", "outside the noise", "idea"]
    told = [f"# {' | '.join(row)}\n" for row in [titles, *render_kept(entries)]]
    before, after = ({"train.py": run.train_py or "", **(run.start.get("modules") or {})} for run in (base, best))
    diffs = [diff_file(name, before.get(name), text) for name, text in after.items()]
    return f"# train.py of {base.name} -> {best.name}: git apply best.patch\n{''.join([*told, *diffs])}"


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
    """An empty figure, 1200 pixels wide. Its title says where `facts`, of a run or of runs, are the demo's."""
    from matplotlib.figure import Figure

    figure = Figure((12, height), dpi=100, layout="constrained")
    title = "demo: " * any(fact.get("demo") for fact in facts) + title
    figure.suptitle(clip(title, 110), x=0.01, ha="left", fontsize=13)
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
    with warnings.catch_warnings():  # a description may hold letters that the font lacks: they become boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 3})
    return buffer.getvalue()


def draw_noisy(axes: Axes, x: np.ndarray, y: np.ndarray, label: str, is_best: bool, count: int = 100) -> None:
    """Every step as a thin line, the means over `count` stretches of x as a thick one; of the best these alone."""
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if not is_best:
        axes.plot(x, y, color=SKY, lw=0.6, alpha=0.6, label="this, each step")
    if len(x) > count:
        which = np.digitize(x, np.linspace(x[0], x[-1], count + 1)[1:-1])
        x, y = ([values[which == i].mean() for i in np.unique(which)] for values in (x, y))
    axes.plot(x, y, color=ORANGE if is_best else BLUE, lw=1.6, label=label)


def draw_loss(run: Run, curves: dict[str, Curve | None], windows: list[dict]) -> Figure | None:
    """Training loss by tokens; below it the paired difference to the best, where there is one."""
    known = [(key, curve) for key in ("best", "this") if (curve := curves[key])]
    if curves["this"] is None:
        return None
    figure = new_figure(f"{run.name}: training loss", run.start)
    grid = figure.add_gridspec(2, 1, height_ratios=(5, 3))
    axes = figure.add_subplot(grid[0] if windows else grid[:])
    for key, curve in known:
        draw_noisy(axes, curve.tokens_m, curve.loss, f"{key}: {curve.name}", key == "best")
    # The start would flatten the rest, and so would single spikes; what is low is never cut off.
    late = [curve.loss[curve.tokens_m > DWARFING * curve.tokens_m[-1]] for _, curve in known]
    low, high = min(loss.min() for loss in late), max(np.percentile(loss, 99.5) for loss in late)
    axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3)
    dress(axes, "nats per token", "tokens, millions")
    if windows:
        draw_paired(figure.add_subplot(grid[1], sharex=axes), windows)
    return figure


def draw_paired(axes: Axes, windows: list[dict]) -> None:
    """Difference on the same text by windows, with two standard errors; hollow where the text had been seen before."""
    for is_repeat, label in ((False, "new text"), (True, "text seen before: no measure of learning")):
        some = [w for w in windows if bool(w.get("is_repeat")) == is_repeat]
        start, end, nats, errors = (numbers(w[key] for w in some) for key in ("from_m", "to_m", "nats", "se"))
        if some:
            axes.errorbar((start + end) / 2, nats, 2 * errors, (end - start) / 2, fmt="o", color=BLUE,
                          mfc="white" if is_repeat else BLUE, label=label)
    axes.axhline(0, color="black", lw=0.8)
    dress(axes, "this minus best on the same text, nats ± 2 standard errors; below zero is better", "tokens, millions")


def draw_schedule_and_machine(run: Run, best: Run | None) -> Figure | None:
    """Schedules, learning rates, gradient norm and step time. None for a run without steps to draw."""
    if len(run.records) < 3:
        return None
    figure = new_figure(f"{run.name}: schedules and machine", run.start)
    schedules, rates, gradient, steps = figure.subplots(2, 2).flat
    for key in ("train/lr_multiplier", "train/muon_momentum", "train/weight_decay"):
        schedules.plot(percent(run), run.series(key), label=key.removeprefix("train/"))
    groups: dict[bytes, list[str]] = {}  # several of the same rate are one line with all their names
    for key in sorted({k for r in run.records[:3] for k in r if k.startswith("lr/")}):
        groups.setdefault(run.series(key).tobytes(), []).append(key.removeprefix("lr/"))
    for names in groups.values():
        rates.plot(percent(run), run.series(f"lr/{names[0]}"), label=clip(", ".join(names), 60))
    both = [r for r in (best, run) if r and r.step_ms is not None]
    for r in both:
        draw_noisy(gradient, percent(r), r.series("train/grad_norm"), r.name, r is best)
        steps_ms = r.series("perf/step_time_ms")
        label = f"{r.name}: median {r.step_ms:.1f}, slowest {np.nanmax(steps_ms):.0f}"
        draw_noisy(steps, percent(r), steps_ms, label, r is best)
    if both:  # a stall of ten seconds must not flatten the rest: the legend tells it
        steps.set_ylim(0.8 * min(r.step_ms for r in both), 1.4 * max(r.step_ms for r in both))
    xlabel = "progress, % of the budget"
    dress(schedules, "schedules", xlabel)
    dress(rates, "resolved learning rates", xlabel, "log")
    dress(gradient, "gradient norm", xlabel, "log")
    dress(steps, "step time, ms", xlabel)
    return figure


def percent(run: Run) -> np.ndarray:
    """Share of the budget before each step; where a program does not log it, the share of its steps."""
    progress = 100 * run.series("train/progress")
    return progress if np.isfinite(progress).all() else np.linspace(0, 100, len(progress))


def draw_layers(run: Run, best: Run | None) -> Figure | None:
    """Three heat maps, over the run and beside the best's end, and the scalars. None without layer statistics."""
    kinds = (
        ("output RMS, log10", "layers/names", lambda r: log10_of(named_values(r, "layers/names", "layers/rms"))),
        ("update / weight, log10", "params/names", lambda r: log10_of(update_ratios(r))),
        ("share of inputs near zero", "layers/names", lambda r: named_values(r, "layers/names", "layers/input_zeros")),
    )
    mine = [[look(r) for r in run.records_with(names)] for _, names, look in kinds]
    theirs = [[look(r) for r in best.records_with(names)[-1:]] if best else [] for _, names, look in kinds]
    num_rows = max(len(columns[-1]) if columns else 0 for columns in mine)
    if not num_rows:
        return None
    figure = new_figure(f"{run.name}: layers", run.start, height=4.5 + 0.125 * min(num_rows, MOST_ROWS))
    grid = figure.add_gridspec(2, 3, height_ratios=(3, 1))
    for i, (title, *_) in enumerate(kinds):
        draw_heat(figure.add_subplot(grid[0, i]), mine[i], theirs[i], len(run.records), title)
    axes = figure.add_subplot(grid[1, :])
    for i, (name, logged) in enumerate(run.scalars.items()):
        axes.plot(numbers(logged[-1]), color=f"C{i}", label=name)
        if best and name in best.scalars:
            axes.plot(numbers(best.scalars[name][-1]), color=f"C{i}", ls="--", label=f"{name} of the best")
    dress(axes, "scalars at the end", "layer")
    return figure


def log10_of(values: dict[str, float]) -> dict[str, float]:
    return {name: math.log10(v) for name, v in values.items() if v > 0}


def draw_heat(axes: Axes, columns: list[dict], theirs: list[dict], num_steps: int, title: str) -> None:
    """Names down, time across, the value as colour; at the right the best's last column in the same colours.
    `columns` holds the values by name at each moment."""
    names = list(dict.fromkeys(name for column in columns for name in column))
    if names:
        values = np.array([[column.get(name, math.nan) for column in (*columns, *theirs)] for name in names])
        low, high = np.nanpercentile(values, [1, 99])
        look = {"aspect": "auto", "vmin": low, "vmax": max(high, low + 1e-3), "interpolation": "nearest"}
        rows = (len(names) - 0.5, -0.5)
        image = axes.imshow(values[:, : len(columns)], extent=(0, num_steps, *rows), **look)
        if theirs:
            axes.imshow(values[:, len(columns) :], extent=(1.04 * num_steps, 1.12 * num_steps, *rows), **look)
            axes.text(1.12 * num_steps, -0.8, "best", fontsize=8, ha="right")
        axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=50).ax.tick_params(labelsize=8)
    dress(axes, title, "step; grey: zero or not finite")
    axes.set_xlim(0, (1.12 if theirs else 1.0) * num_steps)
    axes.set_facecolor("0.85")
    axes.grid(visible=False)
    axes.set_yticks(range(len(names)), [clip(name.removesuffix(".weight"), 28) for name in names], fontsize=6.5)
    if len(names) > MOST_ROWS:
        axes.set_yticks([])


def mark_of(e: Entry) -> str:
    """Which of MARKS a run is shown as: what its verdict calls it, then what was decided."""
    kind = verdict_of(e).get("kind")
    if kind in ("hampered", "stopped"):
        return kind
    if not e.is_valid:
        return "crashed" if e.status == "crash" else "invalid"
    if e.status == "keep":
        return "kept, unproven" if kind == "unproven" else "kept"
    return "discarded" if e.status == "discard" else "pending"


def draw_progress(entries: list[Entry]) -> Figure:
    """Scores in the order of filing, what the best was at each time, and by number the steps that brought most."""
    figure = new_figure("val_bpb over experiments, lower is better", *(e.record for e in entries))
    axes, marks = figure.subplots(), [(i, e, mark_of(e)) for i, e in enumerate(entries, 1)]
    number_of, lineage = {e.name: i for i, e, _ in marks}, compute_history(entries)["lineage"]
    x, y = [number_of[name] for name, _, _ in lineage], np.minimum.accumulate([mean for _, mean, _ in lineage])
    scores = [e.val_bpb for _, e, mark in marks if mark in SCORED] or [1.0]
    kept = [e.val_bpb for _, e, mark in marks if mark.startswith("kept")]
    low, high = min(scores), max([np.percentile(scores, 90), *kept])
    room = max(high - low, 0.004 * high)  # one bad run must not flatten the descent, nor one run fill the picture
    for label, (marker, color, inside) in MARKS.items():
        own = [(i, e.val_bpb) for i, e, mark in marks if mark == label]
        points = [(i, val if label in SCORED and val <= high else high + 0.13 * room) for i, val in own]
        if points:
            axes.plot(*zip(*points, strict=True), marker, ms=8 if "kept" in label else 5, color=color, mfc=inside,
                      zorder=3, label=f"{label} ({len(points)})")
    axes.axhline(high + 0.06 * room, color=GREY, lw=0.8, ls=":", label="above: off the scale, or no score")
    side = max(0.6, 0.02 * len(entries))
    if lineage:
        axes.axhline(y[0], color="black", lw=0.8, ls="--", label=f"baseline, {y[0]:.4f}")
        axes.step([*x, len(entries) + side], [*y, y[-1]], where="post", color=GREEN, lw=1.8, label=f"best, {y[-1]:.4f}")
        label_steps(axes, x, y, [idea_of(description) for _, _, description in lineage])
    dress(axes, "", "experiment")
    axes.set_xlim(1 - side, len(entries) + side)
    axes.set_ylim(low - 0.1 * room, high + 0.2 * room)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def label_steps(axes: Axes, x: list[int], y: np.ndarray, ideas: list[str], limit: int = 8) -> None:
    """A number at each of the largest steps, and in the margin what they were: no text is in another's way."""
    gains, told = np.diff(y, prepend=y[0]), []
    for k, i in enumerate(sorted(i for i in np.argsort(gains)[:limit] if gains[i] < 0), 1):
        axes.annotate(str(k), (x[i], y[i]), (4, 5), textcoords="offset points", fontsize=10, weight="bold")
        told.append(textwrap.fill(f"{k}  {gains[i]:+.4f}  {clip(ideas[i], 80)}", 40, subsequent_indent="    "))
    axes.text(1.02, 0.0, "\n".join(told), transform=axes.transAxes, fontsize=8.5, parse_math=False)


def write_pictures(run: Run, best: Run | None, curves: dict[str, Curve | None],
                   paired: dict | None) -> tuple[list[str], dict[str, str]]:
    """Names of the pictures made, and why one was not. A surprise in the metrics costs its picture, not the night."""
    makers = {
        "loss_curve.png": lambda: draw_loss(run, curves, (paired or {}).get("windows") or []),
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


@dataclass(frozen=True)
class Outputs:
    """One run found in a folder, not necessarily filed yet: which files are its own, and what to say about them."""

    run: Run
    identity: str
    files: dict[str, Path]
    notes: tuple[str, ...] = ()

    @property
    def written_unix(self) -> list[float]:
        return [path.stat().st_mtime for path in self.files.values()]


def outputs_of(folder: Path, files: set[str], *notes: str) -> Outputs:
    run = load_folder(folder, files=files)
    present = {f: folder / f for f in sorted(files) if (folder / f).exists()}
    return Outputs(run, identity_of(run), present, notes)


def find_outputs(folder: Path) -> list[Outputs]:
    """The runs whose outputs lie in the folder, oldest first: none, one, or two. Two where the log is not of the run
    that left the other files: a start that died before it could put those away (a syntax error), or an old log because
    the newer run's output went elsewhere."""
    log, start = read_text(folder / LOG) or "", load_folder(folder, files={START}).start
    if not start:
        return find_foreign_outputs(folder, log)
    run_id, notes, files = start.get("run_id"), [], {START, METRICS, EVAL, SUMMARY}
    with contextlib.suppress(ValueError):
        owner = (read_json(folder / SUMMARY) or {}).get("run_id")
        if owner not in (None, run_id):
            files -= {SUMMARY, EVAL}
            notes.append(f"{SUMMARY} is of run {owner}, not of {run_id}: left out")
    if not log.strip() or log_run_id(log) == run_id:
        return [outputs_of(folder, files | {LOG}, *notes)]
    others = outputs_of(folder, files, *notes, f"{LOG} is of another run: left out")
    alone = outputs_of(folder, {LOG}, "train.py ended before it could start a run: only the log is its own")
    return sorted([others, alone], key=lambda outputs: max(outputs.written_unix))


def find_foreign_outputs(folder: Path, log: str) -> list[Outputs]:
    """Outputs of a program that writes no run_start.json. Its log is the newest; a summary the log does not confirm is
    an older run's."""
    files, notes = {LOG, METRICS, EVAL, SUMMARY}, []
    summary = load_folder(folder, files={SUMMARY}).summary
    scored = number(parse_closing_block(log).get("val_bpb"))
    if summary and log.strip() and (scored is None or abs(scored - (number(summary.get("val_bpb")) or 0)) > 2e-6):
        written, metrics = (folder / SUMMARY).stat().st_mtime, folder / METRICS
        files = {LOG, METRICS} if metrics.exists() and metrics.stat().st_mtime > written else {LOG}
        notes.append(f"{SUMMARY} is not of the run that wrote {LOG}: left out")
    outputs = outputs_of(folder, files, *notes)
    return [outputs] if outputs.run.summary or outputs.run.records or log.strip() else []


def is_running(run: Run) -> bool:
    """Whether the process that started this run is still at it. On another host only growing metrics can tell."""
    pid, host = run.start.get("pid"), run.start.get("host")
    if run.summary or run.start.get("ended") or not isinstance(pid, int):
        return False
    if any(line.startswith(("crash:", "error:")) for line in log_lines(run.log)[-3:]):
        return False
    if host and host != socket.gethostname():
        metrics = run.path / METRICS
        return metrics.exists() and time.time() - metrics.stat().st_mtime < 60
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    stat = read_text(Path(f"/proc/{pid}/stat"))
    if stat is None:
        return True
    state, *_ = values = stat.rpartition(")")[2].split()
    if state == "Z":
        return False
    # A number that was given to another process since: it started after the run did.
    booted = re.search(r"^btime (\d+)", read_text(Path("/proc/stat")) or "", re.M)
    started = number(run.start.get("started_unix"))
    if not booted or started is None:
        return True
    return int(booted[1]) + int(values[19]) / os.sysconf("SC_CLK_TCK") < started + 5


@dataclass(frozen=True)
class Origin:
    """Which commit a run was trained from, as far as can be known."""

    name: str  # of its folder, without the number of a replicate
    commit: str | None
    is_dirty: bool | None
    train_py: str | None
    description: str
    notes: tuple[str, ...] = ()


def find_origin(outputs: Outputs, folder: Path) -> Origin:
    """Never HEAD by default: a run that says what it was trained from is believed, one that cannot say is checked
    against the time of HEAD's commit and the state of train.py, and called unknown where that does not settle it."""
    run, notes = outputs.run, []
    head = (git(folder, "rev-parse", "HEAD") or "").strip() or None
    text, is_dirty = run.start.get("train_py"), run.start.get("git_dirty")
    commit = run.start.get("git_commit") or run.summary.get("git_commit")
    commit = commit if isinstance(commit, str) and re.fullmatch(r"[0-9a-f]{7,40}", commit) else None
    if commit is None and not run.start and head:
        commit = head if is_younger_than_head(outputs, folder) else None
        is_dirty = bool(git(folder, "status", "--porcelain", "--untracked-files=no", "--", "train.py"))
        text = read_text(folder / "train.py") if commit else None
        if commit is None:
            notes.append(
                f"nothing says which commit these outputs are of, and HEAD {head[:7]} is younger: not credited"
            )
    if commit is None:
        text = text or (read_text(folder / "train.py") if head is None else None)
        mark = sha256(text)[:7] if text else sha256(outputs.identity)[:7]
        return Origin(f"{'unknown' if head else 'nogit'}-{mark}", None, is_dirty, text, "(no commit)", tuple(notes))
    committed = git(folder, "show", f"{commit}:./train.py")
    if text is None:
        # A program that keeps no copy of itself: what it ran is what lay here when it began, committed or not.
        is_older = (folder / "train.py").exists() and (folder / "train.py").stat().st_mtime < began_unix(outputs)
        text = read_text(folder / "train.py") if is_older else committed
    is_changed = committed is not None and text != committed
    if is_changed or is_dirty:
        what = "train.py" if is_changed else "a tracked file other than train.py"
        notes.append(f"{what} had uncommitted changes: the run is not credited to commit {commit[:7]}")
    if head and not head.startswith(commit) and commit != head:
        notes.append(f"trained from commit {commit[:7]}, HEAD is now {head[:7]}: filed under {commit[:7]}")
    subject = printable(git(folder, "log", "-1", "--format=%s", commit) or "").strip()
    subject = subject or "(commit not in this repository)"
    is_dirty = bool(is_changed or is_dirty)
    description = subject + (" (with uncommitted changes)" if is_dirty else "")
    return Origin(commit[:7] + ("-dirty" if is_dirty else ""), commit, is_dirty, text, description, tuple(notes))


def is_younger_than_head(outputs: Outputs, folder: Path) -> bool:
    """Whether outputs that name no commit were written after HEAD was committed."""
    committed = git(folder, "log", "-1", "--format=%ct")
    return committed is not None and began_unix(outputs) >= int(committed)


def began_unix(outputs: Outputs) -> float:
    """When a run without a start file began, as near as its outputs tell."""
    return min(outputs.written_unix) - (number(outputs.run.summary.get("total_seconds")) or 0.0)


def file_run(outputs: Outputs, archive: Path, folder: Path, book: Book) -> str:
    """Put the run's files and record into the archive, then its row into the books. Returns its name.

    The folder appears whole, under its final name, by one rename; a kill before the row is written is mended by the
    next call. Nothing here needs the statistics to succeed."""
    origin, facts = find_origin(outputs, folder), load_facts(archive)
    now = {script: sha256(p.read_bytes()) if (p := where / f"{script}.py").exists() else None
           for script, where in (("prepare", folder), ("analyze", Path(__file__).parent))}
    run = replace(outputs.run, train_py=origin.train_py)
    began = {"analyze_sha256": now["analyze"], "data_fingerprint": data_fingerprint(run),
             "prepare_sha256": run.start.get("prepare_sha256") or run.summary.get("prepare_sha256") or now["prepare"],
             "created_unix": time.time()}
    if any(facts[key] is None and value for key, value in began.items()):
        facts |= {key: value for key, value in began.items() if facts[key] is None}
        write_json(archive / FACTS, facts)
    context = facts | {"commit": origin.commit, "is_dirty": origin.is_dirty, "started_unix": min(outputs.written_unix),
                       "prepare_now": now["prepare"], "analyze_now": now["analyze"],
                       "notes": [*outputs.notes, *origin.notes]}
    taken = {p.name for p in archive.iterdir()} | {row.name for row in book.rows}
    name = next(n for i in range(1, 10**6) if (n := origin.name + (f".{i}" if i > 1 else "")) not in taken)
    record = compute_record(run, context) | {
        "identity": outputs.identity, "name": name, "description": origin.description,
        "folder": str(outputs.run.path)}  # where it was trained, or put away: not always where it is filed from
    staging = archive / f".tmp-{os.getpid()}" / name  # two levels down, where train.py does not take it for archived
    staging.mkdir(parents=True)
    for file, path in outputs.files.items():
        shutil.copy2(path, staging / file)
    if origin.train_py is not None:
        write_atomic(staging / "train.py", origin.train_py)
    write_json(staging / STATS, {"record": record})
    os.rename(staging, archive / name)
    staging.parent.rmdir()
    book_run(archive, name, record)
    return name


def book_run(archive: Path, name: str, record: dict) -> None:
    """Append the row of a filed run and remember that it was given one."""
    status = "crash" if not record["is_finished"] else "invalid" if record["invalid"] else "pending"
    line = format_row(name, record, status, record.get("description") or "")
    save_rows(archive, [*load_rows(archive), parse_row(line)])
    facts = load_facts(archive)
    write_json(archive / FACTS, facts | {"booked": [*facts["booked"], name]})


def repair_books(archive: Path, book: Book) -> list[str]:
    """Rows for runs that were filed by a call that was killed before it could write them; records that were lost."""
    for name in [e.name for e in book.entries if read_stats(archive / e.name)[0] is None]:
        write_json(archive / name / STATS, {"record": load_record(archive / name)})
    for name in book.unbooked:
        book_run(archive, name, load_record(archive / name))
    return [f"{name} was filed but had no row: added" for name in book.unbooked]


def file_unfiled(archive: Path, folder: Path) -> list[str]:
    """File the runs that a later start put away before they were analyzed, by time of start. Says what was done."""
    told, found = [], []
    for path in (archive / "unfiled").glob("*"):
        run = load_folder(path)
        if not (run.start or run.summary or run.records):
            told.append(f"unfiled/{path.name} holds no readable run: left there")
        elif not is_running(run):
            found.append((number(run.start.get("started_unix")) or 0.0, path.name, path, run))
    for _, _, path, run in sorted(found, key=lambda item: item[:2]):
        book, outputs = load_book(archive), outputs_of(path, {START, METRICS, EVAL, SUMMARY})
        log = read_text(folder / LOG)
        if log and log_run_id(log) == run.start.get("run_id"):
            outputs = replace(outputs, run=replace(run, log=log), files=outputs.files | {LOG: folder / LOG})
        else:
            outputs = replace(
                outputs, notes=("the next run was started before this one was analyzed: its log is lost",)
            )
        if name := book.named(outputs.identity):
            told.append(f"unfiled run {path.name} was filed already as {name}")
        elif environment_failure(outputs.run) or run.start.get("run_id") in book.facts["not_experiments"]:
            told.append(f"unfiled run {path.name} failed over its environment: not an experiment, removed")
        else:
            name = file_run(outputs, archive, folder, book)
            told.append(f"unfiled run {path.name} filed as {name}")
        shutil.rmtree(path)
    return told


# ---------------------------------------------------------------------------------------------------------------------
# Write: the pages of a run and of the archive
# ---------------------------------------------------------------------------------------------------------------------


def write_run_pages(archive: Path, name: str) -> None:
    """Statistics, diff, pictures and analysis of one archived run."""
    book = load_book(archive)
    this = next((e for e in book.entries if e.name == name), None)
    if this is None:  # its row was removed by hand
        return
    before = book.entries[: book.entries.index(this)]
    run = load_folder(archive / name, name)
    best = compute_best(before)
    previous = next(
        (e.name for e in reversed(before) if e.val_bpb is not None and (not best or e.name != best.name)), None
    )
    best_run, previous_run = (
        load_folder(archive / n, n) if n else None for n in (best.name if best else None, previous)
    )
    curves = compute_curves(run, best_run, previous_run)
    stats = compute_stats(run, this, [*before, this], best_run, curves)
    diff = diff_lines(best_run.train_py, run.train_py, best_run.name) if best_run else []
    write_atomic(archive / name / "train.diff", "".join(line if line.endswith("\n") else line + "\n" for line in diff))
    pictures, failed = write_pictures(run, best_run, curves, stats.get("paired"))
    stats["failed"] |= failed
    stats["record"]["name"] = name
    write_analysis(archive / name, render_analysis(stats, pictures))
    write_json(archive / name / STATS, stats)  # last: a run whose statistics stand has all its pages


def write_archive_pages(archive: Path, is_stale: bool = True) -> None:
    """What depends on all runs: Current Best in insights.md, and progress.png and report.md if they are stale."""
    if not (archive / RESULTS).exists():
        return
    book = load_book(archive)
    old = read_text(archive / INSIGHTS)
    new = replace_best_section(old, render_current_best(book.entries))
    if new != old:
        write_atomic(archive / INSIGHTS, new)
    if not is_stale:
        return
    write_morning(archive, book)


def write_morning(archive: Path, book: Book) -> None:
    """progress.png, best.patch, report.html and, last, report.md: where it is new, all of them are."""
    entries, best = book.entries, compute_best(book.entries)
    pictures = {"progress.png": png(draw_progress(entries))}
    write_atomic(archive / "progress.png", pictures["progress.png"])
    for picture in ("loss_curve.png", "layers.png", "schedule_and_machine.png"):
        if best and (archive / best.name / picture).exists():
            pictures[f"{best.name}/{picture}"] = (archive / best.name / picture).read_bytes()
    if lineage := compute_history(entries)["lineage"]:
        base, kept = (load_folder(archive / name, name) for name in (lineage[0][0], best.name))
        write_atomic(archive / "best.patch", render_patch(entries, base, kept))
    report = render_report(book, archive, [*pictures][1:])
    write_atomic(archive / "report.html", render_html(report, pictures))
    write_atomic(archive / "report.md", report)


def are_archive_pages_stale(archive: Path) -> bool:
    books, report = archive / RESULTS, archive / "report.md"  # the report is written last
    if not books.exists():
        return False
    return not report.exists() or report.stat().st_mtime_ns < books.stat().st_mtime_ns


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def describe_outputs(folder: Path, book: Book) -> str:
    """One line on the newest run whose outputs lie in the folder."""
    outputs = find_outputs(folder)
    if not outputs:
        return "no run's outputs"
    newest = outputs[-1]
    run_id = newest.run.start.get("run_id") or "without an id"
    if name := book.named(newest.identity):
        return f"run {name}, filed"
    if is_running(newest.run):
        return f"run {run_id} is in progress, {len(newest.run.records)} steps so far"
    if failure := environment_failure(newest.run):
        return f"run {run_id} failed over its environment: {clip(failure, 150)}"
    return f"run {run_id} is not filed yet: `uv run analyze.py`"


def command_file(archive: Path, folder: Path) -> int:
    """File whatever is not filed yet and write the pages. Returns the exit status."""
    with locked(archive):
        told = repair_books(archive, load_book(archive)) + file_unfiled(archive, folder)
        outputs, name, is_new = find_outputs(folder), None, False
        if outputs and is_running(outputs[-1].run):
            finish_pages(archive, told)
            raise AnalyzeError(f"run {outputs[-1].run.start.get('run_id')} is still in progress (process "
                               f"{outputs[-1].run.start.get('pid')}): wait for it to end, then call this again")
        for found in outputs:
            book = load_book(archive)
            name, is_new = book.named(found.identity), False
            if name is None and not environment_failure(found.run):
                name, is_new = file_run(found, archive, folder, book), True
        finish_pages(archive, told)
        if not outputs:
            if told:
                return 0
            raise AnalyzeError(f"no run's outputs in {folder}: run `uv run train.py > run.log 2>&1` there first")
        if name is None:
            return report_environment(archive, outputs[-1])
        print_verdict(archive, name, is_new)
    return 0


def finish_pages(archive: Path, told: list[str]) -> None:
    """Write what is missing: the pages of runs just filed or whose analysis was killed, then those of the archive."""
    for line in told:
        print(line)
    for e in load_book(archive).entries:
        if not is_run_complete(archive / e.name):
            write_run_pages(archive, e.name)
    write_archive_pages(archive, are_archive_pages_stale(archive))


def report_environment(archive: Path, outputs: Outputs) -> int:
    """Say what is broken; remember the run, so that it is not taken for a crash once its log is gone."""
    facts, run_id = load_facts(archive), outputs.run.start.get("run_id")
    if run_id and run_id not in facts["not_experiments"]:
        write_json(archive / FACTS, facts | {"not_experiments": [*facts["not_experiments"], run_id]})
    said = environment_failure(outputs.run).removeprefix("error:").strip()
    print(f"error: the environment failed, not the experiment; nothing was filed. {said}", file=sys.stderr)
    return 2


def print_verdict(archive: Path, name: str, is_new: bool) -> None:
    if not is_new:
        print(f"{name} is filed already: nothing changed")
    page = read_text(archive / name / ANALYSIS) or ""
    verdict = page.partition("## Verdict\n")[2].partition("\n\n")[0]
    print(f"run {name}\n{verdict}\nanalysis: {archive / name / ANALYSIS}")


def decided_run(name: str | None, archive: Path, folder: Path, book: Book) -> Entry:
    """The run a decision is about: the one named, else the newest whose outputs lie here, else the only one
    pending that was trained here. Never another folder's in a shared archive: its agent has yet to decide."""
    names = [e.name for e in book.entries]
    if name is not None:
        return book.entry(resolve_name(name, names))
    outputs = find_outputs(folder)
    if outputs:
        filed = book.named(outputs[-1].identity)
        if filed is None:
            raise AnalyzeError(f"{describe_outputs(folder, book)}; or name the run you mean")
        if filed not in names:
            raise AnalyzeError(f"the row of {filed} was removed from {RESULTS}: name the run you mean")
        return book.entry(filed)
    pending = {e.name: e.record.get("folder") for e in book.entries if e.status == "pending"}
    mine = [n for n, trained_in in pending.items() if trained_in == str(folder)]
    if len(mine) != 1:
        listed = ", ".join(f"{n} (trained in {where or 'an unknown folder'})" for n, where in [*pending.items()][-5:])
        raise AnalyzeError(f"no run's outputs in {folder}, and {len(mine)} pending runs were trained there; pending: "
                           f"{listed or 'none'}; name the run you mean: `uv run analyze.py keep RUN` or `discard RUN`")
    return book.entry(mine[0])


def set_status(archive: Path, book: Book, name: str, status: str) -> None:
    rows = []
    for row in book.rows:
        if row.name == name and row.problem is None and row.status != status:
            cells = row.line.split("\t", 4)
            cells[3] = status
            row = parse_row("\t".join(cells))
        rows.append(row)
    save_rows(archive, rows)


def command_keep(name: str | None, archive: Path, folder: Path) -> None:
    with locked(archive):
        repair_books(archive, load_book(archive))
        book = load_book(archive)
        this = decided_run(name, archive, folder, book)
        if not this.is_valid:
            why = "it crashed" if this.status == "crash" else "; ".join(this.record.get("invalid") or ["it is invalid"])
            raise AnalyzeError(f"{this.name} cannot be kept: {why}")
        verdict = compute_verdict(this, book.entries)
        set_status(archive, book, this.name, "keep")
        write_archive_pages(archive)
        best = compute_best(load_book(archive).entries)
    print(f"{this.name} kept; the best is {best.name} at {best.mean:.6f} ({len(best.names)} run(s))")
    if verdict["kind"] == "within noise":
        print(f"mind: {verdict['difference']:+.6f} bpb is inside the noise (sigma {verdict['noise']['sigma']:.6f}): "
              "run it again before building on it")
    elif verdict["kind"] == "not better":
        print(f"mind: it is worse than {verdict['best']} by {verdict['difference']:.6f} bpb")


def command_discard(name: str | None, archive: Path, folder: Path) -> None:
    """Set the status and go back to the best's train.py. Refuses, with nothing changed, if a text would be lost."""
    with locked(archive):
        repair_books(archive, load_book(archive))
        book = load_book(archive)
        this = decided_run(name, archive, folder, book)
        left = [replace(e, status="discard") if e.name == this.name else e for e in book.entries]
        best = compute_best(left)
        check_nothing_is_lost(archive, folder, book)
        if this.is_valid:
            set_status(archive, book, this.name, "discard")
        write_archive_pages(archive)
        status = "discarded" if this.is_valid else f"stays {this.status}"
        print(f"{this.name} {status}; {restore_best(this, best, archive, folder)}")


def check_nothing_is_lost(archive: Path, folder: Path, book: Book) -> None:
    """AnalyzeError if train.py, here or in git's index, holds text that is neither committed nor archived."""
    texts = {read_text(folder / "train.py"), git(folder, "show", ":./train.py")}
    texts -= {None, git(folder, "show", "HEAD:./train.py")}
    if {sha256(text) for text in texts} - {e.record.get("train_sha256") for e in book.entries}:
        raise AnalyzeError("train.py has changes that are neither committed nor archived, and discarding would lose "
                           "them: commit them (git commit train.py) or undo them (git checkout train.py)")


def restore_best(this: Entry, best: Best | None, archive: Path, folder: Path) -> str:
    """Bring back and commit the best's train.py, and no other file. Says what was done; other changes stay."""
    if best is None or not best.is_kept:
        return "no run is kept yet, train.py is left as it is"
    wanted, path = read_text(archive / best.name / "train.py"), folder / "train.py"
    if wanted is None:
        raise AnalyzeError(f"the archive has no train.py of the best run {best.name}: restore it by hand")
    text, committed = read_text(path), git(folder, "show", "HEAD:./train.py")
    if text == wanted and committed in (wanted, None):
        return f"train.py is that of the best, {best.name}: nothing to commit"
    mine = read_text(archive / this.name / "train.py")
    if text not in (wanted, mine, None):
        return "train.py has moved on since that run: left as it is"
    if text != wanted:
        mode = path.stat().st_mode if path.exists() else None
        write_atomic(path, wanted)
        if mode:
            path.chmod(mode)
    if git(folder, "rev-parse", "HEAD") is None:
        return f"train.py is back to that of the best, {best.name} (no git: not committed)"
    if wanted != committed:
        # No hooks and no signing: the text was committed before, and nobody is there to answer a prompt.
        message = f"Back to the best, {best.name}, after {this.name}"
        done = run_git(folder, "commit", "--quiet", "--no-verify", "--no-gpg-sign", "-m", message, "--", "train.py")
        if done.returncode:
            said = (done.stderr + done.stdout).decode(errors="replace").strip().replace("\n", " ")
            raise AnalyzeError(
                f"train.py is back to that of {best.name} but git would not commit it: {clip(said, 300)}"
            )
    return f"train.py is back to that of the best, {best.name}" + (", and committed" if wanted != committed else "")


def command_status(archive: Path, folder: Path, is_json: bool) -> None:
    status = compute_status(archive, folder)
    print(json.dumps(plain(status), indent=1) if is_json else render_status(status), end="\n" if is_json else "")


def command_compare(names: list[str], archive: Path) -> None:
    runs = [load_run(name, archive) for name in names]
    print(render_compare(runs, load_book(archive).entries), end="")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="File and analyze the run of this folder, or one of the commands below."
    )
    commands = parser.add_subparsers(dest="command")
    for name, text in (("keep", "keep a run"), ("discard", "discard a run and go back to the best train.py")):
        commands.add_parser(name, help=text).add_argument(
            "run", nargs="?", help="as in results.tsv; default: the run here"
        )
    commands.add_parser("status", help="where the search stands").add_argument("--json", action="store_true")
    commands.add_parser("compare", help="archived runs side by side").add_argument("runs", nargs="+", metavar="run")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given, archive, folder = parse_arguments(arguments), archive_dir(), Path.cwd()
    try:
        if given.command == "keep":
            command_keep(given.run, archive, folder)
        elif given.command == "discard":
            command_discard(given.run, archive, folder)
        elif given.command == "status":
            command_status(archive, folder, given.json)
        elif given.command == "compare":
            command_compare(given.runs, archive)
        else:
            return command_file(archive, folder)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `status | head` ends quietly, as any filter does
    sys.exit(main())
