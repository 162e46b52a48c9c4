"""The statistics of analyze.py and the page they make, against hand-made runs whose answers are known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import analyze

BUDGET_S = 300.0
BATCH = 524_288
TOKENS, NUM_BYTES = 22_000_000, 100_000_000
KAPPA = TOKENS / (math.log(2) * NUM_BYTES)  # bpb per nat of these evaluations


def entry(name, val, program, status="keep", *, seed=None, **record):
    known = {"val_bpb": val, "program": program, "seed": name if seed is None else seed, "is_finished": True}
    return analyze.Entry(name, status, "", known | {"time_budget": BUDGET_S, "gpu_name": "Abacus 3000"} | record)


def verdict_of(this, *others, **facts):
    return analyze.compute_verdict(this, [*others, this], facts)


def text_noise(num_tokens_each, num_steps, seed=0, scale=0.02):
    """The difficulty of the text in blocks of `num_tokens_each`, the same for every run that sees it."""
    return scale * np.random.default_rng(seed).standard_normal(num_tokens_each * num_steps)


def make_run(name="this", num_steps=600, *, batch=BATCH, shift=0.0, val=0.99, warmdown=0.5, micro=1, **columns):
    """A run whose loss is a power law of the tokens, less a warm-down by time, plus the text's difficulty and `shift`
    (a number, or one for each step). `columns` are further metrics, one value a step."""
    block = 131_072
    noise = text_noise(1, num_steps * batch // block + 1)
    records, total = [], 0
    shifts = np.broadcast_to(shift, num_steps)
    for i in range(num_steps):
        progress = i / num_steps
        lr = min(1.0, (1 - progress) / warmdown) if warmdown else 1.0
        ends = [total + (k + 1) * batch // micro for k in range(micro)]
        parts = []
        for end in ends:
            first = (end - batch // micro) // block
            text = noise[first : max(end // block, first + 1)].mean()
            parts.append(2.0 + 12.0 * (end / 1e6) ** -0.5 - 0.3 * (1 - lr) + text + float(shifts[i]))
        total = ends[-1]
        record = {
            "step": i, "train/loss": float(np.mean(parts)), "train/tokens": total, "train/progress": progress,
            "train/lr_multiplier": lr, "train/epoch": 1, "train/data_sum": 3 * total,
            "perf/step_time_ms": 1000 * BUDGET_S / num_steps, "time/training_s": BUDGET_S * (i + 1) / num_steps,
            "time/unix_s": 1.7e9 + BUDGET_S * (i + 1) / num_steps,
        }
        if micro > 1:
            record["train/micro_losses"] = parts
        records.append(record | {key: values[i] for key, values in columns.items()})
    summary = {"val_bpb": val, "time_budget": BUDGET_S, "total_batch_size": batch, "max_seq_len": 2048}
    evaluation = {"val_bpb": val, "tokens": TOKENS, "bytes": NUM_BYTES}
    start = {"data_fingerprint": "0123456789abcdef"}
    return analyze.Run(name, Path(), start, summary, evaluation, records, None, None)


# ---------------------------------------------------------------------------------------------------------------------
# Noise and best
# ---------------------------------------------------------------------------------------------------------------------


def test_noise_is_the_prior_then_a_mixture_in_which_the_prior_fades():
    noise = analyze.compute_noise([entry("a", 1.0, "p"), entry("b", 0.9, "q")])
    assert (noise.sigma, noise.measured) == (pytest.approx(0.001), None)
    pair = analyze.compute_noise([entry("a", 1.0, "p"), entry("b", 1.002, "p")])
    assert pair.measured == pytest.approx(math.sqrt(2e-6))
    assert pair.sigma == pytest.approx(math.sqrt(4e-6 / 3))  # the prior's two degrees of freedom and one measured
    many = [entry(f"{g}{i}", 1.0 + i * 0.002, str(g)) for g in range(200) for i in range(2)]
    assert analyze.compute_noise(many).sigma == pytest.approx(math.sqrt(2e-6), rel=0.003)


def test_reruns_of_one_seed_teach_nothing_about_the_noise():
    same = [entry(f"r{i}", 1.0 + i * 1e-4, "p", seed=42) for i in range(21)]
    noise = analyze.compute_noise(same)
    assert (noise.freedom, noise.sigma) == (0, pytest.approx(0.001))
    other = analyze.compute_noise([*same, entry("s", 1.003, "p", seed=43)])
    assert other.freedom == 1
    assert analyze.compute_best(same).num_seeds == 1


@pytest.mark.parametrize("record", [{"demo": True}, {"time_budget": 30.0}, {"time_budget": 600.0}])
def test_the_prior_belongs_to_the_five_minute_run_alone(record):
    first, second = entry("a", 1.97, "p", **record), entry("b", 1.95, "q", "pending", **record)
    noise = analyze.compute_noise([first, second])
    assert noise.sigma is None
    assert analyze.describe_noise(noise) == "unknown: run the baseline again first"
    verdict = verdict_of(second, first)
    assert (verdict["kind"], verdict["advice"], verdict["standard_errors"]) == ("unproven", "keep", None)


def test_without_a_prior_two_replicates_do_not_make_a_claim():
    pair = [entry(f"a{i}", 1.97 + 0.01 * i, "p", demo=True) for i in range(2)]
    verdict = verdict_of(entry("b", 1.94, "q", "pending", demo=True), *pair)
    assert verdict["standard_errors"] < -2
    assert verdict["kind"] == "unproven"


def test_crashes_invalid_and_hampered_runs_are_no_scores():
    broken = [entry("a", 1.0, "p"), entry("b", 0.5, "p", "invalid"), entry("c", 0.0, "p", "crash")]
    broken.append(entry("d", 1.1, "p", hampered=["steps took 2.3 times"]))
    assert analyze.compute_noise(broken).measured is None
    assert analyze.compute_best(broken).names == ("a",)


def test_the_best_is_a_mean_over_seeds_so_that_a_lucky_draw_is_not_the_bar():
    entries = [entry("a", 0.990, "p"), entry("b", 0.980, "q"), entry("c", 0.998, "q", "discard")]
    best = analyze.compute_best(entries)
    assert (best.name, best.mean) == ("b", pytest.approx(0.989))
    entries.append(entry("e", 0.999, "q", "pending"))
    assert analyze.compute_best(entries).name == "a"


def test_before_anything_is_kept_the_first_valid_run_stands_in():
    entries = [entry("a", 0.99, "p", "discard"), entry("b", 0.98, "q", "pending"), entry("c", 0.97, "r", "pending")]
    assert (analyze.compute_best(entries).name, analyze.compute_best(entries).is_kept) == ("b", False)
    assert analyze.compute_best([]) is None


@pytest.mark.parametrize(
    "other",
    [
        {"time_budget": 600.0},
        {"gpu_name": "Abacus 4000"},
        {"eval_tokens": 7},
        {"data_fingerprint": "f"},
        {"demo": True},
    ],
)
def test_only_runs_of_one_budget_data_evaluation_and_gpu_are_compared(other):
    first = entry("a", 0.99, "p", eval_tokens=9, data_fingerprint="0", demo=False)
    alien = entry("b", 0.5, "q", "pending", **({"eval_tokens": 9, "data_fingerprint": "0", "demo": False} | other))
    assert verdict_of(alien, first)["kind"] == "baseline"
    assert analyze.compute_best([first, alien], like=first).name == "a"


def test_the_lowest_of_many_equal_programs_is_corrected_by_about_what_it_is_too_low():
    errors = []
    for seed in range(200):
        scores = 0.001 * np.random.default_rng(seed).standard_normal(12)
        entries = [entry(f"r{i}", 1.0 + x, f"p{i}") for i, x in enumerate(scores)]
        best = analyze.compute_best(entries)
        errors.append(1.0 - best.mean - analyze.compute_optimism(best, entries, analyze.compute_noise(entries)))
    assert abs(np.mean(errors)) < 0.0004  # uncorrected: 0.0016


# ---------------------------------------------------------------------------------------------------------------------
# Verdict
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("errors", "adds_code", "kind", "advice"),
    [
        (-2.1, True, "new best", "keep"),
        (-1.1, True, "unproven", "keep"),
        (-0.9, True, "not better", "discard"),
        (-0.6, False, "unproven", "keep"),
        (-0.4, False, "not better", "discard"),
        (3.0, False, "not better", "discard"),
    ],
)
def test_keeping_and_claiming_part(errors, adds_code, kind, advice):
    val = 1.0 + errors * 0.001 * math.sqrt(2)
    verdict = verdict_of(entry("b", val, "q", "pending"), entry("a", 1.0, "p"), adds_code=adds_code)
    assert verdict["standard_errors"] == pytest.approx(errors)
    assert (verdict["kind"], verdict["advice"]) == (kind, advice)


def test_the_difference_is_in_standard_errors_of_both_means():
    entries = [entry("a", 0.990, "p"), entry("b", 0.990, "p")]
    verdict = verdict_of(entry("c", 0.980, "q", "pending"), *entries)
    sigma = math.sqrt(2e-6 / 3)  # the prior's two degrees of freedom and one that measured nothing
    assert verdict["kind"] == "new best"
    assert verdict["standard_errors"] == pytest.approx(-0.010 / (sigma * math.sqrt(1.5)))


def test_an_outlying_replicate_is_judged_without_itself():
    others = [entry(f"r{i}", 1.0 + 0.001 * x, "p") for i, x in enumerate((-1, 0, 1))]
    verdict = verdict_of(entry("x", 1.02, "p", "pending"), *others)
    assert verdict["kind"] == "replicate"
    assert verdict["standard_errors"] > 10
    assert any("outside the noise" in line for line in analyze.render_kind(verdict))


def test_a_replicate_that_takes_the_best_its_place_says_which_is_the_best_now():
    entries = [entry("a", 0.990, "p"), entry("b", 0.985, "q")]
    verdict = verdict_of(entry("c", 0.997, "q", "pending"), *entries)
    assert (verdict["kind"], verdict["advice"], verdict["best"]) == ("replicate", "discard", "b")
    assert verdict["mean"] == pytest.approx(0.991)
    assert verdict["dethroned_by"] == ["a", 0.990]
    assert verdict_of(entry("c", 0.986, "q"), *entries)["dethroned_by"] is None


@pytest.mark.parametrize("val", [0.9, 1.1])
def test_a_hampered_run_is_no_evidence_whether_its_score_is_good_or_bad(val):
    verdict = verdict_of(entry("b", val, "q", "pending"), entry("a", 1.0, "p"), hampered=["steps took 2.31 times"])
    assert (verdict["kind"], verdict["advice"], verdict["reasons"]) == ("hampered", "wait", ["steps took 2.31 times"])
    assert "difference" not in verdict


def test_a_stopped_run_is_stopped_and_a_killed_one_is_trained_again():
    first = entry("a", 1.0, "p")
    stopped = entry("b", None, "q", "discard", stopped="stopped: by hand")
    assert verdict_of(stopped, first)["kind"] == "stopped"
    crash = entry("b", None, "q", "crash")
    assert verdict_of(crash, first)["advice"] == "discard"
    assert verdict_of(crash, first, is_killed=True)["advice"] == "rerun"


def test_an_invalid_run_gives_its_reasons_and_is_never_said_to_be_counted():
    leaking = entry("b", 0.2, "p", "invalid", invalid=["the causality test failed"])
    verdict = verdict_of(leaking, entry("a", 1.0, "p"))
    page = "\n".join(analyze.render_verdict({"verdict": verdict, "record": leaking.record, "prediction": ""}))
    assert page.startswith("**INVALID**: val_bpb 0.200000 is no result. Best so far: 1.000000 (a).")
    assert "- the causality test failed" in page
    assert "ounted" not in page


# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------


def timed(name, step_ms, program, *, pace=None, **record):
    config = {"flops_per_token": 2.5e8, "width": 512, "total_batch_size": BATCH}
    facts = {"step_ms": step_ms, "training_s": 300.0, "config": config, "pace": pace or {}}
    return entry(name, record.pop("val", 1.0), program, **facts | record)


@pytest.mark.parametrize(
    ("step_ms", "program", "pace", "is_hampered"),
    [
        (103.0, "p", {}, False),  # the same program within what an idle GPU scatters
        (108.0, "p", {}, True),
        (108.0, "q", {}, False),  # another program: it may be its code
        (125.0, "q", {}, False),
        (125.0, "q", {"other_gpu_mb": 9000.0}, True),
        (125.0, "q", {"startup_s": 99.0}, True),
        (240.0, "q", {}, True),
        (60.0, "q", {}, False),
    ],
)
def test_one_fixed_rule_says_whether_the_machine_held_a_run_back(step_ms, program, pace, is_hampered):
    earlier = [timed(f"r{i}", 100.0, "p", pace={"startup_s": 20.0}) for i in range(3)]
    machine = analyze.compute_machine(timed("x", step_ms, program, pace=pace), earlier)
    assert bool(machine["hampered"]) == is_hampered


def test_a_program_that_is_as_slow_again_is_slow_itself():
    earlier = [timed("r", 100.0, "p"), timed("s", 240.0, "q", hampered=["slow"])]
    assert analyze.compute_machine(timed("t", 241.0, "q"), earlier)["hampered"] == []
    shared = timed("t", 241.0, "q", pace={"other_gpu_mb": 9000.0})
    assert "another process held 9000 MB" in analyze.compute_machine(shared, earlier)["hampered"][0]


def test_other_work_is_no_measure_of_the_machine():
    larger = timed("x", 240.0, "q", config={"flops_per_token": 5e8})
    assert analyze.compute_machine(larger, [timed("r", 100.0, "p")])["hampered"] == []


def test_stalls_that_cost_the_score_are_hampering_and_a_few_are_not():
    ms = np.full(600, 500.0)
    ms[300] = 12_000.0  # 11.5 s of 300
    run = make_run(**{"perf/step_time_ms": ms})
    pace = analyze.compute_pace(run)
    assert (pace["stalls"], pace["stalled_s"]) == (1, pytest.approx(11.5))
    hampered = analyze.compute_machine(timed("x", 500.0, "p", pace=pace), [])["hampered"]
    assert hampered == ["1 step(s) took more than twice the median: 11.5 of 300 s lost"]
    pace["stalled_s"] = 5.0
    assert analyze.compute_machine(timed("x", 500.0, "p", pace=pace), [])["hampered"] == []


def test_a_machine_that_became_faster_is_named_before_a_gain_is_believed():
    best = [timed("a", 130.0, "p")]
    assert analyze.compute_best_pace(timed("b", 100.0, "q"), best) == pytest.approx(0.3)
    assert analyze.compute_best_pace(timed("b", 125.0, "q"), best) is None
    assert analyze.compute_best_pace(timed("b", 100.0, "q", config={"flops_per_token": 5e8}), best) is None


# ---------------------------------------------------------------------------------------------------------------------
# The paired curve
# ---------------------------------------------------------------------------------------------------------------------


def test_a_shift_of_all_losses_is_found_in_every_window_with_a_tiny_error():
    paired = analyze.compute_paired(make_run(shift=0.01), [make_run("best")])
    assert len(paired["windows"]) == 10
    for w in paired["windows"]:
        assert w["difference"] == pytest.approx(0.01 * KAPPA, abs=1e-9)
        assert w["error"] < 1e-6  # the text's scatter of 0.02 nats has dropped out
    assert paired["summary"]["at_progress"] == pytest.approx(0.01 * KAPPA, abs=1e-6)
    assert paired["note"] is None


@pytest.mark.parametrize(("batch", "micro"), [(BATCH // 2, 1), (BATCH // 4 * 3, 3)])
def test_windows_cut_both_runs_at_the_same_tokens_whatever_their_batches(batch, micro):
    num_steps = 600 * BATCH // batch
    this = make_run(num_steps=num_steps, batch=batch, micro=micro, warmdown=0)
    best = make_run("best", micro=4, warmdown=0)
    windows = analyze.compute_paired(this, [best])["windows"]
    ends = {c.tokens_m[-1] for c in (analyze.compute_curve(this), analyze.compute_curve(best))}
    assert windows[-1]["to_m"] == pytest.approx(min(ends))
    assert max(abs(w["difference"]) for w in windows[3:]) < 2e-4  # one law: only where steps end differs


def test_the_difference_is_against_the_mean_of_all_the_bests_runs():
    others = [make_run("a", shift=0.01), make_run("b", shift=-0.03)]
    paired = analyze.compute_paired(make_run(), others)
    assert paired["against"] == ["a", "b"]
    assert paired["windows"][5]["difference"] == pytest.approx(0.01 * KAPPA, abs=1e-9)


def test_a_slower_run_of_the_same_law_is_equal_at_equal_tokens_and_worse_at_equal_progress():
    this = make_run(num_steps=588, warmdown=0)
    windows = analyze.compute_paired(this, [make_run("best", warmdown=0)])["windows"]
    late = windows[-1]
    assert late["difference"] == pytest.approx(0.0, abs=1e-9)
    end = 588 * BATCH / 1e6
    middle = 0.95 * end
    truth = KAPPA * 12.0 * (middle**-0.5 - (middle * 600 / 588) ** -0.5)
    assert late["at_progress"] == pytest.approx(truth, abs=3 * late["at_progress_error"])
    assert 0 < truth < 0.01


def test_rows_that_part_end_the_pairing_and_it_is_said_where():
    other = [3 * BATCH * (i + 1) + (i >= 300) for i in range(600)]
    paired = analyze.compute_paired(make_run(**{"train/data_sum": other}), [make_run("best")])
    assert paired["note"] == f"the two runs saw other rows after {300 * BATCH / 1e6:.1f} M tokens"
    assert paired["windows"][-1]["to_m"] == pytest.approx(300 * BATCH / 1e6)


def test_another_context_length_is_no_pairing_and_the_page_says_why():
    this, best = make_run(), make_run("best")
    for run in (this, best):
        for record in run.records:
            record.pop("train/data_sum")
    assert analyze.compute_paired(this, [best])["note"].startswith("assumed to be the same rows")
    this.summary["max_seq_len"] = 1024
    paired = analyze.compute_paired(this, [best])
    assert paired["windows"] == []
    assert analyze.render_paired(paired) == ["No pairing with best: another context length: 2048 -> 1024."]


def test_windows_of_a_later_epoch_are_marked_and_make_no_summary():
    epochs = [1 + (i >= 350) for i in range(600)]
    paired = analyze.compute_paired(make_run(**{"train/epoch": epochs}), [make_run("best")])
    assert [w["is_repeat"] for w in paired["windows"]].count(True) == 5
    assert paired["summary"] is None
    assert any(line.startswith("* a later epoch") for line in analyze.render_paired(paired))


def test_rates_and_batches_that_differ_are_named_from_the_logs():
    this = make_run(warmdown=0.7, **{"lr/wte": [0.8] * 600, "lr/lm_head": [0.01] * 600})
    rates = {"lr/wte": [0.6] * 1200, "lr/lm_head": [0.01] * 1200}
    best = make_run("best", num_steps=1200, batch=BATCH // 2, **rates)
    told = analyze.compute_rate_changes(this, best)
    assert told == ["batch 262144 -> 524288 tokens", "lr_multiplier 1 -> 0.714 at 50%", "lr/wte 0.6 -> 0.8 at 25%"]
    assert analyze.compute_rate_changes(best, best) == []


def test_a_loss_that_is_no_number_ends_the_curve_there():
    loss = np.linspace(5, 3, 100)
    loss[60] = math.nan
    curve = analyze.compute_curve(make_run(num_steps=100, **{"train/loss": loss}))
    assert len(curve.loss) == 60
    assert analyze.compute_curve(make_run(num_steps=2)) is None


# ---------------------------------------------------------------------------------------------------------------------
# Training and validation, speed and learning
# ---------------------------------------------------------------------------------------------------------------------


def test_over_fitting_is_called_that_when_the_text_repeats_and_the_gap_opens():
    epochs = [1 + (i >= 350) for i in range(600)]
    gap = analyze.compute_gap(make_run(val=0.90, **{"train/epoch": epochs}), [make_run("best", val=0.78)])
    assert gap["gap"] + gap["training_bpb"] == pytest.approx(0.90)
    assert (gap["is_overfitting"], gap["is_wider"]) == (True, True)
    assert not analyze.compute_gap(make_run(val=0.90), [])["is_overfitting"]  # one epoch


def test_speed_is_priced_by_runs_of_one_program_at_other_token_counts():
    price = 0.05  # bpb for e times fewer tokens
    tokens = (300.0, 240.0, 270.0)
    entries = [entry(f"r{i}", 1.0 + price * math.log(300 / t), "p", tokens_m=t) for i, t in enumerate(tokens)]
    entries[1].record["hampered"] = ["slow"]
    paired = {"total_tokens_m": [240.0, 300.0]}
    this = entry("x", 1.0, "q", tokens_m=240.0)
    why = analyze.compute_attribution(this, entries, paired, price * math.log(300 / 240) + 0.002)
    assert why["speed_bpb"] == pytest.approx(price * math.log(300 / 240))
    assert why["learning_bpb"] == pytest.approx(0.002)
    assert why["num_pairs"] == 2
    unknown = analyze.compute_attribution(this, entries[:1], paired, 0.01)
    assert unknown["speed_bpb"] is None
    assert "cannot tell speed from learning" in analyze.render_why(unknown)
    equal = analyze.compute_attribution(this, entries, {"total_tokens_m": [300.0, 301.0]}, 0.01)
    assert analyze.render_why(equal).startswith("Speed: -0.3% tokens, the same")


def test_an_edit_that_changed_nothing_is_said_to_have_changed_nothing():
    this, best = make_run(), make_run("best")
    changes = {"config": {}, "is_config_known": True}
    paired = analyze.compute_paired(this, [best])
    assert analyze.is_unchanged(this, best, paired, changes, {"difference": 0.0001, "standard_error": 0.001})
    averaged = {"difference": -0.01, "standard_error": 0.001}  # only the score differs, as with averaged weights
    assert not analyze.is_unchanged(this, best, paired, changes, averaged)
    assert not analyze.is_unchanged(this, best, paired, changes | {"config": {"depth": [8, 9]}}, {})
    verdict = verdict_of(entry("b", 1.0, "q", "pending"), entry("a", 1.0, "p"), is_unchanged=True)
    assert verdict["kind"] == "unchanged"
    assert "changed nothing" in analyze.render_kind(verdict)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Layers, and the page
# ---------------------------------------------------------------------------------------------------------------------


def test_scalars_start_where_the_configuration_says_and_stand_beside_the_bests():
    scalars = [None] * 600
    for i, value in ((0, -0.4), (300, 2.0), (599, 4.79)):
        scalars[i] = [value, value]
    this, best = make_run(**{"scalars/x0_lambdas": scalars}), make_run("best")
    this.summary["x0_lambda_init"] = 0.1
    assert analyze.compute_layers(this, best) == [
        "x0_lambdas: median 0.1 at the start, 2 half-way, 4.79 at the end; 4.79 (layer 0) to 4.79 (layer 0); "
        "unremarkable in the best"
    ]


def test_the_page_is_short_whatever_happens_and_begins_with_the_verdict_and_the_paired_curve():
    this, best = make_run(shift=-0.02, val=0.98), make_run("best")
    entries = [entry("best", 0.99, "p"), entry("this", 0.98, "q", "pending")]
    for e in entries:
        e.record.update(name=e.name, config={f"option_{i}": e.name for i in range(200)})
    this.records[0]["layers/names"] = "not a list"
    stats = analyze.compute_stats(this, entries[1], entries, [best])
    page = analyze.render_analysis(stats, ["loss_curve.png"])
    assert page.count("\n") < analyze.PAGE_LINES
    assert len(page.encode()) < analyze.PAGE_BYTES
    headings = [line for line in page.split("\n") if line.startswith("## ")]
    assert headings[:3] == ["## Verdict", "## Paired curve", "## Learning and speed"]
    assert "**NEW BEST**: val_bpb 0.980000, best so far 0.990000 (best), difference -0.010000 ± 0.001414 bpb" in page
    assert json.loads(json.dumps(stats)) == stats


def test_compare_shows_costs_settings_that_differ_and_the_paired_curve():
    runs = [make_run("aaa"), make_run("bbb", shift=0.01)]
    runs[1].summary["depth"] = 9
    text = analyze.render_compare(runs, [entry("aaa", 0.99, "p"), entry("bbb", 0.98, "q")])
    assert "| `depth` | - | 9 |" in text
    assert "## bbb against aaa" in text
    assert f"{0.01 * KAPPA:+.5f} ± 0.00000" in text
