/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Forwarding within a network: to the place of the destination MAC, or to every member.
 *
 * Split horizon: what came in by an uplink or a tunnel goes to local ports only; hosts of an overlay reach each other
 * directly, and an uplink's own network floods by itself.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

#include "count.h"
#include "gate.h"
#include "l2.h"
#include "maps.h"
#include "mark.h"
#include "tunnel.h"
#include "vlan.h"

/* Where a frame came from: kind (enum l2_kind) and target as in an L2 entry. */
#define SOURCE(kind, target)  ((__u64)(kind) << 32 | (target))
#define SOURCE_KIND(source)   ((__u32)((source) >> 32))
#define SOURCE_TARGET(source) ((__u32)(source))

static __always_inline __u32 source_slot(__u64 source)
{
	return SOURCE_KIND(source) == L2_PORT ? SOURCE_TARGET(source) : 0;
}

#define SEGMENT_HEADERS 28 /* IPv4 and UDP: what each segment of a GSO frame has at least before its data */

/* Frames that are too large for the network's underlay. GSO frames are cut to size later, to the size that the guest
 * says: larger segments than it may send are not left to the NIC (some stop at them, CVE-2018-1000026). */
static __always_inline int exceeds_mtu(struct __sk_buff *skb, const struct network *network)
{
	if (!network->mtu)
		return 0;
	if (skb->gso_size)
		return skb->gso_size + SEGMENT_HEADERS > network->mtu;
	return skb->len > network->mtu + ETH_HLEN;
}

struct flood {
	struct __sk_buff *skb;
	void *members;
	struct network *network;
	__u64 source;
	__u32 path;
};

static __always_inline void flood_to_port(struct flood *flood, const struct member *member)
{
	if (member->vlan && vlan_add(flood->skb, member->vlan))
		return;
	deliver(flood->skb, member->target, flood->path);
	if (member->vlan)
		vlan_strip(flood->skb);
}

static __always_inline void flood_to_uplink(struct flood *flood, const struct member *member)
{
	__u16 vid = flood->network->vid;

	if (vlan_add(flood->skb, vid))
		return;
	bpf_clone_redirect(flood->skb, member->target, 0);
	if (vid)
		vlan_strip(flood->skb);
}

/* The host itself is on an untagged network: its uplink's program lets the frame through by its mark. */
static __always_inline void flood_to_host(struct flood *flood, const struct member *member)
{
	mark_set(flood->skb, SKB_MARK_JUDGED);
	bpf_clone_redirect(flood->skb, member->target, BPF_F_INGRESS);
	mark_set(flood->skb, 0);
}

static long flood_member(__u32 index, struct flood *flood)
{
	const struct member *member = bpf_map_lookup_elem(flood->members, &index);

	if (!member || !member->kind)
		return 1;
	if (member->kind == L2_PORT) {
		if (flood->source != SOURCE(L2_PORT, member->target))
			flood_to_port(flood, member);
		return 0;
	}
	if (SOURCE_KIND(flood->source) != L2_PORT)
		return 0;
	if (member->kind == L2_UPLINK)
		flood_to_uplink(flood, member);
	else if (member->kind == L2_HOST)
		flood_to_host(flood, member);
	else if (member->kind == L2_TUNNEL)
		tunnel_send(flood->skb, member->target, flood->network->vni, 0, PATH_CLONE);
	return 0;
}

/* A copy to every member but the source. Returns enum drop_reason for the original, which ends here. */
static __noinline int flood(struct __sk_buff *skb, __u32 index, __u64 source, int group)
{
	struct flood flood = {
	    .skb = skb,
	    .members = bpf_map_lookup_elem(&floods, &index),
	    .network = bpf_map_lookup_elem(&networks, &index),
	    .source = source,
	    .path = PATH_CLONE | PATH_FLOOD,
	};

	if (!flood.members || !flood.network)
		return group ? DROP_NO_NETWORK : DROP_UNKNOWN_UNICAST;
	if (exceeds_mtu(skb, flood.network))
		return DROP_MTU;
	bpf_loop(FLOOD_MEMBERS, flood_member, &flood, 0);
	return DROP_NONE;
}

