/* SPDX-License-Identifier: GPL-2.0-only */
/* What the guest of the libvirt tests does: echo and converse over TCP, send and count numbered datagrams. One thread,
 * one epoll loop; orders come over the second serial port, so that they share nothing with the network under test. */
#ifndef GUESTD_H
#define GUESTD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/socket.h>

/* Something with a descriptor in the loop. `ready` may free it. */
struct watched {
	int fd;
	void (*ready)(struct watched *self, uint32_t events);
};

void watch(struct watched *one, uint32_t events); /* begin, or change the events */
void forget(struct watched *one);                 /* before its descriptor is closed */
uint64_t now_us(void);                            /* CLOCK_MONOTONIC */

/* One order: "op key=value key=value". Values have no blanks. */
struct order {
	const char *op;
	int count;
	const char *keys[16];
	const char *values[16];
};

const char *text(const struct order *order, const char *key, const char *otherwise);
double number(const struct order *order, const char *key, double otherwise);

/* The answer: members of a JSON object, each after `reply(...)` separated by the caller. */
void reply(const char *format, ...) __attribute__((format(printf, 1, 2)));
void fail(const char *format, ...) __attribute__((format(printf, 1, 2))); /* answer with an error instead */

/* The address and port of an order; false after `fail`. */
bool endpoint(const struct order *order, struct sockaddr_storage *to, socklen_t *length);
/* A non-blocking socket for such an address, bound to it if `bound`; -1 after `fail`. */
int open_socket(int type, const struct sockaddr_storage *at, socklen_t length, bool bound);

/* A socket that stays open until `reset`: listeners and receivers. */
void keep(int fd, void (*ready)(struct watched *, uint32_t), uint32_t events);
void close_kept(void);

/* Each family of orders: true when the order was one of its own. `tick` does what is due and returns when to call
 * again, in microseconds of CLOCK_MONOTONIC. */
bool tcp_order(const struct order *order);
uint64_t tcp_tick(uint64_t now);
void tcp_reset(void);
bool datagram_order(const struct order *order);
uint64_t datagram_tick(uint64_t now);
void datagram_reset(void);

#endif
