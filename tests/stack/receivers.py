"""What our sources do not show: of which class the objects of the GPU stack are that they use. See calls.py."""

_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer()"
_CHAIN = "megatron.core.optimizer.optimizer.ChainedOptimizer()"
_GPT = "megatron.core.models.gpt.GPTModel()"
_CONFIG = "megatron.core.transformer.transformer_config.TransformerConfig()"
_GROUP = "torch.distributed.ProcessGroup()"
_LAYER = "megatron.core.transformer.transformer_layer.TransformerLayerSubmodules()"
_ATTENTION = "megatron.core.transformer.attention.SelfAttentionSubmodules()"
_MLP = "megatron.core.transformer.mlp.MLPSubmodules()"
_SHARD = "megatron.core.dist_checkpointing.mapping.ShardedTensor()"
_TRACKER = "megatron.core.tensor_parallel.random.CudaRNGStatesTracker()"
_VLLM_MODELS = [
    f"vllm.model_executor.models.{module}.{name}ForCausalLM()"
    for module, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
]

# file -> expression in it -> what it may be; nothing: it is ours, or of no interest
RECEIVERS: dict[str, dict[str, list[str]]] = {
    "acceptance/checks/engine.py": {
        "_colocated(context).engine._llm.llm_engine": ["vllm.v1.engine.llm_engine.LLMEngine()"],
        "_colocated(context).engine._llm.llm_engine.vllm_config": ["vllm.config.VllmConfig()"],
        "config": ["vllm.config.CompilationConfig()"],
        "output": ["vllm.outputs.RequestOutput()"],
        "response": ["vllm.outputs.CompletionOutput()"],
    },
    "acceptance/policy.py": {"actor.gpt": [_GPT], "part.optimizer": ["torch.optim.Optimizer()"]},
    "frpo_nemo/megatron/actor.py": {
        "self.gpt": [_GPT],
        "self.gpt.config": [_CONFIG],
        "self.optimizer": [_OPTIMIZER, _CHAIN],
    },
    "frpo_nemo/megatron/checkpoint/save_load.py": {"actor.gpt": [_GPT], "error.failures": ["builtins.dict()"]},
    "frpo_nemo/megatron/layers.py": {
        "layer": [_LAYER],
        "layer.self_attention.submodules": [_ATTENTION],
        "attention": [_ATTENTION],
    },
    "frpo_nemo/megatron/lora.py": {
        "gpt": [_GPT],
        "gpt.config": [_CONFIG],
        "gpt.embedding": ["torch.nn.Module()"],
        "gpt.lora_rank": [],
        "config": [_CONFIG],
    },
    "frpo_nemo/megatron/model.py": {
        "layer": [_LAYER],
        "layer.self_attention.submodules": [_ATTENTION],
        "layer.mlp.keywords": [],
        "mlp": [_MLP],
    },
    "frpo_nemo/megatron/optimizer.py": {"optimizer": [_OPTIMIZER, _CHAIN], "part": [_OPTIMIZER]},
    "frpo_nemo/megatron/checkpoint/optimizer_state.py": {
        "part": [_OPTIMIZER],
        "part.init_state_fn": ["megatron.core.optimizer:init_state_fn"],
        "part.optimizer.state": ["builtins.dict()"],
        "part.data_parallel_group": [_GROUP],
        "group": [_GROUP],
        "template": [_SHARD],
        "template.data": [],
    },
    "frpo_nemo/rollout/engine.py": {
        "self._llm": ["vllm.LLM()"],
        "self._llm.llm_engine.engine_core": ["vllm.v1.engine.core_client.InprocClient()"],
        "self._llm.model_config": ["vllm.config.ModelConfig()"],
        "output": ["vllm.outputs.RequestOutput()"],
        "response": ["vllm.outputs.CompletionOutput()"],
        "response.logprobs": ["vllm.logprobs.FlatLogprobs()"],
    },
    "frpo_nemo/rollout/refit_check.py": {
        "self._model": _VLLM_MODELS,
        "model": _VLLM_MODELS,
        "fused_names": ["builtins.dict()"],
        "indices": ["vllm.model_executor.layers.vocab_parallel_embedding.VocabParallelEmbeddingShardIndices()"],
    },
}

# What the methods of workers are that vLLM's collective_rpc calls.
WORKERS = ["vllm.v1.worker.gpu_worker.Worker()"]

# function -> what it returns, where something is done with that
RESULTS: dict[str, list[str]] = {
    f"{_GPT}.sharded_state_dict": ["builtins.dict()"],
    "megatron.core.models.gpt.gpt_layer_specs.get_gpt_layer_local_spec": [
        "megatron.core.transformer.spec_utils.ModuleSpec()"
    ],
    "megatron.core.parallel_state.get_model_parallel_group": [_GROUP],
    "megatron.core.pipeline_parallel.get_forward_backward_func": [
        "megatron.core.pipeline_parallel.schedules.forward_backward_no_pipelining",
        "megatron.core.pipeline_parallel.schedules.forward_backward_pipelining_without_interleaving",
    ],
    "megatron.core.tensor_parallel.get_cuda_rng_tracker": [_TRACKER],
    f"{_TRACKER}.get_states": ["builtins.dict()"],
    "torch.cuda.get_device_properties": ["torch._C._CudaDeviceProperties()"],
    "torch.distributed.checkpoint.FileSystemReader().read_data": ["torch.futures.Future()"],
    "vllm.distributed.device_communicators.cpu_communicator._CPUSHMDistributed.make_group_name": ["builtins.str()"],
}

# callable -> what receives the keywords that it does not name itself
FORWARDED: dict[str, list[str]] = {
    "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlanner": [
        "torch.distributed.checkpoint.DefaultSavePlanner"
    ],
    "torch.distributed.rendezvous": ["torch.distributed.rendezvous:_env_rendezvous_handler"],
    "vllm.LLM": ["vllm.EngineArgs"],
    "vllm.v1.worker.gpu_worker.Worker().reload_weights": [
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner().reload_weights",
        "vllm.v1.worker.gpu.model_runner.GPUModelRunner().reload_weights",
    ],
}

# (file, callable) -> (module of the stack, expression in it that is called with the keywords we pass on with **)
PASSED_ON: dict[tuple[str, str], tuple[str, str]] = {
    ("frpo_nemo/megatron/actor.py", "megatron.core.distributed.finalize_model_grads"): (
        "megatron.core.pipeline_parallel.schedules",
        "config.finalize_model_grads_func",
    ),
}
