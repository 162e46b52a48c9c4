"""analyze.py against hand-made runs whose answers are known, in real git repositories; one night is trained."""

import copy
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import command_env

import analyze
from analyze import load_run, load_runs

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
            "git_dirty": bool(self.git("status", "--porcelain", "--untracked-files=no")),
            "train_py": text,
            "train_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "prepare_sha256": hashlib.sha256((self.folder / "prepare.py").read_bytes()).hexdigest(),
            "data_fingerprint": "0123456789abcdef",
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
                  "data_fingerprint": "0123456789abcdef", "prepare_sha256": start["prepare_sha256"]}
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
        self.train(val_bpb, **{"records": make_records(300)} | kwargs)
        assert self.analyze()[0] == 0
        assert self.analyze("keep")[0] == 0
        if is_usual:
            shutil.copytree(self.folder, self.usual)
        return name


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return tmp_path_factory.mktemp("usual") / "folder"


@pytest.fixture
def lab(tmp_path, monkeypatch, capsys, usual):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AUTO_LOG_RESEARCH_DIR", raising=False)
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
    assert "2 runs of this program: mean 0.998200, standard deviation 0.000283." in lab.page(f"{base}.2")
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
    assert "**CRASHED**: out of GPU memory at step 0" in lab.analyze()[1]
    assert "stays crash; train.py is back to that of the best" in lab.analyze("discard")[1]

    seeded = lab.commit("lucky seed", variant(depth=9, seed=1337))
    lab.train(0.985, config={"depth": 9, "seed": 1337})
    said = lab.analyze()[1]
    assert "**REPLICATE** of the best" in said
    assert f"nothing but the seed differs from {better}" in said
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
    assert f"train.py had uncommitted changes: the run is not credited to commit {head}" in said
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


