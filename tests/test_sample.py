"""Sampling: the model's own next tokens, none of padding's doing, none outside the tokenizer."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import mini
from v3jax import checkpoint, convert, decode, models
from v3jax.data.chat import ChatTemplate
from v3jax.decode.steps import PREFILL_CHUNK
from v3jax.model.transformer import head_logits
from v3jax.models import load_run
from v3jax.objective import apply_model

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
    chosen = generate(loaded, [PROMPT] * n_draws, n_tokens=1, temperature=temperature)
    logits = last_logits(cfg, params, router_state, ids)[: tokenizer.vocab_size] / temperature
    probability = np.exp(logits - logits.max())
    probability /= probability.sum()
    likeliest = np.argsort(-probability)[:20]
    share = np.mean(np.isin(np.ravel(chosen), likeliest))
    wanted = probability[likeliest].sum()
    assert abs(share - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / n_draws)


def test_generation_ends_at_eos(loaded: Any) -> None:
    cfg, params, router_state, tokenizer = loaded
    out = apply_model(cfg, params, router_state, jnp.asarray([tokenizer.encode(PROMPT)]))
    head = params["lm_head"].at[:, tokenizer.eos].set(100 * out.hidden_BTD[0, -1])
    ending = params | {"lm_head": head}
    ids = decode.generate(cfg, ending, router_state, tokenizer, [PROMPT], n_tokens=9)[0]
    assert ids == [tokenizer.eos]


def test_a_prompt_longer_than_a_chunk_of_prefill_is_read_whole(loaded: Any) -> None:
    cfg, params, router_state, tokenizer = loaded
    ids = tokenizer.encode(PROMPT * 60)
    assert len(ids) > 2 * PREFILL_CHUNK
    got = generate(loaded, [PROMPT * 60], n_tokens=1)[0]
    logits = last_logits(cfg, params, router_state, ids)[: tokenizer.vocab_size]
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


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini run as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("public") / "hf"
    convert.to_hf(mini.finished(), folder, dtype="fp32")
    return folder


def test_a_public_directory_continues_as_the_run_it_came_from(public: Path) -> None:
    options = (f"--prompt={PROMPT}", "--tokens=8")
    run = sample(f"--ckpt={mini.finished()}", *options)
    same = sample(f"--ckpt={public}", *options)
    drafted = sample(f"--ckpt={public}", *options, "--speculative")
    texts = ["\n".join(done.stdout.splitlines()[:-1]) for done in (run, same, drafted)]
    assert texts[0].startswith(PROMPT)
    assert texts[0] == texts[1] == texts[2]
    last = drafted.stdout.splitlines()[-1]
    assert "of drafted tokens accepted" in last
    assert "tokens a step of the main model" in last


def test_copies_of_experts_change_no_text(tmp_path: Path) -> None:
    placed = tmp_path / "placement.json"
    sizes = (f"--run={mini.finished()}", "--replicas=12", "--devices=2", f"--out={placed}")
    assert mini.call(mini.command(*sizes, program="eplb")).returncode == 0
    options = (f"--ckpt={mini.finished()}", f"--prompt={PROMPT}", "--tokens=8", "--speculative")
    plain, copied = sample(*options), sample(*options, f"--redundant={placed}")
    assert copied.returncode == 0, copied.stderr
    assert copied.stdout.splitlines()[:-1] == plain.stdout.splitlines()[:-1]


def test_prompts_of_a_file_are_continued_in_batches(public: Path, tmp_path: Path) -> None:
    prompts = [PROMPT, "import os", "x = 1"]
    (tmp_path / "prompts.txt").write_text("\n".join([*prompts, "", ""]), encoding="utf-8")
    done = sample(
        f"--ckpt={public}", f"--prompts-file={tmp_path / 'prompts.txt'}", "--tokens=6", "--batch=2"
    )
    assert done.returncode == 0, done.stderr
    loaded = models.open_model(public)
    for prompt in prompts:
        ids = decode.generate(
            mini.config(),
            loaded.params,
            loaded.router_state,
            loaded.tokenizer,
            [prompt],
            n_tokens=6,
        )[0]
        assert f">>> {prompt}\n{loaded.tokenizer.decode(ids)}\n" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("18 tokens")


def test_a_chat_asks_for_turns_and_remembers_them(public: Path) -> None:
    call = mini.command(
        f"--ckpt={public}", "--chat", "--tokens=4", "--system=Be brief.", program="sample"
    )
    done = subprocess.run(
        call, cwd=mini.REPO, input="Hello\nAgain\n\n", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = models.open_model(public)
    chat = ChatTemplate(loaded.chat_template, loaded.tokenizer)
    messages = [{"role": "system", "content": "Be brief."}]
    answers = []
    engine = decode.Engine(
        loaded.model,
        loaded.params,
        loaded.router_state,
        loaded.tokenizer,
        numerics=loaded.numerics,
    )
    for turn in ("Hello", "Again"):
        messages.append({"role": "user", "content": turn})
        out, _ = engine.generate([chat.encode(messages)], max_tokens=4)
        answers.append(loaded.tokenizer.decode(out[0].ids))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert done.stdout.startswith(f"> {answers[0]}\n> {answers[1]}\n> ")


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
        ([], 2, "--ckpt=DIRECTORY is missing"),
        (["--ckpt=nowhere"], 1, "nowhere: no model here"),
        (["--ckpt=setup.cfg"], 1, "setup.cfg: no model here"),
        (["--ckpt=nowhere", "--tokens=0"], 2, "tokens"),
        (["--ckpt=nowhere", os.fsdecode(b"--prompt=caf\xe9")], 2, "--prompt is not valid UTF-8"),
        (["--ckpt=nowhere", "--chatt"], 2, "Unknown command line flag 'chatt'"),
        (["--ckpt=nowhere", "--top-p=1.5"], 2, "--top-p=1.5"),
        (["--ckpt=nowhere", "--prompt=a", "--prompts-file=b"], 2, "exclude each other"),
        (["--ckpt=nowhere", "--prompts-file=absent.txt"], 1, "absent.txt cannot be read"),
        (["--ckpt=nowhere", "--redundant=absent.json"], 1, "absent.json: no placement"),
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
