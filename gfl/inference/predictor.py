"""Prediction with a trained model: `gfl.load(folder).predict(images)`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
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
from gfl.config.loader import derive
from gfl.config.schema import Config, TilesConfig
from gfl.data.augment import as_sample
from gfl.data.dataset import Sample, build_transforms, collate, cut_window
from gfl.data.images import list_images, pixels_of, read_image
from gfl.data.tiles import windows
from gfl.inference.detections import Detections
from gfl.model.detector import Detector, folded, place
from gfl.model.tile_merge import merge_tiles
from gfl.structures import Predictions, concatenated

ImageLike: TypeAlias = str | Path | bytes | NDArray[np.uint8] | Tensor | Image.Image
"""A file, its content, or RGB pixels: (H, W, 3) as an array, (3, H, W) as a tensor, both uint8."""

Tiles: TypeAlias = bool | tuple[int, int]
"""(size, overlap) of tiles in px; True for those of the configuration, False for whole images."""

WAITING = 8
"""Largest number of batches of images that wait for others of their size."""


class Model:
    """A detector with everything needed to use it on images.

    Attributes:
        detector: The detector, in evaluation mode.
        about: Facts from its checkpoint, such as class names and metrics.
    """

    def __init__(
        self, detector: Detector, about: About, device: torch.device | str | None = None
    ) -> None:
        """Move a detector to `device`, by default the first GPU if there is one."""
        place_on = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.detector = place(detector.eval(), torch.device(place_on))
        self.about = about
        self._predictor = folded(self.detector)

    @property
    def config(self) -> Config:
        """Configuration of the detector's training, or the one it was loaded with."""
        return self.detector.config

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        batch: int = 1,
        min_score: float = 0.0,
        flip: bool = False,
        scales: Sequence[float] = (1.0,),
        tiles: Tiles = True,
    ) -> list[Detections]:
        """Return the detections of each image, in the order of the images; see `stream`."""
        stream = self.stream(
            images, batch=batch, min_score=min_score, flip=flip, scales=scales, tiles=tiles
        )
        return list(stream)

    def stream(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        batch: int = 1,
        min_score: float = 0.0,
        flip: bool = False,
        scales: Sequence[float] = (1.0,),
        tiles: Tiles = True,
    ) -> Iterator[Detections]:
        """Yield the detections of each image, in the order of the images.

        Whatever the number of images, the pixels and detections of `WAITING` batches are in memory.

        Args:
            images: One image, several images, or a folder. Images of an iterator are released as
                soon as possible.
            batch: Images or tiles per forward pass. Only images of one size share a pass, so the
                results differ from those of single images by rounding alone.
            min_score: Smallest score of a detection, in addition to `postprocess.score_threshold`.
            flip: Whether to detect in the mirrored image, too, and merge (test-time augmentation).
            scales: Multiples of an image's usual size at which to detect, and to merge.
            tiles: (size, overlap) in px of tiles in which to detect, and to merge. True stands for
                `data.tiles` of the configuration, if it has tiles; False for whole images.

        Raises:
            DataError: A file is missing or is no image.
            ValueError: An image has an unexpected form, or tiles do.
        """
        if batch < 1 or not scales or min(scales) <= 0:
            raise ValueError(
                f"batch {batch!r}, scales {list(scales)!r}: expected a positive batch and at least "
                "one scale, all positive"
            )
        grid = _grid(tiles, self.config)
        detect = partial(self._detect, flip=flip, scales=scales)
        sources: dict[int, str] = {}
        ready: dict[int, Detections] = {}
        following = 0
        together = 1 if grid else batch  # a batch of tiles comes from one image
        for places, pixels in _batches(_noted(_listed(images), sources), together):
            if grid is None:
                found = detect(pixels)
            else:
                found = [self._detect_tiles(pixels[0], grid, batch, detect)]
            for number, predictions in zip(places, found, strict=True):
                ready[number] = Detections(
                    source=sources.pop(number),
                    size=(pixels[0].shape[1], pixels[0].shape[2]),
                    predictions=predictions.select(predictions.scores >= min_score),
                    classes=self.about.classes,
                    category_ids=self.about.category_ids,
                )
            del pixels
            while following in ready:
                yield ready.pop(following)
                following += 1

    def _detect_tiles(
        self,
        image: Tensor,
        grid: TilesConfig,
        batch: int,
        detect: Callable[[list[Tensor]], list[Predictions]],
    ) -> Predictions:
        """Return the detections in an image (3, H, W), merged from those in its tiles."""
        size = (image.shape[1], image.shape[2])
        of_image = windows(*size, grid)
        found: list[Predictions] = []
        for start in range(0, len(of_image), batch):
            places = of_image[start : start + batch].tolist()
            found += detect([cut_window(image, place) for place in places])
        settings = self.config.postprocess
        return merge_tiles(found, torch.from_numpy(of_image), size, settings)

    def _detect(
        self, images: list[Tensor], flip: bool, scales: Sequence[float]
    ) -> list[Predictions]:
        """Return the detections in images (3, H, W) of one size, merged over scales and flips."""
        views = [self._detect_at(images, scale) for scale in scales]
        if flip:
            width = images[0].shape[2]
            mirrored = [image.flip(2) for image in images]
            for scale in scales:
                views.append(
                    [
                        _mirror(predictions, width)
                        for predictions in self._detect_at(mirrored, scale)
                    ]
                )
        return [self._merge(of_image) for of_image in zip(*views, strict=True)]

    def _detect_at(self, images: list[Tensor], scale: float) -> list[Predictions]:
        """Return the detections in images (3, H, W) at a multiple of their usual size."""
        data = self.config.data
        sides = {key: round(getattr(data, key) * scale) for key in ("short_side", "long_side")}
        transforms = build_transforms(data.model_copy(update=sides))
        no_boxes, no_labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
        samples = []
        for pixels in images:
            resized, _ = transforms(*as_sample(pixels, no_boxes))
            size = (pixels.shape[1], pixels.shape[2])
            samples.append(Sample(resized.as_subclass(Tensor), no_boxes, no_labels, 0, size))
        batch = collate(samples).to(self.detector.pixel_mean.device)
        sizes = batch.targets.sizes
        inputs = self.detector.normalize(batch.pixels, sizes)
        predictions = self._predictor.predict(inputs, sizes, batch.original_sizes)
        return [of_image.cpu() for of_image in predictions]

    def _merge(self, views: Sequence[Predictions]) -> Predictions:
        """Return the detections in several views of one image after NMS over all of them."""
        if len(views) == 1:
            return views[0]
        together = concatenated(views)
        settings = self.config.postprocess
        keep = batched_nms(together.boxes, together.scores, together.labels, settings.nms_iou)
        return together.select(keep[: settings.detections_per_image])


