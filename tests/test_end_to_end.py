"""Real runs of a few seconds on the CPU, as a person would start them: prepare.py, then train.py, then what is left."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def environment(cache, **more):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AUTORESEARCH_", "AUTO_LOG_RESEARCH"))}
    return clean | {"AUTORESEARCH_CACHE": str(cache), "AUTORESEARCH_DEMO": "1", "CUDA_VISIBLE_DEVICES": ""} | more


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A small data set: text in which a model finds something to learn within seconds."""
    folder = tmp_path_factory.mktemp("cache")
    words = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "ran", "to", "the", "house"]
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 60)) for i in range(600)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": f"{i}. {line}"}) for i, line in enumerate(lines)))
    command = [sys.executable, ROOT / "prepare.py", "--source", folder / "text.jsonl"]
    subprocess.run(command, env=environment(folder), check=True, capture_output=True)
    return folder


def workspace(folder, edit=lambda text: text):
    """A working folder with prepare.py and a train.py that is small enough for seconds, and changed by `edit`."""
    shutil.copy(ROOT / "prepare.py", folder)
    text = (ROOT / "train.py").read_text()
    small = text.replace("depth=4, aspect_ratio=32, head_dim=32", "depth=2, aspect_ratio=32, head_dim=32")
    assert small != text
    (folder / "train.py").write_text(edit(small))
    return folder


def replaced(old, new):
    def edit(text):
        assert text.count(old) == 1, old
        return text.replace(old, new)

    return edit


def train(folder, cache, *args, budget="3", **more):
    env = environment(cache, AUTORESEARCH_TIME_BUDGET=budget, **more)
    done = subprocess.run(
        [sys.executable, "train.py", *args], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return done.returncode, done.stdout.decode()


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    """One whole run, looked at by several tests: (folder, log)."""
    folder = workspace(tmp_path_factory.mktemp("run"))
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "train.py", "prepare.py"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    code, log = train(folder, cache)
    assert code == 0, log
    return folder, log


REFERENCE_METRICS = {
    *("step", "train/loss", "train/loss_smooth", "train/lr_multiplier", "train/muon_momentum", "train/weight_decay"),
    *("train/progress", "perf/step_time_ms", "perf/tokens_per_sec", "perf/mfu_percent"),
}
REFERENCE_SUMMARY = {
    *("depth", "aspect_ratio", "head_dim", "window_pattern", "total_batch_size", "device_batch_size", "embedding_lr"),
    *("unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay", "adam_betas", "warmup_ratio", "warmdown_ratio"),
    *("final_lr_frac", "max_seq_len", "time_budget", "git_commit", "val_bpb", "training_seconds", "total_seconds"),
    *("startup_seconds", "peak_vram_mb", "mfu_percent", "total_tokens_M", "num_steps", "num_params_M"),
}


def test_a_run_learns_and_keeps_to_its_budget(finished):
    folder, _ = finished
    steps, summary = read_metrics(folder), json.loads((folder / "run_summary.json").read_text())
    assert set(steps[0]) >= REFERENCE_METRICS
    assert [s["step"] for s in steps] == list(range(len(steps)))
    assert steps[-1]["train/loss"] < steps[0]["train/loss"] - 1
    assert summary["num_steps"] == len(steps)
    assert summary["total_tokens_M"] == pytest.approx(len(steps) * 2048 / 1e6)
    # Stops at the first step that reaches the budget: the one before it had not.
    assert steps[-2]["time/training_s"] < 3 <= steps[-1]["time/training_s"]
    assert summary["training_seconds"] == steps[-1]["time/training_s"]
    assert sum(s["perf/step_time_ms"] for s in steps) / 1000 == pytest.approx(summary["training_seconds"])
    for before, after in itertools.pairwise(steps):
        assert after["train/progress"] == pytest.approx(before["time/training_s"] / 3)


def test_the_smoothed_loss_is_the_debiased_average(finished):
    average = 0.0
    for i, s in enumerate(read_metrics(finished[0])):
        average = 0.9 * average + 0.1 * s["train/loss"]
        assert s["train/loss_smooth"] == pytest.approx(average / (1 - 0.9 ** (i + 1)))


def test_the_summary_names_everything_a_comparison_needs(finished):
    folder, _ = finished
    summary = json.loads((folder / "run_summary.json").read_text())
    start = json.loads((folder / "run_start.json").read_text())
    record = json.loads((folder / "eval_record.json").read_text())
    assert set(summary) >= REFERENCE_SUMMARY
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=folder, text=True).strip()
    assert (summary["git_commit"], summary["git_dirty"]) == (head, False)
    assert (summary["width"], summary["num_heads"], summary["window_sizes"]) == (64, 2, [128, 256])
    assert summary["run_id"] == start["run_id"]
    assert summary["val_bpb"] == record["val_bpb"]
    assert (record["causal"], record["num_calls"], record["tokens"]) == (True, 1, 65536)
    assert record["data_fingerprint"] == summary["data_fingerprint"] == start["data_fingerprint"]
    assert start["train_py"] == (folder / "train.py").read_text()


