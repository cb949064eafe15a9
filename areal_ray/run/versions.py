"""Versions of Python and of the packages that a run depends on, compared between machines."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from areal_ray import __version__

_PACKAGES = ("torch", "ray", "transformers", "numpy", "safetensors")
# Those with which a model, its state or the processes of a job differ; nobody can train with several of them.
BINDING = ("python", "areal_ray", "torch", "ray", "transformers")
_MISSING = "missing"


class OtherVersions(ValueError):
    """Nodes that have other packages than the driver.

    Args:
        nodes: by their names in Ray (`nodes.node_name`), one line each that names every package that differs.
        driver: versions of the driver.
        here: whether that of the process that raises it has others.
    """

    def __init__(self, nodes: Mapping[str, str], driver: Mapping[str, str], here: bool) -> None:
        super().__init__(nodes, driver, here)  # with which it is pickled
        self.nodes, self.driver, self.here = dict(nodes), dict(driver), here

    def __str__(self) -> str:
        return "; ".join(self.nodes.values())


def versions() -> dict[str, str]:
    """Versions here, by name, without the build that they are of (torch 2.13.0 for 2.13.0+cu130); "missing" if none."""
    found = {"python": platform.python_version(), "areal_ray": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package).partition("+")[0]
        except PackageNotFoundError:
            found[package] = _MISSING
    return found


def differences(there: Mapping[str, str], here: Mapping[str, str], names: tuple[str, ...] | None = None) -> list[str]:
    """What differs there from here: "torch 2.12.0 (here 2.13.0)".

    Args:
        there, here: as `versions` gives them; what one of them does not say does not differ.
        names: those to compare; None: all.
    """
    both = [name for name in here if name in there and (names is None or name in names)]
    return [f"{name} {there[name]} (here {here[name]})" for name in both if there[name] != here[name]]


def mismatch(driver: Mapping[str, str], mine: Mapping[str, str], node: str) -> str | None:
    """The mismatch between a worker's node and the driver, in one line; None if no package of BINDING differs.

    Args:
        driver: its versions.
        mine: those of this process.
        node: its name and address, for the line.
    """
    # Ray itself only warns of another patch release of Python: compiled code and pickles are the same.
    same_python = _minor(mine) == _minor(driver)
    names = tuple(name for name in BINDING if not (name == "python" and same_python))
    if not (found := differences(mine, driver, names)):
        return None
    told = ", ".join(text.replace("(here ", "(the driver has ") for text in found)
    return f"{node} has {told}: all nodes must have the same"


def _minor(versions: Mapping[str, str]) -> list[str]:
    return versions.get("python", "").split(".")[:2]
