"""Submitting a job to a Ray cluster: checks, the files that travel, and the log of the job."""

import asyncio
import json
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

import yaml
from aiohttp import ClientError
from ray.job_submission import JobStatus, JobSubmissionClient

from gfl_platform.cluster.launch import JobFailedError
from gfl_platform.cluster.resources import ClusterError
from gfl_platform.provenance import GIT_VARIABLES, USER, acting_user, git_state
from gfl_platform.redaction import redact

LARGEST = 100 * 2**20
"""Largest working directory in bytes. Ray's limit is for the packed one; we count it unpacked."""

LONGEST_DIFF, LONGEST_LIST = 70_000, 20_000
"""Longest diff and longest list of changed files, in bytes of JSON. Both travel in environment
variables. Ray passes all variables in one string of JSON, and Linux allows 128 KiB a string."""

CUT = "\n(cut off here)\n"

PASSED_ON = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "MLFLOW_S3_ENDPOINT_URL",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
"""Environment variables of the submitting process that the job gets."""

GRACE_SECONDS = 40.0
"""Time for a cancelled job to close its run: a little more than runtime-env.yaml allows."""


class SubmissionError(ValueError):
    """A job that could not run on the cluster as it does here."""


def submit(words: Sequence[str], address: str, root: Path, say: Callable[[str], None]) -> None:
    """Run `python -m WORDS` on the cluster and follow its log; an interruption cancels it.

    Args:
        words: Module and arguments of the job.
        address: Address of the cluster's dashboard, http://HOST:8265.
        root: Folder of the repository, which travels as `runtime-env.yaml` says.
        say: Function that shows what the job prints.

    Raises:
        SubmissionError: the repository is too large, a file in it hides a module of the standard
            library, or a configuration would not travel.
        ClusterError: no cluster answers, or it refuses the token.
        JobFailedError: the job failed.
    """
    environment = yaml.safe_load((root / "runtime-env.yaml").read_text())
    _require_sound(root, environment.get("excludes", []), words)
    environment["working_dir"] = str(root)
    environment["env_vars"] |= _variables()
    entrypoint = shlex.join(["python", "-m", *words])
    try:
        with _only(address):
            client = JobSubmissionClient(address)
        job = client.submit_job(entrypoint=entrypoint, runtime_env=environment)
    except (ConnectionError, RuntimeError) as error:
        raise ClusterError(
            f"{address}: {str(error).splitlines()[0]}; check the address, RAY_AUTH_MODE=token and "
            "the token (RAY_AUTH_TOKEN or ~/.ray/auth_token)"
        ) from error
    say(f"submitted {job} to {address}")
    try:
        asyncio.run(_follow(client, job, say))
    except KeyboardInterrupt:
        _cancel(client, job, say)
        raise
    except (RuntimeError, OSError, ClientError) as error:
        raise ClusterError(
            f"{address}: the connection is lost ({error}), but {job} goes on; follow it again with "
            f"ray job logs --follow --address {address} {job}"
        ) from error
    status = client.get_job_status(job)
    if status != JobStatus.SUCCEEDED:
        message = (client.get_job_info(job).message or "").strip().splitlines()
        raise JobFailedError(f"{job}: {status}; {message[-1] if message else 'see its log'}")


def _require_sound(root: Path, excludes: Sequence[str], words: Sequence[str]) -> None:
    """Check the files that travel.

    Raises:
        SubmissionError: see `submit`.
    """
    for word in words:
        if redact(word) != word:
            raise SubmissionError(
                f"{redact(word)}: the dashboard shows a job's command; leave the credentials out, "
                "and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
    files = travelling(root, excludes)
    for shadow in shadows(files):
        raise SubmissionError(
            f"{shadow}: hides Python's own module of that name, and the job would hang; rename it"
        )
    sizes = {file: (root / file).stat().st_size for file in files if (root / file).is_file()}
    if (total := sum(sizes.values())) > LARGEST:
        folders = Counter[str]()
        for file, size in sizes.items():
            folders[str(Path(file).parts[0])] += size
        named = ", ".join(f"{name} {size >> 20} MiB" for name, size in folders.most_common(3))
        raise SubmissionError(
            f"{root}: {total >> 20} MiB would travel, {LARGEST >> 20} are allowed; largest: "
            f"{named}; add them to `excludes` in runtime-env.yaml"
        )
    for word in words:
        path = Path(word)
        if path.suffix in (".yaml", ".yml") and path.as_posix() not in files:
            raise SubmissionError(
                f"{word}: would not travel (not there, git-ignored or excluded in "
                "runtime-env.yaml); give a file below the repository that git does not ignore"
            )


def travelling(root: Path, excludes: Sequence[str]) -> set[str]:
    """Return the files that Ray packs: those that git does not ignore, without `excludes`."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    excluded = tuple(f"{entry.strip('/')}/" for entry in excludes)
    return {file for file in listed if file and not file.startswith(excluded)}


def shadows(files: set[str]) -> list[str]:
    """Return the files that hide a module of the standard library."""
    hidden = []
    for file in sorted(files):
        parts = Path(file).parts
        for below in (parts, parts[1:] if parts[0] == "platform" else ()):  # both on the path
            module = len(below) == 1 and below[0].endswith(".py") and below[0][:-3]
            package = len(below) == 2 and below[1] == "__init__.py" and below[0]
            if (module or package) in sys.stdlib_module_names:
                hidden.append(file)
    return hidden


@contextmanager
def _only(address: str) -> Iterator[None]:
    """Let Ray use `address`, and not RAY_ADDRESS of the environment, which would replace it."""
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # the only variable that outranks RAY_ADDRESS
    try:
        yield
    finally:
        del os.environ["RAY_API_SERVER_ADDRESS"]
        if before is not None:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def _variables() -> dict[str, str]:
    """Return the environment variables of the job: user, state of the code, tokens."""
    commit, changed, diff = git_state()
    values = (commit, _cut(changed, LONGEST_LIST), _cut(diff, LONGEST_DIFF))
    state = dict(zip(GIT_VARIABLES, values, strict=True)) | {USER: acting_user()}
    return state | {name: os.environ[name] for name in PASSED_ON if name in os.environ}


def _cut(text: str, longest: int) -> str:
    """Return `text`, cut where it would take more than `longest` bytes as JSON."""
    sizes = accumulate(len(json.dumps(character)) - 2 for character in text)
    kept = sum(1 for _ in takewhile(lambda size: size <= longest, sizes))
    return text if kept == len(text) else text[:kept] + CUT


async def _follow(client: Any, job: str, say: Callable[[str], None]) -> None:
    async for lines in client.tail_job_logs(job):
        say(lines.rstrip("\n"))


def _cancel(client: Any, job: str, say: Callable[[str], None]) -> None:
    say(f"cancelling {job}")
    client.stop_job(job)
    deadline = time.monotonic() + GRACE_SECONDS
    while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
        time.sleep(0.5)
    for line in client.get_job_logs(job).splitlines()[-3:]:  # nobody follows any more
        say(line)
    say(f"{job}: {client.get_job_status(job)}")
