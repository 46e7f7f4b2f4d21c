"""Sampling: the model's own next tokens, none of padding's doing, none outside the tokenizer."""

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import mini
from v3jax import checkpoint, decode
from v3jax.model.transformer import head_logits
from v3jax.objective import apply_model
from v3jax.sample import load_run

PROMPT = "def calendar(self, year):"


@pytest.fixture(scope="module")
def loaded() -> Any:
    """Config, parameters, router state and tokenizer; noise makes the model's choices varied."""
    cfg, params, router_state, tokenizer = load_run(mini.finished())
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(x + 0.3 * rng.normal(size=x.shape), jnp.float32), params
    )
    return cfg, params, router_state, tokenizer


def generate(loaded: Any, prompts: list[str], **options: Any) -> list[list[int]]:
    cfg, params, router_state, tokenizer = loaded
    return decode.generate(cfg, params, router_state, tokenizer, prompts, **options)


def last_logits(cfg: Any, params: Any, router_state: Any, ids: list[int]) -> np.ndarray:
    """Logits after `ids` from one pass over exactly these ids, without padding."""
    out = apply_model(cfg, params, router_state, jnp.asarray([ids], jnp.int32))
    return np.asarray(head_logits(params, out.hidden_BTD[0, -1:]))[0]


def test_greedy_takes_the_likeliest_id_of_an_unpadded_pass(loaded: Any) -> None:
    cfg, params, router_state, tokenizer = loaded
    ids = tokenizer.encode(PROMPT)
    wanted = []
    for _ in range(4):
        logits = last_logits(cfg, params, router_state, ids)[: tokenizer.vocab_size]
        ids = [*ids, int(np.argmax(logits))]
        wanted.append(ids[-1])
    got = decode.generate(cfg, params, router_state, tokenizer, [PROMPT], n_tokens=4)[0]
    assert len(set(wanted)) > 1, "a model that repeats itself would hide an error"
    assert got == wanted


def test_padding_never_reaches_the_logits(loaded: Any) -> None:
    cfg, params, router_state, tokenizer = loaded
    ids = tokenizer.encode(PROMPT)
    rng = np.random.default_rng(0)
    drawn = []
    for filler in (tokenizer.pad, 7, None):
        row = np.full(cfg.data.seq_len, filler or 0, np.int32)
        if filler is None:
            row = rng.integers(0, tokenizer.vocab_size, cfg.data.seq_len).astype(np.int32)
        row[: len(ids)] = ids
        out = apply_model(cfg, params, router_state, jnp.asarray(row[None]))
        drawn.append(np.asarray(head_logits(params, out.hidden_BTD[0, len(ids) - 1][None])))
    alone = last_logits(cfg, params, router_state, ids)
    for logits in drawn:
        np.testing.assert_allclose(logits[0], alone, rtol=1e-4, atol=1e-4)


def test_other_prompts_beside_it_change_nothing(loaded: Any) -> None:
    both = generate(loaded, [PROMPT, "import os"], n_tokens=6)
    for prompt, ids in zip([PROMPT, "import os"], both, strict=True):
        assert generate(loaded, [prompt], n_tokens=6)[0] == ids


def test_ids_that_only_pad_the_vocabulary_are_never_drawn(loaded: Any) -> None:
    cfg, params, router_state, tokenizer = loaded
    assert tokenizer.vocab_size < cfg.model.vocab_size
    head = params["lm_head"]
    eager = params | {"lm_head": head.at[:, tokenizer.vocab_size :].set(100 * head[:, 5:6])}
    mean = params | {"lm_head": jnp.zeros_like(head)}
    for some, temperature in ((eager, 0.0), (eager, 1.0), (mean, 5.0)):
        ids = decode.generate(
            cfg,
            some,
            router_state,
            tokenizer,
            ["a", "b", "c", "d"],
            n_tokens=20,
            temperature=temperature,
        )
        assert max(max(row) for row in ids) < tokenizer.vocab_size


