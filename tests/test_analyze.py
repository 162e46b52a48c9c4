"""analyze.py against hand-made runs whose answers are known, in real git repositories; one night is trained."""

import contextlib
import copy
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import analyze
from analyze import load_folder, load_run, load_runs

SCRIPT = Path(analyze.__file__)
PROGRAM = '''"""A stand-in for a training program."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    depth: int = 8
    matrix_lr: float = 0.04  # Muon
    seed: int = 42


def train(config):
    """Train."""
    return config.depth * config.matrix_lr
'''
OUTPUTS = ("run.log", "run_start.json", "metrics.jsonl", "eval_record.json", "run_summary.json")
BUDGET_S = 300.0
BATCH = 524_288
NATS_PER_TOKEN_TO_BPB = 0.32  # what the made-up evaluation records amount to


def power_law(tokens_m, a=2.0, b=12.0, c=0.5):
    return a + b * np.asarray(tokens_m) ** -c


def make_records(
    num_steps=300, step_ms=None, loss=None, warmdown=0.5, drop=0.3, noise=0.01, seed=0, batch=BATCH, **extra
):
    """One record a step. The loss is a power law of the tokens, less `drop` at the end of the warm-down."""
    step_ms = np.full(num_steps, BUDGET_S * 1000 / num_steps) if step_ms is None else np.asarray(step_ms, dtype=float)
    end_s = np.cumsum(step_ms) / 1000
    progress = np.minimum((end_s - step_ms / 1000) / BUDGET_S, 1.0)
    tokens = batch * np.arange(1, len(step_ms) + 1)
    lr = np.clip((1 - progress) / warmdown, 0, 1) if warmdown else np.ones_like(progress)
    if loss is None:
        loss = power_law(tokens / 1e6) - drop * (1 - lr)
    loss = np.asarray(loss) + noise * np.random.default_rng(seed).standard_normal(len(step_ms))
    smooth, records = 0.0, []
    for i in range(len(step_ms)):
        smooth = 0.9 * smooth + 0.1 * loss[i]
        records.append({
            "step": i, "train/loss": float(loss[i]), "train/loss_smooth": float(smooth / (1 - 0.9 ** (i + 1))),
            "train/lr_multiplier": float(lr[i]), "train/muon_momentum": 0.95, "train/weight_decay": 0.2,
            "train/progress": float(progress[i]), "perf/step_time_ms": float(step_ms[i]),
            "perf/tokens_per_sec": float(batch / step_ms[i] * 1000), "perf/mfu_percent": 40.0,
            "time/unix_s": 1.7e9 + float(end_s[i]), "time/training_s": float(end_s[i]), "train/tokens": int(tokens[i]),
            "train/epoch": 1, "train/grad_norm": 0.5, "lr/wte": 0.7 * float(lr[i]) + 1e-9,
        } | {key: value[i] for key, value in extra.items()})
    return records


def original_records(records):
    """What the original program logs: its ten keys and no others."""
    keys = ["step", "train/loss", "train/loss_smooth", "train/lr_multiplier", "train/muon_momentum",
            "train/weight_decay", "train/progress", "perf/step_time_ms", "perf/tokens_per_sec", "perf/mfu_percent"]
    return [{key: r[key] for key in keys} for r in records]


class Lab:
    """A git repository in which runs are made up, as train.py would leave them, and analyze.py is called."""

    def __init__(self, folder: Path, capsys, usual: Path):
        self.folder, self.capsys, self.usual, self.count = folder, capsys, usual, 0
        self.archive = folder / ".auto-log-research"
        self.git("init", "-q", "-b", "main")
        self.git("config", "user.email", "lab@example.org")
        self.git("config", "user.name", "Lab")
        (folder / ".gitignore").write_text(
            "run.log\nrun_*.json\nmetrics.jsonl\neval_record.json\n.auto-log-research/\n"
        )
        (folder / "prepare.py").write_text("VOCAB_SIZE = 8192\n")
        self.git("add", ".gitignore", "prepare.py")

    def git(self, *arguments):
        done = subprocess.run(["git", "-C", str(self.folder), *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def commit(self, subject, text=PROGRAM):
        (self.folder / "train.py").write_text(text)
        self.git("add", "train.py")
        self.git("commit", "-q", "--allow-empty", "-m", subject)
        return self.git("rev-parse", "HEAD")[:7]

    def analyze(self, *arguments):
        """Exit status, standard output, standard error."""
        self.capsys.readouterr()
        code = analyze.main(list(arguments))
        output = self.capsys.readouterr()
        return code, output.out, output.err

    def start(self, **changes):
        """What train.py does first: put away an earlier run, write run_start.json, print the run's id."""
        self.set_aside()
        self.count += 1
        text = (self.folder / "train.py").read_text()
        start = {
            "run_id": f"20260301-0000{self.count:02d}-abcd",
            "started_unix": 1.7e9 + 600 * self.count,
            "git_commit": self.git("rev-parse", "HEAD"),
            "git_dirty": bool(self.git("status", "--porcelain", "-uno", "--", "*.py")),
            "train_py": text,
            "train_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "prepare_sha256": hashlib.sha256((self.folder / "prepare.py").read_bytes()).hexdigest(),
            "measurement_sha256": "a" * 64,
            "data_fingerprint": "0123456789abcdef",
            "demo": False,
        } | changes
        (self.folder / "run_start.json").write_text(json.dumps(start))
        (self.folder / "run.log").write_text(f"run {start['run_id']}\ndevice: cpu\n")
        return start

    def set_aside(self):
        folder = self.folder
        if (folder / "run_start.json").exists():
            run_id = json.loads((folder / "run_start.json").read_text())["run_id"]
            starts = self.archive.glob("*/run_start.json")
            is_filed = any(json.loads(p.read_text())["run_id"] == run_id for p in starts)
            for name in ("metrics.jsonl", "eval_record.json", "run_summary.json", "run_start.json"):
                if not is_filed and (folder / name).exists():
                    (self.archive / "unfiled" / run_id).mkdir(parents=True, exist_ok=True)
                    (folder / name).rename(self.archive / "unfiled" / run_id / name)
                (folder / name).unlink(missing_ok=True)

    def log_steps(self, records):
        lines = "".join(json.dumps(r) + "\n" for r in records)
        (self.folder / "metrics.jsonl").write_text(lines)
        with open(self.folder / "run.log", "a") as log:
            log.write(f"step {len(records) - 1:5d} | loss {records[-1]['train/loss']}\n")

    def finish(self, start, val_bpb, records, config=None, evaluation=None, **changes):
        """The evaluation record, the summary and the closing block of a finished run."""
        num_bytes = 100_000_000
        record = {"val_bpb": val_bpb, "nats": val_bpb * math.log(2) * num_bytes, "bytes": num_bytes,
                  "tokens": round(NATS_PER_TOKEN_TO_BPB * math.log(2) * num_bytes), "causal": True, "num_calls": 1,
                  "data_fingerprint": "0123456789abcdef", "measurement_sha256": start["measurement_sha256"]}
        (self.folder / "eval_record.json").write_text(json.dumps(record | (evaluation or {})))
        summary = {
            "depth": 8, "matrix_lr": 0.04, "seed": 42, "total_batch_size": BATCH, "time_budget": BUDGET_S,
            "run_id": start["run_id"], "git_commit": start["git_commit"], "val_bpb": val_bpb,
            "training_seconds": sum(r["perf/step_time_ms"] for r in records) / 1000, "total_seconds": 360.0,
            "startup_seconds": 20.0, "eval_seconds": 30.0, "stats_seconds": 10.0, "peak_vram_mb": 45_056.0,
            "mfu_percent": 40.0, "total_tokens_M": len(records) * BATCH / 1e6, "num_steps": len(records),
            "num_params_M": 50.3, "flops_per_token": 2.5e8, "gpu_name": "Abacus 3000",
            "data_fingerprint": "0123456789abcdef", "prepare_sha256": start["prepare_sha256"],
        } | (config or {}) | changes
        (self.folder / "run_summary.json").write_text(json.dumps(summary))
        with open(self.folder / "run.log", "a") as log:
            log.write(f"---\nval_bpb:          {val_bpb:.6f}\nnum_steps:        {len(records)}\n")

    def train(self, val_bpb, records=None, start=None, **kwargs):
        """A whole run that finishes with this score, of two steps where the curve does not matter."""
        start, records = self.start(**(start or {})), records or make_records(2)
        self.log_steps(records)
        self.finish(start, val_bpb, records, **kwargs)

    def crash(self, ending, records=None):
        self.start()
        if records:
            self.log_steps(records)
        with open(self.folder / "run.log", "a") as log:
            log.write(ending)

    def crash_without_git(self, ending):
        """A crash of a program that leaves nothing but its log."""
        self.set_aside()
        (self.folder / "run.log").write_text(ending)

    def rows(self):
        lines = (self.archive / "results.tsv").read_text().splitlines()
        assert lines[0] == "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
        return [tuple(line.split("\t")) for line in lines[1:]]

    def page(self, name):
        return (self.archive / name / "analysis.md").read_text()

    def stats(self, name):
        return json.loads((self.archive / name / "stats.json").read_text())

    def baseline(self, val_bpb=0.998, **kwargs):
        """A first run, filed and kept. The usual one is made once and copied from then on."""
        is_usual = val_bpb == 0.998 and not kwargs and not self.archive.exists()
        if is_usual and self.usual.exists():
            shutil.rmtree(self.folder / ".git")
            shutil.copytree(self.usual, self.folder, dirs_exist_ok=True)
            self.count = 1
            return self.rows()[0][0]
        name = self.commit("baseline")
        self.train(val_bpb, **kwargs)
        assert self.analyze()[0] == 0
        assert self.analyze("keep")[0] == 0
        if is_usual:
            shutil.copytree(self.folder, self.usual)
        return name

    def keep_depth_9(self, val_bpb):
        """A run of that depth, filed and kept."""
        name = self.commit("depth 9", variant(depth=9))
        self.train(val_bpb, config={"depth": 9})
        self.analyze()
        self.analyze("keep")
        return name


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return tmp_path_factory.mktemp("usual") / "folder"


@pytest.fixture
def lab(tmp_path, monkeypatch, capsys, usual):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AUTO_LOG_RESEARCH_DIR", raising=False)
    monkeypatch.setattr(analyze, "write_pictures", lambda *_: ([], {}))  # drawn in test_report.py, for seconds
    monkeypatch.setattr(analyze, "draw_progress", lambda *_: None)
    monkeypatch.setattr(analyze, "png", lambda _: b"a picture")
    return Lab(tmp_path, capsys, usual)


def variant(depth=8, matrix_lr=0.04, seed=42):
    text = PROGRAM.replace("depth: int = 8", f"depth: int = {depth}").replace("seed: int = 42", f"seed: int = {seed}")
    return text.replace("matrix_lr: float = 0.04", f"matrix_lr: float = {matrix_lr}")


# ---------------------------------------------------------------------------------------------------------------------
# A night in the books
# ---------------------------------------------------------------------------------------------------------------------


def test_a_night_of_experiments_leaves_exactly_these_rows(lab):
    base = lab.commit("baseline")
    lab.train(0.998)
    code, said, _ = lab.analyze()
    assert code == 0
    assert "**BASELINE**: val_bpb 0.998000" in said
    assert lab.analyze("keep")[1] == f"{base} kept; the best is {base} at 0.998000 (1 run(s))\n"

    lab.train(0.9984)  # a replicate
    assert "**REPLICATE** of the best" in lab.analyze()[1]
    assert "Mean of the 2 runs of this program: 0.998200." in lab.page(f"{base}.2")
    lab.analyze("keep")

    better = lab.commit("depth 9", variant(depth=9))
    lab.train(0.986, make_records(300, seed=1), config={"depth": 9})
    assert "**NEW BEST**: val_bpb 0.986000, best so far 0.998200" in lab.analyze()[1]
    assert "- `depth`: 8 -> 9" in lab.page(better)
    lab.analyze("keep")

    worse = lab.commit("matrix_lr\t0.4", variant(depth=9, matrix_lr=0.4))
    lab.train(1.2, config={"depth": 9, "matrix_lr": 0.4})
    assert (
        f"**NOT BETTER**: val_bpb 1.200000, best so far 0.986000 ({better}), difference +0.214000" in lab.analyze()[1]
    )
    assert "train.py is back to that of the best" in lab.analyze("discard")[1]

    broken = lab.commit("huge model", variant(depth=900))
    lab.crash("Traceback (most recent call last):\ntorch.OutOfMemoryError: CUDA out of memory.\n"
              "crash: out of GPU memory at step 0, loss 9.0\n")
    assert "**CRASH**: out of GPU memory at step 0" in lab.analyze()[1]
    assert "stays crash; train.py is back to that of the best" in lab.analyze("discard")[1]

    seeded = lab.commit("lucky seed", variant(depth=9, seed=1337))
    lab.train(0.985, config={"depth": 9, "seed": 1337})
    said = lab.analyze()[1]
    assert "**REPLICATE** of the best" in said
    assert f"The same program as {better}." in said
    lab.analyze("discard")

    leaking = lab.commit("no mask", variant(depth=10))
    lab.train(0.2, config={"depth": 10}, evaluation={"causal": False})
    assert "**INVALID**" in lab.analyze()[1]
    assert "the causality test failed" in lab.page(leaking)
    lab.analyze("discard")

    head = lab.git("rev-parse", "HEAD")[:7]
    (lab.folder / "train.py").write_text(variant(depth=7))
    lab.train(0.99, config={"depth": 7})
    said = lab.analyze()[1]
    assert f"filed as {head}-dirty\n" in said
    assert "is back to that of the best" in lab.analyze("discard")[1]

    back = f"Back to the best, {better}, after {leaking}"
    assert lab.rows() == [
        (base, "0.998000", "44.0", "keep", "baseline"),
        (f"{base}.2", "0.998400", "44.0", "keep", "baseline"),
        (better, "0.986000", "44.0", "keep", "depth 9"),
        (worse, "1.200000", "44.0", "discard", "matrix_lr 0.4"),
        (broken, "0.000000", "0.0", "crash", "huge model"),
        (seeded, "0.985000", "44.0", "discard", "lucky seed"),
        (leaking, "0.200000", "44.0", "invalid", "no mask"),
        (f"{head}-dirty", "0.990000", "44.0", "discard", f"{back} (with uncommitted changes)"),
    ]
    assert (lab.folder / "train.py").read_text() == variant(depth=9)
    assert lab.git("status", "--porcelain", "--untracked-files=no") == ""


def test_filing_twice_changes_nothing_and_says_so(lab):
    name = lab.baseline()
    before = {p: p.read_bytes() for p in lab.archive.rglob("*") if p.is_file()}
    code, said, _ = lab.analyze()
    assert code == 0
    assert said.startswith(f"{name} is filed already: nothing changed\n")
    assert {p: p.read_bytes() for p in lab.archive.rglob("*") if p.is_file()} == before


def test_the_folder_of_a_run_holds_its_files_byte_for_byte(lab):
    name = lab.baseline()
    for file in ("run_summary.json", "metrics.jsonl", "run.log", "eval_record.json", "run_start.json", "train.py"):
        assert (lab.archive / name / file).read_bytes() == (lab.folder / file).read_bytes(), file
    assert (lab.archive / name / "train.diff").read_text() == ""
    assert {p.name for p in lab.archive.iterdir()} == {
        ".gitignore", ".lock", "archive.json", "progress.png", "report.md",
        "results.tsv", name}
    assert lab.git("status", "--porcelain") == ""


def test_the_diff_is_against_the_best(lab):
    lab.baseline()
    name = lab.commit("depth 9", variant(depth=9))
    lab.train(0.99, config={"depth": 9})
    lab.analyze()
    diff = (lab.archive / name / "train.diff").read_text().splitlines()
    assert [x for x in diff if x[0] in "+-"][2:] == ["-    depth: int = 8", "+    depth: int = 9"]


def test_a_run_is_filed_under_the_commit_it_was_trained_from_not_under_head(lab):
    trained = lab.commit("baseline")
    lab.train(0.998)
    lab.commit("the next idea", variant(depth=9))
    lab.analyze()
    assert lab.rows() == [(trained, "0.998000", "44.0", "pending", "baseline")]
    assert (lab.archive / trained / "train.py").read_text() == PROGRAM


def test_a_summary_of_another_run_is_not_taken_for_this_one(lab):
    base = lab.baseline()
    stale = (lab.folder / "run_summary.json").read_text()
    lab.commit("depth 9", variant(depth=9))
    lab.crash("crash: the loss is NaN at step 12, loss nan\n", make_records(12))
    (lab.folder / "run_summary.json").write_text(stale)
    said = lab.analyze()[1]
    assert "**CRASH**: the loss is NaN at step 12" in said
    assert "run_summary.json is of run 20260301-000001-abcd, not of 20260301-000002-abcd: left out" in said
    assert [row[1:4] for row in lab.rows()] == [("0.998000", "44.0", "keep"), ("0.000000", "0.0", "crash")]
    assert analyze.compute_best(analyze.load_book(lab.archive).entries).name == base


def test_a_syntax_error_is_a_crash_of_its_own_commit_and_leaves_the_old_run_alone(lab):
    base = lab.baseline()
    broken = lab.commit("typo", PROGRAM + "def broken(:\n")
    (lab.folder / "run.log").write_text('  File "train.py", line 15\n    def broken(:\nSyntaxError: invalid syntax\n')
    assert "**CRASH**: SyntaxError: invalid syntax" in lab.analyze()[1]
    assert [row[:4] for row in lab.rows()] == [
        (base, "0.998000", "44.0", "keep"), (broken, "0.000000", "0.0", "crash")]
    assert f"{broken} is filed already" in lab.analyze()[1]
    assert (
        f"{broken} stays crash; train.py is back to that of the best, {base}, and committed"
        in lab.analyze("discard")[1]
    )


def test_a_run_put_away_by_the_next_start_is_filed_first_and_under_its_own_commit(lab):
    base = lab.commit("baseline")
    lab.train(0.998)
    second = lab.commit("depth 9", variant(depth=9))
    lab.train(0.99, config={"depth": 9})
    assert (lab.archive / "unfiled" / "20260301-000001-abcd").is_dir()
    said = lab.analyze()[1]
    assert f"unfiled run 20260301-000001-abcd filed as {base}" in said
    assert [row[:2] for row in lab.rows()] == [(base, "0.998000"), (second, "0.990000")]
    assert list((lab.archive / "unfiled").iterdir()) == []
    assert "its log is lost" in lab.page(base)


def test_without_git_a_run_is_filed_under_its_program(lab):
    lab.commit("x")
    start = {"git_commit": None, "git_dirty": None}
    lab.train(0.998, start=start, git_commit=None)
    shutil.rmtree(lab.folder / ".git")
    lab.analyze()
    mark = hashlib.sha256(PROGRAM.encode()).hexdigest()[:7]
    assert lab.rows() == [(f"unknown-{mark}", "0.998000", "44.0", "pending", "(no commit)")]
    assert lab.analyze("keep")[0] == 0
    (lab.folder / "train.py").write_text(variant(depth=9))
    lab.crash_without_git("crash: the loss is NaN at step 3, loss nan\n")
    lab.analyze()
    assert "is back to that of the best" in lab.analyze("discard")[1]
    assert (lab.folder / "train.py").read_text() == PROGRAM


# ---------------------------------------------------------------------------------------------------------------------
# What is no experiment, and what is no result
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [
    "error: no CUDA device; set AUTORESEARCH_DEMO=1 for the demo\n",
    "Traceback (most recent call last):\nRuntimeError: No CUDA GPUs are available\n",
    "Traceback (most recent call last):\nOSError: [Errno 28] No space left on device\n",
    "RuntimeError: [enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0\n",
    "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device\n",
    "RuntimeError: Failed to find C compiler. Please specify via CC environment variable.\n",
    "/tmp/tmpx/cuda_utils.c:6:10: fatal error: Python.h: No such file or directory\n",
    "PermissionError: [Errno 13] Permission denied: '/tmp/torchinductor_root/ab/x.py'\n",
    "OSError: [Errno 24] Too many open files: 'train.py'\n",
    "ImportError: libcudnn.so.9: cannot open shared object file: No such file or directory\n",
    "RuntimeError: The NVIDIA driver on your system is too old (found version 12020).\n",
    "bash: line 1: uv: command not found\n",
])
def test_a_broken_environment_is_reported_and_not_filed(lab, ending):
    base = lab.baseline()
    lab.commit("depth 9", variant(depth=9))
    lab.crash(ending)
    code, said, complaint = lab.analyze()
    assert (code, said) == (1, "")
    assert complaint.startswith("error: the environment failed, not the experiment; nothing was filed. ")
    assert ending.splitlines()[-1].removeprefix("error: ") in complaint
    assert [row[0] for row in lab.rows()] == [base]
    assert "failed over its environment" in lab.analyze("status")[1]
    lab.train(0.99, config={"depth": 9})  # puts the failed start away, without its log
    assert "the environment failed, not the experiment; nothing was filed" in lab.analyze()[1]
    assert load_folder(next((lab.archive / "failed").iterdir())).start["ended"].startswith("error: ")
    assert len(lab.rows()) == 2


@pytest.mark.parametrize(("fault", "reason"), [
    ({"evaluation": {"causal": False}}, "the causality test failed: predictions depend on later tokens"),
    ({"evaluation": {"num_calls": 2}}, "evaluation was called 2 times"),
    ({"evaluation": {"val_bpb": 1.1}}, "the summary says val_bpb 0.900000, the evaluation record 1.100000"),
    ({"evaluation": {"nats": 1.0}}, "the evaluation record's nats and bytes give 0.000000"),
    ({"evaluation": {"causal": None, "finding": "two calls differ"}},
     "whether the model looks ahead could not be tested (two calls differ): make it repeatable in evaluation"),
    ({"evaluation": {"faults": ["the logits are not those of the loss"]}}, "the logits are not those of the loss"),
    ({"evaluation": {"data_fingerprint": "f" * 16}},
     "the data is not what this archive began with (ffffffffffffffff, was 0123456789abcdef): point AUTORESEARCH_CACHE"),
    ({"evaluation": {"tokens": 4096}}, "the number of tokens scored is not what this archive began with (4096.0, was "),
    ({"time_budget": 600, "training_seconds": 600.0},
     "the time budget is not what this archive began with (600.0, was 300.0): train for the budget of before, or"),
    ({"demo": True, "start": {"demo": False}},
     "AUTORESEARCH_DEMO is not what this archive began with (True, was False)"),
    ({"training_seconds": 312.0}, "trained 312.0 s on a budget of 300.0 s, off by more than a step"),
    ({"training_seconds": 250.0}, "trained 250.0 s on a budget of 300.0 s, off by more than a step"),
    ({"start": {"measurement_sha256": "f" * 64}},
     "what prepare.py measures is not what this archive began with (ffffffffffffffff, was aaaaaaaaaaaaaaaa): undo the"),
])
def test_an_invalid_run_is_named_with_its_reason_and_never_the_best(lab, fault, reason):
    base = lab.baseline()
    name = lab.commit("too good", variant(depth=9))
    lab.train(0.9, make_records(30), **fault)
    said = lab.analyze()[1]
    assert "**INVALID**: val_bpb" in said
    assert f"- {reason}" in said
    assert lab.rows()[1] == (name, "0.900000", "44.0", "invalid", "too good")
    code, _, complaint = lab.analyze("keep")
    assert code == 1
    assert complaint.startswith(f"error: {name} cannot be kept: ")
    assert analyze.compute_best(analyze.load_book(lab.archive).entries).name == base


def test_a_last_step_of_more_than_a_fifth_of_the_budget_is_invalid(lab):
    lab.commit("one long step")
    lab.train(0.9, make_records(step_ms=[100_000.0, 100_000.0, 190_000.0], num_steps=3))
    assert "- the last step ran 90.0 s past a budget of 300.0 s: make steps shorter" in lab.analyze()[1]


def test_a_last_step_that_the_machine_held_up_is_hampered_and_no_baseline_is_asked_for_again(lab):
    lab.commit("baseline")
    lab.train(0.9, make_records(num_steps=300, step_ms=[1000.0] * 299 + [91_000.0]))
    verdict = lab.analyze()[1]
    assert "**HAMPERED**" in verdict
    assert "- 1 step(s) took more than twice the median: 90.0 of 390 s lost" in verdict
    lab.analyze("discard")
    assert lab.analyze("check")[0] == 0  # there is no best yet: the same program may run again


def test_a_hampered_run_waits_for_no_decision_and_is_left_behind_with_its_program(lab):
    lab.baseline()
    lab.commit("depth 9", variant(depth=9))
    lab.train(0.99, make_records(num_steps=300, step_ms=[1000.0] * 299 + [91_000.0]), config={"depth": 9})
    assert "; after three such runs, discard\n" in lab.analyze()[1]
    status = lab.analyze("status")[1]
    assert "archive: 2 runs (1 keep, 1 hampered)\n" in status
    assert "pending, decide keep or discard: none\n" in status
    assert status.endswith(f"next: train the same commit again, the idea was not tested: `{analyze.TRAIN_BESIDE}`\n")
    lab.analyze("rerun")  # the program here is another now
    assert "train the same commit again" not in lab.analyze("status")[1].splitlines()[-1]


def test_a_crash_asks_to_mend_a_slip_first_and_has_no_paired_curve(lab):
    lab.baseline()
    lab.commit("depth 9", variant(depth=9))
    lab.crash("crash: TypeError: no such thing at step 0\n")
    told = lab.analyze()[1]
    mend = "mend a slip and train again, three attempts at most"
    assert f"Decision: {mend}; else discard (`uv run analyze.py discard`)\n" in told
    assert "Paired curve" not in lab.page(lab.rows()[-1][0])


def test_commands_that_pages_name_carry_the_demos_setting(lab):
    code = "import analyze; print(analyze.FILE, analyze.TRAIN_BESIDE)"
    env = os.environ | {"AUTORESEARCH_DEMO": "yes", "PYTHONPATH": str(SCRIPT.parent)}
    said = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
    assert said == ("AUTORESEARCH_DEMO=1 uv run analyze.py AUTORESEARCH_DEMO=1 setsid timeout --kill-after=10 600 "
                    "uv run train.py > run.log 2>&1 &\n")


def test_without_a_score_that_counts_the_baseline_is_next(lab):
    lab.commit("baseline")
    lab.train(0.9, evaluation={"causal": False})
    assert "**INVALID**" in lab.analyze()[1]
    lab.analyze("discard")
    assert lab.analyze("status")[1].endswith("next: train the baseline (program.md, step 2)\n")


def test_a_changed_comment_in_prepare_changes_nothing(lab):
    lab.baseline()
    (lab.folder / "prepare.py").write_text("VOCAB_SIZE = 8192  # another comment\n")
    lab.git("add", "prepare.py")
    lab.commit("depth 9", variant(depth=9))
    lab.train(0.99, config={"depth": 9})
    lab.analyze()
    assert lab.rows()[1][3] == "pending"


def test_an_archive_begins_with_its_first_valid_run(lab):
    lab.commit("leaks")
    lab.train(0.5, evaluation={"causal": False, "data_fingerprint": "f" * 16}, time_budget=600, training_seconds=600.0)
    lab.analyze()
    assert not (lab.archive / "archive.json").exists()
    lab.train(0.998)
    lab.analyze()
    facts = json.loads((lab.archive / "archive.json").read_text())
    assert (facts["time_budget"], facts["data_fingerprint"], facts["demo"]) == (300, "0123456789abcdef", False)
    assert [row[3] for row in lab.rows()] == ["invalid", "pending"]


def test_a_new_archive_puts_the_old_one_aside_and_takes_the_run_that_did_not_fit(lab):
    base = lab.baseline()
    lab.train(0.97, make_records(300, step_ms=np.full(300, 2000.0)), time_budget=600)
    assert "the time budget is not what this archive began with" in lab.analyze()[1]
    assert "the next run begins a new one" in lab.analyze("new-archive")[1]
    (old,) = lab.folder.glob(".auto-log-research.*")
    assert (old / base / "run_summary.json").exists()
    assert lab.git("status", "--porcelain") == ""
    assert "**BASELINE**: val_bpb 0.970000" in lab.analyze()[1]


def test_a_new_archive_keeps_the_script_of_the_night_and_does_not_begin_with_a_run_of_the_old(lab):
    lab.baseline()
    (lab.archive / "night.sh").write_text("echo night\n")
    lab.analyze("new-archive")
    assert (lab.archive / "night.sh").read_text() == "echo night\n"
    assert not (lab.folder / "run_summary.json").exists()
    assert "no run's outputs in" in lab.analyze()[2]


def test_the_demos_run_is_no_part_of_the_real_archive(lab):
    lab.commit("baseline")
    lab.train(1.6, start={"demo": True})
    status = lab.analyze("status")[1]
    assert "is of the demo, and no part of this one\n" in status
    assert lab.analyze()[0] == 0
    (page,) = (lab.archive / "demo").glob("*/analysis.md")
    assert page.read_text().startswith(f"# demo run {page.parent.name}: ")
    assert status.endswith("next: uv run analyze.py start\n")


def test_a_commit_that_did_not_touch_the_program_does_not_name_its_run(lab):
    lab.commit("first")
    (lab.folder / "notes.txt").write_text("notes\n")
    lab.git("add", "notes.txt")
    lab.git("commit", "-qm", "notes")
    lab.train(0.998, config={"seed": 42})
    lab.analyze()
    lab.analyze("keep")
    lab.train(0.9981, start={"seed_offset": 1}, config={"seed": 43})
    lab.analyze()
    entries = analyze.load_book(lab.archive).entries
    assert [e.description for e in entries] == ["baseline", "train.py as it was"]
    assert "- `seed`: 42 -> 43\n" in (lab.archive / entries[1].name / "analysis.md").read_text()


def test_an_undecided_run_that_scored_lower_is_named(lab):
    lab.baseline()
    lower = lab.commit("depth 9", variant(depth=9))
    lab.train(0.98, config={"depth": 9})
    lab.analyze()
    lab.commit("depth 10", variant(depth=10))
    lab.train(0.99, config={"depth": 10})
    assert f"Mind: lower, and not decided yet: {lower}.\n" in lab.analyze()[1]


def test_an_idea_that_was_built_on_another_program_than_the_best_says_so(lab):
    base = lab.baseline()
    lab.keep_depth_9(0.98)
    lab.git("checkout", "-q", "--detach", base)  # as another worktree, which has not seen that
    lab.commit("depth 10, expect -0.0040", variant(depth=10))
    lab.train(0.99, config={"depth": 10})
    told = lab.analyze()[1]
    assert "**NOT BETTER**" in told
    built = f"Built on {base}: -0.00800 ± 0.00141 bpb against that one.\n"
    assert f"{built}Expected -0.0040, came -0.0080 ± 0.0014.\n" in told


def test_records_of_another_edition_are_made_anew_and_what_was_decided_stays(lab):
    base = lab.baseline()
    lab.keep_depth_9(0.99)
    path = lab.archive / base / "stats.json"
    stats = json.loads(path.read_text())
    (lab.archive / "results.tsv").unlink()
    path.write_text(json.dumps(stats | {"record": stats["record"] | {"format": "1", "program": "hashed otherwise"}}))
    lab.git("checkout", "-q", base, "--", "train.py")
    lab.git("commit", "-q", "-m", "again")
    lab.train(1.0, start={"seed_offset": 1})
    assert f"The same program as {base}." in lab.analyze()[1]
    assert json.loads(path.read_text())["record"] == stats["record"]
    assert [row[3] for row in lab.rows()] == ["keep", "keep", "pending"]


def test_a_run_with_uncommitted_changes_was_built_on_the_commit_that_it_changes(lab):
    lab.baseline()
    lab.keep_depth_9(0.980)
    (lab.folder / "train.py").write_text(variant(depth=9, matrix_lr=0.05))
    lab.train(0.975, config={"depth": 9, "matrix_lr": 0.05}, start={"git_dirty": True})
    assert "Built on" not in lab.analyze()[1]  # but on the best
    assert lab.stats(lab.rows()[-1][0])["effect"]["config"] == {"matrix_lr": [0.04, 0.05]}


def test_what_a_record_knows_outlives_a_new_format_though_the_runs_files_are_damaged(lab):
    base = lab.baseline()
    path = lab.archive / base / "stats.json"
    stats = json.loads(path.read_text())
    path.write_text(json.dumps(stats | {"record": stats["record"] | {"format": "1"}}))
    for file in ("run_summary.json", "run.log"):
        (lab.archive / base / file).write_text("")
    assert lab.analyze("status")[1].startswith(f"best: {base} val_bpb 0.998000, 1 run(s)")


def test_an_edit_without_effect_stays_a_run_of_the_bests_program_in_a_new_format(lab):
    base = lab.baseline()
    name = lab.commit("depth 9", variant(depth=9))
    lab.train(0.9982, config={"depth": 9})
    lab.analyze()
    path = lab.archive / name / "stats.json"
    stats = json.loads(path.read_text())
    verdict = stats["verdict"] | {"kind": "unchanged", "best": base}
    path.write_text(json.dumps(stats | {"verdict": verdict, "record": stats["record"] | {"format": "1"}}))
    first, second = analyze.load_book(lab.archive).entries
    assert first.record["program"] == second.record["program"]


def test_a_program_that_is_suddenly_faster_points_at_its_slow_run(lab):
    base = lab.baseline(records=make_records(num_steps=60, noise=0), num_steps=60)
    lab.train(0.990, make_records(num_steps=300), start={"seed_offset": 1}, num_steps=300)
    assert ("Mind: this program took 5 times as long a step before: if that run was held up, write `invalid` as the "
            f"status of {base} in results.tsv.\n") in lab.analyze()[1]


def test_a_copy_whose_name_comes_first_does_not_replace_the_run(lab):
    base = lab.baseline()
    shutil.copytree(lab.archive / base, lab.archive / "0copy")
    (lab.archive / "0copy" / "stats.json").unlink()
    book = analyze.load_book(lab.archive)
    assert [(e.name, e.status) for e in book.entries] == [(base, "keep")]
    assert book.problems == [f"0copy is a copy of {base}: left out"]


def test_after_the_only_run_was_discarded_the_baseline_is_next(lab):
    lab.baseline()
    lab.analyze("discard")
    assert lab.analyze("status")[1].endswith("next: train the baseline (program.md, step 2)\n")


def test_a_constant_set_to_none_is_another_configuration_and_one_that_fails_is_named(lab):
    text = PROGRAM.replace("    seed: int = 42", "    cap: float | None = 15.0\n    seed: int = 42")
    lab.commit("baseline", text)
    lab.train(0.998, config={"cap": 15.0})
    lab.analyze()
    lab.analyze("keep")
    (lab.folder / "train.py").write_text(text.replace("= 15.0", "= None"))
    assert lab.analyze("check")[0] == 0
    (lab.folder / "train.py").write_text(text.replace("= 15.0", "= 1 / 0"))
    assert "a constant of its Config fails: ZeroDivisionError('division by zero')\n" in lab.analyze("check")[1]


def test_where_the_best_is_anothers_program_it_is_to_be_brought_here(lab):
    base = lab.baseline()
    lab.keep_depth_9(0.9979)
    lab.train(1.1, config={"depth": 9}, start={"seed_offset": 1})  # with its second run it is the best no more
    lab.analyze()
    lab.analyze("keep")
    says = f"next: `uv run analyze.py rerun` puts the best, {base}, here; then the next idea (program.md, step 8)\n"
    assert lab.analyze("status")[1].endswith(says)


def test_knobs_that_the_demo_has_otherwise_are_read_before_the_run():
    text = "class Config:\n    depth: int = 4 if DEMO else 8\n    kv: int | None = None\n    rows: int = 2**3\n"
    assert analyze.static_config(text) == {"depth": 8, "kv": None, "rows": 8}


def test_a_run_that_left_only_its_evaluation_is_filed_with_its_score(lab):
    lab.commit("another program")
    lab.train(0.9)
    away = lab.archive / "unfiled" / "r1"
    away.mkdir(parents=True)
    for name in ("run_start.json", "metrics.jsonl", "eval_record.json"):
        (lab.folder / name).rename(away / name)
    for name in ("run_summary.json", "run.log"):
        (lab.folder / name).unlink()
    lab.analyze()
    (filed,) = analyze.load_book(lab.archive).entries
    assert (filed.val_bpb, filed.status) == (0.9, "pending")
    assert "run_summary.json is missing: eval_record.json stands in" in filed.record["damage"]


def test_a_score_without_its_evaluation_record_is_invalid(lab):
    lab.commit("baseline")
    lab.train(0.9)
    (lab.folder / "eval_record.json").unlink()
    assert "- no readable eval_record.json: the score did not come from evaluate_bpb; call it, once" in lab.analyze()[1]


def test_a_byte_order_mark_in_the_archives_facts_does_no_harm(lab):
    lab.baseline()
    path = lab.archive / "archive.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    lab.train(0.97, time_budget=600)
    assert "the time budget is not what this archive began with" in lab.analyze()[1]


def test_a_clock_that_stood_still_for_long_is_said(lab):
    lab.commit("baseline")
    lab.train(0.9, config={"pauses_over": 12.4})
    assert "Mind: pauses of the clock took 12 s more than is allowed: these counted as training.\n" in lab.analyze()[1]


def test_a_crash_never_inherits_a_score_nor_counts_as_a_number(lab):
    lab.baseline()
    lab.commit("depth 9", variant(depth=9))
    lab.crash("ValueError: shape mismatch\ncrash: ValueError: shape mismatch at step 3, loss 8.1\n", make_records(4))
    lab.analyze()
    runs = load_runs()
    assert runs["val_bpb"].tolist()[0] == 0.998
    assert math.isnan(runs["val_bpb"][1])
    assert math.isnan(runs["memory_gb"][1])
    assert math.isnan(runs["training_s"][1])
    assert runs["val_bpb"].min() == 0.998


COMPILED_SHAPE_ERROR = """torch._dynamo.exc.TorchRuntimeError: RuntimeError when making fake tensor call
  Explanation: Dynamo failed to run FX node: got RuntimeError('a and b must have same reduction dim')

crash: TorchRuntimeError: RuntimeError when making fake tensor call before the first step
"""


@pytest.mark.parametrize(("ending", "reason", "cause"), [
    ("torch.OutOfMemoryError: CUDA out of memory\ncrash: out of GPU memory at step 0\n",
     "out of GPU memory at step 0", "out of memory"),
    ("crash: the loss is NaN at step 7, loss nan\n", "the loss is NaN at step 7, loss nan",
     "not a number, or the loss exploded"),
    ("torch.AcceleratorError: CUDA error: unspecified launch failure\n",
     "torch.AcceleratorError: CUDA error: unspecified launch failure",
     "a failed launch on the GPU: the machine's fault or the program's"),
    (COMPILED_SHAPE_ERROR, "RuntimeError('a and b must have same reduction dim')", None),
    ("NameError: name 'depht' is not defined\n", "NameError: name 'depht' is not defined", None),
    ("", "the log just stops: killed", "killed from outside, or out of time"),
])
def test_a_crash_shows_its_reason_and_a_known_cause_with_what_helps(lab, ending, reason, cause):
    name = lab.commit("baseline")
    lab.crash(ending, make_records(8))
    assert f"**CRASH**: {reason}" in lab.analyze()[1]
    assert lab.stats(name)["crash"]["cause"] == cause
    assert "Ended: step 7, last loss " in lab.page(name)
    assert (f"Looks like: {cause}. What usually helps: " in lab.page(name)) == (cause is not None)


@contextlib.contextmanager
def in_progress(folder):
    """A run holds this lock on its metrics for its whole life."""
    with open(folder / "metrics.jsonl", "a") as metrics:
        fcntl.flock(metrics, fcntl.LOCK_EX)
        yield


def test_a_run_in_progress_is_left_alone_whatever_the_clock_says(lab):
    lab.commit("baseline")
    lab.start(pid=4_000_000, started_unix=1.0)
    lab.log_steps(make_records(10))
    with in_progress(lab.folder):
        code, said, complaint = lab.analyze()
        assert (code, said) == (1, "")
        assert f"in progress in {lab.folder}: wait for its end (`uv run analyze.py --wait`)\n" in complaint
        assert "in progress, 10 steps so far" in lab.analyze("status")[1]
    assert "**CRASH**: the log just stops: killed" in lab.analyze()[1]
    assert "this folder: run" in (said := lab.analyze("status")[1])
    assert "next: train the same commit again, the idea was not tested: `" in said


def test_waiting_ends_when_the_run_does_and_files_it(lab):
    lab.commit("baseline")
    lab.train(0.998)
    with in_progress(lab.folder):
        call = subprocess.Popen([sys.executable, str(SCRIPT), "--wait"], cwd=lab.folder, stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            call.wait(1)
    assert b"**BASELINE**" in call.communicate(timeout=60)[0]


def test_waiting_gives_a_start_that_has_said_nothing_yet_time_to_begin(lab):
    lab.baseline()
    (lab.folder / "run.log").write_text("")
    assert "a start that has written nothing to run.log yet" in lab.analyze("status")[1]
    call = subprocess.Popen([sys.executable, str(SCRIPT), "--wait"], cwd=lab.folder, stdout=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        call.wait(1)
    lab.train(0.9981)
    assert b"**REPLICATE**" in call.communicate(timeout=60)[0]


def test_stop_ends_a_run_which_is_filed_as_stopped_with_its_metrics(lab):
    lab.baseline()
    name = lab.commit("depth 9", variant(depth=9))
    code = "import fcntl; f = open('metrics.jsonl', 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    assert "error: no run is in progress in" in lab.analyze("stop")[2]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    lab.start()
    process = subprocess.Popen([sys.executable, "-c", code], cwd=lab.folder, **pipes)
    process.stdout.readline()
    start = json.loads((lab.folder / "run_start.json").read_text())
    (lab.folder / "run_start.json").write_text(json.dumps(start | {"pid": process.pid}))
    lab.log_steps(make_records(10))
    assert "has ended: `uv run analyze.py` files it, with its metrics" in lab.analyze("stop")[1]
    assert process.wait() != 0
    assert lab.analyze()[0] == 0
    assert lab.rows()[1] == (name, "nan", "nan", "discard", "depth 9")
    assert len(load_run(name).metrics) == 10
    assert "was_killed" in load_runs()
    assert f"this folder: run {name}, filed, discard" in lab.analyze("status")[1]


def test_a_folder_without_outputs_is_one_clear_line(lab):
    complaint = f"error: no run's outputs in {lab.folder}: run `uv run train.py > run.log 2>&1` there first\n"
    assert lab.analyze() == (1, "", complaint)


def test_a_truncated_last_line_is_fine_and_damage_elsewhere_is_named(lab):
    name = lab.commit("baseline")
    lab.train(0.998, make_records(300))
    text = (lab.folder / "metrics.jsonl").read_text()
    (lab.folder / "metrics.jsonl").write_text(text + '{"step": 300, "train/lo')
    assert analyze.parse_metrics((lab.folder / "metrics.jsonl").read_text())[1] == []
    lines = text.splitlines(keepends=True)
    lines[4] = "\0\0\0\n"
    (lab.folder / "metrics.jsonl").write_text("".join(lines))
    said = lab.analyze()[1]
    assert "Mind: metrics.jsonl: 1 damaged line(s) left out (line 5)." in said
    assert len(load_run(name).metrics) == 299


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is lost
# ---------------------------------------------------------------------------------------------------------------------


def test_two_filings_at_once_lose_no_row(lab, tmp_path):
    lab.commit("baseline")
    shared, folders = tmp_path / "shared", []
    for i in range(2):
        lab.train(0.99 + i / 1000)
        folders.append(tmp_path / f"worktree{i}")
        lab.git("worktree", "add", "-q", "--detach", str(folders[-1]))
        for file in OUTPUTS:
            (folders[-1] / file).write_bytes((lab.folder / file).read_bytes())
    environment = os.environ | {"AUTO_LOG_RESEARCH_DIR": str(shared)}
    calls = [subprocess.Popen([sys.executable, str(SCRIPT)], cwd=f, env=environment, stdout=subprocess.PIPE, text=True)
             for f in folders]
    assert [call.communicate()[0].split()[0] for call in calls] == ["filed"] * 2
    assert [call.returncode for call in calls] == [0] * 2
    lab.archive = shared
    assert sorted(row[1] for row in lab.rows()) == ["0.990000", "0.991000"]
    names = [row[0] for row in lab.rows()]
    base = lab.git("rev-parse", "HEAD")[:7]
    assert sorted(names) == [base, f"{base}.2"]
    for name, row in zip(names, lab.rows(), strict=True):
        assert load_run(name, shared).summary["val_bpb"] == float(row[1])


def analyze_and_die(kill_at, *arguments):
    """analyze.py in a process of its own that is killed with signal 9 at its n-th rename. Returns its wait status."""
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1]
    renames = iter(range(1, 10**6))

    def killing(function):
        def wrapper(*arguments):
            if next(renames) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return wrapper

    os.replace, os.rename = killing(os.replace), killing(os.rename)
    os._exit(analyze.main(list(arguments)))


def test_a_kill_at_any_write_leaves_the_run_readable_and_is_mended_by_the_next_call(lab):
    name = lab.commit("baseline")
    lab.train(0.998)
    survived, kills = False, 0
    while not survived:
        kills += 1
        shutil.rmtree(lab.archive, ignore_errors=True)
        status = analyze_and_die(kills)
        survived = status == 0
        assert survived or os.WTERMSIG(status) == signal.SIGKILL
        # What train.py would conclude now: the run may be deleted here only if the archive holds all of it.
        for start in lab.archive.glob("*/run_start.json"):
            assert load_run(start.parent.name, lab.archive).summary["val_bpb"] == 0.998
        assert lab.analyze()[0] == 0
        assert lab.rows() == [(name, "0.998000", "44.0", "pending", "baseline")]
        assert "**BASELINE**" in lab.page(name)
        assert name in (lab.archive / "report.md").read_text()
        assert (lab.archive / "progress.png").exists()
        assert not list(lab.archive.rglob(".tmp-*"))
    assert kills > 10


def test_the_pages_of_a_run_whose_analysis_was_killed_are_written_after_the_next_run(lab):
    base = lab.baseline()
    first = lab.commit("depth 9", variant(depth=9))
    lab.train(0.99, config={"depth": 9})
    assert os.WTERMSIG(analyze_and_die(10)) == signal.SIGKILL
    assert (lab.archive / first / "run_summary.json").exists()
    assert not (lab.archive / first / "analysis.md").exists()
    lab.commit("depth 10", variant(depth=10))
    lab.train(0.95, config={"depth": 10})
    lab.analyze()
    assert f"**NEW BEST**: val_bpb 0.990000, best so far 0.998000 ({base})" in lab.page(first)
    assert (lab.archive / first / "loss_curve.png").exists() is False  # two steps are no curve
    assert [row[:4] for row in lab.rows()[1:]] == [
        (first, "0.990000", "44.0", "pending"), (lab.rows()[2][0], "0.950000", "44.0", "pending")]


def test_text_that_is_no_utf8_is_kept_as_it_is_and_shown_with_question_marks(lab):
    name = lab.commit("baseline")
    lab.crash("ValueError: \n")
    with open(lab.folder / "run.log", "ab") as f:
        f.write(b"crash: ValueError: caf\xe9 $x$ before the first step\n")
    assert "**CRASH**: ValueError: caf? $x$ before the first step" in lab.analyze()[1]
    assert (lab.archive / name / "run.log").read_bytes() == (lab.folder / "run.log").read_bytes()
    table = lab.archive / "results.tsv"
    table.write_bytes(table.read_bytes().replace(b"\tbaseline", b"\tba\xffse $\\bad{$"))
    lab.train(0.998)
    lab.analyze()
    assert lab.analyze("keep")[0] == 0
    assert b"\tba\xffse $\\bad{$\n" in table.read_bytes()
    assert "ba?se $\\bad{$" in lab.analyze("status")[1]


def test_the_agents_notes_survive_and_lost_pages_are_made_again(lab):
    name = lab.baseline()
    folder = lab.archive / name
    assert lab.page(name).endswith("## Agent Investigation Notes\n")
    with open(folder / "analysis.md", "a") as f:
        f.write("\nThe first layer learns late.\n")
    (folder / "stats.json").unlink()
    lab.analyze()
    assert (folder / "stats.json").exists()
    assert lab.page(name).startswith(f"# {name}: baseline\n\n## Verdict\n")
    assert lab.page(name).endswith("## Agent Investigation Notes\n\nThe first layer learns late.\n")
    assert lab.rows()[0][:4] == (name, "0.998000", "44.0", "keep")


def test_hand_edits_of_the_table_hold_and_a_removed_row_comes_back(lab):
    base = lab.baseline()
    for i, val in ((9, 0.99), (10, 0.97)):
        lab.commit(f"depth {i}", variant(depth=i))
        lab.train(val, config={"depth": i})
        lab.analyze()
    _, second, third = [row[0] for row in lab.rows()]
    table = lab.archive / "results.tsv"
    header, *lines = table.read_text().splitlines()
    edited = lines[1].replace("pending\tdepth 9", "keep\tmy own words")
    table.write_text("\n".join([header, edited, "what is this?", lines[0]]))  # the third is removed
    assert "problem: results.tsv line 3: 1 columns where five are due: not counted" in lab.analyze("status")[1]
    said = lab.analyze()[1]
    assert f"{third} had no row in results.tsv: added, as pending\n" in said
    assert table.read_text().splitlines() == [header, edited, lines[0], lines[2]]
    table.write_text(table.read_text().replace("pending\tdepth 10", "discard\tdepth 10"))  # the way to leave it out
    assert f"best: {second} val_bpb 0.990000" in lab.analyze("status")[1]
    assert base in lab.analyze("status")[1]


@pytest.mark.parametrize("damage", [
    lambda text: "",
    lambda text: text[: len(text) // 2],
    lambda text: text.encode("utf-16"),
    lambda text: text.replace("\t", ","),
    lambda text: re.sub(r"^(\w{7})\t", "1.2E+45\t", text, flags=re.M),
    lambda text: b"\0" * len(text),
], ids=["emptied", "cut", "utf-16", "commas", "names read as numbers", "zeroed"])
def test_a_damaged_table_is_rebuilt_from_the_runs_with_what_was_decided(lab, damage):
    base = lab.baseline()
    name = lab.commit("depth 9", variant(depth=9))
    lab.train(1.1, config={"depth": 9})
    lab.analyze()
    lab.analyze("discard")
    rows, table = lab.rows(), lab.archive / "results.tsv"
    damaged = damage(table.read_text())
    table.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    said = lab.analyze()[1]
    assert f"{name} had no row in results.tsv: added, as discard" in said
    assert lab.rows() == rows
    assert f"best: {base} val_bpb 0.998000" in lab.analyze("status")[1]
    assert lab.analyze()[1].startswith(f"{name} is filed already: nothing changed\n")


def test_a_score_edited_by_hand_is_named_and_does_not_count(lab):
    name = lab.baseline()
    table = lab.archive / "results.tsv"
    table.write_text(table.read_text().replace("0.998000", "0.500000"))
    assert f"line 2: 0.500000 is not what {name} scored: 0.998000 counts" in lab.analyze("status")[1]
    assert load_runs()["val_bpb"].tolist() == [0.998]


def score_later(lab, val_bpb, start):
    """What `train.py --score` leaves: a log of its own, the evaluation and the summary."""
    (lab.folder / "run.log").write_text(f"run {start['run_id']}\n")
    lab.finish(start, val_bpb, make_records(300))


def test_a_run_filed_without_a_score_is_filed_again_in_place_once_it_has_one(lab):
    lab.baseline()
    name = lab.commit("depth 9", variant(depth=9))
    lab.crash("crash: RuntimeError: out of luck\n", make_records(300))
    lab.analyze()
    with open(lab.archive / name / "analysis.md", "a") as f:
        f.write("\nmy note\n")
    lab.commit("depth 10", variant(depth=10))
    start = json.loads((lab.folder / "run_start.json").read_text())
    score_later(lab, 0.97, start)
    assert "**NEW BEST**: val_bpb 0.970000" in lab.analyze()[1]
    assert lab.rows()[1] == (name, "0.970000", "44.0", "pending", "depth 9")
    assert load_run(name).summary["val_bpb"] == 0.97
    assert lab.page(name).endswith("\nmy note\n")
    assert len(lab.rows()) == 2
    assert lab.analyze()[1].startswith(f"{name} is filed already: nothing changed")


def test_a_score_that_comes_before_the_next_start_is_not_lost_with_the_run_that_was_filed(lab):
    lab.baseline()
    name = lab.commit("depth 9", variant(depth=9))
    lab.crash("crash: RuntimeError: out of luck\n", make_records(300))
    lab.analyze()
    start = json.loads((lab.folder / "run_start.json").read_text())
    score_later(lab, 0.97, start)
    unfiled = lab.archive / "unfiled" / start["run_id"]
    unfiled.mkdir(parents=True)
    for file in OUTPUTS[1:]:
        (lab.folder / file).rename(unfiled / file)
    second = lab.commit("depth 10", variant(depth=10))
    lab.train(0.96, config={"depth": 10})
    assert f"unfiled run {start['run_id']} filed as {name}" in lab.analyze()[1]
    assert [row[:2] for row in lab.rows()[1:]] == [(name, "0.970000"), (second, "0.960000")]


def test_an_evaluation_that_failed_over_its_environment_and_is_scored_later_is_filed(lab):
    lab.baseline()
    name = lab.commit("depth 9", variant(depth=9))
    lab.crash("error: /cache/val.bin is missing\n", make_records(300))
    assert lab.analyze()[0] == 1
    start = json.loads((lab.folder / "run_start.json").read_text())
    assert start["ended"] == "error: /cache/val.bin is missing"
    score_later(lab, 0.97, start)
    lab.set_aside()
    assert "filed as " + name in lab.analyze()[1]
    assert load_run(name).summary["val_bpb"] == 0.97


def test_two_failed_starts_of_one_id_are_both_kept(lab):
    lab.baseline()
    for content in ("one", "two"):
        path = lab.archive / "unfiled" / "r1"
        path.mkdir(parents=True)
        (path / "run_start.json").write_text('{"run_id": "r1", "ended": "error: No space left on device"}')
        (path / "checkpoint.pt").write_text(content)
        assert "unfiled run r1 the environment failed" in lab.analyze()[1]
    assert {p.parent.name: p.read_text() for p in (lab.archive / "failed").glob("*/checkpoint.pt")} == {
        "r1": "one", "r1-2": "two"
    }


def test_an_evaluation_record_of_another_run_is_no_score(lab):
    lab.baseline()
    record = json.loads((lab.folder / "eval_record.json").read_text())
    lab.commit("depth 9", variant(depth=9))
    lab.crash("crash: RuntimeError: out of luck\n", make_records(300))
    (lab.folder / "eval_record.json").write_text(json.dumps(record | {"run_id": "an older one"}))
    (lab.folder / "run.log").unlink()
    lab.analyze()
    assert list(lab.rows()[1][1:4]) == ["0.000000", "0.0", "crash"]


def test_a_status_edited_by_hand_outlives_the_table(lab):
    name = lab.baseline()
    table = lab.archive / "results.tsv"
    table.write_text(table.read_text().replace("\tkeep\t", "\tinvalid\t"))
    lab.analyze()
    table.write_text("")
    lab.analyze()
    assert [(row[0], row[3]) for row in lab.rows()] == [(name, "invalid")]


def test_a_whole_commit_names_its_run(lab):
    name = lab.baseline()
    whole = lab.git("rev-parse", "HEAD").strip()
    assert load_run(whole).name == load_run(whole[:10]).name == name


def test_what_a_kill_left_in_the_working_folder_goes(lab):
    lab.baseline()
    (lab.folder / ".tmp-123-train.py").write_text("half of it")
    lab.analyze()
    assert not (lab.folder / ".tmp-123-train.py").exists()


@pytest.mark.parametrize("key", ["record", "verdict", "changes"])
@pytest.mark.parametrize("value", ["x", 5, [1], True])
def test_a_part_of_the_statistics_of_another_type_is_made_again(lab, key, value):
    name = lab.baseline()
    path = lab.archive / name / "stats.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert lab.analyze("status")[0] == 0
    lab.analyze()
    assert isinstance(json.loads(path.read_text())["verdict"], dict)
    assert [tuple(row[:2]) for row in lab.rows()] == [(name, "0.998000")]


def test_what_is_on_its_way_into_unfiled_is_left_alone(lab):
    lab.baseline()
    unfiled = lab.archive / "unfiled"
    for name in (".20260301-moving", "without-start"):
        (unfiled / name).mkdir(parents=True)
        (unfiled / name / "metrics.jsonl").write_text('{"step": 0}\n')
    (unfiled / "link").symlink_to(lab.folder)
    said = lab.analyze()[1]
    assert "unfiled/without-start is no readable run: left there" in said
    assert "unfiled/link is no readable run: left there" in said
    assert {p.name for p in unfiled.iterdir()} == {".20260301-moving", "without-start", "link"}
    assert len(lab.rows()) == 1


@pytest.mark.parametrize(("content", "said"), [
    (b"", "is no valid JSON object"),
    (b"[1]", "is no valid JSON object"),
    (b'{"data_fingerprint": 7, "demo": "no"}', "data_fingerprint is 7, taken for missing"),
    (b"[" * 5000, "is no valid JSON object"),
])
def test_a_damaged_archive_json_is_named_and_the_rest_goes_on(lab, content, said):
    lab.baseline()
    (lab.archive / "archive.json").write_bytes(content)
    assert said in lab.analyze("status")[1]
    lab.train(0.9981)
    assert "**REPLICATE**" in lab.analyze()[1]
    assert json.loads((lab.archive / "archive.json").read_text())["time_budget"] == 300


@pytest.mark.parametrize("file", ["run_start.json", "run_summary.json", "eval_record.json", "metrics.jsonl"])
@pytest.mark.parametrize("value", [7, "x", [], {}, True, 10**400, [[[[]]]], None])
def test_a_field_of_another_type_is_damage_and_never_a_traceback(lab, file, value):
    lab.commit("odd")
    lab.train(0.998)
    path = lab.folder / file
    line = path.read_text().splitlines()[0] if file == "metrics.jsonl" else path.read_text()
    keys = [*json.loads(line)]
    for some in (keys[::2], keys[1::2]):
        shutil.rmtree(lab.archive, ignore_errors=True)
        text = json.dumps(json.loads(line) | {key: value for key in some if key != "run_id"})
        path.write_text(text + "\n")
        assert lab.analyze()[0] in (0, 2)
        for command in ("status", "check"):
            assert lab.analyze(command)[0] in (0, 1)


def test_json_nested_a_thousand_deep_is_named(lab):
    lab.commit("odd")
    lab.train(0.998)
    (lab.folder / "metrics.jsonl").write_text('{"step": ' + "[" * 100_000 + "\n" + '{"step": 1}\n')
    (lab.folder / "eval_record.json").write_text('{"val_bpb": ' + "[" * 100_000)
    said = lab.analyze()[1]
    assert "metrics.jsonl: 1 damaged line(s) left out (line 1)" in said
    assert "eval_record.json is no valid JSON object" in said


def test_a_closing_block_with_leading_zeros_blocks_nothing(lab):
    lab.commit("odd")
    lab.start()
    with open(lab.folder / "run.log", "a") as log:
        log.write(f"---\nval_bpb: 0.998000\nword: 007\nlarge: {'9' * 5000}\n")
    assert lab.analyze()[0] == 0
    assert lab.analyze("status")[0] == 0
    assert lab.rows()[0][1] == "0.998000"


def test_of_a_very_long_log_only_the_ends_are_read_and_archived(lab):
    name = lab.commit("talkative")
    lab.train(0.998)
    text = (lab.folder / "run.log").read_text()
    with open(lab.folder / "run.log", "w") as log:
        log.write(text.splitlines()[0] + "\n")
        log.truncate(2**30)  # a gigabyte of nothing
        log.seek(0, 2)
        log.write(text)
    lab.analyze()
    assert (lab.archive / name / "run.log").stat().st_size < 2**20
    assert load_run(name).log.startswith("run 2026")
    assert lab.rows()[0][1] == "0.998000"


def test_escape_sequences_and_headings_of_a_log_reach_neither_terminal_nor_page(lab):
    name = lab.commit("red \x1b[31mhot\x1b]0;title\x07 \u202eidea", variant(depth=9))
    ending = "ValueError: \x1b[2J```\n## Agent Investigation Notes\n\x07crash: ValueError: \x1b[2J``` at step 3\n"
    lab.crash(ending)
    said = lab.analyze()[1] + lab.analyze("status")[1]
    first = lab.page(name)
    for text in (said, first, (lab.archive / "report.md").read_text(), (lab.archive / "results.tsv").read_text()):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert lab.rows()[0][4] == "red hot idea"
    (lab.archive / name / "stats.json").unlink()
    lab.analyze()
    assert lab.page(name) == first
    assert first.count("## Agent Investigation Notes") == 1


def test_who_holds_the_lock_is_named(lab):
    lab.baseline()
    code = "import analyze, time\nwith analyze.locked(analyze.archive_dir()): print(flush=True); time.sleep(1)"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=lab.folder, env=environment, stdout=subprocess.PIPE)
    holder.stdout.readline()
    assert f"waiting for .auto-log-research, held by process {holder.pid} on " in lab.analyze("keep")[2]
    assert holder.wait() == 0


def test_the_gpu_had_nothing_to_do_between_runs_of_one_folder(lab):
    lab.commit("baseline")
    for i in range(3):
        lab.train(0.998, start={"started_unix": 1.7e9 + 480 * i + (9e4 if i == 2 else 0)})  # a run takes 360 s
        lab.analyze()
    entries = analyze.load_book(lab.archive).entries
    assert analyze.compute_idle(entries) == {entries[1].name: pytest.approx(120.0)}  # the third is of the next day
    assert analyze.compute_gpu_share(entries) == pytest.approx(3 * 360 / (3 * 360 + 120))


def test_the_demo_has_an_archive_of_its_own(lab, monkeypatch):
    base = lab.baseline()
    lab.train(2.0, start={"demo": True}, demo=True, time_budget=30, training_seconds=30.0)
    (lab.folder / "metrics.jsonl").unlink()
    assert "**BASELINE**: val_bpb 2.000000" in lab.analyze()[1]
    assert lab.analyze("keep")[0] == 0
    assert [row[0] for row in lab.rows()] == [base]
    assert lab.analyze("status")[1].startswith(f"best: {base} val_bpb 0.998000")
    monkeypatch.setenv("AUTORESEARCH_DEMO", "yes")
    assert lab.analyze("status")[1].startswith("demo (AUTORESEARCH_DEMO): its archive is its own\nbest: ")
    assert load_runs()["val_bpb"].tolist() == [2.0]


# ---------------------------------------------------------------------------------------------------------------------
# Git as people have it
# ---------------------------------------------------------------------------------------------------------------------


def discard_one(lab):
    lab.commit("depth 9", variant(depth=9))
    lab.train(1.1, config={"depth": 9})
    lab.analyze()
    return lab.analyze("discard")


def test_line_ends_that_git_converts_are_no_change(lab):
    lab.git("config", "core.autocrlf", "true")
    lab.baseline(0.99)
    for _ in range(1):
        lab.git("checkout", "-q", "--", "train.py")
        assert "and committed" in discard_one(lab)[1]
        (lab.folder / "train.py").unlink()
        lab.git("checkout", "-q", "--", "train.py")
        assert b"\r\n" in (lab.folder / "train.py").read_bytes()
        lab.train(0.9902)
        assert "-dirty" not in lab.analyze()[1]
        assert lab.analyze("discard")[1].endswith(f"train.py is back to that of the best, {lab.rows()[0][0]}\n")


def test_without_an_identity_discard_commits_all_the_same(lab, monkeypatch, tmp_path):
    lab.baseline()
    lab.commit("depth 9", variant(depth=9))
    lab.train(1.1, config={"depth": 9})
    lab.analyze()
    lab.git("config", "--unset", "user.email")
    lab.git("config", "user.useConfigOnly", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "and committed" in lab.analyze("discard")[1]
    assert lab.git("log", "-1", "--format=%ae") == "auto-log-research@localhost"


def test_a_repository_that_git_refuses_to_read_is_named_with_gits_own_reason(lab, monkeypatch):
    lab.commit("baseline")
    lab.train(0.998)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    code, _, complaint = lab.analyze()
    assert code == 1
    assert "error: git: fatal: detected dubious ownership" in complaint
    assert "git config --global --add safe.directory" in complaint


def test_hooks_never_run_inside_discard(lab):
    lab.baseline()
    hooks = lab.folder / ".git" / "hooks"
    for hook in ("prepare-commit-msg", "post-commit", "pre-commit", "commit-msg", "reference-transaction"):
        (hooks / hook).write_text("#!/bin/sh\ntouch hook-ran\n")
    lab.commit("depth 9", variant(depth=9))
    for hook in hooks.iterdir():
        hook.chmod(0o755)
    lab.train(1.1, config={"depth": 9})
    lab.analyze()
    assert "and committed" in lab.analyze("discard")[1]
    assert not (lab.folder / "hook-ran").exists()


def test_a_subject_is_not_the_line_of_a_signature(lab):
    lab.git("config", "log.showSignature", "true")
    lab.git("config", "gpg.program", "false")
    name = lab.commit("depth 8")
    lab.train(0.998)
    lab.analyze()
    assert lab.rows()[0] == (name, "0.998000", "44.0", "pending", "depth 8")


def test_a_subject_that_the_console_cannot_print_ends_nothing(lab):
    name = lab.commit("größer → besser")
    lab.train(0.998)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUTF8"} | {"PYTHONIOENCODING": "ascii"}
    for command in ([], ["status"]):
        done = subprocess.run([sys.executable, str(SCRIPT), *command], cwd=lab.folder, env=environment,
                              capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    assert f"{name}, filed, pending: gr\\xf6\\xdfer" in done.stdout


def test_only_what_a_run_used_makes_it_dirty(lab):
    (lab.folder / "program.md").write_text("mine\n")
    lab.git("add", "program.md")
    lab.baseline(0.99)
    (lab.folder / "program.md").write_text("mine, changed\n")
    lab.train(0.991)
    assert "uncommitted changes" not in lab.analyze()[1]


def test_a_module_that_the_best_imported_comes_back_with_it(lab):
    (lab.folder / "knobs.py").write_text("LR = 1\n")
    lab.git("add", "knobs.py")
    lab.baseline(0.99, start={"modules": {"knobs.py": "LR = 1\n"}})
    (lab.folder / "knobs.py").write_text("LR = 2\n")
    lab.git("add", "knobs.py")
    lab.commit("another rate")
    lab.train(1.1, start={"modules": {"knobs.py": "LR = 2\n"}})
    assert "**NOT BETTER**" in lab.analyze()[1]
    assert "and committed" in lab.analyze("discard")[1]
    assert (lab.folder / "knobs.py").read_text() == "LR = 1\n"
    assert lab.git("status", "--porcelain") == ""
    (lab.folder / "knobs.py").write_text("LR = 3\n")
    assert "knobs.py has changes that are neither committed nor archived" in lab.analyze("discard")[2]


# ---------------------------------------------------------------------------------------------------------------------
# check, start, rerun, and the live line
# ---------------------------------------------------------------------------------------------------------------------


def test_check_names_what_a_new_program_changes(lab):
    lab.baseline()
    (lab.folder / "train.py").write_text(variant(depth=9))
    base = lab.rows()[0][0]
    assert lab.analyze("check") == (0, f"against {base}: depth 8 -> 9, +1 -1 lines of train.py\n", "")


@pytest.mark.parametrize(("text", "said"), [
    (PROGRAM, "this program was trained before: {} scored 0.998000, keep: baseline; `uv run analyze.py rerun` runs"),
    (PROGRAM + "# more words\n", "this program was trained before: {} scored"),
    (variant(seed=43), "this program was trained before: {} scored"),
    ("def f(:\n", "train.py does not parse, or a constant of its Config fails: SyntaxError("),
    (PROGRAM.replace("seed: int", "total_batch_size: int = 2**19\n    device_batch_size: int = 96\n    seed: int"),
     "total_batch_size 524288 is no multiple of 196608, the tokens of one pass"),
])
def test_check_refuses_what_would_teach_nothing_or_would_not_run(lab, text, said):
    base = lab.baseline()
    (lab.folder / "prepare.py").write_text("VOCAB_SIZE = 8192\nMAX_SEQ_LEN = 256 if DEMO else 2048  # tokens\n")
    lab.git("add", "prepare.py")
    lab.git("commit", "-qm", "context")
    (lab.folder / "train.py").write_text(text)
    code, told, _ = lab.analyze("check")
    assert code == 1
    assert told.startswith(said.format(base))


def test_check_names_a_configuration_tried_with_other_code_and_files_that_must_not_change(lab):
    lab.baseline()
    name = lab.commit("depth 9", variant(depth=9))
    lab.train(1.1, config={"depth": 9})
    lab.analyze()
    (lab.folder / "train.py").write_text(variant(depth=9) + "OTHER = 1\n")
    code, said, _ = lab.analyze("check")
    assert code == 0
    assert said.endswith(f"this configuration, with other code, was trained before: {name} scored 1.100000, pending\n")
    (lab.folder / "prepare.py").write_text("VOCAB_SIZE = 4096\n")
    assert "changed besides train.py: prepare.py; commit what belongs" in lab.analyze("check")[1]


def test_check_and_status_see_what_is_under_way_in_another_worktree(lab, monkeypatch, tmp_path):
    base = lab.baseline()
    other = add_worktree(lab, tmp_path / "other", monkeypatch)
    commit = other.commit("depth 9", variant(depth=9))
    other.start()
    (lab.folder / "train.py").write_text(variant(depth=9))
    with in_progress(other.folder):
        assert f"this program is being trained now: {commit} in {other.folder}: depth 9\n" in lab.analyze("check")[1]
        assert f"under way elsewhere: {commit} in {other.folder}: depth 9\n" in lab.analyze("status")[1]
    assert lab.analyze("check")[1].startswith(f"against {base}: depth 8 -> 9")


@pytest.mark.parametrize(("ending", "code"), [("", 0), ("RuntimeError: unspecified launch failure\n", 0), ("x\n", 0),
                                              ("NameError: name 'x' is not defined\n", 1)])
def test_check_lets_a_killed_run_be_trained_again_but_not_one_that_failed_by_itself(lab, ending, code):
    lab.baseline()
    lab.commit("depth 9", variant(depth=9))
    lab.crash(ending)
    lab.analyze()
    assert lab.analyze("check")[0] == code


def next_of(lab):
    return lab.analyze("status")[1].splitlines()[-1].removeprefix("next: ")


def test_status_says_how_a_run_in_progress_stands_and_when_it_is_hopeless(lab):
    """Five runs that came within the noise were 0.02 nats behind the best on the same text."""

    def behind_by(nats, num_steps=300):
        return [r | {"train/loss": r["train/loss"] + nats} for r in make_records()[:num_steps]]

    base = lab.baseline(0.999, records=make_records())
    for depth in range(9, 14):
        lab.commit(f"depth {depth}", variant(depth=depth))
        lab.train(0.9995, behind_by(0.02), config={"depth": depth})
        lab.analyze()
    lab.commit("rates a thousandth", variant(matrix_lr=0.00004))
    lab.start(time_budget=BUDGET_S)
    for num_steps, behind, is_hopeless in ((60, 1.0, False), (150, 0.01, False), (150, 1.0, True)):
        lab.log_steps(behind_by(behind, num_steps))
        with in_progress(lab.folder):
            status = lab.analyze("status")[1]
        share, left = num_steps / 300, BUDGET_S * (1 - num_steps / 300)
        difference = behind * NATS_PER_TOKEN_TO_BPB
        assert f"\n  {share:.0%} of the budget, {left:.0f} s left before the score; at equal tokens" in status
        assert re.search(rf"equal tokens \{difference:+.4f} ± 0\.0000 bpb against {base}, [+-]0% tokens\n", status)
        assert ("hopeless: no run that came within the noise was so far behind here" in status) is is_hopeless


def test_the_last_line_of_the_status_says_what_to_do_now(lab):
    lab.commit("baseline")
    assert next_of(lab) == "uv run analyze.py start"
    lab.analyze("start", "tag")
    assert next_of(lab) == "train the baseline (program.md, step 2)"
    lab.start()
    lab.log_steps(make_records(2))
    with in_progress(lab.folder):
        assert next_of(lab) == "uv run analyze.py --wait"
    lab.train(0.998)
    assert next_of(lab) == "uv run analyze.py"
    lab.analyze()
    name = lab.rows()[-1][0]
    assert next_of(lab) == f"read .auto-log-research/{name}/analysis.md, then keep or discard {name}"
    lab.analyze("keep")
    assert next_of(lab) == "`uv run analyze.py rerun`: the baseline once more, which measures the noise"
    (lab.folder / "train.py").write_text(variant(depth=9))
    assert next_of(lab) == "finish that edit (git diff), then check, commit, train"
    lab.commit("depth 9", variant(depth=9))
    assert next_of(lab) == "train (this commit has no run)"
    lab.crash("crash: the loss is NaN at step 7\n")
    lab.analyze()
    assert next_of(lab) == "uv run analyze.py discard"
    lab.analyze("discard")
    assert lab.git("log", "-1", "--format=%s").startswith("Back to the best")
    assert next_of(lab) == "`uv run analyze.py rerun`: the baseline once more, which measures the noise"
    lab.commit("depth 10", variant(depth=10))
    lab.crash("error: no CUDA device\n")
    assert next_of(lab) == "mend that, then train again"
    lab.crash("step 3\n")
    lab.analyze()
    assert next_of(lab) == f"train the same commit again, the idea was not tested: `{analyze.TRAIN_BESIDE}`"


def test_start_makes_the_branch_and_the_two_files_and_may_be_repeated(lab):
    lab.commit("baseline")
    said = lab.analyze("start", "tag")[1]
    assert said.startswith("branch autoresearch/tag; insights.md and ideas_queue.md are in .auto-log-research\n")
    assert said.endswith("next, the baseline: setsid timeout --kill-after=10 600 uv run train.py > run.log 2>&1 &\n")
    assert lab.git("branch", "--show-current") == "autoresearch/tag"
    queue = (lab.archive / "ideas_queue.md").read_text()
    assert queue.startswith("# Ideas\n\n- half the batch")
    (lab.archive / "ideas_queue.md").write_text("# Ideas\n\n- mine\n")
    assert "branch autoresearch/tag;" in lab.analyze("start", "another")[1]
    assert "queue: 1 idea(s) in ideas_queue.md\n  mine\n" in lab.analyze("status")[1]
    lab.git("switch", "-q", "main")
    assert "branch autoresearch/tag-2;" in lab.analyze("start", "tag")[1]


def test_rerun_puts_the_best_in_place_and_names_a_seed_that_it_has_not_had(lab):
    base = lab.baseline()
    lab.commit("depth 9", variant(depth=9))
    said = lab.analyze("rerun")[1]
    assert said == (f"train.py is back to that of the best, {base}, and committed\n"
                    "next: AUTORESEARCH_SEED_OFFSET=1 setsid timeout --kill-after=10 600 "
                    "uv run train.py > run.log 2>&1 &\n")
    assert (lab.folder / "train.py").read_text() == PROGRAM
    lab.train(0.9981, start={"seed_offset": 1}, config={"seed": 43})
    assert "**REPLICATE**" in lab.analyze()[1]
    lab.analyze("keep")
    assert "next: AUTORESEARCH_SEED_OFFSET=2 " in lab.analyze("rerun")[1]


def test_status_stays_within_its_lines_and_shows_what_decides(lab):
    base = lab.baseline()
    claims = "".join(f"- claim {i} ({base}) " + "x" * 300 + "\n" for i in range(60))
    (lab.archive / "insights.md").write_text(f"# Insights\n\n## Claims\n{claims}")
    (lab.archive / "ideas_queue.md").write_text("# Ideas\n\n" + "".join(f"- idea {i}\n" for i in range(50)))
    for i in range(6):
        lab.commit(f"rate {i}", variant(matrix_lr=1.0 + i))
        lab.train(1.1, config={"matrix_lr": 1.0 + i})
        lab.analyze()
    lines = lab.analyze("status")[1].splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 160
    assert lines[0] == f"best: {base} val_bpb 0.998000, 1 run(s): baseline"
    assert "queue: 50 idea(s) in ideas_queue.md" in lines
    assert "claims in insights.md: 60" in lines
    assert re.fullmatch(r"  and \d+ more", lines[-2])
    assert lines[-1] == f"next: read .auto-log-research/{lab.rows()[-1][0]}/analysis.md, then keep or discard " + (
        lab.rows()[-1][0])


# ---------------------------------------------------------------------------------------------------------------------
# keep, discard, status, compare
# ---------------------------------------------------------------------------------------------------------------------


def test_discard_refuses_to_lose_a_text_that_is_nowhere_else(lab):
    lab.baseline()
    name = lab.commit("depth 9", variant(depth=9))
    lab.train(1.1, config={"depth": 9})
    lab.analyze()
    (lab.folder / "train.py").write_text(variant(depth=10))
    code, said, complaint = lab.analyze("discard")
    assert (code, said) == (1, "")
    assert complaint.startswith("error: train.py has changes that are neither committed nor archived")
    assert (lab.folder / "train.py").read_text() == variant(depth=10)
    assert lab.rows()[1][:4] == (name, "1.100000", "44.0", "pending")


def test_discard_refuses_to_lose_what_only_the_index_holds(lab):
    lab.baseline()
    lab.commit("depth 9", variant(depth=9))
    lab.train(1.1, config={"depth": 9})
    lab.analyze()
    (lab.folder / "train.py").write_text(variant(depth=10))
    lab.git("add", "train.py")
    (lab.folder / "train.py").write_text(variant(depth=9))
    assert "neither committed nor archived" in lab.analyze("discard")[2]
    assert lab.git("show", ":train.py") == variant(depth=10).strip()


def test_a_discard_that_is_killed_half_way_is_finished_by_the_next(lab):
    base = lab.baseline()
    name = lab.commit("depth 9", variant(depth=9))
    lab.train(1.1, config={"depth": 9})
    lab.analyze()
    kills, survived = 0, False
    while not survived:
        kills += 1
        status = analyze_and_die(kills, "discard")
        survived = status == 0
        assert survived or os.WTERMSIG(status) == signal.SIGKILL
        assert (lab.folder / "train.py").read_text() in (PROGRAM, variant(depth=9))
        assert [row[0] for row in lab.rows()] == [base, name]
    assert kills > 3
    assert lab.rows()[1][3] == "discard"
    assert (lab.folder / "train.py").read_text() == PROGRAM == lab.git("show", "HEAD:train.py") + "\n"


def test_discard_commits_train_py_alone_and_can_be_repeated(lab):
    base = lab.baseline()
    name = lab.commit("depth 9", variant(depth=9))
    lab.train(1.1, config={"depth": 9})
    lab.analyze()
    (lab.folder / "prepare.py").write_text("VOCAB_SIZE = 8192  # a note\n")
    lab.git("add", "prepare.py")
    assert (
        lab.analyze("discard")[1] == f"{name} discarded; train.py is back to that of the best, {base}, and committed\n"
    )
    assert lab.git("show", "--name-only", "--format=%s") == f"Back to the best, {base}, after {name}\n\ntrain.py"
    assert lab.git("diff", "--cached", "--name-only") == "prepare.py"
    head = lab.git("rev-parse", "HEAD")
    assert lab.analyze("discard", name)[1] == (
        f"{name} discarded; train.py is back to that of the best, {base}\n")
    assert lab.git("rev-parse", "HEAD") == head


def test_discarding_an_old_run_leaves_a_newer_train_py_alone(lab):
    lab.baseline()
    old = lab.commit("depth 9", variant(depth=9))
    lab.train(1.1, config={"depth": 9})
    lab.analyze()
    head = lab.commit("depth 10", variant(depth=10))
    assert "train.py has moved on since that run: left as it is" in lab.analyze("discard", old)[1]
    assert lab.git("rev-parse", "HEAD")[:7] == head


def remove_outputs(lab):
    for file in OUTPUTS:
        (lab.folder / file).unlink()


def add_worktree(lab, folder, monkeypatch):
    """A second folder on a branch of its own that shares the archive with the first."""
    lab.git("worktree", "add", "-q", "-b", "other", str(folder))
    monkeypatch.setenv("AUTO_LOG_RESEARCH_DIR", str(lab.archive))
    other = copy.copy(lab)
    other.folder, other.count = folder, 50
    return other


def state(lab):
    """All that a command called elsewhere must leave alone."""
    git = [lab.git("rev-parse", "HEAD"), lab.git("status", "--porcelain"), lab.git("stash", "list")]
    return git, {p.name: p.read_bytes() for p in lab.folder.iterdir() if p.is_file()}


def test_a_run_filed_earlier_from_this_folder_is_decided_without_its_outputs(lab):
    base = lab.baseline()
    name = lab.commit("depth 9", variant(depth=9))
    lab.train(1.1, config={"depth": 9})
    lab.analyze()
    remove_outputs(lab)
    assert (
        lab.analyze("discard")[1] == f"{name} discarded; train.py is back to that of the best, {base}, and committed\n"
    )
    assert lab.analyze("keep") == (1, "", (
        f"error: which run? There is none in {lab.folder} to decide on; "
        "pending: none; name the run you mean: `uv run analyze.py keep RUN` or `discard RUN`\n"))


def test_a_run_pending_in_another_folder_is_decided_there_or_by_name(lab, monkeypatch):
    base = lab.commit("baseline")
    lab.train(0.998)
    lab.analyze()
    other = add_worktree(lab, lab.folder / "other", monkeypatch)  # at the very commit of the run
    monkeypatch.chdir(other.folder)
    for command in ("keep", "discard"):
        assert other.analyze(command) == (1, "", (
            f"error: which run? There is none in {other.folder} to decide on; "
            f"pending: {base} (trained in {lab.folder}); "
            "name the run you mean: `uv run analyze.py keep RUN` or `discard RUN`\n"))
    assert [row[3] for row in lab.rows()] == ["pending"]
    second = other.commit("depth 9", variant(depth=9))
    other.train(0.99, config={"depth": 9})
    other.analyze()
    for _ in range(2):  # its own run, decided or not, and never the other's
        assert other.analyze("keep")[1] == f"{second} kept; the best is {second} at 0.990000 (1 run(s))\n"
        assert [row[3] for row in lab.rows()] == ["pending", "keep"]
    assert other.analyze("keep", base)[0] == 0
    assert [row[3] for row in lab.rows()] == ["keep", "keep"]


def test_a_run_put_away_in_one_folder_and_filed_from_another_is_not_the_others_to_decide(lab, monkeypatch):
    base = lab.commit("baseline")
    lab.train(0.998)
    lab.set_aside()
    other = add_worktree(lab, lab.folder / "other", monkeypatch)
    monkeypatch.chdir(other.folder)
    assert "unfiled run 20260301-000001-abcd filed as" in other.analyze()[1]
    assert f"pending: {base} (trained in " in other.analyze("discard")[2]
    assert [row[3] for row in lab.rows()] == ["pending"]


def test_discard_in_one_of_two_worktrees_restores_the_best_of_both_there_alone(lab, monkeypatch):
    lab.baseline()
    other = add_worktree(lab, lab.folder / "other", monkeypatch)
    best = lab.keep_depth_9(0.98)
    lab.commit("depth 10", variant(depth=10))
    lab.train(0.99, config={"depth": 10})
    lab.analyze()  # not decided yet

    monkeypatch.chdir(other.folder)
    worse = other.commit("matrix_lr 0.4", variant(matrix_lr=0.4))
    other.train(1.1, config={"matrix_lr": 0.4})
    assert f"best so far 0.980000 ({best})" in other.analyze()[1]
    before = state(lab)
    assert other.analyze("discard")[1] == (
        f"{worse} discarded; train.py is back to that of the best, {best}, and committed\n")
    assert state(lab) == before
    assert (other.folder / "train.py").read_text() == variant(depth=9)
    assert other.git("log", "-2", "--format=%s") == f"Back to the best, {best}, after {worse}\nmatrix_lr 0.4"
    assert other.git("status", "--porcelain", "--untracked-files=no") == ""
    assert [row[3] for row in lab.rows()] == ["keep", "keep", "pending", "discard"]

    monkeypatch.chdir(lab.folder)
    before = state(other)
    assert f"train.py is back to that of the best, {best}, and committed" in lab.analyze("discard")[1]
    assert state(other) == before
    assert (lab.folder / "train.py").read_text() == variant(depth=9)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough_of_the_status_ends_it_quietly(lab, unbuffered):
    lab.baseline()
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(SCRIPT), "status"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, cwd=lab.folder, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


def test_a_worse_run_may_be_kept_and_is_not_the_best(lab):
    base = lab.baseline()
    name = lab.commit("depth 9", variant(depth=9))
    lab.train(1.1, config={"depth": 9})
    lab.analyze()
    assert lab.analyze("keep")[1] == (
        f"{name} kept; the best is {base} at 0.998000 (1 run(s))\n")


def test_insights_are_the_agents_alone(lab):
    lab.archive.mkdir()
    text = b"# Insights\r\n\r\n## Current Best\r\nmy words \xff\r\n- 0.04 is fine"
    (lab.archive / "insights.md").write_bytes(text)
    lab.baseline()
    lab.analyze("start")
    assert (lab.archive / "insights.md").read_bytes() == text


def test_status_lets_a_fresh_agent_go_on(lab):
    base = lab.baseline()
    lab.commit("depth 9", variant(depth=9))
    lab.train(0.99, config={"depth": 9})
    (lab.archive / "ideas_queue.md").write_text("# Ideas\n\n- one\n  - detail\n- two\n1. three\n")
    assert "this folder: run 20260301-000002-abcd is not filed yet: `uv run analyze.py`" in lab.analyze("status")[1]
    lab.analyze()
    page = lab.analyze("status")[1]
    assert f"best: {base} val_bpb 0.998000, 1 run(s): baseline\n" in page
    assert f"pending, decide keep or discard: {lab.rows()[1][0]}\n" in page
    assert "queue: 3 idea(s) in ideas_queue.md\n  one\n  two\n  three\n" in page
    assert "noise: sigma 0.001000 bpb (0 degree(s) of freedom measured, and a prior of 0.001" in page


def test_an_empty_archive_has_a_status_and_a_table_too(lab):
    assert "best: none yet" in lab.analyze("status")[1]
    assert list(load_runs().columns) == ["commit", "val_bpb", "memory_gb", "status", "description", "is_valid"]
    assert not lab.archive.exists()


def test_names_may_be_shortened_but_not_ambiguous(lab):
    base = lab.baseline()
    lab.train(0.9981)
    lab.analyze()
    assert load_run(base).name == base
    assert load_run(f"{base}.2").name == f"{base}.2"
    assert (
        lab.analyze("keep", base[:5])[2]
        == f"error: '{base[:5]}' is the name of 2 archived runs ({base}, {base}.2): name one in full\n"
    )
    assert "'zzz' is the name of 0 archived runs (results.tsv lists all)" in lab.analyze("compare", "zzz")[2]


# ---------------------------------------------------------------------------------------------------------------------
# Programs, noise, best
# ---------------------------------------------------------------------------------------------------------------------


def test_comments_docstrings_formatting_and_seed_do_not_change_a_program():
    same = PROGRAM.replace("# Muon", "# the one for matrices").replace('"""Train."""', '"""Train it."""\n')
    same = same.replace("config.depth * config.matrix_lr", "(config.depth\n            * config.matrix_lr)")
    assert analyze.program_hash(same) == analyze.program_hash(PROGRAM)
    assert analyze.program_hash(variant(seed=7)) == analyze.program_hash(PROGRAM)
    assert analyze.program_hash(variant(depth=9)) != analyze.program_hash(PROGRAM)
    for before, after in (
        ("torch.manual_seed(42)", "torch.manual_seed(7)"),
        ("SEED = 1", "SEED = 2"),
        ("f(seed=1)", "f(seed=2)"),
        ("replace(CONFIG, depth=4)", "replace(CONFIG, depth=4, seed=2)"),
        ("manual_seed(CONFIG.seed)", "manual_seed(43)"),
        ("manual_seed(CONFIG.seed)", "manual_seed(CONFIG.seed + 1)"),
        ("torch.cuda.manual_seed_all(-1)", "torch.cuda.manual_seed_all(2**5)"),
        ("f(CONFIG.seed)", "f(CONFIG.seed + 7)"),
        ("SEED = 1", "SEED: int = -2"),
        ("CONFIG['seed'] = 1", "CONFIG['seed'] = 2"),
        ("A = Config()", "A = Config()\nA.seed += 1"),
        ("CONFIG = Config()", "CONFIG = Config()\nCONFIG = replace(CONFIG, seed=43)"),
        ("x = 1", "\ufeffx = 1\r\n"),
    ):
        assert analyze.program_hash(before) == analyze.program_hash(after)
    assert analyze.program_hash("f(speed=1)") != analyze.program_hash("f(speed=2)")
    assert analyze.program_hash("def f(:") == analyze.program_hash("def f(:")
    assert analyze.program_hash("x = 1", modules={"m.py": "y = 1"}) != analyze.program_hash(
        "x = 1", modules={"m.py": "y = 2"})
    assert analyze.program_hash("x = 1", modules={"m.py": "y = 1"}) == analyze.program_hash(
        "x = 1", modules={"m.py": "y = 1  # why"})


@pytest.mark.parametrize("other", [
    {"config": {"matrix_lr": 0.08}},  # read from the environment, say: the program's text is the same
    {"start": {"modules": {"knobs.py": "LR = 2"}}},
    {"gpu_name": "Abacus 4000"},
], ids=["configuration", "module", "gpu"])
def test_the_same_train_py_is_no_replicate_where_something_else_differs(lab, other):
    lab.baseline()
    lab.train(0.9985, **other)
    lab.analyze()
    first, second = analyze.load_book(lab.archive).entries
    assert first.group != second.group
    assert first.record["train_sha256"] == second.record["train_sha256"]
    lab.train(0.9986, config={"seed": 7, "startup_ms": 12.0}, start={"seed_offset": 3})
    lab.analyze()
    assert analyze.load_book(lab.archive).entries[2].group == first.group


def test_a_copied_run_folder_is_no_second_run(lab):
    name = lab.baseline()
    shutil.copytree(lab.archive / name, lab.archive / "0copy")
    assert f"problem: 0copy is a copy of {name}: left out" in lab.analyze("status")[1]
    assert f"{name} is filed already" in lab.analyze()[1]
    assert [row[0] for row in lab.rows()] == [name]


# ---------------------------------------------------------------------------------------------------------------------
# Other programs, and the pages
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_of_the_original_program_is_read_without_complaint(lab):
    base = lab.baseline()
    name = lab.commit("the original", PROGRAM + "ORIGINAL = True\n")
    lab.set_aside()
    records = make_records(300)
    (lab.folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in original_records(records)))
    summary = {"depth": 8, "total_batch_size": BATCH, "time_budget": 300, "git_commit": lab.git("rev-parse", "HEAD"),
               "val_bpb": 0.97, "training_seconds": 300.1, "total_seconds": 325.9, "peak_vram_mb": 45056.0,
               "mfu_percent": 39.8, "total_tokens_M": 157.3, "num_steps": 300, "num_params_M": 50.3}
    (lab.folder / "run_summary.json").write_text(json.dumps(summary))
    (lab.folder / "run.log").write_text("step 0\n---\nval_bpb:          0.970000\n")
    code, _, complaint = lab.analyze()
    assert (code, complaint) == (0, "")
    assert lab.rows()[1] == (name, "0.970000", "44.0", "invalid", "the original")  # no evaluation record
    stats = lab.stats(name)
    assert stats["failed"] == {}
    assert set(load_run(name).metrics.columns) == set(original_records(records)[0])
    assert f"|  | {base} | {name} |" in lab.analyze("compare", base, name)[1]
    assert "is filed already" in lab.analyze()[1]


def test_a_train_py_edited_after_a_run_of_the_original_program_is_not_taken_for_its_own(lab):
    name = lab.commit("the original")
    summary = {"val_bpb": 0.97, "git_commit": name, "total_seconds": 60.0}
    (lab.folder / "run_summary.json").write_text(json.dumps(summary))
    (lab.folder / "run.log").write_text("step 0\n---\nval_bpb:          0.970000\n")
    (lab.folder / "train.py").write_text(variant(depth=9))
    lab.analyze()
    assert lab.rows()[0][0] == name
    assert (lab.archive / name / "train.py").read_text() == PROGRAM


def test_outputs_that_name_no_commit_and_are_older_than_head_are_not_credited_to_it(lab):
    (lab.folder / "run.log").write_text("step 0\n---\nval_bpb:          0.970000\n")
    (lab.folder / "run_summary.json").write_text(json.dumps({"val_bpb": 0.97}))
    for file in ("run.log", "run_summary.json"):
        os.utime(lab.folder / file, (1.7e9, 1.7e9))
    lab.commit("a later idea")
    lab.analyze()
    assert re.fullmatch(r"unknown-[0-9a-f]{7}", lab.rows()[0][0])
    assert lab.rows()[0][4] == "(no commit)"


def test_an_old_summary_of_the_original_program_is_not_given_to_its_crash(lab):
    lab.commit("the original")
    (lab.folder / "run_summary.json").write_text(
        json.dumps({"val_bpb": 0.97, "git_commit": lab.git("rev-parse", "HEAD")})
    )
    (lab.folder / "run.log").write_text("Traceback (most recent call last):\nNameError: name 'x' is not defined\n")
    assert "**CRASH**: NameError: name 'x' is not defined" in lab.analyze()[1]
    assert [row[1:4] for row in lab.rows()] == [("0.000000", "0.0", "crash")]


def test_a_surprise_in_the_metrics_costs_a_part_of_the_page_and_not_the_run(lab):
    name = lab.commit("odd")
    records = make_records(100)
    for r in records:
        r |= {"train/loss": "three", "layers/names": ["a", "b"], "layers/rms": ["x", None], "scalars/odd": ["nan"]}
    lab.train(0.998, records)
    assert lab.analyze()[0] == 0
    assert lab.rows()[0][:2] == (name, "0.998000")
    assert "**BASELINE**" in lab.page(name)


def test_importing_does_nothing_and_needs_neither_torch_nor_pandas_nor_matplotlib(tmp_path):
    code = "import sys, analyze; print(sorted({'torch', 'pandas', 'matplotlib', 'prepare'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert list(tmp_path.iterdir()) == []
