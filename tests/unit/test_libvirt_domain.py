"""Domain XML to ports: what is ours, what is refused and with which words, and text that means harm."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.agent.libvirt.domain import Interface, _refuse_twins, device_names, parse, placed, with_devices
from migrator.errors import ConfigInvalid

VM = "6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2a01"
MAC = "52:54:00:00:00:10"
FULL = """
<port mac="52:54:00:00:00:10" network="blue" policy="web" connections-max="1024" mtu="1400" antispoof="no"
      learned-max="4">
  <address>10.0.0.5</address> <address>fd00::5</address>
  <trunk vlan="10" network="red"/> <timeout name="tcp_established" ms="3600000"/>
</port>"""
PLAIN = f'<port mac="{MAC}" network="blue"/>'


def interface(kind: str = "bridge", mac: str = MAC, device: str = "web0", inside: str = "", target: str = "") -> str:
    dev = f"<target dev='{device}' {target}/>" if device else ""
    rest = f"<source bridge='br0'/>{dev}<model type='virtio'/>{inside}"
    return f"<interface type='{kind}'><mac address='{mac}'/>{rest}</interface>"


def domain(ports: str | None = PLAIN, *interfaces: str, lead: str = "", name: str = "shop") -> str:
    ours = "" if ports is None else f'<p:ports xmlns:p="urn:vm-netstate-migrator:ports:1" {lead}>{ports}</p:ports>'
    ours = ours.replace("<port ", "<p:port ").replace("</port>", "</p:port>").replace("<address>", "<p:address>")
    ours = (
        ours.replace("</address>", "</p:address>").replace("<trunk ", "<p:trunk ").replace("<timeout ", "<p:timeout ")
    )
    devices = "".join(interfaces or (interface(),))
    return (
        f"<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>{name}</name>"
        f"<uuid>{VM.upper()}</uuid><metadata><o:other xmlns:o='urn:other'><o:ports/></o:other>{ours}</metadata>"
        f"<devices><emulator>/usr/bin/qemu</emulator>{devices}</devices></domain>"
    )


def test_a_port_has_all_that_the_metadata_says() -> None:
    found = parse(domain(FULL, lead="lead='no' downtime-ms='250' max-passes='3'"))
    assert (found.uuid, found.name, found.ours, found.refused, found.missing) == (VM, "shop", True, (), ())
    (port,) = found.ports
    assert (port.vm, port.mac, port.network, port.policy, port.name) == (VM, MAC, "blue", "web", "shop")
    assert (port.connections_max, port.mtu, port.no_antispoof, port.learned_max) == (1024, 1400, True, 4)
    assert list(port.addresses) == ["10.0.0.5", "fd00::5"]
    assert dict(port.trunk) == {10: "red"} and dict(port.timeouts_ms) == {"tcp_established": 3600000}
    assert (port.device, port.host, port.declared_by, port.learning) == ("web0", "", "libvirt", False)
    assert (found.lead.lead, found.lead.downtime_ms, found.lead.max_passes) == (False, 250, 3)


def test_elements_within_may_have_no_namespace() -> None:
    """As `virsh metadata --set` leaves them."""
    text = domain(FULL).replace("<p:", "<").replace("</p:", "</").replace("<ports xmlns:p", "<p:ports xmlns:p")
    assert parse(text.replace("</ports>", "</p:ports>")).ports == parse(domain(FULL)).ports


def test_a_domain_without_our_metadata_is_not_looked_at() -> None:
    found = parse(domain(None, interface("hostdev"), "<interface/>"))
    assert not found.ours and not found.ports and not found.refused


def test_an_interface_that_the_metadata_does_not_name_is_left_alone() -> None:
    other = "52:54:00:00:00:99"
    found = parse(domain(PLAIN, interface(), interface("user", mac=other)))
    assert [port.mac for port in found.ports] == [MAC] and not found.refused
    assert [one.mac for one in found.interfaces] == [MAC, other]
    assert [one.mac for one in found.owned] == [MAC]


def test_a_port_whose_interface_is_not_there_yet_is_missing() -> None:
    found = parse(domain('<port mac="52:54:00:00:00:77" network="blue"/>' + PLAIN))
    assert found.missing == ("52:54:00:00:00:77",) and len(found.ports) == 1


@pytest.mark.parametrize("kind", ["hostdev", "vhostuser", "direct", "network", "user", "vdpa", "internal", "what"])
def test_an_interface_that_cannot_be_owned_is_refused_by_name(kind: str) -> None:
    found = parse(domain(PLAIN, interface(kind)))
    assert not found.ports
    (why,) = found.refused
    assert why.startswith(f"domain shop, interface {MAC}: type='{kind}' cannot be owned: ")
    assert "use type='ethernet' or type='bridge'" in why


@pytest.mark.parametrize(
    "inside, word",
    [
        ("<bandwidth><inbound average='1'/></bandwidth>", "<bandwidth>"),
        ("<virtualport type='openvswitch'/>", "<virtualport>"),
        ("<vlan><tag id='5'/></vlan>", "<vlan>"),
        ("<filterref filter='clean-traffic'/>", "<filterref>"),
        ("<port isolated='yes'/>", "<port isolated>"),
    ],
)
def test_parts_of_an_interface_that_the_switch_would_not_obey_are_refused(inside: str, word: str) -> None:
    (why,) = parse(domain(PLAIN, interface(inside=inside))).refused
    assert why.startswith(f"domain shop, interface {MAC}: {word}: ")


def test_an_unmanaged_tap_needs_a_name() -> None:
    assert parse(domain(PLAIN, interface("ethernet", target="managed='no'"))).ports
    for device in ("", "vnet3"):
        inside = "" if device else "<target managed='no'/>"
        (why,) = parse(
            domain(PLAIN, interface("ethernet", device=device, target="managed='no'", inside=inside))
        ).refused
        assert "managed='no' needs <target dev>" in why


def test_queues_and_mtu_come_from_the_interface() -> None:
    inside = "<driver name='vhost' queues='4'/><mtu size='1400'/>"
    found = parse(domain(PLAIN, interface(inside=inside)))
    assert (found.interfaces[0].queues, found.ports[0].mtu) == (4, 1400)


def test_a_device_that_libvirt_named_is_of_that_host_only() -> None:
    found = parse(domain(PLAIN, interface(device="vnet7")))
    (port,) = placed(found.ports, "h1")
    assert (port.device, dict(port.devices)) == ("p{mac6}{vm8}", {"h1": "vnet7"})
    assert device_names(found) == {MAC: f"p000010{VM[:8]}"}
    (port,) = placed(parse(domain()).ports, "h1")
    assert (port.device, dict(port.devices)) == ("web0", {}) and device_names(parse(domain())) == {}
    (port,) = placed(parse(domain(PLAIN, interface(device=""))).ports, "h1")
    assert (port.device, dict(port.devices)) == ("p{mac6}{vm8}", {})


def test_devices_are_renamed_and_all_else_stays() -> None:
    before = domain(FULL, interface(device=""), interface(mac="52:54:00:00:00:99", device="other0"))
    after = parse(with_devices(before, {MAC: "new0"}))
    assert [one.device for one in after.interfaces] == ["new0", "other0"]
    original = parse(before)
    assert after.ports[0].policy == original.ports[0].policy == "web"
    assert (after.uuid, after.name, after.lead) == (original.uuid, original.name, original.lead)


def test_a_name_that_is_none_for_us_is_left_out() -> None:
    assert parse(domain(name="my shop")).ports[0].name == ""


@pytest.mark.parametrize(
    "ports, words",
    [
        ('<port mac="52:54:00:00:00:10"/>', "port 52:54:00:00:00:10: attribute network is missing"),
        ('<port network="blue"/>', "attribute mac is missing"),
        ('<port mac="52:54:00:00:00:10" network="blue" polcy="web"/>', "attribute 'polcy' is not known"),
        ('<port mac="52:54:00:00:00:10" network="b l"/>', "network: expected 1 to 63 letters"),
        ('<port mac="52:54:00:00:00:10" network="blue" mtu="1e3"/>', "mtu: expected a number, not '1e3'"),
        ('<port mac="52:54:00:00:00:10" network="blue" mtu="9"/>', "mtu: expected 68 to"),
        ('<port mac="52:54:00:00:00:10" network="blue" antispoof="on"/>', "antispoof: expected yes or no, not 'on'"),
        ('<port mac="52:54:00:00:00:10" network="blue"><address>10.0.0.5/24</address></port>', "addresses[0]"),
        ('<port mac="52:54:00:00:00:10" network="blue"><trunk vlan="10"/></port>', "<trunk>: attribute network is"),
        ('<port mac="52:54:00:00:00:10" network="blue"><timeout name="x" ms="1"/></port>', "expected one of"),
        (PLAIN + PLAIN, "port 52:54:00:00:00:10 is named twice"),
    ],
)
def test_errors_name_domain_port_attribute_and_what_was_expected(ports: str, words: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        parse(domain(ports))
    assert words in str(caught.value) and "domain shop" in str(caught.value)


def test_an_element_that_is_not_known_is_refused() -> None:
    text = domain(f'<port mac="{MAC}" network="blue"><rule/></port>')
    with pytest.raises(ConfigInvalid, match="<rule> is not known in the metadata"):
        parse(text)


def test_two_interfaces_of_one_mac_are_refused() -> None:
    with pytest.raises(ConfigInvalid, match="two interfaces have MAC"):
        parse(domain(PLAIN, interface(), interface(device="web1")))


@pytest.mark.parametrize(
    "xml, words",
    [
        ("", "cannot be read"),
        ("<domain>", "cannot be read"),
        ("<network/>", "expected a <domain>"),
        ("<domain><uuid>x</uuid></domain>", "expected a uuid"),
        ("<!DOCTYPE d [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;'>]><domain>&b;</domain>", "declares a document type"),
        ("<!DOCTYPE d SYSTEM 'file:///etc/passwd'><domain/>", "declares a document type"),
        ("<domain>" * 100 + "</domain>" * 100, "nested deeper than 64"),
        ("<domain>" + " " * (5 << 20) + "</domain>", "more than"),
        ("<domain>\ud800</domain>", "cannot be read"),
        ("<domain>\x00</domain>", "cannot be read"),
    ],
    ids=range(10),
)
def test_text_that_is_no_domain_or_means_harm_is_refused(xml: str, words: str) -> None:
    with pytest.raises(ConfigInvalid, match=words):
        parse(xml)


@given(st.integers(0, len(domain(FULL))), st.text(max_size=8))
def test_damaged_text_is_read_or_refused_and_never_breaks(at: int, noise: str) -> None:
    text = domain(FULL)
    try:
        parse(text[:at] + noise + text[at:])
    except ConfigInvalid as error:
        assert str(error)


def test_interfaces_are_compared_in_steps_that_grow_with_their_number() -> None:
    """Each with each other, 4 MiB of them kept the agent for minutes."""
    compared = 0

    class Mac(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    many = [Interface(Mac(f"52:54:00:00:{n >> 8:02x}:{n & 255:02x}"), "bridge", "", True, 1, 0) for n in range(2000)]
    _refuse_twins("shop", many)
    assert compared < 10 * len(many)
    with pytest.raises(ConfigInvalid, match="two interfaces have MAC 52:54:00:00:00:07"):
        _refuse_twins("shop", [*many, many[7]])
