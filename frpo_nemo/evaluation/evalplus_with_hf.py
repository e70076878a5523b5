"""evalplus's command line, with answers of its hf backend that end at their own stop strings.

    python -m frpo_nemo.evaluation.evalplus_with_hf --model ... --backend=hf

evalplus 0.3.1 hangs the stopping criterion of every prompt into the model and never takes one out. A criterion looks for
stop strings behind as many tokens as its prompt has; behind a longer prompt's first tokens it finds that prompt's own
"\\n```\\n", and the answer ends with its first token.
"""

from __future__ import annotations

from evalplus import evaluate
from evalplus.provider import hf


class OwnStops(hf.StopSequencer):
    """Forgets the criteria of earlier prompts, which are an attribute of the model before its class's method."""

    def __init__(self, model, *args, **kwargs):
        vars(model).pop("_get_stopping_criteria", None)
        super().__init__(model, *args, **kwargs)


if __name__ == "__main__":
    hf.StopSequencer = OwnStops
    evaluate.main()
