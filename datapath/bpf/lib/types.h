/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The switch's data model in the kernel: every structure that programs and the agent share.
 *
 * User space reads these layouts from BTF (datapath/drivers/ebpf/layout.py checks its NumPy dtypes against them at
 * load), so a field is added here and there together or the load fails by name.
 *
 * Words used throughout
 *   slot     index of a port instance in `ports`; slot 0 is the host itself (counters of frames that belong to no port)
 *   epoch    number of a port instance, per VM and monotonic, given by the coordinator
 *   port time  ktime minus the port's base; frozen while the port is not active. Entries hold port time only.
 *   to / from  as seen from the guest: "to the port" is towards the guest, "from the port" comes out of it
 */
#pragma once

#include <linux/types.h>

/* Raised when programs take the same layouts for something else: then maps are taken over, never shared. */
#define REVISION         1

#define SLOTS_DEFAULT    1024 /* resized before load */
#define NETWORKS_DEFAULT 4096
#define HOSTS_DEFAULT    4096
#define FLOOD_MEMBERS    1024  /* members of one network on one host */
#define HOLD_FRAMES      16383 /* that wait in one hold tap at most: its queue has room for more (holds.py) */

/* ---- ports -------------------------------------------------------------------------------------------------- */

enum port_state {
	PORT_FREE = 0,
	PORT_STAGED = 1,   /* destination before its guest runs: passes nothing, holds what the guest sends */
	PORT_ACTIVE = 2,   /* judges and delivers */
	PORT_QUIESCED = 3, /* source after the pause: passes nothing, tables do not change */
	PORT_STUB = 4,     /* tables are gone; only the gate (redirect) still acts */
};

enum port_flag {
	PORT_F_ANTISPOOF = 1 << 0,
	PORT_F_LEARNING = 1 << 1,  /* accept mid-stream connections, count what would have been dropped */
	PORT_F_TRACE = 1 << 2,     /* every verdict goes to the `events` ring */
	PORT_F_STATELESS = 1 << 3, /* internal port of the host: no connection table, no policy */
	PORT_F_UNSETTLED = 1 << 4, /* accounting of the source not yet assigned: expiry may mark but not delete */
	PORT_F_OVERFLOW =
	    1 << 5, /* a dirty key could not be recorded: dump again (set by programs, cleared by the agent) */
	PORT_F_NO_BROADCAST = 1 << 6,  /* just opened: broadcast still comes through the source */
	PORT_F_TRUNK = 1 << 7,         /* frames with a tag belong to the network of `trunks` */
	PORT_F_AWAITS_SOURCE = 1 << 8, /* moved here: what the source held goes first, what comes by itself waits */
	PORT_F_BRIDGED = 1 << 9, /* its device is in a bridge of the host, which floods into it: only ours passes */
};

/* What a port has beside the plain path; a port without it pays the test of a bit. Kept in port.features. */
enum port_feature {
	FEATURE_POLICE_FROM = 1 << 0,
	FEATURE_POLICE_TO = 1 << 1,
	FEATURE_SHAPE = 1 << 2,
	FEATURE_SAMPLE = 1 << 3,
	FEATURE_EXPORT = 1 << 4,
	FEATURE_MIRROR = 1 << 5,
	FEATURE_REMAP = 1 << 6,
	FEATURE_WINDOW = 1 << 7,
	FEATURE_MARK_FROM = 1 << 8, /* rewrites DSCP */
};

enum gate_target {
	GATE_NONE = 0,     /* drop, DROP_NO_PLACE */
	GATE_LOCAL = 1,    /* to the port's device, where to_port judges */
	GATE_REDIRECT = 2, /* through the tunnel device to `remote` on `channel` */
};

enum timeout_index {
	/* TCP states first, so that a state is its own index: enum ct_state */
	TIMEOUT_UDP = 10,
	TIMEOUT_UDP_STREAM = 11,
	TIMEOUT_ICMP = 12,
	TIMEOUT_OTHER = 13,
	TIMEOUT_FRAGMENT = 14,
	TIMEOUT_MAX = 16,
};

