"""The agent: one a host. It runs the switch, moves VMs' state to and from other agents, listens to the hypervisor."""
