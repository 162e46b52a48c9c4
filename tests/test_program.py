"""program.md and README.md do what they say: a stand-in for an agent follows them, is killed, and resumes."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_in_agent import EXPERIMENTS, KILLED, code_blocks, edited

ROOT = Path(__file__).parent.parent
PROGRAM = (ROOT / "program.md").read_text()
README = (ROOT / "README.md").read_text()
PATIENCE_S = 300  # for a step of a test on a machine that is busy with other things


def readme_block(words):
    (block,) = [code for kind, code in code_blocks(README) if kind == "bash" and words in code]
    return block


def readme_command(words):
    """A command in the running text."""
    (command,) = [code for code in re.findall(r"`([^`\n]+)`", README) if code.startswith(words)]
    return command


def put_tool(folder, name, script):
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)


def wait_until(is_so, process, log):
    """Wait for a condition that a process brings about; fail with its log if it ends, or takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.02)
        assert process.returncode is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache with a little text, prepared by the README's command for data of one's own: (folder, environment)."""
    folder = tmp_path_factory.mktemp("program")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AUTORESEARCH_", "AUTO_LOG_RESEARCH_", "SLURM_"))}
    env = kept | {
        "AUTORESEARCH_DEMO": "1",
        # No step of some 65 ms is a fifth of it even on a busy machine, and fewer than twenty fit: no pace is judged.
        "AUTORESEARCH_TIME_BUDGET": "1.2",
        "AUTORESEARCH_CACHE": str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # the model is tiny: more threads wait for each other
        "UV_PROJECT_ENVIRONMENT": sys.prefix,  # the real uv, with the packages that the tests themselves run on
        "UV_NO_SYNC": "1",
        "GIT_AUTHOR_NAME": "t",
        "GIT_AUTHOR_EMAIL": "t@example.org",
        "GIT_COMMITTER_NAME": "t",
        "GIT_COMMITTER_EMAIL": "t@example.org",
    }
    words = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "ran", "to", "the", "house"]
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 60)) for i in range(600)]
    text = folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"{i}. {line}"}) for i, line in enumerate(lines)))
    command = readme_block("--source PATH").replace("~/.cache/my-text", "cache").replace("PATH", str(text))
    command = command.replace("=cache", f"={folder}/cache")
    subprocess.run(["bash", "-euc", command], cwd=ROOT, env=env, check=True, capture_output=True)
    return folder / "cache", env


@pytest.fixture
def checkout(cache, tmp_path):
    """A checkout of the program with data, and tools on the path before all others: (folder, environment, tools)."""
    folder, tools, env = tmp_path / "checkout", tmp_path / "bin", cache[1]
    tools.mkdir()
    folder.mkdir()
    for name in ("prepare.py", "train.py", "analyze.py", "program.md", "pyproject.toml", "uv.lock", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    small = (folder / "train.py").read_text().replace("depth: int = 4 if DEMO", "depth: int = 2 if DEMO")
    (folder / "train.py").write_text(small)
    put_tool(tools, "sleep", "#!/bin/sh\nexec /bin/sleep 0.2\n")  # whatever the commands ask for
    env = env | {"PATH": f"{tools}:{env['PATH']}"}
    for command in ("init --quiet --initial-branch main", "add .", "commit --quiet --message start"):
        subprocess.run(["git", *command.split()], cwd=folder, env=env, check=True)
    return folder, env, tools


def rows_of(archive):
    lines = (archive / "results.tsv").read_text().splitlines() if (archive / "results.tsv").exists() else []
    return [line.split("\t") for line in lines[1:]]


def is_training(folder):
    """Whether the steps logged here are of a run that has no score yet. While a start puts the files of the run
    before it away, they look like one, but for the process."""
    if (folder / "run_summary.json").exists() or is_dead(start_of(folder).get("pid")):
        return False
    path = folder / "metrics.jsonl"
    return path.exists() and path.read_bytes().count(b"\n") >= 2


def start_of(folder):
    path = folder / "run_start.json"
    return json.loads(path.read_text()) if path.exists() else {"run_id": None}


def is_dead(pid):
    """Whether the process has ended; nobody may have collected it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def output_of(command, folder, env):
    return subprocess.check_output(command, cwd=folder, env=env, text=True)


