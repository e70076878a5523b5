"""Shared by all tests: the environment of a run on CPU, and worlds of processes."""

import os

# Before torch or vLLM is imported by any test.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "VLLM_PLUGINS": "",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import pytest
from worlds import Workers


@pytest.fixture(scope="session")
def workers():
    """Processes for checks that need a world: `workers.run(4, check, tp=2, pp=2)`."""
    pool = Workers()
    yield pool
    pool.close()
