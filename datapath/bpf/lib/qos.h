/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Quality of service: a token bucket a direction, the code point, and the way through the shaper.
 *
 * The bucket is GCRA in one word (ITU-T I.371, annex A): `due` is when it will be full again. Whoever shapes has the
 * same bucket: what it admits beyond what HTB lets pass at once waits in HTB's queue, so what waits is part of the
 * debt. So the word knows all there is, a queue never overflows, and a queue that is emptied at once (the VM moves) has
 * cost its bytes.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/ip.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "atomic.h"
#include "count.h"
#include "maps.h"
#include "mark.h"
#include "packet.h"
#include "tunnel.h"
#include "vlan.h"

#define QOS_TRIES 8

static __always_inline struct qos *qos_of(__u32 slot, int direction)
{
	__u32 index = slot * 2 + (direction & 1);

	return bpf_map_lookup_elem(&qos, &index);
}

/* Takes the frame's bytes from the bucket. Returns 0 when they are not there: a frame larger than the bucket needs a
 * full one. */
static __always_inline int qos_take(struct qos *way, __u32 bytes)
{
	__u64 cost = (bytes * way->interval) >> QOS_SHIFT, now = bpf_ktime_get_ns(), old, from;
	__u64 room = cost < way->burst ? way->burst - cost : 0;

	for (int i = 0; i < QOS_TRIES; i++) {
		old = READ_ONCE(way->due);
		from = old > now ? old : now;
		if (from - now > room)
			return 0;
		if (cas(&way->due, old, from + cost))
			return 1;
	}
	__sync_fetch_and_add(&way->due, cost); /* many CPUs at once: it may pass, and it is paid for */
	return 1;
}

#define IPV4_DSCP bpf_htons(0x00fc) /* of the header's first 16 bits; RFC 3168 has the two bits below */
#define IPV6_DSCP bpf_htons(0x0fc0)

/* Writes the code point over the sender's. What cannot be written passes as it is. */
static __always_inline void qos_mark(struct __sk_buff *skb, const struct packet *pkt, __u8 dscp)
{
	__u32 offset = pkt->l3_offset;
	__be16 old, fresh;

	if ((pkt->l3 != L3_IPV4 && pkt->l3 != L3_IPV6) || packet_load(skb, offset, &old, sizeof(old)))
		return;
	if (pkt->l3 == L3_IPV4)
		fresh = (old & ~IPV4_DSCP) | bpf_htons(dscp << 2);
	else
		fresh = (old & ~IPV6_DSCP) | bpf_htons(dscp << 6);
	if (fresh == old)
		return;
	if (pkt->l3 == L3_IPV4)
		bpf_l3_csum_replace(skb, offset + __builtin_offsetof(struct iphdr, check), old, fresh, sizeof(fresh));
	bpf_skb_store_bytes(skb, offset, &fresh, sizeof(fresh), pkt->l3 == L3_IPV6 ? BPF_F_RECOMPUTE_CSUM : 0);
}

/*
 * A frame at a port that has qos in this direction: into the bucket, then marked. Returns enum drop_reason. Packet
 * pointers are void afterwards. Global, so that it is verified once.
 */
__noinline int qos_pass(struct __sk_buff *skb, struct packet *pkt, __u32 slot, int direction)
{
	struct qos *way = qos_of(slot, direction);

	if (!way || !pkt)
		return DROP_NONE;
	if ((way->flags & QOS_F_LIMIT) && !qos_take(way, pkt->wire_frame_bytes)) {
		__sync_fetch_and_add(&way->dropped_packets, pkt->wire_packets);
		__sync_fetch_and_add(&way->dropped_bytes, pkt->wire_frame_bytes);
		return way->flags & QOS_F_SHAPE ? DROP_SHAPE : DROP_POLICED;
	}
	if (way->flags & QOS_F_MARK)
		qos_mark(skb, pkt, way->dscp);
	skb->priority = way->priority;
	return DROP_NONE;
}

/* Where a frame of the guest goes next when it is shaped: to the queue of its port, as the guest sent it (with its
 * tag), out of which from_shaper takes it. Returns the verdict. */
static __always_inline int qos_wait(struct __sk_buff *skb, struct port *port, const struct qos *way, int vid,
				    __u32 path)
{
	if (vlan_add(skb, vid))
		return drop_at(skb, port, FROM_GUEST, DROP_VLAN);
	mark_set(skb, QOS_CLASS(port->slot));
	skb->priority = QOS_CLASS(port->slot);
	return send_to(skb, way->shaper, path);
}
