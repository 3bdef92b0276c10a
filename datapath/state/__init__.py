"""Kinds of state: pure records, one file a kind. `datapath.registry` lists them."""
