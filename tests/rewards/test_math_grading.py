"""`math`: where the answer of a completion is read, and what counts as the same answer. By example, and on rewritings and near
misses of many golds (benchmarks/math_cases.py)."""

import json
import math
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.math_cases import DEBATABLE, cases
from benchmarks.math_grading import rows
from frpo_nemo.config.options import RewardConfig
from frpo_nemo.rewards.builtin import exact_answer
from frpo_nemo.rewards.math_answers.grade import math_answer
from frpo_nemo.rewards.reward_set import build_rewards

SHARED = Path(__file__).parents[3] / "shared"
GSM8K_GOLD = "18 and 36 make 54, so 54 + 18 = 72.\n#### 72"


def score(gold, completion):
    return math_answer(None, [completion], answer=[gold])[0]


# ---- the place -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gold, completion, right",
    [
        # the last complete box, whatever else is written
        ("7", "First $a = 5$.\n\n#### Result\n\n$\\boxed{7}$", 1),
        ("7", "#### Part 1: use 7\n\n#### Part 2: subtract 2\nSo \\boxed{5}", 0),
        ("7", "\\boxed{7}. Hmm, that is wrong: \\boxed{8}", 0),
        ("8", "\\boxed{7}. Hmm, that is wrong: \\boxed{8}", 1),
        ("7", "The answer is 7, which is \\boxed{8;}", 0),
        ("7", "The answer is $7$, so $\\boxed{??}$", 0),
        ("7", "The answer is 7, so \\boxed{ }", 0),
        ("7", "\\boxed{\\boxed{7}}", 1),
        ("7", "\\boxed {7}", 1),
        ("7", "\\boxed{7} then \\boxed{8", 1),
        ("12", "So it is \\boxed{12", 0),
        (GSM8K_GOLD, "#### 71\nNo, \\boxed{72}", 1),
        (GSM8K_GOLD, "#### 72\nNo, \\boxed{71}", 0),
        # boxes of one list
        ("4, 9", "It is $\\boxed{4}$ or $\\boxed{9}$.", 1),
        ("4, 9", "$n = \\boxed{9}$ and $n = \\boxed{4}$", 1),
        ("1, 4, 9", "$\\boxed{1}$, $\\boxed{4}$, and $\\boxed{9}$", 1),
        ("9", "It is $\\boxed{4}$ or $\\boxed{9}$.", 0),
        ("9", "It is $\\boxed{9}$, or $\\boxed{9}$.", 1),
        ("4, 9", "$\\boxed{4}$. Then we get $\\boxed{9}$.", 0),
        # the line after ####
        (GSM8K_GOLD, "#### __72__", 1),
        (GSM8K_GOLD, "#### Final Answer:\n\n72", 1),
        (GSM8K_GOLD, "#### The total is 72 apples", 1),
        (GSM8K_GOLD, "#### Step 3\nSo there are 72 of them.", 1),
        (GSM8K_GOLD, "#### Step 72\nSo there are 3 of them.", 0),
        (GSM8K_GOLD, "#### 72 thousand", 0),
        (GSM8K_GOLD, "#### 72 percent", 0),
        (GSM8K_GOLD, "#### 72-75", 0),
        (GSM8K_GOLD, "#### 12:72", 0),
        (GSM8K_GOLD, "#### never 72", 0),
        (GSM8K_GOLD, "#### 72 and 1/2", 0),
        (GSM8K_GOLD, "#### 70 2", 0),
        (GSM8K_GOLD, "#### 72 (apples)", 1),
        (GSM8K_GOLD, "#### ", 0),
        ("72", "Some work.\n#### 72", 1),
        # the last statement
        ("72", "The answer is __72__.", 1),
        ("72", "The final answer is: $72$", 1),
        ("72", "**Answer**\n\n72", 1),
        ("72", "So 54 + 18 = 72 apples.", 1),
        ("72", "The answer is 72!", 1),
        ("72", "The answer is 72, not 54.", 1),
        ("72", "The answer is 54, not 72.", 0),
        ("72", "It can't be 72.", 0),
        ("72", "The answer is 72. Wait, that is wrong, it is 54.", 0),
        ("72", "The answer is 54.\nWait, it is 72.", 1),
        ("72", "The answer is 71 or 72.", 0),
        ("72", "Could it be 72?", 0),
        ("72", "The answer is 72 apples, which is 8 times 9.", 1),
        ("72", "The answer is 72 but that is wrong, it is 54.", 0),
        ("72", "The answer is more than 72.", 0),
        ("72", "She has at least 72.", 0),
        ("72", "She has 72 left.", 1),
        ("72", "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.", 1),
        ("72", "In total she gets $50 + $22 = $72 to spend.", 1),
        ("72", "That is 71.8 minutes, which rounds to 72 minutes.", 1),
        ("72", "He drives at 72km/hr.", 1),
        ("72", "It takes her 72 to 80 minutes.", 0),
        ("72", "<answer>72</answer>", 1),
        ("72", "<think>The answer is 54.</think>It is 72.", 1),
        ("west", "She walks **west**.", 1),
        ("\\text{west}", "The answer is west.", 1),
        ("\\text{west}", "The answer is not west.", 0),
    ],
)
def test_one_answer_is_read_from_one_place(gold, completion, right):
    assert score(gold, completion) == right


