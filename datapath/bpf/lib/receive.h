/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What a guest sends: open, hold, classify, check, judge, learn, forward. Shared by the port's device and by the hold
 * tap whose frames are as if the guest sent them now.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

#include "atomic.h"
#include "count.h"
#include "flood.h"
#include "gate.h"
#include "judge.h"
#include "l2.h"
#include "maps.h"
#include "mark.h"
#include "observe.h"
#include "packet.h"
#include "plain.h"
#include "qos.h"
#include "remap.h"
#include "spoof.h"
#include "vlan.h"

#define OPEN_ATTEMPTS 4 /* the word changes meanwhile only by a flag */

/*
 * The guest's first frame: it runs here. Opens a staged port whose epoch was committed, so that the guest waits for no
 * agent. Returns the port's state after it.
 */
static __noinline __u8 receive_open(struct __sk_buff *skb, struct port *port)
{
	__u64 word = READ_ONCE(port->word);
	int shut;

	for (int i = 0; i < OPEN_ATTEMPTS; i++) {
		if (PORT_STATE(word) != PORT_STAGED || !PORT_EPOCH(word) || READ_ONCE(port->commit) != PORT_EPOCH(word))
			break;
		if (cas(&port->word, word, (word & ~0xffULL) | PORT_ACTIVE)) {
			shut = !!(PORT_FLAGS(word) & PORT_F_AWAITS_SOURCE);
			WRITE_ONCE(port->gate, GATE_WORD(GATE_LOCAL, shut));
			l2_take(port, port->network, 0);
			event_send(skb, port->slot, EVENT_WHAT(EVENT_OPENED, FROM_GUEST, DROP_NONE), 0);
			return PORT_ACTIVE;
		}
		word = READ_ONCE(port->word);
	}
	return PORT_STATE(word);
}

/*
 * Frames of a guest that the port may not pass yet, and those behind them, wait: at the destination before the commit,
 * at the source when the guest runs again before the agent knows that the move failed. Returns enum drop_reason.
 */
static __always_inline int receive_hold(struct __sk_buff *skb, struct port *port, __u8 state)
{
	int reason;

	if (state != PORT_ACTIVE && lease_passed(port))
		return DROP_LEASE;
	reason = hold(skb, &port->held_from, port->hold_from);
	if (!reason)
		count_held(port->slot, FROM_GUEST);
	return reason;
}

/* The network of a frame from the port, its tag taken off: index in `networks`, or 0 for a tag that the port may not
 * use. */
static __noinline __u32 receive_network(struct __sk_buff *skb, struct port *port, int tag)
{
	struct trunk_key key = {.slot = port->slot, .vid = tag & VLAN_ID_MASK};
	__u32 *network;

	if (tag < 0 || vlan_strip(skb))
		return 0;
	if (!key.vid)
		return port->network;
	if (!(port_flags(port) & PORT_F_TRUNK))
		return 0;
	network = bpf_map_lookup_elem(&trunks, &key);
	if (!network)
		return 0;
	/* it has come: its frame is answered here, perhaps before the agent has written where it is in that network */
	if (port_flags(port) & PORT_F_UNSETTLED)
		l2_take(port, *network, key.vid);
	return *network;
}

/* Whether the frame has a sender that it may have. Returns enum drop_reason. Apart, as the next one is: the stack of
 * receive_check() stands under the deepest chain of calls. */
static __noinline int receive_sender(struct __sk_buff *skb, struct port *port, struct packet *pkt, __u32 network)
{
	struct ethhdr eth;
	int reason = DROP_NONE;

	if (l2_macs(skb, &eth))
		return DROP_MALFORMED;
	if (port_flags(port) & PORT_F_ANTISPOOF)
		reason = spoof_check(skb, port, pkt, network, eth.h_source);
	if (!reason && mac_is_group(eth.h_source))
		reason = DROP_SPOOF_MAC;
	return reason;
}

/* Learns who sent it, behind the port. Returns enum drop_reason. */
static __noinline int receive_learn(struct __sk_buff *skb, struct port *port, __u32 network, __u32 vid)
{
	struct ethhdr eth;

	if (l2_macs(skb, &eth))
		return DROP_MALFORMED;
	return mac_equal(eth.h_source, port->mac) ? DROP_NONE : l2_learn_port(port, network, eth.h_source, vid);
}

