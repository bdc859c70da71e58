"""The registered model: its answers in a process, in MLflow's hands, and behind its server."""

import base64
import io
import json
import random
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import gfl
import gfl_platform
from gfl.checkpoint.files import About
from gfl.checkpoint.snapshot import take_snapshot
from gfl.data.images import list_images
from gfl_platform.registry import models, pyfunc
from gfl_platform.registry.pyfunc import DetectorModel, InputError
from tests.support.detectors import attentive_detector
from tests.support.servers import ModelServer
from tests.support.tracking import store_of


@pytest.fixture(scope="module")
def image(shapes_folder):
    return list_images(shapes_folder / "val" / "images")[0]


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    folder.mkdir()
    about = About(["rectangle", "ellipse", "triangle"], [1, 2, 5], 0, 0, {})
    take_snapshot(attentive_detector(tiny), tiny, about, {}).write(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    model = DetectorModel()
    model.load_context(SimpleNamespace(artifacts={"checkpoint": checkpoint}))
    return model


def encoded(content):
    return base64.b64encode(content).decode()


def png(width, height, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def huge_png(side=50_000):
    """A PNG whose header says `side` x `side` px."""
    parts = [(b"IHDR", struct.pack(">II5B", side, side, 8, 2, 0, 0, 0)), (b"IDAT", b"x")]
    chunks = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_an_image_may_be_bytes_base64_in_lines_or_not_or_a_data_url(model, image):
    content = image.read_bytes()
    lines = base64.encodebytes(content).decode()
    assert "\n" in lines.strip()
    url = f"data:image/png;base64,{encoded(content)}"
    answers = model.predict(None, [content, encoded(content), lines, url, f"{lines}\r\n "])
    assert answers[0].boxes
    assert answers[0].error is None
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"not an image", "image 1: 12 bytes: cannot be read as an image (cannot identify image"),
        (encoded(huge_png()), "exceeds limit"),
        (encoded(huge_png(8000)), "has 8000 x 8000 px; expected at most 50,000,000 px"),
        ("", "got an empty str"),
        (None, "got NoneType"),
        (7, "got int; expected base64 or bytes of an image file"),
        (["aGVsbG8="], "got list"),
        (png(64, 64)[:70], "cannot be read as an image"),
        ("data:image/png;base64,%%%", "is not base64"),
        ("/etc/passwd", "a path is read only where the server has GFL_SERVE_PATHS=1"),
        ("é" * 5000, "is not base64"),
        ("A" * (50 * 2**20), "has 39,321,600 bytes; expected at most 33,554,432"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_bad_image_has_its_reason_and_the_others_their_detections(model, image, bad, reason):
    content = image.read_bytes()
    (before, answer, after) = model.predict(None, [content, bad, content])
    assert (answer.boxes, reason in answer.error) == ([], True), answer.error
    assert answer.error.startswith("image 1: ")
    assert len(answer.error) < 400
    assert before == after
    assert before.boxes


def test_a_request_has_a_limited_number_of_images_and_bytes(model):
    for inputs, reason in (
        ([], "got 0 images; expected 1 to 64 in a request"),
        ([b"x"] * 65, "got 65 images; expected 1 to 64"),
        (
            ["A" * (30 * 2**20)] * 3,
            "got 94,371,840 bytes; expected at most 67,108,864",
        ),
    ):
        with pytest.raises(InputError, match=reason):
            model.predict(None, inputs)


def test_paths_are_read_by_no_process_but_where_a_variable_allows_it(
    model, image, tmp_path, monkeypatch
):
    monkeypatch.setenv("GFL_SERVE_PATHS", "0")
    (denied,) = model.predict(None, [str(image)])
    assert "GFL_SERVE_PATHS=1" in denied.error
    monkeypatch.setenv("GFL_SERVE_PATHS", "1")
    base64_name = tmp_path / "street01"
    base64_name.write_bytes(image.read_bytes())
    monkeypatch.chdir(tmp_path)
    (from_file, other, absent, device) = model.predict(
        None, [str(image), "street01", "no/where.jpg", "/dev/zero"]
    )
    assert from_file == other == model.predict(None, [image.read_bytes()])[0]
    assert "or the path of a file that is there" in absent.error
    assert "is not base64" in device.error


def test_a_detector_that_fails_on_an_image_answers_for_the_others(model, image, monkeypatch):
    content, real = image.read_bytes(), model._model.predict

    def fail_on_grey(content):
        if content == grey:
            raise RuntimeError("out of memory")
        return real(content)

    grey = png(64, 64, "L")
    monkeypatch.setattr(model._model, "predict", fail_on_grey)
    failed, good = model.predict(None, [grey, content])
    assert failed.error == "image 0: the detector failed (out of memory)"
    assert good.boxes


def hostile_request(image, generator):
    """Return a request, good or not, and the number of images that it has; 0 for a refused one."""
    good = encoded(image)
    cases = [
        ({"inputs": [good]}, 1),
        ({"inputs": [base64.encodebytes(image).decode(), good]}, 2),
        ({"inputs": [good, encoded(image[: generator.randrange(len(image))]), good]}, 3),
        ({"inputs": [encoded(generator.randbytes(generator.randrange(1, 2000)))] * 2}, 2),
        ({"inputs": [encoded(huge_png(generator.choice([8_000, 13_000, 50_000])))]}, 1),
        ({"inputs": [None, 7, 1e308, {"a": good}, [[good]], "", True, str(Path(__file__))]}, 8),
        ({"inputs": ["data:image/png;base64,%%%", "data:;base64,", "/dev/zero", "é"]}, 4),
        ({"inputs": [encoded(mutated(image, generator)) for _ in range(4)]}, 4),
        ({"inputs": [good] * 65}, 0),
        ({"inputs": []}, 0),
        ({"inputs": good}, 0),
        ({"inputs": {"image": [good]}}, 0),
        ({"instances": [good], "params": {"paths": True}}, 0),
        ({"dataframe_split": {"columns": ["image"], "data": [[good]]}}, 0),
        (b"{no json", 0),
        (b"\xff\xfe\x00", 0),
        (b"", 0),
    ]
    return generator.choice(cases)


def mutated(content, generator):
    """Return `content` with some bytes changed."""
    changed = bytearray(content)
    for _ in range(generator.randrange(1, 20)):
        changed[generator.randrange(len(changed))] = generator.randrange(256)
    return bytes(changed)


@pytest.mark.chaos
def test_a_thousand_good_and_hostile_requests_all_get_an_answer(checkpoint, image, tmp_path):
    """The server neither ends nor takes 2 GiB, and whatever it refuses has a reason."""
    from mlflow.pyfunc import save_model

    save_model(
        str(tmp_path / "model"),
        python_model=pyfunc.__file__,
        artifacts={"checkpoint": str(checkpoint)},
        code_paths=[str(Path(package.__file__).parent) for package in (gfl, gfl_platform)],
        pip_requirements=["torch"],
    )
    server = ModelServer(tmp_path, str(tmp_path / "model"))
    server.start()
    generator, content = random.Random(0), image.read_bytes()
    requests = [hostile_request(content, generator) for _ in range(980)]
    largest = encoded(png(7071, 7071, "RGBA"))  # 50 megapixels
    requests += [({"inputs": [largest, largest]}, 2), ({"inputs": ["A" * 60_000_000]}, 1)] * 10
    generator.shuffle(requests)
    try:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda request: server.ask(request[0]), requests))
        peak = server.peak_memory()
    finally:
        server.stop()
    for (request, images), (status, text) in zip(requests, answers, strict=True):
        assert status == (200 if images else 400), (str(request)[:200], text[:500])
        if not images:
            assert len(json.loads(text)["message"]) > 10
            continue
        predictions = json.loads(text)["predictions"]
        assert len(predictions) == images
        for answer in predictions:
            assert answer["error"] is None or answer["error"].startswith("image ")
    assert 0.3 * 2**30 < peak < 2 * 2**30
    assert sum(status == 200 for status, _ in answers) > 300


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    """A real `mlflow models serve` of the champion."""
    uri = store_of(trained[0]).uri
    folder = tmp_path_factory.mktemp("server")
    server = ModelServer(folder, "models:/shapes@champion", MLFLOW_TRACKING_URI=uri)
    server.start()
    yield server
    server.stop()