/* word: state in bits 0-7, flags in 8-31, epoch in 32-63.
 * The agent is its only writer, but for three changes that programs make by cmpxchg: STAGED -> ACTIVE by the guest's
 * first frame when `commit` names the same epoch, and setting PORT_F_OVERFLOW. */
#define PORT_WORD(state, flags, epoch) ((__u64)(epoch) << 32 | (__u64)(flags) << 8 | (state))
#define PORT_STATE(word)               ((__u8)(word))
#define PORT_FLAGS(word)               ((__u32)(word) >> 8)
#define PORT_EPOCH(word)               ((__u32)((word) >> 32))

/* gate: target in bits 0-7, shut in bit 8. One u64 store by the agent flips where frames for the VM go. */
#define GATE_WORD(target, shut) ((__u64)(target) | (__u64)(shut) << 8)
#define GATE_TARGET(gate)       ((__u8)(gate))
#define GATE_SHUT(gate)         (((gate) >> 8) & 1)

/*
 * The gate: where frames for the VM go. A frame is held when the gate is shut, or when frames that were held before
 * it have not all passed (`held_to` != 0): so opening it keeps the order, and no instant exists at which a frame
 * can overtake a held one. held_* is raised before a frame is put into the hold tap and lowered after it has left
 * through from_hold (or could not be queued).
 */
struct port {
	__u64 word;
	__u64 commit; /* epoch that was committed, 0 none */
	__u64 gate;
	__s64 held_to;    /* frames in the hold tap towards the guest */
	__s64 held_from;  /* frames in the hold tap from the guest */
	__u64 lease;      /* ktime after which STAGED, QUIESCED and a redirect drop and ACTIVE holds no more, 0 never */
	__u64 time_base;  /* port time = ktime - time_base */
	__u64 time_floor; /* expiry takes no entry as seen before this port time (full timeout after an activation) */
	__u64 redirected; /* ktime of the last frame through the redirect */
	__u32 slot;
	__u32 ifindex;   /* device of the port, whose element of `devices` then leads here; 0 none yet */
	__u32 hold_to;   /* ifindex of the hold tap for frames towards the guest, 0 none */
	__u32 hold_from; /* ifindex of the hold tap for frames from the guest, 0 none */
	__u32 network;   /* index in `networks` of untagged frames */
	__u32 policy;    /* index in `policies`, 0 none: everything new is dropped */
	__u32 channel;   /* tunnel id of the redirect, 24 bits */
	__u32 remote;    /* index in `hosts` of the redirect's far end */
	__u32 learned;   /* L2 entries learned behind the port (programs add, ageing corrects) */
	__u32 learned_max;
	__u8 mac[6];
	__u16 mtu;
	__u32 timeouts[TIMEOUT_MAX]; /* milliseconds, by enum ct_state or enum timeout_index */
	__u32 alarm_full;            /* connections refused because the table was full */
	__u32 evicted;               /* connections evicted for a new one */
	__u32 features;              /* enum port_feature, written by the agent */
	__be32 address;              /* one of its IPv4 addresses in `addresses`, found without looking; 0 none */
};

/* What a device is to the switch: key of `devices` is the ifindex. */
enum device_role {
	DEVICE_PORT = 1,
	DEVICE_HOLD_TO = 2, /* hold tap, frames towards the guest; written back frames go where the gate says */
	DEVICE_HOLD_FROM =
	    3,             /* hold tap, frames from the guest; written back frames are as if the guest sent them now */
	DEVICE_JUDGED = 4, /* frames that the source had judged and counted (drained from its tap): past to_port */
	DEVICE_UPLINK = 5,
	DEVICE_TUNNEL = 6,
	DEVICE_INJECT = 7, /* frames of the agent as if the guest sent them now, behind those that are held */
	DEVICE_SHAPER = 8, /* below the shaper: frames of guests that have waited there */
	DEVICE_CUTTER = 9, /* copies of mirrors go through its egress to be cut */
};

struct device {
	__u32 slot;
	__u32 role;
};

/* ---- networks and places ------------------------------------------------------------------------------------ */

enum network_kind {
	NETWORK_NONE = 0,
	NETWORK_LOCAL = 1,   /* this host only */
	NETWORK_UPLINK = 2,  /* VLAN `vid` of `uplink`, 0 untagged */
	NETWORK_OVERLAY = 3, /* `vni` through the tunnel device */
};

