"""Self attention over a key-value cache, behind one interface.

Axes in names: B rows (one stream at one denoising step each), Q query tokens, L cached tokens, G heads, D channels of
one head.

`sdpa` runs everywhere and is the reference; `flex` is compiled where torch can; `varlen` is flash attention over rows
of unequal length, on CUDA only. All three get keys of whole rows with the valid tokens first, and say how many count:
a row that holds fewer frames than the longest is masked (sdpa, flex) or cut short (varlen).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

log = logging.getLogger(__name__)

# Of outputs about 0.3 in bfloat16.
PROOF_TOLERANCE = 0.02
Backend = Literal["sdpa", "flex", "varlen"]


@dataclass(frozen=True)
class Lengths:
    """How many of the L cached tokens count in each row, made once a pass.

    valid: [B] int32. mask: [B, 1, 1, L], True where a token counts; None when all rows are full, the steady state.
    block: the same for `flex_attend`.
    """

    valid: Tensor
    mask: Tensor | None
    block: BlockMask | None = None


Attend = Callable[[Tensor, Tensor, Tensor, Lengths], Tensor]


def sdpa_attention(q_BQGD: Tensor, k_BLGD: Tensor, v_BLGD: Tensor, lengths: Lengths) -> Tensor:
    """Scaled dot product attention with a key mask where rows differ; like q."""
    q, k, v = (x.transpose(1, 2) for x in (q_BQGD, k_BLGD, v_BLGD))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=lengths.mask).transpose(1, 2)


def flex_block_mask(valid_B: Tensor, queries: int, keys: int) -> BlockMask:
    """The mask of a pass whose rows count only their first tokens."""

    def counts(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return kv < valid_B[b]

    return create_block_mask(counts, valid_B.shape[0], None, queries, keys, device=valid_B.device.type)


def flex_attend(q_BQGD: Tensor, k_BLGD: Tensor, v_BLGD: Tensor, lengths: Lengths) -> Tensor:
    """FlexAttention; fused only under torch.compile, a slow plain form without."""
    q, k, v = (x.transpose(1, 2) for x in (q_BQGD, k_BLGD, v_BLGD))
    out = flex_attention(q, k, v, block_mask=lengths.block)
    assert isinstance(out, Tensor)  # it returns more only when asked to
    return out.transpose(1, 2)


def varlen_attend(q_BQGD: Tensor, k_BLGD: Tensor, v_BLGD: Tensor, lengths: Lengths) -> Tensor:
    """Flash attention over rows of unequal length. Never run by us: torch has no CPU kernel for it."""
    # With it comes torch's compiler: half of all that a rank imports, and nothing where another kernel is used.
    from torch.nn.attention.varlen import varlen_attn

    rows, queries = q_BQGD.shape[:2]
    keys = k_BLGD.shape[1]
    starts = torch.arange(rows + 1, dtype=torch.int32, device=q_BQGD.device)
    out = varlen_attn(
        q_BQGD.flatten(0, 1),
        k_BLGD.flatten(0, 1),
        v_BLGD.flatten(0, 1),
        starts * queries,
        starts * keys,
        queries,
        keys,
        seqused_k=lengths.valid,
    )
    assert isinstance(out, Tensor)  # it returns more only when asked to
    return out.view_as(q_BQGD)


BACKENDS: dict[Backend, Attend] = {"sdpa": sdpa_attention, "flex": flex_attend, "varlen": varlen_attend}


def attention_for(name: Literal["auto", "sdpa", "flex", "varlen"], device: torch.device, dtype: torch.dtype) -> Attend:
    """The kernel to use. auto: on CUDA in half precision varlen, if it proves right there; else sdpa.

    Raises: ValueError for varlen where it has no kernel.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    fits = device.type == "cuda" and half
    if name == "varlen" and not fits:
        raise ValueError(f"attention varlen needs a CUDA device and bfloat16, not {device} and {dtype}; use sdpa")
    if name == "auto":
        return varlen_attend if fits and proves_right(varlen_attend, device, dtype) else sdpa_attention
    return BACKENDS[name]


def proves_right(attend: Attend, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel runs on this device and agrees with sdpa on two rows of unequal length; logs it if not."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, tokens, 2, 128, generator=random).to(device, dtype) for tokens in (16, 64, 64))
    valid = torch.tensor([32, 64], dtype=torch.int32).to(device)
    mask = (torch.arange(64, device=device) < valid[:, None])[:, None, None]
    lengths = Lengths(valid, mask)
    try:
        error = float((attend(q, k, v, lengths) - sdpa_attention(q, k, v, lengths)).abs().max())
    except RuntimeError as cause:
        log.warning("attention kernel %s does not run on %s, sdpa stands in: %s", attend.__name__, device, cause)
        return False
    if not error < PROOF_TOLERANCE:
        log.warning("attention kernel %s is off by %.3g on %s, sdpa stands in", attend.__name__, error, device)
        return False
    return True
