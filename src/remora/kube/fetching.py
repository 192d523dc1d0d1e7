"""GET over HTTP, on TLS or a Unix socket, for what Remora reads in a cluster: kube-apiserver's lists, agents' metrics.

The standard library's client: a request now and then needs no pool, and 2 MB are saved in every process that has it.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from remora.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)

#: Where Kubernetes puts what a pod needs to talk to it (kubernetes.io, Accessing the API from a Pod).
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT_S = 4.0
_MOST_BYTES = 32 << 20
#: Of a list the objects' names and labels alone: a twentieth of it (kubernetes.io, Kubernetes API Concepts).
_NAMES_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"
_MOST_PODS = "10000"


@dataclass(frozen=True, slots=True)
class Trust:
    """Whom a client believes over TLS, and what it shows itself: PEM files."""

    authorities: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    #: Whom to expect, where the address does not say; empty: the address' host.
    server_name: str = ""

    def context(self) -> ssl.SSLContext:
        """
        Raises:
            FailedPreconditionError: a file cannot be read; the message names it.
        """
        try:
            context = ssl.create_default_context(cafile=str(self.authorities) if self.authorities else None)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise FailedPreconditionError(
                f"{self.authorities or 'the host'}'s authorities and the certificate {self.certificate} cannot be "
                f"used: {error.strerror or error}",
                fix="give PEM files that belong together",
            ) from error
        return context


class _Connection(http.client.HTTPConnection):
    """A connection to a Unix socket, or to a host whose certificate has another name than its address."""

    def __init__(self, url: str, context: ssl.SSLContext | None, server_name: str) -> None:
        place = urlsplit(url)
        self._path = place.path if place.scheme == "unix" else ""
        super().__init__(place.hostname or "localhost", place.port or None, timeout=TIMEOUT_S)
        if place.scheme == "https" and place.port is None:
            self.port = 443
        self._context = context if place.scheme == "https" else None
        self._server_name = server_name

    def connect(self) -> None:
        if self._path:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(TIMEOUT_S)
            self.sock.connect(self._path)
            return
        super().connect()
        if self._context is not None:
            self.sock = self._context.wrap_socket(self.sock, server_hostname=self._server_name or self.host)


def check_url(url: str) -> str:
    """Return `url` if `get` can ask it.

    Raises:
        InvalidArgumentError: it is of another form.
    """
    try:
        place = urlsplit(url)
        good = bool(place.path) if place.scheme == "unix" else place.scheme in ("http", "https") and place.hostname
        place.port  # noqa: B018 - raises for what is no number
    except ValueError:
        good = False
    if not good:
        raise InvalidArgumentError(
            f"{url[:200]!r} is no address to ask", fix="write https://host:port, http://127.0.0.1:port or unix:///path"
        )
    return url


def get(
    url: str,
    path: str,
    *,
    context: ssl.SSLContext | None = None,
    server_name: str = "",
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """Return the body of an answer with status 200.

    Raises:
        UnavailableError: nobody answers, or with a server's error.
        PermissionDeniedError, NotFoundError: as the answer says.
    """
    connection = _Connection(url, context, server_name)
    try:
        connection.request("GET", path, headers=dict(headers or {}))
        answer = connection.getresponse()
        body = answer.read(_MOST_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(f"{url}{path[:200]} does not answer: {error}") from error
    finally:
        connection.close()
    if len(body) > _MOST_BYTES:
        raise UnavailableError(f"the answer of {url}{path[:200]} is larger than {_MOST_BYTES} bytes")
    if answer.status in (401, 403):
        raise PermissionDeniedError(f"{url}{path[:200]} is forbidden: {body[:300].decode(errors='replace')}")
    if answer.status == 404:
        raise NotFoundError(f"{url} has no {path[:200]}")
    if answer.status != 200:
        raise UnavailableError(f"{url}{path[:200]} answers {answer.status}: {body[:300].decode(errors='replace')}")
    return body


class KubernetesApi:
    """Reads kube-apiserver, as the service account of the pod unless told otherwise. Any thread."""

    def __init__(self, url: str = "", token: Path | None = None, authorities: Path | None = None) -> None:
        """
        Raises:
            FailedPreconditionError: nothing says where it is, or a file cannot be read.
        """
        if not url:
            host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
            if not host:
                raise FailedPreconditionError(
                    "this is not a pod of Kubernetes, and nothing says where kube-apiserver is",
                    fix="give --api URL with --api-token and --api-ca",
                )
            url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
        self._url = check_url(url)
        self._token = token or SERVICE_ACCOUNT / "token"
        found = authorities or SERVICE_ACCOUNT / "ca.crt"
        self._context = Trust(found).context() if url.startswith("https") else None

    def get(self, path: str, accept: str = "application/json", **parameters: str) -> Mapping[str, Any]:
        """Return a document. Raises as `get`, and FailedPreconditionError without a token."""
        try:
            token = self._token.read_text().strip()  # each time: the kubelet renews it
        except OSError as error:
            raise FailedPreconditionError(f"the token {self._token} cannot be read: {error.strerror}") from error
        query = f"?{urlencode(parameters)}" if parameters else ""
        headers = {"Authorization": f"Bearer {token}", "Accept": accept}
        body = get(self._url, path + query, context=self._context, headers=headers)
        try:
            document = json.loads(body)
        except ValueError as error:
            raise UnavailableError(f"{self._url}{path} answers what is no JSON") from error
        if not isinstance(document, dict):
            raise UnavailableError(f"{self._url}{path} answers what is no document")
        return document

    def pods(self, namespace: str, selector: str) -> list[str]:
        """Return the names of a namespace's pods that a label selector matches."""
        path = f"/api/v1/namespaces/{namespace}/pods"
        found = self.get(path, _NAMES_ONLY, labelSelector=selector, limit=_MOST_PODS)
        return [item["metadata"]["name"] for item in found.get("items") or ()]

    def endpoints(self, namespace: str, service: str) -> list[tuple[str, int]]:
        """Return addresses and ports behind a Service, ready or not: an agent that drains still counts."""
        path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        found = self.get(path, labelSelector=f"kubernetes.io/service-name={service}")
        places = set()
        for part in found.get("items") or ():
            for port in part.get("ports") or ():
                for endpoint in part.get("endpoints") or ():
                    places |= {(address, int(port["port"])) for address in endpoint.get("addresses") or ()}
        return sorted(places)

    def config_map(self, namespace: str, name: str) -> Mapping[str, str]:
        data = self.get(f"/api/v1/namespaces/{namespace}/configmaps/{name}").get("data") or {}
        return {str(key): str(value) for key, value in data.items()}
