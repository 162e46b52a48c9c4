"""The pictures by what is drawn, the morning's pages word for word: hand-made runs and small archives."""

import dataclasses
import json
import math
import re
import subprocess

import numpy as np
import pytest

import analyze
from analyze import Book, Entry, Run

CONFIG = {"depth": 8, "matrix_lr": 0.04, "mlp_ratio": 4, "seed": 42, "num_params_M": 50.3, "time_budget": 300}


def make_run(name="a1b2c3d", num_steps=200, loss=None, step_ms=300.0, layers=("blocks.0", "lm_head"), **start):
    steps = np.arange(num_steps)
    loss = 3.0 - 0.004 * steps if loss is None else loss
    records = []
    for i in steps:
        record = {
            "step": int(i), "train/loss": float(loss[i]), "train/tokens": int(1_000_000 * (i + 1)),
            "train/progress": i / num_steps, "perf/step_time_ms": step_ms, "train/grad_norm": 0.5,
            "time/training_s": (i + 1) * step_ms / 1000, "train/lr_multiplier": 1.0, "train/muon_momentum": 0.95,
            "train/weight_decay": 0.2, "train/epoch": 1, "lr/wte": 0.6, "lr/lm_head": 0.6, "lr/matrix": 0.04,
        }
        if i % 20 == 0:
            record |= {"layers/names": list(layers), "layers/rms": [1.0 + i] * len(layers),
                       "layers/input_zeros": [None] + [0.5] * (len(layers) - 1), "params/names": ["wte.weight"],
                       "params/weight_rms": [0.0 if i == 0 else 1.0], "params/update_rms": [0.01],
                       "scalars/x0_lambdas": [0.1, 0.2]}
        records.append(record)
    return Run(name, None, start, {"time_budget": 60.0}, None, records, "", "")


def draw_loss(this, best=None, windows=()):
    return analyze.draw_loss(this, best, list(windows))


def labels_of(axes):
    return axes.get_legend_handles_labels()[1]


def entry(name, val, status="keep", description="an idea", kind="new best", config=None, best=None, **record):
    """A run in the books. `config`: what it has unlike CONFIG."""
    facts = {"val_bpb": val, "program": name, "config": CONFIG | (config or {}), "total_s": 360.0, "folder": "/night"}
    facts |= {"time_budget": 300.0} | record
    return Entry(name, status, description, facts, {"verdict": {"kind": kind, "best": best}})


def lineage_of(entries):
    return analyze.compute_history(entries)["lineage"]


def draw_progress(entries):
    return analyze.draw_progress(entries, lineage_of(entries))


def render_gain(archive, entries):
    return analyze.render_gain(archive, entries, analyze.compute_history(entries))


def render_report(book, archive, pictures):
    return analyze.render_report(book, analyze.compute_history(book.entries), archive, pictures)


def book(entries, *problems):
    return Book(entries, problems=list(problems))


def night():
    """Six runs: a baseline, a proven gain, an unproven one, a loss, a crash, and a hampered run that is pending."""
    entries = [
        entry("a000000", 0.998, description="baseline", kind="baseline"),
        entry("b000000", 0.990, description="matrix_lr 0.04 -> 0.05, expect -0.0060", best="a000000",
              config={"matrix_lr": 0.05}),
        entry("c000000", 0.989, description="rewrite | of the MLP", kind="unproven", best="b000000",
              config={"matrix_lr": 0.05, "num_params_M": 51.0}),
        entry("d000000", 0.995, "discard", "deeper, expect -0.0010", "not better", best="c000000",
              config={"matrix_lr": 0.05, "depth": 9, "num_params_M": 60.0}),
        entry("e000000", None, "crash", "wider", "crash", crash="out of memory"),
        entry("f000000", 1.2, "pending", "slow machine", "hampered"),
    ]
    for i, e in enumerate(entries):
        e.record.update(started_unix=1.7e9 + 400 * i, ended_unix=1.7e9 + 400 * i + 360)
    return entries


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of a run
# ---------------------------------------------------------------------------------------------------------------------


