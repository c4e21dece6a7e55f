"""Every probe against scikit-learn called directly."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fmcib_ssl.evaluation.folds import grouped_folds
from fmcib_ssl.evaluation.frozen_probes import PROBES, Inputs, choose_setting, fit_and_score, preparation
from fmcib_ssl.evaluation.metrics import Kind
from fmcib_ssl.evaluation.survival import cox_path

RNG = np.random.default_rng(0)
NUM, DIM = 120, 20
X = RNG.normal(size=(NUM, DIM)) * np.geomspace(0.1, 10, DIM)
X_TEST = RNG.normal(size=(30, DIM)) * np.geomspace(0.1, 10, DIM)
CLASSES = np.argmax(X[:, :3] / X[:, :3].std(0) + RNG.normal(size=(NUM, 3)), axis=1)
VALUES = X[:, -1] + RNG.normal(size=NUM)
PATIENTS = np.repeat(np.arange(NUM // 2), 2)


def scored(name: str, labels: np.ndarray, num_classes: int, setting: float) -> np.ndarray:
    return fit_and_score(PROBES[name], Inputs("x", X), labels, X_TEST, num_classes=num_classes, setting=setting)


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


def test_the_size_alone_gives_probabilities_and_not_only_an_order() -> None:
    """All penalties of one column order the lesions alike; those that keep its probabilities apart are chosen."""
    rng = np.random.default_rng(0)
    diameter = rng.lognormal(2, 0.5, (400, 1))
    malignant = (rng.random(400) < 1 / (1 + np.exp(-3 * (np.log(diameter[:, 0]) - 2)))).astype(int)
    lesions = Inputs("size", diameter, linear_only=True)
    folds = grouped_folds("binary", malignant, np.arange(400), 5, 0)
    c = choose_setting(PROBES["logistic"], "binary", lesions, malignant, folds, num_classes=2)
    found = fit_and_score(PROBES["logistic"], lesions, malignant, diameter, num_classes=2, setting=c)
    unpenalised = make_pipeline(StandardScaler(), LogisticRegression(C=np.inf)).fit(diameter, malignant)
    assert log_loss(malignant, found) <= log_loss(malignant, unpenalised.predict_proba(diameter)) + 1e-3
    assert np.ptp(found) > 0.8


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


def test_cox_gives_the_log_hazard() -> None:
    labels = np.column_stack([RNG.exponential(size=NUM), RNG.random(NUM) < 0.7])
    scaler = StandardScaler().fit(X)
    expected = scaler.transform(X_TEST) @ cox_path(scaler.transform(X), labels, [10.0])[0]
    np.testing.assert_allclose(scored("cox", labels, 0, 10.0), expected)


def test_raw_voxels_are_reduced_by_the_training_rows_and_a_size_beside_them_is_not() -> None:
    x = np.hstack([X, 100 * VALUES[:, None]])
    found = preparation(x, 4, 0, num_beside=1).transform(x)
    pca = StandardScaler().fit_transform(PCA(4, svd_solver="randomized", random_state=0).fit_transform(X))
    np.testing.assert_allclose(found[:, :4], pca)
    np.testing.assert_allclose(found[:, 4], (VALUES - VALUES.mean()) / VALUES.std())


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
    chosen = choose_setting(PROBES[name], "continuous", Inputs("x", X), VALUES, folds, num_classes=0)
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
    chosen = choose_setting(PROBES["logistic"], kind, Inputs("x", X), labels, folds, num_classes=num_classes)
    assert chosen == search.fit(X, labels, groups=PATIENTS).best_params_["logisticregression__C"]


@pytest.mark.parametrize("name", ["cox", "knn"])
def test_of_equally_good_settings_the_weakest_is_taken(name: str) -> None:
    """All penalties of one column have one C-index, all numbers of neighbours find classes that lie apart."""
    side = np.repeat([0, 1], NUM // 2)
    one, folds = Inputs("one", np.column_stack([side, side - 0.5])), [(np.arange(0, NUM, 2), np.arange(1, NUM, 2))]
    labels, kind = (np.column_stack([3 - side, np.ones(NUM)]), "survival") if name == "cox" else (side, "binary")
    assert choose_setting(PROBES[name], kind, one, labels, folds, num_classes=2) == 1.0  # type: ignore[arg-type]


def test_a_validation_set_chooses_instead_of_folds() -> None:
    errors = {}
    for alpha in PROBES["ridge"].settings:
        model = make_pipeline(StandardScaler(), Ridge(alpha=alpha)).fit(X[:80], VALUES[:80])
        errors[alpha] = np.square(model.predict(X[80:]) - VALUES[80:]).mean()
    chosen = choose_setting(
        PROBES["ridge"], "continuous", Inputs("x", X[:80]), VALUES[:80], [],
        num_classes=0, validation=(X[80:], VALUES[80:]),
    )  # fmt: skip
    assert chosen == min(errors, key=errors.__getitem__)
