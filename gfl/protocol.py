"""The protocol of a measurement of speed: all that decides a figure, and what tells two apart.

Most published figures do not compare because nobody knows how they came about: here a record goes
with each, and figures whose records differ are never compared without saying so.
"""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gfl.config import Config
from gfl.data.split import Split, digest_images

WARM_UP = 5

Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float16")

STATE = "state"
"""Part of a protocol that is recorded but tells none apart: what changes by itself."""

CLOCKS = ("clocks.sm", "pstate")


@dataclass(frozen=True)
class Variant:
    """One way to run a detector.

    Attributes:
        precision: Of the network; post-processing is in float32.
        channels_last: Whether maps are stored with their channels together.
        compiled: Whether the network is compiled by `torch.compile`.
        batch: Images a forward pass.
    """

    precision: Precision = "float32"
    channels_last: bool = True
    compiled: bool = False
    batch: int = 1

    @property
    def name(self) -> str:
        """A short name, "float32" or "float32-nchw-compiled-batch8"."""
        parts = [self.precision, "" if self.channels_last else "nchw"]
        parts += ["compiled" if self.compiled else "", f"batch{self.batch}" * (self.batch > 1)]
        return "-".join(part for part in parts if part)


def record(
    split: Split, config: Config, device: torch.device, variant: Variant, images: int
) -> dict[str, Any]:
    """Return the protocol of a measurement of `images` images of `split` on `device`."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "driver": _nvidia_smi("driver_version", device) if on_gpu else platform.release(),
        "power": _power(device),
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": _cudnn() if on_gpu else None,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),  # no `TorchVersion`: who reads it need not import torch
        "precision": variant.precision,
        "channels_last": variant.channels_last,
        "compiled": variant.compiled,
        "batch": variant.batch,
        "warm_up": WARM_UP,
        "images": images,
        "annotations": split.digest,
        "pictures": digest_images(split),
        "short_side": config.data.short_side,
        "long_side": config.data.long_side,
        "postprocess": config.postprocess.model_dump(mode="json"),
        STATE: {what: _nvidia_smi(what, device) for what in CLOCKS} if on_gpu else {},
    }


def _cudnn() -> dict[str, Any]:
    """Return what decides how convolutions are done on a GPU."""
    cudnn = torch.backends.cudnn
    precision = cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return {
        "version": cudnn.version(),
        "float32": os.environ.get("NVIDIA_TF32_OVERRIDE", "") + precision,
        "benchmark": cudnn.benchmark,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"cpu: {names[0] if names else platform.machine()}"


def _power(device: torch.device) -> str:
    """Return what bounds the clocks: the power limit of a GPU, a CPU's governor."""
    if device.type == "cuda":
        return _nvidia_smi("power.limit", device)
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return governor.read_text().strip() if governor.exists() else "unknown"


def _nvidia_smi(what: str, device: torch.device) -> str:
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def protocol_hash(protocol: Mapping[str, Any]) -> str:
    """Return what tells protocols apart: 12 hexadecimal digits."""
    counted = {key: value for key, value in protocol.items() if key != STATE}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:12]


def data_digest(protocol: Mapping[str, Any]) -> str:
    """Return what tells apart the images and annotations that protocols are of."""
    known = protocol["annotations"] + protocol.get("pictures", "")  # which older ones lack
    return hashlib.sha256(known.encode()).hexdigest()


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return where two protocols differ, "key this -> that" each; empty: figures compare."""
    keys = sorted((one.keys() | other.keys()) - {STATE})
    return [f"{k} {one.get(k)} -> {other.get(k)}" for k in keys if one.get(k) != other.get(k)]
