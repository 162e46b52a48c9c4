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
    assert (noise.sigma, noise.freedom) == (pytest.approx(0.001), 0)
    pair = analyze.compute_noise([entry("a", 1.0, "p"), entry("b", 1.002, "p")])
    assert pair.freedom == 1
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
    again = "unknown: run the baseline again with another seed (`uv run analyze.py rerun`)"
    assert analyze.describe_noise(noise) == again
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
    assert analyze.compute_noise(broken).freedom == 0
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
    assert "outside the noise" in analyze.render_replicates(verdict)[1]


def test_a_replicate_that_takes_the_best_its_place_says_which_is_the_best_now():
    entries = [entry("a", 0.990, "p"), entry("b", 0.985, "q")]
    verdict = verdict_of(entry("c", 0.997, "q", "pending"), *entries)
    assert (verdict["kind"], verdict["advice"], verdict["best"]) == ("replicate", "discard", "b")
    assert verdict["mean"] == pytest.approx(0.991)
    assert verdict["dethroned_by"] == ["a", 0.990]
    assert verdict_of(entry("c", 0.986, "q"), *entries)["dethroned_by"] is None


@pytest.mark.parametrize("val", [0.9, 1.1])
def test_a_hampered_run_is_no_evidence_whether_its_score_is_good_or_bad(val):
    verdict = verdict_of(entry("b", val, "q", "pending", hampered=["steps took 2.31 times"]), entry("a", 1.0, "p"))
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
    assert analyze.render_verdict({"verdict": verdict, "record": leaking.record, "expected": None}) == [
        "**INVALID**: val_bpb 0.200000, best so far 1.000000 (a).",
        "- the causality test failed",
        "Decision: discard (`uv run analyze.py discard`)",
    ]


@pytest.mark.parametrize(
    ("this", "facts", "decision"),
    [
        (entry("b", 0.9, "q", "pending"), {}, "keep (`uv run analyze.py keep`)"),
        (entry("b", 1.1, "q", "pending"), {}, "discard (`uv run analyze.py discard`)"),
        (entry("b", None, "q", "crash"), {"is_killed": True},
         f"train the same commit again: the idea was not tested (`{analyze.TRAIN_BESIDE}`); "
         "after three such runs, discard"),
        (entry("b", 1.1, "q", "pending", hampered=["slow"]), {},
         f"train the same commit again, once the machine is quiet (`{analyze.TRAIN_BESIDE}`); "
         "after three such runs, discard"),
        (entry("b-dirty", 1.1, "q", "pending", hampered=["slow"], seed_offset=2), {},
         "train the same commit again, once the machine is quiet, after a commit of this train.py "
         f"(`AUTORESEARCH_SEED_OFFSET=2 {analyze.TRAIN_BESIDE}`); after three such runs, discard"),
    ],
)
def test_the_last_line_of_the_verdict_is_the_decision_with_its_command(this, facts, decision):
    verdict = verdict_of(this, entry("a", 1.0, "p"), **facts)
    stats = {"verdict": verdict, "record": this.record | {"name": this.name}, "expected": None, "crash": None}
    assert analyze.render_verdict(stats)[-1] == f"Decision: {decision}"


def test_a_difference_has_its_error_wherever_the_noise_is_known():
    others = [entry("a", 1.0, "p"), entry("a2", 1.001, "p")]
    for program in ("p", "q"):
        for facts in ({}, {"is_unchanged": True}):
            verdict = verdict_of(entry("b", 0.99, program, "pending"), *others, **facts)
            assert verdict["standard_error"] > 0
            assert verdict["standard_errors"] == pytest.approx(verdict["difference"] / verdict["standard_error"])


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
    reasons = analyze.compute_machine(timed("x", step_ms, program, pace=pace), earlier)
    assert bool(reasons) == is_hampered


def test_a_program_that_is_as_slow_again_is_slow_itself():
    earlier = [timed("r", 100.0, "p"), timed("s", 240.0, "q", hampered=["slow"])]
    assert analyze.compute_machine(timed("t", 241.0, "q"), earlier) == []
    shared = timed("t", 241.0, "q", pace={"other_gpu_mb": 9000.0})
    assert "another process held 9000 MB" in analyze.compute_machine(shared, earlier)[0]


def test_other_work_is_no_measure_of_the_machine():
    larger = timed("x", 240.0, "q", config={"flops_per_token": 5e8})
    assert analyze.compute_machine(larger, [timed("r", 100.0, "p")]) == []