def test_a_first_run_fills_the_loss_picture_alone_and_the_thin_line_is_in_the_legend():
    figure = draw_loss(make_run())
    (axes,) = figure.axes
    assert labels_of(axes) == ["this, each step", "this: a1b2c3d"]
    figure.draw_without_rendering()
    assert axes.get_position().height > 0.75


def test_the_paired_difference_is_drawn_by_windows_with_two_standard_errors_and_repeats_shaded():
    windows = [
        {"from_m": 0.0, "to_m": 100.0, "difference": -0.02, "error": 0.003, "at_progress": None,
         "at_progress_error": None, "is_repeat": False},
        {"from_m": 100.0, "to_m": 200.0, "difference": 0.01, "error": 0.001, "at_progress": 0.005,
         "at_progress_error": 0.002, "is_repeat": True},
    ]
    loss, paired = draw_loss(make_run(), make_run("f00ba12"), windows).axes
    assert labels_of(loss) == ["best: f00ba12", "this, each step", "this: a1b2c3d"]
    assert labels_of(paired) == ["text seen before: no measure of learning", "at equal tokens", "at equal progress"]
    (tokens, _, (token_bars,)), (progress, _, (progress_bars,)) = paired.containers
    assert tokens.get_xydata().tolist() == [[50.0, -0.02], [150.0, 0.01]]
    assert [bar[:, 1].tolist() for bar in token_bars.get_segments()] == [
        pytest.approx([-0.026, -0.014]), pytest.approx([0.008, 0.012])]
    assert progress.get_xydata()[1].tolist() == [150.0, 0.005]
    assert progress_bars.get_segments()[-1][:, 1] == pytest.approx([0.001, 0.009])
    (shade,) = paired.patches
    assert (shade.get_x(), shade.get_width()) == (100.0, 100.0)


def test_a_dip_is_never_cut_off_and_the_start_does_not_flatten_the_rest():
    loss = np.linspace(3.0, 2.0, 200)
    loss[0], loss[150] = 11.0, 0.5
    low, high = draw_loss(make_run(loss=loss)).axes[0].get_ylim()
    assert low < 0.5
    assert high < 4.0


@pytest.mark.parametrize(("num_rows", "num_names"), [(2, 2), (61, 61), (100, 100), (101, 0)])
def test_every_row_of_a_heat_map_is_named_or_none(num_rows, num_names):
    figure = analyze.draw_layers(make_run(layers=[f"blocks.{i}" for i in range(num_rows)]), None)
    assert len([t for t in figure.axes[0].get_yticklabels() if t.get_text()]) == num_names


def test_a_cell_without_a_value_is_grey_and_the_bests_late_state_stands_behind_a_gap_in_the_same_colours():
    figure = analyze.draw_layers(make_run(), make_run("f00ba12", num_steps=100))
    by_title = {axes.get_title(loc="left").split(";")[0]: axes for axes in figure.axes}
    update = by_title["update/weight, log10"].images[0].get_array()
    assert update.mask.tolist() == [[True] + [False] * 9 + [True, False]]
    assert by_title["update/weight, log10"].get_facecolor()[:3] == (0.85, 0.85, 0.85)
    assert figure.get_supxlabel() == "step; grey: zero or not finite"
    output = by_title["output RMS, log10"].images[0]
    assert output.get_array()[:, -1].tolist() == pytest.approx([math.log10(61)] * 2)  # of five looks the fourth
    assert output.get_extent() == [0, 240, 1.5, -0.5]


def test_a_program_that_logs_one_kind_of_layer_statistics_gets_that_map():
    run = make_run()
    for record in run.records:
        record.pop("layers/names", None)
    empty, full = analyze.draw_layers(run, None).axes[:2]
    assert (len(empty.images), len(full.images)) == (0, 1)


