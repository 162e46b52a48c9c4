"""What several tests need: a cache of their own, the real commands, a web server that misbehaves as told, and
attention as it is defined."""

import hashlib
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

os.environ["AUTORESEARCH_CACHE"] = f"{tempfile.gettempdir()}/auto-log-research-tests"  # nobody's real cache
import torch  # isort: skip

import prepare

ROOT = Path(__file__).parent.parent
VAL = "shard_06542.parquet"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder that prepare's functions work on, and an empty working folder."""
    folder, work = tmp_path / "cache", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    monkeypatch.setattr(prepare, "CACHE_DIR", folder)
    monkeypatch.setattr(prepare, "DATA_DIR", folder / "data")
    monkeypatch.setattr(prepare, "TOKENIZER_DIR", folder / "tokenizer")
    monkeypatch.setattr(prepare, "TOKENS_DIR", folder / "tokens")
    monkeypatch.setattr(prepare, "MANIFEST_PATH", folder / "manifest.json")
    monkeypatch.setattr(prepare, "get_device", lambda: torch.device("cpu"))
    monkeypatch.delenv("AUTO_LOG_RESEARCH_DIR", raising=False)
    monkeypatch.chdir(work)
    prepare.load_manifest.cache_clear()
    return folder


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


def explicit_attention(q, k, v, window):
    """softmax(q k^T / sqrt(D)) v over the keys from `window` positions before the query up to itself, in float64."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
    scores = q @ k.mT / math.sqrt(q.size(-1))
    for i in range(q.size(2)):
        scores[:, :, i, i + 1 :] = -math.inf
        scores[:, :, i, : max(i - window, 0)] = -math.inf
    return (scores.softmax(-1) @ v).transpose(1, 2)


def command_env(cache_dir: Path, **variables: str) -> dict[str, str]:
    """The environment of a real command: this one's, without what would change what the command does."""
    ours = ("AUTORESEARCH_", "AUTO_LOG_RESEARCH_", "HF_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return kept | {"AUTORESEARCH_CACHE": str(cache_dir), "NO_PROXY": "*", "PYTHONPATH": str(ROOT)} | variables


def run_command(cache_dir: Path, *args: object, **variables: str) -> subprocess.CompletedProcess:
    """Run `python ARGS` to its end, with the cache at `cache_dir`."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cache_dir.parent,
        env=command_env(cache_dir, **variables),
        capture_output=True,
        text=True,
        timeout=120,
    )


class Server(ThreadingHTTPServer):
    """Serves `files` (name: bytes). Each GET of a name plays the next act in `acts[name]`, or serves the file
    well when there is none. Requests are noted as (method, name, Range header)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.acts: dict[str, list] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.is_over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self, name: str) -> list[str | None]:
        """The Range headers with which a file was asked for."""
        return [wanted for method, other, wanted in self.requests if method == "GET" and other == name]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self._note()
        acts = self.server.acts.get(name, [])
        act = acts.pop(0) if acts else serve()
        act(self, self.server.files.get(name))

    def _note(self) -> str:
        prefix = "/datasets/karpathy/climbmix-400b-shuffle/resolve/main/"
        name = self.path.removeprefix(prefix) if self.path.startswith(prefix) else f"wrong path {self.path}"
        self.server.requests.append((self.command, name, self.headers.get("Range")))
        return name

    def reply(self, status: int, headers: dict | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *args):
        pass


def serve(num_bytes=None, *, ranges=True, tag="ETag", heeds_if_range=True, then_stall=False):
    """Serve the file, or only `num_bytes` of what the headers promise; then close, or keep the client waiting. `tag`
    is the header, if any, that tells one file from another of the same name."""

    def act(handler: Handler, body: bytes | None) -> None:
        if body is None:
            return handler.reply(404)
        this = f'"{hashlib.sha256(body).hexdigest()}"'
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "")) if ranges else None
        if heeds_if_range and handler.headers.get("If-Range", this) != this:
            wanted = None
        first = int(wanted[1]) if wanted else 0
        if wanted and first >= len(body):
            return handler.reply(416, {"Content-Range": f"bytes */{len(body)}"})
        headers = {"Content-Length": len(body) - first} | ({tag: this} if tag else {})
        if wanted:
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
        handler.reply(206 if wanted else 200, headers, body[first : None if num_bytes is None else first + num_bytes])
        if then_stall:
            handler.server.is_over.wait()

    return act


def answer(status: int, headers: dict | None = None, body: bytes = b""):
    return lambda handler, _: handler.reply(status, headers, body)


@pytest.fixture
def server(monkeypatch):
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "*")
    yield server
    server.is_over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The cache folder and the output of the real demo command, run once. No proxy leads out: there is no network."""
    folder = tmp_path_factory.mktemp("demo") / "cache"
    nowhere = {key: "http://127.0.0.1:9" for key in ("HF_ENDPOINT", "http_proxy", "https_proxy")}
    done = run_command(folder, ROOT / "prepare.py", AUTORESEARCH_DEMO="1", **nowhere)
    return folder, done
