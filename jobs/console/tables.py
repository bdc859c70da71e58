"""The tables of `jobs.inspect`."""

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from gfl.config.schema import ModelConfig
from gfl.inspection.findings import Finding
from gfl.inspection.inspection import Inspection, SplitStatistics, Spread
from gfl.inspection.regression_range import Reach
from jobs.console.cli import console

CLASSES_SHOWN = 30
"""Of more classes, the most and the least frequent ones."""

BAR = 40
"""Characters of the most frequent class's bar."""


def show_inspection(found: Inspection, model: ModelConfig) -> None:
    """Print all that was found in the data that `model` is to learn; the worst comes last."""
    read = f"{found.files} files read" if found.files else "no file read"
    columns = [_statistics(split) for split in found.splits.values()]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    _show(f"images ({read})", ["min / median / max", *found.splits], rows)
    _show("boxes of every class", ["class", *found.splits, ""], _classes(found))
    for reach in found.reach:
        at = f"at short side {reach.short_side} px: {reach.images} images, {reach.objects} objects"
        names = ["level", "stride", "positives", "edges clipped", "farthest, bins", "99.9 %, bins"]
        bins = f"reg_max {model.reg_max} with Delta {model.bin_width:g}"
        dirac = model.edges == "dirac"
        _show(f"reach of {'any distance' if dirac else bins} {at}", names, _levels(reach))
        if dirac:
            continue  # there are no bins to choose
        names = [
            "Delta",
            "reg_max to clip < 0.1 %",
            f"clipped at {model.reg_max}",
            "px between bins, P3 to P7",
        ]
        _show(f"other bins {at}", names, _bin_widths(reach, model))
    if found.findings:
        _show("findings", ["", "set", "count", "what", "details"], map(_finding, found.findings))
    else:
        console.print("nothing is wrong")


def _show(title: str, names: list[str], rows: Iterable[tuple[str, ...]]) -> None:
    table = Table(*names, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(Text, row))  # a name in brackets is no markup
    console.print(table)


def _statistics(split: SplitStatistics) -> dict[str, str]:
    def spread(values: Spread) -> str:
        return f"{values.min:.4g} / {values.median:.4g} / {values.max:.4g}"

    return {
        "images": f"{split.images}",
        "height, px": spread(split.height),
        "width, px": spread(split.width),
        "width / height": spread(split.aspect),
        "boxes": f"{split.boxes}",
        "boxes of an image": spread(split.boxes_per_image),
        **{f"{size} boxes": f"{count}" for size, count in split.sizes.items()},
    }


def _classes(found: Inspection) -> Iterable[tuple[str, ...]]:
    train, val = (split.classes for split in found.splits.values())
    names = sorted(train, key=lambda name: -train[name])
    most = max(1, *train.values())
    half = CLASSES_SHOWN // 2
    hidden = names[half:-half] if len(names) > CLASSES_SHOWN else []
    for name in names:
        if name not in hidden:
            bar = "█" * round(BAR * train[name] / most)
            yield name, f"{train[name]}", f"{val[name]}", bar
        elif name == hidden[0]:
            yield f"... {len(hidden)} more", "", "", ""


def _levels(reach: Reach) -> Iterable[tuple[str, ...]]:
    names = [f"P{number}" for number, _ in enumerate(reach.levels, start=3)]
    strides = [f"{stride}" for stride in reach.levels]
    rows = [*reach.levels.values(), reach.total]
    for name, stride, row in zip([*names, "all"], [*strides, ""], rows, strict=True):
        far = (f"{row.largest:.1f}", f"{row.percentile:.1f}") if row.positives else ("", "")
        yield name, stride, f"{row.positives}", f"{row.share:.3%}", *far
    yield "objects clipped", "", f"{reach.clipped_objects}", "", "", ""
    yield "objects never learned", "", f"{reach.unlearned_objects}", "", "", ""


def _bin_widths(reach: Reach, model: ModelConfig) -> Iterable[tuple[str, ...]]:
    for option in reach.bin_widths:
        mark = " (now)" if option.bin_width == model.bin_width else ""
        pixels = " / ".join(f"{step:g}" for step in option.resolution_px)
        yield f"{option.bin_width:g}{mark}", f"{option.reg_max}", f"{option.share:.3%}", pixels


def _finding(finding: Finding) -> tuple[str, ...]:
    kind = "ERROR" if finding.error else "warning"
    return kind, finding.split, f"{finding.count}", finding.what, "\n".join(finding.details)
