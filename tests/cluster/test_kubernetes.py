"""launch/kubernetes.yaml and kubeflow.yaml: validated with published schemas, and their pods run as a cluster does."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from msvae.distributed.exit_codes import LOST_RANKS, STOPPED

from ..conftest import ROOT, tiny_run
from ..distributed.interrupted_runs import PATIENCE_S, RUN
from ..namespaces import TwoMachines, two_machines
from ..servers import set_credentials

LAUNCH = ROOT / "launch"
SCHEMAS = "1.31", "1.37"
"""Oldest supported version of Kubernetes, and a recent one."""


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


def of_kind(name: str, kind: str) -> dict[str, Any]:
    return next(document for document in documents(name) if document["kind"] == kind)


def kubeflow_job() -> dict[str, Any]:
    runtime = of_kind("kubeflow.yaml", "TrainingRuntime")
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}, **job["template"]}


@pytest.mark.parametrize("version", SCHEMAS)
def test_every_object_is_valid_in_the_published_schema_and_a_misspelt_key_is_not(version):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in [*documents("kubernetes.yaml"), kubeflow_job()]:
        kubernetes_validate.validate(document, version, strict=True)
    misspelt = documents("kubernetes.yaml")[1]
    misspelt["spec"]["backofLimit"] = 6
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(misspelt, version, strict=True)


@pytest.mark.parametrize("kind", ["TrainingRuntime", "TrainJob"])
def test_the_types_of_kubeflow_keep_every_key_of_its_objects(kind):
    name = {"TrainingRuntime": "training_runtime", "TrainJob": "train_job"}[kind]
    pytest.importorskip("kubeflow_trainer_api")
    module = importlib.import_module(f"kubeflow_trainer_api.models.trainer_v1alpha1_{name}")
    document = of_kind("kubeflow.yaml", kind)
    # unknown keys would be lost
    assert getattr(module, f"TrainerV1alpha1{kind}").from_dict(document).to_dict() == document


def test_services_select_the_pods_and_all_names_match():
    service, job, deployment, board = documents("kubernetes.yaml")
    pods = job["spec"]["template"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == pods["metadata"]["labels"]
    assert pods["spec"]["subdomain"] == service["metadata"]["name"]
    (container,) = pods["spec"]["containers"]
    words = container["args"]
    assert words[words.index("--nodes") + 1] == str(job["spec"]["completions"]) == str(job["spec"]["parallelism"])
    head = f"{job['metadata']['name']}-0.{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert words[words.index("--at") + 1] == head
    assert board["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    (tensorboard,) = deployment["spec"]["template"]["spec"]["containers"]
    assert f"{words[words.index('--out') + 1]}/tensorboard" in tensorboard["args"]
    runtime, train_job = documents("kubeflow.yaml")
    assert train_job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]


@pytest.mark.parametrize("job", [of_kind("kubernetes.yaml", "Job"), kubeflow_job()], ids=["kubernetes", "kubeflow"])
def test_exit_codes_75_and_69_restart_the_pods_and_a_user_error_does_not(job):
    (container,) = job["spec"]["template"]["spec"]["containers"]
    action = {}
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] == container["name"]
            action |= dict.fromkeys(codes["values"], rule["action"])
        else:
            assert (rule["action"], rule["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert action == {STOPPED: "Ignore", LOST_RANKS: "Ignore", 2: "FailJob"}
    spec = job["spec"]["template"]["spec"]
    assert spec["restartPolicy"] == "Never"
    assert spec["terminationGracePeriodSeconds"] > 120, "node.sh leaves the ranks 120 s"
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_secrets_are_referenced_and_never_contained():
    for name in ("kubernetes.yaml", "kubeflow.yaml", "skypilot.yaml", "slurm.sbatch", "Dockerfile"):
        text = (LAUNCH / name).read_text()
        assert "kind: Secret" not in text
        assert "AWS_SECRET_ACCESS_KEY: null" in text or "AWS_SECRET_ACCESS_KEY:" not in text


SERVE = """
import pathlib, sys, boto3
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(sys.argv[1], 9000, verbose=False)
server.start()
client, shards = boto3.client("s3"), pathlib.Path(sys.argv[2])
client.create_bucket(Bucket="leaves")
for path in shards.rglob("*"):
    if path.is_file():
        client.put_object(Bucket="leaves", Key=f"shards/{path.relative_to(shards)}", Body=path.read_bytes())