def test_stalls_that_cost_the_score_are_hampering_and_a_few_are_not():
    ms = np.full(600, 500.0)
    ms[300] = 12_000.0  # 11.5 s of 300
    run = make_run(**{"perf/step_time_ms": ms})
    pace = analyze.compute_pace(run)
    assert (pace["stalls"], pace["stalled_s"]) == (1, pytest.approx(11.5))
    hampered = analyze.compute_machine(timed("x", 500.0, "p", pace=pace), [])
    assert hampered == ["1 step(s) took more than twice the median: 11.5 of 300 s lost"]
    pace["stalled_s"] = 5.0
    assert analyze.compute_machine(timed("x", 500.0, "p", pace=pace), []) == []


def test_a_machine_that_became_faster_is_named_before_a_gain_is_believed():
    best = timed("a", 130.0, "p")
    assert analyze.compute_best_pace(timed("b", 100.0, "q"), best) == pytest.approx(1.3)
    assert analyze.compute_best_pace(timed("b", 125.0, "q"), best) is None
    assert analyze.compute_best_pace(timed("b", 100.0, "q", config={"flops_per_token": 5e8}), best) is None


# ---------------------------------------------------------------------------------------------------------------------
# The paired curve
# ---------------------------------------------------------------------------------------------------------------------


def test_the_summary_is_the_mean_of_the_last_two_windows_as_the_table_shows_them():
    paired = analyze.compute_paired(make_run(shift=np.linspace(0, 0.01, 600)), [make_run("best")])
    last, summary = paired["windows"][-2:], paired["summary"]
    assert summary["at_progress"] == pytest.approx((last[0]["at_progress"] + last[1]["at_progress"]) / 2)
    assert summary["from_m"] == last[0]["from_m"]
    told = f"From {summary['from_m']:.4g} M tokens on, at equal progress: **{summary['at_progress']:+.5f} ± "
    assert told in "".join(analyze.render_paired(paired))


def test_where_one_run_is_faster_the_windows_of_its_later_warm_down_are_marked():
    slow, fast = make_run("best", 500), make_run(num_steps=600)
    paired = analyze.compute_paired(fast, [slow])
    assert [w["are_rates_apart"] for w in paired["windows"]] == [False] * 5 + [True] * 5
    lines = analyze.render_paired(paired)
    assert sum("% † |" in line for line in lines) == 5
    assert lines[-1].startswith("† other learning rates on the same text")
    same = analyze.compute_paired(make_run(), [make_run("best")])
    assert not any("†" in line for line in analyze.render_paired(same))


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
    assert paired["summary"] is None  # it would be about the middle of the run


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


def test_rates_schedules_and_batches_that_differ_are_named_and_other_knobs_are_not():
    this, best = make_run(), make_run("best")
    this.summary.update(depth=9, warmdown_ratio=0.7, matrix_lr=0.05, device_batch_size=64, total_batch_size=2**18)
    best.summary.update(depth=8, warmdown_ratio=0.5, matrix_lr=0.05, device_batch_size=128)
    assert analyze.compute_paired(this, [best])["rates"] == [
        "total_batch_size 524288 -> 262144",
        "warmdown_ratio 0.5 -> 0.7",
    ]
    assert analyze.compute_paired(best, [best])["rates"] == []


@pytest.mark.parametrize("num_steps", [2, 3, 15, 35])
def test_too_few_steps_in_common_are_one_line(num_steps):
    short = make_run(num_steps=num_steps), make_run("best", num_steps=num_steps)
    for runs in ((short[0], make_run("best")), (make_run(), short[1])):
        (line,) = analyze.render_paired(analyze.compute_paired(runs[0], [runs[1]]))
        few = f"{num_steps} steps in common, and 40 are needed"
        reason = few if num_steps > 2 else "one of the runs has no losses"
        assert line == f"No pairing with best: {reason}."


def test_a_loss_that_is_no_number_ends_the_curve_there():
    loss = np.linspace(5, 3, 100)
    loss[60] = math.nan
    curve = analyze.compute_curve(make_run(num_steps=100, **{"train/loss": loss}))
    assert len(curve.loss) == 60
    assert analyze.compute_curve(make_run(num_steps=2)) is None


# ---------------------------------------------------------------------------------------------------------------------
# Training and validation, and an edit without effect
# ---------------------------------------------------------------------------------------------------------------------


