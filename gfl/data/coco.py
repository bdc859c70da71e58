"""Annotations in COCO's JSON, checked field by field."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gfl.data.annotations import FARTHEST, IGNORED, OBJECT, Annotations, shared
from gfl.data.faults import Faults
from gfl.errors import DataError
from gfl.structures import Id

LARGE_FILE = 10_000_000
"""Size in bytes from which the processes of a node share what they read of a COCO file."""


def is_ignored(annotation: Mapping[str, Any]) -> bool:
    """Return whether a box is left out of training and of AP: it says so, or it is of a crowd."""
    return _why_ignored(annotation) != ""


def _why_ignored(annotation: Mapping[str, Any]) -> str:
    flags = ("difficult", "iscrowd", "ignore")
    reasons = zip(flags, IGNORED[1:], strict=True)
    return next((reason for flag, reason in reasons if annotation.get(flag)), "")


def object_area(annotation: Mapping[str, Any]) -> float:
    """Return the area of an object in px; that of its box where none, or 0, is annotated."""
    _, _, width, height = annotation["bbox"]
    area = annotation.get("area")
    return float(width * height if area is None or area <= 0 else area)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_id(value: object) -> bool:
    return _is_whole(value) or _is_text(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < FARTHEST**2


def _is_box(value: object) -> bool:
    if not (isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))):
        return False
    return max(map(abs, value)) < FARTHEST and min(value[2:]) >= 0


def _is_side(value: object) -> bool:
    return value is None or (_is_whole(value) and 0 <= value < FARTHEST)  # type: ignore[operator]


def _is_flag(value: object) -> bool:
    return value is None or (isinstance(value, int) and value in (0, 1))


class _Field(NamedTuple):
    """A field of COCO's entries: whether it must be there, what it may hold, and that in words."""

    name: str
    required: bool
    accepts: Callable[[object], bool]
    expected: str


ID = "expected a whole number of 64 bits, or a text"
FIELDS = {
    "images": (
        _Field("id", True, _is_id, ID),
        _Field("file_name", True, _is_text, "expected the name of a file"),
        _Field("width", False, _is_side, "expected a whole number of px"),
        _Field("height", False, _is_side, "expected a whole number of px"),
    ),
    "annotations": (
        _Field("id", True, _is_id, ID),
        _Field("image_id", True, _is_id, ID),
        _Field("category_id", True, _is_id, ID),
        _Field("bbox", True, _is_box, "expected [x, y, width, height] in px, sides from 0"),
        _Field("area", False, lambda v: v is None or _is_number(v), "expected a number of px"),
        _Field("iscrowd", False, _is_flag, "expected 0 or 1"),
        _Field("ignore", False, _is_flag, "expected 0 or 1"),
        _Field("difficult", False, _is_flag, "expected 0 or 1"),
    ),
    "categories": (
        _Field("id", True, _is_id, ID),
        _Field("name", True, _is_text, "expected a name"),
    ),
}
"""Fields of COCO's entries that this package uses, by section."""

SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}
"""Name of one entry of each section."""


def read_coco(path: Path, cache: Path) -> Annotations:
    """Return the content of a COCO JSON file.

    Args:
        path: The file.
        cache: Folder in which the processes of a node share what is in large files.

    Raises:
        DataError: The file is missing or is not COCO JSON.
    """
    try:
        with path.open("rb") as content:
            digest, size = hashlib.file_digest(content, "sha256").hexdigest(), content.tell()
    except OSError as error:
        raise DataError(
            f"{path}: annotations cannot be read ({error.strerror}); set data.train.annotations "
            "and data.val.annotations to COCO JSON files, or data.format"
        ) from error
    if size < LARGE_FILE:
        return _parse_coco(path, digest)
    return shared(digest, cache, lambda: _parse_coco(path, digest))


def _parse_coco(path: Path, digest: str) -> Annotations:
    try:
        content = json.loads(path.read_bytes(), object_hook=_without_polygons)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not JSON ({error}); expected a COCO file, or another data.format"
        ) from error
    if isinstance(content, dict):
        content.setdefault("annotations", [])  # COCO's lists of test images have none
    for section in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(section), list):
            raise DataError(
                f"{path}: no list '{section}'; expected COCO JSON, or another data.format"
            )
    if not content["images"]:
        raise DataError(f"{path}: lists no image; expected at least one under 'images'")
    faults = Faults()
    for section in FIELDS:
        for entry in content[section]:
            with faults.collected():
                _require_fields(path, section, entry)
    faults.report()
    for section in FIELDS:
        _require_own_ids(f"{path}: {section}", [entry["id"] for entry in content[section]])
    return annotations_of(content, path, digest)


