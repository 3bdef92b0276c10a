// SPDX-License-Identifier: GPL-2.0-only
/* What bench/programs.py puts before a program under test, so that BPF_PROG_RUN can repeat what changes its frame. */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define HEAD        64
#define SOURCE_PORT 34 /* in a frame of UDP over IPv4 */

struct { /* the program under test; nothing there: this one's own cost */
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} tested SEC(".maps");

struct head {
	__u8 bytes[HEAD];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct head);
} heads SEC(".maps");

SEC("tc") int nothing(struct __sk_buff *skb)
{
	return TC_ACT_OK;
}

/* Each time another connection: the next source port. */
SEC("tc") int next(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__be16 *port = data + SOURCE_PORT;

	if ((void *)(port + 1) > end)
		return TC_ACT_SHOT;
	*port = bpf_htons(bpf_ntohs(*port) + 1);
	bpf_tail_call(skb, &tested, 0);
	return TC_ACT_OK;
}

/* Each time the same frame, whatever became of it. */
SEC("tc") int again(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct head *head = bpf_map_lookup_elem(&heads, &zero);

	if (!head || bpf_skb_store_bytes(skb, 0, head->bytes, HEAD, 0))
		return TC_ACT_SHOT;
	bpf_tail_call(skb, &tested, 0);
	return TC_ACT_OK;
}

char _license[] SEC("license") = "GPL";
