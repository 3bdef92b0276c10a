// SPDX-License-Identifier: GPL-2.0-only
/* Numbered datagrams, as migrator/lab/workers/probe.py has them: magic, flow, number, in network byte order.
 *
 *   echo {address, port}                             answer every datagram
 *   receive {address, port}                          count what comes, by flow
 *   send {flow, address, port, every_ms, source_port}
 *   stop {flow}, sending {flow}                      how many were sent
 *   spray {address, port, ports, source_port, sources}   one datagram from each source port to each port, in the
 *                                                    background; what comes back is counted as any other
 *   sprayed                                          how many were sent so far, and whether that is all
 *   report {below}                                   of all flows received or answered: as Arrivals.report() */
#include "guestd.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FLOWS   16
#define NUMBERS (1u << 22)
#define BURST   64
#define BUFFER  (8 << 20)

struct datagram {
	char magic[4];
	uint32_t flow;
	uint64_t number;
} __attribute__((packed));

static struct arrivals {
	bool used;
	uint32_t flow;
	int64_t newest;
	uint64_t received, doubled, overtaken, beyond;
	uint8_t seen[NUMBERS / 8]; /* pages that no number touched are not there */
} arrivals[FLOWS];

static struct sender {
	struct watched watched; /* first: its handler casts */
	bool used, running;
	uint32_t flow;
	struct sockaddr_storage to;
	socklen_t length;
	uint64_t every_us, next, sent, failed;
} senders[FLOWS];

static struct {
	struct watched *from;
	uint32_t sources, ports, sent;
	uint16_t port;
	struct sockaddr_storage to;
	socklen_t length;
} spray;

static void note(uint32_t flow, uint64_t number)
{
	struct arrivals *one = arrivals;

	while (one < arrivals + FLOWS && one->used && one->flow != flow)
		one++;
	if (one == arrivals + FLOWS)
		return;
	if (!one->used)
		one->used = true, one->flow = flow, one->newest = -1;
	if (number >= NUMBERS) {
		one->beyond++;
		return;
	}
	bool again = one->seen[number / 8] & 1 << number % 8;
	one->seen[number / 8] |= 1 << number % 8;
	one->doubled += again;
	one->received += !again;
	one->overtaken += !again && (int64_t)number < one->newest;
	if ((int64_t)number > one->newest)
		one->newest = number;
}

static void receive_ready(struct watched *self, uint32_t events)
{
	struct datagram got;

	(void)events;
	for (int i = 0; i < BURST; i++) {
		ssize_t size = recv(self->fd, &got, sizeof(got), 0);

		if (size < 0)
			return; /* nothing more, or an ICMP error that tells of an earlier one */
		if (size == sizeof(got) && !memcmp(got.magic, "mgNB", 4))
			note(be32toh(got.flow), be64toh(got.number));
	}
}

static void echo_ready(struct watched *self, uint32_t events)
{
	struct sockaddr_storage from;
	char data[2048];

	(void)events;
	for (int i = 0; i < BURST; i++) {
		socklen_t length = sizeof(from);
		ssize_t size = recvfrom(self->fd, data, sizeof(data), 0, (void *)&from, &length);

		if (size < 0)
			return;
		sendto(self->fd, data, size, 0, (void *)&from, length);
	}
}

static void large(int fd)
{
	int size = BUFFER, one = 1;

	setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size));
	setsockopt(fd, SOL_SOCKET, SO_BROADCAST, &one, sizeof(one));
}

static void listen_for(const struct order *order, void (*ready)(struct watched *, uint32_t))
{
	struct sockaddr_storage at;
	socklen_t length;
	int fd;

	if (!endpoint(order, &at, &length) || (fd = open_socket(SOCK_DGRAM, &at, length, true)) < 0)
		return;
	large(fd);
	keep(fd, ready, EPOLLIN);
}

static struct sender *sender(uint32_t flow)
{
	for (struct sender *one = senders; one < senders + FLOWS; one++)
		if (one->used && one->flow == flow)
			return one;
	return NULL;
}

/* sin_port and sin6_port are at the same place */
static void set_port(struct sockaddr_storage *at, uint16_t port)
{
	memcpy((char *)at + 2, &(uint16_t){htobe16(port)}, 2);
}

static void send_order(const struct order *order)
{
	uint32_t flow = number(order, "flow", 0);
	struct sender *one = sender(flow), *free_one = senders;
	uint16_t port = number(order, "source_port", 0);
	struct sockaddr_storage from = {0};

	while (free_one < senders + FLOWS && free_one->used)
		free_one++;
	if (one || free_one == senders + FLOWS) {
		fail(one ? "flow %u is there already" : "no room for flow %u", flow);
		return;
	}
	one = free_one;
	if (!endpoint(order, &one->to, &one->length))
		return;
	from.ss_family = one->to.ss_family;
	set_port(&from, port);
	one->watched = (struct watched){open_socket(SOCK_DGRAM, &from, one->length, port != 0), receive_ready};
	if (one->watched.fd < 0)
		return;
	large(one->watched.fd);
	watch(&one->watched, EPOLLIN);
	one->used = one->running = true;
	one->flow = flow;
	one->every_us = number(order, "every_ms", 1) * 1000;
	one->every_us += !one->every_us;
	one->sent = one->failed = 0;
	one->next = now_us();
}

