/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A packet on its way through the connection table of its port: follow, judge again, begin.
 */
#pragma once

#include "begin.h"

#define TRACK_TRIES 3

/* What was allowed under another policy, or with another mark or label, is judged again, as the direction that opened
 * it.
 */
static __noinline int track_again(struct tracking *t, struct ct_entry *entry, __u64 word)
{
	int direction = ACL_AGAIN | (CT_FLAGS(word) & CT_F_INBOUND ? ACL_TO : ACL_FROM);
	__u32 judged = READ_ONCE(entry->judged);
	int reason = acl_judge(t->skb, t->port, t->pkt, t->policy, direction);

	if (reason == ACL_LABELLED)
		reason = track_labelled(t, entry, direction);
	if (reason == DROP_NONE || reason == ACL_LABELLED) {
		/* not where an operator has changed mark or label meanwhile: then it is judged once more */
		__sync_val_compare_and_swap(&entry->judged, judged, POLICY_DIGEST(t->policy));
		mark_dirty(t->slot, &t->key);
		return DROP_NONE;
	}
	if (reason == DROP_CT_RACE)
		return reason;
	if (t->flags & PORT_F_LEARNING) {
		track_would_drop(t->slot);
		return DROP_NONE;
	}
	ct_kill(t->table, t->slot, &t->key, entry, word, FLOW_FORCED);
	return reason;
}

/* Whether the entry may live under the policy as it is now. */
static __always_inline int track_allowed(struct tracking *t, struct ct_entry *entry, __u64 word)
{
	__u32 digest = POLICY_DIGEST(t->policy);

	if (digest && READ_ONCE(entry->judged) == digest)
		return DROP_NONE;
	return track_again(t, entry, word);
}

/* The word after a segment that would make it `next`; CT_NEXT_INVALID for one that is to be dropped. */
static __always_inline __u64 track_window(struct tracking *t, struct ct_entry *entry, __u64 word, __u64 next)
{
	int found = window_step(t->skb, t->pkt, entry, WINDOW_HOW(t->direction, CT_STATE(word)));

	if (found == WINDOW_OUTSIDE) {
		if (t->flags & PORT_F_LEARNING)
			track_would_drop(t->slot);
		else if (window_drops(t->slot, t->direction, t->pkt->wire_packets))
			return CT_NEXT_INVALID;
		return word;
	}
	if (found & WINDOW_MOVED) {
		t->key.type = CT_TYPE_WINDOW;
		mark_dirty(t->slot, &t->key);
		t->key.type = CT_TYPE_CONNECTION;
	}
	return found & WINDOW_KEEPS ? word : next;
}

static __always_inline int track_follow(struct tracking *t, struct ct_entry *entry, __u64 word)
{
	int reason = track_allowed(t, entry, word);
	__u64 next;

	if (reason)
		return reason;
	next = ct_next(word, t->pkt, t->direction);
	if (next == CT_NEXT_REOPENS)
		return track_begin(t, entry, word);
	if (next == CT_NEXT_INVALID) {
		if (!(t->flags & PORT_F_LEARNING))
			return DROP_CT_INVALID;
		track_would_drop(t->slot);
		return DROP_NONE;
	}
	if (track_windowed(t)) {
		next = track_window(t, entry, word, next);
		if (next == CT_NEXT_INVALID)
			return DROP_WINDOW;
	}
	if (next != word) {
		if (!cas(&entry->word, word, next))
			return TRACK_AGAIN;
		mark_dirty(t->slot, &t->key);
	}
	if (flow_exported(t->port) && t->pkt->proto == IPPROTO_TCP)
		flow_note(entry, t->pkt, t->direction);
	reason = ct_touch(t->slot, &t->key, entry, next, t->now, t->pkt, t->direction);
	if (reason && track_windowed(t))
		window_give_up(entry);
	return reason;
}

/* Returns enum drop_reason. */
static __always_inline int track(struct tracking *t)
{
	struct ct_entry *entry;
	int reason = TRACK_AGAIN;
	__u64 word;

	if (t->pkt->proto == IPPROTO_TCP && !tcp_flags_valid(t->pkt->tcp_flags))
		return DROP_CT_INVALID;
	for (int i = 0; i < TRACK_TRIES && reason == TRACK_AGAIN; i++) {
		entry = bpf_map_lookup_elem(t->table, &t->key);
		word = entry ? READ_ONCE(entry->word) : 0;
		if (CT_FLAGS(word) & CT_F_DEAD)
			return DROP_CT_RACE;
		if (entry && ct_is_live(word))
			reason = track_follow(t, entry, word);
		else
			reason = track_begin(t, entry, word);
	}
	return reason == TRACK_AGAIN ? DROP_CT_RACE : reason;
}
