"""The protocol of a speed measurement: everything that decides a figure, its hash, and results.

Most published figures cannot be compared because their conditions are unknown. Here every figure
carries its protocol, and figures of different protocols are never compared without a note.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

IMAGES = 2000
"""Largest number of images that are measured, as in GFocal."""

WARM_UP = 5
"""Forward passes before the measurement."""

Precision = Literal["float32", "bfloat16", "float16"]

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float16")

STATE = "state"
"""Key of the part of a protocol that changes by itself: recorded, but not part of the hash."""

YARDSTICK = "yardstick_mean_ms"
"""Key in a CPU's state of the mean time of a fixed convolution, ms (`gfl.evaluation.speed`)."""


@dataclass(frozen=True)
class Variant:
    """One way to run a detector.

    Attributes:
        precision: Precision of the network; post-processing is always in float32.
        channels_last: Whether maps are stored with their channels together.
        compiled: Whether `torch.compile` compiles the network.
        batch: Images per forward pass.
    """

    precision: Precision = "float32"
    channels_last: bool = True
    compiled: bool = False
    batch: int = 1

    @property
    def name(self) -> str:
        """A short name, for example "float32" or "float32-nchw-compiled-batch8"."""
        parts = [
            self.precision,
            "" if self.channels_last else "nchw",
            "compiled" if self.compiled else "",
            f"batch{self.batch}" if self.batch > 1 else "",
        ]
        return "-".join(part for part in parts if part)


@dataclass(frozen=True)
class Timing:
    """The measured speed of a variant.

    Attributes:
        name: Name of the variant; "end to end" is from the file to the boxes.
        fps: Images per second over all images.
        percentiles_ms: Latency of a forward pass with its post-processing in ms, by percentile.
        peak_bytes: Peak memory (`gfl.evaluation.speed.peak_memory`); 0 where it is not measured.
        protocol: Protocol of the measurement.
        milliseconds: Latency of each forward pass with its post-processing, in ms.
        unavailable: Why the variant cannot run here; empty if it can.
    """

    name: str
    fps: float
    percentiles_ms: dict[str, float]
    peak_bytes: int
    protocol: dict[str, Any]
    milliseconds: list[float]
    unavailable: str = ""

    @property
    def hash(self) -> str:
        """Hash of the protocol."""
        return protocol_hash(self.protocol)


@dataclass(frozen=True)
class Benchmark:
    """The measured speed and size of a model.

    Attributes:
        timings: Speed of each variant.
        parameters: Number of parameters.
        flops: Floating-point operations for one image; a multiply-add counts as two.
        size: (height, width) of that image in px.
        time_s: Time of the measurement, in seconds since 1970.
    """

    timings: list[Timing]
    parameters: int
    flops: int
    size: tuple[int, int]
    time_s: float

    @property
    def standard(self) -> Timing:
        """Speed of GFocal's variant: one image at a time in float32."""
        return self.timings[0]


def protocol_hash(protocol: Mapping[str, Any]) -> str:
    """Return the hash that distinguishes protocols, 12 hexadecimal digits."""
    counted = {key: value for key, value in protocol.items() if key != STATE}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:12]


def data_digest(protocol: Mapping[str, Any]) -> str:
    """Return the hash that distinguishes the images and annotations of protocols."""
    digests = protocol["annotations"] + protocol.get("pictures", "")  # absent in old protocols
    return hashlib.sha256(digests.encode()).hexdigest()


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return each entry that differs as "key this -> that"; none if figures can be compared."""
    keys = sorted((one.keys() | other.keys()) - {STATE})
    return [f"{k} {one.get(k)} -> {other.get(k)}" for k in keys if one.get(k) != other.get(k)]
