"""The fixed ground truth: text, tokenizer, packed batches, the score, and the record of a run.

    uv run prepare.py                      download climbmix, train the tokenizer, encode it once
    uv run prepare.py --source PATH        the same with your own .parquet, .jsonl, .txt (.gz, .zst)
    AUTORESEARCH_DEMO=1 uv run prepare.py  a small data set made from the Python installation

Called again, it goes on where it was interrupted, adds what is new, makes anew what is damaged.
Settings: AUTORESEARCH_CACHE (default ~/.cache/autoresearch; the demo uses its folder demo/),
HF_ENDPOINT (a mirror), AUTORESEARCH_TIME_BUDGET (demo only). In the cache: data/ (shards),
tokenizer/tokenizer.json, manifest.json (what is complete, with checksums), and
tokens/{train,val}/NAME.bin (uint16) and .npz (where documents begin); bytecode/, if Python may
not keep what it compiles where it belongs.

What train.py imports, for B rows of T tokens:

    MAX_SEQ_LEN, DEMO, SEED_OFFSET    tokens of context; whether it is the demo; to add to the seed
    Tokenizer.from_directory()        .encode(text or list), .decode(ids), .get_vocab_size()
    get_device()                      the GPU; in the demo the CPU will do
    make_dataloader(tokenizer, B, T, "train")  endless (x, y, epoch): int64 (B, T), y one ahead of x
    evaluate_bpb(model, tokenizer, B) the score, bits per byte, from nats of each validation target,
                                      model(x, y, reduction="none"), checked with logits, model(x)
    rehearse_evaluation(model, x, y)  scores one batch: ValueError for a model that cannot be scored
    Run, end_children()               a run's files, clock and log; kills processes it has started
    layer_stats(model, x, y), copy_weights(model), parameter_stats(model, before)  for any model
    measure_step(gradients, update, num_micro_steps, device)  ms of a step by kind of kernel
    make_attention(window, T, head_dim, device)  (name, attend(q, k, v, cos=None, sin=None)), causal
                                      over the query and the `window` positions before it; q (B, T, H,
                                      head_dim), k, v (B, T, KV, head_dim); with rotary tables, of q
                                      and k normed and turned
    sdpa_order(), kernels_used        for sdpa_kernel; names of the kernels below that took part
    project(attend, x, c_q, c_k, c_v, head_dim, cos, sin)  v = c_v(x), and as a function of v, changed
                                      or not, attend(c_q(x), c_k(x), v, cos, sin)
    relu2_mlp(x, c_in, c_out)         c_out(relu(c_in(x)) ** 2) of two linear layers
    softcap(logits, cap)              cap * tanh(logits / cap); the logits where cap is None
    softcap_loss(x, head, targets, cap)  nats (N,) of targets (N,) under softcap(head(x), cap); 0 for -1
"""

import argparse
import ast
import base64
import codecs
import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO, TextIO

CACHE_DIR = Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser()


def keep_bytecode() -> None:
    """Let Python keep in the cache what it makes of the sources it imports, where it may not keep
    that beside them. To compile torch's anew takes several seconds of each start."""
    found = importlib.util.find_spec("torch")
    if found is None or Path(found.cached).exists():  # without torch, its import says so
        return
    if sys.dont_write_bytecode or not os.access(Path(found.origin).parent, os.W_OK):
        sys.dont_write_bytecode, sys.pycache_prefix = False, str(CACHE_DIR.absolute() / "bytecode")
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix  # for the compiler's processes
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


keep_bytecode()

import numpy as np
import tiktoken
import torch
from torch.nn.attention import SDPBackend

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a torch without CUDA: the kernels below cannot be called, and are not
    triton, tl = None, SimpleNamespace(constexpr=None)
try:  # experimental: another Triton does without
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
except ImportError:
    gluon, gl = None, SimpleNamespace(constexpr=None)
jit = triton.jit if triton else lambda function: function
gluon_jit = gluon.jit if gluon else jit

# pyarrow, requests and rustbpe are imported where they are used: every run imports this file.

# -------------------------------------------------------------------------------------------------
# Constants (fixed: results are comparable because nobody changes them) and small helpers
# -------------------------------------------------------------------------------------------------


def read_setting(name: str, parse: Callable, wanted: str) -> object:
    """An environment variable, or None; one that cannot be read ends the process in one line."""
    value = os.environ.get(name, "").strip().lower()
    try:
        return parse(value) if value else None
    except (ValueError, KeyError, AssertionError):
        sys.stderr.write(f"error: {name}={value}: give {wanted}\n")
        sys.exit(2)


def parse_seconds(value: str) -> float:
    assert 0 < float(value) < math.inf, value
    return float(value)


SETTINGS = ("CACHE", "DEMO", "SEED_OFFSET", "TIME_BUDGET")
SWITCH = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
DEMO = bool(read_setting("AUTORESEARCH_DEMO", SWITCH.__getitem__, "1 for the demo, 0 or nothing for a real run"))
DEMO_BUDGET = read_setting("AUTORESEARCH_TIME_BUDGET", parse_seconds, "seconds of training, such as 30")
SEED_OFFSET = read_setting("AUTORESEARCH_SEED_OFFSET", int, "a whole number, such as 1") or 0

for name in os.environ:  # a slip of the keyboard would train all night with the default
    if name.startswith("AUTORESEARCH_") and name.removeprefix("AUTORESEARCH_") not in SETTINGS:
        sys.stderr.write(f"error: {name} is no setting; AUTORESEARCH_ goes on with {', '.join(SETTINGS)}\n")
        sys.exit(2)

MAX_SEQ_LEN = 256 if DEMO else 2048  # tokens of context
TIME_BUDGET = (DEMO_BUDGET or 30.0) if DEMO else 300  # seconds of training
EVAL_TOKENS = 2**16 if DEMO else 40 * 524288  # validation tokens scored
VOCAB_SIZE = 1024 if DEMO else 8192  # tokens, the special ones included

# GPT-4's pattern, but with groups of two digits at most: three waste a small vocabulary.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ["<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>"]
BOS_TOKEN = SPECIAL_TOKENS[0]
TOKENIZER_MAX_CHARS = 1_000_000_000  # the tokenizer is trained on this much text at most,
TOKENIZER_DOC_CHARS = 10_000  # and on the beginning of each document

CLIMBMIX = "karpathy/climbmix-400b-shuffle"
MAX_SHARD = 6542  # the last shard, never trained on
VAL_FILENAME = f"shard_{MAX_SHARD:05d}.parquet"
HELD_OUT_SHARE = 0.05  # of the documents of a source that brings no validation shard
SPLITS = ("train", "val")

CACHE_DIR = CACHE_DIR / "demo" if DEMO else CACHE_DIR
DATA_DIR = CACHE_DIR / "data"
TOKENIZER_DIR = CACHE_DIR / "tokenizer"
TOKENS_DIR = CACHE_DIR / "tokens"
MANIFEST_PATH = CACHE_DIR / "manifest.json"

# What a run leaves in the working folder.
START_FILE = "run_start.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FILE = "checkpoint.pt"
EVAL_FILE = "eval_record.json"
SUMMARY_FILE = "run_summary.json"

PREPARE_SOURCE = Path(__file__).read_bytes()  # of the code that runs
PREPARE_SHA256 = hashlib.sha256(PREPARE_SOURCE).hexdigest()


class SetupError(ValueError):
    """The data, the machine or the call is at fault, not the experiment."""


@contextlib.contextmanager
def open_atomic(path: Path, is_synced: bool = True) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is whole, whatever reads meanwhile or cuts the power."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if is_synced:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    with open_atomic(path) as file:
        file.write(text.encode())


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def finite_json(value: object, indent: int | None = None) -> str:
    """JSON that any parser reads: NaN and infinity are null, what JSON lacks is text."""
    text = json.dumps(value, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v))
    return json.dumps(json.loads(text, parse_constant=lambda name: None), indent=indent)


def read_json(path: Path) -> dict:
    """{} where there is nothing, or nothing readable."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


# -------------------------------------------------------------------------------------------------
# Download (climbmix shards from Hugging Face or a mirror)
# -------------------------------------------------------------------------------------------------

DOWNLOAD_ATTEMPTS = 6
DOWNLOAD_PAUSE_S = 1.0  # between them, doubled each time
DOWNLOAD_TIMEOUT_S = 30.0  # of silence


def shard_url(name: str) -> str:
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    return f"{endpoint}/datasets/{CLIMBMIX}/resolve/main/{name}"


def fetch_part(session, part: Path, tag_path: Path) -> None:
    """Bring `part` to its whole length in one request, from where it ends if it is the server's by its tag."""
    tag = tag_path.read_text() if tag_path.exists() else ""
    headers = {"Accept-Encoding": "identity"}
    if tag and part.exists():
        headers |= {"Range": f"bytes={part.stat().st_size}-", "If-Range": tag}
    with session.get(shard_url(part.stem), headers=headers, stream=True, timeout=DOWNLOAD_TIMEOUT_S) as r:
        new_tag = r.headers.get("ETag") or r.headers.get("Last-Modified") or ""
        if r.status_code == 416 or (r.status_code == 206 and new_tag != tag):
            raise SetupError("what was here is not the beginning of the server's file")
        r.raise_for_status()
        with open(part, "ab" if r.status_code == 206 else "wb") as f:
            tag_path.write_text(new_tag)  # only once nothing of another file is left
            for chunk in r.raw.stream(1 << 16, decode_content=True):  # a dying connection loses less than one
                f.write(chunk)


def download_shard(name: str, folder: Path) -> None:
    """Download a shard that is missing or damaged: into a part, which is verified, then renamed."""
    import requests
    import urllib3

    with contextlib.suppress(SetupError):
        return check_parquet(folder / name)  # a file that was cut does not open
    part, tag_path, session = folder / f"{name}.part", folder / f"{name}.tag", requests.Session()
    retry = urllib3.Retry(  # where no answer begins or the server is busy
        DOWNLOAD_ATTEMPTS - 1,
        connect=2,  # no connection at all: the network is missing, or the address wrong
        status_forcelist=(408, 425, 429, 500, 502, 503, 504),
        backoff_factor=DOWNLOAD_PAUSE_S,
        retry_after_max=60,  # seconds, whatever the server asks for
    )
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it would announce every attempt
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
    attempt, most = 0, 0  # in a row without more bytes than there have been before
    while True:
        try:
            fetch_part(session, part, tag_path)
            check_parquet(part)
            os.replace(part, folder / name)
            return tag_path.unlink()
        except (SetupError, urllib3.exceptions.HTTPError) as e:  # another file, or a connection that broke off
            if isinstance(e, SetupError):
                part.unlink()
            size = part.stat().st_size if part.exists() else 0
            attempt = 1 if size > most else attempt + 1
            most = max(most, size)
            if attempt == DOWNLOAD_ATTEMPTS:
                raise
        time.sleep(DOWNLOAD_PAUSE_S * 2 ** (attempt - 1))


def download_shards(names: list[str], folder: Path, workers: int) -> None:
    """Download shards in parallel. Raises SetupError naming every one still missing."""
    folder.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(workers)  # not as a context: that would wait for a silent server
    futures = {name: pool.submit(download_shard, name, folder) for name in names}
    while (state := wait(futures.values(), timeout=5)).not_done:
        with contextlib.suppress(FileNotFoundError):  # a part that was renamed meanwhile
            mb = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
            print(f"download: {len(state.done)} of {len(names)} shards, {mb:.0f} MB", flush=True)
    failed = {name: future.exception() for name, future in futures.items() if future.exception()}
    if failed:
        missing = f"{len(failed)} of {len(names)} shards are missing: {', '.join(failed)} ({failed[min(failed)]})"
        remedy = "call again to go on, or bring your own text (--source PATH)"
        raise SetupError(f"{missing}. What arrived is kept in {folder}; {remedy}")


# -------------------------------------------------------------------------------------------------
# Sources (any text as row groups of documents)
# -------------------------------------------------------------------------------------------------

TXT_SUFFIXES = (".txt", ".txt.gz", ".txt.zst")
SOURCE_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", *TXT_SUFFIXES)


