"""The protocol of a measurement of speed: all that decides a figure, and what tells two apart.

Most published figures do not compare because nobody knows how they came about: here a record goes
with each, and figures whose records differ are never compared without saying so.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Timing:
    """How fast a variant is.

    Attributes:
        name: Of the variant; "end to end" is from the file to the boxes.
        fps: Images a second over all of them.
        percentiles_ms: Latency of a forward pass and its post-processing, by percentile.
        peak_bytes: Peak memory (`gfl.evaluation.speed.peak_memory`); 0 where it is not measured.
        protocol: How it was measured.
        milliseconds: Each forward pass.
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
        """Of the protocol."""
        return protocol_hash(self.protocol)


@dataclass(frozen=True)
class Benchmark:
    """What was measured of a model.

    Attributes:
        timings: Of each variant.
        parameters: Their number.
        flops: Of one image of `size`, two for each multiplication and addition.
        size: (height, width) of that image, px.
        time_s: When, in seconds since 1970.
    """

    timings: list[Timing]
    parameters: int
    flops: int
    size: tuple[int, int]
    time_s: float

    @property
    def standard(self) -> Timing:
        """GFocal's: one image at a time in float32."""
        return self.timings[0]


IMAGES = 2000
"""How many are measured at most, as GFocal did."""

WARM_UP = 5

Precision = Literal["float32", "bfloat16", "float16"]

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float16")

STATE = "state"
"""Part of a protocol that is recorded but tells none apart: what changes by itself."""

YARDSTICK = "yardstick_mean_ms"
"""Key in a CPU's state: mean time of a fixed convolution, in ms (`gfl.evaluation.speed`)."""


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
