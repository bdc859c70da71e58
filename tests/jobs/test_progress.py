"""Lines of progress on the console."""

from gfl_platform.cluster.events import ImagesEvaluated, Waiting
from jobs.console.progress import Progress


def test_what_the_workers_wait_for_is_always_shown(capsys):
    progress = Progress()
    progress.show(ImagesEvaluated(1, 2))
    progress.show(ImagesEvaluated(2, 2))
    progress.show(Waiting("waiting for 4 GPUs, the cluster has 2"))
    assert capsys.readouterr().out.splitlines() == [
        "evaluated 1 of 2 images",
        "waiting for 4 GPUs, the cluster has 2",
    ]