class Night:
    """A repository with the real scripts, in which every run is trained for a second on the CPU."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.archive = folder, folder / ".auto-log-research"
        self.env = command_env(cache, AUTORESEARCH_DEMO="1", AUTORESEARCH_TIME_BUDGET="1", CUDA_VISIBLE_DEVICES="")
        for name in ("prepare.py", "analyze.py", "train.py", ".gitignore"):
            shutil.copy(SCRIPT.parent / name, folder)
        self.original = (folder / "train.py").read_text()
        self.git("init", "-q")
        self.git("config", "user.email", "night@example.org")
        self.git("config", "user.name", "Night")
        self.git("add", ".")

    def git(self, *arguments):
        done = subprocess.run(["git", *arguments], cwd=self.folder, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def edit(self, *changes, **config):
        """train.py with these texts replaced, and this configuration on top of a tiny one."""
        text = self.original
        given = {"depth": 2, "aspect_ratio": 32} | config
        old, new = "CONFIG = Config()\n", f"CONFIG = Config({', '.join(f'{k}={v}' for k, v in given.items())})\n"
        for before, after in [(old, new), *changes]:
            assert text.count(before) == 1, before
            text = text.replace(before, after)
        (self.folder / "train.py").write_text(text)

    def commit(self, subject, *changes, **config):
        self.edit(*changes, **config)
        self.git("commit", "-qam", subject)
        return self.git("rev-parse", "HEAD")[:7]

    def train(self):
        with open(self.folder / "run.log", "w") as log:
            command = [sys.executable, "train.py"]
            done = subprocess.run(command, cwd=self.folder, env=self.env, stdout=log, stderr=subprocess.STDOUT)
        return done.returncode

    def start_analyze(self, *arguments):
        return subprocess.Popen([sys.executable, "analyze.py", *arguments], cwd=self.folder, env=self.env,
                                stdout=subprocess.PIPE, text=True)

    def analyze(self, *arguments):
        call = self.start_analyze(*arguments)
        said = call.communicate()[0]
        assert call.returncode == 0
        return said

    def row(self, name, status, description):
        """What the books must say of a finished run, from the summary it left."""
        summary = load_run(name, self.archive).summary
        return f"{name}\t{summary['val_bpb']:.6f}\tnan\t{status}\t{description}"


def test_a_night_of_real_runs_on_the_cpu_demo(demo, tmp_path):
    night = Night(tmp_path, demo[0])
    base = night.commit("baseline", unembedding_lr=0.0)  # predicts no token over another, however slow the machine is
    assert night.train() == 0
    assert f"run {base}\n**BASELINE**: val_bpb " in night.analyze()
    night.analyze("keep")

    assert night.train() == 0  # a replicate, filed by two at once
    said = sorted(call.communicate()[0] for call in [night.start_analyze(), night.start_analyze()])
    assert said[0].startswith(f"{base}.2 is filed already: nothing changed\nrun {base}.2\n**REPLICATE** of the best")
    assert said[1].startswith(f"run {base}.2\n**REPLICATE** of the best, no new idea: val_bpb ")
    night.analyze("keep")

    better = night.commit("unembedding_lr 0.004", unembedding_lr=0.004)
    assert night.train() == 0
    assert "**NEW BEST**: val_bpb " in night.analyze()
    page = (night.archive / better / "analysis.md").read_text()
    assert "train.py: +1 -1 lines (`train.diff`).\n- `unembedding_lr`: 0.0 -> 0.004\n" in page
    night.analyze("keep")
    good = (night.folder / "train.py").read_text()

    worse = night.commit("unembedding_lr 10", unembedding_lr=10.0)  # as sure as can be, and wrong
    assert night.train() == 0
    assert "**NOT BETTER**: val_bpb " in night.analyze()
    said = night.analyze("discard")
    assert said == f"{worse} discarded; train.py is back to that of the best, {better}, and committed\n"
    assert (night.folder / "train.py").read_text() == good

    embedding = "x = x0 = norm(self.wte(idx))"
    cut = (embedding, f"{embedding}[..., :-1]")
    broken = night.commit("too narrow", cut, unembedding_lr=0.004)
    assert night.train() == 1
    shutil.copy(night.archive / better / "run_summary.json", night.folder)  # a stale summary
    said = night.analyze()
    assert "**CRASHED**: RuntimeError: mat1 and mat2 shapes cannot be multiplied" in said
    assert "run_summary.json is of run" in said
    assert "Looks like: shapes do not fit." in (night.archive / broken / "analysis.md").read_text()
    night.analyze("discard")

    seeded = night.commit("another seed", unembedding_lr=0.004, seed=43)
    assert night.train() == 0
    said = night.analyze()
    assert "**REPLICATE** of the best, no new idea: " in said
    assert f"Counted as a replicate: nothing but the seed differs from {better}." in said
    night.analyze("discard")

    ahead = (embedding, f"{embedding} + 0.1 * norm(self.wte(idx.roll(-1, 1)))")
    leaking = night.commit("look ahead", ahead, unembedding_lr=0.004)
    assert night.train() == 0
    assert "**INVALID**, not a result: val_bpb " in (said := night.analyze())
    assert "- the causality test failed: predictions depend on later tokens" in said
    night.analyze("discard")

    head, back = night.git("rev-parse", "HEAD")[:7], f"Back to the best, {better}, after {leaking}"
    night.edit(unembedding_lr=0.002)
    assert night.train() == 0
    assert f"train.py had uncommitted changes: the run is not credited to commit {head}" in night.analyze()
    assert "train.py is back to that of the best" in night.analyze("discard")

    assert (night.archive / "results.tsv").read_text().splitlines() == [
        "commit\tval_bpb\tmemory_gb\tstatus\tdescription",
        night.row(base, "keep", "baseline"),
        night.row(f"{base}.2", "keep", "baseline"),
        night.row(better, "keep", "unembedding_lr 0.004"),
        night.row(worse, "discard", "unembedding_lr 10"),
        f"{broken}\t0.000000\t0.0\tcrash\ttoo narrow",
        night.row(seeded, "discard", "another seed"),
        night.row(leaking, "invalid", "look ahead"),
        night.row(f"{head}-dirty", "discard", f"{back} (with uncommitted changes)"),
    ]
    assert night.git("status", "--porcelain") == ""
    assert (night.folder / "train.py").read_text() == good
    stats = [json.loads((p / "stats.json").read_text()) for p in night.archive.iterdir() if p.is_dir()]
    assert [s["failed"] for s in stats] == [{}] * 8


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
        ".gitignore", ".lock", "archive.json", "insights.md", "progress.png", "report.md", "results.tsv", name}
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
    head = lab.commit("the next idea", variant(depth=9))
    said = lab.analyze()[1]
    assert f"trained from commit {trained}, HEAD is now {head}: filed under {trained}" in said
    assert lab.rows() == [(trained, "0.998000", "44.0", "pending", "baseline")]
    assert (lab.archive / trained / "train.py").read_text() == PROGRAM


def test_a_summary_of_another_run_is_not_taken_for_this_one(lab):
    base = lab.baseline()
    stale = (lab.folder / "run_summary.json").read_text()
    lab.commit("depth 9", variant(depth=9))
    lab.crash("crash: the loss is NaN at step 12, loss nan\n", make_records(12))
    (lab.folder / "run_summary.json").write_text(stale)
    said = lab.analyze()[1]
    assert "**CRASHED**: the loss is NaN at step 12" in said
    assert "run_summary.json is of run 20260301-000001-abcd, not of 20260301-000002-abcd: left out" in said
    assert [row[1:4] for row in lab.rows()] == [("0.998000", "44.0", "keep"), ("0.000000", "0.0", "crash")]
    assert analyze.compute_best(analyze.load_book(lab.archive).entries).name == base


def test_a_syntax_error_is_a_crash_of_its_own_commit_and_leaves_the_old_run_alone(lab):
    base = lab.baseline()
    broken = lab.commit("typo", PROGRAM + "def broken(:\n")
    (lab.folder / "run.log").write_text('  File "train.py", line 15\n    def broken(:\nSyntaxError: invalid syntax\n')
    assert "**CRASHED**: SyntaxError: invalid syntax" in lab.analyze()[1]
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
    assert lab.rows() == [(f"nogit-{mark}", "0.998000", "44.0", "pending", "(no commit)")]
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
])
def test_a_broken_environment_is_reported_and_not_filed(lab, ending):
    base = lab.baseline()
    lab.commit("depth 9", variant(depth=9))
    lab.crash(ending)
    code, said, complaint = lab.analyze()
    assert (code, said) == (2, "")
    assert complaint.startswith("error: the environment failed, not the experiment; nothing was filed. ")
    assert ending.splitlines()[-1].removeprefix("error: ") in complaint
    assert [row[0] for row in lab.rows()] == [base]
    assert "failed over its environment" in lab.analyze("status")[1]
    lab.train(0.99, config={"depth": 9})  # puts the failed start away, without its log
    assert "not an experiment, removed" in lab.analyze()[1]
    assert len(lab.rows()) == 2


@pytest.mark.parametrize(("fault", "reason"), [
    ({"evaluation": {"causal": False}}, "the causality test failed: predictions depend on later tokens"),
    ({"evaluation": {"num_calls": 2}}, "evaluation was called 2 times"),
    ({"evaluation": {"val_bpb": 1.1}}, "the summary says val_bpb 0.900000, the evaluation record 1.100000"),
    ({"evaluation": {"nats": 1.0}}, "the evaluation record's nats and bytes give 0.000000"),
    ({"evaluation": {"data_fingerprint": "f" * 16}}, "the data differ from the archive's (fingerprint ffff"),
    ({"training_seconds": 312.0}, "trained 312.0 s on a budget of 300.0 s, off by more than a step"),
    ({"training_seconds": 250.0}, "trained 250.0 s on a budget of 300.0 s, off by more than a step"),
    ({"start": {"prepare_sha256": "f" * 64}}, "prepare.py is not the one this archive began with (ffffffff, was"),
])
def test_an_invalid_run_is_named_with_its_reason_and_never_the_best(lab, fault, reason):
    base = lab.baseline()
    name = lab.commit("too good", variant(depth=9))
    lab.train(0.9, make_records(30), **fault)
    said = lab.analyze()[1]
    assert "**INVALID**, not a result" in said
    assert f"- {reason}" in said
    assert lab.rows()[1] == (name, "0.900000", "44.0", "invalid", "too good")
    code, _, complaint = lab.analyze("keep")
    assert code == 1
    assert complaint.startswith(f"error: {name} cannot be kept: ")
    assert analyze.compute_best(analyze.load_book(lab.archive).entries).name == base


def test_a_run_without_evaluation_record_is_invalid(lab):
    name = lab.commit("baseline")
    lab.train(0.9)
    (lab.folder / "eval_record.json").unlink()
    assert "no readable eval_record.json" in lab.analyze()[1]
    assert lab.rows()[0][:4] == (name, "0.900000", "44.0", "invalid")


def test_a_changed_analyze_makes_new_runs_invalid(lab):
    lab.baseline()
    facts = json.loads((lab.archive / "archive.json").read_text())
    assert facts["analyze_sha256"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    (lab.archive / "archive.json").write_text(json.dumps(facts | {"analyze_sha256": "0" * 64}))
    lab.train(0.998)
    assert "- analyze.py is not the one this archive began with" in lab.analyze()[1]


def test_a_clock_that_stood_still_is_noticed(lab):
    records = make_records()
    for i, r in enumerate(records):
        r["time/unix_s"] += 0.5 * i
    lab.commit("baseline")
    lab.train(0.998, records)
    assert "Mind: 448 s passed between first and last step, the clock counted 299 s" in lab.analyze()[1]


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
  Explanation: Dynamo failed to run FX node with fake tensors: call_function <built-in function matmul>(*(FakeTensor(\
..., size=(3, 4)), FakeTensor(..., size=(5, 6))), **{}): got RuntimeError('a and b must have same reduction dim, but \
got [3, 4] X [5, 6].')

from user code:
   File "train.py", line 7, in forward
    return x @ w

crash: TorchRuntimeError: RuntimeError when making fake tensor call before the first step
"""


