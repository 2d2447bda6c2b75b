"""One file per command. A file's top imports nothing of the server: that happens inside the function, when the command runs."""
