"""A cluster in virtual time: real engines, roles, loops and policies; mail, transfers and devices pass on a timeline."""
