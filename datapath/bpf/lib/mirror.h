/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Mirrors of a port: copies of the frames that passed it, as the guest's wire has them, to a device, to another port
 * (wherever it is), to a VLAN of an uplink, or to an address by VXLAN.
 *
 * No loop can arise: a copy meets no program that mirrors. To a port it is marked as judged; from a tunnel it goes to
 * the one port that its mark names, or once to the host that this port moved to.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

#include "atomic.h"
#include "count.h"
#include "maps.h"
#include "mark.h"
#include "mirror_hold.h"
#include "mirror_maps.h"
#include "packet.h"
#include "tunnel.h"
#include "vlan.h"

/* To `remote`. With PATH_CLONE 0 is success, else TC_ACT_REDIRECT. */
static __noinline int mirror_tunnel(struct __sk_buff *skb, const __be32 remote[4], const struct mirror_name *name,
				    __u32 path)
{
	__u32 zero = 0;
	struct settings *set = bpf_map_lookup_elem(&settings, &zero);

	if (!set || !set->tunnel || tunnel_key(skb, remote, name->id, name->mark))
		return MIRROR_FAILED;
	return send_to(skb, set->tunnel, path);
}

/*
 * To a port of this host whose guest runs, past its policy and its counters; or after it to the host that it moved to,
 * unless the copy has come after it already. What finds its guest between two hosts waits.
 */
static __noinline int mirror_slot(struct __sk_buff *skb, __u32 slot, struct mirror_name *name, __u32 path)
{
	struct port *port = bpf_map_lookup_elem(&ports, &slot);
	struct host *remote;
	__u32 index;
	__u64 gate;

	if (!port || !slot)
		return MIRROR_FAILED;
	gate = READ_ONCE(port->gate);
	if (copy_waits(port, gate, name->mark & MARK_COPY_PASSED)) {
		if (copy_hold(skb, port))
			return MIRROR_FAILED;
		return path & PATH_CLONE ? 0 : MIRROR_WAITS;
	}
	if (GATE_TARGET(gate) == GATE_REDIRECT && !(name->mark & MARK_COPY_PASSED)) {
		index = port->remote;
		remote = index ? bpf_map_lookup_elem(&hosts, &index) : NULL;
		name->mark |= MARK_COPY_PASSED;
		return remote ? mirror_tunnel(skb, remote->addr, name, path) : MIRROR_FAILED;
	}
	if (PORT_STATE(READ_ONCE(port->word)) != PORT_ACTIVE || GATE_TARGET(gate) != GATE_LOCAL || !port->ifindex)
		return MIRROR_FAILED;
	mark_set(skb, SKB_MARK_JUDGED);
	return send_to(skb, port->ifindex, path);
}

/* To the instance of a port that is here. `name` is that of the port, perhaps with MARK_COPY_PASSED. */
static __always_inline int mirror_here(struct __sk_buff *skb, struct mirror_name *name, __u32 path)
{
	struct mirror_name key = {.id = name->id, .mark = name->mark & ~MARK_COPY_PASSED};
	struct mirror_slots *here = bpf_map_lookup_elem(&mirror_ports, &key);
	int result;

	if (!here)
		return MIRROR_FAILED;
	result = mirror_slot(skb, here->newest, name, path);
	return mirror_done(result, path) || !here->older ? result : mirror_slot(skb, here->older, name, path);
}

static __always_inline int mirror_to_port(struct __sk_buff *skb, const struct mirror *mirror, __u32 path)
{
	struct mirror_name name = {.id = mirror->id, .mark = mirror->mark};
	int result = mirror_here(skb, &name, path);

	if (mirror_done(result, path) || addr_is_zero(mirror->remote))
		return result;
	mark_set(skb, 0);
	name.mark = mirror->mark;
	return mirror_tunnel(skb, mirror->remote, &name, path);
}

