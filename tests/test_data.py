"""prepare.py's data: text in, tokens packed and checked, downloads from a server that misbehaves."""

import base64
import codecs
import fcntl
import gzip
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
import torch
import urllib3
from bench_loader import pack_rows_straightforward
from conftest import ROOT, VAL, answer, command_env, run_command, serve, words, write_parquet

import prepare

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


def test_token_bytes_count_raw_bytes_also_where_a_token_is_no_text_by_itself(tokenizer, cache):
    tokenizer.save(cache / "tokenizer")
    lengths = prepare.get_token_bytes()
    assert (lengths.dtype, lengths.shape) == (torch.int32, (300,))
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
    assert os.listdir(cache / "tokenizer") == ["tokenizer.json"]
    loaded = prepare.Tokenizer.from_directory()
    assert (loaded.ranks, loaded.special, loaded.pattern) == (tokenizer.ranks, tokenizer.special, tokenizer.pattern)
    assert loaded.encode(NASTY_TEXTS) == tokenizer.encode(NASTY_TEXTS)


def test_nothing_in_the_tree_pickles():
    for path in [ROOT / "prepare.py", ROOT / "train.py", *ROOT.glob("tests/*.py")]:
        pattern = r"^\s*(import|from) \w*pickle|allow_pickle=" + "True"
        assert not re.search(pattern, path.read_text(), re.MULTILINE), path


def test_a_missing_tokenizer_is_an_error_with_its_remedy(cache):
    with pytest.raises(prepare.SetupError, match=r"no tokenizer at .*tokenizer\.json .*: run `uv run prepare\.py`"):
        prepare.Tokenizer.from_directory()


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def read(path) -> tuple[list[str], list[str]]:
    """All documents of a source file, and what was bad."""
    bad = []
    return [text for documents in prepare.read_row_groups(path, bad) for text in documents], bad


def encode(source) -> dict:
    return prepare.encode_source(str(source), prepare.find_source_files(source))


def jsonl(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def hundred(prefix: str) -> list[str]:
    return [f"{prefix} {i} {words(i, 5)}" for i in range(100)]


def zst(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data).to_pybytes()


def test_every_format_yields_its_documents_whatever_the_case_of_its_name(tmp_path):
    write_parquet(tmp_path / "a.PARQUET", ["one", "", "two\nlines"], row_group_size=2)
    (tmp_path / "b.Jsonl").write_text(jsonl("three", "vier ü") + "\n\n" + '{"text": "no newline at the end"}')
    (tmp_path / "c.jsonl.GZ").write_bytes(gzip.compress(jsonl("five", "six").encode()))
    (tmp_path / "d.jsonl.zst").write_bytes(zst(jsonl("seven").encode()))
    (tmp_path / "e.TXT").write_bytes("acht\r\n\r\n\r\nneun ü".encode())
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress(b"ten"))
    (tmp_path / "g.txt.zst").write_bytes(zst(b"eleven"))
    files = prepare.find_source_files(tmp_path)
    assert {name: read(path) for name, path in files.items()} == {
        "a.PARQUET": (["one", "", "two\nlines"], []),
        "b.Jsonl": (["three", "vier ü", "no newline at the end"], []),
        "c.jsonl.GZ": (["five", "six"], []),
        "d.jsonl.zst": (["seven"], []),
        "e.TXT": (["acht\n\nneun ü"], []),
        "f.txt.gz": (["ten"], []),
        "g.txt.zst": (["eleven"], []),
    }


