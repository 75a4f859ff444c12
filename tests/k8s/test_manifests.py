"""Every overlay builds, is valid and keeps the rules; every rule finds a violation."""

import copy
import os
import re
import shlex
import subprocess
import sys
from typing import Any

import click
import pytest
import yaml

from data_prep.config import PrepConfig
from flexunet.settings import parse_settings
from job.config import TrainConfig
from tests.k8s import rules
from tests.k8s.manifests import OVERLAYS, ROOT, Manifest, find, of_kind, pods, render
from tests.k8s.schema import errors_of
from tests.test_readme import calls, check, shell_lines

NUM_OBJECTS = {"cpu": 14, "gpu": 12, "gpu-spot-kueue": 12}
_HEAD = "spec.rayClusterSpec.headGroupSpec"
_WORKER = "spec.rayClusterSpec.workerGroupSpecs.0"
_POD = "spec.template.spec"
# Rule, the object that is broken, where, and the value there; None removes it.
BROKEN: tuple[tuple[rules.Rule, str, str, str, Any], ...] = (
    (rules.image_is_pinned, "Job", "prep", f"{_POD}.containers.0.image", "flexunet:latest"),
    (
        rules.no_secret_is_kept,
        "RayJob",
        "train",
        f"{_HEAD}.template.spec.containers.0.env.0",
        {"name": "RAY_AUTH_TOKEN", "value": "abc"},
    ),
    (
        rules.grace_outlasts_drain,
        "RayJob",
        "train",
        f"{_WORKER}.template.spec.terminationGracePeriodSeconds",
        12,
    ),
    (
        rules.resources_are_bounded,
        "Job",
        "infer",
        f"{_POD}.containers.0.resources.limits.memory",
        None,
    ),
    (rules.pod_is_restricted, "Job", "prep", f"{_POD}.hostNetwork", True),
    (rules.account_is_own, "Job", "infer", f"{_POD}.serviceAccountName", "default"),
    (
        rules.names_resolve,
        "RayJob",
        "train",
        f"{_WORKER}.template.spec.containers.0.envFrom.0.configMapRef.name",
        "flexunet-run",
    ),
    (
        rules.policy_covers_every_pod,
        "Job",
        "evaluate",
        "spec.template.metadata.labels",
        {"app": "evaluate"},
    ),
    (rules.operator_is_admitted, "NetworkPolicy", "flexunet", "spec.ingress.1.ports.0.port", 10001),
    (
        rules.operator_is_admitted,
        "NetworkPolicy",
        "flexunet",
        "spec.ingress.1.from.0.namespaceSelector",
        None,
    ),
    (
        rules.policy_lets_in_no_stranger,
        "NetworkPolicy",
        "flexunet",
        "spec.ingress.0.from.0",
        {"ipBlock": {"cidr": "0.0.0.0/0"}},
    ),
    (rules.policy_lets_in_no_stranger, "NetworkPolicy", "flexunet", "spec.egress", []),
    (
        rules.part_brings_its_config,
        "ConfigMap",
        "flexunet-run",
        "metadata.labels",
        {"flexunet/part": "train"},
    ),
    (rules.job_ends, "RayJob", "train", "spec.activeDeadlineSeconds", None),
    (rules.job_ends, "RayJob", "train", "spec.preRunningDeadlineSeconds", None),
    (rules.cluster_is_removed, "RayJob", "train", "spec.ttlSecondsAfterFinished", 3600),
    (
        rules.exit_codes_end_job,
        "Job",
        "infer",
        "spec.podFailurePolicy.rules.0.onPodConditions.0.type",
        "PodScheduled",
    ),
    (rules.head_is_safe, "PodDisruptionBudget", "train-head", "spec.minAvailable", 0),
    (
        rules.gpu_pod_finds_its_node,
        "Job",
        "infer",
        f"{_POD}.nodeSelector",
        {"cloud.google.com/gke-accelerator": "nvidia-l4"},
    ),
    (
        rules.exit_codes_end_job,
        "Job",
        "prep",
        "spec.podFailurePolicy.rules.1.onExitCodes.values",
        [2, 3, 5],
    ),
    (rules.run_name_is_stable, "ConfigMap", "flexunet-run", "data.RUN", "run-20261124"),
    (rules.operator_submits, "RayJob", "train", "spec.submissionMode", "K8sJobMode"),
    (rules.cluster_is_removed, "RayJob", "train", "spec.shutdownAfterJobFinishes", False),
    (rules.ray_asks_for_token, "RayJob", "train", "spec.rayClusterSpec.authOptions", {}),
    (rules.ray_is_the_locked_one, "RayJob", "train", "spec.rayClusterSpec.rayVersion", "2.59.0"),
    (rules.head_is_safe, "PodDisruptionBudget", "train-head", "spec.selector.matchLabels.a", "b"),
    (rules.workers_are_those_asked_for, "RayJob", "train", f"{_WORKER}.maxReplicas", 4),
    (rules.gpu_pod_finds_its_node, "Job", "evaluate", f"{_POD}.tolerations", []),
    (rules.gpu_is_used, "Job", "evaluate", f"{_POD}.containers.0.command.7", "--no-needs-gpu"),
    (
        rules.gpu_is_used,
        "Job",
        "infer",
        f"{_POD}.containers.0.resources.limits",
        {"memory": "24Gi"},
    ),
)


