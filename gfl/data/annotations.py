"""Annotations of any format as arrays, which the processes of a node share.

Shapes: I images, A objects, C categories.
"""

import contextlib
import fcntl
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from gfl.structures import Id

logger = logging.getLogger(__name__)

OBJECT = np.dtype(
    [
        ("image", np.int32),
        ("category", np.int32),
        ("bbox", np.float64, (4,)),
        ("area", np.float64),
        ("ignored", np.uint8),
    ]
)
"""An object: positions of its image and its category, `xywh` and area in px, and why it is ignored:
an index of `IGNORED`."""

IGNORED = ("", "difficult boxes", "crowd boxes", "boxes with ignore: 1")
"""Reasons for which training and AP ignore an object; 0 is none."""

FARTHEST = 2.0**31
"""Largest coordinate or side in px: what COCO and VOC files hold beyond is a mistake."""

FORMAT = 1
"""Version of the files of `Annotations`: raise it when their content changes."""

KEPT = 16
"""Number of files' annotations that the cache keeps."""


@dataclass(frozen=True)
class Annotations:
    """Annotated images.

    Attributes:
        image_ids: Id of every image, (I,).
        file_names: File of every image, below the folder of images, (I,).
        sizes: (height, width) of every image in px, 0 where it is not annotated, (I, 2).
        categories: Id and name of every category in the order of ids, (C,).
        objects: The objects, ordered by image, (A,), each an `OBJECT`.
        digest: SHA-256 of the annotation files.
    """

    image_ids: list[Id]
    file_names: list[str]
    sizes: npt.NDArray[np.int64]
    categories: list[tuple[Id, str]]
    objects: npt.NDArray[Any]
    digest: str

    def save(self, folder: Path) -> None:
        """Write the annotations to `folder`, which is empty."""
        np.save(folder / "objects.npy", self.objects)
        np.save(folder / "sizes.npy", self.sizes)
        lists = [self.image_ids, self.file_names, self.categories, self.digest]
        (folder / "lists.json").write_text(json.dumps(lists))


def load_annotations(folder: Path) -> Annotations:
    """Return annotations that `Annotations.save` wrote; objects are mapped, not read.

    Raises:
        OSError, ValueError: The files are absent or damaged.
    """
    image_ids, file_names, categories, digest = json.loads((folder / "lists.json").read_bytes())
    objects = np.load(folder / "objects.npy", mmap_mode="r")
    pairs = [(identity, name) for identity, name in categories]
    return Annotations(image_ids, file_names, np.load(folder / "sizes.npy"), pairs, objects, digest)


def shared(digest: str, cache: Path, read: Callable[[], Annotations]) -> Annotations:
    """Return the annotations of a file: one process of a node reads it, the others map its arrays.

    Args:
        digest: SHA-256 of the file.
        cache: Folder of the arrays; without a right to write there, every process reads the file.
        read: Reads the file.
    """
    entry = cache / f"{digest}-{FORMAT}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "reading.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(OSError, ValueError):  # there is none yet, or it is damaged
                return load_annotations(entry)
            annotations = read()
            _keep(annotations, entry)
    except OSError as error:
        logger.warning("%s: cannot keep annotations as arrays (%s)", cache, error.strerror)
        annotations = read()
    return annotations


def _keep(annotations: Annotations, entry: Path) -> None:
    """Write an entry, which appears complete or not at all, and delete the oldest ones."""
    with TemporaryDirectory(dir=entry.parent) as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        annotations.save(whole)
        shutil.rmtree(entry, ignore_errors=True)
        whole.replace(entry)
    entries = [path for path in entry.parent.iterdir() if path.name.endswith(f"-{FORMAT}")]
    for old in sorted(entries, key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)  # a process that maps its files keeps them
