"""Bytes of files as the UTF-8 of documents: without a byte order mark, with line ends as configured, or refused."""

from __future__ import annotations

import codecs
from collections import Counter

from areal_ray.config import ConfigError, SourceConfig

NEWLINE = b"\n"
LEFT_OUT = "that cannot be read left out"
REST_LEFT_OUT = "files that cannot be read to the end left out from there"
_REPLACED = "with invalid UTF-8 replaced"
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # begins as UTF-16's
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_BINARY = {b"PAR1": "Parquet: source: parquet", b"PK\x03\x04": "a zip archive", b"ARROW1": "Arrow: source: parquet"}


class Text:
    """Text of a source.

    Args:
        config: what becomes of line ends and of invalid UTF-8.
        skipped: counts what is left out or replaced, by reason.
    """

    def __init__(self, config: SourceConfig, skipped: Counter[str]) -> None:
        self._newlines, self._on_error, self.skipped = config.newlines, config.on_error, skipped

    def clean(self, content: bytes, path: str, line: str = "") -> bytes | None:
        """The text as UTF-8; None if it is left out.

        Args:
            content: of a file or of a line.
            path: of the file.
            line: which one of it, "1" for the first, with the byte order mark; "": it is the whole file.

        Raises:
            ConfigError: if it is no UTF-8, with file and line, and data.on_error is fail.
        """
        if line in ("", "1"):
            content = content.removeprefix(codecs.BOM_UTF8)
        other = _encoding(content)
        try:
            content.decode()
        except UnicodeDecodeError as error:
            origin = f"{path}:{line or content.count(NEWLINE, 0, error.start) + 1}"
            # Of a file in another encoding nothing would be kept by replacing.
            replacing = self._on_error == "replace" and not other
            self.refuse(origin, _reason(other) or f"byte 0x{content[error.start]:02x} is no UTF-8", _as(replacing))
            return self._lines(content.decode(errors="replace").encode()) if replacing else None
        if other:  # whose bytes are UTF-8 all the same
            self.refuse(path, _reason(other))
            return None
        return self._lines(content)

    def encode(self, text: str, origin: str) -> bytes | None:
        """The same of text that was decoded already, which may have half a surrogate pair in it."""
        try:
            content = text.encode()
        except UnicodeEncodeError:
            replacing = self._on_error == "replace"
            self.refuse(origin, "half of a surrogate pair is no character", _as(replacing))
            if not replacing:
                return None
            content = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()
        return self._lines(content)

    def _lines(self, content: bytes) -> bytes:
        if self._newlines == "lf" and b"\r" in content:
            return content.replace(b"\r\n", NEWLINE).replace(b"\r", NEWLINE)
        return content

    def refuse(self, origin: str, why: str, counts_as: str = LEFT_OUT) -> None:
        """Count what cannot be read, or raise ConfigError if data.on_error is fail.

        Args:
            origin: "path:line".
            why: of the error.
            counts_as: what is said of it if it is no error.
        """
        if self._on_error == "fail":
            hint = "data.on_error=skip leaves it out"
            raise ConfigError("data.paths", f"{origin}: {why}; {hint}")
        self.skipped[counts_as] += 1


def _as(replaced: bool) -> str:
    return _REPLACED if replaced else LEFT_OUT


def _encoding(content: bytes) -> str:
    """The encoding, or format, that content is in if that is certainly not UTF-8, else ""."""
    begin = content[:4096]
    for mark, name in {**_MARKS, **_BINARY}.items():
        if begin.startswith(mark):
            return name
    even, odd = begin[::2], begin[1::2]
    if len(odd) > 8 and (even.count(0), odd.count(0)) in ((0, len(odd)), (len(even), 0)):
        return "UTF-16"  # of ASCII, without a mark
    return ""


def _reason(other: str) -> str:
    return other and f"this is {other}, not UTF-8" + (" (iconv converts it)" if other.startswith("UTF") else "")