def broken(manifest: Manifest, path: str, value: Any) -> Manifest:
    """Returns a copy of `manifest` with another value at `path`; None removes the key."""
    changed = copy.deepcopy(manifest)
    place: Any = changed
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return changed


def test_every_overlay_is_looked_at() -> None:
    assert set(OVERLAYS) == set(NUM_OBJECTS)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_is_valid(overlay: str) -> None:
    objects = render(f"overlays/{overlay}")
    assert len(objects) == NUM_OBJECTS[overlay]
    found = {f"{each['kind']}/{each['metadata']['name']}": errors_of(each) for each in objects}
    assert {name: errors for name, errors in found.items() if errors} == {}
    # Shown by `pytest -rP`.
    print(f"{overlay}: {len(found)} valid objects: {', '.join(sorted(found))}")  # noqa: T201


@pytest.mark.parametrize(
    ("kind", "name", "path", "value", "message"),
    [
        ("RayJob", "train", "spec.backOffLimit", 3, "backOffLimit"),
        ("RayJob", "train", f"{_WORKER}.template.spec.nodeSelectors", {}, "nodeSelectors"),
        ("RayJob", "train", f"{_WORKER}.groupName", None, "groupName"),
        ("Job", "prep", "spec.backoffLimits", 3, "backoffLimits"),
        ("NetworkPolicy", "flexunet", "spec.ingress.1.ports.0.port", [1], "port"),
    ],
)
def test_invalid_object_is_found(kind: str, name: str, path: str, value: Any, message: str) -> None:
    manifest = find(render("overlays/gpu"), kind, name)
    assert message in " ".join(errors_of(broken(manifest, path, value)))


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_overlay_keeps_rule(rule: rules.Rule, overlay: str) -> None:
    assert list(rule(render(f"overlays/{overlay}"))) == []


@pytest.mark.parametrize(
    ("rule", "kind", "name", "path", "value"),
    BROKEN,
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_rule_finds_broken_manifest(
    rule: rules.Rule, kind: str, name: str, path: str, value: Any
) -> None:
    objects = render("overlays/gpu-spot-kueue")
    manifest = find(objects, kind, name)
    objects[objects.index(manifest)] = broken(manifest, path, value)
    problems = list(rule(objects))
    assert len(problems) >= 1
    # Shown by `pytest -rP`: the table of the rules.
    print(f"{rule.__name__} | {kind}/{name} {path} = {value!r} | {problems[0]}")  # noqa: T201


def test_every_rule_has_a_broken_manifest() -> None:
    assert {row[0] for row in BROKEN} == set(rules.RULES)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_commands_and_config_are_accepted(overlay: str) -> None:
    objects = render(f"overlays/{overlay}")
    files = find(objects, "ConfigMap", "flexunet-config")["data"]
    parse_settings(PrepConfig, yaml.safe_load(files["prep.yaml"]), "prep.yaml")
    parse_settings(TrainConfig, yaml.safe_load(files["train.yaml"]), "train.yaml")
    values = find(objects, "ConfigMap", "flexunet-run")["data"]
    jobs = of_kind(objects, "Job")
    lines = [" ".join(job["spec"]["template"]["spec"]["containers"][0]["command"]) for job in jobs]
    lines += [each["spec"]["entrypoint"] for each in of_kind(objects, "RayJob")]
    assert len(lines) == 4
    for line in lines:
        for name, value in values.items():
            line = line.replace(f"$({name})", value).replace(f'"${name}"', value)
        assert "$" not in line
        for words in calls(line):
            check(words)


def test_a_wrong_option_in_a_manifest_is_found() -> None:
    train = find(render("overlays/gpu"), "RayJob", "train")
    with pytest.raises(click.NoSuchOption, match="--workers"):
        for words in calls(train["spec"]["entrypoint"].replace("--num-workers", "--workers")):
            check(words)


def test_readme_commands_name_what_is_there() -> None:
    lines = shell_lines((ROOT / "k8s" / "README.md").read_text())
    applied = [line for line in lines if line.startswith("kubectl apply -k")]
    assert applied
    parts = {each["metadata"]["labels"]["flexunet/part"] for each in render("overlays/gpu")}
    for line in applied:
        words = shlex.split(line.replace("$OVERLAY", "k8s/overlays/gpu"))
        assert (ROOT / words[3] / "kustomization.yaml").is_file(), line
        selector = words[words.index("-l") + 1].removeprefix("flexunet/part")
        named = re.findall("[a-z]+", selector.removeprefix(" in"))
        assert named[0] == "base" and set(named) <= parts, line


def test_queue_has_room_for_the_training() -> None:
    """The queue covers every resource that the pods request; otherwise it admits none."""
    documents = yaml.safe_load_all((ROOT / "k8s/components/kueue/queue.yaml").read_text())
    (group,) = find(list(documents), "ClusterQueue", "flexunet")["spec"]["resourceGroups"]
    asked: set[str] = set()
    for pod in pods(of_kind(render("overlays/gpu-spot-kueue"), "RayJob")):
        for container in pod.containers:
            asked |= container["resources"]["requests"].keys()
    assert asked == set(group["coveredResources"])
    assert asked == {each["name"] for each in group["flavors"][0]["resources"]}


def test_dockerfile_lints_clean() -> None:
    program = os.path.join(os.path.dirname(sys.executable), "hadolint")
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    source = (ROOT / "Dockerfile").read_text().replace("--no-install-recommends ", "")
    done = subprocess.run([program, "-"], input=source, capture_output=True, text=True)
    assert "DL3015" in done.stdout