def test_a_night_of_six_experiments_survives_two_kills(checkout):
    folder, env, tools = checkout
    for tool in ("claude", "stand_in_agent.py"):
        put_tool(tools, tool, (ROOT / "tests" / "stand_in_agent.py").read_text())
    archive = folder / ".auto-log-research" / "demo"
    log = archive.parent / "agent.log"
    subprocess.run(["bash", "-euc", readme_block("cat > .auto-log-research/night.sh")], cwd=folder, env=env, check=True)
    night = subprocess.Popen(["bash", ".auto-log-research/night.sh"], cwd=folder, env=env)
    try:
        # The second experiment has started: kill the agent; the run goes on.
        wait_until(lambda: start_of(folder)["run_id"], night, log)
        first = start_of(folder)["run_id"]
        wait_until(lambda: len(rows_of(archive)) == 1 and start_of(folder)["run_id"] != first, night, log)
        agents = [int((archive / "agent.pid").read_text())]
        os.killpg(agents[0], signal.SIGKILL)
        # The fifth is training: kill the agent, then what it has started.
        wait_until(lambda: len(rows_of(archive)) == KILLED and is_training(folder), night, log)
        agents.append(int((archive / "agent.pid").read_text()))
        run = start_of(folder)
        os.killpg(agents[1], signal.SIGKILL)
        os.kill(run["pid"], signal.SIGKILL)
        assert night.wait(timeout=PATIENCE_S) == 0, log.read_text()
    finally:
        night.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int((archive / "agent.pid").read_text()), signal.SIGKILL)
    agents.append(int((archive / "agent.pid").read_text()))
    assert len(set(agents)) == 3

    rows = rows_of(archive)
    assert [row[3] for row in rows] == ["keep", "keep", "crash", "discard", "crash", "keep"], log.read_text()
    baseline = rows[0][0]
    assert [row[1] == "0.000000" for row in rows] == [False, False, True, False, True, False]
    assert float(rows[3][1]) > float(rows[0][1])  # an output layer that never learns
    assert rows[4][0] == run["git_commit"][:7]
    assert rows[5][0] == f"{rows[4][0]}.2"
    subjects = [f"{new}: longer decay, expect -0.0006" for _, new, _ in EXPERIMENTS[2 : KILLED + 1]]
    assert [row[4] for row in rows][2:] == [*subjects, subjects[-1]]
    starts = [json.loads((archive / row[0] / "run_start.json").read_text()) for row in rows]
    assert [start["seed_offset"] for start in starts] == [0, 1, 0, 0, 0, 0]
    for row in rows:
        kept = archive / row[0]
        assert (kept / "train.py").exists()
        assert (kept / "analysis.md").read_text().endswith(f"Expected nothing, saw {row[0]}.\n")
        for notes in ("insights.md", "ideas_queue.md"):
            assert (archive / notes).read_text().count(f" {row[0]} ") == 1
    # The slow steps about a run were done while the next one trained, but where an agent was killed over them.
    notes_written = [(archive / row[0] / "analysis.md").stat().st_mtime for row in rows]
    is_beside = [written > start["started_unix"] for written, start in zip(notes_written, starts[1:], strict=False)]
    assert is_beside[2:] == [True, True, True]
    # Each discard brought the best train.py back: the last run differs from the baseline by its own change alone.
    best = (archive / baseline / "train.py").read_text()
    assert (folder / "train.py").read_text() == edited(best, *EXPERIMENTS[KILLED][:2])
    assert output_of(["git", "status", "--porcelain"], folder, env) == ""
    branch = output_of(["git", "branch", "--show-current"], folder, env)
    assert re.fullmatch(r"autoresearch/\d{4}-\d\d-\d\d\n", branch)
    # Every block of program.md was executed, and none failed.
    executed = [line.split() for line in (archive / "executed.txt").read_text().splitlines()]
    assert {int(i) for i, _ in executed} == set(range(len(code_blocks(PROGRAM))))
    assert [code for _, code in executed if code != "0"] == [], log.read_text()


