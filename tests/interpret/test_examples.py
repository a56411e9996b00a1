"""The examples in docstrings give what they say."""

import doctest

import pytest
import torch

from pipeline.interpret import contributions
from pipeline.models.dau import layer


@pytest.mark.parametrize("module", [contributions, layer], ids=lambda module: module.__name__)
def test_examples_of_docstrings(module):
    torch.manual_seed(0)
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
