"""The quality classifier's rounds: seeds, scores of the corpus, its best documents as new seeds.

Each round is a stage of one task that trains, and one that scores with all tasks. The last scores
decide which documents go.
"""

import heapq
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from v3jax.data.prepare import classifier
from v3jax.data.prepare.classifier import Classifier, Features
from v3jax.data.prepare.config import ClassifierConfig, PrepareConfig, PrepareSource
from v3jax.data.prepare.read import Raw, pieces, read
from v3jax.data.prepare.staged import REMOVED, documents_file, load, save, sha_of, whole

if TYPE_CHECKING:
    from datatrove.data import Document

SCORE = np.dtype([("row", "<i4"), ("order", "<u8"), ("score", "<f8")])
"""A judged document, a part of its content hash, and its score."""
_TESTED = 5  # one seed of so many is kept apart to measure accuracy; ours


def seeds(path: str, cfg: ClassifierConfig) -> list[str]:
    """The texts of labelled files, in the order of their hashes, at most `max_seeds`.

    Raises:
      ValueError: nothing to read there.
    """
    source = PrepareSource(name="seeds", kind="prose", path=path, text_field=cfg.text_field)
    whole_cfg = PrepareConfig(sources=(source,), n_tasks=1)
    found = [
        document.text
        for piece in pieces(whole_cfg)
        for document in read(piece, source, 1, 2**25)
        if isinstance(document, Raw)
    ]
    if not found:
        raise ValueError(f"classifier: no documents at {path}; give labelled texts")
    return sorted(set(found), key=sha_of)[: cfg.max_seeds]


@dataclass(frozen=True)
class Train:
    """Trains round `number` on the seeds and on what the round before recalled."""

    cfg: PrepareConfig
    number: int
    documents: Path
    before: Path | None
    """Scores of the round before."""
    scored_first: Path
    """Scores of no round: which documents are judged, for random negatives."""
    folder: Path

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        cfg = self.cfg.classifier
        assert cfg.positives is not None
        positives, recalled = seeds(cfg.positives, cfg), list[str]()
        if self.before is not None:
            n = max(1, round(cfg.recall_share * _count(self.before)))
            recalled = self._texts(best(self.before, n))
        negatives = (
            self._texts(lowest(self.scored_first, len(positives) + len(recalled)))
            if cfg.negatives is None
            else seeds(cfg.negatives, cfg)
        )
        known = set(positives) | set(recalled)
        negatives = [text for text in negatives if text not in known]
        wanted = [classifier.featurise(t, cfg) for t in positives]
        unwanted = [classifier.featurise(t, cfg) for t in negatives]
        train_w, test_w = _apart(wanted)
        train_u, test_u = _apart(unwanted)
        extra = [classifier.featurise(t, cfg) for t in recalled]
        model = classifier.train([*train_w, *extra], train_u, cfg)
        save(self.folder / "model.npy", np.append(model.weight_F, model.bias))
        about = {
            "round": self.number,
            "seeds": len(positives),
            "recalled": len(recalled),
            "negatives": len(negatives),
            "accuracy": round(classifier.accuracy(model, test_w, test_u), 4),
        }
        with whole(self.folder / "round.json", "w") as content:
            json.dump(about, content)

    def _texts(self, chosen: Iterable[tuple[int, int]]) -> list[str]:
        by_task: dict[int, set[int]] = {}
        for task, row in chosen:
            by_task.setdefault(task, set()).add(row)
        texts = []
        for task, rows in sorted(by_task.items()):
            with documents_file(self.documents, task).open("rb") as lines:
                texts += [json.loads(line)["text"] for i, line in enumerate(lines) if i in rows]
        return sorted(texts, key=sha_of)


def _apart(some: Sequence[Features]) -> tuple[list[Features], list[Features]]:
    """For training and for measuring."""
    train = [f for i, f in enumerate(some) if i % _TESTED]
    return (
        (train, [f for i, f in enumerate(some) if i % _TESTED == 0]) if train else (list(some), [])
    )


def _scores(folder: Path) -> Iterator[tuple[int, np.ndarray]]:
    for file in sorted(folder.glob("*.scores.npy")):
        yield int(file.name.split(".")[0]), load(file)


def _count(folder: Path) -> int:
    return sum(len(scores) for _, scores in _scores(folder))


def best(folder: Path, n: int) -> list[tuple[int, int]]:
    """Task and row of the n documents that score highest; of equal ones those of lower hashes."""
    return _first(folder, n, lambda score, order: (-score, order))


def lowest(folder: Path, n: int) -> list[tuple[int, int]]:
    """Task and row of the n documents of the lowest content hashes: a random sample."""
    return _first(folder, n, lambda score, order: (order,))


def _first(folder: Path, n: int, by: object) -> list[tuple[int, int]]:
    assert callable(by)
    rows = (
        (by(score, order), task, row)
        for task, scores in _scores(folder)
        for row, order, score in scores.tolist()
    )
    return [(task, row) for _, task, row in heapq.nsmallest(n, rows)]


@dataclass(frozen=True)
class Score:
    """Scores the documents of the judged sources; all 0 without a model."""

    cfg: PrepareConfig
    model: Path | None
    folder: Path

    def __call__(self, data: Iterable["Document"], rank: int, world_size: int) -> None:
        cfg, model = self.cfg.classifier, None
        if self.model is not None:
            weights = load(self.model / "model.npy")
            model = Classifier(weights[:-1], float(weights[-1]))
        rows = []
        for document in data:
            if document.metadata["source"] in self.cfg.judged:
                order = int.from_bytes(sha_of(document.text)[8:16])
                score = (
                    0.0 if model is None else model.score(classifier.featurise(document.text, cfg))
                )
                rows.append((document.metadata["row"], order, score))
        save(self.folder / f"{rank:05d}.scores.npy", np.array(rows, SCORE))


@dataclass(frozen=True)
class Judge:
    """Lists the documents that the last scores drop."""

    cfg: PrepareConfig
    scores: Path
    folder: Path

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        cfg, n = self.cfg.classifier, _count(self.scores)
        if cfg.keep_share is not None:
            kept = set(best(self.scores, round(cfg.keep_share * n)))
        else:
            kept = {
                (task, row)
                for task, scores in _scores(self.scores)
                for row in scores["row"][scores["score"] >= cfg.keep_score].tolist()
            }
        removed = [
            (task, row, -1, -1)
            for task, scores in _scores(self.scores)
            for row in scores["row"].tolist()
            if (task, row) not in kept
        ]
        save(self.folder / "00000.removed.npy", np.array(removed, REMOVED))
        with whole(self.folder / "judged.json", "w") as content:
            json.dump({"judged": n, "kept": n - len(removed)}, content)