def test_draws_depend_on_the_seed_alone(loaded: Any) -> None:
    draws = [
        generate(loaded, [PROMPT], n_tokens=12, temperature=1.0, seed=seed)[0] for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_draws_follow_the_softmax_at_the_temperature(loaded: Any) -> None:
    cfg, params, router_state, tokenizer = loaded
    ids, temperature, n_draws = tokenizer.encode(PROMPT), 0.7, 400
    rows = np.full((n_draws, cfg.data.seq_len), tokenizer.pad, np.int32)
    rows[:, : len(ids)] = ids
    chosen = decode.next_token(
        cfg,
        params,
        router_state,
        jnp.asarray(rows),
        jnp.full(n_draws, len(ids), jnp.int32),
        jnp.asarray(tokenizer.vocab_size),
        jnp.asarray(temperature),
        jax.random.key(0),
    )
    logits = last_logits(cfg, params, router_state, ids)[: tokenizer.vocab_size] / temperature
    probability = np.exp(logits - logits.max())
    probability /= probability.sum()
    likeliest = np.argsort(-probability)[:20]
    share = np.mean(np.isin(np.asarray(chosen), likeliest))
    wanted = probability[likeliest].sum()
    assert abs(share - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / n_draws)


def test_generation_ends_at_eos(loaded: Any) -> None:
    cfg, params, router_state, tokenizer = loaded
    out = apply_model(cfg, params, router_state, jnp.asarray([tokenizer.encode(PROMPT)]))
    head = params["lm_head"].at[:, tokenizer.eos].set(100 * out.hidden_BTD[0, -1])
    ending = params | {"lm_head": head}
    ids = decode.generate(cfg, ending, router_state, tokenizer, [PROMPT], n_tokens=9)[0]
    assert ids == [tokenizer.eos]


def test_a_prompt_longer_than_the_window_loses_its_oldest_tokens(loaded: Any) -> None:
    cfg, params, router_state, tokenizer = loaded
    long = PROMPT * 20
    kept = tokenizer.encode(long)[-cfg.data.seq_len :]
    assert len(tokenizer.encode(long)) > cfg.data.seq_len
    got = generate(loaded, [long], n_tokens=1)[0]
    logits = last_logits(cfg, params, router_state, kept)[: tokenizer.vocab_size]
    assert got == [int(np.argmax(logits))]


def test_an_empty_prompt_starts_a_document(loaded: Any) -> None:
    cfg, params, router_state, tokenizer = loaded
    got = generate(loaded, [""], n_tokens=1)[0]
    logits = last_logits(cfg, params, router_state, [tokenizer.bos])[: tokenizer.vocab_size]
    assert got == [int(np.argmax(logits))]


def test_loaded_weights_are_the_checkpoints_raw_or_averaged() -> None:
    workdir = mini.finished()
    manifest = checkpoint.load(workdir, mini.N_STEPS).manifest
    for ema, prefix in ((False, "params."), (True, "ema.")):
        _, params, _, _ = load_run(workdir, ema=ema)
        for name, array in checkpoint.flat_arrays(params).items():
            assert (
                checkpoint._digest_array(np.asarray(array))
                == (manifest["arrays"][f"{prefix}{name}"]["sha256"])
            )


def sample(*arguments: str) -> Any:
    return mini.call(mini.command(*arguments, program="sample"))


def test_the_program_continues_a_prompt_and_prints_its_speed() -> None:
    done = sample(f"--ckpt={mini.finished()}", f"--prompt={PROMPT}", "--tokens=5", "--ema")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(PROMPT)
    assert "tokens/s" in done.stdout.splitlines()[-1]
    assert done.stderr == ""


def test_a_run_directory_needs_nothing_beside_it(tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(mini.finished(), moved)
    for name in ("config.txt", "metrics.jsonl", "data_files.txt"):
        (moved / name).unlink()
    cfg, _, _, tokenizer = load_run(moved)
    assert cfg.model == mini.config().model
    assert tokenizer.decode(tokenizer.encode(PROMPT)) == PROMPT


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ([], 2, "--ckpt=RUN_DIRECTORY is missing"),
        (["--ckpt=nowhere"], 1, "nowhere: no complete checkpoint here"),
        (["--ckpt=setup.cfg"], 1, "setup.cfg: no complete checkpoint here"),
        (["--ckpt=nowhere", "--tokens=0"], 2, "tokens"),
        (["--ckpt=nowhere", os.fsdecode(b"--prompt=caf\xe9")], 2, "--prompt is not valid UTF-8"),
        (["--ckpt=nowhere", "--chatt"], 2, "Unknown command line flag 'chatt'"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], code: int, named: str) -> None:
    done = sample(*arguments)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert named in done.stderr


def test_a_run_without_tokenizer_or_averages_is_named(tmp_path: Path) -> None:
    moved = tmp_path / "run"
    shutil.copytree(mini.finished(), moved)
    (moved / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_run(moved)
