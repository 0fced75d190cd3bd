"""Splits: near-identical queries stay together whatever is typed, and the gate refuses every planted leak."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomrec.data.splits import LeakError, check_features, check_leaks, group_folds, leave_one_out, query_groups, time_cut

few = settings(max_examples=max(1, settings().max_examples // 4))  # of what the profile says, for slow properties
queries = st.lists(st.text(st.sampled_from(list("ab sS-'1é鞋跑 Ａ!")), min_size=1, max_size=8), min_size=1, max_size=25)


def judged(texts: list[str]) -> pd.DataFrame:
    rows = [(f"q{number}", text, item, 1) for number, text in enumerate(texts) for item in ("p1", "p2")]
    return pd.DataFrame(rows, columns=["query_id", "query", "item_id", "grade"])


def log(n_users: int = 8, n: int = 200, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame({
        "event_id": [f"e{number}" for number in rng.permutation(n)],
        "ts": rng.integers(0, 60, n),  # many at the same moment
        "user_id": rng.choice([f"u{number}" for number in range(n_users)] + [None], n),
    }).astype({"user_id": "str"})


@pytest.mark.parametrize("one, other", [
    ("laptop", "laptops"), ("laptop", "LAPTOP "), ("running shoes", "shoe runs"), ("head set", "headset"), ("head set", "headsets"),
    ("t-shirt", "T shirt"), ("ＮＩＫＥ", "nike"), ("跑步鞋", "跑步 鞋"), ("iphone13", "iPhone 13"), ("men's shoes", "mens shoes"),
    ("STRASSE", "straße"), ("shoe shoe", "shoes"), ("!!", "! !"),
])
def test_nearly_the_same(one, other):
    assert query_groups(pd.Series([one, other])).nunique() == 1


@pytest.mark.parametrize("one, other", [
    ("laptop", "laptop bag"), ("iphone 7", "iphone 8"), ("red shoe", "blue shoe"), ("鞋", "跑步鞋"), ("!", "?"), ("sofa", "couch"), ("", "a"),
])
def test_not_the_same(one, other):
    assert query_groups(pd.Series([one, other])).nunique() == 2


def test_groups_hang_together_through_others():
    assert query_groups(pd.Series(["set head", "headset", "headsets"])).nunique() == 2
    assert query_groups(pd.Series(["set head", "headset", "headsets", "head sets"])).nunique() == 1


@given(queries, st.integers(0, 100))
def test_groups_do_not_hang_on_order_case_or_repeats(texts, seed):
    series = pd.Series(texts, dtype="str", index=[f"row {number}" for number in range(len(texts))])
    groups = query_groups(series)
    assert groups.index.equals(series.index) and set(groups) <= set(texts)
    assert query_groups(series.sample(frac=1, random_state=seed)).sort_index().equals(groups.sort_index())
    doubled = query_groups(pd.concat([series, series.str.upper()], ignore_index=True))
    assert (doubled[: len(texts)].to_numpy() == doubled[len(texts):].to_numpy()).all()


def test_groups_of_nothing_and_of_a_missing_query():
    assert len(query_groups(pd.Series([], dtype="str"))) == 0
    with pytest.raises(ValueError, match="row 1 has no text"):
        query_groups(pd.Series(["a", None], dtype="str"))


@few
@given(queries, st.integers(2, 3), st.integers(0, 1000))
def test_our_folds_pass_the_gate(texts, n_folds, seed):
    table = judged(texts)
    sizes = query_groups(pd.Series(texts, dtype="str")).value_counts()
    if len(sizes) < n_folds:
        with pytest.raises(ValueError, match=f"there are {len(sizes)} groups"):
            group_folds(table, n_folds, seed)
        return
    fold = group_folds(table, n_folds, seed)
    assert sorted(fold.index) == sorted(table["query_id"].unique()) and set(fold) == set(range(n_folds))
    counts = fold.value_counts()
    assert counts.max() - counts.min() <= sizes.max()
    side = table["query_id"].map(fold)
    for number in range(n_folds):
        check_leaks(table[side != number], table[side == number])
    assert group_folds(table.sample(frac=1, random_state=seed), n_folds, seed).equals(fold)


def test_folds_refuse():
    table = judged(["a", "b", "c"])
    with pytest.raises(ValueError, match="column 'query' is missing"):
        group_folds(table.drop(columns="query"))
    with pytest.raises(ValueError, match="'q0' has several texts"):
        group_folds(pd.concat([table, table.assign(query="other")]), 2)
    with pytest.raises(ValueError, match="n_folds is 1"):
        group_folds(table, 1)


@few
@given(st.integers(0, 1000), st.integers(10, 50))
def test_time_cut_is_clean(seed, cut):
    events = log(seed=seed)
    train, test = time_cut(events, cut)
    assert train["ts"].max() < cut <= test["ts"].min()
    assert sorted([*train["event_id"], *test["event_id"]]) == sorted(events["event_id"])
    check_leaks(train, test, kind="events", cut=cut)


def test_time_cut_refuses():
    events = log()
    for cut in (0, 60):
        with pytest.raises(ValueError, match="leaves one side empty"):
            time_cut(events, cut)
    with pytest.raises(ValueError, match="ts is missing in row 3"):
        time_cut(events.astype({"ts": "Int64"}).assign(ts=lambda t: t["ts"].mask(t.index == 3)), 5)


@few
@given(st.integers(0, 1000), st.integers(1, 20))
def test_leave_one_out_takes_the_last_two(seed, n_users):
    events = log(n_users, n=40, seed=seed)
    train, valid, test = leave_one_out(events)
    assert sorted([*train["event_id"], *valid["event_id"], *test["event_id"]]) == sorted(events["event_id"])
    by_user = [part.groupby("user_id")["event_id"].agg(list).to_dict() for part in (train, valid, test)]
    for user, order in events.sort_values(["ts", "event_id"]).groupby("user_id")["event_id"].agg(list).items():
        mine = [part.get(user, []) for part in by_user]
        assert mine == ([order[:-2], order[-2:-1], order[-1:]] if len(order) >= 3 else [order, [], []])
    assert train["user_id"].isna().sum() == events["user_id"].isna().sum()
    check_leaks(pd.concat([train, valid]), test, kind="events")
    check_leaks(train, valid, kind="events")
    again = leave_one_out(events.sample(frac=1, random_state=seed))
    assert [part["event_id"].tolist() for part in again] == [part["event_id"].tolist() for part in (train, valid, test)]


def test_leave_one_out_refuses_a_repeated_event():
    events = log()
    with pytest.raises(ValueError, match="stands twice"):
        leave_one_out(pd.concat([events, events.iloc[[5]]]))


def test_gate_names_shared_groups_and_pairs():
    table = judged(["laptop", "laptops", "lamp"])
    with pytest.raises(LeakError, match="(?s)shared query group, 1: .'laptop', 'laptops'.*group_folds") as caught:
        check_leaks(table[table["query"] != "laptops"], table[table["query"] == "laptops"])
    assert caught.value.leaks == {"shared query group": [("laptop", "laptops")]}
    with pytest.raises(LeakError) as caught:
        check_leaks(table, table[table["query"] == "lamp"])
    assert caught.value.leaks["shared pair"] == [("q2", "p1"), ("q2", "p2")]
    # the same pair under another text is a leak of its own
    with pytest.raises(LeakError) as caught:
        check_leaks(table[:1].assign(query="bulb"), table[:1])
    assert list(caught.value.leaks) == ["shared pair"]


def test_gate_names_events_on_the_wrong_side():
    events = log().sort_values(["ts", "event_id"])
    train, test = time_cut(events, 30)
    moved = train.iloc[[0]]
    with pytest.raises(LeakError) as caught:
        check_leaks(train, pd.concat([test, moved]), kind="events", cut=30)
    assert caught.value.leaks == {
        "shared event": moved["event_id"].tolist(),
        "test event before the cut": [(moved["event_id"].iloc[0], moved["ts"].iloc[0])],
    }
    at_cut = test[test["ts"] == test["ts"].min()].iloc[[0]].assign(event_id="new", ts=30)
    with pytest.raises(LeakError, match="training event at or after the cut, 1: .'new', 30"):
        check_leaks(pd.concat([train, at_cut]), test, kind="events", cut=30)
    unknown = train.astype({"ts": "Int64"}).iloc[[0]].assign(ts=pd.NA)
    with pytest.raises(LeakError, match="training event at or after the cut, 1"):
        check_leaks(pd.concat([train.astype({"ts": "Int64"}), unknown.assign(event_id="x")]), test, kind="events", cut=30)


def test_gate_knows_each_users_own_order():
    events = log()
    train, _, test = leave_one_out(events)
    last = test.iloc[[0]]
    later = last.assign(event_id="e999999", ts=last["ts"] + 1)
    with pytest.raises(LeakError, match="training event at or after its user's test, 1: .'e999999'"):
        check_leaks(pd.concat([train, later]), test, kind="events")
    check_leaks(pd.concat([train, later.assign(user_id="somebody else")]), test, kind="events")


def test_gate_with_nothing_on_one_side_and_wrong_calls():
    table, events = judged(["a", "b"]), log()
    check_leaks(table, table.iloc[:0])
    check_leaks(table.iloc[:0], table)
    check_leaks(events, events.iloc[:0], kind="events")
    check_leaks(events.iloc[:0], events, kind="events", cut=0)
    for arguments, fault in [({"kind": "users"}, "kind is"), ({"cut": 3}, "only events have a cut"), ({"kind": "events"}, "train: column 'event_id'")]:
        with pytest.raises(ValueError, match=fault):
            check_leaks(table, table, **arguments)


def _leaking(column):
    """Features with one column more, made of something that nobody could know."""
    def make(requests, pairs, events, products, users):
        own = events[events["request_id"].isin(requests["request_id"])]
        sums = {
            "impressions": own[own["kind"] == "impression"].groupby("item_id")["price"].mean(), "returns": own[own["kind"] == "return"].groupby("item_id").size(),
            "label": own[own["kind"] == "click"].groupby("item_id").size(), "future": events[events["kind"] == "click"].groupby("item_id").size(),
            "price": products.set_index("item_id")["price"],
        }
        return pairs.assign(honest=1.0, leak=pairs["item_id"].map(sums[column]).fillna(0.0))
    return make


@pytest.mark.parametrize("column, kind", [
    ("impressions", "its own page"), ("returns", "its own label"), ("label", "its own label"), ("future", "future event"), ("price", "later reading of a product"),
])
def test_the_gate_finds_what_a_feature_could_not_know(column, kind):
    events = pd.DataFrame({
        "event_id": list("abcdef"), "ts": [10, 20, 21, 22, 23, 90], "request_id": ["old", "page", "page", "page", "page", "new"], "kind": ["click", "search", "impression", "click", "return", "click"],
        "item_id": ["x", None, "x", "x", "x", "x"], "price": [1.0, None, 2.0, 2.0, 2.0, 1.0],
    })
    products = pd.DataFrame({"item_id": ["x"], "price": [3.0], "rating": [4.0], "n_ratings": [5], "snapshot_ts": [None]})
    requests = pd.DataFrame({"request_id": ["page"], "ts": [20]})
    pairs = pd.DataFrame({"request_id": ["page"], "item_id": ["x"]})
    with pytest.raises(LeakError) as caught:
        check_features(_leaking(column), requests, pairs, events, products, None)
    assert ("leak", "page") in caught.value.leaks[kind] and all(name == "leak" for cases in caught.value.leaks.values() for name, _ in cases)
    check_features(lambda requests, pairs, *tables: pairs.assign(honest=1.0), requests, pairs, events, products, None)
