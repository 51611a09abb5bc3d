"""One unit vector per sequence from a transformer's last hidden states. Knows nothing of Ray.

B sequences, T tokens, D dimensions; padding is on the right.
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


POOLING = {"last": last, "mean": mean, "cls": cls}
