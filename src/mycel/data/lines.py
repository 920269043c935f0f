"""Lines of a text file, read so that whatever is wrong with one can be named by its number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mycel.errors import DataError

LINE_LIMIT = 16 << 20  # bytes


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line of a UTF-8 file, without its end.

    Raises
    ------
    DataError
        The file cannot be read, is not UTF-8, or has a line of more than ``LINE_LIMIT`` bytes.
    """
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(LINE_LIMIT + 1):
                number += 1
                if len(line) > LINE_LIMIT:
                    raise DataError(f"{path}, line {number}: more than {LINE_LIMIT >> 20} MiB long: split it up")
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: byte 0x{error.object[error.start]:02x} is not UTF-8: save the file as UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
