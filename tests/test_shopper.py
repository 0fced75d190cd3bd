"""The shopper: packing loses and mixes nothing; new items and new users have a place; saved is loaded."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from test_sequences import whole_of

from ecomrec.data.artefacts import ArtefactError
from ecomrec.data.sequences import Questions, Sequences, Split, cut_in_time, leave_last_out
from ecomrec.model.baselines import rank_metrics, target_ranks
from ecomrec.model.shopper import Shopper, ShopperConfig, config_of, gap_code, pack, pieces_of, tokens_of, train_shopper, trend_of
from ecomrec.model.training import Schedule

for_any = settings(deadline=None, max_examples=40)
histories = st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=6)
PLAIN = ShopperConfig(n_items=10, dim=8)


@given(histories, st.integers(2, 7))
@for_any
def test_every_target_is_taught_once_whatever_the_length_of_a_row(lists, length):
    stream = tokens_of(whole_of(lists), None, PLAIN)
    pieces = pieces_of(stream, length, to_last=False)
    token, slot, piece, from_end = pack(pieces, length)
    assert len(set(slot)) == len(slot) and len(set(token)) == len(token)
    assert sorted(stream["target"].to_numpy()[token][stream["target"].to_numpy()[token] >= 0]) == sorted(item for history in lists for item in history[1:])
    for number in range(len(pieces)):
        places = slot[piece == number]
        assert (np.diff(places) == 1).all() and places[0] // length == places[-1] // length
        assert from_end[piece == number].tolist() == list(range(len(places) - 1, -1, -1))
    last = pieces_of(stream, length, to_last=True)
    assert len(last) == sum(bool(history) for history in lists) and (last["size"] == [min(len(h), length) for h in lists if h]).all()


@given(histories, st.integers(0, 99))
@for_any
def test_scores_do_not_depend_on_who_else_asks(lists, seed):
    whole = whole_of(lists)
    torch.manual_seed(seed)
    model = Shopper(replace(PLAIN, length=6)).eval()
    asked = Questions(whole, np.zeros(0, int), np.zeros(0, int))
    together = model.scores(asked)
    alone = np.concatenate([model.scores(asked.take(np.array([row]))) for row in range(len(lists))])
    assert np.allclose(together, alone, atol=1e-5)
    assert np.allclose(together, model.scores(replace(asked, history=whole.last(6))), atol=1e-5)


@given(histories, st.integers(0, 99))
@for_any
def test_a_later_event_changes_no_earlier_target(lists, seed):
    whole = whole_of(lists, times=True, seed=seed)
    config = replace(PLAIN, times=True, start=True)
    one = tokens_of(whole, None, config)
    dropped = whole.keep(whole.from_end > 0)
    other = tokens_of(dropped, None, config)
    for row, history in enumerate(lists):
        if len(history) > 1:
            assert one[one["user"] == row]["target"].tolist()[: len(history) - 1] == other[other["user"] == row]["target"].tolist()[: len(history) - 1]


def test_ten_thousand_events_one_event_and_none():
    lists = [np.arange(10_000) % 10, [3], []]
    whole = whole_of([list(map(int, history)) for history in lists])
    split = Split(whole, Questions(whole, np.zeros(0, int), np.zeros(0, int)), Questions(whole, np.array([0, 1, 2]), np.array([0, 4, 5])))
    model, log = train_shopper(split, config_of(whole, dim=8, start=True), Schedule(epochs=2), masked=False, progress=False)
    scores = model.scores(split.test)
    assert np.isfinite(scores).all() and log["loss"].iloc[-1] < np.log(10) and log["valid"].isna().all()
    with pytest.raises(ValueError, match="nothing to learn from, no history of 1 has two events"):
        train_shopper(replace(split, train=whole.take([1])), config_of(whole, dim=8), progress=False)


def test_it_learns_who_follows_whom_and_counts_cannot_be_fooled_by_shuffled_targets():
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 10, 300)
    lists = [[int(s + step) % 10 for step in range(6)] for s in starts]  # after i comes i + 1
    split = leave_last_out(whole_of(lists))
    model, _ = train_shopper(split, config_of(split.train, dim=16, dropout=0.1), Schedule(epochs=15, average=0.9, learning_rate=0.01, patience=15), rows_per_batch=2, progress=False)
    assert rank_metrics(target_ranks(model.scores, split.test, True), split.test, (1,))["recall@1"].mean() > 0.95
    shuffled = replace(split.test, target=rng.permutation(split.test.target))
    assert rank_metrics(target_ranks(model.scores, shuffled, False), shuffled, (1,))["recall@1"].mean() < 0.25


def test_queries_contexts_and_profiles_are_read():
    """The item is decided by the query in half of the requests, by the profile in the others."""
    rng = np.random.default_rng(0)
    n, per = 300, 4
    likes, query = rng.integers(0, 5, n), np.full((n, per, 2), -1)
    query[:, :, 0] = rng.integers(-1, 5, (n, per))
    items = np.full((n, per, 2), -1)
    items[:, :, 1] = np.where(query[:, :, 0] >= 0, query[:, :, 0], likes[:, None] + 5)
    context = rng.normal(size=(n, per, 2, 2)).astype(np.float32)
    shown = slice(per - 1)
    train = Sequences(
        items[:, shown].ravel(), np.arange(n + 1) * 2 * (per - 1), np.arange(n).astype(str).astype(object), np.arange(10).astype(str).astype(object),
        query=query[:, shown].ravel(), query_vectors=np.eye(5, dtype=np.float32), profile=np.eye(5, dtype=np.float32)[likes], context=context[:, shown].reshape(-1, 2),
    )
    test = Questions(train, np.arange(n), items[:, -1, 1], query=query[:, -1, 0], context=context[:, -1, 0])
    split = Split(train, test.take(np.arange(20)), test)
    model, _ = train_shopper(split, config_of(train, dim=16, dropout=0.1), Schedule(epochs=15, average=0.9, learning_rate=0.01, patience=15), masked=False, rows_per_batch=4, progress=False)
    assert rank_metrics(target_ranks(model.scores, test, False), test, (1,))["recall@1"].mean() > 0.95
    strangers = replace(test, history=train.keep(np.zeros(len(train.items), bool)))
    assert rank_metrics(target_ranks(model.scores, strangers, False), strangers, (1,))["recall@1"].mean() > 0.95, "new users, from the first moment"


def of_pages(page: np.ndarray, clicks: np.ndarray, n_items: int) -> Sequences:
    """One user a page, who asked for it and did nothing else."""
    n = len(page)
    users, items = np.arange(n).astype(str).astype(object), np.arange(n_items).astype(str).astype(object)
    return Sequences(np.full(n, -1), np.arange(n + 1), users, items, page=page, clicks=clicks.astype(np.float32), context=np.ones((n, 1), np.float32))


def test_a_click_is_drawn_as_often_as_it_weighs():
    whole = of_pages(np.array([[4, 2, -1], [1, 3, 5]]), np.array([[1, 3, 0], [0, 0, 0]]), 6)
    drawn = np.array([tokens_of(whole, None, replace(PLAIN, context=1), seed)["target"] for seed in range(2000)])
    assert (drawn[:, 1] == -1).all() and set(drawn[:, 0]) == {2, 4}
    assert abs((drawn[:, 0] == 2).mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 2000)


def test_exposure_takes_back_what_the_old_ranking_added():
    """Two things are liked alike; the old ranking puts the first on top in nine of ten pages, and the second place is looked at a fourth as often."""
    rng = np.random.default_rng(0)
    n, looked = 20_000, np.array([1.0, 0.25])
    page = np.where(rng.random((n, 1)) < 0.9, [[0, 1]], [[1, 0]])
    clicks = (rng.random((n, 2)) < 0.3 * looked) * 1.0
    whole = of_pages(page, clicks, 4)
    nobody = Questions(whole.take(np.arange(1)), np.arange(0), np.arange(0), context=np.ones((1, 1), np.float32))
    apart = {}
    for name, exposure in {"naive": (), "corrected": tuple(looked / 0.01)}.items():
        split = Split(whole, nobody, nobody)
        model, _ = train_shopper(split, config_of(whole, dim=8, dropout=0.0, layers=1, exposure=exposure), Schedule(epochs=12, learning_rate=0.02, average=0.9), masked=False, rows_per_batch=8, progress=False)
        scores = model.scores(nobody)[0]
        apart[name] = scores[0] - scores[1]
    assert abs(apart["corrected"]) < 0.15 and apart["naive"] > 0.8, apart
    short = config_of(whole, dim=8, exposure=(1.0,))
    with pytest.raises(ValueError, match="exposure: 1 places, and pages have up to 2"):
        train_shopper(split, short, masked=False, progress=False)


@given(histories, st.integers(0, 99))
@for_any
def test_where_visits_are_known_the_target_is_one_of_the_next_visit(lists, seed):
    rng = np.random.default_rng(seed)
    whole = whole_of(lists, times=True, seed=seed)
    whole = replace(whole, session=rng.integers(0, 2, len(whole.items)).cumsum())
    visit, begins = whole.visits
    assert begins[0] == 0 and begins[-1] == len(whole.items) and (np.diff(begins) > 0).all()
    stream = tokens_of(whole, None, replace(PLAIN, times=True), seed)
    assert stream["item"].tolist() == whole.items.tolist()
    for place, (target, gap) in enumerate(zip(stream["target"], stream["gap"])):
        following = [other for other in range(len(whole.items)) if visit[other] == visit[place] + 1 and whole.user[other] == whole.user[place]]
        assert target in whole.items[following] if following else target == -1
        assert gap == gap_code(np.array([whole.ts[following[0]] - whole.ts[place] if following else 0]))[0]


def test_habits_are_learned_where_the_same_things_are_taken_again():
    """Everybody has one thing that she takes each time, and what else she takes is chance."""
    rng = np.random.default_rng(0)
    lists = [[item for _ in range(6) for item in (int(own), int(rng.integers(10, 30)))] for own in rng.integers(0, 10, 200)]
    whole = whole_of(lists)
    whole = replace(whole, item_ids=np.arange(30).astype(str).astype(object), session=np.arange(len(whole.items)) // 2)
    split = leave_last_out(whole)
    own = np.array([history[0] for history in lists])
    config = config_of(split.train, dim=16, dropout=0.1)
    assert config.habit and split.train.repeats > 0.4
    schedule = Schedule(epochs=8, average=0.9, learning_rate=0.01, patience=8)
    with_habit, _ = train_shopper(split, config, schedule, masked=False, rows_per_batch=4, progress=False)
    scores = with_habit.scores(split.test)
    assert (scores.argmax(axis=1) == own).mean() > 0.95
    assert np.allclose(with_habit.scores(split.test, np.tile(np.arange(30), (200, 1))), scores, atol=1e-4)


def test_what_another_process_lends_is_read_and_never_written():
    attributes = csr_array(np.eye(10, 3, dtype=np.float32))
    attributes.indices, attributes.indptr = attributes.indices.astype(np.int64), attributes.indptr.astype(np.int64)
    for part in (attributes.indices, attributes.indptr, attributes.data):
        part.flags.writeable = False  # as a file in shared memory is; writing there kills the process
    items = Shopper(ShopperConfig(n_items=10, n_attributes=3, dim=8), attributes).items
    assert not np.shares_memory(items.attribute_of.numpy(), attributes.indices) and not np.shares_memory(items.attribute_starts.numpy(), attributes.indptr)


def test_the_trend_knows_the_week_and_nothing_later():
    week = 7 * 86_400_000
    lists = [[0, 1, 2, 3] for _ in range(60)]  # everybody takes 0 in the first week, 1 in the second and so on
    whole = replace(whole_of(lists), ts=np.tile(np.arange(4), 60) * 10 * week)
    found = trend_of(whole)
    assert found["shares"].shape == (32, 10) and found["clock"].tolist() == [0, week]
    assert [found["shares"][row].argmax() for row in (5, 15, 25, 31)] == [0, 1, 2, 3]
    split = cut_in_time(whole, 15 * week, 25 * week)
    model, _ = train_shopper(split, config_of(split.train, dim=8, start=True), Schedule(epochs=2), masked=False, rows_per_batch=4, progress=False)
    asked = replace(split.test, ts=np.zeros(60, np.int64))
    assert model.config.trend == len(trend_of(split.train)["shares"]) == 22 and not np.allclose(model.scores(asked), model.scores(split.test), atol=1e-2)
    with pytest.raises(ValueError, match="trend is 3, see ShopperConfig"):
        ShopperConfig(n_items=10, trend=3)


def test_no_row_of_the_trend_moves_with_what_is_sold_after_it():
    rng, week = np.random.default_rng(0), 7 * 86_400_000
    whole = whole_of([rng.integers(0, 10, 50).tolist() for _ in range(40)])
    whole = replace(whole, ts=np.tile(np.arange(50), 40) * week)
    before = whole.keep(whole.ts < 30 * week)
    assert np.array_equal(trend_of(before)["shares"], trend_of(whole)["shares"][:31])


def test_the_order_of_a_receipt_says_nothing_of_the_target_that_is_drawn():
    """Two things of one moment, then two in a row: each of the first is followed by each of the second as often."""
    whole = replace(whole_of([[0, 1, 2, 3]]), ts=np.array([0, 0, 10, 20]), session=np.array([0, 0, 1, 1]))
    config, nothing = ShopperConfig(n_items=10, times=True, dim=8), leave_last_out(whole_of([[1, 2, 3]])).valid.take(np.arange(0))
    drawn = []

    def follow(history, asked, sizes, seed):
        found = tokens_of(history, asked, sizes, seed)
        drawn.append(found.set_index("item")["target"].loc[[0, 1]].to_numpy())
        return found

    with patch("ecomrec.model.shopper.tokens_of", follow):
        train_shopper(Split(whole, nothing, nothing), config, Schedule(epochs=400, average=0.0, patience=400), progress=False)
    early = (np.array(drawn) == 2).mean(axis=0)
    assert np.abs(early - 0.5).max() < 0.1, "four standard deviations"


def test_another_catalogue_is_refused():
    split = leave_last_out(whole_of([[1, 2, 3, 4]] * 5))
    model, _ = train_shopper(split, config_of(split.train, dim=8), Schedule(epochs=1), progress=False)
    other = replace(split.test, history=replace(split.test.history, item_ids=split.test.history.item_ids[::-1].copy()))
    with pytest.raises(ValueError, match="its 10 item ids are not the 10 that this model learned"):
        model.scores(other)


def test_a_new_item_stands_where_its_attributes_say():
    rng = np.random.default_rng(0)
    lists = [[int(i) for i in rng.choice(np.arange(4) + 5 * side, 4)] for side in rng.integers(0, 2, 300)]  # 4 and 9 are never taken
    attributes = csr_array(np.repeat(np.eye(2, dtype=np.float32), 5, axis=0))
    split = leave_last_out(replace(whole_of(lists), attributes=attributes))
    model, _ = train_shopper(split, config_of(split.train, dim=16, dropout=0.1), Schedule(epochs=8, average=0.9, learning_rate=0.01), masked=False, rows_per_batch=4, progress=False)
    scores = model.scores(split.test)
    side = split.test.target >= 5
    assert (scores[side, 9] > scores[side, 4]).mean() > 0.95 and (scores[~side, 4] > scores[~side, 9]).mean() > 0.95
    assert torch.allclose(model.items.described(attributes[[9]]), model.items()[9:10], atol=1e-6)
    ids, _ = train_shopper(split, config_of(split.train, n_attributes=0, dim=16), Schedule(epochs=1), masked=False, progress=False)
    assert (ids.scores(split.test)[:, [4, 9]] < ids.scores(split.test)[:, :4].min()).all(), "of which nothing is known comes last"


def test_an_item_without_any_attribute_that_nobody_took_comes_last_too():
    attributes = csr_array(np.array([[1, 0]] * 5 + [[0, 1]] * 4 + [[0, 0]], np.float32))
    torch.manual_seed(0)
    model = Shopper(ShopperConfig(n_items=10, n_attributes=2, dim=8), attributes, seen=np.arange(10) < 9)
    asked = leave_last_out(whole_of([[1, 2, 3, 4]])).test
    scores = model.scores(asked)
    assert scores[0, 9] < scores[0, :9].min()


def test_a_kind_that_training_lacked_is_no_error():
    whole = replace(whole_of([[1, 2, 3, 4]] * 20), kind=np.tile([1, 1, 1, 4], 20))
    split = leave_last_out(whole)
    model, _ = train_shopper(split, config_of(split.train, dim=8), Schedule(epochs=1), progress=False)
    assert np.isfinite(model.scores(replace(split.test, history=whole))).all()


def test_a_long_history_does_not_push_out_the_profile():
    whole = replace(whole_of([[1, 2] * 40]), profile=np.zeros((1, 2), np.float32))
    torch.manual_seed(0)
    model = Shopper(ShopperConfig(n_items=10, profile=2, dim=8))
    asked = Questions(whole, np.zeros(1, int), np.zeros(1, int))
    other = replace(asked, history=replace(whole, profile=np.ones((1, 2), np.float32)))
    assert not np.allclose(model.scores(asked), model.scores(other))


def test_saved_is_loaded_and_damage_is_seen(tmp_path):
    attributes = csr_array(np.eye(10, 3, dtype=np.float32))
    text = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    config = ShopperConfig(n_items=10, n_attributes=3, text=4, dim=8)
    model = Shopper(config, attributes, text, np.arange(10) < 8).eval()
    model.save_pretrained(tmp_path / "m")
    again = Shopper.from_pretrained(tmp_path / "m")
    asked = leave_last_out(whole_of([[1, 2, 3, 4]])).test
    assert np.array_equal(model.scores(asked), again.scores(asked)) and again.config == config
    file = tmp_path / "m" / "config.json"
    file.write_text(file.read_text().replace("0.5", "0.4"))
    with pytest.raises(ArtefactError, match="config.json"):
        Shopper.from_pretrained(tmp_path / "m")


@given(st.lists(st.integers(0, 2**50), min_size=2, max_size=9))
@for_any
def test_longer_gaps_have_no_smaller_codes(gaps):
    codes = gap_code(np.sort(np.array(gaps)))
    assert (np.diff(codes) >= 0).all() and codes.min() >= 0 and codes.max() < 64


def test_a_teacher_is_learned_instead_of_the_clicks():
    """The teacher wants the second item of four twice as much as the others; the clicks say the first."""
    n = 400
    whole = of_pages(np.tile([[0, 1]], (n, 1)), np.tile([[1.0, 0.0]], (n, 1)), 4)
    nobody = Questions(whole.take(np.arange(1)), np.arange(0), np.arange(0), context=np.ones((1, 1), np.float32))
    teacher = np.tile([[0.2, 0.4, 0.2, 0.2]], (n, 1)).astype(np.float16)
    teacher[::2] = 0  # of these requests nothing is known
    config = config_of(whole, dim=8, dropout=0.0, layers=1)
    model, log = train_shopper(Split(whole, nobody, nobody), config, Schedule(epochs=30, learning_rate=0.02, average=0.9), masked=False, rows_per_batch=1, progress=False, teacher=teacher)
    learned = torch.softmax(torch.as_tensor(model.scores(nobody)[0]), 0).numpy()
    assert np.allclose(learned, [0.2, 0.4, 0.2, 0.2], atol=0.03)
    with pytest.raises(ValueError, match=r"teacher: \(3, 4\), and there are 400 requests and 4 items"):
        train_shopper(Split(whole, nobody, nobody), config, masked=False, progress=False, teacher=teacher[:3])
