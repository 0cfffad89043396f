"""Stand-ins for torch's storages and tensors: checked where a pickle rebuilds them, made NumPy arrays at the end."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from evodiff_jax.pretrained.reading._refusals import DOWNLOAD, FormatError, check_name, shown
from evodiff_jax.pretrained.reading._standins import Builders, Global, StandIn, listed

DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}

_INT64 = 2**63 - 1
_MAX_DIMENSIONS = 32
# Elements may overlap, as in an expanded tensor. A view costs no memory, but whoever copies it pays for all of it: one
# tensor may exceed its storage by the first, all together 16 times the file by the second.
_MAX_EXCESS = 2**20
_MAX_TOTAL_EXCESS = 2**26


class Storage(StandIn):
    """Numbers in a row; `data`, their bytes, is set once it is known where they lie."""

    described = "a torch storage"

    def __init__(self, dtype: np.dtype, numel: int, data: np.ndarray | None = None):
        self.dtype, self.numel, self.data = dtype, numel, data

    @property
    def nbytes(self) -> int:
        """The number of bytes that the numbers take."""
        return self.numel * self.dtype.itemsize


class Tensor(StandIn):
    """A checked view of a storage. Offset and stride count elements."""

    described = "a torch tensor"

    def __init__(self, storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]):
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    @property
    def nbytes(self) -> int:
        """The number of bytes of a copy."""
        return math.prod(self.size) * self.storage.dtype.itemsize

    def array(self) -> np.ndarray:
        """Returns the tensor as a read-only view of its storage's bytes."""
        dtype, data = self.storage.dtype, self.storage.data
        if data is None:
            raise FormatError(f"has a storage without data; {DOWNLOAD}")
        if 0 in self.size:
            array = np.empty(self.size, dtype)
        else:
            # Torch leaves any number in the stride of an axis of length 1.
            steps = [step if count > 1 else 1 for count, step in zip(self.size, self.stride, strict=True)]
            strides = [step * dtype.itemsize for step in steps]
            array = np.ndarray(self.size, dtype, data, self.offset * dtype.itemsize, strides)
        array.flags.writeable = False
        return array


STORAGES: Builders = {
    pair: entry for name, dtype in DTYPES.items() for pair, entry in listed(f"torch {name}", value=dtype).items()
}


def storage_of(kind: Any, numel: Any) -> Storage:
    """Returns the storage that a persistent id describes: a global of `STORAGES` and a number of elements."""
    if not isinstance(kind, Global) or not isinstance(kind.value, np.dtype):
        raise FormatError(f"has a storage of the type {shown(kind)}; known are {', '.join(DTYPES)}")
    return Storage(kind.value, check_count(numel, "a storage"))


def check_count(value: Any, owner: str) -> int:
    """Returns a number of elements if it is one."""
    if type(value) is not int or not 0 <= value <= _INT64:
        raise FormatError(f"gives {owner} {shown(value)} elements, expected an integer from 0 to 2**63 - 1; {DOWNLOAD}")
    return value


def ordered_dict(arguments: tuple) -> collections.OrderedDict:
    """Builds an empty OrderedDict; pickles fill it by SETITEMS."""
    if arguments:
        raise FormatError("refuses OrderedDict with arguments; checkpoints make it empty and fill it")
    return collections.OrderedDict()


def rebuild_tensor(arguments: tuple) -> Tensor:
    """Builds a tensor from (storage, offset, size, stride, requires_grad, hooks[, metadata])."""
    if not 6 <= len(arguments) <= 7:
        raise FormatError(f"rebuilds a tensor from {len(arguments)} arguments, expected 6 or 7; {DOWNLOAD}")
    storage, offset, size, stride, requires_grad, hooks, *metadata = arguments
    if not isinstance(storage, Storage):
        raise FormatError(f"rebuilds a tensor from {shown(storage)} in place of a storage; {DOWNLOAD}")
    if type(requires_grad) is not bool:
        raise FormatError(f"has a tensor with requires_grad {shown(requires_grad)}, expected a bool; {DOWNLOAD}")
    _check_no_hooks(hooks)
    if metadata and metadata[0] is not None and not (type(metadata[0]) is dict and not metadata[0]):
        raise FormatError(
            "has a tensor with torch metadata (a conjugate or negative view); save it after resolve_neg()"
        )
    _check_geometry(storage, offset, size, stride)
    return Tensor(storage, offset, size, stride)


