"""Reading .npy and .npz files that may be damaged or hostile.

NumPy's own loader trusts a header: it allocates what the shape says, unpacks members of any size
and raises a dozen kinds of exception. Here a member's name, compression, size and checksum are
checked first, and the shape in a header must match the number of bytes that follow it.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path

import mlx.core as mx
import numpy as np

from convert.base.closing import Closing
from convert.base.errors import UserError

#: Most numbers in an array: 4096 directions of width 16384.
MOST_NUMBERS = 1 << 26

# Bytes of a member besides its numbers.
_HEADER = 1 << 16
_MOST_BYTES = 8 * MOST_NUMBERS + _HEADER

# Members up to this many bytes are unpacked whatever their packed size. Floats compress little, so
# a larger member that unpacks to far more than its packed size is hostile.
_ALWAYS_UNPACKED = 1 << 26
_MOST_GROWTH = 4

_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_MOST_MEMBERS = 1 << 16


def read_npy(path: Path) -> mx.array:
    """The array of a .npy file as float32.

    Raises:
        UserError: when the file is damaged, too large for directions, or holds no numbers.
    """
    try:
        with open(path, "rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None
    return _array(data, str(path))


class Archive(Closing):
    """A .npz file: a zip of .npy files. A context manager."""

    def __init__(
        self, path: Path, what: str = "a direction file", most: int = MOST_NUMBERS
    ) -> None:
        """Open the file and read its list of members.

        Args:
            path: the file.
            what: what it should be, for messages.
            most: the largest number of numbers in an array.

        Raises:
            UserError: when it is no zip file, or names a member twice.
        """
        self._path, self._what, self._most = path, what, most
        try:
            self._zip = zipfile.ZipFile(path)
            members = self._zip.infolist()
        except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
            raise self._unreadable(path, str(error)) from None
        self._members = {one.filename.removesuffix(".npy"): one for one in members[:_MOST_MEMBERS]}
        if len(self._members) != len(members):
            self._zip.close()
            raise self._unreadable(path, "it holds a member twice, or too many of them")

    @property
    def names(self) -> list[str]:
        """The names of the arrays in the file."""
        return list(self._members)

    def read(self, name: str) -> mx.array:
        """The array ``name`` as float32.

        Raises:
            UserError: when the member is damaged, packed in an unusual way, or holds no numbers.
        """
        member, where = self._members[name], f"{self._path}: {name}"
        if member.flag_bits & 1 or member.compress_type not in _METHODS:
            reason = "it is encrypted, or packed by another method than deflate"
            raise self._unreadable(where, reason)
        size, packed = member.file_size, member.compress_size
        if size > 8 * self._most + _HEADER or size > max(_ALWAYS_UNPACKED, _MOST_GROWTH * packed):
            raise self._unreadable(where, f"{packed} bytes of it claim to unpack to {size}")
        try:
            data = self._zip.read(member)
        except (
            *(OSError, ValueError, EOFError, RuntimeError, NotImplementedError),
            *(zipfile.BadZipFile, zlib.error),
        ) as error:
            raise self._unreadable(where, str(error)) from None
        return _array(data, where, self._what, self._most)

    def _unreadable(self, where: Path | str, why: str) -> UserError:
        return _unreadable(where, why, self._what)

    def close(self) -> None:
        """Close the file."""
        self._zip.close()


def _array(
    data: bytes, where: str, what: str = "a direction file", most: int = MOST_NUMBERS
) -> mx.array:
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version[0]}.{version[1]} of .npy is not known here")
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = read(stream, max_header_size=10_000)
    except Exception as error:  # NumPy parses the header as Python, which may raise anything
        raise _unreadable(where, str(error) or type(error).__name__, what) from None
    if dtype.kind not in "fiu" or dtype.hasobject:
        made = what.removesuffix(" file")
        raise UserError(f"{where} holds {dtype} values, but {made} is made of numbers.")
    count, start = math.prod(shape), stream.tell()
    if any(size < 0 for size in shape) or count > most:
        raise UserError(f"{where} has the shape {shape}, which directions cannot have.")
    if len(data) - start != count * dtype.itemsize:
        raise _unreadable(
            where,
            f"its shape {shape} is of {count * dtype.itemsize} bytes, not {len(data) - start}",
            what,
        )
    flat = np.frombuffer(data, dtype, count, start)
    values = flat.reshape(shape, order="F" if is_fortran else "C")
    with np.errstate(over="ignore"):
        return mx.array(values.astype(np.float32))


def _unreadable(where: Path | str, why: str, what: str = "a direction file") -> UserError:
    reason = " ".join(why.split())[:150]
    return UserError(f"{where} could not be read as {what}: {reason}")
