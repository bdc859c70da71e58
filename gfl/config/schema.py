"""The schema of a configuration: everything that reproduces a number."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Scale = Annotated[float, Field(ge=0.1, le=10)]
Rgb = tuple[float, float, float]


class Section(BaseModel):
    """A frozen part of the configuration in which an unknown key or a wrong type is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DeformableConfig(Section):
    """Deformable convolution in place of the 3x3 of every block (Dai et al., 2017; v2 2019)."""

    version: Literal[1, 2] = 2
    """1: offsets only; 2: modulated, each sample weighted by a mask too."""
    stages: tuple[Annotated[int, Field(ge=2, le=5)], ...] = (3, 4, 5)
    """Stages with deformable convolution, by the map they compute: 3 is C3."""


class BackboneConfig(Section):
    """The convolutional body: a torchvision ResNet."""

    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnext101_32x4d"] = "resnet50"
    deformable: DeformableConfig | None = None
    frozen_stages: Annotated[int, Field(ge=-1, le=4)] = 1
    """Leading stages that do not train: -1 none, 0 the stem, k the stem and the first k stages."""
    norm_eval: bool = True
    """Whether BatchNorm keeps its running statistics fixed in training (the fine-tuning recipe)."""
    sync_norm: bool = False
    """Whether BatchNorm's training statistics are those of all workers together (GPUs only)."""
    checkpoint_gradients: bool = False
    """Whether blocks are computed again in the backward pass instead of kept in memory."""

    @model_validator(mode="after")
    def _norms_fit(self) -> "BackboneConfig":
        if self.sync_norm and self.norm_eval:
            raise ValueError(
                "model.backbone.sync_norm: norm_eval leaves no statistics to share; "
                "set model.backbone.norm_eval=false"
            )
        return self


class QualityPredictorConfig(Section):
    """GFLv2: scores times a quality read off the edge distributions (Li et al., CVPR 2021)."""

    topk: Positive = 4
    """Number of highest probabilities of each edge's distribution that it reads, and their mean."""
    hidden: Positive = 64
    """Width of the hidden layer."""


class ModelConfig(Section):
    """The detector's architecture (`Detector`)."""

    backbone: BackboneConfig = BackboneConfig()
    pretrained: str | None = None
    """Weights to start from, for the backbone or everything: a file, URL, `s3://`, or model."""
    reset_classifier: bool = False
    """Whether to load weights for other classes, without the last layer of the classification."""
    num_classes: Positive = 80
    channels: Annotated[int, Field(gt=0, multiple_of=8)] = 256
    """Width of the pyramid and of both towers; a group of GroupNorm has 8 channels."""
    tower_convs: Positive = 4
    """Number of convolutions in each tower."""
    reg_max: Positive = 16
    """Last bin of an edge distribution, which has `reg_max + 1` bins."""
    bin_width: Annotated[float, Field(gt=0)] = 1.0
    """Distance between neighbouring bins in strides (Delta in table 2c of the paper)."""
    edges: Literal["distribution", "dirac"] = "distribution"
    """Form in which edges are learned: a distribution over bins, or a distance alone (table 3)."""
    quality: Literal["joint", "centerness"] = "joint"
    """Scores that learn the boxes' IoU, or a second branch for centerness as in ATSS (table 3)."""
    quality_predictor: QualityPredictorConfig | None = None
    """GFLv2's quality predictor; none by default."""

    @property
    def bins(self) -> int:
        """Number of outputs of the network for each edge."""
        return self.reg_max + 1 if self.edges == "distribution" else 1

    @model_validator(mode="after")
    def _quality_predictor_fits(self) -> "ModelConfig":
        if self.quality_predictor and (self.edges, self.quality) != ("distribution", "joint"):
            raise ValueError(
                "model.quality_predictor needs model.edges=distribution and model.quality=joint, "
                f"not {self.edges} and {self.quality}"
            )
        if self.quality_predictor and self.quality_predictor.topk > self.bins:
            raise ValueError(
                f"model.quality_predictor.topk {self.quality_predictor.topk} exceeds the "
                f"{self.bins} bins of model.reg_max {self.reg_max}: lower it"
            )
        return self


