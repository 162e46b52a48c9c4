"""prepare.py: text in, tokens packed, the score by hand, downloads from a server that misbehaves, what a run leaves."""

import functools
import itertools
import json
import math
import random
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from bench_loader import pack_rows_straightforward
from conftest import ROOT, command_env, explicit_attention, run_command
from torch import nn

import prepare

# ---------------------------------------------------------------------------------------------------------------------
# Prefetch and loader
# ---------------------------------------------------------------------------------------------------------------------


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_an_exception_in_the_prefetch_thread_is_raised_in_the_consumer():
    def items():
        yield 1
        raise OSError("the disk went away")

    fetched = prepare.prefetch(items())
    assert next(fetched) == 1
    with pytest.raises(OSError, match="the disk went away"):
        next(fetched)


def test_closing_the_prefetcher_ends_its_thread():
    before = set(prefetch_threads())
    fetched = prepare.prefetch(itertools.count())
    assert next(fetched) == 0
    (thread,) = set(prefetch_threads()) - before
    fetched.close()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_the_prefetcher_reads_at_most_its_depth_ahead():
    produced, is_six = [], threading.Event()

    def items():
        for i in itertools.count():
            produced.append(i)
            if len(produced) == 6:
                is_six.set()
            yield i

    fetched = prepare.prefetch(items(), depth=4)
    assert next(fetched) == 0
    assert is_six.wait(10)  # one taken, four waiting, one in the thread's hand
    for taken in range(2, 200):
        assert next(fetched) == taken - 1
        assert len(produced) <= taken + 5
    fetched.close()


def test_document_batches_are_128_at_most_within_a_row_group_in_the_order_of_names(two_shards):
    batches = prepare.read_document_batches("train")
    tokenizer = prepare.Tokenizer.from_directory()
    for epoch in (1, 2):
        read = [next(batches) for _ in range(14)]
        assert [len(documents) for documents, _ in read] == [128, 72, 128, 72, 128, 72, 100] * 2
        assert {e for _, e in read} == {epoch}
        texts = [tokenizer.decode(document[1:].tolist()) for documents, _ in read for document in documents]
        expected = [pq.read_table(two_shards / name)["text"].to_pylist() for name in ("a.parquet", "b.parquet")]
        assert texts == expected[0] + expected[1]


def test_the_loader_yields_shifted_rows_of_the_reference_packer_for_ever(two_shards):
    tokenizer = prepare.Tokenizer.from_directory()
    B, T = 4, 24
    documents = (([d.tolist() for d in batch], epoch) for batch, epoch in prepare.read_document_batches("train"))
    expected = pack_rows_straightforward(documents, B, T + 1)
    loader = prepare.make_dataloader(tokenizer, B, T, "train")
    epochs = []
    for (x, y, epoch), (rows, expected_epoch) in itertools.islice(zip(loader, expected, strict=True), 130):
        assert (x.dtype, y.dtype, x.shape, y.shape) == (torch.int64, torch.int64, (B, T), (B, T))
        assert torch.equal(x, rows[:, :-1])
        assert torch.equal(y, rows[:, 1:])
        assert epoch == expected_epoch
        assert (x[:, 0] == tokenizer.get_bos_token_id()).all()
        epochs.append(epoch)
    assert epochs[0] == 1
    assert epochs[-1] >= 2
    loader.close()


def test_closing_the_loader_ends_its_thread(two_shards):
    before = set(prefetch_threads())
    loader = prepare.make_dataloader(prepare.Tokenizer.from_directory(), 2, 8, "val")
    next(loader)
    (thread,) = set(prefetch_threads()) - before
    loader.close()
    thread.join(timeout=10)
    assert not thread.is_alive()


