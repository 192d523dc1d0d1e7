"""Pulling through skopeo from a registry that runs in this process."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from image_maker import Layout, describe, member, tar
from remora.errors import FailedPreconditionError, NotFoundError, RemoraError, UnavailableError
from remora.images.pull import pull_image
from remora.images.store import ImageStore

pytestmark = pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")


class _Registry(BaseHTTPRequestHandler):
    """The read side of the OCI distribution protocol over one layout."""

    layout: Path
    tag_digest: str
    media_type: str

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].split("/")
        if self.path == "/v2/":
            return self._send(b"{}", "application/json")
        digest = self.tag_digest if parts[-1] == "1.0" else parts[-1]
        blob = self.layout / "blobs/sha256" / digest.removeprefix("sha256:")
        if ":" not in digest or not blob.is_file():
            body = json.dumps({"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}).encode()
            return self._send(body, "application/json", 404)
        return self._send(blob.read_bytes(), self.media_type if "manifests" in parts else "application/octet-stream")

    do_HEAD = do_GET

    def _send(self, body: bytes, media_type: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Docker-Content-Digest", f"sha256:{hashlib.sha256(body).hexdigest()}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the tests speak for themselves."""


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    layout = Layout(tmp_path / "registry")
    layer = tar(member("hello", b"from a registry"))
    described = layout.image([layer], config={"Cmd": ["/hello"]})
    # skopeo insists on the layers' real media type when it copies
    manifest = json.loads((layout.path / "blobs/sha256" / str(described["digest"])[7:]).read_text())
    for entry in manifest["layers"]:
        entry["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip"
    final = layout.blob(json.dumps(manifest).encode(), str(described["mediaType"]))
    handler = type(
        "Handler",
        (_Registry,),
        {"layout": layout.path, "tag_digest": final["digest"], "media_type": described["mediaType"]},
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_an_image_comes_from_a_registry(tmp_path: Path, registry: str) -> None:
    store = ImageStore(tmp_path / "images")
    told: list[str] = []
    image = pull_image(
        store, f"{registry}/team/tool:1.0", tls_verify=False, progress=lambda step, done, total: told.append(step)
    )
    assert image.name == f"{registry}/team/tool:1.0"
    assert image.config.cmd == ("/hello",)
    assert describe(image.layers[0])["/hello"][4] == b"from a registry"
    assert any("Copying" in step for step in told)
    assert list(store.tmp_dir.iterdir()) == []


def test_an_image_that_is_not_there_is_named(tmp_path: Path, registry: str) -> None:
    store = ImageStore(tmp_path / "images")
    with pytest.raises(NotFoundError, match=r"cannot pull .*/team/tool:2.0: .*check the name and the tag"):
        pull_image(store, f"{registry}/team/tool:2.0", tls_verify=False)
    assert store.list() == []
    assert list(store.tmp_dir.iterdir()) == []


def test_a_registry_out_of_reach_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"cannot pull 127.0.0.1:1/x: .*remora image import"):
        pull_image(ImageStore(tmp_path / "images"), "127.0.0.1:1/x", tls_verify=False)


def test_a_missing_skopeo_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FailedPreconditionError, match=r"skopeo is not installed .*apt-get install skopeo"):
        pull_image(ImageStore(tmp_path / "images"), "tool")


def test_a_bad_name_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(RemoraError, match="no image name"):
        pull_image(ImageStore(tmp_path / "images"), "Not A Name")
