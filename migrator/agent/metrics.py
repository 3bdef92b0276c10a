"""What Prometheus may ask an agent."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

PORTS = Gauge("migrator_agent_ports", "Port instances on this host", ["state"])
MIGRATIONS = Counter("migrator_agent_migrations", "Ends of migrations that are over", ["role", "phase"])
FRAMES = Counter("migrator_agent_frames", "Frames of migrations by what became of them", ["what"])
RECORDS = Counter("migrator_agent_records", "Records of state sent or loaded", ["role"])
DOWNTIME = Histogram(
    "migrator_agent_downtime_seconds",
    "From the guest's stop to the opening of its ports elsewhere, as its source saw it",
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
)
COORDINATOR = Gauge("migrator_agent_coordinator_connected", "1 while the coordinator is attached")
HOOKS = Histogram(
    "migrator_agent_hook_seconds",
    "How long libvirt's hook or lock driver waited for the agent, by what it asked and what it was answered",
    ["operation", "result"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)
