// SPDX-License-Identifier: GPL-2.0-only
/*
 * Ingress of the taps that the agent writes held frames back to. The count is lowered only after the frame has left, or
 * the next one could overtake it: so a copy is sent here and now, and the original ends.
 */
#include "lib/count.h"
#include "lib/gate.h"
#include "lib/maps.h"
#include "lib/mirror_hold.h"
#include "lib/receive.h"

static __always_inline int from_hold_to(struct __sk_buff *skb, struct port *port)
{
	__u32 path = PATH_CLONE | PATH_PASSED | PATH_MOVED;

	if (copy_take(skb))
		path |= PATH_JUDGED;
	deliver(skb, port->slot, path);
	__sync_fetch_and_add(&port->held_to, -1);
	return TC_ACT_SHOT;
}

static __always_inline int from_hold_from(struct __sk_buff *skb, struct port *port)
{
	receive(skb, port, PATH_CLONE | PATH_PASSED);
	__sync_fetch_and_add(&port->held_from, -1);
	return TC_ACT_SHOT;
}

SEC("tc")
int from_hold(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct device *device = bpf_map_lookup_elem(&devices, &ifindex);
	struct port *port = NULL;

	if (device && device->slot)
		port = bpf_map_lookup_elem(&ports, &device->slot);
	if (!port)
		return drop_slot(skb, 0, TO_GUEST, DROP_NO_PORT);
	if (device->role == DEVICE_HOLD_TO)
		return from_hold_to(skb, port);
	if (device->role == DEVICE_HOLD_FROM)
		return from_hold_from(skb, port);
	if (device->role == DEVICE_INJECT)
		return receive(skb, port, 0);
	if (device->role == DEVICE_JUDGED)
		return deliver(skb, device->slot, PATH_JUDGED | PATH_MOVED);
	return drop_slot(skb, 0, TO_GUEST, DROP_NO_PORT);
}
