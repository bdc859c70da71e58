"""Annotated images, written in each of the formats."""

import json
from xml.sax.saxutils import escape

from PIL import Image

from gfl.config.schema import DataConfig, SplitConfig
from gfl.data.split import read_split

CLASSES = ("cat", "dog", "hot dog")
FORMATS = ("coco", "voc", "yolo")
SIZES = ((64, 48), (40, 90), (100, 100))
"""(width, height) of the images that are written."""


def write_coco(folder, pictures):
    images, annotations = [], []
    for number, (name, (width, height), objects) in enumerate(pictures, start=1):
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for label, (x0, y0, x1, y1) in objects:
            identity = {"id": len(annotations) + 1, "image_id": number, "category_id": label + 1}
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
            annotations.append(identity | box | {"iscrowd": 0})
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations").write_text(json.dumps(content))


def voc_object(name, box, **more):
    x0, y0, x1, y1 = box
    values = {"xmin": x0 + 1, "ymin": y0 + 1, "xmax": x1, "ymax": y1}
    corners = "".join(f"<{tag}>{value}</{tag}>" for tag, value in values.items())
    extra = "".join(f"<{tag}>{value}</{tag}>" for tag, value in more.items())
    return f"<object><name>{escape(name)}</name>{extra}<bndbox>{corners}</bndbox></object>"


def write_voc(folder, pictures):
    (folder / "annotations").mkdir()
    for name, (width, height), objects in pictures:
        listed = "".join(voc_object(CLASSES[label], box) for label, box in objects)
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{name}</filename>{size}{listed}</annotation>"
        (folder / "annotations" / name).with_suffix(".xml").write_text(text)


def write_yolo(folder, pictures):
    (folder / "annotations").mkdir()
    for name, (width, height), objects in pictures:
        lines = [
            f"{label} {(x0 + x1) / 2 / width:.6f} {(y0 + y1) / 2 / height:.6f} "
            f"{(x1 - x0) / width:.6f} {(y1 - y0) / height:.6f}\n"
            for label, (x0, y0, x1, y1) in objects
        ]
        (folder / "annotations" / name).with_suffix(".txt").write_text("".join(lines))


WRITERS = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo}


def write(folder, form, pictures):
    (folder / "images").mkdir(parents=True)
    for name, size, _ in pictures:
        Image.new("RGB", size).save(folder / "images" / name)
    WRITERS[form](folder, pictures)
    return SplitConfig(images=str(folder / "images"), annotations=str(folder / "annotations"))


def read(section, form, which="train", classes=CLASSES, count=None, known=None):
    data = DataConfig(format=form, classes=classes, train=section, val=section)
    return read_split(data, which, len(CLASSES) if count is None else count, known)


PICTURES = [
    ("a.jpg", SIZES[0], [(0, (4, 6, 40, 30)), (2, (0, 0, 64, 48))]),
    ("b.jpg", SIZES[1], [(1, (10, 20, 39, 80))]),
    ("c.jpg", SIZES[2], []),
]
"""(name, size, objects: (label, box in px)) of images."""
