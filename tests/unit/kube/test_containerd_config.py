"""containerd's configuration: Remora's runtime goes in, nothing else changes, and it comes out again byte for byte."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora.errors import FailedPreconditionError
from remora.kube import containerd_config as config

PATH = "/etc/containerd/config.toml"
SETTINGS = "/etc/remora/runtime.toml"
DEBIAN = """\
version = 2

[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    [plugins."io.containerd.grpc.v1.cri".cni]
      bin_dir = "/usr/lib/cni"   # Debian's place
  [plugins."io.containerd.internal.v1.opt"]
    path = "/var/lib/containerd/opt"
"""
WITH_RUNC = """\
version = 3
[plugins.'io.containerd.cri.v1.runtime'.containerd]
  default_runtime_name = 'runc'
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = 'io.containerd.runc.v2'
"""
IMPORTS = "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n"


def runtimes(text: str, plugin: str) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = tomllib.loads(text)["plugins"][plugin]["containerd"]["runtimes"]
    return found


@pytest.mark.parametrize("text", [DEBIAN, DEBIAN.rstrip("\n"), WITH_RUNC, config.new_file()])
def test_the_runtime_is_added_beside_what_is_there_and_taken_out_without_a_trace(text: str) -> None:
    added = config.add(text, PATH, SETTINGS)
    plugin = "io.containerd.cri.v1.runtime" if "version = 3" in text else "io.containerd.grpc.v1.cri"
    assert runtimes(added, plugin)["remora"]["runtime_type"] == "io.containerd.remora.v2"
    assert ("runc" in runtimes(added, plugin)) == ("runc" in text)
    assert added.startswith(text)
    assert config.remove(added) == text


def test_adding_twice_is_adding_once() -> None:
    added = config.add(DEBIAN, PATH, SETTINGS)
    assert config.add(added, PATH, SETTINGS) == added


def test_what_an_operator_writes_behind_our_block_stays() -> None:
    added = config.add(DEBIAN, PATH, SETTINGS) + "# mine\n"
    assert config.remove(added) == DEBIAN + "# mine\n"


def test_a_pod_cannot_say_what_the_kubelet_granted_it() -> None:
    runtime = runtimes(config.add(DEBIAN, PATH, SETTINGS), "io.containerd.grpc.v1.cri")["remora"]
    assert runtime["pod_annotations"] == ["io.remora.*"]
    assert "grant.remora.dev/*" in runtime["container_annotations"]  # type: ignore[operator]


def test_a_configuration_that_imports_a_directory_gets_a_file_there() -> None:
    assert config.drop_in_for(IMPORTS, PATH) == "/etc/containerd/conf.d/remora.toml"
    assert (
        config.drop_in_for("version = 3\nimports = ['conf.d/*.toml']\n", PATH) == "/etc/containerd/conf.d/remora.toml"
    )
    assert "remora" in runtimes(config.drop_in(IMPORTS, PATH, SETTINGS), "io.containerd.cri.v1.runtime")


@pytest.mark.parametrize(
    "text",
    [
        DEBIAN,
        WITH_RUNC,
        "version = 3\nimports = ['/etc/containerd/certs.toml']\n",
        # containerd 1.6 puts an imported file in the place of all that the main one says of the CRI plugin.
        "version = 2\nimports = ['/etc/containerd/conf.d/*.toml']\n",
    ],
)
def test_elsewhere_the_main_file_is_edited(text: str) -> None:
    assert config.drop_in_for(text, PATH) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("version = ", "no TOML"),
        ("[plugins]\n", "version 1"),
        ("version = 9\n", "version 9"),
        ("version = 2\ndisabled_plugins = ['cri']\n", "disables the CRI plugin"),
        ("version = 2\nplugins = {}\n", "takes no table behind it"),
        (WITH_RUNC.replace("runtimes.runc]", "runtimes.remora]"), "did not write"),
    ],
)
def test_what_is_not_understood_is_refused_with_what_to_do(text: str, says: str) -> None:
    with pytest.raises(FailedPreconditionError, match=says) as refused:
        config.add(text, PATH, SETTINGS)
    assert refused.value.fix


def test_a_block_without_its_end_is_left_alone() -> None:
    added = config.add(DEBIAN, PATH, SETTINGS)
    with pytest.raises(FailedPreconditionError, match="is gone"):
        config.remove(added.replace("# remora node install: end\n", ""))


@given(st.text(max_size=300))
def test_no_text_is_changed_in_meaning(text: str) -> None:
    whole = f"version = 2\n{text}"
    try:
        added = config.add(whole, PATH, SETTINGS)
    except FailedPreconditionError:
        return
    before, after = tomllib.loads(whole), tomllib.loads(added)
    assert {key: after[key] for key in before if key != "plugins"} == {
        k: v for k, v in before.items() if k != "plugins"
    }
    assert config.remove(added) == whole
