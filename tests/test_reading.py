"""The readers of public checkpoint files: bit-equal to what was stored, and nothing run from hostile files."""

import io
import itertools
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import writers
from hypothesis import given, settings
from hypothesis import strategies as st
from writers import MAGIC, Made, Named, Pickler, Raw, Storage, View

from evodiff_jax.pretrained.reading import _machine, inspect, read
from evodiff_jax.pretrained.reading._cursor import Cursor
from evodiff_jax.pretrained.reading._machine import Budget
from evodiff_jax.pretrained.reading._opcodes import unpickle

LAST_RESORT = "reading it failed with"  # in the message for an error that was overlooked
DTYPES = [np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name) for name in writers.STORAGES]
ARGUMENTS = {"img_resolution": 16, "img_channels": 3, "label_dim": 0, "channel_mult": [1, 2], "dropout": 0.13}


def drawn(shape, dtype=np.float32, seed=0):
    values = np.random.default_rng(seed).integers(0, 2 if dtype == np.bool_ else 100, shape)
    return np.asarray(values).astype(dtype)


ARRAYS = {
    "model.map_layer0.weight": drawn((4, 3)),
    "model.map_layer0.bias": drawn((4,), seed=1),
    "model.enc.16x16_block0.conv0.weight": drawn((4, 3, 3, 3), seed=2),
    "model.enc.16x16_block0.conv0.resample_filter": drawn((1, 1, 2, 2), np.float16, seed=3),
    "model.dec.16x16_conv.weight": drawn((3, 4, 1, 1), ml_dtypes.bfloat16, seed=4),
    "model.dec.16x16_conv.bias": drawn((3,), np.float64, seed=5),
}


def write_edm(path, arrays):
    writers.write_edm_pickle(path, "EDMPrecond", ARGUMENTS, arrays)


WRITE = {
    "EDM pickle": write_edm,
    "torch zip": writers.write_torch_zip,
    "torch legacy": writers.write_torch_legacy,
    "safetensors": writers.write_safetensors,
}
every_format = pytest.mark.parametrize("format", WRITE)
PICKLED = [format for format in WRITE if format != "safetensors"]


def assert_same(arrays, expected):
    assert set(arrays) == set(expected)
    for name, array in expected.items():
        array = array.array() if isinstance(array, View) else array
        found = arrays[name]
        assert (found.dtype, found.shape) == (array.dtype, array.shape), name
        assert found.tobytes() == array.tobytes(), name
        assert not found.flags.writeable


def attempt(reader, path):
    """The contents of a file and None, or None and the message of the error, one line that starts with the path."""
    try:
        return reader(path), ""
    except ValueError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert LAST_RESORT not in message, message
    return None, message


def refused(path, *parts):
    """Asserts that reading ends in a ValueError with these parts of its message, and that `inspect` is no less safe."""
    contents, message = attempt(read, path)
    assert contents is None
    for part in parts:
        assert part in message, message
    attempt(inspect, path)


@pytest.fixture
def path(tmp_path):
    """A file; the marker beside it is what hostile files try to write."""
    yield tmp_path / "file"
    assert not (tmp_path / "marker").exists()


# Round trips.


@every_format
def test_arrays_are_read_as_they_were_stored(format, path):
    WRITE[format](path, ARRAYS)
    contents = read(path)
    assert contents.format == format
    assert_same(contents.arrays, ARRAYS)
    assert inspect(path).refused == ()
    if format == "EDM pickle":
        assert (contents.cls, contents.arguments) == ("EDMPrecond", ARGUMENTS)
    else:
        assert list(contents.arrays) == list(ARRAYS)
        assert contents.cls is contents.arguments is None


@every_format
def test_all_dtypes_and_empty_and_single_arrays(format, path):
    arrays = {}
    for dtype, (index, shape) in itertools.product(DTYPES, enumerate([(), (0,), (3, 0, 2), (1, 5), (2, 3, 4)])):
        arrays[f"model.{dtype.name}.a{index}"] = drawn(shape, dtype, seed=index)
    WRITE[format](path, arrays)
    assert_same(read(path).arrays, arrays)


@every_format
def test_not_a_number_and_signed_zeros_keep_their_bits(format, path):
    bits = np.array([0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000, 0x00000001, 0xFF800000], np.uint32)
    arrays = {"model.weight": bits.view(np.float32), "model.bias": bits.view(ml_dtypes.bfloat16)}
    WRITE[format](path, arrays)
    assert_same(read(path).arrays, arrays)


@every_format
def test_arrays_are_views_of_the_mapped_file(format, path):
    WRITE[format](path, ARRAYS)
    for array in read(path).arrays.values():
        base = array
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base, memoryview)
        assert type(base.obj).__name__ == "mmap"


@pytest.mark.parametrize("format", PICKLED)
def test_views_that_share_a_storage(format, path):
    storage = drawn((60,), seed=7)
    arrays = {
        "model.whole": View(storage, 0, (3, 20), (20, 1)),
        "model.later": View(storage, 24, (2, 3), (6, 2)),
        "model.transposed": View(storage, 5, (5, 4), (1, 5)),
        "model.single": View(storage, 59, (), ()),
        "model.empty": View(storage, 60, (0, 4), (4, 1)),
        "model.expanded": View(storage, 7, (4, 3), (0, 1)),
        "model.one": View(storage, 59, (1, 1), (2**40, 99)),
        "model.other": drawn((60,), seed=8),
    }
    WRITE[format](path, arrays)
    contents = read(path)
    assert_same(contents.arrays, arrays)
    assert np.shares_memory(contents.arrays["model.whole"], contents.arrays["model.later"])


@st.composite
def views(draw):
    size = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    stride = tuple(draw(st.integers(0, 9)) for _ in size)
    offset = draw(st.integers(0, 5))
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True) if count)
    numel = max(last, offset) + 1 + draw(st.integers(0, 3))
    return View(drawn((numel,), draw(st.sampled_from(DTYPES)), seed=numel), offset, size, stride)


