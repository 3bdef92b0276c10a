/* SPDX-License-Identifier: GPL-2.0-only */
/* What an address is; all are 16 bytes, v4-mapped for IPv4. */
#pragma once

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "maps.h"
#include "packet.h"

static __always_inline int addr_is_v4(const __be32 addr[4])
{
	return !addr[0] && !addr[1] && addr[2] == bpf_htonl(0xffff);
}

static __always_inline int addr_is_zero(const __be32 addr[4])
{
	return !(addr[0] | addr[1] | addr[2] | addr[3]);
}

static __always_inline int addr_is_link_local(const __be32 addr[4])
{
	return (addr[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* The port may use it. */
static __always_inline int addr_is_owned(__u32 slot, const __be32 addr[4])
{
	struct address_key key = {.slot = slot};

	addr_copy(key.addr, addr);
	return bpf_map_lookup_elem(&addresses, &key) != NULL;
}

/*
 * It is a link-local IPv6 address that the port may use: any, since guests make theirs up (RFC 7217), unless some are
 * named among the port's addresses. Then fe80:: is there, too, which no host has (RFC 4291, 2.6.1).
 */
static __always_inline int addr_is_own_link_local(__u32 slot, const __be32 addr[4])
{
	__be32 named[4] = {bpf_htonl(0xfe800000)};

	return addr_is_link_local(addr) && (!addr_is_owned(slot, named) || addr_is_owned(slot, addr));
}
