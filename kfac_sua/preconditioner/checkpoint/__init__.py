"""The state of a preconditioner: its versions, what it must be to be loaded, and how it is written in place."""
