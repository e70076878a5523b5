"""What is installed, and what a machine has, are looked at before a model loads. No GPU is needed here: where one is asked
for, torch's answer is pretended, and the test says so by its fixture."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from frpo_nemo import stack
from frpo_nemo.errors import ConfigError


@pytest.fixture
def hopper(monkeypatch):
    """torch claims one H100."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.fixture
def installed(monkeypatch):
    """Return a dictionary of packages that are added to those installed."""
    added, really = {}, stack.version
    monkeypatch.setattr(stack, "version", lambda package: added.get(package) or really(package))
    monkeypatch.setattr(stack, "transformer_engine_problem", stack.transformer_engine_problem.__wrapped__)  # not cached
    return added


def test_what_the_lock_installs_is_what_was_tested():
    assert stack.version("torch") and stack.version("megatron-core")
    assert stack.untested_versions() == []


def test_a_version_outside_of_the_tested_range_is_named_with_the_range(installed):
    installed |= {"megatron-core": "0.16.1", "transformers": "5.24.0"}
    assert stack.untested_versions() == [
        "megatron-core 0.16.1 is installed; frpo-nemo was tested with megatron-core>=0.19.2,<0.20 only.",
        "transformers 5.24.0 is installed; frpo-nemo was tested with transformers>=5.20.2,<5.21 only.",
    ]


def test_fewer_gpus_than_processes_are_refused(hopper):
    stack.check_gpus(1)
    with pytest.raises(ConfigError, match="trainer.devices=8 processes .* can see 1 GPU; .*--gpus-per-node"):
        stack.check_gpus(8)


def test_a_driver_that_is_too_old_is_named(monkeypatch, tmp_path):
    """torch's own sentence, which it raises when it initialises CUDA, is quoted."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(stack, "_NVIDIA_DEVICE", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Please update it.")

    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ConfigError, match=r"CUDA 13.0\) cannot use them: .*too old \(found version 12020\)"):
        stack.check_gpus(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    stack.check_gpus(1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(stack, "_NVIDIA_DEVICE", tmp_path / "absent")
    stack.check_gpus(1)


@pytest.mark.parametrize("variable", stack.ALLOCATOR_VARIABLES)
@pytest.mark.parametrize("value", ["expandable_segments:True", "max_split_size_mb:512, expandable_segments:true"])
def test_expandable_segments_are_refused(monkeypatch, variable, value):
    for name in stack.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    stack.check_allocator()
    monkeypatch.setenv(variable, "max_split_size_mb:512,expandable_segments:False")
    stack.check_allocator()
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"{variable}=.*remove expandable_segments from it"):
        stack.check_allocator()


def test_transformer_engine_is_used_in_bf16_on_a_gpu_that_it_supports(hopper, installed, monkeypatch):
    assert not stack.uses_transformer_engine("bf16")
    installed["transformer-engine"] = "2.20.2"
    monkeypatch.setattr(stack, "transformer_engine_problem", lambda: None)
    assert stack.uses_transformer_engine("bf16")
    assert not stack.uses_transformer_engine("fp32")  # it would multiply in TF32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))  # A100: no fused attention over packs
    assert not stack.uses_transformer_engine("bf16")
    installed["flash-attn"] = "2.8.3"
    assert stack.uses_transformer_engine("bf16")


def test_fp8_is_refused_on_a_gpu_without_it(hopper, monkeypatch):
    stack.check_fp8()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ConfigError, match="model.fp8 needs .* 8.9 or more .* has 8.0; set model.fp8=null"):
        stack.check_fp8()


def test_a_transformer_engine_that_does_not_import_is_named_with_the_remedy(hopper, installed):
    installed["transformer-engine"] = "2.20.2"
    if stack.transformer_engine_problem() is None:
        pytest.fail("transformer_engine imports here, so this machine cannot show what happens when it does not")
    with pytest.raises(ConfigError, match="transformer-engine 2.20.2 cannot be imported .*--no-build-isolation"):
        stack.uses_transformer_engine("bf16")


def test_a_broken_transformer_engine_does_not_take_megatron_core_down(tmp_path):
    """Like the installed package without its compiled part it raises FileNotFoundError, which megatron-core passes on."""
    package, record = tmp_path / "transformer_engine", tmp_path / "transformer_engine-2.20.2.dist-info"
    package.mkdir()
    record.mkdir()
    (package / "__init__.py").touch()
    (package / "pytorch.py").write_text("raise FileNotFoundError('Could not find shared object file')\n")
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.20.2\n")
    alone = run_with(tmp_path, "import megatron.core")
    assert alone.returncode and "FileNotFoundError" in alone.stderr
    ours = "import frpo_nemo.megatron.actor, megatron.core.extensions.transformer_engine as te; print(te.HAVE_TE)"
    assert run_with(tmp_path, ours).stdout.strip() == "False"


def run_with(directory: Path, code: str) -> subprocess.CompletedProcess:
    """Run Python with `directory` before the installed packages."""
    path = f"import sys; sys.path.insert(0, {str(directory)!r}); "
    return subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True)
