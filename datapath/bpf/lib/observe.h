/* SPDX-License-Identifier: GPL-2.0-only */
/* Who sees the frames that pass a port beside their receiver. */
#pragma once

#include "maps.h"
#include "mirror.h"
#include "packet.h"
#include "sample.h"

#define FEATURES_OBSERVE (FEATURE_SAMPLE | FEATURE_MIRROR)

/*
 * The frame passes the port and is counted, in `direction`, as the guest has it. Called only for a port with one of
 * FEATURES_OBSERVE. Packet pointers are void afterwards; the frame is as it was. Global, so that it is
 * verified once.
 */
__noinline int observe(struct __sk_buff *skb, struct port *port, struct packet *pkt, int direction)
{
	if (!port || !pkt)
		return 0;
	if (port->features & FEATURE_SAMPLE)
		sample(skb, port, pkt, direction);
	if (port->features & FEATURE_MIRROR)
		mirror(skb, port, pkt, direction);
	return 0;
}