struct network {
	__u32 kind;
	__u32 uplink; /* ifindex */
	__u32 vni;
	__u16 vid;
	__u16 mtu;
	__u64 drops;
};

struct uplink_key {
	__u32 ifindex;
	__u16 vid; /* 0 untagged */
	__u16 pad;
};

struct trunk_key { /* trunks: the network of a tagged frame from a trunk port */
	__u32 slot;
	__u16 vid;
	__u16 pad;
};

struct l2_key {
	__u32 network;
	__u8 mac[6];
	__u16 pad;
};

enum l2_kind {
	L2_PORT = 1,   /* target: slot. Where the frames really go is the port's gate */
	L2_UPLINK = 2, /* target: ifindex */
	L2_TUNNEL = 3, /* target: index in `hosts` */
	L2_HOST = 4,   /* target: ifindex of an uplink. Up the stack of this host, as if it had come in there */
};

enum l2_flag {
	L2_F_STATIC = 1 << 0,   /* configured: never aged, never moved by learning */
	L2_F_LOCATION = 1 << 1, /* a VM's own MAC; set by the agent at open or by word of the coordinator */
};

struct l2_entry {
	__u8 kind;
	__u8 flags;
	__u16 vlan; /* tag to push towards a trunk port, 0 none */
	__u32 target;
	__u64 seen;  /* ktime */
	__u32 moves; /* times that learning changed the target */
	__u32 away;  /* since when the MAC of a port that redirects comes in by an uplink (L2_AWAY_SHIFT), 0 not */
};

struct learning { /* L2 entries learned behind uplinks and hosts (programs add, ageing corrects) */
	__u32 count;
	__u32 max; /* 0: no limit */
};

struct host { /* underlay address of a host of the cluster, v4-mapped for IPv4; index 0 unused */
	__be32 addr[4];
};

struct channel {        /* key: 24-bit id. A redirect that ends here */
	__be32 from[4]; /* only from this underlay address */
	__u32 slot;
	__u32 epoch;
};

/* GBP mark of frames through the tunnel device: 0 is traffic of a network, else a redirect. */
#define MARK_REDIRECT 0x4000
#define MARK_JUDGED   0x2000 /* the source judged and counted it: deliver past to_port */
#define MARK_PROBE    0x1000 /* path probe: back to the agent, never to a port */
#define MARK_LOCAL    0x0800 /* from a VM beside the one that left: waits behind what came by itself */
#define MARK_HOPS     0x0003 /* redirects taken so far */
#define HOPS_MAX      2

/* Or it is a copy of a mirror for a port, which the tunnel id and MARK_COPY_PORT of the mark name together. */
#define MARK_COPY        0x8000 /* neither REDIRECT nor PROBE is set then: a switch without mirrors drops it */
#define MARK_COPY_PASSED 0x2000 /* sent on by the host that the port left: never again */
#define MARK_COPY_PORT   0x0fff

/* skb->mark while a judged frame goes from from_tunnel to to_port on one host; to_port clears it. */
#define SKB_MARK_JUDGED 0x6d696772
/* The same, while a frame that is yet to be judged goes to a device that others put frames into, too. */
#define SKB_MARK_SENT 0x6d696773
/* Plus MIRROR_KEY: a copy on its way through the cutter. */
#define SKB_MARK_COPY 0x4d000000

struct member {    /* flood list of a network: dense, ends at kind 0 */
	__u8 kind; /* enum l2_kind */
	__u8 pad;
	__u16 vlan;
	__u32 target;
};

/* ---- mirrors ------------------------------------------------------------------------------------------------- */

#define MIRRORS_MAX              8 /* of one port */
#define MIRROR_KEY(slot, number) ((slot) * MIRRORS_MAX + (number))

enum mirror_output {
	MIRROR_NONE = 0,   /* was taken away, and another has a higher number */
	MIRROR_DEVICE = 1, /* target: ifindex, 0 while the device is not there */
	MIRROR_PORT = 2,   /* the port that `id` and `mark` name, here or at `remote` (zero: unknown) */
	MIRROR_VLAN = 3,   /* target: ifindex of an uplink, `vid` goes around the guest's own tag */
	MIRROR_TUNNEL = 4, /* to `remote` with tunnel id `id` */
};

