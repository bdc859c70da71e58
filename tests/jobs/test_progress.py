"""Lines of progress on the console."""

from jobs.console.progress import Progress


def test_what_the_workers_wait_for_is_always_shown(capsys):
    progress = Progress()
    progress.show({"kind": "evaluated", "images": 1, "total": 2})
    progress.show({"kind": "evaluated", "images": 2, "total": 2})
    progress.show({"kind": "waiting", "reason": "waiting for 4 GPUs, the cluster has 2"})
    assert capsys.readouterr().out.splitlines() == [
        "evaluated 1 of 2 images",
        "waiting for 4 GPUs, the cluster has 2",
    ]
