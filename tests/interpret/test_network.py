"""Explanation mode and the flags of dynamic modules, which come back as they were."""

import pytest
from planted_models import PlantedCoDA, flags

from pipeline.interpret.network import dynamic_modules, explaining, explanation_mode


def test_explanation_mode_restores_each_flag_nested_and_on_errors():
    model = PlantedCoDA(conventional=True).train()
    # A normalisation is frozen inside a network in training.
    model.stem[1].eval()
    model.stage2[0].explaining = True
    found = flags(model)
    with explanation_mode(model):
        inside = flags(model)
        assert not any(training for training, _ in inside)
        assert all(explaining is not False for _, explaining in inside)
        with pytest.raises(RuntimeError, match="planted"), explanation_mode(model):
            raise RuntimeError("planted")
        assert flags(model) == inside
    assert flags(model) == found


def test_some_dynamic_modules_explain_and_the_others_are_left_alone():
    """As a penalty on dynamic weights needs it: in training, and of the modules it has found."""
    model = PlantedCoDA(conventional=True).train()
    dynamic = dynamic_modules(model)
    assert dynamic == [*model.stage1, *model.stage2, model.head]
    before = flags(model)
    with explaining([*model.stem, *dynamic[:2]]):
        assert [module.explaining for module in dynamic] == [True, True, False, False]
        assert all(module.training for module in model.modules())
    assert flags(model) == before

    def fail():
        with explaining(dynamic):
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fail()
    assert flags(model) == before
