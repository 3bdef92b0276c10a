/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The last step towards a VM, and the first out of it: hold, redirect or pass. types.h (struct port) says what a gate
 * is; here is the order in which it is read, which keeps frames in order while the agent opens and shuts it.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

#include "atomic.h"
#include "count.h"
#include "maps.h"
#include "mark.h"
#include "packet.h"
#include "tunnel.h"
#include "vlan.h"

static __always_inline int lease_passed(const struct port *port)
{
	return port->lease && bpf_ktime_get_ns() > port->lease;
}

/*
 * Puts a copy of the frame into a hold tap. `held` is raised first: whoever sees it at 0 knows that no frame waits. It
 * is bounded here because a tap behind a queue discipline swallows what it cannot hold without saying so, which would
 * leave `held` raised for ever. Returns enum drop_reason.
 */
static __always_inline int hold(struct __sk_buff *skb, __s64 *held, __u32 ifindex)
{
	if (!ifindex)
		return DROP_NO_HOLD;
	if (__sync_fetch_and_add(held, 1) < HOLD_FRAMES && !bpf_clone_redirect(skb, ifindex, 0))
		return DROP_NONE;
	__sync_fetch_and_add(held, -1);
	return DROP_HOLD_FULL;
}

/* Sends the frame after the VM to the host it moved to. Returns the verdict, TC_ACT_SHOT after counting why not. */
static __always_inline int gate_redirect(struct __sk_buff *skb, struct port *port, __u32 path)
{
	__u32 mark = MARK_REDIRECT | PATH_HOPS(path) | (path & PATH_JUDGED ? MARK_JUDGED : 0);
	int verdict;

	/* Its VM may have come from where this one went: what it sent there came by itself and waits, this is newer. */
	if (path & PATH_LOCAL)
		mark |= MARK_LOCAL;
	if (PATH_HOPS(path) >= HOPS_MAX)
		return drop_at(skb, port, TO_GUEST, DROP_HOPS);
	/* the destination gets what its own network floods, once its guest runs there */
	if (path & PATH_FLOOD)
		return drop_at(skb, port, TO_GUEST, DROP_BROADCAST_PATH);
	if (lease_passed(port))
		return drop_at(skb, port, TO_GUEST, DROP_LEASE);
	verdict = tunnel_send(skb, port->remote, port->channel, mark, path);
	if (verdict == TC_ACT_SHOT)
		return drop_at(skb, port, TO_GUEST, DROP_TUNNEL);
	if (!(path & PATH_LOCAL)) /* ports of this host do not keep it alive: they learn the place when it ends */
		port->redirected = bpf_ktime_get_ns();
	count_redirected(skb, port->slot);
	return verdict;
}

/* Hands the frame to the port's device, where to_port judges it. */
static __always_inline int gate_pass(struct __sk_buff *skb, struct port *port, __u32 path)
{
	__u64 word = READ_ONCE(port->word);
	__u32 judged = path & PATH_JUDGED;
	int verdict;

	if (!port->ifindex)
		return drop_at(skb, port, TO_GUEST, DROP_NO_PLACE);
	if (judged && PORT_STATE(word) != PORT_ACTIVE)
		return drop_at(skb, port, TO_GUEST, DROP_NOT_ACTIVE);
	if ((PORT_FLAGS(word) & PORT_F_NO_BROADCAST) && (path & PATH_FLOOD))
		return drop_at(skb, port, TO_GUEST, DROP_BROADCAST_PATH);
	if (judged)
		mark_set(skb, SKB_MARK_JUDGED);
	else
		mark_set(skb, PORT_FLAGS(word) & PORT_F_BRIDGED ? SKB_MARK_SENT : 0);
	verdict = send_to(skb, port->ifindex, path);
	if (path & PATH_CLONE)
		mark_set(skb, 0); /* the copy has it: the frame goes on, perhaps to another device */
	return verdict;
}

/*
 * A VM that has just moved here: its shut gate holds what comes by itself until the source has passed on what it held,
 * or the order of a flow would break. What the source sends goes past the hold: PATH_PASSED is added to `path`. What is
 * flooded does not wait, not even while the port opens (its gate is there before its state): the source holds the same.
 * Returns enum drop_reason.
 */
static __always_inline int gate_source_first(const struct port *port, __u32 *path)
{
	__u64 word = READ_ONCE(port->word);

	if (!(PORT_FLAGS(word) & PORT_F_AWAITS_SOURCE))
		return DROP_NONE;
	if (*path & PATH_FLOOD)
		return DROP_BROADCAST_PATH;
	if (*path & PATH_MOVED && PORT_STATE(word) == PORT_ACTIVE)
		*path |= PATH_PASSED;
	return DROP_NONE;
}

/*
 * Has a hold outlived its reason? The port is active and its lease has passed: the agent died before it stopped the
 * guest, or the source of a VM that has moved here is dead. The guest runs here and gets what comes; what is held
 * already waits for the agent.
 */
static __always_inline int gate_hold_over(const struct port *port, __u64 gate)
{
	return GATE_TARGET(gate) == GATE_LOCAL && PORT_STATE(READ_ONCE(port->word)) == PORT_ACTIVE;
}

/*
 * Sends the frame to the port in `slot`, as the guest is to see it (with its tag). Returns the verdict; with PATH_CLONE
 * it has no meaning. Whatever ends here is counted at the port, but for flooded frames that find no gate: a staged port
 * is no member yet.
 */
__noinline int deliver(struct __sk_buff *skb, __u32 slot, __u32 path)
{
	struct port *port = bpf_map_lookup_elem(&ports, &slot);
	__u64 gate;
	int reason;

	if (!port || !slot)
		return drop_slot(skb, 0, TO_GUEST, DROP_NO_PORT);
	gate = READ_ONCE(port->gate);
	if (GATE_TARGET(gate) == GATE_NONE && !GATE_SHUT(gate))
		return path & PATH_FLOOD ? TC_ACT_SHOT : drop_at(skb, port, TO_GUEST, DROP_NO_PLACE);
	reason = gate_source_first(port, &path);
	if (reason)
		return drop_at(skb, port, TO_GUEST, reason);
	if (GATE_SHUT(gate) && lease_passed(port) && !(path & (PATH_PASSED | PATH_JUDGED))) {
		if (!gate_hold_over(port, gate))
			return drop_at(skb, port, TO_GUEST, DROP_LEASE);
		path |= PATH_PASSED;
	}
	if (!(path & (PATH_PASSED | PATH_JUDGED)) && (GATE_SHUT(gate) || READ_ONCE(port->held_to))) {
		/* that tag is the switch's own there (mirror_hold.h): who forges it would get past the policy */
		reason = vlan_is_copy(skb) ? DROP_VLAN : hold(skb, &port->held_to, port->hold_to);
		if (reason)
			return drop_at(skb, port, TO_GUEST, reason);
		count_held(slot, TO_GUEST);
		return TC_ACT_SHOT; /* the copy waits */
	}
	if (GATE_TARGET(gate) == GATE_REDIRECT)
		return gate_redirect(skb, port, path);
	if (GATE_TARGET(gate) == GATE_LOCAL)
		return gate_pass(skb, port, path);
	return drop_at(skb, port, TO_GUEST, DROP_NO_PLACE);
}
