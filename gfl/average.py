"""An exponential moving average of a detector's weights."""

from copy import deepcopy

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gfl.model.detector import Detector


class Average:
    """The average of a detector's weights and statistics over its training.

    torch's `AveragedModel` keeps its count on the host and copies it to the device in every step,
    which waits for the device; this one needs no count.

    Attributes:
        detector: The average, as a detector of its own.
    """

    def __init__(self, detector: Detector, decay: float) -> None:
        """Start from the present weights; each step keeps `decay` of the average."""
        self.detector = deepcopy(detector).requires_grad_(False)
        self._fold = get_ema_multi_avg_fn(decay)

    def add(self, detector: Detector) -> None:
        """Fold in the present weights of `detector`; counters are taken over."""
        pairs = list(zip(self.detector.state_dict().values(), detector.state_dict().values(),
                         strict=True))  # fmt: skip
        average, present = zip(*(p for p in pairs if p[0].is_floating_point()), strict=True)
        self._fold(list(average), list(present), torch.empty(0))
        for counter, now in pairs:
            if not counter.is_floating_point():
                counter.copy_(now)
