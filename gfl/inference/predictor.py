"""A trained model and its use: `gfl.load(folder).predict(images)`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.ops import batched_nms

from gfl.checkpoint.files import About
from gfl.checkpoint.snapshot import load_checkpoint
from gfl.config.schema import Config
from gfl.data.dataset import Sample, as_sample, build_transforms, collate
from gfl.data.images import list_images, pixels_of, read_image
from gfl.inference.detections import Detections
from gfl.model.detector import Detector, folded, place
from gfl.structures import Predictions

ImageLike: TypeAlias = str | Path | bytes | NDArray[np.uint8] | Tensor | Image.Image
"""A file, its content, or RGB pixels: (H, W, 3) as an array, (3, H, W) as a tensor, both uint8."""

WAITING = 8
"""Batches of images that wait for others of their size."""


class Model:
    """A detector with all that is needed to use it on images.

    Attributes:
        detector: In evaluation mode.
        about: What its checkpoint says: class names, metrics.
    """

    def __init__(
        self, detector: Detector, about: About, device: torch.device | str | None = None
    ) -> None:
        """Take a detector to `device`, by default the first GPU if there is one."""
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.detector = place(detector.eval(), torch.device(chosen))
        self.about = about
        self._predictor = folded(self.detector)

    @property
    def config(self) -> Config:
        """The configuration it was trained with, or that it was loaded with."""
        return self.detector.config

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        batch: int = 1,
        min_score: float = 0.0,
        flip: bool = False,
        scales: Sequence[float] = (1.0,),
        progress: Callable[[int], None] | None = None,
    ) -> list[Detections]:
        """Return what is found in each image, in their order.

        Args:
            images: One image, several, or a folder; an iterator's are not held longer than needed.
            batch: Images a forward pass. Only those of one size share one, so that a batch changes
                no more than rounding.
            min_score: Detections below are left out; `postprocess.score_threshold` already is.
            flip: Look at each image mirrored, too, and merge (test-time augmentation).
            scales: Look at each image at these multiples of its usual size, and merge.
            progress: Is told after every pass how many images are done.

        Raises:
            DataError: a file that is missing or no image.
            ValueError: pixels of another form.
        """
        if batch < 1 or not scales or min(scales) <= 0:
            raise ValueError(f"batch {batch}, scales {list(scales)}: expected positive numbers")
        sources: list[str] = []
        found: dict[int, Detections] = {}
        for places, pixels in _batches(_noted(_listed(images), sources), batch):
            for number, seen in zip(places, self._look(pixels, flip, scales), strict=True):
                found[number] = Detections(
                    source=sources[number],
                    size=(pixels[0].shape[1], pixels[0].shape[2]),
                    predictions=seen.select(seen.scores >= min_score),
                    classes=self.about.classes,
                    category_ids=self.about.category_ids,
                )
            if progress is not None:
                progress(len(found))
        return [found[number] for number in range(len(found))]

    def _look(self, images: list[Tensor], flip: bool, scales: Sequence[float]) -> list[Predictions]:
        """Return the merged detections of images (3, H, W) of one size, in every way asked for."""
        looks = [self._pass(images, scale) for scale in scales]
        if flip:
            width = images[0].shape[2]
            mirrored = [image.flip(2) for image in images]
            for scale in scales:
                looks.append([_mirror(seen, width) for seen in self._pass(mirrored, scale)])
        return [self._merge(seen) for seen in zip(*looks, strict=True)]

    def _pass(self, images: list[Tensor], scale: float) -> list[Predictions]:
        data = self.config.data
        sides = {key: round(getattr(data, key) * scale) for key in ("short_side", "long_side")}
        transforms = build_transforms(data.model_copy(update=sides), training=False)
        no_boxes, no_labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
        samples = []
        for pixels in images:
            resized, _ = transforms(*as_sample(pixels, no_boxes))
            size = (pixels.shape[1], pixels.shape[2])
            samples.append(Sample(resized.as_subclass(Tensor), no_boxes, no_labels, 0, size))
        batch = collate(samples).to(self.detector.pixel_mean.device)
        sizes = batch.targets.sizes
        inputs = self.detector.normalize(batch.pixels, sizes)
        return [seen.cpu() for seen in self._predictor.predict(inputs, sizes, batch.original_sizes)]

    def _merge(self, looks: Sequence[Predictions]) -> Predictions:
        """Return the detections of several looks at one image, suppressed together."""
        if len(looks) == 1:
            return looks[0]
        names = [field.name for field in fields(Predictions)]
        together = Predictions(*(torch.cat([getattr(s, n) for s in looks]) for n in names))
        settings = self.config.postprocess
        keep = batched_nms(together.boxes, together.scores, together.labels, settings.nms_iou)
        return together.select(keep[: settings.detections_per_image])


def load(
    folder: str | Path, config: Config | None = None, device: torch.device | str | None = None
) -> Model:
    """Return the model of a checkpoint folder; nothing in it is unpickled.

    Args:
        folder: The checkpoint.
        config: In place of the one it was trained with: other thresholds or image sizes, say.
        device: By default the first GPU if there is one.

    Raises:
        ValueError: a folder that is no checkpoint, a damaged one, a `config` of another model.
    """
    return Model(*load_checkpoint(Path(folder), config), device)


def image_files(paths: Sequence[Path]) -> list[Path]:
    """Return the image files among `paths` and in the folders among them, sorted.

    Raises:
        ValueError: a path that does not exist, or a folder without images.
    """
    files = []
    for path in paths:
        if path.is_dir():
            files += list_images(path)
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path}: no such image or folder")
    return files


def _listed(images: ImageLike | Iterable[ImageLike]) -> Iterable[ImageLike]:
    if isinstance(images, str | Path):
        return image_files([Path(images)])
    single = bytes | np.ndarray | Tensor | Image.Image
    if isinstance(images, single):
        stacked = isinstance(images, np.ndarray | Tensor) and images.ndim == 4
        return images if stacked else [images]
    return images


def _noted(images: Iterable[ImageLike], sources: list[str]) -> Iterator[ImageLike]:
    """Give images one after the other; `sources` gets the path of each, "" of one without."""
    for image in images:
        sources.append(str(image) if isinstance(image, str | Path) else "")
        yield image


def _batches(images: Iterable[ImageLike], batch: int) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Give places in `images` and pixels (3, H, W) of one size each, up to `batch` together.

    No more than `WAITING` batches of pixels are held at once, whatever the number of sizes.
    """
    waiting: dict[tuple[int, ...], tuple[list[int], list[Tensor]]] = {}
    for number, image in enumerate(images):
        pixels = _pixels(image)
        size = tuple(pixels.shape)
        places, together = waiting.setdefault(size, ([], []))
        places.append(number)
        together.append(pixels)
        if len(places) == batch:
            yield waiting.pop(size)
        elif sum(len(places) for places, _ in waiting.values()) == WAITING * batch:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size][0])))
    yield from waiting.values()


def _pixels(image: Any) -> Tensor:
    """Return RGB pixels (3, H, W), uint8."""
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, bytes | Image.Image):
        return pixels_of(image)
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] == 3:
        image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    colours = isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] == 3
    if colours and image.dtype == torch.uint8 and image.numel():
        return image.cpu()
    form = f" {image.dtype} {tuple(image.shape)}" if hasattr(image, "dtype") else ""
    raise ValueError(
        f"image: got {type(image).__name__}{form}; expected a path, bytes, a PIL image, or RGB "
        "pixels in uint8: an array (H, W, 3) or a tensor (3, H, W)"
    )


def _mirror(found: Predictions, width: int) -> Predictions:
    """Return the detections of a mirrored image as they lie in the image itself."""
    x1, y1, x2, y2 = found.boxes.unbind(1)
    swapped = [2, 1, 0, 3]
    return Predictions(
        boxes=torch.stack([width - x2, y1, width - x1, y2], dim=1),
        scores=found.scores,
        labels=found.labels,
        edge_std=found.edge_std[:, swapped],
        distributions=found.distributions[:, swapped],
    )
