"""Runs the commands of all pods of the overlay `cpu` to the end on this machine.

Commands, arguments, variables, config files and volumes are those of the rendered objects. Replaces
the cluster by processes of uid 1000 (if this process is root), a Ray cluster with the nodes of the
RayJob and a token, and the program of the overlay's bucket.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flexunet.storage import open_store
from tests.faults.proxy import FaultProxy, start_emulator
from tests.k8s.manifests import ROOT, Manifest, Pod, environment, find, pods, render
from tests.launcher.conftest import started_cluster

pytestmark = pytest.mark.cluster

# The user of the pods. It may read all files, because Python may be in a home without read access.
_USER = (
    *("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"),
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search", "--"),
)


@dataclass
class Machine:
    """Runs containers as processes.

    Attributes:
        objects: the objects of the overlay.
        folder: contains the volumes.
        bucket: STORAGE_EMULATOR_HOST on this machine, where Services have no names.
        user: words before each command that run it as another user.
    """

    objects: Sequence[Manifest]
    folder: Path
    bucket: str
    user: Sequence[str]
    places: dict[str, Path] = field(default_factory=dict)

    def run_pod(self, pod: Pod) -> None:
        """Runs all containers of a pod one after the other; each must end with exit code 0."""
        self.mount(pod)
        for container in pod.containers:
            self.run(container, container["command"])

    def run(
        self,
        container: Manifest,
        command: Sequence[str],
        variables: Mapping[str, str] | None = None,
    ) -> None:
        values = self.variables(container) | dict(variables or {})
        words = [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], word) for word in command]
        done = subprocess.run(
            [*self.user, *(self.here(word) for word in words)],
            cwd=self.folder,
            env=values,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{words}: {done.stderr[-3000:]}{done.stdout[-3000:]}"

    def variables(self, container: Manifest) -> dict[str, str]:
        """Returns the environment of a container, with the variables of the image."""
        values = environment(self.objects, container)
        if "STORAGE_EMULATOR_HOST" in values:
            values["STORAGE_EMULATOR_HOST"] = self.bucket
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        image = {"HOME": str(self.folder), "PATH": programs, "PYTHONDONTWRITEBYTECODE": "1"}
        # The image has flexunet installed, and the tests the working tree.
        return image | {"PYTHONPATH": str(ROOT)} | values

    def mount(self, pod: Pod) -> None:
        """Creates the volumes of a pod, and stores their folders in `places`."""
        self.places = {}
        for volume in pod.spec["volumes"]:
            (path,) = {
                mount["mountPath"]
                for container in pod.containers
                for mount in container["volumeMounts"]
                if mount["name"] == volume["name"]
            }
            place = Path(tempfile.mkdtemp(prefix="volume-", dir=self.folder))
            place.chmod(0o1777 if "emptyDir" in volume else 0o755)
            self.places[path] = place
        for volume in pod.spec["volumes"]:
            if "configMap" in volume:
                data = find(self.objects, "ConfigMap", volume["configMap"]["name"])["data"]
                for name, text in data.items():
                    (self.places["/etc/flexunet"] / name).write_text(self.here(text))

    def here(self, text: str) -> str:
        """Returns `text` with the paths of mounts replaced by folders of this machine."""
        # In one pass, because these folders are under /tmp, which is a mount too.
        mounts = "|".join(re.escape(path) for path in self.places)
        pattern = rf"(?<![\w/.-])({mounts})(?![\w.-])"
        return re.sub(pattern, lambda found: str(self.places[found[1]]), text)


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    emulator, upstream = start_emulator("flexunet")
    proxy = FaultProxy(upstream)
    proxy.start()
    yield proxy
    proxy.close()
    emulator.stop()


def other_user() -> Sequence[str]:
    """Returns the words that run a command as the pods' user, none if that is not possible."""
    command = [*_USER, sys.executable, "-c", "import os; print(os.geteuid())"]
    with contextlib.suppress(OSError):  # no setpriv
        if subprocess.run(command, capture_output=True, text=True).stdout.strip() == "1000":
            return _USER
    return ()


@pytest.fixture
def machine(proxy: FaultProxy) -> Iterator[Machine]:
    # Not under pytest's folder, which other users cannot enter.
    folder = Path(tempfile.mkdtemp(prefix="flexunet-k8s-"))
    folder.chmod(0o1777)
    yield Machine(render("overlays/cpu"), folder, proxy.address, other_user())
    shutil.rmtree(folder)


def train(machine: Machine) -> None:
    """Runs the RayJob: a cluster with its nodes and a token, and a shell with its command."""
    job = find(machine.objects, "RayJob", "train")["spec"]
    cluster = job["rayClusterSpec"]
    head, worker = (pod for pod in pods(machine.objects) if pod.owner.startswith("RayJob"))
    machine.mount(head)
    group = cluster["workerGroupSpecs"][0]
    num_cpus = int(worker.spec["containers"][0]["resources"]["limits"]["cpu"])
    nodes = {"head": int(cluster["headGroupSpec"]["rayStartParams"]["num-cpus"])}
    nodes |= {f"worker-{number}": num_cpus for number in range(group["replicas"])}
    assert cluster["authOptions"] == {"mode": "token"}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    container = head.spec["containers"][0]
    variables = machine.variables(container) | token
    with started_cluster(nodes, user=machine.user, variables=variables) as ray:
        command = ["sh", "-c", job["entrypoint"]]
        machine.run(container, command, token | {"RAY_ADDRESS": ray.address})


def test_the_cpu_overlay_runs_to_the_end(
    machine: Machine, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {pod.owner: pod for pod in pods(machine.objects)}
    # The roles of k8s/README.md: prep and infer create and view, training replaces and deletes.
    proxy.creates_only = True
    machine.run_pod(found["Job/prep"])
    proxy.creates_only = False
    train(machine)
    machine.run_pod(found["Job/evaluate"])
    proxy.creates_only = True
    machine.run_pod(found["Job/infer"])

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", machine.bucket)
    store = open_store("gs://flexunet")
    stats = store.list()
    # Shown by `pytest -rP`.
    print(f"as uid {1000 if machine.user else os.geteuid()}")  # noqa: T201
    for stat in stats:
        print(f"{stat.size:9} {stat.name}")  # noqa: T201
    names = {stat.name for stat in stats}
    assert {
        "dataset/dataset.json",
        "runs/demo/outcome.json",
        "runs/demo/evaluation/summary.json",
    } <= names
    assert any(re.fullmatch(r"runs/demo/checkpoints/.*/COMMIT\.json", name) for name in names)
    assert sum(re.fullmatch(r"masks/phantom-[^/]*\.png", name) is not None for name in names) == 24
    assert json.loads(store.get("runs/demo/environment.json"))["replicas"] == 2

    # A retried pod continues from what the bucket has.
    machine.run_pod(found["Job/prep"])
    assert store.list() == stats
