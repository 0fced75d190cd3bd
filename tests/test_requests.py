"""Requests: nothing at or after a moment reaches its question; what was shown and clicked is read as it was logged."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomrec.data import sources
from ecomrec.data.cleaning import clean
from ecomrec.data.features import examples, requests_of
from ecomrec.data.requests import ask, asked_between, from_pages, request_context, user_profiles
from ecomrec.data.sequences import SequenceError


def length(texts):
    return np.array([[len(text)] for text in texts], float)


@pytest.fixture(scope="module")
def shop():
    return clean(sources.load("shop"))[0]


@pytest.fixture(scope="module")
def whole(shop):
    return from_pages(shop.events, shop.products, shop.users, length, weigh=lambda clicked: (1 / clicked["propensity"]).fillna(1.0))


def test_every_page_and_every_click_is_there(shop, whole):
    asked = requests_of(shop.events[shop.events["user_id"].notna()])
    shown, key = examples(shop.events), ["request_id", "item_id"]
    shown = shown[shown["request_id"].isin(asked["request_id"]) & shown["position"].notna()]
    clicks = shop.events[(shop.events["kind"] == "click") & shop.events["request_id"].isin(asked["request_id"])].drop_duplicates(key)
    clicks = clicks[key].merge(shown[[*key, "propensity"]], how="left")
    unseen = clicks["propensity"].isna().sum()
    assert (whole.items < 0).sum() == len(asked) and (whole.page >= 0).sum() == len(shown) + unseen and (whole.clicks > 0).sum() == len(clicks) > unseen > 0
    assert whole.clicks.sum() == pytest.approx((1 / clicks["propensity"]).fillna(1).sum(), rel=1e-5)
    assert (whole.page[whole.items >= 0] == -1).all() and (whole.clicks[whole.page < 0] == 0).all()
    assert len(whole) >= len(shop.users) and len(whole.item_ids) == len(shop.products)
    order = np.lexsort((whole.ts, whole.user))
    assert (order == np.arange(len(order))).all()


@given(st.integers(0, 10_000), st.integers(0, 3))
@settings(deadline=None, max_examples=20)
def test_only_what_is_strictly_before_reaches_a_question(whole, seed, last):
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(whole.items), size=5)
    requests = pd.DataFrame({
        "user_id": np.append(whole.user_ids[whole.user[rows]], "nobody"), "ts": np.append(whole.ts[rows], whole.ts[rows[:1]]), "surface": "home", "device": None,
        "query": ["a", None, "bb", "a", None, "ccc"],
    })
    questions = ask(whole, requests, length, last=last)
    for row, (user, ts, query) in enumerate(zip(requests["user_id"], requests["ts"], requests["query"])):
        mine = np.flatnonzero((whole.user_ids[whole.user] == user) & (whole.ts < ts))[-last:] if last else np.arange(0)
        history = questions.history
        assert history.history(row).tolist() == whole.items[mine].tolist()
        assert history.ts[history.starts[row] : history.starts[row + 1]].tolist() == whole.ts[mine].tolist()
        assert (questions.query[row] < 0) == pd.isna(query) and (pd.isna(query) or history.query_vectors[questions.query[row]] == len(query))
    assert not questions.history.profile[-1].any() and questions.history.profile[:-1].any()


def test_what_comes_later_changes_no_question(whole):
    cut = int(np.quantile(whole.ts, 0.5))
    stop = cut + 86_400_000
    one, other = asked_between(whole, cut, stop), asked_between(whole.keep(whole.ts < stop), cut, stop)
    assert one.history.items.tolist() == other.history.items.tolist() and one.target.tolist() == other.target.tolist() and one.weight.tolist() == other.weight.tolist()
    assert len(one) == ((whole.items < 0) & (whole.ts >= cut) & (whole.ts < stop)).sum()


def test_errors_name_what_is_wrong(shop):
    with pytest.raises(SequenceError, match="without pages take sequences.from_events"):
        from_pages(shop.events.assign(request_id=None), shop.products, shop.users, length)
    with pytest.raises(SequenceError, match="weighs -1.0; a weight is 0 or more"):
        from_pages(shop.events, shop.products, shop.users, length, weigh=lambda clicked: -np.ones(len(clicked)))


def test_a_page_keeps_what_stands_twice_at_a_place_and_what_was_clicked_unseen(shop, whole):
    first = shop.events[(shop.events["kind"] == "impression") & shop.events["user_id"].notna() & (shop.events["position"] == 1)].iloc[:1]
    on_page = shop.events.loc[(shop.events["request_id"] == first["request_id"].iloc[0]) & shop.events["item_id"].notna(), "item_id"]
    twice, unseen = shop.products["item_id"][~shop.products["item_id"].isin(on_page)].iloc[:2]
    more = [first.assign(item_id=twice, event_id="twice"), first.assign(item_id=unseen, event_id="unseen", kind="click", position=None)]
    holed, plain = (from_pages(log, shop.products, shop.users, length) for log in (pd.concat([shop.events, *more]), shop.events))
    at = {item: np.flatnonzero(holed.item_ids == item)[0] for item in (twice, unseen)}
    before, after = (part.page[part.items < 0] for part in (plain, holed))
    n = before.shape[1]
    (changed,) = np.flatnonzero((after[:, :n] != before).any(axis=1) | (after[:, n:] >= 0).any(axis=1))
    page = after[changed][after[changed] >= 0].tolist()
    assert page.index(at[twice]) in (0, 1) and page[-1] == at[unseen] and sorted(page[:-1]) == sorted([*before[changed][before[changed] >= 0], at[twice]])
    assert holed.clicks.sum() == plain.clicks.sum() + 1


def test_what_is_not_known_is_nought():
    assert user_profiles(pd.DataFrame({"age": [np.nan], "gender": [None], "region": [None]})).tolist() == [[0, 0]]
    assert request_context(pd.DataFrame({"ts": [0], "surface": [None], "device": [None]})).tolist() == [[0, 0, 0, 0, 1, 0]]
