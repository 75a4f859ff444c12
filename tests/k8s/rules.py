"""Rules for all objects of an overlay together, which no schema checks.

A rule yields a line for each violation. Sources: KubeRay's `utils/validation.go` for what its
controller rejects, Kubernetes' Pod Security Standards for `restricted`.
"""

import re
import tomllib
from collections.abc import Callable, Iterator, Sequence

from flexunet.errors import ContentError, DivergedError, UsageError
from tests.k8s.manifests import ROOT, Manifest, Pod, environment, find, of_kind, pods

Rule = Callable[[Sequence[Manifest]], Iterator[str]]
_RUN_NAME = r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?"
_DATE = r"20\d\d-?\d\d"
_DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
_SPOT = "cloud.google.com/gke-spot"
_GPU = "nvidia.com/gpu"
_OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}


def _jobs(objects: Sequence[Manifest]) -> list[Manifest]:
    return of_kind(objects, "Job", "RayJob")


def _groups(objects: Sequence[Manifest]) -> Iterator[Manifest]:
    for each in of_kind(objects, "RayJob"):
        yield from each["spec"]["rayClusterSpec"]["workerGroupSpecs"]


def _each_container(objects: Sequence[Manifest]) -> Iterator[tuple[Pod, Manifest]]:
    for pod in pods(objects):
        for container in pod.containers:
            yield pod, container


def image_is_pinned(objects: Sequence[Manifest]) -> Iterator[str]:
    """Images have a digest, or are already on the node."""
    for pod, container in _each_container(objects):
        is_pinned = re.search(r"@sha256:[0-9a-f]{64}$", container["image"])
        if not is_pinned and container.get("imagePullPolicy") != "Never":
            yield f"{pod.owner}: {container['image']} has no digest"


def no_secret_is_kept(objects: Sequence[Manifest]) -> Iterator[str]:
    for each in of_kind(objects, "Secret"):
        if each.get("data") or each.get("stringData"):
            yield f"Secret/{each['metadata']['name']} holds data"
    for pod, container in _each_container(objects):
        for variable in container.get("env", []):
            if re.search("TOKEN|PASSWORD|SECRET|KEY", variable["name"]) and "value" in variable:
                yield f"{pod.owner}: {variable['name']} has a value"


def grace_outlasts_drain(objects: Sequence[Manifest]) -> Iterator[str]:
    """The grace period of a pod is at least 10 s longer than the drain of its Ray node."""
    for pod, container in _each_container(objects):
        drain = environment(objects, container).get(_DRAIN)
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        if drain is None and pod.owner.startswith("RayJob"):
            yield f"{pod.owner}: {_DRAIN} is not set"
        if drain is not None and int(drain) + 10 > grace:
            yield f"{pod.owner}: the drain of {drain} s needs a grace of 10 s more than {grace} s"


def resources_are_bounded(objects: Sequence[Manifest]) -> Iterator[str]:
    for pod, container in _each_container(objects):
        requests = container.get("resources", {}).get("requests", {})
        limits = container.get("resources", {}).get("limits", {})
        if not {"cpu", "memory"} <= requests.keys():
            yield f"{pod.owner}: cpu or memory is not requested"
        # Memory above the request may belong to another pod: the kernel would kill one of them.
        if requests.get("memory") != limits.get("memory"):
            yield f"{pod.owner}: request and limit of memory differ"
        if requests.get(_GPU) != limits.get(_GPU):
            yield f"{pod.owner}: request and limit of GPUs differ"


def pod_is_restricted(objects: Sequence[Manifest]) -> Iterator[str]:
    for pod in pods(objects):
        context = pod.spec.get("securityContext", {})
        if not context.get("runAsNonRoot") or context.get("runAsUser") != 1000:
            yield f"{pod.owner}: does not run as uid 1000"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod.owner}: no seccomp profile"
        if any(pod.spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{pod.owner}: shares something with the host"
        if any("hostPath" in volume for volume in pod.spec.get("volumes", [])):
            yield f"{pod.owner}: mounts a folder of the host"
        for container in pod.containers:
            own = container.get("securityContext", {})
            if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
                yield f"{pod.owner}: {container['name']} may get privileges"
            if own.get("capabilities", {}).get("drop") != ["ALL"]:
                yield f"{pod.owner}: {container['name']} keeps capabilities"
            if not own.get("readOnlyRootFilesystem"):
                yield f"{pod.owner}: {container['name']} may write to its root"


def part_brings_its_config(objects: Sequence[Manifest]) -> Iterator[str]:
    """Objects that the parts read are in `base`, which is applied with each part."""
    for each in of_kind(objects, "ConfigMap", "ServiceAccount"):
        if each["metadata"].get("labels", {}).get("flexunet/part") != "base":
            yield f"{each['kind']}/{each['metadata']['name']}: not of the part base"


def account_is_own(objects: Sequence[Manifest]) -> Iterator[str]:
    known = {each["metadata"]["name"] for each in of_kind(objects, "ServiceAccount")}
    for pod in pods(objects):
        if pod.spec.get("serviceAccountName") not in known:
            yield f"{pod.owner}: the account {pod.spec.get('serviceAccountName')} is not here"
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.owner}: has a token for the Kubernetes API"


