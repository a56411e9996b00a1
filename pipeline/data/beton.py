"""FFCV's .beton format (ffcv/types.py) for files of images and labels.

A file is a header, descriptions of its fields, a table of samples, pages of images, and a table of
addresses. An image lies within one page. A file is unfinished until its header holds the address of
the last table. FFCV opens an unfinished file without complaint, and then hangs or reads outside it.

The types are written out here, and not imported from FFCV, so that a manifest can be checked
without FFCV; a test compares them.
"""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from pipeline.errors import UserError

REMEDY = "run `coda prepare` with the recipe"
"""The end of a message about a file that is missing or damaged."""
FORMAT_VERSION = 2
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype(
    [("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True
)
FIELD_TYPES = {"image": 2, "label": 1}
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE = np.dtype([("f0", IMAGE), ("f1", "<i8")], align=True)
ADDRESS = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE_MODES = {"jpg": 0, "raw": 1}
STORED_IMAGE = np.dtype([*IMAGE.descr, ("size", "<u8"), ("source", "<u8")])
"""An image, the number of its bytes, and its index in the source."""
MIN_PAGE = 1 << 23
"""Bytes of the smallest page."""


class Tables(NamedTuple):
    """The tables of a file, which describe its images."""

    page_size: int
    """Bytes of a page."""
    samples: np.ndarray
    """(N,) SAMPLE."""
    addresses: np.ndarray
    """(N,) ADDRESS."""


def page_size(largest: int) -> int:
    """Return the bytes of a page, a power of two, for images of up to ``largest`` bytes of pixels.

    A page has room for twice as much, because a JPEG of noise can be larger than its pixels.
    """
    return max(MIN_PAGE, 1 << (2 * largest - 1).bit_length())


def first_page(samples: int, page: int) -> int:
    """Return the address at which images begin in a file of up to ``samples`` samples."""
    return _page_end(_tables_end(samples), page)


def place(begin: int, sizes: np.ndarray, page: int) -> tuple[np.ndarray, int]:
    """Place images one after the other, so that each lies within one page.

    Args:
        begin: address at which the first may begin.
        sizes: (N,) bytes of the images.
        page: bytes of a page.

    Returns:
        (N,) uint64 addresses of the images, and the address at which the last one ends.
    """
    addresses = np.empty(len(sizes), np.uint64)
    end = begin
    for index, size in enumerate(sizes.tolist()):
        if size > page - end % page:
            end = _page_end(end, page)
        addresses[index] = end
        end += size
    return addresses, end


def begin(path: Path, page: int) -> None:
    """Create the file with a header that marks it as unfinished."""
    path.write_bytes(_header(0, page, 0))


def finish(path: Path, images: np.ndarray, labels: np.ndarray, page: int) -> None:
    """Write the tables around the images of the file, then the header that makes it whole.

    Args:
        path: the file, which holds the images.
        images: (N,) STORED_IMAGE, in the order of their addresses.
        labels: (N,) int64.
        page: bytes of a page.
    """
    table = np.zeros(len(images), SAMPLE)
    for name in IMAGE.names or ():
        table["f0"][name] = images[name]
    table["f1"] = labels
    addresses = np.empty(len(images), ADDRESS)
    addresses["sample_id"] = np.arange(len(images))
    addresses["ptr"] = images["data_ptr"]
    addresses["size"] = images["size"]
    end = _page_end(int(images["data_ptr"][-1] + images["size"][-1]), page)
    with open(path, "r+b") as file:
        file.truncate(end)
        file.seek(HEADER.itemsize)
        file.write(_fields() + table.tobytes())
        file.seek(end)
        file.write(addresses.tobytes())
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        file.write(_header(len(images), page, end))


def read_tables(path: Path) -> Tables:
    """Read the tables of a file that ``measure`` has checked."""
    header = np.fromfile(path, HEADER, count=1)[0]
    samples = int(header["num_samples"])
    begin = _tables_end(0)
    return Tables(
        int(header["page_size"]),
        np.fromfile(path, SAMPLE, samples, offset=begin),
        np.fromfile(path, ADDRESS, samples, offset=int(header["alloc_table_ptr"])),
    )


def layout(path: Path) -> tuple[int, int]:
    """Return the bytes of a page and of the largest decoded image of a file that was checked."""
    tables = read_tables(path)
    images = tables.samples["f0"]
    return tables.page_size, 3 * int((images["height"].astype(np.int64) * images["width"]).max())


def measure(path: Path) -> tuple[int, int, str]:
    """Check header and tables of a file against its size.

    Returns:
        The file's bytes, its samples, and the SHA-256 of its header and tables.

    Raises:
        UserError: the file is unreadable, unfinished, truncated, or not one of images and labels.
    """
    try:
        with path.open("rb") as file:
            return _measure(path, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error


def _measure(path: Path, file: BinaryIO) -> tuple[int, int, str]:
    size = os.fstat(file.fileno()).st_size
    block = file.read(HEADER.itemsize)
    if len(block) < HEADER.itemsize:
        raise UserError(f"{path}: is truncated; {REMEDY}")
    header = np.frombuffer(block, HEADER)[0]
    samples, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
    if header["version"] != FORMAT_VERSION or header["num_fields"] != len(FIELD_TYPES):
        raise UserError(f"{path}: is not a .beton file of images and labels; {REMEDY}")
    if table == 0:
        raise UserError(f"{path}: is unfinished, its writer was stopped; {REMEDY}")
    end = _tables_end(samples)
    if end > table or table + samples * ADDRESS.itemsize != size:
        raise UserError(
            f"{path}: is truncated or damaged, its size does not fit its header; {REMEDY}"
        )
    digest = hashlib.sha256(block + file.read(end - HEADER.itemsize))
    file.seek(table)
    digest.update(file.read())
    return size, samples, digest.hexdigest()


def _tables_end(samples: int) -> int:
    """Return the address at which a table of ``samples`` samples ends."""
    return HEADER.itemsize + len(FIELD_TYPES) * FIELD.itemsize + samples * SAMPLE.itemsize


def _page_end(address: int, page: int) -> int:
    """Return ``address``, rounded up to the beginning of a page."""
    return -(-address // page) * page


def _header(samples: int, page: int, table: int) -> bytes:
    header = np.zeros(1, HEADER)
    header["version"] = FORMAT_VERSION
    header["num_fields"] = len(FIELD_TYPES)
    header["page_size"] = page
    header["num_samples"] = samples
    header["alloc_table_ptr"] = table
    return header.tobytes()


def _fields() -> bytes:
    descriptions = np.zeros(len(FIELD_TYPES), FIELD)
    for description, (name, kind) in zip(descriptions, FIELD_TYPES.items(), strict=True):
        description["type_id"] = kind
        description["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    return descriptions.tobytes()
