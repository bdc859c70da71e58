"""Image files: every kind of pixels becomes upright RGB bytes, and what is none is named."""

import struct
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from gfl.data.images import image_size, is_on_its_side, list_images, read_image
from gfl.data.images import pixels_of as of_content
from gfl.errors import DataError

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
GREY = COLOURS[:, :, 0]

UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored.swapaxes(0, 1)[:, ::-1],
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored.swapaxes(0, 1)[::-1],
}
"""What the EXIF standard says of the first stored row and column: the image is upright so."""


def saved(tmp_path, image, suffix=".png", **options):
    path = tmp_path / f"image{suffix}"
    image.save(path, **options)
    return path


def pixels_of(path):
    pixels = read_image(path)
    assert pixels.dtype == torch.uint8
    assert pixels.permute(1, 2, 0).is_contiguous()
    assert tuple(pixels.shape) == (3, *image_size(path))
    return pixels.permute(1, 2, 0).numpy()


def turned_by(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_every_orientation_is_turned_upright(tmp_path, orientation, suffix):
    options = {"lossless": True} if suffix == ".webp" else {}
    image = Image.fromarray(COLOURS)
    path = saved(tmp_path, image, suffix, exif=turned_by(orientation), **options)
    np.testing.assert_array_equal(pixels_of(path), UPRIGHT[orientation](COLOURS))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_jpeg_is_turned_as_its_stored_pixels_are(tmp_path, orientation):
    stored = pixels_of(saved(tmp_path, Image.fromarray(COLOURS), ".jpg"))
    path = saved(tmp_path, Image.fromarray(COLOURS), ".jpg", exif=turned_by(orientation))
    np.testing.assert_array_equal(pixels_of(path), UPRIGHT[orientation](stored))
    assert is_on_its_side(path) == (orientation > 4)


def test_an_orientation_counts_though_the_rest_of_exif_is_damaged(tmp_path):
    exif = turned_by(6)
    exif[0x011A] = 72.0
    path = saved(tmp_path, Image.fromarray(COLOURS), ".jpg", exif=exif)
    raw = path.read_bytes()
    resolution = raw.index(b"\x01\x1a\x00\x05")  # of type 5, a fraction; 2 is text
    path.write_bytes(raw[: resolution + 3] + b"\x02" + raw[resolution + 4 :])
    assert pixels_of(path).shape == (8, 6, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_kind_of_png_becomes_rgb(tmp_path, mode):
    image = Image.fromarray(COLOURS).convert(mode)
    expected = np.array(image.convert("RGB"))
    np.testing.assert_array_equal(pixels_of(saved(tmp_path, image)), expected)


def test_grey_is_the_same_in_all_three_channels(tmp_path):
    pixels = pixels_of(saved(tmp_path, Image.fromarray(GREY)))
    np.testing.assert_array_equal(pixels, GREY[:, :, None].repeat(3, axis=2))


def test_transparency_is_dropped_not_blended(tmp_path):
    image = Image.fromarray(np.dstack([COLOURS, GREY // 2]))
    np.testing.assert_array_equal(pixels_of(saved(tmp_path, image)), COLOURS)


def test_a_palette_with_transparent_colours_keeps_its_colours(tmp_path):
    image = Image.new("P", (8, 6), 1)
    image.putpalette([0, 0, 0, 10, 20, 30, 255, 255, 255])
    path = saved(tmp_path, image, transparency=bytes([0, 128, 255]))
    assert (pixels_of(path) == [10, 20, 30]).all()


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bits_of_grey_are_scaled_not_clipped(tmp_path, suffix):
    wide = np.array([[0, 128, 129, 257, 32896, 65278, 65406, 65407, 65535]], dtype=np.uint16)
    pixels = pixels_of(saved(tmp_path, Image.fromarray(wide), suffix))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 254, 255, 255]
    assert (pixels == pixels[:, :, :1]).all()


def test_16_bits_of_grey_are_turned_too(tmp_path):
    wide = GREY.astype(np.uint16) * 257
    path = saved(tmp_path, Image.fromarray(wide), exif=turned_by(6))
    np.testing.assert_array_equal(pixels_of(path)[:, :, 0], UPRIGHT[6](GREY))


@pytest.mark.parametrize(
    "pixels",
    [np.full((6, 8), 0.5, np.float32), np.full((6, 8), 70000, np.int32), -np.eye(6, dtype="int32")],
)
def test_pixels_without_a_known_white_are_refused(tmp_path, pixels):
    path = saved(tmp_path, Image.fromarray(pixels), ".tif")
    with pytest.raises(DataError, match=r"image\.tif: .*neither 8 nor 16 bits"):
        read_image(path)


def test_cmyk_becomes_rgb(tmp_path):
    ink = Image.new("CMYK", (8, 6), (255, 0, 0, 0))
    assert (pixels_of(saved(tmp_path, ink, ".tif")) == [0, 255, 255]).all()
    pixels = pixels_of(saved(tmp_path, ink, ".jpg")).astype(int)
    assert (abs(pixels - [0, 255, 255]) <= 2).all()  # lossy


def test_a_damaged_image_is_named(tmp_path):
    path = tmp_path / "broken.jpg"
    for read in (read_image, image_size):
        path.write_bytes(b"\xff\xd8\xff\xe0 no picture")
        with pytest.raises(DataError, match=r"broken\.jpg: cannot be read as an image"):
            read(path)
        with pytest.raises(DataError, match=r"absent\.jpg: cannot be read"):
            read(tmp_path / "absent.jpg")
        path.write_bytes(b"")
        with pytest.raises(DataError, match=r"broken\.jpg"):
            read(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_truncated_image_is_named(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(noise), suffix)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"image\{suffix}: .*truncated.*; replace or remove it"):
        read_image(path)


def test_images_of_a_folder_are_listed_by_name(tmp_path):
    for name in ("b.PNG", "a.jpeg", "notes.txt", "c.tif"):
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["a.jpeg", "b.PNG", "c.tif"]


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no images; expected files \.bmp, \.jfif"):
        list_images(tmp_path)


def test_a_camera_with_two_views_in_a_file_gives_the_first(tmp_path):
    image, other = Image.fromarray(COLOURS), Image.fromarray(COLOURS[::-1])
    alone = pixels_of(saved(tmp_path, image, ".jpg"))
    path = saved(tmp_path, image, ".jpg", format="MPO", save_all=True, append_images=[other])
    np.testing.assert_array_equal(pixels_of(path), alone)


def test_only_files_that_are_expected_are_decoded():
    """Of a DDS file with an unknown compression, Pillow's decoder raises what nobody expects."""
    dds = bytearray(b"DDS " + struct.pack("<7I", 124, 0x1007, 4, 4, 0, 0, 0) + bytes(44))
    dds += struct.pack("<2I4s5I", 32, 4, b"ABCD", 0, 0, 0, 0, 0) + bytes(20)
    with pytest.raises(NotImplementedError):
        Image.open(BytesIO(dds))
    with pytest.raises(DataError, match=r"128 bytes: cannot be read as an image \(cannot identify"):
        of_content(bytes(dds))
