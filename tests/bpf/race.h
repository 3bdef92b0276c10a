/* SPDX-License-Identifier: GPL-2.0-only */
/* Many connections touched in one run, to race with a sweep: one packet or one reset each, as fast as can be. */
#pragma once

#include "lib/judge.h"

#define RACE_LENGTH 4096

struct { /* connection -> verdict of its packet */
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, RACE_LENGTH);
	__type(key, __u32);
	__type(value, __u32);
} race_verdicts SEC(".maps");

struct race {
	struct __sk_buff *skb;
	struct port *port;
	void *table;
};

/* TCP, 10.0.0.1:40000 to 192.0.2.9:index */
static __always_inline void race_packet(struct packet *pkt, __u32 index)
{
	pkt->l3 = L3_IPV4;
	pkt->proto = IPPROTO_TCP;
	pkt->tcp_flags = TCP_ACK;
	addr_map_v4(pkt->laddr, bpf_htonl(0x0a000001));
	addr_map_v4(pkt->raddr, bpf_htonl(0xc0000209));
	pkt->lport = bpf_htons(40000);
	pkt->rport = bpf_htons(index);
	pkt->wire_packets = 1;
	pkt->wire_bytes = 40;
}

static long race_send(__u32 index, struct race *race)
{
	__u32 *verdict = bpf_map_lookup_elem(&race_verdicts, &index);
	struct packet pkt = {};

	if (!verdict)
		return 1;
	race_packet(&pkt, index);
	*verdict = judge(race->skb, race->port, &pkt, FROM_GUEST);
	return 0;
}

/* Live and not seen for ever */
static long race_rewind(__u32 index, struct race *race)
{
	struct packet pkt = {};
	struct ct_key key;
	struct ct_entry *entry;

	race_packet(&pkt, index);
	ct_key_of(&key, &pkt);
	entry = bpf_map_lookup_elem(race->table, &key);
	if (!entry)
		return 1;
	entry->seen = 1;
	entry->word &= ~CT_WORD_FLAG(CT_F_DYING);
	return 0;
}

static __always_inline int race(struct __sk_buff *skb, void *callback)
{
	struct race race = {.skb = skb};
	__u32 slot = skb->mark;

	race.port = bpf_map_lookup_elem(&ports, &slot);
	race.table = bpf_map_lookup_elem(&conntracks, &slot);
	if (!race.port || !race.table)
		return 0;
	return bpf_loop(RACE_LENGTH, callback, &race, 0);
}

SEC("tc")
int race_packets(struct __sk_buff *skb)
{
	return race(skb, race_send);
}

SEC("tc")
int race_reset(struct __sk_buff *skb)
{
	return race(skb, race_rewind);
}