print("serving", flush=True)
sys.stdin.readline()
path = pathlib.Path(sys.argv[3])
path.write_bytes(client.get_object(Bucket="leaves", Key=sys.argv[4])["Body"].read())
print("copied", flush=True)
"""
"""An S3 server with the shards. A line on its input makes it copy the weights of the model to a file."""


class Pod(NamedTuple):
    """Command and environment of a pod."""

    words: list[str]
    environment: dict[str, str]


def plain_pods() -> list[Pod]:
    (container,) = of_kind("kubernetes.yaml", "Job")["spec"]["template"]["spec"]["containers"]
    return [
        Pod(container["command"] + container["args"], {"JOB_COMPLETION_INDEX": str(index)} | variables(container))
        for index in range(2)
    ]


def kubeflow_pods() -> list[Pod]:
    trainer = of_kind("kubeflow.yaml", "TrainJob")["spec"]["trainer"]
    (container,) = kubeflow_job()["spec"]["template"]["spec"]["containers"]
    (script,) = trainer["args"]
    cluster = {"PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": "1"}
    cluster |= {"PET_MASTER_ADDR": "msvae-node-0-0.msvae", "PET_MASTER_PORT": "29500"}
    return [
        # further arguments are appended to the command, as in the other file
        Pod(
            [*trainer["command"], script.rstrip() + ' "$@"', "pod"],
            {**cluster, "PET_NODE_RANK": str(index), **variables(container)},
        )
        for index in range(2)
    ]


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container["env"]}


@contextmanager
def resolvable(machines: TwoMachines, *names: str) -> Iterator[None]:
    """Resolve the names as the cluster's DNS does: `ip netns exec` mounts these files over /etc."""
    folders = [Path("/etc/netns") / name for name in machines.names]
    try:
        for folder in folders:
            folder.mkdir(parents=True)
            entries = [f"{machines.addresses[0]} {name}" for name in names]
            (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *entries, ""]))
        yield
    finally:
        for folder in folders:
            (folder / "hosts").unlink(missing_ok=True)
            folder.rmdir()


class Pods:
    """Both pods, each on its own machine with its own disk."""

    def __init__(self, machines: TwoMachines, pods: list[Pod], arguments: list[str], disks: Path) -> None:
        self.processes, self._disks = [], [disks / f"pod-{index}" for index in range(2)]
        for pod, name, disk in zip(pods, machines.names, self._disks, strict=True):
            disk.mkdir(parents=True)
            environment = {**os.environ, **pod.environment, "PYTHONPATH": str(ROOT)}
            assert environment["TMPDIR"] == "/scratch"
            environment["TMPDIR"] = str(disk)
            command = ["ip", "netns", "exec", name, *pod.words, *arguments]
            with (disk / "log").open("w") as log:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
                )

    @property
    def logs(self) -> list[str]:
        return [(disk / "log").read_text() for disk in self._disks]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert all(process.poll() is None for process in self.processes), self.logs
            assert time.monotonic() < deadline, self.logs
            time.sleep(0.02)

    def codes(self) -> list[int]:
        try:
            return [process.wait(PATIENCE_S) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pods", "head"),
    [(plain_pods, "msvae-0.msvae"), (kubeflow_pods, "msvae-node-0-0.msvae")],
    ids=["kubernetes", "kubeflow"],
)
def test_the_pods_train_together_save_when_drained_and_resume_in_new_pods(
    launch, leaf_shards, monkeypatch, tmp_path, pods, head
):
    """Run the commands and environments of the pods, with a tiny model. SIGTERM goes to the first process."""
    options = {"train__eval_every": 100}
    small = tiny_run(leaf_shards, tmp_path / "alone", **{**RUN, **options})
    done = launch(ROOT / "train" / "train.py", *small)
    assert done.returncode == 0, done.stderr[-3000:]
    own = ("--data.train", "--data.val", "--out")
    arguments = [word for at in range(0, len(small), 2) if small[at] not in own for word in small[at : at + 2]]
    copied = tmp_path / "model.safetensors"
    with two_machines() as machines, resolvable(machines, head):
        set_credentials(monkeypatch, f"http://{machines.addresses[0]}:9000")
        model = "runs/first/model/diffusion_pytorch_model.safetensors"
        server = machines.run(0, sys.executable, "-c", SERVE, machines.addresses[0], leaf_shards, copied, model)
        try:
            assert server.stdout.readline() == "serving\n"
            drained = Pods(machines, pods(), arguments, tmp_path / "drained")
            drained.wait_until(
                lambda: any('"step": 5,' in log.read_text() for log in tmp_path.glob("drained/*/*/metrics.jsonl"))
            )
            drained.processes[1].send_signal(signal.SIGTERM)
            assert drained.codes() == [STOPPED, STOPPED], drained.logs
            assert not list(tmp_path.glob("drained/*/msvae-*")), "uploaded files are removed"
            ended = Pods(machines, pods(), arguments, tmp_path / "ended")
            assert ended.codes() == [0, 0], ended.logs
            assert any("resumed at step " in log for log in ended.logs)
            print(file=server.stdin, flush=True)
            assert server.stdout.readline() == "copied\n"
        finally:
            server.kill()
            server.wait()
    expected = load_file(tmp_path / "alone" / "model" / "diffusion_pytorch_model.safetensors")
    actual = load_file(copied)
    assert all(np.array_equal(expected[name], actual[name]) for name in expected)
