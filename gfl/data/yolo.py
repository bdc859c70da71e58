"""YOLO annotations: a text file for every image, a line `class cx cy w h` for every object.

Coordinates are shares of the image's width and height. An image without a file has no objects.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gfl.config.schema import SplitConfig
from gfl.data.errors import DataError
from gfl.data.folders import AnnotatedImage, Object, coco_dictionary, digest, read_files
from gfl.data.images import image_size, list_images

CLASSES_FILE = "classes.txt"
ROUNDING = 1e-3
"""How far a coordinate may be beyond [0, 1]: that much is a writer's rounding."""


def find_classes(folder: Path) -> list[str] | None:
    """Return the class names that lie with the annotations in `folder`, if any do.

    That is `classes.txt` in it, or `names:` of a `data.yaml` in it or up to two folders above.

    Raises:
        DataError: a file of names that cannot be used.
    """
    listed = folder / CLASSES_FILE
    if listed.is_file():
        return [name.strip() for name in _text(listed, listed.read_bytes()).strip().splitlines()]
    for place in (folder, *folder.absolute().parents[:2]):
        if (place / "data.yaml").is_file():
            return _names(place / "data.yaml")
    return None


def read_yolo(split: SplitConfig, classes: Sequence[str] | None) -> tuple[dict[str, Any], str]:
    """Return YOLO annotations as COCO's dictionary, and the SHA-256 of all files.

    Args:
        split: The folders of images and of text files.
        classes: Names in the order of labels.

    Raises:
        DataError: annotations that cannot be used.
    """
    folder = Path(split.annotations)
    files = read_files(folder, ".txt")
    labels = {file.stem: file for file in files if file.name != CLASSES_FILE}
    if not labels:
        raise DataError(f"{folder}: no .txt file for any image; set data.format or add them")
    if classes is None:
        raise DataError(
            f"{folder}: class names are unknown; set data.classes=[...], or add {CLASSES_FILE} "
            "there or `names:` in data.yaml"
        )
    pictures = list_images(Path(split.images))
    orphans = sorted(labels.keys() - {picture.stem for picture in pictures})
    if orphans:
        raise DataError(
            f"{labels[orphans[0]]}: its image '{orphans[0]}' is missing in {split.images}; add the "
            "image or remove the annotations"
        )
    images = []
    for picture in pictures:
        size = image_size(picture)
        file = labels.get(picture.stem)
        objects = _yolo_objects(file, files[file], size, classes) if file else []
        images.append(AnnotatedImage(picture.name, size, objects))
    return coco_dictionary(images, classes), digest(files)


def _yolo_objects(
    file: Path, content: bytes, size: tuple[int, int], classes: Sequence[str]
) -> list[Object]:
    lines = enumerate(_text(file, content).splitlines(), start=1)
    return [
        _yolo_object(line, size, classes, f"{file}: line {n}") for n, line in lines if line.strip()
    ]


def _yolo_object(line: str, size: tuple[int, int], classes: Sequence[str], what: str) -> Object:
    fields = line.split()
    if len(fields) > 5:
        raise DataError(
            f"{what}: has {len(fields)} numbers, as polygons and scored detections do; expected "
            "'class cx cy w h'; convert it to a box"
        )
    try:
        label, cx, cy, w, h = map(float, fields)
    except ValueError as error:
        raise DataError(
            f"{what}: got {line[:80]!r}; expected 'class cx cy w h', five numbers; correct it"
        ) from error
    if label not in range(len(classes)):
        raise DataError(
            f"{what}: class {fields[0]}, but classes are 0..{len(classes) - 1} "
            f"({', '.join(classes)}); correct it or name all in data.classes"
        )
    if not all(-ROUNDING <= share <= 1 + ROUNDING for share in (cx, cy, w, h)):
        raise DataError(
            f"{what}: got {line[:80]!r}; expected cx cy w h within 0..1; divide them by the "
            "image's width and height"
        )
    height, width = size
    return Object(int(label), [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height])


def _names(file: Path) -> list[str]:
    try:
        content = yaml.safe_load(_text(file, file.read_bytes()))
    except yaml.YAMLError as error:
        raise DataError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[label] for label in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(
            f"{file}: names: expected a list of texts, or a mapping of 0, 1, ... to texts, got "
            f"{str(names)[:80]}; correct it or set data.classes"
        )
    return names


def _text(file: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error}); save it as such") from error
