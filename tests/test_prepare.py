"""prepare.py: text in, tokens packed, the score by hand, downloads from a server that misbehaves, what a run leaves."""

import fcntl
import functools
import itertools
import json
import math
import os
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
from conftest import ROOT
from torch import nn

import prepare

# ---------------------------------------------------------------------------------------------------------------------
# Prefetch and loader
# ---------------------------------------------------------------------------------------------------------------------


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


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
    produced, is_five = [], threading.Event()

    def items():
        for i in itertools.count():
            produced.append(i)
            if len(produced) == 5:
                is_five.set()
            yield i

    fetched = prepare.prefetch(items(), depth=4)
    assert next(fetched) == 0
    assert is_five.wait(10)  # one taken, four waiting
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
    monkeypatch.setattr(prepare, "EVAL_TOKENS", 12 * 4 * 16)
    monkeypatch.setattr(prepare, "FIXED", (16, prepare.TIME_BUDGET, 12 * 4 * 16, prepare.VOCAB_SIZE))
    monkeypatch.setattr(prepare, "_num_evaluations", 0)
    monkeypatch.setattr(prepare, "_num_val_loaders", 0)
    documents = (([d.tolist() for d in batch], epoch) for batch, epoch in prepare.read_document_batches("val"))
    rows = [rows for rows, _ in itertools.islice(pack_rows_straightforward(documents, 4, 17), 12)]
    return prepare.Tokenizer.from_directory(), [(batch[:, :-1], batch[:, 1:]) for batch in rows]


class Predictor(nn.Module):
    """Scores next tokens from `features(model, x)` (B, T, 8); the last layer is random but the same in every test.
    `edit(losses, logits, y)` is what an experiment does to the loss of each token."""

    def __init__(self, vocab_size: int, features, edit=lambda losses, logits, y: losses):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.embedding = nn.Parameter(torch.randn(vocab_size, 8, generator=generator))
        self.head = nn.Parameter(torch.randn(8, vocab_size, generator=generator))
        self.features, self.edit = features, edit

    def forward(self, x, y=None, reduction="mean"):
        logits = self.features(self, x) @ self.head
        if y is None:
            return logits
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        losses = self.edit(losses, logits.flatten(0, 1), y.flatten())
        return losses if reduction == "none" else losses.mean()


def past_mean(model, x):
    e = model.embedding[x]
    return e.cumsum(1) / torch.arange(1, x.size(1) + 1).view(1, -1, 1)


def next_token(model, x):
    return model.embedding[x.roll(-1, 1)]


def whole_row_mean(model, x):
    return past_mean(model, x) + model.embedding[x].mean(1, keepdim=True)


def other_rows(model, x):
    return past_mean(model, x) + model.embedding[x].mean(0, keepdim=True)


def noise(model, x):
    return past_mean(model, x) + torch.rand(1)


def noise_of_its_own(model, x):
    return past_mean(model, x) + random.random()


def leak_under_dropout(model, x):
    return nn.functional.dropout(whole_row_mean(model, x), 0.1)


def score(tokenizer, features, batch_size=4, **options) -> tuple[float, dict]:
    model = Predictor(tokenizer.get_vocab_size(), features, **options)
    bpb = prepare.evaluate_bpb(model, tokenizer, batch_size)
    with open("eval_record.json") as f:
        return bpb, json.load(f)


def test_bits_per_byte_of_a_uniform_guess_are_as_by_hand(scoring):
    tokenizer, batches = scoring
    bpb, record = score(tokenizer, lambda model, x: torch.zeros(*x.shape, 8))
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
    keeps = [(model(x, y, reduction="none"), y.flatten() < tokenizer.get_bos_token_id()) for x, y in batches]
    nats = sum(losses[keep].double().sum().item() for losses, keep in keeps)
    assert (record["causal"], record["finding"], record["faults"]) == (True, "", [])
    assert (record["tokens"], record["run_id"]) == (768, None)  # no program: pytest
    assert record["nats"] == pytest.approx(nats, rel=1e-6)
    assert record["val_bpb"] == bpb == pytest.approx(nats / math.log(2) / record["bytes"], rel=1e-6)
    assert record["data_fingerprint"] == prepare.load_manifest()["fingerprint"]
    assert record["prepare_sha256"] == prepare.sha256_file(ROOT / "prepare.py")
    assert record["measurement_sha256"] == prepare.measurement_sha256()
    assert record["num_calls"] == 1
    assert score(tokenizer, past_mean)[1]["num_calls"] == 2


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("features", [next_token, whole_row_mean])
def test_a_model_that_looks_ahead_is_caught(scoring, features, batch_size, capsys):
    tokenizer, _ = scoring
    record = score(tokenizer, features, batch_size)[1]
    assert record["causal"] is False
    assert re.fullmatch(r"changing later tokens changes earlier losses by up to \S+ nats", record["finding"])
    assert record["faults"] == [f"LOOKS AHEAD: {record['finding']}"]
    assert f"this score is worth nothing: {record['faults'][0]}" in capsys.readouterr().out