# ---------------------------------------------------------------------------------------------------------------------
# Bits per byte
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scoring(two_shards, monkeypatch):
    """Tokenizer and the 12 batches of 4 x 16 targets that the metric must score, straight from the specification."""
    monkeypatch.setattr(prepare, "MAX_SEQ_LEN", 16)
    monkeypatch.setattr(prepare, "EVAL_TOKENS", 12 * 4 * 16 + 63)  # 63 more: not enough for another batch
    monkeypatch.setattr(prepare, "_num_evaluations", 0)
    documents = (([d.tolist() for d in batch], epoch) for batch, epoch in prepare.read_document_batches("val"))
    rows = [rows for rows, _ in itertools.islice(pack_rows_straightforward(documents, 4, 17), 12)]
    return prepare.Tokenizer.from_directory(), [(batch[:, :-1], batch[:, 1:]) for batch in rows]


class Predictor(nn.Module):
    """Scores next tokens from `features(x, y)` (B, T, 8); the last layer is random but the same in every test."""

    def __init__(self, vocab_size: int, features):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.embedding = nn.Parameter(torch.randn(vocab_size, 8, generator=generator))
        self.head = nn.Parameter(torch.randn(8, vocab_size, generator=generator))
        self.features = features

    def forward(self, x, y, reduction="mean"):
        logits = self.features(self, x, y) @ self.head
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction=reduction)
        return losses.view(y.shape) if reduction == "none" else losses


def past_mean(model, x, y):
    e = model.embedding[x]
    return e.cumsum(1) / torch.arange(1, x.size(1) + 1).view(1, -1, 1)


def next_token(model, x, y):
    return model.embedding[x.roll(-1, 1)]


def whole_row_mean(model, x, y):
    return past_mean(model, x, y) + model.embedding[x].mean(1, keepdim=True)


def own_target(model, x, y):
    return past_mean(model, x, y) + 4 * model.head.T[y]


def other_rows(model, x, y):
    return past_mean(model, x, y) + model.embedding[x].mean(0, keepdim=True)


def noise(model, x, y):
    return past_mean(model, x, y) + torch.rand(1)


def score(tokenizer, features, batch_size=4) -> tuple[float, dict]:
    model = Predictor(tokenizer.get_vocab_size(), features)
    bpb = prepare.evaluate_bpb(model, tokenizer, batch_size)
    with open("eval_record.json") as f:
        return bpb, json.load(f)


def test_bits_per_byte_of_a_uniform_guess_are_as_by_hand(scoring):
    tokenizer, batches = scoring
    bpb, record = score(tokenizer, lambda model, x, y: torch.zeros(*x.shape, 8))
    targets = [t for _, y in batches for t in y.flatten().tolist()]
    texts = [tokenizer.enc.decode_single_token_bytes(t) for t in targets if t < tokenizer.get_bos_token_id()]
    num_bytes = sum(map(len, texts))
    nats = len(texts) * math.log(tokenizer.get_vocab_size())
    assert len(texts) < len(targets) == 12 * 4 * 16  # some targets are BOS: they count neither as nats nor as bytes
    assert bpb == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
    assert record["bytes"] == num_bytes
    assert record["nats"] == pytest.approx(nats, rel=1e-6)
    assert record["tokens"] == 768


def test_the_evaluation_record_says_what_was_scored_and_how_often(scoring):
    tokenizer, batches = scoring
    bpb, record = score(tokenizer, past_mean)
    model = Predictor(tokenizer.get_vocab_size(), past_mean)
    keeps = [(model(x, y, reduction="none"), y < tokenizer.get_bos_token_id()) for x, y in batches]
    nats = sum(losses[keep].double().sum().item() for losses, keep in keeps)
    assert list(record) == [
        "val_bpb",
        "nats",
        "bytes",
        "tokens",
        "causal",
        "data_fingerprint",
        "prepare_sha256",
        "num_calls",
    ]
    assert record["nats"] == pytest.approx(nats, rel=1e-6)
    assert record["val_bpb"] == bpb == pytest.approx(nats / math.log(2) / record["bytes"], rel=1e-6)
    assert record["causal"] is True
    assert record["data_fingerprint"] == prepare.load_manifest()["fingerprint"]
    assert record["prepare_sha256"] == prepare.sha256_file(ROOT / "prepare.py")
    assert record["num_calls"] == 1
    assert score(tokenizer, past_mean)[1]["num_calls"] == 2


