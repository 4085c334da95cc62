"""Whether a file that torch.save wrote is whole, found out before anything in it is used.

torch checks neither the checksums of its archives nor how much they unpack to. `seal` adds a checksum of everything, of
zip's own tables too; archives without one, from before and from elsewhere, have those of their parts.
"""

import os
import re
import struct
import zlib
from typing import IO
from zipfile import BadZipFile, ZipFile

_END = re.compile(rb"PK\x05\x06.{16}\x00\x00", re.DOTALL)  # zip's last record, without a comment
_SEAL = re.compile(rb"\x0e\x00crc32:([0-9a-f]{8})")  # the length of the comment, and the comment
_LENGTH, _BLOCK = 16, 2**22


def is_archive(file: IO[bytes]) -> bool:
    """Whether it is a zip archive, and not one of torch's former format."""
    file.seek(0)
    return file.read(4) == b"PK\3\4"


def seal(file: IO[bytes]) -> None:
    """Add the checksum of an archive to it, as zip's comment."""
    start = file.seek(-2, os.SEEK_END)  # the length of the comment, of which there is none so far
    comment = b"crc32:%08x" % checksum(file, start)
    file.seek(start)
    file.write(struct.pack("<H", len(comment)) + comment)


def check_archive(file: IO[bytes]) -> None:
    """Raise BadZipFile where an archive is not what was written, or would unpack to more than its own size."""
    size = file.seek(0, os.SEEK_END)
    with ZipFile(file) as archive:
        if sum(part.file_size for part in archive.infolist()) > size:
            raise BadZipFile("it would unpack to more than its own size")
        file.seek(max(size - 22, 0))
        end = file.read()
        if _END.fullmatch(end):
            if (damaged := archive.testzip()) is not None:
                raise BadZipFile(f"the checksum of {damaged} is wrong")
            return
    found = _SEAL.fullmatch(end[-_LENGTH:])
    if found is None or int(found[1], 16) != checksum(file, size - _LENGTH):
        raise BadZipFile("its checksum is wrong")


def checksum(file: IO[bytes], end: int) -> int:
    """CRC-32 of the first bytes of a file."""
    file.seek(0)
    value = 0
    while block := file.read(min(_BLOCK, end - file.tell())):
        value = zlib.crc32(block, value)
    return value
