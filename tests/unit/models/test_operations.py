"""Operations of a model, beside what is known of its shapes."""

import pytest
import torch
from torch import nn

from areal_ray.config import ModelConfig, OptimConfig, ParameterGroupConfig
from areal_ray.distributed.peak import peak_bytes, peak_tflops
from areal_ray.engine.optim import freeze
from areal_ray.models import build_model
from areal_ray.models.operations import operations_per_token

pytestmark = pytest.mark.unit

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 50}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}


def model(**values):
    return build_model(ModelConfig(config={**SHAPE, "tie_word_embeddings": True, **values}))


@pytest.mark.parametrize("seq_len", [48, 1024])
def test_a_dense_model_takes_six_a_weight_and_attention(seq_len):
    products = 2 * (4 * 64 * 64 + 3 * 64 * 128) + 64 * 50
    attention = 12 * 2 * 64 * seq_len
    expected = 6 * products + attention
    assert operations_per_token(model(model_type="llama"), seq_len) == pytest.approx(expected, rel=1e-3)


def test_of_experts_those_count_that_a_token_is_sent_to():
    few, many = (
        operations_per_token(model(model_type="mixtral", num_local_experts=count, num_experts_per_tok=2), 256)
        for count in (2, 16)
    )
    dense = operations_per_token(model(model_type="mixtral", num_local_experts=1, num_experts_per_tok=1), 256)
    assert many == pytest.approx(few, rel=0.02)  # but for the router
    assert few - dense == pytest.approx(2 * 6 * 3 * 64 * 128, rel=0.02)


def test_frozen_weights_have_no_gradients():
    frozen = model(model_type="llama", tie_word_embeddings=False)
    freeze(frozen, OptimConfig(groups=[ParameterGroupConfig("model", freeze=True)]).groups)
    whole = operations_per_token(model(model_type="llama", tie_word_embeddings=False), 256)
    assert operations_per_token(frozen, 256) < 0.5 * whole


class Knowing(nn.Module):
    def operations_per_token(self, seq_len):
        return 7 * seq_len


class Asking(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 4)

    def forward(self, input_ids):
        return self.table(input_ids) * float(input_ids.sum())


def test_a_model_may_know_better_and_one_that_cannot_be_run_says_why():
    assert operations_per_token(Knowing(), 3) == 21.0
    with torch.device("meta"):
        asking = Asking()
    with pytest.raises(ValueError, match="meta"):
        operations_per_token(asking, 8)


def test_peaks_are_known_by_the_names_of_usual_devices():
    assert peak_tflops("NVIDIA H100 80GB HBM3") == peak_tflops("NVIDIA H200") == 989.0
    assert peak_tflops("NVIDIA L40S") == 362.0
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "float32") == 19.5
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "float32", tf32=True) == 156.0
    assert peak_tflops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert peak_tflops("a toaster") is None
    assert peak_bytes(torch.device("cpu")) > 1e6
