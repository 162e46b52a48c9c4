"""prepare.py: text in, tokens packed, the score by hand, downloads from a server that misbehaves, what a run leaves."""

import base64
import functools
import gzip
import io
import itertools
import json
import math
import random
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bench_loader import pack_rows_straightforward
from conftest import ROOT, answer, command_env, run_command, serve
from torch import nn

import prepare

VAL = "shard_06542.parquet"


# ---------------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------------


def numbered_documents(seed: int, count: int, longest: int) -> list[list[int]]:
    """Documents that all begin with token 0 and whose other tokens name the document, so that no two can be mixed up.
    Lengths repeat often (ties), some are 1, some longer than any row."""
    rng = random.Random(seed)
    lengths = [rng.choice([1, rng.randint(1, 12), rng.randint(1, longest)]) for _ in range(count)]
    return [[0, *[number] * (length - 1)] for number, length in enumerate(lengths, 1)]


def batched_for_ever(documents: list, batch_size: int):
    for epoch in itertools.count(1):
        for i in range(0, len(documents), batch_size):
            yield documents[i : i + batch_size], epoch


def test_a_small_row_is_packed_as_by_hand():
    documents = [np.array(d, np.uint16) for d in ([0, 1, 1], [0, 2], [0, 3, 3], [0, 4, 4, 4, 4, 4, 4], [0, 5, 5, 5, 5])]
    rows = prepare.pack_rows(batched_for_ever(documents, 5), 1, 6, buffer_size=4)
    # Space 6: the longest that fits is 5 (five tokens); one place is left, nothing fits, the shortest (2) is cut.
    assert next(rows) == (pytest.approx(np.array([[0, 5, 5, 5, 5, 0]])), 1)
    # Three documents are left, so the five are appended again; the longest that fits is 5, then the new 2 is cut.
    assert next(rows) == (pytest.approx(np.array([[0, 5, 5, 5, 5, 0]])), 2)
    # Left: 1, 3, 4, then 1, 3, 4 again: nothing has 6 or 5 or 4 places, 1 comes before 3, then 3 (both of length 3).
    assert next(rows) == (pytest.approx(np.array([[0, 1, 1, 0, 3, 3]])), 2)


@pytest.mark.parametrize("seed", range(6))
def test_rows_and_epochs_equal_the_straightforward_packer(seed):
    rng = random.Random(100 + seed)
    row_len, num_rows, buffer_size = rng.choice([17, 33, 64]), rng.choice([1, 3, 8]), rng.choice([5, 40, 100])
    lists = numbered_documents(seed, 150, longest=3 * row_len)
    arrays = [np.array(d, np.uint16) for d in lists]
    ours = prepare.pack_rows(batched_for_ever(arrays, 16), num_rows, row_len, buffer_size)
    expected = pack_rows_straightforward(batched_for_ever(lists, 16), num_rows, row_len, buffer_size)
    epochs = set()
    for (rows, epoch), (expected_rows, expected_epoch) in itertools.islice(zip(ours, expected, strict=True), 120):
        assert rows.tolist() == expected_rows.tolist()
        assert epoch == expected_epoch
        assert (rows[:, 0] == 0).all()
        assert rows.dtype == np.uint16
        epochs.add(epoch)
    assert len(epochs) > 2


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


def words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(["alpha", "beta", "gamma", "delta", "12345", "naïve", "日本"]) for _ in range(count))


def write_parquet(path, texts: list, row_group_size: int = 1000, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=row_group_size, **options)


@pytest.fixture
def two_shards(cache, tmp_path):
    """A prepared cache: two training shards with row groups of 200 documents, and a validation shard."""
    source = tmp_path / "source"
    for number, name in enumerate(("b.parquet", "a.parquet")):
        write_parquet(source / name, [f"{name} {i} {words(i + number, i % 40)}" for i in range(700)], 200)
    write_parquet(source / VAL, [words(7000 + i, i % 40) for i in range(300)], 200)
    prepare.encode_source(str(source), prepare.find_source_files(source))
    return source


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


def test_a_cut_token_file_is_named_not_read(two_shards, cache):
    path = cache / "tokens" / "train" / "b.parquet.bin"
    path.write_bytes(path.read_bytes()[:-2])
    loader = prepare.make_dataloader(prepare.Tokenizer.from_directory(), 2, 8, "train")
    with pytest.raises(prepare.SetupError, match=r"b\.parquet\.bin is missing or damaged"):
        all(itertools.islice(loader, 10_000))


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    numbers = [str(number) for number in range(2000)]  # enough different text for every merge
    return prepare.Tokenizer.train([words(seed, 200) for seed in range(20)] + numbers, vocab_size=300)


NASTY_TEXTS = [
    "",
    "plain words, 1234567 and  two  blanks\r\n\r\n\ttabs \n",
    "naïve 日本語 \U0001f600 \u200b \x00",
    "<|reserved_0|> is only text here, <|endoftext|> too",
    "   ",
    "it's they'LL",
]


def test_special_ids_follow_the_merges_and_bos_is_the_first_of_them(tokenizer):
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.special == {f"<|reserved_{i}|>": 296 + i for i in range(4)}
    assert tokenizer.get_bos_token_id() == 296
    assert sorted(tokenizer.ranks.values()) == list(range(296))


def test_numbers_are_cut_into_two_digits_at_most():
    # With every number seen a thousand times the merges would swallow "1234" whole, if the pattern let them.
    tokenizer = prepare.Tokenizer.train(["1234 1234 1234"] * 1000, vocab_size=300)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("12345")] == ["12", "34", "5"]
    assert tokenizer.pattern == (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    )


