// SPDX-License-Identifier: GPL-2.0-only
/* The switch: one compilation unit, so that all programs share one set of maps. */
#include "control.bpf.c"
#include "flows.bpf.c"
#include "from_hold.bpf.c"
#include "from_port.bpf.c"
#include "from_shaper.bpf.c"
#include "from_tunnel.bpf.c"
#include "from_uplink.bpf.c"
#include "to_cutter.bpf.c"
#include "to_port.bpf.c"
#include "window.bpf.c"

char _license[] SEC("license") = "GPL";
