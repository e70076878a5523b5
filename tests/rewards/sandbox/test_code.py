"""The `code` reward: right programs pass, wrong ones and tricks do not, and only a fault of ours is no score."""

import functools
import json
import shutil
from pathlib import Path

import pytest

from frpo_nemo.config.options import RewardConfig
from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.programs.code import CodeTests, program_of
from frpo_nemo.rewards.reward_set import build_rewards, check_rewards

MBPP = Path(__file__).parents[4] / "shared" / "data" / "mbpp" / "mbpp.jsonl"
TESTS = ["assert double(2) == 4", "assert double(3) == 6", "assert double([1]) == [1, 1]"]
RIGHT = "def double(x):\n    return 2 * x\n"
WRONG = "def double(x):\n    return 4\n"

pytestmark = pytest.mark.usefixtures("sandbox")


def score(completion, tests=TESTS, setup=None, **options) -> float:
    options |= {"setup_column": "setup"} if setup else {}
    return reward(**options)(None, [completion], tests=[tests], setup=[setup])[0]


@functools.cache
def reward(**options) -> CodeTests:
    return CodeTests(memory_mb=256, **options)


def test_published_solutions_pass_their_tests_and_fail_those_of_another_problem():
    if not MBPP.exists():
        pytest.skip(f"{MBPP} is not there")
    rows = [json.loads(line) for line in MBPP.read_text().splitlines()[:30]]
    config = RewardConfig(target="code", args={"column": "test_list"}, timeout=60.0, workers=2)
    rewards = build_rewards({"code": config})
    solutions = [f"Here it is:\n```python\n{row['code']}\n```" for row in rows]
    tests = [row["test_list"] for row in rows]
    right = rewards.score(["p"] * 30, solutions, [None] * 30, {"test_list": tests})
    others = rewards.score(["p"] * 30, solutions, [None] * 30, {"test_list": tests[1:] + tests[:1]})
    rewards.close()
    assert right.total.tolist() == [1.0] * 30 and others.total.tolist() == [0.0] * 30
    assert right.failures == others.failures == {}


@pytest.mark.parametrize(
    "text, program",
    [
        ("no fence", "no fence"),
        ("```python\na\n```\nand\n```py\nb\nc\n```\nso", "b\nc\n"),
        ("```Python3\na\n```\n```\noutput\n```", "a\n"),
        ("```\na\n```\n```text\nb\n```", "a\n"),
        ("```bash\na\n```", "```bash\na\n```"),
        ("<think>```python\na\n```</think>\n```python\nb", "b"),
        ("print('```python')", "print('```python')"),
        ("1. So:\n   ```python\n   if a:\n       b\n   ```\n", "if a:\n    b\n"),
        (
            'def f():\n    """\n    ```python\n    f()\n    ```\n    """',
            'def f():\n    """\n    ```python\n    f()\n    ```\n    """',
        ),
        ("```python3.11\r\na\r\n```", "a\r\n"),
    ],
)
def test_the_program_is_the_last_python_block(text, program):
    assert program_of(text) == program


def test_all_tests_or_a_share():
    assert score(RIGHT) == 1.0 and score(WRONG) == 0.0
    assert score(WRONG, partial=True) == pytest.approx(1 / 3)
    hangs = "def double(x):\n    while x == 3: pass\n    return 2 * x"
    assert score(hangs, partial=True, seconds=1.0) == pytest.approx(1 / 3), "what ran before the limit counts"


def test_assert_statements_may_be_json_and_have_code_before_them():
    assert score(RIGHT, json.dumps(TESTS)) == 1.0
    tests = ["assert double(math.inf) == here; here = 0"] * 2
    assert score(RIGHT, tests) == 0.0
    assert score(RIGHT, tests, setup="import math\nhere = math.inf") == 1.0


def test_a_main_block_runs_for_input_and_output_and_not_for_assert_statements():
    program = f"{RIGHT}\nif __name__ == '__main__':\n    print(double(int(input())))"
    assert score(program) == 1.0
    assert score(program, [{"input": "4\n", "output": "8"}]) == 1.0


