"""Toy models and tokenizers in the real file formats: for tests, benchmarks and `make-model`; never on a request path."""
