"""How long analyze.py takes, and how much memory, with few and with many runs in the archive.

    uv run tests/bench_analyze.py [--runs 500 5000] [--steps 1000] [--repeat 3] [--keep FOLDER]

Makes up archives in a temporary folder, files one more run in each with `uv run analyze.py`, then asks for `status` and
`check`, and prints wall times and peak memory. Exits 1 if a limit is missed: to file, 3 s with 500 runs and 10 s with
5000; 1.5 s for status and check with 500; 600 MB.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import analyze  # noqa: E402

LIMITS_S = {500: (3.0, 1.5, 1.5), 5000: (10.0, 10.0, 10.0)}  # to file, for status, for check
LIMIT_MB = 600.0
BUDGET_S, BATCH, NUM_BYTES = 300.0, 524_288, 100_000_000
LINEARS = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
LAYERS = [f"blocks.{i}.{part}" for i in range(8) for part in LINEARS] + ["lm_head"]
IDEAS = ("depth {}", "matrix_lr x{}", "rotary base {}K", "warmdown {} %", "batch 2^{} tokens", "window pattern no. {}")


def make_metrics(num_steps: int, rng: np.random.Generator) -> str:
    """A metrics.jsonl with every key that train.py writes, layer statistics at every hundredth of the steps."""
    step_ms, lines, smooth = 1000 * BUDGET_S / num_steps, [], 0.0
    end_s = 0.0
    for i in range(num_steps):
        ms = step_ms * (1 + 0.01 * rng.standard_normal())
        progress, end_s = min(end_s / BUDGET_S, 1.0), end_s + ms / 1000
        lr = min(1.0, (1 - progress) / 0.5)
        loss = 2.0 + 7 * ((i + 3) / 3) ** -0.5 - 0.2 * (1 - lr) + 0.02 * rng.standard_normal()
        smooth = 0.9 * smooth + 0.1 * loss
        record = {
            "step": i, "train/loss": loss, "train/loss_smooth": smooth / (1 - 0.9 ** (i + 1)),
            "train/lr_multiplier": lr,
            "train/muon_momentum": min(0.95, 0.85 + 0.1 * i / 300), "train/weight_decay": 0.2 * (1 - progress),
            "train/progress": progress, "perf/step_time_ms": ms, "perf/tokens_per_sec": BATCH / ms * 1000,
            "perf/mfu_percent": 40.0, "time/unix_s": 1.7e9 + end_s, "time/training_s": end_s,
            "train/tokens": (i + 1) * BATCH, "train/epoch": 1, "train/grad_norm": 0.3 + 2 / (i + 3),
            "lr/lm_head": 0.005 * lr, "lr/wte": 0.7 * lr, "lr/muon_512x512": 0.04 * lr, "lr/x0_lambdas": 0.5 * lr,
        }
        if i % max(1, num_steps // 100) == 0:
            noise = np.exp(0.3 * rng.standard_normal(len(LAYERS)))
            record |= {
                "layers/names": LAYERS, "layers/rms": list(noise * (0.1 + i / num_steps)),
                "layers/zeros": [0.01] * len(LAYERS),
                "layers/input_zeros": [0.8 if "c_proj" in n and "mlp" in n else 0.01 for n in LAYERS],
                "layers/dead": [0.0] * len(LAYERS), "params/names": LAYERS, "params/grad_rms": list(1e-3 * noise),
                "params/weight_rms": [0.04] * len(LAYERS), "params/update_rms": list(1e-4 * noise * (lr + 0.01)),
                "scalars/resid_lambdas": list(1 + 0.1 * rng.standard_normal(8)), "scalars/x0_lambdas": [0.1] * 8,
                "logits/rms": 2.0, "logits/max_abs": 14.0, "logits/entropy": 2.5, "logits/max_prob": 0.4,
            }
        lines.append(json.dumps(record))
    return "\n".join(lines) + "\n"


def make_run(folder: Path, number: int, val_bpb: float, text: str, commit: str, metrics: Path, num_steps: int) -> None:
    """The files of one finished run. Its metrics are a hard link: what is read is the same, the disk holds one copy."""
    folder.mkdir(parents=True, exist_ok=True)
    start = {"run_id": f"20260301-{number:06d}-beef", "started_unix": 1.7e9 + 400 * number, "git_commit": commit,
             "git_dirty": False, "train_py": text, "train_sha256": hashlib.sha256(text.encode()).hexdigest(),
             "prepare_sha256": "0" * 64, "data_fingerprint": "0123456789abcdef"}
    config = {f"option_{i}": i for i in range(30)} | {"depth": number % 12, "seed": 42, "total_batch_size": BATCH}
    summary = config | {
        "time_budget": BUDGET_S, "val_bpb": val_bpb, "training_seconds": 300.1, "total_seconds": 360.0,
        "peak_vram_mb": 45_056.0, "mfu_percent": 40.0, "total_tokens_M": num_steps * BATCH / 1e6,
        "num_steps": num_steps,
        "num_params_M": 50.3, "gpu_name": "Abacus 3000", "run_id": start["run_id"], "git_commit": commit,
    }
    evaluation = {"val_bpb": val_bpb, "nats": val_bpb * math.log(2) * NUM_BYTES, "bytes": NUM_BYTES,
                  "tokens": 22_000_000,
                  "causal": True, "num_calls": 1, "data_fingerprint": "0123456789abcdef"}
    for name, value in (("run_start.json", start), ("run_summary.json", summary), ("eval_record.json", evaluation)):
        (folder / name).write_text(json.dumps(value))
    (folder / "run.log").write_text(f"run {start['run_id']}\n---\nval_bpb: {val_bpb:.6f}\n")
    (folder / "train.py").write_text(text)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    os.link(metrics, folder / "metrics.jsonl")


def make_archive(folder: Path, num_runs: int, num_steps: int) -> str:
    """A repository with train.py and an archive of a night like those seen in public: about one in six kept, some
    crashes, a few replicates. Returns the commit of the working tree."""
    rng, archive, sources = np.random.default_rng(0), folder / ".auto-log-research", []
    folder.mkdir(parents=True)
    for name in ("prepare.py", "train.py"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".gitignore").write_text("*\n!train.py\n!prepare.py\n")
    for arguments in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=b", "-c", "user.email=b@b", "commit", "-qm", "one more"],
    ):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True).stdout
    for i in range(4):
        sources.append(folder / f"metrics{i}")
        sources[-1].write_text(make_metrics(num_steps, rng))
    text, rows, best = (ROOT / "train.py").read_text(), [], 0.998
    for i in range(num_runs):
        name, idea = hashlib.sha256(str(i).encode()).hexdigest()[:7], IDEAS[i % len(IDEAS)].format(i)
        gain = rng.exponential(0.002 * best) if i and rng.random() < 0.16 else 0.0
        val = best - gain if gain or i == 0 else best + rng.exponential(0.004) + (0.3 if rng.random() < 0.03 else 0)
        is_crash = i > 0 and not gain and rng.random() < 0.06
        best, run_folder = min(best, val), archive / name
        twin = i
        if not gain and rng.random() < 0.04:  # a replicate of the first run
            twin, val = 0, 0.998 + 0.0008 * rng.standard_normal()
        make_run(run_folder, i, round(val, 6), f"{text}\nVARIANT = {twin}\n", f"{i:040x}", sources[i % 4], num_steps)
        if is_crash:
            (run_folder / "run_summary.json").unlink()
            (run_folder / "run.log").write_text("crash: the loss is NaN at step 999, loss nan\n")
        origin = analyze.Origin(name, description="baseline" if i == 0 else idea)
        status = "crash" if is_crash else "keep" if gain or i == 0 else "discard"
        record = analyze.compute_record(analyze.load_folder(run_folder, name), {}, origin)
        record |= {"folder": str(folder), "status": status}  # as a decision leaves it there
        # As large as a real one: what grows with the archive is the reading of these.
        filler = {"filler": [{"step": k, "value": k / 7} for k in range(150)]}
        (run_folder / "analysis.md").write_text(f"# {name}\n\n{analyze.NOTES_HEADING}\n")
        (run_folder / "stats.json").write_text(json.dumps(analyze.plain({"record": record, "verdict": {}} | filler)))
        rows.append(analyze.format_row(analyze.Entry(name, status, record["description"], record)))
    (archive / "results.tsv").write_text(analyze.HEADER + "\n" + "".join(rows))
    return commit.strip()


def timed(folder: Path, *arguments: str) -> tuple[float, float]:
    """Seconds and peak MB of `uv run analyze.py ARGUMENTS`."""
    command = ["uv", "run", "--project", str(ROOT), str(ROOT / "analyze.py"), *arguments]
    began = time.perf_counter()
    cached = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}  # as a user has it: packages are compiled once
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, env=cached)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0 or arguments == ("check",), status  # the program was just trained
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def measure(folder: Path, number: int, commit: str, num_steps: int) -> list[tuple[float, float]]:
    text = (folder / "train.py").read_text()
    make_run(folder, 100_000 + number, 0.95, text, commit, folder / "metrics0", num_steps)
    return [timed(folder), timed(folder, "status"), timed(folder, "check")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[500, 5000])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="make the archives here and leave them")
    options = parser.parse_args()
    root, is_good = options.keep or Path(tempfile.mkdtemp(prefix="bench_analyze_")), True
    print(f"{'runs':>6} {'file s':>8} {'status s':>8} {'check s':>8} {'peak MB':>8}  (medians)")
    for num_runs in sorted(options.runs):
        folder = root / f"runs{num_runs}"
        commit = make_archive(folder, num_runs, options.steps)
        found = np.array([measure(folder, i, commit, options.steps) for i in range(options.repeat)])
        seconds, peak_mb = np.median(found[:, :, 0], axis=0), found[:, :, 1].max()
        is_met = all(seconds <= LIMITS_S.get(num_runs, (math.inf,) * 3)) and peak_mb <= LIMIT_MB
        is_good &= bool(is_met)
        print(f"{num_runs:6}" + "".join(f" {s:8.2f}" for s in seconds) + f" {peak_mb:8.0f}"
              + ("" if is_met else "  MISSED"), flush=True)
    if options.keep is None:
        shutil.rmtree(root)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
