"""Training on a GPU by equality with the CPU, in bfloat16's tolerance. Needs no Ray and no Lance."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from training import TASKS, global_batch

from tdro_ray.config import ModelSettings, TrainSettings
from tdro_ray.model import packed
from tdro_ray.model.encoder import Retriever, to_packed, to_tensors
from tdro_ray.train.backends import Replicated
from tdro_ray.train.prepare import speed_up
from tdro_ray.train.step import contrastive_step
from tdro_ray.types import RetrieverSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine"),
]
GPU = torch.device("cuda")


def model(dtype):
    from transformers import Qwen2Config, Qwen2Model

    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=50, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return Retriever(Qwen2Model(config).to(dtype), RetrieverSpec(pooling="mean"))


def test_packed_vectors_of_the_kernel_are_the_padded_float32_ones():
    rng = np.random.default_rng(0)
    length_S = np.array([5, 1, 120, 77], np.int64)
    flat, offset_S, chunk = rng.integers(2, 50, 203).astype(np.int32), np.cumsum(length_S) - length_S, np.arange(4)
    exact, fast = model(torch.float32).eval(), model(torch.bfloat16).to(GPU).eval()
    assert packed.pack(fast.backbone) == ""
    fast.packed = True
    with torch.no_grad():
        expected_BD = exact(*to_tensors(flat, offset_S, length_S, chunk, 0, torch.device("cpu")))
        found_BD = fast(*to_packed(flat, offset_S, length_S, chunk, GPU)).cpu()
    assert float((expected_BD * found_BD).sum(1).min()) > 0.999


@pytest.mark.parametrize("budget", [40, 100_000])
def test_a_packed_bfloat16_step_follows_the_float32_gradient(budget):
    batch = replace(global_batch(9, 3, 0))
    gradients = []
    for device, dtype in ((torch.device("cpu"), torch.float32), (GPU, torch.bfloat16)):
        settings = TrainSettings(temperature=0.2, token_budget=budget)
        retriever = speed_up(model(dtype).train().to(device), ModelSettings(), "ddp", device)
        assert retriever.packed is (device.type == "cuda")
        backend = Replicated(retriever, settings, None, device)
        contrastive_step(backend, batch, settings, TASKS, 0, device)
        gradients.append(
            torch.cat([p.grad.float().cpu().flatten() for p in backend.trained.values() if p.grad is not None])
        )
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.99