def test_schedules_gradient_and_step_time_are_one_picture_and_a_stall_does_not_flatten_it():
    run, best = make_run(), make_run("f00ba12", step_ms=290.9)
    run.records[50]["perf/step_time_ms"] = 9000.0
    figure = analyze.draw_schedule_and_machine(run, best)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["learning rate, share of its peak", "weight decay", "gradient norm", "step time, ms"]
    for axes in figure.axes:
        assert labels_of(axes) == ["best: f00ba12", "this, each step", "this: a1b2c3d"]
    assert figure.axes[3].get_ylim() == pytest.approx((290.9 - 0.91 - 1e-3, 300.0 + 2 * (0.91 + 1e-3)))


def test_a_program_that_logs_little_gets_the_pictures_that_it_can(tmp_path):
    records = [{"step": i, "train/loss": 3.0, "perf/step_time_ms": 10.0} for i in range(20)]
    run = Run("a1b2c3d", tmp_path, {}, {"total_batch_size": 2**19}, None, records, "", "")
    assert analyze.write_pictures(run, None, None) == (["loss_curve.png", "schedule_and_machine.png"], {})
    header = (tmp_path / "loss_curve.png").read_bytes()[:24]
    assert (header[:4], int.from_bytes(header[16:20], "big")) == (b"\x89PNG", 1200)


def test_a_surprise_costs_its_picture_alone(tmp_path):
    run = make_run()
    run.records[20]["layers/rms"] = 3.0
    run = Run("a1b2c3d", tmp_path, {}, {}, None, run.records, "", "")
    made, failed = analyze.write_pictures(run, None, None)
    assert made == ["loss_curve.png", "schedule_and_machine.png"]
    assert list(failed) == ["layers.png"]


# ---------------------------------------------------------------------------------------------------------------------
# The picture of a night
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_runs", [1, 8, 100])
def test_the_axis_of_the_nights_picture_fits_the_number_of_runs(num_runs):
    (axes,) = draw_progress([entry(f"{i:07x}", 1 - i / 1000) for i in range(num_runs)]).axes
    first, last = axes.get_xlim()
    assert 0 <= 1 - first <= 0.6 + 0.02 * num_runs
    assert 0 <= last - num_runs <= 0.6 + 0.02 * num_runs
    assert all(tick == int(tick) for tick in axes.get_xticks())


def test_the_baseline_has_a_line_and_each_kind_of_run_its_own_mark():
    (axes,) = draw_progress(night()).axes
    lines = dict(zip(labels_of(axes), axes.get_legend_handles_labels()[0], strict=True))
    assert list(lines) == ["on it: off the scale, or no score", "keep (2)", "keep, unproven (1)", "discard (1)",
                           "hampered (1)", "crash (1)", "baseline, 0.9980", "best, 0.9890"]
    assert set(lines["baseline, 0.9980"].get_ydata()) == {0.998}
    assert lines["keep, unproven (1)"].get_markerfacecolor() == "white"
    assert lines["keep, unproven (1)"].get_xydata().tolist() == [[3, 0.989]]
    top = lines["on it: off the scale, or no score"].get_ydata()[0]
    assert lines["hampered (1)"].get_ydata()[0] == top > lines["keep (2)"].get_ydata().max()


@pytest.mark.parametrize(("status", "kind", "mark"), [
    ("keep", "baseline", "keep"), ("keep", "replicate", "keep"), ("keep", "new best", "keep"),
    ("keep", "unproven", "keep, unproven"), ("keep", "not better", "keep, unproven"),
    ("discard", "new best", "discard"), ("pending", "unproven", "pending"), ("pending", "hampered", "hampered"),
    ("discard", "stopped", "stopped"), ("crash", "crash", "crash"), ("invalid", "invalid", "invalid"),
])
def test_a_run_is_marked_by_what_its_verdict_proves_and_what_was_decided(status, kind, mark):
    assert analyze.mark_of(entry("a000000", 0.99, status, kind=kind)) == mark


