"""What is said of workers that stop."""

from pathlib import Path

import pytest

from gfl.configfile import derive
from gfl.data import load_splits
from gfl.data.errors import DataError
from gfl.data.loading import DetectionDataset, TrainBatches, build_loader
from gfl_platform.cluster import JobFailedError, one_line, root_cause


@pytest.mark.parametrize("processes", [0, 1])
def test_a_damaged_image_is_named_in_one_line_whichever_process_read_it(coco, tiny, processes):
    folder, file = coco(annotations=[{"bbox": [0, 0, 9, 9]}])
    (Path(folder) / "a.jpg").write_bytes(b"no picture")
    split = f"{{images: {folder}, annotations: {file}}}"
    config = derive(
        type(tiny), tiny, [f"data.train={split}", f"data.val={split}", "model.num_classes=1"]
    )
    dataset = DetectionDataset(load_splits(config)[0], config, training=True)
    loader = build_loader(
        dataset, TrainBatches(dataset.split.records, config, 0, 1, 0), processes, pin=False
    )
    with pytest.raises(DataError) as caught:
        next(iter(loader))
    line = one_line(caught.value)
    assert line.startswith(f"{folder}/a.jpg: cannot be read as an image")
    assert line.endswith("replace or remove it")


def test_the_cause_is_found_inside_its_wrappings():
    inner = ValueError("why\nand a traceback")
    outer, outermost = RuntimeError("outer"), RuntimeError("outermost")
    outer._base_exc, outermost.controller_failure = inner, outer
    assert root_cause(outermost) is inner
    assert one_line(inner) == "why"
    assert one_line(KeyError()) == "KeyError"
    assert one_line(JobFailedError("")) == "JobFailedError"
