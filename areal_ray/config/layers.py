"""From files and command line to layers of plain values, each with the name of where it came from."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from areal_ray.config.errors import ConfigError
from areal_ray.config.lengths import keep_last_unit
from areal_ray.config.text import hint_at, keep_text

T = TypeVar("T")
ALIASES = {"optim.factory": "optim.name"}  # other names of keys, accepted wherever these are
GROUPS = ("model", "data", "cluster")  # folders of conf/ that a `defaults:` list may pick from
_SECRETS = {"access_key", "secret_key", "session_token"}  # keys of the schema whose values are shown nowhere


@dataclass(frozen=True)
class Layer:
    source: str
    values: DictConfig


def read_layers(path: str, overrides: Sequence[str], schema: type) -> list[Layer]:
    """The groups that the experiment at `path` names, the experiment, the overrides: later ones win.

    Where the dataclass `schema` wants text, the text counts, see `keep_text`. `model=small` among the overrides picks
    conf/model/small.yaml instead of the experiment's own choice.
    """
    experiment = _read_yaml(Path(path), schema)
    chosen = _default_groups(experiment.values.pop("defaults", []), experiment.source)
    groups = {group: (name, experiment.source) for group, name in chosen.items()}
    assignments = []
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(text, "an override is written key=value, for example train.steps=200", "command line")
        if key in GROUPS:
            groups[key] = value, "command line"
        else:
            assignments.append(text)
    folder = _conf_folder(Path(path))
    layers = [_group_layer(folder, group, *choice, schema) for group, choice in groups.items()]
    typed = Layer("command line", _read_assignments(assignments, schema))
    read = [_plain_names(layer) for layer in (*layers, experiment, typed)]
    keep_last_unit([(layer.source, layer.values) for layer in read])
    return read


def _plain_names(layer: Layer) -> Layer:
    """The layer with every alias in it replaced by the key that it stands for."""
    for alias, key in ALIASES.items():
        parent, _, name = alias.rpartition(".")
        section = OmegaConf.select(layer.values, parent, throw_on_resolution_failure=False)
        if isinstance(section, DictConfig) and name in section.keys():  # noqa: SIM118  (`in` resolves)
            plain = key.rpartition(".")[2]
            if plain in section.keys():  # noqa: SIM118
                raise ConfigError(alias, f"is another name of {key}, which is set beside it", layer.source)
            # As it is written: what it refers to may stand in another layer.
            section[plain] = OmegaConf.to_container(section, resolve=False)[name]  # type: ignore[call-overload,index]
            del section[name]
    return layer


def compose(schema: type[T], layers: Sequence[Layer]) -> T:
    """Put the layers on top of the defaults of the dataclass `schema`, checking keys and types one layer at a time."""
    merged = OmegaConf.structured(schema)
    for layer in layers:
        try:
            merged = OmegaConf.merge(merged, layer.values)
        except (OmegaConfBaseException, TypeError) as error:
            raise _explained(error, _culprit(merged, layer.values), layer.source, merged) from None
    try:
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(key, "this value must be given", source_of(key, layers))
        config = OmegaConf.to_object(merged)  # resolves interpolations
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        raise _explained(error, key, source_of(key, layers), merged) from None
    assert isinstance(config, schema)
    return config


def merged_text(layers: Sequence[Layer]) -> str:
    """The layers as the YAML of one experiment; what refers to another key or the environment still does."""
    return OmegaConf.to_yaml(OmegaConf.merge(*(layer.values for layer in layers)))


def source_of(key: str, layers: Sequence[Layer]) -> str:
    """The file or command line that set a dotted key last; the experiment's file if it is a default."""
    depths = [_depth(OmegaConf.to_container(layer.values, resolve=False), key) for layer in layers]
    deepest = max(depths)
    if deepest < 2 and "." in key:  # a whole section is no trace of one of its keys
        return layers[-2].source
    return layers[len(depths) - 1 - depths[::-1].index(deepest)].source if deepest else layers[-2].source


def _depth(value: Any, key: str) -> int:
    """The number of parts of a dotted key, as in `faults[0].step`, that a tree of plain values has."""
    depth = 0
    for part in re.findall(r"[^.\[\]]+", key):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            break
        depth += 1
    return depth


def _read_yaml(path: Path, schema: Any) -> Layer:
    try:
        values = OmegaConf.create(keep_text(path.read_text("utf-8"), schema) or "{}")
    except ConfigError as error:
        raise ConfigError(error.key, error.message, str(path)) from None
    except FileNotFoundError:
        raise ConfigError("", f"no such file{_suggest(path.stem, _stems(path.parent))}", str(path)) from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        raise ConfigError("", _one_line(str(error)), str(path)) from None
    if not isinstance(values, DictConfig):
        raise ConfigError("", "the file must hold a mapping of keys to values", str(path))
    return Layer(str(path), values)


