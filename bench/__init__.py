"""Benchmarks: what the system exists for, beside what a user would otherwise use, in one run on one machine."""
