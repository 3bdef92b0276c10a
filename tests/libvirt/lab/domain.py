# SPDX-License-Identifier: GPL-2.0-only
"""Domain XML of a guest: emulated (no KVM), one vCPU, virtio-net, no disk unless asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import quoteattr

from migrator.lab.machines import Port

from .image import Image

# init_on_free: memory that is free again is zero again, which halves what a migration has to send
KERNEL_WORDS = "console=ttyS0 quiet no_timer_check panic=1 mitigations=off init_on_free=1 rdinit=/init"


@dataclass(frozen=True)
class Wiring:
    """How libvirt joins an interface to the host.

    `kind` "ethernet": a tap that libvirt makes (`managed`) or that must be there when the domain starts, in no bridge;
    "bridge": libvirt makes the tap and puts it into `bridge`.
    """

    kind: str = "ethernet"
    managed: bool = True
    bridge: str = ""


def domain_xml(
    name: str,
    uuid: str,
    image: Image,
    ports: Sequence[Port],
    wiring: Sequence[Wiring],
    *,
    memory_mib: int = 128,
    metadata: str = "",
    disk: bool = False,
) -> str:
    """XML of a domain. `metadata`: XML elements, each with a namespace of its own. `disk`: raw, at `disk_path`."""
    source = f"<source file='{disk_path(name)}'/><target dev='vda' bus='virtio'/>"
    disks = f"<disk type='file' device='disk'><driver name='qemu' type='raw'/>{source}</disk>" if disk else ""
    interfaces = "".join(_interface(port, wire) for port, wire in zip(ports, wiring, strict=True))
    return f"""
<domain type='qemu'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <metadata>{metadata}</metadata>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type>
    <kernel>{image.kernel}</kernel>
    <initrd>{image.initrd}</initrd>
    <cmdline>{KERNEL_WORDS} {_networks(ports)}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact'><model>qemu64</model></cpu>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>{disks}{interfaces}
    <serial type='file'><source path='{console_path(name)}'/><target port='0'/></serial>
    <serial type='unix'><source mode='bind' path='{control_path(name)}'/><target port='1'/></serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>"""


def console_path(name: str) -> str:
    """The console's log file, in the host."""
    return f"/var/log/libvirt/{name}-console.log"


def control_path(name: str) -> str:
    """The socket of the guest's second serial port, in the host."""
    return f"/run/{name}.ctl"


def disk_path(name: str) -> str:
    """Its disk, in the host."""
    return f"/var/lib/libvirt/images/{name}.raw"


def _networks(ports: Sequence[Port]) -> str:
    """Words for the guest's init: net0=10.1.0.1/16,fd00:1::1/64 …"""
    words = (",".join(f"{address}/{64 if ':' in address else 16}" for address in port.addresses) for port in ports)
    return " ".join(f"net{number}={word}" for number, word in enumerate(words))


def _interface(port: Port, wire: Wiring) -> str:
    managed = f" managed='{'yes' if wire.managed else 'no'}'" if wire.kind == "ethernet" else ""
    source = f"<source bridge={quoteattr(wire.bridge)}/>" if wire.kind == "bridge" else ""
    return f"""
    <interface type='{wire.kind}'>
      <mac address='{port.mac}'/>{source}
      <target dev={quoteattr(port.device)}{managed}/>
      <model type='virtio'/>
      <mtu size='{port.mtu}'/>
    </interface>"""
