"""Every call of ours into megatron-core, vLLM, torch.distributed and torch.cuda fits the packages that are installed: a
keyword, a method or an attribute that was renamed there is a failing test here, without a GPU."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
from calls import SOURCES, files_that_use_the_stack


@pytest.fixture
def uses(signatures) -> list[dict]:
    """Return every use of a package's name, as it was examined."""
    return [row for row in signatures if "problem" in row]


@pytest.mark.parametrize("file", files_that_use_the_stack())
def test_the_packages_have_what_this_file_uses(file, uses):
    here = [use for use in uses if use["file"] == file]
    assert here
    problems = [f"{use['what']}: {use['problem']}" for use in here if use["problem"]]
    assert not problems, "\n".join([file, *problems])


def test_a_renamed_keyword_of_any_call_would_be_found(uses):
    assert not [use for use in uses if use["unseen"]]
    assert sum(len(use["keywords"]) for use in uses) > 100


def test_every_entry_of_receivers_is_needed(signatures):
    (row,) = [row for row in signatures if "in_vain" in row]
    assert not row["in_vain"]


def test_what_is_woken_is_what_vllm_lets_sleep_on():
    """vLLM's allocator keeps the memory of these tags asleep until they are woken; an engine sleeps while any of them does."""
    vllm = Path(find_spec("vllm").origin).parent
    tags = _strings_of(vllm / "device_allocator/__init__.py", "DEFERRABLE_TAGS: tuple[str, ...]")
    assert tags == {"weights", "kv_cache"} == _strings_of(SOURCES / "frpo_nemo/rollout/engine.py", "self._asleep")


def _strings_of(file: Path, name: str) -> set[str]:
    """Return all strings in the statements that begin with `name`."""
    statements = [s for s in ast.walk(ast.parse(file.read_text())) if isinstance(s, (ast.Assign, ast.AnnAssign))]
    chosen = [statement for statement in statements if ast.unparse(statement).startswith(name)]
    return {node.value for s in chosen for node in ast.walk(s.value) if isinstance(node, ast.Constant)}