def test_every_command_that_the_instructions_name_exists(checkout):
    folder, env, _ = checkout
    inline = set(re.findall(r"uv run analyze\.py ([a-z-]+)", PROGRAM))
    help_text = output_of(["uv", "run", "analyze.py", "--help"], folder, env)
    known = set(re.search(r"\{([a-z,-]+)\}", help_text)[1].split(",")) | {"--wait"}
    assert {"status", "start", "rerun", "check", "keep", "discard", "compare", "--wait"} == inline
    assert inline <= known


def test_the_words_that_the_instructions_quote_are_printed():
    source = (ROOT / "analyze.py").read_text()
    for word in ("next:", "HAMPERED", "CRASH", "UNPROVEN", "Decision:", "Agent Investigation Notes"):
        assert word.lower() in PROGRAM.lower()
        assert word in source or word.lower() in source


def test_the_demo_runs_as_the_readme_says(checkout, demo):
    folder, env, _ = checkout
    script = readme_block("AUTORESEARCH_DEMO=1 uv run train.py")
    there = {k: v for k, v in env.items() if k != "AUTORESEARCH_DEMO"} | {"AUTORESEARCH_CACHE": str(demo[0])}
    there["AUTORESEARCH_TIME_BUDGET"] = "5"
    said = output_of(["bash", "-euc", script], folder, there)
    assert re.search(r"\*\*(BASELINE|HAMPERED)\*\*: val_bpb ", said)  # a busy machine may hold five seconds up
    assert "demo" in said.splitlines()[0]
    assert [row[3] for row in rows_of(folder / ".auto-log-research" / "demo")] == ["pending"]
    assert rows_of(folder / ".auto-log-research") == []
    # The real night meets none of it.
    assert "best: none yet" in output_of(["uv", "run", "analyze.py", "status"], folder, there)


