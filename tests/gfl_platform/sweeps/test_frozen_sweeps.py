"""Four sweeps of made-up trials: their exports, their tables and the text of their reports."""

import json
import math
import random
from html.parser import HTMLParser
from itertools import count

import pytest

from gfl.config.loader import derive
from gfl_platform.config import JobConfig
from gfl_platform.sweeps.analysis.report import write_report
from gfl_platform.sweeps.search import DrawnTrials
from gfl_platform.sweeps.trials import SweepResults, Trial, trial_name
from jobs.console.tables import show_sweep
from tests.support.goldens import compare_json, compare_text, plain_terminal, read_json, rounded

BETA, BINS, LR = "loss.qfl.beta", "model.reg_max", "optim.lr"
DEFAULTS = {BETA: 2.0, BINS: 16, LR: 0.01}
EPOCHS = 12
CPU = {"device": "made-up CPU", "threads": 2, "torch": "2.0"}
PAPER = {
    "source": "Li et al., NeurIPS 2020, table 1c",
    "rows": [
        {"at": {BETA: 1}, "figures": {"AP": 39.0, "AP50": 58.1}},
        {"at": {BETA: 2}, "figures": {"AP": 39.9, "AP50": 58.5}},
        {"at": {BETA: 4}, "figures": {"AP": 38.2, "AP50": 55.4}},
    ],
}


def job_of(sweep):
    """Return the configuration with this section `sweep:`."""
    return derive(JobConfig, JobConfig(), [f"sweep={json.dumps(sweep)}"])


def show_and_report(name, sweep, records, folder):
    """Print the tables of a sweep and write its report; return the report's folder.

    Args:
        name: Name of the sweep.
        sweep: The section `sweep:` as a mapping.
        records: The trials, as in their `trial.json`.
        folder: Where to write the report.
    """
    job = job_of(sweep)
    trials = [Trial(**{**r, "curve": [tuple(pair) for pair in r["curve"]]}) for r in records]
    defaults = {key: DEFAULTS[key] for key in sweep["space"]}
    results = SweepResults(name, job, defaults, "CPU", trials)
    show_sweep(results)
    write_report(results, folder)
    return folder


def draw_points(sweep, evaluate):
    """Return the points that a search draws one after the other, with their figures."""
    job = job_of(sweep)
    search = DrawnTrials(job, [], map(trial_name, count()), lambda planned: None, lambda: False)
    drawn = []
    for number in range(job.sweep.budget.trials):
        name = f"tune-{number}"
        point = search.suggest(name)["point"]
        figures = evaluate(point)
        search.on_trial_complete(name, {"final": "finished", **figures})
        drawn.append({"point": point, "figures": figures})
    return drawn


def quality(point, seed=0):
    """Return a made-up AP: a bowl around beta 1, 12 bins and a rate of 0.02, and some noise."""
    bowl = 0.03 * abs(math.log2((point.get(BETA, 1) + 1) / 2))
    bowl += 0.004 * abs(point.get(BINS, 12) - 12)
    bowl += 0.05 * abs(math.log10(point.get(LR, 0.02) / 0.02))
    noise = random.Random(f"{sorted(point.items())} {seed}").gauss(0, 0.003)
    return round(0.41 - bowl + noise, 6)


def figures_of(point, ap):
    """Return all figures of a trial that finished with this AP."""
    fps = round(60 - point.get(BINS, 16), 3)
    names = {"AP50": 1.4 * ap, "AP75": 1.05 * ap, "APs": 0.5 * ap, "APm": ap, "APl": 1.2 * ap}
    figures = {"AP": ap, **names, "AR100": 1.3 * ap, "fps": fps, "latency_ms": 1000 / fps}
    return {name: round(value, 6) for name, value in figures.items()}


def record(number, point, seed=0, epochs=EPOCHS, **changes):
    """Return the record of a trial that finished, with some of its values changed."""
    ap = quality(point, seed)
    curve = [[epoch, round(ap * epoch / (epoch + 1), 6)] for epoch in range(1, epochs)]
    curve.append([epochs, ap])
    return {
        "id": f"{number:03d}",
        "point": point,
        "seed": seed,
        "stage": "search",
        "state": "finished",
        "cause": None,
        "curve": curve,
        "figures": figures_of(point, ap),
        "seconds": 100.0 * epochs + number,
        "devices": 2,
        "config_hash": f"{number:02x}" * 32,
        "run_id": f"{number:02x}" * 16,
        "checkpoint": f"/outputs/sweeps/made-up/trials/{number:03d}/ray/checkpoint",
        "protocol": CPU,
        **changes,
    }


