"""Every probe against scikit-learn called directly, Cox against scikit-survival and lifelines."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifierCV
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fmcib_ssl.evaluation.labels import Labels, Split, grouped_folds
from fmcib_ssl.evaluation.metrics import Kind, auc, value_of
from fmcib_ssl.evaluation.probes import (
    PROBES,
    Inputs,
    Protocol,
    _choose_setting,
    _preparation,
    knn_scores,
    linear_scores,
    nearest_lesions,
    score,
)

RNG = np.random.default_rng(0)
NUM, DIM = 120, 20
X = RNG.normal(size=(NUM, DIM)) * np.geomspace(0.1, 10, DIM)
X_TEST = RNG.normal(size=(30, DIM)) * np.geomspace(0.1, 10, DIM)
CLASSES = np.argmax(X[:, :3] / X[:, :3].std(0) + RNG.normal(size=(NUM, 3)), axis=1)
VALUES = X[:, -1] + RNG.normal(size=NUM)
PATIENTS = np.repeat(np.arange(NUM // 2), 2)


def labels_of(kind: Kind, values: np.ndarray, num_classes: int = 0) -> Labels:
    return Labels("y", kind, values, np.arange(len(values)), tuple("abc"[:num_classes]))


def scored(name: str, labels: np.ndarray, num_classes: int, setting: float) -> np.ndarray:
    scaler = StandardScaler().fit(X)
    path = PROBES[name].path(scaler.transform(X), labels, scaler.transform(X_TEST), num_classes, [setting])
    return next(iter(path))


@pytest.mark.parametrize("rows", [NUM, 15])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_logistic(num_classes: int, rows: int) -> None:
    """For each penalty the minimum of scikit-learn; of 15 rows there are more features than rows."""
    labels = np.minimum(CLASSES, num_classes - 1)
    x, x_test = (StandardScaler().fit(X[:rows]).transform(part) for part in (X[:rows], X_TEST))
    found = list(PROBES["logistic"].path(x, labels[:rows], x_test, num_classes, PROBES["logistic"].settings))
    solver = "newton-cholesky" if num_classes == 2 else "newton-cg"  # lbfgs is far from the minimum for weak penalties
    for c, probabilities in zip(PROBES["logistic"].settings, found, strict=True):
        oracle = LogisticRegression(C=c, max_iter=5000, tol=1e-9, solver=solver).fit(x, labels[:rows])
        expected = oracle.predict_proba(x_test)
        np.testing.assert_allclose(probabilities, expected[:, 1] if num_classes == 2 else expected, atol=1e-3)
        if c <= 0.1:
            np.testing.assert_allclose(probabilities, expected[:, 1] if num_classes == 2 else expected, atol=1e-5)


def test_logistic_of_shares() -> None:
    """A share of votes counts as so much of class 1 and the rest of class 0."""
    shares = np.random.default_rng(1).integers(0, 5, NUM) / 4
    x, x_test = (StandardScaler().fit(X).transform(part) for part in (X, X_TEST))
    twice, classes, weights = np.tile(x, (2, 1)), np.repeat([1, 0], NUM), np.concatenate([shares, 1 - shares])
    for c, result in zip((1e-3, 1.0), PROBES["logistic"].path(x, shares, x_test, 0, (1e-3, 1.0)), strict=True):
        oracle = LogisticRegression(C=c, max_iter=5000, tol=1e-9, solver="newton-cholesky")
        oracle.fit(twice, classes, sample_weight=weights)
        np.testing.assert_allclose(result, oracle.predict_proba(x_test)[:, 1], atol=1e-3)


def test_the_size_alone_gives_probabilities_and_not_only_an_order() -> None:
    """All penalties of one column order the lesions alike; those that keep its probabilities apart are chosen."""
    rng = np.random.default_rng(0)
    diameter = rng.lognormal(2, 0.5, (400, 1))
    malignant = (rng.random(400) < 1 / (1 + np.exp(-3 * (np.log(diameter[:, 0]) - 2)))).astype(int)
    lesions = Inputs("size", diameter, linear_only=True)
    folds = grouped_folds("binary", malignant, np.arange(400), 5, 0)
    everyone = Split("all", np.arange(400), np.arange(400))
    labels = labels_of("binary", malignant, 2)
    (found,) = score(PROBES["logistic"], lesions, Protocol(labels, np.arange(400), [everyone], "all"))
    assert found.setting == _choose_setting(PROBES["logistic"], lesions, labels, folds)
    unpenalised = make_pipeline(StandardScaler(), LogisticRegression(C=np.inf)).fit(diameter, malignant)
    assert log_loss(malignant, found.scores) <= log_loss(malignant, unpenalised.predict_proba(diameter)) + 1e-3
    assert np.ptp(found.scores) > 0.8


def test_logistic_gives_a_class_that_training_lacks_no_probability() -> None:
    found = scored("logistic", np.where(CLASSES == 1, 0, CLASSES), 3, 1.0)
    assert (found[:, 1] == 0).all()
    np.testing.assert_allclose(found.sum(1), 1)


@pytest.mark.parametrize("k", [1, 5, 500])
@pytest.mark.parametrize("num_classes", [0, 2, 3])
def test_knn(k: int, num_classes: int) -> None:
    labels = VALUES if num_classes == 0 else np.minimum(CLASSES, num_classes - 1)
    model = KNeighborsRegressor if num_classes == 0 else KNeighborsClassifier
    oracle = make_pipeline(StandardScaler(), model(min(k, NUM), metric="cosine", algorithm="brute")).fit(X, labels)
    expected = oracle.predict(X_TEST) if num_classes == 0 else oracle.predict_proba(X_TEST)
    found = scored("knn", labels, num_classes, k)
    np.testing.assert_allclose(found, expected[:, 1] if num_classes == 2 else expected, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.1, 1e4])
def test_ridge(alpha: float) -> None:
    oracle = make_pipeline(StandardScaler(), Ridge(alpha=alpha)).fit(X, VALUES)
    np.testing.assert_allclose(scored("ridge", VALUES, 0, alpha), oracle.predict(X_TEST), rtol=1e-8)


def test_raw_voxels_are_reduced_by_the_training_rows_and_a_size_beside_them_is_not() -> None:
    x = np.hstack([X, 100 * VALUES[:, None]])
    found = _preparation(Inputs("x", x, 4, num_beside=1), np.arange(NUM), 0).transform(x)
    pca = StandardScaler().fit_transform(PCA(4, svd_solver="randomized", random_state=0).fit_transform(X))
    np.testing.assert_allclose(found[:, :4], pca)
    np.testing.assert_allclose(found[:, 4], (VALUES - VALUES.mean()) / VALUES.std())


@pytest.mark.parametrize("name", ["ridge", "logistic"])
def test_a_channel_that_is_silent_in_training_does_not_decide_a_score(name: str) -> None:
    """One weight in a thousand of an untrained network answers in one lesion only."""
    silent = RNG.normal(size=(NUM, 1)) * 1e-12
    silent[-1] = 1e-3
    train, test = np.arange(NUM - 20), np.arange(NUM - 20, NUM)
    labels = labels_of("continuous", VALUES) if name == "ridge" else labels_of("binary", np.minimum(CLASSES, 1), 2)
    protocol = Protocol(labels, PATIENTS, [Split("all", train, test)], "all")
    without, beside = (score(PROBES[name], Inputs("x", x), protocol)[0].scores for x in (X, np.hstack([X, silent])))
    assert abs(beside - without).max() < 0.5 * np.ptp(without)


@pytest.mark.parametrize(
    ("name", "model", "parameter", "scoring"),
    [
        ("ridge", Ridge(), "ridge__alpha", "neg_mean_squared_error"),
        ("knn", KNeighborsRegressor(metric="cosine"), "kneighborsregressor__n_neighbors", "neg_mean_squared_error"),
    ],
)
def test_the_setting_is_that_of_a_grid_search_over_folds_of_patients(
    name: str, model: object, parameter: str, scoring: str
) -> None:
    settings = [int(s) if name == "knn" else s for s in PROBES[name].settings]
    folds = grouped_folds("continuous", VALUES, PATIENTS, 5, 0)
    search = GridSearchCV(make_pipeline(StandardScaler(), model), {parameter: settings}, scoring=scoring, cv=folds)
    chosen = _choose_setting(PROBES[name], Inputs("x", X), labels_of("continuous", VALUES), folds)
    assert chosen == search.fit(X, VALUES).best_params_[parameter]


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_penalty_of_logistic_regression_is_that_of_a_grid_search_by_auc(num_classes: int) -> None:
    labels = np.minimum(CLASSES, num_classes - 1)
    kind: Kind = "binary" if num_classes == 2 else "multiclass"
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)),
        {"logisticregression__C": PROBES["logistic"].settings},
        scoring="roc_auc" if num_classes == 2 else "roc_auc_ovr",
        cv=StratifiedGroupKFold(5, shuffle=True, random_state=0),
    )
    folds = grouped_folds(kind, labels, PATIENTS, 5, 0)
    chosen = _choose_setting(PROBES["logistic"], Inputs("x", X), labels_of(kind, labels, num_classes), folds)
    assert chosen == search.fit(X, labels, groups=PATIENTS).best_params_["logisticregression__C"]


@pytest.mark.parametrize("name", ["cox", "knn"])
def test_of_equally_good_settings_the_weakest_is_taken(name: str) -> None:
    """All penalties of one column have one C-index, all numbers of neighbours find classes that lie apart."""
    side = np.repeat([0, 1], NUM // 2)
    one, folds = Inputs("one", np.column_stack([side, side - 0.5])), [(np.arange(0, NUM, 2), np.arange(1, NUM, 2))]
    survival = labels_of("survival", np.column_stack([3 - side, np.ones(NUM)]))
    labels = survival if name == "cox" else labels_of("binary", side, 2)
    assert _choose_setting(PROBES[name], one, labels, folds) == 1.0


def test_a_validation_set_chooses_instead_of_folds() -> None:
    errors = {}
    for alpha in PROBES["ridge"].settings:
        model = make_pipeline(StandardScaler(), Ridge(alpha=alpha)).fit(X[:80], VALUES[:80])
        errors[alpha] = np.square(model.predict(X[80:]) - VALUES[80:]).mean()
    protocol = Protocol(
        labels_of("continuous", VALUES), PATIENTS, [Split("s", np.arange(80), np.arange(2), np.arange(80, NUM))], "s"
    )
    (found,) = score(PROBES["ridge"], Inputs("x", X), protocol)
    assert found.setting == min(errors, key=errors.__getitem__)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_quick_probes_judge_each_lesion_by_other_patients(num_classes: int) -> None:
    """Against scikit-learn's neighbours with the weights of Wu et al., one lesion at a time; and its AUC."""
    classes = np.minimum(CLASSES, num_classes - 1)
    found, k = knn_scores(X, classes, PATIENTS, 5), 5
    for row in range(0, NUM, 7):
        others = np.flatnonzero(PATIENTS[row] != PATIENTS)
        oracle = NearestNeighbors(n_neighbors=k, metric="cosine").fit(X[others])
        distances, places = oracle.kneighbors(X[row : row + 1])
        votes = np.bincount(classes[others[places[0]]], np.exp((1 - distances[0]) / 0.07), minlength=num_classes)
        np.testing.assert_allclose(found[row], votes / votes.sum(), atol=1e-9)
    linear = linear_scores(X, classes, PATIENTS)
    for scores in (found, linear):
        expected = [roc_auc_score(classes == c, scores[:, c]) for c in range(num_classes)]
        assert value_of(auc, classes, scores) == pytest.approx(np.mean(expected))
    shuffled = np.random.default_rng(1).permutation(classes)
    assert value_of(auc, shuffled, linear_scores(X, shuffled, PATIENTS)) < value_of(auc, classes, linear)
    fit, check = grouped_folds("multiclass", classes, PATIENTS, 5, 0)[0]
    model = make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(-1, 5, 7))).fit(X[fit], classes[fit])
    np.testing.assert_allclose(linear[check][:, -1], model.decision_function(X[check]).reshape(len(check), -1)[:, -1])


