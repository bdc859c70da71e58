"""COCO annotations: one JSON file for a set of images."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gfl.data.errors import DataError

FIELDS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
"""What every entry of a COCO file has."""


def read_coco(path: Path) -> tuple[dict[str, Any], str]:
    """Return the content of a COCO JSON file and its SHA-256.

    Raises:
        DataError: a file that is missing or not COCO JSON.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: annotations cannot be read ({error.strerror}); set data.train.annotations "
            "and data.val.annotations to COCO JSON files, or data.format"
        ) from error
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if isinstance(content, dict):
        content.setdefault("annotations", [])  # COCO's lists of test images have none
    for section in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(section), list):
            raise DataError(f"{path}: no list '{section}'; expected COCO JSON")
    if not content["images"]:
        raise DataError(f"{path}: lists no image")
    _require_complete(path, content)
    return content, hashlib.sha256(raw).hexdigest()


def _require_complete(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse entries that lack a field, and ids that are used twice."""
    for section, wanted in FIELDS.items():
        for entry in content[section]:
            absent = [name for name in wanted if not isinstance(entry, dict) or name not in entry]
            if absent:
                shown = str(entry)[:80]
                raise DataError(f"{path}: {section}: {shown} has no '{absent[0]}'; add it")
        ids = Counter(entry["id"] for entry in content[section])
        if ids and (twice := ids.most_common(1)[0])[1] > 1:
            raise DataError(
                f"{path}: {section}: id {twice[0]} is used {twice[1]} times; ids name one"
            )