def test_over_fitting_is_called_that_when_the_text_repeats_and_the_gap_opens():
    epochs = [1 + (i >= 350) for i in range(600)]
    gap = analyze.compute_gap(make_run(val=0.90, **{"train/epoch": epochs}), [make_run("best", val=0.78)])
    training, behind, error = gap["this"]
    assert training + behind == pytest.approx(0.90)
    assert gap["best"] == pytest.approx([training, 0.78 - training, error])
    assert 0 < error < 0.01
    assert analyze.render_gap(gap)[1] == ("**Over-fitting**: epoch 2, of about 184 M packed tokens each, and "
                                          "validation is left behind: more passes need not help.")
    assert not analyze.compute_gap(make_run(val=0.90), [])["is_overfitting"]  # one epoch
    for other in ([e - 1 for e in epochs], [i / 350 for i in range(600)]):  # counted from 0, and in parts
        assert analyze.render_gap(analyze.compute_gap(make_run(val=0.90, **{"train/epoch": other}), []))[1].startswith(
            "**Over-fitting**: epoch 2, of about 184 M packed tokens each")


def test_an_edit_that_changed_nothing_is_said_to_have_changed_nothing():
    this, best = make_run(), make_run("best")
    changes = {"config": {}, "is_config_known": True}
    verdict = {"kind": "not better", "difference": 0.0001, "standard_error": 0.001}
    assert analyze.is_unchanged(this, best, changes, verdict)
    averaged = verdict | {"difference": -0.01}  # only the score differs, as with averaged weights
    assert not analyze.is_unchanged(this, best, changes, averaged)
    assert not analyze.is_unchanged(this, best, changes | {"config": {"depth": [8, 9]}}, verdict)
    rates = 0.05 + 0.95 * best.series("train/lr_multiplier")  # a schedule changed in the code
    warmer = make_run(**{"train/lr_multiplier": rates.tolist()})
    assert not analyze.is_unchanged(warmer, best, changes, verdict)
    entries = [entry("best", 0.99, "p", config={"depth": 8}), entry("this", 0.99, "q", "pending", config={"depth": 8})]
    stats = analyze.compute_stats(this, entries[1], entries, [best])
    assert stats["verdict"]["kind"] == "unchanged"
    other = make_run("other", shift=0.03)
    other.summary["seed"] = 43
    assert analyze.compute_stats(this, entries[1], entries, [best, other])["verdict"]["kind"] == "unchanged"
    assert stats["record"]["program"] == "p"  # a replicate from now on
    assert analyze.compute_history([entries[0], analyze.Entry("this", "discard", "", stats["record"])])["lineage"] == [
        ["best", 0.99, ""]
    ]
    assert any("changed nothing" in line for line in analyze.render_verdict(stats))


# ---------------------------------------------------------------------------------------------------------------------
# Layers, and the page
# ---------------------------------------------------------------------------------------------------------------------


