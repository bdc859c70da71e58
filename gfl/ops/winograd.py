"""3 x 3 convolutions that multiply a quarter as often: Winograd's minimal filtering.

F(4 x 4, 3 x 3) of Lavin and Gray (CVPR 2016): tiles of 6 x 6 cells, which overlap, and the weights
are brought to 36 points, the convolution is a matrix product at each point, and 4 x 4 cells are
made of the 36 products. All of this is linear, and gradients go the same way back. Small matrices
bring tiles to their points and back, along one side and then along the other. Tiles are taken some
rows at a time, which bounds their memory, and those of small maps together, so that weights are
fetched for all of them once.

Shapes: B images; C channels in, O out; Y rows and X columns of tiles; T tiles at a time.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TILES = 336
"""How many tiles to take at a time: more gain little and take more memory."""


class Piece(NamedTuple):
    """Some rows of tiles of some images of one of the maps."""

    map: int
    images: slice
    rows: slice
    shape: tuple[int, int, int]  # (B, Y, X)


def _line(*rows: tuple[float, ...]) -> Tensor:
    """Give the matrix that is applied to one side of a square, and then to the other."""
    return torch.tensor(rows, dtype=torch.float64)


TILE = _line(
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
WEIGHT = _line(
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
RESULT = _line(
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)


def convolution(maps: list[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Return what `conv2d` with a padding of 1 makes of each map.

    Rounding errors are up to 9 times oneDNN's on channels last: at most 1e-4 of the spread of a
    result, if no cell is far out. Twice differentiable it is not.

    Args:
        maps: (B, C, H, W) each; channels last is quickest.
        weight: (O, C, 3, 3).
        bias: (O,).

    Returns:
        (B, O, H, W) each, channels last.
    """
    return list(_Winograd.apply(weight, bias, *maps))


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, *maps: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weight, *maps)
        tile, result = TILE.to(weight), RESULT.to(weight)
        weights = _weights_at_points(weight).mT  # (36, C, O)
        found = [_whole_tiles(one, len(weight)) for one in maps]
        blocks = [_blocks(one) for one in found]
        for pieces in _together(maps):
            points = torch.bmm(_at_points(tile, maps, pieces), weights)  # (36, T, O)
            for piece, cells in _from_points(result, points, pieces):
                blocks[piece.map][piece.images, piece.rows] = cells
        if bias is not None:
            for block in blocks:
                block += bias
        return tuple(_cut(one, like, start=0) for one, like in zip(found, maps, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, *maps = ctx.saved_tensors
        _, of_bias, *of_maps = ctx.needs_input_grad
        tile, result = TILE.to(weight), RESULT.to(weight)
        weights = _weights_at_points(weight)
        by_weight = torch.empty_like(weights)
        by_maps = [_whole_tiles(one, one.shape[1], more=1).zero_() for one in maps]
        blocks = [_blocks(one) for one in by_maps]
        for turn, pieces in enumerate(_together(maps)):
            points = _at_points(result.T, gradients, pieces)  # (36, T, O)
            by_weight.baddbmm_(points.mT, _at_points(tile, maps, pieces), beta=min(turn, 1))
            if any(of_maps):
                tiles = torch.bmm(points, weights)  # (36, T, C)
                for piece, cells in _from_points(tile.T, tiles, pieces):
                    _add(cells, blocks[piece.map][piece.images], piece.rows)
        squares = _on_both_sides(WEIGHT.T.to(weight), by_weight.view(6, 6, -1))
        nine = squares.unflatten(2, weight.shape[:2]).permute(2, 3, 0, 1)
        return (
            nine.contiguous(memory_format=torch.channels_last),
            torch.stack([one.sum((0, 2, 3)) for one in gradients]).sum(0) if of_bias else None,
            *(_cut(*pair, start=1) for pair in zip(by_maps, maps, strict=True)),
        )


def _weights_at_points(weight: Tensor) -> Tensor:
    nine = weight.permute(2, 3, 0, 1).reshape(3, 3, -1)
    return _on_both_sides(WEIGHT.to(nine), nine).view(36, *weight.shape[:2])  # (36, O, C)


def _on_both_sides(line: Tensor, squares: Tensor) -> Tensor:
    """Multiply both sides of squares, (side, side, N), by `line`."""
    return (line @ _each(line, squares).flatten(1)).unflatten(1, (len(line), -1))


def _each(line: Tensor, sides: Tensor) -> Tensor:
    """Multiply each of many sides of squares, (..., side, N), by `line`."""
    return torch.bmm(line.expand(len(sides), *line.shape), sides)


def _whole_tiles(like: Tensor, channels: int, more: int = 0) -> Tensor:
    """Give an empty map for the images of another, of so many tiles and `more` a side."""
    height, width = (4 * (-(-size // 4) + more) for size in like.shape[2:])
    return torch.empty(
        (len(like), channels, height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def _blocks(whole: Tensor) -> Tensor:
    """Give a view of a map of whole tiles: (B, Y, 4, X, 4, C)."""
    images, channels, height, width = whole.shape
    return whole.permute(0, 2, 3, 1).view(images, height // 4, 4, width // 4, 4, channels)


def _cut(whole: Tensor, like: Tensor, start: int) -> Tensor:
    """Give as many cells as another map has, from cell (`start`, `start`) on."""
    if whole.shape[2:] == like.shape[2:]:
        return whole
    height, width = like.shape[2:]
    cells = whole[:, :, start : start + height, start : start + width]
    return cells.clone(memory_format=torch.channels_last)  # a view may not be changed in place


def _together(maps: Sequence[Tensor]) -> Iterator[list[Piece]]:
    """Give the tiles of all maps, `TILES` at a time, or one row of an image that has more."""
    pieces: list[Piece] = []
    room = TILES
    for number, one in enumerate(maps):
        rows, columns = (-(-size // 4) for size in one.shape[2:])
        count = max(1, TILES // columns)  # of images whose rows fit
        for first in range(0, len(one), count):
            images = slice(first, min(first + count, len(one)))
            in_row = (images.stop - images.start) * columns
            start = 0
            while start < rows:
                if pieces and in_row > room:
                    yield pieces
                    pieces, room = [], TILES
                stop = min(start + max(1, room // in_row), rows)
                shape = (images.stop - images.start, stop - start, columns)
                pieces.append(Piece(number, images, slice(start, stop), shape))
                room -= prod(shape)
                start = stop
    yield pieces


def _at_points(line: Tensor, maps: Sequence[Tensor], pieces: Sequence[Piece]) -> Tensor:
    """Cut tiles out of maps and bring them to their points, (36, T, C)."""
    size = line.shape[1]
    counts = [prod(piece.shape) for piece in pieces]
    across = maps[0].new_empty(6, size, sum(counts), maps[0].shape[1])
    for piece, part in zip(pieces, across.split(counts, dim=2), strict=True):
        cells = _padded(maps[piece.map][piece.images].permute(0, 2, 3, 1), piece, size - 4 >> 1)
        down = cells.unfold(1, size, 4).movedim(4, 2)  # (B, Y, size, W, C)
        rows = _each(line, down.reshape(-1, size, prod(cells.shape[2:])))
        tiles = rows.unflatten(2, cells.shape[2:]).unfold(2, size, 4)  # (B * Y, 6, X, C, size)
        part.unflatten(2, (-1, piece.shape[2])).copy_(tiles.permute(1, 4, 0, 2, 3))
    return _each(line, across.flatten(2)).view(36, -1, across.shape[3])


def _padded(cells: Tensor, piece: Piece, before: int) -> Tensor:
    """Cut what a piece's tiles see out of (B, H, W, C): 4 cells each and `before` on all sides."""
    first, stop = 4 * piece.rows.start - before, 4 * piece.rows.stop + before
    some = cells[:, max(first, 0) : stop]
    above, right = max(-first, 0), 4 * piece.shape[2] + before - cells.shape[2]
    return F.pad(some, (0, 0, before, right, above, stop - first - above - some.shape[1]))


def _from_points(
    line: Tensor, points: Tensor, pieces: Sequence[Piece]
) -> Iterator[tuple[Piece, Tensor]]:
    """Bring points (36, T, C) to cells: (B, Y, size, X, size, C) of each piece."""
    cells = _on_both_sides(line, points.view(6, 6, -1)).unflatten(2, points.shape[1:])
    parts = cells.split([prod(piece.shape) for piece in pieces], dim=2)
    for piece, part in zip(pieces, parts, strict=True):
        yield piece, part.unflatten(2, piece.shape).permute(2, 3, 0, 4, 1, 5)


def _add(tiles: Tensor, blocks: Tensor, rows: slice) -> None:
    """Add tiles of 6 x 6 cells to the blocks of 4 x 4 that each of them overlaps."""
    columns = tiles.shape[3]
    for down, part in enumerate(tiles.split(4, dim=2)):
        under = blocks[:, rows.start + down : rows.stop + down, : part.shape[2]]
        for right, corner in enumerate(part.split(4, dim=4)):
            under[:, :, :, right : right + columns, : corner.shape[4]] += corner
