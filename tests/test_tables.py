"""Properties of the table contracts that a reader need not see."""

from datetime import datetime

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecomrec.data.tables import CONTRACTS, KEYS, TABLES, TableError, check, check_links, empty

PRODUCTS = pd.DataFrame({"item_id": ["a", "b"], "title": ["Shoe", "Sock"]})
EVENT = {"event_id": "e", "ts": 1_700_000_000_000, "session_id": "s", "kind": "click"}


@pytest.mark.parametrize("table", TABLES)
def test_an_empty_table_passes_both_contracts(table):
    assert list(check(table, empty(table), "clean").columns) == list(CONTRACTS[table])


@pytest.mark.parametrize("table", TABLES)
def test_checking_twice_changes_nothing(table):
    row = {"products": PRODUCTS.iloc[0], "users": {"user_id": "u"}, "events": EVENT,
           "judgements": {"query_id": "q", "query": "shoes", "item_id": "a", "grade": 1}}[table]
    once = check(table, pd.DataFrame([dict(row)]), "clean")
    pd.testing.assert_frame_equal(once, check(table, once, "clean"))


@given(st.lists(st.one_of(st.none(), st.integers(-9, 9), st.floats(), st.text(max_size=5)), min_size=1, max_size=8))
def test_any_price_column_is_read_or_refused_with_its_row(values):
    ids = [str(i) for i in range(len(values))]
    frame = pd.DataFrame({"item_id": ids, "title": "x", "price": pd.Series(values, dtype="object")})
    try:
        checked = check("products", frame, "clean")["price"].dropna()
    except TableError as error:
        assert error.table == "products" and error.column == "price" and 0 <= error.row < len(values)
    else:
        assert (checked > 0).all() and np.isfinite(checked).all()


@pytest.mark.parametrize("column, value", [
    ("ts", None), ("ts", 1.5), ("ts", "yesterday"), ("ts", 5), ("ts", 5_000_000_000_000), ("ts", pd.NaT),
    ("kind", "hover"), ("kind", None), ("surface", "cart"), ("session_id", None), ("event_id", None),
    ("position", 0), ("propensity", 0.0), ("propensity", 1.5), ("price", float("inf")),
])
def test_events_with_impossible_values_are_named(column, value):
    frame = pd.DataFrame([EVENT | {"event_id": "ok"}, EVENT | {column: value}])
    with pytest.raises(TableError) as caught:
        check("events", frame, "clean", where="log.csv")
    assert caught.value.column == column and caught.value.row == 1 and str(caught.value).startswith("log.csv")


@pytest.mark.parametrize("table", TABLES)
def test_duplicate_keys_pass_raw_and_fail_clean(table):
    values = {"text": "x", "integer": 1, "number": 1.0, "flag": True, "time": EVENT["ts"], "ts": EVENT["ts"]}
    row = {name: values[column.kind] for name, column in CONTRACTS[table].items()}
    row |= {"kind": "click", "surface": "search"} if table == "events" else {}
    frame = pd.DataFrame([row, row])
    assert len(check(table, frame, "raw")) == 2
    with pytest.raises(TableError, match="more than once") as caught:
        check(table, frame, "clean")
    assert caught.value.column in KEYS[table]


def test_numbers_as_ids_join_with_text():
    judged = check("judgements", pd.DataFrame({"query": ["q"], "item_id": [7], "grade": [1.0]}))
    check_links(judged, check("products", pd.DataFrame({"item_id": ["7"], "title": ["x"]})))
    assert judged["grade"].dtype == "Int64"


def test_unknown_table_and_stage_are_refused():
    with pytest.raises(TableError, match="no such table"):
        check("orders", PRODUCTS)
    with pytest.raises(ValueError, match="'raw' or 'clean'"):
        check("products", PRODUCTS, "done")


@given(st.lists(st.one_of(st.none(), st.datetimes()), min_size=1, max_size=5))
def test_times_are_the_same_as_datetimes_and_as_text(times):
    ids = [str(i) for i in range(len(times))]
    expected = [None if t is None else round((t - datetime(1970, 1, 1)).total_seconds() * 1000) for t in times]
    texts = pd.Series([t and t.isoformat() for t in times], dtype="object")
    for column in (pd.Series(times, dtype="datetime64[us]"), texts):
        read = check("users", pd.DataFrame({"user_id": ids, "joined_ts": column}))["joined_ts"]
        assert [None if pd.isna(ms) else ms for ms in read] == pytest.approx(expected, abs=1)
