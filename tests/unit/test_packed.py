"""Packed sequences and compiled blocks train as padded ones do: by equality of vectors, gradients and final weights."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training_loop import batches_for, final_weights, job_of
from test_training_step import BIG, CPU, SMALL, assert_close
from training import TASKS, dropout_model, global_batch, tiny_base

from tdro_ray.config import LoraSettings, ModelSettings, OptimizeSettings, TrainSettings
from tdro_ray.dro.weights import TaskWeights
from tdro_ray.errors import ConfigError
from tdro_ray.model import packed
from tdro_ray.model.encoder import Retriever, to_packed, to_tensors
from tdro_ray.retrieval.chunks import length_chunks, padded_tokens
from tdro_ray.train.backends import Replicated
from tdro_ray.train.context import LocalContext
from tdro_ray.train.loop import train
from tdro_ray.train.prepare import speed_up
from tdro_ray.train.step import contrastive_step, dro_step
from tdro_ray.types import RetrieverSpec


def qwen2(**changes):
    from transformers import Qwen2Config, Qwen2Model

    given = {
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 24, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
    }  # fmt: skip
    return Qwen2Model(Qwen2Config(**given | changes))


def qwen3_wide_heads():
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(
        Qwen3Config(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=24, intermediate_size=24)
    )  # fmt: skip


def llama():
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, intermediate_size=24)
    )  # fmt: skip


def bert(dropout=0.0):
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
            attention_probs_dropout_prob=dropout, hidden_dropout_prob=0.0,
        )
    )  # fmt: skip


MODELS = {
    "qwen2": qwen2,
    "qwen2 sliding window": lambda: qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": qwen3_wide_heads,
    "llama": llama,
    "bert": bert,
}


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_vectors_are_the_padded_ones(name, pooling):
    torch.manual_seed(1)
    retriever = Retriever(MODELS[name]().double(), RetrieverSpec(pooling=pooling)).eval()
    rng = np.random.default_rng(0)
    length_S = np.array([5, 1, 12, 7], np.int64)
    flat, offset_S = rng.integers(2, 50, length_S.sum()).astype(np.int32), np.cumsum(length_S) - length_S
    chunk = np.array([2, 0, 3, 1])
    with torch.no_grad():
        padded_BD = retriever(*to_tensors(flat, offset_S, length_S, chunk, 0, CPU))
        assert packed.pack(retriever.backbone) == ""
        retriever.packed = True
        packed_BD = retriever(*to_packed(flat, offset_S, length_S, chunk, CPU))
    torch.testing.assert_close(packed_BD, padded_BD, rtol=1e-12, atol=1e-12)


def step_of(packing, batch, budget, lora=None):
    """(loss, flat gradient) of a step in float64, packed or padded."""
    from tdro_ray.train.prepare import trainable

    torch.manual_seed(3)
    model = ModelSettings(packing=packing, lora=lora)
    retriever = trainable(Retriever(qwen2().double(), RetrieverSpec(pooling="mean")), model)
    if lora:  # peft's second matrix starts at zero: give the first a gradient
        for name, p in retriever.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    backend = Replicated(speed_up(retriever, model, "ddp", CPU), TrainSettings())
    assert retriever.packed is packing
    if batch.reference_BP is None:
        settings = TrainSettings(temperature=0.2, token_budget=budget)
        result = contrastive_step(backend, batch, settings, TASKS, 0, CPU)
    else:
        settings = OptimizeSettings(temperature=0.2, token_budget=budget, eta=0.5)
        result = dro_step(backend, TaskWeights(3, 0.5), batch, settings, TASKS, 0, CPU)
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in backend.parameters])
    return result.loss, flat


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2, dropout=0.0)])
@pytest.mark.parametrize("budget", [SMALL, BIG])
@pytest.mark.parametrize("task", [0, 2, None])
def test_a_packed_step_has_the_gradient_of_the_padded_one(task, budget, lora):
    batch = global_batch(9, 3, task)
    assert_close(step_of(True, batch, budget, lora), step_of(False, batch, BIG, lora))


def test_a_whole_run_packed_ends_where_the_padded_one_does(tmp_path):
    base = tiny_base(tmp_path / "base")
    ends = []
    for packing in (False, True):
        out = tmp_path / str(packing)
        job = job_of(base, out, dro=False)
        context = LocalContext(batches_for(False), tmp_path / f"c{packing}")
        train(replace(job, model=ModelSettings(packing=packing)), context)
        ends.append(final_weights(context.latest_checkpoint()))
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "backbone, why",
    [
        (lambda: dropout_model(torch.float32, 0.1).backbone, "no dropout"),
        (lambda: bert(0.1), "no dropout"),
        (lambda: qwen2(num_attention_heads=1, num_key_value_heads=1, hidden_size=258), "258 dimensions"),
    ],
)
def test_a_model_that_cannot_pack_is_told_why_or_padded(backbone, why):
    retriever = Retriever(backbone(), RetrieverSpec()).train()
    before = retriever.backbone.config._attn_implementation
    with pytest.raises(ConfigError, match=rf"model\.packing=true.*{why}.*packing=auto"):
        speed_up(retriever, ModelSettings(packing=True), "ddp", CPU)
    assert retriever.backbone.config._attn_implementation == before and retriever.backbone.training
    assert not speed_up(retriever, ModelSettings(packing="auto"), "ddp", CPU).packed  # a CPU has no kernel for it


def test_a_model_whose_sequences_see_each_other_is_found_out(monkeypatch):
    """An attention that ignores where sequences end must not be taken."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    monkeypatch.setattr(
        packed, "attention", lambda *a, cu_seq_lens_q=None, **k: sdpa_attention_forward(*a, is_causal=True, **k)
    )
    assert "see each other" in packed.pack(qwen2())


