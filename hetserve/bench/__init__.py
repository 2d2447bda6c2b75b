"""Open-loop load: when requests arrive, what each of them met with, and what that adds up to."""
