"""What decides a figure of speed, read from the machine that it is measured on."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from gfl.config.schema import Config
from gfl.data.split import Split, digest_images
from gfl.evaluation.protocol import STATE, WARM_UP, Variant

CLOCKS = ("clocks.sm", "pstate")


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