@given(st.lists(views(), min_size=1, max_size=4), st.sampled_from(PICKLED))
@settings(max_examples=60, deadline=None)
def test_random_shapes_strides_and_offsets(tmp_path_factory, found, format):
    path = tmp_path_factory.getbasetemp() / "random"
    arrays = {f"model.a{index}": view for index, view in enumerate(found)}
    WRITE[format](path, arrays)
    assert_same(read(path).arrays, arrays)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=300),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(plain, st.integers(2, 5))
@settings(max_examples=60, deadline=None)
def test_the_machine_reads_what_python_writes(value, protocol):
    data = np.frombuffer(pickle.dumps(value, protocol), np.uint8)
    assert unpickle(Cursor(data), {}, Budget()) == value


def test_safetensors_of_the_library(path):
    arrays = {name: array for name, array in ARRAYS.items() if array.dtype != ml_dtypes.bfloat16}
    safetensors.numpy.save_file(arrays, path, {"format": "pt"})
    contents = read(path)
    assert_same(contents.arrays, arrays)
    assert contents.metadata == {"format": "pt"}


# EDM pickles.


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("protocol", [4, 5])
def test_edm_states_of_old_and_new_torch(ordered, protocol, path):
    arrays = {**ARRAYS, "u": drawn((5,)), "model.map_noise.freqs": drawn((2,))}
    options = {"none": ("model.map_layer0.skip", "model.dec.16x16_up.resample_filter"), "snapshot": True}
    options["temporary"] = ("model.map_noise.freqs",)
    writers.write_edm_pickle(path, "iDDPMPrecond", ARGUMENTS, arrays, ordered=ordered, protocol=protocol, **options)
    contents = read(path, entry="ema")
    del arrays["model.map_noise.freqs"]
    assert contents.cls == "iDDPMPrecond"
    assert_same(contents.arrays, arrays)
    assert next(iter(contents.arrays)) == "u"  # a module's own arrays come before those of its modules
    assert list(contents.arrays)[1:4] == list(ARRAYS)[:3]


def test_edm_arguments_are_plain_values(path):
    scalars = {"a": np.float32(0.5), "b": np.int64(-3), "c": np.bool_(True), "d": np.float16(2), "e": np.uint8(255)}
    writers.write_edm_pickle(path, "EDMPrecond", {**scalars, "f": (1, [2.0, None]), "g": {"h": "i"}}, ARRAYS)
    arguments = read(path).arguments
    assert arguments == {"a": 0.5, "b": -3, "c": True, "d": 2.0, "e": 255, "f": [1, [2.0, None]], "g": {"h": "i"}}
    assert {type(arguments[name]) for name in scalars} == {float, int, bool}


def edm(path, state=None, **entries):
    """Writes a pickle with an "ema" of that state, or with those entries."""
    content = {"ema": writers.persistent_object("EDMPrecond", state)} if state is not None else entries
    path.write_bytes(Pickler(4).dumps(content))


def test_edm_names_and_structures_that_are_refused(path):
    tensor = writers.Tensors()(drawn((2,)))
    state = writers.module_state
    cases = {
        "two tensors 'weight'": state({"weight": tensor}, {"weight": tensor}),
        "no dot": state({"a.b": tensor}),
        "'a\\nb'": state({"a\nb": tensor}),
        "the name ''": state({"": tensor}),
        "the name 3": state({3: tensor}),
        "expected a tensor": state({"weight": 1.0}),
        "expected a module": state({}, {}, {"enc": tensor}),
        "None for _parameters": {"_init_kwargs": {}},
        "positional": state(_init_args=(32, 3)),
        "a torch tensor in a of the network": state(_init_kwargs={"a": tensor}),
        "a list for the keyword arguments": state(_init_kwargs=[]),
        "refuses to set '__class__'": state(__class__=1),
        "refuses to set '__setstate__'": state(__setstate__=1),
        "another img_resolution": state(
            {},
            {},
            {"model": writers.persistent_object("SongUNet", state(_init_kwargs={"img_resolution": 32}))},
            _init_kwargs={"img_resolution": 16},
        ),
    }
    for part, value in cases.items():
        edm(path, value)
        refused(path, part)
    edm(path, other=1)
    refused(path, "'ema'", "'other'")
    edm(path, ema=None)
    refused(path, "None for 'ema'")
    path.write_bytes(Pickler(4).dumps([1]))
    refused(path, "a list")
    write_edm(path, ARRAYS)
    with pytest.raises(ValueError, match="'G_ema'"):
        read(path, entry="G_ema")


@pytest.mark.parametrize("key", ["type", "version", "module_src", "class_name", "state"])
def test_edm_objects_of_another_kind_are_refused(key, path):
    made = writers.persistent_object("EDMPrecond", writers.module_state())
    for value in (7, None, "function", "a b\n"):
        made.arguments[0][key], before = value, made.arguments[0][key]
        if not (key == "module_src" and isinstance(value, str)) and (key, value) != ("class_name", "function"):
            edm(path, ema=made)
            refused(path)
        made.arguments[0][key] = before
    del made.arguments[0][key]
    edm(path, ema=made)
    refused(path, "a persistent object of other than")


def test_edm_modules_that_contain_themselves_are_refused(path):
    inner = Made("torch.nn.modules.container ModuleDict", opcode=b"\x81")
    inner.state = writers.module_state({}, {}, {"again": inner})
    edm(path, writers.module_state({}, {}, {"enc": inner}))
    refused(path, "inside itself")
    deep = writers.module_state()
    for _ in range(40):
        deep = writers.module_state({}, {}, {"enc": writers.persistent_object("A", deep)})
    edm(path, deep)
    refused(path, "too deep")


def test_edm_arguments_that_contain_themselves_or_explode_are_refused(path, monkeypatch):
    monkeypatch.setattr(_machine, "MAX_STEPS", 50_000)
    cycle = []
    cycle.append(cycle)
    edm(path, writers.module_state(_init_kwargs={"a": cycle}))
    refused(path, "in itself")
    laughs = [0]
    for _ in range(25):
        laughs = [laughs, laughs]
    edm(path, writers.module_state(_init_kwargs={"a": laughs}))
    assert "steps" in attempt(read, path)[1]


