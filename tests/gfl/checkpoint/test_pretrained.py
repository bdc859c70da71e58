"""Reading weights, strictly."""

import json
import pickle
from collections import defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torchvision.models import resnet18

import gfl
from gfl.config.loader import derive
from tests.golden import recipe


@pytest.fixture(scope="module")
def reference_weights(golden):
    shapes = json.loads((golden / "gfl_r50_1x.keys.json").read_text())
    return {key: recipe.weight(key, shape) for key, shape in shapes.items()}


def test_conversion_takes_every_entry_of_the_reference_but_the_bins(reference_weights):
    converted = gfl.convert_mmdet(reference_weights)
    assert len(converted) == len(reference_weights) - 1
    detector = gfl.Detector(gfl.load_config("configs/gfl_r50_1x.yaml"))
    assert set(converted) == set(detector.state_dict())


@pytest.mark.parametrize(
    "key",
    ["bbox_head.scales.4.scale", "neck.fpn_convs.3.conv.bias", "backbone.layer3.2.conv2.weight",
     "backbone.layer1.0.bn1.running_var", "bbox_head.reg_convs.3.gn.bias",
     "bbox_head.gfl_cls.bias"],
)  # fmt: skip
def test_conversion_refuses_what_lacks_an_entry(reference_weights, key):
    incomplete = {k: v for k, v in reference_weights.items() if k != key}
    with pytest.raises(ValueError, match=rf"missing.*{key}"):
        gfl.convert_mmdet(incomplete)


def test_conversion_refuses_what_it_does_not_know(reference_weights):
    with pytest.raises(ValueError, match=r"not entries.*bbox_head\.atss_centerness\.weight"):
        gfl.convert_mmdet({**reference_weights, "bbox_head.atss_centerness.weight": torch.zeros(1)})


def test_conversion_refuses_other_bins(reference_weights):
    other = {**reference_weights, "bbox_head.integral.project": torch.arange(17) * 2.0}
    with pytest.raises(ValueError, match="expected bins"):
        gfl.convert_mmdet(other)


def test_own_weights_come_back_bit_by_bit(tiny, tmp_path):
    saved, other = gfl.Detector(tiny), gfl.Detector(tiny)
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pth"):
        if path.suffix == ".pth":
            torch.save({"state_dict": saved.state_dict()}, path)
        else:
            safetensors.torch.save_file(saved.state_dict(), path)
        report = gfl.load_weights(other, path)
        assert str(path) in report
        for key, value in saved.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key


def test_an_imagenet_classifier_fills_the_backbone(tiny, tmp_path):
    detector, classifier = gfl.Detector(tiny), resnet18()
    torch.save(classifier.state_dict(), tmp_path / "resnet18.pth")
    head = detector.head.cls_logits.weight.clone()
    gfl.load_weights(detector, tmp_path / "resnet18.pth")
    assert torch.equal(detector.backbone.layer4[1].conv2.weight, classifier.layer4[1].conv2.weight)
    assert torch.equal(detector.head.cls_logits.weight, head)


