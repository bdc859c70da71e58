"""Annotation formats: COCO JSON, Pascal VOC XML and YOLO txt, each read as `Annotations`."""

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, NamedTuple, Never
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np
import yaml

from gfl.config.loader import load_yaml
from gfl.config.schema import SplitConfig
from gfl.data.annotations import IGNORED, OBJECT, Annotations, shared
from gfl.data.images import FileNames, composed, image_size, list_images
from gfl.errors import DataError
from gfl.structures import Id

CLASSES_FILE = "classes.txt"
"""File beside YOLO annotations that lists the class names, one a line."""

ROUNDING = 1e-3
"""How far a YOLO coordinate may lie beyond [0, 1]: writers round."""

SHOWN_FAULTS = 10
"""Number of faults that one message names."""

LARGE_FILE = 10_000_000
"""Size in bytes from which the processes of a node share what they read of a COCO file."""

FARTHEST = 2.0**31
"""Largest coordinate or side in px: what COCO and VOC files hold beyond is a mistake."""


class Faults:
    """The faults of one set of annotations, which one message reports together."""

    def __init__(self) -> None:
        self._messages: list[str] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Keep the message of a `DataError` in the context, and go on behind it."""
        try:
            yield
        except DataError as error:
            self.add(str(error))

    def add(self, message: str) -> None:
        """Keep the message of a fault."""
        self._messages.append(message)

    def report(self) -> None:
        """Raise the collected faults.

        Raises:
            DataError: There is a fault.
        """
        if self._messages:
            more = len(self._messages) - SHOWN_FAULTS
            counted = [f"and {more} more"] if more > 0 else []
            raise DataError("; ".join(self._messages[:SHOWN_FAULTS] + counted))


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


class Object(NamedTuple):
    """An object of class `label` (0..C-1) with its box as in COCO: `xywh` in px."""

    label: int
    bbox: list[float]
    difficult: bool = False


class AnnotatedImage(NamedTuple):
    """An image file, its (height, width) in px, and its objects."""

    file_name: str
    size: tuple[int, int]
    objects: list[Object]


def read_files(folder: Path, suffix: str) -> dict[Path, bytes]:
    """Return the content of every file in `folder` that ends in `suffix`, sorted by name.

    Raises:
        DataError: There is no such folder, or no such file in it.
    """
    advice = "set data.train.annotations and data.val.annotations, or data.format"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected a folder of {suffix} files; {advice}")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == suffix)
    if not files:
        raise DataError(f"{folder}: no {suffix} file in this folder; {advice}")
    return {file: file.read_bytes() for file in files}


def digest(files: Mapping[Path, bytes]) -> str:
    """Return the SHA-256 of the files' names and contents."""
    total = hashlib.sha256()
    for file, content in files.items():
        total.update(f"{file.name}\n{len(content)}\n".encode() + content)
    return total.hexdigest()


def _annotations(
    images: Sequence[AnnotatedImage], classes: Sequence[str], digest: str
) -> Annotations:
    """Return `images` with ids that count from 1, and areas of boxes.

    Difficult objects are ignored like crowds: neither they nor detections of them count, as in
    VOC's own evaluation (VOCevaldet.m of its devkit). The one difference is that COCO measures the
    overlap with a crowd relative to the detection alone.
    """
    objects = [
        (number, label, bbox, bbox[2] * bbox[3], int(difficult))
        for number, image in enumerate(images)
        for label, bbox, difficult in image.objects
    ]
    return Annotations(
        image_ids=list(range(1, len(images) + 1)),
        file_names=[image.file_name for image in images],
        sizes=np.array([image.size for image in images]),
        categories=list(enumerate(classes, start=1)),
        objects=np.array(objects, dtype=OBJECT),
        digest=digest,
    )


class _VocObject(NamedTuple):
    """An object before its label is known, with its box as in COCO: `xywh` in px."""

    name: str
    bbox: list[float]
    difficult: bool


class _VocFile(NamedTuple):
    """The content of an XML file: the image's file name, its (height, width) in px, its objects."""

    path: Path
    image: str
    size: tuple[int, int]
    objects: list[_VocObject]


def read_voc(split: SplitConfig, classes: Sequence[str] | None) -> Annotations:
    """Return VOC annotations.

    Args:
        split: The folders of images and of XML files.
        classes: Names in the order of labels. If None, the sorted names in the annotations.

    Raises:
        DataError: The annotations cannot be used.
    """
    files = read_files(Path(split.annotations), ".xml")
    folder, faults = Path(split.images), Faults()
    images = [file.name for file in list_images(folder)]
    present = {composed(PurePath(name).stem): name for name in images}
    present |= {composed(name): name for name in images}
    parsed: list[_VocFile] = []
    by_image: dict[str, Path] = {}
    for path, content in files.items():
        with faults.collected():
            file = _read_voc_file(path, content, folder, present, faults)
            other = by_image.setdefault(file.image, path)
            if other != path:
                raise DataError(
                    f"{path}: '{file.image}' is the image of {other} too; correct a <filename>"
                )
            parsed.append(file)
    faults.report()
    if classes is None:
        classes = sorted({item.name for file in parsed for item in file.objects})
    annotated = [
        AnnotatedImage(file.image, file.size, _label(file, classes, faults)) for file in parsed
    ]
    faults.report()
    return _annotations(annotated, classes, digest(files))


