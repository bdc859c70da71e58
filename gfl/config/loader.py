"""Reading configurations: one YAML file, validated by one schema.

With overrides from a command line:

    config = gfl.load_config("configs/demo.yaml", overrides=["loss.qfl.beta=1.5"])

A file may name one `base:`, relative to itself. Mappings merge, lists replace, and overrides of the
command line come last. A mapping with a key `preset` replaces the mapping before it.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from gfl.config.schema import Config

# Sections of a configuration file that say where and how a job runs. `gfl` skips them; their schema
# is `gfl_platform.config.JobConfig`.
JOB_SECTIONS = frozenset({"run", "cluster", "storage", "tracking", "registry", "sweep"})

ConfigT = TypeVar("ConfigT", bound=Config)
KeyPath = tuple[str, ...]


MOST_NODES = 100_000
"""Largest number of values in a YAML text with every alias written out."""


class ConfigError(ValueError):
    """An unusable configuration; the message has the place, the value and what to do."""


class _Loader(yaml.SafeLoader):
    """PyYAML's loader of YAML 1.1, except that 1e-2 is a number and a repeated key is an error."""

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
    """Read a configuration file and return everything that reproduces a number.

    Args:
        path: YAML file, whose sections about where a job runs (`JOB_SECTIONS`) are skipped.
        overrides: Changes `section.key=value`, the value in YAML.

    Raises:
        ConfigError: The file is missing or is not YAML, a key is unknown, or a value has a wrong
            type or is out of bounds.
    """
    return load_schema(Config, path, overrides)


def load_schema(schema: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a configuration file into `schema`: `Config`, or a subclass that has more sections."""
    origins: dict[KeyPath, str] = {}
    values = _read(Path(path), origins, seen=())
    typed = _override(values, overrides, origins, "command line")
    foreign = [key for key in values if key in JOB_SECTIONS and key not in schema.model_fields]
    for key in foreign:
        del values[key]
    return _validate(schema, values, origins, str(path), typed)


def parse_config(text: str, source: str) -> Config:
    """Return the `Config` in a text of `dump_config`; error messages call the text `source`."""
    values = _mapping(text, source)
    return _validate(Config, values, dict.fromkeys(_leaves(values), source), source)


def derive(
    schema: type[ConfigT], config: Config, overrides: Sequence[str], origin: str = "command line"
) -> ConfigT:
    """Return `config` as `schema` with `section.key=value` overrides, which come from `origin`."""
    values = config.model_dump(mode="json")
    origins: dict[KeyPath, str] = {}
    typed = _override(values, overrides, origins, origin)
    return _validate(schema, values, origins, "configuration", typed)


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML text for `parse_config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def config_hash(config: Config) -> str:
    """Return a hash of everything that reproduces numbers, 64 hexadecimal digits."""
    return hashlib.sha256(dump_config(reproducible(config)).encode()).hexdigest()


def reproducible(config: Config) -> Config:
    """Return the part of `config` that reproduces numbers, without where and how the job runs."""
    return Config.model_validate_json(config.model_dump_json(include=set(Config.model_fields)))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys."""
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
        values = load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected sections and keys, got {type(values).__name__}")
    return values


def load_yaml(text: str) -> Any:
    """Return the content of a YAML text.

    Raises:
        YAMLError: The text is not YAML, or its aliases or its depth make it too large.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MOST_NODES:
            raise yaml.YAMLError(f"more than {MOST_NODES} values; expected fewer aliases")
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply, or within itself") from error
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Return the number of values below a node where every alias is written out."""
    if node not in known:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in children for child in pair]
        known[node] = 1 + sum(_size(child, known) for child in children)
    return known[node]


def _override(
    values: dict[str, Any], overrides: Sequence[str], origins: dict[KeyPath, str], origin: str
) -> dict[str, Any]:
    """Merge overrides into `values`, and return them as they were typed: every scalar a text."""
    typed: dict[str, Any] = {}
    # Presets come first, because single keys of the same command line override them.
    for override in sorted(overrides, key=lambda text: ".preset=" not in text):
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{override!r}: expected section.key=value, as in data.batch=8")
        if " #" in text and not text.startswith(("[", "{", "'", '"')):
            value, as_text = text, text  # for YAML, what follows " #" would be a comment
        else:
            value = _mapping(f"value: {text}", f"command line {key}")["value"]
            as_text = yaml.load(f"value: {text}", Loader=yaml.BaseLoader)["value"]  # noqa: S506
        _merge(values, _nested(key, value), origins, origin)
        _merge(typed, _nested(key, as_text), {}, origin)
    return typed


def _nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _merge(
    into: dict[str, Any], values: Mapping[Any, Any], origins: dict[KeyPath, str], origin: str
) -> None:
    """Merge `values` into `into`, and record the origin of every key."""

    def merge(into: dict[str, Any], values: Mapping[Any, Any], prefix: KeyPath) -> None:
        for name, value in values.items():
            path = (*prefix, str(name))
            origins[path] = origin
            if isinstance(value, Mapping):
                # A preset sets all keys of its section, so it replaces those that came before.
                below = None if "preset" in value else into.get(str(name))
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


def _at(values: Any, path: Iterable[str | int]) -> Any:
    for name in path:
        values = values[name]
    return values


def _validate(
    schema: type[ConfigT],
    values: dict[str, Any],
    origins: Mapping[KeyPath, str],
    source: str,
    typed: Mapping[str, Any] = MappingProxyType({}),
) -> ConfigT:
    """Return `values` as `schema`.

    Where the schema expects a text and YAML has read a number, a date or a switch, the text that
    was typed on the command line counts: `run.name=001` is the name 001.
    """
    try:
        # As JSON: strict validation of Python values would refuse a list for a tuple.
        return schema.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        if _take_texts(values, typed, error):
            return _validate(schema, values, origins, source)
        problems = [_explain(schema, problem, origins, source) for problem in error.errors()]
        raise ConfigError("; ".join(problems)) from error


def _take_texts(values: dict[str, Any], typed: Mapping[str, Any], error: ValidationError) -> bool:
    """Replace values that have to be texts by what was typed, and return whether any was."""
    places = [problem["loc"] for problem in error.errors() if problem["type"] == "string_type"]
    taken = False
    for *parents, last in places:
        try:
            text, holder = _at(typed, (*parents, last)), _at(values, parents)
        except (KeyError, IndexError, TypeError):  # it comes from a file
            continue
        if isinstance(text, str):
            holder[last] = text
            taken = True
    return taken


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
        text = problem["msg"].removeprefix("Value error, ")
        # A check of several keys together names the keys itself.
        has_key = not path or f"{path[0]}." in text
        return f"{origin}: {text}" if has_key else f"{origin}: {key}: {text}"
    quotes = "; put it into quotes" if problem["type"] == "string_type" else ""
    return f"{origin}: {key}: got {problem['input']!r}: {problem['msg']}{quotes}"


def _keys(schema: type[BaseModel], path: KeyPath) -> list[str]:
    """Return the keys that the schema has below `path`."""
    for name in path:
        field = schema.model_fields.get(name)
        if field is None:  # a key of a mapping; `schema` is that of its values already
            continue
        schema = _sections(field.annotation)[0]
    return list(schema.model_fields)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections in an annotation, including those of options and mappings."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in getattr(annotation, "__args__", ()) for section in _sections(part)]
