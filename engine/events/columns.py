"""Columns of .npy files written front to back, without knowing their length beforehand."""

from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np


class ColumnWriter:
    """Appends rows to one .npy file; the true length goes into the header at the end.

    The number of rows is known only after duplicates are dropped. NumPy pads a header so that the first axis can grow
    in place (numpy.lib.format, since 1.23), and plain appends keep no dirty pages mapped.
    """

    def __init__(self, path: Path, dtype: str, width: int | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self.tail = () if width is None else (width,)
        self.rows = 0
        self.file: BinaryIO = path.open("wb")
        self._write_header()
        self.header_bytes = self.file.tell()

    def _write_header(self) -> None:
        shape = (self.rows, *self.tail)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, rows: np.ndarray) -> None:
        if rows.shape[1:] != self.tail:
            raise ValueError(f"rows: expected shape [n, {self.tail}], got {list(rows.shape)}")
        self.file.write(np.ascontiguousarray(rows, dtype=self.dtype).data)
        self.rows += len(rows)

    def close(self) -> None:
        self.file.seek(0)
        self._write_header()
        if self.file.tell() != self.header_bytes:
            raise RuntimeError(f"{self.file.name}: the .npy header changed its size")
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.file.close()