def test_what_is_not_used_is_counted_and_hidden_files_are_left_out(tmp_path, capsys):
    names = ["a.txt", "b.csv", "c.csv", "notes.md", "README", ".git/x.txt", "__MACOSX/y.txt", "d/._z.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert list(prepare.find_source_files(tmp_path)) == ["a.txt"]
    assert capsys.readouterr().err == (
        f"warning: 7 of 8 files in {tmp_path} are not used: .git/x.txt, README, __MACOSX/y.txt, b.csv, c.csv\n"
    )
    (tmp_path / "b.csv").rename(tmp_path / "a.jsonl")
    assert list(prepare.find_source_files(tmp_path / "a.jsonl")) == ["a.jsonl"]
    assert capsys.readouterr().err == ""


def test_a_byte_order_mark_of_utf8_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve 日本\r\nend".encode("utf-8-sig"))
    assert read(tmp_path / "a.txt") == (["naïve 日本\nend"], [])
    (tmp_path / "b.jsonl").write_bytes(codecs.BOM_UTF8 + jsonl("one", "two").encode())
    assert read(tmp_path / "b.jsonl") == (["one", "two"], [])


NO_TEXTS = {
    "latin-1": ("one\nnaïve".encode("latin-1"), "position 6"),
    "random bytes": (random.Random(0).randbytes(10_000), r"position \d+"),
}


@pytest.mark.parametrize(("data", "place"), NO_TEXTS.values(), ids=NO_TEXTS)
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_what_is_no_utf8_is_refused_with_its_place_and_how_to_convert_it(tmp_path, data, place, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(data) if suffix == ".txt.gz" else data)
    message = rf"a{suffix} is damaged or no UTF-8 \('utf-8' .* in {place}: .*iconv -f LATIN1 -t UTF-8"
    with pytest.raises(prepare.SetupError, match=message):
        read(path)


def test_utf16_is_read_by_its_mark_and_what_holds_nuls_is_no_text(tmp_path):
    for mark, encoding in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        (tmp_path / "a.txt").write_bytes(mark + "naïve 日本\r\nend".encode(encoding))
        assert read(tmp_path / "a.txt") == (["naïve 日本\nend"], [])
    for data, line in (("one".encode("utf-16-le"), 1), (b"text\n" + bytes(1000), 2)):
        (tmp_path / "a.txt").write_bytes(data)
        with pytest.raises(prepare.SetupError, match=rf"damaged or no UTF-8 \(a NUL in line {line}\): .*iconv"):
            read(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_damaged_compressed_text_is_refused_by_name(tmp_path, name):
    data = jsonl(*(words(i, 50) for i in range(100))).encode()
    (tmp_path / name).write_bytes((gzip.compress(data) if name.endswith(".gz") else zst(data))[:-100])
    with pytest.raises(prepare.SetupError, match=rf"{name} is damaged or no UTF-8 \(Truncated compressed stream\)"):
        read(tmp_path / name)


def test_parquet_row_groups_stay_what_they_are(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["one", "two", "three"], row_group_size=2)
    groups = list(prepare.read_row_groups(tmp_path / "a.parquet", []))
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
    assert bad[0].startswith(f"{path}:1: 'utf-8' codec can't decode byte 0xff")


@pytest.mark.parametrize("kept", [0, 30, -8], ids=["all", "the text", "the checksum"])
def test_a_corrupt_stream_is_refused_by_name(tmp_path, kept):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(*hundred("gz")).encode())[:kept] + b"\xff" * 200)
    with pytest.raises(prepare.SetupError, match=r"a\.jsonl\.gz is damaged or no UTF-8 \(zlib"):
        read(path)


def test_a_damaged_parquet_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, hundred("parquet"), compression="snappy")
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    prepare.check_parquet(path)  # its footer is fine: only reading finds out
    with pytest.raises(prepare.SetupError, match=r"a\.parquet is damaged"):
        read(path)
    path.write_bytes(whole[:-10])
    with pytest.raises(prepare.SetupError, match=r"a\.parquet is not a readable parquet file"):
        read(path)


def test_invalid_utf8_in_parquet_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "a.parquet"
    column = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), path)
    with pytest.raises(prepare.SetupError, match=r"a\.parquet is damaged"):
        read(path)


NO_STRINGS = {
    "no such column": (pa.table({"content": ["x"], "url": ["y"]}), r"content \(string\), url \(string\)"),
    "numbers": (pa.table({"text": [1, 2]}), r"text \(int64\)"),
    "lists": (pa.table({"text": [["a", "b"]]}), r"text \(list<\w+: string>\)"),
    "a dictionary": (pa.table({"text": pa.array(["a"]).dictionary_encode()}), r"text \(dictionary<values=string,"),
    "a structure": (pa.table({"text": [{"en": "a"}]}), r"text \(struct<en: string>\)"),
}


