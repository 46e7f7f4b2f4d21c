"""Every mistake of a user ends in one line that names thing and remedy, and changes nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain.python  # noqa: F401  its flags must exist before flagsaver looks, which drops new ones
import pytest
from absl import flags
from absl.testing import flagsaver

from tests import mini
from v3jax import checkpoint, train
from v3jax.metrics import read_rows


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`train.main` with these flags: its exit code and the one line it left on stderr."""

    def run(**values: Any) -> tuple[int, str]:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS([""])
        capsys.readouterr()
        with flagsaver.flagsaver(**values):
            code = train.main(["train"])
        errors = capsys.readouterr().err
        assert len(errors.splitlines()) == 1, errors
        assert errors.startswith("v3jax.train: ")
        return code, errors

    return run


@pytest.fixture
def run_mini(
    call: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """The same for the mini run, with `--set` values."""

    def run(workdir: Path, *settings: str) -> tuple[int, str]:
        monkeypatch.setattr(train.registry, "get", lambda name: mini.config())
        return call(exp="mini_run", workdir=str(workdir), set=list(settings))

    return run


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["optim.clip_nrm=1"], "did you mean clip_norm"),
        (["model=3"], "names a group"),
        (["optim.clip_norm"], "write path.to.field=value"),
        (["optim.clip_norm=often"], "expected float"),
        (["model.n_layers=2.5"], "expected int, got float"),
        (["balance.strategy=lossfree"], "did you mean loss_free"),
        (["balance.loss_over=sequences"], "did you mean sequence"),
        (["data.sources.9.weight=1"], "not an index"),
        (["model.n_groups=3"], "3 groups do not divide 16 experts"),
        (["model.top_k=9"], "9 experts do not fit in 2 kept groups of 4"),
        (["model.top_groups=5"], "within 1..n_groups=4"),
        (["model.rope_head_dim=7"], "must be even"),
        (["model.dim=0"], "must be positive"),
        (["batch.end=21"], "whole number of micro-batches"),
        (["data.tokenizer_vocab_size=5000"], "exceed model.vocab_size=4096"),
        (["checkpoint_format=0"], "writes format"),
    ],
)
def test_impossible_settings_are_a_mistake_in_the_call(
    call: Callable[..., tuple[int, str]], tmp_path: Path, settings: list[str], named: str
) -> None:
    code, line = call(exp="v3_tiny", workdir=str(tmp_path / "run"), set=settings)
    assert code == 2
    assert named in line
    assert settings[0].split("=")[0].split(".")[-1] in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"exp": "v3_tiney"}, "did you mean v3_tiny"),
        ({"exp": "nowhere/mine.py"}, "no such file"),
        ({"exp": None}, "--list shows the experiments"),
        ({"exp": "v3_tiny", "profile": "7:3"}, "write A:B"),
    ],
)
def test_an_unknown_experiment_or_range_is_a_mistake_in_the_call(
    call: Callable[..., tuple[int, str]], values: dict[str, Any], named: str
) -> None:
    code, line = call(**values)
    assert code == 2
    assert named in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--experiment=v3_tiny"], "Unknown command line flag 'experiment'"),
        (["--exp=v3_tiney"], "did you mean v3_tiny"),
        (["v3_tiny"], "unexpected arguments v3_tiny"),
    ],
)
def test_the_program_exits_2_with_one_line(arguments: list[str], named: str) -> None:
    done = mini.call(mini.command(*arguments))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert named in done.stderr


def write(file: Path, content: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("absent.txt", None, "no such file"),
        ("empty.txt", b"", "the corpus is empty"),
        ("blank.txt", b" \n\n", "the corpus is empty"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "invalid UTF-8 at byte 3"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "broken.jsonl:2: not JSON"),
        ("other.jsonl", b'{"body": "a"}\n', "no text field 'text'; set data.text_field"),
        ("single.txt", b"one document", "no held-out documents among 1"),
    ],
)
def test_data_that_cannot_be_used_are_named(
    run_mini: Callable[..., tuple[int, str]],
    tmp_path: Path,
    name: str,
    content: bytes | None,
    named: str,
) -> None:
    file = tmp_path / "data" / name
    if content is not None:
        write(file, content)
    code, line = run_mini(tmp_path / "run", f"data.path={file}", "data.heldout_fraction=0.001")
    assert code == 1
    assert str(file) in line
    assert named in line
    assert not (tmp_path / "run").exists()


