"""What leaves the switch for collectors: encoders of the protocols they read. Pure: no I/O, no clock."""
