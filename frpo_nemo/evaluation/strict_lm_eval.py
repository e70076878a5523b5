"""lm-eval's command line, made to end where lm-eval only warns that the model sees part of its prompt.

    python -m frpo_nemo.evaluation.strict_lm_eval run --model hf ...

A prompt that doesn't fit into the context loses its beginning, and one whose chat template refuses a system message loses
the instruction; both would be scored. The longest prompts come first, so the program ends before the first answer.
"""

from __future__ import annotations

import logging
import os
import re

_LEFT_OUT = re.compile(r"truncating|removing the system role", re.IGNORECASE)


class EndAtWarning(logging.Handler):
    """Raises SystemExit for a warning of lm-eval that part of a prompt is left out."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno < logging.WARNING or not _LEFT_OUT.search(message):
            return
        if "system" in message:
            raise SystemExit(
                "The chat template of this model refuses a system message, and lm-eval would leave the instruction out; give "
                "the model a chat template that shows it."
            )
        raise SystemExit(
            f"A prompt and its answer do not fit into the context, and lm-eval would leave out the prompt's beginning "
            f"({message.rstrip('.')}); lower max_gen_tokens, or raise max_model_len if the model can take more."
        )


def main() -> None:
    os.environ["LMEVAL_LOG_LEVEL"] = "INFO"  # a higher level would hide the warnings
    from lm_eval.__main__ import cli_evaluate

    logging.getLogger("lm_eval").addHandler(EndAtWarning())
    cli_evaluate()


if __name__ == "__main__":
    main()