def find_source_files(source: Path) -> dict[str, Path]:
    """{name: path} of every text file at `source`, sorted by name; says what is not used."""
    if not source.exists():
        raise SetupError(f"--source {source}: no such file or folder")
    folder, paths = source, [path for path in sorted(source.rglob("*")) if path.is_file()]
    if source.is_file():
        folder, paths = source.parent, [source]
    files, unused = {}, []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if name.lower().endswith(SOURCE_SUFFIXES) and not re.search(r"(^|/)(\.|__MACOSX/)", name):  # hidden
            files[name] = path
        else:
            unused.append(name)
    shown = ", ".join(unused[:5]) or "nothing"
    if not files:
        raise SetupError(f"--source {source}: looked for {', '.join(SOURCE_SUFFIXES)} and found {shown}")
    if unused:
        print(f"warning: {len(unused)} of {len(paths)} files in {source} are not used: {shown}", file=sys.stderr)
    return files


def check_parquet(path: Path, text_key: str = "text") -> None:
    """Raise SetupError unless `path` opens as parquet and has a string column `text_key`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as e:
        raise SetupError(f"{path} is not a readable parquet file ({e})") from e
    strings = [field.name for field in schema if field.type in (pa.string(), pa.large_string())]
    if text_key not in strings:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise SetupError(f"{path} has no string {text_key!r}, but {columns}. --text-key NAME chooses another")


def split_text(text: str, max_chars: int) -> list[str]:
    """Cut a text at blank lines into documents of up to `max_chars`: of a whole book packing would use one row."""
    documents: list[str] = []
    for paragraph in re.split(r"(?<=\n)\s*\n", text):
        for i in range(0, max(len(paragraph), 1), max_chars):
            piece = paragraph[i : i + max_chars]
            if documents and len(documents[-1]) + 1 + len(piece) <= max_chars:
                documents[-1] += "\n" + piece
            else:
                documents.append(piece)
    return [document for document in documents if document.strip()]


def read_jsonl(path: Path, lines: Iterable[bytes], bad: list[str], text_key: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
                raise ValueError(f"no string {text_key!r} in {str(record)[:200]}. --text-key NAME chooses another")
        except (ValueError, RecursionError) as e:
            bad.append(f"{path}:{number}: {e}")
        else:
            yield record[text_key].encode("utf-8", "replace").decode()  # lone surrogates become "?"


def read_txt(stream: io.BufferedReader) -> str:
    """UTF-8, or UTF-16 with its mark. Raises UnicodeError for anything else."""
    is_utf16 = stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    text = io.TextIOWrapper(stream, "utf-16" if is_utf16 else "utf-8-sig").read()
    if "\0" in text:
        line = text.partition("\0")[0].count("\n") + 1
        raise UnicodeError(f"a NUL in line {line}")
    return text


def read_row_groups(path: Path, bad: list[str], text_key: str = "text") -> Iterator[list[str]]:
    """Row groups of documents in file order. What cannot be used is described in `bad`; damage is a SetupError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name, compression = path.name.lower(), {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    try:
        if name.endswith(".parquet"):
            check_parquet(path, text_key)
            file = pq.ParquetFile(path)
            for i in range(file.num_row_groups):
                texts = file.read_row_group(i, columns=[text_key])[text_key].to_pylist()
                bad.extend([f"{path}: row group {i}: null text"] * texts.count(None))
                yield [text for text in texts if text is not None]
            return
        with io.BufferedReader(pa.input_stream(str(path), compression), 1 << 20) as stream:
            documents = read_jsonl(path, stream, bad, text_key)
            if name.endswith(TXT_SUFFIXES):
                documents = iter(split_text(read_txt(stream), 4 * MAX_SEQ_LEN))
            while group := list(itertools.islice(documents, 1024)):
                yield group
    except (OSError, pa.ArrowException, UnicodeError) as e:
        remedy = "replace it, convert it (`iconv -f LATIN1 -t UTF-8 OLD > NEW`, or -f UTF-16LE), or remove it"
        raise SetupError(f"{path} is damaged or no UTF-8 ({e}): {remedy}") from e


def document_hash(text: str) -> int:
    """64 bits of the text alone: a document falls on the same side wherever it stands."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def write_demo_text(path: Path) -> None:
    """The source of this Python's library as JSON lines, cut so short that most fit a row, and shuffled by
    hash: in the order of names the score would depend on the module at which training stops."""
    library, documents = Path(os.__file__).parent, []
    skipped = {"site-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3"}
    for file in sorted(library.rglob("*.py")):
        if not skipped & set(file.relative_to(library).parts):
            documents += split_text(file.read_text("utf-8", errors="replace"), 2 * MAX_SEQ_LEN)
    lines = [json.dumps({"text": document}) for document in sorted(documents, key=document_hash)]
    write_atomic(path, "\n".join(lines) + "\n")


# -------------------------------------------------------------------------------------------------
# Tokenizer
# -------------------------------------------------------------------------------------------------


def encode_pieces(enc: tiktoken.Encoding, text: str) -> list[np.ndarray]:
    """The tokens of a text; of its halves where it overflows the pattern (a million blanks)."""
    try:
        return [enc.encode_to_numpy(text, disallowed_special=())]  # others panic, not raise
    except ValueError:
        half = len(text) // 2
        return encode_pieces(enc, text[:half]) + encode_pieces(enc, text[half:])


class Tokenizer:
    """Byte-level BPE, trained by rustbpe, run by tiktoken, kept as JSON. Special ids come last."""

    def __init__(self, tokens: list[bytes], pattern: str = SPLIT_PATTERN, special: Iterable[str] = SPECIAL_TOKENS):
        self.pattern = pattern
        self.ranks = {token: rank for rank, token in enumerate(tokens)}
        self.special = {token: len(tokens) + i for i, token in enumerate(special)}
        self.enc = tiktoken.Encoding(
            "auto-log-research", pat_str=pattern, mergeable_ranks=self.ranks, special_tokens=self.special
        )

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int = VOCAB_SIZE) -> "Tokenizer":
        import rustbpe

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(documents), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        return cls(sorted(ranks, key=ranks.get))

    @classmethod
    def from_directory(cls, tokenizer_dir: str | Path | None = None) -> "Tokenizer":
        path = Path(tokenizer_dir or TOKENIZER_DIR) / "tokenizer.json"
        try:
            stored = json.loads(path.read_bytes())
            return cls([*map(base64.b64decode, stored["tokens"])], stored["pattern"], stored["special_tokens"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            raise SetupError(f"no tokenizer at {path} ({e}): {REMEDY}") from e

    def save(self, tokenizer_dir: Path) -> None:
        tokens = [base64.b64encode(token).decode() for token in self.ranks]
        stored = {"pattern": self.pattern, "special_tokens": list(self.special), "tokens": tokens}
        write_atomic(tokenizer_dir / "tokenizer.json", json.dumps(stored, indent=0))

    def get_vocab_size(self) -> int:
        return self.enc.n_vocab

    def get_bos_token_id(self) -> int:
        return self.special[BOS_TOKEN]

    def encode(self, text: str | list[str], prepend: int | str | None = None, num_threads: int = 8) -> list:
        """Ids of a string or of a list of them; `prepend`: a token id or a special token's name."""
        if isinstance(text, list):
            with ThreadPoolExecutor(num_threads) as pool:
                return list(pool.map(lambda one: self.encode(one, prepend), text))
        ids = np.concatenate(encode_pieces(self.enc, text)).tolist()
        if prepend is None:
            return ids
        return [self.special[prepend] if isinstance(prepend, str) else prepend, *ids]

    def encode_document(self, text: str) -> np.ndarray:
        """uint16 (n,): BOS and the document's tokens. Outside Python's lock, so threads help."""
        return np.concatenate(([self.get_bos_token_id()], *encode_pieces(self.enc, text))).astype(np.uint16)

    def decode(self, ids: list[int]) -> str:
        return self.enc.decode(ids)


def get_token_bytes(device: str | torch.device = "cpu") -> torch.Tensor:
    """int32 (V,): raw bytes that each token stands for, 0 for special ones."""
    tokenizer = Tokenizer.from_directory()
    lengths = [*map(len, tokenizer.ranks), *[0] * len(tokenizer.special)]
    return torch.tensor(lengths, dtype=torch.int32, device=device)


# -------------------------------------------------------------------------------------------------
# Encoding (every token once) and the manifest (which data this is, and that it is whole)
# -------------------------------------------------------------------------------------------------

COMMAND = "AUTORESEARCH_DEMO=1 uv run prepare.py" if DEMO else "uv run prepare.py"
REMEDY = f"run `{COMMAND}` first or again (with its --source): it mends what is damaged"


def checksum(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_manifest() -> dict:
    """The manifest; {} where there is none, or it or the tokenizer is not what was written."""
    manifest, tokenizer = read_json(MANIFEST_PATH), TOKENIZER_DIR / "tokenizer.json"
    if manifest.pop("checksum", None) != checksum(manifest) or not tokenizer.exists():
        return {}
    return manifest if manifest["tokenizer_sha256"] == sha256_file(tokenizer) else {}


def save_manifest(manifest: dict, is_complete: bool) -> None:
    """Add the fingerprint, which stands for the data a model sees, and write the manifest."""
    shards = sorted((name, shard["sha256"]) for name, shard in manifest["shards"].items())
    content = [manifest["tokenizer_sha256"], manifest["held_out_below"], shards]
    content += [manifest["text_key"]] if manifest["text_key"] != "text" else []
    manifest |= {"fingerprint": checksum(content)[:16], "is_complete": is_complete}
    write_atomic(MANIFEST_PATH, json.dumps(manifest | {"checksum": checksum(manifest)}, indent=1))
    load_manifest.cache_clear()


def token_files(name: str) -> list[Path]:
    return [TOKENS_DIR / split / f"{name}.{kind}" for split in SPLITS for kind in ("bin", "npz")]


@functools.cache
def load_manifest() -> dict:
    """The manifest of a complete data set, as it was when this process first asked. What the token
    files hold is checked as they are read."""
    manifest = read_manifest()
    if not manifest.get("is_complete"):
        raise SetupError(f"{CACHE_DIR}: no data that are complete and undamaged; {REMEDY}")
    for name, shard in manifest["shards"].items():
        for split in SPLITS:
            tokens = TOKENS_DIR / split / f"{name}.bin"
            if not tokens.exists() or tokens.stat().st_size != 2 * shard[split]["tokens"]:
                raise SetupError(f"{tokens} is missing or damaged: {REMEDY}")
    return manifest


def num_tokens(manifest: dict, split: str) -> int:
    return sum(shard[split]["tokens"] for shard in manifest["shards"].values())


def is_intact(name: str, shard: dict | None) -> bool:
    """Whether a shard's token files are what was written; reads them at 1.2 GB/s."""
    files = [file for file in token_files(name) if file.exists()]
    return shard is not None and [*map(sha256_file, files)] == shard.get("files")


def check_same_data(manifest: dict, source: str, files: dict[str, Path], text_key: str = "text") -> None:
    """A cache holds one data set, and it may only grow. Raises SetupError naming what differs."""
    held, found = manifest["source"], []
    if held != source and CLIMBMIX in (held, source):
        found.append(f"the data of {held}, not {source}")
    if manifest["text_key"] != text_key:
        found.append(f"the texts of {manifest['text_key']!r}, not {text_key!r}")
    if manifest["held_out_below"] is not None and VAL_FILENAME in map(os.path.basename, files):
        found.append(f"single documents held out, and {source} now brings {VAL_FILENAME}")
    for name, shard in manifest["shards"].items():
        if name not in files and source != CLIMBMIX:  # there, tokens are enough
            found.append(f"{name} of {held}, which {source} does not have")
        elif name in files and sha256_file(files[name]) != shard["sha256"]:
            found.append(f"another {name} than {files[name]}")
    if found:
        remedy = f"use another cache (AUTORESEARCH_CACHE=FOLDER), or remove {CACHE_DIR}"
        raise SetupError(f"{CACHE_DIR} holds {found[0]}: {remedy} if you no longer need its data")


def split_of(name: str, text: str, held_out_below: int | None) -> str:
    """A document's split: by shard where there is a validation shard, else by its hash."""
    is_val = os.path.basename(name) == VAL_FILENAME
    if held_out_below is not None:
        is_val = document_hash(text) < held_out_below
    return "val" if is_val else "train"


def read_training_texts(files: dict[str, Path], manifest: dict) -> Iterator[str]:
    """The beginning of each training document, for the tokenizer."""
    num_chars = 0
    for name, path in files.items():
        for text in itertools.chain.from_iterable(read_row_groups(path, [], manifest["text_key"])):
            if num_chars >= TOKENIZER_MAX_CHARS:
                return
            if split_of(name, text, manifest["held_out_below"]) == "train":
                yield text[:TOKENIZER_DOC_CHARS]
                num_chars += min(len(text), TOKENIZER_DOC_CHARS)


def encode_shard(name: str, path: Path, tokenizer: Tokenizer, manifest: dict) -> dict:
    """Write the shard's token files, in one pass. Returns what the manifest says about it."""
    bad: list[str] = []
    shard = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    lengths: dict[str, list[list[int]]] = {split: [] for split in SPLITS}  # of the documents of each row group
    with ThreadPoolExecutor(os.cpu_count()) as pool, contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(open_atomic(TOKENS_DIR / split / f"{name}.bin")) for split in SPLITS}
        for texts in prefetch(read_row_groups(path, bad, manifest["text_key"])):
            groups = {split: [] for split in SPLITS}
            for text, tokens in zip(texts, pool.map(tokenizer.encode_document, texts), strict=True):
                groups[split_of(name, text, manifest["held_out_below"])].append(tokens)
            for split, documents in groups.items():
                if documents:
                    files[split].write(np.concatenate(documents))
                    lengths[split].append([len(tokens) for tokens in documents])
    for split in SPLITS:
        offsets = np.cumsum([0, *itertools.chain(*lengths[split])], dtype=np.int64)
        group_sizes = np.array([len(group) for group in lengths[split]], dtype=np.int64)
        with open_atomic(TOKENS_DIR / split / f"{name}.npz") as file:
            np.savez(file, offsets=offsets, group_sizes=group_sizes)
        shard[split] = {"documents": len(offsets) - 1, "tokens": int(offsets[-1])}
    return shard | {"files": [*map(sha256_file, token_files(name))], "bad": len(bad), "first_bad": bad[:1]}


def encode_source(source: str, files: dict[str, Path], text_key: str = "text") -> dict:
    """Train the tokenizer if there is none, encode every shard that is not yet. Returns the manifest."""
    manifest = read_manifest()
    if manifest:
        check_same_data(manifest, source, files, text_key)
    else:
        has_val_shard = VAL_FILENAME in map(os.path.basename, files)
        manifest = {"source": source, "text_key": text_key, "shards": {}}
        manifest["held_out_below"] = None if has_val_shard else int(HELD_OUT_SHARE * 2**64)
        print("training the tokenizer", flush=True)
        Tokenizer.train(read_training_texts(files, manifest)).save(TOKENIZER_DIR)
        manifest["tokenizer_sha256"] = sha256_file(TOKENIZER_DIR / "tokenizer.json")
    shards, tokenizer = manifest["shards"], Tokenizer.from_directory()
    new = {name: path for name, path in files.items() if not is_intact(name, shards.get(name))}
    for number, (name, path) in enumerate(new.items(), 1):
        print(f"encoding {number} of {len(new)}: {name}", flush=True)
        save_manifest(manifest, is_complete=False)  # no run starts on data about to change
        shards[name] = encode_shard(name, path, tokenizer, manifest)
    for split in SPLITS:
        if not num_tokens(manifest, split):
            MANIFEST_PATH.unlink()  # the corrected source starts anew
            bad = [line for shard in shards.values() for line in shard["first_bad"]]
            reason = f"the first bad line: {bad[0]}" if bad else "bring more text"
            raise SetupError(f"{source}: no document for the {split} split; {reason}")
    save_manifest(manifest, is_complete=True)
    return manifest


# -------------------------------------------------------------------------------------------------
# Packing and loader (best fit first, row for row what upstream packs)
# -------------------------------------------------------------------------------------------------

DOC_BATCH = 128  # documents appended to the packing buffer at a time, as upstream does
_num_val_loaders = 0  # made outside the evaluation


def pack_rows(
    batches: Iterable[tuple[list[np.ndarray], int]], num_rows: int, row_len: int, buffer_size: int = 1000
) -> Iterator[tuple[np.ndarray, int]]:
    """Pack documents, from endless (documents, epoch), into rows without padding. Yields
    ((num_rows, row_len) of the documents' dtype, epoch)."""
    # The longest buffered document that fits comes next (the earliest among equals); if none fits,
    # the beginning of the shortest, whose rest is dropped. Upstream scans its buffer for it; here
    # it is bisected from sorted integers: length above, countdown of arrival below.
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
                document = waiting.pop(key)[:space]
                pieces.append(document)
                space -= len(document)
        yield np.concatenate(pieces).reshape(num_rows, row_len), epoch


def get_device() -> torch.device:
    """The GPU; in the demo the CPU will do."""
    if DEMO and not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as e:
        reason = str(e).strip().splitlines()[0]
        built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}; CUDA 13 needs driver 580 or newer"
        demo = "`AUTORESEARCH_DEMO=1 uv run prepare.py && AUTORESEARCH_DEMO=1 uv run train.py`"
        remedy = f"To try everything on the CPU in small: {demo}"
        raise SetupError(f"no CUDA GPU found: {reason} ({built}). {remedy}") from e
    return torch.device("cuda")


