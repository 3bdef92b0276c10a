"""An operator's objects and documents: what is taken, what is refused and how it is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from migrator import config
from migrator._pb import migrator_pb2 as pb
from migrator.agent.config import read_config
from migrator.documents import read_documents
from migrator.errors import ConfigInvalid

VM = "6f1c0f6e-8a5d-4e0e-9d3e-0c5f7b1f2a01"
PORT = {"vm": VM, "mac": "52:54:00:12:34:56", "network": "blue", "host": "h1", "device": "t{mac6}"}
RULE = {"direction": "to", "protocol": "tcp", "ports": [443], "remote": "192.0.2.0/24", "action": "allow"}


@pytest.mark.parametrize(
    ("model", "body", "says"),
    [
        (config.Network, {"name": "a b", "kind": "local"}, "name"),
        (config.Network, {"name": "a", "kind": "bridge"}, "kind"),
        (config.Network, {"name": "a", "kind": "uplink", "vlan": 4095}, "vlan"),
        (config.Network, {"name": "a", "kind": "overlay"}, "vni"),
        (config.Network, {"name": "a", "kind": "overlay", "vni": 1 << 24}, "vni"),
        (config.Network, {"name": "a", "kind": "local", "vlan": 3}, "vlan"),
        (config.Network, {"name": "a", "kind": "uplink", "vni": 3}, "vni"),
        (config.Network, {"name": "a", "kind": "local", "mtu": 67}, "mtu"),
        (config.Network, {"name": "a", "kind": "local", "colour": "red"}, "colour"),
        (config.AddressSet, {"name": "a", "prefixes": ["192.0.2.1/24"]}, "host bits"),
        (config.Rule, RULE | {"ports": "0-70000"}, "ports"),
        (config.Rule, RULE | {"ports": "9-8"}, "ports"),
        (config.Rule, RULE | {"protocol": "icmp"}, "ports are for"),
        (config.Rule, RULE | {"icmp": "8"}, "icmp is for"),
        (config.Rule, RULE | {"protocol": "256"}, "protocol"),
        (config.Rule, RULE | {"priority": 65536}, "priority"),
        (config.Rule, RULE | {"remote": "@"}, "remote"),
        (config.Rule, RULE | {"action": "accept"}, "action"),
        (config.Policy, {"name": "p", "rules": [RULE | {"id": 4}, RULE | {"id": 4}]}, "twice"),
        (config.Port, PORT | {"vm": "shop"}, "vm"),
        (config.Port, PORT | {"mac": "01:00:5e:00:00:01"}, "one station"),
        (config.Port, PORT | {"mac": "52:54:00:12:34"}, "mac"),
        (config.Port, PORT | {"device": "abcdefghij{mac6}"}, "15 characters"),
        (config.Port, PORT | {"device": "t{mac}"}, "{mac}"),
        (config.Port, PORT | {"addresses": ["192.0.2.1/24"]}, "prefix length"),
        (config.Port, PORT | {"trunk": {4095: "x"}}, "trunk"),
        (config.Port, PORT | {"timeouts_ms": {"tcp": 5}}, "timeouts_ms"),
    ],
)
def test_what_cannot_be_is_refused(model: type, body: dict, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        model.model_validate(body)
    assert says in str(caught.value)


def test_values_are_brought_to_one_form() -> None:
    port = config.Port.model_validate(PORT | {"vm": VM.upper(), "mac": "52-54-00-AB-CD-EF"})
    assert (port.vm, port.mac) == (VM, "52:54:00:ab:cd:ef")
    rule = config.Rule.model_validate({"direction": "from", "protocol": 6, "ports": 80, "action": "drop"})
    assert (rule.protocol, rule.ports) == ("tcp", ["80"])


def test_device_of_a_host() -> None:
    port = config.Port.model_validate(PORT | {"device": "v{vm8}", "devices": {"h2": "tap7"}})
    assert (port.device_at("h1"), port.device_at("h2")) == ("v6f1c0f6e", "tap7")


rules = st.builds(
    config.Rule,
    id=st.integers(0, 9),
    direction=st.sampled_from(["from", "to"]),
    priority=st.integers(0, 65535),
    protocol=st.sampled_from(["tcp", "udp"]),
    remote=st.lists(st.sampled_from(["192.0.2.0/24", "2001:db8::/32", "@office"]), max_size=3),
    ports=st.lists(st.sampled_from(["1", "8000-8999"]), max_size=2),
    action=st.sampled_from(["allow", "drop", "reject"]),
    log=st.booleans(),
)
ports = st.builds(
    config.Port,
    vm=st.uuids().map(str),
    mac=st.integers(1, (1 << 40) - 1).map(lambda n: "52:" + n.to_bytes(5, "big").hex(":")),
    network=st.just("blue"),
    trunk=st.dictionaries(st.integers(1, 4094), st.just("red"), max_size=3),
    timeouts_ms=st.dictionaries(st.sampled_from(["udp", "tcp_close"]), st.integers(1, 9), max_size=2),
    antispoof=st.booleans(),
    learning=st.booleans(),
)


@given(st.lists(rules, max_size=3), st.lists(ports, max_size=3))
def test_messages_carry_models_unchanged(given_rules: list, given_ports: list) -> None:
    policies = [config.Policy.model_construct(name="p", rules=given_rules)]
    model = config.Config.model_construct(networks=[], address_sets=[], policies=policies, ports=given_ports)
    ids = [rule.id for rule in given_rules if rule.id]
    if len(ids) == len(set(ids)):
        assert config.from_message(config.to_message(model), config.Config) == model


def test_message_that_is_wrong_names_the_object() -> None:
    message = pb.Config(ports=[pb.Port(vm=VM, mac="52:54:00:12:34:56", network="blue", addresses=["x"])])
    with pytest.raises(ConfigInvalid, match=r"ports\[0\] \(52:54:00:12:34:56\) addresses\[0\].*not 'x'"):
        config.from_message(message, config.Config)


YAML = f"""
networks:
  - name: blue
    kind: uplink
    vlan: 7
