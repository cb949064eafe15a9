"""Mutations of a file's bytes: blind ones, and ones that know JSON, tables of checksums, pickles and YAML."""

from __future__ import annotations

import json
import pickletools
import re
import struct
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]
_DEEP = "\x00deep"  # stands in a tree for what json.dumps could not write
_NUMBERS = ["-1", "0", "1", "2147483648", "9223372036854775808", "1" + "0" * 30, "1e999", "NaN", "-0.5", "x", "", "²"]
_UNICODE = ["\u202e", "\ufeff", "\u2028", "²", "é", "\U0001f980", "\0", "\x85"]
_NONSENSE: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, 2**70, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf"), "", "x" * 5000,
    "\0", "../../outside", "\ud800", "²", "1", [], {}, [[]], {"": {}}, [None], _DEEP,
    "complex64", "qint8", "bits8", "int32", "bool", "float8_e5m2",
]  # fmt: skip


def flip(data: bytes, draw: Random) -> bytes:
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 8)) if out else 0):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def cut(data: bytes, draw: Random) -> bytes:
    return data[: draw.choice((0, 1, len(data) // 2, len(data) - 1, draw.randint(0, len(data))))]


def repeat(data: bytes, draw: Random) -> bytes:
    begin, end = sorted(draw.randint(0, len(data)) for _ in range(2))
    return data[:end] + data[begin:end] * draw.choice((1, 1, 20)) + data[end:]


def leave_out(data: bytes, draw: Random) -> bytes:
    begin, end = sorted(draw.randint(0, len(data)) for _ in range(2))
    return data[:begin] + data[end:]


def zero(data: bytes, draw: Random) -> bytes:
    begin, end = sorted(draw.randint(0, len(data)) for _ in range(2))
    return data[:begin] + bytes(end - begin) + data[end:]


def insert(data: bytes, draw: Random) -> bytes:
    at = draw.randint(0, len(data))
    return data[:at] + draw.choice((draw.randbytes(9), draw.choice(_UNICODE).encode(), b"\n", b"[" * 3000)) + data[at:]


BLIND: list[Mutation] = [flip, flip, flip, cut, repeat, leave_out, zero, insert]


def tree(data: bytes, draw: Random) -> bytes:
    """JSON with one to three values of another type or size, keys added, removed, renamed or exchanged."""
    try:
        box = [json.loads(data)]
    except ValueError:
        return flip(data, draw)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        _change(box, draw)
    deep = draw.choice((40, 200, 600, 900, 5000))
    opening, closing = draw.choice((("[", "]"), ('{"a":', "}")))
    text = json.dumps(box[0]).replace(json.dumps(_DEEP), opening * deep + "1" + closing * deep)
    return text.encode()


def _change(box: list[Any], draw: Random) -> None:
    places = list(_places(box))
    parent, key = draw.choice(places)
    value = parent[key]
    kind = draw.randrange(8)
    if kind == 0 and isinstance(value, dict):
        value[draw.choice(("", "chunks", "step", "format", "__class__", "extra"))] = draw.choice(_NONSENSE)
    elif kind == 1 and parent is not box:
        del parent[key]
    elif kind == 2 and isinstance(parent, list):
        parent.insert(key, value)
    elif kind == 3 and isinstance(parent, dict):
        parent[draw.choice((f"{key}x", key.upper(), f"../{key}", "²"))] = parent.pop(key)
    elif kind == 4:
        other, place = draw.choice(places)
        if _is_plain(value) and _is_plain(other[place]):
            parent[key], other[place] = other[place], value
        else:
            parent[key] = draw.choice(_NONSENSE)
    elif kind == 5 and type(value) in (int, float):
        parent[key] = draw.choice((-value, value + 1, value - 1, value * 2**32, str(value), [value], float(value)))
    elif kind == 6:
        parent[key] = draw.choice(({"a": value}, [value], [value, value], str(value)))
    else:
        parent[key] = draw.choice(_NONSENSE)


def _is_plain(value: Any) -> bool:
    return not isinstance(value, dict | list)


def _places(value: Any) -> Any:
    """(container, key or number) of every value below."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def lines_of_json(data: bytes, draw: Random) -> bytes:
    """A log with one line changed as `tree` does, or torn, twice there, elsewhere, or of something else."""
    lines = data.split(b"\n")
    at = draw.randrange(len(lines))
    kind = draw.randrange(6)
    if kind <= 2:
        lines[at] = tree(lines[at], draw)
    elif kind == 3:
        lines[at] = cut(lines[at], draw)
    elif kind == 4:
        lines.insert(draw.randrange(len(lines)), lines[at])
    else:
        lines[at] = draw.choice(
            (b"null", b"7", b"[]", b'"x"', b"{}", b"\xff\xfe", b"[" * 3000, b"", b"NaN", b"\0" * 64)
        )
    return b"\n".join(lines)


def words(data: bytes, draw: Random) -> bytes:
    """A table of checksums with other numbers, lines left out, twice there or exchanged."""
    lines = [line.split(b" ") for line in data.split(b"\n")]
    at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.randrange(6)
    if kind <= 2:
        word = draw.randrange(len(lines[at]))
        lines[at][word] = draw.choice(_NUMBERS).encode()
    elif kind == 3:
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == 4:
        lines.insert(other, lines[at])
    else:
        del lines[at]
    return b"\n".join(b" ".join(line) for line in lines)


_OPCODES = [bytes([code]) for code in b"(.0123FNRbdlot}]\x85\x86\x87\x88\x89\x81\x93\x94aeus)QPCTUVXcijhpqrB\x8a\x8b"]


def opcodes(data: bytes, draw: Random) -> bytes:
    """A pickle with opcodes left out, twice there, exchanged, made up, or with other arguments."""
    try:
        starts = [at for _, _, at in pickletools.genops(data) if at is not None]
    except ValueError:
        return flip(data, draw)
    parts = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, other = draw.randrange(len(parts)), draw.randrange(len(parts))
        kind = draw.randrange(8)
        if kind == 0:
            parts[at] = b""
        elif kind == 1:
            parts.insert(at, parts[other])
        elif kind == 2:
            parts[at], parts[other] = parts[other], parts[at]
        elif kind == 3:
            parts.insert(at, draw.choice(_OPCODES))
        elif kind == 4:
            number = draw.choice((-1, 0, 1, 7, 2**31 - 1, -(2**31)))
            parts[at] = b"J" + struct.pack("<i", number)
        elif kind == 5:
            parts.insert(at, draw.choice(_SNIPPETS))
        elif kind == 6:
            long = (2 ** draw.choice((62, 63, 64, 200))).to_bytes(32, "little")
            parts[at] = b"\x8a" + bytes([len(long)]) + long
        else:
            parts[at] = flip(parts[at], draw)
    return b"".join(parts)


_SNIPPETS = [
    b"cposix\nsystem\n(X\x04\x00\x00\x00trueetR",
    b"ctorch\nload\n",
    b"ctorch\nfloat64\n",
    b"c__builtin__\neval\n",
    b")" + b"\x85" * 4000,
    b")\x86" * 3,
    b"]" + b"]a" * 50,
    b"X\xff\xff\xff\x7f",
    b"\x8d" + struct.pack("<Q", 2**62),
    b"ctorch\nSize\n(J\xff\xff\xff\xfft\x85R",
    b"ccollections\nOrderedDict\n)R",
    b"N",
    b"}",
]


def yaml_text(data: bytes, draw: Random) -> bytes:
    """YAML with tags, anchors, aliases, merge keys, other values, other indents and characters."""
    lines = data.decode("utf-8").split("\n")
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(len(lines))
        key, colon, value = lines[at].partition(":")
        kind = draw.randrange(9)
        if kind <= 2 and colon:
            lines[at] = f"{key}: {draw.choice(_YAML)}"
        elif kind == 3:
            lines.insert(at, lines[draw.randrange(len(lines))])
        elif kind == 4:
            lines[at] = draw.choice((" ", "  ", "\t", "- ", "? ", "%", "---\n", "...\n")) + lines[at]
        elif kind == 5 and colon:
            lines[at] = f"{key}{draw.choice(_UNICODE)}:{value}"
        elif kind == 6 and colon:
            lines[at] = f"{key}: &a {value}\n{key}x: *a"
        elif kind == 7:
            lines.insert(
                at, draw.choice(("<<: *a", "<<: {run: {name: 7}}", "a: &a [*a]", "*a : 1", "[1]: 2", "null: 1"))
            )
        else:
            del lines[at]
        lines = lines or [""]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


_YAML = [
    "", "~", "yes", "0x10", "1_000", "1:30", "007", ".inf", ".nan", "-1", "1e22", "1" + "0" * 400, "10" * 3000, "[]",
    "{}", "[1, [2, [3]]]", "!!python/object/apply:os.system ['true']", "!!binary aGVsbG8=", "!x y", "!!set {a, b}",
    "!!timestamp 2001-01-01", "&a [*a]", "*nothing", "'${run.name}'", "'${oc.env:HOME}'", "'${oc.env:NOT_THERE}'",
    "'${foo'", "'${'", "${oc.decode:'1'}", "'${.name}'", "'${oc.create:{a: 1}}'", "'\\ud800'", '"\\ud800"', '"\\0"',
    "|\n  a\n  b", "[" * 200, "{a: " * 200, "[" * 3000, "x" * 70000, "2001-01-01", "\u2028", "'a\u0000'", "@x", "`x`",
    "{? a : b}", "[a: b]", "- 1", "1.5", "null", "nosuch", "0.0.0.0:80", "s3:/bucket", "~nobody/x", "/etc/passwd/x",
]  # fmt: skip


def override(base: list[str], draw: Random) -> list[str]:
    """key=value arguments, with keys and values that are hardly what was meant."""
    found = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        key, _, value = draw.choice(base).partition("=")
        kind = draw.randrange(6)
        if kind == 0:
            key = draw.choice(
                (key + ".x", key[:-1], key.upper(), "", ".", "..", f"{key}.", f"{key}[0]", "a b", "${a}", "²")
            )
        elif kind == 1:
            key = key.rpartition(".")[0] or key
        if kind != 2:
            value = draw.choice(_YAML)
        text = f"{key}={value}" if draw.randrange(12) else draw.choice((key, "=", "", "==", value))
        found.append(re.sub("[\0\ud800-\udfff]", "?", text))  # the kernel has no such arguments
    return found
