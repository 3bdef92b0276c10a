"""How long a source may stay in each phase, and in which its ports must not outlive their agent."""

from __future__ import annotations

from migrator.agent.config import MigrationSection
from migrator.lifecycle.source_words import LEFT, UNSURE, Phase

LEASED = frozenset({Phase.HOLDING, Phase.SUSPENDING, Phase.DRAINING, Phase.DRAINED, *UNSURE, *LEFT})
"""A guest that stops earlier has its ports shut with a lease, which is the only one that they get until then."""


def deadline_s(phase: Phase, settings: MigrationSection, patient_s: float) -> float | None:
    """Seconds; None where there is none. `patient_s`: while memory is copied."""
    return {
        Phase.PROBING: settings.probe_s * 2,
        Phase.CONNECTING: settings.connect_s * 2,
        Phase.COPYING: patient_s,
        Phase.CONVERGED: patient_s,
        Phase.WATCHING: patient_s,
        Phase.SETTLING: settings.settle_s,
        Phase.STUB: None,
    }.get(phase, settings.step_s)
