"""The command line: what it takes, what it prints, and one line for every mistake."""

import functools
from pathlib import Path
from typing import Any

import pytest
from absl import flags

from tests.data.prepare import corpora
from tests.data.prepare.corpora import jsonl, prose
from v3jax import registry
from v3jax.config import override
from v3jax.data.prepare import __main__ as command
from v3jax.data.prepare.config import PrepareConfig, PrepareSource, of_experiment, of_file


def test_the_flags_are_these(monkeypatch: pytest.MonkeyPatch) -> None:
    found = flags.FlagValues()
    for name in ("string", "enum", "integer", "multi_string"):
        define = getattr(flags, f"DEFINE_{name}")
        own = functools.partial(define, flag_values=found)
        monkeypatch.setattr(command.flags, f"DEFINE_{name}", own)
    command.define_flags()
    wanted = {"exp", "config", "workdir", "out", "set", "executor", "workers", "sbatch"}
    assert set(found) - {"help", "helpfull", "helpshort", "helpxml"} == wanted


def test_an_experiments_sources_become_a_preparation() -> None:
    experiment = registry.get("v3_tiny")
    cfg = of_experiment(experiment)
    assert [s.name for s in cfg.sources] == [s.name for s in experiment.data.sources]
    assert [s.weight for s in cfg.sources] == [s.weight for s in experiment.data.sources]
    kinds = {s.name: s.kind for s in cfg.sources}
    assert kinds["stdlib"] == "code"
    assert kinds["pydoc_topics"] == "prose"
    assert cfg.tokenizer_vocab_size == experiment.data.tokenizer_vocab_size


def test_a_preparation_is_adjusted_as_an_experiment_is() -> None:
    cfg = PrepareConfig(sources=(PrepareSource(name="a", kind="prose", path="x"),))
    changed = override(cfg, ["dedup.minhash=False", "sources.0.kind=web", "n_tasks=3"])
    assert (changed.dedup.minhash, changed.sources[0].kind, changed.n_tasks) == (False, "web", 3)
    with pytest.raises(ValueError, match="did you mean minhash"):
        override(cfg, ["dedup.minhas=False"])
    with pytest.raises(ValueError, match="did you mean prose"):
        override(cfg, ["sources.0.kind=pros"])
    paths = override(cfg, ['decontaminate.paths=["a", "b"]'])
    assert paths.decontaminate.paths == ("a", "b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "sources: the corpus is empty"),
        ({"n_tasks": 0}, "n_tasks: must be at least 1"),
        ({"heldout_fraction": 1.0}, "heldout_fraction: must be within"),
        ({"shard_mb": 0.0}, "shard_mb: must be positive"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    plain: dict[str, Any] = {"sources": (PrepareSource(name="a", kind="prose"),)}
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**plain | changes)


def test_two_sources_of_one_name_are_refused() -> None:
    one = PrepareSource(name="a", kind="prose")
    with pytest.raises(ValueError, match="'a' stands there twice"):
        PrepareConfig(sources=(one, one))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("x = 1", "define prepare()"),
        ("def prepare():\n    return 3\n", r"prepare\(\) returns no PrepareConfig"),
        ("def prepare(:\n", "SyntaxError"),
        ("def prepare():\n    return 1 / 0\n", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(
    tmp_path: Path, text: str | None, message: str
) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message.replace("prepare()", r"prepare\(\)")):
        of_file(file)


def test_mistakes_are_one_line_and_a_run_ends_in_its_folder(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [*(prose(i) for i in range(30)), "bad \ufffd" * 3])
    source = PrepareSource(name="a", kind="maths", path=str(file))
    mine = corpora.write_config(tmp_path / "mine.py", corpora.config(tmp_path, [source]))
    cases = [
        (["--config", str(mine), "--exp=v3_tiny"], 2, "one of them"),
        (["--exp=v3_tinny"], 2, "did you mean v3_tiny"),
        (["--config", str(mine), "--set=n_taks=3"], 2, "did you mean n_tasks"),
        (["--config", str(mine), "--executor=locl"], 2, "executor"),
        (["--config", str(mine), "--set=sources.0.path=nowhere"], 1, "no .jsonl"),
        (["--config", str(mine), "--set=tokenizer=nowhere"], 1, "nowhere: no such tokenizer.json"),
    ]
    for arguments, code, message in cases:
        done = corpora.run(*arguments, f"--workdir={tmp_path / 'w'}")
        assert done.returncode == code, done.stderr
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("v3jax.data.prepare: ")
        assert done.stdout == ""
    done = corpora.run("--config", str(mine), f"--workdir={tmp_path / 'w'}", "--workers=1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines()[0].startswith("clean         31 documents read, 30 kept")
    assert done.stdout.endswith(f"done: {tmp_path}/w/corpus\n")
