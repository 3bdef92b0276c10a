/* SPDX-License-Identifier: GPL-2.0-only */
/* Words that several CPUs change at once. */
#pragma once

#define READ_ONCE(x)         (*(volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, value) (*(volatile typeof(x) *)&(x) = (value))

/* True when `*word` was `expected` and is now `desired`. A full barrier. */
static __always_inline int cas(__u64 *word, __u64 expected, __u64 desired)
{
	return __sync_val_compare_and_swap(word, expected, desired) == expected;
}
