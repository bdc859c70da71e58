"""Post-processing of logits to detections: top-k per level, decoding, clipping, NMS per class.

Shapes: B images, N detections, R bins (`ModelConfig.bins`), K candidates of an image over all
levels, P locations.
"""

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from gfl.config.schema import PostprocessConfig
from gfl.model.boxes import Points, ltrb_to_xyxy
from gfl.model.head import Dirac, Integral
from gfl.structures import Predictions


def postprocess(
    cls_logits: list[Tensor],
    reg_logits: list[Tensor],
    points: Points,
    integral: Integral | Dirac,
    sizes: Tensor,
    original_sizes: Tensor,
    config: PostprocessConfig,
    centerness_logits: list[Tensor] | None = None,
) -> list[Predictions]:
    """Return the detections of every image.

    Candidates are the (location, class) pairs of the highest class scores above the threshold. A
    model with centerness then ranks them by class score times centerness, as ATSS in MMDetection.

    Args:
        cls_logits: Class logits per level, (B, H_l * W_l, C).
        reg_logits: Edge logits per level, (B, H_l * W_l, 4 * R).
        points: The locations of these levels.
        integral: Decoder of the edge logits.
        sizes: (height, width) of every network input without its padding, (B, 2).
        original_sizes: (height, width) of the images that boxes are returned for, (B, 2).
        config: Thresholds and counts.
        centerness_logits: Centerness logits per level, (B, H_l * W_l, 1), if the model has them.
    """
    scores, labels, location = _candidates(cls_logits, config.candidates_per_level)
    logits = torch.cat(reg_logits, dim=1)
    logits = logits.gather(1, location.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
    boxes, edge_std, distributions = decode(
        logits, points.xy[location], points.stride[location], integral
    )  # (B, K, 4), (B, K, 4), (B, K, 4, R)
    limit = sizes.flip(-1).repeat(1, 2).unsqueeze(1)  # (B, 1, 4) as x, y, x, y
    rescale = (original_sizes / sizes).flip(-1).repeat(1, 2).unsqueeze(1)
    boxes = boxes.clamp(min=0).minimum(limit) * rescale
    edge_std = edge_std * rescale
    filled = ((boxes[..., 2:] - boxes[..., :2]) > 0).all(dim=-1)
    keep = filled & (scores > config.score_threshold)
    if centerness_logits is not None:
        centerness = torch.cat(centerness_logits, dim=1).squeeze(-1).float().sigmoid()  # (B, P)
        scores = scores * centerness.gather(1, location)
    return [
        _suppress(Predictions(*fields).select(mask), config)
        for mask, *fields in zip(keep, boxes, scores, labels, edge_std, distributions, strict=True)
    ]


def decode(
    logits: Tensor, xy: Tensor, stride: Tensor, integral: Integral | Dirac
) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes, standard deviations of their edges, and distributions of some locations.

    Boxes (..., 4) are `xyxy` in px of the network's input, not clipped to the image; standard
    deviations (..., 4) are in px too; distributions are (..., 4, R).

    Args:
        logits: Logits of edges, (..., 4 * R).
        xy: Positions of the locations in px, (..., 2).
        stride: Strides of their levels in px, (..., 1).
        integral: Turns the logits into distances in strides.
    """
    mean, std, distributions = integral.describe(logits)
    return ltrb_to_xyxy(xy, mean * stride), std * stride, distributions


def _candidates(cls_logits: list[Tensor], per_level: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return score, class and location, (B, K) each, of the best (location, class) per level."""
    scores, labels, locations, start = [], [], [], 0
    for logits in cls_logits:
        _, count, classes = logits.shape
        level = logits.float().sigmoid().flatten(1)
        score, index = level.topk(min(per_level, level.shape[1]), dim=1)
        scores.append(score)
        labels.append(index % classes)
        locations.append(index // classes + start)
        start += count
    return torch.cat(scores, dim=1), torch.cat(labels, dim=1), torch.cat(locations, dim=1)


def _suppress(predictions: Predictions, config: PostprocessConfig) -> Predictions:
    """Return the best detections of an image after NMS within every class."""
    keep = batched_nms(predictions.boxes, predictions.scores, predictions.labels, config.nms_iou)
    return predictions.select(keep[: config.detections_per_image])
