/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * VLAN tags. Inside the switch a frame has no tag: it is taken off where the frame enters a network and put on where
 * it leaves to an uplink or a trunk port. At ingress the kernel has moved the outer tag out of the data (accelerated).
 */
#pragma once

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define VLAN_SIZE    4
#define VLAN_ID_MASK 0x0fff
#define VLAN_UNKNOWN -1      /* tagged with what is not 802.1Q */
#define VLAN_TAG     0x10000 /* there is a tag */

/* The tag of a mirror's copy in a hold tap: a service tag with the id that IEEE 802.1Q reserves */
#define VLAN_COPY 0x0fff

static __always_inline int vlan_is_copy(struct __sk_buff *skb)
{
	return skb->vlan_present && skb->vlan_proto == bpf_htons(ETH_P_8021AD) && (skb->vlan_tci & 0xffff) == VLAN_COPY;
}

/* What a tag is besides its id: that it is there, priority and drop eligibility */
#define VLAN_TAG_REST(tag) ((tag) >> 12)

/* The outer tag, accelerated or inline: VLAN_TAG and its control information, 0 when there is none; VLAN_UNKNOWN for a
 * service tag (802.1ad): those are not switched. */
static __always_inline int vlan_tag(struct __sk_buff *skb)
{
	__be16 tag[2];

	if (skb->vlan_present)
		return skb->vlan_proto == bpf_htons(ETH_P_8021Q) ? VLAN_TAG | (skb->vlan_tci & 0xffff) : VLAN_UNKNOWN;
	if (skb->protocol == bpf_htons(ETH_P_8021AD))
		return VLAN_UNKNOWN;
	if (skb->protocol != bpf_htons(ETH_P_8021Q))
		return 0;
	if (bpf_skb_load_bytes(skb, ETH_HLEN, tag, sizeof(tag)))
		return VLAN_UNKNOWN;
	return VLAN_TAG | bpf_ntohs(tag[0]);
}

/* VLAN id of the outer tag; 0 when there is none or it is a priority tag (IEEE 802.1Q, id 0), or VLAN_UNKNOWN. */
static __always_inline int vlan_id(struct __sk_buff *skb)
{
	int tag = vlan_tag(skb);

	return tag < 0 ? tag : tag & VLAN_ID_MASK;
}

static __always_inline int vlan_tagged(struct __sk_buff *skb)
{
	return skb->vlan_present || skb->protocol == bpf_htons(ETH_P_8021Q) || skb->protocol == bpf_htons(ETH_P_8021AD);
}

/* Takes the outer tag off, if any. Returns 0, or -1 when one is left: stacked tags are not switched. */
static __always_inline int vlan_strip(struct __sk_buff *skb)
{
	if (!vlan_tagged(skb))
		return 0;
	if (bpf_skb_vlan_pop(skb))
		return -1;
	return vlan_tagged(skb) ? -1 : 0;
}

/* Bytes on the wire: a tag may be beside the data. */
static __always_inline __u32 frame_size(struct __sk_buff *skb)
{
	return skb->len + (skb->vlan_present ? VLAN_SIZE : 0);
}

static __always_inline int vlan_add(struct __sk_buff *skb, __u16 vid)
{
	return vid ? bpf_skb_vlan_push(skb, bpf_htons(ETH_P_8021Q), vid) : 0;
}