def estimated_tokens(text: str) -> int:
    """About as many tokens as o200k_base makes of it: 0.97 to 1.15 times, on the pages and scripts counted here.
    (Its merges have to be downloaded, which a test does not do.)"""
    pieces = re.findall(r" ?[A-Za-z]+|\d{1,3}| ?[^\w\s]+|_+|\s+", text)
    return sum(1 + max(len(piece.strip()) - 1, 0) // (9 if piece.strip().isalpha() else 3) for piece in pieces)


def docstring_of(script: str) -> str:
    return re.match(r'""".*?^"""$', (ROOT / script).read_text(), re.DOTALL | re.MULTILINE)[0]


def test_what_an_agent_has_to_read_is_short(checkout):
    folder, env, _ = checkout
    status = output_of(["uv", "run", "analyze.py", "status"], folder, env)
    train = estimated_tokens((ROOT / "train.py").read_text())
    program = estimated_tokens(PROGRAM)
    assert program <= 2_500
    setup = program + train + estimated_tokens(status + docstring_of("prepare.py") + docstring_of("analyze.py"))
    assert setup <= 12_000
    assert program + train + 60 * 35 <= 13_000  # to resume: a status has 60 lines at most
    assert max(len(line) for line in PROGRAM.splitlines() if not line.startswith("   ")) <= 120


def test_a_training_that_hangs_is_ended_with_all_it_started(checkout):
    folder, env, _ = checkout
    (block,) = [code for _, code in code_blocks(PROGRAM) if "setsid timeout" in code]
    (folder / "train.py").write_text(
        "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(os.getpid(), 'up', flush=True)\ntime.sleep(600)\n"
    )
    short = block.replace("--kill-after=10 600", "--kill-after=1 6")
    assert short != block
    subprocess.run(["bash", "-c", short], cwd=folder, env=env, check=True, timeout=60)
    deadline = time.monotonic() + PATIENCE_S
    while not (said := (folder / "run.log").read_text() if (folder / "run.log").exists() else "").endswith("up\n"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pid = said.split()[0]
    while not is_dead(int(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Stands in for an agent: says where it was started and with what, and asks for the end when `ends` are there.
WITNESS = """#!/bin/bash
cmp -s - program.md && echo "$PWD $CUDA_VISIBLE_DEVICES $BASH_MAX_TIMEOUT_MS $*"
uv run analyze.py status | grep -c ^archive: >> "$AUTO_LOG_RESEARCH_DIR/starts"
[ "$(wc -l < "$AUTO_LOG_RESEARCH_DIR/starts")" -lt "$ENDS" ] || touch "$AUTO_LOG_RESEARCH_DIR/STOP"
exit 1
"""
# Stands in for Slurm: each task runs at once, on its own GPU, as the script says, in the folder it was submitted from.
SBATCH = """#!/bin/bash
grep -q '^#SBATCH .*--gres=gpu:1' "${@: -1}" || exit 1
case $1 in
--array=0-*) for i in $(seq 0 "${1#--array=0-}"); do SLURM_ARRAY_TASK_ID=$i CUDA_VISIBLE_DEVICES=$i bash "$2" & done ;;
*) CUDA_VISIBLE_DEVICES=0 bash "$1" ;;
esac
wait
"""


@pytest.fixture
def night(checkout):
    """A checkout with night.sh, a witness for an agent, and Slurm: (folder, environment, run a block of the README)."""
    folder, env, tools = checkout
    for name, script in (("claude", WITNESS), ("sbatch", SBATCH)):
        put_tool(tools, name, script)
    archive = folder / ".auto-log-research"

    def run(script, ends):
        asked = env | {"AUTO_LOG_RESEARCH_DIR": str(archive), "ENDS": str(ends)}
        (archive / "STOP").unlink(missing_ok=True)
        (archive / "starts").unlink(missing_ok=True)
        subprocess.run(["bash", "-uc", script + "\nwait\n"], cwd=folder, env=asked, check=True, timeout=PATIENCE_S)

    subprocess.run(["bash", "-euc", readme_block("cat > .auto-log-research/night.sh")], cwd=folder, env=env, check=True)
    return folder, env, run


def test_the_loop_starts_an_agent_that_fails_again_but_does_not_spin(night):
    folder, _, run = night
    naps = folder.parent / "naps"
    put_tool(folder.parent / "bin", "sleep", f'#!/bin/sh\necho "$*" >> {naps}\n')
    for script in (readme_block("rm -f .auto-log-research/STOP"), readme_command("sbatch .auto-log-research")):
        run(script, 3)
    said = (folder / ".auto-log-research" / "agent.log").read_text().splitlines()
    assert said[:3] == [f"{folder}  600000 -p --dangerously-skip-permissions"] * 3
    assert said[3:] == [f"{folder} 0 600000 -p --dangerously-skip-permissions"] * 3
    assert naps.read_text().count("10\n") >= 6


def test_the_loop_ends_after_its_hours_or_runs_and_ends_an_agent_that_hangs(night):
    folder, env, _ = night
    script = folder / ".auto-log-research" / "night.sh"
    agent = '#!/bin/bash\necho start >> "$STARTS"\nexec /bin/sleep 600\n'
    put_tool(folder.parent / "bin", "claude", agent)
    starts = folder.parent / "starts"
    starts.touch()

    def spend(**limits):
        subprocess.run(["bash", str(script)], cwd=folder, env=env | limits | {"STARTS": str(starts)}, check=True)
        return starts.read_text().count("start")

    assert spend(HOURS="0") == 0
    assert spend(RUNS="0") == 0
    seconds = script.read_text().replace("--kill-after=60", "--kill-after=1")
    script.write_text(seconds)
    assert spend(HOURS="0.0003") == 1  # it hangs, and is ended when the time is up, a second
    put_tool(folder.parent / "bin", "claude", agent.replace("exec", "printf 'a row\\n' >> $ROWS; exec"))
    rows = folder / ".auto-log-research" / "demo" / "results.tsv"
    rows.parent.mkdir()
    assert spend(RUNS="1", ROWS=str(rows)) == 2  # it goes on and on, and is ended after its one run


def test_a_second_loop_in_the_same_folder_is_refused(night):
    folder, env, _ = night
    archive = folder / ".auto-log-research"
    with open(archive / "night.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(["bash", archive / "night.sh"], cwd=folder, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "a night is under way in this folder\n")


def test_the_permissions_allow_what_the_instructions_ask_and_deny_what_they_forbid(checkout):
    folder, env, _ = checkout
    subprocess.run(["bash", "-euc", readme_block(".claude/settings.json")], cwd=folder, env=env, check=True)
    settings = json.loads((folder / ".claude" / "settings.json").read_text())
    assert output_of(["git", "status", "--porcelain"], folder, env) == ""  # ignored by git
    allowed, denied = settings["permissions"]["allow"], settings["permissions"]["deny"]
    prefixes = [rule.removeprefix("Bash(").rstrip(":*)") for rule in allowed if rule.startswith("Bash(")]
    for kind, code in code_blocks(PROGRAM):
        if kind == "bash":
            assert code.startswith(tuple(prefixes)), code
    tracked = output_of(["git", "ls-files"], folder, env).split()
    edits = [rule.removeprefix("Edit(").rstrip(")") for rule in denied if rule.startswith("Edit(")]
    assert set(tracked) - {"train.py", ".gitignore"} <= set(edits)
    assert {"Bash(git reset:*)", "Bash(git rebase:*)", "Bash(git push:*)"} <= set(denied)
    (hook,) = settings["hooks"]["SessionStart"]
    assert (hook["matcher"], hook["hooks"][0]["command"]) == ("compact", "uv run analyze.py status")


def test_several_agents_have_a_worktree_a_branch_and_a_gpu_each(night):
    folder, env, run = night
    archive = folder / ".auto-log-research"
    for script in (readme_block("CUDA_VISIBLE_DEVICES=$n"), readme_command("sbatch --array")):
        run(script, 4)
        for i in range(2):
            work = folder.parent / f"auto-log-research-{i}"
            log = archive / f"agent{i}.log"
            assert set(log.read_text().splitlines()) == {f"{work} {i} 600000 -p --dangerously-skip-permissions"}
            assert output_of(["git", "branch", "--show-current"], work, env) == f"autoresearch/gpu{i}\n"
            assert not (work / ".auto-log-research").exists()
            log.unlink()


def test_worktrees_share_one_archive_and_leave_each_others_runs_alone(checkout):
    folder, env, _ = checkout
    shared = env | {"AUTO_LOG_RESEARCH_DIR": str(folder / ".auto-log-research")}
    works = [folder.parent / f"work{i}" for i in (0, 1)]
    runs = []
    for work in works:
        subprocess.run(["git", "worktree", "add", "--quiet", "-b", work.name, work], cwd=folder, env=env, check=True)
        # One after the other: two at a time would hold each other back, and be judged for it.
        subprocess.run(["bash", "-c", "uv run train.py > run.log 2>&1"], cwd=work, env=shared, check=True)
    for work in works:  # filed at the same time
        runs.append(subprocess.Popen(["uv", "run", "analyze.py"], cwd=work, env=shared))
    assert [run.wait(timeout=PATIENCE_S) for run in runs] == [0, 0]
    head = output_of(["git", "rev-parse", "--short=7", "HEAD"], folder, env).strip()
    assert sorted(row[0] for row in rows_of(folder / ".auto-log-research" / "demo")) == [head, f"{head}.2"]
    assert not (works[0] / ".auto-log-research").exists()
    # A decision without a name is about the run of the folder that it is made in.
    status = output_of(["uv", "run", "analyze.py", "status"], works[1], shared)
    assert re.search(r"^pending, decide keep or discard: [\w.]+, [\w.]+$", status, re.MULTILINE)
    mine = re.search(r"^this folder: run (\S+), filed", status, re.MULTILINE)[1]
    output_of(["uv", "run", "analyze.py", "keep"], works[1], shared)
    assert {row[0]: row[3] for row in rows_of(folder / ".auto-log-research" / "demo")} == {
        name: "keep" if name == mine else "pending" for name in (head, f"{head}.2")
    }