def test_torch_compiles_explanation_is_searched_for_the_error_inside(lab):
    name = lab.commit("baseline")
    lab.crash(COMPILED_SHAPE_ERROR)
    said = lab.analyze()[1]
    assert "**CRASHED**: RuntimeError('a and b must have same reduction dim, but got [3, 4] X [5, 6].')" in said
    assert '   File "train.py", line 7, in forward\n    return x @ w\n' in lab.page(name)
    assert "Ended: before the first step.\n" in lab.page(name)


@pytest.mark.parametrize(("ending", "cause"), [
    ("torch.OutOfMemoryError: CUDA out of memory\ncrash: out of GPU memory at step 0\n", "out of memory"),
    ("crash: the loss is NaN at step 7, loss nan\n", "not a number, or the loss exploded"),
    ("RuntimeError: mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)\n", "shapes do not fit"),
    ("torch._inductor.exc.InductorError: bad kernel\n", "compile failure"),
    (COMPILED_SHAPE_ERROR, "shapes do not fit"),
    ("NameError: name 'depht' is not defined\n", "the program does not parse or a name is wrong"),
    ("", "killed from outside, or out of time"),
])
def test_known_causes_of_a_crash_come_with_what_helps(lab, ending, cause):
    name = lab.commit("baseline")
    lab.crash(ending, make_records(8))
    lab.analyze()
    assert lab.stats(name)["crash"]["cause"] == cause
    page = lab.page(name)
    assert "Ended: step 7, last loss " in page
    assert f"Looks like: {cause}. What usually helps: " in page


def test_a_run_in_progress_is_left_alone(lab):
    lab.commit("baseline")
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        lab.start(pid=sleeper.pid, host=socket.gethostname(), started_unix=4e9)
        lab.log_steps(make_records(10))
        code, said, complaint = lab.analyze()
        assert (code, said) == (1, "")
        assert f"is still in progress (process {sleeper.pid}): wait for it to end" in complaint
        assert "in progress, 10 steps so far" in lab.analyze("status")[1]
    finally:
        sleeper.kill()
        sleeper.wait()
    assert "**CRASHED**: the log just stops: killed" in lab.analyze()[1]


def test_a_process_number_given_to_another_process_does_not_hide_a_crash(lab):
    lab.commit("baseline")
    lab.start(pid=os.getpid(), host=socket.gethostname(), started_unix=1.0e9)
    assert "**CRASHED**" in lab.analyze()[1]


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
    for i in range(4):
        lab.train(0.99 + i / 1000)
        folders.append(tmp_path / f"worktree{i}")
        lab.git("worktree", "add", "-q", "--detach", str(folders[-1]))
        for file in OUTPUTS:
            (folders[-1] / file).write_bytes((lab.folder / file).read_bytes())
    environment = os.environ | {"AUTO_LOG_RESEARCH_DIR": str(shared)}
    calls = [subprocess.Popen([sys.executable, str(SCRIPT)], cwd=f, env=environment, stdout=subprocess.PIPE, text=True)
             for f in folders]
    assert [call.communicate()[0].split()[0] for call in calls] == ["run"] * 4
    assert [call.returncode for call in calls] == [0] * 4
    lab.archive = shared
    assert sorted(row[1] for row in lab.rows()) == ["0.990000", "0.991000", "0.992000", "0.993000"]
    names = [row[0] for row in lab.rows()]
    base = names[0]
    assert names == [base, f"{base}.2", f"{base}.3", f"{base}.4"]
    for name, row in zip(names, lab.rows(), strict=True):
        assert load_run(name, shared).summary["val_bpb"] == float(row[1])


def test_a_second_filing_waits_for_the_lock(lab):
    lab.commit("baseline")
    lab.train(0.998)
    lab.archive.mkdir()
    with open(lab.archive / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        call = subprocess.Popen([sys.executable, str(SCRIPT)], cwd=lab.folder, stdout=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            call.wait(2)
        assert not (lab.archive / "results.tsv").exists()
    assert call.wait(60) == 0
    assert len(lab.rows()) == 1


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
    assert os.WTERMSIG(analyze_and_die(7)) == signal.SIGKILL
    assert (lab.archive / first / "run_summary.json").exists()
    assert not (lab.archive / first / "analysis.md").exists()
    lab.commit("depth 10", variant(depth=10))
    lab.train(0.95, config={"depth": 10})
    lab.analyze()
    assert f"**NEW BEST**: val_bpb 0.990000, best so far 0.998000 ({base})" in lab.page(first)
    assert (lab.archive / first / "loss_curve.png").exists() is False  # two steps are no curve
    assert [row[:4] for row in lab.rows()[1:]] == [
        (first, "0.990000", "44.0", "pending"), (lab.rows()[2][0], "0.950000", "44.0", "pending")]


def test_a_removed_current_best_is_put_back_by_the_next_call(lab):
    base = lab.baseline()
    (lab.archive / "insights.md").write_text("# Mine\n\n* a claim\n")
    lab.analyze()
    text = (lab.archive / "insights.md").read_text()
    assert text.startswith(f"# Mine\n\n## Current Best\n- {base}: val_bpb 0.998000, one run\n")
    assert text.endswith("\n\n* a claim\n")


def test_text_that_is_no_utf8_is_kept_as_it_is_and_shown_with_question_marks(lab):
    name = lab.commit("baseline")
    lab.crash("ValueError: \n")
    with open(lab.folder / "run.log", "ab") as f:
        f.write(b"crash: ValueError: caf\xe9 $x$ before the first step\n")
    assert "**CRASHED**: ValueError: caf? $x$ before the first step" in lab.analyze()[1]
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
    (folder / "loss_curve.png").unlink()
    lab.analyze()
    assert (folder / "loss_curve.png").exists()
    assert lab.page(name).startswith(f"# {name}: baseline\n\n## Verdict\n")
    assert lab.page(name).endswith("## Agent Investigation Notes\n\nThe first layer learns late.\n")
    assert lab.rows()[0][:4] == (name, "0.998000", "44.0", "keep")


def test_hand_edits_of_the_table_hold(lab):
    base = lab.baseline()
    second = lab.commit("depth 9", variant(depth=9))
    lab.train(0.99, config={"depth": 9})
    lab.analyze()
    third = lab.commit("depth 10", variant(depth=10))
    lab.train(0.97, config={"depth": 10})
    lab.analyze()
    table = lab.archive / "results.tsv"
    header, *lines = table.read_text().splitlines()
    lines = [lines[1].replace("pending\tdepth 9", "keep\tmy own words"), "what is this?", lines[0]]  # the third removed
    table.write_text("\n".join([header, *lines]))
    lab.commit("depth 11", variant(depth=11))
    lab.train(0.98, config={"depth": 11})
    said = lab.analyze()[1]
    assert f"best so far 0.990000 ({second})" in said  # the third is no more
    written = table.read_text().splitlines()
    assert written[:4] == [header, *lines]
    assert len(written) == 5
    assert third not in table.read_text()
    assert "problem: results.tsv line 3: 1 columns where five are due; kept, not counted" in lab.analyze("status")[1]
    assert base in lab.analyze("status")[1]


def test_a_score_edited_by_hand_is_named_and_does_not_count(lab):
    name = lab.baseline()
    table = lab.archive / "results.tsv"
    table.write_text(table.read_text().replace("0.998000", "0.500000"))
    assert f"line 2: 0.500000 is not what {name} scored: 0.998000 counts" in lab.analyze("status")[1]
    assert load_runs()["val_bpb"].tolist() == [0.998]


def test_a_lost_table_is_rebuilt_from_the_runs(lab):
    name = lab.baseline()
    (lab.archive / "results.tsv").unlink()
    assert f"{name} was filed but had no row: added" in lab.analyze()[1]
    assert lab.rows() == [(name, "0.998000", "44.0", "pending", "baseline")]


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
        f"{name} discarded; train.py is that of the best, {base}: nothing to commit\n")
    assert lab.git("rev-parse", "HEAD") == head


def test_discard_finishes_a_restoration_that_git_refused(lab):
    base = lab.baseline()
    lab.commit("depth 9", variant(depth=9))
    lab.train(1.1, config={"depth": 9})
    lab.analyze()
    (lab.folder / ".git" / "index.lock").touch()
    code, _, complaint = lab.analyze("discard")
    assert code == 1
    assert f"train.py is back to that of {base} but git would not commit it" in complaint
    (lab.folder / ".git" / "index.lock").unlink()
    assert "and committed" in lab.analyze("discard")[1]
    assert lab.git("status", "--porcelain", "--untracked-files=no") == ""


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
        f"error: no run's outputs in {lab.folder}, and 0 pending runs were trained there; pending: none; "
        "name the run you mean: `uv run analyze.py keep RUN` or `discard RUN`\n"))


