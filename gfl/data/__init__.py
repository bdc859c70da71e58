"""From annotation files to batches."""

from pathlib import Path

from gfl.config.schema import Config
from gfl.data import synthetic
from gfl.data.split import Split, read_split, require_same_classes
from gfl.errors import DataError

__all__ = ["load_splits", "render_shapes"]


def render_shapes(config: Config) -> None:
    """Render the synthetic set that `data.shapes` asks for, if any, unless it is there already."""
    wanted = config.data.shapes
    if wanted is not None:
        folder = Path(wanted.folder)
        # Held-out images come from another seed.
        synthetic.render(
            folder / "train", count=wanted.train, size=wanted.size, seed=2 * wanted.seed
        )
        synthetic.render(
            folder / "val", count=wanted.val, size=wanted.size, seed=2 * wanted.seed + 1
        )


def load_splits(config: Config) -> tuple[Split, Split]:
    """Return the checked training and evaluation sets of `config`.

    Raises:
        DataError: a set that cannot be used.
    """
    render_shapes(config)
    data, count = config.data, config.model.num_classes
    train = read_split(data, "train", count)
    val = read_split(data, "val", count, train.classes)
    require_same_classes(str(train.annotations), train.classes, str(val.annotations), val.classes)
    if not any(len(record.labels) for record in val.records):
        raise DataError(f"{val.annotations}: no annotations; evaluate on images that have some")
    return train, val
