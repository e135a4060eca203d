"""The promises of the Kubernetes manifests, each as a function that yields its violations.

There is one function per promise, so that a test can break each and check that it is reported
(`tests/deploy/test_kubernetes.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.deploy.manifests import NAME, Manifests, Object, octets

from definition_server.cli.sizing import Demand, answer, load_figures
from definition_server.control_plane.master import _EXIT_MARGIN_SECONDS
from definition_server.data_plane.health import LIVENESS
from definition_server.data_plane.services import SERVICE
from definition_server.environment import is_secret, variables
from definition_server.settings import Settings

Promise = Callable[[Manifests], Iterator[str]]

RIGHT_SIZED = Demand(35_000, 100_000, 2100, 3, 1000, 0.4)
"""The load that the right-sized overlay is planned for, as the comment at its head states."""
BUSY = 0.6
"""Share of the workers' time above which the autoscaler adds a pod; `capacity` plans with it."""
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")
_FIELDS = {variables(field)[0]: field for field in Settings.model_fields.values()}
_SECRETS = {name for name, field in _FIELDS.items() if is_secret(field)}
KNOWN = {n for f in Settings.model_fields.values() for n in variables(f)} | {f"{name}_FILE" for name in _SECRETS}
"""Every variable that the server reads."""


def setting(manifests: Manifests, variable: str) -> float:
    """A number that is in effect: from the environment, or the server's default."""
    return float(manifests.environment.get(variable) or _FIELDS[variable].get_default(call_default_factory=True))


def guaranteed(m: Manifests) -> Iterator[str]:
    """Quality of service Guaranteed: the pod is evicted last."""
    resources = m.container["resources"]
    for what in ("cpu", "memory"):
        asked, limit = (resources.get(side, {}).get(what) for side in ("requests", "limits"))
        if asked is None or asked != limit:
            yield f"{what}: request {asked}, limit {limit}"
    if m.pod.get("initContainers"):
        yield "an init container would have to be sized as well"


def one_core_for_the_master(m: Manifests) -> Iterator[str]:
    """A publication must not throttle the workers (docs/capacity.md)."""
    if m.workers + 1 > m.cpu_limit:
        yield f"{m.workers} workers and the master on {m.cpu_limit:g} CPUs"


def memory_for_the_catalogue(m: Manifests) -> Iterator[str]:
    """The limit is that of the capacity command for as many workers, and the snapshots fit on their volume."""
    figures = load_figures()
    # For the load that these workers are planned for, the plan has the same number of workers.
    rate = figures.worker_rate * (1 - RIGHT_SIZED.margin) * m.workers * (RIGHT_SIZED.replicas - 1)
    plan = answer(Demand(rate, RIGHT_SIZED.definitions, RIGHT_SIZED.definition_octets, 3, 1000, 0.4), figures)
    limit = octets(m.container["resources"]["limits"]["memory"]) / 2**20
    if limit < plan.memory_limit_mb:
        yield f"limit {limit:g} MiB, capacity says {plan.memory_limit_mb}"
    volume = m.mounted(m.environment.get("SNAPSHOT_DIR", "/"))
    if volume is None or "emptyDir" not in volume or volume["mount"].get("readOnly"):
        yield "SNAPSHOT_DIR is not on a separate, writable volume"
    elif octets(volume["emptyDir"].get("sizeLimit", "0")) < 4 * plan.snapshot_mb * 2**20:
        yield "the volume of SNAPSHOT_DIR has no room for four snapshots (new and old one are there at the same time)"
    elif volume["emptyDir"].get("medium") == "Memory":
        yield "the volume of SNAPSHOT_DIR counts as memory of the pod"


def native_probes(m: Manifests) -> Iterator[str]:
    """All probes use the kubelet's gRPC, on the port of the server; only readiness depends on the catalogue."""
    wanted = dict(zip(PROBES, (LIVENESS, LIVENESS, SERVICE), strict=True))
    for name, service in wanted.items():
        probe = m.container.get(name, {}).get("grpc", {})
        if probe.get("port") != setting(m, "PORT"):
            yield f"{name} is not gRPC on PORT: {probe}"
        if probe.get("service") != service:
            yield f"{name} asks for {probe.get('service')!r}, not {service!r}"


