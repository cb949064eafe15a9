"""Real text that every machine has: the source of Python's standard library, and pairs of docstring and body of it."""

from __future__ import annotations

import ast
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from areal_ray.config import ConfigError, SourceConfig
from areal_ray.data.records import Document, Part

# Not written as prose to learn from: test data with broken encodings, installed packages, generated tables.
_SKIPS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3", "encodings"}


class StandardLibrary:
    """A Source of its .py files; as records, of a docstring and the body of its function.

    Args:
        config: of the source, with the format.
    """

    def __init__(self, config: SourceConfig) -> None:
        root = Path(sysconfig.get_paths()["stdlib"])
        kept: list[tuple[str, Path]] = []
        for folder, folders, files in os.walk(root):
            # Not gone into, rather than left out afterwards: installed packages are many times as much as the rest.
            folders[:] = [name for name in folders if name not in _SKIPS]
            paths = [Path(folder, name) for name in files if name.endswith(".py")]
            kept += [(path.relative_to(root).as_posix(), path) for path in paths]
        if not kept:
            raise ConfigError("data.source", f"this Python has no standard library source in {root}; use source: text")
        self._parts = [Part(str(path), size=path.stat().st_size) for _, path in sorted(kept)]
        self._format = config.format
        self.skipped: Counter[str] = Counter()
        self.notes: list[str] = []

    def parts(self) -> list[Part]:
        return self._parts

    def read(self, part: Part) -> Iterator[Document]:
        try:
            content = Path(part.path).read_bytes()
        except OSError as error:
            raise ConfigError("data.source", f"cannot read {part.path}: {error.strerror}") from None
        if self._format == "text":
            yield Document(content, part.path)
            return
        for line, prompt, body in _pairs(content.decode()):
            record: dict[str, object] = {"prompt": prompt, "completion": body}
            if self._format == "messages":
                said = [("user", prompt), ("assistant", body)]
                record = {"messages": [{"role": role, "content": content} for role, content in said]}
            yield Document(record, f"{part.path}:{line}")


def _pairs(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, head with docstring, and the rest of every function that has both."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or not (said := ast.get_docstring(node)):
            continue
        lines = source.split("\n")[node.body[1].lineno - 1 : node.end_lineno]
        yield node.lineno, f'def {node.name}({ast.unparse(node.args)}):\n    """{said}"""\n', "\n".join(lines) + "\n"
