// SPDX-License-Identifier: GPL-2.0-only
/*
 * A VLAN interface where the kernel has none (8021q): at the ingress of a veth end its frames get the tag TAG and go
 * out by device TO (PUSH); at that device's ingress frames with the tag lose it and go to the veth end TO.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

SEC("tc") int tags(struct __sk_buff *skb)
{
#ifdef PUSH
	if (bpf_skb_vlan_push(skb, bpf_htons(ETH_P_8021Q), TAG))
		return TC_ACT_SHOT;
#else
	if (!skb->vlan_present || (skb->vlan_tci & 0xfff) != TAG)
		return TC_ACT_OK;
	if (bpf_skb_vlan_pop(skb))
		return TC_ACT_SHOT;
#endif
	return bpf_redirect(TO, 0);
}

char _license[] SEC("license") = "GPL";
