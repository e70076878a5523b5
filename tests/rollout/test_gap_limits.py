"""The limits of the log-prob gap against the rounding of products that this machine cannot compute: TF32 and FP8,
emulated in transformers' models. A limit must let rounding pass and stop a lost layer."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny_models import make_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from frpo_nemo.rollout.refit_check import GapLimit

SHAPES = [("llama", 4), ("llama", 12), ("qwen3", 4), ("qwen3", 12)]


def to_tf32(x: Tensor) -> Tensor:
    """Round to ten bits of mantissa, as tensor cores read fp32."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def to_e4m3(x: Tensor) -> Tensor:
    """FP8 with one scale for the whole tensor, as the recipe `tensorwise` has it."""
    scale = x.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


class Models:
    """One random model in several precisions, and the log-probs of the same tokens under each."""

    def __init__(self, directory, family: str, layers: int):
        self.directory, self.layers = make_tiny(directory, family, layers=layers), layers
        self.tokens = torch.randint(0, 131, (8, 128), generator=torch.Generator().manual_seed(0))
        self.fp32, self.bf16 = self.logprobs(torch.float32), self.logprobs(torch.bfloat16)

    def logprobs(self, dtype: torch.dtype, rounding: Callable | None = None, lost: str | None = None) -> Tensor:
        """rounding: of both factors of the layers' products. lost: a weight of the middle layer that is zero."""
        model = AutoModelForCausalLM.from_pretrained(self.directory, dtype=dtype)
        if lost:
            model.get_parameter(f"model.layers.{self.layers // 2}.{lost}.weight").data.zero_()
        for name, layer in model.named_modules():
            if rounding and isinstance(layer, torch.nn.Linear) and name != "lm_head":
                layer.register_forward_hook(_with_rounding(rounding))
        with torch.no_grad():
            logprobs = model(self.tokens).logits[:, :-1].float().log_softmax(-1)
        return logprobs.gather(-1, self.tokens[:, 1:, None])


def _with_rounding(rounding: Callable) -> Callable:
    def product(layer, inputs, output):
        bias = None if layer.bias is None else layer.bias.float()
        return F.linear(rounding(inputs[0].float()), rounding(layer.weight.float()), bias).to(output.dtype)

    return product


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}")
def models(request, tmp_path_factory) -> Models:
    return Models(tmp_path_factory.mktemp("gap"), *request.param)


def statistic(limit: GapLimit, gap: Tensor) -> float:
    """Return what `limit` bounds."""
    return (gap.abs().max() if limit.statistic == "max" else gap.abs().mean()).item()


def test_products_in_tf32_would_stop_an_fp32_run(models):
    """This is why fp32 uses the local layers, and not Transformer Engine's, which multiply in TF32."""
    limit = GapLimit.of("fp32", None)
    assert statistic(limit, models.logprobs(torch.float32, to_tf32) - models.fp32) > 10 * limit.value


def test_bf16_passes_and_products_in_fp8_do_not(models):
    """Neither at first nor once the run has measured what bf16 does to its model."""
    rounding = models.bf16 - models.fp32
    first, later = GapLimit.of("bf16", None), GapLimit.of("bf16", rounding.abs().mean().item())
    assert statistic(first, rounding) < 0.5 * later.value
    fp8 = models.logprobs(torch.bfloat16, to_e4m3) - models.bf16
    assert statistic(first, fp8) > first.value and statistic(later, fp8) > later.value


def test_fp8_has_a_limit_that_lets_its_rounding_pass(models):
    limit = GapLimit.of("fp8", None)
    assert statistic(limit, models.logprobs(torch.bfloat16, to_e4m3) - models.bf16) < limit.value


@pytest.mark.parametrize("lost", ["mlp.down_proj", "self_attn.o_proj"])
def test_a_lost_layer_is_above_the_limit_of_fp8(models, lost):
    policy, engine = models.logprobs(torch.bfloat16, to_e4m3), models.logprobs(torch.bfloat16, lost=lost)
    limit = GapLimit.of("fp8", (policy - models.bf16).abs().mean().item())
    assert statistic(limit, policy - engine) > limit.value
