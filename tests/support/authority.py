"""A certificate authority for tests, by the openssl command."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from remora.agent.certificates import CertificateFiles


class Authority:
    """Issues certificates into a directory."""

    def __init__(self, directory: Path, name: str = "test authority") -> None:
        if shutil.which("openssl") is None:
            pytest.skip("the openssl command is missing: apt-get install openssl")
        self._directory = directory
        directory.mkdir(exist_ok=True)
        self.certificate = directory / "ca.pem"
        self._key = directory / "ca.key"
        self._run("req", "-x509", *self._new_key(self._key), "-subj", f"/CN={name}", "-out", str(self.certificate))

    @staticmethod
    def _run(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)

    @staticmethod
    def _new_key(path: Path) -> list[str]:
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(path), "-days", "2"]

    def issue(
        self, name: str, *, subject: str | None = None, alternative: str = "", days: int = 1
    ) -> tuple[Path, Path]:
        """Return a certificate and its key. `days` may be negative: it has expired."""
        certificate, key, request = (self._directory / f"{name}.{kind}" for kind in ("pem", "key", "csr"))
        subject = f"/CN={name}" if subject is None else subject
        self._run("req", "-new", *self._new_key(key)[:-2], "-subj", subject, "-out", str(request))
        extensions = self._directory / f"{name}.ext"
        extensions.write_text(f"subjectAltName={alternative}\n" if alternative else "basicConstraints=CA:FALSE\n")
        issuer = ["-CA", str(self.certificate), "-CAkey", str(self._key), "-CAcreateserial"]
        options = ["-days", str(days), "-extfile", str(extensions), "-out", str(certificate)]
        self._run("x509", "-req", "-in", str(request), *issuer, *options)
        key.chmod(0o600)
        return certificate, key

    def revoke(self, *names: str, days: int = 1) -> str:
        """Return a revocation list, PEM, of these certificates."""
        config, index, made = (self._directory / name for name in ("ca.cnf", "index.txt", "ca.crl"))
        index.write_text("")
        config.write_text(f"[ca]\ndefault_ca=own\n[own]\ndatabase={index}\ndefault_md=sha256\n")
        signer = ["-config", str(config), "-cert", str(self.certificate), "-keyfile", str(self._key)]
        for name in names:
            self._run("ca", *signer, "-revoke", str(self._directory / f"{name}.pem"))
        self._run("ca", *signer, "-gencrl", "-crlsec", str(days * 86400), "-out", str(made))
        return made.read_text()

    def files(self, name: str = "agent", alternative: str = "DNS:localhost,IP:127.0.0.1") -> CertificateFiles:
        """Return what an agent needs."""
        certificate, key = self.issue(name, alternative=alternative)
        return CertificateFiles(certificate, key, self.certificate)

    def query(self, name: str, **issue: str) -> str:
        """Return what follows a client's `tls://` address, with a certificate of its own."""
        certificate, key = self.issue(name, **issue)  # type: ignore[arg-type]  # texts alone are given
        return f"?ca={self.certificate}&cert={certificate}&key={key}"
