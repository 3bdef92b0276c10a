"""All targets by their names."""

from __future__ import annotations

from . import snapshots, texts, watches
from .target import by_name

TARGETS = by_name((*snapshots.TARGETS, *texts.TARGETS, *watches.TARGETS))