def test_encode_takes_a_text_or_a_list_and_prepends_an_id_or_a_special_token(tokenizer):
    a, b = tokenizer.encode("alpha beta"), tokenizer.encode("gamma")
    assert tokenizer.encode(["alpha beta", "gamma"]) == [a, b]
    assert tokenizer.encode(["alpha beta", "gamma"], prepend=296, num_threads=2) == [[296, *a], [296, *b]]
    assert tokenizer.encode("gamma", prepend="<|reserved_0|>") == [296, *b]
    assert tokenizer.encode([]) == []


@pytest.mark.parametrize("text", NASTY_TEXTS)
def test_any_text_survives_the_round_trip_and_never_becomes_a_special_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(i < 296 for i in ids)


@pytest.mark.parametrize("text", NASTY_TEXTS)
def test_an_encoded_document_is_bos_and_the_encoding(tokenizer, text):
    document = tokenizer.encode_document(text)
    assert document.dtype == np.uint16
    assert document.tolist() == tokenizer.encode(text, prepend=tokenizer.get_bos_token_id())


@pytest.mark.parametrize("text", [" " * 1_200_000 + "x", "a" * 300_000, "\n" * 300_000, "日" * 200_000])
def test_a_document_of_one_endless_run_is_encoded_all_the_same(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode_document(text)[1:].tolist()) == text
    assert tokenizer.encode(text) == tokenizer.encode_document(text)[1:].tolist()


def test_token_bytes_count_raw_bytes_also_where_a_token_is_no_text_by_itself(tokenizer):
    lengths = tokenizer.token_bytes()
    assert (lengths.dtype, lengths.shape) == (np.int32, (300,))
    assert lengths[tokenizer.ranks[b"\x80"]] == 1  # a continuation byte: decoded first, it would be U+FFFD, 3 bytes
    assert lengths[tokenizer.ranks[b" alpha"]] == 6
    assert lengths[tokenizer.ranks["日本".encode()]] == 6
    assert lengths[296:].tolist() == [0, 0, 0, 0]
    text = "naïve 日本語 \U0001f600 words"
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_a_tokenizer_is_stored_as_plain_data(tokenizer, cache):
    tokenizer.save(cache / "tokenizer")
    stored = json.loads((cache / "tokenizer" / "tokenizer.json").read_text())
    assert list(stored) == ["pattern", "special_tokens", "tokens"]
    assert base64.b64decode(stored["tokens"][tokenizer.ranks[b" alpha"]]) == b" alpha"
    lengths = np.load(cache / "tokenizer" / "token_bytes.npy", allow_pickle=False)
    assert lengths.tolist() == tokenizer.token_bytes().tolist()
    assert prepare.get_token_bytes().tolist() == lengths.tolist()
    assert prepare.get_token_bytes().dtype == torch.int32
    assert sorted(path.name for path in (cache / "tokenizer").iterdir()) == ["token_bytes.npy", "tokenizer.json"]
    loaded = prepare.Tokenizer.from_directory()
    assert (loaded.ranks, loaded.special, loaded.pattern) == (tokenizer.ranks, tokenizer.special, tokenizer.pattern)
    assert loaded.encode(NASTY_TEXTS) == tokenizer.encode(NASTY_TEXTS)


def test_nothing_in_the_tree_pickles():
    for path in [ROOT / "prepare.py", ROOT / "train.py", *ROOT.glob("tests/*.py")]:
        pattern = r"^\s*(import|from) \w*pickle|allow_pickle=" + "True"
        assert not re.search(pattern, path.read_text(), re.MULTILINE), path


def test_a_missing_tokenizer_is_an_error_with_its_remedy(cache):
    with pytest.raises(prepare.SetupError, match=r"no tokenizer at .*tokenizer\.json: run `uv run prepare.py` first"):
        prepare.Tokenizer.from_directory()


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


def test_out_of_memory_halves_the_rows_and_gives_the_same_number(scoring, capsys):
    tokenizer, _ = scoring
    calls = []

    def small_gpu(model, x):
        calls.append(len(x))
        if len(x) > 2 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return past_mean(model, x)

    bpb, record = score(tokenizer, small_gpu)
    expected, expected_record = score(tokenizer, past_mean)
    assert bpb == pytest.approx(expected, rel=1e-9)
    assert record["bytes"] == expected_record["bytes"]
    assert record["causal"] is True
    assert calls[:3] == [4, 2, 2]
    assert "out of GPU memory; going on with 2 rows at a time" in capsys.readouterr().out


