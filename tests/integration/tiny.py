"""Tiny learnable collections and a recipe for whole runs in seconds; no network."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tdro_ray.data.collection import write_beir
from tdro_ray.types import Passage, RetrievalTest

SYLLABLES = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
RECIPE = """
data: {{sources: [{source}], dev_queries: 8, dev_corpus: 30}}
mine: {{num_negatives: 3}}
model:
  pooling: mean
  instructions: false
  query_length: 24
  passage_length: 32
  tiny: {{hidden_size: 32, num_layers: 1, num_heads: 2, intermediate_size: 32, vocab_size: 600}}
reference: &training {{steps: 8, batch_size: 8, num_negatives: 1, temperature: 0.1, learning_rate: 1.0e-3, warmup_steps: 2, token_budget: 1024, checkpoint_every: 2, log_every: 1}}
optimize: {{steps: 6, batch_size: 9, num_negatives: 2, temperature: 0.1, learning_rate: 1.0e-3, warmup_steps: 2, token_budget: 1024, checkpoint_every: 2, log_every: 1, eta: 0.3}}
finetune: *training
serve: {{port: 0, queries: [{query}], k: 2}}
"""


def make_collections(source: Path, rows: int = 60) -> Path:
    """Write three tasks; a passage shares three of its query's four words."""
    rng = np.random.default_rng(0)

    def words(n: int) -> list[str]:
        return ["".join(rng.choice(SYLLABLES, 2)) for _ in range(n)]

    for name in ("easy", "middle", "noisy"):
        folder, lines, tests = source / name, [], []
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(rows + 10):
            asked = words(4)
            answer = words(8) if name == "noisy" else [*asked[: 4 if name == "easy" else 3], *words(5)]
            (lines if i < rows else tests).append((f"{name}{i}", " ".join(asked), " ".join(answer)))
        records = (
            {"_id": i, "query": q, "positive_passages": [{"docid": f"d{i}", "text": p}], "negative_passages": []}
            for i, q, p in lines
        )
        with gzip.open(folder / "train.jsonl.gz", "wt") as file:
            file.write("\n".join(map(json.dumps, records)))
        corpus = tuple(Passage(f"d{i}", p) for i, _, p in tests)
        write_beir(folder, RetrievalTest(corpus, {i: q for i, q, _ in tests}, {i: {f"d{i}": 1} for i, _, _ in tests}))
    return source


def write_recipe(folder: Path, source: Path) -> Path:
    path = folder / "small.yaml"
    path.write_text(RECIPE.format(source=source, query="bada fefi"))
    return path


def tdro(*arguments: object, runs: Path, timeout: float = 280, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "tdro_ray", *map(str, arguments)],
        env={**os.environ, "TDRO_RUNS": str(runs), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
