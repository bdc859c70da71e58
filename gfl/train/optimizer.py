"""Optimizer and learning-rate schedule."""

from copy import deepcopy
from math import cos, pi

import torch
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gfl.config.schema import Config, ScheduleConfig
from gfl.model.detector import Detector


class Average:
    """The average of a detector's weights and statistics over its training.

    It is torch's `AveragedModel` without the count of steps, which `AveragedModel` copies from the
    host to the device in every step: the host would wait for the device.

    Attributes:
        detector: A detector with the averaged weights and statistics.
    """

    def __init__(self, detector: Detector, decay: float) -> None:
        """Start with the present weights; each step multiplies the average by `decay`."""
        self.detector = deepcopy(detector).requires_grad_(False)
        self._update = get_ema_multi_avg_fn(decay)

    def add(self, detector: Detector) -> None:
        """Add the present weights of `detector` to the average; counters are copied."""
        averages, present = self.detector.state_dict().values(), detector.state_dict().values()
        pairs = list(zip(averages, present, strict=True))
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        self._update([a for a, _ in floating], [p for _, p in floating], torch.empty(0))
        for counter, now in pairs:
            if not counter.is_floating_point():
                counter.copy_(now)


ONE_CYCLE_RISE = 0.3
"""Share of training in which the one-cycle rate rises (Smith & Topin, 2018; torch's default)."""

ONE_CYCLE_START = 1 / 25
"""First rate of the one-cycle schedule, relative to its peak."""

ONE_CYCLE_END = 1e-5
"""Last rate of the one-cycle schedule, relative to its peak."""


def scaled_lr(config: Config) -> float:
    """Return the peak learning rate for `data.batch` images a step (linear: Goyal et al., 2017)."""
    return config.optim.lr * config.data.batch / config.optim.lr_batch


def lr_factor(step: int, config: ScheduleConfig, steps_per_epoch: int) -> float:
    """Return the learning rate at `step` (from 0), relative to its peak."""
    if config.name == "one_cycle":
        return _one_cycle(step / max(1, config.epochs * steps_per_epoch - 1))
    factor = config.gamma ** sum(step >= epoch * steps_per_epoch for epoch in config.milestones)
    if step < config.warmup_steps:
        factor *= config.warmup_start + (1 - config.warmup_start) * step / config.warmup_steps
    return factor


def _one_cycle(progress: float) -> float:
    """Return the factor at `progress` in 0..1: it rises to 1 and falls, both along a cosine."""
    if progress < ONE_CYCLE_RISE:
        start, end, share = ONE_CYCLE_START, 1.0, progress / ONE_CYCLE_RISE
    else:
        share = min(1.0, (progress - ONE_CYCLE_RISE) / (1 - ONE_CYCLE_RISE))
        start, end = 1.0, ONE_CYCLE_END
    return end + (start - end) * (1 + cos(pi * share)) / 2


def build_optimizer(detector: nn.Module, config: Config) -> optim.Optimizer:
    """Return the optimizer of every trainable parameter, at the rate scaled to `data.batch`.

    It is fused: one kernel steps all parameters, and a tensor on the device can skip the step.
    """
    lr = scaled_lr(config)
    decay = config.optim.weight_decay
    biases = _convolution_biases(detector)
    bias_ids = {id(bias) for bias in biases}
    others = [p for p in detector.parameters() if p.requires_grad and id(p) not in bias_ids]
    groups = [
        {"params": others, "lr": lr, "weight_decay": decay},
        {
            "params": biases,
            "lr": lr * config.optim.bias_lr_factor,
            "weight_decay": decay * config.optim.bias_decay_factor,
        },
    ]
    if config.optim.name == "sgd":
        return optim.SGD(groups, lr=lr, momentum=config.optim.momentum, fused=True)
    return optim.AdamW(groups, lr=lr, fused=True)


def build_scheduler(
    optimizer: optim.Optimizer, config: ScheduleConfig, steps_per_epoch: int
) -> LambdaLR:
    """Return the scheduler, to be stepped once a training step."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, config, steps_per_epoch))


def _convolution_biases(detector: nn.Module) -> list[Tensor]:
    """Return the biases of convolutions; as in mmcv, those of deformable offsets do not count."""
    convolutions = [
        module
        for name, module in detector.named_modules()
        if isinstance(module, nn.Conv2d) and not name.endswith("conv_offset")
    ]
    biases = [convolution.bias for convolution in convolutions]
    return [bias for bias in biases if bias is not None and bias.requires_grad]
