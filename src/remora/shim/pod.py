"""One pod: its microVM, its volumes, its attachment, and what each of its containers needs of them.

Everything here blocks and runs in threads of slow requests (service.py), one request of a container at a time.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from remora import paths
from remora.errors import RemoraError, UnavailableError
from remora.reactor import Reactor
from remora.sandboxes.agent_link import AgentLink
from remora.sandboxes.registry import Record, Registry, write_state
from remora.shim import cgroups, devices, identity, network, resizing, settings, spec, syncing, volumes
from remora.shim.layers import LayerCache, pack
from remora.shim.microvm import MicroVm
from remora.shim.portforward import PortForward
from remora.shim.task import Task
from remora.wire import containerd as c
from remora.wire import guest_pod_v1 as v1

#: Of a message that a container leaves at its end; the kubelet takes 4 KiB and shows less.
_MESSAGE_BYTES = 64 << 10


class Pod:
    def __init__(self, reactor: Reactor, on_end: Callable[[RemoraError], None]) -> None:
        self._reactor = reactor
        self._on_end = on_end
        self._settings = settings.Settings()
        self._sandbox_config: dict[str, Any] = {}
        self._sandbox_id = ""
        self._size = settings.Size(0, 0)
        self._record: Record | None = None
        self._lock_fd = -1
        self._vm: MicroVm | None = None
        self._link: AgentLink | None = None
        self._linking = threading.Lock()
        self._forward: PortForward | None = None
        self._copies: syncing.Copies | None = None
        self._seeded: set[str] = set()
        self._copying = threading.Lock()
        self._looking = False
        self._began_s = time.monotonic()
        self._stamps: dict[str, float] = {}

    @property
    def vm(self) -> MicroVm:
        if self._vm is None:
            raise UnavailableError("the pod has no microVM")
        return self._vm

    @property
    def pid(self) -> int:
        return self._vm.pid if self._vm is not None else 0

    # -- its life ---------------------------------------------------------------------------------------------------

    def boot(self, config: dict[str, Any], request: c.CreateTaskRequest, socket_path: str) -> None:
        """Bring the pod's microVM up.

        Raises:
            RemoraError: with what to do about it; nothing is left then but the record, which `close` removes.
        """
        self._began_s = time.monotonic()
        self._settings = settings.load(request.options)
        self._sandbox_config = config
        self._sandbox_id = spec.kind(config, request.id).sandbox
        size = self._size = settings.size(self._settings, config)
        netns = spec.network_namespace(config)
        cgroups.join((config.get("linux") or {}).get("cgroupsPath") or "")
        name = identity.sandbox_name(config, self._sandbox_id)
        fields = {
            "pod": name,
            "container": self._sandbox_id,
            "image": "",
            "command": [],
            "cpus": size.cpus,
            "memory_mib": size.memory_mib,
            "monitor_pid": os.getpid(),
            "shim_socket": socket_path,
        }
        self._record, self._lock_fd = Registry(paths.runtime_dir()).create(fields)
        vm = self._vm = MicroVm(self._reactor, self._record.directory, self._settings, self._on_end)
        net = network.NONE
        if netns is not None:
            vm.in_reactor(lambda: network.enter(netns))
            network.enter(netns)
            net = network.prepare()
        self._stamp("network_ready")
        hostname = config.get("hostname") or self._sandbox_id[:12]
        vm.boot(size, net, name, hostname, spec.sysctls(config))
        self._stamps.update({name: self._since(at_s) for name, at_s in vm.moments.items()})
        self._stamp("pod_ready")
        self._note(state="running", stamps=self._stamps, **vm.machine_fields())
        self._copies = syncing.Copies(lambda files: vm.pod("PutFiles", files))
        if net.networks:
            self._open_forward(vm)

    def _open_forward(self, vm: MicroVm) -> None:
        try:
            self._forward = PortForward(self._reactor, vm.directory)
            self._reactor.post(self._forward.start)
        except RemoraError as error:
            print(f"remora shim: port-forward does not work: {error}", file=sys.stderr)

    def _stamp(self, name: str) -> None:
        """Note how long after Create a stage was reached, the first time."""
        self._stamps.setdefault(name, self._since(time.monotonic()))

    def _since(self, at_s: float) -> float:
        return round((at_s - self._began_s) * 1000, 1)

    def _note(self, **fields: Any) -> None:
        if self._record is not None:
            self._record.fields.update(fields)
            write_state(self._record)

    def kill(self) -> None:
        """End the microVM at once."""
        if self._vm is not None:
            self._vm.kill()

    def give_up(self, why: str) -> None:
        """End a microVM whose guest does not do its part any more; one that has ended stays as it is. Any thread."""
        vm = self._vm
        if vm is not None and vm.ended is None:
            print(f"remora shim: {why}: the pod's microVM is ended", file=sys.stderr)
            vm.kill()

    @property
    def kill_timeout_s(self) -> float:
        return self._settings.kill_timeout_s

    def close(self) -> None:
        """Leave nothing of the pod but its cgroup, in which we still are; harmless a second time."""
        vm, self._vm = self._vm, None
        forward, self._forward = self._forward, None
        if forward is not None:
            self._reactor.post(forward.close)
        with self._linking:
            link, self._link = self._link, None
        if vm is not None:
            vm.close()
        if link is not None:
            try:
                link.close(detach_sandbox=True)
            except RemoraError as error:
                # Slow, or it has forgotten the pod: it lets go of what is left with the directory.
                print(f"remora shim: the agent did not let go of the pod: {error}", file=sys.stderr)
        record, self._record = self._record, None
        if record is not None:
            Registry(paths.runtime_dir()).remove(record.directory)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    # -- containers -------------------------------------------------------------------------------------------------

    def add(self, task: Task, request: c.CreateTaskRequest) -> None:
        """Make a container ready to start: its layers, its volumes, its bundle in the guest.

        Raises:
            RemoraError: with what to do about it; the guest knows nothing of the container then.
        """
        vm = self.vm
        config = task.config
        found: list[volumes.Found] = []

        def resolve(mount: dict[str, Any]) -> str:
            one = volumes.find(mount, self._sandbox_id)
            found.append(one)
            return one.guest_source

        hostname = config.get("hostname") or self._sandbox_config.get("hostname") or self._sandbox_id[:12]
        asked = devices.asked(config)
        guest_config = spec.guest_config(config, task.id, resolve, hostname)
        self._attach(config)
        root = os.path.join(task.bundle, (config.get("root") or {}).get("path") or "rootfs")
        images = LayerCache(paths.state_dir()).images(request.rootfs, root, vm.directory / f"root-{task.id[:64]}.erofs")
        snapshots = {one.volume.name: self._snapshot(one.volume) for one in found if one.volume.kind == "snapshot"}
        try:
            serials = vm.slots.insert(task.id, [*images, *snapshots.values()])
            disks = dict(zip(snapshots, serials[len(images) :], strict=True))
            attached = [self._attach_disk(task, device) for device in asked]
            spec.give_devices(guest_config, [device for _, device in attached])
            self._send_copies([one.volume for one in found if one.volume.kind == "synced"])
            create = v1.CreateRequest(
                id=task.id,
                config=json.dumps(guest_config).encode(),
                layers=serials[: len(images)],
                volumes=[_guest_volume(one.volume, disks) for one in found if one.volume.kind != "synced"],
                shared_pids=spec.shares_pids(config),
                devices=[serial for serial, _ in attached],
            )
            # A directory of the guest gets its content before a container sees it, and a subPath its directory.
            vm.pod("Create", create)
            task.in_guest = True
            self._seed(found)
        except BaseException:
            self._take_back(task)
            vm.slots.release(task.id)
            raise
        task.returned = [one.volume for one in found if one.volume.returned]

    def remove(self, task: Task) -> None:
        """Take a container out of the guest and give its disks back."""
        if task.in_guest and self._vm is not None and self._vm.ended is None:
            task.in_guest = False
            self._vm.pod("Remove", v1.ContainerRequest(id=task.id))
            self._vm.slots.release(task.id)

    def _attach_disk(self, task: Task, device: devices.BlockDevice) -> tuple[str, spec.GuestDevice]:
        """Make a block device of the host a disk of the microVM; return its serial and what it is in the guest."""
        serial, size_bytes = self.vm.slots.attach(task.id, device)
        found = self.vm.pod("AttachDisk", v1.AttachDiskRequest(serial=serial, size_bytes=size_bytes))
        return serial, (device, found.major, found.minor)

    def update(self, task: Task, resources: dict[str, Any]) -> None:
        """Change the limits of a container that runs.

        Raises:
            ResourceExhaustedError: they are more than the microVM has.
        """
        linux = task.config.get("linux") or {}
        now = linux.get("resources") or {}
        changed = resizing.guest_update(resources, now, self._size)
        if changed:
            self.vm.pod("Update", v1.UpdateRequest(id=task.id, resources=json.dumps(changed).encode()))
            task.config["linux"] = {**linux, "resources": resizing.merged(now, changed)}

    def _take_back(self, task: Task) -> None:
        try:
            self.remove(task)
        except RemoraError as error:
            print(f"remora shim: {task.id}: {error}", file=sys.stderr)

    def bring_back(self, task: Task) -> None:
        """Write what the container leaves (its termination message) to the host."""
        for volume in task.returned:
            try:
                request = v1.GetFileRequest(volume=volume.name, path=volumes.FILE_NAME, limit=_MESSAGE_BYTES)
                content = bytes(self.vm.pod("GetFile", request, 10.0).content)
                if content:
                    syncing.bring_back(volume, content[-_MESSAGE_BYTES:])
            except (OSError, RemoraError) as error:
                print(f"remora shim: the termination message of {task.id}: {error}", file=sys.stderr)

    def _snapshot(self, volume: volumes.Volume) -> Path:
        """Pack a host directory as it is now; the image is the pod's own and goes with its directory."""
        target = self.vm.directory / f"{volume.name}.erofs"
        if not target.exists():
            pack([volume.source], target)
        return target

    # -- copies of the host's files ---------------------------------------------------------------------------------

    def _send_copies(self, wanted: list[volumes.Volume]) -> None:
        assert self._copies is not None
        with self._copying:
            for volume in wanted:
                self._copies.add(volume)
        if wanted and not self._looking:
            self._looking = True
            self._reactor.post(self._look_later)

    def _seed(self, found: list[volumes.Found]) -> None:
        assert self._copies is not None
        with self._copying:
            for one in found:
                if one.volume.seeded and one.volume.name not in self._seeded:
                    self._seeded.add(one.volume.name)
                    self._copies.seed(one.volume)
                elif one.below and one.volume.kind in ("dir", "tmpfs"):
                    directory = v1.File(path=one.below.strip("/"), kind="dir", mode=one.volume.mode, gid=one.volume.gid)
                    self.vm.pod("PutFiles", v1.PutFilesRequest(volume=one.volume.name, files=[directory]))

    def _look_later(self) -> None:
        self._reactor.call_later(syncing.INTERVAL_S, self._look)

    def _look(self) -> None:
        """See what the kubelet has changed; in the reactor's thread, so only looking is done here."""
        if self._vm is None or self._vm.ended is not None or self._copies is None:
            return
        changed = self._copies.changed()
        if not changed:
            self._look_later()
            return
        threading.Thread(target=self._update, args=(changed,), name="copies", daemon=True).start()

    def _update(self, changed: list[volumes.Volume]) -> None:
        try:
            with self._copying:
                for volume in changed:
                    if self._copies is not None:
                        self._copies.update(volume)
        except (OSError, RemoraError) as error:
            print(f"remora shim: a volume could not be updated: {error}", file=sys.stderr)
        finally:
            self._reactor.post(self._look_later)

    # -- the accelerator --------------------------------------------------------------------------------------------

    def _attach(self, config: dict[str, Any]) -> None:
        """Attach the pod to the node's agent, with its first container; tell of the grants of each further one."""
        if not identity.wanted(self._settings, self._sandbox_config):
            return
        with self._linking:
            if self._link is not None:
                try:
                    self._link.grant(identity.grants(self._sandbox_config, config))
                except RemoraError as error:
                    print(f"remora shim: the agent takes no grant now: {error}", file=sys.stderr)
                return
            attach = identity.attach_spec(self._settings, self._sandbox_config, config)
            name = identity.sandbox_name(self._sandbox_config, self._sandbox_id)
            self._note(control_socket=str(attach.control_socket), attached_as=name)
            self._link = AgentLink(attach, name, self.vm.directory)
            try:
                self._link.attach()
            except RemoraError as error:
                # The pod works; its calls say that no agent is there until one is.
                print(f"remora shim: no accelerator yet: {error}", file=sys.stderr)


def _guest_volume(volume: volumes.Volume, disks: dict[str, str]) -> v1.Volume:
    if volume.kind == "snapshot":
        return v1.Volume(name=volume.name, kind="disk", serial=disks[volume.name], mode=volume.mode, gid=volume.gid)
    return v1.Volume(name=volume.name, kind=volume.kind, size_bytes=volume.size_bytes, mode=volume.mode, gid=volume.gid)