def test_rows_that_affect_each_other_are_named_as_that(scoring):
    tokenizer, _ = scoring
    record = score(tokenizer, other_rows)[1]
    assert record["causal"] is False
    assert record["finding"].startswith("the rows of a batch affect each other")


@pytest.mark.parametrize("batch_size", [1, 4, 128])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_a_model_that_looks_ahead_where_blocks_meet_is_caught(block, batch_size):
    x, y = torch.randint(0, 50, (2, batch_size, 512), generator=torch.Generator().manual_seed(0))

    def losses_of(x, y):
        sees = x.roll(-1, 1)
        is_end = torch.arange(x.size(1)) % block == block - 1
        return (y + torch.where(is_end, sees, x)).float()

    assert prepare.find_leak(losses_of, x, y, 50)[0] is False
    assert prepare.find_leak(lambda x, y: (x + y).float(), x, y, 50) == (True, "")


def test_at_least_128_cuts_are_tried_whatever_the_batch():
    for batch_size in (1, 3, 128, 200):
        x = torch.zeros(batch_size, 64, dtype=torch.long)
        calls = []
        prepare.find_leak(lambda x, y, calls=calls: calls.append(len(x)) or y.float(), x, x, 50)
        assert sum(calls[2:]) >= 128


EDITS = {
    "focal": lambda losses, logits, y: (1 - (-losses).exp()) ** 2 * losses,
    "0.97 of it": lambda losses, logits, y: 0.97 * losses,
    "0.99 of it": lambda losses, logits, y: 0.99 * losses,
    "label smoothing": lambda losses, logits, y: nn.functional.cross_entropy(
        logits, y, label_smoothing=0.1, reduction="none"
    ),
    "z-loss": lambda losses, logits, y: losses + 1e-4 * logits.logsumexp(-1) ** 2,
    "its target's logit raised": lambda losses, logits, y: nn.functional.cross_entropy(
        logits + nn.functional.one_hot(y, logits.size(-1)), y, reduction="none"
    ),
    "NaN": lambda losses, logits, y: losses * math.nan,
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_loss_that_is_not_that_of_the_logits_makes_no_score(scoring, edit):
    tokenizer, _ = scoring
    faults = score(tokenizer, past_mean, edit=edit)[1]["faults"]
    assert 'reduction="none" is not the cross-entropy of the logits of model(x)' in faults[0]


def test_what_bf16_does_to_the_loss_is_no_disagreement(scoring):
    tokenizer, _ = scoring

    def rounded(losses, logits, y):
        return nn.functional.cross_entropy(logits.bfloat16().float(), y, reduction="none")

    assert score(tokenizer, past_mean, edit=rounded)[1]["faults"] == []


def test_a_model_without_logits_cannot_be_checked(scoring):
    tokenizer, _ = scoring
    plain = Predictor.forward

    class Silent(Predictor):
        def forward(self, x, y, reduction="mean"):
            return plain(self, x, y, reduction)

    prepare.evaluate_bpb(Silent(tokenizer.get_vocab_size(), past_mean), tokenizer, 4)
    with open("eval_record.json") as f:
        assert json.load(f)["faults"] == ["model(x) gives no logits (B, T, vocabulary): the score cannot be checked"]


@pytest.mark.parametrize("features", [past_mean, noise])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_causal_model_is_not_accused_with_noise_or_without(scoring, features, batch_size, capsys):
    tokenizer, _ = scoring
    record = score(tokenizer, features, batch_size)[1]
    assert (record["causal"], record["faults"]) == (True, [])
    assert "***" not in capsys.readouterr().out


def test_dropout_does_not_hide_a_leak(scoring):
    tokenizer, _ = scoring
    assert score(tokenizer, leak_under_dropout)[1]["causal"] is False


def test_a_model_that_cannot_be_tested_has_no_score(scoring):
    tokenizer, _ = scoring
    record = score(tokenizer, noise_of_its_own)[1]
    assert record["causal"] is None
    assert record["faults"][-1].startswith("causality could not be tested: the model's losses on one batch differ")


def test_any_batch_size_scores_the_same_text(scoring):
    tokenizer, _ = scoring
    expected = score(tokenizer, past_mean)[1]
    for batch_size in (1, 5, 7, 48, 100):
        record = score(tokenizer, past_mean, batch_size)[1]
        assert record["nats"] == pytest.approx(expected["nats"], rel=1e-6)
        assert (record["bytes"], record["tokens"]) == (expected["bytes"], 768)


def test_the_audit_scores_as_much_text_again_and_only_where_there_is_as_much(scoring, monkeypatch):
    tokenizer, _ = scoring
    monkeypatch.setattr(prepare, "EVAL_TOKENS", 6 * 4 * 16)
    monkeypatch.setattr(prepare, "FIXED", (16, prepare.TIME_BUDGET, 6 * 4 * 16, prepare.VOCAB_SIZE))
    held = sum(shard["val"]["tokens"] for shard in prepare.load_manifest()["shards"].values())
    monkeypatch.setattr(prepare, "pack_rows", rows_of_one_epoch := functools.partial(one_epoch, prepare.pack_rows))
    audit = score(tokenizer, past_mean)[1]
    assert rows_of_one_epoch.args
    model = Predictor(tokenizer.get_vocab_size(), past_mean)
    batches = itertools.islice(prepare.load_batches(4, 16, "val"), 6, 12)
    keeps = [(model(x, y, reduction="none"), y.flatten()) for x, y, _ in batches]
    lengths = [prepare.get_token_bytes()[y] for _, y in keeps]
    nats = sum(losses[n > 0].sum().item() for (losses, _), n in zip(keeps, lengths, strict=True))
    assert audit["audit_bpb"] == pytest.approx(nats / math.log(2) / sum(n.sum().item() for n in lengths), rel=1e-5)
    monkeypatch.setattr(prepare, "EVAL_TOKENS", held)
    assert score(tokenizer, past_mean)[1]["audit_bpb"] is None


def one_epoch(pack, *args):
    """The test's text repeats itself early; here it counts as one."""
    return ((rows, 1) for rows, _ in pack(*args))


def test_the_validation_split_is_for_the_evaluation_alone(scoring):
    tokenizer, _ = scoring
    assert score(tokenizer, past_mean)[1]["faults"] == []
    prepare.make_dataloader(tokenizer, 4, 16, "val").close()
    assert score(tokenizer, past_mean)[1]["faults"] == ["the validation split was loaded outside the evaluation"]


def test_constants_that_a_program_changes_are_noticed(scoring, monkeypatch):
    tokenizer, _ = scoring
    monkeypatch.setattr(prepare, "EVAL_TOKENS", 2 * 4 * 16)
    record = score(tokenizer, past_mean)[1]
    assert (record["tokens"], record["faults"]) == (128, ["constants of prepare.py were changed by the program"])


def test_the_measurement_is_its_code_not_its_comments():
    source = prepare.PREPARE_SOURCE.decode()
    same = [
        source.replace(
            '"""Bits per byte on the validation split', '"""The score. Bits per byte on the validation split'
        ),
        source.replace("def evaluate_bpb(", "# A comment.\ndef evaluate_bpb("),
        source.replace("class Run:", "class Run:\n    x = 1\n"),
        source.replace("self.paused_seconds = 0.0\n", "self.paused_seconds =   0.0\n"),
        source.replace("no tokenizer at {path}", "there is no tokenizer at {path}"),
    ]
    other = [
        source.replace("40 * 524288", "20 * 524288"),
        source.replace("DOC_BATCH = 128", "DOC_BATCH = 64"),
        source.replace("nats / (math.log(2)", "nats / (math.log(3)"),
        source.replace("buffer_size: int = 1000", "buffer_size: int = 999"),
        source.replace("self.seconds += self.step_seconds", "self.seconds += 0.9 * self.step_seconds"),
        source.replace("MAX_PAUSED_SHARE = 0.1", "MAX_PAUSED_SHARE = 0.9"),
    ]
    assert all(text != source for text in same + other)
    assert {prepare.measurement_sha256(text.encode()) for text in same} == {prepare.measurement_sha256()}
    hashes = {prepare.measurement_sha256(text.encode()) for text in other}
    assert len(hashes - {prepare.measurement_sha256()}) == len(other)
    assert all(hasattr(prepare, name) for name in prepare.MEASURED)


def test_scoring_leaves_the_random_state_alone(scoring):
    tokenizer, _ = scoring
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    score(tokenizer, past_mean)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


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
    assert stats["logits/max_abs"] == 4
    p, q = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
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
    assert "logits/max_abs" not in stats
    assert "layers/error" not in stats
    given = dict(zip(stats["layers/names"], stats["layers/input_zeros"], strict=True))
    assert given["h.0"] is None  # a block: only linear layers say what they were given
    assert given["h.1.0"] >= 0


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
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L40", None),
        ("AMD Instinct MI300X", None),
        ("", None),
    ],
)
def test_the_peak_rate_goes_by_the_devices_whole_name(name, tflops):
    assert prepare.peak_flops(name) == (None if tflops is None else pytest.approx(tflops * 1e12))


