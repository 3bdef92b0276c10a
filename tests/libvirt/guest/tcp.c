// SPDX-License-Identifier: GPL-2.0-only
/* TCP, as migrator/lab/workers/tcp.py has it: an echo server, and connections that carry predictable bytes to one and
 * compare what comes back.
 *
 *   listen {address, port}
 *   connect {address, port, count}      begins; `status` tells how many are connected or failed
 *   flow {every_ms, size}               each connection sends so much so often, when its last echo is back; 0: none
 *   ask {size}, verdict                 one message on each; how many came back whole
 *   status, close */
#include "guestd.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define STREAMS 4096
#define CHUNK   16384

static struct stream {
	struct watched watched;
	uint32_t number;
	bool connected;
	char dead[48];
	uint64_t sent, wanted, verified, goal, asked_us;
} *streams[STREAMS];
static uint32_t stream_count;

static struct client {
	struct watched watched;
	struct client *next, **link;
	size_t length;
	char waiting[CHUNK];
} *clients;
static uint32_t serving;

static struct {
	uint64_t every_us, next;
	uint32_t size;
} flow;

/* ---- server ---- */

static void hang_up(struct client *one)
{
	*one->link = one->next;
	if (one->next)
		one->next->link = one->link;
	forget(&one->watched);
	close(one->watched.fd);
	free(one);
	serving--;
}

static void echo_ready(struct watched *self, uint32_t events)
{
	struct client *one = (void *)self;
	ssize_t done;

	(void)events;
	if (one->length < sizeof(one->waiting)) {
		done = recv(self->fd, one->waiting + one->length, sizeof(one->waiting) - one->length, 0);
		if (done == 0 || (done < 0 && errno != EAGAIN)) {
			hang_up(one);
			return;
		}
		one->length += done > 0 ? done : 0;
	}
	done = send(self->fd, one->waiting, one->length, MSG_NOSIGNAL);
	if (done < 0 && errno != EAGAIN) {
		hang_up(one);
		return;
	}
	if (done > 0) {
		one->length -= done;
		memmove(one->waiting, one->waiting + done, one->length);
	}
	watch(self, one->length ? EPOLLIN | EPOLLOUT : EPOLLIN);
}

