// SPDX-License-Identifier: GPL-2.0-only
/*
 * Ingress of a physical interface. It stays the host's own: what no network of the switch claims passes up the stack,
 * and on an untagged network the host is one more member.
 */
#include "lib/count.h"
#include "lib/flood.h"
#include "lib/l2.h"
#include "lib/maps.h"
#include "lib/mark.h"
#include "lib/vlan.h"

#define PACKET_HOST 0 /* linux/if_packet.h: the destination is the device's own MAC */

/* Untagged: the host gets what is for it and what is for all. Returns the verdict. */
static __always_inline int from_uplink_untagged(struct __sk_buff *skb, __u32 network)
{
	struct l2_entry *entry;
	struct ethhdr eth;
	struct l2_key key;

	if (l2_macs(skb, &eth))
		return TC_ACT_OK;
	l2_learn(network, eth.h_source, L2_UPLINK, skb->ifindex);
	if (skb->pkt_type == PACKET_HOST || mac_is_link_local(eth.h_dest))
		return TC_ACT_OK;
	l2_key_set(&key, network, eth.h_dest);
	entry = mac_is_group(eth.h_dest) ? NULL : bpf_map_lookup_elem(&l2, &key);
	if (entry && entry->kind == L2_PORT)
		return forward(skb, network, SOURCE(L2_UPLINK, skb->ifindex), 0);
	if (!entry)
		forward(skb, network, SOURCE(L2_UPLINK, skb->ifindex), PATH_CLONE);
	return TC_ACT_OK;
}

static __always_inline int from_uplink_tagged(struct __sk_buff *skb, __u32 network)
{
	struct ethhdr eth;

	if (vlan_strip(skb) || l2_macs(skb, &eth))
		return drop_slot(skb, 0, TO_GUEST, DROP_VLAN);
	l2_learn(network, eth.h_source, L2_UPLINK, skb->ifindex);
	return forward(skb, network, SOURCE(L2_UPLINK, skb->ifindex), 0);
}

SEC("tc")
int from_uplink(struct __sk_buff *skb)
{
	struct uplink_key key = {.ifindex = skb->ifindex};
	int vid = vlan_id(skb);
	__u32 *network;

	if (mark_take(skb)) /* from a VM of this host to the host */
		return TC_ACT_OK;
	if (vid < 0)
		return TC_ACT_OK;
	key.vid = vid;
	network = bpf_map_lookup_elem(&uplinks, &key);
	if (!network)
		return TC_ACT_OK;
	return vid ? from_uplink_tagged(skb, *network) : from_uplink_untagged(skb, *network);
}
