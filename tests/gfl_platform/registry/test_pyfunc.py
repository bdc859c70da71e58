"""The registered model in MLflow's hands: in a process, and behind `mlflow models serve`."""

import base64
import io
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import pytest
from PIL import Image

from gfl_platform.registry import models
from tests.support.tracking import store_of

pytestmark = [pytest.mark.ray]


@pytest.fixture(scope="module")
def image(trained):
    return next(Path(trained[0].data.val.images).iterdir())


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    """The address of a real `mlflow models serve` of the champion."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = store_of(trained[0]).uri
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": uri, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    words = ["models", "serve", "-m", "models:/shapes@champion", "-p", str(port)]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words, "--env-manager", "local"],
            env=environment, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
            break
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.3)
    yield f"http://127.0.0.1:{port}/invocations"
    os.killpg(process.pid, 15)
    process.wait()


def ask(server, content):
    """Return the status and the answer to a request."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    request = urllib.request.Request(server, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def encoded(content):
    return base64.b64encode(content).decode()


def huge_png():
    """A PNG whose header says 50 000 x 50 000 px."""
    parts = [(b"IHDR", struct.pack(">II5B", 50_000, 50_000, 8, 2, 0, 0, 0)), (b"IDAT", b"x")]
    chunks = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_paths_bytes_and_base64_give_the_same_in_a_process(trained, image, monkeypatch):
    job, _, _ = trained
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    store_of(job).require_answer()
    import mlflow
    import pandas as pd

    model = mlflow.pyfunc.load_model("models:/shapes@champion")
    content = image.read_bytes()
    (expected,) = model.predict([str(image)])
    assert expected.boxes
    url = f"data:image/png;base64,{encoded(content)}"
    for form in ([content], [encoded(content)], [url], pd.DataFrame({"image": [str(image)]})):
        assert model.predict(form) == [expected]
    (ours,) = models.load("models:/shapes@champion", store_of(job)).predict(image)
    assert expected.boxes == ours.boxes.tolist()
    assert expected.classes == ours.names
    assert model.metadata.signature is not None


def test_a_server_answers_good_input(server, image):
    content = encoded(image.read_bytes())
    status, answer = ask(server, {"inputs": [content, content]})
    assert status == 200
    one, other = answer["predictions"]
    assert one == other
    assert one.keys() == {"boxes", "scores", "classes", "edge_std"}


def test_a_server_says_what_is_wrong_and_goes_on(server, image):
    content = image.read_bytes()
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    cases = {
        "cannot be read as an image": [encoded(b"not an image")],
        "exceeds limit": [encoded(huge_png())],
        "inputs: empty": [],
        "got an empty string": [""],
        "got int": [7],
        "runcated": [encoded(buffer.getvalue()[:400])],
        "paths are not read by a server": [str(image)],
        "damaged base64": ["data:image/png;base64,%%%"],
    }
    for reason, inputs in cases.items():
        status, answer = ask(server, {"inputs": inputs})
        assert (status, reason in answer) == (400, True), (reason, answer)
        assert "Traceback" not in answer, reason
        assert len(answer) < 1000, reason
    assert ask(server, b"{no json")[0] == 400
    frame = {"columns": ["image"], "data": [[encoded(content)]]}
    status, answer = ask(server, {"dataframe_split": frame})
    assert (status, "must be a dictionary with 'inputs' key" in answer) == (400, True)
    assert ask(server, {"inputs": [encoded(content)]})[0] == 200
