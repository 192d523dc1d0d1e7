"""What a node gets out of the agent's image."""

from __future__ import annotations

from pathlib import Path

from remora.kube import node_bundle
from remora.kube.node_bundle import Bundle
from remora.kube.node_files import Node


def test_a_program_that_the_image_has_in_bin_lies_beside_the_script_of_its_name(tmp_path: Path) -> None:
    image, host = tmp_path / "image", tmp_path / "host"
    for path, content in {"bin/ip": "ELF ip", "usr/bin/python3.11": "ELF python", "lib/ld.so": "ELF ld"}.items():
        (image / path).parent.mkdir(parents=True, exist_ok=True)
        (image / path).write_text(content)
    (image / "guest").mkdir()
    bundle = Bundle(
        id="1",
        trees=[],
        programs={"ip": "/bin/ip", "python3": "/usr/bin/python3.11"},
        linker="/lib/ld.so",
        libraries=["/lib"],
        source="/src",
        guest="/guest",
        guest_digest="0" * 64,
    )
    node_bundle.install(Node(host), bundle, image)
    home = host / "opt/remora/1"
    script = (home / "bin/ip").read_text()
    assert script.startswith("#!/bin/sh")
    assert "/opt/remora/1/libexec/ip" in script
    assert (home / "libexec/ip").read_text() == "ELF ip"
    assert (home / "libexec/python3.11").read_text() == "ELF python"