struct mirror { /* numbers of a port's mirrors begin at 0; the first that is not there ends them */
	__u8 output;
	__u8 directions; /* bits: 1 << FROM_GUEST, 1 << TO_GUEST */
	__u16 vid;
	__u16 mark;
	__u8 filtered; /* only frames of a VLAN in `vlans` */
	__u8 pad;
	__u32 snap; /* bytes of a frame that are copied, 0 all */
	__u32 target;
	__u32 id;
	__be32 remote[4]; /* v4-mapped for IPv4 */
	__u32 pad2;
	__u64 name;      /* digest: which one it is */
	__u64 vlans[64]; /* a bit for each VLAN id; 0: untagged */
};

struct mirror_count {  /* per mirror and CPU */
	__u64 packets; /* segments of a GSO frame counted one by one */
	__u64 bytes;   /* of the frames on the wire, before they are cut */
	__u64 dropped; /* packets that the output did not take */
};

struct mirror_name { /* what a copy in a tunnel says of the port that it is for */
	__u32 id;
	__u32 mark;
};

struct mirror_slots { /* instances of a port on this host, 0 none */
	__u32 newest;
	__u32 older;
};

/* ---- connections -------------------------------------------------------------------------------------------- */

enum ct_state { /* nf_conntrack's names and order for TCP; other protocols use CT_NEW and CT_REPLIED */
		CT_NONE = 0,
		CT_SYN_SENT = 1,
		CT_SYN_RECV = 2,
		CT_ESTABLISHED = 3,
		CT_FIN_WAIT = 4,
		CT_CLOSE_WAIT = 5,
		CT_LAST_ACK = 6,
		CT_TIME_WAIT = 7,
		CT_CLOSE = 8,
		CT_SYN_SENT2 = 9,
		CT_NEW = 16,     /* UDP, ICMP, others: one direction seen */
		CT_REPLIED = 17, /* both directions seen */
};

enum ct_flag {
	CT_F_REPLIED = 1 << 0,
	CT_F_ASSURED = 1 << 1,
	CT_F_INBOUND = 1 << 2, /* the remote side opened it */
	CT_F_LEARNED = 1 << 3, /* taken up mid-stream by a port in learning mode */
	CT_F_DYING = 1 << 6,   /* expired: absent to programs, which may revive it by cmpxchg */
	CT_F_DEAD = 1 << 7,    /* about to be deleted: absent, must not be revived */
};

enum ct_type { /* what an entry of the connection table, or a key of the dirty set, stands for */
	       CT_TYPE_CONNECTION = 0,
	       CT_TYPE_FRAGMENT = 1, /* laddr, raddr, proto; id in lport (high) and rport (low); ports in `mark` */
	       CT_TYPE_L2 = 2,       /* dirty set only: laddr[0..1] hold the MAC, raddr[0] the network */
	       CT_TYPE_WINDOW = 3,   /* dirty set only: of this connection the TCP window alone has changed */
};

struct ct_key {          /* from the VM's side, so that one look-up serves both directions */
	__be32 laddr[4]; /* the guest's own address, v4-mapped for IPv4 */
	__be32 raddr[4];
	__be16 lport; /* ICMP query: identifier */
	__be16 rport; /* ICMP query: 0 the guest's echo, 0x8000 a remote's; low byte: request type if it is no echo */
	__u8 proto;
	__u8 type;
	__u8 from; /* fragments: 1 from the guest */
	__u8 pad;
} __attribute__((aligned(8)));

/* word: state 0-7, flags 8-15, low half of the connection id 32-63, changed only by cmpxchg: what must agree is in it,
 * and a program that still holds a deleted element whose memory has another key now fails its cmpxchg. */
#define CT_WORD(state, flags, id) ((__u64)(__u32)(id) << 32 | (__u64)(flags) << 8 | (state))
#define CT_STATE(word)            ((__u8)(word))
#define CT_FLAGS(word)            ((__u8)((word) >> 8))

