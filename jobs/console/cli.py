"""What all jobs share: their command line, one-line errors, live progress and tables."""

import argparse
import logging
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.table import Table

from gfl_platform.sweeps.formatting import point_label
from gfl_platform.sweeps.trials import Trial

LOSSES = ("qfl", "focal", "centerness", "giou", "dfl", "ld")
"""Shown where a training has them."""

PLAIN_LINE_SECONDS = 10.0
"""Between lines of progress where there is no terminal to redraw."""

OVERRIDE = re.compile(r"[a-z_]\w*(\.\w+)*=")

# What a pipe cuts off nobody can scroll to.
console = Console(width=None if sys.stdout.isatty() else 160)


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """Return a parser with a job's description, an example and the options of every job."""
    made = argparse.ArgumentParser(
        description=description,
        epilog=f"""\
key=value, anywhere on the line, changes the configuration: storage.root=/shared/outputs
example: {example}""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--debug", action="store_true", help="on an error, show the traceback")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the parsed command line, its `key=value` arguments as `overrides`."""
    words = sys.argv[1:]
    overrides = [word for word in words if OVERRIDE.match(word)]
    arguments = made.parse_args([word for word in words if word not in overrides])
    arguments.overrides = overrides
    return arguments


def run(job: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> None:
    """Run a job; an error is one line, and the exit status 1."""
    level = logging.DEBUG if arguments.debug else logging.INFO
    handler = RichHandler(console=console, show_path=False, show_time=False, show_level=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    for package in ("gfl", "gfl_platform", "jobs"):
        logging.getLogger(package).setLevel(level)
    try:
        job(arguments)
    except KeyboardInterrupt as interrupt:
        sys.exit(_report(" ".join(["interrupted", *map(str, interrupt.args)]), 130))
    except Exception as error:
        if arguments.debug:
            raise
        from gfl_platform.tracking.client import without_password

        expected = isinstance(error, (ValueError, RuntimeError))
        text = str(error) if expected else f"{type(error).__name__}: {error}; --debug shows where"
        sys.exit(_report(without_password(" ".join(text.split())), 1))


@contextmanager
def resumable(module: str, name: str) -> Iterator[None]:
    """Let an interruption name the command that goes on with the run or sweep `name`."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        words = [word for word in sys.argv[1:] if word != "--resume"]
        if f"run.name={name}" not in words:
            words.append(f"run.name={name}")
        command = shlex.join(["python", "-m", module, *words, "--resume"])
        raise KeyboardInterrupt(f"- {command} goes on") from interrupt


def _report(message: str, status: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return status


def show_table(title: str, rows: Mapping[str, object]) -> None:
    """Print a two-column table below its title, which may be wider."""
    console.print(title, soft_wrap=True)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)


class Progress:
    """Shows a training: one line that is redrawn on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._last_line = 0.0
        self._quality = ""
        self._digests: Mapping[str, str] = {}

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
            self._live.update("waiting for the workers to start")
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def expect(self, digests: Mapping[str, str]) -> None:
        """Tell of data and weights with other digests than these, "data.train.digest" and so on."""
        self._digests = digests

    def show(self, event: Mapping[str, Any]) -> None:
        """Show an event of a training."""
        match event:
            case {"kind": "data", "facts": dict(facts)}:
                self._compare({f"data.{key}": fact for key, fact in facts.items()})
            case {"kind": "tags", "tags": dict(tags)}:
                self._compare(tags)
            case {"kind": "steps"}:
                self._show_steps(event)
            case {"kind": "checkpoint", "epoch": epoch, "metrics": dict(metrics)}:
                self._quality = f"  AP {metrics['AP']:.3f}"
                console.print(f"epoch {epoch}: AP {metrics['AP']:.4f}  AP50 {metrics['AP50']:.4f}")
            case {"kind": "measured", "variants": variants, "total": total}:
                self._show_line(f"measured {variants} of {total} variants")
            case {"kind": "predicted", "images": images, "of": total}:
                self._show_line(f"{images} of {total} images")
            case {"kind": "evaluated", "images": images, "total": total}:
                self._show_line(f"evaluated {images} of {total} images")
            case {"kind": "failure", "rank": rank, "reason": reason, "final": False}:
                console.print(
                    f"worker {rank} stopped ({reason}); going on from the last checkpoint"
                )

    def _compare(self, now: Mapping[str, Any]) -> None:
        """Tell where `now` has other digests than expected."""
        for key, then in self._digests.items():
            if key in now and now[key] != then:
                line = f"not as it was then: {key} {then} -> {now[key]}"
                console.print(line, soft_wrap=True)

    def _show_steps(self, event: Mapping[str, Any]) -> None:
        metrics, left = event["metrics"], event["seconds_left"]
        names = [name for name in ("loss", *LOSSES) if name in metrics]
        losses = "  ".join(f"{name} {metrics[name]:.3f}" for name in names)
        line = (
            f"epoch {event['epoch']:.2f}  step {event['step']}/{event['total_steps']}  {losses}  "
            f"{metrics['images_per_second']:.1f} images/s{self._quality}  "
            f"ETA {left // 60:.0f} min {left % 60:02.0f} s"
        )
        self._show_line(line)

    def _show_line(self, line: str) -> None:
        if self._live:
            self._live.update(line)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            console.print(line, soft_wrap=True)


class SweepProgress(Progress):
    """Shows a sweep."""

    def __init__(self) -> None:
        super().__init__()
        self._trials: dict[str, Trial] = {}
        self._epochs: dict[str, float] = {}

    def show_trial(self, trial: Trial, event: Mapping[str, Any]) -> None:
        """Show what happened to a trial."""
        self._trials[trial.id] = trial
        match event["kind"]:
            case "steps":
                self._epochs[trial.id] = event["epoch"]
            case "failure" if not event["final"]:
                console.print(f"{_name(trial)}: a worker stopped ({event['reason']}); going on")
            case "ended":
                console.print(f"{_name(trial)}: {_end(trial)}", soft_wrap=True)
        self._show_line(self._summary())

    def _summary(self) -> str:
        counts = Counter(trial.state for trial in self._trials.values())
        states = ", ".join(f"{count} {state}" for state, count in counts.items())
        running = "  ".join(
            f"{trial.id}: epoch {self._epochs.get(trial.id, 0.0):.2f}{_quality(trial)}"
            for trial in self._trials.values()
            if trial.state == "running"
        )
        return f"{states}   {running}"


def _name(trial: Trial) -> str:
    return f"trial {trial.id}  {point_label(trial.point)}  seed {trial.seed}"


def _quality(trial: Trial) -> str:
    return f" ({trial.curve[-1][1]:.3f})" if trial.curve else ""


def _end(trial: Trial) -> str:
    if trial.cause:
        return f"{trial.state} ({trial.cause})"
    ap = f", AP {trial.figures['AP']:.4f}" if "AP" in trial.figures else ""
    return f"{trial.state} after {trial.epochs} epochs{ap}, {trial.seconds:.0f} s"
