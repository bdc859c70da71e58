"""The model card, and training a model again from its run's configuration."""

import subprocess

import pytest

from gfl.config.loader import derive
from gfl_platform.cluster.events import DataDescribed, TagsSet
from gfl_platform.config import JobConfig
from gfl_platform.provenance import git_state, git_state_of
from gfl_platform.registry import model_card, models
from gfl_platform.tracking import metadata
from gfl_platform.tracking.run import RunTracker
from jobs.console.progress import Progress
from tests.support.tracking import store_of


@pytest.fixture
def code(monkeypatch):
    """Return a function that says what the code's state is."""

    def set_to(changed, diff):
        for module in (model_card, metadata):
            monkeypatch.setattr(module, "git_state", lambda: ("abc", changed, diff))

    return set_to


def test_a_training_is_done_again_where_it_is_asked_for(tiny, tmp_path, monkeypatch, code):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    then = derive(JobConfig, tiny, [f"storage.root={tmp_path}/then", f"tracking.uri={uri}"])
    code("a.py", "+1\n")
    (folder := tmp_path / "run").mkdir()
    tracker = RunTracker(store_of(then), folder, metadata.describe(then, "first"))
    tracker.handle(TagsSet({"weights.pretrained": "w (sha256 123)"}))
    tracker.close("FINISHED")
    where = JobConfig(storage={"root": f"{tmp_path}/now"}, tracking={"experiment": "again"})
    again = model_card.recipe(where, store_of(where), f"runs:/{tracker.run_id}", ["seed=3"])
    assert (again.job.data, again.job.seed) == (then.data, 3)
    assert (again.job.storage, again.job.tracking) == (where.storage, where.tracking)
    assert again.differences == []
    assert again.digests == {"weights.pretrained": "w (sha256 123)"}
    code("a.py", "+2\n")  # the same file, changed otherwise
    (difference,) = model_card.recipe(
        where, store_of(where), f"runs:/{tracker.run_id}", []
    ).differences
    assert difference.startswith("git.diff: what is not committed is not what")
    code("a.py", "+1\n")
    installed = model_card._installed
    monkeypatch.setattr(
        model_card, "_installed", lambda name: "9" if name == "torch" else installed(name)
    )
    (difference,) = model_card.recipe(
        where, store_of(where), f"runs:/{tracker.run_id}", []
    ).differences
    assert difference == f"torch {installed('torch')} -> 9"


def test_other_weights_are_told(capsys):
    progress = Progress()
    progress.expect({"weights.pretrained": "w (sha256 123)", "data.train.digest": "4"})
    progress.show(TagsSet({"weights.pretrained": "w (sha256 567)"}))
    progress.show(DataDescribed({"train.digest": "4"}, []))
    out = capsys.readouterr().out
    assert out == "not as it was then: weights.pretrained w (sha256 123) -> w (sha256 567)\n"


def test_the_diff_has_what_git_knows_and_new_files_are_named(tmp_path):
    def git(*words):
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True)

    git("init", "-q")
    (tmp_path / "old.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    (tmp_path / "old.py").write_text("a = 2\n")
    (tmp_path / "new.py").write_text("b = 3\n")
    git("add", "new.py")
    (tmp_path / "secrets.yaml").write_text("c = 4\n")
    (tmp_path / "weights.bin").write_bytes(b"c = 4\n")
    commit, changed, diff = git_state_of(tmp_path)
    assert len(commit) == 40
    assert changed == "new.py, old.py, secrets.yaml, weights.bin"
    assert [line for line in diff.splitlines() if line[:2] in ("+a", "+b", "+c")] == [
        "+b = 3", "+a = 2"
    ]  # fmt: skip


@pytest.mark.ray
def test_the_card_tells_what_a_model_was_made_of(trained):
    job, result, _ = trained
    described = model_card.describe(store_of(job), models.find(store_of(job), "shapes", "1"))
    assert described["run"] == result.run_id
    assert described["git.commit"] == git_state()[0]
    assert described["workers"] == "2 (CPU)"
    assert described["restarts"] == "0"
    assert "torch==" in described["packages"]
    assert "1: promoted" in described["decisions"]
    assert not [key for key in described if key.startswith("gfl.decision")]
    assert described["APl"] == "-"  # on images of 64 px no object is large
    assert described["AP50"] != "-"
    assert described["config"] == f"runs:/{result.run_id}/config.yaml"


@pytest.mark.ray
def test_a_training_is_done_again_from_its_card(trained):
    job, result, _ = trained
    where = JobConfig(storage=job.storage)
    again = model_card.recipe(
        where, store_of(where), "models:/shapes@champion", ["schedule.epochs=2"]
    )
    assert again.job.schedule.epochs == 2
    assert again.job.data == job.data
    assert again.job.registry.name is None
    assert again.digests.keys() == {"data.train.digest", "data.val.digest"}
    # The tree that the tests run in may change meanwhile; the installed packages do not.
    assert [line for line in again.differences if not line.startswith("git.")] == []
    assert (
        model_card.recipe(where, store_of(where), f"runs:/{result.run_id}", []).job.schedule
        == job.schedule
    )
    with pytest.raises(ValueError, match=r"config\.yaml; is it one of ours"):
        model_card.recipe(where, store_of(where), "runs:/0123", [])
