"""The few answers of a kube-apiserver that an aggregated server asks for; no cluster is behind it."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN = "a-service-accounts-token"


class FakeKubeApiserver:
    """`with FakeKubeApiserver() as api:` on a loopback port; what it says is in its attributes."""

    def __init__(self) -> None:
        #: Pod name -> labels, all in one namespace.
        self.namespace = "prod"
        self.pods: dict[str, dict[str, str]] = {}
        self.authentication: dict[str, str] = {}
        self.agents: list[tuple[str, int]] = []
        self.broken = False
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, document = fake._answer(self.path, self.headers.get("Authorization", ""))
                body = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def token_file(self, directory: Path) -> Path:
        path = directory / "token"
        path.write_text(f"{TOKEN}\n")
        return path

    def _answer(self, target: str, authorization: str) -> tuple[int, Any]:
        place = urlsplit(target)
        selector = parse_qs(place.query).get("labelSelector", [""])[0]
        if authorization != f"Bearer {TOKEN}":
            return 401, {"kind": "Status", "message": "Unauthorized"}
        if self.broken:
            return 500, {"kind": "Status", "message": "etcd is away"}
        match place.path.strip("/").split("/"):
            case ["api", "v1", "namespaces", "kube-system", "configmaps", "extension-apiserver-authentication"]:
                return 200, {"kind": "ConfigMap", "data": self.authentication}
            case ["api", "v1", "namespaces", namespace, "pods"]:
                wanted = dict(part.split("=") for part in selector.split(",") if part)
                named = [name for name, labels in self.pods.items() if wanted.items() <= labels.items()]
                items = [{"metadata": {"name": name}} for name in named if namespace == self.namespace]
                return 200, {"kind": "PartialObjectMetadataList", "items": items}
            case ["apis", "discovery.k8s.io", "v1", "namespaces", "remora", "endpointslices"]:
                if selector != "kubernetes.io/service-name=agents":
                    return 200, {"items": []}
                slices = [{"ports": [{"port": port}], "endpoints": [{"addresses": [at]}]} for at, port in self.agents]
                return 200, {"kind": "EndpointSliceList", "items": slices}
        return 404, {"kind": "Status", "message": "not found"}

    def __enter__(self) -> FakeKubeApiserver:
        self._thread.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
