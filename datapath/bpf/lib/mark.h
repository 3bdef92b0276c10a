/* SPDX-License-Identifier: GPL-2.0-only */
/* skb->mark carries news within a host: the switch itself has judged this frame, or at least sent it (SKB_MARK_*). */
#pragma once

#include <linux/bpf.h>

#include "types.h"

static __always_inline void mark_set(struct __sk_buff *skb, __u32 mark)
{
	asm volatile("" : "+r"(skb)); /* a store through ctx + offset in a register is refused by the verifier */
	skb->mark = mark;
}

/* True when the frame has this mark; it is gone then. */
static __always_inline int mark_takes(struct __sk_buff *skb, __u32 mark)
{
	if (skb->mark != mark)
		return 0;
	mark_set(skb, 0);
	return 1;
}

/* True when the frame is marked as judged; the mark is gone then. */
static __always_inline int mark_take(struct __sk_buff *skb)
{
	return mark_takes(skb, SKB_MARK_JUDGED);
}
