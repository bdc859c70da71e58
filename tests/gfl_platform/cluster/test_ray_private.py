"""What Ray has no public name for is as our one module that uses it says."""

import pickle

from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from gfl_platform.cluster.ray_private import death_of_process


def test_the_death_of_a_process_is_told_from_an_error_of_its_code():
    death = ActorDiedError()
    error = WorkerHealthCheckFailedError("rank 1 is gone", death)
    assert death_of_process(error) is death
    assert isinstance(death_of_process(pickle.loads(pickle.dumps(error))), ActorDiedError)  # noqa: S301
    assert death_of_process(ValueError("bad data")) is None
    assert death_of_process(death) is None
