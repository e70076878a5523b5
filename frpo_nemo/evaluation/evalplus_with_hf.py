"""evalplus's command line with a corrected hf backend, whose answers end at their own stop strings.

    python -m frpo_nemo.evaluation.evalplus_with_hf --model ... --backend=hf

evalplus 0.3.1 attaches the stopping criterion of every prompt to the model and never removes one. A criterion looks for
stop strings after as many tokens as its prompt has. After a longer prompt's first tokens it finds that prompt's own
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
