/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Whether a TCP segment lies in its connection's window, as nf_conntrack's tcp_in_window() decides it: G. van Rooij,
 * "Real Stateful TCP Packet Filtering in IP Filter" (2001), and RFC 5961 for resets. Only a connection of which both
 * SYNs were seen is checked: without them nobody knows how its windows are scaled.
 *
 * In doubt a segment passes. What lies some windows behind is an old copy to its receiver, who answers and forgets it,
 * so it passes; a reset that is in the window and not exact passes, too, and ends nothing: the receiver challenges it
 * and the answer is exact. SACK needs nothing here: a window begins at what is acknowledged (RFC 2018).
 *
 * Sides are directions: FROM_GUEST what the guest sends. Packets of a connection are on several CPUs at once, and each
 * number only grows (RFC 1982), so each is raised by cmpxchg by itself.
 */
#pragma once

#include <linux/tcp.h>

#include "atomic.h"
#include "maps.h"
#include "packet.h"

enum window_result { /* of window_step(): OUTSIDE, or some of the others */
		     WINDOW_PASSES = 0,
		     WINDOW_MOVED = 1 << 0, /* what is known has changed */
		     WINDOW_KEEPS = 1 << 1, /* passes, and the connection's state stays as it is */
		     WINDOW_OUTSIDE = 1 << 2,
};

/* `state`: of the connection before the segment, CT_NONE when it begins one */
#define WINDOW_HOW(direction, state) ((__u32)(state) << 1 | (direction))
#define WINDOW_KNOWN                 (WINDOW_F_FROM | WINDOW_F_TO)
#define WINDOW_UNSCALED              0xffff
#define WINDOW_SCALE_MAX             14 /* RFC 7323, 2.3 */
#define WINDOW_TRIES                 4
#define WINDOW_OPTIONS               40 /* bytes of options at most */

struct segment { /* in host order */
	__u32 seq;
	__u32 end; /* behind its last byte; SYN and FIN count one each */
	__u32 ack;
	__u32 window;  /* as it is in the header */
	__u32 options; /* offset of the options in the frame */
	__u32 data;    /* where they end */
	__u8 flags;
};

static __always_inline int seq_after(__u32 one, __u32 other)
{
	return (__s32)(one - other) > 0;
}

/* True when it has grown. Who loses each time has lost to others that raised it. */
static __always_inline int window_raise(__u32 *number, __u32 to)
{
	__u32 old;

	for (int i = 0; i < WINDOW_TRIES; i++) {
		old = READ_ONCE(*number);
		if (!seq_after(to, old))
			return 0;
		if (__sync_val_compare_and_swap(number, old, to) == old)
			return 1;
	}
	return 0;
}

/* A GSO frame is one segment as long as all that it is on the wire. */
static __always_inline int window_read(struct __sk_buff *skb, const struct packet *pkt, struct segment *seg)
{
	struct tcphdr tcp = {}; /* written before it may be read: Linux 6.18 stumbles over one that a branch writes */
	__u32 headers;

	if (packet_load(skb, pkt->l4_offset, &tcp, sizeof(tcp)))
		return -1;
	headers = pkt->l4_offset - pkt->l3_offset + tcp.doff * 4;
	seg->flags = pkt->tcp_flags;
	seg->seq = bpf_ntohl(tcp.seq);
	seg->ack = bpf_ntohl(tcp.ack_seq);
	seg->window = bpf_ntohs(tcp.window);
	seg->end = seg->seq + pkt->wire_bytes - pkt->wire_packets * headers + !!(seg->flags & TCP_SYN) +
		   !!(seg->flags & TCP_FIN);
	seg->options = pkt->l4_offset + sizeof(tcp);
	seg->data = pkt->l4_offset + tcp.doff * 4;
	return 0;
}

/* The shift count of a SYN's window scale option. */
static __always_inline __u32 window_scale(struct __sk_buff *skb, const struct segment *seg)
{
	__u32 at = seg->options;
	__u8 option[3];

	for (int i = 0; i < WINDOW_OPTIONS && at + sizeof(option) <= seg->data; i++) {
		if (bpf_skb_load_bytes(skb, at, option, sizeof(option)) || !option[0])
			break;
		if (option[0] == 3)
			return option[2] > WINDOW_SCALE_MAX ? WINDOW_SCALE_MAX : option[2];
		if (option[0] != 1 && option[1] < 2)
			break;
		at += option[0] == 1 ? 1 : option[1];
	}
	return WINDOW_NO_SCALE;
}

