"""Real runs of a few seconds on the CPU, as a person would start them: prepare.py, then train.py, then what is left."""

import contextlib
import fcntl
import hashlib
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
import torch

import prepare

ROOT = Path(__file__).parent.parent


def environment(cache, **more):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AUTORESEARCH_", "AUTO_LOG_RESEARCH"))}
    ours = {"AUTORESEARCH_CACHE": str(cache), "AUTORESEARCH_DEMO": "1"}
    return clean | ours | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | more


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
    small = text.replace("depth: int = 4 if DEMO", "depth: int = 2 if DEMO")
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
    assert [s["train/tokens"] for s in steps] == [2048 * (s["step"] + 1) for s in steps]
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
    assert (record["causal"], record["num_calls"], record["tokens"], record["faults"]) == (True, 1, 65536, [])
    for key in ("run_id", "data_fingerprint", "measurement_sha256"):
        assert record[key] == summary[key] == start[key], key
    assert (summary["seed"], summary["seed_offset"], summary["eval_tokens"], start["demo"]) == (42, 0, 65536, True)
    assert (summary["profile"], summary["other_gpu_mb"]) == (None, None)  # no GPU
    assert start["modules"] == {}
    assert start["train_py"] == (folder / "train.py").read_text()


def test_layers_are_looked_at_every_hundredth_of_the_budget(finished):
    steps, due = read_metrics(finished[0]), 0.0
    for s in steps:
        assert ("layers/names" in s) == (s["train/progress"] >= due)
        due = s["train/progress"] + 0.01 if "layers/names" in s else due
    first = steps[0]
    assert first["gpu/other_mb"] is None
    assert first["machine/load"] >= 0
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
    assert "demo" in lines[0]
    assert lines[-11:-9] == ["The demo's score, which compares with none of a real run:", "---"]
    assert lines[-9] == f"val_bpb:          {summary['val_bpb']:.6f}"
    keys = [re.match(r"(\w+): +\S+$", line)[1] for line in lines[-9:]]
    assert keys == [
        *("val_bpb", "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent"),
        *("total_tokens_M", "num_steps", "num_params_M", "depth"),
    ]


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
    kept = folder / ".auto-log-research" / "demo" / "unfiled" / old["run_id"]
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
    fail = '    if "FAIL" in os.environ:\n        raise OSError(28, "No space left on device")\n    model.eval()\n'
    folder = workspace(tmp_path, replaced("    model.eval()\n", fail))
    code, log = train(folder, cache, budget="1", FAIL="1")
    assert code == 2
    assert log.splitlines()[-1] == "error: [Errno 28] No space left on device"
    assert (folder / "checkpoint.pt").exists()
    num_steps = len(read_metrics(folder))
    code, log = train(folder, cache, "--score", budget="1")
    assert code == 0, log
    summary = json.loads((folder / "run_summary.json").read_text())
    assert summary["num_steps"] == num_steps == len(read_metrics(folder))
    assert f"val_bpb:          {summary['val_bpb']:.6f}" in log
    start = json.loads((folder / "run_start.json").read_text())
    record = json.loads((folder / "eval_record.json").read_text())
    assert summary["run_id"] == start["run_id"] == record["run_id"]
    assert "ended" not in start
    assert log.splitlines()[0] == f"run {summary['run_id']}"


def read_json(path):
    return json.loads(path.read_text())


def start_training(folder, cache, budget="600", **options):
    """A run in the background, once it has logged two steps."""
    env = environment(cache, AUTORESEARCH_TIME_BUDGET=budget)
    log = open(folder / "run.log", "w")  # noqa: SIM115
    process = subprocess.Popen([sys.executable, "train.py"], cwd=folder, env=env, stdout=log, stderr=log, **options)
    while (folder / "metrics.jsonl").read_bytes().count(b"\n") < 2 if (folder / "metrics.jsonl").exists() else True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.05)
        assert process.returncode is None, (folder / "run.log").read_text()
    return process


def is_running(folder):
    with open(folder / "metrics.jsonl") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "run.log"}