@pytest.mark.parametrize(("table", "columns"), NO_STRINGS.values(), ids=NO_STRINGS)
def test_a_parquet_file_without_a_string_column_is_an_error_that_lists_columns_and_types(tmp_path, table, columns):
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(prepare.SetupError, match=rf"has no string 'text', but {columns}.*--text-key"):
        read(tmp_path / "a.parquet")


def test_another_key_or_column_holds_the_text_if_one_says_so(cache, tmp_path, call_main, capsys):
    source = tmp_path / "s"
    source.mkdir()
    pq.write_table(pa.table({"content": hundred("parquet"), "text": hundred("no")}), source / "a.parquet")
    (source / "b.jsonl").write_text(jsonl(*hundred("jsonl")).replace('"text"', '"content"'))
    assert call_main("--source", source, "--text-key", "content") == 0
    stored = stored_texts(cache, "train", "a.parquet") + stored_texts(cache, "train", "b.jsonl")
    assert {text.split()[0] for text in stored} == {"parquet", "jsonl"}
    by_content = prepare.load_manifest()["fingerprint"]
    assert call_main("--source", source) == 2
    assert "holds the texts of 'content', not 'text': use another cache" in capsys.readouterr().err
    assert prepare.load_manifest()["fingerprint"] == by_content


def test_a_missing_empty_or_foreign_source_says_what_was_looked_for(tmp_path):
    with pytest.raises(prepare.SetupError, match=r"nowhere: no such file or folder"):
        prepare.find_source_files(tmp_path / "nowhere")
    with pytest.raises(prepare.SetupError, match=r"looked for \.parquet, \.jsonl, .* and found nothing"):
        prepare.find_source_files(tmp_path)
    (tmp_path / "table.csv").write_text("text\nhello\n")
    for source in (tmp_path, tmp_path / "table.csv"):
        with pytest.raises(prepare.SetupError, match=r"and found table\.csv"):
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
    path.write_text('{"content": "hello", "id": 1}\n' * 3)
    message = r"no document for the train split; the first bad line: .*a\.jsonl:1: no string 'text' in {'content'"
    with pytest.raises(prepare.SetupError, match=message):
        encode(path)
    assert not prepare.MANIFEST_PATH.exists()


def test_a_source_of_one_document_cannot_be_split(cache, tmp_path):
    (tmp_path / "a.jsonl").write_text(jsonl("same", "same"))
    with pytest.raises(prepare.SetupError, match=r"no document for the (train|val) split; bring more text"):
        encode(tmp_path / "a.jsonl")


def test_a_source_without_training_text_can_be_corrected_and_prepared_again(cache, tmp_path):
    source = tmp_path / "s"
    write_parquet(source / VAL, hundred("val"))
    (source / "a.jsonl").write_text('{"content": "hello"}\n')
    with pytest.raises(prepare.SetupError, match=r"no document for the train split; the first bad line: "):
        encode(source)
    with pytest.raises(prepare.SetupError, match=r"no data that are complete.*; run `uv run prepare\.py` first"):
        prepare.load_manifest()
    (source / "a.jsonl").write_text(jsonl(*hundred("train")))
    assert encode(source)["shards"]["a.jsonl"]["train"]["documents"] == 100


def test_bad_lines_are_counted_among_all_and_the_first_is_named_every_time(cache, tmp_path, call_main, capsys):
    lines = ["{", *jsonl(*hundred("a")).splitlines()] + ['{"text": 3}'] * 99
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for _ in range(2):
        assert call_main("--source", tmp_path / "a.jsonl") == 0
        message = f"warning: 100 of 200 lines were left out; the first: {tmp_path}/a.jsonl:1: Expecting"
        assert message in capsys.readouterr().err


def test_too_little_validation_text_is_said_with_how_much_is_wanted(cache, tmp_path, call_main, capsys, monkeypatch):
    (tmp_path / "a.jsonl").write_text(jsonl(*hundred("a")))
    size = (tmp_path / "a.jsonl").stat().st_size
    encode(tmp_path / "a.jsonl")
    num_tokens = prepare.load_manifest()["shards"]["a.jsonl"]["val"]["tokens"]
    monkeypatch.setattr(prepare, "EVAL_TOKENS", 31 * num_tokens)
    assert call_main("--source", tmp_path / "a.jsonl") == 0
    assert capsys.readouterr().err == (
        f"warning: {31 * num_tokens:,} validation tokens are scored, and there are {num_tokens:,}: each counts about "
        f"31 times, and small differences mean little. Wanted: 31 times as much text (now {size / 1e6:.3g} MB)\n"
    )
    monkeypatch.setattr(prepare, "EVAL_TOKENS", num_tokens)
    assert call_main("--source", tmp_path / "a.jsonl") == 0
    assert capsys.readouterr().err == ""


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
    assert shards["a.parquet"]["val"]["tokens"] == shards[f"deep/{VAL}"]["train"]["tokens"] == 0
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