def test_out_of_memory_halves_the_rows_and_gives_the_same_number(scoring, capsys):
    tokenizer, _ = scoring
    calls = []

    def small_gpu(model, x, y):
        calls.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return past_mean(model, x, y)

    bpb, record = score(tokenizer, small_gpu)
    expected, expected_record = score(tokenizer, past_mean)
    assert bpb == pytest.approx(expected, rel=1e-9)
    assert record["bytes"] == expected_record["bytes"]
    assert record["causal"] is True
    assert calls[:3] == [4, 2, 2]
    assert "out of GPU memory; going on with 2 rows at a time" in capsys.readouterr().out


def test_running_out_of_memory_with_a_single_row_is_an_error(scoring):
    tokenizer, _ = scoring

    def no_gpu(model, x, y):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        score(tokenizer, no_gpu)


@pytest.mark.parametrize("batch_size", [4, 16])
@pytest.mark.parametrize("features", [next_token, whole_row_mean, own_target, other_rows])
def test_a_model_that_sees_what_it_must_not_is_caught(scoring, features, batch_size, capsys):
    tokenizer, _ = scoring
    assert score(tokenizer, features, batch_size)[1]["causal"] is False
    assert "LOOKS AHEAD" in capsys.readouterr().out


@pytest.mark.parametrize("features", [next_token, whole_row_mean, own_target])
def test_a_leak_is_caught_in_batches_of_a_single_row_too(scoring, features):
    tokenizer, _ = scoring
    assert score(tokenizer, features, 1)[1]["causal"] is False


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_causal_model_is_not_accused(scoring, batch_size, capsys):
    tokenizer, _ = scoring
    assert score(tokenizer, past_mean, batch_size)[1]["causal"] is True
    assert "***" not in capsys.readouterr().out


def test_a_model_with_noise_gets_no_verdict(scoring, capsys):
    tokenizer, _ = scoring
    assert score(tokenizer, noise)[1]["causal"] is None
    assert "causality could not be tested" in capsys.readouterr().out


def test_scoring_leaves_the_random_state_alone(scoring):
    tokenizer, _ = scoring
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    score(tokenizer, past_mean)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_a_batch_larger_than_the_evaluation_is_an_error(scoring):
    tokenizer, _ = scoring
    with pytest.raises(ValueError, match="batch_size 1000 x 16 tokens is more than EVAL_TOKENS 831"):
        score(tokenizer, past_mean, 1000)


# ---------------------------------------------------------------------------------------------------------------------
# An upstream training script
# ---------------------------------------------------------------------------------------------------------------------


UPSTREAM_TRAINING_SCRIPT = """
import torch
import torch.nn as nn
import torch.nn.functional as F
from prepare import MAX_SEQ_LEN, TIME_BUDGET, Tokenizer, make_dataloader, evaluate_bpb

class Bigram(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx, targets=None, reduction="mean"):
        logits = self.table(idx).float()
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1, reduction=reduction)

torch.manual_seed(42)
tokenizer = Tokenizer.from_directory()
model = Bigram(tokenizer.get_vocab_size())
optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
train_loader = make_dataloader(tokenizer, 8, MAX_SEQ_LEN, "train")
x, y, epoch = next(train_loader)
losses = []
for step in range(10):
    loss = model(x, y)
    loss.backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)
    x, y, epoch = next(train_loader)
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
model.eval()
val_bpb = evaluate_bpb(model, tokenizer, 8)
print("budget", TIME_BUDGET, "epoch", epoch)
print(f"val_bpb:          {val_bpb:.6f}")
"""


