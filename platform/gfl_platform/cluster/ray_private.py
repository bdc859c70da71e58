"""The attributes of Ray's exceptions that have no public name, as they are in Ray 2.60.

pyproject.toml keeps Ray below the next version. `tests/gfl_platform/cluster/test_ray_private.py`
holds what is said here against the installed Ray.
"""


def death_of_process(error: BaseException) -> BaseException | None:
    """Return why a worker's process died; None if the process lives and its code raised `error`.

    Ray hands callbacks a `WorkerHealthCheckFailedError` of a dead process. The class is private,
    and its public base classes are also those of errors in a process that lives.
    """
    death = getattr(error, "health_check_failure", None)
    return death if isinstance(death, BaseException) else None
