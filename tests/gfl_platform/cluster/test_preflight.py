"""Messages about nodes that cannot train together."""

from dataclasses import replace

import numpy
import pytest

import gfl
import gfl_platform
from gfl.config.loader import derive
from gfl.data.split import load_splits
from gfl_platform.cluster.preflight import (
    DifferentNodesError,
    NodeFacts,
    code_digest,
    find_difference,
    installed_versions,
    problem_of_any_worker,
    same_on_all_nodes,
)
from tests.support.processes import run_workers

ONE = NodeFacts("a (10.0.0.1)", "code", {"torch": "2.14.1"}, ("train", "val"), "", 1000.0)
TWO = replace(ONE, node="b (10.0.0.2)", clock=1059.0)


def test_nodes_that_have_all_in_common_train():
    assert find_difference([ONE, TWO, ONE]) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code": "other"}, "other code of gfl and gfl_platform than a (10.0.0.1); let the job"),
        ({"versions": {"torch": "2.13.0"}}, "torch 2.13.0, but 2.14.1 on a (10.0.0.1); install"),
        ({"versions": {}}, "torch missing, but 2.14.1 on a (10.0.0.1); install requirements.lock"),
        ({"data": ("train", "other")}, "other images or annotations than a (10.0.0.1)"),
        ({"data": (), "problem": "/x: no such folder"}, "/x: no such folder; a (10.0.0.1) has"),
        ({"clock": 1100.0}, "its clock is 100 s ahead of a (10.0.0.1); set both by NTP"),
    ],
)
def test_the_node_that_differs_is_named(change, message):
    odd = replace(TWO, **change)
    for nodes in ([ONE, ONE, odd], [odd, ONE, ONE], [ONE, odd]):
        line = find_difference(nodes)
        if nodes == [ONE, odd] and not change.keys() & {"problem", "clock"}:
            assert line.startswith("node b") or line.startswith("node a")  # who is right?
        else:
            assert line.startswith("node b (10.0.0.2): ")
            assert message in line


def test_every_locked_package_is_compared(tmp_path):
    lock = tmp_path / "requirements.lock"
    lock.write_text("numpy==1.0 \\\n    --hash=sha256:00\nno-such-package==2\n")
    versions = installed_versions(lock)
    assert list(versions) == [
        "requirements.lock", "torch", "torchvision", "ray", "numpy", "no-such-package",
    ]  # fmt: skip
    assert versions["numpy"] == numpy.__version__  # the installed one, whatever the file says
    assert versions["no-such-package"] == "missing"
    before = versions["requirements.lock"]
    lock.write_text("numpy==1.0\n")
    assert installed_versions(lock)["requirements.lock"] != before
    assert list(installed_versions(tmp_path / "none")) == ["torch", "torchvision", "ray"]
    assert len(installed_versions()) > 50


def test_the_digest_of_the_code_is_of_its_files(tmp_path, monkeypatch):
    for package in (gfl, gfl_platform):
        folder = tmp_path / package.__name__
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "a.py").write_text("a = 1\n")
        monkeypatch.setattr(package, "__file__", str(folder / "__init__.py"))
    first = code_digest(gfl, gfl_platform)
    assert len(first) == 64
    (tmp_path / "gfl" / "notes.txt").touch()
    assert code_digest(gfl, gfl_platform) == first
    for package in ("gfl", "gfl_platform"):
        file = tmp_path / package / "inner" / "a.py"
        file.write_text("a = 2\n")
        assert code_digest(gfl, gfl_platform) != first
        file.write_text("a = 1\n")
        assert code_digest(gfl, gfl_platform) == first
        file.rename(file.with_name("b.py"))
        assert code_digest(gfl, gfl_platform) != first
        file.with_name("b.py").rename(file)


def load_with_a_folder_that_one_lacks(rank, config, missing):
    mine = derive(type(config), config, [f"data.val.images={missing}"] if rank == 1 else [])
    try:
        same_on_all_nodes(lambda: load_splits(mine))
    except DifferentNodesError as error:
        return str(error)


def test_data_that_one_node_lacks_stop_all_with_its_name(tiny, tmp_path):
    first, second = run_workers(2, load_with_a_folder_that_one_lacks, tiny, tmp_path / "none")
    assert first == second
    assert f"{tmp_path}/none: no such folder of images" in first


def tell_of_a_problem(rank):
    return problem_of_any_worker("damaged" if rank == 1 else "")


def test_a_problem_of_one_worker_is_that_of_all():
    assert run_workers(2, tell_of_a_problem) == ["damaged", "damaged"]
