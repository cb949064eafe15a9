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
    """A node that has other packages than the driver.

    Args:
        message: names the node and every package that differs.
        node: its name in Ray (`nodes.node_name`), where that is known.
    """

    def __init__(self, message: str, node: str = "") -> None:
        super().__init__(message, node)  # with which it is pickled
        self.message, self.node = message, node

    def __str__(self) -> str:
        return self.message


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


def check_versions(driver: Mapping[str, str], mine: Mapping[str, str], node: str) -> None:
    """Compare those of a worker's node with the driver's.

    Args:
        driver: its versions.
        mine: those of this process.
        node: its name, for the message.

    Raises:
        OtherVersions: one line that names the node and every package that differs.
    """
    # Ray itself only warns of another patch release of Python: compiled code and pickles are the same.
    same_python = _minor(mine) == _minor(driver)
    names = tuple(name for name in BINDING if not (name == "python" and same_python))
    if found := differences(mine, driver, names):
        told = ", ".join(text.replace("(here ", "(the driver has ") for text in found)
        raise OtherVersions(f"{node} has {told}: all nodes must have the same")


def _minor(versions: Mapping[str, str]) -> list[str]:
    return versions.get("python", "").split(".")[:2]