def clock_of(readings, monkeypatch):
    """A clock on the CPU whose time is read off a list."""
    times = iter(readings)
    monkeypatch.setattr(prepare, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    return prepare.Clock(torch.device("cpu"))


def test_the_clock_counts_whole_steps_and_stands_still_while_paused(monkeypatch):
    # start 10; pause 11 to 14; step ends 15; step ends 18; pauses 19 to 20 and 20 to 22; step ends 30
    clock = clock_of([10.0, 11.0, 14.0, 15.0, 18.0, 19.0, 20.0, 20.0, 22.0, 30.0], monkeypatch)
    clock.start()
    with clock.paused():
        pass
    clock.end_step({"a": torch.tensor(2.5), "b": torch.tensor([3, 2**40 + 1])})
    assert clock.seconds == 0
    assert clock.read_step() == {"a": 2.5, "b": [3.0, 2.0**40 + 1]}
    assert (clock.step_seconds, clock.seconds, clock.paused_seconds) == (2, 2, 3)
    clock.end_step({"a": torch.tensor(1.0)})
    assert clock.read_step() == {"a": 1.0}
    assert (clock.step_seconds, clock.seconds, clock.paused_seconds) == (3, 5, 3)
    for _ in range(2):
        with clock.paused():
            pass
    clock.end_step({"a": torch.tensor(1.0)})
    clock.read_step()
    assert (clock.step_seconds, clock.seconds, clock.paused_seconds) == (9, 14, 6)


def test_a_pause_after_the_end_of_a_step_is_no_part_of_either(monkeypatch):
    # start 0; step ends 1; pause 1 to 11; step ends 13
    clock = clock_of([0.0, 1.0, 1.0, 11.0, 13.0], monkeypatch)
    clock.start()
    clock.end_step({"a": torch.tensor(1.0)})
    with clock.paused():
        pass
    clock.read_step()
    assert (clock.step_seconds, clock.seconds) == (1, 1)
    clock.end_step({"a": torch.tensor(1.0)})
    clock.read_step()
    assert (clock.step_seconds, clock.seconds) == (2, 3)


def test_pauses_beyond_their_share_of_the_budget_count(monkeypatch):
    # start 0; pause 0 to 50 of which a tenth of 300 is free; step ends 51; pause 51 to 61; step ends 62
    clock = clock_of([0.0, 0.0, 50.0, 51.0, 51.0, 61.0, 62.0], monkeypatch)
    clock.start()
    for expected in (21, 32):
        with clock.paused():
            pass
        clock.end_step({"a": torch.tensor(1.0)})
        clock.read_step()
        assert clock.seconds == expected


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
    """Every file that is not empty."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def test_a_scored_run_is_set_aside_under_its_name_without_its_checkpoint(work):
    leave_run(work, "r1", *OUTPUTS)
    prepare.set_aside_earlier_run()
    kept = ["eval_record.json", "metrics.jsonl", "run_start.json", "run_summary.json"]
    assert names_in(work) == [f".auto-log-research/unfiled/r1/{name}" for name in kept]
    assert (work / "metrics.jsonl").read_text() == ""  # it may be locked
    assert (work / ".auto-log-research/unfiled/r1/metrics.jsonl").read_text() == "metrics.jsonl of r1"


def test_the_checkpoint_of_a_run_that_was_never_scored_moves_along(work):
    leave_run(work, "r2", "run_start.json", "metrics.jsonl", "checkpoint.pt")
    prepare.set_aside_earlier_run()
    kept = ["checkpoint.pt", "metrics.jsonl", "run_start.json"]
    assert names_in(work) == [f".auto-log-research/unfiled/r2/{name}" for name in kept]


def test_a_run_that_the_archive_already_holds_is_removed(work):
    kept = ["eval_record.json", "metrics.jsonl", "run_start.json", "run_summary.json"]
    leave_run(work / ".auto-log-research" / "0001", "r3", *kept)
    leave_run(work, "r3", *OUTPUTS)
    prepare.set_aside_earlier_run()
    assert names_in(work) == [f".auto-log-research/0001/{name}" for name in kept]


@pytest.mark.parametrize("result", ["run_summary.json", "eval_record.json"])
def test_a_score_that_came_after_its_run_was_filed_is_kept(work, result):
    leave_run(work / ".auto-log-research" / "0001", "r3", "run_start.json", "metrics.jsonl")
    leave_run(work, "r3", "run_start.json", "metrics.jsonl", result)
    prepare.set_aside_earlier_run()
    assert f".auto-log-research/unfiled/r3/{result}" in names_in(work)


def test_a_demo_is_put_away_with_the_demos_and_a_real_run_with_the_real_ones(work, monkeypatch):
    for is_demo, folder in ((True, ".auto-log-research/demo/unfiled"), (False, ".auto-log-research/unfiled")):
        monkeypatch.setattr(prepare, "DEMO", not is_demo)  # what the next run is does not matter
        (work / "run_start.json").write_text(json.dumps({"run_id": "r", "demo": is_demo}))
        prepare.set_aside_earlier_run()
        assert (work / folder / "r" / "run_start.json").exists()


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
    assert {path.name for path in work.iterdir()} == {".auto-log-research", "metrics.jsonl"}
    assert (work / "metrics.jsonl").read_text() == ""


def test_a_move_interrupted_before_its_clearing_up_is_finished_by_the_next_call(work):
    kept = ["metrics.jsonl", "run_start.json", "run_summary.json"]
    for folder in (work, work / ".auto-log-research" / "unfiled" / "r6"):
        leave_run(folder, "r6", *kept)
    prepare.set_aside_earlier_run()
    assert names_in(work) == [f".auto-log-research/unfiled/r6/{name}" for name in kept]


def test_nobody_sees_half_of_a_run_that_is_put_away(work, monkeypatch):
    leave_run(work, "r7", "run_start.json", "metrics.jsonl", "run_summary.json")
    with monkeypatch.context() as patch:
        patch.setattr(prepare.os, "rename", lambda *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            prepare.set_aside_earlier_run()
    unfiled = work / ".auto-log-research" / "unfiled"
    assert [path.name for path in unfiled.iterdir()] == [".r7"]
    prepare.set_aside_earlier_run()
    assert [path.name for path in unfiled.iterdir()] == ["r7"]
    assert names_in(unfiled / "r7") == ["metrics.jsonl", "run_start.json", "run_summary.json"]


def test_an_empty_working_folder_stays_empty(work):
    prepare.set_aside_earlier_run()
    assert names_in(work) == []


def start_here(work, **options) -> prepare.Run:
    (work / "train.py").write_text("")
    return prepare.Run(work / "train.py", **options)


def refusal(run, capsys) -> str:
    """The line with which a run that cannot start ends."""
    with pytest.raises(SystemExit) as ended, run:
        pass
    assert ended.value.code == 2
    return capsys.readouterr().err.strip()


def test_missing_data_is_an_error_of_the_environment(work, cache, capsys):
    said = refusal(start_here(work), capsys)
    assert said.startswith(f"error: {cache}: no data that are complete and undamaged; run `uv run prepare.py` first")
    assert json.loads((work / "run_start.json").read_text())["ended"].startswith("error: ")


def test_without_a_gpu_the_demo_is_pointed_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", lambda: exec("raise RuntimeError('The driver is too old')"))
    demo = "AUTORESEARCH_DEMO=1 uv run prepare.py && AUTORESEARCH_DEMO=1 uv run train.py"
    reason = r"no CUDA GPU found: The driver is too old \(torch 2\S+ is built for \w+"
    with pytest.raises(prepare.SetupError, match=f"{reason}.+driver 580.+{demo}"):
        prepare.get_device()


def test_a_setting_that_does_not_exist_is_refused():
    code = [sys.executable, "-c", "import prepare"]
    done = subprocess.run(code, cwd=ROOT, env=os.environ | {"AUTORESEARCH_DEM": "1"}, capture_output=True, text=True)
    settings = "CACHE, DEMO, SEED_OFFSET, TIME_BUDGET"
    assert done.stderr == f"error: AUTORESEARCH_DEM is no setting; AUTORESEARCH_ goes on with {settings}\n"
    assert done.returncode == 2


def test_a_shorter_budget_is_for_the_demo_alone(work, capsys, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_TIME_BUDGET", "3")
    assert refusal(start_here(work), capsys).startswith("error: AUTORESEARCH_TIME_BUDGET is for the demo alone")


def test_a_script_called_from_elsewhere_says_where_it_belongs(work, tmp_path, capsys):
    line = f"error: {tmp_path}/train.py leaves its files where it is called: cd {tmp_path} first"
    assert refusal(start_here(tmp_path), capsys) == line
    assert list(work.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_the_machines_fault(work, capsys, monkeypatch):
    def refuse(path, *_):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(prepare, "open", refuse, raising=False)
    assert refusal(start_here(work), capsys) == "error: [Errno 30] Read-only file system: 'metrics.jsonl'"


def test_who_looks_for_an_instant_whether_a_run_is_in_progress_does_not_stop_the_next(work):
    with open("metrics.jsonl", "a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        release = threading.Timer(0.15, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        release.start()
        prepare.lock_metrics().close()
        fcntl.flock(file, fcntl.LOCK_SH)
        (work / "run_start.json").write_text('{"run_id": "r1", "pid": 7}')
        with pytest.raises(prepare.SetupError, match="run r1 is in progress here, process 7: wait for it"):
            prepare.lock_metrics()


def test_a_full_disk_while_the_checkpoint_is_written_leaves_no_half_of_it(work, monkeypatch):
    run = start_here(work)
    run._write_start(run.program)
    run.start_training(torch.device("cpu"), {})
    run.step_ms, run.clock.seconds = [1.0], 1.0
    monkeypatch.setattr(torch, "save", lambda *_: exec("raise RuntimeError('unexpected pos 64 vs 0')"))
    with pytest.raises(prepare.SetupError, match=r"could not be written \(unexpected pos 64 vs 0\): make room"):
        run.end_training(nn.Linear(2, 2))
    assert not list(work.glob("*checkpoint*"))


def test_only_the_script_that_wrote_a_checkpoint_may_score_it(work):
    run, model = start_here(work, is_new=False), nn.Linear(2, 2)
    with pytest.raises(prepare.SetupError, match=r"no checkpoint\.pt here: there is nothing to score"):
        run.load_checkpoint(model)
    torch.save({"model": model.state_dict(), "summary": json.dumps({"train_sha256": "another"})}, "checkpoint.pt")
    with pytest.raises(prepare.SetupError, match=r"checkpoint\.pt was written by another train\.py"):
        run.load_checkpoint(model)


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
    reason = prepare.describe_error(caught.value)
    assert "\n" not in reason
    assert reason.startswith("TorchRuntimeError: RuntimeError(")
    assert "[2, 3] X [4, 5]" in reason
