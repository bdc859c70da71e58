"""Annotations in Pascal VOC's XML, one file an image."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath, PureWindowsPath
from typing import NamedTuple, Never
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from gfl.config.schema import SplitConfig
from gfl.data.annotations import FARTHEST, Annotations
from gfl.data.faults import Faults
from gfl.data.image_files import (
    AnnotatedImage,
    Object,
    annotations_of_images,
    digest_files,
    read_files,
)
from gfl.data.images import FileNames, composed, image_size, list_images
from gfl.errors import DataError


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
    return annotations_of_images(annotated, classes, digest_files(files))


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
