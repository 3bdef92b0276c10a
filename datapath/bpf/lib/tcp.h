/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * TCP as nf_conntrack follows it (net/netfilter/nf_conntrack_proto_tcp.c), by state, direction and the flag that
 * counts. Sequence numbers are window.h's, at ports that check them: else a connection is as open to out-of-window
 * segments as nf_conntrack is with be_liberal.
 */
#pragma once

#include "packet.h"

enum tcp_kind { /* the flag of a segment that decides; rows of tcp_transitions */
		TCP_KIND_SYN = 0,
		TCP_KIND_SYNACK = 1,
		TCP_KIND_FIN = 2,
		TCP_KIND_ACK = 3,
		TCP_KIND_RST = 4,
		TCP_KINDS = 5,
};

#define TCP_STATES  10
#define TCP_IGNORE  14 /* passes, changes nothing: the other side answers and its answer decides */
#define TCP_INVALID 15 /* belongs to no connection in this state */

#define NO          CT_NONE
#define SS          CT_SYN_SENT
#define SR          CT_SYN_RECV
#define ES          CT_ESTABLISHED
#define FW          CT_FIN_WAIT
#define CW          CT_CLOSE_WAIT
#define LA          CT_LAST_ACK
#define TW          CT_TIME_WAIT
#define CL          CT_CLOSE
#define S2          CT_SYN_SENT2
#define IG          TCP_IGNORE
#define IV          TCP_INVALID

static const __u8 tcp_transitions[2][TCP_KINDS][TCP_STATES] = {
    {
	/* the opener     NO  SS  SR  ES  FW  CW  LA  TW  CL  S2 */
	[TCP_KIND_SYN] = {SS, SS, IG, IG, IG, IG, IG, SS, SS, S2},
	[TCP_KIND_SYNACK] = {IV, IV, SR, IV, IV, IV, IV, IV, IV, SR},
	[TCP_KIND_FIN] = {IV, IV, FW, FW, LA, LA, LA, TW, CL, IV},
	[TCP_KIND_ACK] = {ES, IV, ES, ES, CW, CW, TW, TW, CL, IV},
	[TCP_KIND_RST] = {IV, CL, CL, CL, CL, CL, CL, CL, CL, CL},
    },
    {
	/* the other side NO  SS  SR  ES  FW  CW  LA  TW  CL  S2 */
	[TCP_KIND_SYN] = {IV, S2, IV, IV, IV, IV, IV, SS, IV, S2},
	[TCP_KIND_SYNACK] = {IV, SR, IG, IG, IG, IG, IG, IG, IG, SR},
	[TCP_KIND_FIN] = {IV, IV, FW, FW, LA, LA, LA, TW, CL, IV},
	[TCP_KIND_ACK] = {IV, IG, SR, ES, CW, CW, TW, TW, CL, IG},
	[TCP_KIND_RST] = {IV, CL, CL, CL, CL, CL, CL, CL, CL, CL},
    },
};

#undef NO
#undef SS
#undef SR
#undef ES
#undef FW
#undef CW
#undef LA
#undef TW
#undef CL
#undef S2
#undef IG
#undef IV

/* Combinations that no TCP sends (nf_conntrack's tcp_valid_flags): those without SYN, RST, FIN and ACK, or with two
 * that exclude each other. */
static __always_inline int tcp_flags_valid(__u8 flags)
{
	flags &= TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK;
	return flags == TCP_SYN || flags == (TCP_SYN | TCP_ACK) || flags == TCP_RST || flags == (TCP_RST | TCP_ACK) ||
	       flags == (TCP_FIN | TCP_ACK) || flags == TCP_ACK;
}

static __always_inline enum tcp_kind tcp_kind_of(__u8 flags)
{
	if (flags & TCP_RST)
		return TCP_KIND_RST;
	if (flags & TCP_SYN)
		return flags & TCP_ACK ? TCP_KIND_SYNACK : TCP_KIND_SYN;
	return flags & TCP_FIN ? TCP_KIND_FIN : TCP_KIND_ACK;
}

/* The state after a segment with valid flags; `reply` 1: from the side that did not open. May be TCP_IGNORE or
 * TCP_INVALID. */
static __always_inline __u8 tcp_step(__u8 state, __u8 flags, __u32 reply)
{
	__u32 index = ((reply & 1) * TCP_KINDS + tcp_kind_of(flags)) * TCP_STATES + state;

	if (state >= TCP_STATES)
		return TCP_INVALID;
	asm volatile("" : "+r"(index)); /* one index, checked as it is used: else the verifier cannot follow */
	if (index >= sizeof(tcp_transitions))
		return TCP_INVALID;
	return ((const __u8 *)tcp_transitions)[index];
}