def test_running_out_of_memory_with_a_single_row_is_an_error(scoring):
    tokenizer, _ = scoring

    def no_gpu(model, x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        score(tokenizer, no_gpu)


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
    assert prepare._score_audit(model, None, None, 4) is None


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
        source.replace("class Progress:", "class Progress:\n    x = 1\n"),
        source.replace("self.paused_seconds = 0.0\n", "self.paused_seconds =   0.0\n"),
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
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def read(path) -> tuple[list[str], list[str]]:
    """All documents of a source file, and what was bad."""
    bad = []
    return [text for documents, _ in prepare.read_row_groups(path, bad) for text in documents], bad


def encode(source) -> dict:
    return prepare.encode_source(str(source), prepare.find_source_files(source))


def jsonl(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def hundred(prefix: str) -> list[str]:
    return [f"{prefix} {i} {words(i, 5)}" for i in range(100)]


def test_every_format_yields_its_documents(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["one", "", "two\nlines"], row_group_size=2)
    (tmp_path / "b.jsonl").write_text(jsonl("three", "vier ü") + "\n\n" + '{"text": "no newline at the end"}')
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(jsonl("five", "six").encode()))
    (tmp_path / "d.txt").write_bytes("sieben\n\n\nacht \xff".encode("latin-1"))
    assert read(tmp_path / "a.parquet") == (["one", "", "two\nlines"], [])
    assert read(tmp_path / "b.jsonl") == (["three", "vier ü", "no newline at the end"], [])
    assert read(tmp_path / "c.jsonl.gz") == (["five", "six"], [])
    assert read(tmp_path / "d.txt") == (["sieben\n\nacht \ufffd"], [])


def test_parquet_row_groups_stay_what_they_are(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["one", "two", "three"], row_group_size=2)
    groups = [documents for documents, _ in prepare.read_row_groups(tmp_path / "a.parquet", [])]
    assert groups == [["one", "two"], ["three"]]


def test_large_strings_and_null_texts_in_parquet_are_understood(tmp_path):
    pq.write_table(pa.table({"text": pa.array(["one", None, "two"], pa.large_string())}), tmp_path / "a.parquet")
    documents, bad = read(tmp_path / "a.parquet")
    assert documents == ["one", "two"]
    assert bad == [f"{tmp_path}/a.parquet: row group 0: null text"]


def test_a_plain_text_is_cut_at_blank_lines_into_documents_of_limited_size():
    text = "aaaa\n\nbbbb\n \ncccc\n" + "d" * 25 + "\n"
    assert prepare.split_text(text, 11) == ["aaaa\n\nbbbb\n", "cccc\ndddddd", "d" * 11, "d" * 8 + "\n"]
    assert prepare.split_text(" \n\n \n", 10) == []


def test_a_long_plain_text_becomes_documents_of_four_contexts_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_SEQ_LEN", 5)
    (tmp_path / "a.txt").write_text("x" * 50)
    assert read(tmp_path / "a.txt") == (["x" * 20, "x" * 20, "x" * 10], [])


BAD_LINES = {
    "not json": "{",
    "no such key": '{"content": "x"}',
    "not an object": '["text"]',
    "a bare string": '"text"',
    "not a string": '{"text": 5}',
    "null": '{"text": null}',
    "too deep": "[" * 100_000,
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_described_and_the_others_are_used(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl("one") + line + "\n" + jsonl("two"))
    documents, bad = read(path)
    assert documents == ["one", "two"]
    assert len(bad) == 1
    assert bad[0].startswith(f"{path}:2: ")


def test_invalid_utf8_in_json_lines_is_a_bad_line_and_a_lone_surrogate_a_question_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n{"text": "lone \\ud800, pair \\ud83d\\ude00"}\n')
    documents, bad = read(path)
    assert documents == ["lone ?, pair \U0001f600"]
    assert bad[0].startswith(f"{path}:1: UnicodeDecodeError")


def test_a_truncated_gzip_file_gives_what_comes_before_the_end(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(*hundred("gz")).encode())[:-200])
    documents, bad = read(path)
    assert 50 < len(documents) < 100
    assert documents == hundred("gz")[: len(documents)]
    assert bad == [
        f"{path}:{len(documents) + 1}: Compressed file ended before the end-of-stream marker was reached; "
        "the rest of the file is not used"
    ]


@pytest.mark.parametrize("kept", [slice(0, 0), slice(0, 30), slice(0, -8)], ids=["all", "the text", "the checksum"])
def test_a_corrupt_gzip_file_is_a_bad_line_not_an_exception(tmp_path, kept):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(*hundred("gz")).encode())[kept] + b"\xff" * 200)
    assert read(path)[1][-1].endswith("the rest of the file is not used")


def test_a_damaged_parquet_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, hundred("parquet"), compression="snappy")
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    prepare.check_parquet(path)  # its footer is fine: only reading finds out
    with pytest.raises(prepare.SetupError, match=r"a\.parquet: row group 0 is damaged"):
        read(path)
    path.write_bytes(whole[:-10])
    with pytest.raises(prepare.SetupError, match=r"a\.parquet is not a readable parquet file"):
        read(path)


def test_invalid_utf8_in_parquet_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "a.parquet"
    column = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), path)
    with pytest.raises(prepare.SetupError, match=r"a\.parquet: row group 0 is damaged"):
        read(path)


@pytest.mark.parametrize("table", [{"content": ["x"]}, {"text": [1, 2]}], ids=["no column", "numbers"])
def test_a_parquet_file_without_a_text_column_is_an_error_that_lists_its_columns(tmp_path, table):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(prepare.SetupError, match=rf"has no string column 'text'; its columns: {next(iter(table))}"):
        read(tmp_path / "a.parquet")


def test_a_missing_empty_or_foreign_source_says_what_was_looked_for(tmp_path):
    with pytest.raises(prepare.SetupError, match="nowhere: no such file or folder"):
        prepare.find_source_files(tmp_path / "nowhere")
    (tmp_path / "table.csv").write_text("text\nhello\n")
    for source in (tmp_path, tmp_path / "table.csv"):
        with pytest.raises(prepare.SetupError, match=r"looked for \.parquet, \.jsonl, \.jsonl\.gz, \.txt and found"):
            prepare.find_source_files(source)


def test_nested_folders_are_searched_and_their_names_kept_apart(cache, tmp_path):
    for name in ("x/same.txt", "y/deeper/same.txt", "top.jsonl"):
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "s/x/same.txt").write_text("first\n\n" + words(1, 3000))
    (tmp_path / "s/y/deeper/same.txt").write_text("second\n\n" + words(2, 3000))
    (tmp_path / "s/top.jsonl").write_text(jsonl(*hundred("top")))
    assert list(prepare.find_source_files(tmp_path / "s")) == ["top.jsonl", "x/same.txt", "y/deeper/same.txt"]
    assert list(encode(tmp_path / "s")["shards"]) == ["top.jsonl", "x/same.txt", "y/deeper/same.txt"]
    assert (cache / "tokens/train/y/deeper/same.txt.bin").exists()


