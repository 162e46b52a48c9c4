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
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from statistics import NormalDist
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
    r"|- its change: [^\n]*|- noise between (?:identical runs|seeds of one program): [^\n]*)\r?(?:\n|\Z)",
    re.M,
)
PAGE_LINES, PAGE_BYTES = 60, 5000

# Public logs of this experiment on H100 and H200 show 0.0005 to 0.0014 bpb between seeds in runs of five minutes.
PRIOR_SIGMA = 0.001
PRIOR_WEIGHT = 2
KEEP_ERRORS, KEEP_ERRORS_WITH_CODE, CLAIM_ERRORS = 0.5, 1.0, 2.0  # standard errors; tests/bench_nights.py
RERUN_EVERY = 15  # runs, after which the best is run again: the lowest of many noisy scores reads too low
SMOOTHING = 0.9
DWARFING = 0.12  # of the budget: what pictures leave off the scale, because it would flatten the rest

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

    @property
    def val_bpb(self) -> float | None:
        """The score; None for a crash, whatever its row says."""
        return None if self.status == "crash" else number(self.record.get("val_bpb"))

    @property
    def is_valid(self) -> bool:
        """Whether the score may be compared: finished, nothing wrong with it, and not called invalid by hand."""
        flaws = self.record.get("invalid") or self.record.get("hampered") or self.status in ("crash", "invalid")
        return self.val_bpb is not None and not flaws

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
        entries.append(Entry(row.name, row.status, row.description, records[row.name]))
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
        "pace": compute_pace(run),
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
    """Why a run without a summary ended: `reason`, the one line of the exception, the last frames in the program's own
    files, known `cause` and `help`, last step and loss."""
    lines = log_lines(run.log)
    said = next((line for line in reversed(lines[-3:]) if line.startswith("crash:")), None)
    said = said or (str(run.start["ended"]) if str(run.start.get("ended", "")).startswith("crash:") else None)
    raised = next((x for x in reversed(lines[-60:]) if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", x)), None)
    end = "\n".join(lines[-60:])
    # torch.compile tells what really happened in the middle of an explanation.
    inner = re.findall(r"\bgot (\w*Error\(.*\))", end)
    raised = inner[-1] if inner else raised
    reason = raised if inner else said or raised
    cause = next(((name, help_) for text in (reason, end) if reason
                  for name, signs, help_ in CRASH_CAUSES if re.search(signs, text, re.I)), None)
    is_killed = reason is None
    if is_killed:
        reason = "the log just stops: killed" if lines else "no log was kept"
        cause = ("killed from outside, or out of time",
                 "see whether steps became slow or the machine's own memory ran out, and run it again")
    loss, reason = run.series("train/loss"), reason.removeprefix("crash:").strip()
    return {
        "reason": reason,
        "exception": raised if raised and raised not in reason else None,
        "frames": find_frames(lines, run.start.get("modules") or {}),
        "cause": cause[0] if cause else None,
        "help": cause[1] if cause else None,
        "is_killed": is_killed,
        "last_step": number(run.records[-1].get("step")) if run.records else None,
        "last_loss": number(loss[-1]) if len(loss) else None,
        "elapsed_s": compute_elapsed(run),
    }


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
# point sums. What is decided: keep or not (KEEP_ERRORS), and what is claimed: a gain, or none yet (CLAIM_ERRORS). The
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
            return CLAIM_ERRORS
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


def compute_flaw(this: Entry, facts: dict) -> dict | None:
    """Kind, advice and reasons of a run whose score says nothing about its program; None for a sound one."""
    record = this.record
    if record.get("stopped"):
        return {"kind": "stopped", "advice": "discard"}
    if this.status == "crash" or this.val_bpb is None:
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
# Compute: the paired curve
#
# Every run sees the same rows in the same order, so two runs' losses can be compared on the same text: its difficulty,
# nine tenths of a loss curve's scatter, drops out of the difference. Windows are cut at token counts at which both
# runs have a boundary (a step's end, or a micro-batch's), so that both means are over exactly the same tokens.
#
# What is left scatters around a slow trend, and neighbouring steps' differences are alike, so the error of a window's
# mean is s / sqrt(n) times the root of 1 + 2 * sum of the autocorrelations. Those are estimated once for all windows,
# after taking a straight line out of each; one window alone is too short. The error is that of the text: how far the
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
    step: np.ndarray
    time_s: np.ndarray
    tokens_m: np.ndarray
    loss: np.ndarray  # nats per token
    smooth: np.ndarray
    lr: np.ndarray  # multiplier, NaN where unknown
    epoch: np.ndarray
    data_sum: np.ndarray  # of all tokens so far, NaN where unknown
    budget_s: float
    bpb_per_nat: float | None
    bounds: np.ndarray = field(repr=False)  # token counts, from 0, at which the sum of the loss is known exactly
    nats: np.ndarray = field(repr=False)  # that sum

    def sum_at(self, tokens: np.ndarray) -> np.ndarray:
        """Nats of all tokens up to these counts; inside a step, split evenly."""
        return np.interp(tokens, self.bounds, self.nats)

    def mean_between(self, first: float, last: float) -> float:
        low, high = self.sum_at(np.array([first, last]))
        return float((high - low) / (last - first))

    def progress_at(self, tokens: float) -> float:
        """Share of the budget used up when this many tokens had been seen."""
        ends = np.append(0.0, 1e6 * self.tokens_m)
        return float(np.interp(tokens, ends, np.append(0.0, self.time_s / self.budget_s)))

    def tokens_at(self, progress: float) -> float:
        shares = np.append(0.0, self.time_s / self.budget_s)
        return float(np.interp(progress, shares, np.append(0.0, 1e6 * self.tokens_m)))

    def at_time(self, fraction: float) -> float:
        """Smoothed loss at a fraction of the budget, NaN where the run had ended. The last step stands in for 100 %."""
        time_s = fraction * self.budget_s
        if fraction == 1.0 and self.time_s[-1] > 0.97 * self.budget_s:
            return float(self.smooth[-1])
        return float(np.interp(time_s, self.time_s, self.smooth, right=math.nan))


def compute_curve(run: Run) -> Curve | None:
    """None where fewer than three steps have a loss. Tokens and clock are derived where they are not logged."""
    loss = run.series("train/loss")
    num_steps = int(np.argmin(np.isfinite(loss))) if not np.isfinite(loss).all() else len(loss)
    if num_steps < 3:
        return None
    time_s, budget_s = compute_clock(run)
    tokens = compute_tokens(run)[:num_steps]
    loss, time_s = loss[:num_steps], np.maximum.accumulate(time_s[:num_steps])
    step, smooth = run.series("step")[:num_steps], run.series("train/loss_smooth")[:num_steps]
    if not np.isfinite(step).all():
        step = np.arange(num_steps, dtype=float)
    if not np.isfinite(smooth).all():
        smooth = smoothed(loss)
    bounds, nats = compute_loss_sums(run.records[:num_steps], loss, tokens)
    return Curve(
        name=run.name,
        step=step,
        time_s=time_s,
        tokens_m=tokens / 1e6,
        loss=loss,
        smooth=smooth,
        lr=run.series("train/lr_multiplier")[:num_steps],
        epoch=run.series("train/epoch")[:num_steps],
        data_sum=run.series("train/data_sum")[:num_steps],
        budget_s=budget_s,
        bpb_per_nat=compute_bpb_per_nat(run, float(smooth[-1])),
        bounds=bounds,
        nats=nats,
    )


def compute_clock(run: Run) -> tuple[np.ndarray, float]:
    """Seconds on the budget clock at the end of each step, and the budget."""
    step_s = np.nan_to_num(run.series("perf/step_time_ms")) / 1e3
    progress, time_s = run.series("train/progress"), run.series("time/training_s")
    budget_s = number(run.summary.get("time_budget"))
    if not np.isfinite(time_s).all():  # the original logs progress at the start of a step instead
        time_s = np.cumsum(step_s)
        if budget_s is not None and np.isfinite(progress).all():
            time_s = np.append(progress[1:], progress[-1]) * budget_s
            time_s[-1] += step_s[-1]
    if budget_s is None:  # a crash, or a run in progress, has no summary; its progress tells the budget
        known = np.flatnonzero(progress > 0.02)
        budget_s = float(time_s[-1])
        if len(known):
            budget_s = float((time_s[known[-1]] - step_s[known[-1]]) / progress[known[-1]])
    return time_s, budget_s


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


def compute_loss_sums(records: list[dict], loss: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token counts with the sum of the loss up to each, at the ends of the steps and of their micro-batches."""
    bounds, nats = [0.0], [0.0]
    for record, step_loss, end in zip(records, loss, tokens, strict=True):
        parts = numbers(record.get("train/micro_losses") or [step_loss])
        if not np.isfinite(parts).all():
            parts = np.array([step_loss])
        span = (end - bounds[-1]) / len(parts)
        if span <= 0:
            continue
        for k, part in enumerate(parts, 1):
            bounds.append(end - (len(parts) - k) * span)
            nats.append(nats[-1] + float(part) * span)
    return np.array(bounds), np.array(nats)


def smoothed(loss: np.ndarray) -> np.ndarray:
    """Exponential average, debiased, as train.py logs it."""
    average, values = 0.0, np.empty_like(loss)
    for i, x in enumerate(loss):
        average = SMOOTHING * average + (1 - SMOOTHING) * x
        values[i] = average / (1 - SMOOTHING ** (i + 1))
    return values


def compute_bpb_per_nat(run: Run, last_loss: float) -> float | None:
    """What one nat per token is in bits per byte: by the evaluation's own counts, else by the final training loss."""
    record, val = run.evaluation or {}, number(run.summary.get("val_bpb"))
    tokens, num_bytes = number(record.get("tokens")), number(record.get("bytes"))
    if tokens and num_bytes:
        return tokens / (math.log(2) * num_bytes)
    return val / last_loss if val and last_loss > 0 else None


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
        "data": (data_fingerprint(this), data_fingerprint(other)),
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
    paired["windows"] = compute_windows(mine, theirs, blocks, kappa)
    paired["summary"] = compute_summary(paired["windows"])
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
    spans = np.diff(blocks)
    best = np.mean([np.diff(c.sum_at(blocks)) for c in theirs], axis=0) / spans
    differences = np.diff(mine.sum_at(blocks)) / spans - best
    middles = (blocks[1:] + blocks[:-1]) / 2
    wanted = np.linspace(0, blocks[-1], NUM_WINDOWS + 1)
    edges = np.unique([int(np.argmin(np.abs(blocks - at))) for at in wanted])
    pieces = [slice(a, b) for a, b in itertools.pairwise(edges)]
    inflation = math.sqrt(inflation_of([detrended(middles[p], differences[p]) for p in pieces]))
    windows = []
    for p in pieces:
        first, last = blocks[p.start], blocks[p.stop]
        difference = float(np.average(differences[p], weights=spans[p]))
        scatter = detrended(middles[p], differences[p])
        error = inflation * float(np.sqrt(scatter @ scatter / max(len(scatter) - 2, 1) / len(scatter)))
        moved = move_to_progress(mine, theirs, first, last)
        at_progress = None if moved is None else kappa * (difference - moved[0])
        windows.append({
            "tokens_m": last / 1e6,
            "progress": mine.progress_at(last),
            "best_progress": float(np.mean([c.progress_at(last) for c in theirs])),
            "difference": kappa * difference,
            "error": kappa * error,
            "at_progress": at_progress,
            "at_progress_error": None if moved is None else kappa * math.hypot(error, moved[1]),
            "is_repeated": is_repeated(mine, last) or any(is_repeated(c, last) for c in theirs),
            "is_cooling": all(is_cooling(c, first) for c in (mine, *theirs)),
        })
    return windows


def detrended(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What a straight line leaves of y."""
    if len(x) < 3:
        return np.zeros(len(x))
    slope, level = np.polyfit(x - x.mean(), y, 1)
    return y - level - slope * (x - x.mean())


def inflation_of(pieces: list[np.ndarray]) -> float:
    """By how much autocorrelation raises the variance of a piece's mean: 1 + 2 * sum of the autocorrelations, weighted
    as Newey and West do (1987), up to a quarter of a piece's length; never below 1."""
    length = min((len(p) for p in pieces), default=0)
    variance = sum(float(p @ p) for p in pieces)
    total = 1.0
    for lag in range(1, length // 4 + 1):
        covariance = sum(float(p[lag:] @ p[:-lag]) for p in pieces)
        total += 2 * (1 - lag / (length // 4 + 1)) * covariance / max(variance, 1e-300)
    return max(total, 1.0)


def move_to_progress(mine: Curve, theirs: list[Curve], first: float, last: float) -> tuple[float, float] | None:
    """Change of the best's loss in nats, and its error, between this window's text and the tokens at which the best was
    as far in its budget as this run is here, along a straight line through the best's losses around there."""
    middle = (first + last) / 2
    progress = mine.progress_at(middle)
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


def is_repeated(curve: Curve, tokens: float) -> bool:
    epoch = np.interp(tokens, 1e6 * curve.tokens_m, curve.epoch)
    return bool(epoch > 1)


def is_cooling(curve: Curve, tokens: float) -> bool:
    """Whether the learning rate is on its way down at this token count."""
    if not np.isfinite(curve.lr).all():
        return False
    rate = float(np.interp(tokens, 1e6 * curve.tokens_m, curve.lr))
    return rate < 0.999 * curve.lr.max() and tokens > 1e6 * curve.tokens_m[int(np.argmax(curve.lr))]


def compute_summary(windows: list[dict]) -> dict | None:
    """Mean of the last windows at equal progress, the nearest the curve comes to the score; None where they are text
    seen before, or too far apart in progress."""
    last = windows[-SUMMARY_WINDOWS:]
    if len(windows) < NUM_WINDOWS or any(w["is_repeated"] or w["at_progress"] is None for w in last):
        return None
    errors = [w["at_progress_error"] for w in last]
    return {
        "difference": float(np.mean([w["at_progress"] for w in last])),
        "standard_error": math.sqrt(sum(e * e for e in errors)) / len(errors),
        "from_progress": windows[-SUMMARY_WINDOWS - 1]["progress"],
    }


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
    is_wider = best is None or mine[1] > best[1]
    return {"training_bpb": mine[0], "gap": mine[1], "best_gap": best[1] if best else None,
            "best_training_bpb": best[0] if best else None, "epochs": epochs,
            "is_overfitting": is_repeated and is_wide, "is_wider": is_wider}


def training_and_gap(run: Run) -> tuple[float, float] | None:
    curve, val = compute_curve(run), number(run.summary.get("val_bpb"))
    if curve is None or val is None or curve.bpb_per_nat is None or not run.evaluation:
        return None
    end = curve.bounds[-1]
    training = curve.bpb_per_nat * curve.mean_between(0.95 * end, end)
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
        "eval_s": number(s.get("eval_seconds")),
        "stats_s": number(s.get("stats_seconds")),
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
    timed = [e for e in earlier if e.record.get("step_ms") and does_same_work(this, e)]
    peers = [e for e in timed if e.is_valid][-NUM_PEERS:]
    machine = own | {"step_ms": step_ms, "usual_ms": None, "ratio": None, "hampered": []}
    witnesses = compute_witnesses(own, peers)
    if step_ms is None or not record.get("is_finished"):
        return machine
    if stalled := compute_stalls(own, record):
        machine["hampered"].append(stalled)
    if not peers:
        return machine
    same = [e for e in timed if e.group == this.group]
    usual_ms = float(np.median([e.record["step_ms"] for e in same or peers if e.is_valid] or [math.nan]))
    if not math.isfinite(usual_ms):
        usual_ms = float(np.median([e.record["step_ms"] for e in peers]))
    machine |= {"usual_ms": usual_ms, "ratio": step_ms / usual_ms}
    slower = step_ms / usual_ms - 1
    is_confirmed = any(abs(e.record["step_ms"] / step_ms - 1) < SLOWER_SAME for e in same)
    bar = SLOWER_SAME if any(e.is_valid for e in same) else SLOWER_ALIKE
    is_slow = slower > bar and (bar == SLOWER_SAME or witnesses or slower > SLOWER_ALONE)
    if is_slow and (witnesses or not is_confirmed):
        what = "this program" if bar == SLOWER_SAME else "the same work"
        told = "; ".join([f"steps took {1 + slower:.2f} times what {what} took before ({step_ms:.1f} ms, usually "
                          f"{usual_ms:.1f})", *witnesses])
        machine["hampered"].append(told)
    return machine


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
            compared = "; the best too" if other == text else f"; best: {other}" if other else "; not in the best"
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
        "hit_rate": (len(lineage) - 1) / (len(groups) - 1) if len(groups) > 1 and lineage else None,
        "hours": hours,
        "first_start_unix": min(starts, default=None),
        "gain": None if gain is None else gain - optimism,
        "optimism": optimism,
        "gain_per_hour": (gain - optimism) / hours if gain is not None and hours > 0 else None,
        "ideas_since_best": since,
        "runs_since_best_was_run": runs_since(alike, best),
        "last": [[e.name, e.val_bpb, e.status, e.description] for e in entries[-5:]],
    } | compute_idle(entries)


def runs_since(entries: list[Entry], best: Best | None) -> int | None:
    if best is None:
        return None
    newest = max(i for i, e in enumerate(entries) if e.name in best.names)
    return len(entries) - 1 - newest


def compute_idle(entries: list[Entry]) -> dict:
    """Seconds in which the GPU had nothing to do before the last run, and its share at work since the first start."""
    started = [e.record for e in entries if e.record.get("started_unix")]
    spans = [(r["started_unix"], r.get("total_s") or 0.0) for r in started]
    if len(spans) < 2:
        return {"idle_s": None, "gpu_share": None}
    (before, took), (began, last_took) = spans[-2:]
    passed = began + last_took - spans[0][0]
    share = sum(s for _, s in spans) / passed if passed > 0 else None
    return {"idle_s": max(began - before - took, 0.0), "gpu_share": share}


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


def compute_near_misses(entries: list[Entry], limit: int = 5) -> list[Entry]:
    """Discarded or pending programs run once whose score is within the noise of the best: they deserve a rerun."""
    entries = comparable(entries)
    best, noise, groups = compute_best(entries), compute_noise(entries), compute_groups(entries)
    if best is None or noise.sigma is None:
        return []
    bar = best.mean + CLAIM_ERRORS * noise.sigma * math.sqrt(1 + 1 / best.num_seeds)
    near = [e for e in entries if e.is_valid and e.status in ("discard", "pending") and e.group != best.group
            and len(groups[e.group]) == 1 and e.val_bpb <= bar]
    return sorted(near, key=lambda e: e.val_bpb)[:limit]


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
        "history": attempt("history", lambda: compute_history(entries)),
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
    return is_same and max(map(abs, differences)) < max(CLAIM_ERRORS * error, ROUNDING)


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


def render_verdict(stats: dict) -> list[str]:
    v = stats["verdict"]
    kind = v["kind"]
    lines = [f"**{kind.upper()}**: {render_comparison(stats)}. {ADVICE[v['advice']]}"]
    lines += [f"- {clip(reason, 220)}" for reason in v["reasons"][:5]]
    lines += render_kind(v)
    if slower := v.get("best_is_slower"):
        lines.append(f"Mind: the machine is faster now: the same work took the best {slower:.0%} longer a step. Run the "
                     "best again (`uv run analyze.py rerun`) before you believe a gain.")
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
        return clip(stats["crash"]["reason"], 200) + f". Best so far: {render_best(v)}"
    if v["kind"] in ("stopped", "invalid", "hampered"):
        return f"val_bpb {show(v['val_bpb'])} is no result. Best so far: {render_best(v)}"
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
        lines.append(f"Another run of the best's program, no new idea: mean of {1 + len(v['replicates'])} runs "
                     f"{v['mean']:.6f}.")
        if v["standard_errors"] is not None and abs(v["standard_errors"]) > 3:
            lines.append("It lies outside the noise of the others: look for a cause before you trust it.")
        if v["dethroned_by"]:
            lines.append("With this mean it is the best no more: that is {} at {:.6f}.".format(*v["dethroned_by"]))
    if v["replicates"] and kind in ("new best", "not better", "unproven"):
        lines.append(f"The difference is that of the mean of {1 + len(v['replicates'])} runs of this program, "
                     f"{v['mean']:.6f} (also {', '.join(v['replicates'][:4])}).")
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
        mark = " *" if w["is_repeated"] else ""
        moved = "-" if w["at_progress"] is None else f"{w['at_progress']:+.5f} ± {w['at_progress_error']:.5f}"
        lines.append(f"| {w['progress']:.0%}{mark} | {w['tokens_m']:.4g} | {w['difference']:+.5f} ± {w['error']:.5f} "
                     f"| {moved} |")
    if summary := paired["summary"]:
        lines.append(f"From {summary['from_progress']:.0%} on, at equal progress: **{summary['difference']:+.5f} ± "
                     f"{summary['standard_error']:.5f} bpb**; another seed moves this as it moves the score.")
    if any(w["is_repeated"] for w in paired["windows"]):
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
        best = "" if gap["best_gap"] is None else f" (best {gap['best_training_bpb']:.4f} and {gap['best_gap']:+.4f})"
        ends = f"{gap['training_bpb']:.4f} bpb, validation {gap['gap']:+.4f} to it"
        lines.append(f"Training loss at the end {ends}{best}.")
        if gap["is_overfitting"]:
            lines.append(f"**Over-fitting**: epoch {gap['epochs']:.0f}, and validation is left behind"
                         f"{', more than by the best' if gap['is_wider'] else ''}: more steps need not help.")
        elif gap["epochs"] and gap["epochs"] > 1:
            lines.append(f"The data were repeated: epoch {gap['epochs']:.0f} at the end.")
    if why:
        lines.append(render_why(why))
    return lines


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
    for what, key in (("This very program", "same_program"), ("This configuration, with other code,", "same_config")):
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
                     f"{m['stalled_s']:.1f} s lost; start-up {show(m['startup_s'], '.0f', ' s')}, evaluation "
                     f"{show(m['eval_s'], '.0f', ' s')}.")
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
        scored = f"{h['gain'] + h['optimism']:.6f} as scored, "
        lines.append(f"Gain since the first kept run: {scored if h['optimism'] else ''}{h['gain']:.6f} bpb"
                     f"{', as the lowest of many noisy scores reads too low' if h['optimism'] else ''}.")
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
    sections.append(("History", render_history(stats["history"]) if stats["history"] else []))
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
        "noise": {"sigma": noise.sigma, "text": describe_noise(noise)},
        "here": describe_outputs(folder, book),
        "pending": [e.name for e in book.entries if e.status == "pending"],
        "unfiled": unfiled + book.unbooked,
        **{key: history[key] for key in ("num_runs", "counts", "last", "ideas_since_best", "gain")},
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
        f"noise: {s['noise']['text']}",
        f"archive: {render_counts(s)}",
        f"this folder: {s['here']}",
        f"pending, decide keep or discard: {', '.join(s['pending'][-10:]) or 'none'}",
        f"queue: {s['queue_length']} idea(s) in {QUEUE}",
        f"budget used: {s['hours_used']:.2f} h in runs"
        + (f", {s['hours_since_first_start']:.1f} h since the first" if s["hours_since_first_start"] else ""),
    ]
    if s["unfiled"]:
        lines.append(f"not filed yet, run `uv run analyze.py`: {', '.join(s['unfiled'][:10])}")
    if s["rerun"]:
        lines.append(f"within noise of the best, run once: {', '.join(s['rerun'])}")
    lines += [f"problem: {p}" for p in s["problems"][:10]]
    lines += ["last runs:"] + [f"  {n}  {show(v)}  {status:8} {clip(d, 70)}" for n, v, status, d in s["last"]]
    return "\n".join(lines) + "\n"


def render_report(book: Book) -> str:
    """The morning page for a person: what was tried, kept, crashed, and what deserves another run."""
    entries = book.entries
    best, noise, h = compute_best(entries), compute_noise(entries), compute_history(entries)
    lines = ["# Report", ""]
    if best:
        e = book.entry(best.name)
        lines.append(f"**Best: {best.mean:.6f}** ({best.name}, {len(best.names)} run(s)"
                     f"{'' if best.is_kept else ', not kept yet'}): {e.description}")
    lines += [
        f"- {render_counts(h)}; {h['hours']:.1f} h; {show(h['ideas_since_best'], '.0f')} idea(s) since the best",
        f"- gain since the first kept run: {show(h['gain'])} bpb, {show(h['gain_per_hour'], '.5f')} per hour; "
        f"hit rate {show(h['hit_rate'], '.0%')}",
        f"- noise between seeds of one program: {describe_noise(noise)}",
        "", "![val_bpb over experiments](progress.png)", "", "## Kept", "",
        "| run | val_bpb (mean) | change | description |", "|---|---|---|---|",
    ]
    before = None
    for name, val, text in h["lineage"]:
        change = "" if before is None else f"{val - before:+.6f}"
        bar = CLAIM_ERRORS * (noise.sigma or 0.0) * 2**0.5
        small = " (within noise)" if before is not None and abs(val - before) < bar else ""
        lines.append(f"| {name} | {val:.6f} | {change}{small} | {text.replace('|', '/')} |")
        before = val
    near = compute_near_misses(entries)
    lines += ["", "## Deserves a rerun", ""]
    lines += [f"- {e.name} {e.val_bpb:.6f} ({e.status}): {e.description}" for e in near] or ["- nothing"]
    if best and len(best.names) == 1:
        lines.append(f"- {best.name}, the best, rests on one run")
    for status, key in (("crash", "crash"), ("invalid", "invalid")):
        failed = [e for e in entries if e.status == status]
        if failed:
            lines += ["", "## Crashed" if status == "crash" else "## Invalid", ""]
            reasons = [(e, e.record.get(key) or "no reason recorded") for e in failed]
            lines += [f"- {e.name} {e.description}: {clip(r if isinstance(r, str) else '; '.join(r), 200)}"
                      for e, r in reasons]
    lines += ["", "## Everything tried", "", "| run | val_bpb | status | description |", "|---|---|---|---|"]
    lines += [f"| {e.name} | {show(e.val_bpb)} | {e.status} | {e.description.replace('|', '/')} |" for e in entries]
    if book.problems:
        lines += ["", "## Problems in the books", "", *(f"- {p}" for p in book.problems)]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

# Okabe and Ito: told apart by colour-blind eyes. This run, best and previous have the same colour everywhere.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999")
COLORS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, "#000000", GREY)


@dataclass(frozen=True)
class Line:
    label: str | None
    x: np.ndarray
    y: np.ndarray
    color: str
    width: float = 1.6
    alpha: float = 1.0


def new_figure(title: str, rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """A figure of 1200 by 750 pixels and its axes as a flat array."""
    from matplotlib.figure import Figure

    figure = Figure((12, 7.5), dpi=100)
    figure.suptitle(clip(title, 110), x=0.06, ha="left", fontsize=13)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    figure.subplots_adjust(left=0.065, right=0.98, top=0.9, bottom=0.075, hspace=0.33, wspace=0.17)
    return figure, axes


def draw(axes: Axes, lines: list[Line], title: str, xlabel: str, *, ylim: tuple[float, float] | None = None,
         log: bool = False, legend: str = "best", empty: str = "not logged") -> None:
    """One panel of curves. Lines without a finite point are left out; a panel without any is called `empty`."""
    lines = [line for line in lines if np.isfinite(line.y).any()]
    for line in lines:
        axes.plot(line.x, line.y, color=line.color, lw=line.width, alpha=line.alpha, label=line.label)
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.set_xlabel(xlabel, fontsize=9.5)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if not lines:
        if empty:
            axes.text(0.5, 0.5, empty, transform=axes.transAxes, ha="center", color=GREY)
            axes.tick_params(labelbottom=False, labelleft=False)
        return
    if log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        steps = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0) if high > 5 * low else range(1, 10)
        axes.yaxis.get_major_locator().set_params(subs=steps, numticks=12)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    if ylim and ylim[0] < ylim[1]:
        axes.set_ylim(*ylim)
    if any(line.label for line in lines):
        axes.legend(fontsize=8.5, frameon=False, loc=legend, ncol=2 if len(lines) > 5 else 1)


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # a description may hold letters that the font lacks: they become boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 3})
    return buffer.getvalue()


def limits(curves: list[Curve]) -> tuple[float, float]:
    """Loss range without the first part of the budget, which would dwarf the rest, nor single spikes."""
    late = [c.smooth[c.time_s > DWARFING * c.budget_s] for c in curves]
    late = np.concatenate([x if len(x) else c.smooth for x, c in zip(late, curves, strict=True)])
    low, high = float(late.min()), float(np.percentile(late, 99.5))
    return low - 0.06 * (high - low) - 1e-3, high + 0.06 * (high - low) + 1e-3


def draw_loss(run: Run, curves: dict[str, Curve | None]) -> bytes | None:
    known = [(key, c, color) for (key, c), color in zip(curves.items(), (BLUE, ORANGE, GREY), strict=True) if c]
    if curves["this"] is None:
        return None
    this, best, ylim = curves["this"], curves["best"], limits([c for _, c, _ in known])
    figure, panels = new_figure(f"{run.name}: training loss, smoothed (nats per token)", 2, 2)
    for panel, axis, label in ((panels[0], "time_s", "training time, s"), (panels[1], "tokens_m", "tokens, millions")):
        raw = [Line(None, getattr(this, axis), this.loss, SKY, 0.6, 0.45)]
        smooth = [Line(f"{key}: {c.name}", getattr(c, axis), c.smooth, color) for key, c, color in reversed(known)]
        draw(panel, raw + smooth, f"by {label.split(',')[0].split()[-1]}", label, ylim=ylim, legend="upper right")
    for panel, axis, label in ((panels[2], "time_s", "training time, s"), (panels[3], "tokens_m", "tokens, millions")):
        lines = []
        if best:
            x = getattr(this, axis)
            other = np.interp(x, getattr(best, axis), best.smooth, right=math.nan)
            lines = [Line(f"this - {best.name}", x, this.smooth - other, BLUE)]
        late = lines[0].y[this.time_s > DWARFING * this.budget_s] if lines else np.array([])
        late = late[np.isfinite(late)]
        reach = 1.3 * float(np.percentile(np.abs(late), 97)) + 1e-3 if len(late) else 0.0
        draw(panel, lines, "difference to the best, below zero is better", label, ylim=(-reach, reach),
             empty="nothing to compare with yet")
        if lines:
            panel.axhline(0, color="black", lw=0.8)
    return png(figure)


def rolling_median(values: np.ndarray, width: int) -> np.ndarray:
    """Centred; the ends are mirrored."""
    half = width // 2
    padded = np.pad(values, half, mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=-1)


def draw_schedule(run: Run, curve: Curve | None, best: Run | None) -> bytes | None:
    if curve is None:
        return None
    x = run.series("train/progress") * 100
    x = x if np.isfinite(x).all() else np.arange(len(run.records), dtype=float)
    xlabel = "progress, % of the budget"
    figure, panels = new_figure(f"{run.name}: schedules, learning rates, gradient norm", 2, 2)
    draw(panels[0], [Line("learning rate, multiplier", x, run.series("train/lr_multiplier"), BLUE),
                     Line("Muon momentum", x, run.series("train/muon_momentum"), ORANGE)], "schedules", xlabel)
    draw(panels[1], [Line(None, x, run.series("train/weight_decay"), GREEN)], "weight decay", xlabel)
    groups: dict[bytes, list[str]] = {}  # several of the same rate are one line with all their names
    for key in sorted({k for r in run.records[:3] for k in r if k.startswith("lr/")}):
        groups.setdefault(run.series(key).tobytes(), []).append(key)
    rates = [(clip(", ".join(k[3:] for k in keys), 60), run.series(keys[0])) for keys in groups.values()]
    draw(panels[2], [Line(names, x, np.where(y > 0, y, math.nan), color)
                     for (names, y), color in zip(rates, COLORS, strict=False)],
         "resolved learning rates", xlabel, log=True)
    lines = []
    for key, r, color in (("best", best, ORANGE), ("this", run, BLUE)):
        norm = r.series("train/grad_norm") if r else np.array([])
        if np.isfinite(norm).any():
            norm = np.where(norm > 0, norm, math.nan)
            progress = 100 * r.series("train/progress")
            lines.append(Line(None, progress, norm, color, 0.5, 0.3))
            lines.append(Line(key, progress, rolling_median(norm, max(5, len(norm) // 50)), color))
    lines.sort(key=lambda line: line.label is not None)  # medians above what they are of
    draw(panels[3], lines, "gradient norm and its running median", xlabel, log=True)
    return png(figure)


def draw_machine(run: Run, best: Run | None) -> bytes | None:
    steps_ms = run.series("perf/step_time_ms")
    if np.isfinite(steps_ms).sum() < 3:
        return None
    figure, panels = new_figure(f"{run.name}: machine", 2, 2)
    pairs = [(key, r, color) for key, r, color in (("best", best, ORANGE), ("this", run, BLUE)) if r]
    for panel, metric, title, scale in ((panels[0], "perf/step_time_ms", "step time, ms", 1.0),
                                        (panels[1], "perf/tokens_per_sec", "thousand tokens per second", 1e-3),
                                        (panels[2], "perf/mfu_percent", "MFU, %", 1.0)):
        lines = [Line(f"{key}: {r.name}", np.nancumsum(r.series("perf/step_time_ms")) / 1e3, r.series(metric) * scale,
                      color, 1.0, 0.85) for key, r, color in pairs]
        values = np.concatenate([line.y[5:] if len(line.y) > 20 else line.y for line in lines])
        values = values[np.isfinite(values)]
        ylim = None
        if len(values):  # a stall of ten seconds must not flatten everything else
            low, high = np.percentile(values, [0.5, 99])
            ylim = (float(low - 0.1 * (high - low) - 0.02 * high), float(high + 0.3 * (high - low) + 0.02 * high))
        draw(panel, lines, title, "training time, s", ylim=ylim)
    for key, r, color in pairs:
        settled = r.series("perf/step_time_ms")[5:]
        settled = settled[np.isfinite(settled)]
        if len(settled) > 1:
            shown = settled[settled <= np.percentile(settled, 99)]
            panels[3].hist(shown, bins=50, histtype="stepfilled", color=color, alpha=0.6,
                           label=f"{key}: median {np.median(settled):.1f} ms")
    draw(panels[3], [], "how often each step time occurred, the slowest 1 % left out", "ms", empty="")
    if panels[3].patches:
        panels[3].legend(fontsize=8.5, frameon=False)
    return png(figure)


def draw_layers(run: Run) -> bytes | None:
    """None where the program logs no layer statistics."""
    with_layers, with_params = run.records_with("layers/names"), run.records_with("params/names")
    if not with_layers and not with_params:
        return None
    figure, panels = new_figure(f"{run.name}: layers", 2, 2)
    figure.subplots_adjust(left=0.13, wspace=0.32)
    last_step = number(run.records[-1].get("step")) or float(len(run.records))
    rms = [named_values(r, "layers/names", "layers/rms") for r in with_layers]
    draw_heat(figure, panels[0], rms, last_step, "output RMS, log10")
    draw_bars(panels[1], with_layers[-1:])
    draw_heat(figure, panels[2], [update_ratios(r) for r in with_params], last_step, "update / weight RMS, log10")
    lines = []
    for (name, logged), color in zip(run.scalars.items(), COLORS, strict=False):
        values = numbers(logged[-1])
        lines.append(Line(name, np.arange(len(values)), values, color))
    draw(panels[3], lines, "scalars at the end, by layer", "layer")
    panels[3].xaxis.get_major_locator().set_params(integer=True)
    return png(figure)


def draw_heat(figure: Figure, axes: Axes, columns: list[dict[str, float]], last_step: float, title: str) -> None:
    """Names down, time across, log10 of the value as colour. `columns` holds the values by name at each moment."""
    names = list(columns[-1]) if columns else []
    values = np.array([[c.get(n, math.nan) for c in columns] for n in names])
    is_known = bool((values > 0).any())
    draw(axes, [], title, "step", empty="" if is_known else "not logged")
    if not is_known:
        return
    axes.grid(visible=False)
    values = np.log10(np.where(values > 0, values, math.nan))
    low, high = np.nanpercentile(values, [1, 99])
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=low, vmax=max(high, low + 1e-3),
                        extent=(0, last_step, len(names) - 0.5, -0.5), interpolation="nearest")
    label_names(axes, names)
    figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05).ax.tick_params(labelsize=8)


def label_names(axes: Axes, names: list[str]) -> None:
    every = math.ceil(len(names) / 24)
    axes.set_yticks(range(0, len(names), every))
    axes.set_yticklabels([clip(n.removesuffix(".weight"), 24) for n in names[::every]], fontsize=7)


def draw_bars(axes: Axes, last: list[dict]) -> None:
    """The last shares of inputs near zero, and of units that are so on every token, one bar a layer."""
    kinds = (("layers/input_zeros", "inputs", SKY), ("layers/dead", "dead units", VERMILION))
    shown = [(values, label, color) for key, label, color in kinds
             for r in last if (values := named_values(r, "layers/names", key))]
    names = list(dict.fromkeys(name for values, _, _ in shown for name in values if values[name] >= 0.01))
    draw(axes, [], "near zero at the end", "fraction", empty="" if names else "nowhere" if shown else "not logged")
    if not names:
        return
    for i, (values, label, color) in enumerate(shown):
        y = np.arange(len(names)) + 0.4 * (i - (len(shown) - 1) / 2)
        axes.barh(y, [values.get(n, 0.0) for n in names], height=0.8 / len(shown), color=color, label=label)
    label_names(axes, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.legend(fontsize=8.5, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncol=2)


def progress_limits(entries: list[Entry], steps: list[float]) -> tuple[float, float]:
    """From below the best to above nine tenths of the scores: one bad run must not flatten the descent."""
    scores = np.array([e.val_bpb for e in entries if e.is_valid])
    low = float(min([*scores, *steps]))
    high = max(float(np.percentile(scores, 90)), max(steps, default=low))
    room = max(high - low, 4 * PRIOR_SIGMA)
    return low - 0.1 * room, high + 0.12 * room


def draw_progress(entries: list[Entry]) -> bytes:
    figure, (axes,) = new_figure("val_bpb over experiments, lower is better", 1, 1)
    scored = [(i, e) for i, e in enumerate(entries, 1) if e.is_valid]
    draw(axes, [], "", "experiment", empty="" if scored else "no valid run yet")
    if not scored:
        return png(figure)
    groups = compute_groups(entries)
    bests: list[tuple[int, float, Entry]] = []
    for i, e in scored:
        mean = mean_bpb(groups[e.group])
        if e.status == "keep" and (not bests or mean < bests[-1][1]):
            bests.append((i, mean, e))
    low, high = progress_limits(entries, [mean for _, mean, _ in bests])
    axes.set_ylim(low, high)
    axes.set_xlim(0.4, max(len(entries), 8) + 0.6)
    kinds = (
        ("discard", "discarded", GREY, "o", 26),
        ("pending", "pending", ORANGE, "D", 34),
        ("keep", "kept", GREEN, "o", 60 if len(entries) <= 150 else 34),
    )
    for status, label, color, marker, size in kinds:
        points = [(i, e.val_bpb) for i, e in scored if e.status == status and e.val_bpb <= high]
        if points:
            axes.scatter(*zip(*points, strict=True), s=size, c=color, marker=marker, zorder=3,
                         label=f"{label} ({len([e for _, e in scored if e.status == status])})",
                         edgecolors="white", linewidths=0.6)
    above = [i for i, e in scored if e.val_bpb > high]
    failed = [i for i, e in enumerate(entries, 1) if not e.is_valid]
    for where, label, marker in ((above, "off the scale", "^"), (failed, "crashed or invalid", "x")):
        if where:
            y = high - (0.02 if marker == "^" else 0.05) * (high - low)
            axes.scatter(where, [y] * len(where), c=GREY, marker=marker, s=30, label=f"{label} ({len(where)})")
    if bests:
        x = [i for i, _, _ in bests] + [len(entries) + 0.5]
        y = [mean for _, mean, _ in bests] + [bests[-1][1]]
        axes.step(x, y, where="post", color=GREEN, lw=1.8, label="best so far, mean of its replicates")
        stairs = [
            (i, level) for level, left, right in zip(y, x, x[1:], strict=False) for i in np.arange(left, right, 0.25)
        ]
        risers = [(i, at) for i, a, b in zip(x[1:], y, y[1:], strict=False) for at in np.linspace(a, b, 12)]
        label_bests(axes, bests, [(i, e.val_bpb) for i, e in scored] + stairs + risers)
    axes.legend(fontsize=9.5, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncol=6)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return png(figure)


def label_bests(axes: Axes, bests: list[tuple[int, float, Entry]], points: list[tuple[int, float]]) -> None:
    """Name the steps, the largest gains first, each where neither another label nor the frame is in the way and the
    fewest points are covered; the small ones and those without room stay unnamed."""
    gains = [math.inf] + [bests[i - 1][1] - bests[i][1] for i in range(1, len(bests))]
    taken: list[tuple[float, float, float, float]] = []
    frame = axes.bbox
    dots = axes.transData.transform(points)
    for gain, (i, mean, e) in sorted(zip(gains, bests, strict=True), key=lambda pair: -pair[0])[:20]:
        if gain < 5e-5:  # would read -0.0000
            break
        text = clip(e.description, 42) + ("" if gain == math.inf else f"  {-gain:+.4f}")
        x, y = axes.transData.transform((i, mean))
        width, height = 6.3 * len(text), 14  # pixels, at most, at this font size
        places = []
        for dx, dy in ((8, -16), (-8 - width, -16), (8, 10), (8, -34), (-8 - width, -34), (8, 28), (8, 46), (8, -56)):
            box = (x + dx, y + dy, x + dx + width, y + dy + height)
            is_inside = box[0] > frame.x0 and box[2] < frame.x1 and box[1] > frame.y0 and box[3] < frame.y1
            if is_inside and not any(overlap(box, other) for other in taken):
                covered = ((dots > np.array(box[:2]) - 4) & (dots < np.array(box[2:]) + 4)).all(axis=1).sum()
                places.append((int(covered), len(places), box))
        if places and min(places)[0] <= 2:
            *_, box = min(places)
            taken.append(box)
            at = (box[0] - x) * 72 / 100, (box[1] - y) * 72 / 100
            axes.annotate(text, (i, mean), xytext=at, textcoords="offset points", fontsize=8.5, va="bottom",
                          parse_math=False,
                          arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.6} if abs(box[1] - y) > 20 else None)


def overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def write_pictures(run: Run, best: Run | None, curves: dict[str, Curve | None]) -> tuple[list[str], dict[str, str]]:
    """Names of the pictures made, and why one was not. A surprise in the metrics costs its picture, not the night."""
    makers = {
        "loss_curve.png": lambda: draw_loss(run, curves),
        "lr_and_schedule.png": lambda: draw_schedule(run, curves["this"], best),
        "gpu_perf.png": lambda: draw_machine(run, best),
        "layers.png": lambda: draw_layers(run),
    }
    made, failed = [], {}
    for name, make in makers.items():
        try:
            data = make()
        except Exception as e:
            failed[name] = f"{type(e).__name__}: {e}"
            continue
        if data:
            write_atomic(run.path / name, data)
            made.append(name)
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
    best = compute_best(before, this)
    best_runs = [load_folder(archive / n, n) for n in best_names(best)]
    best_run = best_runs[0] if best_runs else None
    previous = next(
        (e.name for e in reversed(before) if e.val_bpb is not None and (not best or e.name != best.name)), None
    )
    previous_run = load_folder(archive / previous, previous) if previous else None
    curves = {key: compute_curve(r) if r else None
              for key, r in (("this", run), ("best", best_run), ("previous", previous_run))}
    stats = compute_stats(run, this, [*before, this], best_runs)
    diff = diff_lines(best_run.train_py, run.train_py, best_run.name) if best_run else []
    write_atomic(archive / name / "train.diff", "".join(line if line.endswith("\n") else line + "\n" for line in diff))
    pictures, failed = write_pictures(run, best_run, curves)
    stats["failed"] |= failed
    stats["record"]["name"] = name
    write_analysis(archive / name, render_analysis(stats, pictures))
    write_json(archive / name / STATS, stats)  # last: a run whose statistics stand has all its pages


def best_names(best: Best | None) -> list[str]:
    """The runs to compare with: the best's own and its newest replicates, five at most, which is enough for a mean."""
    if best is None:
        return []
    others = [n for n in best.names if n != best.name]
    return [best.name, *others[-4:]]


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
    write_atomic(archive / "progress.png", draw_progress(book.entries))
    write_atomic(archive / "report.md", render_report(book))


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
    if verdict["kind"] == "unproven":
        print(f"mind: unproven, {verdict['difference']:+.6f} bpb is inside the noise")
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
