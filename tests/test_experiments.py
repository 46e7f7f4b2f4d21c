"""Every registered experiment: its golden text, its name, and the report's numbers in v3_full."""

import ast
import difflib
from pathlib import Path

import pytest

from tests.golden import update
from v3jax import config, registry

REMEDY = "if this is meant, run `python -m tests.golden.update` and commit the change"


@pytest.mark.parametrize("name", registry.names())
def test_experiment_is_unchanged(name: str) -> None:
    path = update.FOLDER / f"{name}.txt"
    assert path.exists(), f"{name} has no golden text; {REMEDY}"
    now = config.to_text(registry.get(name))
    diff = difflib.unified_diff(
        path.read_text().splitlines(), now.splitlines(), "golden", "now", lineterm="", n=0
    )
    assert not (text := "\n".join(diff)), f"{name} differs; {REMEDY}\n{text}"


def test_no_golden_text_is_left_over() -> None:
    assert {p.stem for p in update.FOLDER.glob("*.txt")} == set(registry.names())


@pytest.mark.parametrize("name", registry.names())
def test_experiment_carries_the_name_it_is_registered_by(name: str) -> None:
    assert registry.get(name).name == name


@pytest.mark.parametrize("name", registry.names())
def test_schedules_reach_the_end_of_the_run(name: str) -> None:
    cfg = registry.get(name)
    ends = [
        cfg.optim.phases[-1].until_tokens,
        cfg.balance.bias_speed[-1][0],
        cfg.mtp_weight[-1][0],
    ]
    assert ends == pytest.approx([cfg.run.total_tokens] * 3)


def test_experiments_import_config_and_registry_only(repo: Path) -> None:
    allowed = {"v3jax.config", "v3jax.registry", "dataclasses"}
    for path in (repo / "experiments").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            foreign = [m for m in modules if m not in allowed and m.split(".")[0] != "experiments"]
            assert not foreign, f"{path.name} imports {', '.join(foreign)}"


@pytest.mark.parametrize(
    ("name", "seq_len", "sequences", "start"),
    [
        ("v3_ctx32k", 32_768, 1920, "runs/v3_full"),
        ("v3_ctx128k", 131_072, 480, "runs/v3_ctx32k"),
        ("v3_ctx32k_v5p", 32_768, 1920, "runs/v3_full"),
        ("v3_ctx128k_v5p", 131_072, 480, "runs/v3_ctx32k"),
    ],
)
def test_long_context_has_the_reports_values(
    name: str, seq_len: int, sequences: int, start: str
) -> None:
    """Section 4.3: 1000 steps each, batches of as many tokens as pre-training's."""
    cfg, full = registry.get(name), registry.get("v3_full")
    assert cfg.data.seq_len == seq_len
    assert cfg.batch.start == cfg.batch.end == sequences
    tokens = sequences * seq_len
    assert tokens == full.batch.end * full.data.seq_len == 62_914_560
    assert cfg.run.total_tokens == 1000 * tokens
    assert [p.lr for p in cfg.optim.phases] == [7.3e-6]
    assert cfg.model.yarn == config.YarnConfig(
        factor=40, original_seq_len=4096, beta_fast=32, beta_slow=1, mscale=1.0
    )
    assert cfg.init_from == start
    # As many tokens a device, so that what a pipeline keeps waiting is as large.
    micro = cfg.batch.micro_batch * seq_len // cfg.mesh.token_shards
    assert micro == full.batch.micro_batch * full.data.seq_len // full.mesh.token_shards == 4096


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.vocab_size", 129_280),
        ("model.dim", 7168),
        ("model.n_layers", 61),
        ("model.n_dense_layers", 3),
        ("model.n_heads", 128),
        ("model.q_latent_dim", 1536),
        ("model.kv_latent_dim", 512),
        ("model.nope_head_dim", 128),
        ("model.rope_head_dim", 64),
        ("model.v_head_dim", 128),
        ("model.dense_ffn_dim", 18_432),
        ("model.expert_ffn_dim", 2048),
        ("model.n_shared_experts", 1),
        ("model.n_experts", 256),
        ("model.top_k", 8),
        ("model.n_groups", 8),
        ("model.top_groups", 4),
        ("model.route_scale", 2.5),
        ("model.mtp_depth", 1),
        ("model.yarn", None),
        ("model.init_std", 0.006),
        ("numerics.moments", "bf16"),
        ("data.seq_len", 4096),
        ("data.fim_rate", 0.1),
        ("batch.start", 3072),
        ("batch.end", 15_360),
        ("batch.ramp_tokens", 469e9),
        ("optim.beta1", 0.9),
        ("optim.beta2", 0.95),
        ("optim.weight_decay", 0.1),
        ("optim.clip_norm", 1.0),
        ("optim.warmup_steps", 2000),
        ("balance.strategy", "loss_free"),
        ("balance.bias_speed", ((14.3e12, 0.001), (14.8e12, 0.0))),
        ("balance.sequence_alpha", 1e-4),
        ("mtp_weight", ((10e12, 0.3), (14.8e12, 0.1))),
        ("run.total_tokens", 14.8e12),
    ],
)
def test_full_experiment_has_the_reports_value(path: str, value: object) -> None:
    assert config.flatten(registry.get("v3_full"))[path] == value
