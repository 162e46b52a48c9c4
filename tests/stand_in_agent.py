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
from pathlib import Path

ARCHIVE = Path(os.environ.get("AUTO_LOG_RESEARCH_DIR", ".auto-log-research"))

# (what to replace in train.py, by what, decision), one an experiment; None: the same commit again.
EXPERIMENTS = [
    (None, None, "keep"),
    (None, None, "keep"),
    ("self.c_proj(F.relu(self.c_fc(x)).square())", "self.c_proj(self.c_fc(x)[..., :-1])", "discard"),
    ("unembedding_lr: float = 0.004", "unembedding_lr: float = 0.0", "discard"),
    ("final_lr_frac: float = 0.0", "final_lr_frac: float = 0.2", "discard"),  # killed half-way by the test
    ("warmdown_ratio: float = 0.5", "warmdown_ratio: float = 0.7", "keep"),
]


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of every fenced block, without the indentation of the list that it stands in."""
    found = re.findall(r"^( *)```(\w+)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [(kind, re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)) for indent, kind, code in found]


class Agent:
    def __init__(self, prompt: str):
        self.blocks = code_blocks(prompt)

    def follow(self, words: str, edit=lambda code: code) -> str:
        """Execute the one block that contains `words`."""
        (i,) = [i for i, (_, code) in enumerate(self.blocks) if words in code]
        kind, code = self.blocks[i]
        command = ["bash", "-c", edit(code)] if kind == "bash" else ["uv", "run", "python", "-c", code]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(f"--- block {i}, exit code {done.returncode}\n{done.stdout}", flush=True)
        ARCHIVE.mkdir(exist_ok=True)
        with open(ARCHIVE / "executed.txt", "a") as f:
            f.write(f"{i}\n")
        return done.stdout

    def status(self) -> dict:
        return json.loads(subprocess.check_output(["uv", "run", "analyze.py", "status", "--json"], text=True))

    def set_up(self) -> None:
        self.follow("uv run analyze.py status")
        if not (ARCHIVE / "results.tsv").exists():
            self.follow("git switch --create")
            self.follow("load_manifest")

    def implement(self, old: str, new: str) -> None:
        text = Path("train.py").read_text()
        assert text.count(old) == 1, old
        Path("train.py").write_text(text.replace(old, new))
        self.follow("git commit", lambda code: code.replace("warmdown 0.5 -> 0.7", f"{old} -> {new}"))

    def file_and_finish(self, decision: str) -> None:
        """Steps 3 to 7."""
        self.follow("uv run analyze.py\n")
        if len((ARCHIVE / "results.tsv").read_text().splitlines()) == 3:  # two runs: something to compare
            for words in ("good = runs", "for share in", "layers/names"):
                self.follow(words)
        name = self.status()["last"][-1][0]
        with open(ARCHIVE / name / "analysis.md", "a") as f:
            f.write(f"Expected nothing, saw {name}.\n")
        with open(ARCHIVE / "insights.md", "a") as f:
            f.write(f"- the stand-in learned from {name} ({name})\n")
        (ARCHIVE / "ideas_queue.md").write_text("- one | more | -0.001 | not better\n")
        self.follow(f"analyze.py {decision}")

    def work(self) -> None:
        self.set_up()
        while True:
            state = self.status()
            done = state["num_runs"]
            if "is not filed yet" in state["here"]:  # an earlier start was cut off after or in the middle of training
                self.file_and_finish(EXPERIMENTS[done][2])
                continue
            if done == len(EXPERIMENTS):
                (ARCHIVE / "STOP").touch()
                return
            old, new, decision = EXPERIMENTS[done]
            if old:
                self.implement(old, new)
            if done == 5:
                self.follow("setsid")
                self.follow("tail --pid")
            else:
                self.follow('echo "exit code')
            self.file_and_finish(decision)


if __name__ == "__main__":
    assert sys.argv[1] == "-p", sys.argv
    os.setpgrp()  # so that the test can kill it without killing the loop around it
    ARCHIVE.mkdir(exist_ok=True)
    (ARCHIVE / "agent.pid").write_text(str(os.getpid()))
    Agent(sys.stdin.read()).work()
