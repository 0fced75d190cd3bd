"""Adaptation: what a reader of the notebook need not see; all on models that are built here and take seconds."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertModel,
    BertTokenizer,
    GPT2ForSequenceClassification,
)

from ecomrec.data.artefacts import ArtefactError, verify
from ecomrec.model.adaptation import (
    adapt_contrastive,
    adapt_masked,
    also_right,
    broken_words,
    catalogue_pairs,
    extend_vocabulary,
    imitation_lists,
    language_loss,
    masked_model,
    new_decoder,
    pretrain_decoder,
    unknown_characters,
)
from ecomrec.model.finetuning import open_model, save_model
from ecomrec.model.text import embed, load_encoder, unknown_share

WORDS = "red blue running leather shoes water bottle for men women bag the and light 白 10 42 . , > 's".split()
TEXTS = ["跑步鞋 red running shoes", "跑鞋 blue running shoes", "皮鞋 leather shoes for men", "水壶 water bottle", "白酒"] * 4


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    BertTokenizer(vocab={word: place for place, word in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **shape)).save_pretrained(folder)
    body = Transformer(str(folder))
    body.max_seq_length = 32
    return SentenceTransformer(modules=[body, Pooling(32)], device="cpu").eval()


@pytest.fixture(scope="module")
def extended(encoder):
    return extend_vocabulary(encoder, TEXTS)


def table(model):
    return model[0].model.get_input_embeddings().weight.detach()


def weights(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_new_token_is_itself_and_nothing_old_changes(encoder, extended):
    n_known, before = len(encoder.tokenizer), weights(encoder)
    again = extend_vocabulary(encoder, TEXTS, max_words=20)
    added = again.tokenizer.convert_ids_to_tokens(range(n_known, len(again.tokenizer)))
    assert set("跑步鞋皮水壶酒") <= set(added) and "跑步" in added
    assert all(again.tokenizer.tokenize(token) == [token] for token in added)
    assert unknown_share(again, TEXTS).max() == 0
    for model in (extended, again):
        old, new = encoder.tokenizer.get_vocab(), model.tokenizer.get_vocab()
        assert all(new[piece] == place for piece, place in old.items())
        assert torch.equal(table(model)[:n_known], table(encoder)) and len(table(model)) == len(model.tokenizer)
        assert model.max_seq_length == encoder.max_seq_length
    assert equal(before, weights(encoder)) and len(encoder.tokenizer) == n_known
    assert np.allclose(embed(extended, ["red shoes"]), embed(encoder, ["red shoes"]), atol=1e-6)


def test_the_same_seed_starts_the_same_vectors(encoder, extended):
    assert equal(weights(extended), weights(extend_vocabulary(encoder, TEXTS)))
    assert not torch.equal(table(extended), table(extend_vocabulary(encoder, TEXTS, seed=1)))
    assert torch.equal(torch.get_rng_state(), (extend_vocabulary(encoder, TEXTS), torch.get_rng_state())[1])


def test_new_vectors_start_near_their_company(encoder):
    start, ids = extend_vocabulary(encoder, TEXTS, noise=0), encoder.tokenizer.convert_tokens_to_ids
    centre = table(encoder).mean(dim=0)
    apart = torch.nn.functional.normalize(table(start) - centre, dim=1)
    bottle = apart[start.tokenizer.convert_tokens_to_ids("壶")]
    assert bottle @ apart[ids("bottle")] > bottle @ apart[ids("running")] + 0.3
    alone = extend_vocabulary(encoder, ["酒"], noise=0)
    assert torch.allclose(table(alone)[-1], centre, atol=1e-6)


def test_an_english_word_starts_as_the_mean_of_its_pieces_and_keeps_its_borders(encoder):
    texts = ["Amplio red bag", "amplio's blue bag", "AMPLIO跑鞋"]
    model = extend_vocabulary(encoder, texts, max_words=10)
    pieces = encoder.tokenizer("amplio", add_special_tokens=False)["input_ids"]
    expected = table(encoder)[pieces].mean(dim=0)
    assert torch.allclose(table(model)[model.tokenizer.convert_tokens_to_ids("amplio")], expected, atol=1e-6)
    assert [model.tokenizer.tokenize(text)[0] for text in texts] == ["amplio"] * 3
    assert model.tokenizer.tokenize("amplios")[0] == "a"


@pytest.mark.parametrize("text", ["shoes👟", "a👟b跑", "Ωμέγα 跑", "ニット服", "안녕 鞋", "สีแดง", "ＮＩＫＥ™跑", "👨‍👩‍👧", "\ufeff"])
def test_emoji_and_mixed_scripts_become_readable(encoder, text):
    assert unknown_share(extend_vocabulary(encoder, [text]), [text])[0] == 0


@settings(max_examples=15)
@given(st.lists(st.text(max_size=12), max_size=4))
def test_any_text_becomes_readable(encoder, texts):
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    model = extend_vocabulary(encoder, texts)
    assert unknown_characters(model.tokenizer, texts) == []
    assert torch.isfinite(table(model)).all()


def test_nothing_to_add_gives_a_copy(encoder):
    for texts in ([], [""], ["red shoes"]):
        model = extend_vocabulary(encoder, texts)
        assert model is not encoder and equal(weights(model), weights(encoder))
        assert len(model.tokenizer) == len(encoder.tokenizer)


def test_bad_texts_and_numbers_are_named(encoder):
    with pytest.raises(ValueError, match="row 1 is nan"):
        extend_vocabulary(encoder, ["a", float("nan")])
    with pytest.raises(ValueError, match="max_words at least 0"):
        broken_words(encoder.tokenizer, TEXTS, max_words=-1)
    with pytest.raises(ValueError, match="nothing to learn from"):
        adapt_masked(encoder, [""])


def test_an_extended_encoder_is_saved_and_opened_by_plain_sentence_transformers(extended, tmp_path):
    save_model(extended, tmp_path / "model")
    verify(tmp_path / "model")
    opened = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert opened.tokenizer.get_vocab() == extended.tokenizer.get_vocab()
    assert opened.tokenizer.tokenize("红跑鞋") == extended.tokenizer.tokenize("红跑鞋") == ["[UNK]", "跑", "鞋"]
    assert equal(weights(opened), weights(extended))
    assert np.array_equal(embed(load_encoder(str(tmp_path / "model"), "cpu"), TEXTS), embed(extended, TEXTS))


def test_guessing_masks_is_learned_repeatable_and_saved(extended, tmp_path):
    before = weights(extended)
    setting = dict(epochs=30, batch_size=10, learning_rate=5e-3)
    read = adapt_masked(extended, TEXTS, tmp_path / "run", **setting)
    assert equal(before, weights(extended))
    untrained = language_loss(masked_model(extended), extended.tokenizer, TEXTS, 0.15)
    assert abs(untrained - np.log(len(extended.tokenizer))) < 1
    assert language_loss(read.masked, extended.tokenizer, TEXTS, 0.15) < untrained - 1
    assert read.losses[-1] < read.losses[0] - 1
    again = adapt_masked(extended, TEXTS, **setting)
    assert equal(weights(read.encoder), weights(again.encoder)) and again.losses == read.losses
    other = adapt_masked(extended, TEXTS, seed=1, **setting)
    assert not equal(weights(read.encoder), weights(other.encoder))
    verify(tmp_path / "run/encoder"), verify(tmp_path / "run/masked")
    masked = AutoModelForMaskedLM.from_pretrained(tmp_path / "run/masked")
    assert equal(weights(masked), weights(read.masked))
    assert torch.equal(masked.get_output_embeddings().weight, masked.get_input_embeddings().weight)
    assert torch.equal(masked.get_input_embeddings().weight, table(read.encoder))
    opened = SentenceTransformer(str(tmp_path / "run/encoder"), device="cpu")
    assert equal(weights(opened), weights(read.encoder))


def shop():
    return pd.DataFrame({
        "item_id": ["1", "2", "3", "4", "5", "6"], "parent_id": ["a", "a", "b", "c", None, None],
        "title": ["跑步鞋 红色", "跑步鞋 蓝色", "皮鞋", "水壶", "blue bag", ""],
        "description": ["for running", "for running", None, "water", "light bag", None],
        "category": ["shoes > running shoes", "shoes > running shoes", "shoes > leather shoes", "water bottle", None, None],
        "attributes": ['{"colour": "red"}', '{"colour": "blue", "size": 42}', "no json", None, '["list"]', None],
    })


def test_pairs_come_from_the_products_own_texts():
    pairs = catalogue_pairs(shop())
    assert pairs.equals(catalogue_pairs(shop())) and not pairs.equals(catalogue_pairs(shop(), seed=1))
    assert set(pairs["kind"]) <= {"description", "category", "attributes", "shortened"}
    assert ((pairs["anchor"] != "") & (pairs["positive"] != "") & (pairs["anchor"] != pairs["positive"])).all()
    assert set(pairs["parent"]) == {"a", "b", "c", "5"}
    assert "shoes running shoes" in set(pairs["anchor"])
    titles = catalogue_pairs(pd.DataFrame({"title": ["red bag", "blue bag"]}), kept=0.9)
    assert len(titles) == 0 or set(titles["kind"]) == {"shortened"}
    assert len(catalogue_pairs(shop().head(0))) == 0
    assert set(catalogue_pairs(shop(), kept=0)["kind"]) == {"description", "category", "attributes"}


def test_what_is_also_right_is_symmetric_and_never_the_own_pair():
    codes = torch.tensor([[0, 0, 0], [0, 1, 1], [1, 1, 2], [2, 2, 3]])
    same = also_right(codes)
    assert torch.equal(same, same.T) and not same.diagonal().any()
    assert same.nonzero().tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]


def test_pairs_are_learned_repeatable_and_saved(extended, tmp_path):
    pairs = pd.concat([catalogue_pairs(shop(), seed=seed) for seed in range(4)])
    before = weights(extended)
    setting = dict(epochs=15, batch_size=16, learning_rate=3e-3)
    told = adapt_contrastive(extended, pairs, tmp_path / "model", **setting)
    assert told.losses[-1] < told.losses[0] and told.masked is None and equal(before, weights(extended))
    assert equal(weights(told.encoder), weights(adapt_contrastive(extended, pairs, **setting).encoder))
    vectors = embed(SentenceTransformer(str(tmp_path / "model"), device="cpu"), ["running shoes", "跑步鞋 红色", "水壶"])
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    with pytest.raises(ValueError, match="no column"):
        adapt_contrastive(extended, pairs.drop(columns="anchor"))
    with pytest.raises(ValueError, match="fewer than two"):
        adapt_contrastive(extended, pairs.head(1))


def test_what_is_no_saved_folder_is_not_overwritten(extended, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ArtefactError, match="nothing was touched"):
        save_model(extended, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_the_next_token_is_learned_repeatable_and_saved(extended, tmp_path):
    shape = dict(layers=2, width=32, heads=2, max_tokens=16)
    tokenizer = extended.tokenizer
    untrained = language_loss(new_decoder(tokenizer, **shape), tokenizer, TEXTS, max_tokens=16)
    assert abs(untrained - np.log(len(tokenizer))) < 0.3
    decoder = pretrain_decoder(TEXTS, tokenizer, tmp_path / "gpt", epochs=20, learning_rate=1e-2, **shape)
    assert language_loss(decoder, tokenizer, TEXTS, max_tokens=16) < untrained / 2
    again = pretrain_decoder(TEXTS, tokenizer, epochs=20, learning_rate=1e-2, **shape)
    assert equal(weights(decoder), weights(again))
    verify(tmp_path / "gpt")
    body = AutoModel.from_pretrained(tmp_path / "gpt")
    assert torch.equal(body.wte.weight, decoder.transformer.wte.weight)
    judge = GPT2ForSequenceClassification.from_pretrained(tmp_path / "gpt", num_labels=1)
    batch = tokenizer(["跑鞋", "red running shoes for men"], padding=True, return_tensors="pt")
    assert judge(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.shape == (2, 1)


def test_a_later_token_does_not_change_an_earlier_guess(extended):
    decoder = new_decoder(extended.tokenizer, layers=2, width=32, heads=2, max_tokens=16)
    ids = extended.tokenizer(["跑鞋 red running shoes", "跑鞋 red running bag"], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        first, second = decoder(input_ids=ids).logits
    assert torch.allclose(first[:5], second[:5], atol=1e-5) and not torch.allclose(first[5], second[5])


def test_a_decoder_reads_pairs_as_it_was_taught(encoder, tmp_path):
    pretrain_decoder(["red shoe", "blue hat"] * 8, encoder.tokenizer, tmp_path / "gpt", layers=1, width=16)
    features = open_model("cross_encoder", str(tmp_path / "gpt"), 16, device="cpu").preprocess([("red", "shoe")])
    assert "token_type_ids" in encoder.tokenizer("red", "shoe") and "token_type_ids" not in features


def test_a_title_of_which_no_word_is_left_asks_for_nothing(encoder):
    titles = pd.Series(["shoe", "hat", "lamp", "cup", "ﬁne bag", "water bottle"])
    lists = imitation_lists(encoder, titles, n=6, size=2)
    assert 0 < len(lists) < 6 and all(lists["query"][:])
    offered = {text for row in lists["docs"][:] for text in row}
    assert offered <= {*titles[:4], "fine bag", "water bottle"}
