"""Run training, apart from its algorithm: processes, run directory, steps, records, checkpoints, signals.

run_dir/config.yaml       resolved configuration        run_dir/environment.jsonl  each start: command, versions, commit
run_dir/metrics.jsonl     metrics of every step         run_dir/checkpoints/       to continue from
run_dir/hf/               the trained model in Hugging Face format (at the end); adapter/: only the adapters, for PEFT
run_dir/masked/           tokens that the loss leaves out (masked.py)
run_dir/experts.jsonl     the share of (token, expert) pairs that each expert of a mixture got in each step
"""

from __future__ import annotations

import gc
import json
import logging
import math
import signal
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from frpo_nemo import redact, stack
from frpo_nemo.config.hub import local_model
from frpo_nemo.config.options import FRPORun, SFTRun
from frpo_nemo.data.prompts import PromptSet
from frpo_nemo.data.sft import SFTSet
from frpo_nemo.data.sources import forget_files
from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.actor import NonFiniteLoss, PolicyActor
from frpo_nemo.megatron.checkpoint import files as checkpoint_files
from frpo_nemo.megatron.checkpoint import save_load
from frpo_nemo.megatron.weights.export import save_adapter, save_hf
from frpo_nemo.planning.cluster import peak_flops
from frpo_nemo.planning.memory import active_parameters
from frpo_nemo.processes import world
from frpo_nemo.processes.phases import PhaseTimer
from frpo_nemo.processes.watchdog import Watchdog
from frpo_nemo.training import start_record
from frpo_nemo.training.checks.data import describe_data
from frpo_nemo.training.checks.resources import describe_plan
from frpo_nemo.training.checks.resume import check_same_data, describe_weight_decay, source_digests
from frpo_nemo.training.logging import JsonLines, MetricsLogger

Config = TypeVar("Config", FRPORun, SFTRun)


