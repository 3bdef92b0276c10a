/* SPDX-License-Identifier: GPL-2.0-only */
/* How a connection comes into the table of its port: judged, then inserted, or in the place of one that is over. */
#pragma once

#include "acl.h"
#include "ct.h"
#include "evict.h"
#include "label.h"
#include "window.h"

struct tracking { /* on the stack of judge() */
	struct __sk_buff *skb;
	struct port *port;
	struct packet *pkt;
	void *table;
	__u64 policy; /* POLICY_WORD, read before any rule */
	__u64 now;    /* port time */
	struct ct_key key;
	__u32 slot;
	__u32 flags; /* enum port_flag */
	__u32 direction;
};

#define TRACK_AGAIN DROP_REASONS /* look up once more; never leaves track() */

struct { /* a new entry while it is written: 160 bytes are too much for the stack. Packet programs do not nest here. */
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct ct_entry);
} ct_scratch SEC(".maps");

/* acl_judge() left it to mark and label, which are those of `entry`; NULL: it begins. Returns ACL_LABELLED when it may
 * pass: label_give() has what the rule gives. */
static __noinline int track_labelled(struct tracking *t, const struct ct_entry *entry, int direction)
{
	int reason;

	label_show(entry);
	label_find(t->pkt, POLICY_GENERATION(t->policy), direction);
	label_choose(POLICY_GENERATION(t->policy));
	reason = label_settle(t->skb, t->port, t->pkt, t->policy, direction);
	return reason ? reason : ACL_LABELLED;
}

/* Of a packet that begins something, by the policy. Returns enum drop_reason, or ACL_LABELLED as track_labelled(). */
static __always_inline int track_judge(struct tracking *t, int direction)
{
	int reason = acl_judge(t->skb, t->port, t->pkt, t->policy, direction);

	return reason == ACL_LABELLED ? track_labelled(t, NULL, direction) : reason;
}

static __noinline void track_would_drop(__u32 slot)
{
	struct counters *count = bpf_map_lookup_elem(&counters, &slot);

	if (count)
		count->would_drop++;
}

static __always_inline int track_full(struct tracking *t)
{
	__u32 alarms = __sync_fetch_and_add(&t->port->alarm_full, 1) + 1;

	if (!(alarms & (alarms - 1))) /* at 1, 2, 4, 8 ...: a flood of connections is not a flood of events */
		event_send(t->skb, t->slot, EVENT_WHAT(EVENT_FULL, t->direction, DROP_CT_FULL), 0);
	return DROP_CT_FULL;
}

/* ct_entry.tcp_flags of a connection that this packet begins */
static __always_inline __u32 track_flags(const struct tracking *t)
{
	if (!flow_exported(t->port) || t->pkt->proto != IPPROTO_TCP)
		return 0;
	return (__u32)t->pkt->tcp_flags << (t->direction ? 8 : 0);
}

/* Are windows of this packet's connection checked? */
static __always_inline int track_windowed(const struct tracking *t)
{
	return READ_ONCE(t->port->features) & FEATURE_WINDOW && t->pkt->proto == IPPROTO_TCP;
}

/* Beside CT_WORD without id, in the id's place: label_give() has something for it. */
#define OPENING_GIVEN (1ull << 32)

/* A new entry; `opening` is CT_WORD without id, and OPENING_GIVEN. */
static __always_inline int track_insert(struct tracking *t, __u64 opening)
{
	__u32 zero = 0, direction = t->direction & 1;
	struct ct_entry *entry = bpf_map_lookup_elem(&ct_scratch, &zero);
	long error;

	if (!entry)
		return DROP_CT_RACE;
	__builtin_memset(entry, 0, sizeof(*entry));
	entry->id = ct_new_id();
	entry->word = (__u32)opening | CT_WORD(0, 0, entry->id);
	entry->seen = t->now;
	entry->judged = POLICY_DIGEST(t->policy);
	entry->packets[direction] = t->pkt->wire_packets;
	entry->bytes[direction] = t->pkt->wire_bytes;
	entry->began = t->now;
	entry->tcp_flags = track_flags(t);
	if (opening & OPENING_GIVEN)
		label_give(entry, 1);
	if (track_windowed(t))
		window_step(t->skb, t->pkt, entry, WINDOW_HOW(direction, CT_NONE));
	error = bpf_map_update_elem(t->table, &t->key, entry, BPF_NOEXIST);
	if ((error == -E2BIG || error == -ENOMEM) && evict_one(t->table, t->port))
		error = bpf_map_update_elem(t->table, &t->key, entry, BPF_NOEXIST);
	if (error == -EEXIST)
		return TRACK_AGAIN;
	if (error == -E2BIG || error == -ENOMEM)
		return track_full(t);
	if (error)
		return DROP_CT_RACE;
	mark_dirty(t->slot, &t->key);
	return DROP_NONE;
}

