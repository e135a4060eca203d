"""Access to rendered manifests for the promises (`tests.deploy.promises`) and the tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]

_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "": 1}
NAME = "definition-server"


@dataclass(frozen=True, slots=True)
class Manifests:
    """The objects of one overlay; there is one object of each kind."""

    objects: list[Object]

    def one(self, kind: str) -> Object:
        """The object of that kind.

        Raises: AssertionError: there is not exactly one.
        """
        found = [each for each in self.objects if each["kind"] == kind]
        assert len(found) == 1, f"{len(found)} objects of kind {kind}"
        return found[0]

    @property
    def deployment(self) -> Object:
        """The ``spec`` of the object of that kind."""
        spec: Object = self.one("Deployment")["spec"]
        return spec

    @property
    def pod(self) -> Object:
        """``spec`` of the pods."""
        spec: Object = self.deployment["template"]["spec"]
        return spec

    @property
    def container(self) -> Object:
        """The only container."""
        assert len(self.pod["containers"]) == 1, "more than one container"
        container: Object = self.pod["containers"][0]
        return container

    @property
    def pod_labels(self) -> dict[str, str]:
        """The labels that selectors match."""
        labels: dict[str, str] = self.deployment["template"]["metadata"]["labels"]
        return labels

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the container, from ConfigMap and ``env``."""
        maps = {each["metadata"]["name"]: each.get("data", {}) for each in self.objects if each["kind"] == "ConfigMap"}
        merged: dict[str, str] = {}
        for source in self.container.get("envFrom", ()):
            if "configMapRef" in source:
                merged |= maps[source["configMapRef"]["name"]]
        return merged | {each["name"]: each.get("value", "") for each in self.container.get("env", ())}

    def port(self, name: str | int) -> int | None:
        """The container's port of that name; a number is returned as it is."""
        if isinstance(name, int):
            return name
        return next((p["containerPort"] for p in self.container["ports"] if p["name"] == name), None)

    def selects_pods(self, selector: dict[str, str]) -> bool:
        """Whether ``matchLabels`` matches these pods. The result is false for an empty selector, which matches all
        pods."""
        return bool(selector) and selector.items() <= self.pod_labels.items()

    def mounted(self, path: str) -> Object | None:
        """The volume that contains ``path``."""
        for mount in self.container.get("volumeMounts", ()):
            if path == mount["mountPath"] or path.startswith(mount["mountPath"] + "/"):
                return next(v for v in self.pod["volumes"] if v["name"] == mount["name"]) | {"mount": mount}
        return None

    @property
    def cpu_limit(self) -> float:
        """The CPU limit in cores."""
        return cores(self.container["resources"]["limits"]["cpu"])

    @property
    def workers(self) -> int:
        """The number of workers as the server determines it: ``WORKERS``, or the whole cores of the limit."""
        return int(self.environment.get("WORKERS") or int(self.cpu_limit))


def cores(quantity: str | int) -> float:
    """A Kubernetes quantity of CPU, in cores."""
    text = str(quantity)
    return int(text[:-1]) / 1000 if text.endswith("m") else float(text)


def octets(quantity: str | int) -> int:
    """A Kubernetes quantity of memory with a binary unit, in octets."""
    text = str(quantity)
    number = text.rstrip("KMGi")
    return int(number) * _UNITS[text[len(number) :]]
