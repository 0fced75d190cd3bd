"""The metrics against three authorities on a thousand random runs, and the statistics against cases whose answer is known."""

import itertools

import ir_measures
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import AP, RR, Bpref, Judged, P, R, SetF, nDCG
from scipy.stats import kendalltau, permutation_test
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score, ndcg_score

from ecomrec.evaluate.compare import bootstrap, compare_systems, holm, paired_test, random_floor
from ecomrec.evaluate.metrics import (
    ESCI_GAINS, ESCI_GAINS_AS_PUBLISHED, calibration_error, coverage, evaluate, grade_gains, informative, label_report, ndcg,
)
from ecomrec.evaluate.plots import bars, curves, styled

RUNS = 1_000
TO_TREC = {
    "ndcg@10": "ndcg_cut.10", "ndcg@3": "ndcg_cut.3", "ndcg": "ndcg", "recall@5": "recall.5", "recall": "set_recall", "precision@5": "P.5",
    "precision": "set_P", "f1": "set_F", "mrr": "recip_rank", "map": "map", "map@5": "map_cut.5", "bpref": "bpref",
}


def random_case(seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A run of a few queries with ties, unjudged items, empty lists, queries without relevant items and ones never judged."""
    rng = np.random.default_rng(seed)
    queries = [f"r{seed}q{number}" for number in range(rng.integers(1, 6))]
    items = [f"{rng.integers(0, 10**6):d}" + rng.choice(["", "-é", "鞋", "B"]) + f"{i}" for i in range(rng.integers(1, 30))]
    asked, named = np.repeat(queries, len(items)), np.tile(items, len(queries))
    order = rng.permutation(len(asked))
    judged, found = (order[rng.random(len(order)) < share] for share in (rng.uniform(0.2, 1), rng.uniform(0, 1)))
    if rng.random() < 0.5:
        found = found[asked[found] != rng.choice(queries)]
    grades = rng.integers(0, rng.integers(1, 5), len(judged))
    levels = rng.choice([1, 3, 1000])
    scores = rng.permutation(rng.integers(-levels, levels, len(found)) / 8)
    run = pd.DataFrame({"query_id": asked[found], "item_id": named[found], "score": scores})
    return run, pd.DataFrame({"query_id": asked[judged], "item_id": named[judged], "grade": grades})


@pytest.fixture(scope="module")
def cases() -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    return [random_case(seed) for seed in range(RUNS)]


@pytest.fixture(scope="module")
def together(cases) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All cases in one table; their queries have different names."""
    return tuple(pd.concat(frames, ignore_index=True) for frames in zip(*cases))


def as_nested(frame: pd.DataFrame, column: str) -> dict[str, dict[str, float]]:
    return {query: dict(zip(rows["item_id"], rows[column].tolist())) for query, rows in frame.groupby("query_id")}


def by_trec_eval(run: pd.DataFrame, judged: pd.DataFrame, relevant: int = 1) -> pd.DataFrame:
    """The authority's table; a list without results is left out of its input (it crashes on some) and counts as 0."""
    gains = judged.assign(grade=2 ** judged["grade"] - 1)
    evaluator = pytrec_eval.RelevanceEvaluator(as_nested(gains, "grade"), set(TO_TREC.values()), relevance_level=2**relevant - 1)
    found = pd.DataFrame.from_dict(evaluator.evaluate(as_nested(run, "score")), orient="index")
    found = found.reindex(columns=[name.replace(".", "_") for name in TO_TREC.values()]).set_axis(list(TO_TREC), axis=1)
    return found.reindex(np.sort(judged["query_id"].unique()), fill_value=0.0)


def condensed(run: pd.DataFrame, judged: pd.DataFrame) -> pd.DataFrame:
    return run.merge(judged[["query_id", "item_id"]], on=["query_id", "item_id"])


def test_cases_hold_what_they_should(cases, together):
    run, judged = together
    both = run.merge(judged, on=["query_id", "item_id"], how="left")
    assert len(cases) >= 1_000
    assert both["grade"].isna().any() and run.duplicated(["query_id", "score"]).any()
    assert not judged["query_id"].isin(run["query_id"]).all() and not run["query_id"].isin(judged["query_id"]).all()
    assert (judged.groupby("query_id")["grade"].max() == 0).any()


@pytest.mark.parametrize("relevant", [1, 2])
@pytest.mark.parametrize("judged_only", [False, True])
def test_equals_trec_eval(together, judged_only, relevant):
    run, judged = together
    ours = evaluate(run, judged, list(TO_TREC), judged_only=judged_only, relevant=relevant)
    theirs = by_trec_eval(condensed(run, judged) if judged_only else run, judged, relevant)
    assert ours.index.equals(pd.Index(theirs.index, name="query_id", dtype=ours.index.dtype))
    np.testing.assert_allclose(ours.to_numpy(), theirs.to_numpy(), atol=1e-6)


def test_each_run_alone_is_as_all_together(cases, together):
    whole = evaluate(*together, list(TO_TREC))
    for run, judged in cases[::5]:
        alone = evaluate(run, judged, list(TO_TREC))
        np.testing.assert_allclose(alone.to_numpy(), whole.loc[alone.index].to_numpy(), atol=1e-12)


def test_equals_ir_measures(together):
    run, judged = together
    names = {"ndcg@10": nDCG @ 10, "mrr": RR, "map": AP, "precision@5": P @ 5, "recall@5": R @ 5, "f1": SetF, "bpref": Bpref, "judged": Judged @ 10}
    # its Judged knows no rule for ties, so the run is handed over in our order, without any
    run = run.sort_values(["query_id", "score", "item_id"])
    run = run.assign(score=run.groupby("query_id").cumcount().astype(float))
    qrels = judged.assign(grade=2 ** judged["grade"] - 1).rename(columns={"item_id": "doc_id", "grade": "relevance"})
    found = ir_measures.iter_calc(list(names.values()), qrels, run.rename(columns={"item_id": "doc_id"}))
    table = pd.DataFrame([(m.query_id, str(m.measure), m.value) for m in found], columns=["query_id", "measure", "value"])
    ours = evaluate(run, judged, [name for name in names if name != "judged"] + ["unjudged@10"])
    theirs = table.pivot(index="query_id", columns="measure", values="value").reindex(ours.index).fillna(0.0)
    for name, measure in names.items():
        if name != "judged":
            np.testing.assert_allclose(ours[name], theirs[str(measure)], atol=1e-6, err_msg=name)
    shown = ours.index.isin(run["query_id"])
    np.testing.assert_allclose(1 - ours["unjudged@10"][shown], theirs[str(Judged @ 10)][shown], atol=1e-6)
    assert (ours["unjudged@10"][~shown] == 0).all()


def test_f1_at_a_cut_is_made_of_precision_and_recall(together):
    table = evaluate(*together, ["precision@5", "recall@5", "f1@5"])
    total = table["precision@5"] + table["recall@5"]
    expected = (2 * table["precision@5"] * table["recall@5"] / total.where(total > 0)).fillna(0.0)
    np.testing.assert_allclose(table["f1@5"], expected, atol=1e-12)


def test_mrr_at_a_cut_forgets_later_hits(together):
    table = evaluate(*together, ["mrr", "mrr@2"])
    np.testing.assert_allclose(table["mrr@2"], table["mrr"].where(table["mrr"] >= 0.5, 0.0), atol=1e-12)


def test_array_ndcg_equals_the_table_and_scikit_learn():
    rng = np.random.default_rng(0)
    for trial in range(50):
        shape = (4, int(rng.integers(2, 25)))
        gains, scores = rng.random(shape), rng.permuted(np.tile(np.arange(shape[1]), (4, 1)), axis=1).astype(float)
        for k in (1, 5, 40):
            np.testing.assert_allclose(ndcg(scores, gains, k), [ndcg_score(gains[[i]], scores[[i]], k=k) for i in range(4)], atol=1e-6)
    grades, tied = rng.integers(0, 4, (50, 12)), rng.integers(0, 3, (50, 12)).astype(float)
    mask = rng.random((50, 12)) < 0.7
    rows = [(f"q{q:02d}", f"p{i:02d}", grades[q, i], tied[q, i]) for q, i in zip(*np.nonzero(mask))]
    table = pd.DataFrame(rows, columns=["query_id", "item_id", "grade", "score"])
    expected = evaluate(table, table, ["ndcg@5"])["ndcg@5"]
    kept = [int(name[1:]) for name in expected.index]
    np.testing.assert_allclose(ndcg(tied, 2.0**grades - 1, 5, mask)[kept], expected, atol=1e-12)


def test_array_ndcg_of_nothing_and_refusals():
    assert ndcg(np.ones((2, 3)), np.zeros((2, 3))).tolist() == [0, 0]
    assert ndcg(np.zeros((0, 3)), np.zeros((0, 3))).shape == (0,)
    assert ndcg(np.array([[np.nan, 1.0]]), np.array([[np.nan, 2.0]]), mask=np.array([[False, True]])).tolist() == [1]
    assert ndcg(np.array([[-np.inf, 1.0]]), np.array([[1.0, 0.0]]), k=1).tolist() == [0]
    for scores, gains, fault in [
        (np.ones((1, 2)), np.ones((1, 3)), "one shape"), (np.ones(3), np.ones(3), "one shape"),
        (np.array([[np.nan]]), np.ones((1, 1)), "NaN"), (np.ones((1, 1)), -np.ones((1, 1)), "not negative"),
    ]:
        with pytest.raises(ValueError, match=fault):
            ndcg(scores, gains)


@settings(max_examples=max(1, settings().max_examples // 4))
@given(st.integers(0, 10**6))
def test_any_order_lies_between_zero_and_the_ideal(seed):
    run, judged = random_case(seed)
    table = evaluate(run, judged, [*TO_TREC, "f1@3", "mrr@3", "unjudged@3"])
    assert ((table >= 0) & (table <= 1 + 1e-12)).all(axis=None)
    best = evaluate(judged.assign(score=judged["grade"].astype(float)), judged, ["ndcg@5", "ndcg", "bpref"])
    findable = judged.groupby("query_id")["grade"].max().gt(0)
    for metric in best:
        np.testing.assert_allclose(best[metric], findable.astype(float), atol=1e-12)
    shuffled = evaluate(run.sample(frac=1, random_state=seed), judged.sample(frac=1, random_state=seed), ["ndcg@5", "map"])
    pd.testing.assert_frame_equal(shuffled, evaluate(run, judged, ["ndcg@5", "map"]))


def test_empty_tables():
    run, judged = random_case(3)
    nothing = evaluate(run.iloc[:0], judged, list(TO_TREC) + ["unjudged@10"])
    assert (nothing == 0).all(axis=None) and len(nothing) == judged["query_id"].nunique()
    assert len(evaluate(run, judged.iloc[:0], list(TO_TREC))) == 0


def test_nullable_grades_and_gains():
    run, judged = random_case(4)
    nullable = judged.astype({"grade": "Int64"})
    same = {grade: 2.0**grade - 1 for grade in range(5)}
    expected = evaluate(run, judged)
    pd.testing.assert_frame_equal(evaluate(run, nullable), expected)
    pd.testing.assert_frame_equal(evaluate(run, nullable, gains=same), expected)
    assert np.allclose(random_floor(nullable, gains=same), random_floor(judged))
    assert grade_gains([3, 2, 1, 0], ESCI_GAINS).tolist() == [1, 0.1, 0.01, 0]
    assert grade_gains([3, 2, 1, 0], ESCI_GAINS_AS_PUBLISHED).tolist() == [1, 0.01, 0.1, 0]
    with pytest.raises(ValueError, match="must be finite and not negative"):
        grade_gains([0], {0: -1.0})


@pytest.mark.parametrize("break_it, fault", [
    (lambda run, judged: (run.drop(columns="score"), judged), "run: column 'score' is missing"),
    (lambda run, judged: (run, judged.drop(columns="item_id")), "judgements: column 'item_id' is missing"),
    (lambda run, judged: (run.assign(item_id=1), judged), "run: item_id must be text"),
    (lambda run, judged: (run.assign(score=np.nan), judged), "run: score is nan for query"),
    (lambda run, judged: (run, judged.assign(grade=-1)), "judgements: grade is -1 for query"),
    (lambda run, judged: (pd.concat([run, run]), judged), "run: item .* stands twice for query"),
])
def test_refusals_name_table_and_column(break_it, fault):
    with pytest.raises(ValueError, match=fault):
        evaluate(*break_it(*random_case(5)))


@pytest.mark.parametrize("name", ["ndcg@0", "ndcg@-1", "NDCG@10", "bpref@10", "ndcg@", "accuracy"])
def test_unknown_metric_is_refused(name):
    with pytest.raises(ValueError, match="known are ndcg"):
        evaluate(*random_case(5), [name])


def test_informative():
    _, judged = random_case(8)
    expected = {query: len(set(rows["grade"])) > 1 for query, rows in judged.groupby("query_id")}
    assert informative(judged).to_dict() == expected


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=60))
def test_label_report_equals_scikit_learn(pairs):
    truth, predicted = np.array(pairs).T
    report = label_report(truth, predicted)
    assert report["accuracy"] == pytest.approx(accuracy_score(truth, predicted), abs=1e-12)
    assert report["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro", zero_division=0), abs=1e-12)
    if len(set(truth) | set(predicted)) > 1:
        expected = cohen_kappa_score(truth, predicted, weights="quadratic", labels=[0, 1, 2, 3])
        assert report["kappa"] == pytest.approx(expected, abs=1e-9)
    else:
        assert report["kappa"] == 0


