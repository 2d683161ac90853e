"""The one schema of a run, and how it is read: YAML with `_base_` inheritance, then `-o a.b=c` overrides.

    config = load_config("configs/densecl_r50.yaml", ["data.root=/data/coco/train2017", "optim.lr=0.3"])

A file may name another as `_base_` (relative to itself); its own keys win. Values are YAML scalars in the 1.2 sense, so that
`1e-4` is a number and `off` a word; nothing is ever evaluated. Every mistake is a `UserError` that names where the value
stands, the key, and what would be right.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, List, Literal, Optional, Tuple, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ppdensecl.errors import UserError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Side = Annotated[int, Field(ge=32, le=4096)]


class ModelConfig(Section):
    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet50"
    stages: int = Field(4, ge=1, le=4)  # of the backbone; fewer are for small pictures and quick trials
    num_grid: Optional[int] = Field(None, ge=1)  # S of the dense grid; null for the backbone's own map
    hidden_dim: Optional[int] = Field(None, ge=1)  # of the projection head; null for the backbone's width
    embedding_dim: int = Field(128, ge=1)
    queue_len: int = Field(65536, ge=1, le=2**24)
    momentum: float = Field(0.999, ge=0, le=1)  # of the key encoder
    temperature: float = Field(0.2, gt=0)
    loss_lambda: float = Field(0.5, ge=0, le=1)  # weight of the dense loss; 0 is MoCo-v2
    lambda_warmup_iters: int = Field(0, ge=0)  # steps in which the dense loss weighs nothing
    matching: Literal["backbone", "embedding", "random"] = "backbone"
    bn_groups: int = Field(1, ge=1)  # of a batch, normalised apart: shuffling BN within one process
    sync_bn: bool = False  # BatchNorm over the batches of all processes (GPUs only); does not replace shuffling BN


class DataConfig(Section):
    source: Literal["folder", "list", "coco", "lmdb", "archive", "synthetic"] = "folder"
    root: Optional[str] = None  # folder, LMDB or archive
    list_file: Optional[str] = None  # of source list: a path per line
    annotation: Optional[str] = None  # of source coco: the json that lists the pictures
    synthetic_count: int = Field(1024, ge=1)  # pictures of source synthetic
    image_size: Union[Side, Annotated[List[Side], Field(min_length=2, max_length=2)]] = 224  # or [height, width]
    batch_size: int = Field(32, ge=1)  # per process
    workers: Optional[int] = Field(None, ge=0)  # per process; 0 loads in the training process, null: as suits the machine
    max_bad_fraction: float = Field(0.01, ge=0, le=1)  # of pictures that cannot be decoded

    @property
    def size(self) -> Tuple[int, int]:
        """(height, width) of a view in pixels."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)


class OptimConfig(Section):
    lr: float = Field(0.03, gt=0)  # for the whole batch; never scaled automatically
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    decay_norm_and_bias: bool = True  # the recipe decays every parameter
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    milestones: List[int] = []  # of schedule step, counted in lr_step
    gamma: float = Field(0.1, gt=0)  # of schedule step
    lr_step: Literal["epoch", "iter"] = "epoch"
    warmup_epochs: float = Field(0, ge=0)  # linear from 0, per iteration
    epochs: int = Field(200, ge=1)
    max_iters: Optional[int] = Field(None, ge=1)  # ends the run earlier; the schedule stays that of `epochs`
    accumulate: int = Field(1, ge=1)  # batches per optimizer step
    amp: Literal["off", "float16", "bfloat16"] = "off"
    amp_level: Literal["O1", "O2"] = "O1"  # O2: all operators of the encoders but the few that need float32; parameters keep it
    recompute: int = Field(0, ge=0, le=4)  # stages of the query's backbone that run again in the backward pass: less memory
    to_static: bool = False  # both backbones run as static graphs (paddle.jit.to_static)
    clip_norm: Optional[float] = Field(None, gt=0)


class LogConfig(Section):
    interval: int = Field(50, ge=1)  # iterations
    correspondence_interval: Optional[int] = Field(None, ge=1)  # iterations between looks at the matches; null: never
    correspondence_pictures: int = Field(64, ge=1)  # of the data, in each of these looks
    visualdl: bool = True


