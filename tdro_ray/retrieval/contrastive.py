"""InfoNCE, row by row. Pure torch: knows nothing of tasks, workers or config.

B queries of one worker, P passages of a query (the positive first), M passages of the whole global batch,
K positives of a row (padded), D dimensions. Vectors are unit vectors; `temperature` is tau in s = cos / tau.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def wide(x: Tensor) -> Tensor:
    """Return `x` in float32 at least: bf16 cosines divided by a temperature of 0.002 would lose the ranking."""
    return x if x.dtype == torch.float64 else x.float()


def own_passages_loss(score_BP: Tensor, temperature: float, valid_BP: Tensor | None = None) -> Tensor:
    """Return InfoNCE over each row's own passages, the positive at 0 (stage 1): (B,).

    L_i = -log( exp(s_i0) / sum_p exp(s_ip) ), s = `score_BP` / tau, `score_BP` cosines. Where `valid_BP` is False the
    passage does not take part; a row with only its positive has loss 0.
    """
    logit_BP = wide(score_BP) / temperature
    if valid_BP is not None:
        logit_BP = logit_BP.masked_fill(~valid_BP, float("-inf"))
    target_B = torch.zeros(len(logit_BP), dtype=torch.long, device=logit_BP.device)
    return cross_entropy(logit_BP, target_B, reduction="none")


def distill_loss(score_BP: Tensor, teacher_BP: Tensor, temperature: float, teacher_temperature: float = 1.0) -> Tensor:
    """Return KL( softmax(teacher / T) || softmax(cos / tau) ) over each row's own passages: (B,).

    A passage whose teacher score is NaN takes no part; a row with fewer than two others has 0.
    """
    known_BP = ~teacher_BP.isnan()
    low = torch.finfo(torch.float32).min / 4  # -inf would make NaN of a row without any score
    target_BP = (wide(teacher_BP) / teacher_temperature).masked_fill(~known_BP, low).log_softmax(1)
    log_BP = (wide(score_BP) / temperature).masked_fill(~known_BP, low).log_softmax(1)
    return (target_BP.exp() * (target_BP - log_BP) * known_BP).sum(1)


def global_batch_loss(
    query_BD: Tensor,
    passage_MD: Tensor,
    target_B: Tensor,
    passage_key_M: Tensor,
    positive_key_BK: Tensor,
    temperature: float,
) -> Tensor:
    """Return InfoNCE of each query over all passages of the global batch (stages 0 and 2): (B,).

    `target_B` is the column of each row's own positive. A column whose key is one of the row's positives (`-1` pads),
    its own positive apart, is no negative of that row and is masked: equal passages have equal keys.
    """
    logit_BM = wide(query_BD) @ wide(passage_MD).T / temperature
    return cross_entropy(
        logit_BM.masked_fill(false_negatives(target_B, passage_key_M, positive_key_BK), float("-inf")),
        target_B,
        reduction="none",
    )


def reverse_loss(
    positive_BD: Tensor, query_ND: Tensor, target_B: Tensor, key_B: Tensor, positive_key_NK: Tensor, temperature: float
) -> Tensor:
    """Return InfoNCE of each row's positive over the queries of the global batch (the other direction): (B,).

    `target_B` is the column of the row's own query, `key_B` its positive's key. Another query that has this passage
    among its positives (`positive_key_NK`) is no negative and is masked.
    """
    logit_BN = wide(positive_BD) @ wide(query_ND).T / temperature
    mask_BN = (key_B[:, None, None] == positive_key_NK[None]).any(-1)
    mask_BN[torch.arange(len(target_B), device=target_B.device), target_B] = False
    return cross_entropy(logit_BN.masked_fill(mask_BN, float("-inf")), target_B, reduction="none")


def false_negatives(target_B: Tensor, passage_key_M: Tensor, positive_key_BK: Tensor) -> Tensor:
    """Return where a column holds a positive of the row other than its target: bool (B, M)."""
    mask_BM = torch.zeros(len(target_B), len(passage_key_M), dtype=torch.bool, device=target_B.device)
    for key_B in positive_key_BK.unbind(1):
        mask_BM |= passage_key_M[None, :] == key_B[:, None]
    mask_BM[torch.arange(len(target_B), device=target_B.device), target_B] = False
    return mask_BM