def cohort(num: int = 150, dim: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num, dim))
    x = (x - x.mean(0)) / x.std(0)
    time, censored = rng.exponential(np.exp(-0.7 * x[:, 0])), rng.exponential(1.5, num)
    return x, np.column_stack([np.minimum(time, censored), time < censored])


def coefficients(x: np.ndarray, labels: np.ndarray, penalties: list[float]) -> np.ndarray:
    """Log-hazards of the axes."""
    return np.stack(list(PROBES["cox"].path(x, labels, np.eye(x.shape[1]), 0, penalties)))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("penalty", [0.5, 30.0])
def test_coefficients_are_those_of_scikit_survival(ties: bool, penalty: float) -> None:
    model = pytest.importorskip("sksurv.linear_model").CoxPHSurvivalAnalysis(alpha=penalty, ties="breslow", tol=1e-12)
    x, labels = cohort()
    if ties:
        labels[:, 0] = np.ceil(5 * labels[:, 0])
    pairs = list(zip(labels[:, 1].astype(bool), labels[:, 0], strict=True))
    model.fit(x, np.array(pairs, dtype=[("event", bool), ("time", float)]))
    np.testing.assert_allclose(coefficients(x, labels, [100.0, penalty])[1], model.coef_, atol=2e-6)


def test_coefficients_are_those_of_lifelines() -> None:
    """As lifelines 0.30.3 gives them for `CoxPHFitter(penalizer=30 / 150)`, which divides by the sample's deviation."""
    x, labels = cohort()
    x = x * np.sqrt(149 / 150)
    found = coefficients(x, labels, [30.0])[0]
    lifelines = [0.3879304331, 0.1536311594, 0.0416701761, -0.0600178924, 0.1353625810, 0.0857010738]
    np.testing.assert_allclose(found, lifelines, atol=1e-5)


