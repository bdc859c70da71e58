"""The origin of the running code: its commit, uncommitted changes, and the acting user."""

import getpass
import os
import subprocess
from pathlib import Path

from gfl_platform.redaction import redact

COMMIT = "git.commit"
"""Tag of an MLflow run: the commit of the code."""

GIT_VARIABLES = ("GFL_GIT_COMMIT", "GFL_GIT_CHANGED", "GFL_GIT_DIFF")
"""Environment variables of a submitted job: the submitter's commit, changed files and diff."""

USER = "GFL_USER"
"""Environment variable of a submitted job: the user who submitted it."""


def git_state() -> tuple[str, str, str]:
    """Return the code's commit (`unknown` outside a repository), changed files and their diff.

    A submitted job has no repository, so these come from its environment.
    """
    if GIT_VARIABLES[0] in os.environ:
        commit, changed, diff = (os.environ.get(name, "") for name in GIT_VARIABLES)
        return commit, changed, diff

    return git_state_of(Path(__file__).parents[2])


def git_state_of(folder: Path) -> tuple[str, str, str]:
    """Return `git_state` of a repository.

    Files that git does not know are named, but they are no part of the diff: they may hold secrets.
    `git add` makes a new file part of it.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=True
        )
        return result.stdout

    try:
        changed = ", ".join(line[3:] for line in git("status", "--porcelain").splitlines())
        return git("rev-parse", "HEAD").strip(), changed, redact(git("diff", "HEAD"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", "", ""


def acting_user() -> str:
    """Return the user who submitted the job or runs it; the user id if that user has no name."""
    if submitted_by := os.environ.get(USER):
        return submitted_by
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # A user of a container may have no entry in /etc/passwd.
        return f"uid {os.getuid()}"