def test_a_run_pending_in_another_folder_is_decided_there_or_by_name(lab, monkeypatch):
    base = lab.commit("baseline")
    lab.train(0.998)
    lab.analyze()
    other = add_worktree(lab, lab.folder / "other", monkeypatch)  # at the very commit of the run
    monkeypatch.chdir(other.folder)
    for command in ("keep", "discard"):
        assert other.analyze(command) == (1, "", (
            f"error: no run's outputs in {other.folder}, and 0 pending runs were trained there; pending: {base} "
            f"(trained in {lab.folder}); name the run you mean: `uv run analyze.py keep RUN` or `discard RUN`\n"))
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
    best = lab.commit("depth 9", variant(depth=9))
    lab.train(0.98, config={"depth": 9})
    lab.analyze()
    lab.analyze("keep")
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


def test_a_gain_inside_the_noise_may_be_kept_and_is_called_that(lab):
    lab.baseline(0.998)
    name = lab.commit("depth 9", variant(depth=9))
    lab.train(0.9975, config={"depth": 9})
    said = lab.analyze()[1]
    assert "**WITHIN NOISE**" in said
    assert "run it again before building on it" in said
    said = lab.analyze("keep")[1]
    assert said.startswith(
        f"{name} kept; the best is {name} at 0.997500 (1 run(s))\nmind: -0.000500 bpb is inside the noise"
    )


def test_current_best_is_kept_true_and_the_rest_of_the_insights_stays(lab):
    lab.archive.mkdir()
    text = "# Insights\r\n\r\nmine\r\n\r\n## Current Best\r\nmy words\r\n\r\n## Learning rate\r\n* 0.04 is fine\r\n"
    (lab.archive / "insights.md").write_bytes(text.encode())
    base = lab.baseline()
    after = (lab.archive / "insights.md").read_bytes().decode()
    assert after.startswith(f"# Insights\r\n\r\nmine\r\n\r\n## Current Best\r\n- {base}: val_bpb 0.998000, one run\r\n")
    assert after.endswith(")\r\nmy words\r\n\r\n## Learning rate\r\n* 0.04 is fine\r\n")
    assert after.count("val_bpb") == after.count("noise between") == 1


def test_what_an_agent_writes_into_the_current_best_section_is_never_lost(lab):
    base, path = lab.baseline(), lab.archive / "insights.md"
    before = path.read_text()
    path.write_text(before.replace("## Claims\n", "").replace("- its", "- mine, in between\n- its") + "- mine, below\n")
    name = lab.commit("depth 9", variant(depth=9))
    lab.train(0.99, config={"depth": 9})
    lab.analyze()
    lab.analyze("keep")
    after = path.read_text()
    assert after.splitlines()[2:5] == [
        "## Current Best", f"- {name}: val_bpb 0.990000, one run", "- its change: depth 9"
    ]
    assert after.endswith("\n- mine, in between\n\n- mine, below\n")
    assert base not in after  # the old best's lines are gone, all three
    assert after.count("its change") == after.count("noise between") == 1


def test_a_missing_insights_file_and_a_missing_section_are_made():
    none = "No run is kept yet."
    one = "- a1b2c3d: val_bpb 0.998000, mean of 2 runs (a1b2c3d, a1b2c3d.2)\n- its change: x"
    assert analyze.replace_best_section(None, none) == f"# Insights\n\n## Current Best\n{none}\n\n## Claims\n"
    below = analyze.replace_best_section("# Mine\n\ntext\n", none)
    assert below == f"# Mine\n\n## Current Best\n{none}\n\ntext\n"
    assert analyze.replace_best_section(below, one) == f"# Mine\n\n## Current Best\n{one}\n\ntext\n"
    twice = analyze.replace_best_section(f"# Mine\n\n## Current Best\n{one}\n\n# Other\n", none)
    assert twice == f"# Mine\n\n## Current Best\n{none}\n\n# Other\n"
    assert analyze.replace_best_section(twice, none) == twice
    assert analyze.replace_best_section("## Current Best", one) == f"## Current Best\n{one}\n"


def test_status_lets_a_fresh_agent_go_on(lab):
    base = lab.baseline()
    lab.commit("depth 9", variant(depth=9))
    lab.train(0.99, config={"depth": 9})
    (lab.archive / "ideas_queue.md").write_text("# Ideas\n\n- one\n  - detail\n- two\n1. three\n")
    assert "this folder: run 20260301-000002-abcd is not filed yet: `uv run analyze.py`" in lab.analyze("status")[1]
    lab.analyze()
    status = json.loads(lab.analyze("status", "--json")[1])
    assert status["best"] == {"name": base, "val_bpb": 0.998, "runs": [base], "is_kept": True}
    assert len(status["pending"]) == 1
    assert status["queue_length"] == 3
    assert status["noise"]["sigma"] == 0.001
    assert status["hours_used"] == pytest.approx(0.2)
    page = lab.analyze("status")[1]
    assert f"best: {base} val_bpb 0.998000, one run" in page
    assert "noise: sigma 0.001000 bpb (prior from public runs, no replicate yet)" in page