struct ct_entry {
	__u64 word;
	__u64 seen;   /* port time of the last packet */
	__u64 id;     /* connection id: random, travels with the connection */
	__u32 judged; /* digest of the policy it was judged under; another: judge again at the next packet */
	__u32 mark;
	__u64 packets[2];         /* counted on this host; 0 from the guest, 1 to the guest */
	__u64 bytes[2];           /* of the IP packets, segments of a GSO frame counted one by one */
	__u64 carried_packets[2]; /* counted on hosts before; assigned by settle, never by programs */
	__u64 carried_bytes[2];
	__u64 began;     /* port time of the first packet, 0 on a host before */
	__u32 tcp_flags; /* seen on this host while FEATURE_EXPORT: 0-7 from the guest, 8-15 to the guest */
	__u32 window;    /* WINDOW_*: what is known of the four below, which are of TCP while FEATURE_WINDOW */
	/* sequence numbers in host order; 0 what the guest sent or said, 1 what came to it */
	__u32 window_end[2];     /* behind the last that was sent */
	__u32 window_limit[2];   /* behind the last that the other side lets it send */
	__u32 window_acked[2];   /* the highest that it acknowledged */
	__u32 window_offered[2]; /* the largest window that it offered, in bytes */
	__be64 label[2]; /* given, as `mark`, by a rule or an operator; looked at when a connection is judged again */
};

/* ---- TCP windows: lib/window.h -------------------------------------------------------------------------------- */

/* ct_entry.window. Bits 0-11: shift counts of the guest's SYN, of the other side's, of one that was ignored; 17-31: of
 * the ignored one, the lowest bits of the sequence number that acknowledges it. */
#define WINDOW_SCALE(word, which) ((word) >> 4 * (which) & 15)
#define WINDOW_NO_SCALE           15 /* the SYN had no such option (RFC 7323, 2.2) */
#define WINDOW_IGNORED            2  /* `which` of WINDOW_SCALE: 0 and 1 are the sides */
#define WINDOW_NEXT(word)         ((word) >> 17)
#define WINDOW_NEXT_MASK          0x7fff

enum window_flag {
	WINDOW_F_FROM = 1 << 12,      /* the guest's SYN was seen */
	WINDOW_F_TO = 1 << 13,        /* the other side's SYN was seen; nothing is checked without both */
	WINDOW_F_UNCHECKED = 1 << 14, /* what is known is not the truth any more */
	WINDOW_F_SYN_FROM = 1 << 15,  /* the guest sent a SYN in mid-connection, which was ignored */
	WINDOW_F_SYN_TO = 1 << 16,    /* the other side did */
};

struct window_port {      /* element of `windows`, by slot */
	__u64 outside[2]; /* segments outside of their connection's window; 0 from the guest, 1 to the guest */
	__u32 count_only; /* they pass. Written by the agent */
	__u32 pad;
};

/* ---- flows: what is left to report of connections that are over (lib/flow.h) ---------------------------------- */

enum flow_reason { /* IPFIX flowEndReason (RFC 5102, 5.11.3) */
		   FLOW_IDLE = 1,
		   FLOW_ACTIVE = 2, /* it goes on */
		   FLOW_ENDED = 3,
		   FLOW_FORCED = 4,
		   FLOW_NO_ROOM = 5,
};

struct flow_end { /* key of a table of flow_ends; the value is the struct ct_entry as it was at last */
	__u64 id;
	struct ct_key key;
	__u32 reason; /* enum flow_reason */
	__u32 pad;
};

struct flow_report { /* what was reported of the connection with an id; the agent alone writes it */
	__u64 until; /* port time up to which it was, 0 never */
	__u64 began; /* port time of the first packet; 0 what the entry says */
	__u64 packets[2];
	__u64 bytes[2];
	__u32 tcp_flags; /* seen on hosts before */
	__u32 pad;
};

struct flow_exporter {  /* by slot; the agent alone writes it */
	__u64 sequence; /* of the next datagram (NetFlow) or record (IPFIX) */
	__u64 began;    /* port time at which the exporter's uptime is 0; 0: it has not begun */
	__u64 template; /* port time of the last template */
	__u64 datagrams;
	__u64 records;
	__u64 errors; /* datagrams that could not be sent to a collector */
};

