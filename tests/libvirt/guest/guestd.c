// SPDX-License-Identifier: GPL-2.0-only
/* The loop, the clock and the serial port of guestd. An order is one line, "ID op key=value ...", its answer one line
 * of JSON with that id. An order whose id was the last one's is answered again, not obeyed again: who asks may repeat
 * it after a move, when nobody knows on which side of it the line was read. */
#include "guestd.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define ANSWER_MAX 8192

static int epoll;
static int serial;
static char answer[ANSWER_MAX];
static size_t answered;
static bool failed;

uint64_t now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000ull + t.tv_nsec / 1000;
}

void watch(struct watched *one, uint32_t events)
{
	struct epoll_event event = {.events = events, .data.ptr = one};

	if (epoll_ctl(epoll, EPOLL_CTL_MOD, one->fd, &event) && errno == ENOENT)
		epoll_ctl(epoll, EPOLL_CTL_ADD, one->fd, &event);
}

void forget(struct watched *one)
{
	epoll_ctl(epoll, EPOLL_CTL_DEL, one->fd, NULL);
}

/* ---- orders ---- */

const char *text(const struct order *order, const char *key, const char *otherwise)
{
	for (int i = 0; i < order->count; i++)
		if (!strcmp(order->keys[i], key))
			return order->values[i];
	return otherwise;
}

double number(const struct order *order, const char *key, double otherwise)
{
	const char *value = text(order, key, NULL);

	return value ? strtod(value, NULL) : otherwise;
}

void reply(const char *format, ...)
{
	va_list list;
	int length;

	if (failed)
		return;
	va_start(list, format);
	length = vsnprintf(answer + answered, sizeof(answer) - answered, format, list);
	va_end(list);
	answered += length;
	if (answered >= sizeof(answer))
		fail("the answer is longer than %d bytes", ANSWER_MAX);
}

void fail(const char *format, ...)
{
	va_list list;
	int length = snprintf(answer, sizeof(answer), "\"error\": \"");

	va_start(list, format);
	length += vsnprintf(answer + length, sizeof(answer) / 2, format, list);
	va_end(list);
	answered = length + snprintf(answer + length, sizeof(answer) - length, "\"");
	failed = true;
}