def test_only_the_largest_steps_are_numbered_and_told_in_the_margin():
    vals = [1 - i / 1000 - (i >= 5) / 100 for i in range(12)]
    entries = [entry(f"{i:07x}", val, description=f"idea {i}, expect -0.001") for i, val in enumerate(vals)]
    (axes,) = draw_progress(entries).axes
    *numbers, told = (text.get_text() for text in axes.texts)
    assert numbers == ["1", "2", "3", "4", "5", "6", "7", "8"]
    assert "-0.0110  idea 5\n" in told
    assert "expect" not in told


def test_the_demos_pictures_say_so():
    assert draw_loss(make_run(demo=True)).get_suptitle() == "demo: a1b2c3d: training loss"
    night_of_the_demo = draw_progress([entry("a000000", 2.0, demo=True)])
    assert night_of_the_demo.get_suptitle() == "demo: val_bpb over experiments, lower is better"


def test_a_night_without_a_score_has_a_picture_too():
    (axes,) = draw_progress([entry("e000000", None, "crash", kind="crash")]).axes
    assert labels_of(axes)[1] == "crash (1)"
    assert draw_progress([]).axes


# ---------------------------------------------------------------------------------------------------------------------
# Effects, predictions, claims
# ---------------------------------------------------------------------------------------------------------------------


def test_effects_tell_what_each_knob_brought_and_which_nobody_touched():
    assert analyze.render_effects(night(), 10) == [
        "matrix_lr: 0.04 -> 0.05 -0.00800 ± 0.00141 (a gain) in b000000",
        "depth: 8 -> 9 +0.00600 ± 0.00141 (a loss) in d000000",
        "rewrite | of the MLP: code -0.00100 ± 0.00141 (inside the noise) in c000000",
        "never touched: mlp_ratio",
    ]
    assert analyze.render_effects(night(), 1) == [
        "matrix_lr: 0.04 -> 0.05 -0.00800 ± 0.00141 (a gain) in b000000",
        "never touched: mlp_ratio",
    ]


def test_an_effect_is_told_by_all_runs_of_the_program_and_two_knobs_at_once_say_so():
    both = {"depth": 9, "mlp_ratio": 3, "num_heads": 5, "num_kv_heads": 5}
    base = entry("a000000", 1.0, kind="baseline", config={"num_heads": 4, "num_kv_heads": 4})
    first = entry("b000000", 0.99, config=both, program="p", best="a000000")
    again = entry("c000000", 0.994, kind="replicate", config=both, program="p", seed=43, best="b000000")
    assert analyze.render_effects([base, first, again], 10) == [  # means 1.0 and 0.992; sigma^2 = (8e-6 + 2e-6) / 3
        "depth: 8 -> 9, one of 2 changes -0.00800 ± 0.00224 (a gain) in b000000",
        "mlp_ratio: 4 -> 3, one of 2 changes -0.00800 ± 0.00224 (a gain) in b000000",
        "never touched: matrix_lr, num_kv_heads",
    ]


def outcomes(*entries):
    return {name: analyze.render_effect(effect) for name, effect in analyze.compute_effects(entries).items()}


def test_what_is_said_of_an_effect_is_true_of_all_runs_there_are_by_now():
    base = entry("a000000", 1.0, kind="baseline")
    lucky = entry("b000000", 0.99, program="p", best="a000000")
    unlucky = entry("c000000", 1.012, kind="replicate", program="p", seed=43, best="b000000")
    assert outcomes(base, lucky) == {"b000000": "-0.01000 ± 0.00141 (a gain)"}
    told = outcomes(base, lucky, unlucky)  # sigma^2 = (2.42e-4 + 2e-6) / 3
    assert told == {"b000000": "+0.00100 ± 0.01105 (inside the noise)"}