struct flow_lost { /* by slot: of connections that ended while the table of the ended was full */
	__u64 flows;
	__u64 packets;
	__u64 bytes;
};

/* ---- remapping ---------------------------------------------------------------------------------------------- */

/* Elements of all ports of a host: two a rule, and one for an address of which only ports have some. */
#define REMAPS_MAX 262144

enum remap_side {
	REMAP_OUT = 0, /* of an inside address, what the network sees: frames from the guest */
	REMAP_IN = 1,  /* of an outside address, what the guest sees */
};

enum remap_flag {
	REMAP_F_RULE = 1 << 0,   /* a rule, not only a sign that ports of the address have some */
	REMAP_F_PORTS = 1 << 1,  /* ports of the address have rules of their own */
	REMAP_F_BESIDE = 1 << 2, /* so have ports of the address that it leads to */
};

struct remap_key {
	__u32 slot;
	__be32 addr[4]; /* v4-mapped for IPv4 */
	__be16 port;    /* 0 with proto 0: the address as a whole */
	__u8 proto;
	__u8 side; /* enum remap_side */
};

struct remap_entry {
	__be32 addr[4]; /* of the other side */
	__be16 port;
	__u8 flags; /* enum remap_flag */
	__u8 pad[5];
	__u64 packets; /* counted on this host */
	__u64 bytes;   /* of the IP packets, as those of connections */
};

/* ---- policies ----------------------------------------------------------------------------------------------- */

/* policies[i]: generation in the low half, digest of the rules in the high half: one u64, flipped by one store after
 * the tables of the generation are in place. Generation 0: no policy. */
#define POLICY_WORD(generation, digest) ((__u64)(digest) << 32 | (__u32)(generation))
#define POLICY_GENERATION(word)         ((__u32)(word))
#define POLICY_DIGEST(word)             ((__u32)((word) >> 32))

enum acl_direction { ACL_FROM = 0, ACL_TO = 1 };

enum acl_action { ACL_ALLOW = 1, ACL_DROP = 2, ACL_REJECT = 3 };

struct acl_prefix {   /* key of the LPM trie: direction and remote prefix -> row */
	__u32 length; /* 32 (direction) + prefix bits of the v4-mapped address */
	__u8 direction;
	__u8 pad[3];
	__be32 addr[4];
};

struct acl_interval { /* sorted starts on the line proto<<16 | port (ICMP: type<<8 | code) */
	__u32 start;
	__u32 row;
};

struct acl_group { /* 256 rules of a row; group 0 of a row is its summary: bit g set when group g+1 is not empty */
	__u64 bits[4];
};

struct acl_shape { /* element 0 of acl_rows of a generation is this, padded to an acl_group; rows start at 1 */
	__u32 rules;
	__u32 intervals;
	__u32 groups; /* without the summary: a row takes groups + 1 elements */
	__u32 pad[5];
};

struct acl_rule { /* by rank: the lowest rank that matches wins */
	__u32 id;
	__u8 action;
	__u8 log;
	__u16 label; /* element of the generation's acl_labels, 0: no word of mark and label in the rule */
};

#define LABEL_RULES_MAX 256 /* rules of a policy that look at mark or label, or give them; element 0 is of none */

struct acl_label { /* a rule matches a connection whose mark and label, masked, are these; and gives set_* under its
		      mask */
	__be64 label[2];
	__be64 label_mask[2];
	__be64 set_label[2];
	__be64 set_label_mask[2];
	__u32 mark;
	__u32 mark_mask;
	__u32 set_mark;
	__u32 set_mark_mask;
};

struct hits_key {
	__u32 slot;
	__u32 rule; /* acl_rule.id; 0 is the default drop */
};

struct hits {
	__u64 packets;
	__u64 bytes;
};

/* ---- quality of service ------------------------------------------------------------------------------------- */

enum qos_flag {
	QOS_F_LIMIT = 1 << 0, /* has a bucket */
	QOS_F_SHAPE = 1 << 1, /* what is beyond HTB's bucket waits; without it is dropped */
	QOS_F_MARK = 1 << 2,  /* `dscp` is written over the sender's */
};

