"""What a rule for keeping is worth: nights of experiments with known truth, judged by the real verdict functions.

    uv run tests/bench_nights.py [--nights 100] [--runs 100] [--measure]

Each night starts from a baseline; each idea changes the best program's true val_bpb by a draw like those of the public
chains (one in four helps, by 0.0012 in the mean; the others cost 0.003 in the mean); a score is the truth plus noise.
Prints, as Markdown, the true gain in bpb x 1000, and in brackets the share of keeps that are truly no gain; then how
often a claimed gain is none, and by how much the best's score reads too low, with and without the correction.
--measure adds the paired difference as a second measurement, at several correlations with the score's noise.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import analyze
from analyze import Entry, compute_best, compute_noise, compute_verdict

SIGMAS = (0.0005, 0.001, 0.002)
BASELINE = 0.998


@dataclass
class Night:
    """The books of one night and the truth behind them."""

    rng: np.random.Generator
    sigma: float
    entries: list[Entry] = field(default_factory=list)
    truth: dict[str, float] = field(default_factory=dict)  # program to its true val_bpb
    num_keeps: int = 0
    num_false_keeps: int = 0
    num_claims: int = 0
    num_false_claims: int = 0

    def run(self, program: str) -> Entry:
        """Train this program once more, with another seed, and file it as pending."""
        score = self.truth[program] + self.sigma * self.rng.standard_normal()
        name = f"r{len(self.entries)}"
        record = {"val_bpb": score, "program": program, "seed": len(self.entries), "time_budget": 300.0}
        self.entries.append(Entry(name, "pending", "", record))
        return self.entries[-1]

    def decide(self, entry: Entry, is_kept: bool) -> None:
        if is_kept:
            best = compute_best([e for e in self.entries if e is not entry])
            before = self.truth[best.group[0]] if best else np.inf
            self.num_keeps += 1
            self.num_false_keeps += self.truth[entry.record["program"]] >= before
        i = self.entries.index(entry)
        self.entries[i] = replace(entry, status="keep" if is_kept else "discard")

    def idea(self) -> str:
        base = self.truth[compute_best(self.entries).group[0]]
        is_good = self.rng.random() < 0.25
        effect = -self.rng.exponential(0.0012) if is_good else self.rng.exponential(0.003)
        program = f"p{len(self.truth)}"
        self.truth[program] = base + effect
        return program

    def gain(self) -> float:
        return BASELINE - self.truth[compute_best(self.entries).group[0]]


def lower_than_the_best(night: Night) -> None:
    entry = night.run(night.idea())
    best = min(e.val_bpb for e in night.entries if e.status == "keep")
    night.decide(entry, entry.val_bpb < best)


def old_rule(night: Night) -> None:
    """A gain from two standard errors on; a better score inside them is run again and judged by the mean."""
    program = night.idea()
    first = night.run(program)
    errors = compute_verdict(first, night.entries)["standard_errors"]
    if -2 < errors < 0:
        second = night.run(program)
        errors = compute_verdict(second, night.entries)["standard_errors"]
        i = night.entries.index(second)
        night.entries[i] = replace(second, status="discard")  # decided with the first
    night.decide(first, errors <= -2)


def new_rule(night: Night) -> None:
    """What the verdict advises; the best is run again when RERUN_EVERY runs have passed since it was run last."""
    if analyze.runs_since(night.entries, compute_best(night.entries)) >= analyze.RERUN_EVERY:
        best = compute_best(night.entries)
        again = night.run(best.group[0])
        night.entries[-1] = replace(again, status="keep")
        return
    entry = night.run(night.idea())
    verdict = compute_verdict(entry, night.entries)
    if verdict["kind"] == "new best":
        best = compute_best(night.entries[:-1])
        night.num_claims += 1
        night.num_false_claims += night.truth[entry.record["program"]] >= night.truth[best.group[0]]
    night.decide(entry, verdict["advice"] == "keep")


def at_errors(errors: float, rerun_every: int) -> Callable[[Night], None]:
    """The new rule at another bar, or with other reruns."""

    def rule(night: Night) -> None:
        before = analyze.KEEP_ERRORS, analyze.RERUN_EVERY
        analyze.KEEP_ERRORS, analyze.RERUN_EVERY = errors, rerun_every
        try:
            new_rule(night)
        finally:
            analyze.KEEP_ERRORS, analyze.RERUN_EVERY = before

    return rule


def simulate(rule: Callable[[Night], None], sigma: float, num_nights: int, num_runs: int) -> list[Night]:
    nights = []
    for seed in range(num_nights):
        night = Night(np.random.default_rng(seed), sigma)
        night.truth["p0"] = BASELINE
        for _ in range(2):  # the baseline, and once more for the noise
            night.run("p0")
            night.entries[-1] = replace(night.entries[-1], status="keep")
        while len(night.entries) < num_runs:
            rule(night)
        nights.append(night)
    return nights


def describe(nights: list[Night]) -> str:
    gain = 1000 * np.mean([night.gain() for night in nights])
    error = 1000 * np.std([night.gain() for night in nights]) / len(nights) ** 0.5
    false = sum(n.num_false_keeps for n in nights) / max(sum(n.num_keeps for n in nights), 1)
    return f"{gain:.1f} ± {error:.1f} ({false:.2f})"


def describe_optimism(nights: list[Night]) -> tuple[float, float]:
    """Mean of true minus reported val_bpb of the best, in bpb x 1000: as it stands, and corrected."""
    raw, corrected = [], []
    for night in nights:
        best = compute_best(night.entries)
        bias = night.truth[best.group[0]] - best.mean
        raw.append(bias)
        corrected.append(bias - analyze.compute_optimism(best, night.entries, compute_noise(night.entries)))
    return 1000 * float(np.mean(raw)), 1000 * float(np.mean(corrected))


def second_measurement(num_draws: int = 200_000) -> None:
    """What the paired difference adds to the score: error of their best combination against the score's alone."""
    print("\n| correlation of the two noises | error of the best combination / error of the score alone |")
    print("|---|---|")
    for correlation in (0.0, 0.5, 0.9, 0.98):
        # The paired difference predicts the score with an error of its own besides: a tenth of sigma, as measured.
        rng = np.random.default_rng(0)
        shared = rng.standard_normal(num_draws)
        own = rng.standard_normal(num_draws)
        paired = correlation * shared + (1 - correlation**2) ** 0.5 * own + 0.1 * rng.standard_normal(num_draws)
        covariance = np.cov(shared, paired)
        inverse = np.linalg.inv(covariance)
        print(f"| {correlation:.2f} | {inverse.sum() ** -0.5 / covariance[0, 0] ** 0.5:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nights", type=int, default=100)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--measure", action="store_true", help="what the paired difference would add")
    parser.add_argument("--search", action="store_true", help="other bars and other reruns too")
    options = parser.parse_args()
    rules = {"lower than the best": lower_than_the_best, "old: 2 errors, rerun if better": old_rule, "new": new_rule}
    if options.search:
        for errors in (0.0, 0.25, 0.5, 0.75, 1.0):
            for rerun_every in (8, 15, 1000):
                rules[f"keep at {errors} errors, best again every {rerun_every}"] = at_errors(errors, rerun_every)
    print("| rule | " + " | ".join(f"sigma {sigma}" for sigma in SIGMAS) + " |")
    print("|---" * (1 + len(SIGMAS)) + "|")
    last: dict[float, list[Night]] = {}
    for name, rule in rules.items():
        cells = []
        for sigma in SIGMAS:
            nights = simulate(rule, sigma, options.nights, options.runs)
            cells.append(describe(nights))
            if rule is new_rule:
                last[sigma] = nights
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print("\n| of the new rule | " + " | ".join(f"sigma {sigma}" for sigma in SIGMAS) + " |")
    print("|---" * (1 + len(SIGMAS)) + "|")
    claims = [sum(n.num_false_claims for n in ns) / max(sum(n.num_claims for n in ns), 1) for ns in last.values()]
    print("| share of claimed gains that are none | " + " | ".join(f"{share:.3f}" for share in claims) + " |")
    biases = [describe_optimism(nights) for nights in last.values()]
    print("| the best reads too low by (x 1000) | " + " | ".join(f"{raw:.2f}" for raw, _ in biases) + " |")
    print("| … after the correction | " + " | ".join(f"{left:.2f}" for _, left in biases) + " |")
    sigmas = [np.mean([compute_noise(n.entries).sigma for n in ns]) for ns in last.values()]
    print("| sigma estimated, mean | " + " | ".join(f"{sigma:.5f}" for sigma in sigmas) + " |")
    if options.measure:
        second_measurement()


if __name__ == "__main__":
    main()
