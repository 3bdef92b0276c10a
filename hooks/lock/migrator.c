// SPDX-License-Identifier: GPL-2.0-only
/* libvirt's lock driver "migrator": makes the switchover of a strict migration a transaction.
 *
 * libvirtd calls `acquire` before it starts a VM's vCPUs and `release` after it has stopped them, for whatever reason.
 * The agent marks each VM of which a strict migration is in hand here by a file; for all others the answer is yes, at
 * once and without a question. Of a marked VM
 *
 *   release (source)       is the pause: it is answered when the destination has committed; whatever comes, go on
 *   acquire (source)       a move has failed: it is answered when the VM's ports pass frames again; never refused
 *   acquire (destination)  waits for the commit, else it is refused: libvirt then goes on with the VM at the source
 *
 * The agent takes the mark away when it has committed. So an agent that does not answer while there is one has not: the
 * guest must not run here then. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <libvirt/virterror.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <syslog.h>
#include <time.h>

#include "ask.h"
#include "lock_driver.h"

#ifndef CONFIG
#define CONFIG "/etc/migrator/hook.conf"
#endif
#ifndef WAIT_MS
#define WAIT_MS 2000
#endif
#define AGAIN_MS 20

/* Written by `init` only, before libvirtd has any VM. */
static struct agent agent;

struct vm {
	char uuid[VM_TEXT];
	unsigned int pid;
};

typedef void report_fn(int domain, int code, const char *file, const char *function, size_t line, const char *format,
		       ...);

/* To libvirt's caller, by the function of libvirt's own plugins where there is it, and to the system's log. */
static void complain(const char *text)
{
	report_fn *report = (report_fn *)dlsym(RTLD_DEFAULT, "virReportErrorHelper");

	if (report)
		report(VIR_FROM_LOCKING, VIR_ERR_OPERATION_FAILED, __FILE__, __func__, __LINE__, "%s", text);
	syslog(LOG_DAEMON | LOG_WARNING, "migrator: %s", text);
}

static int init(unsigned int version, const char *config, unsigned int flags)
{
	(void)config;
	(void)flags;
	if (version / 1000000 != LOCK_VERSION / 1000000) {
		complain("this libvirt has another interface for lock drivers");
		return -1;
	}
	if (!agent_find(&agent, CONFIG)) {
		complain("the path of the agent's socket is too long");
		return -1;
	}
	return 0;
}

static int deinit(void)
{
	return 0;
}

static void format_uuid(char *text, const unsigned char *raw)
{
	for (int i = 0; i < 16; i++)
		text += sprintf(text, (i == 3 || i == 5 || i == 7 || i == 9) ? "%02x-" : "%02x", raw[i]);
}

static int new_vm(struct lock_manager *manager, unsigned int type, size_t count, struct lock_param *params,
		  unsigned int flags)
{
	struct vm *vm = calloc(1, sizeof(*vm));

	(void)type;
	(void)flags;
	if (!vm) {
		complain("out of memory");
		return -1;
	}
	for (size_t i = 0; i < count; i++) {
		if (params[i].type == LOCK_PARAM_UUID && !strcmp(params[i].key, "uuid"))
			format_uuid(vm->uuid, params[i].value.uuid);
		else if (params[i].type == LOCK_PARAM_UINT && !strcmp(params[i].key, "pid"))
			vm->pid = params[i].value.ui;
	}
	manager->private = vm;
	return 0;
}

static void free_vm(struct lock_manager *manager)
{
	free(manager->private);
	manager->private = NULL;
}

static int add_resource(struct lock_manager *manager, unsigned int type, const char *name, size_t count,
			struct lock_param *params, unsigned int flags)
{
	(void)manager, (void)type, (void)name, (void)count, (void)params, (void)flags;
	return 0; /* disks and leases are nobody's here */
}

static void pause_ms(long ms)
{
	struct timespec left = {.tv_nsec = ms * 1000000};

	while (nanosleep(&left, &left) && errno == EINTR)
		;
}

/* The guest may run here: all of its state is. -1: it may not, and libvirt's caller is told why. */
static int arrive(const struct vm *vm)
{
	long long deadline = now_ms() + WAIT_MS;
	char reason[REASON_BYTES], text[REASON_BYTES + 128];

	/* An agent that comes back within the time may still answer, and without a mark nothing is missing. */
	while (agent_marked(&agent, vm->uuid, MARK_ARRIVING)) {
		switch (agent_ask(&agent, "acquire", vm->uuid, vm->pid, deadline, reason)) {
		case ANSWER_YES:
			return 0;
		case ANSWER_NO:
			snprintf(text, sizeof(text), "VM %s must not run here: %s", vm->uuid, reason);
			complain(text);
			return -1;
		case ANSWER_NONE:
			break;
		}
		if (now_ms() + AGAIN_MS >= deadline) {
			snprintf(
			    text, sizeof(text),
			    "VM %s must not run here: not all of its network state has come, and the migrator agent "
			    "does not answer",
			    vm->uuid);
			complain(text);
			return -1;
		}
		pause_ms(AGAIN_MS);
	}
	return 0;
}

/* Tell the agent, and give it time; what it answers changes nothing. */
static void tell(const char *op, const struct vm *vm)
{
	char reason[REASON_BYTES];

	if (agent_ask(&agent, op, vm->uuid, vm->pid, now_ms() + WAIT_MS, reason) == ANSWER_NONE)
		syslog(LOG_DAEMON | LOG_WARNING, "migrator: %s of VM %s: no answer of the agent", op, vm->uuid);
}

static int acquire(struct lock_manager *manager, const char *state, unsigned int flags, int action, int *fd)
{
	const struct vm *vm = manager->private;

	(void)state, (void)action;
	if (fd)
		*fd = -1;
	if (flags & LOCK_REGISTER_ONLY)
		return 0;
	if (agent_marked(&agent, vm->uuid, MARK_ARRIVING))
		return arrive(vm);
	if (agent_marked(&agent, vm->uuid, MARK_LEAVING))
		tell("acquire", vm);
	return 0;
}

static int release(struct lock_manager *manager, char **state, unsigned int flags)
{
	const struct vm *vm = manager->private;

	(void)flags;
	if (state)
		*state = NULL;
	if (agent_marked(&agent, vm->uuid, MARK_LEAVING))
		tell("release", vm);
	return 0;
}

static int inquire(struct lock_manager *manager, char **state, unsigned int flags)
{
	(void)manager, (void)flags;
	if (state)
		*state = NULL;
	return 0;
}

__attribute__((visibility("default"))) struct lock_driver virLockDriverImpl = {
    .version = LOCK_VERSION,
    .init = init,
    .deinit = deinit,
    .new = new_vm,
    .free = free_vm,
    .add_resource = add_resource,
    .acquire = acquire,
    .release = release,
    .inquire = inquire,
};
