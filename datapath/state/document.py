"""What an operator writes for a kind of state at a port: a checked model that gives the kind's records."""

from __future__ import annotations

import abc
from typing import Any

from pydantic import BaseModel, ConfigDict

TEXT_MAX = 255
"""Characters of a text in a document. What has a bound is also checked to be Unicode: "\\ud800" in JSON is not."""


class Document(BaseModel, abc.ABC):
    """A kind's file in datapath/state/ has the model of its own. Errors say what was expected; nothing is ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_max_length=TEXT_MAX)

    @abc.abstractmethod
    def records(self) -> list[dict[str, Any]]:
        """All records of the kind at the port, complete but for what is counted and what the switch changes."""