def test_weights_of_another_model_are_refused(tiny):
    detector = gfl.Detector(tiny)
    state = detector.state_dict()
    with pytest.raises(ValueError, match=r"entries missing: head\.scales\.4"):
        gfl.load_weights(detector, {k: v for k, v in state.items() if k != "head.scales.4"})
    with pytest.raises(ValueError, match="no place for: extra"):
        gfl.load_weights(detector, {**state, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"num_classes 7, the model has 3.*reset_classifier"):
        gfl.load_weights(detector, {**state, "head.cls_logits.weight": torch.zeros(7, 32, 3, 3)})


def test_weights_for_other_classes_are_taken_without_their_classifier(tiny):
    config = derive(type(tiny), tiny, ["model.num_classes=7"])
    seven, detector = gfl.Detector(config), gfl.Detector(tiny)
    classifier = detector.head.cls_logits.weight.clone()
    report = gfl.load_weights(detector, seven.state_dict(), reset_classifier=True)
    assert "2 of the model's stay as initialised" in report
    assert torch.equal(detector.head.cls_logits.weight, classifier)
    assert torch.equal(detector.head.reg_logits.weight, seven.head.reg_logits.weight)
    again = gfl.load_weights(detector, gfl.Detector(tiny).state_dict(), reset_classifier=True)
    assert "2 of the model's stay as initialised" in again


def test_weights_of_another_architecture_are_told_by_what_differs(reference_weights):
    detector = gfl.Detector(gfl.load_config("configs/gfl_r18_1x.yaml", ["model.reg_max=8"]))
    with pytest.raises(ValueError, match=r"name resnet50, the model has resnet18; .*reg_max 16"):
        gfl.load_weights(detector, reference_weights)


def test_a_classifier_fills_the_body_and_leaves_offsets_at_zero(tiny):
    deformable = "model.backbone.deformable={version: 2, stages: [4, 5]}"
    detector = gfl.Detector(derive(type(tiny), tiny, [deformable]))
    state = resnet18().state_dict()
    gfl.load_weights(detector, state)
    loaded = detector.backbone.state_dict()
    for key, value in state.items():
        if not key.startswith("fc."):
            assert torch.equal(loaded[key], value), key
    left = {key for key in loaded if key not in state}
    assert left
    assert all("conv_offset" in key and not loaded[key].any() for key in left)


def test_offsets_beside_their_convolution_are_those_of_old_checkpoints(golden):
    shapes = json.loads((golden / "gfl_r101_dcnv2_ms2x.keys.json").read_text())
    state = {key: torch.zeros(shape) for key, shape in shapes.items()}
    state["bbox_head.integral.project"] = torch.arange(17.0)
    old = {key.replace("conv2.conv_offset", "conv2_offset"): v for key, v in state.items()}
    assert old.keys() != state.keys()
    assert gfl.convert_mmdet(old).keys() == gfl.convert_mmdet(state).keys()


class Foreign:
    """Stands for a class that unpickling would build."""

    def __init__(self):
        self.numbers = np.arange(3)


class ForeignDictionary(dict):
    """Stands for a configuration's class."""


class Harmful:
    """Stands for an object that runs code when it is unpickled."""

    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('harm').touch()",))


@pytest.mark.parametrize("zipped", [True, False])
def test_foreign_objects_beside_the_weights_are_skipped(tiny, tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    saved, other = gfl.Detector(tiny), gfl.Detector(tiny)
    content = {
        "meta": {"config": ForeignDictionary(lr=1), "hook": Foreign(), "harm": Harmful()},
        "epochs": range(12),  # of another name in pickle's protocol 2
        "state_dict": saved.state_dict(),
        "message_hub": {
            "history": [Foreign(), np.float64(1), deque([1]), defaultdict(list, a=[1])]
        },
    }
    torch.save(content, "published.pth", _use_new_zipfile_serialization=zipped)
    gfl.load_weights(other, "published.pth")
    for key, value in saved.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert not Path("harm").exists()


def test_files_that_cannot_be_read_safely_are_refused(tiny, tmp_path):
    detector = gfl.Detector(tiny)
    with pytest.raises(ValueError, match="no such weights file"):
        gfl.load_weights(detector, tmp_path / "absent.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"is no weights file \(begins with b'not weights'\)"):
        gfl.load_weights(detector, tmp_path / "broken.safetensors")
    torch.save(detector, tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"could run code when read; save the state dict alone"):
        gfl.load_weights(detector, tmp_path / "whole.pth")
    torch.save({"state_dict": {"a": Foreign()}}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match=r"'a' is no tensor"):
        gfl.load_weights(detector, tmp_path / "foreign.pth")
    (tmp_path / "text.pth").write_text("it is not")
    with pytest.raises(ValueError, match=r"text\.pth"):
        gfl.load_weights(detector, tmp_path / "text.pth")
    for content, reason in (
        (b"", "is empty; fetch it again"),
        (
            b"\n <!DOCTYPE html><html>Sign in</html>",
            "is a web page, not weights; download",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "is a pointer of git LFS, not",
        ),
        (b"\x09\0\0\0\0\0\0\0{not json", r"not a readable weights file \(.*header"),
    ):
        (tmp_path / "page.pth").write_bytes(content)
        with pytest.raises(ValueError, match=rf"page\.pth: {reason}"):
            gfl.load_weights(detector, tmp_path / "page.pth")
    for empty in ({}, {"state_dict": {}}):
        torch.save(empty, tmp_path / "empty.pth")
        with pytest.raises(ValueError, match="the state dict is empty"):
            gfl.load_weights(detector, tmp_path / "empty.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": Foreign()}, protocol=2))
    with pytest.raises(ValueError, match=r"plain\.pth"):
        gfl.load_weights(detector, tmp_path / "plain.pth")


def test_the_content_of_a_file_tells_its_format_and_not_its_name(tiny, tmp_path):
    saved = gfl.Detector(tiny)
    safetensors.torch.save_file(saved.state_dict(), tmp_path / "a.pth")
    torch.save(saved.state_dict(), tmp_path / "b.safetensors")
    for name in ("a.pth", "b.safetensors"):
        other = gfl.Detector(tiny)
        gfl.load_weights(other, tmp_path / name)
        assert torch.equal(other.head.cls_logits.weight, saved.head.cls_logits.weight)
