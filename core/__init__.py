"""The vocabulary every other package shares: requests, layouts, messages, errors, time. Imports no sibling package."""