class QualityFocalConfig(Section):
    """Quality Focal Loss, equation 3."""

    beta: Weight = 2.0
    """Exponent of the modulating factor; 0 is plain binary cross-entropy."""
    weight: Weight = 1.0


class WeightConfig(Section):
    """A loss whose only parameter is its weight."""

    weight: Weight


class DistillationConfig(Section):
    """Localisation distillation (Zheng et al., CVPR 2022): also learn a teacher's distributions."""

    teacher: str
    """Checkpoint of the teacher: its folder, `models:/NAME@ALIAS`, or another form of a model."""
    temperature: Annotated[float, Field(gt=0)] = 10.0
    weight: Weight = 0.5
    """Weight of the mean over images; the authors' 0.25 weighs the sum over the two of a GPU."""


class LossConfig(Section):
    """The losses and their weights; `model.edges` and `model.quality` decide which are used."""

    qfl: QualityFocalConfig = QualityFocalConfig()
    focal: WeightConfig = WeightConfig(weight=1.0)
    """Focal loss, in place of `qfl` with `model.quality: centerness`."""
    centerness: WeightConfig = WeightConfig(weight=1.0)
    """Loss of centerness, with `model.quality: centerness`."""
    giou: WeightConfig = WeightConfig(weight=2.0)
    dfl: WeightConfig = WeightConfig(weight=0.25)
    """Distribution Focal Loss, with `model.edges: distribution`."""
    distillation: DistillationConfig | None = None


class AssignerConfig(Section):
    """ATSS assignment of ground truths to locations."""

    topk: Positive = 9
    """Number of candidates per ground truth and level."""


class PostprocessConfig(Section):
    """The selection of an image's detections."""

    score_threshold: Share = 0.05
    """Detections have scores above it."""
    candidates_per_level: Positive = 1000
    """Largest number of candidates (location and class) on each level, before NMS."""
    nms_iou: Share = 0.6
    """IoU above which NMS removes the worse of two boxes of a class."""
    detections_per_image: Positive = 100
    """Largest number of detections of an image, after NMS."""


class SplitConfig(Section):
    """A set of annotated images."""

    images: str
    """Folder of the image files."""
    annotations: str
    """COCO JSON file, or the folder of VOC XML or YOLO txt files."""

    @field_validator("images", "annotations")
    @classmethod
    def _home_is_expanded(cls, place: str) -> str:
        return str(Path(place).expanduser()) if place.startswith("~") else place


class ShapesConfig(Section):
    """The synthetic set that `gfl.data.synthetic` renders before the first use."""

    folder: str
    train: Positive
    """Number of training images."""
    val: Positive
    """Number of evaluation images."""
    size: Annotated[int, Field(ge=32)] = 128
    """Side of the square images, in px."""
    seed: Count = 0


class TilesConfig(Section):
    """Square windows of large images, which take the place of images."""

    size: Annotated[int, Field(ge=32)]
    """Side of a tile in px of the image; a smaller image is one tile."""
    overlap: Count
    """Smallest overlap of neighbouring tiles in px: about the size of the objects, or more."""

    @model_validator(mode="after")
    def _tiles_advance(self) -> "TilesConfig":
        if self.overlap >= self.size:
            raise ValueError(
                f"data.tiles.overlap {self.overlap} is not below data.tiles.size {self.size}: "
                "lower it"
            )
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "coco": {},
    "light": {"scale_jitter": (0.8, 1.25), "photometric": 0.5},
    "strong": {
        "scale_jitter": (0.5, 2.0),
        "iou_crop": 0.05,
        "zoom_out": 0.05,
        "photometric": 0.3,
        "blur": 0.01,
        "jpeg": 0.02,
        "mosaic": 0.05,
        "mixup": 0.03,
        "close_epochs": 2,
    },
    "aerial": {
        "flip_vertical": 0.5,
        "quarter_turn": 0.75,
        "scale_jitter": (0.8, 1.25),
        "photometric": 0.5,
    },
}
"""Values of `data.augment` by preset, where they differ from the defaults."""


