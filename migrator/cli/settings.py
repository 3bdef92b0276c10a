# SPDX-License-Identifier: GPL-2.0-only
"""The command's own file: where the coordinator is, and the certificate by which it knows the operator."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from migrator.documents import read_toml, validate
from migrator.errors import ConfigInvalid
from migrator.security.settings import Tls


class CommandFile(BaseModel):
    """`coordinator`: as `--coordinator`. `[tls]`: as in the daemons' files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    coordinator: str = ""
    tls: Tls | None = None


def read(path: Path) -> CommandFile:
    """Raises ConfigInvalid that names the file and the key."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return validate(CommandFile, read_toml(text, str(path)), str(path))