def test_a_run_has_one_figure_in_all_places_and_a_knob_tried_in_a_crash_was_touched(tmp_path):
    unlucky = entry("g000000", 0.996, kind="replicate", program="b000000", seed=43, best="b000000")
    crash = entry("h000000", None, "crash", kind="crash", crash="out of memory")
    crash.stats["changes"] = {"config": {"mlp_ratio": [4, 3]}}
    report = render_report(book([*night(), unlucky, crash]), tmp_path, [])
    figure = re.search(r"matrix_lr: 0.04 -> 0.05 (\S+ ± \S+ \(.*?\)) in b000000", report)[1]
    assert f"| b000000 | 0.990000 | keep | {figure} |" in report
    assert f"matrix_lr 0.04 -> 0.05: {figure}" in report.split("![]")[0]
    assert "never touched: none" in report


def test_a_run_called_invalid_by_hand_is_no_effect_and_no_base_of_one():
    base = entry("a000000", 1.0, kind="baseline")
    idea = entry("b000000", 0.5, "invalid", best="a000000")
    after = entry("c000000", 0.99, best="b000000")
    assert outcomes(base, idea) == outcomes(base, idea, after) == {}


def test_an_effect_of_unknown_noise_counts_as_inside_it():
    base, idea = entry("a000000", 1.0, demo=True), entry("b000000", 0.5, best="a000000", demo=True)
    assert outcomes(base, idea) == {"b000000": "-0.50000 ± unknown (inside the noise)"}


def test_a_commit_that_left_the_program_as_it_was_is_measured_on_the_best():
    best = entry("a000000", 1.0, kind="baseline", train_sha256="A")
    again = entry("b000000", 0.99, best="a000000", train_sha256="B", built_on="B")  # its first run was stopped
    assert outcomes(best, again) == {"b000000": "-0.01000 ± 0.00141 (a gain)"}


@pytest.mark.parametrize(("subject", "expected"), [
    ("warmdown 0.5 -> 0.7: longer decay, expect -0.0006", -0.0006),
    ("half the batch, expected: -0.0119 bpb", -0.0119),
    ("deeper; expecting about +.002", 0.002),
    ("Expect val_bpb \u22120.0006", -0.0006),
    ("predicts -0.0006", -0.0006),
    ("expect 0.0006", None),
    ("expect -10 % step time", None),
    ("expect -10% step time", None),
    ("expect a gain of 0.0006", None),
    ("warmdown -0.0006", None),
    ("unexpected -0.1", None),
])
def test_a_prediction_is_read_in_several_spellings_but_not_without_its_sign(subject, expected):
    idea, found = analyze.read_subject(entry("a000000", 1.0, description=subject))
    assert found == expected
    assert "expect" not in idea or expected is None


def test_where_the_best_was_another_agents_an_idea_is_measured_on_what_it_was_built_on():
    base, sibling = entry("a000000", 0.998, kind="baseline", train_sha256="A"), entry("b000000", 0.980)
    idea = entry("c000000", 0.990, "pending", "depth 9, expect -0.0100", config={"depth": 9}, built_on="A")
    verdict = analyze.compute_verdict(idea, [base, sibling, idea])
    assert (verdict["kind"], verdict["best"]) == ("not better", "b000000")
    entries = [base, sibling, dataclasses.replace(idea, stats={"verdict": verdict})]
    told = "depth: 8 -> 9 -0.00800 ± 0.00141 (a gain, against a000000) in c000000"
    assert analyze.render_effects(entries, 1)[0] == told
    assert analyze.render_calibration(entries) == "Predictions with the right sign: 1 of 1."
    effect = analyze.compute_effects(entries)["c000000"]
    stats = {"verdict": verdict, "record": idea.record, "effect": effect, "expected": -0.01}
    assert analyze.render_verdict(stats)[1:3] == [
        "Built on a000000: -0.00800 ± 0.00141 bpb against that one.",
        "Expected -0.0100, came -0.0080 ± 0.0014.",
    ]
    for untold in ({"expected": None}, {"effect": None}, {"effect": effect | {"standard_error": None}}):
        assert not any(line.startswith("Expected") for line in analyze.render_verdict(stats | untold))


