"""Are the statements of analysis.md true? Each against synthetic runs with known truth; prints a Markdown table.

    uv run tests/bench_statistics.py [--runs 400]

For each statement: the bias of its figure, how often its 95 % interval holds the truth (90 to 98 % is right), or how
often it is made falsely. The curves scatter as those of real runs do: six of 110 s on an H100 had a scatter of 0.04
nats from step to step, nearly all of it the text's; the paired difference had 0.0015 to 0.003 in the second half of a
run, with autocorrelations between 0 and 0.6 from one step to the next, around a trend that dies out over a quarter of
the run. Exits 1 if an interval misses 90 to 98 %.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import analyze
from analyze import Curve, Entry

NUM_STEPS, BATCH, BUDGET_S, KAPPA = 600, 2**19, 300.0, 0.37
TEXT_NATS, PAIR_NATS = 0.04, 0.002
WARMDOWN = 0.5
PUBLIC_SIGMAS = (0.0005, 0.0007, 0.00085, 0.001, 0.0014)  # as public logs of the five-minute run have them


def true_loss(tokens: np.ndarray, progress: np.ndarray) -> np.ndarray:
    """Nats: a power law of the tokens, less what the warm-down brings. Without the steepest part of the start."""
    cooling = np.clip((progress - (1 - WARMDOWN)) / WARMDOWN, 0, 1)
    return 2.4 + 6.0 * (tokens / 1e6 + 5) ** -0.5 - 0.25 * cooling


def autocorrelated(rng: np.random.Generator, num: int, correlation: float) -> np.ndarray:
    values = rng.standard_normal(num)
    for i in range(1, num):
        values[i] = correlation * values[i - 1] + math.sqrt(1 - correlation**2) * values[i]
    return values


def make_curve(num_steps: int, extra: np.ndarray, text: np.ndarray) -> Curve:
    """A run of `num_steps` in the budget: the law, `extra` nats on top, and the text's difficulty."""
    ends = BATCH * np.arange(1.0, num_steps + 1)
    progress = np.arange(1, num_steps + 1) / num_steps
    loss = true_loss(ends - BATCH / 2, progress - 0.5 / num_steps) + extra[:num_steps] + text[:num_steps]
    bounds = np.append(0.0, ends)
    nats = np.append(0.0, np.cumsum(loss * BATCH))
    flat = np.ones(num_steps)
    share = np.append(0.0, progress)
    return Curve(ends / 1e6, loss, flat, math.nan * flat, bounds, nats, share, flat, KAPPA)


Case = tuple[list[dict], np.ndarray, np.ndarray]


def paired_cases(num_runs: int, correlation: float, ratio: float) -> Iterator[Case]:
    """Windows of a run of `ratio` times the best's steps, with the true differences at equal tokens and progress."""
    steps = round(ratio * NUM_STEPS)
    trend = 0.05 * np.exp(-np.arange(1, 2 * NUM_STEPS) / (NUM_STEPS / 4)) - 0.004
    for seed in range(num_runs):
        rng = np.random.default_rng(seed)
        text = TEXT_NATS * rng.standard_normal(2 * NUM_STEPS)
        noise = PAIR_NATS * autocorrelated(rng, 2 * NUM_STEPS - 1, correlation)
        mine = make_curve(steps, trend + noise, text)
        best = make_curve(NUM_STEPS, np.zeros(NUM_STEPS), text)
        blocks = analyze.common_blocks([mine, best], 1e6 * min(mine.tokens_m[-1], best.tokens_m[-1]))
        windows = analyze.compute_windows(mine, [best], blocks, KAPPA)
        middles = (blocks[1:] + blocks[:-1]) / 2
        progress = middles / (steps * BATCH)
        own = true_loss(middles, progress) + trend[: len(middles)]
        at_tokens = own - true_loss(middles, middles / (NUM_STEPS * BATCH))
        at_progress = own - true_loss(progress * NUM_STEPS * BATCH, progress)
        edges = np.searchsorted(blocks, [1e6 * w["from_m"] for w in windows] + [blocks[-1]])
        yield windows, KAPPA * window_means(at_tokens, edges), KAPPA * window_means(at_progress, edges)