def read_document_batches(split: str) -> Iterator[tuple[list[np.ndarray], int]]:
    """The encoded documents of a split, shard after shard in the order of their names, for ever.
    Yields (up to DOC_BATCH arrays of uint16 within one row group, epoch)."""
    shards = {name: shard for name, shard in sorted(load_manifest()["shards"].items()) if shard[split]["tokens"]}
    for epoch in itertools.count(1):
        for name, shard in shards.items():
            path = TOKENS_DIR / split / f"{name}.bin"
            if not is_intact(name, shard):
                raise SetupError(f"{path} or a file beside it is damaged: {REMEDY}")
            is_small = shard[split]["tokens"] < 2**20  # a map holds its file open; there may be thousands
            tokens = np.fromfile(path, np.uint16) if is_small else np.asarray(np.memmap(path, np.uint16, mode="r"))
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as index:
                offsets, group_sizes = index["offsets"].tolist(), index["group_sizes"].tolist()
            for first, end in itertools.pairwise(itertools.accumulate(group_sizes, initial=0)):
                for i in range(first, end, DOC_BATCH):
                    spans = itertools.pairwise(offsets[i : min(i + DOC_BATCH, end) + 1])
                    yield [tokens[a:b] for a, b in spans], epoch


def prefetch(items: Iterable, depth: int = 4) -> Iterator:
    """Run an iterator in a thread, `depth` items ahead. Its exceptions come out here; closing this ends it."""
    items, end = iter(items), object()
    pool = ThreadPoolExecutor(1, "prefetch")
    try:
        ahead = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def load_batches(B: int, T: int, split: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """What `make_dataloader` gives. Rows are packed in a thread. Each batch has a pinned buffer of
    its own: torch hands one out again only after the copies queued from it have finished."""
    device = get_device()
    with contextlib.closing(prefetch(pack_rows(read_document_batches(split), B, T + 1))) as batches:
        for rows, epoch in batches:
            host = torch.from_numpy(rows.astype(np.int32))
            if device.type == "cuda":
                host = host.pin_memory()
            tokens = host.to(device, non_blocking=True)
            yield tokens[:, :-1].long(), tokens[:, 1:].long(), epoch


def make_dataloader(tokenizer: Tokenizer, B: int, T: int, split: str) -> Iterator[tuple]:
    """Endless (x, y, epoch): int64 (B, T) on the training device, y one ahead; epoch from 1."""
    global _num_val_loaders
    assert split in SPLITS, split
    current_run()
    _num_val_loaders += split == "val"
    return load_batches(B, T, split)


# -------------------------------------------------------------------------------------------------
# Evaluation
# -------------------------------------------------------------------------------------------------

FIXED = (MAX_SEQ_LEN, TIME_BUDGET, EVAL_TOKENS, VOCAB_SIZE)  # to notice a program that changes them
CAUSAL_TOLERANCE = 1e-3  # nats; a causal model's losses come out the same to the last bit
NUM_CUTS = 128  # positions at which a row's future is exchanged
LOGIT_ROWS = 4  # rows whose logits are looked at: they take 64 MB each, at 2048 x 8192 in fp32
LOGIT_TOLERANCE = 0.1  # nats, any token; bf16 makes 0.04, the mildest edit of the loss tried 0.2
MEAN_TOLERANCE = 0.002  # nats, on average; roundings make 2e-4, a loss times 0.99 is off by 0.03
_num_evaluations = 0  # in this process: a second call may be a choice among scores


def score_tokens(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Losses (B, T) in nats. With gradients: compiling another graph would take longer than the evaluation."""
    return model(x, y, reduction="none").detach().view(y.shape)


def _seeded(call: Callable, *inputs: torch.Tensor) -> object:
    """`call(*inputs)` from always the same random state, which is put back."""
    device = inputs[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return call(*inputs)


def find_disagreement(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> str:
    """How the loss of each token differs from the cross-entropy of the logits, which cannot see the targets; or ""."""
    x, y = x[:LOGIT_ROWS], y[:LOGIT_ROWS]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        losses = _seeded(functools.partial(model, reduction="none"), x, y).flatten().float()
        try:
            logits = _first_tensor(_seeded(model, x))
        except TypeError:  # it wants its targets
            logits = None
    if logits is None or logits.shape[:-1] != y.shape:
        return "model(x) gives no logits (B, T, vocabulary): the score cannot be checked"
    logits = logits.flatten(0, 1).float()
    off = losses - torch.nn.functional.cross_entropy(logits, y.flatten(), reduction="none")
    worst, mean = off.abs().max().item(), off.mean().item()
    if worst <= LOGIT_TOLERANCE and abs(mean) <= MEAN_TOLERANCE:
        return ""
    return (
        'reduction="none" is not the cross-entropy of the logits of model(x): it is off by up to '
        f"{worst:.3g} nats a token, {mean:+.3g} on average (extra terms belong into the mean alone)"
    )


def find_leak(losses_of: Callable, x: torch.Tensor, y: torch.Tensor, vocab_size: int) -> tuple:
    """Whether a model predicts from the past alone (None: unknown), and what was found. With tokens exchanged
    from a cut on, losses before it must stay. Every second cut is a multiple of 16, where blocks would look ahead."""
    (B, T), random = x.shape, torch.Generator().manual_seed(0)
    losses = losses_of(x, y)
    if not ((losses_of(x, y) - losses).abs() <= CAUSAL_TOLERANCE).all():
        return None, "the model's losses on one batch differ from call to call (or are NaN)"
    num_passes = -(-NUM_CUTS // B)  # small batches take more of them
    cuts = torch.randint(1, T, (num_passes * B,), generator=random)
    if T > 16:
        cuts[::2] = 16 * torch.randint(1, (T - 1) // 16 + 1, cuts[::2].shape, generator=random)
    for cut in cuts.view(num_passes, B, 1):
        is_before = (torch.arange(T) < cut).to(x.device)
        shift = torch.randint(1, vocab_size, (B, T), generator=random).to(x.device)
        changed = losses_of(torch.where(is_before, x, (x + shift) % vocab_size), y)
        difference = (changed - losses).abs().where(is_before, 0.0).max().item()
        if difference <= CAUSAL_TOLERANCE:
            continue
        other_row = torch.cat(((x[:1] + 1) % vocab_size, x[1:]))
        if not ((losses_of(other_row, y) - losses).abs()[1:] <= CAUSAL_TOLERANCE).all():
            return False, "the rows of a batch affect each other: tokens in one change losses in others"
        return False, f"changing later tokens changes earlier losses by up to {difference:.3g} nats"
    return True, ""


def _sum_losses(losses_of: Callable, batches: Iterator[tuple], token_bytes: torch.Tensor) -> tuple[float, int, int]:
    """(nats, bytes, the last epoch) of those among the next EVAL_TOKENS targets that stand for text."""
    nats = torch.zeros((), dtype=torch.float64, device=token_bytes.device)
    num_bytes = torch.zeros((), dtype=torch.int64, device=token_bytes.device)
    num_rows = EVAL_TOKENS // MAX_SEQ_LEN
    for x, y, epoch in batches:
        lengths = token_bytes[y]
        nats += losses_of(x, y).double().masked_fill(lengths == 0, 0.0)[:num_rows].sum()
        num_bytes += lengths[:num_rows].sum()
        num_rows -= len(x)
        if num_rows <= 0:
            return nats.item(), num_bytes.item(), epoch


def _find_faults(run: "Run | None", disagreement: str, is_causal: bool | None, finding: str) -> list[str]:
    """What makes a score worthless, a sentence each; says them."""
    faults = [disagreement] if disagreement else []
    if (MAX_SEQ_LEN, TIME_BUDGET, EVAL_TOKENS, VOCAB_SIZE) != FIXED:
        faults.append("constants of prepare.py were changed by the program")
    if _num_val_loaders:
        faults.append("the validation split was loaded outside the evaluation")
    if run and run.training_seconds > (1 + MAX_OVERRUN) * TIME_BUDGET:
        share = run.training_seconds / TIME_BUDGET
        faults.append(f"training took {share:.0%} of the budget (a step is too long)")
    if not is_causal:
        faults.append(f"{'causality could not be tested' if is_causal is None else 'LOOKS AHEAD'}: {finding}")
    for fault in faults:
        print(f"\n*** this score is worth nothing: {fault} ***\n", flush=True)
    return faults


def evaluate_bpb(model: torch.nn.Module, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte on the validation split, the number that everything is about: the cross-entropy, in
    bits, of those of EVAL_TOKENS targets that stand for text, over their bytes. Writes EVAL_FILE, with `faults`, what
    makes the score worthless, and `audit_bpb`, of as much text again that no search has seen (None: there is less)."""
    global _num_evaluations
    _num_evaluations += 1
    run, token_bytes = current_run(), get_token_bytes(get_device())
    losses_of = functools.partial(score_tokens, model)
    with contextlib.closing(load_batches(batch_size, MAX_SEQ_LEN, "val")) as batches:
        first = x, y, _ = next(batches)
        nats, num_bytes, _ = _sum_losses(losses_of, itertools.chain([first], batches), token_bytes)
        bpb, audit_bpb = nats / (math.log(2) * num_bytes), None
        if num_tokens(load_manifest(), "val") >= 2 * EVAL_TOKENS:
            audit_nats, audit_bytes, epoch = _sum_losses(losses_of, batches, token_bytes)
            audit_bpb = audit_nats / (math.log(2) * audit_bytes) if epoch == 1 else None
    is_causal, finding = find_leak(functools.partial(_seeded, losses_of), x, y, tokenizer.get_vocab_size())
    record = {
        "run_id": run and run.start.get("run_id"),
        "val_bpb": bpb,
        "nats": nats,
        "bytes": num_bytes,
        "tokens": EVAL_TOKENS // MAX_SEQ_LEN * MAX_SEQ_LEN,
        "causal": is_causal,
        "finding": finding,
        "faults": _find_faults(run, find_disagreement(model, x, y), is_causal, finding),
        "audit_bpb": audit_bpb,
        "data_fingerprint": load_manifest()["fingerprint"],
        "prepare_sha256": PREPARE_SHA256,
        "measurement_sha256": measurement_sha256(),
        "num_calls": _num_evaluations,
    }
    write_atomic(Path(EVAL_FILE), finite_json(record, indent=2) + "\n")
    return bpb


def rehearse_evaluation(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Score one batch, so that a model that cannot be scored says so before its budget is spent."""
    x, y = (t.repeat(1, -(-MAX_SEQ_LEN // t.size(1)))[:, :MAX_SEQ_LEN] for t in (x, y))
    losses = score_tokens(model, x, y)
    disagreement = find_disagreement(model, x, y)
    if disagreement and losses.isfinite().all():  # NaN is for training to report
        raise ValueError(disagreement)


# What a score depends on besides the program and the data.
MEASURED = (
    *("MAX_SEQ_LEN", "TIME_BUDGET", "EVAL_TOKENS", "VOCAB_SIZE", "SPLIT_PATTERN", "SPECIAL_TOKENS", "BOS_TOKEN"),
    *("Tokenizer", "encode_pieces", "get_token_bytes", "pack_rows", "DOC_BATCH", "read_document_batches"),
    *("load_batches", "score_tokens", "_sum_losses", "evaluate_bpb", "Clock", "MAX_PAUSED_SHARE"),
)


@functools.cache
def measurement_sha256(source: bytes = PREPARE_SOURCE) -> str:
    """Of the code behind MEASURED, without comments, docstrings and messages: if it is the same, results compare."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            del node.body[0]
        elif isinstance(node, ast.JoinedStr):
            node.values = []  # a message, which versions of Python print differently
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else node
        if getattr(target, "id", getattr(target, "name", "")) in MEASURED:
            found.append(ast.unparse(node))
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()


# -------------------------------------------------------------------------------------------------
# Statistics (of the layers and parameters of any model, of the kernels of a step)
# -------------------------------------------------------------------------------------------------


def _rounded(values: list[float]) -> list[float | None]:
    """To six digits, about what single precision holds. What is no number is None."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


def _first_tensor(value: object) -> torch.Tensor | None:
    """The floating-point tensor that a module returned or was given, alone or first in a tuple."""
    value = value[0] if isinstance(value, tuple | list) and value else value
    return value if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() else None


def _activation_stats(t: torch.Tensor) -> torch.Tensor:
    """Of (..., features): RMS; share of entries below a thousandth of it; of features that are so on every token."""
    t = torch.atleast_1d(t).flatten(0, -2).float()
    rms = t.square().mean().sqrt()
    is_zero = t.abs() <= 1e-3 * rms
    return torch.stack((rms, is_zero.mean(dtype=torch.float32), is_zero.all(0).mean(dtype=torch.float32)))


@torch.no_grad()
def layer_stats(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict:
    """What a batch's activations look like in the blocks (members of a ModuleList) and linear layers.
    Lists run parallel to `layers/names`: `layers/rms` and `layers/zeros` of the output,
    `layers/input_zeros` and `layers/dead` of a linear layer's input. A model that cannot be looked at
    gives `layers/error` too: statistics must never end a run."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    stats, seen, logits = {}, {}, None

    def watch(name: str, module: torch.nn.Module, given: tuple, output: object) -> None:
        pair = [_first_tensor(output), _first_tensor(given) if isinstance(module, torch.nn.Linear) else None]
        if pair[0] is not None and name not in seen:
            nothing = pair[0].new_full((3,), math.nan, dtype=torch.float32)
            seen[name] = torch.cat([nothing if t is None else _activation_stats(t) for t in pair])

    lists = {name for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)}
    try:
        with contextlib.ExitStack() as hooks, torch.compiler.set_stance("force_eager"):
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) or (name and name.rpartition(".")[0] in lists):
                    hooks.enter_context(module.register_forward_hook(functools.partial(watch, name)))
            try:
                logits = _first_tensor(_seeded(model, x))
            except TypeError:  # a model that wants its targets
                _seeded(model, x, y)
    except Exception as e:  # whatever a model unknown to us may raise
        stats["layers/error"] = f"{type(e).__name__}: {e}"[:200]
    if logits is not None and logits.dim() == 3:
        stats["logits/max_abs"] = logits.abs().max().item()
        stats["logits/max_prob"] = logits.float().softmax(-1).amax(-1).mean().item()
    stats["layers/names"] = list(seen)
    rows = torch.stack(list(seen.values())).tolist() if seen else []  # once: each time waits for the GPU
    for key, column in (("rms", 0), ("zeros", 1), ("input_zeros", 4), ("dead", 5)):
        stats[f"layers/{key}"] = _rounded([row[column] for row in rows])
    return stats


def copy_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def parameter_stats(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> dict:
    """RMS of each parameter's gradient, weight and update, after a step. `before`: the weights from
    before it. Short vectors are also given whole, as `scalars/NAME`."""
    stats, rows = {"params/names": []}, []
    for name, p in model.named_parameters():
        grad = p.new_full((), math.nan) if p.grad is None else p.grad
        norms = [torch.linalg.vector_norm(t, dtype=torch.float32) for t in (grad, p, p - before.get(name, p))]
        rows.append(torch.stack(norms).double() / p.numel() ** 0.5)
        stats["params/names"].append(name.removeprefix("_orig_mod."))
        if p.dim() < 2 and p.numel() <= 64:
            stats[f"scalars/{stats['params/names'][-1]}"] = _rounded(p.flatten().tolist())
    columns = torch.stack(rows).T.tolist()  # once: each time waits for the GPU
    for key, column in zip(("grad", "weight", "update"), columns, strict=True):
        stats[f"params/{key}_rms"] = _rounded(column)
    return stats


# Peak dense bf16 rates in TFLOP/s, from the vendor's data sheets, by the whole name that torch gives.
PEAK_BF16_TFLOPS = {
    r"NVIDIA (H100 80GB HBM3|H200)": 989.5,
    r"NVIDIA H100 PCIe": 756.0,
    r"NVIDIA (H100|H200) NVL": 835.5,
    r"NVIDIA A100(-SXM4-[48]0GB|-PCIE-40GB| 80GB PCIe)": 312.0,
    r"NVIDIA B200": 2250.0,
    r"NVIDIA L40S": 362.05,
    r"NVIDIA GeForce RTX 4090": 165.2,
    r"NVIDIA GeForce RTX 5090": 209.5,
}


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of dense bf16; None for an unknown device: no MFU is better than a wrong one."""
    peaks = [1e12 * tflops for pattern, tflops in PEAK_BF16_TFLOPS.items() if re.fullmatch(pattern, device_name)]
    return peaks[0] if peaks else None


# The kind of a kernel by its name, the first that matches.
KERNEL_KINDS = {
    "attention": r"_attend|sdpa|flash|fmha|compute_dot_do_o|convert_dq|attention",
    "mlp": r"_relu2|_strip",  # and, where they are turned in their product, queries and keys
    "matmul": r"nvjet|gemm|cutlass|cublas|splitK|ampere|sm90_xmma",
    "loss": r"_softcap_loss|log_softmax|nll_loss",
    "elementwise": r"",  # norms, sums, rotary position embedding, embeddings
}


def measure_step(gradients: Callable, update: Callable, num_micro_steps: int, device: torch.device) -> dict | None:
    """Where a step's time goes on the GPU, in ms by kind of kernel; None elsewhere. `gradients` does
    one micro-batch. Raises ValueError for a step longer than the budget."""
    begin = time.perf_counter()
    gradients()
    if device.type == "cuda":
        torch.cuda.synchronize()
    step_s = num_micro_steps * (time.perf_counter() - begin)
    if step_s > (1 + MAX_OVERRUN) * TIME_BUDGET:
        raise ValueError(f"a step takes about {step_s:.0f} s, longer than the whole budget of {TIME_BUDGET:.0f} s")
    if device.type != "cuda":
        return None
    totals = dict.fromkeys((*KERNEL_KINDS, "optimizer"), 0.0)
    for work, times in ((gradients, num_micro_steps), (update, 1)):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
            work()
            torch.cuda.synchronize()
        for event in profiler.key_averages():
            kinds = (kind for kind, pattern in KERNEL_KINDS.items() if re.search(pattern, event.key, re.IGNORECASE))
            kind = "optimizer" if work is update else next(kinds)
            totals[kind] += times * event.self_device_time_total / 1e3
    return totals


# -------------------------------------------------------------------------------------------------
# The record of a run
# -------------------------------------------------------------------------------------------------

MAX_OVERRUN = 1.0 if DEMO else 0.05  # of the budget, by the last step: fifty of the baseline's
MAX_PAUSED_SHARE = 0.1  # of the budget; looking at the layers takes 1 % on an H100, 5 % in the demo
MACHINE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE)
START_ONLY = ("started_unix", "pid", "host", "train_py", "modules")  # not in the summary
# The closing block, which scripts grep: values and their decimals.
CLOSING_BLOCK = {
    **{"val_bpb": 6, "training_seconds": 1, "total_seconds": 1, "peak_vram_mb": 1, "mfu_percent": 2},
    **{"total_tokens_M": 1, "num_steps": 0, "num_params_M": 1, "depth": 0},
}


class Clock:
    """The clock of the budget. It stands still inside `paused` (what is beyond MAX_PAUSED_SHARE
    counts). `end_step` marks the end of a step in the GPU's queue and `read_step` waits for that
    mark: work queued in between keeps the GPU busy while Python reads and logs."""

    def __init__(self, device: torch.device):
        self.device, self.is_cuda = device, device.type == "cuda"
        self.seconds = 0.0  # of training, up to the last step read
        self.step_seconds = 0.0  # of the last step read
        self.paused_seconds = 0.0
        self._last = 0.0
        self._marked = None
        self._is_idle = False  # nothing is queued after a pause
        self._event = torch.cuda.Event() if self.is_cuda else None

    def start(self) -> None:
        self._synchronize()
        self._last = self._now()

    def end_step(self, values: dict[str, torch.Tensor]) -> None:
        """Queue the mark, and copies of tensors (whole numbers exact up to 2^53)."""
        self._values = {}
        for key, value in values.items():
            self._values[key] = torch.empty(value.shape, dtype=torch.float64, pin_memory=self.is_cuda)
            self._values[key].copy_(value.detach(), non_blocking=True)
        if self.is_cuda:
            self._event.record()
        # After a pause the step is over now: to queue the next one belongs to the next one.
        if self._is_idle or not self.is_cuda:
            self._synchronize()
            self._marked = self._now()

    def read_step(self) -> dict[str, float | list[float]]:
        """Wait for the marked step, bring `seconds` up to its end, return the values."""
        if self._marked is None:
            self._event.synchronize()
            self._marked = self._now()
        self.step_seconds = self._marked - self._last
        self.seconds += self.step_seconds
        self._last, self._marked, self._is_idle = self._marked, None, False
        return {key: value.tolist() for key, value in self._values.items()}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do something that is not training."""
        self._synchronize()
        begin = time.perf_counter()
        yield
        self._synchronize()
        self.paused_seconds += time.perf_counter() - begin
        self._is_idle = True

    def _now(self) -> float:
        return time.perf_counter() - min(self.paused_seconds, MAX_PAUSED_SHARE * TIME_BUDGET)

    def _synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)


def _git(folder: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, *args], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def imported_modules(script: Path) -> dict[str, str]:
    """{file: text} of the modules beside the script that this process has imported."""
    modules = {}
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "/")
        if path.suffix == ".py" and path.is_relative_to(script.parent) and path != script:
            name = path.relative_to(script.parent).as_posix()
            if name not in ("prepare.py", "analyze.py") and "site-packages" not in name:
                modules[name] = path.read_text(errors="replace")
    return modules