# Torch checkpoints around state dicts.


@pytest.mark.parametrize("write", [writers.write_torch_zip, writers.write_torch_legacy])
def test_training_checkpoints_ask_for_an_entry(write, path):
    other = writers.Tensors()(drawn((3,)))

    def wrap(state):
        optimizer = {"state": {0: {"exp_avg": other}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
        return {"model": {"w": other}, "ema": state, "opt": optimizer, "steps": 3, "inner": {"model": state}}

    write(path, ARRAYS, wrap=wrap)
    refused(path, "'model', 'ema', 'inner.model'", "--entry")
    assert_same(read(path, entry="ema").arrays, ARRAYS)
    assert_same(read(path, entry="inner.model").arrays, ARRAYS)
    with pytest.raises(ValueError, match=r"'nothing'.*'model', 'ema', 'inner.model'"):
        read(path, entry="nothing")

    write(path, ARRAYS, wrap=lambda state: {"state_dict": state, "epoch": 3, "rng": other, "note": ["a", 1.5, None]})
    assert_same(read(path).arrays, ARRAYS)

    write(path, ARRAYS, wrap=lambda state: {"model": state, "args": Made("argparse Namespace", state={"lr": 1})})
    refused(path, "'argparse Namespace'", "the state dict alone")
    assert inspect(path).refused == ("argparse Namespace",)
    assert_same(inspect(path).arrays, ARRAYS)


def test_an_entry_of_files_without_entries_is_refused(path):
    for write in (writers.write_torch_zip, writers.write_safetensors):
        write(path, ARRAYS)
        with pytest.raises(ValueError, match="leave out entry"):
            read(path, entry="ema")


def test_files_without_a_state_dict_are_refused(path):
    tensor = writers.Tensors()(drawn((2,)))
    mixed = {"a": tensor, "epoch": 3}
    cases = {"torch tensor": tensor, "an empty dictionary": {}, "a list": [tensor], "'epoch': 3": mixed}
    for part, value in cases.items():
        path.write_bytes(writers.legacy_bytes(value))
        refused(path, "no state dict", part)
    cycle = {}
    cycle["a"] = {"b": cycle}
    path.write_bytes(writers.legacy_bytes(cycle))
    refused(path, "no state dict")


def test_devices_sizes_parameters_and_the_root_folder_of_a_zip_file(path):
    def wrap(state):
        state["model.map_layer0.bias"] = writers.parameter(state["model.map_layer0.bias"])
        return {"model": state, "device": Made("torch device", "cuda", 0), "size": Made("torch Size", (1, 2))}

    writers.write_torch_zip(path, ARRAYS, root="any name.v2", wrap=wrap)
    assert_same(read(path).arrays, ARRAYS)


# Hostile pickles. Each is put where a checkpoint has its pickle.

TOUCH = "open('marker', 'w').close()"
HOSTILE = {
    "os system": ("touch marker",),
    "posix system": ("touch marker",),
    "nt system": ("touch marker",),
    "builtins eval": (TOUCH,),
    "builtins exec": (TOUCH,),
    "builtins getattr": (1, "__class__"),
    "builtins __import__": ("os",),
    "__builtin__ eval": (TOUCH,),
    "subprocess Popen": (("touch", "marker"),),
    "operator attrgetter": ("system",),
    "operator methodcaller": ("system", "touch marker"),
    "functools partial": (1,),
    "torch.hub load": ("a", "b"),
    "torch load": ("marker",),
    "torch serialization.os.system": ("touch marker",),
    "torch.serialization os.system": ("touch marker",),
    "torch._utils _rebuild_tensor_v2.__globals__": (),
    "collections OrderedDict.__init__": (),
    "collections  OrderedDict": (),
    "Collections OrderedDict": (),
    "numpy load": ("marker",),
    "numpy.f2py.diagnose run": (),
    "runpy run_path": ("marker",),
    "torch.storage _load_from_byte": (b"",),
    "torch.nn.modules.container Sequential": (),
    "torch.nn.modules.module Module": (),
    "copyreg _reconstructor": (1, 2, None),
    "argparse Namespace": (),
    "pickle loads": (b"cos\nsystem\n.",),
    "evodiff_jax.pretrained.reading read": ("marker",),
}


def named(name):
    made = Named("a b")
    made.module, made.name = name.split(" ", 1)
    return made


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


PLACES = {
    "EDM pickle": lambda opcodes: Pickler(4).dumps({"ema": Raw(opcodes)}),
    "protocol 2": lambda opcodes: Pickler(2).dumps({"ema": Raw(opcodes)}),
    "EDM storage": lambda opcodes: Pickler(4).dumps(
        {"ema": Made("torch.storage _load_from_bytes", writers.legacy_bytes(Raw(opcodes)))}
    ),
    "torch zip": lambda opcodes: writers.zip_bytes(Pickler(2).dumps({"a": Raw(opcodes)})),
    "torch legacy": lambda opcodes: writers.legacy_bytes({"a": Raw(opcodes)}),
    "magic number": lambda opcodes: b"\x80\x02\x8a\x01\x000" + opcodes + b".",
}
every_place = pytest.mark.parametrize("place", PLACES)


@every_place
@pytest.mark.parametrize("name", HOSTILE)
def test_no_global_outside_the_list_is_found_or_called(name, place, path, monkeypatch):
    monkeypatch.chdir(path.parent)
    module, attribute = name.split(" ", 1)
    arguments = Pickler(4)
    arguments.save(HOSTILE[name])
    # Memos of the arguments must not meet those around them.
    arguments = bytes(arguments.out).replace(b"\x94", b"")
    ways = {
        "GLOBAL": f"c{module}\n{attribute}\n".encode() + arguments + b"R",
        "STACK_GLOBAL": text(module) + text(attribute) + b"\x93" + arguments + b"R",
        "NEWOBJ": text(module) + text(attribute) + b"\x93" + arguments + b"\x81",
        "BUILD": text(module) + text(attribute) + b"\x93" + arguments + b"b",
        "not called": text(module) + text(attribute) + b"\x93",
        "dropped": text(module) + text(attribute) + b"\x930N",
        "memo": text(attribute) + b"r\xff\xff\x00\x000" + text(module) + b"j\xff\xff\x00\x00\x93" + arguments + b"R",
        "INST": b"(" + text("touch marker") + f"i{module}\n{attribute}\n".encode(),
        "text": b"(S'touch marker'\n" + f"i{module}\n{attribute}\n".encode(),
    }
    for way, opcodes in ways.items():
        path.write_bytes(PLACES[place](opcodes))
        named = "" if way in ("INST", "text") and "  " in name else name
        refused(path, named)
        if way in ("GLOBAL", "BUILD") and place != "magic number":
            assert inspect(path).refused == (name,)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_python_with_a_reduction_are_refused(protocol, path, monkeypatch):
    monkeypatch.chdir(path.parent)

    class Evil:
        def __reduce__(self):
            return exec, (TOUCH,)

    path.write_bytes(pickle.dumps(Evil(), protocol))
    refused(path, "builtin", " exec")
    path.write_bytes(pickle.dumps({"ema": Evil()}, protocol))
    refused(path, "builtin", " exec")


def test_getattr_chains_are_refused_at_the_first_link(path):
    # getattr(getattr(OrderedDict, "__init__"), "__globals__")
    chain = b"cbuiltins\ngetattr\n(ccollections\nOrderedDict\n" + text("__init__") + b"tR"
    for place in PLACES.values():
        path.write_bytes(place(b"cbuiltins\ngetattr\n(" + chain + text("__globals__") + b"tR"))
        refused(path, "'builtins getattr'")


OPCODES = {
    "STRING": b"S'a'\n",
    "INT": b"I1\n",
    "UNICODE": b"Va\n",
    "PERSID": b"Pa\n",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "OBJ": b"(ccollections\nOrderedDict\no",
    "DUP": b"N2",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": b"N\x98",
    "NEWOBJ_EX": b"ccollections\nOrderedDict\n)}\x92",
    "FROZENSET": b"(\x91",
    "BYTEARRAY8": b"\x96" + bytes(8),
    "LONG4": b"\x8b\x01\x00\x00\x00\x01",
    "PUT": b"Np0\n",
}


@pytest.mark.parametrize("name", OPCODES)
def test_opcodes_outside_the_list_are_refused_by_name(name, path):
    for place in ("EDM pickle", "torch zip", "torch legacy", "magic number"):
        path.write_bytes(PLACES[place](OPCODES[name]))
        refused(path)
    path.write_bytes(PLACES["torch zip"](OPCODES[name]))
    if name not in ("OBJ", "NEWOBJ_EX"):  # the global before is not in the list of every place
        refused(path, f"opcode {name}")


ORDERED = b"ccollections\nOrderedDict\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
SUBTLE = {
    "REDUCE on an OrderedDict": ORDERED + b")R)R",
    "NEWOBJ on an OrderedDict": ORDERED + b")R)\x81",
    "NEWOBJ of a function": REBUILD + b")\x81",
    "NEWOBJ of OrderedDict": ORDERED + b")\x81",
    "REDUCE without a tuple": ORDERED + b"]R",
    "OrderedDict of items": ORDERED + b"((" + text("a") + b"Kxtl\x85\x85R",
    "OrderedDict of a function": ORDERED + REBUILD + b"\x85R",
    "REDUCE of a string": text("os.system") + b")R",
    "REDUCE of a tuple": b"))R",
    "BUILD on a function": REBUILD + b"}" + text("a") + b"K\x01sb",
    "BUILD on a class": ORDERED + b"}" + text("__setstate__") + b"K\x01sb",
    "BUILD of __class__": ORDERED + b")R}" + text("__class__") + REBUILD + b"sb",
    "BUILD of __dict__": ORDERED + b")R}" + text("__dict__") + b"}sb",
    "BUILD with slots": ORDERED + b")RN}\x86b",
    "BUILD with a tuple": ORDERED + b")RN}" + text("__class__") + b"Ns\x86b",
    "BUILD on a list": b"]}b",
    "BUILD on None": b"N}b",
    "a tuple as key": b"}N\x85Ns",
    "None as key": b"}NNs",
    "a bool as key": b"}\x88Ns",
    "a list as key": b"}]Ns",
    "a large integer as key": b"}\x8a\x08" + b"\xff" * 7 + b"\x7fNs",
    "a global as key": b"}" + REBUILD + b"Ns",
    "a tuple in a set": b"\x8f()\x90",
    "one key twice": b"}(" + text("a") + b"N" + text("a") + b"Nu",
    "a key without value": b"}(Nu",
    "SETITEM on a list": b"]" + text("a") + b"Ns",
    "SETITEM on a global": ORDERED + text("a") + b"Ns",
    "APPEND on a dict": b"}Na",
    "APPEND on a tuple": b")Na",
    "ADDITEMS on a list": b"](N\x90",
    "a name that is no string": text("os") + b"N\x93",
    "a module that is a list": b"]" + text("system") + b"\x93",
    "an unknown memo": b"h\x99",
    "a name not in UTF-8": b"X\x02\x00\x00\x00\xff\xfe",
    "a surrogate": b"X\x03\x00\x00\x00\xed\xa0\x80",
    "a long string": b"X\xff\xff\xff\xff",
    "a long string of 8": b"\x8d" + b"\xff" * 8,
    "long bytes": b"B\xff\xff\xff\x7f",
    "long bytes of 8": b"\x8e" + b"\xff" * 8,
    "a long frame": b"\x95" + b"\xff" * 8,
    "a global without an end": b"cos",
    "no opcode": b"\xfe",
    "an empty stack": b"00",
    "a mark left": b"(",
    "no mark": b"u",
    "a second protocol": b"\x80\x02",
    "an early end": b"N.",
}


@pytest.mark.parametrize("case", SUBTLE)
def test_subtle_pickles_are_refused(case, path):
    for place in PLACES.values():
        path.write_bytes(place(SUBTLE[case]))
        refused(path)


def test_persistent_ids_where_there_are_none_are_refused(path):
    path.write_bytes(PLACES["EDM pickle"](text("a") + b"Q"))
    refused(path, "BINPERSID")
    for place in ("torch zip", "torch legacy"):
        for pid in (text("a"), text("module") + b"\x85", b"(" + text("storage") + b"NNNNt", b"N"):
            path.write_bytes(PLACES[place](pid + b"Q"))
            refused(path)


def test_a_storage_nested_in_a_storage_is_refused(path):
    nested = writers.legacy_bytes(Storage(drawn((2,))))
    inner = Made("torch.storage _load_from_bytes", nested)
    edm(path, ema=Made("torch.storage _load_from_bytes", writers.legacy_bytes(inner)))
    refused(path, "'torch.storage _load_from_bytes'")
    for data in (writers.legacy_bytes([1]), nested + b"\x00", nested[:-1], b"", b"PK\x03\x04", 3, None, "a"):
        edm(path, ema=Made("torch.storage _load_from_bytes", data))
        refused(path)


def tensor(storage, *geometry, kind="torch._utils _rebuild_tensor_v2"):
    return Made(kind, storage, *geometry)


HUGE = 2**62
GEOMETRIES = {
    "negative offset": (-1, (2,), (1,)),
    "offset past the end": (9, (2,), (1,)),
    "huge offset": (2**63, (2,), (1,)),
    "offset at the end of int64": (2**63 - 1, (1,), (1,)),
    "empty past the end": (11, (0,), (1,)),
    "negative size": (0, (-1,), (1,)),
    "two negative sizes": (0, (-1, -4), (1, 1)),
    "size past the end": (0, (11,), (1,)),
    "huge size": (0, (HUGE,), (0,)),
    "sizes beyond int64": (0, (2**32, 2**32), (0, 0)),
    "sizes that wrap to 0": (0, (2**32, 2**32, 1), (0, 0, 0)),
    "empty and beyond int64": (0, (0, 2**40, 2**40), (0, 0, 0)),
    "expanded to a giant": (0, (2**20, 2**10), (0, 0)),
    "negative stride": (9, (2,), (-1,)),
    "stride past the end": (0, (2,), (10,)),
    "huge stride": (0, (2,), (2**63 - 1,)),
    "strides that wrap": (0, (3, 2), (2**63 - 1, 2)),
    "too few strides": (0, (2, 2), (1,)),
    "bool size": (0, (True,), (1,)),
    "bool offset": (False, (2,), (1,)),
    "float size": (0, (2.0,), (1,)),
    "list size": (0, [2], [1]),
    "string size": (0, "ab", "cd"),
    "no size": (0, None, None),
    "33 dimensions": (0, (1,) * 33, (1,) * 33),
}


@pytest.mark.parametrize("case", GEOMETRIES)
def test_tensors_outside_their_storage_are_refused(case, path):
    made = tensor(Storage(drawn((10,))), *GEOMETRIES[case], False, OrderedDict())
    for data in (writers.legacy_bytes({"a": made}), zipped({"a": made})):
        path.write_bytes(data)
        refused(path)
    edm(path, writers.module_state({"a": made}))
    refused(path)


def zipped(value, **options):
    ids = writers.Ids()
    pickled = Pickler(2, ids).dumps(value)
    return writers.zip_bytes(pickled, [(key, one.data.tobytes()) for key, one in ids.keys.items()], **options)


def test_tensors_of_other_arguments_are_refused(path):
    storage, fine = Storage(drawn((10,))), (0, (2,), (1,))
    hooks = OrderedDict({"a": 1})
    for made in (
        tensor(storage, *fine),
        tensor(storage, *fine, 1, OrderedDict()),
        tensor(storage, *fine, False, hooks),
        tensor(storage, *fine, False, OrderedDict(), {"conj": True}),
        tensor(storage, *fine, False, OrderedDict(), None, None),
        tensor(None, *fine, False, OrderedDict()),
        tensor(Named("torch FloatStorage"), *fine, False, OrderedDict()),
        tensor(tensor(storage, *fine, False, OrderedDict()), *fine, False, OrderedDict()),
        writers.parameter(storage),
        writers.parameter(None),
        Made("torch._utils _rebuild_parameter", tensor(storage, *fine, False, OrderedDict()), True, hooks),
        Made("torch._utils _rebuild_parameter", tensor(storage, *fine, False, OrderedDict())),
        Made("torch FloatStorage", 3),
        Made("torch._utils _rebuild_tensor_v2", storage, *fine, False, OrderedDict(), state={"a": 1}),
    ):
        path.write_bytes(zipped({"a": made}))
        refused(path)
    for metadata in (None, {}):
        path.write_bytes(zipped({"a": tensor(storage, *fine, False, OrderedDict(), metadata)}))
        assert_same(read(path).arrays, {"a": storage.data[:2]})


SCALARS = {
    "object": Made("numpy dtype", "O", False, True),
    "fields": Made("numpy dtype", "V8", False, True, state=(3, "|", None, ("a",), {"a": 1}, 8, 1, 16)),
    "object by state": Made("numpy dtype", "f8", False, True, state=(3, "<", None, ("a",), {"a": 1}, -1, -1, 0)),
    "flags": Made("numpy dtype", "f8", False, True, state=(3, "<", None, None, None, -1, -1, 63)),
    "metadata": Made("numpy dtype", "f8", False, True, state=(4, "<", None, None, None, -1, -1, 0, {})),
    "big-endian": Made("numpy dtype", "f8", False, True, state=(3, ">", None, None, None, -1, -1, 0)),
    "datetime": Made("numpy dtype", "M8[s]", False, True),
    "string": Made("numpy dtype", "S8", False, True),
    "a long double": Made("numpy dtype", "f16", False, True),
    "a comma": Made("numpy dtype", "f4,f4", False, True),
    "few arguments": Made("numpy dtype", "f8"),
    "no name": Made("numpy dtype", None, False, True),
}


@pytest.mark.parametrize("case", SCALARS)
def test_dtypes_but_plain_numbers_are_refused(case, path):
    scalar = Made("numpy.core.multiarray scalar", SCALARS[case], bytes(8))
    edm(path, writers.module_state(skip_scale=scalar))
    refused(path, "dtype")


def test_scalars_of_other_bytes_are_refused_and_both_names_are_read(path):
    def kind(name="f8"):
        return Made("numpy dtype", name, False, True, state=(3, "<" if name != "b1" else "|", *[None] * 3, -1, -1, 0))

    for arguments in (
        (kind(), bytes(7)),
        (kind(), bytes(9)),
        (kind(), "a"),
        (kind(),),
        (None, bytes(8)),
        (kind("b1"), b"\2"),
    ):
        edm(path, writers.module_state(skip_scale=Made("numpy.core.multiarray scalar", *arguments)))
        refused(path, "NumPy")
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        scalar = Made(f"{module} scalar", kind(), struct.pack("<d", 0.7))
        edm(path, writers.module_state(_init_kwargs={"a": scalar}))
        assert read(path).arguments == {"a": 0.7}


# Damaged and hostile containers of pickles.


@every_format
def test_every_cut_is_refused(format, path):
    WRITE[format](path, ARRAYS)
    data = path.read_bytes()
    cuts = np.random.default_rng(0).choice(len(data), min(200, len(data)), replace=False)
    for cut in (*cuts, 1, 2, 8, 9, len(data) - 1):
        path.write_bytes(data[:cut])
        refused(path)


@every_format
def test_changed_bytes_are_refused_or_harmless(format, path):
    WRITE[format](path, ARRAYS)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(400):
        changed = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            changed[place] = rng.integers(0, 256)
        path.write_bytes(changed)
        contents, _ = attempt(read, path)
        for array in contents.arrays.values() if contents else ():
            array.tobytes()


@every_format
def test_bytes_after_the_end_are_refused(format, path):
    WRITE[format](path, ARRAYS)
    path.write_bytes(path.read_bytes() + b"\x00")
    refused(path)


@pytest.mark.parametrize("place", range(6))
def test_every_part_of_a_legacy_file_is_checked(place, path):
    made = writers.state_dict({"a": drawn((3,)), "b": drawn((4,))})
    wrong = [
        [2, MAGIC + 1, "a", [MAGIC]],
        [1000, "1001", True],
        [{}, {"little_endian": False}, {"little_endian": 1}, 3],
        [],
        [["0"], ["0", "1", "2"], ["1", "2"], ["0", "0"], [0, 1], "01", {"0": 1}],
        [],
    ]
    for value in wrong[place]:
        parts = writers.legacy_parts(made)
        parts[place] = Pickler(2).dumps(value)
        path.write_bytes(b"".join(parts))
        refused(path)
    parts = writers.legacy_parts(made)
    if place == 0:
        path.write_bytes(b"".join([Pickler(2).dumps(MAGIC ^ 4), *parts[1:]]))
        refused(path, "magic number")
    if place == 5:
        for numel in (-1, 2, 4, 2**62):
            path.write_bytes(b"".join(parts[:5]) + struct.pack("<q", numel) + parts[5][8:])
            refused(path)


def test_persistent_ids_of_storages_are_checked(path):
    kind, data = Named("torch FloatStorage"), drawn((4,))
    made = tensor(Raw(b"Q"), 0, (2,), (1,), False, OrderedDict())
    fine = ("storage", kind, "0", "cpu", 4)
    wrong = [
        ("storage", kind, "0", "cpu", 5),
        ("storage", kind, "0", "cpu", 2**61),
        ("storage", kind, "0", "cpu", -4),
        ("storage", kind, "0", "cpu", True),
        ("storage", kind, "0", "cpu", 4.0),
        ("storage", kind, 0, "cpu", 4),
        ("storage", kind, "0", None, 4),
        ("storage", Named("collections OrderedDict"), "0", "cpu", 4),
        ("storage", "FloatStorage", "0", "cpu", 4),
        ("storage", Named("torch HalfStorage"), "0", "cpu", 4),
        ("storage", kind, "9", "cpu", 4),
        ("storage", kind, "../data.pkl", "cpu", 4),
        ("tensor", kind, "0", "cpu", 4),
        ("storage", kind, "0", "cpu", 4, ("1", 0, 2)),
        (b"storage", kind, "0", "cpu", 4),
        ("storage", kind, b"0", "cpu", 4),
        (),
    ]

    def write(pid, view):
        persistent = SimpleNamespace(pid=pid)
        pickled = Pickler(2, lambda storage: persistent.pid).dumps({"a": tensor(Storage(data), *made.arguments[1:])})
        if not view:
            path.write_bytes(writers.zip_bytes(pickled, [("0", data.tobytes())]))
        else:
            parts = writers.legacy_parts({"a": tensor(Storage(data), *made.arguments[1:])})
            path.write_bytes(b"".join([*parts[:3], pickled, *parts[4:]]))

    for view in (False, True):
        write(fine, view)
        assert_same(read(path).arrays, {"a": data[:2]})
        for pid in wrong:
            write(pid, view)
            refused(path)
    write((*fine, ("1", 0, 2)), view=True)
    refused(path, "torch 0.4")


def test_bools_other_than_0_and_1_are_refused(path):
    for write in (write_edm, writers.write_torch_zip, writers.write_torch_legacy, writers.write_safetensors):
        write(path, {"model.mask": np.array([0, 1, 2], np.uint8).view(np.bool_)})
        refused(path, "0 or 1")


def rezipped(change=lambda data: data, **options):
    return change(zipped(writers.state_dict(ARRAYS), **options))


def test_zip_entries_are_checked(path):
    other = Pickler(2).dumps({})
    cases = {
        "compressed": rezipped(compression=zipfile.ZIP_DEFLATED),
        "in 2 folders": rezipped(extra=[("other/file", b"")]),
        "TorchScript": rezipped(extra=[("archive/constants.pkl", other)]),
        "TorchScript archive": rezipped(extra=[("archive/code/__torch__.py", b"")]),
        "'archive/../../marker'": rezipped(extra=[("archive/../../marker", b"")]),
        "'/archive/marker'": rezipped(extra=[("/archive/marker", b"")]),
        "'../marker'": rezipped(extra=[("../marker", b"")]),
        "'marker'": rezipped(extra=[("marker", b"")]),
        "'C:/marker'": rezipped(extra=[("C:/marker", b"")]),
        "without data.pkl": rezipped(change=lambda data: data.replace(b"data.pkl", b"dato.pkl")),
        "byte order b'big'": rezipped(extra=[]).replace(b"little", b"big\n\n\n"),
        "unlike its checksum": rezipped(change=lambda data: data.replace(b"OrderedDict", b"OrderedDikt", 1)),
        "encrypted": rezipped(change=lambda data: with_flags(data, 1)),
        "disagrees with the directory": rezipped(change=lambda data: data.replace(b"archive/", b"brchive/", 1)),
    }
    for part, data in cases.items():
        path.write_bytes(data)
        refused(path, part)
    with pytest.warns(UserWarning, match="Duplicate"):
        data = rezipped(extra=[("archive/data.pkl", other)])
    path.write_bytes(data)
    refused(path, "two zip entries 'archive/data.pkl'")
    path.write_bytes(rezipped(extra=[("other/data.pkl", other)]))
    refused(path, "two zip entries 'other/data.pkl'")
    path.write_bytes(b"PK\x05\x06" + bytes(18))
    refused(path, "without data.pkl")


def directory_entries(data):
    """The positions of the entries of a zip file's directory."""
    at = data.index(b"PK\x01\x02")
    while data[at : at + 4] == b"PK\x01\x02":
        yield at
        at += 46 + sum(struct.unpack_from("<3H", data, at + 28))


def with_flags(data, flags):
    data = bytearray(data)
    for at in list(directory_entries(data)):
        struct.pack_into("<H", data, at + 8, flags)
        struct.pack_into("<H", data, struct.unpack_from("<I", data, at + 42)[0] + 6, flags)
    return bytes(data)


def test_zip_sizes_and_places_are_checked(path):
    data = rezipped()
    for field, layout in ((20, "<I"), (24, "<I"), (42, "<I"), (10, "<H")):
        for value in (0, 1, 8, 1000, 2**16 - 1, *([2**31, 2**32 - 1] if layout == "<I" else [])):
            for at in directory_entries(data):
                changed = bytearray(data)
                if struct.unpack_from(layout, data, at + field)[0] == value:
                    continue
                struct.pack_into(layout, changed, at + field, value)
                path.write_bytes(changed)
                refused(path)
    for field in (18, 22):  # sizes in the header of the entry itself
        changed = bytearray(data)
        struct.pack_into("<I", changed, field, 5)
        path.write_bytes(changed)
        refused(path, "disagrees with the directory")


def test_zip_entries_that_overlap_are_refused(path):
    """An entry inside the data of another, with a header that agrees: bytes that count twice."""
    inner = (
        b"PK\x03\x04" + struct.pack("<5H3I2H", 20, 0, 0, 0, 0, 0, 4, 4, len("archive/data/z"), 0) + b"archive/data/z"
    )
    extra = [("archive/data/a", inner + bytes(4)), ("archive/data/z", bytes(4))]
    data = rezipped(extra=extra)
    path.write_bytes(data)
    assert_same(read(path).arrays, ARRAYS)
    changed = bytearray(data)
    *_, last = directory_entries(data)
    struct.pack_into("<I", changed, last + 42, data.index(inner))
    path.write_bytes(changed)
    refused(path, "overlapping", "archive/data/z")


def test_torch_zip_files_of_other_writers(path):
    """Sizes after the data (bit 3 of the flags), and sizes in a zip64 field."""
    made, ids = writers.state_dict(ARRAYS), writers.Ids()
    pickled = Pickler(2, ids).dumps(made)
    entries = [("data.pkl", pickled), *((f"data/{key}", one.data.tobytes()) for key, one in ids.keys.items())]

    class Pipe(io.RawIOBase):
        """Not seekable, so that zipfile writes sizes after the data."""

        def __init__(self):
            self.data = b""

        def writable(self):
            return True

        def write(self, data, /):
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w") as archive:  # pyright: ignore[reportArgumentType]
        for name, data in entries:
            archive.writestr(f"a/{name}", data)
    path.write_bytes(pipe.data)
    assert_same(read(path).arrays, ARRAYS)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries:
            with archive.open(f"a/{name}", "w", force_zip64=True) as file:
                file.write(data)
    assert_same(read(path).arrays, ARRAYS)


def test_bombs_of_opcodes_are_refused(path, monkeypatch):
    monkeypatch.setattr(_machine, "MAX_STEPS", 50_000)
    for opcode in (b"]", b"(", b"\x94"):
        path.write_bytes(b"\x80\x04N" + opcode * _machine.MAX_STEPS + b".")
        assert "steps" in attempt(read, path)[1]


def test_many_names_of_one_large_storage_are_refused(path):
    storage = np.zeros(2**20, np.float32)
    arrays = {f"a{index}": View(storage, 0, (2**20,), (1,)) for index in range(100)}
    writers.write_torch_zip(path, arrays)
    refused(path, "in all")


def test_deep_nesting_is_no_crash(path):
    count = 80_000  # far beyond Python's recursion limit
    for opcodes in (b"]" * count + b"a" * (count - 1), b")" + b"\x85" * count, b"}" + b"K\x01}" * count + b"s" * count):
        path.write_bytes(PLACES["torch zip"](opcodes))
        assert "no state dict" in attempt(read, path)[1]


# safetensors.


def test_headers_are_checked_like_the_library_does(path):
    def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
        return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}

    body = bytes(16)
    cases = {
        "a hole at the start": {"a": entry(offsets=(8, 16))},
        "a hole between": {"a": entry(), "b": entry("F32", (1,), (12, 16))},
        "an overlap": {"a": entry(), "b": entry("F32", (3,), (4, 16))},
        "too little": {"a": entry()},
        "too much": {"a": entry("F32", (5,), (0, 20))},
        "a wrong size": {"a": entry("F32", (3,), (0, 16))},
        "a backward offset": {"a": entry(shape=(0,), offsets=(16, 0))},
        "negative offsets": {"a": entry(offsets=(-8, 0)), "b": entry(shape=(4,), offsets=(0, 16))},
        "an overflowing shape": {"a": entry("F32", (2**62, 4), (0, 16))},
        "a negative shape": {"a": entry("F32", (-2, -2), (0, 16))},
        "a float in the shape": {"a": entry("F32", (4.0,), (0, 16))},
        "a bool in the shape": {"a": entry("F32", (True, 4), (0, 16))},
        "an unknown dtype": {"a": entry("F31", (4,), (0, 16))},
        "a dtype of a list": {"a": entry(["F32"], (4,), (0, 16))},
        "three offsets": {"a": entry("F32", (4,), (0, 16, 16))},
        "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
        "a list": [entry("F32", (4,), (0, 16))],
        "an entry that is a list": {"a": []},
        "metadata of numbers": {"__metadata__": {"a": 1}, "a": entry("F32", (4,), (0, 16))},
        "metadata of a list": {"__metadata__": [], "a": entry("F32", (4,), (0, 16))},
        "no JSON": '{"a": ',
        "NaN": '{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 16]}}',
        "a name twice": '{"a": %s, "a": %s}' % ((json.dumps(entry("F32", (4,), (0, 16))),) * 2),
        "deep JSON": "{" + '"a":[' * 50_000,
        "a long integer": '{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 16]}}' % ("9" * 5000),
    }
    for case, header in cases.items():
        data = writers.safetensors_bytes(header, body)
        if case != "a name twice":
            with pytest.raises(safetensors.SafetensorError):
                safetensors.deserialize(data)
        path.write_bytes(data)
        refused(path)
    for length in (0, 1, 10**6, 2**40, 2**63, 2**64 - 1):
        path.write_bytes(
            struct.pack("<Q", length) + writers.safetensors_bytes({"a": entry("F32", (4,), (0, 16))}, body)[8:]
        )
        refused(path)
    path.write_bytes(writers.safetensors_bytes({"a\nb": entry("F32", (4,), (0, 16))}, body))
    refused(path, "'a\\nb'")


def sharded(folder, **weight_map):
    names = list(ARRAYS)
    writers.write_safetensors(folder / "one.safetensors", {name: ARRAYS[name] for name in names[:2]}, {"format": "pt"})
    writers.write_safetensors(folder / "two.safetensors", {name: ARRAYS[name] for name in names[2:]})
    placed = {name: "one.safetensors" if name in names[:2] else "two.safetensors" for name in names}
    index = {"metadata": {"total_size": 1}, "weight_map": {**placed, **weight_map}}
    (folder / "index").write_text(json.dumps(index, indent=2))
    return folder / "index"


def test_shards_are_read_by_their_index(tmp_path):
    contents = read(sharded(tmp_path))
    assert contents.format == "safetensors"
    assert contents.metadata == {"format": "pt"}
    assert list(contents.arrays) == list(ARRAYS)
    assert_same(contents.arrays, ARRAYS)


def test_indices_that_disagree_with_their_shards_are_refused(tmp_path):
    first = next(iter(ARRAYS))
    refused(sharded(tmp_path, **{first: "two.safetensors"}), first)
    refused(sharded(tmp_path, other="two.safetensors"), "'other'", "lacks it")
    path = sharded(tmp_path)
    path.write_text(path.read_text().replace(first, "renamed"))
    refused(path, first)
    with pytest.raises(FileNotFoundError, match=r"three\.safetensors"):
        read(sharded(tmp_path, other="three.safetensors"))
    (tmp_path / "sub").mkdir()
    writers.write_safetensors(tmp_path / "sub" / "marked", {"other": drawn((2,))})
    for file in (
        "sub/marked",
        "../x",
        str(tmp_path / "sub" / "marked"),
        "..",
        ".",
        "",
        "sub",
        "a\\b",
        "c:d",
        "a\x00b",
        3,
        None,
    ):
        refused(sharded(tmp_path, other=file))
    (tmp_path / "three.safetensors").write_bytes(Pickler(4).dumps({"ema": named("os system")}))
    refused(sharded(tmp_path, other="three.safetensors"), "three.safetensors")
    refused(sharded(tmp_path, other="index"), "'index'")
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": ', '{"a":' * 10_000):
        path.write_text(text)
        refused(path)


# Files that are something else.


def test_other_files_are_named(path, tmp_path):
    cases = [
        ("an empty file", b""),
        ("a web page", b"<!DOCTYPE html><html></html>"),
        ("a web page", b"\n  <html>"),
        ("Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("a tar file", bytes(257) + b"ustar" + bytes(250)),
        ("unknown format: it starts with b'\\x89HDF", b"\x89HDF\r\n\x1a\n" + bytes(20)),
        ("unknown format", b"Entry not found"),
        ("known are torch .pt", b"\x1f\x8b" + bytes(100)),
        ("without a weight_map", b'{"error": "not found"}'),
        ("cut off", b"\x80"),
        ("cut off", b"\x80\x04"),
        ("no pickle of protocol 2 to 5", b"\x80\x01."),
        ("no pickle of protocol 2 to 5", b"\x80\x06."),
    ]
    for part, data in cases:
        path.write_bytes(data)
        refused(path, part)
    with pytest.raises(FileNotFoundError, match="missing"):
        read(tmp_path / "missing")
    refused(tmp_path, "is a folder")


def test_inspect_lists_globals_and_what_can_be_read(path):
    evil = Made("os system", "touch marker")
    writers.write_torch_zip(
        path, ARRAYS, wrap=lambda state: {"model": state, "a": evil, "b": [Made("builtins eval", "1")]}
    )
    refused(path, "'os system'")
    contents = inspect(path)
    assert contents.refused == ("os system", "builtins eval")
    assert_same(contents.arrays, ARRAYS)
    edm(path, ema=evil)
    assert inspect(path) == ("EDM pickle", {}, None, None, {}, ("os system",))
    odd = b"cos\nsystem\n)R}(Nu(N\x90Na}b0" + text("a\nb") + text("c") + b"\x93"
    path.write_bytes(PLACES["EDM pickle"](odd))
    assert all(name.isprintable() for name in inspect(path).refused)
