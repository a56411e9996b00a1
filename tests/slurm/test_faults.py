"""A short fault campaign on a real Slurm; `make faults` is the long one."""

import pytest
from faults import campaign, late
from local_slurm import MISSING
from recipes_for_tests import small_recipe


@pytest.mark.slurm
@pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} not found: apt-get install slurm-wlm munge"
)
def test_killed_it_ends_as_if_nothing_had_happened(prepared, slurm, tmp_path):
    def recipe_of(**changes):
        return small_recipe(
            prepared, model__name="coda_resnet20", model__args={"rank": 2}, **changes
        )

    table = campaign(slurm, recipe_of, ["SIGKILL of a process"], seed=0, disk=tmp_path)
    assert len(table) == 1
    assert not late(table)
