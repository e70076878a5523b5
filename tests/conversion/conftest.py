"""A model and its conversion, for the tests of conversion."""

import pytest
from tiny_models import make_tiny

from frpo_nemo.conversion.convert import convert
from frpo_nemo.conversion.inputs import ConvertRun


@pytest.fixture(scope="package")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "qwen2", "qwen2")


@pytest.fixture(scope="package")
def converted(model, tmp_path_factory):
    return convert(ConvertRun(input=model, out=str(tmp_path_factory.mktemp("converted") / "checkpoint")))
