"""Whatever a configuration holds, it is read, or refused."""

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gfl
from gfl.config.loader import ConfigError, flatten
from gfl_platform.config import load_job

pytestmark = pytest.mark.fuzz
LONG = settings(
    max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
KEYS = sorted(flatten(load_job(DEMO).model_dump(mode="json")))
SECTIONS = [*gfl.Config.model_fields, "base", "run", "cluster", "sweep"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


def load(path, overrides=()):
    with contextlib.suppress(ConfigError):
        load_job(path, overrides)


@LONG
@given(st.sampled_from(KEYS), st.text(max_size=20) | VALUES.map(str))
def test_an_override_may_be_anything(key, text):
    load(DEMO, [f"{key}={text}"])
    load(DEMO, [f"{key}.more={text}"])
    load(DEMO, [text])


@LONG
@given(
    st.dictionaries(
        st.sampled_from([*gfl.Config.model_fields, "base", "run", "cluster", "sweep"]), VALUES
    )
)
def test_a_file_may_hold_anything(tmp_path, content):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content, allow_unicode=True))
    load(tmp_path / "a.yaml")


@LONG
@given(st.data())
def test_a_file_may_be_damaged(tmp_path, data):
    content = DEMO.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 30)))
    text = content[:start] + data.draw(st.binary(max_size=10)) + content[end:]
    (tmp_path / "a.yaml").write_bytes(text)
    load(tmp_path / "a.yaml")
