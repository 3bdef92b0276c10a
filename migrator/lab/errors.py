# SPDX-License-Identifier: GPL-2.0-only
"""What can go wrong in a lab."""

from __future__ import annotations

from datapath.errors import Error


class LabError(Error):
    """A lab could not be made or did not behave: says which part and what it printed."""


class WorkerFailed(LabError):
    """A worker process answered with an error, not at all, or died."""


class TooSlow(LabError):
    """This machine could not give what a test needs: the test begins anew, a few times at most."""
