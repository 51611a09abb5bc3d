"""The retriever's encoder: a Hugging Face backbone, pooling, unit vectors. Knows nothing of Ray or of training.

B sequences, T tokens, D dimensions, N texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdro_ray.errors import CheckpointError, ConfigError
from tdro_ray.model import packed
from tdro_ray.model.pooling import PACKED_POOLING, POOLING
from tdro_ray.model.tokenize import TextTokenizer, read_spec, write_spec
from tdro_ray.retrieval.chunks import CPU_ENCODE_TOKENS, embed_in_chunks, pad_rows
from tdro_ray.retrieval.contrastive import wide
from tdro_ray.types import Kind, RetrieverSpec

ADAPTER = "adapter"  # folder in a model folder: the LoRA adapter alone, beside the merged weights


class Retriever(nn.Module):
    """Backbone and pooling as one module: token ids in, unit vectors out. Queries and passages share it."""

    def __init__(self, backbone: nn.Module, spec: RetrieverSpec) -> None:
        super().__init__()
        self.backbone, self.spec = backbone, spec
        self.causal = _is_causal(backbone)
        config: Any = backbone.config
        self.packed = False  # see `pack_sequences`
        # What training keeps of a token, roughly: a dozen float32 vectors a layer.
        self.bytes_per_token = 48 * int(getattr(config, "num_hidden_layers", 1)) * int(config.hidden_size)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return unit vectors (B, D), float32 (float64 of a float64 model). `mask_BT` is 1 at real tokens; padding is on the right.

        Packed, `ids_BT` is one row of all sequences end to end and `mask_BT` their lengths (B,).
        """
        if self.packed:
            # The longest is a number on the host: it bounds the kernel's grid. The spec's limit saves a synchronisation.
            longest = min(max(self.spec.query_length, self.spec.passage_length), ids_BT.shape[1])
            hidden_TD = packed.call(self.backbone, ids_BT, mask_BT, longest)
            return nn.functional.normalize(wide(PACKED_POOLING[self.spec.pooling](hidden_TD, mask_BT)), dim=-1)
        # Behind a causal mask, padding on the right cannot reach a real token: no mask, and attention's fast path.
        mask = None if self.causal else mask_BT
        hidden_BTD = self.backbone(input_ids=ids_BT, attention_mask=mask).last_hidden_state
        return nn.functional.normalize(wide(POOLING[self.spec.pooling](hidden_BTD, mask_BT)), dim=-1)


class Encoder:
    """A model folder, ready to turn texts into vectors."""

    def __init__(
        self, retriever: Retriever, tokenizer: TextTokenizer, device: str = "cpu", dtype: str = "float32"
    ) -> None:
        self.retriever, self.tokenizer, self.device = retriever.to(device).eval(), tokenizer, torch.device(device)
        self.spec, self.dtype = retriever.spec, dtype
        self.compiled = False
        if dtype == "bfloat16":
            halve_linears(retriever)

    @property
    def dim(self) -> int:
        """Dimensions of a vector."""
        return int(self.retriever.backbone.config.hidden_size)

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu", dtype: str = "float32") -> Encoder:
        """Load a tdro model folder. Raises CheckpointError that says what is missing."""
        return cls(load_retriever(folder), TextTokenizer(folder), device, dtype)

    @property
    def backend(self) -> str:
        """What runs it, for `/info` and the logs."""
        return f"torch {self.dtype}{', compiled,' if self.compiled else ''} on {self.device}"

    def compile(self, texts: Sequence[str]) -> None:
        """Compile the backbone, for any number of sequences of any length, and run it on `texts` (some) so that it is done.

        Takes half a minute, or half of that where torch's cache knows the model. Raises ConfigError where torch cannot.
        """
        from torch._inductor.exc import InductorError

        self.retriever.backbone.compile(dynamic=True)
        self.compiled = True
        try:
            for some in (texts[:1], texts):  # torch makes one program for a single sequence, one for several
                self.encode(some, "passage")
        except (torch._dynamo.exc.TorchDynamoException, InductorError) as err:
            raise ConfigError(
                f"The model cannot be compiled here: {_first_line(err)} Install a C++ compiler (g++), or leave compiling out with "
                "serve.compile=false."
            ) from err

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], kind: Kind, task: str = "", batch_tokens: int = 16384) -> np.ndarray:
        """Return float32 unit vectors (N, D) in the order of the texts."""
        sequences = self.tokenizer.encode(texts, kind, task)
        return self.embed_ids(sequences, batch_tokens)

    @torch.inference_mode()
    def embed_ids(self, sequences: Sequence[Sequence[int]], batch_tokens: int = 16384) -> np.ndarray:
        """Return float32 unit vectors (N, D) of token id sequences, run by length in chunks of `batch_tokens`."""
        if self.device.type == "cpu":
            batch_tokens = min(batch_tokens, CPU_ENCODE_TOKENS)

        def run(flat: np.ndarray, offset_N: np.ndarray, length_N: np.ndarray, chunk: np.ndarray) -> np.ndarray:
            given = to_tensors(flat, offset_N, length_N, chunk, self.spec.pad_token_id, self.device)
            if self.compiled and given[0].shape[1] == 1:  # one token more is cheaper than a program for one
                given = (
                    nn.functional.pad(given[0], (0, 1), value=self.spec.pad_token_id),
                    nn.functional.pad(given[1], (0, 1)),
                )
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16", cache_enabled=False
            ):
                return self.retriever(*given).cpu().numpy()

        return embed_in_chunks(sequences, self.dim, batch_tokens, run)