def test_more_features_than_rows_is_the_same_as_in_the_basis_of_the_rows() -> None:
    rng = np.random.default_rng(1)
    x, labels = cohort(40, 6)
    rotation = np.linalg.qr(rng.normal(size=(200, 200)))[0][:6]
    wide = coefficients(x @ rotation, labels, [3.0])[0]
    np.testing.assert_allclose(wide @ rotation.T, coefficients(x, labels, [3.0])[0], atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(wide), np.linalg.norm(wide @ rotation.T), rtol=1e-3)


def test_without_an_event_nothing_is_learned() -> None:
    x, labels = cohort(20)
    with pytest.raises(ValueError, match="no event was seen"):
        coefficients(x, labels * [1, 0], [1.0])


@pytest.fixture
def lesions() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    patients = np.array([f"p{k}" for k in rng.integers(0, 25, 80)])
    # lesions of a patient resemble each other most
    of_patient = {patient: rng.normal(size=16) for patient in np.unique(patients)}
    features = np.stack([of_patient[patient] for patient in patients]) + 0.3 * rng.normal(size=(80, 16))
    return features.astype(np.float32), patients


def test_neighbours_are_scikit_learns_among_other_patients(lesions: tuple[np.ndarray, np.ndarray]) -> None:
    features, patients = lesions
    queries, would_be_their_own = [0, 17, 40], 0
    found = nearest_lesions(features, patients, queries, 5)
    for line, query in enumerate(queries):
        others = np.flatnonzero(patients != patients[query])
        oracle = NearestNeighbors(n_neighbors=5, metric="cosine").fit(features[others])
        distances, places = oracle.kneighbors(features[query : query + 1])
        np.testing.assert_array_equal(found.rows[line], others[places[0]])
        np.testing.assert_allclose(found.cosines[line], 1 - distances[0], atol=1e-5)
        everyone = NearestNeighbors(n_neighbors=2, metric="cosine").fit(features)
        would_be_their_own += patients[everyone.kneighbors(features[query : query + 1])[1][0, 1]] == patients[query]
    assert would_be_their_own > 0


def test_where_there_are_too_few_other_patients() -> None:
    found = nearest_lesions(np.eye(4), np.array(["a", "a", "a", "b"]), [0, 3], 5)
    assert found.rows.tolist() == [[3, -1, -1, -1], [0, 1, 2, -1]]
    assert np.isinf(found.cosines[0, 1:]).all()