@pytest.mark.parametrize(
    "form",
    [
        lambda pairs: pairs,
        json.dumps,
        lambda pairs: {"inputs": [pair["input"] for pair in pairs], "outputs": [pair["output"] for pair in pairs]},
    ],
)
def test_input_and_output(form):
    tests = form([{"input": "1 2\n", "output": "3\n\n"}, {"input": "5 6", "output": "11"}])
    assert score("a, b = map(int, input().split())\nprint(a + b, end=' ')", tests) == 1.0
    assert score("import sys\na, b = map(int, open(0).read().split())\nprint(a + b)\nexit()", tests) == 1.0
    assert score("input()\nprint(3)", tests) == 0.0
    assert score("input()\nprint(3)", tests, partial=True) == 0.5
    assert score("print(sum(map(int, input().split())))\n1 / 0", tests) == 0.0, "it must end well"
    assert score("input()\nwhile True: pass", tests, seconds=0.3) == 0.0


def test_input_and_output_may_be_lines():
    tests = {"inputs": [["2", "3 4"], ["1", "5 6"]], "outputs": [["7", "done"], ["11", "done"]]}
    assert score("input()\nprint(sum(map(int, input().split())))\nprint('done')", tests) == 1.0
    assert score("input()\nprint(7)\nprint('done')", tests, partial=True) == 0.5


CALLED = {  # APPS's tests of a function -> a right program, a wrong one
    "a function": (
        {"fn_name": "add", "inputs": [[1, 2], [0, 5]], "outputs": [3, 5]},
        "def add(a, b): return a + b",
        "def add(a, b): return 3",
    ),
    "results in lists of their own": (
        {"fn_name": "shout", "inputs": [["a'b"], ["c\n"]], "outputs": [["A'B"], ["C\n"]]},
        "def shout(text): return text.upper()",
        "def shout(text): return [text]",
    ),
    "a result that is a list": (
        {"fn_name": "pair", "inputs": [[1], [2]], "outputs": [[1, 1], [2, 2]]},
        "def pair(a): return a, a",
        "def pair(a): return 1",
    ),
    "a method of Solution": (
        {"fn_name": "largest", "inputs": [[[1, 3, 2]], [[[5]]]], "outputs": [3, [5]]},
        "from typing import List\nclass Solution:\n    def largest(self, nums: List[int]) -> int: return max(nums)",
        "class Solution:\n    def largest(self, nums): return nums[0]",
    ),
    "dicts of numbers": (
        {"fn_name": "turn", "inputs": [[{"1": 2, "3": 4}]], "outputs": [{"2": 1, "4": 3}]},
        "def turn(d): return {value: key for key, value in d.items()}",
        "def turn(d): return d",
    ),
    "no arguments, and nothing": (
        {"fn_name": "nothing", "inputs": [[]], "outputs": [None]},
        "def nothing(): pass",
        "def nothing(): return 0",
    ),
    "True, and strings that look like programs": (
        {"fn_name": "same", "inputs": [["1 + 1", "2"], ["x", "x"]], "outputs": [False, True]},
        "def same(a, b): return a == b",
        "def same(a, b): return eval(a) == int(b)",
    ),
}


@pytest.mark.parametrize("case", CALLED)
@pytest.mark.parametrize("form", [json.dumps, lambda tests: tests])
def test_tests_of_a_function_by_its_name(case, form):
    tests, right, wrong = CALLED[case]
    assert score(right, form(tests)) == 1.0 and score(wrong, form(tests)) < 1.0
    assert score("print('no function')", form(tests)) == 0.0


def test_a_fn_name_that_is_null_is_that_of_a_script():
    tests = {"fn_name": None, "inputs": ["1\n"], "outputs": ["2\n"]}
    assert score("print(int(input()) + 1)", tests) == 1.0


@pytest.mark.parametrize("setup", [None, "", []])
def test_a_row_without_code_before_its_tests_is_scored(setup):
    config = RewardConfig(target="code", args={"setup_column": "setup", "memory_mb": 256}, timeout=60.0, workers=1)
    rewards = build_rewards({"code": config})
    columns = {"tests": [TESTS] * 2, "setup": [setup] * 2}
    scores = rewards.score(["p"] * 2, [RIGHT, WRONG], [None] * 2, columns)
    rewards.close()
    assert scores.failures == {} and scores.total.tolist() == [1.0, 0.0]


def test_code_before_tests_may_be_lines():
    tests = ["assert double(here) == 4", "assert double(here) == 4 and math"]
    assert score(RIGHT, tests, setup=["import math", "here = 2"]) == 1.0


NO_TESTS = [None, [], {}, "null", "[]", '{"inputs": [], "outputs": []}', 5, [{"input": "1", "output": 2}], {"a": 1}]
NO_TESTS += [{"fn_name": "f", "inputs": [1], "outputs": [1]}, {"fn_name": "f()", "inputs": [[]], "outputs": [1]}]
NO_TESTS += ['{"fn_name": "f", "inputs": [[NaN]], "outputs": [1]}']


