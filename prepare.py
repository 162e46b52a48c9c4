"""The fixed ground truth: text, tokenizer, packed batches, the score, and the record of a run.

    uv run prepare.py                      download climbmix, train the tokenizer, encode every token once
    uv run prepare.py --source PATH        the same with your own .parquet, .jsonl, .jsonl.gz or .txt
    AUTORESEARCH_DEMO=1 uv run prepare.py  a small data set made from the Python installation itself; no network

Everything lands in the cache (AUTORESEARCH_CACHE, default ~/.cache/autoresearch; the demo uses its folder demo/):

    data/               downloaded shards, as the upstream project stores them
    tokenizer/          tokenizer.json, token_bytes.npy
    tokens/{train,val}/ NAME.bin: uint16 tokens, one document after the other; NAME.npz: where documents begin
    manifest.json       which data this is; a shard counts when it is listed here

Imported by train.py, this file also holds what an experiment has no reason to change: the loader, `evaluate_bpb`,
layer statistics, kernels and the choice of attention, the budget's clock, and the files that a run leaves in the
working folder.
"""

import argparse
import base64
import contextlib
import errno
import fcntl
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import queue
import re
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
import zlib
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.attention import SDPBackend

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a torch without CUDA: the kernels below cannot be called, and are not
    triton, tl = None, SimpleNamespace(constexpr=None)
jit = triton.jit if triton else lambda function: function

# pyarrow, requests, rustbpe and tiktoken are imported where they are used: train.py imports this file for every run.

# ---------------------------------------------------------------------------------------------------------------------
# Constants (fixed: results are comparable because nobody changes them)
# ---------------------------------------------------------------------------------------------------------------------

DEMO = os.environ.get("AUTORESEARCH_DEMO") == "1"

MAX_SEQ_LEN = 256 if DEMO else 2048  # tokens of context
TIME_BUDGET = float(os.environ.get("AUTORESEARCH_TIME_BUDGET", 30)) if DEMO else 300  # seconds of training
EVAL_TOKENS = 2**16 if DEMO else 40 * 524288  # validation tokens scored
VOCAB_SIZE = 1024 if DEMO else 8192  # tokens, the special ones included

# GPT-4's pattern, but with numbers cut into groups of two digits at most: three waste a small vocabulary.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [f"<|reserved_{i}|>" for i in range(4)]
BOS_TOKEN = SPECIAL_TOKENS[0]
TOKENIZER_MAX_CHARS = 1_000_000_000  # the tokenizer is trained on this much text at most,
TOKENIZER_DOC_CHARS = 10_000  # and on the beginning of each document

CLIMBMIX = "karpathy/climbmix-400b-shuffle"
MAX_SHARD = 6542  # the last shard, never trained on
VAL_FILENAME = f"shard_{MAX_SHARD:05d}.parquet"
HELD_OUT_SHARE = 0.05  # of the documents of a source that brings no validation shard

# ---------------------------------------------------------------------------------------------------------------------
# Paths and small helpers
# ---------------------------------------------------------------------------------------------------------------------

CACHE_DIR = Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser()
CACHE_DIR = CACHE_DIR / "demo" if DEMO else CACHE_DIR
DATA_DIR = CACHE_DIR / "data"
TOKENIZER_DIR = CACHE_DIR / "tokenizer"
TOKENS_DIR = CACHE_DIR / "tokens"
MANIFEST_PATH = CACHE_DIR / "manifest.json"
PREPARE_COMMAND = "AUTORESEARCH_DEMO=1 uv run prepare.py" if DEMO else "uv run prepare.py"

# What a run leaves in the working folder.
START_FILE = "run_start.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FILE = "checkpoint.pt"
EVAL_FILE = "eval_record.json"
SUMMARY_FILE = "run_summary.json"


class SetupError(ValueError):
    """The data, the machine or the call is at fault, not the experiment. The message says what to do."""


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write the whole file or nothing: a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(temporary, path)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as f:
        digest = hashlib.sha256()
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


PREPARE_SHA256 = sha256_file(Path(__file__))  # of the code that runs, whatever becomes of the file meanwhile


def finite_json(value: object, indent: int | None = None) -> str:
    """JSON in which NaN and infinity are null, so that any parser reads it."""

    def clean(v):
        if isinstance(v, float):
            return v if math.isfinite(v) else None
        if isinstance(v, dict):
            return {key: clean(item) for key, item in v.items()}
        return [clean(item) for item in v] if isinstance(v, list | tuple) else v

    return json.dumps(clean(value), indent=indent, allow_nan=False)


class Progress:
    """A bar with rate and time left on a terminal; elsewhere a plain line every ten seconds. Thread-safe."""

    def __init__(self, label: str, total: int, unit: str = "MB", scale: float = 1e6):
        self.label, self.total, self.unit, self.scale = label, total, unit, scale
        self.done, self.start, self.drawn = 0, time.monotonic(), time.monotonic()
        self.is_terminal, self.lock = sys.stdout.isatty(), threading.Lock()

    def add(self, amount: int) -> None:
        with self.lock:
            self.done += amount
            now = time.monotonic()
            if now - self.drawn >= (0.2 if self.is_terminal else 10):
                self.drawn = now
                self._draw(now)

    def finish(self) -> None:
        self._draw(time.monotonic())
        if self.is_terminal:
            print(flush=True)

    def _draw(self, now: float) -> None:
        seconds = max(now - self.start, 1e-9)
        rate = self.done / seconds
        share = min(self.done / self.total, 1.0) if self.total else 1.0
        left = f"{(self.total - self.done) / rate:.0f} s left" if share < 1 and rate else f"{seconds:.0f} s"
        amounts = f"{self.done / self.scale:.0f}/{self.total / self.scale:.0f} {self.unit}"
        line = f"{self.label}: {share:4.0%} {amounts}, {rate / self.scale:.1f} {self.unit}/s, {left}"
        if self.is_terminal:
            filled = round(share * 24)
            print(f"\r[{'#' * filled}{'.' * (24 - filled)}] {line}\x1b[K", end="", flush=True)
        else:
            print(line, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Download (climbmix shards from Hugging Face or a mirror)
# ---------------------------------------------------------------------------------------------------------------------


class DownloadError(Exception):
    """One attempt failed; `is_final` says that another would too."""

    def __init__(self, message: str, is_final: bool = False, retry_after_s: float = 0.0):
        super().__init__(message)
        self.is_final, self.retry_after_s = is_final, retry_after_s


def shard_name(index: int) -> str:
    return f"shard_{index:05d}.parquet"


def shard_url(name: str) -> str:
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    return f"{endpoint}/datasets/{CLIMBMIX}/resolve/main/{name}"


def check_parquet(path: Path) -> None:
    """Raise SetupError unless `path` opens as parquet and has a string column `text`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
    except (OSError, pa.ArrowException) as e:
        raise SetupError(f"{path} is not a readable parquet file ({e})") from e
    if "text" not in schema.names or not (
        pa.types.is_string(schema.field("text").type) or pa.types.is_large_string(schema.field("text").type)
    ):
        raise SetupError(f"{path} has no string column 'text'; its columns: {', '.join(schema.names)}")


def _fetch_part(url: str, part: Path, timeout_s: float, stop: threading.Event, progress: Progress) -> int:
    """Bring `part` up to the server's length in one request, going on where it ends. Returns that length."""
    import requests

    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout_s) as r:
            content_range = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", r.headers.get("Content-Range", ""))
            if r.status_code == 416:  # nothing beyond what is here: complete, or a leftover of another file
                if content_range and int(content_range[2]) == have:
                    return have
                part.unlink()
                raise DownloadError("the part on disk does not belong to this file; starting anew")
            if r.status_code == 206 and content_range and content_range[1] and int(content_range[1]) == have:
                length, mode = int(content_range[2]), "ab"
            elif r.status_code == 200 and "Content-Length" in r.headers:
                length, mode, have = int(r.headers["Content-Length"]), "wb", 0
            elif r.status_code in (200, 206):
                raise DownloadError("the server does not say how long the file is", is_final=True)
            else:
                is_final = 400 <= r.status_code < 500 and r.status_code not in (408, 425, 429)
                wait = r.headers.get("Retry-After", "")
                raise DownloadError(f"HTTP {r.status_code}", is_final, float(wait) if wait.isdigit() else 0.0)
            with open(part, mode) as f:
                for chunk in r.iter_content(1 << 16):  # what a dying connection loses is less than one of these
                    if stop.is_set():
                        raise DownloadError("interrupted", is_final=True)
                    f.write(chunk)
                    progress.add(len(chunk))
    except requests.RequestException as e:
        # A ValueError among them is a malformed URL (HF_ENDPOINT): no server will ever answer it.
        raise DownloadError(f"{type(e).__name__}: {e}", is_final=isinstance(e, ValueError)) from e
    return length


def download_shard(
    name: str,
    folder: Path,
    progress: Progress,
    stop: threading.Event,
    *,
    max_attempts: int = 6,
    pause_s: float = 1.0,
    timeout_s: float = 30.0,
) -> None:
    """Download one shard into `folder`, verified, then renamed into place. Raises DownloadError after `max_attempts`
    attempts in a row without a new byte; pauses grow from `pause_s` twofold."""
    path, part = folder / name, folder / f"{name}.part"
    attempt, most = 0, 0
    while True:
        try:
            length = _fetch_part(shard_url(name), part, timeout_s, stop, progress)
            size = part.stat().st_size
            if size < length:
                raise DownloadError(f"connection closed after {size} of {length} bytes")
            try:
                if size > length:
                    raise SetupError(f"{size} bytes, the server says {length}")
                check_parquet(part)
            except SetupError as e:
                part.unlink()
                raise DownloadError(f"damaged: {e}") from e
            os.replace(part, path)
            return
        except DownloadError as e:
            size = part.stat().st_size if part.exists() else 0
            attempt, most = (1, size) if size > most else (attempt + 1, most)
            if e.is_final or attempt >= max_attempts:
                raise
            # Held below a minute: a night's run should not sleep through a server that came back.
            stop.wait(min(max(pause_s * 2 ** (attempt - 1), e.retry_after_s), 60.0))


def _matches_server(path: Path, timeout_s: float) -> bool:
    """Whether a file from an earlier or an upstream download has the server's length. An unreachable server does
    not condemn it: a cut parquet file does not open."""
    import requests

    try:
        check_parquet(path)
        r = requests.head(
            shard_url(path.name), headers={"Accept-Encoding": "identity"}, allow_redirects=True, timeout=timeout_s
        )
    except SetupError:
        return False
    except requests.RequestException:
        return True
    known = r.status_code == 200 and "Content-Length" in r.headers
    return not known or int(r.headers["Content-Length"]) == path.stat().st_size


