"""The pickle inside a `.pth` file, without pickle: an interpreter that can build nothing but tables of tensors.

Python's unpickler calls whatever a file names, and may reserve gigabytes for a few bytes of input. This one knows the
opcodes that `torch.save` emits for a state dictionary and a handful of names, each bound to a harmless constructor of
our own; anything else is an error at a byte offset. Memory stays in proportion to the pickle. Source: the opcode
descriptions of Python's `pickletools`, and torch.save of a dictionary of tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from herd.errors import FileFormatError

__all__ = ["PickledTensor", "read_state_dict", "write_state_dict"]

MAX_INSTRUCTIONS = 2_000_000  # each makes at most one small object; a shard of a 405B model has about 40,000


@dataclass(frozen=True)
class PickledTensor:
    """A tensor as the pickle describes it: a strided view into storage `key`. All numbers count elements."""

    key: str
    type_name: str
    storage_size: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Storage:
    key: str
    type_name: str
    size: int


@dataclass(frozen=True)
class _StorageType:
    type_name: str


class _Opaque:
    """Something without weights that real files carry beside the tensors, such as an `io.BytesIO` of extra state."""


_MARK = object()

_STORAGES = {
    "FloatStorage": "f32", "HalfStorage": "f16", "BFloat16Storage": "bf16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip
_STORAGE_NAMES = {type_name: name for name, type_name in _STORAGES.items()}


def _tensor(storage: object, offset: object, shape: object, stride: object, *_: object) -> PickledTensor:
    if not isinstance(storage, _Storage) or not _sizes([offset]) or not _sizes(shape) or not _sizes(stride):
        raise ValueError("a tensor is built from something other than a storage and whole numbers")
    assert isinstance(offset, int) and isinstance(shape, tuple) and isinstance(stride, tuple)
    if len(shape) != len(stride) or len(shape) > 8:
        raise ValueError("shape and stride of a tensor do not match")
    return PickledTensor(storage.key, storage.type_name, storage.size, offset, shape, stride)


def _parameter(data: object, *_: object) -> object:
    return data


def _empty_dict(*arguments: object) -> dict[str, Any]:
    if arguments:
        raise ValueError("an OrderedDict with arguments is not what torch.save writes")
    return {}


def _opaque(*_: object) -> _Opaque:
    return _Opaque()


# Every name a file may mention, and what it means here. Nothing of torch, or of Python, is ever called.
_NAMES: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): _empty_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("_io", "BytesIO"): _opaque,
    ("io", "BytesIO"): _opaque,
    ("_codecs", "encode"): _opaque,
    **{("torch", name): _StorageType(type_name) for name, type_name in _STORAGES.items()},
}


def read_state_dict(raw: bytes, file: Path) -> dict[str, PickledTensor]:
    """Tensors of a pickled state dictionary by name; entries that are no tensors (extra states) are left out."""
    return _Machine(raw, file).run()


class _Machine:
    """The stack machine of pickle protocols 2 to 5, reduced to what a state dictionary needs."""

    def __init__(self, raw: bytes, file: Path) -> None:
        self.raw, self.file = raw, file
        self.position = self.start = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> dict[str, PickledTensor]:
        for _ in range(MAX_INSTRUCTIONS):
            self.start = self.position
            code = self.take(1)[0]
            if code == 0x2E:  # STOP
                break
            action = _ACTIONS.get(code)
            if action is None:
                self.fail("uses a pickle instruction that no state dictionary needs", value=f"0x{code:02x}")
            try:
                action(self)
            except (ValueError, IndexError, TypeError, KeyError, AssertionError) as error:
                self.fail(str(error) if isinstance(error, ValueError) else "the pickle is malformed")
        else:
            self.fail("has far more objects than a checkpoint")
        if len(self.stack) != 1 or not isinstance(self.stack[0], dict):
            self.fail("does not hold a state dictionary", allowed="a dictionary from names to tensors")
        return {name: item for name, item in self.stack[0].items() if isinstance(item, PickledTensor)}

    def take(self, count: int) -> bytes:
        if count > len(self.raw) - self.position:
            self.fail("the pickle ends too early")
        self.position += count
        return self.raw[self.position - count : self.position]

    def number(self, code: str) -> int:
        return int(struct.unpack(code, self.take(struct.calcsize(code)))[0])

    def text(self, code: str) -> str:
        return self.take(self.number(code)).decode("utf-8", "surrogatepass")

    def line(self) -> str:
        end = self.raw.find(b"\n", self.position)
        if end < 0:
            self.fail("the pickle ends too early")
        text = self.raw[self.position : end].decode()
        self.position = end + 1
        return text

    def pop_to_mark(self) -> list[Any]:
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                items = self.stack[place + 1 :]
                del self.stack[place:]
                return items
        raise IndexError

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def named(self, module: str, name: str) -> None:
        if (module, name) not in _NAMES:
            self.fail(
                "names something that is not part of a checkpoint; it was not executed",
                value=f"{module}.{name}",
                allowed="tensors and their storages",
                fix="get the weights as safetensors from a source you trust",
            )
        self.push(_NAMES[module, name])

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if function not in (_tensor, _parameter, _empty_dict, _opaque) or not isinstance(arguments, tuple):
            raise ValueError("calls something that is not a constructor of a checkpoint")
        self.push(function(*arguments))

    def new_object(self) -> None:
        """How a BytesIO is pickled from protocol 2 on: its class and no arguments, then its state."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if function is not _opaque or arguments != ():
            raise ValueError("makes an object that is not part of a checkpoint")
        self.push(_Opaque())

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, _Opaque):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("sets items of something that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise ValueError("a key of the state dictionary is not text")
            if key in target:
                self.fail("a tensor occurs twice", field=key)
            target[key] = value

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError("appends to something that is not a list")
        target.extend(items)

    def build(self) -> None:
        """State of an object: torch's `_metadata` on an OrderedDict, or a BytesIO's content. Neither has weights."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict | _Opaque):
            raise ValueError("sets the state of something that has none")

    def persistent(self) -> None:
        match self.stack.pop():
            case ("storage", _StorageType(type_name), str(key), str(), int(size)) if _sizes([size]):
                self.push(_Storage(key, type_name, size))
            case other:
                raise ValueError(f"refers to an unknown kind of storage: {str(other)[:80]}")

    def fail(self, what: str, *, field: str = "data.pkl", **details: Any) -> NoReturn:
        raise FileFormatError(what, file=self.file, field=field, offset=self.start, **details)


def _sizes(value: object) -> bool:
    return isinstance(value, tuple | list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _memoize(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


def _long1(machine: _Machine) -> None:
    machine.push(int.from_bytes(machine.take(machine.number("<B")), "little", signed=True))


def _tuple(count: int) -> Callable[[_Machine], None]:
    def action(machine: _Machine) -> None:
        if len(machine.stack) < count:
            raise IndexError
        items = tuple(machine.stack[len(machine.stack) - count :])
        del machine.stack[len(machine.stack) - count :]
        machine.push(items)

    return action


def _stack_global(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.named(str(module), str(name))


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


def _append_one(machine: _Machine) -> None:
    item = machine.stack.pop()
    machine.append([item])


_ACTIONS: dict[int, Callable[[_Machine], Any]] = {
    ord("("): lambda m: m.push(_MARK),
    ord("0"): lambda m: m.stack.pop(),
    ord(")"): lambda m: m.push(()),
    ord("]"): lambda m: m.push([]),
    ord("}"): lambda m: m.push({}),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    ord("J"): lambda m: m.push(m.number("<i")),
    0x8A: _long1,
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    ord("X"): lambda m: m.push(m.text("<I")),
    0x8C: lambda m: m.push(m.text("<B")),
    0x8D: lambda m: m.push(m.text("<Q")),
    ord("B"): lambda m: m.push(m.take(m.number("<I"))),
    ord("C"): lambda m: m.push(m.take(m.number("<B"))),
    0x8E: lambda m: m.push(m.take(m.number("<Q"))),
    ord("q"): lambda m: _memoize(m, m.number("<B")),
    ord("r"): lambda m: _memoize(m, m.number("<I")),
    0x94: lambda m: _memoize(m, len(m.memo)),
    ord("h"): lambda m: m.push(m.memo[m.number("<B")]),
    ord("j"): lambda m: m.push(m.memo[m.number("<I")]),
    ord("c"): lambda m: m.named(m.line(), m.line()),
    0x93: _stack_global,
    ord("t"): lambda m: m.push(tuple(m.pop_to_mark())),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    ord("R"): _Machine.reduce,
    0x81: _Machine.new_object,
    ord("b"): _Machine.build,
    ord("s"): _set_item,
    ord("u"): lambda m: m.set_items(m.pop_to_mark()),
    ord("a"): _append_one,
    ord("e"): lambda m: m.append(m.pop_to_mark()),
    ord("Q"): _Machine.persistent,
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME: a hint about lengths
}


def write_state_dict(tensors: Iterable[tuple[str, PickledTensor]]) -> bytes:
    """Pickle (protocol 2) a dictionary of tensors as `torch.save` does; `torch.load(weights_only=True)` reads it."""
    out = [b"\x80\x02}("]
    for name, tensor in tensors:
        out += [
            _text(name),
            b"ctorch._utils\n_rebuild_tensor_v2\n(",
            b"(",
            _text("storage"),
            f"ctorch\n{_STORAGE_NAMES[tensor.type_name]}\n".encode(),
            _text(tensor.key),
            _text("cpu"),
            _whole(tensor.storage_size),
            b"tQ",
            _whole(tensor.offset),
            b"(" + b"".join(map(_whole, tensor.shape)) + b"t",
            b"(" + b"".join(map(_whole, tensor.stride)) + b"t",
            b"\x89ccollections\nOrderedDict\n)RtR",
        ]
    out.append(b"u.")
    return b"".join(out)


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _whole(number: int) -> bytes:
    if number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    raw = number.to_bytes(number.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes([len(raw)]) + raw
