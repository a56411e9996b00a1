"""Damaged files of every kind that preparing and verifying read: no hang, no crash, no damage
unnoticed, no error without a message.

    python tests/data/fuzz.py [--files 2000] [--seed 0]

Each mutant is read in a process of its own kind's reader, which may not take longer than
``SECONDS`` over one.
"""

import argparse
import collections
import io
import json
import multiprocessing
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from small_data import recipe, write_images

from pipeline.data.chunk_journal import ChunkJournal
from pipeline.data.images import decode
from pipeline.data.manifest import open_manifest
from pipeline.data.prepare import prepare
from pipeline.data.sources import open_source
from pipeline.data.stored_size import fit
from pipeline.data.verify import verify
from pipeline.errors import UserError

# for one file, on a machine that may be busy
SECONDS = 60
# files, and what reads one of them; the second argument: whether it is a mutant
Kind = tuple[list[bytes], Callable[[bytes, bool], str]]


def mutate(content: bytes, generator: np.random.Generator) -> bytes:
    """One to three changes, half of them in the first 600 bytes, where most formats have their
    header.
    """
    damaged = bytearray(content)
    for _ in range(generator.integers(1, 4)):
        place = (
            int(
                generator.integers(
                    0, min(len(damaged), 600) if generator.random() < 0.5 else len(damaged)
                )
            )
            if damaged
            else 0
        )
        length = int(generator.integers(1, 9))
        match generator.integers(0, 6):
            case 0:
                damaged[place : place + 1] = (
                    bytes([damaged[place] ^ 1 << int(generator.integers(0, 8))]) if damaged else b""
                )
            case 1:
                damaged[place : place + length] = generator.bytes(
                    len(damaged[place : place + length])
                )
            case 2:
                damaged[place : place + length] = bytes([int(generator.choice([0, 255]))]) * len(
                    damaged[place : place + length]
                )
            case 3:
                damaged[place:place] = generator.bytes(length)
            case 4:
                del damaged[place : place + length]
            case 5:
                del damaged[place:]
    return bytes(damaged)


def images() -> list[bytes]:
    """One image of each format and mode."""
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


