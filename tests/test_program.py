"""program.md and README.md do what they say: a stand-in for an agent follows them, is killed, and resumes."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in_agent import EXPERIMENTS, code_blocks

ROOT = Path(__file__).parent.parent
PROGRAM = (ROOT / "program.md").read_text()
README = (ROOT / "README.md").read_text()


def readme_block(words):
    (block,) = [code for kind, code in code_blocks(README) if kind == "bash" and words in code]
    return block


@pytest.fixture
def checkout(tmp_path):
    """A checkout on which the demo is prepared, with `claude` on the path: (folder, environment)."""
    folder, tools = tmp_path / "checkout", tmp_path / "bin"
    tools.mkdir()
    folder.mkdir()
    for name in ("prepare.py", "train.py", "analyze.py", "program.md", "pyproject.toml", "uv.lock", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    small = (folder / "train.py").read_text().replace("depth=4, aspect_ratio=32", "depth=2, aspect_ratio=32")
    (folder / "train.py").write_text(small)
    for tool in ("claude", "stand_in_agent.py"):
        shutil.copy(ROOT / "tests" / "stand_in_agent.py", tools / tool)
    (tools / "claude").chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AUTORESEARCH_", "AUTO_LOG_RESEARCH_"))}
    env = kept | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "AUTORESEARCH_DEMO": "1",
        "AUTORESEARCH_TIME_BUDGET": "2",
        "AUTORESEARCH_CACHE": str(tmp_path / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "UV_PROJECT_ENVIRONMENT": sys.prefix,  # the real uv, with the packages that the tests themselves run on
        "UV_NO_SYNC": "1",
        "GIT_AUTHOR_NAME": "t",
        "GIT_AUTHOR_EMAIL": "t@example.org",
        "GIT_COMMITTER_NAME": "t",
        "GIT_COMMITTER_EMAIL": "t@example.org",
    }
    text = tmp_path / "text.jsonl"
    words = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "ran", "to", "the", "house"]
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 60)) for i in range(600)]
    text.write_text("\n".join(json.dumps({"text": f"{i}. {line}"}) for i, line in enumerate(lines)))
    for command in (
        ["git", "init", "--quiet", "--initial-branch", "main"],
        ["git", "add", "."],
        ["git", "commit", "--quiet", "--message", "the program as it is"],
        ["uv", "run", "prepare.py", "--source", str(text)],
    ):
        subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
    return folder, env


def rows_of(archive):
    lines = (archive / "results.tsv").read_text().splitlines() if (archive / "results.tsv").exists() else []
    return [line.split("\t") for line in lines[1:]]


def steps_of(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_night_of_six_experiments_survives_a_kill_in_the_middle(checkout):
    folder, env = checkout
    archive = folder / ".auto-log-research"
    loop = readme_block("claude -p").replace("sleep 10", "sleep 0")
    night = subprocess.Popen(["bash", "-c", loop], cwd=folder, env=env)
    try:
        # The fifth experiment is training: kill the agent, and then what it has started.
        start, agent = folder / "run_start.json", 0
        while not (len(rows_of(archive)) == 4 and not (folder / "run_summary.json").exists() and steps_of(folder) >= 2):
            with contextlib.suppress(subprocess.TimeoutExpired):
                night.wait(timeout=0.05)
            assert night.returncode is None, (archive / "agent.log").read_text()
        agent, run = int((archive / "agent.pid").read_text()), json.loads(start.read_text())
        os.killpg(agent, signal.SIGKILL)
        os.kill(run["pid"], signal.SIGKILL)
        assert night.wait(timeout=240) == 0, (archive / "agent.log").read_text()
    finally:
        night.kill()
    assert int((archive / "agent.pid").read_text()) != agent  # a second start did the rest

    log = (archive / "agent.log").read_text()
    rows = rows_of(archive)
    assert [row[3] for row in rows] == ["keep", "keep", "crash", "discard", "crash", "keep"], log
    baseline = rows[0][0]
    assert rows[1][0] == f"{baseline}.2"
    assert [row[1] == "0.000000" for row in rows] == [False, False, True, False, True, False]
    assert float(rows[3][1]) > float(rows[0][1])  # an output layer that never learns
    assert rows[4][0] == run["git_commit"][:7]
    assert [row[4] for row in rows[2:]] == [
        f"{old} -> {new}: longer decay, expect -0.0006" for old, new, _ in EXPERIMENTS[2:]
    ]
    for row in rows:
        kept = archive / row[0]
        assert (kept / "train.py").exists()
        assert (kept / "analysis.md").read_text().endswith(f"Expected nothing, saw {row[0]}.\n")
    assert (archive / "insights.md").read_text().count("- the stand-in learned from") == 6
    # Each discard brought the best train.py back: the last run differs from the baseline by its own change alone.
    best = (archive / baseline / "train.py").read_text()
    assert (folder / "train.py").read_text() == best.replace(*EXPERIMENTS[5][:2])
    assert subprocess.check_output(["git", "status", "--porcelain"], cwd=folder, env=env, text=True) == ""
    branch = subprocess.check_output(["git", "branch", "--show-current"], cwd=folder, env=env, text=True)
    assert re.fullmatch(r"autoresearch/[a-z]{3}\d\d\n", branch)
    # Every block of program.md was executed.
    executed = {int(line) for line in (archive / "executed.txt").read_text().split()}
    assert executed == set(range(len(code_blocks(PROGRAM))))


def test_the_instructions_stay_short():
    assert len(PROGRAM.splitlines()) <= 200


def test_worktrees_share_one_archive(checkout):
    folder, env = checkout
    subprocess.run(["bash", "-euc", readme_block("git worktree add")], cwd=folder, env=env, check=True)
    shared = env | {"AUTO_LOG_RESEARCH_DIR": str(folder / ".auto-log-research")}
    script = "uv run train.py > run.log 2>&1; uv run analyze.py"
    runs = [
        subprocess.Popen(["bash", "-c", script], cwd=folder.parent / f"auto-log-research-gpu{gpu}", env=shared)
        for gpu in (0, 1)
    ]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    head = subprocess.check_output(["git", "rev-parse", "--short=7", "HEAD"], cwd=folder, env=env, text=True).strip()
    assert sorted(row[0] for row in rows_of(folder / ".auto-log-research")) == [head, f"{head}.2"]
    assert not (folder.parent / "auto-log-research-gpu0" / ".auto-log-research").exists()