def test_an_empty_archive_has_a_status_and_a_table_too(lab):
    assert "best: none yet" in lab.analyze("status")[1]
    assert list(load_runs().columns) == ["commit", "val_bpb", "memory_gb", "status", "description", "is_valid"]
    assert not lab.archive.exists()


def test_compare_shows_what_differs(lab):
    base = lab.baseline()
    other = lab.commit("depth 9", variant(depth=9))
    lab.train(0.99, config={"depth": 9})
    lab.analyze()
    table = lab.analyze("compare", base, other)[1]
    assert f"|  | {base} | {other} |" in table
    assert "| val_bpb | 0.998000 | 0.990000 |" in table
    assert "| `depth` | 8 | 9 |" in table
    assert "matrix_lr" not in table


def test_names_may_be_shortened_but_not_ambiguous(lab):
    base = lab.baseline()
    lab.train(0.9981)
    lab.analyze()
    assert load_run(base).name == base
    assert load_run(f"{base}.2").name == f"{base}.2"
    assert (
        lab.analyze("keep", base[:5])[2]
        == f"error: '{base[:5]}' fits 2 runs: {base}, {base}.2: name one of them in full\n"
    )
    assert "no archived run is called 'zzz'" in lab.analyze("compare", "zzz")[2]


# ---------------------------------------------------------------------------------------------------------------------
# Programs, noise, best
# ---------------------------------------------------------------------------------------------------------------------


def test_comments_docstrings_formatting_and_seed_do_not_change_a_program():
    same = PROGRAM.replace("# Muon", "# the one for matrices").replace('"""Train."""', '"""Train it."""\n')
    same = same.replace("config.depth * config.matrix_lr", "(config.depth\n            * config.matrix_lr)")
    assert analyze.program_hash(same) == analyze.program_hash(PROGRAM)
    assert analyze.program_hash(same, hide_seed=False) == analyze.program_hash(PROGRAM, hide_seed=False)
    assert analyze.program_hash(variant(seed=7)) == analyze.program_hash(PROGRAM)
    assert analyze.program_hash(variant(seed=7), hide_seed=False) != analyze.program_hash(PROGRAM, hide_seed=False)
    assert analyze.program_hash(variant(depth=9)) != analyze.program_hash(PROGRAM)
    for before, after in (
        ("torch.manual_seed(42)", "torch.manual_seed(7)"),
        ("SEED = 1", "SEED = 2"),
        ("f(seed=1)", "f(seed=2)"),
        ("replace(CONFIG, depth=4)", "replace(CONFIG, depth=4, seed=2)"),
    ):
        assert analyze.program_hash(before) == analyze.program_hash(after)
    assert analyze.program_hash("f(speed=1)") != analyze.program_hash("f(speed=2)")
    assert analyze.program_hash("def f(:") == analyze.program_hash("def f(:")


def entry(name, val, program, status="keep"):
    return analyze.Entry(name, status, "", {"val_bpb": val, "program": program, "is_finished": True})


def test_noise_is_the_prior_then_a_mixture_in_which_the_prior_fades():
    assert analyze.compute_noise([entry("a", 1.0, "p"), entry("b", 0.9, "q")]) == analyze.Noise(0.001, 0, None)
    pair = [entry("a", 1.0, "p"), entry("b", 1.002, "p")]
    noise = analyze.compute_noise(pair)  # squares 2e-6 with one degree of freedom, prior 2 * 1e-6 with two
    assert noise.measured == pytest.approx(math.sqrt(2e-6))
    assert noise.sigma == pytest.approx(math.sqrt(4e-6 / 3))
    groups = [entry(f"{g}{i}", 1.0 + i * 0.002, g) for g in "pqrs" for i in range(2)]
    noise = analyze.compute_noise(groups)  # four pairs, squares 2e-6 each
    assert noise.sigma == pytest.approx(math.sqrt((2e-6 + 4 * 2e-6) / 6))
    assert noise.source == "replicates: 0.001414 with 4 degree(s) of freedom; prior: 0.001000 with 2"
    many = [entry(f"{g}{i}", 1.0 + i * 0.002, f"{g}") for g in range(200) for i in range(2)]
    assert analyze.compute_noise(many).sigma == pytest.approx(math.sqrt(2e-6), rel=0.003)
    broken = [entry("a", 1.0, "p"), entry("b", 0.5, "p", "invalid"), entry("c", 0.0, "p", "crash")]
    assert analyze.compute_noise(broken).measured is None


def test_the_best_is_a_mean_over_replicates_so_that_a_lucky_draw_is_not_the_bar():
    entries = [
        entry("a", 0.990, "p"),
        entry("b", 0.980, "q"),
        entry("c", 0.998, "q", "discard"),
        entry("d", 0.9, "r", "invalid"),
    ]
    best = analyze.compute_best(entries)
    assert (best.name, best.mean) == ("b", pytest.approx(0.989))
    entries.append(entry("e", 0.999, "q", "pending"))
    assert analyze.compute_best(entries).name == "a"


def test_a_replicate_that_takes_the_best_its_place_says_which_is_the_best_now():
    entries = [entry("a", 0.990, "p"), entry("b", 0.985, "q"), entry("c", 0.997, "q", "pending")]
    verdict = analyze.compute_verdict(entries[2], entries)
    assert (verdict["kind"], verdict["best"]) == ("replicate", "b")
    assert verdict["mean"] == pytest.approx(0.991)
    assert verdict["dethroned_by"] == ["a", 0.990]
    page = analyze.render_verdict({"verdict": verdict, "record": {}})
    assert "With this mean it is the best no more: that is a at 0.990000." in page
    good = entry("c", 0.986, "q")
    assert analyze.compute_verdict(good, [*entries[:2], good])["dethroned_by"] is None


@pytest.mark.parametrize(("val", "runs"), [(0.9985, "about 4"), (0.9995, "more than 20"), (1.0, "more than 20")])
def test_a_difference_within_the_noise_comes_with_the_runs_it_takes_to_tell(val, runs):
    entries = [entry("a", 1.0, "p"), entry("b", val, "q", "pending")]  # 0.0015 is 2 * 0.001 * sqrt(2 / 3.6)
    verdict = analyze.compute_verdict(entries[1], entries)
    assert verdict["kind"] == "within noise"
    assert f"So small a difference takes {runs} runs of each to tell." in analyze.render_verdict(
        {"verdict": verdict, "record": {}})[0]


def test_before_anything_is_kept_the_first_valid_run_stands_in():
    entries = [entry("a", 0.99, "p", "discard"), entry("b", 0.98, "q", "pending"), entry("c", 0.97, "r", "pending")]
    assert (analyze.compute_best(entries).name, analyze.compute_best(entries).is_kept) == ("b", False)
    assert analyze.compute_best([]) is None


