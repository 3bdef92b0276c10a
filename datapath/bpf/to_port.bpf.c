// SPDX-License-Identifier: GPL-2.0-only
/* Egress of a VM's device: the last judgement before the guest. The frame has the tag that the guest is to see. */
#include "lib/count.h"
#include "lib/device.h"
#include "lib/judge.h"
#include "lib/maps.h"
#include "lib/mark.h"
#include "lib/observe.h"
#include "lib/plain.h"
#include "lib/qos.h"
#include "lib/remap.h"

static __always_inline int to_port_check(struct __sk_buff *skb, struct port *port)
{
	struct packet pkt = {};
	int reason = parse_frame(skb, &pkt, TO_GUEST);

	if (!reason && port->features & FEATURE_REMAP)
		reason = remap_to_guest(skb, port, &pkt);
	if (!reason && !(port_flags(port) & PORT_F_STATELESS))
		reason = judge(skb, port, &pkt, TO_GUEST);
	if (!reason && (port->features & FEATURE_POLICE_TO))
		reason = qos_pass(skb, &pkt, port->slot, TO_GUEST);
	if (!reason)
		count_passed(skb, port, &pkt, TO_GUEST);
	if (!reason && port->features & FEATURES_OBSERVE)
		observe(skb, port, &pkt, TO_GUEST);
	return reason;
}

SEC("tc")
int to_port(struct __sk_buff *skb)
{
	struct port *port = device_port(skb->ifindex);
	int reason;

	if (!port)
		return drop_slot(skb, 0, TO_GUEST, DROP_NO_PORT);
	if (mark_take(skb)) /* judged and counted where it comes from */
		return TC_ACT_OK;
	if (PORT_STATE(READ_ONCE(port->word)) != PORT_ACTIVE)
		return drop_at(skb, port, TO_GUEST, DROP_NOT_ACTIVE);
	if ((port_flags(port) & PORT_F_BRIDGED) && !mark_takes(skb, SKB_MARK_SENT))
		return drop_at(skb, port, TO_GUEST, DROP_NOT_OURS);
	reason = to_port_check(skb, port);
	return reason ? drop_at(skb, port, TO_GUEST, reason) : TC_ACT_OK;
}