/* A side's SYN was seen, or is inferred from the answer to it. `scale`: of its option. */
static __always_inline void window_begin(struct ct_entry *entry, const struct segment *seg, __u32 side, __u32 scale)
{
	__u32 word = READ_ONCE(entry->window) & (WINDOW_KNOWN | 0xff), other = !side;
	__u32 answers = seg->flags & TCP_ACK ? seg->ack : entry->window_end[other];

	WRITE_ONCE(entry->window_end[side], seg->end);
	WRITE_ONCE(entry->window_offered[side], seg->window);
	WRITE_ONCE(entry->window_acked[side], answers);
	WRITE_ONCE(entry->window_acked[other], seg->seq);
	WRITE_ONCE(entry->window_limit[side], seg->end + entry->window_offered[other]);
	WRITE_ONCE(entry->window_limit[other], answers + seg->window);
	word = (word & ~(15 << 4 * side)) | scale << 4 * side;
	WRITE_ONCE(entry->window, word | (side ? WINDOW_F_TO : WINDOW_F_FROM));
}

/* A SYN in mid-connection: its sender has begun anew, if the other side agrees (RFC 9293, 3.10.7.4). */
static __always_inline void window_note(struct ct_entry *entry, const struct segment *seg, __u32 side, __u32 scale)
{
	__u32 word = READ_ONCE(entry->window) & (WINDOW_KNOWN | WINDOW_F_UNCHECKED | 0xff);

	word |= scale << 4 * WINDOW_IGNORED | (side ? WINDOW_F_SYN_TO : WINDOW_F_SYN_FROM);
	WRITE_ONCE(entry->window, word | seg->end << 17);
}

/* Does this answer the SYN that was ignored? */
static __always_inline int window_agrees(__u32 word, const struct segment *seg, __u32 side)
{
	return word & (side ? WINDOW_F_SYN_FROM : WINDOW_F_SYN_TO) &&
	       WINDOW_NEXT(word) == (seg->ack & WINDOW_NEXT_MASK);
}

/* SYN and SYN-ACK, which are never outside. */
static __always_inline int window_open(struct __sk_buff *skb, struct ct_entry *entry, const struct segment *seg,
				       __u32 side, __u32 state)
{
	__u32 word = READ_ONCE(entry->window), other = !side, scale = window_scale(skb, seg);
	int early = state <= CT_SYN_SENT || state == CT_SYN_SENT2;
	struct segment syn = {.end = seg->ack, .seq = seg->ack - 1, .window = WINDOW_UNSCALED};

	if (!(seg->flags & TCP_ACK) && !early) {
		window_note(entry, seg, side, scale);
		return WINDOW_MOVED;
	}
	if (seg->flags & TCP_ACK && window_agrees(word, seg, side)) {
		window_begin(entry, &syn, other, WINDOW_SCALE(word, WINDOW_IGNORED));
	} else if (!early) {
		return WINDOW_PASSES; /* once more */
	} else if (seg->flags & TCP_ACK && word & (side ? WINDOW_F_FROM : WINDOW_F_TO) &&
		   entry->window_end[other] - seg->ack > WINDOW_UNSCALED) { /* of another connection. The guest knows */
		if (side == TO_GUEST)
			return WINDOW_KEEPS;
		WRITE_ONCE(entry->window_end[other], seg->ack);
	}
	window_begin(entry, seg, side, scale);
	return WINDOW_MOVED;
}

/* A reset of a connection that is not open yet: an answer to the SYN says which (RFC 9293, 3.10.7.3). */
static __always_inline int window_reset_early(struct ct_entry *entry, const struct segment *seg, __u32 side)
{
	__u32 word = READ_ONCE(entry->window);

	if (word & (side ? WINDOW_F_TO : WINDOW_F_FROM))
		return seg->seq == entry->window_end[side] ? WINDOW_PASSES : WINDOW_KEEPS;
	if (word & WINDOW_KNOWN)
		return entry->window_end[!side] - seg->ack > WINDOW_UNSCALED ? WINDOW_KEEPS : WINDOW_PASSES;
	return WINDOW_PASSES;
}

