"""The help of every command and sub-command, word for word."""

from pathlib import Path

import pytest

import jobs
from tests.support.goldens import GOLDEN, compare_text, run_command

COMMANDS = sorted(
    path.stem
    for path in Path(jobs.__file__).parent.glob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)

OF_REGISTRY = ("list", "show", "promote", "rollback", "history", "compare", "alias")

HELPS = [(command,) for command in COMMANDS] + [("registry", below) for below in OF_REGISTRY]


@pytest.mark.parametrize("words", HELPS, ids="-".join)
def test_the_help_is_the_frozen_one(words, monkeypatch, capsys):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    command, *below = words
    text = run_command(monkeypatch, capsys, f"jobs.{command}", *below, "--help", columns=100)
    if not below:
        assert f"example: python -m jobs.{command}" in text
    compare_text(f"help/{'-'.join(words)}.txt", text)


def test_every_frozen_help_has_a_command():
    frozen = {path.stem for path in (GOLDEN / "help").glob("*.txt")}
    assert frozen == {"-".join(words) for words in HELPS}