def test_a_run_in_progress_is_recorded_as_it_was_started_and_refuses_a_second_until_it_is_interrupted(cache, tmp_path):
    folder = workspace(tmp_path, lambda text: text.replace("import torch\n", "import torch\nimport own\n", 1))
    (folder / "own.py").write_text("SIZE = 1\n")
    text = (folder / "train.py").read_text()
    # As a shell does for a command in the background: it is told to ignore interrupts.
    first = start_training(folder, cache, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert is_running(folder)
    assert [s["step"] for s in read_metrics(folder)[:2]] == [0, 1]  # readable while it runs
    start = (folder / "run_start.json").read_bytes()
    for args in ([], ["--score"]):
        code, log = train(folder, cache, *args)
        run = json.loads(start)
        line = f"error: run {run['run_id']} is in progress here, process {first.pid}: wait for it"
        assert (code, log.strip()[: len(line)], log.strip().count("\n")) == (2, line, 0)
    assert (folder / "run_start.json").read_bytes() == start
    assert not (folder / ".auto-log-research").exists()
    (folder / "train.py").write_text("raise SystemExit\n")
    (folder / "own.py").write_text("SIZE = 2\n")
    num_steps = len(read_metrics(folder))
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=60) == 130
    assert not is_running(folder)
    assert len(read_metrics(folder)) >= num_steps
    start = read_json(folder / "run_start.json")
    assert re.match(r"stopped: by an interrupt at step \d+, loss", start["ended"])
    assert (folder / "run.log").read_text().splitlines()[-1] == start["ended"]
    assert start["train_py"] == text
    assert start["train_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert start["modules"] == {"own.py": "SIZE = 1\n"}


EVERYTHING_AT_ONCE = [
    # Config holds what JSON cannot, the log is given tensors and numpy numbers, and no learning rate.
    ("    seed: int = 42", "    dtype: object = torch.float32\n    act: object = F.gelu\n    seed: int = 42"),
    ('"train/lr_multiplier": scale,', '"odd": torch.tensor(scale), "odder": torch.ones(2).numpy()[0],'),
    # The batch grows from one pass to three, and the context from a half to the whole.
    (
        "        values, (x, y, epoch) =",
        "        num_micro_steps = 1 if step < 5 else 3\n        values, (x, y, epoch) =",
    ),
    ("(model, batches, num_micro_steps)", "(model, halved(batches, step < 3), num_micro_steps)"),
    (
        "def update(",
        "def halved(batches, is_half):\n    for x, y, epoch in batches:\n        T = 128 if is_half else 256\n"
        "        yield x[:, :T], y[:, :T], epoch\n\n\ndef update(",
    ),
    # A child that would outlive the run.
    (
        "    optimizers = make_optimizers(model)\n    facts",
        "    import subprocess\n    child = subprocess.Popen(['sleep', '1000'])\n    print('child', child.pid)\n"
        "    optimizers = make_optimizers(model)\n    facts",
    ),
]


def test_a_run_with_a_growing_batch_and_context_odd_values_and_a_child_is_recorded_as_it_was(cache, tmp_path):
    def edit(text):
        for old, new in EVERYTHING_AT_ONCE:
            text = replaced(old, new)(text)
        return text

    folder = workspace(tmp_path, edit)
    code, log = train(folder, cache, budget="4", AUTORESEARCH_SEED_OFFSET="3")
    assert code == 0, log
    steps, summary = read_metrics(folder), read_json(folder / "run_summary.json")
    per_step = [1024, 1024, 1024, 2048, 2048, *[6144] * (len(steps) - 5)]
    assert [s["train/tokens"] for s in steps] == list(itertools.accumulate(per_step))
    assert summary["total_tokens_M"] == sum(per_step) / 1e6
    assert summary["mfu_percent"] is None
    for s, tokens in zip(steps, per_step, strict=True):
        assert s["perf/tokens_per_sec"] == pytest.approx(1000 * tokens / s["perf/step_time_ms"])
        micro_losses = s.get("train/micro_losses", [s["train/loss"]])
        assert len(micro_losses) == (1 if s["step"] < 5 else 3)
        assert sum(micro_losses) / len(micro_losses) == pytest.approx(s["train/loss"], rel=1e-5)
    assert (steps[0]["odd"], steps[0]["odder"]) == (1.0, 1.0)
    assert summary["dtype"] == "torch.float32"
    assert "gelu" in summary["act"]
    assert (summary["seed"], summary["seed_offset"]) == (45, 3)
    assert read_json(folder / "eval_record.json")["faults"] == []
    child = int(re.search(r"child (\d+)", log)[1])
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"  # dead, and perhaps not buried


def test_the_sum_of_the_data_is_that_of_the_tokens_in_order(finished, cache, monkeypatch):
    monkeypatch.setattr(prepare, "TOKENS_DIR", cache / "demo" / "tokens")
    monkeypatch.setattr(prepare, "TOKENIZER_DIR", cache / "demo" / "tokenizer")
    monkeypatch.setattr(prepare, "MANIFEST_PATH", cache / "demo" / "manifest.json")
    monkeypatch.setattr(prepare, "get_device", lambda: torch.device("cpu"))
    prepare.load_manifest.cache_clear()
    sums = [x.sum().item() for x, _, _ in itertools.islice(prepare.load_batches(8, 256, "train"), 5)]
    assert [s["train/data_sum"] for s in read_metrics(finished[0])[:5]] == list(itertools.accumulate(sums))
    prepare.load_manifest.cache_clear()


def test_help_is_quick_and_wrong_arguments_are_refused(tmp_path):
    shutil.copy(ROOT / "train.py", tmp_path)  # without prepare.py: nothing is imported
    for argument, code in (("--help", 0), ("-h", 0), ("--depth=9", 2)):
        done = subprocess.run([sys.executable, "train.py", argument], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code
        assert "train.py [--score]" in done.stderr if code else "uv run train.py --score" in done.stdout


def test_an_interrupt_during_the_imports_is_quiet(tmp_path):
    shutil.copy(ROOT / "train.py", tmp_path)
    (tmp_path / "prepare.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_leaking_model_and_a_training_of_more_than_the_budget_have_no_score(cache, tmp_path):
    slow = "        for optimizer in optimizers:\n            optimizer.step()\n        if is_look:"
    ahead = "norm(self.wte(idx) + 0.1 * self.wte(idx.roll(-1, 1)))"

    def edit(text):
        text = replaced(slow, slow.replace("        if is", "        time.sleep(3)\n        if is"))(text)
        return replaced("norm(self.wte(idx))", ahead)(text)

    folder = workspace(tmp_path, edit)
    code, log = train(folder, cache, budget="1")
    assert code == 0, log
    assert "LOOKS AHEAD" in log
    record = read_json(folder / "eval_record.json")
    assert record["causal"] is False
    too_long, leak = record["faults"]
    assert re.fullmatch(r"training took \d+% of the budget \(a step is too long\)", too_long)
    assert leak == f"LOOKS AHEAD: {record['finding']}"


UPSTREAM = """
# The calls of upstream's train.py, in its order, with a small model of our own.
import gc
import math
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from prepare import MAX_SEQ_LEN, TIME_BUDGET, Tokenizer, evaluate_bpb, make_dataloader


@dataclass
class GPTConfig:
    vocab_size: int
    n_embd: int = 64


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    @torch.no_grad()
    def init_weights(self):
        nn.init.normal_(self.wte.weight, std=1.0)
        nn.init.normal_(self.lm_head.weight, std=0.001)

    def forward(self, idx, targets=None, reduction="mean"):
        logits = self.lm_head(F.rms_norm(self.wte(idx), (64,))).float()
        logits = 15 * torch.tanh(logits / 15)
        if targets is None:
            return logits
        return F.cross_entropy(
            logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1, reduction=reduction
        )


t_start = time.time()
torch.manual_seed(42)
TOTAL_BATCH_SIZE, DEVICE_BATCH_SIZE, CRASH = 2**12, 8, False
tokenizer = Tokenizer.from_directory()
config = GPTConfig(vocab_size=tokenizer.get_vocab_size())
with torch.device("meta"):
    model = GPT(config)
model.to_empty(device="cpu")
model.init_weights()
num_params = sum(p.numel() for p in model.parameters())
grad_accum_steps = TOTAL_BATCH_SIZE // (DEVICE_BATCH_SIZE * MAX_SEQ_LEN)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.03, betas=(0.8, 0.95))
model = torch.compile(model, dynamic=False, backend="eager")
train_loader = make_dataloader(tokenizer, DEVICE_BATCH_SIZE, MAX_SEQ_LEN, "train")
x, y, epoch = next(train_loader)  # the first batch, fetched ahead
print(f"Time budget: {TIME_BUDGET}s")
print(f"Gradient accumulation steps: {grad_accum_steps}")

smooth_train_loss, total_training_time, step = 0, 0, 0
while True:
    t0 = time.time()
    for micro_step in range(grad_accum_steps):
        loss = model(x, y)
        train_loss = loss.detach()
        loss = loss / grad_accum_steps
        loss.backward()
        x, y, epoch = next(train_loader)
    progress = min(total_training_time / TIME_BUDGET, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.03 * (1 - progress)
    optimizer.step()
    model.zero_grad(set_to_none=True)
    train_loss_f = train_loss.item()
    if math.isnan(train_loss_f) or train_loss_f > 100:
        print("FAIL")
        exit(1)
    dt = time.time() - t0
    if step > 10:
        total_training_time += dt
    smooth_train_loss = 0.9 * smooth_train_loss + 0.1 * train_loss_f
    debiased = smooth_train_loss / (1 - 0.9 ** (step + 1))
    print(f"\\rstep {step:05d} | loss: {debiased:.6f} | epoch: {epoch}    ", end="", flush=True)
    if step == 0:
        gc.collect()
        gc.freeze()
        gc.disable()
    if CRASH and step == 5:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    step += 1
    if step > 10 and total_training_time >= TIME_BUDGET:
        break
print()
total_tokens = step * TOTAL_BATCH_SIZE
model.eval()
val_bpb = evaluate_bpb(model, tokenizer, DEVICE_BATCH_SIZE)
t_end = time.time()
print("---")
print(f"val_bpb:          {val_bpb:.6f}")
print(f"training_seconds: {total_training_time:.1f}")
print(f"total_seconds:    {t_end - t_start:.1f}")
print(f"peak_vram_mb:     {0.0:.1f}")
print(f"mfu_percent:      {0.0:.2f}")
print(f"total_tokens_M:   {total_tokens / 1e6:.1f}")
print(f"num_steps:        {step}")
print(f"num_params_M:     {num_params / 1e6:.1f}")
print(f"depth:            {0}")
"""


def test_an_upstream_training_script_runs_unchanged_and_the_books_keep_its_runs_apart(cache, tmp_path):
    """Twice, with a crash between, then ours; each run filed with its own score under its own commit."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("prepare.py", "analyze.py", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], cwd=folder, check=True)
    ours = workspace(tmp_path).joinpath("train.py").read_text()
    programs = {
        "upstream": UPSTREAM,
        "crashing": UPSTREAM.replace("CRASH = 2**12, 8, False", "CRASH = 2**12, 8, True"),
        "again": UPSTREAM.replace("lr=0.03", "lr=0.02"),
        "ours": ours,
    }
    env = environment(cache, AUTORESEARCH_TIME_BUDGET="1")
    scores, ids = {}, {}
    for subject, text in programs.items():
        (folder / "train.py").write_text(text)
        subprocess.run([*git, "add", "-A"], cwd=folder, check=True)
        subprocess.run([*git, "commit", "-qm", subject], cwd=folder, check=True)
        with open(folder / "run.log", "w") as log:
            code = subprocess.run([sys.executable, "train.py"], cwd=folder, env=env, stdout=log, stderr=log).returncode
        log = (folder / "run.log").read_text()
        assert code == (subject == "crashing"), log
        start = read_json(folder / "run_start.json")
        ids[subject] = start["run_id"]
        assert f"run {start['run_id']}" in log.splitlines()
        assert (start["train_py"], start["git_dirty"], start["demo"]) == (text, False, True)
        if subject == "crashing":
            assert not (folder / "eval_record.json").exists()
        else:
            record = read_json(folder / "eval_record.json")
            assert (record["run_id"], record["faults"], record["tokens"]) == (start["run_id"], [], 65536)
            scores[subject] = record["val_bpb"]
            assert f"val_bpb:          {scores[subject]:.6f}" in log
        done = subprocess.run([sys.executable, "analyze.py"], cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(set(ids.values())) == 4
    (table,) = folder.rglob("results.tsv")
    rows = [line.split("\t") for line in table.read_text().splitlines()]
    found = {row["description"]: row for row in (dict(zip(rows[0], row, strict=True)) for row in rows[1:])}
    assert list(found) == list(programs)
    assert found["crashing"]["status"] == "crash"
    for subject, val_bpb in scores.items():
        assert float(found[subject]["val_bpb"]) == pytest.approx(val_bpb, abs=1e-6)