def test_ids_outside_the_vocabulary_are_named(
    run_mini: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    tokenizer = mini.finished() / "tokenizer.json"
    code, line = run_mini(
        tmp_path / "run",
        "data.tokenizer_vocab_size=300",
        "model.vocab_size=384",
        f"data.tokenizer={tokenizer}",
    )
    assert code == 1
    assert "400 ids exceed model.vocab_size=384" in line
    assert not (tmp_path / "run").exists()


def test_a_run_that_only_diverges_ends_with_one_line_and_keeps_its_rows(
    run_mini: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    code, line = run_mini(
        tmp_path / "run", "optim.phases.0.lr=1e30", "optim.warmup_steps=0", "run.eval_every=0"
    )
    assert code == 1
    assert "3 steps in a row without a finite loss; lower the learning rate" in line
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["committed"] for row in rows[-4:]] == [1, 0, 0, 0]


def test_too_few_devices_are_named(
    run_mini: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    sizes = ("batch.end=64", "batch.start=64", "batch.micro_batch=64", "mesh.data=64")
    code, line = run_mini(tmp_path / "run", *sizes)
    assert code == 1
    assert "needs 64 devices, found 8; set mesh.* to fit" in line


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A copy of a finished run, to be refused."""
    shutil.copytree(mini.finished(), tmp_path / "run")
    return tmp_path / "run"


def test_a_workdir_of_another_experiment_is_refused_unchanged(
    run_mini: Callable[..., tuple[int, str]], workdir: Path
) -> None:
    before = mini.contents(workdir)
    code, line = run_mini(workdir, "optim.clip_norm=0.5", "model.top_k=1", "run.eval_every=3")
    assert code == 1
    assert "optim.clip_norm was 1.0, is 0.5" in line
    assert "model.top_k was 2, is 1" in line
    assert "eval_every" not in line
    assert "choose another --workdir" in line
    assert mini.contents(workdir) == before


def test_it_is_refused_before_its_first_checkpoint_too(
    run_mini: Callable[..., tuple[int, str]], workdir: Path
) -> None:
    shutil.rmtree(workdir / "checkpoints")
    before = mini.contents(workdir)
    code, line = run_mini(workdir, "run.seed=1")
    assert (code, "run.seed was 0, is 1" in line) == (1, True)
    assert mini.contents(workdir) == before


def test_other_data_under_the_same_settings_are_refused_unchanged(
    run_mini: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    text = tmp_path / "text"
    for i in range(40):
        write(text / f"{i}.txt", f"document {i} {'of many words ' * (20 + i)}".encode())
    settings = (f"data.path={text}", "run.checkpoint_every=0", "run.eval_every=0")
    cfg = train.config.override(mini.config(total_tokens=2 * 64.0), settings)
    run_here = mini.run_here(cfg, tmp_path / "run")
    assert run_here.finished
    write(text / "more.txt", b"another document " * 30)
    before = mini.contents(tmp_path / "run")
    code, line = run_mini(tmp_path / "run", *settings, "run.total_tokens=256")
    assert code == 1
    assert "restore the corpus or start a new workdir" in line
    assert mini.contents(tmp_path / "run") == before


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize(
    "damaged", [lambda step: largest(step / "state/d"), lambda step: step / "manifest.json"]
)
def test_a_truncated_checkpoint_is_refused_unchanged(
    run_mini: Callable[..., tuple[int, str]], workdir: Path, damaged: Callable[[Path], Path]
) -> None:
    newest = workdir / "checkpoints" / str(mini.N_STEPS)
    truncate(damaged(newest))
    before = mini.contents(workdir)
    code, line = run_mini(workdir)
    assert code == 1
    assert f"step {mini.N_STEPS}" in line
    assert str(newest) in line
    assert "to continue from the step before it" in line
    assert mini.contents(workdir) == before


@pytest.mark.faults
def test_the_remedy_of_a_truncated_checkpoint_works(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(mini.finished(), workdir)
    newest = workdir / "checkpoints" / str(mini.N_STEPS)
    whole = checkpoint.load(workdir, mini.N_STEPS).manifest["arrays"]
    truncate(largest(newest / "state/d"))
    refused = mini.call(mini.train_command(workdir))
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1, refused.stderr
    shutil.rmtree(newest)
    assert mini.call(mini.train_command(workdir)).returncode == 0
    assert checkpoint.load(workdir, mini.N_STEPS).manifest["arrays"] == whole


@pytest.mark.parametrize("below", ["", "deep/run"])
def test_a_workdir_that_is_a_file_or_below_one_is_refused(
    run_mini: Callable[..., tuple[int, str]], tmp_path: Path, below: str
) -> None:
    file = write(tmp_path / "run", b"mine")
    code, line = run_mini(file / below)
    assert (code, f"{file}: is a file" in line) == (1, True)
    assert file.read_bytes() == b"mine"


def test_a_folder_with_a_foreign_config_is_refused(
    run_mini: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    file = write(tmp_path / "run" / "config.txt", b"\xd3\xff")
    code, line = run_mini(tmp_path / "run")
    assert (code, f"{file}: no text" in line) == (1, True)
    assert file.read_bytes() == b"\xd3\xff"


def test_a_folder_with_foreign_metrics_is_refused(
    run_mini: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    file = write(tmp_path / "run" / "metrics.jsonl", b'{"step": 0}\n')
    code, line = run_mini(tmp_path / "run")
    assert (code, "holds metrics.jsonl but no run" in line) == (1, True)
    assert file.read_bytes() == b'{"step": 0}\n'
