"""`jobs.inspect` as its users call it."""

import json
import sys

import pytest
import torch


@pytest.fixture
def inspect_says(monkeypatch, capsys):
    """Return a function that runs the job and returns its status, output and error."""
    from jobs import inspect

    threads = torch.get_num_threads()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["jobs.inspect", *map(str, arguments)])
        try:
            inspect.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    yield run
    torch.set_num_threads(threads)


def test_all_is_told_written_and_drawn(inspect_says, tiny_file, tmp_path):
    report, samples = tmp_path / "new" / "report.json", tmp_path / "samples"
    status, out, error = inspect_says(
        tiny_file, "model.reg_max=2", "--out", report, "--draw", samples
    )
    assert (status, error) == (0, "")
    for word in ("rectangle", "█", "P7", "0.5", "1 (now)", "regression range", "45 files read"):
        assert word in out, word
    content = json.loads(report.read_text())
    assert content["splits"]["train"]["classes"].keys() == {"rectangle", "ellipse", "triangle"}
    assert content["regression_ranges"][0]["levels"]["8"]["share"] > 0
    assert [f["what"] for f in content["findings"] if "reg_max" in f["what"]]
    assert 8 <= len(list(samples.glob("0*.png"))) <= 16
    assert (samples / "augmentation.png").exists()


def test_errors_are_one_line_and_the_status(inspect_says, coco, tiny_file, tmp_path):
    images, annotations = coco(
        images=[
            {"id": 1, "file_name": "a.jpg", "width": 64, "height": 48},
            {"id": 2, "file_name": "b.jpg", "width": 96, "height": 64},
        ],
        annotations=[{"bbox": [1, 2, 30, 40]}, {"bbox": [1, 2, 30, 40], "image_id": 2}],
        categories=[{"id": 1, "name": "[bold]car"}],
    )
    (tmp_path / "images" / "b.jpg").write_bytes(b"nothing")
    where = f"{{images: {images}, annotations: {annotations}}}"
    arguments = (tiny_file, "model.num_classes=1", f"data.train={where}", f"data.val={where}")
    report = tmp_path / "report.json"
    status, out, error = inspect_says(*arguments, "--out", report, "--draw", tmp_path / "drawn")
    assert status == 1
    assert error.startswith("error: train: files that cannot be read: 1 (")
    assert "val: files that cannot be read: 1 (" in error
    assert error.count("\n") == 1
    assert "ERROR" in out
    assert "[bold]car" in out
    assert [f["error"] for f in json.loads(report.read_text())["findings"]][:2] == [True, True]
    assert not (tmp_path / "drawn").exists()
    assert inspect_says(*arguments, "--quick")[0] == 0


def test_what_the_reader_refuses_is_one_line_too(inspect_says, coco, tiny_file):
    images, annotations = coco(categories=[{"id": 1, "name": "a"}, {"id": 2, "name": "b"}])
    where = f"{{images: {images}, annotations: {annotations}}}"
    status, _, error = inspect_says(tiny_file, f"data.train={where}", f"data.val={where}")
    assert status == 1
    assert "has 2 categories, but model.num_classes is 3" in error
    assert error.count("\n") == 1