class Run(Generic[Config]):
    """Context manager around one training job. Use: attach the actor, then `for step in run.steps(): ...; run.record()`.

    A step is numbered from 1; `record` logs it, and saves when that is due.
    """

    def __init__(self, cfg: Config):
        ignore_warnings_of_libraries()
        self.cfg: Config = cfg
        self.dir = Path(cfg.run_dir)
        self._as_given = redact.values(OmegaConf.to_container(OmegaConf.structured(cfg)))
        # cli.py downloads a hub name on one rank of a node. The others wait here, as long as it takes, and not in the
        # rendezvous, which has a time limit.
        cfg.model.path = local_model(cfg.model.path, download=True)
        self.rank, self.world_size = world.start_world()
        self.watchdog = Watchdog(self.rank, self.world_size, self.dir, phase_timeout=cfg.trainer.phase_timeout)
        self.phases = PhaseTimer(self.watchdog)
        self.step = 0
        self.objective_state: dict[str, float] = {}  # values that the objective keeps from step to step
        self.measured: dict[str, float] = {}  # values of the model at the run's first step, kept for all later starts
        self._validated: tuple[int, float] | None = None  # (step, score) of the last validation
        self._stop_signal: int | None = None
        self._actor: PolicyActor | None = None
        self.logger: MetricsLogger | None = None
        self._shares: JsonLines | None = None  # of a mixture's experts
        self._resumed_from: Path | None = None
        self.moment: datetime | None = None  # time on chat templates' clock, also after a restart
        self._saved_step: int | None = None

    def __enter__(self) -> Run:
        self.watchdog.__enter__()
        if self.rank == 0:
            plan, decay = describe_plan(self.cfg, self.world_size), describe_weight_decay(self.cfg)
            self.say("\n".join([*stack.untested_versions(), plan, *describe_data(), decay]))
        self._resumed_from = self._checkpoint_to_resume()
        self.moment = datetime.fromisoformat(broadcast(self._moment()))
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._note_signal)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with ExitStack() as leaving:
            if kind is None:
                leaving.push(self.watchdog)
            else:  # report the failure first: closing the logs may fail as well, or wait for a network
                self.watchdog.__exit__(kind, error, traceback)
            for log in (self._shares, self.logger):
                if log is not None:
                    leaving.callback(log.close)
            if kind is None and dist.is_initialized():  # vLLM's shutdown destroys the process group as well
                dist.destroy_process_group()

    def attach(self, actor: PolicyActor, **sets: PromptSet | SFTSet | None) -> None:
        """Give the run its actor, and load the checkpoint to resume from. sets: the run's data sets, which must be those with
        which the checkpoint was made."""
        forget_files()
        self._actor = actor
        present = {name: examples for name, examples in sets.items() if examples}
        data = self._data = {name: examples.fingerprint for name, examples in present.items()}
        for name, examples in present.items():
            if examples.dropped:
                self.say(f"data {name}: {examples.dropped} rows too long or without an answer are left out")
        if any(other != data for other in world.gather_objects(data)):
            raise ConfigError("The ranks read different data: each node must see the same files under data.")
        if self._resumed_from is not None:
            with self.phases("load"):
                state = save_load.load(self._resumed_from, actor)
            check_same_data(self._resumed_from, state, data)
            self.step = self._saved_step = state["step"]
            self.objective_state = state["memory"]
            self.measured |= state.get("measured", {})  # absent in checkpoints of older versions
            self.say(f"resumed from {self._resumed_from} after step {self.step}")
        gc.freeze()  # loaded objects stay, and are not searched again
        gc.enable()
        if self.rank == 0:
            self._write_description()
        resume_step = None if self._resumed_from is None else self.step
        self.logger = MetricsLogger(
            self.dir,
            max_steps=self.cfg.trainer.max_steps,
            tensorboard=self.cfg.logging.tensorboard,
            wandb_project=self.cfg.logging.wandb_project,
            wandb_name=self.cfg.logging.wandb_name,
            config=self._as_given,
            enabled=self.rank == 0,
            resume_step=resume_step,
        )
        if self.rank == 0 and actor.arch.experts:
            self._shares = JsonLines(self.dir / "experts.jsonl", resume_step)

    def steps(self) -> Iterator[int]:
        """Yield the step numbers that remain. Ends early, after a checkpoint, when a signal asks for it."""
        self.phases.pop()
        while self.step < self.cfg.trainer.max_steps:
            if self._someone_was_signalled():
                if self.step and self._saved_step != self.step:
                    self.save()
                command = start_record.resume_command(self.cfg.checkpoint.resume)
                self.say(f"stopped by a signal after step {self.step}; to continue: {command}")
                break
            self.phases.step = self.step + 1
            yield self.step + 1

    @property
    def finished(self) -> bool:
        """Return whether all steps are done; a signal may end a run before."""
        return self.step >= self.cfg.trainer.max_steps

    def record(self, step: int, values: dict[str, float], batch_tokens: int) -> None:
        """Log a finished step, and save when due. batch_tokens: prompt and response tokens of the global batch."""
        self.step = step
        seconds = self.phases.pop()
        speed = {"tokens_per_second": batch_tokens / seconds["seconds/step"]}
        gpu = self._gpu_use(batch_tokens, seconds["seconds/train"])
        self.logger.log(step, values | seconds | speed | gpu | self._expert_load(step))
        interval = self.cfg.trainer.save_interval
        if step == self.cfg.trainer.max_steps or (interval and step % interval == 0) or self._is_new_best():
            self.save()

    def record_validation(self, step: int, values: dict[str, float], *, score: float) -> None:
        """Log a validation of the weights after `step`; the checkpoint with the highest score is kept."""
        self.logger.log(step, values, kind="validation")
        self._validated = (step, score)

    def record_probe(self, step: int, values: dict[str, float]) -> None:
        """Log a probe of the weights after `step`."""
        self.logger.log(step, values, kind="probe")

    def validation_due(self, step: int) -> bool:
        """Return whether to validate: before the first step (0), every val_interval steps, and after the last."""
        interval = self.cfg.trainer.val_interval
        return bool(interval) and (step % interval == 0 or step == self.cfg.trainer.max_steps)

    def save(self) -> None:
        """Write a checkpoint of the current step and delete those that need not be kept."""
        keep = self.cfg.checkpoint
        with self.phases("checkpoint"):
            state = {"data": self._data, "memory": self.objective_state, "measured": self.measured}
            state["moment"] = self.moment.isoformat()
            seed, score = self.cfg.trainer.seed, self._score_now()
            save_load.save(self.dir, self._actor, state, step=self.step, seed=seed, score=score)
            if self.rank == 0:
                checkpoint_files.prune(self.dir, keep.keep_last, keep.keep_best)
        self._saved_step = self.step

    def _score_now(self) -> float | None:
        return self._validated[1] if self._validated and self._validated[0] == self.step else None

    def _is_new_best(self) -> bool:
        score = self._score_now()
        if not self.cfg.checkpoint.keep_best or score is None or not math.isfinite(score):
            return False
        best = checkpoint_files.best(self.dir) if self.rank == 0 else None
        best_score = broadcast(checkpoint_files.read(best)["score"] if best else None)
        return best_score is None or score > best_score

    def export(self) -> Path:
        """Write the trained model to run_dir/hf, and adapters also separately to run_dir/adapter."""
        actor, model, named = self._actor, self.cfg.model, self._as_given["model"]["path"]
        with self.phases("export"):
            out = self.dir / "hf"
            save_hf(actor.gpt, actor.arch, model.path, out)
            if model.lora.rank:
                save_adapter(actor.gpt, actor.arch, model.lora, self.dir / "adapter", base=named)
        self.say(f"model exported to {out}")
        return out

    def save_offenders(self, step: int, batch, error: NonFiniteLoss) -> Path:
        """Keep the sequences behind a non-finite loss for inspection: run_dir/nonfinite/step_N.jsonl."""
        path = self.dir / "nonfinite" / f"step_{step}.jsonl"
        if self.rank == 0:
            path.parent.mkdir(exist_ok=True)
            indices = error.sequences or range(batch.num_sequences)
            with path.open("w") as file:
                for index, (prompt, response) in zip(indices, batch.select(list(indices)).unpack(), strict=True):
                    columns = {name: column[index].item() for name, column in batch.columns.items()}
                    file.write(json.dumps({"index": index, "prompt": prompt, "response": response, **columns}) + "\n")
        dist.barrier()  # the others must not end the job while rank 0 writes
        return path

    def say(self, text: str) -> None:
        """Print one line on the console, from rank 0."""
        if self.rank == 0:
            print(text, flush=True)

    def _checkpoint_to_resume(self) -> Path | None:
        """Return the newest checkpoint of this run_dir; for a new run, the one that the configuration names."""
        resume = self.cfg.checkpoint.resume
        own = broadcast(checkpoint_files.newest(self.dir) if self.rank == 0 else None)
        return own or (None if resume in ("auto", "never") else Path(resume))

    def _moment(self) -> str:
        """Return when the run began, by the checkpoint or, for one of an older version, by the record of starts. With it, a
        template that writes the date gives the same prompts as at the run's beginning."""
        if self._resumed_from is None:
            return datetime.now().isoformat()
        saved = checkpoint_files.read(self._resumed_from)["state"].get("moment")
        return saved or start_record.began(self.dir) or datetime.now().isoformat()

    def _note_signal(self, number: int, frame) -> None:
        self._stop_signal = number

    def _someone_was_signalled(self) -> bool:
        flag = torch.tensor(float(self._stop_signal is not None), device=world.device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _expert_load(self, step: int) -> dict[str, float]:
        """Return statistics of a mixture's experts in this step, and write the share of each to experts.jsonl."""
        load = self._actor.take_expert_load()
        if load is None:
            return {}
        if self._shares:
            self._shares.log(step, {"shares": [[round(share, 5) for share in layer] for layer in load.shares.tolist()]})
        return {
            "experts/imbalance": load.imbalance,
            "experts/most_loaded": load.shares.max().item() * load.shares.shape[1],
            "experts/unused": (load.shares == 0).double().mean().item(),
        }

    def _gpu_use(self, tokens: int, seconds: float) -> dict[str, float]:
        """Return peak memory, and the model FLOP/s of training as a share of the GPUs' bf16 peak: 6 FLOP per parameter and
        token, or 4 for frozen weights, which have no gradient."""
        if not torch.cuda.is_available():
            return {}
        values = {"memory/peak_gib": torch.cuda.max_memory_allocated() / 2**30}
        peak = peak_flops(torch.cuda.get_device_name())
        if peak:
            flops = 4 if self.cfg.model.lora.rank else 6
            values["mfu"] = flops * active_parameters(self._actor.arch) * tokens / (seconds * peak * self.world_size)
        return values

    def _write_description(self) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        saved, steps = self.dir / "config.yaml", self.cfg.trainer.max_steps
        before = OmegaConf.load(saved).trainer.max_steps if self.step and saved.is_file() else steps
        if before != steps:
            self.say(
                f"trainer.max_steps={steps} (was {before}): warm-up and schedule of optim.lr follow the new value from here"
            )
        start_record.write_config(self.dir, self._as_given)
        start_record.add_start(
            self.dir,
            model=self.cfg.model.path,
            world_size=self.world_size,
            data=self._data,
            moment=self.moment.isoformat(),
            resume=self.cfg.checkpoint.resume,
            resumed_from=self._resumed_from,
            files=source_digests(self.cfg),
        )


def ignore_warnings_of_libraries() -> None:
    """Ignore warnings about the libraries' own code (deprecated calls, unfused kernels), once per rank and call site."""
    for module in (r"torch\.", r"megatron\.", r"vllm\.", r"frpo_nemo\.megatron\.cpu"):
        warnings.filterwarnings("ignore", module=module)
    logging.getLogger("megatron").setLevel(logging.WARNING)


def broadcast(value):
    """Return rank 0's picklable `value` on every rank: another rank's view of a shared file system may lag behind."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
