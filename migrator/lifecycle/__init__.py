"""The three machines of a migration: source, destination, coordinator. Pure: no I/O, no clock, no thread.

Each is a function `step(state, event) -> (state, actions)` over frozen dataclasses. Whoever runs a machine stores the
new state before it carries out the actions, carries them out in order, and tells it what came of them as events.
Deadlines are events too. Every event is defined in every phase: what cannot matter any more changes nothing.

The invariant, for the three together with a guest that a hypervisor moves, whatever is lost, repeated, late or crashed:
an open port and a running guest are together on at most one host; in the end on exactly one, where the guest is; and
state is deleted nowhere before the other end has confirmed that it has it (or that the guest never left).
`tests/model` explores it.
"""
