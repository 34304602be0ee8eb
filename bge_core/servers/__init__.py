"""A model on a server: HTTP, the protocols it may speak, the models behind it."""
