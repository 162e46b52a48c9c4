#!/usr/bin/env python3
"""A scripted stand-in for a headless agent: reads program.md from standard input and does what it says.

It knows no more than its prompt, `status` and the archive. The number of runs in the archive says which experiment is
next, so a new start takes up where a killed one was. It executes the prompt's own code blocks and notes which. The slow
steps, 4 to 6, it does for the run before while the next one trains.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ARCHIVE = Path(os.environ.get("AUTO_LOG_RESEARCH_DIR", ".auto-log-research")) / "demo"
COMMANDS = "uv run analyze.py "

# (what to replace in train.py, a pattern; by what; decision), one an experiment.
CRASH = (r"nn\.Linear\(hidden, width,", "nn.Linear(hidden + 1, width,")
EXPERIMENTS = [
    (None, None, "keep"),  # the baseline
    (None, None, "keep"),  # `rerun`: the test kills the agent, and the run goes on
    (*CRASH, "discard"),
    (r"unembedding_lr: float = [\d.]+", "unembedding_lr: float = 0.0", "discard"),  # CRASH again is refused first
    (r"warmdown_ratio: float = [\d.]+", "warmdown_ratio: float = 0.61", None),  # the test kills the agent and the run
    (None, None, "keep"),  # so the idea was not tested: once more
]
RERUN, REPEAT, KILLED = 1, 3, 4


def edited(text: str, pattern: str, new: str) -> str:
    text, num = re.subn(pattern, new, text)
    assert num == 1, f"{pattern} is {num} times in train.py"
    return text


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of every fenced block, without the indentation of the list that it stands in."""
    found = re.findall(r"^( *)```(\w+)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [(kind, re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)) for indent, kind, code in found]


def note(line: str) -> None:
    ARCHIVE.mkdir(parents=True, exist_ok=True)
    with open(ARCHIVE / "executed.txt", "a") as f:
        f.write(line + "\n")


def shell(command: str) -> int:
    return subprocess.run(["bash", "-c", command], stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT).returncode


class Agent:
    def __init__(self, prompt: str):
        self.blocks = code_blocks(prompt)

    def follow(self, words: str, edit=lambda code: code) -> int:
        """Execute the one block that contains `words`."""
        (i,) = [i for i, (_, code) in enumerate(self.blocks) if words in code]
        kind, code = self.blocks[i]
        command = ["bash", "-c", edit(code)] if kind == "bash" else ["uv", "run", "python", "-c", code]
        status = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT).returncode
        print(f"--- block {i}, exit code {status}", flush=True)
        note(f"{i} {status}")
        return status

    def status(self) -> tuple[int, list[str], str]:
        """How many runs the archive has, the names of the last, and what is next."""
        page = subprocess.check_output([*COMMANDS.split(), "status"], text=True)
        last = re.search(r"^last runs:\n((?:  .*\n)*)", page, re.MULTILINE)[1]
        names = [line.split()[0] for line in last.splitlines()]
        return int(re.search(r"^archive: (\d+) run", page, re.MULTILINE)[1]), names, page.splitlines()[-1]

    def implement(self, done: int) -> None:
        """Step 8: edit, check, commit."""
        pattern, new, _ = EXPERIMENTS[done]
        if done == RERUN:
            return
        if done == REPEAT:
            before = Path("train.py").read_text()
            Path("train.py").write_text(edited(before, *CRASH))
            assert shell(COMMANDS + "check") == 1  # tried before: not worth five minutes
            Path("train.py").write_text(before)
        if pattern:
            Path("train.py").write_text(edited(Path("train.py").read_text(), pattern, new))
            assert self.follow("analyze.py check") == 0
            self.follow("git commit", lambda code: code.replace("warmdown 0.5 -> 0.7", new))

    def train(self, done: int) -> None:
        """Step 2: in the background; back when it has begun."""
        earlier = Path("run_start.json").read_text() if Path("run_start.json").exists() else ""
        if done == RERUN:
            said = subprocess.check_output([*COMMANDS.split(), "rerun"], text=True)
            command = said.rpartition("next: ")[2].strip()
            assert command.startswith("AUTORESEARCH_SEED_OFFSET=1 AUTORESEARCH_DEMO=1 setsid timeout"), said
            shell(command)
        else:
            budget = "export AUTORESEARCH_TIME_BUDGET=600; " if done == KILLED else ""  # time enough to be killed in
            self.follow("setsid timeout", lambda code: budget + code)
        while (Path("run_start.json").read_text() if Path("run_start.json").exists() else "") == earlier:
            time.sleep(0.1)

    def think(self) -> None:
        """Steps 4 to 6 for the runs that were filed and not thought about yet."""
        done = (ARCHIVE / "insights.md").read_text()
        for name in [name for name in self.status()[1] if f" {name} " not in done]:
            self.follow("load_runs()")
            for path, line in (
                (ARCHIVE / name / "analysis.md", f"Expected nothing, saw {name}.\n"),
                (ARCHIVE / "insights.md", f"- the stand-in learned from {name} ({name})\n"),
                (ARCHIVE / "ideas_queue.md", f"- one after {name} | more | -0.001 | not better\n"),
            ):
                with open(path, "a") as f:
                    f.write(line)

    def analyze_and_decide(self, done: int) -> None:
        """Steps 3 and 7."""
        self.follow("analyze.py --wait")
        if EXPERIMENTS[done][2]:
            self.follow(f"analyze.py {EXPERIMENTS[done][2]}")

    def work(self) -> None:
        self.follow("analyze.py status")
        self.follow("for script in")
        if self.status()[2].endswith("analyze.py start"):
            shell(COMMANDS + "start")
        num_runs, _, todo = self.status()
        if "analyze.py --wait" in todo or todo.endswith("uv run analyze.py"):  # the run outlived its agent
            self.analyze_and_decide(num_runs)
        for done in range(self.status()[0], len(EXPERIMENTS)):
            self.implement(done)
            self.follow("analyze.py status")
            self.train(done)
            self.think()
            self.analyze_and_decide(done)
        self.think()
        (ARCHIVE.parent / "STOP").touch()


if __name__ == "__main__":
    assert sys.argv[1] == "-p", sys.argv
    os.setpgrp()  # so that the test can kill it without killing the loop around it
    ARCHIVE.mkdir(parents=True, exist_ok=True)
    (ARCHIVE / "agent.pid").write_text(str(os.getpid()))
    try:
        Agent(sys.stdin.read()).work()
    except Exception:
        (ARCHIVE.parent / "STOP").touch()  # it would fail again and again
        raise