# ---- what is the same ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gold, same, others",
    [
        (
            "7",
            ["7.", "{7}", "\\mathbf{7}", "\\textbf{7}", "x = 7", "\\text{Total: }7", "7.00", "+7", "3+4", "\\frac{14}{2}"],
            ["7x", "7!"],
        ),
        (
            "7",
            ["7 \\text{ apples}", "7 apples", "\\$7", "7^\\circ", "7 \\pmod{9}", "a+b = 7", "7_{10}"],
            ["7 \\text{ or } 8", "7:10", "7i"],
        ),
        (
            "7",
            ["\\approx 7", "$7$", "7\\,\\text{cm}^2"],
            ["7, 8", "x > 7", "\\text{not } 7", "7 and a half", "7 million", "6.9999999"],
        ),
        (
            "23456",
            ["23,456", "23{,}456", "23\\,456", "23 456", "23,\\!456", "2.3456 \\times 10^4"],
            ["23.456", "23,457", "23 456 1"],
        ),
        ("6", ["2(3)", "(2)(3)", "2 \\cdot 3"], ["2^3"]),
        ("5", ["2 + 3"], ["2(3)", "2 3", "2 (3)"]),
        (
            "\\frac{5}{8}",
            ["5/8", ".625", "62.5\\%", "\\frac58", "\\frac{-5}{-8}", "0.6250"],
            ["\\frac{8}{5}", "0.62", "6.25\\%"],
        ),
        (
            "\\frac{7}{3}",
            ["2\\frac{1}{3}", "2 1/3", "2.333333", "2.\\overline{3}"],
            ["2.33", "\\frac{2}{3}", "2\\frac{1}{4}"],
        ),
        ("12\\%", ["12", "0.12", "12\\%", "12 \\text{ percent}"], ["1.2\\%", "120"]),
        ("0.3", ["30\\%"], ["3\\%", "30"]),
        (
            "4\\sqrt{7}",
            ["\\sqrt{112}", "4 \\cdot 7^{1/2}", "4sqrt(7)", "4√7", "10.583005"],
            ["4\\sqrt{6}", "4", "10.58"],
        ),
        ("\\frac{5\\pi}{6}", ["5\\pi/6", "\\frac{5}{6}\\pi", "5π/6"], ["150^\\circ", "5/6"]),
        ("2R^2", ["2R^{2}", "R^2 \\cdot 2"], ["2r^2", "2R^3"]),
        ("(x+1)(x-4)", ["x^2-3x-4", "(x-4)(x+1)"], ["x^2-3x+4", "(y+1)(y-4)"]),
        ("4 - 3i", ["-3i+4", "4 - 3\\mathrm{i}"], ["4+3i"]),
        ("y = 3x - 2", ["3x-2", "y=-2+3x", "3x - y = 2", "f(x) = 3x - 2"], ["3x", "y = 3x + 2", "3x - y = 3"]),
        ("x = 4", ["4", "4 = x"], ["y = 4", "x = 5"]),
        (
            "3, 8",
            ["8, 3", "\\{3, 8\\}", "3 \\text{ and } 8", "x = 3 \\text{ or } x = 8"],
            ["3", "3, 8, 9", "(3, 8)", "[3,8]"],
        ),
        ("2 \\pm \\sqrt{3}", ["2+\\sqrt{3}, 2-\\sqrt3"], ["2+\\sqrt{3}", "2 \\pm \\sqrt{2}"]),
        ("(4,\\infty)", ["x > 4", "4 < t", "(4, +\\infty)", "x \\in (4, ∞)"], ["x \\ge 4", "[4,\\infty)", "x < 4"]),
        ("x \\le 4", ["(-\\infty, 4]", "4 \\geq x"], ["(-\\infty, 4)", "x < 4"]),
        ("(-4,4)", ["|x| < 4", "-4 < x < 4"], ["|x| \\le 4", "|x| > 4"]),
        ("(-\\infty,6) \\cup (6,\\infty)", ["x \\ne 6", "\\mathbb{R} \\setminus \\{6\\}"], ["\\mathbb{R}", "x \\ne 5"]),
        ("\\mathbb{R}", ["(-\\infty, \\infty)", "x \\in \\mathbb{R}"], ["(0,\\infty)"]),
        ("30", ["3\\binom{5}{2}", "3{5 \\choose 2}"], ["13", "30\\ldots", "30..."]),
        ("3", ["\\log_2 8", "\\sqrt[3]{27}", "\\text{about } 3"], ["\\log_8 2", "\\pm 3", "\\text{at least } 3"]),
        ("[-1,3)", ["-1 \\le x < 3", "x \\ge -1 \\text{ and } x < 3"], ["(-1,3)", "[-1,3]", "-1 < x \\le 3"]),
        (
            "(0,1) \\cup (12,102)",
            ["0<x<1 \\text{ or } 12<x<102", "(12,102)\\cup(0,1)"],
            ["(0,1)", "(0,1] \\cup (12,102)"],
        ),
        ("(5,-6)", ["(5, -6)", "x = 5, y = -6", "(a,b) = (5,-6)"], ["(-6,5)", "\\{5,-6\\}", "[5,-6]", "5, -6"]),
        (
            "\\begin{pmatrix} 1/2 \\\\ 3 \\end{pmatrix}",
            ["\\frac12\\begin{bmatrix} 1 \\\\[2pt] 6 \\end{bmatrix}"],
            ["\\begin{pmatrix} 1/2 & 3 \\end{pmatrix}"],
        ),
        ("63_7", ["63_{7}", "63_{\\text{seven}}", "63 \\text{ base } 7", "63"], ["63_8", "45", "36_7"]),
        (
            "8 \\text{ cm}^2",
            ["8", "8 \\text{ square centimeters}", "8\\text{ cm²}"],
            ["8 \\text{ cm}", "8 \\text{ m}^2"],
        ),
        ("\\$4.50", ["4.5", "4.50 \\text{ dollars}", "\\$4.5"], ["\\$45", "4.50 \\text{ cents}"]),
        (
            "\\text{(D)}",
            ["D", "\\textbf{(D)}", "\\text{D}", "\\textbf{(D) } 12"],
            ["\\text{(C)}", "\\text{(C) or (D)}"],
        ),
        (
            "\\text{odd}",
            ["odd", "\\textbf{Odd}", "\\mathrm{odd}"],
            ["\\text{even}", "\\text{not odd}", "\\text{odd or even}"],
        ),
        # letters that may be a word or a product
        ("B", ["\\text{B}", "(B)", "\\textbf{(B)}", "\\mathrm{B}"], ["\\text{C}", "b", "\\text{not B}", "\\text{A or B}"]),
        ("yes", ["Yes", "\\text{Yes}", "\\textbf{YES.}"], ["no", "\\text{No}", "ye", "\\text{yes and no}"]),
        ("AB", ["\\text{AB}", "BA"], ["\\text{BA}", "ab", "A"]),
        ("\\cos 60^\\circ", ["\\frac12", "\\cos(60^\\circ)", "\\sin 30°", "0.5"], ["\\cos 60", "60", "30^\\circ"]),
    ],
)  # fmt: skip
def test_the_same_answer_in_another_spelling_is_right_and_another_answer_is_not(gold, same, others):
    boxed = {text: score(gold, f"So $\\boxed{{{text}}}$.") for text in same + others}
    assert boxed == dict.fromkeys(same, 1.0) | dict.fromkeys(others, 0.0)


