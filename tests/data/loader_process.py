"""Print hashes of an epoch's batches, read in a process of its own.

Usage: ``python tests/data/loader_process.py PREPARED SETTINGS``, where SETTINGS is JSON of the
recipe's data settings. The first hash is read with four threads, the second on one processor where
four threads are asked for. The last line has numba's cache hits and misses of the decoder.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from pipeline.data.ffcv_library import load_ffcv


def main() -> None:
    torch.set_num_threads(3)
    load_ffcv()
    assert torch.get_num_threads() == 3, "loading FFCV changed torch's threads"

    # These import FFCV.
    from small_data import recipe

    from pipeline.data import epoch_loader, loaders
    from pipeline.data.decode import decode
    from pipeline.data.prepared import open_prepared
    from pipeline.distributed import World

    made = recipe(Path(sys.argv[1]), workers=4, **json.loads(sys.argv[2]))

    def show() -> None:
        loader = loaders.train_loader(made, open_prepared(made.data), World(), 64)
        digest = hashlib.sha256()
        with loader.epoch(0) as batches:
            for batch in batches:
                digest.update(batch.images.numpy().tobytes())
        print(digest.hexdigest())

    limited = epoch_loader.threads
    epoch_loader.threads = lambda workers: workers
    show()
    epoch_loader.threads = limited
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    show()
    hits, misses = decode.stats.cache_hits, decode.stats.cache_misses
    print(sum(hits.values()), sum(misses.values()))


if __name__ == "__main__":
    main()
