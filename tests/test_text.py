"""Text encoders and losses: what a reader of the notebooks need not see."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertForSequenceClassification

from ecomrec.data.artefacts import ArtefactError, writing
from ecomrec.model import text
from ecomrec.model.losses import choice_loss, clicks_loss
from ecomrec.model.text import EncoderError, embed, has_bfloat16, load_encoder, plain, product_text, unknown_share

PACKAGE = text._OFFLINE[text.DEFAULT_ENCODER][0]


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(device="cpu")


def test_equal_texts_get_equal_vectors_in_any_company(encoder):
    texts = [f"product number {n} " + "word " * (n % 7) for n in range(50)] + ["product number 3 word word word "] * 2
    vectors = embed(encoder, texts, batch_size=8)
    assert vectors.dtype == np.float32 and vectors.shape == (52, 384)
    assert np.array_equal(vectors[50], vectors[51])
    order = np.random.default_rng(0).permutation(52)
    assert np.array_equal(embed(encoder, [texts[n] for n in order], batch_size=8), vectors[order])


def test_embedding_leaves_the_encoder_as_it_was(encoder):
    before = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    embed(encoder, ["shoes"], precision="bfloat16")
    after = encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


@pytest.mark.skipif(not has_bfloat16(), reason="this processor has no bfloat16")
def test_bfloat16_is_taken_where_it_is_there_and_close(encoder):
    texts = ["red running shoes", "laptop with 16 GB memory", "a bottle for tea", ""]
    exact, half, auto = (embed(encoder, texts, precision=p) for p in ("float32", "bfloat16", "auto"))
    assert np.array_equal(half, auto) and not np.array_equal(exact, half)
    assert ((exact * half).sum(axis=1) > 0.999).all()


def test_bad_arguments_are_named(encoder):
    with pytest.raises(ValueError, match="precision: 'int3'"):
        embed(encoder, ["a"], precision="int3")
    with pytest.raises(ValueError, match="row 0 is nan"):
        embed(encoder, [float("nan")])
    with pytest.raises(EncoderError, match="not on the hub"):
        load_encoder("/no/such/folder/anywhere")


def test_a_tampered_package_is_refused(tmp_path, monkeypatch):
    fake = tmp_path / PACKAGE
    (fake / "model").mkdir(parents=True)
    (fake / "__init__.py").write_text("")
    (fake / "model" / "model.safetensors").write_bytes(b"not the weights")
    monkeypatch.setattr(
        text.importlib.util, "find_spec", lambda name: type("Spec", (), {"origin": str(fake / "__init__.py")}),
    )
    with pytest.raises(EncoderError, match="SHA-256"):
        load_encoder()


def test_a_saved_encoder_opens_again_and_a_changed_one_does_not(encoder, tmp_path):
    folder = tmp_path / "encoder"
    with writing(folder) as half:
        encoder.save(str(half), create_model_card=False)
    again = load_encoder(str(folder), device="cpu")
    assert np.array_equal(embed(again, ["red shoes"]), embed(encoder, ["red shoes"]))
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes() + b" ")
    with pytest.raises(ArtefactError, match="config.json"):
        load_encoder(str(folder))


def test_weights_that_are_a_pickle_are_refused(encoder, tmp_path):
    folder = tmp_path / "pickled"
    encoder.save(str(folder), create_model_card=False)
    torch.save(encoder[0].state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(EncoderError):
        load_encoder(str(folder))
    shutil.rmtree(folder)


@pytest.fixture
def saved(encoder, tmp_path):
    """A saved encoder's folder, to be spoilt."""
    folder = tmp_path / "saved"
    encoder.save(str(folder), create_model_card=False)
    return folder


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_without_a_model_says_what_it_lacks(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(EncoderError, match="neither modules.json nor config.json"):
        load_encoder(tmp_path / "empty", device="cpu")
    (tmp_path / "half").mkdir()
    shutil.copy(saved / "config.json", tmp_path / "half")
    with pytest.raises(EncoderError, match="its weights, model.safetensors, are missing"):
        load_encoder(str(tmp_path / "half"), device="cpu")
    (saved / "pytorch_model.bin").write_bytes((saved / "model.safetensors").read_bytes())
    (saved / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match="pytorch_model.bin is a pickle"):
        load_encoder(str(saved), device="cpu")
    (saved / "config.json").unlink()
    with pytest.raises(EncoderError, match="config.json is missing"):
        load_encoder(str(saved), device="cpu")


def test_weights_that_do_not_fit_the_configuration_are_refused(saved):
    kept = (saved / "config.json").read_text()
    edit(saved / "config.json", hidden_size=192)
    with pytest.raises(EncoderError, match=r"weights have another shape .* with \(384,\) for \(192,\)"):
        load_encoder(str(saved), device="cpu")
    (saved / "config.json").write_text(kept)
    edit(saved / "config.json", num_hidden_layers=7)
    with pytest.raises(EncoderError, match=r"16 weights are missing in the file, the first is encoder\.layer\.6"):
        load_encoder(str(saved), device="cpu")


BROKEN = [("config.json", "{"), ("config.json", "[]"), ("modules.json", "[]"), ("modules.json", "{}"), ("modules.json", "[{}]")]


@pytest.mark.parametrize("file, text", [("model.safetensors", None), *BROKEN])
def test_files_that_cannot_be_read_are_refused(saved, file, text):
    if text is None:
        whole = (saved / file).read_bytes()
        (saved / file).write_bytes(whole[: len(whole) // 2])
    else:
        (saved / file).write_text(text)
    with pytest.raises(EncoderError, match="cannot be opened"):
        load_encoder(str(saved), device="cpu")


def test_a_cross_encoder_is_refused(saved, tmp_path):
    folder = tmp_path / "cross"
    BertForSequenceClassification.from_pretrained(saved, num_labels=1).save_pretrained(folder)
    with pytest.raises(EncoderError, match=r"cross-encoder \(BertForSequenceClassification\)"):
        load_encoder(str(folder), device="cpu")
    edit(saved / "config_sentence_transformers.json", model_type="CrossEncoder")
    with pytest.raises(EncoderError, match="cross-encoder"):
        load_encoder(str(saved), device="cpu")


def test_a_tokenizer_that_does_not_fit_is_refused(encoder, saved):
    wider = load_encoder(str(saved), device="cpu")
    wider.tokenizer.add_tokens(["swiftfoot", "softsole"])
    wider.tokenizer.save_pretrained(saved)
    with pytest.raises(EncoderError, match="30524 word pieces and its embedding table 30522 rows"):
        load_encoder(str(saved), device="cpu")
    wider[0].model.resize_token_embeddings(30528)  # more rows than words is what many models have
    wider.save(str(saved), create_model_card=False)
    assert np.array_equal(embed(load_encoder(str(saved), device="cpu"), ["red shoes"]), embed(encoder, ["red shoes"]))
    for path in [*saved.glob("tokenizer*"), *saved.glob("vocab*")]:
        path.unlink()
    with pytest.raises(EncoderError, match="tokenizer knows no word"):
        load_encoder(str(saved), device="cpu")


def test_a_device_that_is_not_there_is_not_the_folders_fault(saved):
    with pytest.raises(RuntimeError) as refused:
        load_encoder(str(saved), device="no such device")
    assert not isinstance(refused.value, EncoderError)


def test_an_empty_title_has_a_vector(encoder):
    vectors = embed(encoder, ["", "   ", "red shoes"])
    assert np.isfinite(vectors).all() and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.allclose(vectors[0], vectors[1], atol=1e-5) and vectors[0] @ vectors[2] < 0.5


SENTENCE = "Light rain jacket, size 42, packed in its own pocket. "


@pytest.mark.parametrize(
    "text", [SENTENCE * 1900, "跑步鞋" * 34_000, "\u2163" * 100_000, " " * 100_000 + "red shoes", "x" * 100_000 + " red"],
    ids=["words", "Chinese", "compatibility signs", "spaces", "one long word"],
)
def test_a_description_of_100_000_letters_has_the_vector_of_its_start(encoder, text):
    assert len(text) >= 100_000
    assert np.allclose(embed(encoder, [text], precision="float32"), encoder.encode([plain(text)]), atol=1e-5)


def test_long_texts_are_read_no_further_than_needed(encoder):
    limit = 20 * encoder.max_seq_length
    assert text._head(encoder, SENTENCE * 1900) == (SENTENCE * 1900)[:limit]
    for kept in [SENTENCE * 20, " " * 100_000 + "red shoes", "x" * 100_000 + " red"]:  # the start alone says too little
        assert text._head(encoder, kept) == kept


def test_long_texts_are_cut(encoder):
    words = " ".join(["shoe"] * 500)
    assert np.allclose(embed(encoder, [words]), embed(encoder, [words + " bottle"]), atol=1e-6)


def test_unknown_share(encoder):
    shares = unknown_share(encoder, ["running shoes", "跑步鞋", "", "nike 跑步鞋"])
    assert shares[0] == 0 and shares[1] == 1 and shares[2] == 0 and 0 < shares[3] < 1


@given(st.lists(st.one_of(st.none(), st.text(max_size=20)), min_size=1, max_size=5))
@settings(deadline=None)
def test_product_text_never_fails_and_never_says_nan(titles):
    frame = pd.DataFrame({"title": pd.array(titles, dtype="str"), "attributes": pd.array(titles, dtype="str")})
    texts = product_text(frame, ["title"])
    assert len(texts) == len(titles) and texts.index.equals(frame.index)
    assert all(text == " ".join((title or "").split()) for text, title in zip(texts, titles))
    assert len(product_text(frame, ["title", "attributes"])) == len(titles)


def test_product_text_reads_numbers_and_lists_of_attributes():
    frame = pd.DataFrame(
        {"title": ["shoe"], "attributes": ['{"size": 42, "colours": ["red", "blue"]}'], "brand": ["Swift"]}
    )
    found = product_text(frame, ["brand", "title", "attributes"])[0]
    assert found.startswith("Swift. shoe. 42") and "red" in found


@given(st.integers(2, 30), st.integers(1, 5), st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_choice_loss_properties(candidates, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, candidates, generator=generator, dtype=torch.float64) * 5
    chosen = torch.randint(candidates, (rows,), generator=generator)
    loss = choice_loss(scores, chosen)
    assert loss >= 0 and torch.allclose(loss, torch.nn.functional.cross_entropy(scores, chosen))
    order = torch.randperm(candidates, generator=generator)
    assert torch.allclose(choice_loss(scores[:, order], torch.argsort(order)[chosen]), loss)
    clicks = torch.nn.functional.one_hot(chosen, candidates).double()
    assert torch.allclose(clicks_loss(scores, clicks), loss)
    closed = torch.cat([scores, torch.full((rows, 2), -torch.inf, dtype=torch.float64)], dim=1)
    assert torch.allclose(choice_loss(closed, chosen), loss)


def test_clicks_loss_has_finite_gradients_beside_what_was_not_offered():
    scores = torch.tensor([[1.0, -torch.inf, 0.0], [-torch.inf] * 3], requires_grad=True)
    clicks_loss(scores, torch.tensor([[2.0, 0.0, 1.0], [0.0] * 3])).backward()
    assert torch.isfinite(scores.grad).all() and (scores.grad[1] == 0).all() and scores.grad[0, 1] == 0


@pytest.mark.parametrize("weights", [[-1.0, 2.0], [float("nan"), 1.0], [0.0, 0.0], [float("inf"), 1.0]])
def test_weights_without_meaning_are_refused(weights):
    with pytest.raises(ValueError, match="weight"):
        choice_loss(torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor(weights))
