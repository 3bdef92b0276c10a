"""docs/operations.md names every key of the daemons' files, and its examples are accepted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from migrator.agent.config import AgentConfig, AgentSection, MigrationSection, read_config
from migrator.coordinator.settings import Deadlines, Settings, load
from migrator.errors import ConfigInvalid

TEXT = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
COORDINATOR, AGENT = re.findall(r"```toml\n(.*?)```", TEXT, flags=re.S)


@pytest.mark.parametrize(
    ("model", "text"),
    [(Settings, COORDINATOR), (Deadlines, COORDINATOR), (AgentSection, AGENT), (MigrationSection, AGENT)],
)
def test_every_key_is_named(model: type, text: str) -> None:
    missing = [name for name in model.model_fields if not re.search(rf"\b{name}\b", text)]
    assert not missing


def test_examples_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(COORDINATOR)
    assert load(path).deadlines == Deadlines()
    path.write_text(AGENT)
    assert read_config(path).migration == AgentConfig.model_fields["migration"].default


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[coordinator]\nlisten = 'nowhere'\n", "listen"),
        ("[coordinator]\nlisten = []\n", "listen"),
        ("[coordinator]\nlissten = 'a:1'\n", "lissten"),
        ("[coordinator.deadlines]\nundo_s = 0\n", "undo_s"),
        ("[cordinator]\n", "cordinator"),
        ("[coordinator\n", "line 1"),
    ],
)
def test_wrong_settings_name_file_and_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigInvalid, match=rf"c\.toml.*{says}"):
        load(path)


def test_options_replace_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[coordinator]\nlisten = 'a:1'\nmetrics_port = 5\n[tls]\ninsecure = true\n")
    settings = load(path, listen=["b:2"], metrics_port=None)
    assert (settings.listen, settings.metrics_port) == (["b:2"], 5)


def test_every_metric_is_named_and_no_other() -> None:
    import migrator.agent.metrics
    import migrator.coordinator.cluster
    import migrator.coordinator.rpc  # noqa: F401

    kinds = {"counter": "_total"}
    found = {
        family.name + kinds.get(family.type, "") for family in REGISTRY.collect() if family.name.startswith("migrator_")
    }
    assert set(re.findall(r"`(migrator_[a-z_]+)", TEXT)) == found
