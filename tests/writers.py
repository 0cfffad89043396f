"""Writers of public checkpoint formats, for tests: opcode by opcode, without torch and without the `pickle` module."""

import io
import json
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
# What torch keeps as buffers; all other arrays of the tests are parameters.
BUFFERS = ("resample_filter", "freqs", "u", "num_batches_tracked", "running_mean", "running_var")


class View(NamedTuple):
    """A tensor on a storage that others may share: a 1-d array; offset, size and stride count elements."""

    storage: np.ndarray
    offset: int
    size: tuple
    stride: tuple

    def array(self):
        strides = [step * self.storage.itemsize for step in self.stride]
        return np.lib.stride_tricks.as_strided(self.storage[self.offset :], self.size, strides, writeable=False)


class Named:
    """A global."""

    def __init__(self, name):
        self.module, self.name = name.split(" ")


class Made:
    """REDUCE (or NEWOBJ) of a global "module name" on arguments, then BUILD with a state."""

    def __init__(self, name, *arguments, state=None, opcode=b"R"):
        self.function, self.arguments, self.state, self.opcode = Named(name), arguments, state, opcode


class Storage:
    """A storage with given bytes; torch writes a persistent id, EDM a legacy stream."""

    def __init__(self, data):
        self.data = data


class Raw:
    """Opcodes as they are, for what no pickler writes."""

    def __init__(self, opcodes):
        self.opcodes = opcodes


class Pickler:
    """Writes what Python's pickler writes: frames and short strings from protocol 4 on, memos of what may repeat."""

    def __init__(self, protocol=2, persistent=None):
        self.protocol, self.persistent = protocol, persistent
        self.memo, self.count, self.kept, self.out = {}, 0, [], bytearray()

    def dumps(self, value):
        self.save(value)
        body = bytes(self.out) + b"."
        frame = b"\x95" + struct.pack("<Q", len(body)) if self.protocol >= 4 else b""
        return b"\x80" + bytes([self.protocol]) + frame + body

    def save(self, value):
        key = (value.module, value.name) if isinstance(value, Named) else value if type(value) is str else id(value)
        if key in self.memo:
            self._indexed(b"h", b"j", self.memo[key])
            return
        self.kept.append(value)  # an id is another object's once its own is gone
        getattr(self, f"_{type(value).__name__.lower()}", self._other)(value, key)

    def _memoize(self, key):
        index = self.memo[key] = self.count
        self.count += 1
        if self.protocol >= 4:
            self.out += b"\x94"
        else:
            self._indexed(b"q", b"r", index)

    def _indexed(self, short, long, index):
        self.out += short + bytes([index]) if index < 256 else long + struct.pack("<I", index)

    def _nonetype(self, value, key):
        self.out += b"N"

    def _bool(self, value, key):
        self.out += b"\x88" if value else b"\x89"

    def _int(self, value, key):
        if 0 <= value < 256:
            self.out += b"K" + bytes([value])
        elif 0 <= value < 2**16:
            self.out += b"M" + struct.pack("<H", value)
        elif -(2**31) <= value < 2**31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.out += b"\x8a" + bytes([len(data)]) + data

    def _float(self, value, key):
        self.out += b"G" + struct.pack(">d", value)

    def _str(self, value, key):
        data = value.encode()
        short = self.protocol >= 4 and len(data) < 256
        self.out += b"\x8c" + bytes([len(data)]) if short else b"X" + struct.pack("<I", len(data))
        self.out += data
        self._memoize(key)

    def _bytes(self, value, key):
        self.out += b"C" + bytes([len(value)]) if len(value) < 256 else b"B" + struct.pack("<I", len(value))
        self.out += value
        self._memoize(key)

    def _tuple(self, value, key):
        if len(value) > 3:
            self.out += b"("
        for item in value:
            self.save(item)
        self.out += [b")", b"\x85", b"\x86", b"\x87"][len(value)] if len(value) <= 3 else b"t"
        if value:
            self._memoize(key)

    def _items(self, items, single, several):
        items = list(items)
        if len(items) > 1 or (items and not single):
            self.out += b"("
        for item in items:
            for part in item:
                self.save(part)
        if items:
            self.out += single if len(items) == 1 and single else several

    def _list(self, value, key):
        self.out += b"]"
        self._memoize(key)
        self._items(((item,) for item in value), b"a", b"e")

    def _dict(self, value, key):
        self.out += b"}"
        self._memoize(key)
        self._items(value.items(), b"s", b"u")

    def _set(self, value, key):
        self.out += b"\x8f"
        self._memoize(key)
        self._items(((item,) for item in value), b"", b"\x90")

    def _ordereddict(self, value, key):
        self.save(Named("collections OrderedDict"))
        self.out += b")R"
        self._memoize(key)
        self._items(value.items(), b"s", b"u")
        if vars(value):
            self.save(dict(vars(value)))
            self.out += b"b"

    def _named(self, value, key):
        if self.protocol >= 4:
            self.save(value.module)
            self.save(value.name)
            self.out += b"\x93"
        else:
            self.out += f"c{value.module}\n{value.name}\n".encode()
        self._memoize(key)

    def _made(self, value, key):
        self.save(value.function)
        self.save(value.arguments)
        self.out += value.opcode
        self._memoize(key)
        if value.state is not None:
            self.save(value.state)
            self.out += b"b"

    def _storage(self, value, key):
        if self.persistent is None:
            made = Made("torch.storage _load_from_bytes", legacy_bytes(value))
            self.save(made)
            self.memo[key] = self.memo[id(made)]
        else:
            self.save(self.persistent(value))
            self.out += b"Q"

    def _raw(self, value, key):
        self.out += value.opcodes

    def _other(self, value, key):
        assert isinstance(value, np.generic), f"no opcode for {value!r}"
        order = "<" if value.itemsize > 1 else "|"
        kind = Made("numpy dtype", value.dtype.str[1:], False, True, state=(3, order, None, None, None, -1, -1, 0))
        self.save(Made("numpy.core.multiarray scalar", kind, value.tobytes()))