def test_an_upstream_training_script_runs_unchanged(demo, tmp_path):
    cache, _ = demo
    script = tmp_path / "train.py"
    script.write_text(UPSTREAM_TRAINING_SCRIPT)
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=work,
        env=command_env(cache, AUTORESEARCH_DEMO="1", AUTORESEARCH_TIME_BUDGET="7"),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "budget 7.0 epoch 1" in done.stdout
    val_bpb = float(re.search(r"^val_bpb: +([0-9.]+)$", done.stdout, re.MULTILINE)[1])
    assert 0.5 < val_bpb < 8
    record = json.loads((work / "eval_record.json").read_text())
    assert (record["causal"], record["tokens"], record["num_calls"]) == (True, 65_536, 1)
    assert record["val_bpb"] == pytest.approx(val_bpb, abs=1e-6)


def test_importing_prepare_reads_writes_and_prints_nothing(tmp_path):
    done = run_command(tmp_path / "cache", "-c", "import prepare", HOME=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Layer and parameter statistics
# ---------------------------------------------------------------------------------------------------------------------


class HandMade(nn.Module):
    """Two tokens, (3, 4) and (0, 2); a hidden layer whose third unit relu always closes; two logits."""

    def __init__(self):
        super().__init__()
        self.table = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        self.hidden = nn.Linear(2, 3, bias=False)
        self.out = nn.Linear(3, 2, bias=False)
        self.hidden.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
        self.out.weight.data = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, 5.0]])

    def forward(self, x):
        return self.out(self.hidden(self.table[x]).relu())


def look(model, x=((0, 1),)) -> dict:
    x = torch.tensor(x)
    return prepare.layer_stats(model, x, x)


def test_layer_statistics_are_as_by_hand():
    # hidden: (3, 4, -7), (0, 2, -2); after relu (3, 4, 0), (0, 2, 0); logits (3, 4), (0, 2)
    stats = look(HandMade())
    assert stats["layers/names"] == ["hidden", "out"]
    assert stats["layers/rms"] == pytest.approx([math.sqrt(82 / 6), math.sqrt(29 / 4)], rel=1e-5)
    assert stats["layers/zeros"] == pytest.approx([1 / 6, 1 / 4], rel=1e-5)
    assert stats["layers/input_zeros"] == pytest.approx([1 / 4, 3 / 6], rel=1e-5)
    assert stats["layers/dead"] == pytest.approx([0, 1 / 3], rel=1e-5)
    assert stats["logits/rms"] == pytest.approx(math.sqrt(29 / 4), rel=1e-5)
    assert stats["logits/max_abs"] == 4
    p, q = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    entropies = [-a * math.log(a) - (1 - a) * math.log(1 - a) for a in (p, q)]
    assert stats["logits/entropy"] == pytest.approx(sum(entropies) / 2, rel=1e-5)
    assert stats["logits/max_prob"] == pytest.approx((p + q) / 2, rel=1e-5)
    assert json.loads(json.dumps(stats)) == stats


