"""A trained model as a folder for others, in one of three formats, each with `tdro.json` and a model card.

hf    merged weights in Hugging Face layout, and the files of sentence-transformers
lora  the LoRA adapter alone (peft), with a reference to its base model
onnx  one graph from token ids to unit vectors, for onnxruntime on a CPU

The exported tokenizer ends every text with EOS itself (its post-processor), so that transformers and
sentence-transformers give the vectors that training saw; `tdro.json` then says append_eos=false. The folder is loaded
in a fresh process and compared with the original before it gets its name.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tdro_ray.config import ExportFormat
from tdro_ray.errors import CheckpointError, ConfigError
from tdro_ray.model.card import write_card
from tdro_ray.model.encoder import Encoder
from tdro_ray.model.export_lora import LEAST_COSINE_ROUNDED, base_model, base_reference, is_rounded, write_lora
from tdro_ray.model.exported import query_prompt, requests
from tdro_ray.model.load import ONNX_FILE
from tdro_ray.model.onnx_graph import write_onnx
from tdro_ray.model.tokenize import TextTokenizer, read_spec, write_spec
from tdro_ray.types import RetrieverSpec

LEAST_COSINE = 0.9999  # between a text's original vector and its exported one
MARKS = ("modules.json", "adapter_config.json", ONNX_FILE)  # with tdro.json beside one, a folder is an earlier export
POOLING_FLAGS = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
ALL_FLAGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
WRITTEN_ANEW = ("tdro.json", "README.md", "tokenizer.json", "tokenizer_config.json")


def export(
    model_folder: Path, to: Path, run_folder: Path, name: str, format: ExportFormat = "hf", source_hash: str = ""
) -> Path:
    """Write the model to the folder `to` and return its resolved path; `name` is the model's name in the run.

    `to` must be new, empty, or an earlier export, which stays until the new one is whole and checked. `source_hash`
    names the weights that an index was built with (ONNX only). Raises ConfigError for another target or a library that
    is not installed, CheckpointError when the export does not give the original's vectors or there is no adapter.
    """
    model_folder, run_folder = Path(model_folder), Path(run_folder)
    to = Path(to).expanduser().resolve()
    _check_target(to, model_folder.resolve())
    spec = read_spec(model_folder)
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
    try:
        base = base_model(model_folder, run_folder) if format == "lora" else None
        exported = write_tokenizer(model_folder, spec, temporary)
        write_spec(temporary, exported)
        if format == "hf":
            copy_weights(model_folder, temporary)
            write_sentence_transformers(temporary, exported)
        elif format == "lora":
            write_lora(model_folder, temporary, base_reference(model_folder, run_folder))
        else:
            write_onnx(model_folder, temporary, source_hash)
        write_card(temporary, spec, run_folder, name, format)
        least = LEAST_COSINE_ROUNDED if format == "lora" and is_rounded(model_folder) else LEAST_COSINE
        _check(model_folder, temporary, base, least)
        _put(temporary, to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return to


def _check_target(to: Path, model_folder: Path) -> None:
    if to.is_file():
        raise ConfigError(
            f"--to {to} is a file. Give a folder that does not exist yet, an empty one, or an earlier export."
        )
    if model_folder == to or model_folder.is_relative_to(to) or to.is_relative_to(model_folder):
        raise ConfigError(
            f"--to {to} and the model's own folder {model_folder} lie in each other. Give another folder."
        )
    earlier = (to / "tdro.json").exists() and any((to / mark).exists() for mark in MARKS)
    if to.is_dir() and any(to.iterdir()) and not earlier:
        raise ConfigError(
            f"--to {to} is not empty and no earlier export (it has no tdro.json with one of {', '.join(MARKS)}). "
            "Nothing was written. Give a folder that does not exist yet, or empty that one."
        )


def _put(temporary: Path, to: Path) -> None:
    """Give the finished folder its name; an earlier export is moved out of the way first and deleted last."""
    temporary.chmod(0o755)  # mkdtemp makes it private
    old = to.with_name(f".{to.name}.{os.getpid()}.old")
    if to.exists():
        to.rename(old)
    temporary.rename(to)
    shutil.rmtree(old, ignore_errors=True)


# What is written


def copy_weights(model_folder: Path, out: Path) -> None:
    """Copy the merged weights, their config, and whatever else lies in the model folder and is not written anew."""
    for file in model_folder.iterdir():
        if file.is_file() and file.name not in WRITTEN_ANEW:
            shutil.copy2(file, out / file.name)


def write_tokenizer(model_folder: Path, spec: RetrieverSpec, out: Path) -> RetrieverSpec:
    """Write a tokenizer that ends every text as `spec` wants it, and return the spec that fits it (append_eos false).

    Raises CheckpointError when the vocabulary has no token of the spec's EOS id.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config_path = model_folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(config_path.read_text(encoding="utf-8")) if config_path.exists() else {}
    pad = tokenizer.id_to_token(spec.pad_token_id)
    config |= {"model_max_length": spec.passage_length, "padding_side": "right", "truncation_side": "right"}
    if pad is not None:
        config["pad_token"] = pad
    if spec.append_eos:
        end = tokenizer.id_to_token(spec.eos_token_id)
        if end is None:
            raise CheckpointError(
                f"{model_folder / 'tokenizer.json'} has no token with the id {spec.eos_token_id}, which tdro.json names as EOS. "
                "The two files are not of one model; run the stage that wrote the model again."
            )
        tokenizer = append_end(tokenizer, end, spec.eos_token_id)
        config["eos_token"] = end
        # A model's own tokenizer class may build its post-processor anew from these; this class reads tokenizer.json.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        for key in ("add_bos_token", "add_eos_token", "auto_map"):
            config.pop(key, None)
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(out / "tokenizer_config.json", config)
    return replace(spec, append_eos=False)


