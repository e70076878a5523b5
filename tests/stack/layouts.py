"""How the policy is spread and computed in the checks of Transformer Engine's layers: settings of a ModelConfig."""

_TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
_PP2 = dict(pipeline_model_parallel_size=2)

LAYOUTS = {
    "TP1": {},
    "TP2": _TP2,
    "TP2 without sequence parallelism": dict(tensor_model_parallel_size=2),
    "PP2": _PP2,
    "TP2 x PP2": _TP2 | _PP2,
    "TP2 x CP2": _TP2 | dict(context_parallel_size=2),
    "FP8, delayed": _TP2 | dict(fp8="hybrid", fp8_recipe="delayed"),
    "FP8, blockwise": _TP2 | dict(fp8="e4m3", fp8_recipe="blockwise"),
}
_EP2 = dict(expert_model_parallel_size=2)
EXPERT_LAYOUTS = {"EP2": _EP2, "TP2 x EP2": _TP2 | _EP2, "PP2 x EP2": _PP2 | _EP2, "TP2, experts not shared": _TP2}
LORA_RANK = 8
