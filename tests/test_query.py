"""Queries before they meet the index: properties of normalising and spelling, and its worth on real data."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ecomrec.data import sources
from ecomrec.evaluate.metrics import evaluate
from ecomrec.model.text import load_encoder, plain, product_text
from ecomrec.search.engine import Engine, Recipe
from ecomrec.search.index import WORD, LexicalIndex, tokenise
from ecomrec.search.query import LONGEST, Speller, misspelt, normalise_query, whole_words

QUICK = settings(deadline=None, max_examples=100)
LEXICAL = Recipe(
    candidates={"words": 0.5, "attributes": 0.5, "vectors": 0.0},
    order={"words": 1.0, "attributes": 0.0, "vectors": 0.0},
)
PRODUCTS = pd.DataFrame({
    "item_id": [f"p{n}" for n in range(6)],
    "title": [
        "Red running shoes", "Blue running shoes EU 42", "Wireless keyboard MX5000", "红色跑步鞋 42码", "Laptop 14 inch",
        "Café chair, men's",
    ],
    "description": ["light and breathable", None, "silent switches", "轻便", "16 GB", "for the balcony"],
    "brand": ["Swift", "Swift", "Tiknet", "飞跃", "Lumen", None],
    "category": ["sports > shoes", "sports > shoes", "computers > keyboards", None, "computers", "furniture"],
    "attributes": ['{"colour": "red"}', '{"colour": "blue"}', None, None, '{"memory": "16 GB"}', None],
})
SPELLER = Speller.from_products(PRODUCTS, known=["wheel", "shows"])
CATALOGUE = sorted({word.casefold() for text in product_text(PRODUCTS, ["title", "description", "brand", "category"])
                    for word in WORD.findall(plain(text))})
near_words = st.lists(st.sampled_from([*CATALOGUE, "runing", "keybord", "runningshoes", "5.5", "ＲＵＮＩＮＧ", "shoess™"]))
english = st.one_of(near_words.map(" ".join).filter(str.isascii), st.text("runigshoe 5.x-", max_size=30))
queries = st.one_of(st.text(max_size=60), near_words.map(" ".join), st.text("runigshoe 跑步", max_size=30))


@given(queries)
@QUICK
def test_correcting_twice_is_correcting_once(query):
    once = SPELLER.correct(query)
    assert SPELLER.correct(once) == once
    assert (once == query) == (not SPELLER.changes(query))


@given(english)
@QUICK
def test_what_is_changed_becomes_words_of_the_shop_and_nothing_else_changes(query):
    changes = SPELLER.changes(query)
    for word, mended in changes.items():
        assert len(word) >= 4 and word.isascii() and word.isalpha()
        assert set(mended.split()) <= set(CATALOGUE) and mended[0] == word[0]
    before = [word for word in WORD.findall(plain(query)) if word.casefold() not in changes]
    added = {part for mended in changes.values() for part in mended.split()}
    after = [word for word in WORD.findall(SPELLER.correct(query)) if word.casefold() not in added]
    assert [word for word in before if word.casefold() not in added] == after


@given(st.lists(st.sampled_from(CATALOGUE), max_size=8))
@QUICK
def test_words_of_the_catalogue_are_never_touched(words):
    assert SPELLER.correct(" ".join(words)) == " ".join(words)


@pytest.mark.parametrize("query", [
    "", "   ", "!?", "rum", "42", "MX500", "mx5001", "跑步靴", "cafés", "wheel", "shows", "silent", "balconies", "chairs",
    "shose2", "zebra", "kunning", "runn1ng", "men's", "5.5",
])
def test_what_is_left_alone(query):
    assert SPELLER.correct(query) == query and SPELLER.changes(query) == {}


@pytest.mark.parametrize(("typed", "meant"), [
    ("runing shoes", "running shoes"), ("Runing SHOES", "running SHOES"), ("runningshoes", "running shoes"),
    ("wierless keybaord", "wireless keyboard"), ("ｒｕｎｉｎｇ shoes", "running shoes"), ("跑步 shoess 42", "跑步 shoes 42"),
    ("runing-shoes™", "running-shoes "), ("leptop 14", "laptop 14"),
])
def test_what_is_mended(typed, meant):
    assert SPELLER.correct(typed) == meant


def test_two_errors_only_in_long_words():
    assert SPELLER.correct("kayborad") == "keyboard" and SPELLER.correct("lbtop") == "lbtop"


def test_the_order_of_the_products_does_not_matter():
    rng = np.random.default_rng(0)
    shuffled = Speller.from_products(PRODUCTS.sample(frac=1, random_state=1), known=["wheel", "shows"])
    typed = [misspelt(" ".join(rng.choice(CATALOGUE, 4)), rng) for _ in range(300)]
    assert [shuffled.correct(query) for query in typed] == [SPELLER.correct(query) for query in typed]


@given(st.text(max_size=40), st.integers(0, 2**31))
@example("AAß", 0)
@QUICK
def test_one_typo_is_planted_where_a_word_is_long_enough(text, seed):
    typed = misspelt(text, np.random.default_rng(seed))
    assert abs(len(typed) - len(text)) <= 1
    long = [word for word in WORD.findall(text) if len(word) > 3 and word.isascii() and word.isalpha()]
    assert (typed != text) == bool(long)


@given(st.text(max_size=80))
@QUICK
def test_normalising_twice_is_normalising_once(text):
    once = normalise_query(text)
    assert normalise_query(once) == once and once == " ".join(once.split()) and len(once) <= LONGEST
    once.encode("utf-8")


def test_a_hundred_thousand_characters_are_no_trouble():
    rng = np.random.default_rng(0)
    letters = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz      "), 100_000))
    for text in [letters, "a" * 100_000, "跑" * 100_000, " " * 100_000, "runing " * 14_000]:
        SPELLER.correct(text)
        assert len(normalise_query(text)) <= LONGEST
    engine = Engine.from_products(PRODUCTS, recipe=LEXICAL)
    assert engine.search("runing shoes " * 8_000, k=1).items["title"].str.contains("running").all()


def test_a_shop_without_english_or_with_titles_only():
    chinese = Speller.from_products(PRODUCTS.loc[[3], ["item_id", "title"]])
    assert chinese.correct("runing 跑步") == "runing 跑步"
    assert Speller.from_products(pd.DataFrame({"title": [None, ""]})).correct("shoes") == "shoes"


def test_an_encoder_knows_english():
    words = whole_words(load_encoder(device="cpu"))
    assert {"beach", "pants"} <= words and all(len(word) >= 4 and word.isascii() and word.isalpha() for word in words)


@pytest.mark.parametrize("mark", ["▁", "Ġ"])
def test_encoders_that_mark_where_a_word_begins(mark):
    class Tokenizer:
        def get_vocab(self):
            return {f"{mark}the": 0, f"{mark}Shoes": 1, "running": 2, f"{mark}un": 3, "<mask>": 4}

    class Encoder:
        tokenizer = Tokenizer()

    assert whole_words(Encoder()) == {"shoes"}


def test_the_engine_searches_for_the_mended_query_and_says_so(tmp_path):
    engine = Engine.from_products(PRODUCTS, recipe=LEXICAL)
    page, right = engine.search("runing  shoes"), engine.search("running shoes")
    assert page.note == 'showing results for "running shoes" instead of "runing shoes"' and right.note == ""
    pd.testing.assert_frame_equal(page.items, right.items)
    as_typed = engine.search("keybord", spelling=False)
    assert len(as_typed) == 0 and as_typed.note == "No product holds these words."
    assert (engine.scores(["keybord"]) == -np.inf).all()  # experiments see what was typed
    assert engine.search("keybord", filters={"brand": "nobody"}).note == "No product passes the filters."
    engine.save(tmp_path / "engine")
    assert Engine.load(tmp_path / "engine").search("runing shoes").note == page.note


def test_the_engines_encoder_vouches_for_words_that_the_shop_lacks():
    beeches = PRODUCTS.assign(title="beech table")
    assert "beech" in Engine.from_products(beeches, recipe=LEXICAL).search("beach").note
    assert Engine.from_products(beeches, progress=False).search("beach").note == ""


def test_mended_queries_find_more_on_a_real_shop(real_data):
    if not sources.is_available("chorus"):
        pytest.skip("ECOMREC_DATA has no chorus")
    chorus = sources.load("chorus")
    products, judgements = chorus.products, chorus.judgements
    speller = Speller.from_products(products, whole_words(load_encoder(device="cpu")))
    rng = np.random.default_rng(0)
    asked = judgements.groupby("query_id")["query"].first()
    typed = asked.map(lambda query: misspelt(query, rng))
    asked = asked[typed != asked]
    typed = typed[asked.index]
    mended = typed.map(speller.correct)
    judged = judgements[judgements["query_id"].isin(asked.index)]
    place = asked.index.get_indexer(judged["query_id"]), pd.Index(products["item_id"]).get_indexer(judged["item_id"])
    index = LexicalIndex.build(products["item_id"], product_text(products))

    def quality(texts):
        run = judged[["query_id", "item_id"]].assign(score=index.scores(texts)[place])
        return evaluate(run, judged, ("ndcg@10",), judged_only=True)["ndcg@10"].mean()

    same = np.mean([tokenise([one]) == tokenise([other]) for one, other in zip(mended, asked)])
    harmed = [query for query in asked if speller.changes(query)]
    clean, typo, after = quality(asked), quality(typed), quality(mended)
    print(f"{len(asked)} queries: {same:.1%} mended, harmed {harmed}, nDCG@10 {clean:.3f} {typo:.3f} {after:.3f}")
    assert same > 0.8 and len(harmed) <= 1
    assert clean - after < 0.25 * (clean - typo)