bool endpoint(const struct order *order, struct sockaddr_storage *to, socklen_t *length)
{
	const char *address = text(order, "address", "");
	struct sockaddr_in *v4 = (void *)to;
	struct sockaddr_in6 *v6 = (void *)to;
	uint16_t port = htons((uint16_t)number(order, "port", 0));

	memset(to, 0, sizeof(*to));
	if (inet_pton(AF_INET, address, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = port;
		*length = sizeof(*v4);
		return true;
	}
	if (inet_pton(AF_INET6, address, &v6->sin6_addr) == 1) {
		v6->sin6_family = AF_INET6;
		v6->sin6_port = port;
		*length = sizeof(*v6);
		return true;
	}
	fail("address '%s' is none", address);
	return false;
}

int open_socket(int type, const struct sockaddr_storage *at, socklen_t length, bool bound)
{
	int one = 1, fd = socket(at->ss_family, type | SOCK_NONBLOCK, 0);

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (at->ss_family == AF_INET6)
		setsockopt(fd, IPPROTO_IPV6, 26 /* IPV6_V6ONLY */, &one, sizeof(one));
	if (fd < 0 || (bound && bind(fd, (const void *)at, length))) {
		fail("socket: %s", strerror(errno));
		close(fd);
		return -1;
	}
	return fd;
}

static struct kept {
	struct watched watched;
	struct kept *next;
} *all_kept;

void keep(int fd, void (*ready)(struct watched *, uint32_t), uint32_t events)
{
	struct kept *one = malloc(sizeof(*one));

	*one = (struct kept){{fd, ready}, all_kept};
	all_kept = one;
	watch(&one->watched, events);
}

void close_kept(void)
{
	while (all_kept) {
		struct kept *one = all_kept;

		all_kept = one->next;
		forget(&one->watched);
		close(one->watched.fd);
		free(one);
	}
}

static bool reset_order(const struct order *order)
{
	if (strcmp(order->op, "reset"))
		return false;
	tcp_reset();
	datagram_reset();
	close_kept();
	return true;
}

static void obey(char *line)
{
	struct order order = {0};
	char *rest = NULL, *word = strtok_r(line, " ", &rest);

	order.op = word ? word : "";
	while ((word = strtok_r(NULL, " ", &rest)) && order.count < 16) {
		char *equals = strchr(word, '=');

		if (!equals)
			continue;
		*equals = 0;
		order.keys[order.count] = word;
		order.values[order.count++] = equals + 1;
	}
	if (!tcp_order(&order) && !datagram_order(&order) && !reset_order(&order) && strcmp(order.op, "ping"))
		fail("no order '%s'", order.op);
}

/* ---- the serial port ---- */

static void write_all(const char *data, size_t length)
{
	while (length) {
		ssize_t done = write(serial, data, length);

		if (done < 0 && errno != EAGAIN && errno != EINTR)
			return;
		if (done < 0)
			poll(&(struct pollfd){.fd = serial, .events = POLLOUT}, 1, 100);
		else
			data += done, length -= done;
	}
}

static void serve(char *line)
{
	static char last[32];
	char *blank = strchr(line, ' ');

	if (!blank || blank - line >= (long)sizeof(last))
		return; /* the rest of a line that was cut off */
	*blank = 0;
	if (strcmp(last, line)) {
		strcpy(last, line);
		answered = 0;
		failed = false;
		obey(blank + 1);
	}
	write_all("{\"id\": \"", 8);
	write_all(last, strlen(last));
	write_all(answered ? "\", " : "\"", answered ? 3 : 1);
	write_all(answer, answered);
	write_all("}\n", 2);
}

static void serial_ready(struct watched *self, uint32_t events)
{
	static char line[1024];
	static size_t filled;
	char byte;

	(void)events;
	while (read(self->fd, &byte, 1) == 1) {
		if (byte == '\n') {
			line[filled] = 0;
			filled = 0;
			serve(line);
		} else if (filled < sizeof(line) - 1) {
			line[filled++] = byte;
		}
	}
}

static void open_serial(const char *path)
{
	static struct watched one = {.ready = serial_ready};
	struct termios raw;

	serial = open(path, O_RDWR | O_NONBLOCK | O_NOCTTY);
	if (serial < 0) {
		perror(path);
		exit(1);
	}
	tcgetattr(serial, &raw);
	cfmakeraw(&raw);
	cfsetspeed(&raw, B115200);
	tcsetattr(serial, TCSANOW, &raw);
	one.fd = serial;
	watch(&one, EPOLLIN);
}

int main(int argc, char **argv)
{
	struct epoll_event events[64];
	struct rlimit files = {1 << 16, 1 << 16};

	setrlimit(RLIMIT_NOFILE, &files);
	epoll = epoll_create1(EPOLL_CLOEXEC);
	open_serial(argc > 1 ? argv[1] : "/dev/ttyS1");
	printf("guestd: ready\n");
	fflush(stdout);
	for (;;) {
		uint64_t now = now_us(), next = tcp_tick(now), other = datagram_tick(now);
		int64_t wait = (int64_t)((other < next ? other : next) - now_us());
		struct timespec timeout = {wait > 0 ? wait / 1000000 : 0, wait > 0 ? wait % 1000000 * 1000 : 0};
		int count = epoll_pwait2(epoll, events, 64, &timeout, NULL);

		for (int i = 0; i < count; i++) {
			struct watched *one = events[i].data.ptr;
			bool ordered = one->fd == serial;

			one->ready(one, events[i].events); /* may free it */
			if (ordered)
				break; /* an order may have freed what the other events point to: they come again */
		}
	}
}
