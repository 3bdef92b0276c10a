// SPDX-License-Identifier: GPL-2.0-only
/* Ingress of a VM's device: what the guest sends. */
#include "lib/count.h"
#include "lib/maps.h"
#include "lib/receive.h"

SEC("tc")
int from_port(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct device *device = bpf_map_lookup_elem(&devices, &ifindex);

	if (!device || device->role != DEVICE_PORT)
		return drop_slot(skb, 0, FROM_GUEST, DROP_NO_PORT);
	return receive(skb, device->slot, 0);
}