def _read_voc_file(
    path: Path, content: bytes, folder: Path, present: Mapping[str, str], faults: Faults
) -> _VocFile:
    root = _parse(path, content)
    image = _image(path, root, folder, present)
    objects = []
    for number, element in enumerate(root.findall("object"), start=1):
        with faults.collected():
            objects.append(_voc_object(element, f"{path}: object {number}"))
    return _VocFile(path, image, _size(path, root, folder / image), objects)


class _Builder(ElementTree.TreeBuilder):
    """A builder that refuses document types, and with them entities, which may expand forever."""

    def doctype(self, *_: object) -> Never:
        raise ElementTree.ParseError("declares a document type")


def _parse(file: Path, content: bytes) -> Element:
    try:
        root = ElementTree.XML(content, ElementTree.XMLParser(target=_Builder()))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(
            f"{file}: not readable as XML ({error}); expected a VOC <annotation> in UTF-8 "
            "without DOCTYPE; correct or remove it"
        ) from error
    if root.tag != "annotation":
        raise DataError(f"{file}: is a <{root.tag}>; expected a VOC <annotation>; remove it")
    return root


def _image(file: Path, root: Element, folder: Path, present: Mapping[str, str]) -> str:
    """Return the file name of the image that an annotation file belongs to.

    Tools write <filename> with or without a folder and a suffix, or forget to update it when image
    and annotation file are renamed together.

    Args:
        file: The annotation file.
        root: Its content.
        folder: The folder of images.
        present: The images in that folder by file name and by stem.
    """
    named = PureWindowsPath(root.findtext("filename", "").strip()).name  # splits at / and at \
    name = present.get(composed(named)) or present.get(composed(file.stem))
    if name is None:
        hint = FileNames(folder).hint(named or file.stem)
        raise DataError(f"{file}: its image '{named or file.stem}' is missing in {folder}; {hint}")
    return name


def _voc_object(element: Element, what: str) -> _VocObject:
    name = (element.findtext("name") or "").strip()
    if not name:
        raise DataError(f"{what}: has no <name>; add it")
    what += f" ({name!r})"
    box = element.find("bndbox")
    if box is None:
        raise DataError(f"{what}: has no <bndbox>; add it")
    left, top, right, bottom = (_number(box, tag, what) for tag in ("xmin", "ymin", "xmax", "ymax"))
    if right < left or bottom < top:
        raise DataError(
            f"{what}: from ({left:g}, {top:g}) to ({right:g}, {bottom:g}); expected xmin <= xmax "
            "and ymin <= ymax; correct it"
        )
    # VOC's devkit counts pixels from 1 and includes the last one: a box from 1 to the image's width
    # covers the whole image, which is 0 to the width in coordinates.
    bbox = [left - 1, top - 1, right - left + 1, bottom - top + 1]
    return _VocObject(name, bbox, element.findtext("difficult", "0").strip() == "1")


def _size(file: Path, root: Element, image: Path) -> tuple[int, int]:
    """Return (height, width) from the annotation, or from the image if it is absent or zero."""
    size = root.find("size")
    if size is None:
        return image_size(image)
    height, width = (int(_number(size, tag, f"{file}: size")) for tag in ("height", "width"))
    return (height, width) if height > 0 and width > 0 else image_size(image)


def _number(element: Element, tag: str, what: str) -> float:
    text = element.findtext(tag)
    if text is None:
        raise DataError(f"{what}: has no <{tag}>; add it")
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not abs(number) < FARTHEST:
        raise DataError(f"{what}: <{tag}> is {text!r}; expected a number of px; correct it")
    return number


def _label(file: _VocFile, classes: Sequence[str], faults: Faults) -> list[Object]:
    labelled = []
    for number, (name, bbox, difficult) in enumerate(file.objects, start=1):
        with faults.collected():
            if name not in classes:
                near = difflib.get_close_matches(name, classes, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(classes)};"
                raise DataError(
                    f"{file.path}: object {number}: unknown class {name!r}; {hint} correct it, or "
                    "name all classes in data.classes"
                )
            labelled.append(Object(classes.index(name), bbox, difficult))
    return labelled


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
                for number, line in enumerate(_text(file, files[file]).splitlines(), start=1):
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
    return _annotations(images, classes, digest(files))


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
    return [name.strip() for name in _text(file, file.read_bytes()).strip().splitlines()]


def _names(file: Path) -> list[str]:
    try:
        content = load_yaml(_text(file, file.read_bytes()))
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
        raise DataError(f"{file}: not UTF-8 text ({error}); save it as UTF-8") from error
