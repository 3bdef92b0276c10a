// SPDX-License-Identifier: GPL-2.0-only
/* Ingress of a VM's device: what the guest sends. */
#include "lib/count.h"
#include "lib/device.h"
#include "lib/maps.h"
#include "lib/receive.h"

SEC("tc")
int from_port(struct __sk_buff *skb)
{
	struct port *port = device_port(skb->ifindex);

	if (!port)
		return drop_slot(skb, 0, FROM_GUEST, DROP_NO_PORT);
	return receive(skb, port, 0);
}
