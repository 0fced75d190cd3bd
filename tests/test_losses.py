"""Losses: what must hold for any scores, grades and batches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ecomrec.model.losses import choice_loss, clicks_loss, distillation_loss, graded_loss, in_batch_loss

for_any = settings(deadline=None, max_examples=40)
seeds, few, temperatures = st.integers(0, 2**31), st.integers(1, 6), st.floats(0.2, 5)


def close(a: Tensor, b: Tensor | float) -> bool:
    return torch.allclose(a, torch.as_tensor(b, dtype=a.dtype), atol=1e-9)


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) * 2 for shape in shapes]


def some_grades(seed: int, lists: int, candidates: int) -> Tensor:
    """Grades 0 to 3 with at least one gain in the first list."""
    grades = torch.randint(0, 4, (lists, candidates), generator=torch.Generator().manual_seed(seed))
    grades[0, 0] = 2
    return grades


def pad(values: Tensor, filler: float) -> Tensor:
    """Two more columns and one more row that hold nothing but the filler."""
    return torch.nn.functional.pad(values, (0, 2, 0, 1), value=filler)


@given(few, st.integers(0, 4), temperatures, seeds)
@for_any
def test_in_batch_loss_is_the_loop(batch, extra, temperature, seed):
    queries, items, log_q, coin = drawn(seed, (batch, 3), (batch + extra, 3), (batch + extra,), (batch, batch + extra))
    same = (coin > 1).fill_diagonal_(False)
    losses = []
    for i in range(batch):
        candidates = [j for j in range(batch + extra) if not same[i, j]]
        terms = {j: math.exp(float(queries[i] @ items[j]) / temperature - float(log_q[j])) for j in candidates}
        losses.append(-math.log(terms[i] / sum(terms.values())))
    assert close(in_batch_loss(queries, items, temperature, log_q, same), sum(losses) / batch)


@given(few, st.integers(0, 4), temperatures, seeds)
@for_any
def test_in_batch_loss_does_not_see_order_or_constants(batch, extra, temperature, seed):
    queries, items, log_q, shift = drawn(seed, (batch, 3), (batch + extra, 3), (batch + extra,), (3,))
    loss = in_batch_loss(queries, items, temperature, log_q)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([order, torch.arange(batch, batch + extra).flip(0)])
    assert close(in_batch_loss(queries[order], items[both], temperature, log_q[both]), loss)
    assert close(in_batch_loss(queries, items + shift, temperature, log_q + 3), loss)
    assert close(in_batch_loss(queries * 0, items, temperature), math.log(batch + extra))


@given(few, st.integers(1, 4), temperatures, seeds)
@for_any
def test_candidates_taken_out_of_a_batch_do_not_exist(batch, extra, temperature, seed):
    queries, items, log_q = drawn(seed, (batch, 3), (batch + extra, 3), (batch + extra,))
    items.requires_grad_(), queries.requires_grad_()
    same = torch.zeros(batch, batch + extra, dtype=torch.bool)
    same[:, batch:] = True
    loss = in_batch_loss(queries, items, temperature, log_q, same)
    assert close(loss, in_batch_loss(queries, items[:batch], temperature, log_q[:batch]))
    loss.backward()
    assert torch.isfinite(items.grad).all() and torch.isfinite(queries.grad).all() and (items.grad[batch:] == 0).all()


@given(st.integers(2, 6), seeds)
@for_any
def test_log_q_makes_a_sample_right_on_average(n_items, seed):
    """One drawn by p and two by q, each case with its exact probability: only with log q is the truth the minimum."""
    p, q = torch.softmax(torch.stack(drawn(seed, (n_items,), (n_items,))), dim=1)
    cases = torch.cartesian_prod(*[torch.arange(n_items)] * 3)
    probability = p[cases[:, 0]] * q[cases[:, 1]] * q[cases[:, 2]]
    gradients = []
    for correction, utility in [(q.log(), p.log()), (q.log() * 0, p.log()), (q.log() * 0, p.log() - q.log())]:
        utility.requires_grad_()
        first = torch.zeros(len(cases), dtype=torch.long)
        loss = choice_loss(utility[cases] - correction[cases], first, probability)
        gradients.append(torch.autograd.grad(loss, utility)[0].abs().max())
    assert gradients[0] < 1e-9 and gradients[2] < 1e-9 < gradients[1]


def test_batches_without_meaning_are_refused():
    one = torch.ones(2, 3)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be positive"):
            in_batch_loss(one, one, temperature)
        with pytest.raises(ValueError, match="temperature must be positive"):
            distillation_loss(one, one, temperature)
    with pytest.raises(ValueError, match="2 queries need an item each"):
        in_batch_loss(one, one[:1])
    for value in (-torch.inf, torch.inf, torch.nan):
        with pytest.raises(ValueError, match="log_q"):
            in_batch_loss(one, one, log_q=torch.tensor([0.0, value]))
    with pytest.raises(ValueError, match="row 0: the chosen candidate 0 was not offered"):
        in_batch_loss(one, one, same=torch.eye(2, dtype=torch.bool))


@given(few, st.integers(2, 7), seeds)
@for_any
def test_graded_loss_is_the_loop_and_never_below_the_entropy(lists, candidates, seed):
    (scores,), grades = drawn(seed, (lists, candidates)), some_grades(seed, lists, candidates)
    losses, entropies = [], []
    for row, row_grades in zip(scores.tolist(), grades.tolist()):
        gains, total = [2**grade - 1 for grade in row_grades], sum(math.exp(s) for s in row)
        target = [gain / sum(gains) for gain in gains] if sum(gains) else []
        if target:
            losses.append(-sum(t * math.log(math.exp(s) / total) for t, s in zip(target, row)))
            entropies.append(-sum(t * math.log(t) for t in target if t))
    loss = graded_loss(scores, grades)
    assert close(loss, sum(losses) / len(losses)) and loss >= sum(entropies) / len(entropies) - 1e-9
    ideal = (torch.exp2(grades.double()) - 1).log().clamp_min(-60)
    assert close(graded_loss(ideal, grades), sum(entropies) / len(entropies))


@given(few, st.integers(2, 7), seeds)
@for_any
def test_graded_loss_does_not_see_order_constants_or_padding(lists, candidates, seed):
    (scores, shift), grades = drawn(seed, (lists, candidates), (lists, 1)), some_grades(seed, lists, candidates)
    loss = graded_loss(scores, grades)
    order = torch.randperm(candidates, generator=torch.Generator().manual_seed(seed))
    assert close(graded_loss(scores[:, order].flip(0), grades[:, order].flip(0)), loss)
    assert close(graded_loss(scores + shift, grades), loss)
    assert close(graded_loss(torch.zeros_like(scores), grades), math.log(candidates))
    assert close(graded_loss(scores, grades.double()), loss)
    padded = pad(scores, -torch.inf).requires_grad_()
    padded_loss = graded_loss(padded, pad(grades, 0))
    padded_loss.backward()
    assert close(padded_loss, loss)
    assert torch.isfinite(padded.grad).all() and (padded.grad[:, candidates:] == 0).all()


@given(few, st.integers(2, 7), seeds)
@for_any
def test_gradient_of_graded_lists_is_model_minus_target(lists, candidates, seed):
    (scores,), grades = drawn(seed, (lists, candidates)), some_grades(seed, lists, candidates)
    gain = torch.exp2(grades.double()) - 1
    counted = gain.sum(dim=1) > 0
    expected = torch.zeros_like(scores)
    difference = torch.softmax(scores, dim=1)[counted] - gain[counted] / gain[counted].sum(dim=1, keepdim=True)
    expected[counted] = difference / counted.sum()
    assert close(torch.autograd.grad(graded_loss(scores.requires_grad_(), grades), scores)[0], expected)


@given(few, st.integers(2, 7), st.integers(1, 4), seeds)
@for_any
def test_one_relevant_product_in_a_list_is_a_choice(lists, candidates, grade, seed):
    scores, other = drawn(seed, (lists, candidates), (lists, candidates))
    chosen = other.argmax(dim=1)
    grades = torch.nn.functional.one_hot(chosen, candidates) * grade
    assert close(graded_loss(scores, grades), choice_loss(scores, chosen))


def test_grades_without_meaning_are_refused():
    scores = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 1.0, 2.0]])
    with pytest.raises(ValueError, match="row 0: the clicked candidate 2 was not offered"):
        graded_loss(scores, torch.tensor([[0, 0, 1], [1, 0, 0]]))
    for grades in ([[0, 0, 0], [0, 0, 0]], [[1, -1, 0], [1, 0, 0]]):
        with pytest.raises(ValueError, match="none may be negative, and at least one must be above 0"):
            graded_loss(scores, torch.tensor(grades))
    for grade in (torch.nan, torch.inf, 2000.0):
        with pytest.raises(ValueError, match="finite"):
            graded_loss(scores, torch.tensor([[1.0, 0.0, 0.0], [grade, 0.0, 0.0]]))


@given(few, st.integers(2, 7), temperatures, seeds)
@for_any
def test_distillation_loss_is_the_divergence_of_the_authority(lists, candidates, temperature, seed):
    scores, teacher = drawn(seed, (lists, candidates), (lists, candidates))
    student, master = (torch.log_softmax(s / temperature, dim=1) for s in (scores, teacher))
    authority = torch.nn.functional.kl_div(student, master, reduction="batchmean", log_target=True)
    loss = distillation_loss(scores.requires_grad_(), teacher.requires_grad_(), temperature)
    assert loss >= 0 and close(loss, temperature**2 * authority)
    loss.backward()
    assert close(scores.grad, temperature * (student.exp() - master.exp()) / lists) and teacher.grad is None


@given(few, st.integers(2, 7), temperatures, seeds)
@for_any
def test_distillation_loss_does_not_see_order_constants_or_padding(lists, candidates, temperature, seed):
    scores, teacher, shift = drawn(seed, (lists, candidates), (lists, candidates), (lists, 1))
    loss = distillation_loss(scores, teacher, temperature)
    order = torch.randperm(candidates, generator=torch.Generator().manual_seed(seed))
    assert close(distillation_loss(scores[:, order].flip(0), teacher[:, order].flip(0), temperature), loss)
    assert close(distillation_loss(scores + shift, teacher - shift, temperature), loss)
    assert close(distillation_loss(teacher + shift, teacher, temperature), 0.0)
    padded = pad(scores, -torch.inf).requires_grad_()
    padded_loss = distillation_loss(padded, pad(teacher, -torch.inf), temperature)
    padded_loss.backward()
    assert close(padded_loss, loss)
    assert torch.isfinite(padded.grad).all() and (padded.grad[:, candidates:] == 0).all()


@given(few, st.integers(2, 7), seeds)
@for_any
def test_a_hot_teacher_is_least_squares_and_a_cold_one_a_choice(lists, candidates, seed):
    scores, teacher = drawn(seed, (lists, candidates), (lists, candidates))
    half_variance = (scores - teacher).var(dim=1, correction=0).mean() / 2
    assert torch.allclose(distillation_loss(scores, teacher, 1e3), half_variance, rtol=0.02, atol=1e-5)
    sure = torch.nn.functional.one_hot(teacher.argmax(dim=1), candidates) * 200.0
    assert close(distillation_loss(scores, sure.double()), choice_loss(scores, teacher.argmax(dim=1)))


@given(few, st.integers(2, 7), seeds)
@for_any
def test_one_loss_stands_behind_all(lists, candidates, seed):
    """Graded, distilled and clicked pages agree where they say the same."""
    (scores,), grades = drawn(seed, (lists, candidates)), some_grades(seed, lists, candidates)
    grades[:, 0] = 1
    gain = torch.exp2(grades.double()) - 1
    target = gain / gain.sum(dim=1, keepdim=True)
    assert close(graded_loss(scores, grades), clicks_loss(scores, target))
    offered = gain > 0
    closed = scores.masked_fill(~offered, -torch.inf)
    entropy = graded_loss(gain.log(), grades)
    assert close(distillation_loss(closed, gain.log()) + entropy, graded_loss(closed, grades))


def test_student_and_teacher_must_see_the_same_candidates():
    both = torch.zeros(2, 3)
    one = both.clone()
    one[1, 2] = -torch.inf
    for pair in ((both, one), (one, both)):
        with pytest.raises(ValueError, match="row 1: candidate 2 was offered to only one"):
            distillation_loss(*pair)
    for teacher in (torch.full((2, 3), torch.nan), torch.full((2, 3), torch.inf)):
        with pytest.raises(ValueError, match="finite"):
            distillation_loss(both, teacher)
    with pytest.raises(ValueError, match="sum positive"):
        distillation_loss(both - torch.inf, both - torch.inf)
