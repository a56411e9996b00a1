"""The .beton format in ``pipeline.data.beton``, compared with FFCV's own."""

import ffcv.types
import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.rgb_image import IMAGE_MODES
from ffcv.reader import Reader
from ffcv.writer import DatasetWriter

from pipeline.data import beton


def test_the_types_are_ffcvs():
    fields = [RGBImageField(), IntField()]
    assert ffcv.types.HeaderType == beton.HEADER
    assert ffcv.types.FieldDescType == beton.FIELD
    assert beton.ADDRESS == ffcv.types.ALLOC_TABLE_TYPE
    assert ffcv.types.get_metadata_type(fields) == beton.SAMPLE
    assert beton.FORMAT_VERSION == ffcv.types.CURRENT_VERSION
    assert dict(IMAGE_MODES) == beton.IMAGE_MODES
    known = {kind: number for number, kind in ffcv.types.TYPE_ID_HANDLER.items()}
    assert list(beton.FIELD_TYPES.values()) == [known[type(field)] for field in fields]
    assert not any(field.to_binary()[0].any() for field in fields)


class Squares:
    """Three grey images with their numbers."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return np.full((4 + index, 5, 3), index, np.uint8), index


def test_a_file_that_ffcv_wrote_is_read_as_ffcv_reads_it(tmp_path):
    path = tmp_path / "squares.beton"
    DatasetWriter(
        str(path), {"image": RGBImageField(), "label": IntField()}, num_workers=1
    ).from_indexed_dataset(Squares())
    theirs, ours = Reader(str(path)), beton.read_tables(path)
    assert (ours.samples == theirs.metadata).all()
    assert (ours.addresses == theirs.alloc_table).all()
    assert ours.page_size == theirs.page_size
    assert beton.measure(path)[:2] == (path.stat().st_size, 3)
    assert beton.layout(path) == (theirs.page_size, 3 * 6 * 5)
