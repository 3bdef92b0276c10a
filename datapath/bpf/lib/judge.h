/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

#include "maps.h"
#include "parse.h"

__noinline int judge(struct __sk_buff *skb, struct port *port, struct packet *pkt, int direction)
{
	if (!port || !pkt || skb->len < direction)
		return DROP_MALFORMED;
	return DROP_NONE;
}