@pytest.mark.parametrize(
    "gold",
    ["2:5", "6:30 \\text{ p.m.}", "\\text{no solution}", "\\emptyset"]
    + ["\\begin{cases} x & x > 0 \\\\ 0 & x \\le 0 \\end{cases}"],
)  # fmt: skip
def test_a_gold_answer_that_is_no_formula_is_compared_as_text(gold):
    assert score(gold, f"$\\boxed{{{gold}}}$") == 1
    assert score(gold, f"$\\boxed{{ {gold}.}}$") == 1
    assert score(gold, "$\\boxed{5:2}$") == score(gold, "$\\boxed{2}$") == 0


@pytest.mark.parametrize(
    "before, after",
    [("\\mathbf{", "}"), ("\\textbf{", "}"), ("\\text{", "}"), ("\\mathrm{", "}"), ("\\bf ", ""), ("{\\bf ", "}")]
    + [("\\left. ", " \\right."), ("\\underline{", "}"), ("\\color{red} ", ""), ("\\displaystyle{", "}"), ("\\large ", "")]
    + [("$", "$"), ("\\(", "\\)"), ("**", "**"), ("`", "`"), ('"', '"'), ("``", "''"), ("", "\\ "), ("", "\\,."), ("~", "")],
)  # fmt: skip
def test_what_is_around_an_answer_in_a_box_does_not_count(before, after):
    golds = [gold for gold in OWN_GOLDS if gold.count("$") == 0]
    wrong = [gold for gold in golds if score(gold, f"Thus \\boxed{{{before}{gold}{after}}}.") != 1]
    assert wrong == []


