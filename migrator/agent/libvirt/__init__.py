"""VMs that libvirt runs: the only package that imports libvirt. `migrator.agent.guests` loads it when asked for."""