def lock_metrics() -> TextIO:
    """METRICS_FILE, open for appending. Its lock, held until this process ends, says that a run is in progress."""
    file = open(METRICS_FILE, "a")  # noqa: SIM115 (open for the whole run)
    for _ in range(10):  # who asks whether a run is in progress holds the lock for an instant
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        time.sleep(0.05)
    other = read_json(Path(START_FILE))
    remedy = "wait for it (`uv run analyze.py --wait`) or end it (`uv run analyze.py stop`)"
    raise SetupError(f"run {other.get('run_id')} is in progress here, process {other.get('pid')}: {remedy}")


def set_aside_earlier_run() -> None:
    """Move an earlier run's files to the archive's folder unfiled/, from which analyze.py files them;
    what the archive holds already is deleted. So a crash can never show an old score."""
    if Path(SUMMARY_FILE).exists():
        Path(CHECKPOINT_FILE).unlink(missing_ok=True)  # it was only needed until the run was scored
    metrics, others = Path(METRICS_FILE), [Path(n) for n in (EVAL_FILE, SUMMARY_FILE, CHECKPOINT_FILE, START_FILE)]
    present = [path for path in (metrics, *others) if path.exists() and path.stat().st_size]
    start = read_json(Path(START_FILE))
    run_id = str(start.get("run_id") or f"unknown-{os.urandom(4).hex()}")
    archive = Path(os.environ.get("AUTO_LOG_RESEARCH_DIR") or ".auto-log-research").expanduser()
    archive = archive / "demo" if start.get("demo", DEMO) else archive
    filed = [path.parent for path in archive.glob(f"*/{START_FILE}") if read_json(path).get("run_id") == run_id]
    # A score that came after its run was filed is kept: analyze.py files it again.
    results = {path.name for path in present} & {EVAL_FILE, SUMMARY_FILE}
    is_held = any(results <= set(os.listdir(folder)) for folder in filed)
    target, hidden = archive / "unfiled" / run_id, archive / "unfiled" / f".{run_id}"
    if present and not is_held and not target.exists():
        hidden.mkdir(parents=True, exist_ok=True)  # nobody sees half of a run
        for path in present:
            put = shutil.move if path.name == CHECKPOINT_FILE else shutil.copy
            put(path, hidden / path.name)
        os.rename(hidden, target)
    for path in others:
        path.unlink(missing_ok=True)
    metrics.write_bytes(b"")  # it stays, and stays locked