def grid_with_seeds():
    """Return a grid of three betas and two numbers of bins, three seeds each, and a paper."""
    sweep = {"space": {BETA: {"grid": [1, 2, 4]}, BINS: {"grid": [8, 16]}}, "seeds": 3}
    points = [{BETA: beta, BINS: bins} for beta in (1, 2, 4) for bins in (8, 16)]
    cells = [(point, seed) for point in points for seed in range(3)]
    records = [record(number, point, seed) for number, (point, seed) in enumerate(cells)]
    # A seed that failed leaves the other seeds of its point.
    records[-1] |= {"state": "failed", "cause": "worker 1 died: out of memory", "figures": {}}
    records[-1]["curve"] = records[-1]["curve"][:4]
    return sweep | {"published": PAPER}, records


def finalists():
    """Return a grid with one seed and ASHA, whose two best points were trained with three seeds."""
    betas = (0, 0.5, 1, 1.5, 2, 2.5, 3, 4)
    sweep = {
        "space": {BETA: {"grid": list(betas)}},
        "scheduler": {"name": "asha", "grace_epochs": 3, "reduction": 4},
        "seeds": 3,
        "finalists": 2,
    }
    records = []
    for number, beta in enumerate(betas):
        if beta in (0, 3, 4):
            stopped = record(number, {BETA: beta}, epochs=3, state="stopped early")
            stopped["figures"] = {k: v for k, v in stopped["figures"].items() if k.startswith("A")}
            records.append(stopped | {"protocol": {}})
        else:
            records.append(record(number, {BETA: beta}))
    number = len(records)
    for beta in (0.5, 1, 2):
        for seed in (1, 2):
            name = f"f{number - len(betas):03d}"
            records.append(record(number, {BETA: beta}, seed, id=name, stage="finalists"))
            number += 1
    return sweep, records


TPE = {
    "space": {LR: {"log_uniform": [1e-3, 1e-1]}, BINS: {"int_uniform": [4, 24]}},
    "search": {"name": "tpe", "seed": 7},
    "objectives": ["AP", "fps"],
    "budget": {"trials": 16},
    "concurrency": 1,
}
"""The section of a search with TPE for two objectives."""


def two_objectives():
    """Return the search with TPE, of whose trials the last ran out of budget."""
    drawn = read_json("sweeps/tpe-points.json")
    records = [record(number, each["point"]) for number, each in enumerate(drawn)]
    records[-1] |= {"state": "out of budget", "curve": records[-1]["curve"][:5]}
    return TPE, records


def one_nan():
    """Return a grid of one seed in which one trial diverged and one finished without a number."""
    sweep = {"space": {BETA: {"grid": [1, 2, 4, 8, 16]}}}
    records = [record(number, {BETA: beta}) for number, beta in enumerate((1, 2, 4, 8, 16))]
    cause = "step 31: loss is NaN"
    records[3] |= {"state": "nan", "cause": cause, "curve": records[3]["curve"][:2], "figures": {}}
    records[4]["figures"]["AP"] = math.nan
    records[4]["protocol"] = CPU | {"threads": 4}
    return sweep, records


SWEEPS = {
    "grid-with-seeds": grid_with_seeds,
    "finalists": finalists,
    "tpe-two-objectives": two_objectives,
    "one-nan": one_nan,
}


class PageText(HTMLParser):
    """The words of a page, without style and pictures: a row of a table is a line."""

    def __init__(self, page):
        super().__init__()
        self.lines = []
        self.row = None
        self.hidden = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.hidden = tag == "style"
        if tag in ("h1", "h2", "h3"):
            self.lines.append("")
        if tag == "tr":
            self.row = []
        if tag == "img":
            self.lines.append(f"(picture: {dict(attrs)['alt']})")

    def handle_endtag(self, tag):
        self.hidden = False
        if tag == "tr":
            self.lines.append(" | ".join(self.row))
            self.row = None

    def handle_data(self, data):
        words = " ".join(data.split())
        if words and not self.hidden:
            place = self.lines if self.row is None else self.row
            place.append(words)


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_is_told_as_it_was(name, tmp_path, monkeypatch, capsys):
    plain_terminal(monkeypatch)
    folder = show_and_report(name, *SWEEPS[name](), tmp_path)
    tables = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines()) + "\n"
    compare_text(f"sweeps/{name}.tables.txt", tables)
    compare_text(f"sweeps/{name}.trials.csv", (folder / "trials.csv").read_text())
    compare_json(f"sweeps/{name}.json", rounded(json.loads((folder / "results.json").read_text())))
    page = PageText((folder / "report.html").read_text())
    compare_text(f"sweeps/{name}.report.txt", "\n".join(page.lines).strip() + "\n")
    pictures = sorted(path.stem for path in folder.glob("*.png"))
    compare_json(f"sweeps/{name}.pictures.json", pictures)


def test_tpe_draws_the_points_that_it_drew():
    drawn = draw_points(TPE, lambda point: figures_of(point, quality(point)))
    compare_json("sweeps/tpe-points.json", drawn)