def _grid(tiles: Tiles, config: Config) -> TilesConfig | None:
    """Return the tiles that `tiles` asks for; None for whole images."""
    if isinstance(tiles, bool):
        return config.data.tiles if tiles else None
    if not isinstance(tiles, Sequence) or len(tiles) != 2:
        raise ValueError(f"tiles: got {tiles!r}; expected (size, overlap) in px, True or False")
    size, overlap = tiles
    changes = [f"data.tiles.size={size}", f"data.tiles.overlap={overlap}"]
    return derive(Config, Config(), changes, "tiles").data.tiles


def load(
    folder: str | Path, config: Config | None = None, device: torch.device | str | None = None
) -> Model:
    """Return the model of a checkpoint folder; nothing in it is unpickled.

    Args:
        folder: The checkpoint.
        config: Replaces the configuration of its training, for example by other thresholds.
        device: Device of the model, by default the first GPU if there is one.

    Raises:
        ValueError: The folder is no checkpoint, is damaged, or has another model than `config`.
    """
    return Model(*load_checkpoint(Path(folder), config), device)


def image_files(paths: Sequence[Path]) -> list[Path]:
    """Return the image files among `paths` and in the folders among them, sorted.

    Raises:
        ValueError: A path does not exist, or a folder has no images.
    """
    files = []
    for path in paths:
        if path.is_dir():
            files += list_images(path)
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path}: no such image or folder; expected an image file or a folder")
    return files


def _listed(images: ImageLike | Iterable[ImageLike]) -> Iterable[ImageLike]:
    """Return one image, several images or a folder as several images."""
    if isinstance(images, str | Path):
        return image_files([Path(images)])
    single = bytes | np.ndarray | Tensor | Image.Image
    if isinstance(images, single):
        stacked = isinstance(images, np.ndarray | Tensor) and images.ndim == 4
        return images if stacked else [images]
    return images


def _noted(images: Iterable[ImageLike], sources: dict[int, str]) -> Iterator[ImageLike]:
    """Yield the images and note the path of each in `sources`, "" for one without a path."""
    for number, image in enumerate(images):
        sources[number] = str(image) if isinstance(image, str | Path) else ""
        yield image


def _batches(images: Iterable[ImageLike], batch: int) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Yield batches of images of one size: their places in `images`, and pixels (3, H, W).

    At most `WAITING` batches of pixels are in memory, whatever the number of sizes, and no image
    waits until more images than that have come after it.
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
        oldest = next(iter(waiting), size)
        if oldest in waiting and number - waiting[oldest][0][0] >= WAITING * batch:
            yield waiting.pop(oldest)
    yield from waiting.values()


def _pixels(image: Any) -> Tensor:
    """Return the RGB pixels (3, H, W), uint8, of an image in any form."""
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


def _mirror(mirrored: Predictions, width: int) -> Predictions:
    """Return the detections in a mirrored image at their places in the image itself."""
    x1, y1, x2, y2 = mirrored.boxes.unbind(1)
    swapped = [2, 1, 0, 3]
    return Predictions(
        boxes=torch.stack([width - x2, y1, width - x1, y2], dim=1),
        scores=mirrored.scores,
        labels=mirrored.labels,
        edge_std=mirrored.edge_std[:, swapped],
        distributions=mirrored.distributions[:, swapped],
    )