/* How far behind is still an old copy. */
static __always_inline __u32 window_behind(__u32 offered)
{
	__u64 behind = 4ull * (offered > WINDOW_UNSCALED ? offered : WINDOW_UNSCALED + 1);

	return behind > 1 << 30 ? 1 << 30 : behind;
}

static __always_inline int window_outside(const struct ct_entry *entry, const struct segment *seg, __u32 side)
{
	__u32 limit = READ_ONCE(entry->window_limit[side]), sent = READ_ONCE(entry->window_end[!side]);
	__u32 offered = READ_ONCE(entry->window_offered[!side]);

	if (seq_after(seg->seq, limit) && seq_after(seg->end, limit + offered)) /* some send more than they may */
		return 1;
	if (seq_after(READ_ONCE(entry->window_end[side]) - window_behind(offered), seg->end))
		return 1;
	if (!(seg->flags & TCP_ACK) || (seg->flags & TCP_RST && !seg->ack))
		return 0;
	return seq_after(seg->ack, sent) ||
	       seq_after(sent - window_behind(READ_ONCE(entry->window_offered[side])), seg->ack);
}

/* What a segment in the window says of both sides. */
static __always_inline int window_follow(struct ct_entry *entry, const struct segment *seg, __u32 side)
{
	__u32 word = READ_ONCE(entry->window), scale = WINDOW_SCALE(word, side), window = seg->window;
	int moved = window_raise(&entry->window_end[side], seg->end);

	if (scale != WINDOW_NO_SCALE && WINDOW_SCALE(word, !side) != WINDOW_NO_SCALE)
		window <<= scale;
	if (window > READ_ONCE(entry->window_offered[side])) {
		WRITE_ONCE(entry->window_offered[side], window);
		moved = 1;
	}
	moved |= window_raise(&entry->window_acked[side], seg->ack);
	moved |= window_raise(&entry->window_limit[!side], seg->ack + (window ?: 1)); /* a probe has a byte */
	return moved ? WINDOW_MOVED : WINDOW_PASSES;
}

/*
 * A TCP segment of a live or new connection; `how` is WINDOW_HOW. Changes what the entry says of windows. Returns enum
 * window_result. Global, so that it is verified once.
 */
__noinline int window_step(struct __sk_buff *skb, struct packet *pkt, struct ct_entry *entry, __u32 how)
{
	__u32 side = how & 1, state = how >> 1, word;
	struct segment seg;

	if (!pkt || !entry || window_read(skb, pkt, &seg))
		return WINDOW_PASSES;
	if (seg.flags & TCP_SYN)
		return window_open(skb, entry, &seg, side, state);
	word = READ_ONCE(entry->window);
	if ((word & (WINDOW_KNOWN | WINDOW_F_UNCHECKED)) != WINDOW_KNOWN)
		return seg.flags & TCP_RST && !(word & WINDOW_F_UNCHECKED) ? window_reset_early(entry, &seg, side)
									   : WINDOW_PASSES;
	if (window_outside(entry, &seg, side))
		return WINDOW_OUTSIDE;
	if (seg.flags & TCP_RST) {
		if (seg.seq == READ_ONCE(entry->window_acked[!side]) || seg.seq == READ_ONCE(entry->window_end[side]))
			return WINDOW_PASSES;
		return state <= CT_ESTABLISHED ? WINDOW_KEEPS : WINDOW_PASSES;
	}
	if (pkt->fragment == FRAGMENT_FIRST) { /* nobody sees how long it is */
		__sync_fetch_and_or(&entry->window, WINDOW_F_UNCHECKED);
		return WINDOW_MOVED;
	}
	return window_follow(entry, &seg, side);
}

/* The entry was written to, and is another connection's now. */
static __always_inline void window_give_up(struct ct_entry *entry)
{
	__sync_fetch_and_or(&entry->window, WINDOW_F_UNCHECKED);
}

/* Counts frames outside of a window. True when they are to be dropped. */
static __noinline int window_drops(__u32 slot, __u32 direction, __u32 packets)
{
	struct window_port *port = bpf_map_lookup_elem(&windows, &slot);

	if (!port)
		return 1;
	__sync_fetch_and_add(direction ? &port->outside[1] : &port->outside[0], packets);
	return !port->count_only;
}