def test_the_difference_is_in_standard_errors_of_both_means():
    entries = [entry("a", 0.990, "p"), entry("b", 0.990, "p"), entry("c", 0.980, "q", "pending")]
    verdict = analyze.compute_verdict(entries[2], entries)
    sigma = math.sqrt(2e-6 / 3)  # the prior's two degrees of freedom and one that measured nothing
    assert verdict["kind"] == "new best"
    assert verdict["standard_errors"] == pytest.approx(-0.010 / (sigma * math.sqrt(1.5)))


def test_history_counts_ideas_not_replicates_and_sees_a_plateau_until_a_new_best(lab):
    base = lab.baseline()
    lab.train(0.9982)
    lab.analyze()
    for i in range(4):
        last = lab.commit(f"idea {i}", variant(matrix_lr=i + 1.0))
        lab.train(1.0 + i / 10)
        lab.analyze()
        lab.analyze("discard")
    history = lab.stats(last)["history"]
    assert (history["ideas_since_best"], history["is_plateau"], history["hit_rate"]) == (4, False, 0.0)
    assert "Plateau" not in lab.page(last)
    crash = lab.commit("huge", variant(depth=900))
    lab.crash("crash: out of GPU memory at step 0, loss 9.0\n")
    lab.analyze()
    history = lab.stats(crash)["history"]
    assert (history["ideas_since_best"], history["is_plateau"], history["hit_rate"]) == (4, False, 0.0)
    last = lab.commit("idea 4", variant(matrix_lr=5.0))
    lab.train(1.4)
    lab.analyze()
    history = lab.stats(last)["history"]
    assert (history["ideas_since_best"], history["is_plateau"], history["hit_rate"]) == (5, True, 0.0)
    assert "Plateau: 5 ideas since the best was found. Change direction." in lab.page(last)
    assert "plateau: 5 ideas since the best was found; change direction" in lab.analyze("status")[1]
    assert "; 5 idea(s) since the best\n" in (lab.archive / "report.md").read_text()
    good = lab.commit("depth 9", variant(depth=9))
    lab.train(0.9, config={"depth": 9})
    lab.analyze()
    assert "Plateau" not in lab.page(good)
    lab.analyze("keep")
    history = analyze.compute_history(analyze.load_book(lab.archive).entries)
    assert history["hit_rate"] == pytest.approx(1 / 6)  # six ideas with a score after the baseline, one kept
    assert history["ideas_since_best"] == 0
    assert [name for name, *_ in history["lineage"]] == [base, good]
    assert history["gain"] == pytest.approx(0.9981 - 0.9)


def test_a_program_tried_before_is_named(lab):
    lab.baseline()
    first = lab.commit("depth 9", variant(depth=9))
    lab.train(1.1, config={"depth": 9})
    lab.analyze()
    lab.analyze("discard")
    lab.commit("depth nine, once more", variant(depth=9) + "# again\n")
    lab.train(1.102, config={"depth": 9})
    said = lab.analyze()[1]
    assert f"Counted as a replicate: no functional change against {first}" in said
    again = lab.rows()[-1][0]
    assert f"This very program was tried before: {first} (1.100000, discard)." in lab.page(again)
    assert lab.stats(again)["verdict"]["mean"] == pytest.approx(1.101)


def test_other_kernels_are_one_line_and_no_other_configuration(lab):
    here = {"attention_backend": "windowed", "kernels": "loss, mlp, window attention"}
    base = lab.baseline(config=here)
    same = lab.commit("same kernels", PROGRAM + "A = 1\n")
    lab.train(1.0, config=here)
    lab.analyze()
    assert "other kernels" not in lab.page(same)
    assert "kernels`" not in lab.page(same)
    name = lab.commit("plain torch", PROGRAM + "B = 1\n")
    lab.train(1.0, config={"attention_backend": "flex", "kernels": "none"})
    lab.analyze()
    assert lab.stats(name)["changes"]["machine"] == {
        "attention_backend": ["windowed", "flex"], "kernels": ["loss, mlp, window attention", "none"]}
    assert lab.page(name).partition("## What changed\n")[2].partition("\n\n")[0] == (
        "train.py: +1 -0 lines (`train.diff`).\n"
        "Resolved configuration: the same, every key.\n"
        "- other kernels, so another speed: `attention_backend` windowed -> flex; "
        "`kernels` loss, mlp, window attention -> none\n"
        "This configuration, with other code, was tried before: "
        f"{base} (0.998000, keep), {same} (1.000000, pending).")
    assert load_runs()["kernels"].tolist() == [here["kernels"], here["kernels"], "none"]
    unknown = lab.commit("says nothing of its kernels", PROGRAM + "C = 1\n")
    lab.train(1.0, config={"gpu_name": "Abacus 4000"})
    lab.analyze()
    assert "other kernels" not in lab.page(unknown)
    assert "\n- another machine, scores may not compare: `gpu_name` Abacus 3000 -> Abacus 4000\n" in lab.page(unknown)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics against hand-made runs with known answers
# ---------------------------------------------------------------------------------------------------------------------


def curve(records, **summary):
    summary = {"time_budget": BUDGET_S, "total_batch_size": BATCH, "val_bpb": 1.0} | summary
    evaluation = {"tokens": NATS_PER_TOKEN_TO_BPB * math.log(2) * 1e8, "bytes": 1e8}
    run = analyze.Run("x", Path(), {}, summary, evaluation, records, None, None)
    return run, analyze.compute_curve(run)


def test_a_run_that_is_only_faster_owes_its_gain_to_speed():
    best, fast = curve(make_records(300, noise=0.002))[1], curve(make_records(315, noise=0.002, seed=1))[1]
    loss = power_law([300 * BATCH / 1e6, 315 * BATCH / 1e6])
    gain = NATS_PER_TOKEN_TO_BPB * (loss[1] - loss[0])
    why = analyze.compute_attribution(fast, best, gain)
    assert gain == pytest.approx(-0.00738, abs=1e-5)
    assert why["token_ratio"] == pytest.approx(1.05)
    assert why["speed_bpb"] == pytest.approx(gain, rel=0.1)
    assert abs(why["learning_bpb"]) < 0.1 * abs(gain)
    assert why["speed_range"][0] < gain < why["speed_range"][1]


def test_a_run_that_only_learns_better_owes_its_gain_to_learning():
    best = curve(make_records(300, noise=0.002))[1]
    tokens_m = BATCH * np.arange(1, 301) / 1e6
    better = curve(make_records(300, loss=power_law(tokens_m, a=1.9), noise=0.002, seed=1))[1]
    why = analyze.compute_attribution(better, best, -0.1 * NATS_PER_TOKEN_TO_BPB)
    assert why["speed_bpb"] == 0
    assert why["learning_bpb"] == pytest.approx(-0.032)
    assert why["equal_tokens_difference_nats"] == pytest.approx(-0.1, abs=0.002)


