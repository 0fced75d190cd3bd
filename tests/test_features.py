"""Properties of the features: nothing at or after a request can reach it, on any engine, alone or in a batch."""

import duckdb
import narwhals as nw
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomrec.data.features import CONTEXT, FEATURES, encoder, examples, feature_table, pair_features, requests_of
from ecomrec.data.relations import forget, to_pandas
from ecomrec.data.tables import TableError

HOUR = 3_600_000
NOW = 20 * 24 * HOUR + 5 * HOUR  # a request of day 20
ITEMS = [f"i{n}" for n in range(4)]
PRODUCTS = pd.DataFrame({
    "item_id": ITEMS, "brand": ["a", "a", "b", None], "category": ["x", "y", "x", None], "price": [1.0, 20.0, None, 300.0],
    "rating": [5.0, None, 3.0, 1.0], "n_ratings": [1, 0, 50, 2], "listed_ts": [0, 0, 50, None], "snapshot_ts": [0, 18 * 24 * HOUR, None, NOW + 5],
    "attributes": ['{"gender": "men"}', "{}", None, '{"colour": "red"}'],
})
USERS = pd.DataFrame({"user_id": ["u0", "u1"], "age": [30.0, None], "gender": ["female", None], "region": ["GB", None], "joined_ts": [0, NOW + HOUR]})
REQUESTS = pd.DataFrame({"request_id": ["p0", "p1", "p2"], "ts": NOW, "user_id": ["u0", None, "u2"], "query": ["q", "q", None], "device": ["phone", None, "desktop"]})
PAIRS = REQUESTS[["request_id"]].merge(PRODUCTS[["item_id"]], how="cross")
KINDS = ["search", "impression", "click", "cart", "purchase", "return", "rating"]
ROW = st.tuples(
    st.integers(-40 * HOUR, 60 * HOUR), st.sampled_from(["u0", "u1", "u2", None]), st.sampled_from(ITEMS), st.sampled_from(KINDS),
    st.sampled_from(["p0", "p1", "other"]), st.sampled_from(["q", "r", None]), st.sampled_from([None, 2.5, 80.0]), st.sampled_from([None, 1.0, 4.5]),
)


def log_of(rows):
    frame = pd.DataFrame(rows, columns=["ts", "user_id", "item_id", "kind", "request_id", "query", "price", "stars"])
    texts = {name: "str" for name in ("user_id", "item_id", "kind", "request_id", "query")}
    frame = frame.assign(ts=frame["ts"].astype("int64") + NOW, quantity=1, event_id=[f"e{i}" for i in range(len(frame))])
    return frame.astype(texts | {"price": "float64", "stars": "float64", "ts": "int64", "quantity": "int64"})


def told(events, products=PRODUCTS, requests=REQUESTS, pairs=PAIRS, wrap=lambda table: table):
    out = to_pandas(nw.from_native(feature_table(*(wrap(table.reset_index(drop=True)) for table in (requests, pairs, events, products, USERS)))))
    return out.sort_values(["request_id", "item_id"], ignore_index=True)


def travel_in_time(rows, later, price, read):
    """Everything at or after the request is exchanged, the requests' own pages and all readings of products of then or of nobody knows when."""
    past = log_of([row for row in rows if row[0] < 0])
    changed = log_of([row for row in rows if row[0] < 0] + [(abs(row[0]), *row[1:]) for row in later])
    before = PRODUCTS.assign(snapshot_ts=pd.array(read, dtype="Int64"))
    unknown = (before["snapshot_ts"].isna() | (before["snapshot_ts"] >= NOW)).fillna(True).astype(bool)
    other = {"price": price, "rating": 5.0, "n_ratings": 77}
    after = before.assign(**{name: before[name].mask(unknown, value) for name, value in other.items()})
    new = PRODUCTS.head(1).assign(item_id="new", snapshot_ts=NOW + 9, price=price)
    pd.testing.assert_frame_equal(told(past, before), told(changed, pd.concat([after, new], ignore_index=True)), check_exact=True)


READ = st.lists(st.sampled_from([0, NOW - 5 * HOUR - 1, NOW - 1, NOW, NOW + 30 * HOUR, None]), min_size=4, max_size=4)


@settings(max_examples=25)
@given(st.lists(ROW, max_size=30), st.lists(ROW, max_size=12), st.floats(1, 900), READ)
def test_nothing_at_or_after_a_request_reaches_it(rows, later, price, read):
    travel_in_time(rows, later, price, read)