/* The frame ends here, counted at the port it came from, or at the network. Returns the verdict. */
static __noinline int forward_drop(struct __sk_buff *skb, __u32 index, __u64 source, int reason)
{
	struct network *network = bpf_map_lookup_elem(&networks, &index);

	if (!source_slot(source) && network)
		__sync_fetch_and_add(&network->drops, 1);
	return drop_slot(skb, source_slot(source), FROM_GUEST, reason);
}

/* To the host itself, as if it had come in by the uplink. */
static __always_inline int send_to_host(struct __sk_buff *skb, __u32 ifindex, __u32 path)
{
	mark_set(skb, SKB_MARK_JUDGED);
	return path & PATH_CLONE ? (int)bpf_clone_redirect(skb, ifindex, BPF_F_INGRESS)
				 : (int)bpf_redirect(ifindex, BPF_F_INGRESS);
}

/* Out of this host. Returns the verdict, TC_ACT_SHOT after counting why not. */
static __always_inline int send_away(struct __sk_buff *skb, __u32 index, const struct l2_entry *entry, __u64 source,
				     __u32 path)
{
	struct network *network = bpf_map_lookup_elem(&networks, &index);
	int verdict;

	if (!network)
		return forward_drop(skb, index, source, DROP_NO_NETWORK);
	if (exceeds_mtu(skb, network))
		return forward_drop(skb, index, source, DROP_MTU);
	if (entry->kind == L2_HOST)
		return send_to_host(skb, entry->target, path);
	if (entry->kind == L2_UPLINK) {
		if (vlan_add(skb, network->vid))
			return forward_drop(skb, index, source, DROP_VLAN);
		return send_to(skb, entry->target, path);
	}
	verdict = tunnel_send(skb, entry->target, network->vni, 0, path);
	return verdict == TC_ACT_SHOT ? forward_drop(skb, index, source, DROP_TUNNEL) : verdict;
}

/*
 * Forwards an untagged frame of network `index` that came from `source`. `path` has PATH_CLONE when the caller keeps
 * the frame (the verdict then means nothing), else 0. Frames that end here are counted: at the port they are for, else
 * at the port they came from, else at slot 0 and the network.
 */
__noinline int forward(struct __sk_buff *skb, __u32 index, __u64 source, __u32 path)
{
	struct l2_entry *entry;
	struct ethhdr eth;
	struct l2_key key;
	int reason;

	if (l2_macs(skb, &eth))
		return forward_drop(skb, index, source, DROP_MALFORMED);
	if (mac_is_link_local(eth.h_dest))
		return forward_drop(skb, index, source, DROP_UNKNOWN_UNICAST);
	l2_key_set(&key, index, eth.h_dest);
	entry = mac_is_group(eth.h_dest) ? NULL : bpf_map_lookup_elem(&l2, &key);
	if (!entry) {
		reason = flood(skb, index, source, mac_is_group(eth.h_dest));
		return reason ? forward_drop(skb, index, source, reason) : TC_ACT_SHOT;
	}
	if (entry->kind != L2_PORT) {
		if (SOURCE_KIND(source) != L2_PORT)
			return forward_drop(skb, index, source, DROP_LOOP);
		return send_away(skb, index, entry, source, path);
	}
	if (source == SOURCE(L2_PORT, entry->target))
		return forward_drop(skb, index, source, DROP_LOOP);
	if (SOURCE_KIND(source) == L2_UPLINK && l2_is_stray(entry))
		path |= PATH_FLOOD;
	if (entry->vlan && vlan_add(skb, entry->vlan))
		return drop_slot(skb, entry->target, TO_GUEST, DROP_VLAN);
	return deliver(skb, entry->target, path | (SOURCE_KIND(source) == L2_PORT ? PATH_LOCAL : 0));
}
