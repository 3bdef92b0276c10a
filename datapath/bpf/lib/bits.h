/* SPDX-License-Identifier: GPL-2.0-only */
/* Sets of small numbers in words. */
#pragma once

#include <linux/types.h>
#include <bpf/bpf_helpers.h>

#define LOWEST_BIT_SEQUENCE 0x03f79d71b4cb0a89ull /* de Bruijn's: each 6 bits of it are others */

static const __u8 lowest_bits[64] = {
    0,  1,  48, 2,  57, 49, 28, 3,  61, 58, 50, 42, 38, 29, 17, 4,  62, 55, 59, 36, 53, 51,
    43, 22, 45, 39, 33, 30, 24, 18, 12, 5,  63, 47, 56, 27, 60, 41, 37, 16, 54, 35, 52, 21,
    44, 32, 23, 11, 46, 26, 40, 15, 34, 20, 31, 10, 25, 14, 19, 9,  13, 8,  7,  6,
};

/* Position of the lowest bit of a word that has one. By table: each branch of a search doubles what the verifier has to
 * follow. */
static __always_inline __u32 lowest_bit(__u64 word)
{
	return lowest_bits[(word & -word) * LOWEST_BIT_SEQUENCE >> 58];
}
