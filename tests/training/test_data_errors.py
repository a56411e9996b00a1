"""A stored image that cannot be decoded ends the run on every process, with the cause."""

import os
import subprocess
import sys
import time

import pytest
import yaml
from data.small_data import damage
from recipes_for_tests import small_recipe
from runs_for_tests import train_loader

from pipeline.data.prepare import prepare
from pipeline.distributed import World

SAMPLE = 123


def test_a_broken_image_on_one_process_ends_all(tmp_path):
    changes = dict(
        data__write_mode="jpg", model__name="resnet20", model__args={}, training__epochs=50
    )
    recipe = small_recipe(tmp_path, **changes)
    prepare(recipe)
    damage(recipe.data.folder / "train.beton", SAMPLE)
    (reader,) = (
        rank
        for rank in range(2)
        if SAMPLE in train_loader(recipe, World(rank, rank, 2), 64)._visit.order(0)
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    processes = []
    # No launcher starts them, as torchrun or srun would end the others.
    for rank in range(2):
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 20000 + os.getpid() % 9999,
        }
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        with (tmp_path / f"log-{rank}").open("w") as log:
            command = [sys.executable, "-m", "pipeline", "train", str(tmp_path / "recipe.yaml")]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        assert processes[reader].wait(300) == 2
        began = time.monotonic()
        assert processes[1 - reader].wait(60) != 0
        assert time.monotonic() - began < 20
    finally:
        for process in processes:
            process.kill()
    message = f"train.beton: image {SAMPLE} cannot be decoded"
    assert message in (tmp_path / f"log-{reader}").read_text().splitlines()[-1]
    assert message in (recipe.folder.path / "first_error.txt").read_text()


@pytest.mark.timeout(60)
def test_it_does_so_before_the_batches_that_follow(tmp_path):
    recipe = small_recipe(tmp_path, data__write_mode="jpg")
    prepare(recipe)
    loader = train_loader(recipe, World(), 128)
    sample = int(loader._visit.order(0)[3 * 128 + 5])
    damage(recipe.data.folder / "train.beton", sample)
    seen = []

    def read_all():
        with train_loader(recipe, World(), 128).epoch(0) as batches:
            for batch in batches:
                seen.append(len(batch.labels))

    with pytest.raises(Exception, match=f"image {sample} cannot be decoded"):
        read_all()
    assert seen == [128, 128, 128]
