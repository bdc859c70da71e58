"""The README and the pages in `docs/` name only files, links and commands that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "tests" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "gfl|platform|jobs|tests|configs|deploy|docs|benchmarks"


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request):
    return request.param


def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    local = [target for target in targets if "://" not in target]
    absent = [target for target in local if not (page.parent / target).exists()]
    assert absent == []


def test_named_files_exist(page):
    paths = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", page.read_text())
    paths = [path for path in paths if path.islower()]  # a word in capitals stands for any name
    absent = [p for p in paths if not ((ROOT / p).exists() or (page.parent / p).exists())]
    assert absent == []


def test_named_commands_exist(page):
    modules = re.findall(r"python -m ((?:jobs|benchmarks)(?:\.[a-z_]+)?)\b", page.read_text())
    files = {module: ROOT / module.replace(".", "/") for module in modules if module != "jobs"}
    absent = [
        m for m, path in files.items() if not (path.is_dir() or path.with_suffix(".py").exists())
    ]
    assert absent == []


def test_named_functions_are_in_the_files_beside_them():
    rows = re.findall(
        r"`(gfl/[\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", (ROOT / "docs/design.md").read_text()
    )
    assert len(rows) > 5
    for path, names in rows:
        source = (ROOT / path).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(def|class) {name}\b", source, re.MULTILINE), (path, name)


def test_the_readme_fits_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