class Blocks(nn.Module):
    """A ModuleList whose members hold the linear layers; needs its targets; draws random numbers."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(2, 4)
        self.h = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)])
        self.calls = 0

    def forward(self, x, y):
        e = nn.functional.dropout(self.wte(x), 0.5, training=True)
        for block in self.h:
            e = block(e)
        self.calls += 1
        return e.mean() + y.float().mean()


def test_blocks_and_linear_layers_are_watched_in_a_model_that_needs_its_targets():
    stats = look(Blocks())
    assert sorted(stats["layers/names"]) == ["h.0", "h.0.0", "h.1", "h.1.0"]
    assert "logits/rms" not in stats
    assert "layers/error" not in stats
    given = dict(zip(stats["layers/names"], stats["layers/input_zeros"], strict=True))
    assert given["h.0"] is None  # a block: only linear layers say what they were given
    assert given["h.1.0"] >= 0


def test_a_model_without_lists_and_linear_layers_shows_its_innermost_modules():
    stats = look(nn.Sequential(nn.Embedding(2, 4), nn.Sequential(nn.LayerNorm(4), nn.GELU())))
    assert stats["layers/names"] == ["0", "1.0", "1.1"]
    assert stats["layers/rms"][1] == pytest.approx(1, abs=1e-3)
    assert look(nn.Identity())["layers/names"] == []


class Failing(HandMade):
    def forward(self, x):
        super().forward(x)
        raise RuntimeError("what is this batch?")


def test_a_model_that_raises_leaves_an_error_not_an_exception():
    stats = look(Failing())
    assert stats["layers/error"] == "RuntimeError: what is this batch?"
    assert stats["layers/names"] == ["hidden", "out"]


@pytest.mark.parametrize("kind", [HandMade, Blocks, Failing])
def test_looking_leaves_hooks_weights_and_random_state_as_they_were(kind):
    torch.manual_seed(3)
    model = kind()
    weights, state = prepare.copy_weights(model), torch.get_rng_state()
    look(model)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_statistics_of_a_compiled_model_come_from_the_model_inside():
    stats = look(torch.compile(HandMade(), backend="eager"))
    assert stats["layers/names"] == ["hidden", "out"]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        self.scale = nn.Parameter(torch.tensor([0.5, 0.25]))
        self.unused = nn.Parameter(torch.tensor(7.0))


def test_parameter_statistics_are_as_by_hand():
    model = Scaled()
    before = prepare.copy_weights(model)
    model.w.grad, model.scale.grad = torch.tensor([[1.0, 7.0]]), torch.tensor([2.0, -2.0])
    with torch.no_grad():
        model.w -= torch.tensor([[0.0, 1.0]])
    stats = prepare.parameter_stats(model, before)
    assert stats["params/names"] == ["w", "scale", "unused"]
    assert stats["params/grad_rms"] == [5.0, 2.0, None]
    assert stats["params/weight_rms"] == pytest.approx([3.0, math.sqrt(0.3125 / 2), 7.0], rel=1e-5)
    assert stats["params/update_rms"] == pytest.approx([math.sqrt(0.5), 0, 0], rel=1e-5)
    assert (stats["scalars/scale"], stats["scalars/unused"]) == ([0.5, 0.25], [7.0])
    assert "scalars/w" not in stats


# ---------------------------------------------------------------------------------------------------------------------
# Measurement
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 503.8),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA L40", None),
        ("NVIDIA A10", None),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None),
        ("AMD Instinct MI300X", None),
        ("", None),
    ],
)
def test_the_peak_rate_goes_by_the_devices_whole_name(name, tflops):
    assert prepare.peak_flops(name) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_the_clock_counts_whole_steps_and_stands_still_while_paused(monkeypatch):
    # start 10; pause 11 to 14; step ends 15; step ends 18; pauses 19 to 20 and 20 to 22; step ends 30
    readings = iter([10.0, 11.0, 14.0, 15.0, 18.0, 19.0, 20.0, 20.0, 22.0, 30.0])
    monkeypatch.setattr(prepare, "time", SimpleNamespace(perf_counter=lambda: next(readings)))
    clock = prepare.Clock(torch.device("cpu"))
    clock.start()
    with clock.paused():
        pass
    clock.end_step([torch.tensor(2.5), torch.tensor(3)])
    assert clock.seconds == 0
    assert clock.read_step() == [2.5, 3.0]
    assert (clock.step_seconds, clock.seconds, clock.paused_seconds) == (2, 2, 3)
    clock.end_step([torch.tensor(1.0)])
    assert clock.read_step() == [1.0]
    assert (clock.step_seconds, clock.seconds, clock.paused_seconds) == (3, 5, 3)
    for _ in range(2):
        with clock.paused():
            pass
    clock.end_step([torch.tensor(1.0)])
    clock.read_step()
    assert (clock.step_seconds, clock.seconds, clock.paused_seconds) == (9, 14, 6)


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves in the working folder
# ---------------------------------------------------------------------------------------------------------------------

OUTPUTS = ["run_start.json", "metrics.jsonl", "eval_record.json", "run_summary.json", "checkpoint.pt"]


@pytest.fixture
def work(cache, tmp_path):
    return tmp_path / "work"


def leave_run(folder, run_id: str, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        is_start = name == "run_start.json"
        (folder / name).write_text(json.dumps({"run_id": run_id}) if is_start else f"{name} of {run_id}")


def names_in(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_scored_run_is_set_aside_under_its_name_without_its_checkpoint(work):
    leave_run(work, "r1", *OUTPUTS)
    prepare.set_aside_earlier_run()
    kept = ["eval_record.json", "metrics.jsonl", "run_start.json", "run_summary.json"]
    assert names_in(work) == [f".auto-log-research/unfiled/r1/{name}" for name in kept]
    assert (work / ".auto-log-research/unfiled/r1/metrics.jsonl").read_text() == "metrics.jsonl of r1"


def test_the_checkpoint_of_a_run_that_was_never_scored_moves_along(work):
    leave_run(work, "r2", "run_start.json", "metrics.jsonl", "checkpoint.pt")
    prepare.set_aside_earlier_run()
    kept = ["checkpoint.pt", "metrics.jsonl", "run_start.json"]
    assert names_in(work) == [f".auto-log-research/unfiled/r2/{name}" for name in kept]


def test_a_run_that_the_archive_already_holds_is_removed(work):
    leave_run(work / ".auto-log-research" / "0001", "r3", "run_start.json", "metrics.jsonl")
    leave_run(work, "r3", *OUTPUTS)
    prepare.set_aside_earlier_run()
    assert names_in(work) == [".auto-log-research/0001/metrics.jsonl", ".auto-log-research/0001/run_start.json"]


def test_a_broken_file_in_the_archive_does_not_stop_the_next_run(work):
    leave_run(work / ".auto-log-research" / "0001", "r1", "metrics.jsonl")
    (work / ".auto-log-research" / "0001" / "run_start.json").write_text("")
    leave_run(work, "r2", "run_start.json", "metrics.jsonl")
    prepare.set_aside_earlier_run()
    assert "run_start.json" not in names_in(work)


def test_the_archive_may_be_elsewhere(work, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTO_LOG_RESEARCH_DIR", str(tmp_path / "archive"))
    leave_run(work, "r4", "run_start.json", "metrics.jsonl")
    prepare.set_aside_earlier_run()
    assert names_in(work) == []
    assert names_in(tmp_path / "archive") == ["unfiled/r4/metrics.jsonl", "unfiled/r4/run_start.json"]


@pytest.mark.parametrize("start", [None, "", "[]", '{"pid": 3}'])
def test_outputs_whose_start_file_is_missing_or_broken_are_set_aside_too(work, start):
    leave_run(work, "r5", "metrics.jsonl", "run_summary.json")
    if start is not None:
        (work / "run_start.json").write_text(start)
    prepare.set_aside_earlier_run()
    (folder,) = (work / ".auto-log-research" / "unfiled").iterdir()
    assert re.fullmatch("unknown-[0-9a-f]{8}", folder.name)
    assert {"metrics.jsonl", "run_summary.json"} <= set(names_in(folder))
    assert [path.name for path in work.iterdir()] == [".auto-log-research"]


def test_an_interrupted_move_is_finished_by_the_next_call(work):
    leave_run(work / ".auto-log-research" / "unfiled" / "r6", "r6", "metrics.jsonl")
    leave_run(work, "r6", "run_start.json", "run_summary.json")
    prepare.set_aside_earlier_run()
    kept = ["metrics.jsonl", "run_start.json", "run_summary.json"]
    assert names_in(work) == [f".auto-log-research/unfiled/r6/{name}" for name in kept]


def test_an_empty_working_folder_stays_empty(work):
    prepare.set_aside_earlier_run()
    assert list(work.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Kernels (against plain mathematics in float64, on what they are given rounded to bf16)
# ---------------------------------------------------------------------------------------------------------------------

on_hopper = pytest.mark.skipif(not prepare.has_kernels(torch.device("cuda")), reason="no Hopper GPU here")


def bf16(*shape, seed=0, scale=1.0):
    """Numbers that bf16 holds exactly, as a float32 leaf on the GPU."""
    random = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=random)).bfloat16().float().cuda().requires_grad_()


def gradient_errors(function, plain, *leaves):
    """Relative errors of the output and of every leaf's gradient, for random output gradients."""
    copies = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, expected = function(*leaves), plain(*copies)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).cuda().bfloat16()
    out.backward(weights.to(out.dtype))
    expected.backward(weights.double())
    pairs = [(out, expected), *((leaf.grad, copy.grad) for leaf, copy in zip(leaves, copies, strict=True))]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("H", "KV", "D"), [(4, 4, 128), (4, 2, 128), (3, 1, 64)])
