// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the agent does with connection tables inside the kernel: SEC("syscall") programs, called by BPF_PROG_RUN with a
 * context of types.h that is read and written in place. Each returns 0 or a negative errno:
 *   -EINVAL  the slot or the count is out of range
 *   -ENOENT  the port has no connection table
 *   -EBUSY   the port is not ACTIVE, so its table does not change; a sweep ends early when the port ceases to be, and
 *            has counted what it did. One change may follow that: whoever quiesces waits for a sweep that runs
 */
#include <linux/bpf.h>
#include <linux/errno.h>

#include "lib/batch.h"
#include "lib/sweep.h"

#define READ_TRIES 16

/* An entry that is deleted and its memory reused while it is copied shows another generation than its id. */
static long read_one(__u32 index, struct batch *batch)
{
	struct exchange *element = exchange_at(index);
	struct ct_entry *entry;

	if (!element)
		return 1;
	element->found = 0;
	for (int i = 0; i < READ_TRIES; i++) {
		entry = bpf_map_lookup_elem(batch->table, &element->key);
		if (!entry)
			return 0;
		element->entry = *entry;
		element->entry.word = READ_ONCE(entry->word);
		if (element->entry.word >> 32 == (__u32)element->entry.id) {
			element->found = 1;
			batch->found++;
			return 0;
		}
	}
	return 0;
}

/* struct ct_batch. Looks up the keys of the first `count` elements of `exchange`: `found` and `entry` of each are set,
 * and the context's `found` to their number. Works in every state of the port. */
SEC("syscall")
int ct_read(struct ct_batch *context)
{
	return batch_run(context, read_one, 0);
}

static __always_inline void settle_carried(struct ct_entry *entry, const struct ct_entry *counted)
{
	for (int i = 0; i < 2; i++) {
		WRITE_ONCE(entry->carried_packets[i], counted->carried_packets[i]);
		WRITE_ONCE(entry->carried_bytes[i], counted->carried_bytes[i]);
	}
}

static long settle_one(__u32 index, struct batch *batch)
{
	struct exchange *element = exchange_at(index);
	struct ct_entry *entry, none = {};
	__u64 seen, old, word;

	if (!element)
		return 1;
	entry = bpf_map_lookup_elem(batch->table, &element->key);
	element->found = entry && READ_ONCE(entry->id) == element->entry.id;
	if (!entry || !element->found)
		return 0;
	settle_carried(entry, &element->entry);
	word = __sync_fetch_and_or(&entry->word, 0); /* a full barrier */
	element->found = READ_ONCE(entry->id) == element->entry.id;
	if (!element->found) /* another's by now, that no host has counted before */
		settle_carried(entry, &none);
	if (!element->found || CT_FLAGS(word) & CT_F_DEAD) { /* its last counts may have been taken before */
		element->found = 0;
		return 0;
	}
	seen = element->entry.seen;
	for (int i = 0; i < 8; i++) { /* programs only raise it: one who loses eight times has lost to later packets */
		old = READ_ONCE(entry->seen);
		if (old >= seen || cas(&entry->seen, old, seen))
			break;
	}
	batch->found++;
	return 0;
}

/*
 * struct ct_batch. Assigns the source's accounting: for each of the first `count` elements of `exchange`, carried_* of
 * `entry` and, if later, its `seen` (in this port's time) go to the entry of `key` with the same `id`. Where there is
 * none, or it is being ended, `found` is 0 and the caller keeps the amount in the port's total. Assigning twice
 * does no harm. The port is ACTIVE and UNSETTLED: expiry deletes nothing meanwhile.
 */
SEC("syscall")
int ct_settle(struct ct_batch *context)
{
	return batch_run(context, settle_one, 1);
}

static long fill_one(__u32 index, struct batch *batch)
{
	struct exchange *element = exchange_at(index);
	long error;

	if (!element)
		return 1;
	error = bpf_map_update_elem(batch->table, &element->key, &element->entry, BPF_NOEXIST);
	element->found = error == -EEXIST ? FILL_THERE : error ? FILL_REFUSED : FILL_MADE;
	batch->found += error == 0;
	return 0;
}

