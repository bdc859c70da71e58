"""Frozen texts under `tests/golden/`: compared with what the code gives now, or recorded anew.

`GFL_RECORD=1 pytest FILE` writes what a test file gives now; `git diff tests/golden` then shows
what changed.
"""

import difflib
import json
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"

WIDTH = 160
"""Characters of a line where no terminal says otherwise."""


def compare_text(name: str, text: str) -> None:
    """Fail with a diff unless `text` is the content of the file `name` in `tests/golden/`."""
    path = GOLDEN / name
    if os.environ.get("GFL_RECORD"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    frozen = path.read_text(encoding="utf-8")
    if text != frozen:
        lines = frozen.splitlines(), text.splitlines()
        diff = "\n".join(difflib.unified_diff(*lines, f"golden/{name}", "now", lineterm=""))
        pytest.fail(f"{diff}\nGFL_RECORD=1 records it anew", pytrace=False)


def compare_json(name: str, content: Any) -> None:
    """Fail with a diff unless `content` is what the JSON file `name` holds."""
    compare_text(name, as_json(content))


def read_json(name: str) -> Any:
    """Return the content of the JSON file `name` in `tests/golden/`."""
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def rounded(content: Any, digits: int = 10) -> Any:
    """Return JSON content with its real numbers rounded to so many significant digits."""
    if isinstance(content, dict):
        return {key: rounded(value, digits) for key, value in content.items()}
    if isinstance(content, list):
        return [rounded(value, digits) for value in content]
    return float(f"{content:.{digits}g}") if isinstance(content, float) else content


def as_json(content: Any) -> str:
    """Return JSON text in which every short list or mapping has a line of its own."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    inner = re.compile(r"[\[{]\n[^\[\]{}]{,400}?\n *[\]}]")
    return inner.sub(lambda match: re.sub(r"\n *", " ", match[0]), text) + "\n"


def plain_terminal(monkeypatch: Any, columns: int = WIDTH) -> None:
    """Let commands print lines of this many characters at most, without colour."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LANG", "C.UTF-8")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def run_command(monkeypatch: Any, capsys: Any, *words: str, columns: int = WIDTH) -> str:
    """Run `python -m WORDS` in this process; return its output, errors and exit status."""
    plain_terminal(monkeypatch, columns)
    module, *arguments = words
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    # An imported module would not be run again without a warning.
    monkeypatch.delitem(sys.modules, module, raising=False)
    capsys.readouterr()
    status: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
    out, error = capsys.readouterr()
    lines = [line.rstrip() for line in f"{out}{error}".splitlines()]
    return "\n".join([*lines, f"exit status {status}"]) + "\n"
