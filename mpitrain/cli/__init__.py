"""The command ``mpitrain``: one module per sub-command."""
