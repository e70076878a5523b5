"""The finished tiny study, which several files look at: its runs take most of a minute."""

import pytest
from tiny_study import tiny_study

from frpo_nemo.evaluation.forgetting import ForgettingStudy
from frpo_nemo.evaluation.parts import check_command


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """(its configuration, the rows of its first start)"""
    config = tiny_study(tmp_path_factory.mktemp("study") / "out")
    return config, ForgettingStudy(config, check_command).run()
