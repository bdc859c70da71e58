"""New MLflow databases within milliseconds: copies of one that has its tables already."""

import contextlib
import shutil
from pathlib import Path

import sqlalchemy
from sqlalchemy import event


def make_tables(path):
    """Make an empty MLflow database."""
    import mlflow

    mlflow.MlflowClient(f"sqlite:///{path}", f"sqlite:///{path}").search_experiments()


@contextlib.contextmanager
def copied_from_a_template(template):
    """Within it, this process makes every new SQLite file as a copy of `template`, made first.

    MLflow makes the tables of a database by all of its migrations, which takes a second of CPU and
    hundreds of waits for the disk. The copies do not wait for the disk: they outlive a process that
    is killed, but no loss of power.
    """

    def copy(dialect, _record, arguments, _parameters):
        is_file = dialect.name == "sqlite" and arguments
        if is_file and template.exists() and not Path(arguments[0]).exists():
            shutil.copy(template, arguments[0])

    def do_not_wait_for_the_disk(connection, _record):
        if type(connection).__module__ == "sqlite3":
            connection.execute("PRAGMA synchronous = OFF")

    listeners = {"do_connect": copy, "connect": do_not_wait_for_the_disk}
    for name, listener in listeners.items():
        event.listen(sqlalchemy.Engine, name, listener)
    make_tables(template)
    yield
    for name, listener in listeners.items():
        event.remove(sqlalchemy.Engine, name, listener)
