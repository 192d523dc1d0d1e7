"""Volumes of a pod as the kubelet lays them out: shared, copied, kept up to date, brought back, or refused by name."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cri_v1 as cri
from containerd_process import Containerd
from cri_client import Container, CriError, Pod
from kubelet_volumes import PodVolumes, mount

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def pod(containerd: Containerd) -> Iterator[Pod]:
    with containerd.cri.run_pod("volumes") as one:
        yield one


@pytest.fixture
def volumes(tmp_path: Path) -> Iterator[PodVolumes]:
    one = PodVolumes(tmp_path)
    yield one
    one.close()


def sleeper(pod: Pod, *mounts: cri.Mount, **config: object) -> Container:
    return pod.start("sleep", "1000000", mounts=mounts, **config)


def test_an_empty_dir_is_shared_by_two_containers_and_lives_with_the_pod(pod: Pod, volumes: PodVolumes) -> None:
    shared = volumes.empty_dir("shared")
    one, two = sleeper(pod, mount(shared, "/one")), sleeper(pod, mount(shared, "/two"))
    one.sh("echo hello > /one/file")
    assert two.sh("cat /two/file") == "hello\n"
    one.stop(0)
    one.remove()
    again = sleeper(pod, mount(shared, "/one"))
    assert again.sh("cat /one/file") == "hello\n"
    assert not list(shared.iterdir()), "nothing of it is on the host"


def test_an_empty_dir_in_memory_is_a_tmpfs(pod: Pod, volumes: PodVolumes) -> None:
    box = sleeper(pod, mount(volumes.empty_dir("quick", memory=True), "/quick"))
    assert "tmpfs" in box.sh("df -T /quick 2>/dev/null || mount | grep quick")


def test_a_group_owns_its_volume(pod: Pod, volumes: PodVolumes) -> None:
    user = cri.ContainerSecurity(run_as_user=cri.Int64Value(value=1000), supplemental_groups=[2000])
    box = sleeper(pod, mount(volumes.empty_dir("grouped", group=2000), "/grouped"), security=user)
    box.sh("touch /grouped/mine")
    assert box.sh("stat -c %g /grouped /grouped/mine") == "2000\n2000\n"


def test_a_config_map_change_is_seen_within_five_seconds_and_as_a_whole(pod: Pod, volumes: PodVolumes) -> None:
    config = volumes.atomic("configmap", "settings", {"colour": "blue", "gone": "x", "sub/deep": "1"})
    box = sleeper(pod, mount(config, "/etc/settings", readonly=True))
    assert box.sh("cat /etc/settings/colour /etc/settings/sub/deep") == "blue1"
    assert box.exec("sh", "-c", "echo x > /etc/settings/colour").exit_code != 0
    changed_s = time.monotonic()
    volumes.atomic("configmap", "settings", {"colour": "green", "new": "y", "sub/deep": "2"})
    while box.sh("cat /etc/settings/colour") != "green":
        assert time.monotonic() - changed_s < 5
        time.sleep(0.1)
    assert time.monotonic() - changed_s < 5
    assert box.sh("cat /etc/settings/new /etc/settings/sub/deep; ls /etc/settings") == "y2colour\nnew\nsub\n"
    assert box.sh("readlink /etc/settings/colour; ls -a /etc/settings | grep -c 2026") == "..data/colour\n1\n"


def test_a_secret_a_projected_token_and_the_downward_api(pod: Pod, volumes: PodVolumes) -> None:
    secret = volumes.atomic("secret", "password", {"password": "s3cret"})
    token = volumes.atomic("projected", "kube-api-access-x", {"token": "a.b.c", "namespace": "test"})
    labels = volumes.atomic("downward-api", "podinfo", {"labels": 'app="x"\n'})
    box = sleeper(
        pod,
        mount(secret, "/secret", readonly=True),
        mount(token, "/var/run/secrets/kubernetes.io/serviceaccount", readonly=True),
        mount(labels, "/podinfo", readonly=True),
    )
    assert box.sh("cat /secret/password /var/run/secrets/kubernetes.io/serviceaccount/token") == "s3creta.b.c"
    assert box.sh("cat /podinfo/labels") == 'app="x"\n'


def test_sub_paths_of_a_directory_and_of_a_config_map(pod: Pod, volumes: PodVolumes) -> None:
    data = volumes.empty_dir("data")
    (data / "inner").mkdir()
    config = volumes.atomic("configmap", "one-file", {"nginx.conf": "listen 80"})
    whole = sleeper(pod, mount(data, "/data"))
    part = sleeper(
        pod,
        mount(volumes.sub_path(data, "inner", "part"), "/inner"),
        mount(volumes.sub_path(config, "nginx.conf", "part"), "/etc/nginx.conf", readonly=True),
    )
    part.sh("echo there > /inner/file")
    assert whole.sh("cat /data/inner/file") == "there\n"
    assert part.sh("cat /etc/nginx.conf") == "listen 80"


def test_a_read_only_host_path_is_a_snapshot(pod: Pod, tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "file").write_text("of the host\n")
    box = sleeper(pod, mount(tmp_path / "host", "/host", readonly=True))
    assert box.sh("cat /host/file") == "of the host\n"
    assert box.exec("touch", "/host/x").exit_code != 0


def test_what_cannot_be_had_is_refused_by_name(pod: Pod, tmp_path: Path) -> None:
    with pytest.raises(CriError, match="/writable is writable"):
        sleeper(pod, mount(tmp_path, "/writable"))
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(tmp_path / "docker.sock"))
        with pytest.raises(CriError, match=r"/var/run/docker.sock brings .*a socket of the host"):
            sleeper(pod, mount(tmp_path / "docker.sock", "/var/run/docker.sock"))


def test_a_termination_message_comes_back_before_the_end_is_known(pod: Pod, volumes: PodVolumes) -> None:
    message = volumes.message_file("teller")
    ends = pod.start("sh", "-c", "echo last words > /dev/termination-log; exit 1",
                     mounts=[mount(message, "/dev/termination-log")])  # fmt: skip
    assert ends.wait().exit_code == 1
    assert message.read_text() == "last words\n"


def test_an_images_own_volume_begins_with_what_the_image_has_there(containerd: Containerd, pod: Pod) -> None:
    from container_images import busybox_layer, file_layer

    layers = [busybox_layer(), file_layer({"srv/page": b"from the image\n"})]
    containerd.add_image("localhost/remora/volume:1", layers, Volumes={"/srv": {}})
    box = pod.start("sleep", "1000000", image="localhost/remora/volume:1")
    assert box.sh("cat /srv/page") == "from the image\n"
    box.sh("echo more > /srv/own")


def test_a_named_pipe_in_a_shared_volume_connects_two_containers(pod: Pod, volumes: PodVolumes) -> None:
    shared = volumes.empty_dir("sockets")
    server = sleeper(pod, mount(shared, "/s"))
    client = sleeper(pod, mount(shared, "/s"))
    server.sh("mkfifo /s/pipe 2>/dev/null || mknod /s/pipe p; (echo through > /s/pipe) >/dev/null 2>&1 &")
    assert client.sh("cat /s/pipe") == "through\n"