@pytest.mark.parametrize(
    ("T", "window"), [(256, 128), (256, 100), (320, 1), (192, 0), (128, 64), (128, 127), (64, 9999)]
)
def test_the_window_kernel_is_plain_attention(H, KV, D, T, window):
    leaves = [bf16(2, T, heads, D, seed=i) for i, heads in enumerate((H, KV, KV))]
    function = functools.partial(prepare.window_attention, window=window)
    # With a window of 0 only the value counts, and the other two gradients are exactly 0.
    errors = gradient_errors(function, functools.partial(explicit_attention, window=window), *leaves)
    assert all(error < 1e-2 for error in (errors[0], errors[3], *(errors[1:3] if window else [])))


OPERATOR = """
import torch, torch.library

@torch.library.custom_op("test::scaled", mutates_args=())
def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor

scaled.register_fake(lambda x, factor: torch.empty_like(x))
scaled.register_autograd(lambda ctx, grad: (scaled(grad, FACTOR), None))
"""
COMPILED_GRADIENT = """
from pathlib import Path
import torch
import prepare

prepare.Run(Path(__file__))
x = torch.ones(2, requires_grad=True)
torch.compile(lambda x: torch.ops.test.scaled(x, 1.0))(x).backward(torch.ones(2))
print(x.grad.tolist())
"""


