"""One attention, several kernels: all give what a masked softmax gives, or are refused."""

import inspect
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from engine.attention import (
    BACKENDS,
    Lengths,
    attention_for,
    flex_attend,
    flex_block_mask,
    proves_right,
    sdpa_attention,
    varlen_attend,
)
from engine.kv_cache import KVPool
from engine.pipeline import Pipeline
from engine.wan.presets import TransformerConfig
from tests.engine.streams import camera, opened, play, pooled_model

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
GROUPS, WIDTH = 2, 8


def lengths_of(valid: list[int], queries: int, keys: int) -> Lengths:
    count = torch.tensor(valid, dtype=torch.int32)
    mask = (torch.arange(keys) < count[:, None])[:, None, None]
    return Lengths(count, mask, flex_block_mask(count, queries, keys))


def random_qkv(rows: int, queries: int, keys: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, queries, GROUPS, WIDTH, generator=random)
    k, v = torch.randn(2, rows, keys, GROUPS, WIDTH, generator=random).unbind(0)
    return q, k, v


def plain(q: Tensor, k: Tensor, v: Tensor, valid: list[int]) -> Tensor:
    """Softmax row by row over the tokens that count, in float64."""
    out = []
    for row, count in enumerate(valid):
        scores = torch.einsum("qgd,kgd->gqk", q[row].double(), k[row, :count].double()) / WIDTH**0.5
        out.append(torch.einsum("gqk,kgd->qgd", scores.softmax(-1), v[row, :count].double()))
    return torch.stack(out).float()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=4), st.integers(1, 9))
def test_masked_sdpa_is_a_softmax_over_what_counts(valid: list[int], queries: int) -> None:
    q, k, v = random_qkv(len(valid), queries, 24)
    out = sdpa_attention(q, k, v, lengths_of(valid, queries, 24))
    assert out.shape == q.shape
    torch.testing.assert_close(out, plain(q, k, v, valid), atol=1e-6, rtol=0)


def test_without_a_mask_all_tokens_count() -> None:
    q, k, v = random_qkv(2, 3, 6)
    count = torch.tensor([6, 6], dtype=torch.int32)
    torch.testing.assert_close(sdpa_attention(q, k, v, Lengths(count, None)), plain(q, k, v, [6, 6]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("valid", [[24, 24], [4, 24], [1, 17, 24]])
def test_flex_attention_is_masked_sdpa(valid: list[int]) -> None:
    q, k, v = random_qkv(len(valid), 5, 24)
    lengths = lengths_of(valid, 5, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow without torch.compile
        flex = flex_attend(q, k, v, lengths)
        whole = flex_attend(q, k, v, Lengths(lengths.valid, None))
    torch.testing.assert_close(flex, sdpa_attention(q, k, v, lengths), atol=1e-6, rtol=0)
    torch.testing.assert_close(whole, sdpa_attention(q, k, v, Lengths(lengths.valid, None)), atol=1e-6, rtol=0)
    assert torch.equal(flex, whole) == (min(valid) == 24)


def test_a_pool_gives_flex_the_mask_that_it_gives_sdpa() -> None:
    config = TransformerConfig(dim=24, heads=2, layers=1, window_frames=4, sink_frames=1)
    x = torch.randn(2, 2, 2, 12, generator=torch.Generator().manual_seed(1))
    out = []
    for attend in (sdpa_attention, flex_attend):
        pool = KVPool(config, (1, 2), 2, attend=attend)
        rows = pool.lease(2)
        view = pool.view(rows[:1], pool.advance(rows[:1], 1))
        view.attend(0, x[:1], x[:1], x[:1])
        view = pool.view(rows, pool.advance(rows, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out.append(view.attend(0, x, x, x))
    torch.testing.assert_close(*out, atol=1e-6, rtol=0)


def test_whole_streams_are_the_same_under_flex() -> None:
    shown = []
    for attention in ("sdpa", "flex"):
        pipeline = Pipeline(pooled_model(), 32, 32, attention=attention)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = opened(pipeline, steps=2)
            shown.append(play(pipeline, state, [camera(4 if c else 5, c, height=32) for c in range(7)]))
    for (_, one), (_, two) in zip(*shown, strict=True):
        assert abs(one.astype(int) - two).max() <= 1


@pytest.mark.parametrize(("device", "dtype"), [(CPU, torch.float32), (CPU, torch.bfloat16), (GPU, torch.float32)])
def test_varlen_is_refused_where_it_has_no_kernel(device: torch.device, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"attention varlen needs a CUDA device and bfloat16, not .*; use sdpa"):
        attention_for("varlen", device, dtype)


def test_a_pipeline_on_a_cpu_refuses_varlen() -> None:
    with pytest.raises(ValueError, match="use sdpa"):
        Pipeline(pooled_model(), 32, 32, attention="varlen")


def test_auto_is_varlen_where_it_proves_right_on_a_gpu_and_sdpa_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for proof, expected in ((True, varlen_attend), (False, sdpa_attention)):
        monkeypatch.setattr("engine.attention.proves_right", lambda *_, proof=proof: proof)
        assert attention_for("auto", GPU, torch.bfloat16) is expected
    assert attention_for("varlen", GPU, torch.float16) is varlen_attend
    for device, dtype in ((CPU, torch.float32), (CPU, torch.bfloat16), (GPU, torch.float32)):
        assert attention_for("auto", device, dtype) is sdpa_attention
    for name, backend in BACKENDS.items():
        assert attention_for(name, GPU, torch.bfloat16) is backend


def test_a_kernel_that_does_not_run_or_is_wrong_does_not_prove_right(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex says that it is not compiled
        assert all(proves_right(attend, CPU, torch.bfloat16) for attend in (sdpa_attention, masked_flex))
    assert not proves_right(varlen_attend, CPU, torch.bfloat16)
    assert not proves_right(unmasked, CPU, torch.bfloat16)
    assert ["does not run" in caplog.text, "is off by" in caplog.text] == [True, True]


def unmasked(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
    return sdpa_attention(q, k, v, Lengths(lengths.valid, None))


def masked_flex(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
    block = flex_block_mask(lengths.valid, q.shape[1], k.shape[1])
    return flex_attend(q, k, v, Lengths(lengths.valid, lengths.mask, block))


def test_varlen_is_called_as_torch_declares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no CPU kernel: its arguments are held against torch's signature, its answer is made plainly."""
    signature = inspect.signature(varlen_attn)
    q, k, v = random_qkv(2, 3, 8)

    def kernel(*args: object, **kwargs: object) -> Tensor:
        given_ = signature.bind(*args, **kwargs).arguments
        assert (given_["max_q"], given_["max_k"]) == (3, 8)
        assert given_["cu_seq_q"].tolist() == [0, 3, 6]
        assert given_["cu_seq_k"].tolist() == [0, 8, 16]
        assert {given_[name].dtype for name in ("cu_seq_q", "cu_seq_k", "seqused_k")} == {torch.int32}
        rows = plain(
            given_["query"].view(2, 3, GROUPS, WIDTH),
            given_["key"].view(2, 8, GROUPS, WIDTH),
            given_["value"].view(2, 8, GROUPS, WIDTH),
            given_["seqused_k"].tolist(),
        )
        return rows.flatten(0, 1)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    lengths = lengths_of([5, 8], 3, 8)
    torch.testing.assert_close(varlen_attend(q, k, v, lengths), sdpa_attention(q, k, v, lengths), atol=1e-6, rtol=0)