def append_end(tokenizer: Any, end: str, end_id: int) -> Any:
    """Return a `tokenizers.Tokenizer` that puts the token `end` after every text, behind what its post-processor does.

    Truncation counts it: a text of more tokens than fit is cut to length - 1 and then ended.
    """
    from tokenizers import Tokenizer

    raw = json.loads(tokenizer.to_str())
    before = raw["post_processor"]
    steps = before["processors"] if before and before["type"] == "Sequence" else [before] if before else []
    templates = [step for step in steps if step["type"] == "TemplateProcessing"]
    if not templates:  # two templates in a row would not see each other's tokens as part of the text
        text = [[{"Sequence": {"id": side, "type_id": i}}] for i, side in enumerate("AB")]
        templates = [{"type": "TemplateProcessing", "single": text[0], "pair": text[0] + text[1], "special_tokens": {}}]
        steps = [*steps, *templates]
    template = templates[-1]
    template["single"] = [*template["single"], {"SpecialToken": {"id": end, "type_id": 0}}]
    template["pair"] = [*template["pair"], {"SpecialToken": {"id": end, "type_id": 1}}]
    template["special_tokens"][end] = {"id": end, "ids": [end_id], "tokens": [end]}
    raw["post_processor"] = steps[0] if len(steps) == 1 else {"type": "Sequence", "processors": steps}
    return Tokenizer.from_str(json.dumps(raw))


def write_sentence_transformers(folder: Path, spec: RetrieverSpec) -> None:
    """Write the files that `SentenceTransformer(folder)` reads: modules, pooling, prompts, maximum length."""
    kinds = {"0": ("", "Transformer"), "1": ("1_Pooling", "Pooling"), "2": ("2_Normalize", "Normalize")}
    modules = [
        {"idx": int(i), "name": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in kinds.items()
    ]
    dimension = json.loads((folder / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    flags = {f"pooling_mode_{flag}": flag == POOLING_FLAGS[spec.pooling] for flag in ALL_FLAGS}
    prompts = {task: query_prompt(prompt) for task, prompt in spec.task_prompts.items()}
    prompts = {"query": query_prompt(spec.query_prompt), "document": "", **prompts}
    _write_json(folder / "modules.json", modules)
    _write_json(
        folder / "1_Pooling" / "config.json", {"word_embedding_dimension": dimension, **flags, "include_prompt": True}
    )
    (folder / "2_Normalize").mkdir(exist_ok=True)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": spec.passage_length, "do_lower_case": False})
    _write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# What is checked


def _check(original: Path, exported: Path, base: Path | None = None, least: float = LEAST_COSINE) -> None:
    """Raise CheckpointError unless a fresh process gives the original's vectors, to a cosine of `least`, from the
    exported folder (an adapter is loaded onto the model folder `base`)."""
    with tempfile.TemporaryDirectory(prefix="tdro-export-") as scratch:
        out = Path(scratch) / "vectors.npz"
        package = str(Path(__file__).parents[2])  # found wherever the command was started
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(
            [
                sys.executable,
                "-P",
                "-m",
                "tdro_ray.model.exported",
                str(exported),
                str(out),
                *([str(base)] if base else []),
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **quiet},
        )
        if done.returncode:
            raise CheckpointError(
                f"The exported model does not load in a fresh process, so nothing was written: {done.stderr.strip()[-1500:]}"
            )
        encoder, tokenizer = Encoder.load(original), TextTokenizer(exported)
        for way, vectors_ND in np.load(out).items():
            rows = requests(tokenizer, sentence_transformers=way == "sentence_transformers")
            expected_ND = np.concatenate([encoder.encode([r.text], r.kind, r.task) for r in rows])
            cosine_N = (expected_ND * vectors_ND).sum(1) / np.linalg.norm(vectors_ND, axis=1)
            worst = int(np.argmin(cosine_N))
            if not cosine_N[worst] >= least:
                raise CheckpointError(
                    f"The exported model gives other vectors through {way}: cosine {cosine_N[worst]:.6f} for {rows[worst].text[:60]!r} "
                    f"({rows[worst].kind}, task {rows[worst].task or 'none'}); at least {least} is wanted. Nothing was written."
                )