/* The tag of the output goes around the guest's own. */
static __always_inline int mirror_to_vlan(struct __sk_buff *skb, const struct mirror *mirror, __u32 path)
{
	int result;

	if (!mirror->target || vlan_add(skb, mirror->vid))
		return MIRROR_FAILED;
	result = send_to(skb, mirror->target, path);
	if (path & PATH_CLONE && mirror->vid)
		bpf_skb_vlan_pop(skb);
	return result;
}

/* Sends the frame to a mirror's output; with PATH_CLONE a copy of it, and the frame is as it was but for its mark.
 * Packet pointers are void afterwards. Global, so that it is verified once. */
__noinline int mirror_send(struct __sk_buff *skb, __u32 key, __u32 path)
{
	struct mirror *mirror = bpf_map_lookup_elem(&mirrors, &key);
	struct mirror_name name = {};

	if (!mirror)
		return MIRROR_FAILED;
	mark_set(skb, 0);
	switch (mirror->output) {
	case MIRROR_DEVICE:
		return mirror->target ? send_to(skb, mirror->target, path) : MIRROR_FAILED;
	case MIRROR_PORT:
		return mirror_to_port(skb, mirror, path);
	case MIRROR_VLAN:
		return mirror_to_vlan(skb, mirror, path);
	case MIRROR_TUNNEL:
		name.id = mirror->id;
		return mirror_tunnel(skb, mirror->remote, &name, path);
	}
	return MIRROR_FAILED;
}

static __always_inline int mirror_wants(const struct mirror *mirror, int direction, int vid)
{
	if (!(mirror->directions & 1 << (direction & 1)))
		return 0;
	return !mirror->filtered || (vid >= 0 && mirror->vlans[vid >> 6 & 63] >> (vid & 63) & 1);
}

/* A copy that is to be cut is cut where only it is: at the egress of a device of the switch's own (to_cutter.bpf.c). */
static __always_inline int mirror_cut(struct __sk_buff *skb, __u32 key)
{
	__u32 zero = 0, *cutter = bpf_map_lookup_elem(&mirror_cutter, &zero);

	if (!cutter || !*cutter)
		return MIRROR_FAILED;
	mark_set(skb, SKB_MARK_COPY | key);
	return bpf_clone_redirect(skb, *cutter, 0);
}

static __always_inline void mirror_count(__u32 key, const struct packet *pkt, int failed)
{
	struct mirror_count *count = bpf_map_lookup_elem(&mirror_counts, &key);

	if (!count)
		return;
	if (failed) {
		count->dropped += pkt->wire_packets;
		return;
	}
	count->packets += pkt->wire_packets;
	count->bytes += pkt->wire_frame_bytes;
}

/* One mirror of a port and one frame. Returns 1 when the port has no more of them. */
__noinline int mirror_one(struct __sk_buff *skb, __u32 key, struct packet *pkt, int direction)
{
	struct mirror *mirror = bpf_map_lookup_elem(&mirrors, &key);
	int result;

	if (!mirror || !pkt)
		return 1;
	if (!mirror_wants(mirror, direction, vlan_id(skb)))
		return 0;
	if (mirror->snap && frame_size(skb) > mirror->snap)
		result = mirror_cut(skb, key);
	else
		result = mirror_send(skb, key, PATH_CLONE);
	mirror_count(key, pkt, result);
	return 0;
}

/*
 * Copies of a frame that passed the port: with the tag that it has on the guest's wire, which has been taken off a
 * frame from the guest. The frame is as it was afterwards; packet pointers are void.
 */
static __always_inline void mirror(struct __sk_buff *skb, struct port *port, struct packet *pkt, int direction)
{
	__u32 mark = skb->mark, tagged = direction == FROM_GUEST ? pkt->tagged : 0;

	if (tagged && bpf_skb_vlan_push(skb, bpf_htons(ETH_P_8021Q), (__u16)(tagged << 12 | pkt->vlan)))
		return;
	for (__u32 number = 0; number < MIRRORS_MAX; number++)
		if (mirror_one(skb, MIRROR_KEY(port->slot, number), pkt, direction))
			break;
	if (tagged)
		bpf_skb_vlan_pop(skb);
	mark_set(skb, mark);
}