def _without_polygons(entry: dict[str, Any]) -> dict[str, Any]:
    """Forget what is most of COCO's files, and is used by no detector of boxes."""
    entry.pop("segmentation", None)
    return entry


def annotations_of(content: Mapping[str, Any], path: Path, digest: str) -> Annotations:
    """Return COCO's dictionary, whose fields are as `FIELDS` says, as `Annotations`.

    Args:
        content: The dictionary.
        path: Its file, for messages.
        digest: SHA-256 of the file.

    Raises:
        DataError: An annotation has an image or a category that is not listed.
    """
    images = content["images"]
    categories = sorted((category["id"], category["name"]) for category in content["categories"])
    image_of = {image["id"]: number for number, image in enumerate(images)}
    category_of = {identity: number for number, (identity, _) in enumerate(categories)}
    faults, objects = Faults(), []
    for annotation in content["annotations"]:
        what = f"{path}: annotation {annotation['id']}"
        image, category = annotation["image_id"], annotation["category_id"]
        if image not in image_of:
            advice = _other_type(image, image_of) or "list it or remove the annotation"
            faults.add(f"{what} belongs to image {image!r}, which is not listed; {advice}")
        elif category not in category_of:
            advice = _other_type(category, category_of) or "correct the id or add the category"
            known = f"the categories are {list(category_of)[:20]}"
            faults.add(f"{what} has category {category!r}, but {known}; {advice}")
        else:
            place = image_of[image], category_of[category]
            ignored = IGNORED.index(_why_ignored(annotation))
            objects.append((*place, annotation["bbox"], object_area(annotation), ignored))
    faults.report()
    return Annotations(
        image_ids=[image["id"] for image in images],
        file_names=[image["file_name"] for image in images],
        sizes=np.array([(i.get("height") or 0, i.get("width") or 0) for i in images]),
        categories=categories,
        objects=_by_image(objects),
        digest=digest,
    )


def _by_image(objects: Sequence[tuple[Any, ...]]) -> np.ndarray[Any, np.dtype[Any]]:
    """Return the fields of `OBJECT` as an array, ordered by image."""
    array = np.array(objects, dtype=OBJECT)
    return array[np.argsort(array["image"], kind="stable")]


def _other_type(identity: Id, known: Iterable[Id]) -> str:
    """Return advice if `identity` is known as a number, or as a text; empty if it is not."""
    for other in known:
        if str(other) == str(identity):
            kinds = ("a text", "a number") if isinstance(identity, str) else ("a number", "a text")
            return f"{identity!r} is {kinds[0]}, the listed id {kinds[1]}; write both the same way"
    return ""


def _require_fields(path: Path, section: str, entry: object) -> None:
    """Check the type and the range of every field of an entry."""
    for field in FIELDS[section]:
        if not isinstance(entry, dict) or (field.required and field.name not in entry):
            excerpt = str(entry)[:80]
            raise DataError(f"{path}: {section}: {excerpt} has no '{field.name}'; add it")
        if field.name in entry and not field.accepts(entry[field.name]):
            what = f"{path}: {SINGULAR[section]} {entry['id']!r}: {field.name}"
            excerpt = repr(entry[field.name])[:80]
            raise DataError(f"{what}: got {excerpt}; {field.expected}; correct it")


def _require_own_ids(what: str, ids: Sequence[int | str]) -> None:
    """Check that ids are all numbers or all texts, and that none is used twice."""
    text = next((identity for identity in ids if isinstance(identity, str)), None)
    number = next((identity for identity in ids if isinstance(identity, int)), None)
    if text is not None and number is not None:
        raise DataError(f"{what}: id {text!r} is a text, {number!r} a number; make all the same")
    for identity, uses in Counter(ids).most_common(1):
        if uses > 1:
            raise DataError(
                f"{what}: id {identity!r} is used {uses} times; give each entry an id of its own"
            )