def ports_of_the_server(m: Manifests) -> Iterator[str]:
    """All names and numbers of ports are those that the server listens on."""
    for name, variable in (("grpc", "PORT"), ("metrics", "METRICS_PORT")):
        if m.port(name) != setting(m, variable):
            yield f"container port {name}: {m.port(name)}, {variable} is {setting(m, variable):g}"
    for port in m.one("Service")["spec"]["ports"]:
        if m.port(port["targetPort"]) != port["port"]:
            yield f"service port {port['name']} leads to {port['targetPort']}"


def supervisor_first(m: Manifests) -> Iterator[str]:
    """The master replaces a worker before the kubelet restarts the container with all workers."""

    def patience(name: str) -> float:
        probe = m.container[name]
        return float(probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3))

    if patience("startupProbe") <= setting(m, "START_TIMEOUT_SECONDS"):
        yield f"startup: {patience('startupProbe'):g} s"
    if patience("livenessProbe") < 3 * setting(m, "HEARTBEAT_TIMEOUT_SECONDS"):
        yield f"liveness: {patience('livenessProbe'):g} s"


def time_to_drain(m: Manifests) -> Iterator[str]:
    """The server answers calls in flight and exits before the kubelet kills it. The server itself waits, so there is no
    preStop."""
    longest = setting(m, "DRAIN_TIMEOUT_SECONDS") + _EXIT_MARGIN_SECONDS
    if m.pod.get("terminationGracePeriodSeconds", 30) <= longest:
        yield f"grace period {m.pod.get('terminationGracePeriodSeconds', 30)} s, a drain takes up to {longest:g} s"
    if "preStop" in m.container.get("lifecycle", {}):
        yield "preStop takes from the grace period what the drain needs"


def rollout_without_a_gap(m: Manifests) -> Iterator[str]:
    """A successor is ready before a predecessor leaves."""
    strategy = m.deployment.get("strategy", {})
    rolling = strategy.get("rollingUpdate", {})
    if strategy.get("type") != "RollingUpdate" or rolling.get("maxUnavailable") != 0:
        yield f"maxUnavailable is not 0: {strategy}"
    if rolling.get("maxSurge") != 1:
        yield f"maxSurge is not 1: {rolling.get('maxSurge')}"
    if not m.deployment.get("minReadySeconds"):
        yield "a successor that fails at once counts as ready"
    if not m.selects_pods(m.deployment["selector"]["matchLabels"]):
        yield "the Deployment does not select its pods"


def disruption_budget(m: Manifests) -> Iterator[str]:
    """Node drains evict one pod at a time, and are not delayed by a pod that is not ready."""
    spec = m.one("PodDisruptionBudget")["spec"]
    if spec.get("maxUnavailable") != 1 or "minAvailable" in spec:
        yield "not exactly one pod at a time"
    if not m.selects_pods(spec.get("selector", {}).get("matchLabels", {})):
        yield "it does not select the pods"
    if spec.get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
        yield "a pod that is not ready delays a drain"


def spread_over_the_cluster(m: Manifests) -> Iterator[str]:
    """Two replicas never share a node while another node is free, and replicas are spread evenly over zones if
    possible."""
    wanted = {"kubernetes.io/hostname": "DoNotSchedule", "topology.kubernetes.io/zone": "ScheduleAnyway"}
    found = {each["topologyKey"]: each for each in m.pod.get("topologySpreadConstraints", ())}
    for key, rule in wanted.items():
        each = found.get(key, {})
        if each.get("maxSkew") != 1 or each.get("whenUnsatisfiable") != rule:
            yield f"{key}: not spread ({rule})"
        elif not m.selects_pods(each["labelSelector"]["matchLabels"]):
            yield f"{key}: does not count these pods"
        elif each.get("nodeTaintsPolicy") != "Honor":
            yield f"{key}: a cordoned node forbids the others"
        elif "pod-template-hash" not in each.get("matchLabelKeys", ()):
            yield f"{key}: pods of the last rollout count"


