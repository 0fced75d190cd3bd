"""Attention: equal to PyTorch's for any shape and mask; gradients; what a mask promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ecomrec.model.attention import LowHighPass, SelfAttention, attention, causal_mask

for_any = settings(deadline=None, max_examples=40)
seeds, few = st.integers(0, 2**31), st.integers(1, 9)


def drawn(seed: int, *shapes: tuple[int, ...], dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@given(few, few, few, few, st.booleans(), seeds)
@for_any
def test_both_branches_equal_pytorchs(queries, keys, dim, width, masked, seed):
    query, key, value, coin = drawn(seed, (2, queries, dim), (2, keys, dim), (2, keys, width), (2, queries, keys), dtype=torch.float32)
    mask = coin > 0 if masked else None
    expected = F.scaled_dot_product_attention(query, key, value, mask)
    if masked:
        expected = expected.nan_to_num() * mask.any(dim=-1, keepdim=True)
    for dropout in (0.0, 1e-12):  # the second drops nothing and takes the formula
        assert torch.allclose(attention(query, key, value, mask, dropout), expected, atol=1e-6)


@given(few, few, seeds)
@for_any
def test_gradients_pass_the_check_with_and_without_what_is_masked(queries, keys, seed):
    query, key, value, coin = drawn(seed, (queries, 3), (keys, 3), (keys, 2), (queries, keys))
    mask = (coin > 0) | (torch.arange(keys) == 0)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, mask), inputs)
    torch.manual_seed(seed)
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, mask, 1e-12), inputs)


def test_dropout_keeps_the_mean():
    query, key, value = drawn(0, (4, 3), (6, 3), (6, 2))
    torch.manual_seed(0)
    mean = sum(attention(query, key, value, dropout=0.5) for _ in range(4000)) / 4000
    assert torch.allclose(mean, attention(query, key, value), atol=0.05)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), seeds)
@for_any
def test_packed_histories_do_not_see_each_other_or_what_comes_later(sizes, seed):
    segment = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    segment = torch.cat([segment, torch.tensor([-1, -1])])[None]
    mask = causal_mask(segment)
    torch.manual_seed(seed)
    x = torch.randn(1, segment.shape[1], 8)
    for layer in (SelfAttention(8, 2).eval(), LowHighPass(8)):
        whole, start = layer(x, mask), 0
        for size in sizes:
            alone = layer(x[:, start : start + size], causal_mask(torch.zeros(1, size, dtype=torch.long)))
            assert torch.allclose(alone, whole[:, start : start + size], atol=1e-5)
            changed = x.clone()
            changed[:, start + size - 1] += 10
            others = torch.arange(x.shape[1]) != start + size - 1
            assert torch.allclose(layer(changed, mask)[:, others], whole[:, others], atol=1e-5)
            start += size


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\)"):
        attention(*drawn(0, (2, 3), (2, 3), (2, 3)), dropout=1.0)
    with pytest.raises(ValueError, match="rate must not be negative"):
        LowHighPass(4, rate=-1)
