/* SPDX-License-Identifier: GPL-2.0-only */
/* The Internet checksum (RFC 1071). Sums are of 16-bit words as they lie in memory, so they need no byte order. */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

/* `size`: a multiple of 4, constant. Returns `sum` and the bytes, unfolded. */
static __always_inline __s64 checksum_add(void *bytes, __u32 size, __s64 sum)
{
	return bpf_csum_diff(NULL, 0, bytes, size, 0) + sum;
}

static __always_inline __u16 checksum_fold(__s64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}
