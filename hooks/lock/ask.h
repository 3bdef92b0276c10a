/* SPDX-License-Identifier: GPL-2.0-only */
/* Asks the agent of this host one question over its unix socket. */
#ifndef MIGRATOR_ASK_H
#define MIGRATOR_ASK_H

#include <limits.h>
#include <stdbool.h>
#include <sys/types.h>

enum { VM_TEXT = 37, REASON_BYTES = 512 };

enum answer { ANSWER_YES, ANSWER_NO, ANSWER_NONE };

/* Which file tells that a strict migration of the VM is in hand here. */
enum mark { MARK_ARRIVING, MARK_LEAVING };

struct agent {
	char socket[108];
	char marks[128]; /* directory beside the socket */
};

/* Milliseconds of CLOCK_MONOTONIC. */
long long now_ms(void);

/* Fill in where the agent is: by `config` (lines "socket = PATH"), which need not exist. False: the path is too long.
 */
bool agent_find(struct agent *agent, const char *config);

bool agent_marked(const struct agent *agent, const char *vm, enum mark mark);

/* One question, answered before `deadline` (as now_ms) or not at all. `reason` has REASON_BYTES and is of a "no". */
enum answer agent_ask(const struct agent *agent, const char *op, const char *vm, unsigned int pid, long long deadline,
		      char *reason);

#endif
