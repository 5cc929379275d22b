"""Archives of the same bytes every time, of flashgau and of the wheels beside it.

Wheels and source distributions hold neither when nor where they were built (`SOURCE_DATE_EPOCH` dates their files,
unless given the year 1980), nothing that an earlier build left behind, and are packed as tightly as the format allows.
"""

import gzip
import io
import os
import shutil
import struct
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.sdist import sdist

try:
    from zopfli.zlib import compress
except ImportError:  # builds without isolation may lack it: some three percent larger, else the same

    def compress(data, **_):
        """zlib's own."""
        return zlib.compress(data, 9)


MODE = 0o100644  # a plain file that all may read
LOCAL, CENTRAL, END = "<4sHHHHHLLLHH", "<4sHHHHHHLLLHHHHHLL", "<4sHHHHLLH"  # records of a zip file
DEFLATE, UTF8 = 8, 0x800


def epoch():
    """The time that archives give their files, in seconds; zip begins in 1980."""
    return max(int(os.environ.get("SOURCE_DATE_EPOCH", 0)), 315532800)


def deflated(data):
    """As a zip file holds it: without zlib's header and checksum."""
    return compress(data, numiterations=40)[2:-4]


def pack_zip(files):
    """A zip file of pairs of names and contents, in their order."""
    year, month, day, hour, minute, second = time.gmtime(epoch())[:6]
    moment = hour << 11 | minute << 5 | second // 2, (year - 1980) << 9 | month << 5 | day
    body, index = io.BytesIO(), io.BytesIO()
    for name, data in files:
        packed, path, at = deflated(data), name.encode(), body.tell()
        entry = 20, UTF8, DEFLATE, *moment, zlib.crc32(data), len(packed), len(data), len(path), 0
        body.write(struct.pack(LOCAL, b"PK\3\4", *entry) + path + packed)
        index.write(struct.pack(CENTRAL, b"PK\1\2", 3 << 8 | 20, *entry, 0, 0, 0, MODE << 16, at) + path)
    start, size, count = body.tell(), index.tell(), len(files)
    return body.getvalue() + index.getvalue() + struct.pack(END, b"PK\5\6", 0, 0, count, count, size, start, 0)


class Wheel(bdist_wheel):
    """A wheel; RECORD, which names all others, stays the last of its files."""

    def run(self):
        """Build it."""
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()
        for _, _, path in self.distribution.dist_files:
            with zipfile.ZipFile(path) as archive:
                files = [(name, archive.read(name)) for name in archive.namelist()]
            Path(path).write_bytes(pack_zip(files))


class Source(sdist):
    """A source distribution."""

    def make_distribution(self):
        """Pack it."""
        super().make_distribution()
        for path in map(Path, self.archive_files):
            packed = io.BytesIO()
            with (
                tarfile.open(path) as old,
                gzip.GzipFile("", "wb", 9, packed, epoch()) as stream,
                tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as new,
            ):
                for one in sorted(old, key=lambda one: one.name):
                    one.uid = one.gid = 0
                    one.uname = one.gname = ""
                    one.mtime, one.mode, one.pax_headers = epoch(), 0o755 if one.isdir() else 0o644, {}
                    new.addfile(one, old.extractfile(one) if one.isfile() else None)
            path.write_bytes(packed.getvalue())