def test_the_history_says_how_well_the_author_predicts():
    assert analyze.render_calibration(night()) == "Predictions with the right sign: 1 of 2."
    assert analyze.render_calibration(night()[:1]) == ""


def test_claims_are_checked_against_the_runs_they_cite():
    text = """# Insights

## Claims
- A higher rate helps (b000000, c000000).
- The MLP can be rewritten,
  which brings -0.0010 (c000000).
- Steps take 300 ms (c000000).
- Depth hurts: d000000, d000001.
- 1048576 tokens a step are too many (a000000).
- The machine is slow today.
"""
    assert analyze.check_insights(text, night()) == [
        "rests on runs inside the noise alone: The MLP can be rewritten, which brings -0.0010 (c000000).",
        "no run is called d000001: Depth hurts: d000000, d000001.",
    ]
    assert analyze.check_insights(None, night()) == []


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


def write_scores(archive, audits):
    for name, audit in audits.items():
        (archive / name).mkdir(exist_ok=True)
        (archive / name / "eval_record.json").write_text(json.dumps({"audit_bpb": audit}))


def test_the_report_of_a_night_word_for_word(tmp_path):
    write_scores(tmp_path, {"a000000": 0.990, "c000000": 0.9825})
    full = book(night(), "results.tsv line 3: no files of a run 'g000000' in the archive")
    gain, luck = analyze.compute_history(night())["gain"], analyze.compute_history(night()).get("optimism")
    report = render_report(full, tmp_path, ["c000000/layers.png"])
    opening, rest = report.split("\n\n![](progress.png)\n\n")
    assert rest == """\
## Effects

- matrix_lr: 0.04 -> 0.05 -0.00800 ± 0.00141 (a gain) in b000000
- depth: 8 -> 9 +0.00600 ± 0.00141 (a loss) in d000000
- rewrite | of the MLP: code -0.00100 ± 0.00141 (inside the noise) in c000000
- never touched: mlp_ratio

Predictions with the right sign: 1 of 2.

## Everything tried

| run | val_bpb | decision | outcome | description |
| --- | --- | --- | --- | --- |
| a000000 | 0.998000 | keep | baseline | baseline |
| b000000 | 0.990000 | keep | -0.00800 ± 0.00141 (a gain) | matrix_lr 0.04 -> 0.05, expect -0.0060 |
| c000000 | 0.989000 | keep, unproven | -0.00100 ± 0.00141 (inside the noise) | rewrite / of the MLP |
| d000000 | 0.995000 | discard | +0.00600 ± 0.00141 (a loss) | deeper, expect -0.0010 |
| e000000 | unknown | crash | out of memory | wider |
| f000000 | 1.200000 | hampered | hampered | slow machine |

results.tsv line 3: no files of a run 'g000000' in the archive

## Pictures of the best run

![](c000000/layers.png)
"""
    assert opening.startswith(
        "# Report\n\nval_bpb went from 0.998000 to 0.989000 (c000000), a gain of 0.009000 ± 0.001414 (standard error) "
        "over the first kept run, a000000: 6 runs (1 pending, 3 keep, 1 discard, 1 crash), 0.60 h of training, "
        "the GPU at work 92% of the time. ")
    assert opening.endswith(
        "On validation text that no score used the gain is 0.007500: the search may have fitted 0.001500 to the text "
        "of the score. What helped: matrix_lr 0.04 -> 0.05: -0.00800 ± 0.00141 (a gain). Kept besides, and unproven "
        "one by one: rewrite | of the MLP: -0.00100 ± 0.00141 (inside the noise).")
    assert ("Chosen among equals, the best reads about " in opening) == bool(luck)
    assert gain is not None


