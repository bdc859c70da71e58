"""The gate before `champion`, the card of a model, and two versions side by side."""

from pathlib import Path
from urllib.parse import urlparse

import pytest

from gfl.config.loader import derive
from gfl_platform.config import JobConfig
from gfl_platform.provenance import git_state
from gfl_platform.registry import compare, gate, history, model_card, models
from gfl_platform.tracking.client import connect

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def shapes(trained):
    """The job and the result of the training that `shapes` is from; one worker measures here."""
    job, result, _ = trained
    return derive(JobConfig, job, ["cluster.workers=1"]), result


def gated(job, gate_section):
    return job.model_copy(
        update={"registry": derive(JobConfig, job, [f"registry.gate={gate_section}"]).registry}
    )


def aliases(job):
    return {a: v.version for v in models.list_versions(job, "shapes") for a in v.aliases}


def test_a_training_passed_the_gate_before_it_became_champion(shapes):
    job, result = shapes
    decision = history.read_trail(connect(job), "shapes")[0]
    assert (decision.action, decision.version, decision.aliases) == ("promoted", 1, {"champion": 1})
    assert decision.figures["candidate"]["AP"] == pytest.approx(result.metrics["AP"], abs=1e-9)
    assert decision.commit == git_state()[0]
    assert result.decision.number == 1
    assert gate.promote(job, "shapes", 1, lambda _: None) == decision


def test_a_version_is_refused_promoted_and_rolled_back(shapes):
    job, _ = shapes
    client = connect(job)
    strict = gated(job, "{ap_margin: 0.01, fps_floor: 1e6}")
    refused = gate.promote(strict, "shapes", 2, lambda _: None)
    assert refused.action == "refused"
    assert refused.figures["gain"] == {"ap": 0, "low": 0, "high": 0}
    said = " ".join(refused.reasons)
    assert "+0.0000 (95 % interval +0.0000 to +0.0000, within the noise); required +0.01" in said
    assert "the floor is 1e+06" in said
    assert "logged" in said
    assert "champion" in aliases(job)
    assert aliases(job)["champion"] == 1

    gate.promote(job, "shapes", 2, lambda _: None)
    assert aliases(job)["champion"] == 2
    assert aliases(job)["previous"] == 1
    gate.rollback(job, "shapes", "worse in the field")
    assert aliases(job)["champion"] == 1
    assert aliases(job)["previous"] == 2
    actions = [decision.action for decision in history.read_trail(client, "shapes")]
    assert actions[-3:] == ["refused", "promoted", "rolled back"]
    assert [version.name for version in models.list_versions(job)] == ["shapes", "shapes"]


@pytest.mark.slow
def test_a_version_with_a_pickle_or_another_ap_is_refused(shapes):
    job, result = shapes
    client = connect(job)
    facts = {"AP": 0.99, "fps": result.fps}
    number = models.register(job, "boasts", result.checkpoint, result.run_id, facts)
    decision = gate.promote(job, "boasts", number, lambda _: None)
    assert decision.action == "refused"
    assert "measured again, 0.9900 logged" in " ".join(decision.reasons)
    location = client.get_model_version_download_uri("boasts", str(number))
    folder = Path(urlparse(location).path)
    (folder / "checkpoint").mkdir(exist_ok=True)
    (folder / "extra.pkl").write_bytes(b"")
    decision = gate.promote(job, "boasts", number, lambda _: None)
    assert decision.reasons == [
        "Artifact extra.pkl may hold a pickle, which runs code when it is loaded."
    ]
    with pytest.raises(models.RegistryError, match="nothing to go back to"):
        gate.rollback(job, "boasts", "why not")
    for name in ("boasts", history.trail_of("boasts")):
        client.delete_registered_model(name)


def test_the_card_tells_what_a_model_was_made_of(shapes):
    job, result = shapes
    described = model_card.describe(job, models.find(job, "shapes", "1"))
    assert described["run"] == result.run_id
    assert described["git.commit"] == git_state()[0]
    assert described["workers"] == "2 (CPU)"
    assert described["restarts"] == "0"
    assert "torch==" in described["packages"]
    assert "1: promoted" in described["decisions"]
    assert described["APl"] == "-"  # on images of 64 px no object is large
    assert described["AP50"] != "-"
    assert described["config"] == f"runs:/{result.run_id}/config.yaml"


def test_a_training_is_done_again_from_its_card(shapes):
    job, result = shapes
    where = JobConfig(storage=job.storage)
    found = model_card.recipe(where, "models:/shapes@champion", ["schedule.epochs=2"])
    assert found.job.schedule.epochs == 2
    assert found.job.data == job.data
    assert found.job.registry.name is None
    assert found.digests.keys() == {"data.train.digest", "data.val.digest"}
    # The tree that the tests run in may change meanwhile; the installed packages do not.
    assert [line for line in found.differences if not line.startswith("git.")] == []
    assert model_card.recipe(where, f"runs:/{result.run_id}", []).job.schedule == job.schedule
    with pytest.raises(ValueError, match=r"config\.yaml; is it one of ours"):
        model_card.recipe(where, "runs:/0123", [])


def test_two_versions_are_compared(shapes, tmp_path):
    job, _ = shapes
    one, other = (models.find(job, "shapes", number) for number in "12")
    found = compare.compare(job, one, other, tmp_path / "pairs.png", lambda _: None)
    assert (found.settings, found.gain.ap) == ([], 0)
    assert found.gain.by_class == {"rectangle": 0, "ellipse": 0, "triangle": 0}
    assert (tmp_path / "pairs.png").stat().st_size > 10_000
