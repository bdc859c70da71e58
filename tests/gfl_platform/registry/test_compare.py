"""Two versions side by side, on what was measured of them in a real training."""

import pytest

from gfl.config.loader import derive
from gfl_platform.config import JobConfig
from gfl_platform.registry import compare, models
from tests.support.tracking import store_of


@pytest.mark.ray
def test_two_versions_are_compared(trained, tmp_path):
    job = derive(JobConfig, trained[0], ["cluster.workers=0"])
    one, other = (models.find(store_of(job), "shapes", number) for number in "12")
    comparison = compare.compare(
        job, store_of(job), (one, other), tmp_path / "pairs.png", lambda _: None
    )
    assert (comparison.settings, comparison.gain.ap) == ([], 0)
    assert comparison.gain.by_class == {"rectangle": 0, "ellipse": 0, "triangle": 0}
    assert (tmp_path / "pairs.png").stat().st_size > 10_000
