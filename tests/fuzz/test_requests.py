"""Whatever a request to the served model holds, it gets an answer with a reason."""

import base64
import io
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gfl.checkpoint.files import About
from gfl.checkpoint.snapshot import take_snapshot
from gfl_platform.registry.pyfunc import DetectorModel, InputError
from tests.support.detectors import attentive_detector

pytestmark = pytest.mark.fuzz
LONG = settings(max_examples=300, deadline=None)


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    about = About(["rectangle", "ellipse", "triangle"], [1, 2, 5], 0, 0, {})
    take_snapshot(attentive_detector(tiny), tiny, about, {}).write(folder)
    model = DetectorModel()
    model.load_context(SimpleNamespace(artifacts={"checkpoint": folder}))
    return model


def image_file(form, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (20, 16), 1).save(buffer, form)
    return buffer.getvalue()


GOOD = [image_file(form) for form in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")]
GOOD += [image_file("PNG", mode) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")]
GOOD += [image_file("TIFF", mode) for mode in ("CMYK", "F", "I")]

EDITS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=6)), max_size=6
)


@st.composite
def damaged(draw):
    """Return a good image with some bytes replaced, and perhaps without its end."""
    content = bytearray(draw(st.sampled_from(GOOD)))
    for place, new in draw(EDITS):
        start = int(place * len(content))
        content[start : start + len(new)] = new
    return bytes(content[: draw(st.none() | st.integers(0, len(content)))])


ENTRIES = st.one_of(
    damaged(),
    damaged().map(lambda content: base64.b64encode(content).decode()),
    damaged().map(lambda content: base64.encodebytes(content).decode()),
    damaged().map(lambda content: "data:image/png;base64," + base64.b64encode(content).decode()),
    st.binary(max_size=100),
    st.text(max_size=50),
    st.recursive(st.none() | st.booleans() | st.floats() | st.integers(), st.lists, max_leaves=3),
    st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
    st.sampled_from(
        ["/dev/zero", "/etc/passwd", "file:///etc/passwd", "..", "data:;base64,", "\0"]
    ),
)


@LONG
@given(inputs=st.lists(ENTRIES, max_size=4))
def test_every_image_has_detections_or_a_reason(model, inputs):
    if not inputs:
        with pytest.raises(InputError, match="inputs: got 0 images"):
            model.predict(None, inputs)
        return
    answers = model.predict(None, inputs)
    assert len(answers) == len(inputs)
    for number, answer in enumerate(answers):
        assert answer.error is None or answer.error.startswith(f"image {number}: ")
        assert answer.error is None or (not answer.boxes and len(answer.error) < 1000)
        assert len(answer.boxes) == len(answer.scores) == len(answer.classes)
