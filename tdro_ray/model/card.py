"""The model card of an exported model, `README.md`: how to use it, what it was trained on, how, and how good it is.

Everything comes from the run folder's files; what is not there is left out. Knows no other room.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tdro_ray.config import ExportFormat
from tdro_ray.types import RetrieverSpec

BASELINE = "uniform"
SETTINGS = (
    "steps",
    "batch_size",
    "num_negatives",
    "temperature",
    "learning_rate",
    "warmup_steps",
    "min_lr_ratio",
    "weight_decay",
    "max_grad_norm",
)
LIBRARIES = {"hf": "sentence-transformers", "lora": "peft", "onnx": "onnxruntime"}
POOLED = {
    "last": "hidden[torch.arange(len(hidden)), mask.sum(1) - 1]  # the last token, EOS",
    "mean": "(hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)",
    "cls": "hidden[:, 0]",
}


def write_card(folder: Path, spec: RetrieverSpec, run_folder: Path, name: str, format: ExportFormat = "hf") -> None:
    """Write `README.md` of the model called `name` in the run into `folder`, an export of that format."""
    config = _read(run_folder / "config.json")
    tasks = _read(run_folder / "stages" / "ingest" / "manifest.json").get("summary", {}).get("tasks", {})
    weights = _weights(run_folder, name, tasks)
    title = f"{config.get('name', run_folder.name)}: dense retriever, {name} weights"
    parts = [
        f"# {title}",
        _what(config, tasks, spec, name),
        _usage(spec, folder, format),
        _prompts(spec),
        _data(tasks, weights, name),
        _training(config, _read(run_folder / "weights" / f"{name}.json").get("meta", {}), name, format),
        _software(_read(run_folder / "versions.json")),
        _results(run_folder, name),
        _limits(spec, config, tasks, format),
    ]
    body = "\n\n".join(part for part in parts if part)
    facts = _front_matter(config, tasks, format)
    (folder / "README.md").write_text(f"---\n{facts}---\n\n{body}\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _weights(run_folder: Path, name: str, tasks: dict[str, Any]) -> dict[str, float]:
    if name == BASELINE:
        return {task: 1 / len(tasks) for task in tasks}
    return _read(run_folder / "weights" / f"{name}.json").get("domain_weights", {})


def _reference(folder: Path) -> str:
    """What the adapter in `folder` names as its base model; "" where there is no adapter."""
    return str(_read(folder / "adapter_config.json").get("base_model_name_or_path", ""))


def _front_matter(config: dict[str, Any], tasks: dict[str, Any], format: ExportFormat) -> str:
    base = str(config.get("model", {}).get("name", "tiny"))
    languages = sorted({str(info["language"]) for info in tasks.values() if info.get("language")})
    facts: dict[str, Any] = {
        "library_name": LIBRARIES[format],
        "pipeline_tag": "sentence-similarity",
        "tags": [LIBRARIES[format], "feature-extraction", "sentence-similarity", "dense-retrieval", "tdro"],
    }
    if languages:
        facts["language"] = languages
    if base != "tiny" and not Path(base).exists():
        facts["base_model"] = base
    return yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)


def _what(config: dict[str, Any], tasks: dict[str, Any], spec: RetrieverSpec, name: str) -> str:
    base = str(config.get("model", {}).get("name", "an unknown model"))
    start = "a small Qwen2-style encoder with random weights" if base == "tiny" else f"`{base}`"
    rows = sum(info.get("rows", 0) for info in tasks.values())
    data = f" on {len(tasks)} retrieval tasks with {rows:,} training rows" if tasks else ""
    how = {
        BASELINE: "every task was sampled equally often",
        "proportional": "tasks were sampled in proportion to their rows",
    }.get(name, f"tasks were sampled by the weights `{name}`, learned by tDRO (arXiv 2408.10613)")
    return (
        f"One encoder for queries and passages, trained from {start}{data}; {how}. "
        f"It gives unit vectors by {spec.pooling} pooling; similarity is the cosine."
    )


def _usage(spec: RetrieverSpec, folder: Path, format: ExportFormat) -> str:
    task = next(iter(spec.task_prompts), "")
    named = f'prompt_name="{task}"' if task else 'prompt_name="query"'
    prompt = f"Instruct: {spec.task_prompts[task]}\\nQuery: " if task else ""
    text = json.dumps(prompt, ensure_ascii=False).replace(chr(92) * 2, chr(92))[:-1] + 'parse an ISO 8601 date"'
    if format == "onnx":
        return _usage_onnx(spec, text, task)
    load = 'model = AutoModel.from_pretrained("path/to/this/folder")'
    if format == "lora":
        load = f'base = AutoModel.from_pretrained("{_reference(folder)}")\nmodel = PeftModel.from_pretrained(base, "path/to/this/folder")'
    plain = f"""```python
import torch
{"from peft import PeftModel" + chr(10) if format == "lora" else ""}from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
{load}
texts = [{text}]
batch = tokenizer(texts, padding=True, truncation=True, max_length={spec.query_length}, return_tensors="pt")
hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"]
vectors = torch.nn.functional.normalize({POOLED[spec.pooling].partition("  #")[0]}, dim=-1)
```

