"""Properties of the features: nothing at or after a request can reach it."""

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomrec.data.features import pair_features, sum_before, user_features

ITEMS = [f"i{n}" for n in range(4)]
PRODUCTS = pd.DataFrame({
    "item_id": ITEMS, "brand": ["a", "a", "b", None], "category": ["x", "y", "x", None], "price": [1.0, 20.0, None, 300.0],
    "rating": [5.0, None, 3.0, 1.0], "n_ratings": [1, 0, 50, 2], "listed_ts": [0, 0, 50, None], "snapshot_ts": [0, 90, None, 0],
    "attributes": ['{"gender": "men"}', "{}", None, '{"colour": "red"}'],
})
USERS = pd.DataFrame({"user_id": ["u0", "u1"], "age": [30.0, None], "gender": ["female", None]})
ROW = st.tuples(st.integers(0, 100), st.sampled_from(["u0", "u1", "u2", None]), st.sampled_from(ITEMS),
                st.sampled_from(["impression", "click", "cart", "purchase"]))


def _log(rows):
    frame = pd.DataFrame(rows, columns=["ts", "user_id", "item_id", "kind"])
    return frame.assign(price=9.0, quantity=1).astype({"ts": "int64", "user_id": "str", "item_id": "str", "kind": "str"})


def _features(log, ts):
    requests = pd.DataFrame({"user_id": ["u0", None], "ts": [ts, ts], "device": ["phone", None]})
    return pair_features(requests, np.tile(np.arange(4), (2, 1)), PRODUCTS, USERS, log)[0]


@settings(max_examples=25)
@given(st.lists(ROW, max_size=30), st.lists(ROW, max_size=10), st.integers(0, 100))
def test_no_event_at_or_after_a_request_reaches_it(rows, later, ts):
    log = _log(rows)
    changed = _log([row for row in rows if row[0] < ts] + [(t + ts, *rest) for t, *rest in later])
    assert np.array_equal(_features(log[log["ts"] < ts], ts), _features(changed, ts))
    pd.testing.assert_frame_equal(*(
        user_features(USERS, part, PRODUCTS, pd.DataFrame({"user_id": ["u0", "u2"], "ts": [ts, ts]})) for part in (log[log["ts"] < ts], changed)
    ))


@settings(max_examples=10)
@given(st.lists(ROW, min_size=1, max_size=30), st.randoms())
def test_the_order_of_the_file_does_not_matter(rows, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert np.allclose(_features(_log(rows), 50), _features(_log(shuffled), 50), atol=1e-6)


@settings(max_examples=50)
@given(st.lists(ROW, max_size=30), st.lists(st.tuples(st.integers(0, 101), st.sampled_from(ITEMS)), min_size=1, max_size=10))
def test_a_running_sum_is_the_definition(rows, moments):
    log, at = _log(rows), pd.DataFrame(moments, columns=["ts", "item_id"])
    expected = [sum(row[0] < ts and row[2] == item for row in rows) for ts, item in moments]
    assert sum_before(log, at, ["item_id"]).tolist() == expected


def test_features_are_finite_whatever_is_unknown():
    bare = PRODUCTS.assign(price=np.nan, rating=np.nan, n_ratings=None, listed_ts=None, brand=None, category=None, attributes=None)
    requests = pd.DataFrame({"user_id": [None, "new"], "ts": [5, 5], "device": [None, None]})
    values, names = pair_features(requests, np.zeros((2, 3), dtype=int), bare, USERS, _log([]))
    assert np.isfinite(values).all() and values.shape == (2, 3, len(names))


def test_a_later_snapshot_does_not_reach_an_earlier_request():
    requests = pd.DataFrame({"user_id": ["u0"], "ts": [5], "device": [None]})
    changed = PRODUCTS.assign(snapshot_ts=6, rating=[1.0, 2.0, 3.0, 4.0], n_ratings=[5, 6, 7, 8])
    one, names = pair_features(requests, np.arange(4)[None], PRODUCTS.assign(snapshot_ts=6), USERS, _log([]))
    two, _ = pair_features(requests, np.arange(4)[None], changed, USERS, _log([]))
    read = [names.index(name) for name in ("log_votes", "price_level", "dearer", "phone_level")]
    assert np.array_equal(one[..., read], two[..., read]) and np.ptp(two[0, :, names.index("rating")]) == 0


def test_attributes_that_name_no_gender_are_read_all_the_same():
    said = ["color:red|size:2", '["a"]', '{"gender": ["men"]}', '{"gender": "men"}']
    requests = pd.DataFrame({"user_id": ["u0"], "ts": [5], "device": [None]})
    values, names = pair_features(requests, np.arange(4)[None], PRODUCTS.assign(attributes=said), USERS, _log([]))
    assert values[0, :, names.index("other_gender")].tolist() == [0, 0, 0, 1]


def test_an_anonymous_shopper_owns_no_past():
    log = _log([(1, None, "i0", "click"), (2, None, "i0", "purchase")])
    values, names = pair_features(pd.DataFrame({"user_id": [None], "ts": [9], "device": [None]}), np.array([[0]]), PRODUCTS, USERS, log)
    got = dict(zip(names, values[0, 0]))
    assert got["seen"] == 0 and got["brand_taste"] == 0 and got["popularity"] > 0
