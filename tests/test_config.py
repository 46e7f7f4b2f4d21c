"""Typed overrides, their error messages, validation and the flat text of a config."""

import dataclasses

import pytest

from v3jax import config, registry
from v3jax.config import ExperimentConfig, override
from v3jax.sharding import MESH_AXES

TINY = registry.get("v3_tiny")


def value(cfg: ExperimentConfig, path: str) -> object:
    return config.flatten(cfg)[path]


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("optim.clip_norm=0.5", 0.5),
        ("optim.clip_norm=2", 2.0),
        ("run.total_tokens=3e6", 3e6),
        ("model.n_layers=6", 6),
        ("data.synthetic=True", True),
        ("data.synthetic=False", False),
        ("data.path=/a/b=c", "/a/b=c"),
        ("data.path=None", None),
        ("data.path=7", "7"),
        ("optim.ema_decay=none", None),
        ("optim.ema_decay=0.5", 0.5),
        ("numerics.compute=bf16", "bf16"),
        ("balance.strategy=aux_loss", "aux_loss"),
        ("mtp_weight=((1e5, 0.5), (1e6, 0))", ((1e5, 0.5), (1e6, 0.0))),
        ("mtp_weight=[[10, 1]]", ((10.0, 1.0),)),
        ("optim.phases.0.lr=1e-3", 1e-3),
        ("data.sources.1.weight=3", 3.0),
    ],
)
def test_override_reads_values_as_the_declared_type(assignment: str, expected: object) -> None:
    got = value(override(TINY, [assignment]), assignment.partition("=")[0])
    assert got == expected
    assert type(got) is type(expected)


