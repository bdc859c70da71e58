"""The command line that all jobs share: arguments, one-line errors, and the console.

It imports nothing heavy, so that `--help` answers at once.
"""

import argparse
import io
import logging
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from gfl_platform.redaction import redact

SECTIONS = (
    "model", "loss", "assigner", "postprocess", "data", "optim", "schedule", "evaluation", "seed",
    "run", "cluster", "storage", "tracking", "registry", "sweep",
)  # fmt: skip
"""Keys of the configuration without a dot."""

OVERRIDE = re.compile(rf"([a-z_]\w*(\.\w+)+|{'|'.join(SECTIONS)})=")
"""Beginning of an argument that changes the configuration."""

# A pipe has no terminal that could scroll, so its lines are wide. What is printed comes from names,
# paths and messages of others: brackets in it are no markup, and colons no emoji.
console = Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False)


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """Return a parser with a job's description, an example and the options of every job."""
    cli = argparse.ArgumentParser(
        description=description,
        epilog=f"""\
key=value, anywhere on the line, changes the configuration: storage.root=/shared/outputs
example: {example}""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_argument("--debug", action="store_true", help="on an error, show the traceback")
    return cli


def parse(cli: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the parsed command line, its `key=value` arguments as `overrides`."""
    words = sys.argv[1:]
    overrides = [word for word in words if OVERRIDE.match(word)]
    arguments = cli.parse_args([word for word in words if word not in overrides])
    arguments.overrides = overrides
    return arguments


def run(job: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> None:
    """Run a job; an error is one line, and the exit status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # of a terminal or a log that is not UTF-8
    level = logging.DEBUG if arguments.debug else logging.INFO
    handler = RichHandler(console=console, show_path=False, show_time=False, show_level=False)
    handler.addFilter(_without_secrets)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a HOME without its cache
    for package in ("gfl", "gfl_platform", "jobs"):
        logging.getLogger(package).setLevel(level)
    try:
        job(arguments)
    except KeyboardInterrupt as interrupt:
        sys.exit(_report(" ".join(["interrupted", *map(str, interrupt.args)]), 130))
    except Exception as error:
        if arguments.debug:
            raise
        expected = isinstance(error, (ValueError, RuntimeError))
        text = str(error) if expected else f"{type(error).__name__}: {error}; --debug shows where"
        sys.exit(_report(" ".join(text.split()), 1))


def _without_secrets(record: logging.LogRecord) -> bool:
    """Mask the secrets in a line of the log; every line is shown."""
    record.msg, record.args = redact(record.getMessage()), ()
    return True


@contextmanager
def resumable(module: str, name: str) -> Iterator[None]:
    """Add to a Ctrl-C the command that continues the run or sweep `name`."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        words = [word for word in sys.argv[1:] if word != "--resume"]
        if f"run.name={name}" not in words:
            words.append(f"run.name={name}")
        command = shlex.join(["python", "-m", module, *words, "--resume"])
        raise KeyboardInterrupt(f"- {command} continues") from interrupt


def _report(message: str, status: int) -> int:
    sys.stderr.write(f"error: {redact(message)}\n")
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
