"""The fast query encoder: other poolings, hostile texts, damage, and what a choice rests on."""

import copy
import json
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel, BertTokenizerFast

from ecomrec.data.artefacts import ArtefactError, verify, write_json, writing
from ecomrec.model.adaptation import extend_vocabulary
from ecomrec.model.text import EncoderError, embed, load_encoder, unknown_share
from ecomrec.search import query_encoder
from ecomrec.search.index import DenseIndex
from ecomrec.search.query import whole_words
from ecomrec.search.query_encoder import (
    CHECKS, PRECISIONS, QueryEncoder, choose_query_encoder, compare_encoders, export_all, page_agreement,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "running", "shoes", "size", ",", "4", "##2", "a", "light", "jacket"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny BERT with random weights, saved."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = dict(vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
        BertModel(BertConfig(**sizes, max_position_embeddings=40, initializer_range=0.3)).save_pretrained(folder)
    return folder


def built(checkpoint, pooling="mean", *more) -> SentenceTransformer:
    """An encoder over the tiny BERT, with this pooling and these modules behind it."""
    body = Transformer(str(checkpoint), max_seq_length=32)
    return SentenceTransformer(modules=[body, Pooling(64, pooling_mode=pooling), *more], device="cpu").eval()


@pytest.fixture(scope="module")
def tiny(checkpoint):
    return built(checkpoint)


@pytest.fixture(scope="module")
def made(tiny):
    return export_all(tiny)


ASKED = ["red running shoes", "a light jacket , size 42", "", "跑步鞋", "shoes " * 500]


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
def test_the_graph_has_the_pooling_of_the_encoder(checkpoint, pooling):
    encoder = built(checkpoint, pooling)
    exported = QueryEncoder.export(encoder)
    assert np.allclose(exported.encode(ASKED), embed(encoder, ASKED, batch_size=1, precision="float32"), atol=1e-5)


def test_the_graph_has_all_modules_the_prompt_and_the_cut_dimension(checkpoint):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        encoder = built(checkpoint, "cls", Dense(64, 48), Normalize())
    encoder.truncate_dim, encoder.prompts, encoder.default_prompt_name = 32, {"query": "blue "}, "query"
    exported = QueryEncoder.export(encoder)
    assert exported.dimension == 32
    expected = embed(encoder, ASKED, batch_size=1, precision="float32")
    assert expected.shape == (5, 32) and np.allclose(exported.encode(ASKED), expected, atol=1e-5)
    encoder.default_prompt_name = None
    assert not np.allclose(exported.encode(ASKED), embed(encoder, ASKED, batch_size=1, precision="float32"), atol=1e-2)


def test_an_encoder_whose_graph_says_something_else_is_refused(checkpoint):
    encoder = built(checkpoint)
    encoder.prompts, encoder.default_prompt_name, encoder[1].include_prompt = {"query": "blue running "}, "query", False
    with pytest.raises(EncoderError, match="cannot be exported: its vector of a check text has the cosine"):
        QueryEncoder.export(encoder)


def test_what_stops_the_exporter_is_named(checkpoint):
    class Branching(torch.nn.Module):
        def forward(self, features):
            if features["sentence_embedding"].sum() > 0:
                features["sentence_embedding"] = -features["sentence_embedding"]
            return features

    with pytest.raises(EncoderError, match="cannot be exported: the exporter stops"):
        QueryEncoder.export(built(checkpoint, "mean", Branching()))


def test_export_leaves_the_encoder_and_the_loggers_as_they_were(checkpoint, made):
    encoder = built(checkpoint)
    before, root = copy.deepcopy(encoder.state_dict()), (logging.root.level, list(logging.root.handlers), logging.root.manager.disable)
    again = export_all(encoder)
    assert all(torch.equal(weight, before[name]) and weight.dtype == before[name].dtype for name, weight in encoder.state_dict().items())
    assert (logging.root.level, list(logging.root.handlers), logging.root.manager.disable) == root
    for precision in ("float32", "int8", "int8_blocks"):  # the same files each time, so that a hash means the same model
        assert again[precision].model == made[precision].model


def test_the_graph_tells_nothing_of_the_machine_and_has_free_axes(made, root):
    graph = made["float32"].model
    assert str(root).encode() not in graph and b"site-packages" not in graph and b".py" not in graph
    axes = [[axis.dim_param for axis in given.type.tensor_type.shape.dim] for given in onnx.load_from_string(graph).graph.input]
    assert axes and all(len(names) == 2 and all(names) for names in axes)
    ids = np.full((3, 7), 5)
    feed = dict.fromkeys(["input_ids", "attention_mask", "token_type_ids"], ids) | {"attention_mask": np.ones_like(ids), "token_type_ids": 0 * ids}
    assert made["float32"]._session.run(None, feed)[0].shape == (3, 64)


def test_int8_is_int8(made):
    kinds = {name: {node.op_type for node in onnx.load_from_string(made[name].model).graph.node} for name in PRECISIONS[:3]}
    assert "MatMulInteger" in kinds["int8"] and "MatMulNBits" in kinds["int8_blocks"]
    assert not {"MatMulInteger", "MatMulNBits"} & kinds["float32"]
    assert next(made["bfloat16"].model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=25)
@given(texts=st.lists(st.text(st.characters(), max_size=200), max_size=4))
def test_any_text_has_a_vector_and_the_same_in_any_company(made, precision, texts):
    encoder = made[precision]
    vectors = encoder.encode(texts)
    assert vectors.shape == (len(texts), encoder.dimension) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert all(np.array_equal(encoder.encode([text])[0], row) for text, row in zip(texts, vectors))
    assert ((encoder.unknown_share(texts) >= 0) & (encoder.unknown_share(texts) <= 1)).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_threads_of_a_service_share_one_encoder(made, precision):
    texts = [" ".join(WORDS[5 + (place + step) % 11] for step in range(1 + place % 9)) for place in range(200)]
    alone = made[precision].encode(texts)
    with ThreadPoolExecutor(8) as pool:
        together = np.concatenate(list(pool.map(lambda text: made[precision].encode([text]), texts)))
    assert np.array_equal(alone, together)


def test_a_very_long_query_is_cut(made):
    for encoder in made.values():
        assert np.array_equal(encoder.encode(["red shoes " * 50_000])[0], encoder.encode(["red shoes " * 100])[0])


def test_the_default_encoder_and_one_that_reads_chinese(tmp_path):
    wider = extend_vocabulary(load_encoder(device="cpu"), ["跑步鞋 running shoes"])
    made = export_all(wider, ["float32", "int8", "int8_blocks"])
    asked = ["跑步鞋", "running shoes", "红 shoes", ""]
    expected = embed(wider, asked, batch_size=1, precision="float32")
    for precision, least in {"float32": 0.99999, "int8": 0.95, "int8_blocks": 0.998}.items():
        assert ((made[precision].encode(asked) * expected).sum(axis=1) >= least).all()
        assert np.array_equal(made[precision].unknown_share(asked), unknown_share(wider, asked))
        assert whole_words(made[precision]) == whole_words(wider)
    made["int8_blocks"].save(tmp_path / "saved")
    assert np.array_equal(QueryEncoder.load(tmp_path / "saved").encode(asked), made["int8_blocks"].encode(asked))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_loaded_says_the_same_with_any_number_of_threads(made, tmp_path, precision):
    folder = tmp_path / "saved"
    made[precision].save(folder)
    assert not [path.name for path in folder.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]
    one, two = QueryEncoder.load(folder), QueryEncoder.load(folder, threads=2)
    assert np.array_equal(one.encode(ASKED), made[precision].encode(ASKED))
    assert np.allclose(two.encode(ASKED), one.encode(ASKED), atol=1e-4)
    one.save(folder)  # over itself
    assert np.array_equal(QueryEncoder.load(folder).unknown_share(ASKED), made[precision].unknown_share(ASKED))
    with pytest.raises(ValueError, match="threads must be 1 or more"):
        QueryEncoder.load(folder, threads=0)


@pytest.fixture
def saved(made, tmp_path):
    """A saved query encoder's folder, to be spoilt."""
    made["int8"].save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "config.json", "check.safetensors", "manifest.json"])