@pytest.mark.parametrize("gold, right, wrong", [
    ("27", ["27", "27.0", r"\$27", "x = 27", r"27\text{ cm}", r"2.7 \times 10^1"],
     ["26+1", "3^3", r"\sqrt{729}", r"\frac{54}{2}", "54/2", "27!/26!", "27", "The answer is 27."]),
    (r"\frac{1}{2}", [r"\frac12", r"\dfrac{1}{2}", "1/2", "0.5"], [r"\frac{2}{4}", "1-0.5", "2^{-1}"]),
    (r"1\frac{1}{2}", [r"1\frac{1}{2}", "1 1/2", "1.5", "3/2"], ["1+1/2"]),
    (r"3\sqrt{13}", [r"3\sqrt{13}", r"\sqrt{117}"], [r"\sqrt{118}"]),
])  # fmt: skip
def test_a_strict_answer_is_a_number_as_written_in_the_last_box(gold, right, wrong):
    """As the paper's grader: nothing is left to be worked out. The last of the wrong answers to 27 have no box."""
    boxed = [f"So \\boxed{{{answer}}}." for answer in right + wrong[:6]] + wrong[6:]
    scores = math_answer(None, boxed, strict=True, answer=[gold] * len(boxed))
    assert scores == [1.0] * len(right) + [0.0] * len(wrong)


def test_a_strict_answer_is_the_last_complete_box_alone():
    texts = [r"$\boxed{2}$ and $\boxed{3}$", r"\boxed{3} or \boxed{2}", r"\boxed{3}, \boxed{2"]
    assert math_answer(None, texts, strict=True, answer=["3", "3", "3"]) == [1.0, 0.0, 1.0]
    assert math_answer(None, texts[:1], answer=["2, 3"]) == [1.0], "not strict: joined boxes are one list"


@pytest.mark.parametrize(
    "statement",
    ["The answer is: $G$.", "**Final answer:** $G$", "Answer: \\(G\\)", "Thus the result is\n\\[\nG.\n\\]"]
    + ["### Answer\n\n$$G$$"]
    + ["The answer is **$G$**.", "The answer is `G`.", "Hence: \\[ G \\]", "<answer>G</answer>", "G", "$G$"],
)  # fmt: skip
def test_what_a_statement_says(statement):
    golds = [gold for gold in OWN_GOLDS if gold.count("$") == 0]
    wrong = [gold for gold in golds if score(gold, "First $a = 17$.\n\n" + statement.replace("G", gold)) != 1]
    assert wrong == []


def test_a_percent_sign_that_was_not_asked_for_counts_after_hashes():
    assert score("20", "\\boxed{20\\%}") == 1
    assert score("20", "So 60% - 40% = 20% are left.") == 1
    assert score("#### 20", "#### 20%") == 0
    assert score("0.2", "#### 20%") == 1
    assert score("20%", "The answer is 20%.") == 1


# ---- missing and structured gold answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("gold", [None, "", "  ", math.nan, {"ground_truth": "4"}, ["4"], True])
@pytest.mark.parametrize("target", ["math", "exact"])
def test_a_row_without_a_gold_answer_in_text_is_unscored_and_counted(target, gold):
    rewards = build_rewards({"r": RewardConfig(target=target, workers=1)})
    said = ["\\boxed{4}", "None" if gold is None else str(gold), "4"]
    scores = rewards.score(["p"] * 3, said, [None] * 3, {"answer": [gold, gold, "4"]})
    rewards.close()
    assert scores.total.isnan().tolist() == [True, True, False]
    assert scores.total[2] == 1
    assert scores.failures == {"r": {"error": 2}}
    assert "column 'answer'" in scores.messages["r"]


