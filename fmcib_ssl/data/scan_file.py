"""The voxels of one scan in a file, and check sums of all its parts, so that no damaged byte is ever decoded.

`<scan_id>.b2nd` is a Blosc2 frame: a header, chunks of blocks that decompress on their own, an index of the chunks.
`<scan_id>.sums` cuts it into parts without a gap (header; of each chunk its head and each block; index) and has where
each begins and its XXH3-64. Before a patch is decoded the parts that it needs are compared with their sums.

Errors here say what is wrong without the file's name, which `Store` adds.

Source: C-Blosc2's README_CFRAME_FORMAT.rst and README_CHUNK_FORMAT.rst.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import blosc2
import numpy as np
import numpy.typing as npt
from jaxtyping import Int16
from xxhash import xxh3_64_digest, xxh3_64_intdigest

from fmcib_ssl.io import open_regular, read_regular

Triple = tuple[int, int, int]

#: Of the candidates measured on CT (docs/prepare.md) the fastest to read; 50 voxels of an edge touch 27 blocks.
_CHUNK_EDGE, _BLOCK_EDGE = 128, 32

_BLOCKS_PER_AXIS = _CHUNK_EDGE // _BLOCK_EDGE
_BLOCKS_PER_CHUNK = _BLOCKS_PER_AXIS**3
_MAGIC = b"SUMS-01\n"
#: Of the scan's name, of the coarse map, of the file's shape and parts; sums are XXH3-64.
_HEADER = np.dtype([
    ("magic", "S8"), ("name", "<u8"), ("coarse_map", "<u8"), ("shape_zyx", "<i8", 3), ("num_chunks", "<i8"),
    ("num_parts", "<i8"),
])  # fmt: skip
#: In the header of a frame: arrays that are computed, from an expression or a function in the file, or fetched.
_NOT_PLAIN = (b"LazyArray", b"b2o", b"proxy-source")
_LONGEST_HEADER = 1 << 20


def encode_voxels(hu_zyx: Int16[np.ndarray, "z y x"]) -> bytes:
    """The content of a scan's file."""
    # Through memory, because Blosc2's own writing has no error for a full disk, and a memory map dies of it.
    content: bytes = blosc2.asarray(
        hu_zyx,
        chunks=(_CHUNK_EDGE,) * 3,
        blocks=(_BLOCK_EDGE,) * 3,
        cparams=blosc2.CParams(codec=blosc2.Codec.LZ4, clevel=9, filters=[blosc2.Filter.SHUFFLE], nthreads=1),
    ).to_cframe()
    return content


