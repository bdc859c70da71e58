"""Learning rates."""

from math import cos, pi

from gfl.config.schema import Config, ScheduleConfig

ONE_CYCLE_RISE = 0.3
"""Share of training in which the one-cycle rate rises (Smith & Topin, 2018; torch's default)."""

ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = 1e-5


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
    """Return the factor at `progress` in 0..1: a cosine up to 1, one down to `ONE_CYCLE_END`."""
    if progress < ONE_CYCLE_RISE:
        start, end, share = ONE_CYCLE_START, 1.0, progress / ONE_CYCLE_RISE
    else:
        share = min(1.0, (progress - ONE_CYCLE_RISE) / (1 - ONE_CYCLE_RISE))
        start, end = 1.0, ONE_CYCLE_END
    return end + (start - end) * (1 + cos(pi * share)) / 2
