"""Who comes in: keys, buckets, JSON; and what the log may know of them."""

import io
import json
import logging
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecomrec.serve.door import DEEPEST, Buckets, Caller, KeyFileError, Keys, Refused, log_to, say, strict_json

JSON = st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(codec="utf-8")), lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner), max_leaves=20)


def depth(value: object) -> int:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inside is None else 1 + max(map(depth, inside), default=0)


@given(JSON)
def test_json_is_read_as_the_standard_library_reads_it(value):
    body = json.dumps(value).encode()
    if depth(value) > DEEPEST:
        with pytest.raises(Refused, match="nested deeper"):
            strict_json(body)
    else:
        assert strict_json(body) == json.loads(body)


@given(st.binary(max_size=60))
def test_any_bytes_are_json_or_refused_with_a_reason(body):
    try:
        assert strict_json(body) == json.loads(body)
    except Refused as no:
        assert no.status_code == 400 and no.detail


@pytest.mark.parametrize("body", [b"NaN", b"Infinity", b"-Infinity", b'{"a": NaN}', b'"\\ud83d"', b"\xef\xbb\xbf{}", '{"a": 1}'.encode("utf-16"), b"1 2", b"{'a': 1}", b'{"a": 1,}', b"//x\n1", b"[" * 60_000])
def test_what_only_looks_like_json_is_refused(body):
    with pytest.raises(Refused) as caught:
        strict_json(body)
    assert caught.value.status_code == 400


def test_brackets_in_texts_are_no_depth():
    assert strict_json(b'{"a": "[[[[[[[[[[[[[[[[[[[[[\\"[[[[[[[[[[[["}')["a"].count("[") == 33


@given(st.floats(0.5, 100), st.integers(1, 50), st.lists(st.floats(0, 10), max_size=200))
def test_no_bucket_gives_more_than_it_holds_and_gets(rate, burst, pauses):
    buckets, now, given_out = Buckets(rate, burst), 100.0, 0
    for pause in pauses:
        now += pause
        try:
            buckets.take("a", now)
            given_out += 1
        except Refused as no:
            assert no.status_code == 429 and int(no.headers["Retry-After"]) >= 1
    assert given_out <= burst + rate * (now - 100.0) + 1e-6


def test_a_wait_as_long_as_told_is_enough_and_others_have_their_own_bucket():
    buckets = Buckets(0.5, 1)
    buckets.take("a", 0.0)
    buckets.take("b", 0.0)
    with pytest.raises(Refused) as caught:
        buckets.take("a", 1.0)
    buckets.take("a", 1.0 + int(caught.value.headers["Retry-After"]))


def test_buckets_of_a_million_addresses_need_no_more_room():
    buckets = Buckets(1, 2, most=100)
    for number in range(1000):
        buckets.take(f"address {number}", 0.0)
    assert len(buckets.tokens) == 100


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 5), (1, 0)])
def test_a_bucket_that_never_fills_is_refused(rate, burst):
    with pytest.raises(ValueError, match="rate must be positive"):
        Buckets(rate, burst)


def test_keys_are_random_hashed_and_read_back(tmp_path):
    keys = Keys({})
    made = {name: keys.add(name, tenant=tenant) for name, tenant in (("a", "shop"), ("b", "acme"), ("c", "acme"))}
    assert len(set(made.values())) == 3 and min(map(len, made.values())) >= 43
    keys.save(tmp_path / "deep" / "keys.json")
    text = (tmp_path / "deep" / "keys.json").read_text()
    assert not any(key in text for key in made.values())
    assert (tmp_path / "deep" / "keys.json").stat().st_mode & 0o777 == 0o600
    again = Keys.load(tmp_path / "deep" / "keys.json")
    assert [again.who(key) for key in made.values()] == [Caller("a"), Caller("b", "acme"), Caller("c", "acme")]
    for wrong in ("", "a", made["a"][:-1], made["a"] + "=", made["a"].swapcase(), "\ud800", "密钥"):
        assert again.who(wrong) is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"sha256": "x"}]', '[{"name": "a"}]', '[{"sha256": "x", "name": "a", "root": true}]', "\x00"])
def test_a_file_that_holds_no_keys_is_refused(tmp_path, text):
    path = tmp_path / "keys.json"
    path.write_text(text)
    if text == "{}":
        assert Keys.load(path).callers == {}
        return
    with pytest.raises(KeyFileError, match="no readable file of keys"):
        Keys.load(path)


@pytest.mark.parametrize("name", ["", "A", "a b", "a\x1fb", "-a", "x" * 33, "../a", "名"])
def test_names_of_keys_and_tenants_are_plain_words(name):
    for pair in ((name, "shop"), ("first", name)):
        with pytest.raises(KeyFileError, match="is no name"):
            Keys({}).add(*pair)


@pytest.mark.slow
def test_right_and_wrong_keys_take_equally_long():
    """Medians of interleaved runs, many times: their difference is no larger than that of the same key with itself."""
    keys = Keys({})
    right = [keys.add(f"key-{number}") for number in range(20)]
    kinds = {"first": right[0], "last": right[-1], "near": right[0][:-1] + "?", "far": "?" * 43, "again": right[0]}
    taken = {kind: [] for kind in kinds}
    for _ in range(400):
        for kind, key in kinds.items():
            start = time.perf_counter_ns()
            for _ in range(50):
                keys.who(key)
            taken[kind].append(time.perf_counter_ns() - start)
    rng, base = np.random.default_rng(0), np.array(taken["again"])
    for kind in ("first", "last", "near", "far"):
        paired = np.array(taken[kind]) - base
        middle = [np.median(rng.choice(paired, len(paired))) for _ in range(1000)]
        low, high = np.quantile(middle, [0.0005, 0.9995])
        assert low <= 0.02 * np.median(base) and high >= -0.02 * np.median(base), (kind, low, high, np.median(base))


def test_an_exception_leaves_its_type_and_places_and_none_of_its_words():
    heard = io.StringIO()
    log_to(heard)

    def fail() -> None:
        try:
            {}["Jane Doe"]
        except KeyError as error:
            raise ValueError("query: Jane's secret") from error

    try:
        fail()
    except ValueError as error:
        say("failed", error, endpoint="/search")
    logging.getLogger("asyncio").warning("task of Jane")
    first, second = map(json.loads, heard.getvalue().splitlines())
    assert "Jane" not in heard.getvalue()
    assert first["type"] == "ValueError" and any("fail" in place for place in first["places"]) and first["level"] == "error"
    assert second["event"] == "message of asyncio" and second["level"] == "warning"
