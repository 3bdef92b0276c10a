// SPDX-License-Identifier: GPL-2.0-only
/* Ingress of the vxlan device: frames of overlays, of VMs that moved here, and path probes. Only hosts of the cluster
 * and channels that the agent opened are heard. */
#include "lib/count.h"
#include "lib/event.h"
#include "lib/flood.h"
#include "lib/gate.h"
#include "lib/l2.h"
#include "lib/maps.h"
#include "lib/mirror.h"
#include "lib/tunnel.h"

static __always_inline int from_tunnel_overlay(struct __sk_buff *skb, struct tunnel_origin *origin)
{
	__u32 *host = bpf_map_lookup_elem(&host_index, &origin->from);
	__u32 *network;
	struct ethhdr eth;

	if (!host)
		return drop_slot(skb, 0, TO_GUEST, DROP_TUNNEL_PEER);
	network = bpf_map_lookup_elem(&vnis, &origin->id);
	if (!network)
		return drop_slot(skb, 0, TO_GUEST, DROP_NO_NETWORK);
	if (l2_macs(skb, &eth))
		return drop_slot(skb, 0, TO_GUEST, DROP_MALFORMED);
	l2_learn(*network, eth.h_source, L2_TUNNEL, *host);
	return forward(skb, *network, SOURCE(L2_TUNNEL, *host), 0);
}

/*
 * Broadcast reaches a VM by one path: once the port takes what its own network floods, it may have had what a source
 * that is late had held of it.
 */
static __always_inline int from_tunnel_late(struct __sk_buff *skb, struct port *port)
{
	__u64 word = READ_ONCE(port->word);
	struct ethhdr eth;

	if (PORT_STATE(word) != PORT_ACTIVE || GATE_TARGET(READ_ONCE(port->gate)) != GATE_LOCAL ||
	    (PORT_FLAGS(word) & (PORT_F_NO_BROADCAST | PORT_F_AWAITS_SOURCE)))
		return 0;
	return !l2_macs(skb, &eth) && mac_is_group(eth.h_dest);
}

/* A redirect: to the port, and the instance of it, that the channel was opened for. */
static __always_inline int from_tunnel_channel(struct __sk_buff *skb, struct tunnel_origin *origin)
{
	struct channel *channel = bpf_map_lookup_elem(&channels, &origin->id);
	struct port *port;
	__u32 path = (origin->mark & MARK_LOCAL ? 0 : PATH_MOVED) | (PATH_HOPS(origin->mark) + 1);

	if (!channel || !addr_equal(channel->from, origin->from.addr))
		return drop_slot(skb, 0, TO_GUEST, DROP_CHANNEL);
	port = bpf_map_lookup_elem(&ports, &channel->slot);
	if (!port || PORT_EPOCH(READ_ONCE(port->word)) != channel->epoch)
		return drop_slot(skb, channel->slot, TO_GUEST, DROP_CHANNEL);
	if (origin->mark & MARK_PROBE) {
		event_send(skb, channel->slot, EVENT_WHAT(EVENT_PROBE, TO_GUEST, DROP_NONE), origin->id);
		return TC_ACT_SHOT;
	}
	count_came(skb, channel->slot); /* all that came, also what is dropped below: the source counts what it sent */
	if (PATH_HOPS(origin->mark) >= HOPS_MAX)
		return drop_slot(skb, channel->slot, TO_GUEST, DROP_HOPS);
	if (from_tunnel_late(skb, port))
		return drop_slot(skb, channel->slot, TO_GUEST, DROP_BROADCAST_PATH);
	/* what it had judged it sends before its accounting: later nobody is believed that the policy has been asked */
	if (origin->mark & MARK_JUDGED && port_flags(port) & PORT_F_UNSETTLED)
		path |= PATH_JUDGED;
	return deliver(skb, channel->slot, path);
}

/* A copy of a mirror, for a port that is here, or was. */
static __always_inline int from_tunnel_copy(struct __sk_buff *skb, struct tunnel_origin *origin)
{
	struct mirror_name name = {.id = origin->id, .mark = origin->mark};
	int result;

	if (!bpf_map_lookup_elem(&host_index, &origin->from))
		return drop_slot(skb, 0, TO_GUEST, DROP_TUNNEL_PEER);
	result = mirror_here(skb, &name, 0);
	if (!mirror_done(result, 0))
		return drop_slot(skb, 0, TO_GUEST, DROP_MIRROR);
	return result == MIRROR_WAITS ? TC_ACT_SHOT : TC_ACT_REDIRECT;
}

SEC("tc")
int from_tunnel(struct __sk_buff *skb)
{
	struct tunnel_origin origin = {};

	if (tunnel_origin(skb, &origin))
		return drop_slot(skb, 0, TO_GUEST, DROP_TUNNEL_PEER);
	if (origin.mark & MARK_COPY)
		return from_tunnel_copy(skb, &origin);
	if (origin.mark & (MARK_REDIRECT | MARK_PROBE))
		return from_tunnel_channel(skb, &origin);
	if (origin.mark)
		return drop_slot(skb, 0, TO_GUEST, DROP_CHANNEL);
	return from_tunnel_overlay(skb, &origin);
}
