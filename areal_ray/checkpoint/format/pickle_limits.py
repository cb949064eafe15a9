"""Limits on a pickle before it is loaded: what it could do to this process without naming anything that is refused.

A few hundred bytes can nest a tuple so deep that Python's own code overflows the stack when it looks at it, or name one
pair twice in the next sixty times over, and a look at all of it never ends. Opcodes are counted and the depth of every
object is followed, without making one of them.
"""

from __future__ import annotations

import pickle
import pickletools
from typing import Any

_MOST_DEPTH = 32  # `.metadata` has 8
_MOST_OPCODES = 100_000_000
# Opcodes by what they do to the stack of depths.
_LEAVES = {
    "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "GLOBAL", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET",
}  # fmt: skip
_WHOLE = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "STACK_GLOBAL": 2, "REDUCE": 2, "NEWOBJ": 2, "BINPERSID": 1}
_INTO = {"BUILD": 1, "APPEND": 1, "SETITEM": 2}  # so many objects become part of the one below
_MARKED = {"TUPLE", "LIST", "DICT"}  # all down to the mark become one
_MARKED_INTO = {"APPENDS", "SETITEMS"}  # all down to the mark become part of the one below it


class TooMuch(ValueError):
    """A pickle is nested too deep, too long, or has opcodes that have no place in it."""


def check_pickle(data: bytes) -> None:
    """Follow a pickle's opcodes; takes about a microsecond for each.

    Raises:
        TooMuch: beyond the limits.
        ValueError, IndexError, KeyError: if it is torn.
    """
    stack: list[Any] = []  # depths; a mark is None
    memo: dict[int, int] = {}
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if number > _MOST_OPCODES:
            raise TooMuch(f"more than {_MOST_OPCODES} opcodes")
        if name in _LEAVES:
            stack.append(0)
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[_number(argument)])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else _number(argument)] = stack[-1]
        elif name == "MARK":
            stack.append(None)
        elif name in _WHOLE:
            _join(stack, _WHOLE[name])
        elif name in _INTO:
            _join(stack, _INTO[name] + 1)
        elif name in _MARKED or name in _MARKED_INTO:
            at = len(stack) - 1 - stack[::-1].index(None)
            del stack[at]
            _join(stack, len(stack) - at + (name in _MARKED_INTO))
        elif name == "POP":
            stack.pop()
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise TooMuch(f"the opcode {name} has no place in it")


def _number(argument: Any) -> int:
    return int(argument)


def _join(stack: list[Any], count: int) -> None:
    """Replace the uppermost objects by one that holds them."""
    parts = stack[len(stack) - count :] if count else []
    if len(parts) != count or None in parts:
        raise pickle.UnpicklingError("an opcode without its objects")
    depth = 1 + max(parts, default=0)
    if depth > _MOST_DEPTH:
        raise TooMuch(f"objects in objects, more than {_MOST_DEPTH} deep")
    del stack[len(stack) - count :]
    stack.append(depth)
