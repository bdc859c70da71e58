"""Pascal VOC annotations: an XML file for every image."""

import difflib
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, NamedTuple, Never
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from gfl.config.schema import SplitConfig
from gfl.data.errors import DataError
from gfl.data.folders import AnnotatedImage, Object, coco_dictionary, digest, read_files
from gfl.data.images import image_size, list_images


class _VocObject(NamedTuple):
    """An object before classes are known; `bbox` as COCO has it."""

    name: str
    bbox: list[float]
    difficult: bool


class _File(NamedTuple):
    """What an XML file says of its image; `size` is (height, width) in px."""

    path: Path
    image: str
    size: tuple[int, int]
    objects: list[_VocObject]


def read_voc(split: SplitConfig, classes: Sequence[str] | None) -> tuple[dict[str, Any], str]:
    """Return VOC annotations as COCO's dictionary, and the SHA-256 of all files.

    Args:
        split: The folders of images and of XML files.
        classes: Names in the order of labels; None: those that the annotations use, sorted.

    Raises:
        DataError: annotations that cannot be used.
    """
    files = read_files(Path(split.annotations), ".xml")
    folder = Path(split.images)
    images = [file.name for file in list_images(folder)]
    present = {PurePath(name).stem: name for name in images} | {name: name for name in images}
    parsed = [_read(file, content, folder, present) for file, content in files.items()]
    by_image: dict[str, Path] = {}
    for file in parsed:
        if (other := by_image.setdefault(file.image, file.path)) != file.path:
            raise DataError(
                f"{file.path}: '{file.image}' is the image of {other} too; correct a <filename>"
            )
    if classes is None:
        classes = sorted({found.name for file in parsed for found in file.objects})
    annotated = [AnnotatedImage(file.image, file.size, _label(file, classes)) for file in parsed]
    return coco_dictionary(annotated, classes), digest(files)


def _read(path: Path, content: bytes, folder: Path, present: Mapping[str, str]) -> _File:
    root = _parse(path, content)
    image = _image(path, root, folder, present)
    elements = enumerate(root.findall("object"), start=1)
    objects = [_voc_object(element, f"{path}: object {number}") for number, element in elements]
    return _File(path, image, _size(path, root, folder / image), objects)


class _Builder(ElementTree.TreeBuilder):
    """Refuses document types, and with them entities, which may expand without end."""

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
    """Return the name of an annotation file's image; `present` has names and stems of all.

    Tools write <filename> with or without a folder and a suffix, or let it go stale where image and
    annotation file are renamed together.
    """
    wanted = PureWindowsPath(root.findtext("filename", "").strip()).name  # splits at / and at \
    name = present.get(wanted) or present.get(file.stem)
    if name is None:
        raise DataError(
            f"{file}: its image '{wanted or file.stem}' is missing in {folder}; add the image or "
            "remove the annotations"
        )
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
    # Pixels count from 1, the last one included (VOC devkit): a box from 1 to the image's width
    # covers it, which is 0 to the width in coordinates.
    bbox = [left - 1, top - 1, right - left + 1, bottom - top + 1]
    return _VocObject(name, bbox, element.findtext("difficult", "0").strip() == "1")


def _size(file: Path, root: Element, image: Path) -> tuple[int, int]:
    """Return (height, width) as annotated, else the image's; some tools write zeros."""
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
    if not isfinite(number):
        raise DataError(f"{what}: <{tag}> is {text!r}; expected a number of px; correct it")
    return number


def _label(file: _File, classes: Sequence[str]) -> list[Object]:
    labelled = []
    for number, (name, bbox, difficult) in enumerate(file.objects, start=1):
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(classes)};"
            raise DataError(
                f"{file.path}: object {number}: unknown class {name!r}; {hint} correct it, or name "
                "all classes in data.classes"
            )
        labelled.append(Object(classes.index(name), bbox, difficult))
    return labelled
