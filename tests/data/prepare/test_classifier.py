"""The linear classifier learns, is the same each time, and weighs classes alike."""

import random

import numpy as np

from v3jax.data.prepare.classifier import accuracy, featurise, train
from v3jax.data.prepare.config import ClassifierConfig

CFG = ClassifierConfig(n_features=2**14)
MATHS = ["sum", "prime", "number", "proof", "lemma", "hence", "integer", "root", "square"]
OTHER = ["cook", "garden", "river", "music", "dinner", "travel", "window", "friend", "road"]


def texts(vocabulary: list[str], n: int, seed: int, noise: float = 0.3) -> list[str]:
    rng = random.Random(seed)
    both = MATHS + OTHER
    return [
        " ".join(rng.choice(both if rng.random() < noise else vocabulary) for _ in range(40))
        for _ in range(n)
    ]


def features(vocabulary: list[str], n: int, seed: int) -> list:
    return [featurise(text, CFG) for text in texts(vocabulary, n, seed)]


def test_it_tells_apart_what_it_has_not_seen() -> None:
    model = train(features(MATHS, 50, 0), features(OTHER, 50, 1), CFG)
    assert accuracy(model, features(MATHS, 100, 2), features(OTHER, 100, 3)) > 0.95


def test_classes_weigh_the_same_however_many_they_are() -> None:
    model = train(features(MATHS, 10, 0), features(OTHER, 400, 1), CFG)
    assert np.mean([model.score(f) > 0.5 for f in features(MATHS, 100, 2)]) > 0.9


def test_the_same_seed_gives_the_same_weights() -> None:
    one, two = (train(features(MATHS, 30, 0), features(OTHER, 30, 1), CFG) for _ in range(2))
    assert np.array_equal(one.weight_F, two.weight_F)
    assert one.bias == two.bias


def test_a_text_without_words_has_the_score_of_the_bias() -> None:
    model = train(features(MATHS, 10, 0), features(OTHER, 10, 1), CFG)
    empty = featurise("", CFG)
    assert empty.index_K.size == 0
    assert model.score(empty) == 1 / (1 + np.exp(-model.bias))