class SaveConfig(Section):
    interval_epochs: int = Field(1, ge=1)
    interval_iters: Optional[int] = Field(None, ge=1)
    keep_last: Optional[int] = Field(3, ge=1)  # checkpoints kept; null for all


class Config(Section):
    output_dir: Optional[str] = Field(None, min_length=1)  # null for output/<name of the config file>
    seed: int = Field(0, ge=0, lt=2**32)
    device: Literal["auto", "cpu", "gpu"] = "auto"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    log: LogConfig = LogConfig()
    save: SaveConfig = SaveConfig()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def load_config(path, overrides=()) -> Config:
    """Reads `path` (YAML) with its bases, applies `overrides` ("a.b=c") and validates. Raises UserError."""
    try:
        values, origins = _read(Path(path), ())
        for override in overrides:
            _override(values, origins, override)
        config = build_config(values, origins, str(path))
    except UserError as error:  # which shows what it found, and that may be anything
        text = "".join(c if c.isprintable() else "?" for c in str(error))
        raise UserError(text if len(text) <= 2000 else f"{text[:1000]} … {text[-1000:]}") from None
    if config.output_dir is None:
        config = config.model_copy(update={"output_dir": f"output/{Path(path).stem}"})
    return config


def build_config(values, origins=None, name="config") -> Config:
    """A validated Config from nested dicts; `origins` tells for a dotted key where it was written."""
    try:
        return Config(**values)
    except ValidationError as error:
        raise UserError(_sentence(error.errors()[0], origins or {}, name)) from None


def keys(section=Config, prefix="") -> List[str]:
    """All dotted keys of the schema."""
    found = []
    for name, info in section.model_fields.items():
        nested = isinstance(info.annotation, type) and issubclass(info.annotation, Section)
        found += keys(info.annotation, f"{prefix}{name}.") if nested else [prefix + name]
    return found


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's numbers and truth values: 1e-4 is a float; yes, no, on and off are words."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


_MOST_VALUES = 10_000  # of a config file; a few lines of anchors can repeat each other 2^60 times

# What PyYAML's constructors raise for tags and values that do not fit.
_UNREADABLE = (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError, RecursionError)


def _construct_int(loader, node):
    return int(node.value)  # SafeLoader would read 010 as octal


def _construct_float(loader, node):
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def _parse(text, name):
    """YAML text → (root node, loader). Raises UserError."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if _size(node, {}) > _MOST_VALUES:
            raise UserError(f"{name}: an anchor contains itself or is repeated without measure; write the values out")
        return node, loader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise UserError(f"{where}: not valid YAML ({getattr(error, 'problem', None) or 'unreadable'}); "
                        "expected `key: value` lines") from None


def _size(node, sizes):
    """How many values a node has, those behind an anchor counted each time; infinite where one contains itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = float("inf")
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(node)]


def _read(path, parents):
    """A file with its bases → (nested dict, {dotted key: where}). Raises UserError."""
    try:
        resolved = path.resolve()
        if resolved in parents:
            raise UserError(f"{path}: `_base_` leads back to this file; a config cannot inherit from itself")
        if path.exists() and not path.is_file():  # a pipe or a device may have no end
            raise UserError(f"{path}: not a file; give the path of a YAML file")
        text = path.read_text(encoding="utf-8")
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links that lead back to themselves
        reason = getattr(error, "strerror", None) or "not a UTF-8 text file"
        raise UserError(f"{path}: cannot read the config ({reason}); give the path of a YAML file") from None
    node, loader = _parse(text, path)
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: not a config; expected `key: value` lines")
    values, origins = {}, {}
    _collect(node, loader, str(path), "", values, origins)
    base = values.pop("_base_", None)
    if base is None:
        return values, origins
    if not isinstance(base, str):
        raise UserError(f"{origins['_base_']}: `_base_` must be the path of one YAML file, got {base!r}")
    merged, merged_origins = _read(path.parent / base, (*parents, resolved))
    _merge(merged, values)
    return merged, {**merged_origins, **origins}


