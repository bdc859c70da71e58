"""Whatever a file of weights holds, it is loaded, or refused with a reason, and runs no code."""

import contextlib
import io

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfl.checkpoint.pretrained import load_weights
from gfl.checkpoint.state_dict import read_state_dict
from gfl.model.detector import Detector

pytestmark = pytest.mark.fuzz
LONG = settings(max_examples=400, deadline=None)

SMALL = {
    "head.cls_logits.weight": torch.zeros(3, 8, 3, 3),
    "head.reg_logits.weight": torch.zeros(36, 8, 3, 3),
    "backbone.layer1.0.conv2.weight": torch.zeros(4, 4, 3, 3),
}


def files():
    """Return small files of every format by name."""
    contents = {"safetensors": safetensors.torch.save(SMALL)}
    for name, content, zipped in (
        ("zip", {"state_dict": SMALL, "meta": {"epoch": 3, "lr": [0.1]}}, True),
        ("legacy", SMALL, False),
    ):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
        contents[name] = buffer.getvalue()
    return contents


FILES = files()
EDITS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=9)), max_size=8
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("weights") / "weights.pth"


@pytest.fixture(scope="module")
def detector(tiny):
    return Detector(tiny)


@pytest.mark.parametrize("kind", FILES)
@LONG
@given(edits=EDITS, end=st.floats(0, 1))
def test_a_damaged_file_is_refused_or_read(path, kind, edits, end):
    """Most edits fall near the beginning, where the formats keep their structure."""
    content = bytearray(FILES[kind])
    for place, new in edits:
        start = int(place**2 * len(content))
        content[start : start + len(new)] = new
    path.write_bytes(content[: int(end * len(content)) if end < 0.5 else None])
    with contextlib.suppress(ValueError):
        state = read_state_dict(path)
        assert all(isinstance(value, torch.Tensor) for value in state.values())


@LONG
@given(content=st.binary(max_size=300))
def test_any_bytes_are_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pth: "):
        read_state_dict(path)


VALUES = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    st.lists(st.integers(0, 5), max_size=5),
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64]),
)
OTHERS = VALUES | st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers())


@settings(LONG, max_examples=200)
@given(
    changes=st.dictionaries(st.integers(0, 200), VALUES | st.none(), max_size=4),
    prefix=st.sampled_from(["", "module.", "bbox_head.", "backbone."]),
)
def test_a_state_dict_with_other_entries_is_refused_or_loaded(detector, changes, prefix):
    """None takes an entry out, or leaves what is no entry as it is."""
    state = dict(detector.state_dict())
    keys = list(state)
    for place, value in changes.items():
        key = keys[place % len(keys)]
        if value is None:
            state.pop(key, None)
        else:
            state[key] = value
    with contextlib.suppress(ValueError):
        load_weights(detector, {prefix + key: value for key, value in state.items()})


@LONG
@given(
    content=st.dictionaries(
        st.sampled_from([*SMALL, "state_dict", "bbox_head.integral.project", "conv1.weight", "x"])
        | st.integers(),
        OTHERS | st.dictionaries(st.text(max_size=3), OTHERS, max_size=2),
        max_size=5,
    )
)
def test_a_file_of_any_content_is_refused(detector, path, content):
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"weights\.pth"):
        load_weights(detector, path)