def _read_assignments(assignments: list[str], schema: type) -> DictConfig:
    values: Any = OmegaConf.create()
    for text in assignments:
        key, _, value = text.partition("=")
        try:
            value = keep_text(value, hint_at(schema, ALIASES.get(key, key)), key)
            values = OmegaConf.merge(values, OmegaConf.from_dotlist([f"{key}={value}"]))
        except ConfigError as error:
            raise ConfigError(error.key, error.message, "command line") from None
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
            raise ConfigError(key, _one_line(str(error)), "command line") from None
    assert isinstance(values, DictConfig)
    return values


def _default_groups(defaults: Any, source: str) -> dict[str, str]:
    groups: dict[str, str] = {}
    entries = OmegaConf.to_container(defaults) if OmegaConf.is_config(defaults) else defaults
    for entry in entries if isinstance(entries, list) else [entries]:
        if not (isinstance(entry, dict) and len(entry) == 1 and isinstance(next(iter(entry.values())), str)):
            raise ConfigError("defaults", "must be a list of entries such as `- model: tiny`", source)
        group, name = next(iter(entry.items()))
        if group not in GROUPS:
            raise ConfigError("defaults", f"no group {group!r}{_suggest(str(group), GROUPS)}", source)
        groups[group] = name
    return groups


def _group_layer(folder: Path, group: str, name: str, source: str, schema: type) -> Layer:
    path = folder / group / f"{name}.yaml"
    if not _is_file(path) and _is_file(shipped := _shipped() / group / path.name):
        path = shipped
    if not _is_file(path):
        known = sorted({*_stems(path.parent), *_stems(_shipped() / group)})
        raise ConfigError(group, f"there is no {_one_line(str(path))}{_suggest(name, known)}", source)
    layer = _read_yaml(path, hint_at(schema, group))
    if "defaults" in layer.values:
        raise ConfigError("defaults", "only an experiment may have a defaults list", layer.source)
    return Layer(layer.source, OmegaConf.create({group: layer.values}))


def _shipped() -> Path:
    """The folder with this package's own groups: areal_ray/conf where it is installed, conf/ in its repository."""
    package = Path(__file__).parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # longer than a name can be, or with a null byte
        return False


def _conf_folder(experiment: Path) -> Path:
    """The folder with model/, data/, cluster/: the nearest one above the experiment that has one of them."""
    for folder in experiment.resolve().parents:
        if any((folder / group).is_dir() for group in GROUPS):
            # Keep paths in messages as short as the user typed them.
            return Path(*experiment.parts[: -(len(experiment.resolve().relative_to(folder).parts))] or ".")
    return experiment.parent


def _culprit(merged: DictConfig, values: DictConfig) -> str:
    """The first key of a layer, at most two levels down, that does not merge: OmegaConf's errors do not always say."""
    tree: Any = OmegaConf.to_container(values, resolve=False)
    for section, value in tree.items():
        parts = (
            [(f"{section}.{name}", {section: {name: v}}) for name, v in value.items()]
            if isinstance(value, dict)
            else []
        )
        for key, part in parts or [(str(section), {section: value})]:
            try:
                OmegaConf.merge(merged, part)
            except (OmegaConfBaseException, TypeError):
                return key
    return ""


def _explained(error: Exception, culprit: str, source: str, merged: DictConfig) -> ConfigError:
    key = getattr(error, "full_key", None) or ""
    message = _one_line(getattr(error, "msg", None) or str(error) or "does not fit the schema")
    if isinstance(error, TypeError):
        return ConfigError(culprit, "is a list, which is given as a whole: key='[first, second]'", source)
    key = key or culprit
    if {*key.split("."), *culprit.split(".")} & _SECRETS:  # OmegaConf's messages show values
        return ConfigError(culprit or key, "must be one text (it is not shown here)", source)
    if not (
        key.startswith(culprit) or culprit.startswith(f"{key}.")
    ):  # inside of lists OmegaConf's keys are relative to the element
        return ConfigError(culprit, f"{key}: {message}", source)
    node: Any = merged
    for i, name in enumerate(key.split(".")):
        if not isinstance(node, DictConfig):
            break
        if name not in node.keys():  # noqa: SIM118  (`in` resolves, and finds no typed key of None)
            known = [str(k) for k in node]
            return ConfigError(".".join(key.split(".")[: i + 1]), f"no such key{_suggest(name, known)}", source)
        node = OmegaConf.select(node, name, throw_on_resolution_failure=False)
    if isinstance(node, DictConfig) and "Merge error" in message:
        message = "is a section of several keys, not one value"
    return ConfigError(key, message, source)


def _suggest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are: {', '.join(known)}" if known else ""


def _stems(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    keep = [line for line in lines if not line.startswith(("full_key:", "reference_type=", "object_type="))]
    return "; ".join(keep).replace("KeyError raised while resolving interpolation: ", "").strip('"')
