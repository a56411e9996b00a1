"""Damaged files of every kind that preparing and verifying read.

    python tests/data/fuzz.py [--files 2000] [--seed 0]

None of them may hang or crash a reader, pass unnoticed, or raise an error without a message. The
mutants of a kind are read in a process of their own, which may take ``SECONDS`` for each.
"""

import argparse
import collections
import functools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from fuzz_kinds import Kind, kinds

SECONDS = 60
"""Time for one file, on a machine that may be busy."""
Mutant = Callable[[int], bytes]
"""Number of a mutant -> its content."""


def mutate(content: bytes, generator: np.random.Generator) -> bytes:
    """Make one to three changes.

    Half of them are in the first 600 bytes, where most formats have their header.
    """
    damaged = bytearray(content)
    for _ in range(generator.integers(1, 4)):
        place = 0
        if damaged:
            end = min(len(damaged), 600) if generator.random() < 0.5 else len(damaged)
            place = int(generator.integers(0, end))
        length = int(generator.integers(1, 9))
        part = damaged[place : place + length]
        match generator.integers(0, 6):
            case 0:
                if damaged:
                    damaged[place] ^= 1 << int(generator.integers(0, 8))
            case 1:
                damaged[place : place + length] = generator.bytes(len(part))
            case 2:
                value = int(generator.choice([0, 255]))
                damaged[place : place + length] = bytes([value]) * len(part)
            case 3:
                damaged[place:place] = generator.bytes(length)
            case 4:
                del damaged[place : place + length]
            case 5:
                del damaged[place:]
    return bytes(damaged)


def campaign(files: int, seed: int) -> dict[str, collections.Counter[str]]:
    """Read ``files`` mutants, equally many of each kind.

    Returns:
        kind -> number of mutants with each outcome.

    Raises:
        AssertionError: a mutant hung, crashed its reader, or raised what no user should see; its
            bytes are kept.
    """
    outcomes: dict[str, collections.Counter[str]] = {}
    memory = Path("/dev/shm")
    # In memory if possible, as thousands of files of 16 MB are written.
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        all_kinds = kinds(Path(name))
        for number, (title, kind) in enumerate(all_kinds.items()):
            count = files // len(all_kinds) + (number < files % len(all_kinds))
            mutant = functools.partial(_mutant, kind.originals, seed, number)
            outcomes[title] = collections.Counter(_read_all(title, kind, count, mutant))
    return outcomes


def _mutant(originals: list[bytes], seed: int, number: int, index: int) -> bytes:
    """Return mutant ``index`` of the kind with this number."""
    generator = np.random.default_rng([seed, number, index])
    return mutate(originals[index % len(originals)], generator)


def _read_all(title: str, kind: Kind, count: int, mutant: Mutant) -> list[str]:
    """Let a process read ``count`` mutants of a kind; return their outcomes."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_reader, args=(theirs, kind, count, mutant)
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
            name = f"coda-mutant-{title.replace(' ', '-').strip('.')}-{len(results)}"
            kept = Path(tempfile.gettempdir()) / name
            kept.write_bytes(mutant(len(results)))
            seconds = time.monotonic() - begin
            raise AssertionError(
                f"{title} {len(results)} (kept as {kept}, {seconds:.0f} s): {problem}"
            )
    finally:
        process.kill()
        process.join()
    return results


def _reader(connection: Connection, kind: Kind, count: int, mutant: Mutant) -> None:
    """Read whole files and mutants of a kind; send (whether it went well, outcome) for each."""
    # Hide progress bars, and what decoders print.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for original in kind.originals:
        if kind.read(original, False) not in ("read", "continues after 4 of 4 chunks"):
            connection.send((False, "its whole file was refused"))
    for index in range(count):
        content = mutant(index)
        original = kind.originals[index % len(kind.originals)]
        try:
            answer = True, kind.read(content, content != original)
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
        f"{total} mutated files in {time.monotonic() - begin:.0f} s: "
        "no hang, no crash, no damage of a .beton unnoticed"
    )


if __name__ == "__main__":
    main()
