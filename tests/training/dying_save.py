"""A recipe whose ranks are killed (SIGKILL, each by itself) in the middle of writing the checkpoint of one step:

python dying_save.py STEP recipes/frpo.py OVERRIDES...
"""

import os
import runpy
import signal
import sys

from torch.distributed.checkpoint import filesystem

from frpo_nemo.megatron.checkpoint import save_load

PART = 5  # tensors that each rank still writes

if __name__ == "__main__":
    _, last_step, recipe, *overrides = sys.argv
    save, write_item = save_load.save, filesystem._write_item
    written = []

    def save_or_die(*args, step, **kwargs):
        if step == int(last_step):
            filesystem._write_item = write_or_die
        return save(*args, step=step, **kwargs)

    def write_or_die(*args, **kwargs):
        written.append(1)
        if len(written) > PART:
            os.kill(os.getpid(), signal.SIGKILL)
        return write_item(*args, **kwargs)

    save_load.save = save_or_die
    sys.argv = [recipe, *overrides]
    runpy.run_path(recipe, run_name="__main__")
