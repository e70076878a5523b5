"""Worlds with vLLM engines. Processes of their own: vLLM replaces parts of torch in its process, and its groups last as
long as the process."""

import checks
import pytest
from tiny_models import make_tiny
from worlds import Workers


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, str]:
    """Return name -> directory of a tiny model. Two of each kind that is refitted, so that the weights really change."""
    base = tmp_path_factory.mktemp("rollout")
    return {name: make_tiny(base / name, **settings) for name, settings in checks.MODELS.items()}


@pytest.fixture(scope="module")  # every engine keeps its KV cache of 1 GiB
def one(tiny):
    """`one(check)`: run a check in a world of one process, which keeps its engines between checks."""
    yield from _world(1, tiny)


@pytest.fixture(scope="module")
def two(tiny):
    """`two(check)`: run a check in a world of two."""
    yield from _world(2, tiny)


def _world(size: int, tiny: dict[str, str]):
    workers = Workers()
    yield lambda check, **arguments: workers.run(size, check, tiny=tiny, **arguments)
    workers.close()