def test_a_changed_cut_or_missing_file_is_refused(saved, name):
    whole = (saved / name).read_bytes()
    for damaged in (whole[:-9], b"", whole[:20] + bytes([whole[20] ^ 4]) + whole[21:]):
        (saved / name).write_bytes(damaged)
        with pytest.raises(ArtefactError):
            QueryEncoder.load(saved)
    (saved / name).unlink()
    with pytest.raises(ArtefactError):
        QueryEncoder.load(saved)
    (saved / name).write_bytes(whole)
    assert QueryEncoder.load(saved).encode(["red"]).shape == (1, 64)


def test_no_folder_is_an_artefact_error(tmp_path):
    with pytest.raises(ArtefactError):
        QueryEncoder.load(tmp_path / "nothing")


def wrong(folder, **files) -> None:
    """Replace files of a saved folder so that its checksums are right."""
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    with writing(folder) as half:
        for name, content in kept.items():
            (half / name).write_bytes(files.get(name.split(".")[0], content))
    verify(folder)


def model_with(graph: bytes, change) -> bytes:
    """A graph whose weights have been changed."""
    model = onnx.load_from_string(graph)
    for place, tensor in enumerate(model.graph.initializer):
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim == 2:
            model.graph.initializer[place].CopyFrom(onnx.numpy_helper.from_array(change(values), tensor.name))
    return model.SerializeToString()


def test_a_foreign_model_with_right_checksums_is_refused(checkpoint, made, saved):
    wider = QueryEncoder.export(built(checkpoint, "mean", Dense(64, 48)), "int8")
    graph = made["float32"].model
    cases = {
        r"the shape \(4, 48\), not \(4, 64\)": wider.model,
        "not finite": model_with(graph, lambda values: values * np.float32(np.nan)),
        "has the cosine": model_with(graph, lambda values: values[:, ::-1].copy()),
        "cannot be opened": b"no model at all",
    }
    for match, model in cases.items():
        wrong(saved, model=model)
        with pytest.raises(ArtefactError, match=match):
            QueryEncoder.load(saved)


