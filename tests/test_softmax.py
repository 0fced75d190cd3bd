"""The softmax over the catalogue: the plain loss, whatever the pieces, the weights and the precision."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ecomrec.model.softmax import catalogue_loss, sampled_loss

for_any = settings(deadline=None, max_examples=40)
seeds, few = st.integers(0, 2**31), st.integers(1, 9)


def drawn(seed: int, positions: int, items: int, dim: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shoppers, vectors = torch.randn(positions, dim, generator=generator, dtype=dtype), torch.randn(items, dim, generator=generator, dtype=dtype)
    weight = torch.rand(positions, generator=generator, dtype=dtype)
    weight[0] += 0.1
    return shoppers.requires_grad_(), vectors.requires_grad_(), torch.randint(items, (positions,), generator=generator), weight


@given(few, few, few, few, seeds)
@for_any
def test_it_is_the_plain_loss_with_its_gradients(positions, items, dim, chunk, seed):
    shoppers, vectors, chosen, weight = drawn(seed, positions, items, dim)
    plain = (weight * F.cross_entropy(shoppers @ vectors.T, chosen, reduction="none")).sum() / weight.sum()
    expected = torch.autograd.grad(3 * plain, [shoppers, vectors])
    loss = catalogue_loss(shoppers, vectors, chosen, weight, chunk=chunk)
    found = torch.autograd.grad(3 * loss, [shoppers, vectors])
    assert math.isclose(float(loss.detach()), float(plain.detach()), rel_tol=1e-9, abs_tol=1e-9)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(found, expected))


@given(few, few, few, few, few, seeds)
@for_any
def test_what_is_added_to_some_scores_stands_where_it_belongs(positions, items, dim, chunk, n_added, seed):
    shoppers, vectors, chosen, weight = drawn(seed, positions, items, dim)
    generator = torch.Generator().manual_seed(seed)
    added = torch.randn(positions, n_added, generator=generator, dtype=torch.float64, requires_grad=True)
    at = torch.randint(items, (positions, n_added), generator=generator)
    plain = F.cross_entropy((shoppers @ vectors.T).scatter_add(1, at, added), chosen, reduction="none")
    expected = torch.autograd.grad((weight * plain).sum() / weight.sum(), [shoppers, vectors, added])
    found = torch.autograd.grad(catalogue_loss(shoppers, vectors, chosen, weight, chunk=chunk, extra=(added, at)), [shoppers, vectors, added])
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(found, expected))


@given(st.integers(32, 300), st.integers(50, 3000), seeds)
@settings(deadline=None, max_examples=15)
def test_half_the_bits_stay_within_the_stated_bounds(positions, items, seed):
    shoppers, vectors, chosen, _ = drawn(seed, positions, items, 32, torch.float32)
    vectors = (vectors.detach() * 0.4).requires_grad_()
    plain = F.cross_entropy(shoppers @ vectors.T, chosen)
    expected = torch.autograd.grad(plain, [shoppers, vectors])
    half = catalogue_loss(shoppers, vectors, chosen, precision="bfloat16")
    found = torch.autograd.grad(half, [shoppers, vectors])
    assert abs(half.item() - plain.item()) < 0.01
    assert all((a - b).norm() <= 0.02 * b.norm() + 1e-6 for a, b in zip(found, expected))


def test_half_the_bits_weigh_and_add_as_all_of_them_do():
    """Seven positions, which are filled up to a round number inside."""
    torch.manual_seed(0)
    tables = [torch.randn(7, 8), torch.randn(20, 8) * 0.4, torch.randn(7, 2)]
    chosen, weight, at = torch.arange(7), torch.rand(7) + 0.5, torch.randint(20, (7, 2))
    found = {}
    for precision in ("float32", "bfloat16"):
        shoppers, vectors, added = (table.clone().requires_grad_() for table in tables)
        loss = catalogue_loss(shoppers, vectors, chosen, weight, precision, extra=(added, at))
        found[precision] = [loss.detach(), *torch.autograd.grad(loss, [shoppers, vectors, added])]
    for half, exact in zip(found["bfloat16"], found["float32"]):
        assert half.shape == exact.shape and (half - exact).norm() <= 0.02 * exact.norm()


def test_an_item_that_cannot_be_reached_gives_a_finite_loss():
    loss = catalogue_loss(torch.tensor([[200.0]]), torch.tensor([[1.0], [-1.0]]), torch.tensor([1]), precision="bfloat16")
    assert math.isfinite(float(loss)) and float(loss) > 50


def test_nonsense_is_refused():
    z, v, y = torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"shoppers must be \(positions, dim\)"):
        catalogue_loss(z[:, :2], v, y)
    with pytest.raises(ValueError, match=r"extra: two tables \(positions, some\), with 2 positions"):
        catalogue_loss(z, v, y, extra=(torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.long)))
    with pytest.raises(ValueError, match="their sum positive"):
        catalogue_loss(z, v, y, weight=torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="chosen: between -1 and 1"):
        catalogue_loss(z, v, torch.tensor([-1, 1]))


def test_the_sampled_gradient_is_the_full_one_on_average():
    shoppers, vectors, chosen, _ = drawn(0, 64, 30, 4, torch.float32)
    exact, = torch.autograd.grad(catalogue_loss(shoppers, vectors, chosen, precision="float32"), [shoppers])
    q = torch.softmax(torch.randn(30, generator=torch.Generator().manual_seed(1)), dim=0)
    generator, total = torch.Generator().manual_seed(2), 0
    for _ in range(200):
        sample = torch.multinomial(q, 300, replacement=True, generator=generator)
        total = total + torch.autograd.grad(sampled_loss(shoppers, vectors, chosen, sample, q.log()), [shoppers])[0] / 200
    assert F.cosine_similarity(total.flatten(), exact.flatten(), 0) > 0.99