def layers_of(**series):
    """Looks at one step in ten: `series` name a list of what is seen in equal parts of the run (mostly early and late),
    by layer or parameter."""
    columns = {}
    for key, values in ({"layers/names": [["a", "b", "c"]], "params/names": [["p", "q", "r"]]} | series).items():
        columns[key] = [None if i % 10 else values[i * len(values) // 600] for i in range(600)]
    return make_run(**columns)


def test_what_is_dead_without_gradient_or_exploding_comes_before_what_is_unlike_the_best():
    this = layers_of(**{
        "layers/rms": [[1.0, 1.0, 1.0], [1.1, 50.0, 3.5]],
        "layers/dead": [[0.0, 0.0, 0.0], [0.0, 0.0, 0.25]],
        "params/grad_rms": [[1.0, 1.0, 1.0], [1.0, 0.0, 0.2]],
    })
    best = layers_of(**{"layers/rms": [[1.0] * 3] * 2, "params/grad_rms": [[1.0] * 3] * 2})
    assert analyze.compute_layers(this, best) == [
        "gradient RMS of q: 0, no gradient (early 1, best 1)",
        "output RMS of b: 50, exploding (early 1, best 1)",
        "dead units of c: 0.25, dead (early 0, best unknown)",
        "gradient RMS of r: 0.2 (early 1, best 1)",
        "output RMS of c: 3.5 (early 1, best 1)",
    ]
    assert analyze.compute_layers(best, best) == []


def test_the_eight_largest_departures_are_named_and_two_of_a_kind():
    many = {f"scalars/s{i}": [[1.0, 1.0], [10.0 + i, 10.0 + i]] for i in range(9)}
    this = layers_of(**many, **{"layers/rms": [[1.0] * 3, [9.0, 8.0, 7.0]]})
    best = layers_of(**{"layers/rms": [[1.0] * 3] * 2})
    assert [line.split(":")[0] for line in analyze.compute_layers(this, best)] == [
        "scalar RMS of s8", "scalar RMS of s7", "output RMS of a", "output RMS of b"]


def test_one_odd_look_among_sixty_names_no_layer():
    usual, odd = [1.0] * 3, [1.0, 50.0, 1.0]
    best = layers_of(**{"layers/rms": [usual]})
    assert analyze.compute_layers(layers_of(**{"layers/rms": [usual] * 53 + [odd] + [usual] * 6}), best) == []
    assert analyze.compute_layers(layers_of(**{"layers/rms": [usual] * 50 + [odd] * 10}), best) == [
        "output RMS of b: 50, exploding (early 1, best 1)"]


def test_blocks_of_another_depth_are_not_compared_by_their_numbers():
    def blocks(num, rms):
        names = [*(f"blocks.{i}.mlp" for i in range(num)), "lm_head"]
        return layers_of(**{"layers/names": [names], "layers/rms": [[rms] * (num + 1)]})

    assert len(analyze.compute_layers(blocks(2, 9.0), blocks(2, 1.0))) == 2
    assert analyze.compute_layers(blocks(3, 9.0), blocks(2, 1.0)) == ["output RMS of lm_head: 9 (early 9, best 1)"]


def test_scalars_start_where_the_configuration_says_and_stand_beside_the_bests():
    this = layers_of(**{"scalars/x0_lambdas": [[-0.4, -0.4], [4.79, 4.79]]})
    best = layers_of(**{"scalars/x0_lambdas": [[-0.4, -0.4], [2.0, 2.0]]})
    this.summary["x0_lambda_init"] = 0.1
    assert analyze.compute_layers(this, best) == ["scalar RMS of x0_lambdas: 4.79 (early 0.1, best 2)"]


@pytest.mark.parametrize(
    ("first", "init", "toss"),
    [
        (0.6, 0.1, "x0_lambdas to 0.6, the best's to -0.4"),
        (-0.3, 0.1, None),
        (-0.3, -0.8, "x0_lambdas to -0.3, the best's to -0.4"),
        (0.1004, 0.1, None),  # with a warm-up
        (0.6, None, None),
        (math.nan, 0.1, None),
    ],
)
def test_scalars_that_the_first_step_moved_the_other_way_are_a_toss(first, init, toss):
    best = make_run("best", **{"scalars/x0_lambdas": [[-0.4, -0.4]] * 600})
    this = make_run(**{"scalars/x0_lambdas": [[first, first]] * 600})
    best.summary["x0_lambda_init"], this.summary["x0_lambda_init"] = 0.1, init
    assert analyze.find_toss(this, best) == toss
    assert analyze.find_toss(this, make_run("best")) is None  # which logs none
    for run, values in ((best, [-0.4, 0.6]), (this, [0.6, -0.4])):
        run.records[0]["scalars/other"], run.summary["other_init"] = values, 0.1
    assert analyze.find_toss(this, best) == toss  # these have gradients of their own
    entries = [entry("best", 0.99, "p"), entry("this", 0.98, "q", "pending")]
    for e in entries:
        e.record["name"] = e.name
    page = analyze.render_analysis(analyze.compute_stats(this, entries[1], entries, [best]), [])
    assert (f"Mind: the first step took {toss}: while blocks" in page) == bool(toss)


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
    assert headings[:3] == ["## Verdict", "## Paired curve", "## Training and validation"]
    assert page.partition("\n\n## Paired curve")[0].endswith("\nDecision: keep (`uv run analyze.py keep`)")
    assert "**NEW BEST**: val_bpb 0.980000, best so far 0.990000 (best), difference -0.010000 ± 0.001414 bpb" in page
    assert json.loads(json.dumps(stats)) == stats
    assert "Cut here" not in page
    cut = analyze.render_analysis(stats | {"layers": [f"unit {i}" for i in range(60)]}, [])
    assert cut.endswith("\nCut here; stats.json has the rest.\n")
    assert cut.count("\n") < analyze.PAGE_LINES


def test_compare_shows_scores_settings_that_differ_and_the_paired_curve():
    runs = [make_run("aaa"), make_run("bbb", shift=0.01)]
    runs[1].summary["depth"] = 9
    text = analyze.render_compare(runs, [entry("aaa", 0.99, "p"), entry("bbb", 0.98, "q")])
    assert "| val_bpb | 0.990000 | 0.980000 |\n| `depth` | null | 9 |\n\n" in text
    assert "## bbb against aaa" in text
    assert f"{0.01 * KAPPA:+.5f} ± 0.00000" in text
