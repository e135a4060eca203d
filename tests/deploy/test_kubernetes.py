"""The manifests are valid and keep every promise, and the test of each promise can fail."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from deploy.prometheus import prometheus_rule
from tests.deploy import promises
from tests.deploy.conftest import OVERLAYS
from tests.deploy.manifests import Manifests, Object, octets
from tests.deploy.promises import PROMISES, Promise
from tests.deploy.tools import KUBERNETES, render, service_monitor_schema
from tests.judges.tools import may_build

from definition_server import __version__
from definition_server.cli.sizing import answer, load_figures
from definition_server.control_plane.publication_policy import parse
from definition_server.control_plane.wishes import Policy

pytestmark = may_build

ROOT = KUBERNETES.parents[1]
RELEASES = ("1.30", "1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
"""Kubernetes releases that the manifests are valid for."""
COMPONENTS = tuple(sorted(path.name for path in (KUBERNETES / "components").iterdir()))


CUSTOM = ("ServiceMonitor", "PrometheusRule")
"""Kinds of the Prometheus operator."""


def with_components(tmp_path: Path, *names: str) -> Manifests:
    """The overlay ``guide`` with more components, like an operator's own overlay."""
    relative = Path("../" * len(tmp_path.resolve().parts)) / KUBERNETES.relative_to("/")
    told = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [str(relative / "overlays/guide")],
        "components": [str(relative / "components" / name) for name in names],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")
    return Manifests(render(tmp_path))


def closed(schema: Object) -> Object:
    """``schema`` changed so that an unknown field is an error, as in kubectl's strict validation."""
    result = {key: closed(value) if isinstance(value, dict) else value for key, value in schema.items()}
    if "properties" in schema and "additionalProperties" not in schema:
        result["additionalProperties"] = False
    return result


def judge(manifests: Manifests) -> list[str]:
    """All violations of promises."""
    return [f"{promise.__name__}: {told}" for promise in PROMISES for told in promise(manifests)]


# -- schemas -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES)
def test_every_object_is_valid(manifests: Manifests, release: str) -> None:
    for each in manifests.objects:
        if each["kind"] not in CUSTOM:
            kubernetes_validate.validate(each, release, strict=True)


def test_the_page_names_the_releases() -> None:
    page = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")
    assert f"Kubernetes {RELEASES[0]} to {RELEASES[-1]}" in " ".join(page.split())


