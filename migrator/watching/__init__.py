"""Watching the state of ports: what changed between two looks, which of it somebody wants, and what a watcher knows."""