@dataclass(frozen=True, eq=False)
class ScanSums:
    """What the files of a scan should be.

    Attributes:
        shape_zyx: of the voxels.
        coarse_map: sum of the coarse map's file.
        starts: first byte of each part, and at the end the size of the file.
        sums: of each part.
        heads: number of the part that is the head of each chunk.
        blocks: numbers of the parts that are the blocks of each chunk; the head again where a chunk has but a value.
    """

    shape_zyx: Triple
    coarse_map: int
    starts: npt.NDArray[np.int64]
    sums: npt.NDArray[np.uint64]
    heads: npt.NDArray[np.int32]
    blocks: npt.NDArray[np.int32]

    @classmethod
    def of(cls, content: bytes, coarse_map: bytes, shape_zyx: Triple) -> ScanSums:
        """Of the contents of a scan's two files, the first from `encode_voxels`."""
        starts, heads, blocks = _parts(content)
        view = memoryview(content)
        sums = [xxh3_64_intdigest(view[a:b]) for a, b in itertools.pairwise(starts.tolist())]
        return cls(shape_zyx, xxh3_64_intdigest(coarse_map), starts, np.array(sums, np.uint64), heads, blocks)

    def to_bytes(self, scan_id: str) -> bytes:
        """The content of the sums' own file, with a sum of itself at its end."""
        name, size = xxh3_64_intdigest(scan_id.encode()), (len(self.heads), len(self.sums))
        header = np.array((_MAGIC, name, self.coarse_map, self.shape_zyx, *size), _HEADER)
        content = b"".join(a.tobytes() for a in (header, self.starts, self.sums, self.heads, self.blocks))
        return content + xxh3_64_digest(content)

    @classmethod
    def open(cls, path: Path, scan_id: str) -> ScanSums:
        """Read what `to_bytes` made.

        Raises:
            OSError: it cannot be read.
            ValueError: it is damaged, or another scan's.
        """
        content = read_regular(path)
        if len(content) < _HEADER.itemsize or xxh3_64_digest(content[:-8]) != content[-8:]:
            raise ValueError("its check sums are damaged themselves")
        header = np.frombuffer(content, _HEADER, count=1)[0]
        if header["magic"] != _MAGIC or header["name"] != xxh3_64_intdigest(scan_id.encode()):
            raise ValueError("its check sums are of another scan")
        chunks, parts, offset = int(header["num_chunks"]), int(header["num_parts"]), _HEADER.itemsize
        arrays: list[npt.NDArray[Any]] = []
        for dtype, count in ((np.int64, parts + 1), (np.uint64, parts), (np.int32, chunks), (np.int32, chunks * 64)):
            arrays.append(np.frombuffer(content, dtype, count, offset))
            offset += arrays[-1].nbytes
        starts, sums, heads, blocks = arrays
        z, y, x = header["shape_zyx"].tolist()
        return cls((z, y, x), int(header["coarse_map"]), starts, sums, heads, blocks.reshape(chunks, -1))

    def check_coarse_map(self, coarse_map: bytes | mmap.mmap) -> None:
        """Compare the coarse map's file.

        Raises:
            ValueError: it is not as it was written.
        """
        if xxh3_64_intdigest(coarse_map) != self.coarse_map:
            raise ValueError("the check sum of the coarse map is wrong")

    def parts_of(self, window: Sequence[tuple[int, int]]) -> list[int]:
        """Numbers of the parts that a window needs, in order; the frame's header and index are not among them."""
        (_, height, width), edge = (-(-n // _CHUNK_EDGE) for n in self.shape_zyx), _BLOCKS_PER_AXIS
        zs, ys, xs = (range(low // _BLOCK_EDGE, (high - 1) // _BLOCK_EDGE + 1) for low, high in window)
        chunks, blocks = [], []
        for z, y, x in itertools.product(zs, ys, xs):
            chunk = (z // edge * height + y // edge) * width + x // edge
            chunks.append(chunk)
            blocks.append(chunk * _BLOCKS_PER_CHUNK + (z % edge * edge + y % edge) * edge + x % edge)
        return sorted({*self.heads.take(chunks).tolist(), *self.blocks.take(blocks).tolist()})


def _parts(content: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Where the parts of a frame begin, and which of them are each chunk's."""
    header = int.from_bytes(content[11:15], "big")
    index = header + int.from_bytes(content[39:47], "big")
    starts, chunks = {0, index}, []
    for offset in np.frombuffer(blosc2.decompress2(content[index:]), np.int64).tolist():
        if offset < 0:  # a chunk of one value, which stands in the index
            chunks.append((index, [index] * _BLOCKS_PER_CHUNK))
            continue
        head = header + offset
        flags, special = content[head + 2], content[head + 31] >> 4 & 7
        block_size = int.from_bytes(content[head + 8 : head + 12], "little")
        if special:
            blocks = [head] * _BLOCKS_PER_CHUNK
        elif flags & 2:  # copied as it is
            blocks = [head + 32 + n * block_size for n in range(_BLOCKS_PER_CHUNK)]
        else:
            blocks = [head + n for n in np.frombuffer(content, "<i4", _BLOCKS_PER_CHUNK, head + 32).tolist()]
        chunks.append((head, blocks))
        starts.update((head, *blocks))
    ordered = np.array([*sorted(starts), len(content)], np.int64)
    heads, of_chunks = (np.searchsorted(ordered, part).astype(np.int32) for part in zip(*chunks, strict=True))
    return ordered, heads, of_chunks


class OpenScan:
    """A scan that patches are read from; keeps nothing of what it reads.

    Blosc2 may hold the file open. It reads by position, so processes that were forked meanwhile do not disturb it.

    Args:
        path: its voxels.
        sums: what they should be; None of a store from before there were any: then nothing is compared.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not as it was written.
    """

    def __init__(self, path: Path, sums: ScanSums | None) -> None:
        self.path, self.sums = path, sums
        with self._file() as file:
            self._state = _state(os.fstat(file.fileno()))
            if sums is not None:
                if self._state[1] != sums.starts[-1]:
                    raise ValueError(f"it has {self._state[1]} bytes, not {sums.starts[-1]}")
                self._compare(file, [0, len(sums.sums) - 1])
            _check_plain(file)
        # One thread: the caller's workers are the parallelism, and a pool of threads does not survive a fork.
        # Not memory-mapped: as fast from the page cache, three times as fast from the disk (docs/prepare.md).
        self._array: Any = blosc2.open(str(path), mode="r", dparams=blosc2.DParams(nthreads=1))
        if self._array.ndim != 3 or self._array.dtype != np.int16:
            raise ValueError(f"{self._array.dtype} in {self._array.ndim} dimensions, not int16 in 3")
        z, y, x = self._array.shape
        self.shape_zyx: Triple = (z, y, x)
        if sums is not None and self.shape_zyx != sums.shape_zyx:
            raise ValueError(f"it has {self.shape_zyx} voxels, not {sums.shape_zyx}")

    def is_current(self) -> bool:
        """Whether the file is the one that was opened, and not one that was prepared anew."""
        return _state(self.path.stat()) == self._state

    def read(self, window: Sequence[tuple[int, int]]) -> Int16[np.ndarray, "z y x"]:
        """Voxels of a window that lies within the scan.

        Raises:
            OSError: it cannot be read.
            ValueError: what the window needs is not as it was written.
        """
        if self.sums is not None:
            with self._file() as file:
                self._compare(file, self.sums.parts_of(window))
        starts, stops = zip(*window, strict=True)
        voxels = np.empty(np.subtract(stops, starts), np.int16)
        # What indexing an array calls, without a tenth of a millisecond of looking at the index.
        self._array.get_slice_numpy(voxels, (starts, stops))
        return voxels

    def check(self) -> None:
        """Compare all of the file with its sums.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not as it was written.
        """
        if self.sums is not None:
            with self._file() as file:
                self._compare(file, range(len(self.sums.sums)))

    def _file(self) -> BinaryIO:
        return os.fdopen(open_regular(self.path), "rb", buffering=0)

    def _compare(self, file: BinaryIO, parts: Sequence[int]) -> None:
        """Read parts, those that follow each other at once, and compare their sums; Blosc2 finds them cached then."""
        assert self.sums is not None
        first, last = self.sums.starts[parts].tolist(), self.sums.starts[np.add(parts, 1)].tolist()
        sums = self.sums.sums[parts].tolist()
        ends = [n for n in range(len(parts)) if n + 1 == len(parts) or first[n + 1] != last[n]]
        runs = list(zip([0, *(n + 1 for n in ends)], ends, strict=False))
        if hasattr(os, "posix_fadvise"):  # all are on their way before the first is waited for
            for begin, end in runs:
                os.posix_fadvise(file.fileno(), first[begin], last[end] - first[begin], os.POSIX_FADV_WILLNEED)
        for begin, end in runs:
            file.seek(offset := first[begin])
            run = memoryview(file.read(last[end] - offset))
            for n in range(begin, end + 1):
                if xxh3_64_intdigest(run[first[n] - offset : last[n] - offset]) != sums[n]:
                    raise ValueError(f"the check sum of its bytes {first[n]} to {last[n]} is wrong")


def _state(state: os.stat_result) -> tuple[int, int, int]:
    return state.st_ino, state.st_size, state.st_mtime_ns


def _check_plain(file: BinaryIO) -> None:
    """Refuse a file whose opening could run something: Blosc2 keeps functions and expressions in its headers."""
    file.seek(0)
    start = file.read(15)
    length = int.from_bytes(start[11:], "big")
    if start[2:9] != b"b2frame" or not 15 < length <= _LONGEST_HEADER:
        raise ValueError("no Blosc2 array")
    header = start + file.read(length - 15)
    if computed := [mark.decode() for mark in _NOT_PLAIN if mark in header]:
        raise ValueError(f"it holds no voxels but {', '.join(computed)}, which is not read")
