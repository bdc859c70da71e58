"""Submit a job to a cluster: `python -m jobs.submit train CONFIG [key=value ...] --address URL`."""

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
    cli = argparse.ArgumentParser(
        description="Send a job with its code to a Ray cluster, and follow it. Ctrl-C cancels it.",
        epilog=f"All other words are arguments of the job. example: {EXAMPLE}",
    )
    cli.add_argument("--debug", action="store_true", help="on an error, show the traceback")
    cli.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"),
        help="address of the cluster's dashboard (RAY_API_SERVER_ADDRESS, else %(default)s)",
    )
    cli.add_argument("job", help="train, sweep, evaluate, predict, ...")
    arguments, words = cli.parse_known_args(sys.argv[1:])
    arguments.words = words
    run(send, arguments)


def send(arguments: argparse.Namespace) -> None:
    """Submit the job and follow its log."""
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
    """Check that `storage.root` lies outside the copy of the code, which Ray deletes."""
    from gfl_platform.config import job_of, load_job
    from gfl_platform.storage.s3 import is_remote

    overrides = [word for word in words if OVERRIDE.match(word)]
    files = [word for word in words if word.endswith((".yaml", ".yml"))]
    job = load_job(files[0], overrides) if files else job_of(overrides)
    root = job.storage.root
    if not is_remote(root) and not Path(root).expanduser().is_absolute():
        raise ValueError(
            f"storage.root: '{root}' would lie in the job's copy of the code, which Ray deletes; "
            "give s3://BUCKET/PREFIX, or the absolute path of a folder that all nodes see"
        )


if __name__ == "__main__":
    main()
