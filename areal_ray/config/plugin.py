"""Users' own code, named in the configuration as "package.module:name"."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from areal_ray.config.errors import ConfigError

_FORM = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_plugin(name: str) -> bool:
    """Whether a name is meant as "package.module:name" rather than as that of a part of this package."""
    return ":" in name


def has_form(text: str) -> bool:
    """Whether a text is exactly of the form package.module:name, where it may be something else as well."""
    return _FORM.fullmatch(text) is not None


def check_form(name: str, key: str) -> None:
    """Raise ConfigError unless the name has the form package.module:name."""
    if not has_form(name):
        raise ConfigError(key, f"{name!r} is not of the form package.module:name")


def search_path(experiment: str) -> tuple[str, ...]:
    """Folders in which an experiment's own code is looked for: the experiment's, then the current one.

    Those at or below the current folder are given relative to it as well: a submitted job's folder is another one on
    each node, and its processes begin there.
    """
    here, folder = Path.cwd(), Path(experiment).resolve().parent
    absolute = [str(folder), str(here)]
    relative = [os.path.relpath(path, here) for path in (folder, here) if path.is_relative_to(here)]
    return tuple(dict.fromkeys([*absolute, *relative]))


def extend_path(folders: Sequence[str]) -> None:
    """Let modules be imported from these folders, after everything that is installed."""
    for folder in map(os.path.abspath, folders):
        if folder not in sys.path:
            sys.path.append(folder)


def resolve(name: str, key: str) -> Any:
    """The object that "package.module:name" names.

    Args:
        name: as configured.
        key: where it was configured, for errors.

    Raises:
        ConfigError: if there is no such thing; says where it was looked for.
    """
    check_form(name, key)
    module_name, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        own = ", ".join(
            path for path in sys.path if path and "site-packages" not in path and "/lib/python3" not in path
        )
        raise ConfigError(key, f"{error} (looked for {name} in {own} and the installed packages)") from None
    except Exception as error:  # its code runs now, and may do anything
        raise ConfigError(key, f"importing {module_name} failed: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(key, f"{module_name} has no {attribute}")
        found = getattr(found, part)
    return found


def factory(name: str, key: str, builtin: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The callable that makes a part: one of this package's, by its short name (checked by rules.py), or a plugin.

    Raises:
        ConfigError: if it is a plugin that is not there.
    """
    if is_plugin(name):
        found = resolve(name, key)
        if not callable(found):
            raise ConfigError(key, f"{name} is a {type(found).__name__}, and cannot be called")
        return found
    return builtin[name]


def check_args(make: Callable[..., Any], name: str, key: str, *given: Any, **args: Any) -> None:
    """Raise ConfigError if a factory does not take these arguments; it is not called."""
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):  # one of C, that does not say
        return
    try:
        signature.bind(*given, **args)
    except TypeError as error:
        raise ConfigError(key, f"{name}: {error}") from None


def call(make: Callable[..., Any], name: str, key: str, *given: Any, **args: Any) -> Any:
    """The part that a factory makes of its arguments.

    Raises:
        ConfigError: if it fails; a ConfigError of its own is handed on.
        OSError: if storage or the network is why: that passes, and is no mistake of the configuration.
    """
    try:
        return make(*given, **args)
    except ConfigError:
        raise
    except OSError as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
            raise ConfigError(key, f"{name} failed: {type(error).__name__}: {error}") from error
        raise
    except Exception as error:  # the user's code, called with the user's arguments
        raise ConfigError(key, f"{name} failed: {type(error).__name__}: {error}") from error