def download_shards(names: list[str], folder: Path, workers: int, **options: float) -> None:
    """Download the shards that are missing, in parallel. Raises SetupError naming every shard still missing.
    Interrupted at any moment, it leaves only `.part` files, which the next call continues."""
    folder.mkdir(parents=True, exist_ok=True)
    timeout_s = options.get("timeout_s", 30.0)
    with ThreadPoolExecutor(workers) as pool:
        present = [name for name in names if (folder / name).exists()]
        verdicts = pool.map(lambda name: _matches_server(folder / name, timeout_s), present)
        for name, is_good in zip(present, verdicts, strict=True):
            if not is_good:
                print(f"{name}: not the server's file; downloading it again")
                (folder / name).unlink()
    wanted = [name for name in names if not (folder / name).exists()]
    if not wanted:
        return
    print(f"downloading {len(wanted)} of {len(names)} shards from {shard_url('')}")
    stop, failed = threading.Event(), {}
    progress = Progress("download", 0)
    progress.total = len(wanted) * 90_000_000  # climbmix shards are about this long; corrected as they finish
    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(download_shard, name, folder, progress, stop, **options): name for name in wanted}
        for future in as_completed(futures):
            name = futures[future]
            try:
                future.result()
                progress.total += (folder / name).stat().st_size - 90_000_000
            except (DownloadError, OSError) as e:
                failed[name] = str(e)
                print(f"\n{name}: {e}", file=sys.stderr)
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C a thread may still wait for a silent server
    if failed:
        raise SetupError(
            f"{len(failed)} of {len(names)} shards are missing: {', '.join(sorted(failed))}. "
            f"What arrived is kept in {folder}; call again to go on"
        )
    progress.total = progress.done
    progress.finish()


# ---------------------------------------------------------------------------------------------------------------------
# Sources (any text as row groups of documents)
# ---------------------------------------------------------------------------------------------------------------------

SOURCE_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".txt")
ROW_GROUP_DOCS = 1024  # documents; for sources that have no row groups of their own


def find_source_files(source: Path) -> dict[str, Path]:
    """{name: path} of every text file at `source`, sorted by name. Raises SetupError where there is none."""
    if source.is_file() and source.name.endswith(SOURCE_SUFFIXES):
        return {source.name: source}
    if not source.exists():
        raise SetupError(f"--source {source}: no such file or folder")
    files = {
        path.relative_to(source).as_posix(): path
        for path in sorted(source.rglob("*"))
        if path.is_file() and path.name.endswith(SOURCE_SUFFIXES)
    }
    if not files:
        raise SetupError(
            f"--source {source}: looked for {', '.join(SOURCE_SUFFIXES)} and found none "
            "(parquet with a string column 'text', JSON lines with a key 'text', or plain text)"
        )
    return files


def split_text(text: str, max_chars: int) -> list[str]:
    """Cut a plain text at blank lines into documents of up to `max_chars` characters (a longer paragraph is cut
    hard). Without this a book would be one document, of which packing uses one row."""
    paragraphs = [
        p[i : i + max_chars] for p in re.split(r"(?<=\n)\s*\n", text) for i in range(0, max(len(p), 1), max_chars)
    ]
    documents, size = [[]], 0
    for paragraph in paragraphs:
        if documents[-1] and size + len(paragraph) > max_chars:
            documents.append([])
            size = 0
        documents[-1].append(paragraph)
        size += len(paragraph) + 1
    joined = ["\n".join(document) for document in documents]
    return [document for document in joined if document.strip()]


def _read_jsonl(path: Path, bad: list[str]) -> Iterator[tuple[str, int]]:
    """Yields (text, bytes of the file used so far)."""
    with open(path, "rb") as raw, gzip.open(raw) if path.name.endswith(".gz") else contextlib.nullcontext(raw) as lines:
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                except (ValueError, TypeError, KeyError, RecursionError) as e:
                    bad.append(f"{path}:{number}: {type(e).__name__}: {e}")
                    continue
                if not isinstance(text, str):
                    bad.append(f"{path}:{number}: 'text' is {type(text).__name__}, not a string")
                    continue
                yield text.encode("utf-8", "replace").decode(), raw.tell()  # lone surrogates become "?"
        except (gzip.BadGzipFile, EOFError, zlib.error) as e:
            bad.append(f"{path}:{number + 1}: {e}; the rest of the file is not used")


def read_row_groups(path: Path, bad: list[str]) -> Iterator[tuple[list[str], int]]:
    """Yields (documents, bytes of the file they took) in file order; what cannot be used is described in `bad`."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        check_parquet(path)
        with pq.ParquetFile(path) as file:
            share = path.stat().st_size // max(file.num_row_groups, 1)
            for i in range(file.num_row_groups):
                try:
                    texts = file.read_row_group(i, columns=["text"]).column("text").to_pylist()
                except (OSError, pa.ArrowException, UnicodeDecodeError) as e:
                    raise SetupError(f"{path}: row group {i} is damaged ({e}); replace or remove the file") from e
                documents = [text for text in texts if text is not None]
                bad.extend(f"{path}: row group {i}: null text" for _ in range(len(texts) - len(documents)))
                yield documents, share
    elif path.suffix == ".txt":
        documents = split_text(path.read_text("utf-8", errors="replace"), 4 * MAX_SEQ_LEN)
        for i in range(0, len(documents), ROW_GROUP_DOCS):
            group = documents[i : i + ROW_GROUP_DOCS]
            yield group, path.stat().st_size * len(group) // len(documents)
    else:
        used, rows = 0, _read_jsonl(path, bad)
        while group := list(itertools.islice(rows, ROW_GROUP_DOCS)):
            yield [text for text, _ in group], group[-1][1] - used
            used = group[-1][1]


def document_hash(text: str) -> int:
    """64 bits that depend on the text alone: the same document falls on the same side wherever it stands."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def write_demo_text(path: Path) -> None:
    """The source code and documentation of this Python installation as JSON lines, in a fixed order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3"}
    files = [f for f in sorted(library.rglob("*.py")) if not skipped & set(f.relative_to(library).parts)]
    lines = [
        json.dumps({"text": document})
        for f in files
        for document in split_text(f.read_text("utf-8", errors="replace"), 8 * MAX_SEQ_LEN)
    ]
    if not lines:
        raise SetupError(f"no Python source in {library}; use --source PATH instead")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "\n".join(lines) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def encode_pieces(encode: Callable, text: str) -> list:
    """[encode(text)]; of a text that overflows the pattern (about a million blanks in a row), that of its halves."""
    try:
        return [encode(text)]
    except ValueError:
        if len(text) < 2:
            raise
    half = len(text) // 2
    return encode_pieces(encode, text[:half]) + encode_pieces(encode, text[half:])


class Tokenizer:
    """Byte-level BPE: trained by rustbpe, run by tiktoken, stored as plain JSON. Special ids follow the merges."""

    def __init__(self, ranks: dict[bytes, int], pattern: str = SPLIT_PATTERN, special: Iterable[str] = SPECIAL_TOKENS):
        import tiktoken

        self.pattern, self.ranks = pattern, ranks
        self.special = {token: len(ranks) + i for i, token in enumerate(special)}
        self.enc = tiktoken.Encoding(
            name="auto-log-research", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special
        )

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int = VOCAB_SIZE) -> "Tokenizer":
        import rustbpe

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(documents), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        return cls({bytes(token): rank for token, rank in trainer.get_mergeable_ranks()})

    @classmethod
    def from_directory(cls, tokenizer_dir: str | Path | None = None) -> "Tokenizer":
        path = Path(tokenizer_dir or TOKENIZER_DIR) / "tokenizer.json"
        try:
            stored = json.loads(path.read_text())
        except FileNotFoundError:
            raise SetupError(f"no tokenizer at {path}: run `{PREPARE_COMMAND}` first") from None
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(stored["tokens"])}
        return cls(ranks, stored["pattern"], stored["special_tokens"])

    def save(self, tokenizer_dir: Path) -> None:
        tokenizer_dir.mkdir(parents=True, exist_ok=True)
        np.save(tokenizer_dir / "token_bytes.npy", self.token_bytes())
        tokens = [base64.b64encode(token).decode() for token in sorted(self.ranks, key=self.ranks.__getitem__)]
        stored = {"pattern": self.pattern, "special_tokens": list(self.special), "tokens": tokens}
        write_atomic(tokenizer_dir / "tokenizer.json", json.dumps(stored, indent=0))

    def token_bytes(self) -> np.ndarray:
        """int32 (vocab,): bytes of text that each token stands for, 0 for special tokens. From the raw bytes: decoded
        to a string first, a token that is no valid UTF-8 by itself would count as the 3 bytes of U+FFFD."""
        lengths = np.zeros(self.get_vocab_size(), dtype=np.int32)
        for token, rank in self.ranks.items():
            lengths[rank] = len(token)
        return lengths

    def get_vocab_size(self) -> int:
        return self.enc.n_vocab

    def get_bos_token_id(self) -> int:
        return self.special[BOS_TOKEN]

    def encode(self, text: str | list[str], prepend: int | str | None = None, num_threads: int = 8) -> list:
        """Token ids of a string, or a list of them for a list; `prepend` is a token id or a special token's name."""
        first = [] if prepend is None else [self.special[prepend] if isinstance(prepend, str) else prepend]
        if isinstance(text, str):
            # Not encode_ordinary, which panics where this raises ValueError.
            pieces = encode_pieces(lambda piece: self.enc.encode(piece, disallowed_special=()), text)
            return list(itertools.chain(first, *pieces))
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(lambda one: self.encode(one, prepend), text))

    def encode_document(self, text: str) -> np.ndarray:
        """uint16 (n,): BOS and the document's tokens. Runs outside Python's lock, so threads help."""
        pieces = encode_pieces(lambda piece: self.enc.encode_to_numpy(piece, disallowed_special=()), text)
        return np.concatenate(([self.get_bos_token_id()], *pieces)).astype(np.uint16)

    def decode(self, ids: list[int]) -> str:
        return self.enc.decode(ids)


def get_token_bytes(device: str | torch.device = "cpu") -> torch.Tensor:
    """int32 (vocab,): bytes of UTF-8 text that each token stands for; 0 for special tokens."""
    return torch.from_numpy(np.load(TOKENIZER_DIR / "token_bytes.npy", allow_pickle=False)).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Encoding (every token once, at preparation) and the manifest
# ---------------------------------------------------------------------------------------------------------------------


def load_manifest() -> dict:
    """The manifest of a complete data set, as it was when this process first asked: shards added while a run trains
    belong to the next run. Raises SetupError where preparation has not finished."""
    return _load_manifest(MANIFEST_PATH)


@functools.cache
def _load_manifest(path: Path) -> dict:
    manifest = json.loads(path.read_text()) if path.exists() else {"is_complete": False}
    if not manifest["is_complete"]:
        state = "preparation was interrupted" if "shards" in manifest else "no data"
        raise SetupError(f"{path.parent}: {state}; run `{PREPARE_COMMAND}` first")
    return manifest


def save_manifest(manifest: dict, is_complete: bool) -> None:
    manifest |= {"fingerprint": data_fingerprint(manifest), "is_complete": is_complete}
    write_atomic(MANIFEST_PATH, json.dumps(manifest, indent=1))
    _load_manifest.cache_clear()


def data_fingerprint(manifest: dict) -> str:
    """16 hex digits that stand for the data a model sees: tokenizer, shards and how they are split."""
    shards = sorted((name, shard["sha256"]) for name, shard in manifest["shards"].items())
    content = [manifest["tokenizer_sha256"], manifest["held_out_below"], shards]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def split_of(name: str, text: str, held_out_below: int | None) -> str:
    """Which split a document belongs to: by shard where there is a validation shard, else by the text's hash."""
    if held_out_below is None:
        return "val" if Path(name).name == VAL_FILENAME else "train"
    return "val" if document_hash(text) < held_out_below else "train"


def read_training_texts(files: dict[str, Path], held_out_below: int | None, progress: Progress) -> Iterator[str]:
    """The beginning of each training document, for the tokenizer."""
    num_chars = 0
    for name, path in files.items():
        for documents, num_bytes in read_row_groups(path, []):
            progress.add(num_bytes)
            for text in documents:
                if split_of(name, text, held_out_below) == "train":
                    yield text[:TOKENIZER_DOC_CHARS]
                    num_chars += min(len(text), TOKENIZER_DOC_CHARS)
                    if num_chars >= TOKENIZER_MAX_CHARS:
                        return