static void accept_ready(struct watched *self, uint32_t events)
{
	int fd, one = 1;

	(void)events;
	while ((fd = accept4(self->fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
		struct client *made = calloc(1, sizeof(*made));

		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		made->watched = (struct watched){fd, echo_ready};
		made->next = clients;
		made->link = &clients;
		if (clients)
			clients->link = &made->next;
		clients = made;
		watch(&made->watched, EPOLLIN);
		serving++;
	}
}

static void listen_order(const struct order *order)
{
	struct sockaddr_storage at;
	socklen_t length;
	int fd;

	if (!endpoint(order, &at, &length) || (fd = open_socket(SOCK_STREAM, &at, length, true)) < 0)
		return;
	if (listen(fd, 4096)) {
		fail("listen: %s", strerror(errno));
		close(fd);
		return;
	}
	keep(fd, accept_ready, EPOLLIN);
}

/* ---- client ---- */

static char expected(const struct stream *stream, uint64_t offset)
{
	return (char)(((uint32_t)(stream->number * 7919u + offset) * 2654435761u) >> 24);
}

static void give_up(struct stream *stream, const char *reason)
{
	strncpy(stream->dead, reason, sizeof(stream->dead) - 1);
	forget(&stream->watched);
}

static void push(struct stream *stream)
{
	char data[CHUNK];

	while (!stream->dead[0] && stream->sent < stream->wanted) {
		uint64_t size = stream->wanted - stream->sent;
		ssize_t done;

		size = size < sizeof(data) ? size : sizeof(data);
		for (uint64_t i = 0; i < size; i++)
			data[i] = expected(stream, stream->sent + i);
		done = send(stream->watched.fd, data, size, MSG_NOSIGNAL);
		if (done < 0 && errno != EAGAIN)
			give_up(stream, strerror(errno));
		if (done <= 0)
			return;
		stream->sent += done;
	}
}

static void pull(struct stream *stream)
{
	char data[CHUNK];
	ssize_t size = recv(stream->watched.fd, data, sizeof(data), 0);

	if (size < 0 && errno == EAGAIN)
		return;
	if (size <= 0) {
		give_up(stream, size ? strerror(errno) : "closed by the other side");
		return;
	}
	for (ssize_t i = 0; i < size; i++)
		if (data[i] != expected(stream, stream->verified++)) {
			give_up(stream, "wrong bytes");
			return;
		}
}

static void stream_ready(struct watched *self, uint32_t events)
{
	struct stream *stream = (void *)self;
	int status = 0;
	socklen_t length = sizeof(status);

	(void)events;
	if (!stream->connected) {
		getsockopt(self->fd, SOL_SOCKET, SO_ERROR, &status, &length);
		stream->connected = !status;
		if (status)
			give_up(stream, strerror(status));
	} else {
		pull(stream);
		push(stream);
	}
	if (!stream->dead[0])
		watch(self, stream->sent < stream->wanted ? EPOLLIN | EPOLLOUT : EPOLLIN);
}

static void want(struct stream *stream, uint32_t size)
{
	stream->wanted += size;
	stream->asked_us = now_us();
	push(stream);
	if (!stream->dead[0] && stream->sent < stream->wanted)
		watch(&stream->watched, EPOLLIN | EPOLLOUT);
}

static void connect_order(const struct order *order)
{
	struct sockaddr_storage to;
	socklen_t length;
	int one = 1;

	if (!endpoint(order, &to, &length))
		return;
	for (int left = number(order, "count", 1); left > 0; left--) {
		struct stream *made;
		int fd;

		if (stream_count == STREAMS) {
			fail("no room for more than %d connections", STREAMS);
			return;
		}
		if ((fd = open_socket(SOCK_STREAM, &to, length, false)) < 0)
			return;
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		made = calloc(1, sizeof(*made));
		made->watched = (struct watched){fd, stream_ready};
		made->number = stream_count;
		streams[stream_count++] = made;
		watch(&made->watched, EPOLLIN | EPOLLOUT);
		if (connect(fd, (void *)&to, length) && errno != EINPROGRESS)
			give_up(made, strerror(errno));
	}
}

static void ask(const struct order *order)
{
	for (uint32_t i = 0; i < stream_count; i++) {
		if (!streams[i]->connected)
			continue;
		if (!streams[i]->dead[0])
			want(streams[i], number(order, "size", 64));
		streams[i]->goal = streams[i]->wanted;
	}
}

static void verdict(void)
{
	uint32_t total = 0, dead = 0, silent = 0;
	uint64_t bytes = 0;
	const char *reason = NULL;

	for (uint32_t i = 0; i < stream_count; i++) {
		const struct stream *one = streams[i];

		if (!one->connected)
			continue;
		total++;
		bytes += one->verified;
		dead += one->dead[0] != 0;
		silent += !one->dead[0] && one->verified < one->goal;
		if (one->dead[0] || one->verified < one->goal)
			reason = one->dead[0] ? one->dead : "silent";
	}
	reply("\"total\": %u, \"alive\": %u, \"lost\": %u, \"bytes\": %lu, \"over\": %s, ", total,
	      total - dead - silent, dead + silent, bytes, silent ? "false" : "true");
	reply(reason ? "\"reasons\": [\"%s\"]" : "\"reasons\": []", reason);
}

static void status(void)
{
	uint32_t alive = 0, connected = 0, failed = 0, answering = 0;
	uint64_t bytes = 0, now = now_us();

	for (uint32_t i = 0; i < stream_count; i++) {
		const struct stream *one = streams[i];

		connected += one->connected;
		failed += !one->connected && one->dead[0];
		bytes += one->verified;
		if (!one->connected || one->dead[0])
			continue;
		alive++;
		answering += one->verified == one->wanted || now - one->asked_us < 1000000;
	}
	reply("\"total\": %u, \"alive\": %u, \"connected\": %u, \"failed\": %u", stream_count, alive, connected,
	      failed);
	reply(", \"serving\": %u, \"answering\": %u, \"bytes\": %lu", serving, answering, bytes);
}

static void close_all(void)
{
	for (uint32_t i = 0; i < stream_count; i++) {
		forget(&streams[i]->watched);
		close(streams[i]->watched.fd);
		free(streams[i]);
	}
	stream_count = 0;
}

void tcp_reset(void)
{
	close_all();
	flow.every_us = 0;
	while (clients)
		hang_up(clients);
}

bool tcp_order(const struct order *order)
{
	if (!strcmp(order->op, "listen"))
		listen_order(order);
	else if (!strcmp(order->op, "connect"))
		connect_order(order);
	else if (!strcmp(order->op, "flow")) {
		flow.every_us = number(order, "every_ms", 0) * 1000;
		flow.size = number(order, "size", 64);
		flow.next = now_us();
	} else if (!strcmp(order->op, "ask"))
		ask(order);
	else if (!strcmp(order->op, "verdict"))
		verdict();
	else if (!strcmp(order->op, "status"))
		status();
	else if (!strcmp(order->op, "close"))
		close_all();
	else
		return false;
	return true;
}

uint64_t tcp_tick(uint64_t now)
{
	static uint32_t part;

	if (!flow.every_us)
		return now + 1000000;
	if (flow.next <= now) { /* a tenth of the connections every tenth of the interval: an even load */
		for (uint32_t i = part; i < stream_count; i += 10)
			if (streams[i]->connected && !streams[i]->dead[0] && streams[i]->verified == streams[i]->wanted)
				want(streams[i], flow.size);
		part = (part + 1) % 10;
		flow.next = now + flow.every_us / 10;
	}
	return flow.next;
}
