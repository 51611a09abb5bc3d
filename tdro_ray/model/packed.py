"""Sequences end to end in one row instead of padded: attention within each sequence, by where it starts and ends.

On a GPU the kernel is FlashAttention as torch carries it (`torch.nn.attention.varlen`, bfloat16, Ampere or newer);
elsewhere each sequence goes through scaled dot-product attention alone: right, slow, and how the tests know it is right.

T tokens of all sequences, H heads, d dimensions of a head, B sequences.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = "tdro_packed"  # its name in transformers' table; a name without a mask function gets no mask
WIDEST_HEAD = 256  # dimensions of a head that FlashAttention takes


def positions(length_B: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return (first token of each sequence and the end of the last (B + 1,), position of each token in its own (T,))."""
    start_B1 = nn.functional.pad(length_B.cumsum(0), (1, 0))
    at_T = torch.arange(num_tokens, device=length_B.device)
    return start_B1, at_T - torch.repeat_interleave(start_B1[:-1], length_B, output_size=num_tokens)


def attention(
    module: nn.Module,
    query_1HTd: Tensor,
    key_1HTd: Tensor,
    value_1HTd: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return (1, T, H, d). Raises NotImplementedError for what the kernel cannot do (dropout, soft caps, sinks)."""
    if dropout or softcap or s_aux is not None or attention_mask is not None or cu_seq_lens_q is None:
        raise NotImplementedError("packed attention has no dropout, no soft cap, no sinks and no mask")
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    query_THd, key_THd, value_THd = (x[0].transpose(0, 1) for x in (query_1HTd, key_1HTd, value_1HTd))
    # Every way of writing "sliding window of w" in transformers counts the token itself.
    back = sliding_window - 1 if sliding_window else -1
    window = (back, 0 if causal else back)
    if query_THd.is_cuda and query_THd.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        at = cu_seq_lens_q.to(torch.int32)
        few = key_THd.shape[1] != query_THd.shape[1]
        given = {"scale": scaling, "window_size": window, "enable_gqa": few}
        out = varlen_attn(query_THd, key_THd, value_THd, at, at, max_length_q, max_length_q, **given)
        return out[None], None  # type: ignore[index]
    ends = cu_seq_lens_q.tolist()
    parts = [_alone(query_THd[a:b], key_THd[a:b], value_THd[a:b], window, scaling) for a, b in pairwise(ends)]
    return torch.cat(parts)[None], None


def _alone(
    query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, window: tuple[int, int], scale: float | None
) -> Tensor:
    at = torch.arange(len(query_THd), device=query_THd.device)
    ahead_TT = at[None, :] - at[:, None]  # of the key, relative to the query
    mask_TT = None
    for side, limit in ((-ahead_TT, window[0]), (ahead_TT, window[1])):
        if limit >= 0:
            mask_TT = side <= limit if mask_TT is None else mask_TT & (side <= limit)
    query, key, value = (x.transpose(0, 1)[None] for x in (query_THd, key_THd, value_THd))
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask_TT, scale=scale, enable_gqa=key.shape[1] != query.shape[1]
    )
    return out[0].transpose(0, 1)


def has_kernel(config: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the device attends within packed sequences in one kernel, forward and backward, found by trying it
    on heads of the model's shape: the model itself may be elsewhere until it is put in shards."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    heads = int(getattr(config, "num_attention_heads", 1))
    few = int(getattr(config, "num_key_value_heads", None) or heads)
    shape = [(1, h, 12, _head_width(config)) for h in (heads, few, few)]
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(size, generator=generator).to(dtype) for size in shape]
    found = []
    try:
        for place in (torch.device("cpu"), device):
            leaves = [x.clone().to(place).requires_grad_() for x in drawn]
            at = torch.tensor([0, 5, 12], device=place)
            out, _ = attention(nn.Module(), *leaves, None, cu_seq_lens_q=at, max_length_q=7)
            out.float().square().sum().backward()
            found.append(torch.cat([x.detach().float().cpu().flatten() for x in (out, *(v.grad for v in leaves))]))
    except (NotImplementedError, ImportError, TypeError, ValueError, RuntimeError):
        return False
    return bool(torch.cosine_similarity(*found, dim=0) > 0.99)


def _head_width(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // int(getattr(config, "num_attention_heads", 1))
    )


def pack(backbone: Any) -> str:
    """Let the backbone attend within packed sequences; return "", or why it cannot, the backbone left as it was.

    Found by trying: two sequences packed must give what each gives alone, whatever the model's code promises.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before, width = backbone.config._attn_implementation, _head_width(backbone.config)
    if width > WIDEST_HEAD:
        return f"its heads have {width} dimensions, the kernel takes at most {WIDEST_HEAD}"
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
    was_training = backbone.training
    alone_TD, why = _hidden(backbone.eval(), apart=True), ""
    try:
        backbone.set_attn_implementation(ATTENTION)
        packed_TD = _hidden(backbone, apart=False)
        close = 1e-4 if packed_TD.dtype in (torch.float32, torch.float64) else 0.05
        if float((packed_TD - alone_TD).abs().max()) > close * float(alone_TD.abs().max()):
            why = "its sequences see each other when they are packed"
        _hidden(backbone.train(was_training), apart=False)  # attention dropout shows in training only
    except (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError) as err:
        why = str(err).strip().splitlines()[0][:200] if str(err).strip() else type(err).__name__
    backbone.train(was_training)
    if why:
        backbone.set_attn_implementation(before)
    return why


def call(backbone: Any, ids_1T: Tensor, length_B: Tensor, longest: int) -> Tensor:
    """Return the last hidden states (T, D) of packed sequences."""
    start_B1, at_T = positions(length_B, ids_1T.shape[1])
    given = {"cu_seq_lens_q": start_B1, "cu_seq_lens_k": start_B1, "max_length_q": longest, "max_length_k": longest}
    return backbone(input_ids=ids_1T, position_ids=at_T[None], use_cache=False, **given).last_hidden_state[0]


@torch.no_grad()
def _hidden(backbone: Any, apart: bool) -> Tensor:
    """Hidden states (8, D) of two made-up sequences, each run alone or both packed."""
    device = next(backbone.parameters()).device
    ids_1T = torch.arange(1, 9, device=device)[None] % backbone.config.vocab_size
    if apart:
        parts = (ids_1T[:, :3], ids_1T[:, 3:])
        return torch.cat([backbone(input_ids=part).last_hidden_state[0] for part in parts])
    return call(backbone, ids_1T, torch.tensor([3, 5], device=device), 5)