def choose_held_out(source: str, files: dict[str, Path]) -> int | None:
    """The bound below which a document's hash puts it into the validation split; None where a shard is that split.
    At least one document is held out, the one with the lowest hash, where no hash is below HELD_OUT_SHARE; and at
    least one is not."""
    if any(Path(name).name == VAL_FILENAME for name in files):
        return None
    lowest, highest, bad = 2**64, -1, []
    for path in files.values():
        for documents, _ in read_row_groups(path, bad):
            hashes = [document_hash(text) for text in documents]
            lowest, highest = min([lowest, *hashes]), max([highest, *hashes])
    if lowest >= highest:
        found = "one document" if lowest == highest else "no document"
        first_bad = f" ({len(bad)} bad lines, the first: {bad[0]})" if bad else ""
        raise SetupError(
            f"{source}: {found} in {len(files)} file(s){first_bad}; at least two different ones are needed, one to "
            "hold out. Looked for a string column or key 'text', or plain text"
        )
    return min(max(int(HELD_OUT_SHARE * 2**64), lowest + 1), highest)


def encode_shard(
    name: str, path: Path, tokenizer: Tokenizer, held_out_below: int | None, bad: list[str], progress: Progress
) -> dict:
    """Write the shard's token files and return {split: {"documents", "tokens"}}."""
    outputs = {split: TOKENS_DIR / split / name for split in ("train", "val")}
    lengths = {split: [] for split in outputs}  # tokens of each document
    group_sizes = {split: [] for split in outputs}  # documents of each row group: batches never cross them
    for out in outputs.values():
        out.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool, contextlib.ExitStack() as stack:
        files = {s: stack.enter_context(open(f"{out}.bin.tmp", "wb")) for s, out in outputs.items()}
        pending = []

        def write_oldest() -> None:
            futures, num_bytes = pending.pop(0)
            tally = dict.fromkeys(outputs, 0)
            for future in futures:
                for split, tokens in future.result():
                    files[split].write(tokens)
                    lengths[split].append(len(tokens))
                    tally[split] += 1
            for split, count in tally.items():
                if count:
                    group_sizes[split].append(count)
            progress.add(num_bytes)

        def encode(texts: list[str]) -> list[tuple[str, np.ndarray]]:
            return [(split_of(name, text, held_out_below), tokenizer.encode_document(text)) for text in texts]

        for documents, num_bytes in read_row_groups(path, bad):
            chunks = [documents[i : i + 16] for i in range(0, len(documents), 16)]
            pending.append(([pool.submit(encode, chunk) for chunk in chunks], num_bytes))
            if len(pending) > 4:  # row groups ahead: enough to keep every core busy, few enough to hold in memory
                write_oldest()
        while pending:
            write_oldest()
    for split, out in outputs.items():
        offsets = np.concatenate(([0], np.cumsum(lengths[split], dtype=np.int64)))
        with open(f"{out}.npz.tmp", "wb") as f:
            np.savez(f, offsets=offsets, group_sizes=np.array(group_sizes[split], dtype=np.int64))
        os.replace(f"{out}.npz.tmp", f"{out}.npz")
        os.replace(f"{out}.bin.tmp", f"{out}.bin")
    return {split: {"documents": len(n), "tokens": int(sum(n))} for split, n in lengths.items()}


def _other_cache() -> str:
    return f"use another cache (AUTORESEARCH_CACHE=FOLDER), or remove {CACHE_DIR} if you no longer need its data"


def check_same_kind(manifest: dict, source: str) -> None:
    """Raises SetupError where climbmix and somebody's own text would come into one cache."""
    if (manifest["source"] == CLIMBMIX) != (source == CLIMBMIX):
        raise SetupError(f"{CACHE_DIR} holds the data of {manifest['source']}, not {source}: {_other_cache()}")


def check_same_data(manifest: dict, source: str, files: dict[str, Path]) -> None:
    """A cache holds one data set, and it may only grow. Raises SetupError naming the first shard that differs."""
    check_same_kind(manifest, source)
    other = _other_cache()
    for name, shard in manifest["shards"].items():
        if source == CLIMBMIX and name not in files:
            continue  # its tokens are here; the parquet file is no longer needed
        if name not in files:
            raise SetupError(f"{CACHE_DIR} holds {name} of {manifest['source']}, which {source} does not have: {other}")
        if files[name].stat().st_size != shard["size"] or sha256_file(files[name]) != shard["sha256"]:
            raise SetupError(f"{CACHE_DIR} holds another {name} than {files[name]}: {other}")
    has_val_shard = any(Path(name).name == VAL_FILENAME for name in files)
    if manifest["held_out_below"] is not None and has_val_shard:
        raise SetupError(f"{CACHE_DIR} holds out single documents, and {source} now brings {VAL_FILENAME}: {other}")


def encode_source(source: str, files: dict[str, Path]) -> dict:
    """Train the tokenizer if there is none, encode every shard that the manifest does not list. Returns it."""
    if MANIFEST_PATH.exists():
        manifest = json.loads(MANIFEST_PATH.read_text())
        check_same_data(manifest, source, files)
        tokenizer = Tokenizer.from_directory()
    else:
        held_out_below = choose_held_out(source, files)
        progress = Progress("tokenizer: reading", sum(path.stat().st_size for path in files.values()))
        start = time.monotonic()
        tokenizer = Tokenizer.train(read_training_texts(files, held_out_below, progress))
        tokenizer.save(TOKENIZER_DIR)
        print(f"tokenizer: {tokenizer.get_vocab_size()} tokens, {time.monotonic() - start:.1f} s")
        manifest = {"source": source, "held_out_below": held_out_below, "shards": {}}
        manifest["tokenizer_sha256"] = sha256_file(TOKENIZER_DIR / "tokenizer.json")
    if manifest["tokenizer_sha256"] != sha256_file(TOKENIZER_DIR / "tokenizer.json"):
        raise SetupError(f"{TOKENIZER_DIR} is not the tokenizer that {TOKENS_DIR} was encoded with: remove {CACHE_DIR}")
    new = {name: path for name, path in files.items() if name not in manifest["shards"]}
    if new:
        bad, progress = [], Progress("encoding", sum(path.stat().st_size for path in new.values()))
        for name, path in new.items():
            shard = {"size": path.stat().st_size, "sha256": sha256_file(path)}
            shard |= encode_shard(name, path, tokenizer, manifest["held_out_below"], bad, progress)
            manifest["shards"][name] = shard
            # Not complete before the last shard: a run must not start on a data set that is about to grow.
            save_manifest(manifest, is_complete=False)
        progress.finish()
        if bad:
            print(f"warning: {len(bad)} bad lines were left out; the first: {bad[0]}", file=sys.stderr)
    for split in ("train", "val"):
        if not sum(shard[split]["documents"] for shard in manifest["shards"].values()):
            MANIFEST_PATH.unlink()  # nothing in it is worth keeping: the corrected source starts anew
            raise SetupError(f"{source}: no usable document for the {split} split in {len(files)} file(s)")
    save_manifest(manifest, is_complete=True)
    return manifest


# ---------------------------------------------------------------------------------------------------------------------
# Packing (best fit first, row for row what upstream packs)
# ---------------------------------------------------------------------------------------------------------------------


def pack_rows(
    batches: Iterable[tuple[list[np.ndarray], int]], num_rows: int, row_len: int, buffer_size: int = 1000
) -> Iterator[tuple[np.ndarray, int]]:
    """Pack documents into rows without padding. Yields ((num_rows, row_len) of the documents' dtype, epoch).

    `batches` yields (documents, epoch), endlessly. A row is filled with the longest buffered document that fits (the
    earliest among equals); if none fits, with the beginning of the shortest, whose rest is dropped. The buffer is
    topped up to `buffer_size` documents before every choice.

    Upstream scans its whole buffer for each choice. Here the buffer is a sorted list of integers, length above,
    countdown of arrival below, so that a bisection finds the same document: the last key of a length is its earliest.
    """
    bits = 44
    latest = (1 << bits) - 1  # arrival counts down from here
    keys: list[int] = []
    waiting: dict[int, np.ndarray] = {}
    batches, arrivals, epoch = iter(batches), 0, 1
    while True:
        pieces = []
        for _ in range(num_rows):
            space = row_len
            while space:
                while len(keys) < buffer_size:
                    documents, epoch = next(batches)
                    for document in documents:
                        key = (len(document) << bits) + latest - arrivals
                        arrivals += 1
                        insort(keys, key)
                        waiting[key] = document
                i = bisect_right(keys, (space << bits) + latest)
                if i == 0:
                    i = bisect_right(keys, keys[0] | latest)
                key = keys.pop(i - 1)
                document = waiting.pop(key)
                length = key >> bits
                if length > space:
                    pieces.append(document[:space])
                    break
                pieces.append(document)
                space -= length
        yield np.concatenate(pieces).reshape(num_rows, row_len), epoch


# ---------------------------------------------------------------------------------------------------------------------
# Loader
# ---------------------------------------------------------------------------------------------------------------------

DOC_BATCH = 128  # documents appended to the packing buffer at a time, as upstream does


