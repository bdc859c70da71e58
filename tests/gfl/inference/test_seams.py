"""A detector that has learned from tiles: nothing in its predictions shows where the tiles meet."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from gfl.checkpoint.files import About
from gfl.config.loader import derive
from gfl.data.dataset import collate
from gfl.data.split import load_splits
from gfl.inference.predictor import Model
from gfl.train.trainer import Trainer


def scene(generator, height, width, count):
    """Pixels with bright rectangles of 18 to 43 px that do not touch, and their boxes."""
    boxes = []
    for _ in range(200):
        w, h = generator.integers(18, 44, 2).tolist()
        x, y = int(generator.integers(0, width - w)), int(generator.integers(0, height - h))
        near = (
            x - 3 < b[2] and b[0] < x + w + 3 and y - 3 < b[3] and b[1] < y + h + 3 for b in boxes
        )
        if len(boxes) < count and not any(near):
            boxes.append([x, y, x + w, y + h])
    pixels = generator.normal(90, 12, (height, width, 3))
    for x1, y1, x2, y2 in boxes:
        pixels[y1:y2, x1:x2] += generator.integers(60, 140, 3)
    return pixels.clip(0, 255).astype(np.uint8), boxes


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    content = {"images": [], "categories": [{"id": 1, "name": "box"}], "annotations": []}
    for number in range(12):
        pixels, boxes = scene(generator, 192, 192, 14)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png"})
        for x1, y1, x2, y2 in boxes:
            entry = {"image_id": number, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            content["annotations"].append({"id": len(content["annotations"]) + 1, **entry})
    (folder / "annotations.json").write_text(json.dumps(content))
    part = f"{{images: {folder}, annotations: {folder}/annotations.json}}"
    config = derive(
        type(tiny), tiny,
        [f"data={{train: {part}, val: {part}, tiles: {{size: 64, overlap: 40}}}}",
         "model.num_classes=1", "schedule.epochs=4", "optim={lr: 2e-3, lr_batch: 8}"],
    )  # fmt: skip
    trainer = Trainer(config, load_splits(config)[0], torch.device("cpu"))
    trainer.parallel.train()
    for keys in trainer.batches:
        trainer.train_step(collate([trainer.dataset[key] for key in keys]))
    return Model(trainer.model, About(["box"], [1], 0, 0, {}), "cpu")


@pytest.mark.slow
def test_objects_on_borders_are_found_once(model):
    """Most objects lie on a border of one of the 45 tiles; merging finds nearly all, once."""
    generator = np.random.default_rng(5)
    objects = found = missed = wrong = 0
    for _ in range(20):
        pixels, boxes = scene(generator, 160, 320, 20)
        (detections,) = model.predict(pixels, min_score=0.3, batch=8)
        overlaps = box_iou(detections.boxes, torch.tensor(boxes).float())
        objects, found = objects + len(boxes), found + len(detections)
        missed += int((overlaps.amax(dim=0) < 0.5).sum())
        wrong += int((overlaps.amax(dim=1) < 0.5).sum())
    assert objects > 300
    assert missed <= 0.03 * objects
    assert wrong <= 0.06 * objects
    assert abs(found - objects) <= 0.08 * objects
