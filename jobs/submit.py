"""Run a job on a cluster: `python -m jobs.submit train CONFIG [key=value ...] --address URL`."""

import argparse
import ast
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.console.cli import OVERRIDE, console, run

EXAMPLE = "python -m jobs.submit train configs/gfl_r50_1x.yaml --address http://127.0.0.1:8265"


def main() -> None:
    """Run the command line."""
    made = argparse.ArgumentParser(
        description="Send a job with the code to a Ray cluster, follow its log; Ctrl-C cancels it.",
        epilog=f"All other words are the job's own. example: {EXAMPLE}",
    )
    made.add_argument("--debug", action="store_true", help="on an error, show the traceback")
    made.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"),
        help="of the cluster's dashboard (RAY_API_SERVER_ADDRESS, else %(default)s)",
    )
    made.add_argument("job", help="train, sweep, evaluate, predict, ...")
    arguments, words = made.parse_known_args(sys.argv[1:])
    arguments.words = words
    run(send, arguments)


def send(arguments: argparse.Namespace) -> None:
    """Submit the job and follow it."""
    root = Path(__file__).parents[1]
    known = submittable_jobs(root / "jobs")
    if arguments.job not in known:
        raise ValueError(f"no job called '{arguments.job}'; expected one of {', '.join(known)}")
    from gfl_platform.cluster.submit import submit

    if arguments.job in ("train", "sweep"):
        _require_lasting(arguments.words)
    words = [f"jobs.{arguments.job}", *arguments.words]
    submit(words, arguments.address, root, lambda line: console.print(line, soft_wrap=True))


def submittable_jobs(folder: Path) -> list[str]:
    """Return the names of the modules in `folder` that are commands, except this one.

    A command has a function `main` at its top level. The modules are read, not imported.
    """
    return [
        path.stem
        for path in sorted(folder.glob("*.py"))
        if path.stem != Path(__file__).stem and _has_main(path)
    ]


def _has_main(path: Path) -> bool:
    statements = ast.parse(path.read_text(), str(path)).body
    return any(isinstance(each, ast.FunctionDef) and each.name == "main" for each in statements)


def _require_lasting(words: Sequence[str]) -> None:
    """Check the configuration, and that what a job keeps does not go with its copy of the code."""
    from gfl_platform.config import job_of, load_job
    from gfl_platform.storage.s3 import is_remote

    overrides = [word for word in words if OVERRIDE.match(word)]
    files = [word for word in words if word.endswith((".yaml", ".yml"))]
    job = load_job(files[0], overrides) if files else job_of(overrides)
    root = job.storage.root
    if not is_remote(root) and not Path(root).expanduser().is_absolute():
        raise ValueError(
            f"storage.root: '{root}' would be in the job's own copy of the code, which goes; "
            "give s3://BUCKET/PREFIX, or the absolute path of a folder that all nodes see"
        )


if __name__ == "__main__":
    main()
