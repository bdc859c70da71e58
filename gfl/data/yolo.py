"""Annotations in YOLO's text files, one an image, with the class names in a file beside them."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from gfl.config.loader import load_yaml
from gfl.config.schema import SplitConfig
from gfl.data.annotations import Annotations
from gfl.data.faults import Faults
from gfl.data.image_files import (
    AnnotatedImage,
    Object,
    annotations_of_images,
    decode_text,
    digest_files,
    read_files,
)
from gfl.data.images import FileNames, composed, image_size, list_images
from gfl.errors import DataError

CLASSES_FILE = "classes.txt"
"""File beside YOLO annotations that lists the class names, one a line."""

ROUNDING = 1e-3
"""How far a YOLO coordinate may lie beyond [0, 1]: writers round."""


def find_classes(folder: Path) -> list[str] | None:
    """Return the class names that a file beside YOLO annotations lists; None without such a file.

    The file is `classes.txt` or `obj.names` in `folder` or in the folder above, where Label Studio
    and CVAT write it, or a `data.yaml` with `names:` in it or up to two folders above.

    Raises:
        DataError: The file of names cannot be used, or two such files differ.
    """
    here, above, *higher = (folder.absolute(), *folder.absolute().parents[:2])
    lists = [place / name for place in (here, above) for name in (CLASSES_FILE, "obj.names")]
    listed = {file: _lines(file) for file in lists if file.is_file()}
    yaml_files = (place / "data.yaml" for place in (here, above, *higher))
    listed |= {file: _names(file) for file in yaml_files if file.is_file()}
    if not listed:
        return None
    (first, names), *others = listed.items()
    for other, other_names in others:
        if other_names != names:
            raise DataError(
                f"{first} and {other} name other classes ({', '.join(names)[:80]}; "
                f"{', '.join(other_names)[:80]}); correct one, or set data.classes"
            )
    return names


def read_yolo(split: SplitConfig, classes: Sequence[str] | None) -> Annotations:
    """Return YOLO annotations.

    Args:
        split: The folders of images and of text files.
        classes: Names in the order of labels.

    Raises:
        DataError: The annotations cannot be used.
    """
    folder = Path(split.annotations)
    files = read_files(folder, ".txt")
    labels = {composed(file.stem): file for file in files if file.name != CLASSES_FILE}
    if not labels:
        raise DataError(f"{folder}: no .txt file for any image; add the files, or set data.format")
    if classes is None:
        raise DataError(
            f"{folder}: class names are unknown; set data.classes=[...], or add {CLASSES_FILE} "
            "there or `names:` in data.yaml"
        )
    images, used, faults = [], set[str](), Faults()
    for path in list_images(Path(split.images)):
        with faults.collected():
            size = image_size(path)
            # Some tools append .txt to the stem of the image, some to its whole name.
            keys = [key for key in map(composed, (path.stem, path.name)) if key in labels]
            used.update(keys)
            objects: list[Object] = []
            for file in (labels[key] for key in keys):
                for number, line in enumerate(decode_text(file, files[file]).splitlines(), start=1):
                    if line.strip():
                        with faults.collected():
                            what = f"{file}: line {number}"
                            objects.append(_yolo_object(line, size, classes, what))
            images.append(AnnotatedImage(path.name, size, objects))
    names = FileNames(Path(split.images))
    for name in sorted(labels.keys() - used):
        missing = f"its image '{name}' is missing in {split.images}"
        faults.add(f"{labels[name]}: {missing}; {names.hint(name)}")
    faults.report()
    return annotations_of_images(images, classes, digest_files(files))


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
    if not all(-ROUNDING <= value <= 1 + ROUNDING for value in (cx, cy, w, h)):
        raise DataError(
            f"{what}: got {line[:80]!r}; expected cx cy w h within 0..1; divide them by the "
            "image's width and height"
        )
    height, width = size
    return Object(int(label), [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height])


def _lines(file: Path) -> list[str]:
    return [name.strip() for name in decode_text(file, file.read_bytes()).strip().splitlines()]


def _names(file: Path) -> list[str]:
    try:
        content = load_yaml(decode_text(file, file.read_bytes()))
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
