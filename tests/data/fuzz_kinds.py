"""The kinds of files that the fuzz campaign damages, and their readers."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from small_data import recipe, write_images

from pipeline.data.beton import MIN_PAGE, STORED_IMAGE
from pipeline.data.chunk_journal import Chunk, ChunkJournal
from pipeline.data.images import decode
from pipeline.data.prepare import prepare
from pipeline.data.sources import open_source
from pipeline.data.stored_size import fit
from pipeline.data.verify import verify
from pipeline.errors import UserError

Reader = Callable[[bytes, bool], str]
"""(content, whether it is a mutant) -> outcome; raises what must not happen."""


class Kind(NamedTuple):
    """A kind of files."""

    originals: list[bytes]
    """Contents of whole files."""
    read: Reader
    """The reader of one of them."""


def images() -> list[bytes]:
    """Return one image of each format and mode."""
    ramp = np.linspace(0, 1, 40 * 60).reshape(40, 60)
    grey = Image.fromarray((ramp * 255).astype(np.uint8))
    colour = Image.merge(
        "RGB", [grey, grey.point(lambda value: 255 - value), Image.new("L", grey.size, 60)]
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    forms = [
        (colour, "JPEG", {"exif": exif}),
        (colour, "JPEG", {"progressive": True}),
        (grey, "JPEG", {}),
    ]
    forms += [
        (colour.convert("CMYK"), "JPEG", {}),
        (colour, "PNG", {}),
        (colour.quantize(16), "PNG", {}),
        (colour, "GIF", {}),
    ]
    forms += [
        (Image.fromarray((ramp * 65535).astype(np.uint16)), "PNG", {}),
        (colour, "WEBP", {}),
        (colour, "BMP", {}),
    ]
    forms += [
        (colour, "TIFF", {}),
        (colour, "TIFF", {"compression": "tiff_lzw"}),
        (colour, "PPM", {}),
        (colour, "JPEG2000", {}),
    ]
    buffers = []
    for image, form, options in forms:
        buffers.append(io.BytesIO())
        image.save(buffers[-1], form, **options)
    return [buffer.getvalue() for buffer in buffers]


def journal_of_four(data: Path) -> bytes:
    """Return a journal of four chunks with two images each."""
    data.touch()
    journal = ChunkJournal(data, "x")
    journal.commit(
        [
            Chunk(100 * n, 100 * n + 90, np.full(2, n, STORED_IMAGE), ((n, "is broken"),), "0" * 16)
            for n in range(4)
        ]
    )
    return journal.path.read_bytes()


def pack_shards(folder: Path) -> None:
    """Write the folder's training images as the shards train.tar and val.tar, all of class 1."""
    with tarfile.open(folder / "train.tar", "w") as tar:
        for number, path in enumerate(sorted((folder / "source/train").rglob("*.png"))):
            tar.add(path, f"{number:03d}.png")
            label = tarfile.TarInfo(f"{number:03d}.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(b"1"))
    (folder / "val.tar").write_bytes((folder / "train.tar").read_bytes())


class Readers:
    """A small prepared data set, and the readers of its files and of other files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_images(folder / "source", train=6, val=3)
        self.source = {
            "source": "imagefolder",
            "path": str(folder / "source"),
            "image_size": 48,
            "write_mode": "jpg",
            "workers": 1,
        }
        self.recipe = recipe(folder / "data", **self.source)
        prepare(self.recipe)
        self.prepared = self.recipe.data.folder
        self.manifest = self.prepared / "manifest.json"
        self.beton = self.prepared / "val.beton"
        self.whole = {path: path.read_bytes() for path in (self.manifest, self.beton)}

    def verified(self, path: Path) -> Reader:
        """Return the reader that puts a file in the place of ``path`` and verifies the folder."""

        def read(content: bytes, damaged: bool) -> str:
            path.write_bytes(content)
            try:
                verify(self.prepared)
            except UserError:
                return "refused"
            finally:
                path.write_bytes(self.whole[path])
            assert not damaged or path == self.manifest, "damage was not noticed"
            return "read"

        return read

    def unhashed(self, content: bytes, damaged: bool) -> str:
        """Verify images without a hash, so that only FFCV's decoder can notice damage."""
        tree = json.loads(self.whole[self.manifest])
        for split in tree["splits"].values():
            split["xxh128"] = ""
        # The tables stay whole.
        good = self.whole[self.beton]
        changed = bytearray(good)
        changed[MIN_PAGE : MIN_PAGE + len(content)] = content[: len(good) - MIN_PAGE]
        try:
            self.manifest.write_text(json.dumps(tree))
            self.beton.write_bytes(changed[: len(good)])
            verify(self.prepared)
        except UserError:
            return "refused"
        finally:
            for path, whole in self.whole.items():
                path.write_bytes(whole)
        return "read"

    def decoded(self, content: bytes, damaged: bool) -> str:
        """Decode an image."""
        try:
            fit(decode(content), self.recipe.data, False)
        except Exception as error:
            # The writer takes any error for that of a broken image, and shows its text.
            assert str(error) or type(error).__name__  # noqa: PT017
            return "refused"
        return "read"

    def opened(self, name: str, **settings: str) -> Reader:
        """Return the reader that opens a source whose file is ``name``, and reads its images."""

        def read(content: bytes, damaged: bool) -> str:
            (self.folder / name).write_bytes(content)
            data = recipe(self.folder / "other", **{**self.source, **settings}).data
            try:
                splits = open_source(data)
            except UserError:
                return "refused"
            broken = 0
            for split in splits.values():
                split.identity()
                for index in range(len(split)):
                    assert split.describe(index)
                    try:
                        fit(split.read(index), data, split.fixed_size)
                    except Exception:
                        # The writer takes any error for that of a broken image.
                        broken += 1
            return "read, with broken images" if broken else "read"

        return read

    def continued(self, content: bytes, damaged: bool) -> str:
        """Continue from a journal."""
        unfinished = self.folder / "unfinished"
        unfinished.touch()
        os.truncate(unfinished, 1 << 24)
        unfinished.with_name("unfinished.journal").write_bytes(content)
        return f"continues after {len(ChunkJournal(unfinished, 'x').chunks)} of 4 chunks"


def kinds(folder: Path) -> dict[str, Kind]:
    """Make the files in ``folder``; return name of the kind -> its files and their reader."""
    readers = Readers(folder)
    beton = readers.whole[readers.beton]
    with tarfile.open(folder / "source.tar", "w") as tar:
        tar.add(folder / "source", ".")
    pack_shards(folder)
    table = "path,label,split\n" + "".join(
        f"source/{split}/cat/0.png,cat,{split}\n" for split in ("train", "val", "train")
    )
    return {
        "image": Kind(images(), readers.decoded),
        ".beton": Kind([beton], readers.verified(readers.beton)),
        "images in .beton without hash": Kind(
            [beton[MIN_PAGE : MIN_PAGE + 20_000]], readers.unhashed
        ),
        "manifest": Kind([readers.whole[readers.manifest]], readers.verified(readers.manifest)),
        "tar": Kind(
            [(folder / "source.tar").read_bytes()],
            readers.opened("source.tar", path=str(folder / "source.tar")),
        ),
        "shard": Kind(
            [(folder / "train.tar").read_bytes()],
            readers.opened("train.tar", source="webdataset", path=f"{folder}/{{train,val}}.tar"),
        ),
        "csv": Kind(
            [table.encode()],
            readers.opened("table.csv", source="csv", path=str(folder / "table.csv")),
        ),
        "journal": Kind([journal_of_four(folder / "four")], readers.continued),
    }
