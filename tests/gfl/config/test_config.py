"""The configuration: merging, overriding, and what it says of mistakes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gfl
from gfl.config.loader import ConfigError, derive, dump_config, flatten, parse_config

CONFIGS = sorted(Path("configs").rglob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write(text, name="a.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_published_configuration_loads_and_comes_back(path):
    config = gfl.load_config(path)
    assert parse_config(dump_config(config), "copy") == config


def test_defaults_are_the_papers():
    config = gfl.Config()
    assert (config.loss.qfl.weight, config.loss.giou.weight, config.loss.dfl.weight) == (1, 2, 0.25)
    assert (config.loss.qfl.beta, config.model.reg_max, config.assigner.topk) == (2, 16, 9)


def test_mappings_merge_lists_replace_and_the_command_line_wins(write):
    write("loss: {qfl: {beta: 1.0, weight: 3.0}}\nschedule: {milestones: [1, 2, 3]}\n", "base.yaml")
    path = write("base: base.yaml\nloss: {qfl: {beta: 1.5}}\nschedule: {milestones: [7]}\n")
    config = gfl.load_config(path, ["seed=5", "data.mean=[1, 2e0, 3.5]"])
    assert (config.loss.qfl.beta, config.loss.qfl.weight) == (1.5, 3.0)
    assert config.schedule.milestones == (7,)
    assert (config.seed, config.data.mean) == (5, (1.0, 2.0, 3.5))
    assert gfl.load_config(path, ["loss.qfl.beta=4"]).loss.qfl.beta == 4


@given(st.floats(min_value=1e-30, max_value=1e30))
def test_every_way_to_write_a_number_is_read(value):
    config = gfl.load_config("configs/demo.yaml", [f"optim.lr={value!r}"])
    assert config.optim.lr == value
    assert gfl.load_config("configs/demo.yaml", ["optim.lr=1e-2"]).optim.lr == 0.01


def test_sections_of_the_job_are_skipped(write):
    assert gfl.load_config(write("cluster: {workers: 3}\nseed: 4\n")).seed == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss: {qfl: {bta: 2}}", r"a\.yaml: loss\.qfl\.bta: unknown key; did you mean 'beta'\?"),
        ("los: {}", r"los: unknown key; did you mean 'loss'\?"),
        ("model: {reg_max: many}", r"a\.yaml: model\.reg_max: got 'many'"),
        ("model: {reg_max: 0}", r"model\.reg_max: got 0: .*greater than 0"),
        ("schedule: {epochs: 2.5}", r"schedule\.epochs: got 2\.5"),
        ("schedule: {epochs: true}", r"schedule\.epochs: got True"),
        ("optim: {lr: .nan}", r"optim\.lr"),
        ("data: {short_side: 2000}", r"data\.short_side 2000 exceeds data\.long_side 1333"),
        ("model: {backbone: {name: resnet5}}", r"model\.backbone\.name: got 'resnet5'.*resnet50"),
        ("seed: [", r"a\.yaml: not valid YAML"),
        ("just text", r"expected sections and keys"),
        ("seed: 1\nseed: 2", r"'seed' repeated"),
        ("base: a.yaml", r"base: files include each other"),
        ("base: absent.yaml", r"absent\.yaml: cannot be read"),
        ("base: [a, b]", r"expected one relative path"),
    ],
)
def test_a_mistake_is_named_with_its_file(write, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        gfl.load_config(write(text))
    assert "\n" not in str(caught.value)


def test_a_mistake_in_the_base_names_the_base(write):
    write("loss: {qfl: {bta: 1}}", "base.yaml")
    with pytest.raises(ConfigError, match=r"base\.yaml: loss\.qfl\.bta"):
        gfl.load_config(write("base: base.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.qfl.beta", "expected section.key=value"),
        ("loss..beta=1", "expected section.key=value"),
        ("loss.qfl.beta=-1", r"command line: loss\.qfl\.beta: got -1"),
        ("loss.qfl.gamma=1", r"command line: loss\.qfl\.gamma: unknown key"),
        ("seed={", "not valid YAML"),
        ("seed=&a [*a]", "not valid YAML: nested too deeply, or within itself"),
        ("seed=" + "[" * 5000, "not valid YAML"),
    ],
)
def test_a_mistake_on_the_command_line_says_so(override, message):
    with pytest.raises(ConfigError, match=message):
        gfl.load_config("configs/demo.yaml", [override])


@pytest.mark.parametrize("text", ["001", "12_30", "1e3", "20240105", "on", "~x", "a #3", "null"])
def test_a_text_is_what_was_typed(text):
    config = gfl.load_config("configs/demo.yaml", [f"model.pretrained={text}"])
    assert config.model.pretrained == (None if text == "null" else text)


def test_texts_in_a_list_are_what_was_typed():
    config = gfl.load_config("configs/demo.yaml", ["data.classes=[yes,no,007]"])
    assert config.data.classes == ("yes", "no", "007")


def test_a_home_in_a_place_of_data_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = gfl.load_config("configs/demo.yaml", ["data.train.images=~/coco/train"])
    assert config.data.train.images == "/home/me/coco/train"


def test_aliases_that_explode_are_refused(write):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(ConfigError, match="more than 100000 values; expected fewer aliases"):
        gfl.load_config(write("\n".join(lines)))


def test_a_configuration_is_frozen_and_can_be_derived_from():
    config = gfl.Config()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    assert derive(gfl.Config, config, ["seed=3"]).seed == 3
    assert flatten({"a": {"b": 1}, "c": [2]}) == {"a.b": 1, "c": [2]}
