# SPDX-License-Identifier: GPL-2.0-only
"""A cluster on one machine: network namespaces as hosts, real agents and a real coordinator, VMs without a hypervisor.

What the demonstration and the tests run on. Needs root, iproute2 (`ip`) and util-linux (`nsenter`); everything a lab
makes has its process id in the name and goes when it is closed, or when the next lab finds its maker gone.
"""