def rebuild_parameter(arguments: tuple) -> Tensor:
    """Builds a parameter from (tensor, requires_grad, hooks): the tensor itself."""
    if len(arguments) != 3 or not isinstance(arguments[0], Tensor) or type(arguments[1]) is not bool:
        raise FormatError(f"rebuilds a parameter from other than a tensor, a bool and hooks; {DOWNLOAD}")
    _check_no_hooks(arguments[2])
    return arguments[0]


def _check_no_hooks(hooks: Any) -> None:
    if hooks is not None and (type(hooks) is not collections.OrderedDict or hooks):
        raise FormatError("has a tensor with backward hooks; save the state dict alone")


def _check_geometry(storage: Storage, offset: Any, size: Any, stride: Any) -> None:
    if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride):
        raise FormatError(
            f"has a tensor of size {shown(size)} and stride {shown(stride)}, expected equal tuples; {DOWNLOAD}"
        )
    if len(size) > _MAX_DIMENSIONS:
        raise FormatError(f"has a tensor of {len(size)} dimensions, more than {_MAX_DIMENSIONS}; {DOWNLOAD}")
    for what, values in ("offset", (offset,)), ("size", size), ("stride", stride):
        for value in values:
            if type(value) is not int or not 0 <= value <= _INT64:
                raise FormatError(f"has a tensor of {what} {shown(value)}, expected an integer from 0 to 2**63 - 1")
    # NumPy multiplies the lengths of an empty array too.
    if math.prod(max(count, 1) for count in size) * storage.dtype.itemsize > _INT64:
        raise FormatError(f"has a tensor of size {shown(size)}: the number of its bytes is beyond int64")
    past = 0 if 0 in size else 1 + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    if offset + past > storage.numel:
        raise FormatError(
            f"has a tensor of size {shown(size)}, stride {shown(stride)} and offset {offset} that reaches outside its "
            f"storage of {storage.numel} elements; {DOWNLOAD}"
        )
    if math.prod(size) * storage.dtype.itemsize > storage.nbytes + _MAX_EXCESS:
        raise FormatError(f"has a tensor of size {shown(size)} in a storage of {storage.numel} elements only")


def resolve(tensors: Mapping[str, Tensor], file_size: int) -> dict[str, np.ndarray]:
    """Returns named tensors as arrays, views of the file.

    Raises:
      FormatError: a name is unprintable, a bool is neither 0 nor 1, or they are far larger than the file together.
    """
    if (total := sum(tensor.nbytes for tensor in tensors.values())) > 16 * file_size + _MAX_TOTAL_EXCESS:
        raise FormatError(
            f"names arrays of {total:,} bytes in all, in a file of {file_size:,} bytes; it was made to fill memory"
        )
    checked: set[int] = set()
    for name, tensor in tensors.items():
        check_name(name, "its arrays")
        storage = tensor.storage
        if storage.dtype == np.bool_ and id(storage) not in checked:
            checked.add(id(storage))
            check_bools(storage.data, name)
    return {name: tensor.array() for name, tensor in tensors.items()}


def check_bools(data: np.ndarray | None, name: str) -> None:
    """Raises FormatError for bytes other than 0 and 1: NumPy takes what others mean as undefined."""
    if data is not None and data.max(initial=0) > 1:
        raise FormatError(f"has the byte {data.max()} in the bools of {shown(name)}, expected 0 or 1; {DOWNLOAD}")


TENSORS: Builders = {
    **listed("collections OrderedDict", reduce=ordered_dict),
    **listed("torch._utils _rebuild_tensor_v2", reduce=rebuild_tensor),
    **listed("torch._utils _rebuild_parameter", reduce=rebuild_parameter),
}