def test_layers_are_looked_at_every_hundredth_of_the_budget(finished):
    steps, due = read_metrics(finished[0]), 0.0
    for s in steps:
        assert ("layers/names" in s) == (s["train/progress"] >= due)
        due = s["train/progress"] + 0.01 if "layers/names" in s else due
    first = steps[0]
    assert set(first["layers/names"]) >= {"blocks.0", "blocks.1.mlp.c_proj", "lm_head"}
    assert len(first["layers/names"]) == len(first["layers/rms"]) == len(first["layers/zeros"])
    relu = first["layers/names"].index("blocks.0.mlp.c_proj")
    assert 0.3 < first["layers/input_zeros"][relu] < 0.7  # relu of a symmetric input
    assert len(first["scalars/resid_lambdas"]) == 2
    wte = first["params/names"].index("wte.weight")
    assert first["params/weight_rms"][wte] == pytest.approx(1.0, rel=0.5)
    assert first["params/update_rms"][wte] > 0


def test_the_log_begins_with_the_run_and_ends_with_the_closing_block(finished):
    folder, log = finished
    summary = json.loads((folder / "run_summary.json").read_text())
    lines = log.splitlines()
    assert lines[0] == f"run {summary['run_id']}"
    assert lines[-10] == "---"
    assert lines[-9] == f"val_bpb:          {summary['val_bpb']:.6f}"
    keys = [re.match(r"(\w+): +\S+$", line)[1] for line in lines[-9:]]
    assert keys == [
        *("val_bpb", "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent"),
        *("total_tokens_M", "num_steps", "num_params_M", "depth"),
    ]


def test_kill_9_leaves_every_finished_step_readable(cache, tmp_path):
    folder = workspace(tmp_path)
    env = environment(cache, AUTORESEARCH_TIME_BUDGET="600")
    process = subprocess.Popen([sys.executable, "train.py"], cwd=folder, env=env, stdout=subprocess.DEVNULL)
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 5):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.05)
        assert process.returncode is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    text = metrics.read_text()
    steps = [json.loads(line) for line in text.splitlines() if text.endswith("\n")]
    assert [s["step"] for s in steps] == list(range(len(steps)))
    assert len(steps) >= 5
    assert not (folder / "run_summary.json").exists()


def test_a_crashed_run_never_inherits_the_last_score(finished, cache, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "w")
    old = json.loads((folder / "run_summary.json").read_text())
    workspace(folder, replaced("relu2_mlp(x, self.c_fc, self.c_proj)", "self.c_proj(self.c_fc(x)[..., :-1])"))
    code, log = train(folder, cache)
    assert code == 1
    assert "RuntimeError" in log.splitlines()[-1]
    assert log.splitlines()[-1].startswith("crash: ")
    assert log.splitlines()[-1].endswith("before the first step")
    assert not (folder / "run_summary.json").exists()
    assert not (folder / "eval_record.json").exists()
    start = json.loads((folder / "run_start.json").read_text())
    assert (start["git_dirty"], start["ended"]) == (True, log.splitlines()[-1])
    kept = folder / ".auto-log-research" / "unfiled" / old["run_id"]
    assert json.loads((kept / "run_summary.json").read_text()) == old
    assert not (kept / "checkpoint.pt").exists()  # scored: no longer needed


