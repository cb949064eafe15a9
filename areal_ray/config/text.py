"""YAML in which keys of text keep what was written.

YAML reads 007 as 7, 3.10 as 3.1, yes as True, 1:30 as 90 and 12e5678 as infinity: two experiments of such names would
share a directory. Where the schema wants text, a value is put in quotes before it is read; elsewhere a number that is
not the one that was written is refused.
"""

from __future__ import annotations

import re
import types
from dataclasses import is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from areal_ray.config.errors import ConfigError

_NULLS = ("", "~", "null", "Null", "NULL")
_OF_YAML = "tag:yaml.org,2002:"
_TAGS = {
    _OF_YAML + name for name in ("str", "int", "float", "bool", "null", "map", "seq", "timestamp", "merge", "value")
}
_OTHER_NUMBER = re.compile(r"[-+]?0[0-7_]+|[-+]?\d[\d_]*(:[0-5]?\d)+(\.\d*)?")  # octal, or of the base 60


def keep_text(text: str, hint: Any, key: str = "") -> str:
    """YAML that reads as `text` does, but for values that the schema wants to be text: they are in quotes.

    Args:
        text: YAML.
        hint: the type that the schema has for it; Any: not known.
        key: of the value, for messages.

    Raises:
        ConfigError: if it is no YAML, or for a tag of a type that there is not, without the value, which may be a
            secret; or for a number that YAML reads as another one.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        # PyYAML's words but for names, which may be parts of a secret.
        problem = re.sub(r"(alias|anchor|handle) '.*'", r"\1", str(error.problem))
        raise ConfigError(key, f"is no YAML: {problem}{where}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # characters that YAML does not have, say
        raise ConfigError(key, f"is no YAML ({type(error).__name__})") from None
    if node is None:
        return text
    _walk(node, hint, key, set())
    written = str(yaml.serialize(node, width=2**31, allow_unicode=True))
    return written.removesuffix("...\n").strip("\n") if isinstance(node, yaml.ScalarNode) else written


def hint_at(schema: Any, key: str) -> Any:
    """The type of a dotted key, as in `faults[0].step`; Any if there is no such key."""
    hint = schema
    for name in re.findall(r"[^.\[\]]+", key):
        hint = _below(hint, name)
    return hint


def _walk(node: yaml.Node, hint: Any, key: str, seen: set[int]) -> None:
    if id(node) in seen:  # the same one again, by an alias
        return
    seen.add(id(node))
    if node.tag not in _TAGS:
        raise ConfigError(key, "begins with a tag (!), and values here have none: put it in quotes")
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != f"{_OF_YAML}merge" and _has_names(hint):
                _quote(name)
            _walk(value, _below(hint, str(name.value)), f"{key}.{name.value}".lstrip("."), seen)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            _walk(value, _below(hint, str(number)), f"{key}[{number}]", seen)
    elif isinstance(node, yaml.ScalarNode) and node.style is None and node.value not in _NULLS:  # a plain one
        if _is_text(hint):
            _quote(node)
        elif node.tag in (f"{_OF_YAML}int", f"{_OF_YAML}float") and _OTHER_NUMBER.fullmatch(node.value):
            read = yaml.safe_load(node.value)
            raise ConfigError(key, f"{node.value} would be read as {read}: write that number, or put it in quotes")


def _quote(node: yaml.ScalarNode) -> None:
    node.tag, node.style = f"{_OF_YAML}str", "'" if node.style is None else node.style


def _is_text(hint: Any) -> bool:
    """Whether the schema wants text there, and nothing else but null."""
    if get_origin(hint) in (Union, types.UnionType):
        return all(_is_text(each) for each in get_args(hint) if each is not type(None))
    if get_origin(hint) is Literal:
        return all(isinstance(each, str) for each in get_args(hint))
    return hint is str


def _has_names(hint: Any) -> bool:
    """Whether the keys of a mapping are names of the schema, or of variables: in free arguments they may be numbers."""
    arguments = get_args(hint)
    return is_dataclass(hint) or (get_origin(hint) is dict and arguments[0] is str and arguments[1] is not Any)


def _below(hint: Any, name: str) -> Any:
    """The type of a key of a section, or of an element."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint, *others) = [each for each in get_args(hint) if each is not type(None)]
        if others:
            return Any
    if is_dataclass(hint):
        return get_type_hints(hint).get(name, Any)
    arguments = get_args(hint)
    if get_origin(hint) is dict:
        return arguments[1]
    if get_origin(hint) is list:
        return arguments[0]
    return Any