def names_resolve(objects: Sequence[Manifest]) -> Iterator[str]:
    """All references use the hashed names."""
    known = {each["metadata"]["name"] for each in of_kind(objects, "ConfigMap")}
    for pod in pods(objects):
        volumes = [each for each in pod.spec.get("volumes", []) if "configMap" in each]
        named = {each["configMap"]["name"] for each in volumes}
        for container in pod.containers:
            named |= {each["configMapRef"]["name"] for each in container.get("envFrom", [])}
        for name in sorted(named - known):
            yield f"{pod.owner}: there is no ConfigMap {name}"


def policy_covers_every_pod(objects: Sequence[Manifest]) -> Iterator[str]:
    selectors = [each["spec"]["podSelector"] for each in of_kind(objects, "NetworkPolicy")]
    for pod in pods(objects):
        if not any(_selects(selector, pod.labels) for selector in selectors):
            yield f"{pod.owner}: no network policy selects it"


def _selects(selector: Manifest, labels: dict[str, str]) -> bool:
    exact = selector.get("matchLabels", {}).items() <= labels.items()
    found = (
        each["operator"] == "Exists" and each["key"] in labels
        for each in selector.get("matchExpressions", [])
    )
    return exact and all(found)


def policy_lets_in_no_stranger(objects: Sequence[Manifest]) -> Iterator[str]:
    """Only pods of this project and of the operator may connect; egress has rules."""
    for policy in of_kind(objects, "NetworkPolicy"):
        name, spec = policy["metadata"]["name"], policy["spec"]
        for rule in spec.get("ingress", []):
            if not rule.get("from") or any("podSelector" not in each for each in rule["from"]):
                yield f"NetworkPolicy/{name}: addresses may come in, not pods alone"
        if "Egress" in spec["policyTypes"] and not spec.get("egress"):
            yield f"NetworkPolicy/{name}: nothing may go out, not even to the bucket"


def operator_is_admitted(objects: Sequence[Manifest]) -> Iterator[str]:
    """The operator reaches port 8265; otherwise it ends the job after 300 s, without a retry."""
    for policy in of_kind(objects, "NetworkPolicy"):
        for rule in policy["spec"]["ingress"]:
            # In any namespace: without a namespace selector, only the policy's own counts.
            peers = [
                each.get("podSelector", {}).get("matchLabels")
                for each in rule["from"]
                if each.get("namespaceSelector") == {}
            ]
            if _OPERATOR in peers and 8265 in [each["port"] for each in rule.get("ports", [])]:
                return
    yield "no network policy lets the operator reach port 8265"


def job_ends(objects: Sequence[Manifest]) -> Iterator[str]:
    """Jobs have retries, but a limited number and time."""
    for each in _jobs(objects):
        if not each["spec"].get("backoffLimit") or not each["spec"].get("activeDeadlineSeconds"):
            yield f"{each['kind']}/{each['metadata']['name']}: no backoffLimit or deadline"
        if each["kind"] == "RayJob" and not each["spec"].get("preRunningDeadlineSeconds"):
            yield f"RayJob/{each['metadata']['name']}: waits for nodes without an end"


def exit_codes_end_job(objects: Sequence[Manifest]) -> Iterator[str]:
    """A mistake is not retried; a lost node does not count as a failure."""
    final = sorted(error.exit_code for error in (UsageError, ContentError, DivergedError))
    for each in of_kind(objects, "Job"):
        rules = each["spec"].get("podFailurePolicy", {}).get("rules", [])
        codes = [rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule]
        if codes != [final]:
            yield f"Job/{each['metadata']['name']}: ends at exit codes {codes}, not {final}"
        lost = [{"type": "DisruptionTarget", "status": "True"}]
        if not rules or (rules[0]["action"], rules[0].get("onPodConditions")) != ("Ignore", lost):
            yield f"Job/{each['metadata']['name']}: a lost node counts as a failure"


def run_name_is_stable(objects: Sequence[Manifest]) -> Iterator[str]:
    for each in of_kind(objects, "ConfigMap"):
        name = each["data"].get("RUN")
        if name is not None and (not re.fullmatch(_RUN_NAME, name) or re.search(_DATE, name)):
            yield f"RUN={name} is no run name, or holds a date"
    for each in of_kind(objects, "RayJob"):
        # The cluster's name is the job's with a suffix.
        if not re.fullmatch(_RUN_NAME, each["metadata"].get("name", "")):
            yield f"RayJob/{each['metadata'].get('name')}: no name of 47 characters at most"


def operator_submits(objects: Sequence[Manifest]) -> Iterator[str]:
    for each in of_kind(objects, "RayJob"):
        if each["spec"].get("submissionMode") != "HTTPMode":
            yield "submissionMode is not HTTPMode"
        if "clusterSelector" in each["spec"]:
            yield "clusterSelector and backoffLimit exclude each other"