@pytest.mark.parametrize(
    "gold, completion", [(72, "\\boxed{72}"), (0.5, "\\boxed{\\frac12}"), (-3, "The answer is -3.")]
)
def test_gold_answers_may_be_numbers(gold, completion):
    assert score(gold, completion) == 1


def test_exact_reads_the_box_before_headings():
    assert exact_answer(None, ["#### Step 1\n$x=4$\n\n#### Answer\n$\\boxed{42}$"], answer=["42"]) == [1.0]
    assert exact_answer(None, ["\\boxed{42}, or \\boxed{43"], answer=["42"]) == [1.0]


# ---- at scale --------------------------------------------------------------------------------------------------------


OWN_GOLDS = [
    *("0", "9", "-14", "2550", "1,300", "0.65", "\\frac{7}{12}", "-\\frac{9}{4}", "2\\frac{3}{5}", "\\$7.25", "35\\%"),
    *("5\\sqrt{3}", "\\frac{\\sqrt{2}}{6}", "7\\pi", "8-3i", "4y^2-9", "(a+1)(b-3)", "\\frac{2+5t}{7}", "\\tan x"),
    *("x=-6", "y = 4x - 1", "6, 10", "-4,9", "5 \\pm \\sqrt{7}", "\\{2,11\\}", "(4,-9)", "(1,5,-8)", "[3,8)", "(-\\infty, 6]"),
    *("(1,7) \\cup (7,20)", "\\begin{pmatrix} 2 \\\\ -5/3 \\end{pmatrix}", "\\begin{pmatrix} 1 & 4 \\\\ 0 & -2 \\end{pmatrix}"),
    *("314_5", "1101_{2}", "\\text{(A)}", "\\text{north}", "24\\text{ cm}^2", "48^\\circ", "6.5 \\text{ miles}"),
]  # fmt: skip


def share_wrong(golds, *, after_hashes=False):
    """Return (kinds of wrong rewards, number of cases)."""
    wrong, count = Counter(), 0
    for gold in golds:
        for case in cases(gold, after_hashes=after_hashes):
            column = f"Some work.\n#### {gold}" if after_hashes else gold
            count += 1
            wrong[case.kind] += math_answer(None, [case.completion], answer=[column]) != [case.reward]
    return {kind: n for kind, n in wrong.items() if n}, count


def test_rewritings_are_right_and_near_misses_wrong_on_golds_of_every_kind():
    wrong, count = share_wrong(OWN_GOLDS)
    assert count > 1500
    assert wrong == {}


def test_the_same_after_hashes():
    wrong, count = share_wrong(["6", "-15", "1,250", "84000"], after_hashes=True)
    assert count > 200
    assert wrong == {}


def test_a_sample_of_the_public_golds():
    missing = [
        path for path in (SHARED / "data/math500/test.jsonl", SHARED / "data/gsm8k/test.jsonl") if not path.exists()
    ]
    if missing:
        pytest.skip(f"{missing[0]} is missing")
    count, wrong = Counter(), Counter()
    for row in rows(SHARED / "data", limit=80):
        group = row.data, row.case.reward
        count[group] += 1
        wrong[group] += math_answer(None, [row.case.completion], answer=[row.column]) != [row.case.reward]
    assert min(count.values()) > 500
    assert all(wrong[group] < 0.01 * n for group, n in count.items()), wrong


def test_reported_cases():
    path = SHARED / "cases" / "math.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is missing")
    reported = [json.loads(line) for line in path.open()]
    assert [score(r["gold"], r["completion"]) for r in reported] == [r["reward"] for r in reported]


def test_debatable_kinds_are_all_generated():
    kinds = {case.kind for gold in OWN_GOLDS for case in cases(gold)}
    kinds |= {case.kind for case in cases("6", after_hashes=True)}
    assert set(DEBATABLE) <= kinds


@pytest.mark.parametrize(
    "text",
    ["\\boxed{", "\\(x", "$ ", "1 ", "**a ", "the answer is ", "\\boxed{1} and ", "\\frac{", "{", "(", "####", "9"],
)
def test_degenerate_completions_take_no_time(text):
    start = time.monotonic()
    for completion in (text * 20_000, f"\\boxed{{{text * 20_000}}}"):
        assert score("2", completion) == 0
    assert time.monotonic() - start < 20