def process_age_s() -> float:
    """Seconds since this process started, its imports included; 0 where only Linux could tell."""
    try:
        started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def end_children(pid: int | str = "self") -> None:
    """Kill the processes that this one started (Linux): they would hold the GPU and the lock."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            end_children(child)
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)


def current_run() -> "Run | None":
    """The run that this process is. A train.py without a Run (upstream's) becomes one with its first call."""
    script = getattr(sys.modules["__main__"], "__file__", None) or ""
    if Run.current is None and Path(script).name.startswith("train"):
        Run(Path(script)).__enter__()
    return Run.current


class Run:
    """One training run's files and figures, from its identity to its score. A context manager: an
    exception ends the process with one line that says why, `crash:` (exit code 1) for a failed
    experiment, `error:` (2) for the machine or the data, `stopped:` (130) after an interrupt.
    With `is_new` false, the files of the run that is here stay, to be scored again."""

    current: "Run | None" = None  # what this process is

    def __init__(self, script: Path, is_new: bool = True):
        age_s = process_age_s()  # start-up begins with the process, not with the end of its imports
        self.begin, self.script, self.is_new = time.perf_counter() - age_s, script.resolve(), is_new
        self.start: dict = {}  # the content of START_FILE, once it is this run's
        self.pending, self.last_shown = None, 0.0
        self.step, self.loss, self.loss_average = -1, math.nan, 0.0
        self.num_tokens, self.token_sum, self.step_ms, self.other_mb = 0, 0, [], None
        self.training_seconds = 0.0
        folder, source, modules = self.script.parent, self.script.read_bytes(), imported_modules(self.script)
        status = _git(folder, "status", "--porcelain", "--", self.script.name, "prepare.py", *modules)
        begun = time.strftime("%Y%m%d-%H%M%S", time.localtime(time.time() - age_s))
        self.program = {
            "run_id": f"{begun}-{'demo-' if DEMO else ''}{os.urandom(2).hex()}",
            "git_commit": _git(folder, "rev-parse", "HEAD"),
            "git_dirty": None if status is None else bool(status),
            "train_sha256": hashlib.sha256(source).hexdigest(),
            "prepare_sha256": PREPARE_SHA256,
            "measurement_sha256": measurement_sha256(),
            "data_fingerprint": read_manifest().get("fingerprint"),
            "seed_offset": SEED_OFFSET,
            "demo": DEMO,
            "max_seq_len": MAX_SEQ_LEN,
            "time_budget": TIME_BUDGET,
            "eval_tokens": EVAL_TOKENS,
            "torch_version": str(torch.__version__),
            "started_unix": time.time() - age_s,
            "pid": os.getpid(),
            "host": os.uname().nodename,
            "train_py": source.decode("utf-8-sig", "replace"),
            "modules": modules,
        }
        texts = [self.program["train_py"], *modules.values()]
        tag = self.program["train_sha256"] if any("torch.library" in text for text in texts) else ""
        torch.compiler.config.cache_key_tag = PREPARE_SHA256 + tag

    def __enter__(self) -> "Run":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
        try:
            if self.script.parent != Path.cwd():
                raise SetupError(f"{self.script} leaves its files where it is called: cd {self.script.parent} first")
            if "AUTORESEARCH_TIME_BUDGET" in os.environ and not DEMO:
                raise SetupError("AUTORESEARCH_TIME_BUDGET is for the demo alone: scores compare at one budget")
            self.metrics = lock_metrics()
            if self.is_new:
                set_aside_earlier_run()
                print(f"run {self.program['run_id']}", flush=True)
                self._write_start(self.program)
            get_device()
            load_manifest()
            least_mb = 100 if DEMO else 2000  # the checkpoint takes 250 MB, compiled code about as much
            free_mb = shutil.disk_usage(".").free >> 20
            if free_mb < least_mb:
                raise SetupError(f"only {free_mb} MB are free here, and a run may need {least_mb}: make room")
        except BaseException as e:
            self.__exit__(type(e), e, None)
            raise
        Run.current = self
        return self

    def _write_start(self, record: dict) -> None:
        self.start = record | {"modules": imported_modules(self.script) | record["modules"]}
        write_atomic(Path(START_FILE), finite_json(self.start, indent=2) + "\n")

    def start_training(self, device: torch.device, facts: dict) -> None:
        """Start the clock. `facts`, the resolved configuration, go into the summary."""
        gpu_name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        self.facts = json.loads(finite_json(facts | {"gpu_name": gpu_name}))  # what JSON cannot hold shows now
        self.clock = Clock(device)
        self.clock.start()
        self.startup_seconds = time.perf_counter() - self.begin
        print(f"gpu: {gpu_name}\nstartup_seconds: {self.startup_seconds:.1f}", flush=True)

    def log_step(self, step: int, num_tokens: int, values: dict[str, torch.Tensor], more: dict) -> None:
        """Mark the end of a step. `values`, tensors with `train/loss` among them, are not waited for:
        `progress` reads them and writes the step's line."""
        self.clock.end_step(values)
        self.pending = step, num_tokens, more

    def progress(self) -> float:
        """How much of the budget is used up, 0 to 1. Waits for the last step and appends it to
        METRICS_FILE. Raises FloatingPointError on a loss that is NaN or has exploded."""
        if self.pending:
            self._write_step(*self.pending, self.clock.read_step())
            self.pending = None
        return min(self.clock.seconds / TIME_BUDGET, 1.0)

    def _write_step(self, step: int, num_tokens: int, more: dict, values: dict) -> None:
        self.step, self.loss, rate = step, values["train/loss"], num_tokens / self.clock.step_seconds
        self.loss_average = 0.9 * self.loss_average + 0.1 * self.loss
        self.step_ms.append(1000 * self.clock.step_seconds)
        self.num_tokens += num_tokens
        if "train/data_sum" in values:
            self.token_sum += int(values["train/data_sum"])
            values["train/data_sum"] = self.token_sum
        if "layers/names" in more:  # see also what else this machine is busy with
            more |= {"gpu/other_mb": None, "machine/load": os.getloadavg()[0] / os.cpu_count()}
            if self.clock.is_cuda:  # CUDA takes 0.5 to 0.9 GB for a process beside torch's memory
                free, total = torch.cuda.mem_get_info()
                more["gpu/other_mb"] = max((total - free - torch.cuda.memory_reserved()) / 2**20 - 1024, 0.0)
                self.other_mb = max(self.other_mb or 0.0, more["gpu/other_mb"])
        record = {
            "step": step,
            "train/loss_smooth": self.loss_average / (1 - 0.9 ** len(self.step_ms)),
            "train/tokens": self.num_tokens,
            "perf/step_time_ms": self.step_ms[-1],
            "perf/tokens_per_sec": rate,
            "perf/mfu_percent": self._mfu_percent(rate),
            "time/unix_s": time.time(),
            "time/training_s": self.clock.seconds,
        }
        self.metrics.write(finite_json(record | values | more) + "\n")
        self.metrics.flush()
        if time.monotonic() - self.last_shown >= 5.0:
            self.last_shown = time.monotonic()
            shown = f"{self.clock.seconds:.1f} of {TIME_BUDGET:.0f} s | loss {record['train/loss_smooth']:.4f}"
            print(f"step {step:5d} | {shown} | {self.step_ms[-1]:.0f} ms | {rate:,.0f} tok/s", flush=True)
        if not self.loss <= 100:
            raise FloatingPointError("the loss is NaN" if math.isnan(self.loss) else "the loss exploded")

    def _mfu_percent(self, tokens_per_second: float) -> float | None:
        flops, peak = self.facts.get("flops_per_token"), peak_flops(self.facts["gpu_name"] or "")
        return 100 * flops * tokens_per_second / peak if flops and peak else None

    def end_training(self, model: torch.nn.Module) -> dict:
        """Save a checkpoint: a failed evaluation must not cost the run. Returns the summary so far."""
        self.training_seconds, step_ms = self.clock.seconds, float(np.median(self.step_ms))
        self._write_start(self.start)  # with what was imported meanwhile
        summary = {key: value for key, value in self.start.items() if key not in START_ONLY} | self.facts
        summary |= {
            "training_seconds": self.training_seconds,
            "startup_seconds": self.startup_seconds,
            "stats_seconds": self.clock.paused_seconds,
            "total_seconds": time.perf_counter() - self.begin,
            "peak_vram_mb": torch.cuda.max_memory_allocated() / 2**20 if self.clock.is_cuda else None,
            "other_gpu_mb": self.other_mb,
            "mfu_percent": self._mfu_percent(self.num_tokens / self.training_seconds),
            "total_tokens_M": self.num_tokens / 1e6,
            "num_steps": len(self.step_ms),
        }
        if (pauses_over := self.clock.paused_seconds - MAX_PAUSED_SHARE * TIME_BUDGET) > 0:
            summary["pauses_over"] = pauses_over
        if profile := summary.get("profile"):
            # The rest: the GPU idle, and what trained weights and a warm GPU add to the kernels profiled at the start.
            profile |= {"step": step_ms, "rest": max(step_ms - sum(profile.values()), 0.0)}
        # Not synced: that takes seconds, and the score is to come.
        try:
            with open_atomic(Path(CHECKPOINT_FILE), is_synced=False) as file:
                torch.save({"model": model.state_dict(), "summary": finite_json(summary)}, file)
        except RuntimeError as e:
            if "unexpected pos" not in str(e):  # torch's word for a full disk
                raise
            raise SetupError(f"{CHECKPOINT_FILE} could not be written ({str(e)[:100]}): make room") from e
        return summary

    def load_checkpoint(self, model: torch.nn.Module) -> dict:
        """Put the checkpoint's weights into `model`; returns its summary so far."""
        if not Path(CHECKPOINT_FILE).exists():
            raise SetupError(f"no {CHECKPOINT_FILE} here: there is nothing to score")
        stored = torch.load(CHECKPOINT_FILE, map_location=get_device(), weights_only=True)
        summary = json.loads(stored["summary"])
        if summary["train_sha256"] != self.program["train_sha256"]:
            raise SetupError(f"{CHECKPOINT_FILE} was written by another {self.script.name}: check that one out first")
        model.load_state_dict(stored["model"])
        self.start = self.program | read_json(Path(START_FILE)) | {"run_id": summary["run_id"]}
        self.training_seconds = summary["training_seconds"]
        print(f"run {summary['run_id']}", flush=True)
        return summary

    def finish(self, summary: dict, val_bpb: float, eval_seconds: float) -> None:
        """Write SUMMARY_FILE and print the closing block."""
        if not math.isfinite(val_bpb):
            raise FloatingPointError("val_bpb is not a number")
        # Of a run that is scored later, the time in between is no part.
        total = time.perf_counter() - self.begin if self.is_new else summary["total_seconds"] + eval_seconds
        summary = {"val_bpb": val_bpb, **summary, "eval_seconds": eval_seconds, "total_seconds": total}
        write_atomic(Path(SUMMARY_FILE), finite_json(summary, indent=2) + "\n")
        self.start.pop("ended", None)  # of the evaluation that failed before this one
        self._write_start(self.start)
        if DEMO:
            print("The demo's score, which compares with none of a real run:")
        print("---")
        for key, decimals in CLOSING_BLOCK.items():
            value = summary.get(key)
            print(f"{key + ':':<17} {'unknown' if value is None else f'{value:.{decimals}f}'}", flush=True)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, SystemExit):
            return
        where = f"at step {self.step}, loss {self.loss:.4f}" if self.step >= 0 else "before the first step"
        ended, code = f"crash: {describe_error(error)} {where}", 1
        if isinstance(error, KeyboardInterrupt):
            ended, code = f"stopped: by an interrupt {where}", 130
        elif isinstance(error, SetupError) or (isinstance(error, OSError) and error.errno in MACHINE_ERRNOS):
            ended, code = f"error: {error}", 2
        elif isinstance(error, FloatingPointError):
            ended = f"crash: {error} {where}"
        else:
            traceback.print_exception(error)
        print(flush=True)
        print(ended, file=sys.stderr, flush=True)
        if self.start:
            with contextlib.suppress(OSError):
                self._write_start(self.start | {"ended": ended})
        raise SystemExit(code) from None


