#!/usr/bin/env python3
"""A scripted stand-in for a headless agent: reads program.md from standard input and does what it says.

It knows no more than its prompt and the archive. The number of runs in the archive says which experiment is next, so a
new start takes up where a killed one was. It executes the prompt's own code blocks and notes which.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ARCHIVE = Path(os.environ.get("AUTO_LOG_RESEARCH_DIR", ".auto-log-research"))

# (what to replace in train.py, a pattern; by what; decision), one an experiment; None: the same commit again.
EXPERIMENTS = [
    (None, None, "keep"),
    (None, None, "keep"),  # the test kills the agent, and the run goes on
    (r"nn\.Linear\(hidden, width,", "nn.Linear(hidden + 1, width,", "discard"),
    (r"unembedding_lr: float = [\d.]+", "unembedding_lr: float = 0.0", "discard"),
    (r"warmdown_ratio: float = [\d.]+", "warmdown_ratio: float = 0.61", None),  # the test kills the agent and the run
    (None, None, "keep"),  # so the idea was not tested: once more
]
KILLED = 4


def edited(text: str, pattern: str, new: str) -> str:
    text, num = re.subn(pattern, new, text)
    assert num == 1, f"{pattern} is {num} times in train.py"
    return text


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of every fenced block, without the indentation of the list that it stands in."""
    found = re.findall(r"^( *)```(\w+)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [(kind, re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)) for indent, kind, code in found]


class Agent:
    def __init__(self, prompt: str):
        self.blocks = code_blocks(prompt)

    def follow(self, words: str, edit=lambda code: code) -> None:
        """Execute the one block that contains `words`."""
        (i,) = [i for i, (_, code) in enumerate(self.blocks) if words in code]
        kind, code = self.blocks[i]
        command = ["bash", "-c", edit(code)] if kind == "bash" else ["uv", "run", "python", "-c", code]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        print(f"--- block {i}, exit code {done.returncode}", flush=True)
        with open(ARCHIVE / "executed.txt", "a") as f:
            f.write(f"{i} {done.returncode}\n")

    def status(self) -> dict:
        return json.loads(subprocess.check_output(["uv", "run", "analyze.py", "status", "--json"], text=True))

    def set_up(self) -> None:
        self.follow("git branch --list")
        if not (ARCHIVE / "results.tsv").exists():
            for words in ("git switch --create", "load_manifest", "insights.md"):
                self.follow(words)

    def train(self, done: int) -> None:
        pattern, new, _ = EXPERIMENTS[done]
        if pattern:
            Path("train.py").write_text(edited(Path("train.py").read_text(), pattern, new))
            self.follow("git commit", lambda code: code.replace("warmdown 0.5 -> 0.7", new))
        if done != KILLED + 1:
            budget = "export AUTORESEARCH_TIME_BUDGET=600; " if done == KILLED else ""  # time enough to be killed in
            return self.follow('echo "exit code', lambda code: budget + code)
        earlier = Path("run_start.json").read_text()
        self.follow("setsid")
        while Path("run_start.json").read_text() == earlier:  # the minute that the next block waits, shortened
            time.sleep(0.1)
        self.follow("is in progress")

    def file_and_finish(self, done: int) -> None:
        """Steps 3 to 7."""
        self.follow("uv run analyze.py\n")
        if done == 1:  # two runs: something to compare
            for words in ("good = load_runs", "for share in", "layers/names"):
                self.follow(words)
        name = self.status()["last"][-1][0]
        for path, line in (
            (ARCHIVE / name / "analysis.md", f"Expected nothing, saw {name}.\n"),
            (ARCHIVE / "insights.md", f"- the stand-in learned from {name} ({name})\n"),
            (ARCHIVE / "ideas_queue.md", f"- one after {name} | more | -0.001 | not better\n"),
        ):
            with open(path, "a") as f:
                f.write(line)
        if EXPERIMENTS[done][2]:
            self.follow(f"analyze.py {EXPERIMENTS[done][2]}")

    def work(self) -> None:
        self.set_up()
        state = self.status()
        if "is in progress" in state["here"]:  # it outlived the start that began it
            self.follow("is in progress")
        if "in progress" in state["here"] or "is not filed yet" in state["here"]:
            self.file_and_finish(state["num_runs"])
        for done in range(self.status()["num_runs"], len(EXPERIMENTS)):
            self.train(done)
            self.file_and_finish(done)
        (ARCHIVE / "STOP").touch()


if __name__ == "__main__":
    assert sys.argv[1] == "-p", sys.argv
    os.setpgrp()  # so that the test can kill it without killing the loop around it
    ARCHIVE.mkdir(exist_ok=True)
    (ARCHIVE / "agent.pid").write_text(str(os.getpid()))
    try:
        Agent(sys.stdin.read()).work()
    except Exception:
        (ARCHIVE / "STOP").touch()  # it would fail again and again
        raise