def autoscaled(m: Manifests) -> Iterator[str]:
    """Scaling follows CPU, at a share that these workers can reach, and there are enough replicas to lose one."""
    spec = m.one("HorizontalPodAutoscaler")["spec"]
    name = m.one("Deployment")["metadata"]["name"]
    if spec["scaleTargetRef"] != {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}:
        yield "it scales something else"
    if "replicas" in m.deployment:
        yield "the Deployment's replicas would overwrite it with every apply"
    if spec["minReplicas"] < RIGHT_SIZED.replicas or spec["maxReplicas"] <= spec["minReplicas"]:
        yield f"{spec['minReplicas']} to {spec['maxReplicas']} replicas"
    if [metric["resource"]["name"] for metric in spec["metrics"]] != ["cpu"]:
        yield "not by CPU alone"
    used = spec["metrics"][0]["resource"]["target"]["averageUtilization"] / 100 * m.cpu_limit
    if not 0.5 * m.workers <= used <= BUSY * m.workers + 1e-9:
        yield f"it waits for {used:g} cores of {m.workers} workers"


def closed_network(m: Manifests) -> Iterator[str]:
    """Only labelled clients may reach gRPC, and Prometheus the metrics. The pods may reach only DNS and PostgreSQL."""
    spec = m.one("NetworkPolicy")["spec"]
    if not m.selects_pods(spec["podSelector"].get("matchLabels", {})):
        yield "it does not select the pods"
    if set(spec.get("policyTypes", ())) != {"Ingress", "Egress"}:
        yield f"only {spec.get('policyTypes')} is closed"
    monitoring, dns = "monitoring", "kube-system"

    def namespace(name: str) -> Object:
        return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}

    clients = {
        "namespaceSelector": {},
        "podSelector": {"matchLabels": {f"{NAME}/client": "true"}},
    }
    allowed = {
        "ingress": [("from", [clients], {("TCP", "grpc")}), ("from", [namespace(monitoring)], {("TCP", "metrics")})],
        "egress": [
            ("to", [namespace(dns) | {"podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}}],
             {("UDP", 53), ("TCP", 53)}),
            ("to", [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "postgresql"}}}], {("TCP", 5432)}),
        ],
    }  # fmt: skip
    for direction, rules in allowed.items():
        found = [
            (side, rule.get(side), {(port.get("protocol"), port.get("port")) for port in rule.get("ports", ())})
            for rule, (side, _, _) in zip(spec.get(direction, ()), rules, strict=False)
        ]
        if found != rules or len(spec.get(direction, ())) != len(rules):
            yield f"{direction}: {spec.get(direction)}"


def secrets_by_file(m: Manifests) -> Iterator[str]:
    """No secret is a variable or stands in the manifests, and the files of secrets are updated with the Secret."""
    if any(each["kind"] == "Secret" for each in m.objects):
        yield "a Secret is among the manifests"
    for each in m.container.get("env", ()):
        if "secretKeyRef" in each.get("valueFrom", {}):
            yield f"{each['name']} is a secret in a variable"
    if any("secretRef" in source for source in m.container.get("envFrom", ())):
        yield "envFrom a Secret"
    for name in sorted(_SECRETS):
        if name in m.environment:
            yield f"{name} is a secret in a variable"
    for name in sorted({f"{name}_FILE" for name in _SECRETS if _FIELDS[name].is_required()} - m.environment.keys()):
        yield f"{name} is missing"
    if not m.environment.keys() & {"API_KEY_FILE", "API_KEYS_FILE"}:
        yield "API_KEY_FILE is missing"
    for name in sorted(m.environment.keys() & {f"{name}_FILE" for name in _SECRETS}):
        volume = m.mounted(m.environment[name])
        if volume is None or "secret" not in volume:
            yield f"{name} is not on the volume of a Secret"
        elif "subPath" in volume["mount"]:
            yield f"{name}: kubelet does not renew a subPath"
        elif volume["secret"].get("defaultMode", 0o644) & 0o007:
            yield f"{name}: everybody may read the file"