@pytest.mark.slow
@settings(max_examples=500)
@given(st.lists(ROW, max_size=60), st.lists(ROW, max_size=30), st.floats(1, 900), READ)
def test_nothing_at_or_after_a_request_reaches_it_in_500_logs(rows, later, price, read):
    travel_in_time(rows, later, price, read)


@settings(max_examples=10)
@given(st.lists(ROW, min_size=1, max_size=30), st.randoms())
def test_engines_orders_and_batches_give_the_same_rows(rows, random):
    log, alone = log_of(rows), REQUESTS["request_id"] == "p0"
    whole = told(log)
    shuffled = list(rows)
    random.shuffle(shuffled)
    pd.testing.assert_frame_equal(told(log_of(shuffled)), whole, check_exact=True)
    pd.testing.assert_frame_equal(told(log, requests=REQUESTS[alone], pairs=PAIRS[PAIRS["request_id"] == "p0"]), whole[whole["request_id"] == "p0"], check_exact=True)
    by_duckdb = told(log, wrap=duckdb.from_df)
    forget()
    pd.testing.assert_frame_equal(by_duckdb, whole, check_exact=True, check_dtype=False)


@settings(max_examples=30)
@given(st.lists(ROW, max_size=30))
def test_counts_are_the_definition(rows):
    log, out = log_of(rows), told(log_of(rows)).set_index(["request_id", "item_id"])
    mine = log[(log["ts"] < NOW) & (log["user_id"] == "u0") & log["kind"].isin(["click", "cart", "purchase"])]
    bought = mine[mine["kind"] == "purchase"]
    assert (out.loc["p0", "interest"] == len(mine)).all() and (out.loc["p0", "orders"] == len(bought)).all()
    assert np.allclose(out.loc["p0", "spent"], bought["price"].fillna(0).sum()) and (out.loc["p1", "interest"] == 0).all()
    assert out.loc["p0", "seen"].tolist() == [(mine["item_id"] == item).sum() for item in ITEMS]
    last = (NOW - bought["ts"].max()) / 86_400_000 if len(bought) else np.nan
    assert np.allclose(out.loc["p0", "days_since_order"].astype(float), last, atol=1e-6, equal_nan=True)
    yesterday = log[log["ts"] < 20 * 24 * HOUR]
    for item in ITEMS[:2]:
        rated = yesterday[(yesterday["item_id"] == item) & (yesterday["kind"] == "rating")]
        since = rated[rated["ts"] >= (18 * 24 * HOUR if item == "i1" else 0)]
        catalogue = PRODUCTS.set_index("item_id").loc[item, "n_ratings"]
        assert out.loc[("p0", item), "votes"] == len(since) + max(int(catalogue), len(rated) - len(since))


def test_no_feature_reads_the_order_of_ids():
    """Other names for items, shoppers and pages, in another order of the alphabet, and the same features."""
    rng = np.random.default_rng(0)
    rows = [(int(rng.integers(-400, 0)) * HOUR, f"u{rng.integers(3)}", ITEMS[rng.integers(4)], KINDS[rng.integers(1, 7)], "other", "q", 9.0, 4.0) for _ in range(60)]
    log, other = log_of(rows), {name: f"z{99 - i}" for i, name in enumerate([*ITEMS, "u0", "u1", "u2", "p0", "p1", "p2"])}
    named = lambda table: table.replace({column: other for column in ("item_id", "user_id", "request_id") if column in table})
    out = feature_table(*map(named, (REQUESTS, PAIRS, log, PRODUCTS, USERS))).sort_values(["request_id", "item_id"], ascending=False, ignore_index=True)
    assert out["item_id"].tolist() == [other[item] for item in ITEMS] * 3
    pd.testing.assert_frame_equal(out[list(FEATURES)], told(log)[list(FEATURES)])


def test_features_are_finite_whatever_is_unknown():
    bare = PRODUCTS[["item_id"]]
    requests = pd.DataFrame({"user_id": [None, "new"], "ts": [NOW, NOW]})
    values, names = pair_features(requests, np.zeros((2, 3), dtype=int), bare, USERS[["user_id"]], log_of([]))
    assert np.isfinite(values).all() and values.shape == (2, 3, len(names))
    assert set(told(log_of([]))) == {"request_id", "item_id", *FEATURES}


