"""The configuration: one YAML, one schema, one loader.

    config = gfl.load_config("configs/demo.yaml", overrides=["loss.qfl.beta=1.5"])

A file may name one `base:` (relative to itself). Mappings merge, lists replace; the command line
comes last.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Rgb = tuple[float, float, float]

# Sections of a configuration file that say where and how a job runs. `gfl` skips them; their schema
# is `gfl_platform.config.JobConfig`.
JOB_SECTIONS = frozenset({"run", "cluster", "storage", "tracking", "registry"})


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names place and value, and what to do."""


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


ConfigT = TypeVar("ConfigT", bound=Config)
KeyPath = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, with 1e-2 a number and a repeated key an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} repeated", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and return all that reproduces a number.

    Args:
        path: YAML file. Sections that say where a job runs (`JOB_SECTIONS`) are skipped.
        overrides: `section.key=value`, the value in YAML.

    Raises:
        ConfigError: a file that is missing or not YAML; an unknown key, a wrong type, a value out
            of bounds.
    """
    return load_schema(Config, path, overrides)


def load_schema(schema: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a configuration file into `schema`: `Config`, or a subclass that has more sections."""
    origins: dict[KeyPath, str] = {}
    values = _read(Path(path), origins, seen=())
    for override in overrides:
        _merge(values, _parse_override(override), origins, "command line")
    foreign = [key for key in values if key in JOB_SECTIONS and key not in schema.model_fields]
    for key in foreign:
        del values[key]
    return _validate(schema, values, origins, str(path))


def parse_config(text: str, source: str) -> Config:
    """Return the `Config` of `dump_config`'s text; `source` is what errors call it."""
    values = _mapping(text, source)
    return _validate(Config, values, dict.fromkeys(_leaves(values), source), source)


def derive(schema: type[ConfigT], config: Config, overrides: Sequence[str]) -> ConfigT:
    """Return `config` as `schema`, changed by `section.key=value` overrides."""
    values = config.model_dump(mode="json")
    origins: dict[KeyPath, str] = {}
    for override in overrides:
        _merge(values, _parse_override(override), origins, "command line")
    return _validate(schema, values, origins, "configuration")


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML, which `parse_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def reproducible(config: Config) -> Config:
    """Return the part of `config` that reproduces its numbers, not where and how the job runs."""
    return Config.model_validate_json(config.model_dump_json(include=set(Config.model_fields)))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    return {".".join(path): _at(values, path) for path in _leaves(values)}


def _read(path: Path, origins: dict[KeyPath, str], seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        chain = " -> ".join(str(file) for file in (*seen, path))
        raise ConfigError(f"{path}: base: files include each other ({chain}); remove one base:")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration ({error})") from error
    own = _mapping(text, str(path))
    base = own.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected one relative path, got {base!r}")
    values = _read(path.parent / base, origins, (*seen, path.resolve())) if base else {}
    _merge(values, own, origins, str(path))
    return values


def _mapping(text: str, source: str) -> dict[str, Any]:
    try:
        # _Loader is a SafeLoader
        values = yaml.load(text, Loader=_Loader)  # noqa: S506
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected sections and keys, got {type(values).__name__}")
    return values


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{override!r}: expected section.key=value")
    value = _mapping(f"value: {text}", f"command line {key}")["value"]
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _merge(
    into: dict[str, Any], values: Mapping[Any, Any], origins: dict[KeyPath, str], origin: str
) -> None:
    """Merge `values` into `into`, noting for every key which file it came from."""

    def merge(into: dict[str, Any], values: Mapping[Any, Any], prefix: KeyPath) -> None:
        for name, value in values.items():
            path = (*prefix, str(name))
            origins[path] = origin
            if isinstance(value, Mapping):
                below = into.get(str(name))
                into[str(name)] = below = below if isinstance(below, dict) else {}
                merge(below, value, path)
            else:
                into[str(name)] = value

    merge(into, values, ())


def _leaves(values: Mapping[str, Any], prefix: KeyPath = ()) -> Iterable[KeyPath]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*prefix, name))
        else:
            yield (*prefix, name)


def _at(values: Any, path: KeyPath) -> Any:
    for name in path:
        values = values[name]
    return values


def _validate(
    schema: type[ConfigT], values: dict[str, Any], origins: Mapping[KeyPath, str], source: str
) -> ConfigT:
    try:
        # As JSON: strict validation of Python values would refuse a list for a tuple.
        return schema.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        problems = [_explain(schema, problem, origins, source) for problem in error.errors()]
        raise ConfigError("; ".join(problems)) from error


def _explain(
    schema: type[Config], problem: Any, origins: Mapping[KeyPath, str], source: str
) -> str:
    path = tuple(str(part) for part in problem["loc"])
    origin = next(
        (origins[path[:end]] for end in range(len(path), 0, -1) if path[:end] in origins), source
    )
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], _keys(schema, path[:-1]), n=1)
        hint = (
            f"did you mean '{near[0]}'?"
            if near
            else f"known: {', '.join(_keys(schema, path[:-1]))}"
        )
        return f"{origin}: {key}: unknown key; {hint}"
    if problem["type"] == "value_error":
        return f"{origin}: {problem['msg'].removeprefix('Value error, ')}"
    return f"{origin}: {key}: got {problem['input']!r}: {problem['msg']}"


def _keys(schema: type[BaseModel], path: KeyPath) -> list[str]:
    """Return the keys that the schema knows below `path`."""
    for name in path:
        annotation = schema.model_fields[name].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        schema = next(
            option
            for option in options
            if isinstance(option, type) and issubclass(option, BaseModel)
        )
    return list(schema.model_fields)
