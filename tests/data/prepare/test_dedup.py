"""Which of several equal documents is kept does not depend on tasks."""

import numpy as np

from v3jax.data.prepare.dedup import clusters, exact_duplicates
from v3jax.data.prepare.staged import KEY, key_of, sha_of


def keys(*documents: tuple[str, str, int]) -> np.ndarray:
    return np.array([key_of(sha_of(text), name, source) for text, name, source in documents], KEY)


def test_the_first_source_keeps_a_text() -> None:
    found = keys(("x", "a", 2), ("y", "b", 0), ("x", "c", 1), ("x", "d", 2), ("z", "e", 1))
    removed, kept = exact_duplicates(found)
    assert dict(zip(removed.tolist(), kept.tolist(), strict=True)) == {0: 2, 3: 2}


def test_of_one_source_the_same_name_stays_in_any_order() -> None:
    documents = [("x", name, 0) for name in "abcdef"]
    survivors = set()
    for shift in range(6):
        turned = documents[shift:] + documents[:shift]
        removed, _ = exact_duplicates(keys(*turned))
        (left,) = set(range(6)) - set(removed.tolist())
        survivors.add(turned[left][1])
    assert len(survivors) == 1


def test_no_documents_have_no_duplicates() -> None:
    removed, kept = exact_duplicates(keys())
    assert len(removed) == len(kept) == 0


def test_clusters_are_the_connected_sets() -> None:
    pairs = [(1, 2), (5, 6), (3, 2), (9, 5), (1, 3)]
    assert sorted(clusters(pairs)) == [[1, 2, 3], [5, 6, 9]]
    assert sorted(clusters(reversed(pairs))) == [[1, 2, 3], [5, 6, 9]]