def test_curves_that_part_half_way_are_said_to_part_half_way():
    best = make_records(300, noise=0.004)
    loss = np.array([r["train/loss"] for r in best])
    loss[150:] -= 0.1
    part = analyze.compute_trajectory(
        curve(make_records(300, loss=loss, noise=0.004, seed=5))[1], curve(best)[1], None
    )["part"]
    assert part["sign"] == -1
    assert part["budget"] == pytest.approx(0.5, abs=0.03)
    same = analyze.compute_trajectory(curve(make_records(seed=8))[1], curve(make_records(seed=9))[1], None)["part"]
    assert same is None or same["budget"] > 0.8


def test_the_trajectory_is_aligned_by_time_and_by_tokens():
    slow = curve(make_records(150, noise=0, drop=0))[1]  # half the steps, the same tokens each
    fast = curve(make_records(300, noise=0, drop=0))[1]
    half = next(r for r in analyze.compute_trajectory(slow, fast, None)["rows"] if r["budget"] == 0.5)
    assert half["this"] == pytest.approx(slow.smooth[74], abs=1e-9)
    assert half["best"] == pytest.approx(fast.smooth[149], abs=1e-9)
    assert half["tokens_m"] == pytest.approx(75 * BATCH / 1e6)
    assert half["best_by_tokens"] == pytest.approx(half["this_by_tokens"], abs=1e-9)