---
ports:
  - vm: {VM}
    mac: 52:54:00:12:34:56
    network: no
    host: h1
    device: t{{mac6}}
"""


def test_several_documents_become_one() -> None:
    found = read_documents(YAML, "a.yaml")
    assert [network.name for network in found.networks] == ["blue"]
    assert found.ports[0].mac == "52:54:00:12:34:56"  # YAML 1.1 would read a number to base 60
    assert found.ports[0].network == "no"  # and this as false


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", YAML.replace("vlan: 7", "vlan: 7000"), r"a\.yaml:5: networks\[0\] \(blue\) vlan: .*4094, not 7000"),
        ("a.yaml", YAML.replace("kind: uplink", "kind: [uplink"), r"a\.yaml:\d+: "),
        ("a.yaml", YAML.replace("network: no", "netwrk: no"), r"a\.yaml:\d+: ports\[0\].*netwrk"),
        ("a.yaml", YAML.replace("vlan: 7", "name: red"), r"a\.yaml:5: key 'name' is given twice"),
        ("a.yaml", "- a\n- b\n", r"a\.yaml:1: document"),
        ("a.yaml", "", r"a\.yaml: no document"),
        (
            "a.toml",
            "[[networks]]\nname = 'blue'\nkind = 'uplink'\nvlan = -1\n",
            r"a\.toml: networks\[0\] \(blue\) vlan",
        ),
        ("a.toml", "[[networks]\n", r"a\.toml: .*line 1"),
    ],
)
def test_errors_say_where(name: str, text: str, says: str) -> None:
    with pytest.raises(ConfigInvalid, match=says):
        read_documents(text, name)


def test_toml_reads_the_same() -> None:
    rule_text = "direction = 'to'\nprotocol = 'tcp'\nports = 443\naction = 'allow'\n"
    text = f"[[policies]]\nname = 'web'\n[[policies.rules]]\n{rule_text}"
    rule = read_documents(text, "a.toml").policies[0].rules[0]
    assert (rule.ports, rule.priority) == (["443"], 100)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "networks: \0"),
        ("a.yaml", "[" * 5000),
        ("a.yaml", "{a: " * 5000),
        ("a.yaml", "networks: [{name: !!timestamp x, kind: local}]"),
        ("a.yaml", "networks: [{name: a, kind: local, vlan: !!int seven}]"),
        ("a.yaml", "networks: [{name: a, kind: local, vlan: !!int ''}]"),
        ("a.yaml", "ports: [{learning: !!bool perhaps}]"),
        ("a.yaml", "networks: &a [{name: a, kind: local, !!merge <<: {mtu: 1400}}]"),
        ("a.yaml", "networks: !!set {a, b}"),
        ("a.yaml", f"networks: [{{name: a, kind: local, vlan: 0x{'f' * 5000}}}]"),
        ("a.yaml", f"networks: [{{name: a, kind: local, vlan: {'9' * 5000}}}]"),
        ("a.yaml", f"networks: [{{name: {'x' * 100_000}, kind: local}}]"),
        ("a.yaml", "networks: &a [*a]"),
        ("a.toml", "a = " + "[" * 100_000),
        ("a.toml", f"networks = {'9' * 5000}"),
        ("a.toml", f"networks = [{{name = 'a', kind = 'local', vlan = 0x{'f' * 5000}}}]"),
        ("a.toml", "networks = '\0'"),
    ],
)
def test_texts_that_mean_harm_are_refused_in_a_line(name: str, text: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        read_documents(text, name)
    assert len(str(caught.value)) < 1000


def test_numbers_are_those_of_yaml_1_2() -> None:
    (network,) = read_documents(
        "networks: [{name: a, kind: uplink, vlan: 010, mtu: 0x5dc, ageing_s: 0o17}]", "a.yaml"
    ).networks
    assert (network.vlan, network.mtu, network.ageing_s) == (10, 1500, 15)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "\0", "a = 0x" + "f" * 5000])
def test_an_agents_file_that_means_harm_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(f"a = {text}")
    with pytest.raises(ConfigInvalid):
        read_config(path)


def test_many_rules_that_share_an_id_are_refused_soon() -> None:
    """In a time that grows with their number: 200,000 in one message took hours."""
    rules = [{"direction": "to", "action": "allow", "id": 7}] * 20_000
    with pytest.raises(ValidationError, match="rule id 7 is given twice"):
        config.Policy.model_validate({"name": "a", "rules": rules})


@pytest.mark.parametrize("prefix", ["::ffff:192.0.2.0/120", "::ffff:0:0/96"])
def test_a_prefix_of_ipv4_addresses_is_written_as_one(prefix: str) -> None:
    with pytest.raises(ValidationError, match="prefix of IPv4"):
        config.AddressSet.model_validate({"name": "a", "prefixes": [prefix]})