def test_label_report_refuses():
    for truth, predicted, fault in [([], [], "at least 1"), ([1], [1, 2], "one length"), ([1], [0.5], "whole numbers")]:
        with pytest.raises(ValueError, match=fault):
            label_report(np.array(truth), np.array(predicted))


def test_calibration_error_equals_scikit_learn():
    rng = np.random.default_rng(0)
    for trial in range(100):
        said = np.round(rng.random(200), int(rng.integers(1, 5)))
        happened = (rng.random(200) < said**2).astype(int)
        share, mean = calibration_curve(happened, said, n_bins=10)
        weight = np.bincount(np.searchsorted(np.linspace(0, 1, 11)[1:-1], said), minlength=10)
        expected = np.sum(np.abs(share - mean) * weight[weight > 0]) / 200
        assert calibration_error(said, happened) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        calibration_error(np.array([1.2]), np.array([1]))


def test_coverage():
    assert coverage([["a", "b"], ["b"], []], 4) == 0.5
    with pytest.raises(ValueError, match="n_items is 1"):
        coverage([["a", "b"]], 1)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(1, 7))
def test_floor_is_the_mean_over_all_orders(grades, k):
    judged = pd.DataFrame({"query_id": "q", "item_id": [f"p{i}" for i in range(len(grades))], "grade": grades})
    orders = np.array(list(itertools.permutations(range(len(grades)))), float)
    every = ndcg(orders, np.tile(2.0 ** np.array(grades) - 1, (len(orders), 1)), k)
    assert random_floor(judged, k)["q"] == pytest.approx(every.mean(), abs=1e-9)