/* From the port's own MAC: nothing to ask of it, and nothing to learn. */
static __always_inline int receive_is_own(struct __sk_buff *skb, const struct port *port)
{
	struct ethhdr eth;

	return !l2_macs(skb, &eth) && mac_equal(eth.h_source, port->mac) && !mac_is_group(eth.h_source);
}

/* A frame from the port's own MAC whose sender needs no closer look, as nearly all. */
static __always_inline int receive_is_plain(const struct port *port, const struct packet *pkt)
{
	return !(port_flags(port) & PORT_F_ANTISPOOF) || spoof_is_plain(port, pkt);
}

/* Everything between the network of a frame and its forwarding; `tag`: as it came. Returns enum drop_reason. */
static __always_inline int receive_check(struct __sk_buff *skb, struct port *port, __u32 network, __u32 tag)
{
	struct packet pkt = {};
	int reason = parse_frame(skb, &pkt, FROM_GUEST), own;

	if (reason)
		return reason;
	pkt.vlan = tag & VLAN_ID_MASK;
	pkt.tagged = VLAN_TAG_REST(tag);
	own = receive_is_own(skb, port);
	if (!own || !receive_is_plain(port, &pkt))
		reason = receive_sender(skb, port, &pkt, network);
	if (!reason && (port->features & FEATURE_POLICE_FROM))
		reason = qos_pass(skb, &pkt, port->slot, FROM_GUEST);
	if (!reason && !(port_flags(port) & PORT_F_STATELESS))
		reason = judge(skb, port, &pkt, FROM_GUEST);
	if (!reason && !own)
		reason = receive_learn(skb, port, network, pkt.vlan);
	if (!reason && port->features & FEATURES_OBSERVE)
		observe(skb, port, &pkt, FROM_GUEST);
	if (!reason && port->features & FEATURE_REMAP)
		reason = remap_from_guest(skb, port, &pkt);
	if (!reason)
		count_passed(skb, port, &pkt, FROM_GUEST);
	return reason;
}

/*
 * A frame of the guest of `port`. `path`: PATH_PASSED for one that was held already, PATH_CLONE when the caller keeps
 * the frame. Returns the verdict. Inline: a chain of calls may be 8 deep, and judge() and forward() need them.
 */
static __always_inline int receive(struct __sk_buff *skb, struct port *port, __u32 path)
{
	__u32 network, slot = port->slot;
	struct qos *way = NULL;
	int reason = DROP_NONE, tag;
	__u8 state;

	state = PORT_STATE(READ_ONCE(port->word));
	if (state == PORT_STAGED)
		state = receive_open(skb, port);
	if (state == PORT_STAGED || state == PORT_QUIESCED ||
	    (state == PORT_ACTIVE && !(path & PATH_PASSED) && READ_ONCE(port->held_from))) {
		reason = receive_hold(skb, port, state);
		return reason ? drop_at(skb, port, FROM_GUEST, reason) : TC_ACT_SHOT;
	}
	if (state != PORT_ACTIVE)
		return drop_at(skb, port, FROM_GUEST, DROP_NOT_ACTIVE);
	tag = vlan_tag(skb);
	network = tag ? receive_network(skb, port, tag) : port->network;
	if (!network)
		return drop_at(skb, port, FROM_GUEST,
			       tag & VLAN_ID_MASK || vlan_tagged(skb) ? DROP_VLAN : DROP_NO_NETWORK);
	if (!mark_take(skb)) { /* marked: the switch's own answer for the guest, a reject */
		reason = receive_check(skb, port, network, tag);
		if (port->features & FEATURE_SHAPE)
			way = qos_of(slot, FROM_GUEST);
	} else if (port->features & FEATURE_REMAP) {
		reason = remap_answer(skb, port);
	}
	if (reason)
		return drop_at(skb, port, FROM_GUEST, reason);
	if (way)
		return qos_wait(skb, port, way, tag & VLAN_ID_MASK, path & PATH_CLONE);
	return forward(skb, network, SOURCE(L2_PORT, slot), path & PATH_CLONE);
}