#define QOS_SHIFT 24 /* of qos.interval */

/* Frames of a port that are shaped on their way from the guest wear it as mark and priority: HTB's class. */
#define QOS_CLASS(slot) (0x6d710000 | (slot))

struct qos {            /* element slot * 2 + direction of `qos` */
	__u64 due;      /* ktime at which the bucket is full again; programs change it */
	__u64 interval; /* nanoseconds that a byte takes at the rate, << QOS_SHIFT */
	__u64 burst;    /* nanoseconds that the bucket takes to fill */
	__u64 dropped_packets;
	__u64 dropped_bytes;
	__u32 flags;    /* enum qos_flag */
	__u32 priority; /* of the socket buffer: 0..7 */
	__u32 shaper;   /* from the guest: ifindex of the device that it waits in, 0 none */
	__u8 dscp;
	__u8 pad[3];
};

/* ---- counters, verdicts, events ----------------------------------------------------------------------------- */

/* Numbered for ever, never reused; datapath/state/drops.py has the sentence for each. */
enum drop_reason {
	DROP_NONE = 0,
	DROP_MALFORMED = 1,
	DROP_NO_PORT = 2,
	DROP_NOT_ACTIVE = 3,
	DROP_SPOOF_MAC = 4,
	DROP_SPOOF_ADDRESS = 5,
	DROP_SPOOF_ARP = 6,
	DROP_SPOOF_ND = 7,
	DROP_POLICY = 8,
	DROP_REJECT = 9,
	DROP_CT_INVALID = 10, /* no connection, and not one that may begin one */
	DROP_CT_FULL = 11,
	DROP_CT_RACE = 12,  /* the entry was being deleted: the sender repeats */
	DROP_FRAGMENT = 13, /* later fragment whose first was not seen */
	DROP_NO_NETWORK = 14,
	DROP_NO_PLACE = 15,
	DROP_LEASE = 16,
	DROP_HOLD_FULL = 17,
	DROP_NO_HOLD = 18,
	DROP_CHANNEL = 19, /* redirect of an unknown channel, source or epoch */
	DROP_HOPS = 20,
	DROP_TUNNEL_PEER = 21, /* not a host of this cluster */
	DROP_TUNNEL = 22,      /* could not be sent */
	DROP_VLAN = 23,
	DROP_LEARN_LIMIT = 24,
	DROP_LOOP = 25, /* would leave where it came in */
	DROP_MTU = 26,
	DROP_BROADCAST_PATH = 27, /* broadcast that comes by the other path during a move */
	DROP_UNKNOWN_UNICAST = 28,
	DROP_NOT_OURS = 29, /* not sent by the switch: a bridge or the host put it into the port's device */
	DROP_POLICED = 30,
	DROP_REMAP = 31,
	DROP_WINDOW = 32,
	DROP_SHAPE = 33,
	DROP_MIRROR = 34,
	DROP_LABEL = 35,
	DROP_ANSWERED = 36, /* a question for a remapped address, which the switch has answered */
	DROP_REASONS = 64,
};

struct counters {         /* per port and CPU; 0 from the guest, 1 to the guest */
	__u64 packets[2]; /* segments of a GSO frame counted one by one */
	__u64 bytes[2];   /* of the frames on the wire */
	__u64 drops[DROP_REASONS];
	__u64 would_drop; /* learning mode */
	__u64 held[2];    /* frames that waited in a hold tap; 0 from the guest, 1 to the guest */
	__u64 redirected; /* sent on to the host that the VM moved to; segments of a GSO frame counted one by one */
	__u64 came;       /* the same at that host: accepted on the port's channel */
};

enum event_type {
	EVENT_TRACE = 1,
	EVENT_LOG = 2,    /* a rule with log matched */
	EVENT_OPENED = 3, /* the guest's first frame opened the port */
	EVENT_FULL = 4,   /* a connection was refused or evicted: table full */
	EVENT_PROBE = 5,  /* a path probe came through the tunnel: data holds the frame */
};

#define EVENT_BYTES 128

