"""Lines of progress on the console."""

from gfl_platform.cluster.events import ItemsDone, Waiting
from jobs.console.progress import Progress


def test_what_the_workers_wait_for_is_always_shown(capsys):
    progress = Progress()
    progress.show(ItemsDone("images evaluated", 1, 2))
    progress.show(ItemsDone("images evaluated", 2, 2))
    progress.show(Waiting("waiting for 4 GPUs, the cluster has 2"))
    assert capsys.readouterr().out.splitlines() == [
        "1 of 2 images evaluated",
        "waiting for 4 GPUs, the cluster has 2",
    ]
