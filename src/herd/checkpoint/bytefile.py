"""Bounds-checked reading of a file of untrusted bytes: nothing is allocated before it is known to be in the file."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from herd.errors import FileFormatError, HerdError

__all__ = ["ByteFile"]


class ByteFile:
    """A regular file opened for reading at any offset. `size` is its length in bytes when it was opened."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._handle = -1
        try:
            # Not blocking on a FIFO that poses as a checkpoint; for regular files the flag means nothing.
            self._handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
        except FileNotFoundError:
            raise FileFormatError("no such file", file=self.path) from None
        except OSError as error:
            raise FileFormatError(f"cannot be opened ({error.strerror})", file=self.path) from None
        status = os.fstat(self._handle)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise FileFormatError("is not a regular file", file=self.path)
        self.size = status.st_size

    def bytes(self, offset: int, count: int, field: str) -> bytes:
        """`count` bytes from `offset` on; FileFormatError naming `field` when they reach beyond the end."""
        return self.array(offset, count, field).tobytes()

    def array(self, offset: int, count: int, field: str) -> npt.NDArray[np.uint8]:
        """As `bytes`, in a fresh array that the caller may keep and change."""
        if self._handle < 0:
            raise HerdError("the checkpoint is closed", value=self.path, fix="read inside its `with` block")
        if not 0 <= count <= self.size - offset or offset < 0:
            raise FileFormatError(
                "the file ends too early",
                file=self.path,
                field=field,
                offset=offset,
                value=f"{count:,} bytes",
                allowed=f"at most {max(self.size - offset, 0):,} bytes in a file of {self.size:,}",
            )
        out = np.empty(count, np.uint8)
        view, done = out.data, 0
        while done < count:
            # One call reads at most 2 GiB, and may read less.
            got = os.preadv(self._handle, [view[done:]], offset + done)
            if got == 0:
                raise FileFormatError("the file became shorter while it was read", file=self.path, field=field)
            done += got
        return out

    @property
    def descriptor(self) -> int:
        """The operating system's number of the open file."""
        return self._handle

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> ByteFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