def test_later_overrides_win_and_others_stay() -> None:
    cfg = override(TINY, ["run.seed=1", "run.seed=2"])
    assert cfg.run.seed == 2
    assert override(cfg, [f"run.seed={TINY.run.seed}"]) == TINY


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.clip_nrm=1", "did you mean clip_norm"),
        ("optm.clip_norm=1", "did you mean optim"),
        ("model.n_layers=six", "model.n_layers=six: expected int"),
        ("model.n_layers=6.0", "expected int, got float"),
        ("model.n_layers=True", "expected int, got bool"),
        ("optim.clip_norm=big", "expected float"),
        ("data.synthetic=1", "expected bool, got int"),
        ("numerics.compute=bf61", "did you mean bf16"),
        ("balance.strategy=x", "not one of loss_free, aux_loss, none"),
        ("mtp_weight=0.3", "mtp_weight=0.3: expected tuple"),
        ("mtp_weight=((1, 2, 3),)", "expected tuple"),
        ("optim=1", "names a group; set one of its fields"),
        ("optim.clip_norm", "write path.to.field=value"),
        ("optim.clip_norm.x=1", "has no fields"),
        ("optim.phases.9.lr=1", "is not an index below 4"),
        ("optim.phases.first.lr=1", "is not an index below 4"),
        ("model.yarn.factor=40", "has no fields"),
    ],
)
def test_wrong_overrides_name_the_field_in_one_line(assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        override(TINY, [assignment])
    assert message in str(error.value)
    assert assignment.partition("=")[0].split(".")[0] in str(error.value)


@pytest.mark.parametrize(
    ("assignment", "field"),
    [
        ("model.n_groups=3", "model.n_groups: 3 groups do not divide 16 experts"),
        ("model.n_groups=0", "model.n_groups"),
        ("model.top_groups=0", "model.top_groups"),
        ("model.top_groups=5", "model.top_groups: must be within 1..n_groups=4"),
        ("model.top_k=9", "model.top_k: 9 experts do not fit in 2 kept groups of 4"),
        ("model.top_k=0", "model.top_k"),
        ("model.dim=0", "model.dim: must be positive"),
        ("model.n_heads=-1", "model.n_heads"),
        ("model.n_dense_layers=5", "model.n_dense_layers"),
        ("model.n_shared_experts=-1", "model.n_shared_experts"),
        ("model.mtp_depth=-1", "model.mtp_depth"),
        ("model.mtp_depth=256", "model.mtp_depth: must be smaller than data.seq_len=256"),
        ("model.rope_head_dim=15", "model.rope_head_dim"),
        ("model.vocab_size=4095", "data.tokenizer_vocab_size"),
        ("mesh.expert=0", "mesh.expert"),
        ("data.seq_len=0", "data.seq_len"),
        ("data.fim_rate=1.1", "data.fim_rate"),
        ("data.newline_split_rate=-0.1", "data.newline_split_rate"),
        ("data.heldout_fraction=0.0", "data.heldout_fraction"),
        ("data.heldout_fraction=1.0", "data.heldout_fraction"),
        ("data.sources.0.weight=0.0", "data.sources[stdlib].weight"),
        ("data.sources.0.max_mb=0.0", "data.sources[stdlib].max_mb"),
        ("batch.micro_batch=0", "batch.micro_batch"),
        ("batch.micro_batch=3", "batch.start: 4 sequences are not a whole number"),
        ("batch.end=10", "batch.end"),
        ("batch.start=24", "batch.start: must not exceed batch.end"),
        ("optim.phases.1.until_tokens=1.0", "optim.phases: token boundaries must rise"),
        ("optim.phases.0.shape=cosine", "optim.phases: the first phase must be constant"),
        ("optim.ema_decay=1.0", "optim.ema_decay"),
        ("balance.bias_speed=((2, 1), (1, 1))", "balance.bias_speed: token boundaries must rise"),
        ("balance.bias_speed=()", "balance.bias_speed: needs at least one"),
        ("mtp_weight=()", "mtp_weight: needs at least one"),
        ("run.total_tokens=0", "run.total_tokens"),
        ("run.keep_checkpoints=0", "run.keep_checkpoints"),
        ("run.max_bad_steps=0", "run.max_bad_steps"),
        ("checkpoint_format=99", "checkpoint_format"),
    ],
)
def test_impossible_values_are_refused_by_name(assignment: str, field: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        override(TINY, [assignment])
    assert str(error.value).startswith(field)


def test_yarn_is_validated() -> None:
    with pytest.raises(ValueError, match=r"yarn\.factor"):
        config.YarnConfig(factor=0.5, original_seq_len=4096, beta_fast=32, beta_slow=1, mscale=1.0)


def test_configs_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.optim.__setattr__("clip_norm", 2.0)
    assert hash(TINY) == hash(registry.get("v3_tiny"))


def test_every_leaf_of_the_text_is_its_own_line() -> None:
    text = config.to_text(TINY)
    assert "model.n_layers = 4\n" in text
    assert "optim.phases.1.shape = 'cosine'\n" in text
    assert "data.sources.0.name = 'stdlib'\n" in text
    assert len(text.splitlines()) == len(config.flatten(TINY))


def test_digest_changes_with_any_value() -> None:
    same = override(TINY, ["run.seed=0"])
    other = override(TINY, ["run.seed=1"])
    assert config.digest(same) == config.digest(TINY) != config.digest(other)


def test_mesh_counts_the_devices_of_every_axis() -> None:
    mesh = config.MeshConfig(pipe=2, data=3, node=5, context=11, expert=7)
    assert mesh.n_devices == 2310
    assert tuple(f.name for f in dataclasses.fields(mesh))[:5] == MESH_AXES
    assert mesh.sizes == "pipe=2 x data=3 x node=5 x context=11 x expert=7"
    assert (mesh.batch_shards, mesh.token_shards, mesh.expert_shards) == (105, 1155, 385)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("mesh.data=3", r"mesh: data=3 x node=1 x expert=1 devices do not divide .*micro_batch=4"),
        ("mesh.expert=0", "mesh.expert: must be at least 1"),
        ("moe.dispatch_chunks=0", "moe.dispatch_chunks: must be at least 1"),
        ("moe.bound_factor=0", "moe.bound_factor: must be positive"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(registry.get("v3_tiny"), [assignment])


def test_a_mesh_that_does_not_divide_the_experts_names_both() -> None:
    cfg = registry.get("v3_tiny")
    cfg = dataclasses.replace(
        cfg,
        batch=dataclasses.replace(cfg.batch, micro_batch=6, start=6, end=12),
    )
    with pytest.raises(ValueError, match=r"mesh: node=3 x context=1 x expert=2 .* divide .*=16"):
        dataclasses.replace(cfg, mesh=config.MeshConfig(node=3, expert=2))