def test_a_nan_ends_the_run_with_step_and_loss(cache, tmp_path):
    folder = workspace(tmp_path, replaced("embedding_lr: float = 0.6", 'embedding_lr: float = float("nan")'))
    code, log = train(folder, cache)
    assert code == 1
    last = log.splitlines()[-1]
    assert re.fullmatch(r"crash: the loss (is NaN|exploded) at step \d+, loss \S+", last), last
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == int(re.search(r"step (\d+)", last)[1]) + 1
    assert not (folder / "run_summary.json").exists()


def test_a_failed_evaluation_costs_nothing(cache, tmp_path):
    val = next((cache / "demo" / "tokens" / "val").glob("*.bin"))
    hidden = val.rename(val.with_suffix(".hidden"))
    folder = workspace(tmp_path)
    try:
        code, log = train(folder, cache, budget="1")
    finally:
        hidden.rename(val)
    assert code == 2
    assert f"error: {val} is missing or damaged" in log
    assert (folder / "checkpoint.pt").exists()
    num_steps = len(read_metrics(folder))
    code, log = train(folder, cache, "--score", budget="1")
    assert code == 0, log
    summary = json.loads((folder / "run_summary.json").read_text())
    assert summary["num_steps"] == num_steps == len(read_metrics(folder))
    assert f"val_bpb:          {summary['val_bpb']:.6f}" in log
    assert summary["run_id"] == json.loads((folder / "run_start.json").read_text())["run_id"]


def test_only_the_script_that_wrote_a_checkpoint_may_score_it(finished, cache, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "w")
    with open(folder / "train.py", "a") as f:
        f.write("# another\n")
    code, log = train(folder, cache, "--score")
    assert code == 2
    assert log.splitlines()[-1] == "error: checkpoint.pt was written by another train.py: check that one out first"


def test_missing_data_is_an_error_of_the_environment(tmp_path):
    code, log = train(workspace(tmp_path), tmp_path / "empty")
    assert code == 2
    assert log.splitlines()[-1] == (
        f"error: no tokenizer at {tmp_path}/empty/demo/tokenizer/tokenizer.json: "
        "run `AUTORESEARCH_DEMO=1 uv run prepare.py` first"
    )


def test_without_a_gpu_the_demo_is_pointed_out(cache, tmp_path):
    folder, env = workspace(tmp_path), environment(cache)
    del env["AUTORESEARCH_DEMO"]
    done = subprocess.run([sys.executable, "train.py"], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no CUDA GPU found")
    assert "AUTORESEARCH_DEMO=1 uv run prepare.py && AUTORESEARCH_DEMO=1 uv run train.py" in done.stderr


def test_a_shorter_budget_is_for_the_demo_alone(cache, tmp_path):
    folder, env = workspace(tmp_path), environment(cache, AUTORESEARCH_TIME_BUDGET="3")
    del env["AUTORESEARCH_DEMO"]
    done = subprocess.run([sys.executable, "train.py"], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "AUTORESEARCH_TIME_BUDGET is for the demo alone" in done.stderr


def test_a_leaking_model_is_caught(cache, tmp_path):
    ahead = "norm(F.embedding(idx, table) + 0.1 * F.embedding(idx.roll(-1, 1), table))"
    edit = replaced("norm(F.embedding(idx, table))", ahead)
    folder = workspace(tmp_path, edit)
    code, log = train(folder, cache, budget="1")
    assert code == 0
    assert "LOOKS AHEAD" in log
    assert json.loads((folder / "eval_record.json").read_text())["causal"] is False
