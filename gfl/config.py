"""The schema of a configuration: all that reproduces a number."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Rgb = tuple[float, float, float]


class Section(BaseModel):
    """A frozen part of the configuration in which an unknown key or a wrong type is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class BackboneConfig(Section):
    """The convolutional body: a torchvision ResNet."""

    name: Literal["resnet18", "resnet34", "resnet50"] = "resnet50"
    pretrained: str | None = None
    """Weights to start from: a local file, or a location that `gfl_platform.storage` can fetch."""
    frozen_stages: Annotated[int, Field(ge=-1, le=4)] = 1
    """Which leading stages do not train: -1 none, 0 the stem, k the stem and the first k stages."""
    norm_eval: bool = True
    """Whether BatchNorm keeps its running statistics fixed in training (the fine-tuning recipe)."""


class ModelConfig(Section):
    """The detector's architecture (`Detector`)."""

    backbone: BackboneConfig = BackboneConfig()
    num_classes: Positive = 80
    channels: Annotated[int, Field(gt=0, multiple_of=8)] = 256
    """Width of the pyramid and of both towers; GroupNorm takes 8 channels a group."""
    tower_convs: Positive = 4
    reg_max: Positive = 16
    """The last bin of an edge distribution, which has `reg_max + 1` bins."""
    bin_width: Annotated[float, Field(gt=0)] = 1.0
    """Delta of table 2c: the distance between neighbouring bins, in strides."""


class QualityFocalConfig(Section):
    """Quality Focal Loss, equation 3."""

    beta: Weight = 2.0
    weight: Weight = 1.0


class BoxLossConfig(Section):
    """A loss on boxes that has nothing to choose but its weight."""

    weight: Weight


class LossConfig(Section):
    """The three losses and their weights."""

    qfl: QualityFocalConfig = QualityFocalConfig()
    giou: BoxLossConfig = BoxLossConfig(weight=2.0)
    dfl: BoxLossConfig = BoxLossConfig(weight=0.25)


class AssignerConfig(Section):
    """ATSS assignment of ground truths to locations."""

    topk: Positive = 9


class PostprocessConfig(Section):
    """From logits to the detections of an image."""

    score_threshold: Share = 0.05
    candidates_per_level: Positive = 1000
    nms_iou: Share = 0.6
    detections_per_image: Positive = 100


class SplitConfig(Section):
    """A set of images with COCO annotations."""

    images: str
    """Folder of the image files."""
    annotations: str
    """COCO JSON file."""


class ShapesConfig(Section):
    """The synthetic set that `gfl.data.shapes` renders before the first use."""

    folder: str
    train: Positive
    val: Positive
    size: Annotated[int, Field(ge=32)] = 128
    seed: Count = 0


class DataConfig(Section):
    """What is trained and evaluated on, and how images are prepared."""

    train: SplitConfig = SplitConfig(
        images="data/coco/train2017", annotations="data/coco/annotations/instances_train2017.json"
    )
    val: SplitConfig = SplitConfig(
        images="data/coco/val2017", annotations="data/coco/annotations/instances_val2017.json"
    )
    shapes: ShapesConfig | None = None
    short_side: Positive = 800
    long_side: Positive = 1333
    """An image is scaled to fit within (long_side, short_side), keeping its aspect ratio."""
    flip: Share = 0.5
    """Probability of a horizontal flip in training."""
    mean: Rgb = (123.675, 116.28, 103.53)
    std: Rgb = (58.395, 57.12, 57.375)
    batch: Positive = 16
    """Training images a step, over all workers."""
    val_batch: Positive = 8
    """Images a forward pass in evaluation; batches do not depend on the number of workers."""
    loader_workers: Count = 2
    """Loading processes of each training worker; 0 loads in the worker itself."""


class OptimConfig(Section):
    """The optimizer."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.01
    """Learning rate for `lr_batch` images a step; it scales linearly with `data.batch`."""
    lr_batch: Positive = 16
    momentum: Share = 0.9
    """Of SGD only."""
    weight_decay: Weight = 1e-4
    bias_lr_factor: Weight = 1.0
    """Learning rate of convolution biases, relative (2 in GFocal's configs)."""
    bias_decay_factor: Weight = 1.0
    """Weight decay of convolution biases, relative (0 in GFocal's configs)."""


class ScheduleConfig(Section):
    """The length of training and the learning rate over it."""

    name: Literal["step", "one_cycle"] = "step"
    epochs: Positive = 12
    warmup_steps: Count = 500
    warmup_start: Share = 1 / 3
    """Share of the rate at the first step; it rises linearly. Of `step` only, like the next two."""
    milestones: tuple[Positive, ...] = (8, 11)
    """Epochs after which the rate is multiplied by `gamma`."""
    gamma: Share = 0.1


class Config(Section):
    """All that reproduces a number."""

    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    assigner: AssignerConfig = AssignerConfig()
    postprocess: PostprocessConfig = PostprocessConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    seed: Count = 0

    @model_validator(mode="after")
    def _sizes_fit(self) -> "Config":
        if self.data.short_side > self.data.long_side:
            raise ValueError(
                f"data.short_side {self.data.short_side} exceeds data.long_side "
                f"{self.data.long_side}: swap them"
            )
        return self