/*
 * struct ct_batch. Makes an entry of each of the first `count` elements of `exchange` whose key has none: what packets
 * have made here meanwhile is newer and stays, whenever it came. `found` of each is an enum fill. The port is ACTIVE.
 */
SEC("syscall")
int ct_fill(struct ct_batch *context)
{
	return batch_run(context, fill_one, 1);
}

static long relabel_one(__u32 index, struct batch *batch)
{
	struct exchange *element = exchange_at(index);
	struct ct_entry *entry;
	struct ct_key key;

	if (!element)
		return 1;
	key = element->key;
	entry = bpf_map_lookup_elem(batch->table, &key);
	element->found = entry && key.type == CT_TYPE_CONNECTION && ct_is_live(READ_ONCE(entry->word)) &&
			 READ_ONCE(entry->id) == element->entry.id;
	if (!entry || !element->found)
		return 0;
	WRITE_ONCE(entry->mark, element->entry.mark);
	WRITE_ONCE(entry->label[0], element->entry.label[0]);
	WRITE_ONCE(entry->label[1], element->entry.label[1]);
	/* whatever it was judged under: another number now, so that a packet which judges at this moment does not set
	 * it */
	__sync_fetch_and_add(&entry->judged, 1);
	mark_dirty(batch->slot, &key);
	batch->found++;
	return 0;
}

/*
 * struct ct_batch. Gives the connections of the first `count` elements of `exchange`, those that are there with the
 * `id` of `entry`, its mark and label: they are judged again at their next packet. `found` as for ct_settle. The port
 * is ACTIVE.
 */
SEC("syscall")
int ct_relabel(struct ct_batch *context)
{
	return batch_run(context, relabel_one, 1);
}

/*
 * struct ct_sweep. Expiry in two passes. A live entry whose last packet (or the port's floor, if later) is older than
 * its timeout becomes DYING: absent to packets, which may revive it. What an earlier sweep marked is deleted, unless a
 * packet came since (revived), or the port is UNSETTLED (then it stays, marked, as a tombstone).
 */
SEC("syscall")
int ct_expire(struct ct_sweep *context)
{
	return sweep_run(context, SWEEP_EXPIRE);
}

/* struct ct_sweep. Gives up at most `limit` connections that are unanswered, closing or marked, before the table is
 * full. */
SEC("syscall")
int ct_early_drop(struct ct_sweep *context)
{
	return sweep_run(context, SWEEP_EARLY_DROP);
}

/* struct ct_sweep. Deletes what `match` describes: all zero is every connection. */
SEC("syscall")
int ct_flush(struct ct_sweep *context)
{
	return sweep_run(context, SWEEP_FLUSH);
}

/* struct port_swap. One cmpxchg on a port's word, so that a change by the agent loses neither OVERFLOW nor the opening
 * by the guest's first frame, which programs set. -EINVAL: no such slot. */
SEC("syscall")
int port_cas(struct port_swap *context)
{
	__u32 slot = context->slot;
	struct port *port = bpf_map_lookup_elem(&ports, &slot);

	if (!port)
		return -EINVAL;
	context->found = __sync_val_compare_and_swap(&port->word, context->expected, context->desired);
	context->swapped = context->found == context->expected;
	return 0;
}

/* struct port_held. Adds to what waits in a port's hold taps: frames that programs of another generation of maps put
 * there, whose counters the agent cannot write while frames come. -EINVAL: no such slot. */
SEC("syscall")
int port_count_held(struct port_held *context)
{
	__u32 slot = context->slot;
	struct port *port = bpf_map_lookup_elem(&ports, &slot);

	if (!port)
		return -EINVAL;
	__sync_fetch_and_add(&port->held_to, context->to);
	__sync_fetch_and_add(&port->held_from, context->from);
	return 0;
}