@pytest.mark.ray
def test_mlflow_gives_what_our_own_loader_does(trained, monkeypatch):
    job, _, _ = trained
    image = list_images(Path(job.data.val.images))[0]
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    store_of(job).require_answer()
    import mlflow
    import pandas as pd

    model = mlflow.pyfunc.load_model("models:/shapes@champion")
    content = image.read_bytes()
    (expected,) = model.predict([content])
    assert expected.boxes
    assert model.predict(pd.DataFrame({"image": [encoded(content)]})) == [expected]
    (ours,) = models.load("models:/shapes@champion", store_of(job)).predict(image)
    assert expected.boxes == ours.boxes.tolist()
    assert expected.classes == ours.names
    assert model.metadata.signature is not None


@pytest.mark.ray
def test_a_server_answers_for_each_image_and_says_what_is_wrong_with_a_request(server, image):
    content = encoded(image.read_bytes())
    status, text = server.ask({"inputs": [content, str(image), content]})
    one, bad, other = json.loads(text)["predictions"]
    assert (status, one) == (200, other)
    assert one.keys() == {"boxes", "scores", "classes", "edge_std", "error"}
    assert "GFL_SERVE_PATHS=1" in bad["error"]
    frame = {"columns": ["image"], "data": [[content]]}
    for request, reason in (
        ({"inputs": []}, "inputs: got 0 images"),
        (b"{no json", "valid JSON"),
        ({"dataframe_split": frame}, "must be a dictionary with 'inputs' key"),
    ):
        status, text = server.ask(request)
        assert (status, reason in text, "Traceback" in text) == (400, True, False), text
    assert server.ask({"inputs": [content]})[0] == 200
