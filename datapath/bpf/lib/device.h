/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The port of a device. What was found in `devices` is remembered by the low bits of the ifindex, and holds for as long
 * as the port says that the device is its own: the agent takes that back before another has the device (struct port).
 */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "atomic.h"
#include "maps.h"

#define DEVICES_KNOWN 4096 /* a power of two */

struct { /* slot that had a device last; programs write it */
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, DEVICES_KNOWN);
	__type(key, __u32);
	__type(value, __u32);
} devices_known SEC(".maps");

/* The port whose device has this ifindex, NULL when it is none's. */
static __always_inline struct port *device_port(__u32 ifindex)
{
	__u32 index = ifindex & (DEVICES_KNOWN - 1);
	__u32 *known = bpf_map_lookup_elem(&devices_known, &index);
	struct device *device;
	struct port *port;

	if (known) {
		port = bpf_map_lookup_elem(&ports, known);
		if (port && *known && READ_ONCE(port->ifindex) == ifindex)
			return port;
	}
	device = bpf_map_lookup_elem(&devices, &ifindex);
	if (!device || device->role != DEVICE_PORT || !device->slot)
		return NULL;
	if (known)
		*known = device->slot;
	return bpf_map_lookup_elem(&ports, &device->slot);
}
