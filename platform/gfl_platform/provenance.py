"""Where code comes from: commit, uncommitted changes, and the acting user."""

import getpass
import os
import subprocess
from pathlib import Path

COMMIT = "git.commit"

GIT_VARIABLES = ("GFL_GIT_COMMIT", "GFL_GIT_CHANGED", "GFL_GIT_DIFF")
"""In the environment of a submitted job: what `git_state` returned where it was submitted."""

CODE = ("*.py", "*.yaml", "*.yml", "*.toml")
"""Of the files that git does not know, those whose content is noted."""

USER = "GFL_USER"
"""In the environment of a submitted job: who submitted it."""


def git_state() -> tuple[str, str, str]:
    """Return the code's commit (`unknown` outside a repository), changed files and their diff.

    A job that was submitted has no repository: its environment says.
    """
    if GIT_VARIABLES[0] in os.environ:
        commit, changed, diff = (os.environ.get(name, "") for name in GIT_VARIABLES)
        return commit, changed, diff

    return git_state_of(Path(__file__).parents[2])


def git_state_of(folder: Path) -> tuple[str, str, str]:
    """Return `git_state` of a repository; the diff has the code and configurations it adds, too."""

    def git(*arguments: str, differs: int = 0) -> str:
        command = ["git", "-C", str(folder), *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if ran.returncode not in (0, differs):
            raise subprocess.CalledProcessError(ran.returncode, command)
        return ran.stdout

    try:
        changed = ", ".join(line[3:] for line in git("status", "--porcelain").splitlines())
        listed = git("ls-files", "-z", "--others", "--exclude-standard", "--", *CODE)
        new = [
            git("diff", "--no-index", "--", os.devnull, file, differs=1)
            for file in listed.split("\0")
            if file
        ]
        return git("rev-parse", "HEAD").strip(), changed, "".join([git("diff", "HEAD"), *new])
    except (OSError, subprocess.CalledProcessError):
        return "unknown", "", ""


def acting_user() -> str:
    """Return who runs this, or submitted it; the number of a user without a name."""
    if submitted_by := os.environ.get(USER):
        return submitted_by
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no entry in its passwd
        return f"uid {os.getuid()}"
