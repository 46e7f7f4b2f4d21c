"""Supervised fine-tuning: samples that share rows without seeing each other, and a whole run.

Dims: B sequences, S = T + 1 row, T positions.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import mini
from tests.model import small
from v3jax import models, objective
from v3jax.config import ExperimentConfig
from v3jax.data.dataset import lengthened, open_dataset
from v3jax.data.loader import make_loader
from v3jax.data.packing import pack, seen
from v3jax.evals.by_source import by_source
from v3jax.metrics import read_rows
from v3jax.model.transformer import head_logits
from v3jax.objective import Scale
from v3jax.optim.schedules import n_steps

T = 40
CFG = small.experiment(small.config(mtp_depth=1), seq_len=T)
CFG = replace(CFG, data=replace(CFG.data, isolate_documents=True))
PARAMS = jax.tree.map(jnp.asarray, small.params(CFG.model))
ROUTERS = jax.tree.map(jnp.asarray, small.router_state(CFG.model))


@jax.jit
def logits(tokens_BS: Any, segments_BS: Any) -> tuple[jax.Array, ...]:
    """The main model's and the MTP module's, `[B, T, V]`."""
    out = objective.forward(CFG, PARAMS, ROUTERS, tokens_BS, segments_BS)
    return tuple(head_logits(PARAMS, h) for h in (out.hidden_BTD, *out.mtp_hidden))


def conversation(length: int, rng: np.random.Generator) -> np.ndarray:
    """Ids of which the first half is a prompt."""
    ids = rng.integers(1, CFG.model.vocab_size, length).astype(np.int32)
    return np.concatenate([seen(ids[: length // 2]), ids[length // 2 :]])


def packed(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    rows = pack(documents, T + 1, 0)
    assert len(rows) == 1
    return rows.tokens_NS, rows.segments_NS


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_packed_sample_has_the_logits_of_the_sample_alone(place: int) -> None:
    rng = np.random.default_rng(place)
    documents = [conversation(length, rng) for length in (17, 13, 9)]
    tokens, segments = packed(documents)
    here = np.flatnonzero(abs(segments[0, :-1]) == place + 1)
    together = logits(tokens, segments)
    alone = logits(*packed([documents[place]]))
    # The module reads one token further, which for a sample's last is its neighbour's.
    for whole, own, n in zip(together, alone, (len(here), len(here) - 1), strict=True):
        np.testing.assert_allclose(whole[0, here[:n]], own[0, :n], atol=1e-5)


def test_a_packed_sample_does_not_depend_on_its_neighbours_in_a_single_bit() -> None:
    rng = np.random.default_rng(0)
    middle = conversation(13, rng)
    found = []
    for seed in (1, 2):
        others = np.random.default_rng(seed)
        tokens, segments = packed([conversation(17, others), middle, conversation(9, others)])
        here = np.flatnonzero(abs(segments[0, :-1]) == 2)
        found.append([np.asarray(x)[0, here[:-1]] for x in logits(tokens, segments)])
        assert not np.array_equal(tokens[0, :17], middle)
    for first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)


def test_positions_begin_anew_with_every_sample_and_pass_over_prompts() -> None:
    segments_BT = jnp.asarray([[-1, -1, 1, -2, 2, 2, 0, 0], [-1, 1, 1, 1, 1, 1, 1, 1]])
    found = objective.positions(segments_BT, isolate_documents=True)
    np.testing.assert_array_equal(found, [[0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]])
    plain = objective.positions(segments_BT, isolate_documents=False)
    np.testing.assert_array_equal(plain, np.arange(8))


def test_prompt_tokens_have_no_weight_at_all() -> None:
    rng = np.random.default_rng(0)
    documents = [conversation(length, rng) for length in (17, 13, 9)]
    tokens, segments = packed(documents)
    n_answers = sum(int((ids >= 0).sum()) for ids in documents)
    scale = Scale(jnp.float32(n_answers), jnp.float32(1), jnp.float32(0.3))
    _, weights, _ = objective.targets_of(CFG, jnp.asarray(tokens), jnp.asarray(segments), scale)
    for k, weight_BT in enumerate(weights):
        target_BT = np.roll(segments, -k, axis=1)[:, 1:]
        is_answer = np.asarray(target_BT) > 0
        is_answer[:, T - k :] = False
        assert (np.asarray(weight_BT)[~is_answer] == 0).all()
    main = np.asarray(weights[0])
    assert np.count_nonzero(main) == n_answers
    assert main.sum() == pytest.approx(1, rel=1e-6)


# ---- Whole runs


def chats(folder: Path, n: int = 40) -> Path:
    file = folder / "chats.jsonl"
    with file.open("w") as lines:
        for i in range(n):
            messages = [
                {"role": "user", "content": f"What is {i}?"},
                {"role": "assistant", "content": f"A number: {i}."},
            ]
            lines.write(json.dumps({"messages": messages, "id": i}) + "\n")
    return file


def tuned(path: Path, **run_changes: Any) -> ExperimentConfig:
    """Two epochs of conversations from the weights of the mini run."""
    cfg = mini.config(epochs=2.0, eval_every=5, checkpoint_every=4, **run_changes)
    return replace(
        cfg,
        init_from=str(mini.finished()),
        data=replace(
            cfg.data,
            path=str(path),
            format="chat",
            fim_rate=0.0,
            newline_split_rate=0.0,
            isolate_documents=True,
            seq_len=95,
        ),
        batch=replace(cfg.batch, start=2, end=2, ramp_tokens=0.0),
    )


def test_two_epochs_draw_every_row_twice(tmp_path: Path) -> None:
    cfg = tuned(chats(tmp_path))
    dataset = open_dataset(cfg)
    long = lengthened(cfg, dataset)
    assert long.run.total_tokens == 2 * dataset.n_rows * 95
    assert long.optim.phases[-1].until_tokens == pytest.approx(long.run.total_tokens)
    assert n_steps(long) == dataset.n_rows
    loader = make_loader(long, dataset)
    drawn = [row.tobytes() for _ in range(n_steps(long)) for row in next(loader).tokens_MRS[0]]
    loader.close()
    assert sorted(drawn) == sorted(row[0].tobytes() for row in dataset.train[0] for _ in range(2))


def test_sources_of_an_epoch_are_drawn_by_their_size(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder, n in ((first, 60), (second, 20)):
        folder.mkdir()
        text = chats(folder, n).read_text().replace("What", f"What in {folder.name}")
        (folder / "chats.jsonl").write_text(text)
    cfg = tuned(first)
    sources = [replace(cfg.data.sources[0], name=f.name, path=str(f)) for f in (first, second)]
    cfg = replace(cfg, data=replace(cfg.data, path=None, sources=tuple(sources)))
    dataset = open_dataset(cfg)
    assert dataset.weights == tuple(float(len(rows)) for rows in dataset.train)
    loader = make_loader(lengthened(cfg, dataset), dataset)
    n = dataset.n_rows
    drawn = [next(loader).tokens_MRS[0] for _ in range(n)]
    loader.close()
    found = sorted(row.tobytes() for rows in drawn for row in rows)
    wanted = [row[0].tobytes() for source in dataset.train for row in source]
    assert found == sorted(wanted * 2)


def test_fine_tuning_learns_answers_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    cfg = tuned(chats(tmp_path))
    whole = mini.run_here(cfg, tmp_path / "whole")
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 0.5
    # Cut off after a checkpoint and begun again, it ends in the same bits.
    for file in sorted((tmp_path / "whole" / "checkpoints").iterdir())[-1:]:
        assert f"{whole.step}" in file.name
    half = replace(cfg, run=replace(cfg.run, checkpoint_every=3))
    with pytest.raises(_Stopped):
        _run_until(half, tmp_path / "half", 5)
    mini.run_here(half, tmp_path / "half")
    first, second = (models.load_run(tmp_path / name)[1] for name in ("whole", "half"))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, second))
    assert (tmp_path / "whole" / "chat_template.jinja").exists()
    assert (tmp_path / "whole" / "tokenizer.json").read_text() == (
        mini.finished() / "tokenizer.json"
    ).read_text()
    loaded = models.open_model(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"data\.format: figures by source are of text"):
        by_source(tmp_path / "whole")
    assert loaded.chat_template == (tmp_path / "whole" / "chat_template.jinja").read_text()
    asked = mini.call(
        mini.command(
            f"--ckpt={tmp_path / 'whole'}",
            f"--out={tmp_path / 'out'}",
            "--tasks=instructions",
            "--limit=2",
            "--max-new-tokens=4",
            program="evaluate",
        )
    )
    assert asked.returncode == 0, asked.stderr
    figures = json.loads((tmp_path / "out" / "results.json").read_text())["instructions"]
    assert figures["all forms"] == figures["chains"] == 0  # four tokens are no answer
    lines = (tmp_path / "out" / "instructions.jsonl").read_text().splitlines()
    assert [json.loads(line)["right"] for line in lines] == [False] * 4


class _Stopped(Exception):
    pass


def _run_until(cfg: ExperimentConfig, workdir: Path, step: int) -> None:
    """Trains and is torn from its work when a step has been recorded."""
    from v3jax.metrics import Recorder

    write = Recorder.write

    def writing(self: Recorder, row: dict[str, Any], load_LE: np.ndarray) -> None:
        write(self, row, load_LE)
        if row["step"] == step:
            raise _Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "write", writing)
        mini.run_here(cfg, workdir)


def test_frozen_groups_stay_as_they_are(tmp_path: Path) -> None:
    cfg = tuned(chats(tmp_path))
    frozen = ("mtp_layers_0", "embed_tokens")
    cfg = replace(cfg, optim=replace(cfg.optim, frozen=frozen))
    mini.run_here(cfg, tmp_path / "run")
    before, after = (models.load_run(p)[1] for p in (mini.finished(), tmp_path / "run"))
    for name in cfg.model.groups:
        same = jax.tree.map(np.array_equal, before[name], after[name])
        assert jax.tree.all(same) == (name in frozen), name
    assert set(before) == set(cfg.model.groups)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"fim_rate": 0.1}}, "data.fim_rate: rearranges text"),
        ({"optim": {"frozen": ("head",)}}, "optim.frozen: the model has no group 'head'; it has"),
        ({"run": {"epochs": 0.0}}, "run.epochs: must be positive"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    cfg = tuned(tmp_path)
    ((group, fields),) = changes.items()
    with pytest.raises(ValueError, match=message):
        replace(cfg, **{group: replace(getattr(cfg, group), **fields)})


def test_corpora_that_cannot_be_learnt_from_are_refused(tmp_path: Path) -> None:
    cfg = tuned(chats(tmp_path))
    short = replace(cfg, data=replace(cfg.data, seq_len=5))
    with pytest.raises(ValueError, match=r"no conversation fits in data\.seq_len=5 tokens"):
        open_dataset(short)
    with pytest.raises(ValueError, match=r"chat needs a trained tokenizer; set data\.tokenizer"):
        open_dataset(replace(cfg, init_from=None))
    with pytest.raises(ValueError, match=f"init_from: {tmp_path} has no tokenizer.json"):
        open_dataset(replace(cfg, init_from=str(tmp_path)))
    bad = replace(cfg, data=replace(cfg.data, chat_template=str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"data.chat_template: .*none: no file, and no folder"):
        open_dataset(bad)
    other = replace(cfg, model=replace(cfg.model, kv_latent_dim=8))
    with pytest.raises(ValueError, match=r"of another model: model\.kv_latent_dim is 16, not 8"):
        mini.run_here(other, tmp_path / "run")