static void stop_order(const struct order *order, bool end)
{
	struct sender *one = sender(number(order, "flow", 0));

	if (!one) {
		fail("no such flow");
		return;
	}
	one->running = one->running && !end;
	reply("\"sent\": %lu, \"failed\": %lu", one->sent, one->failed);
}

static void end_spray(void)
{
	for (uint32_t i = 0; i < spray.sources; i++) {
		forget(&spray.from[i]);
		close(spray.from[i].fd);
	}
	free(spray.from);
	memset(&spray, 0, sizeof(spray));
}

static void spray_order(const struct order *order)
{
	uint32_t sources = number(order, "sources", 1);
	struct sockaddr_storage from = {0};

	end_spray();
	if (!endpoint(order, &spray.to, &spray.length))
		return;
	spray.port = number(order, "port", 0);
	spray.ports = number(order, "ports", 1);
	spray.from = calloc(sources, sizeof(*spray.from));
	from.ss_family = spray.to.ss_family;
	while (spray.sources < sources) {
		struct watched *one = &spray.from[spray.sources];

		set_port(&from, number(order, "source_port", 0) + spray.sources);
		*one = (struct watched){open_socket(SOCK_DGRAM, &from, spray.length, true), receive_ready};
		if (one->fd < 0)
			return;
		watch(one, EPOLLIN);
		spray.sources++;
	}
}

static void spray_some(void)
{
	for (int i = 0; i < BURST && spray.sent < spray.sources * spray.ports; i++) {
		set_port(&spray.to, spray.port + spray.sent % spray.ports);
		if (sendto(spray.from[spray.sent / spray.ports].fd, "", 1, 0, (void *)&spray.to, spray.length) < 0)
			return; /* no room: the next time */
		spray.sent++;
	}
}

static void report_one(const struct arrivals *one, int64_t below)
{
	int64_t newest = below >= 0 && below <= one->newest ? below - 1 : one->newest;
	uint64_t missing = 0;

	reply("\"%u\": {\"missing\": [", one->flow);
	for (int64_t n = 0; n <= newest; n++)
		if (!(one->seen[n / 8] & 1 << n % 8) && missing++ < 100)
			reply("%s%ld", missing > 1 ? ", " : "", n);
	reply("], \"received\": %lu, \"newest\": %ld, \"missing_count\": %lu, \"doubled\": %lu, \"overtaken\": %lu",
	      newest + 1 - missing, newest, missing, one->doubled, one->overtaken);
	reply(", \"beyond\": %lu}", one->beyond);
}

static void report(const struct order *order)
{
	const char *between = "";

	reply("\"flows\": {");
	for (struct arrivals *one = arrivals; one < arrivals + FLOWS && one->used; one++) {
		reply("%s", between);
		report_one(one, number(order, "below", -1));
		between = ", ";
	}
	reply("}");
}

void datagram_reset(void)
{
	for (struct sender *one = senders; one < senders + FLOWS; one++)
		if (one->used) {
			forget(&one->watched);
			close(one->watched.fd);
			one->used = false;
		}
	for (struct arrivals *one = arrivals; one < arrivals + FLOWS && one->used; one++)
		memset(one, 0, sizeof(*one));
	end_spray();
}

bool datagram_order(const struct order *order)
{
	if (!strcmp(order->op, "udp_echo"))
		listen_for(order, echo_ready);
	else if (!strcmp(order->op, "receive"))
		listen_for(order, receive_ready);
	else if (!strcmp(order->op, "send"))
		send_order(order);
	else if (!strcmp(order->op, "stop") || !strcmp(order->op, "sending"))
		stop_order(order, order->op[1] == 't');
	else if (!strcmp(order->op, "report"))
		report(order);
	else if (!strcmp(order->op, "spray"))
		spray_order(order);
	else if (!strcmp(order->op, "sprayed"))
		reply("\"sent\": %u, \"over\": %s", spray.sent,
		      spray.sent == spray.sources * spray.ports ? "true" : "false");
	else
		return false;
	return true;
}

/* The next number of a flow; false while its socket is full: the device is slower than the burst after a standstill,
 * and that shall cost no number. */
static bool send_next(struct sender *one)
{
	struct datagram made = {"mgNB", htobe32(one->flow), htobe64(one->sent)};

	if (sendto(one->watched.fd, &made, sizeof(made), 0, (void *)&one->to, one->length) < 0) {
		if (errno == EAGAIN)
			return false;
		one->failed++;
	}
	one->sent++;
	one->next += one->every_us;
	return true;
}

uint64_t datagram_tick(uint64_t now)
{
	uint64_t soonest = now + 1000000;

	spray_some();
	if (spray.sent < spray.sources * spray.ports)
		soonest = now + 1000;
	for (struct sender *one = senders; one < senders + FLOWS; one++) {
		bool taken = true;
		uint64_t next;

		if (!one->used || !one->running)
			continue;
		for (int i = 0; i < BURST && taken && one->next <= now; i++) /* a late tick sends what is due */
			taken = send_next(one);
		next = taken ? one->next : now + 1000;
		soonest = next < soonest ? next : soonest;
	}
	return soonest;
}
