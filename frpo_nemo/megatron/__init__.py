"""Run the policy on megatron-core."""

import logging
import sys
from importlib.abc import MetaPathFinder

from frpo_nemo.stack import hide_unusable_transformer_engine


class _BeforeMegatronCore(MetaPathFinder):
    """Hide a Transformer Engine that cannot be used when megatron-core is about to be imported. Only torch can determine
    that; modules that only describe models and checkpoints don't import it."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "megatron.core":
            sys.meta_path.remove(self)
            hide_unusable_transformer_engine()
        return None


sys.meta_path.insert(0, _BeforeMegatronCore())
# These warn in every process that GPTModel gets no new features, and that DDP computes a layout that it could have been given.
for _module in ("models.gpt.gpt_model", "distributed.distributed_data_parallel"):
    logging.getLogger(f"megatron.core.{_module}").setLevel(logging.ERROR)