def window_means(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.array([values[a:b].mean() for a, b in itertools.pairwise(edges)])


def coverage(errors: np.ndarray, standard_errors: np.ndarray, bar: float | np.ndarray = 1.96) -> tuple[float, float]:
    """Mean error, and the share of truths inside `bar` standard errors."""
    return float(np.mean(errors)), float(np.mean(np.abs(errors) <= bar * standard_errors))


def check_windows(num_runs: int) -> list[list]:
    rows = []
    for correlation in (0.0, 0.5, 0.7):
        found = list(paired_cases(num_runs, correlation, 1.0))
        errors = np.array([[w["difference"] for w in ws] - truth for ws, truth, _ in found])[:, 1:]
        bars = np.array([[w["error"] for w in ws] for ws, _, _ in found])[:, 1:]
        rows.append(["window at equal tokens", f"autocorrelation {correlation}", *coverage(errors, bars)])
    for ratio in (0.97, 1.0, 1.03):
        found = list(paired_cases(num_runs, 0.5, ratio))
        errors = np.array([[w["at_progress"] for w in ws[1:]] - truth[1:] for ws, _, truth in found])
        bars = np.array([[w["at_progress_error"] for w in ws[1:]] for ws, _, _ in found])
        rows.append(["window at equal progress", f"{ratio - 1:+.0%} steps", *coverage(errors, bars)])
        summaries = [analyze.compute_summary(ws[-analyze.SUMMARY_WINDOWS :]) for ws, _, _ in found]
        truths = [truth[-analyze.SUMMARY_WINDOWS :].mean() for _, _, truth in found]
        errors = np.array([summary["at_progress"] for summary in summaries]) - truths
        bars = np.array([summary["at_progress_error"] for summary in summaries])
        rows.append(["summary at equal progress", f"{ratio - 1:+.0%} steps", *coverage(errors, bars)])
    return rows


def entry(name: str, val: float, program: str, status: str = "keep", **record: object) -> Entry:
    facts = {"val_bpb": val, "program": program, "seed": name, "time_budget": BUDGET_S, "is_finished": True}
    return Entry(name, status, "", facts | record)


def check_verdicts(num_runs: int) -> list[list]:
    """The difference of two scores, after a number of further seeds of the best; its bar is the one for a claim."""
    rows = []
    for budget_s, num_seeds in ((300.0, 1), (300.0, 2), (300.0, 4), (30.0, 2), (30.0, 4)):
        errors, bars, claims = [], [], 0
        for seed in range(4 * num_runs):
            rng = np.random.default_rng(seed)
            sigma = rng.choice(PUBLIC_SIGMAS) * (1 if budget_s == 300 else 20)
            scores = 1 + sigma * rng.standard_normal(num_seeds + 1)
            others = [entry(f"r{i}", x, "p", time_budget=budget_s) for i, x in enumerate(scores[1:])]
            this = entry("x", scores[0], "q", "pending", time_budget=budget_s)
            verdict = analyze.compute_verdict(this, [*others, this])
            errors.append(verdict["difference"])
            bars.append(verdict["standard_error"] * analyze.compute_noise(others).claim_errors)
            claims += verdict["kind"] == "new best"
        prior = "the five-minute run" if budget_s == 300 else "another budget"
        case = f"{prior}, {num_seeds} seed(s) of the best"
        rows.append(["difference of the scores", case, *coverage(np.array(errors), np.array(bars), 1.0)])
        rows.append(["NEW BEST without any gain", case, claims / (4 * num_runs)])
    return rows


def check_gain(num_runs: int) -> list[list]:
    """How far the best's mean reads too low, after as many equal programs as given, and what the correction leaves."""
    rows = []
    for num_programs in (3, 10, 30):
        raw, left = [], []
        for seed in range(num_runs):
            scores = 1 + 0.001 * np.random.default_rng(seed).standard_normal(num_programs)
            entries = [entry(f"r{i}", x, f"p{i}") for i, x in enumerate(scores)]
            best = analyze.compute_best(entries)
            raw.append(best.mean - 1)
            left.append(raw[-1] + analyze.compute_optimism(best, entries, analyze.compute_noise(entries)))
        case = f"the lowest of {num_programs} equal programs"
        rows.append(["best's score, as it is", case, float(np.mean(raw)), None])
        rows.append(["best's score in the gain", case, float(np.mean(left)), None])
    return rows


def check_hampered(num_runs: int) -> list[list]:
    """Step times scatter by 1.5 % on an idle GPU; another program's code costs up to 20 % more."""
    rng, rows = np.random.default_rng(0), []

    def timed(name: str, step_ms: float, program: str, **pace: float) -> Entry:
        config = {"flops_per_token": 2.5e8}
        return entry(name, 1.0, program, step_ms=step_ms, training_s=300.0, config=config, pace=pace, gpu_name="H100")

    def idle() -> float:
        return 100 * (1 + 0.015 * rng.standard_normal())

    def share(program: str, factors: np.ndarray, **pace: float) -> float:
        found = 0
        for factor in factors:
            earlier = [timed(f"r{i}", idle(), "p") for i in range(4)]
            found += bool(analyze.compute_machine(timed("x", factor * idle(), program, **pace), earlier))
        return found / len(factors)

    ones = np.ones(num_runs)
    rows.append(["HAMPERED, wrongly", "the same program, idle GPU", share("p", ones)])
    rows.append(["HAMPERED, wrongly", "other code that costs 0 to 20 %", share("q", rng.uniform(1, 1.2, num_runs))])
    rows.append(["HAMPERED, rightly", "the same program, 10 % slower", share("p", 1.1 * ones)])
    rows.append(["HAMPERED, rightly", "other code, twice as slow", share("q", 2 * ones)])
    rows.append(["HAMPERED, rightly", "20 % slower, 9 GB of another process", share("q", 1.2 * ones, other_gpu_mb=9e3)])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=400)
    num_runs = parser.parse_args().runs
    rows = check_windows(num_runs) + check_verdicts(num_runs)
    rows += check_gain(num_runs) + check_hampered(num_runs)
    print("| statement | truth | bias, bpb | 95 % interval holds it | made in |\n|---|---|---|---|---|")
    missed = 0
    for statement, truth, *figures in rows:
        if len(figures) == 1:
            print(f"| {statement} | {truth} | | | {figures[0]:.1%} |")
            continue
        bias, held = figures
        missed += held is not None and not 0.9 <= held <= 0.98
        print(f"| {statement} | {truth} | {bias:+.5f} | {'' if held is None else f'{held:.1%}'} | |")
    print(f"\n{missed} interval(s) outside 90 to 98 %; {num_runs} simulated runs each")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