def test_who_has_not_joined_yet_is_nobody_and_an_anonymous_shopper_owns_no_past():
    log = log_of([(-5, None, "i0", "click", "other", "q", 2.5, None), (-4, "u1", "i0", "purchase", "other", "q", 2.5, None)])
    out = told(log, requests=REQUESTS.assign(user_id=["u1", None, "u0"])).set_index(["request_id", "item_id"])
    assert out.loc["p0", ["age", "gender", "region"]].isna().all(axis=None) and out.loc[("p0", "i0"), "bought_before"] == 1
    assert (out.loc["p1", ["seen", "orders", "interest"]] == 0).all(axis=None)


def test_attributes_that_name_no_gender_are_read_all_the_same():
    said = ["color:red|size:2", '["a"]', '{"gender": ["men"]}', '{"gender":"men"}']
    out = told(log_of([]), PRODUCTS.assign(attributes=said)).set_index("request_id")
    assert out.loc["p0", "other_gender"].tolist() == [0, 0, 0, 1] and out.loc["p1", "other_gender"].tolist() == [0] * 4


def test_pages_and_examples_of_a_log():
    rows = [(0, "u0", None, "search", "p", "q", None, None)] + [(10, "u0", item, "impression", "p", "q", 9.0, None) for item in ITEMS[:2]]
    rows += [(20, "u0", "i1", "click", "p", "q", 9.0, None), (30, "u0", "i1", "purchase", "p", "q", 9.0, None)]
    log = log_of(rows).assign(session_id="s", device="phone", surface="search", position=1, propensity=0.5)
    pages, shown = requests_of(log), examples(log).sort_values("item_id")
    assert pages[["request_id", "ts", "user_id", "query"]].to_numpy().tolist() == [["p", NOW, "u0", "q"]]
    assert shown["clicked"].tolist() == shown["bought"].tolist() == [0, 1]


def test_large_prices_stay_what_they_are_and_a_return_shows_none():
    rows = [(-30 * HOUR, "u0", "i0", "impression", "other", "q", 30_000_000.0, None), (-29 * HOUR, "u0", "i1", "impression", "other", "q", 15.0, None), (-28 * HOUR, "u0", "i1", "return", "other", "q", 20.0, None)]
    out = told(log_of(rows)).set_index(["request_id", "item_id"])["price"]["p0"]
    assert out["i0"] == 30_000_000 and out["i1"] == 15


def test_what_stands_twice_or_nowhere_is_named():
    with pytest.raises(TableError, match="table products, column item_id: 1 rows repeat a key"):
        told(log_of([]), pd.concat([PRODUCTS, PRODUCTS.head(1)]))
    with pytest.raises(TableError, match="1 pairs name a request or an item"):
        told(log_of([]), pairs=pd.concat([PAIRS, PAIRS.head(1).assign(item_id="nothing")]))


def test_a_page_is_what_its_first_event_says():
    rows = [(5, "u0", "i0", "impression", "p", None, 9.0, None), (0, "u0", None, "search", "p", "shoes", None, None), (6, None, "i1", "impression", "p", None, 9.0, None)]
    log = log_of(rows).assign(session_id="s", device="phone", surface="search", position=1, propensity=0.5)
    for table in (log, log.iloc[::-1], duckdb.from_df(log)):
        page = to_pandas(nw.from_native(requests_of(table)))
        assert page[["ts", "user_id", "query"]].to_numpy().tolist() == [[NOW, "u0", "shoes"]]


def test_a_missing_column_is_named():
    with pytest.raises(TableError, match="table requests, column ts: the column is missing"):
        told(log_of([]), requests=REQUESTS.drop(columns="ts"))


@pytest.mark.parametrize("reduce", [None, "pca", "factors"])
def test_an_encoder_knows_the_past_alone(reduce):
    rng = np.random.default_rng(0)
    past = pd.DataFrame({name: rng.normal(size=60) for name in (*CONTEXT, "price")}).assign(region=rng.choice(["GB", "CN"], 60))
    later = past.head(5).assign(price=[np.nan, 1e9, 0, 0, 0], region="new")
    fitted = encoder(reduce, n_components=3).fit(past)
    before = fitted.transform(past)
    assert np.isfinite(fitted.transform(later)).all(axis=None) and fitted.transform(past).equals(before)
    assert before.shape[1] == (3 if reduce else 10)