def kinds(folder: Path) -> dict[str, Kind]:
    """Name of the kind -> its files and their reader, which says what became of a file and raises
    what it should not.
    """
    write_images(folder / "source", train=6, val=3)
    source = {
        "source": "imagefolder",
        "path": str(folder / "source"),
        "image_size": 48,
        "write_mode": "jpg",
        "workers": 1,
    }
    made = recipe(folder / "data", **source)
    prepare(made)
    prepared = made.data.folder
    manifest, beton = prepared / "manifest.json", prepared / "val.beton"
    pristine = {path: path.read_bytes() for path in (manifest, beton)}
    with tarfile.open(folder / "source.tar", "w") as tar:
        tar.add(folder / "source", ".")
    with tarfile.open(folder / "train.tar", "w") as tar:
        for number, path in enumerate(sorted((folder / "source/train").rglob("*.png"))):
            tar.add(path, f"{number:03d}.png")
            label = tarfile.TarInfo(f"{number:03d}.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(b"1"))
    (folder / "val.tar").write_bytes((folder / "train.tar").read_bytes())
    table = "path,label,split\n" + "".join(
        f"source/{split}/cat/0.png,cat,{split}\n" for split in ("train", "val", "train")
    )

    def checked(path: Path) -> Callable[[bytes, bool], str]:
        def read(content: bytes, damaged: bool) -> str:
            path.write_bytes(content)
            try:
                verify(prepared)
            except UserError:
                return "refused"
            finally:
                path.write_bytes(pristine[path])
            assert not damaged or path == manifest, "damage was not noticed"
            return "read"

        return read

    def unhashed(content: bytes, damaged: bool) -> str:
        """Only FFCV's decoder can notice what is damaged."""
        tree = json.loads(pristine[manifest])
        for split in tree["splits"].values():
            split["xxh128"] = ""
        # of the images; the tables are pristine
        begin = 1 << 23
        whole = bytearray(pristine[beton])
        whole[begin : begin + len(content)] = content[: len(whole) - begin]
        try:
            manifest.write_text(json.dumps(tree))
            beton.write_bytes(whole[: len(pristine[beton])])
            verify(prepared)
        except UserError:
            return "refused"
        finally:
            for path, good in pristine.items():
                path.write_bytes(good)
        return "read"

    def decoded(content: bytes, damaged: bool) -> str:
        try:
            fit(decode(content), made.data, False)
        except Exception as error:
            # what the writer takes for a broken image
            assert str(error) or type(error).__name__
            return "refused"
        return "read"

    def opened(name: str, **settings) -> Callable[[bytes, bool], str]:
        def read(content: bytes, damaged: bool) -> str:
            path = folder / name
            path.write_bytes(content)
            data = recipe(folder / "other", **{**source, **settings}).data
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
                        # what the writer takes for a broken image
                        broken += 1
            return "read, with broken images" if broken else "read"

        return read

    def continued(content: bytes, damaged: bool) -> str:
        unfinished = folder / "unfinished"
        unfinished.touch()
        os.truncate(unfinished, 1 << 24)
        unfinished.with_name("unfinished.journal").write_bytes(content)
        return f"continues after {len(ChunkJournal(unfinished, 'x').chunks)} of 4 chunks"

    journal = journal_of_four(folder / "four")
    area = pristine[beton][1 << 23 : int(open_manifest(prepared).splits["val"].bytes)][:20_000]
    return {
        "image": (images(), decoded),
        ".beton": ([pristine[beton]], checked(beton)),
        "images in .beton without hash": ([area], unhashed),
        "manifest": ([pristine[manifest]], checked(manifest)),
        "tar": (
            [(folder / "source.tar").read_bytes()],
            opened("source.tar", path=str(folder / "source.tar")),
        ),
        "shard": (
            [(folder / "train.tar").read_bytes()],
            opened("train.tar", source="webdataset", path=f"{folder}/{{train,val}}.tar"),
        ),
        "csv": (
            [table.encode()],
            opened("table.csv", source="csv", path=str(folder / "table.csv")),
        ),
        "journal": ([journal], continued),
    }


def journal_of_four(data: Path) -> bytes:
    """A journal with four chunks of two images."""
    from pipeline.data.beton import STORED_IMAGE
    from pipeline.data.chunk_journal import Chunk

    data.touch()
    journal = ChunkJournal(data, "x")
    journal.commit(
        [
            Chunk(100 * n, 100 * n + 90, np.full(2, n, STORED_IMAGE), ((n, "is broken"),), "0" * 16)
            for n in range(4)
        ]
    )
    return journal.path.read_bytes()


def campaign(files: int, seed: int) -> dict[str, collections.Counter]:
    """Read ``files`` mutants, as many of each kind; kind -> how many had which outcome.

    Raises:
        AssertionError: a mutant hung, crashed its reader, or raised what no user should see; its
            bytes are kept.
    """
    outcomes: dict[str, collections.Counter] = {}
    memory = Path("/dev/shm")
    # thousands of files of 16 MB are written
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        folder = Path(name)
        readers = kinds(folder)
        for number, (kind, (originals, read)) in enumerate(readers.items()):
            count = files // len(readers) + (number < files % len(readers))

            def mutant(index: int, key=(seed, number), originals=originals) -> bytes:
                return mutate(
                    originals[index % len(originals)], np.random.default_rng([*key, index])
                )

            outcomes[kind] = collections.Counter(_read_all(kind, count, mutant, originals, read))
    return outcomes


def _read_all(
    kind: str,
    count: int,
    mutant: Callable[[int], bytes],
    originals: list[bytes],
    read: Callable[[bytes, bool], str],
) -> list[str]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_reader, args=(theirs, count, mutant, originals, read)
    )
    process.start()
    theirs.close()
    results: list[str] = []
    try:
        while len(results) < count:
            begin = time.monotonic()
            problem = f"hung for {SECONDS} seconds"
            if ours.poll(SECONDS):
                try:
                    good, outcome = ours.recv()
                except EOFError:
                    process.join()
                    good, outcome = False, f"crashed its reader with code {process.exitcode}"
                if good:
                    results.append(outcome)
                    continue
                problem = outcome
            kept = (
                Path(tempfile.gettempdir())
                / f"coda-mutant-{kind.replace(' ', '-').strip('.')}-{len(results)}"
            )
            kept.write_bytes(mutant(len(results)))
            raise AssertionError(
                f"{kind} {len(results)} (kept as {kept}, {time.monotonic() - begin:.0f} s): {problem}"
            )
    finally:
        process.kill()
        process.join()
    return results


def _reader(
    connection,
    count: int,
    mutant: Callable[[int], bytes],
    originals: list[bytes],
    read: Callable[[bytes, bool], str],
) -> None:
    # progress bars, and what decoders print
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for original in originals:
        if read(original, False) not in ("read", "continues after 4 of 4 chunks"):
            connection.send((False, "its pristine file was refused"))
    for index in range(count):
        content = mutant(index)
        try:
            answer = True, read(content, content != originals[index % len(originals)])
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}"
        connection.send(answer)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begin = time.monotonic()
    outcomes = campaign(options.files, options.seed)
    for kind, counts in outcomes.items():
        print(
            f"{kind}: {counts.total()} files, "
            + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
        )
    total = sum(counts.total() for counts in outcomes.values())
    print(
        f"{total} mutated files in {time.monotonic() - begin:.0f} s: no hang, no crash, no damage of a .beton unnoticed"
    )


if __name__ == "__main__":
    main()
