"""Latency under a protocol that says all that decides it."""

import shutil

import pytest
import torch
from PIL import Image

import gfl
from gfl.config.loader import derive
from gfl.data.split import load_splits
from gfl.evaluation.protocol import Variant, data_digest, differences, protocol_hash
from gfl.evaluation.speed import (
    UnavailableError,
    _power,
    count_flops,
    count_parameters,
    measure_fps,
    measure_latency,
    peak_memory,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def split(tiny):
    return load_splits(tiny)[1]


@pytest.fixture(scope="module")
def detector(tiny):
    torch.manual_seed(0)
    return gfl.Detector(tiny)


def test_the_protocol_says_what_decides_the_figure(tiny, detector, split):
    fps, protocol = measure_fps(detector, split, tiny, CPU, images=4)
    assert fps > 0
    assert protocol["images"] == 4
    expected = {"device", "driver", "precision", "threads", "torch", "annotations", "postprocess"}
    assert expected <= protocol.keys()
    assert type(protocol["torch"]) is str
    _, again = measure_fps(detector, split, tiny, CPU, images=4)
    assert protocol_hash(again) == protocol_hash(protocol)
    assert protocol_hash(dict(reversed(protocol.items()))) == protocol_hash(protocol)
    assert protocol_hash(protocol | {"state": "hot"}) == protocol_hash(protocol)
    assert differences(protocol, again) == []


def test_few_images_are_measured_again_as_machines_drift(tiny, detector, split):
    def passes(images, at_least_s):
        return len(measure_latency(detector, split, tiny, CPU, Variant(), images, at_least_s)[0])

    assert passes(2000, 0) == len(split.records)
    assert passes(20, 600) == 2 * len(split.records)  # whole rounds: each image counts the same
    assert passes(5, 600) == 5


@pytest.mark.parametrize(
    ("override", "variant", "changed"),
    [
        ("postprocess.nms_iou=0.5", Variant(), "postprocess"),
        ("data.long_side=96", Variant(), "long_side"),
        ("seed=0", Variant("bfloat16"), "precision"),
        ("seed=0", Variant(channels_last=False), "channels_last"),
        ("seed=0", Variant(batch=2), "batch"),
    ],
)
def test_what_changes_the_figure_changes_the_protocol(
    tiny, detector, split, override, variant, changed
):
    _, plain = measure_fps(detector, split, tiny, CPU, images=2)
    other = derive(type(tiny), tiny, [override])
    seconds, protocol = measure_latency(detector, split, other, CPU, variant, 2)
    assert len(seconds) == 2 // variant.batch
    assert protocol_hash(protocol) != protocol_hash(plain)
    (difference,) = differences(plain, protocol)
    assert difference.startswith(f"{changed} ")


def test_another_power_limit_is_another_protocol(tiny, detector, split, monkeypatch):
    _, plain = measure_fps(detector, split, tiny, CPU, images=1)
    assert plain["power"]
    monkeypatch.setattr("gfl.evaluation.speed._power", lambda _: "300.00 W")
    _, other = measure_fps(detector, split, tiny, CPU, images=1)
    assert differences(plain, other) == [f"power {plain['power']} -> 300.00 W"]
    assert protocol_hash(plain) != protocol_hash(other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_power_limit_of_a_gpu_is_read():
    assert _power(torch.device("cuda", 0)).endswith(" W")


def test_another_picture_is_another_protocol(tiny, detector, shapes_folder, tmp_path):
    val = shutil.copytree(shapes_folder / "val", tmp_path / "val")
    section = f"data.val={{images: {val}/images, annotations: {val}/annotations.json}}"
    config = derive(type(tiny), tiny, [section])
    protocols = []
    for _ in range(2):
        copied = load_splits(config)[1]
        protocols.append(measure_fps(detector, copied, config, CPU, images=1)[1])
        last = copied.records[-1].path  # also one that no time is taken of
        Image.open(last).transpose(Image.Transpose.ROTATE_180).save(last)
    assert len(set(map(data_digest, protocols))) == 2
    (difference,) = differences(*protocols)
    assert difference.startswith("pictures ")
    assert data_digest({"annotations": protocols[0]["annotations"]})  # as older sweeps kept it


def test_a_variant_leaves_the_detector_as_it_was(tiny, detector, split):
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    detector.train()
    for variant in (Variant("bfloat16"), Variant(channels_last=False)):
        measure_latency(detector, split, tiny, CPU, variant, 1)
    assert detector.training
    assert all(torch.equal(before[key], value) for key, value in detector.state_dict().items())
    with pytest.raises(UnavailableError, match="a batch of 64 needs as many images"):
        measure_latency(detector, split, tiny, CPU, Variant(batch=64), 100)


def test_peaks_are_of_what_is_measured():

    def peak(size):
        with peak_memory(CPU) as peak:
            torch.ones(size, dtype=torch.uint8).sum()
        return peak["bytes"]

    assert peak(100 * 2**20) - peak(1) > 97.5 * 2**20  # the larger one first: it is forgotten


def test_parameters_and_operations_are_counted(detector):
    conv = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
    assert count_parameters(conv) == 3 * 8 * 9
    small, large = count_flops(detector, 64, 64), count_flops(detector, 128, 128)
    assert large == pytest.approx(4 * small, rel=0.05)
    backbone = 1.82e9 * 2 * (64 / 224) ** 2  # ResNet-18: 1.8 G multiply-adds at 224 px
    assert small > 0.9 * backbone


def test_deformable_convolutions_count_as_others_do(tiny):
    def body(deformable):
        name = f"model.backbone={{name: resnet50, deformable: {deformable}}}"
        return gfl.Detector(derive(type(tiny), tiny, [name]))

    plain, deformed = body("null"), body("{version: 2, stages: [5]}")
    offsets = sum(
        2 * module.weight.numel() * 2 * 2  # maps of stage 5 are 2 x 2 for 64 px
        for name, module in deformed.named_modules()
        if name.endswith("offset")
    )
    assert offsets > 0
    assert count_flops(deformed, 64, 64) == count_flops(plain, 64, 64) + offsets
