"""Structures of a layer's Fisher block: the protocol, the package's own, and the base of those in one file."""
