"""Run a job on a cluster: `python -m jobs.submit train CONFIG [key=value ...] --address URL`."""

import argparse
import os
import sys
from pathlib import Path

from jobs.console import console, run

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
    from gfl_platform.submission import submit

    root = Path(__file__).parents[1]
    if not (root / "jobs" / f"{arguments.job}.py").exists():
        known = sorted(path.stem for path in (root / "jobs").glob("*.py"))
        raise ValueError(f"no job called '{arguments.job}'; expected one of {', '.join(known)}")
    words = [f"jobs.{arguments.job}", *arguments.words]
    submit(words, arguments.address, root, lambda line: console.print(line, soft_wrap=True))


if __name__ == "__main__":
    main()