def _collect(node, loader, name, prefix, values, origins):
    """Copies a mapping node into `values`, noting for every dotted key the line it stands in."""
    for key_node, value_node in node.value:
        where = f"{name}:{key_node.start_mark.line + 1}"
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str) or not key:
            raise UserError(f"{where}: a key must be a word; expected `key: value`")
        dotted = prefix + key
        if key in values:
            raise UserError(f"{where}: key '{dotted}' is given twice (first in {origins[dotted]}); keep one")
        origins[dotted] = where
        if isinstance(value_node, yaml.MappingNode):
            values[key] = {}
            _collect(value_node, loader, name, dotted + ".", values[key], origins)
        else:
            try:
                values[key] = loader.construct_object(value_node, deep=True)
            except _UNREADABLE:
                raise UserError(f"{where}: the value of '{dotted}' has a tag or form that is not allowed; "
                                "use a plain number, word or list") from None


def _merge(into, values):
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _override(values, origins, override):
    """Applies one "a.b=c"."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted or "" in dotted.split("."):
        raise UserError(f"-o {override}: expected section.key=value, for example -o optim.lr=0.3")
    if text[:1] in ("[", "'", '"'):
        node, loader = _parse(text, f"-o {override}")
    else:  # a scalar as it stands, so that paths may hold ": " or "#"
        loader = _Loader("")
        node = yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text)
    try:
        value = loader.construct_document(node)
    except _UNREADABLE:
        raise UserError(f"-o {override[:100]}: the value has a form that is not allowed; "
                        "use a plain number, word or list") from None
    *sections, key = dotted.split(".")
    for depth, name in enumerate(sections, 1):
        origins.setdefault(".".join(sections[:depth]), f"-o {override}")
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    values[key] = value
    origins[dotted] = f"-o {override}"


_EXPECTED = {
    "int_type": "a whole number", "float_type": "a number", "string_type": "text (in quotes if it looks like a number, as in -o \"key='123'\")", "bool_type": "true or false",
    "list_type": "a list", "model_type": "a section of `key: value` lines", "model_attributes_type": "a section of "
    "`key: value` lines", "finite_number": "a finite number",
    "string_too_short": "the path of a folder",
}
_BOUNDS = {"greater_than_equal": ("ge", "at least"), "greater_than": ("gt", "greater than"),
           "less_than_equal": ("le", "at most"), "less_than": ("lt", "less than")}


def _sentence(error, origins, name):
    """One pydantic error as one sentence."""
    known = keys()
    sections = {key.rpartition(".")[0] for key in known} | set(Config.model_fields)
    path = []
    for part in error["loc"]:  # what comes after a known key is pydantic's own (branches of a union, list positions)
        if ".".join(path) in known:
            break
        path.append(str(part))
    dotted = ".".join(path)
    parent = next((".".join(path[:n]) for n in range(len(path), 0, -1) if ".".join(path[:n]) in origins), None)
    where = origins.get(parent, name)
    if error["type"] == "extra_forbidden":
        near = _nearest(dotted, known + sorted(sections - {""}))
        return f"{where}: unknown key '{dotted}'" + (f"; did you mean '{near}'?" if near else f"; known are {', '.join(known)}")
    value = error["input"]
    if dotted == "data.image_size":
        expected = "one size or [height, width] in pixels, 32 to 4096"
    elif error["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        near = _nearest(str(value), allowed)
        expected = "one of " + ", ".join(allowed) + (f" (did you mean '{near}'?)" if near else "")
    elif error["type"] in _BOUNDS:
        bound, words = _BOUNDS[error["type"]]
        expected = f"a number {words} {error['ctx'][bound]}"
    else:
        expected = _EXPECTED.get(error["type"], error["msg"])
    return f"{where}: '{dotted}' is {value!r}, expected {expected}"


def _nearest(word, choices):
    found = difflib.get_close_matches(word, choices, 1, 0.6)
    if not found:  # the right name in the wrong section, or a section left out
        last = word.rpartition(".")[2]
        by_last = {choice.rpartition(".")[2]: choice for choice in choices}
        found = [by_last[near] for near in difflib.get_close_matches(last, by_last, 1, 0.7)]
    return found[0] if found else None
