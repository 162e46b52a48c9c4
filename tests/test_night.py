"""The analysis on real curves: night.tar.gz, the archive of 24 runs of five minutes.

Two H200s of one host with an archive in common, 147 M training tokens of mixed English. Pictures and checkpoints are
left out, and metrics are merged: a record is the mean over 4.2 M tokens, its `train/micro_losses` are quarters of that,
and layer statistics are there at five looks. What each run's analysis said in that night, from all of its steps, stands
in its stats.json.
"""

import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import analyze

BASELINES = ("d30e1a4", "d30e1a4.2")


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    with tarfile.open(Path(__file__).with_name("night.tar.gz")) as tar:
        tar.extractall(folder, filter="data")
    return folder / "night"


@pytest.fixture(scope="module")
def book(night):
    return analyze.load_book(night)


def runs_of(night, names):
    return [analyze.load_run(name, night) for name in names]


def test_the_books_read_as_they_were_kept(book):
    assert book.problems == []
    assert [e.status for e in book.entries].count("keep") == 10
    best, history = analyze.compute_best(book.entries), analyze.compute_history(book.entries)
    assert (best.name, best.mean) == ("7153bc4", pytest.approx((0.828212 + 0.829005 + 0.830021) / 3, abs=1e-6))
    assert history["gain"] == pytest.approx(0.864599 - 0.829079 - 0.000257, abs=1e-6)  # the lowest of several reads low
    assert [name for name, _, _ in history["lineage"]] == [
        "d30e1a4.2", "67e93db", "06e6e30", "acb2820", "bcf323f", "c2a0aa7", "7153bc4"]


def test_seeds_of_one_program_are_one_group_and_tell_the_noise(book):
    groups = {e.name: e.group for e in book.entries}
    seeds = ["bcf323f", "cfebc35", "cfebc35.2", "e12c35f"]
    assert len({groups[name] for name in seeds}) == 1
    assert len(set(groups.values())) == 17
    assert [analyze.render_outcome(book.entry(name), {}) for name in seeds[1:]] == ["replicate of bcf323f"] * 3
    scores = [e.val_bpb for e in book.entries if e.name in seeds]
    assert np.std(scores, ddof=1) == pytest.approx(0.000467, abs=1e-6)
    noise = analyze.compute_noise(book.entries)
    assert (noise.sigma, noise.freedom) == (pytest.approx(0.000755, abs=1e-6), 7)


def test_records_made_again_from_the_files_are_those_of_the_night(night, book):
    for e in book.entries:
        run = analyze.load_run(e.name, night)
        again = analyze.compute_record(run, book.facts, analyze.Origin(e.name))
        for key in ("identity", "program", "config", "val_bpb", "seed", "invalid", "is_finished", "num_steps"):
            assert again[key] == e.record[key], (e.name, key)


def test_no_run_was_held_back_by_the_machine(book):
    for i, e in enumerate(book.entries):
        assert analyze.compute_machine(e, book.entries[:i]) == [], e.name


def test_the_paired_curve_of_merged_steps_is_that_of_all_steps(night, book):
    for e in book.entries:
        if e.name in BASELINES:
            continue
        then = e.stats["paired"]
        now = analyze.compute_paired(*runs_of(night, [e.name]), runs_of(night, then["against"]))
        assert len(now["windows"]) == len(then["windows"]) == 10
        for a, b in zip(then["windows"][1:], now["windows"][1:], strict=True):  # edges differ by a block at most
            assert b["difference"] == pytest.approx(a["difference"], abs=8e-4), e.name
            assert b["is_repeat"]


def test_seeds_of_one_program_part_at_the_start_and_hardly_after_it(night):
    """So the first window is no evidence, and its scatter not part of the others' errors."""
    pairs = [("bcf323f", "cfebc35"), ("bcf323f", "cfebc35.2"), ("bcf323f", "e12c35f"), ("06e6e30", "06e6e30.2"),
             ("d30e1a4", "d30e1a4.2"), ("7153bc4", "2c4f45f"), ("7153bc4", "b118ef3")]
    paired = [analyze.compute_paired(*runs_of(night, [this]), runs_of(night, [best])) for best, this in pairs]
    differences = np.abs([[w["difference"] for w in p["windows"]] for p in paired])
    assert differences[:, 0].min() > 0.007
    assert differences[:, 0].max() < 0.06
    assert differences[:, 3:].max() < 0.0035
    first, second = analyze.render_paired(paired[-1])[3:5]
    assert first.startswith("| 10% ‡ |")
    assert ("±" in first, "±" in second) == (False, True)


def test_over_fitting_is_seen_in_every_run_and_how_much_text_an_epoch_is(night, book):
    gaps = {e.name: analyze.compute_gap(*runs_of(night, [e.name]), []) for e in book.entries}
    assert {e: gap["epochs"] for e, gap in gaps.items() if gap["epochs"] != 7} == {"a94d8e5": 6}  # fewer tokens
    closed = {name for name, gap in gaps.items() if not gap["is_overfitting"]}
    assert closed == {"59f5811", "8eac494", "a94d8e5"}  # what closed the gap on top of the best's decay: all discarded
    assert {round(gap["epoch_m"]) for gap in gaps.values()} == {84}  # the whole blocks of the first epoch
    ends = {name: gap["this"][0] for name, gap in gaps.items()}
    assert ends["bcf323f"] < ends["c2a0aa7"] < ends["7153bc4"]  # as the scores fell, training rose


def test_an_idea_is_measured_on_what_it_was_built_on_not_on_a_siblings_find(book):
    warmdown = next(e for e in book.entries if e.name == "2232a9f")
    assert warmdown.stats["verdict"]["kind"] == "not better"
    tried = analyze.compute_effects(book.entries)
    assert analyze.render_effect(tried["2232a9f"]) == "-0.00661 ± 0.00084 (a gain, against bcf323f)"
    effects = analyze.render_effects(book.entries)
    assert any(line.startswith("dropout: null -> 0.1 -0.00735 ± 0.00084 (a gain, against bcf323f)") for line in effects)


@pytest.mark.parametrize("rule", ["ours", "lower than the best"])
def test_both_keep_rules_replayed_in_the_order_of_the_night_find_the_same_programs(book, rule):
    """Its gains were large against its noise; tests/bench_nights.py is about those that are not."""
    seen = []
    for e in book.entries:
        advice = analyze.compute_verdict(replace(e, status="pending"), seen)["advice"]
        if rule != "ours":
            lowest = min((x.val_bpb for x in seen if x.status == "keep"), default=9.0)
            advice = "keep" if e.val_bpb < lowest else "discard"
        seen.append(replace(e, status=advice))
    reruns = {"d30e1a4", "2c4f45f", "b118ef3"}  # of the baseline and of the best: ours keeps them with it
    kept = {e.name for e in seen if e.status == "keep"} - reruns
    assert kept == {"d30e1a4.2", "67e93db", "06e6e30", "acb2820", "bcf323f", "c2a0aa7", "7153bc4"}


def test_the_status_of_the_night_fits_on_its_page(night, tmp_path):
    status = analyze.render_status([], night, tmp_path)
    assert status.startswith("best: 7153bc4 val_bpb 0.829079, 3 run(s): embedding decay x 3 at batch 2^17")
    assert status.count("\n") < analyze.STATUS_LINES
    assert "doubtful" not in status
