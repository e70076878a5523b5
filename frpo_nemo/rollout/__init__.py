"""Run the colocated vLLM engine: sampling with log-probs, and refits verified to have arrived."""

from frpo_nemo.rollout.engine import Completion, RolloutEngine
from frpo_nemo.rollout.refit_check import RefitError, check_logprob_gap, logprob_gap, raise_on_all_ranks

__all__ = ["Completion", "RefitError", "RolloutEngine", "check_logprob_gap", "logprob_gap", "raise_on_all_ranks"]
