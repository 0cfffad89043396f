"""safetensors files, and index files that name the shards of a checkpoint.

The header is checked here rather than by the package `safetensors`: its arrays are copies, and bfloat16 has none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from evodiff_jax.pretrained.reading._refusals import DOWNLOAD, FormatError, check_name, shown
from evodiff_jax.pretrained.reading._tensors import check_bools

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
# Headers and indices of released files stay below 1 MB; parsed JSON takes up to 20 times its length.
_MAX_JSON = 2**24
_MAX_DIMENSIONS = 32

Arrays = dict[str, np.ndarray]


def read_file(data: np.ndarray) -> tuple[Arrays, dict[str, str]]:
    """Returns the arrays of a safetensors file, as views of its bytes in the order of its header, and its metadata.

    Raises:
      FormatError: the file is cut off or damaged, or has a dtype other than F64 to BOOL.
    """
    length = int.from_bytes(bytes(data[:8]), "little")
    if len(data) < 8 or length > len(data) - 8:
        raise FormatError(f"is cut off or damaged: a header of {length:,} bytes, in {len(data):,}; {DOWNLOAD}")
    header = _parsed(data[8 : 8 + length], "header")
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
        raise FormatError(f"has metadata other than strings; {DOWNLOAD}")
    body = data[8 + length :]
    spans = {name: _span(name, entry, len(body)) for name, entry in header.items()}
    end = 0
    for name, (start, stop, _, _) in sorted(spans.items(), key=lambda item: item[1][:2]):
        if start != end:
            raise FormatError(
                f"has a hole or an overlap of data before {shown(name)}, at byte {end} or {start}; {DOWNLOAD}"
            )
        end = stop
    if end != len(body):
        raise FormatError(f"is cut off or damaged: {len(body):,} bytes of data, its header says {end:,}; {DOWNLOAD}")
    return {name: _array(name, body, *span) for name, span in spans.items()}, metadata


def read_index(data: np.ndarray, shard: Callable[[str], np.ndarray]) -> tuple[Arrays, dict[str, str]]:
    """Returns the arrays that an index names, in its order, and the metadata of their files.

    Args:
      data: the bytes of the index, JSON with a "weight_map".
      shard: returns the bytes of a file beside the index.

    Raises:
      FormatError: the index or a shard is damaged, leads out of its folder, or they disagree.
    """
    placed = _parsed(data, "index").get("weight_map")
    if type(placed) is not dict or not placed:
        raise FormatError(
            "is a JSON file without a weight_map: no index of a checkpoint; pass the index or the weights"
        )
    found: dict[str, Arrays] = {}
    metadata: dict[str, str] = {}
    for name, file in placed.items():
        check_name(name, "its weight_map")
        check_name(file, "a file of its weight_map")
        if file in (".", "..") or any(mark in file for mark in "/\\:"):
            raise FormatError(f"names the file {shown(file)}; the files of an index lie beside it")
        if file in found:
            continue
        try:
            found[file], more = read_file(shard(file))
        except FormatError as error:
            raise FormatError(f"names the file {shown(file)}, which {error}") from None
        metadata.update(more)
    for file, arrays in found.items():
        for name in arrays:
            if placed.get(name) != file:
                raise FormatError(
                    f"places {shown(name)} in {shown(placed.get(name))}, it lies in {shown(file)}; {DOWNLOAD}"
                )
    for name, file in placed.items():
        if name not in found[file]:
            raise FormatError(f"places {shown(name)} in {shown(file)}, which lacks it; {DOWNLOAD}")
    return {name: found[file][name] for name, file in placed.items()}, metadata


def _parsed(data: np.ndarray, part: str) -> dict[str, Any]:
    if len(data) > _MAX_JSON:
        raise FormatError(f"has {part} of {len(data):,} bytes, beyond {_MAX_JSON:,}; {DOWNLOAD}")
    try:
        parsed = json.loads(bytes(data).decode(), object_pairs_hook=_without_duplicates)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"has a damaged {part}, no JSON ({shown(str(error))}); {DOWNLOAD}") from None
    if type(parsed) is not dict:
        raise FormatError(f"has a damaged {part}: {shown(parsed)}, expected a JSON object; {DOWNLOAD}")
    return parsed


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise FormatError(f"has two entries {shown(name)}; {DOWNLOAD}")
        made[name] = value
    return made


def _span(name: str, entry: Any, size: int) -> tuple[int, int, np.dtype, tuple[int, ...]]:
    """Returns (start, stop, dtype, shape) of a header's entry, checked on its own."""
    check_name(name, "its header")
    if type(entry) is not dict or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"has other than dtype, shape and data_offsets for {shown(name)}; {DOWNLOAD}")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(kind) is not str or kind not in _DTYPES:
        raise FormatError(f"has the dtype {shown(kind)} for {shown(name)}; known are {', '.join(_DTYPES)}")
    for values in shape, offsets:
        if type(values) is not list or any(type(value) is not int or not 0 <= value < 2**63 for value in values):
            raise FormatError(f"has a shape or offsets of {shown(name)} that are no integers from 0; {DOWNLOAD}")
    itemsize = _DTYPES[kind].itemsize
    # NumPy multiplies the lengths of an empty array too.
    if len(shape) > _MAX_DIMENSIONS or math.prod(max(count, 1) for count in shape) * itemsize >= 2**63:
        raise FormatError(f"has the shape {shown(tuple(shape))} for {shown(name)}, too large for an array; {DOWNLOAD}")
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        raise FormatError(f"has data offsets {shown(tuple(offsets))} of {shown(name)} outside {size} bytes; {DOWNLOAD}")
    start, stop = offsets
    if stop - start != math.prod(shape) * itemsize:
        raise FormatError(
            f"stores {stop - start} bytes for {shown(name)} of shape {shown(tuple(shape))} and {kind}; {DOWNLOAD}"
        )
    return start, stop, _DTYPES[kind], tuple(shape)


def _array(name: str, body: np.ndarray, start: int, stop: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if dtype == np.bool_:
        check_bools(body[start:stop], name)
    array = np.ndarray(shape, dtype, body[start:stop]) if stop > start else np.empty(shape, dtype)
    array.flags.writeable = False
    return array