def test_floor_and_run_have_the_same_queries(together):
    _, judged = together
    floor = random_floor(judged)
    assert floor.index.equals(evaluate(judged.assign(score=0.0), judged).index)


def test_bootstrap_is_seeded_and_narrows():
    values = np.random.default_rng(0).random(400)
    assert bootstrap(values) == bootstrap(values) and bootstrap(values) != bootstrap(values, seed=1)
    few, many = bootstrap(values[:25]), bootstrap(values)
    assert many.high - many.low < few.high - few.low
    normal = 1.96 * values.std() / np.sqrt(len(values))
    assert many.high - many.mean == pytest.approx(normal, rel=0.1)
    one = bootstrap([0.5])
    assert one.mean == one.low == one.high == 0.5


def test_paired_test_equals_scipy_exactly_where_all_flips_are_counted():
    rng = np.random.default_rng(0)
    for trial in range(20):
        a, b = rng.integers(0, 5, (2, 9)) / 4
        theirs = permutation_test((a, b), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", vectorized=True, n_resamples=np.inf)
        assert paired_test(a, b).p == pytest.approx(theirs.pvalue, abs=1e-9)


def test_paired_test_under_no_difference_is_fair():
    rng = np.random.default_rng(0)
    p = [paired_test(*rng.normal(size=(2, 30)), n=400, seed=trial).p for trial in range(400)]
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.09


def test_paired_test_matches_queries_by_name():
    a = pd.Series([0.1, 0.5, 0.9], index=["x", "y", "z"])
    assert paired_test(a, a[::-1]).difference == 0
    with pytest.raises(ValueError):
        paired_test(a, a.rename({"z": "other"}))
    with pytest.raises(ValueError):
        paired_test(a, pd.Series([0.1, np.nan, 0.2], index=a.index))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_by_definition(p):
    corrected = np.asarray(holm(pd.Series(p)), float)
    order, running = np.argsort(p, kind="stable"), 0.0
    for rank, place in enumerate(order):
        running = max(running, min(1.0, (len(p) - rank) * p[place]))
        assert corrected[place] == pytest.approx(running, abs=1e-12)
    assert (corrected >= np.array(p) - 1e-15).all()
    assert len(p) < 2 or not kendalltau(p, corrected).statistic < 0


def test_compare_systems_against_the_rung_below_and_a_baseline():
    rng = np.random.default_rng(0)
    base = rng.random(60)
    table = pd.DataFrame({"a": base, "b": base + 0.1, "c": base + 0.1 + rng.normal(0, 0.05, 60)})
    ladder, against = compare_systems(table, n=1000), compare_systems(table, baseline="a", n=1000)
    assert list(ladder.index) == ["a", "b", "c"]
    assert ladder["mean"].to_dict() == pytest.approx(table.mean().to_dict())
    assert np.isnan(ladder.loc["a", "p"]) and ladder.loc["c", "difference"] == pytest.approx((table["c"] - table["b"]).mean())
    assert against.loc["c", "difference"] == pytest.approx((table["c"] - table["a"]).mean())
    assert against.loc["b", "p"] < 0.01 < ladder.loc["c", "p"]
    with pytest.raises(ValueError, match="bm25"):
        compare_systems(table, baseline="bm25")


def test_figures_draw_the_numbers_and_leave_matplotlib_alone():
    before, open_figures = dict(plt.rcParams), plt.get_fignums()
    table = pd.DataFrame({"mean": [0.4, 0.6], "low": [0.3, np.nan], "high": [0.5, np.nan]}, index=["a", "b"])
    figure = bars(table, floor=0.2)
    ends = [bar.get_x() + bar.get_width() for bar in figure.axes[0].patches]
    assert ends == pytest.approx([0.4, 0.6]) and [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["a", "b"]
    frame = pd.DataFrame({"round": [1, 1, 2, 2], "value": [0.1, 0.3, 0.5, 0.5], "system": "x"})
    figure = curves(frame, x="round", y="value", by="system", xlabel="round", ylabel="nDCG", lines={"oracle": 0.9})
    lines = [line.get_ydata() for line in figure.axes[0].lines]
    assert any(np.allclose(line, [0.2, 0.5]) for line in lines) and any(np.allclose(line, [0.9, 0.9]) for line in lines)
    assert figure.axes[0].get_xlabel() == "round" and figure.get_facecolor()[3] == 0
    with pytest.raises(ValueError, match="value"):
        curves(frame.drop(columns="value"), x="round", y="value", by="system", xlabel="", ylabel="")
    with styled():
        pass
    assert dict(plt.rcParams) == before and plt.get_fignums() == open_figures
