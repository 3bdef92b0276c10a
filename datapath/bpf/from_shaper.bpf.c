// SPDX-License-Identifier: GPL-2.0-only
/*
 * Egress of the device below the shaper: frames of guests that were judged and counted, and have waited. Only now is
 * it looked up where they go. Frames of a guest that has left would move its MAC back: the agent empties the queue
 * before that, and what is late all the same ends here.
 */
#include "lib/count.h"
#include "lib/flood.h"
#include "lib/maps.h"
#include "lib/qos.h"
#include "lib/receive.h"

static __always_inline int shaper_may_pass(const struct port *port)
{
	__u8 state = PORT_STATE(READ_ONCE(port->word));

	return state == PORT_ACTIVE || (state == PORT_QUIESCED && GATE_TARGET(READ_ONCE(port->gate)) != GATE_REDIRECT);
}

SEC("tc")
int from_shaper(struct __sk_buff *skb)
{
	__u32 slot = skb->mark ^ QOS_CLASS(0), network;
	struct port *port = bpf_map_lookup_elem(&ports, &slot);
	struct qos *way = qos_of(slot, FROM_GUEST);
	int vid = vlan_id(skb);

	if (!port || !way || !slot)
		return drop_slot(skb, 0, FROM_GUEST, DROP_NO_PORT);
	if (!shaper_may_pass(port))
		return drop_at(skb, port, FROM_GUEST, DROP_SHAPE);
	network = receive_network(skb, port, vid);
	if (!network)
		return drop_at(skb, port, FROM_GUEST, DROP_VLAN);
	mark_set(skb, 0);
	skb->priority = way->priority;
	return forward(skb, network, SOURCE(L2_PORT, slot), 0);
}