def cluster_is_removed(objects: Sequence[Manifest]) -> Iterator[str]:
    for each in of_kind(objects, "RayJob"):
        if not each["spec"].get("shutdownAfterJobFinishes"):
            yield "the cluster stays and costs when the job has ended"
        if each["spec"].get("ttlSecondsAfterFinished", 0) > 600:
            yield "the cluster and its GPU nodes stay for more than 10 min after the end"
        if each["spec"].get("deletionStrategy"):
            yield "deletionStrategy and shutdownAfterJobFinishes exclude each other"


def ray_asks_for_token(objects: Sequence[Manifest]) -> Iterator[str]:
    for each in of_kind(objects, "RayJob"):
        options = each["spec"]["rayClusterSpec"].get("authOptions", {})
        if options.get("mode") != "token" or options.get("enableK8sTokenAuth"):
            yield "Ray must ask for a token of its own (authOptions.mode: token)"


def ray_is_the_locked_one(objects: Sequence[Manifest]) -> Iterator[str]:
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    (locked,) = (each["version"] for each in packages if each["name"] == "ray")
    for each in of_kind(objects, "RayJob"):
        if each["spec"]["rayClusterSpec"].get("rayVersion") != locked:
            yield f"rayVersion is not {locked}, as the image has it"


def head_is_safe(objects: Sequence[Manifest]) -> Iterator[str]:
    """The head, which runs the driver, has no tasks, no Spot node and a disruption budget."""
    for each in of_kind(objects, "RayJob"):
        head = each["spec"]["rayClusterSpec"]["headGroupSpec"]
        if head["rayStartParams"].get("num-cpus") != "0":
            yield "workers may be placed on the head"
        keys = {key["key"] for key in head["template"]["spec"].get("tolerations", [])}
        if _SPOT in keys | head["template"]["spec"].get("nodeSelector", {}).keys():
            yield "the head may be on a Spot node"
        labels = head["template"]["metadata"]["labels"] | {"ray.io/node-type": "head"}
        budgets = [
            one["spec"]["selector"]
            for one in of_kind(objects, "PodDisruptionBudget")
            if one["spec"].get("minAvailable") == 1
        ]
        if not any(_selects(selector, labels) for selector in budgets):
            yield "no disruption budget protects the head"


def workers_are_those_asked_for(objects: Sequence[Manifest]) -> Iterator[str]:
    asked = find(objects, "ConfigMap", "flexunet-run")["data"]
    for group in _groups(objects):
        counts = {group[key] for key in ("replicas", "minReplicas", "maxReplicas")}
        if counts != {int(asked["NUM_WORKERS"])}:
            yield f"{sorted(counts)} replicas for {asked['NUM_WORKERS']} workers"
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        found = limits.get("cpu"), limits.get(_GPU, "0")
        if found != (asked["CPUS_PER_WORKER"], asked["GPUS_PER_WORKER"]):
            yield f"cores and GPUs of a worker are {found}, run.env asks for other ones"


def gpu_pod_finds_its_node(objects: Sequence[Manifest]) -> Iterator[str]:
    for pod in pods(objects):
        needs = any(_GPU in each.get("resources", {}).get("limits", {}) for each in pod.containers)
        keys = {each["key"] for each in pod.spec.get("tolerations", [])}
        selector = pod.spec.get("nodeSelector", {})
        if needs and (_GPU not in keys or "cloud.google.com/gke-accelerator" not in selector):
            yield f"{pod.owner}: does not name or tolerate the GPU nodes"
        pools = [group["template"]["spec"].get("nodeSelector", {}) for group in _groups(objects)]
        if needs and any((_SPOT in pool) != (_SPOT in selector) for pool in pools):
            yield f"{pod.owner}: looks for other GPU nodes than the workers of the training"
        if (_SPOT in keys) != (_SPOT in selector):
            yield f"{pod.owner}: tolerates or selects Spot nodes, but not both"


def gpu_is_used(objects: Sequence[Manifest]) -> Iterator[str]:
    """A Job with a GPU has --needs-gpu; a RayJob sets --gpus-per-worker instead."""
    for each in of_kind(objects, "Job"):
        for container in each["spec"]["template"]["spec"]["containers"]:
            has = _GPU in container.get("resources", {}).get("limits", {})
            if has != ("--needs-gpu" in container["command"]):
                name = f"Job/{each['metadata']['name']}"
                yield f"{name}: has a GPU or --needs-gpu, but not both"


RULES: tuple[Rule, ...] = (
    image_is_pinned,
    no_secret_is_kept,
    grace_outlasts_drain,
    resources_are_bounded,
    pod_is_restricted,
    account_is_own,
    names_resolve,
    policy_covers_every_pod,
    policy_lets_in_no_stranger,
    part_brings_its_config,
    operator_is_admitted,
    job_ends,
    exit_codes_end_job,
    run_name_is_stable,
    operator_submits,
    cluster_is_removed,
    ray_asks_for_token,
    ray_is_the_locked_one,
    head_is_safe,
    workers_are_those_asked_for,
    gpu_pod_finds_its_node,
    gpu_is_used,
)
