// SPDX-License-Identifier: GPL-2.0-only
/* No thread, no allocation beyond what stdio takes for the configuration, no descriptor that a child inherits: libvirtd
 * calls this in any of its threads, with the VM locked, and between fork and exec. */
#define _GNU_SOURCE
#include "ask.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define SOCKET    "/run/migrator/hook.sock"
#define NO_REASON "\"reason\": \""

static const char *const mark_names[] = {[MARK_ARRIVING] = "arriving", [MARK_LEAVING] = "leaving"};

long long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* The value of a line `socket = "PATH" # remark`, in place; NULL for any other line. */
static char *socket_of(char *line)
{
	char *end = strpbrk(line, "#\n"), *value;

	if (end)
		*end = '\0';
	line += strspn(line, " \t");
	if (strncmp(line, "socket", 6))
		return NULL;
	line += 6 + strspn(line + 6, " \t");
	if (*line != '=')
		return NULL;
	value = line + 1 + strspn(line + 1, " \t\"'");
	value[strcspn(value, " \t\"'")] = '\0';
	return value;
}

bool agent_find(struct agent *agent, const char *config)
{
	char line[512], *value;
	FILE *file = fopen(config, "re");
	size_t length = strlen(SOCKET);
	int written;

	memcpy(agent->socket, SOCKET, length + 1);
	while (file && fgets(line, sizeof(line), file)) {
		value = socket_of(line);
		if (!value)
			continue;
		length = strlen(value);
		if (length < 2 || length >= sizeof(agent->socket) || *value != '/')
			break;
		memcpy(agent->socket, value, length + 1);
	}
	if (file)
		fclose(file);
	length = strrchr(agent->socket, '/') - agent->socket;
	written = snprintf(agent->marks, sizeof(agent->marks), "%.*s/strict", (int)length, agent->socket);
	return written > 0 && (size_t)written < sizeof(agent->marks);
}

bool agent_marked(const struct agent *agent, const char *vm, enum mark mark)
{
	char path[PATH_MAX];

	snprintf(path, sizeof(path), "%s/%s.%s", agent->marks, vm, mark_names[mark]);
	return access(path, F_OK) == 0;
}

/* Wait for `events`; false at the deadline. */
static bool ready(int fd, short events, long long deadline)
{
	struct pollfd one = {.fd = fd, .events = events};

	for (;;) {
		long long left = deadline - now_ms();
		int count = left > 0 ? poll(&one, 1, (int)left) : 0;

		if (count > 0)
			return true;
		if (count == 0 || errno != EINTR)
			return false;
	}
}

static bool send_all(int fd, const char *text, size_t length, long long deadline)
{
	while (length) {
		ssize_t sent = send(fd, text, length, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (sent > 0) {
			text += sent;
			length -= sent;
		} else if (errno != EINTR && (errno != EAGAIN || !ready(fd, POLLOUT, deadline))) {
			return false;
		}
	}
	return true;
}

/* One line without its end into `line` of `size` bytes; what does not fit is left out. False: it did not come. */
static bool read_line(int fd, char *line, size_t size, long long deadline)
{
	size_t used = 0;

	while (ready(fd, POLLIN, deadline)) {
		char part[256];
		ssize_t got = recv(fd, part, sizeof(part), MSG_DONTWAIT);

		if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR))
			return false;
		for (ssize_t i = 0; i < got; i++) {
			if (part[i] == '\n') {
				line[used] = '\0';
				return true;
			}
			if (used < size - 1)
				line[used++] = part[i];
		}
	}
	return false;
}

/* The text after "reason", up to its closing quote. */
static void copy_reason(const char *line, char *reason)
{
	const char *from = strstr(line, NO_REASON);
	size_t used = 0;

	for (from = from ? from + strlen(NO_REASON) : ""; *from && *from != '"' && used < REASON_BYTES - 1; from++) {
		bool escaped = *from == '\\' && from[1];

		if (escaped)
			from++;
		reason[used++] = (escaped && strchr("nrt", *from)) ? ' ' : *from;
	}
	reason[used] = '\0';
}

static enum answer understand(const char *line, char *reason)
{
	if (!strncmp(line, "{\"ok\": true", 11))
		return ANSWER_YES;
	if (strncmp(line, "{\"ok\": false", 12))
		return ANSWER_NONE;
	copy_reason(line, reason);
	return ANSWER_NO;
}

enum answer agent_ask(const struct agent *agent, const char *op, const char *vm, unsigned int pid, long long deadline,
		      char *reason)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	enum answer answer = ANSWER_NONE;
	char line[2 * REASON_BYTES];
	int length, fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	if (fd < 0)
		return ANSWER_NONE;
	memcpy(address.sun_path, agent->socket, strlen(agent->socket) + 1);
	length = snprintf(line, sizeof(line), "{\"op\": \"%s\", \"uuid\": \"%s\", \"pid\": %u}\n", op, vm, pid);
	if (!connect(fd, (struct sockaddr *)&address, sizeof(address)) && send_all(fd, line, length, deadline) &&
	    read_line(fd, line, sizeof(line), deadline))
		answer = understand(line, reason);
	close(fd);
	return answer;
}