def test_a_source_with_the_wrong_key_names_its_first_bad_line(cache, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "hello"}\n' * 3)
    with pytest.raises(prepare.SetupError, match=r"no document in 1 .* \(3 bad lines, the first: .*a\.jsonl:1: Key"):
        encode(path)
    assert not prepare.MANIFEST_PATH.exists()


def test_a_source_of_one_document_cannot_be_split(cache, tmp_path):
    (tmp_path / "a.jsonl").write_text(jsonl("same", "same"))
    with pytest.raises(prepare.SetupError, match=r"one document in 1 file.*at least two different ones are needed"):
        encode(tmp_path / "a.jsonl")


def test_a_source_without_training_text_can_be_corrected_and_prepared_again(cache, tmp_path):
    source = tmp_path / "s"
    write_parquet(source / VAL, hundred("val"))
    (source / "a.jsonl").write_text('{"content": "hello"}\n')
    with pytest.raises(prepare.SetupError, match=r"no usable document for the train split"):
        encode(source)
    with pytest.raises(prepare.SetupError, match=r"no data; run `uv run prepare\.py` first"):
        prepare.load_manifest()
    (source / "a.jsonl").write_text(jsonl(*hundred("train")))
    assert encode(source)["shards"]["a.jsonl"]["train"]["documents"] == 100


def test_bad_lines_are_counted_and_the_first_is_named(cache, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("{\n" + jsonl(*hundred("a")) + '{"text": 3}\n')
    encode(tmp_path / "a.jsonl")
    assert f"warning: 2 bad lines were left out; the first: {tmp_path}/a.jsonl:1: JSON" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Splits, encoding, the manifest
# ---------------------------------------------------------------------------------------------------------------------


def stored_texts(cache, split: str, name: str) -> list[str]:
    """The documents of a shard's token file, decoded; every one must begin with BOS."""
    tokenizer = prepare.Tokenizer.from_directory()
    tokens = np.fromfile(cache / "tokens" / split / f"{name}.bin", np.uint16).tolist()
    with np.load(cache / "tokens" / split / f"{name}.npz", allow_pickle=False) as index:
        offsets = index["offsets"].tolist()
    documents = [tokens[a:b] for a, b in itertools.pairwise(offsets)]
    assert offsets[-1] == len(tokens)
    assert all(document[0] == tokenizer.get_bos_token_id() for document in documents)
    return [tokenizer.decode(document[1:]) for document in documents]


def test_stored_tokens_equal_the_tokenizers_encoding_of_every_document(cache, tmp_path):
    texts = [*NASTY_TEXTS, *hundred("a"), words(3, 5000)]
    write_parquet(tmp_path / "s" / "a.parquet", texts, row_group_size=30)
    write_parquet(tmp_path / "s" / VAL, hundred("v"))
    encode(tmp_path / "s")
    tokenizer = prepare.Tokenizer.from_directory()
    tokens = np.fromfile(cache / "tokens/train/a.parquet.bin", np.uint16).tolist()
    encoded = tokenizer.encode(texts, prepend=tokenizer.get_bos_token_id())
    assert tokens == list(itertools.chain(*encoded))
    with np.load(cache / "tokens/train/a.parquet.npz", allow_pickle=False) as index:
        assert index["offsets"].tolist() == [0, *itertools.accumulate(map(len, encoded))]
        assert index["group_sizes"].tolist() == [30, 30, 30, len(texts) - 90]
    assert stored_texts(cache, "train", "a.parquet") == texts


def test_shard_06542_is_the_validation_split_and_nothing_else_is(cache, tmp_path):
    write_parquet(tmp_path / "s" / "a.parquet", hundred("train"))
    write_parquet(tmp_path / "s" / "deep" / VAL, hundred("val"))
    shards = encode(tmp_path / "s")["shards"]
    assert shards["a.parquet"]["train"]["documents"] == 100
    assert shards["a.parquet"]["val"] == {"documents": 0, "tokens": 0}
    assert shards[f"deep/{VAL}"]["train"] == {"documents": 0, "tokens": 0}
    assert stored_texts(cache, "val", f"deep/{VAL}") == hundred("val")
    # Text of the validation shard does not reach the tokenizer.
    assert b" val" not in prepare.Tokenizer.from_directory().ranks


def test_documents_are_held_out_by_their_text_alone(cache, tmp_path):
    texts = [f"document {i}" for i in range(1000)]
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.jsonl").write_text(jsonl(*texts, *texts[:50]))  # fifty come twice
    (tmp_path / "s" / "b.jsonl").write_text(jsonl(*reversed(texts)))
    manifest = encode(tmp_path / "s")
    # The rule, restated: the first 8 bytes of the text's SHA-256 are below 5 % of their range.
    bound = int(0.05 * 2**64)
    expected = [t for t in texts if int(prepare.hashlib.sha256(t.encode()).hexdigest()[:16], 16) < bound]
    assert 30 < len(expected) < 70
    assert stored_texts(cache, "val", "a.jsonl")[: len(expected)] == expected
    assert set(stored_texts(cache, "val", "a.jsonl")) == set(stored_texts(cache, "val", "b.jsonl")) == set(expected)
    assert not set(expected) & set(stored_texts(cache, "train", "b.jsonl"))
    assert manifest["held_out_below"] == bound


@pytest.mark.parametrize("seed", range(30))
def test_a_tiny_source_still_has_a_document_on_either_side(cache, tmp_path, seed):
    (tmp_path / "a.jsonl").write_text(jsonl(f"first {seed}", f"second {seed}"))
    shard = encode(tmp_path / "a.jsonl")["shards"]["a.jsonl"]
    assert (shard["train"]["documents"], shard["val"]["documents"]) == (1, 1)


def test_documents_that_all_hash_low_still_leave_one_for_training(cache, tmp_path):
    low = [t for t in (f"n{i}" for i in range(2000)) if prepare.document_hash(t) < prepare.HELD_OUT_SHARE * 2**64][:3]
    (tmp_path / "a.jsonl").write_text(jsonl(*low))
    encode(tmp_path / "a.jsonl")
    assert stored_texts(cache, "train", "a.jsonl") == [max(low, key=prepare.document_hash)]


def state_of(folder) -> dict[str, tuple]:
    """What shows that a file was neither written nor replaced."""
    stats = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (s.st_ino, s.st_mtime_ns, s.st_size) for name, s in stats.items()}


