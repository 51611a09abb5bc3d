"""One unit vector per sequence from a transformer's last hidden states. Knows nothing of Ray.

B sequences, T tokens, D dimensions; padding is on the right, or there is none and sequences stand end to end (packed).
"""

from __future__ import annotations

import torch
from torch import Tensor


def last(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the hidden state of each sequence's last real token, the EOS: (B, D)."""
    at_B = mask_BT.sum(1) - 1
    return hidden_BTD[torch.arange(len(hidden_BTD), device=hidden_BTD.device), at_B]


def mean(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean hidden state over real tokens: (B, D)."""
    mask_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
    return (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)


def cls(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the hidden state of the first token: (B, D)."""
    return hidden_BTD[:, 0]


def packed_last(hidden_TD: Tensor, length_B: Tensor) -> Tensor:
    """As `last`, of packed sequences."""
    return hidden_TD[length_B.cumsum(0) - 1]


def packed_mean(hidden_TD: Tensor, length_B: Tensor) -> Tensor:
    """As `mean`, of packed sequences."""
    owner_T = torch.repeat_interleave(length_B, output_size=len(hidden_TD))
    sum_BD = hidden_TD.new_zeros(len(length_B), hidden_TD.shape[1]).index_add(0, owner_T, hidden_TD)
    return sum_BD / length_B[:, None].to(hidden_TD.dtype)


def packed_cls(hidden_TD: Tensor, length_B: Tensor) -> Tensor:
    """As `cls`, of packed sequences."""
    return hidden_TD[length_B.cumsum(0) - length_B]


POOLING = {"last": last, "mean": mean, "cls": cls}
PACKED_POOLING = {"last": packed_last, "mean": packed_mean, "cls": packed_cls}