def describe_error(error: BaseException) -> str:
    text = str(error).strip() or "no message"
    inside = re.search(r"\bgot (\w+\(.+\))$", text, re.MULTILINE)  # of torch.compile
    first = inside[1] if inside else text.splitlines()[0]
    return f"{type(error).__name__}: {first[:300]}"


# -------------------------------------------------------------------------------------------------
# Kernels (for Hopper GPUs: plain mathematics with fewer trips to memory)
# -------------------------------------------------------------------------------------------------

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
# largest activation. Up to a width of 512 each multiprocessor keeps 128 rows of the weights in its
# shared memory, one warp loads rows of x, and two groups of four take turns, one multiplying while the
# other squares and stores. The product that makes queries and keys is of the same kind: its tile is
# 64 rows of one head, which it normalises and rotates. Attention with a window leaves the gradients of
# q, k and v side by side: one product instead of three then gives that of x, another that of the weights.
#
# The loss is the cross-entropy of z = c tanh(h / c), h = x W^T. With s = (1 - tanh(h / c)) / 2,
# z - c = -2 c s lies in [-2c, 0], so that the sum of exponentials needs no maximum, and
# dz/dh = 4 s (1 - s). One kernel reads a row of h and puts in its place what the gradient of h is
# if that of the loss is 1; what it really is comes in later as a factor a row, on tensors that are
# (rows, width) instead of (rows, vocab).

Tensor, Linear = torch.Tensor, torch.nn.Linear
ATTENTION_TILE, MLP_TILE, MLP_TILE_K = 64, 128, 64
STRIP_TILE, MAX_STRIP_WIDTH = (64, 128, 64), 512  # that much of b, with a's ring, fills the shared memory
LOG2_E = 1.4426950408889634
MAX_FUSED_VOCAB = 2**15  # a row of logits has to fit into registers
MAX_FUSED_CAP = 40.0  # exp(-2 cap), the least that a logit can add to the sum, has to be a number in fp32
kernels_used: set[str] = set()  # in this process: what the log says of them is what has run

# The compiler's cache keeps the gradient that was registered for an operator's name, so another
# prepare.py gets another cache; so does a train.py with operators of its own (in `Run`).
torch.compiler.config.cache_key_tag = PREPARE_SHA256


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels run here: they were written for Hopper and measured there alone."""
    is_cuda = triton is not None and torch.version.cuda is not None and device.type == "cuda"
    return is_cuda and torch.cuda.is_available() and torch.cuda.get_device_properties(device).major == 9


def _is_bf16_on_gpu(x: Tensor) -> bool:
    return triton is not None and x.is_cuda and x.dtype == torch.bfloat16


def _can_fuse(x: Tensor, *linears: torch.nn.Module) -> bool:
    """Whether there are rows in bf16 on a GPU, for modules that are nothing but products with their weights."""
    are_linear = all(type(linear) is Linear and linear.bias is None for linear in linears)
    have_hooks = any(linear._forward_hooks or linear._forward_pre_hooks for linear in linears)
    return x.numel() > 0 and _is_bf16_on_gpu(x) and are_linear and not have_hooks


def _tiles(t: Tensor, rows: int, cols: int, is_gluon: bool = False) -> object:
    """A matrix, or (B, T, heads, D) as (B T, heads D), in tiles for Hopper's copy engine; copied
    where the engine cannot read it as it lies. What sticks out at the edges is zero."""
    matrix = t if t.dim() == 2 else t.flatten(2).flatten(0, 1)
    is_apart = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.size(1)
    if not is_apart or (matrix.stride(0) * matrix.element_size()) % 16 or matrix.data_ptr() % 16:
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    if is_gluon:
        layout = gl.NVMMASharedLayout.get_default_for([rows, cols], gl.bfloat16)
        return GluonDescriptor.from_tensor(matrix, [rows, cols], layout)
    return TensorDescriptor.from_tensor(matrix, [rows, cols])


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
def _store_gradient(halves, row, col, dy, y, factors, cos, sin, t, N: tl.constexpr, D: tl.constexpr):
    """Store the gradient (N, D) of queries or keys y at positions t; if `turn` made them, with the
    norm's `factors` (a pointer a row), that of what they were before."""
    if cos is not None:
        dy = (dy - y * (tl.sum(dy * y, 1) / D)[:, None]) * tl.load(factors)[:, None]
    left, right = tl.split(tl.permute(tl.reshape(dy, (N, 2, D // 2)), (0, 2, 1)))
    if cos is not None:
        at = t[:, None] * D + tl.arange(0, D // 2)[None, :]
        c, s = tl.load(cos + at).to(tl.float32), tl.load(sin + at).to(tl.float32)
        left, right = left * c - right * s, left * s + right * c
    halves.store([row, col], left.to(tl.bfloat16))
    halves.store([row, col + D // 2], right.to(tl.bfloat16))


@jit
def _attend_dkv(
    q_tiles, k_tiles, v_tiles, do_tiles, halves, dqkv_tiles, ds_tiles, lses, deltas, k_factors, cos, sin,
    factor_stride, T, window, scale, log2_scale, H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
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
    dqkv_tiles.store([row + n, (H + KV + kv) * D], dv.to(tl.bfloat16))
    factors = k_factors if cos is None else k_factors + (row + j) * factor_stride + kv
    _store_gradient(halves, row + n, (H + kv) * D, dk * scale, k.to(tl.float32), factors, cos, sin, j, N, D)


@jit
def _attend_dq(
    ds_tiles, q_tiles, k_tiles, halves, q_factors, cos, sin, factor_stride, T, window, scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The gradient of queries m to m + N of one head, from the dS that `_attend_dkv` kept."""
    m, bh = tl.program_id(0) * N, tl.program_id(1)
    row, h, i = bh // H * T, bh % H, m + tl.arange(0, N)
    dq = tl.zeros((N, D), tl.float32)
    for n in tl.range(tl.maximum(m - window, 0) // N * N, m + N, N):
        dq = tl.dot(ds_tiles.load([bh * T + n, m - n]).T, k_tiles.load([row + n, h // GROUP * D]), dq)
    y = q_tiles.load([row + m, h * D]).to(tl.float32)
    factors = q_factors if cos is None else q_factors + (row + i) * factor_stride + h
    _store_gradient(halves, row + m, h * D, dq * scale, y, factors, cos, sin, i, N, D)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RMS norm without a gain, then rotary position embedding of (B, T, heads, D): (x1 cos + x2 sin,
    x2 cos - x1 sin) of the two halves. The tables are (cos, cos) and (sin, -sin), (T, 1, D)."""
    x = torch.nn.functional.rms_norm(x, (x.size(-1),))
    return x * cos + x.roll(x.size(-1) // 2, -1) * sin


_rotations: set[tuple[int, int]] = set()  # tables known to rotate, by where they are


def _check_rotation(cos: Tensor, sin: Tensor) -> None:
    """The way back through `turn` needs a rotation. Looked at once: that waits for the GPU."""
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
) -> Tensor:  # fmt: skip
    """The gradients of q, k and v side by side, as the product that they come from wants them."""
    (B, T, H, D), KV, N, scale = q.shape, k.size(2), ATTENTION_TILE, q.size(3) ** -0.5
    dqkv = q.new_empty((B, T, H + 2 * KV, D))
    ds = _tiles(q.new_empty((B * H * T, triton.cdiv(N + min(window, T), N) * N)), N, N)
    q_tiles, k_tiles, v_tiles, do_tiles, dqkv_tiles = (_tiles(t, N, D) for t in (q, k, v, do, dqkv))
    halves, sizes = _tiles(dqkv, N, D // 2), [H, H // KV, D, N]
    q_given, k_given = (
        [factors, cos, sin, 0 if cos is None else factors.stride(1), T, window, scale]
        for factors in (q_factors, k_factors)
    )
    _attend_dkv[(T // N, B * KV)](
        q_tiles, k_tiles, v_tiles, do_tiles, halves, dqkv_tiles, ds, lses, deltas.contiguous(), *k_given,
        scale * LOG2_E, *sizes, num_warps=4, num_stages=2,
    )  # fmt: skip
    _attend_dq[(T // N, B * H)](ds, q_tiles, k_tiles, halves, *q_given, *sizes, num_warps=4, num_stages=3)
    return dqkv


def _attention_context(ctx, inputs, output):
    _, _, v, turned_q, turned_k, *turning, ctx.window = inputs
    ctx.save_for_backward(turned_q, turned_k, v, *output, *turning)


def _attention_gradients(ctx, do, _):
    q, k, v, o, lses, *turning = ctx.saved_tensors
    deltas = (do.float() * o.float()).sum(-1).transpose(1, 2)  # (B, H, T)
    dqkv = _window_attention_backward(do, q, k, v, lses, deltas, *turning, ctx.window).flatten(2)
    parts = dqkv.split([t.size(2) * t.size(3) for t in (q, k, v)], dim=2)
    return *(part.view(t.shape) for part, t in zip(parts, (q, k, v), strict=True)), *[None] * 7


_window_attention.register_autograd(_attention_gradients, setup_context=_attention_context)
_window_attention.register_fake(
    lambda q, *_: (q.new_empty(q.shape), q.new_empty(q[..., 0].mT.shape, dtype=torch.float32))
)
_window_attention_backward.register_fake(lambda do, q, k, v, *_: q.new_empty(torch.cat((q, k, v), dim=2).shape))


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


@gluon_jit
def _barriers(num: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [num, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(num):
        mbarrier.init(barriers.index(i), count=1)
    return barriers


@gluon_jit
def _load_strip(a, b, other, shared, barriers, where, FINISH: gl.constexpr):
    """One warp: the strip of b, then a's tiles in turn, chunk by chunk, and after each the post that goes with it."""
    a_ring, strip, outs = shared
    n, first, step, num = where
    loaded, used, has_post, stored, has_strip = barriers
    STAGES: gl.constexpr = a_ring.shape[0]
    CHUNKS: gl.constexpr = strip.shape[0]
    WIDTH: gl.constexpr = a_ring.shape[2]
    mbarrier.expect(has_strip.index(0), CHUNKS * strip.shape[1] * WIDTH * 2)
    for k in range(CHUNKS):
        tma.async_copy_global_to_shared(b, [n, k * WIDTH], has_strip.index(0), strip.index(k))
    for t in range(num):
        m, side = (first + t * step) * a_ring.shape[1], t % 2
        for k in range(CHUNKS):
            i = t * CHUNKS + k
            stage = i % STAGES
            mbarrier.wait(used.index(stage), i // STAGES & 1 ^ 1)
            mbarrier.expect(loaded.index(stage), a_ring.shape[1] * WIDTH * 2)
            tma.async_copy_global_to_shared(a, [m, k * WIDTH], loaded.index(stage), a_ring.index(stage))
        if FINISH == "backward":
            mbarrier.wait(stored.index(side), t // 2 & 1 ^ 1)
            mbarrier.expect(has_post.index(side), outs.shape[1] * outs.shape[2] * 2)
            tma.async_copy_global_to_shared(other, [m, n], has_post.index(side), outs.index(side))


@gluon_jit
def _load_angles(turning, row, N: gl.constexpr, D: gl.constexpr):
    """Half of the tables' columns, the others are the same, in the layout of half a tile."""
    cos, sin, _, T, _ = turning
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    t = row % T + gl.arange(0, N, gl.SliceLayout(1, layout))
    at = t[:, None] * D + gl.arange(0, D // 2, gl.SliceLayout(0, layout))[None, :]
    return gl.load(cos + at), gl.load(sin + at)


@gluon_jit
def _turn_tile(x, c, s, turning, row, col, layout: gl.constexpr):
    """What `turn` does, of one head's tile (N, D); keeps the norm's factors."""
    _, _, factors, _, num_heads = turning
    N: gl.constexpr = x.shape[0]
    D: gl.constexpr = x.shape[1]
    factor = gl.rsqrt(gl.sum(x * x, 1) / D + 1.1920929e-07)  # torch's eps
    gl.store(factors + (row + gl.arange(0, N, gl.SliceLayout(1, layout))) * num_heads + col // D, factor)
    left, right = gl.split((x * factor[:, None]).reshape((N, 2, D // 2)).permute((0, 2, 1)))
    left, right = gl.convert_layout(left, c.type.layout), gl.convert_layout(right, c.type.layout)
    c, s = c.to(gl.float32), s.to(gl.float32)
    turned = gl.join(left * c + right * s, right * c - left * s)
    return gl.convert_layout(turned.permute((0, 2, 1)).reshape((N, D)), layout)


@gluon_jit
def _multiply_strip(SIDE: gl.constexpr, out, other, turning, turns, shared, barriers, where, FINISH: gl.constexpr):
    """Four warps, every second tile: they multiply while the other four finish and store theirs."""
    a_ring, strip, outs = shared
    n, first, step, num = where
    loaded, used, has_post, stored, has_strip = barriers
    STAGES: gl.constexpr = a_ring.shape[0]
    CHUNKS: gl.constexpr = strip.shape[0]
    ROWS: gl.constexpr = outs.shape[1]
    COLS: gl.constexpr = outs.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    out_tile = outs.index(SIDE)
    mbarrier.wait(has_strip.index(0), 0)
    if FINISH == "turn":
        T = turning[3]
        c, s = _load_angles(turning, (first + SIDE * step) * ROWS, ROWS, COLS)
    for t in range(SIDE, num, 2):
        m = (first + t * step) * ROWS
        if FINISH == "turn":  # noqa: SIM102
            if 2 * step * ROWS % T != 0:  # else all of this side's tiles have the same positions
                c, s = _load_angles(turning, m, ROWS, COLS)
        product = gl.zeros((ROWS, COLS), gl.float32, layout)
        mbarrier.wait(turns.index(SIDE), t // 2 & 1 ^ 1 - SIDE)
        for i in range(t * CHUNKS, (t + 1) * CHUNKS):
            mbarrier.wait(loaded.index(i % STAGES), i // STAGES & 1)
            chunk = strip.index(i % CHUNKS).permute((1, 0))
            product = hopper.warpgroup_mma(a_ring.index(i % STAGES), chunk, product, is_async=True)
            product = hopper.warpgroup_mma_wait(1, deps=(product,))
            mbarrier.arrive(used.index((i - 1) % STAGES), pred=i > t * CHUNKS)
        mbarrier.arrive(turns.index(1 - SIDE))
        product = hopper.warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(used.index(((t + 1) * CHUNKS - 1) % STAGES))
        product = product.to(gl.bfloat16).to(gl.float32)
        if FINISH == "backward":
            mbarrier.wait(has_post.index(SIDE), t // 2 & 1)
            product *= 2 * gl.sqrt(out_tile.load(layout).to(gl.float32))
        elif FINISH == "forward":
            product = gl.maximum(product, 0.0)
            product *= product
        else:
            product = _turn_tile(product, c, s, turning, m, n, layout)
        if FINISH != "backward":
            tma.store_wait(0)
        out_tile.store(product.to(gl.bfloat16))
        hopper.fence_async_shared()
        if n < out.shape[1]:
            tma.async_copy_shared_to_global(out, [m, n], out_tile)
        else:
            tma.async_copy_shared_to_global(other, [m, n - out.shape[1]], out_tile)
        if FINISH == "backward":
            tma.store_wait(0)
            mbarrier.arrive(stored.index(SIDE))
    tma.store_wait(0)


@gluon_jit
def _strip_product(
    a, b, out, other, cos, sin, factors, T, num_heads, num_tiles, step,
    FINISH: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A strip of a b^T's columns, every `step`-th tile of its rows, finished as `_relu2_product` or `turn` does.
    `other` is post, or takes the columns that are more than out's."""
    a_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, a.block_shape[0], a.block_shape[1]], a.layout)
    strip = gl.allocate_shared_memory(gl.bfloat16, [CHUNKS, b.block_shape[0], b.block_shape[1]], b.layout)
    outs = gl.allocate_shared_memory(gl.bfloat16, [2, out.block_shape[0], out.block_shape[1]], out.layout)
    barriers = (_barriers(STAGES), _barriers(STAGES), _barriers(2), _barriers(2), _barriers(1))
    first, n = gl.program_id(0) % step, gl.program_id(0) // step * out.block_shape[1]
    num = (num_tiles - first + step - 1) // step
    turns = _barriers(2)
    hopper.fence_async_shared()
    shared = (a_ring, strip, outs)
    turning = (cos, sin, factors, T, num_heads)
    where = (n, first, step, num)
    gl.warp_specialize(
        [
            (_multiply_strip, (0, out, other, turning, turns, shared, barriers, where, FINISH)),
            (_multiply_strip, (1, out, other, turning, turns, shared, barriers, where, FINISH)),
            (_load_strip, (a, b, other, shared, barriers, where, FINISH)),
        ],
        [4, 1],
        [200, 40],
    )


def _launch_strips(a: Tensor, b: Tensor, out: Tensor, other: Tensor, finish: str, turning: tuple | None = None) -> None:
    (M, K), N = a.shape, len(b)
    rows, cols, width = STRIP_TILE
    num_tiles, num_strips = triton.cdiv(M, rows), triton.cdiv(N, cols)
    num_sms = torch.cuda.get_device_properties(a.device).multi_processor_count
    step = max(1, min(num_sms // num_strips, num_tiles))
    shaped = (a, rows, width), (b, cols, width), (out, rows, cols), (other, rows, cols)
    tiles = [_tiles(*t, is_gluon=True) for t in shaped]
    sizes = [num_tiles, step, finish, triton.cdiv(K, width), 8]
    _strip_product[(num_strips * step,)](*tiles, *(turning or (out, out, out, 1, 1)), *sizes, num_warps=4)


@torch.library.custom_op("auto_log_research::turned_products", mutates_args=())
def _turned_products(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, q_width: int, k_width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x W^T in three parts, of which the first two are `turn`ed, and the factors of their norms. The gradients
    that it takes are those of the parts of x W^T."""
    kernels_used.add("projections")
    _check_rotation(cos, sin)
    turned_width = q_width + k_width
    q, k = x.new_empty(len(x), q_width), x.new_empty(len(x), k_width)
    factors = x.new_empty((len(x), turned_width // cos.size(2)), dtype=torch.float32)
    _launch_strips(x, weight[:turned_width], q, k, "turn", (cos, sin, factors, len(cos), factors.size(1)))
    return q, k, x @ weight[turned_width:].T, factors


@torch.library.custom_op("auto_log_research::product_gradients", mutates_args=())
def _product_gradients(parts: list[Tensor], x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and W, from that of x W^T in parts; where these lie side by side they are taken as one."""
    width, ends = len(weight), [part.data_ptr() + part[0].nbytes for part in parts]
    are_adjacent = [part.data_ptr() for part in parts[1:]] == ends[:-1]
    if are_adjacent and all(part.stride() == (width, 1) for part in parts):
        parts = [parts[0].as_strided((len(x), width), (width, 1))]
    weights = weight.split([part.size(1) for part in parts])
    dx = parts[0] @ weights[0]
    for part, rows in zip(parts[1:], weights[1:], strict=True):
        dx.addmm_(part, rows)
    return dx, torch.cat([part.T @ x for part in parts])


_product_gradients.register_fake(lambda parts, x, weight: (x.new_empty(x.shape), weight.new_empty(weight.shape)))
_turned_products.register_autograd(
    lambda ctx, dq, dk, dv, _: (*_product_gradients([dq, dk, dv], *ctx.saved_tensors), *[None] * 4),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]),
)
_turned_products.register_fake(
    lambda x, weight, cos, sin, *widths: (
        *(x.new_empty(len(x), n) for n in (*widths, len(weight) - sum(widths))),
        x.new_empty((len(x), sum(widths) // cos.size(2)), dtype=torch.float32),
    )
)


class _Turned(torch.autograd.Function):
    """Of queries or keys y that `turn` made, as they are; the gradient is that of what they were before."""

    @staticmethod
    def forward(ctx, y: Tensor, factors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(y, factors, cos, sin)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        y, factors, cos, sin = ctx.saved_tensors
        dx = (dy.float() - y * (dy.float() * y).mean(-1, keepdim=True)) * factors.unsqueeze(-1)
        return (dx * cos - dx.roll(y.size(-1) // 2, -1) * sin).to(y.dtype), None, None, None


@torch.library.custom_op("auto_log_research::relu2_product", mutates_args=())
def _multiply_relu2(a: Tensor, b: Tensor, post: Tensor | None) -> Tensor:
    (M, K), N = a.shape, len(b)
    out = a.new_empty(M, N)
    other, finish = (out, "forward") if post is None else (post, "backward")
    if K <= MAX_STRIP_WIDTH and gluon and a.is_cuda:
        _launch_strips(a, b, out, other, finish)
        return out
    a_tiles, b_tiles = (_tiles(t, MLP_TILE, MLP_TILE_K) for t in (a, b))
    out_tiles, post_tiles = (_tiles(t, MLP_TILE, MLP_TILE) for t in (out, other))
    grid = (triton.cdiv(N, MLP_TILE), triton.cdiv(M, MLP_TILE))
    sizes = [K, post is not None, MLP_TILE, MLP_TILE_K]
    _relu2_product[grid](a_tiles, b_tiles, out_tiles, post_tiles, *sizes, num_warps=4, num_stages=3)
    return out


@torch.library.custom_op("auto_log_research::relu2_mlp", mutates_args=())
def _relu2_mlp(x: Tensor, w_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
    kernels_used.add("mlp")
    post = _multiply_relu2(x, w_in, None)
    return post @ w_out.T, post


def _mlp_gradients(ctx, dout, _):
    x, w_in, w_out, post = ctx.saved_tensors
    dpre = _multiply_relu2(dout, w_out.T, post)
    return dpre @ w_in, dpre.T @ x, dout.T @ post


_multiply_relu2.register_fake(lambda a, b, post: a.new_empty(len(a), len(b)))
_relu2_mlp.register_autograd(
    _mlp_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output[1])
)
_relu2_mlp.register_fake(lambda x, w_in, w_out: (x.new_empty(len(x), len(w_out)), x.new_empty(len(x), len(w_in))))


def relu2_mlp(x: Tensor, c_in: Linear, c_out: Linear) -> Tensor:
    """c_out(relu(c_in(x)) ** 2), x: (..., width). Fused where gradients are wanted and widths are
    multiples of 8, as the copy engine demands."""
    fits = _can_fuse(x, c_in, c_out) and has_kernels(x.device) and torch.is_grad_enabled()
    if not fits or any(n % 8 for n in (*c_in.weight.shape, *c_out.weight.shape)):
        return c_out(torch.nn.functional.relu(c_in(x)).square())
    out, _ = _relu2_mlp(x.reshape(-1, x.size(-1)), c_in.weight.to(x.dtype), c_out.weight.to(x.dtype))
    return out.view(*x.shape[:-1], -1)


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
    if torch.version.cuda and block <= 2**14:
        options["maxnreg"] = 80  # at 8192 columns three programs a multiprocessor, not two: 3.0 TB/s, not 2.6
    _softcap_loss[(len(x),)](logits, targets.contiguous(), losses, vocab, cap, block, block == vocab, **options)
    return losses, logits


def _loss_gradients(ctx, dlosses, _):
    x, weight, dlogits = ctx.saved_tensors
    factor = dlosses.unsqueeze(1)
    return (dlogits @ weight * factor).to(x.dtype), dlogits.T @ (x * factor).to(x.dtype), None, None


_head_loss.register_autograd(
    _loss_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2], output[1])
)
_head_loss.register_fake(
    lambda x, weight, *_: (x.new_empty(len(x), dtype=torch.float32), x.new_empty(len(x), len(weight)))
)


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """Logits within +- cap; as they are if the cap is None, 0 or infinite."""
    return cap * torch.tanh(logits / cap) if cap and math.isfinite(cap) else logits


def softcap_loss(x: Tensor, head: Linear, targets: Tensor, cap: float | None) -> Tensor:
    """Cross-entropy (N,) in nats of the logits softcap(head(x), cap), x: (N, width); 0 where the target is
    -1. Logits have the product's own precision, all that follows is fp32. Fused on any GPU with Triton."""
    if not (_can_fuse(x, head) and head.out_features <= MAX_FUSED_VOCAB and 0 < (cap or 0) <= MAX_FUSED_CAP):
        logits = softcap(head(x).float(), cap)
        return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    return _head_loss(x, head.weight.to(x.dtype), targets, cap)[0]


def can_attend_window(seq_len: int, head_dim: int, device: torch.device) -> bool:
    return seq_len > 0 and seq_len % ATTENTION_TILE == 0 and head_dim in (64, 128) and has_kernels(device)


def sdpa_order() -> list[SDPBackend]:
    """Whose scaled_dot_product_attention to take, the first that can. The full context, 128 x 2048 x 4
    heads, forward and backward on Hopper: cuDNN 4.3 ms, FlashAttention-2 7.3."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return order if torch.cuda.get_device_capability() >= (9, 0) else order[1:]


def make_attention(window: int, seq_len: int, head_dim: int, device: torch.device) -> tuple[str, Callable]:
    """The fastest exact attention here: its name, and a function of q (B, T, H, D), k and v (B, T, KV, D)
    and, if q and k are to be `turn`ed before, of rotary tables. Causal; a query sees itself and `window`
    positions before it. T may be less than `seq_len`. `sdpa_order()` is to be set around the model."""
    if window < seq_len - 1:
        name = "kernel window" if can_attend_window(seq_len, head_dim, device) else "masked window"
        return name, functools.partial(window_attention, window=window)
    backend = sdpa_order()[0].name.lower().removesuffix("_attention") if device.type == "cuda" else "sdpa"
    return f"{backend} full", functools.partial(plain_attention, is_causal=True)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, **mask):
    if cos is not None:
        q, k = turn(q, cos, sin), turn(k, cos, sin)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=q.size(1) != k.size(1), **mask)
    return out.transpose(1, 2)


def _fits_kernels(
    q_shape: tuple, k_shape: tuple, v_shape: tuple, cos: Tensor | None, sin: Tensor | None, device: torch.device
) -> bool:
    B, T, H, D = q_shape
    for table in (cos, sin):
        if table is not None and (table.shape != (T, 1, D) or not table.is_contiguous() or table.requires_grad):
            return False
    fits = k_shape == v_shape == (B, T, v_shape[2], D) and math.prod(v_shape) > 0 and H > 0 and H % v_shape[2] == 0
    return fits and can_attend_window(T, D, device)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, *, window: int
) -> Tensor:
    """What `make_attention` gives. With a window of 1024 the kernel takes 4.2 ms, FlashAttention-2 6.2."""
    if not _fits_kernels(q.shape, k.shape, v.shape, cos, sin, v.device):
        positions = torch.arange(q.size(1), device=q.device)
        age = positions[:, None] - positions
        return plain_attention(q, k, v, cos, sin, attn_mask=(age >= 0) & (age <= window))
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    if cos is None:
        return _window_attention(q, k, v, q, k, None, None, None, None, window)[0]
    turned = [turn(t.detach(), cos, sin).bfloat16() for t in (q, k)]
    eps = torch.finfo(torch.float32).eps
    factors = [torch.rsqrt(t.detach().float().square().mean(-1) + eps) for t in (q, k)]
    return _window_attention(q, k, v, *turned, *factors, cos, sin, window)[0]


def project(
    attend: Callable, x: Tensor, c_q: Linear, c_k: Linear, c_v: Linear, D: int, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Callable]:
    """v = c_v(x), x (B, T, width), in heads of D, and a function of such a v: attend(c_q(x), c_k(x), v, cos, sin).
    In training, up to a width of 512, with heads of 128 and an attention as `make_attention` gave it, queries
    and keys are turned before their product is stored."""
    (B, T, width), linears = x.shape, (c_q, c_k, c_v)

    def attend_plain(v):
        return attend(c_q(x).view(B, T, -1, D), c_k(x).view(B, T, -1, D), v, cos, sin)

    kind, options = getattr(attend, "func", None), getattr(attend, "keywords", {})
    is_known = kind is window_attention or (kind is plain_attention and options == {"is_causal": True})
    is_strip = gluon and width % 8 == 0 and width <= MAX_STRIP_WIDTH and STRIP_TILE[1] == D and cos is not None
    fits = is_known and is_strip and torch.is_grad_enabled() and _can_fuse(x, *linears)
    fits = fits and not any(linear.out_features % D for linear in linears)
    shapes = [(B, T, linear.out_features // D, D) for linear in linears] if fits else []
    if not fits or not _fits_kernels(*shapes, cos, sin, x.device):
        return c_v(x).view(B, T, -1, D), attend_plain
    weight = torch.cat([linear.weight for linear in linears]).to(x.dtype)
    *products, factors = _turned_products(x.reshape(-1, width), weight, cos, sin, c_q.out_features, c_k.out_features)
    q, k, v = (product.view(shape) for product, shape in zip(products, shapes, strict=True))
    q_factors, k_factors = factors.view(B, T, -1).split([q.size(2), k.size(2)], dim=2)

    def attend_turned(v):
        if v.shape != shapes[2]:
            return attend_plain(v)
        if kind is window_attention:
            return _window_attention(q, k, v.bfloat16(), q, k, q_factors, k_factors, cos, sin, options["window"])[0]
        return attend(_Turned.apply(q, q_factors, cos, sin), _Turned.apply(k, k_factors, cos, sin), v)

    return v, attend_turned


# -------------------------------------------------------------------------------------------------
# Main
# -------------------------------------------------------------------------------------------------


def prepare(source: Path | None, num_shards: int, download_workers: int, text_key: str = "text") -> dict:
    """Bring the cache up to date. Returns its manifest."""
    if source is not None:
        source = source.expanduser()
        return encode_source(str(source.resolve()), find_source_files(source), text_key)
    if DEMO:
        path = DATA_DIR / "python-library.jsonl"
        if not path.exists():
            write_demo_text(path)
        return encode_source(str(path), {path.name: path})
    manifest, numbers = read_manifest(), range(MAX_SHARD if num_shards == -1 else num_shards)
    if manifest:
        check_same_data(manifest, CLIMBMIX, {})  # before anything is downloaded
    shards = manifest.get("shards", {})
    wanted = {*shards, *(f"shard_{i:05d}.parquet" for i in numbers), VAL_FILENAME}
    missing = sorted(name for name in wanted if not is_intact(name, shards.get(name)))
    download_shards(missing, DATA_DIR, download_workers)
    # Shards beyond the wanted ones are used too, as upstream uses whatever its folder holds.
    return encode_source(CLIMBMIX, {path.name: path for path in sorted(DATA_DIR.glob("shard_*.parquet"))})


def print_warnings(manifest: dict) -> None:
    """What was left out of the text, and how often the score repeats itself."""
    shards, val = manifest["shards"].values(), num_tokens(manifest, "val")
    if num_bad := sum(shard["bad"] for shard in shards):
        num_lines = num_bad + sum(shard[split]["documents"] for shard in shards for split in SPLITS)
        first = next(line for shard in shards for line in shard["first_bad"])
        print(f"warning: {num_bad:,} of {num_lines:,} lines were left out; the first: {first}", file=sys.stderr)
    if (times := EVAL_TOKENS / val) > 1:
        there = f"{EVAL_TOKENS:,} validation tokens are scored, and there are {val:,}"
        effect = f"each counts about {times:.0f} times, and small differences mean little"
        mb = sum(shard["size"] for shard in shards) / 1e6
        wanted = f"{times:.0f} times as much text (now {mb:.3g} MB)"
        print(f"warning: {there}: {effect}. Wanted: {wanted}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch or bring text, train the tokenizer, encode every token once.")
    parser.add_argument("--source", type=Path, help=f"your own text: a file or folder of {', '.join(SOURCE_SUFFIXES)}")
    parser.add_argument("--text-key", default="text", help="key or column that holds the text of your own files")
    parser.add_argument("--num-shards", type=int, default=10, help="climbmix training shards to download; -1 for all")
    parser.add_argument("--download-workers", type=int, default=8, help="shards downloaded at the same time")
    args = parser.parse_args()
    if not (args.num_shards == -1 or 1 <= args.num_shards <= MAX_SHARD) or args.download_workers < 1:
        parser.error(f"--num-shards takes -1 or 1 to {MAX_SHARD}, --download-workers at least 1")
    try:
        CACHE_DIR.mkdir(parents=True, exist_ok=True)
        with open(CACHE_DIR / ".lock", "w") as lock:  # goes with the process, however it ends
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            manifest = prepare(args.source, args.num_shards, args.download_workers, args.text_key)
    except (SetupError, OSError) as e:
        is_busy = isinstance(e, BlockingIOError)
        reason = f"another prepare.py is at work on {CACHE_DIR}; wait for it to finish" if is_busy else e
        print("error:", *str(reason).splitlines(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        sys.stdout.flush()
        print("\nerror: interrupted; call again to go on from here", file=sys.stderr, flush=True)
        os._exit(130)  # an ordinary exit would wait for download threads
    print_warnings(manifest)
    print(f"ready: {CACHE_DIR} holds {manifest['source']}, fingerprint {manifest['fingerprint']}")
    train, val = (num_tokens(manifest, split) for split in SPLITS)
    print(f"       {train:,} training tokens, {val:,} validation tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
