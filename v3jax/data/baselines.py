"""What a model must beat on the held-out split: unigram, interpolated bigram, and gzip.

The n-gram models are estimated on the training rows the model sees and scored on the same targets
of the same held-out rows, so all figures are bits a byte of the same text.
Dims: N rows, S = T + 1 tokens of a row.
"""

import gzip
import math
from dataclasses import dataclass

import numpy as np

_TUNING_EVERY = 20
_EM_ROUNDS = 25


@dataclass(frozen=True)
class Pairs:
    """Adjacent (context, target) token pairs of rows, where the target is no padding."""

    context: np.ndarray
    target: np.ndarray


def pairs(tokens_NS: np.ndarray, segments_NS: np.ndarray) -> Pairs:
    """The prediction problems of packed rows: every target and the token before it."""
    mask = segments_NS[:, 1:] > 0
    return Pairs(
        context=tokens_NS[:, :-1][mask].astype(np.int64),
        target=tokens_NS[:, 1:][mask].astype(np.int64),
    )


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Total negative log-likelihood over UTF-8 bytes (report section 4.4: Pile-test)."""
    return nats / math.log(2) / n_bytes


def unigram_nats(train: Pairs, heldout: Pairs, vocab_size: int) -> float:
    """Held-out negative log-likelihood under token frequencies, add-one smoothed."""
    count = np.bincount(train.target, minlength=vocab_size) + 1.0
    return float(-np.log(count / count.sum())[heldout.target].sum())


def bigram_nats(train: Pairs, heldout: Pairs, vocab_size: int) -> float:
    """Held-out negative log-likelihood of a Jelinek-Mercer interpolated bigram.

    `p(b|a) = l2 c(ab)/c(a) + l1 c(b)/n + l0/V`, the weights `l` shared by contexts of similar
    count and fitted by expectation-maximisation on every 20th training pair, which the counts
    used for fitting leave out; final counts take all training pairs.
    """
    tuning = np.arange(train.target.size) % _TUNING_EVERY == 0
    part = Pairs(train.context[~tuning], train.target[~tuning])
    tune = Pairs(train.context[tuning], train.target[tuning])
    bucket, experts = _expert_probabilities(part, tune, vocab_size)
    weights = _fit_weights(bucket, experts)
    bucket, experts = _expert_probabilities(train, heldout, vocab_size)
    return float(-np.log((weights[bucket] * experts).sum(-1)).sum())


def _expert_probabilities(
    train: Pairs, test: Pairs, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each test pair's context-count bucket, and its bigram, unigram and uniform probability."""
    keys, counts = np.unique(train.context * vocab_size + train.target, return_counts=True)
    wanted = test.context * vocab_size + test.target
    at = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    joint = np.where(keys[at] == wanted, counts[at], 0)
    seen = np.bincount(train.context, minlength=vocab_size)[test.context]
    unigram = np.bincount(train.target, minlength=vocab_size)[test.target] / train.target.size
    bigram = joint / np.maximum(seen, 1)
    uniform = np.full(wanted.shape, 1 / vocab_size)
    bucket = np.floor(np.log2(seen + 1)).astype(np.int64)
    return bucket, np.stack([bigram, unigram, uniform], axis=-1)


def _fit_weights(bucket: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """Interpolation weights of every bucket `[buckets, 3]` that maximise the likelihood."""
    weights = np.full((64, 3), 1 / 3)
    total = np.bincount(bucket, minlength=64)[:, None]
    for _ in range(_EM_ROUNDS):
        share = weights[bucket] * experts
        share /= share.sum(-1, keepdims=True)
        sums = np.stack([np.bincount(bucket, share[:, i], minlength=64) for i in range(3)], axis=-1)
        weights = np.where(total > 0, sums / np.maximum(total, 1), weights)
    return weights


def gzip_bits_per_byte(text: bytes) -> float:
    """Bits a byte of `gzip -9` on the held-out text alone."""
    return 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)
