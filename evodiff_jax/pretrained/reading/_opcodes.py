"""The pickle opcodes that checkpoints use: how each argument is read, and what the stack machine does with it."""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

from evodiff_jax.pretrained.reading import _cursor
from evodiff_jax.pretrained.reading._cursor import Cursor
from evodiff_jax.pretrained.reading._machine import Budget, Machine
from evodiff_jax.pretrained.reading._refusals import DOWNLOAD, FormatError, shown, text_global
from evodiff_jax.pretrained.reading._standins import Builders


def unpickle(cursor: Cursor, builders: Builders, budget: Budget, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Reads the pickle at a cursor and moves the cursor behind it.

    Args:
      cursor: where the pickle begins; its byte strings are views of the cursor's array.
      builders: the closed list of globals.
      budget: the limits of the file.
      persistent: builder of what a persistent id stands for; None where the format has none.

    Returns:
      The object: None, bool, int, float, str, `Bytes`, list, tuple, dict, OrderedDict, set,
      and what the builders returned.

    Raises:
      FormatError: for anything outside the closed lists of globals and opcodes, or a damaged pickle.
    """
    machine = Machine(cursor, builders, budget, persistent)
    version = bytes(cursor.take(2))
    if version[0] != _PROTO or not 2 <= version[1] <= 5:
        raise FormatError(f"has no pickle of protocol 2 to 5 where one is due: it starts with {version!r}; {DOWNLOAD}")
    while (code := cursor.take(1)[0]) != _STOP:
        budget.step()
        if code not in _OPCODES:
            raise _unknown(code, machine)
        read, act = _OPCODES[code]
        act(machine, read(cursor))
    if machine.below or len(machine.stack) != 1:
        raise machine.damaged("it ends with values left over")
    return machine.stack[0]


def _unknown(code: int, machine: Machine) -> FormatError:
    if code not in _NAMES:
        return machine.damaged(f"{code:#04x} is no opcode")
    name = _NAMES[code]
    if name in ("SHORT_BINSTRING", "BINSTRING"):
        return FormatError(f"refuses the pickle opcode {name} of Python 2; load it in torch and save it with Python 3")
    cursor = machine.cursor
    following = text_global(bytes(cursor.view[cursor.position - 1 : cursor.position + 4096]))
    ahead = f" for or before the global {shown(following)}" if following else ""
    return FormatError(f"refuses the pickle opcode {name}{ahead}; no checkpoint of arrays needs it")


def _constant(make: Callable[[], Any]) -> Callable[[Machine, Any], None]:
    return lambda machine, _: machine.push(make())


def _tuple(count: int) -> Callable[[Machine, Any], None]:
    return lambda machine, _: machine.push(tuple([machine.pop() for _ in range(count)][::-1]))


_TABLE: dict[str, tuple[_cursor.Reader, Callable[[Machine, Any], Any]]] = {
    "FRAME": (_cursor.U64, Machine.frame),
    "NONE": (_cursor.nothing, _constant(lambda: None)),
    "NEWTRUE": (_cursor.nothing, _constant(lambda: True)),
    "NEWFALSE": (_cursor.nothing, _constant(lambda: False)),
    "BININT": (_cursor.I32, Machine.push),
    "BININT1": (_cursor.U8, Machine.push),
    "BININT2": (_cursor.U16, Machine.push),
    "LONG1": (_cursor.long, Machine.push),
    "BINFLOAT": (_cursor.F64, Machine.push),
    "SHORT_BINUNICODE": (_cursor.text(_cursor.U8), Machine.push),
    "BINUNICODE": (_cursor.text(_cursor.U32), Machine.push),
    "BINUNICODE8": (_cursor.text(_cursor.U64), Machine.push),
    "SHORT_BINBYTES": (_cursor.raw(_cursor.U8), Machine.push),
    "BINBYTES": (_cursor.raw(_cursor.U32), Machine.push),
    "BINBYTES8": (_cursor.raw(_cursor.U64), Machine.push),
    "EMPTY_TUPLE": (_cursor.nothing, _constant(tuple)),
    "EMPTY_LIST": (_cursor.nothing, _constant(list)),
    "EMPTY_DICT": (_cursor.nothing, _constant(dict)),
    "EMPTY_SET": (_cursor.nothing, _constant(set)),
    "MARK": (_cursor.nothing, lambda machine, _: machine.mark()),
    "POP": (_cursor.nothing, lambda machine, _: machine.pop_or_mark()),
    "POP_MARK": (_cursor.nothing, lambda machine, _: machine.pop_mark()),
    "TUPLE1": (_cursor.nothing, _tuple(1)),
    "TUPLE2": (_cursor.nothing, _tuple(2)),
    "TUPLE3": (_cursor.nothing, _tuple(3)),
    "TUPLE": (_cursor.nothing, lambda machine, _: machine.push(tuple(machine.pop_mark()))),
    "APPEND": (_cursor.nothing, lambda machine, _: machine.append([machine.pop()])),
    "APPENDS": (_cursor.nothing, lambda machine, _: machine.append(machine.pop_mark())),
    "SETITEM": (_cursor.nothing, lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1])),
    "SETITEMS": (_cursor.nothing, lambda machine, _: machine.set_items(machine.pop_mark())),
    "ADDITEMS": (_cursor.nothing, lambda machine, _: machine.add_items(machine.pop_mark())),
    "BINPUT": (_cursor.U8, Machine.put),
    "LONG_BINPUT": (_cursor.U32, Machine.put),
    "MEMOIZE": (_cursor.nothing, lambda machine, _: machine.put(len(machine.memo))),
    "BINGET": (_cursor.U8, Machine.get),
    "LONG_BINGET": (_cursor.U32, Machine.get),
    "GLOBAL": (_cursor.two_lines, lambda machine, pair: machine.find(*pair)),
    "STACK_GLOBAL": (_cursor.nothing, lambda machine, _: machine.find(*[machine.pop(), machine.pop()][::-1])),
    "REDUCE": (_cursor.nothing, lambda machine, _: machine.make("reduce", "REDUCE")),
    "NEWOBJ": (_cursor.nothing, lambda machine, _: machine.make("new", "NEWOBJ")),
    "BUILD": (_cursor.nothing, lambda machine, _: machine.build()),
    "BINPERSID": (_cursor.nothing, lambda machine, _: machine.persist()),
}
_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_CODES = {name: code for code, name in _NAMES.items()}
_OPCODES = {_CODES[name]: handler for name, handler in _TABLE.items()}
_PROTO, _STOP = _CODES["PROTO"], _CODES["STOP"]