def test_runs_of_different_batch_sizes_are_smoothed_over_the_same_stretch_of_time():
    large, small = (  # the same law of the tokens
        make_records(n, batch=batch, noise=0, loss=power_law(5 + batch * np.arange(1, n + 1) / 1e6))
        for n, batch in ((300, BATCH), (600, BATCH // 2)))
    logged = curve(small)[1].at_time(0.05) - curve(large)[1].at_time(0.05)
    assert logged < -0.1  # the small batch's average trails behind less: it looks better and is not
    curves = analyze.compute_curves(curve(small)[0], curve(large)[0], None)
    rows = analyze.compute_trajectory(curves["this"], curves["best"], None)["rows"]
    assert curves["best"].smooth.tolist() == curve(large)[1].smooth.tolist()
    for r in rows:
        assert r["this"] == pytest.approx(r["best"], abs=0.03), r["budget"]
        assert r["this_by_tokens"] == pytest.approx(r["best_by_tokens"], abs=0.03), r["budget"]


def test_a_small_steady_difference_parts_from_the_start():
    best = make_records(600, noise=0.02)
    loss = np.array([r["train/loss"] for r in make_records(600, noise=0)]) - 0.02
    part = analyze.compute_parting(curve(make_records(600, loss=loss, noise=0.02, seed=4))[1], curve(best)[1])
    assert part["sign"] == -1
    assert part["budget"] < 0.1


def test_a_spike_is_found_with_step_and_height():
    records = make_records(300)
    records[200]["train/loss"] += 2.0
    records[201]["train/loss"] += 1.0
    (spike,) = analyze.compute_convergence(*curve(records))["spikes"]
    assert (spike["step"], spike["until"]) == (200, 201)
    assert spike["height"] == pytest.approx(2.0, abs=0.05)


def test_a_quiet_run_has_no_spike():
    assert analyze.compute_convergence(*curve(make_records(300)))["spikes"] == []
    assert analyze.compute_convergence(*curve(make_records(300, noise=0)))["spikes"] == []


def test_a_plateau_is_flat_and_more_tokens_bring_nothing():
    found = analyze.compute_convergence(*curve(make_records(600, loss=np.full(600, 3.0), warmdown=0)))
    assert found["trend"] == "flat within its uncertainty"
    assert abs(found["slope_per_percent"]) < 0.001
    gain, low, high = found["ten_percent_more_bpb"]
    assert low <= 0 <= high
    assert abs(gain) < 0.0003


def test_a_falling_loss_is_still_improving_at_its_true_slope():
    falling = 4 - 0.02 * np.arange(300) / 3  # 0.02 nats per 1 % of the budget
    found = analyze.compute_convergence(*curve(make_records(300, loss=falling, warmdown=0)))
    assert found["trend"] == "still improving"
    assert found["slope_per_percent"] == pytest.approx(-0.02, abs=3 * found["slope_error"])


def test_the_continuation_and_the_warm_down_match_the_law_the_run_was_made_from():
    found = analyze.compute_convergence(*curve(make_records(600, noise=0.002)))
    end_m = 600 * BATCH / 1e6
    truth = NATS_PER_TOKEN_TO_BPB * float(power_law(1.1 * end_m) - power_law(end_m))
    gain, low, high = found["ten_percent_more_bpb"]
    assert gain == pytest.approx(truth, rel=0.1)
    assert low < truth < high
    assert found["warmdown_nats"] == pytest.approx(-0.3, abs=0.02)


def test_a_short_run_deserves_no_continuation():
    found = analyze.compute_convergence(*curve(make_records(20)))
    assert found["ten_percent_more_bpb"] is None
    assert found["warmdown_nats"] is None


def test_a_throttled_run_is_noticed_within_itself_and_against_its_replicates(lab):
    lab.baseline()
    step_ms = np.full(240, 1000.0)
    step_ms[120:] = 1500.0
    lab.train(1.01, make_records(step_ms=step_ms, num_steps=240))
    said = lab.analyze()[1]
    name = lab.rows()[-1][0]
    machine = lab.stats(name)["machine"]
    assert machine["drift"] == pytest.approx(0.5)
    assert "Mind: 52% of the steps were 50% slower than the rest: throttling or a second job." in said
    assert machine["usual_ms"] == pytest.approx(1000)
    assert machine["median_ms"] == 1500  # 120 slow steps of 230: the first ten do not count
    assert "steps took 1.50 times what they took in earlier runs of this program: a second job on the GPU, thr" in said
    assert "\n- 52% of the steps were 50% slower than the rest: throttling or a second job.\n" in lab.page(name)
    assert "?." not in lab.page(name)


def test_a_stall_is_counted_with_the_time_it_cost():
    step_ms = np.full(300, 1000.0)
    step_ms[100] = 11_000.0
    run, _ = curve(make_records(step_ms=step_ms, num_steps=300))
    machine = analyze.compute_machine(run, entry("x", 1.0, "p"), [])
    assert (machine["stalls"], machine["stalled_s"]) == (1, pytest.approx(10.0))
    assert machine["median_ms"] == 1000
    assert machine["warnings"] == []


def test_only_layers_that_stand_out_are_named():
    names = ["blocks.0.mlp.c_proj", "blocks.1.mlp.c_proj"]
    layers = {"layers/names": names, "layers/rms": [1.0, 1.0], "layers/zeros": [0.0, 0.0],
              "layers/input_zeros": [0.6, 0.6], "layers/dead": [0.0, 0.0]}
    params = {"params/names": list("abcd"), "params/grad_rms": [1e-3, 1e-3, 1e-3, 0.0], "params/weight_rms": [1.0] * 4,
              "params/update_rms": [1e-3, 1e-3, 1e-3, 1e-3]}
    records = make_records(20)
    records[0] |= layers | params | {"layers/rms": [0.0, 0.01]}  # what starts at zero grows as a matter of course
    for i in (4, 8, 12, 19):
        records[i] |= layers | params
    run, _ = curve(records)
    assert analyze.compute_layers(run) == ["no gradient reaches 1 parameter(s): d"]
    moved = [records[0] | {"scalars/x0_lambdas": [0.1, 0.1]}, *records[1:19]]
    moved.append(records[19] | {"scalars/x0_lambdas": [4.0, 5.0]})
    assert analyze.compute_layers(curve(moved)[0])[1:] == ["x0_lambdas moved: median 0.1 at first, 4.5 at the end"]
    slow = {"params/names": [*"abcd", "resid_lambdas"], "params/weight_rms": [1.0] * 5,
            "params/update_rms": [1e-3] * 4 + [1e-6], "scalars/resid_lambdas": [1.0, 1.0]}
    assert analyze.compute_layers(curve([*records[:8], records[8] | slow, *records[9:]])[0]) == [
        "no gradient reaches 1 parameter(s): d"]  # a residual scalar moves slowly by design
    records[8] |= {"params/update_rms": [1e-3, 1e-3, 1e-3, 0.1]}
    records[19] |= {"layers/rms": [1.0, 30.0], "layers/dead": [0.25, 0.0], "params/grad_rms": [1e-3] * 4,
                    "scalars/resid_lambdas": [1.0, 0.4, None],
                    "scalars/x0_lambdas": [0.1, 0.11]}
    assert analyze.compute_layers(run) == [
        "dead input units: blocks.0.mlp.c_proj 25%",
        "activations grew: blocks.1.mlp.c_proj x30",
        "update/weight far above the median 1.0e-03: d x100",
        "resid_lambdas: 0.4 (layer 1) to 1 (layer 0)",
    ]


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
    assert stats["trajectory"]["rows"][3]["tokens_m"] == pytest.approx(0.5 * 300 * BATCH / 1e6)
    assert stats["trajectory"]["rows"][3]["this"] == pytest.approx(records[149]["train/loss_smooth"], abs=1e-6)
    assert set(load_run(name).metrics.columns) == set(original_records(records)[0])
    assert "loss at 50% of the budget" in lab.analyze("compare", base, name)[1]
    assert "is filed already" in lab.analyze()[1]


def test_a_dirty_train_py_of_the_original_program_is_not_credited_to_the_commit(lab):
    name = lab.commit("the original")
    (lab.folder / "train.py").write_text(variant(depth=9))
    os.utime(lab.folder / "train.py", (1.7e9, 1.7e9))  # it was edited before the run, and the run took a minute
    summary = {"val_bpb": 0.97, "git_commit": name, "total_seconds": 60.0}
    (lab.folder / "run_summary.json").write_text(json.dumps(summary))
    (lab.folder / "run.log").write_text("step 0\n---\nval_bpb:          0.970000\n")
    assert f"train.py had uncommitted changes: the run is not credited to commit {name}" in lab.analyze()[1]
    assert lab.rows()[0][0] == f"{name}-dirty"
    assert (lab.archive / f"{name}-dirty" / "train.py").read_text() == variant(depth=9)


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
    head = lab.commit("a later idea")
    said = lab.analyze()[1]
    assert f"nothing says which commit these outputs are of, and HEAD {head} is younger: not credited" in said
    assert re.fullmatch(r"unknown-[0-9a-f]{7}", lab.rows()[0][0])
    assert lab.rows()[0][4] == "(no commit)"


def test_an_old_summary_of_the_original_program_is_not_given_to_its_crash(lab):
    lab.commit("the original")
    (lab.folder / "run_summary.json").write_text(
        json.dumps({"val_bpb": 0.97, "git_commit": lab.git("rev-parse", "HEAD")})
    )
    (lab.folder / "run.log").write_text("Traceback (most recent call last):\nNameError: name 'x' is not defined\n")
    assert "**CRASHED**: NameError: name 'x' is not defined" in lab.analyze()[1]
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


def test_the_page_stays_within_its_bounds_whatever_happened(lab):
    lab.baseline()
    for i in range(4):
        name = lab.commit(f"idea {i} " + "with a long story " * 20, variant(matrix_lr=0.01 * (i + 1)) + "# é\n" * 50)
        config = {f"option_{k}_{'x' * 40}": "value " * 30 + str(i) for k in range(40)}
        extra = {"layers/names": [f"blocks.{k}.mlp.c_proj" for k in range(60)], "layers/dead": [0.5] * 60}
        records = make_records(120, **{key: [value] * 120 for key, value in extra.items()})
        lab.train(0.99 - i / 1000, records, config=config, evaluation={"causal": None})
        lab.analyze()
        lab.analyze("keep")
    page = lab.page(name)
    assert len(page.encode()) <= 8000
    assert page.count("\n") <= 120
    assert page.index("## Verdict") < page.index("## What changed") < page.index("## Why") < page.index("## Trajectory")
    assert page.index("## Convergence") < page.index("## Machine") < page.index("## History") < page.index("## Data")


def test_all_pictures_are_made_where_there_is_something_to_show(lab):
    records = make_records(100)
    for i in range(0, 100, 10):
        records[i] |= {"layers/names": ["a", "b"], "layers/rms": [1.0, 2.0], "layers/input_zeros": [None, 0.5],
                       "layers/dead": [None, 0.1], "params/names": ["w"], "params/weight_rms": [1.0],
                       "params/update_rms": [0.001], "scalars/x0_lambdas": [0.1, 0.2],
                       "scalars/temperature": 0.5}  # an experiment's own, not by layer
    name = lab.baseline(records=records)
    assert lab.stats(name)["failed"] == {}
    for picture in ("loss_curve", "lr_and_schedule", "gpu_perf", "layers"):
        header = (lab.archive / name / f"{picture}.png").read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(header[16:20], "big") == 1200
    assert "Pictures: loss_curve.png, lr_and_schedule.png, gpu_perf.png, layers.png;" in lab.page(name)


def test_the_report_names_what_was_kept_what_failed_and_what_deserves_a_rerun(lab):
    base = lab.baseline()
    near = lab.commit("nearly", variant(depth=9))
    lab.train(0.9985, config={"depth": 9})
    lab.analyze()
    lab.analyze("discard")
    lab.commit("boom", variant(depth=99))
    lab.crash("crash: the loss is NaN at step 3, loss nan\n")
    lab.analyze()
    report = (lab.archive / "report.md").read_text()
    assert f"**Best: 0.998000** ({base}, 1 run(s)): baseline" in report
    assert f"- {near} 0.998500 (discard): nearly" in report
    assert f"- {base}, the best, rests on one run" in report
    assert "boom: the loss is NaN at step 3, loss nan" in report


def test_importing_does_nothing_and_needs_neither_torch_nor_pandas_nor_matplotlib(tmp_path):
    code = "import sys, analyze; print(sorted({'torch', 'pandas', 'matplotlib', 'prepare'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert list(tmp_path.iterdir()) == []
