/* SPDX-License-Identifier: GPL-2.0-only */
/* The interface between libvirtd and a lock-manager plugin, as far as this driver needs it.
 *
 * libvirtd opens LIBDIR/libvirt/lock-driver/NAME.so when qemu.conf says lock_manager = "NAME", and looks for one
 * object, virLockDriverImpl. Types and order are those of interface version 1.0.0 (libvirt's src/locking/lock_driver.h,
 * which no package installs), unchanged since libvirt 0.9.1. Only the names that libvirt looks up are its own. */
#ifndef MIGRATOR_LOCK_DRIVER_H
#define MIGRATOR_LOCK_DRIVER_H

#include <stddef.h>

enum { LOCK_VERSION = 1000000 };

/* Flags of `acquire`: a QEMU is about to be executed, its vCPUs stopped; nothing starts yet. */
enum { LOCK_REGISTER_ONLY = 1 << 0 };

enum {
	LOCK_PARAM_STRING,
	LOCK_PARAM_CSTRING,
	LOCK_PARAM_INT,
	LOCK_PARAM_LONG,
	LOCK_PARAM_UINT,
	LOCK_PARAM_ULONG,
	LOCK_PARAM_DOUBLE,
	LOCK_PARAM_UUID
};

struct lock_param {
	int type;
	const char *key;
	union {
		int i;
		long long l;
		unsigned int ui;
		unsigned long long ul;
		double d;
		char *str;
		const char *cstr;
		unsigned char uuid[16];
	} value;
};

struct lock_driver;

/* One VM for the time of one call or a few: made by `new`, ended by `free`. */
struct lock_manager {
	struct lock_driver *driver;
	void *private;
};

/* Each returns 0, or -1 with an error reported. */
struct lock_driver {
	unsigned int version;
	unsigned int flags;
	int (*init)(unsigned int version, const char *config, unsigned int flags);
	int (*deinit)(void);
	int (*new)(struct lock_manager *manager, unsigned int type, size_t count, struct lock_param *params,
		   unsigned int flags);
	void (*free)(struct lock_manager *manager);
	int (*add_resource)(struct lock_manager *manager, unsigned int type, const char *name, size_t count,
			    struct lock_param *params, unsigned int flags);
	int (*acquire)(struct lock_manager *manager, const char *state, unsigned int flags, int action, int *fd);
	int (*release)(struct lock_manager *manager, char **state, unsigned int flags);
	int (*inquire)(struct lock_manager *manager, char **state, unsigned int flags);
};

extern struct lock_driver virLockDriverImpl;

#endif
