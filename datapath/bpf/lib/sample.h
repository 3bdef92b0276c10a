/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Packet sampling (sFlow v5, https://sflow.org/sflow_version_5.txt): one in `rate` of the frames that pass a port, each
 * as they are on a wire.
 *
 * `pool` numbers the frames; `next` is the number of the one that is sampled next, each 1 .. 2 * rate - 1 behind the
 * one before, all as likely (the specification's random skip). Both are numbers of the port and not of a host, so that
 * the process goes on where it stood. Who moves `next` takes the sample: of frames that pass on two CPUs at once it is
 * the one or the other.
 */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "atomic.h"
#include "limit.h"
#include "maps.h"
#include "packet.h"
#include "vlan.h"

#define SAMPLES_A_FRAME    512       /* of a GSO frame at most; what is behind them is not sampled, and counted */
#define SAMPLE_INTERVAL_NS 200000ULL /* 5,000 a second of a port, 512 at once: a flood does not keep the agent busy */
#define SAMPLE_BURST_NS    102200000ULL

struct { /* slot -> what is sampled there; the agent maps it into its memory */
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SLOTS_DEFAULT);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct sampling);
	PINNED;
} samplings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22);
	PINNED;
} samples SEC(".maps");

struct sampler { /* one frame, on the stack of sample() */
	struct __sk_buff *skb;
	struct sampling *sampling;
	const struct packet *pkt;
	__u64 start; /* of the pool: the frame is the numbers start + 1 .. end */
	__u64 end;
	__u32 epoch;
	__u32 slot;
	int direction;
};

/* Bytes that each segment of a GSO frame begins with; 0 for a frame that is one on a wire. */
static __always_inline __u32 sample_headers(const struct sampler *s)
{
	__u32 frames = s->pkt->wire_packets;

	return frames > 1 ? (s->pkt->wire_frame_bytes - s->skb->len) / (frames - 1) : 0;
}

/* What the segment has on a wire: its headers are the frame's, behind them comes what it carries itself. */
static __always_inline void sample_segment(struct sampler *s, struct sample *sample, __u32 segment)
{
	__u32 headers = sample_headers(s), size = s->skb->gso_size, offset = headers + segment * size;

	sample->segment = segment;
	sample->headers = headers;
	sample->size = headers ? size : 0;
	sample->last = 1;
	sample->length = s->pkt->wire_frame_bytes;
	if (headers) {
		sample->last = offset + size >= s->skb->len;
		sample->length = headers + (sample->last ? s->skb->len - offset : size);
	}
}

/* Copies the first bytes of the segment that `sample` describes. */
static __always_inline void sample_copy(struct sampler *s, struct sample *sample, __u32 wanted)
{
	__u32 captured = sample->length < wanted ? sample->length : wanted, first = captured, rest = 0, offset;

	if (sample->headers && sample->headers < captured) {
		first = sample->headers;
		rest = captured - first;
	}
	offset = sample->headers + sample->segment * sample->size;
	sample->captured = 0;
	first = ((first - 1) & (SAMPLE_BYTES - 1)) + 1; /* the verifier wants a bound: 1 .. SAMPLE_BYTES */
	asm volatile("" : "+r"(first));
	if (bpf_skb_load_bytes(s->skb, 0, sample->data, first))
		return;
	if (rest) {
		rest = ((rest - 1) & (SAMPLE_BYTES - 1)) + 1;
		asm volatile("" : "+r"(rest));
		if (bpf_skb_load_bytes(s->skb, offset, sample->data + first, rest))
			return;
	}
	sample->captured = captured;
}

/* A record for the agent, of one segment of the frame (0: the first or only one). What finds no room is counted. */
static __noinline void sample_take(struct sampler *s, __u32 segment)
{
	struct sampling *sampling = s->sampling;
	struct sample *sample = NULL;
	int vid = s->direction == FROM_GUEST ? s->pkt->vlan : vlan_id(s->skb);

	if (limit_take(&sampling->due, SAMPLE_INTERVAL_NS, SAMPLE_BURST_NS))
		sample = bpf_ringbuf_reserve(&samples, sizeof(*sample), 0);
	if (!sample) {
		__sync_fetch_and_add(&sampling->drops, 1);
		return;
	}
	sample->pool = s->end;
	sample->drops = READ_ONCE(sampling->drops);
	sample->slot = s->slot;
	sample->epoch = s->epoch;
	sample->direction = s->direction;
	sample->vlan = vid > 0 ? vid : 0;
	sample_segment(s, sample, segment);
	sample_copy(s, sample, sampling->header_bytes);
	bpf_ringbuf_submit(sample, 0);
}

/* How far it is to the next one. */
static __always_inline __u64 sample_skip(__u32 rate)
{
	return 1 + bpf_get_prandom_u32() % (2 * (__u64)rate - 1);
}

static long sample_next(__u32 index, struct sampler *s)
{
	struct sampling *sampling = s->sampling;
	__u64 next = READ_ONCE(sampling->next), skip = sample_skip(sampling->rate);

	if (next > s->end)
		return 1;
	if (!next) /* the first frame of all */
		cas(&sampling->next, next, s->start + skip);
	else if (cas(&sampling->next, next, next + skip))
		sample_take(s, next > s->start ? next - s->start - 1 : 0);
	return 0;
}

/* The frame passed the port. Changes nothing of it. */
static __always_inline void sample(struct __sk_buff *skb, struct port *port, const struct packet *pkt, int direction)
{
	struct sampler s = {.skb = skb, .pkt = pkt, .slot = port->slot, .direction = direction};
	__u32 rate;
	__u64 next;

	s.sampling = bpf_map_lookup_elem(&samplings, &s.slot);
	if (!s.sampling)
		return;
	rate = READ_ONCE(s.sampling->rate);
	if (!rate)
		return;
	s.epoch = PORT_EPOCH(READ_ONCE(port->word));
	s.start = __sync_fetch_and_add(&s.sampling->pool, pkt->wire_packets);
	s.end = s.start + pkt->wire_packets;
	if (READ_ONCE(s.sampling->next) > s.end)
		return;
	bpf_loop(SAMPLES_A_FRAME, sample_next, &s, 0);
	next = READ_ONCE(s.sampling->next);
	if (next <= s.end && cas(&s.sampling->next, next, s.end + sample_skip(rate)))
		__sync_fetch_and_add(&s.sampling->drops, 1 + (s.end - next) / rate);
}
