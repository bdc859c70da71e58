"""Optimizer and learning-rate schedule."""

from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import LambdaLR

from gfl.config.schema import Config, ScheduleConfig
from gfl.rates import lr_factor, scaled_lr


def build_optimizer(detector: nn.Module, config: Config) -> optim.Optimizer:
    """Return the optimizer of every trainable parameter, at the rate scaled to `data.batch`.

    Fused: one kernel for all parameters, which also can be told on the device to skip a step.
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
    """Return the biases that have their own rate: those of deformable offsets do not (mmcv's)."""
    convolutions = [
        module
        for name, module in detector.named_modules()
        if isinstance(module, nn.Conv2d) and not name.endswith("conv_offset")
    ]
    biases = [convolution.bias for convolution in convolutions]
    return [bias for bias in biases if bias is not None and bias.requires_grad]
