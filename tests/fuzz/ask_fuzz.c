// SPDX-License-Identifier: GPL-2.0-only
/* What the lock driver reads: its configuration, and the agent's answer. Under libFuzzer, or with -DREPLAY a program
 * that takes files. The first byte of an input says which of the two the rest is. */
#include "../../hooks/lock/ask.c"

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#define WAIT_MS 10000 /* the answer is there before it is read */

static void check(bool holds)
{
	if (!holds)
		abort();
}

static void configuration(const uint8_t *data, size_t size)
{
	struct agent agent;
	char path[64];
	int fd = memfd_create("config", 0);

	check(fd >= 0 && write(fd, data, size) == (ssize_t)size);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	memset(&agent, 0xff, sizeof(agent));
	if (agent_find(&agent, path)) {
		check(agent.socket[0] == '/' && strnlen(agent.socket, sizeof(agent.socket)) < sizeof(agent.socket));
		check(strnlen(agent.marks, sizeof(agent.marks)) < sizeof(agent.marks));
		agent_marked(&agent, "6f0c4d2e-7a55-4c0e-9d5e-3f2b8a1c0d01", MARK_LEAVING);
	}
	close(fd);
}

static void answer(const uint8_t *data, size_t size)
{
	char line[2 * REASON_BYTES], reason[REASON_BYTES] = "";
	int ends[2];

	check(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends));
	check(send(ends[0], data, size, MSG_NOSIGNAL) == (ssize_t)size);
	close(ends[0]);
	if (read_line(ends[1], line, sizeof(line), now_ms() + WAIT_MS)) {
		enum answer found = understand(line, reason);

		check(found == ANSWER_YES || found == ANSWER_NO || found == ANSWER_NONE);
		check(strnlen(reason, sizeof(reason)) < sizeof(reason));
		check(found == ANSWER_NO || !reason[0]);
	}
	close(ends[1]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (!size)
		return 0;
	if (data[0] & 1)
		configuration(data + 1, size - 1);
	else
		answer(data + 1, size - 1);
	return 0;
}

#ifdef REPLAY
int main(int count, char **paths)
{
	static uint8_t data[1 << 16];

	for (int i = 1; i < count; i++) {
		FILE *file = fopen(paths[i], "rb");

		check(file != NULL);
		LLVMFuzzerTestOneInput(data, fread(data, 1, sizeof(data), file));
		fclose(file);
	}
	return 0;
}
#endif
