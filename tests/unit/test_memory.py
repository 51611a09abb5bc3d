"""The memory estimate: exact counts from file headers, less where a setting shards or drops something, advice that really helps."""

import re

import pytest
from training import tiny_base

from tdro_ray.config import LoraSettings, ModelSettings, ScaleSettings, TrainSettings
from tdro_ray.errors import ResourceError
from tdro_ray.train.memory import ModelShape, check_memory, estimate, read_shape

QWEN_7B = ModelShape(7_070_000_000, 7_070_000_000, 233_000_000, 28, 3584, 18944)
BF16 = ModelSettings(dtype="bfloat16")
GPUS = ScaleSettings(num_workers=8, use_gpu=True)


def total(backend="ddp", model=BF16, budget=16384, num_workers=8, offload="none"):
    scale = ScaleSettings(backend=backend, num_workers=num_workers, use_gpu=True, offload=offload)
    return sum(estimate(QWEN_7B, model, TrainSettings(token_budget=budget), scale).values())


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4), LoraSettings(r=4, targets=("q_proj", "down_proj"))])
def test_the_shape_is_that_of_the_loaded_model(tmp_path, lora):
    from tdro_ray.model.encoder import load_retriever
    from tdro_ray.train.fsdp import transformer_blocks
    from tdro_ray.train.prepare import trainable

    base = tiny_base(tmp_path)
    module = load_retriever(base)
    blocks = transformer_blocks(module)
    block = sum(p.numel() for p in blocks[0].parameters())
    parameters = sum(p.numel() for p in module.parameters())
    module = trainable(module, ModelSettings(lora=lora))
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert read_shape(base, lora) == ModelShape(parameters, trained, block, len(blocks), 16, 24)


def test_a_folder_that_does_not_tell_has_no_shape(tmp_path):
    assert read_shape(tmp_path, None) is None
    (tmp_path / "config.json").write_text('{"model_type": "odd"}')
    assert read_shape(tmp_path, None) is None


def test_sharding_checkpointing_and_smaller_chunks_need_less():
    assert total("ddp") > total("zero1") > total("zero2")
    assert total("fsdp") < total("ddp") and total("zero3", offload="optimizer") < total("zero3")
    assert total(model=BF16.model_copy(update={"gradient_checkpointing": True})) < total()
    assert total(budget=4096) < total()
    assert total("fsdp", num_workers=16) < total("fsdp", num_workers=8)


def test_weights_and_moments_of_full_training_are_the_known_sums():
    parts = estimate(QWEN_7B, BF16, TrainSettings(), GPUS)
    assert parts["weights"] == (2 + 4) * QWEN_7B.parameters  # as computed with, and as stepped
    assert parts["optimiser"] == 2 * 4 * QWEN_7B.parameters
    zero = estimate(QWEN_7B, BF16, TrainSettings(), GPUS.model_copy(update={"backend": "zero1"}))
    assert zero["optimiser"] == QWEN_7B.parameters * 8 / 8


def test_what_fits_passes_and_what_does_not_names_settings_that_help():
    check_memory(QWEN_7B, BF16, TrainSettings(), GPUS, 1e12)
    with pytest.raises(ResourceError, match=r"needs about \d+ GB per GPU .*; 60 available: set ") as error:
        check_memory(QWEN_7B, BF16.model_copy(update={"gradient_checkpointing": True}), TrainSettings(), GPUS, 60e9)
    text = str(error.value)
    assert "model.lora={r: 16}" in text and "gradient_checkpointing" not in text and "dtype" not in text
    offered = dict(re.findall(r"(scale\.backend=\w+|model\.lora=\{r: 16\}) \((\d+) GB\)", text))
    assert offered and all(int(size) <= 60 for size in offered.values())


def test_advice_says_so_where_no_single_setting_is_enough():
    with pytest.raises(ResourceError, match="no single setting is enough, together"):
        check_memory(QWEN_7B, BF16, TrainSettings(), GPUS, 8e9)


def test_one_worker_is_not_told_to_shard():
    alone = ScaleSettings(num_workers=1, use_gpu=True)
    with pytest.raises(ResourceError) as error:
        check_memory(QWEN_7B, BF16, TrainSettings(), alone, 80e9)
    assert "scale.backend" not in str(error.value)


def test_an_elastic_run_is_measured_with_its_fewest_workers():
    assert total("fsdp", num_workers=(8, 16)) == total("fsdp", num_workers=8)
    assert total("zero3", num_workers=0) == total("zero3", num_workers=1)