def test_adding_a_file_encodes_only_that_one_and_moves_no_document(cache, tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    (source / "m.jsonl").write_text(jsonl(*hundred("m")))
    first = dict(encode(source))
    before, tokenizer = state_of(cache / "tokens"), state_of(cache / "tokenizer")
    (source / "a.jsonl").write_text(jsonl(*hundred("a"), *hundred("m")))
    second = encode(source)
    after = state_of(cache / "tokens")
    assert {name: after[name] for name in before} == before
    added = [f"{split}/a.jsonl.{kind}" for split in ("train", "val") for kind in ("bin", "npz")]
    assert sorted(set(after) - set(before)) == added
    assert state_of(cache / "tokenizer") == tokenizer
    assert second["held_out_below"] == first["held_out_below"]
    assert second["fingerprint"] != first["fingerprint"]
    assert second["is_complete"] is True
    assert list(second["shards"]) == ["m.jsonl", "a.jsonl"]  # the order of arrival; training goes by name
    documents, _ = next(prepare.read_document_batches("train"))
    decode = prepare.Tokenizer.from_directory().decode
    assert decode(documents[0][1:].tolist()) == stored_texts(cache, "train", "a.jsonl")[0]
    val_m = stored_texts(cache, "val", "m.jsonl")
    assert [t for t in stored_texts(cache, "val", "a.jsonl") if t.startswith("m ")] == val_m


def test_preparing_the_same_data_again_changes_nothing(two_shards, cache):
    before = state_of(cache / "tokens"), prepare.load_manifest()
    encode(two_shards)
    assert (state_of(cache / "tokens"), prepare.load_manifest()) == before


def test_the_fingerprint_is_of_the_data_not_of_the_place(two_shards, cache, tmp_path, monkeypatch):
    first = prepare.load_manifest()
    moved = tmp_path / "elsewhere"
    two_shards.rename(moved)
    other = tmp_path / "other cache"
    other.mkdir()
    for name, sub in (("CACHE_DIR", ""), ("TOKENIZER_DIR", "tokenizer"), ("TOKENS_DIR", "tokens")):
        monkeypatch.setattr(prepare, name, other / sub)
    monkeypatch.setattr(prepare, "MANIFEST_PATH", other / "manifest.json")
    second = encode(moved)
    assert second["fingerprint"] == first["fingerprint"]
    assert re.fullmatch("[0-9a-f]{16}", second["fingerprint"])
    assert second["source"] != first["source"]
    assert second["shards"]["a.parquet"]["sha256"] == prepare.sha256_file(moved / "a.parquet")


def test_another_source_into_the_same_cache_is_refused_and_changes_nothing(two_shards, cache, tmp_path):
    before = state_of(cache)
    (tmp_path / "other.jsonl").write_text(jsonl(*hundred("other")))
    with pytest.raises(prepare.SetupError, match=r"holds \w\.parquet of .*, which .*other\.jsonl does not have: use"):
        encode(tmp_path / "other.jsonl")
    with pytest.raises(prepare.SetupError, match=r"holds the data of .*, not karpathy/climbmix-400b-shuffle: use"):
        prepare.prepare(None, 1, 1)
    assert state_of(cache) == before


def test_a_changed_file_is_refused_and_named(two_shards, cache):
    before = state_of(cache)
    content = bytearray((two_shards / "b.parquet").read_bytes())
    content[100] ^= 1  # the same length
    (two_shards / "b.parquet").write_bytes(content)
    with pytest.raises(prepare.SetupError, match=r"holds another b\.parquet than .*b\.parquet: use another cache"):
        encode(two_shards)
    assert state_of(cache) == before


def test_a_validation_shard_that_comes_later_is_refused(cache, tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    (source / "a.jsonl").write_text(jsonl(*hundred("a")))
    encode(source)
    write_parquet(source / VAL, hundred("val"))
    with pytest.raises(prepare.SetupError, match=r"holds out single documents, and .* now brings shard_06542\.parquet"):
        encode(source)


def test_an_exchanged_tokenizer_is_refused(two_shards, cache, tokenizer):
    tokenizer.save(cache / "tokenizer")
    with pytest.raises(prepare.SetupError, match=r"is not the tokenizer that .* was encoded with"):
        encode(two_shards)


def test_no_data_is_an_error_with_its_remedy(cache):
    with pytest.raises(prepare.SetupError, match=r"no data; run `uv run prepare\.py` first"):
        prepare.load_manifest()


KILLED_AFTER_THE_FIRST_SHARD = """
import os, signal, sys, prepare
save = prepare.save_manifest
def save_and_die(manifest, is_complete):
    save(manifest, is_complete)
    os.kill(os.getpid(), signal.SIGKILL)
prepare.save_manifest = save_and_die
sys.argv = ["prepare.py", "--source", sys.argv[1]]
prepare.main()
"""


def test_a_preparation_killed_half_way_is_refused_and_finished_by_the_next_call(cache, two_shards, tmp_path):
    whole = prepare.load_manifest()
    for path in (cache / "manifest.json", cache / "tokens", cache / "tokenizer"):
        path.rename(tmp_path / f"whole {path.name}")
    script = tmp_path / "killed.py"
    script.write_text(KILLED_AFTER_THE_FIRST_SHARD)
    assert run_command(cache, script, two_shards).returncode == -signal.SIGKILL
    prepare._load_manifest.cache_clear()  # another process has changed the manifest
    with pytest.raises(prepare.SetupError, match=r"preparation was interrupted; run `uv run prepare\.py` first"):
        prepare.load_manifest()
    first = state_of(cache / "tokens")
    encode(two_shards)
    assert prepare.load_manifest() == whole
    after = state_of(cache / "tokens")
    assert {name: after[name] for name in first} == first
    for path in (tmp_path / "whole tokens").rglob("*.bin"):
        assert (cache / "tokens" / path.relative_to(tmp_path / "whole tokens")).read_bytes() == path.read_bytes()


def test_a_second_preparation_at_the_same_time_is_refused(cache):
    message = r"another prepare\.py is at work on .*cache; wait for it"
    with prepare.cache_lock(), pytest.raises(prepare.SetupError, match=message), prepare.cache_lock():
        pass
    with prepare.cache_lock():  # the lock goes with its holder
        pass


# ---------------------------------------------------------------------------------------------------------------------
# Small helpers
# ---------------------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    prepare.write_atomic(path, "first")
    monkeypatch.setattr(prepare.os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare.write_atomic(path, b"second")
    monkeypatch.undo()
    assert path.read_text() == "first"
    prepare.write_atomic(path, b"third")
    assert [p.name for p in tmp_path.glob("[!.]*")] == ["a.json"]
    assert path.read_text() == "third"


def test_json_has_null_for_what_is_no_number():
    assert (
        prepare.finite_json({"a": [math.nan, (1.5, -math.inf)], "b": None}) == '{"a": [null, [1.5, null]], "b": null}'
    )


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_shows_share_rate_and_time_left(monkeypatch, capsys, is_terminal):
    readings = iter([0.0, 0.0, 5.0, 10.0, 20.0])  # start and last line; two additions; the end
    monkeypatch.setattr(prepare, "time", SimpleNamespace(monotonic=lambda: next(readings)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    progress = prepare.Progress("download", 100_000_000)
    progress.add(50_000_000)
    progress.add(10_000_000)
    progress.done = 100_000_000
    progress.finish()
    after_5_s = "download:  50% 50/100 MB, 10.0 MB/s, 5 s left"
    lines = ["download:  60% 60/100 MB, 6.0 MB/s, 7 s left", "download: 100% 100/100 MB, 5.0 MB/s, 20 s"]
    bars = ["############............", "##############..........", "#" * 24]
    if is_terminal:
        drawn = zip(bars, [after_5_s, *lines], strict=True)
        assert capsys.readouterr().out == "".join(f"\r[{bar}] {line}\x1b[K" for bar, line in drawn) + "\n"
    else:
        assert capsys.readouterr().out.splitlines() == lines  # one every ten seconds


# ---------------------------------------------------------------------------------------------------------------------
# Download
# ---------------------------------------------------------------------------------------------------------------------


def shard(seed: int, num_bytes: int = 200_000) -> bytes:
    """A parquet file with about `num_bytes` of text that does not compress."""
    texts = [random.Random(f"{seed} {i}").randbytes(500).hex() for i in range(num_bytes // 1000)]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer, compression="none", use_dictionary=False)
    return buffer.getvalue()


A, B = "shard_00000.parquet", "shard_00001.parquet"
FAST = {"max_attempts": 3, "pause_s": 0.0, "timeout_s": 0.3}


@pytest.fixture
def call_main(cache, monkeypatch):
    """prepare.main in this process, on the test's cache: what the command does, without three seconds of imports."""

    def call_main(*args: object) -> int:
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
        return prepare.main()

    return call_main


@pytest.fixture
def download(server, tmp_path):
    """Download shards into a folder; returns {file name: bytes} of what is there afterwards."""
    folder = tmp_path / "data"
    folder.mkdir()

    def download(*names: str, **options) -> dict[str, bytes]:
        prepare.download_shards(list(names), folder, 2, **FAST | options)
        return contents(folder)

    download.folder = folder
    return download


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_are_downloaded_from_the_mirror_that_HF_ENDPOINT_names(server, download):
    server.files = {A: shard(1), B: shard(2)}
    assert download(A, B) == server.files
    assert sorted(server.requests) == [("GET", A, None), ("GET", B, None)]


def test_a_connection_cut_in_mid_body_is_continued_where_it_ended(server, download):
    server.files = {A: shard(1)}
    server.acts = {A: [serve(131_072), serve(65_536)]}
    assert download(A) == server.files
    assert server.gets(A) == [None, "bytes=131072-", "bytes=196608-"]


def test_a_stalled_connection_is_given_up_and_continued(server, download):
    server.files = {A: shard(1)}
    server.acts = {A: [serve(65_536, then_stall=True)]}
    assert download(A) == server.files
    assert server.gets(A) == [None, "bytes=65536-"]


def test_a_server_without_ranges_starts_from_the_beginning(server, download):
    server.files = {A: shard(1)}
    server.acts = {A: [serve(65_536, ranges=False), serve(ranges=False)]}
    assert download(A) == server.files
    assert server.gets(A) == [None, "bytes=65536-"]


@pytest.mark.parametrize("headers", [{}, {"Retry-After": 0}, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}])
def test_a_busy_server_is_asked_again(server, download, headers):
    server.files = {A: shard(1)}
    server.acts = {A: [answer(503, headers), answer(429, headers)]}
    assert download(A) == server.files
    assert server.gets(A) == [None, None, None]


def test_any_new_byte_starts_the_count_of_attempts_anew(server, download):
    server.files = {A: shard(1, 500_000)}
    server.acts = {A: [act for _ in range(5) for act in (answer(503), serve(65_536))]}  # ten failures, three allowed
    assert download(A) == server.files


class Pauses(threading.Event):
    """Notes the pauses instead of making them."""

    def __init__(self):
        super().__init__()
        self.pauses = []

    def wait(self, timeout=None):
        self.pauses.append(timeout)
        return self.is_set()


def test_pauses_double_honour_retry_after_and_stay_below_a_minute(server, tmp_path):
    stop = Pauses()
    waits = [None, None, 20, None, 3600]
    server.acts = {A: [answer(503, {"Retry-After": w} if w else {}) for w in [*waits, None]]}
    with pytest.raises(prepare.DownloadError, match="HTTP 503"):
        prepare.download_shard(A, tmp_path, prepare.Progress("", 0), stop)
    assert stop.pauses == [1, 2, 20, 8, 60]


def test_a_part_that_is_already_whole_needs_no_more_bytes(server, download):
    server.files = {A: shard(1)}
    (download.folder / f"{A}.part").write_bytes(server.files[A])
    assert download(A) == server.files
    assert server.gets(A) == [f"bytes={len(server.files[A])}-"]


def test_a_part_longer_than_the_file_is_thrown_away(server, download):
    server.files = {A: shard(1)}
    (download.folder / f"{A}.part").write_bytes(server.files[A] + b"more")
    assert download(A) == server.files
    assert server.gets(A) == [f"bytes={len(server.files[A]) + 4}-", None]


def test_a_corrupt_file_of_the_right_length_is_never_accepted(server, download):
    server.files = {A: shard(1), B: shard(2)}
    server.acts = {A: [lambda handler, body: handler.reply(200, {"Content-Length": len(body)}, bytes(len(body)))] * 3}
    message = rf"1 of 2 shards are missing: {A}\. What arrived is kept in .*data; call again to go on"
    with pytest.raises(prepare.SetupError, match=message):
        download(A, B)
    assert contents(download.folder) == {B: server.files[B]}


def test_a_corrupt_file_is_fetched_again(server, download):
    server.files = {A: shard(1)}
    server.acts = {A: [lambda handler, body: handler.reply(200, {"Content-Length": len(body)}, bytes(len(body)))]}
    assert download(A) == server.files
    assert server.gets(A) == [None, None]


def test_a_web_page_in_place_of_the_file_is_no_shard(server, download, capsys):
    page = b"<html>please log in</html>"
    server.acts = {A: [answer(200, {"Content-Length": len(page)}, page)] * 3}
    with pytest.raises(prepare.SetupError, match="1 of 1 shards are missing"):
        download(A)
    assert "damaged: " in capsys.readouterr().err
    assert contents(download.folder) == {}


def test_a_shard_without_the_text_column_is_no_shard(server, download, capsys):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"content": ["x"]}), buffer)
    server.files = {A: buffer.getvalue()}
    with pytest.raises(prepare.SetupError, match="1 of 1 shards are missing"):
        download(A)
    assert "has no string column 'text'; its columns: content" in capsys.readouterr().err


def test_missing_shards_are_named_and_not_asked_for_twice(server, download, capsys):
    server.files = {B: shard(2)}
    with pytest.raises(prepare.SetupError, match=rf"2 of 3 shards are missing: {A}, {VAL}\."):
        download(A, B, VAL)
    assert server.gets(A) == server.gets(VAL) == [None]
    assert f"{A}: HTTP 404" in capsys.readouterr().err
    assert contents(download.folder) == server.files


def test_a_file_of_unknown_length_is_refused(server, download, capsys):
    server.files = {A: shard(1)}
    server.acts = {A: [lambda handler, body: handler.reply(200, {}, body)]}
    with pytest.raises(prepare.SetupError, match="1 of 1 shards are missing"):
        download(A)
    assert "the server does not say how long the file is" in capsys.readouterr().err
    assert contents(download.folder) == {}


def test_what_arrived_before_a_failure_is_continued_by_the_next_call(server, download):
    server.files = {A: shard(1)}
    server.acts = {A: [serve(65_536), answer(503), answer(503), answer(503)]}
    with pytest.raises(prepare.SetupError, match="1 of 1 shards are missing"):
        download(A)
    assert contents(download.folder) == {f"{A}.part": server.files[A][:65_536]}
    server.acts, server.requests = {}, []
    assert download(A) == server.files
    assert server.gets(A) == ["bytes=65536-"]


def test_a_shard_that_is_already_there_is_used_as_it_is(server, download):
    server.files = {A: shard(1)}
    path = download.folder / A
    path.write_bytes(server.files[A])
    before = state_of(download.folder)
    download(A)
    assert state_of(download.folder) == before
    assert server.requests == [("HEAD", A, None)]


@pytest.mark.parametrize("change", [lambda body: body[:-1000], lambda body: shard(1, 100_000)], ids=["cut", "shorter"])
def test_a_shard_that_is_not_the_servers_is_downloaded_again(server, download, change):
    server.files = {A: shard(1)}
    (download.folder / A).write_bytes(change(server.files[A]))
    assert download(A) == server.files


def test_shards_that_are_there_need_no_server(server, download, monkeypatch):
    (download.folder / A).write_bytes(shard(1))
    server.head_status = 503
    assert download(A) == {A: shard(1)}
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert download(A) == {A: shard(1)}
    assert server.gets(A) == []


def test_a_malformed_mirror_fails_at_once(download, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "mirror.example")
    with pytest.raises(prepare.SetupError, match="1 of 1 shards are missing"):
        download(A, pause_s=1000.0)
    assert "No scheme supplied" in capsys.readouterr().err
    assert prepare.shard_url(A).startswith("mirror.example/datasets/karpathy/climbmix-400b-shuffle/resolve/main/shard_")
    monkeypatch.setenv("HF_ENDPOINT", "")
    assert prepare.shard_url(A).startswith("https://huggingface.co/datasets/")


def test_the_real_command_names_missing_shards_exits_non_zero_and_goes_on_from_there(server, cache, call_main, capsys):
    server.files = {A: shard(1), B: shard(2)}
    failed = run_command(cache, ROOT / "prepare.py", "--num-shards", 2, HF_ENDPOINT=server.url)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1] == (
        f"error: 1 of 3 shards are missing: {VAL}. What arrived is kept in {cache}/data; call again to go on"
    )
    assert sorted(contents(cache / "data")) == [A, B]
    assert not (cache / "manifest.json").exists()
    server.files[VAL], server.requests = shard(3), []
    assert call_main("--num-shards", 2) == 0
    assert sorted(server.requests) == [("GET", VAL, None), ("HEAD", A, None), ("HEAD", B, None)]
    manifest = json.loads((cache / "manifest.json").read_text())
    assert (manifest["source"], list(manifest["shards"])) == ("karpathy/climbmix-400b-shuffle", [A, B, VAL])
    assert manifest["shards"][VAL]["val"]["documents"] == 200
    assert f"fingerprint {manifest['fingerprint']}" in capsys.readouterr().out


def test_ctrl_c_while_the_server_stalls_leaves_only_parts_which_the_next_call_continues(server, cache, call_main):
    server.files = {A: shard(1), VAL: shard(3)}
    server.acts = {A: [serve(131_072, then_stall=True)], VAL: [serve(65_536, then_stall=True)]}
    command = [sys.executable, str(ROOT / "prepare.py"), "--num-shards", "1"]
    env = command_env(cache, HF_ENDPOINT=server.url)
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    expected = {f"{A}.part": 131_072, f"{VAL}.part": 65_536}
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (cache / "data").exists() and {p.name: p.stat().st_size for p in (cache / "data").iterdir()} == expected:
            break
        time.sleep(0.02)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - begin < 15  # at once, not after the connection's timeout of 30 s
    assert errors.strip() == "error: interrupted; call again to go on from here"
    assert {name: len(body) for name, body in contents(cache / "data").items()} == expected
    server.requests = []
    assert call_main("--num-shards", 1) == 0
    assert sorted(server.requests) == [("GET", A, "bytes=131072-"), ("GET", VAL, "bytes=65536-")]
    assert contents(cache / "data") == server.files
    assert json.loads((cache / "manifest.json").read_text())["is_complete"] is True


def test_more_shards_later_download_and_encode_only_those(server, cache):
    server.files = {A: shard(1), B: shard(2), VAL: shard(3)}
    prepare.prepare(None, 1, 2)
    (cache / "data" / A).unlink()  # its tokens are there: nobody needs it any more
    before, server.requests = state_of(cache / "tokens"), []
    manifest = prepare.prepare(None, 2, 2)
    assert server.requests == [("GET", B, None)]
    assert list(manifest["shards"]) == [A, VAL, B]
    after = state_of(cache / "tokens")
    assert {name: after[name] for name in before} == before


# ---------------------------------------------------------------------------------------------------------------------
# The real commands: own text, wrong calls, the demo, an upstream training script
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_prepares_own_text(cache, call_main, capsys):
    with open("text.jsonl", "w") as f:  # named relative to the working folder
        f.write(jsonl(*hundred("a")) + "oops\n")
    assert call_main("--source", "text.jsonl") == 0
    out, err = capsys.readouterr()
    assert err.startswith("warning: 1 bad lines were left out; the first: ")
    manifest = prepare.load_manifest()
    assert manifest["source"] == f"{cache.parent}/work/text.jsonl"
    assert f"ready: {cache} holds {manifest['source']}, fingerprint {manifest['fingerprint']}" in out


def test_the_command_says_in_one_line_that_a_source_is_missing(call_main, capsys):
    assert call_main("--source", "nowhere") == 2
    assert capsys.readouterr() == ("", "error: --source nowhere: no such file or folder\n")


@pytest.mark.parametrize("args", [("--num-shards", 0), ("--num-shards", 6543), ("--download-workers", 0)])
def test_impossible_numbers_are_refused(call_main, capsys, args):
    with pytest.raises(SystemExit) as refused:
        call_main(*args)
    assert refused.value.code == 2
    assert "--num-shards takes -1 or 1 to 6542, --download-workers at least 1" in capsys.readouterr().err


def test_the_demo_needs_no_network_and_stays_in_a_folder_of_its_own(demo):
    cache, done = demo
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in cache.iterdir()] == ["demo"]
    assert names_in(cache / "demo" / "data") == ["python.jsonl"]
    manifest = json.loads((cache / "demo" / "manifest.json").read_text())
    counts = manifest["shards"]["python.jsonl"]
    assert counts["train"]["tokens"] > 1_000_000
    assert counts["val"]["tokens"] > 2**16  # the evaluation does not repeat itself
    assert f"{counts['train']['tokens']:,} training tokens" in done.stdout
    assert len(json.loads((cache / "demo/tokenizer/tokenizer.json").read_text())["tokens"]) == 1020


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


def test_an_interrupted_move_is_finished_by_the_next_call(work):
    leave_run(work / ".auto-log-research" / "unfiled" / "r6", "r6", "metrics.jsonl")
    leave_run(work, "r6", "run_start.json", "run_summary.json")
    prepare.set_aside_earlier_run()
    kept = ["metrics.jsonl", "run_start.json", "run_summary.json"]
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
    assert list(work.iterdir()) == []


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
