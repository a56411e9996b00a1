"""FFCV's file format (ffcv/types.py), written piece by piece: header, fields, table of samples,
pages of images, table of addresses.

An image lies within one page. Until the address of the last table is in the header, a file counts
as unfinished.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.base import Field
from ffcv.types import (
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    TYPE_ID_HANDLER,
    FieldDescType,
    HeaderType,
    get_metadata_type,
)
from ffcv.utils import align_to_page

from pipeline.errors import UserError

REMEDY = "run `coda prepare` with the recipe"
# bytes
MIN_PAGE = 1 << 23
FIELDS: Mapping[str, Field] = {"image": RGBImageField(), "label": IntField()}
# f0: mode, width, height and data_ptr of the image; f1: label
SAMPLE = get_metadata_type(list(FIELDS.values()))
# an image, its bytes, its number in the source
STORED = np.dtype([*SAMPLE["f0"].descr, ("size", "<u8"), ("source", "<u8")])


def page_size(largest: int) -> int:
    """Bytes of a page, a power of two, for images of up to ``largest`` bytes of pixels."""
    # twice the pixels: a JPEG of noise can be larger than they are
    return max(MIN_PAGE, 1 << (2 * largest - 1).bit_length())


def first_page(samples: int, page: int) -> int:
    """Where images begin in a file of up to ``samples`` samples."""
    return align_to_page(
        HeaderType.itemsize + len(FIELDS) * FieldDescType.itemsize + samples * SAMPLE.itemsize, page
    )


def place(begin: int, sizes: np.ndarray, page: int) -> tuple[np.ndarray, int]:
    """Addresses (N,) of images of ``sizes`` (N,) bytes one after the other from address ``begin``
    on, and where the last one ends.
    """
    addresses = np.empty(len(sizes), np.uint64)
    end = begin
    for index, size in enumerate(sizes.tolist()):
        if size > page - end % page:
            end = align_to_page(end, page)
        addresses[index] = end
        end += size
    return addresses, end


def begin(path: Path, page: int) -> None:
    """Make the file, unfinished."""
    path.write_bytes(_header(0, page, 0))


def finish(path: Path, images: np.ndarray, labels: np.ndarray, page: int) -> None:
    """Write the tables around the images that the file holds, then the header that makes it whole.

    Args:
        images: (N,) STORED, in the order of their addresses.
        labels: (N,) int64.
    """
    table = np.zeros(len(images), SAMPLE)
    for name in table["f0"].dtype.names or ():
        table["f0"][name] = images[name]
    table["f1"] = labels.reshape(-1, *table["f1"].shape[1:])
    addresses = np.empty(len(images), ALLOC_TABLE_TYPE)
    addresses["sample_id"], addresses["ptr"], addresses["size"] = (
        np.arange(len(images)),
        images["data_ptr"],
        images["size"],
    )
    end = align_to_page(int(images["data_ptr"][-1] + images["size"][-1]), page)
    with open(path, "r+b") as file:
        file.truncate(end)
        file.seek(HeaderType.itemsize)
        file.write(_fields() + table.tobytes())
        file.seek(end)
        file.write(addresses.tobytes())
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        file.write(_header(len(images), page, end))


def _header(samples: int, page: int, table: int) -> bytes:
    header = np.zeros(1, HeaderType)
    header["version"], header["num_fields"], header["page_size"] = (
        CURRENT_VERSION,
        len(FIELDS),
        page,
    )
    header["num_samples"], header["alloc_table_ptr"] = samples, table
    return header.tobytes()


def _fields() -> bytes:
    identifiers = {kind: number for number, kind in TYPE_ID_HANDLER.items()}
    descriptions = np.zeros(len(FIELDS), FieldDescType)
    for description, (name, field) in zip(descriptions, FIELDS.items(), strict=True):
        description["type_id"] = identifiers[type(field)]
        description["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        description["arguments"][:] = field.to_binary()[0]
    return descriptions.tobytes()


def layout(path: Path) -> tuple[int, int]:
    """(bytes of a page, bytes of the largest decoded image) of a .beton file, from its header and
    table of samples.
    """
    header = np.fromfile(path, HeaderType, count=1)[0]
    start = HeaderType.itemsize + int(header["num_fields"]) * FieldDescType.itemsize
    table = np.memmap(
        path,
        get_metadata_type([RGBImageField(), IntField()]),
        "r",
        start,
        (int(header["num_samples"]),),
    )["f0"]
    return int(header["page_size"]), 3 * int(
        (table["height"].astype(np.int64) * table["width"]).max()
    )


def measure(path: Path) -> tuple[int, int, str]:
    """(bytes, samples, sha256 of header and tables) of a .beton file with one image and one label
    per sample.

    Raises:
        UserError: unreadable, unfinished (FFCV writes the address of the last table at the very
            end) or truncated.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            block = file.read(HeaderType.itemsize)
            if len(block) < HeaderType.itemsize:
                raise UserError(f"{path}: is truncated; {REMEDY}")
            header = np.frombuffer(block, HeaderType)[0]
            fields, samples, table = (
                int(header["num_fields"]),
                int(header["num_samples"]),
                int(header["alloc_table_ptr"]),
            )
            if header["version"] != CURRENT_VERSION or fields != 2:
                raise UserError(f"{path}: is not a .beton file of images and labels; {REMEDY}")
            if table == 0:
                raise UserError(f"{path}: is unfinished, its writer was stopped; {REMEDY}")
            metadata = (
                fields * FieldDescType.itemsize
                + samples * get_metadata_type([RGBImageField(), IntField()]).itemsize
            )
            if (
                HeaderType.itemsize + metadata > table
                or table + samples * ALLOC_TABLE_TYPE.itemsize != size
            ):
                raise UserError(
                    f"{path}: is truncated or damaged, its size does not fit its header; {REMEDY}"
                )
            digest.update(block + file.read(metadata))
            file.seek(table)
            digest.update(file.read())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
    return size, samples, digest.hexdigest()
