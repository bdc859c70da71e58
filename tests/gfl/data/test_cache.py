"""The cache of decoded images: as if decoded, whatever happens to files and entries."""

import errno
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from PIL import Image

from gfl.config.loader import derive
from gfl.data import images
from gfl.data.dataset import DetectionDataset
from gfl.data.images import read_cached, read_image
from gfl.data.split import load_splits
from gfl.errors import DataError


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch):
    """The paths that were decoded, in order."""
    paths = []
    monkeypatch.setattr(images, "read_image", lambda path: paths.append(path) or read_image(path))
    return paths


def entries(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_an_image_is_decoded_once(picture, folder, decoded):
    for _ in range(2):
        assert torch.equal(read_cached(picture, folder), read_image(picture))
    assert decoded == [picture]
    (entry,) = entries(folder)
    np.testing.assert_array_equal(np.load(entry), read_image(picture).permute(1, 2, 0).numpy())


def test_what_is_returned_can_be_changed_without_harm(picture, folder):
    read_cached(picture, folder)
    read_cached(picture, folder).zero_()
    assert torch.equal(read_cached(picture, folder), read_image(picture))


@pytest.mark.parametrize("keep_time", [True, False])
def test_a_changed_file_is_decoded_again(picture, folder, keep_time):
    status = picture.stat()
    read_cached(picture, folder)
    # Of another length, or of the same and later.
    changed = Image.new("RGB", (8, 6)) if keep_time else Image.open(picture).transpose(1)
    changed.save(picture)
    if keep_time:
        os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert torch.equal(read_cached(picture, folder), read_image(picture))


def test_files_of_one_name_time_and_length_are_told_apart(folder, tmp_path):
    files = [tmp_path / place / "same.bmp" for place in ("one", "other")]
    for file, colour in zip(files, ("red", "green"), strict=True):
        file.parent.mkdir()
        Image.new("RGB", (8, 6), colour).save(file)
        os.utime(file, (0, 0))
        assert torch.equal(read_cached(file, folder), read_image(file))


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:-1],
        lambda raw: raw[:100],
        lambda raw: b"PK\x03\x04" + raw,  # as an archive begins
        lambda raw: raw.replace(b"(24, 32, 3)", b"(24, 32, '("),
        lambda raw: raw.replace(b"|u1", b"<f8"),
        lambda raw: raw.replace(b"(24, 32, 3)", b"(2304,)    "),
    ],
)
def test_a_damaged_entry_is_decoded_again_and_replaced(picture, folder, damage, decoded):
    read_cached(picture, folder)
    (entry,) = entries(folder)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert entry.read_bytes() != whole
    assert torch.equal(read_cached(picture, folder), read_image(picture))
    assert entry.read_bytes() == whole
    assert decoded == [picture, picture]


def test_processes_write_the_same_entry_at_once(picture, folder):
    with ProcessPoolExecutor(3, get_context("fork")) as pool:
        for pixels in pool.map(read_cached, [picture] * 30, [folder] * 30):
            assert torch.equal(pixels, read_image(picture))
    assert len(entries(folder)) == 1
    assert len(list(folder.rglob("*"))) == 2  # nothing is left beside it


def test_a_full_disk_leaves_no_half_an_entry(picture, folder, monkeypatch, caplog):
    def write_half(path, pixels):
        path.write_bytes(pixels.tobytes()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", write_half)
    assert torch.equal(read_cached(picture, folder), read_image(picture))
    assert entries(folder) == []
    assert "No space left on device" in caplog.text


def test_a_folder_that_cannot_be_written_is_said_once(picture, folder, caplog):
    folder.touch()
    for _ in range(2):
        assert torch.equal(read_cached(picture, folder), read_image(picture))
    (message,) = caplog.messages
    assert message == f"data.cache: {folder}: cannot keep decoded images (Not a directory)"


def test_an_image_that_is_missing_is_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"absent\.jpg: cannot be read"):
        read_cached(tmp_path / "absent.jpg", folder)


def test_samples_are_the_same_with_a_cache(tiny, folder):
    cached = derive(type(tiny), tiny, [f"data.cache={folder}"])
    plain = DetectionDataset(load_splits(tiny)[0], tiny, training=True)
    for _ in range(2):
        dataset = DetectionDataset(load_splits(cached)[0], cached, training=True)
        for key in ((0, 1), (1, 1), (1, 5)):
            assert torch.equal(dataset[key].pixels, plain[key].pixels)
    assert len(entries(folder)) == 2