def get_device() -> torch.device:
    """The GPU; in the demo the CPU will do. Raises SetupError where there is neither."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if DEMO:
        return torch.device("cpu")
    raise SetupError(
        "no CUDA GPU found (is the driver running?). To try everything on the CPU in small, set AUTORESEARCH_DEMO=1: "
        "`AUTORESEARCH_DEMO=1 uv run prepare.py && AUTORESEARCH_DEMO=1 uv run train.py`"
    )


def read_document_batches(split: str) -> Iterator[tuple[list[np.ndarray], int]]:
    """The encoded documents of a split, shard after shard in the order of their names, for ever. Yields (up to
    DOC_BATCH arrays of uint16 within one row group, epoch)."""
    shards = {name: shard[split] for name, shard in sorted(load_manifest()["shards"].items()) if shard[split]["tokens"]}
    assert shards, split
    for epoch in itertools.count(1):
        for name, counts in shards.items():
            path = TOKENS_DIR / split / f"{name}.bin"
            if not path.exists() or path.stat().st_size != 2 * counts["tokens"]:
                raise SetupError(f"{path} is missing or damaged: remove {CACHE_DIR} and run prepare.py again")
            # Small files are read: each map holds a file open, and a folder may have thousands of them.
            is_small = counts["tokens"] < 2**20
            tokens = np.fromfile(path, np.uint16) if is_small else np.asarray(np.memmap(path, np.uint16, mode="r"))
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as index:
                offsets, group_sizes = index["offsets"].tolist(), index["group_sizes"].tolist()
            first = 0
            for group_size in group_sizes:
                for i in range(first, first + group_size, DOC_BATCH):
                    last = min(i + DOC_BATCH, first + group_size)
                    yield [tokens[offsets[j] : offsets[j + 1]] for j in range(i, last)], epoch
                first += group_size


def prefetch(items: Iterable, depth: int = 4) -> Iterator:
    """Run an iterator in a thread of its own, up to `depth` items ahead. Its end and its exceptions come out here;
    closing or dropping this generator ends the thread."""
    ready, is_closed = queue.Queue(depth), threading.Event()

    def hand_over(item: object, error: BaseException | None = None) -> bool:
        while not is_closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((item, error), timeout=0.2)
                return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not hand_over(item):
                    return
        except BaseException as e:
            hand_over(None, e)
        else:
            hand_over(None, StopIteration())

    threading.Thread(target=work, daemon=True, name="prefetch").start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        is_closed.set()


def make_dataloader(
    tokenizer: Tokenizer, B: int, T: int, split: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Endless (x, y, epoch): int64 (B, T) on the training device, y is x shifted by one, epoch counts from 1.

    Rows are packed and copied to pinned memory in a thread. Each batch has a pinned buffer of its own: torch's host
    allocator hands one out again only after the copies that were queued from it have finished.
    """
    assert split in ("train", "val"), split
    device = get_device()

    def host_batches() -> Iterator[tuple[torch.Tensor, int]]:
        for rows, epoch in pack_rows(read_document_batches(split), B, T + 1):
            host = torch.empty(rows.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
            host.numpy()[:] = rows
            yield host, epoch

    batches = prefetch(host_batches())
    try:
        for host, epoch in batches:
            rows = host.to(device, non_blocking=True)
            yield rows[:, :-1].long(), rows[:, 1:].long(), epoch
    finally:
        batches.close()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------

CAUSAL_TOLERANCE = 1e-3  # nats; a causal model's losses come out the same to the last bit on the GPUs we know
_num_evaluations = 0  # in this process: a second call could mean that the first one's score was picked over


def _token_losses(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, rows: int) -> tuple[torch.Tensor, int]:
    """(B, T) losses in nats, computed `rows` rows at a time, and the number of rows that fitted into memory.

    Called with gradients enabled: a compiled model then runs the graph it was trained with, where compiling another
    would take longer than the whole evaluation.
    """
    while True:
        try:
            pairs = zip(x.split(rows), y.split(rows), strict=True)
            parts = [model(a, b, reduction="none").detach().view(-1) for a, b in pairs]
            return torch.cat(parts).view(y.shape), rows
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        rows = (rows + 1) // 2
        torch.cuda.empty_cache()
        print(f"evaluation: out of GPU memory; going on with {rows} rows at a time", flush=True)


def find_leak(losses_of: Callable, x: torch.Tensor, y: torch.Tensor, vocab_size: int) -> tuple[bool | None, str]:
    """Whether a model predicts from the past alone. `losses_of(x, y)` gives (B, T) losses in nats.

    Two tests on one batch. Each row's tokens are replaced from some position on: the losses before it must stay the
    same. And one row is scored with a different target in each copy: the probabilities of different tokens cannot sum
    to more than 1, unless the model saw which one was asked for. Returns (is_causal, what was found); is_causal is
    None where two calls on the same batch differ, so that nothing can be said.
    """
    B, T = x.shape
    losses = losses_of(x, y)
    if not (losses - losses_of(x, y)).abs().max() <= CAUSAL_TOLERANCE:
        return None, "the model's losses on one batch differ from call to call (or are NaN)"
    random = torch.Generator().manual_seed(0)
    num_passes = max(1, 8 // B)  # small batches: more passes for as many positions
    cuts = torch.linspace(1, T - 1, num_passes * B).long().view(num_passes, B, 1)
    positions = torch.arange(T)
    for cut in cuts:
        is_before = (positions < cut).to(x.device)
        shift = torch.randint(1, vocab_size, (B, T), generator=random).to(x.device)
        changed = losses_of(torch.where(is_before, x, (x + shift) % vocab_size), y)
        difference = ((changed - losses).abs() * is_before).max().item()
        if not difference <= CAUSAL_TOLERANCE:
            return False, f"changing later tokens changes earlier losses by up to {difference:.3g} nats"
    num_targets = min(max(B, 64), vocab_size)
    one_row = x[:1].expand(B, T).contiguous()
    total = torch.zeros(T, device=x.device)
    for first in range(0, num_targets, B):
        rank = torch.arange(first, first + B, device=y.device).view(B, 1)
        probabilities = losses_of(one_row, (y[:1] + rank * (vocab_size // num_targets)) % vocab_size).neg().exp()
        total += probabilities[: num_targets - first].sum(0)
    if not total.max() <= 1.01:
        total = total.max().item()
        return False, f"the probabilities of {num_targets} different targets sum to {total:.3g}: it knows its target"
    return True, ""


def evaluate_bpb(model: torch.nn.Module, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte on the validation split, the number that everything is about.

    Sum of the cross-entropy over EVAL_TOKENS targets that stand for text, in bits, over the bytes they stand for.
    `model(x, y, reduction="none")` gives the loss in nats of each of the (batch_size, MAX_SEQ_LEN) targets. Also tests
    causality and writes EVAL_FILE into the working folder. Out of GPU memory, it goes on with fewer rows at a time.
    """
    global _num_evaluations
    _num_evaluations += 1
    num_batches = EVAL_TOKENS // (batch_size * MAX_SEQ_LEN)
    if not num_batches:
        raise ValueError(f"batch_size {batch_size} x {MAX_SEQ_LEN} tokens is more than EVAL_TOKENS {EVAL_TOKENS}")
    loader = make_dataloader(tokenizer, batch_size, MAX_SEQ_LEN, "val")
    token_bytes = get_token_bytes(get_device())
    nats = torch.zeros((), dtype=torch.float64, device=token_bytes.device)
    num_bytes = torch.zeros((), dtype=torch.int64, device=token_bytes.device)
    rows = batch_size
    for i, (x, y, _) in enumerate(itertools.islice(loader, num_batches)):
        if i == 0:
            first = x, y
        losses, rows = _token_losses(model, x, y, rows)
        lengths = token_bytes[y]
        nats += losses.double().masked_fill(lengths == 0, 0.0).sum()
        num_bytes += lengths.sum()
    loader.close()
    is_causal, finding = find_leak(lambda a, b: _token_losses(model, a, b, rows)[0], *first, tokenizer.get_vocab_size())
    if not is_causal:
        verdict = "LOOKS AHEAD: this score is worth nothing" if is_causal is False else "causality could not be tested"
        print(f"\n*** {verdict}: {finding} ***\n", flush=True)
    bpb = nats.item() / (math.log(2) * num_bytes.item())
    record = {
        "val_bpb": bpb,
        "nats": nats.item(),
        "bytes": num_bytes.item(),
        "tokens": num_batches * batch_size * MAX_SEQ_LEN,
        "causal": is_causal,
        "data_fingerprint": load_manifest()["fingerprint"],
        "prepare_sha256": PREPARE_SHA256,
        "num_calls": _num_evaluations,
    }
    write_atomic(Path(EVAL_FILE), finite_json(record, indent=2) + "\n")
    return bpb


# ---------------------------------------------------------------------------------------------------------------------
# Layer and parameter statistics (for any model)
# ---------------------------------------------------------------------------------------------------------------------


def _first_tensor(value: object) -> torch.Tensor | None:
    """The floating-point tensor that a module returned or was given, alone or first in a tuple."""
    value = value[0] if isinstance(value, tuple | list) and value else value
    return value if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() else None


def _as_rows(t: torch.Tensor) -> torch.Tensor:
    """A copy (tokens, features), which no operation in place can change."""
    return t.detach().reshape(-1, t.shape[-1] if t.dim() else 1).clone()


def _activation_stats(activations: list[torch.Tensor | None]) -> list[list[float | None]]:
    """Of each (tokens, features): RMS; fraction of entries below a thousandth of it (near zero); fraction of features
    near zero on every token. Those of one shape at once: to launch a thousand small kernels would take longest."""
    alike: dict[tuple, list[int]] = {}
    for i, t in enumerate(activations):
        if t is not None:
            alike.setdefault((t.shape, t.dtype), []).append(i)
    stats: list[list[float | None]] = [[None] * 3 for _ in activations]
    for indices in alike.values():
        t = torch.stack([activations[i] for i in indices]).float()
        rms = t.square().mean((1, 2)).sqrt()
        is_zero = t.abs() <= 1e-3 * rms[:, None, None]
        zeros, dead = is_zero.mean((1, 2), dtype=torch.float32), is_zero.all(1).mean(1, dtype=torch.float32)
        for i, row in zip(indices, torch.stack((rms, zeros, dead), 1).tolist(), strict=True):
            stats[i] = _rounded(row)
    return stats


def _watched_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The blocks (members of a ModuleList) and linear layers; in a model with neither, its innermost modules."""
    modules = dict(model.named_modules())
    lists = {name for name, m in modules.items() if isinstance(m, torch.nn.ModuleList)}
    blocks = {name: m for name, m in modules.items() if name and name.rpartition(".")[0] in lists}
    linears = {name: m for name, m in modules.items() if isinstance(m, torch.nn.Linear)}
    return blocks | linears or {name: m for name, m in modules.items() if name and not any(m.children())}


@torch.no_grad()
def layer_stats(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict:
    """What the activations of a batch look like, layer by layer, from a plain forward pass outside the compiled graph.

    x, y: int64 (B, T). Returns lists that run parallel to `layers/names`: `layers/rms` and `layers/zeros` of each
    block's or linear layer's output, `layers/input_zeros` and `layers/dead` of a linear layer's input (dead: near zero
    for every token), and `logits/*` where `model(x)` returns logits. Weights and random state are left alone. A model
    that cannot be looked at this way gives `layers/error` instead: statistics must never end a run.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    seen: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def watch(name: str) -> Callable:
        def hook(module: torch.nn.Module, inputs: tuple, output: object) -> None:
            out, given = _first_tensor(output), _first_tensor(inputs)
            if out is not None and name not in seen:
                of_input = given is not None and isinstance(module, torch.nn.Linear)
                seen[name] = _as_rows(out), _as_rows(given) if of_input else None

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in _watched_modules(model).items()]
    stats, logits = {}, None
    try:
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.compiler.set_stance("force_eager"):
            try:
                logits = _first_tensor(model(x))
            except TypeError:  # a model that wants its targets
                model(x, y)
    except Exception as e:  # whatever a model unknown to us may raise
        stats["layers/error"] = f"{type(e).__name__}: {e}"[:200]
    finally:
        for handle in handles:
            handle.remove()
    of_activations = _activation_stats([t for pair in seen.values() for t in pair])
    of_outputs, of_inputs = of_activations[::2], of_activations[1::2]
    stats["layers/names"] = list(seen)
    stats["layers/rms"] = [rms for rms, _, _ in of_outputs]
    stats["layers/zeros"] = [zeros for _, zeros, _ in of_outputs]
    stats["layers/input_zeros"] = [zeros for _, zeros, _ in of_inputs]
    stats["layers/dead"] = [dead for _, _, dead in of_inputs]
    if logits is not None and logits.dim() == 3:
        logits = logits.float()
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
        values = [logits.square().mean().sqrt(), logits.abs().max(), entropy, log_p.amax(-1).exp().mean()]
        keys = ("logits/rms", "logits/max_abs", "logits/entropy", "logits/max_prob")
        stats |= dict(zip(keys, _rounded(torch.stack(values).tolist()), strict=True))
    return stats


def copy_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def parameter_stats(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> dict:
    """RMS of each parameter's gradient, weight and update, after a step and before its gradients are cleared.
    `before`: `copy_weights(model)` from before the step. Vectors of up to 64 entries are also given whole, as
    `scalars/NAME`."""
    named = {name: p for name, p in model.named_parameters() if name in before}

    def rms(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
        if not tensors:
            return {}
        norms = torch.stack(torch._foreach_norm(list(tensors.values()), dtype=torch.float32)).tolist()
        pairs = zip(norms, tensors.values(), strict=True)
        return dict(zip(tensors, _rounded([norm / max(t.numel(), 1) ** 0.5 for norm, t in pairs]), strict=True))

    of_each = {
        "params/grad_rms": rms({name: p.grad for name, p in named.items() if p.grad is not None}),
        "params/weight_rms": rms(named),
        "params/update_rms": rms({name: p - before[name] for name, p in named.items()}),
    }
    shown = {name: name.removeprefix("_orig_mod.") for name in named}
    stats = {"params/names": list(shown.values())}
    stats |= {key: [values.get(name) for name in named] for key, values in of_each.items()}
    scalars = {name: p for name, p in named.items() if p.dim() < 2 and p.numel() <= 64}
    return stats | {f"scalars/{shown[name]}": _rounded(p.flatten().tolist()) for name, p in scalars.items()}


def _rounded(values: list[float]) -> list[float]:
    """To six digits: about what single precision holds, in a third of the bytes."""
    return [float(f"{value:.6g}") for value in values]


# ---------------------------------------------------------------------------------------------------------------------
# Measurement
# ---------------------------------------------------------------------------------------------------------------------

# Peak dense bf16 rates in TFLOP/s, from the vendor's data sheets, by the name torch gives.
PEAK_BF16_TFLOPS = {
    r"(H100 80GB HBM3|H100 SXM.*|H200|H800|GH200.*)": 989.5,
    r"H100 PCIe": 756.0,
    r"(H100|H200) NVL": 835.5,
    r"A100.*": 312.0,
    r"B200": 2250.0,
    r"GB200": 2500.0,
    r"L40S": 362.05,
    r"L4": 121.0,
    r"(RTX )?A6000": 154.8,
    r"RTX 6000 Ada Generation": 364.2,
    r"RTX PRO 6000 Blackwell (Workstation|Server) Edition": 503.8,
    r"GeForce RTX 3090": 71.0,
    r"GeForce RTX 4090": 165.2,
    r"GeForce RTX 5090": 209.5,
}


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of dense bf16; None for a device that is not in the table: no MFU is better than a wrong one."""
    name = device_name.removeprefix("NVIDIA ").strip()
    if "MIG" in name:  # a slice of a GPU
        return None
    return next((tflops * 1e12 for pattern, tflops in PEAK_BF16_TFLOPS.items() if re.fullmatch(pattern, name)), None)


class Clock:
    """The clock of the budget. It runs from `start`, stands still inside `paused`, and is read once a step.

    `end_step` marks the end of a step in the GPU's queue and `read_step` waits for that mark, so that work queued in
    between keeps the GPU busy while Python reads, logs and decides.
    """

    def __init__(self, device: torch.device):
        self.device, self.is_cuda = device, device.type == "cuda"
        self.seconds = 0.0  # of training, up to the last step read
        self.step_seconds = 0.0  # of the last step read
        self.paused_seconds = 0.0
        self._pause_in_step = 0.0
        self._last = self._marked = 0.0
        self._host = None
        self._event = torch.cuda.Event() if self.is_cuda else None

    def start(self) -> None:
        self._synchronize()
        self._last = time.perf_counter()

    def end_step(self, values: list[torch.Tensor]) -> None:
        """Queue the mark, and a copy of 0-d tensors for `read_step`."""
        stacked = torch.stack([value.detach().float() for value in values])
        if not self.is_cuda:
            self._host, self._marked = stacked, time.perf_counter()
            return
        if self._host is None or self._host.shape != stacked.shape:
            self._host = torch.empty(stacked.shape, pin_memory=True)
        self._host.copy_(stacked, non_blocking=True)
        self._event.record()

    def read_step(self) -> list[float]:
        """Wait for the marked step, bring `seconds` and `step_seconds` up to its end, return the values."""
        if self.is_cuda:
            self._event.synchronize()
            self._marked = time.perf_counter()
        self.step_seconds = self._marked - self._last - self._pause_in_step
        self.seconds += self.step_seconds
        self._last, self._pause_in_step = self._marked, 0.0
        return self._host.tolist()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do something that is not training: between steps' work and their `end_step`."""
        self._synchronize()
        begin = time.perf_counter()
        yield
        self._synchronize()
        seconds = time.perf_counter() - begin
        self._pause_in_step += seconds
        self.paused_seconds += seconds

    def _synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)


# ---------------------------------------------------------------------------------------------------------------------
# The record of a run
# ---------------------------------------------------------------------------------------------------------------------


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _archive_dir() -> Path:
    return Path(os.environ.get("AUTO_LOG_RESEARCH_DIR") or ".auto-log-research").expanduser()


def _run_id(start_file: Path) -> str | None:
    try:
        start = json.loads(start_file.read_text())
    except (OSError, ValueError):
        return None
    return start.get("run_id") if isinstance(start, dict) else None


def set_aside_earlier_run() -> None:
    """Move the files of an earlier run to the archive's folder unfiled/, from which analyze.py files them; files that
    the archive already holds are deleted. A crash of the coming run can then never show an old score."""
    present = [Path(name) for name in (METRICS_FILE, EVAL_FILE, SUMMARY_FILE, CHECKPOINT_FILE, START_FILE)]
    present = [path for path in present if path.exists()]
    if not present:
        return
    run_id = _run_id(Path(START_FILE)) or "unknown-" + secrets.token_hex(4)  # an upstream train.py has no start file
    if any(_run_id(path) == run_id for path in _archive_dir().glob(f"*/{START_FILE}")):
        for path in present:
            path.unlink()
        return
    if Path(SUMMARY_FILE).exists():
        Path(CHECKPOINT_FILE).unlink(missing_ok=True)  # it was only needed until the run was scored
    folder = _archive_dir() / "unfiled" / run_id
    folder.mkdir(parents=True, exist_ok=True)
    for path in present:  # the start file last: while it is here, another call finishes the move
        if path.exists():
            shutil.move(path, folder / path.name)


def process_age_s() -> float:
    """Seconds since this process started, its imports included; 0 where the system does not tell (Linux does)."""
    try:
        started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


class Run:
    """One training run's files and figures, from its identity to its score. A context manager.

    An exception inside it ends the process with one line that says why: `crash:` and exit code 1 for a failed
    experiment, `error:` and 2 where the machine or the data is at fault. With `is_new` false, the files of the run
    that is here stay, to be scored again.
    """

    def __init__(self, script: Path, is_new: bool = True):
        age_s = process_age_s()  # start-up begins with the process, not with the end of its imports
        self.begin_unix, self.begin = time.time() - age_s, time.perf_counter() - age_s
        self.script, self.is_new = script, is_new
        self.is_terminal, self.last_shown = sys.stdout.isatty(), 0.0
        self.metrics, self.clock, self.start_record = None, None, None
        self.step, self.loss, self.loss_average = -1, math.nan, 0.0
        source = script.read_bytes()
        status = _git("status", "--porcelain", "--untracked-files=no")
        self.identity = {
            "run_id": time.strftime("%Y%m%d-%H%M%S-", time.localtime(self.begin_unix)) + secrets.token_hex(2),
            "git_commit": _git("rev-parse", "HEAD"),
            "git_dirty": None if status is None else bool(status),
            "train_sha256": hashlib.sha256(source).hexdigest(),
            "prepare_sha256": PREPARE_SHA256,
        }
        self._source = source.decode()
        own_operators = self.identity["train_sha256"] if "torch.library" in self._source else ""
        torch.compiler.config.cache_key_tag = PREPARE_SHA256 + own_operators

    def __enter__(self) -> "Run":
        try:
            if self.is_new:
                self._begin()
        except BaseException as e:
            self._report(e)
        return self

    def _begin(self) -> None:
        print(f"run {self.identity['run_id']}", flush=True)
        if "AUTORESEARCH_TIME_BUDGET" in os.environ and not DEMO:
            raise SetupError("AUTORESEARCH_TIME_BUDGET is for the demo alone (scores compare at one budget): unset it")
        set_aside_earlier_run()
        fingerprint = None
        with contextlib.suppress(SetupError):  # the run itself will say that there is no data
            fingerprint = load_manifest()["fingerprint"]
        self.start_record = self.identity | {
            "started_unix": self.begin_unix,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "train_py": self._source,
            "data_fingerprint": fingerprint,
        }
        write_atomic(Path(START_FILE), finite_json(self.start_record, indent=2) + "\n")
        self.metrics = open(METRICS_FILE, "a")  # noqa: SIM115 (closed by __exit__)

    def start_training(self, clock: Clock, step_tokens: int, facts: dict) -> None:
        """Start the clock. `facts`, the resolved configuration with `flops_per_token`, go into the summary."""
        gpu_name = torch.cuda.get_device_name(clock.device) if clock.is_cuda else None
        self.clock, self.step_tokens, self.peak_flops = clock, step_tokens, peak_flops(gpu_name or "")
        self.facts = facts | {
            "max_seq_len": MAX_SEQ_LEN,
            "time_budget": TIME_BUDGET,
            "gpu_name": gpu_name,
            "torch_version": str(torch.__version__),
            "data_fingerprint": load_manifest()["fingerprint"],
            "demo": DEMO,
        }
        clock.start()
        self.startup_seconds = time.perf_counter() - self.begin
        print(f"gpu: {gpu_name}\nstartup_seconds: {self.startup_seconds:.1f}", flush=True)

    def _mfu_percent(self, tokens_per_second: float) -> float | None:
        return 100 * self.facts["flops_per_token"] * tokens_per_second / self.peak_flops if self.peak_flops else None

    def log_step(self, step: int, loss: float, more: dict) -> None:
        """Append the step that the clock has just read to METRICS_FILE, one flushed line, and show it: live on a
        terminal, every few seconds in a file. Raises FloatingPointError on a loss that is NaN or has exploded."""
        self.step, self.loss, seconds = step, loss, self.clock.step_seconds
        self.loss_average = 0.9 * self.loss_average + 0.1 * loss
        tokens_per_second = self.step_tokens / seconds
        record = {
            "step": step,
            "train/loss": loss,
            "train/loss_smooth": self.loss_average / (1 - 0.9 ** (step + 1)),
            "train/tokens": (step + 1) * self.step_tokens,
            "perf/step_time_ms": 1000 * seconds,
            "perf/tokens_per_sec": tokens_per_second,
            "perf/mfu_percent": self._mfu_percent(tokens_per_second),
            "time/unix_s": time.time(),
            "time/training_s": self.clock.seconds,
        } | more
        self.metrics.write(finite_json(record) + "\n")
        self.metrics.flush()
        if self.is_terminal or time.monotonic() - self.last_shown >= 5.0:
            self.last_shown = time.monotonic()
            line = step_line(record)
            print(f"\r{line}\x1b[K" if self.is_terminal else line, end="" if self.is_terminal else "\n", flush=True)
        if not loss <= 100:
            raise FloatingPointError("the loss is NaN" if math.isnan(loss) else "the loss exploded")

    def end_training(self) -> dict:
        """All of the summary that is known before the score."""
        num_tokens = (self.step + 1) * self.step_tokens
        is_cuda = self.clock.is_cuda
        return {
            **self.identity,
            **self.facts,
            "training_seconds": self.clock.seconds,
            "startup_seconds": self.startup_seconds,
            "stats_seconds": self.clock.paused_seconds,
            "total_seconds": time.perf_counter() - self.begin,
            "peak_vram_mb": torch.cuda.max_memory_allocated() / 2**20 if is_cuda else None,
            "mfu_percent": self._mfu_percent(num_tokens / self.clock.seconds),
            "total_tokens_M": num_tokens / 1e6,
            "num_steps": self.step + 1,
        }

    def save_checkpoint(self, model: torch.nn.Module, summary: dict) -> None:
        """Weights and the summary so far, so that a failed evaluation never costs the run."""
        temporary = Path(f"{CHECKPOINT_FILE}.tmp")
        torch.save({"model": model.state_dict(), "summary": finite_json(summary)}, temporary)
        os.replace(temporary, CHECKPOINT_FILE)

    def load_checkpoint(self, model: torch.nn.Module) -> dict:
        """Put the checkpoint's weights into `model`; returns its summary so far. Raises SetupError where there is none,
        or where another script than this one wrote it."""
        if not Path(CHECKPOINT_FILE).exists():
            raise SetupError(f"no {CHECKPOINT_FILE} here: there is nothing to score")
        stored = torch.load(CHECKPOINT_FILE, map_location=get_device(), weights_only=True)
        summary = json.loads(stored["summary"])
        if summary["train_sha256"] != self.identity["train_sha256"]:
            raise SetupError(f"{CHECKPOINT_FILE} was written by another {self.script.name}: check that one out first")
        model.load_state_dict(stored["model"])
        return summary

    def finish(self, summary: dict, val_bpb: float, eval_seconds: float) -> None:
        """Write SUMMARY_FILE and print the closing block. Raises FloatingPointError on a score that is no number."""
        if not math.isfinite(val_bpb):
            raise FloatingPointError("val_bpb is not a number")
        # Of a run that is scored later, the time in between is no part.
        total = time.perf_counter() - self.begin if self.is_new else summary["total_seconds"] + eval_seconds
        summary = {"val_bpb": val_bpb, **summary, "eval_seconds": eval_seconds, "total_seconds": total}
        write_atomic(Path(SUMMARY_FILE), finite_json(summary, indent=2) + "\n")
        print(closing_block(summary), flush=True)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self.metrics:
            self.metrics.close()
        if error is not None:
            self._report(error)

    def _report(self, error: BaseException) -> None:
        """Say in one line why the run ended, in the log and in START_FILE, and exit."""
        if isinstance(error, SystemExit):
            raise error
        where = f"at step {self.step}, loss {self.loss:.4f}" if self.step >= 0 else "before the first step"
        print(end="\n" if self.is_terminal else "", flush=True)
        is_disk_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        is_setup = isinstance(error, SetupError | KeyboardInterrupt) or is_disk_full
        if is_setup:
            ended = f"error: {str(error) or f'interrupted {where}'}"
        else:
            ended = f"crash: {_reason(error)} {where}"
            if not isinstance(error, FloatingPointError):
                traceback.print_exception(error)
        print(ended, file=sys.stderr, flush=True)
        if self.start_record:
            with contextlib.suppress(OSError):
                write_atomic(Path(START_FILE), finite_json(self.start_record | {"ended": ended}, indent=2) + "\n")
        raise SystemExit(2 if is_setup else 1) from None


def _reason(error: BaseException) -> str:
    """One line for an exception; for memory, with what else is on the GPU."""
    if isinstance(error, torch.OutOfMemoryError):
        free, total = torch.cuda.mem_get_info()
        ours = torch.cuda.memory_reserved()
        ours, others, total = (n / 2**30 for n in (ours, max(total - free - ours, 0), total))
        return f"out of GPU memory ({ours:.1f} of {total:.1f} GiB ours, {others:.1f} GiB other processes')"
    text = str(error).strip() or "no message"
    inside = re.search(r"\bgot (\w+\(.+\))$", text, re.MULTILINE)  # what torch.compile's page of explanation is about
    first = inside[1] if inside else text.splitlines()[0]
    return str(error) if isinstance(error, FloatingPointError) else f"{type(error).__name__}: {first[:300]}"


def step_line(record: dict) -> str:
    left_s, mfu = max(TIME_BUDGET - record["time/training_s"], 0), record["perf/mfu_percent"]
    return (
        f"step {record['step']:5d} | {100 * record['time/training_s'] / TIME_BUDGET:5.1f}% | "
        f"loss {record['train/loss_smooth']:.4f} | lr x{record['train/lr_multiplier']:.2f} | "
        f"{record['perf/step_time_ms']:.0f} ms | {record['perf/tokens_per_sec'] / 1e6:.3f}M tok/s | "
        f"mfu {'unknown' if mfu is None else f'{mfu:.1f}%'} | epoch {record['train/epoch']} | {left_s:.0f} s left"
    )


def closing_block(summary: dict) -> str:
    """The block that scripts grep: `^val_bpb:` and the rest."""
    formats = {
        "val_bpb": ".6f",
        "training_seconds": ".1f",
        "total_seconds": ".1f",
        "peak_vram_mb": ".1f",
        "mfu_percent": ".2f",
        "total_tokens_M": ".1f",
        "num_steps": "d",
        "num_params_M": ".1f",
        "depth": "d",
    }
    values = {key: summary.get(key) for key in formats}
    shown = {key: "unknown" if value is None else format(value, formats[key]) for key, value in values.items()}
    return "\n".join(["---", *(f"{key + ':':<17} {value}" for key, value in shown.items())])


# ---------------------------------------------------------------------------------------------------------------------
# Kernels (for Hopper GPUs: plain mathematics with fewer trips to memory)
# ---------------------------------------------------------------------------------------------------------------------

# Nothing below changes what is computed: these are exact formulas for plain torch with fewer passes
# over memory (268 MB each at 3 TB/s, some forty a layer), which a step of this model mostly waits
# for. What a kernel does not cover goes to plain torch: a bias, a layer of another kind, other
# shapes, no rows, another GPU. Products take bf16 and add up in fp32, as under autocast; all else
# is fp32 until it is stored.
#
# Attention with a window is FlashAttention-2 (Dao 2023: arXiv:2307.08691). With p = softmax(s),
# s = q k^T / sqrt(D), and o = p v, forward goes along the keys with a running maximum and sum, and
# keeps o and l = log sum exp s. Backward takes p = exp(s - l) again, and with delta = sum(do o) over
# a head's channels
#     dv = p^T do,  ds = p (do v^T - delta),  dk = ds^T q / sqrt(D),  dq = ds k / sqrt(D).
# One kernel goes along the queries for dv and dk and keeps ds, another along the keys for dq: five
# products instead of seven, for 2 GB of memory. Tiles of 64 x 64 and four warps leave room for two
# programs on a multiprocessor, so that one's products fill the other's waits. Where queries and
# keys are normalised and rotated first, y = r R x with r = 1 / rms(x), dk and dq are led back
# before they are stored: dx = r R^T (dy - y mean(dy y)) needs x no more.
#
# The MLP is relu(h)^2 W_out^T with h = x W_in^T. The square is taken while a tile of h is in
# registers, and so is its derivative, 2 relu(h) = 2 sqrt(post): that saves five passes over the
# largest activation.
#
# The loss is the cross-entropy of z = c tanh(h / c), h = x W^T. With s = (1 - tanh(h / c)) / 2,
# z - c = -2 c s lies in [-2c, 0], so that the sum of exponentials needs no maximum, and
# dz/dh = 4 s (1 - s). One kernel reads a row of h and puts in its place what the gradient of h is
# if that of the loss is 1; what it really is comes in later as a factor a row, on tensors that are
# (rows, width) instead of (rows, vocab).

Tensor = torch.Tensor
LOG2_E = 1.4426950408889634
kernels_used: set[str] = set()  # in this process: what the log says of them is what has run

# The compiler's cache knows an operator by its name, and keeps the gradient that was registered for it at the time. So
# another prepare.py gets another cache, and so does every train.py with operators of its own (in `Run`).
torch.compiler.config.cache_key_tag = PREPARE_SHA256


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels below run here: they were written for Hopper (H100, H200) and measured there alone."""
    is_cuda = triton is not None and torch.version.cuda is not None and device.type == "cuda"
    return is_cuda and torch.cuda.is_available() and torch.cuda.get_device_properties(device).major == 9


def _is_bf16_on_gpu(x: Tensor) -> bool:
    return triton is not None and x.is_cuda and x.dtype == torch.bfloat16


def _are_plain(*linears: torch.nn.Module) -> bool:
    """Whether these modules are nothing but products with their weights."""
    kinds = all(type(linear) is torch.nn.Linear for linear in linears)
    return kinds and not any(m.bias is not None or m._forward_hooks or m._forward_pre_hooks for m in linears)


def _tiles(t: Tensor, rows: int, cols: int) -> object:
    """A matrix, or (B, T, heads, D) as (B T, heads D), in tiles for Hopper's copy engine. What sticks
    out at the edges is zero, and is not written. What the engine cannot read as it lies is copied."""
    matrix = t if t.dim() == 2 else t.flatten(2).flatten(0, 1)
    is_apart = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.size(1)
    if not is_apart or (matrix.stride(0) * matrix.element_size()) % 16 or matrix.data_ptr() % 16:
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor.from_tensor(matrix, [rows, cols])


ATTENTION_TILE = 64


@jit
def _hide(scores, i, j, m, n, window, hidden, N: tl.constexpr):
    """Set the scores of queries i and keys j, in the tile at (m, n), to `hidden` where the window ends."""
    if (n + N > m) | (m + N > n + window + 1):
        age = i - j
        scores = tl.where((age >= 0) & (age <= window), scores, hidden)
    return scores


@jit
def _attend(
    q_tiles, k_tiles, v_tiles, o_tiles, lses, T, window, scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Queries m to m + N of one head. `scale` includes log2(e): `lses` (B, H, T) are in bits."""
    m, bh = tl.program_id(0) * N, tl.program_id(1)
    row, h = bh // H * T, bh % H
    i, j, kv_col = (m + tl.arange(0, N))[:, None], tl.arange(0, N)[None, :], h // GROUP * D
    q = q_tiles.load([row + m, h * D])
    o, total = tl.zeros((N, D), tl.float32), tl.zeros((N,), tl.float32)
    peak = tl.full((N,), -1e30, tl.float32)
    for n in tl.range(tl.maximum(m - window, 0) // N * N, m + N, N):
        scores = tl.dot(q, k_tiles.load([row + n, kv_col]).T)
        scores = _hide(scores, i, n + j, m, n, window, float("-inf"), N)
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
        p = tl.math.exp2(scores * scale - new_peak[:, None])
        shrink = tl.math.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 1)
        o = tl.dot(p.to(tl.bfloat16), v_tiles.load([row + n, kv_col]), o * shrink[:, None])
        peak = new_peak
    o_tiles.store([row + m, h * D], (o / total[:, None]).to(tl.bfloat16))
    tl.store(lses + bh * T + m + tl.arange(0, N), peak + tl.math.log2(total))


@jit
def _store_gradient(dx_tiles, row, col, dy, y, factors, cos, sin, t, N: tl.constexpr, D: tl.constexpr):
    """Store the gradient (N, D) of queries or keys y at positions t; if `turn` made them, with the
    norm's `factors` (a pointer a row), that of what they were before."""
    if cos is not None:
        dy = (dy - y * (tl.sum(dy * y, 1) / D)[:, None]) * tl.load(factors)[:, None]
    left, right = tl.split(tl.permute(tl.reshape(dy, (N, 2, D // 2)), (0, 2, 1)))
    if cos is not None:
        at = t[:, None] * D + tl.arange(0, D // 2)[None, :]
        c, s = tl.load(cos + at).to(tl.float32), tl.load(sin + at).to(tl.float32)
        left, right = left * c - right * s, left * s + right * c
    dx_tiles.store([row, col], left.to(tl.bfloat16))
    dx_tiles.store([row, col + D // 2], right.to(tl.bfloat16))


@jit
def _attend_dkv(
    q_tiles, k_tiles, v_tiles, do_tiles, dqk_tiles, dv_tiles, ds_tiles, lses, deltas, k_factors, cos, sin,
    T, window, scale, log2_scale, H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values n to n + N of one KV head, from all the query heads that share
    it. Row j of dS (B H T, at least window + N) is key j's; it begins at query n."""
    KV: tl.constexpr = H // GROUP
    n, b, kv = tl.program_id(0) * N, tl.program_id(1) // KV, tl.program_id(1) % KV
    row, j = b * T, n + tl.arange(0, N)
    k, v = k_tiles.load([row + n, kv * D]), v_tiles.load([row + n, kv * D])
    dk, dv = tl.zeros((N, D), tl.float32), tl.zeros((N, D), tl.float32)
    for h in range(kv * GROUP, kv * GROUP + GROUP):
        head_row = (b * H + h) * T
        for m in tl.range(n, tl.minimum(n + tl.cdiv(N + window, N) * N, T), N):
            q, i = q_tiles.load([row + m, h * D]), m + tl.arange(0, N)
            p = tl.math.exp2(tl.dot(k, q.T) * log2_scale - tl.load(lses + head_row + i)[None, :])
            p = _hide(p, i[None, :], j[:, None], m, n, window, 0.0, N)
            do = do_tiles.load([row + m, h * D])
            dv = tl.dot(p.to(tl.bfloat16), do, dv)
            ds = (p * (tl.dot(v, do.T) - tl.load(deltas + head_row + i)[None, :])).to(tl.bfloat16)
            dk = tl.dot(ds, q, dk)
            ds_tiles.store([head_row + n, m - n], ds)
    dv_tiles.store([row + n, kv * D], dv.to(tl.bfloat16))
    factors = k_factors if cos is None else k_factors + (row + j) * KV + kv
    _store_gradient(dqk_tiles, row + n, (H + kv) * D, dk * scale, k.to(tl.float32), factors, cos, sin, j, N, D)


@jit
def _attend_dq(
    ds_tiles, q_tiles, k_tiles, dqk_tiles, q_factors, cos, sin, T, window, scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The gradient of queries m to m + N of one head, from the dS that `_attend_dkv` kept."""
    m, bh = tl.program_id(0) * N, tl.program_id(1)
    row, h, i = bh // H * T, bh % H, m + tl.arange(0, N)
    dq = tl.zeros((N, D), tl.float32)
    for n in tl.range(tl.maximum(m - window, 0) // N * N, m + N, N):
        dq = tl.dot(ds_tiles.load([bh * T + n, m - n]).T, k_tiles.load([row + n, h // GROUP * D]), dq)
    y = q_tiles.load([row + m, h * D]).to(tl.float32)
    factors = q_factors if cos is None else q_factors + (row + i) * H + h
    _store_gradient(dqk_tiles, row + m, h * D, dq * scale, y, factors, cos, sin, i, N, D)


def can_attend_window(seq_len: int, head_dim: int, device: torch.device) -> bool:
    fits = seq_len > 0 and seq_len % ATTENTION_TILE == 0 and head_dim in (64, 128)
    return fits and has_kernels(device)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RMS norm without a gain, then rotary position embedding: (x1 cos + x2 sin, x2 cos - x1 sin) of the
    two halves. The other order gives the same values, since rotation keeps the length, but is slower.
    x: (B, T, heads, D); the tables are (cos, cos) and (sin, -sin), (T, 1, D)."""
    x = torch.nn.functional.rms_norm(x, (x.size(-1),))
    return x * cos + x.roll(x.size(-1) // 2, -1) * sin


_rotations: set[tuple[int, int]] = set()  # tables known to rotate, by where they are


def _check_rotation(cos: Tensor, sin: Tensor) -> None:
    """The way back through `turn` takes for granted that it rotates. Looked at once: that waits for the GPU."""
    if (place := (cos.data_ptr(), sin.data_ptr())) in _rotations:
        return
    (c1, c2), (s1, s2) = cos.chunk(2, -1), sin.chunk(2, -1)
    error = (c1.float().square() + s1.float().square() - 1).abs().max()
    if not torch.equal(c1, c2) or not torch.equal(s1, -s2) or not error < 0.02:  # 0.008 in bf16
        raise ValueError("cos and sin are no rotation: turn q and k yourself, and attend without the tables")
    _rotations.add(place)


@torch.library.custom_op("auto_log_research::window_attention", mutates_args=())
def _window_attention(
    q: Tensor, k: Tensor, v: Tensor, turned_q: Tensor, turned_k: Tensor, q_factors: Tensor | None,
    k_factors: Tensor | None, cos: Tensor | None, sin: Tensor | None, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of `turned_q` and `turned_k`; the gradient is that of q and k, from which `turn` made them."""
    kernels_used.add("window attention")
    if cos is not None:
        _check_rotation(cos, sin)
    (B, T, H, D), N = q.shape, ATTENTION_TILE
    o, lses = q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)
    tiles, sizes = [_tiles(t, N, D) for t in (turned_q, turned_k, v, o)], [H, H // k.size(2), D, N]
    _attend[(T // N, B * H)](*tiles, lses, T, window, D**-0.5 * LOG2_E, *sizes, num_warps=4, num_stages=3)
    return o, lses


@torch.library.custom_op("auto_log_research::window_attention_backward", mutates_args=())
def _window_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lses: Tensor, deltas: Tensor, q_factors: Tensor | None,
    k_factors: Tensor | None, cos: Tensor | None, sin: Tensor | None, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of q and k side by side, as the product that both come from wants them, and of v."""
    (B, T, H, D), KV, N, scale = q.shape, k.size(2), ATTENTION_TILE, q.size(3) ** -0.5
    dqk, dv = q.new_empty((B, T, H + KV, D)), q.new_empty(v.shape)
    ds = _tiles(q.new_empty((B * H * T, triton.cdiv(N + min(window, T), N) * N)), N, N)
    q_tiles, k_tiles, v_tiles, do_tiles, dv_tiles = (_tiles(t, N, D) for t in (q, k, v, do, dv))
    dqk_tiles, given, sizes = _tiles(dqk, N, D // 2), [cos, sin, T, window, scale], [H, H // KV, D, N]
    _attend_dkv[(T // N, B * KV)](
        q_tiles, k_tiles, v_tiles, do_tiles, dqk_tiles, dv_tiles, ds, lses, deltas.contiguous(), k_factors, *given,
        scale * LOG2_E, *sizes, num_warps=4, num_stages=2,
    )  # fmt: skip
    _attend_dq[(T // N, B * H)](ds, q_tiles, k_tiles, dqk_tiles, q_factors, *given, *sizes, num_warps=4, num_stages=3)
    return dqk, dv


def _attention_context(ctx, inputs, output):
    _, _, v, turned_q, turned_k, *turning, ctx.window = inputs
    ctx.save_for_backward(turned_q, turned_k, v, *output, *turning)


def _attention_gradients(ctx, do, _):
    q, k, v, o, lses, *turning = ctx.saved_tensors
    deltas = (do.float() * o.float()).sum(-1).transpose(1, 2)  # (B, H, T)
    dqk, dv = _window_attention_backward(do, q, k, v, lses, deltas, *turning, ctx.window)
    # Cut along the width, as `project` cuts q and k from one product: the compiler leaves dqk whole.
    dq, dk = dqk.flatten(2).split([q.size(2) * q.size(3), k.size(2) * k.size(3)], dim=2)
    return dq.view(q.shape), dk.view(k.shape), dv, *[None] * 7


_window_attention.register_fake(
    lambda q, *_: (q.new_empty(q.shape), q.new_empty(q[..., 0].mT.shape, dtype=torch.float32))
)
_window_attention.register_autograd(_attention_gradients, setup_context=_attention_context)
_window_attention_backward.register_fake(
    lambda do, q, k, v, *_: (q.new_empty(torch.cat((q, k), dim=2).shape), q.new_empty(v.shape))
)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, *, window: int
) -> Tensor:
    """Causal attention in which a query sees itself and the `window` positions before it, of `turn`ed q
    and k if there are tables. q (B, T, H, D), k and v (B, T, KV, D)."""
    (B, T, H, D), KV = q.shape, k.size(2)
    fits = k.shape == v.shape == (B, T, KV, D) and H % KV == 0 and q.numel() > 0
    for table in (cos, sin):
        fits &= table is None or (table.shape == (T, 1, D) and table.is_contiguous() and not table.requires_grad)
    if not fits or not can_attend_window(T, D, q.device):
        return _turned(functools.partial(_masked_sdpa, window=window), q, k, v, cos, sin)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    if cos is None:
        return _window_attention(q, k, v, q, k, None, None, None, None, window)[0]
    turned = [turn(t.detach(), cos, sin).bfloat16() for t in (q, k)]
    eps = torch.finfo(torch.float32).eps
    factors = [torch.rsqrt(t.detach().float().square().mean(-1) + eps) for t in (q, k)]
    return _window_attention(q, k, v, *turned, *factors, cos, sin, window)[0]


MLP_TILE, MLP_TILE_K = 128, 64


@jit
def _relu2_product(
    a_tiles, b_tiles, out_tiles, post_tiles, K, IS_BACKWARD: tl.constexpr, N: tl.constexpr, N_K: tl.constexpr
):  # fmt: skip
    """One N x N tile of relu(a b^T)^2, or going backward of a b^T * 2 sqrt(post)."""
    m, n = tl.program_id(1) * N, tl.program_id(0) * N
    product = tl.zeros((N, N), tl.float32)
    for k in range(0, K, N_K):
        product = tl.dot(a_tiles.load([m, k]), b_tiles.load([n, k]).T, product)
    product = product.to(tl.bfloat16).to(tl.float32)  # rounded as a product of its own would be
    if IS_BACKWARD:
        product *= 2 * tl.sqrt(post_tiles.load([m, n]).to(tl.float32))
    else:
        product = tl.maximum(product, 0.0)
        product *= product
    out_tiles.store([m, n], product.to(tl.bfloat16))


def _relu2_launch(a: Tensor, b: Tensor, post: Tensor | None) -> Tensor:
    (M, K), N = a.shape, b.size(0)
    out = a.new_empty(M, N)
    a_tiles, b_tiles = (_tiles(t, MLP_TILE, MLP_TILE_K) for t in (a, b))
    out_tiles, post_tiles = (_tiles(t, MLP_TILE, MLP_TILE) for t in (out, out if post is None else post))
    grid = (triton.cdiv(N, MLP_TILE), triton.cdiv(M, MLP_TILE))
    sizes = [K, post is not None, MLP_TILE, MLP_TILE_K]
    _relu2_product[grid](a_tiles, b_tiles, out_tiles, post_tiles, *sizes, num_warps=4, num_stages=3)
    return out


@torch.library.custom_op("auto_log_research::relu2_mlp", mutates_args=())
def _relu2_mlp(x: Tensor, w_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
    kernels_used.add("mlp")
    post = _relu2_launch(x, w_in, None)
    return post @ w_out.T, post


@torch.library.custom_op("auto_log_research::relu2_backward", mutates_args=())
def _relu2_backward(dout: Tensor, w_out: Tensor, post: Tensor) -> Tensor:
    return _relu2_launch(dout, w_out.T, post)


def _mlp_gradients(ctx, dout, _):
    x, w_in, w_out, post = ctx.saved_tensors
    dpre = _relu2_backward(dout, w_out, post)
    return dpre @ w_in, dpre.T @ x, dout.T @ post


_relu2_mlp.register_fake(lambda x, w_in, w_out: (x.new_empty(len(x), len(w_out)), x.new_empty(len(x), len(w_in))))
_relu2_mlp.register_autograd(
    _mlp_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output[1])
)
_relu2_backward.register_fake(lambda dout, w_out, post: torch.empty_like(post))


def relu2_mlp(x: Tensor, c_in: torch.nn.Linear, c_out: torch.nn.Linear) -> Tensor:
    """c_out(relu(c_in(x)) ** 2), x: (..., width). Fused where gradients are wanted, x is bf16 on a GPU
    for which `has_kernels`, and widths are multiples of 8, as the copy engine demands."""
    fits = _are_plain(c_in, c_out)
    fits = fits and not any(width % 8 for width in (*c_in.weight.shape, *c_out.weight.shape))
    is_wanted = torch.is_grad_enabled() and x.numel() > 0 and _is_bf16_on_gpu(x)
    if not fits or not is_wanted or not has_kernels(x.device):
        return c_out(torch.nn.functional.relu(c_in(x)).square())
    out, _ = _relu2_mlp(x.reshape(-1, x.size(-1)), c_in.weight.to(x.dtype), c_out.weight.to(x.dtype))
    return out.view(*x.shape[:-1], -1)


def project(x: Tensor, *linears: torch.nn.Linear) -> list[Tensor]:
    """[linear(x) for linear in linears], in training on a GPU as a single product, which is faster."""
    if not _is_bf16_on_gpu(x) or not torch.is_grad_enabled() or not _are_plain(*linears):
        return [linear(x) for linear in linears]
    weight = torch.cat([linear.weight for linear in linears])
    widths = [linear.out_features for linear in linears]
    return list(torch.nn.functional.linear(x, weight).split(widths, dim=x.dim() - 1))


MAX_FUSED_VOCAB = 2**15  # a row of logits has to fit into registers
MAX_FUSED_CAP = 40.0  # exp(-2 cap), the least that a logit can add to the sum, has to be a number in fp32


@jit
def _one_less_tanh_half(x, scale):
    """1 / (1 + exp2(x * scale)). A root takes less time than a division."""
    root = tl.rsqrt(1 + tl.math.exp2(x * scale))
    return root * root


@jit
def _softcap_loss(logits, targets, losses, vocab, cap, BLOCK: tl.constexpr, IS_WHOLE: tl.constexpr):
    cols, to_bits = tl.arange(0, BLOCK), 2.8853900817779268  # 2 log2(e)
    row, is_inside = tl.program_id(0).to(tl.int64), (cols < vocab) | IS_WHOLE
    logits += row * vocab
    target = tl.load(targets + row)
    is_target = (target >= 0) & (target < vocab)
    target_x = tl.load(logits + target, mask=is_target, other=0.0).to(tl.float32)
    x = tl.load(logits + cols, mask=is_inside, other=0.0).to(tl.float32)
    target_s, s = _one_less_tanh_half(target_x, to_bits / cap), _one_less_tanh_half(x, to_bits / cap)
    p = tl.where(is_inside, tl.math.exp2(s * (-to_bits * cap)), 0.0)
    total = tl.sum(p)
    # Plain torch stops the program at a target that is no token. NaN ends a run as well.
    other = tl.where(target == -1, 0.0, float("nan"))
    tl.store(losses + row, tl.where(is_target, tl.log(total) + 2 * cap * target_s, other))
    share = tl.where(is_target, 4 / total, 0.0)  # the 4 is the derivative's
    gradient = p * share * (s - s * s)
    tl.store(logits + cols, gradient.to(logits.dtype.element_ty), mask=is_inside)
    # Then the target's own: to compare each column with it would take half of the registers.
    gradient = (tl.math.exp2(target_s * (-to_bits * cap)) * share - 4) * (target_s - target_s * target_s)
    tl.debug_barrier()
    tl.store(logits + target, gradient.to(logits.dtype.element_ty), mask=is_target)


@torch.library.custom_op("auto_log_research::head_loss", mutates_args=())
def _head_loss(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    kernels_used.add("loss")
    logits = x @ weight.T
    losses, vocab = x.new_empty(len(x), dtype=torch.float32), len(weight)
    block = triton.next_power_of_2(vocab)
    options = {"num_warps": max(1, min(block // 1024, 16))}
    _softcap_loss[(len(x),)](logits, targets.contiguous(), losses, vocab, cap, block, block == vocab, **options)
    return losses, logits


def _loss_gradients(ctx, dlosses, _):
    x, weight, dlogits = ctx.saved_tensors
    factor = dlosses.unsqueeze(1)
    return (dlogits @ weight * factor).to(x.dtype), dlogits.T @ (x * factor).to(x.dtype), None, None


_head_loss.register_fake(
    lambda x, weight, *_: (x.new_empty(len(x), dtype=torch.float32), x.new_empty(len(x), len(weight)))
)
_head_loss.register_autograd(
    _loss_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2], output[1])
)


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """Logits within +- cap; as they are if the cap is None, 0 or infinite."""
    return cap * torch.tanh(logits / cap) if cap and math.isfinite(cap) else logits


def softcap_loss(x: Tensor, head: torch.nn.Linear, targets: Tensor, cap: float | None) -> Tensor:
    """Cross-entropy (N,) in nats of the logits softcap(head(x), cap); 0 where the target is -1.

    x: (N, width), targets: (N,). Logits come out of the product in its own precision (bf16 under
    autocast); all that follows is fp32. Fused for bf16 on any GPU that Triton knows.
    """
    fits = _are_plain(head) and head.out_features <= MAX_FUSED_VOCAB and 0 < (cap or 0) <= MAX_FUSED_CAP
    if not fits or not x.numel() or not _is_bf16_on_gpu(x):
        logits = softcap(head(x).float(), cap)
        return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    return _head_loss(x, head.weight.to(x.dtype), targets, cap)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Attention (the fastest that is exact on the GPU at hand)
# ---------------------------------------------------------------------------------------------------------------------


def make_attention(window: int, seq_len: int, head_dim: int, device: torch.device) -> tuple[str, Callable]:
    """The fastest exact attention here: its name, and a function of q (B, T, H, D), k and v (B, T, KV, D)
    and, if q and k are to be `turn`ed before, of rotary tables.

    Causal; `window` counts the positions before the query that it sees, `seq_len` or more being all of
    them. T may be less than `seq_len`. The full context takes the first of `sdpa_order()`, which is to
    be set around the model.
    """
    if device.type != "cuda":
        name, attend = "masked sdpa", functools.partial(_masked_sdpa, window=window)
    elif window >= seq_len - 1:
        name = f"{sdpa_order()[0].name.lower().removesuffix('_attention')} full"
        attend = functools.partial(_sdpa, is_causal=True)
    elif can_attend_window(seq_len, head_dim, device):
        # With a window of 1024: this 4.2 ms, FlexAttention 5.4, FlashAttention-2 6.2.
        return "kernel window", functools.partial(window_attention, window=window)
    else:
        from torch.nn.attention.flex_attention import create_block_mask

        block_mask = create_block_mask(
            lambda b, h, q, k: (q >= k) & (q - k <= window), None, None, seq_len, seq_len, device=device
        )
        name, attend = "flex window", functools.partial(_flex, block_mask=block_mask, window=window)
    return name, functools.partial(_turned, attend)


def _turned(attend: Callable, q, k, v, cos=None, sin=None) -> Tensor:
    if cos is not None:
        q, k = turn(q, cos, sin), turn(k, cos, sin)
    return attend(q, k, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    is_grouped = q.size(1) != k.size(1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=is_grouped, **options)
    return out.transpose(1, 2)


def _masked_sdpa(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    positions = torch.arange(q.size(1), device=q.device)
    age = positions[:, None] - positions
    return _sdpa(q, k, v, attn_mask=(age >= 0) & (age <= window))


def _flex(q: Tensor, k: Tensor, v: Tensor, block_mask: object, window: int) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled, FlexAttention is slower than this; and its mask is for one length.
    if not torch.compiler.is_compiling() or block_mask.seq_lengths[0] != q.size(1):
        return _masked_sdpa(q, k, v, window)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def sdpa_order() -> list[SDPBackend]:
    """Whose scaled_dot_product_attention to take, the first that can. The full context, 128 x 2048 x 4 heads, forward
    and backward on Hopper: cuDNN 4.3 ms, FlexAttention 6.6, FlashAttention-2 7.3."""
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    is_cudnn_first = torch.cuda.get_device_capability() >= (9, 0)
    return [SDPBackend.CUDNN_ATTENTION, *order] if is_cudnn_first else order


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cache_lock() -> Iterator[None]:
    """One preparation at a time; the lock goes with the process, however it ends."""
    CACHE_DIR.mkdir(parents=True, exist_ok=True)
    with open(CACHE_DIR / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SetupError(f"another prepare.py is at work on {CACHE_DIR}; wait for it to finish") from None
        yield


def prepare(source: Path | None, num_shards: int, download_workers: int) -> dict:
    """Bring the cache up to date. Returns its manifest."""
    if source is not None:
        name = str(source.expanduser().resolve())
        return encode_source(name, find_source_files(source.expanduser()))
    if DEMO:
        path = DATA_DIR / "python.jsonl"
        if not path.exists():
            write_demo_text(path)
        return encode_source(str(path), {path.name: path})
    held = json.loads(MANIFEST_PATH.read_text()) if MANIFEST_PATH.exists() else {"source": CLIMBMIX, "shards": {}}
    check_same_kind(held, CLIMBMIX)  # before anything is downloaded
    count = MAX_SHARD if num_shards == -1 else num_shards
    names = [shard_name(i) for i in range(count)] + [VAL_FILENAME]
    download_shards([name for name in names if name not in held["shards"]], DATA_DIR, download_workers)
    # Shards beyond the wanted ones are used too, as upstream uses whatever its folder holds.
    return encode_source(CLIMBMIX, {path.name: path for path in sorted(DATA_DIR.glob("shard_*.parquet"))})


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch or bring text, train the tokenizer, encode every token once.")
    parser.add_argument("--source", type=Path, help="your own text: a file or folder of .parquet, .jsonl[.gz], .txt")
    parser.add_argument("--num-shards", type=int, default=10, help="climbmix training shards to download; -1 for all")
    parser.add_argument("--download-workers", type=int, default=8, help="shards downloaded at the same time")
    args = parser.parse_args()
    if not (args.num_shards == -1 or 1 <= args.num_shards <= MAX_SHARD) or args.download_workers < 1:
        parser.error(f"--num-shards takes -1 or 1 to {MAX_SHARD}, --download-workers at least 1")
    try:
        with cache_lock():
            manifest = prepare(args.source, args.num_shards, args.download_workers)
    except (SetupError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        sys.stdout.flush()
        print("\nerror: interrupted; call again to go on from here", file=sys.stderr, flush=True)
        os._exit(130)  # an ordinary exit would wait for download threads, and those for a silent server
    counts = {s: [shard[s] for shard in manifest["shards"].values()] for s in ("train", "val")}
    totals = {s: sum(count["tokens"] for count in shard_counts) for s, shard_counts in counts.items()}
    print(f"ready: {CACHE_DIR} holds {manifest['source']}, fingerprint {manifest['fingerprint']}")
    print(f"       {totals['train']:,} training tokens, {totals['val']:,} validation tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
