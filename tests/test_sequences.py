"""Histories: whatever the file or the log, the cuts never let training see what is asked."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomrec.data.sequences import (
    SequenceError, Sequences, cut_in_time, from_events, leave_last_out, load_sequences, read_lines, reordered,
)
from ecomrec.data.splits import LeakError

for_any = settings(deadline=None, max_examples=60)
histories = st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=6)


def whole_of(lists: list[list[int]], times: bool = False, seed: int = 0) -> Sequences:
    items = np.array([item for history in lists for item in history], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum([len(history) for history in lists])])
    rng = np.random.default_rng(seed)
    ts = np.concatenate([np.sort(rng.integers(0, 50, len(history))) for history in lists]).astype(np.int64) if times else None
    return Sequences(items, starts, np.array([f"u{i}" for i in range(len(lists))], object), np.array([str(i) for i in range(10)], object), ts=ts)


@given(histories)
@for_any
def test_slices_are_slices(lists):
    whole = whole_of(lists)
    rows = np.arange(len(lists))[::-1]
    assert [whole.take(rows).history(row).tolist() for row in range(len(lists))] == lists[::-1]
    assert [whole.last(3).history(row).tolist() for row in range(len(lists))] == [history[-3:] for history in lists]
    assert [whole.keep(whole.items % 2 == 0).history(row).tolist() for row in range(len(lists))] == [[i for i in h if i % 2 == 0] for h in lists]
    before = whole.items.copy()
    counts = whole.matrix(0.5).toarray()
    for row, history in enumerate(lists):
        expected = np.zeros(10)
        for back, item in enumerate(reversed(history)):
            expected[item] += 0.5**back
        assert np.allclose(counts[row], expected)
    assert (whole.items == before).all()


@given(histories)
@for_any
def test_leave_last_out_asks_what_was_last(lists):
    whole = whole_of(lists)
    long = [row for row, history in enumerate(lists) if len(history) >= 3]
    if not long:
        with pytest.raises(SequenceError, match="no user has three events"):
            leave_last_out(whole)
        return
    split = leave_last_out(whole)
    split.check()
    for place, row in enumerate(long):
        assert split.test.history.history(place).tolist() == lists[row][:-1] and split.test.target[place] == lists[row][-1]
        assert split.valid.history.history(place).tolist() == lists[row][:-2] and split.valid.target[place] == lists[row][-2]
        assert split.test.repeat[place] == (lists[row][-1] in lists[row][:-1])
    assert [split.train.history(row).tolist() for row in range(len(lists))] == [h[:-2] if len(h) >= 3 else h for h in lists]


@given(histories, st.integers(1, 48), st.integers(1, 20), st.integers(0, 1000))
@for_any
def test_one_cut_keeps_the_sides_apart(lists, first, more, seed):
    whole = whole_of(lists, times=True, seed=seed)
    try:
        split = cut_in_time(whole, first, first + more)
    except SequenceError:
        return
    split.check((first, first + more))
    assert (split.train.ts < first).all() and (split.test.history.ts < first + more).all() and (split.test.ts >= first + more).all()
    for place, user in enumerate(split.test.history.user_ids):
        row = int(user[1:])
        inside = np.flatnonzero(whole.take([row]).ts >= first + more)
        assert split.test.ts[place] == whole.take([row]).ts[inside[0]]
        assert lists[row][inside[0]] in split.test.target[split.test.asker == place]


def test_files_of_lines_that_are_not_as_hoped(tmp_path):
    file = tmp_path / "f.txt"
    file.write_text("a x\n\nb\nc " + " ".join(["y", "z"] * 5000) + "\n")
    whole = read_lines(file)
    assert whole.lengths.tolist() == [1, 0, 10_000] and whole.attributes is None
    (tmp_path / "f_item2attributes.json").write_text(json.dumps({"x": ["red", "red", 7], "nobody": ["blue"]}))
    assert read_lines(file).attributes.toarray().tolist() == [[1, 1], [0, 0], [0, 0]]
    for text, match in {"[1]": "must map items to lists", '{"x": 3}': "item 'x' has 3", '{"x": [[1]]}': "a list of attributes is wanted", "{": "cannot be read as JSON", '{"w": []}': "knows none"}.items():
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(SequenceError, match=match):
            read_lines(file, tmp_path / "bad.json")
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SequenceError, match="cannot be read as text"):
        read_lines(file)
    with pytest.raises(SequenceError, match="cannot be read as text"):
        read_lines(tmp_path / "absent.txt")
    other = tmp_path / "g.txt"
    other.write_text("u 1 2 3\nv 2 3 1\n")
    assert load_sequences(str(other)).item_ids.tolist() == ["1", "2", "3"]


def test_a_log_becomes_histories_in_the_order_of_time():
    events = pd.DataFrame({
        "event_id": list("edcba"), "ts": [3, 1, 2, 2, 9], "user_id": ["u", "u", "u", "u", None], "session_id": ["s1", "s0", "s0", "s0", "x"],
        "kind": ["purchase", "purchase", "purchase", "click", "purchase"], "item_id": ["p", "q", "r", "p", "p"],
    })
    assert from_events(events).items.tolist() == [1, 2, 0] and from_events(events).kind is None
    both = from_events(events, kinds=("click", "purchase"))
    assert both.item_ids[both.items].tolist() == ["q", "p", "r", "p"] and both.kind.tolist() == [4, 2, 4, 4]
    products = pd.DataFrame({"item_id": ["p", "p"]})
    with pytest.raises(SequenceError, match="item 'p' stands twice"):
        from_events(events, products)


def test_prices_read_after_the_cut_are_not_known():
    events = pd.DataFrame({
        "event_id": list("abcd"), "ts": [0, 10, 20, 30], "user_id": ["u"] * 4, "session_id": list("stuv"), "kind": ["purchase"] * 4, "item_id": list("pqpq"),
    })
    products = pd.DataFrame({
        "item_id": ["p", "q"], "title": ["", ""], "category": [None, None], "brand": [None, None], "price": [1.0, 2.0], "rating": [4.0, None],
        "snapshot_ts": pd.array([5, 25], dtype="Int64"),
    })
    assert from_events(events, products).attributes.sum() == 3, "two prices and a rating"
    assert from_events(events, products, known_share=0.5).attributes.toarray().sum(axis=1).tolist() == [2, 0]


def test_a_receipt_has_no_order_for_counting():
    whole = replace(whole_of([[1, 2, 3, 4], [3, 4, 1, 2]]), session=np.array([0, 0, 1, 1, 0, 0, 1, 1]), ts=np.array([5, 5, 7, 7] * 2))
    for seed in range(5):
        assert (reordered(whole, "moments", seed).matrix(0.5) != whole.matrix(0.5)).nnz == 0
    assert whole.matrix(0.5).toarray()[0, 1:5].tolist() == [0.5, 0.5, 1, 1]
    assert (leave_last_out(whole).test.history.matrix(0.5).toarray()[0, 1:4] == [0.25, 0.5, 1]).all(), "asked for the next event, each is a visit"


def test_equal_times_are_no_leak_and_unknown_sessions_are_not_one():
    tied = whole_of([list(range(10)) + [1, 2]], times=True)
    object.__setattr__(tied, "ts", np.zeros(12, np.int64))
    leave_last_out(tied).check()
    events = pd.DataFrame({
        "event_id": list("abcd"), "ts": [1, 11, 12, 13], "user_id": ["u"] * 4, "session_id": ["s", None, None, None], "kind": ["purchase"] * 4, "item_id": list("pqrs"),
    })
    assert cut_in_time(from_events(events), 11, 12).test.target.tolist() == [2]


def test_another_users_history_is_never_the_own():
    whole = whole_of([[row] for row in range(10)])
    for seed in range(20):
        assert (reordered(whole, "other", seed).items != whole.items).all()
    with pytest.raises(SequenceError, match="needs two users"):
        reordered(whole.take([0]), "other")


@given(histories, st.integers(0, 99))
@for_any
def test_reordered_keeps_what_was_done(lists, seed):
    whole = whole_of(lists)
    for how in ("shuffled", "reversed"):
        again = reordered(whole, how, seed)
        assert [sorted(again.history(row)) for row in range(len(lists))] == [sorted(history) for history in lists]
    assert [reordered(whole, "reversed").history(row).tolist() for row in range(len(lists))] == [history[::-1] for history in lists]
    with pytest.raises(SequenceError, match="choose 'shuffled'"):
        reordered(whole, "sideways")


def test_a_history_that_goes_on_after_the_cut_is_refused():
    whole = replace(whole_of([[1, 2, 3, 4]] * 3), ts=np.tile(np.arange(4), 3))
    split = cut_in_time(whole, 2, 3)
    split.check((2, 3))
    late = replace(split, test=replace(split.test, history=whole, ts=np.full(3, 4)))
    with pytest.raises(LeakError, match="event of a history after the cut"):
        late.check((2, 3))
