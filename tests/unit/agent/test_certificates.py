"""What a certificate says about its holder, and which files an agent takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from authority import Authority
from remora.agent.certificates import CertificateFiles, of_certificate
from remora.errors import FailedPreconditionError, UnauthenticatedError


def certificate(*uris: str, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what `ssl` makes of a certificate."""
    return {
        "subject": tuple((("commonName", name),) for name in names),
        "subjectAltName": tuple(("URI", uri) for uri in uris),
    }


def test_the_spiffe_id_comes_before_the_common_name() -> None:
    assert of_certificate(certificate("spiffe://prod/ns/web", names=("x",))).tenant == "spiffe://prod/ns/web"
    assert of_certificate(certificate(names=("web",))).key == "cn:web"


@pytest.mark.parametrize(
    "given",
    [
        certificate(),
        certificate(names=("a", "b")),
        certificate(names=("../x",)),
        certificate(names=("uid:0",)),
        certificate(names=("a\0b",)),
        certificate(names=("spiffe://prod/ns/web",)),
        certificate("spiffe://a/b", "spiffe://a/c"),
        certificate("https://a/b", names=("web",)),
        certificate("spiffe://A/b"),
        certificate("spiffe://a"),
        certificate("spiffe://a/b\n"),
        certificate("spiffe://a/" + "b" * 600),
    ],
)
def test_a_certificate_that_names_nobody_or_several_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UnauthenticatedError):
        of_certificate(given)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    files = Authority(tmp_path / "ca").files()
    files.context()
    missing = tmp_path / "none.pem"
    with pytest.raises(FailedPreconditionError, match=r"none\.pem.*cannot be used"):
        CertificateFiles(missing, files.key, files.authorities).context()
    missing.write_text("nothing")
    with pytest.raises(FailedPreconditionError, match="at least one CA"):
        CertificateFiles(files.certificate, files.key, missing).context()
    _, other = Authority(tmp_path / "other").issue("other")
    with pytest.raises(FailedPreconditionError, match="belong together"):
        CertificateFiles(files.certificate, other, files.authorities).context()
    files.key.chmod(0o604)
    with pytest.raises(FailedPreconditionError, match="chmod o="):
        files.context()