The tokenizer puts the final token behind every text itself; add nothing."""
    if format == "lora":
        return f"## How to use it\n\nThe adapter alone; it belongs on `{_reference(folder)}`.\n\n{plain}"
    return f"""## How to use it

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
queries = model.encode(["parse an ISO 8601 date"], {named})
passages = model.encode(["datetime.fromisoformat(date_string) …"], prompt_name="document")
print(model.similarity(queries, passages))
```

{plain}"""


def _usage_onnx(spec: RetrieverSpec, text: str, task: str) -> str:
    return f"""## How to use it

```python
from tdro_ray.model.load import load_encoder

encoder = load_encoder("path/to/this/folder")  # onnxruntime on the CPU
queries = encoder.encode(["parse an ISO 8601 date"], "query", "{task}")
passages = encoder.encode(["datetime.fromisoformat(date_string) …"], "passage")
print(queries @ passages.T)
```

```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("path/to/this/folder/tokenizer.json")
tokenizer.enable_padding(pad_id={spec.pad_token_id})
tokenizer.enable_truncation({spec.query_length})
session = onnxruntime.InferenceSession("path/to/this/folder/model.onnx", providers=["CPUExecutionProvider"])
batch = tokenizer.encode_batch([{text}])
ids = np.array([e.ids for e in batch])
mask = np.array([e.attention_mask for e in batch])
vectors = session.run(None, {{"ids": ids, "mask": mask}})[0]  # unit vectors: pooling and normalisation are in the graph
```

The tokenizer puts the final token behind every text itself; add nothing. Padding is on the right."""


def _prompts(spec: RetrieverSpec) -> str:
    lines = [_row(["Task", "Prompt", "Also before passages"]), _row(["---"] * 3)]
    if spec.query_prompt:
        lines.append(_row(["(default, `query`)", f"`Instruct: {spec.query_prompt}\\nQuery: `", "no"]))
    for task, prompt in spec.task_prompts.items():
        both = "yes (both sides are of one kind)" if task in spec.symmetric_tasks else "no"
        lines.append(_row([f"`{task}`", f"`Instruct: {prompt}\\nQuery: `", both]))
    if len(lines) == 2:
        return "## Prompts\n\nNone: queries and passages are encoded as they are."
    return "## Prompts\n\nPut before queries; `prompt_name=` the task.\n\n" + "\n".join(lines)


def _data(tasks: dict[str, Any], weights: dict[str, float], name: str) -> str:
    if not tasks:
        return ""
    head = ["Task", "Rows", "Sampling weight", "Language", "Licence", "What it asks"]
    lines = [_row(head), _row(["---", "---:", "---:", "---", "---", "---"])]
    for task in sorted(tasks, key=lambda t: (-weights.get(t, 0.0), t)):
        info = tasks[task]
        share = f"{weights.get(task, 0.0):.1%}" if weights else "–"
        facts = [info.get("language"), info.get("licence") or "not stated", info.get("description")]
        lines.append(_row([f"`{task}`", f"{info.get('rows', 0):,}", share, *(str(f or "–") for f in facts)]))
    used = f" Weights: `{name}`; 0 % means that the task was left out." if weights else ""
    return (
        "## Training data\n\nTexts keep the licences of where they come from; whether this model may be used for your "
        f"purpose depends on them and on the licence of the base model.{used}\n\n" + "\n".join(lines)
    )


def _training(config: dict[str, Any], meta: dict[str, Any], name: str, format: ExportFormat) -> str:
    """Settings of the training; `meta` is of the weight file and says how the weights were learned."""
    if not config:
        return ""
    model, optimize = config.get("model", {}), meta.get("settings", {})
    stage = config.get("reference" if name == BASELINE else "finetune", {})
    rows = [[key.replace("_", " "), f"{stage[key]:g}"] for key in SETTINGS if key in stage]
    lora, mine = model.get("lora"), config.get("mine", {})
    merged = "" if format == "lora" else ", merged"
    rows += [
        ["parameters trained", f"LoRA, r {lora.get('r')}, alpha {lora.get('alpha')}{merged}" if lora else "all"],
        ["tokens, at most", f"{model.get('query_length')} of a query, {model.get('passage_length')} of a passage"],
        ["precision", f"{model.get('dtype')}"],
        ["hard negatives", f"given ones, and {mine.get('method')} up to {mine.get('num_negatives')} a row"],
        ["loss", "InfoNCE, hard and in-batch negatives, batches of one task"],
        ["seed", str(config.get("seed", "–"))],
    ]
    if optimize:
        what = f"measure {optimize.get('measure')}, eta {optimize.get('eta')}, temperature {optimize.get('temperature')}, {optimize.get('steps')} steps"
        rows.append(["task weights learned by", f"{what} of a proxy"])
    return "## Training\n\n" + "\n".join([_row(["Setting", "Value"]), _row(["---", "---"]), *map(_row, rows)])


def _software(versions: dict[str, Any]) -> str:
    """One line of the versions that the run was made with."""
    shown = [
        f"{name} {versions[name]}" for name in ("tdro-ray", "torch", "transformers", "peft", "ray") if name in versions
    ]
    return f"Made with {', '.join(shown)}." if shown else ""


def _results(run_folder: Path, name: str) -> str:
    ours, base = _read(run_folder / "eval" / f"{name}.json"), _read(run_folder / "eval" / f"{BASELINE}.json")
    if not ours:
        return "## Results\n\nNot evaluated yet."
    measures = list(ours["mean"])
    compared = name != BASELINE and bool(base)
    head = ["Held-out test", *measures] + ([f"{measures[0]}, {BASELINE} weights"] if compared else [])
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    parts = {**{f"`{t}`": ("tasks", t) for t in ours["tasks"]}, "**mean**": ("mean", ""), "**worst**": ("worst", "")}
    for label, (kind, task) in parts.items():
        found = ours[kind][task] if task else ours[kind]
        other = base.get(kind, {}).get(task, {}) if task else base.get(kind, {})
        cells = [label, *(f"{found[m]:.3f}" for m in measures)]
        if compared:
            cells.append(f"{other[measures[0]]:.3f}" if measures[0] in other else "–")
        lines.append(_row(cells))
    return "## Results\n\nSearch among each task's own test passages.\n\n" + "\n".join(lines)


def _limits(spec: RetrieverSpec, config: dict[str, Any], tasks: dict[str, Any], format: ExportFormat) -> str:
    lines = []
    if spec.query_length != spec.passage_length and format == "hf":
        lines.append(
            f"- Trained with queries of at most {spec.query_length} tokens and passages of at most {spec.passage_length}. "
            f"sentence-transformers knows one maximum, `max_seq_length` {spec.passage_length}: it reads longer queries than training did."
        )
    if "environment" in config.get("data", {}).get("sources", ()):
        lines.append(
            "- Trained on the text of one installed Python environment: a demonstration, not a general retriever."
        )
    languages = {info.get("language") for info in tasks.values()} - {None, ""}
    if languages == {"en"}:
        lines.append("- English only.")
    return "## Limits\n\n" + "\n".join(lines) if lines else ""


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
