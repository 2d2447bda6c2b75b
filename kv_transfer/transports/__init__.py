"""One file per way of moving bytes; each implements `kv_transfer.transport.Transport`."""