def test_the_report_names_what_helped_most_first(tmp_path):
    gains = (0.004, 0.010, 0.005, 0.007, 0.006, 0.009, 0.008)
    entries = [entry("a000000", 0.998, description="baseline", kind="baseline")]
    for i, gain in enumerate(gains):
        val = entries[-1].val_bpb - gain
        entries.append(entry(f"b00000{i}", val, description=f"idea {i}", best=entries[-1].name))
    told = render_gain(tmp_path, entries).partition("What helped: ")[2]
    assert re.findall(r"idea (\d)", told) == ["1", "5", "6", "3", "4", "2"]


def test_a_gain_that_no_other_text_confirms_is_said_not_to_be_confirmed(tmp_path):
    write_scores(tmp_path, {"a000000": 0.990, "c000000": None})
    opening = render_gain(tmp_path, night())
    assert "It is not confirmed: no text but the score's own was scored, for want of validation" in opening
    assert "fitted" not in opening


def test_a_night_without_a_gain_says_so(tmp_path):
    demo = book([entry("a000000", 2.1, kind="baseline", total_s=41.0, demo=True)])
    assert render_report(demo, tmp_path, []).startswith(
        "# Report on the demo\n\n1 run (1 keep), 0.01 h of training. No gain over the first kept run.\n")
    assert render_gain(tmp_path, []).endswith("No run is kept yet.")


@pytest.mark.parametrize(("before", "after"), [
    ("a = 1\nb = 2\n", "a = 1\nb = 3\n"),
    ("a = 1\nb = 2", "a = 1\nb = 3"),
    ("a = 1\r\nb = 2\r\n", "a = 1\r\nb = 3\n"),
    ("a = 1\n\x0c\nb = '\u2028'\n", "a = 2\n\x0c\nb = '\u2028 \x1c'\n"),
])
def test_best_patch_applies_in_a_real_repository_and_brings_the_bests_files(tmp_path, before, after):
    folder = tmp_path
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    (folder / "train.py").write_bytes(before.encode())
    (folder / "old.py").write_text("x = 1\n")
    base, best = make_run("a000000", modules={"old.py": "x = 1\n"}), make_run("c000000")
    base = Run("a000000", None, base.start, {}, None, [], None, before)
    best = Run("c000000", None, {"modules": {"old.py": "x = 2\n", "new.py": "y = 1"}}, {}, None, [], None, after)
    patch = analyze.render_patch(night()[:3], analyze.compute_effects(night()), base, best)
    assert patch.startswith("""\
# From a000000 to c000000: git apply best.patch
# | run | val_bpb | decision | outcome | description |
# | --- | --- | --- | --- | --- |
# | a000000 | 0.998000 | keep | baseline | baseline |
# | b000000 | 0.990000 | keep | -0.00800 ± 0.00141 (a gain) | matrix_lr 0.04 -> 0.05, expect -0.0060 |
# | c000000 | 0.989000 | keep, unproven | -0.00100 ± 0.00141 (inside the noise) | rewrite / of the MLP |
diff --git a/train.py b/train.py
""")
    (folder / "best.patch").write_bytes(patch.encode())
    subprocess.run(["git", "apply", "best.patch"], cwd=folder, check=True)
    assert (folder / "train.py").read_bytes().decode() == after
    assert (folder / "old.py").read_text() == "x = 2\n"
    assert (folder / "new.py").read_text() == "y = 1"


def test_the_morning_is_written_whole_with_the_report_last(tmp_path, monkeypatch):
    for name in ("a000000", "c000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.py").write_text(f"name = {name!r}\n")
    (tmp_path / "c000000" / "layers.png").write_bytes(b"picture")
    written, write = [], analyze.write_atomic
    monkeypatch.setattr(analyze, "write_atomic", lambda path, data: (written.append(path.name), write(path, data)))
    analyze.write_morning(tmp_path, book(night()))
    assert written == ["progress.png", "best.patch", "report.md"]
    assert "+name = 'c000000'\n" in (tmp_path / "best.patch").read_text()
    assert "![](c000000/layers.png)" in (tmp_path / "report.md").read_text()
