"""A linear classifier of texts: logistic regression on hashed n-grams of words, as fastText's.

A text's features are the hashes of its word 1..n-grams, weighted by their counts and brought to
length 1. Steps are AdaGrad's, so that rare words learn as fast as frequent ones. The same seed
gives the same weights to the bit. Dims: F features, K distinct features of a text.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from v3jax.data.prepare.config import ClassifierConfig
from v3jax.data.prepare.words import words

_MAX_WORDS = 2000  # of a text that are looked at; ours


@dataclass(frozen=True)
class Features:
    """Distinct features of a text `[K]` and their weights `[K]`."""

    index_K: np.ndarray
    weight_K: np.ndarray


@dataclass(frozen=True)
class Classifier:
    """`score = sigmoid(w . features + b)`."""

    weight_F: np.ndarray
    bias: float

    def score(self, features: Features) -> float:
        """Probability that a text is of the wanted kind."""
        return float(_sigmoid(self._logit(features)))

    def _logit(self, features: Features) -> float:
        return float(self.weight_F[features.index_K] @ features.weight_K) + self.bias


def _sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-np.clip(x, -30, 30))))


def featurise(text: str, cfg: ClassifierConfig) -> Features:
    """The features of a text."""
    found = words(text)[:_MAX_WORDS]
    hashes = [
        zlib.crc32(" ".join(found[i : i + n]).encode()) % cfg.n_features
        for n in range(1, cfg.ngram + 1)
        for i in range(len(found) - n + 1)
    ]
    index_K, count_K = np.unique(np.array(hashes, np.int64), return_counts=True)
    return Features(index_K, count_K / max(float(np.linalg.norm(count_K)), 1.0))


def train(
    positives: Sequence[Features], negatives: Sequence[Features], cfg: ClassifierConfig
) -> Classifier:
    """Trains with stochastic gradients; both classes weigh the same, however many they are."""
    examples = [(f, 1.0) for f in positives] + [(f, 0.0) for f in negatives]
    balance = {1.0: 0.5 / max(len(positives), 1), 0.0: 0.5 / max(len(negatives), 1)}
    weight_F, bias = np.zeros(cfg.n_features), 0.0
    squares_F, bias_squares = np.full(cfg.n_features, 1e-8), 1e-8
    rng = np.random.default_rng(cfg.seed)
    for _ in range(cfg.epochs):
        for i in rng.permutation(len(examples)).tolist():
            features, label = examples[i]
            at = features.index_K
            logit = float(weight_F[at] @ features.weight_K) + bias
            error = balance[label] * len(examples) * (label - _sigmoid(logit))
            gradient_K = error * features.weight_K
            squares_F[at] += gradient_K**2
            bias_squares += error**2
            weight_F[at] += cfg.learning_rate * gradient_K / np.sqrt(squares_F[at])
            bias += cfg.learning_rate * error / bias_squares**0.5
    return Classifier(weight_F.astype(np.float32).astype(np.float64), float(np.float32(bias)))


def accuracy(
    model: Classifier, positives: Iterable[Features], negatives: Iterable[Features]
) -> float:
    """Mean of the shares of both classes on their side of 0.5."""
    right = [np.mean([model.score(f) > 0.5 for f in positives] or [np.nan])]
    right.append(np.mean([model.score(f) <= 0.5 for f in negatives] or [np.nan]))
    return float(np.mean(right))
