"""A copy on a node that one process deletes while another begins to use it."""

import fcntl
import shutil
import threading

from gfl_platform.storage.cache import USED, _use


def test_a_copy_that_is_deleted_while_another_process_begins_to_use_it_is_made_anew(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    with (copy / USED).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        user = threading.Thread(target=_use, args=[copy])
        user.start()
        user.join(0.2)
        assert user.is_alive()  # it waits for the process that deletes
        shutil.rmtree(copy.rename(tmp_path / "gone"))
    user.join(10)
    assert not user.is_alive()
    with (copy / USED).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return  # the new copy is in use
    raise AssertionError("the copy is not locked against deletion")
