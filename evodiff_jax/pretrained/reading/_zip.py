"""The directory of a torch zip file: stored entries of one root folder, checked against their own headers."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

import numpy as np

from evodiff_jax.pretrained.reading._refusals import DOWNLOAD, FormatError, shown

_LOCAL = struct.Struct("<4s5H3I2H")
_ENCODED_NAME, _SIZES_FOLLOW = 0x800, 0x8  # bits of the flags: a name in UTF-8, sizes after the data
_ZIP64 = struct.Struct("<HHQQ")  # an extra field: 1, 16, both sizes, for a header that says 2**32 - 1
# Released files have about 1,000 entries of 100 bytes each in their directory; an entry costs a kilobyte of memory.
_MAX_DIRECTORY = 2**24


class _Bounded(io.BytesIO):
    """The file as `zipfile` sees it: without a copy, and without long reads."""

    def __init__(self, data: np.ndarray):
        super().__init__()
        self._view, self._at = data.data, 0

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._at = max(0, offset + (0, self._at, len(self._view))[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        start = min(self._at, len(self._view))
        self._at = len(self._view) if size is None or size < 0 else min(start + size, len(self._view))
        if self._at - start > _MAX_DIRECTORY:
            raise FormatError(f"has a zip directory of {self._at - start:,} bytes; checkpoints have far smaller ones")
        return bytes(self._view[start : self._at])


def read_entries(data: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the entries of a zip file by their names inside its root folder, as views of its bytes.

    Raises:
      FormatError: the file is damaged, or has compressed, encrypted, overlapping or duplicate entries, entries outside
        one root folder, or a directory that disagrees with the headers of the entries.
    """
    try:
        with zipfile.ZipFile(_Bounded(data)) as archive:
            infos = archive.infolist()
            end = len(data) - 22 - len(archive.comment)  # where the last record has to be
    except FormatError:
        raise
    except Exception as error:  # zipfile lets errors of many types through for damaged directories
        raise FormatError(f"is a zip file that is cut off or damaged ({shown(str(error))}); {DOWNLOAD}") from None
    if bytes(data[max(end, 0) :][:4]) != b"PK\x05\x06":
        raise FormatError(f"has bytes after its zip directory; {DOWNLOAD}")
    inner = [info.filename.partition("/")[2] for info in infos]
    if any(name == "constants.pkl" or name.startswith("code/") for name in inner):
        raise FormatError("is a TorchScript archive, a program; save its state dict with torch.save and pass that")
    entries: dict[str, np.ndarray] = {}
    roots: set[str] = set()
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        root, _, name = _checked_name(info).partition("/")
        roots.add(root)
        if name in entries:
            raise FormatError(f"has two zip entries {shown(info.filename)}; {DOWNLOAD}")
        start = _start(data, info)
        if info.header_offset < end:
            raise FormatError(f"has overlapping zip entries, {shown(info.filename)} and the one before; {DOWNLOAD}")
        end = start + info.file_size
        entries[name] = data[start:end]
        # Checked for the pickle alone: the checksum of the storages would read the whole file.
        if name == "data.pkl" and zlib.crc32(entries[name].data) != info.CRC:
            raise FormatError(f"has a zip entry {shown(info.filename)} unlike its checksum; {DOWNLOAD}")
    if len(roots) > 1:
        raise FormatError(
            f"has zip entries in {len(roots)} folders, {', '.join(map(shown, sorted(roots)[:3]))}; one is due"
        )
    return entries


def _checked_name(info: zipfile.ZipInfo) -> str:
    name = info.orig_filename
    parts = name.split("/")
    if (
        not name.isprintable()
        or name != info.filename
        or len(parts) < 2
        or "\\" in name
        or ":" in parts[0]
        or any(part in ("", ".", "..") for part in parts[:-1])
        or parts[-1] in (".", "..")
    ):
        raise FormatError(f"has a zip entry {shown(name)}, expected a relative path in a root folder; not a torch file")
    return name


def _start(data: np.ndarray, info: zipfile.ZipInfo) -> int:
    """Returns where the bytes of an entry begin, after comparing its own header with the directory."""
    shown_name = shown(info.filename)
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise FormatError(
            f"has a compressed zip entry {shown_name}; torch stores entries as they are, do not pack them"
        )
    if info.flag_bits & ~(_ENCODED_NAME | _SIZES_FOLLOW):
        raise FormatError(f"has an encrypted or patched zip entry {shown_name} (flags {info.flag_bits:#x}); {DOWNLOAD}")
    at = info.header_offset
    header = bytes(data[at : at + _LOCAL.size]) if at >= 0 else b""
    if len(header) < _LOCAL.size:
        raise FormatError(f"is cut off or damaged: zip entry {shown_name} lies past its end; {DOWNLOAD}")
    signature, _, flags, method, _, _, _, packed, size, name_length, extra_length = _LOCAL.unpack(header)
    start = at + _LOCAL.size + name_length + extra_length
    name = info.orig_filename.encode("utf-8" if info.flag_bits & _ENCODED_NAME else "cp437")
    allowed = {info.file_size} | ({0} if flags & _SIZES_FOLLOW else set())
    if _ZIP64.pack(1, 16, info.file_size, info.file_size) in bytes(data[start - extra_length : start]):
        allowed |= {2**32 - 1}
    if (
        signature != b"PK\x03\x04"
        or flags != info.flag_bits
        or method != zipfile.ZIP_STORED
        or bytes(data[at + _LOCAL.size :][:name_length]) != name
        or packed not in allowed
        or size not in allowed
    ):
        raise FormatError(f"has a zip entry {shown_name} whose header disagrees with the directory; {DOWNLOAD}")
    if start + info.file_size > len(data):
        raise FormatError(f"is cut off or damaged: zip entry {shown_name} reaches past its end; {DOWNLOAD}")
    return start