def test_other_files_that_do_not_fit_are_refused(made, saved):
    config = (saved / "config.json").read_bytes()
    other = Tokenizer.from_file(str(saved / "tokenizer.json"))
    other.add_tokens(["running", "foreign"])  # a number without a row in the table
    vectors = made["int8"].encode(CHECKS)
    save_file({"vectors": -vectors}, saved.with_name("check"))
    cases = [
        ({"tokenizer": b"{}"}, "cannot be opened"),
        ({"config": b"[]"}, "cannot be opened"),
        ({"config": config.replace(b"QueryEncoder", b"Engine")}, "holds 'Engine', not a query encoder"),
        ({"config": json.dumps(json.loads(config) | {"checks": ["foreign"] * 4}).encode(), "tokenizer": other.to_str().encode()}, "cannot be opened|cosine"),
        ({"check": saved.with_name("check").read_bytes()}, "cosine -1.0000"),
        ({"check": b"\xff" * 64}, "cannot be opened"),
    ]
    for files, match in cases:
        made["int8"].save(saved)
        wrong(saved, **files)
        with pytest.raises(ArtefactError, match=match):
            QueryEncoder.load(saved)


def test_agreement_is_one_where_the_page_is_the_same_and_falls_with_what_is_lost():
    rng = np.random.default_rng(0)
    exact = rng.uniform(size=(30, 50))
    assert (page_agreement(exact, exact) == 1).all() and (page_agreement(exact, exact + 5) == 1).all()
    assert (page_agreement(exact, -exact) == 0).all()
    small, large = (page_agreement(exact, exact + spread * rng.normal(size=exact.shape)).mean() for spread in (0.01, 0.3))
    assert 1 >= small > large > 0
    assert page_agreement(exact[:, :4], exact[:, :4], k=10).tolist() == [1] * 30


@pytest.fixture(scope="module")
def shop(tiny):
    """Twelve products and judged queries."""
    texts = [f"{colour} {kind} , size {size}" for colour in ("red", "blue") for kind in ("shoes", "light jacket", "running shoes") for size in (4, 42)]
    ids = [f"p{number:02}" for number in range(len(texts))]
    pairs = [(query, item, int(all(word in text.split() for word in query.split()))) for query in ("red shoes", "light jacket", "blue running shoes") for item, text in zip(ids, texts)]
    return DenseIndex.build(ids, embed(tiny, texts, precision="float32")), pd.DataFrame(pairs, columns=["query", "item_id", "grade"])


def test_the_table_says_what_is_kept(tiny, made, shop):
    dense, judged = shop
    table = compare_encoders(tiny, made, dense, judged)
    assert list(table.index) == ["torch", *PRECISIONS] and (table["ms"] > 0).all()
    assert (table.loc[["torch", "float32"], ["kept", "agreement"]] == 1).all(axis=None)
    assert ((table["kept_low"] <= table["kept"]) & (table["kept"] <= table["kept_high"])).all()
    table = compare_encoders(tiny, made, dense, queries=["red shoes"])
    assert (table["kept"] - table["agreement"]).abs().max() < 1e-12
    with pytest.raises(ValueError, match="either judgements or queries"):
        compare_encoders(tiny, made, dense, judged, ["red shoes"])
    with pytest.raises(ValueError, match="there is none to measure with"):
        compare_encoders(tiny, made, dense, queries=[])
    with pytest.raises(ValueError, match="finds nothing relevant"):
        compare_encoders(tiny, made, dense, judged.assign(grade=0))


ROWS = ["torch", "float32", "int8", "int8_blocks"]


@pytest.mark.parametrize("kept, ms, best", [
    ([1, 1, 0.995, 0.999], [20, 5, 1, 2], "int8"),
    ([1, 1, 0.985, 0.999], [20, 5, 1, 2], "int8_blocks"),
    ([1, 1, 0.985, 0.95], [20, 5, 1, 2], "float32"),
    ([1, 0.98, 0.985, 0.95], [20, 5, 1, 2], "float32"),
    ([1, 1, 0.995, 0.999], [20, 1, 4, 2], "float32"),
])
def test_the_fastest_that_keeps_enough_is_chosen(tiny, made, shop, monkeypatch, kept, ms, best):
    monkeypatch.setattr(query_encoder, "export_all", lambda *some: made)
    monkeypatch.setattr(query_encoder, "compare_encoders", lambda *some: pd.DataFrame({"kept": kept, "ms": ms}, index=ROWS))
    choice = choose_query_encoder(tiny, *shop)
    assert choice.encoder.precision == best and "nDCG@10 on 3 judged queries" in str(choice)


def test_a_choice_without_judgements_says_so(tiny, shop):
    choice = choose_query_encoder(tiny, shop[0], queries=["red shoes", "light jacket"])
    assert choice.table.loc[choice.encoder.precision, "kept"] >= 0.99
    assert "agreement, not relevance" in str(choice)
    with pytest.raises(ValueError, match="least must be a share"):
        choose_query_encoder(tiny, shop[0], queries=["red shoes"], least=99)