class AugmentConfig(Section):
    """Random changes of training images; keys without a range are probabilities."""

    preset: Literal["coco", "light", "strong", "aerial"] = "coco"
    """Values of all other keys of this section, each of which a key of its own overrides."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""
    flip_vertical: Share = 0.0
    """Probability of a vertical flip."""
    quarter_turn: Share = 0.0
    """Probability of a rotation by 90, 180 or 270 degrees, all alike."""
    scale_jitter: tuple[Scale, Scale] | None = None
    """Range of a zoom: above 1 a random part of the image, below 1 the image on a black canvas."""
    iou_crop: Share = 0.0
    """Probability of a crop that keeps a share of some object (Liu et al., SSD, ECCV 2016)."""
    zoom_out: Share = 0.0
    """Probability of a black canvas of up to twice the image's sides (SSD)."""
    affine: Share = 0.0
    """Probability of a rotation by up to 10 degrees and a shear by up to 5."""
    photometric: Share = 0.0
    """Probability of other brightness, contrast, saturation and hue."""
    blur: Share = 0.0
    """Probability of Gaussian blur with a standard deviation from 0.3 to 1.5 px."""
    jpeg: Share = 0.0
    """Probability of JPEG compression with a quality from 30 to 90."""
    mosaic: Share = 0.0
    """Probability of a picture of this and three other images of the set."""
    mixup: Share = 0.0
    """Probability of a blend with another image of the set."""
    close_epochs: Count = 0
    """Number of last epochs without mosaic and mixup."""
    visible: Share = 0.25
    """Smallest visible share of an object's box, by area, with which a cut object is taught."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        merged = {**PRESETS.get(str(values.get("preset")), {}), **values}
        # What a validator returns counts as Python values, where a list is no tuple.
        return {key: tuple(v) if isinstance(v, list) else v for key, v in merged.items()}

    @model_validator(mode="after")
    def _jitter_is_a_range(self) -> "AugmentConfig":
        if self.scale_jitter and self.scale_jitter[0] > self.scale_jitter[1]:
            raise ValueError(
                f"data.augment.scale_jitter {list(self.scale_jitter)}: expected [smallest, "
                "largest] factor; swap them"
            )
        return self


class DataConfig(Section):
    """The training and evaluation sets, and the preparation of images."""

    format: Literal["coco", "voc", "yolo"] = "coco"
    classes: tuple[str, ...] | None = None
    """Class names in the order of labels, for formats that do not define them."""
    train: SplitConfig = SplitConfig(
        images="data/coco/train2017", annotations="data/coco/annotations/instances_train2017.json"
    )
    val: SplitConfig = SplitConfig(
        images="data/coco/val2017", annotations="data/coco/annotations/instances_val2017.json"
    )
    shapes: ShapesConfig | None = None
    tiles: TilesConfig | None = None
    """Tiles in place of whole images, scaled like images; none by default."""
    short_side: Positive = 800
    """Largest short side of a scaled image, in px; see `long_side`."""
    long_side: Positive = 1333
    """Largest long side in px. Images are scaled to fit within both, keeping the aspect ratio."""
    multi_scale: tuple[Positive, Positive] | None = None
    """Range from which training draws each image's short side (px), in place of `short_side`."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of training images, before they are scaled."""
    mean: Rgb = (123.675, 116.28, 103.53)
    """Mean of RGB pixels in 0..255, subtracted from the network's input."""
    std: Rgb = (58.395, 57.12, 57.375)
    """Standard deviation of RGB pixels in 0..255, by which the network's input is divided."""
    batch: Positive = 16
    """Training images per step, over all workers."""
    images_per_pass: Positive | None = None
    """Largest number of images in a worker's micro-batch; gradients accumulate."""
    group_by_aspect: bool = True
    """Whether wide and tall images go into separate batches, which saves padding."""
    repeat: Positive = 1
    """Number of times that an epoch shows every image."""
    oversample: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of images below which a class is repeated (t in Gupta et al., CVPR 2019, LVIS)."""
    cache: str | None = None
    """Folder that keeps decoded images; none by default."""
    val_batch: Positive = 8
    """Images per forward pass in evaluation, whatever the number of workers."""
    loader_workers: Count = 2
    """Loading processes of each training worker; 0 loads in the worker itself."""


class OptimConfig(Section):
    """The optimizer."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.01
    """Learning rate for `lr_batch` images per step; it scales linearly with `data.batch`."""
    lr_batch: Positive = 16
    """Images per step to which `lr` refers."""
    momentum: Share = 0.9
    """Momentum of SGD; AdamW ignores it."""
    weight_decay: Weight = 1e-4
    bias_lr_factor: Weight = 1.0
    """Learning rate of convolution biases, relative to `lr` (2 in GFocal's configs)."""
    bias_decay_factor: Weight = 1.0
    """Weight decay of convolution biases, relative to `weight_decay` (0 in GFocal's configs)."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network in training; losses are always computed in float32."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient; larger gradients are scaled down to it."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, which is evaluated and kept."""
    compile: bool = False
    """Whether the training step is compiled."""