@pytest.mark.parametrize("place", ["prepare.py", "train.py"])
def test_a_changed_gradient_is_not_taken_from_the_compilers_cache(place, tmp_path):
    for factor in (2.0, 3.0):
        (tmp_path / "prepare.py").write_text((ROOT / "prepare.py").read_text())
        (tmp_path / "train.py").write_text("")
        with open(tmp_path / place, "a") as f:
            f.write(OPERATOR.replace("FACTOR", str(factor)))
        with open(tmp_path / "train.py", "a") as f:
            f.write(COMPILED_GRADIENT)
        variables = {"PYTHONPATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
        result = run_command(tmp_path / "cache", tmp_path / "train.py", **variables)
        assert result.stdout == f"{[factor, factor]}\n", result.stderr


def test_an_edit_without_operators_of_its_own_keeps_the_compilers_cache(tmp_path):
    edited = tmp_path / "train.py"
    edited.write_text((ROOT / "train.py").read_text() + "# edited\n")
    prepare.Run(edited)
    assert torch.compiler.config.cache_key_tag == prepare.sha256_file(ROOT / "prepare.py")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("rows", "width", "hidden"), [(512, 128, 512), (300, 72, 200), (1, 8, 8)])
def test_the_mlp_kernel_is_the_plain_mlp(rows, width, hidden):
    c_in, c_out = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
    c_in.weight = nn.Parameter(bf16(hidden, width, seed=1, scale=0.1).detach())
    c_out.weight = nn.Parameter(bf16(width, hidden, seed=2, scale=0.1).detach())

    def fused(x, *_):
        return prepare.relu2_mlp(x.bfloat16(), c_in, c_out)

    def plain(x, w_in, w_out):
        return (x @ w_in.T).relu().square() @ w_out.T

    prepare.kernels_used.clear()
    errors = gradient_errors(fused, plain, bf16(rows, width), c_in.weight, c_out.weight)
    assert all(error < 1e-2 for error in errors)  # as max() would not, this sees a NaN
    assert prepare.kernels_used == {"mlp"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize(
    ("rows", "width", "vocab", "cap"),
    [(64, 128, 8192, 15), (100, 64, 1000, 15), (3, 16, 5, 2), (16, 64, 32768, 40), (8, 64, 100, 1000)],
)
def test_the_loss_kernel_is_plain_cross_entropy(rows, width, vocab, cap):
    x, weight = bf16(rows, width), bf16(vocab, width, seed=1)
    targets = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(0)).cuda()
    targets[1] = -1
    head = nn.Linear(width, vocab, bias=False).cuda()
    head.weight = nn.Parameter(weight.detach())
    factors = torch.rand(rows, generator=torch.Generator().manual_seed(1)).cuda()
    prepare.kernels_used.clear()
    with torch.autocast("cuda", torch.bfloat16):
        losses = prepare.softcap_loss(x.bfloat16(), head, targets, float(cap))
    losses.backward(factors)
    assert prepare.kernels_used == ({"loss"} if cap <= 40 else set())
    plain_x, plain_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = (plain_x @ plain_weight.T).bfloat16().double()  # the product's own rounding
    logits = logits.detach() + (plain_x @ plain_weight.T) - (plain_x @ plain_weight.T).detach()
    log_p = (cap * torch.tanh(logits / cap)).log_softmax(-1)
    expected = -log_p.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1) * (targets != -1)
    expected.backward(factors.double())
    assert losses[1] == 0
    assert torch.allclose(losses.double(), expected, rtol=1e-4, atol=1e-4)
    for got, wanted in ((x.grad, plain_x.grad), (head.weight.grad, plain_weight.grad)):
        assert (got.double() - wanted).norm() < 1e-2 * wanted.norm()


