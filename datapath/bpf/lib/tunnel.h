/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Frames between hosts: one kernel vxlan device (`external gbp`), driven by tunnel keys. The group policy mark tells a
 * redirect from traffic of a network (types.h).
 */
#pragma once

#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "address.h"
#include "maps.h"
#include "packet.h"

/* How a frame goes on. Low bits: redirects taken so far, MARK_HOPS. */
#define PATH_CLONE      (1 << 2) /* send a copy now and leave the frame to the caller; else it is the program's verdict */
#define PATH_MOVED      (1 << 3) /* came by a redirect or out of a hold tap: meant for this port, so never PATH_FLOOD */
#define PATH_PASSED     (1 << 4) /* was held already: goes past what is still held */
#define PATH_JUDGED     (1 << 5) /* the source judged and counted it */
#define PATH_FLOOD      (1 << 6) /* broadcast, multicast or of an unknown place: every host of the network gets it */
#define PATH_LOCAL      (1 << 7) /* from a port of this host */
#define PATH_HOPS(path) ((path) & MARK_HOPS)

/* Sends the frame to a device. Returns the verdict, or with PATH_CLONE 0 or what the device refused it with. */
static __always_inline int send_to(struct __sk_buff *skb, __u32 ifindex, __u32 path)
{
	return path & PATH_CLONE ? (int)bpf_clone_redirect(skb, ifindex, 0) : (int)bpf_redirect(ifindex, 0);
}

static __always_inline int sent(int result, __u32 path)
{
	return path & PATH_CLONE ? result == 0 : result == TC_ACT_REDIRECT;
}

/* Where the tunnel device is to send the frame: a host, a 24-bit id and a group policy mark. Returns 0 or an error. */
static __always_inline int tunnel_key(struct __sk_buff *skb, const __be32 addr[4], __u32 id, __u32 mark)
{
	struct bpf_tunnel_key key = {.tunnel_id = id, .tunnel_ttl = 64};
	__u64 flags = BPF_F_ZERO_CSUM_TX;

	if (addr_is_v4(addr)) {
		key.remote_ipv4 = bpf_ntohl(addr[3]);
	} else {
		addr_copy((__be32 *)key.remote_ipv6, addr);
		flags |= BPF_F_TUNINFO_IPV6;
	}
	if (bpf_skb_set_tunnel_key(skb, &key, sizeof(key), flags))
		return -1;
	/* also mark 0: without options the device sends what lies on its stack (seen on 6.18) */
	return bpf_skb_set_tunnel_opt(skb, &mark, sizeof(mark));
}

/* Sends the frame to `hosts[host]` with a 24-bit id and a group policy mark. Returns the verdict; TC_ACT_SHOT: it could
 * not be sent (no tunnel device, unknown host), not yet counted. With PATH_CLONE TC_ACT_OK stands for sent. */
__noinline int tunnel_send(struct __sk_buff *skb, __u32 host, __u32 id, __u32 mark, __u32 path)
{
	struct settings *set;
	struct host *remote;
	__u32 zero = 0;
	int result;

	set = bpf_map_lookup_elem(&settings, &zero);
	remote = bpf_map_lookup_elem(&hosts, &host);
	if (!set || !set->tunnel || !remote || !host)
		return TC_ACT_SHOT;
	if (tunnel_key(skb, remote->addr, id, mark))
		return TC_ACT_SHOT;
	result = send_to(skb, set->tunnel, path);
	if (!sent(result, path))
		return TC_ACT_SHOT;
	return path & PATH_CLONE ? TC_ACT_OK : result;
}

struct tunnel_origin {
	struct host from; /* outer source, v4-mapped */
	__u32 id;
	__u32 mark; /* 0: traffic of the network with this VNI */
};

/* Returns 0, or -1 when the frame did not come out of a tunnel. */
static __always_inline int tunnel_origin(struct __sk_buff *skb, struct tunnel_origin *origin)
{
	struct bpf_tunnel_key key = {};

	if (!bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0))
		addr_map_v4(origin->from.addr, bpf_htonl(key.remote_ipv4));
	else if (!bpf_skb_get_tunnel_key(skb, &key, sizeof(key), BPF_F_TUNINFO_IPV6))
		addr_copy(origin->from.addr, (__be32 *)key.remote_ipv6);
	else
		return -1;
	origin->id = key.tunnel_id;
	origin->mark = 0;
	if (bpf_skb_get_tunnel_opt(skb, &origin->mark, sizeof(origin->mark)) < 0)
		origin->mark = 0;
	return 0;
}
