"""Detections of an image from those of its tiles.

A tile cuts objects on its borders, so an object may be found in several tiles and whole in none.
Detections of one object in different tiles merge edge by edge: each edge comes from the tile whose
learned distribution is surest about it, and an edge on a border that cuts the image is not trusted.

Shapes: T tiles, N detections of an image in all tiles, F and S detections in a pair of tiles.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from gfl.config.schema import PostprocessConfig
from gfl.model.boxes import box_area, box_iou
from gfl.structures import Predictions, concatenated

SAME_OBJECT = 0.5
"""Smallest IoU, within the part that two tiles share, of two detections of one object."""

PIECE = 0.5
"""Share of a cut box above which it is a piece of the better box that covers it."""

ABOUT_BEST = 0.9
"""Share of the best score above which a detection has a say in an edge.

Scores learn the IoU of boxes, so a detection with a much lower one is worse as a whole, however
sure it is of an edge.
"""

BORDER_PX = 4.0
"""Distance from a border of the tile, besides the edge's standard deviation, of a cut edge."""


@dataclass(frozen=True)
class _Found:
    """The detections in all tiles of an image.

    Attributes:
        all: The detections in px of the image, N.
        tile: Tile of each detection, (N,).
        windows: Window of each tile, `xyxy` in px of the image, (T, 4).
        cut: Which edges lie on a border of their tile that is none of the image, (N, 4).
    """

    all: Predictions
    tile: Tensor
    windows: Tensor
    cut: Tensor


def merge_tiles(
    tiles: Sequence[Predictions],
    windows: Tensor,
    size: tuple[int, int],
    settings: PostprocessConfig,
) -> Predictions:
    """Return the detections of an image, best first.

    Args:
        tiles: The detections of every tile in px of the tile, T, in the host's memory.
        windows: The windows of the tiles, `xyxy` in px of the image, (T, 4).
        size: (height, width) of the image in px.
        settings: IoU of NMS and largest number of detections.
    """
    if len(tiles) == 1:
        return tiles[0]
    found = _in_image(tiles, windows.float(), size)
    same: list[tuple[int, int]] = []
    is_piece = torch.zeros(len(found.tile), dtype=torch.bool)
    for first, second in _neighbours(found):
        same += _matches(found, first, second).tolist()
        is_piece[_pieces(found, first, second)] = True
    groups = _connected(same)
    grouped = [member for group in groups for member in group]
    alone = ~is_piece
    alone[grouped] = False
    kept = concatenated([found.all.select(alone), *(_merged(found, group) for group in groups)])
    keep = batched_nms(kept.boxes, kept.scores, kept.labels, settings.nms_iou)
    return kept.select(keep[: settings.detections_per_image])


def _in_image(tiles: Sequence[Predictions], windows: Tensor, size: tuple[int, int]) -> _Found:
    corners = windows[:, :2].repeat(1, 2)  # (T, 4)
    placed = [replace(p, boxes=p.boxes + at) for p, at in zip(tiles, corners, strict=True)]
    everything = concatenated(placed)
    tile = torch.repeat_interleave(torch.tensor([len(of_tile) for of_tile in tiles]))
    height, width = size
    inner = windows != torch.tensor([0.0, 0.0, width, height])
    distance = (everything.boxes - windows[tile]).abs()
    cut = inner[tile] & (distance <= everything.edge_std + BORDER_PX)
    return _Found(everything, tile, windows, cut)


