"""What is checked before a job travels."""

import json
import os
import subprocess
import sys

import pytest

import jobs.submit
from gfl_platform.cluster import submit as submit_module
from gfl_platform.cluster.submit import SubmissionError, shadows, submit, travelling
from gfl_platform.provenance import acting_user, git_state


@pytest.fixture
def repository(tmp_path):
    """A repository with one configuration, an ignored folder and an excluded one."""
    for name in ("configs/a.yaml", "kept/big.bin", "ignored/b.yaml", "outputs/c.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 1000)
    (tmp_path / ".gitignore").write_text("/ignored/\n")
    (tmp_path / "runtime-env.yaml").write_text(
        "working_dir: .\nexcludes: [/outputs/]\nenv_vars: {}"
    )
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


def refused(repository, *words):
    with pytest.raises(SubmissionError) as caught:
        submit(words, "http://127.0.0.1:9", repository, print)
    return str(caught.value)


def test_what_git_ignores_and_what_is_excluded_stays(repository):
    files = travelling(repository, ["/outputs/"])
    assert files == {".gitignore", "runtime-env.yaml", "configs/a.yaml", "kept/big.bin"}


def test_a_configuration_that_would_not_travel_is_named(repository):
    assert "ignored/b.yaml: would not travel" in refused(repository, "jobs.train", "ignored/b.yaml")


def test_too_large_a_folder_is_named(repository, monkeypatch):
    monkeypatch.setattr(submit_module, "LARGEST", 2000)
    message = refused(repository, "jobs.train", "configs/a.yaml")
    assert "largest: " in message
    assert "kept" in message


def test_what_hides_the_standard_library_is_named(repository):
    (repository / "stat.py").touch()
    assert "stat.py: hides Python's own module" in refused(repository, "jobs.train")


@pytest.mark.parametrize(
    ("file", "hides"),
    [("platform/__init__.py", True), ("platform/json.py", True), ("stat.py", True),
     ("platform/logging/__init__.py", True), ("platform/gfl_platform/trail.py", False),
     ("gfl/trainer.py", False), ("random/__init__.py", True), ("tests/stat.py", False)],
)  # fmt: skip
def test_only_modules_on_the_path_hide_others(file, hides):
    assert (shadows({file}) == [file]) == hides


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["configs/demo.yaml"], "storage.root: 'outputs' would lie in the job's copy"),
        (["models:/x@champion", "storage.root=runs"], "storage.root: 'runs' would lie in"),
        (["configs/demo.yaml", "loss.qfl.bta=1"], "did you mean 'beta'?"),
        (["configs/demo.yaml", "storage.root=/tmp/x", "--address", "http://127.0.0.1:9"],
         "Failed to connect to Ray at address: http://127.0.0.1:9."),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_said_before_it_travels(words, message, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:10")  # Ray lets it replace --address
    monkeypatch.setattr(sys, "argv", ["jobs.submit", "train", *words])
    with pytest.raises(SystemExit):
        jobs.submit.main()
    assert message in capsys.readouterr().err


COMMANDS = [
    "analyse", "benchmark", "demo", "evaluate", "export", "inspect", "predict", "registry",
    "status", "sweep", "train",
]  # fmt: skip
"""All jobs but `submit` itself."""


@pytest.mark.parametrize(
    "job",
    ["tables", "console", "__init__", "registry_commands", "submit", "trian", "../jobs/train"],
)
def test_what_is_no_command_is_refused_in_one_line_that_lists_the_jobs(job, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jobs.submit", job, "configs/demo.yaml"])
    with pytest.raises(SystemExit) as caught:
        jobs.submit.main()
    assert caught.value.code == 1
    listed = ", ".join(COMMANDS)
    error = f"error: no job called '{job}'; expected one of {listed}\n"
    assert capsys.readouterr().err == error


def test_helpers_beside_and_below_the_commands_are_no_jobs(tmp_path):
    (tmp_path / "train.py").write_text("import absent\n\ndef main():\n    pass\n")
    (tmp_path / "tables.py").write_text("class Table:\n    def main(self):\n        pass\n")
    (tmp_path / "__init__.py").touch()
    (tmp_path / "console").mkdir()
    (tmp_path / "console" / "progress.py").write_text("def main():\n    pass\n")
    assert jobs.submit.submittable_jobs(tmp_path) == ["train"]


def test_a_submitted_job_knows_its_commit(monkeypatch):
    monkeypatch.setenv("GFL_GIT_COMMIT", "abc")
    monkeypatch.setenv("GFL_GIT_DIFF", "a diff")
    assert git_state() == ("abc", "", "a diff")


def test_a_submitted_job_knows_its_user(monkeypatch):
    assert submit_module._variables()["GFL_USER"] == acting_user()
    monkeypatch.setenv("GFL_USER", "ada")
    assert acting_user() == "ada"


@pytest.mark.parametrize("character", ["x", "é", "界", "😀", '"', "\n"])
def test_what_travels_of_a_long_diff_fits_into_one_string_of_linux(monkeypatch, character):
    monkeypatch.setenv("GFL_GIT_COMMIT", "abc")
    # Each fits, as a test's own environment has to hold it, but not both together.
    long = character * (100_000 // len(character.encode()))
    monkeypatch.setenv("GFL_GIT_DIFF", long)
    monkeypatch.setenv("GFL_GIT_CHANGED", long)
    variables = submit_module._variables()
    subprocess.run(["true"], env={"VARIABLES": json.dumps(variables)}, check=True)
    for name in ("GFL_GIT_DIFF", "GFL_GIT_CHANGED"):
        kept = variables[name].removesuffix("\n(cut off here)\n")
        assert kept != variables[name]
        assert long.startswith(kept)


def test_a_short_diff_travels_whole_and_the_endpoint_of_s3_with_it(monkeypatch):
    monkeypatch.setenv("GFL_GIT_COMMIT", "abc")
    monkeypatch.setenv("GFL_GIT_DIFF", "ein Unterschied: ü")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9000")
    variables = submit_module._variables()
    assert variables["GFL_GIT_DIFF"] == "ein Unterschied: ü"
    assert variables["AWS_ENDPOINT_URL_S3"] == "http://127.0.0.1:9000"


def test_a_user_without_a_name_is_a_number(monkeypatch):
    for name in ("GFL_USER", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 123_456)
    assert acting_user() == "uid 123456"