class Tensors:
    """Makes tensors of arrays and views; views of one array share a storage."""

    def __init__(self):
        self.storages = {}

    def __call__(self, array):
        if not isinstance(array, View):
            count = [1] * array.ndim
            for axis in range(array.ndim - 1, 0, -1):
                count[axis - 1] = count[axis] * max(array.shape[axis], 1)
            array = View(np.ravel(array), 0, array.shape, tuple(count))
        _, storage = self.storages.setdefault(id(array.storage), (array.storage, Storage(array.storage)))
        sizes = tuple(map(int, array.size)), tuple(map(int, array.stride))
        return Made("torch._utils _rebuild_tensor_v2", storage, array.offset, *sizes, False, OrderedDict())


def parameter(tensor):
    return Made("torch._utils _rebuild_parameter", tensor, True, OrderedDict())


def state_dict(arrays):
    """The value that torch pickles for a state dict, with the versions of its modules as an attribute."""
    tensors = Tensors()
    state = OrderedDict((name, tensors(array)) for name, array in arrays.items())
    state._metadata = OrderedDict({"": {"version": 1}})
    return state


class Ids:
    """Persistent ids of storages, and the storages by key."""

    def __init__(self, *view):
        self.keys, self.view = {}, view

    def __call__(self, storage):
        key = next((key for key, known in self.keys.items() if known is storage), str(len(self.keys)))
        self.keys[key] = storage
        kind = Named(f"torch {STORAGES[storage.data.dtype.name]}")
        return "storage", kind, key, "cpu", int(storage.data.size), *self.view