def known_environment(m: Manifests) -> Iterator[str]:
    """Every variable is one that the server reads."""
    for name in sorted(m.environment.keys() - KNOWN):
        yield f"the server does not know {name}"
    if m.pod.get("enableServiceLinks", True):
        yield "variables named after Services are added to the settings"


def restricted(m: Manifests) -> Iterator[str]:
    """The pods obey the strictest Pod Security Standard, and have a read-only root, no token and no capability."""
    pod, own = m.pod.get("securityContext", {}), m.container.get("securityContext", {})
    wanted = {
        "runAsNonRoot": (pod.get("runAsNonRoot"), True),
        "seccompProfile": (pod.get("seccompProfile"), {"type": "RuntimeDefault"}),
        "allowPrivilegeEscalation": (own.get("allowPrivilegeEscalation"), False),
        "readOnlyRootFilesystem": (own.get("readOnlyRootFilesystem"), True),
        "capabilities": (own.get("capabilities"), {"drop": ["ALL"]}),
        "automountServiceAccountToken": (m.pod.get("automountServiceAccountToken"), False),
    }
    for what, (found, right) in wanted.items():
        if found != right:
            yield f"{what} is {found}"
    if not pod.get("runAsUser") or pod.get("fsGroup") != pod.get("runAsUser"):
        yield "no number for the user, or files of another group"
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if m.pod.get(field):
            yield field
    if any("hostPath" in volume for volume in m.pod["volumes"]):
        yield "hostPath"
    labels = m.one("Namespace")["metadata"]["labels"]
    if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
        yield "the namespace does not enforce it"


def every_pod_has_an_address(m: Manifests) -> Iterator[str]:
    """There is a headless service over ready pods, for clients that balance."""
    spec = m.one("Service")["spec"]
    if spec.get("clusterIP") != "None":
        yield "not headless"
    if not m.selects_pods(spec.get("selector", {})):
        yield "it does not select the pods"
    if spec.get("publishNotReadyAddresses"):
        yield "pods that do not serve are found"


def scraped(m: Manifests) -> Iterator[str]:
    """The ServiceMonitor finds the service, its port and the path."""
    spec, service = m.one("ServiceMonitor")["spec"], m.one("Service")
    if not spec["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items():
        yield "it does not select the service"
    ports = {port["name"] for port in service["spec"]["ports"]}
    for endpoint in spec["endpoints"]:
        if endpoint["port"] not in ports or endpoint["port"] != "metrics" or endpoint.get("path") != "/metrics":
            yield f"nothing is scraped at {endpoint}"


def one_namespace(m: Manifests) -> Iterator[str]:
    """All objects are in the namespace of the manifests."""
    name = m.one("Namespace")["metadata"]["name"]
    for each in m.objects:
        if each["kind"] != "Namespace" and each["metadata"].get("namespace") != name:
            yield f"{each['kind']} lies in {each['metadata'].get('namespace')}"


def long_lived_connections(m: Manifests) -> Iterator[str]:
    """Clients reconnect often enough for new pods to get load, and dead clients are noticed before a NAT entry
    expires.
    """
    age, ping = setting(m, "MAX_CONNECTION_AGE_SECONDS"), setting(m, "KEEPALIVE_TIME_SECONDS")
    if not 0 < age <= 900:
        yield f"connections live for {age:g} s"
    if ping >= 240:
        yield f"silence is noticed after {ping:g} s, when a load balancer may have forgotten the connection"


PROMISES: tuple[Promise, ...] = (
    guaranteed,
    one_core_for_the_master,
    memory_for_the_catalogue,
    native_probes,
    ports_of_the_server,
    supervisor_first,
    time_to_drain,
    rollout_without_a_gap,
    disruption_budget,
    spread_over_the_cluster,
    autoscaled,
    closed_network,
    secrets_by_file,
    known_environment,
    restricted,
    every_pod_has_an_address,
    scraped,
    one_namespace,
    long_lived_connections,
)
