# SPDX-License-Identifier: GPL-2.0-only
"""Who is who: certificates and their authority, identities and roles, and what one caller may ask for."""