def _neighbours(found: _Found) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the detections of every two tiles that overlap, as indices (F,) and (S,).

    They are those that reach into the other tile.
    """
    boxes, windows = found.all.boxes, found.windows
    members = [(found.tile == tile).nonzero().flatten() for tile in range(len(windows))]
    for one, other in (_intersections(windows, windows) > 0).triu(diagonal=1).nonzero().tolist():
        first, second = members[one], members[other]
        first = first[box_area(_clipped(boxes[first], windows[other])) > 0]
        second = second[box_area(_clipped(boxes[second], windows[one])) > 0]
        if len(first) and len(second):
            yield first, second


def _matches(found: _Found, first: Tensor, second: Tensor) -> Tensor:
    """Return the pairs of detections of one object in two tiles, as indices, (pairs, 2).

    At least one of a pair is cut. Both tiles see the part that they share, so there the boxes of an
    object agree, however much of it lies beyond. A detection has at most one partner: each is the
    other's best by scores and agreement.
    """
    boxes, scores, labels = found.all.boxes, found.all.scores, found.all.labels
    one = _clipped(boxes[first], found.windows[found.tile[second[0]]])
    other = _clipped(boxes[second], found.windows[found.tile[first[0]]])
    iou = box_iou(one[:, None], other)  # (F, S)
    is_cut = found.cut.any(dim=1)
    possible = (
        (iou >= SAME_OBJECT)
        & (labels[first][:, None] == labels[second])
        & (is_cut[first][:, None] | is_cut[second])
    )
    quality = iou * scores[first][:, None] * scores[second] * possible
    best, partner = quality.max(dim=1)
    mutual = (best > 0) & (quality.argmax(dim=0)[partner] == torch.arange(len(first)))
    return torch.stack([first[mutual], second[partner[mutual]]], dim=1)


def _pieces(found: _Found, first: Tensor, second: Tensor) -> Tensor:
    """Return the cut detections that a better one of the other tile mostly covers, as indices."""
    boxes, scores, labels = found.all.boxes, found.all.scores, found.all.labels
    pieces = []
    for small, large in ((first, second), (second, first)):
        covered = _intersections(boxes[small], boxes[large]) / box_area(boxes[small])[:, None]
        better = scores[large] > scores[small][:, None]
        same_class = labels[large] == labels[small][:, None]
        explained = ((covered > PIECE) & better & same_class).any(dim=1)
        pieces.append(small[explained & found.cut[small].any(dim=1)])
    return torch.cat(pieces)


def _connected(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return the groups of detections that pairs connect, each in ascending order."""
    group_of: dict[int, list[int]] = {}
    for pair in pairs:
        one, other = (group_of.setdefault(member, [member]) for member in pair)
        if one is not other:
            one += other
            group_of.update(dict.fromkeys(other, one))
    groups = {id(group): group for group in group_of.values()}
    return [sorted(group) for group in groups.values()]


def _merged(found: _Found, group: Sequence[int]) -> Predictions:
    """Return the object that a group of detections shows, N = 1."""
    members = torch.tensor(group)
    best = members[found.all.scores[members].argmax()]
    edges, sides = _surest_edges(found, members), torch.arange(4)
    box = found.all.boxes[edges, sides]
    if (box[2:] <= box[:2]).any():  # edges from far ends of a chain may contradict each other
        edges = best.repeat(4)
    return Predictions(
        boxes=found.all.boxes[edges, sides][None],
        scores=found.all.scores[best, None],
        labels=found.all.labels[best, None],
        edge_std=found.all.edge_std[edges, sides][None],
        distributions=found.all.distributions[edges, sides][None],
    )


def _surest_edges(found: _Found, members: Tensor) -> Tensor:
    """Return the members from which the edges of their object are taken, (4,).

    An edge comes from the detection with the smallest standard deviation of it among those that do
    not cut it, and whose score is about the best of these. Where all cut it, the outermost counts.
    """
    uncut = ~found.cut[members]  # (members, 4)
    scores = found.all.scores[members][:, None].masked_fill(~uncut, 0)
    able = uncut & (scores >= ABOUT_BEST * scores.amax(dim=0))
    surest = found.all.edge_std[members].masked_fill(~able, torch.inf).argmin(dim=0)
    reach = found.all.boxes[members] * torch.tensor([-1.0, -1.0, 1.0, 1.0])
    return members[torch.where(able.any(dim=0), surest, reach.argmax(dim=0))]


def _clipped(boxes: Tensor, window: Tensor) -> Tensor:
    """Return boxes (N, 4) clipped to a window (4,); those outside have no area."""
    low, high = window[:2], window[2:]
    corner = boxes[:, :2].maximum(low).minimum(high)
    return torch.cat([corner, boxes[:, 2:].minimum(high).maximum(corner)], dim=1)


def _intersections(one: Tensor, other: Tensor) -> Tensor:
    """Return the areas that boxes (F, 4) and (S, 4) share, (F, S)."""
    low = one[:, None, :2].maximum(other[:, :2])
    high = one[:, None, 2:].minimum(other[:, 2:])
    return (high - low).clamp(min=0).prod(dim=2)
