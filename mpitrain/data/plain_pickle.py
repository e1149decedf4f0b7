"""Pickles of plain data, read by an interpreter of our own that imports, calls and executes nothing.

``pickle.load`` runs whatever a file names. The files of CIFAR need only dictionaries, lists, texts, numbers and NumPy
arrays of bytes. ``pickletools`` splits a pickle into its operations; those that build such objects are carried out
here, and any other refuses the file.
"""

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

MARK = object()
ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
NAMES = {
    **{(module, "_reconstruct"): "array" for module in ARRAY_MODULES},
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
}
"""The names that a pickle may contain. They are not imported: each stands for a step of this interpreter."""

IGNORED = ("PROTO", "FRAME")
VALUES = (
    *("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
)
TEXTS_OF_PYTHON_2 = ("STRING", "BINSTRING", "SHORT_BINSTRING")
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: MARK,
}


class Refused(ValueError):
    """A pickle that is damaged or contains anything but plain data."""


class Name:
    """A name in a pickle, which is not imported."""

    def __init__(self, step: str) -> None:
        self.step = step


class Array:
    """An array whose contents have not been read yet."""

    value: Any = None


class Type:
    """The type of an array."""

    def __init__(self, code: str) -> None:
        self.code = code


def load(file: BinaryIO) -> Any:
    """Return the object in a pickle.

    Args:
        file: The pickle, which should be in memory: lengths in it are compared with what is there.

    Raises:
        Refused: The pickle is damaged or contains anything but plain data.
    """
    machine = Machine()
    try:
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "STOP":
                return finished(machine.stack.pop())
            machine.do(operation.name, argument)
    except Refused:
        raise
    except Exception as error:  # a damaged pickle makes any error
        raise Refused(f"it is damaged: {type(error).__name__}") from error
    raise Refused("it has no end")


def finished(value: Any) -> Any:
    """Return a value with arrays in place of their stand-ins, in dictionaries of the first level only."""
    if isinstance(value, dict):
        return {finished(key): finished(item) for key, item in value.items()}
    if isinstance(value, Array):
        if value.value is None:
            raise Refused("it holds an array without contents")
        return value.value
    if isinstance(value, Name | Type) or value is MARK:
        raise Refused("it holds a name instead of a value")
    return value


class Machine:
    """The stack and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def do(self, name: str, argument: Any) -> None:
        """Carry out an operation.

        Raises:
            Refused: It is not one of those that build plain data.
        """
        if name in IGNORED:
            return
        if name in VALUES:
            self.stack.append(argument)
        elif name in TEXTS_OF_PYTHON_2:
            self.stack.append(argument.encode("latin-1"))
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[int(argument)] = self.stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self._memo[int(argument)])
        else:
            self._build(name, argument)

    def _build(self, name: str, argument: Any) -> None:
        """Carry out an operation that combines objects."""
        stack = self.stack
        if name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(name[-1])
            stack[-n:] = [tuple(stack[-n:])]
        elif name in ("TUPLE", "LIST"):
            items = self._marked()
            stack.append(tuple(items) if name == "TUPLE" else items)
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._marked()
            _of_type(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._marked()
            if name == "DICT":
                stack.append({})
            _of_type(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(_name(*argument.split(" ")))
        elif name == "STACK_GLOBAL":
            attribute = stack.pop()
            stack.append(_name(stack.pop(), attribute))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_called(_of_type(stack.pop(), Name).step, _of_type(arguments, tuple)))
        elif name == "BUILD":
            state = stack.pop()
            _set_state(stack[-1], _of_type(state, tuple))
        else:
            raise Refused(f"it contains the operation {name}, which is no plain data")

    def _marked(self) -> list[Any]:
        """Remove the last mark and what follows it from the stack, and return what follows."""
        place = next(k for k in reversed(range(len(self.stack))) if self.stack[k] is MARK)
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items


def _of_type(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise Refused(f"it has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _name(module: Any, attribute: Any) -> Name:
    step = NAMES.get((str(module), str(attribute)))
    if step is None:
        raise Refused(f"it names {module}.{attribute}, which is no plain data")
    return Name(step)


def _called(step: str, arguments: tuple[Any, ...]) -> Any:
    """Return what the call of a known function stands for."""
    if step == "array":
        return Array()
    if step == "dtype":
        code = arguments[0]
        return Type(code.decode() if isinstance(code, bytes) else str(code))
    if step == "encode" and arguments[1:] in (("latin1",), (b"latin1",)):
        return _of_type(arguments[0], str).encode("latin-1")  # bytes in a pickle of protocol 2
    raise Refused(f"it calls {step}")


def _set_state(target: Any, state: tuple[Any, ...]) -> None:
    """Give an array its shape and bytes; the byte order of a type does not matter for bytes."""
    if isinstance(target, Type):
        return
    _, shape, kind, is_fortran, content = state
    if _of_type(kind, Type).code not in ("u1", "uint8") or is_fortran not in (False, 0):
        raise Refused("it holds an array that is not of bytes in C order")
    _of_type(target, Array).value = np.frombuffer(_of_type(content, bytes), np.uint8).reshape(shape)