def test_a_field_that_kubernetes_does_not_know_is_detected(guide: Manifests) -> None:
    guide.container["readinessProbe"]["grpc"]["tls"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(guide.one("Deployment"), RELEASES[0], strict=True)


def test_the_service_monitor_is_valid_for_the_operator(manifests: Manifests) -> None:
    monitor = manifests.one("ServiceMonitor")
    # The API server checks metadata itself; the schema of a custom kind only states that it is an object.
    schema = closed(service_monitor_schema())
    schema["properties"]["metadata"].pop("additionalProperties", None)
    jsonschema.validate(monitor, schema)
    for broken in ({"endpoints": [{"prt": "metrics"}]}, {"endpoints": [{"interval": "15"}]}, {"selectors": {}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(monitor | {"spec": monitor["spec"] | broken}, schema)


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_renders_to_valid_objects(component: str, tmp_path: Path) -> None:
    # The overlays already have service-monitor; an operator must not add it twice.
    names = () if component == "service-monitor" else (component,)
    for each in with_components(tmp_path, *names).objects:
        if each["kind"] not in CUSTOM:
            kubernetes_validate.validate(each, RELEASES[0], strict=True)


# -- promises ----------------------------------------------------------------------------------------------------------


def test_every_promise_is_kept(manifests: Manifests) -> None:
    assert judge(manifests) == []


Breaking = Callable[[Manifests], object]


def container(**fields: object) -> Breaking:
    """Change fields of the container."""
    return lambda m: m.container.update(fields)


def pod(**fields: object) -> Breaking:
    """Change fields of the pod."""
    return lambda m: m.pod.update(fields)


def spec(kind: str, **fields: object) -> Breaking:
    """Change fields of an object's ``spec``."""
    return lambda m: m.one(kind)["spec"].update(fields)


def environment(**variables: str) -> Breaking:
    """Change variables of the ConfigMap."""
    return lambda m: m.one("ConfigMap")["data"].update(variables)


def probe(name: str, **fields: object) -> Breaking:
    """Change fields of a probe."""
    return lambda m: m.container[name].update(fields)


def label(**fields: str) -> Breaking:
    """Change the labels that selectors match."""
    return lambda m: m.pod_labels.update({"app.kubernetes.io/name": fields["name"]})


BREAKINGS: list[tuple[Promise, Breaking]] = [
    (promises.guaranteed, lambda m: m.container["resources"]["requests"].update(cpu="1")),
    (promises.guaranteed, lambda m: m.container["resources"]["limits"].pop("memory")),
    (promises.guaranteed, pod(initContainers=[{"name": "wait"}])),
    (promises.one_core_for_the_master, environment(WORKERS="4")),
    (promises.one_core_for_the_master, lambda m: m.one("ConfigMap")["data"].pop("WORKERS")),
    (promises.memory_for_the_catalogue, lambda m: m.container["resources"]["limits"].update(memory="768Mi")),
    (promises.memory_for_the_catalogue, environment(SNAPSHOT_DIR="/elsewhere")),
    (promises.memory_for_the_catalogue, lambda m: m.pod["volumes"][1]["emptyDir"].update(sizeLimit="256Mi")),
    (promises.memory_for_the_catalogue, lambda m: m.pod["volumes"][1]["emptyDir"].update(medium="Memory")),
    (promises.native_probes, probe("readinessProbe", grpc={"port": 50051, "service": "liveness"})),
    (promises.native_probes, probe("livenessProbe", grpc={"port": 50051, "service": "avap.DefinitionEngine"})),
    (promises.native_probes, probe("startupProbe", grpc={"port": 50051})),
    (promises.native_probes, environment(PORT="50052")),
    (promises.ports_of_the_server, environment(METRICS_PORT="9100")),
    (promises.ports_of_the_server, lambda m: m.one("Service")["spec"]["ports"][0].update(targetPort="grcp")),
    (promises.supervisor_first, probe("startupProbe", failureThreshold=30)),
    (promises.supervisor_first, probe("livenessProbe", failureThreshold=1)),
    (promises.supervisor_first, environment(START_TIMEOUT_SECONDS="300")),
    (promises.time_to_drain, pod(terminationGracePeriodSeconds=30)),
    (promises.time_to_drain, environment(DRAIN_TIMEOUT_SECONDS="60")),
    (promises.time_to_drain, container(lifecycle={"preStop": {"sleep": {"seconds": 10}}})),
    (promises.rollout_without_a_gap, lambda m: m.deployment["strategy"]["rollingUpdate"].update(maxUnavailable=1)),
    (promises.rollout_without_a_gap, lambda m: m.deployment["strategy"]["rollingUpdate"].update(maxSurge="100%")),
    (promises.rollout_without_a_gap, lambda m: m.deployment.pop("minReadySeconds")),
    (promises.rollout_without_a_gap, label(name="other")),
    (promises.disruption_budget, spec("PodDisruptionBudget", maxUnavailable=2)),
    (promises.disruption_budget, spec("PodDisruptionBudget", selector={})),
    (promises.disruption_budget, lambda m: m.one("PodDisruptionBudget")["spec"].pop("unhealthyPodEvictionPolicy")),
    (promises.spread_over_the_cluster, lambda m: m.pod["topologySpreadConstraints"].pop(0)),
    (promises.spread_over_the_cluster, lambda m: m.pod["topologySpreadConstraints"][0].pop("nodeTaintsPolicy")),
    (promises.spread_over_the_cluster, lambda m: m.pod["topologySpreadConstraints"][1].pop("matchLabelKeys")),
    (promises.spread_over_the_cluster, label(name="other")),
    (promises.autoscaled, spec("Deployment", replicas=3)),
    (promises.autoscaled, spec("HorizontalPodAutoscaler", minReplicas=1)),
    (promises.autoscaled, lambda m: m.one("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"].update(name="other")),
    (
        promises.autoscaled,
        lambda m: m.one("HorizontalPodAutoscaler")["spec"]["metrics"][0]["resource"]["target"].update(
            averageUtilization=80
        ),
    ),
    (promises.closed_network, spec("NetworkPolicy", policyTypes=["Ingress"])),
    (promises.closed_network, lambda m: m.one("NetworkPolicy")["spec"]["ingress"].append({})),
    (promises.closed_network, lambda m: m.one("NetworkPolicy")["spec"]["ingress"][0].pop("from")),
    (promises.closed_network, lambda m: m.one("NetworkPolicy")["spec"]["egress"][1].pop("to")),
    (
        # This is the effect of kustomize's includeSelectors on a peer.
        promises.closed_network,
        lambda m: m.one("NetworkPolicy")["spec"]["egress"][0]["to"][0]["podSelector"]["matchLabels"].update(
            {"app.kubernetes.io/name": "definition-server"}
        ),
    ),
    (promises.secrets_by_file, lambda m: m.objects.append({"kind": "Secret", "metadata": {"namespace": "avap"}})),
    (promises.secrets_by_file, environment(API_KEY="letmein")),
    (
        promises.secrets_by_file,
        container(env=[{"name": "API_KEY", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}]),
    ),
    (promises.secrets_by_file, lambda m: m.container["volumeMounts"][0].update(subPath="api-key")),
    (promises.secrets_by_file, lambda m: m.pod["volumes"][0]["secret"].update(defaultMode=0o444)),
    (promises.secrets_by_file, environment(DATABASE_URL_FILE="/etc/database-url")),
    (promises.secrets_by_file, lambda m: m.one("ConfigMap")["data"].pop("API_KEY_FILE")),
    (promises.known_environment, environment(SYNC_INTERVAL="30")),
    (promises.known_environment, pod(enableServiceLinks=True)),
    (promises.restricted, lambda m: m.container["securityContext"].update(readOnlyRootFilesystem=False)),
    (promises.restricted, lambda m: m.container["securityContext"].pop("capabilities")),
    (promises.restricted, lambda m: m.pod["securityContext"].pop("runAsNonRoot")),
    (promises.restricted, lambda m: m.pod.pop("automountServiceAccountToken")),
    (promises.restricted, pod(hostNetwork=True)),
    (promises.restricted, lambda m: m.pod["volumes"].append({"name": "host", "hostPath": {"path": "/"}})),
    (promises.restricted, lambda m: m.one("Namespace")["metadata"].update(labels={})),
    (promises.every_pod_has_an_address, spec("Service", clusterIP="")),
    (promises.every_pod_has_an_address, spec("Service", publishNotReadyAddresses=True)),
    (promises.every_pod_has_an_address, label(name="other")),
    (promises.scraped, lambda m: m.one("Service")["metadata"]["labels"].clear()),
    (promises.scraped, lambda m: m.one("ServiceMonitor")["spec"]["endpoints"][0].update(port="grpc")),
    (promises.one_namespace, lambda m: m.one("Service")["metadata"].pop("namespace")),
    (promises.long_lived_connections, environment(MAX_CONNECTION_AGE_SECONDS="0")),
    (promises.long_lived_connections, lambda m: m.one("ConfigMap")["data"].pop("KEEPALIVE_TIME_SECONDS")),
]


@pytest.mark.parametrize(("promise", "breaking"), BREAKINGS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_promise_is_reported(guide: Manifests, promise: Promise, breaking: Breaking) -> None:
    breaking(guide)
    assert list(promise(guide)), promise.__doc__


def test_every_promise_is_broken_by_a_case_of_the_test() -> None:
    assert {promise for promise, _ in BREAKINGS} == set(PROMISES)


# -- overlays and components -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", ["right-sized"])
def test_the_right_sized_overlay_has_the_resources_that_the_capacity_command_plans(manifests: Manifests) -> None:
    plan = answer(promises.RIGHT_SIZED, load_figures())
    limits = manifests.container["resources"]["limits"]
    assert manifests.workers == plan.workers
    assert math.isclose(manifests.cpu_limit, plan.cpu_limit)
    # A new measurement may change the memory a little; a quarter too much is not "right-sized" any more.
    assert plan.memory_limit_mb <= octets(limits["memory"]) / 2**20 <= 1.25 * plan.memory_limit_mb


@pytest.mark.parametrize("overlay", ["guide"])
def test_the_guide_overlay_has_four_cpus_and_five_gibibytes(manifests: Manifests) -> None:
    assert (manifests.cpu_limit, octets(manifests.container["resources"]["limits"]["memory"])) == (4, 5 * 2**30)


@pytest.mark.parametrize("overlay", ["guide"])
def test_three_workers_of_the_guide_carry_the_rate_of_the_guide(manifests: Manifests) -> None:
    """35,000 calls a second on one pod: the share of each of its workers, with the margin of `capacity`."""
    share = 35_000 / manifests.workers
    assert share <= load_figures().worker_rate * (1 - promises.RIGHT_SIZED.margin)


def test_the_image_has_the_tag_of_this_version(manifests: Manifests) -> None:
    assert manifests.container["image"] == f"definition-server:{__version__}"


def test_an_image_that_is_built_as_documented_is_labelled_with_this_version() -> None:
    assert f"\nARG VERSION={__version__}\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_the_pod_runs_as_the_user_of_the_image_in_its_own_group(manifests: Manifests) -> None:
    """The image's USER has group 0, for OpenShift; the pod runs in the account's own group."""
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    account = re.search(r"'avap:x:(\d+):(\d+):", image)
    assert account
    assert f"\nUSER {account[1]}:0\n" in image
    context = manifests.pod["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"]) == (int(account[1]), int(account[2]))


def test_a_changed_setting_causes_a_rollout(tmp_path: Path, guide: Manifests) -> None:
    changed = with_components(tmp_path, "signing")
    assert changed.container["envFrom"] != guide.container["envFrom"]


def test_the_signing_component_keeps_every_promise(tmp_path: Path) -> None:
    signing = with_components(tmp_path, "signing")
    assert judge(signing) == []
    assert signing.mounted(signing.environment["AVAP_INTERNAL_KEY_FILE"]) is not None


def test_with_tls_no_probe_speaks_cleartext_grpc_to_the_tls_port(tmp_path: Path) -> None:
    tls = with_components(tmp_path, "tls")
    broken = {told.partition(":")[0] for told in judge(tls)}
    assert broken == {"native_probes"}
    paths = {name: tls.container[name]["httpGet"] for name in promises.PROBES}
    assert {each["path"] for each in paths.values()} == {"/livez", "/readyz"}
    assert paths["readinessProbe"]["path"] == "/readyz"
    assert {tls.port(each["port"]) for each in paths.values()} == {tls.port("metrics")}
    assert not any("grpc" in tls.container[name] for name in promises.PROBES)
    for variable in ("TLS_CERT_FILE", "TLS_KEY_FILE"):
        volume = tls.mounted(tls.environment[variable])
        assert volume is not None
        assert volume["secret"]["secretName"] == "definition-server-tls"


def test_the_rules_of_the_operator_are_the_output_of_their_source(tmp_path: Path) -> None:
    assert prometheus_rule.OUTPUT.read_text(encoding="utf-8") == prometheus_rule.build(), (
        "stale: run python deploy/prometheus/prometheus_rule.py"
    )
    rule = with_components(tmp_path, "prometheus-rule").one("PrometheusRule")
    files = sorted((ROOT / "deploy/prometheus/rules").glob("*.yml"))
    assert rule["spec"]["groups"] == [
        group for file in files for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]
    ]
    assert rule["metadata"]["namespace"] == "avap"


def test_the_dashboard_is_a_configmap_that_the_sidecar_of_grafana_finds(tmp_path: Path) -> None:
    changed = with_components(tmp_path, "grafana-dashboard")
    assert judge(changed) == []
    (found,) = (each for each in changed.objects if each["metadata"]["name"] == "definition-server-dashboard")
    assert found["metadata"]["labels"] == {"grafana_dashboard": "1"}
    written = (ROOT / "deploy/grafana/definition-server.json").read_text(encoding="utf-8")
    assert found["data"] == {"definition-server.json": written}


def test_every_overlay_is_tested() -> None:
    assert set(OVERLAYS) == {"avap-engine", "guide", "right-sized"}


@pytest.mark.parametrize("overlay", ["avap-engine"])
def test_the_overlay_avap_engine_differs_from_the_guide_only_in_the_name_of_the_deployment(
    manifests: Manifests, guide: Manifests
) -> None:
    """`kubectl rollout restart deployment avap-engine` must find the deployment."""
    assert manifests.one("Deployment")["metadata"]["name"] == "avap-engine"
    guide.one("Deployment")["metadata"]["name"] = "avap-engine"
    guide.one("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["name"] = "avap-engine"
    assert manifests.objects == guide.objects
    page = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")
    assert "rollout restart deployment avap-engine" in page


def test_the_policy_is_mounted_as_a_directory_under_the_name_that_the_setting_has(tmp_path: Path) -> None:
    changed = with_components(tmp_path, "publication-policy")
    assert judge(changed) == []
    [mount] = [each for each in changed.container["volumeMounts"] if each["name"] == "policy"]
    assert "subPath" not in mount  # the kubelet does not update files mounted by subPath
    assert changed.environment["PUBLICATION_POLICY"] == f"{mount['mountPath']}/policy.toml"
    [volume] = [each for each in changed.pod["volumes"] if each["name"] == "policy"]
    [policy] = [
        each["data"]["policy.toml"]
        for each in changed.objects
        if each["kind"] == "ConfigMap" and each["metadata"]["name"] == volume["configMap"]["name"]
    ]
    assert parse(policy.encode()) == Policy()