class ScheduleConfig(Section):
    """The length of training and the learning rate over it."""

    name: Literal["step", "one_cycle"] = "step"
    epochs: Positive = 12
    warmup_steps: Count = 500
    warmup_start: Share = 1 / 3
    """Share of the learning rate at the first step of `step`'s warm-up, which rises linearly."""
    milestones: tuple[Positive, ...] = (8, 11)
    """Epochs after which `step` multiplies the learning rate by `gamma`."""
    gamma: Share = 0.1
    """Factor of the learning rate after each milestone of `step`."""
    patience: Positive | None = None
    """Number of epochs without a better AP after which training stops early; none by default."""


class EvaluationConfig(Section):
    """The measurement of average precision."""

    max_detections: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 10, 100)
    """Limits on an image's detections, COCO's AR1, AR10, AR100; AP uses the largest."""


class Config(Section):
    """A configuration: everything that reproduces a number."""

    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    assigner: AssignerConfig = AssignerConfig()
    postprocess: PostprocessConfig = PostprocessConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: Count = 0

    @model_validator(mode="after")
    def _sizes_fit(self) -> "Config":
        data = self.data
        if data.short_side > data.long_side:
            raise ValueError(
                f"data.short_side {data.short_side} exceeds data.long_side {data.long_side}: swap "
                "them"
            )
        if self.loss.distillation and self.model.edges == "dirac":
            raise ValueError("loss.distillation: needs model.edges=distribution, not dirac")
        backbone = self.model.backbone
        if self.optim.compile and backbone.checkpoint_gradients and not backbone.norm_eval:
            raise ValueError(
                "optim.compile=true: does not work with checkpoint_gradients=true while BatchNorm "
                "trains; set model.backbone.checkpoint_gradients=false or norm_eval=true"
            )
        most = max(self.evaluation.max_detections)
        if most > max(100, self.postprocess.detections_per_image):
            raise ValueError(
                f"evaluation.max_detections {most} exceeds postprocess.detections_per_image "
                f"{self.postprocess.detections_per_image}: set "
                f"postprocess.detections_per_image={most} too"
            )
        if data.multi_scale and not data.multi_scale[0] <= data.multi_scale[1] <= data.long_side:
            raise ValueError(
                f"data.multi_scale {list(data.multi_scale)}: expected [smallest, largest] short "
                f"side, not beyond data.long_side {data.long_side}"
            )
        return self