def test_rows_without_tests_are_unscored_and_counted():
    rewards = build_rewards({"code": RewardConfig(target="code", args={"memory_mb": 256}, timeout=60.0, workers=1)})
    count = len(NO_TESTS)
    scores = rewards.score(["p"] * count, ["def f(x): return 1"] * count, [None] * count, {"tests": NO_TESTS})
    rewards.close()
    assert scores.failures == {"code": {"error": count}} and scores.total.isnan().all()
    assert scores.messages["code"] == "ValueError: no tests: 'None'"


TRICKS = {
    "leaves": "import sys\nsys.exit(0)",
    "leaves at once": "import os\nos._exit(0)",
    "leaves when asked": "def double(x):\n    raise SystemExit(0)",
    "leaves at once when asked": "import os\ndef double(x):\n    os._exit(0)",
    "kills itself": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nos.kill(0, signal.SIGKILL)",
    "kills its parent": "import os\ndef double(x):\n    os.kill(os.getppid(), 9)\n    return 4",
    "prints verdicts": "print('1\\n' * 3, 'passed', flush=True)\nimport os\nos._exit(0)",
    "writes verdicts": """
import os
for fd in range(64):
    try:
        os.write(fd, b"sandboxed\\n" + b"1\\n" * 3 + b"0" * 32 + b"1\\n")
    except OSError:
        pass
os._exit(0)""",
    "writes its source": "import os\nfor fd in range(64):\n    try: os.ftruncate(fd, 0)\n    except OSError: pass",
    "closes descriptors": "import os\nos.closerange(0, 64)\ndef double(x):\n    return 4",
    "replaces builtins": """
import builtins, json, marshal, os
builtins.exec = builtins.eval = builtins.compile = lambda *_: None
builtins.BaseException = builtins.Exception = builtins.AssertionError = int
marshal.loads = json.loads = lambda *_: ["", "", []]
os._exit = lambda *_: None""",
    "defines __debug__ and exceptions": "class AssertionError(SystemExit): pass\ndef double(x): raise AssertionError",
    "returns what equals everything": """
class Everything:
    __eq__ = __le__ = __float__ = lambda *_: True
double = lambda x: Everything()""",
    "reads the number and forges the verdicts": """
import json, marshal, os
for fd in range(64):
    try:
        nonce, _, tests = marshal.loads(os.pread(fd, 1 << 20, 0))
    except (OSError, ValueError, EOFError, TypeError):
        continue
    for verdict in (f"{nonce}1\\n", f"{nonce}true\\n"):
        for fd in range(64):
            try:
                os.write(fd, (verdict * len(tests)).encode())
            except OSError:
                pass
os._exit(0)""",
    "looks for the answers": """
import marshal, os, re
answers = []
for fd in range(64):
    try:
        _, _, tests = marshal.loads(os.pread(fd, 1 << 20, 0))
        answers = [int(re.search(r"== (\\d+)", test)[1]) for test, *_ in tests]
    except (OSError, ValueError, EOFError, TypeError):
        pass
double = lambda x: answers.pop(0)""",
    "replaces the runner": """
import __main__, json, sys
__main__.read.__code__ = (lambda fd: b"").__code__
__main__.as_json.__code__ = (lambda value: "true").__code__
json.dumps = lambda value: "1"
frame = sys._getframe(1)
while frame:
    frame.f_locals.update(encode=lambda value: "1", value=lambda *_: 4)
    frame = frame.f_back
double = lambda x: True""",
    "writes what no value is": """
import __main__
verdicts = iter(['["list", 5]', '[' * 100000, '["set", [["list", []]]]'])
__main__.as_json.__code__ = (lambda value: __import__("program").verdicts.__next__()).__code__
import sys
sys.modules["program"].verdicts = verdicts
double = lambda x: 1""",
    "does nothing at exit": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit",
    "exhausts memory": "x = bytearray(1 << 40)",
    "exhausts the compiler": "(" * 100_000,
    "is not text": "\0\ud800",
    "is nothing": "",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_score_zero(trick):
    assert score(TRICKS[trick], partial=True) == 0.0


def test_a_replaced_builtin_is_itself_again_in_the_tests():
    tests = ["assert all([double(3) == 6, double(4) == 8])"]
    assert score("import builtins\nbuiltins.all = lambda _: True\ndouble = lambda x: 4", tests) == 0.0
    assert score(f"import builtins\nbuiltins.all = None\n{RIGHT}", tests) == 1.0


@pytest.mark.parametrize(
    "test, right, wrong",
    [
        (
            "assert f() == {'a': [(1, 2.5), None], 3: {b'x'}}",
            "{'a': [(1, 2.5), None], 3: {b'x'}}",
            "{'a': [[1, 2.5], None], 3: {b'x'}}",
        ),
        ("assert f() == {'a': 2}, 'message'", "__import__('collections').Counter('aa')", "{'a': 3}"),
        ("assert f() == {1, 2}", "frozenset({1, 2})", "[1, 2]"),
        ("assert f() == {'a', 'b'}", "dict(a=1, b=2).keys()", "dict(a=1)"),
        ("assert f() == 0.5", "__import__('fractions').Fraction(1, 2)", "'0.5'"),
        ("assert f() == 2", "2.0", "2.1"),
        ("assert f() == 0", "0", "1 / 0"),
        ("assert f() != 0", "1", "1 / 0"),
        ("assert f() == 'a\\n\\ud800\u20ac'", "'a\\n\\ud800\u20ac'", "'a\\n'"),
        ("assert f() == 1 + 2j", "1 + 2j", "1"),
        (f"assert f() == {10**400}", "10**400", "float('inf')"),
        ("assert 3 == f()", "3", "4"),
        ("assert f() is True", "True", "1"),
        ("assert f() != 3", "float('nan')", "3"),
        ("assert f() < 3", "2", "'2'"),
        ("assert sorted(f()) == [1, 2]", "{2, 1}", "{2, 3}"),
        ("assert f() == set([1])", "{1}", "{2}"),
        ("assert f() in (1, 2) and not f() == 1", "2", "1"),
        ("x = f()\nassert x == 1", "1", "2"),
    ],
)
def test_a_test_means_what_python_means_wherever_it_is_compared(test, right, wrong):
    assert score(f"def f(): return {right}", [test]) == 1.0
    assert score(f"def f(): return {wrong}", [test]) == 0.0


def test_a_program_that_hangs_is_wrong_and_a_row_without_tests_is_not_scored():
    config = RewardConfig(target="code", args={"seconds": 1.0, "memory_mb": 256}, workers=2)
    rewards = build_rewards({"code": config})
    completions = ["while True: pass", RIGHT, RIGHT, RIGHT, RIGHT]
    tests = [TESTS, TESTS, [], "no list", [1]]
    scores = rewards.score(["p"] * 5, completions, [None] * 5, {"tests": tests})
    rewards.close()
    assert scores.total[:2].tolist() == [0.0, 1.0] and scores.total[2:].isnan().all()
    assert scores.failures == {"code": {"error": 3}}


def test_a_sandbox_that_does_not_start_is_a_failure_and_not_zero(tmp_path, monkeypatch):
    bwrap = tmp_path / "bwrap"
    bwrap.symlink_to(shutil.which("bwrap"))
    monkeypatch.setenv("PATH", str(tmp_path))
    config = RewardConfig(target="code", workers=1)
    rewards = build_rewards({"code": config})

    def scored():
        return rewards.score(["p"], [RIGHT], [None], {"tests": [TESTS]})

    assert scored().total.tolist() == [1.0]
    bwrap.unlink()
    assert scored().total.isnan().all() and scored().failures == {"code": {"error": 1}}
    bwrap.write_text("#!/bin/sh\necho no namespaces today\n")
    bwrap.chmod(0o755)
    assert scored().total.isnan().all() and "no namespaces today" in scored().messages["code"]
    with pytest.raises(ConfigError, match="^reward.code: the sandbox did not start: no namespaces today"):
        build_rewards({"code": config})
    rewards.close()


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"args": {"seconds": 0}}, "seconds=0 must be above 0"),
        ({"args": {"memory_mb": 16}}, "memory_mb=16 at least 64"),
        ({"args": {"seconds": 8.0}}, "timeout=10.0 must be at least 5 s above args.seconds=8.0"),
        ({"timeout": 6.0}, "timeout=6.0 must be at least 5 s above args.seconds=5.0"),
        ({"args": {"column": "unit_tests"}}, "code needs 'unit_tests'"),
        ({"args": {"setup_column": "setup"}}, "code needs 'setup'"),
    ],
)
def test_bad_options_are_sentences(fields, sentence):
    with pytest.raises(ConfigError, match="^reward.code: ") as error:
        check_rewards({"code": RewardConfig(target="code", **fields)}, columns=["tests"])
    assert sentence in str(error.value)