/* Another connection in the place of one that is over or expired: DEAD first, so that whoever still holds the old one
 * fails and its counts are the last ones, then the fields, then the new generation. */
static __always_inline int track_renew(struct tracking *t, struct ct_entry *entry, __u64 old, __u64 opening)
{
	__u64 id = ct_new_id(), word = (__u32)opening | CT_WORD(0, 0, id);

	if (!cas(&entry->word, old, old | CT_WORD_FLAG(CT_F_DEAD)))
		return DROP_CT_RACE;
	flow_end_now(t->slot, &t->key, entry, FLOW_ENDED);
	WRITE_ONCE(entry->seen, t->now);
	WRITE_ONCE(entry->began, t->now);
	WRITE_ONCE(entry->tcp_flags, track_flags(t));
	WRITE_ONCE(entry->id, id);
	WRITE_ONCE(entry->judged, POLICY_DIGEST(t->policy));
	label_give(entry, !!(opening & OPENING_GIVEN));
	WRITE_ONCE(entry->window, 0);
	if (track_windowed(t))
		window_step(t->skb, t->pkt, entry, WINDOW_HOW(t->direction, CT_NONE));
	for (int i = 0; i < 2; i++) {
		WRITE_ONCE(entry->packets[i], 0);
		WRITE_ONCE(entry->bytes[i], 0);
		WRITE_ONCE(entry->carried_packets[i], 0);
		WRITE_ONCE(entry->carried_bytes[i], 0);
	}
	cas(&entry->word, old | CT_WORD_FLAG(CT_F_DEAD), word); /* a full barrier */
	mark_dirty(t->slot, &t->key);
	return ct_touch(t->slot, &t->key, entry, word, t->now, t->pkt, t->direction);
}

/* How a connection begins: CT_WORD without id, and who opened it. word 0: the packet passes without one. */
struct opening {
	__u64 word;
	__u32 direction;
	__u32 given; /* its rule gives it mark or label */
};

static __always_inline int track_ask(struct tracking *t, struct opening *opening)
{
	int reason = track_judge(t, opening->direction);

	opening->given = reason == ACL_LABELLED;
	return opening->given ? DROP_NONE : reason;
}

/*
 * Learning: what may be in the middle of a connection that is older than the port is never dropped. It is taken up as
 * opened in the direction that the policy allows; what the policy allows in neither passes untracked.
 */
static __always_inline int track_learn(struct tracking *t, struct opening *opening)
{
	int reason = track_ask(t, opening), middle = !opening->word;

	opening->word = CT_WORD(CT_NEW, CT_F_LEARNED, 0);
	if (t->pkt->proto == IPPROTO_TCP)
		opening->word = CT_WORD(CT_ESTABLISHED, CT_F_LEARNED | CT_F_REPLIED | CT_F_ASSURED, 0);
	if (middle || reason)
		track_would_drop(t->slot);
	if (reason) {
		opening->direction = !opening->direction;
		reason = track_ask(t, opening);
	}
	/* in the middle there is nothing to follow from an end, or from the answer to a query */
	if (reason || (middle && (t->pkt->proto != IPPROTO_TCP || t->pkt->tcp_flags & (TCP_FIN | TCP_RST))))
		opening->word = 0;
	return DROP_NONE;
}

/* No live connection has this key. `entry` is one that expired or is over, with its word `old`, or NULL. */
static __noinline int track_begin(struct tracking *t, struct ct_entry *entry, __u64 old)
{
	struct opening opening = {.word = ct_opening(t->pkt), .direction = t->direction};
	int reason = DROP_CT_INVALID;

	if (t->flags & PORT_F_LEARNING && opening.word != CT_SYN_SENT)
		reason = track_learn(t, &opening);
	else if (opening.word)
		reason = track_ask(t, &opening);
	if (reason || !opening.word)
		return reason;
	if (opening.direction == TO_GUEST)
		opening.word |= CT_WORD_FLAG(CT_F_INBOUND);
	if (opening.given)
		opening.word |= OPENING_GIVEN;
	return entry ? track_renew(t, entry, old, opening.word) : track_insert(t, opening.word);
}
