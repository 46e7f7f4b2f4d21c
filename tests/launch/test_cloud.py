"""launch/gke_jobset.yaml, launch/tpu_xpk.sh and what runs in their containers."""

import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.launch.shell import LAUNCH, REPO, environment, run, stub, wait_for
from v3jax import cli

_NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
_OBJECT: dict[str, Any] = {"type": "object", "additionalProperties": False}

# What the file uses of a JobSet (jobset.x-k8s.io/v1alpha2); the Job is for kubernetes-validate.
_JOBSET = _OBJECT | {
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": _OBJECT | {"required": ["name"], "properties": {"name": _NAME}},
        "spec": _OBJECT
        | {
            "required": ["replicatedJobs"],
            "properties": {
                "network": _OBJECT
                | {
                    "properties": {
                        "enableDNSHostnames": {"type": "boolean"},
                        "publishNotReadyAddresses": {"type": "boolean"},
                    }
                },
                "failurePolicy": _OBJECT
                | {
                    "properties": {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "rules": {
                            "type": "array",
                            "items": _OBJECT
                            | {
                                "required": ["name", "action"],
                                "properties": {
                                    "name": {"type": "string"},
                                    "action": {
                                        "enum": [
                                            "FailJobSet",
                                            "RestartJobSet",
                                            "RestartJobSetAndIgnoreMaxRestarts",
                                        ]
                                    },
                                    "onJobFailureReasons": {
                                        "type": "array",
                                        "items": {
                                            "enum": [
                                                "BackoffLimitExceeded",
                                                "DeadlineExceeded",
                                                "PodFailurePolicy",
                                            ]
                                        },
                                    },
                                },
                            },
                        },
                    }
                },
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": _OBJECT
                    | {
                        "required": ["name", "template"],
                        "properties": {
                            "name": _NAME,
                            "replicas": {"type": "integer", "minimum": 1},
                            "template": {"type": "object", "required": ["spec"]},
                        },
                    },
                },
            },
        },
    },
}


@pytest.fixture
def jobset() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="pip install kubernetes-validate==1.37.0")
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def _replicated(jobset: dict[str, Any]) -> dict[str, Any]:
    return jobset["spec"]["replicatedJobs"][0]


def _pod(jobset: dict[str, Any]) -> dict[str, Any]:
    return _replicated(jobset)["template"]["spec"]["template"]["spec"]


def test_the_job_is_one_that_kubernetes_takes(jobset: dict[str, Any]) -> None:
    validate = pytest.importorskip(
        "kubernetes_validate", reason="pip install kubernetes-validate==1.37.0"
    )
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "host"}}
    job |= _replicated(jobset)["template"]
    validate.validate(job, "1.37", strict=True)
    job["spec"]["parallelism"] = "two"
    with pytest.raises(validate.ValidationError):
        validate.validate(job, "1.37", strict=True)


def test_the_jobset_around_it_has_known_fields(jobset: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="pip install kubernetes-validate==1.37.0")
    jsonschema.validate(jobset, _JOBSET)
    jobset["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(jobset, _JOBSET)


def test_names_and_numbers_in_it_agree(jobset: dict[str, Any]) -> None:
    job = _replicated(jobset)["template"]["spec"]
    (container,) = _pod(jobset)["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    name, host = jobset["metadata"]["name"], _replicated(jobset)["name"]
    assert job["parallelism"] == job["completions"] == int(env["JAX_NUM_PROCESSES"])
    coordinator, port = env["JAX_COORDINATOR_ADDRESS"].split(":")
    assert coordinator == f"{name}-{host}-0-0.{name}"
    assert 0 < int(port) < 2**16
    assert job["completionMode"] == "Indexed"
    assert _pod(jobset)["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [cli.USAGE]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    mounts, volumes = container["volumeMounts"], _pod(jobset)["volumes"]
    assert [mount["name"] for mount in mounts] == [volume["name"] for volume in volumes]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8


def test_its_program_is_where_the_image_has_it(jobset: dict[str, Any]) -> None:
    workdir = "/opt/v3jax"
    assert f"WORKDIR {workdir}\n" in (REPO / "Dockerfile").read_text()
    _, program, platform = _pod(jobset)["containers"][0]["command"]
    assert program == f"{workdir}/launch/pod.sh"
    assert platform == "gpu"


_XPK = (
    *("--cluster=c", "--tpu-type=v5p-128", "--image=r/v3jax:tpu", "--name=full"),
    *("--workdir=gs://b/full", "--dry-run"),
)


def test_the_xpk_command() -> None:
    done = run(
        LAUNCH / "tpu_xpk.sh",
        *(*_XPK, "--num-slices=4", "--zone=z", "--", "--exp=v3_full", "--set", "a.b=x y"),
    )
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:3] == ["xpk", "workload", "create"]
    assert {"--cluster=c", "--zone=z", "--num-slices=4", "--docker-image=r/v3jax:tpu"} <= set(words)
    inside = shlex.split(words[-1].removeprefix("--command="))
    assert inside[:5] == ["exec", "bash", "/opt/v3jax/launch/pod.sh", "tpu", "--distributed"]
    assert inside[5:] == ["--workdir=gs://b/full", "--exp=v3_full", "--set", "a.b=x y"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("--name=Full", "--name=Full"),
        ("--num-slices=0", "--num-slices=0"),
        ("--workdir=/tmp/x", "hosts share nothing but gs://"),
        ("--slices=2", "unknown option '--slices=2'"),
    ],
)
def test_the_xpk_script_refuses(wrong: str, says: str) -> None:
    done = run(LAUNCH / "tpu_xpk.sh", *_XPK, wrong, "--", "--exp=a")
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


def _pod_script(folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], Path]:
    out = folder / "out"
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "pod.sh"), "cpu", *arguments],
        cwd=REPO,
        env=environment(PYTHON=stub(folder)),
        stdout=out.open("w"),
        stderr=subprocess.STDOUT,
        text=True,
    )
    return process, out


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_container_ends_with_the_trainer_s_code(tmp_path: Path, code: int) -> None:
    process, _ = _pod_script(tmp_path, f"--code={code}")
    assert process.wait(30) == code


def test_a_container_that_was_told_to_stop_is_not_done(tmp_path: Path) -> None:
    process, out = _pod_script(tmp_path, "--wait")
    wait_for("start", lambda: "process 0" in out.read_text(), 20)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert "stopped by a signal" in out.read_text()
