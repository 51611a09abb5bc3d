"""`benchmarks/gpu_mfu.py` needs torch, transformers, peft and numpy only, and counts work as torch does."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks are scripts, not part of the package

from benchmarks import gpu_mfu  # noqa: E402

BLOCKED = ("ray", "lance", "pyarrow", "faiss", "scipy", "matplotlib", "deepspeed", "pandas", "rich", "bm25s")


def test_the_tiny_shape_runs_where_only_torch_transformers_peft_and_numpy_are(tmp_path):
    out = tmp_path / "mfu.json"
    code = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
import peft
from benchmarks import gpu_mfu
gpu_mfu.main(["--tiny", "--out", {str(out)!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "No GPU: these figures mean nothing" in done.stdout and "ratio to padded" in done.stdout
    found = json.loads(out.read_text())
    two, one, first = found["two_passes"], found["single_pass"], found["stage1"]
    assert (two["single_pass"], one["single_pass"]) == (False, True)
    assert two["share_of_peak"] == pytest.approx(4 / 3 * two["mfu"]) and one["share_of_peak"] == one["mfu"] > 0
    assert len(two["step_s"]) == len(first["with_scores_s"]) == found["shape"]["steps"]
    assert len(found["packed"]["one_s"]) == len(found["packed"]["other_s"]) == 2 * found["shape"]["steps"]
    assert two["packed"] is False and two["padded_per_token"] > 1  # a CPU pads unless it is told to pack
    assert list(found["peak_memory_mb"]) == ["4", "8", "16"]
    assert found["official"]["hours_of_1000_steps"] == pytest.approx(found["official"]["step_s"] * 1000 / 3600)


def test_the_operations_are_those_that_torch_counts(tmp_path):
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModel

    shape = gpu_mfu.TINY
    weights = gpu_mfu.write_model(shape, tmp_path, "float32")
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(3, 16, dtype=torch.int64))
    ours, without = (gpu_mfu.forward_flops(shape, weights, np.full(3, n)) for n in (16, 0))
    assert without == 0
    attention = 3 * 2 * shape.layers * shape.hidden * 16**2  # torch counts both halves of the causal square
    rotary = 3 * 16 * shape.hidden // shape.heads  # its angles are an outer product, counted too
    assert counter.get_total_flops() == pytest.approx(ours + attention, abs=2 * rotary)


def test_a_gpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--tiny"):
        gpu_mfu.main([])