def to_packed(
    flat: np.ndarray, offset_S: np.ndarray, length_S: np.ndarray, chunk: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return (ids_1T, length_B) of the sequences `chunk` of a flattened batch, on `device`: what a packed model takes."""
    ids_T = np.concatenate([flat[offset_S[i] : offset_S[i] + length_S[i]] for i in chunk]).astype(np.int64)
    length_B = torch.from_numpy(length_S[chunk]).to(device, non_blocking=True)
    return torch.from_numpy(ids_T)[None].to(device, non_blocking=True), length_B


def halve_linears(module: nn.Module) -> None:
    """Bring the weights of all linear layers to bfloat16, in place, for a forward under autocast: it would bring them
    there at every call. Residuals, norms and embeddings stay float32: vectors are within cosine 0.9999 (all in bfloat16
    is not always)."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.to(torch.bfloat16)


def to_tensors(
    flat: np.ndarray, offset_S: np.ndarray, length_S: np.ndarray, chunk: np.ndarray, pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return (ids_BT, mask_BT) of the sequences `chunk` of a flattened batch, on `device`."""
    ids_BT = torch.from_numpy(pad_rows(flat, offset_S, length_S, chunk, pad_id)).to(device, non_blocking=True)
    length_B = torch.from_numpy(length_S[chunk]).to(device, non_blocking=True)
    mask_BT = (torch.arange(ids_BT.shape[1], device=device) < length_B[:, None]).long()
    return ids_BT, mask_BT


def load_retriever(folder: str | Path, dtype: str = "float32") -> Retriever:
    """Load backbone (LoRA adapters merged in where there are any) and spec of a tdro model folder."""
    return Retriever(load_backbone(folder, dtype), read_spec(Path(folder)))


def load_backbone(name: str | Path, dtype: str = "float32") -> Any:
    """Load a Hugging Face encoder or decoder body by folder or Hub id. Raises CheckpointError with the mend."""
    from transformers import AutoModel

    local = Path(name).is_dir()
    try:
        return AutoModel.from_pretrained(str(name), dtype=getattr(torch, dtype), local_files_only=local)
    except (OSError, ValueError, KeyError, RuntimeError) as err:
        where = "folder" if local else "Hub id (no such folder here, and no hub gave it)"
        raise CheckpointError(
            f"Model {str(name)!r} cannot be loaded from that {where}: {_first_line(err)} "
            "Give a folder that save_pretrained wrote (config.json, model.safetensors, tokenizer.json), a Hub id, or 'tiny'."
        ) from err


def save_retriever(retriever: Retriever, tokenizer_folder: Path, folder: Path) -> None:
    """Write a complete tdro model folder: Hugging Face model files, the tokenizer's files, `tdro.json`.

    LoRA adapters are merged into the weights, and kept alone under `adapter/` so that they can be exported.
    """
    import shutil

    folder.mkdir(parents=True, exist_ok=True)
    backbone: Any = retriever.backbone
    if hasattr(backbone, "merge_and_unload"):  # peft: serve and evaluate the merged weights
        import copy

        # The base's embeddings are not the adapter's; peft would ask the Hub whether they changed.
        backbone.save_pretrained(folder / ADAPTER, save_embedding_layers=False)
        (folder / ADAPTER / "README.md").unlink(missing_ok=True)  # peft's card with nothing filled in
        backbone = copy.deepcopy(backbone).merge_and_unload()
    backbone.save_pretrained(folder)
    for file in Path(tokenizer_folder).glob("*token*"):
        shutil.copy2(file, folder / file.name)
    write_spec(folder, retriever.spec)


@torch.no_grad()
def _is_causal(backbone: nn.Module) -> bool:
    """Return whether a later token leaves earlier outputs alone, found by trying: configs do not say it reliably."""
    was_training = backbone.training
    backbone.eval()
    device = next(backbone.parameters()).device
    if device.type == "meta":
        return False
    vocabulary = getattr(backbone.config, "vocab_size", 8)  # type: ignore[union-attr]
    ids_BT = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=device) % vocabulary
    hidden_BTD = backbone(input_ids=ids_BT).last_hidden_state
    backbone.train(was_training)
    return bool(torch.equal(hidden_BTD[0, :3], hidden_BTD[1, :3]))


def _first_line(err: Exception) -> str:
    return str(err).strip().splitlines()[0][:300] if str(err).strip() else type(err).__name__
