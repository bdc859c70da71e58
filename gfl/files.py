"""Files that survive a crash: written whole or not at all, down to the device.

    write_atomically(folder / "status.json", json.dumps(facts))

`inside` is the one place where names from outside, such as keys of a bucket, become paths.
"""

import os
from pathlib import Path, PurePosixPath


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to `path`, which then holds all of it, or what it held before.

    That also holds if the machine loses power: file and folder are synchronised with the device.
    Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        synchronise(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def synchronise(path: Path) -> None:
    """Write the content of a file, or a folder's list of files, from memory to the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def inside(folder: Path, name: str) -> Path:
    """Return the path of `name`, which comes from outside, below `folder`.

    Raises:
        ValueError: `name` leads out of the folder, or is not written as plain names between `/`.
    """
    parts = name.split("/")
    plain = PurePosixPath(name).parts == tuple(parts) and ".." not in parts
    path = folder / name if plain and "\\" not in name and "\0" not in name else None
    if path is None or not path.is_relative_to(folder) or path == folder:
        raise ValueError(
            f"{name!r}: not a name of a file below a folder; expected names between '/', without "
            "'..', '.', '\\', an empty name or a leading '/'; rename it"
        )
    return path