def zip_bytes(pickled, storages=(), *, root="archive", extra=(), compression=zipfile.ZIP_STORED):
    """A torch zip file of a data.pkl, storages (key, bytes) and extra entries (name, bytes)."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", pickled)
        archive.writestr(f"{root}/byteorder", b"little")
        for key, data in storages:
            archive.writestr(f"{root}/data/{key}", data)
        archive.writestr(f"{root}/version", b"3\n")
        archive.writestr(f"{root}/.data/serialization_id", b"0123")
        for name, data in extra:
            archive.writestr(name, data)
    return file.getvalue()


def legacy_parts(value, protocol=2):
    """The six parts of a legacy stream: magic number, protocol, facts, object, keys, storages."""
    ids = Ids(None)
    facts = {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    content = Pickler(protocol, ids).dumps(value)
    keys = sorted(ids.keys)
    data = b"".join(struct.pack("<q", ids.keys[key].data.size) + ids.keys[key].data.tobytes() for key in keys)
    return [
        *(Pickler(protocol).dumps(part) for part in (MAGIC, 1001, facts)),
        content,
        Pickler(protocol).dumps(keys),
        data,
    ]


def legacy_bytes(value, protocol=2):
    return b"".join(legacy_parts(value, protocol))


def write_torch_zip(path, arrays, *, root="archive", wrap=lambda state: state):
    """Writes a torch zip file; `wrap` takes the state dict and returns what is pickled."""
    ids = Ids()
    pickled = Pickler(2, ids).dumps(wrap(state_dict(arrays)))
    storages = [(key, storage.data.tobytes()) for key, storage in ids.keys.items()]
    Path(path).write_bytes(zip_bytes(pickled, storages, root=root))


def write_torch_legacy(path, arrays, *, wrap=lambda state: state):
    """Writes a torch legacy file."""
    Path(path).write_bytes(legacy_bytes(wrap(state_dict(arrays))))


def write_safetensors(path, arrays, metadata=None):
    """Writes a safetensors file of any of the dtypes in `STORAGES`."""
    names = {"bfloat16": "BF16", "bool": "BOOL", "uint8": "U8"}
    header, body = {"__metadata__": metadata} if metadata else {}, b""
    for name, array in arrays.items():
        dtype = names.get(array.dtype.name, f"{array.dtype.kind.upper()}{8 * array.itemsize}")
        data = array.tobytes()
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    Path(path).write_bytes(safetensors_bytes(header, body))


def safetensors_bytes(header, body):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + body


def persistent_object(cls, state, source="raise SystemExit('the source code of the file was run')"):
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": cls, "state": state}
    return Made("torch_utils.persistence _reconstruct_persistent_obj", meta)


def module_state(parameters=(), buffers=(), modules=(), *, ordered=True, temporary=(), **attributes):
    """The __dict__ of a torch module, of torch 1.12 (OrderedDict) or 2.x (dict)."""
    kind = OrderedDict if ordered else dict
    return {
        "training": False,
        "_parameters": kind(parameters),
        "_buffers": kind(buffers),
        "_non_persistent_buffers_set": set(temporary),
        "_backward_hooks": OrderedDict(),
        "_is_full_backward_hook": None,
        "_modules": kind(modules),
        **attributes,
    }


def edm_network(cls, arguments, arrays, *, ordered=True, none=(), temporary=()):
    """The value that EDM pickles for a network.

    Args:
      cls: class name of the network.
      arguments: keyword arguments of its constructor.
      arrays: arrays and views by name.
      ordered: the state of torch 1.12; False: of torch 2.x.
      none: names of entries that are None.
      temporary: names of buffers that are not part of the state dict.
    """
    tensors = Tensors()
    tree = {}
    for name in (*arrays, *none):
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = None if name in none else tensors(arrays[name])

    def state(node, prefix, **attributes):
        leaves = {name: value for name, value in node.items() if not isinstance(value, dict)}
        buffers = {name: value for name, value in leaves.items() if name in BUFFERS}
        parameters = {name: value and parameter(value) for name, value in leaves.items() if name not in buffers}
        modules = {
            name: child(name, value, f"{prefix}{name}.") for name, value in node.items() if isinstance(value, dict)
        }
        left_out = [name for name in leaves if f"{prefix}{name}" in temporary]
        return module_state(parameters, buffers, modules, ordered=ordered, temporary=left_out, **attributes)

    def child(name, node, prefix):
        if name in ("enc", "dec"):
            return Made("torch.nn.modules.container ModuleDict", state=state(node, prefix), opcode=b"\x81")
        inner, shared = "Conv2d", {}
        if prefix == "model.":
            inner = arguments.get("model_type", "SongUNet")
            shared = {key: value for key, value in arguments.items() if key in ("img_resolution", "label_dim")}
        own = {"_init_args": (), "_init_kwargs": {**shared, "in_channels": 3}, "skip_scale": np.sqrt(np.float64(0.5))}
        return persistent_object(inner, state(node, prefix, **own))

    own = {"sigma_data": 0.5, "_init_args": (), "_init_kwargs": dict(arguments)}
    return persistent_object(cls, state(tree, "", **own))


def write_edm_pickle(path, cls, arguments, arrays, *, snapshot=False, protocol=4, **options):
    """Writes a network as EDM does.

    Args:
      path: the file.
      cls: class name of the network, such as "EDMPrecond".
      arguments: keyword arguments of its constructor.
      arrays: arrays (or views) by name, such as "model.enc.16x16_conv.weight".
      snapshot: add the other entries of a training snapshot.
      protocol: that of the pickle.
      **options: of `edm_network`.
    """
    content = {"ema": edm_network(cls, arguments, arrays, **options)}
    if snapshot:
        content["loss_fn"] = persistent_object("EDMLoss", {"P_mean": -1.2, "_init_args": (), "_init_kwargs": {}})
        content["augment_pipe"] = None
        content["dataset_kwargs"] = {"class_name": "training.dataset.ImageFolderDataset", "use_labels": True}
    Path(path).write_bytes(Pickler(protocol).dumps(content))