def test_a_validation_shard_that_comes_later_is_refused_where_documents_are_held_out(cache, tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    (source / "a.jsonl").write_text(jsonl(*hundred("a")))
    encode(source)
    before = state_of(cache)
    write_parquet(source / VAL, hundred("v"))
    message = rf"holds single documents held out, and .* now brings {VAL}: use another cache"
    with pytest.raises(prepare.SetupError, match=message):
        encode(source)
    assert state_of(cache) == before


def test_a_changed_file_is_refused_and_named(two_shards, cache):
    before = state_of(cache)
    content = bytearray((two_shards / "b.parquet").read_bytes())
    content[100] ^= 1  # the same length
    (two_shards / "b.parquet").write_bytes(content)
    with pytest.raises(prepare.SetupError, match=r"holds another b\.parquet than .*b\.parquet: use another cache"):
        encode(two_shards)
    assert state_of(cache) == before


def test_no_data_is_an_error_with_its_remedy(cache):
    with pytest.raises(prepare.SetupError, match=r"no data that are complete.*; run `uv run prepare\.py` first"):
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
    prepare.load_manifest.cache_clear()  # another process has changed the manifest
    with pytest.raises(prepare.SetupError, match=r"no data that are complete.*; run `uv run prepare\.py` first"):
        prepare.load_manifest()
    first = state_of(cache / "tokens")
    encode(two_shards)
    assert prepare.load_manifest() == whole
    after = state_of(cache / "tokens")
    assert {name: after[name] for name in first} == first
    for path in (tmp_path / "whole tokens").rglob("*.bin"):
        assert (cache / "tokens" / path.relative_to(tmp_path / "whole tokens")).read_bytes() == path.read_bytes()


def test_a_second_preparation_at_the_same_time_is_refused(cache, tmp_path, call_main, capsys):
    (tmp_path / "a.jsonl").write_text(jsonl(*hundred("a")))
    with open(cache / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert call_main("--source", tmp_path / "a.jsonl") == 2
    assert capsys.readouterr().err == f"error: another prepare.py is at work on {cache}; wait for it to finish\n"
    assert call_main("--source", tmp_path / "a.jsonl") == 0  # the lock goes with its holder


def damage(path, how: str) -> None:
    """Cut a file short, zero a part of it, change a bit, or remove it; whoever loads it next is another process."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    if how == "cut":
        del data[middle:]
    elif how == "zeroed":
        data[middle:] = bytes(len(data) - middle)
    elif how == "changed":
        data[middle] ^= 1
    path.unlink()
    if how != "removed":
        path.write_bytes(data)
    prepare.load_manifest.cache_clear()


def read_all() -> None:
    """What a run reads, in its order: the tokenizer, then each split once."""
    prepare.Tokenizer.from_directory()
    for split in ("train", "val"):
        all(itertools.takewhile(lambda item: item[1] == 1, prepare.read_document_batches(split)))


CACHE_FILES = [
    "manifest.json",
    "tokenizer/tokenizer.json",
    "tokens/train/b.parquet.bin",
    "tokens/train/a.parquet.npz",
    f"tokens/val/{VAL}.bin",
]


@pytest.mark.parametrize("name", CACHE_FILES)
@pytest.mark.parametrize("how", ["cut", "zeroed", "changed", "removed"])
def test_a_damaged_cache_is_never_trained_on_and_the_next_preparation_mends_it(two_shards, cache, call_main, how, name):
    whole = {path.name: path.read_bytes() for path in cache.rglob("*.bin")}
    fingerprint, untouched = prepare.load_manifest()["fingerprint"], state_of(cache / "tokens")
    damage(cache / name, how)
    message = r"(damaged|missing|no data|no tokenizer).* run `uv run prepare\.py` first or again"
    with pytest.raises(prepare.SetupError, match=message):
        read_all()
    assert call_main("--source", two_shards) == 0
    read_all()
    assert {path.name: path.read_bytes() for path in cache.rglob("*.bin")} == whole
    assert prepare.load_manifest()["fingerprint"] == fingerprint
    if name.startswith("tokens"):  # the other shards are left alone
        shard = Path(name).stem
        after = state_of(cache / "tokens")
        assert {n for n in after if after[n] != untouched.get(n)} == {n for n in after if Path(n).stem == shard}


def test_a_manifest_nested_too_deep_or_of_no_object_is_damage(two_shards, cache):
    for text in ("[" * 100_000, "[]", "7", "null", "{}", ""):
        (cache / "manifest.json").write_text(text)
        prepare.load_manifest.cache_clear()
        with pytest.raises(prepare.SetupError, match=r"no data that are complete and undamaged"):
            prepare.load_manifest()


def test_a_cache_of_an_earlier_version_is_made_anew_with_the_same_fingerprint(two_shards, cache):
    """Those manifests have no checksums."""
    manifest = json.loads((cache / "manifest.json").read_text())
    del manifest["checksum"], manifest["text_key"]
    for shard in manifest["shards"].values():
        del shard["bad"], shard["first_bad"], shard["files"]
    (cache / "manifest.json").write_text(json.dumps(manifest, indent=1))
    prepare.load_manifest.cache_clear()
    with pytest.raises(prepare.SetupError, match="no data that are complete"):
        prepare.load_manifest()
    assert encode(two_shards)["fingerprint"] == manifest["fingerprint"]
    read_all()


def test_what_the_manifest_calls_complete_is_on_the_disk(cache, tmp_path, monkeypatch):
    """Every file is flushed to the disk before a manifest that lists it, whatever the order of a power cut."""
    synced, sync = [], os.fsync
    monkeypatch.setattr(prepare.os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    (tmp_path / "a.jsonl").write_text(jsonl(*hundred("a")))
    encode(tmp_path / "a.jsonl")
    names = [re.sub(r"(\.\d+)?\.tmp$", "", Path(name).name).lstrip(".") for name in synced]
    assert names[:2] == ["tokenizer.json", "manifest.json"]
    assert sorted(names[2:6]) == ["a.jsonl.bin", "a.jsonl.bin", "a.jsonl.npz", "a.jsonl.npz"]
    assert names[6:] == ["manifest.json"]


# ---------------------------------------------------------------------------------------------------------------------
# Small helpers
# ---------------------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    prepare.write_atomic(path, "first")
    monkeypatch.setattr(prepare.os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare.write_atomic(path, "second")
    monkeypatch.undo()
    assert path.read_text() == "first"
    prepare.write_atomic(path, "third")
    assert [p.name for p in tmp_path.glob("[!.]*")] == ["a.json"]
    assert path.read_text() == "third"


def test_json_has_null_for_what_is_no_number():
    assert (
        prepare.finite_json({"a": [math.nan, (1.5, -math.inf)], "b": None}) == '{"a": [null, [1.5, null]], "b": null}'
    )


@pytest.mark.parametrize("value", ["1", "true", "YES", "on", "0", "false", "No", "off", ""])
def test_the_demo_is_switched_by_any_usual_word(monkeypatch, value):
    monkeypatch.setenv("AUTORESEARCH_DEMO", value)
    is_on = prepare.read_setting("AUTORESEARCH_DEMO", prepare.SWITCH.__getitem__, "")
    assert bool(is_on) == (value.lower() in ("1", "true", "yes", "on"))


BAD_SETTINGS = {
    "AUTORESEARCH_DEMO": ("maybe", "give 1 for the demo, 0 or nothing for a real run"),
    "AUTORESEARCH_TIME_BUDGET": ("5s", "give seconds of training, such as 30"),
    "AUTORESEARCH_SEED_OFFSET": ("one", "give a whole number, such as 1"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_setting_that_cannot_be_read_is_one_line_whatever_imports_this(monkeypatch, capsys, name):
    value, remedy = BAD_SETTINGS[name]
    monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("prepare_again", ROOT / "prepare.py")
    with pytest.raises(SystemExit) as ended:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert (ended.value.code, capsys.readouterr()) == (2, ("", f"error: {name}={value}: {remedy}\n"))


def test_a_setting_that_cannot_be_read_ends_train_py_with_one_line_too(tmp_path):
    done = run_command(tmp_path / "cache", ROOT / "train.py", AUTORESEARCH_DEMO="maybe")
    error = "error: AUTORESEARCH_DEMO=maybe: give 1 for the demo, 0 or nothing for a real run\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", error)


@pytest.mark.parametrize("value", ["0", "-5", "nan", "inf", "5s"])
def test_a_budget_is_a_positive_number_of_seconds(monkeypatch, value):
    monkeypatch.setenv("AUTORESEARCH_TIME_BUDGET", value)
    with pytest.raises(SystemExit):
        prepare.read_setting("AUTORESEARCH_TIME_BUDGET", prepare.parse_seconds, "")


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


@pytest.fixture
def call_main(cache, monkeypatch):
    """prepare.main in this process, on the test's cache: what the command does, without three seconds of imports."""

    def call_main(*args: object) -> int:
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
        return prepare.main()

    return call_main


@pytest.fixture
def download(server, tmp_path, monkeypatch):
    """Download shards into a folder; returns {file name: bytes} of what is there afterwards."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setattr(prepare, "DOWNLOAD_ATTEMPTS", 3)
    monkeypatch.setattr(prepare, "DOWNLOAD_PAUSE_S", 0.0)
    monkeypatch.setattr(prepare, "DOWNLOAD_TIMEOUT_S", 0.3)

    def download(*names: str) -> dict[str, bytes]:
        prepare.download_shards(list(names), folder, 2)
        return contents(folder)

    download.folder = folder
    return download


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_are_downloaded_from_the_mirror_that_HF_ENDPOINT_names(server, download):
    server.files = {A: shard(1), B: shard(2)}
    assert download(A, B) == server.files
    assert sorted(server.requests) == [("GET", A, None), ("GET", B, None)]


def test_a_connection_that_is_cut_again_and_again_but_brings_bytes_is_not_given_up(server, download):
    server.files = {A: shard(1)}
    server.acts = {A: [serve(65_536)] * 3}  # as often as attempts that bring nothing may fail
    assert download(A) == server.files


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


def test_pauses_double_honour_retry_after_and_stay_below_a_minute(server, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(prepare.time, "sleep", pauses.append)  # urllib3's too
    waits = [None, None, 20, None, 3600]
    server.acts = {A: [answer(503, {"Retry-After": w} if w else {}) for w in [*waits, None]]}
    with pytest.raises(requests.RequestException, match="too many 503 error responses"):
        prepare.download_shard(A, tmp_path)
    assert pauses == [2, 20, 8, 60]
    pauses.clear()
    server.files, server.acts = {A: shard(1)}, {A: [serve(0)] * 9}
    with pytest.raises(urllib3.exceptions.HTTPError, match="IncompleteRead"):
        prepare.download_shard(A, tmp_path)
    assert pauses == [1, 2, 4, 8, 16]


def leave_part(server, download, body: bytes, num_bytes: int, **options) -> None:
    """Let a download of `body` break off for good after `num_bytes`."""
    server.files, server.acts = {A: body}, {A: [serve(num_bytes, **options), answer(404)]}
    with pytest.raises(prepare.SetupError, match="404 Client Error"):
        download(A)
    assert (download.folder / f"{A}.part").read_bytes() == body[:num_bytes]
    server.requests = []


@pytest.mark.parametrize("tag", ["ETag", "Last-Modified"])
@pytest.mark.parametrize("heeds_if_range", [True, False])
def test_a_part_of_an_older_file_of_the_same_length_is_never_continued(server, download, tag, heeds_if_range):
    old, new = shard(1), shard(2)
    assert len(old) == len(new)
    leave_part(server, download, old, 131_072, tag=tag)
    server.files, server.acts = {A: new}, {A: [serve(tag=tag, heeds_if_range=heeds_if_range)]}
    assert download(A) == {A: new}
    assert server.gets(A) == ["bytes=131072-"] + [None] * (not heeds_if_range)


@pytest.mark.parametrize("tag", ["ETag", "Last-Modified"])
def test_a_part_of_the_servers_file_is_continued_by_the_next_call(server, download, tag):
    leave_part(server, download, shard(1), 131_072, tag=tag)
    server.acts = {A: [serve(tag=tag)]}
    assert download(A) == server.files
    assert server.gets(A) == ["bytes=131072-"]


def test_a_part_that_nothing_identifies_is_not_continued_by_the_next_call(server, download):
    leave_part(server, download, shard(1), 131_072, tag=None)
    assert download(A) == server.files
    assert server.gets(A) == [None]
    (download.folder / A).rename(download.folder / f"{A}.part")  # as earlier versions left it
    assert download(A) == server.files
    assert server.gets(A) == [None, None]


@pytest.mark.parametrize("more", [b"", b"more"])
def test_a_part_that_is_as_long_as_the_file_or_longer_is_fetched_anew(server, download, more):
    body = shard(1)
    leave_part(server, download, body, 131_072)
    (download.folder / f"{A}.part").write_bytes(body + more)
    assert download(A) == server.files
    assert server.gets(A) == [f"bytes={len(body + more)}-", None]


def test_a_corrupt_file_of_the_right_length_is_never_accepted(server, download):
    server.files = {A: shard(1), B: shard(2)}
    server.acts = {A: [lambda handler, body: handler.reply(200, {"Content-Length": len(body)}, bytes(len(body)))] * 3}
    message = rf"1 of 2 shards are missing: {A} \(.*not a readable parquet.*\)\. What arrived is kept in .*data; call"
    with pytest.raises(prepare.SetupError, match=message):
        download(A, B)
    assert [*contents(download.folder)] == [f"{A}.tag", B]


def test_a_corrupt_file_is_fetched_again(server, download):
    server.files = {A: shard(1)}
    server.acts = {A: [lambda handler, body: handler.reply(200, {"Content-Length": len(body)}, bytes(len(body)))]}
    assert download(A) == server.files
    assert server.gets(A) == [None, None]


def test_a_web_page_in_place_of_the_file_is_no_shard(server, download):
    page = b"<html>please log in</html>"
    server.acts = {A: [answer(200, {"Content-Length": len(page)}, page)] * 3}
    with pytest.raises(prepare.SetupError, match=r"1 of 1 shards are missing: .* is not a readable parquet file"):
        download(A)
    assert A not in contents(download.folder)


def test_a_shard_without_the_text_column_is_no_shard(server, download):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"content": ["x"]}), buffer)
    server.files = {A: buffer.getvalue()}
    with pytest.raises(prepare.SetupError, match="has no string 'text', but content"):
        download(A)


def test_missing_shards_are_named_in_one_line_and_not_asked_for_twice(server, download, capsys):
    server.files = {B: shard(2)}
    with pytest.raises(prepare.SetupError, match=rf"2 of 3 shards are missing: {A}, {VAL} \(404 Client Error.*\)\."):
        download(A, B, VAL)
    assert server.gets(A) == server.gets(VAL) == [None]
    assert capsys.readouterr().err == ""
    assert contents(download.folder) == server.files


@pytest.mark.parametrize("num_bytes", [None, 100_000], ids=["whole", "cut"])
def test_a_file_of_unknown_length_is_checked_like_any_other(server, download, num_bytes):
    server.files = {A: shard(1)}
    server.acts = {A: [lambda handler, body: handler.reply(200, {}, body[:num_bytes])]}
    assert download(A) == server.files
    assert server.gets(A) == [None] * (1 if num_bytes is None else 2)


def test_a_shard_that_is_already_there_is_used_as_it_is_and_needs_no_server(server, download):
    (download.folder / A).write_bytes(shard(1))
    before = state_of(download.folder)
    download(A)
    assert state_of(download.folder) == before
    assert server.requests == []


def test_a_shard_that_was_cut_is_downloaded_again(server, download):
    server.files = {A: shard(1)}
    (download.folder / A).write_bytes(server.files[A][:-1000])
    assert download(A) == server.files


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("http://127.0.0.1:9", r"Failed to establish a new connection: \[Errno 111\] Connection refused"),
        ("http://nowhere.invalid", r"Failed to resolve 'nowhere\.invalid'"),
        ("mirror.example", "Invalid URL 'mirror.example/.*': No scheme supplied"),
    ],
)
def test_without_a_network_one_line_says_why_and_what_else_there_is(call_main, capsys, monkeypatch, endpoint, reason):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setattr(prepare, "DOWNLOAD_PAUSE_S", 0.0)
    assert call_main("--num-shards", 3) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert re.match(rf"error: 4 of 4 shards are missing: {A}, .*{reason}.*bring your own text \(--source", errors)


def test_the_address_is_hugging_faces_unless_HF_ENDPOINT_says_otherwise(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "")
    expected = "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main/shard_00000.parquet"
    assert prepare.shard_url(A) == expected


def test_the_real_command_names_missing_shards_exits_non_zero_and_goes_on_from_there(server, cache, call_main, capsys):
    server.files = {A: shard(1), B: shard(2)}
    failed = run_command(cache, ROOT / "prepare.py", "--num-shards", 2, HF_ENDPOINT=server.url)
    assert failed.returncode == 2
    assert failed.stderr == (
        f"error: 1 of 3 shards are missing: {VAL} (404 Client Error: Not Found for url: {server.url}/datasets/karpathy/"
        f"climbmix-400b-shuffle/resolve/main/{VAL}). What arrived is kept in {cache}/data; call again to go on, or "
        "bring your own text (--source PATH)\n"
    )
    assert sorted(contents(cache / "data")) == [A, B]
    assert not (cache / "manifest.json").exists()
    server.files[VAL], server.requests = shard(3), []
    assert call_main("--num-shards", 2) == 0
    assert server.requests == [("GET", VAL, None)]
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
    expected = {f"{A}.part": 131_072, f"{A}.tag": 66, f"{VAL}.part": 65_536, f"{VAL}.tag": 66}
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
# The real commands: own text, wrong calls, the demo
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_prepares_own_text(cache, call_main, capsys):
    with open("text.jsonl", "w") as f:  # named relative to the working folder
        f.write(jsonl(*hundred("a")) + "oops\n")
    assert call_main("--source", "text.jsonl") == 0
    out, err = capsys.readouterr()
    assert re.match(r"warning: 1 of 101 lines were left out; the first: ", err)
    manifest = prepare.load_manifest()
    assert manifest["source"] == f"{cache.parent}/work/text.jsonl"
    assert f"ready: {cache} holds {manifest['source']}, fingerprint {manifest['fingerprint']}" in out


def test_the_command_says_in_one_line_that_a_source_is_missing(call_main, capsys):
    assert call_main("--source", "nowhere") == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.match(r"error: --source nowhere: no such file or folder\n", err)


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
    assert os.listdir(cache / "demo" / "data") == ["python-library.jsonl"]
    manifest = json.loads((cache / "demo" / "manifest.json").read_text())
    counts = manifest["shards"]["python-library.jsonl"]
    assert counts["train"]["tokens"] > 1_000_000
    assert counts["val"]["tokens"] > 2**16  # the evaluation does not repeat itself
    assert f"{counts['train']['tokens']:,} training tokens" in done.stdout
    assert len(json.loads((cache / "demo/tokenizer/tokenizer.json").read_text())["tokens"]) == 1020


def test_where_python_may_not_keep_bytecode_it_is_kept_in_the_cache_and_read_at_the_next_start(tmp_path):
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    cache.mkdir()
    settings = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": str(elsewhere)}  # as if torch had none
    code = "import os, sys, prepare; print(sys.pycache_prefix, os.environ['PYTHONPYCACHEPREFIX'])"
    for _ in range(2):
        done = run_command(cache, "-v", "-c", code, **settings)
        assert done.stdout == f"{cache}/bytecode {cache}/bytecode\n"
        (kept,) = cache.glob("bytecode/**/torch/__init__.*.pyc")
        was_read = f"code object from '{kept}'" in done.stderr
    assert was_read
    assert not elsewhere.exists()
    settings["PYTHONPYCACHEPREFIX"] = f"{cache}/bytecode"  # torch has its own
    code = "import sys, prepare; print(sys.dont_write_bytecode)"
    assert run_command(cache, "-c", code, **settings).stdout == "True\n"