def test_without_a_gpu_mlp_and_loss_are_the_plain_ones():
    torch.manual_seed(0)
    c_in, c_out, x = nn.Linear(4, 8, bias=False), nn.Linear(8, 4, bias=False), torch.randn(2, 3, 4)
    assert torch.equal(prepare.relu2_mlp(x, c_in, c_out), c_out(c_in(x).relu() ** 2))
    head, targets = nn.Linear(4, 5, bias=False), torch.tensor([0, 4, -1])
    log_p = (15 * torch.tanh(head(x[0]) / 15)).log_softmax(-1)
    expected = torch.stack([-log_p[0, 0], -log_p[1, 4], torch.tensor(0.0)])
    assert torch.allclose(prepare.softcap_loss(x[0], head, targets, 15.0), expected)


def test_without_triton_everything_else_works():
    code = "import sys; sys.modules['triton'] = None; import prepare; print(prepare.triton, prepare.jit(len)('four'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "None 4\n", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells when a process started")
def test_the_clock_of_a_run_begins_with_its_process():
    begin = time.monotonic()
    code = "import prepare; print(prepare.process_age_s())"
    age_s = float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout)
    assert 0.3 < age_s < time.monotonic() - begin + 0.02  # importing torch alone takes longer; a tick is 0.01 s


def test_the_reason_for_a_crash_in_compiled_code_is_the_error_itself():
    product = torch.compile(lambda a, b: a @ b, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="fake tensor") as caught:
        product(torch.ones(2, 3), torch.ones(4, 5))
    reason = prepare._reason(caught.value)
    assert "\n" not in reason
    assert reason.startswith("TorchRuntimeError: RuntimeError(")
    assert "[2, 3] X [4, 5]" in reason
