"""3 x 3 convolutions with a quarter of the multiplications: Winograd's minimal filtering.

On a line: 3 weights over 6 cells give 4 outputs, which takes 12 multiplications. But a filter is a
product of two polynomials, and a product of polynomials is known from its values at a few points.
So the cells and the weights are brought to their values at 6 points (0, 1, -1, 2, -2 and infinity),
multiplied point by point, and the 4 outputs are computed from the 6 products. Small fixed matrices
bring values to the points and back.

In two dimensions the matrices are applied to both sides of a square (Lavin and Gray, CVPR 2016,
F(4 x 4, 3 x 3)). A *tile* of 6 x 6 cells and the 3 x 3 weights become 36 values each, and 36
products in place of 144 give a *block* of 4 x 4 outputs. Neighbouring tiles overlap by 2 cells. The
sum over channels can be taken at the points: for each of the 36, a whole layer is one product of
the matrices (tiles x channels in) and (channels in x channels out). All of it is linear, so
gradients go the same way back, through the transposed matrices.

Shapes: B images; C channels in, O out; H x W cells of a map; Y rows and X columns of tiles; T tiles
taken at a time; 36 points.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TILES = 336
"""Number of tiles taken at a time, also of several maps: more need more memory and gain little."""

CELLS_TO_POINTS = torch.tensor([
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
], dtype=torch.float64)  # fmt: skip
WEIGHTS_TO_POINTS = torch.tensor([
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
], dtype=torch.float64)  # fmt: skip
POINTS_TO_OUTPUTS = torch.tensor([
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
], dtype=torch.float64)  # fmt: skip


def convolution(maps: list[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Return `conv2d` with a padding of 1 of each map: (B, O, H, W) each, channels last.

    It is differentiable once. Its rounding errors, up to 9 times oneDNN's, are at most 1e-4 of the
    spread of the outputs, unless single cells are very large.

    Args:
        maps: (B, C, H, W) each; channels last is fastest.
        weight: (O, C, 3, 3).
        bias: (O,).
    """
    return list(_Winograd.apply(weight, bias, *maps))


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, *maps: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weight, *maps)
        from_cells, to_outputs = CELLS_TO_POINTS.to(weight), POINTS_TO_OUTPUTS.to(weight)
        weights = _weights_at_points(weight).mT  # (36, C, O)
        outputs = [_empty_in_blocks(cells, len(weight)) for cells in maps]
        blocks = [_blocks(output) for output in outputs]
        for pieces in _pieces(maps):
            products = torch.bmm(_tiles_at_points(from_cells, maps, pieces), weights)  # (36, T, O)
            for piece, squares in _from_points(to_outputs, products, pieces):
                blocks[piece.map][piece.images, piece.rows] = squares
        if bias is not None:
            for block in blocks:
                block += bias
        return tuple(_cut(*pair, start=0) for pair in zip(outputs, maps, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, *maps = ctx.saved_tensors
        _, bias_needs, *maps_need = ctx.needs_input_grad
        from_cells, to_outputs = CELLS_TO_POINTS.to(weight), POINTS_TO_OUTPUTS.to(weight)
        weights = _weights_at_points(weight)
        weights_gradient = torch.empty_like(weights)
        maps_gradients = [_empty_in_blocks(m, m.shape[1], more=1).zero_() for m in maps]
        blocks = [_blocks(gradient) for gradient in maps_gradients]
        for turn, pieces in enumerate(_pieces(maps)):
            points = _tiles_at_points(to_outputs.T, gradients, pieces)  # (36, T, O)
            cells = _tiles_at_points(from_cells, maps, pieces)  # (36, T, C)
            weights_gradient.baddbmm_(points.mT, cells, beta=min(turn, 1))
            if any(maps_need):
                tiles = torch.bmm(points, weights)  # (36, T, C)
                for piece, squares in _from_points(from_cells.T, tiles, pieces):
                    _add_overlapping(squares, blocks[piece.map][piece.images], piece.rows)
        squares = _on_both_sides(WEIGHTS_TO_POINTS.T.to(weight), weights_gradient.view(6, 6, -1))
        weight_gradient = squares.unflatten(2, weight.shape[:2]).permute(2, 3, 0, 1)
        return (
            weight_gradient.contiguous(memory_format=torch.channels_last),
            torch.stack([g.sum((0, 2, 3)) for g in gradients]).sum(0) if bias_needs else None,
            *(_cut(*pair, start=1) for pair in zip(maps_gradients, maps, strict=True)),
        )


def _weights_at_points(weight: Tensor) -> Tensor:
    """Return the weights (O, C, 3, 3) at the points, (36, O, C)."""
    squares = weight.permute(2, 3, 0, 1).reshape(3, 3, -1)
    return _on_both_sides(WEIGHTS_TO_POINTS.to(squares), squares).view(36, *weight.shape[:2])


def _on_both_sides(matrix: Tensor, squares: Tensor) -> Tensor:
    """Multiply both sides of squares, (side, side, N), by `matrix`."""
    return (matrix @ _on_one_side(matrix, squares).flatten(1)).unflatten(1, (len(matrix), -1))


def _on_one_side(matrix: Tensor, squares: Tensor) -> Tensor:
    """Multiply the second side of squares, (..., side, N), by `matrix`."""
    return torch.bmm(matrix.expand(len(squares), *matrix.shape), squares)


def _empty_in_blocks(like: Tensor, channels: int, more: int = 0) -> Tensor:
    """Return an uninitialised map of whole blocks that covers `like`, with `more` blocks a side."""
    height, width = (4 * (-(-size // 4) + more) for size in like.shape[2:])
    shape = (len(like), channels, height, width)  # and no view, or it could not be changed in place
    return torch.empty(shape, dtype=like.dtype, memory_format=torch.channels_last)


def _blocks(cells: Tensor) -> Tensor:
    """Return a view of a map of whole blocks as (B, Y, 4, X, 4, C)."""
    images, channels, height, width = cells.shape
    return cells.permute(0, 2, 3, 1).view(images, height // 4, 4, width // 4, 4, channels)


def _cut(cells: Tensor, like: Tensor, start: int) -> Tensor:
    """Return as many cells as `like` has, from cell (`start`, `start`) on."""
    if cells.shape[2:] == like.shape[2:]:
        return cells
    height, width = like.shape[2:]
    part = cells[:, :, start : start + height, start : start + width]
    return part.clone(memory_format=torch.channels_last)  # a view may not be changed in place


class _Piece(NamedTuple):
    """Some rows of tiles of some images of one map; its shape is (B, Y, X)."""

    map: int
    images: slice
    rows: slice
    shape: tuple[int, int, int]


def _pieces(maps: Sequence[Tensor]) -> Iterator[list[_Piece]]:
    """Yield the tiles of all maps, `TILES` at a time, or one row of an image that has more."""
    pieces: list[_Piece] = []
    room = TILES
    for number, cells in enumerate(maps):
        rows, columns = (-(-size // 4) for size in cells.shape[2:])
        images_at_once = max(1, TILES // columns)
        for first in range(0, len(cells), images_at_once):
            images = slice(first, min(first + images_at_once, len(cells)))
            in_row = (images.stop - images.start) * columns
            start = 0
            while start < rows:
                if pieces and in_row > room:
                    yield pieces
                    pieces, room = [], TILES
                stop = min(start + max(1, room // in_row), rows)
                shape = (images.stop - images.start, stop - start, columns)
                pieces.append(_Piece(number, images, slice(start, stop), shape))
                room -= prod(shape)
                start = stop
    yield pieces


def _tiles_at_points(matrix: Tensor, maps: Sequence[Tensor], pieces: Sequence[_Piece]) -> Tensor:
    """Cut tiles out of maps and bring them to the points by `matrix`, (36, T, C)."""
    size = matrix.shape[1]
    counts = [prod(piece.shape) for piece in pieces]
    half_done = maps[0].new_empty(6, size, sum(counts), maps[0].shape[1])
    for piece, part in zip(pieces, half_done.split(counts, dim=2), strict=True):
        cells = _padded(maps[piece.map][piece.images].permute(0, 2, 3, 1), piece, (size - 4) // 2)
        rows = cells.unfold(1, size, 4).movedim(4, 2)  # (B, Y, size, W, C)
        rows = _on_one_side(matrix, rows.reshape(-1, size, prod(cells.shape[2:])))
        tiles = rows.unflatten(2, cells.shape[2:]).unfold(2, size, 4)  # (B * Y, 6, X, C, size)
        part.unflatten(2, (-1, piece.shape[2])).copy_(tiles.permute(1, 4, 0, 2, 3))
    return _on_one_side(matrix, half_done.flatten(2)).view(36, -1, half_done.shape[3])


def _padded(cells: Tensor, piece: _Piece, border: int) -> Tensor:
    """Cut the cells of a piece's tiles out of (B, H, W, C): its blocks and a `border` around."""
    first, stop = 4 * piece.rows.start - border, 4 * piece.rows.stop + border
    inside = cells[:, max(first, 0) : stop]
    above, right = max(-first, 0), 4 * piece.shape[2] + border - cells.shape[2]
    return F.pad(inside, (0, 0, border, right, above, stop - first - above - inside.shape[1]))


def _from_points(
    matrix: Tensor, points: Tensor, pieces: Sequence[_Piece]
) -> Iterator[tuple[_Piece, Tensor]]:
    """Bring points (36, T, C) back by `matrix`; yield (B, Y, size, X, size, C) of each piece."""
    squares = _on_both_sides(matrix, points.view(6, 6, -1)).unflatten(2, points.shape[1:])
    parts = squares.split([prod(piece.shape) for piece in pieces], dim=2)
    for piece, part in zip(pieces, parts, strict=True):
        yield piece, part.unflatten(2, piece.shape).permute(2, 3, 0, 4, 1, 5)


def _add_overlapping(tiles: Tensor, blocks: Tensor, rows: slice) -> None:
    """Add tiles of 6 x 6 cells to the blocks of 4 x 4 cells that each of them overlaps."""
    columns = tiles.shape[3]
    for down, part in enumerate(tiles.split(4, dim=2)):
        below = blocks[:, rows.start + down : rows.stop + down, : part.shape[2]]
        for right, corner in enumerate(part.split(4, dim=4)):
            below[:, :, :, right : right + columns, : corner.shape[4]] += corner
