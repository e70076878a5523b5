"""Other graders on the cases that math_grading.py --write wrote: lm-eval's checks for MATH and verl's, as installed here.

    python benchmarks/math_other_graders.py cases.jsonl [--limit N] [--only NAME ...] [--authors CHECKOUT]

For an environment of its own, since lm-eval's minerva check needs antlr4-python3-runtime 4.11 and ours has 4.9: lm_eval
0.4.13, verl 0.9.1, sympy 1.14, antlr4-python3-runtime 4.11.0, math-verify 0.9.0. lm-eval's string checks are given the content
of the last box, as its own functions find it, or the text after `answer is`; they are made for prompts of one form only.
Each grader gets the gold answer alone. A call that raises counts as wrong where the reward is 1, and is counted; so does
one that takes more than 5 s. --authors needs sympy, math-verify and pylatexenc 2.10 alone."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

Grader = Callable[[str, str], bool]  # (completion, gold answer)


def of_lm_eval() -> dict[str, Grader]:
    from lm_eval.tasks.hendrycks_math import utils as hendrycks
    from lm_eval.tasks.minerva_math import utils as minerva

    def stated(completion: str) -> str:
        """Return the content of the last box; else what follows `answer is` or `####`, else all."""
        box = minerva.last_boxed_only_string(completion)
        if box:
            return minerva.remove_boxed(box)
        return re.split(r"answer is|####", completion)[-1].strip().strip("$.")

    def by_minerva(completion: str, gold: str) -> bool:
        answer = minerva.normalize_final_answer(stated(completion))
        return minerva.is_equiv(answer, minerva.normalize_final_answer(gold))

    def by_minerva_verify(completion: str, gold: str) -> bool:
        row = {"answer": gold, "solution": f"$\\boxed{{{gold}}}$"}
        return minerva.process_results(row, [completion])["math_verify"] == 1

    return {
        "lm-eval minerva": by_minerva,
        "lm-eval minerva, math_verify": by_minerva_verify,
        "lm-eval hendrycks": lambda completion, gold: hendrycks.is_equiv(stated(completion), gold),
    }


def of_verl() -> dict[str, Grader]:
    from verl.utils.reward_score import gsm8k, math_dapo, math_reward

    return {
        "verl math_reward": lambda completion, gold: math_reward.compute_score(completion, gold) == 1,
        "verl math_dapo": lambda completion, gold: math_dapo.compute_score(completion, gold)["acc"],
        "verl gsm8k": lambda completion, gold: gsm8k.compute_score(completion, gold.replace(",", "")) == 1,
        "verl gsm8k, flexible": lambda completion, gold: (
            gsm8k.compute_score(completion, gold.replace(",", ""), "flexible") == 1
        ),
    }


def of_the_authors(checkout: Path) -> dict[str, Grader]:
    """Return the grader of FRPO's authors as their training calls it, from a checkout of Helloworld10011/FRPO."""
    sys.path.insert(0, str(checkout / "training" / "math_training"))
    from math_grader import boxed_reward_fn

    return {"the authors'": lambda completion, gold: boxed_reward_fn(completion, gold, fast=True)[1] == 1}


def stop(*_) -> None:
    raise TimeoutError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--authors", type=Path, help="a checkout of Helloworld10011/FRPO: its grader alone")
    args = parser.parse_args()
    graders = of_the_authors(args.authors) if args.authors else of_lm_eval() | of_verl()
    rows = [json.loads(line) for line in args.cases.open()]
    rows = rows[:: max(1, len(rows) // args.limit) if args.limit else 1]
    signal.signal(signal.SIGALRM, stop)
    for name in args.only or graders:
        count, wrong, raised, start = Counter(), Counter(), 0, time.perf_counter()
        for row in rows:
            right = None
            signal.setitimer(signal.ITIMER_REAL, 5)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    right = graders[name](row["completion"], row["gold"])
            except BaseException as problem:  # noqa: BLE001 - what the grader raises is what is counted
                if isinstance(problem, KeyboardInterrupt):
                    raise
                raised += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            group = row["data"], row["group"]
            count[group] += 1
            wrong[group] += bool(right) != bool(row["reward"])
        shares = "  ".join(f"{' '.join(g)} {100 * wrong[g] / n:.1f}%" for g, n in sorted(count.items()))
        print(f"{name}: {shares}  ({raised} raised, {time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