struct event {
	__u64 time; /* ktime */
	__u32 slot;
	__u32 epoch;
	__u32 ifindex;
	__u32 length; /* of the frame */
	__u32 rule;
	__u8 type;
	__u8 direction; /* 0 from the guest, 1 to the guest */
	__u8 reason;    /* enum drop_reason, DROP_NONE: passed */
	__u8 captured;  /* bytes of data */
	__u8 data[EVENT_BYTES];
};

/* ---- sampling: lib/sample.h -------------------------------------------------------------------------------------- */

#define SAMPLE_BYTES 128 /* of a frame at most */

/*
 * Sampling of a port. `pool` and `next` count frames on the wire since the sub-agent began, on whichever host. The last
 * five are the agent's, which programs do not read: what collectors were told, so that the next agent goes on from
 * there.
 */
struct sampling {
	__u64 pool;            /* frames that could have been sampled */
	__u64 next;            /* number of the frame that is sampled next, 0 not drawn yet */
	__u64 drops;           /* samples that found no room */
	__u64 due;             /* when the next sample may be taken: limit.h */
	__u32 rate;            /* one of so many, 0 none */
	__u32 header_bytes;    /* 1..SAMPLE_BYTES */
	__u64 began;           /* ktime at which the sub-agent's uptime was 0 */
	__u64 datagrams;       /* sequence numbers: the last that were used */
	__u64 unsent;          /* datagrams that could not be sent, by collector */
	__u64 flow_samples;    /* of the port */
	__u64 counter_samples; /* of the port */
};

struct sample {     /* record of `samples` */
	__u64 pool; /* struct sampling, with this frame */
	__u64 drops;
	__u32 slot;
	__u32 epoch;
	__u32 length;  /* on the wire, without FCS and accelerated tag */
	__u32 segment; /* of a GSO frame, from 0 */
	__u16 size;    /* bytes that each segment but the last carries, 0 for a frame that is one on the wire */
	__u16 headers; /* bytes before them, 0 the same */
	__u16 vlan;    /* tag between guest and switch, 0 none */
	__u8 direction;
	__u8 captured; /* bytes of data */
	__u8 last;     /* it is the last segment */
	__u8 pad[7];
	__u8 data[2 * SAMPLE_BYTES]; /* the second half is never full: the verifier adds up two bounds */
};

struct settings {     /* one element */
	__u32 tunnel; /* ifindex of the vxlan device, 0 none */
	__u32 mtu;    /* of the underlay */
	__u64 boot;   /* random, changes when the maps are made anew */
};

/* ---- control programs: contexts of BPF_PROG_RUN, control.bpf.c ------------------------------------------------ */

#define EXCHANGE_LENGTH 4096

struct exchange { /* element of `exchange`: many entries by their keys in one call */
	struct ct_key key;
	__u32 found;
	__u32 pad;
	struct ct_entry entry;
};

/* What ct_fill says of an element, in `found`; refused: the table is full. */
enum fill { FILL_REFUSED, FILL_MADE, FILL_THERE };

struct ct_batch { /* ct_read, ct_settle, ct_fill: the first `count` elements of `exchange` */
	__u32 slot;
	__u32 count;
	__u32 found; /* out */
	__u32 pad;
};

#define CT_STATES 18 /* enum ct_state */

struct ct_sweep { /* ct_expire, ct_early_drop, ct_flush */
	__u32 slot;
	__u32 limit;         /* ct_early_drop: connections to give up at most */
	__u64 now;           /* ct_expire: port time, 0 the current one */
	struct ct_key match; /* ct_flush: what is not zero must be equal; type is always compared */
	__u64 visited;       /* out, all that follow */
	__u64 live;
	__u64 marked;  /* expired now, deleted by a later sweep */
	__u64 revived; /* were marked, and a packet came */
	__u64 deleted;
	__u64 fragments;         /* live fragment records */
	__u64 states[CT_STATES]; /* live connections by enum ct_state */
};

struct port_swap { /* port_cas */
	__u32 slot;
	__u32 swapped; /* out: 1 when the word was `expected` and is `desired` now */
	__u64 expected;
	__u64 desired;
	__u64 found; /* out: the word as it was before */
};

struct port_held { /* port_count_held */
	__u32 slot;
	__u32 pad;
	__s64 to;
	__s64 from;
};
