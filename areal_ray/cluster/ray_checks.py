"""Compares names, parameters and attributes that code relies on with those of the modules that are installed."""

from __future__ import annotations

import dis
import inspect
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

_NAME = re.compile(r"([\w.]+)(?:\(([\w,]*)\))?")


def missing(reliances: Mapping[str, str]) -> list[str]:
    """List everything that is relied on and not there, one sentence each; empty if all is as expected.

    Args:
        reliances: names by their module or by module:class, separated by spaces. `f(a,b)` is a callable with these
            parameters; a name in a class is an attribute, a method or a field, also one that only its methods set.
    """
    found: list[str] = []
    for place, names in reliances.items():
        module, _, path = place.partition(":")
        try:
            imported = import_module(module)
        except Exception as error:  # noqa: BLE001  (a module may raise anything; what is asked is whether it is there)
            found.append(f"{module} cannot be imported ({error})")
            continue
        for text in names.split():
            match = _NAME.fullmatch(text)
            assert match, text
            parameters = [name for name in (match[2] or "").split(",") if name]
            found += _compare(imported, f"{path}.{match[1]}".lstrip("."), parameters)
    return list(dict.fromkeys(found))


def _compare(module: Any, path: str, parameters: list[str]) -> Iterator[str]:
    value, at = module, module.__name__
    *parents, last = path.split(".")
    for name in parents:
        at = f"{at}.{name}"
        if not hasattr(value, name):
            yield f"{at} is missing"
            return
        value = getattr(value, name)
    at = f"{at}.{last}"
    if not hasattr(value, last):
        if last not in _of_instances(value):
            yield f"{at} is missing"
        return
    if parameters:
        try:
            known = inspect.signature(getattr(value, last)).parameters
        except (TypeError, ValueError):  # no callable any more, or one that is compiled
            yield f"{at} has no signature"
            return
        yield from (f"{at} takes no `{name}`" for name in parameters if name not in known)


def _of_instances(value: Any) -> set[str]:
    """Names that instances of a class have although the class has not: fields, and those that its methods set."""
    names = set(getattr(getattr(value, "DESCRIPTOR", None), "fields_by_name", ()))
    for each in getattr(value, "__mro__", ()):
        names.update(getattr(each, "__annotations__", ()))
        for method in vars(each).values():
            if code := getattr(method, "__code__", None):
                names.update(one.argval for one in dis.get_instructions(code) if one.opname == "STORE_ATTR")
    return names
