"""The report of a sweep: one page that needs nothing else, whatever its trials are."""

import csv
import io
import json
import math
import random
from html.parser import HTMLParser

import pytest
from rich.console import Console

from gfl_platform.config import JobConfig, PublishedConfig, RangeConfig, SweepConfig
from gfl_platform.sweeps.analysis.figures import scale_of
from gfl_platform.sweeps.analysis.report import results_json, trials_csv, write_report
from gfl_platform.sweeps.analysis.verdicts import analyse, warnings_of
from gfl_platform.sweeps.trials import SweepResults, Trial
from jobs.console import tables

BETA = "loss.qfl.beta"
STATES = ("finished", "stopped early", "failed", "nan", "out of budget", "running")


class Page(HTMLParser):
    """The tags of a page, its text, and whether they close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def results_of(space, trials, defaults, name="sweep", **asked):
    job = JobConfig(sweep=SweepConfig(space=space, **asked))
    return SweepResults(name, job, defaults, "GPU", trials)


def grid(values):
    return {BETA: RangeConfig(grid=tuple(values))}


def trial(value, seed=0, ap=0.3, **given):
    point = value if isinstance(value, dict) else {BETA: value}
    made = {"state": "finished", "curve": [(1, ap / 2), (2, ap)], "figures": {"AP": ap}, **given}
    return Trial(f"t{seed}", point, seed, **made)


def mixed(count):
    """Return a sweep of four keys of all kinds in which trials end in every way."""
    rng = random.Random(0)
    default = {"optim.lr": 0.01, "optim.decay": 0.0, "model.depth": 50, "data.flip": True}
    space = {
        "optim.lr": RangeConfig(log_uniform=(1e-4, 1e-1)),
        "optim.decay": RangeConfig(uniform=(0, 1e-3)),
        "model.depth": RangeConfig(int_uniform=(18, 101)),
        "data.flip": RangeConfig(grid=(True, False, None, "both", [0, 1], {"p": 0.5})),
    }
    trials = [trial(default, 1, 0.35, stage="finalists", figures={"AP": 0.35, "fps": 30.0})]
    for number in range(count):
        point = {
            "optim.lr": 10 ** rng.uniform(-4, -1),
            "optim.decay": rng.uniform(0, 1e-3),
            "model.depth": rng.randint(18, 101),
            "data.flip": rng.choice(space["data.flip"].values),
        }
        state = STATES[number % 6] if number % 2 else "finished"
        curve = [(epoch, 0.03 * epoch + rng.random() / 10) for epoch in range(1, 13)]
        figures = {"AP": max(ap for _, ap in curve), "AP50": 0.5, "fps": rng.uniform(20, 60)}
        cause = "loss is NaN" if state in ("failed", "nan") else None
        given = {"state": state, "curve": curve, "figures": figures, "cause": cause}
        trials.append(trial(point if number else default, 0, **given))
    return results_of(space, trials, default)


def read_report(results, folder):
    html, *others = write_report(results, folder)
    assert html.name == "report.html"
    assert all(path.stat().st_size for path in others)
    assert not list(folder.glob(".*"))
    return Page(html.read_text())


def test_two_hundred_trials_make_a_small_page_that_needs_nothing_else(tmp_path):
    page = read_report(mixed(200), tmp_path)
    assert page.open == []
    assert (tmp_path / "report.html").stat().st_size < 5e6
    assert not page.all("script")
    assert not page.all("link")
    for _, attrs in page.tags:
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value.startswith("data:image/")
    style = (tmp_path / "report.html").read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    pictures = page.all("img")
    assert all(len(picture["alt"]) > 30 for picture in pictures)
    assert len(pictures) == len(list(tmp_path.glob("*.png")))
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert {"results.json", "trials.csv"} <= {path.name for path in tmp_path.iterdir()}
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert {"importance", "learning-curves", "pareto", "AP-optim.lr", "AP-data.flip"} <= names


def test_the_numbers_are_there_for_programs():
    results = mixed(24)
    results.trials[3].figures["AP"] = math.nan

    def refuse(name):
        raise AssertionError(name)

    content = json.loads(results_json(analyse(results)), parse_constant=refuse)
    assert len(content["trials"]) == len(results.trials)
    assert content["trials"][3]["figures"]["AP"] is None
    assert content["trials"][0]["epochs"] == 2
    assert sum(content["cost"]["states"].values()) == len(results.trials)
    rows = list(csv.DictReader(io.StringIO(trials_csv(results), newline="")))
    assert len(rows) == len(results.trials)
    for row, given in zip(rows, results.trials, strict=True):
        assert float(row["optim.lr"]) == given.point["optim.lr"]
        assert row["state"] == given.state
        flip = given.point["data.flip"]
        assert (row["data.flip"] if isinstance(flip, str) else json.loads(row["data.flip"])) == flip


def test_the_first_screen_answers(tmp_path):
    aps = {2: [0.30, 0.31, 0.32], 1: [0.40, 0.411, 0.419]}
    trials = [trial(beta, seed, ap) for beta, each in aps.items() for seed, ap in enumerate(each)]
    trials.append(trial(4, state="stopped early", curve=[(1, 0.1)], seconds=3600))
    page = read_report(results_of(grid([1, 2, 4]), trials, {BETA: 2.0}), tmp_path)
    start = page.text.index("Best configuration")
    first = page.text[start : page.text.index("Best points")]
    assert "41.00 ± 0.95 AP, %, mean ± sd of 3 seeds" in first
    assert f"{BETA} 1" in first
    assert "better than the default: 1 by +10.00" in first
    assert "7 trials: 6 finished; 1 stopped early." in first
    assert "1 GPU-hours; the search trained 13 of 84 epochs, stopping early saved 13%" in first
    assert f"python -m jobs.train CONFIG {BETA}=1 cluster.workers=1 seed=0" in page.text


def test_names_are_text(tmp_path):
    trials = [trial("<b>x</b>", 0, 0.3), trial("$y_$", 0, 0.4), trial("&", 0, 0.2)]
    trials.append(trial("<img src=x>", state="failed", cause="<script>alert(1)</script> $"))
    results = results_of(grid(["<b>x</b>", "$y_$"]), trials, {BETA: "<b>x</b>"}, name="<i>name</i>")
    page = read_report(results, tmp_path)
    assert not page.all("b")
    assert not page.all("i")
    assert not page.all("script")
    assert "<i>name</i>" in page.text
    assert "<script>alert(1)</script>" in page.text


DEGENERATE = {
    "no trial": [],
    "running": [trial(1, state="running", curve=[], figures={})],
    "nothing finished": [trial(beta, state="failed", cause="lost") for beta in (1, 2)],
    "one trial": [trial(2)],
    "one epoch": [trial(beta, curve=[(1, 0.2)], ap=0.1 * beta) for beta in (1, 2)],
    "NaN": [trial(1, ap=math.nan), trial(2, state="nan", ap=math.nan), trial(4)],
    "only NaN": [trial(beta, ap=math.nan) for beta in (1, 2)],
    "no figures": [trial(beta, figures={}) for beta in (1, 2)],
    "alike": [trial(beta, seed) for beta in (0, 1, 2) for seed in (0, 1)],
    "null": [trial(None), trial(2, ap=0.4), trial(None, 1)],
    "mappings": [trial({BETA: {"a": [1, 2]}}), trial({BETA: [1, {"b": 2}]}), trial(2, ap=0.2)],
    "long": [trial("x" * 200), trial("y" * 200), trial(2)],
    "far default": [trial(1e6, ap=0.1), trial(1e6 + 1, ap=0.2)],
    "zero": [trial(0, ap=0.0), trial(1e-9, ap=0.1), trial(5.0, ap=0.1)],
    "many seeds": [trial(beta, s, 0.3 + s / 100 + beta / 10) for s in range(9) for beta in (1, 2)],
}


@pytest.mark.parametrize("trials", DEGENERATE.values(), ids=DEGENERATE)
def test_whatever_the_trials_are_there_is_a_report(trials, tmp_path, monkeypatch):
    results = results_of(grid([0, 1, 2, 4]), trials, {BETA: 2})
    page = read_report(results, tmp_path)
    assert "All trials" in page.text
    assert "nan AP" not in page.text
    console = Console(width=80, record=True, markup=False, emoji=False)
    monkeypatch.setattr(tables, "console", console)
    tables.show_sweep(results)
    assert "verdicts" in console.export_text()


@pytest.mark.parametrize(
    ("trials", "warning"),
    [
        ([trial(1, state="running")], "1 of the trials had not ended"),
        ([trial(1, state="failed")], "No trial has finished"),
        ([trial(1), trial(2, ap=0.4)], "one seed: differences may be chance"),
        (
            [trial(1), trial(2)],
            f"identical bit for bit at beta 1 and beta 2: has {BETA} any effect",
        ),
        ([trial(1, figures={})], "No finished trial has the objective, AP, %"),
        (
            [trial(1, protocol={"device": "A"}), trial(2, protocol={"device": "B"})],
            "FPS do not compare where protocols differ: device A -> B.",
        ),
    ],
)
def test_a_reader_is_warned(trials, warning):
    found = analyse(results_of(grid([1, 2]), trials, {BETA: 2}))
    assert any(warning in said for said in warnings_of(found))


def terminal_rows(results, monkeypatch):
    """Return the cells of all rows that a terminal of 80 columns shows, without the headings."""
    console = Console(width=80, record=True, markup=False, emoji=False)
    monkeypatch.setattr(tables, "console", console)
    tables.show_sweep(results)
    lines = [line for line in console.export_text().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_points_are_shown_with_the_number_of_their_seeds(tmp_path, monkeypatch):
    trials = [trial(1, seed) for seed in (5, 6, 7)]
    trials += [trial(1, 8, state="nan"), trial(2, 5)]
    results = results_of(grid([1, 2]), trials, {BETA: 2})
    page = read_report(results, tmp_path).text
    best = page[page.index("Best points") : page.index("Mean ± sample standard deviation")]
    assert best.strip().endswith("30.00 ± 0.00 1 3; 1 diverged or failed 30.00 2 1 (default)")
    rows = terminal_rows(results, monkeypatch)
    assert rows[0] == ["beta 1", "30.00 ± 0.00", "3; 1 diverged or failed"]
    assert rows[1] == ["beta 2 (default)", "30.00", "1"]


def test_a_figure_without_ground_truth_is_shown_as_a_dash(tmp_path, monkeypatch):
    rows = tuple({"at": {BETA: b}, "figures": {"APl": 51.0}} for b in (1, 2))
    published = PublishedConfig(source="paper", rows=rows)
    trials = [trial(beta, figures={"AP": 0.3, "APl": -1.0}) for beta in (1, 2)]
    results = results_of(grid([1, 2]), trials, {BETA: 2}, published=published)
    page = read_report(results, tmp_path).text
    table = page[page.index("ours, difference seeds") : page.index("Paper: paper.")]
    of_paper = ("beta 1 APl 51.0 - +0.0 - -", "beta 2 (reference) APl 51.0 - +0.0 - -")
    assert table.split("seeds ")[1].strip() == " ".join(of_paper)
    assert ["beta 1", "APl", "51.0", "-", "+0.0", "-", "-"] in terminal_rows(results, monkeypatch)


def test_a_terminal_shows_papers_figures_and_ours(monkeypatch):
    rows = tuple({"at": {BETA: b}, "figures": {"AP": ap}} for b, ap in ((1, 39.0), (2, 39.9)))
    published = PublishedConfig(source="[bold] paper", rows=rows)
    trials = [trial(1), trial(2, ap=0.31), trial(4, state="failed", cause="[red] lost")]
    results = results_of(grid([1, 2]), trials, {BETA: 2}, published=published)
    console = Console(width=80, record=True, markup=False, emoji=False)
    monkeypatch.setattr(tables, "console", console)
    tables.show_sweep(results)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "-0.9" in text
    assert "-1.00" in text
    assert "[red] lost" in text


@pytest.mark.parametrize(
    ("asked", "values", "kind"),
    [
        (RangeConfig(grid=(1, 2, 4)), (1, 2.0), "linear"),
        (RangeConfig(grid=(0.001, 0.01, 0.1)), (0.1, 0.001), "log"),
        (RangeConfig(grid=(0, 0.01, 1)), (0, 0.01, 1), "linear"),
        (RangeConfig(log_uniform=(0.1, 0.2)), (0.1, 0.15), "log"),
        (RangeConfig(log_uniform=(0.1, 0.2)), (0.1, 0), "linear"),
        (RangeConfig(uniform=(0, 1)), (0.001, 0.9), "linear"),
        (RangeConfig(grid=(True, False)), (False, True), "categorical"),
        (RangeConfig(grid=("1", 1)), (1, "1"), "categorical"),
    ],
)
def test_the_axis_of_a_key_fits_its_values(asked, values, kind):
    scale = scale_of(asked, values)
    assert scale.kind == kind
    positions = [scale.position(value) for value in scale.values]
    assert positions == sorted(set(positions))
    if kind == "categorical":
        assert scale.values == list(asked.values)


@pytest.mark.parametrize(
    "rows",
    [
        [{BETA: 1}, {}],
        [{BETA: 1, "model.reg_max": 8}, {BETA: 2, "model.reg_max": 8}],
        [{"model.reg_max": 8}, {"model.reg_max": 16}],
        [{BETA: 0.5}],
    ],
)
def test_rows_of_a_paper_need_not_name_the_swept_key(rows, tmp_path):
    rows = tuple({"at": at, "figures": {"AP": 39.0}} for at in rows)
    published = PublishedConfig(source="paper", rows=rows)
    results = results_of(grid([1, 2]), [trial(1), trial(2)], {BETA: 2}, published=published)
    assert "Paper: paper." in read_report(results, tmp_path).text
