"""Fill-in-the-middle in prefix-suffix-middle order (report section 4.1).

    <fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>

Applied to whole documents before packing. The report leaves open how documents are cut: two
uniform character positions, for documents of every source, are ours.
"""

import numpy as np

from v3jax.data.tokenizer import Tokenizer


def cut_points(n_characters: int, rng: np.random.Generator) -> tuple[int, int]:
    """Start and end of the middle: two uniform positions in order, either part may be empty."""
    low, high = sorted(rng.integers(0, n_characters + 1, size=2).tolist())
    return low, high


def encode_document(
    tokenizer: Tokenizer,
    text: str,
    *,
    fim_rate: float,
    newline_split_rate: float,
    rng: np.random.Generator,
) -> list[int]:
    """Ids of one training document with its `<eos>`, in PSM form with probability `fim_rate`."""
    if rng.random() >= fim_rate:
        ids = tokenizer.split_newlines(tokenizer.encode(text), newline_split_rate, rng)
        return [*ids, tokenizer.eos]
    low, high = cut_points(len(text), rng)
    prefix, middle, suffix = (
        tokenizer.split_newlines(ids, newline_split_rate, rng)
        for ids in tokenizer.encode_batch([text[:low], text[low:high], text[high:]])
    )
    return [
        tokenizer.fim_begin,
        *prefix,
        tokenizer.fim_hole,
        *suffix,
        tokenizer.fim_end,
        *middle,
        tokenizer.eos,
    ]