def test_a_device_without_a_working_kernel_pads(monkeypatch):
    """What a GPU's kernel gives is compared with the plain way; here the CPU stands for a GPU, and for one that errs."""
    config, fake = qwen2().config, type("Device", (), {"type": "cuda"})()
    plain = packed.attention
    assert not packed.has_kernel(config, torch.float32, torch.device("cuda"))
    assert not packed.has_kernel(config, torch.bfloat16, CPU)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, where, to=torch.Tensor.to: self if where is fake else to(self, where)
    )
    monkeypatch.setattr(torch, "tensor", lambda *a, device=None, make=torch.tensor: make(*a))
    assert packed.has_kernel(config, torch.bfloat16, fake)
    calls = []

    def wrong(module, query, key, value, *rest, **given):
        calls.append(1)
        return plain(module, query, key, value if len(calls) == 1 else value.flip(2), *rest, **given)

    monkeypatch.setattr(packed, "attention", wrong)
    assert not packed.has_kernel(config, torch.bfloat16, fake)
    monkeypatch.setattr(packed, "attention", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no kernel image")))
    assert not packed.has_kernel(config, torch.bfloat16, fake)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_packed_chunks_cover_all_sequences_within_the_budget(lengths, budget):
    length_S = np.array(lengths)
    chunks = length_chunks(length_S, budget, packed=True)
    assert sorted(np.concatenate(chunks).tolist()) == list(range(len(lengths)))
    assert all(length_S[c].sum() <= budget or len(c) == 1 for c in chunks)
    assert padded_tokens(length_S, chunks, packed=True) == sum(lengths)
    for first, second in pairwise(chunks):  # none could have been fuller
        assert length_S[first].sum() + length_S[second[0]] > budget


def test_compile_is_refused_with_dropout_and_with_sharded_backends():
    model = ModelSettings(compile=True)
    with pytest.raises(ConfigError, match=r"lora\.dropout=0"):
        speed_up(dropout_model(torch.float32, 0.1), model, "ddp", CPU)
    with pytest.raises(ConfigError, match=r"scale\.backend=ddp, not with fsdp"):
        speed_up(dropout_model(torch.float32, 0.0), model, "fsdp", CPU)


@pytest.mark.long  # the compiler takes most of a minute
@pytest.mark.parametrize("packing", [False, True])
def test_a_compiled_run_ends_where_the_plain_one_does(tmp_path, packing):
    base = tiny_base(tmp_path / "base")
    ends = []
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        job = replace(job_of(base, out, dro=False), model=ModelSettings(packing=packing, compile=compiled))
        context = LocalContext(batches_for(False), tmp_path / f"c{compiled}")
        train(job, context)
        ends.append(final_weights(context.latest_checkpoint()))
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-3, atol=1e-5)
