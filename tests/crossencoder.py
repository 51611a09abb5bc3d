"""A cross-encoder of a few thousand parameters, from a config and a tokenizer trained on the spot."""

from pathlib import Path

import torch


def tiny_cross_encoder(folder: Path, words: list[str], num_labels: int = 1) -> Path:
    """Write the model folder; its scores differ from passage to passage as far as random weights let them."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted({letter for word in words for letter in word.lower()} | set("0123456789"))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    vocabulary += [word for word in dict.fromkeys(w.lower() for w in words) if word not in vocabulary]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        num_labels=num_labels, max_position_embeddings=64, initializer_range=1.0,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder
